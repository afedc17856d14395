"""Times side by side: rounds that alternate, the ratio of two, its interval, and one table.

With r_i the ratio of the times of round i, the ratio printed is exp of the mean of log r, and its
interval exp of the Student-t interval of that mean at 95 %: of one machine, in one process.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats


class Ratio(NamedTuple):
    """One line: a ratio of times, or what else was measured, or why it was not."""

    name: str
    ratio: float = math.nan
    low: float = math.nan
    """Lower end of the 95 % interval."""
    high: float = math.nan
    unit: str = "times"
    note: str = ""


def rounds_of(
    contestants: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, np.ndarray]:  # fmt: skip
    """Wall seconds of each round of each contestant, alternating; the first calls compile."""
    for run in contestants.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds):
        for name in list(contestants)[:: -1 if i % 2 else 1]:
            start = time.perf_counter()
            jax.block_until_ready(contestants[name]())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(each) for name, each in seconds.items()}


def ratio(name: str, ours: np.ndarray, floor: np.ndarray, per: int = 1, of: str = "") -> Ratio:
    """The ratio of two contestants' rounds; the floor's time in the note, by `per` in a round."""
    logs = np.log(ours / floor)
    half = logs.std(ddof=1) / math.sqrt(len(logs)) * stats.t.ppf(0.975, len(logs) - 1)
    ends = (math.exp(logs.mean() + sign * half) for sign in (0, -1, 1))
    best = f"best / best {ours.min() / floor.min():.3f}"
    spent = f"{np.median(floor) / per * 1e3:.3g} ms {of}".strip()
    return Ratio(name, *ends, note=f"{best}, floor {spent}, {len(logs)} rounds")


def pair(
    name: str, ours: Callable[[], Any], floor: Callable[[], Any], rounds: int, per: int = 1,
    of: str = "",
) -> Ratio:  # fmt: skip
    """Run two contestants side by side."""
    found = rounds_of({"ours": ours, "floor": floor}, rounds)
    return ratio(name, found["ours"], found["floor"], per, of)


def skipped(name: str, why: str) -> Ratio:
    """A line of what could not be measured."""
    return Ratio(name, unit="", note=f"skipped: {why}")


def table(lines: Sequence[Ratio]) -> str:
    """All lines in one table."""
    rows = [("", "ratio", "95 % interval", "unit", "")]
    for line in lines:
        has_value, has_ends = not math.isnan(line.ratio), not math.isnan(line.low)
        rows.append((
            line.name, f"{line.ratio:.3g}" if has_value else "–",
            f"{line.low:.3g} to {line.high:.3g}" if has_ends else "–", line.unit, line.note,
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    texts = ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=False)) for row in rows]
    return "\n".join(f"{text}  {row[4]}".rstrip() for text, row in zip(texts, rows, strict=True))
