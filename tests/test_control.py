"""Control variates leave the mean of every step alone and take most of its variance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles import exact_gaussian
from probdiff import diagnostics
from probdiff.diagnostics.control import controlled
from probdiff.elbo import step_kl
from probdiff.trajectories import ForwardTrajectory

MEAN, SD = np.array([0.3, -0.5]), np.array([0.9, 0.6])


def kl_at(forward, reverse, x_t, times):
    return step_kl(forward, reverse.step(x_t, times, examples_first=True), x_t, times)


def draws(num_draws, t=3, rows=1, mask=None):
    """KL_t of the exact diffusion at draws of x_t, and what control makes of them."""
    diffusion = exact_gaussian(MEAN, SD)
    x = jnp.asarray(MEAN + SD * np.random.default_rng(0).standard_normal((rows, 2)), jnp.float32)
    reverse = diffusion.bind({})
    forward = ForwardTrajectory.of(reverse, x, mask)
    times = jnp.full((num_draws, rows), t)

    @jax.jit
    def both(key):
        x_t = forward.sample_at(key, times)
        kl = kl_at(forward, reverse, x_t, times)
        return kl, controlled(kl, forward, x_t, times)

    return map(np.asarray, both(jax.random.key(1)))


@pytest.mark.parametrize(("t", "share"), [(2, 0.03), (3, 0.25), (6, 0.5)])
def test_a_step_of_gaussian_data_loses_most_of_its_variance(t, share):
    """There KL_t is quadratic in ε, near the data almost a multiple of |ε|²."""
    kl, better = draws(4_000, t=t)
    assert better.var() < share * kl.var()
    error = np.hypot(kl.std(), better.std()) / np.sqrt(4_000)
    assert abs(kl.mean() - better.mean()) < 4 * error


@pytest.fixture(scope="module")
def one_example():
    """Both processes of one example, and 400,000 draws of its KL_3."""
    reverse = exact_gaussian(MEAN, SD).bind({})
    forward = ForwardTrajectory.of(reverse, jnp.asarray([[1.0, 0.4]], jnp.float32))
    times = jnp.full((400_000, 1), 3)
    x_t = forward.sample_at(jax.random.key(3), times)
    return forward, reverse, np.asarray(kl_at(forward, reverse, x_t, times))


@pytest.mark.parametrize("num_draws", [16, 40])
def test_few_draws_have_no_bias_either(one_example, num_draws):
    """The coefficients of one half come from the other: 4,000 repetitions against 400,000 draws."""
    forward, reverse, truth = one_example

    def mean(key):
        times = jnp.full((num_draws, 1), 3)
        x_t = forward.sample_at(key, times)
        return jnp.mean(controlled(kl_at(forward, reverse, x_t, times), forward, x_t, times))

    found = np.asarray(jax.jit(jax.vmap(mean))(jax.random.split(jax.random.key(2), 4_000)))
    error = np.hypot(found.std() / np.sqrt(4_000), truth.std() / np.sqrt(400_000))
    assert abs(found.mean() - truth.mean()) < 4 * error


def test_missing_entries_and_zeros_explain_nothing_and_break_nothing():
    mask = jnp.asarray([[True, False]])
    kl, better = draws(4_000, mask=mask)
    assert np.isfinite(better).all()
    assert abs(kl.mean() - better.mean()) < 4 * kl.std() / np.sqrt(4_000)
    diffusion = exact_gaussian(np.zeros(2), SD)
    x = np.zeros((3, 2), np.float32)
    tree = diagnostics.bound(jax.random.key(0), diffusion, {}, x, num_draws=50)
    assert np.isfinite(tree["bound"]["bound"]).all()


def test_too_few_draws_are_left_as_they_are():
    kl, better = draws(5)
    np.testing.assert_array_equal(kl, better)


@pytest.mark.long
def test_the_bound_of_many_draws_is_told_with_less_error():
    """se over draws of a bound whose steps have most of their variance removed."""
    diffusion = exact_gaussian(MEAN, SD)
    x = np.asarray(MEAN + SD * np.random.default_rng(0).standard_normal((20, 2)), np.float32)
    group = diagnostics.bound(jax.random.key(0), diffusion, {}, x, num_draws=200)["bound"]
    reverse = diffusion.bind({})
    forward = ForwardTrajectory.of(reverse, jnp.asarray(x))
    raw = 0.0
    for t in range(2, 21):
        times = jnp.full((200, 20), t)
        x_t = forward.sample_at(jax.random.key(t), times)
        raw += np.asarray(kl_at(forward, reverse, x_t, times)).var(0) / 200
    first = np.asarray(
        [reverse.data(forward.sample_at(k, jnp.ones(20, int))).log_prob(x)
         for k in jax.random.split(jax.random.key(9), 200)]
    ).var(0) / 200  # fmt: skip
    assert (group["bound_se"].values ** 2 < 0.9 * (raw + first)).mean() > 0.8
