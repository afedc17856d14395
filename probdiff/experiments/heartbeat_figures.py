"""Figures of the binary heartbeat: figure 2 of the paper, and K as the number of steps grows.

Nothing here draws or trains.

Source of the figure: Sohl-Dickstein et al. (2015), figure 2.
"""

from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probdiff import plots
from probdiff.experiments.heartbeat_ceilings import Ceilings
from probdiff.experiments.heartbeat_models import LENGTH, PERIOD, examples, phases_of


class Bounds(NamedTuple):
    """Bounds of one model, bits per sequence, with standard errors."""

    tied: tuple[float, float]
    learned: tuple[float, float]
    """The same with a learned last step."""
    gap: tuple[float, float]
    """What the tied K lacks to that of the exact diffusion, on the same draws."""


def figure_2(
    x_0: Int[np.ndarray, "draws length"],
    levels: Int[np.ndarray, "draws T length"],
    dissolved: Int[Array, "T length"],
    expected: Float[Array, "T length"],
) -> Figure:
    """Figure 2 of the paper, and how a sequence dissolves and comes about.

    Args:
        x_0: Draws.
        levels: Their trajectories x_1..x_T.
        dissolved: A forward trajectory.
        expected: E[x_0 | x_t] of the network at the levels of the second draw.
    """
    data = examples()[: len(x_0)]
    data = data[np.argsort(phases_of(data), kind="stable")]
    pulse = x_0.argmax(1)
    order = np.argsort(pulse, kind="stable")
    shifted = np.stack([np.roll(x, -p) for x, p in zip(x_0, pulse, strict=True)])
    figure = plt.figure(figsize=(11, 7), layout="constrained")
    above, below = figure.subplots(2, 4)
    sheets = {
        "data (black: 1)": data,
        "draws, sorted by phase": x_0[order],
        "draws, shifted to their pulse": shifted[order],
        "the noise they came from": levels[order, -1],
    }
    for ax, (title, bits) in zip(above, sheets.items(), strict=True):
        _bits(bits, title, "one sequence per row", ax)
    trajectories = {
        "forward trajectory of one sequence": dissolved,
        "reverse trajectory of one draw": levels[0],
        "reverse trajectory of another": levels[1],
        "its E[x₀ | x_t] on the way": expected,
    }
    T = len(dissolved)
    at = np.unique(np.linspace(1, T, 40).round().astype(int)) - 1
    for ax, (title, bits) in zip(below, trajectories.items(), strict=True):
        _trajectory(np.asarray(bits)[at], T, title, ax)
    return figure


def k_against_T(curve: dict[int, Ceilings], found: dict[int, Bounds]) -> Figure:
    """Bounds on the curves of their ceilings; below, what they lack, with bars of two se."""
    figure = plt.figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    times = sorted(found)
    looks = {"tied": (plots.BLUE, "o", 1.0), "learned": (plots.ORANGE, "D", 1.04)}
    for kind, (color, marker, shift) in looks.items():
        limits = [getattr(c, kind) for c in curve.values()]
        values, errors = np.array([getattr(found[T], kind) for T in times]).T
        above.plot(list(curve), limits, color=color, label=f"ceiling, last step {kind}")
        above.plot(times, values, marker, color=color, label=f"trained, last step {kind}")
        lacking = [getattr(curve[T], kind) for T in times] - values
        below.errorbar(  # the two side by side, or they would hide each other
            shift * np.array(times), lacking, 2 * errors, fmt=marker, color=color, capsize=3
        )
    above.axhline(-np.log2(PERIOD), color="black", linestyle="--", label="−log₂ 5, any model")
    below.axhline(0, color="black", linewidth=0.8)
    above.set(xscale="log", ylabel="K (bits per sequence)")
    above.legend(frameon=False, loc="lower right")
    below.set(xlabel="number of steps T", ylabel="ceiling − K (bits)")
    below.set_xticks(times, map(str, times))
    below.minorticks_off()
    return figure


def _bits(bits: Any, title: str, label: str, ax: Axes) -> None:
    ax.imshow(bits, cmap="gray_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    ax.set_title(title, fontsize="medium")
    ax.set(xlabel="bin", ylabel=label, xticks=range(0, LENGTH, PERIOD), yticks=[])


def _trajectory(bits: Any, T: int, title: str, ax: Axes) -> None:
    """Levels of a trajectory from t = 1 at the top to t = T at the bottom."""
    _bits(bits, title, "step t", ax)
    n = len(bits)
    ax.set_yticks([0, (n - 1) / 2, n - 1], ["1", str(T // 2), str(T)])
