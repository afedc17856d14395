"""What a long run tells as it goes: a line of JSON for each report, and a call of one's own.

A line of the log has

    {"step": 2000, "seconds": 371.2, "loss": 612.4, "held_out": 598100.0}

with the seconds of training up to then, interrupted parts left out, the mean loss per example since
the line before, and, if there are held-out data, the loss of all of them, summed and not per
example. A run that goes on from its checkpoint first takes back the lines of steps that it has to
do again.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from probdiff.types import Params


class HeldOutLosses(NamedTuple):
    """Evaluations after `step` steps: loss of all the held-out data, summed as SVI sums it."""

    step: Int[np.ndarray, "evaluations"]
    loss: Float[np.ndarray, "evaluations"]


class Progress(NamedTuple):
    """Where a run stands after `step` steps, for a callback; a step's loss is a batch's sum."""

    step: int
    params: Params
    """Values at the parameter sites: the average where one is kept."""
    losses: Float[np.ndarray, " steps"]
    held_out_losses: HeldOutLosses


class Log:
    """The reports of a run, to a file or to a function or to both."""

    def __init__(self, path: Path | None, callback: Callable[[Progress], Any] | None):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"log must lie in a folder that exists; got {path}")
        self._path, self._callback = path, callback
        self._step, self._seconds, self._began = 0, 0.0, time.monotonic()

    def __bool__(self) -> bool:
        return self._path is not None or self._callback is not None

    def resume(self, step: int) -> None:
        """Keep the lines up to this step, and start the clock."""
        self._step = step
        if self._path is not None:
            lines = self._path.read_text().splitlines() if step and self._path.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            self._path.write_text("".join(line + "\n" for line in kept))
            if kept:
                last = json.loads(kept[-1])
                self._step, self._seconds = last["step"], last["seconds"]
        self._began = time.monotonic()

    def report(self, progress: Progress, examples: int) -> None:
        """Append a line, and call the callback, whose time does not count."""
        now = time.monotonic()
        if self._path is not None:
            losses = progress.losses[self._step :]
            steps, held_out = progress.held_out_losses
            line = {
                "step": progress.step,
                "seconds": round(self._seconds + now - self._began, 1),
                "loss": float(losses.mean()) / examples if len(losses) else None,
            }
            if len(steps) and steps[-1] == progress.step:
                line["held_out"] = float(held_out[-1])
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self._callback is not None:
            self._callback(progress)
        self._step = progress.step
        self._began += time.monotonic() - now
