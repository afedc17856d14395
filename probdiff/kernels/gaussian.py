"""Gaussian diffusion: shrink, then add noise, so that N(0, 1) stays N(0, 1).

    T(x_t | x_s; β) = N(√(1−β) x_s, β),    q(x_t | x_0) = N(√ᾱ_t x_0, 1 − ᾱ_t)

Source: Sohl-Dickstein et al. (2015), sections 2.1 and 2.4, eq. 24, table App. 1, appendix B.3.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float
from numpyro.distributions import constraints

from probdiff.arguments import as_array, check_shape
from probdiff.types import Step, as_states, check_step


@dataclasses.dataclass(frozen=True)
class GaussianKernel:
    """Gaussian diffusion of numbers, shrunk and then made noisy, with stationary law N(0, 1).

    No arguments. Data should have second moment near 1 on the scale of the diffusion; see
    `loc` and `scale` of `Diffusion`.

    Example:
        >>> kernel = GaussianKernel()
        >>> step = schedules.steps(schedules.harmonic(4)).at(2, event_dim=0)  # ᾱ_1 = 3/4, ᾱ_2 = 1/2
        >>> law = kernel.marginal(jnp.array(2.0), step)  # N(√ᾱ_2 · 2, 1 − ᾱ_2)
        >>> round(float(law.mean), 3), round(float(law.variance), 3)
        (1.414, 0.5)
        >>> pinned = kernel.bridge(law.mean, jnp.array(2.0), step)  # x_2 at its mean: so is x_1
        >>> round(float(pinned.mean), 3), round(float(pinned.variance), 3)  # √ᾱ_1 · 2
        (1.732, 0.167)
    """

    is_discrete: ClassVar[bool] = False
    """Whether it diffuses symbols."""

    @property
    def support(self) -> constraints.Constraint:
        """Values one number may take: the real line."""
        return constraints.real

    @property
    def dtype(self) -> np.dtype:
        """Type of a level's numbers: JAX's default float."""
        return jnp.result_type(float)

    def to_state(self, x_0: Any) -> Any:
        """Data as the diffusion holds them: unchanged."""
        return x_0

    def check_values(self, values: np.ndarray, argument: str) -> None:
        """Raise a `ValueError` unless the values are finite real numbers."""
        if not np.isfinite(as_array(argument, values)).all():
            raise ValueError(
                f"{argument} must be finite where it is observed; got "
                f"{np.sum(~np.isfinite(values))} values that are not; missing values want mask=, "
                "True where observed"
            )

    def expected_log_stationary(self, law: dist.Normal) -> Float[Array, "..."]:
        """E[log π(x)] under an elementwise Normal, nats; eq. 14 takes it for a constant."""
        return -0.5 * (math.log(2 * math.pi) + law.loc**2 + law.scale**2)

    def stationary(self, shape: tuple[int, ...]) -> dist.Distribution:
        """Law the forward trajectory ends in, π = N(0, 1), for each of `shape` numbers."""
        return dist.Normal(jnp.zeros(check_shape("shape", shape)), 1.0)

    def transition(self, x_s: Float[Array, "*shape"], step: Step) -> dist.Distribution:
        """One forward step, q(x_t | x_s) = N(√(1−β_t) x_s, β_t)."""
        (x_s,) = as_states(step, x_s=x_s)
        return dist.Normal(jnp.sqrt(1 - step.beta) * x_s, jnp.sqrt(step.beta))

    def marginal(self, x_0: Float[Array, "*shape"], step: Step) -> dist.Distribution:
        """All steps up to t at once, q(x_t | x_0) = N(√ᾱ_t x_0, 1 − ᾱ_t)."""
        (x_0,) = as_states(step, x_0=x_0)
        return dist.Normal(jnp.sqrt(step.alpha_bar_t) * x_0, jnp.sqrt(step.noise_t))

    def bridge(
        self, x_t: Float[Array, "*shape"], x_0: Float[Array, "*shape"], step: Step
    ) -> dist.Distribution:
        """Forward process pinned at both ends, q(x_s | x_t, x_0) with s = t − 1; needs t ≥ 2.

        q(x_s | x_t, x_0) ∝ q(x_t | x_s) q(x_s | x_0), a product of two Gaussians in x_s.
        """
        return dist.Normal(bridge_mean(x_t, x_0, step), jnp.sqrt(bridge_variance(step)))


def bridge_weights(step: Step) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Weights (w_0, w_t) of the Gaussian bridge's mean w_0 x_0 + w_t x_t; (1, 0) at t = 1.

        w_0 = √ᾱ_s β_t / (1 − ᾱ_t),    w_t = √(1−β_t) (1 − ᾱ_s) / (1 − ᾱ_t)

    Example:
        >>> from probdiff.kernels import bridge_weights
        >>> w_0, w_t = bridge_weights(schedules.steps(schedules.harmonic(3)))
        >>> [round(w, 2) for w in w_0.tolist()]  # x_0 tells all of x_0, and less and less of x_s
        [1.0, 0.61, 0.58]
        >>> bool(w_t[0] == 0), bool(w_t[2] == 0)  # x_0 is known; β_3 = 1, x_3 knows nothing of x_2
        (True, True)
    """
    check_step(step)
    weight_0 = jnp.sqrt(step.alpha_bar_s) * step.beta / step.noise_t
    weight_t = jnp.sqrt(1 - step.beta) * step.noise_s / step.noise_t
    return weight_0, weight_t


def bridge_mean(
    x_t: Float[Array, "*shape"], x_0: Float[Array, "*shape"], step: Step
) -> Float[Array, "*shape"]:
    """Mean of the Gaussian bridge, [√ᾱ_s β_t x_0 + √(1−β_t) (1−ᾱ_s) x_t] / (1 − ᾱ_t).

    x_0 are data on the scale of the diffusion, or an estimate of them.

    Example:
        >>> from probdiff.kernels import bridge_mean
        >>> step = schedules.steps(schedules.harmonic(4)).at(2, event_dim=1)
        >>> x_0 = jnp.array([2.0, -1.0])
        >>> x_1 = bridge_mean(jnp.sqrt(step.alpha_bar_t) * x_0, x_0, step)
        >>> bool(jnp.allclose(x_1, jnp.sqrt(step.alpha_bar_s) * x_0))  # no noise: x_s = √ᾱ_s x_0
        True
    """
    x_t, x_0 = as_states(step, x_t=x_t, x_0=x_0)
    weight_0, weight_t = bridge_weights(step)
    return weight_0 * x_0 + weight_t * x_t


def bridge_variance(step: Step) -> Float[Array, "..."]:
    """Variance of the Gaussian bridge, β_t (1 − ᾱ_s)/(1 − ᾱ_t), eq. 24's lower end; 0 at t = 1.

    Example:
        >>> from probdiff.kernels import bridge_variance
        >>> variance = bridge_variance(schedules.steps(schedules.harmonic(3)))
        >>> bool(variance[0] == 0), [round(v, 2) for v in variance[1:].tolist()]
        (True, [0.25, 0.67])
    """
    check_step(step)
    return step.beta * step.noise_s / step.noise_t
