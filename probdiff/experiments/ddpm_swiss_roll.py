"""A tutorial's first diffusion: the Swiss roll by DDPM, x_0 predicted by radial basis functions.

The setting is as the tutorial states it: 40 steps, β linear from 0.001 to 0.05, a hidden layer of
radial basis functions with two linear outputs (x̂_0 and the variance of the reverse step), batches
of 100, 1500 epochs. It states neither noise nor number of points, nor how many functions: here the
roll has noise 0.25 in raw units and unit mean variance, and 10,000 points, so that 1500 epochs are
150,000 steps; normalised functions with a read-out per step, 16 as in 2015, 64 and 128 of them; the
last step tied; Adam, its rate falling to 0 along a cosine, averaged weights. Three objectives for
the network of 64, with the same seed and number of steps, and the K of what they trained:

    the bound −K            what is reported; its model is saved, and in the figures
    L_simple                squared errors of the noise, all steps alike; variances stay β_t
    L_simple − 0.001 K      the sum, in which K trains the variances alone

These rates leave ᾱ_40 = 0.35 of the data's variance, and the bound pays for it,

    E KL( q(x_T | x_0) ‖ π ) = −log(1 − ᾱ_T) = 0.63 bits a point:

what x_T tells of x_0, not a fault of the model. q(x_T) itself is almost N(0, I) for data of unit
variance, so that draws may start there; what that costs is the last KL of the table.

**The ceiling** is the K of the best diffusion with these rates, a tied last step and steps
N(μ(x_t), diag σ²(x_t)): they have the means and variances of q(x_s | x_t), s = t − 1, which follow
from those of x_0 given x_t by the bridge, N(w_0 x_0 + w_t x_t, b),

    E[x_s | x_t] = w_0 E[x_0 | x_t] + w_t x_t,    Var[x_s | x_t] = w_0² Var[x_0 | x_t] + b.

The roll is x_0 = c(u) + σ ε with u uniform. Given x_t = √ᾱ_t x_0 + √n ε', n = 1 − ᾱ_t, and with
v = ᾱ_t σ² + n,

    p(u | x_t) ∝ N(x_t; √ᾱ_t c(u), v I),
    x_0 | x_t, u ~ N( (n c(u) + √ᾱ_t σ² x_t) / v, σ² n/v I ),

so that averages over a grid of u give mean and variance of x_0 given x_t. Differences to it are
paired: same points, same draws of the noise. What is lost between that diffusion and −h(X⁽¹⁾) is
the steps' own; a smaller β_1 would raise −h(X⁽¹⁾).

**Draws** are compared with as many held-out points by permutation tests, from coarse to fine: by
the energy distance, and by the maximum mean discrepancy of widths 0.3, a third of what lies between
two turns, and 0.1. The best possible diffusion shows what can pass: Gaussian steps blur the roll,
the tied last one alone by √(2 β_1) = 0.045, more than the noise of the data, 0.037. The widths were
chosen with the draws of seed 0 in view.

Source: Ho et al. (2020) for the model and L_simple; Sohl-Dickstein et al. (2015), section 2.4 for
the bound that the best steps maximise and appendix D.1.1 for the network.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from flax import nnx
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure
from numpyro.infer import ELBO

import probdiff
from probdiff import Diffusion, datasets, diagnostics, networks, plots, readouts, sample, schedules
from probdiff.experiments.judging import TwoSampleTest, energy, gaussian, two_sample_test
from probdiff.experiments.report import Experiment, Found, Row, Run, mean_and_se, verdict
from probdiff.experiments.training import Trained, in_bits, train_and_bound
from probdiff.kernels import bridge_weights
from probdiff.trajectories import ForwardTrajectory
from probdiff.types import Network, Params, Step

T, BETA_1, _BETA_T, NOISE = 40, 1e-3, 0.05, 0.25
_INITIAL_WIDTH = 0.4
_UNIT = "bits per point"
BOUND, _SIMPLE, _COMBINED = "trained by the bound", "by L_simple", "by L_simple − 0.001 K"
_OBJECTIVES = {
    BOUND: probdiff.SampledTimeELBO,
    _SIMPLE: probdiff.SimpleLoss,
    _COMBINED: probdiff.CombinedLoss,
}
_TESTS = {"energy": energy, "MMD 0.3": gaussian(0.3), "MMD 0.1": gaussian(0.1)}
_BEST = "best possible diffusion"

Tests = dict[str, dict[str, TwoSampleTest]]
"""By the name of the draws, and of the test."""


class Size(NamedTuple):
    """How much of everything a run does."""

    epochs: int = 1500
    points: int = 10_000
    """To train, and as many held out."""
    functions: int = 64
    others: tuple[int, ...] = (16, 128)
    num_draws: int = 2
    compared: int = 2000
    num_permutations: int = 1999
    batch_size: int = 100
    learning_rate: float = 5e-3

    @property
    def num_steps(self) -> int:
        """Steps of training: each epoch sees each point once."""
        return self.epochs * self.points // self.batch_size


SMALL = Size(
    epochs=5, points=300, functions=8, others=(4,), num_draws=1, compared=100, num_permutations=49
)


class _Roll(NamedTuple):
    """A trained model, and its draws."""

    trained: Trained
    x_0: np.ndarray
    trajectory: np.ndarray


def _conduct(run: Run) -> Found:
    size = run.size
    keys = run.keys("fit", "bound", "draw", "forward", "noise", "train", "held_out")
    x, held_out = (
        datasets.swiss_roll(keys[name], size.points, noise=NOISE) for name in ("train", "held_out")
    )

    models, tests = {}, {}
    for name, (functions, objective) in _plan(size).items():
        run.say(f"train, bound and draw: {name}")
        trained = train_and_bound(
            run, keys, define(functions), x, held_out, num_draws=size.num_draws, objective=objective
        )
        draws = sample.ancestral(keys["draw"], *trained.model, size.compared, keep_trajectory=True)
        models[name] = _Roll(trained, *draws)
        tests[name] = compare(run.seed, models[name].x_0, held_out, size.num_permutations)

    run.say(_BEST)
    best = define_best(rates(), NOISE)
    best_tree = diagnostics.bound(keys["bound"], best, {}, held_out, num_draws=size.num_draws)
    run.say("other draws and figures")
    main = next(iter(models.values()))
    diffusion, trees = main.trained.diffusion, {n: m.trained.tree for n, m in models.items()}
    others = {
        _BEST: sample.ancestral(keys["draw"], best, {}, size.compared),
        "untrained": sample.ancestral(keys["draw"], diffusion, untrained(diffusion), size.compared),
        "N(0, I)": np.asarray(jax.random.normal(keys["noise"], (size.compared, 2))),
    }
    for name, x_0 in others.items():
        tests[name] = compare(run.seed, x_0, held_out, size.num_permutations)
    rows = [
        *_bound_rows(trees, best_tree, densities(keys["noise"], held_out)),
        *(Row(f"p by {test}, {size.compared} draws: {name}", found[test].p_value)
          for test in _TESTS for name, found in tests.items()),
    ]  # fmt: skip
    figures = {
        "trajectories": _trajectories(keys["forward"], main, held_out[: size.compared]),
        "samples": _samples(held_out, models, others, tests, size),
        "kl_per_step": _kl_per_step(trees, best_tree),
        "losses": _losses(models, size.batch_size),
    }
    told = "\n".join(f"- by {t}: {'; '.join(failing(tests, t)) or 'none'}" for t in _TESTS)
    draws = f"Told from the data at the level 0.01:\n\n{told}"
    sections = {"Verdict": verdict(rows), "Draws": draws}
    return Found(rows, figures, {"bounds": main.trained.tree}, sections, main.trained.model)


EXPERIMENT = Experiment("DDPM Swiss roll", __doc__, _conduct, {"cpu": Size(), "quick": SMALL})


def _plan(size: Size) -> dict[str, tuple[int, ELBO]]:
    """Number of functions and objective of each model, by its name; the first is the main one."""
    names = [(size.functions, name) for name in _OBJECTIVES] + [(n, BOUND) for n in size.others]
    return {f"{n} functions, {name}": (n, _OBJECTIVES[name]()) for n, name in names}


def rates() -> Float[np.ndarray, " T"]:
    """β_1..β_40, linear from 0.001 to 0.05."""
    return schedules.linear(T, beta_1=BETA_1, beta_T=_BETA_T)


@functools.cache  # what is compiled for a diffusion is kept with it
def define(functions: int) -> Diffusion:
    """A diffusion for the roll that predicts x_0, with so many radial basis functions.

    Functions as wide as the law they cover cannot tell the roll's turns apart, which are 0.9 from
    each other, and take long to become narrow: they start at width 0.4.
    """
    network = networks.RadialBasis((2,), width=functions, T=T, rngs=nnx.Rngs(0))
    network.log_widths[...] = jnp.full(functions, jnp.log(_INITIAL_WIDTH))
    return _define(rates(), network)


def define_best(beta: Float[np.ndarray, " T"], noise: float) -> Diffusion:
    """The best diffusion for the roll with raw noise `noise`; it has no parameters."""
    return _define(beta, best_network(schedules.steps(beta), noise))


def _define(beta: Float[np.ndarray, " T"], network: Network) -> Diffusion:
    kernel, readout = probdiff.GaussianKernel(), readouts.Data()
    return Diffusion(kernel, beta, network, event_shape=(2,), readout=readout)


def untrained(diffusion: Diffusion) -> Params:
    """Parameters with which the network says 0, as it does before its first step."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), diffusion.params_template)


def best_network(steps: Step, noise: float) -> Callable[[Array, Array], Array]:
    """Network for `readouts.Data()` with learned variance that says the best step from any x_t.

    Its outputs are x̂_0 = E[x_0 | x_t] and what `LearnedVariance` turns into Var[x_s | x_t].

    Args:
        steps: Coefficients of all steps.
        noise: Noise of the roll in raw units, not negative.
    """
    curve, sigma = curve_and_noise(noise, spacing=math.sqrt(float(steps.noise_t[0])))

    def network(x_t: Float[Array, "B 2"], t: Int[Array, " B"]) -> Float[Array, "B 4"]:
        step = steps.at(t, 1)
        mean, variance = _data_given(x_t, step, curve, sigma)
        weight_0, _ = bridge_weights(step)
        variance = weight_0**2 * variance + step.beta * step.noise_s / step.noise_t
        return jnp.concatenate([mean, _logit(variance) - _logit(step.beta)], -1)

    return network


def curve_and_noise(noise: float, *, spacing: float) -> tuple[Float[Array, "n 2"], float]:
    """Points c(u) of the noise-free curve, u on a midpoint grid, and σ, in scaled units.

    Args:
        noise: Noise of the roll in raw units.
        spacing: Largest distance of neighbours, scaled units.
    """
    scale = math.sqrt(39 * math.pi**2 / 8 - 2 - 2 / (9 * math.pi**2) + noise**2)
    end = 4.5 * math.pi
    count = math.ceil(3 * math.pi * math.hypot(1, end) / scale / spacing)
    theta = 1.5 * math.pi * (1 + 2 * (np.arange(count) + 0.5) / count)
    raw = theta[:, None] * np.stack([np.cos(theta), np.sin(theta)], -1)
    return jnp.asarray((raw - (2.0, 2 / (3 * math.pi))) / scale), noise / scale


def _data_given(
    x_t: Float[Array, "B 2"], step: Step, curve: Float[Array, "n 2"], sigma: float
) -> tuple[Float[Array, "B 2"], Float[Array, "B 2"]]:
    """Mean and variance of x_0 given x_t, elementwise."""
    root, noise = jnp.sqrt(step.alpha_bar_t), step.noise_t
    width = step.alpha_bar_t * sigma**2 + noise
    # coordinate by coordinate: arrays of points times grid are the largest there are
    distance = sum((x_t[:, i, None] - root * curve[:, i]) ** 2 for i in (0, 1))
    weight = jax.nn.softmax(-distance / (2 * width), axis=-1)
    mean = weight @ curve
    spread = [jnp.sum(weight * (curve[:, i] - mean[:, i, None]) ** 2, -1) for i in (0, 1)]
    x_0 = (noise * mean + root * sigma**2 * x_t) / width
    return x_0, sigma**2 * noise / width + (noise / width) ** 2 * jnp.stack(spread, -1)


def _logit(p: Array) -> Array:
    return jnp.log(p) - jnp.log1p(-p)


def compare(seed: int, x_0: Any, held_out: Any, num_permutations: int) -> dict[str, TwoSampleTest]:
    """Draws beside as many held-out points, by every test."""
    x_0, held_out = (np.asarray(x, np.float64) for x in (x_0, held_out[: len(x_0)]))
    options = {"num_permutations": num_permutations}
    return {name: two_sample_test(np.random.default_rng(seed), x_0, held_out, k, **options)
            for name, k in _TESTS.items()}  # fmt: skip


def failing(tests: Tests, test: str) -> list[str]:
    """Names of the sets of draws that a test tells from the data, p at most 0.01."""
    return [name for name, found in tests.items() if found[test].p_value <= 0.01]


class Densities(NamedTuple):
    """What the law of the roll says at held-out points and after they were diffused, bits."""

    x_1: np.ndarray
    """log q(x_1), whose mean −h(X⁽¹⁾) no K under a tied last step exceeds."""
    x_0: np.ndarray
    """log q(x_0), whose mean −h(X⁽⁰⁾) no K exceeds."""
    gain_T: np.ndarray
    """log q(x_T) − log π(x_T), whose mean is the KL of q(x_T) from N(0, I)."""


def densities(key: Array, x_0: Float[Array, "n 2"]) -> Densities:
    """Densities of the roll at held-out points, after the first step and after the last."""
    key_1, key_T = jax.random.split(key)
    steps = schedules.steps(rates())
    _, log_q_1 = _diffused(key_1, x_0, float(steps.noise_t[0]))
    x_T, log_q_T = _diffused(key_T, x_0, float(steps.noise_t[-1]))
    log_pi = jnp.sum(jax.scipy.stats.norm.logpdf(x_T), -1)
    log_q_0 = datasets.swiss_roll_log_density(x_0, noise=NOISE)
    nats = (log_q_1, log_q_0, log_q_T - log_pi)
    return Densities(*(np.asarray(values) * diagnostics.BITS_PER_NAT for values in nats))


def _diffused(key: Array, x_0: Array, noise: float) -> tuple[Array, Array]:
    """Draws of x_t given points, 1 − ᾱ_t = `noise`, and log q(x_t), nats."""
    x_t = jnp.sqrt(1 - noise) * x_0 + jnp.sqrt(noise) * jax.random.normal(key, x_0.shape)
    law = {"noise": NOISE, "shrink": 1 - noise, "extra_variance": noise}
    return x_t, datasets.swiss_roll_log_density(x_t, **law)


def paired_with_best(
    trees: dict[str, xr.DataTree], best: xr.DataTree
) -> dict[str, tuple[float, float]]:
    """K − best possible K, mean over the same points and draws, and its standard error; bits."""
    return {name: mean_and_se(in_bits(tree) - in_bits(best)) for name, tree in trees.items()}


def _bound_rows(trees: dict[str, xr.DataTree], best: xr.DataTree, limits: Densities) -> list[Row]:
    k_best, hard = mean_and_se(in_bits(best)), mean_and_se(limits.x_1)
    first, differences = next(iter(trees.values())), paired_with_best(trees, best)
    return [
        *[Row(f"K, {n}", *mean_and_se(in_bits(t)), _UNIT, k_best[0]) for n, t in trees.items()],
        *[Row(f"K − best, paired: {n}", *found, _UNIT, 0.0) for n, found in differences.items()],
        Row("best K of Gaussian steps with these rates", *k_best, _UNIT, hard[0]),
        Row("ceiling of a tied last step, −h(X⁽¹⁾)", *hard, _UNIT),
        Row("ceiling of any density, −h(X⁽⁰⁾)", *mean_and_se(limits.x_0), _UNIT),
        Row("KL of q(x_T | x_0) from N(0, I), in every K", *mean_and_se(in_bits(first, "prior_kl")),
            _UNIT),
        Row("KL of q(x_T) from N(0, I), which draws pay", *mean_and_se(limits.gain_T), _UNIT),
    ]  # fmt: skip


def _trajectories(key: Array, model: _Roll, x: Array) -> Figure:
    """The forward trajectory from data and the reverse one from noise, at the same levels."""
    reverse = model.trained.diffusion.bind(model.trained.fitted.params)
    forward = ForwardTrajectory.of(reverse, x).sample(key)
    levels = [0, 5, 10, 20, T]
    figure, axes = plt.subplots(2, 5, figsize=(15, 6.4), layout="constrained")
    lines = (
        ("forward trajectory q(x_t)", plots.BLUE, x, forward),
        ("reverse trajectory p(x_t)", plots.ORANGE, model.x_0, model.trajectory),
    )
    for row, (name, color, start, trajectory) in zip(axes, lines, strict=True):
        at = [start if t == 0 else trajectory[:, t - 1] for t in levels]
        plots.slices(at, [f"t = {t}" for t in levels], color=color, axes=row)
        row[0].set_ylabel(f"{name}\n\nx₂")
    return figure


def _samples(
    held_out: Array, models: dict[str, _Roll], others: dict[str, np.ndarray], tests: Tests,
    size: Size,
) -> Figure:  # fmt: skip
    """Data beside draws of several models, with the p-values of their tests against data."""
    draws = {name: model.x_0 for name, model in models.items()} | others
    shown = [next(iter(models)), _BEST, f"{min(size.others)} functions, {BOUND}", "untrained"]
    figure, (first, *rest) = plt.subplots(1, 5, figsize=(15, 3.8), layout="constrained")
    plots.points(held_out[: size.compared], title="held-out data\n", ax=first)
    for ax, name in zip(rest, shown, strict=True):
        p = ", ".join(f"{found.p_value:.2g}" for found in tests[name].values())
        plots.points(draws[name], title=f"{name}\np = {p}", color=plots.ORANGE, ax=ax)
    figure.suptitle(f"p by {', '.join(_TESTS)}", fontsize="medium")
    return figure


def _kl_per_step(trees: dict[str, xr.DataTree], best: xr.DataTree) -> Figure:
    """What each step costs at best, bits, and what each model pays on top, at the same draws."""
    steps, least = best["bound"]["step"].values, in_bits(best, "kl").mean(0)
    kl = {name: in_bits(tree, "kl").mean(0) for name, tree in trees.items()}
    main = next(iter(kl))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    left.plot(steps, least, color="black", label="best possible")
    left.plot(steps, kl[main], ".", color=plots.BLUE, label=main)
    left.set(yscale="log", ylabel="KL_t (bits per point)")
    colors = (plots.BLUE, plots.ORANGE, plots.GREEN, "black", "0.6")
    for (name, values), color in zip(kl.items(), colors, strict=False):
        right.plot(steps, values - least, color=color, marker=".", label=name)
    right.set(ylabel="KL_t − best possible (bits per point)")
    for ax in (left, right):
        ax.set_xlabel("step t (small: near the data)")
        ax.legend(frameon=False)
    return figure


def _losses(models: dict[str, _Roll], batch_size: int) -> Figure:
    """Losses of the three objectives, which are not of one scale."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    labels = ("−K (nats per point)", "L_simple (per point)", "L_simple − 0.001 K (per point)")
    for ax, (name, model), label in zip(axes, models.items(), labels, strict=False):
        plots.losses(model.trained.fitted.losses, batch_size=batch_size, ax=ax)
        ax.set_title(name, fontsize="medium")
        ax.set_ylabel(label)
        ax.xaxis.get_major_locator().set_params(nbins=4)
    return figure
