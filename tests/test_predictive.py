"""Predictive checks: PITs uniform under the right law, not under a wrong one; ArviZ draws them."""

import warnings

import arviz_plots
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy import stats

from fresh import check_in_fresh_process
from oracles import exact_gaussian
from probdiff import BernoulliKernel, Diffusion, diagnostics, schedules

MEAN, SD = np.array([0.3, -0.5]), np.array([0.9, 0.6])
RIGHT = exact_gaussian(MEAN, SD, T=10)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def data(seed=0, n=1_000):
    draws = np.random.default_rng(seed).standard_normal((n, 2))
    return np.asarray(MEAN + SD * draws, np.float32)


def check(diffusion, x, key=0, **options):
    return diagnostics.predictive_check(jax.random.key(key), diffusion, {}, x, **options)


STATISTICS = {"sum": lambda x: x.sum(-1), "product": lambda x: jnp.prod(x, axis=-1)}


@pytest.fixture(scope="module")
def tree():
    return check(RIGHT, data(), num_replicates=50, statistics=STATISTICS)


# PITs


def test_pits_of_the_right_model_are_uniform(tree):
    assert tree.attrs["num_tests"] == 4 and tree.attrs["bound"] == 0.01 / 4
    assert tree.attrs["least_p_value"] > tree.attrs["bound"]
    pits = np.column_stack([tree["pit"]["x_0"], tree["pit"]["sum"], tree["pit"]["product"]])
    for pit, p in zip(pits.T, [*tree["uniformity"]["x_0"].values, None, None], strict=True):
        assert stats.kstest(pit, "uniform").pvalue > 1e-3
        assert p is None or p == pytest.approx(stats.kstest(pit, "uniform").pvalue)
        assert abs(pit.mean() - 0.5) < 4 * np.sqrt(1 / 12 / 1_000)


def test_p_values_are_uniform_whatever_the_number_of_replicates():
    """150 data sets of 20 examples and 1 or 3 replicates; two coordinates each, independent."""
    for num_replicates in (1, 3):
        x = data(1, 150 * 20)
        pit = check(RIGHT, x, num_replicates=num_replicates)["pit"]["x_0"].values
        p_values = [stats.kstest(part, "uniform").pvalue for part in np.split(pit[:, 0], 150)]
        p_values += [stats.kstest(part, "uniform").pvalue for part in np.split(pit[:, 1], 150)]
        assert stats.kstest(p_values, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("wrong", [0.75, 0.95])
def test_a_wrong_sd_is_rejected_where_it_is_wrong_and_by_the_right_sign(wrong):
    tree = check(exact_gaussian(MEAN, np.array([wrong, 0.6]), T=10), data(n=8_000))
    pit, p = tree["pit"]["x_0"].values, tree["uniformity"]["x_0"].values
    assert p[0] < tree.attrs["bound"] < 1e-2 < p[1]
    assert tree.attrs["least_at"] == "x_0[0]" and tree.attrs["least_p_value"] == p[0]
    spread = (np.abs(pit[:, 0] - 0.5) - 0.25).mean() / np.sqrt(1 / 48 / 8_000)
    assert spread > 4 if wrong < 0.9 else spread < -4


def test_a_statistic_sees_what_no_coordinate_does():
    """Data of correlation 0.9 and the right marginals, under a model of independent entries."""
    z = np.random.default_rng(2).standard_normal((1_000, 2))
    z[:, 1] = 0.9 * z[:, 0] + np.sqrt(1 - 0.81) * z[:, 1]
    x = np.asarray(MEAN + SD * z, np.float32)
    tree = check(RIGHT, x, statistics={"difference": lambda x: x[..., 0] - x[..., 1]})
    assert (tree["uniformity"]["x_0"] > 1e-3).all()
    assert tree.attrs["least_at"] == "difference" and tree.attrs["least_p_value"] < 1e-10


def fair_coins(size=2):
    """Stationary from the start: x_0 is a fair coin whatever was above it."""
    beta = schedules.linear(3, beta_1=0.5, beta_T=0.9)
    return Diffusion(
        BernoulliKernel(0.5), beta, lambda x_t, t: jnp.zeros(x_t.shape), event_shape=(size,)
    )


def test_ties_are_broken_at_random():
    """Fair coins: uniform. Always 1, with B of 9 replicates below: mean E[B + (10 − B)/2] / 10."""
    x = np.random.default_rng(3).integers(0, 2, (2_000, 2)).astype(np.int32)
    pit = check(fair_coins(), x, num_replicates=9)["pit"]["x_0"].values
    assert all(stats.kstest(p, "uniform").pvalue > 1e-3 for p in pit.T)
    ones = np.ones((2_000, 2), np.int32)
    tree = check(fair_coins(), ones, num_replicates=9)
    assert tree.attrs["least_p_value"] < 1e-10
    pit = tree["pit"]["x_0"].values
    assert abs(pit.mean() - 0.725) < 4 * pit.std() / np.sqrt(4_000)


def test_contexts_go_with_their_examples():
    """The context is the mean: with rows mixed up most PITs would be near 0 or 1."""
    fixed = exact_gaussian(np.zeros(1), np.full(1, 0.5), T=10)

    def network(x_t, t, context):
        outputs = fixed.network(x_t, t)
        step = fixed.bind({}).steps.at(t, 1)
        variance = 1 / (1 / 0.5**2 + step.alpha_bar_t / step.noise_t)
        return outputs + jnp.concatenate([variance * context / 0.5**2, 0 * context], -1)

    diffusion = Diffusion(
        fixed.kernel, fixed.schedule, network, event_shape=(1,), readout=fixed.readout,
        last_step=fixed.last_step, context_shape=(1,),
    )  # fmt: skip
    context = np.linspace(-2, 2, 500, dtype=np.float32)[:, None]
    x = context + np.float32(0.5) * np.random.default_rng(4).standard_normal((500, 1))
    tree = check(diffusion, x.astype(np.float32), context=context, num_replicates=5, block_size=700)
    assert tree.attrs["least_p_value"] > 1e-3
    gap = tree["posterior_predictive"]["x_0"].values[0] - context
    assert abs(gap.std() - 0.5) < 0.02


# groups


def test_groups_have_the_dims_that_arviz_expects(tree):
    predictive, observed = tree["posterior_predictive"], tree["observed_data"]
    assert predictive["x_0"].dims == ("chain", "draw", "example", "x_0_dim_0")
    assert dict(predictive.sizes) == {"chain": 1, "draw": 50, "example": 1_000, "x_0_dim_0": 2}
    assert predictive["sum"].dims == ("chain", "draw", "example")
    assert observed["x_0"].dims == tree["pit"]["x_0"].dims == ("example", "x_0_dim_0")
    assert observed["sum"].dims == tree["pit"]["sum"].dims == ("example",)
    assert tree["uniformity"]["x_0"].dims == ("x_0_dim_0",)
    np.testing.assert_array_equal(observed["x_0"], data())
    np.testing.assert_allclose(predictive["sum"], predictive["x_0"].sum("x_0_dim_0"), rtol=1e-5)
    draws = predictive["x_0"].values.reshape(-1, 2)
    assert (np.abs(draws.mean(0) - MEAN) < 4 * SD / np.sqrt(50_000)).all()


PLOTS = {
    "plot_ppc_dist": {},
    "plot_ppc_pit": {"coords": {"x_0_dim_0": 1}},
    "plot_ppc_tstat": {},
    "plot_ecdf_pit": {"group": "pit", "sample_dims": ["example"], "coverage": False},
}


@pytest.mark.parametrize("plot", PLOTS)
def test_arviz_draws_it_as_it_is(tree, plot):
    with warnings.catch_warnings():
        # ArviZ's own, of an index of xarray that it drops by an older rule
        warnings.filterwarnings("ignore", "Deleting a single level", FutureWarning)
        collection = getattr(arviz_plots, plot)(tree, backend="matplotlib", **PLOTS[plot])
    assert collection.viz["figure"].item().axes[0].lines


@pytest.mark.long
def test_it_is_plotted_from_its_file_without_the_package(tree, tmp_path):
    check_in_fresh_process(
        tree,
        tmp_path / "check.nc",
        """
        look = {"backend": "matplotlib"}
        arviz_plots.plot_ppc_dist(tree, var_names=["sum"], **look)
        arviz_plots.plot_ppc_pit(tree, var_names=["sum", "product"], **look)
        arviz_plots.plot_ppc_tstat(tree, **look)
        arviz_plots.plot_ecdf_pit(
            tree, group="pit", sample_dims=["example"], coverage=False, **look
        )
        assert tree.attrs["num_tests"] == 4
        """,
    )


# refusals

BAD = {
    r"x_0 must have shape \(N, 2\) with N at least 2": {"x": np.zeros((1, 2), np.float32)},
    "num_replicates must be at least 1; got 0": {"num_replicates": 0},
    r"statistics\['max'\] must map examples \(6, 2\) to numbers \(6,\); got \(\)": {
        "statistics": {"max": np.max}
    },
    r"statistics\['log'\] must be a number": {"statistics": {"log": lambda x: np.nan * x[..., 0]}},
    r"statistics must have names other than .*; got \['x_0'\]": {
        "statistics": {"x_0": lambda x: x[..., 0]}
    },
    "context must be given exactly where": {"context": np.zeros((6, 1))},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_name(message):
    options = {"x": data(n=6)} | BAD[message]
    with pytest.raises(ValueError, match=message):
        check(RIGHT, options.pop("x"), **options)
