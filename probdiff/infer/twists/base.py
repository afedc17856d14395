"""What a twist sees, what it says, and what all twists share.

At level i ≥ 2 a twist is shown particles x_t with the law p(x_s | x_t) and the denoised point; it
says log ψ_t, a shift of the law's mean and the precision that ψ_s adds. At level 1 the integral of
r under p(x_0 | x_1) = N(mean, variance) is done by every twist alike, log r to second order.
"""

import abc
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from probdiff.arguments import check_at_least
from probdiff.infer.dense import Belief, Given
from probdiff.infer.expansion import (
    Expansion,
    Local,
    diagonal,
    expand,
    local,
    low_rank,
    settle,
    sum_event,
)
from probdiff.infer.levels import Levels, Reading, Widths
from probdiff.kernels import bridge_weights
from probdiff.prior import PriorDraw


class View(NamedTuple):
    """What a twist sees at level i ≥ 2: particles, and what the network says of them."""

    levels: Levels
    i: Any
    x_t: Any
    """Particles, `(*lead, *event)`."""
    mean: Any
    """Mean of p(x_s | x_t)."""
    variance: Any
    """Variance of p(x_s | x_t)."""
    x_0_hat: Any
    """Denoised point."""
    pull_back: Callable[[Any], Any]
    """v ↦ (∂x̂_0/∂x_t)ᵀ v."""
    log_r: Callable[[Any], Any]
    """log r on the scale of the diffusion."""
    known: Any
    """Known entries on the scale of the diffusion, or None."""
    mask: Any
    """True where an entry is known, or None."""
    is_diagonal: bool
    """Whether each entry of x_0 has a likelihood of its own."""
    widths: Widths
    """Slopes and variances of x_0 given each level."""
    given: Given | None
    """The same with the data's covariance, where it is known."""
    nearer: Belief | None
    """Covariance of x_0 given level s, where it is known."""
    x_0_given: Callable[[], Any]
    """Law p(x_0 | x_t) of each number, where the readout says one."""
    reading: Reading
    """How well the network reads x_0 out of noise."""
    is_observed: bool
    """Whether sites other than known entries are observed."""


class Tilt(NamedTuple):
    """log ψ_t, and how p(x_s | x_t) is moved towards what ψ wants."""

    log_psi: Any
    """`lead`."""
    shift: Any
    """Added to the mean, `(*lead, *event)`."""
    diagonal: Any
    """Precision added entry by entry, `(*lead, *event)`."""
    factors: Any
    """Rows f with precision Σ f fᵀ added, `(k, *lead, *event)`."""


RANK = 4
"""Directions in which the curvature of log r is kept, where a twist says nothing else."""


class Twist(abc.ABC):
    """A guess ψ_t(x_t) of E[r(x_0) | x_t], and the proposal that goes with it; abstract.

    For one of your own give `__call__(view) -> Tilt` at levels t ≥ 2: log ψ_t, nats, for every
    particle of `view.x_t`; by how much the mean of p(x_s | x_t) moves; and the precision added to
    it, entry by entry and as rows of factors. `View` and `Tilt` say what they hold, in
    `probdiff.infer.twists`. Level 1 is done here, log r to second order. Any positive ψ_t is right
    as particles grow; a poor one needs many.

    Example:
        A twist that says nothing until level 1, ψ_t = 1:

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from probdiff import Diffusion, GaussianKernel, infer, schedules
        >>> from probdiff.infer.twists import Tilt
        >>> class Silent(infer.Twist):
        ...     def __call__(self, view):
        ...         nothing = jnp.zeros_like(view.x_t)  # of one number: shape of log ψ_t, too
        ...         return Tilt(nothing, nothing, nothing, jnp.zeros((0, *nothing.shape)))
        >>> def network(x_t, t):  # x_0 ~ N(0, 1)
        ...     return jnp.zeros((*x_t.shape, 2))
        >>> diffusion = Diffusion(GaussianKernel(), schedules.cosine(10), network, event_shape=())
        >>> prior = diffusion.prior({})
        >>> def program(y):
        ...     numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
        >>> smc = infer.SMC(program, num_particles=4000, twist=Silent())
        >>> smc.run(jax.random.key(0), y=2.0)
        >>> round(float(smc.get_samples()["x_0"].mean()), 1)  # y/2
        1.0

    Source: Wu et al. (2023).
    """

    takes_known: bool = True
    """Whether the weights stay finite where entries are known exactly."""
    uses_covariance: bool = False
    """Whether it takes the data's covariance where the prior has one."""
    rank: int = RANK
    """Directions in which the curvature of log r is kept, where it is not diagonal."""

    @abc.abstractmethod
    def __call__(self, view: View) -> Tilt:
        """log ψ_t at level i ≥ 2, and the proposal for x_s."""

    def last(self, view: View) -> Tilt:
        """ψ_1 and the proposal for x_0: r integrated under p(x_0 | x_1), the law in the view.

        Less the mass of known entries, which is put in exactly.
        """
        point, sd = complete(view.mean, jnp.sqrt(view.variance), view)
        log_psi, e = self.integrate(point, sd, view)
        shift, precision = view.variance * e.pull, e.diagonal
        if view.known is not None:
            shift = jnp.where(view.mask, view.known - view.mean, shift)
            precision = jnp.where(view.mask, jnp.inf, precision)
        return Tilt(log_psi, shift, precision, e.factors)

    def integrate(self, point: Any, sd: Any, view: View) -> tuple[Any, Expansion]:
        """log ∫ r N(point, sd²), and the expansion it rests on, its pull as far as it helps."""
        at = local(view.log_r, point)
        e = self.expand(at, sd, view)
        lead = at.value.ndim
        square = sum_event((sd * e.pull) ** 2, lead)
        value, share = settle(view.log_r, point, at.value, sd**2 * e.pull, square)
        pull = e.pull * expand(share, e.pull.ndim)
        return value - 0.5 * e.log_det, e._replace(pull=pull)

    def expand(self, at: Local, sd: Any, view: View) -> Expansion:
        """log r to second order at a point, against N(point, sd²)."""
        if view.is_diagonal:
            return diagonal(at, sd)
        return low_rank(at, sd, min(self.rank, size_of(view)))

    def check(self, draw: PriorDraw) -> None:  # noqa: B027, most fit any prior
        """Raise a `ValueError` where the twist does not fit the prior."""


def size_of(view: View) -> int:
    """Numbers of one x_t."""
    return math.prod(view.levels.draw.diffusion.event_shape)


def check_rank(rank: int) -> None:
    check_at_least(1, rank=rank)


def shift_of(step: Any, gradient: Any) -> Any:
    """Move of the mean of p(x_s | x_t) when the score gains a gradient, β_t/√(1−β_t) · gradient."""
    return step.beta * jnp.sqrt(step.alpha_bar_s / step.alpha_bar_t) * gradient


FURTHEST = 5.0
"""Standard deviations that a proposal's mean moves at most: beyond, the twist is wrong, not x_t."""


def limited(shift: Any, view: View) -> Any:
    """A shift as far as p(x_s | x_t) follows it.

    Over a long step near the data a diffusion with the bridge's variance is much narrower than an
    ideal one, and x_s can move only by V ∇ log ψ_s: hence the ratio of the two variances.
    """
    step = view.levels.step(view.i)
    weight_0, _ = bridge_weights(step)
    ideal = step.noise_t / jnp.sqrt(step.alpha_bar_t) * view.widths.slope[view.i - 1]
    shift *= view.variance / (step.beta * step.noise_s / step.noise_t + weight_0**2 * ideal)
    lead = shift.ndim - view.levels.event_dim
    axes = tuple(range(lead, shift.ndim))
    furthest = jnp.max(jnp.abs(shift) / jnp.sqrt(view.variance), axis=axes, keepdims=True)
    shift = jnp.where(jnp.isfinite(furthest), shift, 0.0)
    return shift * jnp.minimum(1.0, FURTHEST / jnp.where(furthest > 0, furthest, 1.0))


def complete(point: Any, sd: Any, view: View) -> tuple[Any, Any]:
    """Point and width with known entries put in; they have no width."""
    if view.known is None:
        return point, sd
    return jnp.where(view.mask, view.known, point), jnp.where(view.mask, 0.0, sd)


def log_known(view: View, mean: Any, variance: Any) -> Any:
    """log N(known; mean, variance), summed over the known entries."""
    terms = (view.known - mean) ** 2 / variance + jnp.log(2 * jnp.pi * variance)
    lead = mean.ndim - view.levels.event_dim
    return -0.5 * sum_event(jnp.where(view.mask, terms, 0.0), lead)
