"""The programs against densities known exactly: pairing, plates, masks, units, golden numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.infer.elbo as stock_elbo
import optax
import pytest
from flax import nnx
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.util import log_density

import reference
from oracles import exact_gaussian, log_normal
from probdiff import (
    Diffusion,
    GaussianKernel,
    SampledTimeELBO,
    diagnostics,
    fit,
    networks,
    readouts,
    schedules,
)
from probdiff.trajectories import ForwardTrajectory

MEAN, SD = np.array([0.3, -0.5, 0.1]), np.array([0.9, 0.6, 0.8])


@pytest.fixture
def x(x64):
    """Seven rows of data, float64."""
    return MEAN + SD * jax.random.normal(jax.random.key(7), (7, 3))


def elbo(model, guide, *args, key=0, **kwargs):
    """One draw of `Trace_ELBO`: for these models, no longer random."""
    run = jax.jit(lambda k, a, kw: -Trace_ELBO().loss(k, {}, model, guide, *a, **kw))
    return float(run(jax.random.key(key), args, kwargs))


def test_elbo_of_the_exact_diffusion_is_the_log_density_of_every_draw(x):
    diffusion = exact_gaussian(MEAN, SD)
    expected = float(log_normal(x, MEAN, SD).sum())
    for key in range(3):
        assert elbo(diffusion.model, diffusion.guide, x, key=key) == pytest.approx(
            expected, abs=1e-9
        )


def test_per_step_pair_gives_the_same_elbo(x):
    diffusion = exact_gaussian(MEAN, SD, T=6)
    value = elbo(diffusion.model_by_step, diffusion.guide_by_step, x)
    assert value == pytest.approx(float(log_normal(x, MEAN, SD).sum()), abs=1e-9)


def test_units_of_the_user_carry_the_jacobian(x):
    loc, scale = np.array([5.0, -2.0, 0.0]), np.array([3.0, 0.1, 7.0])
    diffusion = exact_gaussian(MEAN, SD, loc=loc, scale=scale)
    y = loc + scale * x
    expected = float(log_normal(y, loc + scale * MEAN, scale * SD).sum())
    assert elbo(diffusion.model, diffusion.guide, y) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("shape", [(), (1, 3), (3, 1, 1)])
def test_events_of_any_rank_are_summed_alike(x, shape):
    diffusion = exact_gaussian(np.full(shape, 0.2), np.full(shape, 0.7))
    data = x[:, 0] if shape == () else x.reshape(7, *shape)
    value = elbo(diffusion.model, diffusion.guide, data)
    assert value == pytest.approx(float(log_normal(data, 0.2, 0.7).sum()), abs=1e-9)


def test_missing_entries_leave_the_density_of_the_observed(x):
    mask = np.array(jax.random.bernoulli(jax.random.key(1), 0.6, x.shape))
    data = jnp.where(mask, x, jnp.nan)
    diffusion = exact_gaussian(MEAN, SD)
    expected = log_normal(np.asarray(x), MEAN, SD)[mask].sum()
    for key in range(3):
        value = elbo(diffusion.model, diffusion.guide, data, mask=mask, key=key)
        assert value == pytest.approx(expected, abs=1e-9)


def test_masked_plate_counts_only_what_is_kept(x):
    diffusion = exact_gaussian(MEAN, SD)
    keep = jnp.arange(7) % 2 == 0
    model, guide = (numpyro.handlers.mask(p, mask=keep) for p in (diffusion.model, diffusion.guide))
    expected = log_normal(np.asarray(x), MEAN, SD)[::2].sum()
    assert elbo(model, guide, x) == pytest.approx(expected, abs=1e-9)


def test_nested_plates_sum_over_all_cells(x):
    diffusion = exact_gaussian(MEAN, SD)
    data = jnp.stack([x, x + 0.1, x - 0.2])  # (3 groups, 7 rows, 3)

    def plates(statement):
        def program(data):
            with numpyro.plate("group", 3, dim=-2), numpyro.plate("row", 7, dim=-1):
                statement(data)

        return program

    value = elbo(plates(diffusion.reverse), plates(diffusion.forward), data)
    assert value == pytest.approx(float(log_normal(data, MEAN, SD).sum()), abs=1e-9)


@pytest.mark.long
def test_subsampled_plate_scales_to_the_whole(x):
    diffusion = exact_gaussian(MEAN, SD)

    def program(statement):
        def run(data):
            with numpyro.plate("row", 7, subsample_size=2):
                statement(numpyro.subsample(data, event_dim=1))

        return run

    model, guide = program(diffusion.reverse), program(diffusion.forward)
    rows = log_normal(np.asarray(x), MEAN, SD).sum(1)
    pairs = (rows[:, None] + rows[None]) * 7 / 2
    draws = [float(elbo(model, guide, x, key=key)) for key in range(12)]
    for value in draws:
        assert np.min(np.abs(pairs - value)) < 1e-9
    assert np.ptp(draws) > 0.1


def test_scale_handler_multiplies(x):
    diffusion = exact_gaussian(MEAN, SD)
    model, guide = (
        numpyro.handlers.scale(p, scale=2.5) for p in (diffusion.model, diffusion.guide)
    )
    expected = 2.5 * float(log_normal(x, MEAN, SD).sum())
    assert elbo(model, guide, x) == pytest.approx(expected, abs=1e-9)


def test_two_models_in_one_program_keep_their_densities(x):
    one = exact_gaussian(MEAN, SD, name="left")
    two = exact_gaussian(MEAN + 1, SD / 2, T=9, name="right")

    def pair(statement):
        def program(a, b):
            with numpyro.plate("row", 7):
                getattr(one, statement)(a)
                getattr(two, statement)(b)

        return program

    y = 1 + MEAN + (x - MEAN) / 2
    expected = float(log_normal(x, MEAN, SD).sum() + log_normal(y, MEAN + 1, SD / 2).sum())
    assert elbo(pair("reverse"), pair("forward"), x, y) == pytest.approx(expected, abs=1e-9)


@pytest.mark.long
def test_latent_code_and_diffusion_give_the_evidence(x):
    """z ~ exact diffusion, y ~ N(z, σ²): with the exact guide for z the ELBO is log p(y)."""
    diffusion = exact_gaussian(MEAN, SD, name="z")
    sigma = 0.5

    def model(y):
        with numpyro.plate("row", 7):
            z = diffusion.reverse()
            numpyro.sample("y", numpyro.distributions.Normal(z, sigma).to_event(1), obs=y)

    def guide(y):
        variance = 1 / (1 / SD**2 + 1 / sigma**2)
        mean = variance * (MEAN / SD**2 + y / sigma**2)
        with numpyro.plate("row", 7):
            q = numpyro.distributions.Normal(mean, np.sqrt(variance)).to_event(1)
            diffusion.forward(numpyro.sample("z", q))

    expected = float(log_normal(x, MEAN, np.sqrt(SD**2 + sigma**2)).sum())
    assert elbo(model, guide, x) == pytest.approx(expected, abs=1e-9)
    losses = jax.vmap(lambda k: -SampledTimeELBO().loss(k, {}, model, guide, x))(
        jax.random.split(jax.random.key(2), 4000)
    )
    assert abs(losses.mean() - expected) < 4 * losses.std() / math.sqrt(4000)


@pytest.mark.long
def test_float64_is_kept_through_model_and_guide(x):
    diffusion = exact_gaussian(MEAN, SD)
    with numpyro.handlers.seed(rng_seed=0):
        assert diffusion.model().dtype == jnp.float64
        assert diffusion.guide(x).dtype == jnp.float64


def test_joint_density_factorises_over_sites(x):
    diffusion = exact_gaussian(MEAN, SD, T=5)
    trajectory = ForwardTrajectory.of(diffusion.bind({}), x).sample(jax.random.key(0))
    total, sites = log_density(diffusion.model, (x,), {}, {"x_0_trajectory": trajectory})
    by_hand = sites["x_0"]["fn"].log_prob(x) + sites["x_0_trajectory"]["fn"].log_prob(trajectory)
    assert float(total) == pytest.approx(float(by_hand.sum()), abs=1e-10)


@pytest.mark.long
def test_identity_holds_in_float32_at_a_thousand_steps():
    """N(0, I) data and the forward kernel run backwards: K is the log density, draw by draw."""
    diffusion = Diffusion(
        GaussianKernel(),
        schedules.linear(1000),
        lambda x_t, t: jnp.zeros_like(x_t),
        event_shape=(4,),
        readout=readouts.Perturbation(readouts.ForwardVariance()),
    )
    x = jax.random.normal(jax.random.key(0), (1, 4))
    draws = jax.vmap(lambda k: -Trace_ELBO().loss(k, {}, diffusion.model, diffusion.guide, x))(
        jax.random.split(jax.random.key(1), 200)
    )
    error = (draws - log_normal(np.asarray(x, float), 0.0, 1.0).sum()) / 4
    assert np.std(error) <= 1e-3
    assert abs(np.mean(error)) <= 1e-3


def golden_network(rho, T):
    """Optimal diagonal reverse kernels of a correlated Gaussian, as a `Perturbation` network."""
    beta = schedules.harmonic(T)
    covariance = np.array([[1, rho], [rho, 1]])
    A, C = reference.optimal_reverse_trajectory(covariance, beta, diagonal=True)
    shift = (A - np.sqrt(1 - beta)[:, None, None] * np.eye(2)) / np.sqrt(beta)[:, None, None]
    variance = np.diagonal(C, axis1=1, axis2=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        v = np.log(variance / (1 - variance)) - np.log(beta / (1 - beta))[:, None]
    v = np.where(np.isfinite(v), v, 0.0)  # beta_T = 1: x_{T-1} has variance 1 given x_T
    shift, v = jnp.asarray(shift), jnp.asarray(v)

    def network(x_t, t):
        return jnp.concatenate([jnp.einsum("bij,bj->bi", shift[t - 1], x_t), v[t - 1]], -1)

    return covariance, Diffusion(GaussianKernel(), beta, network, event_shape=(2,))


@pytest.mark.parametrize(
    ("rho", "T", "bits"),
    [
        (0.5, 10, -3.9499),
        pytest.param(0.5, 40, -3.9037, marks=pytest.mark.long),
        pytest.param(0.5, 100, -3.8936, marks=pytest.mark.long),
        pytest.param(0.5, 1000, -3.8874, marks=pytest.mark.long),
        pytest.param(0.9, 10, -3.4363, marks=pytest.mark.long),
        (0.9, 40, -3.0760),
        pytest.param(0.9, 100, -2.9736, marks=pytest.mark.long),
        (0.9, 1000, -2.9043),
    ],
)
def test_exact_diagonal_kernels_reach_the_golden_bound(rho, T, bits):
    covariance, diffusion = golden_network(rho, T)
    n = 20_000 if T < 1000 else 4_000
    key_data, key = jax.random.split(jax.random.key(T))
    law = numpyro.distributions.MultivariateNormal(jnp.zeros(2), jnp.asarray(covariance))
    x = law.sample(key_data, (n,))
    tree = diagnostics.bound(key, diffusion, {}, x)
    # log p(x_0) as control variate: its mean is known, and it carries most of the spread
    gap = (tree["bound"]["bound"].values - np.asarray(law.log_prob(x))) / math.log(2)
    entropy = 0.5 * np.linalg.slogdet(2 * math.pi * math.e * covariance)[1] / math.log(2)
    value = gap.mean() - entropy
    assert abs(value - bits) < 3 * gap.std() / math.sqrt(n) + 1e-4


@pytest.mark.long
def test_trained_perceptron_comes_within_two_hundredths_of_a_bit():
    """rho = 0.9, harmonic schedule, T = 40: the best diagonal diffusion reaches -3.0760 bits."""
    covariance = jnp.array([[1, 0.9], [0.9, 1]])
    law = numpyro.distributions.MultivariateNormal(jnp.zeros(2), covariance)
    keys = jax.random.split(jax.random.key(3), 4)
    network = networks.Perceptron((2,), 48, 2, 40, rngs=nnx.Rngs(0))
    diffusion = Diffusion(GaussianKernel(), schedules.harmonic(40), network, event_shape=(2,))
    optimiser = optax.adam(optax.cosine_decay_schedule(3e-3, 6_000))
    svi = SVI(diffusion.model, diffusion.guide, optimiser, SampledTimeELBO())
    fitted = fit(
        keys[0],
        svi,
        law.sample(keys[1], (100_000,)),
        num_steps=6_000,
        batch_size=512,
        ema_decay=0.999,
        progress=False,
    )
    x = law.sample(keys[2], (40_000,))
    tree = diagnostics.bound(keys[3], diffusion, fitted.params, x)
    gap = (tree["bound"]["bound"].values - np.asarray(law.log_prob(x))) / math.log(2)
    value = gap.mean() - 2.8962
    error = gap.std() / math.sqrt(len(gap))
    assert value > -3.0760 - 0.02 - 3 * error
    assert value < -3.0760 + 3 * error  # above the best diagonal diffusion would be a bug


@pytest.fixture(scope="module")
def imperfect():
    """A model trained a little on data of second moment 1.5, and held-out data."""
    keys = jax.random.split(jax.random.key(11), 3)
    data = math.sqrt(1.5) * jax.random.normal(keys[0], (2_000, 2)) @ jnp.array([[1, 0.6], [0, 0.8]])
    network = networks.Perceptron((2,), 24, 2, 12, rngs=nnx.Rngs(1))
    beta = schedules.log_snr_linear(12, beta_1=0.05, alpha_bar_T=0.1)
    diffusion = Diffusion(GaussianKernel(), beta, network, event_shape=(2,))
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(3e-3), SampledTimeELBO())
    result = svi.run(keys[1], 400, data[:1_000], progress_bar=False)
    return diffusion, result.params, data[1_000:1_100]


def estimate(objective, model, guide, params, x, n):
    """Mean of K per example over n keys, and its standard error, nats."""
    one = jax.jit(lambda key: -objective.loss(key, params, model, guide, x) / len(x))
    values = jax.lax.map(one, jax.random.split(jax.random.key(5), n))
    return float(values.mean()), float(values.std() / math.sqrt(n))


def test_three_routes_lead_to_one_bound(imperfect, monkeypatch):
    diffusion, params, x = imperfect
    pairs = {
        "whole trajectories": (Trace_ELBO(), diffusion.model, diffusion.guide, 2_000),
        "sampled times": (SampledTimeELBO(), diffusion.model, diffusion.guide, 20_000),
    }
    found = {name: estimate(e, m, g, params, x, n) for name, (e, m, g, n) in pairs.items()}
    routes = count_routes_of_kl(monkeypatch)
    found["closed forms"] = estimate(
        TraceMeanField_ELBO(), diffusion.model_by_step, diffusion.guide_by_step, params, x, 2_000
    )
    assert routes["closed"] == diffusion.T and routes["sampled"] == 0
    means, errors = (np.array(v) for v in zip(*found.values(), strict=True))
    for i in range(3):
        for j in range(i):
            assert abs(means[i] - means[j]) < 3 * math.hypot(errors[i], errors[j]), found


def count_routes_of_kl(monkeypatch):
    """How many sites `TraceMeanField_ELBO` scores by a closed form, and by sampling."""
    routes, original = {"closed": 0, "sampled": 0}, stock_elbo.kl_divergence

    def counting(p, q):
        try:
            value = original(p, q)
        except NotImplementedError:
            routes["sampled"] += 1
            raise
        routes["closed"] += 1
        return value

    monkeypatch.setattr(stock_elbo, "kl_divergence", counting)
    return routes


@pytest.mark.long
def test_entropy_form_needs_its_correction(imperfect):
    diffusion, params, x = imperfect
    tree = diagnostics.bound(jax.random.key(9), diffusion, params, x, num_draws=2_000)
    k = tree["bound"]
    key = jax.random.key(9)
    plain, correction = diagnostics.entropy_form(key, diffusion, params, x, k["kl"].values)
    # both share the sampled KL terms; what differs is sampled in one and closed in the other
    noise = math.sqrt(2 / 2 / 2_000 / len(x))
    assert abs(float(plain.mean() + correction.mean()) - k.attrs["mean"]) < 4 * noise
    assert abs(float(correction.mean())) > 20 * noise
    moment = float((x**2).mean())
    by_hand = reference.correction_eq14(moment, diffusion.schedule, 2)
    assert float(correction.mean()) == pytest.approx(by_hand, rel=1e-4)
