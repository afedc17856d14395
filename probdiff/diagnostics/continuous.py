"""The bound of one network at any number of steps, and its limit without end.

A diffusion trained at T levels, of log-SNR λ_1 > … > λ_T with λ = log ᾱ/(1−ᾱ), has others between
the same ends: λ(u) is drawn through the λ_t by straight lines, u = (t − 1)/(T − 1), and n steps
have the levels λ((i − 1)/(n − 1)), i = 1..n; at n = T they are those of training. The first level
and the last, and so p(x_0 | x_1) and the KL of x_T, are the same for all n. Between them the sum
over steps tends to

    Σ_i KL_i → ½ ∫ e^λ E‖x_0 − x̂_0(x_λ, λ)‖² dλ,    λ from λ_T to λ_1,

whatever the path λ(u), where the variance of a step tends to that of the bridge. It falls on the
way where x̂_0 is exact. A variance that the network says for steps of training has no limit, nor has
a readout of the step itself.

Source: Kingma et al. (2021), Variational diffusion models, eqs. 13 to 18.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from probdiff.arguments import as_number, check_at_least
from probdiff.diffusion import Diffusion
from probdiff.flow import levels_at, log_snr_of, needs_step
from probdiff.readouts import BridgeVariance, ForwardVariance
from probdiff.readouts.mixture import Mixture
from probdiff.reverse import Reverse
from probdiff.trajectories import ForwardTrajectory
from probdiff.types import Step


def check_steps(diffusion: Diffusion, steps: Any) -> None:
    """Raise a `ValueError` unless steps are a number of them, and the diffusion one of any."""
    if as_number(steps) != math.inf:
        check_at_least(2, steps=steps)
    if diffusion.kernel.is_discrete:
        raise ValueError(
            f"steps must be left out for symbols; got a diffusion of {diffusion.kernel}"
        )
    if not getattr(diffusion.network, "takes_log_snr", False):
        raise ValueError(
            "steps must be left out where the network takes t, as it knows the levels of training "
            f"alone; got {type(diffusion.network).__name__}. networks.FromMixture and UNet(T=None) "
            "take the log-SNR"
        )
    readout = diffusion.readout
    variance = readout.fixed_variance(longer=False)
    is_known = isinstance(variance, BridgeVariance | ForwardVariance)
    if needs_step(diffusion) or not (is_known or isinstance(readout, Mixture)):
        raise ValueError(
            "steps must be left out where the readout has no limit, which those of a point x̂_0 "
            f"with BridgeVariance() or ForwardVariance() have, and Mixture; got {readout}"
        )


def with_steps(reverse: Reverse, steps: int) -> Reverse:
    """The process of so many steps; itself where they are those of training."""
    if steps == reverse.T:
        return reverse
    trained = np.asarray(log_snr_of(reverse.trained), np.float64)
    share = np.linspace(0, 1, steps), np.linspace(0, 1, reverse.T)
    log_snr = np.interp(*share, trained)
    log_left, log_noise = -np.logaddexp(0, -log_snr), -np.logaddexp(0, log_snr)
    before = np.concatenate([[0.0], log_left[:-1]])  # of the level below; of the data 0
    noise_s = np.concatenate([[0.0], np.exp(log_noise[:-1])])
    columns = -np.expm1(log_left - before), np.exp(before), np.exp(log_left), noise_s
    columns = (*columns, np.exp(log_noise))
    t = jnp.arange(1, steps + 1, dtype=jnp.int32)
    return reverse.on_levels(Step(t, *(jnp.asarray(a, reverse.kernel.dtype) for a in columns)))


def kl_rate(
    key: Array, forward: ForwardTrajectory, reverse: Reverse, u: Float[Array, " N"]
) -> Float[Array, " N"]:
    """What a step at u adds in the limit, by du: −½ (dλ/du) e^λ ‖x_0 − x̂_0‖² at a draw of x_λ."""
    trained = log_snr_of(reverse.trained)
    place = u * (reverse.T - 1)
    i = jnp.minimum(place.astype(jnp.int32), reverse.T - 2)
    slope = trained[i + 1] - trained[i]
    at = reverse.on_levels(levels_at(trained[i] + (place - i) * slope))
    t = at.trained.t
    levels = ForwardTrajectory(
        forward.kernel, at.trained, forward.x_0, forward.x_dim, forward.observed
    )
    x_t = levels.sample_at(key, t)
    snr = at.trained.alpha_bar_t / at.trained.noise_t
    error = levels.sum_observed((forward.x_0 - at.x_0_hat(x_t, t)) ** 2)
    return -0.5 * (reverse.T - 1) * slope * snr * error
