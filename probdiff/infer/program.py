"""From a program to r: the joint log density of what is observed, as a function of x_0.

Any NumPyro program with `prior()` and observed sites below it conditions the prior on

    r(x_0) = ∏ p(observed site | x_0),

which counts likelihoods, `numpyro.factor`, masks and scales. Several priors are read as their
product, whose x_0 is all of theirs (see `product`). The plates that enclose every `prior()` split
the program into systems, independent posteriors side by side; log r has one value per system. So an
observed site must lie inside those plates, and no other latent site may be there. One that a
handler gives a value is none: by `condition` it is observed, and its log density counts in the
evidence like any other; by `substitute` it is a constant, which does not count. `do` on x_0 leaves
its draws to the prior. All else that handlers do to the prior is refused.

A program is read anew at every run: to find the priors and check the sites, to see that it says the
same again, and to trace r. Its array arguments are arguments of r; the closures and globals that it
reads are part of what was traced (see `compilation`), so that nothing is stale. It must not draw by
itself (`numpyro.prng_key`, NumPy, a subsampling plate): one draw would stand for all.

Source: Sohl-Dickstein et al. (2015), section 2.5, eqs. 16 to 18.
"""

import dataclasses
import functools
import itertools
import math
import pickle
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.extend import core
from jaxtyping import Array, Bool, Float
from numpyro import handlers
from numpyro.primitives import _PYRO_STACK, Messenger

from probdiff.arguments import plain, plain_arrays
from probdiff.compilation import Programs, Traced, is_equal, trace
from probdiff.infer.product import Layout, layout, shared_frames
from probdiff.prior import PriorDraw
from probdiff.reverse import Reverse
from probdiff.trajectories import TRAJECTORY_SUFFIX

Program = Callable[..., Any]
Site = dict[str, Any]
Sites = dict[str, Site]

_TAKEN = {"chain", "draw", "level", "run"}
"""Names of dims that a plate may not have: it becomes `name_plate`."""
_ARRAYS = jax.Array | np.ndarray | np.floating
_WANTS_NUMBERS = (
    jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError, jax.errors.NonConcreteBooleanIndexError,
)  # fmt: skip
BLOCK = 256  # draws at which sites of a program are computed at once


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["draw", "likelihood", "arrays"],
    meta_fields=["batch_shape", "observed"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Conditioned:
    """A prior and a likelihood: what a compiled sampler is given of a program."""

    draw: PriorDraw  # the prior
    likelihood: Traced  # log p(site | x_0) of the observed sites, from the arrays and x_0
    arrays: list[Array]  # the program's array arguments
    batch_shape: tuple[int, ...]  # shape of the plates around the prior: one system each
    observed: tuple[str, ...]  # names of the observed sites, factors among them

    @property
    def reverse(self) -> Reverse:
        """The prior's reverse process."""
        return self.draw.reverse

    def log_elements(self, x_0: Array) -> dict[str, Float[Array, "*plates _"]]:
        """log p(site | x_0) of every observed site, for each system the elements of its sum."""
        return self.likelihood(self.arrays, x_0)

    def log_likelihoods(self, x_0: Array) -> dict[str, Float[Array, "*plates"]]:
        """log p(site | x_0) of every observed site, one value for each system."""
        return {name: jnp.sum(v, -1) for name, v in self.log_elements(x_0).items()}

    def log_r(self, x_0: Array) -> Float[Array, "*plates"]:
        """log r(x_0) in the user's units, x_0 `(*plates, *event_shape)`."""
        return sum(self.log_likelihoods(x_0).values(), jnp.zeros(self.batch_shape))


class Names(NamedTuple):
    """Names of what a sampler returns: axes have those of the program's plates, as in ArviZ."""

    plates: tuple[str, ...]  # plates around all priors
    dims: dict[str, list[str]]  # dims of each site's value
    batch_dims: dict[str, list[str]]  # dims of each observed site's log density
    repeated: list[str]  # observed sites with several values for one x_0, in plates of their own


class Read(NamedTuple):
    """A program at its arguments, as it was read."""

    program: Program
    rebuild: Callable  # positional and keyword arguments, of their arrays
    conditioned: Conditioned
    layout: Layout  # where the priors stand in x_0
    names: Names
    programs: Programs  # where what is compiled is kept

    def by_site(self, x_0: np.ndarray) -> dict[str, np.ndarray]:
        """x_0 `(M, *plates, *event_shape)` and the program's deterministic sites at it, by name."""
        names = self.layout.names
        return self.layout.split(x_0) | self.map(lambda sites: deterministics(sites, names), x_0)

    def map(
        self, function: Callable[..., Any], x_0: Any, *rows: Any, given: list[Any] | None = None
    ) -> Any:
        """`function(sites, *row)` for every draw of x_0, `(M, *plates, *event_shape)`; NumPy.

        `given` are draws `(M, ...)` of what the first array arguments are to be.
        """
        x_0, arrays = jnp.asarray(x_0), self.conditioned.arrays
        given = list(map(jnp.asarray, given or []))

        def at(arrays: list[Array], x_0: Array, given: list[Array], *row: Any) -> Any:
            arrays = [*given, *arrays[len(given) :]]
            sites, _ = _sites(self.program, *self.rebuild(arrays), self.layout.split(x_0))
            return function(sites, *row)

        first = jax.tree.map(lambda a: a[0], (x_0, given, *rows))
        traced = trace(at, arrays, *first)
        out = self.programs(_map, traced, arrays, (x_0, given, *rows))
        return jax.tree.map(np.asarray, out)


def _map(traced: Traced, arrays: list[Array], rows: tuple) -> Any:
    return jax.lax.map(lambda row: traced(arrays, *row), rows, batch_size=BLOCK)


class _Look(NamedTuple):
    """What one reading of a program finds."""

    traced: Traced  # leaves of the priors' draws that are computed, and what is said at x_0 = 0
    leaves: list[Any]  # all of them, None for a computed one: weights stay where they are
    tree: Any
    is_computed: list[bool]
    known_at: list[int | None]  # which of the arguments are known values, as they were given
    layout: Layout
    observed: tuple[str, ...]
    names: Names
    programs: Programs


def read(program: Program, args: tuple, kwargs: dict) -> Read:
    """Read a program as prior and likelihood.

    Raises:
        ValueError: if it holds no prior, one that a handler or a subsampling plate changes, several
            that differ in kernel, readout, last step or rates, another latent site, an unbound
            parameter, an observed site outside the plates of all priors, a `Delta` likelihood, or
            draws of its own; if it hands x_0 to NumPy or decides by it in Python; if it is read
            inside a handler.
    """
    _check_outside()
    for family in (_ARRAYS | float, _ARRAYS):  # it may decide by a float
        try:
            return _read(program, args, kwargs, family)
        except _WANTS_NUMBERS as error:
            wants = error
    raise ValueError(
        "program must use x_0, and arguments that are arrays, by JAX alone: they have no value "
        "while it is read. Write jnp.exp(x) for np.exp(x), jnp.where(x > 0, a, b) for "
        "`a if x > 0 else b`, jnp.sum(x, where=x > 0) for x[x > 0].sum(), and pass numbers that "
        f"decide what it does as int, float or bool; got {_place_in(wants)}"
    ) from wants


def _place_in(error: Exception) -> str:
    """Where an error came from outside of libraries: the line that wants a value."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not {"site-packages", "probdiff"} & set(Path(f.filename).parts)]
    frame = (own or frames)[-1]
    return f"{type(error).__name__} in {frame.name}, line {frame.lineno}: {frame.line}"


def _read(program: Program, args: tuple, kwargs: dict, family: Any) -> Read:
    """The same, its arguments of a family being arrays."""
    leaves, tree = jax.tree.flatten(plain_arrays("argument ", (args, kwargs)))
    is_array = [isinstance(leaf, family) for leaf in leaves]
    given = list(itertools.compress(leaves, is_array))

    def rebuild(arrays: list[Array]) -> tuple[tuple, dict]:
        values, both = iter(arrays), zip(leaves, is_array, strict=True)
        return jax.tree.unflatten(tree, [next(values) if a else leaf for leaf, a in both])

    arrays = list(map(jnp.asarray, given))
    look = _look(program, arrays, rebuild)
    _check_repeats(look, lambda: _look(program, arrays, rebuild))
    computed = look.programs(_computed, look.traced, arrays) if any(look.is_computed) else []
    values, both = iter(computed), zip(look.leaves, look.is_computed, strict=True)
    draws = jax.tree.unflatten(look.tree, [next(values) if c else leaf for leaf, c in both])
    draws = [  # known values as they were given, in NumPy's float64 where they were
        draw if at is None else dataclasses.replace(draw, known=plain("known", given[at]))
        for draw, at in zip(draws, look.known_at, strict=True)
    ]
    draw, plates = look.layout.product(draws), look.layout.plates

    def likelihood(arrays: list[Array], x_0: Array) -> dict[str, Array]:
        sites, _ = _sites(program, *rebuild(arrays), look.layout.split(x_0))
        return {name: _elements(sites[name], plates) for name in look.observed}

    shape = (*plates, *draw.reverse.event_shape)
    x_0 = jax.ShapeDtypeStruct(shape, draw.reverse.kernel.dtype)
    traced = trace(likelihood, arrays, x_0)
    conditioned = Conditioned(draw, traced, arrays, plates, look.observed)
    return Read(program, rebuild, conditioned, look.layout, look.names, look.programs)


def _look(program: Program, arrays: list[Array], rebuild: Callable) -> _Look:
    found: dict[str, Any] = {}

    def look(arrays: list[Array]) -> tuple[list[Array], dict[str, Array]]:
        sites, place = _sites(program, *rebuild(arrays), None)
        priors, names = _priors(sites, place)
        draws, found_at = [site["infer"]["prior"] for site in priors], layout(priors, names)
        observed = _observed(sites, priors, names)
        leaves, tree = jax.tree.flatten(draws)
        is_computed = [isinstance(leaf, jax.core.Tracer) for leaf in leaves]
        both = zip(leaves, is_computed, strict=True)
        at = {id(array): i for i, array in reversed(list(enumerate(arrays)))}
        found.update(
            known_at=[at.get(id(draw.known)) for draw in draws],
            leaves=[None if c else leaf for leaf, c in both], tree=tree, is_computed=is_computed,
            layout=found_at, observed=observed, programs=priors[0]["infer"]["programs"],
            names=_names(sites, priors, found_at, observed),
        )  # fmt: skip
        said = {name: _elements(sites[name], found_at.plates) for name in observed}
        return list(itertools.compress(leaves, is_computed)), said | deterministics(sites, names)

    return _Look(trace(look, arrays), **found)


def _computed(traced: Traced, arrays: list[Array]) -> list[Array]:
    return traced(arrays)[0]


def _check_outside() -> None:
    """Refuse handlers around the run, which a program that is read by itself does not see."""
    kinds = (
        handlers.condition, handlers.do, handlers.lift, handlers.mask, handlers.reparam,
        handlers.replay, handlers.scale, handlers.substitute, numpyro.plate,
    )  # fmt: skip
    hidden = itertools.takewhile(lambda h: not isinstance(h, handlers.block), _PYRO_STACK[::-1])
    names = [type(handler).__name__ for handler in hidden if isinstance(handler, kinds)]
    if names:
        raise ValueError(
            f"{names[0]} must be put around the program, not around the run, where it has no "
            "effect: SMC(handlers.condition(program, data))"
        )


def _check_repeats(look: _Look, again: Callable[[], _Look]) -> None:
    """Refuse a program that says something else each time; it may keep what its first call made."""
    before = pickle.dumps(np.random.get_state())
    second = again()
    has_drawn = pickle.dumps(np.random.get_state()) != before
    if has_drawn or (not _is_same(look, second) and not _is_same(second, again())):
        raise ValueError(
            "program must say the same each time it is read, since one reading stands for all "
            "draws; got another at the second: it draws by NumPy or Python, reads the time or "
            "uses up an iterator. Make such values before and pass them as arguments, or draw them "
            "by numpyro.sample"
        )


def _is_same(look: _Look, other: _Look) -> bool:
    is_alike = len(look.leaves) == len(other.leaves) and look.traced.is_same(other.traced)
    return is_alike and all(map(is_equal, look.leaves, other.leaves))


class _Place(Messenger):
    """Gives priors their x_0 from outside, where their trajectories would be drawn.

    It stands outside the program, so that all its handlers have done what they do, and refuses what
    they change of a prior, and what has no value.
    """

    def __init__(self, x_0: dict[str, Any] | None, latents: dict[str, Site] | None = None):
        super().__init__()
        self.x_0, self.refusal = x_0, None
        self.latents = latents  # where other latent sites are put, which are refused for None
        self.priors: list[Site] = []
        self.data: list[Site] = []  # sites of x_0
        self.known: list[Site] = []  # factors of known entries

    def process_message(self, msg: Site) -> None:
        name, infer = msg.get("name"), msg.get("infer", {})
        if msg["type"] == "prng_key":
            self._refuse(
                "program must not draw by numpyro.prng_key, nor at a site that handlers.block "
                "hides: one draw would stand for all. Draw by numpyro.sample, or pass the key"
            )
        elif msg["type"] == "plate":
            self._check_plate(*msg["args"], name)
        elif msg["type"] == "param" and msg["value"] is None:
            self._refuse(
                f"param {name!r} is unbound in the program, which would take its initial value. "
                "Give it a value by numpyro.handlers.substitute(program, data=params)"
            )
        elif "prior_law" in infer:
            self._place(msg)
        elif _is_latent(msg) and self.latents is not None:
            self.latents[name] = msg
        elif _is_latent(msg):
            self._refuse(
                f"latent site {name!r} must have a value: only x_0 is inferred here. Give it one "
                "by numpyro.handlers.substitute, as a constant, which does not count, or by "
                "condition, as an observation, whose log density counts in the evidence; or infer "
                "it along by infer.ParticleGibbs or, where a prior's context hangs on it, by "
                "MCMC(NUTS(infer.forward_coordinates(program)))"
            )

    def _place(self, msg: Site) -> None:
        infer, name, x_0 = msg["infer"], msg["name"], self.x_0
        self._refuse(changed(msg))
        if "known_of" in infer:
            self.known.append(msg)
        elif "prior" in infer:
            if msg.get("_intervener_id") is not None:
                self._refuse(f"trajectory {name!r} must not be replaced by handlers.do; do so to "
                             "x_0, or use MCMC(NUTS(noncentered(...)))")  # fmt: skip
            self._refuse(given(msg))
            if name in [site["name"] for site in self.priors]:
                self._refuse(
                    f"each prior must be called exactly once; got {name!r} twice. To use one x_0 "
                    "again keep it, x_0 = prior(); several of the same law are one prior() in a "
                    "plate; other priors have names of their own, diffusion.prior(params, "
                    "name=...)"
                )
            self.priors.append(msg)
            msg["value"] = jnp.zeros(msg["fn"].shape(), infer["prior"].reverse.kernel.dtype)
        else:
            self._refuse(given(msg))
            if msg.get("_intervener_id") is not None and infer["data_of"].known is not None:
                self._refuse(f"site {name!r} must not be replaced by handlers.do where entries are "
                             "known: leave known= out, or the handler")  # fmt: skip
            self.data.append(msg)
            dtype = infer["data_of"].reverse.kernel.dtype
            msg["value"] = jnp.zeros(msg["fn"].shape(), dtype) if x_0 is None else x_0[name]

    def _check_plate(self, size: int, subsample_size: int | None, name: str) -> None:
        if subsample_size not in (None, size):
            self._refuse(
                f"plate {name!r} must not be subsampled, since a program is read once and one "
                f"subset would stand for all; got {subsample_size} of {size}. Give it all its data"
            )

    def _refuse(self, text: str) -> None:
        if text:
            self.refusal = ValueError(text)
            raise self.refusal


def _is_latent(site: Site) -> bool:
    """Whether a site is neither observed nor given a value; those of a scan come with theirs."""
    has_value = site["value"] is not None and not site.get("_control_flow_done", False)
    return site["type"] == "sample" and not site["is_observed"] and not has_value


def changed(site: Site) -> str:
    """What to say of a site of a prior whose density a handler changed; nothing otherwise."""
    if site["scale"] is None and unexpanded(site["fn"]) is site["infer"]["prior_law"]:
        return ""
    return (
        f"prior must keep its density at site {site['name']!r}; got one that is scaled, masked or "
        "replaced by a handler or a subsampling plate. Scale and mask the observed sites"
    )


def given(site: Site) -> str:
    """What to say of a site of a prior that has a value from a handler; nothing otherwise."""
    if site["value"] is None:
        return ""
    return (
        f"site {site['name']!r} must be left to its prior; got a value from a handler (condition, "
        "substitute or replay). To fix entries of x_0 use prior(known=values, mask=mask)"
    )


def refuse(text: str) -> None:
    """Raise what there is to say, if there is."""
    if text:
        raise ValueError(text)


def unexpanded(law: dist.Distribution) -> Any:
    """The law under what plates put around it."""
    while isinstance(law, dist.ExpandedDistribution):
        law = law.base_dist
    return law


def latents(
    program: Program, args: tuple, kwargs: dict, key: Array | None = None
) -> tuple[dict[str, Site], set[str], dict[str, Site], Layout]:
    """Latent sites besides those of priors, with a draw; those outside the plates of all priors.

    And the sites of x_0, at 0, with where they stand in x_0.
    """
    found: dict[str, Site] = {}
    sites, place = _sites(program, args, kwargs, None, found, key)
    priors, names = _priors(sites, place)
    plates = {frame.name for frame in shared_frames(priors)}
    there = {name: sites[name] for name in found if name in sites}
    outer = {n for n, s in there.items() if plates - {f.name for f in s["cond_indep_stack"]}}
    return there, outer, {name: sites[name] for name in names}, layout(priors, names)


def decides_prior(program: Program, values: dict[str, Any], args: tuple, kwargs: dict) -> bool:
    """Whether a prior's context or known entries move with what a program takes first."""
    names = sorted(values)

    def rebuild(arrays: list[Array]) -> tuple[tuple, dict]:
        return (dict(zip(names, arrays, strict=True)), *args), kwargs

    look = _look(program, [jnp.asarray(values[name]) for name in names], rebuild)
    jaxpr = look.traced.code.jaxpr
    moved = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if any(isinstance(v, core.Var) and v in moved for v in eqn.invars):
            moved.update(eqn.outvars)
    computed = jaxpr.outvars[: sum(look.is_computed)]
    return any(isinstance(v, core.Var) and v in moved for v in computed)


def _sites(
    program: Program, args: tuple, kwargs: dict, x_0: dict[str, Any] | None,
    found: dict[str, Site] | None = None, key: Array | None = None,
) -> tuple[Sites, _Place]:  # fmt: skip
    """All sites of a program at x_0 by site (zeros for None), and what was placed."""
    place = _Place(x_0, found)
    try:
        with handlers.block(), place:
            seeded = handlers.seed(program, jax.random.key(0) if key is None else key)
            return handlers.trace(seeded).get_trace(*args, **kwargs), place
    except (TypeError, ValueError) as error:
        if error is not place.refusal:
            error.add_note(
                "raised in the program. If shapes do not fit: a site's batch must be the plates "
                "around it, and axes within one observation are declared by .to_event"
            )
        raise


def _priors(sites: Sites, place: _Place) -> tuple[list[Site], list[str]]:
    """The trajectories of all priors, and the names of their x_0."""
    if not place.priors:
        raise ValueError(
            "program must call a prior made by Diffusion.prior; got no call that no handler "
            "(block, reparam) hides"
        )
    names = [_whole(sites, place, site["infer"]["prior"]) for site in place.priors]
    strays = {msg["name"] for msg in (*place.data, *place.known)} - set(names)
    strays -= {f"{name}_known" for name in names}
    _check_seen(not strays, [f"{name}{TRAJECTORY_SUFFIX}" for name in sorted(strays)])
    for site in place.priors:
        _check_plates(site)
    return place.priors, names


def _whole(sites: Sites, place: _Place, draw: PriorDraw) -> str:
    """The name of a prior's x_0, all of whose sites are seen."""
    data = [msg["name"] for msg in place.data if msg["infer"]["data_of"] is draw]
    known = [msg for msg in place.known if msg["infer"]["known_of"] is draw]
    is_whole = len(data) == 1 and len(known) == (draw.known is not None)
    own = [draw.name] if draw.known is None else [draw.name, f"{draw.name}_known"]
    _check_seen(is_whole and sites[data[0]]["type"] == "sample", own)
    return data[0]


def _check_seen(is_seen: bool, names: list[str]) -> None:
    if not is_seen:
        raise ValueError(
            f"sites {names} must be seen as the prior makes them; got one that a handler (block, "
            "reparam) or another site of that name hides"
        )


def _check_plates(site: Site) -> None:
    for frame in site["cond_indep_stack"]:
        if site["fn"].batch_shape[frame.dim] != frame.size:
            raise ValueError(
                f"plate {frame.name!r} around the prior must have the size of the prior's batch; "
                f"got {frame.size} and {site['fn'].batch_shape}"
            )


def _observed(sites: Sites, priors: list[Site], x_0: list[str]) -> tuple[str, ...]:
    """Names of the observed sites, each of them fit to be a likelihood."""
    plates = {frame.name for frame in shared_frames(priors)}
    observed = {n: s for n, s in sites.items() if s["type"] == "sample" and s["is_observed"]}
    names = tuple(name for name, site in observed.items() if "known_of" not in site["infer"])
    for name in names:
        _check_observed(sites[name], plates, " and ".join(x_0))
    return names


def _check_observed(site: Site, plates: set[str], prior: str) -> None:
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
            "inside, or take the prior out of the plate; a latent site that is only to have a "
            "value gets it by numpyro.handlers.substitute, as a constant, which does not count"
        )
    if not is_factor(site):
        _check_rows(site, prior)


def _check_rows(site: Site, prior: str) -> None:
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
    """The law under what plates, events and masks put around it."""
    while isinstance(law, dist.ExpandedDistribution | dist.Independent | dist.MaskedDistribution):
        law = law.base_dist
    return law


def is_factor(site: Site) -> bool:
    """Whether a site is a `numpyro.factor`, which has no value."""
    return isinstance(unwrapped(site["fn"]), dist.Unit)


def _elements(site: Site, batch_shape: tuple[int, ...]) -> Float[Array, "*plates _"]:
    """The site's log density by elements: all but the systems' axes are put into one."""
    law, axes = site["fn"], 0  # axes of independent elements within an event
    while isinstance(law, dist.Independent):
        law, axes = law.base_dist, axes + law.reinterpreted_batch_ndims
    log_prob = law.log_prob(site["value"])
    if site["scale"] is not None:
        scale = jnp.asarray(site["scale"])
        log_prob *= scale.reshape(*scale.shape, *[1] * axes)  # of the batch
    count = len(batch_shape)
    batch = jnp.broadcast_shapes(log_prob.shape[: log_prob.ndim - axes], batch_shape)
    log_prob = jnp.broadcast_to(log_prob, (*batch, *log_prob.shape[log_prob.ndim - axes :]))
    own = tuple(range(len(batch) - count))
    own += tuple(len(own) + i for i, size in enumerate(batch_shape) if size == 1)
    log_prob = jnp.moveaxis(log_prob, own, range(-len(own), 0))
    return log_prob.reshape(*batch_shape, -1)


def systems_are_coupled(
    key: Array, conditioned: Conditioned, x_0: Array, other: Array
) -> Bool[Array, ""]:
    """Whether log r of a system moves with the x_0 of others.

    A random half of the systems goes from `x_0` to `other`. Every system must then have the log r
    that it has where all are with it. Two systems are parted by every second such half.
    """
    shape = conditioned.batch_shape
    if math.prod(shape) == 1:
        return jnp.array(False)
    is_moved = jax.random.bernoulli(key, 0.5, shape)
    event_axes = range(len(shape) - jnp.ndim(x_0), 0)
    mixed = jnp.where(jnp.expand_dims(is_moved, event_axes), other, x_0)
    stayed, moved, found = map(conditioned.log_r, (x_0, other, mixed))
    expected = jnp.where(is_moved, moved, stayed)
    return jnp.any(jnp.abs(found - expected) > 1e-4 * (1 + jnp.abs(expected)))


def _names(sites: Sites, priors: list[Site], where: Layout, observed: tuple[str, ...]) -> Names:
    plates = plate_dims(shared_frames(priors), "plate", where.plates)
    dims, batch_dims, repeated = {}, {}, []
    for site, part in zip(priors, where.parts, strict=True):
        own = plate_dims(site["cond_indep_stack"], "plate", part.plates)
        dims[part.name] = [*own, *numbered(part.name, 0, len(part.event_shape))]
    for site in observed:
        law = sites[site]["fn"]
        shape = jnp.broadcast_shapes(law.shape(), jnp.shape(sites[site]["value"]))
        first = len(shape) - law.event_dim
        batch_dims[site] = plate_dims(sites[site]["cond_indep_stack"], site, shape[:first])
        dims[site] = batch_dims[site] + numbered(site, first, len(shape))
        if math.prod(shape[:first]) > math.prod(where.plates):
            repeated.append(site)
    for site in _deterministic(sites, where.names):
        dims[site] = _deterministic_dims(sites[site], plates, where.plates)
    return Names(tuple(plates), dims, batch_dims, repeated)


def deterministics(sites: Sites, x_0: Sequence[str]) -> dict[str, Any]:
    """Values of the program's own deterministic sites, those of x_0 left out."""
    values = {name: sites[name]["value"] for name in _deterministic(sites, x_0)}
    return jax.tree.map(jnp.asarray, values)


def _deterministic(sites: Sites, x_0: Sequence[str]) -> list[str]:
    return [n for n, s in sites.items() if s["type"] == "deterministic" and n not in x_0]


def plate_dims(frames: Sequence[Any], name: str, batch_shape: tuple[int, ...]) -> list[str]:
    """Plates that make the axes of a batch; an axis without one is `name_dim_i`."""
    names = {frame.dim: _free(frame.name) for frame in frames}
    count = len(batch_shape)
    return [names.get(axis - count, f"{name}_dim_{axis}") for axis in range(count)]


def _deterministic_dims(site: Site, plates: list[str], batch_shape: tuple[int, ...]) -> list[str]:
    """Plates in front where the value has their shape; what else it has is not known."""
    shape, count = np.shape(site["value"]), len(plates)
    own = {_free(frame.name) for frame in site["cond_indep_stack"]}
    first = count if own >= set(plates) and shape[:count] == batch_shape else 0
    return plates[:first] + numbered(site["name"], first, len(shape))


def numbered(name: str, first: int, last: int) -> list[str]:
    """Dims of axes that have no name."""
    return [f"{name}_dim_{axis}" for axis in range(first, last)]


def _free(plate: str) -> str:
    return f"{plate}_plate" if plate in _TAKEN else plate
