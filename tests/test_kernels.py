"""Laws that every kernel obeys under every schedule, and the digits it keeps near the data.

Arrays have step t on their first axis.
"""

import jax.numpy as jnp
import numpy as np
import pytest

import reference
from probdiff import GaussianKernel, schedules

T = 8
KERNELS = {"gaussian": GaussianKernel()}
SCHEDULES = {
    "harmonic": schedules.harmonic(T),
    "linear": schedules.linear(T, beta_1=0.01, beta_T=0.3),
    "cosine": schedules.cosine(T),
    "log_snr_linear": schedules.log_snr_linear(T, beta_1=1e-3, alpha_bar_T=0.01),
    "constant": np.full(T, 0.2),
}
GRID = np.linspace(-14.0, 14.0, 14_001)  # a sum over it integrates a Gaussian of sd 0.02 exactly
POINTS = np.linspace(-3.0, 3.0, 6)

every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
every_schedule = pytest.mark.parametrize("beta", SCHEDULES.values(), ids=SCHEDULES)


def integrate(log_integrand):
    """∫ exp over GRID, which is the last axis."""
    return np.exp(log_integrand).sum(-1) * (GRID[1] - GRID[0])


def all_steps(beta, axes):
    """Steps 1..T as a table with `axes` axes behind, and the steps before 2..T likewise."""
    table = schedules.steps(beta)
    return table.at(jnp.arange(1, T + 1), axes), table.at(jnp.arange(1, T), axes)


def later(step):
    """Steps 2..T of a table."""
    return type(step)(*(column[1:] for column in step))


@every_kernel
@every_schedule
def test_stationary_is_kept_by_transition(x64, kernel, beta):
    """∫ T(x_t | x_s) π(x_s) dx_s = π(x_t)."""
    step, _ = all_steps(beta, 2)
    grid, x_t = jnp.asarray(GRID), jnp.asarray(POINTS)
    log_pi = kernel.stationary(grid.shape).log_prob(grid)
    mixed = integrate(log_pi + kernel.transition(grid, step).log_prob(x_t[:, None]))
    expected = np.exp(kernel.stationary(x_t.shape).log_prob(x_t))
    np.testing.assert_allclose(mixed, np.broadcast_to(expected, mixed.shape), atol=1e-10)


@every_kernel
@every_schedule
def test_transition_is_in_detailed_balance(x64, kernel, beta):
    """π(x) T(y | x) = π(y) T(x | y)."""
    step, _ = all_steps(beta, 2)
    x, y = jnp.meshgrid(jnp.asarray(POINTS), jnp.asarray(POINTS))
    pi = kernel.stationary(x.shape)
    there = pi.log_prob(x) + kernel.transition(x, step).log_prob(y)
    back = pi.log_prob(y) + kernel.transition(y, step).log_prob(x)
    np.testing.assert_allclose(there, back, rtol=1e-10, atol=1e-10)


@every_kernel
@every_schedule
def test_bridge_and_marginal_give_the_joint(x64, kernel, beta):
    """q(x_s | x_0) q(x_t | x_s) = q(x_t | x_0) q(x_s | x_t, x_0) for t ≥ 2."""
    step, step_s = all_steps(beta, 3)
    step = later(step)
    x_0, x_s, x_t = jnp.meshgrid(*3 * [jnp.asarray(POINTS)])
    x_0, x_t = (jnp.broadcast_to(x, (T - 1, *x.shape)) for x in (x_0, x_t))
    left = kernel.marginal(x_0, step_s).log_prob(x_s) + kernel.transition(x_s, step).log_prob(x_t)
    right = kernel.marginal(x_0, step).log_prob(x_t)
    right += kernel.bridge(x_t, x_0, step).log_prob(x_s)
    np.testing.assert_allclose(left, right, rtol=1e-10, atol=1e-10)


@every_kernel
@every_schedule
def test_marginal_is_the_transitions_composed(x64, kernel, beta):
    """q(x_t | x_0) = ∫ q(x_t | x_s) q(x_s | x_0) dx_s, and the transition itself at t = 1."""
    step, step_s = all_steps(beta, 2)
    x_0, grid, x_t = jnp.asarray(0.8), jnp.asarray(GRID), jnp.asarray(POINTS)[:, None]
    marginal = np.exp(kernel.marginal(x_0, step).log_prob(x_t))[..., 0]
    log_joint = kernel.marginal(x_0, step_s).log_prob(grid)
    log_joint += kernel.transition(grid, later(step)).log_prob(x_t)
    np.testing.assert_allclose(integrate(log_joint), marginal[1:], atol=1e-10)
    one_step = np.exp(kernel.transition(x_0, step).log_prob(x_t))[0, :, 0]
    np.testing.assert_allclose(one_step, marginal[0], rtol=1e-10)


@every_schedule
def test_gaussian_kernel_is_the_papers(x64, beta):
    kernel, step = GaussianKernel(), all_steps(beta, 1)[0]
    x_0 = jnp.broadcast_to(jnp.asarray(POINTS), (T, 6))
    x_t = x_0[:, ::-1] - 0.4
    transition, marginal = kernel.transition(x_0, step), kernel.marginal(x_0, step)
    bridge = kernel.bridge(x_t[1:], x_0[1:], later(step))

    def assert_law(law, index, mean, variance):
        np.testing.assert_allclose(law.mean[index], mean, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(law.variance[index], np.full(6, variance), rtol=1e-8)

    for t in range(1, T + 1):
        assert_law(transition, t - 1, *reference.transition(POINTS, beta, t))
        assert_law(marginal, t - 1, *reference.marginal(POINTS, beta, t))
    for t in range(2, T + 1):
        assert_law(bridge, t - 2, *reference.bridge(np.asarray(x_t[t - 1]), POINTS, beta, t))


def test_a_step_that_forgets_everything_leaves_the_bridge_at_the_marginal(x64):
    """β_T = 1: x_T says nothing of x_s, so q(x_s | x_T, x_0) = q(x_s | x_0)."""
    kernel, (step, step_s) = GaussianKernel(), all_steps(SCHEDULES["harmonic"], 1)
    x_T = jnp.broadcast_to(jnp.asarray(POINTS), (T - 1, 6))
    x_0 = jnp.full_like(x_T, 0.8)
    bridge, marginal = kernel.bridge(x_T, x_0, later(step)), kernel.marginal(x_0, step_s)
    np.testing.assert_allclose(bridge.mean[-1], marginal.mean[-1], rtol=1e-12)
    np.testing.assert_allclose(bridge.variance[-1], marginal.variance[-1], rtol=1e-12)
    np.testing.assert_array_equal(kernel.marginal(x_0, later(step)).mean[-1], 0.0)


@every_kernel
def test_a_step_for_each_example_acts_on_that_example(x64, kernel):
    t = jnp.array([2, 7, 8, 2])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 2, 3)))
    table = schedules.steps(SCHEDULES["linear"])
    law = kernel.bridge(x[0], x[1], table.at(t, 2))
    assert law.batch_shape == (4, 2, 3) and law.event_shape == ()
    for i in range(4):
        alone = kernel.bridge(x[0, i], x[1, i], table.at(t[i], 0))
        np.testing.assert_allclose(law.mean[i], alone.mean, rtol=1e-12)
        np.testing.assert_allclose(law.variance[i], np.full((2, 3), alone.variance), rtol=1e-12)


@pytest.mark.parametrize("traced", [False, True], ids=["fixed", "traced"])
@every_kernel
def test_float32_keeps_the_noise_near_the_data(kernel, traced):
    """1 − ᾱ_t to six digits from β_1 = 1e-7 on, where float32 has no 1 − 1e-7 to subtract."""
    beta = schedules.log_snr_linear(40, beta_1=1e-7, alpha_bar_T=1e-3)
    exact = -np.expm1(np.cumsum(np.log1p(-beta)))
    table = schedules.steps(jnp.asarray(beta, jnp.float32) if traced else beta)
    assert table.noise_t.dtype == jnp.float32
    np.testing.assert_allclose(table.noise_t, exact, rtol=1e-6)
    np.testing.assert_allclose(table.noise_s[1:], exact[:-1], rtol=1e-6)
    x = jnp.zeros(40)
    np.testing.assert_allclose(kernel.marginal(x, table).variance, exact, rtol=1e-6)
    bridge = kernel.bridge(x[1:], x[1:], later(table)).variance
    np.testing.assert_allclose(bridge, beta[1:] * exact[:-1] / exact[1:], rtol=3e-6)
