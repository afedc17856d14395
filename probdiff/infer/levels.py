"""The reverse trajectory as inference walks it: all T levels, or n of them.

With n < T levels t_1 = 1 < … < t_n = T, evenly spread, the walk jumps from level t_i to level
t_{i−1} by

    p(x_s | x_t) = N(w_0 x̂_0 + w_t x_t, variance)                numbers
    p(x_s | x_t) = Σ_j p(x_0 = j | x_t) q(x_s | x_t, x_0 = j)     symbols

with the coefficients of the longer step. The variance is 1 − ᾱ_t/ᾱ_s under `ForwardVariance`, the
bridge's and w_0² Var[x_0 | x_t] under `Mixture`, else the bridge's: a learned one has no value for
a longer step. The n-step diffusion is another model than the T-step one: its evidence is its own.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int

from probdiff import readouts, schedules
from probdiff.kernels import bridge_weights
from probdiff.prior import PriorDraw
from probdiff.types import Step


class Levels(NamedTuple):
    """Levels of a bound reverse trajectory, addressed by position i = 1..n; level 0 is the data."""

    draw: PriorDraw
    times: Int[np.ndarray, " n"]
    """t of each level."""
    table: Step
    """Coefficients of the step from each level down to the one before it; `t` is the time."""

    @property
    def n(self) -> int:
        """Number of steps."""
        return len(self.times)

    @property
    def is_respaced(self) -> bool:
        """Whether levels are left out."""
        return self.n < self.draw.trajectory.steps.T

    @property
    def event_dim(self) -> int:
        """Number of axes of one x_t."""
        return self.draw.trajectory.x_dim

    def step(self, i: Any) -> Step:
        """Coefficients of step i, broadcastable to x."""
        return self.table.at(i, self.event_dim)

    def outputs(self, x_t: Any, i: Any) -> tuple[Any, ...]:
        """Network outputs at level i, one array of the shape of x_t for each."""
        t = jnp.broadcast_to(self.table.t[i - 1], x_t.shape[: x_t.ndim - self.event_dim])
        return self.draw.trajectory.outputs(x_t, t)

    def x_0_hat(self, outputs: tuple[Any, ...], x_t: Any, i: Any) -> Float[Array, "..."]:
        """Denoised point E[x_0 | x_t], numbers."""
        trajectory = self.draw.trajectory
        return trajectory.readout.x_0_hat(trajectory.kernel, outputs, x_t, self._trained(i))

    def x_0_given(self, outputs: tuple[Any, ...], x_t: Any, i: Any) -> dist.Distribution:
        """Law p(x_0 | x_t), elementwise, where the readout says one."""
        trajectory = self.draw.trajectory
        return trajectory.readout.x_0_given(trajectory.kernel, outputs, x_t, self._trained(i))

    def reverse(self, outputs: tuple[Any, ...], x_t: Any, i: Any) -> dist.Distribution:
        """p(x_s | x_t) for i ≥ 2, elementwise."""
        trajectory, step = self.draw.trajectory, self.step(i)
        kernel, readout = trajectory.kernel, trajectory.readout
        if self.is_respaced:
            return readout.longer_step(kernel, outputs, x_t, self._trained(i), step)
        return readout(kernel, outputs, x_t, step)

    def last(self, x_1: Any) -> dist.Distribution:
        """p(x_0 | x_1), elementwise, on the scale of the diffusion; under a tied step no network.

        Before x_0 is put on a grid.
        """
        diffusion, trajectory = self.draw.diffusion, self.draw.trajectory
        return diffusion.data_given_first(trajectory, x_1).base

    def _trained(self, i: Any) -> Step:
        """Coefficients of the step of one level that the network was trained for."""
        return self.draw.trajectory.steps.at(self.table.t[i - 1], self.event_dim)


class Widths(NamedTuple):
    """How x_0 hangs on x_t, were the data N(·, τ²); level i at i − 1, shape `(n, *event or 1s)`."""

    slope: Float[Array, "n ..."]
    """∂x̂_0/∂x_t = √ᾱ_t w_t/(1−ᾱ_t)."""
    variance: Float[Array, "n ..."]
    """Var[x_0 | x_t] under the diffusion that is walked."""


class Reading(NamedTuple):
    """How well the network reads x_0 out of noise, told at x_T ~ π; zeros where it is perfect."""

    error: Float[Array, ""]
    """Mean squared error e² of the noise it reads."""
    mean: Any
    """Mean of x̂_0 over x_T ~ π, that is of x_0, `event`."""


SLACK = 1.2
"""Variance of x̂_0, over that of a perfect network, which 1024 draws cannot tell from it."""


def reading(levels: Levels, x_T: Any) -> Reading:
    """Measure a network at draws of x_T, `(M, *plates, *event)`.

    x̂_0 has variance τ² − w_T over x_T ~ π where the network is right. What it has above that is
    error, and much of it, since x̂_0 divides what the network says by √ᾱ_T; seen as an error of the
    noise in x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε it is about the same at every level.
    """
    n, event_dim = levels.n, levels.event_dim
    x_0_hat = levels.x_0_hat(levels.outputs(x_T, n), x_T, n)
    mean = jnp.mean(x_0_hat, axis=tuple(range(x_T.ndim - event_dim)))
    step = levels.table.at(n, event_dim)
    tau2 = jnp.asarray(levels.draw.variance, mean.dtype)
    signal = jnp.mean(tau2 - tau2 * step.noise_t / (step.noise_t + step.alpha_bar_t * tau2))
    excess = jnp.maximum(jnp.mean(jnp.var(x_0_hat, 0)) - SLACK * signal, 0.0)
    return Reading(excess * jnp.mean(step.alpha_bar_t / step.noise_t), mean)


def trust(tau2: Any, step: Step, error: Any) -> tuple[Any, Any]:
    """How far to trust x̂_0, and what its error adds to the variance of x_0.

    With s = τ² − w_t the variance of a perfect x̂_0 and E = e²(1−ᾱ_t)/ᾱ_t that of its error, x_0
    given x̂_0 has mean μ + s/(s+E) (x̂_0 − μ) and variance w_t + s E/(s+E).
    """
    signal = tau2**2 * step.alpha_bar_t / (step.noise_t + step.alpha_bar_t * tau2)
    noise = jnp.where(step.t == 1, 0.0, error * step.noise_t)  # times ᾱ_t: β_T = 1 has ᾱ_T = 0
    share = jnp.where(noise > 0, signal * step.alpha_bar_t / (signal * step.alpha_bar_t + noise), 1)
    return share, signal * (1 - share)


def trusted(levels: Levels, reading: Reading, x_0_hat: Any, i: Any, *, is_slope: bool) -> Any:
    """x̂_0 drawn towards the mean as far as it cannot be trusted; a slope loses the same share."""
    covariance = levels.draw.covariance
    mean = 0.0 if is_slope else reading.mean
    if covariance is None:
        tau2 = jnp.asarray(levels.draw.variance, x_0_hat.dtype)
        return mean + trust(tau2, levels.step(i), reading.error)[0] * (x_0_hat - mean)
    axes = jnp.asarray(covariance.axes, x_0_hat.dtype)
    tau2 = jnp.asarray(covariance.variances, x_0_hat.dtype)
    share, _ = trust(tau2, levels.table.at(i, 1), reading.error)
    lead = x_0_hat.shape[: x_0_hat.ndim - levels.event_dim]
    along = (x_0_hat - mean).reshape(*lead, -1) @ axes
    return mean + ((along * share) @ axes.T).reshape(x_0_hat.shape)


def widths(levels: Levels, reading: Reading) -> Widths:
    """Variance of x_0 given each level, of this diffusion and not of an ideal one.

    An ideal diffusion has w_t = τ²(1−ᾱ_t)/(1−ᾱ_t+ᾱ_t τ²). As x̂_0 is a martingale, the variances of
    its moves add up,

        Var[x_0 | x_t] = Var[x_0 | x_s] + slope_s² Var[x_s | x_t],

    and with the diffusion's own Var[x_s | x_t], which may be narrower, this is what the diffusion
    does; it tells where steps are long, near the data above all. A learned variance counts as
    ideal. The error of the network is added, but at the first level, whose step is the law itself.
    """
    step = levels.step(jnp.arange(1, levels.n + 1))
    return _widths(levels, step, jnp.asarray(levels.draw.variance, step.beta.dtype), reading)


def widths_along(levels: Levels, reading: Reading) -> Widths:
    """The same along the axes of the data's covariance: columns `(n, d)`."""
    step = levels.table.at(jnp.arange(1, levels.n + 1), 1)
    tau2 = jnp.asarray(levels.draw.covariance.variances, step.beta.dtype)
    return _widths(levels, step, tau2, reading)


def _widths(levels: Levels, step: Step, tau2: Any, reading: Reading) -> Widths:
    found = _exact_widths(levels, step, tau2)
    return found._replace(variance=found.variance + trust(tau2, step, reading.error)[1])


def _exact_widths(levels: Levels, step: Step, tau2: Any) -> Widths:
    draw, readout = levels.draw, levels.draw.trajectory.readout
    ideal = tau2 * step.noise_t / (step.noise_t + step.alpha_bar_t * tau2)
    slope = jnp.sqrt(step.alpha_bar_t) * ideal / step.noise_t
    moves = readout.fixed_variance(longer=levels.is_respaced)
    if moves is None:
        return Widths(slope, ideal)
    variance = jnp.broadcast_to(moves(None, step), ideal.shape)
    first = variance[:1]
    if isinstance(draw.diffusion.last_step, readouts.Tied):
        first = jnp.broadcast_to(step.beta[:1], first.shape)
        slope = slope.at[0].set(jnp.broadcast_to(jnp.sqrt(1 - step.beta[0]), slope.shape[1:]))
    gains = slope[:-1] ** 2 * variance[1:]
    return Widths(slope, jnp.cumsum(jnp.concatenate([first, gains]), 0))


def step_variance(levels: Levels, ideal: Any, i: Any) -> Any:
    """Var[x_s | x_t] at level i for every particle alike; `ideal` is Var[x_0 | x_t]."""
    step, readout = levels.table.at(i, 0), levels.draw.trajectory.readout
    fixed = readout.fixed_variance(longer=levels.is_respaced)
    if fixed is not None:
        return fixed(None, step)
    weight_0, _ = bridge_weights(step)
    return step.beta * step.noise_s / step.noise_t + weight_0**2 * ideal


def levels(draw: PriorDraw, n: int | None = None) -> Levels:
    """Levels of a prior's diffusion: all of them, or n, evenly spread with the first and the last.

    Raises:
        ValueError: if n is not in 2..T.
    """
    steps = draw.trajectory.steps
    if n is None or n == steps.T:
        return Levels(draw, np.arange(1, steps.T + 1), steps)
    return Levels(draw, *schedules.respaced(steps, n))


def within_cells(draw: PriorDraw) -> Any:
    """Variance that a known value of a grid leaves to what is put on it: that of its cell, Δ²/12.

    On the scale of the diffusion; 0 elsewhere. The open end cells count as if they were closed.
    """
    grid = draw.diffusion.last_step.grid
    if grid is None or draw.known is None:
        return 0.0
    return jnp.where(draw.mask, (grid.spacing / draw.diffusion.scale) ** 2 / 12, 0.0)
