"""The ladder against exact log p(x_0): of Gaussians, right and wrong, and of a few bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr
from flax import nnx
from numpyro.infer import SVI

from fresh import check_in_fresh_process
from oracles import enumerate_diffusion, exact_gaussian, gaussian_law, gaussian_network, log_normal
from probdiff import (
    AbsorbingKernel,
    BernoulliKernel,
    CategoricalKernel,
    Diffusion,
    GaussianKernel,
    SampledTimeELBO,
    diagnostics,
    fit,
    networks,
    readouts,
    schedules,
)
from probdiff.diagnostics import LadderWarning

pytestmark = pytest.mark.filterwarnings("ignore::probdiff.diagnostics.LadderWarning")
MEAN, SD = np.array([0.3, -0.5]), np.array([0.9, 0.6])
# A network that holds the data for wider than they are, of a diffusion that ends before noise
RATES = schedules.log_snr_linear(8, beta_1=0.01, alpha_bar_T=0.6)
WRONG = Diffusion(
    GaussianKernel(),
    RATES,
    gaussian_network(MEAN, 2.5 * SD, RATES),
    event_shape=(2,),
    readout=readouts.Data(),
    last_step=readouts.Learned(),
    loc=0.1,
    scale=1.2,
)


def of_wrong():
    """Mean and sd of what the wrong diffusion draws, the user's units."""
    mean, sd = gaussian_law(WRONG)
    return 0.1 + 1.2 * mean, 1.2 * sd


@pytest.fixture(scope="module")
def rungs():
    mean, sd = of_wrong()
    x = np.asarray(mean + sd * np.random.default_rng(0).standard_normal((150, 2)), np.float32)
    tree = diagnostics.ladder(
        jax.random.key(0), WRONG, {}, x, sizes=(1, 10, 100), num_repeats=8, num_draws=50
    )
    return tree["ladder"], log_normal(x, mean, sd).sum(1)


def z(group, name, exact):
    return (group[name].values - exact) / group[f"{name}_se"].values


@pytest.mark.long
def test_every_rung_of_the_exact_diffusion_is_the_log_density():
    """Where the weights do not vary at all; SMC resamples nothing and pays for π on the way."""
    diffusion = exact_gaussian(MEAN, SD)
    x = np.asarray(MEAN + SD * np.random.default_rng(1).standard_normal((50, 2)), np.float32)
    exact = log_normal(x, MEAN, SD).sum(1)
    g = diagnostics.ladder(
        jax.random.key(0), diffusion, {}, x, sizes=(1, 100), num_repeats=10, num_draws=100
    )["ladder"]
    np.testing.assert_allclose(g["importance"], np.stack([exact, exact], 1), atol=2e-4)
    assert np.abs(z(g, "bound", exact)).max() < 4.5
    assert abs(np.mean(g["smc"] - exact)) < 3 * np.std(g["smc"] - exact) / np.sqrt(50)


@pytest.mark.long
def test_last_rung_and_smc_reach_the_density_of_a_wrong_diffusion(rungs):
    g, exact = rungs
    for found in (g["importance"][:, -1].values, g["smc"].values):
        gap = found - exact
        assert abs(gap.mean()) < 3 * gap.std(ddof=1) / np.sqrt(len(gap)) + 5e-3
    assert float(g["bound_mean"]) < exact.mean() - 0.05  # there is something to climb


@pytest.mark.long
def test_rungs_do_not_fall_and_stay_below(rungs):
    """Within one set of weights L_S grows by Jensen's inequality, not only on average."""
    g, exact = rungs
    assert (np.diff(g["importance"], axis=1) >= -1e-9).all()
    for name in ("bound", "importance", "smc"):
        means = np.atleast_1d(g[f"{name}_mean"])
        paired = g[name].values.reshape(len(exact), -1) - exact[:, None]
        assert (means - exact.mean() < 3 * paired.std(0, ddof=1) / np.sqrt(len(exact))).all()


@pytest.mark.long
def test_first_rung_is_the_bound(rungs):
    g, _ = rungs
    gap = (g["importance"].sel(size=1) - g["bound"]).values
    assert abs(gap.mean()) < 4 * gap.std(ddof=1) / np.sqrt(len(gap))


@pytest.mark.long
def test_bounds_from_both_sides_close_in_on_the_log_density():
    g, draws = (
        diagnostics.sandwich(jax.random.key(1), WRONG, {}, 400, sizes=(1, 10, 100))[name]
        for name in ("sandwich", "draws")
    )
    mean, sd = of_wrong()
    x = draws["x_0"].values
    assert np.abs(x.mean(0) - mean).max() < 4 * sd.max() / 20
    exact = log_normal(x, mean, sd).sum(1)
    for name, sign in (("lower", 1), ("upper", -1)):
        gap = sign * (g[name].values - exact[:, None])
        assert (gap.mean(0) < 3 * gap.std(0, ddof=1) / 20 + 1e-4).all()
    assert (np.diff(g["gap_mean"]) < 0).all()
    assert 0 < float(g["gap_mean"][-1]) < 0.02


@pytest.mark.long
def test_stated_intervals_cover_as_they_say():
    """2,000 repetitions: each example's own intervals, of what E log Ẑ and L_S are."""
    mean, sd = of_wrong()
    one = np.asarray([mean + 0.7 * sd], np.float32)
    # The truth of L_10 by many weights, whose error is a tenth of an interval's reach
    many = diagnostics.ladder(jax.random.key(7), WRONG, {}, one, sizes=(10, 10_000), num_repeats=40)
    truth = float(many["ladder"]["importance"].sel(size=10)[0])
    x = np.repeat(one, 2_000, 0)
    g = diagnostics.ladder(
        jax.random.key(2), WRONG, {}, x, sizes=(10, 100), num_repeats=5, num_draws=2
    )["ladder"]
    exact = log_normal(one, mean, sd).sum()
    by_size = g["importance_low"].values, g["importance_high"].values
    ends = {"L_10": [end[:, 0] for end in by_size], "L_100": [end[:, 1] for end in by_size]}
    ends["SMC"] = g["smc_low"].values, g["smc_high"].values
    for name, (low, high) in ends.items():
        value = truth if name == "L_10" else exact
        covered = np.mean((low <= value) & (value <= high))
        assert 0.93 <= covered <= 0.97, (name, covered)


# bits: a trained diffusion, enumerated


@pytest.fixture(scope="module")
def trained():
    """Seven bits with a 1 in every third, learned a little."""
    diffusion = Diffusion(
        BernoulliKernel(0.3),
        schedules.harmonic(8),
        networks.Perceptron((7,), 16, 2, 8, outputs=1, rngs=nnx.Rngs(0)),
        event_shape=(7,),
    )
    phase = np.random.default_rng(0).integers(0, 3, 2_000)
    data = (np.arange(7) % 3 == phase[:, None]).astype(np.int32)
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(5e-3), SampledTimeELBO())
    fitted = fit(jax.random.key(0), svi, data, num_steps=600, batch_size=256, progress=False)
    return diffusion, fitted.params


@pytest.mark.long
def test_rungs_climb_to_the_probability_of_bits(trained):
    diffusion, params = trained
    states, p = enumerate_diffusion(diffusion, params)
    x, exact = states[::2], np.log(p)[::2]  # 64 states, likely and not
    with pytest.warns(LadderWarning):
        tree = diagnostics.ladder(
            jax.random.key(3), diffusion, params, x, sizes=(1, 10, 100, 1000), num_draws=100
        )
    g = tree["ladder"]
    assert (np.diff(g["importance"], axis=1) >= -1e-9).all()
    se = g["importance_se"].values
    assert ((g["importance"].values - exact[:, None]) / se < 4.5).all()
    gaps = exact.mean() - g["importance_mean"].values
    assert (np.diff(gaps) < 0).all() and gaps[-1] < 0.25 * gaps[0]
    is_settled = g["pareto_k"].values < 0.5
    z_last = (g["importance"][:, -1] - exact) / g["importance_se"][:, -1]
    assert is_settled.sum() > 10 and np.abs(z_last[is_settled]).max() < 6  # of 4 repeats
    gap = g["smc"].values - exact
    assert gap.mean() < 3 * gap.std(ddof=1) / 8


@pytest.mark.long
def test_upper_bound_of_bits_is_not_below(trained):
    diffusion, params = trained
    states, p = enumerate_diffusion(diffusion, params)
    tree = diagnostics.sandwich(
        jax.random.key(4), diffusion, params, 500, sizes=(1, 10, 100, 1000), num_repeats=1
    )
    g, x = tree["sandwich"], tree["draws"]["x_0"].values
    place = 2 ** np.arange(7)[::-1]
    exact = np.log(p)[x @ place]
    assert (states[x @ place] == x).all()
    for name, sign in (("lower", 1), ("upper", -1)):
        gap = sign * (g[name].values - exact[:, None])
        assert (gap.mean(0) < 3 * gap.std(0, ddof=1) / np.sqrt(500)).all()
    assert (np.diff(g["gap_mean"]) < 0).all()


@pytest.mark.long
@pytest.mark.parametrize("kernel", [CategoricalKernel(3), AbsorbingKernel(3)])
def test_estimates_have_no_bias_on_classes(kernel):
    """Mean of Ẑ over repeats, by importance and by SMC, is the enumerated probability."""
    table = 0.7 * np.random.default_rng(4).normal(size=(4, kernel.num_states**2, 6))
    place = kernel.num_states ** jnp.arange(2)
    table = jnp.asarray(table, jnp.float32)
    diffusion = Diffusion(
        kernel,
        schedules.harmonic(4),
        lambda x_t, t: table[t - 1, (x_t * place).sum(-1)],
        event_shape=(2,),
        readout=readouts.DataLogits(),
        last_step=readouts.Learned(),
    )
    data, p = enumerate_diffusion(diffusion)
    assert p.sum() == pytest.approx(1, abs=1e-5)
    for threshold in (0.0, 0.9):
        weighed = diagnostics.weights.weigh(
            jax.random.key(5), diffusion, {}, data, None, None, size=8, num_repeats=2_000,
            threshold=threshold, block_size=100_000, progress=False,
        )  # fmt: skip
        draws = np.exp(weighed.log_evidence.astype(float))
        error = draws.std(1, ddof=1) / np.sqrt(2_000)
        assert (np.abs(draws.mean(1) - p) < 4.5 * error).all()


# company, masks, contexts


@pytest.mark.long
def test_an_example_does_not_depend_on_its_company_or_blocks(rungs):
    mean, sd = of_wrong()
    x = np.asarray(mean + sd * np.random.default_rng(0).standard_normal((150, 2)), np.float32)
    few = diagnostics.ladder(
        jax.random.key(0), WRONG, {}, x[:7], sizes=(1, 10, 100), num_repeats=8, block_size=300
    )["ladder"]
    for name in ("importance", "smc"):
        np.testing.assert_allclose(few[name], rungs[0][name][:7], atol=1e-4)


@pytest.mark.long
def test_missing_entries_leave_the_density_of_the_rest():
    diffusion = exact_gaussian(MEAN, SD)
    x = np.array([[0.4, np.nan], [np.nan, -0.2], [1.0, 0.0]], np.float32)
    seen = np.isfinite(x)
    exact = np.where(seen, log_normal(np.nan_to_num(x), MEAN, SD), 0).sum(1)
    g = diagnostics.ladder(jax.random.key(0), diffusion, {}, x, mask=seen, sizes=(1, 10))["ladder"]
    np.testing.assert_allclose(g["importance"][:, -1], exact, atol=2e-4)


@pytest.mark.long
def test_contexts_belong_to_their_examples():
    beta = schedules.log_snr_linear(20, beta_1=0.01, alpha_bar_T=1e-24)
    base = gaussian_network(np.zeros(1), np.full(1, 0.5), beta)

    def network(x_t, t, context):  # x_0 shifted by its context
        shift = jnp.sqrt(schedules.steps(beta).at(t, 1).alpha_bar_t) * context
        out = base(x_t - shift, t)
        return out.at[:, :1].add(context)

    diffusion = Diffusion(
        GaussianKernel(), beta, network, event_shape=(1,), context_shape=(1,),
        readout=readouts.Data(), last_step=readouts.Learned(),
    )  # fmt: skip
    context = np.array([[-0.5], [0.0], [0.8]], np.float32)
    x = context + 0.1
    g = diagnostics.ladder(jax.random.key(0), diffusion, {}, x, context=context, sizes=(1, 10))
    expected = np.full(3, log_normal(0.1, 0.0, 0.5))
    np.testing.assert_allclose(g["ladder"]["importance"][:, -1], expected, atol=1e-3)
    both = diagnostics.sandwich(jax.random.key(0), diffusion, {}, 3, context=context, sizes=(1, 10))
    x = both["draws"]["x_0"].values
    expected = log_normal(x - context, 0.0, 0.5).sum(1)
    for name in ("lower", "upper"):
        np.testing.assert_allclose(both["sandwich"][name][:, -1], expected, atol=1e-3)


# what is refused, and what is kept


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sizes": (3, 10)}, "each a divisor of the last"),
        ({"sizes": ()}, "sizes must be positive"),
        ({"num_repeats": 1}, "num_repeats must be at least 2"),
        ({"num_draws": 1}, "num_draws must be at least 2"),
        ({"threshold": 0.0}, "threshold must lie in"),
        ({"block_size": 0}, "block_size must be at least 1"),
    ],
)
def test_bad_options_are_refused_by_name(change, said):
    with pytest.raises(ValueError, match=said):
        diagnostics.ladder(jax.random.key(0), WRONG, {}, np.zeros((2, 2), np.float32), **change)


def test_sandwich_refuses_one_example():
    with pytest.raises(ValueError, match="num_examples must be at least 2; got 1"):
        diagnostics.sandwich(jax.random.key(0), WRONG, {}, 1)


@pytest.mark.long
def test_a_fresh_process_reopens_and_plots_the_tree_without_the_package(rungs, tmp_path):
    tree = xr.DataTree.from_dict({"ladder": rungs[0]})
    code = """
    import matplotlib.pyplot as plt
    group = tree["ladder"]
    assert group["importance"].dims == ("example", "size")
    assert group["size"].values.tolist() == [1, 10, 100] and group.attrs["units"] == "nats"
    line, = plt.plot(group["size"], group["importance_mean"])
    assert np.isfinite(line.get_ydata()).all()
    arviz_plots.plot_dist(  # examples as draws: how log p is spread over the data
        xr.DataTree.from_dict({"posterior": group.to_dataset()[["importance"]].isel(size=-1)}),
        sample_dims=["example"], backend="matplotlib",
    )
    """
    check_in_fresh_process(tree, tmp_path / "ladder.nc", code)
    with xr.open_datatree(tmp_path / "ladder.nc", engine="h5netcdf") as back:
        xr.testing.assert_identical(back["ladder"].to_dataset(), rungs[0].to_dataset())
