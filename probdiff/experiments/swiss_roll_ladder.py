"""How far K of the roll is from the truth, and whose fault it is.

At held-out points x_0 whose density is known,

    log q(x_0) − K = [log q(x_0) − log p(x_0)]   the model: its network, its steps, its last step
                   + [log p(x_0) − K]            the bound

and the second part is measured by the ladder: with enough trajectories importance weighting and SMC
reach log p(x_0), and both sides meet at draws of the model.

Source: Sohl-Dickstein et al. (2015), eq. 9, for the weights.
"""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from jaxtyping import Array
from matplotlib.figure import Figure

from probdiff import Diffusion, diagnostics, plots
from probdiff.diagnostics import BITS_PER_NAT
from probdiff.experiments.report import Row, mean_and_se
from probdiff.types import Params

UNIT = "bits per point"


class Climbed(NamedTuple):
    """The ladder at held-out points, and bounds from both sides at draws."""

    tree: xr.DataTree
    both: xr.DataTree
    log_density: np.ndarray
    """log q(x_0) of the same held-out points, nats."""


def climb(
    key: Array, diffusion: Diffusion, params: Params, x_0: Any, log_density: Any,
    sizes: tuple[int, ...],
) -> Climbed:  # fmt: skip
    """Climb the ladder at points whose log density is known."""
    key_ladder, key_both = jax.random.split(key)
    options: dict[str, Any] = {"sizes": sizes, "block_size": 16_384}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diagnostics.LadderWarning)  # the table tells
        tree = diagnostics.ladder(key_ladder, diffusion, params, np.asarray(x_0), **options)
    both = diagnostics.sandwich(key_both, diffusion, params, len(x_0), num_repeats=1, **options)
    return Climbed(tree, both, np.asarray(log_density))


def ladder_rows(found: Climbed) -> list[Row]:
    """Lines of the table: rungs, and what is between them, paired by point."""
    group, both = found.tree["ladder"], found.both["sandwich"]
    n, truth = len(found.log_density), found.log_density * BITS_PER_NAT
    k, smc = (group[name].values * BITS_PER_NAT for name in ("bound", "smc"))
    rungs = group["importance"].values * BITS_PER_NAT
    sizes, at = group["size"].values, f"ladder, {n} points"
    ceiling = float(truth.mean())
    rows = [Row(f"{at}: K", *mean_and_se(k), UNIT, ceiling)]
    rows += [
        Row(f"{at}: importance weighted, S = {size}", *mean_and_se(rung), UNIT, ceiling)
        for size, rung in zip(sizes, rungs.T, strict=True)
    ]
    gap, gap_se = (float(both[name][-1]) for name in ("gap_mean", "gap_mean_se"))
    return [
        *rows,
        Row(f"{at}: SMC, {sizes[-1]} particles", *mean_and_se(smc), UNIT, ceiling),
        Row(f"{at}: log density of the roll", *mean_and_se(truth), UNIT),
        Row("gap: the bound's, S at most − K", *mean_and_se(rungs[:, -1] - k), UNIT, 0.0),
        Row("gap: the model's, roll − S at most", *mean_and_se(truth - rungs[:, -1]), UNIT, 0.0),
        Row("gap: left at draws of the model, upper − lower at most S", gap * BITS_PER_NAT,
            gap_se * BITS_PER_NAT, UNIT, 0.0),
        Row("ladder: points with Pareto k > 0.7", 100 * float(np.mean(group["pareto_k"] > 0.7)),
            None, "%"),
    ]  # fmt: skip


def ranking_rows(*trees: Mapping[str, xr.DataTree]) -> list[Row]:
    """Differences to the best model, paired, by each set of bounds of the same models."""
    rows = []
    for models in trees:
        group = diagnostics.compare(models)["comparison"]
        best, n = group.attrs["best"], group.attrs["num_examples"]
        difference, se = (group[v] * BITS_PER_NAT for v in ("difference", "difference_se"))
        rows += [
            Row(f"K less that of the best ({best}), {n} points: {name}",
                float(difference.sel(model=name)), float(se.sel(model=name)), UNIT)
            for name in group["model"].values[1:]
        ]  # fmt: skip
    return rows


def ladder_figure(found: Climbed) -> Figure:
    """Rungs at held-out points, and both sides at draws."""
    figure = plt.figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    plots.ladder(found.tree, truth=float(found.log_density.mean()), ax=left)
    plots.sandwich(found.both, ax=right)
    return figure
