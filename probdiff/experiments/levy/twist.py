"""A twist from the law that a `Mixture` readout says of each increment, by expectation propagation.

Given x_t the readout says of every entry of x_0 a mixture of Gaussians p_i; entries are taken as
independent, and log r as quadratic with curvature −H. In

    ψ_t(x_t) = ∫ r(x_0) ∏ p_i(x_0,i) dx_0

each p_i is replaced by a Gaussian site N(m_i, C_i), chosen such that with all else as it is, site
and p_i give entry i the same mean and variance. With g the gradient of log r at m, the others say

    x_0,i ~ N(m_i + a_i/q_i, 1/q_i − C_i),    a = (I + H C)⁻¹ g,    q_i = [(H⁻¹ + C)⁻¹]_ii,

without i's own site. All sites are set at once, a few times, and move by 0.4 of the way in natural
parameters. A site is never wider than the data, whose variance is 1: a wider one, of an entry that
may be 0 or a jump, has its mean far away, and the next sweep throws others after it.

x_s has the mean w_0 E[x_0 | x_t, y] + w_t x_t. A Gaussian x_0 given x_t, as in `LaplaceTwist`,
takes what is 0 or a jump for something between, and particles collapse, wide or narrow.

Sources: Minka (2001); Hernández-Lobato et al. (2015) for entries that may be 0.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float

from probdiff.infer import Twist
from probdiff.infer.quadratic import local
from probdiff.infer.spread import Problem, hessian
from probdiff.infer.twist import Tilt, View
from probdiff.kernels import bridge_weights

_SWEEPS, _DAMPING = 6, 0.4
_NARROWEST, _WIDEST = 1e-6, 1.0
"""Variances of a site; below the first, float32 does not tell what the others say."""

_Entries = Float[Array, "P B d"]


class _Sites(NamedTuple):
    mean: _Entries
    variance: _Entries

    def towards(self, other: "_Sites") -> "_Sites":
        """A part of the way, in natural parameters."""
        precision = (1 - _DAMPING) / self.variance + _DAMPING / other.variance
        mean = (1 - _DAMPING) * self.mean / self.variance + _DAMPING * other.mean / other.variance
        return _Sites(mean / precision, 1 / precision)


class _Laws(NamedTuple):
    """Mixtures of K Gaussians, one of each entry."""

    log_weight: Float[Array, "K P B d"]
    loc: Float[Array, "K P B d"]
    variance: Float[Array, "K P B d"]

    def moments(self) -> tuple[_Entries, _Entries]:
        """Means and variances."""
        weight = jnp.exp(self.log_weight)
        mean = jnp.sum(weight * self.loc, 0)
        return mean, jnp.sum(weight * (self.variance + (self.loc - mean) ** 2), 0)

    def times(self, mean: _Entries, variance: _Entries) -> tuple[_Entries, "_Laws"]:
        """log ∫ p N(mean, variance), and the law in proportion to that product."""
        total = variance + self.variance
        joint = self.log_weight + _log_normal(self.loc - mean, total)
        log_z = jax.nn.logsumexp(joint, 0)
        loc = (mean * self.variance + self.loc * variance) / total
        return log_z, _Laws(joint - log_z, loc, self.variance * variance / total)


@dataclasses.dataclass(frozen=True)
class EntrywiseTwist(Twist):
    """∫ r ∏ p_i by expectation propagation; r Gaussian and linear, the readout a `Mixture`."""

    def __call__(self, view: View) -> Tilt:
        """log of the integral, and mean and variances of x_s under it."""
        H, laws = hessian(view.problem), _laws(view.problem, view.x_0_given())
        if H is None:
            raise ValueError("program must have a quadratic log r; use infer.LaplaceTwist")
        mean, variance = laws.moments()
        at = local(view.log_r, mean)

        def look(sites: _Sites) -> tuple[Array, _Entries, _Entries, _Sites]:
            """log ψ, means and variances of x_0, and better sites."""
            C, root, moved = sites.variance, jnp.sqrt(sites.variance), sites.mean - mean
            bent = jnp.einsum("bij,pbj->pbi", H, moved)
            eye = jnp.eye(C.shape[-1], dtype=C.dtype)
            L = jnp.linalg.cholesky(eye + root[..., :, None] * H * root[..., None, :])
            inverse = inverse_of_triangular(L)
            z = jnp.einsum("...ij,...j->...i", inverse, root * (at.gradient - bent))
            log_r = at.value + jnp.sum(moved * (at.gradient - 0.5 * bent), -1)
            log_r += 0.5 * jnp.sum(z**2, -1) - jnp.sum(jnp.log(_diagonal(L)), -1)
            a = jnp.einsum("...ji,...j->...i", inverse, z) / root
            left = jnp.sum(inverse**2, -2)  # of C_i, once y is known: 1 − q_i C_i
            q = jnp.maximum((1 - left) / C, 1e-9)
            other, width = sites.mean + a / q, left / q
            log_z, tilted = laws.times(other, width)
            E, V = tilted.moments()
            log_psi = log_r + jnp.sum(log_z - _log_normal(a / q, width + C), -1)
            wanted = 1 / jnp.clip(1 / V - 1 / width, 1 / _WIDEST, 1 / _NARROWEST)
            better = _Sites(other + (E - other) * (width + wanted) / width, wanted)
            return log_psi, E, V, better

        sites = _Sites(mean, jnp.clip(variance, _NARROWEST, _WIDEST))
        sites = jax.lax.fori_loop(0, _SWEEPS, lambda _, old: old.towards(look(old)[-1]), sites)
        log_psi, E, V, _ = look(sites)
        weight_0, _ = bridge_weights(view.step)
        narrowed = jnp.maximum(view.variance + weight_0**2 * (V - variance), 0.01 * view.variance)
        precision = jnp.maximum(1 / narrowed - 1 / view.variance, 0.0)
        shift = weight_0 * (E - mean)
        return Tilt(log_psi, shift, precision, jnp.zeros((0, *shift.shape), shift.dtype))


def _laws(problem: Problem, law: dist.MixtureSameFamily) -> _Laws:
    """Laws of shaped particles, flat and with the components first."""
    parts = law.component_distribution
    found = jax.nn.log_softmax(law.mixing_distribution.logits), parts.loc, parts.scale**2
    return _Laws(*(jax.vmap(problem.flat, -1)(a) for a in found))


def _log_normal(x: Array, variance: Array) -> Array:
    """log N(x; 0, variance), less what is constant."""
    return -0.5 * (jnp.log(variance) + x**2 / variance)


def _diagonal(matrix: Float[Array, "*batch d d"]) -> Float[Array, "*batch d"]:
    return jnp.diagonal(matrix, axis1=-2, axis2=-1)


def inverse_of_triangular(L: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """L⁻¹ of lower triangular matrices, by blocks on the diagonal whose size doubles.

    A block of two inverted ones, A and D, with B below, has the inverse (A⁻¹, 0; −D⁻¹ B A⁻¹, D⁻¹).
    All is products of many small matrices: in a loop on a CPU a triangular solve with d right sides
    takes a hundred times as long.
    """
    d, batch = L.shape[-1], L.shape[:-2]
    n = 1 << (d - 1).bit_length()
    whole = jnp.broadcast_to(jnp.eye(n, dtype=L.dtype), (*batch, n, n)).at[..., :d, :d].set(L)
    blocks = 1 / _diagonal(whole)[..., None, None]
    size = 1
    while size < n:
        count = n // (2 * size)
        of_pairs = whole.reshape(*batch, count, 2 * size, count, 2 * size)
        B = jnp.diagonal(of_pairs[..., size:, :, :size], axis1=-4, axis2=-2)
        A, D = blocks[..., ::2, :, :], blocks[..., 1::2, :, :]
        below = -D @ jnp.moveaxis(B, -1, -3) @ A
        upper = jnp.concatenate([A, jnp.zeros_like(A)], -1)
        blocks = jnp.concatenate([upper, jnp.concatenate([below, D], -1)], -2)
        size *= 2
    return blocks[..., 0, :d, :d]
