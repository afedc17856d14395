"""Conditional SMC: moves of whole trajectories of symbols, which have no gradient.

A move of a trajectory x_0, …, x_n under p(x_0, …, x_n) r(x_0) is two, each of which leaves that law
as it is.

Noise anew, a step of Metropolis and Hastings given x_0: x'_1, …, x'_n ~ q(· | x_0), accepted with
probability

    min(1, w'/w),    w = p(x_0, …, x_n) / q(x_1, …, x_n | x_0).

Where the network is right w is p(x_0) for any noise. One batch of n network calls.

Conditional SMC with ancestor sampling: particles walk from π to x_0 as `particles` says, the first
of them along the trajectory as it stands. Where particles are resampled, the others find their
ancestors by weight w_t, and the first by that times what follows,

    w_t p(x_s | x_t) / ψ_t(x_t),    x_s of the trajectory,

whose network calls are made already. At the end one particle is drawn by weight, and the
trajectory is its ancestors'. With few particles all share their ancestors at high levels with the
first; that noise the other move draws anew.

Sources: Andrieu et al. (2010) for conditional SMC; Lindsten et al. (2014) for ancestor sampling.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from probdiff.infer.particles import effective_number
from probdiff.infer.spread import Problem
from probdiff.infer.twist import Look, Twist, View
from probdiff.trajectories import ForwardTrajectory, ReverseTrajectory

_THRESHOLD = 0.5  # share of N below which the effective number resamples


class Trajectory(NamedTuple):
    """Of one chain."""

    x: Int[Array, "levels B d"]  # x_0, …, x_n
    log_w: Float[Array, " B"]


def begin(key: Array, problem: Problem, x_0: Int[Array, "B d"]) -> Trajectory:
    """A trajectory through x_0, its noise drawn forward."""
    x = jnp.concatenate([x_0[None], _noise(key, problem, x_0)])
    return Trajectory(x, _log_p(problem, x) - _log_q(problem, x))


def move(
    key: Array, problem: Problem, twist: Twist, num_particles: int, trajectory: Trajectory
) -> tuple[Trajectory, Array, Array]:
    """One move of one chain: its noise anew, then conditional SMC.

    Args:
        key: Randomness.
        problem: The posterior.
        twist: Of the particles.
        num_particles: N, at least 2.
        trajectory: Where the chain is.

    Returns:
        Where it goes; the weight of the particles besides the first at the end, and log r, `(B,)`.
    """
    key_noise, key_smc = jax.random.split(key)
    x = _renoised(key_noise, problem, trajectory)
    x, log_p, share, log_r = _conditional_smc(key_smc, problem, twist, num_particles, x)
    return Trajectory(x, log_p - _log_q(problem, x)), share, log_r


# noise anew


def _renoised(key: Array, problem: Problem, trajectory: Trajectory) -> Int[Array, "levels B d"]:
    key_noise, key_accept = jax.random.split(key)
    there = begin(key_noise, problem, trajectory.x[0])
    gain = there.log_w - trajectory.log_w
    share = jnp.exp(jnp.minimum(jnp.where(jnp.isnan(gain), -jnp.inf, gain), 0.0))
    is_accepted = jax.random.uniform(key_accept, share.shape) < share
    return jnp.where(is_accepted[:, None], there.x, trajectory.x)


def _forward(problem: Problem, x_0: Array) -> ForwardTrajectory:
    reverse = problem.reverse
    x_0 = problem.shaped(x_0[None])[0]
    return ForwardTrajectory(reverse.kernel, reverse.steps, x_0, reverse.event_dim)


def _noise(key: Array, problem: Problem, x_0: Array) -> Int[Array, "n B d"]:
    """x_1, …, x_n ~ q(· | x_0)."""
    x = jnp.moveaxis(_forward(problem, x_0).sample(key), -1 - problem.reverse.event_dim, 0)
    return problem.flat(x)


def _whole(problem: Problem, x: Int[Array, "n B d"]) -> Array:
    """x_1, …, x_n as a value of a trajectory, `(*plates, n, *event_shape)`."""
    x = problem.shaped(x)
    return jnp.moveaxis(x, 0, x.ndim - 1 - problem.reverse.event_dim)


def _log_q(problem: Problem, x: Int[Array, "levels B d"]) -> Float[Array, " B"]:
    """log q(x_1, …, x_n | x_0)."""
    return _forward(problem, x[0]).log_prob(_whole(problem, x[1:])).reshape(-1)


def _log_p(problem: Problem, x: Int[Array, "levels B d"]) -> Float[Array, " B"]:
    """log p(x_0, …, x_n)."""
    reverse = problem.reverse
    x_0, x_1 = problem.shaped(x[:2])
    log_p = ReverseTrajectory(reverse).log_prob(_whole(problem, x[1:]))
    return (log_p + reverse.data(x_1).log_prob(x_0)).reshape(-1)


# conditional SMC


class _Cloud(NamedTuple):
    """N particles of each of B systems at a level, the first on the trajectory as it stands."""

    x: Int[Array, "N B d"]
    log_w: Float[Array, "N B"]  # since the last resampling, without the twist of this level
    log_psi: Float[Array, "N B"]  # log ψ that the weights hold
    log_p: Float[Array, "N B"]  # log p of the particle and its ancestors


def _conditional_smc(
    key: Array, problem: Problem, twist: Twist, num_particles: int, x: Int[Array, "levels B d"]
) -> tuple[Array, Array, Array, Array]:
    """Another trajectory, its log p, the weight of the particles besides the first, log r."""
    reverse, n = problem.reverse, problem.reverse.n
    key_start, key_steps, key_last, key_end = jax.random.split(key, 4)
    shape = num_particles, *problem.conditioned.batch_shape, *reverse.event_shape
    start = problem.flat(reverse.kernel.stationary(shape).sample(key_start)).at[0].set(x[n])
    law = reverse.kernel.stationary(shape)
    log_p = jnp.sum(problem.flat(law.log_prob(problem.shaped(start))), -1)
    zeros = jnp.zeros(log_p.shape)

    def advance(cloud: _Cloud, inputs: tuple) -> tuple[_Cloud, tuple[Array, Array]]:
        t, key, x_s = inputs
        look = twist.look(View(problem, cloud.x, t))
        below, ancestor = _step(key, cloud, look, x_s)
        return below, (cloud.x, ancestor)

    inputs = jnp.arange(2, n + 1), jax.random.split(key_steps, n - 1), x[1:n]
    cloud = _Cloud(start, zeros, zeros, log_p)
    cloud, (walked, ancestors) = jax.lax.scan(advance, cloud, inputs, reverse=True)
    last, ancestor = _step(key_last, cloud, twist.look(View(problem, cloud.x, 1)), x[0])
    log_r = problem.log_r(last.x, on_grid=True) if problem.is_observed else zeros
    log_w = _not_nan(last.log_w + log_r - last.log_psi)
    end = jax.random.categorical(key_end, log_w, 0)

    def ascend(index: Array, level: tuple[Array, Array]) -> tuple[Array, Array]:
        x, ancestor = level
        index = _at(ancestor, index)
        return index, _at(x, index)

    levels = (
        jnp.concatenate([cloud.x[None], walked]), jnp.concatenate([ancestor[None], ancestors])
    )  # fmt: skip
    _, above = jax.lax.scan(ascend, end, levels)
    weight = jax.nn.softmax(log_w, 0)[0]
    share = jnp.where(jnp.isnan(weight), 0.0, 1 - weight)
    path = jnp.concatenate([_at(last.x, end)[None], above])
    return path, _at(last.log_p, end), share, _at(log_r, end)


def _step(key: Array, cloud: _Cloud, look: Look, x_s: Int[Array, "B d"]) -> tuple[_Cloud, Array]:
    """Weigh, resample where needed, and propose the level below; indices of ancestors `(N, B)`."""
    key_ancestors, key_first, key_draw = jax.random.split(key, 3)
    log_w = _not_nan(cloud.log_w + look.log_psi - cloud.log_psi)
    ess = jax.vmap(effective_number, 1)(log_w)
    is_due = (ess < _THRESHOLD * len(log_w)) & (ess > 0)
    follows = look.proposal.log_prob(jnp.broadcast_to(x_s, cloud.x.shape))
    first = jax.random.categorical(key_first, _not_nan(log_w - look.log_psi + follows), 0)
    drawn = _multinomial(key_ancestors, log_w).at[0].set(first)
    stay = jnp.broadcast_to(jnp.arange(len(log_w))[:, None], log_w.shape)
    ancestor = jnp.where(is_due, drawn, stay)
    proposal, log_psi, log_p = (
        jax.tree.map(lambda a: _take(a, ancestor), of)
        for of in (look.proposal, look.log_psi, cloud.log_p)
    )
    x = proposal.sample(key_draw).at[0].set(x_s)
    log_w = jnp.where(is_due, 0.0, log_w) + proposal.log_ratio(x)
    return _Cloud(x, log_w, log_psi, log_p + proposal.log_prob(x)), ancestor


def _multinomial(key: Array, log_w: Float[Array, "N B"]) -> Int[Array, "N B"]:
    """N independent indices by weight, system by system."""
    cumulative = jnp.cumsum(jnp.exp(log_w - jnp.max(log_w, 0)), 0)
    u = jax.random.uniform(key, log_w.shape) * cumulative[-1]
    found = jax.vmap(lambda c, u: jnp.searchsorted(c, u, side="right"), 1, 1)(cumulative, u)
    return jnp.clip(found, 0, len(log_w) - 1)


def _not_nan(log_w: Array) -> Array:
    return jnp.where(jnp.isnan(log_w), -jnp.inf, log_w)


def _take(a: Array, index: Int[Array, "N B"]) -> Array:
    """Rows of particles, system by system."""
    return jnp.take_along_axis(a, index.reshape(*index.shape, *[1] * (a.ndim - 2)), 0)


def _at(a: Array, index: Int[Array, " B"]) -> Array:
    """One particle of each system."""
    return _take(a, index[None])[0]
