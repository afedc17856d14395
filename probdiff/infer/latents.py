"""Latent sites besides x_0: a program with them fixed, moved by a stock kernel, and summed over.

Given the other latent sites θ a program is one that `SMC` takes; given x_0 it asks no network, and
any kernel of NumPyro moves θ. The evidence of the whole sums over both,

    Z = ∫ p(θ) Z(θ) dθ ≈ (1/M) Σ_m p(θ_m) Ẑ(θ_m) / q(θ_m),    θ_m ~ q,

unbiased, as Ẑ(θ), the evidence that particles find at θ, is unbiased for Z(θ). q is a Student-t
about draws of the posterior, in unconstrained coordinates; Pareto k of the weights says whether its
tails are wide enough.

Sources: Andrieu and Roberts (2009), for Ẑ in the place of Z; Tran et al. (2013), importance
sampling with it.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.mcmc import MCMCKernel
from numpyro.primitives import Messenger

from probdiff.infer.evidence import log_evidence, log_evidence_se
from probdiff.infer.health import pareto_k
from probdiff.infer.program import Program, Site, latents

_STEPS = 5  # of the kernel in a sweep: they ask no network
_FREEDOM = 5.0  # degrees of freedom of the proposal
_WIDER = 1.2  # its scale over that of the draws


class Evidence(NamedTuple):
    """Evidence of a program with other latent sites than x_0."""

    log_evidence: float
    """log Z, nats; of all plates together."""
    se: float
    """Its standard error over the draws of θ."""
    pareto_k: float
    """Of the weights: above 0.7 the error is not known."""


class Others:
    """The latent sites besides x_0: a program with them fixed, and one of them given x_0."""

    def __init__(self, program: Program, args: tuple, kwargs: dict):
        self.program, self.args, self.kwargs = program, args, kwargs
        self.sites, self.outer, self.data, self.layout = latents(program, args, kwargs)
        self.names = tuple(sorted(self.sites))
        _check(self.sites)
        self._check_outer()
        self.kernel: MCMCKernel | None = None
        self.state: Any = None
        leaves, self.tree = jax.tree.flatten((args, kwargs))
        self.is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        self.leaves = [
            None if is_a else leaf for is_a, leaf in zip(self.is_array, leaves, strict=True)
        ]
        self.arrays = [jnp.asarray(a) for a in itertools.compress(leaves, self.is_array)]

    def fixed(self, values: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The program where the other latent sites have values.

        Those inside the plates of the prior may hang on x_0, and count as observed; those outside
        are constants.
        """
        inner = {name: value for name, value in values.items() if name not in self.outer}
        outer = {name: value for name, value in values.items() if name in self.outer}
        program = handlers.condition(self.program, data=inner) if inner else self.program
        return handlers.substitute(program, data=outer)(*args, **kwargs)

    def given(self, x_0: Any, *args: Any, **kwargs: Any) -> Any:
        """The program where x_0 is one."""
        with _Given(self.layout.split(x_0)):
            return self.program(*args, **kwargs)

    def draw(self, key: Array, count: int) -> dict[str, Array]:
        """Draws of them from their priors, `(count, ...)`."""
        if not self.names:
            return {}
        of_key = (
            latents(self.program, self.args, self.kwargs, k)[0]
            for k in jax.random.split(key, count)
        )
        rows = [{name: site["value"] for name, site in sites.items()} for sites in of_key]
        return jax.tree.map(lambda *values: jnp.stack(values), *rows)

    def begin(self, make: Any, key: Array, values: dict, x_0: np.ndarray, num_warmup: int) -> None:
        """Start the kernel of every chain; `num_warmup` counts sweeps."""
        self.kernel = make(self.given)
        start = {n: self.to_value(n).inv(values[n]) for n in self.names}

        def one(key: Array, start: dict, x_0: Array) -> Any:
            given = (x_0, *self.args), self.kwargs
            return self.kernel.init(key, _STEPS * num_warmup, start, *given)

        keys = jax.random.split(key, len(x_0))
        self.state = jax.vmap(one)(keys, start, jnp.asarray(x_0))

    def to_value(self, name: str) -> Any:
        """From unconstrained numbers to a site's values."""
        return biject_to(self.sites[name]["fn"].support)

    def log_outer(self, values: dict[str, Any], x_0: dict[str, Array] | None = None) -> Array:
        """log p of the sites outside the plates of the priors, which must not hang on x_0."""
        fixed = handlers.substitute(handlers.seed(self.program, jax.random.key(0)), data=values)
        with handlers.block(), _Given(x_0):
            sites = handlers.trace(fixed).get_trace(*self.args, **self.kwargs)
        scaled = [(sites[name], sites[name]["scale"]) for name in sorted(self.outer)]
        terms = (s["fn"].log_prob(s["value"]) * (1 if a is None else a) for s, a in scaled)
        return sum(map(jnp.sum, terms), jnp.zeros(()))

    def _check_outer(self) -> None:
        """Refuse a site outside the plates of the prior whose law moves with x_0."""
        values = {name: self.sites[name]["value"] for name in self.outer}
        if not values:
            return
        for row in range(2):
            moved = {name: _tried(site)[row] for name, site in self.data.items()}
            there, here = self.log_outer(values, moved), self.log_outer(values)
            if abs(float(there - here)) > 1e-4 * (1 + abs(float(here))):
                raise ValueError(
                    f"latent sites {sorted(self.outer)} outside the plates of the prior must not "
                    "hang on x_0, since each entry of the plates is a posterior of its own. Take "
                    "the prior out of the plates, or use NUTS(infer.forward_coordinates(program))"
                )

    def log_density(self, z: Any, x_0: Array, arrays: list[Array]) -> Array:
        """log p(θ, y | x_0) of unconstrained θ, with the volume of its transform."""
        args, kwargs = self._placed(x_0, arrays)
        return -self.kernel._potential_fn_gen(*args, **kwargs)(z)

    def values(self, z: Any, x_0: Array, arrays: list[Array]) -> dict[str, Array]:
        """What the sites' values are where their unconstrained ones are z."""
        args, kwargs = self._placed(x_0, arrays)
        sites = self.kernel.postprocess_fn(args, kwargs)(z)
        return {name: sites[name] for name in self.names}

    def step(self, state: Any, x_0: Array, arrays: list[Array]) -> tuple[Any, dict[str, Array]]:
        """A few steps of one chain at its x_0, and the values it comes to."""
        args, kwargs = self._placed(x_0, arrays)
        potential = self.kernel._potential_fn_gen(*args, **kwargs)
        energy, gradient = jax.value_and_grad(potential)(state.z)
        state = state._replace(potential_energy=energy, z_grad=gradient)
        state = jax.lax.fori_loop(
            0, _STEPS, lambda _, state: self.kernel.sample(state, args, kwargs), state
        )
        return state, self.values(state.z, x_0, arrays)

    def _placed(self, x_0: Array, arrays: list[Array]) -> tuple[tuple, dict]:
        """Arguments of `given`."""
        values = iter(arrays)
        pairs = zip(self.is_array, self.leaves, strict=True)
        leaves = [next(values) if is_array else leaf for is_array, leaf in pairs]
        args, kwargs = jax.tree.unflatten(self.tree, leaves)
        return (x_0, *args), kwargs


class _Given(Messenger):
    """Puts x_0 in the place of a prior, whose sites then do not count."""

    def __init__(self, x_0: dict[str, Any] | None):
        super().__init__()
        self.x_0 = x_0

    def process_message(self, msg: Site) -> None:
        """Give the prior's sites values that nothing outside sees."""
        infer = msg.get("infer", {})
        if "prior_law" not in infer:
            return
        msg["stop"] = True
        if "prior" in infer:
            msg["value"] = jnp.zeros(msg["fn"].shape(), infer["prior"].reverse.kernel.dtype)
        elif "data_of" in infer:
            zeros = jnp.zeros(msg["fn"].shape(), infer["data_of"].reverse.kernel.dtype)
            msg["value"] = zeros if self.x_0 is None else self.x_0[msg["name"]]


def _tried(site: Site) -> list[Array]:
    """Two values of an x_0, to see what moves with it."""
    zeros, kernel = site["value"], site["infer"]["data_of"].reverse.kernel
    pattern = 1 + jnp.arange(zeros.size).reshape(zeros.shape) % 3
    tries = [1.0 * pattern, -0.7 * pattern]
    if kernel.is_discrete:
        tries = [(pattern + k) % kernel.num_data_states for k in (0, 1)]
    return [x_0.astype(zeros.dtype) for x_0 in tries]


def proposals(
    key: Array, others: Others, draws: dict[str, np.ndarray], count: int
) -> tuple[dict[str, Array], np.ndarray]:
    """`count` draws of θ from a Student-t about given draws, and log p(θ) − log q(θ) of each.

    p(θ) is that of the sites outside the plates of the prior; the others count in Ẑ.
    """
    maps = {name: others.to_value(name) for name in others.names}
    rows = {n: maps[n].inv(jnp.asarray(draws[n]).reshape(-1, *draws[n].shape[2:])) for n in maps}
    flat = np.asarray(jax.vmap(lambda row: ravel_pytree(row)[0])(rows), np.float64)
    _, back = ravel_pytree(jax.tree.map(lambda a: a[0], rows))
    from scipy import stats  # slow to import

    mean, d = flat.mean(0), flat.shape[1]
    covariance = np.atleast_2d(np.cov(flat.T)) * _WIDER**2
    root = np.linalg.cholesky(covariance + 1e-9 * np.trace(covariance) / d * np.eye(d))
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    z = rng.standard_normal((count, d)) / np.sqrt(rng.chisquare(_FREEDOM, (count, 1)) / _FREEDOM)
    log_q = stats.multivariate_t.logpdf(z, np.zeros(d), np.eye(d), df=_FREEDOM)
    log_q = np.reshape(log_q, count) - np.log(np.diag(root)).sum()

    def one(u: Array) -> tuple[dict[str, Array], Array]:
        free = back(u)
        values = {name: maps[name](free[name]) for name in maps}
        log_volume = sum(jnp.sum(maps[n].log_abs_det_jacobian(free[n], values[n])) for n in maps)
        return values, others.log_outer(values) + log_volume

    values, log_p = jax.vmap(one)(jnp.asarray(mean + z @ root.T))
    return values, np.asarray(log_p, np.float64) - log_q


def summed(log_weights: np.ndarray) -> Evidence:
    """From log of p(θ) Ẑ(θ)/q(θ)."""
    found = (of(log_weights) for of in (log_evidence, log_evidence_se, pareto_k))
    return Evidence(*map(float, found))


def _check(sites: dict[str, Site]) -> None:
    for name, site in sites.items():
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"latent site {name!r} must be continuous, to be moved by its gradient; got "
                f"{type(site['fn']).__name__}. Sum over it in the program, or compare "
                "log_evidence of SMC at each of its values"
            )
