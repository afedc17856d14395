"""The twist of bits and classes: r against the predicted law of x_0, entry by entry.

The network says p(x_0 | x_t) = ∏ p_i(x_0i | x_t). Around the most probable x̂ every change of one
entry is tried,

    Δ_i(k) = log r(x̂ with x̂_i = k) − log r(x̂),

which costs evaluations of r and none of the network, and

    log ψ_t(x_t) = log r(x̂) + Σ_i log Σ_k p_i(k) e^{Δ_i(k)}.

This is E[r(x_0)] under the predicted law exactly where r is a product over entries. The proposal is
locally informed: the bridge averaged over p̃_i(k) ∝ p_i(k) e^{Δ_i(k)} instead of p_i. A known entry
is one where p̃ has a single state.

Sources: Sohl-Dickstein et al. (2015), appendix C, for products of a binomial step with r; Zanella
(2020) for proposals informed by all changes of one entry.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probdiff.infer.expansion import sum_event
from probdiff.infer.levels import Levels, log_probabilities

FLOOR = -1e4
"""log r where r is 0: finite, so that changes of one entry still compare."""
BLOCK = 64
"""Changes of one entry tried at once."""


class Informed(NamedTuple):
    """log ψ, and the predicted law of x_0 after r."""

    log_psi: Any
    """`lead`."""
    log_p_0: Any
    """log p̃ of each state, normalised, `(*lead, *event, K)`."""


def predicted(levels: Levels, outputs: tuple[Any, ...], x_t: Any, i: Any) -> Any:
    """log p(x_0 | x_t) of each state, those left out from which x_t cannot come."""
    kernel, step = levels.draw.trajectory.kernel, levels.step(i)
    log_p_0 = log_probabilities(levels.x_0_given(outputs, x_t, i))

    def reaches(state: Any) -> Any:
        return kernel.marginal(jnp.full_like(x_t, state), step).log_prob(x_t) > -jnp.inf

    can_reach = jnp.moveaxis(jax.vmap(reaches)(jnp.arange(log_p_0.shape[-1])), 0, -1)
    return _normalise(jnp.where(can_reach, log_p_0, -jnp.inf))[0]


def inform(
    log_p_0: Any, log_r: Callable[[Any], Any] | None, known: Any, mask: Any, event_dim: int
) -> Informed:
    """Multiply a factorised law of x_0 by r.

    Args:
        log_p_0: log p_i(k), `(*lead, *event, K)`.
        log_r: log r of states `(*lead, *event)`; None where r is 1.
        known: Known states, or None.
        mask: True where a state is known.
        event_dim: Number of axes of one x_0.
    """
    lead = log_p_0.ndim - 1 - event_dim
    log_psi = 0.0
    if known is not None:
        is_state = known[..., None] == jnp.arange(log_p_0.shape[-1])
        log_p_0, log_mass = _normalise(jnp.where(mask[..., None] & ~is_state, -jnp.inf, log_p_0))
        log_psi += sum_event(log_mass, lead)
    if log_r is not None:
        x_hat = jnp.argmax(log_p_0, -1)
        base = jnp.maximum(log_r(x_hat), FLOOR)
        log_p_0, log_mass = _normalise(log_p_0 + _gains(log_r, x_hat, base, log_p_0.shape[-1]))
        log_psi += base + sum_event(log_mass, lead)
    return Informed(jnp.broadcast_to(log_psi, log_p_0.shape[:lead]), log_p_0)


def _gains(log_r: Callable[[Any], Any], x_hat: Any, base: Any, num_states: int) -> Any:
    """Δ_i(k), `(*lead, *event, K)`."""
    lead_shape = base.shape
    flat = x_hat.reshape(*lead_shape, -1)
    size = flat.shape[-1]

    def gain(index: Any) -> Any:
        changed = flat.at[..., index // num_states].set(index % num_states)
        return jnp.maximum(log_r(changed.reshape(x_hat.shape)), FLOOR) - base

    gains = jax.lax.map(gain, jnp.arange(size * num_states), batch_size=BLOCK)
    gains = gains.reshape(size, num_states, *lead_shape)
    gains = jnp.moveaxis(gains, (0, 1), (-2, -1))
    return gains.reshape(*x_hat.shape, num_states)


def _normalise(log_p: Any) -> tuple[Any, Any]:
    """Log-probabilities that sum to one, and the log of what they summed to."""
    total = jax.nn.logsumexp(log_p, -1)
    is_there = total > -jnp.inf
    return log_p - jnp.where(is_there, total, 0.0)[..., None], total
