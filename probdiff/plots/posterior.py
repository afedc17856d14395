"""A posterior beside what was observed and what was true.

    truth | observation | draw 1 | draw 2 | ... | mean | sd

Draws show what the posterior holds to be possible, all of them together plausible as the data are;
their mean shows none of it, and the standard deviation only where draws differ. So draws come
first. Grey values share one scale, the standard deviations have one of their own.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from probdiff.arguments import as_array, check_at_least, read_array
from probdiff.plots.pictures import Points, check_limits, points
from probdiff.plots.style import (
    BLUE,
    ORANGE,
    SKY,
    AxesGrid,
    as_points,
    axes_or_new,
    check_looks,
    grid_or_new,
)

_Images = Num[Array | np.ndarray, "_ _ _"]


def posterior_images(
    truth: _Images | None, observation: _Images, draws: Num[Array | np.ndarray, "_ _ _ _"],
    mean: _Images, sd: _Images, *, mask: Bool[Array | np.ndarray, "..."] | None = None,
    num_draws: int = 4, vmin: float | int = 0.0, vmax: float | int = 1.0,
    observation_limits: tuple[Any, Any] | None = None, axes: AxesGrid = None,
) -> np.ndarray:  # fmt: skip
    """A sheet with a row for each example: truth, observation, draws, mean and sd.

    Pixels that were not observed are hatched on sky blue, which no grey value is.

    Args:
        truth: True images; None where they are not known, which leaves their column out.
        observation: What was observed, of any height and width; pixels that are nan were not.
        draws: Posterior draws, draws leading, as `get_samples` has them with a plate over images.
        mean: Posterior means.
        sd: Posterior standard deviations.
        mask: True where a pixel was observed, broadcastable to `observation`.
        num_draws: Draws shown, the first ones.
        vmin: Value shown black, as what is below.
        vmax: Value shown white, as what is above.
        observation_limits: Black and white of the observations, if these are in other units.
        axes: Where to draw, `(images, columns)`.

    Example:
        >>> rng, truth = np.random.default_rng(0), np.asarray(datasets.digits().test[:2])
        >>> draws = truth + rng.normal(size=(50, 2, 8, 8))
        >>> mean, sd = draws.mean(axis=0), draws.std(axis=0)
        >>> axes = plots.posterior_images(truth, truth, draws, mean, sd, num_draws=2, vmax=16)
        >>> [ax.get_title() for ax in axes[0]]
        ['truth', 'observation', 'draw 1', 'draw 2', 'mean', 'sd']
    """
    check_at_least(1, num_draws=num_draws)
    check_limits(vmin, vmax)
    given = {"observation": observation, "mean": mean, "sd": sd}
    given |= {} if truth is None else {"truth": truth}
    for name, value in given.items():
        if not as_array(name, value, "images", "height", "width").size:
            raise ValueError(f"{name} must hold one image or more; got none")
    draws = np.asarray(as_array("draws", draws, "draws", "images", "height", "width"))
    for name, value in given.items():
        if len(value) != draws.shape[1]:
            raise ValueError(f"{name} must be {draws.shape[1]} images, as draws; got {len(value)}")
    if mask is not None:
        mask = read_array("mask", mask, jnp.bool_)
        try:
            np.broadcast_to(mask, np.shape(observation))
        except ValueError as error:
            raise ValueError(f"mask must be broadcastable to observation: {error}") from None
    if observation_limits is not None:
        low, high = as_array("observation_limits", observation_limits, 2, is_finite=True)
        if not low < high:
            raise ValueError(f"observation_limits must ascend; got {observation_limits}")
    shown = [("observation", observation)]
    shown += [(f"draw {i + 1}", draw) for i, draw in enumerate(draws[:num_draws])]
    shown += [("mean", mean), ("sd", sd)]
    if truth is not None:
        shown.insert(0, ("truth", truth))
    columns = [(title, np.asarray(images, np.float64)) for title, images in shown]
    rows = len(columns[0][1])
    size = (1.2 * len(columns) + 1.2, 1.25 * rows + 0.4)
    axes = grid_or_new(axes, rows, len(columns), figsize=size)
    hidden = np.isnan(np.asarray(observation, np.float64))
    if mask is not None:
        hidden |= ~np.broadcast_to(np.asarray(mask, bool), hidden.shape)
    grey = {"cmap": "gray", "vmin": vmin, "vmax": vmax}
    sd_max = float(np.max(columns[-1][1]))
    for column, (title, images) in zip(axes.T, columns, strict=True):
        looks = grey
        if title == "sd":
            looks = {"cmap": "viridis", "vmin": 0.0, "vmax": sd_max if sd_max > 0 else 1.0}
        if title == "observation" and observation_limits is not None:
            low, high = observation_limits
            looks, title = grey | {"vmin": low, "vmax": high}, f"{title}\n{low:g} to {high:g}"
        for ax, image in zip(column, images, strict=True):
            ax.imshow(image, interpolation="nearest", **looks)
            ax.set(xticks=[], yticks=[])
        column[0].set_title(title, fontsize="medium")
    first = 0 if truth is None else 1
    for ax, pixels in zip(axes[:, first], hidden, strict=True):
        _hatch(ax, pixels)
    if hidden.any():
        axes[-1, first].set_xlabel("hatched: unseen", fontsize="small")
    figure = axes[0, 0].figure
    figure.colorbar(axes[0, -2].images[0], ax=axes[:, -2], label="value", shrink=0.8)
    figure.colorbar(axes[0, -1].images[0], ax=axes[:, -1], label="posterior sd", shrink=0.8)
    return axes


def posterior_points(
    draws: Points, *, truth: Float[Array | np.ndarray, "2"] | None = None,
    observation: Float[Array | np.ndarray, "2"] | None = None, behind: Points | None = None,
    title: str = "", limit: float = 2.6, ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Posterior draws in the plane, with the true point and the observed one.

    Args:
        observation: The observed point; a coordinate that was not measured is nan, and a line.
        behind: Points drawn pale behind, such as draws of the prior.
        limit: Half the width of the panel; points outside are not shown.

    Example:
        >>> draws = np.random.default_rng(0).normal(0.5, 0.2, size=(100, 2))
        >>> ax = plots.posterior_points(draws, observation=np.array([0.5, np.nan]))  # only x₁
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['posterior draws', 'observation']
    """
    draws = as_points("draws", draws)
    behind = None if behind is None else as_points("behind", behind)
    observation = None if observation is None else as_array("observation", observation, 2)
    truth = None if truth is None else as_array("truth", truth, 2)
    check_looks(limit=limit, title=title)
    ax = axes_or_new(ax)
    if behind is not None:
        ax.scatter(*np.asarray(behind).T, s=3, color="0.8", linewidths=0, zorder=0)
        ax.scatter([], [], s=20, color="0.8", label="prior draws")
    points(draws, title=title, limit=limit, ax=ax)
    ax.scatter([], [], s=20, color=BLUE, label="posterior draws")
    if observation is not None:
        looks = {"color": "black", "label": "observation"}
        first, second = np.asarray(observation)
        if np.isnan(second):
            ax.axvline(first, linestyle="--", linewidth=1, **looks)
        elif np.isnan(first):
            ax.axhline(second, linestyle="--", linewidth=1, **looks)
        else:
            ax.plot(first, second, "x", markersize=9, markeredgewidth=2, **looks)
    if truth is not None:
        ax.plot(
            *np.asarray(truth), "*", color=ORANGE, markersize=14, markeredgecolor="white",
            linestyle="none", label="truth",
        )  # fmt: skip
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def _hatch(ax: Axes, pixels: np.ndarray) -> None:
    """Hatched squares over the pixels that are True."""
    if not pixels.any():
        return
    corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5]])
    squares = [Path(corners + np.array([j, i]), closed=True) for i, j in np.argwhere(pixels)]
    whole = Path.make_compound_path(*squares)
    ax.add_patch(PathPatch(whole, facecolor=SKY, edgecolor="white", hatch="////", linewidth=0))
