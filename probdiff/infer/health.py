"""What tells that a posterior is not to be trusted: measures of a run, and warnings in words.

    spread of log Ẑ over runs          > 1 nat        the runs saw different posteriors
    effective number, least            < 10 % of N    one step had to throw most particles away
    effective number, final, pooled    < 100          means have errors above a tenth of an sd
    distinct ancestors, distinct draws < 5 %          many draws are one draw
    Pareto k of the final weights      > 0.7          a variance that may be infinite, error unknown
    Pareto k of the worst step         > 0.7          the same, hidden by a resampling
    R-hat over runs                    > 1.05         runs differ in where their draws lie
    twists that are not finite         > 0            log r is nan or infinite somewhere
    √E x_0²/τ², of one entry           > 8            x_0 is where no data were
    ᾱ_T E|x_0|², elsewhere             > 0.1          the diffusion does not end in noise

Source: Vehtari et al. (2021) for R-hat, (2024) for k.
"""

from typing import Any, NamedTuple

import numpy as np

from probdiff.infer.particles import Options, Outcome

_MAX_SERIES = 2000  # coordinates whose R-hat is computed, evenly picked where there are more
_FAR = 8.0  # standard deviations of x_0
_FEWEST_FOR_PARETO = 100
"""Weights that a Pareto fit needs: a fifth of them is the tail, and k of fewer is mostly noise."""


class InferenceWarning(UserWarning):
    """A posterior, an evidence or a diffusion that is not to be trusted as it is.

    Its text says what is wrong, in how many systems, and what to do. `print_summary` and the
    attribute `warnings` of the DataTree hold the texts of a run.

    Example:
        Stop at a posterior that may be wrong:

        >>> import warnings
        >>> prior = standard_diffusion().prior({})
        >>> program = lambda y: numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
        >>> smc = infer.SMC(program, num_particles=10)  # 4 runs of 10: too few
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", infer.InferenceWarning)
        ...     smc.run(jax.random.key(0), y=2.0)
        Traceback (most recent call last):
            ...
        probdiff.infer.health.InferenceWarning: the final effective number of draws is ...
    """


class Health(NamedTuple):
    """Measures of a run, one value for each entry of the plates, `(*plates,)`; R runs."""

    is_dead: np.ndarray  # whether all weights of all runs are zero
    spread: np.ndarray  # largest less least log Ẑ
    least_ess: np.ndarray  # least effective number of any level and run, share of N
    ess: np.ndarray  # effective number of the pooled draws
    ancestors: np.ndarray  # distinct particles at the start, of all runs, from which draws descend
    distinct: np.ndarray  # distinct particles among the draws
    resampled: np.ndarray  # times resampled, the most of any run
    pareto_k: np.ndarray  # of the pooled weights; nan where they are equal or fewer than 100
    worst_pareto_k: np.ndarray  # of the weights of the step of least effective number; mean of runs
    r_hat: np.ndarray  # largest R-hat over runs, of log r and of coordinates; nan for one run
    bad: np.ndarray  # largest share of particles, of any level and run, whose twist was not finite
    left: np.ndarray  # ᾱ_T E|x_0|², on the scale of the diffusion; 0 for symbols
    far: np.ndarray  # √E x_0² of the furthest entry, in standard deviations of x_0; 0 for symbols
    is_known: np.ndarray  # whether that entry is known


def health(
    outcome: Outcome, log_w: np.ndarray, index: np.ndarray, in_runs: np.ndarray, left: Any,
    far: tuple[Any, Any] = (0.0, False),
) -> Health:  # fmt: skip
    """Measure a run.

    Args:
        outcome: The run.
        log_w: Log weights, pooled and normalised, `(R·N, *plates)`.
        index: Particles that are the draws, `(R·N, *plates)`.
        in_runs: Particles that are equally weighted draws of each run, `(R, N, *plates)`.
        left: ᾱ_T E|x_0|² of the draws.
        far: Root mean square of their furthest entry, in standard deviations; whether it is known.
    """
    z, trace = outcome.log_evidences, outcome.trace
    is_dead = np.isneginf(z).all(0)
    finite = np.where(is_dead, 0.0, z)
    runs, size = outcome.log_weights.shape[:2]
    run_of = np.arange(runs).reshape(-1, *[1] * (index.ndim))
    ancestors = (outcome.ancestors + size * run_of).reshape(log_w.shape)
    measures = (
        is_dead, finite.max(0) - finite.min(0), trace.ess.min((0, 1)) / size,
        1 / np.sum(np.exp(2 * log_w), 0), _count_distinct(np.take_along_axis(ancestors, index, 0)),
        _count_distinct(index), trace.resampled.sum(0).max(0), pareto_k(log_w),
        np.mean([pareto_k(run) for run in outcome.worst_log_weights], 0),
        _r_hat(outcome, in_runs), trace.bad.max((0, 1)),
        *(np.broadcast_to(a, np.shape(is_dead)) for a in (left, *far)),
    )  # fmt: skip
    return Health(*map(np.asarray, measures))


def pareto_k(log_w: np.ndarray) -> np.ndarray:
    """Pareto k of log weights `(M, *plates)`, over the first axis; nan where there is no tail."""
    columns = log_w.reshape(len(log_w), -1).astype(np.float64).T
    return np.array(list(map(_pareto_k, columns))).reshape(log_w.shape[1:])


def _pareto_k(log_w: np.ndarray) -> float:
    """nan where there is no tail to fit: too few weights, or equal ones."""
    from arviz_stats.base import array_stats  # slow to import

    top = log_w.max()
    is_there = log_w > top - 100  # psislw takes logs of what it fits
    if is_there.sum() < _FEWEST_FOR_PARETO or top - log_w[is_there].min() < 1e-3:
        return np.nan
    with np.errstate(all="ignore"):
        try:
            _, k = array_stats.psislw(-np.where(is_there, log_w, top - 100))
        except ValueError:  # all values of the tail are the same
            return np.nan
    return float(k)


def _count_distinct(index: np.ndarray) -> np.ndarray:
    """Distinct values along the first axis."""
    ordered = np.sort(index, 0)
    return np.asarray(1 + np.sum(ordered[1:] != ordered[:-1], 0))


def _r_hat(outcome: Outcome, in_runs: np.ndarray) -> np.ndarray:
    """Largest R-hat of each entry of the plates."""
    plates = in_runs.shape[2:]
    if len(in_runs) == 1 or in_runs.shape[1] < 8:
        return np.full(plates, np.nan)
    from arviz_stats.base import array_stats  # slow to import

    runs, size, *_ = in_runs.shape
    x_0 = take_in_runs(outcome.x_0, in_runs).reshape(runs, size, int(np.prod(plates)), -1)
    log_r = take_in_runs(outcome.log_r, in_runs).reshape(runs, size, -1, 1)
    values = np.concatenate([log_r, x_0], -1)
    every = -(-values.shape[2] * x_0.shape[3] // _MAX_SERIES)
    picked = np.r_[0, 1 : values.shape[3] : every]
    with np.errstate(all="ignore"):
        r_hat = array_stats.rhat(values[..., picked].astype(np.float64), chain_axis=0, draw_axis=1)
    largest = np.max(np.where(np.isfinite(r_hat), r_hat, -np.inf), -1)
    return np.where(np.isfinite(largest), largest, np.nan).reshape(plates)


def take_in_runs(a: np.ndarray, in_runs: np.ndarray) -> np.ndarray:
    """Particles `(R, N, *plates, ...)` picked within each run."""
    return np.take_along_axis(a, np.expand_dims(in_runs, tuple(range(in_runs.ndim, a.ndim))), 1)


def complaints(options: Options, health: Health, advice: str) -> tuple[str, ...]:
    """Warnings in words, one of each kind: what is wrong, in how many systems, and what to do.

    What to do about weights, `advice`, is the same for all of them, and said after the last.
    """
    found = _of_weights(options, health, advice) if options.is_weighted else []
    is_alive = ~(health.is_dead & options.is_weighted)
    is_far = health.far > _FAR
    found += [
        _say(health.bad > 0,
            "the twist was not finite for up to {:.1%} of the particles of a level, which were "
            "counted as almost impossible there. Check that log r and its gradient are finite "
            "wherever x_0 may lie",
            np.max(health.bad)),
        _say(is_alive & is_far,
            "{} of x_0 lies {:.0f} standard deviations from loc, by the variance of the prior, "
            "where there were no data to learn from: what the network says there is a guess. Check "
            "the units of what is {}, and loc and scale; the prior may be of other data",
            *(("a known value", _most(health.far, is_far), "known")
              if np.any(health.is_known & is_far)
              else ("an entry", _most(health.far, is_far), "observed"))),
        _say(is_alive & (health.left > 0.1) & ~is_far,
            "alpha_bar_T times E|x_0|^2 is {:.2g}, more than 0.1: the diffusion starts from noise "
            "at a level where the data are still seen, so that its own law is not quite that of "
            "the data. Train with a smaller alpha_bar_T",
            _most(health.left, is_alive & ~is_far)),
    ]  # fmt: skip
    return tuple(filter(None, found))


def _of_weights(options: Options, health: Health, advice: str) -> list[str]:
    total, is_alive = options.num_particles * options.num_runs, ~health.is_dead
    few = is_alive & (np.minimum(health.ancestors, health.distinct) < 0.05 * total)
    k, worst_k, r_hat = map(np.nan_to_num, (health.pareto_k, health.worst_pareto_k, health.r_hat))
    dead = _say(
        health.is_dead,
        "all weights are zero: no particle can have given the observations. log_evidence is -inf "
        "and the draws mean nothing. Check the likelihood's support, and raise num_particles if "
        "it should be met",
    )
    others = [
        _say(is_alive & (health.spread > 1),
            "log evidence differs by up to {:.1f} nats between runs, more than 1: log_evidence_se "
            "is not to be trusted. ",
            np.max(health.spread)),
        _say(is_alive & (health.least_ess < 0.1),
            "the effective number of particles fell to {:.1%} of num_particles at one level, below "
            "10%. ",
            _least(health.least_ess, is_alive)),
        _say(is_alive & (health.ess < 100),
            "the final effective number of draws is {:.0f}, below 100. ",
            _least(health.ess, is_alive)),
        _say(few,
            "the {} draws are down to {} distinct ones, which descend from {} particles at the "
            "start; below 5%. ",
            total, _least(health.distinct, few), _least(health.ancestors, few)),
        _say(is_alive & (k > 0.7),
            "Pareto k of the final weights is {:.2f}, above 0.7: a few particles carry the result, "
            "and its error is not known. ",
            np.max(k)),
        _say(
            is_alive & (health.resampled > 0) & (worst_k > 0.7),  # else the final weights show it
            "Pareto k of the worst step's weights is {:.2f}, above 0.7: large weights may be too "
            "rare to have been met there, which the final weights do not show. ",
            np.max(worst_k)),
        _say(is_alive & (r_hat > 1.05),
            "R-hat over the runs is {:.2f}, above 1.05: the runs put their draws in different "
            "places. ",
            np.max(r_hat)),
    ]  # fmt: skip
    texts = list(filter(None, others))
    return [dead, *map(str.strip, texts[:-1]), *(text + advice for text in texts[-1:])]


def _say(is_so: Any, text: str, *values: Any) -> str:
    """A complaint with its values put in; nothing where there is none."""
    return systems(is_so) + text.format(*values) if np.any(is_so) else ""


def _least(values: np.ndarray, among: Any) -> Any:
    return np.min(np.where(among, values, np.max(values)))


def _most(values: np.ndarray, among: Any) -> Any:
    return np.max(np.where(among, values, np.min(values)))


def systems(is_so: Any) -> str:
    """How many systems, where there is more than one."""
    return f"in {is_so.sum()} of {is_so.size} systems, " if is_so.ndim else ""
