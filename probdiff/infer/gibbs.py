"""`ParticleGibbs`: chains whose trajectories start at particles and move as wholes.

Particles find modes and their weights, and where r is sharp they collapse onto few ancestors; moves
of whole trajectories repair what collapsed, and do not cross between modes. So chains start at
draws of `SMC`, taken systematically from all its runs, and a sweep is

    x_0:T | θ    a move of Hamiltonian Monte Carlo in forward coordinates (see `moves`)
    θ | x_0      a step of a stock NumPyro kernel, θ all other latent sites; it asks no network.

Both leave p(θ, x_0:T | y) as it is. Where there are modes far apart, many chains with few sweeps
keep the weights that particles gave them; a few long ones do not.

In warm-up step sizes are set to an acceptance of three quarters, for each system, and half way the
entries of x_0 are rescaled by their spread over chains and moves.

Sources: Andrieu et al. (2010), for particles within a Gibbs sampler; Neal (2011).
"""

import dataclasses
import functools
import itertools
import math
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpyro.infer import NUTS
from numpyro.infer.hmc_util import dual_averaging

from probdiff import bars
from probdiff.arguments import check_at_least, check_callable, check_flag, check_key
from probdiff.infer import moves
from probdiff.infer.coordinates import Coordinates, coordinates, path_of
from probdiff.infer.health import InferenceWarning, systems
from probdiff.infer.latents import Evidence, Others, proposals, summed
from probdiff.infer.moves import Point
from probdiff.infer.particles import known_of
from probdiff.infer.program import (
    Conditioned,
    Program,
    Read,
    decides_prior,
    deterministics,
    numbered,
    plate_dims,
    read,
)
from probdiff.infer.smc import SMC
from probdiff.infer.spread import Problem
from probdiff.infer.twist import Twist

if TYPE_CHECKING:
    import xarray as xr

_TARGET = 0.75  # share of moves that are accepted
_FIRST_STEP = 0.05
_NARROWEST, _WIDEST = 0.05, 2.0  # by which an entry is rescaled at most
_STUCK = 0.1  # share of accepted moves below which chains stay where they are
_R_HAT = 1.05
_FEWEST = 20  # draws of a chain below which R-hat is mostly noise
_, _averaged = dual_averaging()


class State(NamedTuple):
    """C chains of B systems."""

    key: Array
    point: Point
    average: Any  # of the log step size, `(B,)` each
    coordinates: Coordinates
    given: list[Array]  # values of the other latent sites, `(C, ...)` each
    kernel: Any  # state of their kernel; None without


class Kept(NamedTuple):
    """What a sweep leaves, `(C, ...)`."""

    x: Float[Array, "C B d"]  # on the scale of the diffusion
    share: Float[Array, "C B"]
    log_r: Float[Array, "C B"]
    log_w: Float[Array, "C B"]
    given: list[Array]


class ParticleGibbs:
    """Draws of x_0 and of all other latent sites of a program, by chains that start at particles.

    For exact pixels, on which particles collapse, and for programs with other unknowns. A sweep
    moves each chain's trajectory by Hamiltonian Monte Carlo in forward coordinates, then the other
    latent sites by a kernel of NumPyro.

    Args:
        program: A program with one `prior()` of numbers, and observed sites below it; any other
            latent sites whose laws are continuous, which the prior's context and known entries must
            not depend on.
        num_chains: Chains C, at least 1: many where modes lie far apart, since chains stay in them.
        num_warmup: Sweeps before the first draw that is kept, at least 2.
        num_samples: Sweeps that are kept, at least 1.
        num_leapfrog: Leapfrog steps of a move, at least 1; each calls the network at all levels.
        num_particles: Particles of one run of the `SMC` that chains start from.
        num_runs: Its runs.
        twist: Its twist.
        steps: Number n in 2..T of levels to walk, another model than that of all T, the default.
        kernel: What makes a kernel of a program for the other latent sites, `NUTS` if absent.
        progress: Show a bar.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> prior = standard_diffusion((2,)).prior({})  # x_0 ~ N(0, I)
        >>> def program(known):
        ...     x_0 = prior(known=known, mask=np.array([True, False]))
        ...     sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        ...     numpyro.sample("y", dist.Normal(x_0.sum(-1), sigma), obs=2.0)
        >>> gibbs = infer.ParticleGibbs(program, num_chains=2, num_samples=10, num_leapfrog=4)
        >>> gibbs.run(jax.random.key(0), jnp.array([1.0, 0.0]))
        >>> {name: draws.shape for name, draws in gibbs.get_samples().items()}
        {'x_0': (20, 2), 'sigma': (20,)}

    Sources: Andrieu et al. (2010); Neal (2011).
    """

    def __init__(
        self, program: Program, *, num_chains: int = 16, num_warmup: int = 20,
        num_samples: int = 50, num_leapfrog: int = 12, num_particles: int = 64, num_runs: int = 4,
        twist: Twist | None = None, steps: int | None = None, kernel: Any = NUTS,
        progress: bool = False,
    ):  # fmt: skip
        """Prepare the sampler; the arguments are those of the class."""
        check_callable("program(*args)", program=program)
        check_at_least(2, num_warmup=num_warmup)
        check_at_least(1, num_chains=num_chains, num_samples=num_samples, num_leapfrog=num_leapfrog)
        check_callable("a NumPyro kernel's class, such as NUTS", kernel=kernel)
        check_flag(progress=progress)
        self.program, self.progress, self._kernel = program, progress, kernel
        self.num_chains, self.num_warmup, self.num_samples = num_chains, num_warmup, num_samples
        self.num_leapfrog, self.steps = num_leapfrog, steps
        self._smc = {
            "num_particles": num_particles, "num_runs": num_runs, "twist": twist, "steps": steps
        }  # fmt: skip
        SMC(program, **self._smc)  # checks them
        self._run: _Run | None = None

    def run(self, key: Array, *args: Any, **kwargs: Any) -> None:
        """Sample the posterior of the program at these arguments.

        Args:
            key: Randomness.
            *args: Arguments of the program.
            **kwargs: Keyword arguments of the program.

        Raises:
            ValueError: if the program is not one prior of numbers with observed sites inside its
                plates, another latent site is discrete or decides the prior, or x_0 is on a grid
                and observed otherwise than by known entries.

        Warns:
            InferenceWarning: of chains that differ (R-hat above 1.05), or that do not move.
        """
        check_key(key)
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)  # of jax.random.PRNGKey
        keys = jax.random.split(key, 4)
        others = Others(self.program, args, kwargs)
        values = others.draw(keys[0], self.num_chains)
        first = {name: a[0] for name, a in values.items()}
        if values and decides_prior(others.fixed, first, args, kwargs):
            raise ValueError(
                f"prior must not depend on other latent sites, {sorted(values)}, whose steps would "
                "need the network. Use MCMC(NUTS(infer.forward_coordinates(program)))"
            )
        _check_kind(read(others.fixed, (first, *args), kwargs).conditioned)
        found = self._particles(keys[1], others, values)
        of = found[0].result.read
        if others.names:
            others.begin(self._kernel, keys[2], values, _picked(found, self.num_chains),
                         self.num_warmup)  # fmt: skip
        kept = self._sweeps(keys[3], of, others, values, _picked(found, self.num_chains))
        self._run = _Run(of, found, others, *_in_users_units(of, kept, others.names))
        for text in self._run.complaints:
            warnings.warn(text, InferenceWarning, stacklevel=2)

    def _particles(self, key: Array, others: "Others", values: dict) -> list[SMC]:
        """Particles, at each chain's other latent sites where there are any."""
        found, rows = [], range(self.num_chains if values else 1)
        for row, key_of in zip(rows, jax.random.split(key, len(rows)), strict=True):
            smc = SMC(others.fixed, **self._smc)
            with warnings.catch_warnings():  # moves repair what they collapsed
                warnings.simplefilter("ignore", InferenceWarning)
                given = {name: a[row] for name, a in values.items()}
                smc.run(key_of, given, *others.args, **others.kwargs)
            found.append(smc)
        return found

    def _sweeps(
        self, key: Array, of: Read, others: "Others", values: dict, x_0: np.ndarray
    ) -> Kept:
        """All sweeps that are kept, `(M, C, ...)`, NumPy."""
        key_begin, key_sweeps = jax.random.split(key)
        reverse = of.conditioned.reverse
        x = jnp.asarray(reverse.to_state(x_0), reverse.kernel.dtype)
        known = known_of(of.conditioned)
        inputs = _Inputs(of.conditioned, *known)
        given = [jnp.asarray(values[name]) for name in others.names]
        options = {"steps": self.steps, "num_leapfrog": self.num_leapfrog}
        options["others"] = others if others.names else None
        begun = of.programs(_begin, inputs, key_begin, x, given, steps=self.steps)
        state, kept = State(key_sweeps, *begun, others.state), []
        half = self.num_warmup // 2
        whole = self.num_warmup + self.num_samples
        starts = [*range(0, self.num_warmup, half), *range(self.num_warmup, whole, half)]
        with bars.bar(total=whole, desc="sweeps", disable=not self.progress) as bar:
            for low, high in itertools.pairwise([*starts, whole]):
                if low == half:
                    x = jnp.concatenate([out.x for out in kept])
                    state = of.programs(_rescaled, inputs, state, x, steps=self.steps)
                kept = [] if low in (half, self.num_warmup) else kept
                is_warm = jnp.array(low < self.num_warmup)
                state, out = of.programs(
                    _sweep, inputs, state, others.arrays, is_warm, count=high - low, **options
                )
                kept.append(out)
                if self.progress:
                    jax.block_until_ready(state.point)
                    bar.update(high - low)
        return jax.tree.map(lambda *parts: np.concatenate(parts), *kept)

    @property
    def result(self) -> "_Run":
        """What the last run left."""
        if self._run is None:
            raise ValueError("run must be called first; there are no draws yet")
        return self._run

    def get_samples(self, group_by_chain: bool = False) -> dict[str, np.ndarray]:
        """Draws of x_0, of other latent sites and of deterministic ones, by site name.

        Args:
            group_by_chain: Whether chains are an axis.

        Returns:
            Arrays `(num_chains · num_samples, *plates, *event_shape)`, chain after chain, or
            `(num_chains, num_samples, ...)`; x_0 in the user's units, float64.
        """
        check_flag(group_by_chain=group_by_chain)
        draws = self.result.draws
        return (
            draws if group_by_chain else {n: a.reshape(-1, *a.shape[2:]) for n, a in draws.items()}
        )

    def print_summary(self, limit: int = 10) -> None:
        """Print `limit` rows of ArviZ's summary, and what the chains rest on."""
        check_at_least(1, limit=limit)
        from arviz_stats import summary  # slow to import

        of = self.result
        print(f"ParticleGibbs: {self.num_chains} chains of {self.num_samples} sweeps after "
              f"{self.num_warmup}, {self.num_leapfrog} leapfrog steps a sweep")  # fmt: skip
        print(summary(self.to_datatree(), round_to=4).head(limit).to_string())
        least = of.share.mean((0, 1)).min()
        print(f"accepted: {of.share.mean():.2f} of the moves, {least:.2f} in the worst system")
        print(f"network calls of a system: {self.network_calls}, pull-backs counted")
        print("\n".join(f"warning: {text}" for text in of.complaints) or "no warnings")

    @property
    def network_calls(self) -> int:
        """Network calls for one system, each pull-back counted as one, particles included."""
        of = self.result
        reverse = of.read.conditioned.reverse.respaced(self.steps)
        levels = reverse.n - 1 + (not reverse.last_step.is_tied)
        moves = self.num_chains * (1 + self.num_leapfrog * (self.num_warmup + self.num_samples))
        systems = math.prod(of.read.conditioned.batch_shape)
        return 2 * levels * moves + sum(s.result.network_calls for s in of.particles) // systems

    def log_evidence(self, key: Array, num_samples: int = 200) -> Evidence:
        """Evidence of the program, summed over its other latent sites, by importance sampling.

        Values of theirs are drawn near the posterior that was found, and particles find the
        evidence at each: `num_samples` runs of `SMC`. Without other latent sites it is that of the
        particles the chains started from.

        Args:
            key: Randomness.
            num_samples: Values at which particles run, at least 10.

        Returns:
            log Z in nats, of all plates together, its standard error, and Pareto k of the weights.
        """
        check_key(key)
        check_at_least(10, num_samples=num_samples)
        of = self.result
        if not of.others.names:
            smc = of.particles[0]
            total, se = np.sum(smc.log_evidence), np.sqrt(np.sum(np.square(smc.log_evidence_se)))
            return Evidence(float(total), float(se), float(np.max(smc.result.health.pareto_k)))
        key_theta, key_smc = jax.random.split(key)
        values, log_w = proposals(key_theta, of.others, of.draws, num_samples)
        smc, log_z = SMC(of.others.fixed, **self._smc), []
        for i, key_of in enumerate(jax.random.split(key_smc, num_samples)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", InferenceWarning)
                given = {name: a[i] for name, a in values.items()}
                smc.run(key_of, given, *of.others.args, **of.others.kwargs)
            log_z.append(float(np.sum(smc.log_evidence)))
        return summed(log_w + np.array(log_z))

    def to_datatree(self) -> "xr.DataTree":
        """The run as an ArviZ DataTree: groups `posterior` and `sample_stats`."""
        from arviz_base import from_dict  # slow to import

        of = self.result
        names, plates = of.read.names, list(of.read.names.plates)
        stats = {"acceptance_rate": of.share, "log_r": of.log_r, "log_weight": of.log_w}
        dims = names.dims | {name: plates for name in stats}
        for name, site in of.others.sites.items():
            batch = site["fn"].batch_shape
            own = numbered(name, len(batch), np.ndim(site["value"]))
            dims[name] = plate_dims(site, name, batch) + own
        attrs = {
            "sampler": "ParticleGibbs", "num_leapfrog": self.num_leapfrog,
            "num_warmup": self.num_warmup, "network_calls": self.network_calls,
            "warnings": "\n".join(of.complaints),
        }  # fmt: skip
        groups = {"posterior": of.draws, "sample_stats": stats}
        tree = from_dict({n: group for n, group in groups.items() if group}, dims=dims)
        tree.attrs.update(attrs)
        return tree


class _Inputs(NamedTuple):
    """What is read of a program, arrays."""

    conditioned: Conditioned
    known: Array | None
    mask: Array | np.ndarray | None


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a run leaves."""

    read: Read
    particles: list[SMC]
    others: Others
    draws: dict[str, np.ndarray]  # `(C, M, ...)`
    share: np.ndarray  # accepted, `(C, M, *plates)`
    log_r: np.ndarray
    log_w: np.ndarray

    @functools.cached_property
    def complaints(self) -> tuple[str, ...]:
        """What is to be warned of."""
        from arviz_stats.base import array_stats  # slow to import

        found = []
        stuck = self.share.mean((0, 1)) < _STUCK
        if stuck.any():
            found.append(
                f"{systems(stuck)}fewer than {_STUCK:.0%} of the moves were accepted: chains stay "
                "where they started. Raise num_warmup"
            )
        if self.share.shape[0] > 1 and self.share.shape[1] >= _FEWEST:
            for name in (self.read.names.x_0, *self.others.names):
                a = self.draws[name]
                flat = a.reshape(*a.shape[:2], -1).astype(np.float64)
                with np.errstate(all="ignore"):
                    r_hat = array_stats.rhat(flat, chain_axis=0, draw_axis=1)
                worst, share = np.nanmax(r_hat, initial=1.0), np.mean(r_hat > _R_HAT)
                if share > 0.1:
                    found.append(
                        f"R-hat of {name} is up to {worst:.2f}, above {_R_HAT} for {share:.0%} of "
                        "its entries: chains differ. Raise num_samples and num_warmup; modes far "
                        "apart are the likely cause where that does not help, and more chains "
                        "with fewer sweeps, and more particles, the better choice"
                    )
        return tuple(found)


def _check_kind(conditioned: Conditioned) -> None:
    reverse = conditioned.reverse
    if reverse.kernel.is_discrete:
        raise ValueError(f"prior must be one of numbers; got symbols, {reverse.kernel}. Use SMC")
    if reverse.grid is not None and conditioned.observed:
        raise ValueError(
            f"x_0 on a grid, {reverse.last_step}, must be observed by known entries alone, for it "
            f"has no gradient; got the sites {list(conditioned.observed)}. Use SMC"
        )


def _picked(found: list[SMC], count: int) -> np.ndarray:
    """`count` draws, evenly from each run's in the order of its particles; the user's units."""
    each = [count // len(found) + (i < count % len(found)) for i in range(len(found))]
    rows = []
    for smc, size in zip(found, each, strict=True):
        outcome, index = smc.result.outcome, np.sort(smc.result.index, 0)
        places = ((np.arange(size) + 0.5) / max(size, 1) * len(index)).astype(int)
        pooled = outcome.x_0.reshape(-1, *outcome.x_0.shape[2:])
        picked = index[places]
        rows.append(np.take_along_axis(
            pooled, np.expand_dims(picked, tuple(range(picked.ndim, pooled.ndim))), 0
        ))  # fmt: skip
    return np.concatenate(rows)


# compiled


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
        at = dataclasses.replace(conditioned, arrays=[*given, *conditioned.arrays[len(given) :]])
        return at.log_r(x_0)

    return jax.vmap(one)(given, x_0).reshape(x.shape[:2])


def _density(problem: Problem, by: Coordinates, given: list[Array]) -> Any:
    def log_r(x: Array) -> Array:
        return _log_r(problem, given, x)

    return lambda path: moves.log_density(problem, by, log_r, path)


def _begin(
    inputs: _Inputs, key: Array, x_0: Array, given: list[Array], *, steps: int | None
) -> tuple[Point, Any, Coordinates, list[Array]]:
    problem = _problem(inputs, steps)
    by = coordinates(problem.draw, inputs.known, inputs.mask)
    by = by._replace(sd=jnp.broadcast_to(by.sd, (problem.systems, problem.size)))
    x_0 = x_0.reshape(len(x_0), problem.systems, *problem.reverse.event_shape)
    point = moves.at(_density(problem, by, given), path_of(key, problem.reverse, by, x_0))
    log_step, zeros = (jnp.full(problem.systems, v) for v in (math.log(_FIRST_STEP), 0.0))
    return point, (log_step, log_step, zeros, jnp.zeros(()), log_step), by, given


def _sweep(
    inputs: _Inputs, state: State, arrays: list[Array], is_warm: Array, *, count: int,
    steps: int | None, num_leapfrog: int, others: Others | None,
) -> tuple[State, Kept]:  # fmt: skip
    """`count` sweeps, and what they leave."""
    problem, by = _problem(inputs, steps), state.coordinates

    def sweep(state: State, _: None) -> tuple[State, Kept]:
        key, key_move, key_x = jax.random.split(state.key, 3)
        density = _density(problem, by, state.given)
        point = state.point if others is None else moves.at(density, state.point.path)
        log_step, log_average, *_ = state.average
        step = jnp.exp(jnp.where(is_warm, log_step, log_average))
        point, share = moves.move(key_move, density, point, step, num_leapfrog)
        average = _averaged(_TARGET - jnp.mean(share, 0), state.average)
        average = jax.tree.map(lambda a, b: jnp.where(is_warm, a, b), average, state.average)
        x = by.x(point.path.z)
        log_r = _log_r(problem, state.given, x)
        kernel, given = state.kernel, state.given
        if others is not None:
            x_0 = _shown(problem, x)
            kernel, values = jax.vmap(others.step, (0, 0, None))(kernel, x_0, arrays)
            given = [values[name] for name in others.names]
        if problem.reverse.grid is not None:
            x = _on_grid(key_x, problem, x)
        kept = Kept(x, share, log_r, point.log_density, given)
        return State(key, point, average, by, given, kernel), kept

    return jax.lax.scan(sweep, state, length=count)


def _rescaled(inputs: _Inputs, state: State, x: Array, *, steps: int | None) -> State:
    """Entries of x_0 rescaled by their spread over chains and moves, `(M, C, B, d)`."""
    problem, by = _problem(inputs, steps), state.coordinates
    sd = jnp.std(jax.vmap(by.z)(x), (0, 1))
    sd = by.sd * jnp.clip(jnp.where(sd > 0, sd, 1.0), _NARROWEST, _WIDEST)
    there = by._replace(sd=sd)
    path = state.point.path._replace(z=there.z(by.x(state.point.path.z)))
    point = moves.at(_density(problem, there, state.given), path)
    return state._replace(point=point, coordinates=there)


def _shown(problem: Problem, x: Array) -> Array:
    """x_0 as the program sees it, `(C, *plates, *event_shape)`."""
    x_0 = problem.reverse.to_data(problem.shaped(x))
    draw = problem.draw
    return x_0 if draw.known is None else jnp.where(draw.mask, draw.known, x_0)


def _on_grid(key: Array, problem: Problem, x_1: Array) -> Array:
    """A draw of x_0 given x_1, before it is put on the grid."""
    x = problem.reverse.last(problem.shaped(x_1)).sample(key)
    return problem.flat(x)


def _in_users_units(of: Read, kept: Kept, names: tuple[str, ...]) -> tuple:
    """Draws by site name and statistics, `(C, M, ...)`."""
    conditioned = of.conditioned
    reverse, plates = conditioned.reverse, conditioned.batch_shape
    x = np.swapaxes(kept.x, 0, 1)
    x = x.reshape(*x.shape[:2], *plates, *reverse.event_shape)
    relative = reverse.relative()
    x_0 = reverse.plus_loc(np.asarray(relative.to_data(jnp.asarray(x))))
    if conditioned.draw.known is not None:
        values = np.asarray(conditioned.draw.known).astype(x_0.dtype)
        x_0 = np.where(conditioned.draw.mask, values, x_0)
    given = [np.swapaxes(a, 0, 1) for a in kept.given]
    rows = [a.reshape(-1, *a.shape[2:]) for a in (x_0, *given)]
    name = of.names.x_0
    others = of.map(lambda sites: deterministics(sites, name), rows[0], given=rows[1:])
    others = {n: a.reshape(*x_0.shape[:2], *a.shape[1:]) for n, a in others.items()}
    draws = {name: x_0} | dict(zip(names, given, strict=True)) | others
    stats = (np.swapaxes(a, 0, 1) for a in (kept.share, kept.log_r, kept.log_w))
    return draws, *(a.reshape(*a.shape[:2], *plates) for a in stats)
