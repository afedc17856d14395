"""A run as an ArviZ DataTree.

    posterior               equally weighted draws of all runs (chain = 1)
    sample_stats            of the same draws: log r, and the particle each of them is
    log_likelihood          log p(site | x_0) of every observed site, value by value
    posterior_predictive    a new value of every observed site for every draw, factors left out
    observed_data           the values that were observed
    runs                    draws of each run on its own (chain = run), for R-hat
    smc                     by level and run: effective number, resampling, moves; and the evidence

Dims of plates have the plates' names. Attributes say what was run and with which versions; booleans
are 0 and 1, which netCDF can hold.
"""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from arviz_base import from_dict

from probdiff.infer import results, summary
from probdiff.infer.checks import take_in_runs
from probdiff.infer.program import Conditioned, observed_data, predictive
from probdiff.infer.results import BLOCK, Result

PREDICT = 2**31 - 2
"""Folded into the run's key for posterior predictive draws."""


def datatree(result: Result, attrs: dict[str, Any]) -> xr.DataTree:
    """All groups; see the file's docstring."""
    draws = results.samples(result)
    x_0, names = draws[result.layout.name], result.layout
    key = jax.random.fold_in(result.key, PREDICT)
    likelihoods = result.walk.apply(_log_likelihoods, result.args, result.kwargs, x_0)
    predicted = result.walk.apply(_predictive, result.args, result.kwargs, x_0, key)
    observed = result.walk.apply(_observed, result.args, result.kwargs, x_0[0])
    groups = {
        "posterior": _one_chain(draws),
        "sample_stats": _one_chain(_sample_stats(result)),
        "log_likelihood": _one_chain(likelihoods),
        "posterior_predictive": _one_chain(predicted),
        "observed_data": observed,
        "runs": _runs(result),
    }
    tree = xr.DataTree(name="probdiff")
    for group, data in groups.items():
        known = names.batch_dims if group == "log_likelihood" else names.dims
        leading = 0 if group == "observed_data" else 2
        dims = {n: _dims(known.get(n, names.plates), a.ndim - leading) for n, a in data.items()}
        if data:
            tree[group] = from_dict({group: data}, dims=dims, check_conventions=False)[group]
    tree["smc"] = xr.DataTree(_levels(result))
    tree.attrs = _attrs(result) | attrs
    return tree


def _attrs(result: Result) -> dict[str, Any]:
    walk = result.walk
    sampler = {
        "T": result.layout.T,
        "steps": len(result.layout.times) - 1,
        "num_particles": walk.num_particles,
        "num_runs": walk.num_runs,
        "twist": "symbols" if result.layout.is_discrete else repr(walk.twist),
        "network_calls": summary.network_calls(result),
        "approximate": int(not walk.is_weighted),
        "note": result.layout.note,
        "warnings": "\n".join(result.complaints),
    }
    libraries = ("probdiff", "jax", "numpyro")
    return sampler | {f"{library}_version": _version(library) for library in libraries}


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # run from its source
        return "unknown"


def _sample_stats(result: Result) -> dict[str, np.ndarray]:
    """Of the draws of `posterior`: log r, and the particle's weight, run and ancestor."""
    outcome, index = result.outcome, result.index
    log_w = results.pooled_log_weights(outcome, result.walk.is_weighted)
    return {
        "log_r": results.taken(results.pooled(outcome.log_r), index),
        "log_weight": results.taken(log_w, index),
        "run": index // result.walk.num_particles,
        "particle": index % result.walk.num_particles,
        "ancestor": results.taken(results.pooled(outcome.ancestors), index),
    }


def _runs(result: Result) -> dict[str, np.ndarray]:
    """Equally weighted draws of each run, `(R, N, *plates, ...)`."""
    arrays = {result.layout.name: result.outcome.x_0, "log_r": result.outcome.log_r}
    return {name: take_in_runs(a, result.in_runs) for name, a in arrays.items()}


def _levels(result: Result) -> xr.Dataset:
    """What happened at each level, the data's first, and what it comes to."""
    outcome, health, plates = result.outcome, result.health, result.layout.plates
    by_level, by_run = ("level", "run", *plates), ("run", *plates)
    values = {
        "ess": (by_level, outcome.ess[::-1]),
        "resampled": (by_level, outcome.resampled[::-1]),
        "shift": (by_level, outcome.shift[::-1]),
        "not_finite": (by_level, outcome.bad[::-1]),
        "distinct_ancestors": (plates, health.ancestors),
        "distinct_draws": (plates, health.distinct),
    }
    if result.walk.is_weighted:
        values |= {
            "log_evidence_by_run": (by_run, outcome.log_evidences),
            "log_evidence": (plates, results.log_evidence(outcome)),
            "log_evidence_se": (plates, results.log_evidence_se(outcome)),
            "ess_final": (plates, health.ess),
            "pareto_k": (plates, health.pareto_k),
            "worst_pareto_k": (plates, health.worst_pareto_k),
            "r_hat": (plates, health.r_hat),
        }
    levels = np.arange(len(result.layout.times))
    coords = {"level": levels, "t": ("level", result.layout.times)}
    return xr.Dataset(values, coords | {"run": np.arange(result.walk.num_runs)})


def _dims(names: Sequence[str], count: int) -> list[str]:
    """The last `count` names: what is missing of a broadcast axis is missing in front."""
    return list(names)[len(names) - count :]


def _one_chain(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: a[None] for name, a in arrays.items()}


def _log_likelihoods(conditioned: Conditioned, x_0: Any) -> dict[str, Any]:
    def at(x_0: Any) -> dict[str, Any]:
        sites = conditioned.sites_at(x_0)
        return {name: _log_prob(sites[name]) for name in conditioned.observed}

    return jax.lax.map(at, jnp.asarray(x_0), batch_size=BLOCK)


def _log_prob(site: dict[str, Any]) -> Any:
    log_prob = site["fn"].log_prob(site["value"])
    log_prob = log_prob if site["scale"] is None else site["scale"] * log_prob
    return jnp.broadcast_to(log_prob, jnp.broadcast_shapes(log_prob.shape, site["fn"].batch_shape))


def _predictive(conditioned: Conditioned, x_0: Any, key: Any) -> dict[str, Any]:
    def at(inputs: Any) -> dict[str, Any]:
        return predictive(conditioned, *inputs)

    keys = jax.random.split(key, len(x_0))
    return jax.lax.map(at, (keys, jnp.asarray(x_0)), batch_size=BLOCK)


def _observed(conditioned: Conditioned, x_0: Any) -> dict[str, Any]:
    sites, values = conditioned.sites_at(x_0), observed_data(conditioned, x_0)
    shapes = {
        n: jnp.broadcast_shapes(jnp.shape(v), sites[n]["fn"].shape()) for n, v in values.items()
    }
    return {name: jnp.broadcast_to(value, shapes[name]) for name, value in values.items()}
