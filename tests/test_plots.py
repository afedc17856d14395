"""Pictures show the numbers they were given, and no others."""

import inspect
import math
import sys
import types

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_rgba

from probdiff import plots
from probdiff.train import HeldOutLosses, Progress


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_losses_are_averaged_per_example_in_blocks():
    steps = np.arange(1.0, 399.0)  # the last block is short
    ax = plots.losses(20 * steps, batch_size=10, held_out=([100, 398], [7.0, 8.0]))
    blocks, held_out = ax.lines
    np.testing.assert_allclose(blocks.get_xdata()[:-1], np.arange(2.5, 396, 4))
    np.testing.assert_allclose(blocks.get_xdata()[-1], 397.5)
    np.testing.assert_allclose(blocks.get_ydata(), 2 * blocks.get_xdata())
    np.testing.assert_allclose(held_out.get_xydata(), [[100, 7], [398, 8]])
    corners = ax.collections[0].get_paths()[0].vertices
    half_width = 2 * np.std([2, 4, 6, 8]) / 2
    assert (np.abs(corners - [2.5, 5 + half_width]).max(1) < 1e-9).any()
    assert "loss per example (nats" in ax.get_ylabel()


def test_a_large_first_loss_does_not_flatten_the_rest():
    losses = np.r_[1e6, np.linspace(2, 1, 99)]
    low, high = plots.losses(losses).get_ylim()
    assert 0.8 < low < 1 and 1.9 < high < 2.2


def test_bound_per_step_shows_mean_band_and_parts():
    kl = np.array([[1.0, 4.0, 0.5], [3.0, 4.0, 1.5]])
    group = xr.Dataset(
        {
            "kl": (("example", "step"), kl),
            "reconstruction": ("example", [1.0, 3.0]),
            "prior_kl": ("example", [0.25, 0.75]),
        },
        coords={"step": [2, 3, 4]},
        attrs={"mean": -5.5, "se": 1.0, "mean_bits": -7.9348, "se_bits": 1.4427},
    )
    ax = plots.bound_per_step(xr.DataTree.from_dict({"bound": group}))
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[2, 2], [3, 4], [4, 1]])
    corners = ax.collections[0].get_paths()[0].vertices
    # standard errors over two examples: 1, 0, 0.5
    for corner in ([2, 0], [2, 4], [3, 4], [4, 0], [4, 2]):
        assert (np.abs(corners - corner).max(1) < 1e-12).any()
    text = " ".join(legend_of(ax))
    for part in ("Σ KL = 7 nats", "log p(x₀|x₁) = 2 nats", "KL(q(x_T|x₀) ‖ π) = 0.5 nats"):
        assert part in text
    assert ax.get_title() == "bound per example: -7.935 ± 1.443 bits"


def test_points_are_where_they_are_on_equal_axes():
    x = np.array([[0.0, 1.0], [2.0, -1.0]])
    ax = plots.points(x, title="t = 3", limit=3.0)
    np.testing.assert_allclose(ax.collections[0].get_offsets(), x)
    assert (ax.get_xlim(), ax.get_ylim(), ax.get_aspect()) == ((-3, 3), (-3, 3), 1)
    assert ax.get_title() == "t = 3"


def test_slices_keep_the_order_of_levels():
    levels = [np.full((4, 2), value) for value in (0.0, 1.0, 2.0)]
    axes = plots.slices(levels, ["a", "b", "c"])
    assert [ax.get_title() for ax in axes] == ["a", "b", "c"]
    for ax, level in zip(axes, levels, strict=True):
        np.testing.assert_allclose(ax.collections[0].get_offsets(), level)


def test_slices_refuse_a_level_without_a_title():
    with pytest.raises(ValueError, match="titles must be 2, one for each level; got 1"):
        plots.slices([np.zeros((3, 2))] * 2, ["a"])


def test_drift_stretches_all_arrows_alike_and_says_by_how_much():
    x = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    displacement = np.array([[0.2, 0.0], [0.0, 0.05], [0.0, 0.0], [-0.05, 0.0]])
    ax = plots.drift(x, displacement, behind=x + 0.5, title="t = 5")
    draws, arrows = ax.collections
    np.testing.assert_allclose(np.c_[arrows.U, arrows.V], 10 * displacement)
    np.testing.assert_allclose(arrows.get_offsets(), x)
    np.testing.assert_allclose(draws.get_offsets(), x + 0.5)
    assert ax.get_title() == "t = 5, arrows × 10"


def test_drift_of_zero_is_drawn():
    x = np.array([[0.0, 0.0], [1.0, 1.0]])
    arrows = plots.drift(x, np.zeros((2, 2))).collections[0]
    assert not arrows.U.any() and not arrows.V.any()


def test_images_lie_in_reading_order_with_a_gap():
    x = np.arange(3 * 2 * 2.0).reshape(3, 2, 2)
    ax = plots.images(x, columns=2, vmin=0.0, vmax=11.0)
    sheet = np.ma.filled(ax.images[0].get_array(), np.nan)
    gap = math.nan
    np.testing.assert_equal(
        sheet,
        [
            [0, 1, gap, 4, 5],
            [2, 3, gap, 6, 7],
            [gap, gap, gap, gap, gap],
            [8, 9, gap, gap, gap],
            [10, 11, gap, gap, gap],
        ],
    )
    assert ax.images[0].get_clim() == (0, 11)


def test_figure_1_has_forward_reverse_and_drift_rows():
    rng = np.random.default_rng(0)
    forward, reverse, grid, drifts, behind = rng.normal(size=(5, 3, 9, 2))
    axes = plots.figure_1(
        forward, reverse, grid, drifts, behind, [0, 20, 40], drift_levels=[5, 20, 40]
    )
    assert axes.shape == (3, 3)
    for row, data in zip(axes, (forward, reverse, behind), strict=True):
        for ax, x in zip(row, data, strict=True):
            np.testing.assert_allclose(ax.collections[0].get_offsets(), x)
    assert [ax.get_title() for ax in axes[0]] == ["t = 0", "t = 20", "t = 40"]
    assert [ax.get_title().split(",")[0] for ax in axes[2]] == ["t = 5", "t = 20", "t = 40"]
    arrows = axes[2, 1].collections[1]
    np.testing.assert_allclose(arrows.get_offsets(), grid[1])
    ratio = np.c_[arrows.U, arrows.V] / drifts[1]
    np.testing.assert_allclose(ratio, ratio[0, 0])


def test_figure_1_is_drawn_into_given_axes():
    x = np.random.default_rng(0).normal(size=(2, 9, 2))
    given = plt.figure().subplots(3, 2)
    axes = plots.figure_1(x, x, x, x, x, [0, 1], axes=given)
    assert (axes == given).all()
    assert plt.get_fignums() == [given[0, 0].figure.number]
    with pytest.raises(ValueError, match=r"axes must have shape \(3, 2\); got \(2, 2\)"):
        plots.figure_1(x, x, x, x, x, [0, 1], axes=given[:2])


PICTURES = [name for name in plots.__all__ if callable(getattr(plots, name))]
OURS = [name for name in PICTURES if name != "comparison"]  # ArviZ makes that figure


@pytest.mark.parametrize("name", OURS)
def test_every_picture_can_be_told_its_axes(name):
    assert len(PICTURES) == 18
    options = inspect.signature(getattr(plots, name)).parameters
    (given,) = [options[name] for name in ("ax", "axes") if name in options]
    assert given.default is None and given.kind is given.KEYWORD_ONLY


def test_a_given_axes_is_drawn_into():
    _, ax = plt.subplots()
    assert plots.points(np.zeros((1, 2)), ax=ax) is ax
    assert plt.get_fignums() == [ax.figure.number]


def test_live_losses_draws_what_fit_tells_it():
    live = plots.LiveLosses(batch_size=4, held_out_size=2)
    held_out = HeldOutLosses(np.array([50]), np.array([6.0]))
    for step in (50, 100):
        live(Progress(step, {}, np.full(step, 8.0), held_out))
    ax = live.figure.axes[0]
    training, held_out_line = ax.lines
    np.testing.assert_allclose(training.get_ydata(), 2.0)
    assert len(training.get_ydata()) == 100
    np.testing.assert_allclose(held_out_line.get_ydata(), 3.0)


def test_live_losses_are_drawn_into_given_axes():
    _, (left, right) = plt.subplots(1, 2)
    live = plots.LiveLosses(ax=left)
    live(Progress(10, {}, np.ones(10), HeldOutLosses(np.array([]), np.array([]))))
    assert live.ax is left and live.figure is left.figure
    assert left.lines and not right.lines
    assert plt.get_fignums() == [left.figure.number]


def test_live_losses_keeps_its_place_in_a_notebook(monkeypatch):
    shown = []

    class Handle:
        def update(self, figure):
            shown.append(("update", figure))

    def display(figure, display_id):
        shown.append(("display", figure))
        return Handle()

    ipython = types.SimpleNamespace(
        get_ipython=lambda: object(), display=types.SimpleNamespace(display=display)
    )
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    live = plots.LiveLosses()
    for step in (10, 20, 30):
        live(Progress(step, {}, np.ones(step), HeldOutLosses(np.array([]), np.array([]))))
    assert [what for what, _ in shown] == ["display", "update", "update"]
    assert all(figure is live.figure for _, figure in shown)


def test_images_may_have_another_map_of_colours():
    x = np.linspace(0, 1, 8).reshape(2, 2, 2)
    (sheet,) = plots.images(x, cmap="viridis").images
    assert sheet.get_cmap().name == "viridis"
    np.testing.assert_allclose(sheet.cmap(np.ma.masked), to_rgba("#56B4E9"), atol=1e-6)


def test_coloured_images_keep_their_colours():
    x = np.random.default_rng(0).uniform(0, 255, (3, 4, 5, 3))
    ax = plots.images(x, columns=2, vmax=255.0)
    sheet = np.asarray(ax.images[0].get_array())
    assert sheet.shape == (9, 11, 3)
    np.testing.assert_allclose(sheet[:4, 6:11], x[1] / 255)
    np.testing.assert_allclose(sheet[5:9, :5], x[2] / 255)
