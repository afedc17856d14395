"""How far to trust a run: its effective numbers, its evidence, its ranks.

    ess_trace      (Σ w)² / (N Σ w²) at every level of the walk, and where particles were resampled
    evidence       log Ẑ_r of each run, log of their mean and the interval
    calibration    Δ-ECDF of the PITs of `infer.calibrate`: how far their distribution function is
                   from that of a uniform number. Dashed lines stand at the distance at which
                   Kolmogorov and Smirnov's test rejects at 0.01/m, m tests being made

Sources: Talts et al. (2018); Säilynoja, Bürkner and Vehtari (2022) for Δ-ECDFs.
"""

from typing import Any

import arviz_plots
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from scipy import stats

from probdiff.arguments import INNER_SHARE, SHARE, check_at_least, check_number, check_object
from probdiff.infer.evidence import log_evidence_interval
from probdiff.plots.style import BLUE, ORANGE, AxesGrid, as_axes, axes_or_new, grid_or_new

_COLUMNS = 4
"""Panels of a calibration side by side."""
_LEFT_OUT = "credible_interval", "suspicious_points", "p_value_text", "remove_axis"
"""What ArviZ would add to a Δ-ECDF, or take away."""


def ess_trace(tree: xr.DataTree, *, threshold: float | None = 0.5, ax: Axes | None = None) -> Axes:
    """Effective share of particles at each level, noise on the left, one line for each run.

    Where the prior stands in plates, the least over them is shown, and a mark wherever any of them
    was resampled. At t = 0 stands the share that the final draws rest on.

    Args:
        tree: `SMC.to_datatree()`; another is refused.
        threshold: Share below which the run resampled, its `ess_threshold`; None for no line.

    Example:
        >>> prior = standard_diffusion().prior({})
        >>> def program(y):
        ...     numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
        >>> smc = infer.SMC(program, num_particles=100, num_runs=2)
        >>> smc.run(jax.random.key(0), y=2.0)
        >>> plots.ess_trace(smc.to_datatree()).get_ylabel()
        'effective share of 100 particles'
    """
    check_number(SHARE, or_none=True, threshold=threshold)
    group, ax = _weighted(tree), axes_or_new(ax)
    plates = [dim for dim in group["ess"].dims if dim not in ("level", "run")]
    share = group["ess"].min(plates).transpose("level", "run") / tree.attrs["num_particles"]
    was_resampled = (group["resampled"] > 0).any(plates).transpose("level", "run").values
    t = group["t"].values
    runs = f"{share.sizes['run']} run" + "s" * (share.sizes["run"] > 1)
    systems = int(np.prod([group.sizes[dim] for dim in plates]))
    least = f", least of {systems} systems" if plates else ""
    lines = ax.plot(t, share.values, color=BLUE, linewidth=1, alpha=0.7)
    lines[0].set_label(runs + least)
    level, run = np.nonzero(was_resampled)
    ax.plot(t[level], share.values[level, run], "v", color=ORANGE, markersize=4, label="resampled")
    if threshold is not None:
        label = f"threshold {threshold:.0%}"
        ax.axhline(threshold, color="black", linestyle="--", linewidth=0.8, label=label)
    ax.set(xlabel="level t (noise on the left, data on the right)", ylim=(0, 1.03))
    ax.set_ylabel(f"effective share of {tree.attrs['num_particles']} particles")
    ax.yaxis.set_major_formatter("{x:.0%}")
    ax.invert_xaxis()
    _legend_above(ax)
    return ax


def evidence(tree: xr.DataTree, *, prob: float = 0.95, ax: Axes | None = None) -> Axes:
    """log evidence of each run, with the pooled value and its interval.

    Without plates one dot for each run and a band for the pooled value; with plates a column for
    each of their entries.

    Args:
        tree: `SMC.to_datatree()`; another is refused.
        prob: Probability of the interval, in (0, 1).

    Example:
        A measurement y = 2, of noise 1, of x_0 ~ N(0, 1), whose log evidence is −2.27:

        >>> prior = standard_diffusion().prior({})
        >>> def program(y):
        ...     numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
        >>> smc = infer.SMC(program, num_particles=1000, num_runs=3)
        >>> smc.run(jax.random.key(0), y=2.0)
        >>> plots.evidence(smc.to_datatree(), prob=0.9).get_legend().get_texts()[0].get_text()
        '-2.2..., pooled, 90% interval -2.2... to -2.2...'
    """
    check_number(INNER_SHARE, prob=prob)
    group, ax = _weighted(tree), axes_or_new(ax)
    by_run = group["log_evidence_by_run"].transpose("run", ...).values
    runs = len(by_run)
    by_run = by_run.reshape(runs, -1)
    pooled = group["log_evidence"].values.reshape(-1)
    ends = np.stack(log_evidence_interval(by_run, prob))
    low, high = np.where(np.isfinite(ends), ends, pooled)
    text = f"pooled, {prob:.0%} interval" if runs > 1 else "one run: no interval"
    if group["log_evidence"].ndim == 0:
        text = f"{pooled[0]:.3f}, {text} {low[0]:.3f} to {high[0]:.3f}" if runs > 1 else text
        ax.axhspan(low[0], high[0], color=ORANGE, alpha=0.2, linewidth=0)
        ax.axhline(pooled[0], color=ORANGE, label=text)
        ax.plot(np.arange(runs), by_run[:, 0], "o", color=BLUE, label="one run")
        ax.set(xlabel="run", xticks=np.arange(runs))
    else:
        place = np.arange(len(pooled))
        spread = np.linspace(-0.2, 0.2, runs) if runs > 1 else np.zeros(1)
        ax.plot(place + spread[:, None], by_run, "o", color=BLUE, markersize=3)
        ax.plot([], [], "o", color=BLUE, markersize=3, label="one run")
        looks = {"color": ORANGE, "markersize": 14, "linewidth": 1.5, "label": text}
        ends = np.maximum([pooled - low, high - pooled], 0.0)
        ax.errorbar(place, pooled, ends, fmt="_", **looks)
        names = ", ".join(map(str, group["log_evidence"].dims))
        ax.set(xlabel=f"entry of {names}, in order")
        ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_ylabel("log evidence (nats)")
    _legend_above(ax)
    return ax


def calibration(
    tree: xr.DataTree, *, num_panels: int = 8, axes: AxesGrid = None, **options: Any
) -> np.ndarray:
    """Δ-ECDF of each quantity's PITs: log r, then those that look worst; returns a panel each.

    A line between the dashed ones is what a sampler of the posterior gives. An arch above 0 says
    that draws are too large, below 0 too small; an S that they are too wide (first below, then
    above 0) or too narrow. In the panel of log r an arch above 0 says that draws explain the data
    too well, below 0 too badly, as those of the prior do.

    Args:
        tree: What `infer.calibrate` returned; another is refused.
        num_panels: Panels at most.
        axes: Where to draw, one for each panel at least, in any arrangement. A new figure if
            absent, which says all of the verdict at its top.
        **options: Handed to `arviz_plots.plot_ecdf_pit`.

    Example:
        >>> prior = standard_diffusion().prior({})
        >>> def program(y=None):
        ...     numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
        >>> def blind(key, y):  # draws that do not look at y
        ...     return jax.random.normal(key, (99,))
        >>> tree = infer.calibrate(jax.random.key(0), program, blind, num_simulations=60)
        >>> plots.calibration(tree)[0].get_title()
        'log_r: p = ..., rejected'
    """
    check_at_least(1, num_panels=num_panels)
    check_object(xr.DataTree, "what infer.calibrate returned", tree=tree)
    if not {"prior_sbc", "uniformity"} <= set(tree.children):
        raise ValueError(f"tree must come from infer.calibrate; got groups {list(tree.children)}")
    panels = xr.Dataset(dict(_panels(tree, num_panels)))
    is_new, axes = axes is None, _axes_of(axes, len(panels))
    figure = axes[0].figure
    places = {name: ((), _boxed(ax)) for name, ax in zip(panels, axes, strict=True)}
    drawn = {"/": xr.Dataset({"figure": ((), _boxed(figure))}), "plot": xr.Dataset(places)}
    tree_of_axes = xr.DataTree.from_dict(drawn)
    collection = arviz_plots.PlotCollection(panels, tree_of_axes, backend="matplotlib")
    looks = {
        "group": "prior_sbc", "coverage": False, "plot_collection": collection,
        # what else ArviZ shows is another test in each of its generations
        "visuals": {"ecdf_lines": {"color": BLUE}} | dict.fromkeys(_LEFT_OUT, False),
    }  # fmt: skip
    arviz_plots.plot_ecdf_pit(xr.DataTree.from_dict({"prior_sbc": panels}), **(looks | options))
    furthest = stats.kstwo.isf(tree.attrs["bound"], tree.attrs["num_simulations"])
    for ax in axes:
        ax.axhline(0, color="black", linewidth=0.6)
        for height in (-furthest, furthest):
            ax.axhline(height, color="black", linestyle="--", linewidth=0.8)
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, -1.1 * furthest), max(high, 1.1 * furthest))
        ax.title.set_fontsize("medium")
        place = ax.get_subplotspec()
        if place is None or place.is_first_col():
            ax.set_ylabel("ECDF − uniform")
    if is_new:
        attrs, hidden = tree.attrs, tree.attrs["num_tests"] - len(panels)
        verdict = (
            f"{attrs['sampler']}, {attrs['num_simulations']} simulations: least of "
            f"{attrs['num_tests']} p-values {attrs['least_p_value']:.2g}, rejected below "
            f"{attrs['bound']:.2g} (dashed)" + (f"; {hidden} not shown" if hidden else "")
        )
        figure.suptitle(verdict, fontsize="medium")
    return axes


def _axes_of(axes: AxesGrid, count: int) -> np.ndarray:
    """One axes for each panel, in a new figure where none are given."""
    if axes is not None:
        axes = np.ravel(as_axes(axes))
        if len(axes) < count:
            raise ValueError(f"axes must be at least {count}, one for each panel; got {len(axes)}")
        return axes[:count]
    rows, columns = -(-count // _COLUMNS), min(count, _COLUMNS)
    size = (max(2.7 * columns, 6.5), 2.2 * rows + 0.6)
    axes = grid_or_new(None, rows, columns, figsize=size).ravel()
    for ax in axes[1:]:
        ax.sharey(axes[0])
        ax.tick_params(labelleft=ax.get_subplotspec().is_first_col())
    for ax in axes[count:]:
        ax.remove()
    return axes[:count]


def _boxed(thing: Any) -> np.ndarray:
    """An array without axes that holds the thing, as xarray wants it."""
    box = np.empty((), dtype=object)
    box[()] = thing
    return box


def _legend_above(ax: Axes) -> None:
    """A legend that no data can lie under."""
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 3, "borderaxespad": 0.2}
    ax.legend(frameon=False, fontsize="small", **above)


def _panels(tree: xr.DataTree, count: int) -> list[tuple[str, xr.DataArray]]:
    """PITs of single quantities under their titles: log r, then by p-value."""
    found = []
    for name, p_values in tree["uniformity"].data_vars.items():
        for place in np.ndindex(p_values.shape):
            index = dict(zip(p_values.dims, place, strict=True))
            label = name + (str(list(place)) if place else "")
            p = float(p_values.values[place])
            verdict = ", rejected" if p < tree.attrs["bound"] else ""
            pit = tree["prior_sbc"][name].isel(index)
            found.append((name != "log_r", p, f"{label}: p = {p:.2g}{verdict}", pit))
    found.sort(key=lambda panel: panel[:2])
    return [(title, pit) for _, _, title, pit in found[:count]]


def _weighted(tree: xr.DataTree) -> xr.DataTree:
    check_object(xr.DataTree, "what to_datatree of an SMC returned", tree=tree)
    if "smc" not in tree.children or "log_evidence" not in tree["smc"]:
        raise ValueError("tree must come from to_datatree of an SMC, which has weights")
    return tree["smc"]
