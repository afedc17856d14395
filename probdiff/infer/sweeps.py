"""Sweeps of Gibbs chains over a program's posterior, compiled: trajectories, then all else.

A sweep of each of C chains is

    x_0:T | θ    numbers: a move of Hamiltonian Monte Carlo in forward coordinates (see `moves`)
                 symbols: noise anew, and conditional SMC (see `conditional`)
    θ | x_0      five steps of a stock NumPyro kernel (see `latents`); they ask no network

and leaves p(θ, x_0:T | y) as it is. Where a program has no plates the first is a move of numbers
and θ together, (x_0:T, θ), so that what one must yield to the other, such as a gain to the size of
x_0, does not bind the chain. In warm-up the step sizes of numbers are set to an acceptance
of three quarters, for each system, and half way the entries of x_0 are rescaled by their spread
over chains and moves.

Source: Neal (2011).
"""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpyro.infer.hmc_util import dual_averaging

from probdiff import bars
from probdiff.infer import conditional, moves
from probdiff.infer.coordinates import Coordinates, Path, coordinates, path_of
from probdiff.infer.latents import Others
from probdiff.infer.moves import Point
from probdiff.infer.particles import known_of
from probdiff.infer.program import Conditioned, Read
from probdiff.infer.spread import Problem
from probdiff.infer.twist import Twist

_TARGET = 0.75  # share of moves that are accepted
_FIRST_STEP = 0.05
_NARROWEST, _WIDEST = 0.05, 2.0  # by which an entry is rescaled at most
_MOST_NUMBERS = 2**26  # of the particles of all levels that are held at once
_, _averaged = dual_averaging()


class Options(NamedTuple):
    """How many sweeps, and of what."""

    num_warmup: int
    num_samples: int
    num_leapfrog: int  # of a move of numbers
    num_particles: int  # of a move of symbols
    twist: Twist  # of those particles
    steps: int | None  # levels that are walked; all for None


class Hamiltonian(NamedTuple):
    """Trajectories of numbers, C chains of B systems, with what moves them."""

    point: Point  # z has the k numbers of θ behind those of x_0, where both are moved together
    average: Any  # of the log step size, `(B,)` each
    coordinates: Coordinates
    sd: Float[Array, " k"]  # what a number of θ is divided by; none where θ is moved by itself


class State(NamedTuple):
    """C chains of B systems."""

    key: Array
    trajectories: Any  # `Hamiltonian`, or for symbols a `conditional.Trajectory` of each chain
    given: list[Array]  # values of the other latent sites, `(C, ...)` each
    kernel: Any  # state of their kernel; None without


class Kept(NamedTuple):
    """What a sweep leaves, `(C, ...)`."""

    x: Float[Array, "C B d"]  # on the scale of the diffusion
    share: Float[Array, "C B"]
    log_r: Float[Array, "C B"]
    log_w: Float[Array, "C B"]
    given: list[Array]
    flat: Float[Array, "C k"]  # the numbers of θ that are moved with x_0, unconstrained


class _Inputs(NamedTuple):
    """What is read of a program, arrays."""

    conditioned: Conditioned
    known: Array | None
    mask: Array | np.ndarray | None


def run(
    key: Array, of: Read, others: Others, values: dict[str, Array], x_0: np.ndarray,
    options: Options, *, progress: bool,
) -> Kept:  # fmt: skip
    """All sweeps that are kept, `(M, C, ...)`, NumPy.

    Args:
        key: Randomness.
        of: The program, read where the other latent sites are fixed.
        others: The other latent sites, their kernel begun.
        values: Where they start, `(C, ...)` each.
        x_0: Where chains start, `(C, *plates, *event_shape)`, the user's units.
        options: How many sweeps, and of what.
        progress: Whether to show a bar.
    """
    key_begin, key_sweeps = jax.random.split(key)
    reverse = of.conditioned.reverse
    x = jnp.asarray(reverse.to_state(x_0), reverse.kernel.dtype)
    inputs = _Inputs(of.conditioned, *known_of(of.conditioned))
    given, steps = [jnp.asarray(values[name]) for name in others.names], options.steps
    moved = others if others.names else None
    of_others = others.state, others.arrays
    begun = of.programs(_begin, inputs, key_begin, x, given, *of_others, steps=steps, others=moved)
    state, kept = State(key_sweeps, begun, given, others.state), []
    how = {"options": options, "others": moved}
    half, whole = options.num_warmup // 2, options.num_warmup + options.num_samples
    starts = [*range(0, options.num_warmup, half), *range(options.num_warmup, whole, half)]
    with bars.bar(total=whole, desc="sweeps", disable=not progress) as bar:
        for low, high in itertools.pairwise([*starts, whole]):
            if low == half and not reverse.kernel.is_discrete:
                spread = jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)
                spread = spread.x, spread.flat, others.arrays
                state = of.programs(_rescaled, inputs, state, *spread, steps=steps, others=moved)
            kept = [] if low in (half, options.num_warmup) else kept
            is_warm = jnp.array(low < options.num_warmup)
            state, out = of.programs(
                _sweep, inputs, state, others.arrays, is_warm, count=high - low, **how
            )
            kept.append(out)
            if progress:
                jax.block_until_ready(state.trajectories)
                bar.update(high - low)
    return jax.tree.map(lambda *parts: np.concatenate(parts), *kept)


def _problem(inputs: _Inputs, steps: int | None) -> Problem:
    reverse = inputs.conditioned.reverse.respaced(steps)
    return Problem(inputs.conditioned, reverse, inputs.known, inputs.mask, False, False)


def _log_r(problem: Problem, given: list[Array], x: Array) -> Float[Array, "C B"]:
    """log r of each chain, at its other latent sites; x on the scale of the diffusion."""
    conditioned = problem.conditioned
    x_0 = problem.reverse.units.to_data(problem.shaped(x))
    if problem.draw.known is not None:
        x_0 = jnp.where(problem.draw.mask, problem.draw.known, x_0)

    def one(given: list[Array], x_0: Array) -> Array:
        return _given(conditioned, given).log_r(x_0)

    return jax.vmap(one)(given, x_0).reshape(x.shape[:2])


def _given(conditioned: Conditioned, given: list[Array]) -> Conditioned:
    """The same at values of the other latent sites, the first of its arrays."""
    return dataclasses.replace(conditioned, arrays=[*given, *conditioned.arrays[len(given) :]])


class _Along(NamedTuple):
    """θ of each chain as k numbers v = u/sd, u unconstrained, that are moved with x_0."""

    u: Float[Array, "C k"]  # where the kernel of each chain is
    others: Others
    arrays: list[Array]
    back: Any  # from the k numbers u of one chain to unconstrained values by site
    sd: Float[Array, " k"]

    def values(self, x_0: Array, v: Float[Array, "C k"]) -> list[Array]:
        """Values of the sites, `(C, ...)`."""
        found = jax.vmap(lambda x, u: self.others.values(self.back(u), x, self.arrays))
        values = found(x_0, self.sd * v)
        return [values[name] for name in self.others.names]

    def log_density(self, x_0: Array, v: Float[Array, "C k"]) -> Float[Array, " C"]:
        """log r and log p(θ), with the volume."""
        found = jax.vmap(lambda x, u: self.others.log_density(self.back(u), x, self.arrays))
        return found(x_0, self.sd * v)


def _along(
    problem: Problem, kernel: Any, others: Others | None, arrays: list[Array], sd: Any
) -> _Along | None:
    """θ of every chain, from the state of its kernel; None where it is moved by itself."""
    reverse = problem.reverse
    is_apart = reverse.kernel.is_discrete or reverse.grid is not None
    if others is None or is_apart or problem.conditioned.batch_shape:
        return None
    u = jax.vmap(lambda z: ravel_pytree(z)[0])(kernel.z)
    return _Along(u, others, arrays, _back(kernel), jnp.ones(u.shape[-1]) if sd is None else sd)


def _back(kernel: Any) -> Any:
    """From the k numbers of one chain to its unconstrained values by site."""
    return ravel_pytree(jax.tree.map(lambda a: a[0], kernel.z))[1]


def _density(problem: Problem, by: Coordinates, given: list[Array], along: _Along | None) -> Any:
    def alone(path: Path) -> Array:
        return moves.log_density(problem, by, lambda x: _log_r(problem, given, x), path)

    def together(path: Path) -> Array:
        z, v = jnp.split(path.z, [problem.size], -1)

        def log_r(x: Array) -> Array:
            return along.log_density(_shown(problem, x), v[:, 0])[:, None]

        return moves.log_density(problem, by, log_r, path._replace(z=z))

    return alone if along is None else together


def _joined(z: Float[Array, "C B d"], along: _Along | None) -> Float[Array, "C B _"]:
    """Coordinates of x_0, with the numbers of θ behind them."""
    return z if along is None else jnp.concatenate([z, (along.u / along.sd)[:, None]], -1)


def _begin(
    inputs: _Inputs, key: Array, x_0: Array, given: list[Array], kernel: Any, arrays: list[Array],
    *, steps: int | None, others: Others | None,
) -> Any:  # fmt: skip
    """Trajectories through x_0, `(C, *plates, *event_shape)`, their noise drawn forward."""
    problem = _problem(inputs, steps)
    if problem.reverse.kernel.is_discrete:
        keys, x_0 = jax.random.split(key, len(x_0)), problem.flat(x_0)
        return jax.vmap(lambda key, x_0: conditional.begin(key, problem, x_0))(keys, x_0)
    by = coordinates(problem.draw, inputs.known, inputs.mask)
    by = by._replace(sd=jnp.broadcast_to(by.sd, (problem.systems, problem.size)))
    x_0 = x_0.reshape(len(x_0), problem.systems, *problem.reverse.event_shape)
    along = _along(problem, kernel, others, arrays, None)
    path = path_of(key, problem.reverse, by, x_0)
    path = path._replace(z=_joined(path.z, along))
    point = moves.at(_density(problem, by, given, along), path)
    log_step, zeros = (jnp.full(problem.systems, v) for v in (math.log(_FIRST_STEP), 0.0))
    average = log_step, log_step, zeros, jnp.zeros(()), log_step
    return Hamiltonian(point, average, by, jnp.ones(0) if along is None else along.sd)


def _sweep(
    inputs: _Inputs, state: State, arrays: list[Array], is_warm: Array, *, count: int,
    options: Options, others: Others | None,
) -> tuple[State, Kept]:  # fmt: skip
    """`count` sweeps, and what they leave."""
    problem = _problem(inputs, options.steps)
    move = _conditional if problem.reverse.kernel.is_discrete else _hamiltonian

    def sweep(state: State, _: None) -> tuple[State, Kept]:
        key, key_move, key_x = jax.random.split(state.key, 3)
        trajectories, kept = move(key_move, problem, state, is_warm, options, others, arrays)
        kernel, given = state.kernel, kept.given
        if others is not None:
            x_0 = _shown(problem, kept.x)
            if kept.flat.size:
                kernel = kernel._replace(z=jax.vmap(_back(kernel))(kept.flat))
            kernel, values = jax.vmap(others.step, (0, 0, None))(kernel, x_0, arrays)
            given = [values[name] for name in others.names]
        if problem.reverse.grid is not None:
            kept = kept._replace(x=_on_grid(key_x, problem, kept.x))
        return State(key, trajectories, given, kernel), kept._replace(given=given)

    return jax.lax.scan(sweep, state, length=count)


def _hamiltonian(
    key: Array, problem: Problem, state: State, is_warm: Array, options: Options,
    others: Others | None, arrays: list[Array],
) -> tuple[Hamiltonian, Kept]:  # fmt: skip
    """A move of numbers, those of θ along with them where they can be, and of its step size."""
    point, average, by, sd = state.trajectories
    along = _along(problem, state.kernel, others, arrays, sd)
    density = _density(problem, by, state.given, along)
    if others is not None:  # log r is another than before
        z = _joined(point.path.z[..., : problem.size], along)
        point = moves.at(density, point.path._replace(z=z))
    log_step, log_average, *_ = average
    step = jnp.exp(jnp.where(is_warm, log_step, log_average))
    point, share = moves.move(key, density, point, step, options.num_leapfrog)
    there = _averaged(_TARGET - jnp.mean(share, 0), average)
    average = jax.tree.map(lambda a, b: jnp.where(is_warm, a, b), there, average)
    z, v = jnp.split(point.path.z, [problem.size], -1)
    x, given = by.x(z), state.given
    if along is not None:
        given = along.values(_shown(problem, x), v[:, 0])
    kept = Kept(x, share, _log_r(problem, given, x), point.log_density, given, sd * v[:, 0])
    return Hamiltonian(point, average, by, sd), kept


def _conditional(
    key: Array, problem: Problem, state: State, is_warm: Array, options: Options,
    others: Others | None, arrays: list[Array],
) -> tuple[conditional.Trajectory, Kept]:  # fmt: skip
    """A move of symbols, chain by chain, as many at once as memory holds."""
    size = problem.reverse.n * options.num_particles * problem.systems * problem.size

    def move(of_chain: tuple) -> tuple[conditional.Trajectory, Array, Array]:
        key, given, trajectory = of_chain
        there = problem._replace(conditioned=_given(problem.conditioned, given))
        return conditional.move(key, there, options.twist, options.num_particles, trajectory)

    rows = jax.random.split(key, len(state.trajectories.x)), state.given, state.trajectories
    at_once = max(1, _MOST_NUMBERS // size)
    trajectories, share, log_r = jax.lax.map(move, rows, batch_size=at_once)
    log_density = trajectories.log_w + log_r
    given, none = state.given, jnp.zeros((len(log_r), 0))
    return trajectories, Kept(trajectories.x[:, 0], share, log_r, log_density, given, none)


def _rescaled(
    inputs: _Inputs, state: State, x: Array, flat: Array, arrays: list[Array], *,
    steps: int | None, others: Others | None,
) -> State:  # fmt: skip
    """Entries of x_0 rescaled by their spread over chains and moves, `(M, C, B, d)`; θ's too."""
    problem, (point, _, by, sd) = _problem(inputs, steps), state.trajectories
    there = by._replace(sd=_rescale(by.sd, jnp.std(jax.vmap(by.z)(x), (0, 1))))
    sd = _rescale(sd, jnp.std(flat / sd, (0, 1)))
    along = _along(problem, state.kernel, others, arrays, sd)
    z = there.z(by.x(point.path.z[..., : problem.size]))
    path = point.path._replace(z=_joined(z, along))
    point = moves.at(_density(problem, there, state.given, along), path)
    trajectories = state.trajectories._replace(point=point, coordinates=there, sd=sd)
    return state._replace(trajectories=trajectories)


def _rescale(sd: Array, ratio: Array) -> Array:
    """Scales times how much wider entries are than them, within limits."""
    return sd * jnp.clip(jnp.where(ratio > 0, ratio, 1.0), _NARROWEST, _WIDEST)


def _shown(problem: Problem, x: Array) -> Array:
    """x_0 as the program sees it, `(C, *plates, *event_shape)`."""
    x_0 = problem.reverse.to_data(problem.shaped(x))
    draw = problem.draw
    if draw.known is None:
        return x_0
    return jnp.where(draw.mask, draw.known, x_0).astype(x_0.dtype)


def _on_grid(key: Array, problem: Problem, x_1: Array) -> Array:
    """A draw of x_0 given x_1, before it is put on the grid."""
    x = problem.reverse.last(problem.shaped(x_1)).sample(key)
    return problem.flat(x)
