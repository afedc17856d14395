"""r widened by the network's own covariance of x_0, by Tweedie's formula.

    C_t = Cov[x_0 | x_t] = (1−ᾱ_t)/√ᾱ_t · ∂x̂_0/∂x_t

One product with C_t is one pull-back through the network, so H C_t is kept in a few directions, by
Lanczos in the inner product of C_t. It tells modes apart that one width for all x_t cannot.

Source: Boys et al. (2023).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from probdiff.infer.expansion import (
    TINY,
    either,
    expand,
    local,
    probe,
    remainder,
    settle,
    sum_event,
)
from probdiff.infer.jacobi import eigh
from probdiff.infer.twists.base import Tilt, Twist, View, check_rank, limited, log_known, size_of
from probdiff.kernels import bridge_weights


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

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from probdiff import Diffusion, GaussianKernel, infer, readouts, schedules
        >>> def network(x_t, t):  # outputs of 0 leave the readout's own components
        ...     return jnp.zeros((len(x_t), 12))
        >>> diffusion = Diffusion(
        ...     GaussianKernel(), schedules.log_snr_linear(30, beta_1=1e-3, alpha_bar_T=1e-3),
        ...     network, event_shape=(2,), readout=readouts.Mixture(2, -1.0, 1.0),
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

    rank: int = 4

    def __post_init__(self) -> None:
        check_rank(self.rank)

    def __call__(self, view: View) -> Tilt:
        step = view.levels.step(view.i)
        lead = view.x_t.ndim - view.levels.event_dim
        log_r = _soft_known(view)
        at = local(log_r, view.x_0_hat)
        # Lanczos in the inner product of C: vectors v with their images u = C v, vᵢ·uⱼ = 1[i = j]
        w_t, w_s = view.widths.variance[view.i - 1], view.widths.variance[view.i - 2]
        slope_t, slope_s = view.widths.slope[view.i - 1], view.widths.slope[view.i - 2]
        spread = jnp.mean(w_t / slope_t)  # (1−ᾱ_t)/√ᾱ_t in an ideal diffusion
        vs, us, hs, v, is_new = [], [], [], at.gradient, True
        for j in range(min(self.rank, size_of(view))):
            if j > 0:
                v, is_new = remainder(v, vs, us, lead)
                fresh = at.curvature(probe(j, v, lead))
                v, is_new = either(v, is_new, *remainder(fresh, vs, us, lead))
            u = spread * view.pull_back(v)
            square = sum_event(u * v, lead)
            is_new &= square > TINY
            scale = jnp.where(is_new, jax.lax.rsqrt(jnp.where(is_new, square, 1.0)), 0.0)
            if j == 0:
                norm = jnp.where(is_new, square, 0.0)
            v, u = v * expand(scale, v.ndim), u * expand(scale, u.ndim)
            vs.append(v)
            us.append(u)
            hs.append(at.curvature(u))
            v = hs[-1]
        u, h = jnp.stack(us), jnp.stack(hs)
        matrix = sum_event(u[:, None] * h[None], lead + 2)
        sizes, rotation = eigh(0.5 * (matrix + jnp.swapaxes(matrix, 0, 1)))
        sizes = jnp.maximum(sizes, 0.0)
        u = jnp.sum(expand(rotation, u.ndim + 1) * u[:, None], 0)  # eigenvectors' images
        along = rotation[0] * jnp.sqrt(norm)
        move = jnp.sum(u * expand(along / (1 + sizes), u.ndim), 0)  # of x̂_0
        square = jnp.sum((along / (1 + sizes)) ** 2, 0)
        value, share = settle(log_r, view.x_0_hat, at.value, move, square)
        log_psi = value - 0.5 * jnp.sum(jnp.log1p(sizes), 0)
        move *= expand(share, move.ndim)
        weight_0, _ = bridge_weights(step)
        weight_0 *= step.noise_t / jnp.sqrt(step.alpha_bar_t) / spread
        narrowing = jnp.mean(w_s / w_t)
        size = sizes * narrowing / (1 + narrowing * sizes)
        factors = u * jnp.sqrt(expand(size * narrowing, u.ndim)) * jnp.mean(slope_s / w_s)
        shift = limited(weight_0 * move, view)
        return Tilt(log_psi, shift, jnp.zeros_like(view.x_t), factors)


SOFTNESS = 1e-2
"""Variance that known entries get in a Tweedie twist, as a share of w_t."""


def _soft_known(view: View) -> Callable[[Any], Any]:
    """log r with known entries counted as measurements with a little noise."""
    if view.known is None:
        return view.log_r
    variance = SOFTNESS * view.widths.variance[view.i - 1]
    return lambda x: view.log_r(x) + log_known(view, x, variance)
