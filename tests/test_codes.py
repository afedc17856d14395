"""A code z of x_0 as one more latent of the program: the diffusion is told z by its context."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import MCMC, NUTS, SVI

from probdiff import (
    AbsorbingKernel,
    BernoulliKernel,
    CategoricalKernel,
    Diffusion,
    GaussianKernel,
    SampledTimeELBO,
    diagnostics,
    fit,
    infer,
    readouts,
    schedules,
    track_kl,
)

pytestmark = pytest.mark.filterwarnings("ignore::probdiff.diagnostics.LadderWarning")
KEY = jax.random.key(0)
LOADINGS = np.array([[1.0, 0.4], [-0.5, 0.8], [0.3, 1.2]])
CENTRE, NOISE = np.array([0.5, -0.2, 1.0]), np.array([0.5, 0.7, 0.6])


def linear_diffusion(T=6):
    """Exact kernels of x_0 | z ~ N(CENTRE + LOADINGS z, NOISE²) on rates that end in noise.

    On the scale of the diffusion x_0 is N(μ, 1) given z, so that x_s given x_t has variance β_t and
    E[x_0 | x_t, z] = √ᾱ_t x_t + (1 − ᾱ_t) μ.
    """
    beta = schedules.harmonic(T)
    table = schedules.steps(beta)

    def network(x_t, t, context):
        step = table.at(t, 1)
        mean = context @ LOADINGS.T / NOISE
        return jnp.sqrt(step.alpha_bar_t) * x_t + step.noise_t * mean

    return Diffusion(
        GaussianKernel(),
        beta,
        network,
        event_shape=(3,),
        readout=readouts.Data(readouts.ForwardVariance()),
        last_step=readouts.Learned(),
        loc=CENTRE,
        scale=NOISE,
        context_shape=(2,),
    )


def marginal(x):
    """log p(x_0), z integrated out."""
    covariance = LOADINGS @ LOADINGS.T + np.diag(NOISE**2)
    return np.asarray(dist.MultivariateNormal(CENTRE, covariance).log_prob(x))


PRECISION = np.eye(2) + LOADINGS.T @ np.diag(NOISE**-2) @ LOADINGS
COVARIANCE = np.linalg.inv(PRECISION)


def posterior_mean(x):
    """E[z | x_0]; the covariance is COVARIANCE."""
    return ((x - CENTRE) / NOISE**2) @ LOADINGS @ COVARIANCE


def pair_of(diffusion, encoder, size=2):
    """Model and guide of a diffusion that is told a code."""

    def model(x=None):
        with numpyro.plate("data", 1 if x is None else len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
            return diffusion.reverse(x, context=z)

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", encoder(x))
            diffusion.forward(x)

    return model, guide


def linear_pair(shift=0.0, widen=1.0, T=6):
    scale_tril = widen * np.linalg.cholesky(COVARIANCE)

    def encoder(x):
        mean = posterior_mean(x) + shift
        return dist.MultivariateNormal(mean, scale_tril=jnp.asarray(scale_tril))

    return pair_of(linear_diffusion(T), encoder)


def rows(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 3)) * 1.2 + 0.2


@pytest.mark.usefixtures("x64")
@pytest.mark.long
def test_log_weight_with_the_exact_encoder_is_the_log_density_for_every_draw():
    x = rows(5)
    tree = diagnostics.ladder(KEY, linear_pair(), {}, x, sizes=(1, 2), num_repeats=4, num_draws=2)
    group, exact = tree["ladder"], marginal(x)
    np.testing.assert_allclose(group["importance"][:, 0], exact, atol=1e-6)
    assert np.abs(group["importance_se"]).max() < 1e-6  # hence each of the eight draws


@pytest.mark.usefixtures("x64")
@pytest.mark.long
def test_bound_under_a_wrong_encoder_is_low_by_its_divergence():
    x, shift, widen = rows(20), np.array([0.2, -0.1]), 1.3
    group = diagnostics.bound(KEY, linear_pair(shift, widen), {}, x, num_draws=400)["bound"]
    p = dist.MultivariateNormal(jnp.zeros(2), COVARIANCE)
    q = dist.MultivariateNormal(shift, widen**2 * COVARIANCE)
    divergence = float(dist.kl_divergence(q, p))
    assert divergence > 0.1
    gap, se = group["bound"].values - (marginal(x) - divergence), group["bound_se"].values
    assert (np.abs(gap) < 5 * se).all() and abs(gap.mean()) < 4 * np.sqrt(np.mean(se**2) / 20)
    mean = posterior_mean(x) + shift
    rate = dist.kl_divergence(
        dist.MultivariateNormal(mean, widen**2 * COVARIANCE),
        dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2)),
    )
    assert abs(float((group["kl_z"].values - rate).mean())) < 0.05  # of 400 draws a row


def draw_and_weigh(model, guide, key, *data):
    """A draw of the code, and log p(x_0, u) − log q(u | x_0) of all latents u, row by row."""
    found = numpyro.handlers.trace(numpyro.handlers.seed(guide, key)).get_trace(*data)
    sites = numpyro.handlers.replay(numpyro.handlers.seed(model, key), found)
    sites = numpyro.handlers.trace(sites).get_trace(*data)
    log_p, log_q = (
        sum(s["fn"].log_prob(s["value"]) for s in of.values() if s["type"] == "sample")
        for of in (sites, found)
    )
    return found["z"]["value"], log_p - log_q


@pytest.mark.usefixtures("x64")
def test_weight_of_a_code_from_the_exact_encoder_is_the_density():
    x = rows(5)
    draw = jax.jit(lambda key: draw_and_weigh(*linear_pair(), key, x))
    for seed in range(4):
        z, log_w = draw(jax.random.key(seed))
        np.testing.assert_allclose(log_w, marginal(x), atol=1e-6)
        assert np.std(np.asarray(z)) > 0.1


@pytest.mark.usefixtures("x64")
@pytest.mark.long
def test_an_encoder_that_is_told_what_is_missing_keeps_the_density_of_the_rest_exact():
    """Entries that are NaN, in guide and model, where the encoder is exact given the others."""
    x, seen = rows(6), np.random.default_rng(1).random((6, 3)) < 0.6
    x[~seen] = np.nan
    diffusion = linear_diffusion()

    def model(x, seen):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            diffusion.reverse(x, context=z, mask=seen)

    def guide(x, seen):
        weight = seen / NOISE**2
        precision = jnp.eye(2) + jnp.einsum("ni,ij,ik->njk", weight, LOADINGS, LOADINGS)
        covariance = jnp.linalg.inv(precision)
        centred = weight * jnp.where(seen, x - CENTRE, 0)
        mean = jnp.einsum("nij,nj->ni", covariance, centred @ LOADINGS)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.MultivariateNormal(mean, covariance))
            diffusion.forward(x, mask=seen)

    covariance = LOADINGS @ LOADINGS.T + np.diag(NOISE**2)
    exact = [
        dist.MultivariateNormal(CENTRE[s], covariance[np.ix_(s, s)]).log_prob(row[s])
        if s.any() else 0.0
        for row, s in zip(x, seen, strict=True)
    ]  # fmt: skip
    _, log_w = jax.jit(lambda key: draw_and_weigh(model, guide, key, x, seen))(KEY)
    np.testing.assert_allclose(log_w, exact, atol=1e-6)


SLOPES, LEVELS = np.array([1.5, -0.7, 0.4]), np.array([0.2, -0.4, 0.9])
KERNELS = [BernoulliKernel(0.3), CategoricalKernel(3), AbsorbingKernel(3)]


def logits_of(kernel, z):
    """log p(x_0 = j | z) of three symbols, states on the last axis."""
    slopes = jnp.asarray(SLOPES)[:, None] * jnp.arange(kernel.num_data_states)
    return jax.nn.log_softmax(z[..., None] * slopes + jnp.asarray(LEVELS)[:, None] * slopes**2)


def symbol_diffusion(kernel, T=5):
    """Exact kernels of three symbols, independent given z: p(x_0 | x_t, z) by Bayes' rule."""
    beta = schedules.harmonic(T)
    table = schedules.steps(beta)

    def network(x_t, t, context):
        states = [jnp.full_like(x_t, j) for j in range(kernel.num_data_states)]
        seen = [kernel.marginal(x_0, table.at(t, 1)).log_prob(x_t) for x_0 in states]
        log_p = logits_of(kernel, context) + jnp.stack(seen, -1)
        if isinstance(kernel, BernoulliKernel):
            return log_p[..., 1] - log_p[..., 0]
        return jnp.concatenate(jnp.moveaxis(log_p, -1, 0), -1)

    return Diffusion(
        kernel,
        beta,
        network,
        event_shape=(3,),
        readout=readouts.DataLogits(),
        last_step=readouts.Learned(),
        context_shape=(1,),
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_log_weight_of_symbols_given_a_code_is_exact_for_every_draw(kernel):
    """log w = log p(x_0 | z) + log p(z) − log q(z | x_0), whatever trajectory was drawn."""
    law = dist.Normal(jnp.array([0.4]), 0.8).to_event(1)
    model, guide = pair_of(symbol_diffusion(kernel), lambda x: law, size=1)
    x = np.array([[0, 1, 1], [1, 0, 0]]) * (kernel.num_data_states - 1)

    draw = jax.jit(lambda key: draw_and_weigh(model, guide, key, x))
    for seed in range(4):
        z, log_w = draw(jax.random.key(seed))
        log_p = jnp.take_along_axis(logits_of(kernel, z), jnp.asarray(x)[..., None], -1)
        prior = dist.Normal(0.0, 1.0).log_prob(z[:, 0])
        exact = log_p[..., 0].sum(-1) + prior - law.log_prob(z)
        np.testing.assert_allclose(log_w, exact, atol=1e-6)


def posterior_given(known, y, sd):
    """Mean and sd of z and the last entry of x_0, its others known, the last seen with noise."""
    joint = np.zeros((6, 6))  # z, x_0, y
    joint[:2, :2], joint[:2, 2:5] = np.eye(2), LOADINGS.T
    joint[2:5, :2], joint[2:5, 2:5] = LOADINGS, LOADINGS @ LOADINGS.T + np.diag(NOISE**2)
    joint[5, :5], joint[:5, 5], joint[5, 5] = joint[4, :5], joint[:5, 4], joint[4, 4] + sd**2
    mean, seen, hidden = np.r_[0, 0, CENTRE, CENTRE[2]], [2, 3, 5], [0, 1, 4]
    gain = joint[np.ix_(hidden, seen)] @ np.linalg.inv(joint[np.ix_(seen, seen)])
    rest = joint[np.ix_(hidden, hidden)] - gain @ joint[np.ix_(seen, hidden)]
    return mean[hidden] + gain @ (np.r_[known, y] - mean[seen]), np.sqrt(np.diag(rest))


def conditioned(y, T=4):
    """Two entries of x_0 known, the third seen with noise; z and it are to be inferred."""
    z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    known, mask = jnp.array([1.2, -0.5, 0.0]), np.array([True, True, False])
    x_0 = linear_diffusion(T).prior({})(context=z, known=known, mask=mask)
    numpyro.sample("y", dist.Normal(x_0[2], 0.5), obs=y)


@pytest.mark.long
@pytest.mark.parametrize("over", [infer.forward_coordinates, infer.noncentered])
def test_pixels_give_a_posterior_over_code_and_the_rest(over):
    mcmc = MCMC(NUTS(over(conditioned)), num_warmup=500, num_samples=4000, progress_bar=False)
    mcmc.run(KEY, 1.0)
    draws = mcmc.get_samples()
    found = np.column_stack([draws["z"], draws["x_0"][:, 2]])
    mean, sd = posterior_given([1.2, -0.5], 1.0, 0.5)
    np.testing.assert_allclose(found.mean(0), mean, atol=0.06)  # 4 standard errors of 1000 draws
    np.testing.assert_allclose(found.std(0), sd, rtol=0.1)
    assert (draws["x_0"][:, :2] == np.array([1.2, -0.5], np.float32)).all()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::probdiff.infer.InferenceWarning")
def test_particles_weigh_codes_by_the_evidence_of_the_pixels():
    """Codes in a plate, drawn from p(z), each with the evidence of its own prior."""
    codes = jax.random.normal(KEY, (2000, 2))
    prior = linear_diffusion().prior({}, variance=3.0)

    def program(z, y):
        with numpyro.plate("codes", len(z)):
            known = jnp.broadcast_to(jnp.array([1.2, -0.5, 0.0]), (len(z), 3))
            mask = np.broadcast_to([True, True, False], (len(z), 3))
            x_0 = prior(context=z, known=known, mask=mask)
            numpyro.sample("y", dist.Normal(x_0[:, 2], 0.5), obs=y)

    smc = infer.SMC(program, num_particles=32, num_runs=2)
    smc.run(KEY, codes, jnp.ones(2000))
    weights = np.exp(smc.log_evidence - smc.log_evidence.max())
    weights /= weights.sum()
    mean, sd = posterior_given([1.2, -0.5], 1.0, 0.5)
    ess = 1 / np.sum(weights**2)
    assert (np.abs(weights @ np.asarray(codes) - mean[:2]) < 4 * sd[:2] / np.sqrt(ess)).all()


def test_particles_alone_refuse_a_context_that_is_to_be_inferred():
    with pytest.raises(ValueError, match=r"latent site 'z' must have a value.* context .*NUTS"):
        infer.SMC(conditioned, num_particles=4).run(KEY, 1.0)
    gibbs = infer.ParticleGibbs(conditioned, num_particles=4, num_chains=2)
    with pytest.raises(ValueError, match=r"must not depend on other latent sites, \['z'\].*NUTS"):
        gibbs.run(KEY, 1.0)


def weighed_fit(**options):
    """Two steps of `fit` that hold a pair's parameters, with held-out losses."""
    diffusion = linear_diffusion(T=3)

    def encoder(x):
        shift = numpyro.param("shift", jnp.zeros(2))
        law = dist.MultivariateNormal(posterior_mean(x) + shift, COVARIANCE)
        return law

    model, guide = pair_of(diffusion, encoder)
    svi = SVI(model, track_kl(guide), optax.sgd(0.0), SampledTimeELBO(**options))
    x = jnp.asarray(rows(64), jnp.float32)
    key = jax.random.key(2)
    return fit(key, svi, x, num_steps=2, batch_size=16, held_out=x, progress=False)


@pytest.mark.filterwarnings("ignore:x_0 has second moment")
def test_held_out_data_are_judged_by_the_true_bound():
    plain = weighed_fit()
    weighed = weighed_fit(kl_weight=0.1, free_bits=1.0, warm_up=10)
    np.testing.assert_array_equal(weighed.held_out_losses.loss, plain.held_out_losses.loss)
    assert abs(weighed.losses[0] - plain.losses[0]) > 1
