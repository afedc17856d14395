"""Baselines: what is to be had without a diffusion, on the same examples and the same measure.

    independent   each entry by itself: shares of its levels, or a mixture of Gaussians
    gaussian      one Gaussian of all entries
    mixture       Gaussian mixture: components, form and floor of the covariances by validation rows

Models are fitted to z = (x_0 − loc)/scale. Where an entry lies on a grid of spacing Δ, rows to fit
get uniform noise as wide as Δ, and the mass of an example's cell is the density's integral over it,

    P(x_0) ≈ (1/M) Σ_m p(z + u_m) ∏ Δ_i/scale_i,    u_m the first M points of a Sobol sequence;

the end cells count as closed. Entries that lie on none count by their density, in the user's units.
Symbols have shares alone, half a row added to each state.
"""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array
from scipy import stats
from scipy.special import logsumexp

from probdiff.arguments import (
    INNER_SHARE,
    check_key,
    check_number,
    check_object,
    check_shape,
    plain,
    read_array,
    shape_text,
)
from probdiff.diagnostics.bounds import measure, summary
from probdiff.diffusion import Data, Diffusion
from probdiff.kernels import DiscreteKernel
from probdiff.readouts.grid import is_on_grid
from probdiff.validation import check_data

_COMPONENTS = (2, 4, 8, 16, 32, 64)
_FORMS = ("full", "diag")
_FLOORS = (1e-6, 1e-4, 1e-2)  # added to variances, over those of z
_MOST_OF_ONE = 5  # components for an entry by itself
_POINTS = 128  # M
_ROWS = 256  # scored at once


def baselines(
    key: Array, diffusion: Diffusion, x_0: Data, held_out: Data, *,
    components: tuple[int, ...] = _COMPONENTS, validation: float = 0.2,
) -> dict[str, xr.DataTree]:  # fmt: skip
    """Log p of held-out examples under models without a network, as `bound` has it.

    Args:
        key: Splits off validation rows, and draws the noise within cells.
        diffusion: Whose measure, `loc` and `scale` are taken; nothing of its network.
        x_0: Examples to fit, `(N, *event_shape)`, the user's units, complete.
        held_out: Examples to score.
        components: Numbers of components to try, besides one; none with over N/20 each.
        validation: Share of distinct rows by which a mixture is chosen, in (0, 1); equal rows stay
            together. The chosen one is fitted anew to all rows.

    Returns:
        Trees by the name of the baseline, each with the group `bound` and its attributes, nats, as
        `bound` returns them, so that `compare({"diffusion": tree, **trees})` pairs them; `chosen`
        says which mixture. Of symbols there is `independent` alone.

    Raises:
        ValueError: if examples do not fit the diffusion, or are fewer than 20 to fit.

    Example:
        >>> x = np.random.default_rng(0).normal([0.0, 3.0], [1.0, 2.0], (600, 2))
        >>> diffusion = standard_diffusion((2,), loc=x.mean(0), scale=x.std(0))
        >>> trees = diagnostics.baselines(
        ...     jax.random.key(0), diffusion, x[:500], x[500:], components=(2,)
        ... )
        >>> sorted(trees), round(trees["gaussian"]["bound"].attrs["mean"], 1)  # −H = −3.5
        (['gaussian', 'independent', 'mixture'], -3.5)
    """
    check_key(key)
    check_object(Diffusion, diffusion=diffusion)
    for name, rows in {"x_0": x_0, "held_out": held_out}.items():
        read_array(name, rows, jnp.number, jnp.bool_)
        if np.ndim(rows) != len(diffusion.event_shape) + 1 or not len(rows):
            expected = shape_text("N", diffusion.event_shape)
            raise ValueError(f"{name} must have shape {expected}; got {np.shape(rows)}")
        check_data(
            diffusion.kernel, diffusion.event_shape, rows, None, name, grid=diffusion.last_step.grid
        )
    components = check_shape("components", components)
    check_number(INNER_SHARE, validation=validation)
    if len(x_0) < 20:
        raise ValueError(f"x_0 must have at least 20 examples to fit; got {len(x_0)}")
    rows, test = (np.asarray(plain("x_0", a)).reshape(len(a), -1) for a in (x_0, held_out))
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    if isinstance(diffusion.kernel, DiscreteKernel):
        found = {"independent": (_shares(rows, test, diffusion.kernel.num_states).sum(1), "")}
    else:
        found = _of_numbers(rng, diffusion, rows, test, components, validation)
    trees = {}
    for name, (values, chosen) in found.items():
        group = xr.Dataset({"bound": ("example", values)}, {"example": np.arange(len(values))})
        group.attrs = summary(values) | measure(diffusion, held_out, None) | {"chosen": chosen}
        trees[name] = xr.DataTree.from_dict({"bound": group}, name="probdiff")
    return trees


def _of_numbers(
    rng: Any, diffusion: Diffusion, rows: np.ndarray, test: np.ndarray,
    components: tuple[int, ...], validation: float,
) -> dict[str, tuple[np.ndarray, str]]:  # fmt: skip
    shape, grid = diffusion.event_shape, diffusion.last_step.grid
    loc, scale = (np.broadcast_to(a, shape).ravel() for a in diffusion.units)
    is_on = np.broadcast_to(is_on_grid(grid), shape).ravel()
    spacing = np.broadcast_to(0.0 if grid is None else grid.spacing, shape).ravel()
    width = spacing / scale
    z, z_test = ((a.astype(np.float64) - loc) / scale for a in (rows, test))
    z = z + width * (rng.random(z.shape) - 0.5)
    _, group = np.unique(rows, axis=0, return_inverse=True)
    group = group.ravel()
    is_kept = rng.permutation(group.max() + 1)[group] >= validation * (group.max() + 1)
    points = stats.qmc.Sobol(max(1, int(is_on.sum())), seed=rng).random(_POINTS) - 0.5
    log_volume = np.where(is_on, np.log(np.where(is_on, width, 1.0)), -np.log(scale))

    def score(model: Any, z: np.ndarray, which: Any = slice(None)) -> np.ndarray:
        """log P of rows, in the entries that a model is of."""
        on, total = is_on[which], log_volume[which].sum()
        if not on.any():
            return np.asarray(model.score_samples(z)) + total
        shifts = np.zeros((_POINTS, z.shape[1]))
        shifts[:, on] = (points[:, : on.sum()]) * width[which][on]
        blocks = []
        for start in range(0, len(z), _ROWS):
            block = z[start : start + _ROWS, None] + shifts
            log_p = model.score_samples(block.reshape(-1, z.shape[1])).reshape(-1, _POINTS)
            blocks.append(logsumexp(log_p, 1) - math.log(_POINTS))
        return np.concatenate(blocks) + total

    seed = int(rng.integers(2**31))
    own = np.zeros(test.shape)
    for i in range(test.shape[1]):
        if is_on[i]:
            low, levels = _of_entry(grid, shape, i)
            places = [np.round((a[:, i] - low) / spacing[i]).astype(int) for a in (rows, test)]
            own[:, i] = _shares(*(p[:, None] for p in places), levels)[:, 0]
        else:
            column, which = z[:, i : i + 1], slice(i, i + 1)
            model, _ = _best(column, is_kept, range(2, _MOST_OF_ONE + 1), ("full",), seed)
            own[:, i] = score(model, z_test[:, which], which)
    one = _fitted(z, 1, "full", _FLOORS[0], seed)
    model, chosen = _best(z, is_kept, components, _FORMS, seed)
    return {
        "independent": (own.sum(1), ""), "gaussian": (score(one, z_test), ""),
        "mixture": (score(model, z_test), chosen),
    }  # fmt: skip


def _best(
    z: np.ndarray, is_kept: np.ndarray, components: Any, forms: tuple[str, ...], seed: int
) -> tuple[Any, str]:
    """The mixture with the highest density of rows that it did not see, fitted to all of them."""
    fitted, rest, scores = z[is_kept], z[~is_kept], {}

    def score(*choice: Any) -> float:
        if choice not in scores:
            scores[choice] = float(_fitted(fitted, *choice, seed).score(rest))
        return scores[choice]

    for form in forms:
        best, worse = -math.inf, 0
        for count in (1, *(c for c in components if 20 * c <= len(fitted))):
            value = score(count, form, _FLOORS[1])
            best, worse = max(best, value), worse + 1 if value < best else 0
            if worse == 2:  # more components only fall behind
                break
        chosen_count = max((k for k in scores if k[1] == form), key=lambda k: scores[k])[0]
        for floor in _FLOORS:
            score(chosen_count, form, floor)
    count, form, floor = max(scores, key=lambda choice: scores[choice])
    chosen = f"{count} components, {form} covariances, variances raised by {floor:g}"
    return _fitted(z, count, form, floor, seed), chosen


def _fitted(z: np.ndarray, count: int, form: str, floor: float, seed: int) -> Any:
    from sklearn.mixture import GaussianMixture

    model = GaussianMixture(count, covariance_type=form, reg_covar=floor, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what has not converged is a baseline all the same
        return model.fit(z)


def _shares(rows: np.ndarray, test: np.ndarray, levels: int) -> np.ndarray:
    """log of the share of each entry's level among rows, half a row added to every level."""
    found = np.zeros(test.shape)
    for i in range(test.shape[1]):
        counts = np.bincount(rows[:, i].astype(int), minlength=levels) + 0.5
        found[:, i] = np.log(counts / counts.sum())[test[:, i].astype(int)]
    return found


def _of_entry(grid: Any, shape: tuple[int, ...], i: int) -> tuple[float, int]:
    low, levels = (np.broadcast_to(a, shape).ravel()[i] for a in (grid.low, grid.levels))
    return float(low), int(levels)
