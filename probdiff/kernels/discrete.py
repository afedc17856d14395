"""Diffusion of symbols: with probability β a symbol is redrawn from π, else it stays.

    T(x_t | x_s; β) = (1 − β) 1[x_t = x_s] + β π(x_t)
    q(x_t | x_0) = ᾱ_t 1[x_t = x_0] + (1 − ᾱ_t) π(x_t)

The stationary law π is all that tells the kernels apart:

    BernoulliKernel(rate)   bits, π = B(rate): x_t ~ B((1−β) x_s + rate β), binomial in 2015
    CategoricalKernel(K)    K classes, π uniform
    AbsorbingKernel(K)      K classes and a state K, "absorbed", where all end: π = 1[x = K]

The last two are the uniform and absorbing transitions of Austin et al. (2021).

Sources: Sohl-Dickstein et al. (2015), sections 2.1 and 2.4, table App. 1 and appendix B.3; Austin
et al. (2021), section 3.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float
from numpyro.distributions import constraints

from probdiff.arguments import as_array, check_at_least, check_shape, read_array
from probdiff.kernels.laws import Bits, Integers, States, Symbols, log_add, times_log
from probdiff.types import Step, as_states


class DiscreteKernel(abc.ABC):
    """Diffusion of symbols 0..K−1: with probability β_t a symbol is redrawn from π, else it stays.

    Abstract: a subclass gives π by `log_pi`, and the numbers of states, of which the data take the
    first `num_data_states`.

    Example:
        Letters are redrawn by their frequencies:

        >>> from probdiff.kernels import DiscreteKernel
        >>> class Letters(DiscreteKernel):
        ...     num_states = num_data_states = 3
        ...     @property
        ...     def log_pi(self):
        ...         return jnp.log(jnp.array([0.5, 0.3, 0.2]))
        >>> step = schedules.steps(schedules.harmonic(4)).at(2, event_dim=0)  # ᾱ_2 = 1/2
        >>> law = Letters().marginal(jnp.array(0), step)  # q(x_2 | x_0 = 0)
        >>> [round(p, 3) for p in law.probs.tolist()]
        [0.75, 0.15, 0.1]
    """

    is_discrete: ClassVar[bool] = True
    """Whether it diffuses symbols."""
    num_states: int
    """States of a level."""
    num_data_states: int
    """States that data may take, the first of all."""

    @property
    @abc.abstractmethod
    def log_pi(self) -> Float[Array | np.ndarray, "..."]:
        """log π, the states on the last axis, broadcastable to `(*event_shape, num_states)`."""

    @property
    def support(self) -> constraints.Constraint:
        """Values one symbol may take: 0..K−1."""
        return Integers(self.num_data_states)

    @property
    def dtype(self) -> type:
        """Type of a level's symbols."""
        return jnp.int32

    def to_state(self, x_0: Any) -> Symbols:
        """Data as the diffusion holds them: int32."""
        return jnp.asarray(x_0).astype(jnp.int32)

    def check_values(self, values: np.ndarray, argument: str) -> None:
        """Raise a `ValueError` unless all values are states of the data."""
        values = np.asarray(read_array(argument, values, jnp.integer, jnp.floating, jnp.bool_))
        bad = ~np.isin(values, np.arange(self.num_data_states))
        if bad.any():
            allowed, found = f"0..{self.num_data_states - 1}", np.asarray(values)[bad].ravel()[0]
            raise ValueError(
                f"{argument} must hold only {allowed} where it is observed; got {found}"
            )

    def stationary(self, shape: tuple[int, ...]) -> States | Bits:
        """Law the forward trajectory ends in, π, for each of `shape` symbols."""
        shape = (*check_shape("shape", shape), self.num_states)
        return States(jnp.broadcast_to(jnp.asarray(self.log_pi), shape))

    def transition(self, x_s: Symbols, step: Step) -> States | Bits:
        """One forward step, q(x_t | x_s) = (1−β_t) 1[x_t = x_s] + β_t π(x_t)."""
        (x_s,) = as_states(step, self.num_states, x_s=x_s)
        return self._mix(x_s, 1 - step.beta, step.beta)

    def marginal(self, x_0: Symbols, step: Step) -> States | Bits:
        """All steps up to t at once, q(x_t | x_0) = ᾱ_t 1[x_t = x_0] + (1−ᾱ_t) π(x_t)."""
        (x_0,) = as_states(step, self.num_states, x_0=x_0)
        return self._mix(x_0, step.alpha_bar_t, step.noise_t)

    def bridge(self, x_t: Symbols, x_0: Symbols, step: Step) -> States | Bits:
        """Forward process pinned at both ends, q(x_s | x_t, x_0) with s = t − 1.

        q(x_s | x_t, x_0) ∝ q(x_t | x_s) q(x_s | x_0). Ends that no trajectory joins (absorbing: x_t
        is a class other than x_0) have no law; there x_s = x_t stands in.
        """
        x_t, x_0 = as_states(step, self.num_states, x_t=x_t, x_0=x_0)
        return self.bridge_given(jnp.log(self._one_hot(x_0)), x_t, step)

    def bridge_given(
        self, log_p_0: Float[Array, "*shape K"], x_t: Symbols, step: Step
    ) -> States | Bits:
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
        log_probs = log_step + log_add(kept, redrawn)
        joined = jnp.any(reachable & (log_p_0 > -jnp.inf), -1, keepdims=True)
        return States(jnp.where(joined, log_probs, jnp.log(one_hot_t)))

    def expected_log_stationary(self, law: States) -> Float[Array, "*shape"]:
        """E[log π(x)] under an elementwise law, nats; eq. 14 takes it for a constant."""
        return jnp.sum(times_log(law.probs, jnp.asarray(self.log_pi)), -1)

    def _mix(self, x: Symbols, stay: ArrayLike, redraw: ArrayLike) -> States | Bits:
        pi = jnp.exp(jnp.asarray(self.log_pi))
        stay, redraw = jnp.asarray(stay)[..., None], jnp.asarray(redraw)[..., None]
        return States(jnp.log(stay * self._one_hot(x) + redraw * pi))

    def _one_hot(self, x: Symbols) -> Float[Array, "*shape K"]:
        return jax.nn.one_hot(x, self.num_states, dtype=jnp.result_type(float))


@dataclasses.dataclass(frozen=True)
class BernoulliKernel(DiscreteKernel):
    """Binomial diffusion of bits, x_t ~ B((1−β) x_s + rate · β), with stationary law B(rate).

    Args:
        rate: Mean activity of a bit under π, in (0, 1): a number, or one for each bit of an example
            as nested tuples (an array is turned into them).

    Example:
        >>> kernel = BernoulliKernel(0.2)
        >>> step = schedules.steps(schedules.harmonic(4)).at(2, event_dim=1)  # ᾱ_2 = 1/2
        >>> law = kernel.marginal(jnp.array([0, 1]), step)  # ᾱ_2 x_0 + (1 − ᾱ_2) rate
        >>> [round(p, 3) for p in law.mean.tolist()]
        [0.1, 0.6]
    """

    rate: float | tuple[Any, ...] | np.ndarray = 0.5

    num_states: ClassVar[int] = 2
    num_data_states: ClassVar[int] = 2

    def __post_init__(self) -> None:
        rate = np.asarray(as_array("rate", self.rate), np.float64)
        if not rate.size or not ((rate > 0) & (rate < 1)).all():
            raise ValueError(f"rate must lie in (0, 1); got {self.rate}")
        object.__setattr__(self, "rate", _as_tuples(rate.tolist()))

    @property
    def log_pi(self) -> np.ndarray:
        """log (1 − rate, rate)."""
        return np.log(np.stack([1 - self._m, self._m], -1)).astype(jnp.result_type(float))

    @property
    def _m(self) -> np.ndarray:
        return np.asarray(self.rate)

    # A logit of a bit has only two values per step, for x = 0 and for x = 1: they are computed per
    # step and chosen per bit, which makes a law as cheap as the network's last layer.

    def stationary(self, shape: tuple[int, ...]) -> Bits:
        """B(rate) for each of `shape` bits."""
        logit = np.log(self._m) - np.log1p(-self._m)
        logit = jnp.asarray(logit, jnp.result_type(float))
        try:
            return Bits(jnp.broadcast_to(logit, check_shape("shape", shape)))
        except ValueError as error:
            raise ValueError(f"shape must fit the rate, of shape {logit.shape}: {error}") from None

    def bridge(self, x_t: Symbols, x_0: Symbols, step: Step) -> Bits:
        """Forward process pinned at both ends, q(x_s | x_t, x_0), s = t − 1: the logits add up."""
        x_t, x_0 = as_states(step, self.num_states, x_t=x_t, x_0=x_0)
        prior = self._mix(x_0, step.alpha_bar_s, step.noise_s)
        return Bits(self._log_ratio(x_t, step) + prior.logit)

    def bridge_given(self, log_p_0: Float[Array, "*shape 2"], x_t: Symbols, step: Step) -> Bits:
        """The bridge averaged over a law of x_0, given by its log-probabilities."""
        return self.bridge_of_logit(log_p_0[..., 1] - log_p_0[..., 0], x_t, step)

    def bridge_of_logit(self, z: Float[Array, "*shape"], x_t: Symbols, step: Step) -> Bits:
        """The bridge averaged over x_0 ~ B(sigmoid(z)).

        With Z_j = q(x_t | x_0 = j) and a(k, j) = q(x_s = k | x_0 = j), the odds of x_s = 1 are

            q(x_t | 1) [e^z a(1, 1)/Z_1 + a(1, 0)/Z_0]
            ------------------------------------------.
            q(x_t | 0) [e^z a(0, 1)/Z_1 + a(0, 0)/Z_0]
        """
        m = self._m
        one, zero = step.alpha_bar_s + step.noise_s * m, step.noise_s * m  # a(1, 1), a(1, 0)
        stay, redraw = step.alpha_bar_t, step.noise_t
        z += self._choose(  # log Z_0 − log Z_1
            x_t,
            jnp.log(redraw * m) - jnp.log(stay + redraw * m),
            jnp.log(stay + redraw * (1 - m)) - jnp.log(redraw * (1 - m)),
        )
        up = jnp.logaddexp(z + jnp.log(one), jnp.log(zero))
        down = jnp.logaddexp(
            z + jnp.log(step.noise_s * (1 - m)), jnp.log(step.alpha_bar_s + step.noise_s * (1 - m))
        )
        return Bits(self._log_ratio(x_t, step) + up - down)

    def expected_log_stationary(self, law: Bits) -> Float[Array, "*shape"]:
        """E[log π(x)] under an elementwise law, nats."""
        return law.mean * np.log(self._m) + (1 - law.mean) * np.log1p(-self._m)

    def _mix(self, x: Symbols, stay: ArrayLike, redraw: ArrayLike) -> Bits:
        m = self._m
        if_one = jnp.log(stay + redraw * m) - jnp.log(redraw * (1 - m))
        if_zero = jnp.log(redraw * m) - jnp.log(stay + redraw * (1 - m))
        return Bits(self._choose(x, if_one, if_zero))

    def _log_ratio(self, x_t: Symbols, step: Step) -> Float[Array, "*shape"]:
        """log q(x_t | x_s = 1)/q(x_t | x_s = 0)."""
        m, beta = self._m, step.beta
        if_one = jnp.log(1 - beta + beta * m) - jnp.log(beta * m)
        if_zero = jnp.log(beta * (1 - m)) - jnp.log(1 - beta + beta * (1 - m))
        return self._choose(x_t, if_one, if_zero)

    def _choose(self, x: Symbols, if_one: Array, if_zero: Array) -> Array:
        """The value of each bit, of the two that its step has."""
        return jnp.where(jnp.asarray(x) == 1, if_one, if_zero).astype(jnp.result_type(float))


@dataclasses.dataclass(frozen=True)
class CategoricalKernel(DiscreteKernel):
    """Diffusion of classes 0..K−1 with uniform redraws: π = 1/K.

    Args:
        num_classes: K, at least 2.

    Example:
        >>> step = schedules.steps(schedules.harmonic(4)).at(2, event_dim=0)  # ᾱ_2 = 1/2
        >>> law = CategoricalKernel(4).marginal(jnp.array(0), step)  # ½ 1[x = 0] + ½ · ¼
        >>> [round(p, 3) for p in law.probs.tolist()]
        [0.625, 0.125, 0.125, 0.125]
    """

    num_classes: int

    def __post_init__(self) -> None:
        check_at_least(2, num_classes=self.num_classes)

    @property
    def num_states(self) -> int:
        """K."""
        return self.num_classes

    num_data_states = num_states

    @property
    def log_pi(self) -> np.ndarray:
        """−log K for every class."""
        return np.full(self.num_classes, -np.log(self.num_classes), jnp.result_type(float))


@dataclasses.dataclass(frozen=True)
class AbsorbingKernel(DiscreteKernel):
    """Diffusion of classes 0..K−1 that turn, one after another, into the state K, where they stay.

    π puts no mass on data, so there is no tied last step and no log-likelihood under π to compare
    with; the schedule must end at β_T = 1, or data would not all be absorbed.

    Args:
        num_classes: K, at least 2; levels of the diffusion have K + 1 states.

    Example:
        >>> step = schedules.steps(schedules.harmonic(4)).at(2, event_dim=0)  # ᾱ_2 = 1/2
        >>> law = AbsorbingKernel(3).marginal(jnp.array(0), step)  # itself, or absorbed
        >>> [round(p, 3) for p in law.probs.tolist()]
        [0.5, 0.0, 0.0, 0.5]
    """

    num_classes: int

    def __post_init__(self) -> None:
        check_at_least(2, num_classes=self.num_classes)

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


def _as_tuples(value: Any) -> Any:
    """Nested lists as nested tuples, so that a kernel can be hashed and compared."""
    return tuple(_as_tuples(v) for v in value) if isinstance(value, list) else value
