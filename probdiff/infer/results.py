"""What a walk of particles leaves: draws, weights, evidence.

The runs r = 1..R are pooled, particle i of run r with weight

    W_ri = w_ri Ẑ_r / Σ_r Ẑ_r,    Σ_i w_ri = 1,

and equally weighted draws are taken by systematic resampling of the pool, for each entry of the
prior's plates on its own and with a key of its own, then put in random order: the first few draws
are as good as any others, and draws of different entries are independent.

Source: Del Moral et al. (2006).
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from probdiff.infer.checks import Health, InferenceWarning, complaints, health
from probdiff.infer.layout import Layout, layout
from probdiff.infer.walk import Outcome, Walk, entry_keys

RESAMPLE = 2**31 - 1
"""Folded into an entry's key for its final resampling; runs have 0, 1, …"""
BLOCK = 256
"""Draws at which sites of the program are computed at once."""


class Result(NamedTuple):
    """One run of a sampler."""

    walk: Walk
    key: Array
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layout: Layout
    outcome: Outcome
    index: np.ndarray
    """Particles, of all runs in a row, that are the equally weighted draws, `(M, *plates)`."""
    in_runs: np.ndarray
    """Particles of each run that are its equally weighted draws, `(R, N, *plates)`."""
    health: Health
    complaints: tuple[str, ...]
    """What was warned of."""


def run(
    walk: Walk, key: Array, args: tuple[Any, ...], kwargs: dict[str, Any], progress: bool
) -> Result:
    """Walk, resample and measure; `warn` says what was found."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # of jax.random.PRNGKey
    outcome = walk(key, args, kwargs, progress)
    names = walk.look(lambda c: layout(c, walk.steps, walk.twist), args, kwargs)
    log_w = pooled_log_weights(outcome, walk.is_weighted)
    index, in_runs = _equally_weighted(key, outcome, log_w, walk.is_weighted)
    left = 0.0
    if not names.is_discrete:
        left = walk.apply(_left, args, kwargs, taken(pooled(outcome.x_0), index))
    measured = health(outcome, log_w, index, in_runs, left)
    found = complaints(walk, names, measured)
    return Result(walk, key, args, kwargs, names, outcome, index, in_runs, measured, found)


def warn(found: tuple[str, ...]) -> None:
    """Issue one `InferenceWarning` for each."""
    for text in found:
        warnings.warn(text, InferenceWarning, stacklevel=3)


def samples(result: Result) -> dict[str, np.ndarray]:
    """Equally weighted draws by site name."""
    x_0 = taken(pooled(result.outcome.x_0), result.index)
    return {result.layout.name: x_0} | result.walk.apply(
        _deterministics, result.args, result.kwargs, x_0
    )


def weighted_samples(result: Result) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """All particles by site name, and their log weights."""
    x_0 = pooled(result.outcome.x_0)
    sites = result.walk.apply(_deterministics, result.args, result.kwargs, x_0)
    log_w = pooled_log_weights(result.outcome, result.walk.is_weighted)
    return {result.layout.name: x_0} | sites, log_w


def log_evidence(outcome: Outcome) -> np.ndarray:
    """log of the mean of Ẑ over runs, `(*plates,)`."""
    return _log_mean_exp(outcome.log_evidences)


def log_evidence_se(outcome: Outcome) -> np.ndarray:
    """Standard error of log Z over runs, `(*plates,)`; nan for one run or no weight."""
    z = outcome.log_evidences.astype(np.float64)
    if len(z) == 1:
        return np.full(z.shape[1:], np.nan)
    top = z.max(0)
    ratio = np.exp(z - np.where(np.isfinite(top), top, 0.0))
    mean = ratio.mean(0)
    error = ratio.std(0, ddof=1) / np.sqrt(len(z))
    return np.asarray(np.where(mean > 0, error / np.where(mean > 0, mean, 1.0), np.nan))


def pooled(a: np.ndarray) -> np.ndarray:
    """`(R, N, ...)` to `(R·N, ...)`."""
    return a.reshape(-1, *a.shape[2:])


def pooled_log_weights(outcome: Outcome, is_weighted: bool = True) -> np.ndarray:
    """Log weights of all particles, each run in proportion to its Ẑ, `(R·N, *plates)`."""
    if not is_weighted:
        shape = pooled(outcome.log_weights).shape
        return np.full(shape, -np.log(shape[0]))
    z = outcome.log_evidences
    total = _log_mean_exp(z)
    is_there = np.isfinite(total)
    share = np.where(is_there, z - np.where(is_there, total, 0.0), 0.0)  # of Ẑ, times R
    return pooled(outcome.log_weights + share[:, None]) - np.log(len(z))


def resample(keys: Array, log_w: np.ndarray) -> np.ndarray:
    """Systematic resampling of each entry on its own, in random order: indices `(M, *plates)`."""
    size = len(log_w)
    weights = np.exp(log_w.reshape(size, -1).astype(np.float64))
    uniform, order = _uniform_and_order(keys, size)
    indices = [
        np.searchsorted(np.cumsum(w), (np.arange(size) + u) / size * w.sum(), side="right")[o]
        for w, u, o in zip(weights.T, uniform, order, strict=True)
    ]
    return np.minimum(np.stack(indices, 1), size - 1).reshape(log_w.shape)


def taken(a: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Rows `index` of `a`, entry by entry of the plates: `(M, *plates, ...)`."""
    return np.take_along_axis(a, np.expand_dims(index, tuple(range(index.ndim, a.ndim))), 0)


def _equally_weighted(
    key: Array, outcome: Outcome, log_w: np.ndarray, is_weighted: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of equally weighted draws: of the pool, and of each run."""
    runs, size, *plates = outcome.log_weights.shape
    if not is_weighted:
        each = np.broadcast_to(np.arange(size).reshape(-1, *[1] * len(plates)), (size, *plates))
        return each, each[None]  # one run
    keys = _fold(entry_keys(key, tuple(plates)), RESAMPLE)
    in_runs = [resample(_fold(keys, 1 + r), outcome.log_weights[r]) for r in range(runs)]
    return resample(_fold(keys, 0), log_w), np.stack(in_runs)


def _uniform_and_order(keys: Array, size: int) -> tuple[np.ndarray, np.ndarray]:
    uniform = jax.vmap(jax.random.uniform)(_fold(keys, 0))
    order = jax.vmap(lambda key: jax.random.permutation(key, size))(_fold(keys, 1))
    return np.asarray(uniform), np.asarray(order)


def _fold(keys: Array, value: int) -> Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, value)


def _log_mean_exp(z: np.ndarray) -> np.ndarray:
    z = z.astype(np.float64)
    top = z.max(0)
    finite = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(finite + np.log(np.mean(np.exp(z - finite), 0)))


def _deterministics(conditioned: Any, x_0: Any) -> dict[str, Any]:
    return jax.lax.map(conditioned.deterministics, jnp.asarray(x_0), batch_size=BLOCK)


def _left(conditioned: Any, x_0: Any) -> Any:
    """ᾱ_T E|x_0|² over draws, on the scale of the diffusion."""
    diffusion, steps = conditioned.draw.diffusion, conditioned.draw.trajectory.steps
    x = (x_0 - diffusion.loc) / diffusion.scale
    axes = tuple(range(1 + len(conditioned.batch_shape), x_0.ndim))
    return steps.alpha_bar_t[-1] * jnp.mean(jnp.sum(x**2, axes), 0)
