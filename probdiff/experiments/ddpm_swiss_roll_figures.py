"""Pictures of the tutorial's Swiss roll: trajectories, draws beside data, bits per step, losses.

Every function takes arrays that `ddpm_swiss_roll` computed and returns a new figure.
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from probdiff import plots

COLORS = (plots.BLUE, plots.ORANGE, plots.GREEN, "black", "0.6")


def trajectories(
    data: Any, forward: Float[Array, "n T 2"], draws: Any, reverse: Float[np.ndarray, "n T 2"]
) -> Figure:
    """The forward trajectory from data and the reverse one from noise, at the same levels."""
    levels = [0, 5, 10, 20, forward.shape[1]]
    figure = plt.figure(figsize=(3 * len(levels), 6.4), layout="constrained")
    axes = figure.subplots(2, len(levels))
    titles = [f"t = {t}" for t in levels]
    for row, name, color, start, trajectory in (
        (axes[0], "forward trajectory q(x_t)", plots.BLUE, data, forward),
        (axes[1], "reverse trajectory p(x_t)", plots.ORANGE, draws, reverse),
    ):
        at = [start if t == 0 else trajectory[:, t - 1] for t in levels]
        plots.slices(at, titles, color=color, axes=row)
        row[0].set_ylabel(f"{name}\n\nx₂")
    return figure


def samples(
    data: Any, draws: dict[str, np.ndarray], p_values: dict[str, dict[str, float]]
) -> Figure:
    """Data beside draws of several models, with the p-values of their tests against data."""
    figure = plt.figure(figsize=(3 * (1 + len(draws)), 3.8), layout="constrained")
    first, *rest = figure.subplots(1, 1 + len(draws))
    plots.points(data, title="held-out data\n", ax=first)
    for ax, (name, x) in zip(rest, draws.items(), strict=True):
        p = ", ".join(f"{value:.2g}" for value in p_values[name].values())
        plots.points(x, title=f"{name}\np = {p}", color=plots.ORANGE, ax=ax)
    tests = ", ".join(next(iter(p_values.values())))
    figure.suptitle(f"p by {tests}", fontsize="medium")
    return figure


def kl_per_step(
    steps: np.ndarray, kl: dict[str, np.ndarray], least: Float[np.ndarray, " steps"]
) -> Figure:
    """What each step costs at best, bits, and what each model pays on top, at the same draws."""
    figure = plt.figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, least, color="black", label="best possible")
    main = next(iter(kl))
    left.plot(steps, kl[main], ".", color=plots.BLUE, label=main)
    left.set(yscale="log", ylabel="KL_t (bits per point)")
    for (name, values), color in zip(kl.items(), COLORS, strict=False):
        right.plot(steps, values - least, color=color, marker=".", label=name)
    right.set(ylabel="KL_t − best possible (bits per point)")
    for ax in (left, right):
        ax.set_xlabel("step t (small: near the data)")
        ax.legend(frameon=False)
    return figure


def losses(values: dict[str, np.ndarray], batch_size: int) -> Figure:
    """Losses of the three objectives, which are not of one scale."""
    figure = plt.figure(figsize=(14, 4), layout="constrained")
    labels = ("−K (nats per point)", "L_simple (per point)", "L_simple − 0.001 K (per point)")
    parts = zip(figure.subplots(1, 3), values.items(), labels, strict=False)
    for ax, (name, losses), label in parts:
        plots.losses(losses, batch_size=batch_size, ax=ax)
        ax.set_title(name, fontsize="medium")
        ax.set_ylabel(label)
        ax.xaxis.get_major_locator().set_params(nbins=4)
    return figure
