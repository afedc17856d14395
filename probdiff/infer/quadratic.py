"""The integral of r against a Gaussian, by a second-order expansion of log r.

For x_0 ~ N(m, C) and

    log r(m + δ) ≈ log r(m) + g·δ − ½ δᵀ H δ,    H ⪰ 0,

both the integral and the law of x_0 given r are closed:

    log ∫ r N(m, C) = log r(m) + ½ gᵀ C (I + H C)⁻¹ g − ½ log det(I + H C)
    E[x_0 | r] = m + C (I + H C)⁻¹ g.

H is never formed. Where every entry of x_0 has a likelihood of its own H is diagonal, and one
product H·1 gives all of it. Else k steps of Lanczos from g span the directions that count: exact
for a linear-Gaussian r of rank up to k. Where g is all but an eigenvector of H, its images say
nothing new, and the image of a fixed vector goes on, for the rest of H in the log det. Positive
curvature of log r (negative H) counts as zero, so that the integral exists; what has such curvature
is better integrated by its elements, where it can be (see `ridges`).

Vectors are the d numbers of x_0 on the last axis; all functions map over the axes in front.

Sources: Song et al. (2023) for the integral as a twist; Golub and Van Loan (2013), section 8.5, for
Jacobi rotations.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_Lead = Float[Array, "..."]
_Vector = Float[Array, "... d"]
_Eigen = tuple[Float[Array, "k ..."], Float[Array, "k k ..."]]

_TINY = 1e-20  # squared length below which a direction is taken for none
_ROUNDING = 1e-6
"""Share of its squared length below which what orthogonalisation leaves is taken for rounding."""
_SHARES = (1.0, 0.5, 0.25, 0.125)  # shares of the move towards E[x_0 | r] that are tried
_SWEEPS = 6  # of Jacobi rotations: enough for float64 up to eight rows
_LARGEST = 8  # rows from which LAPACK is the better choice


class Local(NamedTuple):
    """log r around one point per particle."""

    value: _Lead  # log r there, nats
    gradient: _Vector  # g
    curvature: Callable[[_Vector], _Vector]  # v ↦ H v, without regard to its sign


class Expansion(NamedTuple):
    """What r does to N(m, C)."""

    log_det: _Lead  # log det(I + H C)
    pull: _Vector  # (I + H C)⁻¹ g, so that E[x_0 | r] = m + C · pull
    diagonal: _Vector  # entries of a diagonal H, zero where it is given by `factors`
    factors: Float[Array, "k ... d"]  # rows f with H ≈ Σ f fᵀ
    sizes: Float[Array, "k ..."]  # eigenvalues of H C along them


def local(log_r: Callable[[_Vector], _Lead], x: _Vector) -> Local:
    """Value, gradient and curvature of log r, all finite: where r is 0 there is no direction."""

    def total(x: _Vector) -> tuple[Array, _Lead]:
        value = log_r(x)
        return jnp.sum(value), value

    def slope(x: _Vector) -> tuple[_Vector, _Lead]:
        return jax.grad(total, has_aux=True)(x)

    gradient, product, value = jax.vjp(slope, x, has_aux=True)
    keep = (jnp.isfinite(value) & jnp.isfinite(jnp.sum(gradient, -1)))[..., None]

    def curvature(v: _Vector) -> _Vector:
        product_v = product(jnp.where(keep, v, 0.0))[0]
        return jnp.where(jnp.isfinite(product_v) & keep, -product_v, 0.0)

    return Local(value, jnp.where(keep, gradient, 0.0), curvature)


def diagonal(at: Local, sd: _Vector) -> Expansion:
    """Expansion where H is diagonal and C = sd²."""
    curvature = jnp.maximum(at.curvature(jnp.ones_like(at.gradient)), 0.0)
    size = curvature * sd**2
    log_det = jnp.sum(jnp.log1p(size), -1)
    none = jnp.zeros((0, *at.gradient.shape), at.gradient.dtype)
    return Expansion(log_det, at.gradient / (1 + size), curvature, none, none[..., 0])


def low_rank(at: Local, sd: _Vector, rank: int) -> Expansion:
    """Expansion by `rank` steps of Lanczos, C = sd²."""
    g = at.gradient * sd
    values, vectors = krylov(g, lambda v: sd * at.curvature(sd * v), rank)
    # g lies in their span, and where r is sharp a hundred thousandth is left: never g less the rest
    left = jnp.sum(vectors * g, -1) / (1 + values)
    pull = jnp.sum(vectors * left[..., None], 0)
    log_det = jnp.sum(jnp.log1p(values), 0)
    per_sd = 1 / jnp.where(sd > 0, sd, 1.0)  # vectors and g are 0 where there is no width
    factors = vectors * jnp.sqrt(values)[..., None] * per_sd
    return Expansion(log_det, pull * per_sd, jnp.zeros_like(g), factors, values)


def settle(
    log_r: Callable[[_Vector], _Lead], point: _Vector, value: _Lead, move: _Vector, square: _Lead
) -> tuple[_Lead, _Lead]:
    """Where along a move log r(m + a·move) − ½ a² · square is greatest: that value, and a.

    With `move` = C · pull and `square` = moveᵀ C⁻¹ move a quadratic log r has its greatest value at
    a = 1, log r(m) + ½ gᵀ C (I + H C)⁻¹ g. For others, of heavy tails above all, that expression
    overshoots, as it trusts the slope far away; this one cannot exceed the greatest log r.
    """
    shares = jnp.asarray((*_SHARES, 0.0), value.dtype)

    def gain(share: Array) -> _Lead:
        return log_r(point + share * move) - 0.5 * share**2 * square

    gains = jnp.concatenate([jax.vmap(gain)(shares[:-1]), value[None]])
    gains = jnp.where(jnp.isnan(gains), -jnp.inf, gains)
    return jnp.max(gains, 0), shares[jnp.argmax(gains, 0)]


class Basis:
    """Vectors made orthonormal one by one, in the inner product that their duals give."""

    def __init__(self) -> None:
        self.vectors: list[_Vector] = []
        self.duals: list[_Vector] = []

    def _remainder(self, v: _Vector) -> tuple[_Vector, Bool[Array, "..."]]:
        """v without its parts along the basis; whether that is not rounding."""
        length = jnp.sum(v * v, -1)
        for b, dual in 2 * list(zip(self.vectors, self.duals, strict=True)):  # twice is enough
            v = v - b * jnp.sum(v * dual, -1)[..., None]
        return v, jnp.sum(v * v, -1) > _ROUNDING * length

    def following(
        self, v: _Vector, operator: Callable[[_Vector], _Vector]
    ) -> tuple[_Vector, Bool[Array, "..."]]:
        """The next direction: v, or where it says nothing new the image of a vector of signs."""
        v, is_new = self._remainder(v)
        signs = jax.random.rademacher(jax.random.key(len(self.vectors)), v.shape[-1:], v.dtype)
        other, other_is_new = self._remainder(operator(jnp.broadcast_to(signs, v.shape)))
        return jnp.where(is_new[..., None], v, other), is_new | other_is_new

    def add(self, v: _Vector, dual: _Vector, is_new: Bool[Array, "..."] | bool) -> _Lead:
        """Take v and its dual in, scaled to v · dual = 1, or zeros; their product before."""
        square = jnp.sum(dual * v, -1)
        is_new &= square > _TINY
        scale = jnp.where(is_new, jax.lax.rsqrt(jnp.where(is_new, square, 1.0)), 0.0)[..., None]
        self.vectors.append(v * scale)
        self.duals.append(dual * scale)
        return jnp.where(is_new, square, 0.0)


def krylov(
    start: _Vector, operator: Callable[[_Vector], _Vector], rank: int
) -> tuple[Float[Array, "k ..."], Float[Array, "k ... d"]]:
    """Eigenpairs of a symmetric operator in the space that `rank` steps from `start` span.

    Returns:
        `rank` eigenvalues, negative ones set to zero, and orthonormal vectors. A space that closes
        early goes on from the image of a vector of signs, or with zero vectors.
    """
    basis, images, v, is_new = Basis(), [], start, True
    for j in range(rank):
        if j > 0:
            v, is_new = basis.following(v, operator)
        basis.add(v, v, is_new)
        images.append(operator(basis.vectors[-1]))
        v = images[-1]
    values, rotation = ritz(basis.vectors, images)
    return values, rotated(rotation, basis.vectors)


def ritz(vectors: list[_Vector], images: list[_Vector]) -> _Eigen:
    """Eigenvalues of an operator in the span of vectors, negative ones zero, and the rotation."""
    matrix = jnp.sum(jnp.stack(vectors)[:, None] * jnp.stack(images)[None], -1)
    values, rotation = eigh(0.5 * (matrix + jnp.swapaxes(matrix, 0, 1)))
    return jnp.maximum(values, 0.0), rotation


def rotated(rotation: Float[Array, "k k ..."], vectors: list[_Vector]) -> Float[Array, "k ... d"]:
    """Vectors turned onto the axes of a rotation."""
    return jnp.sum(rotation[..., None] * jnp.stack(vectors)[:, None], 0)


def eigh(matrix: Float[Array, "k k ..."]) -> tuple[Float[Array, "k ..."], Float[Array, "k k ..."]]:
    """Eigenvalues, in no order, and eigenvectors in the second axis, of many small matrices.

    A rotation in the plane (p, q) by the angle whose tangent t solves t² + 2 t θ = 1, with
    θ = (a_qq − a_pp)/(2 a_pq), puts a zero at a_pq; sweeps over all planes converge quadratically.
    LAPACK takes the matrices of a batch one after another, which for 4 × 4 is far slower than these
    few operations on whole arrays.
    """
    k = matrix.shape[0]
    if k == 1:
        return matrix[0], jnp.ones_like(matrix)
    if k > _LARGEST:
        values, vectors = eigh_each(jnp.moveaxis(matrix, (0, 1), (-2, -1)))
        return jnp.moveaxis(values, -1, 0), jnp.moveaxis(vectors, (-2, -1), (0, 1))
    rows = [[matrix[i, j] for j in range(k)] for i in range(k)]
    one, zero = jnp.ones_like(matrix[0, 0]), jnp.zeros_like(matrix[0, 0])
    vectors = [[one if i == j else zero for j in range(k)] for i in range(k)]

    def sweep(_: Array, pair: tuple[list, list]) -> tuple[list, list]:
        for p, q in itertools.combinations(range(k), 2):
            pair = _rotate(*pair, p, q)
        return pair

    rows, vectors = jax.lax.fori_loop(0, _SWEEPS, sweep, (rows, vectors))
    return jnp.stack([rows[i][i] for i in range(k)]), jnp.stack([jnp.stack(v) for v in vectors])


def eigh_each(
    matrix: Float[Array, "*batch k k"],
) -> tuple[Float[Array, "*batch k"], Float[Array, "*batch k k"]]:
    """Eigenpairs by LAPACK, ascending, one matrix at a time.

    Threads of a CPU share out a batch, and two such calls of one program can wait for each other.
    """
    batch, k = matrix.shape[:-2], matrix.shape[-1]
    if not batch:
        return tuple(jnp.linalg.eigh(matrix))
    values, vectors = jax.lax.map(lambda m: tuple(jnp.linalg.eigh(m)), matrix.reshape(-1, k, k))
    return values.reshape(*batch, k), vectors.reshape(*batch, k, k)


def _rotate(a: list, vectors: list, p: int, q: int) -> tuple[list, list]:
    """Rotate rows and columns p and q so that a_pq becomes 0; entries are arrays of their own."""
    is_zero = a[p][q] == 0
    theta = (a[q][q] - a[p][p]) / (2 * jnp.where(is_zero, 1.0, a[p][q]))
    t = jnp.where(theta < 0, -1.0, 1.0) / (jnp.abs(theta) + jnp.sqrt(1 + theta**2))
    t = jnp.where(is_zero, 0.0, t)
    c = jax.lax.rsqrt(1 + t**2)
    s = t * c

    def columns(m: list) -> list:
        turned = [list(row) for row in m]
        for row in turned:
            row[p], row[q] = c * row[p] - s * row[q], s * row[p] + c * row[q]
        return turned

    a = columns(a)
    both = list(zip(a[p], a[q], strict=True))
    a[p], a[q] = [c * x - s * y for x, y in both], [s * x + c * y for x, y in both]
    return a, columns(vectors)
