"""The integral of r against a Gaussian, by a second-order expansion of log r.

For x_0 ~ N(m, C) and

    log r(m + δ) ≈ log r(m) + g·δ − ½ δᵀ H δ,    H ⪰ 0,

both the integral and the law of x_0 given r are closed:

    log ∫ r N(m, C) = log r(m) + ½ gᵀ C (I + H C)⁻¹ g − ½ log det(I + H C)
    E[x_0 | r] = m + C (I + H C)⁻¹ g.

H is never formed. Where every entry of x_0 has a likelihood of its own H is diagonal, and one
product H·1 gives all of it. Else k steps of Lanczos from g span the directions that count: exact
for a linear-Gaussian r of rank up to k. Where g is all but an eigenvector of H, its images say
nothing new, and the image of a fixed vector goes on: else that particle, and few others, would lack
the rest of H in its log det. Positive curvature of log r (negative H) counts as zero, so that the
integral exists.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from probdiff.infer.jacobi import eigh

Lead = Float[Array, "..."]
Event = Float[Array, "..."]

TINY = 1e-20
"""Squared length below which a direction is taken for none."""
ROUNDING = 1e-6
"""Share of its squared length below which what orthogonalisation leaves is taken for rounding."""


class Local(NamedTuple):
    """log r around one point per particle."""

    value: Lead
    """log r there, nats."""
    gradient: Event
    """g."""
    curvature: Callable[[Event], Event]
    """v ↦ H v, without regard to its sign."""


SHARES = (1.0, 0.5, 0.25, 0.125)
"""Shares of the move towards E[x_0 | r] that are tried."""


class Expansion(NamedTuple):
    """What r does to N(m, C)."""

    log_det: Lead
    """log det(I + H C)."""
    pull: Event
    """(I + H C)⁻¹ g, so that E[x_0 | r] = m + C · pull."""
    diagonal: Event
    """Entries of a diagonal H, zero where it is given by `factors`."""
    factors: Float[Array, "k ..."]
    """Rows f with H ≈ Σ f fᵀ, each (*lead, *event)."""
    sizes: Float[Array, "k ..."]
    """Eigenvalues of H C along them, (k, *lead)."""


def local(log_r: Callable[[Event], Lead], x: Event) -> Local:
    """Value, gradient and curvature of log r, all finite: where r is 0 there is no direction."""
    lead_dim = jax.eval_shape(log_r, x).ndim

    def total(x: Event) -> tuple[Array, Lead]:
        value = log_r(x)
        return jnp.sum(value), value

    def slope(x: Event) -> tuple[Event, Lead]:
        return jax.grad(total, has_aux=True)(x)

    gradient, product, value = jax.vjp(slope, x, has_aux=True)
    is_finite = jnp.isfinite(value) & jnp.isfinite(sum_event(gradient, lead_dim))
    keep = expand(is_finite, x.ndim)

    def curvature(v: Event) -> Event:
        product_v = product(jnp.where(keep, v, 0.0))[0]
        return jnp.where(jnp.isfinite(product_v) & keep, -product_v, 0.0)

    return Local(value, jnp.where(keep, gradient, 0.0), curvature)


def diagonal(at: Local, sd: Event) -> Expansion:
    """Expansion where H is diagonal and C = sd²."""
    curvature = jnp.maximum(at.curvature(jnp.ones_like(at.gradient)), 0.0)
    lead_dim, size = at.value.ndim, curvature * sd**2
    pull = at.gradient / (1 + size)
    log_det = sum_event(jnp.log1p(size), lead_dim)
    none = jnp.zeros((0, *at.gradient.shape), at.gradient.dtype)
    return Expansion(log_det, pull, curvature, none, jnp.zeros((0, *at.value.shape), none.dtype))


def low_rank(at: Local, sd: Event, rank: int) -> Expansion:
    """Expansion by `rank` steps of Lanczos, C = sd²."""
    g = at.gradient * sd
    values, vectors = krylov(g, lambda v: sd * at.curvature(sd * v), rank, at.value.ndim)
    return _from_eigenpairs(at, sd, g, values, vectors)


def known_curvature(at: Local, width: Any, values: Array, vectors: Array) -> Expansion:
    """Expansion where H has these eigenvalues and orthonormal vectors, and C = width · I.

    Args:
        at: log r at a point.
        width: Variance, broadcastable to `lead`.
        values: Eigenvalues, `(k,)`.
        vectors: Their vectors, `(k, *event)`.
    """
    lead = at.value.ndim
    vectors = jnp.expand_dims(vectors, range(1, 1 + lead))
    vectors = jnp.broadcast_to(vectors, (len(values), *at.gradient.shape))
    sizes = jnp.expand_dims(values, range(1, 1 + lead)) * width
    sizes = jnp.broadcast_to(sizes, (len(values), *at.value.shape))
    sd = expand(jnp.broadcast_to(jnp.sqrt(width), at.value.shape), at.gradient.ndim)
    return _from_eigenpairs(at, sd, at.gradient * sd, sizes, vectors)


def _from_eigenpairs(at: Local, sd: Any, g: Event, values: Array, vectors: Array) -> Expansion:
    """From the eigenpairs of sd H sd, with g = sd · gradient."""
    lead_dim, ndim = at.value.ndim, g.ndim
    along = sum_event(vectors * g, lead_dim + 1)  # g lies in their span, and where r is sharp what
    left = along / (1 + values)  # is left of it is a hundred thousandth: never g minus the rest
    pull = jnp.sum(vectors * expand(left, ndim + 1), 0)
    log_det = jnp.sum(jnp.log1p(values), 0)
    per_sd = 1 / jnp.where(sd > 0, sd, 1.0)  # vectors and g are 0 where there is no width
    factors = vectors * jnp.sqrt(expand(values, ndim + 1)) * per_sd
    return Expansion(log_det, pull * per_sd, jnp.zeros_like(g), factors, values)


def settle(
    log_r: Callable[[Event], Lead], point: Event, value: Lead, move: Event, square: Lead
) -> tuple[Lead, Lead]:
    """Where along a move log r(m + a·move) − ½ a² · square is greatest: that value, and a.

    With `move` = C · pull and `square` = moveᵀ C⁻¹ move a quadratic log r has its greatest value at
    a = 1, and there it is log r(m) + ½ gᵀ C (I + H C)⁻¹ g. For other likelihoods, of heavy tails
    above all, that expression overshoots, as it trusts the slope far away; this one cannot exceed
    the greatest log r.
    """
    shares = jnp.asarray((*SHARES, 0.0), value.dtype)

    def gain(share: Any) -> Lead:
        return log_r(point + share * move) - 0.5 * share**2 * square

    gains = jnp.concatenate([jax.vmap(gain)(shares[:-1]), value[None]])
    gains = jnp.where(jnp.isnan(gains), -jnp.inf, gains)
    best = jnp.argmax(gains, 0)
    return jnp.max(gains, 0), shares[best]


def krylov(
    start: Event, operator: Callable[[Event], Event], rank: int, lead_dim: int
) -> tuple[Float[Array, "k ..."], Float[Array, "k ..."]]:
    """Eigenpairs of a symmetric operator in the space that `rank` steps from `start` span.

    Returns:
        Eigenvalues, negative ones set to zero, `(rank, *lead)`, and orthonormal vectors
        `(rank, *lead, *event)`. A space that closes early is opened again by the image of a vector
        of signs, and filled up with zero vectors where that adds nothing.
    """
    basis, images, v, is_new = [], [], start, True
    for j in range(rank):
        if j > 0:
            v, is_new = remainder(v, basis, basis, lead_dim)
            other = remainder(operator(probe(j, start, lead_dim)), basis, basis, lead_dim)
            v, is_new = either(v, is_new, *other)
        square = sum_event(v * v, lead_dim)
        is_new &= square > TINY
        v = v * expand(
            jnp.where(is_new, jax.lax.rsqrt(jnp.where(is_new, square, 1.0)), 0.0), v.ndim
        )
        basis.append(v)
        images.append(operator(v))
        v = images[-1]
    rows, products = jnp.stack(basis), jnp.stack(images)
    return _eigenpairs(rows, products, lead_dim)


def remainder(
    v: Event, basis: list[Event], duals: list[Event], lead_dim: int
) -> tuple[Event, Bool[Array, "..."]]:
    """v without its parts along a basis, measured by its duals; whether that is not rounding."""
    length = sum_event(v * v, lead_dim)
    for b, dual in 2 * list(zip(basis, duals, strict=True)):  # twice is enough
        v = v - b * expand(sum_event(v * dual, lead_dim), v.ndim)
    return v, sum_event(v * v, lead_dim) > ROUNDING * length


def either(v: Event, is_new: Any, other: Event, other_is_new: Any) -> tuple[Event, Any]:
    """v where it is new, elsewhere the other."""
    return jnp.where(expand(is_new, v.ndim), v, other), is_new | other_is_new


def probe(j: int, like: Event, lead_dim: int) -> Event:
    """Signs, the same for all particles."""
    signs = jax.random.rademacher(jax.random.key(j), like.shape[lead_dim:], like.dtype)
    return jnp.broadcast_to(signs, like.shape)


def _eigenpairs(rows: Array, products: Array, lead_dim: int) -> tuple[Array, Array]:
    """Ritz values and vectors from a basis and its images under the operator."""
    matrix = sum_event(rows[:, None] * products[None], lead_dim + 2)
    values, rotation = eigh(0.5 * (matrix + jnp.swapaxes(matrix, 0, 1)))
    vectors = jnp.sum(expand(rotation, rows.ndim + 1) * rows[:, None], 0)
    return jnp.maximum(values, 0.0), vectors


def sum_event(x: Array, lead_dim: int) -> Array:
    """Sum over all axes behind the first `lead_dim`."""
    return jnp.sum(x, axis=tuple(range(lead_dim, x.ndim)))


def expand(x: Array, ndim: int) -> Array:
    """x with axes of size 1 behind, up to `ndim` axes."""
    return x.reshape(*x.shape, *[1] * (ndim - x.ndim))
