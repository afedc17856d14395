"""Codes of digits: does a code that a diffusion is told hold what a digit is, and at what price?

A code z of x_0 given to the denoiser is one more latent of the program. Its bound is

    log p(x_0) ≥ E_q(z | x_0) K(x_0 | z) − KL( q(z | x_0) ‖ p(z) ),

reported with the KL in bits, beside the same diffusion without a code, trained as many steps. A
diffusion does without a code if it can. What is tried against that: free bits; a code that is told
at high noise alone, where what is coarse is decided; an encoder that sees the image turned,
stretched and shifted a little, so that the code holds what survives that, and then, with the code
in place, images as they are; a denoiser that sees three by three pixels.

All denoisers but that are one perceptron. It is a worse density of digits than the shared head of
`probdiff run digits`, and trains and compiles sooner; its bounds are to be held against each other.

Codes are read by probes that see labels, beside those of the same encoder trained otherwise:

    DRL         E(x_0) told to a denoiser under L_simple; σ(t) uniform puts its weight on high noise
    E(x_0, t)   another code at every level
    AE, VAE     reconstruction, and with a KL
    SimCLR      views of one image told from those of others; with noise as its only view
    denoiser    hidden layer of the diffusion without a code, layer and level by validation images
    and pixels, principal components, an encoder that nobody trained.

A method's figures are means over seeds, with the standard error over seeds; differences between
methods are paired by test image, each averaged over the seeds.

Only bounds of VDRL are likelihoods: DRL and E(x_0, t) do not pay for their codes.

Sources: Mittal et al. (2023); Xiang et al. (2023) for the denoiser's features; Kingma et al. (2016)
for free bits; Alpaydin and Kaynak (1998), the digits, with scikit-learn.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from numpyro.infer import SVI
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from probdiff import (
    Diffusion,
    ImportanceTimes,
    SampledTimeELBO,
    SimpleLoss,
    datasets,
    diagnostics,
    fit,
    networks,
    plots,
    track_kl,
)
from probdiff.experiments.report import Experiment, Found, Row, Run, mean_and_se
from probdiff.experiments.representation.programs import (
    Codes,
    Images,
    Layers,
    LocalDenoiser,
    Pair,
    TimeCode,
    Told,
    exact_diffusion,
    filled,
    moved,
    noisy,
    simple_diffusion,
)
from probdiff.types import Params

_BITS_PER_NAT = diagnostics.BITS_PER_NAT
_WEIGHTS: dict[str, Callable | None] = {
    "low noise": lambda sigma: 1 / sigma, "all alike": None, "high noise": lambda sigma: sigma,
}  # fmt: skip
"""Of L_simple, by σ of a level."""
_FIRST = 0.45
"""Share of T below which a code says nothing."""


class Size(NamedTuple):
    """How much of everything a run does."""

    seeds: int = 3
    width: int = 8
    T: int = 30
    hidden: int = 256
    batch_size: int = 128
    encoder: tuple[int, ...] = (256, 256)
    code_steps: int = 3_000
    last_steps: int = 1_000
    simple_steps: int = 1_500
    other_steps: int = 1_500
    free_bits: float = 8.0
    few: tuple[int, ...] = (10, 100)
    levels_of_features: tuple[float, ...] = (0.04, 0.2, 0.4, 0.6, 0.8)
    """Shares of T."""
    bound_draws: int = 4
    epochs: int = 100


SMALL = Size(
    seeds=2, width=2, T=5, hidden=8, encoder=(8,), code_steps=2, last_steps=2,
    simple_steps=2, other_steps=2, few=(3,), levels_of_features=(0.4,), bound_draws=1, epochs=1,
)  # fmt: skip


class Trained(NamedTuple):
    """A method with one seed: its programs and codes."""

    pair: Pair
    params: Params
    codes: Codes | None = None
    diffusion: Diffusion | None = None

    def of(self, images: Images) -> list[np.ndarray]:
        """Codes of all images."""
        return [self.codes.of(self.params, x) for x in images.splits]


class Task(NamedTuple):
    """What one seed has to go by."""

    run: Run
    images: Images
    seed: int

    @property
    def size(self) -> Size:
        """How much to do."""
        return self.run.size

    def key(self, use: int) -> Array:
        """Randomness by its use."""
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(self.run.seed), self.seed), use)

    def rngs(self, use: int) -> nnx.Rngs:
        """The same for a network's first weights."""
        return nnx.Rngs(jax.random.bits(self.key(use)).item())

    def codes(self, width: int, *, is_random: bool = False) -> Codes:
        """An encoder to be trained; the same first weights for every method."""
        inputs = math.prod(self.images.shape)
        sizes = inputs, *self.size.encoder, width * (1 + is_random)
        return Codes(self.images, Layers(*sizes, rngs=self.rngs(1)), width, is_random)

    def train(
        self, pair: Pair, loss: Any, num_steps: int, rate: float, *, is_smooth: bool = False
    ) -> Params:
        """Parameters after so many steps, averaged; of dequantised images where smooth."""
        x = self.images.train
        adam = optax.adamw(optax.cosine_decay_schedule(rate, num_steps), weight_decay=0.1)
        fitted = fit(
            self.key(2), SVI(*pair, adam, loss), self.smooth(x) if is_smooth else x,
            num_steps=num_steps, batch_size=min(self.size.batch_size, len(x)), ema_decay=0.998,
            progress=False,
        )  # fmt: skip
        return fitted.params

    def smooth(self, x: np.ndarray) -> np.ndarray:
        """Levels with noise as wide as one, for pixels that are always 0."""
        return x + np.random.default_rng(self.seed).random(x.shape, np.float32) - 0.5

    def bits(self, trained: Trained) -> tuple[np.ndarray, np.ndarray]:
        """−(bound) per pixel and KL, bits by test image."""
        group = diagnostics.bound(
            self.key(3), trained.pair, trained.params, self.images.test,
            num_draws=self.size.bound_draws,
        )["bound"]  # fmt: skip
        bound = -group["bound"].values * _BITS_PER_NAT / math.prod(self.images.shape)
        kl = group["kl_z"].values * _BITS_PER_NAT if "kl_z" in group else 0 * bound
        return bound, kl

    def denoiser(self, *, outputs: int = 2, width: int | None = None) -> nnx.Module:
        """The network that every diffusion has."""
        size = self.size
        return networks.Perceptron(
            self.images.shape, size.hidden, 2, size.T, outputs=outputs,
            context_size=size.width if width is None else width, rngs=self.rngs(4),
        )  # fmt: skip


# the diffusion with and without a code


def _without_code(task: Task) -> Trained:
    """The diffusion told nothing."""
    size = task.size
    network = Told(task.denoiser(), size.width, size.T, 0.0, task.rngs(5))
    diffusion = exact_diffusion(task.images, network, size.T, size.width)

    def nothing(x: Any) -> Array:
        return jnp.zeros((len(x), task.size.width))

    def model(x: Any) -> None:
        diffusion.model(x, context=nothing(x))

    def guide(x: Any) -> None:
        diffusion.guide(x, context=nothing(x))

    steps = size.code_steps + size.last_steps
    params = task.train((model, guide), SampledTimeELBO(), steps, 2e-3)
    return Trained((model, guide), params, diffusion=diffusion)


class Vdrl(NamedTuple):
    """What is done against collapse."""

    free_bits: float = 0.0
    first: float = 0.0
    is_moved: bool = False
    has_last_phase: bool = False
    is_local: bool = False


def _vdrl(task: Task, how: Vdrl) -> Trained:
    """A diffusion that is told a latent code."""
    size, codes = task.size, task.codes(task.size.width, is_random=True)
    if how.is_local:
        network = LocalDenoiser(task.images.shape, size.width, size.T, 32, task.rngs(4))
    else:
        network = Told(task.denoiser(), size.width, size.T, how.first, task.rngs(5))
    diffusion = exact_diffusion(task.images, network, size.T, size.width)
    view = moved if how.is_moved else None
    loss, steps = SampledTimeELBO(free_bits=how.free_bits), size.code_steps
    steps = steps if how.has_last_phase else steps + size.last_steps
    params = task.train(codes.vdrl(diffusion, view), loss, steps, 2e-3)
    if how.has_last_phase:
        network = filled(network, params["x_0_network$params"])
        diffusion = exact_diffusion(task.images, network, size.T, size.width)
        codes = codes._replace(encoder=filled(codes.encoder, params["encoder$params"]))
        params = task.train(codes.vdrl(diffusion), loss, size.last_steps, 1e-3)
    return Trained(codes.vdrl(diffusion), params, codes, diffusion)


# the others


def _drl(task: Task, width: int, weight: Callable | None) -> Trained:
    size, codes = task.size, task.codes(width)
    network = task.denoiser(outputs=1, width=width)
    diffusion = simple_diffusion(task.images, network, size.T, (width,))
    model, guide = codes.drl(diffusion)
    loss = SimpleLoss(noise_weight=weight, times=ImportanceTimes())
    params = task.train((model, track_kl(guide)), loss, size.simple_steps, 1e-3, is_smooth=True)
    return Trained((model, guide), params, codes, diffusion)


def _own_and_shuffled(task: Task, trained: Trained) -> tuple[float, float]:
    """L_simple of test images told their own codes, and told those of others."""
    x = jnp.asarray(task.smooth(task.images.test))
    code = trained.codes.of(trained.params, task.images.test)
    order = np.random.default_rng(task.seed).permutation(len(x))
    own = {"x_0_network$params": trained.params["x_0_network$params"]}
    diffusion, loss = trained.diffusion, SimpleLoss(num_particles=20)

    def at(code: np.ndarray) -> float:
        context = {"context": jnp.asarray(code)}
        total = loss.loss(task.key(6), own, diffusion.model, diffusion.guide, x, **context)
        return float(total) / len(x)

    return at(code), at(code[order])


def _time_codes(task: Task) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """Levels, and E(x_0, t) of all images at each."""
    size, inputs = task.size, math.prod(task.images.shape)
    encoder = Layers(inputs + 4, *size.encoder, size.width, rngs=task.rngs(1))
    network = TimeCode(task.denoiser(outputs=1), encoder, size.T)
    diffusion = simple_diffusion(task.images, network, size.T, task.images.shape)
    units = task.images.units

    def model(x: Any) -> None:
        diffusion.model(x, context=(x - units["loc"]) / units["scale"])

    params = task.train(
        (model, diffusion.guide), SimpleLoss(), size.simple_steps, 1e-3, is_smooth=True
    )
    network = filled(network, params["x_0_network$params"])
    levels = np.unique(np.linspace(1, size.T, 8).astype(int))
    scaled = [jnp.asarray((x - units["loc"]) / units["scale"]) for x in task.images.splits]
    code = nnx.jit(TimeCode.code)
    return levels, [
        [np.asarray(code(network, x, jnp.full(len(x), float(t)))) for x in scaled] for t in levels
    ]


def _autoencoder(task: Task, width: int, *, is_random: bool) -> Trained:
    codes = task.codes(width, is_random=is_random)
    sizes = width, *task.size.encoder[::-1], math.prod(task.images.shape)
    pair = codes.autoencoder(Layers(*sizes, rngs=task.rngs(7)))
    return Trained(pair, task.train(pair, SampledTimeELBO(), task.size.other_steps, 1e-3), codes)


def _contrastive(task: Task, view: Callable) -> Trained:
    codes = task.codes(task.size.width)
    pair = codes.contrastive(Layers(task.size.width, 64, 32, rngs=task.rngs(7)), view)
    return Trained(pair, task.train(pair, SampledTimeELBO(), task.size.other_steps, 1e-3), codes)


def _denoiser_codes(task: Task, alone: Trained) -> tuple[list[np.ndarray], str]:
    """Hidden activations at the layer and level that read best on validation images."""
    images, best = task.images, (-1.0, [], "")
    for layer in ("denoiser/layers/0", "denoiser/layers/1"):
        for share in task.size.levels_of_features:
            t = max(1, round(share * task.size.T))
            found = [
                diagnostics.features(
                    task.key(8), alone.diffusion, alone.params, x, layer=layer, t=t, num_draws=4,
                    context=np.zeros((len(x), task.size.width), np.float32),
                )
                for x in images.splits
            ]  # fmt: skip
            found = [x * jax.nn.sigmoid(x) for x in found]  # as the next layer sees them
            score = _validation_score(images, found)
            if score > best[0]:
                best = score, [np.asarray(x) for x in found], f"{layer} at t = {t} of {task.size.T}"
    return best[1:]


def _validation_score(images: Images, codes: list[np.ndarray]) -> float:
    """Share of validation images that a linear probe of the training images' codes gets right."""
    mean, sd = np.mean(codes[0], 0), np.std(codes[0], 0) + 1e-6
    x, validation = ((np.asarray(code) - mean) / sd for code in codes[:2])
    model = LogisticRegression(max_iter=200).fit(x, images.train_labels)
    return float(model.score(validation, images.validation_labels))


def _components(codes: list[np.ndarray], width: int) -> list[np.ndarray]:
    """Principal components of so many, fitted to training images."""
    codes = [x.reshape(len(x), -1) for x in codes]
    pca = PCA(min(width, codes[0].shape[1]), random_state=0).fit(codes[0])
    return [pca.transform(x) for x in codes]


# what they are worth


class Judged(NamedTuple):
    """What probes say of one method with one seed."""

    correct: dict[str, Float[np.ndarray, " M"]]
    silhouette: float


def _judge(task: Task, codes: list[np.ndarray]) -> Judged:
    images = task.images
    x = np.concatenate(codes[:2])
    y = np.concatenate([images.train_labels, images.validation_labels])
    group = diagnostics.probe(
        task.key(9), x, y, codes[2], images.test_labels, few=task.size.few, num_repeats=3,
        max_epochs=task.size.epochs,
    )["probes"]  # fmt: skip
    correct = dict(zip(group["probe"].values.tolist(), group["correct"].values, strict=True))
    return Judged(correct, group.attrs["silhouette"])


def _share_right(task: Task, codes: list[np.ndarray]) -> float:
    """What a linear probe gets right."""
    quick = Size(few=(), epochs=1)
    task = task._replace(run=task.run._replace(size=quick))
    return float(_judge(task, codes).correct["linear"].mean())


class Seed(NamedTuple):
    """What one seed found."""

    bits: dict[str, tuple[np.ndarray, np.ndarray]]
    judged: dict[str, Judged]
    curve: tuple[np.ndarray, list[float]]
    shuffled: dict[str, tuple[float, float]]
    chosen: str
    planes: dict[str, np.ndarray]
    """Test images as codes of two numbers."""


MAIN = "VDRL"
_CURVE = {
    "VDRL, nothing done": Vdrl(),
    "VDRL, free bits": Vdrl(free_bits=1.0),
    "VDRL, and at high noise alone": Vdrl(free_bits=1.0, first=1.0),
    "VDRL, field of 3 × 3 pixels": Vdrl(is_local=True),
}
"""Remedies one by one, of the first seed; 1 stands for the run's free bits and level."""
_ALL = Vdrl(free_bits=1.0, first=1.0, is_moved=True, has_last_phase=True)


def _of_size(how: Vdrl, size: Size) -> Vdrl:
    return how._replace(free_bits=how.free_bits * size.free_bits, first=how.first * _FIRST)


def _one_seed(task: Task) -> Seed:
    run, size, images = task.run, task.size, task.images
    say = f"seed {task.seed + 1} of {size.seeds}: "
    run.say(say + "the diffusion without a code")
    alone = _without_code(task)
    bits, codes = {"no code": task.bits(alone)}, {}
    run.say(say + "VDRL")
    hows = {MAIN: _ALL} | (_CURVE if task.seed == 0 else {})
    for name, how in hows.items():
        trained = _vdrl(task, _of_size(how, size))
        bits[name], codes[name] = task.bits(trained), trained.of(images)
    run.say(say + "DRL")
    shuffled, planes = {}, {}
    for name, weight in _WEIGHTS.items():
        drl = _drl(task, 2, weight)
        shuffled[name] = _own_and_shuffled(task, drl)
        codes[f"DRL of 2, {name}"] = drl.of(images)
        planes[name] = codes[f"DRL of 2, {name}"][2]
    codes["DRL"] = _drl(task, size.width, _WEIGHTS["high noise"]).of(images)
    run.say(say + "the others")
    levels, by_level = _time_codes(task)
    codes["AE of 2"] = _autoencoder(task, 2, is_random=False).of(images)
    codes["AE"] = _autoencoder(task, size.width, is_random=False).of(images)
    codes["VAE"] = _autoencoder(task, size.width, is_random=True).of(images)
    codes["SimCLR"] = _contrastive(task, moved).of(images)
    codes["SimCLR, noise alone"] = _contrastive(task, noisy).of(images)
    blank = task.codes(size.width)
    codes["random encoder"] = [blank.of({}, x) for x in images.splits]
    hidden, chosen = _denoiser_codes(task, alone)
    codes |= {
        "denoiser, all of the layer": hidden,
        f"denoiser, {size.width} components": _components(hidden, size.width),
        f"pixels, {size.width} components": _components(list(images.splits), size.width),
        "pixels": [x.reshape(len(x), -1) for x in images.splits],
    }
    run.say(say + "probes")
    judged = {name: _judge(task, found) for name, found in codes.items()}
    best = int(np.argmax([_validation_score(images, found) for found in by_level]))
    judged["E(x_0, t), best t"] = _judge(task, by_level[best])
    curve = levels, [_share_right(task, found) for found in by_level]
    return Seed(bits, judged, curve, shuffled, chosen, planes)


# the report


def _conduct(run: Run) -> Found:
    data = datasets.digits()
    images = Images(
        *(np.asarray(x, np.float32) for x in data[:3]), *map(np.asarray, data[3:]), levels=17
    )
    found = [_one_seed(Task(run, images, seed)) for seed in range(run.size.seeds)]
    rows = [*_bound_rows(found), *_probe_rows(found), *_drl_rows(found), *_curve_rows(found)]
    figures = {
        "bits_against_kl": _draw_bits(found),
        "codes_of_two": _draw_planes(images, found),
        "accuracy_by_level": _draw_curve(found),
        "accuracies": _draw_accuracies(found, run.size.few),
    }
    layers = "; ".join(f"seed {i + 1}: {seed.chosen}" for i, seed in enumerate(found))
    return Found(rows, figures, sections={"Denoiser": f"Chosen by validation images: {layers}."})


EXPERIMENT = Experiment("Representation", __doc__, _conduct, {"cpu": Size(), "quick": SMALL})


def _over(values: list[float]) -> tuple[float, float | None]:
    """Mean over seeds and its standard error."""
    return mean_and_se(np.array(values)) if len(values) > 1 else (float(values[0]), None)


def _paired(ours: list[np.ndarray], others: list[np.ndarray]) -> tuple[float, float]:
    """Mean difference over test images, each averaged over seeds, and its standard error."""
    return mean_and_se(np.mean(ours, 0) - np.mean(others, 0))


def _bound_rows(found: list[Seed]) -> list[Row]:
    unit, rows = "bits per pixel, 17 levels", []
    for name in found[0].bits:
        seeds = [seed for seed in found if name in seed.bits]
        values = [seed.bits[name][0] for seed in seeds]
        rows.append(Row(f"{name}: −bound, test", *_over([v.mean() for v in values]), unit))
        if name == "no code":
            continue
        rates = [seed.bits[name][1].mean() for seed in seeds]
        alone = [seed.bits["no code"][0] for seed in seeds]
        rows += [
            Row(f"{name}: KL of the code", *_over(rates), "bits per image"),
            Row(f"{name}: price over no code, paired by image", *_paired(values, alone), unit),
        ]
    return rows


def _probe_rows(found: list[Seed]) -> list[Row]:
    rows = []
    for name in found[0].judged:
        seeds = [seed.judged[name] for seed in found if name in seed.judged]
        for probe in seeds[0].correct:
            shares = [seed.correct[probe].mean() for seed in seeds]
            rows.append(Row(f"{name}: {probe}", *_over(shares), "share of test images right"))
        silhouettes = [seed.silhouette for seed in seeds]
        rows.append(Row(f"{name}: silhouette of classes", *_over(silhouettes)))
    for other in found[0].judged:
        if other == MAIN or other in _CURVE:
            continue
        pair = [
            [seed.judged[name].correct["linear"] for seed in found] for name in (MAIN, other)
        ]  # fmt: skip
        text = f"{MAIN} − {other}: linear, paired by image"
        rows.append(Row(text, *_paired(*pair), "share of test images right"))
    return rows


def _drl_rows(found: list[Seed]) -> list[Row]:
    unit, rows = "squared errors of the noise per image", []
    for name in _WEIGHTS:
        own, other = zip(*(seed.shuffled[name] for seed in found), strict=True)
        rows += [
            Row(f"DRL of 2, {name}: L_simple with its code", *_over(list(own)), unit),
            Row(f"DRL of 2, {name}: with codes of other images", *_over(list(other)), unit),
        ]
    return rows


def _curve_rows(found: list[Seed]) -> list[Row]:
    levels = found[0].curve[0]
    return [
        Row(f"E(x_0, t) at t = {t}: linear", *_over([seed.curve[1][i] for seed in found]),
            "share of test images right")
        for i, t in enumerate(levels)
    ]  # fmt: skip


def _draw_bits(found: list[Seed]) -> Figure:
    """What a code costs against what the bound is, one point a method."""
    figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    alone = np.mean([seed.bits["no code"][0].mean() for seed in found])
    ax.axhline(alone, color="0.4", linestyle="--", label="no code")
    for i, name in enumerate(n for n in found[0].bits if n != "no code"):
        of = [seed.bits[name] for seed in found if name in seed.bits]
        bits, kl = np.mean([b.mean() for b, _ in of]), np.mean([k.mean() for _, k in of])
        color = plots.ORANGE if name == MAIN else f"C{i}"
        ax.plot(kl, bits, "o", color=color, label=name, markersize=9 if name == MAIN else 6)
    ax.set(xlabel="KL of the code (bits per image)", ylabel="−bound (bits per pixel)")
    ax.legend(frameon=False, fontsize=8)
    return figure


def _draw_planes(images: Images, found: list[Seed]) -> Figure:
    """Test images as codes of two numbers, coloured by class."""
    figure, axes = plt.subplots(1, len(_WEIGHTS), figsize=(12, 4), layout="constrained")
    for ax, name in zip(axes, _WEIGHTS, strict=True):
        code = found[0].planes[name]
        for label in np.unique(images.test_labels):
            at = code[images.test_labels == label]
            ax.scatter(*at.T, s=12, color=plt.cm.tab10(label), label=str(label))
        ax.set(title=f"{name}", xlabel="code, first number", ylabel="second number")
    axes[-1].legend(frameon=False, title="digit", bbox_to_anchor=(1, 1), loc="upper left")
    figure.suptitle("codes of DRL by the weight of L_simple")
    return figure


def _draw_curve(found: list[Seed]) -> Figure:
    """Accuracy of E(x_0, t) by t, between static codes."""
    levels = found[0].curve[0]
    at = np.array([seed.curve[1] for seed in found])
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    ax.plot(levels, at.mean(0), "o-", color=plots.BLUE, label="E(x_0, t)")
    if len(at) > 1:
        se = at.std(0, ddof=1) / math.sqrt(len(at))
        ax.fill_between(levels, at.mean(0) - se, at.mean(0) + se, color=plots.BLUE, alpha=0.2)
    for name, color in {"AE": "0.4", MAIN: plots.ORANGE}.items():
        share = np.mean([seed.judged[name].correct["linear"].mean() for seed in found])
        ax.axhline(share, color=color, linestyle="--", label=f"{name}, one code for all t")
    ax.set(xlabel="t", ylabel="share of test images right, linear probe")
    ax.legend(frameon=False)
    return figure


def _draw_accuracies(found: list[Seed], few: tuple[int, ...]) -> Figure:
    """Every method by its probes, the best linear one on top."""
    probes = ["linear", "perceptron", *(f"linear, {count} a class" for count in few)]
    means = {
        name: [np.mean([s.judged[name].correct[p].mean() for s in found if name in s.judged])
               for p in probes]
        for name in found[0].judged
    }  # fmt: skip
    order = sorted(means, key=lambda name: means[name][0])
    figure, ax = plt.subplots(figsize=(8, 0.32 * len(order) + 1), layout="constrained")
    for i, probe in enumerate(probes):
        ax.plot([means[name][i] for name in order], order, "os^D"[i % 4], label=probe)
    ax.set(xlabel="share of test images right")
    ax.grid(axis="y", color="0.9")
    ax.legend(frameon=False, fontsize=8)
    return figure
