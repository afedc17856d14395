"""Sequential Monte Carlo over the reverse trajectory, twisted: the loop behind `SMC` and `Guided`.

With positive twists ψ_1..ψ_n, ψ_0 = r, and proposals q,

    x_n ~ π,                     w = ψ_n(x_n)
    x_s ~ q(· | x_t),            w = p(x_s | x_t) ψ_s(x_s) / (q(x_s | x_t) ψ_t(x_t))

particles are resampled where their effective number falls below a share of N (systematic), and

    Ẑ = ∏ over stages of the mean weight

is unbiased for Z = E_p[r(x_0)], whatever ψ is. A population is one run for one system (an entry of
the plates around the prior): N particles and a key, so that nothing depends on who runs beside it.
Weights are computed for one population and mapped over the S of them; network and program see all
particles of a level at once, in blocks that fit memory.

Sources: Del Moral et al. (2006); Guarniero et al. (2017) for twists; Wu et al. (2023) for
diffusions.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from probdiff import bars
from probdiff.infer.program import BLOCK, Conditioned, Read, systems_are_coupled
from probdiff.infer.quadratic import local
from probdiff.infer.ridges import LIMIT, Ridges, directions
from probdiff.infer.spread import (
    PERFECT,
    Common,
    Problem,
    Reading,
    common,
    hessian,
    measure,
    ridges_of,
)
from probdiff.infer.twist import Look, Twist, View
from probdiff.prior import PriorDraw

_PROBES = 8  # points at which the likelihood is tried before a run
_HALVES = 32  # halves of the systems that are moved then, each at points of its own
_CHUNKS = 20  # parts of a run between which the progress bar moves


class Options(NamedTuple):
    """How to run: all that is part of what is compiled."""

    twist: Twist | None  # None for the default, until the program is read
    num_particles: int
    num_runs: int
    steps: int | None  # levels that are walked; all for None
    is_weighted: bool
    threshold: float  # share of N below which the effective number resamples; 0 for never
    block_size: int
    mesh: Mesh | None = None
    is_diagonal: bool = False  # of the likelihood, as in `Problem`: found before a run
    is_quadratic: bool = False
    is_ridged: bool = False
    stand_in: Any = None  # compared in place of a user's own twist: each sampler has another

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options) and self._compared == other._compared

    def __hash__(self) -> int:
        return hash(self._compared)

    @property
    def _compared(self) -> tuple[Any, ...]:
        return tuple(self) if self.stand_in is None else tuple(self)[1:]


class Trace(NamedTuple):
    """What happened at each level, `(n + 1, S)`, the level's number first; 0 is the end."""

    ess: Float[Array, "levels S"]  # effective number of particles before resampling
    resampled: Bool[Array, "levels S"]  # whether they were resampled
    shift: Float[Array, "levels S"]  # largest move of a particle's mean, in standard deviations
    bad: Float[Array, "levels S"]  # share of particles whose twist was not finite


class State(NamedTuple):
    """Particles at a level, before they are looked at."""

    x: Array  # `(S, N, d)`
    log_w: Float[Array, "S N"]  # since the last resampling, without the twist of this level
    log_psi: Float[Array, "S N"]  # log ψ that the weights already hold and the next level takes out
    held: Float[Array, "S N"]  # log weights as the step began, to tell what the step adds
    log_z: Float[Array, " S"]  # log of the product of mean weights up to the last resampling
    ancestor: Int[Array, "S N"]  # index of each particle's ancestor at the start
    worst: Float[Array, "S N"]  # log weights that the step of least effective number added
    worst_ess: Float[Array, " S"]  # that number
    trace: Trace


def effective_number(log_w: Float[Array, " N"]) -> Float[Array, ""]:
    """(Σ w)² / Σ w²; 0 where all weights are."""
    log_ess = 2 * jax.nn.logsumexp(log_w) - jax.nn.logsumexp(2 * log_w)
    return jnp.where(jnp.isfinite(log_ess), jnp.exp(log_ess), 0.0)


def log_mean(log_w: Float[Array, " N"]) -> Float[Array, ""]:
    """log of the mean weight."""
    return jax.nn.logsumexp(log_w) - jnp.log(log_w.shape[0])


def systematic(key: Array, log_w: Float[Array, " N"]) -> Int[Array, " N"]:
    """Indices of N equally weighted particles: one uniform number, evenly spread positions."""
    n = log_w.shape[0]
    weights = jnp.exp(log_w - jnp.max(log_w))
    cumulative = jnp.cumsum(weights)
    positions = (jnp.arange(n) + jax.random.uniform(key)) / n * cumulative[-1]
    return jnp.clip(jnp.searchsorted(cumulative, positions, side="right"), 0, n - 1)


class Walk(NamedTuple):
    """Particles on their way through the levels of one problem."""

    problem: Problem
    options: Options
    keys: Array  # of each population, `(S,)`
    reading: Reading = PERFECT
    hessian: Array | None = None  # of a quadratic log r, where the covariance of the data is used
    ridges: Ridges | None = None  # the elements of log r, where each is of one direction

    def prepared(self) -> "Walk":
        """With what is worked out once for a run."""
        if self.problem.reverse.kernel.is_discrete:
            return self
        of_r = hessian(self.problem) if self._uses_covariance else None
        reading = measure(self.problem)
        points = _probes(self.problem, jax.random.key(0))
        ridges = ridges_of(self.problem, points, reading.mean)
        return self._replace(reading=reading, hessian=of_r, ridges=ridges)

    def start(self) -> State:
        """Particles from π at the last level."""
        n, reverse = self.options.num_particles, self.problem.reverse

        def draw(key: Array) -> Array:
            return reverse.kernel.stationary((n, *reverse.event_shape)).sample(key).reshape(n, -1)

        x = self._constrain(jax.vmap(draw)(fold(self.keys, reverse.n + 1)))
        zeros, flat = jnp.zeros(x.shape[:2]), jnp.zeros((reverse.n + 1, len(x)))
        ancestor = jnp.broadcast_to(jnp.arange(n), zeros.shape)
        trace, least = Trace(flat, flat > 1, flat, flat), jnp.full(len(x), jnp.inf)
        return State(x, zeros, zeros, zeros, zeros[:, 0], ancestor, zeros, least, trace)

    def advance(self, state: State, t: Array) -> State:
        """From level t ≥ 2 down to the one before."""
        is_common = self._uses_covariance
        shared = common(self.problem, self.reading, self.hessian, t) if is_common else None

        def look(x: Array) -> Look:
            view = View(self.problem, x, t, self.reading, shared, self.ridges)
            return self.options.twist.look(view)

        return self._move(state, self._in_blocks(state.x, look), t, shared)

    def finish(self, state: State) -> State:
        """From level 1 to x_0 and its likelihood."""

        def look_last(x: Array) -> Look:
            return self.options.twist.look(View(self.problem, x, 1, ridges=self.ridges))

        look = self._in_blocks(state.x, look_last)
        state = self._move(state, look, 1, None)
        likelihood = self._in_blocks(state.x, lambda x: self.problem.log_r(x, on_grid=True))
        state = _weigh(state, likelihood)
        ess = jax.vmap(effective_number)(state.log_w)
        return state._replace(trace=state.trace._replace(ess=state.trace.ess.at[0].set(ess)))

    def rows(self, x: Array) -> Array:
        """`(S, N, ...)` as network and program see it, `(R·N, B, ...)`."""
        R, N, B = self.options.num_runs, self.options.num_particles, self.problem.systems
        return jnp.swapaxes(x.reshape(R, B, *x.shape[1:]), 1, 2).reshape(R * N, B, *x.shape[2:])

    def _populations(self, x: Array) -> Array:
        """The way back."""
        R, N, B = self.options.num_runs, self.options.num_particles, self.problem.systems
        return jnp.swapaxes(x.reshape(R, N, *x.shape[1:]), 1, 2).reshape(R * B, N, *x.shape[2:])

    def _in_blocks(self, x: Array, at: Callable[[Array], Any]) -> Any:
        """A function of particles as the program sees them, in blocks that fit memory."""
        x = self.rows(x)
        count, wanted = x.shape[0], max(1, self.options.block_size // self.problem.systems)
        size = next(s for s in range(min(wanted, count), 0, -1) if count % s == 0)
        if size == count:
            return jax.tree.map(self._populations, at(x))
        out = jax.lax.map(at, x.reshape(count // size, size, *x.shape[1:]))
        return jax.tree.map(lambda a: self._populations(a.reshape(count, *a.shape[2:])), out)

    @property
    def _uses_covariance(self) -> bool:
        """Whether the twist works with the covariance of the data."""
        return self.problem.draw.covariance is not None and self.options.twist.uses_covariance

    def _move(self, state: State, look: Look, t: Array | int, shared: Common | None) -> State:
        """Weigh by ψ_t, resample where needed, propose the next level."""
        keys_draw, keys_resample = (fold(fold(self.keys, t), use) for use in (0, 1))
        state = _weigh(state, look.log_psi)
        trace = state.trace._replace(
            shift=state.trace.shift.at[t].set(jnp.max(look.shift, 1)),
            bad=state.trace.bad.at[t].set(jnp.mean(look.bad, 1)),
        )
        state = state._replace(trace=trace, log_psi=look.log_psi)
        state, look = self._resample(keys_resample, state, look, t)
        narrowing, R = None if shared is None else shared.narrowing, self.options.num_runs
        narrowing = jax.tree.map(lambda a: jnp.tile(a, (R, *[1] * (a.ndim - 1))), narrowing)
        draw = jax.vmap(lambda key, proposal, common: proposal.draw(key, common))
        x, log_ratio = draw(keys_draw, look.proposal, narrowing)
        held = state.log_w
        return state._replace(x=self._constrain(x), log_w=held + log_ratio, held=held)

    def _resample(
        self, keys: Array, state: State, look: Look, t: Array | int
    ) -> tuple[State, Look]:
        ess = jax.vmap(effective_number)(state.log_w)
        is_due = (ess < self.options.threshold * self.options.num_particles) & (ess > 0)
        trace = state.trace._replace(
            ess=state.trace.ess.at[t].set(ess), resampled=state.trace.resampled.at[t].set(is_due)
        )
        state = state._replace(trace=trace)
        if self.options.threshold == 0:
            return state, look

        def gather(moving: tuple) -> tuple:
            def of_one(key: Array, log_w: Array, due: Array, moving: tuple) -> tuple:
                index = jnp.where(due, systematic(key, log_w), jnp.arange(len(log_w)))
                return jax.tree.map(lambda a: a[index], moving)

            return jax.vmap(of_one)(keys, state.log_w, is_due, moving)

        moving = (look, state.ancestor, state.log_psi)
        look, ancestor, log_psi = jax.lax.cond(jnp.any(is_due), gather, lambda m: m, moving)
        log_z = state.log_z + jnp.where(is_due, jax.vmap(log_mean)(state.log_w), 0.0)
        log_w = jnp.where(is_due[:, None], 0.0, state.log_w)
        return state._replace(ancestor=ancestor, log_psi=log_psi, log_w=log_w, log_z=log_z), look

    def _constrain(self, x: Array) -> Array:
        """Put particles, runs leading, where they belong on several devices."""
        mesh = self.options.mesh
        if mesh is None:
            return x
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        return jax.lax.with_sharding_constraint(x, sharding)


def _weigh(state: State, log_psi: Float[Array, "S N"]) -> State:
    """Put in the twist of this level and take out that of the one before."""
    log_w = state.log_w + log_psi - state.log_psi
    added = log_w - jnp.where(jnp.isfinite(state.held), state.held, 0.0)
    ess = jax.vmap(effective_number)(added)
    worst = jnp.where((ess < state.worst_ess)[:, None], added, state.worst)
    return state._replace(log_w=log_w, worst=worst, worst_ess=jnp.minimum(ess, state.worst_ess))


def fold(keys: Array, value: Array | int) -> Array:
    """`fold_in` of one value into every key."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, value)


def entry_keys(key: Array, batch_shape: tuple[int, ...]) -> Array:
    """Key of each entry of the plates, `(entries,)`: `fold_in(key, b)`, or `key` without plates."""
    if not batch_shape:
        return key[None]
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(math.prod(batch_shape)))


def _population_keys(key: Array, batch_shape: tuple[int, ...], num_runs: int) -> Array:
    """Key of each run of each entry of the plates, `(num_runs · entries,)`."""
    of_runs = jax.vmap(fold, (None, 0))
    return of_runs(entry_keys(key, batch_shape), jnp.arange(num_runs)).reshape(-1)


# a run, compiled


class Outcome(NamedTuple):
    """What a run leaves, NumPy arrays; R runs, N particles, plates as the prior has them."""

    x_0: np.ndarray  # `(R, N, *plates, *event_shape)`, the user's units, float64 or symbols
    log_weights: np.ndarray  # normalised over N, `(R, N, *plates)`
    log_evidences: np.ndarray  # log Ẑ of each run, `(R, *plates)`
    log_r: np.ndarray  # log r of each particle, `(R, N, *plates)`
    ancestors: np.ndarray  # each particle's ancestor at the start, `(R, N, *plates)`
    worst_log_weights: np.ndarray  # of the step of least effective number, `(R, N, *plates)`
    trace: Trace  # at levels n..0, `(n + 1, R, *plates)`
    is_coupled: Any = False  # whether log r of a system moves with another's x_0, at the particles


# the program, known entries with their mask, and the keys: what is compiled once for all
_Inputs = tuple[Conditioned, Array | None, Array | np.ndarray | None, Array]


def run(read: Read, options: Options, key: Array, *, progress: bool) -> Outcome:
    """Walk all particles from π to x_0.

    Before the walk the likelihood is tried at a few points, to see whether every entry of x_0 has
    one of its own (its curvature is diagonal), whether the curvature is the same everywhere (log r
    is quadratic), whether log r is a sum of few functions of one direction each, whether r is 0 at
    all of them, and whether log r of one system moves with the x_0 of another; that is tried again
    among the particles, which are where the posterior is.

    Raises:
        ValueError: if the twist does not fit, the systems are coupled, or nan is observed.
    """
    conditioned, programs = read.conditioned, read.programs
    _check(conditioned.draw, options)
    known, mask = known_of(conditioned)
    keys = _population_keys(key, conditioned.batch_shape, options.num_runs)
    inputs = conditioned, known, mask, keys
    found = map(bool, programs(_probe, inputs, options=options))
    is_diagonal, is_quadratic, is_ridged, is_impossible, is_coupled = found
    _check_apart(is_coupled)
    if is_impossible and any(np.isnan(a).any() for a in conditioned.arrays if a.dtype.kind == "f"):
        raise ValueError(
            "program must not observe nan: its arguments hold some, and no draw of the prior "
            "that was tried can have given them. Mask what is missing"
        )
    options = options._replace(
        is_diagonal=is_diagonal, is_quadratic=is_quadratic, is_ridged=is_ridged
    )
    n = conditioned.reverse.T if options.steps is None else options.steps
    shared, state = programs(_begin, inputs, options=options)
    stops = np.unique(np.linspace(1, n, _CHUNKS + 1 if progress else 2).astype(int))[::-1]
    with bars.bar(total=n, desc="infer", disable=not progress) as bar:
        for high, low in itertools.pairwise(stops):
            state = programs(_advance, inputs, shared, state, high, low, options=options)
            if progress:
                jax.block_until_ready(state)
                bar.update(int(high - low))
        out = programs(_end, inputs, shared, state, options=options)
        bar.update(1)
    _check_apart(bool(out.is_coupled))
    out = jax.tree.map(np.asarray, out)
    return out._replace(x_0=_in_users_units(conditioned.draw, out.x_0))


def _in_users_units(draw: PriorDraw, x_0: np.ndarray) -> np.ndarray:
    """What the relative process drew, in float64, known entries as they were given."""
    x_0 = draw.reverse.plus_loc(x_0)
    if draw.known is None:
        return x_0
    return np.where(draw.mask, np.asarray(draw.known).astype(x_0.dtype), x_0)


def _check_apart(is_coupled: bool) -> None:
    if is_coupled:
        raise ValueError(
            "program must keep the entries of the plates around the prior apart; log r of one "
            "moved with the x_0 of another. Take the prior out of the plate"
        )


def _check(draw: PriorDraw, options: Options) -> None:
    """Refuse a twist that does not fit the prior, or whose weights would not be finite."""
    twist = options.twist
    twist.check(draw)
    if options.is_weighted and draw.known is not None and not twist.takes_known:
        raise ValueError(
            "twist must be one that has finite weights where entries of x_0 are known exactly; "
            f"got {type(twist).__name__}. Use LaplaceTwist, ReadoutTwist with a Mixture, or "
            "Guided, which has no weights"
        )


def known_of(conditioned: Conditioned) -> tuple[Array | None, np.ndarray | None]:
    """Known entries on the scale of the diffusion, `(B, d)`, and their mask.

    The mask is `(d,)` where all systems share it: a level's matrices, most of the time for images,
    are then worked out once.
    """
    draw = conditioned.draw
    if draw.known is None:
        return None, None
    shape, mask = (*conditioned.batch_shape, *draw.reverse.event_shape), np.asarray(draw.mask)
    if not np.isfinite(np.asarray(draw.known)[mask]).all():
        raise ValueError("known must be finite wherever mask is True; got entries that are not")
    d = math.prod(draw.reverse.event_shape)
    values = jnp.asarray(draw.reverse.to_state(np.where(mask, np.asarray(draw.known), 0)))
    known = jnp.broadcast_to(values, shape).reshape(-1, d)
    rows = np.broadcast_to(mask, shape).reshape(-1, d)
    return known, rows[0] if (rows == rows[0]).all() else rows


def _problem(inputs: _Inputs, options: Options) -> Problem:
    conditioned, known, mask, _ = inputs
    reverse = conditioned.reverse.respaced(options.steps)
    tests = options.is_diagonal, options.is_quadratic, options.is_ridged
    return Problem(conditioned, reverse, known, mask, *tests)


def _probe(inputs: _Inputs, *, options: Options) -> tuple[Array, ...]:
    """Is log r diagonal, quadratic, of ridges, is r 0 throughout, are systems coupled?"""
    problem, key = _problem(inputs, options), jax.random.key(0)
    reverse, shape = problem.reverse, (problem.systems, problem.size)
    if reverse.kernel.is_discrete:
        curvature = jnp.zeros(4, bool)
    else:
        curvature = _curvature(problem, _probes(problem, key), key)

    def draw(key: Array, width: Array) -> Array:
        if reverse.kernel.is_discrete:
            x = jax.random.randint(key, shape, 0, reverse.kernel.num_data_states, jnp.int32)
        else:
            x = width * jax.random.normal(key, shape) * _sd(problem)
        return reverse.to_data(problem.shaped(x[None])[0])

    def is_coupled(row: tuple[Array, Array]) -> Array:
        keys, width = jax.random.split(row[0], 3), row[1]
        points = (draw(key, width) for key in keys[1:])
        return systems_are_coupled(keys[0], problem.conditioned, *points)

    widths = jnp.exp2(jnp.arange(_HALVES) % 4 - 1.0)
    return *curvature, jnp.any(jax.lax.map(is_coupled, (jax.random.split(key, _HALVES), widths)))


def _sd(problem: Problem) -> Array:
    """Standard deviations of the entries of x_0, on the scale of the diffusion."""
    tau2 = problem.of_entries(problem.draw.variance).astype(problem.reverse.kernel.dtype)
    return jnp.sqrt(tau2)


def _probes(problem: Problem, key: Array) -> Float[Array, "p B d"]:
    """Points on the scale of the diffusion at which the likelihood is tried."""
    shape = _PROBES, problem.systems, problem.size
    return jax.random.normal(key, shape) * _sd(problem)


def _curvature(problem: Problem, points: Array, key: Array) -> tuple[Array, ...]:
    """By products with random signs at points on the scale of the diffusion."""
    at = local(problem.log_r, points)
    signs = jax.random.rademacher(key, points.shape, points.dtype)
    entries, product = at.curvature(jnp.ones_like(points)), at.curvature(signs)
    off, on = (jnp.linalg.norm(v, axis=-1) for v in (product - entries * signs, product))
    product = at.curvature(jnp.broadcast_to(signs[:1], points.shape))
    change, whole = (jnp.linalg.norm(v, axis=-1) for v in (product - product[:1], product[:1]))
    is_finite = jnp.isfinite(at.value)
    # a kink has no curvature on either side
    move = at.curvature(points - points[:1])
    bend = jnp.linalg.norm(at.gradient[:1] - at.gradient - move, axis=-1)
    size = jnp.max(jnp.linalg.norm(at.gradient, axis=-1), 0) + jnp.linalg.norm(move, axis=-1)
    is_same = jnp.all(change <= 1e-3 * whole) & jnp.all(bend <= 1e-3 * size) & jnp.all(is_finite)
    is_ridged = ~is_same & _is_ridged(problem, points)
    return jnp.all(off <= 1e-3 * on), is_same, is_ridged, ~jnp.any(is_finite)


def _is_ridged(problem: Problem, points: Array) -> Bool[Array, ""]:
    """Whether log r is a sum of few functions of one direction each."""
    if not problem.is_observed:
        return jnp.array(False)
    count = jax.eval_shape(problem.log_elements, points).shape[-1]
    if count > LIMIT:
        return jnp.array(False)
    return directions(problem.log_elements, points)[1]


def _walk(inputs: _Inputs, options: Options, shared: tuple = ()) -> Walk:
    return Walk(_problem(inputs, options), options, inputs[-1], *shared)


def _begin(inputs: _Inputs, *, options: Options) -> tuple[tuple, State]:
    walk = _walk(inputs, options).prepared()
    return (walk.reading, walk.hessian, walk.ridges), walk.start()


def _advance(
    inputs: _Inputs, shared: tuple, state: State, high: Array, low: Array, *, options: Options
) -> State:
    walk = _walk(inputs, options, shared)
    return jax.lax.fori_loop(0, high - low, lambda i, s: walk.advance(s, high - i), state)


def _end(inputs: _Inputs, shared: tuple, state: State, *, options: Options) -> Outcome:
    walk = _walk(inputs, options, shared)
    state, problem = walk.finish(state), walk.problem
    draw, batch_shape = problem.draw, problem.conditioned.batch_shape
    x = problem.shaped(walk.rows(state.x))
    x_0 = problem.reverse.to_data(x)
    if draw.known is not None:
        x_0 = jnp.where(draw.mask, draw.known, x_0)
    log_w = jnp.where(jnp.isnan(state.log_w), -jnp.inf, state.log_w)
    log_z = state.log_z + jax.vmap(log_mean)(log_w)
    total = jax.nn.logsumexp(log_w, 1, keepdims=True)
    even = jnp.full_like(log_w, -math.log(options.num_particles))
    log_w = jnp.where(jnp.isfinite(total), log_w - total, even)
    log_r = jax.vmap(problem.conditioned.log_r)(x_0)

    def is_coupled(row: tuple[Array, Array, Array]) -> Array:
        return systems_are_coupled(row[0], problem.conditioned, *row[1:])

    rows = jax.random.split(jax.random.key(1), len(x_0)), x_0, jnp.roll(x_0, 1, 0)
    coupled = jnp.any(jax.lax.map(is_coupled, rows, batch_size=BLOCK))
    R, N = options.num_runs, options.num_particles
    by_run = [
        walk.rows(a).reshape(R, N, *batch_shape) for a in (log_w, state.ancestor, state.worst)
    ]
    x_0 = problem.reverse.relative().to_data(x)
    return Outcome(
        x_0.reshape(R, N, *x_0.shape[1:]), by_run[0], log_z.reshape(R, *batch_shape),
        log_r.reshape(R, N, *batch_shape), *by_run[1:],
        jax.tree.map(lambda a: a[::-1].reshape(len(a), R, *batch_shape), state.trace), coupled,
    )  # fmt: skip
