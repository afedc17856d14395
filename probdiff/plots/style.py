"""Colours, axes that are made where none are given, and what several pictures draw alike.

Colours are Okabe and Ito's, which colour-blind readers can tell apart, and black. In maps of grey
values sky blue stands for "no pixel": between images, and where nothing was observed.

Source: Okabe and Ito (2008), Color universal design.
"""

from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import is_color_like

from probdiff.arguments import (
    POSITIVE,
    as_array,
    check_number,
    check_object,
    check_text,
    shown,
)

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
"""For what is drawn: in a pair, blue first."""
SKY = "#56B4E9"
"""Where an image has no pixel."""
AxesGrid = Any
"""Axes in rows and columns: an array of them, or nested sequences."""


def axes_or_new(ax: Axes | None) -> Axes:
    check_object(Axes, "matplotlib's Axes", or_none=True, ax=ax)
    return plt.figure(figsize=(6, 4), layout="constrained").subplots() if ax is None else ax


def grid_or_new(
    axes: AxesGrid, rows: int, columns: int, *, figsize: tuple[float, float]
) -> np.ndarray:
    """Axes `(rows, columns)`, in a new figure where none are given."""
    if axes is None:
        figure = plt.figure(figsize=figsize, layout="constrained")
        return figure.subplots(rows, columns, squeeze=False)
    axes = as_axes(axes)
    if axes.shape != (rows, columns):
        raise ValueError(f"axes must have shape ({rows}, {columns}); got {axes.shape}")
    return axes


def as_axes(axes: Any) -> np.ndarray:
    """An array of axes, refused where it holds something else."""
    found = np.asarray(axes, dtype=object)
    if not all(isinstance(ax, Axes) for ax in found.flat):
        raise ValueError(f"axes must be matplotlib's Axes in an array; got {shown(axes)}")
    return found


def as_rows(argument: str, value: Any) -> list[Any]:
    """A list of what a sequence or an array holds."""
    is_row = isinstance(value, list | tuple | np.ndarray | jax.Array)
    if not is_row or getattr(value, "ndim", 1) == 0 or not len(value):
        raise ValueError(f"{argument} must be a sequence, not empty; got {shown(value)}")
    return list(value)


def as_points(argument: str, value: Any) -> np.ndarray:
    """Points in the plane, `(n, 2)`, at least one."""
    points = np.asarray(as_array(argument, value, "n", 2))
    if not len(points):
        raise ValueError(f"{argument} must hold one point or more; got none")
    return points


def check_looks(*, limit: float = 1.0, title: str = "", color: Any = BLUE) -> None:
    """Raise a `ValueError` unless these are half a width, a title and a colour."""
    check_number(POSITIVE, limit=limit)
    check_text(title=title)
    if not is_color_like(color):
        raise ValueError(f"color must be a colour of matplotlib's; got {shown(color)}")


def band(ax: Axes, x: np.ndarray, mean: np.ndarray, se: np.ndarray, color: str, label: str) -> None:
    """A line with a band of two standard errors around it."""
    ax.fill_between(x, mean - 2 * se, mean + 2 * se, color=color, alpha=0.3, linewidth=0)
    ax.plot(x, mean, color=color, linewidth=1.5, label=label)
