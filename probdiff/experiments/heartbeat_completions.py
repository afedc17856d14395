"""Completing a heartbeat: given its first beat, does the model know the rest?

The first five bits are known exactly, `prior(known=, mask=)`, each of the five phases in turn, and
SMC infers the other fifteen. There is one right completion. What SMC says must be what the model's
own draws say: those that begin with a beat of phase j have

    frequency f_j → p(x_1..5 = beat j),  whose logs SMC returns as evidence,
    share of heartbeats among them → share of right completions.

Both are averaged over phases. As Σ_j f_j is nearly 1, the mean of log f_j is known far better than
any one of them: its error is that of the sum of 1[draw begins with j]/(5 f_j).

Source: Sohl-Dickstein et al. (2015), section 2.5, for conditioning by r, here 0 or 1.
"""

import warnings
from typing import Any, NamedTuple

import numpy as np
import numpyro
from jaxtyping import Array, Int

from probdiff import Diffusion, datasets, infer
from probdiff.experiments.heartbeat_models import LENGTH, PERIOD, phases_of
from probdiff.experiments.report import Row, mean_and_se
from probdiff.types import Params


class Completions(NamedTuple):
    """What is known of completions, each a value and its standard error."""

    right: tuple[float, float]
    """Share that is a heartbeat."""
    log_evidence: tuple[float, float]
    """log p of the first beat, nats, mean over phases."""


def complete(
    key: Array, diffusion: Diffusion, params: Params, *, num_particles: int, num_runs: int
) -> Completions:
    """Complete each of the five first beats by SMC."""
    prior = diffusion.prior(params)
    beats = datasets.heartbeat_sequences(length=LENGTH, period=PERIOD)
    is_known = np.broadcast_to(np.arange(LENGTH) < PERIOD, beats.shape)

    def program(known: Any) -> None:
        with numpyro.plate("phase", PERIOD):
            prior(known=known, mask=is_known)

    smc = infer.SMC(program, num_particles=num_particles, num_runs=num_runs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", infer.InferenceWarning)  # the error of the runs says it
        smc.run(key, beats)
    draws = smc.get_samples()["x_0"]
    right = np.mean(phases_of(draws.reshape(-1, LENGTH)) >= 0)
    error = np.sqrt(right * (1 - right) / smc.result.health.ess.sum())
    se = np.sqrt(np.sum(np.square(smc.log_evidence_se))) / PERIOD
    return Completions((float(right), float(error)), (float(np.mean(smc.log_evidence)), float(se)))


def among(x_0: Int[np.ndarray, "draws length"]) -> Completions:
    """The same by counting among unconditional draws."""
    beats = datasets.heartbeat_sequences(length=LENGTH, period=PERIOD)
    begins = (x_0[:, None, :PERIOD] == beats[:, :PERIOD]).all(-1)
    found = begins.any(1)
    is_right = np.where(phases_of(x_0[found]) >= 0, 1.0, 0.0)
    right = mean_and_se(is_right) if len(is_right) > 1 else (np.nan, np.nan)
    frequency = begins.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):  # a phase that no draw begins with
        value = np.log(frequency).mean()
        _, se = mean_and_se((begins / frequency).mean(1))
    return Completions(right, (float(value), se))


def completion_rows(by_smc: Completions, by_draws: Completions) -> list[Row]:
    """Lines of the table, what SMC says beside what the draws say."""
    sources = {"SMC": by_smc, "counted among draws": by_draws}
    right = "right completions of the first 5 bits"
    evidence = "log p of the first 5 bits, mean over phases"
    lines = [
        Row(f"{right}, {name}", 100 * found.right[0], 100 * found.right[1], "%", 100.0)
        for name, found in sources.items()
    ]
    lines += [
        Row(f"{evidence}, {name}", *found.log_evidence, "nats", -np.log(PERIOD))
        for name, found in sources.items()
    ]
    return lines
