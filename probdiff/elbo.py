"""`SampledTimeELBO`: the bound estimated at x_1 and at one random time per example.

The bound of a trajectory splits into one term per step (Appendix B):

    K = E log p(x_0 | x_1) − Σ_{t=2}^{T} E KL( q(x_s | x_t, x_0) ‖ p(x_s | x_t) )
        − KL( q(x_T | x_0) ‖ π ),

so x_1 and one x_t with t drawn from P(t), its KL divided by P(t), estimate K without bias. Both
levels come from the marginals q(x_1 | x_0) and q(x_t | x_0): a training step costs one network call
whatever T is, two where the last step asks the network too (see `first_share`), and no trajectory
is ever drawn. The levels replace the trajectory's value while the guide runs, by an effect handler
that belongs to this objective.

Every other latent site is scored by its closed-form KL where one is registered and all the latents
it may depend on in the model come before it in the guide, by a sampled log-ratio elsewhere. Masks,
scales and subsampling count as in NumPyro's own objectives. Where x_0 is itself a latent, such as
the code of an encoder, log q(x_0) is paid beside log p(x_0 | x_1): the rest is the same.

How t is drawn is said by `times`; whatever the law, the estimate is unbiased.

A code z of x_0, a latent of the program that a diffusion is told by its context, tends to collapse:
the diffusion does without it, and its cost KL( q(z | x_0) ‖ p(z) ) falls to 0. The usual remedies
weigh that cost by β, or count none of it below λ, a mean over the examples of a batch,

    loss = −K + β max( KL, λ ),

and are no bounds; what they trained is judged at β = 1 and λ = 0.

Sources: Sohl-Dickstein et al. (2015), eqs. 10 to 14 and appendix B, before the entropies are taken
out, hence without their condition on the data's second moment; Higgins et al. (2017) for β; Kingma
et al. (2016), appendix C.8, for λ; Sønderby et al. (2016) for a β that grows.
"""

import abc
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int
from numpyro.distributions.util import scale_and_mask
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.infer.elbo import ELBO
from numpyro.primitives import Messenger, mutable
from numpyro.util import check_model_guide_match

from probdiff.arguments import (
    INNER_SHARE,
    NOT_NEGATIVE,
    check_at_least,
    check_callable,
    check_flag,
    check_number,
    check_object,
)
from probdiff.reverse import DataGivenFirst, Outputs, Reverse, State, Values
from probdiff.times import StratifiedTimes, Times
from probdiff.trajectories import (
    TRAJECTORY_SUFFIX,
    ForwardTrajectory,
    ReverseTrajectory,
    SampledTimes,
)
from probdiff.types import Params

_Program = Callable[..., Any]
_Named = dict[str, Any]
"""What a site holds, or what a program's sites hold, by name."""
_MEMORY = 0.99
"""Weight of the past in the running mean square of KL_t."""
_MEMORY_SUFFIX = "_mean_square_kl"
_STEPS_DONE = "steps_of_warm_up"
"""Site that counts steps."""
_NATS_PER_BIT = math.log(2)


class _TrackKL(Messenger):
    """Declares the running mean squares of KL_t beside every forward trajectory."""

    def process_message(self, msg: _Named) -> None:
        if (forward := _forward(msg)) is not None:
            mutable(msg["name"] + _MEMORY_SUFFIX, jnp.zeros(forward.steps.T - 1))


def track_kl(guide: _Program) -> _Program:
    """The same guide with `numpyro.mutable` sites, for `ImportanceTimes` and for a warm-up.

    One per trajectory holds the running mean square of KL_t, `(T − 1,)`, nats² (of the step's loss
    under `SimpleLoss` and `CombinedLoss`); `steps_of_warm_up` counts steps. They are not declared
    by every guide because NumPyro's own objectives lose mutable state with more than one particle.

    Args:
        guide: Any guide with forward trajectories, such as `diffusion.guide`.

    Returns:
        A guide to hand to `SVI` in its place.

    Example:
        >>> diffusion = standard_diffusion((), T=5)
        >>> loss = SampledTimeELBO(times=ImportanceTimes())
        >>> svi = SVI(diffusion.model, track_kl(diffusion.guide), optax.adam(1e-3), loss)
        >>> state = svi.init(jax.random.key(0), jnp.ones(8))
        >>> state.mutable_state["x_0_trajectory_mean_square_kl"].shape  # t = 2..5
        (4,)
    """

    check_callable("guide(*args)", guide=guide)
    return functools.partial(_tracked, guide)


def untracked(guide: _Program) -> _Program:
    """The guide that `track_kl` was given; another is returned as it is."""
    is_tracked = isinstance(guide, functools.partial) and guide.func is _tracked
    return guide.args[0] if is_tracked else guide


def _tracked(guide: _Program, *args: Any, **kwargs: Any) -> Any:
    mutable(_STEPS_DONE, jnp.zeros((), jnp.int32))
    with _TrackKL():
        return guide(*args, **kwargs)


class _PlaceTimes(Messenger):
    """Gives each forward trajectory the value `SampledTimes` instead of drawing it."""

    def __init__(self, objective: "SampledTimeLoss"):
        self.objective = objective
        self.memory: _Named = {}
        super().__init__()

    def process_message(self, msg: _Named) -> None:
        forward = _forward(msg)
        if forward is None or msg["value"] is not None:
            return
        memory = self.memory.get(msg["name"] + _MEMORY_SUFFIX)
        if memory is None:
            if self.objective.times.tracks_kl:
                raise ValueError(
                    f"{type(self.objective.times).__name__} needs the running KL of "
                    f"{msg['name']!r}: "
                    "pass track_kl(guide) to SVI in place of the guide"
                )
            memory = jnp.zeros(forward.steps.T - 1)
        # x_1 and x_t at `num_times` times are independent given x_0, as each term allows.
        key_t, key_1, key_x = jax.random.split(msg["kwargs"]["rng_key"], 3)
        t, weight = self.objective.draw_times(key_t, forward, memory)
        x_1 = forward.sample_at(key_1, jnp.ones(forward.batch_shape, jnp.int32))
        msg["value"] = SampledTimes(x_1, forward.sample_at(key_x, t), t, weight)

    def postprocess_message(self, msg: _Named) -> None:
        if msg["type"] == "mutable":
            self.memory[msg["name"]] = msg["value"]


class Term(NamedTuple):
    """What one site adds to the loss: −log p, log q or a KL, for every element of its plates."""

    part: str
    """`log_p` (sign changed), `log_q` or `kl`; of a diffusion `reconstruction` (sign changed), and
    `prior_kl` with its steps."""
    name: str
    """The site; of a trajectory the data's."""
    loss: Float[Array, "*batch"]
    scale: Any = None
    mask: Any = None
    """True where it counts; masks of NumPyro's handlers, where `loss` is not masked by itself."""
    steps: Float[Array, "times *batch"] | None = None
    """Of a trajectory, what each of its times adds besides."""
    plates: tuple = ()
    """Frames of the site's plates."""
    is_cost: bool = False
    """Whether it is what a latent of the model costs, an x_0 that the guide draws among them."""

    @property
    def count(self) -> Float[Array, ""]:
        """How many examples it counts."""
        return jnp.sum(scale_and_mask(jnp.ones_like(self.loss), self.scale, self.mask))

    def total(self) -> Float[Array, ""]:
        """Sum over plates and times."""
        loss = self.loss if self.steps is None else jnp.sum(self.steps, 0) + self.loss
        return jnp.sum(scale_and_mask(loss, self.scale, self.mask))


class _Said(NamedTuple):
    """What a network says at all levels that a step looks at, x_1 among them."""

    reverse: Reverse
    outputs: Outputs


def _said(name: str, reverse: Reverse, levels: SampledTimes) -> _Said:
    """By one call at all levels of a trajectory."""
    if reverse.last_step.is_tied:
        raise ValueError(
            "first_share must be None where the last step is tied, which asks no network at x_1; "
            f"got a share with the site {name!r}"
        )
    return _Said(reverse, reverse.outputs(levels.x_t, levels.t, examples_first=True))


class SampledTimeLoss(ELBO, abc.ABC):
    """Objective of a program with diffusion trajectories, each estimated at random times.

    Its arguments are those of `SampledTimeELBO`.
    """

    is_bound = False
    """Whether −loss is a bound, so that x_0 of a diffusion may be a latent of the guide."""

    def __init__(
        self,
        num_particles: int = 1,
        *,
        num_times: int = 1,
        times: Times | None = None,
        first_share: float | None = None,
        kl_weight: float = 1.0,
        free_bits: float = 0.0,
        warm_up: int = 0,
        vectorize_particles: Any = True,
    ):
        check_at_least(1, num_particles=num_particles, num_times=num_times)
        check_number(INNER_SHARE, or_none=True, first_share=first_share)
        check_number(NOT_NEGATIVE, kl_weight=kl_weight, free_bits=free_bits)
        check_at_least(0, warm_up=warm_up)
        check_object(Times, "a law of t such as StratifiedTimes()", or_none=True, times=times)
        if not callable(vectorize_particles):
            check_flag(vectorize_particles=vectorize_particles)
        self.num_times, self.first_share = num_times, first_share
        self.times = StratifiedTimes() if times is None else times
        self.kl_weight, self.free_bits, self.warm_up = kl_weight, free_bits, warm_up
        super().__init__(num_particles, vectorize_particles)

    @property
    def judge(self) -> "SampledTimeLoss":
        """What `fit` evaluates held-out data by: the true ELBO where codes cost otherwise."""
        if not self._weighs_codes:
            return self
        options = {"num_times": self.num_times, "vectorize_particles": self.vectorize_particles}
        return SampledTimeELBO(self.num_particles, **options)

    @property
    def _weighs_codes(self) -> bool:
        return (self.kl_weight, self.free_bits, self.warm_up) != (1, 0, 0)

    @abc.abstractmethod
    def step_loss(
        self, forward: ForwardTrajectory, reverse: Reverse, x_t: State, t: Array,
        outputs: Outputs | None = None,
    ) -> Float[Array, "*lead"]:  # fmt: skip
        """What step t adds to the loss of an example, t in 2..T.

        `outputs` are what the network said at x_t; it is asked where they are absent.
        """

    @abc.abstractmethod
    def end_loss(self, forward: ForwardTrajectory) -> Float[Array, "*batch"]:
        """What the end of the forward trajectory adds: x_T, against π."""

    @abc.abstractmethod
    def data_loss(
        self, forward: ForwardTrajectory, x_0_given_x_1: DataGivenFirst, x_0: Values
    ) -> Float[Array, "*batch"]:
        """What the last step p(x_0 | x_1) adds."""

    def loss_with_mutable_state(
        self,
        rng_key: Array,
        param_map: Params,
        model: _Program,
        guide: _Program,
        *args: Any,
        **kwargs: Any,
    ) -> _Named:
        """The loss, and the mutable sites with the running mean squares brought up to date."""

        def particle(key: Array) -> tuple[Array, _Named]:
            return self._particle(key, param_map, model, guide, args, kwargs)

        if self.num_particles == 1:
            loss, state = particle(rng_key)
        else:
            keys = jax.random.split(rng_key, self.num_particles)
            losses, states = self.vectorize_particles_fn(particle, keys)
            loss = jnp.mean(losses)
            state = {  # the mean of a running KL, the last particle's of any other
                name: jnp.mean(value, 0)
                if name.endswith(_MEMORY_SUFFIX)
                else jax.tree.map(lambda leaf: leaf[-1], value)
                for name, value in states.items()
            }
        return {"loss": loss, "mutable_state": state or None}

    def _particle(self, key, param_map, model, guide, args, kwargs):
        terms, state = self.terms(key, param_map, model, guide, args, kwargs)
        if self._weighs_codes:
            loss = self._weighed(terms, self._weight_at(state))
        else:
            loss = sum((term.total() for term in terms), start=jnp.zeros(()))
        if _STEPS_DONE in state:
            state[_STEPS_DONE] = state[_STEPS_DONE] + 1
        return loss, state

    def _weight_at(self, state: _Named) -> float | Float[Array, ""]:
        """β at this step."""
        if not self.warm_up:
            return self.kl_weight
        if _STEPS_DONE not in state:
            raise ValueError(
                "warm_up needs the number of steps done: pass track_kl(guide) to SVI in place of "
                "the guide"
            )
        return self.kl_weight * jnp.minimum(1.0, state[_STEPS_DONE] / self.warm_up)

    def _weighed(self, terms: list[Term], weight: float | Array) -> Float[Array, ""]:
        """The loss with β max(KL, λ) for the cost of every latent site."""
        loss, costs, counts = jnp.zeros(()), {}, {}
        for term in terms:
            if term.is_cost:
                costs[term.name] = costs.get(term.name, 0.0) + term.total()
                counts[term.name] = term.count
            else:
                loss = loss + term.total()
        for name, cost in costs.items():
            if self.free_bits:  # without, a sampled KL may fall below 0
                cost = jnp.maximum(cost, self.free_bits * _NATS_PER_BIT * counts[name])
            loss = loss + weight * cost
        return loss

    def terms(
        self, key: Array, params: Params, model: _Program, guide: _Program, args: Any, kwargs: Any
    ) -> tuple[list[Term], _Named]:
        """What every site adds to the loss at one draw of the guide; mutable state, updated."""
        key_model, key_guide = jax.random.split(key)
        with _PlaceTimes(self):
            guide = substitute(seed(guide, key_guide), data=params)
            guide_sites = trace(guide).get_trace(*args, **kwargs)
        state = {n: s["value"] for n, s in guide_sites.items() if s["type"] == "mutable"}
        model = substitute(replay(seed(model, key_model), guide_sites), data=params)
        model_sites = trace(model).get_trace(*args, **kwargs)
        state |= {n: s["value"] for n, s in model_sites.items() if s["type"] == "mutable"}
        check_model_guide_match(model_sites, guide_sites)
        terms, said = [], {}
        for name, site in model_sites.items():
            if site["type"] != "sample":
                continue
            is_data = isinstance(_unwrap(site["fn"])[0], DataGivenFirst)
            trajectory = guide_sites.get(name + TRAJECTORY_SUFFIX) if is_data else None
            if isinstance(site["value"], SampledTimes):
                _check_order(name, model_sites, guide_sites)
                term, memory, said[name] = self._trajectory_term(site, guide_sites[name], state)
                terms.append(term)
                state |= memory
            elif trajectory is not None and isinstance(trajectory["value"], SampledTimes):
                terms.append(self._data_term(site, trajectory, said[trajectory["name"]]))
                if not site["is_observed"]:
                    terms.append(self._latent_data_term(name, guide_sites))
            elif site["is_observed"]:
                terms.append(log_p_term(site))
            elif name in guide_sites:
                is_mean_field = _is_mean_field(name, model_sites, guide_sites)
                terms += _latent_terms(site, guide_sites[name], closed_form=is_mean_field)
            else:
                raise _without_counterpart(name)
        latents = {n for n, s in model_sites.items() if _is_latent(s)}
        terms = [term._replace(is_cost=term.name in latents) for term in terms]
        return terms + auxiliary_terms(model_sites, guide_sites), state

    def draw_times(
        self, key: Array, forward: ForwardTrajectory, mean_square_kl: Float[Array, " steps"]
    ) -> tuple[Int[Array, "times *batch"], Float[Array, "times *batch"]]:
        """Times at which a trajectory is looked at, and the weight of each."""
        shape = (self.num_times, *forward.batch_shape)
        t, probability = self.times.draw(key, shape, mean_square_kl, self.first_share)
        return t, 1 / (self.num_times * probability)

    def _trajectory_term(
        self, model_site: _Named, guide_site: _Named, state: _Named
    ) -> tuple[Term, _Named, _Said | None]:
        """Loss of one trajectory site but for its data; its running mean squares if it has them.

        Last comes what the network said at x_t, where the data's term needs it too.
        """
        levels = model_site["value"]
        forward, guide_mask = _forward(guide_site), _unwrap(guide_site["fn"])[1]
        law, mask = _unwrap(model_site["fn"])
        if not isinstance(law, ReverseTrajectory):
            raise ValueError(
                f"site {model_site['name']!r} is a forward trajectory in the guide, so the model "
                f"must draw it by diffusion.reverse; got {type(law).__name__}"
            )
        if guide_mask is not None:
            mask = guide_mask if mask is None else mask & guide_mask
        name = guide_site["name"]
        if self.first_share is None:
            said, loss = None, self.step_loss(forward, law.reverse, levels.x_t, levels.t)
        else:
            said, t = _said(name, law.reverse, levels), jnp.maximum(levels.t, 2)
            loss = self.step_loss(forward, law.reverse, levels.x_t, t, said.outputs)
            loss = jnp.where(levels.t == 1, 0.0, loss)  # there it is the data's
        term = Term(
            "prior_kl", name.removesuffix(TRAJECTORY_SUFFIX), self.end_loss(forward),
            guide_site["scale"], mask, levels.weight * loss, tuple(guide_site["cond_indep_stack"]),
        )  # fmt: skip
        memory = name + _MEMORY_SUFFIX
        if memory not in state:
            return term, {}, said
        loss = jnp.where(levels.t == 1, jnp.nan, jax.lax.stop_gradient(loss))  # no step's
        return term, {memory: _remember(state[memory], levels.t, loss, mask)}, said

    def _data_term(self, site: _Named, guide_site: _Named, said: _Said | None) -> Term:
        """Loss of the data at the end of a trajectory: at x_1, or at those x_t that are x_1."""
        fn, mask = _unwrap(site["fn"])
        forward, levels = _forward(guide_site), guide_site["value"]
        if said is None:
            loss = self.data_loss(forward, fn, site["value"])
        else:
            law = fn.with_base(said.reverse.last(levels.x_t, said.outputs))
            loss = self.data_loss(forward, law, site["value"])
            loss = jnp.sum(jnp.where(levels.t == 1, levels.weight * loss, 0.0), 0)
        plates = tuple(site["cond_indep_stack"])
        return Term("reconstruction", site["name"], loss, site["scale"], mask, plates=plates)

    def _latent_data_term(self, name: str, guide_sites: _Named) -> Term:
        """log q of an x_0 that the guide draws."""
        if not self.is_bound:
            raise ValueError(
                f"site {name!r}, where a trajectory starts, must be observed under "
                f"{type(self).__name__}, which is no bound: with log q of a latent it would have "
                "no minimum. Use SampledTimeELBO, or train the diffusion on draws of the guide"
            )
        if name not in guide_sites:
            raise _without_counterpart(name)
        return log_q_term(guide_sites[name])


class SampledTimeELBO(SampledTimeLoss):
    """The bound K as an objective of `SVI`, at x_1 and at one random time per example.

    `loss` is −K summed over examples, nats, unbiased for `Trace_ELBO`'s. A step costs one call of
    the network whatever T is, and one more at x_1 where the last step is learned.

    Args:
        num_particles: Independent draws of the whole program, averaged.
        num_times: Times t per example and draw; x_1 is drawn once.
        times: Law of t: `StratifiedTimes()` by default, `UniformTimes()`, `ImportanceTimes()`.
        first_share: Probability of t = 1 in (0, 1), where the last step is learned or on a grid: t
            is drawn from 1..T, and the data's term is that of t = 1, so that a step costs one call
            of the network. If absent, every example pays a second call at its x_1. 0.05 to 0.1 do
            well: on digits of 17 grey levels and a perceptron of width 640, T = 1000, a gradient at
            0.1 costs 0.52 of the CPU time (1.11 of a tied last step's) at 1.18 times the variance
            (error 0.01); at 0.3, with width 256 and T = 100, at 1.47 times.
        kl_weight: Weight β of what latent sites cost, their KL from the guide to the model, a code
            of x_0 for one. With another than 1 the loss is no bound; nor is it with these two:
        free_bits: Bits λ of an example's KL, by site and averaged over the batch, that are not
            pressed on: the loss counts λ where the KL is less.
        warm_up: Steps over which the weight grows along a line, from 0; needs `track_kl(guide)` in
            place of the guide. `fit` evaluates held-out data by the true ELBO in all three cases,
            and `diagnostics.bound` always.
        vectorize_particles: As in `numpyro.infer.elbo.ELBO`.

    Raises:
        ValueError: if a number is no integer of at least 1, a weight is negative, or `times` is no
            law of t.

    Example:
        >>> diffusion = standard_diffusion()  # it is N(0, 1)
        >>> svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), SampledTimeELBO())
        >>> x_0 = jnp.ones(20_000)  # one example many times, to average over the noise
        >>> loss = jax.jit(svi.evaluate)(svi.init(jax.random.key(0), x_0), x_0) / 20_000
        >>> bool(abs(loss + dist.Normal(0, 1).log_prob(1.0)) < 0.1)
        True
    """

    is_bound = True

    def step_loss(
        self, forward: ForwardTrajectory, reverse: Reverse, x_t: State, t: Array,
        outputs: Outputs | None = None,
    ) -> Float[Array, "*lead"]:  # fmt: skip
        """KL( q(x_s | x_t, x_0) ‖ p(x_s | x_t) )."""
        return step_kl(forward, reverse.step(x_t, t, outputs, examples_first=True), x_t, t)

    def end_loss(self, forward: ForwardTrajectory) -> Float[Array, "*batch"]:
        """KL( q(x_T | x_0) ‖ π )."""
        return prior_kl(forward)

    def data_loss(
        self, forward: ForwardTrajectory, x_0_given_x_1: DataGivenFirst, x_0: Values
    ) -> Float[Array, "*batch"]:
        """−log p(x_0 | x_1)."""
        return -x_0_given_x_1.log_prob(x_0)


def _unwrap(fn: Any) -> tuple[Any, Any]:
    """Distribution under plates' expansions and masks, and the product of the masks (or None)."""
    mask = None
    while True:
        if isinstance(fn, dist.MaskedDistribution):
            mask = fn._mask if mask is None else mask & fn._mask
            fn = fn.base_dist
        elif isinstance(fn, dist.ExpandedDistribution):
            fn = fn.base_dist
        else:
            return fn, mask


def _is_latent(site: _Named) -> bool:
    return site["type"] == "sample" and not site["is_observed"]


def _forward(msg: _Named) -> ForwardTrajectory | None:
    """The forward trajectory at a latent sample site, for the site's whole batch."""
    if not _is_latent(msg):
        return None
    fn, _ = _unwrap(msg["fn"])
    is_forward = isinstance(fn, ForwardTrajectory)
    return fn.broadcast_to(msg["fn"].batch_shape) if is_forward else None


def bridge_at(forward: ForwardTrajectory, x_t: State, t: Int[Array, "*lead"]) -> dist.Distribution:
    """q(x_s | x_t, x_0) at given levels, elementwise."""
    x_0 = jnp.broadcast_to(forward.x_0, x_t.shape)
    return forward.kernel.bridge(x_t, x_0, forward.step_at(t))


def step_kl(
    forward: ForwardTrajectory, reverse_step: dist.Distribution, x_t: State, t: Int[Array, "*lead"]
) -> Float[Array, "*lead"]:
    """KL( q(x_s | x_t, x_0) ‖ p(x_s | x_t) ) at given levels, nats, summed over the event."""
    kl = dist.kl_divergence(bridge_at(forward, x_t, t), reverse_step)
    return forward.sum_observed(kl)


def prior_kl(forward: ForwardTrajectory) -> Float[Array, "*batch"]:
    """KL( q(x_T | x_0) ‖ π ), nats, summed over the event."""
    shape = (*forward.batch_shape, *forward.x_shape)
    t = jnp.full(forward.batch_shape, forward.steps.T)
    kl = dist.kl_divergence(forward.marginal_at(t, shape), forward.kernel.stationary(shape))
    return forward.sum_observed(kl)


def _remember(
    memory: Float[Array, " steps"], t: Int[Array, "..."], kl: Float[Array, "..."], mask: Any
) -> Float[Array, " steps"]:
    """Running mean square per step; steps without a draw keep theirs, a first draw is taken whole.

    What counts is how large KL_t has been, so non-finite and masked draws are left out.
    """
    kept = jnp.isfinite(kl) if mask is None else jnp.isfinite(kl) & mask
    index = (t - 2).reshape(-1)
    count = jnp.zeros_like(memory).at[index].add(kept.reshape(-1).astype(memory.dtype))
    square = jnp.where(kept, kl, 0.0).reshape(-1) ** 2
    mean = jnp.zeros_like(memory).at[index].add(square) / jnp.maximum(count, 1)
    blended = jnp.where(memory > 0, _MEMORY * memory + (1 - _MEMORY) * mean, mean)
    return jnp.where(count > 0, blended, memory)


def _log_prob(site: _Named) -> Float[Array, "*batch"]:
    return site["fn"].log_prob(site["value"], *filter(None, [site["intermediates"]]))


def _term(part: str, site: _Named, loss: Float[Array, "*batch"]) -> Term:
    plates = tuple(site["cond_indep_stack"])
    return Term(part, site["name"], loss, site["scale"], _unwrap(site["fn"])[1], plates=plates)


def log_p_term(site: _Named) -> Term:
    """−log p at a site of the model, whole trajectories too."""
    return _term("log_p", site, -_log_prob(site))


def log_q_term(site: _Named) -> Term:
    """log q at a site of the guide."""
    return _term("log_q", site, _log_prob(site))


def auxiliary_terms(model_sites: _Named, guide_sites: _Named) -> list[Term]:
    """log q of the guide's sites that the model has not."""
    is_own = (n for n, s in guide_sites.items() if s["type"] == "sample" and n not in model_sites)
    return [log_q_term(guide_sites[name]) for name in is_own]


def _without_counterpart(name: str) -> ValueError:
    return ValueError(
        f"site {name!r} of the model is latent and has no counterpart in the guide; "
        "a trajectory's is diffusion.forward(x_0)"
    )


def _is_mean_field(name: str, model_sites: _Named, guide_sites: _Named) -> bool:
    """Whether all latents that may be a site's parents in the model come before it in the guide.

    Only then does a closed-form KL average over the site alone.
    """

    def before(sites: _Named) -> set[str]:
        latent = [n for n, s in sites.items() if _is_latent(s)]
        return set(latent[: latent.index(name)])

    return before(model_sites) & guide_sites.keys() <= before(guide_sites)


def _check_order(name: str, model_sites: _Named, guide_sites: _Named) -> None:
    if not _is_mean_field(name, model_sites, guide_sites):
        raise ValueError(
            f"site {name!r} must come in the guide after the latents that come before it in the "
            "model, on which its KL may depend; got it before. Call diffusion.forward later"
        )


def _latent_terms(model_site: _Named, guide_site: _Named, *, closed_form: bool) -> list[Term]:
    """KL(guide ‖ model) in closed form where that is right and known, else the log-ratio."""
    if closed_form:
        try:
            kl = dist.kl_divergence(guide_site["fn"], model_site["fn"])
        except NotImplementedError:
            pass
        else:
            return [_term("kl", guide_site, kl)]
    return [log_q_term(guide_site), log_p_term(model_site)]
