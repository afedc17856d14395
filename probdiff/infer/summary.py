"""A posterior in plain text: its numbers, what they rest on, and what to do where that is little.

    entry       mean, standard deviation, 5 % and 95 % quantile of x_0 over the draws
    evidence    log Z in nats with its 95 % interval, for each system
    particles   effective numbers, resampling, distinct ancestors and draws, Pareto k, R-hat

Of many entries the first are shown, and it is said how many are not. Where the prior stands in
plates, particles are summed up by the worst system.
"""

from typing import Any

import numpy as np

from probdiff.infer.results import Result, pooled, taken


def entries(result: Result, limit: int) -> list[str]:
    """Mean, sd and quantiles of the first entries of x_0."""
    shape = result.outcome.x_0.shape[2:]
    plates = result.index.shape[1:]
    total = int(np.prod(shape))
    places = list(np.ndindex(shape))[:limit]
    names = [result.layout.name + (str(list(map(int, place))) if place else "") for place in places]
    width = max(map(len, names))
    lines = [f"{'':{width}} {'mean':>10} {'sd':>10} {'5%':>10} {'95%':>10}"]
    x_0 = pooled(result.outcome.x_0)
    for name, place in zip(names, places, strict=True):
        system = (slice(None), *place[: len(plates)])
        draws = taken(x_0[(slice(None), *place)], result.index[system]).astype(np.float64)
        row = draws.mean(), draws.std(), *np.quantile(draws, [0.05, 0.95])
        lines.append(f"{name:{width}} " + " ".join(f"{value:10.4g}" for value in row))
    return lines + _rest(total - limit, "entries of " + result.layout.name)


def evidence(
    values: np.ndarray, low: np.ndarray, high: np.ndarray, result: Result, limit: int
) -> list[str]:
    """log Z with its interval, system by system."""
    walked = f"of the diffusion of {len(result.layout.times) - 1} steps"
    if values.ndim == 0:
        return [f"log evidence {walked}: {_interval(values, low, high)}"]
    lines = [f"log evidence {walked}, by {', '.join(result.layout.plates)}:"]
    for place in list(np.ndindex(values.shape))[:limit]:
        interval = _interval(values[place], low[place], high[place])
        lines.append(f"  {list(map(int, place))} {interval}")
    return lines + _rest(values.size - limit, "systems")


def particles(result: Result) -> list[str]:
    """What the draws rest on; of several systems the worst."""
    health, walk, total = result.health, result.walk, result.index.shape[0]
    worst = f" (worst of {health.ess.size} systems)" if health.ess.ndim else ""
    return [
        f"effective number{worst}: least at one level {np.min(health.least_ess):.1%} of "
        f"{walk.num_particles}, final {np.min(health.ess):.0f} of {total}",
        f"resampled up to {np.max(health.resampled)} times; {np.min(health.distinct)} distinct "
        f"draws from {np.min(health.ancestors)} distinct ancestors",
        f"Pareto k: final {_worst(health.pareto_k)}, worst step "
        f"{_worst(health.worst_pareto_k)}; R-hat over runs {_worst(health.r_hat)}",
    ]


def cost(result: Result) -> str:
    """Network calls of the run."""
    calls = network_calls(result)
    return f"network calls: {calls}, {result.layout.calls} a particle (Jacobian products included)"


def network_calls(result: Result) -> int:
    """Network calls of all particles of all runs and systems."""
    return result.layout.calls * result.outcome.log_weights.size


def complaints(found: tuple[str, ...]) -> list[str]:
    """Warnings, one a line."""
    return [f"warning: {text}" for text in found] or ["no warnings"]


def _rest(count: int, of: str) -> list[str]:
    return [f"... and {count} more {of}"] if count > 0 else []


def _interval(value: Any, low: Any, high: Any) -> str:
    inside = f"95% from {low:.4f} to {high:.4f}" if np.isfinite(low) else "no interval from one run"
    return f"{value:.4f} ({inside})" if np.isfinite(value) else f"{value}"


def _worst(values: np.ndarray) -> str:
    """Largest value that there is."""
    there = values[np.isfinite(values)]
    return f"{there.max():.3f}" if there.size else "not defined"
