"""Dead leaves against the closed forms of their law: radii, shared discs, grey values, coverage."""

import math

import jax
import numpy as np
import pytest
from scipy import stats
from scipy.integrate import quad

from probdiff import datasets
from probdiff.datasets.dead_leaves import _leaves

R_MIN, R_MAX = 1.5, 12.0
PAIRS = [
    ((i, j), (i + k, j + m))
    for i, j in [(0, 0), (9, 3), (0, 12), (14, 10)]
    for k, m in [(0, 1), (1, 0), (0, 3), (2, -2), (-6, 0), (-5, 5), (0, 15), (15, 0)]
    if 0 <= i + k < 16 and 0 <= j + m < 16
]


def common_area(radius, distance):
    """Area that two discs of one radius share, their centres at a distance."""
    if distance >= 2 * radius:
        return 0.0
    half = distance / (2 * radius)
    return 2 * radius**2 * (math.acos(half) - half * math.sqrt(1 - half**2))


def same_leaf(distance):
    """P(h) = γ(h) / (2γ(0) − γ(h)), γ by adaptive quadrature over radii."""

    def gamma(h):
        start = max(R_MIN, h / 2)
        return quad(lambda r: r**-3 * common_area(r, h), start, R_MAX)[0]

    return gamma(distance) / (2 * gamma(0) - gamma(distance))


def power_law(exponent):
    """Distribution function of a density ∝ r^−exponent on [R_MIN, R_MAX]."""

    def integral(r):
        return np.log(r) if exponent == 1 else -(r ** (1 - exponent))

    low, high = integral(R_MIN), integral(R_MAX)
    return lambda r: (integral(r) - low) / (high - low)


@pytest.fixture(scope="module")
def pictures():
    return np.asarray(
        datasets.dead_leaves(jax.random.key(1), 20_000, size=16, r_min=R_MIN, r_max=R_MAX)
    )


@pytest.fixture(scope="module")
def leaves():
    """Radius, row and column of discs around a square of side 15."""
    drawn = _leaves(jax.random.key(2), 200_000, span=15.0, r_min=R_MIN, r_max=R_MAX)
    return [np.asarray(part, np.float64) for part in drawn]


@pytest.mark.parametrize("span", [0.0, 15.0, 1_000.0])
def test_radii_follow_the_power_law(span):
    """Leaves centred within the square are met at the rate at which they fall: density ∝ r^−3."""
    radius, row, column = _leaves(jax.random.key(3), 300_000, span=span, r_min=R_MIN, r_max=R_MAX)
    room = max(span, R_MIN)  # every leaf over a single pixel may be centred this near to it
    low, high = (0, span) if span else (-room, room)
    centred = (row >= low) & (row <= high) & (column >= low) & (column <= high)
    assert centred.sum() > 10_000
    drawn = np.asarray(radius[centred], np.float64)
    assert R_MIN * (1 - 1e-6) <= drawn.min() and drawn.max() <= R_MAX * (1 + 1e-6)
    assert stats.kstest(drawn, power_law(3)).pvalue > 1e-3


def test_centres_are_uniform_where_a_leaf_may_touch(leaves):
    radius, row, column = leaves
    for centre in (row, column):
        assert stats.kstest((centre + radius) / (15 + 2 * radius), stats.uniform.cdf).pvalue > 1e-3
    correlation = np.corrcoef(row, column)[0, 1]
    assert abs(correlation) < 4 / math.sqrt(len(row))


@pytest.mark.parametrize(("i", "j"), [(0, 0), (15, 4), (7, 7)])
def test_leaves_over_any_pixel_have_one_law(leaves, i, j):
    """Rate ∝ r^−3 times area π r²: density ∝ 1/r; the share of leaves over a pixel is exact too."""
    radius, row, column = leaves
    over = (row - i) ** 2 + (column - j) ** 2 <= radius**2
    assert stats.kstest(radius[over], power_law(1)).pvalue > 1e-3
    area = math.pi * quad(lambda r: 1 / r, R_MIN, R_MAX)[0]
    share = area / quad(lambda r: r**-3 * (15 + 2 * r) ** 2, R_MIN, R_MAX)[0]
    assert abs(over.mean() - share) < 4 * math.sqrt(share * (1 - share) / len(over))


@pytest.mark.parametrize(("pixel", "other"), PAIRS)
def test_two_pixels_show_one_leaf_with_the_stated_probability(pictures, pixel, other):
    """Anywhere and in any direction; one pair a picture, n = 20,000."""
    expected = same_leaf(math.dist(pixel, other))
    share = (pictures[:, *pixel] == pictures[:, *other]).mean()
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / len(pictures))


def test_crop_has_the_law_of_a_smaller_picture(key):
    n = 2_000
    large = np.asarray(datasets.dead_leaves(key, n, size=40, r_min=R_MIN, r_max=R_MAX))
    for i, j in [(0, 0), (12, 20), (24, 24)]:
        crop = large[:, i : i + 16, j : j + 16]
        expected = same_leaf(4)
        share = (crop[:, 0, 0] == crop[:, 0, 4]).mean()
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / n)


def test_covariance_of_greys_is_the_variance_times_the_probability_of_one_leaf(pictures):
    for distance in (1, 4, 9):
        product = 12 * (pictures[:, 8, 2] - 0.5) * (pictures[:, 8, 2 + distance] - 0.5)
        error = product.std() / math.sqrt(len(product))
        assert abs(product.mean() - same_leaf(distance)) < 4 * error


@pytest.mark.parametrize(("i", "j"), [(0, 0), (7, 8), (15, 0)])
@pytest.mark.long
def test_greys_are_uniform_at_every_pixel(pictures, i, j):
    assert stats.kstest(pictures[:, i, j], stats.uniform.cdf).pvalue > 1e-3


def test_given_greys_cover_every_pixel_and_are_equally_likely(key):
    """No pixel is left bare: 0, the ground, is not among them."""
    greys = np.array([2.0, 3.0, 7.5], np.float32)
    drawn = np.asarray(datasets.dead_leaves(key, 3_000, size=9, r_min=0.7, r_max=30.0, greys=greys))
    assert np.unique(drawn).tolist() == greys.tolist()
    counts = [(drawn[:, 4, 4] == grey).sum() for grey in greys]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_small_leaves_make_pixels_independent(key):
    drawn = np.asarray(datasets.dead_leaves(key, 4, size=32, r_min=0.2, r_max=0.49))
    assert all(len(np.unique(picture)) == 32 * 32 for picture in drawn)


def test_single_pixel_is_drawn(key):
    drawn = datasets.dead_leaves(key, 5_000, size=1, r_min=R_MIN, r_max=R_MAX)
    assert stats.kstest(np.asarray(drawn).ravel(), stats.uniform.cdf).pvalue > 1e-3


def test_pictures_are_those_of_their_key(key):
    first, again = (datasets.dead_leaves(key, 3, size=8) for _ in range(2))
    other = datasets.dead_leaves(jax.random.key(1), 3, size=8)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be at least 1; got 0"),
        ({"size": 0}, "size must be at least 1; got 0"),
        ({"r_min": 0.0}, "r_min must be positive and finite; got 0.0"),
        ({"r_min": math.nan}, "r_min must be positive and finite; got nan"),
        ({"r_max": 1.0}, "r_max must be finite and above r_min = 1.0; got 1.0"),
        ({"r_max": math.inf}, "r_max must be positive and finite; got inf"),
        ({"greys": np.zeros(0)}, "greys must be at least one number; got none"),
        ({"greys": np.array([0.0, math.nan])}, "greys must be finite; got"),
    ],
)
def test_bad_arguments_are_named(key, options, message):
    options = {"n": 2, "size": 4, **options}
    with pytest.raises(ValueError, match=message):
        datasets.dead_leaves(key, options.pop("n"), **options)
