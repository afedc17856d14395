"""The mixture readout against integrals on a line, and diffusions for which it is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from probdiff import Diffusion, GaussianKernel, infer, readouts, sample, schedules
from probdiff.kernels import bridge_weights

KERNEL = GaussianKernel()
T = 8
BETA = schedules.log_snr_linear(T, beta_1=0.02, alpha_bar_T=0.01)
STEPS = schedules.steps(BETA)


def weights_means_variances(outputs, readout):
    """The components as the docstring says, in NumPy."""
    logits, shifts, widths = np.split(np.asarray(outputs), 3)
    w = np.exp(logits) / np.exp(logits).sum(0)
    centres = np.linspace(readout.low, readout.high, readout.components)[:, None]
    spacing = (readout.high - readout.low) / (readout.components - 1)
    return w, centres + shifts, (0.25 * spacing * np.exp(widths)) ** 2


def by_integration(w, m, v, x_t, a, n):
    """Mean and variance of x_0 ~ Σ w N(m, v) given x_t ~ N(a x_0, n), on a fine grid."""
    x_0 = np.linspace(-12, 12, 400_001)
    density = (
        w[:, None] * np.exp(-0.5 * (x_0 - m[:, None]) ** 2 / v[:, None]) / np.sqrt(v)[:, None]
    ).sum(0)
    density *= np.exp(-0.5 * (x_t - a * x_0) ** 2 / n)
    density /= density.sum()
    mean = (density * x_0).sum()
    return mean, (density * (x_0 - mean) ** 2).sum()


@pytest.mark.parametrize("t", [1, 2, 5, T])
@pytest.mark.parametrize("readout", [readouts.Mixture(2), readouts.Mixture(5, -1.0, 3.0)], ids=str)
def test_moments_are_those_of_bayes_rule(x64, readout, t):
    rng = np.random.default_rng(t)
    outputs = tuple(jnp.asarray(o) for o in 0.3 * rng.normal(size=(3 * readout.components, 6)))
    x_t = 1.5 * rng.normal(size=6)
    step = STEPS.at(t, 0)
    mean, variance = readout.moments(outputs, jnp.asarray(x_t), step)
    w, m, v = weights_means_variances(outputs, readout)
    a, n = float(jnp.sqrt(step.alpha_bar_t)), float(step.noise_t)
    for i in range(6):
        expected = by_integration(w[:, i], m[:, i], v[:, i], x_t[i], a, n)
        np.testing.assert_allclose((mean[i], variance[i]), expected, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(readout.x_0_hat(KERNEL, outputs, jnp.asarray(x_t), step), mean)


@pytest.mark.parametrize("last", [2, 5])
def test_reverse_step_has_the_moments_of_the_bridge_averaged_over_x_0(x64, last):
    """From level 7 down to 6 and, as one longer step, to 4 and 1."""
    readout, rng = readouts.Mixture(3), np.random.default_rng(0)
    outputs = tuple(jnp.asarray(o) for o in rng.normal(size=(9, 4)))
    x_t = jnp.asarray(rng.normal(size=4))
    trained = STEPS.at(7, 0)
    s = {2: 6, 5: 3}[last]
    below = STEPS.at(s, 0)
    beta = 1 - trained.alpha_bar_t / below.alpha_bar_t
    step = trained._replace(beta=beta, alpha_bar_s=below.alpha_bar_t, noise_s=below.noise_t)
    law = readout.longer_step(KERNEL, outputs, x_t, trained, step)
    x_0_hat, variance = readout.moments(outputs, x_t, trained)
    weight_0, weight_t = bridge_weights(step)
    bridge = KERNEL.bridge(x_t, x_0_hat, step)
    np.testing.assert_allclose(law.mean, weight_0 * x_0_hat + weight_t * x_t, rtol=1e-10)
    np.testing.assert_allclose(law.variance, bridge.variance + weight_0**2 * variance, rtol=1e-5)
    if s == 6:
        single = readout(KERNEL, outputs, x_t, trained)
        np.testing.assert_allclose(single.mean, law.mean, rtol=1e-10)
        np.testing.assert_allclose(single.scale, law.scale, rtol=1e-10)


def standard_normal(x_t, t):
    """All components N(0, 1): means drawn in from −2 and 2, widths from 1."""
    shift = jnp.concatenate([0 * x_t, 0 * x_t, 0 * x_t + 2, 0 * x_t - 2, 0 * x_t, 0 * x_t], -1)
    return shift


def diffusion_of_the_standard_normal():
    return Diffusion(KERNEL, BETA, standard_normal, event_shape=(2,), readout=readouts.Mixture(2))


def test_reverse_trajectory_of_the_standard_normal_is_the_forward_kernel(x64):
    reverse = diffusion_of_the_standard_normal().bind({})
    x_t = jnp.asarray(np.random.default_rng(0).normal(size=(T - 1, 2)))
    t = jnp.arange(2, T + 1)
    law = reverse.step(x_t, t)
    expected = KERNEL.transition(x_t, reverse.steps.at(t, 1))
    np.testing.assert_allclose(law.mean, expected.mean, rtol=1e-9)
    np.testing.assert_allclose(law.variance, expected.variance, rtol=2e-6)


@pytest.mark.parametrize("steps", [None, 2, 5])
def test_draws_of_the_standard_normal_stay_so_over_any_number_of_levels(steps):
    """n = 40,000 numbers; mean and second moment within 4 standard errors."""
    draws = sample.ancestral(
        jax.random.key(0), diffusion_of_the_standard_normal(), {}, 20_000, steps=steps
    )
    assert abs(draws.mean()) < 4 / 200
    assert abs((draws**2).mean() - 1) < 4 * np.sqrt(2) / 200


@pytest.mark.parametrize("steps", [None, 4])
def test_evidence_under_the_standard_normal_is_exact_over_any_number_of_levels(steps):
    """Runs of 4,000 particles; log evidence within 4 standard errors, or 0.01."""
    prior = diffusion_of_the_standard_normal().prior({})

    def program(y=None):
        x = prior()
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    y = np.array([0.8, -1.4], np.float32)
    smc = infer.SMC(program, num_particles=4_000, num_runs=4, steps=steps)
    smc.run(jax.random.key(1), y=y)
    exact = dist.Normal(0.0, np.sqrt(1.25)).log_prob(y).sum()
    assert abs(smc.log_evidence - exact) < max(4 * smc.log_evidence_se, 0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": 1}, "components must be at least 2; got 1"),
        ({"low": 2.0}, "low must be below high = 2.0; got 2.0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        readouts.Mixture(**options)


def test_outliers_leave_the_bound_and_its_gradient_finite():
    """Of widths e^±100, as a network says of a value 100 standard deviations out."""
    step, x_t = STEPS.at(2, 0), jnp.array([150.0])
    zero = jnp.zeros(1)

    def log_p(width):
        outputs = zero, zero, zero, zero, width, -width
        return readouts.Mixture(2)(KERNEL, outputs, x_t, step).log_prob(x_t).sum()

    for width in (jnp.array([100.0]), jnp.array([-100.0])):
        value, slope = jax.value_and_grad(log_p)(width)
        assert jnp.isfinite(value) and jnp.isfinite(slope).all()
