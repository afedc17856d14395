"""The compiled functions of an `SVI`: its steps, and what looks at them.

One step is `svi.update` on the batch x_i of step i, and, where an average of the weights is kept,

    θ_{i+1} = update(θ_i, x_i),    θ̄_{i+1} = d_i θ̄_i + (1 − d_i) θ_{i+1},

    d_i = min(ema_decay, (1 + i) / (10 + i)).

The second argument of the minimum is a warm-up: it makes the average forget the initial weights,
which a fixed decay d carries along for about 1 / (1 − d) steps, longer than a short run.

Steps run n at a time in one compiled loop, a chunk, where n is a run-time argument: one program
serves all lengths, so a result does not depend on them, bit for bit. Data are arguments too, never
constants of the program. The state is not donated: the state before a chunk is what a non-finite
loss is traced back from. What is compiled is kept as long as the SVI lives, so that to run again
compiles nothing.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax import lax, random
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from numpyro import handlers
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.svi import SVIState
from numpyro.primitives import Messenger

from probdiff.batches import arguments


class Weights(NamedTuple):
    """Values at the parameter sites.

    Args:
        params: The average where one is kept, else `raw_params`.
        raw_params: The optimiser's.
    """

    params: Any
    raw_params: Any


class Carry(NamedTuple):
    """What one step hands to the next.

    Args:
        state: SVI's state.
        ema: Average of the weights, or None.
    """

    state: SVIState
    ema: Any


class Compiled:
    """The compiled functions of one SVI; `compiled_of` makes and keeps them.

    Args:
        svi: Held by a weak reference, or what is kept for it would keep it alive.
    """

    def __init__(self, svi: SVI):
        self._svi = weakref.ref(svi)
        self._inits: dict[str, Callable] = {}
        self.chunk = jax.jit(self._chunk, static_argnames="mesh")
        self.weights = jax.jit(self._weights)
        self.loss = jax.jit(self._loss)

    def init(self, key: PRNGKeyArray, batch: Any) -> SVIState:
        """`svi.init`, compiled as a whole: op by op it is ten times slower."""
        svi, (args, kwargs) = self._svi(), arguments(batch)
        if not self._inits and _keeps_its_first_call(svi.guide):
            svi.init(key, *args, **kwargs)

        def init(key, args, kwargs):
            return jax.tree.map(_strongly_typed, svi.init(key, *args, **kwargs))

        # Traced at every call, as a module's weights are constants of the trace and may be other
        # ones by now; compiled once, as a function of those constants.
        jaxpr, shapes = jax.make_jaxpr(init, return_shape=True)(key, args, kwargs)
        if _holds_tracers(svi.constrain_fn.args):
            # The program computes a bound, which `svi.update` needs and which died with the trace.
            svi.init(key, *args, **kwargs)
        new = jax.jit(partial(_run_jaxpr, jaxpr.jaxpr))
        run = self._inits.setdefault(str(jaxpr.jaxpr), new)
        leaves = run(jaxpr.consts, *jax.tree.leaves((key, args, kwargs)))
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

    def start(self, state: SVIState, *, averaged: bool) -> Carry:
        """The carry before the first step."""
        if not averaged:
            return Carry(state, None)
        return Carry(state, jax.tree.map(_widened, self.weights(Carry(state, None)).raw_params))

    def faults(
        self, key: PRNGKeyArray, params: dict, mutable_state: dict | None, batch: Any
    ) -> list[str]:
        """Sites of guide and model whose value or log density is not finite, named."""
        svi, params = self._svi(), {**params, **(mutable_state or {})}

        def look(key, params, batch):
            model_key, guide_key = random.split(key)  # as NumPyro's objectives do
            guide = _trace(svi, svi.guide, guide_key, params, batch)
            model = _trace(svi, handlers.replay(svi.model, guide), model_key, params, batch)
            return {"guide": _finiteness(guide), "model": _finiteness(model)}

        # Compiled, because run op by op a distribution's own checks end the search at the first.
        found = jax.jit(look)(key, params, batch)
        faults = [
            f"{what} of site {name!r} in the {program}"
            for program, sites in found.items()
            for name, site in sites.items()
            for what, finite in site.items()
            if not finite
        ]
        return faults or ["no site by itself at this draw"]

    def global_latents(self, state: SVIState, data: Any) -> list[str]:
        """Names of the guide's latent sites outside every plate; nothing is computed.

        Data stay concrete, so that a program's own checks of their values run here, on all of them:
        under `jit`, later, they cannot.
        """
        svi, found = self._svi(), []

        def look(state):
            params = {**svi.get_params(state), **(state.mutable_state or {})}
            sites = _trace(svi, svi.guide, state.rng_key, params, data).values()
            latent = [s for s in sites if s["type"] == "sample" and not s["is_observed"]]
            found.extend(site["name"] for site in latent if not site["cond_indep_stack"])

        jax.eval_shape(look, state)
        return found

    def _chunk(
        self,
        carry: Carry,
        data: Any,
        indices: Int[Array, "capacity *B"] | None,
        start: Int[Array, ""],
        n: Int[Array, ""],
        ema_decay: Float[Array, ""],
        losses: Float[Array, "capacity"],
        *,
        mesh: Mesh | None,
    ) -> tuple[Carry, Float[Array, "capacity"], Bool[Array, ""]]:
        """n steps from step `start` on; their losses; whether the weights are finite after them."""
        svi = self._svi()

        def step(i, loop):
            carry, losses = loop
            args, kwargs = arguments(_shard(batch_at(data, indices, i), mesh, divided=True))
            state, loss = svi.update(carry.state, *args, **kwargs)
            ema = carry.ema
            if ema is not None:
                ema = _averaged(ema, svi.get_params(state), start + i, ema_decay)
            return Carry(state, ema), losses.at[i].set(loss)

        carry, losses = lax.fori_loop(0, n, step, (carry, losses))
        leaves = jax.tree.leaves(svi.get_params(carry.state))
        finite = jnp.all(jnp.array([is_finite(leaf) for leaf in leaves]))
        return _shard((carry, losses, finite), mesh, divided=False)

    def _weights(self, carry: Carry) -> Weights:
        raw_params = self._svi().get_params(carry.state)
        if carry.ema is None:
            return Weights(raw_params, raw_params)
        params = jax.tree.map(lambda mean, raw: mean.astype(raw.dtype), carry.ema, raw_params)
        return Weights(params, raw_params)

    def _loss(
        self, key: PRNGKeyArray, params: dict, mutable_state: dict | None, batch: Any
    ) -> Float[Array, ""]:
        """What `svi.evaluate` computes, but for the mutable state, which that leaves out."""
        svi, (args, kwargs) = self._svi(), arguments(batch)
        params = {**params, **(mutable_state or {})}
        options = {**kwargs, **svi.static_kwargs}
        return svi.loss.loss(key, params, svi.model, svi.guide, *args, **options)


_kept: weakref.WeakKeyDictionary[SVI, Compiled] = weakref.WeakKeyDictionary()


def compiled_of(svi: SVI) -> Compiled:
    """The compiled functions of an SVI, the same ones at every call."""
    if svi not in _kept:
        _kept[svi] = Compiled(svi)
    return _kept[svi]


def batch_at(data: Any, indices: Int[Array, "capacity *B"] | None, i: Int[Array, ""] | int) -> Any:
    """Batch of the i-th step of a chunk."""
    if indices is None:
        return data
    rows = indices[i]
    return jax.tree.map(lambda leaf: leaf.at[rows].get(mode="promise_in_bounds"), data)


def is_finite(leaf: Array) -> Bool[Array, ""]:
    """Whether all of an array is finite."""
    return jnp.all(jnp.isfinite(leaf))


def _shard(tree: Any, mesh: Mesh | None, *, divided: bool) -> Any:
    """The tree divided along axis 0 among the devices, or whole on each of them."""
    if mesh is None:
        return tree
    spec = PartitionSpec(mesh.axis_names[0]) if divided else PartitionSpec()
    return lax.with_sharding_constraint(tree, NamedSharding(mesh, spec))


def _averaged(ema: Any, params: Any, i: Int[Array, ""], ema_decay: Float[Array, ""]) -> Any:
    """θ̄_{i+1} from θ̄_i and θ_{i+1}."""
    d = jnp.minimum(ema_decay, (1.0 + i) / (10.0 + i))
    return jax.tree.map(
        lambda mean, new: (d * mean + (1 - d) * new).astype(mean.dtype), ema, params
    )


def _widened(leaf: Array) -> Array:
    # In 16 bits a move by 1 − d is less than the spacing of numbers: the average would stand still.
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _strongly_typed(leaf: Array) -> Array:
    # A weakly typed leaf would be strong after one chunk, and the loop would compile again.
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return leaf if is_key else lax.convert_element_type(leaf, leaf.dtype)


def _run_jaxpr(jaxpr: jax.extend.core.Jaxpr, consts: list, *leaves: Array) -> list:
    return jax.extend.core.jaxpr_as_fun(jax.extend.core.ClosedJaxpr(jaxpr, consts))(*leaves)


def _holds_tracers(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _keeps_its_first_call(guide: Any) -> bool:
    """Whether a guide keeps arrays of its first call, which may then not be made under a trace."""
    while isinstance(guide, Messenger):
        guide = guide.fn
    return isinstance(guide, AutoGuide)


def _trace(svi: SVI, program: Callable, key: PRNGKeyArray, params: dict, batch: Any) -> dict:
    args, kwargs = arguments(batch)
    program = handlers.substitute(handlers.seed(program, key), data=params)
    return handlers.trace(program).get_trace(*args, **kwargs, **svi.static_kwargs)


def _finiteness(sites: dict[str, dict]) -> dict[str, dict[str, Bool[Array, ""]]]:
    found = {}
    for name, site in sites.items():
        if site["type"] == "sample":
            found[name] = {"log density": is_finite(site["fn"].log_prob(site["value"]))}
            if not site["is_observed"]:  # data may hold NaN under a mask
                found[name]["value"] = is_finite(site["value"])
    return found
