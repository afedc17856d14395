"""Weights of trajectories, whose mean is p(x_0): by importance sampling and by SMC.

A trajectory drawn forward from an example has the weight

    w = p(x_0 | x_1) π(x_T) ∏_{t ≥ 2} p(x_s | x_t)  /  ∏_{t ≥ 1} q(x_t | x_s),    E_q[w] = p(x_0)

(eq. 9, Jarzynski's average). Step by step, with targets γ_t = π(x_t) ∏_{u ≤ t} p(x_{u−1} | x_u),

    w_1 = π(x_1) p(x_0 | x_1) / q(x_1 | x_0),
    w_t/w_s = π(x_t) p(x_s | x_t) / (π(x_s) q(x_t | x_s)),

it is the weight of a particle, and particles may be resampled on the way: the product of the mean
weights between resamplings is again unbiased for p(x_0). By detailed balance a step's factor is
p(x_s | x_t) over the stationary process's own T_π(x_s | x_t): 1 where the network has nothing to
say. An absorbing diffusion has no π on data; it is left out there until x_T.

A trajectory that the model itself drew down to its x_0 has the same weight, but is distributed as
p(x_1..x_T | x_0).

Sources: Sohl-Dickstein et al. (2015), eq. 9; Del Moral et al. (2006).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.sharding import Mesh
from jaxtyping import Array, Float

from probdiff import bars, devices
from probdiff.diagnostics.bounds import check_numbers, relative_rows
from probdiff.diffusion import Data, Diffusion, Mask
from probdiff.infer.particles import effective_number, log_mean, systematic
from probdiff.kernels import AbsorbingKernel
from probdiff.reverse import Reverse
from probdiff.trajectories import ForwardTrajectory
from probdiff.types import Params


class _Weighed(NamedTuple):
    """Particles of one population at x_T, or of a stack of populations."""

    log_weights: Float[Array | np.ndarray, "*stack S"]
    """Since the last resampling."""
    log_evidence: Float[Array | np.ndarray, "*stack"]
    """Log of the product of mean weights, unbiased for p(x_0) in the user's units."""
    least_ess: Float[Array | np.ndarray, "*stack"]
    """Least effective number of any level, before resampling."""


class _Pair(NamedTuple):
    """Both trajectories of one example, parameters bound."""

    forward: ForwardTrajectory
    reverse: Reverse

    def log_first(self, x_0: Array, x_1: Array) -> Float[Array, " S"]:
        """log p(x_0 | x_1) − log q(x_1 | x_0)."""
        x_0 = jnp.broadcast_to(x_0, x_1.shape)
        law = self.reverse.data(x_1, self.forward.observed)
        q = self.forward.marginal_at(jnp.ones(len(x_1), jnp.int32), x_1.shape)
        return law.log_prob(x_0) - self.sum_observed(q.log_prob(x_1))

    def log_step(self, law: dist.Distribution, x_s: Array, x_t: Array, t: Array) -> Array:
        """log p(x_s | x_t) − log q(x_t | x_s), entry by entry: small, where its parts are large."""
        q = self.forward.kernel.transition(x_s, self.forward.step_at(t))
        return law.log_prob(x_s) - q.log_prob(x_t)

    def log_pi(self, x_t: Array) -> Array:
        """log π(x_t), entry by entry."""
        return self.forward.kernel.stationary(x_t.shape).log_prob(x_t)

    def sum_observed(self, terms: Array) -> Float[Array, " S"]:
        """Sum over entries; a missing one runs the same process both ways, and its terms cancel."""
        observed = self.forward.observed
        return self.forward.sum_event(terms if observed is None else jnp.where(observed, terms, 0))


def weigh(
    key: Array, diffusion: Diffusion, params: Params, x_0: Data, context: Any, mask: Mask | None, *,
    size: int, num_repeats: int, threshold: float, block_size: int, progress: bool,
    mesh: Mesh | None = None,
) -> _Weighed:  # fmt: skip
    """Trajectories forward from every example, in independent populations.

    Args:
        key: System (n, r) uses `fold_in(fold_in(key, n), r)`: it does not depend on its company.
        diffusion, params, x_0, context, mask: As in `bound`.
        size: S, trajectories of a population.
        num_repeats: R, populations of an example.
        threshold: Share of S below which the effective number calls for resampling; 0 for never.
        block_size: Trajectories at once, on each device; at least one population is.
        progress: Show a bar over the blocks.
        mesh: Devices that take blocks at the same time, as `devices.checked` returns it.

    Returns:
        NumPy arrays that lead with `(N, R)`.
    """
    count = len(x_0) * num_repeats
    share = -(-count // (1 if mesh is None else mesh.size))
    per_block = min(share, max(1, block_size // size))
    reverse, given = relative_rows(diffusion, params, x_0, context, mask)
    starts = bars.bar(range(0, count, per_block), desc="weigh", disable=not progress)

    def block(start: int) -> tuple[Array | np.ndarray | None, ...]:
        population = np.minimum(np.arange(start, start + per_block), count - 1)  # one shape for all
        example, repeat = np.divmod(population, num_repeats)
        return key, example, repeat, *(None if a is None else a[example] for a in given)

    blocks = devices.blockwise(
        diffusion.programs, _weigh_block, reverse, map(block, starts), mesh,
        size=size, threshold=threshold,
    )  # fmt: skip
    joined = jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *blocks)
    weighed = jax.tree.map(lambda a: a.reshape(len(x_0), num_repeats, *a.shape[1:]), joined)
    check_numbers({"log weight": weighed.log_weights})
    return weighed


def _weigh_block(
    key: Array, reverse: Reverse, example: Array, repeat: Array, x_0: Array, context: Array | None,
    mask: Array | None,
    *, size: int, threshold: float,
) -> _Weighed:  # fmt: skip
    def one(
        example: Array, repeat: Array, x_0: Array, context: Array | None, mask: Array | None
    ) -> _Weighed:
        own = jax.random.fold_in(jax.random.fold_in(key, example), repeat)
        return _ascend(own, _pair(reverse, x_0, context, mask), x_0, size, threshold)

    axes = tuple(None if a is None else 0 for a in (x_0, context, mask))
    return jax.vmap(one, (0, 0, *axes))(example, repeat, x_0, context, mask)


def _pair(
    reverse: Reverse, x_0: Array, context: Array | None = None, mask: Array | None = None
) -> _Pair:
    reverse = reverse if context is None else reverse.given(context)
    return _Pair(ForwardTrajectory.of(reverse, x_0, mask), reverse)


def _ascend(key: Array, pair: _Pair, x_0: Array, size: int, threshold: float) -> _Weighed:
    """From x_0 to x_T, S particles of one population."""
    forward, reverse = pair.forward, pair.reverse
    kernel, T = forward.kernel, forward.steps.T
    key_first, key_settle, key_steps = jax.random.split(key, 3)
    has_pi = not isinstance(kernel, AbsorbingKernel)

    def settle(key: Array, x: Array, log_w: Array, log_z: Array, least: Array) -> tuple[Array, ...]:
        ess = effective_number(log_w)
        least = jnp.minimum(least, ess)
        if threshold == 0:
            return x, log_w, log_z, least
        is_due = (ess < threshold * size) & (ess > 0)
        index = jnp.where(is_due, systematic(key, log_w), jnp.arange(size))
        log_z += jnp.where(is_due, log_mean(log_w), 0.0)
        return x[index], jnp.where(is_due, 0.0, log_w), log_z, least

    def advance(
        state: tuple[Array, ...], inputs: tuple[Array, Array]
    ) -> tuple[tuple[Array, ...], None]:
        x_s, log_w, *rest = state
        t, key = inputs
        key_move, key_resample = jax.random.split(key)
        step = forward.step_at(t)
        x_t = kernel.transition(x_s, step).sample(key_move)
        terms = pair.log_step(reverse.step(x_t, t), x_s, x_t, t)
        if has_pi:
            terms += pair.log_pi(x_t) - pair.log_pi(x_s)
        log_w += pair.sum_observed(terms)
        return settle(key_resample, x_t, log_w, *rest), None

    x_1 = forward.sample_at(key_first, jnp.ones(size, jnp.int32))
    log_w = pair.log_first(x_0, x_1)
    if has_pi:
        log_w += pair.sum_observed(pair.log_pi(x_1))
    state = settle(key_settle, x_1, log_w, jnp.zeros(()), jnp.full((), float(size)))
    inputs = jnp.arange(2, T + 1), jax.random.split(key_steps, T - 1)
    (x_T, log_w, log_z, least), _ = jax.lax.scan(advance, state, inputs)
    if not has_pi:
        log_w += pair.sum_observed(pair.log_pi(x_T))
    return _Weighed(log_w, log_z + log_mean(log_w), least)


def draw_and_weigh(
    key: Array, reverse: Reverse, context: Array | None, rows: Array
) -> tuple[Array, Array]:
    """Draws of the model, and the log weight of the trajectory that made each; `rows` are 0..N−1.

    Draw n uses `fold_in(key, n)`; x_0 is in the user's units.
    """

    def one(row: Array, context: Array | None) -> tuple[Array, Array]:
        own = reverse if context is None else reverse.given(context)
        return _descend(jax.random.fold_in(key, row), own)

    return jax.vmap(one, (0, None if context is None else 0))(rows, context)


def _descend(key: Array, reverse: Reverse) -> tuple[Array, Array]:
    """From x_T ~ π to x_0, one trajectory."""
    key_last, key_steps, key_data = jax.random.split(key, 3)
    kernel, axes = reverse.kernel, tuple(range(-reverse.event_dim, 0))

    def retreat(
        state: tuple[Array, Array], inputs: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], None]:
        x_t, log_w = state
        t, key = inputs
        law = reverse.step(x_t, t)
        x_s = law.sample(key)
        q = kernel.transition(x_s, reverse.coefficients(t))
        return (x_s, log_w + jnp.sum(law.log_prob(x_s) - q.log_prob(x_t), axes)), None

    pi = kernel.stationary((1, *reverse.event_shape))
    x_T = pi.sample(key_last)
    inputs = jnp.arange(2, reverse.T + 1), jax.random.split(key_steps, reverse.T - 1)
    start = x_T, jnp.sum(pi.log_prob(x_T), axes)
    (x_1, log_w), _ = jax.lax.scan(retreat, start, inputs, reverse=True)
    x_0 = reverse.data(x_1).sample(key_data)[0]
    return x_0, (log_w + _pair(reverse, x_0).log_first(x_0, x_1))[0]
