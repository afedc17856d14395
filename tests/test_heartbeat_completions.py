"""Completing first beats: SMC and counting say the same of the same diffusion."""

import jax
import numpy as np
import pytest

from probdiff import datasets, sample
from probdiff.experiments.heartbeat import among, complete, completion_rows
from probdiff.experiments.heartbeat.exact import define_exact


@pytest.fixture(scope="module")
def both():
    """The exact diffusion of 12 steps, which errs enough to have wrong completions."""
    diffusion = define_exact(12)
    draws = sample.ancestral(jax.random.key(0), diffusion, {}, 40_000)
    by_smc = complete(jax.random.key(1), diffusion, {}, num_particles=500, num_runs=4)
    return by_smc, among(draws)


@pytest.mark.long
@pytest.mark.parametrize("what", ["right", "log_evidence"])
def test_smc_and_counting_agree(both, what):
    (value, se), (counted, counted_se) = (getattr(found, what) for found in both)
    assert abs(value - counted) < 4 * np.hypot(se, counted_se)
    assert 0 < se < 0.05


@pytest.mark.long
def test_some_completions_are_wrong(both):
    assert 0.2 < both[1].right[0] < 0.99


def test_counting_on_the_data_themselves_is_exact():
    found = among(np.tile(datasets.heartbeat_sequences(length=20, period=5), (4, 1)))
    assert found.right == (1.0, 0.0)
    assert found.log_evidence[0] == pytest.approx(-np.log(5))
    assert found.log_evidence[1] == pytest.approx(0)


def test_the_error_of_the_mean_log_frequency_is_that_of_repetition():
    rng = np.random.default_rng(2)
    beats = datasets.heartbeat_sequences(length=20, period=5)
    values, errors = [], []
    for _ in range(400):
        draws = beats[rng.integers(0, 5, 300)]
        draws = np.where(rng.uniform(size=(300, 1)) < 0.3, 0, draws)  # no beat at all
        value, se = among(draws).log_evidence
        values.append(value)
        errors.append(se)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


@pytest.mark.long
def test_rows_stand_beside_their_ceilings(both):
    rows = completion_rows(*both)
    assert [row.ceiling for row in rows] == [100.0, 100.0, -np.log(5), -np.log(5)]
    assert rows[0].value == 100 * both[0].right[0]
