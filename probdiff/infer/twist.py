"""What a twist sees of a level, what it says, and what all twists of numbers share.

The reverse trajectory given an observation has the steps p(x_s | x_t) ψ*_s(x_s)/ψ*_t(x_t), with the
exact twist ψ*_t(x_t) = E[r(x_0) | x_t]. Any positive ψ_t with ψ_0 = r gives a sampler that is exact
as particles grow, because its weights repair the rest; how many particles that takes depends on ψ.

At level t ≥ 2 a twist sees particles x_t with the law p(x_s | x_t) and the denoised point. It says
log ψ_t, the move of the law's mean, (β_t/√(1−β_t)) ∇ log ψ_t, and the precision that ψ_s adds. At
level 1 every twist integrates r under p(x_0 | x_1) = N(mean, variance), log r to second order, or
by its elements where each is of one direction (see `ridges`).
Known entries of x_0 are a likelihood without width.

Arrays are on the scale of the diffusion: P particles of B systems, an x_0 as its d numbers.

Sources: Sohl-Dickstein et al. (2015), section 2.5; Wu et al. (2023) for twists in SMC; Song et al.
(2023) for the width.
"""

import abc
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Bool, Float, Num

from probdiff.infer.quadratic import Expansion, Local, diagonal, local, low_rank, settle
from probdiff.infer.ridges import Ridges, integrate
from probdiff.infer.spread import (
    PERFECT,
    Common,
    Problem,
    Reading,
    Spread,
    spread,
    trusted,
    within_cells,
)
from probdiff.infer.steps import GaussianProposal, SymbolProposal
from probdiff.kernels import bridge_variance, bridge_weights
from probdiff.prior import PriorDraw
from probdiff.types import Step

RANK = 4  # directions in which the curvature of log r is kept, where a twist says nothing else
_LEAST = -1e4  # log ψ where a twist says 0 or nothing: ψ must be positive wherever x_t can be
_FURTHEST = 5.0  # standard deviations a proposal's mean moves at most: beyond, the twist is wrong


class Tilt(NamedTuple):
    """log ψ_t, and how p(x_s | x_t) is moved towards what ψ wants."""

    log_psi: Float[Array, "P B"]
    shift: Float[Array, "P B d"]  # added to the mean
    diagonal: Float[Array, "P B d"]  # precision added entry by entry
    factors: Float[Array, "k P B d"]  # rows f with precision Σ f fᵀ added


class Look(NamedTuple):
    """What one look at a level gives."""

    log_psi: Float[Array, "P B"]
    proposal: GaussianProposal | SymbolProposal  # of arrays that lead with `(P, B)`
    shift: Float[Array, "P B"]  # largest move of the mean in standard deviations
    bad: Bool[Array, "P B"]  # whether the twist was not finite


class View:
    """What a twist sees at a level: particles, and what network and program say of them.

    Attributes:
        problem: The posterior that is looked for.
        t: The level; 1 is the last step, to the data.
        x_t: Particles, `(P, B, d)`.
        known: Known entries, `(B, d)`, or None.
        mask: True where an entry is known, or None.
        reading: How well the network reads x_0 out of noise.
        common: What all particles share under the data's covariance, or None.
        ridges: The elements of log r, where each is a function of one direction, or None.
    """

    def __init__(
        self, problem: Problem, x_t: Num[Array, "P B d"], t: Any,
        reading: Reading | None = PERFECT, common: Common | None = None,
        ridges: Ridges | None = None,
    ):  # fmt: skip
        self.problem, self.x_t, self.t = problem, x_t, t
        self.known, self.mask = problem.known, problem.mask
        self.reading, self.common, self.ridges = reading, common, ridges

    @property
    def is_last(self) -> bool:
        """Whether the step is the one to the data."""
        return isinstance(self.t, int) and self.t == 1

    @property
    def step(self) -> Step:
        """Coefficients of the step."""
        return self.problem.reverse.steps.at(self.t, 1)

    @property
    def outputs(self) -> tuple[Array, ...]:
        """What the network says at x_t."""
        return self._denoised[2]

    @functools.cached_property
    def _denoised(self) -> tuple[Array, Callable[[Array], Any], tuple[Array, ...]]:
        reverse, problem = self.problem.reverse, self.problem

        def denoise(x_t: Array) -> tuple[Array, tuple[Array, ...]]:
            x_t = problem.shaped(x_t)
            outputs = reverse.outputs(x_t, self.t)
            return problem.flat(reverse.x_0_hat(x_t, self.t, outputs)), outputs

        try:
            return jax.vjp(denoise, self.x_t, has_aux=True)
        except ValueError as error:
            if "callbacks do not support JVP" not in str(error):
                raise
        x_0_hat, outputs = denoise(self.x_t)  # of another framework: x̂_0 is known, its slope is not
        return x_0_hat, lambda v: (self.slope() * v,), outputs

    @functools.cached_property
    def law(self) -> dist.Distribution:
        """p(x_s | x_t) as the diffusion has it, of shaped particles."""
        reverse, x_t = self.problem.reverse, self.problem.shaped(self.x_t)
        return reverse.last(x_t) if self.is_last else reverse.step(x_t, self.t, self.outputs)

    @functools.cached_property
    def mean(self) -> Float[Array, "P B d"]:
        """Mean of p(x_s | x_t)."""
        return self.problem.flat(jnp.broadcast_to(self.law.loc, self.law.batch_shape))

    @functools.cached_property
    def variance(self) -> Float[Array, "P B d"]:
        """Variance of p(x_s | x_t)."""
        return self.problem.flat(jnp.broadcast_to(self.law.scale, self.law.batch_shape)) ** 2

    @functools.cached_property
    def x_0_hat(self) -> Float[Array, "P B d"]:
        """Denoised point, as far as it can be trusted."""
        return trusted(self.problem, self.reading, self._denoised[0], self.t)

    def pull_back(self, v: Float[Array, "P B d"]) -> Float[Array, "P B d"]:
        """(∂x̂_0/∂x_t)ᵀ v; a network without gradient is taken to have the slope of Gaussian data.

        It only moves proposals, which weights repair.
        """
        v = trusted(self.problem, self.reading._replace(mean=0.0), v, self.t)
        return self._denoised[1](v)[0]

    def x_0_given(self) -> dist.Distribution:
        """Law p(x_0 | x_t) of each entry, of shaped particles, where the readout says one."""
        if self.is_last:
            return self.law
        x_t = self.problem.shaped(self.x_t)
        return self.problem.reverse.x_0_given(x_t, self.t, self.outputs)

    def log_r(self, x: Num[Array, "P B d"]) -> Float[Array, "P B"]:
        """log r, between the values of a grid: what a twist expands."""
        return self.problem.log_r(x)

    @functools.cached_property
    def spread(self) -> Spread:
        """Slopes and variances of x_0 given each level, by entry."""
        tau2 = self.problem.of_entries(self.problem.draw.variance)
        return spread(self.problem, self.reading, tau2)

    def w(self, down: int = 0) -> Float[Array, "..."]:
        """Variance of x_0 given level t, or levels below; a known entry keeps that of its cell."""
        return self.spread.variance[self.t - 1 - down] + within_cells(self.problem)

    def slope(self, down: int = 0) -> Float[Array, "..."]:
        """∂x̂_0/∂x_t at level t, or levels below."""
        return self.spread.slope[self.t - 1 - down]


class Twist(abc.ABC):
    """A guess ψ_t(x_t) of E[r(x_0) | x_t], and the proposal that goes with it; abstract.

    A subclass gives `__call__(view) -> Tilt` at levels t ≥ 2: log ψ_t, nats, for every particle of
    `view.x_t`, the move of the mean of p(x_s | x_t), and the precision added to it, entry by entry
    and as rows of factors (see `View` and `Tilt` in `probdiff.infer.twist`). Level 1 is done here.
    Any positive ψ_t is right as particles grow; a poor one needs many. Each sampler compiles it
    once: if it changes, make another.

    Example:
        A twist that says nothing until level 1, ψ_t = 1:

        >>> from probdiff.infer.twist import Tilt
        >>> class Silent(infer.Twist):
        ...     def __call__(self, view):
        ...         nothing = jnp.zeros_like(view.x_t)
        ...         return Tilt(nothing[..., 0], nothing, nothing, nothing[None][:0])
        >>> prior = standard_diffusion().prior({})  # x_0 ~ N(0, 1)
        >>> program = lambda y: numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
        >>> smc = infer.SMC(program, num_particles=4000, twist=Silent())
        >>> smc.run(jax.random.key(0), y=2.0)
        >>> round(float(smc.get_samples()["x_0"].mean()), 1)  # y/2
        1.0

    Source: Wu et al. (2023).
    """

    takes_known: bool = True  # whether the weights stay finite where entries are known exactly
    uses_covariance: bool = False  # whether it takes the data's covariance where the prior has one
    rank: int = RANK  # directions in which the curvature of log r is kept, where it is not diagonal

    @abc.abstractmethod
    def __call__(self, view: View) -> Tilt:
        """log ψ_t at level t ≥ 2, and the proposal for x_s."""

    def last(self, view: View) -> Tilt:
        """ψ_1 and the proposal for x_0: r under p(x_0 | x_1), less the mass of known entries."""
        point, sd = complete(view.mean, jnp.sqrt(view.variance), view)
        log_psi, e = self.integrate(point, sd, view)
        shift, precision = view.variance * e.pull, e.diagonal
        if view.known is not None:
            shift = jnp.where(view.mask, view.known - view.mean, shift)
            precision = jnp.where(view.mask, jnp.inf, precision)
        return Tilt(log_psi, shift, precision, e.factors)

    def look(self, view: View) -> Look:
        """log ψ_t and the proposal of every particle, the mass of known entries put in last."""
        tilt = self.last(view) if view.is_last else self(view)
        log_known = jnp.zeros(tilt.log_psi.shape)
        moved = jnp.abs(tilt.shift) / jnp.sqrt(view.variance)
        if view.is_last and view.known is not None:
            problem, reverse = view.problem, view.problem.reverse.relative()
            law = reverse.data(problem.shaped(view.x_t), problem.draw.mask)
            known = reverse.to_data(problem.shaped(view.known[None])[0])
            log_known = law.log_prob(known).reshape(log_known.shape)
            moved = jnp.where(view.mask, 0.0, moved)
        factors, law = jnp.moveaxis(tilt.factors, 0, -2), (view.mean, view.variance)
        proposal = GaussianProposal(*law, tilt.shift, tilt.diagonal, factors, log_known)
        return looked(tilt.log_psi + log_known, proposal, jnp.max(moved, -1))

    def integrate(self, point: Array, sd: Array, view: View) -> tuple[Array, Expansion]:
        """log ∫ r N(point, sd²), and the expansion it rests on, its pull as far as it helps."""
        if view.ridges is not None:
            return integrate(view.ridges, point, sd)
        at = local(view.log_r, point)
        e = self.expand(at, sd, view)
        square = jnp.sum((sd * e.pull) ** 2, -1)
        value, share = settle(view.log_r, point, at.value, sd**2 * e.pull, square)
        return value - 0.5 * e.log_det, e._replace(pull=e.pull * share[..., None])

    def expand(self, at: Local, sd: Array, view: View) -> Expansion:
        """log r to second order at a point, against N(point, sd²)."""
        if view.problem.is_diagonal:
            return diagonal(at, sd)
        return low_rank(at, sd, min(self.rank, view.problem.size))

    def check(self, draw: PriorDraw) -> None:
        """Raise a `ValueError` where the twist does not fit the prior."""
        if draw.reverse.kernel.is_discrete:
            raise ValueError(
                "twist must be left out for symbols, whose twist tries every change of one "
                f"entry; got {type(self).__name__}"
            )

    def products(self, size: int, *, is_known_alone: bool) -> int:
        """Products with the network's Jacobian a level, for one particle of `size` numbers.

        `is_known_alone` says that nothing but known entries is observed.
        """
        return 1

    def advice(self, more: str, *, has_covariance: bool) -> str:
        """What to do where particles are too few for the twist; `more` is what to raise."""
        if has_covariance:
            return f"Raise {more}"
        return (
            f"Raise {more}; give Diffusion.prior the covariance of the data, where several numbers "
            "of one x_0 are observed, and see that its variance is not below theirs"
        )


def looked(log_psi: Array, proposal: GaussianProposal | SymbolProposal, shift: Array) -> Look:
    """A look, log ψ finite wherever it is."""
    is_finite = jnp.isfinite(log_psi)
    return Look(jnp.where(is_finite, log_psi, _LEAST), proposal, shift, ~is_finite)


def shift_of(step: Step, gradient: Array) -> Array:
    """Move of the mean of p(x_s | x_t) when the score gains a gradient, β_t/√(1−β_t) · gradient."""
    return step.beta * jnp.sqrt(step.alpha_bar_s / step.alpha_bar_t) * gradient


def limited(shift: Array, view: View) -> Array:
    """A shift as far as p(x_s | x_t) follows it.

    Over a long step near the data the bridge's variance is far below the ideal one, and x_s can
    move only by V ∇ log ψ_s: hence the ratio of the two variances.
    """
    step = view.step
    ideal = step.noise_t / jnp.sqrt(step.alpha_bar_t) * view.slope()
    shift *= view.variance / (bridge_variance(step) + bridge_weights(step)[0] ** 2 * ideal)
    furthest = jnp.max(jnp.abs(shift) / jnp.sqrt(view.variance), axis=-1, keepdims=True)
    shift = jnp.where(jnp.isfinite(furthest), shift, 0.0)
    return shift * jnp.minimum(1.0, _FURTHEST / jnp.where(furthest > 0, furthest, 1.0))


def complete(point: Array, sd: Array, view: View) -> tuple[Array, Array]:
    """Point and width with known entries put in; they have no width."""
    if view.known is None:
        return point, sd
    return jnp.where(view.mask, view.known, point), jnp.where(view.mask, 0.0, sd)


def log_known(view: View, mean: Array, variance: Array) -> Float[Array, "P B"]:
    """log N(known; mean, variance), summed over the known entries."""
    terms = (view.known - mean) ** 2 / variance + jnp.log(2 * jnp.pi * variance)
    return -0.5 * jnp.sum(jnp.where(view.mask, terms, 0.0), -1)
