"""A language of three letters: two ways to diffuse symbols, beside what each can reach.

Strings have six letters of {a, b, c}: the first is uniform, and each is followed by itself (with
probability 0.2) or by its successor in the cycle a → b → c → a (0.8). That leaves 96 of 729 strings
and an entropy of 0.866 bits per letter, computed exactly. Two diffusions of T = 20 steps:

    uniform     a letter is replaced by one of the three    `CategoricalKernel(3)`
    absorbing   a letter is erased and stays erased         `AbsorbingKernel(3)`

both with the harmonic schedule and a learned last step. A reverse step treats the letters alone, so
letters that change together cannot be told apart from independent ones; the best K under that limit
is found by enumeration (`toy_language_ceilings`) and rises to −H as T grows.

As p(x_0) is known, K is measured by K − log p(x_0) of held-out strings, whose spread is that of the
model's faults and not of the strings, and the exact −H is added to the mean.

Source: Austin et al. (2021) for the two kernels; Sohl-Dickstein et al. (2015) for the bound.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import xarray as xr
from flax import nnx
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure
from numpyro.infer import SVI

from probdiff import (
    AbsorbingKernel,
    CategoricalKernel,
    Diffusion,
    Fit,
    SampledTimeELBO,
    diagnostics,
    fit,
    networks,
    plots,
    readouts,
    sample,
    save,
    schedules,
)
from probdiff.experiments.report import Row, mean_and_se, verdict_of, write_report
from probdiff.experiments.toy_language_ceilings import Ceiling, Language, ceiling, markov_language

SUMMARY = "strings of three letters: uniform and absorbing diffusion beside the best possible K"
DURATION = "about 3 minutes on two CPU cores"

LETTERS = "abc"
LENGTH, STAY = 6, 0.2
BATCH_SIZE, LEARNING_RATE, EMA_DECAY = 512, 3e-3, 0.999
UNIT = "bits per letter"
KERNELS = {"uniform": CategoricalKernel(3), "absorbing": AbsorbingKernel(3)}


class Size(NamedTuple):
    """How much of everything a run does."""

    T: int = 20
    num_steps: int = 8_000
    strings: int = 20_000
    held_out: int = 4_000
    num_draws: int = 16
    draws: int = 10_000
    longer: tuple[int, ...] = (2, 5, 10, 20, 40, 80)


SMALL = Size(
    T=4, num_steps=10, strings=600, held_out=200, num_draws=1, draws=200, longer=(2, 4)
)  # fmt: skip


class Trained(NamedTuple):
    """A trained model, its bound on the held-out strings, its draws and the best K."""

    diffusion: Diffusion
    fitted: Fit
    tree: xr.DataTree
    draws: Int[np.ndarray, "draws length"]
    best: Ceiling
    k: tuple[float, float]
    """K and its standard error, bits per letter."""


def run(
    out_dir: str | Path,
    *,
    seed: int = 0,
    quick: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Train, bound and draw; write report, table, figures, bounds and models into `out_dir`.

    The model in `out_dir` itself is that of the uniform kernel; that of the absorbing one, and its
    bounds, are in the folder `absorbing` there.

    Args:
        out_dir: Folder of the run, made if absent.
        seed: Seeds everything.
        quick: A few steps only, to see that all runs; the numbers mean nothing.
        progress: Show bars.
        say: Told what is being done.

    Returns:
        The rows of the table.
    """
    size, words = SMALL if quick else Size(), language()
    names = ("train", "held_out", "fit", "bound", "draw")
    keys = dict(zip(names, jax.random.split(jax.random.key(seed), len(names)), strict=True))
    x, held_out = (
        draw_strings(keys[name], words, n)
        for name, n in (("train", size.strings), ("held_out", size.held_out))
    )
    models = {}
    for name, kernel in KERNELS.items():
        say(f"train, bound and draw: {name}")
        diffusion = define(kernel, size.T)
        fitted = train(keys["fit"], diffusion, x, num_steps=size.num_steps, progress=progress)
        tree = diagnostics.bound(
            keys["bound"], diffusion, fitted.params, held_out, num_draws=size.num_draws
        )
        draws = sample.ancestral(keys["draw"], diffusion, fitted.params, size.draws)
        best = ceiling(words, diffusion.schedule, stationary(kernel))
        models[name] = Trained(
            diffusion, fitted, tree, draws, best, k_per_letter(tree, held_out, words)
        )

    say("ceilings and figures")
    rows = _rows(models, words)
    figures = {
        "k_against_T": _k_against_T(models, words, size.longer),
        "kl_per_step": _kl_per_step(models),
        "losses": _losses(models),
    }
    write_report(
        out_dir,
        "Toy language",
        rows,
        sections=_sections(size, models, words, rows),
        figures=figures,
        quick=quick,
    )
    folders = {"uniform": Path(out_dir), "absorbing": Path(out_dir) / "absorbing"}
    for name, model in models.items():
        save(folders[name], model.diffusion, model.fitted.params)
        model.tree.to_netcdf(folders[name] / "bounds.nc", engine="h5netcdf")
    return rows


def language(length: int = LENGTH) -> Language:
    """The language: a letter is followed by itself or by its successor in the cycle."""
    step = np.roll(np.eye(3), 1, axis=1)
    return markov_language(np.full(3, 1 / 3), STAY * np.eye(3) + (1 - STAY) * step, length)


def draw_strings(key: Array, words: Language, n: int) -> Int[np.ndarray, "n length"]:
    """n strings of the language."""
    index = jax.random.choice(key, len(words.probs), (n,), p=np.asarray(words.probs, np.float32))
    return words.strings[np.asarray(index)].astype(np.int32)


def log2_prob(words: Language, strings: Int[np.ndarray, "n length"]) -> Float[np.ndarray, " n"]:
    """log2 p(x_0), −∞ for strings that are none of the language."""
    size = words.num_letters ** np.arange(words.strings.shape[1])
    table = np.full(words.num_letters ** words.strings.shape[1], -np.inf)
    table[words.strings @ size] = np.log2(words.probs)
    return table[np.asarray(strings) @ size]


def stationary(kernel: CategoricalKernel | AbsorbingKernel) -> Float[np.ndarray, " states"]:
    """Law that a kernel replaces letters by."""
    pi = np.exp(np.asarray(kernel.log_pi, np.float64))
    return pi / pi.sum()  # the kernel's logs may be float32


@functools.cache  # what is compiled for a diffusion is kept with it
def define(kernel: CategoricalKernel | AbsorbingKernel, T: int, length: int = LENGTH) -> Diffusion:
    """A diffusion of letters that predicts x_0, its last step learned."""
    network = networks.Perceptron(
        (length,), width=128, depth=2, T=T, outputs=kernel.num_data_states,
        states=kernel.num_states, rngs=nnx.Rngs(0),
    )  # fmt: skip
    return Diffusion(
        kernel, schedules.harmonic(T), network, event_shape=(length,),
        readout=readouts.DataLogits(), last_step=readouts.Learned(),
    )  # fmt: skip


def train(
    key: Array, diffusion: Diffusion, x: Int[np.ndarray, "n length"], *,
    num_steps: int, progress: bool = True,
) -> Fit:  # fmt: skip
    """Fit with Adam, its learning rate falling to 0 along a cosine, and averaged weights."""
    adam = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, num_steps))
    svi = SVI(diffusion.model, diffusion.guide, adam, SampledTimeELBO())
    return fit(
        key, svi, x, num_steps=num_steps, batch_size=min(BATCH_SIZE, len(x)),
        ema_decay=EMA_DECAY, progress=progress,
    )  # fmt: skip


def k_per_letter(
    tree: xr.DataTree, x: Int[np.ndarray, "n length"], words: Language
) -> tuple[float, float]:
    """K = −H + E[K(x_0) − log p(x_0)], bits per letter, and its standard error."""
    bits = tree["bound"]["bound"].values * diagnostics.BITS_PER_NAT
    gap, se = mean_and_se(bits - log2_prob(words, x))
    return (gap - words.entropy) / x.shape[1], se / x.shape[1]


def _rows(models: dict[str, Trained], words: Language) -> list[Row]:
    length = words.strings.shape[1]
    best = {name: model.best.bound / length for name, model in models.items()}
    entropy, l_null = words.entropy / length, -float(np.log2(words.num_letters))
    rows = [
        Row(f"K, {name}, T = {m.diffusion.T}", *m.k, UNIT, best[name]) for name, m in models.items()
    ]
    rows += [
        Row(f"best possible K − K, {name}", best[name] - m.k[0], m.k[1], UNIT, 0.0)
        for name, m in models.items()
    ]
    k, se = models["uniform"].k
    rows += [
        Row("K − L_null, uniform", k - l_null, se, UNIT, best["uniform"] - l_null),
        Row("ceiling of any model and T, −H", -entropy, None, UNIT),
        Row("L_null, uniform letters", l_null, None, UNIT),
    ]
    rows += [
        Row(
            f"draws that are strings of the language, {name}",
            *mean_and_se(100 * np.isfinite(log2_prob(words, m.draws))), "%",
        )
        for name, m in models.items()
    ]  # fmt: skip
    return rows


def above_ceiling(rows: list[Row]) -> list[str]:
    """Names of the bounds above their ceiling by more than three standard errors."""
    return [
        row.row for row in rows if row.row.startswith("K,") and row.value > row.ceiling + 3 * row.se
    ]


def _sections(
    size: Size, models: dict[str, Trained], words: Language, rows: list[Row]
) -> dict[str, str]:
    too_high = above_ceiling(rows)
    verdict = verdict_of(too_high)
    length = words.strings.shape[1]
    share = 100 * len(words.strings) / words.num_letters**length
    shown = {
        name: " ".join("".join(LETTERS[i] for i in x) for x in m.draws[:12])
        for name, m in models.items()
    }
    return {
        "Reading": (
            "K is the bound on the log-likelihood of a string, in bits per letter. Its ceiling is "
            "exact: what K becomes when every reverse step is the best of those that treat letters "
            f"alone, found by enumeration. {verdict} Errors are standard errors over held-out "
            "strings of K - log p(x_0), whose spread is the model's and not the language's. "
            f"Of all strings of {length} letters {share:.0f} % belong to the language. A draw may "
            "leave it where letters change in the same step, which cannot know of each other."
        ),
        "Two kernels": (
            "Both are held to the same T and schedule. An erased letter says of itself that it "
            "carries nothing, where a replaced one must be doubted: absorbing reaches more. It "
            "puts no mass on data at the end of the diffusion, so it has no L_null and no tied "
            "last step."
        ),
        "Draws": "\n".join(f"- {name}: `{text}`" for name, text in shown.items()),
        "Settings": (
            f"{size.strings} strings to train, {size.held_out} fresh ones to bound, with "
            f"{size.num_draws} draws of the forward noise each. Perceptron of 2 layers of 128 "
            "units that says p(x_0 | x_t); a reverse step is the bridge averaged over it. "
            f"{size.num_steps} steps of Adam, batches of {BATCH_SIZE}, learning rate "
            f"{LEARNING_RATE} falling to 0 along a cosine, averaged weights (decay {EMA_DECAY}). "
            "The uniform model and its bounds are saved here, the absorbing ones in the folder "
            "`absorbing`."
        ),
    }


COLORS = {"uniform": plots.BLUE, "absorbing": plots.ORANGE}


def _k_against_T(models: dict[str, Trained], words: Language, times: tuple[int, ...]) -> Figure:
    length = words.strings.shape[1]
    figure = plt.figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    for name, model in models.items():
        pi, color = stationary(model.diffusion.kernel), COLORS[name]
        best = [ceiling(words, schedules.harmonic(T), pi).bound / length for T in times]
        ax.plot(times, best, color=color, marker=".", label=f"best possible, {name}")
        ax.errorbar(
            [model.diffusion.T], [model.k[0]], [2 * model.k[1]], fmt="D", color=color,
            markerfacecolor="white", capsize=3, label=f"trained, {name}",
        )  # fmt: skip
    ax.axhline(-words.entropy / length, color="black", linestyle="--", label="−H, any model")
    ax.set(xscale="log", xlabel="number of steps T", ylabel=f"K ({UNIT})")
    ax.set_xticks(times, map(str, times), minor=False)
    ax.minorticks_off()
    ax.legend(frameon=False, loc="lower right")
    return figure


def _kl_per_step(models: dict[str, Trained]) -> Figure:
    """What each step costs: trained, beside the best possible."""
    figure = plt.figure(figsize=(7, 4.5), layout="constrained")
    ax = figure.subplots()
    for name, model in models.items():
        kl = model.tree["bound"]["kl"].values * diagnostics.BITS_PER_NAT
        steps, se = np.arange(2, model.diffusion.T + 1), kl.std(0, ddof=1) / np.sqrt(len(kl))
        ax.plot(steps, model.best.kl, color=COLORS[name], label=f"best possible, {name}")
        ax.errorbar(
            steps, kl.mean(0), 2 * se, fmt="D", color=COLORS[name], markersize=4,
            markerfacecolor="white", label=f"trained, {name}",
        )  # fmt: skip
    ax.set(xlabel="step t (small: near the data)", ylabel="KL_t (bits per string)")
    ax.set_ylim(bottom=0)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False)
    return figure


def _losses(models: dict[str, Trained]) -> Figure:
    figure = plt.figure(figsize=(10, 4), layout="constrained")
    for ax, (name, model) in zip(figure.subplots(1, 2), models.items(), strict=True):
        plots.losses(model.fitted.losses, batch_size=BATCH_SIZE, ax=ax)
        ax.set_title(name, fontsize="medium")
    return figure
