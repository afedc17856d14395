"""Ancestral draws have the law of the model's program, whatever the block, at one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro.infer import Predictive
from scipy import stats

from probdiff import BernoulliKernel, Diffusion, GaussianKernel, readouts, sample, schedules

T = 6
BETA = schedules.linear(T, beta_1=0.05, beta_T=0.7)


def network(x_t, t):
    """Makes two modes along the first axis and a shift along the second."""
    z = jnp.stack([1.5 * jnp.tanh(3 * x_t[:, 0]), 0.8 * jnp.ones(x_t.shape[0])], -1)
    return jnp.concatenate([z, -0.5 + 0.1 * t[:, None] + 0 * x_t], -1)


def two_modes(**options):
    return Diffusion(
        GaussianKernel(), BETA, network, event_shape=(2,), loc=[1.0, -2.0], scale=3.0, **options
    )


def standard_normal():
    return Diffusion(
        GaussianKernel(),
        BETA,
        lambda x_t, t: 0 * x_t,
        event_shape=(2,),
        readout=readouts.Perturbation(readouts.ForwardVariance()),
    )


@pytest.mark.parametrize(
    "last_step", [readouts.Tied(), readouts.Learned()], ids=["tied", "learned"]
)
def test_ancestral_draws_have_the_law_of_the_program(key, last_step):
    """Kolmogorov-Smirnov on each axis and on their sum, 4000 draws of each."""
    diffusion, n = two_modes(last_step=last_step), 4000
    key_ours, key_program = jax.random.split(key)
    ours = sample.ancestral(key_ours, diffusion, {}, n, block_size=1500)
    assert isinstance(ours, np.ndarray) and ours.shape == (n, 2)
    program = Predictive(diffusion.model, params={}, num_samples=n)(key_program)["x_0"]
    for direction in ([1, 0], [0, 1], [1, 1]):
        assert stats.ks_2samp(ours @ direction, np.asarray(program) @ direction).pvalue > 1e-3


def test_an_exact_diffusion_returns_the_standard_normal(key):
    """10000 draws of N(0, I): Kolmogorov-Smirnov on each axis, and no correlation."""
    draws = sample.ancestral(key, standard_normal(), {}, 10_000)
    for axis in draws.T:
        assert stats.kstest(axis, "norm").pvalue > 1e-3
    assert abs(np.mean(draws[:, 0] * draws[:, 1])) < 4 / np.sqrt(10_000)


def test_keeping_the_trajectory_changes_no_draw(key):
    """And x_T is N(0, I), x_0 follows x_1 by the tied step: 600 draws."""
    diffusion = two_modes()
    alone = sample.ancestral(key, diffusion, {}, 600, block_size=250)
    x_0, trajectory = sample.ancestral(
        key, diffusion, {}, 600, block_size=250, keep_trajectory=True
    )
    np.testing.assert_allclose(x_0, alone, rtol=1e-5, atol=1e-5)
    assert trajectory.shape == (600, T, 2)
    assert stats.kstest(trajectory[:, -1].ravel(), "norm").pvalue > 1e-3
    residual = (diffusion.to_state(x_0) - np.sqrt(0.95) * trajectory[:, 0]) / np.sqrt(0.05)
    assert stats.kstest(residual.ravel(), "norm").pvalue > 1e-3


def test_no_two_rows_are_the_same_draw(key):
    draws = sample.ancestral(key, standard_normal(), {}, 1000, block_size=300)
    assert len(np.unique(draws[:, 0])) == 1000


def test_a_second_call_compiles_nothing(key):
    diffusion = standard_normal()
    sample.ancestral(key, diffusion, {}, 100, block_size=30)
    compiled = set(diffusion.programs._kept)
    sample.ancestral(jax.random.key(1), diffusion, {}, 70, block_size=30)
    assert set(diffusion.programs._kept) == compiled
    assert [jitted._cache_size() for jitted in diffusion.programs._kept.values()] == [1] * 2


@pytest.mark.parametrize("keep_trajectory", [False, True])
def test_each_draw_follows_its_own_context(key, keep_trajectory):
    """A denoiser that says x_0 = context, a last step of variance 0.05: |x_0 − c| < 5 sd."""
    diffusion = Diffusion(
        GaussianKernel(),
        BETA,
        lambda x_t, t, context: jnp.broadcast_to(context, x_t.shape),
        event_shape=(2,),
        context_shape=(1,),
        readout=readouts.Data(readouts.BridgeVariance()),
        last_step=readouts.Learned(),
    )
    context = 10.0 * np.arange(40, dtype=np.float32)[:, None]
    draws = sample.ancestral(
        key,
        diffusion,
        {},
        40,
        context=context,
        block_size=16,
        keep_trajectory=keep_trajectory,
    )
    x_0 = draws[0] if keep_trajectory else draws
    assert x_0.shape == (40, 2)
    assert np.abs(x_0 - context).max() < 5 * np.sqrt(0.05)
    assert len(np.unique(x_0)) == 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1; got 0"),
        ({"block_size": 0}, "block_size must be at least 1; got 0"),
        ({"params": {"x_0_beta": np.ones(3)}}, "unknown: .*x_0_beta"),
        (
            {"context": np.zeros((3, 1))},
            r"context must be given exactly where .* got context \(3, 1\)",
        ),
        ({"context": np.zeros((5, 1))}, "context must be given exactly where context_shape is"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(key, arguments, message):
    arguments = {"params": {}, "num_samples": 5} | arguments
    with pytest.raises(ValueError, match=message):
        sample.ancestral(key, standard_normal(), **arguments)


@pytest.mark.parametrize("steps", [2, 4])
def test_fewer_levels_keep_the_law_where_a_longer_step_is_known(steps):
    """β_t has a value for a longer step, and N(0, 1) stays what it is; n = 40,000 numbers."""
    draws = sample.ancestral(jax.random.key(0), standard_normal(), {}, 20_000, steps=steps)
    assert stats.kstest(draws.ravel(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("steps", [2, 4])
def test_fewer_levels_keep_independent_bits(steps):
    """n = 40,000 bits; the share of ones within 4 standard errors."""
    diffusion = Diffusion(
        BernoulliKernel(0.3), schedules.harmonic(T), lambda x, t: 0.0 * x, event_shape=(2,)
    )
    draws = sample.ancestral(jax.random.key(0), diffusion, {}, 20_000, steps=steps)
    assert abs(draws.mean() - 0.3) < 4 * np.sqrt(0.21 / 40_000)


def test_all_levels_are_the_default_and_what_is_kept_is_what_was_walked():
    diffusion, key = two_modes(), jax.random.key(0)
    whole, x = sample.ancestral(key, diffusion, {}, 5, keep_trajectory=True)
    again, y = sample.ancestral(key, diffusion, {}, 5, steps=T, keep_trajectory=True)
    np.testing.assert_array_equal(whole, again)
    np.testing.assert_array_equal(x, y)
    fewer, z = sample.ancestral(key, diffusion, {}, 5, steps=3, keep_trajectory=True)
    assert z.shape == (5, 3, 2)
    np.testing.assert_array_equal(fewer, sample.ancestral(key, diffusion, {}, 5, steps=3))


@pytest.mark.parametrize("steps", [1, T + 1])
def test_a_number_of_levels_there_is_not_is_refused(steps):
    with pytest.raises(ValueError, match=f"steps must lie in 2..T = 6; got {steps}"):
        sample.ancestral(jax.random.key(0), two_modes(), {}, 5, steps=steps)
