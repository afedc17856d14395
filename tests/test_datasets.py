"""Laws of the generators, against their closed forms and published ceilings."""

import importlib
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.integrate import quad

from probdiff import datasets

ROLL = importlib.import_module("probdiff.datasets.swiss_roll")  # behind the function of that name
MEANS = np.array([[-1.0, 0.0], [2.0, 1.0]])
COVARIANCES = np.array([[[0.5, 0.2], [0.2, 0.3]], [[0.1, 0.0], [0.0, 0.4]]])
WEIGHTS = np.array([0.3, 0.7])


def roll_moments(noise):
    """Mean and mean variance of the raw roll, by adaptive quadrature over θ."""
    low, high = 1.5 * np.pi, 4.5 * np.pi
    mean_x = quad(lambda a: a * np.cos(a), low, high)[0] / (high - low)
    mean_y = quad(lambda a: a * np.sin(a), low, high)[0] / (high - low)
    square = quad(lambda a: a * a, low, high)[0] / (high - low)
    return (mean_x, mean_y), (square - mean_x**2 - mean_y**2) / 2 + noise**2


def roll_density_by_quad(x, noise, extra_variance, shrink):
    """Density at one point, by adaptive quadrature in float64."""
    (mean_x, mean_y), square = roll_moments(noise)
    variance = shrink * noise**2 / square + extra_variance

    def integrand(u):
        angle = 1.5 * np.pi * (1 + 2 * u)
        curve = np.array([angle * np.cos(angle) - mean_x, angle * np.sin(angle) - mean_y])
        gap = x - math.sqrt(shrink / square) * curve
        return math.exp(-gap @ gap / (2 * variance)) / (2 * math.pi * variance)

    pieces = np.linspace(0, 1, 201)
    return sum(quad(integrand, *ends)[0] for ends in itertools.pairwise(pieces))


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_swiss_roll_is_scaled_by_its_law(noise):
    mean, square = roll_moments(noise)
    np.testing.assert_allclose(ROLL._ROLL_MEAN, mean, rtol=1e-10)
    np.testing.assert_allclose(ROLL._roll_scale(noise), math.sqrt(square), rtol=1e-10)
    if noise == 0:
        assert 1 / math.sqrt(square) == pytest.approx(0.1473, abs=5e-5)


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
def test_swiss_roll_is_centred_with_unit_mean_variance(key, noise):
    n = 100_000
    x = np.asarray(datasets.swiss_roll(key, n, noise=noise), np.float64)
    for values, expected in [(x[:, 0], 0.0), (x[:, 1], 0.0), ((x**2).mean(axis=1), 1.0)]:
        assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(n)


def test_noise_free_swiss_roll_lies_on_the_curve(key):
    (mean_x, mean_y), square = roll_moments(0.0)
    x = np.asarray(datasets.swiss_roll(key, 1_000, noise=0.0)) * math.sqrt(square)
    x += np.array([mean_x, mean_y])
    radius = np.hypot(x[:, 0], x[:, 1])
    np.testing.assert_allclose(x[:, 0], radius * np.cos(radius), atol=1e-3)
    assert stats.kstest(radius, stats.uniform(1.5 * np.pi, 3 * np.pi).cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("noise", "beta_1", "ceiling"),
    [(0.1, 1e-4, 0.10), (0.1, 1e-5, 0.36), (0.1, 0.0, 0.38), (0.25, 1e-4, -1.01), (0.25, 0, -0.94)],
)
def test_swiss_roll_ceilings(key, noise, beta_1, ceiling):
    """−h(X^(1)), or −h(X^(0)) at β_1 = 0, in bits per point; the s.e. of the mean is 0.008."""
    key_roll, key_noise = jax.random.split(key)
    x_0 = datasets.swiss_roll(key_roll, 20_000, noise=noise)
    x_1 = math.sqrt(1 - beta_1) * x_0 + math.sqrt(beta_1) * jax.random.normal(key_noise, x_0.shape)
    log_density = datasets.swiss_roll_log_density(
        x_1, noise=noise, extra_variance=float(beta_1), shrink=1.0 - beta_1
    )
    assert float(log_density.mean()) / math.log(2) == pytest.approx(ceiling, abs=0.03)


@pytest.mark.parametrize(
    ("noise", "extra_variance", "shrink"), [(0.5, 0.0, 1.0), (0.0, 0.01, 0.99), (0.3, 0.5, 0.5)]
)
def test_swiss_roll_log_density_equals_adaptive_quadrature(key, noise, extra_variance, shrink):
    x = datasets.swiss_roll(key, 12, noise=noise).reshape(3, 4, 2)
    log_density = datasets.swiss_roll_log_density(
        x, noise=noise, extra_variance=extra_variance, shrink=shrink
    )
    expected = [
        math.log(roll_density_by_quad(point, noise, extra_variance, shrink))
        for point in np.asarray(x, np.float64).reshape(-1, 2)
    ]
    np.testing.assert_allclose(log_density, np.reshape(expected, (3, 4)), atol=2e-3)


def test_swiss_roll_density_integrates_to_one():
    line, step = np.linspace(-4, 4, 161, retstep=True)
    grid = jnp.asarray(np.stack(np.meshgrid(line, line), axis=-1), dtype=float)
    log_density = datasets.swiss_roll_log_density(grid, noise=1.0)
    assert float(jnp.exp(log_density).sum()) * step**2 == pytest.approx(1, abs=1e-3)


def test_gaussian_has_its_mean_and_covariance(key):
    n = 50_000
    mean, covariance = np.array([1.0, -2.0]), np.array([[1.0, 0.9], [0.9, 2.0]])
    x = np.asarray(datasets.gaussian(key, n, covariance=covariance, mean=mean), np.float64)
    whitened = np.linalg.solve(np.linalg.cholesky(covariance), (x - mean).T)
    for row in whitened:
        assert stats.kstest(row, stats.norm.cdf).pvalue > 1e-3
    product = whitened[0] * whitened[1]
    assert abs(product.mean()) < 4 * product.std() / math.sqrt(n)


def test_gaussian_is_centred_unless_told(key):
    covariance = np.eye(3)
    at_zero = datasets.gaussian(key, 10, covariance=covariance)
    shifted = datasets.gaussian(key, 10, covariance=covariance, mean=np.arange(3.0))
    np.testing.assert_allclose(shifted - at_zero, np.tile(np.arange(3.0), (10, 1)), atol=1e-6)


def test_mixture_log_density_is_the_sum_over_components(x64):
    mixture = datasets.gaussian_mixture_distribution(
        means=MEANS, covariances=COVARIANCES, weights=WEIGHTS
    )
    x = np.random.RandomState(0).normal(size=(20, 2))
    density = sum(
        weight * stats.multivariate_normal(mean, covariance).pdf(x)
        for weight, mean, covariance in zip(WEIGHTS, MEANS, COVARIANCES, strict=True)
    )
    np.testing.assert_allclose(mixture.log_prob(jnp.asarray(x)), np.log(density), rtol=1e-10)


def test_mixture_draws_follow_the_mixture(key):
    x = datasets.gaussian_mixture(
        key, 20_000, means=MEANS, covariances=COVARIANCES, weights=WEIGHTS
    )
    for axis in range(2):

        def cdf(value, axis=axis):
            scales = np.sqrt(COVARIANCES[:, axis, axis])
            return stats.norm.cdf(value[:, None], MEANS[:, axis], scales) @ WEIGHTS

        assert stats.kstest(np.asarray(x[:, axis]), cdf).pvalue > 1e-3


def test_mixture_weights_are_equal_unless_told(key):
    mixture = datasets.gaussian_mixture_distribution(means=MEANS, covariances=COVARIANCES)
    np.testing.assert_allclose(mixture.mixing_distribution.probs, [0.5, 0.5], rtol=1e-6)


def test_digits_are_split_once_and_for_all():
    parts = datasets.digits()
    images = np.concatenate([parts.train, parts.validation, parts.test])
    labels = np.concatenate([parts.train_labels, parts.validation_labels, parts.test_labels])
    assert images.shape == (1797, 8, 8)
    assert len(np.unique(images, axis=0)) == 1797
    np.testing.assert_array_equal(np.unique(images), np.arange(17))
    np.testing.assert_array_equal(
        np.bincount(labels), [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    )
    np.testing.assert_array_equal(
        np.bincount(parts.test_labels), [27, 25, 36, 28, 38, 25, 30, 31, 25, 35]
    )
    assert int(parts.test.sum()) == 93605


def test_digits_keep_their_labels():
    """The nearest training image has the right label for most test images."""
    parts = datasets.digits()
    train = np.asarray(parts.train).reshape(-1, 64)
    test = np.asarray(parts.test).reshape(-1, 64)
    square = (test**2).sum(1)[:, None] - 2 * test @ train.T + (train**2).sum(1)
    guess = np.asarray(parts.train_labels)[square.argmin(axis=1)]
    assert (guess == np.asarray(parts.test_labels)).mean() > 0.95


@pytest.mark.parametrize("levels_width", [1.0, 0.25])
def test_dequantise_adds_uniform_noise_of_one_level(key, levels_width):
    x = levels_width * jnp.tile(jnp.arange(17.0), 2_000)
    value = datasets.dequantise(key, x, levels_width=levels_width)
    np.testing.assert_array_equal(jnp.floor(value / levels_width) * levels_width, x)
    noise = np.asarray((value - x) / levels_width)
    assert stats.kstest(noise, stats.uniform.cdf).pvalue > 1e-3


def test_dequantise_stays_below_the_next_level(monkeypatch, key):
    largest = jnp.float32(1 - 2**-24)
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype: jnp.full(shape, largest))
    assert float(datasets.dequantise(key, jnp.full(1, 16.0)).max()) < 17


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda key: datasets.swiss_roll(key, 0, noise=0.1), "n must be at least 1; got 0"),
        (
            lambda key: datasets.swiss_roll(key, 5, noise=-0.1),
            "noise must be finite and not negative; got -0.1",
        ),
        (
            lambda key: datasets.swiss_roll_log_density(jnp.zeros(2), noise=0.0),
            "noise and extra_variance must not both be zero.*noise=0.0, extra_variance=0.0",
        ),
        (
            lambda key: datasets.swiss_roll_log_density(
                jnp.zeros(2), noise=0.1, extra_variance=math.nan
            ),
            "extra_variance must be finite and not negative; got nan",
        ),
        (
            lambda key: datasets.swiss_roll_log_density(jnp.zeros(2), noise=0.1, shrink=1.5),
            r"shrink must lie in \(0, 1\]; got 1.5",
        ),
        (
            lambda key: datasets.gaussian(key, 5, covariance=np.array([[1.0, 2.0], [2.0, 1.0]])),
            "covariance must be symmetric and positive definite; got",
        ),
        (
            lambda key: datasets.gaussian(key, 5, covariance=np.array([[1.0, 0.5], [0.0, 1.0]])),
            "covariance must be symmetric and positive definite; got",
        ),
        (
            lambda key: datasets.gaussian_mixture(
                key, 5, means=MEANS, covariances=COVARIANCES * np.array([1, -1])[:, None, None]
            ),
            r"covariances\[1\] must be symmetric and positive definite; got",
        ),
        (
            lambda key: datasets.gaussian_mixture(
                key, 5, means=MEANS, covariances=COVARIANCES, weights=np.array([0.5, 0.6])
            ),
            "weights must be probabilities with sum 1; got",
        ),
        (
            lambda key: datasets.dequantise(key, jnp.zeros(3), levels_width=0.0),
            "levels_width must be positive and finite; got 0.0",
        ),
    ],
)
def test_bad_arguments_are_named(key, call, message):
    with pytest.raises(ValueError, match=message):
        call(key)


@pytest.mark.parametrize("shape", [(3, 2, 4), (3, 2, 4, 3)])
def test_mirrored_images_stand_behind_the_images(shape):
    images = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    both = datasets.with_mirrored(images)
    assert both.shape == (6, *shape[1:])
    np.testing.assert_array_equal(both[:3], images)
    for column in range(4):
        np.testing.assert_array_equal(both[3:, :, column], images[:, :, 3 - column])
