"""Pictures of posteriors show the numbers they were given, and say which is which."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex
from matplotlib.patches import PathPatch
from scipy import stats

from probdiff import plots
from probdiff.infer.evidence import log_evidence_interval

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def line_of(ax, label):
    (line,) = [line for line in ax.lines if line.get_label().startswith(label)]
    return line


def smc_tree(plates=()):
    """Two runs of 10 particles over levels 0, 1, 5, the data's first."""
    names, sizes = [f"plate_{i}" for i in range(len(plates))], tuple(plates)
    ess = np.array([[9.0, 6.0], [4.0, 8.0], [2.0, 10.0]])
    resampled = np.array([[0, 0], [1, 0], [1, 0]])
    by_run = np.array([-1.0, -2.0])
    spread = np.arange(np.prod(sizes)).reshape(sizes)
    wide = [np.multiply.outer(np.ones((3, 2)), np.ones(sizes)) for _ in range(2)]
    ess = ess.reshape(3, 2, *[1] * len(sizes)) * wide[0] - 0.1 * spread
    resampled = resampled.reshape(3, 2, *[1] * len(sizes)) * wide[1]
    pooled = np.log(np.mean(np.exp(by_run))) + 10.0 * spread
    group = xr.Dataset(
        {
            "ess": (("level", "run", *names), ess),
            "resampled": (("level", "run", *names), resampled),
            "log_evidence_by_run": (("run", *names), np.add.outer(by_run, 10.0 * spread)),
            "log_evidence": (names, pooled),
            "log_evidence_se": (names, 0.0 * spread + 0.1),
        },
        coords={"t": ("level", [0, 1, 5]), "run": [0, 1]},
    )
    tree = xr.DataTree.from_dict({"smc": group})
    tree.attrs["num_particles"] = 10
    return tree


def sbc_tree():
    """150 simulations, three coordinates, one of them rejected."""
    pit = {
        "log_r": (("chain", "draw"), RNG.random((1, 150))),
        "x_0": (("chain", "draw", "x_0_dim_0"), RNG.random((1, 150, 3)) ** np.array([1, 1, 3])),
    }
    p_values = {"log_r": 0.5, "x_0": ("x_0_dim_0", [0.3, 0.2, 1e-9])}
    tree = xr.DataTree.from_dict({"prior_sbc": xr.Dataset(pit), "uniformity": xr.Dataset(p_values)})
    tree.attrs = {
        "sampler": "SMC", "num_simulations": 150, "num_tests": 4, "least_p_value": 1e-9,
        "bound": 0.0025,
    }  # fmt: skip
    return tree


# runs


def test_ess_trace_shows_shares_by_run_with_marks_where_resampled():
    ax = plots.ess_trace(smc_tree(), threshold=0.4)
    first, second = ax.lines[:2]
    np.testing.assert_allclose(first.get_xydata(), [[0, 0.9], [1, 0.4], [5, 0.2]])
    np.testing.assert_allclose(second.get_xydata(), [[0, 0.6], [1, 0.8], [5, 1.0]])
    np.testing.assert_allclose(line_of(ax, "resampled").get_xydata(), [[1, 0.4], [5, 0.2]])
    np.testing.assert_allclose(line_of(ax, "threshold").get_ydata(), 0.4)
    assert ax.xaxis_inverted() and "10 particles" in ax.get_ylabel()
    assert legend_of(ax) == ["2 runs", "resampled", "threshold 40%"]


def test_ess_trace_shows_the_worst_system():
    ax = plots.ess_trace(smc_tree((2, 3)), threshold=None)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.85, 0.35, 0.15])
    assert legend_of(ax) == ["2 runs, least of 6 systems", "resampled"]


def test_evidence_shows_runs_and_the_interval_of_their_mean():
    ax = plots.evidence(smc_tree(), prob=0.9)
    pooled = np.log((np.exp(-1) + np.exp(-2)) / 2)
    low, high = log_evidence_interval(np.array([-1.0, -2.0]), 0.9)
    np.testing.assert_allclose(line_of(ax, "one run").get_xydata(), [[0, -1], [1, -2]])
    np.testing.assert_allclose(line_of(ax, f"{pooled:.3f}, pooled").get_ydata(), pooled)
    band = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    np.testing.assert_allclose([band.y0, band.y1], [low, high], rtol=1e-6)
    assert f"{pooled:.3f}, pooled, 90% interval {low:.3f} to {high:.3f}" in legend_of(ax)[0]


def test_evidence_has_a_column_for_each_system():
    ax = plots.evidence(smc_tree((3,)))
    for i in range(3):
        np.testing.assert_allclose(ax.lines[i].get_ydata(), [10 * i - 1, 10 * i - 2])
    (container,) = ax.containers
    pooled = np.log((np.exp(-1) + np.exp(-2)) / 2) + np.array([0, 10, 20])
    np.testing.assert_allclose(container.lines[0].get_xydata(), np.c_[[0, 1, 2], pooled])
    assert "plate_0" in ax.get_xlabel()


def test_one_run_has_no_interval():
    tree = smc_tree().isel(run=[0])
    ax = plots.evidence(tree)
    assert "one run: no interval" in legend_of(ax)


@pytest.mark.parametrize("plot", [plots.ess_trace, plots.evidence])
def test_a_tree_without_weights_is_refused(plot):
    tree = smc_tree()
    tree["smc"] = tree["smc"].to_dataset().drop_vars("log_evidence")
    for bad in (tree, xr.DataTree()):
        with pytest.raises(ValueError, match="must come from to_datatree of an SMC"):
            plot(bad)


def test_a_probability_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"prob must lie in \(0, 1\); got 1.0"):
        plots.evidence(smc_tree(), prob=1.0)


# calibration


def test_calibration_shows_log_r_first_and_then_the_worst():
    tree = sbc_tree()
    axes = plots.calibration(tree, num_panels=3)
    figure = axes[0].figure
    assert figure.axes == list(axes)
    titles = [ax.get_title() for ax in axes]
    assert titles == ["log_r: p = 0.5", "x_0[2]: p = 1e-09, rejected", "x_0[1]: p = 0.2"]
    assert "; 1 not shown" in figure.get_suptitle()
    assert "SMC, 150 simulations" in figure.get_suptitle()
    pit = np.sort(tree["prior_sbc"]["x_0"].values[0, :, 2])
    largest = np.abs(np.arange(1, 151) / 150 - pit).max()
    curve = max(axes[1].lines, key=lambda line: len(line.get_ydata()))
    assert abs(np.abs(curve.get_ydata()).max() - largest) < 0.02  # drawn on a grid
    dashed = [line.get_ydata()[0] for line in axes[1].lines if line.get_linestyle() == "--"]
    at_bound = stats.kstwo.sf(np.abs(dashed), 150)
    np.testing.assert_allclose(at_bound, 0.0025, rtol=1e-3)
    assert sorted(np.sign(dashed)) == [-1, 1]


def test_calibration_is_drawn_into_given_axes():
    given = plt.figure().subplots(2, 2)
    axes = plots.calibration(sbc_tree(), num_panels=3, axes=given)
    assert list(axes) == list(given.ravel()[:3])
    assert [ax.get_title().split(":")[0] for ax in given.ravel()] == [
        "log_r",
        "x_0[2]",
        "x_0[1]",
        "",
    ]
    assert not given[1, 1].lines and plt.get_fignums() == [given[0, 0].figure.number]
    assert not given[0, 0].figure.get_suptitle()
    with pytest.raises(ValueError, match="axes must be at least 3, one for each panel; got 2"):
        plots.calibration(sbc_tree(), num_panels=3, axes=given[0])


def test_calibration_hides_the_places_that_are_left():
    axes = plots.calibration(sbc_tree(), num_panels=1)
    assert len(axes) == 1 and axes[0].figure.axes == list(axes)
    tree = sbc_tree()
    pit = np.random.default_rng(0).random((1, 150, 6))
    tree["prior_sbc"] = xr.Dataset({"x_0": (("chain", "draw", "x_0_dim_0"), pit)})
    tree["uniformity"] = xr.Dataset({"x_0": ("x_0_dim_0", np.linspace(0.1, 0.6, 6))})
    axes = plots.calibration(tree)
    assert len(axes) == 6 and axes[0].figure.axes == list(axes)
    assert [bool(ax.get_ylabel()) for ax in axes] == [True, False, False, False, True, False]


def test_calibration_refuses_what_it_cannot_show():
    with pytest.raises(ValueError, match=r"must come from infer.calibrate; got groups \['smc'\]"):
        plots.calibration(smc_tree())
    with pytest.raises(ValueError, match="num_panels must be at least 1; got 0"):
        plots.calibration(sbc_tree(), num_panels=0)


# posteriors


def images(rows=2):
    draws = RNG.random((5, rows, 3, 4))
    return {
        "truth": RNG.random((rows, 3, 4)),
        "observation": RNG.random((rows, 3, 4)),
        "draws": draws,
        "mean": draws.mean(0),
        "sd": 3 * draws.std(0),
    }


def test_posterior_images_put_each_example_in_a_row():
    given = images()
    axes = plots.posterior_images(**given, num_draws=3, vmax=0.9)
    assert axes.shape == (2, 7)
    titles = [ax.get_title() for ax in axes[0]]
    assert titles == ["truth", "observation", "draw 1", "draw 2", "draw 3", "mean", "sd"]
    columns = [given["truth"], given["observation"], *given["draws"][:3], given["mean"]]
    for column, expected in zip(axes.T, columns, strict=False):
        for ax, image in zip(column, expected, strict=True):
            np.testing.assert_array_equal(ax.images[0].get_array(), image)
            assert ax.images[0].get_clim() == (0.0, 0.9)
    for ax, sd in zip(axes[:, -1], given["sd"], strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), sd)
        assert ax.images[0].get_clim() == (0.0, given["sd"].max())
    labels = {ax.get_ylabel() for ax in axes[0, 0].figure.axes}
    assert {"value", "posterior sd"} <= labels


def test_pixels_that_were_not_observed_are_hatched():
    given = images()
    mask = np.ones((3, 4), bool)
    mask[1, 2] = False
    given["observation"][1, 0, 3] = np.nan
    axes = plots.posterior_images(**given, mask=mask)
    centres = []
    for ax in axes[:, 1]:
        (patch,) = [p for p in ax.patches if isinstance(p, PathPatch)]
        assert patch.get_hatch() and to_hex(patch.get_facecolor()) == "#56b4e9"
        squares = patch.get_path().vertices.reshape(-1, 5, 2)
        centres.append(squares[:, :4].mean(1).tolist())
    assert centres == [[[2, 1]], [[3, 0], [2, 1]]]
    assert axes[-1, 1].get_xlabel() == "hatched: unseen"
    assert not any(ax.patches for ax in np.delete(axes, 1, 1).flat)


def test_observations_may_have_units_and_a_size_of_their_own():
    given = images() | {"observation": RNG.random((2, 6, 2)), "truth": None}
    axes = plots.posterior_images(**given, observation_limits=(-1, 20))
    assert axes[0, 0].get_title() == "observation\n-1 to 20"
    assert axes[0, 0].images[0].get_clim() == (-1, 20)
    assert axes[0, 1].images[0].get_clim() == (0, 1)
    assert not axes[0, 0].patches


def test_posterior_images_refuse_what_does_not_fit():
    given = images()
    with pytest.raises(ValueError, match="mean must be 2 images, as draws; got 1"):
        plots.posterior_images(**(given | {"mean": given["mean"][:1]}))
    axes = plt.figure().subplots(2, 3)
    with pytest.raises(ValueError, match=r"axes must have shape \(2, 8\); got \(2, 3\)"):
        plots.posterior_images(**given, axes=axes)
    axes = plt.figure().subplots(2, 8)
    assert plots.posterior_images(**given, axes=axes)[0, 0] is axes[0, 0]


def test_posterior_points_mark_truth_and_observation():
    draws, prior = RNG.normal(size=(50, 2)), RNG.normal(size=(70, 2))
    ax = plots.posterior_points(
        draws, truth=np.array([0.5, 1.0]), observation=np.array([-0.5, 0.0]), behind=prior
    )
    shown = [c.get_offsets().data for c in ax.collections if len(c.get_offsets())]
    np.testing.assert_allclose(shown[0], prior)
    np.testing.assert_allclose(shown[1], draws)
    np.testing.assert_allclose(line_of(ax, "truth").get_xydata(), [[0.5, 1.0]])
    np.testing.assert_allclose(line_of(ax, "observation").get_xydata(), [[-0.5, 0.0]])
    assert legend_of(ax) == ["prior draws", "posterior draws", "observation", "truth"]


@pytest.mark.parametrize("axis", [0, 1])
def test_a_coordinate_that_was_not_measured_makes_a_line(axis):
    observation = np.full(2, np.nan)
    observation[axis] = 0.7
    ax = plots.posterior_points(RNG.normal(size=(5, 2)), observation=observation)
    line = line_of(ax, "observation")
    data = (line.get_xdata(), line.get_ydata())
    np.testing.assert_allclose(data[axis], 0.7)
    np.testing.assert_allclose(data[1 - axis], [0, 1])  # from edge to edge
