"""What `fit` computes with an `SVI`: its steps, and what looks at them.

One step is `svi.update` on the batch x_i of step i, and, where an average of the weights is kept,

    θ_{i+1} = update(θ_i, x_i),    θ̄_{i+1} = d_i θ̄_i + (1 − d_i) θ_{i+1},

    d_i = min(ema_decay, (1 + i) / (10 + i)).

The second argument of the minimum is a warm-up: it makes the average forget the initial weights,
which a fixed decay d carries along for about 1 / (1 − d) steps, longer than a short run.

The user's code is traced once for each call of `fit`, and compiled only where it has changed (see
`compilation`). Steps run n at a time in one compiled loop, a chunk, where n is a run-time argument:
one program serves all lengths, so a result does not depend on them, bit for bit. The state is not
donated: the state before a chunk is what a non-finite loss is traced back from.
"""

import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax, random
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree
from numpyro import handlers
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.svi import SVIState
from numpyro.primitives import Messenger

from probdiff import devices
from probdiff.compilation import Programs, Traced, call, equations, trace
from probdiff.elbo import SampledTimeLoss
from probdiff.networks.convolution import is_slow
from probdiff.reverse import DataGivenFirst, Reverse
from probdiff.train import data as batches
from probdiff.train import identity
from probdiff.trajectories import TRAJECTORY_SUFFIX, ForwardTrajectory, ReverseTrajectory
from probdiff.types import Params

_CONVOLUTION = "conv_general_dilated"
_kept: weakref.WeakKeyDictionary[SVI, Programs] = weakref.WeakKeyDictionary()


class Weights(NamedTuple):
    """Values at the parameter sites: the average where one is kept, and the optimiser's."""

    params: Params
    raw_params: Params


class Carry(NamedTuple):
    """What one step hands to the next: SVI's state, and the average of the weights or None."""

    state: SVIState
    ema: Params | None


class TracedSVI:
    """The functions of an SVI as they are at one call of `fit`, whose `first` batch is given.

    What is compiled is kept as long as the SVI lives.
    """

    def __init__(self, svi: SVI, key: PRNGKeyArray, first: PyTree, mesh: Mesh | None):
        self._svi, self._mesh = svi, mesh
        self._programs = _kept.setdefault(svi, Programs())
        self.first_state = self._init(key, first)
        self._check_trajectories(first)
        self._get_params = self._trace(svi.get_params, self.first_state)
        self._update = self._trace(self._update_on, self.first_state, first)
        _warn_of_slow_convolutions(self._update)
        self._loss: Traced | None = None

    def start(self, *, averaged: bool) -> Carry:
        """The carry before the first step."""
        carry = Carry(self.first_state, None)
        if averaged:
            carry = carry._replace(ema=jax.tree.map(_widened, self.weights(carry).raw_params))
        return devices.replicate(carry, self._mesh)

    def chunk(
        self, carry: Carry, feed: tuple[PyTree, Array | None], start: Any, n: Any, ema_decay: float,
        losses: Any,
    ) -> tuple[Carry, Float[Array, "capacity"], Bool[Array, ""]]:  # fmt: skip
        """n steps from step `start` on; their losses; whether the weights are finite after them."""
        traced, numbers = (self._update, self._get_params), (start, n, ema_decay)
        return self._programs(_chunk, *traced, carry, *feed, *numbers, losses, mesh=self._mesh)

    def weights(self, carry: Carry) -> Weights:
        """What the carry says of the weights."""
        return self._programs(_weights, self._get_params, carry)

    def loss(
        self, key: PRNGKeyArray, params: dict, mutable_state: dict | None, batch: PyTree
    ) -> Float[Array, ""]:
        """What `svi.evaluate` computes, but for the mutable state, which that leaves out.

        Of an objective that weighs what codes cost it is the true ELBO.
        """
        args = key, params, mutable_state, batch
        if self._loss is None:
            self._loss = self._trace(self._loss_on, *args)
        return self._programs(call, self._loss, *args)

    def faults(
        self, key: PRNGKeyArray, params: dict, mutable_state: dict | None, batch: PyTree
    ) -> str:
        """Sites of guide and model whose value or log density is not finite, named."""
        svi, params = self._svi, {**params, **(mutable_state or {})}

        def look(key, params, batch):
            model_key, guide_key = random.split(key)  # as NumPyro's objectives do
            guide = _sites(svi, svi.guide, guide_key, params, batch)
            model = _sites(svi, handlers.replay(svi.model, guide), model_key, params, batch)
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
        return ", ".join(faults) or "no site by itself at this draw"

    def global_latents(self, data: PyTree) -> list[str]:
        """Names of the guide's latent sites outside every plate; nothing is computed.

        Data stay concrete, so that a program's own checks of their values run here, on all of them:
        under `jit`, later, they cannot.
        """
        svi, found = self._svi, []

        def look(state):
            params = {**svi.get_params(state), **(state.mutable_state or {})}
            sites = _sites(svi, svi.guide, state.rng_key, params, data).values()
            latent = [s for s in sites if s["type"] == "sample" and not s["is_observed"]]
            found.extend(site["name"] for site in latent if not site["cond_indep_stack"])

        jax.eval_shape(look, self.first_state)
        return found

    def identity(self, data: PyTree) -> identity.Program:
        """What tells the step's program from others."""
        svi, sites = self._svi, {}

        def look(state):
            params = {**svi.get_params(state), **(state.mutable_state or {})}
            guide = _sites(svi, svi.guide, state.rng_key, params, data)
            model = handlers.replay(svi.model, guide)
            sites["guide"] = guide
            sites["model"] = _sites(svi, model, state.rng_key, params, data)
            read.append(identity.program(svi, self._update, sites))

        read: list[identity.Program] = []
        jax.eval_shape(look, self.first_state)
        return read[0]

    def _check_trajectories(self, batch: PyTree) -> None:
        """Refuse guide and model whose trajectories do not belong together.

        Those of one `Diffusion` hold the same rates; of two, their numbers are compared.
        """
        svi, pairs = self._svi, {}

        def look(state: SVIState, batch: PyTree) -> dict[str, list[tuple[Array, Array]]]:
            params = {**svi.get_params(state), **(state.mutable_state or {})}
            guide = _sites(svi, svi.guide, state.rng_key, params, batch)
            model = _sites(svi, handlers.replay(svi.model, guide), state.rng_key, params, batch)
            pairs.update(_pairs(model, guide))
            return {name: _numbers(*pair) for name, pair in pairs.items()}

        jax.eval_shape(look, self.first_state, batch)
        if any(forward.steps is not reverse.steps for forward, reverse, _ in pairs.values()):
            for name, numbers in jax.jit(look)(self.first_state, batch).items():
                _check_numbers(name, numbers)

    def _init(self, key: PRNGKeyArray, first: PyTree) -> SVIState:
        """`svi.init`, compiled as a whole: op by op it is ten times slower."""
        svi, (args, kwargs) = self._svi, batches.arguments(first)
        guide = svi.guide
        while isinstance(guide, Messenger):
            guide = guide.fn
        if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
            svi.init(key, *args, **kwargs)  # it keeps arrays of its first call: none of a trace

        def init(key, args, kwargs):
            return jax.tree.map(_strongly_typed, svi.init(key, *args, **kwargs))

        traced = trace(init, key, args, kwargs)
        if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(svi.constrain_fn.args)):
            # The program computes a bound, which `svi.update` needs and which died with the trace.
            svi.init(key, *args, **kwargs)
        return self._programs(call, traced, key, args, kwargs)

    def _trace(self, function: Callable[..., Any], *args: Any) -> Traced:
        return devices.replicate(trace(function, *args), self._mesh)

    def _update_on(self, state: SVIState, batch: PyTree) -> tuple[SVIState, Array]:
        args, kwargs = batches.arguments(batch)
        return self._svi.update(state, *args, **kwargs)

    def _loss_on(
        self, key: PRNGKeyArray, params: dict, mutable: dict | None, batch: PyTree
    ) -> Array:
        svi, (args, kwargs) = self._svi, batches.arguments(batch)
        params, kwargs = {**params, **(mutable or {})}, {**kwargs, **svi.static_kwargs}
        objective = svi.loss.judge if isinstance(svi.loss, SampledTimeLoss) else svi.loss
        return objective.loss(key, params, svi.model, svi.guide, *args, **kwargs)


def _warn_of_slow_convolutions(update: Traced) -> None:
    if jax.default_backend() != "cpu":
        return
    found = (e for e in equations(update.code.jaxpr) if e.primitive.name == _CONVOLUTION)
    slow = sum(map(_is_avoidable, found))
    if slow:
        warnings.warn(
            f"convolutions of the program, {slow} with their gradients, are many times slower on "
            "a CPU inside a compiled loop than they need be: make them by "
            "nnx.Conv(..., conv_general_dilated=probdiff.networks.convolve)",
            stacklevel=4,
        )


def _is_avoidable(convolution: core.JaxprEqn) -> bool:
    """Whether it is slow, and one that `networks.convolve` does otherwise."""
    p = convolution.params
    ones = {*p["window_strides"], *p["lhs_dilation"], *p["rhs_dilation"]}
    ones |= {p["feature_group_count"], p["batch_group_count"]}
    return len(p["window_strides"]) == 2 and ones == {1} and is_slow(p["dimension_numbers"])


def is_finite(leaf: Array) -> Bool[Array, ""]:
    """Whether all of an array is finite."""
    return jnp.all(jnp.isfinite(leaf))


def _chunk(
    update: Traced, get_params: Traced, carry: Carry, data: PyTree,
    indices: Int[Array, "capacity *B"] | None, start: Int[Array, ""], n: Int[Array, ""],
    ema_decay: Float[Array, ""], losses: Float[Array, "capacity"], *, mesh: Mesh | None,
) -> tuple[Carry, Float[Array, "capacity"], Bool[Array, ""]]:  # fmt: skip
    def step(i, loop):
        (state, ema), losses = loop
        batch = _shard(batches.at(data, indices, i), mesh, divided=True)
        state, loss = update(state, batch)
        if ema is not None:
            ema = _averaged(ema, get_params(state), start + i, ema_decay)
        return Carry(state, ema), losses.at[i].set(loss)

    carry, losses = lax.fori_loop(0, n, step, (carry, losses))
    leaves = jax.tree.leaves(get_params(carry.state))
    finite = jnp.all(jnp.array([is_finite(leaf) for leaf in leaves]))
    return _shard((carry, losses, finite), mesh, divided=False)


def _weights(get_params: Traced, carry: Carry) -> Weights:
    raw_params = get_params(carry.state)
    if carry.ema is None:
        return Weights(raw_params, raw_params)
    params = jax.tree.map(lambda mean, raw: mean.astype(raw.dtype), carry.ema, raw_params)
    return Weights(params, raw_params)


def _shard(tree: PyTree, mesh: Mesh | None, *, divided: bool) -> PyTree:
    """The tree divided along axis 0 among the devices, or whole on each of them."""
    if mesh is None:
        return tree
    spec = PartitionSpec(mesh.axis_names[0]) if divided else PartitionSpec()
    return lax.with_sharding_constraint(tree, NamedSharding(mesh, spec))


def _averaged(
    ema: Params, params: Params, i: Int[Array, ""], ema_decay: Float[Array, ""]
) -> Params:
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


def _sites(svi: SVI, program: Callable, key: PRNGKeyArray, params: dict, batch: PyTree) -> dict:
    args, kwargs = batches.arguments(batch)
    program = handlers.substitute(handlers.seed(program, key), data=params)
    return handlers.trace(program).get_trace(*args, **kwargs, **svi.static_kwargs)


_Pair = tuple[ForwardTrajectory, Reverse, Array]


def _pairs(model: dict[str, dict], guide: dict[str, dict]) -> dict[str, _Pair]:
    """Forward trajectory, reverse process and x_0 of each diffusion that the model observes."""
    advice = "Make both of one Diffusion: SVI(diffusion.model, diffusion.guide, ...)"
    pairs = {}
    for name, site in guide.items():
        if site["type"] == "sample" and isinstance(_unwrapped(site), DataGivenFirst):
            raise ValueError(
                f"guide must draw trajectories from data, by Diffusion.guide or forward; got one "
                f"that holds {name!r} as a model does. {advice}"
            )
    for name, site in model.items():
        trajectory = model.get(name + TRAJECTORY_SUFFIX)
        is_seen = site["type"] == "sample" and site["is_observed"]
        if not is_seen or not isinstance(_unwrapped(site), DataGivenFirst) or not trajectory:
            continue
        if trajectory["is_observed"]:
            continue
        if trajectory["name"] not in guide:
            raise ValueError(
                f"guide must hold the trajectory {trajectory['name']!r} of the model; got sites "
                f"{sorted(guide)}. {advice}"
            )
        forward, law = _unwrapped(guide[trajectory["name"]]), _unwrapped(trajectory)
        if not isinstance(forward, ForwardTrajectory):
            continue  # a guide of another kind, which any density may be
        if not isinstance(law, ReverseTrajectory):
            raise ValueError(
                f"model must draw {trajectory['name']!r} by Diffusion.model or reverse; got a "
                f"{type(law).__name__}, as a guide does. {advice}"
            )
        ours, others = (forward.kernel, forward.steps.T), (law.reverse.kernel, law.reverse.T)
        if ours != others:
            raise ValueError(
                f"guide and model must have one kernel and one T at {trajectory['name']!r}; got "
                f"{ours} and {others}. {advice}"
            )
        pairs[name] = forward, law.reverse, site["value"]
    return pairs


def _numbers(forward: ForwardTrajectory, reverse: Reverse, x_0: Array) -> list[tuple[Array, Array]]:
    """Rates of guide and model, and x_0 on the scale of each, where it is observed."""
    states = forward.x_0, jnp.broadcast_to(reverse.to_state(x_0), forward.x_0.shape)
    if forward.observed is not None:
        states = tuple(jnp.where(forward.observed, x, jnp.zeros_like(x)) for x in states)
    return [(forward.steps.beta, reverse.steps.beta), states]


def _check_numbers(name: str, numbers: list[tuple[Array, Array]]) -> None:
    for what, (ours, others) in zip(("rates", "loc and scale"), numbers, strict=True):
        gap = np.max(np.abs(np.asarray(ours, float) - np.asarray(others, float)), initial=0.0)
        if gap > 1e-3 * np.max(np.abs(np.asarray(others, float)), initial=0.0):
            raise ValueError(
                f"guide and model must have the same {what} at {name!r}; got two that differ. Make "
                "both of one Diffusion: SVI(diffusion.model, diffusion.guide, ...)"
            )


def _unwrapped(site: dict) -> Any:
    """The law under what plates and masks put around it."""
    law = site["fn"]
    while isinstance(law, dist.ExpandedDistribution | dist.MaskedDistribution):
        law = law.base_dist
    return law


def _finiteness(sites: dict[str, dict]) -> dict[str, dict[str, Bool[Array, ""]]]:
    found = {}
    for name, site in sites.items():
        if site["type"] == "sample":
            found[name] = {"log density": is_finite(site["fn"].log_prob(site["value"]))}
            if not site["is_observed"]:  # data may hold NaN under a mask
                found[name]["value"] = is_finite(site["value"])
    return found
