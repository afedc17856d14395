"""Readouts: five ways to say one reverse step, its variances, and the last step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probdiff import Diffusion, GaussianKernel, readouts, schedules
from probdiff.readouts import (
    BridgeVariance,
    ForwardVariance,
    InterpolatedVariance,
    LearnedVariance,
)

T = 8
KERNEL = GaussianKernel()
SCHEDULES = {
    "log_snr_linear": schedules.log_snr_linear(T, beta_1=1e-3, alpha_bar_T=0.01),
    "linear": schedules.linear(T, beta_1=0.02, beta_T=0.5),
    "harmonic": schedules.harmonic(T),
}
every_schedule = pytest.mark.parametrize("beta", SCHEDULES.values(), ids=SCHEDULES)


class Levels:
    """Everything of all steps in NumPy, arrays (T, 1), and x_t with the x̂_0 to be said of it."""

    def __init__(self, beta):
        self.beta = beta[:, None]
        self.share = np.cumprod(1 - beta)[:, None]
        self.share_s = np.concatenate([np.ones((1, 1)), self.share[:-1]])
        self.x_t = np.broadcast_to(np.linspace(-2.5, 2.0, 5), (T, 5))
        self.x_0_hat = 0.8 * np.tanh(self.x_t) + 0.1 * np.arange(1, T + 1)[:, None] / T
        self.v = 0.7 * np.cos(self.x_t)
        self.step = schedules.steps(beta).at(jnp.arange(1, T + 1), 1)

    @property
    def mean(self):
        """Mean of the bridge at x̂_0, which at t = 1 is x̂_0 itself."""
        weighted = np.sqrt(self.share_s) * self.beta * self.x_0_hat
        weighted += np.sqrt(1 - self.beta) * (1 - self.share_s) * self.x_t
        return weighted / (1 - self.share)

    @property
    def noise(self):
        """ε of x_t = √ᾱ_t x̂_0 + √(1−ᾱ_t) ε."""
        return (self.x_t - np.sqrt(self.share) * self.x_0_hat) / np.sqrt(1 - self.share)


OUTPUTS = {
    readouts.Perturbation: lambda a: (a.mean - np.sqrt(1 - a.beta) * a.x_t) / np.sqrt(a.beta),
    readouts.Epsilon: lambda a: a.noise,
    readouts.Data: lambda a: a.x_0_hat,
    readouts.Velocity: lambda a: np.sqrt(a.share) * a.noise - np.sqrt(1 - a.share) * a.x_0_hat,
    readouts.Score: lambda a: -a.noise / np.sqrt(1 - a.share),
}
VARIANCES = {
    LearnedVariance: lambda a: a.beta / (a.beta + (1 - a.beta) * np.exp(-a.v)),
    ForwardVariance: lambda a: a.beta,
    BridgeVariance: lambda a: np.where(
        a.share_s == 1, a.beta, a.beta * (1 - a.share_s) / (1 - a.share)
    ),
    InterpolatedVariance: lambda a: np.exp(
        (1 + a.v) / 2 * np.log(a.beta) + (1 - a.v) / 2 * np.log(VARIANCES[BridgeVariance](a))
    ),
}


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("readout", OUTPUTS)
@every_schedule
def test_every_readout_of_one_denoiser_is_one_reverse_step(x64, beta, readout, variance):
    if readout.needs_signal and beta[-1] == 1:
        pytest.skip("refused at alpha_bar_T = 0 by Diffusion")
    a = Levels(beta)
    z = jnp.asarray(OUTPUTS[readout](a))
    outputs = (z, jnp.asarray(a.v)) if variance.num_outputs else (z,)
    reader = readout(variance())
    assert reader.num_outputs(KERNEL) == len(outputs)
    law = reader(KERNEL, outputs, jnp.asarray(a.x_t), a.step)
    sd = np.sqrt(np.broadcast_to(VARIANCES[variance](a), a.x_t.shape))
    np.testing.assert_allclose(law.mean, a.mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(np.broadcast_to(law.scale, sd.shape), sd, rtol=1e-10)
    x_0_hat = reader.x_0_hat(KERNEL, outputs, jnp.asarray(a.x_t), a.step)
    np.testing.assert_allclose(x_0_hat, a.x_0_hat, rtol=1e-10, atol=1e-10)


@every_schedule
def test_no_perturbation_is_the_forward_kernel(x64, beta):
    a = Levels(beta)
    x_t, zero = jnp.asarray(a.x_t), jnp.zeros(a.x_t.shape)
    law = readouts.Perturbation()(KERNEL, (zero, zero), x_t, a.step)
    forward = KERNEL.transition(x_t, a.step)
    np.testing.assert_allclose(law.mean, forward.mean, rtol=1e-12)
    np.testing.assert_allclose(law.variance, np.broadcast_to(forward.variance, law.mean.shape))


def test_learned_variance_has_a_gradient_where_a_step_forgets_everything(x64):
    """β_T = 1 has an infinite logit; the network must still be trainable there."""
    a = Levels(SCHEDULES["harmonic"])
    x_t = jnp.asarray(a.x_t)

    def log_density(z, v):
        law = readouts.Perturbation()(KERNEL, (z, v), x_t, a.step)
        return jnp.sum(law.log_prob(x_t))

    for gradient in jax.grad(log_density, (0, 1))(x_t, x_t):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("variance", "figures"),
    [
        (BridgeVariance(), {40: 0.819, 200: 0.961, 1000: 0.992}),
        (ForwardVariance(), {40: 1.0, 200: 1.0, 1000: 1.0}),
    ],
    ids=["bridge", "forward"],
)
def test_diffusion_of_a_perfect_denoiser_has_the_stated_variance(x64, variance, figures):
    """N(0, 1) data, x̂_0 = √ᾱ_t x_t: Var x_1, by Var x_s = (1−β_t) Var x_t + variance_t."""
    for steps, stated in figures.items():
        beta = schedules.log_snr_linear(steps, beta_1=1e-3, alpha_bar_T=1e-4)
        table = schedules.steps(beta)
        one = jnp.ones(steps)
        slope = readouts.Data(variance).mean(jnp.sqrt(table.alpha_bar_t), one, table)
        width = variance(None, table)
        spread = 1.0
        for t in range(steps, 1, -1):
            spread = float(slope[t - 1] ** 2 * spread + width[t - 1])
        assert round(spread, 3) == stated


def network(x_t, t):
    """Some output that depends on x."""
    return jnp.concatenate([0.3 * x_t, 0.2 - 0.1 * x_t], -1)


@pytest.mark.parametrize(
    ("last_step", "mean_and_variance"),
    [
        (readouts.Tied(), lambda x, b: (np.sqrt(1 - b) * x, b)),
        (
            readouts.Learned(),  # Perturbation with LearnedVariance, at t = 1
            lambda x, b: (
                np.sqrt(1 - b) * x + np.sqrt(b) * 0.3 * x,
                b / (b + (1 - b) * np.exp(0.1 * x - 0.2)),
            ),
        ),
    ],
    ids=["tied", "learned"],
)
def test_last_step_is_in_the_users_units(x64, last_step, mean_and_variance):
    loc, scale = np.array([3.0, -1.0]), np.array([2.0, 0.1])
    diffusion = Diffusion(
        GaussianKernel(),
        SCHEDULES["linear"],
        network,
        event_shape=(2,),
        last_step=last_step,
        loc=loc,
        scale=scale,
    )
    x_1, x_0 = np.array([[0.4, -1.0], [1.3, 0.2]]), np.array([[3.5, -1.1], [4.0, -0.9]])
    mean, variance = mean_and_variance(x_1, 0.02)
    mean, variance = loc + scale * mean, scale**2 * variance
    expected = -0.5 * ((x_0 - mean) ** 2 / variance + np.log(2 * np.pi * variance))
    law = diffusion.bind({}).data(jnp.asarray(x_1))
    assert (law.batch_shape, law.event_shape) == ((2,), (2,))
    np.testing.assert_allclose(law.log_prob(jnp.asarray(x_0)), expected.sum(-1), rtol=1e-10)


def test_a_tied_last_step_does_not_ask_the_network(x64):
    def broken_at_1(x_t, t):
        return jnp.where(t[:, None] == 1, jnp.nan, network(x_t, t))

    laws = []
    for asked in (network, broken_at_1):
        diffusion = Diffusion(GaussianKernel(), SCHEDULES["linear"], asked, event_shape=(2,))
        x_1 = jnp.array([[0.5, -1.0]])
        laws.append(diffusion.bind({}).data(x_1).log_prob(x_1))
    np.testing.assert_array_equal(*laws)
    assert np.isfinite(laws[0]).all()


def test_a_learned_variance_of_ones_own_gives_way_to_the_bridges_over_longer_steps():
    @dataclasses.dataclass(frozen=True)
    class Scaled(readouts.Variance):
        num_outputs: int = 1

        def __call__(self, output, step):
            return step.beta * jnp.exp(output)

    readout = readouts.Data(variance=Scaled())
    assert readout.fixed_variance(longer=False) is None
    assert readout.fixed_variance(longer=True) == readouts.BridgeVariance()
