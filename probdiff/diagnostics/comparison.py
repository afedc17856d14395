"""Models compared on the same examples, by bounds or by evidences, with paired standard errors.

Bounds of two models on one example rise and fall together, since some examples are hard for both.
So the difference of the means is far better known than either mean: for models i and b and
examples n = 1..N,

    d_n = K_i(x_n) − K_b(x_n),    d̄ = (1/N) Σ_n d_n,    se = sd(d_n) / √N,

with N − 1 degrees of freedom in sd, and Student-t intervals d̄ ± t_{N−1} se. b is the model of the
highest mean. With many models it is partly best by luck; the intervals do not count that.

Where K is a lower bound, log p = K + slack, and the slack, a KL divergence at least 0, is each
model's own: a model may come second because its bound is loose, not because its density is low. The
error covers examples and the draws inside each bound, not the slack.

Where K is a log evidence, log Z_i(y_n) of a program given an observation, the programs are compared
as explanations of all observations together, or of each, with prior weights π_i:

    log B_i = Σ_n log Z_i(y_n) − log Z_b(y_n),    P(i | y_1..y_N) ∝ π_i ∏_n Z_i(y_n).

Its interval is that of the sampler, whose Ẑ are random, not of examples. With mean ȳ and variance
s² of log Ẑ over R runs, e = ȳ + s²/2 and ends l, u of an interval of log Z (see `infer.evidence`),
the difference of two sums of log Z lies

    from    ê − t_ν √(Σ_i (e_i − l_i)²/t_i² + Σ_b (u_b − e_b)²/t_b²)
    to      ê + t_ν √(Σ_i (u_i − e_i)²/t_i² + Σ_b (e_b − l_b)²/t_b²),

    ê = Σ_i e_i − Σ_b e_b,    ν = (Σ v)² / Σ (v²/(R − 1)),    v = s²/R + s⁴/(2 (R − 1)),

t quantiles of Student's t with R − 1 degrees of freedom, and ν of the whole. log of the mean of a
few Ẑ, the estimate that is printed, is low, and over many observations that adds up; ê is not.

Sources: Zou and Donner (2008) for ends of a sum from those of its parts; Welch (1947) for ν.
"""

from collections.abc import Mapping

import numpy as np
import xarray as xr
from scipy import stats

from probdiff.arguments import INNER_SHARE, POSITIVE, check_number, check_object
from probdiff.infer.evidence import log_evidence_interval

_NOTE = (
    "Lower bounds on log p(x) are compared, not log p(x): a difference may be that of the bounds' "
    "slack"
)
_NOTE_OF_FLOWS = (
    "The log density of a flow is no bound: it is of another model than the T steps of its network"
)
_NOTE_OF_EVIDENCE = (
    "Log evidences are compared, each of the diffusion of so many steps as its sampler walked. se "
    "and difference_se are over examples; log_bayes_factor_low and _high are the sampler's error"
)
_SHARED = "units", "reference_measure", "num_dims"
"""Attributes in which bounds must agree."""


def compare(
    models: Mapping[str, xr.DataTree], *, prob: float = 0.95,
    weights: Mapping[str, float] | None = None,
) -> xr.DataTree:  # fmt: skip
    """Models on the same examples by mean bound or evidence, and their differences to the best.

    Args:
        models: Two or more trees by the model's name: what `bound`, `sampled_bound` or
            `flow_density` returned for the same examples in the same order, or
            `SMC.to_datatree()` of programs given the same observations, each entry of whose plates
            is an example.
        prob: Probability of the intervals, in (0, 1).
        weights: Prior probability of each model, of evidences, up to a factor; alike if absent.

    Returns:
        DataTree with group `comparison`, dim `model`, best first, all in nats per example: `mean`
        and its `se`; `difference`, model − best, so 0 for the best and else negative, with its
        paired `difference_se` and the interval from `difference_low` to `difference_high`;
        `example_difference` per `model` and `example`. Attributes: `units`, `num_examples`,
        `prob`, `best`, `note`; of bounds `reference_measure` and `num_dims`.

        Of evidences also `log_bayes_factor`, nats for all examples together, model − best, with the
        sampler's interval from `log_bayes_factor_low` to `log_bayes_factor_high` (nan for one run),
        and that of each example from `example_difference_low` to `_high`; `probability` of each
        model given all examples, if one model made them all, and `example_probability` given each
        alone; the prior `weight`, and the `steps` of its diffusion.

    Raises:
        ValueError: if models are fewer than two, or examples of bounds; if trees are of other
            things or data; if there are weights of bounds, or not one for each model.

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

        A measurement y = 4 of x_0 ~ N(0, 1) explained by two noises, N(4; 0, 1 + σ²):

        >>> prior, trees = standard_diffusion().prior({}), {}
        >>> program = lambda y, sigma: numpyro.sample("y", dist.Normal(prior(), sigma), obs=y)
        >>> smc = infer.SMC(program, num_particles=1000)
        >>> for sigma in (1.0, 3.0):
        ...     smc.run(jax.random.key(0), 4.0, sigma)
        ...     trees[f"sigma {sigma}"] = smc.to_datatree()
        >>> group = diagnostics.compare(trees)["comparison"]
        >>> [round(float(p), 2) for p in group["probability"]]  # log Z −2.9 and −5.3
        [0.92, 0.08]
    """
    check_number(INNER_SHARE, prob=prob)
    check_object(Mapping, "a mapping of names to trees", models=models)
    if len(models) < 2:
        raise ValueError(f"models must be two or more; got {list(models)}")
    for name, tree in models.items():
        expected = "what diagnostics.bound or SMC.to_datatree returned"
        check_object(xr.DataTree, expected, **{f"models[{name!r}]": tree})
    if any("smc" in tree.children for tree in models.values()):
        found, attrs = _of_evidences(models, weights, prob)
    elif weights is not None:
        raise ValueError("weights must be left out of bounds, which are not evidences")
    else:
        found, attrs = _of_bounds(models)
    order = np.argsort(-found["values"].values.mean(1), kind="stable")
    found = found.isel(model=order)
    values = found["values"].values
    difference = values - values[0]
    mean, se = _mean_and_se(values)
    shift, shift_se = _mean_and_se(difference)
    half = stats.t.ppf((1 + prob) / 2, max(values.shape[1] - 1, 1)) * shift_se
    of_models = {
        "mean": mean, "se": se, "difference": shift, "difference_se": shift_se,
        "difference_low": shift - half, "difference_high": shift + half,
    }  # fmt: skip
    group = found.assign({name: ("model", of) for name, of in of_models.items()})
    group["example_difference"] = (("model", "example"), difference)
    if "weight" in found:
        group = _bayes_factors(group, prob)
    attrs |= {"num_examples": values.shape[1], "prob": prob, "best": str(found["model"].values[0])}
    return xr.DataTree.from_dict(
        {"comparison": group.drop_vars(_PARTS, errors="ignore").assign_attrs(attrs)},
        name="probdiff",
    )


_PARTS = "values", "estimate", "below", "above", "variance", "variance_squared"
"""Of each log Z; see `_parts`. They are not kept."""


def _of_bounds(models: Mapping[str, xr.DataTree]) -> tuple[xr.Dataset, dict]:
    """`values` by model and example."""
    groups = {name: _bound_of(name, tree) for name, tree in models.items()}
    first = next(iter(groups))
    for name in groups:
        _check_same(first, groups[first], name, groups[name])
    bounds = np.stack([group["bound"].values.astype(np.float64) for group in groups.values()])
    has_flows = any("flow" in tree.children for tree in models.values())
    note = f"{_NOTE}. {_NOTE_OF_FLOWS}" if has_flows else _NOTE
    attrs = {key: groups[first].attrs[key] for key in _SHARED} | {"note": note}
    coords = {"model": list(groups), "example": groups[first]["example"].values}
    return xr.Dataset({"values": (("model", "example"), bounds)}, coords), attrs


def _of_evidences(
    models: Mapping[str, xr.DataTree], weights: Mapping[str, float] | None, prob: float
) -> tuple[xr.Dataset, dict]:
    """`values` by model and example, log π, and parts of the interval of each log Z."""
    first = next(iter(models))
    for name, tree in models.items():
        _check_evidence(name, tree)
        _check_same_observations(first, models[first], name, tree)
    if weights is None:
        weights = dict.fromkeys(models, 1.0)
    check_object(Mapping, "a mapping of names to probabilities", weights=weights)
    if set(weights) != set(models):
        raise ValueError(f"weights must be of {sorted(models)}; got those of {sorted(weights)}")
    check_number(POSITIVE, **{f"weights[{name!r}]": weight for name, weight in weights.items()})
    parts = {
        "values": [tree["smc"]["log_evidence"].values.ravel() for tree in models.values()],
        **_parts([_by_run(tree) for tree in models.values()], prob),
    }
    prior = np.array([weights[name] for name in models], np.float64)
    of_models = {
        "weight": prior / prior.sum(),
        "steps": [t.attrs["steps"] for t in models.values()],
    }
    found = {name: (("model", "example"), np.stack(of)) for name, of in parts.items()}
    found |= {name: ("model", np.asarray(of)) for name, of in of_models.items()}
    coords = {"model": list(models), "example": np.arange(parts["values"][0].size)}
    return xr.Dataset(found, coords), {"units": "nats", "note": _NOTE_OF_EVIDENCE}


def _parts(by_run: list[np.ndarray], prob: float) -> dict[str, list[np.ndarray]]:
    """Of each log Z its estimate, squares of what lies below and above, v and v²/(R − 1)."""
    found = {name: [] for name in _PARTS[1:]}
    for z in by_run:
        df = len(z) - 1
        s2 = z.var(0, ddof=1) if df else np.full(z.shape[1], np.nan)
        v = s2 / len(z) + s2**2 / (2 * max(df, 1))
        estimate, t = z.mean(0) + s2 / 2, stats.t.ppf((1 + prob) / 2, max(df, 1))
        below, above = (((end - estimate) / t) ** 2 for end in log_evidence_interval(z, prob))
        of = estimate, below, above, v, v**2 / max(df, 1)
        for name, values in zip(found, of, strict=True):
            found[name].append(values)
    return found


def _bayes_factors(group: xr.Dataset, prob: float) -> xr.Dataset:
    """What evidences say beside their means; the best model is the first."""
    log_z, estimate, below, above, v, v2 = (group[name] for name in _PARTS)
    is_best = group["model"] == group["model"][0]
    both = [estimate - estimate[0], below + above[0], above + below[0], v + v[0], v2 + v2[0]]
    both = [xr.where(is_best, 0.0, of) for of in both]
    of_each = _ends(*both, prob)
    of_all = _ends(*(of.sum("example", skipna=False) for of in both), prob)
    log_prior = np.log(group["weight"])
    return group.assign(
        example_difference_low=of_each[0], example_difference_high=of_each[1],
        log_bayes_factor=group["example_difference"].sum("example"),
        log_bayes_factor_low=of_all[0], log_bayes_factor_high=of_all[1],
        probability=_normalised(log_prior + log_z.sum("example")),
        example_probability=_normalised(log_prior + log_z),
    )  # fmt: skip


def _ends(
    centre: xr.DataArray, down: xr.DataArray, up: xr.DataArray, v: xr.DataArray, v2: xr.DataArray,
    prob: float,
) -> tuple[xr.DataArray, xr.DataArray]:  # fmt: skip
    """Ends of an interval from the sums of its parts; of no parts, the best less itself, 0."""
    df = xr.where(v2 > 0, v**2 / xr.where(v2 > 0, v2, 1.0), 1.0)
    t = stats.t.ppf((1 + prob) / 2, df)
    return centre - t * np.sqrt(down), centre + t * np.sqrt(up)


def _normalised(log_joint: xr.DataArray) -> xr.DataArray:
    """Probabilities of models."""
    probability = np.exp(log_joint - log_joint.max("model"))
    return probability / probability.sum("model")


def _by_run(tree: xr.DataTree) -> np.ndarray:
    """log Ẑ, `(runs, examples)`."""
    z = tree["smc"]["log_evidence_by_run"].values.astype(np.float64)
    return z.reshape(len(z), -1)


def _mean_and_se(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over examples; one has no error."""
    count = values.shape[1]
    if count == 1:
        return values[:, 0], np.full(len(values), np.nan)
    return values.mean(1), values.std(1, ddof=1) / np.sqrt(count)


def _check_evidence(name: str, tree: xr.DataTree) -> None:
    """Raise a `ValueError` unless a tree holds evidences."""
    if "smc" not in tree.children or "log_evidence_by_run" not in tree["smc"]:
        raise ValueError(
            f"models[{name!r}] must come from SMC.to_datatree like the others; got groups "
            f"{list(tree.children)}"
        )
    if not np.isfinite(_by_run(tree)).all():
        raise ValueError(
            f"models[{name!r}] must hold finite evidences; got runs whose weights are all zero"
        )


def _check_same_observations(first: str, one: xr.DataTree, name: str, other: xr.DataTree) -> None:
    """Raise a `ValueError` unless two programs were given the same."""
    shapes = (tree["smc"]["log_evidence"].shape for tree in (one, other))
    given = [tree.children.get("observed_data", {}) for tree in (one, other)]
    names = [sorted(group.data_vars) if len(group) else [] for group in given]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"models must have plates of the same sizes; {first!r} and {name!r} differ"
        )
    if names[0] != names[1]:
        raise ValueError(
            f"models must observe the same sites; got {names[0]} in {first!r} and {names[1]} in "
            f"{name!r}"
        )
    for site in names[0]:
        if not given[0][site].equals(given[1][site]):
            raise ValueError(
                f"models must be given the same observations; {site!r} of {first!r} and {name!r} "
                "has other values"
            )


def _bound_of(name: str, tree: xr.DataTree) -> xr.Dataset:
    """Group `bound` of a tree, or `flow` with `log_density` for it; refused if not comparable."""
    group = xr.Dataset()
    if "bound" in tree.children:
        group = tree["bound"].to_dataset()
    elif "flow" in tree.children and "log_density" in tree["flow"]:
        group = tree["flow"].to_dataset().rename(log_density="bound")
    if "bound" not in group or not set(_SHARED) <= set(group.attrs):
        raise ValueError(
            f"models[{name!r}] must come from diagnostics.bound, sampled_bound, flow_density or "
            f"SMC.to_datatree; got groups {list(tree.children)}"
        )
    values = group["bound"].values
    if values.size < 2:
        raise ValueError(f"models[{name!r}] must hold two or more examples; got {values.size}")
    if not np.isfinite(values).all():
        index = np.flatnonzero(~np.isfinite(values)).tolist()
        raise ValueError(f"models[{name!r}] must hold finite bounds; got others at {index[:5]}")
    return group


def _check_same(first: str, one: xr.Dataset, name: str, other: xr.Dataset) -> None:
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
