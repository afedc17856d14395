"""How tight a bound is, and where it is lost: rungs, entropies and information in pictures.

    ladder         K, L_S and SMC beside each other, means over examples and examples one by one
    sandwich       bounds from below and above closing in on log p
    entropy_band   the entropy of every reverse step between its bounds
    information    what level t still tells of the data, between its bounds

Bands and bars are two standard errors.

Source: Sohl-Dickstein et al. (2015), eqs. 9 and 24.
"""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from probdiff.plots.style import BLUE, GREEN, ORANGE, axes_or_new

SHOWN = 50
"""Examples of a ladder that are drawn one by one, evenly picked where there are more."""


def ladder(tree: xr.DataTree, *, truth: float | None = None, ax: Axes | None = None) -> Axes:
    """Every rung beside the last: thin lines are examples, thick marks the mean over all of them.

    Rungs are drawn as differences to the example's last importance-weighted bound, as examples
    differ from each other by far more than an example's rungs; bars are of these differences.

    Args:
        tree: What `diagnostics.ladder` returned.
        truth: Mean log p(x_0) of these examples, where it is known.
        ax: Where to draw; a new figure if absent.

    Returns:
        The axes.

    Raises:
        ValueError: If the tree is not of `diagnostics.ladder`.

    Example:
        Two examples, bounded with 1 and with 10 trajectories:

        >>> import xarray as xr
        >>> values = {"bound": ("example", [-3.1, -2.9]), "smc": ("example", [-2.4, -2.2])}
        >>> values |= {"importance": (("example", "size"), [[-3.0, -2.5], [-2.8, -2.3]])}
        >>> values |= {"bound_mean": -3.0, "smc_mean": -2.3}
        >>> group = xr.Dataset(values, {"size": [1, 10]})
        >>> ax = plots.ladder(xr.DataTree.from_dict({"ladder": group}))
        >>> [label.get_text() for label in ax.get_xticklabels()][:3]
        ['K', 'S = 1', 'S = 10']
    """
    group = _group(tree, "ladder")
    ax = axes_or_new(ax)
    sizes, last = group["size"].values, group["importance"].values[:, -1:]
    columns = [
        group["bound"].values[:, None],
        group["importance"].values,
        group["smc"].values[:, None],
    ]
    heights = np.concatenate(columns, 1) - last
    n, places = len(heights), np.arange(heights.shape[1])
    shown = np.unique(np.linspace(0, n - 1, min(SHOWN, n)).astype(int))
    ax.plot(places[1:-1], heights[shown, 1:-1].T, color=BLUE, alpha=0.15, linewidth=0.8)
    mean = heights.mean(0)
    se = heights.std(0, ddof=1) / np.sqrt(n) if n > 1 else 0 * mean
    parts = (
        (slice(0, 1), "black", "D", f"K, mean {float(group['bound_mean']):.4g} nats"),
        (slice(1, -1), BLUE, "o", f"importance weighted, at last {last.mean():.4g} nats"),
        (slice(-1, None), ORANGE, "s", f"SMC, mean {float(group['smc_mean']):.4g} nats"),
    )
    for part, colour, marker, label in parts:
        ax.errorbar(
            places[part], mean[part], 2 * se[part], color=colour, marker=marker, capsize=3,
            linewidth=2, label=label,
        )  # fmt: skip
    if truth is not None:
        above = truth - last.mean()
        ax.axhline(above, color=GREEN, linewidth=1.5, label=f"log p of the data, {truth:.4g} nats")
    ax.set_xticks(
        places, ["K", *(f"S = {size}" for size in sizes), f"SMC, {sizes[-1]}\n(any place)"]
    )
    ax.set(
        xlabel="trajectories per example",
        ylabel=f"less the bound at S = {sizes[-1]} (nats per example)",
    )
    low = min(np.quantile(heights[shown, 1], 0.05), (mean - 2 * se).min())
    high = max((mean + 2 * se).max(), 0.0 if truth is None else truth - last.mean())
    ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-6)
    ax.set_title(f"{n} examples ± 2 standard errors", fontsize="medium")
    ax.legend(frameon=False, fontsize="small", loc="lower right")
    return ax


def sandwich(tree: xr.DataTree, *, ax: Axes | None = None) -> Axes:
    """Mean lower and upper bounds of log p(x_0) by the number of trajectories.

    Args:
        tree: What `diagnostics.sandwich` returned.
        ax: Where to draw; a new figure if absent.

    Returns:
        The axes.

    Raises:
        ValueError: If the tree is not of `diagnostics.sandwich`.

    Example:
        Bounds with 1 and with 10 trajectories, means over 5 draws of the model:

        >>> import xarray as xr
        >>> means = {"lower": [-2.0, -1.5], "upper": [0.0, -1.0], "gap": [2.0, 0.5]}
        >>> values = {f"{name}_mean": ("size", mean) for name, mean in means.items()}
        >>> values["gap_mean_se"] = ("size", [0.4, 0.1])
        >>> group = xr.Dataset(values, {"size": [1, 10], "example": range(5)})
        >>> plots.sandwich(xr.DataTree.from_dict({"sandwich": group})).get_ylabel()
        'log p(x₀), mean of 5 draws (nats)'
    """
    group = _group(tree, "sandwich")
    ax = axes_or_new(ax)
    sizes = group["size"].values
    for name, colour, text in (("upper", ORANGE, "from above"), ("lower", BLUE, "from below")):
        mean = group[f"{name}_mean"].values
        ax.plot(sizes, mean, "o-", color=colour, label=f"{text}: {mean[-1]:.4g} nats at last")
    gap, se = (float(group[name][-1]) for name in ("gap_mean", "gap_mean_se"))
    ax.fill_between(
        sizes, group["lower_mean"], group["upper_mean"], color="black", alpha=0.08,
        label=f"gap, {gap:.2g} ± {se:.1g} at last",
    )  # fmt: skip
    ax.set(
        xscale="log", xlabel="trajectories per example S",
        ylabel=f"log p(x₀), mean of {group.sizes['example']} draws (nats)",
    )  # fmt: skip
    ax.legend(frameon=False)
    return ax


def entropy_band(tree: xr.DataTree, *, ax: Axes | None = None) -> Axes:
    """Bounds on the entropy of every reverse step, as differences to the lower one.

    The height of the model's line is the term KL_t of the bound.

    Args:
        tree: What `diagnostics.entropies` returned.
        ax: Where to draw; a new figure if absent.

    Returns:
        The axes.

    Raises:
        ValueError: If the tree is not of `diagnostics.entropies`.

    Example:
        Bounds at steps 2 and 3:

        >>> import xarray as xr
        >>> bounds = {"lower": [-1.0, 0.0], "model": [-0.8, 0.5], "model_se": [0.01, 0.01]}
        >>> bounds |= {"upper": [-0.5, 1.0], "correction": [0.0, 0.0]}
        >>> group = xr.Dataset({name: ("step", value) for name, value in bounds.items()})
        >>> group = group.assign_coords(step=[2, 3]).assign_attrs(condition="if T is large")
        >>> plots.entropy_band(xr.DataTree.from_dict({"entropy": group})).get_ylabel()
        'H(X_s | X_t) above its lower bound (nats)'
    """
    group = _group(tree, "entropy")
    ax = axes_or_new(ax)
    step, lower = group["step"].values, group["lower"].values
    upper = group["upper"].values - lower
    any_data = upper + group["correction"].values
    model, se = group["model"].values - lower, group["model_se"].values
    ax.fill_between(
        step, 0, upper, color=BLUE, alpha=0.15, linewidth=0, label="between eq. 24's bounds"
    )
    if np.abs(any_data - upper).max() > 1e-3 * max(np.abs(upper).max(), 1e-9):
        ax.plot(step, any_data, color=BLUE, linestyle="--", label="upper bound for any data")
    ax.plot(step, model, color=ORANGE, linewidth=1.5, label="upper bound by the model")
    ax.fill_between(step, model - 2 * se, model + 2 * se, color=ORANGE, alpha=0.3, linewidth=0)
    top = max(np.quantile(upper, 0.98), np.quantile(model, 0.98))
    ax.set_ylim(-0.03 * top, 1.1 * top)
    ax.set(
        xlabel="step t (small: near the data)",
        ylabel="H(X_s | X_t) above its lower bound (nats)",
    )
    ax.set_title(group.attrs["condition"], fontsize="small")
    ax.legend(frameon=False)
    return ax


def information(tree: xr.DataTree, *, ax: Axes | None = None) -> Axes:
    """I(X_0; X_t) between what examples tell by contrast and what the model pays.

    Args:
        tree: What `diagnostics.information` returned.
        ax: Where to draw; a new figure if absent.

    Returns:
        The axes.

    Raises:
        ValueError: If the tree is not of `diagnostics.information`.

    Example:
        Bounds at levels 1 and 2, and at level 1 from the contrast of 100 examples:

        >>> import xarray as xr
        >>> values = {"model": ("level", [2.0, 1.0]), "model_se": ("level", [0.1, 0.1])}
        >>> values |= {"contrast": ("contrasted", [1.5]), "contrast_se": ("contrasted", [0.1])}
        >>> levels = {"level": [1, 2], "contrasted": [1]}
        >>> group = xr.Dataset(values, levels, {"most_contrast": 4.6})  # log 100
        >>> plots.information(xr.DataTree.from_dict({"information": group})).get_ylabel()
        'I(X₀; X_t) (nats per example)'
    """
    group = _group(tree, "information")
    ax = axes_or_new(ax)
    for name, at, colour, text in (
        ("model", "level", ORANGE, "at most, by the model"),
        ("contrast", "contrasted", BLUE, "at least, by contrast of examples"),
    ):
        t, mean, se = (group[n].values for n in (at, name, f"{name}_se"))
        ax.plot(t, mean, color=colour, linewidth=1.5, label=text)
        ax.fill_between(t, mean - 2 * se, mean + 2 * se, color=colour, alpha=0.3, linewidth=0)
    most = group.attrs["most_contrast"]
    ax.axhline(most, color="black", linewidth=1.2, linestyle=":", label="log N, most by contrast")
    ax.set(xlabel="level t (0: data)", ylabel="I(X₀; X_t) (nats per example)")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    return ax


def _group(tree: xr.DataTree, name: str) -> xr.DataTree:
    if name not in tree.children:
        maker = {"entropy": "entropies"}.get(name, name)
        raise ValueError(
            f"tree must come from diagnostics.{maker}; got groups {list(tree.children)}"
        )
    return tree[name]
