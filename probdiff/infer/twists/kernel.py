"""The rule of 2015: every reverse step multiplied by r, or a power of it.

    p̃(x_s | x_t) = p(x_s | x_t) r(x_s)^c / Z̃_s(x_t),    c = 1 or (T − s)/T            eqs. 22, 23

with log r to second order at the mean of p(x_s | x_t): exact where it is quadratic. (The paper's
table App. 1 stops at the first order, which moves the mean and leaves the variance.) As a twist it
is ψ_t = r(x_t)^c. What eq. 22 drops against eq. 21, Z̃_s(x_t)/ψ_t(x_t), `SMC` keeps as a weight;
without it (`Guided`) the draws tend to another law.

Source: Sohl-Dickstein et al. (2015), section 2.5 and appendix C.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from probdiff.infer.twists.base import Tilt, Twist, View


@dataclasses.dataclass(frozen=True)
class KernelTwist(Twist):
    """r(x_t)^c, each step multiplied by r itself: the rule of 2015.

    Without weights (`Guided`) it tends to the wrong law, p r² for Gaussian data with constant r;
    with weights (`SMC`) to the right one, slowly.

    Args:
        decays: Whether c = (T − t)/T, which is 0 at t = T, instead of 1 throughout.

    Example:
        A measurement y = 2, of noise 1, of x_0 ~ N(0, 1): the posterior has mean 1, what the rule
        tends to, p r², has mean 4/3.

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from probdiff import Diffusion, GaussianKernel, infer, schedules
        >>> def network(x_t, t):  # x_0 ~ N(0, 1)
        ...     return jnp.zeros((*x_t.shape, 2))
        >>> diffusion = Diffusion(GaussianKernel(), schedules.cosine(10), network, event_shape=())
        >>> prior = diffusion.prior({})
        >>> def program(y):
        ...     numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
        >>> guided = infer.Guided(
        ...     program, twist=infer.KernelTwist(), num_samples=4000, check=False
        ... )
        >>> guided.run(jax.random.key(0), y=2.0)
        >>> round(float(guided.get_samples()["x_0"].mean()), 1)
        1.3

    Source: Sohl-Dickstein et al. (2015), section 2.5 and appendix C.
    """

    decays: bool = False
    takes_known = False

    def __call__(self, view: View) -> Tilt:
        return self._multiply(view, self._power(view, 1))

    def last(self, view: View) -> Tilt:
        return self._multiply(view, 1.0)

    def _power(self, view: View, down: int) -> Any:
        """c at level i − down."""
        if not self.decays:
            return 1.0
        times = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.asarray(view.levels.table.t)])
        T = view.levels.draw.trajectory.steps.T
        return (T - times[view.i - down]) / T

    def _multiply(self, view: View, power: Any) -> Tilt:
        """ψ_t = r(x_t)^c, and N(mean, variance) · r^power, log r to second order at the mean."""
        powered = view._replace(log_r=lambda x: power * view.log_r(x))
        log_psi = self._power(view, 0) * view.log_r(view.x_t)
        return super().last(powered)._replace(log_psi=log_psi)
