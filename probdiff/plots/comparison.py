"""Models compared by their bounds: ArviZ's comparison plot of paired differences.

Each model stands at its mean bound minus the best model's, with a bar of one standard error of the
paired difference to either side. The best has no bar: it differs from itself by nothing.
"""

import arviz_plots
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes

from probdiff.plots.style import BLUE


def comparison(tree: xr.DataTree) -> Axes:
    """Mean bounds relative to the best, with standard errors of the paired differences.

    ArviZ makes the figure, `ax.figure`, and takes no axes.

    Args:
        tree: What `diagnostics.compare` returned.

    Raises:
        ValueError: If the tree is not of `diagnostics.compare`.

    Example:
        >>> import xarray as xr
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
    size = {"figsize": (7.5, 0.45 * group.sizes["model"] + 2.0), "figsize_units": "inches"}
    ax = (
        arviz_plots.plot_compare(
            _table(group),
            relative_scale=True,
            backend="matplotlib",
            figure_kwargs=size | {"layout": "constrained"},
            visuals={
                "point_estimate": {"color": BLUE},
                "error_bar": {"color": BLUE},
                "ref_line": {"color": "black", "linestyle": "--", "linewidth": 0.8},
                "labels": False,
                "title": False,
            },
        )
        .viz["plot"]
        .item()
    )
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
    ax.set_ylim(0.5, group.sizes["model"] + 0.5)
    return ax


def _table(group: xr.DataTree) -> pd.DataFrame:
    """What `plot_compare` reads, best first: `mlpd` and `se` before ArviZ 1, the others after."""
    columns = {
        "mlpd": group["mean"],
        "se": group["difference_se"],
        "mlpd_diff": group["difference"],
        "dse": group["difference_se"],
    }
    values = {name: column.values for name, column in columns.items()}
    return pd.DataFrame(values, index=group["model"].values)
