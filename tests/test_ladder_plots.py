"""Pictures of rungs, entropies and information show the numbers of their trees, and no others."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from probdiff import plots

STEPS = np.arange(2, 6)


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


@pytest.fixture
def rungs():
    rng = np.random.default_rng(0)
    importance = np.sort(rng.normal(size=(30, 3)), 1)
    values = {
        "bound": ("example", importance[:, 0] - 0.1),
        "importance": (("example", "size"), importance),
        "smc": ("example", importance[:, -1] - 0.2),
    }
    group = xr.Dataset(values, {"size": [1, 10, 100]})
    means = {f"{name}_mean": group[name].mean("example") for name in values}
    return xr.DataTree.from_dict({"ladder": group.assign(means)})


def test_a_ladder_shows_means_beside_the_last_rung_with_paired_errors(rungs):
    ax = plots.ladder(rungs, truth=2.0)
    g = rungs["ladder"]
    gap = g["importance"].values - g["importance"].values[:, -1:]
    shown = next(c for c in ax.containers if "importance" in c.get_label())
    np.testing.assert_allclose(shown.lines[0].get_ydata(), gap.mean(0))
    bars = np.array([segment[:, 1] for segment in shown.lines[2][0].get_segments()])
    expected = 4 * gap.std(0, ddof=1) / np.sqrt(30)
    np.testing.assert_allclose(np.diff(bars, axis=1)[:, 0], expected, atol=1e-12)
    assert [text.get_text() for text in ax.get_xticklabels()] == [
        "K", "S = 1", "S = 10", "S = 100", "SMC, 100\n(any place)",
    ]  # fmt: skip
    assert "log p of the data, 2 nats" in [t.get_text() for t in ax.get_legend().get_texts()]


def test_a_sandwich_shows_both_sides(rungs):
    means = {"lower": [-2.0, -1.5, -1.2], "upper": [0.0, -0.8, -1.1]}
    values = {f"{name}_mean": ("size", mean) for name, mean in means.items()}
    values |= {"gap_mean": ("size", [2.0, 0.7, 0.1]), "gap_mean_se": ("size", [0.1, 0.02, 0.004])}
    group = xr.Dataset(values, {"size": [1, 10, 100], "example": np.arange(7)})
    ax = plots.sandwich(xr.DataTree.from_dict({"sandwich": group}))
    by_label = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    np.testing.assert_array_equal(by_label["from above: -1.1 nats at last"], means["upper"])
    np.testing.assert_array_equal(by_label["from below: -1.2 nats at last"], means["lower"])
    assert "7 draws" in ax.get_ylabel()


def entropy(correction):
    values = {
        "lower": -np.ones(4), "upper": np.arange(4.0), "correction": np.full(4, correction),
        "model": np.arange(4) - 0.5, "model_se": np.full(4, 0.01),
    }  # fmt: skip
    group = xr.Dataset(
        {n: ("step", v) for n, v in values.items()}, {"step": STEPS}, {"condition": "if it holds"}
    )
    return xr.DataTree.from_dict({"entropy": group})


def test_an_entropy_band_stands_on_its_lower_bound_and_names_its_condition():
    ax = plots.entropy_band(entropy(0.0))
    by_label = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    np.testing.assert_allclose(by_label["upper bound by the model"], np.arange(4) + 0.5)
    assert ax.get_title() == "if it holds"
    assert "upper bound for any data" not in by_label
    ax = plots.entropy_band(entropy(0.3))
    by_label = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    np.testing.assert_allclose(by_label["upper bound for any data"], np.arange(4) + 1.3)


def test_information_shows_both_bounds_and_what_contrast_can_reach():
    group = xr.Dataset(
        {
            "model": ("level", [2.0, 1.0, 0.5]), "model_se": ("level", [0.1] * 3),
            "contrast": ("contrasted", [1.5, 0.4]), "contrast_se": ("contrasted", [0.1] * 2),
        },
        {"level": [1, 2, 3], "contrasted": [1, 3]},
        {"most_contrast": np.log(9)},
    )  # fmt: skip
    ax = plots.information(xr.DataTree.from_dict({"information": group}))
    by_label = {line.get_label(): line for line in ax.get_lines()}
    np.testing.assert_array_equal(
        by_label["at least, by contrast of examples"].get_xydata(), [[1, 1.5], [3, 0.4]]
    )
    np.testing.assert_allclose(by_label["log N, most by contrast"].get_ydata(), np.log(9))


@pytest.mark.parametrize(
    ("plot", "maker"),
    [
        (plots.ladder, "ladder"),
        (plots.sandwich, "sandwich"),
        (plots.entropy_band, "entropies"),
        (plots.information, "information"),
    ],
)
def test_another_tree_is_refused_by_name(plot, maker):
    with pytest.raises(ValueError, match=f"must come from diagnostics.{maker}; got groups"):
        plot(xr.DataTree())


def test_axes_are_taken_and_returned(rungs):
    ax = plt.figure().subplots()
    assert plots.ladder(rungs, ax=ax) is ax
