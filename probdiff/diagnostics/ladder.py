"""The ladder: from the bound K up to log p(x_0), and down to it from above.

With log weights of S trajectories drawn forward from x_0 (see `weights`),

    K = L_1  ≤  L_S = E log (1/S) Σ_i w_i  ≤  log p(x_0),    non-decreasing in S,
    E log Ẑ  ≤  log p(x_0),                                  Ẑ of an SMC with S particles.

All are below log p by Jensen's inequality; where E log Ẑ stands among the L_S depends on the model,
and is not assumed. From above, for an x_0 that the model drew itself: the trajectory x_1..x_T that
made it is a draw of p(x_1..x_T | x_0), so with it and S − 1 forward ones

    E log (1/S) (w_own + Σ_{i < S} w_i)  ≥  log p(x_0),

and the two close in on log p as S grows (bidirectional Monte Carlo). For other examples there is no
such trajectory, and no upper bound.

How much of L_S to believe is told by Pareto k of an example's weights: above 1 − 1/log₁₀ S the mean
of S weights has not settled. L_S is a bound all the same; its distance to log p is then unknown,
and its standard error too small.

Sources: Sohl-Dickstein et al. (2015), eq. 9; Burda et al. (2016) for L_S; Grosse et al. (2015) for
the upper bound; Vehtari et al. (2024) for k.
"""

import itertools
import math
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax.sharding import Mesh
from jaxtyping import Array
from scipy import stats

from probdiff import devices
from probdiff.arguments import (
    POSITIVE_SHARE,
    check_at_least,
    check_flag,
    check_key,
    check_number,
    check_object,
    check_shape,
    plain,
)
from probdiff.diagnostics.bounds import bound, check_examples, check_numbers, checked_rows
from probdiff.diagnostics.weights import draw_and_weigh, weigh
from probdiff.diffusion import Data, Diffusion, Mask
from probdiff.infer.health import pareto_k
from probdiff.types import Params
from probdiff.validation import check_context_rows

_SIZES = (1, 10, 100, 1000)
"""Numbers of trajectories S at which L_S is told, where nothing else is asked for."""
_PROB = 0.95
"""Coverage of the intervals."""
_LEAST_ESS = 0.1
"""Share of effective particles below which an SMC estimate is warned of."""


class LadderWarning(UserWarning):
    """A rung that may be far below log p(x_0): of how many examples, why, and what to do.

    `ladder` keeps its text in the attribute `warnings`, too:

        2 of 2 examples have Pareto k above 0.50 at S = 100: ... raise the last of sizes
    """


def ladder(
    key: Array, diffusion: Diffusion | tuple, params: Params, x_0: Data | tuple | dict, *,
    context: Any = None, mask: Mask | None = None, sizes: tuple[int, ...] = _SIZES,
    num_repeats: int = 4, num_draws: int = 100, threshold: float = 0.5, block_size: int = 4096,
    mesh: Mesh | None = None, progress: bool = False,
) -> xr.DataTree:  # fmt: skip
    """K, importance-weighted bounds and an SMC estimate of log p(x_0), for every example.

    Of a program, a pair `(model, guide)` as in `bound`, a draw is one of the whole guide. It has no
    SMC estimate: `smc`, `smc_se`, `least_ess` and what is told of them are left out.

    Args:
        key: Randomness; an example's figures do not depend on the other examples but for K (of a
            program, for the examples of its block).
        diffusion, params, x_0, context, mask: As in `bound`.
        sizes: Numbers of trajectories S, ascending, each a divisor of the last.
        num_repeats: Independent repeats R of the largest size, at least 2; a smaller size has R
            times the largest over S of them.
        num_draws: Draws per step for K, at least 2.
        threshold: Share of S below which SMC resamples.
        block_size: Trajectories at once, on each device.
        mesh: Devices that share out the trajectories, on one axis; K, a small part, needs but one.

    Returns:
        DataTree with group `ladder`, nats. Per `example`: `bound` (K) and `bound_se`; `importance`
        (L_S) and `importance_se` also by `size`; `smc` and `smc_se`; `pareto_k` of the weights;
        `least_ess`, the least share of effective particles of SMC. `importance_low`,
        `importance_high`, `smc_low` and `smc_high` end Student-t intervals of L_S and of E log Ẑ,
        of probability `prob`. Means over examples: `bound_mean`, `importance_mean`, `smc_mean`,
        and each with `_se` its standard error. Attributes: `units`, `T`, `num_repeats`,
        `num_draws`, `prob`, and in `warnings` the text of each `LadderWarning`, which are given.

    Raises:
        ValueError: if data, context, mask or parameters do not fit, or sizes or counts do not.

    Example:
        A model of two steps whose law is known, and whose bound K is not tight:

        >>> def network(x_t, t):  # pulls x_1 up by ½√β_2: x_0 ~ N(½ √(1−β_1) √β_2, 1) = N(0.2, 1)
        ...     return jnp.broadcast_to(jnp.array([0.5, 0.0]), (*x_t.shape, 2))
        >>> diffusion = Diffusion(GaussianKernel(), np.array([0.36, 0.25]), network, event_shape=())
        >>> x = np.array([-1.0, 0.0, 1.0, 2.0])
        >>> tree = diagnostics.ladder(jax.random.key(0), diffusion, {}, x, sizes=(1, 10, 100))
        >>> group, exact = tree["ladder"], dist.Normal(0.2, 1.0).log_prob(x)
        >>> round(float(exact.mean() - group["bound_mean"]), 1)  # nats that K lacks
        0.1
        >>> round(abs(float(exact.mean() - group["importance_mean"].sel(size=100))), 1)
        0.0
    """
    sizes, mesh = _check_sizes(sizes), devices.checked(mesh)
    check_flag(progress=progress)
    progress = progress and devices.is_first(mesh)
    check_key(key)
    check_at_least(1, block_size=block_size)
    if not isinstance(diffusion, tuple):
        check_examples(diffusion, params, x_0, context, mask)
    check_at_least(2, num_repeats=num_repeats, num_draws=num_draws)  # for standard errors
    check_number(POSITIVE_SHARE, threshold=threshold)
    key_bound, key_weights, key_smc = jax.random.split(key, 3)
    options: dict[str, Any] = {"block_size": block_size, "progress": progress}
    alone: dict[str, Any] = {"context": context, "mask": mask}
    if isinstance(diffusion, tuple):
        rows = checked_rows(diffusion, params, x_0, alone | {"mesh": mesh})
        count = num_repeats * sizes[-1]
        log_weights = rows.log_weights(key_weights, num_draws=count, **options)
        check_numbers({"log weight": log_weights})
        log_weights = log_weights.reshape(rows.count, num_repeats, -1)
        smc, T = None, rows.about.get("T")
        k_block = block_size
    else:
        given = diffusion, params, x_0, context, mask
        options |= {"size": sizes[-1], "num_repeats": num_repeats, "mesh": mesh}
        log_weights = weigh(key_weights, *given, threshold=0.0, **options).log_weights
        smc, T = weigh(key_smc, *given, threshold=threshold, **options), diffusion.T
        k_block = max(1, block_size // num_draws)
    k = bound(
        key_bound, diffusion, params, x_0, num_draws=num_draws, block_size=k_block,
        progress=progress, **alone,
    )["bound"]  # fmt: skip

    repeats = [_log_means(log_weights, size) for size in sizes]
    rungs = zip(*map(_mean_and_interval, repeats), strict=True)
    importance = [np.stack(rung, 1) for rung in rungs]
    khat = pareto_k(log_weights.reshape(len(log_weights), -1).T)
    variables = {
        "bound": ("example", k["bound"].values), "bound_se": ("example", k["bound_se"].values),
        **_named("importance", ("example", "size"), importance),
        "pareto_k": ("example", khat),
    }  # fmt: skip
    least_ess = np.ones(len(khat))
    if smc is not None:
        least_ess = smc.least_ess.min(1) / sizes[-1]
        variables |= _named("smc", ("example",), _mean_and_interval(smc.log_evidence))
        variables["least_ess"] = ("example", least_ess)
    group = xr.Dataset(variables, {"example": np.arange(len(khat)), "size": list(sizes)})
    for name in ("bound", "importance", "smc"):
        group = _with_mean(group, name) if name in group else group
    sentences = _sentences(khat, least_ess, sizes)
    for sentence in sentences:
        warnings.warn(sentence, LadderWarning, stacklevel=2)
    group.attrs = {
        "units": "nats", "num_repeats": num_repeats, "num_draws": num_draws, "prob": _PROB,
        "warnings": "\n".join(sentences),
    }  # fmt: skip
    group.attrs |= {} if T is None else {"T": T}
    return xr.DataTree.from_dict({"ladder": group})


def sandwich(
    key: Array, diffusion: Diffusion, params: Params, num_examples: int, *, context: Any = None,
    sizes: tuple[int, ...] = _SIZES, num_repeats: int = 4, block_size: int = 4096,
    mesh: Mesh | None = None, progress: bool = False,
) -> xr.DataTree:  # fmt: skip
    """Lower and upper bounds of log p(x_0) at draws of the model itself; options as in `ladder`.

    Args:
        num_examples: Draws N of the model, at least 2.
        num_repeats: Repeats R of the largest size over which an example's bounds are averaged.

    Returns:
        DataTree with group `sandwich`, nats: `lower` and `upper` by `example` and `size`; by `size`
        `lower_mean`, `upper_mean`, `gap_mean` over examples, each with `_se`; `pareto_k` per
        example. Group `draws` holds the examples, `x_0`. An example's upper bound holds in
        expectation over the one trajectory that made it, which its repeats share, so only means
        over examples have a standard error.

    Example:
        >>> def network(x_t, t):  # pulls x_1 up by √β_2, so x_0 ~ N(√(1−β_1) √β_2, 1) = N(0.4, 1)
        ...     return jnp.broadcast_to(jnp.array([1.0, 0.0]), (*x_t.shape, 2))
        >>> diffusion = Diffusion(GaussianKernel(), np.array([0.36, 0.25]), network, event_shape=())
        >>> tree = diagnostics.sandwich(jax.random.key(0), diffusion, {}, 200, sizes=(1, 10, 100))
        >>> gap = tree["sandwich"]["gap_mean"].values  # closes as S grows
        >>> bool(gap[0] > 0.5 > 0.1 > abs(gap[2]))
        True
        >>> exact = dist.Normal(0.4, 1.0).log_prob(tree["draws"]["x_0"].values).mean()
        >>> low, high = (float(tree["sandwich"][f"{end}_mean"][0]) for end in ("lower", "upper"))
        >>> low < float(exact) < high
        True
    """
    sizes, mesh = _check_sizes(sizes), devices.checked(mesh)
    check_flag(progress=progress)
    progress = progress and devices.is_first(mesh)
    check_key(key)
    check_object(Diffusion, diffusion=diffusion)
    check_at_least(2, num_examples=num_examples)
    check_at_least(1, num_repeats=num_repeats, block_size=block_size)
    reverse = diffusion.bind(params)
    check_context_rows(context, diffusion.context_shape, num_examples)
    key_draws, key_weights = jax.random.split(key)
    context = None if context is None else jnp.asarray(plain("context", context))
    inputs = key_draws, reverse.relative(), context, jnp.arange(num_examples)
    x_0, own = diffusion.programs(draw_and_weigh, *inputs)
    x_0, own = reverse.plus_loc(x_0), np.asarray(own)
    log_w = weigh(
        key_weights, diffusion, params, x_0, context, None, size=sizes[-1],
        num_repeats=num_repeats, threshold=0.0, block_size=block_size, mesh=mesh,
        progress=progress,
    ).log_weights  # fmt: skip
    lower = np.stack([_log_means(log_w, size).mean(1) for size in sizes], 1)
    upper = np.stack([_log_means(log_w, size, own).mean(1) for size in sizes], 1)
    parts = {"lower": lower, "upper": upper, "gap": upper - lower}
    variables = {name: (("example", "size"), values) for name, values in parts.items()}
    variables["pareto_k"] = ("example", pareto_k(log_w.reshape(num_examples, -1).T))
    coords = {"example": np.arange(num_examples), "size": list(sizes)}
    attrs = {"units": "nats", "T": diffusion.T, "num_repeats": num_repeats}
    group = xr.Dataset(variables, coords, attrs)
    for name in ("lower", "upper", "gap"):
        group = _with_mean(group, name)
    dims = ["example", *(f"x_0_dim_{i}" for i in range(x_0.ndim - 1))]
    draws = xr.Dataset({"x_0": (dims, x_0)}, {"example": np.arange(num_examples)})
    return xr.DataTree.from_dict({"sandwich": group, "draws": draws})


def _check_sizes(sizes: Iterable[int]) -> tuple[int, ...]:
    sizes = check_shape("sizes", tuple(sizes) if isinstance(sizes, Iterable) else sizes)
    is_ascending = all(a < b for a, b in itertools.pairwise(sizes))
    if not sizes or not is_ascending or any(sizes[-1] % s for s in sizes):
        raise ValueError(
            f"sizes must be positive, ascending, and each a divisor of the last; got {sizes}"
        )
    return sizes


def _log_means(log_w: np.ndarray, size: int, own: np.ndarray | None = None) -> np.ndarray:
    """Log mean weights of groups of S, `(N, R, S_max)` to `(N, R·S_max/S)`, `own` first in each."""
    groups = log_w.astype(np.float64).reshape(len(log_w), -1, size)
    if own is not None:
        groups[..., 0] = own[:, None]
    top = groups.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(top[..., 0] + np.log(np.mean(np.exp(groups - top), -1)))


def _mean_and_interval(repeats: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mean over repeats, `(N, M)` to `(N,)`, its standard error, and its Student-t interval."""
    count = repeats.shape[1]
    mean, se = repeats.mean(1), repeats.std(1, ddof=1) / math.sqrt(count)
    reach = stats.t.ppf((1 + _PROB) / 2, count - 1) * se
    return mean, se, mean - reach, mean + reach


def _named(name: str, dims: tuple[str, ...], values: Any) -> dict[str, Any]:
    """Variables of a mean, its standard error and its interval."""
    names = (name, f"{name}_se", f"{name}_low", f"{name}_high")
    return {n: (dims, v) for n, v in zip(names, values, strict=True)}


def _with_mean(group: xr.Dataset, name: str) -> xr.Dataset:
    """Add the mean over examples and its standard error, NaN for one example."""
    values = group[name]
    n = values.sizes["example"]
    spread = values.std("example", ddof=1) if n > 1 else values.mean("example") * math.nan
    return group.assign(
        {f"{name}_mean": values.mean("example"), f"{name}_mean_se": spread / math.sqrt(n)}
    )


def _sentences(khat: np.ndarray, least_ess: np.ndarray, sizes: tuple[int, ...]) -> list[str]:
    size, said = sizes[-1], []
    if size <= 10:  # too few for a fit
        return said
    most = min(1 - 1 / math.log10(size), 0.7)
    count = int(np.sum(np.nan_to_num(khat) > most))
    if count:
        said.append(
            f"{count} of {len(khat)} examples have Pareto k above {most:.2f} at S = {size}: their "
            "importance-weighted bounds are still lower bounds, but may be far below log p(x_0), "
            "with standard errors that are too small; raise the last of sizes"
        )
    count = int(np.sum(least_ess < _LEAST_ESS))
    if count:
        said.append(
            f"{count} of {len(khat)} examples had fewer than {_LEAST_ESS:.0%} effective particles "
            "at a step of SMC: its estimate may be below the importance-weighted bound; both are "
            "lower bounds, of which the higher is the nearer; raise the last of sizes"
        )
    return said
