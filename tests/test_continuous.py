"""The bound at any number of steps, and without end, against its integral for Gaussian data."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from probdiff import (
    BernoulliKernel,
    Diffusion,
    GaussianKernel,
    diagnostics,
    networks,
    readouts,
    schedules,
    standard_diffusion,
)

VARIANCE, T = 0.5, 30
BETA = schedules.log_snr_linear(T, beta_1=0.01, alpha_bar_T=1e-3)
DATA = readouts.Data(readouts.BridgeVariance())


def denoise(x_t, log_snr):
    """x̂_0 of N(0, v) entry by entry."""
    snr = jnp.exp(log_snr)[:, None]
    return VARIANCE * jnp.sqrt(snr * (1 + snr)) * x_t / (1 + VARIANCE * snr)


denoise.takes_log_snr = True


def gaussian(network=denoise, event_shape=(2,), **options):
    options = {"readout": DATA, "loc": 1.0, "scale": 2.0, "data_variance": VARIANCE} | options
    return Diffusion(GaussianKernel(), BETA, network, event_shape=event_shape, **options)


def snr_of(steps):
    """ᾱ/(1−ᾱ) of n levels, by lines through those of training."""
    left = np.cumprod(1 - np.asarray(BETA))
    return np.exp(
        np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, T), np.log(left) - np.log1p(-left))
    )


def kl_of_steps(x, steps):
    """½ Σ (SNR_s − SNR_t) E(x_0 − x̂_0)² with the bridge's variance, or its integral; x in units."""
    z2, v = ((x - 1) / 2) ** 2, VARIANCE
    if steps == math.inf:
        ends = 1 + v * snr_of(T)[[0, -1]]
        (at_1, at_T) = (np.log(w) + 1 / w - z2 / (v * w) for w in ends)
        return 0.5 * (at_1 - at_T)
    snr = snr_of(steps)
    error = (z2 + v**2 * snr[1:]) / (1 + v * snr[1:]) ** 2
    return 0.5 * np.sum((snr[:-1] - snr[1:]) * error)


@pytest.mark.filterwarnings("ignore:x_0")  # of one example many times
@pytest.mark.parametrize("steps", [9, T, math.inf])
def test_bound_of_gaussian_data_is_its_sum_or_integral(key, steps):
    """One example 4000 times, an entry of it missing: within 4 standard errors over the noise."""
    x = np.tile(np.array([[2.6, np.nan]], np.float32), (4000, 1))
    mask = np.tile([[True, False]], (4000, 1))
    given = key, gaussian(), {}, x
    options = {"num_times": 100, "block_size": 4000}
    group = diagnostics.sampled_bound(*given, mask=mask, steps=steps, **options)["bound"]
    kl = (group["reconstruction"] - group["prior_kl"] - group["bound"]).values
    se = kl.std() / np.sqrt(len(kl))
    assert 0 < se < 0.006 * kl_of_steps(2.6, steps)
    assert abs(kl.mean() - kl_of_steps(2.6, steps)) < 4 * se
    assert group.attrs["T"] == steps


def test_steps_of_training_are_the_bound_as_it_was(key):
    x = np.random.default_rng(0).normal(1, 2 * VARIANCE**0.5, (20, 2)).astype(np.float32)
    for readout in (DATA, readouts.Data(readouts.ForwardVariance())):
        given = key, gaussian(readout=readout), {}, x
        one, other = (diagnostics.sampled_bound(*given, **o) for o in ({}, {"steps": T}))
        assert one["bound"].to_dataset().equals(other["bound"].to_dataset())


@pytest.mark.long
def test_bound_rises_to_its_limit_as_steps_are_halved(key):
    """By paired draws, each difference above −3 of its standard errors.

    The error is of order 1/n, so what is missing at 1025 steps is as much as the last halving won.
    """
    x = np.random.default_rng(0).normal(1, 2 * VARIANCE**0.5, (500, 2)).astype(np.float32)

    def values(variance, ladder):
        diffusion = gaussian(readout=readouts.Data(variance))
        given = key, diffusion, {}, x
        trees = [diagnostics.sampled_bound(*given, steps=n, num_times=20) for n in ladder]
        return np.array([tree["bound"]["bound"].values for tree in trees])

    of_bridge = values(readouts.BridgeVariance(), [*(2**i + 1 for i in range(3, 11)), math.inf])
    rise = np.diff(of_bridge, axis=0)
    se = rise.std(1) / np.sqrt(len(x))
    assert np.all(rise.mean(1) > -3 * se) and rise[0].mean() > 10 * se[0]
    assert abs(rise[-1].mean() / rise[-2].mean() - 1) < 0.1
    (of_forward,) = values(readouts.ForwardVariance(), [1025])
    assert abs(np.mean(of_forward - of_bridge[-1])) < 0.005


def test_a_mixture_has_a_limit_too(key):
    """FromMixture as it starts, its variance above the bridge's: 2000 steps against no end."""
    network = networks.FromMixture((2,), 2, 4, 1, rngs=nnx.Rngs(0))
    network.start([0.5, 0.5], [[-1, 0], [1, 0.5]], np.stack([0.2 * np.eye(2)] * 2))
    diffusion = gaussian(network, readout=readouts.Mixture(2), last_step=readouts.Learned())
    params = {"x_0_network$params": nnx.to_pure_dict(nnx.state(network))}
    x = np.random.default_rng(0).normal(1, 2 * VARIANCE**0.5, (100, 2)).astype(np.float32)
    found = [
        diagnostics.sampled_bound(key, diffusion, params, x, steps=n)["bound"]["bound"].values
        for n in (2000, math.inf)
    ]
    rise = found[1] - found[0]
    assert abs(rise.mean()) < 3 * rise.std() / 10 + 0.01
    assert found[1].std() > 1  # of differences, not of constants


def told_t(x_t, t):
    return 0 * x_t


@pytest.mark.parametrize(
    ("make", "steps", "message"),
    [
        (lambda: gaussian(told_t), 5, "steps must be left out where the network takes t"),
        (
            lambda: standard_diffusion((2,), kernel=BernoulliKernel()),
            math.inf,
            "steps must be left out for symbols",
        ),
        (
            lambda: gaussian(readout=readouts.Perturbation(readouts.ForwardVariance())),
            math.inf,
            "readout has no limit.*Perturbation",
        ),
        (
            lambda: gaussian(
                lambda x_t, t: jnp.concatenate([x_t, x_t], -1), readout=readouts.Data()
            ),
            math.inf,
            "network takes t",
        ),
        (gaussian, 1, "steps must be at least 2; got 1"),
        (gaussian, -math.inf, "steps must be an integer of at least 2; got -inf"),
    ],
)
def test_what_has_no_limit_is_refused_by_name(key, make, steps, message):
    x = np.zeros((3, 2), np.int32 if make().kernel.is_discrete else np.float32)
    with pytest.raises(ValueError, match=message):
        diagnostics.sampled_bound(key, make(), {}, x, steps=steps)


def test_a_variance_that_the_network_says_is_refused(key):
    def network(x_t, log_snr):
        return jnp.concatenate([x_t, x_t], -1)

    network.takes_log_snr = True
    for variance in (readouts.LearnedVariance(), readouts.InterpolatedVariance()):
        diffusion = gaussian(network, readout=readouts.Data(variance))
        with pytest.raises(ValueError, match="readout has no limit"):
            diagnostics.sampled_bound(key, diffusion, {}, np.zeros((3, 2)), steps=math.inf)
