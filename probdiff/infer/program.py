"""From a program to r: the joint log density of what is observed, as a function of x_0.

Any NumPyro program with one `prior()` and observed sites below it conditions the prior on

    r(x_0) = ∏ p(observed site | x_0),

which counts likelihoods, `numpyro.factor`, masks and scales. The plates that enclose `prior()`
split the program into systems, independent posteriors side by side; log r has one value per system.
So an observed site must lie inside those plates, and no other latent site may be there.

Source: Sohl-Dickstein et al. (2015), section 2.5.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro import handlers

from probdiff.prior import PriorDraw

Program = Callable[..., Any]


class Conditioned(NamedTuple):
    """A program with its arguments, read as a prior and a likelihood."""

    draw: PriorDraw
    """The prior."""
    batch_shape: tuple[int, ...]
    """Shape of the plates around it, as the prior's site has it: one system each."""
    observed: tuple[str, ...]
    """Names of the observed sites, factors among them."""
    sites_at: Callable[[Any], dict[str, Any]]
    """All sites of the program at an x_0 of shape `(*batch_shape, *event_shape)`, user's units."""

    @property
    def name(self) -> str:
        """Name of the site of x_0."""
        return self.draw.diffusion.name

    def log_r(self, x_0: Any) -> Float[Array, "..."]:
        """log r(x_0), one value for each system."""
        return sum(self.log_likelihoods(x_0).values(), jnp.zeros(self.batch_shape))

    def log_likelihoods(self, x_0: Any) -> dict[str, Float[Array, "..."]]:
        """log p(site | x_0) of every observed site, one value for each system."""
        sites = self.sites_at(x_0)
        return {name: _per_system(sites[name], self.batch_shape) for name in self.observed}

    def deterministics(self, x_0: Any) -> dict[str, Any]:
        """Values of the program's own deterministic sites."""
        return {
            name: site["value"]
            for name, site in self.sites_at(x_0).items()
            if site["type"] == "deterministic" and name != self.name
        }


def condition(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Conditioned:
    """Read a program as prior and likelihood.

    Raises:
        ValueError: if it holds no prior or two, another latent site, an unbound parameter, an
            observed site outside the plates of the prior, or a `Delta` likelihood.
    """
    sites = _trace(program, args, kwargs)
    priors = {n: s for n, s in sites.items() if "prior" in s.get("infer", {})}
    if len(priors) != 1:
        raise ValueError(
            "program must call a prior made by Diffusion.prior exactly once; got "
            f"{len(priors)} calls {sorted(priors)}"
        )
    ((name, site),) = priors.items()
    draw = site["infer"]["prior"]
    x_name = draw.diffusion.name
    drawn = x_name if draw.known is None else f"{x_name}_free"
    factor = f"{x_name}_known"
    plates = {frame.name for frame in site["cond_indep_stack"]}
    _check_plates(site)
    _check_latents(sites, {name, drawn})
    observed = tuple(
        n for n, s in sites.items() if s["type"] == "sample" and s["is_observed"] and n != factor
    )
    for observation in observed:
        _check_observed(sites[observation], plates, x_name)

    shape = site["fn"].shape()
    data = {name: jnp.zeros(shape, draw.diffusion.kernel.dtype)}

    def sites_at(x_0: Any) -> dict[str, Any]:
        values = data | {drawn: x_0}
        run = handlers.substitute(handlers.seed(program, jax.random.key(0)), data=values)
        with handlers.block():
            return handlers.trace(run).get_trace(*args, **kwargs)

    return Conditioned(draw, site["fn"].batch_shape, observed, sites_at)


def _trace(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        with handlers.block():
            seeded = handlers.seed(program, jax.random.key(0))
            return handlers.trace(seeded).get_trace(*args, **kwargs)
    except (TypeError, ValueError) as error:
        error.add_note(
            "raised in the program. If shapes do not fit: a site's batch must be the plates around "
            "it, and axes within one observation are declared by .to_event"
        )
        raise


def _check_plates(site: dict[str, Any]) -> None:
    for frame in site["cond_indep_stack"]:
        if site["fn"].batch_shape[frame.dim] != frame.size:
            raise ValueError(
                f"plate {frame.name!r} around the prior must have the size of the prior's batch; "
                f"got {frame.size} and {site['fn'].batch_shape}"
            )
    if site["scale"] is not None:
        name = site["infer"]["prior"].diffusion.name
        raise ValueError(
            f"prior {name!r} must not be scaled: a subsampling plate or a handler changes the "
            "prior's weight, which a posterior cannot have. Scale the observed sites"
        )


def _check_latents(sites: dict[str, Any], ours: set[str]) -> None:
    params = [n for n, s in sites.items() if s["type"] == "param"]
    if params:
        raise ValueError(
            f"param {params[0]!r} is unbound in the program, which would take its initial value. "
            "Give it a value by numpyro.handlers.substitute(program, data=params)"
        )
    for name, site in sites.items():
        if site["type"] == "sample" and not site["is_observed"] and name not in ours:
            raise ValueError(
                f"latent site {name!r} must have a value: only x_0 is inferred here. Give it one "
                "by numpyro.handlers.condition, or infer it along by MCMC(NUTS(noncentered(...)))"
            )


def _check_observed(site: dict[str, Any], plates: set[str], prior: str) -> None:
    name = site["name"]
    if isinstance(unwrapped(site["fn"]), dist.Delta):
        raise ValueError(
            f"observed site {name!r} must have a density; got a Delta, which no draw of x_0 meets. "
            "Condition exactly by prior(known=values, mask=mask)"
        )
    missing = plates - {frame.name for frame in site["cond_indep_stack"]}
    if missing:
        raise ValueError(
            f"observed site {name!r} must lie inside the plates of the prior {prior!r}, since each "
            f"of their entries is a posterior of its own; it is outside {sorted(missing)}. Move it "
            "inside, or take the prior out of the plate"
        )
    if not _is_factor(site):
        _check_rows(site, prior)


def _check_rows(site: dict[str, Any], prior: str) -> None:
    """A batch without a plate would be taken for repeated measurements of one x_0."""
    law, shape = site["fn"], jnp.shape(site["value"])
    first = len(shape) - law.event_dim
    try:
        batch = jnp.broadcast_shapes(law.batch_shape, shape[:first])
    except ValueError:
        batch = None
    if batch is None or shape[first:] != law.event_shape:
        raise ValueError(
            f"observed site {site['name']!r} must have values of shape {law.shape()}, as its law "
            f"has; got {shape}"
        )
    plates = {frame.dim for frame in site["cond_indep_stack"]}
    for dim, size in zip(range(-len(batch), 0), batch, strict=True):
        if size > 1 and dim not in plates:
            raise ValueError(
                f"observed site {site['name']!r} must lie in a plate of size {size}, of which it "
                f"has a batch of shape {batch}. If each entry has an {prior} of its own, put prior "
                f"and site into numpyro.plate(name, {size}); if all measure one {prior}, the site "
                "alone; if they are the numbers of one observation, add .to_event"
            )


def unwrapped(law: dist.Distribution) -> dist.Distribution:
    wrappers = dist.ExpandedDistribution, dist.Independent, dist.MaskedDistribution
    while isinstance(law, wrappers):
        law = law.base_dist
    return law


def _per_system(site: dict[str, Any], batch_shape: tuple[int, ...]) -> Float[Array, "..."]:
    """The site's log density, summed over all but the systems' axes."""
    log_prob = site["fn"].log_prob(site["value"])
    if site["scale"] is not None:
        log_prob *= site["scale"]
    log_prob = jnp.broadcast_to(log_prob, jnp.broadcast_shapes(jnp.shape(log_prob), batch_shape))
    extra = log_prob.ndim - len(batch_shape)
    log_prob = jnp.sum(log_prob, axis=tuple(range(extra)))
    ones = tuple(i for i, size in enumerate(batch_shape) if size == 1)
    return jnp.sum(log_prob, axis=ones, keepdims=True)


def predictive(conditioned: Conditioned, key: Array, x_0: Any) -> dict[str, Any]:
    """One draw of every observed site given x_0, factors left out."""
    sites = conditioned.sites_at(x_0)
    laws = {n: sites[n]["fn"] for n in conditioned.observed if not _is_factor(sites[n])}
    keys = jax.random.split(key, max(1, len(laws)))
    return {name: law.sample(k) for (name, law), k in zip(laws.items(), keys, strict=False)}


def observed_data(conditioned: Conditioned, x_0: Any) -> dict[str, Any]:
    """Values of the observed sites, factors left out."""
    sites = conditioned.sites_at(x_0)
    return {n: sites[n]["value"] for n in conditioned.observed if not _is_factor(sites[n])}


def _is_factor(site: dict[str, Any]) -> bool:
    return isinstance(unwrapped(site["fn"]), dist.Unit)


def systems_are_coupled(conditioned: Conditioned, x_0: Any, other: Any) -> Array:
    """Whether log r of a system moves when only the first system goes from `x_0` to `other`."""
    batch_shape = conditioned.batch_shape
    is_first = jnp.zeros(batch_shape, bool).at[(0,) * len(batch_shape)].set(True)
    event_dim = jnp.ndim(x_0) - len(batch_shape)
    moved = jnp.where(jnp.expand_dims(is_first, range(-event_dim, 0)), other, x_0)
    before, after = conditioned.log_r(x_0), conditioned.log_r(moved)
    differ = jnp.abs(before - after) > 1e-4 * (1 + jnp.abs(before))
    return jnp.any(~is_first & differ)
