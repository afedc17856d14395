"""The probability flow against laws that are known, by their exact denoisers."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS
from scipy import stats

from probdiff import (
    BernoulliKernel,
    Diffusion,
    GaussianKernel,
    diagnostics,
    flow,
    infer,
    readouts,
    schedules,
    standard_diffusion,
)

MEANS, VARIANCE = np.array([[1.0, 0.5], [-1.0, -0.5]]), 0.09
"""Of the mixture, on the scale of the diffusion; its weights are the context, or 0.7 and 0.3."""
DATA = readouts.Data(readouts.BridgeVariance())


def noises(log_snr):
    """ᾱ and 1 − ᾱ of each row."""
    return jax.nn.sigmoid(log_snr)[:, None], jax.nn.sigmoid(-log_snr)[:, None]


def denoise_mixture(x_t, log_snr, weights=(0.7, 0.3)):
    """E[x_0 | x_t] of two Gaussians."""
    left, noise = noises(log_snr)
    apart, total = x_t[:, None] - jnp.sqrt(left)[..., None] * MEANS, left * VARIANCE + noise
    log_k = jnp.log(jnp.asarray(weights)) - 0.5 * (apart**2).sum(-1) / total
    x_k = MEANS + (jnp.sqrt(left) * VARIANCE / total)[..., None] * apart
    return jnp.sum(jax.nn.softmax(log_k)[..., None] * x_k, 1)


denoise_mixture.takes_log_snr = True


def mixture(T=50, beta_1=1e-6, network=denoise_mixture, **options):
    beta = schedules.log_snr_linear(T, beta_1=beta_1, alpha_bar_T=1e-8)
    options = {"readout": DATA, "loc": 3.0, "scale": 2.0} | options
    return Diffusion(GaussianKernel(), beta, network, event_shape=(2,), **options)


def log_mixture(x, weights=(0.7, 0.3), loc=3.0, scale=2.0):
    """Log density of the mixture in the user's units, float64."""
    z = (np.asarray(x, np.float64) - loc) / scale
    square = ((z[:, None] - MEANS) ** 2).sum(-1)
    parts = np.log(weights) - 0.5 * square / VARIANCE - np.log(2 * np.pi * VARIANCE)
    return np.logaddexp(*parts.T) - 2 * np.log(scale)


def draw_mixture(n, weights=(0.7, 0.3), loc=3.0, scale=2.0, seed=0):
    rng = np.random.default_rng(seed)
    k = (rng.random(n) >= np.asarray(weights)[..., 0]).astype(int)
    return loc + scale * (MEANS[k] + VARIANCE**0.5 * rng.normal(size=(n, 2)))


def gaussian(d, seed=0):
    """N(0, Σ) with Σ of variances ¼..2 along random axes, and its diffusion."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(d, d)))[0]
    variances = np.geomspace(0.25, 2.0, d)

    def network(x_t, log_snr):
        left, noise = noises(log_snr)
        gain = jnp.sqrt(left) * variances / (left * variances + noise)
        return (gain * (x_t @ axes)) @ axes.T

    network.takes_log_snr = True
    beta = schedules.log_snr_linear(50, beta_1=1e-6, alpha_bar_T=1e-8)
    diffusion = Diffusion(GaussianKernel(), beta, network, event_shape=(d,), readout=DATA)
    law = stats.multivariate_normal(np.zeros(d), (axes * variances) @ axes.T)
    return diffusion, law


def test_log_density_is_that_of_the_data_in_units_contexts_and_far_from_zero(key):
    """Weights differ by example; loc = 1e6 is held in float64 until it is taken off."""
    pytest.importorskip("diffrax")
    weights = np.random.default_rng(1).dirichlet((2.0, 2.0), 60)
    x = draw_mixture(60, weights, loc=1e6)
    diffusion = mixture(loc=1e6, context_shape=(2,))
    tree = diagnostics.flow_density(key, diffusion, {}, x, context=weights, block_size=60)
    group = tree["flow"]
    exact = log_mixture(x, weights, loc=1e6)
    assert np.abs(group["log_density"].values - exact).max() < 1e-3
    assert (group["log_density_se"].values == 0).all()
    assert 50 < group["evaluations"].values.min() and group["evaluations"].values.max() < 500
    attrs = group.attrs
    assert attrs["reference_measure"] == "Lebesgue, in the user's units" and "T" not in attrs
    np.testing.assert_allclose(attrs["mean"], exact.mean(), atol=3e-4)


def test_hutchinson_is_unbiased_and_its_error_covers(key):
    """1000 repeats of one example with 16 probes of 8 numbers, intervals of Student's t at 95 %."""
    pytest.importorskip("diffrax")
    diffusion, law = gaussian(8)
    x = np.tile(law.rvs(random_state=0), (1000, 1)).astype(np.float32)
    group = diagnostics.flow_density(
        key, diffusion, {}, x, probes=16, rtol=1e-4, atol=1e-4, block_size=1000
    )["flow"]
    value, se = group["log_density"].values, group["log_density_se"].values
    error = value - law.logpdf(x[0])
    assert abs(error.mean()) < 3 * error.std() / 1000**0.5 + 1e-3
    assert abs(np.sqrt(np.mean(se**2)) / error.std() - 1) < 0.1
    covered = np.mean(np.abs(error) < stats.t.ppf(0.975, 15) * se)
    assert 0.93 < covered < 0.97


def test_draws_have_the_law_of_the_data_and_evaluations_are_counted(key):
    """2000 draws; points asked for are counted by a callback of the network."""
    pytest.importorskip("diffrax")
    count = [0]

    def counted(x_t, log_snr):
        jax.debug.callback(lambda: count.__setitem__(0, count[0] + 1))
        return denoise_mixture(x_t, log_snr)

    counted.takes_log_snr = True
    diffusion = mixture()
    x = flow.Flow(diffusion, {}, rtol=1e-4, atol=1e-4).sample(key, (2000,))
    assert x.shape == (2000, 2)
    share = np.mean(np.asarray(x[:, 0]) > 3)
    assert abs(share - 0.7) < 4 * np.sqrt(0.21 / 2000)
    z = (np.asarray(x)[x[:, 0] > 3] - 3) / 2 - MEANS[0]
    for i in range(2):
        assert stats.kstest(z[:, i], "norm", (0, VARIANCE**0.5)).pvalue > 1e-3
    x_0 = draw_mixture(1).astype(np.float32)
    group = diagnostics.flow_density(key, mixture(network=counted), {}, x_0)["flow"]
    jax.effects_barrier()
    assert group["evaluations"].values.tolist() == count


def bounds_and_flow(steps, num_draws):
    """Bound at each T and the flow's log density, of 200 draws of the mixture."""
    key, x = jax.random.key(0), draw_mixture(200).astype(np.float32)
    found = {"flow": diagnostics.flow_density(key, mixture(beta_1=1e-4), {}, x)}
    for T in steps:
        diffusion = mixture(T, 1e-4, last_step=readouts.Learned())
        found[f"T = {T}"] = diagnostics.bound(key, diffusion, {}, x, num_draws=num_draws)
    return found


@pytest.mark.long
def test_the_diffusion_of_t_steps_tends_to_the_flow():
    """The bound of the exact denoiser lies below by an error of order 1/T, paired by example."""
    pytest.importorskip("diffrax")
    steps = (100, 400, 1600)
    found = bounds_and_flow(steps, num_draws=20)
    group = diagnostics.compare(found)["comparison"]
    assert group.attrs["best"] == "flow" and "no bound" in group.attrs["note"]
    gap = [-float(group["difference"].sel(model=f"T = {T}")) for T in steps]
    se = [float(group["difference_se"].sel(model=f"T = {T}")) for T in steps]
    for i in (0, 1):
        ratio, error = gap[i] / gap[i + 1], np.hypot(se[i] / gap[i], se[i + 1] / gap[i + 1])
        assert abs(ratio / 4 - 1) < 3 * error + 0.1
    assert gap[-1] < 0.1


@pytest.mark.long
def test_the_gradient_is_the_score(key):
    """By NumPyro's validated site, within a plate."""
    pytest.importorskip("diffrax")
    x = draw_mixture(20).astype(np.float32)

    def model(x):
        with numpyro.plate("rows", 20):
            numpyro.sample("x", flow.Flow(mixture(), {}), obs=x)

    def log_joint(x):
        return numpyro.infer.util.log_density(model, (x,), {}, {})[0]

    value, gradient = jax.jit(jax.value_and_grad(log_joint))(x)
    assert abs(float(value) - log_mixture(x).sum()) < 1e-3 * 20
    width = 1e-4
    for i in range(2):
        shift = np.eye(2)[i] * width
        exact = (log_mixture(x + shift) - log_mixture(x - shift)) / (2 * width)
        np.testing.assert_allclose(gradient[:, i], exact, atol=3e-3)


def posterior(y, noise):
    """Mean, sd and log evidence of x_0 given y = x_0 + noise ε, on a grid."""
    axis = np.linspace(-1.5, 7.5, 600)
    x = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    log_joint = log_mixture(x) + stats.norm(x, noise).logpdf(y).sum(1)
    log_evidence = np.logaddexp.reduce(log_joint) + 2 * np.log(axis[1] - axis[0])
    weight = np.exp(log_joint - np.logaddexp.reduce(log_joint))
    mean = weight @ x
    return mean, np.sqrt(weight @ (x - mean) ** 2), log_evidence


def moments(x, mean):
    """x and its squared distance from the exact mean, whose averages are mean and variance."""
    return np.concatenate([x, (x - mean) ** 2], -1)


@pytest.mark.long
def test_nuts_below_the_flow_and_smc_below_the_diffusion_agree(key):
    """y = x_0 + ε with both modes in reach, by 4 chains and by 16 runs at 1000 and 2000 steps.

    Mean and variance within 3 standard errors of quadrature, the evidence of SMC too.
    """
    pytest.importorskip("diffrax")
    y, noise = np.array([3.4, 3.0]), 1.5
    mean, sd, log_evidence = posterior(y, noise)
    exact = np.concatenate([mean, sd**2])

    def program(prior, y):
        numpyro.sample("y", dist.Normal(prior(), noise).to_event(1), obs=y)

    law = flow.Flow(mixture(), {}, rtol=1e-4, atol=1e-4)
    nuts = MCMC(
        NUTS(lambda y: program(lambda: numpyro.sample("x_0", law), y)),
        num_warmup=300, num_samples=600, num_chains=4, chain_method="vectorized",
        progress_bar=False,
    )  # fmt: skip
    nuts.run(key, y)
    x = moments(np.asarray(nuts.get_samples(group_by_chain=True)["x_0"], np.float64), mean)
    se = x.std((0, 1)) / np.sqrt(effective_sample_size(x))
    by_nuts = x.mean((0, 1)), se
    assert np.all(np.abs(x.mean((0, 1)) - exact) < 3 * se)
    for T in (1000, 2000):
        prior = mixture(T, 1e-5, last_step=readouts.Learned()).prior({})
        smc = infer.SMC(lambda y, prior=prior: program(prior, y), num_particles=1000, num_runs=16)
        smc.run(key, y)
        sites, log_w = smc.get_weighted_samples()
        w = np.exp(log_w).reshape(16, -1, 1)
        runs = np.sum(w * moments(sites["x_0"].reshape(16, -1, 2), mean), 1) / w.sum(1)
        se = runs.std(0, ddof=1) / 4
        assert np.all(np.abs(runs.mean(0) - exact) < 3 * se), T
        assert np.all(np.abs(runs.mean(0) - by_nuts[0]) < 3 * np.hypot(se, by_nuts[1])), T
        low, high = smc.log_evidence_interval(0.997)
        assert low < log_evidence < high, T


# what has no flow


def test_without_the_extra_it_is_named(key, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    law, x = flow.Flow(mixture(), {}), np.ones((3, 2), np.float32)
    for call in (
        lambda: law.log_prob(x),
        lambda: law.sample(key),
        lambda: diagnostics.flow_density(key, mixture(), {}, x),
    ):
        with pytest.raises(ImportError, match=r"pip install 'probdiff\[flow\]'"):
            call()


def told_t(x_t, t):
    return 0 * x_t


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: standard_diffusion(kernel=BernoulliKernel()), "must be of numbers to have a flow"),
        (
            lambda: mixture(last_step=readouts.Discretised(0, 5, 6)),
            "numbers on a grid have masses",
        ),
        (lambda: mixture(network=told_t), "network that takes the log-SNR.*got function"),
        (
            lambda: mixture(readout=readouts.Perturbation(readouts.ForwardVariance())),
            "x_t and the log-SNR alone.*Perturbation",
        ),
    ],
)
def test_what_has_no_flow_is_refused_by_name(key, make, message):
    diffusion = make()
    x = np.ones((2, *diffusion.event_shape), np.float32)
    for call in (
        lambda: flow.Flow(diffusion, {}),
        lambda: diagnostics.flow_density(key, diffusion, {}, x),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("readout", [readouts.Epsilon, readouts.Velocity, readouts.Score])
def test_readouts_of_a_point_need_no_step(readout):
    diffusion = mixture(readout=readout(readouts.BridgeVariance()))
    assert not flow.needs_step(diffusion)
    assert flow.check_flows(diffusion) is None
    assert flow.needs_step(mixture(readout=readouts.Perturbation(readouts.BridgeVariance())))


def test_arguments_that_do_not_fit_a_flow_are_refused(key):
    law = "probes must be left out of a distribution: Hutchinson"
    with pytest.raises(ValueError, match=law):
        flow.Flow(mixture(), {}, probes=10)
    for options, message in (
        ({"probes": 1}, "probes must be at least 2; got 1"),
        ({"rtol": 0.0}, re.escape("rtol must lie in [1e-12, 0.1]; got 0.0")),
        ({"context": np.ones((3, 2))}, "context must be given exactly where"),
    ):
        with pytest.raises(ValueError, match=message):
            diagnostics.flow_density(key, mixture(), {}, np.ones((3, 2), np.float32), **options)


def test_a_network_told_the_log_snr_is_bound_with_a_float():
    """A function of no weights is looked at as it is bound, which once gave it an integer."""
    assert mixture().bind({}).x_0_hat(jnp.zeros(2), 1).shape == (2,)
