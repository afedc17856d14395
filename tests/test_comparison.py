"""Comparisons of bounds: paired errors by hand, coverage, what is refused, the picture."""

import math

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from flax import nnx
from scipy import stats

from fresh import check_in_fresh_process
from oracles import exact_gaussian, log_normal
from probdiff import (
    BernoulliKernel,
    Diffusion,
    diagnostics,
    infer,
    networks,
    plots,
    schedules,
    standard_diffusion,
)

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
    """Of two models of 6 examples, 1000 times; the difference's sign follows the order of means."""
    n, true, covered = 1_000, 0.7, 0
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


# evidences


def tree_of_evidence(by_run, y=None, **attrs):
    """What `SMC.to_datatree` returns, as far as comparisons read it, `(runs, examples)`."""
    z = np.asarray(by_run, float)
    smc = xr.Dataset({
        "log_evidence_by_run": (("run", "data"), z),
        "log_evidence": ("data", np.logaddexp.reduce(z, 0) - math.log(len(z))),
    })  # fmt: skip
    y = np.zeros(z.shape[1]) if y is None else y
    tree = xr.DataTree.from_dict({"smc": smc, "observed_data": xr.Dataset({"y": ("data", y)})})
    tree.attrs = {"steps": 10} | attrs
    return tree


def test_evidences_give_bayes_factors_and_probabilities_as_by_hand():
    z = {"a": [[-3.0, -1.0]], "b": [[-2.0, -1.5]], "c": [[-4.0, -4.0]]}
    weights = {"a": 2.0, "b": 1.0, "c": 1.0}
    given = {name: tree_of_evidence(of) for name, of in z.items()}
    group = diagnostics.compare(given, weights=weights)["comparison"].to_dataset()
    assert group.attrs["best"] == "b" and group["steps"].values.tolist() == [10, 10, 10]
    joint = {name: weights[name] * math.exp(sum(of[0])) for name, of in z.items()}
    for name in z:
        of = group.sel(model=name)
        assert float(of["probability"]) == pytest.approx(joint[name] / sum(joint.values()))
        assert float(of["log_bayes_factor"]) == pytest.approx(sum(z[name][0]) + 3.5)
        first = {n: weights[n] * math.exp(z[n][0][0]) for n in z}
        assert float(of["example_probability"][0]) == pytest.approx(
            first[name] / sum(first.values())
        )
    assert group["log_bayes_factor_low"].isnull().sum() == 2  # one run says nothing of its error
    even = diagnostics.compare(given)["comparison"]
    assert even["weight"].values == pytest.approx([1 / 3] * 3)


def lognormal(rng, runs, examples, sd, log_z=0.0):
    """Evidences whose log Ẑ is normal, Ẑ of mean Z."""
    return tree_of_evidence(log_z - sd**2 / 2 + sd * rng.standard_normal((runs, examples)))


def check_intervals(is_below, is_above):
    """90 % hold, those of differences being right to second order; misses on both sides alike."""
    n, below, above = len(is_below), int(np.sum(is_below)), int(np.sum(is_above))
    assert abs(1 - (below + above) / n - 0.9) < 0.015 + 3 * math.sqrt(0.9 * 0.1 / n)
    assert stats.binomtest(below, below + above).pvalue > 1e-3


@pytest.mark.parametrize(("runs", "sd"), [(4, 0.5), (8, 1.0)])
def test_intervals_of_each_bayes_factor_hold_what_they_say(runs, sd):
    """Of two programs and 4000 examples."""
    rng = np.random.default_rng(0)
    given = {name: lognormal(rng, runs, 4000, sd) for name in "ab"}
    group = diagnostics.compare(given, prob=0.9)["comparison"].to_dataset().isel(model=1)
    check_intervals(group["example_difference_high"] < 0, group["example_difference_low"] > 0)


@pytest.mark.long
def test_intervals_of_the_bayes_factor_of_many_examples_hold_what_they_say():
    """Of two programs and 32 examples, 100 times; the best is the one by the sampler's luck."""
    rng, misses = np.random.default_rng(0), []
    for _ in range(100):
        given = {name: lognormal(rng, 4, 32, 0.5) for name in "ab"}
        group = diagnostics.compare(given, prob=0.9)["comparison"].to_dataset().isel(model=1)
        ends = [float(group[f"log_bayes_factor_{end}"]) for end in ("low", "high")]
        a_is_best = group["model"] == "b"
        low, high = ends if a_is_best else (-ends[1], -ends[0])
        misses.append((high < 0, low > 0))
    check_intervals(*np.array(misses).T)


@pytest.mark.long
def test_programs_compared_by_smc_have_the_bayes_factors_of_the_closed_form():
    """y ~ N(0, 1 + σ²) under three noises, 12 observations, each program's sites known."""
    prior = standard_diffusion().prior({})
    y = np.random.default_rng(0).normal(0, math.sqrt(2), 12).astype(np.float32)

    def program(y, sigma):
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(prior(), sigma), obs=y)

    smc, given, exact = infer.SMC(program, num_particles=64), {}, {}
    for seed, sigma in enumerate((0.3, 1.0, 3.0)):
        smc.run(jax.random.key(seed), y, sigma)
        given[f"{sigma}"] = smc.to_datatree()
        exact[f"{sigma}"] = stats.norm.logpdf(y, 0, math.sqrt(1 + sigma**2))
    group = diagnostics.compare(given, prob=0.999)["comparison"].to_dataset()
    best = max(exact, key=lambda name: exact[name].sum())
    assert group.attrs["best"] == best
    for name, log_z in exact.items():
        of, gap = group.sel(model=name), log_z - exact[best]
        low, high = float(of["log_bayes_factor_low"]), float(of["log_bayes_factor_high"])
        assert low - 0.05 <= gap.sum() <= high + 0.05  # 10 steps and float32
        np.testing.assert_allclose(of["example_difference"], gap, atol=0.1)
    ax = plots.comparison(diagnostics.compare(given))
    assert "mean log evidence, 12 examples" in ax.get_title()


@pytest.mark.long
def test_known_entries_are_part_of_what_was_observed():
    prior = standard_diffusion((2,)).prior({})
    smc = infer.SMC(lambda known, mask: prior(known=known, mask=mask), num_particles=32)
    trees = []
    for mask in ([True, False], [False, True]):
        smc.run(jax.random.key(0), jnp.array([0.5, 1.0]), np.array(mask))
        trees.append(smc.to_datatree())
    np.testing.assert_array_equal(trees[0]["observed_data"]["x_0_known"], [0.5, np.nan])
    with pytest.raises(ValueError, match="same observations; 'x_0_known' of 'a' and 'b'"):
        diagnostics.compare(dict(zip("ab", trees, strict=True)))


def test_one_observation_is_pictured_with_the_samplers_intervals():
    rng = np.random.default_rng(0)
    given = {name: lognormal(rng, 4, 1, 0.5, log_z) for name, log_z in (("a", 0), ("b", -3))}
    tree = diagnostics.compare(given)
    ax = plots.comparison(tree)
    (segment,) = ax.collections[-1].get_segments()
    ends = [float(tree["comparison"][f"log_bayes_factor_{end}"][1]) for end in ("low", "high")]
    np.testing.assert_allclose(segment, [[ends[0], 1], [ends[1], 1]])
    assert "95% intervals of the sampler" in ax.get_title()


# refusals

BAD = {
    r"models\['b'\] must be what diagnostics.bound or SMC.to_datatree returned.*; got": (
        {"a": tree_of_evidence([[0.0]]), "b": 3.0}, {}),
    "weights must be left out of bounds": (
        {"a": tree_of([1, 2]), "b": tree_of([1, 2])}, {"weights": {"a": 1.0, "b": 1.0}}),
    r"weights must be of \['a', 'b'\]; got those of \['a'\]": (
        {n: tree_of_evidence([[0.0]]) for n in "ab"}, {"weights": {"a": 1.0}}),
    r"weights\['b'\] must be positive and finite; got 0": (
        {n: tree_of_evidence([[0.0]]) for n in "ab"}, {"weights": {"a": 1.0, "b": 0.0}}),
    r"models\['b'\] must come from SMC.to_datatree like the others": (
        {"a": tree_of_evidence([[0.0]]), "b": tree_of([1, 2])}, {}),
    r"models\['b'\] must hold finite evidences": (
        {"a": tree_of_evidence([[0.0]]), "b": tree_of_evidence([[-np.inf]])}, {}),
    "plates of the same sizes; 'a' and 'b' differ": (
        {"a": tree_of_evidence([[0.0]]), "b": tree_of_evidence([[0.0, 1.0]])}, {}),
    "same observations; 'y' of 'a' and 'b' has other values": (
        {"a": tree_of_evidence([[0.0]]), "b": tree_of_evidence([[0.0]], [1.0])}, {}),
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
