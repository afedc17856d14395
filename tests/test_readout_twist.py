"""`ReadoutTwist` against diffusions whose law of known entries is exact, and its power by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

from oracles import covariance_of_diffusion, moments
from probdiff import Diffusion, GaussianKernel, infer, readouts, sample, schedules
from probdiff.infer.known import power
from probdiff.infer.program import read
from probdiff.infer.twist import Problem

pytestmark = pytest.mark.filterwarnings("ignore::probdiff.infer.InferenceWarning")

BETA = schedules.log_snr_linear(30, beta_1=1e-3, alpha_bar_T=1e-3)
READOUT = readouts.Mixture(2, -1.0, 1.0)
DISTANCE = READOUT.high - READOUT.low


def outputs(mean, variance, shape):
    """Network outputs that say N(mean, variance) of each number, by two equal components."""
    low, high = (mean - centre for centre in (READOUT.low, READOUT.high))
    width = 0.5 * jnp.log(16 * variance / DISTANCE**2)
    parts = (0.0, 0.0, low, high, width, width)
    return jnp.concatenate([jnp.broadcast_to(part, shape) for part in parts], -1)


def pair(rho, last_step=None, **units):
    """Two numbers of variance 1 and correlation ρ, each with its law given the other's x_t."""
    table = schedules.steps(BETA)

    def network(x_t, t):
        step = table.at(t, 1)
        a, n = jnp.sqrt(step.alpha_bar_t), step.noise_t
        mean = rho * a * x_t[..., ::-1] / (a**2 + n)
        return outputs(mean, 1 - (rho * a) ** 2 / (a**2 + n), x_t.shape)

    last_step = readouts.Learned() if last_step is None else last_step
    return Diffusion(
        GaussianKernel(), BETA, network, event_shape=(2,), readout=READOUT, last_step=last_step,
        **units,
    )  # fmt: skip


def covariance(rho):
    return np.array([[1.0, rho], [rho, 1.0]])


MASK = np.array([True, False])


@pytest.mark.long
def test_a_diffusion_of_independent_entries_has_weights_of_one():
    """n = 4 × 4096, whose start alone, x_T ~ π, has weights: sd 3e-4."""
    diffusion, a = pair(0.0), 1.2
    prior = diffusion.prior({})
    smc = infer.SMC(
        lambda: prior(known=np.array([a, 0.0], np.float32), mask=MASK), num_particles=4096,
        num_runs=4, twist=infer.ReadoutTwist(),
    )  # fmt: skip
    smc.run(jax.random.key(0))
    exact = stats.norm.logpdf(a, 0, math.sqrt(covariance_of_diffusion(diffusion, 2)[0, 0]))
    assert smc.log_evidence == pytest.approx(exact, abs=1e-3)
    ess = smc.result.outcome.trace.ess
    assert ess.min() > 0.995 * 4096  # what the start leaves, x_T ~ π
    # one call a level and particle: nothing is pulled back through the network
    assert smc.to_datatree().attrs["network_calls"] == diffusion.T * 4096 * 4


@pytest.mark.long
@pytest.mark.parametrize("measures_the_other", [False, True])
def test_a_known_entry_of_a_correlated_pair_is_conditioned_on_exactly(measures_the_other):
    """n = 4 × 8192; mean and variance within 4 % of the sd, log Z within 4 standard errors."""
    rho, a, y, noise = 0.9, 1.5, 0.3, 0.5
    diffusion = pair(rho)
    prior = diffusion.prior({}, variance=covariance(rho))

    def program(y):
        x = prior(known=np.array([a, 0.0], np.float32), mask=MASK)
        if measures_the_other:
            numpyro.sample("y", dist.Normal(x[1], noise), obs=y)

    smc = infer.SMC(program, num_particles=8192, num_runs=4, twist=infer.ReadoutTwist())
    smc.run(jax.random.key(1), np.float32(y))
    cov = covariance_of_diffusion(diffusion, 2)
    mean, variance = cov[1, 0] / cov[0, 0] * a, cov[1, 1] - cov[1, 0] ** 2 / cov[0, 0]
    exact = stats.norm.logpdf(a, 0, math.sqrt(cov[0, 0]))
    if measures_the_other:
        exact += stats.norm.logpdf(y, mean, math.sqrt(variance + noise**2))
        gain = variance / (variance + noise**2)
        mean, variance = mean + gain * (y - mean), variance * (1 - gain)
    found_mean, found_variance = moments(smc)
    assert found_mean[0] == pytest.approx(a, rel=1e-6)
    assert found_mean[1] == pytest.approx(mean, abs=0.04 * math.sqrt(variance))
    assert found_variance[1] == pytest.approx(variance, rel=0.08)
    assert abs(smc.log_evidence - exact) < 4 * smc.log_evidence_se + 1e-3
    assert smc.log_evidence_se < 0.02


@pytest.mark.long
def test_evidence_of_a_level_of_a_grid_is_the_share_of_draws_at_it():
    """n = 200,000 draws beside 4 × 2048 particles; within 4 combined standard errors."""
    rho, n = 0.8, 200_000
    diffusion = pair(rho, readouts.Discretised(0, 4, 5), loc=2.0, scale=1.0)
    prior = diffusion.prior({}, variance=covariance(rho))
    draws = sample.ancestral(jax.random.key(0), diffusion, {}, n)
    smc = infer.SMC(
        lambda known: prior(known=known, mask=MASK), num_particles=2048, num_runs=4,
        twist=infer.ReadoutTwist(),
    )  # fmt: skip
    for level in (1.0, 4.0):  # an inner one, and an end, whose cell is open
        smc.run(jax.random.key(1), np.array([level, 0.0], np.float32))
        is_level = draws[:, 0] == level
        share = is_level.mean()
        se = math.hypot(smc.log_evidence_se, math.sqrt((1 - share) / share / n))
        assert abs(smc.log_evidence - math.log(share)) < 4 * se
        expected = draws[is_level, 1]
        mean, variance = moments(smc)
        sd = float(expected.std())
        assert mean[1] == pytest.approx(expected.mean(), abs=0.1 * sd)
        assert variance[1] == pytest.approx(sd**2, rel=0.15)


def known_of(prior, mask):
    """The problem of known entries and nothing else."""
    conditioned = read(lambda: prior(), (), {}).conditioned
    known = np.zeros((len(np.atleast_2d(mask)), 2))
    return Problem(conditioned, conditioned.reverse, known, mask, True, True)


def regression(C, mask, step, error):
    """γ_t by the docstring's formula, with matrices of the known entries alone."""
    snr = step.alpha_bar_t / step.noise_t
    inside = np.linalg.inv(np.linalg.inv(C) + snr * np.eye(len(C)))
    block = np.ix_(mask, mask)
    moves, inside = (C - inside)[block], inside[block]
    D = np.diag(1 / np.diag(inside))
    errors = error / snr * np.eye(len(inside))
    return np.trace(moves @ D) / np.trace(D @ inside @ D @ (moves + errors))


@pytest.mark.parametrize("error", [0.0, 0.3])
@pytest.mark.parametrize("i", [2, 15, 30])
def test_power_is_the_regression_on_the_known_entries(x64, i, error):
    rho, table = 0.7, schedules.steps(BETA)
    C = covariance(rho)
    masks = np.array([[True, True], [True, False]])
    found = power(known_of(pair(rho).prior({}, variance=C), masks), table.at(i, 0), error)
    expected = [regression(C, mask, table.at(i, 0), error) for mask in masks]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:variance is a covariance that does not fit")
def test_power_counts_independent_entries_once_each_and_copies_once_together(x64):
    both, step, diffusion = np.array([True, True]), schedules.steps(BETA).at(15, 0), pair(0.0)
    independent = known_of(diffusion.prior({}), both)
    assert float(power(independent, step, 0.0)) == pytest.approx(1.0, abs=1e-12)
    copies = known_of(diffusion.prior({}, variance=covariance(1 - 1e-9)), both)
    assert float(power(copies, step, 0.0)) == pytest.approx(0.5, abs=1e-4)


def test_other_readouts_are_refused():
    diffusion = Diffusion(
        GaussianKernel(), BETA, lambda x, t: 0 * x, event_shape=(2,),
        readout=readouts.Epsilon(readouts.ForwardVariance()),
    )  # fmt: skip
    prior = diffusion.prior({})
    smc = infer.SMC(lambda: prior(known=np.zeros(2), mask=MASK), twist=infer.ReadoutTwist())
    with pytest.raises(ValueError, match=r"needs the readout Mixture.*Epsilon"):
        smc.run(jax.random.key(0))
