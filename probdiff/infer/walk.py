"""`Walk`: a program, compiled into the walk of its particles, with what it must not hold refused.

Arguments of the program that are arrays are traced, so that a walk compiles once for all values of
the data; all others are part of what is compiled. Before a walk the likelihood is tried at a few
points, to see

    whether every entry of x_0 has a likelihood of its own (the curvature of log r is diagonal),
    whether that curvature is the same everywhere (log r is quadratic),
    whether r is 0 at all of them (which nan among the arguments explains),
    whether log r of one entry of the plates moves with the x_0 of another (which is refused).

Keys: a program without plates uses `key` itself, entry b of its plates `fold_in(key, b)`, and run r
of either `fold_in(·, r)`. So an entry does not depend on who shares its plate.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from probdiff import bars
from probdiff.arguments import check_at_least
from probdiff.infer import particles
from probdiff.infer.expansion import local, sum_event
from probdiff.infer.levels import levels
from probdiff.infer.look import Plan
from probdiff.infer.program import Program, condition, systems_are_coupled
from probdiff.infer.twists import LaplaceTwist, Twist
from probdiff.kernels import DiscreteKernel
from probdiff.prior import PriorDraw

PROBES = 8
"""Points at which the likelihood is tried before a run."""
CHUNKS = 20
"""Parts of a run between which the progress bar moves."""


class Outcome(NamedTuple):
    """What a run leaves, NumPy arrays; R runs, N particles, plates as the prior has them."""

    x_0: np.ndarray
    """`(R, N, *plates, *event_shape)`, the user's units."""
    log_weights: np.ndarray
    """Normalised over N, `(R, N, *plates)`."""
    log_evidences: np.ndarray
    """log Ẑ of each run, `(R, *plates)`."""
    log_r: np.ndarray
    """log r of each particle, `(R, N, *plates)`."""
    ancestors: np.ndarray
    """Each particle's ancestor at the start, `(R, N, *plates)`."""
    ess: np.ndarray
    """Effective number at levels n..0, `(n + 1, R, *plates)`."""
    resampled: np.ndarray
    """Whether resampled at levels n..0, `(n + 1, R, *plates)`."""
    shift: np.ndarray
    """Largest move of a mean at levels n..0, standard deviations, `(n + 1, R, *plates)`."""
    bad: np.ndarray
    """Share of particles whose twist was not finite at levels n..0, `(n + 1, R, *plates)`."""
    worst_log_weights: np.ndarray
    """Log weights of the worst step, that of the least effective number, `(R, N, *plates)`."""


class Walk:
    """Runs the particles: what `SMC` and `Guided` share."""

    def __init__(
        self,
        program: Program,
        twist: Twist,
        *,
        num_particles: int,
        num_runs: int,
        steps: int | None,
        is_weighted: bool,
        threshold: float,
        block_size: int,
        mesh: Mesh | None,
    ):
        check_at_least(1, num_particles=num_particles, num_runs=num_runs, block_size=block_size)
        if mesh is not None and num_runs % mesh.size:
            raise ValueError(
                f"num_runs must be a multiple of the {mesh.size} devices of the mesh, which share "
                f"out the runs; got {num_runs}"
            )
        self.program, self.twist, self.steps = program, twist, steps
        self.num_particles, self.num_runs = num_particles, num_runs
        self.is_weighted, self.threshold = is_weighted, threshold if is_weighted else 0.0
        self.block_size, self.mesh = block_size, mesh
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self, key: Array, args: tuple[Any, ...], kwargs: dict[str, Any], progress: bool
    ) -> Outcome:
        """Walk all particles from π to x_0."""
        static, arrays = _split(args, kwargs)
        prepare = self._cached(self._prepare, *static)
        keys, curvature, is_coupled, is_holed, n = prepare(key, arrays)
        if bool(is_holed):
            raise ValueError("known must be finite wherever mask is True; got entries that are not")
        if bool(is_coupled):
            raise ValueError(
                "program must keep the entries of the plates around the prior apart; log r of one "
                "moved with the x_0 of another. Take the prior out of the plate"
            )
        is_diagonal, is_quadratic, is_impossible = map(bool, curvature)
        if is_impossible and any(np.isnan(a).any() for a in arrays if a.dtype.kind == "f"):
            raise ValueError(
                "program must not observe nan: its arguments hold some, and no draw of the prior "
                "that was tried can have given them. Mask what is missing"
            )
        n = int(n)
        begin, walk, end = self._cached(self._functions, is_diagonal, is_quadratic, *static)
        state = begin(keys, arrays)
        stops = np.unique(np.linspace(1, n, CHUNKS + 1 if progress else 2).astype(int))[::-1]
        with bars.bar(total=n, desc="infer", disable=not progress) as bar:
            for high, low in itertools.pairwise(stops):
                state = walk(keys, arrays, state, high, low)
                if progress:
                    jax.block_until_ready(state)
                    bar.update(int(high - low))
            out = end(keys, arrays, state)
            bar.update(1)
        return Outcome(*map(np.asarray, out))

    def apply(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *inputs: Any,
    ) -> Any:
        """`function(conditioned, *inputs)` compiled, NumPy arrays."""
        static, arrays = _split(args, kwargs)
        out = self._cached(self._applied, function, *static)(arrays, *inputs)
        return jax.tree.map(np.asarray, out)

    def look(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """`function(conditioned)` where it returns names and sizes, which no array enters."""
        static, arrays = _split(args, kwargs)
        found = []

        def trace(arrays: Any) -> None:
            found.append(function(self._condition(static, arrays)))

        jax.eval_shape(trace, arrays)
        return found[0]

    def _cached(self, make: Callable[..., Any], *static: Any) -> Any:
        """`make(*static)`, made once."""
        name = make.__name__, *static, tuple(map(type, static[-1]))  # 1 == True == 1.0
        try:
            is_made = name in self._compiled
        except TypeError as error:
            raise ValueError(
                f"arguments of the program must be arrays or hashable; got {static[-1]}"
            ) from error
        if not is_made:
            self._compiled[name] = make(*static)
        return self._compiled[name]

    def _arguments(self, tree: Any, is_array: Any, fixed: Any, arrays: Any) -> Any:
        arrays, fixed = iter(arrays), iter(fixed)
        return jax.tree.unflatten(tree, [next(arrays if a else fixed) for a in is_array])

    def _condition(self, static: Any, arrays: Any) -> Any:
        args, kwargs = self._arguments(*static, arrays)
        return condition(self.program, args, kwargs)

    def _applied(self, function: Callable[..., Any], *static: Any) -> Callable[..., Any]:
        @jax.jit
        def applied(arrays: Any, *inputs: Any) -> Any:
            return function(self._condition(static, arrays), *inputs)

        return applied

    def _prepare(self, *static: Any) -> Callable[..., Any]:
        """Keys of all populations, and what must be known of the likelihood before compiling."""

        @jax.jit
        def prepare(key: Array, arrays: Any) -> Any:
            conditioned = self._condition(static, arrays)
            diffusion = conditioned.draw.diffusion
            self._check(conditioned)
            walked = levels(conditioned.draw, self.steps)
            keys = _population_keys(key, conditioned.batch_shape, self.num_runs)
            probes = jax.random.key(0)
            shape = (*conditioned.batch_shape, *diffusion.event_shape)
            if isinstance(diffusion.kernel, DiscreteKernel):
                points = jax.random.randint(
                    probes, (2, *shape), 0, diffusion.kernel.num_data_states, jnp.int32
                )
                curvature = jnp.zeros(3, bool)
            else:
                points = jax.random.normal(probes, (PROBES, *shape)) * jnp.sqrt(
                    jnp.asarray(conditioned.draw.variance, diffusion.kernel.dtype)
                )
                curvature = _curvature(conditioned, points, probes)
                points = points * diffusion.scale + diffusion.loc
            is_coupled = systems_are_coupled(conditioned, points[0], points[1])
            is_holed = _is_holed(conditioned.draw)
            return keys, curvature, is_coupled, is_holed, jnp.asarray(walked.n)

        return prepare

    def _functions(
        self, is_diagonal: bool, is_quadratic: bool, *static: Any
    ) -> tuple[Callable[..., Any], ...]:
        def plan(arrays: Any) -> Plan:
            conditioned = self._condition(static, arrays)
            return Plan(
                conditioned, levels(conditioned.draw, self.steps), self.twist, self.num_particles,
                self.num_runs, self.threshold, self.block_size, is_diagonal, is_quadratic,
                self._constrain,
            )  # fmt: skip

        @jax.jit
        def begin(keys: Array, arrays: Any) -> particles.State:
            return particles.start(plan(arrays), keys)

        @jax.jit
        def walk(keys: Array, arrays: Any, state: Any, high: Any, low: Any) -> particles.State:
            whole = plan(arrays)

            def body(down: Any, state: particles.State) -> particles.State:
                return particles.advance(whole, keys, state, high - down)

            return jax.lax.fori_loop(0, high - low, body, state)

        @jax.jit
        def end(keys: Array, arrays: Any, state: Any) -> tuple[Any, ...]:
            whole = plan(arrays)
            return _outcome(whole, particles.finish(whole, keys, state))

        return begin, walk, end

    def _check(self, conditioned: Any) -> None:
        """Refuse a twist that does not fit the prior, or whose weights would not be finite."""
        draw, name = conditioned.draw, type(self.twist).__name__
        if isinstance(draw.diffusion.kernel, DiscreteKernel):
            if not isinstance(self.twist, LaplaceTwist):
                raise ValueError(
                    "twist must be left out for symbols, whose twist tries every change of one "
                    f"entry; got {name}"
                )
            return
        self.twist.check(draw)
        if self.is_weighted and draw.known is not None and not self.twist.takes_known:
            raise ValueError(
                "twist must be one that has finite weights where entries of x_0 are known exactly; "
                f"got {name}. Use LaplaceTwist, ReadoutTwist with a Mixture, or Guided, which has "
                "no weights"
            )

    def _constrain(self, x: Any) -> Any:
        if self.mesh is None:
            return x
        spec = PartitionSpec(self.mesh.axis_names)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], list[Any]]:
    """What a program is compiled for, and the arrays that it is then given."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    # NumPy's floats count as arrays: values of data, of which each would be compiled for otherwise.
    is_array = tuple(isinstance(leaf, jax.Array | np.ndarray | np.floating) for leaf in leaves)
    arrays = [leaf for leaf, a in zip(leaves, is_array, strict=True) if a]
    fixed = tuple(leaf for leaf, a in zip(leaves, is_array, strict=True) if not a)
    return (tree, is_array, fixed), arrays


def entry_keys(key: Array, batch_shape: tuple[int, ...]) -> Array:
    """Key of each entry of the plates, `(entries,)`: `fold_in(key, b)`, or `key` without plates."""
    if not batch_shape:
        return key[None]
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(math.prod(batch_shape)))


def _is_holed(draw: PriorDraw) -> Array:
    """Whether an entry that is said to be known is not a finite number."""
    if draw.known is None:
        return jnp.zeros((), bool)
    return jnp.any(draw.mask & ~jnp.isfinite(draw.known))


def _population_keys(key: Array, batch_shape: tuple[int, ...], num_runs: int) -> Array:
    """Key of each run of each entry of the plates, `(num_runs · entries,)`."""
    runs = jnp.arange(num_runs)
    keys = entry_keys(key, batch_shape)
    return jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))(keys, runs).reshape(-1)


def _curvature(conditioned: Any, points: Any, key: Array) -> Array:
    """Whether the curvature of log r is diagonal, whether it is the same everywhere, and whether
    r is 0 at all points.

    Tried at points on the scale of the diffusion, by products with random signs.
    """
    diffusion = conditioned.draw.diffusion
    lead = 1 + len(conditioned.batch_shape)

    def log_r(x: Any) -> Any:
        return jax.vmap(conditioned.log_r)(x * diffusion.scale + diffusion.loc)

    at = local(log_r, points)
    signs = jax.random.rademacher(key, points.shape, points.dtype)
    entries, product = at.curvature(jnp.ones_like(points)), at.curvature(signs)
    off = jnp.sqrt(sum_event((product - entries * signs) ** 2, lead))
    on = jnp.sqrt(sum_event(product**2, lead))
    same = jnp.broadcast_to(signs[:1], points.shape)
    product = at.curvature(same)
    change = jnp.sqrt(sum_event((product - product[:1]) ** 2, lead))
    is_same = jnp.all(change <= 1e-3 * jnp.sqrt(sum_event(product[:1] ** 2, lead)))
    is_finite = jnp.all(jnp.isfinite(at.value))
    is_impossible = ~jnp.any(jnp.isfinite(at.value))
    return jnp.stack([jnp.all(off <= 1e-3 * on), is_same & is_finite, is_impossible])


def _outcome(plan: Plan, state: particles.State) -> tuple[Any, ...]:
    """Arrays of an `Outcome`."""
    diffusion, conditioned = plan.levels.draw.diffusion, plan.conditioned
    x_0 = diffusion.to_data(plan.to_program(state.x))
    if plan.levels.draw.known is not None:
        x_0 = jnp.where(plan.levels.draw.mask, plan.levels.draw.known, x_0)
    log_w = jnp.where(jnp.isnan(state.log_w), -jnp.inf, state.log_w)
    log_z = state.log_z + particles.log_mean(log_w)
    total = jax.nn.logsumexp(log_w, 1, keepdims=True)
    even = jnp.full_like(log_w, -math.log(plan.num_particles))
    log_w = jnp.where(jnp.isfinite(total), log_w - total, even)
    batch_shape = conditioned.batch_shape

    def runs_first(a: Any) -> Any:
        """`(R·N, *plates, ...)` to `(R, N, *plates, ...)`."""
        return a.reshape(plan.num_runs, -1, *a.shape[1:])

    def per_level(a: Any) -> Any:
        return a[::-1].reshape(a.shape[0], plan.num_runs, *batch_shape)

    trace = state.trace
    return (
        runs_first(x_0),
        runs_first(plan.to_program(log_w)),
        log_z.reshape(plan.num_runs, *batch_shape),
        runs_first(jax.vmap(conditioned.log_r)(x_0)),
        runs_first(plan.to_program(state.ancestor)),
        per_level(trace.ess),
        per_level(trace.resampled),
        per_level(trace.shift),
        per_level(trace.bad),
        runs_first(plan.to_program(trace.worst)),
    )
