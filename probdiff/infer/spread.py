"""How wide x_0 is given a level: entry by entry, or with the data's whole covariance.

Were the data N(·, τ²), an ideal diffusion would leave x_0 the variance

    w_t = τ²(1−ᾱ_t)/(1−ᾱ_t+ᾱ_t τ²)

given level t. As x̂_0 is a martingale, the variances of its moves add up,

    Var[x_0 | x_t] = Var[x_0 | x_s] + slope_s² Var[x_s | x_t],

with the diffusion's own Var[x_s | x_t]. It may be narrower than the ideal one, which matters where
steps are long, near the data above all. A learned variance counts as ideal.

Where the data's covariance is known, x_0 ~ N(·, Σ), Σ = U diag(λ) Uᵀ, all this holds on the axes U,
with λ for τ²; x_0 has covariance C_t = U diag(c_t) Uᵀ given the level, and a root S = U diag(√c_t).
What does not depend on the particle is worked out once for a level:

    known entries, M:    K = M C M,   P_M = M K⁻¹ M,   Π = I − Sᵀ P_M S, a projection;
                         x_0 given them has mean x̂_0 + C P_M (known − x̂_0) and covariance S Π Sᵀ
    a quadratic log r:   A = Π Sᵀ H S Π,
                         log ∫ r = log r + ½ gᵀ S Π (I + A)⁻¹ Π Sᵀ g − ½ log det(I + A)

both at the mean given the known entries. The precision that ψ_s adds to p(x_s | x_t) is

    P_s = Jᵀ (P_M + S⁻ᵀ A (I + A)⁻¹ S⁻¹) J,    J = ∂x̂_0/∂x_s = U diag(slope_s) Uᵀ.

With Gaussian data all of it is exact. Matrices are `(d, d)`, or `(B, d, d)` where they differ
between the B systems; vectors `(..., B, d)`.

Source: Rasmussen and Williams (2006), appendix A.2, for the Gaussian conditionals.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from probdiff.infer.program import Conditioned
from probdiff.infer.quadratic import eigh_each, local
from probdiff.infer.ridges import Ridges, directions, tabulate
from probdiff.kernels import bridge_variance, bridge_weights
from probdiff.prior import PriorDraw
from probdiff.reverse import Reverse
from probdiff.types import Step

_SLACK = 1.2
"""Variance of x̂_0, over that of a perfect network, which 1024 draws cannot tell from it."""
# draws of x_T at which the network's error is measured; fewer where they would have more numbers
_PROBES, _FEW_PROBES, _PROBED_NUMBERS = 1024, 64, 2**22

_Matrix = Float[Array, "*systems d d"]
_Vector = Float[Array, "... d"]


class Problem(NamedTuple):
    """The posterior that particles are to find."""

    conditioned: Conditioned
    reverse: Reverse  # the process that is walked
    known: Num[Array, "B d"] | None  # known entries
    mask: Bool[Array, "*B d"] | None  # of known entries; `(d,)` where all systems share it
    is_diagonal: bool  # whether each entry of x_0 has a likelihood of its own
    is_quadratic: bool  # whether the curvature of log r is the same everywhere
    is_ridged: bool = False  # whether log r is a sum of few functions of one direction each

    @property
    def draw(self) -> PriorDraw:
        """The prior."""
        return self.conditioned.draw

    @property
    def size(self) -> int:
        """Numbers d of one x_0."""
        return math.prod(self.reverse.event_shape)

    @property
    def systems(self) -> int:
        """Entries B of the plates around the prior."""
        return math.prod(self.conditioned.batch_shape)

    @property
    def is_observed(self) -> bool:
        """Whether sites other than known entries are observed."""
        return bool(self.conditioned.observed)

    def shaped(self, x: Num[Array, "P B d"]) -> Array:
        """As network and program see particles, `(P, *plates, *event_shape)`."""
        return x.reshape(len(x), *self.conditioned.batch_shape, *self.reverse.event_shape)

    def flat(self, x: Array) -> Num[Array, "P B d"]:
        """The way back."""
        return x.reshape(len(x), self.systems, self.size)

    def log_r(self, x: Num[Array, "P B d"], *, on_grid: bool = False) -> Float[Array, "P B"]:
        """log r; between the values of a grid unless told to put x_0 on it."""
        to_data = self.reverse.to_data if on_grid else self.reverse.units.to_data
        return jax.vmap(self.conditioned.log_r)(to_data(self.shaped(x))).reshape(x.shape[:2])

    def log_elements(self, x: Num[Array, "P B d"]) -> Float[Array, "P B m"]:
        """The elements of log r, between the values of a grid."""
        x_0 = self.reverse.units.to_data(self.shaped(x))
        found = jax.vmap(self.conditioned.log_elements)(x_0)
        return jnp.concatenate([v.reshape(*x.shape[:2], -1) for v in found.values()], -1)

    def of_entries(self, values: Any) -> Array:
        """Numbers that broadcast to an event, flat: `(d,)`, or `(1,)` for one for all."""
        values = jnp.asarray(values)
        shape = self.reverse.event_shape if values.ndim else ()
        return jnp.broadcast_to(values, shape).reshape(-1)


class Reading(NamedTuple):
    """How well the network reads x_0 out of noise, told at x_T ~ π; zeros where it is perfect."""

    error: Float[Array, ""] | float  # mean squared error e² of the noise it reads
    mean: Float[Array, " d"] | float  # mean of x̂_0 over x_T ~ π, that is of x_0


PERFECT = Reading(0.0, 0.0)  # what is said of the step to the data, which no twist has to guess


class Spread(NamedTuple):
    """How x_0 hangs on x_t, were the data N(·, τ²); level t at t − 1, by entries or axes."""

    slope: Float[Array, "n d"]  # ∂x̂_0/∂x_t = √ᾱ_t w_t/(1−ᾱ_t)
    variance: Float[Array, "n d"]  # Var[x_0 | x_t] under the diffusion that is walked


def within_cells(problem: Problem) -> Array | float:
    """Variance that a known value of a grid leaves to what is put on it: that of its cell, Δ²/12.

    On the scale of the diffusion; 0 elsewhere. The open end cells count as if they were closed.
    """
    grid = problem.reverse.grid
    if grid is None or problem.known is None:
        return 0.0
    scale = problem.of_entries(problem.reverse.units.scale)
    return jnp.where(problem.mask, (problem.of_entries(grid.spacing) / scale) ** 2 / 12, 0.0)


def ridges_of(problem: Problem, points: Float[Array, "p B d"], mean: Array) -> Ridges | None:
    """The elements of log r as functions of one direction each, None where they are not."""
    if not problem.is_ridged:
        return None
    a, _ = directions(problem.log_elements, points)
    sd = jnp.sqrt(problem.of_entries(problem.draw.variance).astype(points.dtype))
    return tabulate(problem.log_elements, a, jnp.asarray(mean), sd)


def measure(problem: Problem) -> Reading:
    """How well the network reads x_0 out of noise, at draws of x_T that all share.

    x̂_0 has variance τ² − w_T over x_T ~ π where the network is right. What it has above that is
    error, large as x̂_0 divides what the network says by √ᾱ_T; seen as an error of the noise in
    x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε it is about the same at every level.
    """
    reverse, n = problem.reverse, problem.reverse.n
    count = min(_PROBES, max(_FEW_PROBES, _PROBED_NUMBERS // problem.size))
    draws = jax.random.normal(jax.random.key(0), (count, problem.size))
    x_T = problem.shaped(jnp.broadcast_to(draws[:, None], (count, problem.systems, problem.size)))
    x_0_hat = problem.flat(reverse.x_0_hat(x_T, n))
    mean = jnp.mean(x_0_hat, (0, 1))
    step = reverse.steps.at(n, 1)
    tau2 = problem.of_entries(problem.draw.variance).astype(mean.dtype)
    signal = jnp.mean(tau2 - tau2 * step.noise_t / (step.noise_t + step.alpha_bar_t * tau2))
    excess = jnp.maximum(jnp.mean(jnp.var(x_0_hat, 0)) - _SLACK * signal, 0.0)
    return Reading(excess * jnp.mean(step.alpha_bar_t / step.noise_t), mean)


def trust(tau2: Array, step: Step, error: Array | float) -> tuple[Array, Array]:
    """How far to trust x̂_0, and what its error adds to the variance of x_0.

    With s = τ² − w_t the variance of a perfect x̂_0 and E = e²(1−ᾱ_t)/ᾱ_t that of its error, x_0
    given x̂_0 has mean μ + s/(s+E) (x̂_0 − μ) and variance w_t + s E/(s+E).
    """
    signal = tau2**2 * step.alpha_bar_t / (step.noise_t + step.alpha_bar_t * tau2)
    noise = jnp.where(step.t == 1, 0.0, error * step.noise_t)  # times ᾱ_t: β_T = 1 has ᾱ_T = 0
    share = jnp.where(noise > 0, signal * step.alpha_bar_t / (signal * step.alpha_bar_t + noise), 1)
    return share, signal * (1 - share)


def trusted(problem: Problem, reading: Reading, x_0_hat: Array, t: Any) -> Array:
    """x̂_0 drawn towards the mean as far as it cannot be trusted; a slope has the mean 0."""
    covariance, step = problem.draw.covariance, problem.reverse.steps.at(t, 1)
    if covariance is None:
        tau2 = problem.of_entries(problem.draw.variance).astype(x_0_hat.dtype)
        return reading.mean + trust(tau2, step, reading.error)[0] * (x_0_hat - reading.mean)
    axes = jnp.asarray(covariance.axes, x_0_hat.dtype)
    tau2 = jnp.asarray(covariance.variances, x_0_hat.dtype)
    share, _ = trust(tau2, step, reading.error)
    return reading.mean + (((x_0_hat - reading.mean) @ axes) * share) @ axes.T


def spread(problem: Problem, reading: Reading, tau2: Array) -> Spread:
    """Slope and variance of x_0 given each level, for data of variance τ²; the file's docstring.

    The error of the network is added, but at the first level, whose step is the law itself.
    """
    reverse = problem.reverse
    step = reverse.steps.at(jnp.arange(1, reverse.n + 1), 1)
    tau2 = jnp.asarray(tau2, step.beta.dtype)
    ideal = tau2 * step.noise_t / (step.noise_t + step.alpha_bar_t * tau2)
    slope, variance = jnp.sqrt(step.alpha_bar_t) * ideal / step.noise_t, ideal
    if reverse.variance is not None:
        moves = jnp.broadcast_to(reverse.variance(None, step), ideal.shape)
        first = moves[:1]
        if reverse.last_step.is_tied:
            first = jnp.broadcast_to(step.beta[:1], first.shape)
            slope = slope.at[0].set(jnp.broadcast_to(jnp.sqrt(1 - step.beta[0]), slope.shape[1:]))
        gains = slope[:-1] ** 2 * moves[1:]
        variance = jnp.cumsum(jnp.concatenate([first, gains]), 0)
    return Spread(slope, variance + trust(tau2, step, reading.error)[1])


# with the covariance of the data


class Belief(NamedTuple):
    """Covariance of x_0 given one level, on the axes U."""

    axes: Float[Array, "d d"]  # U
    variance: Float[Array, " d"]  # c
    slope: Float[Array, " d"]  # ∂x̂_0/∂x_t along the axes

    def root(self, u: _Vector) -> _Vector:
        """S u."""
        return (u * jnp.sqrt(self.variance)) @ self.axes.T

    def root_transposed(self, x: _Vector) -> _Vector:
        """Sᵀ x."""
        return (x @ self.axes) * jnp.sqrt(self.variance)

    def inverse_root_transposed(self, u: _Vector) -> _Vector:
        """S⁻ᵀ u."""
        return (u / jnp.sqrt(self.variance)) @ self.axes.T


class Given(NamedTuple):
    """What known entries and a quadratic log r do to N(x̂_0, C); None where there is none."""

    belief: Belief
    known: _Matrix | None  # P_M
    log_det_known: Float[Array, "..."] | None  # log det of C on the known entries and 2π for each
    project: _Matrix | None  # Π
    gain: _Matrix | None  # (I + A)⁻¹ where A is not 0
    untouched: _Matrix | None  # (I + A)⁻¹ where A is 0, a projection
    log_det: Float[Array, "..."] | None  # log det(I + A)
    precision: _Matrix  # P, that ψ of this level has in x_t


def condition(belief: Belief, hessian: _Matrix | None, mask: Array | None) -> Given:
    """Work out a level; H is None where log r is not quadratic, the mask where nothing is known."""
    d = belief.variance.shape[0]
    identity = jnp.eye(d)
    S = belief.axes * jnp.sqrt(belief.variance)
    S_inverse = (belief.axes / jnp.sqrt(belief.variance)).T
    known = log_det_known = project = gain = untouched = log_det = None
    precision = jnp.zeros((d, d))
    if mask is not None:
        m = mask.astype(S.dtype)
        block = (S @ S.T) * m[..., :, None] * m[..., None, :] + identity * (1 - m)[..., None]
        inverse, log_det_known = _power(block, -1.0)
        known = inverse * m[..., :, None] * m[..., None, :]
        log_det_known += jnp.sum(m, -1) * math.log(2 * math.pi)
        project = identity - S.T @ known @ S
        precision = precision + known
    if hessian is not None:
        a = S.T @ hessian @ S
        a = a if project is None else project @ a @ project
        gain, untouched, share, log_det = _shrink(a)
        precision = precision + S_inverse.T @ share @ S_inverse
    jacobian = (belief.axes * belief.slope) @ belief.axes.T
    precision = jacobian @ precision @ jacobian
    return Given(belief, known, log_det_known, project, gain, untouched, log_det, precision)


def pulled(given: Given, g: _Vector) -> _Vector:
    """(I + A)⁻¹ g.

    Where r is sharp, what A leaves of g is a millionth of it, and g has as much rounding in the
    directions that A leaves alone: there only what is more than rounding counts.
    """
    rest = times(given.untouched, g)
    rounding = 10 * g.shape[-1] * jnp.finfo(g.dtype).eps
    is_there = jnp.sum(rest**2, -1) > rounding**2 * jnp.sum(g**2, -1)
    return times(given.gain, g) + jnp.where(is_there[..., None], rest, 0.0)


def _narrowing(precision: _Matrix, variance: Array) -> tuple[_Matrix, Float[Array, "..."]]:
    """N with N Nᵀ = (I + variance · P)⁻¹, and log det N."""
    root, log_det = _power(jnp.eye(precision.shape[-1]) + variance * precision, -0.5)
    return root, -0.5 * log_det


def times(matrix: _Matrix, x: _Vector) -> _Vector:
    """matrix · x; matrices `(d, d)` or one for each system, vectors `(..., B, d)`."""
    if matrix.ndim == 2:
        return x @ matrix.T
    flat = x.reshape(-1, *x.shape[-2:])  # told apart, or each particle would have its copy
    return jnp.einsum("bij,pbj->pbi", matrix, flat).reshape(x.shape)


def _hessian_of(curvature: Callable[[Array], Array], zeros: Float[Array, "B d"]) -> _Matrix:
    """H of a quadratic log r by d products."""
    d = zeros.shape[-1]

    def column(index: Array) -> Array:
        return curvature(jnp.broadcast_to(jnp.eye(d)[index], zeros.shape))

    hessian = jnp.moveaxis(jax.lax.map(column, jnp.arange(d)), 0, -1)
    values, vectors = _eigen(hessian)  # positive curvature of log r counts as zero
    return _scaled(vectors, jnp.maximum(values, 0.0))


def _eigen(a: _Matrix) -> tuple[Float[Array, "*systems d"], _Matrix]:
    """Eigenpairs of the symmetric part."""
    return eigh_each(0.5 * (a + jnp.swapaxes(a, -1, -2)))


def _scaled(vectors: _Matrix, values: Float[Array, "*systems d"]) -> _Matrix:
    return (vectors * values[..., None, :]) @ jnp.swapaxes(vectors, -1, -2)


def _shrink(a: _Matrix) -> tuple[_Matrix, _Matrix, _Matrix, Float[Array, "..."]]:
    """(I + A)⁻¹ where A is not 0, and where it is, A (I + A)⁻¹, and log det(I + A).

    By the eigenpairs of A and not of I + A, in which the 1 is lost where A is large.
    """
    values, vectors = _eigen(a)
    least = a.shape[-1] * jnp.finfo(values.dtype).eps * values[..., -1:]
    is_there = values > least
    values = jnp.where(is_there, values, 0.0)
    gain, untouched = jnp.where(is_there, 1 / (1 + values), 0.0), jnp.where(is_there, 0.0, 1.0)
    parts = (_scaled(vectors, part) for part in (gain, untouched, values / (1 + values)))
    return *parts, jnp.sum(jnp.log1p(values), -1)


def _power(matrix: _Matrix, exponent: float) -> tuple[_Matrix, Float[Array, "..."]]:
    """A power of a positive definite matrix, and its log det; one LAPACK call for each matrix."""
    values, vectors = _eigen(matrix)
    values = jnp.maximum(values, jnp.finfo(values.dtype).eps * values[..., -1:])
    return _scaled(vectors, values**exponent), jnp.sum(jnp.log(values), -1)


class Common(NamedTuple):
    """What a level has in common for all particles, where the data's covariance is used."""

    given: Given
    nearer: Belief  # of x_0 given the level below
    narrowing: tuple[Array, Array]  # (N, log det N) of the proposals, for each system


def hessian(problem: Problem) -> Float[Array, "*B d d"] | None:
    """H of a quadratic log r, None where it is not."""
    if not problem.is_quadratic:
        return None
    if not problem.is_observed:  # known entries alone: r = 1
        return jnp.zeros((problem.size, problem.size))
    zeros = jnp.zeros((problem.systems, problem.size))
    at = local(problem.log_r, zeros[None])
    return _hessian_of(lambda v: at.curvature(v[None])[0], zeros)


def common(problem: Problem, reading: Reading, hessian: Array | None, t: Any) -> Common:
    """What level t has in common for all particles under the data's covariance."""
    covariance = problem.draw.covariance
    along = spread(problem, reading, covariance.variances)
    axes = jnp.asarray(covariance.axes, along.variance.dtype)
    belief, nearer = (Belief(axes, along.variance[i], along.slope[i]) for i in (t - 1, t - 2))
    given, ahead = (condition(b, hessian, problem.mask) for b in (belief, nearer))
    step, of_step = problem.reverse.steps.at(t, 0), problem.reverse.variance
    if of_step is not None:
        variance = of_step(None, step)
    else:  # for every particle alike
        weight_0, _ = bridge_weights(step)
        variance = bridge_variance(step) + weight_0**2 * jnp.mean(belief.variance)
    matrix, log_det = _narrowing(ahead.precision, variance)
    matrix = jnp.broadcast_to(matrix, (problem.systems, *matrix.shape[-2:]))
    return Common(given, nearer, (matrix, jnp.broadcast_to(log_det, problem.systems)))
