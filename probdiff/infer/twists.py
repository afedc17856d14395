"""Twists: guesses ψ_t(x_t) of E[r(x_0) | x_t], which decide whether conditioning works.

The reverse chain given an observation is p(x_s | x_t) ψ*_s(x_s)/ψ*_t(x_t), with the exact twist
ψ*_t(x_t) = E[r(x_0) | x_t]. Any positive ψ_t with ψ_0 = r gives a sampler that is exact as
particles grow, because its weights repair the rest; how many particles that takes depends on ψ. All
twists here but the last look at r through the denoised point x̂_0 = E[x_0 | x_t]:

    PointTwist      r(x̂_0)                             too sharp while x_t is noisy: collapses
    LaplaceTwist    ∫ r N(x̂_0, w_t I)                   r expanded to second order at x̂_0
    GaussianTwist   the same with the curvature of a known linear-Gaussian r
    TweedieTwist    ∫ r N(x̂_0, C_t)                     C_t as the network says
    KernelTwist     r(x_t)^c                            the rule of 2015

where w_t = τ²(1−ᾱ_t)/(1−ᾱ_t+ᾱ_t τ²) is the variance of x_0 given x_t if x_0 had variance τ², and
C_t = (1−ᾱ_t)/√ᾱ_t · ∂x̂_0/∂x_t its covariance by Tweedie's formula.

A twist gives log ψ_t and a proposal: by how much the mean of p(x_s | x_t) moves,
(β_t/√(1−β_t)) ∇ log ψ_t, and the precision that ψ_s adds to it. Known entries of x_0 are a
likelihood without width; log r and its derivatives are on the scale of the chain.

Sources: Sohl-Dickstein et al. (2015), section 2.5; Wu et al. (2023) for the point twist in SMC;
Song et al. (2023) for the width; Boys et al. (2023) for C_t.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from probdiff.infer.dense import Belief, Given, pulled, times
from probdiff.infer.expansion import (
    TINY,
    Expansion,
    Local,
    diagonal,
    either,
    expand,
    known_curvature,
    krylov,
    local,
    low_rank,
    probe,
    remainder,
    settle,
    sum_event,
)
from probdiff.infer.jacobi import eigh
from probdiff.infer.levels import Levels, Widths
from probdiff.kernels import bridge_weights


class View(NamedTuple):
    """What a twist sees at level i ≥ 2: particles, and what the network says of them."""

    levels: Levels
    i: Any
    x_t: Any
    """Particles, `(*lead, *event)`."""
    mean: Any
    """Mean of p(x_s | x_t)."""
    variance: Any
    """Variance of p(x_s | x_t)."""
    x_0_hat: Any
    """Denoised point."""
    pull_back: Callable[[Any], Any]
    """v ↦ (∂x̂_0/∂x_t)ᵀ v."""
    log_r: Callable[[Any], Any]
    """log r on the scale of the chain."""
    known: Any
    """Known entries on the scale of the chain, or None."""
    mask: Any
    """True where an entry is known, or None."""
    is_diagonal: bool
    """Whether each entry of x_0 has a likelihood of its own."""
    widths: Widths
    """Slopes and variances of x_0 given each level."""
    given: Given | None
    """The same with the data's covariance, where it is known."""
    nearer: Belief | None
    """Covariance of x_0 given level s, where it is known."""


class Tilt(NamedTuple):
    """log ψ_t, and how p(x_s | x_t) is moved towards what ψ wants."""

    log_psi: Any
    """`lead`."""
    shift: Any
    """Added to the mean, `(*lead, *event)`."""
    diagonal: Any
    """Precision added entry by entry, `(*lead, *event)`."""
    factors: Any
    """Rows f with precision Σ f fᵀ added, `(k, *lead, *event)`."""


RANK = 4
"""Directions in which the curvature of log r is kept, where a twist says nothing else."""


class Twist(abc.ABC):
    """A guess of E[r(x_0) | x_t]."""

    takes_known: bool = True
    """Whether the weights stay finite where entries are known exactly."""
    uses_covariance: bool = False
    """Whether it takes the data's covariance where the prior has one."""

    @abc.abstractmethod
    def __call__(self, view: View) -> Tilt:
        """log ψ_t at level i ≥ 2, and the proposal for x_s."""

    def last(self, x_1: Any, mean: Any, variance: Any, view: View) -> Tilt:
        """ψ_1 and the proposal for x_0: r integrated under p(x_0 | x_1) = N(mean, variance)."""
        point, sd = _complete(mean, jnp.sqrt(variance), view)
        log_psi, e = self.integrate(point, sd, view)
        shift, precision = variance * e.pull, e.diagonal
        if view.known is not None:
            shift = jnp.where(view.mask, view.known - mean, shift)
            precision = jnp.where(view.mask, jnp.inf, precision)
            log_psi += _log_known(view, mean, variance)
        return Tilt(log_psi, shift, precision, e.factors)

    def integrate(self, point: Any, sd: Any, view: View) -> tuple[Any, Expansion]:
        """log ∫ r N(point, sd²), and the expansion it rests on, its pull as far as it helps."""
        at = local(view.log_r, point)
        e = self.expand(at, sd, view)
        lead = at.value.ndim
        square = sum_event((sd * e.pull) ** 2, lead)
        value, share = settle(view.log_r, point, at.value, sd**2 * e.pull, square)
        pull = e.pull * expand(share, e.pull.ndim)
        return value - 0.5 * e.log_det, e._replace(pull=pull)

    def expand(self, at: Local, sd: Any, view: View) -> Expansion:
        """log r to second order at a point, against N(point, sd²)."""
        return diagonal(at, sd) if view.is_diagonal else low_rank(at, sd, min(RANK, _size(view)))

    def check(self, event_shape: tuple[int, ...]) -> None:  # noqa: B027, most fit any prior
        """Raise a `ValueError` where the twist does not fit the prior."""


class _Widened(Twist):
    """∫ r N(x̂_0, w_t I), log r to second order at x̂_0; C_t where the data's covariance is known."""

    rank: int = RANK

    def __call__(self, view: View) -> Tilt:
        if view.given is not None:
            return self.with_covariance(view, view.given)
        step = view.levels.step(view.i)
        w_t, w_s = view.widths.variance[view.i - 1], view.widths.variance[view.i - 2]
        slope = view.widths.slope[view.i - 2]
        point, sd = _complete(view.x_0_hat, jnp.sqrt(w_t), view)
        log_psi, e = self.integrate(point, sd, view)
        pull = e.pull
        precision = slope**2 * e.diagonal / (1 + w_s * e.diagonal)
        if view.known is not None:
            pull = jnp.where(view.mask, (view.known - view.x_0_hat) / w_t, pull)
            precision = jnp.where(view.mask, slope**2 / w_s, precision)
            log_psi += _log_known(view, view.x_0_hat, w_t)
        narrowing = jnp.mean(w_s / w_t)
        factors = e.factors * slope / jnp.sqrt(1 + narrowing * expand(e.sizes, e.factors.ndim))
        shift = _shift(step, view.pull_back(pull))
        return Tilt(log_psi, _limited(shift, view), precision, factors)

    def with_covariance(self, view: View, given: Given) -> Tilt:
        """The same with C_t from the data's covariance instead of w_t I."""
        lead = view.x_t.ndim - view.levels.event_dim
        shape, belief = view.x_t.shape, given.belief
        mean = view.x_0_hat.reshape(*shape[:lead], -1)
        point, log_known, pull = mean, 0.0, 0.0
        if given.known is not None:
            known, mask = (
                jnp.broadcast_to(a, shape).reshape(mean.shape) for a in (view.known, view.mask)
            )
            gap = jnp.where(mask, known - mean, 0.0)
            pull = times(given.known, gap)
            point = mean + belief.root(belief.root_transposed(pull))
            point = jnp.where(mask, known, point)
            log_known = -0.5 * (jnp.sum(gap * pull, -1) + given.log_det_known)
        at = local(view.log_r, point.reshape(shape))

        def projected(u: Any) -> Any:
            return u if given.project is None else times(given.project, u)

        g = projected(belief.root_transposed(at.gradient.reshape(mean.shape)))
        if given.gain is not None:
            u, log_det = pulled(given, g), given.log_det
            factors = jnp.zeros((0, *shape), mean.dtype)
        else:
            u, log_det, factors = self._by_lanczos(view, given, at, g, projected)
        move = belief.root(projected(u)).reshape(shape)
        value, share = settle(view.log_r, point.reshape(shape), at.value, move, jnp.sum(u * u, -1))
        pull = pull + belief.inverse_root_transposed(projected(u)) * share[..., None]
        shift = _shift(view.levels.step(view.i), view.pull_back(pull.reshape(shape)))
        log_psi = value - 0.5 * log_det + log_known
        return Tilt(log_psi, _limited(shift, view), jnp.zeros(shape, mean.dtype), factors)

    def _by_lanczos(
        self, view: View, given: Given, at: Local, g: Any, projected: Callable[[Any], Any]
    ) -> tuple[Any, Any, Any]:
        """(I + A)⁻¹ g, log det(I + A) and the rows that ψ_s adds, where log r is not quadratic."""
        belief, shape = given.belief, view.x_t.shape

        def operator(u: Any) -> Any:
            x = belief.root(projected(u)).reshape(shape)
            return projected(belief.root_transposed(at.curvature(x).reshape(u.shape)))

        rank = min(self.rank, g.shape[-1])
        values, vectors = krylov(g, operator, rank, g.ndim - 1)
        along = jnp.sum(vectors * g, -1)
        u = jnp.sum(vectors * (along / (1 + values))[..., None], 0)
        log_det = jnp.sum(jnp.log1p(values), 0)
        nearer = view.nearer  # the belief at level s
        narrowing = jnp.sum(vectors**2 * (nearer.variance / belief.variance), -1)
        rows = vectors * jnp.sqrt(values / (1 + narrowing * values))[..., None]
        rows = (rows * nearer.slope / jnp.sqrt(belief.variance)) @ belief.axes.T
        return u, log_det, rows.reshape(rank, *shape)


@dataclasses.dataclass(frozen=True)
class LaplaceTwist(_Widened):
    """∫ r N(x̂_0, w_t I), log r to second order at x̂_0: for any smooth likelihood.

    Args:
        rank: Directions in which the curvature of log r is kept, where it is not diagonal; the
            number of measurements is enough.
    """

    rank: int = RANK
    uses_covariance = True

    def __post_init__(self) -> None:
        _check_rank(self.rank)

    def expand(self, at: Local, sd: Any, view: View) -> Expansion:
        """By a diagonal where there is one, else by Lanczos."""
        return (
            diagonal(at, sd) if view.is_diagonal else low_rank(at, sd, min(self.rank, _size(view)))
        )


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianTwist(_Widened):
    """∫ r N(x̂_0, w_t I) for y = A x_0 + noise with a known map and noise: the exact integral.

    Args:
        matrix: A, `(m, d)`, acting on x_0 in the user's units, flattened to d numbers.
        noise: Standard deviation of each measurement, a number or `(m,)`.
    """

    matrix: Any
    noise: Any
    uses_covariance = False

    def __post_init__(self) -> None:
        matrix, noise = np.asarray(self.matrix, np.float64), np.asarray(self.noise, np.float64)
        if matrix.ndim != 2:
            raise ValueError(f"matrix must have shape (m, d); got shape {matrix.shape}")
        if not np.isfinite(matrix).all():
            raise ValueError("matrix must be finite; got values that are not")
        if noise.shape not in ((), (len(matrix),)) or not (noise > 0).all():
            raise ValueError(
                f"noise must be positive, a number or one for each of {len(matrix)} measurements; "
                f"got {self.noise}"
            )

    def check(self, event_shape: tuple[int, ...]) -> None:
        """Raise a `ValueError` unless A has a column for each number of x_0."""
        size = int(np.prod(event_shape))
        if np.shape(self.matrix)[1] != size:
            raise ValueError(
                f"matrix must have {size} columns, one for each number of x_0; got shape "
                f"{np.shape(self.matrix)}"
            )

    def expand(self, at: Local, sd: Any, view: View) -> Expansion:
        """By the eigenvectors of Aᵀ A / noise²."""
        diffusion = view.levels.draw.diffusion
        scale = np.broadcast_to(diffusion.scale, diffusion.event_shape).reshape(-1)
        noise = np.broadcast_to(self.noise, len(self.matrix))[:, None]
        whitened = np.asarray(self.matrix, np.float64) * scale / noise
        _, roots, rows = np.linalg.svd(whitened, full_matrices=False)
        dtype = at.gradient.dtype
        vectors = jnp.asarray(rows.reshape(-1, *diffusion.event_shape), dtype)
        width = jnp.mean(sd**2, axis=tuple(range(-view.levels.event_dim, 0)))
        return known_curvature(at, width, jnp.asarray(roots**2, dtype), vectors)


@dataclasses.dataclass(frozen=True)
class TweedieTwist(Twist):
    """∫ r N(x̂_0, C_t) with the network's own covariance C_t = (1−ᾱ_t)/√ᾱ_t · ∂x̂_0/∂x_t.

    Costs `rank` products with the Jacobian of the network per step instead of one.

    Args:
        rank: Directions kept of H C_t; the number of measurements is enough.
    """

    rank: int = 4

    def __post_init__(self) -> None:
        _check_rank(self.rank)

    def __call__(self, view: View) -> Tilt:
        step = view.levels.step(view.i)
        lead = view.x_t.ndim - view.levels.event_dim
        log_r = _soft_known(view)
        at = local(log_r, view.x_0_hat)
        # Lanczos in the inner product of C: vectors v with their images u = C v, vᵢ·uⱼ = 1[i = j]
        w_t, w_s = view.widths.variance[view.i - 1], view.widths.variance[view.i - 2]
        slope_t, slope_s = view.widths.slope[view.i - 1], view.widths.slope[view.i - 2]
        spread = jnp.mean(w_t / slope_t)  # (1−ᾱ_t)/√ᾱ_t in an ideal chain
        vs, us, hs, v, is_new = [], [], [], at.gradient, True
        for j in range(min(self.rank, _size(view))):
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
        shift = _limited(weight_0 * move, view)
        return Tilt(log_psi, shift, jnp.zeros_like(view.x_t), factors)


@dataclasses.dataclass(frozen=True)
class PointTwist(Twist):
    """r(x̂_0), without width: the guidance of DPS as a twist. Collapses while x_t is noisy."""

    takes_known = False

    def __call__(self, view: View) -> Tilt:
        at = local(view.log_r, view.x_0_hat)
        shift = _shift(view.levels.step(view.i), view.pull_back(at.gradient))
        shift = _limited(shift, view)  # else, unweighted, it grows without bound where r is sharp
        return Tilt(at.value, shift, jnp.zeros_like(shift), jnp.zeros((0, *shift.shape)))


@dataclasses.dataclass(frozen=True)
class KernelTwist(Twist):
    """r(x_t)^c, each step multiplied by r itself: the rule of 2015.

    Without weights (`Guided`) it tends to the wrong law, p r² for Gaussian data with constant r;
    with weights (`SMC`) to the right one, slowly.

    Args:
        decays: Whether c = (T − t)/T, which is 0 at t = T, instead of 1 throughout.
    """

    decays: bool = False
    takes_known = False

    def __call__(self, view: View) -> Tilt:
        log_psi = self._power(view, 0) * view.log_r(view.x_t)
        return self._multiply(view, log_psi, view.mean, view.variance, self._power(view, 1))

    def last(self, x_1: Any, mean: Any, variance: Any, view: View) -> Tilt:
        log_psi = self._power(view, 0) * view.log_r(x_1)
        return self._multiply(view, log_psi, mean, variance, 1.0)

    def _power(self, view: View, down: int) -> Any:
        """c at level i − down."""
        if not self.decays:
            return 1.0
        times = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.asarray(view.levels.table.t)])
        T = view.levels.draw.trajectory.steps.T
        return (T - times[view.i - down]) / T

    def _multiply(self, view: View, log_psi: Any, mean: Any, variance: Any, power: Any) -> Tilt:
        """N(mean, variance) · r^power, log r to second order at the mean."""
        point, sd = _complete(mean, jnp.sqrt(variance), view)
        powered = view._replace(log_r=lambda x: power * view.log_r(x))
        _, e = self.integrate(point, sd, powered)
        shift, precision = variance * e.pull, e.diagonal
        if view.known is not None:
            shift = jnp.where(view.mask, view.known - mean, shift)
            precision = jnp.where(view.mask, jnp.inf, precision)
        return Tilt(log_psi, shift, precision, e.factors)


def _size(view: View) -> int:
    """Numbers of one x_t."""
    return math.prod(view.levels.draw.diffusion.event_shape)


def _check_rank(rank: int) -> None:
    if rank < 1:
        raise ValueError(f"rank must be at least 1; got {rank}")


def _shift(step: Any, gradient: Any) -> Any:
    """Move of the mean of p(x_s | x_t) when the score gains a gradient, β_t/√(1−β_t) · gradient."""
    return step.beta * jnp.sqrt(step.alpha_bar_s / step.alpha_bar_t) * gradient


FURTHEST = 5.0
"""Standard deviations that a proposal's mean moves at most: beyond, the twist is wrong, not x_t."""


def _limited(shift: Any, view: View) -> Any:
    """A shift as far as p(x_s | x_t) follows it.

    Over a long step near the data a chain with the bridge's variance is much narrower than an ideal
    one, and x_s can move only by V ∇ log ψ_s: hence the ratio of the two variances.
    """
    step = view.levels.step(view.i)
    weight_0, _ = bridge_weights(step)
    ideal = step.noise_t / jnp.sqrt(step.alpha_bar_t) * view.widths.slope[view.i - 1]
    shift *= view.variance / (step.beta * step.noise_s / step.noise_t + weight_0**2 * ideal)
    lead = shift.ndim - view.levels.event_dim
    axes = tuple(range(lead, shift.ndim))
    furthest = jnp.max(jnp.abs(shift) / jnp.sqrt(view.variance), axis=axes, keepdims=True)
    shift = jnp.where(jnp.isfinite(furthest), shift, 0.0)
    return shift * jnp.minimum(1.0, FURTHEST / jnp.where(furthest > 0, furthest, 1.0))


def _complete(point: Any, sd: Any, view: View) -> tuple[Any, Any]:
    """Point and width with known entries put in; they have no width."""
    if view.known is None:
        return point, sd
    return jnp.where(view.mask, view.known, point), jnp.where(view.mask, 0.0, sd)


def _log_known(view: View, mean: Any, variance: Any) -> Any:
    """log N(known; mean, variance), summed over the known entries."""
    terms = (view.known - mean) ** 2 / variance + jnp.log(2 * jnp.pi * variance)
    lead = mean.ndim - view.levels.event_dim
    return -0.5 * sum_event(jnp.where(view.mask, terms, 0.0), lead)


SOFTNESS = 1e-2
"""Variance that known entries get in a Tweedie twist, as a share of w_t."""


def _soft_known(view: View) -> Callable[[Any], Any]:
    """log r with known entries counted as measurements with a little noise."""
    if view.known is None:
        return view.log_r
    variance = SOFTNESS * view.widths.variance[view.i - 1]
    return lambda x: view.log_r(x) + _log_known(view, x, variance)
