"""One look at a level: what network, program and twist say of all particles there.

A look gives log ψ_t and the proposal for x_s. Particles are shown to the network and the program
as `(R·N, *plates, *event)`, in blocks that fit memory, and what is said comes back as
`(S, N, ...)`, one row for each system. What all particles of a level have in common, under the
covariance of the data, is worked out once for the level.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from probdiff.infer import dense, symbols
from probdiff.infer.expansion import local, sum_event
from probdiff.infer.levels import (
    Levels,
    Reading,
    reading,
    step_variance,
    trusted,
    widths,
    widths_along,
    within_cells,
)
from probdiff.infer.program import Conditioned
from probdiff.infer.proposals import GaussianProposal, SymbolProposal
from probdiff.infer.twists import Tilt, Twist, View
from probdiff.kernels import DiscreteKernel

PERFECT = Reading(0.0, 0.0)
"""What is said of the step to the data, which no twist has to guess."""
PROBES, FEW_PROBES, PROBED_NUMBERS = 1024, 64, 2**22
"""Draws of x_T at which the network's error is told; fewer where they would have more numbers."""
LEAST = -1e4
"""log ψ where a twist says 0 or nothing: ψ must be positive wherever x_t can be."""


class Plan(NamedTuple):
    """What a run is, apart from its randomness; traced values are in `conditioned` and `levels`."""

    conditioned: Conditioned
    levels: Levels
    twist: Twist
    num_particles: int
    num_runs: int
    threshold: float
    """Share of N below which the effective number calls for resampling; 0 for never."""
    block_size: int
    is_diagonal: bool
    is_quadratic: bool
    constrain: Callable[[Any], Any]
    """Puts particles, runs leading, where they belong on several devices."""

    @property
    def num_populations(self) -> int:
        """Runs times entries of the plates."""
        return self.num_runs * math.prod(self.conditioned.batch_shape)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one x_t."""
        return self.levels.draw.diffusion.event_shape

    @property
    def uses_covariance(self) -> bool:
        """Whether the twist works with the covariance of the data."""
        return self.levels.draw.covariance is not None and self.twist.uses_covariance

    @property
    def is_discrete(self) -> bool:
        """Whether x_t are symbols."""
        return isinstance(self.levels.draw.diffusion.kernel, DiscreteKernel)

    def to_program(self, x: Array) -> Array:
        """`(S, N, ...)` to `(R·N, *plates, ...)`."""
        batch_shape = self.conditioned.batch_shape
        x = x.reshape(self.num_runs, *batch_shape, *x.shape[1:])
        x = jnp.moveaxis(x, 1 + len(batch_shape), 1)
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    def from_program(self, x: Array) -> Array:
        """`(R·N, *plates, ...)` to `(S, N, ...)`."""
        batch_dim = len(self.conditioned.batch_shape)
        x = x.reshape(self.num_runs, self.num_particles, *x.shape[1:])
        x = jnp.moveaxis(x, 1, 1 + batch_dim)
        return x.reshape(self.num_populations, *x.shape[1 + batch_dim :])


class Look(NamedTuple):
    """What one look at level t gives."""

    log_psi: Any
    """`(S, N)`."""
    proposal: Any
    """`GaussianProposal` or `SymbolProposal` of arrays `(S, N, ...)`."""
    shift: Any
    """Largest move of the mean in standard deviations, `(S, N)`."""
    bad: Any
    """Whether the twist was not finite, `(S, N)`."""


def in_blocks(plan: Plan, x: Array, at: Callable[[Any], Any]) -> Any:
    """Apply a function of particles as the program sees them, in blocks that fit memory."""
    x = plan.to_program(x)
    count, size = x.shape[0], _block(x.shape[0], plan)
    if size == count:
        out = at(x)
    else:
        blocks = x.reshape(count // size, size, *x.shape[1:])
        out = jax.lax.map(at, blocks)
        out = jax.tree.map(lambda a: a.reshape(count, *a.shape[2:]), out)
    return jax.tree.map(plan.from_program, out)


def _block(count: int, plan: Plan) -> int:
    """Largest part of the particles that divides them and stays below the block size."""
    per_sheet = plan.num_populations // plan.num_runs
    wanted = max(1, plan.block_size // per_sheet)
    return next(size for size in range(min(wanted, count), 0, -1) if count % size == 0)


class Covariances(NamedTuple):
    """What a level has in common for all particles where the data's covariance is used."""

    given: dense.Given
    nearer: dense.Belief
    common: tuple[Any, Any]
    """(N, log det N) of the proposals, the plates leading."""


def covariances(plan: Plan, read: Any, hessian: Any, i: Any) -> Covariances:
    """Level i, and the level below it."""
    levels, batch_shape = plan.levels, plan.conditioned.batch_shape
    along = widths_along(levels, read)
    axes = jnp.asarray(levels.draw.covariance.axes, along.variance.dtype)
    belief, nearer = (
        dense.Belief(axes, along.variance[i - down], along.slope[i - down]) for down in (1, 2)
    )
    mask = _flat_mask(levels.draw.mask, batch_shape, plan.event_shape)
    given, ahead = (dense.condition(b, hessian, mask) for b in (belief, nearer))
    variance = step_variance(levels, jnp.mean(belief.variance), i)
    matrix, log_det = dense.narrowing(ahead.precision, variance)
    matrix = jnp.broadcast_to(matrix, (*batch_shape, *matrix.shape[-2:]))
    return Covariances(given, nearer, (matrix, jnp.broadcast_to(log_det, batch_shape)))


def _flat_mask(mask: Any, batch_shape: tuple[int, ...], event_shape: tuple[int, ...]) -> Any:
    """The mask with flat events; without plates where it is seen to be the same in all.

    Then a level's matrices are worked out once, which for images is most of the time.
    """
    if mask is None:
        return None
    if isinstance(mask, np.ndarray):
        rows = np.broadcast_to(mask, (*batch_shape, *event_shape)).reshape(
            -1, math.prod(event_shape)
        )
        if (rows == rows[0]).all():
            return rows[0]
    return jnp.broadcast_to(mask, (*batch_shape, *event_shape)).reshape(*batch_shape, -1)


def for_populations(plan: Plan, arrays: Any) -> Any:
    """Arrays of the plates, once for each run: `(S, ...)`."""
    batch_dim = len(plan.conditioned.batch_shape)

    def tile(a: Any) -> Any:
        flat = a.reshape(-1, *a.shape[batch_dim:])
        return jnp.tile(flat, (plan.num_runs, *[1] * (flat.ndim - 1)))

    return jax.tree.map(tile, arrays)


def measure(plan: Plan) -> Any:
    """How well the network reads x_0 out of noise, at draws that all share; None for symbols."""
    if plan.is_discrete:
        return None
    batch_shape, event_shape = plan.conditioned.batch_shape, plan.event_shape
    count = min(PROBES, max(FEW_PROBES, PROBED_NUMBERS // math.prod(event_shape)))
    draws = jax.random.normal(jax.random.key(0), (count, *event_shape))
    x_T = jnp.expand_dims(draws, range(1, 1 + len(batch_shape)))
    x_T = jnp.broadcast_to(x_T, (count, *batch_shape, *event_shape))
    return reading(plan.levels, x_T)


def hessian(plan: Plan) -> Any:
    """H of a quadratic log r, None where it is not wanted."""
    if not (plan.uses_covariance and plan.is_quadratic):
        return None
    batch_shape = plan.conditioned.batch_shape
    if not plan.conditioned.observed:  # known entries alone: r = 1
        size = math.prod(plan.event_shape)
        return jnp.zeros((size, size))
    zeros = jnp.zeros((1, *batch_shape, *plan.event_shape))
    at = local(lambda x: _smooth_log_r(plan, x), zeros)
    return dense.hessian_of(lambda v: at.curvature(v[None])[0], zeros[0], len(batch_shape))


def look_at(plan: Plan, x_t: Any, i: Any, read: Any, covariance: Covariances | None) -> Look:
    if plan.is_discrete:
        return _look_at_symbols(plan, x_t, i)
    return _look_at_numbers(plan, x_t, i, read, covariance)


def _look_at_numbers(
    plan: Plan, x_t: Any, i: Any, read: Any, covariance: Covariances | None
) -> Look:
    levels = plan.levels

    def denoise(x_t: Any) -> tuple[Any, Any]:
        outputs = levels.outputs(x_t, i)
        return levels.x_0_hat(outputs, x_t, i), outputs

    x_0_hat, pull_back, outputs = jax.vjp(denoise, x_t, has_aux=True)
    law = levels.reverse(outputs, x_t, i)
    x_0_hat = trusted(levels, read, x_0_hat, i, is_slope=False)

    def pull(v: Any) -> Any:
        return pull_back(trusted(levels, read, v, i, is_slope=True))[0]

    def given() -> Any:
        return levels.x_0_given(outputs, x_t, i)

    view = _view(plan, i, x_t, law, x_0_hat, pull, given, read, covariance)
    return _look_of(plan, view, plan.twist(view), None)


def look_at_first(plan: Plan, x_1: Any) -> Look:
    levels, draw = plan.levels, plan.levels.draw
    in_units = draw.diffusion.data_given_first(draw.trajectory, x_1, draw.mask)
    law = in_units.base
    known, mask = _known(plan)
    if plan.is_discrete:
        log_p = law.log_probs
        informed = symbols.inform(log_p, _symbol_log_r(plan), known, mask, levels.event_dim)
        return _symbol_look(log_p, informed.log_p_0, informed.log_psi, known, mask)
    view = _view(plan, 1, x_1, law, law.loc, lambda v: v, lambda: law, PERFECT, None)
    pinned = None if known is None else (in_units.log_prob(draw.known), mask)
    return _look_of(plan, view, plan.twist.last(view), pinned)


def _look_at_symbols(plan: Plan, x_t: Any, i: Any) -> Look:
    levels, kernel = plan.levels, plan.levels.draw.diffusion.kernel
    outputs = levels.outputs(x_t, i)
    log_p = levels.reverse(outputs, x_t, i).log_probs
    known, mask = _known(plan)
    log_r = _symbol_log_r(plan)
    if log_r is None and known is None:
        nothing = jnp.zeros(x_t.shape[: x_t.ndim - levels.event_dim])
        return _looked(nothing, SymbolProposal(log_p, log_p, nothing), nothing)
    log_p_0 = symbols.predicted(levels, outputs, x_t, i)
    informed = symbols.inform(log_p_0, log_r, known, mask, levels.event_dim)
    finite = jnp.maximum(informed.log_p_0, symbols.FLOOR)
    log_q = kernel.bridge_given(finite, x_t, levels.step(i)).log_probs
    return _symbol_look(log_p, log_q, informed.log_psi, None, None)


def _symbol_look(log_p: Any, log_q: Any, log_psi: Any, known: Any, mask: Any) -> Look:
    """Known entries at the end are set, their mass counted."""
    pinned = jnp.zeros(log_psi.shape)
    if known is not None:
        is_state = known[..., None] == jnp.arange(log_p.shape[-1])
        mass = jnp.max(jnp.where(is_state, log_p, -jnp.inf), -1)
        pinned = sum_event(jnp.where(mask, mass, 0.0), log_psi.ndim)
        certain = jnp.where(is_state, 0.0, -jnp.inf)
        log_p, log_q = (jnp.where(mask[..., None], certain, a) for a in (log_p, log_q))
    return _looked(log_psi, SymbolProposal(log_p, log_q, pinned), jnp.zeros(log_psi.shape))


def _look_of(plan: Plan, view: View, tilt: Tilt, pinned: Any) -> Look:
    lead = view.x_t.ndim - plan.levels.event_dim
    moved = jnp.abs(tilt.shift) / jnp.sqrt(view.variance)
    log_known = jnp.zeros(tilt.log_psi.shape)
    if pinned is not None:
        log_known, mask = pinned
        moved = jnp.where(mask, 0.0, moved)
    factors = jnp.moveaxis(tilt.factors, 0, lead)
    proposal = GaussianProposal(
        view.mean, view.variance, tilt.shift, tilt.diagonal, factors, log_known
    )
    furthest = jnp.max(moved, axis=tuple(range(lead, moved.ndim)))
    return _looked(tilt.log_psi + log_known, proposal, furthest)


def _looked(log_psi: Any, proposal: Any, shift: Any) -> Look:
    is_finite = jnp.isfinite(log_psi)
    return Look(jnp.where(is_finite, log_psi, LEAST), proposal, shift, ~is_finite)


def _view(
    plan: Plan, i: Any, x_t: Any, law: Any, x_0_hat: Any, pull_back: Any, x_0_given: Any,
    read: Any, covariance: Any,
) -> View:  # fmt: skip
    mean, sd = jnp.broadcast_arrays(law.loc, law.scale)
    known, mask = _known(plan)
    of_level = widths(plan.levels, read)
    plates = range(1, 1 + len(plan.conditioned.batch_shape))
    variance = jnp.expand_dims(of_level.variance, plates) + within_cells(plan.levels.draw)
    return View(
        plan.levels, i, x_t, mean, sd**2, x_0_hat, pull_back, lambda x: _smooth_log_r(plan, x),
        known, mask, plan.is_diagonal, of_level._replace(variance=variance),
        None if covariance is None else covariance.given,
        None if covariance is None else covariance.nearer,
        x_0_given, read, bool(plan.conditioned.observed),
    )  # fmt: skip


def _known(plan: Plan) -> tuple[Any, Any]:
    """Known entries on the scale of the diffusion, and their mask."""
    draw = plan.levels.draw
    if draw.known is None:
        return None, None
    values = jnp.where(draw.mask, draw.known, jnp.zeros_like(draw.known))
    return draw.diffusion.to_state(values), draw.mask


def log_r(plan: Plan, x: Any) -> Any:
    """log r of particles on the diffusion's scale, `(P, *plates)`; at their values on a grid."""
    return jax.vmap(plan.conditioned.log_r)(plan.levels.draw.diffusion.to_data(x))


def _smooth_log_r(plan: Plan, x: Any) -> Any:
    """The same between the values of a grid: what a twist expands."""
    diffusion = plan.levels.draw.diffusion
    x_0 = x if diffusion.scale is None else x * diffusion.scale + diffusion.loc
    return jax.vmap(plan.conditioned.log_r)(x_0)


def _symbol_log_r(plan: Plan) -> Callable[[Any], Any] | None:
    return (lambda x: log_r(plan, x)) if plan.conditioned.observed else None
