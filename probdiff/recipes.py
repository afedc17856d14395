"""Recipes: a trained diffusion of one's own data, without settings.

Each is a short function that returns ordinary objects. Copy it and change a line where you know
better.
"""

import math
from pathlib import Path
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
from probdiff.arguments import as_array, check_at_least, check_flag, check_key, check_object
from probdiff.tables.missing import drawn
from probdiff.types import Params

_T, _BETA_1, _LEAST_BETA_1, _ALPHA_BAR_T = 200, 1e-4, 1e-6, 1e-3
_COMPONENTS = (2, 4, 8, 16, 24, 32, 64)
_FLOORS = (1e-4, 1e-6)  # of the mixture's variances
_ROUNDS, _COPIES = 5, 5  # of draws of missing entries: while the mixture is fitted; of the rows
_FEWEST_COMPONENTS = 12  # so that levels around x_t are enough
_WIDTH, _DEPTH = 128, 3
_RATE, _DECAY, _EMA = 1e-3, 1e-3, 0.999
_BATCH, _EVALUATIONS, _PATIENCE = 256, 10, 3
_HELD_OUT, _EVALUATED = 0.1, 2_000  # share of rows; and how many, with repeats, are evaluated
_FEWEST, _MOST, _EPOCHS = 1_000, 8_000, 60  # steps, by rows
_SMALL, _PARTS = 256, 4  # numbers of a small image; Gaussians of each


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
    checkpoint: str | Path | None = None, progress: bool = True,
) -> Recipe:  # fmt: skip
    """A diffusion of a table: a Gaussian mixture, and a network that corrects it.

    A mixture is fitted and its size chosen on a tenth of the rows, held out, equal rows together.
    `networks.FromMixture` starts from it, so that training can but improve; it is stopped where the
    held-out bound no longer does.

    Args:
        key: Randomness.
        table: Its description.
        data: Its rows, in a form that `Table` reads. Missing entries are drawn from the mixture,
            given the others of their row, five times, and the network is trained on all five.
        num_steps: Steps of training; by default 60 epochs, between 1,000 and 8,000.
        checkpoint: As of `fit`: a run that was stopped goes on from this file.
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
    rng = np.random.default_rng(np.asarray(jax.random.bits(key_split, (4,))))
    mixture, z = _mixture(rng, table, rows.x_0, is_held_out)
    diffusion, x_0 = _started(table, mixture, z), rows.x_0
    if not rows.mask.all():
        copies = [_completed(rng, table, z, rows.mask, mixture) for _ in range(_COPIES)]
        x_0, is_held_out = np.concatenate(copies), np.tile(is_held_out, _COPIES)
    batch = min(_BATCH, int(np.sum(~is_held_out)))
    num_steps = num_steps or int(np.clip(_EPOCHS * len(rows.x_0) / batch, _FEWEST, _MOST))
    rate = optax.cosine_decay_schedule(_RATE, num_steps)
    svi = SVI(
        diffusion.model, diffusion.guide, optax.adamw(rate, weight_decay=_DECAY), SampledTimeELBO()
    )
    held_out = np.flatnonzero(is_held_out)
    held_out = np.tile(held_out, 1 + _EVALUATED // len(held_out))  # against the noise of a few
    fitted = fit(
        key_fit, svi, x_0[~is_held_out], num_steps=num_steps, batch_size=batch, ema_decay=_EMA,
        held_out=x_0[held_out], evaluate_every=max(1, num_steps // _EVALUATIONS),
        patience=_PATIENCE, checkpoint=checkpoint, progress=progress,
    )  # fmt: skip
    return Recipe(diffusion, fitted.params, fitted)


def image(
    key: PRNGKeyArray, images: Any, *, levels: int, num_steps: int | None = None,
    checkpoint: str | Path | None = None, progress: bool = True,
) -> Recipe:  # fmt: skip
    """A diffusion of images on whole levels, grey or in colour.

    Each number has a mixture of Gaussians given x_t, and its level a probability. Small images, of
    up to 256 numbers or with a side that 4 does not divide, go to a perceptron with a head that all
    pixels share, larger ones to a U-Net. A tenth of the images is held out, for the choice of the
    best evaluation.

    Args:
        key: Randomness.
        images: `(N, H, W)` or `(N, H, W, C)`, whole numbers 0..levels − 1.
        levels: How many levels there are, such as 256, at least 2.
        num_steps: Steps of training; by default 4,000 of the perceptron, 7,000 of the U-Net.
        checkpoint: As of `fit`: a run that was stopped goes on from this file.
        progress: Whether to show a bar.

    Raises:
        ValueError: if images have another shape, other levels, or are fewer than 50.

    Example:
        >>> images = datasets.digits().train  # levels 0..16
        >>> diffusion, params, fitted = recipes.image(
        ...     jax.random.key(0), images, levels=17, num_steps=2, progress=False
        ... )
        >>> sample.ancestral(jax.random.key(1), diffusion, params, 3, steps=20).shape
        (3, 8, 8)
    """
    check_key(key)
    check_at_least(2, levels=levels)
    check_at_least(1, or_none=True, num_steps=num_steps)
    check_flag(progress=progress)
    images = np.asarray(as_array("images", images), np.float32)
    if images.ndim not in (3, 4) or len(images) < 50:
        raise ValueError(
            f"images must be at least 50, of shape (N, H, W) or (N, H, W, C); got {images.shape}"
        )
    key_network, key_split, key_fit = jax.random.split(key, 3)
    shape, rngs = images.shape[1:], nnx.Rngs(jax.random.bits(key_network).item())
    loc, scale = float(images.mean()), max(float(images.std()), 1e-3)
    is_small = math.prod(shape) <= _SMALL or any(side % 4 for side in shape[:2])
    T, rate, batch = (200, 2e-3, 128) if is_small else (1000, 2e-3, 64)
    batch = min(batch, len(images) // 2)
    num_steps = num_steps or (4_000 if is_small else 7_000)
    network: Any = None
    if is_small:
        network = networks.SharedHead(
            shape, 256, 2, T, channels=6, head_width=24, outputs=3 * _PARTS, rngs=rngs
        )
    else:
        network = networks.UNet(shape, (32, 64), 1, patch=2, outputs=3 * _PARTS, rngs=rngs)
    diffusion = Diffusion(
        GaussianKernel(),
        schedules.log_snr_linear(T, beta_1=min(0.05, scale**-2), alpha_bar_T=1e-4), network,
        event_shape=shape, loc=loc, scale=scale,
        readout=readouts.Mixture(_PARTS, -loc / scale, (levels - 1 - loc) / scale),
        last_step=readouts.Discretised(0, levels - 1, levels),
    )  # fmt: skip
    is_held_out = _held_out(key_split, images.reshape(len(images), -1))
    warm_up = optax.warmup_cosine_decay_schedule(0, rate, num_steps // 20, num_steps)
    optimiser = optax.chain(
        optax.clip_by_global_norm(200.0 * math.prod(shape) * batch),
        optax.adamw(warm_up, weight_decay=0.1 if is_small else 0.0),
    )
    held_out = np.flatnonzero(is_held_out)[:_EVALUATED]
    fitted = fit(
        key_fit, SVI(diffusion.model, diffusion.guide, optimiser, SampledTimeELBO()),
        images[~is_held_out], num_steps=num_steps, batch_size=batch, ema_decay=_EMA,
        held_out=images[np.tile(held_out, 1 + _EVALUATED // (4 * len(held_out)))],
        evaluate_every=max(1, num_steps // _EVALUATIONS), patience=_PATIENCE,
        checkpoint=checkpoint, progress=progress,
    )  # fmt: skip
    return Recipe(diffusion, fitted.params, fitted)


def _held_out(key: PRNGKeyArray, x_0: np.ndarray) -> np.ndarray:
    """A tenth of the distinct rows, equal ones together."""
    rows = np.column_stack([np.nan_to_num(x_0), np.isnan(x_0)])
    _, group = np.unique(rows, axis=0, return_inverse=True)
    count = int(group.max()) + 1
    return np.asarray(jax.random.permutation(key, count))[group.ravel()] < _HELD_OUT * count


def _mixture(
    rng: Any, table: Table, x_0: np.ndarray, is_held_out: np.ndarray
) -> tuple[Any, np.ndarray]:
    """The mixture with the highest density of held-out rows, and the rows on its scale, complete.

    Missing entries are first those of other rows, then drawn by the mixture in turn with its fit.
    """
    from sklearn.mixture import GaussianMixture

    z = (x_0 - table.loc) / table.scale
    is_missing = np.isnan(z)
    for column, missing in zip(z.T, is_missing.T, strict=True):
        column[missing] = rng.choice(column[~missing], missing.sum())
    z = z + _grids(table)[1] * (rng.random(z.shape) - 0.5)
    best, most = None, -np.inf

    def fitted(count: int, floor: float) -> tuple[Any, np.ndarray, float]:
        rows = z
        for _ in range(_ROUNDS if is_missing.any() else 1):
            seed = int(rng.integers(2**31))
            mixture = GaussianMixture(count, reg_covar=floor, random_state=seed)
            mixture.fit(rows[~is_held_out])
            rows, log_p = drawn(rng, rows, is_missing, mixture)
        return mixture, rows, float(log_p[is_held_out].mean())

    for count in (c for c in _COMPONENTS if 20 * c <= np.sum(~is_held_out)):
        found = max((fitted(count, floor) for floor in _FLOORS), key=lambda each: each[2])
        if found[2] <= most:
            break
        best, z, most = found
    return best, z


def _completed(rng: Any, table: Table, z: np.ndarray, mask: np.ndarray, mixture: Any) -> np.ndarray:
    """Rows of the table with their missing entries drawn, values of their kinds."""
    x_0 = table.loc + table.scale * drawn(rng, z, ~mask, mixture)[0]
    low, spacing, levels = _grids(table)
    low = table.loc + table.scale * low
    high = low + table.scale * spacing * (levels - 1)
    x_0 = np.where(levels > 1, np.clip(x_0, low, high), x_0)
    key = jax.random.key(rng.integers(2**31))
    return table.encode(table.decode(x_0), key=key).x_0


def _grids(table: Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lowest value, spacing and number of levels of each number, on the scale of the diffusion."""
    grid = table.last_step.grid
    low, spacing, levels = (0.0, 0.0, 0) if grid is None else (grid.low, grid.spacing, grid.levels)
    low, spacing, levels = (np.broadcast_to(a, table.event_shape) for a in (low, spacing, levels))
    return (low - table.loc) / table.scale, spacing / table.scale, levels


def _started(table: Table, mixture: Any, z: np.ndarray) -> Diffusion:
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
    narrowest = min(np.linalg.eigvalsh(each)[0] for each in mixture.covariances_)
    beta_1 = float(np.clip(narrowest, _LEAST_BETA_1, _BETA_1))  # noise that hides nothing
    T = round(_T * (_BETA_1 / beta_1) ** (1 / 3))
    beta = schedules.log_snr_linear(T, beta_1=beta_1, alpha_bar_T=_ALPHA_BAR_T)
    return Diffusion(
        GaussianKernel(), beta, network, event_shape=table.event_shape,
        readout=readouts.Mixture(components), last_step=table.last_step, loc=table.loc,
        scale=table.scale, data_variance=np.cov(z.T, ddof=0) + _FLOORS[0] * np.eye(z.shape[1]),
    )  # fmt: skip
