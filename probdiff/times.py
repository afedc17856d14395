"""Laws of the times t in 2..T at which an objective looks at a trajectory.

With t drawn from P(t) and what is found at t divided by P(t), a sum over all steps is estimated
without bias, whatever P. The laws differ in the estimate's variance:

    UniformTimes       independent, each uniform
    StratifiedTimes    uniform too, but spread evenly over the batch: u_i = (u + i/n) mod 1
    ImportanceTimes    P(t) ∝ root mean square of KL_t in past steps, mixed with 10 % uniform

Source: Kingma et al. (2021) for the common random offset.
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from probdiff.arguments import (
    INNER_SHARE,
    POSITIVE_SHARE,
    as_array,
    check_key,
    check_number,
    check_shape,
)


def _per_step(mean_square_kl: Array) -> Array:
    mean_square_kl = as_array("mean_square_kl", mean_square_kl, "steps")
    if not len(mean_square_kl):
        raise ValueError("mean_square_kl must hold a number for each step; got none")
    return jnp.asarray(mean_square_kl)


class Times(abc.ABC):
    """How the times t in 2..T are drawn, one per example (times `num_times`)."""

    tracks_kl: bool = False
    """Whether the law of t follows the KL of past steps."""

    @abc.abstractmethod
    def uniforms(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Numbers in [0, 1), each uniform by itself; turned into t by the inverse of P's CDF."""

    def law(self, mean_square_kl: Float[Array, " steps"]) -> Float[Array, " steps"]:
        """P(t) for t = 2..T."""
        mean_square_kl = _per_step(mean_square_kl)
        return jnp.full(mean_square_kl.shape, 1 / mean_square_kl.shape[0])

    def draw(
        self, key: Array, shape: tuple[int, ...], mean_square_kl: Float[Array, " steps"],
        first_share: float | None = None,
    ) -> tuple[Int[Array, "..."], Float[Array, "..."]]:  # fmt: skip
        """Times in 2..T of the given shape, and their probabilities.

        With a `first_share` in (0, 1) they are in 1..T, and that is the probability of t = 1.
        """
        check_number(INNER_SHARE, or_none=True, first_share=first_share)
        law, least = self.law(mean_square_kl), 2
        if first_share is not None:
            first, least = jnp.full(1, first_share, law.dtype), 1
            law = jnp.concatenate([first, (1 - first_share) * law])
        cdf = jnp.cumsum(law)
        index = jnp.searchsorted(cdf / cdf[-1], self.uniforms(key, shape), side="right")
        index = jnp.minimum(index, law.shape[0] - 1)  # u may round up to 1
        return index + least, law[index]


@dataclasses.dataclass(frozen=True)
class UniformTimes(Times):
    """Independent times, each uniform on 2..T, for comparison with `StratifiedTimes`.

    Example:
        >>> t, probability = UniformTimes().draw(jax.random.key(0), (100,), jnp.zeros(4))  # T = 5
        >>> sorted(set(t.tolist())), set(probability.tolist())
        ([2, 3, 4, 5], {0.25})
    """

    def uniforms(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Independent uniforms."""
        check_key(key)
        return jax.random.uniform(key, check_shape("shape", shape))


@dataclasses.dataclass(frozen=True)
class StratifiedTimes(Times):
    """Uniform times spread evenly over the batch: u_i = (u + i/n) mod 1 with one random u.

    Example:
        >>> t, _ = StratifiedTimes().draw(jax.random.key(0), (8,), jnp.zeros(4))  # T = 5
        >>> sorted(t.tolist())  # of 8 examples 2 get each of the 4 times
        [2, 2, 3, 3, 4, 4, 5, 5]

    Source: Kingma et al. (2021).
    """

    def uniforms(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """One in every interval of length 1/n."""
        check_key(key)
        n = math.prod(check_shape("shape", shape))
        return ((jax.random.uniform(key) + jnp.arange(n) / n) % 1.0).reshape(shape)


@dataclasses.dataclass(frozen=True)
class ImportanceTimes(Times):
    """Stratified times with P(t) ∝ √E[KL_t²] of past steps, mixed with a uniform share.

    The guide has to keep the running mean squares: pass `track_kl(guide)` to `SVI`.

    Args:
        uniform_share: Share of the uniform law in P, in (0, 1]; it keeps the weights 1/P(t) small.

    Raises:
        ValueError: if the share is outside (0, 1].

    Example:
        >>> mean_square_kl = jnp.array([9.0, 1.0])  # of t = 2 and t = 3, nats²
        >>> law = ImportanceTimes(uniform_share=0.1).law(mean_square_kl)
        >>> [round(p, 3) for p in law.tolist()]  # 0.9 · (3/4, 1/4) + 0.1 · (1/2, 1/2)
        [0.725, 0.275]

    Source: Nichol & Dhariwal (2021), section 3.3, for the law.
    """

    uniform_share: float = 0.1
    tracks_kl = True

    def __post_init__(self) -> None:
        check_number(POSITIVE_SHARE, uniform_share=self.uniform_share)  # 0: weights without limit

    def uniforms(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Those of `StratifiedTimes`."""
        return StratifiedTimes().uniforms(key, shape)

    def law(self, mean_square_kl: Float[Array, " steps"]) -> Float[Array, " steps"]:
        """Proportional to the root mean square; a step never visited counts as the largest."""
        root = jnp.sqrt(_per_step(mean_square_kl))
        largest = jnp.max(root)
        root = jnp.where(root > 0, root, jnp.where(largest > 0, largest, 1.0))
        uniform = 1 / root.shape[0]
        return (1 - self.uniform_share) * root / jnp.sum(root) + self.uniform_share * uniform
