"""Pictures of what was computed elsewhere: nothing here draws, trains or integrates.

Every function takes arrays or the DataTree of `diagnostics.bound`, and axes to draw into; it
returns the axes, or a figure where it makes one.

    training     losses, bound_per_step
    pictures     points, slices, drift, images, figure_1
"""

from probdiff.plots.pictures import drift, figure_1, images, points, slices
from probdiff.plots.style import BLUE, GREEN, ORANGE
from probdiff.plots.training import bound_per_step, losses

__all__ = [
    "BLUE",
    "GREEN",
    "ORANGE",
    "bound_per_step",
    "drift",
    "figure_1",
    "images",
    "losses",
    "points",
    "slices",
]
