"""Colours, axes that are made where none are given, and what several pictures draw alike.

Colours are Okabe and Ito's, which colour-blind readers can tell apart, and black. In maps of grey
values sky blue stands for "no pixel": between images, and where nothing was observed.

Source: Okabe and Ito (2008), Color universal design.
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
"""For what is drawn: in a pair, blue first."""
SKY = "#56B4E9"
"""Where an image has no pixel."""
AxesGrid = Any
"""Axes in rows and columns: an array of them, or nested sequences."""


def axes_or_new(ax: Axes | None) -> Axes:
    return plt.figure(figsize=(6, 4), layout="constrained").subplots() if ax is None else ax


def grid_or_new(
    axes: AxesGrid, rows: int, columns: int, *, figsize: tuple[float, float]
) -> np.ndarray:
    """Axes `(rows, columns)`, in a new figure where none are given."""
    if axes is None:
        figure = plt.figure(figsize=figsize, layout="constrained")
        return figure.subplots(rows, columns, squeeze=False)
    axes = np.asarray(axes)
    if axes.shape != (rows, columns):
        raise ValueError(f"axes must have shape ({rows}, {columns}); got {axes.shape}")
    return axes


def band(ax: Axes, x: np.ndarray, mean: np.ndarray, se: np.ndarray, color: str, label: str) -> None:
    """A line with a band of two standard errors around it."""
    ax.fill_between(x, mean - 2 * se, mean + 2 * se, color=color, alpha=0.3, linewidth=0)
    ax.plot(x, mean, color=color, linewidth=1.5, label=label)
