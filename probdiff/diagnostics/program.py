"""A program in place of a diffusion: any model and guide whose rows are independent.

An ELBO has a value for every row where all sample sites stand in one plate over the rows,

    log p(x_n) ≥ E_q [ log p(x_n | u_n) + Σ_sites log p(u_n) − log q(u_n | x_n) ],

and then so has each part of it, by site. The parts are those that `SampledTimeELBO` sums, here with
every step of a trajectory in place of random ones. Of whole trajectories, drawn by the guide and
scored by model and guide, come log weights,

    log w_n = log p(x_n, u_n) − log q(u_n | x_n),    E w_n = p(x_n).

A diffusion whose x_0 is a latent u of the guide pays for it, on average at least KL(q(u) ‖ p(u)),

    kl_u = log q(u | x) − log p(u | u_1) + Σ_t KL_t + KL_T^prior.

A diffusion of (x, a), with coordinates a of its own that a trajectory may use, bounds log p(x) by

    E_q [ log p(x, a) − log q(a | x) ]  ≤  log p(x):

the guide draws a, the model reads it at a site without a density, `dist.ImproperUniform`, and gives
both to `diffusion.reverse`.

Sources: Kingma and Welling (2014); Vahdat et al. (2021) for a diffusion as the prior of a code.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro import handlers
from numpyro.distributions.util import scale_and_mask

from probdiff import bars
from probdiff.arguments import plain_arrays, shown
from probdiff.compilation import Programs, call, trace
from probdiff.diagnostics.control import controlled
from probdiff.elbo import SampledTimeELBO, Term, auxiliary_terms, log_p_term, log_q_term
from probdiff.infer.program import unwrapped
from probdiff.readouts import Grid
from probdiff.reverse import DataGivenFirst, Outputs, Reverse, State
from probdiff.train.data import arguments, as_arrays
from probdiff.trajectories import TRAJECTORY_SUFFIX, ForwardTrajectory, ReverseTrajectory
from probdiff.types import Params
from probdiff.validation import check_params

_COMPILED = Programs()
_MOST_NUMBERS = 2**26
"""Of all levels of all trajectories at once, 256 MiB in float32."""
_Site = dict[str, Any]
_Parts = dict[str, Array]


class _EveryTime(SampledTimeELBO):
    """The same bound at all times, one after another, less what its own noise explains."""

    def draw_times(
        self, key: Array, forward: ForwardTrajectory, mean_square_kl: Array
    ) -> tuple[Array, Array]:
        """t = 2..T, each with weight 1."""
        T, lead = forward.steps.T, (1,) * len(forward.batch_shape)
        t = jnp.arange(2, T + 1).reshape(-1, *lead)
        t = jnp.broadcast_to(t, (T - 1, *forward.batch_shape))
        return t, jnp.ones(t.shape)

    def step_loss(
        self, forward: ForwardTrajectory, reverse: Reverse, x_t: State, t: Array,
        outputs: Outputs | None = None,
    ) -> Float[Array, "*lead"]:  # fmt: skip
        """KL at every time, for which the network is asked one at a time."""
        one = super().step_loss

        def kl_at(inputs: tuple[Array, Array]) -> Array:
            x_t, t = (a[None] for a in inputs)
            kl = one(forward, reverse, x_t, t)
            is_known = jnp.isfinite(kl)  # what a mask leaves out may be anything
            kept = controlled(jnp.where(is_known, kl, 0.0), forward, x_t, t)
            return jnp.where(is_known, kept, kl)[0]

        return jax.lax.map(kl_at, (x_t, t))


class Rows:
    """A model and a guide called with rows of data, their parameters bound.

    Args:
        pair: `(model, guide)`.
        params: Values of all parameters of both, by site name.
        data: An array; a tuple of arrays by position, or a dict by keyword, rows on the first axis.

    Raises:
        ValueError: if data are of another form, a parameter is missing or unknown, or a site is not
            in the plate of the rows or has no counterpart.
    """

    def __init__(self, pair: tuple[Any, ...], params: Params, data: Any):
        if len(pair) != 2 or not all(map(callable, pair)):
            raise ValueError(
                "diffusion must be a Diffusion, or a program as a pair (model, guide) of "
                f"functions of the data; got {shown(pair)}"
            )
        self.model, self.guide = pair
        self.data = as_arrays(data, "x_0")
        self.count = _count(self.data)
        self.model_sites, self.guide_sites, template = self._look()
        check_params(template, params, "the program")
        self.params = plain_arrays("params", params)
        self._check_sites()
        self.plate = _plate_of_rows(self.model_sites, self.guide_sites, self.count)

    @property
    def observed(self) -> dict[str, _Site]:
        """Sites of the model that are data; factors are none."""
        return {
            name: site
            for name, site in self.model_sites.items()
            if site["is_observed"] and not isinstance(unwrapped(site["fn"]), dist.Unit)
        }

    @property
    def latent(self) -> set[str]:
        """Names of all others of the model."""
        return {name for name, site in self.model_sites.items() if not site["is_observed"]}

    @property
    def lengths(self) -> dict[str, int]:
        """T of each trajectory, by the name of its data."""
        found = {}
        for name, site in self.model_sites.items():
            law = unwrapped(site["fn"])
            if isinstance(law, ReverseTrajectory):
                found[name.removesuffix(TRAJECTORY_SUFFIX)] = law.steps.T
        return found

    @property
    def about(self) -> dict[str, Any]:
        """What the density is taken against, over how many entries; T of the only diffusion."""
        kinds = {_is_discrete(site) for site in self.observed.values()}
        of_one = "counting" if True in kinds else "Lebesgue, in the user's units"
        measure = of_one if len(kinds) == 1 else "mixed"
        is_masked = any(map(_is_masked, self.observed.values()))
        flat = [s for s in self.model_sites.values() if _is_flat(s) and not s["is_observed"]]
        entries = sum(map(_entries, self.observed.values())) - sum(map(_entries, flat))
        num_dims = math.nan if is_masked else entries // self.count
        T = {"T": next(iter(self.lengths.values()))} if len(self.lengths) == 1 else {}
        return {"reference_measure": measure, "num_dims": num_dims} | T

    def parts(
        self, key: Array, *, num_draws: int, block_size: int, progress: bool
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Mean parts over draws and their sum `bound`, nats by row; the variance of that mean.

        Parts `step_kl_NAME` are by row and step.
        """
        rows, together = self._sizes(block_size, num_draws)
        static = {"num_draws": num_draws, "together": together}
        function = functools.partial(_parts_of_block, self.model, self.guide, self, **static)
        return self._by_block(function, key, rows, progress)

    def log_weights(
        self, key: Array, *, num_draws: int, block_size: int, progress: bool
    ) -> Float[np.ndarray, "N draws"]:
        """Log weights of so many whole draws of the guide for every row."""
        rows, together = self._sizes(block_size, num_draws)
        static = {"num_draws": num_draws, "together": together}
        function = functools.partial(_weights_of_block, self.model, self.guide, self, **static)
        return self._by_block(function, key, rows, progress)

    def by_row(self, term: Term) -> tuple[Array, Array | None]:
        """A term and its steps, `(rows,)` and `(rows, steps)`, summed over other plates."""
        dim = next(frame.dim for frame in term.plates if frame.name == self.plate)
        if term.loss.ndim < -dim:
            raise ValueError(
                f"site {term.name!r} must have a density for each entry of plate {self.plate!r}; "
                f"got shape {term.loss.shape}"
            )

        def rows(loss: Array) -> Array:
            loss = scale_and_mask(loss, term.scale, term.mask)
            others = tuple(axis for axis in range(term.loss.ndim) if axis != term.loss.ndim + dim)
            return jnp.sum(loss, tuple(axis - term.loss.ndim for axis in others))

        return rows(term.loss), None if term.steps is None else jax.vmap(rows)(term.steps).T

    def _by_block(self, function: Callable[..., Any], key: Array, size: int, progress: bool) -> Any:
        """What a function of key, parameters and rows returns for all rows; blocks of one shape."""
        blocks = []
        traced = None
        for block, start in enumerate(
            bars.bar(range(0, self.count, size), desc="bound", disable=not progress)
        ):
            index = np.minimum(np.arange(start, start + size), self.count - 1)
            rows = jax.tree.map(lambda a, index=index: a[index], self.data)
            given = jax.random.fold_in(key, block), self.params, rows
            traced = trace(function, *given) if traced is None else traced
            out = _COMPILED(call, traced, *given)
            blocks.append(jax.tree.map(lambda a: np.asarray(a, np.float64), out))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: self.count], *blocks)

    def _sizes(self, block_size: int, num_draws: int) -> tuple[int, int]:
        """Rows in a block, and draws of each at once, a divisor of their number."""
        sites = [unwrapped(site["fn"]) for site in self.model_sites.values()]
        numbers = [math.prod(f.event_shape) for f in sites if isinstance(f, ReverseTrajectory)]
        most = max(1, min(block_size, _MOST_NUMBERS // max(1, sum(numbers))))
        blocks = -(-self.count // most)
        rows = -(-self.count // blocks)
        draws = max(1, most // rows)
        return rows, max(d for d in range(1, min(draws, num_draws) + 1) if num_draws % d == 0)

    def _look(self) -> tuple[dict[str, _Site], dict[str, _Site], dict[str, Any]]:
        """Sample sites of model and guide, and shapes of parameters, without computing anything."""
        found: list[dict[str, _Site]] = []
        args, kwargs = arguments(self.data)

        def look(key: Array) -> dict[str, Any]:
            guide = handlers.trace(handlers.seed(self.guide, key)).get_trace(*args, **kwargs)
            model = handlers.replay(handlers.seed(self.model, key), guide)
            model = handlers.trace(model).get_trace(*args, **kwargs)
            found[:] = [model, guide]
            is_param = ("param", "mutable")
            sites = guide | model
            return {n: s["value"] for n, s in sites.items() if s["type"] in is_param}

        with handlers.block():
            template = jax.eval_shape(look, jax.random.key(0))
        for name, site in (found[0] | found[1]).items():
            size, part = site["args"] if site["type"] == "plate" else (None, None)
            if part not in (None, size):
                raise ValueError(
                    f"plate {name!r} must not be subsampled where every row has a bound; got "
                    f"{part} of {size} entries"
                )
        model, guide = (
            {name: site for name, site in sites.items() if site["type"] == "sample"}
            for sites in found
        )
        return model, guide, template

    def _check_sites(self) -> None:
        if not self.observed:
            raise ValueError("model must observe the data, obs=; got no observed site")
        for name in self.latent:
            if name not in self.guide_sites:
                raise ValueError(
                    f"guide must draw every latent site of the model; got none named {name!r}"
                )


def _count(data: Any) -> int:
    """Rows of the data."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(data)]
    counts = {shape[:1] for shape in shapes}
    if len(counts) != 1 or not all(shape and shape[0] for shape in shapes):
        raise ValueError(f"x_0 must have rows, as many in every array; got shapes {shapes}")
    return shapes[0][0]


def _plate_of_rows(model_sites: dict[str, _Site], guide_sites: dict[str, _Site], count: int) -> str:
    """Name of the plate over the rows, around every site of both."""
    sites = [(name, "model", site) for name, site in model_sites.items()]
    sites += [(name, "guide", site) for name, site in guide_sites.items()]
    frames = [frame for *_, site in sites for frame in site["cond_indep_stack"]]
    around = collections.Counter(frame.name for frame in frames if frame.size == count)
    if not around:
        raise ValueError(
            f"model and guide must open a plate over the {count} rows of x_0, "
            f"numpyro.plate('data', len(x)), whatever their number; got none of that size"
        )
    plate, times = around.most_common(1)[0]
    for name, program, site in sites:
        if all(frame.name != plate for frame in site["cond_indep_stack"]):
            raise ValueError(
                f"site {name!r} of the {program} must stand in plate {plate!r} of the rows, or no "
                "row has a bound of its own; got it outside. What all rows share may be a "
                "parameter; the bound of all rows together is what SVI.evaluate returns"
            )
    rivals = [name for name, n in around.items() if n == times and name != plate]
    if rivals:
        raise ValueError(
            f"plate {plate!r} of the rows must differ in size from {rivals[0]!r} around the same "
            f"sites, or it is not known which has the rows; got {count} for both: add a row to x_0"
        )
    return plate


def _is_discrete(site: _Site) -> bool:
    law = unwrapped(site["fn"])
    if isinstance(law, DataGivenFirst):
        return isinstance(law.data_support, Grid) or bool(law.data_support.is_discrete)
    return bool(law.support.is_discrete)


def _is_flat(site: _Site) -> bool:
    return isinstance(unwrapped(site["fn"]), dist.ImproperUniform)


def _is_masked(site: _Site) -> bool:
    law, own = site["fn"], unwrapped(site["fn"])
    while law is not own:
        if isinstance(law, dist.MaskedDistribution):
            return True
        law = law.base_dist
    return isinstance(own, DataGivenFirst) and own.observed is not None


def _entries(site: _Site) -> int:
    return math.prod(site["fn"].shape())


# blocks


def _parts_of_block(
    model: Callable[..., Any], guide: Callable[..., Any], about: Rows, key: Array, params: Params,
    rows: Any, *, num_draws: int, together: int,
) -> tuple[_Parts, Array]:  # fmt: skip
    """Mean of each part, and the variance of the mean of their sum."""
    count = len(jax.tree.leaves(rows)[0])
    args, kwargs = arguments(_repeated(rows, together))
    objective = _EveryTime()

    def several(sums: _Parts, key: Array) -> tuple[_Parts, Float[Array, "rows together"]]:
        terms, _ = objective.terms(key, params, model, guide, args, kwargs)
        parts = _named(terms, about)
        parts = {n: a.reshape(count, together, *a.shape[1:]) for n, a in parts.items()}
        return {n: sums.get(n, 0) + jnp.sum(a, 1) for n, a in parts.items()}, parts["bound"]

    shapes, _ = jax.eval_shape(lambda key: several({}, key), key)
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    sums, totals = jax.lax.scan(several, start, jax.random.split(key, num_draws // together))
    totals = jnp.moveaxis(totals, 1, 0).reshape(count, num_draws)
    variance = jnp.var(totals, 1, ddof=1) / num_draws if num_draws > 1 else totals[:, 0] * jnp.nan
    return jax.tree.map(lambda a: a / num_draws, sums), variance


def _repeated(rows: Any, times: int) -> Any:
    """Every row so many times, each with noise of its own: keys under vmap compile slowly."""
    return jax.tree.map(lambda a: jnp.repeat(a, times, 0), rows)


def _named(terms: list[Term], about: Rows) -> _Parts:
    """Parts of every row by name, and what they add up to, `bound`."""
    parts: _Parts = {}

    def add(name: str, value: Array) -> None:
        parts[name] = parts[name] + value if name in parts else value

    for term in terms:
        loss, steps = about.by_row(term)
        whole = loss if steps is None else loss + jnp.sum(steps, 1)
        add("bound", -whole)
        is_code = term.name in about.lengths and term.name in about.latent
        if steps is not None:
            add(f"step_kl_{term.name}", steps)
        if term.part == "log_p" and term.name not in about.latent:
            add(f"log_likelihood_{term.name}", -loss)
        elif term.part == "reconstruction":
            add(f"reconstruction_{term.name}", -loss)
        elif term.part == "prior_kl":
            add(f"prior_kl_{term.name}", loss)
        elif is_code or term.name not in about.latent:
            add(f"log_q_{term.name}", loss)
        if (term.part in ("kl", "log_p", "log_q") and term.name in about.latent) or is_code:
            add(f"kl_{term.name}", whole)
    return parts


def _weights_of_block(
    model: Callable[..., Any], guide: Callable[..., Any], about: Rows, key: Array, params: Params,
    rows: Any, *, num_draws: int, together: int,
) -> Float[Array, "rows draws"]:  # fmt: skip
    count = len(jax.tree.leaves(rows)[0])
    args, kwargs = arguments(_repeated(rows, together))

    def several(key: Array) -> Float[Array, "rows together"]:
        key_guide, key_model = jax.random.split(key)
        run = handlers.substitute(handlers.seed(guide, key_guide), data=params)
        guide_sites = handlers.trace(run).get_trace(*args, **kwargs)
        run = handlers.replay(handlers.seed(model, key_model), guide_sites)
        run = handlers.substitute(run, data=params)
        model_sites = handlers.trace(run).get_trace(*args, **kwargs)
        terms = list(_log_ratio(model_sites, guide_sites))
        return -sum(about.by_row(term)[0] for term in terms).reshape(count, together)

    log_w = jax.lax.map(several, jax.random.split(key, num_draws // together))
    return jnp.moveaxis(log_w, 1, 0).reshape(count, num_draws)


def _log_ratio(model_sites: dict[str, _Site], guide_sites: dict[str, _Site]) -> Iterator[Term]:
    """−log p of every site of the model, log q of every site of the guide."""
    for name, site in model_sites.items():
        if site["type"] == "sample":
            yield log_p_term(site)
            if name in guide_sites:
                yield log_q_term(guide_sites[name])
    yield from auxiliary_terms(model_sites, guide_sites)
