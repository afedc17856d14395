"""Recipes: a trained diffusion of one's own data, without settings.

Each is a short function that returns ordinary objects. Copy it and change a line where you know
better.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import PRNGKeyArray
from numpyro.infer import SVI

from probdiff import (
    Diffusion,
    Fit,
    GaussianKernel,
    SampledTimeELBO,
    Table,
    fit,
    networks,
    readouts,
    schedules,
)
from probdiff.arguments import check_at_least, check_flag, check_key, check_object
from probdiff.types import Params

_T, _BETA_1, _ALPHA_BAR_T = 200, 1e-4, 1e-3
_COMPONENTS = (2, 4, 8, 16, 24)
_FLOOR = 1e-4  # of the mixture's variances
_FEWEST_COMPONENTS = 12  # so that levels around x_t are enough
_WIDTH, _DEPTH = 128, 3
_RATE, _DECAY, _EMA = 1e-3, 1e-3, 0.999
_BATCH, _EVALUATIONS, _PATIENCE = 256, 10, 3
_HELD_OUT, _EVALUATED = 0.1, 2_000  # share of rows; and how many, with repeats, are evaluated
_FEWEST, _MOST, _EPOCHS = 1_000, 8_000, 60  # steps, by rows


class Recipe(NamedTuple):
    """What a recipe returns.

    Example:
        See `recipes.table`.
    """

    diffusion: Diffusion
    """The model."""
    params: Params
    """Its parameters at the best evaluation."""
    fitted: Fit
    """The run, with its losses and evaluations on held-out rows."""


def table(
    key: PRNGKeyArray, table: Table, data: Any, *, num_steps: int | None = None,
    progress: bool = True,
) -> Recipe:  # fmt: skip
    """A diffusion of a table: a Gaussian mixture, and a network that corrects it.

    A mixture is fitted and its size chosen on a tenth of the rows, held out, equal rows together.
    `networks.FromMixture` starts from it, so that training can but improve; it is stopped where the
    held-out bound no longer does.

    Args:
        key: Randomness.
        table: Its description.
        data: Its rows, in a form that `Table` reads; missing entries are masked.
        num_steps: Steps of training; by default 60 epochs, between 1,000 and 8,000.
        progress: Whether to show a bar.

    Raises:
        ValueError: if data do not fit the table, or are fewer than 50 rows.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> data = {"x": rng.normal(size=200), "n": rng.poisson(1.0, 200)}
        >>> described = Table(data)
        >>> diffusion, params, fitted = recipes.table(
        ...     jax.random.key(0), described, data, num_steps=3, progress=False
        ... )
        >>> draws = described.decode(sample.ancestral(jax.random.key(1), diffusion, params, 5))
        >>> draws["n"].shape
        (5,)
    """
    check_key(key)
    check_object(Table, table=table)
    check_at_least(1, or_none=True, num_steps=num_steps)
    check_flag(progress=progress)
    key_noise, key_split, key_fit = jax.random.split(key, 3)
    rows = table.encode(data, key=key_noise)
    if len(rows.x_0) < 50:
        raise ValueError(f"data must have at least 50 rows; got {len(rows.x_0)}")
    is_held_out = _held_out(key_split, table.encode(data).x_0)
    mixture = _mixture(key_split, table, rows.x_0, is_held_out)
    diffusion = _started(table, mixture)
    batch = min(_BATCH, int(np.sum(~is_held_out)))
    num_steps = num_steps or int(np.clip(_EPOCHS * len(rows.x_0) / batch, _FEWEST, _MOST))
    rate = optax.cosine_decay_schedule(_RATE, num_steps)
    svi = SVI(
        diffusion.model, diffusion.guide, optax.adamw(rate, weight_decay=_DECAY), SampledTimeELBO()
    )
    held_out = np.flatnonzero(is_held_out)
    held_out = np.tile(held_out, 1 + _EVALUATED // len(held_out))  # against the noise of a few
    parts = [
        {"x_0": rows.x_0[of], "mask": rows.mask[of]} if not rows.mask.all() else rows.x_0[of]
        for of in (np.flatnonzero(~is_held_out), held_out)
    ]
    fitted = fit(
        key_fit, svi, parts[0], num_steps=num_steps, batch_size=batch, ema_decay=_EMA,
        held_out=parts[1], evaluate_every=max(1, num_steps // _EVALUATIONS), patience=_PATIENCE,
        progress=progress,
    )  # fmt: skip
    return Recipe(diffusion, fitted.params, fitted)


def _held_out(key: PRNGKeyArray, x_0: np.ndarray) -> np.ndarray:
    """A tenth of the distinct rows, equal ones together."""
    _, group = np.unique(x_0, axis=0, return_inverse=True)
    count = int(group.max()) + 1
    return np.asarray(jax.random.permutation(key, count))[group.ravel()] < _HELD_OUT * count


def _mixture(key: PRNGKeyArray, table: Table, x_0: np.ndarray, is_held_out: np.ndarray) -> Any:
    """The mixture with the highest density of held-out rows; missing entries by others' values."""
    from sklearn.mixture import GaussianMixture

    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    z = (x_0 - table.loc) / table.scale
    for column in z.T:
        missing = np.isnan(column)
        if missing.any():
            column[missing] = rng.choice(column[~missing], missing.sum())
    z = z + _grids(table)[1] * (rng.random(z.shape) - 0.5)
    fitted, rest, best, score = z[~is_held_out], z[is_held_out], None, -np.inf
    for count in (c for c in _COMPONENTS if 20 * c <= len(fitted)):
        model = GaussianMixture(count, reg_covar=_FLOOR, random_state=0).fit(fitted)
        if model.score(rest) <= score:
            break
        best, score = model, model.score(rest)
    return best


def _grids(table: Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lowest value, spacing and number of levels of each number, on the scale of the diffusion."""
    grid = table.last_step.grid
    low, spacing, levels = (0.0, 0.0, 0) if grid is None else (grid.low, grid.spacing, grid.levels)
    low, spacing, levels = (np.broadcast_to(a, table.event_shape) for a in (low, spacing, levels))
    return (low - table.loc) / table.scale, spacing / table.scale, levels


def _started(table: Table, mixture: Any) -> Diffusion:
    """The diffusion whose network is the mixture's own denoiser."""
    low, spacing, levels = _grids(table)
    has_levels = levels > 1
    levels = tuple(np.maximum(levels, 1).tolist())
    components = max(len(mixture.weights_), _FEWEST_COMPONENTS)
    network = networks.FromMixture(
        table.event_shape, components, _WIDTH, _DEPTH, levels=levels, rngs=nnx.Rngs(0)
    )
    network.start(
        mixture.weights_, mixture.means_, mixture.covariances_,
        lowest=np.where(has_levels, low, 0.0), spacing=np.where(has_levels, spacing, 1.0),
    )  # fmt: skip
    beta = schedules.log_snr_linear(_T, beta_1=_BETA_1, alpha_bar_T=_ALPHA_BAR_T)
    return Diffusion(
        GaussianKernel(), beta, network, event_shape=table.event_shape,
        readout=readouts.Mixture(components), last_step=table.last_step, loc=table.loc,
        scale=table.scale,
    )  # fmt: skip
