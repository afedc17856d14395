"""SMC against posteriors and evidences that are known.

A diffusion of Gaussians is linear, so its law p(x_0), and with it posterior and evidence, follow
from a recursion over means and covariances; and any diffusion can be drawn from, so that for any r

    Z = E[r(x_0)],    E[f | r] = E[f r] / Z,    x_0 ~ p by ancestral sampling,

is an importance estimate from p itself, free of every choice that SMC makes. The reference is in
both cases the diffusion of T steps that is walked, and not the data it stands for: the two differ
by a discretisation error that no number of particles removes.

Unweighted, the rule of 2015 has a bias of its own, which is a column here too: for N(0, 1) data it
tends to p r² instead of p r.

Sources: Sohl-Dickstein et al. (2015), section 2.5 and appendix C; Del Moral et al. (2006).
"""

import functools
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
from probdiff.kernels import bridge_weights

pytestmark = pytest.mark.filterwarnings("ignore::probdiff.infer.InferenceWarning")

LONG = schedules.log_snr_linear(1000, beta_1=1e-5, alpha_bar_T=1e-5)


def standard_normal(beta):
    """A diffusion that is N(0, 1) at every level, exactly."""
    readout = readouts.Perturbation(readouts.ForwardVariance())
    return Diffusion(GaussianKernel(), beta, lambda x, t: 0 * x, event_shape=(1,), readout=readout)


def measured(prior):
    """A program that measures the only entry with noise."""

    def program(y, sigma):
        numpyro.sample("y", dist.Normal(prior()[..., 0], sigma), obs=y)

    return program


# N(0, 1)


@pytest.fixture(scope="module")
def on_a_long_diffusion():
    """One compiled sampler of T = 1000 steps."""
    prior = standard_normal(LONG).prior({})
    return infer.SMC(measured(prior), num_particles=16_384, num_runs=4, block_size=65_536)


@pytest.mark.parametrize("variance", [1.0, 0.25])
@pytest.mark.long
def test_posterior_of_a_standard_normal_is_exact(on_a_long_diffusion, variance):
    """Evidence within 1e-4, ten of its standard errors: what float32 leaves of 1000 steps."""
    smc, y, sigma = on_a_long_diffusion, 1.0, math.sqrt(variance)
    smc.run(jax.random.key(0), np.float32(y), np.float32(sigma))
    mean, var = moments(smc)
    assert mean[0] == pytest.approx(y / (1 + variance), abs=0.01)
    assert var[0] == pytest.approx(variance / (1 + variance), rel=0.02)
    exact = stats.norm.logpdf(y, 0, math.sqrt(1 + variance))
    assert abs(smc.log_evidence - exact) < max(3 * smc.log_evidence_se, 1e-4)


@pytest.fixture(scope="module")
def rule_of_2015():
    """The same without weights, by the paper's own rule."""
    prior, n = standard_normal(LONG).prior({}), 40_000
    return infer.Guided(
        measured(prior), twist=infer.KernelTwist(), num_samples=n, check=False, block_size=n
    )


@pytest.mark.parametrize(
    ("variance", "mean", "var"), [(1.0, 0.6665, 0.3337), (0.25, 0.8889, 0.1114)]
)
def test_the_rule_of_2015_has_its_own_column(rule_of_2015, variance, mean, var):
    """p r², not p r: 2/3 and 1/3 where the posterior has 1/2 and 1/2."""
    guided = rule_of_2015
    guided.run(jax.random.key(0), np.float32(1.0), np.float32(math.sqrt(variance)))
    draws = guided.get_samples()["x_0"]
    assert draws.mean() == pytest.approx(mean, abs=0.01)
    assert draws.var() == pytest.approx(var, abs=0.01)


# Two entries of correlation ρ


def correlated(rho, beta):
    """The exact denoiser of a Gaussian pair, with the exact diagonal of its reverse covariance.

    In the axes of the eigenvectors the pair is independent: E[x_0 | x_t] and the variance of each.
    """
    table = schedules.steps(np.asarray(beta))
    turn = jnp.array([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2)
    sizes = jnp.array([1 + rho, 1 - rho])

    def network(x_t, t):
        step = table.at(t, 1)
        share = 1 / (1 / sizes + step.alpha_bar_t / step.noise_t)  # Var[x_0 | x_t] on each axis
        x_0_hat = (share * jnp.sqrt(step.alpha_bar_t) / step.noise_t * (x_t @ turn)) @ turn
        weight_0, _ = bridge_weights(step)
        bridge = step.beta * step.noise_s / step.noise_t
        variance = bridge + weight_0**2 * share.mean(-1, keepdims=True)
        logit = jnp.log(variance) - jnp.log1p(-variance)
        logit -= jnp.log(step.beta) - jnp.log1p(-step.beta)
        return jnp.concatenate([x_0_hat, jnp.broadcast_to(logit, x_t.shape)], -1)

    return Diffusion(
        GaussianKernel(), beta, network, event_shape=(2,), readout=readouts.Data(),
        last_step=readouts.Learned(),
    )  # fmt: skip


@functools.cache
def correlated_pair(rho):
    """One for all tests of it."""
    return correlated(rho, LONG)


@pytest.mark.long
@pytest.mark.parametrize("rho", [0.5, 0.9, 0.99])
def test_known_entry_of_a_pair_is_conditioned_on_exactly(rho):
    diffusion = correlated_pair(rho)
    prior = diffusion.prior({})
    a = 1.5
    known, mask = np.array([a, 0.0], np.float32), np.array([True, False])
    smc = infer.SMC(
        lambda: prior(known=known, mask=mask), num_particles=8_192, num_runs=4, block_size=32_768
    )
    smc.run(jax.random.key(0))
    cov = covariance_of_diffusion(diffusion, 2)
    mean, var = moments(smc)
    assert np.abs(cov - [[1, rho], [rho, 1]]).max() < 0.006  # what T = 1000 leaves of it
    exact = stats.norm.logpdf(a, 0, math.sqrt(cov[0, 0]))
    assert mean[1] == pytest.approx(rho * a, abs=0.01)
    assert var[1] == pytest.approx(1 - rho**2, rel=0.02)
    assert abs(smc.log_evidence - exact) < 4 * smc.log_evidence_se + 1e-4
    assert smc.log_evidence_se < 0.01


@pytest.mark.long
@pytest.mark.parametrize(("rho", "mean"), [(0.5, 0.347), (0.9, 0.726), (0.99, 0.914)])
def test_clamping_a_known_entry_has_its_own_column(rho, mean):
    """The rule of 2015 with r a point mass, constant in t."""
    prior = correlated_pair(rho).prior({})
    known, mask = np.array([1.0, 0.0], np.float32), np.array([True, False])
    n = 20_000
    guided = infer.Guided(
        lambda: prior(known=known, mask=mask),
        twist=infer.KernelTwist(),
        num_samples=n,
        check=False,
        block_size=n,
    )
    guided.run(jax.random.key(0))
    assert guided.get_samples()["x_0"][:, 1].mean() == pytest.approx(mean, abs=0.01)


@pytest.fixture(scope="module")
def short_pair():
    """A pair of correlation 0.9, T = 20, and the covariance that its diffusion really has."""
    diffusion = correlated(0.9, schedules.log_snr_linear(T=20, beta_1=1e-3, alpha_bar_T=1e-4))
    return diffusion, covariance_of_diffusion(diffusion, 2)


@pytest.mark.long
@pytest.mark.parametrize("rows", [[[1.0, -1.0]], [[1.0, -1.0], [0.5, 1.0]]])
def test_a_linear_map_has_its_exact_evidence(short_pair, rows):
    """Of one measurement and of two, as many directions kept, under the data's covariance."""
    diffusion, cov = short_pair
    prior = diffusion.prior({}, variance=np.array([[1.0, 0.9], [0.9, 1.0]]))
    A, noise = np.array(rows, np.float32), 0.05
    y = np.array([1.0, 0.2], np.float32)[: len(A)]

    def program(y):
        numpyro.sample("y", dist.Normal(A @ prior(), noise).to_event(1), obs=y)

    twist = infer.LaplaceTwist(rank=len(A))
    smc = infer.SMC(program, num_particles=256, num_runs=4, twist=twist)
    smc.run(jax.random.key(0), y)
    law = stats.multivariate_normal(np.zeros(len(A)), A @ cov @ A.T + noise**2 * np.eye(len(A)))
    assert abs(smc.log_evidence - law.logpdf(y)) < 4 * smc.log_evidence_se


# r = 1, and r times a constant


@pytest.mark.long
def test_a_likelihood_of_one_leaves_the_law_of_the_diffusion(key):
    """Every weight is exactly one; draws are those of ancestral sampling."""
    diffusion = mixture_diffusion()
    prior = diffusion.prior({})
    smc = infer.SMC(lambda: prior(), num_particles=4_000, num_runs=2)
    smc.run(key)
    assert smc.log_evidence == 0.0
    assert (smc.result.outcome.log_weights == smc.result.outcome.log_weights[0, 0]).all()
    draws = smc.result.outcome.x_0.reshape(-1, 2)
    others = sample.ancestral(jax.random.key(1), diffusion, {}, 8_000)
    for direction in ([1, 0], [0, 1], [1, 1], [1, -1]):
        assert stats.ks_2samp(draws @ direction, others @ direction).pvalue > 1e-3


# Two entries, a mixture of Gaussians, and likelihoods that are not Gaussian

STEPS = 100
MEANS = np.array([[1.2, 0.6], [-1.0, 0.8], [0.1, -1.3]], np.float32)
SHARES = np.array([0.5, 0.3, 0.2], np.float32)
SPREAD = 0.35


@functools.cache
def mixture_diffusion():
    """The exact denoiser of a mixture of three Gaussians; its mean is near 0, its variance 1."""
    beta = schedules.log_snr_linear(STEPS, beta_1=1e-3, alpha_bar_T=1e-4)
    table = schedules.steps(beta)

    def network(x_t, t):
        step = table.at(t, 1)
        root = jnp.sqrt(step.alpha_bar_t)
        variance = step.alpha_bar_t * SPREAD**2 + step.noise_t
        gap = x_t[:, None] - root[..., None] * MEANS
        log_p = jnp.log(SHARES) - 0.5 * (gap**2).sum(-1) / variance
        each = MEANS + (root * SPREAD**2 / variance)[..., None] * gap
        return (jax.nn.softmax(log_p, -1)[..., None] * each).sum(1)

    readout = readouts.Data(readouts.ForwardVariance())
    return Diffusion(GaussianKernel(), beta, network, event_shape=(2,), readout=readout)


MAP = np.array([[1.0, -0.5], [0.4, 1.2], [-0.8, 0.3]], np.float32)


def counts(x):
    """Counts of rates that are an affine map through softplus."""
    rate = jax.nn.softplus(x @ MAP.T + 1.0) * 2
    numpyro.sample("y", dist.Poisson(rate).to_event(1), obs=jnp.array([5, 1, 2]))


def heavy_tails(x):
    numpyro.sample("y", dist.StudentT(3.0, x.sum(-1), 0.3), obs=2.5)


def censored(x):
    """The first entry is only known to exceed 0.5 after noise; the second is measured."""
    numpyro.factor("above", jnp.log(dist.Normal(0.0, 0.4).cdf(x[..., 0] - 0.5) + 1e-30))
    numpyro.sample("y", dist.Normal(x[..., 1], 0.5), obs=0.2)


def two_peaks(x):
    """|x_1| is about 1: r has two modes."""
    peaks = dist.Normal(jnp.array([-1.0, 1.0]), 0.5)
    weights = dist.Categorical(probs=jnp.array([0.5, 0.5]))
    numpyro.factor("peaks", dist.MixtureSameFamily(weights, peaks).log_prob(x[..., 0]))


@pytest.fixture(scope="module")
def drawn():
    """A million exact draws of the diffusion."""
    return sample.ancestral(
        jax.random.key(9), mixture_diffusion(), {}, 1_000_000, block_size=250_000
    )


def importance(draws, observe):
    """log Z and E[f | r] from draws of the prior, with standard errors."""

    def log_r(x):
        with numpyro.handlers.block(), numpyro.handlers.trace() as sites:
            observe(x)
        return sum(s["fn"].log_prob(s["value"]) for s in sites.values())

    log_w = np.asarray(jax.jit(log_r)(draws), np.float64)
    top = log_w.max()
    w = np.exp(log_w - top)
    z, share = w.mean(), w / w.sum()
    f = functions(draws)
    mean = share @ f
    se = np.sqrt(((share[:, None] * (f - mean)) ** 2).sum(0))
    return math.log(z) + top, w.std() / z / math.sqrt(len(w)), mean, se


def functions(x):
    """First and second moments, `(M, 5)`."""
    return np.stack([x[:, 0], x[:, 1], x[:, 0] ** 2, x[:, 1] ** 2, x[:, 0] * x[:, 1]], 1)


@pytest.mark.parametrize(
    "observe",
    [
        pytest.param(law, marks=mark)
        for law, mark in (
            (counts, pytest.mark.long), (heavy_tails, pytest.mark.slow),
            (censored, pytest.mark.slow), (two_peaks, pytest.mark.slow),
        )
    ],
)  # fmt: skip
def test_posterior_under_a_mixture_is_that_of_importance_sampling(drawn, observe):
    """Evidence within 3 standard errors of both sides together, five moments within 4."""
    runs = 16
    prior = mixture_diffusion().prior({})
    smc = infer.SMC(lambda: observe(prior()), num_particles=2_048, num_runs=runs)
    smc.run(jax.random.key(3))
    log_z, se_z, mean, se = importance(drawn, observe)
    assert abs(smc.log_evidence - log_z) < 3 * math.hypot(se_z, smc.log_evidence_se)
    assert smc.log_evidence_se < 0.03
    outcome = smc.result.outcome
    each = np.stack(
        [np.exp(w) @ functions(x) for x, w in zip(outcome.x_0, outcome.log_weights, strict=True)]
    )
    z_hat = np.exp(outcome.log_evidences - smc.log_evidence)[:, None]
    found = (z_hat * each).mean(0)
    se_found = (z_hat * (each - found)).std(0, ddof=1) / math.sqrt(runs)
    assert (np.abs(found - mean) < 4 * np.hypot(se, se_found)).all()


# Runs side by side

NARROW = schedules.log_snr_linear(20, beta_1=0.01, alpha_bar_T=1e-3)


def in_a_plate(prior, size):
    """Entries of a plate, each with a measurement of its own."""

    def program(y, shift):
        with numpyro.plate("run", size):
            numpyro.sample("y", dist.Normal(prior()[..., 0], 0.4), obs=y)
            numpyro.factor("shift", jnp.broadcast_to(shift, (size,)))

    return program


@pytest.mark.long
def test_an_entry_of_a_large_plate_is_the_run_without_it(x64):
    prior = standard_normal(NARROW).prior({}, variance=0.3)

    def alone(y, shift):
        numpyro.sample("y", dist.Normal(prior()[..., 0], 0.4), obs=y)
        numpyro.factor("shift", shift)

    key, y = jax.random.key(5), np.linspace(-2, 2, 64)
    options = {"num_particles": 32, "num_runs": 2}
    together, single = infer.SMC(in_a_plate(prior, 64), **options), infer.SMC(alone, **options)
    together.run(key, y, np.float64(0.0))
    draws, log_w = together.get_weighted_samples()
    for i in range(64):
        single.run(jax.random.fold_in(key, i), np.asarray(y[i]), np.float64(0.0))
        one, log_w_one = single.get_weighted_samples()
        np.testing.assert_allclose(draws["x_0"][:, i], one["x_0"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(log_w[:, i], log_w_one, rtol=0, atol=1e-9)
        assert together.log_evidence[i] == pytest.approx(single.log_evidence, abs=1e-9)


@functools.cache
def narrow():
    """One diffusion for all small runs: what differs in data or width is compiled once."""
    return standard_normal(NARROW)


def small_runs(size, num_particles, shift=0.0, *, width=0.3, seed=6):
    """Independent small runs at y = 1 under a twist whose width is wrong."""
    prior = narrow().prior({}, variance=width)
    smc = infer.SMC(in_a_plate(prior, size), num_particles=num_particles, num_runs=1)
    smc.run(jax.random.key(seed), np.ones(size, np.float32), np.float32(shift))
    return smc


@pytest.mark.long
def test_evidence_has_no_bias_however_few_the_particles():
    n = 2_000
    ratio = np.exp(small_runs(n, 16).log_evidence - stats.norm.logpdf(1, 0, math.sqrt(1.16)))
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(n)
    assert ratio.std() > 0.05  # there is something to average


@pytest.mark.long
def test_a_constant_factor_shifts_the_evidence():
    before, after = (small_runs(4, 64, shift).log_evidence for shift in (0.0, 7.5))
    np.testing.assert_allclose(after - before, 7.5, rtol=0, atol=1e-4)


@pytest.mark.long
def test_squared_error_of_the_mean_falls_as_one_over_the_particles():
    numbers, errors = np.array([64, 256, 1024, 4096]), []
    for n in numbers:
        draws, log_w = small_runs(200, int(n), width=0.6, seed=7).get_weighted_samples()
        means = (np.exp(log_w) * draws["x_0"][..., 0]).sum(0)
        errors.append(((means - 1 / 1.16) ** 2).mean())
    slope = np.polyfit(np.log(numbers), np.log(errors), 1)[0]
    assert slope == pytest.approx(-1, abs=0.2)
