"""Losses of training in pictures, once or, in one cell of a notebook, as a run goes."""

import math
import sys
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probdiff.arguments import as_array, check_at_least, shown
from probdiff.plots.style import BLUE, ORANGE, axes_or_new, band


def losses(
    losses: Float[Array | np.ndarray, " steps"], *, batch_size: int = 1,
    held_out: tuple[Any, Any] | None = None, ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Training loss per example: means over blocks of steps, at most 100 of them.

    The loss of a single step is an estimate at random levels, far noisier than what it estimates;
    the band is two standard errors of each block's mean. The picture's upper edge ignores the first
    tenth of training, which would flatten the rest.

    Args:
        losses: Loss of each step, summed over its batch; −K in nats for the bound.
        batch_size: Examples in a batch.
        held_out: Steps, and loss per example on held-out data at these.

    Example:
        >>> ax = plots.losses(np.linspace(30.0, 10.0, 1000), batch_size=10)
        >>> ax.get_ylabel(), ax.lines[0].get_label()
        ('loss per example (nats for the bound)', 'training, means of 10 steps')
    """
    check_at_least(1, batch_size=batch_size)
    values = np.asarray(as_array("losses", losses, "steps"), np.float64) / batch_size
    if not len(values):
        raise ValueError("losses must be of one step or more; got none")
    if held_out is not None:
        if not isinstance(held_out, tuple | list) or len(held_out) != 2:
            raise ValueError(f"held_out must be a pair, steps and losses; got {shown(held_out)}")
        at = as_array("held_out[0]", held_out[0], "evaluations")
        as_array("held_out[1]", held_out[1], len(at))
    ax = axes_or_new(ax)
    size = math.ceil(len(values) / 100)
    blocks = [values[start : start + size] for start in range(0, len(values), size)]
    mean = np.array([block.mean() for block in blocks])
    se = np.array([block.std() / math.sqrt(len(block)) for block in blocks])
    middle = size * np.arange(len(blocks)) + np.array([(len(b) + 1) / 2 for b in blocks])
    band(ax, middle, mean, se, BLUE, f"training, means of {size} steps")
    late = mean[len(mean) // 10 :]
    low, high = late.min(), late.max()
    if held_out is not None:
        ax.plot(*held_out, color=ORANGE, marker="o", markersize=4, label="held-out data")
        low = min(low, np.min(held_out[1]))
    margin = 0.1 * max(high - low, 1e-3)
    ax.set_ylim(low - margin, high + margin)
    ax.set(xlabel="training step", ylabel="loss per example (nats for the bound)")
    ax.legend(frameon=False)
    return ax


class LiveLosses:
    """Losses of a run in one picture, drawn anew at each call: `fit(..., callback=LiveLosses())`.

    How often is `evaluate_every` of `fit`; `ax` holds the losses, `figure` is to be saved.

    Args:
        batch_size: Examples in a batch, so that losses are per example.
        held_out_size: Examples in `held_out`.
        ax: Where to draw, cleared at each call.

    Example:
        >>> live = plots.LiveLosses(batch_size=4)
        >>> class progress:  # what `fit` hands over after 50 steps
        ...     losses, held_out_losses = np.full(50, 8.0), ([], [])
        >>> live(progress)
        >>> float(live.ax.lines[0].get_ydata().mean())  # per example
        2.0
    """

    def __init__(self, batch_size: int = 1, *, held_out_size: int = 1, ax: Axes | None = None):
        check_at_least(1, batch_size=batch_size, held_out_size=held_out_size)
        self.batch_size, self.held_out_size = batch_size, held_out_size
        self.ax = axes_or_new(ax)
        self._display: Any = None

    @property
    def figure(self) -> Figure:
        """The figure that holds the losses."""
        return self.ax.figure

    def __call__(self, progress: Any) -> None:
        """Draw the losses so far, `progress` being what `fit` hands to a callback."""
        steps, values = progress.held_out_losses
        held_out = (steps, values / self.held_out_size) if len(steps) else None
        self.ax.clear()
        losses(progress.losses, batch_size=self.batch_size, held_out=held_out, ax=self.ax)
        ipython = sys.modules.get("IPython")
        if ipython is None or ipython.get_ipython() is None:
            return
        if self._display is None:
            plt.close(self.figure)  # or the notebook shows it once more at the end of the cell
            self._display = ipython.display.display(self.figure, display_id=True)
        else:
            self._display.update(self.figure)
