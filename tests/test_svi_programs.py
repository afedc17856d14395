"""Programs of SVI that no statement names: priors on a network's weights, a diffusion as guide."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro import handlers
from numpyro.contrib.module import random_nnx_module
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from scipy import stats

from probdiff import (
    Diffusion,
    GaussianKernel,
    SampledTimeELBO,
    diagnostics,
    infer,
    networks,
    readouts,
    schedules,
)
from probdiff.standard import standard_diffusion

BETA = schedules.log_snr_linear(T=5, beta_1=1e-3, alpha_bar_T=1e-3)
DATA = np.random.default_rng(0).normal(1.5, 0.1, (20, 2)).astype(np.float32)


class Constant(nnx.Module):
    """Says that x_0 is w, whatever x_t: x_0 ~ N(w, ·)."""

    def __init__(self, w=0.0):
        self.w = nnx.Param(jnp.full(2, w))

    def __call__(self, x_t, t):
        return self.w + 0 * x_t


def diffusion_of(network):
    readout = readouts.Data(variance=readouts.BridgeVariance())
    return Diffusion(GaussianKernel(), BETA, network, event_shape=(2,), readout=readout)


def with_weights(x, *given):
    network = random_nnx_module("net", Constant(), prior=dist.Normal(0.0, 1.0))
    diffusion_of(lambda x_t, t: network(x_t, t)).model(x)


@pytest.mark.long
def test_bound_of_weights_with_a_prior_is_that_of_their_posterior():
    """K is a parabola about the mean of the data, so the bound of a normal q(w) is known."""
    by_w = [
        diagnostics.bound(jax.random.key(0), diffusion_of(lambda x, t, w=w: w + 0 * x), {}, DATA)
        for w in (-1.0, 0.0, 1.0)
    ]
    low, middle, high = (float(t["bound"]["bound"].sum()) / 2 for t in by_w)  # by entry
    precision = 1 - (low - 2 * middle + high)
    mean, sd = DATA.mean() * (1 - 1 / precision), precision**-0.5
    outside, objective = diffusion_of(Constant()), SampledTimeELBO(2000, num_times=4)

    def guide(x, loc, scale):
        numpyro.sample("net/w", dist.Normal(loc, scale).expand([2]).to_event(1))
        outside.guide(x)

    @jax.jit
    def loss(loc, scale):  # of every step, and the same draws for all
        return objective.loss(jax.random.key(1), {}, with_weights, guide, DATA, loc, scale)

    least = float(loss(mean, sd))
    for shift, ratio in ((0.0, 1.5), (0.0, 0.6), (0.7, 1.0), (-0.7, 1.0)):
        more = -2 * np.log(ratio) + ratio**2 - 1 + shift**2
        found = float(loss(mean + shift * sd, ratio * sd)) - least
        np.testing.assert_allclose(found, more, atol=0.12)


def test_weights_that_a_program_computes_are_not_trained():
    def program(w):
        return diffusion_of(Constant(w)).model(DATA)

    model = jax.jit(handlers.seed(program, 0))
    with pytest.raises(ValueError, match="network must come with the values its weights start"):
        model(1.0)


@pytest.mark.parametrize(
    "handled",
    [
        lambda model: handlers.lift(model, prior=dist.Normal(0.0, 1.0)),
        lambda model: handlers.substitute(model, data={"x_0_network$params": jnp.zeros(3)}),
    ],
)
def test_one_array_for_all_weights_is_refused(handled):
    model = handled(diffusion_of(Constant()).model)
    with pytest.raises(ValueError, match="must be a tree of the shapes of the network's weights"):
        handlers.seed(model, 0)(DATA)


ZEROS = np.zeros(2, np.float32)


def apply(w, x_t, t):
    return w + 0 * x_t


def below_weights(y):
    w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    x = diffusion_of((apply, ZEROS)).prior({"x_0_network$params": w})()
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


@pytest.mark.long
def test_weights_below_a_prior_have_their_posterior():
    """x_0 is w but for the narrow last steps: w ~ N(y/(1 + 1/4), 1/5)."""
    mcmc = MCMC(NUTS(infer.noncentered(below_weights)), num_warmup=300, num_samples=1000,
                progress_bar=False)  # fmt: skip
    mcmc.run(jax.random.key(0), jnp.array([1.0, 2.0]))
    w = np.asarray(mcmc.get_samples()["w"])
    np.testing.assert_allclose(w.mean(0), [0.8, 1.6], atol=0.08)
    np.testing.assert_allclose(w.std(0), 0.2**0.5, rtol=0.12)


def test_particles_refuse_weights_that_hang_on_the_program():
    def closed(y):
        x = diffusion_of(lambda x_t, t: y + 0 * x_t).prior({})()
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    with pytest.raises(ValueError, match="network must not close over what the program computes"):
        infer.SMC(closed, num_particles=4).run(jax.random.key(0), jnp.zeros(2))
    gibbs = infer.ParticleGibbs(below_weights, num_particles=4)
    with pytest.raises(ValueError, match=r"must not depend on other latent sites, \['w'\]"):
        gibbs.run(jax.random.key(0), jnp.zeros(2))


def observed(diffusion):
    """θ ~ N(0, 1), measured with noise 1; its trajectory extends the program."""

    def model(y):
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)
        diffusion.forward(theta)

    return model, lambda y: diffusion.reverse()


def test_weight_of_a_guide_that_is_the_prior_is_the_likelihood():
    """For every draw, as forward and reverse trajectory are then one law."""
    model, guide = observed(standard_diffusion((), T=5, name="theta"))
    for seed in range(3):
        drawn = handlers.trace(handlers.seed(guide, seed)).get_trace(2.0)
        log_q = sum(s["fn"].log_prob(s["value"]) for s in drawn.values())
        replayed = handlers.replay(handlers.seed(model, seed), drawn)
        sites = handlers.trace(replayed).get_trace(2.0)
        log_p = sum(s["fn"].log_prob(s["value"]) for s in sites.values())
        expected = dist.Normal(drawn["theta"]["value"], 1.0).log_prob(2.0)
        np.testing.assert_allclose(log_p - log_q, expected, atol=2e-4)


@pytest.mark.long
@pytest.mark.parametrize("objective", [Trace_ELBO, SampledTimeELBO])
def test_diffusion_in_the_guide_learns_the_posterior(objective):
    """N(1, 1/2), with log Z = log N(2; 0, 2): 500 steps of 32 draws."""
    network = networks.Perceptron((), width=16, depth=2, T=10, outputs=2, rngs=nnx.Rngs(0))
    beta = schedules.log_snr_linear(T=10, beta_1=1e-2, alpha_bar_T=1e-3)
    options = {"last_step": readouts.Learned(), "name": "theta", "event_shape": ()}
    model, guide = observed(Diffusion(GaussianKernel(), beta, network, **options))
    svi = SVI(model, guide, optax.adam(5e-3), objective(num_particles=32))
    result = svi.run(jax.random.key(0), 500, 2.0, progress_bar=False)
    losses = np.asarray(result.losses[-100:], float)
    log_z, elbo = stats.norm.logpdf(2, 0, 2**0.5), -losses.mean()
    assert log_z - 0.1 < elbo < log_z + 3 * losses.std() / 10
    draws = numpyro.infer.Predictive(guide, params=result.params, num_samples=2000)(
        jax.random.key(1), 2.0
    )["theta"]
    assert abs(draws.mean() - 1) < 0.1
    assert abs(draws.std() - 0.5**0.5) < 0.1
