"""Bounds per example and step: what they add up to, in which units, and how they are kept."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from flax import nnx

from oracles import exact_gaussian, gaussian_network, log_normal
from probdiff import (
    BernoulliKernel,
    Diffusion,
    GaussianKernel,
    diagnostics,
    networks,
    readouts,
    sample,
    schedules,
    standard_diffusion,
)
from probdiff.trajectories import ForwardTrajectory

MEAN, SD = np.array([0.3, -0.5]), np.array([0.9, 0.6])


@pytest.fixture(scope="module")
def data():
    return jnp.asarray(MEAN + SD * np.random.default_rng(0).standard_normal((50, 2)), jnp.float32)


def test_bound_of_the_exact_diffusion_is_the_log_density(data):
    diffusion = exact_gaussian(MEAN, SD)
    tree = diagnostics.bound(jax.random.key(0), diffusion, {}, data, num_draws=4_000)
    gap = tree["bound"]["bound"].values - log_normal(np.asarray(data), MEAN, SD).sum(1)
    one = diagnostics.bound(jax.random.key(1), diffusion, {}, jnp.tile(data, (40, 1)))
    spread = one["bound"]["bound"].values.reshape(40, 50).std(0).mean()
    assert abs(gap.mean()) < 4 * spread / math.sqrt(4_000 * 50)
    assert np.abs(gap).max() < 6 * spread / math.sqrt(4_000)


def test_parts_add_up_and_carry_their_names(data):
    tree = diagnostics.bound(jax.random.key(0), exact_gaussian(MEAN, SD, T=5), {}, data)
    group = tree["bound"]
    assert dict(group.sizes) == {"example": 50, "step": 4}
    assert group["step"].values.tolist() == [2, 3, 4, 5]
    total = group["reconstruction"] - group["kl"].sum("step") - group["prior_kl"]
    np.testing.assert_allclose(group["bound"], total, atol=1e-5)
    assert group.attrs["mean"] == pytest.approx(float(group["bound"].mean()), abs=1e-6)
    se = float(group["bound"].std(ddof=1)) / math.sqrt(50)
    assert group.attrs["se"] == pytest.approx(se, rel=1e-5)
    assert group.attrs["mean_bits"] == pytest.approx(group.attrs["mean"] / math.log(2))


KERNELS = {
    "numbers": (GaussianKernel(), readouts.Perturbation(), 2, {"loc": 0.2, "scale": 1.7}),
    "bits": (BernoulliKernel(0.3), readouts.Logits(), 1, {}),
}


@pytest.mark.parametrize("kind", KERNELS)
def test_closed_form_of_the_tied_step_is_the_mean_of_its_draws(kind):
    kernel, readout, outputs, units = KERNELS[kind]
    network = networks.Perceptron((3,), 8, 1, 4, outputs=outputs, rngs=nnx.Rngs(0))
    beta = schedules.log_snr_linear(4, beta_1=0.1, alpha_bar_T=0.05)
    diffusion = Diffusion(kernel, beta, network, event_shape=(3,), readout=readout, **units)
    params = jax.tree.map(lambda p: jnp.full(p.shape, 0.1), diffusion.params_template)
    rng = np.random.default_rng(1)
    x = rng.integers(0, 2, (6, 3)) if kind == "bits" else 2 * rng.standard_normal((6, 3))
    x = jnp.asarray(x, jnp.int32 if kind == "bits" else jnp.float32)
    mask = jnp.asarray(rng.random((6, 3)) < 0.7)
    for given in (None, mask):
        tree = diagnostics.bound(jax.random.key(0), diffusion, params, x, mask=given)
        reverse = diffusion.bind(params)
        forward = ForwardTrajectory.of(reverse, x, given)
        n = 20_000
        x_1 = forward.sample_at(jax.random.key(1), jnp.ones((n, 6), jnp.int32))
        draws = np.asarray(reverse.data(x_1, given).log_prob(x))
        error = draws.std(0) / math.sqrt(n)
        found = tree["bound"]["reconstruction"].values
        assert (np.abs(found - draws.mean(0)) < 4.5 * error + 1e-5).all()


def test_result_survives_a_file(data, tmp_path):
    tree = diagnostics.bound(jax.random.key(0), exact_gaussian(MEAN, SD, T=5), {}, data)
    tree.to_netcdf(tmp_path / "bounds.nc", engine="h5netcdf")
    again = xr.open_datatree(tmp_path / "bounds.nc", engine="h5netcdf")
    xr.testing.assert_identical(again["bound"].to_dataset(), tree["bound"].to_dataset())
    again.close()


@pytest.mark.long
def test_blocks_keep_every_example_and_its_context():
    """The context is the mean of an exact diffusion: a wrong row would show as another density."""
    means = jnp.linspace(-2.0, 2.0, 50)[:, None]
    fixed = exact_gaussian(np.zeros(1), np.full(1, 0.5))
    diffusion = Diffusion(
        fixed.kernel,
        fixed.schedule,
        lambda x_t, t, context: (
            gaussian_network(np.zeros(1), np.full(1, 0.5), fixed.schedule)(x_t, t)
            + jnp.concatenate([shift(fixed, context, t), jnp.zeros_like(context)], -1)
        ),
        event_shape=(1,),
        readout=fixed.readout,
        last_step=fixed.last_step,
        context_shape=(1,),
    )
    x = means + 0.1
    expected = log_normal(0.1, 0.0, 0.5)
    for estimate, count in ((diagnostics.bound, "num_draws"), (diagnostics.sampled_bound, None)):
        options = {count: 400} if count else {"num_times": 2_000}
        tree = estimate(
            jax.random.key(1), diffusion, {}, x, context=means, block_size=20, **options
        )
        gap = tree["bound"]["bound"].values - expected
        assert len(gap) == 50
        assert np.abs(gap).max() < 0.5  # neighbouring rows differ by 0.08, far rows by many nats


def shift(diffusion, mean, t):
    """What a mean adds to the denoised point of the exact diffusion with mean 0, x_t held fixed."""
    step = diffusion.bind({}).steps.at(t, 1)
    variance = 1 / (1 / 0.5**2 + step.alpha_bar_t / step.noise_t)
    return variance * mean / 0.5**2


BAD = {
    r"x_0 must have shape \(N, 2\) with": lambda d: diagnostics.bound(
        jax.random.key(0), d, {}, jnp.zeros(2)
    ),
    "num_draws must be at least 1; got 0": lambda d: diagnostics.bound(
        jax.random.key(0), d, {}, jnp.zeros((3, 2)), num_draws=0
    ),
    "x_0 must be finite .*; missing values want mask=, True where observed": lambda d: (
        diagnostics.bound(jax.random.key(0), d, {}, jnp.full((3, 2), jnp.nan))
    ),
    "params must hold exactly": lambda d: diagnostics.bound(
        jax.random.key(0), d, {"a": 1.0}, jnp.zeros((3, 2))
    ),
    r"context must be given exactly where context_shape is": lambda d: diagnostics.bound(
        jax.random.key(0), d, {}, jnp.zeros((3, 2)), context=jnp.zeros((3, 1))
    ),
    r"last_step must be Tied\(\)": lambda d: diagnostics.entropy_form(
        jax.random.key(0), d, {}, jnp.zeros((3, 2)), np.zeros((3, 19))
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        BAD[message](exact_gaussian(MEAN, SD))


@pytest.mark.parametrize("last_step", [readouts.Tied(), readouts.Learned()])
def test_sampled_steps_estimate_the_bound_of_all_steps(data, last_step):
    network = networks.Perceptron((2,), 8, 1, 12, rngs=nnx.Rngs(0))
    beta = schedules.log_snr_linear(12, beta_1=0.02, alpha_bar_T=0.05)
    diffusion = Diffusion(
        GaussianKernel(), beta, network, event_shape=(2,), last_step=last_step, scale=0.8
    )
    params = jax.tree.map(lambda p: jnp.full(p.shape, 0.2), diffusion.params_template)
    x = jnp.tile(data, (40, 1))
    every = diagnostics.bound(jax.random.key(0), diffusion, params, x, num_draws=20)
    some = diagnostics.sampled_bound(jax.random.key(1), diffusion, params, x, num_times=3)
    gap = some["bound"]["bound"].values - every["bound"]["bound"].values
    per_example = gap.reshape(40, 50)
    error = per_example.std(0, ddof=1) / math.sqrt(40)
    assert (np.abs(per_example.mean(0)) < 4.5 * error).all()
    assert abs(gap.mean()) < 4 * gap.std() / math.sqrt(len(gap))


def test_context_must_have_a_row_for_each_example():
    fixed = exact_gaussian(MEAN, SD)
    diffusion = Diffusion(
        fixed.kernel,
        fixed.schedule,
        lambda x_t, t, context: fixed.network(x_t, t),
        event_shape=(2,),
        readout=fixed.readout,
        last_step=fixed.last_step,
        context_shape=(3,),
    )
    for rows in ((8, 3), (1, 3), (3,), (3, 3)):
        with pytest.raises(ValueError, match="context must have"):
            diagnostics.bound(
                jax.random.key(0), diffusion, {}, jnp.zeros((4, 2)), context=jnp.zeros(rows)
            )


def test_entropy_form_wants_a_kl_for_every_example_and_step():
    diffusion = Diffusion(
        GaussianKernel(),
        schedules.linear(5, beta_1=0.1, beta_T=0.4),
        lambda x_t, t: jnp.zeros_like(x_t),
        event_shape=(2,),
        readout=readouts.Perturbation(readouts.ForwardVariance()),
    )
    with pytest.raises(ValueError, match=r"kl must have shape \(3, 4\); got \(1, 4\)"):
        diagnostics.entropy_form(
            jax.random.key(0), diffusion, {}, jnp.zeros((3, 2)), np.zeros((1, 4))
        )


# numbers that are not


@pytest.mark.parametrize("num_draws", [1, 4])
@pytest.mark.parametrize("readout", [None, readouts.Data()], ids=["exact", "data"])
def test_a_mask_that_is_false_throughout_leaves_a_bound_of_zero(data, num_draws, readout):
    options = {} if readout is None else {"readout": readout}
    diffusion, mask = standard_diffusion((2,), T=4, **options), np.zeros((50, 2), bool)
    args = jax.random.key(0), diffusion, {}, data
    with pytest.warns(UserWarning, match="mask is False throughout"):
        group = diagnostics.bound(*args, mask=mask, num_draws=num_draws)["bound"]
    np.testing.assert_array_equal(group["bound"], 0.0)
    np.testing.assert_array_equal(group["kl"], 0.0)
    with pytest.warns(UserWarning, match="mask is False throughout"):
        assert (diagnostics.sampled_bound(*args, mask=mask)["bound"]["bound"] == 0).all()


def test_rows_without_an_observed_entry_leave_the_others_alone(data):
    mask = np.ones((50, 2), bool)
    mask[::2] = False
    args = jax.random.key(0), standard_diffusion((2,), T=4), {}
    group = diagnostics.bound(*args, data, mask=mask, num_draws=4)["bound"]
    np.testing.assert_array_equal(group["bound"][::2], 0.0)
    assert np.isfinite(group["bound"][1::2]).all() and (group["bound"][1::2] != 0).all()


@pytest.mark.parametrize("function", ["bound", "sampled_bound", "ladder"])
def test_a_bound_that_is_nan_says_where(data, function):
    def network(x_t, t):  # fails at t = 3, for rows with x_t,0 above 0
        bad = (t == 3) & (x_t[:, 0] > 0)
        return jnp.where(bad[:, None], jnp.nan, jnp.zeros_like(x_t)).repeat(2, -1)

    readout = readouts.Perturbation()
    diffusion = Diffusion(
        GaussianKernel(), schedules.cosine(4), network, event_shape=(2,), readout=readout
    )
    part = "log weight" if function == "ladder" else r"kl is NaN( at steps 3)?"
    options = {"sizes": (1, 2), "num_repeats": 2, "num_draws": 2} if function == "ladder" else {}
    with pytest.raises(FloatingPointError, match=rf"{part}.* of 50 examples, rows .*network"):
        getattr(diagnostics, function)(jax.random.key(0), diffusion, {}, data, **options)
    with pytest.raises(FloatingPointError, match=r"of 64 draws are not finite.*network"):
        sample.ancestral(jax.random.key(0), diffusion, {}, 64)
