"""A tutorial's first diffusion: the Swiss roll by DDPM, x_0 predicted by radial basis functions.

The setting is as the tutorial states it: 40 steps, β linear from 0.001 to 0.05, a hidden layer of
radial basis functions with two linear outputs (x̂_0 and the variance of the reverse step), batches
of 100, 1500 epochs. It states neither noise nor number of points, nor how many functions: here the
roll has noise 0.25 in raw units and unit mean variance, and 10,000 points, so that 1500 epochs are
150,000 steps; networks of 16, 64 and 128 functions are trained. Three objectives for the one of 64:

    the bound −K            what is reported
    L_simple                squared errors of the noise, all steps alike; variances stay β_t
    L_simple − 0.001 K      the sum, in which K trains the variances alone

These rates leave ᾱ_40 = 0.35 of the data's variance, and the bound pays for it,

    E KL( q(x_T | x_0) ‖ π ) = −log(1 − ᾱ_T) = 0.63 bits a point,

while q(x_T) itself is almost N(0, I) for data of unit variance, so that draws may start there. K is
reported beside the best that elementwise Gaussian steps can reach (`swiss_roll_best`), at the same
draws of the forward noise. Draws are compared with held-out points by permutation tests that look
more and more closely (`two_sample`), the best diffusion's draws among them: more one cannot ask.

Source: Ho et al. (2020) for the model and L_simple; Sohl-Dickstein et al. (2015), appendix D.1.1,
for the network.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from flax import nnx
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from numpyro.infer import SVI

from probdiff import (
    CombinedLoss,
    Diffusion,
    Fit,
    GaussianKernel,
    SampledTimeELBO,
    SimpleLoss,
    datasets,
    diagnostics,
    fit,
    networks,
    readouts,
    sample,
    save,
    schedules,
)
from probdiff.experiments import ddpm_swiss_roll_figures as figures
from probdiff.experiments.report import Row, mean_and_se, verdict_of, write_report
from probdiff.experiments.swiss_roll_best import define_best
from probdiff.experiments.two_sample import TwoSampleTest, energy, gaussian, two_sample_test
from probdiff.trajectories import ForwardTrajectory
from probdiff.types import Params

SUMMARY = "a tutorial's Swiss roll: x_0 predicted by radial basis functions, bound and L_simple"
DURATION = "about 4 minutes on one CPU core"

T, BETA_1, BETA_T, NOISE = 40, 1e-3, 0.05, 0.25
BATCH_SIZE, LEARNING_RATE, EMA_DECAY = 100, 5e-3, 0.999
INITIAL_WIDTH = 0.4
UNIT = "bits per point"
BOUND, SIMPLE, COMBINED = "trained by the bound", "by L_simple", "by L_simple − 0.001 K"
OBJECTIVES = {BOUND: SampledTimeELBO, SIMPLE: SimpleLoss, COMBINED: CombinedLoss}
TESTS = {"energy": energy, "MMD 0.3": gaussian(0.3), "MMD 0.1": gaussian(0.1)}
"""What draws are put to, from coarse to fine: the turns of the roll are 0.9 apart."""


class Size(NamedTuple):
    """How much of everything a run does."""

    epochs: int = 1500
    points: int = 10_000
    functions: int = 64
    others: tuple[int, ...] = (16, 128)
    num_draws: int = 2
    compared: int = 2000
    num_permutations: int = 1999

    @property
    def num_steps(self) -> int:
        """Steps of training: each epoch sees each point once."""
        return self.epochs * self.points // BATCH_SIZE


SMALL = Size(
    epochs=5, points=300, functions=8, others=(4,), num_draws=1, compared=100, num_permutations=49
)


class Trained(NamedTuple):
    """A trained model, its bound on the held-out points, and its draws beside them."""

    diffusion: Diffusion
    fitted: Fit
    tree: xr.DataTree
    x_0: np.ndarray
    trajectory: np.ndarray
    tests: dict[str, TwoSampleTest]


def run(
    out_dir: str | Path,
    *,
    seed: int = 0,
    quick: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Train, bound and draw; write report, table, figures, bounds and model into `out_dir`.

    Args:
        out_dir: Folder of the run, made if absent.
        seed: Seeds everything.
        quick: A few steps only, to see that all runs; the numbers mean nothing.
        progress: Show bars.
        say: Told what is being done.

    Returns:
        The rows of the table.
    """
    size = SMALL if quick else Size()
    names = ("fit", "bound", "draw", "forward", "noise", "train", "held_out")
    keys = dict(zip(names, jax.random.split(jax.random.key(seed), len(names)), strict=True))
    x, held_out = (
        datasets.swiss_roll(keys[name], size.points, noise=NOISE) for name in ("train", "held_out")
    )

    models = {}
    for name, (functions, objective) in _plan(size).items():
        say(f"train, bound and draw: {name}")
        diffusion = define(functions)
        fitted = train(keys["fit"], diffusion, x, objective, size.num_steps, progress=progress)
        tree = _bound(keys, diffusion, fitted.params, held_out, size)
        x_0, trajectory = sample.ancestral(
            keys["draw"], diffusion, fitted.params, size.compared, keep_trajectory=True
        )
        tests = compare(seed, x_0, held_out, size.num_permutations)
        models[name] = Trained(diffusion, fitted, tree, x_0, trajectory, tests)

    say("best possible diffusion")
    best = define_best(rates(), NOISE)
    best_tree = _bound(keys, best, {}, held_out, size)
    limits = densities(keys["noise"], held_out)
    say("other draws and figures")
    main = next(iter(models.values()))
    draws = {name: model.x_0 for name, model in models.items()} | _other_draws(keys, main, best)
    tests = {name: model.tests for name, model in models.items()} | {
        name: compare(seed, x_0, held_out, size.num_permutations)
        for name, x_0 in draws.items()
        if name not in models
    }
    rows = [*_bound_rows(models, best_tree, limits), *_test_rows(tests, size)]

    pictures = _figures(keys["forward"], models, best_tree, held_out, draws, tests, size)
    write_report(
        out_dir,
        "DDPM Swiss roll",
        rows,
        sections=_sections(size, models, best_tree, tests),
        figures=pictures,
        trees={"bounds": main.tree},
        quick=quick,
    )
    save(out_dir, main.diffusion, main.fitted.params)
    return rows


def rates() -> Float[np.ndarray, " T"]:
    """β_1..β_40, linear from 0.001 to 0.05."""
    return schedules.linear(T, beta_1=BETA_1, beta_T=BETA_T)


@functools.cache  # what is compiled for a diffusion is kept with it
def define(functions: int) -> Diffusion:
    """A diffusion for the roll that predicts x_0, with so many radial basis functions.

    Functions as wide as the law they cover cannot tell the roll's turns apart, which are 0.9 from
    each other, and take long to become narrow: they start at width 0.4.
    """
    network = networks.RadialBasis((2,), width=functions, T=T, rngs=nnx.Rngs(0))
    network.log_widths[...] = jnp.full(functions, jnp.log(INITIAL_WIDTH))
    return Diffusion(
        GaussianKernel(), rates(), network, event_shape=(2,), readout=readouts.Data()
    )  # fmt: skip


def train(
    key: Array, diffusion: Diffusion, x: Array, objective: Any, num_steps: int, *,
    progress: bool = True,
) -> Fit:  # fmt: skip
    """Fit with Adam, its learning rate falling to 0 along a cosine, and averaged weights."""
    adam = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, num_steps))
    svi = SVI(diffusion.model, diffusion.guide, adam, objective)
    return fit(
        key, svi, x, num_steps=num_steps, batch_size=min(BATCH_SIZE, len(x)),
        ema_decay=EMA_DECAY, progress=progress,
    )  # fmt: skip


def untrained(diffusion: Diffusion) -> Params:
    """Parameters with which the network says 0, as it does before its first step."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), diffusion.params_template)


def compare(seed: int, x_0: Any, held_out: Any, num_permutations: int) -> dict[str, TwoSampleTest]:
    """Draws beside as many held-out points, by every test."""
    x_0, held_out = (np.asarray(x, np.float64) for x in (x_0, held_out[: len(x_0)]))
    return {
        name: two_sample_test(
            np.random.default_rng(seed), x_0, held_out, k, num_permutations=num_permutations
        )
        for name, k in TESTS.items()
    }


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
    return x_t, datasets.swiss_roll_log_density(
        x_t, noise=NOISE, extra_variance=noise, shrink=1 - noise
    )


def paired_with_best(
    trees: dict[str, xr.DataTree], best: xr.DataTree
) -> dict[str, tuple[float, float]]:
    """K − best possible K, mean over the same points and draws, and its standard error; bits."""
    return {name: mean_and_se(_bits(tree) - _bits(best)) for name, tree in trees.items()}


def above_best(differences: dict[str, tuple[float, float]]) -> list[str]:
    """Names of the models above the best possible one by more than three standard errors."""
    return [name for name, (mean, se) in differences.items() if mean > 3 * se]


def _plan(size: Size) -> dict[str, tuple[int, Any]]:
    """Number of functions and objective of each model, by its name."""
    main = {
        f"{size.functions} functions, {name}": (size.functions, objective())
        for name, objective in OBJECTIVES.items()
    }
    others = {f"{n} functions, {BOUND}": (n, OBJECTIVES[BOUND]()) for n in size.others}
    return main | others


def _bound(
    keys: dict[str, Array], diffusion: Diffusion, params: Params, x: Array, size: Size
) -> xr.DataTree:
    return diagnostics.bound(keys["bound"], diffusion, params, x, num_draws=size.num_draws)


def _bits(tree: xr.DataTree, name: str = "bound") -> np.ndarray:
    """A part of the bound per held-out point."""
    return tree["bound"][name].values.astype(np.float64) * diagnostics.BITS_PER_NAT


def _bound_rows(models: dict[str, Trained], best: xr.DataTree, limits: Densities) -> list[Row]:
    trees = {name: model.tree for name, model in models.items()}
    differences = paired_with_best(trees, best)
    k_best, hard = mean_and_se(_bits(best)), mean_and_se(limits.x_1)
    first = next(iter(trees.values()))
    return [
        *[Row(f"K, {n}", *mean_and_se(_bits(t)), UNIT, k_best[0]) for n, t in trees.items()],
        *[Row(f"K − best, paired: {n}", *found, UNIT, 0.0) for n, found in differences.items()],
        Row("best K of Gaussian steps with these rates", *k_best, UNIT, hard[0]),
        Row("ceiling of a tied last step, −h(X⁽¹⁾)", *hard, UNIT),
        Row("ceiling of any density, −h(X⁽⁰⁾)", *mean_and_se(limits.x_0), UNIT),
        Row("KL of q(x_T | x_0) from N(0, I), in every K", *mean_and_se(_bits(first, "prior_kl")),
            UNIT),
        Row("KL of q(x_T) from N(0, I), which draws pay", *mean_and_se(limits.gain_T), UNIT),
    ]  # fmt: skip


def _other_draws(keys: dict[str, Array], main: Trained, best: Diffusion) -> dict[str, np.ndarray]:
    """As many draws of the best possible diffusion, of a model not trained, and of plain noise."""
    n = len(main.x_0)
    return {
        "best possible diffusion": sample.ancestral(keys["draw"], best, {}, n),
        "untrained": sample.ancestral(keys["draw"], main.diffusion, untrained(main.diffusion), n),
        "N(0, I)": np.asarray(jax.random.normal(keys["noise"], (n, 2))),
    }


def _test_rows(tests: dict[str, dict[str, TwoSampleTest]], size: Size) -> list[Row]:
    return [
        Row(f"p by {test}, {size.compared} draws: {name}", found[test].p_value)
        for test in TESTS
        for name, found in tests.items()
    ]


def failing(tests: dict[str, dict[str, TwoSampleTest]], test: str) -> list[str]:
    """Names of the sets of draws that a test tells from the data, p at most 0.01."""
    return [name for name, found in tests.items() if found[test].p_value <= 0.01]


def _sections(
    size: Size,
    models: dict[str, Trained],
    best: xr.DataTree,
    tests: dict[str, dict[str, TwoSampleTest]],
) -> dict[str, str]:
    too_high = above_best(paired_with_best({n: m.tree for n, m in models.items()}, best))
    verdict = verdict_of(too_high, "the best possible")
    told = "\n".join(f"- by {t}: {'; '.join(failing(tests, t)) or 'none'}" for t in TESTS)
    return {
        "Reading": (
            "K is the bound on the log density of a held-out point, with respect to area after the "
            "roll was centred and scaled to unit mean variance; errors are standard errors over "
            "held-out points. Its ceiling is the K of the best diffusion there is with these "
            "rates, a tied last step and Gaussian steps whose coordinates are independent: means "
            "and variances of q(x_s | x_t), known for the roll. Differences to it are paired: same "
            f"points, same draws of the noise. {verdict} What is lost between that diffusion and "
            "-h(X⁽¹⁾) is the steps' own; a smaller β_1 would raise -h(X⁽¹⁾)."
        ),
        "The end of the diffusion": (
            f"40 steps leave ᾱ_T = {np.prod(1 - rates()):.3f} of the data's variance. The bound "
            "pays -log(1 - ᾱ_T) = 0.63 bits for it: this is what x_T tells of x_0, not a fault "
            "of the model. Draws start from N(0, I) in place of "
            "q(x_T), and what that costs is the last KL of the table. Data of another variance "
            "would pay more."
        ),
        "Objectives": (
            "L_simple weighs all steps alike and does not train variances, which stay β_t; its sum "
            "with the bound trains them. Neither is a bound: the K of what they trained is "
            "reported. The same seed, network and number of steps as for the bound."
        ),
        "Draws": (
            f"p of permutation tests between {size.compared} draws and as many held-out points, "
            f"{size.num_permutations} permutations, so that p is at least "
            f"{1 / (1 + size.num_permutations):.2g}: by the energy distance, which sees where mass "
            "lies, and by the maximum mean discrepancy with Gaussian kernels of widths 0.3, a "
            "third of what lies between two turns, and 0.1. The best possible diffusion shows what "
            "can pass: Gaussian steps blur the roll, the tied last one alone by √(2 β_1) = 0.045, "
            "more than the noise of the data, 0.037. The widths were chosen with the draws of seed "
            f"0 in view. Told from the data at the level 0.01:\n\n{told}"
        ),
        "Settings": (
            f"As the tutorial states: T = {T}, β linear from {BETA_1} to {BETA_T}, radial basis "
            f"functions, x_0 prediction, batches of {BATCH_SIZE}, {size.epochs} epochs. Chosen "
            f"here: noise {NOISE} in raw units, {size.points} points to train ({size.num_steps} "
            f"steps) and as many held out; normalised functions with a linear read-out per step, "
            f"{size.functions} of them beside 16, as in 2015, and 128, of "
            f"initial width {INITIAL_WIDTH}; the variance learned, the last step tied; Adam, "
            f"learning rate {LEARNING_RATE} falling to 0 along a cosine, averaged weights (decay "
            f"{EMA_DECAY}). The bound averages {size.num_draws} draws of the forward noise."
        ),
        "Figures": (
            f"All of {size.functions} functions trained by the bound, which is also the model "
            "saved here, unless they say otherwise. `trajectories`: data becoming noise, and noise "
            "becoming draws. `kl_per_step`: where the bits go, beside the best possible."
        ),
    }


def _figures(
    key: Array,
    models: dict[str, Trained],
    best: xr.DataTree,
    held_out: Array,
    draws: dict[str, np.ndarray],
    tests: dict[str, dict[str, TwoSampleTest]],
    size: Size,
) -> dict[str, Figure]:
    """The report's pictures; the first model is the main one."""
    main = next(iter(models))
    model, x = models[main], held_out[: len(models[main].x_0)]
    reverse = model.diffusion.bind(model.fitted.params)
    forward = ForwardTrajectory.of(reverse, x).sample(key)
    smallest = f"{min(size.others)} functions, {BOUND}"
    shown = [main, "best possible diffusion", smallest, "untrained"]
    p_values = {
        name: {test: found.p_value for test, found in tests[name].items()} for name in shown
    }
    return {
        "trajectories": figures.trajectories(x, forward, model.x_0, model.trajectory),
        "samples": figures.samples(
            held_out[: size.compared], {name: draws[name] for name in shown}, p_values
        ),
        "kl_per_step": figures.kl_per_step(
            best["bound"]["step"].values,
            {name: _bits(m.tree, "kl").mean(0) for name, m in models.items()},
            _bits(best, "kl").mean(0),
        ),
        "losses": figures.losses({name: m.fitted.losses for name, m in models.items()}, BATCH_SIZE),
    }
