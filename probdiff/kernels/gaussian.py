"""Gaussian diffusion: shrink, then add noise, so that N(0, 1) stays N(0, 1).

    T(x_t | x_s; β) = N(√(1−β) x_s, β),    q(x_t | x_0) = N(√ᾱ_t x_0, 1 − ᾱ_t)

Source: Sohl-Dickstein et al. (2015), section 2.1 and table App. 1.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import constraints

from probdiff.types import Step


@dataclasses.dataclass(frozen=True)
class GaussianKernel:
    """Gaussian diffusion with stationary law N(0, 1): T(x_t | x_s; β) = N(√(1−β) x_s, β)."""

    @property
    def support(self) -> constraints.Constraint:
        """Values one number may take: the real line."""
        return constraints.real

    @property
    def dtype(self) -> Any:
        """Type of a level's numbers: JAX's default float."""
        return jnp.result_type(float)

    def to_state(self, x_0: Any) -> Any:
        """Data as the chain holds them: unchanged."""
        return x_0

    def check_values(self, values: np.ndarray, argument: str = "x_0") -> None:
        """Raise a `ValueError` unless the values are finite real numbers."""
        if not np.isfinite(values).all():
            raise ValueError(
                f"{argument} must be finite where it is observed; got "
                f"{np.sum(~np.isfinite(values))} values that are not"
            )

    def expected_log_stationary(self, law: dist.Normal) -> Float[Array, "..."]:
        """E[log π(x)] under an elementwise Normal, nats; eq. 14 takes it for a constant."""
        return -0.5 * (math.log(2 * math.pi) + law.loc**2 + law.scale**2)

    def stationary(self, shape: tuple[int, ...]) -> dist.Distribution:
        """Law the chain ends in, π = N(0, 1), for each of `shape` numbers."""
        return dist.Normal(jnp.zeros(shape), 1.0)

    def transition(self, x_s: Float[Array, "*shape"], step: Step) -> dist.Distribution:
        """One forward step, q(x_t | x_s) = N(√(1−β_t) x_s, β_t)."""
        return dist.Normal(jnp.sqrt(1 - step.beta) * x_s, jnp.sqrt(step.beta))

    def marginal(self, x_0: Float[Array, "*shape"], step: Step) -> dist.Distribution:
        """All steps up to t at once, q(x_t | x_0) = N(√ᾱ_t x_0, 1 − ᾱ_t)."""
        return dist.Normal(jnp.sqrt(step.alpha_bar_t) * x_0, jnp.sqrt(step.noise_t))

    def bridge(
        self, x_t: Float[Array, "*shape"], x_0: Float[Array, "*shape"], step: Step
    ) -> dist.Distribution:
        """Forward process pinned at both ends, q(x_s | x_t, x_0) with s = t − 1; needs t ≥ 2.

        q(x_s | x_t, x_0) ∝ q(x_t | x_s) q(x_s | x_0), a product of two Gaussians in x_s.

        Source: Sohl-Dickstein et al. (2015), section 2.4 and appendix B.3.
        """
        mean = bridge_mean(x_t, x_0, step)
        variance = step.beta * step.noise_s / step.noise_t
        return dist.Normal(mean, jnp.sqrt(variance))


def bridge_weights(step: Step) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Weights (w_0, w_t) of the Gaussian bridge's mean w_0 x_0 + w_t x_t; (1, 0) at t = 1."""
    weight_0 = jnp.sqrt(step.alpha_bar_s) * step.beta / step.noise_t
    weight_t = jnp.sqrt(1 - step.beta) * step.noise_s / step.noise_t
    return weight_0, weight_t


def bridge_mean(
    x_t: Float[Array, "*shape"], x_0: Float[Array, "*shape"], step: Step
) -> Float[Array, "*shape"]:
    """Mean of the Gaussian bridge, [√ᾱ_s β_t x_0 + √(1−β_t) (1−ᾱ_s) x_t] / (1 − ᾱ_t)."""
    weight_0, weight_t = bridge_weights(step)
    return weight_0 * x_0 + weight_t * x_t
