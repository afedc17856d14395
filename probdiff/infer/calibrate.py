"""Simulation-based calibration: does a sampler draw from the posterior it says it draws from?

Under the program itself draw x_0* ~ p, the trained diffusion, and data y ~ p(y | x_0*). Then x_0*
is one draw of p(x_0 | y), as good as any other, so among L draws of a sampler that is right, the
rank of any quantity f(x_0, y) is uniform on 0..L, and

    PIT = (#{f_l < f*} + U (1 + #{f_l = f*})) / (L + 1),    U ~ Uniform(0, 1),

is uniform on (0, 1): exactly so for L independent draws, ties or none. The quantities are

    every coordinate of x_0,  projections of x_0 on random directions,  log r(x_0) = log p(y | x_0).

The last makes it a test of conditioning. Draws of the prior, whatever y is, have uniform ranks in
all that depends on x_0 alone; but they explain y worse than x_0* does, and the rank of log r says
so.

Draws of one SMC run are exchangeable but dependent, by common ancestors and by resampling. Their
ranks are uniform up to the bias of SMC, of order 1/N, and an error of order one over the effective
number of draws: too little to see in hundreds of simulations, unless runs collapse, which ranks
rightly show as a posterior too narrow. Draws of MCMC must be thinned, by `num_draws`, until they
are nearly independent.

Sources: Talts et al. (2018); Modrák et al. (2023) for the likelihood as a quantity.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array
from numpyro import handlers
from numpyro.primitives import Messenger

from probdiff import bars
from probdiff.arguments import (
    check_at_least,
    check_callable,
    check_flag,
    check_key,
    check_object,
    plain_arrays,
)
from probdiff.compilation import call, trace
from probdiff.infer.health import InferenceWarning
from probdiff.infer.program import BLOCK, Conditioned, Program, Site, Sites, read

if TYPE_CHECKING:
    import xarray as xr

_LEVEL = 0.01  # probability that one or more of all the tests reject what is right, at most


@runtime_checkable
class _Runs(Protocol):
    """`SMC`, `Guided`, NumPyro's `MCMC`: what runs on a key and arguments and then has samples."""

    def run(self, key: Any, *args: Any, **kwargs: Any) -> Any:
        """Sample the posterior at these arguments."""

    def get_samples(self) -> dict[str, Any]:
        """Equally weighted draws by site name."""


def calibrate(
    key: Array, program: Program, sampler: _Runs | Callable, *,
    num_simulations: int = 200, num_draws: int | None = None, num_projections: int = 4,
    observed: Mapping[str, str] | None = None, progress: bool = False, **kwargs: Any,
) -> "xr.DataTree":  # fmt: skip
    """Rank x_0* among the draws of a sampler on data simulated from x_0*, many times.

        def denoise(y=None, sigma=0.5):
            numpyro.sample("y", dist.Normal(prior(), sigma).to_event(1), obs=y)

        tree = infer.calibrate(key, denoise, infer.SMC(denoise), sigma=0.3)
        plots.calibration(tree)

    A small p-value says that the sampler is wrong for this program; a large one that the
    simulations do not tell. Simulations run one after another, compiled once. Each entry of plates
    around the prior is a simulation: a program with its examples in a plate has many for the price
    of one run. x_0* comes from all T steps: a sampler of `steps=n` is tested for that, too.

    Args:
        key: Randomness.
        program: A program with one `prior()` whose observed sites take their values from
            arguments, and are drawn where these are None.
        sampler: `SMC` or `Guided` of the program, or any other with `run(key, **arguments)` and
            `get_samples()`; or a function of the same arguments that returns draws of x_0,
            `(M, *plates, *event_shape)`. Draws count equally.
        num_simulations: Number of data sets.
        num_draws: Number L of draws ranked against, evenly spread over those there are; else all.
        num_projections: Number of random directions, none where x_0 is a single number.
        observed: Argument that gives a site its value, by site name; by default that of its name.
        progress: Show a bar.
        **kwargs: All other arguments of the program, handed to the sampler as well.

    Returns:
        Group `prior_sbc`: PITs in (0, 1) of x_0, `projection` and `log_r`, with dims `chain` (one),
        `draw` (the simulations) and those of x_0, as `arviz_plots.plot_ecdf_pit(tree,
        coverage=False)` reads them. Group `uniformity`: their Kolmogorov-Smirnov p-values.
        Attributes: `sampler`, `num_simulations`, entries of plates counted, `num_draws`,
        `num_warned`, the runs that gave an `InferenceWarning`, `num_tests` m, `least_p_value`,
        `least_at`, and `bound` = 0.01/m: a least p-value below rejects the sampler.

    Raises:
        ValueError: if an argument is out of range, the program is not one prior with sites that
            can be drawn, a site has no argument, or draws have another shape or are not finite.

    Example:
        Draws of N(y/2, 1/2), which are right, and others that do not look at y:

        >>> prior = standard_diffusion(T=4).prior({})  # x_0 ~ N(0, 1)
        >>> program = lambda y=None: numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
        >>> right = lambda key, y: y / 2 + 0.5**0.5 * jax.random.normal(key, (99,))
        >>> blind = lambda key, y: jax.random.normal(key, (99,))
        >>> for sampler in (right, blind):
        ...     tree = infer.calibrate(jax.random.key(0), program, sampler, num_simulations=60)
        ...     print(tree.attrs["least_p_value"] < tree.attrs["bound"], tree.attrs["least_at"])
        False ...
        True log_r

    Source: Talts et al. (2018), algorithm 1.
    """
    check_at_least(1, num_simulations=num_simulations)
    check_at_least(0, num_projections=num_projections)
    check_at_least(1, or_none=True, num_draws=num_draws)
    check_key(key)
    check_callable("program(**arguments)", program=program)
    check_object(Mapping, "a mapping of names", or_none=True, observed=observed)
    check_flag(progress=progress)
    key_directions, key_simulations = jax.random.split(key)
    simulator = _Simulator(key_directions, program, observed, num_projections, kwargs)
    run = _runner(sampler, simulator.name)
    pits, num_warned = [], 0
    for i in bars.bar(range(num_simulations), desc="calibrate", disable=not progress):
        keys = jax.random.split(jax.random.fold_in(key_simulations, i), 3)
        x_star, data = simulator.draw(keys[0])
        draws, is_warned = _quietly(run, keys[1], simulator.kwargs | data)
        draws = _thinned(simulator.checked(draws), num_draws)
        pits.append(_pits(keys[2], simulator.quantities(data, x_star, draws)))
        num_warned += is_warned
    stacked = {name: np.concatenate([pit[name] for pit in pits]) for name in pits[0]}
    attrs = {"sampler": _name(sampler), "num_draws": len(draws), "num_warned": num_warned}
    return _tree(stacked, simulator.name, attrs)


class _Simulator:
    """A program as a law of x_0* and its data, and the quantities that are ranked."""

    def __init__(
        self, key: Array, program: Program, observed: Any, num_projections: int, kwargs: dict
    ):
        # nothing is observed under None for each argument that has no value and needs one
        parameters = inspect.signature(program).parameters.values()
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        needed = {p.name: None for p in parameters if p.kind in named and p.default is p.empty}
        self._program, self.kwargs = program, needed | plain_arrays("kwargs", kwargs)
        sites, constants = self._sites(key)
        marks = {
            n: site["infer"] for n, site in sites.items() if "prior_law" in site.get("infer", {})
        }
        priors = [name for name, mark in marks.items() if "prior" in mark]
        names = [name for name, mark in marks.items() if "data_of" in mark]
        if not len(priors) == len(names) == 1:
            raise ValueError(
                "program must call a prior made by Diffusion.prior exactly once; got "
                f"{len(priors)} calls"
            )
        (site,), (self.name,) = (sites[name] for name in priors), names
        self._reverse, self._batch_shape = site["infer"]["prior"].reverse, site["fn"].batch_shape
        self._programs = site["infer"]["programs"]
        ours = {site["name"], self.name} | constants
        self._arguments = _arguments(sites, ours, observed or {}, program)
        size = math.prod(self._reverse.event_shape)
        z = np.asarray(jax.random.normal(key, (num_projections if size > 1 else 0, size)))
        self._directions = z / np.linalg.norm(z, axis=1, keepdims=True)  # unit vectors
        self._draw = trace(self._simulate, key)

    def draw(self, key: Array) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """x_0* and the arguments that hold its data."""
        return jax.tree.map(np.asarray, self._programs(call, self._draw, key))

    def checked(self, draws: Any) -> np.ndarray:
        """Draws of a sampler, refused where they cannot be ranked."""
        draws, rest = np.asarray(draws), (*self._batch_shape, *self._reverse.event_shape)
        if draws.ndim == 0 or draws.shape[1:] != rest:
            expected = ", ".join(map(str, ("M", *rest)))
            raise ValueError(f"sampler must give draws of shape ({expected}); got {draws.shape}")
        if not np.isfinite(draws).all():
            raise ValueError("sampler must give finite draws; got some that are not")
        return draws

    def quantities(
        self, data: dict, x_star: np.ndarray, draws: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Quantities of x_0* and, behind it, of the draws, `(1 + L, entries of plates, ...)`."""
        if np.issubdtype(x_star.dtype, np.floating):
            draws = draws.astype(x_star.dtype)  # as the program holds them, or ties would be missed
        x_0 = np.concatenate([x_star[None], draws])
        conditioned = read(self._program, (), self.kwargs | data).conditioned
        values = {self.name: x_0, "log_r": np.asarray(self._programs(_log_r, conditioned, x_0))}
        if len(self._directions):
            flat = np.asarray(self._reverse.to_state(x_0)).reshape(*values["log_r"].shape, -1)
            values["projection"] = flat @ self._directions.T
        first = 1 + len(self._batch_shape)
        return {k: np.reshape(v, (len(v), -1, *v.shape[first:])) for k, v in values.items()}

    def _sites(self, key: Array) -> tuple[Sites, set[str]]:
        """All sites, and the names of those that a handler in the program gave a value."""
        constants = _Constants()
        with handlers.block(), constants:
            sites = handlers.trace(handlers.seed(self._program, key)).get_trace(**self.kwargs)
        return sites, constants.names

    def _simulate(self, key: Array) -> tuple[Array, dict]:
        sites, _ = self._sites(key)
        data = {name: sites[site]["value"] for site, name in self._arguments.items()}
        return sites[self.name]["value"], data


class _Constants(Messenger):
    """Names of latent sites that have a value before they are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def process_message(self, msg: Site) -> None:
        if msg["type"] == "sample" and msg["value"] is not None and not msg["is_observed"]:
            self.names.add(msg["name"])


def _log_r(conditioned: Conditioned, x_0: Array) -> Array:
    return jax.lax.map(conditioned.log_r, x_0, batch_size=BLOCK)


def _arguments(
    sites: Sites, ours: set[str], observed: Mapping[str, str], program: Program
) -> dict[str, str]:
    """Argument of each site that is drawn below the prior, by site name."""
    samples = {name: site for name, site in sites.items() if site["type"] == "sample"}
    for name, site in samples.items():
        if site["is_observed"]:
            raise ValueError(
                f"site {name!r} must be drawn where the arguments that hold data are None; it is "
                "observed, so data that go with a draw of the prior cannot be simulated"
            )
        if site["scale"] is not None:
            raise ValueError(
                f"site {name!r} must not be scaled, since data are drawn from the law without scale"
            )
    drawn = [name for name in samples if name not in ours]
    if not drawn:
        raise ValueError("program must hold a site to observe; got none below its prior")
    if not set(observed) <= set(drawn):
        raise ValueError(f"observed must name sites among {drawn}; got {sorted(observed)}")
    arguments = {name: observed.get(name, name) for name in drawn}
    parameters = inspect.signature(program).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, argument in arguments.items():
        if argument not in parameters and not takes_any:
            raise ValueError(
                f"site {name!r} must take its value from an argument {argument!r} of the program, "
                f"or from another that observed names; got arguments {sorted(parameters)}"
            )
    return arguments


def _runner(sampler: Any, name: str) -> Callable:
    """The sampler as a function of a key and arguments that returns draws of x_0."""
    if isinstance(sampler, type):
        raise ValueError(f"sampler must be made with its program first; got {sampler}")
    if not isinstance(sampler, _Runs):
        check_callable("sampler(key, **arguments)", sampler=sampler)
        return sampler

    def run(key: Array, **kwargs: Any) -> Any:
        sampler.run(key, **kwargs)
        return sampler.get_samples()[name]

    return run


def _quietly(run: Callable, key: Array, kwargs: dict) -> tuple[Any, bool]:
    """Draws, and whether there was an `InferenceWarning`: one of hundreds helps nobody."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InferenceWarning)
        draws = run(key, **kwargs)
    ours = [issubclass(warning.category, InferenceWarning) for warning in caught]
    for warning, is_ours in zip(caught, ours, strict=True):
        if not is_ours:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return draws, any(ours)


def _thinned(draws: np.ndarray, num_draws: int | None) -> np.ndarray:
    if num_draws is None or num_draws == len(draws):
        return draws
    if num_draws > len(draws):
        raise ValueError(
            f"num_draws must be at most the {len(draws)} draws of the sampler; got {num_draws}"
        )
    return draws[np.linspace(0, len(draws) - 1, num_draws).round().astype(int)]


def _pits(key: Array, quantities: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Randomised PIT of row 0 among the rows behind it."""
    pits = {}
    for i, (name, values) in enumerate(sorted(quantities.items())):
        if np.isnan(values).any():
            raise ValueError(f"{name} must be a number at every draw; got nan")
        pits[name] = pit(jax.random.fold_in(key, i), values[0], values[1:])
    return pits


def _tree(pits: dict[str, np.ndarray], name: str, attrs: dict) -> "xr.DataTree":
    """PITs and their p-values with named dims."""
    import xarray as xr  # slow to import

    names = {k: [f"{name}_dim_{i}" for i in range(pit.ndim - 1)] for k, pit in pits.items()}
    names |= {"projection": ["direction"]}
    p_values = {k: p_values_of(pit) for k, pit in pits.items()}
    attrs |= {"num_simulations": len(pits["log_r"])} | verdict(p_values)
    named = {k: (("chain", "draw", *names[k]), pit[None]) for k, pit in pits.items()}
    coords = {"chain": [0], "draw": np.arange(len(pits["log_r"]))}
    tree = xr.DataTree(name="probdiff")
    tree["prior_sbc"] = xr.DataTree(xr.Dataset(named, coords))
    tree["uniformity"] = xr.DataTree(xr.Dataset({k: (names[k], p) for k, p in p_values.items()}))
    tree.attrs = attrs
    return tree


def _name(sampler: Any) -> str:
    is_object = isinstance(sampler, _Runs)
    return type(sampler).__name__ if is_object else getattr(sampler, "__name__", repr(sampler))


def pit(key: Array, value: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Randomised PIT of each number among those of `others`, `(L, *shape)`."""
    below, equal = (others < value).sum(0), (others == value).sum(0)
    u = np.asarray(jax.random.uniform(key, below.shape), np.float64)
    return (below + u * (1 + equal)) / (len(others) + 1)


def p_values_of(pits: np.ndarray) -> np.ndarray:
    """p-values of uniformity over the first axis, by Kolmogorov and Smirnov."""
    from scipy import stats  # slow to import

    return np.asarray(np.apply_along_axis(lambda u: stats.kstest(u, "uniform").pvalue, 0, pits))


def verdict(p_values: dict[str, np.ndarray]) -> dict:
    """Number m of tests, least p-value and where it is, and _LEVEL/m, below which it rejects."""
    least = min(p_values, key=lambda name: p_values[name].min())
    place = np.unravel_index(p_values[least].argmin(), p_values[least].shape)
    num_tests = sum(p.size for p in p_values.values())
    at = least + (str([int(i) for i in place]) if place else "")
    found = {"num_tests": num_tests, "least_p_value": float(p_values[least].min()), "least_at": at}
    return found | {"bound": _LEVEL / num_tests}
