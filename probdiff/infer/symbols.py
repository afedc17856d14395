"""The twist of bits and classes: r against the predicted law of x_0, entry by entry.

The network says p(x_0 | x_t) = ∏ p_i(x_0i | x_t). Around a probable x̂ every change of one entry is
tried,

    Δ_i(k) = log r(x̂ with x̂_i = k) − log r(x̂),

which costs evaluations of r and none of the network, and

    log ψ_t(x_t) = log r(x̂) + Σ_i log Σ_k p_i(k) e^{Δ_i(k)}.

This is E[r(x_0)] under the predicted law exactly where r is a product over entries. The proposal is
locally informed: the bridge averaged over p̃_i(k) ∝ p_i(k) e^{Δ_i(k)} instead of p_i. A known entry
is one where p̃ has a single state.

Where r joins entries (a sum, a parity), gains of single changes may not add up: each of two bits
alone may mend what both together spoil. Then x̂ climbs from the most probable state, one entry at a
time, to where no single change raises p r, and the sum stays near or below what r can give.

Sources: Sohl-Dickstein et al. (2015), appendix C, for products of a binomial step with r; Zanella
(2020) for proposals informed by all changes of one entry.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from probdiff import readouts
from probdiff.infer.expansion import expand, sum_event
from probdiff.infer.levels import Levels

DOUBT = 0.05
"""Share of an even law in what `Logits` say of x_0, which they do through f_b alone and held to
[0, 1]: a certainty of theirs may be none, and ψ must not be 0 where r can still be met."""
FLOOR = -1e4
"""log r where r is 0: finite, so that changes of one entry still compare."""
DEEPEST = -40.0
"""Least Δ in a proposal, which must reach whatever is possible."""
ADDITIVE = 1e-2
"""Nats within which the gains of all entries add up, where r is a product."""
MOVES = 8
"""Most entries that x̂ changes on its way to a mode."""
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
    log_p_0 = levels.x_0_given(outputs, x_t, i).log_probs

    def reaches(state: Any) -> Any:
        return kernel.marginal(jnp.full_like(x_t, state), step).log_prob(x_t) > -jnp.inf

    if isinstance(levels.draw.trajectory.readout, readouts.Logits):
        log_p_0 = jnp.log((1 - DOUBT) * jnp.exp(log_p_0) + DOUBT / 2)
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
        base, gains = _around_mode(log_p_0, lambda x: jnp.maximum(log_r(x), FLOOR), lead)
        _, log_mass = _normalise(log_p_0 + gains)
        log_p_0, _ = _normalise(log_p_0 + jnp.maximum(gains, DEEPEST))
        log_psi += base + sum_event(log_mass, lead)
    return Informed(jnp.broadcast_to(log_psi, log_p_0.shape[:lead]), log_p_0)


class _Mode(NamedTuple):
    x_hat: Any
    base: Any
    """log r(x̂)."""
    gains: Any
    next_x: Any
    """Where log p + log r is higher, or x̂."""
    is_done: Any
    moves: Any


def _around_mode(log_p_0: Any, log_r: Callable[[Any], Any], lead: int) -> tuple[Any, Any]:
    """log r(x̂) and Δ at a state that no change of one entry makes more probable under p r.

    Where all gains together come true r is a product, and any x̂ will do.
    """
    num_states = log_p_0.shape[-1]

    def look(x_hat: Any, base: Any, moves: Any) -> _Mode:
        gains = _gains(log_r, x_hat, base, num_states)
        total = log_p_0 + gains
        at_x_hat = _pick(total, x_hat)
        rises = jnp.where(total > -jnp.inf, total - at_x_hat[..., None], -jnp.inf)
        best = jnp.argmax(rises, -1)
        together = log_r(best)
        is_true = jnp.abs(together - base - sum_event(_pick(gains, best), lead)) < ADDITIVE
        rise = jnp.max(rises, -1)
        flat = rise.reshape(*rise.shape[:lead], -1)
        where = jax.nn.one_hot(jnp.argmax(flat, -1), flat.shape[-1], dtype=bool)
        single = jnp.where(where.reshape(rise.shape), best, x_hat)
        is_done = is_true | (jnp.max(flat, -1) <= 0)
        return _Mode(x_hat, base, gains, single, is_done, moves)

    def climb(mode: _Mode) -> _Mode:
        new = look(mode.next_x, log_r(mode.next_x), mode.moves + 1)
        stays = mode.is_done

        def keep(old: Any, new: Any) -> Any:
            return jnp.where(expand(stays, new.ndim), old, new) if new.ndim else new

        return jax.tree.map(keep, mode, new)

    x_hat = jnp.argmax(log_p_0, -1)
    mode = jax.lax.while_loop(
        lambda m: ~jnp.all(m.is_done) & (m.moves < MOVES), climb, look(x_hat, log_r(x_hat), 0)
    )
    return mode.base, mode.gains


def _pick(table: Any, x: Any) -> Any:
    return jnp.take_along_axis(table, x[..., None], -1)[..., 0]


def _gains(log_r: Callable[[Any], Any], x_hat: Any, base: Any, num_states: int) -> Any:
    """Δ_i(k), `(*lead, *event, K)`."""
    lead_shape = base.shape
    flat = x_hat.reshape(*lead_shape, -1)
    size = flat.shape[-1]

    def gain(index: Any) -> Any:
        changed = flat.at[..., index // num_states].set(index % num_states)
        return log_r(changed.reshape(x_hat.shape)) - base

    gains = jax.lax.map(gain, jnp.arange(size * num_states), batch_size=BLOCK)
    gains = gains.reshape(size, num_states, *lead_shape)
    gains = jnp.moveaxis(gains, (0, 1), (-2, -1))
    return gains.reshape(*x_hat.shape, num_states)


def _normalise(log_p: Any) -> tuple[Any, Any]:
    """Log-probabilities that sum to one, and the log of what they summed to."""
    total = jax.nn.logsumexp(log_p, -1)
    is_there = total > -jnp.inf
    return log_p - jnp.where(is_there, total, 0.0)[..., None], total
