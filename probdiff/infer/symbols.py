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

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from probdiff.infer.steps import SymbolProposal
from probdiff.infer.twist import Look, Tilt, Twist, View, looked
from probdiff.prior import PriorDraw

_FLOOR = -1e4  # log r where r is 0: finite, so that changes of one entry still compare
_DEEPEST = -40.0  # least Δ in a proposal, which must reach whatever is possible
_ADDITIVE = 1e-2  # nats within which the gains of all entries add up, where r is a product
_MOVES = 8  # most entries that x̂ changes on its way to a mode
_BLOCK = 64  # changes of one entry tried at once

_Symbols = Int[Array, "P B d"]
_LogLaw = Float[Array, "P B d K"]
_Known = ArrayLike | None
_LogR = Callable[[_Symbols], Float[Array, "P B"]]


@dataclasses.dataclass(frozen=True)
class SymbolTwist(Twist):
    """r against the predicted law of x_0, every change of one entry tried; for bits and classes.

    What `SMC` and `Guided` take for symbols. It takes no arguments.

    Example:
        Three bits of B(½), each seen through a channel that flips one in ten:

        >>> prior = standard_diffusion((3,), kernel=BernoulliKernel(0.5)).prior({})
        >>> def program(y):
        ...     numpyro.sample("y", dist.Bernoulli(0.1 + 0.8 * prior()).to_event(1), obs=y)
        >>> smc = infer.SMC(program, num_particles=400, twist=infer.SymbolTwist())
        >>> smc.run(jax.random.key(0), y=jnp.array([1, 1, 0]))
        >>> [round(float(p), 1) for p in smc.get_samples()["x_0"].mean(0)]
        [0.9, 0.9, 0.1]

    Source: Zanella (2020).
    """

    def __repr__(self) -> str:
        return "twist of symbols"

    def __call__(self, view: View) -> Tilt:
        """Refused, as symbols do not move by a shift; see `look`."""
        raise TypeError("a twist of symbols has no tilt; see look")

    def look(self, view: View) -> Look:
        """log ψ_t, and the bridge averaged over the informed law."""
        reverse, problem = view.problem.reverse, view.problem
        log_r = _log_r(view)
        if view.is_last:
            log_p = _flat(view, view.law.log_probs)
            informed = inform(log_p, log_r, view.known, view.mask)
            return _look(log_p, informed.log_p_0, informed.log_psi, view.known, view.mask)
        x_t = problem.shaped(view.x_t)
        outputs = reverse.outputs(x_t, view.t)
        log_p = _flat(view, reverse.step(x_t, view.t, outputs).log_probs)
        if log_r is None and view.known is None:
            nothing = jnp.zeros(view.x_t.shape[:-1])
            return looked(nothing, SymbolProposal(log_p, log_p, nothing), nothing)
        informed = inform(_predicted(view, x_t, outputs), log_r, view.known, view.mask)
        finite = jnp.maximum(informed.log_p_0, _FLOOR).reshape(*x_t.shape, -1)
        bridge = reverse.kernel.bridge_given(finite, x_t, reverse.coefficients(view.t))
        return _look(log_p, _flat(view, bridge.log_probs), informed.log_psi, None, None)

    def check(self, draw: PriorDraw) -> None:
        """Raise a `ValueError` for numbers."""
        if not draw.reverse.kernel.is_discrete:
            raise ValueError(
                f"twist must be one of numbers for {draw.reverse.kernel}; got {self}. Leave it out"
            )

    def products(self, size: int, *, is_known_alone: bool) -> int:
        """None."""
        return 0

    def advice(self, more: str, *, has_covariance: bool) -> str:
        """More particles."""
        return f"Raise {more}"


def _flat(view: View, log_probs: Array) -> _LogLaw:
    return log_probs.reshape(*view.x_t.shape, -1)


def _log_r(view: View) -> _LogR | None:
    return (lambda x: view.problem.log_r(x, on_grid=True)) if view.problem.is_observed else None


def _look(log_p: _LogLaw, log_q: _LogLaw, log_psi: Array, known: _Known, mask: _Known) -> Look:
    """Known entries at the end are set, their mass counted."""
    pinned = jnp.zeros(log_psi.shape)
    if known is not None:
        is_state = known[..., None] == jnp.arange(log_p.shape[-1])
        mass = jnp.max(jnp.where(is_state, log_p, -jnp.inf), -1)
        pinned = jnp.sum(jnp.where(mask, mass, 0.0), -1)
        certain = jnp.where(is_state, 0.0, -jnp.inf)
        log_p, log_q = (jnp.where(mask[..., None], certain, a) for a in (log_p, log_q))
    return looked(log_psi, SymbolProposal(log_p, log_q, pinned), jnp.zeros(log_psi.shape))


class Informed(NamedTuple):
    """log ψ, and the predicted law of x_0 after r."""

    log_psi: Float[Array, "P B"]
    log_p_0: _LogLaw  # log p̃ of each state, normalised


def _predicted(view: View, x_t: Array, outputs: tuple[Array, ...]) -> _LogLaw:
    """log p(x_0 | x_t) of each state, those left out from which x_t cannot come."""
    reverse = view.problem.reverse
    log_p_0, doubt = reverse.x_0_given(x_t, view.t, outputs).log_probs, reverse.readout.doubt
    if doubt > 0:
        log_p_0 = jnp.log((1 - doubt) * jnp.exp(log_p_0) + doubt / log_p_0.shape[-1])

    def reaches(state: Array) -> Array:
        at = reverse.kernel.marginal(jnp.full_like(x_t, state), reverse.coefficients(view.t))
        return at.log_prob(x_t) > -jnp.inf

    can_reach = jnp.moveaxis(jax.vmap(reaches)(jnp.arange(log_p_0.shape[-1])), 0, -1)
    return _normalise(_flat(view, jnp.where(can_reach, log_p_0, -jnp.inf)))[0]


def inform(log_p_0: _LogLaw, log_r: _LogR | None, known: _Known, mask: _Known) -> Informed:
    """Multiply a factorised law log p_i(k) of x_0 by r, 1 for None, and set known states."""
    log_psi = 0.0
    if known is not None:
        is_state = known[..., None] == jnp.arange(log_p_0.shape[-1])
        log_p_0, log_mass = _normalise(jnp.where(mask[..., None] & ~is_state, -jnp.inf, log_p_0))
        log_psi += jnp.sum(log_mass, -1)
    if log_r is not None:
        base, gains = _around_mode(log_p_0, lambda x: jnp.maximum(log_r(x), _FLOOR))
        _, log_mass = _normalise(log_p_0 + gains)
        log_p_0, _ = _normalise(log_p_0 + jnp.maximum(gains, _DEEPEST))
        log_psi += base + jnp.sum(log_mass, -1)
    return Informed(jnp.broadcast_to(log_psi, log_p_0.shape[:-2]), log_p_0)


class _Mode(NamedTuple):
    x_hat: _Symbols
    base: Float[Array, "P B"]  # log r(x̂)
    gains: _LogLaw
    next_x: _Symbols  # where log p + log r is higher, or x̂
    is_done: Array
    moves: Any


def _around_mode(log_p_0: _LogLaw, log_r: _LogR) -> tuple[Float[Array, "P B"], _LogLaw]:
    """log r(x̂) and Δ at a state that no change of one entry makes more probable under p r.

    Where all gains together come true r is a product, and any x̂ will do.
    """
    num_states = log_p_0.shape[-1]

    def look(x_hat: _Symbols, base: Array, moves: Any) -> _Mode:
        gains = _gains(log_r, x_hat, base, num_states)
        total = log_p_0 + gains
        at_x_hat = _pick(total, x_hat)
        rises = jnp.where(total > -jnp.inf, total - at_x_hat[..., None], -jnp.inf)
        best = jnp.argmax(rises, -1)
        together = log_r(best)
        is_true = jnp.abs(together - base - jnp.sum(_pick(gains, best), -1)) < _ADDITIVE
        rise = jnp.max(rises, -1)
        where = jax.nn.one_hot(jnp.argmax(rise, -1), rise.shape[-1], dtype=bool)
        is_done = is_true | (jnp.max(rise, -1) <= 0)
        return _Mode(x_hat, base, gains, jnp.where(where, best, x_hat), is_done, moves)

    def climb(mode: _Mode) -> _Mode:
        new = look(mode.next_x, log_r(mode.next_x), mode.moves + 1)

        def keep(old: Any, new: Any) -> Any:
            stays = mode.is_done.reshape(*mode.is_done.shape, *[1] * (new.ndim - 2))
            return jnp.where(stays, old, new) if new.ndim else new

        return jax.tree.map(keep, mode, new)

    x_hat = jnp.argmax(log_p_0, -1)
    mode = jax.lax.while_loop(
        lambda m: ~jnp.all(m.is_done) & (m.moves < _MOVES), climb, look(x_hat, log_r(x_hat), 0)
    )
    return mode.base, mode.gains


def _pick(table: _LogLaw, x: _Symbols) -> Float[Array, "P B d"]:
    return jnp.take_along_axis(table, x[..., None], -1)[..., 0]


def _gains(log_r: _LogR, x_hat: _Symbols, base: Array, num_states: int) -> _LogLaw:
    """Δ_i(k)."""

    def gain(index: Array) -> Array:
        return log_r(x_hat.at[..., index // num_states].set(index % num_states)) - base

    size = x_hat.shape[-1]
    gains = jax.lax.map(gain, jnp.arange(size * num_states), batch_size=_BLOCK)
    gains = gains.reshape(size, num_states, *base.shape)
    return jnp.moveaxis(gains, (0, 1), (-2, -1))


def _normalise(log_p: _LogLaw) -> tuple[_LogLaw, Float[Array, "P B d"]]:
    """Log-probabilities that sum to one, and the log of what they summed to."""
    total = jax.nn.logsumexp(log_p, -1)
    is_there = total > -jnp.inf
    return log_p - jnp.where(is_there, total, 0.0)[..., None], total
