"""Draws of missing entries from a mixture, and log p of the others, against closed forms."""

import numpy as np
import pytest
from scipy import stats
from sklearn.mixture import GaussianMixture

from probdiff.tables.missing import drawn


def mixture():
    rng = np.random.default_rng(0)
    cov = [[1, 0.8, 0], [0.8, 1, 0.3], [0, 0.3, 1]]
    x = np.concatenate([
        rng.multivariate_normal([0, 0, 0], cov, 600),
        rng.multivariate_normal([3, 0, 1], 0.3 * np.eye(3), 200),
    ])  # fmt: skip
    return x, GaussianMixture(2, random_state=0).fit(x)


def test_draws_have_the_conditional_law():
    """20,000 draws of one entry given two: mean and variance within 4 of their errors."""
    _, model = mixture()
    row, seen = np.array([1.0, np.nan, 0.5]), [0, 2]
    rows = np.tile(np.nan_to_num(row), (20_000, 1))
    is_missing = np.tile(np.isnan(row), (20_000, 1))
    draws, log_p = drawn(np.random.default_rng(1), rows, is_missing, model)
    assert (draws[:, seen] == row[seen]).all()
    share, means, variances = [], [], []
    for weight, mean, cov in zip(model.weights_, model.means_, model.covariances_, strict=True):
        own = cov[np.ix_(seen, seen)]
        pull = cov[1, seen] @ np.linalg.inv(own)
        share.append(weight * stats.multivariate_normal(mean[seen], own).pdf(row[seen]))
        means.append(mean[1] + pull @ (row[seen] - mean[seen]))
        variances.append(cov[1, 1] - pull @ cov[seen, 1])
    np.testing.assert_allclose(log_p, np.log(np.sum(share)), rtol=1e-10)
    share = np.array(share) / np.sum(share)
    mean = share @ means
    variance = share @ (np.array(variances) + np.array(means) ** 2) - mean**2
    assert abs(draws[:, 1].mean() - mean) < 4 * np.sqrt(variance / 20_000)
    assert draws[:, 1].var() == pytest.approx(variance, rel=0.05)


def test_complete_rows_keep_their_values_and_density():
    x, model = mixture()
    draws, log_p = drawn(np.random.default_rng(0), x, np.isnan(x), model)
    assert (draws == x).all()
    np.testing.assert_allclose(log_p, model.score_samples(x), atol=1e-12)
