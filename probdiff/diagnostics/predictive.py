"""Model checks: does what the model draws look like the data, one statistic at a time?

R replicate data sets are drawn from the model, each with as many examples (and the contexts) as the
data. For a statistic f, such as one coordinate of x_0, example n is ranked among its R replicates,

    PIT_n = (#{f(x_n^r) < f(x_n)} + U (1 + #{f(x_n^r) = f(x_n)})) / (R + 1),    U ~ Uniform(0, 1).

Replicates are independent of each other and of the data, so if f has the right law the PITs of all
examples are independent and uniform on (0, 1), exactly, ties or none: Kolmogorov and Smirnov's test
then has the level it says. If they are not uniform, the marginal law of f is wrong:

    too many near 0 and 1        draws are too narrow
    too many near 1/2            draws are too wide
    too many near 1 (or 0)       draws are too small (or too large)

Nothing is said of what no statistic sees: coordinates may be right one by one and wrong together,
so add statistics that combine them. Data the model was trained on flatter it. With few replicates
only coarse errors show: PITs depend on the law of F(x_n) by its first R moments alone, F being the
model's distribution function.

Sources: Rubin (1984) and Gelman, Meng & Stern (1996) for predictive checks; Dawid (1984) for the
PIT; Czado, Gneiting & Held (2009) for ties.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from arviz_base import from_dict
from jaxtyping import Array

from probdiff.arguments import (
    check_at_least,
    check_callable,
    check_key,
    check_object,
    plain,
    read_array,
    shape_text,
)
from probdiff.diffusion import Data, Diffusion
from probdiff.infer.calibrate import p_values_of, pit, verdict
from probdiff.infer.program import numbered
from probdiff.sample import ancestral
from probdiff.types import Params
from probdiff.validation import check_context_rows

_Statistics = Mapping[str, Callable[[Array | np.ndarray], Array | np.ndarray]]


def predictive_check(
    key: Array, diffusion: Diffusion, params: Params, x_0: Data, *, num_replicates: int = 50,
    context: Any = None, statistics: _Statistics | None = None, block_size: int = 4096,
    progress: bool = False,
) -> xr.DataTree:  # fmt: skip
    """Replicate data sets of the model beside the data, and PITs of every coordinate.

        tree = diagnostics.predictive_check(key, diffusion, params, x, num_replicates=50)
        arviz_plots.plot_ppc_dist(tree)
        arviz_plots.plot_ppc_pit(tree, coords={"x_0_dim_0": 0})  # one number for each example
        arviz_plots.plot_ecdf_pit(tree, group="pit", sample_dims=["example"], coverage=False)

    Args:
        key, diffusion, params, context: As in `bound`.
        x_0: Examples in the user's units, `(N, *event_shape)`; best those it was not trained on.
        num_replicates: Number R of replicate data sets.
        statistics: Further statistics by name, each a function of examples `(..., *event_shape)`
            to numbers `(...)`, in NumPy or JAX.
        block_size: Draws made at once.

    Returns:
        Groups `posterior_predictive` (dims `chain` of one, `draw` the replicates, `example` and
        those of x_0) and `observed_data`, of x_0 and of each statistic, for ArviZ's
        `plot_ppc_dist`, `plot_ppc_pit` and `plot_ppc_tstat`. Group `pit`: PITs in (0, 1) of the
        same, by `example`. Group `uniformity`: their Kolmogorov-Smirnov p-values. Attributes of the
        tree: `num_examples`, `num_replicates`, `num_tests` m, `least_p_value`, where it is,
        `least_at`, and `bound` = 0.01/m: a least p-value below rejects the model.

    Raises:
        ValueError: if data, context, parameters, or a statistic's name or values do not fit.

    Example:
        Numbers one by one are as the model says; a statistic of both sees that they go together:

        >>> diffusion = standard_diffusion((2,))  # x_0 ~ N(0, I)
        >>> key, key_x = jax.random.split(jax.random.key(0))
        >>> z = jax.random.normal(key_x, (300, 2))
        >>> x = z @ jnp.array([[1.0, 1.0], [0.0, 0.1]])  # twice about the same number
        >>> difference = {"difference": lambda x: x[..., 0] - x[..., 1]}
        >>> tree = diagnostics.predictive_check(key, diffusion, {}, x, statistics=difference)
        >>> p = tree["uniformity"]
        >>> (p["x_0"].values > 0.01).tolist(), bool(p["difference"] < 1e-6)
        ([True, True], True)
    """
    check_key(key)
    statistics = {} if statistics is None else statistics
    _check(diffusion, x_0, num_replicates, context, statistics)
    key_draws, key_ties = jax.random.split(key)
    x_0, grid = np.asarray(plain("x_0", x_0)), diffusion.last_step.grid
    x_0 = x_0 if grid is None else grid.nearest_in_float64(x_0)  # as draws are: they may be equal
    shape = (num_replicates, *x_0.shape)
    rows = None if context is None else np.concatenate([np.asarray(context)] * num_replicates)
    draws = ancestral(
        key_draws, diffusion, params, num_replicates * len(x_0), context=rows,
        block_size=block_size, progress=progress,
    ).reshape(shape)  # fmt: skip
    observed = _values(diffusion.name, x_0, len(x_0), statistics or {})
    replicated = _values(diffusion.name, draws, shape[:2], statistics or {})
    pits = {
        name: pit(jax.random.fold_in(key_ties, i), values, replicated[name])
        for i, (name, values) in enumerate(observed.items())
    }
    return _tree(diffusion.name, observed, replicated, pits)


def _check(
    diffusion: Diffusion, x_0: Data, num_replicates: int, context: Any, statistics: _Statistics
) -> None:
    check_object(Diffusion, diffusion=diffusion)
    check_object(Mapping, "a mapping of names to functions", statistics=statistics)
    read_array("x_0", x_0, jnp.number, jnp.bool_)
    if np.ndim(x_0) != len(diffusion.event_shape) + 1 or np.shape(x_0)[0] < 2:
        raise ValueError(
            f"x_0 must have shape {shape_text('N', diffusion.event_shape)} with N at least 2; "
            f"got {np.shape(x_0)}"
        )
    check_at_least(1, num_replicates=num_replicates)
    diffusion.check_data(x_0)
    check_context_rows(context, diffusion.context_shape, len(x_0))
    for name, statistic in statistics.items():
        check_callable("a function of examples", **{f"statistics[{name!r}]": statistic})
    taken = {diffusion.name, "example", *numbered(diffusion.name, 0, len(diffusion.event_shape))}
    if taken & set(statistics):
        raise ValueError(
            f"statistics must have names other than {sorted(taken)}; got {sorted(statistics)}"
        )


def _values(
    name: str, x: np.ndarray, lead: int | tuple[int, ...], statistics: _Statistics
) -> dict[str, np.ndarray]:
    """x itself and its statistics, of leading shape `lead`."""
    values = {name: x}
    for key, statistic in statistics.items():
        value = np.asarray(statistic(x))
        expected = np.empty(lead).shape
        if value.shape != expected:
            raise ValueError(
                f"statistics[{key!r}] must map examples {x.shape} to numbers {expected}; "
                f"got {value.shape}"
            )
        if np.isnan(value).any():
            raise ValueError(f"statistics[{key!r}] must be a number at every draw; got nan")
        values[key] = value
    return values


def _tree(
    name: str, observed: dict[str, np.ndarray], replicated: dict[str, np.ndarray],
    pits: dict[str, np.ndarray],
) -> xr.DataTree:  # fmt: skip
    dims = {key: numbered(name, 0, pit.ndim - 1) for key, pit in pits.items()}
    p_values = {key: p_values_of(pit) for key, pit in pits.items()}
    drawn = {key: values[None] for key, values in replicated.items()}
    groups = {"posterior_predictive": drawn, "observed_data": observed}
    tree = from_dict(groups, dims={key: ["example", *dims[key]] for key in observed})
    sizes = dict(zip(["example", *dims[name]], observed[name].shape, strict=True))
    coords = {dim: np.arange(size) for dim, size in sizes.items()}
    named = {key: (("example", *dims[key]), pit) for key, pit in pits.items()}
    tree["pit"] = xr.DataTree(xr.Dataset(named, coords))
    del coords["example"]
    tested = {key: (dims[key], p) for key, p in p_values.items()}
    tree["uniformity"] = xr.DataTree(xr.Dataset(tested, coords))
    tree.name = "probdiff"
    counts = {"num_examples": len(observed[name]), "num_replicates": len(replicated[name])}
    tree.attrs = counts | verdict(p_values)
    return tree
