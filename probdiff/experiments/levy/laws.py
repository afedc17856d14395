"""Laws of one increment: draws, the exact denoiser, and scales for a Gibbs sampler.

    Bernoulli–Laplace(p, b)    0 with probability 1 − p, else Laplace of scale b
    Student(ν)                 Student's t

Both are N(0, τ) with a random scale τ (τ = 0 where a Bernoulli–Laplace increment is 0), given which
all is Gaussian:

    Laplace    τ ~ Exponential of mean 2b²,     1/τ | u ~ InverseGaussian(1/(b|u|), 1/b²)
    Student    τ ~ InverseGamma(ν/2, ν/2),      τ | u ~ InverseGamma((ν + 1)/2, (ν + u²)/2).

Over a table of log τ, in even steps, either is a mixture of Gaussians, and so is an increment
given its noisy value: the exact denoiser is a `Mixture` readout whose network says the same at any
x_t.

Source: Park and Casella (2008) for the scales of Laplace's law.
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from probdiff import Diffusion, GaussianKernel, readouts, schedules

_Values = Float[Array, "*shape"]
_ZERO = 1e-8
"""Variance of what is 0 in the mixture."""


class Law(abc.ABC):
    """Law of independent increments, symmetric about 0."""

    log_odds: float = math.inf
    """Log odds that an increment is not exactly 0."""

    @property
    @abc.abstractmethod
    def variance(self) -> float:
        """Variance of an increment."""

    @abc.abstractmethod
    def scales(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Scales τ of increments that are not 0."""

    @abc.abstractmethod
    def scales_given(self, key: Array, u: _Values) -> _Values:
        """Scales τ given the increments."""

    @abc.abstractmethod
    def mixture(self) -> tuple[Float[np.ndarray, " K"], Float[np.ndarray, " K"]]:
        """Logits and scales τ of K Gaussians around 0 that make the law."""

    def sample(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Increments."""
        key_on, key_scale, key_u = jax.random.split(key, 3)
        u = jnp.sqrt(self.scales(key_scale, shape)) * jax.random.normal(key_u, shape)
        return jnp.where(self.is_on(key_on, shape), u, 0.0)

    def is_on(self, key: Array, shape: tuple[int, ...]) -> Bool[Array, "..."]:
        """Whether increments are not 0."""
        return jax.random.logistic(key, shape) < self.log_odds


@dataclasses.dataclass(frozen=True)
class BernoulliLaplace(Law):
    """0, or with probability `p` Laplace's law of scale `b`."""

    p: float = 0.1
    b: float = 1.0

    @property
    def log_odds(self) -> float:
        """log p/(1 − p)."""
        return math.log(self.p / (1 - self.p))

    @property
    def variance(self) -> float:
        """2 p b²."""
        return 2 * self.p * self.b**2

    def scales(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Exponential of mean 2b²."""
        return 2 * self.b**2 * jax.random.exponential(key, shape)

    def scales_given(self, key: Array, u: _Values) -> _Values:
        """1 / an inverse Gaussian by Michael, Schucany and Haas, its smaller root by division."""
        key_z, key_root = jax.random.split(key)
        mean = 1 / (self.b * jnp.maximum(jnp.abs(u), 1e-12))
        half = 0.5 * mean * (self.b * jax.random.normal(key_z, u.shape)) ** 2
        root = mean / (1 + half + jnp.sqrt(half * (2 + half)))
        is_smaller = jax.random.uniform(key_root, u.shape) * (mean + root) < mean
        return 1 / jnp.where(is_smaller, root, mean**2 / root)

    def mixture(self) -> tuple[np.ndarray, np.ndarray]:
        """The table, and what is 0."""
        log_scale = np.arange(-8.0, 3.5, 0.5)
        logits = log_scale - np.exp(log_scale)
        logits -= np.log(np.sum(np.exp(logits)))
        tau = 2 * self.b**2 * np.exp(log_scale)
        return np.append(logits + self.log_odds, 0.0), np.append(tau, _ZERO)


@dataclasses.dataclass(frozen=True)
class Student(Law):
    """Student's t with `df` degrees of freedom, more than 2."""

    df: float = 3.0

    @property
    def variance(self) -> float:
        """ν / (ν − 2)."""
        return self.df / (self.df - 2)

    def scales(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Inverse gamma."""
        return self.df / 2 / jax.random.gamma(key, self.df / 2, shape)

    def scales_given(self, key: Array, u: _Values) -> _Values:
        """Inverse gamma."""
        return (self.df + u**2) / 2 / jax.random.gamma(key, (self.df + 1) / 2, u.shape)

    def mixture(self) -> tuple[np.ndarray, np.ndarray]:
        """The table."""
        log_scale = np.arange(-4.0, 14.0, 0.8)
        return -self.df / 2 * (log_scale + np.exp(-log_scale)), np.exp(log_scale)


def exact_diffusion(law: Law, length: int, T: int) -> Diffusion:
    """The diffusion of independent increments with their exact denoiser; it has no parameters."""
    logits, tau = law.mixture()
    scale, count = math.sqrt(law.variance), len(logits)
    readout = readouts.Mixture(count, -1.0, 1.0)
    widths = np.log(np.sqrt(tau) / scale / (0.5 / (count - 1)))  # over those it starts with
    shifts = -np.linspace(readout.low, readout.high, count)
    outputs = np.repeat(np.concatenate([logits, shifts, widths]), length).astype(np.float32)

    def network(x_t: Array, t: Array) -> Array:
        return jnp.broadcast_to(outputs, (*x_t.shape[:-1], len(outputs)))

    return Diffusion(
        GaussianKernel(), rates(T), network, event_shape=(length,), scale=scale, readout=readout,
        last_step=readouts.Learned(),
    )  # fmt: skip


def rates(T: int) -> Float[np.ndarray, " T"]:
    """β_1..β_T, for the exact denoiser and the trained one."""
    return schedules.log_snr_linear(T, beta_1=1e-4, alpha_bar_T=1e-3)
