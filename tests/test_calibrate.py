"""Ranks are uniform for a sampler of the posterior and for no other.

The prior is a diffusion that is N(0, 1) at every level, whose posteriors are closed.
"""

import warnings

import arviz_plots
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray as xr
from flax import nnx
from numpyro.infer import SVI
from scipy import stats

from probdiff import (
    BernoulliKernel,
    Diffusion,
    GaussianKernel,
    SampledTimeELBO,
    datasets,
    fit,
    infer,
    networks,
    readouts,
    schedules,
    standard_diffusion,
)

SIGMA = 0.7


def standard_normal(event_shape, T=20, **options):
    """A diffusion that is N(0, 1) at every level, exactly."""
    beta = schedules.log_snr_linear(T, beta_1=1e-4, alpha_bar_T=1e-4)
    readout = readouts.Perturbation(readouts.ForwardVariance())
    return Diffusion(
        GaussianKernel(), beta, lambda x, t: 0 * x, event_shape=event_shape, readout=readout,
        **options,
    )  # fmt: skip


PRIOR = standard_normal((2,)).prior({})
SHORT = standard_normal((2,), T=2).prior({})
UNITS = standard_normal((), T=3, loc=3.0, scale=2.0).prior({})


def measured(y=None):
    """Two numbers, each measured with noise."""
    numpyro.sample("y", dist.Normal(PRIOR(), SIGMA).to_event(1), obs=y)


def in_plate(y=None, sigma=SIGMA):
    """The same, 200 examples side by side, of two steps: for where none is walked."""
    with numpyro.plate("example", 200):
        numpyro.sample("y", dist.Normal(SHORT(), sigma).to_event(1), obs=y)


def posterior(key, y, bias=0.0, widen=1.0, sigma=SIGMA, num_draws=99):
    """Independent draws of N(y/(1 + σ²), σ²/(1 + σ²)), or beside it."""
    z = jax.random.normal(key, (num_draws, *y.shape))
    return y / (1 + sigma**2) + bias + widen * sigma / np.sqrt(1 + sigma**2) * z


def prior_draws(key, y):
    """Draws that ignore the data."""
    return jax.random.normal(key, (99, *y.shape))


def calibrated(sampler, **options):
    return infer.calibrate(jax.random.key(0), in_plate, sampler, num_simulations=1, **options)


def passes(tree):
    return tree.attrs["least_p_value"] > tree.attrs["bound"]


# what is rejected and what is not


@pytest.mark.long
def test_smc_passes_and_the_rule_of_2015_does_not():
    smc = infer.SMC(measured, num_particles=128, num_runs=2)
    rule = infer.Guided(measured, twist=infer.KernelTwist(), num_samples=256, check=False)
    key = jax.random.key(1)
    assert passes(infer.calibrate(key, measured, smc, num_simulations=150))
    tree = infer.calibrate(key, measured, rule, num_simulations=150)
    assert not passes(tree)
    assert tree.attrs["sampler"] == "Guided" and tree.attrs["num_draws"] == 256


def test_draws_of_the_posterior_have_uniform_ranks():
    tree = infer.calibrate(jax.random.key(0), in_plate, posterior, num_simulations=25)
    assert tree.attrs["num_simulations"] == 5000
    assert passes(tree)


@pytest.mark.parametrize(("bias", "widen"), [(0.3, 1.0), (-0.3, 1.0), (0.0, 1.5), (0.0, 0.67)])
def test_draws_beside_the_posterior_are_rejected(bias, widen):
    tree = calibrated(lambda key, y: posterior(key, y, bias, widen))
    assert not passes(tree)
    pit = tree["prior_sbc"]["x_0"]
    if bias:
        assert (0.5 - float(pit.mean())) * bias > 0  # draws too large: ranks of x_0* too low
    else:
        assert (1 / 12 - float(pit.var())) * (widen - 1) > 0  # too wide: ranks in the middle


def test_draws_that_ignore_the_data_are_rejected_by_log_r_alone():
    tree = calibrated(prior_draws)
    p_values, bound = tree["uniformity"], tree.attrs["bound"]
    assert float(p_values["log_r"]) < 1e-6
    assert float(p_values["x_0"].min()) > bound and float(p_values["projection"].min()) > bound
    assert tree.attrs["least_at"] == "log_r"


def test_a_correlation_left_out_is_rejected_by_projections_alone():
    def sum_measured(y=None):
        with numpyro.plate("example", 400):
            numpyro.sample("y", dist.Normal(SHORT().sum(-1), 0.1), obs=y)

    def entrywise(key, y):
        """The right marginals, independent of each other."""
        z = jax.random.normal(key, (99, *y.shape, 2))
        return y[:, None] / 2.01 + np.sqrt(1 - 1 / 2.01) * z

    tree = infer.calibrate(
        jax.random.key(0), sum_measured, entrywise, num_simulations=1, num_projections=8
    )
    p_values, bound = tree["uniformity"], tree.attrs["bound"]
    assert float(p_values["x_0"].min()) > bound > float(p_values["projection"].min())


# ranks


def test_pits_are_ranks_spread_over_their_cells_with_ties_split():
    """x_0* is the data here, bit for bit; draws are below it, then equal, then above."""
    prior = standard_diffusion(T=4).prior({})  # without units, whose products may be rounded twice

    def exact(y=None):
        with numpyro.plate("example", 2000):
            numpyro.sample("y", dist.Normal(prior(), 1e-12), obs=y)

    def around(key, y):
        steps = jnp.array([-2.0, -1.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0])
        return y + steps[:, None]

    tree = infer.calibrate(jax.random.key(0), exact, around, num_simulations=1)
    pit = tree["prior_sbc"]["x_0"].values.ravel()  # 2 below, 3 equal, of 8: 2/9 + U · 4/9
    assert stats.kstest((pit - 2 / 9) * 9 / 4, "uniform").pvalue > 1e-3


def test_simulated_data_follow_the_program_in_the_users_units():
    seen = []

    def program(sigma, z=None):
        with numpyro.plate("example", 4000):
            numpyro.sample("y", dist.Normal(UNITS(), sigma), obs=z)

    def keep(key, sigma, z):
        seen.append(np.asarray(z))
        return np.zeros((1, *z.shape))

    infer.calibrate(
        jax.random.key(0), program, keep, num_simulations=2, observed={"y": "z"}, sigma=1.5
    )
    assert not np.allclose(seen[0], seen[1])
    for z in seen:
        assert stats.kstest(z, stats.norm(3, np.hypot(2, 1.5)).cdf).pvalue > 1e-3


def test_num_draws_takes_draws_evenly_spread():
    def ladder(key, y):
        return jnp.linspace(-1e3, 1e3, 1001)[:, None, None] + jnp.zeros(y.shape)

    pit = calibrated(ladder, num_draws=2)["prior_sbc"]["x_0"].values
    assert ((pit > 1 / 3) & (pit < 2 / 3)).all()  # between the first and the last
    assert calibrated(ladder, num_draws=2).attrs["num_draws"] == 2


def test_symbols_are_ranked_too():
    bits = Diffusion(
        BernoulliKernel(0.5), schedules.harmonic(5), lambda x, t: 0.0 * x, event_shape=(3,)
    ).prior({})

    def flipped(y=None):
        with numpyro.plate("example", 300):
            x = bits()
            numpyro.sample("y", dist.Bernoulli(0.1 + 0.8 * x).to_event(1), obs=y)

    def exact(key, y):
        return jax.random.bernoulli(key, 0.1 + 0.8 * y, (50, *y.shape)).astype(jnp.int32)

    def ignorant(key, y):
        return jax.random.bernoulli(key, 0.5, (50, *y.shape)).astype(jnp.int32)

    options = {"num_simulations": 1}
    assert passes(infer.calibrate(jax.random.key(0), flipped, exact, **options))
    tree = infer.calibrate(jax.random.key(0), flipped, ignorant, **options)
    assert tree.attrs["least_at"] == "log_r" and not passes(tree)


# what comes back


def test_the_tree_holds_named_pits_and_is_kept_by_netcdf(tmp_path):
    tree = calibrated(posterior, sigma=0.7)
    group = tree["prior_sbc"]
    assert dict(group.sizes) == {"chain": 1, "draw": 200, "x_0_dim_0": 2, "direction": 4}
    assert all(((pit > 0) & (pit < 1)).all() for pit in group.data_vars.values())
    assert tree.attrs["sampler"] == "posterior" and tree.attrs["num_simulations"] == 200
    assert tree.attrs["num_tests"] == 7 and tree.attrs["bound"] == 0.01 / 7
    least = min(float(p.min()) for p in tree["uniformity"].data_vars.values())
    assert tree.attrs["least_p_value"] == least
    tree.to_netcdf(tmp_path / "sbc.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "sbc.nc", engine="h5netcdf") as back:
        xr.testing.assert_equal(back.load(), tree)
        assert back.attrs["least_at"] == tree.attrs["least_at"]


def test_arviz_reads_the_tree():
    shown = arviz_plots.plot_ecdf_pit(calibrated(posterior), group="prior_sbc", coverage=False)
    titles = {ax.get_title() for ax in shown.viz["figure"].item().axes}
    plt.close("all")
    assert any("log_r" in title for title in titles) and any("x_0" in title for title in titles)


def test_a_key_gives_the_same_pits_again():
    xr.testing.assert_equal(calibrated(posterior), calibrated(posterior))


def test_warnings_of_single_runs_are_counted_and_others_pass():
    runs = iter(range(3))

    def warns(key, y):
        category = DeprecationWarning if next(runs) == 0 else infer.InferenceWarning
        warnings.warn("text", category, stacklevel=1)
        return posterior(key, y)

    with pytest.warns(DeprecationWarning, match="text") as caught:
        tree = infer.calibrate(jax.random.key(0), in_plate, warns, num_simulations=3)
    assert tree.attrs["num_warned"] == 2 and len(caught) == 1


# refusals


def scaled(y=None):
    with numpyro.handlers.scale(scale=2.0):
        measured(y)


def fixed(y=None):
    measured(y)
    numpyro.factor("more", 1.0)


def unknown(data=None):
    numpyro.sample("y", dist.Normal(PRIOR(), SIGMA).to_event(1), obs=data)


def alone():
    PRIOR()


def twice(y=None):
    measured(y)
    with numpyro.handlers.scope(prefix="again"):
        UNITS()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (scaled, "must not be scaled"),
        (fixed, "site 'more' must be drawn"),
        (unknown, "site 'y' must take its value from an argument 'y'"),
        (alone, "must hold a site to observe"),
        (twice, "must call a prior made by Diffusion.prior exactly once"),
    ],
)
def test_programs_that_cannot_be_simulated_are_refused(program, message):
    with pytest.raises(ValueError, match=message):
        infer.calibrate(jax.random.key(0), program, posterior)


def test_a_prior_that_a_handler_changes_is_refused():
    """Its draws are simulated as they would be without; their posterior would not be."""

    def program(y=None):
        with numpyro.handlers.mask(mask=False):
            x = SHORT()
        numpyro.sample("y", dist.Normal(x, SIGMA).to_event(1), obs=y)

    with pytest.raises(ValueError, match="must keep its density at site 'x_0_trajectory'"):
        infer.calibrate(jax.random.key(0), program, posterior, num_simulations=1)


def test_a_latent_with_a_substituted_value_is_no_data():
    def program(y=None):
        in_plate(y, numpyro.sample("sigma", dist.HalfNormal(1.0)))

    program = numpyro.handlers.substitute(program, {"sigma": jnp.array(SIGMA)})
    tree = infer.calibrate(jax.random.key(0), program, posterior, num_simulations=1)
    assert passes(tree) and tree.attrs["num_simulations"] == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_simulations": 0}, "num_simulations must be at least 1; got 0"),
        ({"num_draws": 0}, "num_draws must be at least 1; got 0"),
        ({"num_draws": 100}, "num_draws must be at most the 99 draws of the sampler; got 100"),
        ({"num_projections": -1}, "num_projections must be at least 0; got -1"),
        ({"observed": {"z": "y"}}, r"observed must name sites among \['y'\]; got \['z'\]"),
        ({"y": np.zeros((200, 2))}, "site 'y' must be drawn where the arguments"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        infer.calibrate(
            jax.random.key(0), in_plate, posterior, **({"num_simulations": 1} | options)
        )


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (lambda key, y: jnp.zeros((9, 200)), r"draws of shape \(M, 200, 2\); got \(9, 200\)"),
        (lambda key, y: jnp.full((9, *y.shape), jnp.nan), "finite draws"),
        (infer.SMC, "must be made with its program first"),
    ],
)
def test_bad_samplers_are_refused(sampler, message):
    with pytest.raises(ValueError, match=message):
        calibrated(sampler)


# a trained prior


@pytest.mark.slow
def test_on_a_trained_roll_smc_passes_and_the_rule_of_2015_does_not():
    jax.config.update("jax_disable_most_optimizations", False)
    keys = jax.random.split(jax.random.key(0), 3)
    x = datasets.swiss_roll(keys[0], 10_000, noise=0.1)
    beta = schedules.log_snr_linear(T=40, beta_1=1e-4, alpha_bar_T=1e-3)
    network = networks.Perceptron(event_shape=(2,), width=64, depth=3, T=40, rngs=nnx.Rngs(0))
    diffusion = Diffusion(GaussianKernel(), beta, network, event_shape=(2,))
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(2e-3), SampledTimeELBO())
    fitted = fit(keys[1], svi, x, num_steps=2_000, batch_size=512, ema_decay=0.999)
    prior = diffusion.prior(fitted.params)

    def noisy(y=None):
        numpyro.sample("y", dist.Normal(prior(), 0.5).to_event(1), obs=y)

    smc = infer.SMC(noisy, num_particles=256, num_runs=2)
    rule = infer.Guided(noisy, twist=infer.KernelTwist(), num_samples=512, check=False)
    assert passes(infer.calibrate(keys[2], noisy, smc))
    assert not passes(infer.calibrate(keys[2], noisy, rule))
