"""Bounds in pictures: where the nats go, how tight a bound is, and which model's is best.

    bound_per_step   KL_t of every step, and the parts of K = reconstruction − Σ_t KL_t − KL_T^prior
    ladder           K, L_S and SMC beside each other, means over examples and examples one by one
    sandwich         bounds from below and above closing in on log p
    entropy_band     the entropy of every reverse step between its bounds
    information      what level t still tells of the data, between its bounds
    comparison       mean bounds of models less the best one's, errors paired, by ArviZ

Each takes what the function of `diagnostics` returned that it is named for (`entropies`, `compare`,
else the same name) and refuses another. Bands and bars are two standard errors; a comparison's are
one.

Source: Sohl-Dickstein et al. (2015), eqs. 9 and 24; appendix B for the terms of K before eq. 14
takes the entropies out.
"""

import math

import arviz_plots
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes

from probdiff.arguments import FINITE, check_number, check_object
from probdiff.plots.style import BLUE, GREEN, ORANGE, axes_or_new, band

_SHOWN = 50
"""Examples of a ladder that are drawn one by one, evenly picked where there are more."""


def bound_per_step(tree: xr.DataTree, *, ax: Axes | None = None) -> Axes:
    """Where the nats go: KL_t of every step, and in the legend the three parts of K.

    Example:
        >>> x = jnp.array([-1.0, 1.0])  # of density exp(−1.42) both, 2.05 bits
        >>> tree = diagnostics.bound(jax.random.key(0), standard_diffusion(), {}, x, num_draws=99)
        >>> plots.bound_per_step(tree).get_title()
        'bound per example: -2.0... ± ... bits'
    """
    group = _group(tree, "bound", needs="kl")
    ax = axes_or_new(ax)
    kl = group["kl"]
    n = kl.sizes["example"]
    mean = kl.mean("example").values
    se = kl.std("example", ddof=1).values / math.sqrt(n) if n > 1 else np.zeros_like(mean)
    label = f"KL of step t ± 2 se, Σ KL = {mean.sum():.4g} nats"
    band(ax, group["step"].values, mean, se, BLUE, label)
    for name, text in (("reconstruction", "log p(x₀|x₁)"), ("prior_kl", "KL(q(x_T|x₀) ‖ π)")):
        ax.plot([], [], " ", label=f"{text} = {float(group[name].mean()):.4g} nats")
    nats, bits, se_bits = (group.attrs[name] for name in ("mean", "mean_bits", "se_bits"))
    ax.plot([], [], " ", label=f"K = {nats:.4g} nats = {bits:.4g} bits")
    ax.set_title(f"bound per example: {bits:.3f} ± {se_bits:.3f} bits", fontsize="medium")
    ax.set(xlabel="step t (small: near the data)", ylabel="KL_t (nats per example)")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    return ax


def ladder(tree: xr.DataTree, *, truth: float | None = None, ax: Axes | None = None) -> Axes:
    """Every rung beside the last: thin lines are examples, thick marks the mean over all of them.

    Rungs are drawn as differences to the example's last importance-weighted bound, as examples
    differ from each other by far more than an example's rungs; bars are of these differences.

    Args:
        tree: What `diagnostics.ladder` returned.
        truth: Mean log p(x_0) of these examples, where it is known.

    Example:
        >>> x = jnp.array([-1.0, 1.0])
        >>> tree = diagnostics.ladder(jax.random.key(0), standard_diffusion(), {}, x, sizes=(1, 10))
        >>> [label.get_text() for label in plots.ladder(tree).get_xticklabels()][:3]
        ['K', 'S = 1', 'S = 10']
    """
    group = _group(tree, "ladder")
    check_number(FINITE, or_none=True, truth=truth)
    ax = axes_or_new(ax)
    sizes, last = group["size"].values, group["importance"].values[:, -1:]
    has_smc, top = "smc" in group, 1 + len(sizes)  # a program has none
    names = ("bound", "importance", "smc") if has_smc else ("bound", "importance")
    heights = np.column_stack([group[name].values for name in names]) - last
    n, places = len(heights), np.arange(heights.shape[1])
    shown = np.unique(np.linspace(0, n - 1, min(_SHOWN, n)).astype(int))
    ax.plot(places[1:top], heights[shown, 1:top].T, color=BLUE, alpha=0.15, linewidth=0.8)
    mean = heights.mean(0)
    se = heights.std(0, ddof=1) / np.sqrt(n) if n > 1 else 0 * mean
    parts = (
        (slice(0, 1), "black", "D", f"K, mean {float(group['bound_mean']):.4g} nats"),
        (slice(1, top), BLUE, "o", f"importance weighted, at last {last.mean():.4g} nats"),
    )
    if has_smc:
        label = f"SMC, mean {float(group['smc_mean']):.4g} nats"
        parts += ((slice(-1, None), ORANGE, "s", label),)
    for part, colour, marker, label in parts:
        ax.errorbar(
            places[part], mean[part], 2 * se[part], color=colour, marker=marker, capsize=3,
            linewidth=2, label=label,
        )  # fmt: skip
    if truth is not None:
        above = truth - last.mean()
        ax.axhline(above, color=GREEN, linewidth=1.5, label=f"log p of the data, {truth:.4g} nats")
    names = ["K", *(f"S = {size}" for size in sizes), f"SMC, {sizes[-1]}\n(any place)"]
    ax.set_xticks(places, names[: len(places)])
    ax.set_xlabel("trajectories per example")
    ax.set_ylabel(f"less the bound at S = {sizes[-1]} (nats per example)")
    low = min(np.quantile(heights[shown, 1], 0.05), (mean - 2 * se).min())
    high = max((mean + 2 * se).max(), 0.0 if truth is None else truth - last.mean())
    ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-6)
    ax.set_title(f"{n} examples ± 2 standard errors", fontsize="medium")
    ax.legend(frameon=False, fontsize="small", loc="lower right")
    return ax


def sandwich(tree: xr.DataTree, *, ax: Axes | None = None) -> Axes:
    """Mean lower and upper bounds of log p(x_0) by the number of trajectories.

    Example:
        >>> key, diffusion = jax.random.key(0), standard_diffusion()
        >>> tree = diagnostics.sandwich(key, diffusion, {}, 5, sizes=(1, 10))
        >>> plots.sandwich(tree).get_ylabel()
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

    Example:
        >>> x, diffusion = jnp.array([-1.0, 1.0]), standard_diffusion()
        >>> tree = diagnostics.entropies(jax.random.key(0), diffusion, {}, x)
        >>> ax = plots.entropy_band(tree)
        >>> ax.get_ylabel(), ax.lines[0].get_label()
        ('H(X_s | X_t) above its lower bound (nats)', 'upper bound by the model')
    """
    group = _group(tree, "entropy")
    ax = axes_or_new(ax)
    step, lower = group["step"].values, group["lower"].values
    upper = group["upper"].values - lower
    any_data = upper + group["correction"].values
    model = group["model"].values - lower
    label = "between eq. 24's bounds"
    ax.fill_between(step, 0, upper, color=BLUE, alpha=0.15, linewidth=0, label=label)
    if np.abs(any_data - upper).max() > 1e-3 * max(np.abs(upper).max(), 1e-9):
        ax.plot(step, any_data, color=BLUE, linestyle="--", label="upper bound for any data")
    band(ax, step, model, group["model_se"].values, ORANGE, "upper bound by the model")
    top = max(np.quantile(upper, 0.98), np.quantile(model, 0.98))
    ax.set_ylim(-0.03 * top, 1.1 * top)
    ax.set_xlabel("step t (small: near the data)")
    ax.set_ylabel("H(X_s | X_t) above its lower bound (nats)")
    ax.set_title(group.attrs["condition"], fontsize="small")
    ax.legend(frameon=False)
    return ax


def information(tree: xr.DataTree, *, ax: Axes | None = None) -> Axes:
    """I(X_0; X_t) between what examples tell by contrast and what the model pays.

    Example:
        >>> x, diffusion = jax.random.normal(jax.random.key(0), (100,)), standard_diffusion()
        >>> tree = diagnostics.bound(jax.random.key(1), diffusion, {}, x)
        >>> tree = diagnostics.information(jax.random.key(2), diffusion, {}, x, tree)
        >>> [line.get_label() for line in plots.information(tree).lines]
        ['at most, by the model', 'at least, by contrast of examples', 'log N, most by contrast']
    """
    group = _group(tree, "information")
    ax = axes_or_new(ax)
    for name, at, colour, text in (
        ("model", "level", ORANGE, "at most, by the model"),
        ("contrast", "contrasted", BLUE, "at least, by contrast of examples"),
    ):
        t, mean, se = (group[n].values for n in (at, name, f"{name}_se"))
        band(ax, t, mean, se, colour, text)
    most = group.attrs["most_contrast"]
    ax.axhline(most, color="black", linewidth=1.2, linestyle=":", label="log N, most by contrast")
    ax.set(xlabel="level t (0: data)", ylabel="I(X₀; X_t) (nats per example)")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    return ax


def comparison(tree: xr.DataTree) -> Axes:
    """Mean bounds, or evidences, relative to the best, with one standard error of the difference.

    The error is paired, over examples; the best has no bar. Evidences of one observation have the
    sampler's interval for a bar. ArviZ makes the figure, `ax.figure`, and takes no axes.

    Example:
        >>> x, models = jnp.array([-1.0, 0.0, 1.0]), {}
        >>> for scale in (1.0, 3.0):
        ...     diffusion = standard_diffusion(scale=scale)  # x_0 ~ N(0, scale²)
        ...     models[f"{scale}"] = diagnostics.bound(jax.random.key(0), diffusion, {}, x)
        >>> ax = plots.comparison(diagnostics.compare(models))
        >>> [label.get_text() for label in ax.get_yticklabels()]  # the best first
        ['1.0', '3.0']
    """
    group = _group(tree, "comparison")
    # what `plot_compare` reads, best first: `mlpd` and `se` before ArviZ 1, the others after
    columns = {
        "mlpd": "mean", "se": "difference_se", "mlpd_diff": "difference", "dse": "difference_se",
    }  # fmt: skip
    values = {name: group[column].values for name, column in columns.items()}
    size = {"figsize": (7.5, 0.45 * group.sizes["model"] + 2.0), "figsize_units": "inches"}
    collection = arviz_plots.plot_compare(
        pd.DataFrame(values, index=group["model"].values), relative_scale=True,
        backend="matplotlib", figure_kwargs=size | {"layout": "constrained"},
        visuals={
            "point_estimate": {"color": BLUE}, "error_bar": {"color": BLUE}, "labels": False,
            "ref_line": {"color": "black", "linestyle": "--", "linewidth": 0.8}, "title": False,
        },
    )  # fmt: skip
    ax = collection.viz["plot"].item()
    mean, se, name = float(group["mean"][0]), float(group["se"][0]), group.attrs["best"]
    count, doubt = group.attrs["num_examples"], "; the bounds' slack may differ"
    what = "mean lower bound on log p(x)"
    if "log_bayes_factor" in group:
        what, doubt = "mean log evidence", ", which counts the sampler's"
    if count > 1:
        best = f"{mean:.4g} ± {se:.2g} ({group.attrs['units']} per example)"
        bars = f"± 1 standard error of the paired difference{doubt}"
    else:
        best, what = f"{mean:.4g} {group.attrs['units']}", "log evidence"
        bars = f"{group.attrs['prob']:.0%} intervals of the sampler"
        ends = (group[f"log_bayes_factor_{end}"].values[1:] for end in ("low", "high"))
        ax.hlines(np.arange(group.sizes["model"] - 1, 0, -1), *ends, color=BLUE)
    ax.set_xlabel(f"difference to {name!r}, whose mean is {best}".replace("-", "−"))
    ax.set_title(
        f"{what}, {count} example{'s' * (count > 1)}: further right is better\nbars: {bars}",
        fontsize="medium",
    )
    ax.set_ylim(0.5, group.sizes["model"] + 0.5)
    return ax


def _group(tree: xr.DataTree, name: str, *, needs: str | None = None) -> xr.DataTree:
    check_object(xr.DataTree, "a DataTree of diagnostics", tree=tree)
    if name not in tree.children or (needs is not None and needs not in tree[name]):
        maker = {"entropy": "entropies", "comparison": "compare"}.get(name, name)
        got = list(tree.children)
        raise ValueError(f"tree must come from diagnostics.{maker}; got groups {got}")
    return tree[name]
