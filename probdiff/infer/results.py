"""What a walk of particles says: draws, evidence, and how far to trust them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from probdiff.infer.walk import Outcome, Walk, entry_keys

RESAMPLE = 2**31 - 1
"""Folded into an entry's key for its final resampling; runs have 0, 1, …"""

BLOCK = 256
"""Draws at which sites of the program are computed at once."""


class Result(NamedTuple):
    """One run of a sampler."""

    walk: Walk
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    """Name of the site of x_0."""
    outcome: Outcome
    index: np.ndarray
    """Particles, of all runs in a row, that are the equally weighted draws, `(M, *plates)`."""


def run(
    walk: Walk, key: Array, args: tuple[Any, ...], kwargs: dict[str, Any], progress: bool
) -> Result:
    """Walk and resample."""
    outcome = walk(key, args, kwargs, progress)
    name = walk.look(lambda conditioned: conditioned.name, args, kwargs)
    keys = _fold(entry_keys(key, outcome.log_evidences.shape[1:]), RESAMPLE)
    index = resample(keys, pooled_log_weights(outcome))
    return Result(walk, args, kwargs, name, outcome, index)


def done(result: Result | None) -> Result:
    """The result, if there is one."""
    if result is None:
        raise ValueError("run must be called first; there are no draws yet")
    return result


def samples(result: Result) -> dict[str, np.ndarray]:
    """Equally weighted draws by site name."""
    x_0 = taken(pooled(result.outcome.x_0), result.index)
    return {result.name: x_0} | result.walk.apply(_deterministics, result.args, result.kwargs, x_0)


def weighted_samples(result: Result) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """All particles by site name, and their log weights."""
    x_0 = pooled(result.outcome.x_0)
    sites = result.walk.apply(_deterministics, result.args, result.kwargs, x_0)
    return {result.name: x_0} | sites, pooled_log_weights(result.outcome)


def log_evidence(outcome: Outcome) -> np.ndarray:
    """log of the mean of Ẑ over runs, `(*plates,)`."""
    return _log_mean_exp(outcome.log_evidences)


def log_evidence_se(outcome: Outcome) -> np.ndarray:
    """Standard error of log Z over runs, `(*plates,)`; nan for one run or no weight."""
    z = outcome.log_evidences
    if len(z) == 1:
        return np.full(z.shape[1:], np.nan)
    top = z.max(0)
    ratio = np.exp(z - np.where(np.isfinite(top), top, 0.0))
    mean = ratio.mean(0)
    error = ratio.std(0, ddof=1) / np.sqrt(len(z))
    return np.where(mean > 0, error / np.where(mean > 0, mean, 1.0), np.nan)


def pooled(a: np.ndarray) -> np.ndarray:
    """`(R, N, ...)` to `(R·N, ...)`."""
    return a.reshape(-1, *a.shape[2:])


def pooled_log_weights(outcome: Outcome) -> np.ndarray:
    """Log weights of all particles, each run in proportion to its Ẑ, `(R·N, *plates)`."""
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


def _uniform_and_order(keys: Array, size: int) -> tuple[np.ndarray, np.ndarray]:
    uniform = jax.vmap(jax.random.uniform)(_fold(keys, 0))
    order = jax.vmap(lambda key: jax.random.permutation(key, size))(_fold(keys, 1))
    return np.asarray(uniform), np.asarray(order)


def _fold(keys: Array, value: int) -> Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, value)


def _log_mean_exp(z: np.ndarray) -> np.ndarray:
    top = z.max(0)
    finite = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return finite + np.log(np.mean(np.exp(z - finite), 0))


def _deterministics(conditioned: Any, x_0: Any) -> dict[str, Any]:
    return jax.lax.map(conditioned.deterministics, jnp.asarray(x_0), batch_size=BLOCK)
