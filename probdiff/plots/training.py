"""Training and the bound in pictures: losses by step, nats by level.

Both show means with a band of two standard errors, over steps of a block or over examples, and
say in a legend what the numbers add up to:

    K = reconstruction − Σ_t KL_t − KL(q(x_T | x_0) ‖ π).

Source: Sohl-Dickstein et al. (2015), appendix B: the terms before eq. 14 takes the entropies out.
"""

import math
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Array, Float
from matplotlib.axes import Axes

from probdiff.plots.style import BLUE, ORANGE, axes_or_new


def losses(
    losses: Float[Array | np.ndarray, " steps"],
    *,
    batch_size: int = 1,
    held_out: tuple[Any, Any] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Training loss per example: means over blocks of steps, at most 100 of them.

    The loss of a single step is an estimate at random levels, far noisier than what it estimates;
    the band is two standard errors of each block's mean. The picture's upper edge ignores the first
    tenth of training, which would flatten the rest.

    Args:
        losses: Loss of each step, summed over its batch; −K in nats for the bound.
        batch_size: Examples in a batch.
        held_out: Steps, and loss per example on held-out data at these.
        ax: Where to draw; a new figure if absent.

    Returns:
        The axes.

    Example:
        >>> ax = plots.losses(np.linspace(30.0, 10.0, 1000), batch_size=10)
        >>> ax.get_ylabel(), ax.lines[0].get_label()
        ('loss per example (nats for the bound)', 'training, means of 10 steps')
    """
    ax = axes_or_new(ax)
    values = np.asarray(losses, np.float64) / batch_size
    size = math.ceil(len(values) / 100)
    blocks = [values[start : start + size] for start in range(0, len(values), size)]
    mean = np.array([block.mean() for block in blocks])
    se = np.array([block.std() / math.sqrt(len(block)) for block in blocks])
    middle = size * np.arange(len(blocks)) + np.array([(len(b) + 1) / 2 for b in blocks])
    ax.fill_between(middle, mean - 2 * se, mean + 2 * se, color=BLUE, alpha=0.25, linewidth=0)
    ax.plot(middle, mean, color=BLUE, linewidth=1.5, label=f"training, means of {size} steps")
    if held_out is not None:
        ax.plot(*held_out, color=ORANGE, marker="o", markersize=4, label="held-out data")
    shown = mean[len(mean) // 10 :]
    low, high = shown.min(), shown.max()
    if held_out is not None:
        low = min(low, np.min(held_out[1]))
    margin = 0.1 * max(high - low, 1e-3)
    ax.set_ylim(low - margin, high + margin)
    ax.set(xlabel="training step", ylabel="loss per example (nats for the bound)")
    ax.legend(frameon=False)
    return ax


def bound_per_step(tree: xr.DataTree, *, ax: Axes | None = None) -> Axes:
    """Where the nats go: KL_t of every step with a band of two standard errors over examples.

    The legend gives the three parts, whose difference is the bound:
    K = reconstruction − Σ_t KL_t − KL(q(x_T | x_0) ‖ π).

    Args:
        tree: What `diagnostics.bound` returned.
        ax: Where to draw; a new figure if absent.

    Returns:
        The axes.

    Raises:
        ValueError: If the tree is not of `diagnostics.bound`.

    Example:
        The group `bound` of two examples and steps 2 and 3:

        >>> import xarray as xr
        >>> kl = [[1.0, 2.0], [3.0, 2.0]]
        >>> parts = {"reconstruction": ("example", [0.5, 0.5]), "prior_kl": ("example", [0.0, 0.0])}
        >>> mean = {"mean": -3.5, "mean_bits": -5.049, "se_bits": 1.443}
        >>> group = xr.Dataset(parts | {"kl": (("example", "step"), kl)}, {"step": [2, 3]}, mean)
        >>> plots.bound_per_step(xr.DataTree.from_dict({"bound": group})).get_title()
        'bound per example: -5.049 ± 1.443 bits'
    """
    if "bound" not in tree.children or "kl" not in tree["bound"]:
        raise ValueError(f"tree must come from diagnostics.bound; got groups {list(tree.children)}")
    ax = axes_or_new(ax)
    group = tree["bound"]
    kl = group["kl"]
    n = kl.sizes["example"]
    mean = kl.mean("example").values
    se = kl.std("example", ddof=1).values / math.sqrt(n) if n > 1 else np.zeros_like(mean)
    steps = group["step"].values
    parts = f"Σ KL = {mean.sum():.4g} nats"
    ax.fill_between(steps, mean - 2 * se, mean + 2 * se, color=BLUE, alpha=0.3, linewidth=0)
    ax.plot(steps, mean, color=BLUE, linewidth=1.5, label=f"KL of step t ± 2 se, {parts}")
    for name, text in (("reconstruction", "log p(x₀|x₁)"), ("prior_kl", "KL(q(x_T|x₀) ‖ π)")):
        value = float(group[name].mean())
        ax.plot([], [], " ", label=f"{text} = {value:.4g} nats")
    mean_bits, se_bits = group.attrs["mean_bits"], group.attrs["se_bits"]
    ax.plot([], [], " ", label=f"K = {group.attrs['mean']:.4g} nats = {mean_bits:.4g} bits")
    ax.set_title(f"bound per example: {mean_bits:.3f} ± {se_bits:.3f} bits", fontsize="medium")
    ax.set(xlabel="step t (small: near the data)", ylabel="KL_t (nats per example)")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    return ax
