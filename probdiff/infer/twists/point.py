"""r at the denoised point, as if x_t left nothing open."""

import dataclasses

import jax.numpy as jnp

from probdiff.infer.expansion import local
from probdiff.infer.twists.base import Tilt, Twist, View, limited, shift_of


@dataclasses.dataclass(frozen=True)
class PointTwist(Twist):
    """r(x̂_0), without width: the guidance of DPS as a twist.

    ψ_t = r(x̂_0) counts x_0 as known where it is not. It is too sharp while x_t is noisy, and
    particles collapse where r is narrow; `LaplaceTwist` puts the width in. It takes no arguments.

    Example:
        A measurement y = 2, of noise 1, of x_0 ~ N(0, 1), whose posterior has mean 1; without
        weights the draws go too far:

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from probdiff import Diffusion, GaussianKernel, infer, schedules
        >>> def network(x_t, t):  # x_0 ~ N(0, 1)
        ...     return jnp.zeros((*x_t.shape, 2))
        >>> diffusion = Diffusion(GaussianKernel(), schedules.cosine(10), network, event_shape=())
        >>> prior = diffusion.prior({})
        >>> def program(y):
        ...     numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
        >>> guided = infer.Guided(
        ...     program, twist=infer.PointTwist(), num_samples=10_000, check=False
        ... )
        >>> guided.run(jax.random.key(0), y=2.0)
        >>> round(float(guided.get_samples()["x_0"].mean()), 1)
        1.3

    Sources: Chung et al. (2023) for the guidance; Wu et al. (2023) for it as a twist.
    """

    takes_known = False

    def __call__(self, view: View) -> Tilt:
        at = local(view.log_r, view.x_0_hat)
        shift = shift_of(view.levels.step(view.i), view.pull_back(at.gradient))
        shift = limited(shift, view)  # else, unweighted, it grows without bound where r is sharp
        return Tilt(at.value, shift, jnp.zeros_like(shift), jnp.zeros((0, *shift.shape)))
