"""∫ r N(x̂_0, w_t I): r widened by what x_t leaves open of x_0.

With log r to second order at x̂_0, its gradient g and curvature −H, and A = w H,

    log ψ_t = log r + ½ w gᵀ (I + A)⁻¹ g − ½ log det(I + A),

settled by the value of log r where it says x_0 is. Known entries are a likelihood without width.
With the covariance of the data, w I becomes the covariance C_t of x_0 given x_t (`dense`).

Source: Song et al. (2023) for the width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from probdiff.infer.dense import Given, pulled, times
from probdiff.infer.expansion import Local, expand, krylov, local, settle
from probdiff.infer.twists.base import (
    Tilt,
    Twist,
    View,
    complete,
    limited,
    log_known,
    shift_of,
)


class Known(NamedTuple):
    """What known entries do to a level; the last two count there only."""

    log_psi: Any
    """`lead`."""
    pull: Any
    """∂ log ψ_t/∂x̂_0, to be pulled back to x_t."""
    precision: Any
    """That ψ_s adds to p(x_s | x_t)."""


class Widened(Twist):
    """∫ r N(x̂_0, w_t I), log r to second order at x̂_0; C_t where the data's covariance is known."""

    def __call__(self, view: View) -> Tilt:
        if view.given is not None:
            return self.with_covariance(view, view.given)
        step = view.levels.step(view.i)
        w_t, w_s = view.widths.variance[view.i - 1], view.widths.variance[view.i - 2]
        slope = view.widths.slope[view.i - 2]
        point, sd = complete(view.x_0_hat, jnp.sqrt(w_t), view)
        log_psi, e = self.integrate(point, sd, view)
        pull = e.pull
        precision = slope**2 * e.diagonal / (1 + w_s * e.diagonal)
        if view.known is not None:
            known = self.of_known(view)
            pull = jnp.where(view.mask, known.pull, pull)
            precision = jnp.where(view.mask, known.precision, precision)
            log_psi += known.log_psi
        narrowing = jnp.mean(w_s / w_t)
        factors = e.factors * slope / jnp.sqrt(1 + narrowing * expand(e.sizes, e.factors.ndim))
        shift = shift_of(step, view.pull_back(pull))
        return Tilt(log_psi, limited(shift, view), precision, factors)

    def of_known(self, view: View) -> Known:
        """Known entries as N(x̂_0, w_t) has them."""
        w_t, w_s = view.widths.variance[view.i - 1], view.widths.variance[view.i - 2]
        return Known(
            log_known(view, view.x_0_hat, w_t),
            (view.known - view.x_0_hat) / w_t,
            view.widths.slope[view.i - 2] ** 2 / w_s,
        )

    def with_covariance(self, view: View, given: Given) -> Tilt:
        """The same with C_t from the data's covariance instead of w_t I."""
        lead = view.x_t.ndim - view.levels.event_dim
        shape, belief = view.x_t.shape, given.belief
        mean = view.x_0_hat.reshape(*shape[:lead], -1)
        point, log_known, pull = mean, 0.0, 0.0
        if given.known is not None:
            known, mask = (
                jnp.broadcast_to(a, shape).reshape(mean.shape) for a in (view.known, view.mask)
            )
            gap = jnp.where(mask, known - mean, 0.0)
            pull = times(given.known, gap)
            point = mean + belief.root(belief.root_transposed(pull))
            point = jnp.where(mask, known, point)
            log_known = -0.5 * (jnp.sum(gap * pull, -1) + given.log_det_known)
        at = local(view.log_r, point.reshape(shape))

        def projected(u: Any) -> Any:
            return u if given.project is None else times(given.project, u)

        g = projected(belief.root_transposed(at.gradient.reshape(mean.shape)))
        if given.gain is not None:
            u, log_det = pulled(given, g), given.log_det
            factors = jnp.zeros((0, *shape), mean.dtype)
        else:
            u, log_det, factors = self._by_lanczos(view, given, at, g, projected)
        move = belief.root(projected(u)).reshape(shape)
        value, share = settle(view.log_r, point.reshape(shape), at.value, move, jnp.sum(u * u, -1))
        pull = pull + belief.inverse_root_transposed(projected(u)) * share[..., None]
        shift = shift_of(view.levels.step(view.i), view.pull_back(pull.reshape(shape)))
        log_psi = value - 0.5 * log_det + log_known
        return Tilt(log_psi, limited(shift, view), jnp.zeros(shape, mean.dtype), factors)

    def _by_lanczos(
        self, view: View, given: Given, at: Local, g: Any, projected: Callable[[Any], Any]
    ) -> tuple[Any, Any, Any]:
        """(I + A)⁻¹ g, log det(I + A) and the rows that ψ_s adds, where log r is not quadratic."""
        belief, shape = given.belief, view.x_t.shape

        def operator(u: Any) -> Any:
            x = belief.root(projected(u)).reshape(shape)
            return projected(belief.root_transposed(at.curvature(x).reshape(u.shape)))

        rank = min(self.rank, g.shape[-1])
        values, vectors = krylov(g, operator, rank, g.ndim - 1)
        along = jnp.sum(vectors * g, -1)
        u = jnp.sum(vectors * (along / (1 + values))[..., None], 0)
        log_det = jnp.sum(jnp.log1p(values), 0)
        nearer = view.nearer  # the belief at level s
        narrowing = jnp.sum(vectors**2 * (nearer.variance / belief.variance), -1)
        rows = vectors * jnp.sqrt(values / (1 + narrowing * values))[..., None]
        rows = (rows * nearer.slope / jnp.sqrt(belief.variance)) @ belief.axes.T
        return u, log_det, rows.reshape(rank, *shape)
