"""What a run of particles leaves: draws, weights, evidence, a summary, an ArviZ DataTree.

The runs r = 1..R are pooled, particle i of run r with weight

    W_ri = w_ri Ẑ_r / Σ_r Ẑ_r,    Σ_i w_ri = 1,

and equally weighted draws are taken by systematic resampling of the pool, with a key for each entry
of the prior's plates, then put in random order: the first few draws are as good as any others, and
draws of different entries are independent. The DataTree has groups

    posterior               equally weighted draws of all runs (chain = 1)
    sample_stats            of the same draws: log r, the particle each of them is, and
                            log_likelihood_SITE, log p(site | x_0), of sites with one value for x_0
    log_likelihood          the same of sites with more values for one x_0, value by value
    posterior_predictive    a new value of every observed site for every draw, factors left out
    observed_data           the values that were observed, and known entries as x_0_known, else nan
    runs                    draws of each run on its own (chain = run), for R-hat
    smc                     by level and run: effective number, resampling, moves; and the evidence

Leaving out one of several values changes a posterior a little, and `arviz_stats.loo` is for
`log_likelihood`. Leaving out the only one leaves the prior, which no reweighting of the posterior
gives: such values do not stand there, and their loo would be the evidence.

Dims of plates have the plates' names. Attributes say what was run and with which versions; booleans
are 0 and 1, which netCDF can hold.

Source: Del Moral et al. (2006).
"""

import itertools
import math
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from probdiff.infer.evidence import log_evidence, log_evidence_se
from probdiff.infer.health import Health, complaints, health, take_in_runs
from probdiff.infer.known import ReadoutTwist
from probdiff.infer.laplace import LaplaceTwist
from probdiff.infer.particles import Options, Outcome, entry_keys, fold, run
from probdiff.infer.program import (
    Conditioned,
    Program,
    Read,
    Site,
    Sites,
    is_factor,
    read,
)
from probdiff.infer.symbols import SymbolTwist
from probdiff.infer.twist import Twist
from probdiff.prior import PriorDraw
from probdiff.readouts import Mixture

if TYPE_CHECKING:
    import xarray as xr

_RESAMPLE = 2**31 - 1  # folded into an entry's key for its final resampling; runs have 0, 1, …
_PREDICT = 2**31 - 2  # folded into the run's key for posterior predictive draws


class Result(NamedTuple):
    """One run of a sampler."""

    read: Read
    options: Options
    key: Array
    outcome: Outcome
    index: np.ndarray  # particles, of all runs in a row, that are the draws, `(M, *plates)`
    in_runs: np.ndarray  # particles of each run that are its draws, `(R, N, *plates)`
    health: Health
    complaints: tuple[str, ...]  # what was warned of

    @property
    def draws(self) -> np.ndarray:
        """Equally weighted draws of x_0, `(M, *plates, *event_shape)`."""
        return _taken(pooled(self.outcome.x_0), self.index)

    @property
    def num_steps(self) -> int:
        """Steps that were walked."""
        return self.read.conditioned.reverse.respaced(self.options.steps).n

    @property
    def calls(self) -> int:
        """Network calls of one particle, those of all priors as one; Jacobian products count."""
        conditioned, twist = self.read.conditioned, self.options.twist
        is_known_alone = conditioned.draw.known is not None and not conditioned.observed
        size = math.prod(conditioned.reverse.event_shape)
        per_level = 1 + twist.products(size, is_known_alone=is_known_alone)
        last = 0 if conditioned.reverse.last_step.is_tied else 1
        return per_level * (self.num_steps - 1) + last

    @property
    def network_calls(self) -> int:
        """Network calls of all particles of all runs and systems."""
        return self.calls * self.outcome.log_weights.size

    @property
    def note(self) -> str:
        """A learned variance has no value for the longer steps of a shorter diffusion."""
        whole = self.read.conditioned.reverse
        shorter = whole.respaced(self.options.steps)
        is_lost = not whole.kernel.is_discrete and whole.variance is None
        if not (shorter.is_respaced and is_lost and shorter.variance is not None):
            return ""
        text = "has no learned variance, which belongs to T steps: the bridge's is used"
        return f"steps={shorter.n} {text}"


def sample(
    program: Program, options: Options, key: Array, args: tuple, kwargs: dict, *, progress: bool
) -> Result:
    """Read the program, walk the particles, resample and measure."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # of jax.random.PRNGKey
    program_read = read(program, args, kwargs)
    if options.twist is None:
        options = options._replace(twist=_usual_twist(program_read.conditioned.draw))
    try:
        outcome = run(program_read, options, key, progress=progress)
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(
            "network must not close over what the program computes or is given; make it as "
            "(apply, weights) outside, and give them by diffusion.prior(params)"
        ) from error
    log_w = pooled_log_weights(outcome, options.is_weighted)
    index, in_runs = _equally_weighted(key, outcome, log_w, options.is_weighted)
    draws = _taken(pooled(outcome.x_0), index)
    left, far = _left(program_read, draws), _far(program_read, draws)
    measured = health(outcome, log_w, index, in_runs, left, far)
    found = complaints(options, measured, _advice(program_read, options))
    return Result(program_read, options, key, outcome, index, in_runs, measured, found)


def _usual_twist(draw: PriorDraw) -> Twist:
    if draw.reverse.kernel.is_discrete:
        return SymbolTwist()
    is_mixture = isinstance(draw.reverse.readout, Mixture)
    return ReadoutTwist() if is_mixture and draw.known is not None else LaplaceTwist()


def _left(program: Read, x_0: np.ndarray) -> np.ndarray | float:
    """ᾱ_T E|x_0|² over draws, on the scale of the diffusion; 0 for symbols."""
    reverse, plates = program.conditioned.reverse, program.conditioned.batch_shape
    if reverse.kernel.is_discrete:
        return 0.0
    x = np.asarray(reverse.units.to_state(x_0))
    square = np.sum(x**2, tuple(range(1 + len(plates), x.ndim)))
    return np.asarray(np.asarray(reverse.trained.alpha_bar_t[-1]) * square.mean(0))


def _far(program: Read, x_0: np.ndarray) -> tuple[Any, Any]:
    """Root mean square of the furthest entry, in standard deviations of x_0; whether it is known.

    Of entries that hardly vary, the mean variance counts.
    """
    draw, shape = program.conditioned.draw, program.conditioned.reverse.event_shape
    if draw.reverse.kernel.is_discrete:
        return 0.0, False
    x = np.asarray(draw.reverse.units.to_state(x_0), np.float64)
    variance = np.broadcast_to(np.asarray(draw.variance), shape)
    rms = np.sqrt(np.mean(x**2, 0) / np.maximum(variance, variance.mean()))
    plates = program.conditioned.batch_shape
    rms = rms.reshape(*plates, -1)
    furthest = rms.argmax(-1)[..., None]
    known = np.broadcast_to(False if draw.mask is None else draw.mask, (*plates, *shape))
    known = known.reshape(rms.shape)
    return tuple(np.take_along_axis(a, furthest, -1)[..., 0] for a in (rms, known))


def _advice(program: Read, options: Options) -> str:
    """What to do where particles are too few for the twist."""
    is_respaced = program.conditioned.reverse.respaced(options.steps).is_respaced
    more = "num_particles or steps" if is_respaced else "num_particles"
    has_covariance = program.conditioned.draw.covariance is not None
    return options.twist.advice(more, has_covariance=has_covariance)


def pooled(a: np.ndarray) -> np.ndarray:
    """`(R, N, ...)` to `(R·N, ...)`."""
    return a.reshape(-1, *a.shape[2:])


def pooled_log_weights(outcome: Outcome, is_weighted: bool = True) -> np.ndarray:
    """Log weights of all particles, each run in proportion to its Ẑ, `(R·N, *plates)`."""
    if not is_weighted:
        shape = pooled(outcome.log_weights).shape
        return np.full(shape, -np.log(shape[0]))
    z = outcome.log_evidences
    total = log_evidence(z)
    is_there = np.isfinite(total)
    share = np.where(is_there, z - np.where(is_there, total, 0.0), 0.0)  # of Ẑ, times R
    return pooled(outcome.log_weights + share[:, None]) - np.log(len(z))


def resample(keys: Array, log_w: np.ndarray) -> np.ndarray:
    """Systematic resampling of each entry on its own, in random order: indices `(M, *plates)`."""
    size = len(log_w)
    weights = np.exp(log_w.reshape(size, -1).astype(np.float64))
    uniform = np.asarray(jax.vmap(jax.random.uniform)(fold(keys, 0)))
    order = np.asarray(jax.vmap(lambda k: jax.random.permutation(k, size))(fold(keys, 1)))
    indices = [
        np.searchsorted(np.cumsum(w), (np.arange(size) + u) / size * w.sum(), side="right")[o]
        for w, u, o in zip(weights.T, uniform, order, strict=True)
    ]
    return np.minimum(np.stack(indices, 1), size - 1).reshape(log_w.shape)


def _taken(a: np.ndarray, index: np.ndarray) -> np.ndarray:
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
    keys = fold(entry_keys(key, tuple(plates)), _RESAMPLE)
    in_runs = [resample(fold(keys, 1 + r), outcome.log_weights[r]) for r in range(runs)]
    return resample(fold(keys, 0), log_w), np.stack(in_runs)


# in words


def entry_lines(result: Result, limit: int) -> list[str]:
    """Mean, sd and quantiles of the first entries of each x_0, and how many are not shown."""
    sites = result.read.layout.split(result.draws)
    rows = {
        name + (str(list(map(int, place))) if place else ""): draws[(slice(None), *place)]
        for name, draws in sites.items() for place in list(np.ndindex(draws.shape[1:]))[:limit]
    }  # fmt: skip
    width = max(map(len, rows))
    lines = [f"{'':{width}} {'mean':>10} {'sd':>10} {'5%':>10} {'95%':>10}"]
    for name, draws in rows.items():
        of = draws.astype(np.float64)
        row = of.mean(), of.std(), *np.quantile(of, [0.05, 0.95])
        lines.append(f"{name:{width}} " + " ".join(f"{value:10.4g}" for value in row))
    for name, draws in sites.items():
        lines += _rest(draws[0].size - limit, f"entries of {name}")
    return lines


def evidence_lines(
    values: np.ndarray, low: np.ndarray, high: np.ndarray, result: Result, limit: int
) -> list[str]:
    """log Z with its interval, system by system."""
    walked = f"of the diffusion of {result.num_steps} steps"
    if values.ndim == 0:
        return [f"log evidence {walked}: {_interval(values, low, high)}"]
    lines = [f"log evidence {walked}, by {', '.join(result.read.names.plates)}:"]
    for place in list(np.ndindex(values.shape))[:limit]:
        interval = _interval(values[place], low[place], high[place])
        lines.append(f"  {list(map(int, place))} {interval}")
    return lines + _rest(values.size - limit, "systems")


def particle_lines(result: Result) -> list[str]:
    """What the draws rest on; of several systems the worst."""
    of, total = result.health, result.index.shape[0]
    worst = f" (worst of {of.ess.size} systems)" if of.ess.ndim else ""
    return [
        f"effective number{worst}: least at one level {np.min(of.least_ess):.1%} of "
        f"{result.options.num_particles}, final {np.min(of.ess):.0f} of {total}",
        f"resampled up to {np.max(of.resampled)} times; {np.min(of.distinct)} distinct draws "
        f"from {np.min(of.ancestors)} distinct ancestors",
        f"Pareto k: final {_worst(of.pareto_k)}, worst step {_worst(of.worst_pareto_k)}; "
        f"R-hat over runs {_worst(of.r_hat)}",
    ]


def cost_line(of: Result) -> str:
    """Network calls of the run."""
    return f"network calls: {of.network_calls}, {of.calls} a particle (Jacobian products included)"


def _rest(count: int, of: str) -> list[str]:
    return [f"... and {count} more {of}"] if count > 0 else []


def _interval(value: Any, low: Any, high: Any) -> str:
    inside = f"95% from {low:.4f} to {high:.4f}" if np.isfinite(low) else "no interval from one run"
    return f"{value:.4f} ({inside})" if np.isfinite(value) else f"{value}"


def _worst(values: np.ndarray) -> str:
    """Largest value that there is."""
    there = values[np.isfinite(values)]
    return f"{there.max():.3f}" if there.size else "not defined"


# for ArviZ


def datatree(result: Result, attrs: dict[str, Any]) -> "xr.DataTree":
    """All groups; see the file's docstring."""
    import xarray as xr  # slow to import
    from arviz_base import from_dict

    program, names, x_0 = result.read, result.read.names, result.draws
    draws, key = program.by_site(x_0), jax.random.fold_in(result.key, _PREDICT)
    observed, layout, outcome = program.conditioned.observed, program.layout, result.outcome
    of_runs = layout.split(take_in_runs(outcome.x_0, result.in_runs))
    of_runs["log_r"] = take_in_runs(outcome.log_r, result.in_runs)

    def likelihoods(sites: Sites) -> dict[str, Array]:
        return {name: _log_prob(sites[name]) for name in observed}

    def with_values(sites: Sites) -> Sites:
        return {name: sites[name] for name in observed if not is_factor(sites[name])}

    def predicted(sites: Sites, key: Array) -> dict[str, Array]:
        laws = {name: site["fn"] for name, site in with_values(sites).items()}
        keys = jax.random.split(key, max(1, len(laws)))
        return {name: law.sample(k) for (name, law), k in zip(laws.items(), keys, strict=False)}

    def values(sites: Sites) -> dict[str, Array]:
        def whole(site: Site) -> Array:
            shape = jnp.broadcast_shapes(jnp.shape(site["value"]), site["fn"].shape())
            return jnp.broadcast_to(site["value"], shape)

        return {name: whole(site) for name, site in with_values(sites).items()}

    predictive = program.map(predicted, x_0, jax.random.split(key, len(x_0)))
    log_p = program.map(likelihoods, x_0)
    repeated = {name: log_p.pop(name) for name in names.repeated}
    stats = _sample_stats(result) | {f"log_likelihood_{name}": a for name, a in log_p.items()}
    observations = {name: a[0] for name, a in program.map(values, x_0[:1]).items()}
    if program.conditioned.draw.known is not None:
        known = layout.split(_known(program.conditioned))
        names_known = [part.name for part in layout.parts if part.is_known]
        observations |= {f"{name}_known": known[name] for name in names_known}
    groups = {
        "posterior": _one_chain({n: a for n, a in draws.items() if isinstance(a, np.ndarray)}),
        "sample_stats": _one_chain(stats),
        "log_likelihood": _one_chain(repeated),
        "posterior_predictive": _one_chain(predictive),
        "observed_data": observations,
        "runs": of_runs,
    }
    of_stats = {f"log_likelihood_{name}": dims for name, dims in names.batch_dims.items()}
    dims_of = {"log_likelihood": names.batch_dims, "sample_stats": of_stats}
    dims_of["observed_data"] = names.dims | {f"{n}_known": names.dims[n] for n in layout.names}
    tree = xr.DataTree(name="probdiff")
    for group, data in groups.items():
        known = dims_of.get(group, names.dims)
        leading = 0 if group == "observed_data" else 2
        # the last names of dims: what is missing of a broadcast axis is missing in front
        of = {n: list(known.get(n, names.plates)) for n in data}
        dims = {n: of[n][len(of[n]) - data[n].ndim + leading :] for n in data}
        taken = sorted(set(data) & {"chain", "draw", *itertools.chain(*dims.values())})
        if taken:
            raise ValueError(
                f"{taken[0]!r} must not name a dim and a variable of group {group}, which a "
                "DataTree would lose: rename the site or the plate; get_samples holds its draws"
            )
        if data:
            tree[group] = from_dict({group: data}, dims=dims, check_conventions=False)[group]
    values_of, coords = _levels(result)
    tree["smc"] = xr.DataTree(xr.Dataset(values_of, coords))
    tree.attrs = _attrs(result) | attrs
    return tree


def _known(conditioned: Conditioned) -> np.ndarray:
    """Known entries `(*plates, *event_shape)`, nan where an entry is not known."""
    draw = conditioned.draw
    shape = (*conditioned.batch_shape, *draw.reverse.event_shape)
    known = np.where(np.asarray(draw.mask), np.asarray(draw.known, np.float64), np.nan)
    return np.broadcast_to(known, shape)


def _attrs(result: Result) -> dict[str, Any]:
    options, reverse = result.options, result.read.conditioned.reverse
    sampler = {
        "T": reverse.T, "steps": result.num_steps, "num_particles": options.num_particles,
        "num_runs": options.num_runs,
        "twist": "symbols" if reverse.kernel.is_discrete else repr(options.twist),
        "network_calls": result.network_calls, "approximate": int(not options.is_weighted),
        "note": result.note, "warnings": "\n".join(result.complaints),
    }  # fmt: skip
    libraries = ("probdiff", "jax", "numpyro")
    return sampler | {f"{library}_version": _version(library) for library in libraries}


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # run from its source
        return "unknown"


def _sample_stats(result: Result) -> dict[str, np.ndarray]:
    """Of the draws of `posterior`: log r, and the particle's weight, run and ancestor."""
    outcome, index, options = result.outcome, result.index, result.options
    return {
        "log_r": _taken(pooled(outcome.log_r), index),
        "log_weight": _taken(pooled_log_weights(outcome, options.is_weighted), index),
        "run": index // options.num_particles,
        "particle": index % options.num_particles,
        "ancestor": _taken(pooled(outcome.ancestors), index),
    }


def _levels(result: Result) -> tuple[dict[str, Any], dict[str, Any]]:
    """What happened at each level, the data's first, and what it comes to."""
    outcome, of, plates = result.outcome, result.health, result.read.names.plates
    trace, reverse = outcome.trace, result.read.conditioned.reverse
    by_level, by_run = ("level", "run", *plates), ("run", *plates)
    values = {
        "ess": (by_level, trace.ess[::-1]),
        "resampled": (by_level, trace.resampled[::-1]),
        "shift": (by_level, trace.shift[::-1]),
        "not_finite": (by_level, trace.bad[::-1]),
        "distinct_ancestors": (plates, of.ancestors),
        "distinct_draws": (plates, of.distinct),
    }
    if result.options.is_weighted:
        values |= {
            "log_evidence_by_run": (by_run, outcome.log_evidences),
            "log_evidence": (plates, log_evidence(outcome.log_evidences)),
            "log_evidence_se": (plates, log_evidence_se(outcome.log_evidences)),
            "ess_final": (plates, of.ess),
            "pareto_k": (plates, of.pareto_k), "worst_pareto_k": (plates, of.worst_pareto_k),
            "r_hat": (plates, of.r_hat),
        }  # fmt: skip
    times = np.concatenate([[0], reverse.respaced(result.options.steps).times])
    coords = {"level": np.arange(len(times)), "t": ("level", times)}
    return values, coords | {"run": np.arange(result.options.num_runs)}


def _one_chain(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: a[None] for name, a in arrays.items()}


def _log_prob(site: Site) -> Array:
    """The site's log density, value by value."""
    log_prob = site["fn"].log_prob(site["value"])
    log_prob = log_prob if site["scale"] is None else site["scale"] * log_prob
    return jnp.broadcast_to(log_prob, jnp.broadcast_shapes(log_prob.shape, site["fn"].batch_shape))
