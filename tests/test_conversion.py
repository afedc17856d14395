"""Runs as DataTrees: every axis under its name, whatever sampled it and wherever a plate stands."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray as xr
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.mcmc import MCMCKernel

from fresh import check_in_fresh_process
from probdiff import Diffusion, GaussianKernel, diagnostics, fit, infer, readouts, schedules

T = 5
FORWARD = readouts.Perturbation(readouts.ForwardVariance())


def standard(T=T, event_shape=(2,), **options):
    """x_0 ~ N(0, 1), entry by entry."""
    beta = schedules.linear(T, beta_1=0.2, beta_T=0.7)
    return Diffusion(
        GaussianKernel(), beta, lambda x_t, t: 0 * x_t, event_shape=event_shape, readout=FORWARD,
        **options,
    )  # fmt: skip


PRIOR = standard().prior({})


class Drawn(NamedTuple):
    """State of `Draws`."""

    z: dict
    diverging: jax.Array
    rng_key: jax.Array


class Draws(MCMCKernel):
    """A sampler of the prior and of the deterministic sites: cheap, where names are at stake."""

    sample_field = "z"
    default_fields = ("z", "diverging")

    def __init__(self, model):
        self.model = model

    def init(self, rng_key, num_warmup, init_params, model_args, model_kwargs):
        first = Drawn({}, jnp.array(False), rng_key)
        return jax.jit(lambda state: self.sample(state, model_args, model_kwargs))(first)

    def sample(self, state, model_args, model_kwargs):
        key, key_next = jax.random.split(state.rng_key)
        sites = handlers.trace(handlers.seed(self.model, key)).get_trace(*model_args)
        kinds = ("sample", "deterministic")
        z = {
            name: site["value"]
            for name, site in sites.items()
            if site["type"] in kinds and not site.get("is_observed", False)
        }
        return Drawn(z, jnp.array(False), key_next)


def sampled(program, *args, kernel=Draws, extra_fields=(), num_chains=1, thinning=1):
    """A run of few steps: it is about names."""
    mcmc = MCMC(
        kernel(program), num_warmup=1, num_samples=6, num_chains=num_chains,
        chain_method="sequential", thinning=thinning, progress_bar=False,
    )  # fmt: skip
    mcmc.run(jax.random.key(0), *args, extra_fields=extra_fields)
    return mcmc


def tree_of(program, *args, **options):
    return diagnostics.to_datatree(sampled(program, *args, **options))


def rows(y=None):
    """Three points in a plate, one of them observed at a time."""
    with numpyro.plate("rows", 3):
        x = PRIOR()
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)
        numpyro.factor("pull", -0.1 * x.sum(-1) ** 2)
        numpyro.deterministic("norm", jnp.linalg.norm(x, axis=-1))
        numpyro.deterministic("twice", 2 * x)
    return x


Y = np.arange(6, dtype=np.float32).reshape(3, 2) / 6


# dims of samples


def test_levels_and_noise_have_their_names():
    centred = tree_of(rows, Y)["posterior"]
    assert centred["x_0_trajectory"].dims == ("chain", "draw", "rows", "step", "x_0_dim_0")
    assert centred["step"].values.tolist() == [1, 2, 3, 4, 5]
    tree = tree_of(infer.noncentered(rows, steps=3), Y)
    noise = tree["posterior"]
    assert noise["x_0_noise"].dims == ("chain", "draw", "rows", "level", "x_0_dim_0")
    assert noise["level"].values.tolist() == [0, 1, 2, 3]
    assert noise["t"].dims == ("level",) and noise["t"].values.tolist() == [0, 1, 3, 5]
    for group in (centred, noise):
        assert group["x_0"].dims == ("chain", "draw", "rows", "x_0_dim_0")
        assert group["norm"].dims == ("chain", "draw", "rows")
        assert group["twice"].dims == ("chain", "draw", "rows", "twice_dim_1")
        assert dict(group.sizes)["draw"] == 6
        np.testing.assert_allclose(group["twice"], 2 * group["x_0"], rtol=1e-6)
    assert list(tree["observed_data"].data_vars) == ["y"]  # no factor
    assert tree["observed_data"]["y"].dims == ("rows", "y_dim_1")
    np.testing.assert_array_equal(tree["observed_data"]["y"], Y)


def test_values_are_those_of_the_run():
    mcmc = sampled(rows, Y, num_chains=2, thinning=2)
    posterior, draws = diagnostics.to_datatree(mcmc)["posterior"], mcmc.get_samples(True)
    assert set(posterior.data_vars) == set(draws) and posterior.sizes["draw"] == 3
    for name, value in draws.items():
        np.testing.assert_array_equal(posterior[name], value)
    at = posterior["x_0_trajectory"].sel(step=4, rows=1, chain=1, draw=2)
    np.testing.assert_array_equal(at, draws["x_0_trajectory"][1, 2, 1, 3])


def crossed(y=None):
    """Plates with a gap between them, out of order, and one latent in none of them."""
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
    places = numpyro.plate("places", 4, dim=-1)
    with numpyro.plate("run", 2, dim=-3), places:
        x = PRIOR()
        numpyro.sample("y", dist.Normal(x.sum(-1), 0.1 + scale), obs=y)
    with places:
        numpyro.sample("offset", dist.Normal(weights[0], 1.0), obs=0.0)
        numpyro.deterministic("global", weights)


def test_plates_keep_their_names_across_gaps():
    y = np.zeros((2, 1, 4), np.float32)
    tree = tree_of(crossed, y)
    posterior, observed = tree["posterior"], tree["observed_data"]
    plates = ("chain", "draw", "run_plate", "plate_dim_1", "places")
    assert posterior["x_0"].dims == (*plates, "x_0_dim_0")
    assert posterior["x_0_trajectory"].dims == (*plates, "step", "x_0_dim_0")
    assert posterior["scale"].dims == ("chain", "draw")
    assert posterior["weights"].dims == ("chain", "draw", "weights_dim_0")
    assert posterior["global"].dims == ("chain", "draw", "global_dim_0")
    assert observed["y"].dims == ("run_plate", "y_dim_1", "places")
    assert observed["offset"].dims == ("places",) and observed.sizes["places"] == 4


@pytest.mark.long
def test_mcmc_and_smc_of_a_program_have_the_same_dims():
    smc = infer.SMC(rows, num_particles=128, num_runs=2)
    smc.run(jax.random.key(0), Y)
    theirs = diagnostics.to_datatree(smc)
    xr.testing.assert_identical(
        theirs["posterior"]["x_0"].drop_attrs(), smc.to_datatree()["posterior"]["x_0"].drop_attrs()
    )
    for program in (rows, infer.noncentered(rows)):
        ours = tree_of(program, Y)
        for name in ("x_0", "norm"):
            assert ours["posterior"][name].dims == theirs["posterior"][name].dims
        for name, value in theirs["observed_data"].data_vars.items():
            xr.testing.assert_equal(ours["observed_data"][name], value)


@pytest.mark.long
def test_diffusions_of_different_lengths_count_their_own_steps():
    first, second = standard(name="a").prior({}), standard(T=3, name="b", event_shape=()).prior({})

    def program():
        with numpyro.plate("step", 2):
            numpyro.sample("y", dist.Normal(first().sum(-1) + second(), 1.0), obs=0.0)

    posterior = tree_of(program)["posterior"]
    assert posterior["a_trajectory"].dims == ("chain", "draw", "step", "a_step", "a_dim_0")
    assert posterior["b_trajectory"].dims == ("chain", "draw", "step", "b_step")
    assert posterior["b_step"].values.tolist() == [1, 2, 3]
    noise = tree_of(infer.noncentered(program))["posterior"]
    assert noise["a_noise"].dims == ("chain", "draw", "step", "a_level", "a_dim_0")
    assert noise["b_noise"].dims == ("chain", "draw", "step", "b_level")
    assert noise["b_t"].values.tolist() == [0, 1, 2, 3]


def test_known_entries_keep_the_axes_of_x_0():
    def program():
        x = PRIOR(known=np.array([0.5, 0.0], np.float32), mask=np.array([True, False]))
        numpyro.sample("y", dist.Normal(x[1], 1.0), obs=0.3)

    posterior = tree_of(program)["posterior"]
    assert posterior["x_0"].dims == ("chain", "draw", "x_0_dim_0")
    assert (posterior["x_0"].sel(x_0_dim_0=0) == 0.5).all()


def test_sites_for_every_level_have_the_axes_of_x_0():
    program = handlers.condition(standard().model_by_step, data={"x_0": np.zeros(2, np.float32)})
    posterior = tree_of(program)["posterior"]
    assert all(value.dims == ("chain", "draw", "x_0_dim_0") for value in posterior.values())
    assert set(posterior.data_vars) == {f"x_0_trajectory_{t}" for t in range(1, T + 1)}


@pytest.mark.long
def test_nuts_over_noise_leaves_x_0_and_statistics_named_as_arviz_does():
    fields = ("potential_energy", "num_steps", "accept_prob", "adapt_state.step_size", "energy")
    mcmc = sampled(infer.noncentered(rows), Y, kernel=NUTS, extra_fields=fields)
    tree, given = diagnostics.to_datatree(mcmc), mcmc.get_extra_fields(True)
    assert tree["posterior"]["x_0_noise"].dims == ("chain", "draw", "rows", "level", "x_0_dim_0")
    np.testing.assert_array_equal(tree["posterior"]["x_0"], mcmc.get_samples(True)["x_0"])
    stats = tree["sample_stats"]
    names = {"diverging", "lp", "n_steps", "tree_depth", "acceptance_rate", "step_size", "energy"}
    assert set(stats.data_vars) == names
    assert all(value.dims == ("chain", "draw") for value in stats.values())
    np.testing.assert_array_equal(stats["lp"], -given["potential_energy"])
    steps, depth = stats["n_steps"].values, stats["tree_depth"].values
    assert (2 ** (depth - 1) <= steps).all() and (steps < 2**depth).all()
    assert stats["diverging"].dtype == bool and tree.attrs["sampler"] == "NUTS"


# fits


@pytest.fixture(scope="module")
def fitted():
    diffusion = standard()
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), Trace_ELBO())
    x = np.random.default_rng(0).standard_normal((8, 2)).astype(np.float32)
    options = {"held_out": x, "evaluate_every": 2, "progress": False}
    return fit(jax.random.key(0), svi, x, num_steps=5, **options), svi, x


def test_losses_have_the_step_they_belong_to(fitted):
    result, svi, x = fitted
    tree = diagnostics.to_datatree(result)
    assert list(tree.children) == ["training", "held_out"]
    assert tree["training"]["step"].values.tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(tree["training"]["loss"], result.losses)
    assert tree["held_out"]["step"].values.tolist() == [2, 4, 5]
    np.testing.assert_array_equal(tree["held_out"]["loss"], result.held_out_losses.loss)
    stock = svi.run(jax.random.key(0), 4, x, progress_bar=False)
    tree = diagnostics.to_datatree(stock)
    assert list(tree.children) == ["training"] and tree.attrs["num_steps"] == 4
    np.testing.assert_array_equal(tree["training"]["loss"], stock.losses)


def test_draws_of_the_guide_are_the_forward_trajectory_with_its_names(fitted):
    result, svi, x = fitted
    tree = diagnostics.to_datatree(result, x, svi=svi, key=jax.random.key(1), num_draws=2_000)
    trajectory = tree["posterior"]["x_0_trajectory"]
    assert trajectory.dims == ("chain", "draw", "data", "step", "x_0_dim_0")
    assert tree["observed_data"]["x_0"].dims == ("data", "x_0_dim_0")
    np.testing.assert_array_equal(tree["observed_data"]["x_0"], x)
    rates = schedules.linear(T, beta_1=0.2, beta_T=0.7)
    signal = xr.DataArray(np.cumprod(1 - rates), {"step": trajectory["step"]})
    gap = trajectory - np.sqrt(signal) * tree["observed_data"]["x_0"]
    z = gap.mean(("chain", "draw", "data", "x_0_dim_0")) / np.sqrt((1 - signal) / (2_000 * 16))
    assert (abs(z) < 4).all()


@pytest.mark.long
def test_an_autoguide_gives_noise_and_the_x_0_that_follows():
    program = infer.noncentered(rows)
    svi = SVI(program, AutoNormal(program), optax.adam(1e-3), Trace_ELBO())
    result = svi.run(jax.random.key(0), 3, Y, progress_bar=False)
    tree = diagnostics.to_datatree(result, y=Y, svi=svi, key=jax.random.key(1), num_draws=7)
    posterior = tree["posterior"]
    assert set(posterior.data_vars) == {"x_0_noise", "x_0", "norm", "twice"}
    assert posterior["x_0_noise"].dims == ("chain", "draw", "rows", "level", "x_0_dim_0")
    assert posterior["x_0"].dims == ("chain", "draw", "rows", "x_0_dim_0")
    noise = {"x_0_noise": posterior["x_0_noise"].values[0, 3]}
    with handlers.seed(rng_seed=0), handlers.substitute(data=noise):
        np.testing.assert_allclose(program(Y), posterior["x_0"][0, 3], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(posterior["twice"], 2 * posterior["x_0"], rtol=1e-6)
    assert list(tree.children) == ["posterior", "observed_data", "training"]


# files


def test_a_run_is_plotted_from_its_file_without_the_package(tmp_path):
    tree = tree_of(rows, Y)
    check_in_fresh_process(
        tree,
        tmp_path / "run.nc",
        """
        posterior = tree["posterior"]
        assert posterior["x_0_trajectory"].dims == ("chain", "draw", "rows", "step", "x_0_dim_0")
        assert tree["sample_stats"]["diverging"].dtype == bool
        arviz_plots.plot_forest(tree, var_names=["x_0"], backend="matplotlib")
        arviz_plots.plot_trace(tree, var_names=["norm"], backend="matplotlib")
        """,
    )


def test_a_fit_is_plotted_from_its_file_without_the_package(fitted, tmp_path):
    result, svi, x = fitted
    check_in_fresh_process(
        diagnostics.to_datatree(result, x, svi=svi, key=jax.random.key(1), num_draws=20),
        tmp_path / "fit.nc",
        """
        (line,) = tree["training"]["loss"].plot()
        assert len(line.get_xdata()) == 5 and tree["held_out"].sizes["step"] == 3
        arviz_plots.plot_dist(tree, coords={"data": 0}, backend="matplotlib")
        """,
    )


# refusals


def test_what_holds_no_draws_or_arguments_astray_is_refused(fitted):
    result, svi, x = fitted
    unrun = MCMC(NUTS(rows), num_warmup=1, num_samples=1)
    of_energy = MCMC(NUTS(potential_fn=jnp.sum), num_warmup=1, num_samples=1)
    key = jax.random.key(0)
    for message, call in {
        "source must have run": lambda: diagnostics.to_datatree(unrun),
        "source must sample a program; got NUTS": lambda: diagnostics.to_datatree(of_energy),
        "must come with a fit; .* got them with MCMC": lambda: diagnostics.to_datatree(unrun, x),
        "svi and key must be given together": lambda: diagnostics.to_datatree(result, x, svi=svi),
        "must come with svi": lambda: diagnostics.to_datatree(result, x),
        "num_draws must be at least 1; got 0": lambda: diagnostics.to_datatree(
            result, x, svi=svi, key=key, num_draws=0
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
