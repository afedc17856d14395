"""The best diffusion of the roll whose reverse steps are elementwise Gaussians: what K can reach.

A reverse step N(μ(x_t), diag σ²(x_t)) costs least, on average over the data, where it has the means
and variances of q(x_s | x_t), with s = t − 1. These follow from those of x_0 given x_t by the
bridge, N(w_0 x_0 + w_t x_t, b),

    E[x_s | x_t] = w_0 E[x_0 | x_t] + w_t x_t,    Var[x_s | x_t] = w_0² Var[x_0 | x_t] + b.

The roll is x_0 = c(u) + σ ε with u uniform. Given x_t = √ᾱ_t x_0 + √n ε', n = 1 − ᾱ_t, and with
v = ᾱ_t σ² + n,

    p(u | x_t) ∝ N(x_t; √ᾱ_t c(u), v I),
    x_0 | x_t, u ~ N( (n c(u) + √ᾱ_t σ² x_t) / v, σ² n/v I ),

so that averages over a grid of u give mean and variance of x_0 given x_t. The diffusion that says
these has no parameters, and its bound on held-out points is the ceiling of every trained one with
the same rates and a tied last step, whatever its network.

Source: Sohl-Dickstein et al. (2015), section 2.4, for the bound that these steps maximise.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from probdiff import Diffusion, GaussianKernel, readouts, schedules
from probdiff.kernels import bridge_weights
from probdiff.types import Step


def define_best(beta: Float[np.ndarray, " T"], noise: float) -> Diffusion:
    """The best diffusion for the roll with raw noise `noise`; it has no parameters."""
    network = best_network(schedules.steps(beta), noise)
    return Diffusion(
        GaussianKernel(), beta, network, event_shape=(2,), readout=readouts.Data()
    )  # fmt: skip


def best_network(steps: Step, noise: float) -> Callable[[Array, Array], Array]:
    """Network for `readouts.Data()` with learned variance that says the best step from any x_t.

    Its outputs are x̂_0 = E[x_0 | x_t] and what `LearnedVariance` turns into Var[x_s | x_t].

    Args:
        steps: Coefficients of all steps.
        noise: Noise of the roll in raw units, not negative.
    """
    first_width = math.sqrt(float(steps.noise_t[0]))
    curve, sigma = curve_and_noise(noise, spacing=first_width)

    def network(x_t: Float[Array, "B 2"], t: Int[Array, " B"]) -> Float[Array, "B 4"]:
        step = steps.at(t, 1)
        mean, variance = _data_given(x_t, step, curve, sigma)
        weight_0, _ = bridge_weights(step)
        variance = weight_0**2 * variance + step.beta * step.noise_s / step.noise_t
        return jnp.concatenate([mean, _logit(variance) - _logit(step.beta)], -1)

    return network


def curve_and_noise(noise: float, *, spacing: float) -> tuple[Float[Array, "n 2"], float]:
    """Points c(u) of the noise-free curve, u on a midpoint grid, and σ, in scaled units.

    Args:
        noise: Noise of the roll in raw units.
        spacing: Largest distance of neighbours, scaled units.
    """
    scale = math.sqrt(39 * math.pi**2 / 8 - 2 - 2 / (9 * math.pi**2) + noise**2)
    end = 4.5 * math.pi
    count = math.ceil(3 * math.pi * math.hypot(1, end) / scale / spacing)
    theta = 1.5 * math.pi * (1 + 2 * (np.arange(count) + 0.5) / count)
    raw = theta[:, None] * np.stack([np.cos(theta), np.sin(theta)], -1)
    return jnp.asarray((raw - (2.0, 2 / (3 * math.pi))) / scale), noise / scale


def _data_given(
    x_t: Float[Array, "B 2"], step: Step, curve: Float[Array, "n 2"], sigma: float
) -> tuple[Float[Array, "B 2"], Float[Array, "B 2"]]:
    """Mean and variance of x_0 given x_t, elementwise."""
    root, noise = jnp.sqrt(step.alpha_bar_t), step.noise_t
    width = step.alpha_bar_t * sigma**2 + noise
    # coordinate by coordinate: arrays of points times grid are the largest there are
    distance = sum((x_t[:, i, None] - root * curve[:, i]) ** 2 for i in (0, 1))
    weight = jax.nn.softmax(-distance / (2 * width), axis=-1)
    mean = weight @ curve
    spread = [jnp.sum(weight * (curve[:, i] - mean[:, i, None]) ** 2, -1) for i in (0, 1)]
    x_0 = (noise * mean + root * sigma**2 * x_t) / width
    return x_0, sigma**2 * noise / width + (noise / width) ** 2 * jnp.stack(spread, -1)


def _logit(p: Any) -> Array:
    return jnp.log(p) - jnp.log1p(-p)
