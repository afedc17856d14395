"""Conditioning on Gaussian data whose whole covariance is known: x_0 ~ N(·, Σ), Σ = U diag(λ) Uᵀ.

Given a level, x_0 then has covariance C_t = U diag(c_t) Uᵀ, c_t = λ(1−ᾱ_t)/(1−ᾱ_t+ᾱ_t λ), and a
root S = U diag(√c_t). What does not depend on the particle is worked out once for a level:

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
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from probdiff.infer.quadratic import eigh_each

Matrix = Float[Array, "*systems d d"]
Vector = Float[Array, "... d"]


class Belief(NamedTuple):
    """Covariance of x_0 given one level, on the axes U."""

    axes: Float[Array, "d d"]
    """U."""
    variance: Float[Array, " d"]
    """c."""
    slope: Float[Array, " d"]
    """∂x̂_0/∂x_t along the axes."""

    def root(self, u: Vector) -> Vector:
        """S u."""
        return (u * jnp.sqrt(self.variance)) @ self.axes.T

    def root_transposed(self, x: Vector) -> Vector:
        """Sᵀ x."""
        return (x @ self.axes) * jnp.sqrt(self.variance)

    def inverse_root_transposed(self, u: Vector) -> Vector:
        """S⁻ᵀ u."""
        return (u / jnp.sqrt(self.variance)) @ self.axes.T


class Given(NamedTuple):
    """What known entries and a quadratic log r do to N(x̂_0, C); None where there is none."""

    belief: Belief
    known: Matrix | None
    """P_M."""
    log_det_known: Float[Array, "..."] | None
    """log det of C on the known entries and 2π for each."""
    project: Matrix | None
    """Π."""
    gain: Matrix | None
    """(I + A)⁻¹ where A is not 0."""
    untouched: Matrix | None
    """(I + A)⁻¹ where A is 0, a projection."""
    log_det: Float[Array, "..."] | None
    """log det(I + A)."""
    precision: Matrix
    """P, that ψ of this level has in x_t."""


def condition(belief: Belief, hessian: Matrix | None, mask: Array | None) -> Given:
    """Work out a level.

    Args:
        belief: x_0 given the level.
        hessian: H, or None where log r is not quadratic.
        mask: True where an entry is known, `(d,)` or `(B, d)`, or None.
    """
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


def pulled(given: Given, g: Vector) -> Vector:
    """(I + A)⁻¹ g.

    Where r is sharp, what A leaves of g is a millionth of it, and g has as much rounding in the
    directions that A leaves alone: there only what is more than rounding counts.
    """
    rest = times(given.untouched, g)
    rounding = 10 * g.shape[-1] * jnp.finfo(g.dtype).eps
    is_there = jnp.sum(rest**2, -1) > rounding**2 * jnp.sum(g**2, -1)
    return times(given.gain, g) + jnp.where(is_there[..., None], rest, 0.0)


def narrowing(precision: Matrix, variance: Array) -> tuple[Matrix, Float[Array, "..."]]:
    """N with N Nᵀ = (I + variance · P)⁻¹, and log det N."""
    root, log_det = _power(jnp.eye(precision.shape[-1]) + variance * precision, -0.5)
    return root, -0.5 * log_det


def times(matrix: Matrix, x: Vector) -> Vector:
    """matrix · x; matrices `(d, d)` or one for each system, vectors `(..., B, d)`."""
    if matrix.ndim == 2:
        return x @ matrix.T
    flat = x.reshape(-1, *x.shape[-2:])  # told apart, or each particle would have its copy
    return jnp.einsum("bij,pbj->pbi", matrix, flat).reshape(x.shape)


def hessian_of(curvature: Callable[[Array], Array], zeros: Float[Array, "B d"]) -> Matrix:
    """H of a quadratic log r by d products."""
    d = zeros.shape[-1]

    def column(index: Array) -> Array:
        return curvature(jnp.broadcast_to(jnp.eye(d)[index], zeros.shape))

    rows = jax.lax.map(column, jnp.arange(d))
    hessian = jnp.moveaxis(rows, 0, -1)
    hessian = 0.5 * (hessian + jnp.swapaxes(hessian, -1, -2))
    values, vectors = eigh_each(hessian)  # positive curvature of log r counts as zero
    return (vectors * jnp.maximum(values, 0.0)[..., None, :]) @ jnp.swapaxes(vectors, -1, -2)


def _shrink(a: Matrix) -> tuple[Matrix, Matrix, Matrix, Float[Array, "..."]]:
    """(I + A)⁻¹ where A is not 0, and where it is, A (I + A)⁻¹, and log det(I + A).

    By the eigenpairs of A and not of I + A, in which the 1 is lost where A is large.
    """
    values, vectors = eigh_each(0.5 * (a + jnp.swapaxes(a, -1, -2)))
    least = a.shape[-1] * jnp.finfo(values.dtype).eps * values[..., -1:]
    is_there = values > least
    values = jnp.where(is_there, values, 0.0)

    def scaled(factor: Array) -> Matrix:
        return (vectors * factor[..., None, :]) @ jnp.swapaxes(vectors, -1, -2)

    shares = values / (1 + values)
    gain, untouched = jnp.where(is_there, 1 / (1 + values), 0.0), jnp.where(is_there, 0.0, 1.0)
    log_det = jnp.sum(jnp.log1p(values), -1)
    return scaled(gain), scaled(untouched), scaled(shares), log_det


def _power(matrix: Matrix, exponent: float) -> tuple[Matrix, Float[Array, "..."]]:
    """A power of a positive definite matrix, and its log det; one LAPACK call for each matrix."""
    values, vectors = eigh_each(0.5 * (matrix + jnp.swapaxes(matrix, -1, -2)))
    values = jnp.maximum(values, jnp.finfo(values.dtype).eps * values[..., -1:])
    scaled = vectors * (values**exponent)[..., None, :]
    return scaled @ jnp.swapaxes(vectors, -1, -2), jnp.sum(jnp.log(values), -1)
