"""r widened by the network's own covariance of x_0, by Tweedie's formula.

    C_t = Cov[x_0 | x_t] = (1−ᾱ_t)/√ᾱ_t · ∂x̂_0/∂x_t

One product with C_t is one pull-back through the network, so H C_t is kept in a few directions, by
Lanczos in the inner product of C_t. It tells modes apart that one width for all x_t cannot.

Source: Boys et al. (2023).
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from probdiff.infer.quadratic import Basis, local, ritz, rotated, settle
from probdiff.infer.twist import RANK, Tilt, Twist, View, check_rank, limited, log_known
from probdiff.kernels import bridge_weights

SOFTNESS = 1e-2
"""Variance that known entries get in a Tweedie twist, as a share of w_t."""


@dataclasses.dataclass(frozen=True)
class TweedieTwist(Twist):
    """∫ r N(x̂_0, C_t) with the network's own covariance C_t = (1−ᾱ_t)/√ᾱ_t · ∂x̂_0/∂x_t.

    Costs `rank` products with the Jacobian of the network per step instead of one. For a good
    network whose prior has modes far apart that an observation leaves open.

    Args:
        rank: Directions kept of H C_t, H the curvature of −log r, at least 1; the number of
            measurements is enough.

    Raises:
        ValueError: if `rank` is below 1.

    Example:
        Two numbers near −1 or 1, as ½ N(−1, ¼) + ½ N(1, ¼) each, and their sum y = 0 measured: one
        is high and one is low, and which is left open.

        >>> diffusion = Diffusion(
        ...     GaussianKernel(), schedules.log_snr_linear(30, beta_1=1e-3, alpha_bar_T=1e-3),
        ...     lambda x_t, t: jnp.zeros((len(x_t), 12)),  # the readout's own components
        ...     event_shape=(2,), readout=readouts.Mixture(2, -1.0, 1.0),
        ...     last_step=readouts.Learned(),
        ... )
        >>> prior = diffusion.prior({})
        >>> def program(y):
        ...     numpyro.sample("y", dist.Normal(prior().sum(-1), 0.5), obs=y)
        >>> smc = infer.SMC(program, num_particles=1000, twist=infer.TweedieTwist(rank=1))
        >>> smc.run(jax.random.key(0), y=0.0)
        >>> round(smc.log_evidence, 1)  # log [½ N(0; 0, ¾) + ½ N(2; 0, ¾)]
        -1.4
        >>> x_0 = smc.get_samples()["x_0"]
        >>> bool(0.3 < (x_0[:, 0] > x_0[:, 1]).mean() < 0.7)
        True

    Source: Boys et al. (2023).
    """

    rank: int = RANK

    def __post_init__(self) -> None:
        check_rank(self.rank)

    def __call__(self, view: View) -> Tilt:
        """By Lanczos in the inner product of C: vectors v with their images u = C v, vᵢ·uⱼ = 1."""
        step, log_r = view.step, _soft_known(view)
        at = local(log_r, view.x_0_hat)
        w_t, w_s, slope_t, slope_s = view.w(), view.w(1), view.slope(), view.slope(1)
        spread = jnp.mean(w_t / slope_t)  # (1−ᾱ_t)/√ᾱ_t in an ideal diffusion
        basis, images, v, is_new = Basis(), [], at.gradient, True
        for j in range(min(self.rank, view.problem.size)):
            if j > 0:
                v, is_new = basis.following(v, at.curvature)
            square = basis.add(v, spread * view.pull_back(v), is_new)
            norm = square if j == 0 else norm
            images.append(at.curvature(basis.duals[-1]))
            v = images[-1]
        sizes, rotation = ritz(basis.duals, images)
        u = rotated(rotation, basis.duals)  # eigenvectors' images
        along = rotation[0] * jnp.sqrt(norm)
        move = jnp.sum(u * (along / (1 + sizes))[..., None], 0)  # of x̂_0
        square = jnp.sum((along / (1 + sizes)) ** 2, 0)
        value, share = settle(log_r, view.x_0_hat, at.value, move, square)
        log_psi = value - 0.5 * jnp.sum(jnp.log1p(sizes), 0)
        weight_0, _ = bridge_weights(step)
        weight_0 *= step.noise_t / jnp.sqrt(step.alpha_bar_t) / spread
        narrowing = jnp.mean(w_s / w_t)
        size = sizes * narrowing / (1 + narrowing * sizes)
        factors = u * jnp.sqrt(size * narrowing)[..., None] * jnp.mean(slope_s / w_s)
        shift = limited(weight_0 * move * share[..., None], view)
        return Tilt(log_psi, shift, jnp.zeros_like(view.x_t), factors)

    def products(self, size: int, *, is_known_alone: bool) -> int:
        """One for each direction."""
        return min(self.rank, size)

    def advice(self, more: str, *, has_covariance: bool) -> str:
        """A higher rank."""
        return f"Raise {more}, or the twist's rank up to the number of measurements of one x_0"


def _soft_known(view: View) -> Callable[[Array], Array]:
    """log r with known entries counted as measurements with a little noise."""
    if view.known is None:
        return view.log_r
    variance = SOFTNESS * view.w()
    return lambda x: view.log_r(x) + log_known(view, x, variance)
