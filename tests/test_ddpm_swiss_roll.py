"""The tutorial's roll: its best diffusion, its ceilings, and the test that draws have to pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import xarray as xr

from probdiff import Diffusion, GaussianKernel, datasets, diagnostics, readouts, sample, schedules
from probdiff.experiments import ddpm_swiss_roll as experiment
from probdiff.experiments.ddpm_swiss_roll import best_network, curve_and_noise, define_best
from probdiff.experiments.judging import TwoSampleTest, energy, gaussian, two_sample_test
from probdiff.experiments.report import Row, above_ceiling

BETA, NOISE = experiment.rates(), experiment.NOISE


def roll(seed, n, noise=NOISE):
    return datasets.swiss_roll(jax.random.key(seed), n, noise=noise)


@pytest.mark.parametrize(("t", "noise"), [pytest.param(2, 0.25, marks=pytest.mark.long), (20, 1.0)])
def test_best_step_has_the_moments_that_the_score_tells(x64, t, noise):
    """E[x_0 | x_t] = (x_t + n ∇ log q) / √ᾱ, Var = n/ᾱ (1 + n ∂² log q), n = 1 − ᾱ."""
    steps = schedules.steps(BETA)
    step = steps.at(t, 0)
    alpha_bar, n = float(step.alpha_bar_t), float(step.noise_t)
    keys = jax.random.split(jax.random.key(t), 2)
    x_t = np.sqrt(alpha_bar) * datasets.swiss_roll(keys[0], 20, noise=noise)
    x_t += np.sqrt(n) * jax.random.normal(keys[1], x_t.shape)

    def log_q(x):
        return datasets.swiss_roll_log_density(x, noise=noise, extra_variance=n, shrink=alpha_bar)

    score = jax.vmap(jax.grad(log_q))(x_t)
    curvature = jnp.diagonal(jax.vmap(jax.hessian(log_q))(x_t), axis1=1, axis2=2)
    x_0 = (x_t + n * score) / np.sqrt(alpha_bar)
    spread = n / alpha_bar * (1 + n * curvature)
    weight = np.sqrt(step.alpha_bar_s) * step.beta / n
    variance = weight**2 * spread + step.beta * step.noise_s / n

    outputs = best_network(steps, noise)(x_t, jnp.full(20, t))
    np.testing.assert_allclose(outputs[:, :2], x_0, atol=2e-3)
    found = readouts.LearnedVariance()(outputs[:, 2:], steps.at(jnp.full(20, t), 1))
    np.testing.assert_allclose(found, variance, rtol=2e-3)


@pytest.mark.parametrize(("noise", "expected"), [(0.0, -1.00), (0.25, -1.51), (0.5, -2.16)])
def test_best_bound_of_the_tutorials_rates(noise, expected):
    """Figures computed by another program, good to 0.03."""
    tree = diagnostics.bound(
        jax.random.key(1), define_best(BETA, noise), {}, roll(0, 1000, noise), num_draws=2
    )
    k = tree["bound"].attrs
    assert abs(k["mean_bits"] - expected) < 4 * k["se_bits"] + 0.03


@pytest.mark.parametrize("change", [(0.03, 0.0), (0.0, 0.2), (0.0, -0.2)])
def test_no_other_step_is_better_than_the_best(change):
    """x̂_0 or the variance changed, K falls: 500 points, the same draws, 4 standard errors."""
    network = best_network(schedules.steps(BETA), NOISE)
    shift = jnp.repeat(jnp.asarray(change), 2)
    other = Diffusion(
        GaussianKernel(), BETA, lambda x_t, t: network(x_t, t) + shift,
        event_shape=(2,), readout=readouts.Data(),
    )  # fmt: skip
    best, changed = (
        diagnostics.bound(jax.random.key(1), d, {}, roll(0, 500))
        for d in (define_best(BETA, NOISE), other)
    )
    (mean, se) = experiment.paired_with_best({"changed": changed}, best)["changed"]
    assert mean < -4 * se


def test_the_curve_is_scaled_to_unit_variance():
    curve, sigma = curve_and_noise(0.5, spacing=0.01)
    np.testing.assert_allclose(curve.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(jnp.mean(curve**2) + sigma**2, 1, atol=1e-4)
    assert float(jnp.linalg.norm(jnp.diff(curve, axis=0), axis=1).max()) <= 0.01


@pytest.mark.long
def test_ceilings_of_the_roll():
    """Figures computed by another program, good to 0.02; KL of q(x_T) is 0.003."""
    found = experiment.densities(jax.random.key(0), roll(0, 2000))
    for values, expected in ((found.x_1, -1.36), (found.x_0, -0.94)):
        mean, se = experiment.mean_and_se(values)
        assert abs(mean - expected) < 4 * se + 0.02
    mean, se = experiment.mean_and_se(found.gain_T)
    assert abs(mean - 0.003) < 4 * se + 0.001


def test_rates_leave_a_third_of_the_variance():
    alpha_bar = np.prod(1 - BETA)
    assert alpha_bar == pytest.approx(0.354, abs=5e-4)
    assert -np.log2(1 - alpha_bar) == pytest.approx(0.63, abs=5e-3)


def test_epochs_are_counted_in_batches():
    assert experiment.Size().num_steps == 1500 * 10_000 // 100


def test_a_model_above_the_best_is_named():
    def tree(bits):
        values = np.asarray(bits) / diagnostics.BITS_PER_NAT
        return xr.DataTree.from_dict({"bound": xr.Dataset({"bound": ("example", values)})})

    best = tree([-1.0, -2.0, 0.5])
    models = {"better": tree([-0.5, -1.6, 1.1]), "worse": tree([-2.0, -2.5, 0.0])}
    found = experiment.paired_with_best(models, best)
    assert found["better"] == pytest.approx((0.5, 0.1 / np.sqrt(3)))
    rows = [Row(f"K − best, paired: {name}", *k, "bits", 0.0) for name, k in found.items()]
    assert above_ceiling(rows) == ["K − best, paired: better"]


def test_energy_distance_of_numbers_is_that_of_scipy():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=50), rng.normal(0.5, 2, size=30)
    expected = scipy.stats.energy_distance(x, y) ** 2
    found = two_sample_test(rng, x[:, None], y[:, None], energy, num_permutations=1)
    assert found.distance == pytest.approx(expected, rel=1e-10)


def test_discrepancy_of_normal_points_is_that_of_their_laws():
    """In d dimensions E k = (1 + 2v/w²)^(−d/2) exp(−|δ|²/2(w² + 2v)), v one variance, δ the shift.

    20 pairs of sets of 500; all pairs counted, a point beside itself adds (1 − E k)/n for each set.
    """
    rng, w, shift, n = np.random.default_rng(3), 0.7, np.array([0.5, 0.0]), 500
    same = 1 / (1 + 2 / w**2)
    expected = 2 * same * (1 - np.exp(-0.5 * shift @ shift / (w**2 + 2))) + 2 * (1 - same) / n
    found = [
        two_sample_test(
            rng, rng.normal(size=(n, 2)), rng.normal(size=(n, 2)) + shift, gaussian(w),
            num_permutations=1,
        ).distance
        for _ in range(20)
    ]  # fmt: skip
    assert abs(np.mean(found) - expected) < 4 * np.std(found, ddof=1) / np.sqrt(20)


@pytest.mark.parametrize("k", [energy, gaussian(0.5)], ids=["energy", "gaussian"])
def test_p_is_uniform_where_the_law_is_one(k):
    """400 tests with 99 divisions: p is uniform on 0.01, ..., 1."""
    rng = np.random.default_rng(1)
    p = np.array(
        [
            two_sample_test(
                rng, rng.normal(size=(15, 2)), rng.normal(size=(25, 2)), k, num_permutations=99
            ).p_value
            for _ in range(400)
        ]
    )
    for level in (0.05, 0.3, 0.7):
        assert abs(np.mean(p <= level + 1e-9) - level) < 4 * np.sqrt(level * (1 - level) / 400)


@pytest.mark.parametrize("k", [energy, gaussian(0.5)], ids=["energy", "gaussian"])
def test_another_law_is_seen(k):
    """Also by more divisions than fit one block."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(200, 2)), rng.normal(size=(150, 2)) * [1.0, 2.5]
    assert two_sample_test(rng, x, y, k, num_permutations=599).p_value == pytest.approx(1 / 600)


@pytest.mark.parametrize(
    ("x", "y", "count", "message"),
    [
        ((5, 2), (5, 3), 10, "y must have points of dimension 2, as x; got 3"),
        ((0, 2), (5, 2), 10, "x must be at least 1; got 0"),
        ((5, 2), (5, 2), 0, "num_permutations must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_tested_is_refused(x, y, count, message):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=message):
        two_sample_test(rng, np.zeros(x), np.zeros(y), energy, num_permutations=count)


def test_a_kernel_without_width_is_refused():
    with pytest.raises(ValueError, match="width must be above 0; got 0"):
        gaussian(0.0)


@pytest.mark.long
def test_only_the_roll_passes_for_the_roll():
    """2000 points beside 2000: fresh data pass, plain normal ones fail; 500 untrained draws do."""
    held_out = roll(0, 2000)
    diffusion = experiment.define(8)
    untrained = sample.ancestral(jax.random.key(1), diffusion, experiment.untrained(diffusion), 500)
    normal = jax.random.normal(jax.random.key(2), (2000, 2))
    fresh = experiment.compare(0, roll(3, 2000), held_out, 1199)
    assert all(found.p_value > 0.01 for found in fresh.values())
    for draws in (untrained, normal):
        tests = experiment.compare(0, draws, held_out, 1199)
        assert all(found.p_value < 0.001 for found in tests.values())


def test_draws_that_fail_are_named():
    tests = {
        "good": {"energy": TwoSampleTest(0.1, 0.011)},
        "bad": {"energy": TwoSampleTest(0.2, 0.01)},
    }
    assert experiment.failing(tests, "energy") == ["bad"]
