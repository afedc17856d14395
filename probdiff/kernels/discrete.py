"""Diffusion of symbols: with probability β a symbol is redrawn from π, else it stays.

    T(x_t | x_s; β) = (1 − β) 1[x_t = x_s] + β π(x_t)
    q(x_t | x_0) = ᾱ_t 1[x_t = x_0] + (1 − ᾱ_t) π(x_t)

The stationary law π is all that tells the kernels apart:

    BernoulliKernel(rate)   bits, π = B(rate): x_t ~ B((1−β) x_s + rate β), binomial in 2015
    CategoricalKernel(K)    K classes, π uniform
    AbsorbingKernel(K)      K classes and a state K, "absorbed", where all end: π = 1[x = K]

(The last two are the uniform and absorbing transitions of Austin et al. 2021.) Laws of a symbol are
held by their log-probabilities, `States`: near the data most of them are 1e-4 or less from 0 or 1,
and KL = Σ q (e^d − 1 − d) with d = log p − log q keeps its digits there, since Σ q (e^d − 1) = 0.

Sources: Sohl-Dickstein et al. (2015), table App. 1 and appendix B.3; Austin et al. (2021).
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int
from numpyro.distributions import constraints
from numpyro.distributions.kl import kl_divergence

from probdiff.types import Step

Symbols = Int[Array, "*shape"]


class _Latent(constraints.Constraint):
    """Integers 0..K−1 that do not call themselves discrete.

    NumPyro warns about discrete latent sites because a guide with parameters would need a
    score-function term. The forward chain has none, so no term is missing; and as no bijection to
    the reals is registered for this constraint, gradient-based MCMC refuses the site.
    """

    is_discrete = False
    event_dim = 0

    def __init__(self, num_states: int):
        self.num_states = num_states

    def __call__(self, x: Any) -> Any:
        return (x >= 0) & (x < self.num_states) & (x % 1 == 0)

    def feasible_like(self, prototype: Any) -> Any:
        return jnp.zeros_like(prototype)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Latent) and self.num_states == other.num_states

    def __hash__(self) -> int:
        return hash(self.num_states)

    def tree_flatten(self) -> tuple[tuple[()], tuple[Any, dict[str, int]]]:
        return (), ((), {"num_states": self.num_states})


class States(dist.Distribution):
    """Law of a symbol 0..K−1, elementwise: log-probabilities on the last axis, int32 draws."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("log_probs",)

    def __init__(self, log_probs: Float[Array, "*shape K"]):
        self.log_probs = log_probs
        super().__init__(log_probs.shape[:-1], ())

    @property
    def has_rsample(self) -> bool:
        return False

    @property
    def support(self) -> constraints.Constraint:
        return _Latent(self.log_probs.shape[-1])

    @property
    def probs(self) -> Float[Array, "*shape K"]:
        """Probabilities, one for each state."""
        return jnp.exp(self.log_probs)

    @property
    def mean(self) -> Float[Array, "*shape"]:
        """E[x]: for bits, the probability of 1."""
        return jnp.sum(self.probs * jnp.arange(self.log_probs.shape[-1]), -1)

    def entropy(self) -> Float[Array, "*shape"]:
        """−Σ q log q, nats."""
        return -jnp.sum(_times_log(self.probs, self.log_probs), -1)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Symbols:
        shape = (*sample_shape, *self.batch_shape)
        # 32 random bits, not 23: a state of probability 1e-8 must not come up as often as 1e-7
        u = (jax.random.bits(key, shape, jnp.uint32).astype(float) + 0.5) * 2.0**-32
        u = jnp.minimum(u, 1 - 2.0**-24)  # float32 rounds the topmost to 1, which is no quantile
        last_to_first = jnp.cumsum(self.probs[..., :0:-1], -1)
        return jnp.sum(u[..., None] < last_to_first, -1, dtype=jnp.int32)

    def log_prob(self, value: Any, intermediates: Any = None) -> Float[Array, "*shape"]:
        states = jnp.arange(self.log_probs.shape[-1])
        chosen = jnp.asarray(value)[..., None] == states
        return jnp.max(jnp.where(chosen, self.log_probs, -jnp.inf), -1)


def _times_log(p: Array, log_q: Array) -> Array:
    """p log q with 0 log 0 = 0."""
    return jnp.where(p > 0, p * jnp.where(p > 0, log_q, 0.0), 0.0)


def _log_add(a: Array, b: Array) -> Array:
    """log(e^a + e^b); where both are −∞ the gradient is 0, not NaN."""
    possible = jnp.maximum(a, b) > -jnp.inf
    sum_ = jnp.logaddexp(jnp.where(possible, a, 0.0), jnp.where(possible, b, 0.0))
    return jnp.where(possible, sum_, -jnp.inf)


@kl_divergence.register(States, States)
def _kl_of_states(q: States, p: States) -> Float[Array, "*shape"]:
    """KL(q ‖ p) = Σ q (e^d − 1 − d), d = log p − log q; a state impossible under q adds p."""
    possible = q.log_probs > -jnp.inf
    d = jnp.where(possible, p.log_probs - jnp.where(possible, q.log_probs, 0.0), 0.0)
    return jnp.sum(jnp.where(possible, q.probs * (jnp.expm1(d) - d), p.probs), -1)


class DiscreteKernel(abc.ABC):
    """Replacement by draws from π; the subclasses give π."""

    num_states: int
    """States of a level."""
    num_data_states: int
    """States that data may take, the first of all."""

    @property
    @abc.abstractmethod
    def log_pi(self) -> Float[Any, "..."]:
        """log π, the states on the last axis, broadcastable to `(*event_shape, num_states)`."""

    @property
    def support(self) -> constraints.Constraint:
        """Values one symbol may take: 0..K−1."""
        return _Latent(self.num_data_states)

    @property
    def dtype(self) -> Any:
        """Type of a level's symbols."""
        return jnp.int32

    def to_state(self, x_0: Any) -> Symbols:
        """Data as the chain holds them: int32."""
        return jnp.asarray(x_0).astype(jnp.int32)

    def check_values(self, values: np.ndarray) -> None:
        """Raise a `ValueError` unless all values are states of the data."""
        bad = ~np.isin(values, np.arange(self.num_data_states))
        if bad.any():
            raise ValueError(
                f"x_0 must hold only 0..{self.num_data_states - 1} where it is observed; got "
                f"{np.asarray(values)[bad].ravel()[0]}"
            )

    def stationary(self, shape: tuple[int, ...]) -> States:
        """Law the chain ends in, π, for each of `shape` symbols."""
        return States(jnp.broadcast_to(jnp.asarray(self.log_pi), (*shape, self.num_states)))

    def transition(self, x_s: Symbols, step: Step) -> States:
        """One forward step, q(x_t | x_s) = (1−β_t) 1[x_t = x_s] + β_t π(x_t)."""
        return self._mix(x_s, 1 - step.beta, step.beta)

    def marginal(self, x_0: Symbols, step: Step) -> States:
        """All steps up to t at once, q(x_t | x_0) = ᾱ_t 1[x_t = x_0] + (1−ᾱ_t) π(x_t)."""
        return self._mix(x_0, step.alpha_bar_t, step.noise_t)

    def bridge(self, x_t: Symbols, x_0: Symbols, step: Step) -> States:
        """Forward process pinned at both ends, q(x_s | x_t, x_0) with s = t − 1.

        q(x_s | x_t, x_0) ∝ q(x_t | x_s) q(x_s | x_0). Ends that no chain joins (an absorbing chain
        that left x_0 for another class) have no law; there x_s = x_t stands in.

        Source: Sohl-Dickstein et al. (2015), section 2.4 and appendix B.3.
        """
        return self.bridge_given(jnp.log(self._one_hot(x_0)), x_t, step)

    def bridge_given(self, log_p_0: Float[Array, "*shape K"], x_t: Symbols, step: Step) -> States:
        """The bridge averaged over a law of x_0: Σ_j p(x_0 = j) q(x_s | x_t, x_0 = j).

        With Z_j = q(x_t | x_0 = j), the probability of x_s = k is

            q(x_t | x_s = k) [ᾱ_s p_k / Z_k + (1−ᾱ_s) π_k Σ_j p_j / Z_j].

        States j from which x_t cannot come are left out of p.
        """
        expand = Step(*(jnp.asarray(c)[..., None] for c in step))
        one_hot_t = self._one_hot(x_t)
        pi = jnp.exp(jnp.asarray(self.log_pi))
        pi_t = jnp.sum(one_hot_t * pi, -1, keepdims=True)
        log_z = jnp.log(expand.alpha_bar_t * one_hot_t + expand.noise_t * pi_t)
        reachable = log_z > -jnp.inf
        log_p = jax.nn.log_softmax(jnp.where(reachable, log_p_0, -jnp.inf), -1)
        ratio = jnp.where(reachable, log_p - jnp.where(reachable, log_z, 0.0), -jnp.inf)
        kept = jnp.log(expand.alpha_bar_s) + ratio
        redrawn = jnp.log(expand.noise_s) + self.log_pi + jax.nn.logsumexp(ratio, -1, keepdims=True)
        log_step = jnp.log((1 - expand.beta) * one_hot_t + expand.beta * pi_t)
        log_probs = log_step + _log_add(kept, redrawn)
        joined = jnp.any(reachable & (log_p_0 > -jnp.inf), -1, keepdims=True)
        return States(jnp.where(joined, log_probs, jnp.log(one_hot_t)))

    def expected_log_stationary(self, law: States) -> Float[Array, "*shape"]:
        """E[log π(x)] under an elementwise law, nats; eq. 14 takes it for a constant."""
        return jnp.sum(_times_log(law.probs, jnp.asarray(self.log_pi)), -1)

    def _mix(self, x: Symbols, stay: Any, redraw: Any) -> States:
        pi = jnp.exp(jnp.asarray(self.log_pi))
        stay, redraw = jnp.asarray(stay)[..., None], jnp.asarray(redraw)[..., None]
        return States(jnp.log(stay * self._one_hot(x) + redraw * pi))

    def _one_hot(self, x: Symbols) -> Float[Array, "*shape K"]:
        return jax.nn.one_hot(x, self.num_states, dtype=jnp.result_type(float))


@dataclasses.dataclass(frozen=True)
class BernoulliKernel(DiscreteKernel):
    """Binomial diffusion of bits, x_t ~ B((1−β) x_s + rate · β), with stationary law B(rate)."""

    rate: float | tuple[Any, ...] | np.ndarray = 0.5
    """Mean activity of a bit at the end of the chain, in (0, 1): a number, or one for each bit of
    an example as nested tuples (an array is turned into them)."""

    num_states: ClassVar[int] = 2
    num_data_states: ClassVar[int] = 2

    def __post_init__(self) -> None:
        rate = np.asarray(self.rate, np.float64)
        if not ((rate > 0) & (rate < 1)).all():
            raise ValueError(f"rate must lie in (0, 1); got {self.rate}")
        object.__setattr__(self, "rate", _as_tuples(rate.tolist()))

    @property
    def log_pi(self) -> np.ndarray:
        """log (1 − rate, rate)."""
        rate = np.asarray(self.rate)
        return np.log(np.stack([1 - rate, rate], -1)).astype(jnp.result_type(float))


@dataclasses.dataclass(frozen=True)
class CategoricalKernel(DiscreteKernel):
    """Classes 0..K−1 with uniform redraws: π = 1/K."""

    num_classes: int

    def __post_init__(self) -> None:
        _check_classes(self.num_classes)

    @property
    def num_states(self) -> int:
        """K."""
        return self.num_classes

    @property
    def num_data_states(self) -> int:
        """K."""
        return self.num_classes

    @property
    def log_pi(self) -> np.ndarray:
        """−log K for every class."""
        return np.full(self.num_classes, -np.log(self.num_classes), jnp.result_type(float))


@dataclasses.dataclass(frozen=True)
class AbsorbingKernel(DiscreteKernel):
    """Classes 0..K−1 that turn, one after another, into the state K, where they stay.

    π puts no mass on data, so there is no tied last step and no log-likelihood under π to compare
    with; the schedule must end at β_T = 1, or data would not all be absorbed.
    """

    num_classes: int

    def __post_init__(self) -> None:
        _check_classes(self.num_classes)

    @property
    def num_states(self) -> int:
        """K + 1: the classes, and "absorbed"."""
        return self.num_classes + 1

    @property
    def num_data_states(self) -> int:
        """K."""
        return self.num_classes

    @property
    def log_pi(self) -> np.ndarray:
        """0 for the state K, −∞ for every class."""
        absorbed = np.arange(self.num_states) == self.num_classes
        return np.where(absorbed, 0.0, -np.inf).astype(jnp.result_type(float))


def _check_classes(num_classes: int) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2; got {num_classes}")


def _as_tuples(value: Any) -> Any:
    """Nested lists as nested tuples, so that a kernel can be hashed and compared."""
    return tuple(_as_tuples(v) for v in value) if isinstance(value, list) else value
