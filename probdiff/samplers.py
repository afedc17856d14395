"""Samplers in few network calls: how x_0 is drawn at n of the T levels, for `sample.draw`.

With a = √ᾱ, σ² = 1 − ᾱ, the denoised point x̂_0 and ε̂ = (x_t − a_t x̂_0)/σ_t, a step from level t
down to s < t is

    DDIM         x_s = a_s x̂_0 + √(σ_s² − η² b) ε̂ + η √b z      b the bridge's variance, z ~ N(0, I)
    DPMSolver    x_s = (σ_s/σ_t) x_t + a_s (1 − e^{−h}) D         h = log(a_s/σ_s) − log(a_t/σ_t)
    Heun         Euler's step of dx̄/dσ̄ = (x̄ − x̂_0)/σ̄ in x̄ = x/a, σ̄ = σ/a, then the trapezium's,

where D is x̂_0 extrapolated from the level before, (1 + h/2h′) x̂_0 − (h/2h′) x̂_0′. From level 1
all go to x̂_0. Without noise (η = 0) they solve one differential equation, whose flow takes
x_T ~ N(0, I) to the data as the reverse trajectory of endless steps does: by DDIM with an error of
order 1/n, by the others of order 1/n². So they draw from a law of their own, which is neither that
of the T-step model nor of `ancestral` with fewer steps, and no bound speaks of it.

Sources: Song et al. (2021), Denoising diffusion implicit models, eqs. 12 and 16; Lu et al. (2022),
DPM-Solver++, algorithm 2; Karras et al. (2022), algorithm 1.
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from probdiff.arguments import SHARE, check_at_least, check_number, check_text
from probdiff.kernels import bridge_variance
from probdiff.reverse import Reverse, State
from probdiff.types import Step

SPACINGS = ("log_snr", "uniform", "quadratic")


@dataclasses.dataclass(frozen=True)
class Sampler(abc.ABC):
    """How x_0 is drawn at n levels: `DDIM(n)`, `DPMSolver(n)`, `Heun(n)`. Abstract.

    Args:
        steps: Number n of levels, at least 2, with the first and the last of T.
        spacing: Where they lie: "log_snr" evenly in log ᾱ/(1−ᾱ), "uniform" evenly in t, or
            "quadratic" in √t, which puts more of them near the data.

    Raises:
        ValueError: if a number is out of range, or the spacing is unknown.
    """

    steps: int
    spacing: str = "log_snr"

    def __post_init__(self) -> None:
        check_at_least(2, steps=self.steps)
        check_text(spacing=self.spacing)
        if self.spacing not in SPACINGS:
            raise ValueError(f"spacing must be one of {SPACINGS}; got {self.spacing!r}")

    @property
    def calls(self) -> int:
        """Network calls of a draw: one for each level, unless a subclass says other."""
        return self.steps

    @abc.abstractmethod
    def walk(
        self, key: Array, reverse: Reverse, times: Int[np.ndarray, " n"], x_T: State
    ) -> Float[Array, "..."]:
        """x_1 from x_T, by way of the times, which ascend; on the scale of the diffusion."""

    def times(self, reverse: Reverse) -> Int[np.ndarray, " n"]:
        """The n levels of 1..T, ascending.

        Raises:
            ValueError: if there are more of them than T.

        Example:
            >>> reverse = standard_diffusion(T=100).bind({})
            >>> samplers.DDIM(5, spacing="quadratic").times(reverse).tolist()
            [1, 7, 26, 57, 100]
        """
        n, T = self.steps, reverse.T
        if n > T:
            raise ValueError(f"steps must lie in 2..T = {T}; got {n}")
        share = np.linspace(0, 1, n)
        at = 1 + (T - 1) * (share**2 if self.spacing == "quadratic" else share)
        if self.spacing == "log_snr":
            table = reverse.trained
            with np.errstate(divide="ignore"):
                log_snr = np.log(table.alpha_bar_t) - np.log(np.asarray(table.noise_t, np.float64))
            end = T if np.isfinite(log_snr[-1]) else T - 1  # β_T = 1 leaves no signal
            wanted = log_snr[0] + (log_snr[end - 1] - log_snr[0]) * share
            at = np.interp(-wanted, -log_snr[:end], np.arange(1, end + 1))
            at[-1] = T
        at, i = np.round(at).astype(int), np.arange(n)
        at = np.maximum.accumulate(at - i) + i  # no level twice
        return np.minimum(at, T - n + 1 + i)

    def __call__(
        self, key: Array, reverse: Reverse, times: Int[np.ndarray, " n"], shape: tuple[int, ...]
    ) -> State:
        """x_0 in the user's units, `(*shape, *event_shape)`."""
        key_T, key_walk = jax.random.split(key)
        x_T = reverse.kernel.stationary((*shape, *reverse.event_shape)).sample(key_T)
        x_1 = self.walk(key_walk, reverse, times, x_T)
        return reverse.to_data(reverse.x_0_hat(x_1, 1))


def _pairs(times: Int[np.ndarray, " n"]) -> tuple[Int[Array, " m"], Int[Array, " m"]]:
    """Levels t and s of the steps down, from the last level."""
    down = jnp.asarray(times[::-1].copy())
    return down[:-1], down[1:]


def _between(reverse: Reverse, t: Array, s: Array) -> Step:
    """Coefficients of a step from s up to t, which meet x."""
    axes = range(-reverse.event_dim, 0)
    return Step(*(jnp.expand_dims(column, axes) for column in reverse.trained.between(t, s)))


@dataclasses.dataclass(frozen=True)
class DDIM(Sampler):
    """Denoising diffusion implicit model: one network call a level, of first order.

    Args:
        steps: Levels, as in `Sampler`.
        spacing: Where they lie.
        eta: Share η in [0, 1] of the bridge's noise: 0 for none; 1 draws as `ancestral` does with
            `BridgeVariance`, but for the last step.

    Example:
        >>> diffusion = standard_diffusion(T=100)  # x_0 ~ N(0, 1)
        >>> x = sample.draw(jax.random.key(0), diffusion, {}, 4000, samplers.DDIM(20))
        >>> bool(abs(x.std() - 1) < 0.1)
        True
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(SHARE, eta=self.eta)

    def walk(
        self, key: Array, reverse: Reverse, times: Int[np.ndarray, " n"], x_T: State
    ) -> Float[Array, "..."]:
        """x_1 from x_T."""

        def descend(x_t: Array, inputs: tuple[Array, ...]) -> tuple[Array, None]:
            t, s, key = inputs
            step, x_0_hat = _between(reverse, t, s), reverse.x_0_hat(x_t, t)
            noise = (x_t - jnp.sqrt(step.alpha_bar_t) * x_0_hat) / jnp.sqrt(step.noise_t)
            variance = self.eta**2 * bridge_variance(step)
            x_s = jnp.sqrt(step.alpha_bar_s) * x_0_hat + jnp.sqrt(step.noise_s - variance) * noise
            if self.eta > 0:
                x_s += jnp.sqrt(variance) * jax.random.normal(key, x_t.shape, x_t.dtype)
            return x_s, None

        keys = jax.random.split(key, len(times) - 1)
        return jax.lax.scan(descend, x_T, (*_pairs(times), keys))[0]


@dataclasses.dataclass(frozen=True)
class DPMSolver(Sampler):
    """DPM-Solver++ of two levels (2M): one network call a level, of second order.

    Args are those of `Sampler`.

    Example:
        >>> diffusion = standard_diffusion(T=100)  # x_0 ~ N(0, 1)
        >>> x = sample.draw(jax.random.key(0), diffusion, {}, 4000, samplers.DPMSolver(10))
        >>> bool(abs(x.std() - 1) < 0.1)
        True
    """

    def walk(
        self, key: Array, reverse: Reverse, times: Int[np.ndarray, " n"], x_T: State
    ) -> Float[Array, "..."]:
        """x_1 from x_T; nothing is drawn."""

        def descend(carry: tuple[Array, ...], inputs: tuple[Array, ...]) -> tuple[tuple, None]:
            x_t, before, h_before = carry
            t, s = inputs
            step, x_0_hat = _between(reverse, t, s), reverse.x_0_hat(x_t, t)
            ratio = step.alpha_bar_s / step.noise_s, step.alpha_bar_t / step.noise_t
            h = 0.5 * (jnp.log(ratio[0]) - jnp.log(ratio[1]))  # ∞ where x_t is noise alone
            ahead = jnp.where(jnp.isfinite(h), h / (2 * h_before), 0.0)
            towards = (1 + ahead) * x_0_hat - ahead * before
            x_s = jnp.sqrt(step.noise_s / step.noise_t) * x_t
            x_s -= jnp.sqrt(step.alpha_bar_s) * jnp.expm1(-h) * towards
            return (x_s, x_0_hat, h), None

        first = jnp.full((1,) * reverse.event_dim, jnp.inf, x_T.dtype)  # nothing to go by
        return jax.lax.scan(descend, (x_T, jnp.zeros_like(x_T), first), _pairs(times))[0][0]


@dataclasses.dataclass(frozen=True)
class Heun(Sampler):
    """Heun's method on the scale of σ/√ᾱ: two network calls a level but the first, second order.

    Args are those of `Sampler`. Rates with β_T = 1, where the scale ends at ∞, are refused.

    Example:
        >>> diffusion = standard_diffusion(T=100)  # x_0 ~ N(0, 1)
        >>> x = sample.draw(jax.random.key(0), diffusion, {}, 4000, samplers.Heun(10))
        >>> bool(abs(x.std() - 1) < 0.1)
        True
    """

    @property
    def calls(self) -> int:
        """Two for each level but the first, which has one."""
        return 2 * self.steps - 1

    def times(self, reverse: Reverse) -> Int[np.ndarray, " n"]:
        """Those of `Sampler.times`; refused where ᾱ_T is 0."""
        if reverse.trained.alpha_bar_t[-1] == 0:
            raise ValueError("beta_T must be below 1 for Heun; use DDIM or DPMSolver")
        return super().times(reverse)

    def walk(
        self, key: Array, reverse: Reverse, times: Int[np.ndarray, " n"], x_T: State
    ) -> Float[Array, "..."]:
        """x_1 from x_T; nothing is drawn."""

        def descend(x_t: Array, inputs: tuple[Array, ...]) -> tuple[Array, None]:
            t, s = inputs
            step = _between(reverse, t, s)
            a_t, a_s = jnp.sqrt(step.alpha_bar_t), jnp.sqrt(step.alpha_bar_s)
            sd_t, sd_s = jnp.sqrt(step.noise_t) / a_t, jnp.sqrt(step.noise_s) / a_s
            x = x_t / a_t
            slope = (x - reverse.x_0_hat(x_t, t)) / sd_t
            there = x + (sd_s - sd_t) * slope
            slope_there = (there - reverse.x_0_hat(a_s * there, s)) / sd_s
            return a_s * (x + (sd_s - sd_t) * 0.5 * (slope + slope_there)), None

        return jax.lax.scan(descend, x_T, _pairs(times))[0]
