"""What a long run tells as it goes: a line of JSON for each report, and a call of one's own.

A line of the log has

    {"step": 2000, "seconds": 371.2, "loss": 612.4, "held_out": 598100.0}

with the seconds of training up to then, interrupted parts left out, the mean loss per example since
the line before, and, if there are held-out data, the loss of all of them, summed and not per
example. A run that goes on from its checkpoint first takes back the lines of steps that it has to
do again, and a last line that was cut as the process was killed.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from probdiff import files
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
    """To be read only: the run's own."""
    held_out_losses: HeldOutLosses


class Log:
    """The reports of a run, to a file or to a function or to both."""

    def __init__(self, path: Path | None, callback: Callable[[Progress], Any] | None):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"log must lie in a folder that exists; got {path}")
        if path is not None and path.is_dir():
            raise ValueError(f"log must be a file; got the folder {path}")
        self._path, self._callback = path, callback
        self._step, self._seconds, self._began = 0, 0.0, time.monotonic()

    def __bool__(self) -> bool:
        return self._path is not None or self._callback is not None

    def resume(self, step: int) -> None:
        """Keep the lines up to this step, and start the clock.

        A `ValueError` if the run has done steps, and what is at its log's place is another file.
        """
        self._step = step
        if self._path is not None:
            kept = self._kept(step) if step and self._path.is_file() else []
            if self._path.is_file() or not self._path.exists():  # and not the null device
                text = "".join(json.dumps(line) + "\n" for line in kept)
                files.replace(self._path, text.encode())
            if kept:
                self._step, self._seconds = kept[-1]["step"], kept[-1]["seconds"]
        self._began = time.monotonic()

    def _kept(self, step: int) -> list[dict[str, Any]]:
        """Lines of the file up to this step."""
        # In binary, for a process may be killed within a character of somebody's line.
        *whole, cut = self._path.read_bytes().split(b"\n")
        lines = [_parsed(line) for line in whole]
        if None in lines:
            place = f"line {lines.index(None) + 1} of {self._path}"
            expected = 'of the form {"step": 2000, "seconds": 371.2, ...}'
            got = whole[lines.index(None)][:60].decode(errors="replace")
            raise ValueError(f"log must hold lines {expected}; got {got!r} in {place}")
        lines.append(_parsed(cut))
        return [line for line in lines if line is not None and line["step"] <= step]

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
            with files.naming(self._path), self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self._callback is not None:
            self._callback(progress)
        self._step = progress.step
        self._began += time.monotonic() - now


def _parsed(line: bytes) -> dict[str, Any] | None:
    """What a line reports, or None if it is no line of a log."""
    try:
        report = json.loads(line)
        is_report = {type(report["step"]), type(report["seconds"])} <= {int, float}
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return report if is_report else None
