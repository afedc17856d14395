"""Laws of a symbol and of a bit, elementwise, and the KL between two of them.

Near the data most probabilities are 1e-4 or less from 0 or 1, and there are thousands of steps
whose KL is as small; so laws are held by log-probabilities (`States`) or the logit (`Bits`), and

    KL(q ‖ p) = Σ q (e^d − 1 − d),    d = log p − log q,

which is −Σ q d, since Σ q (e^d − 1) = 0, but adds up terms of the size of the result.

NumPyro's own `Bernoulli` and `Categorical` are not used because their KL subtracts numbers of order
one, and because `SVI` warns of sites with discrete support (see `Integers`).
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int
from numpyro.distributions import constraints
from numpyro.distributions.kl import kl_divergence

from probdiff.arguments import as_array

Symbols = Int[Array, "*shape"]


class Integers(constraints.Constraint):
    """Integers 0..K−1 that do not call themselves discrete.

    NumPyro warns about discrete latent sites because a guide with parameters would need a
    score-function term. The forward trajectory has none, so no term is missing; and as no bijection
    to the reals is registered for this constraint, gradient-based MCMC refuses the site.
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
        return isinstance(other, Integers) and self.num_states == other.num_states

    def __hash__(self) -> int:
        return hash(self.num_states)

    def tree_flatten(self) -> tuple[tuple[()], tuple[Any, dict[str, int]]]:
        return (), ((), {"num_states": self.num_states})


class States(dist.Distribution):
    """Law of a symbol 0..K−1, elementwise, as a NumPyro distribution; int32 draws.

    Args:
        log_probs: Log-probabilities, nats, normalised, the K states on the last axis; −∞ is
            allowed.

    Example:
        >>> from numpyro.distributions import kl_divergence
        >>> from probdiff.kernels import States
        >>> law = States(jnp.log(jnp.array([0.5, 0.25, 0.25])))
        >>> law.batch_shape, law.event_shape
        ((), ())
        >>> round(float(law.entropy() / jnp.log(2.0)), 3)  # bits: ½ · 1 + ¼ · 2 + ¼ · 2
        1.5
        >>> uniform = States(jnp.log(jnp.ones(3) / 3))
        >>> gap = kl_divergence(law, uniform) - (jnp.log(3.0) - law.entropy())
        >>> bool(abs(gap) < 1e-6)  # KL(q ‖ 1/K) = log K − H(q)
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("log_probs",)
    has_rsample = False

    def __init__(self, log_probs: Float[Array, "*shape K"]):
        self.log_probs = log_probs = as_array("log_probs", log_probs, ..., "K")
        if not log_probs.shape[-1]:
            raise ValueError(f"log_probs must be of one state or more; got shape {log_probs.shape}")
        super().__init__(log_probs.shape[:-1], ())

    @property
    def support(self) -> constraints.Constraint:
        return Integers(self.log_probs.shape[-1])

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
        return -jnp.sum(times_log(self.probs, self.log_probs), -1)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Symbols:
        shape = (*sample_shape, *self.batch_shape)
        u = _uniform(key, shape)
        probs = self.probs
        last_to_first = jnp.cumsum(probs[..., :0:-1], -1)
        last_to_first /= last_to_first[..., -1:] + probs[..., :1]  # exactly 1 where p(0) = 0
        return jnp.sum(u[..., None] < last_to_first, -1, dtype=jnp.int32)

    def log_prob(self, value: Any, intermediates: Any = None) -> Float[Array, "*shape"]:
        states = jnp.arange(self.log_probs.shape[-1])
        chosen = jnp.asarray(value)[..., None] == states
        return jnp.max(jnp.where(chosen, self.log_probs, -jnp.inf), -1)


class Bits(dist.Distribution):
    """Law of a bit, elementwise, as a NumPyro distribution held by its logit; int32 draws.

    Args:
        logit: log p(1)/p(0), any real number or ±∞.

    Example:
        >>> from probdiff.kernels import Bits
        >>> law = Bits(jnp.array([0.0, jnp.log(3.0), 40.0]))
        >>> [round(p, 2) for p in law.mean.tolist()]
        [0.5, 0.75, 1.0]
        >>> f"{law.log_prob(jnp.array(0))[2]:.0f}"  # a probability of 4e-18 keeps its logarithm
        '-40'
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("logit",)
    has_rsample = False

    def __init__(self, logit: Float[Array, "*shape"]):
        self.logit = logit = as_array("logit", logit)
        super().__init__(jnp.shape(logit), ())

    @property
    def support(self) -> constraints.Constraint:
        return Integers(2)

    @property
    def log_probs(self) -> Float[Array, "*shape 2"]:
        """Log-probabilities of 0 and 1 on a new last axis."""
        return jnp.stack([jax.nn.log_sigmoid(-self.logit), jax.nn.log_sigmoid(self.logit)], -1)

    @property
    def probs(self) -> Float[Array, "*shape 2"]:
        """Probabilities of 0 and 1 on a new last axis."""
        return jnp.stack([jax.nn.sigmoid(-self.logit), jax.nn.sigmoid(self.logit)], -1)

    @property
    def mean(self) -> Float[Array, "*shape"]:
        """Probability of 1."""
        return jax.nn.sigmoid(self.logit)

    def entropy(self) -> Float[Array, "*shape"]:
        """−Σ q log q, nats."""
        return -jnp.sum(times_log(self.probs, self.log_probs), -1)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Symbols:
        u = _uniform(key, (*sample_shape, *self.batch_shape))
        return (u < jax.nn.sigmoid(self.logit)).astype(jnp.int32)

    def log_prob(self, value: Any, intermediates: Any = None) -> Float[Array, "*shape"]:
        value = jnp.asarray(value)
        log_p = jax.nn.log_sigmoid(jnp.where(value == 1, self.logit, -self.logit))
        return jnp.where((value == 0) | (value == 1), log_p, -jnp.inf)


def _uniform(key: Array, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
    """Uniforms in (0, 1) from 32 random bits: from 23, what has probability 1e-8 comes at 1e-7."""
    u = (jax.random.bits(key, shape, jnp.uint32).astype(float) + 0.5) * 2.0**-32
    return jnp.minimum(u, 1 - 2.0**-24)  # float32 rounds the topmost to 1, which is no quantile


def times_log(p: Array, log_q: Array) -> Array:
    """p log q with 0 log 0 = 0."""
    return jnp.where(p > 0, p * jnp.where(p > 0, log_q, 0.0), 0.0)


def log_add(a: Array, b: Array) -> Array:
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


@kl_divergence.register(Bits, Bits)
def _kl_of_bits(q: Bits, p: Bits) -> Float[Array, "*shape"]:
    """Σ q (e^d − 1 − d) over 0 and 1; a value impossible under q adds its p."""
    total = 0.0
    for sign in (-1.0, 1.0):
        log_q, log_p = jax.nn.log_sigmoid(sign * q.logit), jax.nn.log_sigmoid(sign * p.logit)
        possible = log_q > -jnp.inf
        d = jnp.where(possible, log_p - jnp.where(possible, log_q, 0.0), 0.0)
        total += jnp.where(possible, jnp.exp(log_q) * (jnp.expm1(d) - d), jnp.exp(log_p))
    return total
