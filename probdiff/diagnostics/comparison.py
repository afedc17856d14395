"""Models compared by their bounds on the same examples, with paired standard errors.

Bounds of two models on one example rise and fall together, since some examples are hard for both.
So the difference of the means is far better known than either mean: for models i and b and
examples n = 1..N,

    d_n = K_i(x_n) − K_b(x_n),    d̄ = (1/N) Σ_n d_n,    se = sd(d_n) / √N,

with N − 1 degrees of freedom in sd, and Student-t intervals d̄ ± t_{N−1} se. b is the model of the
highest mean. With many models it is partly best by luck; the intervals do not count that.

What is compared are lower bounds. log p = K + slack, and the slack, a KL divergence at least 0, is
each model's own: a model may come second because its bound is loose, not because its density is
low. The error covers examples and the draws inside each bound, not the slack.
"""

from collections.abc import Mapping

import numpy as np
import xarray as xr
from scipy import stats

from probdiff.arguments import INNER_SHARE, check_number, check_object

_NOTE = (
    "Lower bounds on log p(x) are compared, not log p(x): a difference may be that of the bounds' "
    "slack"
)
_SHARED = "units", "reference_measure", "num_dims"
"""Attributes in which bounds must agree."""


def compare(models: Mapping[str, xr.DataTree], *, prob: float = 0.95) -> xr.DataTree:
    """Mean bounds of several models on the same examples, and their differences to the best.

    Args:
        models: What `bound` or `sampled_bound` returned for the same examples in the same order,
            by the model's name. Two or more.
        prob: Probability of the Student-t intervals, in (0, 1).

    Returns:
        DataTree with group `comparison`, dim `model`, best first, all in nats per example: `mean`
        and its `se`; `difference`, model − best, so 0 for the best and else negative, with its
        paired `difference_se` and the interval from `difference_low` to `difference_high`;
        `example_difference` per `model` and `example`. Attributes: `units`, `num_examples`,
        `reference_measure`, `num_dims`, `prob`, `best`, `note`.

    Raises:
        ValueError: if models or examples are fewer than two, or trees are of other things or data.

    Example:
        Data of N(0, 1) under their own law and under N(½, 1), of which log p says ⅛ nat less:

        >>> key, key_x = jax.random.split(jax.random.key(0))
        >>> x, models = jax.random.normal(key_x, (2000,)), {}
        >>> for loc in (0.0, 0.5):
        ...     diffusion = standard_diffusion(loc=loc)
        ...     models[f"loc {loc}"] = diagnostics.bound(key, diffusion, {}, x)
        >>> group = diagnostics.compare(models)["comparison"]
        >>> group["model"].values.tolist()  # best first
        ['loc 0.0', 'loc 0.5']
        >>> group["difference"].values.round(1).tolist()
        [0.0, -0.1]
    """
    check_number(INNER_SHARE, prob=prob)
    check_object(Mapping, "a mapping of names to trees", models=models)
    if len(models) < 2:
        raise ValueError(f"models must be two or more; got {list(models)}")
    groups = {name: _bound_of(name, tree) for name, tree in models.items()}
    first = next(iter(groups))
    for name in groups:
        _check_same(first, groups[first], name, groups[name])
    bounds = np.stack([group["bound"].values.astype(np.float64) for group in groups.values()])
    order = np.argsort(-bounds.mean(1), kind="stable")
    names, example = np.array(list(groups))[order], groups[first]["example"].values
    attrs = {key: groups[first].attrs[key] for key in _SHARED}
    attrs |= {"num_examples": len(example), "prob": prob, "best": str(names[0]), "note": _NOTE}
    bounds = bounds[order]
    difference = bounds - bounds[0]
    mean, se = _mean_and_se(bounds)
    shift, shift_se = _mean_and_se(difference)
    half = stats.t.ppf((1 + prob) / 2, len(example) - 1) * shift_se
    values = {
        "mean": ("model", mean), "se": ("model", se), "difference": ("model", shift),
        "difference_se": ("model", shift_se), "difference_low": ("model", shift - half),
        "difference_high": ("model", shift + half),
        "example_difference": (("model", "example"), difference),
    }  # fmt: skip
    group = xr.Dataset(values, {"model": names, "example": example}, attrs)
    return xr.DataTree.from_dict({"comparison": group}, name="probdiff")


def _mean_and_se(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values.mean(1), values.std(1, ddof=1) / np.sqrt(values.shape[1])


def _bound_of(name: str, tree: xr.DataTree) -> xr.DataTree:
    """Group `bound` of a tree, refused where it cannot be compared."""
    check_object(xr.DataTree, "what diagnostics.bound returned", **{f"models[{name!r}]": tree})
    group = tree.children.get("bound")
    if group is None or "bound" not in group or not set(_SHARED) <= set(group.attrs):
        raise ValueError(
            f"models[{name!r}] must come from diagnostics.bound or sampled_bound; got groups "
            f"{list(tree.children)}"
        )
    values = group["bound"].values
    if values.size < 2:
        raise ValueError(f"models[{name!r}] must hold two or more examples; got {values.size}")
    if not np.isfinite(values).all():
        index = np.flatnonzero(~np.isfinite(values)).tolist()
        raise ValueError(f"models[{name!r}] must hold finite bounds; got others at {index[:5]}")
    return group


def _check_same(first: str, one: xr.DataTree, name: str, other: xr.DataTree) -> None:
    """Raise a `ValueError` unless two bounds are of the same examples, measured alike."""
    sizes = one.sizes["example"], other.sizes["example"]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"models must have the same number of examples; got {sizes[0]} in {first!r} and "
            f"{sizes[1]} in {name!r}"
        )
    if not np.array_equal(one["example"].values, other["example"].values):
        raise ValueError(
            f"models must have the same coordinates of example; {first!r} and {name!r} differ"
        )
    if one.attrs.get("data") != other.attrs.get("data"):
        raise ValueError(
            f"models must be bounds of the same examples in the same order; those of {first!r} and "
            f"{name!r} have other values"
        )
    for key in _SHARED:
        if not np.array_equal(one.attrs[key], other.attrs[key], equal_nan=key == "num_dims"):
            raise ValueError(
                f"models must have the same {key}; got {one.attrs[key]!r} in {first!r} and "
                f"{other.attrs[key]!r} in {name!r}"
            )
