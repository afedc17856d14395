"""A language of three letters: two ways to diffuse symbols, beside what each can reach.

Strings have six letters of {a, b, c}: the first is uniform, and each is followed by itself (with
probability 0.2) or by its successor in the cycle a → b → c → a (0.8). That leaves 96 of 729 strings
and an entropy of 0.866 bits per letter, computed exactly. Two diffusions of T = 20 steps:

    uniform     a letter is replaced by one of the three    `CategoricalKernel(3)`
    absorbing   a letter is erased and stays erased         `AbsorbingKernel(3)`

both with the harmonic schedule, a learned last step and a perceptron of 2 layers of 128 units that
says p(x_0 | x_t). An erased letter says of itself that it carries nothing, a replaced one must
be doubted: absorbing reaches more. It puts no mass on data at the end of the diffusion, so it has
no L_null and no tied last step. The model and bounds of the uniform kernel are saved in the folder
of the run, those of the absorbing one in the folder `absorbing` there.

As p(x_0) is known, K is measured by K − log p(x_0) of held-out strings, whose spread is that of the
model's faults and not of the strings, and the exact −H is added to the mean.

**The ceiling** is exact. All strings x_0 and all levels x_t are listed, so posteriors and
expectations are finite sums. With m_i(k | x_t) = P(x_0i = k | x_t) the posterior of one letter, the
best reverse step that treats letters alone is the bridge averaged over it,
r_i = Σ_k m_i(k) q(x_s,i | x_t,i, k), and the diffusion of best steps has

    K = −Σ_i H(X_0i | X_1) − Σ_{t ≥ 2} E Σ_i Σ_k m_i(k) KL( q(· | x_t,i, k) ‖ r_i ) − E KL_T^prior.

It is below −H(X_0), by what letters that change in the same step could have told each other, and
approaches it as T grows. For the same reason draws may leave the language.

Source: Austin et al. (2021) for the two kernels; Sohl-Dickstein et al. (2015), eqs. 10 to 14, for
the bound.
"""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from flax import nnx
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure

import probdiff
from probdiff import Diffusion, diagnostics, files, networks, plots, readouts, sample, schedules
from probdiff.experiments.report import Experiment, Found, Row, Run, mean_and_se, verdict
from probdiff.experiments.training import Trained, train_and_bound

_LETTERS = "abc"
_LENGTH, _STAY = 6, 0.2
_UNIT = "bits per letter"
KERNELS = {"uniform": probdiff.CategoricalKernel(3), "absorbing": probdiff.AbsorbingKernel(3)}
_COLORS = {"uniform": plots.BLUE, "absorbing": plots.ORANGE}
_LN_2 = math.log(2)
_Kernel = probdiff.CategoricalKernel | probdiff.AbsorbingKernel


class Size(NamedTuple):
    """How much of everything a run does."""

    T: int = 20
    num_steps: int = 8_000
    strings: int = 20_000
    held_out: int = 4_000
    num_draws: int = 16
    draws: int = 10_000
    longer: tuple[int, ...] = (2, 5, 10, 20, 40, 80)
    batch_size: int = 512
    learning_rate: float = 3e-3


SMALL = Size(T=4, num_steps=10, strings=600, held_out=200, num_draws=1, draws=200, longer=(2, 4))


class Language(NamedTuple):
    """Strings and their probabilities."""

    strings: Int[np.ndarray, "strings length"]
    probs: Float[np.ndarray, " strings"]
    num_letters: int

    @property
    def entropy(self) -> float:
        """H(X_0), bits."""
        return float(-self.probs @ np.log2(self.probs))


class Ceiling(NamedTuple):
    """The best factorised diffusion, bits per string."""

    bound: float
    """K."""
    kl: Float[np.ndarray, " steps"]
    """KL_t for t = 2..T."""
    prior_kl: float


class _Letters(NamedTuple):
    """A trained model, its draws and the best K."""

    trained: Trained
    draws: Int[np.ndarray, "draws length"]
    best: Ceiling
    k: tuple[float, float]
    """K and its standard error, bits per letter."""


def _conduct(run: Run) -> Found:
    size, words = run.size, language()
    keys = run.keys("train", "held_out", "fit", "bound", "draw")
    x = draw_strings(keys["train"], words, size.strings)
    held_out = draw_strings(keys["held_out"], words, size.held_out)
    models = {}
    for name, kernel in KERNELS.items():
        run.say(f"train, bound and draw: {name}")
        diffusion = _define(kernel, size.T)
        trained = train_and_bound(run, keys, diffusion, x, held_out, num_draws=size.num_draws)
        draws = sample.ancestral(keys["draw"], *trained.model, size.draws)
        best = ceiling(words, diffusion.schedule, stationary(kernel))
        k = k_per_letter(trained.tree, held_out, words)
        models[name] = _Letters(trained, draws, best, k)

    run.say("ceilings and figures")
    rows = _rows(models, words)
    figures = {
        "k_against_T": _k_against_T(models, words, size.longer),
        "kl_per_step": _kl_per_step(models),
        "losses": _losses(models, size.batch_size),
    }
    shown = {n: ["".join(_LETTERS[i] for i in x) for x in m.draws[:12]] for n, m in models.items()}
    draws = "\n".join(f"- {name}: `{' '.join(texts)}`" for name, texts in shown.items())
    sections = {"Verdict": verdict(rows), "Draws": draws}
    uniform, absorbing = (m.trained for m in models.values())
    folder = run.out_dir / "absorbing"
    probdiff.save(folder, *absorbing.model)
    with files.replacing(folder / "bounds.nc") as partial:
        absorbing.tree.to_netcdf(partial, engine="h5netcdf")
    return Found(rows, figures, {"bounds": uniform.tree}, sections, uniform.model)


EXPERIMENT = Experiment("Toy language", __doc__, _conduct, {"cpu": Size(), "quick": SMALL})


def language(length: int = _LENGTH) -> Language:
    """The language: a letter is followed by itself or by its successor in the cycle."""
    then = _STAY * np.eye(3) + (1 - _STAY) * np.roll(np.eye(3), 1, axis=1)
    strings = np.array(list(itertools.product(range(3), repeat=length)))
    probs = 1 / 3 * np.prod(then[strings[:, :-1], strings[:, 1:]], axis=1)
    return Language(strings[probs > 0], probs[probs > 0], 3)


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


def stationary(kernel: _Kernel) -> Float[np.ndarray, " states"]:
    """Law that a kernel replaces letters by."""
    pi = np.exp(np.asarray(kernel.log_pi, np.float64))
    return pi / pi.sum()  # the kernel's logs may be float32


@functools.cache  # what is compiled for a diffusion is kept with it
def _define(kernel: _Kernel, T: int) -> Diffusion:
    """A diffusion of letters that predicts x_0, its last step learned."""
    network = networks.Perceptron(
        (_LENGTH,), width=128, depth=2, T=T, outputs=kernel.num_data_states,
        states=kernel.num_states, rngs=nnx.Rngs(0),
    )  # fmt: skip
    return Diffusion(
        kernel, schedules.harmonic(T), network, event_shape=(_LENGTH,),
        readout=readouts.DataLogits(), last_step=readouts.Learned(),
    )  # fmt: skip


def k_per_letter(
    tree: xr.DataTree, x: Int[np.ndarray, "n length"], words: Language
) -> tuple[float, float]:
    """K = −H + E[K(x_0) − log p(x_0)], bits per letter, and its standard error."""
    bits = tree["bound"]["bound"].values * diagnostics.BITS_PER_NAT
    gap, se = mean_and_se(bits - log2_prob(words, x))
    return (gap - words.entropy) / x.shape[1], se / x.shape[1]


def ceiling(
    language: Language, beta: Float[np.ndarray, " T"], pi: Float[np.ndarray, " states"]
) -> Ceiling:
    """What K can reach with a learned last step, exactly (float64 sums over all levels).

    Args:
        language: Law of the data, over letters 0..K−1.
        beta: Rates β_1..β_T.
        pi: Law that replaces a letter: K probabilities, or K zeros and a one (absorbing).
    """
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    steps = range(2, len(beta) + 1)
    kl = np.array([_step(language, alpha_bar[t - 1 : t + 1], beta[t - 1], pi) for t in steps])
    law, posteriors = _posteriors(language, alpha_bar[1], pi)
    last = sum(float(law @ _xlogx(m).sum(1)) for m in posteriors)
    prior = _prior_kl(language, alpha_bar[-1], pi)
    terms = np.array([last, *-kl, -prior]) / _LN_2
    return Ceiling(float(terms.sum()), kl / _LN_2, prior / _LN_2)


def _replace(K: int, alpha_bar: float, pi: np.ndarray) -> np.ndarray:
    """q(x_t | x_0) of one letter, rows x_0 among the letters, columns x_t among the states."""
    return alpha_bar * np.eye(len(pi))[:K] + (1 - alpha_bar) * pi


def _posteriors(
    language: Language, alpha_bar: float, pi: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """q(x_t) over all levels in the order of `itertools.product`, and m_i for every letter i."""
    letter = _replace(language.num_letters, alpha_bar, pi)
    rows = [letter[column] for column in language.strings.T]
    joint = language.probs[:, None] * functools.reduce(
        lambda left, right: (left[:, :, None] * right[:, None, :]).reshape(len(left), -1), rows
    )
    law = joint.sum(0)
    one_hot = np.eye(language.num_letters)[language.strings]
    scale = np.where(law > 0, law, 1.0)[:, None]
    return law, [joint.T @ one_hot[:, i] / scale for i in range(one_hot.shape[1])]


def _step(language: Language, alpha_bar: np.ndarray, beta: float, pi: np.ndarray) -> float:
    """E Σ_i Σ_k m_i(k) KL(q(· | x_t,i, k) ‖ r_i) at one step, nats."""
    law, posteriors = _posteriors(language, alpha_bar[1], pi)
    bridges = _bridges(language.num_letters, alpha_bar[0], beta, pi)  # (x_t, k, x_s)
    states = np.array(list(itertools.product(range(len(pi)), repeat=len(posteriors)))).T
    own, total = _xlogx(bridges).sum(-1), 0.0
    for x_t, m in zip(states, posteriors, strict=True):
        mixed = np.einsum("nk,nks->ns", m, bridges[x_t])
        total += float(law @ ((m * own[x_t]).sum(1) - _xlogx(mixed).sum(1)))
    return total


def _bridges(K: int, alpha_bar_s: float, beta: float, pi: np.ndarray) -> np.ndarray:
    """q(x_s | x_t, x_0 = k), axes (x_t, k, x_s); zero where x_t cannot come from k."""
    step = (1 - beta) * np.eye(len(pi)) + beta * pi  # rows x_s, columns x_t
    joint = _replace(K, alpha_bar_s, pi)[None] * step.T[:, None]
    norm = joint.sum(-1, keepdims=True)
    return joint / np.where(norm > 0, norm, 1.0)


def _xlogx(p: np.ndarray) -> np.ndarray:
    """p log p with 0 log 0 = 0."""
    return p * np.log(np.where(p > 0, p, 1.0))


def _prior_kl(language: Language, alpha_bar_T: float, pi: np.ndarray) -> float:
    """E KL(q(x_T | x_0) ‖ π), nats."""
    q = _replace(language.num_letters, alpha_bar_T, pi)
    ratio = np.where(q > 0, q, 1.0) / np.where(q > 0, pi, 1.0)
    per_letter = (q * np.log(ratio)).sum(1)
    return float(language.probs @ per_letter[language.strings].sum(1))


def _rows(models: dict[str, _Letters], words: Language) -> list[Row]:
    best = {name: model.best.bound / _LENGTH for name, model in models.items()}
    entropy, l_null = words.entropy / _LENGTH, -float(np.log2(words.num_letters))
    k, se = models["uniform"].k
    valid = {name: np.isfinite(log2_prob(words, m.draws)) for name, m in models.items()}
    return [
        *(Row(f"K, {name}, T = {m.trained.diffusion.T}", *m.k, _UNIT, best[name])
          for name, m in models.items()),
        *(Row(f"best possible K − K, {name}", best[name] - m.k[0], m.k[1], _UNIT, 0.0)
          for name, m in models.items()),
        Row("K − L_null, uniform", k - l_null, se, _UNIT, best["uniform"] - l_null),
        Row("ceiling of any model and T, −H", -entropy, None, _UNIT),
        Row("L_null, uniform letters", l_null, None, _UNIT),
        *(Row(f"draws that are strings of the language, {name}", *mean_and_se(100 * is_valid), "%")
          for name, is_valid in valid.items()),
    ]  # fmt: skip


def _k_against_T(models: dict[str, _Letters], words: Language, times: tuple[int, ...]) -> Figure:
    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, model in models.items():
        pi, color = stationary(model.trained.diffusion.kernel), _COLORS[name]
        best = [ceiling(words, schedules.harmonic(T), pi).bound / _LENGTH for T in times]
        ax.plot(times, best, color=color, marker=".", label=f"best possible, {name}")
        ax.errorbar(
            [model.trained.diffusion.T], [model.k[0]], [2 * model.k[1]], fmt="D", color=color,
            markerfacecolor="white", capsize=3, label=f"trained, {name}",
        )  # fmt: skip
    ax.axhline(-words.entropy / _LENGTH, color="black", linestyle="--", label="−H, any model")
    ax.set(xscale="log", xlabel="number of steps T", ylabel=f"K ({_UNIT})")
    ax.set_xticks(times, map(str, times), minor=False)
    ax.minorticks_off()
    ax.legend(frameon=False, loc="lower right")
    return figure


def _kl_per_step(models: dict[str, _Letters]) -> Figure:
    """What each step costs: trained, beside the best possible."""
    figure, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, model in models.items():
        kl = model.trained.tree["bound"]["kl"].values * diagnostics.BITS_PER_NAT
        steps = np.arange(2, model.trained.diffusion.T + 1)
        se = kl.std(0, ddof=1) / np.sqrt(len(kl))
        ax.plot(steps, model.best.kl, color=_COLORS[name], label=f"best possible, {name}")
        ax.errorbar(
            steps, kl.mean(0), 2 * se, fmt="D", color=_COLORS[name], markersize=4,
            markerfacecolor="white", label=f"trained, {name}",
        )  # fmt: skip
    ax.set(xlabel="step t (small: near the data)", ylabel="KL_t (bits per string)")
    ax.set_ylim(bottom=0)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False)
    return figure


def _losses(models: dict[str, _Letters], batch_size: int) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for ax, (name, model) in zip(axes, models.items(), strict=True):
        plots.losses(model.trained.fitted.losses, batch_size=batch_size, ax=ax)
        ax.set_title(name, fontsize="medium")
    return figure
