"""Parzen windows: against the formula in loops, SciPy's, a known law, and the published number."""

import math

import numpy as np
import pytest
from scipy import stats

from fresh import check_in_fresh_process
from probdiff import datasets, diagnostics

RNG = np.random.default_rng(0)
MEASURE = "Lebesgue, in the user's units"
DRAWS, VALIDATION, TEST = (RNG.uniform(size=(n, 3, 2)) for n in (9, 5, 7))


def by_hand(draws, x, bandwidth):
    """log p̂ of each image, number by number."""
    values = []
    for image in x:
        terms = [
            math.exp(stats.norm.logpdf(np.ravel(image), np.ravel(draw), bandwidth).sum())
            for draw in draws
        ]
        values.append(math.log(math.fsum(terms) / len(draws)))
    return np.array(values)


def parzen(draws, validation, test, **options):
    return diagnostics.parzen(draws, validation, test, **options)["parzen"]


def test_log_densities_are_those_by_hand():
    group = parzen(DRAWS, VALIDATION, TEST)
    bandwidths = np.logspace(-1, 0, 10)
    np.testing.assert_allclose(group["bandwidth"], bandwidths, rtol=1e-14)
    expected = np.array([by_hand(DRAWS, VALIDATION, s).mean() for s in bandwidths])
    np.testing.assert_allclose(group["validation_mean"], expected, rtol=1e-10, atol=1e-12)
    best = bandwidths[expected.argmax()]
    assert group.attrs["bandwidth"] == pytest.approx(best) and 0.1 < best < 1
    log_density = by_hand(DRAWS, TEST, best)
    np.testing.assert_allclose(group["log_density"], log_density, rtol=1e-10)
    mean, se = log_density.mean(), log_density.std(ddof=1) / math.sqrt(7)
    expected = {"mean": mean, "se": se}
    expected |= {f"{name}_bits": value / math.log(2) for name, value in expected.items()}
    assert {name: group.attrs[name] for name in expected} == pytest.approx(expected, rel=1e-10)
    assert group.attrs["num_dims"] == 6 and group.attrs["num_draws"] == 9
    assert group.attrs["num_validation"] == 5 and group.attrs["reference_measure"] == MEASURE


def test_numbers_have_the_kernel_density_of_scipy():
    draws, x = RNG.standard_normal(50), RNG.standard_normal(20)
    for bandwidth in (0.05, 0.4):
        group = parzen(draws, x, x, bandwidths=np.array([bandwidth]))
        known = stats.gaussian_kde(draws, bandwidth / draws.std(ddof=1)).logpdf(x)
        np.testing.assert_allclose(group["log_density"], known, rtol=1e-10, atol=1e-12)


def test_draws_of_a_gaussian_have_its_density_with_the_noise_added():
    """One number of 20,000 draws of N(0, 1), at 1000 points of N(0, 1)."""
    draws, x, bandwidth = RNG.standard_normal(20_000), RNG.standard_normal(1_000), 0.5
    group = parzen(draws, x, x, bandwidths=[bandwidth])
    known = stats.norm.logpdf(x, 0, math.sqrt(1 + bandwidth**2))
    attrs = group.attrs
    assert abs(attrs["mean"] - known.mean()) < 0.02
    expected = -0.5 * (math.log(2 * math.pi * 1.25) + 1 / 1.25)
    assert abs(attrs["mean"] - expected) < 4 * attrs["se"]
    # half of a squared normal, over 1.25, has standard deviation √½ / 1.25
    assert attrs["se"] == pytest.approx(math.sqrt(0.5) / 1.25 / math.sqrt(1_000), rel=0.2)


def test_the_bandwidth_is_chosen_on_validation_images_alone():
    """Draws are 0.1 apart; images lie half way between them, or far away."""
    draws, between, away = np.linspace(0, 1, 11), np.linspace(0.05, 0.95, 10), np.full(10, 10.0)
    near = parzen(draws, between, away, bandwidths=[0.02, 0.1, 3.0])
    far = parzen(draws, away, between, bandwidths=[0.02, 0.1, 3.0])
    assert (near.attrs["bandwidth"], far.attrs["bandwidth"]) == (0.1, 3.0)
    assert near["validation_mean"].values.argmax() == 1 and near.attrs["mean"] < -1_000


@pytest.mark.parametrize("block_size", [1, 3, 100])
def test_blocks_do_not_matter(block_size, capsys):
    whole = parzen(DRAWS, VALIDATION, TEST)
    found = parzen(DRAWS, VALIDATION, TEST, block_size=block_size, progress=True)
    for name in ("log_density", "validation_mean"):
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-12)
    assert "bandwidth: 100%" in capsys.readouterr().err


def test_no_digits_are_lost_to_where_the_data_are():
    near = parzen(DRAWS, VALIDATION, TEST)
    far = parzen(DRAWS + 2.0**24, VALIDATION + 2.0**24, TEST + 2.0**24)
    np.testing.assert_allclose(far["log_density"], near["log_density"], rtol=1e-6)
    single = parzen(*(a.astype(np.float32) for a in (DRAWS, VALIDATION, TEST)))
    np.testing.assert_allclose(single["log_density"], near["log_density"], rtol=1e-5)


def test_images_far_from_all_draws_have_finite_log_density():
    group = parzen(DRAWS, VALIDATION, TEST + 1e4, bandwidths=[0.1])
    assert np.isfinite(group["log_density"]).all() and group.attrs["mean"] < -1e9


def test_one_test_image_has_no_standard_error():
    attrs = parzen(DRAWS, VALIDATION, TEST[:1]).attrs
    assert math.isnan(attrs["se"]) and math.isnan(attrs["se_bits"])


HOLE = np.where(np.arange(6).reshape(3, 2) == 4, np.nan, TEST)
BAD = {
    r"validation must have .* of those of draws, \(3, 2\); got shape \(5, 2, 3\)": (
        (DRAWS, VALIDATION.reshape(5, 2, 3), TEST), {}),
    r"test must have .*; got shape \(3, 2\)": ((DRAWS, VALIDATION, TEST[0]), {}),
    r"draws must have one or more rows.*; got shape \(0, 3, 2\)": (
        (DRAWS[:0], VALIDATION, TEST), {}),
    r"validation must have one or more rows.*; got shape \(0, 3, 2\)": (
        (DRAWS, VALIDATION[:0], TEST), {}),
    r"test must have one or more rows.*; got shape \(0, 3, 2\)": (
        (DRAWS, VALIDATION, TEST[:0]), {}),
    r"draws must have one or more rows.*; got shape \(\)": (
        (np.array(1.0), VALIDATION, TEST), {}),
    "test must be finite; got nan or infinity": ((DRAWS, VALIDATION, HOLE), {}),
    r"bandwidths must be one or more positive numbers; got \[\]": (
        (DRAWS, VALIDATION, TEST), {"bandwidths": []}),
    r"bandwidths must be one or more positive numbers; got \[0.1, 0.0\]": (
        (DRAWS, VALIDATION, TEST), {"bandwidths": [0.1, 0.0]}),
    "block_size must be at least 1; got 0": ((DRAWS, VALIDATION, TEST), {"block_size": 0}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_scored_is_refused(message):
    arrays, options = BAD[message]
    with pytest.raises(ValueError, match=message):
        diagnostics.parzen(*arrays, **options)


def test_the_result_is_read_from_its_file_without_the_package(tmp_path):
    check_in_fresh_process(
        diagnostics.parzen(DRAWS, VALIDATION, TEST),
        tmp_path / "parzen.nc",
        """
        group = tree["parzen"]
        assert group["log_density"].dims == ("example",)
        assert group.attrs["bandwidth"] == group["validation_mean"].idxmax()
        """,
    )


@pytest.mark.slow
def test_training_images_of_mnist_score_what_was_published():
    """349 ± 3.3 bits, 242 nats, of 10,000 training images, it is not known which.

    Other choices of them give up to 4 nats more or less.
    """
    data = datasets.mnist()
    train, test = (images.astype(np.float32) / 255 for images in (data.train, data.test))
    chosen = np.random.default_rng(0).choice(50_000, 10_000, replace=False)
    for draws in (train[:10_000], train[chosen]):
        attrs = parzen(draws, train[50_000:51_000], test).attrs
        assert attrs["bandwidth"] == pytest.approx(0.1 * 10 ** (2 / 9))
        assert abs(attrs["mean_bits"] - 349) < 2 * 3.3
        assert 2.0 < attrs["se"] < 2.4
