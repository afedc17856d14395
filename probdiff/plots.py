"""Pictures of what was computed elsewhere: nothing here draws, trains or integrates.

Every function takes arrays or the DataTree of `diagnostics.bound`, and an `ax` to draw into; it
returns the Axes. Colours are Okabe and Ito's, which colour-blind readers can tell apart, and black.

`figure_1` is the paper's first figure: the forward chain, the reverse chain and its drift
f_μ(x, t) − x at three levels.

Source of the figure: Sohl-Dickstein et al. (2015), figure 1.
"""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Points = Float[Array | np.ndarray, "_ 2"]
Levels = Sequence[Points] | Float[Array | np.ndarray, "_ _ 2"]

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
"""Colours of Okabe and Ito (2008)."""


def losses(
    losses: Float[Array | np.ndarray, " steps"],
    *,
    batch_size: int = 1,
    held_out: tuple[Any, Any] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Training loss per example in nats: means over blocks of steps, at most 100 of them.

    The loss of a single step is an estimate at random levels, far noisier than what it estimates;
    the band is two standard errors of each block's mean. The picture's upper edge ignores the first
    tenth of training, which would flatten the rest.

    Args:
        losses: Loss of each step, summed over its batch, nats.
        batch_size: Examples in a batch.
        held_out: Steps, and loss per example on held-out data at these.
        ax: Where to draw; a new figure if absent.
    """
    ax = _axes(ax)
    values = np.asarray(losses, np.float64) / batch_size
    size = math.ceil(len(values) / 100)
    blocks = [values[start : start + size] for start in range(0, len(values), size)]
    mean = np.array([block.mean() for block in blocks])
    se = np.array([block.std() / math.sqrt(len(block)) for block in blocks])
    middle = size * np.arange(len(blocks)) + np.array([(len(b) + 1) / 2 for b in blocks])
    ax.fill_between(middle, mean - 2 * se, mean + 2 * se, color=BLUE, alpha=0.25, linewidth=0)
    ax.plot(middle, mean, color=BLUE, linewidth=1.5, label=f"training, means of {size} steps")
    if held_out is not None:
        ax.plot(*held_out, color=ORANGE, marker="o", markersize=4, label="held-out data")
    shown = mean[len(mean) // 10 :]
    low, high = shown.min(), shown.max()
    if held_out is not None:
        low = min(low, np.min(held_out[1]))
    margin = 0.1 * max(high - low, 1e-3)
    ax.set_ylim(low - margin, high + margin)
    ax.set(xlabel="training step", ylabel="loss −K (nats per example)")
    ax.legend(frameon=False)
    return ax


def bound_per_step(tree: xr.DataTree, *, ax: Axes | None = None) -> Axes:
    """Where the nats go: KL_t of every step with a band of two standard errors over examples.

    The legend gives the three parts, whose difference is the bound:
    K = reconstruction − Σ_t KL_t − KL of the prior.

    Args:
        tree: What `diagnostics.bound` returned.
        ax: Where to draw; a new figure if absent.
    """
    ax = _axes(ax)
    group = tree["bound"]
    kl = group["kl"]
    n = kl.sizes["example"]
    mean = kl.mean("example").values
    se = kl.std("example", ddof=1).values / math.sqrt(n) if n > 1 else np.zeros_like(mean)
    steps = group["step"].values
    parts = f"Σ KL = {mean.sum():.4g} nats"
    ax.fill_between(steps, mean - 2 * se, mean + 2 * se, color=BLUE, alpha=0.3, linewidth=0)
    ax.plot(steps, mean, color=BLUE, linewidth=1.5, label=f"KL of step t ± 2 se, {parts}")
    for name, text in (("reconstruction", "log p(x₀|x₁)"), ("prior_kl", "KL of the prior")):
        value = float(group[name].mean())
        ax.plot([], [], " ", label=f"{text} = {value:.4g} nats")
    mean_bits, se_bits = group.attrs["mean_bits"], group.attrs["se_bits"]
    ax.plot([], [], " ", label=f"K = {group.attrs['mean']:.4g} nats = {mean_bits:.4g} bits")
    ax.set_title(f"bound per example: {mean_bits:.3f} ± {se_bits:.3f} bits", fontsize="medium")
    ax.set(xlabel="step t (small: near the data)", ylabel="KL_t (nats per example)")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    return ax


def points(
    x: Points,
    *,
    title: str = "",
    color: str = BLUE,
    limit: float = 2.6,
    ax: Axes | None = None,
) -> Axes:
    """Points in the plane, on equal axes from −limit to limit.

    Args:
        x: Points.
        title: Title of the panel.
        color: Colour of the points.
        limit: Half the width of the panel; points outside are not shown.
        ax: Where to draw; a new figure if absent.
    """
    ax = _axes(ax)
    x = np.asarray(x)
    size = min(9.0, 3000 / max(len(x), 1))
    ax.scatter(x[:, 0], x[:, 1], s=size, color=color, alpha=0.6, linewidths=0)
    return _square(ax, limit, title)


def slices(
    levels: Levels,
    titles: Sequence[str],
    *,
    color: str = BLUE,
    limit: float = 2.6,
    axes: Sequence[Axes] | np.ndarray | None = None,
) -> list[Axes]:
    """The same points at several levels of a chain, side by side.

    Args:
        levels: Points at each level.
        titles: Title of each panel.
        color: Colour of the points.
        limit: Half the width of each panel.
        axes: One for each level; a new figure if absent.
    """
    if axes is None:
        figure = plt.figure(figsize=(3 * len(levels), 3.2), layout="constrained")
        axes = figure.subplots(1, len(levels), squeeze=False)[0]
    parts = zip(levels, titles, axes, strict=True)
    return [points(x, title=t, color=color, limit=limit, ax=ax) for x, t, ax in parts]


def drift(
    x: Points,
    displacement: Points,
    *,
    behind: Points | None = None,
    title: str = "",
    limit: float = 2.6,
    ax: Axes | None = None,
) -> Axes:
    """Drift f_μ(x, t) − x of one reverse step as arrows, which start at x.

    All arrows are stretched alike, and by how much stands in the title: the median arrow becomes
    half as long as the distance between neighbours of a square grid with as many points.

    Args:
        x: Where the arrows start.
        displacement: f_μ(x, t) − x at these points.
        behind: Points of the chain at this level, drawn pale behind the arrows.
        title: Title of the panel.
        limit: Half the width of the panel.
        ax: Where to draw; a new figure if absent.
    """
    ax = _axes(ax)
    x, displacement = np.asarray(x), np.asarray(displacement)
    if behind is not None:
        ax.scatter(*np.asarray(behind).T, s=2, color="0.8", linewidths=0, zorder=0)
    typical = float(np.median(np.linalg.norm(displacement, axis=1)))
    spacing = np.ptp(x, axis=0).max() / max(math.sqrt(len(x)) - 1, 1)
    stretch = 0.5 * spacing / typical if typical > 0 and spacing > 0 else 1.0
    ax.quiver(
        *x.T, *(stretch * displacement).T,
        angles="xy", scale_units="xy", scale=1, color=GREEN, width=0.006,
    )  # fmt: skip
    return _square(ax, limit, f"{title}, arrows × {stretch:.2g}".removeprefix(", "))


def images(
    x: Float[Array | np.ndarray, "images height width"],
    *,
    columns: int = 10,
    title: str = "",
    vmin: float = 0.0,
    vmax: float = 1.0,
    ax: Axes | None = None,
) -> Axes:
    """A sheet of grey images in reading order, a pixel apart.

    Args:
        x: Images.
        columns: Images in a row.
        title: Title of the sheet.
        vmin: Value shown black; what is below is black too.
        vmax: Value shown white; what is above is white too.
        ax: Where to draw; a new figure if absent.
    """
    ax = _axes(ax)
    x = np.asarray(x, np.float64)
    n, height, width = x.shape
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), np.nan)
    for i, image in enumerate(x):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        sheet[top : top + height, left : left + width] = image
    paper = plt.get_cmap("gray").with_extremes(bad="#56B4E9")  # else black images merge
    ax.imshow(sheet, cmap=paper, vmin=vmin, vmax=vmax, interpolation="nearest")
    ax.set(title=title, xticks=[], yticks=[])
    ax.set_frame_on(False)
    return ax


def figure_1(
    forward: Levels,
    reverse: Levels,
    grid: Levels,
    drifts: Levels,
    behind: Levels,
    levels: Sequence[int],
    *,
    drift_levels: Sequence[int] | None = None,
    limit: float = 2.6,
) -> Figure:
    """Figure 1 of the paper: data diffusing, noise becoming data, and the drift that does it.

    Args:
        forward: Draws of the forward chain at the levels.
        reverse: Draws of the learned reverse chain at the levels.
        grid: Where the arrows of each drift start.
        drifts: f_μ(x, t) − x there.
        behind: Draws of the reverse chain at the levels of the third row, pale behind the arrows.
        levels: Levels t of the columns; 0 is the data.
        drift_levels: Levels of the third row, `levels` if absent: no step leads down from 0.
        limit: Half the width of each panel.
    """
    drift_levels = levels if drift_levels is None else drift_levels
    figure = plt.figure(figsize=(3 * len(levels), 9.4), layout="constrained")
    axes = figure.subplots(3, len(levels), squeeze=False)
    slices(forward, [f"t = {t}" for t in levels], color=BLUE, limit=limit, axes=axes[0])
    slices(reverse, [f"t = {t}" for t in levels], color=ORANGE, limit=limit, axes=axes[1])
    for x, change, draws, t, ax in zip(grid, drifts, behind, drift_levels, axes[2], strict=True):
        drift(x, change, behind=draws, title=f"t = {t}", limit=limit, ax=ax)
    names = ("forward chain q(x_t)", "reverse chain p(x_t)", "drift f_μ(x, t) − x")
    for row, name in zip(axes, names, strict=True):
        row[0].set_ylabel(f"{name}\n\nx₂")
    return figure


def _axes(ax: Axes | None) -> Axes:
    return plt.figure(figsize=(6, 4), layout="constrained").subplots() if ax is None else ax


def _square(ax: Axes, limit: float, title: str) -> Axes:
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xlabel="x₁", ylabel="x₂")
    ax.set_title(title, fontsize="medium")
    return ax
