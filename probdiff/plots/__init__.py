"""Pictures of what was computed elsewhere: nothing here draws, trains or integrates.

Every function takes arrays or a DataTree of `diagnostics`, of a sampler or of `infer.calibrate`,
and returns the axes, whose figure is `ax.figure`. Where to draw is `ax`, or `axes` in rows and
columns; a new figure if absent.

    training     losses; LiveLosses, a callback of `fit`
    bounds       bound_per_step, ladder, sandwich, entropy_band, information, comparison
    pictures     points, slices, drift, images, figure_1
    posterior    posterior_images, posterior_points
    inference    ess_trace, evidence, calibration
"""

from probdiff.plots.bounds import (
    bound_per_step,
    comparison,
    entropy_band,
    information,
    ladder,
    sandwich,
)
from probdiff.plots.inference import calibration, ess_trace, evidence
from probdiff.plots.pictures import drift, figure_1, images, points, slices
from probdiff.plots.posterior import posterior_images, posterior_points
from probdiff.plots.style import BLUE, GREEN, ORANGE
from probdiff.plots.training import LiveLosses, losses

__all__ = [
    "BLUE", "GREEN", "ORANGE", "LiveLosses", "bound_per_step", "calibration", "comparison", "drift",
    "entropy_band", "ess_trace", "evidence", "figure_1", "images", "information", "ladder",
    "losses", "points", "posterior_images", "posterior_points", "sandwich", "slices",
]  # fmt: skip
