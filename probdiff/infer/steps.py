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

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from probdiff.infer.quadratic import eigh
from probdiff.kernels import States

# Share of a symbol proposal that stays with p: no weight exceeds what p would give by more than
# 1/_OPEN, even where r joins entries and each on its own looks decided.
_OPEN = 0.1
_EXCLUDED = -5e3  # log-probability at or below which a proposal says never


class GaussianProposal(NamedTuple):
    """Of numbers: `N` particles of one system, or one particle where a method says so."""

    mean: Float[Array, "N d"]
    variance: Float[Array, "N d"]
    shift: Float[Array, "N d"]
    diagonal: Float[Array, "N d"]
    factors: Float[Array, "N k d"]
    pinned: Float[Array, " N"]  # log p of the entries that are set exactly, summed

    def draw(self, key: Array, common: tuple[Array, Array] | None) -> tuple[Array, Array]:
        """x_s and log p(x_s | x_t) − log q(x_s | x_t); `common` is (N, log det N)."""
        z = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return jax.vmap(GaussianProposal.place, (0, 0, None))(self, z, common)

    def place(
        self, z: Float[Array, " d"], common: tuple[Array, Array] | None = None
    ) -> tuple[Array, Array]:
        """x_s of one particle for standard normal noise z, and the log ratio."""
        sd = jnp.sqrt(self.variance)
        narrowed = jnp.sqrt(1 / (1 + self.variance * self.diagonal))
        is_free = narrowed > 0
        log_det = jnp.sum(jnp.where(is_free, jnp.log(jnp.where(is_free, narrowed, 1.0)), 0.0))
        y, rows = z, self.factors * (sd * narrowed)
        if common is not None:
            matrix, log_det_common = common
            log_det += log_det_common
            rows = rows @ matrix
        if len(self.factors) > 0:
            axes, eigenvalues = _principal_axes(rows)
            shrink = 1 / jnp.sqrt(1 + eigenvalues) - 1
            along = jnp.sum(axes * z, -1) * shrink
            y = z + jnp.sum(axes * along[:, None], 0)
            log_det -= 0.5 * jnp.sum(jnp.log1p(eigenvalues))
        if common is not None:
            y = matrix @ y
        step = self.shift / sd + narrowed * y  # (x_s − mean)/sd
        change = jnp.where(is_free, 0.5 * (z - step) * (z + step), 0.0)
        x_s = self.mean + jnp.where(is_free, sd * step, self.shift)
        return x_s, jnp.sum(change) + log_det + self.pinned


def _principal_axes(rows: Float[Array, "k d"]) -> tuple[Array, Array]:
    """Orthonormal axes `(k, d)` and eigenvalues of Σ f fᵀ."""
    eigenvalues, rotation = eigh(rows @ rows.T)
    is_there = eigenvalues > 1e-12
    eigenvalues = jnp.where(is_there, eigenvalues, 0.0)
    scale = jnp.where(is_there, jax.lax.rsqrt(jnp.where(is_there, eigenvalues, 1.0)), 0.0)
    return (rotation * scale).T @ rows, eigenvalues


class SymbolProposal(NamedTuple):
    """Of symbols, each with its particles' laws; `*N` may count systems besides particles."""

    log_p: Float[Array, "*N d K"]  # log p(x_s | x_t) of each state
    log_q: Float[Array, "*N d K"]
    """log q of each state; at `_EXCLUDED` or below where the state is ruled out."""
    pinned: Float[Array, "*N"]  # log p of the entries that are set exactly, summed

    def draw(self, key: Array, common: None) -> tuple[Array, Array]:
        """x_s and log p(x_s | x_t) − log of the mixture it was drawn from."""
        x_s = self.sample(key)
        return x_s, self.log_ratio(x_s)

    def sample(self, key: Array) -> Int[Array, "*N d"]:
        """x_s from the mixture."""
        key_which, key_q, key_open = jax.random.split(key, 3)
        is_open = jax.random.bernoulli(key_which, _OPEN, self.pinned.shape)
        from_q, from_open = (
            States(law).sample(k) for law, k in ((self.log_q, key_q), (self._log_open(), key_open))
        )
        return jnp.where(is_open[..., None], from_open, from_q)

    def log_prob(self, x_s: Int[Array, "*N d"]) -> Float[Array, "*N"]:
        """log p(x_s | x_t)."""
        return jnp.sum(States(self.log_p).log_prob(x_s), -1) + self.pinned

    def log_ratio(self, x_s: Int[Array, "*N d"]) -> Float[Array, "*N"]:
        """log p(x_s | x_t) − log of the mixture."""
        laws = self.log_p, self.log_q, self._log_open()
        log_p, log_q, log_open = (States(law).log_prob(x_s) for law in laws)
        gap = jnp.sum(log_open - log_q, -1)
        return jnp.sum(log_p - log_q, -1) - _log_mixture(gap) + self.pinned

    def _log_open(self) -> Float[Array, "*N d K"]:
        """p, less the states that are ruled out."""
        is_out = self.log_q <= _EXCLUDED
        log_p = jnp.where(is_out, -jnp.inf, self.log_p)
        total = jax.nn.logsumexp(log_p, -1, keepdims=True)
        cuts = jnp.any(is_out & (self.log_p > -jnp.inf), -1, keepdims=True)
        return log_p - jnp.where(cuts & (total > -jnp.inf), total, 0.0)


def _log_mixture(gap: Array) -> Array:
    """log(1 − _OPEN + _OPEN e^gap), exactly 0 at 0."""
    near = jnp.log1p(_OPEN * jnp.expm1(jnp.minimum(gap, 0.0)))
    far = gap + jnp.log(_OPEN + (1 - _OPEN) * jnp.exp(-jnp.maximum(gap, 0.0)))
    return jnp.where(gap > 0, far, near)
