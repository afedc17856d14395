"""Points and images: what a trajectory holds at its levels.

`figure_1` is the paper's first figure: the forward trajectory, the reverse trajectory and its drift
f_μ(x, t) − x at three levels.

Source of the figure: Sohl-Dickstein et al. (2015), figure 1.
"""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array, Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, to_rgb

from probdiff.arguments import (
    FINITE,
    as_array,
    check_at_least,
    check_number,
    check_text,
    shown,
)
from probdiff.plots.style import (
    BLUE,
    GREEN,
    ORANGE,
    SKY,
    AxesGrid,
    as_axes,
    as_points,
    as_rows,
    axes_or_new,
    check_looks,
    grid_or_new,
)

Points = Float[Array | np.ndarray, "_ 2"]
_Levels = Sequence[Points] | Float[Array | np.ndarray, "_ _ 2"]


def points(
    x: Points, *, title: str = "", color: str = BLUE, limit: float = 2.6, ax: Axes | None = None
) -> Axes:
    """Points in the plane, on equal axes from −limit to limit.

    Args:
        limit: Half the width of the panel; points outside are not shown.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(500, 2))
        >>> ax = plots.points(x, title="draws", limit=4.0)
        >>> ax.get_title(), ax.get_xlabel(), ax.get_ylabel()
        ('draws', 'x₁', 'x₂')
    """
    check_looks(limit=limit, title=title, color=color)
    x, ax = as_points("x", x), axes_or_new(ax)
    size = min(9.0, 3000 / max(len(x), 1))
    ax.scatter(x[:, 0], x[:, 1], s=size, color=color, alpha=0.6, linewidths=0)
    return _square(ax, limit, title)


def slices(
    levels: _Levels, titles: Sequence[str], *, color: str = BLUE, limit: float = 2.6,
    axes: Sequence[Axes] | np.ndarray | None = None,
) -> list[Axes]:  # fmt: skip
    """The same points at several levels of a trajectory, side by side.

    Args:
        levels: Points at each level.
        titles: One for each level, as are `axes`.
        limit: Half the width of each panel.

    Example:
        >>> x, noise = np.random.default_rng(0).normal(size=(2, 500, 2))
        >>> axes = plots.slices([0.5 * x, noise], ["t = 0", "t = T"])
        >>> [ax.get_title() for ax in axes]
        ['t = 0', 't = T']
    """
    levels = [as_points(f"levels[{i}]", x) for i, x in enumerate(as_rows("levels", levels))]
    titles = as_rows("titles", titles)
    for i, title in enumerate(titles):
        check_text(**{f"titles[{i}]": title})
    if len(titles) != len(levels):
        raise ValueError(f"titles must be {len(levels)}, one for each level; got {len(titles)}")
    check_looks(limit=limit, color=color)
    if axes is not None:
        axes = as_axes(axes).ravel()
        if len(axes) != len(levels):
            raise ValueError(f"axes must be {len(levels)}, one for each level; got {len(axes)}")
    else:
        (axes,) = grid_or_new(None, 1, len(levels), figsize=(3.0 * len(levels), 3.2))
    parts = zip(levels, titles, axes, strict=True)
    return [points(x, title=t, color=color, limit=limit, ax=ax) for x, t, ax in parts]


def drift(
    x: Points, displacement: Points, *, behind: Points | None = None, title: str = "",
    limit: float = 2.6, ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Drift f_μ(x, t) − x of one reverse step as arrows, which start at x.

    All arrows are stretched alike, and by how much stands in the title: the median arrow becomes
    half as long as the distance between neighbours of a square grid with as many points.

    Args:
        x: Where the arrows start.
        displacement: f_μ(x, t) − x at these points.
        behind: Draws of the reverse trajectory at this level, drawn pale behind the arrows.

    Example:
        >>> grid = np.stack(np.meshgrid([-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]), axis=-1).reshape(-1, 2)
        >>> ax = plots.drift(grid, -0.1 * grid, title="t = 5")  # all arrows to the middle
        >>> ax.get_title()
        't = 5, arrows × 5'
    """
    check_looks(limit=limit, title=title)
    x = as_points("x", x)
    displacement = np.asarray(as_array("displacement", displacement, len(x), 2))
    behind = None if behind is None else as_points("behind", behind)
    ax = axes_or_new(ax)
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
    x: Float[Array | np.ndarray, "images height width *channels"], *, columns: int = 10,
    title: str = "", vmin: float = 0.0, vmax: float = 1.0, cmap: str = "gray",
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """A sheet of grey or coloured images in reading order, a pixel apart.

    Args:
        x: Images; colours are red, green, blue on the last axis.
        columns: Images in a row.
        vmin: Value shown black, as what is below.
        vmax: Value shown white, as what is above.
        cmap: Colour map of images without channels; "viridis" for standard deviations.

    Example:
        >>> ax = plots.images(datasets.digits().test[:6], columns=3, vmax=16.0)
        >>> ax.images[0].get_array().shape  # two rows of three digits, a pixel apart
        (17, 26)
    """
    check_at_least(1, columns=columns)
    check_text(title=title)
    check_limits(vmin, vmax)
    if not isinstance(cmap, Colormap | str) or (isinstance(cmap, str) and cmap not in colormaps):
        raise ValueError(f"cmap must be a colour map of matplotlib's; got {shown(cmap)}")
    x = np.asarray(as_array("x", x), np.float64)
    if x.ndim not in (3, 4) or not x.size or x.shape[3:] not in ((), (3,)):
        raise ValueError(
            f"x must have shape (images, height, width) or (images, height, width, 3); got shape "
            f"{x.shape}"
        )
    ax = axes_or_new(ax)
    n, height, width, *channels = x.shape
    rows = math.ceil(n / columns)
    shape = (rows * (height + 1) - 1, columns * (width + 1) - 1, *channels)
    paper = to_rgb(SKY)  # else black images merge
    if channels:
        x = np.clip((x - vmin) / (vmax - vmin), 0, 1)
        sheet = np.broadcast_to(paper, shape).copy()
    else:
        sheet = np.full(shape, np.nan)
    for i, image in enumerate(x):
        top, left = (i // columns) * (height + 1), (i % columns) * (width + 1)
        sheet[top : top + height, left : left + width] = image
    shades = plt.get_cmap(cmap).with_extremes(bad=paper)
    ax.imshow(sheet, cmap=shades, vmin=vmin, vmax=vmax, interpolation="nearest")
    ax.set(title=title, xticks=[], yticks=[])
    ax.set_frame_on(False)
    return ax


def figure_1(
    forward: _Levels, reverse: _Levels, grid: _Levels, drifts: _Levels, behind: _Levels,
    levels: Sequence[int], *, drift_levels: Sequence[int] | None = None, limit: float = 2.6,
    axes: AxesGrid = None,
) -> np.ndarray:  # fmt: skip
    """Figure 1 of the paper: data diffusing, noise becoming data, and the drift that does it.

    Args:
        forward: Draws of the forward trajectory at the levels.
        reverse: Draws of the learned reverse trajectory at the levels.
        grid: Where the arrows of each drift start.
        drifts: f_μ(x, t) − x there.
        behind: Draws of the reverse trajectory at `drift_levels`, pale behind the arrows.
        levels: Levels t of the columns; 0 is the data.
        drift_levels: Levels of the third row, `levels` if absent: no step leads down from 0.
        limit: Half the width of each panel.
        axes: Where to draw, `(3, levels)`.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(2, 100, 2))  # at two levels
        >>> axes = plots.figure_1(x, x, x, -0.1 * x, x, levels=[0, 40], drift_levels=[5, 40])
        >>> axes.shape, [ax.get_title() for ax in axes[0]]
        ((3, 2), ['t = 0', 't = 40'])
    """
    levels = as_rows("levels", levels)
    drift_levels = levels if drift_levels is None else as_rows("drift_levels", drift_levels)
    for name, times in {"levels": levels, "drift_levels": drift_levels}.items():
        for i, t in enumerate(times):
            check_at_least(0, **{f"{name}[{i}]": t})
    if len(drift_levels) != len(levels):
        raise ValueError(f"drift_levels must be {len(levels)}, as levels; got {len(drift_levels)}")
    given = {
        "forward": forward, "reverse": reverse, "grid": grid, "drifts": drifts, "behind": behind,
    }  # fmt: skip
    for name, each in given.items():
        rows = as_rows(name, each)
        if len(rows) != len(levels):
            raise ValueError(f"{name} must be points at {len(levels)} levels; got {len(rows)}")
        for i, x in enumerate(rows):
            as_points(f"{name}[{i}]", x)
    check_looks(limit=limit)
    axes = grid_or_new(axes, 3, len(levels), figsize=(3.0 * len(levels), 9.4))
    slices(forward, [f"t = {t}" for t in levels], color=BLUE, limit=limit, axes=axes[0])
    slices(reverse, [f"t = {t}" for t in levels], color=ORANGE, limit=limit, axes=axes[1])
    for x, change, draws, t, ax in zip(grid, drifts, behind, drift_levels, axes[2], strict=True):
        drift(x, change, behind=draws, title=f"t = {t}", limit=limit, ax=ax)
    names = ("forward trajectory q(x_t)", "reverse trajectory p(x_t)", "drift f_μ(x, t) − x")
    for row, name in zip(axes, names, strict=True):
        row[0].set_ylabel(f"{name}\n\nx₂")
    return axes


def check_limits(vmin: float | int, vmax: float | int) -> None:
    """Raise a `ValueError` unless black lies below white."""
    check_number(FINITE, vmin=vmin, vmax=vmax)
    if not vmin < vmax:
        raise ValueError(f"vmin must be below vmax; got vmin={vmin} and vmax={vmax}")


def _square(ax: Axes, limit: float, title: str) -> Axes:
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xlabel="x₁", ylabel="x₂")
    ax.set_title(title, fontsize="medium")
    return ax
