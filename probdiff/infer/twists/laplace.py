"""The default: any smooth likelihood, by its second-order expansion."""

import dataclasses
from typing import Any

from probdiff.infer.expansion import Expansion, Local, diagonal, low_rank
from probdiff.infer.twists.base import RANK, View, check_rank, size_of
from probdiff.infer.twists.widened import Widened


@dataclasses.dataclass(frozen=True)
class LaplaceTwist(Widened):
    """∫ r N(x̂_0, w_t I), log r to second order at x̂_0: for any smooth likelihood.

    With the gradient g and the curvature −H of log r at x̂_0, w_t the variance of x_0 given x_t,

        log ψ_t = log r(x̂_0) + ½ w_t gᵀ (I + w_t H)⁻¹ g − ½ log det(I + w_t H),

    exact where log r is quadratic and x_0 given x_t Gaussian. Where the prior has the covariance of
    the data, C_t takes the place of w_t I. The default of `SMC` and `Guided`.

    Args:
        rank: Directions in which the curvature of log r is kept, where it is not diagonal, at least
            1; the number of measurements is enough.

    Raises:
        ValueError: if `rank` is below 1.

    Example:
        A count y = 3 of mean exp(x_0), its evidence beside ∫ p(y | x) N(x; 0, 1) dx:

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from probdiff import Diffusion, GaussianKernel, infer, schedules
        >>> def network(x_t, t):  # x_0 ~ N(0, 1)
        ...     return jnp.zeros((*x_t.shape, 2))
        >>> diffusion = Diffusion(GaussianKernel(), schedules.cosine(10), network, event_shape=())
        >>> prior = diffusion.prior({})
        >>> def program(y):
        ...     numpyro.sample("y", dist.Poisson(jnp.exp(prior())), obs=y)
        >>> smc = infer.SMC(program, num_particles=1000, twist=infer.LaplaceTwist())
        >>> smc.run(jax.random.key(0), y=3)
        >>> x = jnp.linspace(-6.0, 6.0, 2001)
        >>> log_joint = dist.Poisson(jnp.exp(x)).log_prob(3) + dist.Normal(0.0, 1.0).log_prob(x)
        >>> exact = jnp.log(jnp.trapezoid(jnp.exp(log_joint), x))
        >>> round(smc.log_evidence, 1), round(float(exact), 1)
        (-2.5, -2.5)

    Source: Song et al. (2023) for the width.
    """

    rank: int = RANK
    uses_covariance = True

    def __post_init__(self) -> None:
        check_rank(self.rank)

    def expand(self, at: Local, sd: Any, view: View) -> Expansion:
        """By a diagonal where there is one, else by Lanczos."""
        return (
            diagonal(at, sd)
            if view.is_diagonal
            else low_rank(at, sd, min(self.rank, size_of(view)))
        )
