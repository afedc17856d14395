"""A program over x_0 and its forward noise has the density of the trajectory, times the volume."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, Predictive
from numpyro.infer.util import log_density

from probdiff import BernoulliKernel, infer, readouts
from probdiff.standard import standard_diffusion

T, LOC, SCALE = 5, np.array([1.0, -2.0, 0.5]), np.array([3.0, 0.5, 1.0])
COVARIANCE = np.array([[1.0, 0.6, 0.2], [0.6, 1.5, 0.4], [0.2, 0.4, 0.7]])
MASK = np.array([True, False, False])
KNOWN = np.array([2.0, 0.0, 0.0])


def prior_of(variance=None):
    options = {"loc": LOC, "scale": SCALE, "last_step": readouts.Learned()}
    return standard_diffusion((3,), T=T, **options).prior({}, variance=variance)


def programs(variance, is_known, plates):
    prior = prior_of(variance)
    known = {"known": KNOWN, "mask": MASK} if is_known else {}
    known = {n: np.broadcast_to(a, (*plates, 3)) for n, a in known.items()}

    def program(y=0.3):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        if not plates:
            numpyro.sample("y", dist.Normal(rate * prior(**known).sum(-1), 1.0), obs=y)
            return
        with numpyro.plate("rows", plates[0]):
            numpyro.sample("y", dist.Normal(rate * prior(**known).sum(-1), 1.0), obs=y)

    return program


@pytest.mark.parametrize(
    ("variance", "is_known", "plates"),
    [
        (COVARIANCE, True, (2,)),
        pytest.param(None, False, (), marks=pytest.mark.long),
        pytest.param(np.array([0.5, 1.0, 2.0]), True, (), marks=pytest.mark.long),
        pytest.param(COVARIANCE, False, (2,), marks=pytest.mark.long),
    ],
)
def test_density_is_that_of_the_trajectory_times_the_volume(variance, is_known, plates, x64):
    program = programs(variance, is_known, plates)
    over = infer.forward_coordinates(program)
    for key in jax.random.split(jax.random.key(1), 1 if is_known and plates else 4):
        key_z, key_noise = jax.random.split(key)
        point = {
            "rate": jnp.array(1.7),
            "x_0_coordinates": jax.random.normal(key_z, (*plates, 3)),
            "x_0_noise": jax.random.normal(key_noise, (*plates, T, 3)),
        }
        found, sites = log_density(over, (), {}, point)
        x_0 = sites["x_0"]["value"]
        # the same trajectory, step by step
        beta = np.asarray(prior_of().reverse.steps.beta, np.float64)
        x, levels = (np.asarray(x_0) - LOC) / SCALE, []
        for t in range(T):
            noise = np.asarray(point["x_0_noise"])[..., t, :]
            x = np.sqrt(1 - beta[t]) * x + np.sqrt(beta[t]) * noise
            levels.append(x)
        there = {"rate": point["rate"], "x_0": x_0, "x_0_trajectory": np.stack(levels, -2)}
        expected, _ = log_density(program, (), {}, there)
        free = ~MASK if is_known else np.ones(3, bool)
        covariance = np.eye(3) if variance is None else np.asarray(variance)
        covariance = np.diag(covariance) if covariance.ndim == 1 else covariance
        if is_known:
            a, b = covariance[np.ix_(MASK, MASK)], covariance[np.ix_(MASK, free)]
            covariance = covariance[np.ix_(free, free)] - b.T @ np.linalg.solve(a, b)
        volume = 0.5 * np.linalg.slogdet(covariance)[1] + np.log(SCALE[free]).sum()
        volume += 3 * 0.5 * np.log(beta).sum()
        rows = int(np.prod(plates))
        of_z = dist.Normal(0, 1).log_prob(point["x_0_coordinates"])
        own = 0.0 if not is_known else np.where(MASK, of_z, 0.0).sum()  # known ones have N(0, 1)
        assert float(found) == pytest.approx(float(expected) + rows * volume + own, abs=2e-4)


def test_chains_start_at_given_x_0():
    over = infer.forward_coordinates(programs(COVARIANCE, True, ()))
    draws = {"x_0": jnp.array([[2.0, -1.0, 0.1], [2.0, 3.0, -0.4]]), "rate": jnp.array([1.0, 2.0])}
    start = infer.initial_noise(jax.random.key(0), over, draws)
    assert {n: a.shape for n, a in start.items()} == {
        "rate": (2,), "x_0_coordinates": (2, 3), "x_0_noise": (2, T, 3)
    }  # fmt: skip
    start["rate"] = jnp.exp(start["rate"])
    there = Predictive(over, start)(jax.random.key(1))["x_0"]
    np.testing.assert_allclose(there, draws["x_0"], atol=1e-4)


def test_prior_draws_are_refused_where_the_factor_would_not_count():
    over = infer.forward_coordinates(programs(None, False, ()))
    with pytest.raises(ValueError, match="must not be drawn by Predictive"):
        Predictive(over, num_samples=2)(jax.random.key(0))


@pytest.mark.parametrize(
    ("program", "text"),
    [
        (lambda: None, "must call a prior"),
        (lambda: standard_diffusion(kernel=BernoulliKernel(0.5)).prior({})(), "symbols"),
        pytest.param(
            handlers.condition(lambda: prior_of()(), {"x_0": jnp.zeros(3)}),
            "must not be observed",
            marks=pytest.mark.long,
        ),
        (handlers.substitute(lambda: prior_of()(), {"x_0": jnp.zeros(3)}), "left to its prior"),
        (handlers.mask(lambda: prior_of()(), False), "keep its density"),
    ],
)
def test_what_has_no_coordinates_is_refused(program, text):
    with pytest.raises(ValueError, match=text):
        handlers.trace(handlers.seed(infer.forward_coordinates(program), 0)).get_trace()


@pytest.mark.long
def test_nuts_finds_the_posterior_of_x_0_and_an_unknown_noise():
    """Against quadrature over σ: x_0 ~ N(0, 1), y_i ~ N(x_0, σ), σ ~ HalfNormal(1); n = 4000."""
    prior, y = standard_diffusion(T=8).prior({}), np.array([0.9, 1.4, 1.1])

    def program():
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Normal(prior(), sigma).expand((3,)).to_event(1), obs=y)

    options = {"num_warmup": 500, "num_samples": 1000, "num_chains": 4, "progress_bar": False}
    over = NUTS(infer.forward_coordinates(program))
    mcmc = MCMC(over, **options, chain_method="vectorized")
    mcmc.run(jax.random.key(0))
    draws = mcmc.get_samples(group_by_chain=True)
    exact = quadrature(y)
    from arviz_stats.base import array_stats

    for name, (mean, _) in exact.items():
        a = np.asarray(draws[name], np.float64)
        se = a.std() / np.sqrt(array_stats.ess(a, chain_axis=0, draw_axis=1))
        assert abs(a.mean() - mean) < 4 * se


SIGMA = np.linspace(1e-3, 6, 6001)


def log_joint(y):
    """log p(σ, y) on a grid of σ."""
    cov = np.eye(len(y))[None] * SIGMA[:, None, None] ** 2 + 1.0
    log_p = -0.5 * np.einsum("i,sij,j->s", y, np.linalg.inv(cov), y)
    log_p += -0.5 * np.linalg.slogdet(2 * np.pi * cov)[1]
    return log_p - 0.5 * SIGMA**2 + 0.5 * np.log(2 / np.pi)


def log_evidence(y):
    """log Z, nats."""
    return float(np.log(np.trapezoid(np.exp(log_joint(y)), SIGMA)))


def quadrature(y):
    """Mean and sd of x_0 and σ."""
    sigma, log_p = SIGMA, log_joint(y)
    w = np.exp(log_p - log_p.max())
    w /= w.sum()
    precision = 1 + len(y) / sigma**2
    mean = y.sum() / sigma**2 / precision
    of_x = w @ mean, np.sqrt(w @ (1 / precision + mean**2) - (w @ mean) ** 2)
    of_sigma = w @ sigma, np.sqrt(w @ sigma**2 - (w @ sigma) ** 2)
    return {"x_0": of_x, "sigma": of_sigma}
