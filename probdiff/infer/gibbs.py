"""`ParticleGibbs`: chains whose trajectories start at particles and move as wholes.

Particles find modes and their weights, and where r is sharp they collapse onto few ancestors; moves
of whole trajectories repair what collapsed. So chains start at draws of `SMC`, taken systematically
from all its runs, and a sweep is

    x_0:T | θ    numbers: a move of Hamiltonian Monte Carlo in forward coordinates (see `moves`)
                 symbols: noise anew, and conditional SMC (see `conditional`)
    θ | x_0      five steps of a stock NumPyro kernel, θ all other latent sites; no network call

Both leave p(θ, x_0:T | y) as it is. In a program without plates the first moves numbers and θ at
once, and the second θ again. Moves of numbers do not cross between modes far apart: many chains
with few sweeps keep the weights that particles gave them; a few long ones do not.

The sweeps themselves, compiled, are in `sweeps`.

Sources: Andrieu et al. (2010), for particles within a Gibbs sampler; Lindsten et al. (2014); Neal
(2011).
"""

import dataclasses
import functools
import math
import warnings
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.infer import NUTS

from probdiff.arguments import check_at_least, check_callable, check_flag, check_key
from probdiff.infer import sweeps
from probdiff.infer.health import InferenceWarning, systems
from probdiff.infer.latents import Evidence, Others, proposals, summed
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
from probdiff.infer.sweeps import Kept
from probdiff.infer.twist import Twist

if TYPE_CHECKING:
    import xarray as xr

_STUCK = 0.1  # share of accepted moves below which chains stay where they are
_R_HAT = 1.05
_FEWEST = 20  # draws of a chain below which R-hat is mostly noise


class ParticleGibbs:
    """Draws of x_0 and of all other latent sites of a program, by chains that start at particles.

    For exact pixels, on which particles collapse, and for programs with other unknowns. A sweep
    moves each chain's trajectory, numbers by Hamiltonian Monte Carlo in forward coordinates, bits
    and classes by conditional SMC with ancestor sampling, then the other latent sites by a kernel
    of NumPyro; without plates, numbers and those sites also at once.

    Args:
        program: A program with one `prior()` or several, as in `SMC`, and observed sites below; any
            other latent sites whose laws are continuous, which no prior's context and known entries
            may depend on. Numbers on a grid may have known entries, and no other observed sites.
        num_chains: Chains C, at least 1: many where modes lie far apart, since chains stay in them.
        num_warmup: Sweeps before the first draw that is kept, at least 2.
        num_samples: Sweeps that are kept, at least 1.
        num_leapfrog: Leapfrog steps of a move of numbers, at least 1; each calls the network at all
            levels.
        num_particles: Particles of one run of the `SMC` that chains start from, and of a move of
            symbols, at least 2 for those.
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

    Sources: Andrieu et al. (2010); Lindsten et al. (2014); Neal (2011).
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
        self.num_leapfrog, self.num_particles, self.steps = num_leapfrog, num_particles, steps
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
            ValueError: if the program is not priors with observed sites inside the plates of all,
                another latent site is discrete or decides the prior, x_0 is on a grid and observed
                otherwise than by known entries, or one particle is to move symbols.

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
        conditioned = read(others.fixed, (first, *args), kwargs).conditioned
        _check_kind(conditioned, self.num_particles)
        found = self._particles(keys[1], others, values)
        of = found[0].result.read
        if others.names:
            others.begin(self._kernel, keys[2], values, _picked(found, self.num_chains),
                         self.num_warmup)  # fmt: skip
        options = sweeps.Options(
            self.num_warmup, self.num_samples, self.num_leapfrog, self.num_particles,
            found[0].result.options.twist, self.steps,
        )  # fmt: skip
        kept = sweeps.run(keys[3], of, others, values, _picked(found, self.num_chains), options,
                          progress=self.progress)  # fmt: skip
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
        (what, count), *_ = self._of_move.items()
        print(f"ParticleGibbs: {self.num_chains} chains of {self.num_samples} sweeps after "
              f"{self.num_warmup}, {what} = {count}")  # fmt: skip
        print(summary(self.to_datatree(), round_to=4).head(limit).to_string())
        least = of.share.mean((0, 1)).min()
        print(f"accepted: {of.share.mean():.2f} of the moves, {least:.2f} in the worst system")
        print(f"network calls of a system: {self.network_calls}, pull-backs counted")
        print("\n".join(f"warning: {text}" for text in of.complaints) or "no warnings")

    @property
    def _of_move(self) -> dict[str, int]:
        """What a move is made of."""
        if self.result.read.conditioned.reverse.kernel.is_discrete:
            return {"num_particles": self.num_particles}
        return {"num_leapfrog": self.num_leapfrog}

    @property
    def network_calls(self) -> int:
        """Network calls for one system, each pull-back counted as one, particles included."""
        of = self.result
        reverse, count = of.read.conditioned.reverse, self.num_warmup + self.num_samples
        reverse = reverse.respaced(self.steps)
        levels = reverse.n - 1 + (not reverse.last_step.is_tied)
        calls = 2 * (1 + self.num_leapfrog * count)
        if reverse.kernel.is_discrete:  # noise anew, and particles
            calls = 1 + (1 + self.num_particles) * count
        systems = math.prod(of.read.conditioned.batch_shape)
        particles = sum(s.result.network_calls for s in of.particles) // systems
        return levels * self.num_chains * calls + particles

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
            dims[name] = plate_dims(site["cond_indep_stack"], name, batch) + own
        attrs = {
            "sampler": "ParticleGibbs", **self._of_move, "num_warmup": self.num_warmup,
            "network_calls": self.network_calls,
            "warnings": "\n".join(of.complaints),
        }  # fmt: skip
        groups = {"posterior": of.draws, "sample_stats": stats}
        tree = from_dict({n: group for n, group in groups.items() if group}, dims=dims)
        tree.attrs.update(attrs)
        return tree


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

        found, is_discrete = [], self.read.conditioned.reverse.kernel.is_discrete
        stuck = self.share.mean((0, 1)) < _STUCK
        if stuck.any():
            found.append(
                f"{systems(stuck)}fewer than {_STUCK:.0%} of the moves were accepted: chains stay "
                f"where they started. Raise {'num_particles' if is_discrete else 'num_warmup'}"
            )
        if self.share.shape[0] > 1 and self.share.shape[1] >= _FEWEST:
            for name in (*self.read.layout.names, *self.others.names):
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


def _check_kind(conditioned: Conditioned, num_particles: int) -> None:
    reverse = conditioned.reverse
    if reverse.kernel.is_discrete:
        check_at_least(2, num_particles=num_particles)
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
    own = of.layout.names
    others = of.map(lambda sites: deterministics(sites, own), rows[0], given=rows[1:])
    others = {n: a.reshape(*x_0.shape[:2], *a.shape[1:]) for n, a in others.items()}
    draws = of.layout.split(x_0) | dict(zip(names, given, strict=True)) | others
    stats = (np.swapaxes(a, 0, 1) for a in (kept.share, kept.log_r, kept.log_w))
    return draws, *(a.reshape(*a.shape[:2], *plates) for a in stats)
