"""Binary heartbeat: how close to the truth is the bound of a diffusion of bits?

The data are five sequences of 20 bits, a 1 in every fifth bin, the phase uniform; no model can say
more than log2(1/5) = −2.3219 bits of one. As in 2015 the diffusion has T = 2000 binomial steps with
β_t = 1/(T − t + 1), ends in B(0.2) for each bit, and its last step is tied. What K can then reach
is known exactly (`exact`): −2.3683 bits with the best steps that treat bins alone, 0.046 above the
published K; the rest up to log2(1/5) is the price of the tied last step, which a learned one saves.

The network, a perceptron of 3 layers of 64 units, says p(x_0 | x_t), and one training serves many
bounds. It includes a learned last step, with which K is higher; without it the same weights are the
tied model. And the posterior depends on t by ᾱ_t = 1 − t/T alone, so a diffusion of T/n steps may
ask the same network at every n-th t. Each training step sees all five sequences, 50 times each, at
times drawn in proportion to their KL. The network of 2015 (20-50-50-50 sigmoid units shared by all
steps, a read-out of f_b for each) stands beside it; its bound still rises when it stops.

K is measured against the exact diffusion, the one whose network is the posterior over phases: both
see the same draws of x_t, and their mean difference, which is far less noisy than K, is taken from
the exact ceiling. At T = 2000 it is also measured by itself, where a fault that both diffusions
share would carry it above the ceiling. Errors are standard errors over draws.

Completions: the first five bits are known exactly, each of the five phases in turn, and SMC infers
the other fifteen. There is one right completion. What SMC says must be what the model's own draws
say: those that begin with a beat of phase j have

    frequency f_j → p(x_1..5 = beat j),  whose logs SMC returns as evidence,
    share of heartbeats among them → share of right completions.

Figure 2 is as in the paper: draws, shifted so that each begins with its pulse, and the noise they
came from; beside them the data. Below, one sequence on its way to noise, two draws on theirs from
noise, and what the network expected of the second at each level. Bars are two standard errors.

Source: Sohl-Dickstein et al. (2015), sections 2.5 and 3.1.2, appendix D.1.2, table 1 and figure 2.
"""

import functools
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure
from numpyro.infer import SVI
from scipy.stats import chisquare

import probdiff
from probdiff import Diffusion, diagnostics, infer, plots, sample, schedules
from probdiff.experiments.heartbeat import exact
from probdiff.experiments.heartbeat.exact import LENGTH, PERIOD, RATE, SEQUENCES, Ceilings
from probdiff.experiments.report import Experiment, Found, Row, Run, mean_and_se, verdict
from probdiff.experiments.training import cosine_adam, in_bits
from probdiff.trajectories import ForwardTrajectory
from probdiff.types import Params

_UNIT = "bits per sequence"
PUBLISHED_K, _PUBLISHED_GAIN = -2.414, 12.024
_VALID_LIMIT = 99.31  # % ± 0.04: 40,000 draws of the exact diffusion with T = 2000

Estimate = tuple[float, float]
"""A value and its standard error."""


class Size(NamedTuple):
    """How much of everything a run does."""

    T: int = 2000
    num_steps: int = 10_000
    shorter: tuple[int, ...] = (20, 100, 500)
    steps_2015: int = 6_000
    num_draws: int = 16
    paired_draws: int = 2
    draws: int = 10_000
    shown: int = 40
    particles: int = 256
    runs: int = 4
    learning_rate: float = 5e-3
    learning_rate_2015: float = 3e-3


SMALL = Size(T=12, num_steps=20, shorter=(4,), steps_2015=5, num_draws=2, draws=200, particles=20)


class Bounds(NamedTuple):
    """Bounds of one model, bits per sequence."""

    tied: Estimate
    learned: Estimate
    """The same with a learned last step."""
    gap: Estimate
    """What the tied K lacks to that of the exact diffusion, on the same draws."""


def _conduct(run: Run) -> Found:
    size, x = run.size, exact.examples()
    keys = run.keys("fit", "bound", "paired", "last", "draw", "forward")

    run.say(f"train and bound: T = {size.T}")
    diffusion = exact.define(size.T)
    fitted = _train(keys["fit"], diffusion, x, size.num_steps, size.learning_rate, run.progress)
    model = exact.tied(diffusion)
    tree = diagnostics.bound(keys["bound"], model, fitted.params, x, num_draws=size.num_draws)
    limits = {size.T: exact.ceilings(diffusion.schedule)}
    found = {size.T: _measure(keys, diffusion, fitted.params, limits[size.T], size.paired_draws)}

    run.say(f"the same network with T = {', '.join(map(str, size.shorter))} steps")
    for T in size.shorter:
        shorter = exact.with_fewer_steps(diffusion, fitted.params, T)
        limits[T] = exact.ceilings(shorter.schedule)
        # a short diffusion has few terms to average over, and is cheap to draw
        num_draws = size.paired_draws * max(1, size.T // (4 * T))
        found[T] = _measure(keys, shorter, {}, limits[T], num_draws)

    run.say(f"train and bound: network of 2015, T = {size.T}")
    old = exact.define_2015(size.T)
    of_2015 = _train(keys["fit"], old, x, size.steps_2015, size.learning_rate_2015, run.progress)
    old_tree = diagnostics.bound(keys["bound"], old, of_2015.params, x, num_draws=2)

    run.say("draws and figures")
    x_0 = sample.ancestral(keys["draw"], model, fitted.params, size.draws)
    run.say("complete first beats")
    completed = complete(
        jax.random.fold_in(keys["draw"], 1), model, fitted.params,
        num_particles=size.particles, num_runs=size.runs,
    )  # fmt: skip
    by_itself, k_2015 = (mean_and_se(in_bits(t)) for t in (tree, old_tree))
    rows = [
        *_bound_rows(size, found, limits, by_itself, k_2015),
        *_draw_rows(size.T, exact.phases_of(x_0)),
        *completion_rows(completed, among(x_0)),
    ]
    per_step = plots.bound_per_step(tree)
    per_step.legend(frameon=False, loc="upper left", fontsize="small")
    figures = {
        "figure_2": _draw_figure_2(keys, size.shown, model, fitted.params),
        "k_against_T": _k_against_T(found, limits),
        "bound_per_step": per_step.figure,
        "losses": plots.losses(fitted.losses, batch_size=len(x)).figure,
    }
    gap = by_itself[0] - (limit := limits[size.T].tied_limit)
    text = (
        f"{verdict(rows)} Measured by itself, K at T = {size.T} is {abs(gap):.4f} bits "
        f"{'above' if gap > 0 else 'below'} the hard limit {limit:.4f} of any tied last step."
    )
    return Found(rows, figures, {"bounds": tree}, {"Verdict": text}, (model, fitted.params))


EXPERIMENT = Experiment("Binary heartbeat", __doc__, _conduct, {"cpu": Size(), "quick": SMALL})


def _train(
    key: Array, diffusion: Diffusion, x: Int[np.ndarray, "rows length"], num_steps: int,
    learning_rate: float, progress: bool,
) -> probdiff.Fit:  # fmt: skip
    """Fit on all of x, with averaged weights."""
    objective = probdiff.SampledTimeELBO(num_times=4, times=probdiff.ImportanceTimes())
    adam = cosine_adam(learning_rate, num_steps)
    svi = SVI(diffusion.model, probdiff.track_kl(diffusion.guide), adam, objective)
    return probdiff.fit(key, svi, x, num_steps=num_steps, ema_decay=0.999, progress=progress)


def _measure(
    keys: dict[str, Array], diffusion: Diffusion, params: Params, limits: Ceilings, num_draws: int
) -> Bounds:
    """Bounds of a model by its mean difference to the exact diffusion, whose K is known."""
    x, key = exact.examples(), keys["paired"]
    ours = diagnostics.bound(key, exact.tied(diffusion), params, x, num_draws=num_draws)
    best = diagnostics.bound(key, exact.define_exact(diffusion.T), {}, x, num_draws=num_draws)
    gap, se = mean_and_se(in_bits(best) - in_bits(ours))
    last, last_se = mean_and_se(last_step(keys["last"], diffusion, params, x))
    k = limits.tied - gap
    tied_last = float(in_bits(ours, "reconstruction").mean())
    return Bounds((k, se), (k - tied_last + last, float(np.hypot(se, last_se))), (gap, se))


def last_step(
    key: Array, diffusion: Diffusion, params: Params, x: np.ndarray, *, num_draws: int = 100
) -> Float[np.ndarray, " rows"]:
    """E log2 p(x_0 | x_1) of each row, from draws of x_1."""
    log_p = _log_p_last(key, params, jnp.asarray(x), diffusion, num_draws)
    return np.asarray(log_p, np.float64) * diagnostics.BITS_PER_NAT


@functools.partial(jax.jit, static_argnames=("diffusion", "num_draws"))
def _log_p_last(
    key: Array, params: Params, x: Array, diffusion: Diffusion, num_draws: int
) -> Float[Array, " rows"]:
    reverse = diffusion.bind(params)
    forward = ForwardTrajectory.of(reverse, x)
    x_1 = forward.sample_at(key, jnp.ones((num_draws, len(x)), jnp.int32))
    return reverse.data(x_1).log_prob(x).mean(0)


def _bound_rows(
    size: Size, found: dict[int, Bounds], limits: dict[int, Ceilings], by_itself: Estimate,
    k_2015: Estimate,
) -> list[Row]:  # fmt: skip
    T, l_null, main, best = size.T, null_bits(), found[size.T], limits[size.T]
    gain = (main.tied[0] - l_null, main.tied[1])
    rows = [
        Row(f"K (tied), T = {T}", *main.tied, _UNIT, best.tied, PUBLISHED_K),
        Row(f"K − L_null, T = {T}", *gain, _UNIT, best.tied - l_null, _PUBLISHED_GAIN),
        Row(f"K (tied), measured by itself, T = {T}", *by_itself, _UNIT, best.tied, PUBLISHED_K),
        Row(f"K of the exact diffusion − K, paired, T = {T}", *main.gap, _UNIT, 0.0),
        Row(f"K (learned last step), T = {T}", *main.learned, _UNIT, best.learned),
        Row(f"K (tied), network of 2015, T = {T}", *k_2015, _UNIT, best.tied, PUBLISHED_K),
    ]
    for n in size.shorter:
        rows += [
            Row(f"K (tied), T = {n}", *found[n].tied, _UNIT, limits[n].tied),
            Row(f"K (learned last step), T = {n}", *found[n].learned, _UNIT, limits[n].learned),
        ]
    return [
        *rows,
        Row(f"hard limit of a tied last step, −H(X⁽¹⁾), T = {T}", best.tied_limit, None, _UNIT),
        Row("hard limit of any model, −H(X⁽⁰⁾)", best.learned_limit, None, _UNIT),
        Row("L_null, log-likelihood under B(0.2)", l_null, None, _UNIT),
    ]


def _draw_rows(T: int, phases: Int[np.ndarray, " draws"]) -> list[Row]:
    valid = phases >= 0
    counts = np.bincount(phases[valid], minlength=PERIOD)
    p_value = chisquare(counts).pvalue if counts.any() else 0.0
    return [
        Row(f"draws that are a heartbeat, T = {T}", *mean_and_se(100 * valid), "%", _VALID_LIMIT),
        Row("phases of the draws uniform, χ² test", p_value, None, "p-value"),
    ]


def null_bits() -> float:
    """log2-likelihood of a sequence under the law the diffusion ends in: −20 h2(0.2)."""
    return LENGTH * float(RATE * np.log2(RATE) + (1 - RATE) * np.log2(1 - RATE))


class Completions(NamedTuple):
    """What is known of completions."""

    right: Estimate
    """Share that is a heartbeat."""
    log_evidence: Estimate
    """log p of the first beat, nats, mean over phases."""


def complete(
    key: Array, diffusion: Diffusion, params: Params, *, num_particles: int, num_runs: int
) -> Completions:
    """Complete each of the five first beats by SMC."""
    prior = diffusion.prior(params)
    is_known = np.broadcast_to(np.arange(LENGTH) < PERIOD, SEQUENCES.shape)

    def program(known: Array | np.ndarray) -> None:
        with numpyro.plate("phase", PERIOD):
            prior(known=known, mask=is_known)

    smc = infer.SMC(program, num_particles=num_particles, num_runs=num_runs)
    with warnings.catch_warnings(action="ignore", category=infer.InferenceWarning):
        smc.run(key, SEQUENCES)  # the error of the runs says it
    draws = smc.get_samples()["x_0"]
    right = np.mean(exact.phases_of(draws.reshape(-1, LENGTH)) >= 0)
    error = np.sqrt(right * (1 - right) / smc.result.health.ess.sum())
    se = np.sqrt(np.sum(np.square(smc.log_evidence_se))) / PERIOD
    return Completions((float(right), float(error)), (float(np.mean(smc.log_evidence)), float(se)))


def among(x_0: Int[np.ndarray, "draws length"]) -> Completions:
    """The same by counting among unconditional draws.

    As Σ_j f_j is nearly 1, the mean of log f_j is known far better than any one of them: its error
    is that of the sum of 1[draw begins with j]/(5 f_j).
    """
    begins = (x_0[:, None, :PERIOD] == SEQUENCES[:, :PERIOD]).all(-1)
    is_right = np.where(exact.phases_of(x_0[begins.any(1)]) >= 0, 1.0, 0.0)
    right = mean_and_se(is_right) if len(is_right) > 1 else (np.nan, np.nan)
    frequency = begins.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):  # a phase that no draw begins with
        value = np.log(frequency).mean()
        _, se = mean_and_se((begins / frequency).mean(1))
    return Completions(right, (float(value), se))


def completion_rows(by_smc: Completions, by_draws: Completions) -> list[Row]:
    """Lines of the table, what SMC says beside what the draws say."""
    sources = {"SMC": by_smc, "counted among draws": by_draws}.items()
    right, log_p = "right completions of the first 5 bits", "log p of the first 5 bits"
    return [
        *(Row(f"{right}, {name}", *(100 * number for number in found.right), "%", 100.0)
          for name, found in sources),
        *(Row(f"{log_p}, mean over phases, {name}", *found.log_evidence, "nats", -np.log(PERIOD))
          for name, found in sources),
    ]  # fmt: skip


def _draw_figure_2(
    keys: dict[str, Array], shown: int, diffusion: Diffusion, params: Params
) -> Figure:
    x_0, levels = sample.ancestral(keys["draw"], diffusion, params, shown, keep_trajectory=True)
    reverse = diffusion.bind(params)
    forward = ForwardTrajectory.of(reverse, exact.examples()[2])
    expected = reverse.x_0_hat(jnp.asarray(levels[1]), reverse.steps.t)
    return figure_2(x_0, levels, forward.sample(keys["forward"]), expected)


def figure_2(
    x_0: Int[np.ndarray, "draws length"],
    levels: Int[np.ndarray, "draws T length"],
    dissolved: Int[Array, "T length"],
    expected: Float[Array, "T length"],
) -> Figure:
    """Figure 2 of the paper, and how a sequence dissolves and comes about.

    Args:
        x_0: Draws.
        levels: Their trajectories x_1..x_T.
        dissolved: A forward trajectory.
        expected: E[x_0 | x_t] of the network at the levels of the second draw.
    """
    data = exact.examples()[: len(x_0)]
    pulse, T = x_0.argmax(1), len(dissolved)
    order = np.argsort(pulse, kind="stable")
    shifted = np.stack([np.roll(x, -p) for x, p in zip(x_0, pulse, strict=True)])
    at = np.unique(np.linspace(1, T, 40).round().astype(int)) - 1
    above = {
        "data (black: 1)": data[np.argsort(exact.phases_of(data), kind="stable")],
        "draws, sorted by phase": x_0[order],
        "draws, shifted to their pulse": shifted[order],
        "the noise they came from": levels[order, -1],
    }
    below = {
        "forward trajectory of one sequence": dissolved,
        "reverse trajectory of one draw": levels[0],
        "reverse trajectory of another": levels[1],
        "its E[x₀ | x_t] on the way": expected,
    }
    figure, axes = plt.subplots(2, 4, figsize=(11, 7), layout="constrained")
    for ax, (title, bits) in zip(axes.flat, (above | below).items(), strict=True):
        bits = np.asarray(bits)[at] if title in below else bits
        ax.imshow(bits, cmap="gray_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        ax.set_title(title, fontsize="medium")
        label = "step t" if title in below else "one sequence per row"
        ax.set(xlabel="bin", ylabel=label, xticks=range(0, LENGTH, PERIOD), yticks=[])
    for ax in axes[1]:
        ax.set_yticks([0, (len(at) - 1) / 2, len(at) - 1], ["1", str(T // 2), str(T)])
    return figure


def _k_against_T(found: dict[int, Bounds], limits: dict[int, Ceilings]) -> Figure:
    """Bounds on the curves of their ceilings; below, what they lack, with bars of two se."""
    between = np.geomspace(min(limits), max(limits), 20).round().astype(int).tolist()
    curve = {T: exact.ceilings(schedules.harmonic(T)) for T in sorted({*between, *limits})}
    figure = plt.figure(figsize=(7, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    times = sorted(found)
    looks = {"tied": (plots.BLUE, "o", 1.0), "learned": (plots.ORANGE, "D", 1.04)}
    for kind, (color, marker, shift) in looks.items():
        best = [getattr(c, kind) for c in curve.values()]
        values, errors = np.array([getattr(found[T], kind) for T in times]).T
        above.plot(list(curve), best, color=color, label=f"ceiling, last step {kind}")
        above.plot(times, values, marker, color=color, label=f"trained, last step {kind}")
        lacking = [getattr(curve[T], kind) for T in times] - values
        below.errorbar(  # the two side by side, or they would hide each other
            shift * np.array(times), lacking, 2 * errors, fmt=marker, color=color, capsize=3
        )
    above.axhline(-np.log2(PERIOD), color="black", linestyle="--", label="−log₂ 5, any model")
    below.axhline(0, color="black", linewidth=0.8)
    above.set(xscale="log", ylabel="K (bits per sequence)")
    above.legend(frameon=False, loc="lower right")
    below.set(xlabel="number of steps T", ylabel="ceiling − K (bits)")
    below.set_xticks(times, map(str, times))
    below.minorticks_off()
    return figure
