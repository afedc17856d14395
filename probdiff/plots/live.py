"""Losses drawn anew as a run goes: a callback of `fit` for notebooks.

In a notebook the picture stays in its place and changes; elsewhere `figure` is there to be saved.
"""

import sys
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from probdiff.plots.style import axes_or_new
from probdiff.plots.training import losses


class LiveLosses:
    """Losses of a run in one picture, drawn anew at each call: `fit(..., callback=LiveLosses())`.

    How often is `evaluate_every` of `fit`.

    Attributes:
        ax: The axes that hold the losses.
        figure: Its figure.

    Example:
        What `fit` does after 50 steps, with losses of 8 nats for batches of 4:

        >>> from types import SimpleNamespace
        >>> live = plots.LiveLosses(batch_size=4)
        >>> live(SimpleNamespace(losses=np.full(50, 8.0), held_out_losses=([], [])))
        >>> float(live.ax.lines[0].get_ydata().mean())  # per example
        2.0
    """

    def __init__(self, batch_size: int = 1, *, held_out_size: int = 1, ax: Axes | None = None):
        """Make an empty picture.

        Args:
            batch_size: Examples in a batch, so that losses are per example.
            held_out_size: Examples in `held_out`.
            ax: Where to draw, cleared at each call; a new figure if absent.
        """
        self.batch_size, self.held_out_size = batch_size, held_out_size
        self.ax = axes_or_new(ax)
        self._display: Any = None

    @property
    def figure(self) -> Any:
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
