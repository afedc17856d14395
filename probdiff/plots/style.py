"""Colours, and axes that are made where none are given.

Colours are Okabe and Ito's, which colour-blind readers can tell apart, and black. In maps of grey
values sky blue stands for "no pixel": between images, and where nothing was observed.

Source: Okabe and Ito (2008), Color universal design.
"""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
"""For what is drawn: in a pair, blue first."""
SKY = "#56B4E9"
"""Where an image has no pixel."""


def axes_or_new(ax: Axes | None) -> Axes:
    return plt.figure(figsize=(6, 4), layout="constrained").subplots() if ax is None else ax


def square(ax: Axes, limit: float, title: str) -> Axes:
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xlabel="x₁", ylabel="x₂")
    ax.set_title(title, fontsize="medium")
    return ax
