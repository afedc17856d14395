"""Diffusion kernels: what one forward step does to one number.

A kernel T_π(x_t | x_s; β) mixes x_s with its stationary law π and keeps π as it is:

    ∫ T_π(x_t | x_s; β) π(x_s) dx_s = π(x_t).

From it follow the marginal q(x_t | x_0), which jumps over steps 1..t at once, and the bridge
q(x_s | x_t, x_0), the chain pinned at both ends, which the learned reverse step has to imitate.
A kernel acts on each number alone: coefficients arrive broadcastable to x and every method returns
an elementwise NumPyro distribution (batch shape that of x, no event dims). All kernels here are
reversible, π(x_s) T(x_t | x_s) = π(x_t) T(x_s | x_t), so the same kernel runs both ways at
stationarity; that is what a tied last step uses.

Source: Sohl-Dickstein et al. (2015), sections 2.1 to 2.3 and table App. 1.
"""

import dataclasses

import jax.numpy as jnp
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
