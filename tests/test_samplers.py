"""Samplers of few calls against the flow of Gaussians and mixtures, which is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from oracles import exact_gaussian
from probdiff import (
    BernoulliKernel,
    Diffusion,
    GaussianKernel,
    readouts,
    sample,
    samplers,
    schedules,
    standard_diffusion,
)

KINDS = {"DDIM": samplers.DDIM, "DPMSolver": samplers.DPMSolver, "Heun": samplers.Heun}
T = 2000
VARIANCE = 0.25
BETA = schedules.log_snr_linear(T, beta_1=1e-4, alpha_bar_T=1e-4)


def gaussian():
    """The exact denoiser of N(1, ¼) in units: x̂_0 = v a x_t/(a² v + σ²) for x ~ N(0, v)."""

    def network(x_t, log_snr):
        ratio = jnp.exp(log_snr)[:, None]  # a²/σ²
        a, noise = jnp.sqrt(ratio / (1 + ratio)), 1 / (1 + ratio)
        return VARIANCE * a * x_t / (a**2 * VARIANCE + noise)

    network.takes_log_snr = True
    readout = readouts.Data(readouts.BridgeVariance())
    return Diffusion(GaussianKernel(), BETA, network, event_shape=(1,), readout=readout, loc=1.0)


def slope(sampler):
    """x_0/x_T, the same for all draws: the flow of a Gaussian is linear."""
    reverse = gaussian().bind({})
    x_1 = sampler.walk(jax.random.key(0), reverse, sampler.times(reverse), jnp.ones((1, 1)))
    return float(reverse.x_0_hat(x_1, 1)[0, 0])


def exact_slope():
    """√v over the sd of x_T, times what x̂_0 makes of x_1."""
    noise = np.cumprod(1 - np.asarray(BETA, float))
    sd = np.sqrt(noise * VARIANCE + 1 - noise)
    return np.sqrt(noise[0]) * VARIANCE / sd[0] / sd[-1]


@pytest.mark.parametrize(("name", "order"), [("DDIM", 1), ("DPMSolver", 2), ("Heun", 2)])
def test_error_on_the_flow_of_a_gaussian_has_its_order(x64, name, order):
    errors = [abs(slope(KINDS[name](n)) - exact_slope()) for n in (20, 40, 80)]
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.all(np.abs(rates - order) < 0.35)
    assert errors[-1] < {1: 0.02, 2: 1e-3}[order]


@pytest.mark.parametrize("spacing", samplers.SPACINGS)
def test_levels_ascend_from_the_first_to_the_last(spacing):
    for n, steps in ((2, T), (7, T), (50, 50), (49, 50), (10, 11)):
        beta = schedules.cosine(steps) if steps < T else BETA
        times = samplers.DDIM(n, spacing).times(standard_diffusion(T=steps, beta=beta).bind({}))
        assert len(times) == n and times[0] == 1 and times[-1] == steps
        assert (np.diff(times) > 0).all()


def test_levels_lie_evenly_in_log_snr():
    reverse = gaussian().bind({})
    times = samplers.DPMSolver(9).times(reverse)
    left = np.cumprod(1 - np.asarray(BETA, float))[times - 1]
    np.testing.assert_allclose(np.diff(np.log(left / (1 - left))), np.log(1e-4) / 4, rtol=0.01)


@pytest.mark.parametrize("name", KINDS)
def test_draws_have_the_law_of_the_data_in_their_units(key, name):
    """N(1, ¼), 4000 draws by 30 levels; Kolmogorov-Smirnov."""
    draws = sample.draw(key, gaussian(), {}, 4000, KINDS[name](60), block_size=1500)
    assert draws.shape == (4000, 1) and draws.dtype == np.float64
    assert stats.kstest(draws[:, 0], "norm", (1.0, 0.5)).pvalue > 1e-3


def test_ddim_with_all_the_noise_of_the_bridge_is_ancestral(key):
    """η = 1 and every level: one law with `ancestral`, 4000 draws each."""
    diffusion = exact_gaussian(np.zeros(2), np.array([0.4, 0.8]), T=20)
    readout = readouts.Data(readouts.BridgeVariance())

    def network(x_t, t):
        left = jnp.asarray(np.cumprod(1 - diffusion.rates))[t - 1][:, None]
        v = jnp.array([0.16, 0.64])
        return v * jnp.sqrt(left) * x_t / (left * v + 1 - left)

    other = Diffusion(
        GaussianKernel(), diffusion.rates, network, event_shape=(2,), readout=readout,
        last_step=readouts.Learned(),
    )  # fmt: skip
    ours = sample.draw(key, other, {}, 4000, samplers.DDIM(20, eta=1.0))
    theirs = sample.ancestral(jax.random.key(9), other, {}, 4000)
    for a, b in zip(ours.T, theirs.T, strict=True):
        assert stats.ks_2samp(a, b).pvalue > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_two_modes_get_their_shares(key, name):
    """0.7 at 1 and 0.3 at −1, sd 0.1: shares of 4000 draws within 0.02, by 25 levels."""
    means, shares, variance = jnp.array([1.0, -1.0]), jnp.array([0.7, 0.3]), 0.01

    def network(x_t, t):
        left = jnp.asarray(np.cumprod(1 - np.asarray(BETA)))[t - 1]
        a, noise = jnp.sqrt(left)[:, None], (1 - left)[:, None]
        total = a**2 * variance + noise
        weight = jax.nn.softmax(jnp.log(shares) - 0.5 * (x_t[:, None] - a * means) ** 2 / total, -1)
        mean = means + a * variance * (x_t[:, None] - a * means) / total
        return jnp.sum(weight * mean, -1)

    readout = readouts.Data(readouts.BridgeVariance())
    diffusion = Diffusion(GaussianKernel(), BETA, network, event_shape=(), readout=readout)
    draws = sample.draw(key, diffusion, {}, 4000, KINDS[name](25))
    assert abs(np.mean(draws > 0) - 0.7) < 0.02 + 3 * np.sqrt(0.21 / 4000)
    assert abs(np.abs(draws).mean() - 1) < 0.05


def test_grids_contexts_and_ends_of_noise(key):
    """Draws lie on the grid; each has its context; β_T = 1 is taken, by Heun refused."""
    readout = readouts.Data(readouts.BridgeVariance())

    def network(x_t, t, context):
        return 0 * x_t + context[:, None]

    diffusion = Diffusion(
        GaussianKernel(), schedules.harmonic(12), network, event_shape=(3,), readout=readout,
        last_step=readouts.Discretised(-2, 2, 5), context_shape=(),
    )  # fmt: skip
    context = np.array([-1.1, 0.2, 1.9])
    for sampler in (samplers.DDIM(4), samplers.DPMSolver(4)):
        draws = sample.draw(key, diffusion, {}, 3, sampler, context=context)
        np.testing.assert_array_equal(draws, np.repeat([[-1.0], [0.0], [2.0]], 3, 1))
    with pytest.raises(ValueError, match="beta_T must be below 1 for Heun"):
        sample.draw(key, diffusion, {}, 3, samplers.Heun(4), context=context)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: samplers.DDIM(1), "steps must be at least 2; got 1"),
        (lambda: samplers.DDIM(5, eta=1.5), "eta must"),
        (lambda: samplers.Heun(5, spacing="even"), "spacing must be one of"),
        (
            lambda: sample.draw(
                jax.random.key(0), standard_diffusion(T=5), {}, 3, samplers.DDIM(6)
            ),
            "steps must lie in 2..T = 5",
        ),
    ],
)
def test_bad_samplers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_symbols_are_refused(key):
    diffusion = standard_diffusion((2,), T=5, kernel=BernoulliKernel())
    with pytest.raises(ValueError, match="sampler must not be given for symbols"):
        sample.draw(key, diffusion, {}, 3, samplers.DDIM(3))
