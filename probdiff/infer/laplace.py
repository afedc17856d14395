"""r at the denoised point: as it stands there, or widened by what x_t leaves open of x_0.

    PointTwist      ψ_t = r(x̂_0)
    LaplaceTwist    ψ_t = ∫ r N(x̂_0, C_t),    C_t = w_t I, or from the data's covariance

With log r to second order at x̂_0, its gradient g and curvature −H, and A = H C_t,

    log ψ_t = log r + ½ gᵀ C_t (I + A)⁻¹ g − ½ log det(I + A),

settled by the value of log r where it says x_0 is. Known entries are a likelihood without width.
Where the prior has the covariance Σ of the data, C_t = Σ (I + ᾱ_t/(1−ᾱ_t) Σ)⁻¹ (see `covariance`).

Sources: Chung et al. (2023) for the point; Song et al. (2023) for the width.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from probdiff.infer.covariance import Given, pulled, times
from probdiff.infer.quadratic import Local, krylov, local, settle
from probdiff.infer.twist import (
    RANK,
    Tilt,
    Twist,
    View,
    check_rank,
    complete,
    limited,
    log_known,
    shift_of,
)


@dataclasses.dataclass(frozen=True)
class PointTwist(Twist):
    """r(x̂_0), without width: the guidance of DPS as a twist.

    It counts x_0 as known where it is not. It is too sharp while x_t is noisy, and particles
    collapse where r is narrow; `LaplaceTwist` puts the width in. It takes no arguments.

    Example:
        A measurement y = 2, of noise 1, of x_0 ~ N(0, 1), whose posterior has mean 1; without
        weights the draws go too far:

        >>> prior = standard_diffusion().prior({})
        >>> def program(y):
        ...     numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
        >>> twist = infer.PointTwist()
        >>> guided = infer.Guided(program, twist=twist, num_samples=10_000, check=False)
        >>> guided.run(jax.random.key(0), y=2.0)
        >>> round(float(guided.get_samples()["x_0"].mean()), 1)
        1.3

    Sources: Chung et al. (2023) for the guidance; Wu et al. (2023) for it as a twist.
    """

    takes_known = False

    def __call__(self, view: View) -> Tilt:
        """r and its slope at x̂_0."""
        at = local(view.log_r, view.x_0_hat)
        shift = shift_of(view.step, view.pull_back(at.gradient))
        shift = limited(shift, view)  # else, unweighted, it grows without bound where r is sharp
        return Tilt(at.value, shift, jnp.zeros_like(shift), jnp.zeros((0, *shift.shape)))

    def advice(self, more: str, *, has_covariance: bool) -> str:
        """Another twist."""
        return f"Use LaplaceTwist, or raise {more}"


class Known(NamedTuple):
    """What known entries do to a level; the last two count there only."""

    log_psi: Float[Array, "P B"]
    pull: Array | float
    """∂ log ψ_t/∂x̂_0, to be pulled back to x_t."""
    precision: Array
    """That ψ_s adds to p(x_s | x_t)."""


@dataclasses.dataclass(frozen=True)
class LaplaceTwist(Twist):
    """∫ r N(x̂_0, w_t I), log r to second order at x̂_0: for any smooth likelihood.

    Exact where log r is quadratic and x_0 given x_t Gaussian. Where the prior has the covariance Σ
    of the data, Σ (I + ᾱ_t/(1−ᾱ_t) Σ)⁻¹ takes the place of w_t I. The default of `SMC` and
    `Guided`.

    Args:
        rank: Directions in which the curvature of log r is kept, where it is not diagonal, at least
            1; the number of measurements is enough.

    Raises:
        ValueError: if `rank` is below 1.

    Example:
        A count y = 3 of mean exp(x_0), its evidence beside ∫ p(y | x) N(x; 0, 1) dx:

        >>> prior = standard_diffusion().prior({})  # x_0 ~ N(0, 1)
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

    def __call__(self, view: View) -> Tilt:
        """The integral of r against N(x̂_0, C_t)."""
        if view.common is not None:
            return self.with_covariance(view, view.common.given)
        w_t, w_s, slope = view.w(), view.w(1), view.slope(1)
        point, sd = complete(view.x_0_hat, jnp.sqrt(w_t), view)
        log_psi, e = self.integrate(point, sd, view)
        pull = e.pull
        precision = slope**2 * e.diagonal / (1 + w_s * e.diagonal)
        if view.known is not None:
            known = self.of_known(view)
            pull = jnp.where(view.mask, known.pull, pull)
            precision = jnp.where(view.mask, known.precision, precision)
            log_psi += known.log_psi
        narrowing = jnp.mean(w_s / w_t)
        factors = e.factors * slope / jnp.sqrt(1 + narrowing * e.sizes[..., None])
        shift = shift_of(view.step, view.pull_back(pull))
        return Tilt(log_psi, limited(shift, view), precision, factors)

    def of_known(self, view: View) -> Known:
        """Known entries as N(x̂_0, w_t) has them."""
        w_t, w_s = view.w(), view.w(1)
        return Known(
            log_known(view, view.x_0_hat, w_t),
            (view.known - view.x_0_hat) / w_t,
            view.slope(1) ** 2 / w_s,
        )

    def with_covariance(self, view: View, given: Given) -> Tilt:
        """The same with C_t from the data's covariance instead of w_t I."""
        belief, mean = given.belief, view.x_0_hat
        point, log_of_known, pull = mean, 0.0, 0.0
        if given.known is not None:
            gap = jnp.where(view.mask, view.known - mean, 0.0)
            pull = times(given.known, gap)
            point = mean + belief.root(belief.root_transposed(pull))
            point = jnp.where(view.mask, view.known, point)
            log_of_known = -0.5 * (jnp.sum(gap * pull, -1) + given.log_det_known)
        at = local(view.log_r, point)

        def projected(u: Array) -> Array:
            return u if given.project is None else times(given.project, u)

        g = projected(belief.root_transposed(at.gradient))
        if given.gain is not None:
            u, log_det = pulled(given, g), given.log_det
            factors = jnp.zeros((0, *mean.shape), mean.dtype)
        else:
            u, log_det, factors = self._by_lanczos(view, given, at, g, projected)
        move = belief.root(projected(u))
        value, share = settle(view.log_r, point, at.value, move, jnp.sum(u * u, -1))
        pull = pull + belief.inverse_root_transposed(projected(u)) * share[..., None]
        shift = shift_of(view.step, view.pull_back(pull))
        log_psi = value - 0.5 * log_det + log_of_known
        return Tilt(log_psi, limited(shift, view), jnp.zeros(mean.shape, mean.dtype), factors)

    def _by_lanczos(
        self, view: View, given: Given, at: Local, g: Array, projected: Callable[[Array], Array]
    ) -> tuple[Array, Array, Array]:
        """(I + A)⁻¹ g, log det(I + A) and the rows that ψ_s adds, where log r is not quadratic."""
        belief, nearer = given.belief, view.common.nearer

        def operator(u: Array) -> Array:
            return projected(belief.root_transposed(at.curvature(belief.root(projected(u)))))

        values, vectors = krylov(g, operator, min(self.rank, g.shape[-1]))
        along = jnp.sum(vectors * g, -1)
        u = jnp.sum(vectors * (along / (1 + values))[..., None], 0)
        log_det = jnp.sum(jnp.log1p(values), 0)
        narrowing = jnp.sum(vectors**2 * (nearer.variance / belief.variance), -1)
        rows = vectors * jnp.sqrt(values / (1 + narrowing * values))[..., None]
        rows = (rows * nearer.slope / jnp.sqrt(belief.variance)) @ belief.axes.T
        return u, log_det, rows
