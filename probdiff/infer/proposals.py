"""Proposals: p(x_s | x_t) moved and narrowed by a twist, with the log ratio of p to it.

Numbers: N(mean, V) shifted, its precision raised by a diagonal D and a low rank,

    q = N(mean + shift, (V⁻¹ + D + Σ f fᵀ)⁻¹).

Symbols: each entry from a law of its own. Both return log p − log q of their draw computed from the
noise itself, so that a twist that changes nothing leaves weights that are exactly one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from probdiff.infer.expansion import expand, sum_event
from probdiff.infer.jacobi import eigh
from probdiff.kernels import States


class GaussianProposal(NamedTuple):
    """Leading axes of all arrays are the particles'."""

    mean: Any
    variance: Any
    shift: Any
    diagonal: Any
    factors: Any
    """`(*lead, k, *event)`."""
    pinned: Any
    """log p of the entries that are set exactly, summed, `lead`."""

    def draw(self, key: Array) -> tuple[Array, Array]:
        """x_s and log p(x_s | x_t) − log q(x_s | x_t)."""
        z = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.place(z)

    def place(self, z: Array) -> tuple[Array, Array]:
        """x_s for standard normal noise z, and the log ratio."""
        lead = self.pinned.ndim
        narrowed = jnp.sqrt(1 / (1 + self.variance * self.diagonal))
        sd = jnp.sqrt(self.variance)
        log_det = sum_event(_log_unless_pinned(narrowed), lead)
        y = z
        if self.factors.shape[lead] > 0:
            axes, eigenvalues = _principal_axes(self.factors * (sd * narrowed)[_axis(lead)], lead)
            along = sum_event(axes * z[_axis(lead)], lead + 1)
            shrink = 1 / jnp.sqrt(1 + eigenvalues) - 1
            y = z + jnp.sum(axes * expand(along * shrink, axes.ndim), lead)
            log_det -= 0.5 * jnp.sum(jnp.log1p(eigenvalues), -1)
        step = self.shift / sd + narrowed * y  # (x_s − mean)/sd
        is_free = narrowed > 0
        change = jnp.where(is_free, 0.5 * (z - step) * (z + step), 0.0)
        x_s = self.mean + jnp.where(is_free, sd * step, self.shift)
        return x_s, sum_event(change, lead) + log_det + self.pinned


def _log_unless_pinned(narrowed: Array) -> Array:
    return jnp.where(narrowed > 0, jnp.log(jnp.where(narrowed > 0, narrowed, 1.0)), 0.0)


def _axis(lead: int) -> tuple[Any, ...]:
    """Index that puts an axis behind the leading ones."""
    return (*[slice(None)] * lead, None)


def _principal_axes(rows: Array, lead: int) -> tuple[Array, Array]:
    """Orthonormal axes and eigenvalues of Σ f fᵀ: `(*lead, k, *event)`, `(*lead, k)`."""
    flat = rows.reshape(*rows.shape[: lead + 1], -1)
    gram = jnp.moveaxis(flat @ jnp.swapaxes(flat, -1, -2), (-2, -1), (0, 1))
    eigenvalues, rotation = eigh(gram)
    is_there = eigenvalues > 1e-12
    eigenvalues = jnp.where(is_there, eigenvalues, 0.0)
    scale = jnp.where(is_there, jax.lax.rsqrt(jnp.where(is_there, eigenvalues, 1.0)), 0.0)
    weights = jnp.moveaxis(rotation * scale, (1, 0), (-2, -1))  # (new, old)
    return (weights @ flat).reshape(rows.shape), jnp.moveaxis(eigenvalues, 0, -1)


class SymbolProposal(NamedTuple):
    """Leading axes of all arrays are the particles'."""

    log_p: Any
    """log p(x_s | x_t) of each state, `(*lead, *event, K)`."""
    log_q: Any
    """log q of each state."""
    pinned: Any
    """log p of the entries that are set exactly, summed, `lead`."""

    def draw(self, key: Array) -> tuple[Array, Array]:
        """x_s and log p(x_s | x_t) − log q(x_s | x_t)."""
        x_s = States(self.log_q).sample(key)
        change = States(self.log_p).log_prob(x_s) - States(self.log_q).log_prob(x_s)
        return x_s, sum_event(change, self.pinned.ndim) + self.pinned
