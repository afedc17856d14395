"""Comparisons of bounds: paired errors by hand, coverage, what is refused, the picture."""

import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from flax import nnx
from scipy import stats

from fresh import check_in_fresh_process
from oracles import exact_gaussian, log_normal
from probdiff import BernoulliKernel, Diffusion, diagnostics, networks, plots, schedules

RNG = np.random.default_rng(0)
LEBESGUE = "Lebesgue, in the user's units"


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def tree_of(bound, example=None, **attrs):
    """What `diagnostics.bound` returns, as far as comparisons read it."""
    bound = np.asarray(bound, float)
    example = np.arange(len(bound)) if example is None else example
    group = xr.Dataset({"bound": ("example", bound)}, {"example": example})
    group.attrs = {"units": "nats", "reference_measure": LEBESGUE, "num_dims": 2} | attrs
    return xr.DataTree.from_dict({"bound": group})


def trees(num_examples=40):
    """Two models and a third, best, worst, middle; hard examples are hard for all."""
    hard = 5.0 * RNG.standard_normal(num_examples)
    noise = 0.1 * RNG.standard_normal((3, num_examples))
    shifts = {"worst": -2.0, "best": 0.0, "middle": -1.0}
    return {n: tree_of(hard + s + e) for (n, s), e in zip(shifts.items(), noise, strict=True)}


# the numbers


def test_bounds_of_other_examples_are_refused():
    diffusion, x = exact_gaussian(np.zeros(2), 1.0), np.ones((10, 2), np.float32)
    bounds = [diagnostics.bound(jax.random.key(0), diffusion, {}, row) for row in (x, x, 2 * x)]
    diagnostics.compare({"a": bounds[0], "b": bounds[1]})
    with pytest.raises(ValueError, match="same examples in the same order"):
        diagnostics.compare({"a": bounds[0], "b": bounds[2]})


def test_differences_and_their_paired_errors_are_those_by_hand():
    given = trees()
    group = diagnostics.compare(given, prob=0.9)["comparison"]
    assert group["model"].values.tolist() == ["best", "middle", "worst"]
    assert group["example_difference"].dims == ("model", "example")
    best = given["best"]["bound"]["bound"].values
    quantile = stats.t.ppf(0.95, 39)
    for name in given:
        found, bound = group.to_dataset().sel(model=name), given[name]["bound"]["bound"].values
        d = [b - a for a, b in zip(best, bound, strict=True)]
        mean = math.fsum(d) / 40
        se = math.sqrt(math.fsum((x - mean) ** 2 for x in d) / 39 / 40)
        np.testing.assert_allclose(found["example_difference"], d, atol=1e-12)
        np.testing.assert_allclose(found["difference"], mean, atol=1e-12)
        np.testing.assert_allclose(found["difference_se"], se, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(found["difference_low"], mean - quantile * se, atol=1e-10)
        np.testing.assert_allclose(found["difference_high"], mean + quantile * se, atol=1e-10)
        np.testing.assert_allclose(found["mean"], bound.mean(), rtol=1e-12)
        np.testing.assert_allclose(found["se"], bound.std(ddof=1) / math.sqrt(40), rtol=1e-12)
    assert group.attrs["num_examples"] == 40 and group.attrs["units"] == "nats"
    assert group.attrs["best"] == "best" and "slack" in group.attrs["note"]


def test_pairing_takes_out_what_examples_have_in_common():
    """Sd 5 in common, 0.1 each of its own: paired √2 · 0.1/√N; unpaired would be √2 · 5/√N."""
    group = diagnostics.compare(trees(400))["comparison"]
    expected = math.sqrt(2) * 0.1 / math.sqrt(400)
    np.testing.assert_allclose(group["difference_se"][1:], expected, rtol=0.15)
    assert (group["se"] > 0.2).all()


@pytest.mark.long
def test_intervals_cover_as_often_as_they_say():
    """Of two models of 6 examples, 2000 times; the difference's sign follows the order of means."""
    n, true, covered = 2_000, 0.7, 0
    for _ in range(n):
        noise = RNG.standard_normal((2, 6))
        given = {"a": tree_of(true + noise[0]), "b": tree_of(noise[1])}
        group = diagnostics.compare(given, prob=0.8)["comparison"]
        expected = -true if group.attrs["best"] == "a" else true
        low, high = group["difference_low"].values[1], group["difference_high"].values[1]
        covered += low <= expected <= high
    assert abs(covered / n - 0.8) < 4 * math.sqrt(0.8 * 0.2 / n)


@pytest.mark.long
def test_exact_models_differ_by_their_log_densities():
    """The bound of `exact_gaussian` is the log density, so differences are known per example."""
    mean, sd, wrong = np.array([0.3, -0.5]), np.array([0.9, 0.6]), np.array([0.5, 0.4])
    x = (mean + sd * np.random.default_rng(1).standard_normal((60, 2))).astype(np.float32)
    options = {"num_draws": 2_000}
    models = {"right": exact_gaussian(mean, sd), "narrow": exact_gaussian(mean, wrong)}
    given = {
        name: diagnostics.bound(jax.random.key(0), model, {}, jnp.asarray(x), **options)
        for name, model in models.items()
    }
    group = diagnostics.compare(given)["comparison"].to_dataset()
    known = (log_normal(x, mean, wrong) - log_normal(x, mean, sd)).sum(1)
    assert group.attrs["best"] == "right" and group.attrs["num_dims"] == 2
    assert np.abs(group["example_difference"].sel(model="narrow") - known).max() < 0.15
    assert abs(float(group["difference"].sel(model="narrow")) - known.mean()) < 0.02


# refusals

BAD = {
    "models must be two or more; got": ({"a": tree_of([1, 2])}, {}),
    r"models\['a'\] must hold two or more examples; got 1": (
        {"a": tree_of([1.0]), "b": tree_of([1.0])}, {}),
    "same number of examples; got 2 in 'a' and 3 in 'b'": (
        {"a": tree_of([1, 2]), "b": tree_of([1, 2, 3])}, {}),
    "same coordinates of example; 'a' and 'b' differ": (
        {"a": tree_of([1, 2]), "b": tree_of([1, 2], example=[5, 6])}, {}),
    "same units; got 'nats' in 'a' and 'bits' in 'b'": (
        {"a": tree_of([1, 2]), "b": tree_of([1, 2], units="bits")}, {}),
    "same reference_measure; got .* in 'a' and 'counting' in 'b'": (
        {"a": tree_of([1, 2]), "b": tree_of([1, 2], reference_measure="counting")}, {}),
    "same num_dims; got 2 in 'a' and 1 in 'b'": (
        {"a": tree_of([1, 2]), "b": tree_of([1, 2], num_dims=1)}, {}),
    r"models\['b'\] must hold finite bounds; got others at \[1\]": (
        {"a": tree_of([1, 2]), "b": tree_of([1, -np.inf])}, {}),
    r"models\['b'\] must come from diagnostics.bound": (
        {"a": tree_of([1, 2]), "b": xr.DataTree()}, {}),
    r"prob must lie in \(0, 1\); got 1.0": (
        {"a": tree_of([1, 2]), "b": tree_of([1, 2])}, {"prob": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_compared_is_refused_by_name(message):
    models, options = BAD[message]
    with pytest.raises(ValueError, match=message):
        diagnostics.compare(models, **options)


def test_bounds_of_unequal_observed_parts_may_be_compared():
    """num_dims is nan in both where masks leave different numbers of entries."""
    given = {name: tree_of([1, 2], num_dims=math.nan) for name in "ab"}
    assert math.isnan(diagnostics.compare(given)["comparison"].attrs["num_dims"])


# the picture


def test_the_picture_shows_differences_with_their_paired_errors():
    tree = diagnostics.compare(trees())
    group = tree["comparison"]
    ax = plots.comparison(tree)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["best", "middle", "worst"]
    points = np.asarray(ax.collections[0].get_offsets())
    np.testing.assert_allclose(points[:, 0], group["difference"], atol=1e-12)
    assert list(points[:, 1]) == [3, 2, 1]
    bars = [line for line in ax.lines if np.ptp(line.get_ydata()) == 0]
    for bar, mean, se in zip(bars, group["difference"], group["difference_se"], strict=True):
        np.testing.assert_allclose(bar.get_xdata(), [mean - se, mean + se], atol=1e-12)
    assert "paired difference" in ax.get_title() and "40 examples" in ax.get_title()
    assert "'best'" in ax.get_xlabel() and "nats" in ax.get_xlabel()


def test_the_picture_wants_a_comparison():
    with pytest.raises(ValueError, match=r"come from diagnostics.compare; got groups \['bound'\]"):
        plots.comparison(tree_of([1, 2]))


def test_a_comparison_is_plotted_from_its_file_without_the_package(tmp_path):
    check_in_fresh_process(
        diagnostics.compare(trees()),
        tmp_path / "comparison.nc",
        """
        group = tree["comparison"]
        table = {"mlpd": "mean", "se": "difference_se", "mlpd_diff": "difference"}
        table = table | {"dse": "difference_se"}
        columns = {name: group[variable].values for name, variable in table.items()}
        table = pd.DataFrame(columns, index=group["model"].values)
        arviz_plots.plot_compare(table, relative_scale=True, backend="matplotlib")
        assert group["example_difference"].dims == ("model", "example")
        """,
    )


# bits per dimension


def bits_model(size=3):
    network = networks.Perceptron((size,), 8, 1, 5, outputs=1, rngs=nnx.Rngs(0))
    beta = schedules.log_snr_linear(5, beta_1=0.1, alpha_bar_T=1e-3)
    diffusion = Diffusion(BernoulliKernel(0.5), beta, network, event_shape=(size,))
    return diffusion, jax.tree.map(lambda p: jnp.zeros(p.shape), diffusion.params_template)


def test_bits_per_dim_of_fair_coins_is_one():
    """Under zero logits every reverse step says 1/2, but tied and given x_1 the last does not."""
    diffusion, params = bits_model()
    x = jnp.asarray(RNG.integers(0, 2, (30, 3)), jnp.int32)
    tree = diagnostics.bound(jax.random.key(0), diffusion, params, x, num_draws=10)
    found = diagnostics.bits_per_dim(tree)
    bound = tree["bound"]["bound"].values / (3 * math.log(2))
    assert found.mean == pytest.approx(-bound.mean(), rel=1e-5) and found.mean > 1
    assert found.se == pytest.approx(bound.std(ddof=1) / math.sqrt(30), rel=1e-4)


@pytest.mark.parametrize("estimate", [diagnostics.bound, diagnostics.sampled_bound])
def test_a_bound_says_what_it_is_taken_against(estimate):
    diffusion, params = bits_model()
    x, key = jnp.zeros((4, 3), jnp.int32), jax.random.key(0)
    attrs = estimate(key, diffusion, params, x)["bound"].attrs
    assert (attrs["reference_measure"], attrs["num_dims"]) == ("counting", 3)
    mask = np.array([[True, False, True]] * 4)
    assert estimate(key, diffusion, params, x, mask=mask)["bound"].attrs["num_dims"] == 2
    mask[0] = True
    unequal = estimate(key, diffusion, params, x, mask=mask)
    with pytest.raises(ValueError, match="same number of observed entries"):
        diagnostics.bits_per_dim(unequal)
    attrs = estimate(key, exact_gaussian(np.zeros(2), 0.5), {}, jnp.zeros((4, 2)))["bound"].attrs
    assert (attrs["reference_measure"], attrs["num_dims"]) == (LEBESGUE, 2)


def test_bits_per_dim_of_a_density_are_refused_with_its_measure():
    with pytest.raises(ValueError, match='reference_measure "Lebesgue, in the user\'s units"'):
        diagnostics.bits_per_dim(tree_of([1, 2]))
    with pytest.raises(ValueError, match="must come from diagnostics\\.bound"):
        diagnostics.bits_per_dim(xr.DataTree())
