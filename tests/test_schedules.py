"""Schedules against their formulas, and what training may and may not change of them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO

import reference
from probdiff import Diffusion, GaussianKernel, SampledTimeELBO, schedules

SCHEDULES = {
    "harmonic": schedules.harmonic(40),
    "linear": schedules.linear(40, beta_1=0.01, beta_T=0.3),
    "cosine": schedules.cosine(40),
    "log_snr_linear": schedules.log_snr_linear(40, beta_1=1e-4, alpha_bar_T=1e-3),
}


def network(x_t, t):
    """Some output that depends on x and t."""
    return jnp.concatenate([jnp.sin(x_t), 0.1 * x_t], -1)


def learned_model(T=6):
    beta = schedules.linear(T, beta_1=0.013, beta_T=0.4)
    return Diffusion(GaussianKernel(), schedules.learned(beta), network, event_shape=(2,))


def data(n=8):
    return np.random.default_rng(0).normal(size=(n, 2))


@pytest.mark.parametrize("T", [2, 10, 40, 1000])
def test_harmonic_erases_the_same_share_each_step(x64, T):
    beta = schedules.harmonic(T)
    np.testing.assert_array_equal(beta, reference.harmonic(T))
    table, share = schedules.steps(beta), np.arange(1, T + 1) / T
    np.testing.assert_allclose(table.alpha_bar_t, 1 - share, rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(table.noise_t, share, rtol=1e-12)
    assert beta[-1] == 1 and table.alpha_bar_t[-1] == 0


def test_linear_has_its_ends_and_equal_steps():
    beta = schedules.linear(1000)
    np.testing.assert_allclose(beta, 1e-4 + np.arange(1000) / 999 * (0.02 - 1e-4), rtol=1e-12)


def test_cosine_is_the_squared_cosine_up_to_its_limit(x64):
    T, offset = 50, 0.008
    f = np.cos((np.arange(T + 1) / T + offset) / (1 + offset) * np.pi / 2) ** 2
    beta = schedules.cosine(T, offset=offset)
    alpha_bar = schedules.steps(beta).alpha_bar_t
    np.testing.assert_allclose(alpha_bar[:-1], f[1:-1] / f[0], rtol=1e-10)
    assert beta[-1] == 0.999 and np.all(np.diff(beta) > 0)
    assert schedules.cosine(T, beta_max=0.5).max() == 0.5


@pytest.mark.parametrize(("T", "beta_1", "alpha_bar_T"), [(40, 1e-4, 1e-3), (7, 0.1, 0.4)])
def test_log_snr_linear_has_its_ends_and_equal_steps(x64, T, beta_1, alpha_bar_T):
    beta = schedules.log_snr_linear(T, beta_1=beta_1, alpha_bar_T=alpha_bar_T)
    alpha_bar = reference.alpha_bar(beta)
    np.testing.assert_allclose(beta[0], beta_1, rtol=1e-12)
    np.testing.assert_allclose(alpha_bar[-1], alpha_bar_T, rtol=1e-10)
    spaces = np.diff(np.log(alpha_bar) - np.log1p(-alpha_bar))
    np.testing.assert_allclose(spaces, np.full(T - 1, spaces.mean()), rtol=1e-8)


@pytest.mark.parametrize("traced", [False, True], ids=["fixed", "traced"])
@pytest.mark.parametrize("beta", SCHEDULES.values(), ids=SCHEDULES)
def test_table_of_steps_multiplies_the_rates_up(x64, beta, traced):
    table = schedules.steps(jnp.asarray(beta) if traced else beta)
    alpha_bar = reference.alpha_bar(beta)
    before = np.array([1.0, *alpha_bar[:-1]])
    expected = (np.arange(1, 41), beta, before, alpha_bar, 1 - before, 1 - alpha_bar)
    for column, values in zip(table, expected, strict=True):
        np.testing.assert_allclose(column, values, rtol=1e-10, atol=1e-14)
    assert table.T == 40 and table.noise_s[0] == 0


@pytest.mark.parametrize("objective", [Trace_ELBO(), SampledTimeELBO()], ids=["all_t", "random_t"])
def test_training_moves_every_rate_but_the_first(key, objective):
    diffusion = learned_model()
    start = diffusion.schedule.beta
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(0.5), objective)
    # float32 data: rates are float32, so that bit for bit means as the float32 nearest to 0.013
    x_0 = data().astype(np.float32)
    result = svi.run(key, 20, x_0, progress_bar=False)
    assert result.params["x_0_beta"].shape == (5,)
    table = diffusion.bind(result.params).steps
    assert np.asarray(table.beta)[0].tobytes() == np.float32(start[0]).tobytes()
    assert np.all((table.beta > 0) & (table.beta < 1))
    assert np.all(np.abs(table.beta[1:] - start[1:]) > 1e-3)


@pytest.mark.parametrize("objective", [Trace_ELBO(), SampledTimeELBO()], ids=["all_t", "random_t"])
def test_gradient_by_beta_holds_the_noise_fixed(x64, key, objective):
    """d/dβ of the loss at one key is that of finite differences at the same key."""
    diffusion, x_0 = learned_model(), data()
    beta = np.array(diffusion.schedule.beta[1:])

    @jax.jit
    def loss(rates):
        return objective.loss(key, {"x_0_beta": rates}, diffusion.model, diffusion.guide, x_0)

    gradient = jax.grad(loss)(beta)
    width = 1e-5
    ends = [(loss(beta + width * axis), loss(beta - width * axis)) for axis in np.eye(len(beta))]
    differences = [(above - below) / (2 * width) for above, below in ends]
    assert np.abs(gradient).min() > 1e-3
    np.testing.assert_allclose(gradient, differences, rtol=1e-6)


def test_learned_schedule_starts_at_its_rates(x64):
    beta = schedules.linear(6, beta_1=0.013, beta_T=0.4)
    with numpyro.handlers.trace() as sites:
        rates = schedules.learned(beta)("rates")
    np.testing.assert_array_equal(rates, beta)
    assert list(sites) == ["rates"] and sites["rates"]["value"].shape == (5,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.harmonic(1), "T must be at least 2; got 1"),
        (lambda: schedules.linear(1), "T must be at least 2; got 1"),
        (lambda: schedules.cosine(0), "T must be at least 2; got 0"),
        (lambda: schedules.log_snr_linear(1, beta_1=0.1, alpha_bar_T=0.1), "T must be at least 2"),
        (lambda: schedules.linear(4, beta_1=0.0), r"beta_1 must lie in \(0, 1\); got 0.0"),
        (lambda: schedules.linear(4, beta_T=1.2), r"beta_T must lie in \(0, 1\]; got 1.2"),
        (lambda: schedules.cosine(4, offset=-2.0), r"offset must lie in \(0, 1000\]; got -2.0"),
        (lambda: schedules.cosine(4, beta_max=0.0), r"beta_max must lie in \(0, 1\]; got 0.0"),
        (lambda: schedules.cosine(4, beta_max=1.5), r"beta_max must lie in \(0, 1\]; got 1.5"),
        (
            lambda: schedules.log_snr_linear(4, beta_1=1.0, alpha_bar_T=0.1),
            r"beta_1 must lie in \(0, 1\); got 1.0",
        ),
        (
            lambda: schedules.log_snr_linear(4, beta_1=0.1, alpha_bar_T=0.0),
            r"alpha_bar_T must lie in \(0, 1\); got 0.0",
        ),
        (
            lambda: schedules.log_snr_linear(4, beta_1=0.5, alpha_bar_T=0.5),
            "alpha_bar_T must be below 1 - beta_1 = 0.5; got 0.5",
        ),
        (lambda: schedules.check_beta([0.1, 1.0, 0.2]), "got 1.0 at t = 2"),
        (lambda: schedules.check_beta([0.1, np.nan]), "got nan at t = 2"),
        (lambda: schedules.check_beta([-0.1, 0.2]), "got -0.1 at t = 1"),
        (lambda: schedules.check_beta([0.1]), r"T of at least 2; got shape \(1,\)"),
        (lambda: schedules.check_beta(0.1), r"must have shape \(T,\) .* got shape \(\)"),
        (lambda: schedules.check_beta([[0.1, 0.2]]), r"got shape \(1, 2\)"),
        (lambda: schedules.learned(schedules.harmonic(4)), "got beta_T = 1"),
        (lambda: schedules.learned([0.1, 1.2]), "got 1.2 at t = 2"),
    ],
)
def test_what_is_no_schedule_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
