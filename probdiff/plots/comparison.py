"""Models compared by their bounds: paired differences, as ArviZ's comparison plot has them.

Each model stands at its mean bound minus the best model's, with a bar of one standard error of the
paired difference to either side. The best has no bar: it differs from itself by nothing.
"""

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from probdiff.plots.style import BLUE


def comparison(tree: xr.DataTree, *, ax: Axes | None = None) -> Axes:
    """Mean bounds relative to the best, with standard errors of the paired differences.

    Args:
        tree: What `diagnostics.compare` returned.
        ax: Where to draw; a new figure if absent.

    Returns:
        The axes.

    Raises:
        ValueError: If the tree is not of `diagnostics.compare`.

    Example:
        >>> import xarray as xr
        >>> from probdiff import diagnostics, plots
        >>> units = {"units": "nats", "reference_measure": "area", "num_dims": 2}
        >>> def bound_of(values):
        ...     group = xr.Dataset({"bound": ("example", values)}, {"example": range(3)}, units)
        ...     return xr.DataTree.from_dict({"bound": group})
        >>> trees = {"short": bound_of([1.0, 2.0, 3.0]), "long": bound_of([1.2, 2.3, 3.1])}
        >>> ax = plots.comparison(diagnostics.compare(trees))
        >>> [label.get_text() for label in ax.get_yticklabels()]  # the best first
        ['long', 'short']
    """
    if "comparison" not in tree.children:
        raise ValueError(
            f"tree must come from diagnostics.compare; got groups {list(tree.children)}"
        )
    group = tree["comparison"]
    n = group.sizes["model"]
    if ax is None:
        ax = plt.figure(figsize=(7.5, 0.45 * n + 2.0), layout="constrained").subplots()
    difference, error = group["difference"].values, group["difference_se"].values
    place = np.arange(n, 0, -1)
    for low, high, height in zip(difference - error, difference + error, place, strict=True):
        ax.plot([low, high], [height, height], color=BLUE)
    ax.scatter(difference, place, color=BLUE)
    ax.axvline(0, color="black", linestyle="--", linewidth=0.8)
    ax.set_yticks(place, group["model"].values)
    mean, se = float(group["mean"][0]), float(group["se"][0])
    best = f"{mean:.4g} ± {se:.2g}".replace("-", "−")
    name = group.attrs["best"]
    ax.set_xlabel(
        f"difference to {name!r}, whose mean is {best} ({group.attrs['units']} per example)"
    )
    ax.set_title(
        f"mean lower bound on log p(x), {group.attrs['num_examples']} examples: further right is "
        "better\nbars: ± 1 standard error of the paired difference; the bounds' slack may differ",
        fontsize="medium",
    )
    ax.set_ylim(0.5, n + 0.5)
    return ax
