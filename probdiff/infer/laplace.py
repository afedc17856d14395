"""r at the denoised point: as it stands there, or widened by what x_t leaves open of x_0.

    PointTwist      ψ_t = r(x̂_0)
    LaplaceTwist    ψ_t = ∫ r N(x̂_0, C_t),    C_t = w_t I, or from the data's covariance
    TweedieTwist    the same with the network's own C_t = (1−ᾱ_t)/√ᾱ_t · ∂x̂_0/∂x_t

With log r to second order at x̂_0, its gradient g and curvature −H, and A = H C_t,

    log ψ_t = log r + ½ gᵀ C_t (I + A)⁻¹ g − ½ log det(I + A),

settled by the value of log r where it says x_0 is. Where log r is not quadratic but a sum of up to
eight functions of one direction each, as that of a few measurements is whatever their noise, the
integral is by expectation propagation instead (see `ridges`): tails and peaks that curvature at one
point does not see. Known entries are a likelihood without width.
Where the prior has the covariance Σ of the data, C_t = Σ (I + ᾱ_t/(1−ᾱ_t) Σ)⁻¹ (see `spread`).

A product with the network's C_t is one pull-back through it, so H C_t is kept in a few directions,
by Lanczos in the inner product of C_t. It tells modes apart that one width for all x_t cannot.

Sources: Chung et al. (2023) for the point; Song et al. (2023) for the width; Boys et al. (2023) for
the network's covariance.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from probdiff.arguments import check_at_least
from probdiff.infer.quadratic import Basis, Local, krylov, local, ritz, rotated, settle
from probdiff.infer.ridges import propagate
from probdiff.infer.spread import Given, pulled, times
from probdiff.infer.twist import (
    RANK,
    Tilt,
    Twist,
    View,
    complete,
    limited,
    log_known,
    shift_of,
)
from probdiff.kernels import bridge_weights

_SOFTNESS = 1e-2  # variance that known entries get in a Tweedie twist, as a share of w_t


@dataclasses.dataclass(frozen=True)
class PointTwist(Twist):
    """r(x̂_0), without width: the guidance of DPS as a twist.

    Too sharp while x_t is noisy: particles collapse where r is narrow. `LaplaceTwist` puts the
    width in. It takes no arguments.

    Example:
        A measurement y = 2, of noise 1, of x_0 ~ N(0, 1), whose posterior has mean 1; without
        weights the draws go too far:

        >>> prior = standard_diffusion().prior({})
        >>> program = lambda y: numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
        >>> options = {"num_samples": 10_000, "check": False}
        >>> guided = infer.Guided(program, twist=infer.PointTwist(), **options)
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
    pull: Array | float  # ∂ log ψ_t/∂x̂_0, to be pulled back to x_t
    precision: Array  # that ψ_s adds to p(x_s | x_t)


@dataclasses.dataclass(frozen=True)
class LaplaceTwist(Twist):
    """∫ r N(x̂_0, w_t I): the default of `SMC` and `Guided`, for any likelihood.

    Exact where log r is quadratic and x_0 given x_t Gaussian. Where the prior has the covariance
    of the data, C_t takes the place of w_t I. How r is integrated is chosen by a few trials of it
    before the run:

    - log r is quadratic, as of linear measurements with Gaussian noise: in closed form;
    - log r has up to eight elements, entries of observed sites (under `to_event` or in plates) and
      factors, and each depends on x_0 along one direction: by quadrature of each, and expectation
      propagation. So with Student-t, Cauchy or Laplace noise, outliers, counts and classes;
    - else log r to second order at x̂_0, upward curvature counted as none: good where log r is
      concave or x_0 is well known given x_t, poor for heavy tails.

    Args:
        rank: Directions in which the curvature of log r is kept, where it is expanded and not
            diagonal, at least 1; the number of measurements is enough.

    Raises:
        ValueError: if `rank` is below 1.

    Example:
        A count y = 3 of mean exp(x_0), its evidence beside ∫ p(y | x) N(x; 0, 1) dx:

        >>> prior = standard_diffusion().prior({})  # x_0 ~ N(0, 1)
        >>> program = lambda y: numpyro.sample("y", dist.Poisson(jnp.exp(prior())), obs=y)
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
        check_at_least(1, rank=self.rank)

    def __call__(self, view: View) -> Tilt:
        """The integral of r against N(x̂_0, C_t)."""
        if view.common is not None:
            return self.with_covariance(view, view.common.given)
        w_t, w_s, slope = view.w(), view.w(1), view.slope(1)
        log_psi, e = self.integrate(*complete(view.x_0_hat, jnp.sqrt(w_t), view), view)
        pull, precision = e.pull, slope**2 * e.diagonal / (1 + w_s * e.diagonal)
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
        w_t, pull = view.w(), (view.known - view.x_0_hat) / view.w()
        return Known(log_known(view, view.x_0_hat, w_t), pull, view.slope(1) ** 2 / view.w(1))

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

        def projected(u: Array) -> Array:
            return u if given.project is None else times(given.project, u)

        if view.ridges is not None:
            log_r, u, rows = self._by_sites(view, given, point, projected)
        else:
            log_r, u, rows = self._by_expansion(view, given, point, projected)
        pull = pull + belief.inverse_root_transposed(projected(u))
        shift = shift_of(view.step, view.pull_back(pull))
        nearer, none = view.common.nearer, jnp.zeros(mean.shape, mean.dtype)
        narrowed = 1 + jnp.sum(rows**2 * (nearer.variance / belief.variance), -1, keepdims=True)
        rows = rows * (nearer.slope / jnp.sqrt(belief.variance * narrowed)) @ belief.axes.T
        return Tilt(log_r + log_of_known, limited(shift, view), none, rows)

    def _by_expansion(
        self, view: View, given: Given, point: Array, projected: Callable
    ) -> tuple[Array, Array, Array]:
        """log ∫ r, E[u | r] for x_0 = point + S Π u, u ~ N(0, I), and the rows that r adds there.

        None where log r is quadratic: they are then the same for all particles.
        """
        belief, at = given.belief, local(view.log_r, point)
        g = projected(belief.root_transposed(at.gradient))
        if given.gain is not None:
            u, log_det = pulled(given, g), given.log_det
            rows = jnp.zeros((0, *point.shape), point.dtype)
        else:
            u, log_det, rows = self._by_lanczos(given, at, g, projected)
        move = belief.root(projected(u))
        value, share = settle(view.log_r, point, at.value, move, jnp.sum(u * u, -1))
        return value - 0.5 * log_det, u * share[..., None], rows

    def _by_lanczos(
        self, given: Given, at: Local, g: Array, projected: Callable
    ) -> tuple[Array, Array, Array]:
        """(I + A)⁻¹ g, log det(I + A) and rows with A = Σ f fᵀ, where log r is not quadratic."""
        belief = given.belief

        def operator(u: Array) -> Array:
            return projected(belief.root_transposed(at.curvature(belief.root(projected(u)))))

        values, vectors = krylov(g, operator, min(self.rank, g.shape[-1]))
        along = jnp.sum(vectors * g, -1)
        u = jnp.sum(vectors * (along / (1 + values))[..., None], 0)
        return u, jnp.sum(jnp.log1p(values), 0), vectors * jnp.sqrt(values)[..., None]

    def _by_sites(
        self, view: View, given: Given, point: Array, projected: Callable
    ) -> tuple[Array, Array, Array]:
        """The same by sites for the elements of log r."""
        a = view.ridges.directions
        rows = projected(given.belief.root_transposed(a))
        spread = jnp.einsum("mbd,nbd->mnb", rows, rows)
        fit = propagate(view.ridges, jnp.einsum("mbd,pbd->mpb", a, point), spread)
        u = jnp.einsum("mpb,mbd->pbd", fit.pull, rows)
        return fit.log_integral, u, fit.factors(rows, spread)[1]


@dataclasses.dataclass(frozen=True)
class TweedieTwist(Twist):
    """∫ r N(x̂_0, C_t) with the network's own covariance C_t = (1−ᾱ_t)/√ᾱ_t · ∂x̂_0/∂x_t.

    Costs `rank` products with the Jacobian of the network per step instead of one. For a good
    network whose prior has modes far apart that an observation leaves open. Not where modes lie
    far out on both sides of a sharp observation: between them C_t is wide, and particles gather
    where no mode is. That cannot be told before the run, so it is not the default.

    On mixtures of 25 modes (`tests/test_smc_mixtures.py`, 20 problems a size), the sliced distance
    of 2,000 draws to the posterior over that with the exact twist p(y | x_t) was 1.14 ± 0.09 and
    1.20 ± 0.18 for one and two measurements of 8 numbers, 0.94 ± 0.07 for one of 80 numbers;
    `LaplaceTwist` had 1.23 ± 0.14, 1.03 ± 0.05 and 1.31 ± 0.18, with the data's covariance
    1.38 ± 0.15, 0.98 ± 0.13 and 0.91 ± 0.16. With two modes 4 standard deviations on either side
    of a measurement it put 0.40 of the mass into the wrong one, `LaplaceTwist` 0.03.

    Args:
        rank: Directions kept of H C_t, H the curvature of −log r, as in `LaplaceTwist`.

    Example:
        Two numbers near −1 or 1, as ½ N(−1, ¼) + ½ N(1, ¼) each, and their sum y = 0 measured: one
        is high and one is low, and which is left open.

        >>> rates = schedules.log_snr_linear(30, beta_1=1e-3, alpha_bar_T=1e-3)
        >>> options = {"readout": readouts.Mixture(2, -1.0, 1.0), "last_step": readouts.Learned()}
        >>> prior = standard_diffusion((2,), beta=rates, **options).prior({})
        >>> program = lambda y: numpyro.sample("y", dist.Normal(prior().sum(-1), 0.5), obs=y)
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
        check_at_least(1, rank=self.rank)

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
    variance = _SOFTNESS * view.w()
    return lambda x: view.log_r(x) + log_known(view, x, variance)
