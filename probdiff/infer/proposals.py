"""Proposals: p(x_s | x_t) moved and narrowed by a twist, with the log ratio of p to it.

Numbers: N(mean, V) shifted, its precision raised by a diagonal D and a low rank,

    q = N(mean + shift, (V⁻¹ + D + P + Σ f fᵀ)⁻¹)

with P one matrix for all particles of a level, given by N with N Nᵀ = (I + v P)⁻¹, v the level's V.

Symbols: each entry from a law q_i of its own, or, one time in ten, all of them from p,

    q = (1 − ε) ∏ q_i + ε ∏ p_i,

so that q reaches whatever r joins across entries. Both return log p − log q of their draw such that
a twist that changes nothing leaves weights that are exactly one.

Source: Hesterberg (1995), defensive mixtures.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from probdiff.infer.expansion import expand, sum_event
from probdiff.infer.jacobi import eigh
from probdiff.kernels import States

OPEN = 0.1
"""Share of a symbol proposal that stays with p: no weight exceeds what p would give by more than
1/OPEN, even where r joins entries and each on its own looks decided."""
EXCLUDED = -5e3
"""Log-probability at or below which a proposal says never."""


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

    def draw(self, key: Array, common: tuple[Array, Array] | None) -> tuple[Array, Array]:
        """x_s and log p(x_s | x_t) − log q(x_s | x_t); `common` is (N, log det N)."""
        z = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.place(z, common)

    def place(self, z: Array, common: tuple[Array, Array] | None = None) -> tuple[Array, Array]:
        """x_s for standard normal noise z, and the log ratio."""
        lead = self.pinned.ndim
        narrowed = jnp.sqrt(1 / (1 + self.variance * self.diagonal))
        sd = jnp.sqrt(self.variance)
        log_det = sum_event(_log_unless_pinned(narrowed), lead)
        y, rows = z, self.factors * (sd * narrowed)[_axis(lead)]
        if common is not None:
            matrix, log_det_common = common
            log_det += log_det_common
            rows = _multiply(matrix.T, rows, lead + 1)
        if self.factors.shape[lead] > 0:
            axes, eigenvalues = _principal_axes(rows, lead)
            along = sum_event(axes * z[_axis(lead)], lead + 1)
            shrink = 1 / jnp.sqrt(1 + eigenvalues) - 1
            y = z + jnp.sum(axes * expand(along * shrink, axes.ndim), lead)
            log_det -= 0.5 * jnp.sum(jnp.log1p(eigenvalues), -1)
        if common is not None:
            y = _multiply(matrix, y, lead)
        step = self.shift / sd + narrowed * y  # (x_s − mean)/sd
        is_free = narrowed > 0
        change = jnp.where(is_free, 0.5 * (z - step) * (z + step), 0.0)
        x_s = self.mean + jnp.where(is_free, sd * step, self.shift)
        return x_s, sum_event(change, lead) + log_det + self.pinned


def _multiply(matrix: Array, x: Array, lead: int) -> Array:
    """matrix · x, the axes of x behind the first `lead` taken as one."""
    return (x.reshape(*x.shape[:lead], matrix.shape[0]) @ matrix.T).reshape(x.shape)


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
    """log q of each state; at `EXCLUDED` or below where the state is ruled out."""
    pinned: Any
    """log p of the entries that are set exactly, summed, `lead`."""

    def draw(self, key: Array, common: None) -> tuple[Array, Array]:
        """x_s and log p(x_s | x_t) − log of the mixture it was drawn from."""
        key_which, key_q, key_open = jax.random.split(key, 3)
        lead = self.pinned.ndim
        log_open = self._log_open()
        is_open = jax.random.bernoulli(key_which, OPEN, self.pinned.shape)
        from_q, from_open = States(self.log_q).sample(key_q), States(log_open).sample(key_open)
        x_s = jnp.where(expand(is_open, from_q.ndim), from_open, from_q)
        log_p, log_q, log_open = (
            States(law).log_prob(x_s) for law in (self.log_p, self.log_q, log_open)
        )
        gap = sum_event(log_open - log_q, lead)
        return x_s, sum_event(log_p - log_q, lead) - _log_mixture(gap) + self.pinned

    def _log_open(self) -> Array:
        """p, less the states that are ruled out."""
        is_out = self.log_q <= EXCLUDED
        log_p = jnp.where(is_out, -jnp.inf, self.log_p)
        total = jax.nn.logsumexp(log_p, -1, keepdims=True)
        cuts = jnp.any(is_out & (self.log_p > -jnp.inf), -1, keepdims=True)
        return log_p - jnp.where(cuts & (total > -jnp.inf), total, 0.0)


def _log_mixture(gap: Array) -> Array:
    """log(1 − OPEN + OPEN e^gap), exactly 0 at 0."""
    near = jnp.log1p(OPEN * jnp.expm1(jnp.minimum(gap, 0.0)))
    far = gap + jnp.log(OPEN + (1 - OPEN) * jnp.exp(-jnp.maximum(gap, 0.0)))
    return jnp.where(gap > 0, far, near)
