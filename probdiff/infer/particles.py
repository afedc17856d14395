"""Sequential Monte Carlo over the reverse trajectory, twisted: the loop behind `SMC` and `Guided`.

With positive twists ψ_1..ψ_n, ψ_0 = r, and proposals q,

    x_n ~ π,                     w = ψ_n(x_n)
    x_s ~ q(· | x_t),            w = p(x_s | x_t) ψ_s(x_s) / (q(x_s | x_t) ψ_t(x_t))

particles are resampled where their effective number falls below a share of N (systematic), and

    Ẑ = ∏ over stages of the mean weight

is unbiased for Z = E_p[r(x_0)], whatever ψ is. A population is one run for one system (an entry of
the plates around the prior, with N particles and keys of its own, so that nothing depends on who
runs beside it. Arrays have shape `(S, N, *event)` here, S systems, and `(R·N, *plates, *event)`
where the network and the program see them.

Sources: Del Moral et al. (2006); Guarniero et al. (2017) for twists; Wu et al. (2023) for
diffusions.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from probdiff.infer.look import (
    Look,
    Plan,
    covariances,
    for_populations,
    hessian,
    in_blocks,
    log_r,
    look_at,
    look_at_first,
    measure,
)


class State(NamedTuple):
    """Particles at a level, before they are looked at."""

    x: Any
    """`(S, N, *event)`."""
    log_w: Float[Array, "S N"]
    """Log weights since the last resampling, the twist of this level not yet in."""
    log_psi: Float[Array, "S N"]
    """log ψ that the weights already hold and the next level takes out."""
    held: Float[Array, "S N"]
    """Log weights as the step began, so that what the step itself added can be told."""
    log_z: Float[Array, " S"]
    """Log of the product of mean weights up to the last resampling."""
    ancestor: Any
    """Index of each particle's ancestor at the start, `(S, N)`."""
    reading: Any
    """How well the network reads x_0 out of noise."""
    hessian: Any
    """Of a quadratic log r, where the covariance of the data is used: `(*plates, d, d)`."""
    trace: "Trace"


class Trace(NamedTuple):
    """What happened at each level, `(n + 1, S)`, the level's number first; 0 is the end."""

    ess: Any
    """Effective number of particles before resampling."""
    resampled: Any
    """Whether they were resampled."""
    shift: Any
    """Largest move of a particle's mean, in standard deviations."""
    bad: Any
    """Share of particles whose twist was not finite."""
    worst: Any
    """Log weights of the step whose own weights had the least effective number, `(S, N)`."""
    worst_ess: Any
    """That number, `(S,)`."""


def start(plan: Plan, keys: Array) -> State:
    """Particles from π at the last level."""
    n, kernel = plan.num_particles, plan.levels.draw.diffusion.kernel

    def draw(key: Array) -> Any:
        return kernel.stationary((n, *plan.event_shape)).sample(key)

    x = plan.constrain(jax.vmap(draw)(_fold(keys, plan.levels.n + 1)))
    shape = (plan.num_populations, n)
    zeros = jnp.zeros(shape)
    flat = jnp.zeros((plan.levels.n + 1, plan.num_populations))
    trace = Trace(flat, flat > 1, flat, flat, zeros, jnp.full(plan.num_populations, jnp.inf))
    ancestor = jnp.broadcast_to(jnp.arange(n), shape)
    return State(x, zeros, zeros, zeros, zeros[:, 0], ancestor, measure(plan), hessian(plan), trace)


def advance(plan: Plan, keys: Array, state: State, i: Any) -> State:
    """From level i ≥ 2 down to the one before."""
    covariance = (
        covariances(plan, state.reading, state.hessian, i) if plan.uses_covariance else None
    )
    look = in_blocks(plan, state.x, lambda x: look_at(plan, x, i, state.reading, covariance))
    common = None if covariance is None else for_populations(plan, covariance.common)
    return _move(plan, keys, state, look, i, common)


def finish(plan: Plan, keys: Array, state: State) -> State:
    """From level 1 to x_0 and its likelihood; `x` is then on the scale of the diffusion."""
    look = in_blocks(plan, state.x, lambda x: look_at_first(plan, x))
    state = _move(plan, keys, state, look, 1, None)
    likelihood = in_blocks(plan, state.x, lambda x: log_r(plan, x))
    state = _weigh(state, likelihood)
    ess = effective_number(state.log_w)
    trace = state.trace._replace(ess=state.trace.ess.at[0].set(ess))
    return state._replace(trace=trace)


def effective_number(log_w: Float[Array, "S N"]) -> Float[Array, " S"]:
    """(Σ w)² / Σ w²; 0 where all weights are."""
    log_ess = 2 * jax.nn.logsumexp(log_w, 1) - jax.nn.logsumexp(2 * log_w, 1)
    return jnp.where(jnp.isfinite(log_ess), jnp.exp(log_ess), 0.0)


def log_mean(log_w: Float[Array, "S N"]) -> Float[Array, " S"]:
    """log of the mean weight."""
    return jax.nn.logsumexp(log_w, 1) - jnp.log(log_w.shape[1])


def systematic(key: Array, log_w: Float[Array, " N"]) -> Array:
    """Indices of N equally weighted particles: one uniform number, evenly spread positions."""
    n = log_w.shape[0]
    weights = jnp.exp(log_w - jnp.max(log_w))
    cumulative = jnp.cumsum(weights)
    positions = (jnp.arange(n) + jax.random.uniform(key)) / n * cumulative[-1]
    return jnp.clip(jnp.searchsorted(cumulative, positions, side="right"), 0, n - 1)


def _move(plan: Plan, keys: Array, state: State, look: Look, i: Any, common: Any) -> State:
    """Weigh by ψ_t, resample where needed, propose the next level."""
    keys_draw, keys_resample = (_fold(_fold(keys, i), use) for use in (0, 1))
    state = _weigh(state, look.log_psi)
    trace = state.trace._replace(
        shift=state.trace.shift.at[i].set(jnp.max(look.shift, 1)),
        bad=state.trace.bad.at[i].set(jnp.mean(look.bad, 1)),
    )
    state = state._replace(trace=trace, log_psi=look.log_psi)
    state, look = _resample(plan, keys_resample, state, look, i)
    x, log_ratio = jax.vmap(lambda key, proposal, common: proposal.draw(key, common))(
        keys_draw, look.proposal, common
    )
    return state._replace(x=plan.constrain(x), log_w=state.log_w + log_ratio, held=state.log_w)


def _weigh(state: State, log_psi: Array) -> State:
    """Put in the twist of this level and take out that of the one before."""
    log_w = state.log_w + log_psi - state.log_psi
    added = log_w - jnp.where(jnp.isfinite(state.held), state.held, 0.0)
    ess = effective_number(added)
    is_worst = ess < state.trace.worst_ess
    trace = state.trace._replace(
        worst=jnp.where(is_worst[:, None], added, state.trace.worst),
        worst_ess=jnp.minimum(ess, state.trace.worst_ess),
    )
    return state._replace(log_w=log_w, trace=trace)


def _resample(plan: Plan, keys: Array, state: State, look: Look, i: Any) -> tuple[State, Look]:
    ess = effective_number(state.log_w)
    is_due = (ess < plan.threshold * plan.num_particles) & (ess > 0)
    trace = state.trace._replace(
        ess=state.trace.ess.at[i].set(ess), resampled=state.trace.resampled.at[i].set(is_due)
    )
    state = state._replace(trace=trace)
    if plan.threshold == 0:
        return state, look
    stays = jnp.arange(plan.num_particles)

    def chosen(key: Array, log_w: Array, due: Array) -> Array:
        return jnp.where(due, systematic(key, log_w), stays)

    def gather(moving: tuple[Any, ...]) -> tuple[Any, ...]:
        index = jax.vmap(chosen)(keys, state.log_w, is_due)
        return jax.tree.map(lambda a: jax.vmap(lambda row, at: row[at])(a, index), moving)

    moving = (look, state.ancestor, state.log_psi)
    look, ancestor, log_psi = jax.lax.cond(jnp.any(is_due), gather, lambda m: m, moving)
    log_z = state.log_z + jnp.where(is_due, log_mean(state.log_w), 0.0)
    log_w = jnp.where(is_due[:, None], 0.0, state.log_w)
    return state._replace(ancestor=ancestor, log_psi=log_psi, log_w=log_w, log_z=log_z), look


def _fold(keys: Array, value: Any) -> Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, value)
