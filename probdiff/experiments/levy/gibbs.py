"""Gibbs samplers of increments under a linear measurement: the exact posterior, by chains.

With y = A u + σ ε, and increments N(0, τ_k) of random scales, some of them switched off (u_k = 0),
a sweep is

    switches | τ, y       one after another, u integrated out
    u | switches, τ, y    all at once, a Gaussian
    τ | u                 each by itself.

Let G = AᵀA/σ², c = Aᵀy/σ², D the diagonal matrix of the scales that are on. With u integrated out
the increments see W = (G⁻¹ + D)⁻¹ and h = W G⁻¹ c. To turn u_k on raises the evidence by the factor

    (1 + τ q)^(−1/2) exp(½ τ l²/(1 + τ q)),    q = W_kk and l = h_k of the others alone,

and W and h by a rank of one. All is in float64: 1 − τ_k W_kk is as small as σ².

Source: Kail et al. (2012) for switches with the amplitudes integrated out.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from probdiff.experiments.levy.laws import Law
from probdiff.experiments.levy.twist import inverse_of_triangular


class _State(NamedTuple):
    is_on: Bool[Array, "rows d"]
    tau: Float[Array, "rows d"]


def draw_chains(
    key: Array, law: Law, matrix: Float[np.ndarray, "m d"], sigma: float,
    y: Float[np.ndarray, "signals m"], *, num_chains: int, num_warmup: int, num_samples: int,
) -> Float[np.ndarray, "num_chains num_samples signals d"]:  # fmt: skip
    """Draws of the increments behind each measurement.

    Args:
        key: Randomness.
        law: Law of one increment.
        matrix: A.
        sigma: Standard deviation σ of the noise, above 0.
        y: Measurements.
        num_chains: Chains of each signal, which start at draws of the prior.
        num_warmup: Sweeps before the first that is kept.
        num_samples: Sweeps that are kept.
    """
    signals, d = len(y), matrix.shape[1]
    with jax.enable_x64(True):
        G = jnp.asarray(matrix.T @ matrix / sigma**2, jnp.float64)
        c = np.tile(np.asarray(y, np.float64) @ matrix / sigma**2, (num_chains, 1))
        found = _run(key, law, G, jnp.asarray(c), num_warmup, num_samples)
        found = np.asarray(found).reshape(num_samples, num_chains, signals, d)
    return np.swapaxes(found, 0, 1)


@functools.partial(jax.jit, static_argnums=(1, 4, 5))
def _run(key: Array, law: Law, G: Array, c: Array, num_warmup: int, num_samples: int) -> Array:
    key_on, key_tau, *keys = jax.random.split(key, 4)
    state = _State(law.is_on(key_on, c.shape), law.scales(key_tau, c.shape).astype(c.dtype))
    sweep = functools.partial(_sweep, law, G, c)
    state, _ = jax.lax.scan(
        lambda state, key: (sweep(state, key)[0], None), state,
        jax.random.split(keys[0], num_warmup),
    )  # fmt: skip
    return jax.lax.scan(sweep, state, jax.random.split(keys[1], num_samples))[1]


def _sweep(law: Law, G: Array, c: Array, state: _State, key: Array) -> tuple[_State, Array]:
    key_on, key_u, key_tau, key_off = jax.random.split(key, 4)
    is_on, tau = state
    if law.log_odds < np.inf:
        is_on = _switch(key_on, law.log_odds, G, c, state)
    u = _amplitudes(key_u, G, c, jnp.where(is_on, jnp.sqrt(tau), 0.0))
    fresh = law.scales(key_off, tau.shape).astype(tau.dtype)
    tau = jnp.where(is_on, law.scales_given(key_tau, u), fresh)
    return _State(is_on, tau), u


def _root(G: Array, sd: Array) -> Array:
    """L with L Lᵀ = I + D^½ G D^½."""
    return jnp.linalg.cholesky(jnp.eye(len(G)) + sd[:, :, None] * G * sd[:, None, :])


def _amplitudes(key: Array, G: Array, c: Array, sd: Array) -> Array:
    """A draw of u ~ N(0, sd²) given y."""
    solve = functools.partial(jax.scipy.linalg.solve_triangular, _root(G, sd), lower=True)
    z = solve((sd * c)[..., None])
    z = z + jax.random.normal(key, z.shape, z.dtype)
    return sd * solve(z, trans=1)[..., 0]


def _switch(key: Array, log_odds: float, G: Array, c: Array, state: _State) -> Array:
    """Every switch once, in random order."""
    key_order, key_u = jax.random.split(key)
    is_on, tau = state
    d, sd = len(G), jnp.where(is_on, jnp.sqrt(tau), 0.0)
    inverse = inverse_of_triangular(_root(G, sd))
    B = inverse @ (sd[:, :, None] * G)
    W = G - jnp.swapaxes(B, 1, 2) @ B
    h = c - jnp.einsum("rij,rik,rk->rj", B, inverse, sd * c)

    def turn(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
        W, h, is_on = carry
        k, threshold = inputs
        t, was_on, row, of_y = tau[:, k], is_on[:, k], W[:, k], h[:, k]
        left = jnp.where(was_on, 1 - t * row[:, k], 1.0)
        total = 1 + t * row[:, k] / left
        gain = 0.5 * (t * (of_y / left) ** 2 / total - jnp.log(total))
        now_on = threshold < log_odds + gain
        change = jnp.where(now_on, -t / total, t / left)
        change = jnp.where(now_on == was_on, 0.0, change)
        W = W + change[:, None, None] * row[:, :, None] * row[:, None, :]
        return (W, h + (change * of_y)[:, None] * row, is_on.at[:, k].set(now_on)), None

    order = jax.random.permutation(key_order, d)
    thresholds = jax.random.logistic(key_u, (d, len(c)), c.dtype)
    (_, _, is_on), _ = jax.lax.scan(turn, (W, h, is_on), (order, thresholds))
    return is_on
