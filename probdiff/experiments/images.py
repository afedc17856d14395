"""Images of bytes at length: MNIST twice, and CIFAR-10; bits, draws, and who judges them."""

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

import probdiff
from probdiff import Diffusion, datasets, diagnostics, plots, readouts, sample, schedules
from probdiff.experiments.judging import bytes_of, classifier_of_bytes, classifier_rows
from probdiff.experiments.report import Experiment, Found, Row, Run, mean_and_se
from probdiff.experiments.training import CALLS, Recipe, bits_rows, curve, learn, rngs_of, sheets

T, _ALPHA_BAR_T, _COMPONENTS, LEVELS = 1000, 1e-4, 4, 256
_SHADES = (0.0, LEVELS - 1.0)
_PIXELS, _BITS, _PUBLISHED = 784, "bits per pixel, 256 levels", 0.936
_NUMBERS, _BITS_OF_COLOURS, _PUBLISHED_OF_COLOURS = 3072, "bits per dimension, 256 levels", 3.70
_EPOCHS = 10
_SMALL_NETWORK = Recipe((8, 8), 1, 20, 8, 2e-3, patch=2, evaluations=2)


class Size(NamedTuple):
    """How it learns, and how much is measured once it has."""

    recipe: Recipe
    train_images: int = 59_000
    held_out: int = 1_000
    """Of the training images, to watch while it learns."""
    test_images: int = 10_000
    test_times: int = 10
    """Random steps at which K of a test image is estimated."""
    draws: int = 10_000
    epochs: int = 10
    """Of the classifier."""


SMALL = Size(_SMALL_NETWORK, 200, 20, 20, 2, 20, 1)


_MNIST_TEXT = """How many bits a pixel of 256 grey levels takes, and what the draws look like.

    diffusion T = 1000, log signal-to-noise linear from noise of one grey level to ᾱ_T = 1e-4
    readout   a mixture of four Gaussians for each pixel, conditioned on its own noise exactly
    last step put on the 256 levels, so that K is of a probability
    network   a U-Net of the log-SNR; training as `training` says

    bits per pixel = −K / (784 ln 2)

is an upper bound on the code length of a pixel; lower is better. K of every test image is estimated
without bias at random steps; errors are standard errors over images. Published is 0.94, for a
variational diffusion of 4.0 million parameters; flows have 0.97 to 1.06.

Draws walk 50 of the 1000 levels, one network call each. A perceptron that has seen real digits only
reads them: does it find all ten classes, and is it as sure as with test digits? The figure of the
2015 paper is a Parzen window's: 10,000 draws as centres of Gaussians; see `diagnostics.parzen`. It
says little (k-means centres beat the data by it: Theis et al. 2016), so that it stands beside what
training images in place of draws give.

Source: Sohl-Dickstein et al. (2015), table 2, for the Parzen figure.
"""
_DDPM_TEXT = """MNIST as a tutorial on DDPM has it: noise predicted, L_simple, fixed variances.

    T = 1000, β from 1e-4 to 0.02 in equal steps, grey levels scaled to [−1, 1]
    x̂_0 by the noise ε̂, variance β_t; U-Net with a perceptron of the step
    10 epochs of batches of 128, L_simple

The draws, over all steps, are what such a tutorial shows, read by a perceptron trained on real
digits; beside them stands the bound that it leaves out. A fixed variance is dear at the last step:
p(x_0 | x_1) is a Gaussian of sd √β_1 = 1.28 levels put on 256 levels, so that even a perfect
network, x̂_0 = x_0, pays for every pixel

    −log2 P(level | x̂_0 = level) = 0.62 bits at both ends of the grey scale, 1.71 between them.

The floor of −K that this sets is printed beside it. `mnist` spends its bits elsewhere. Published is
a variational diffusion's, whose variances and rates are chosen for the bound.

Source: Ho et al. (2020). T, rates, batches and epochs are those of the tutorials.
"""
_CIFAR10_TEXT = """CIFAR-10: bits per colour channel of a pixel, and draws.

As `mnist`, with colours: noise of one level at first, mixtures of Gaussians for each number, the
last step put on 256 levels, one shift and one scale for all numbers from the training images, which
are seen with their mirror images.

    bits per dimension = −K / (3072 ln 2)

The 2015 paper prints K = 5.4 ± 0.2 bits per pixel of three channels, a log density, higher is
better, of data divided by their overall sd s (in 0..255) and dequantised. A density's K becomes
bits per dimension by log2 s − K/3 = 4.20; the row "as the paper's K" is this one turned round,
3 (log2 s − bits). On a CPU the recipe is a small network for an hour's worth of patience; on a GPU
it is the one to quote.

Published: 2015's diffusion 4.20, DDPM 3.70, variational diffusion 2.65 bits per dimension.
"""


def define(images: np.ndarray, recipe: Recipe, rngs: nnx.Rngs) -> Diffusion:
    """The diffusion of images of bytes, one shift and one scale for all their numbers."""
    shape = images.shape[1:]
    loc, scale = float(images.mean(dtype=np.float64)), float(images.std(dtype=np.float64))
    readout = readouts.Mixture(_COMPONENTS, -loc / scale, (LEVELS - 1 - loc) / scale)
    beta = schedules.log_snr_linear(T, beta_1=scale**-2, alpha_bar_T=_ALPHA_BAR_T)
    network = recipe.network(shape, rngs, outputs=3 * _COMPONENTS)
    return Diffusion(
        probdiff.GaussianKernel(), beta, network, event_shape=shape, readout=readout,
        last_step=readouts.Discretised(0, LEVELS - 1, LEVELS), loc=loc, scale=scale,
    )  # fmt: skip


def define_ddpm(recipe: Recipe, rngs: nnx.Rngs) -> Diffusion:
    """The diffusion of the tutorials, grey levels scaled to [−1, 1]."""
    beta, network = schedules.linear(T), recipe.network((28, 28), rngs, outputs=1, T=T)
    return Diffusion(
        probdiff.GaussianKernel(), beta, network, event_shape=(28, 28),
        readout=readouts.Epsilon(readouts.ForwardVariance()),
        last_step=readouts.Discretised(0, LEVELS - 1, LEVELS),
        loc=(LEVELS - 1) / 2, scale=(LEVELS - 1) / 2,
    )  # fmt: skip


def floor(diffusion: Diffusion, images: np.ndarray) -> np.ndarray:
    """Bits per pixel of the last step where x̂_0 is right, image by image."""
    sd = jnp.float32(np.sqrt(1e-4) * diffusion.scale)
    levels = jnp.arange(LEVELS, dtype=jnp.float32)
    log_mass = diffusion.last_step.grid.log_mass(levels, levels, sd)
    bits = -np.asarray(log_mass) * diagnostics.BITS_PER_NAT
    return bits[images.astype(int)].reshape(len(images), -1).mean(1)


def _parts(data: datasets.Mnist | datasets.Cifar10, size: Size) -> tuple[np.ndarray, ...]:
    """Images to learn from, to watch by, and to test on."""
    parts = data.train[: size.train_images], data.train[-size.held_out :]
    return tuple(x.astype(np.float32) for x in (*parts, data.test[: size.test_images]))


def _conduct_mnist(is_ddpm: bool, run: Run) -> Found:
    size, data, keys = run.size, datasets.mnist(), run.keys("init", "fit", "bound", "draw")
    images, held_out, test = _parts(data, size)
    make = define_ddpm if is_ddpm else functools.partial(define, images)
    diffusion, fitted, tree = learn(
        run, keys, make(size.recipe, rngs_of(keys["init"])), images, held_out, test,
        shades=_SHADES, objective=probdiff.SimpleLoss() if is_ddpm else None,
    )  # fmt: skip
    run.say("draw, and ask a classifier of real digits")
    walk: dict[str, Any] = {"block_size": 100} if is_ddpm else {"steps": CALLS}
    draws = sample.ancestral(
        keys["draw"], diffusion, fitted.params, size.draws, progress=run.progress, **walk
    )
    labels = data.train_labels[: size.train_images]
    classifier = classifier_of_bytes(images, labels, size.epochs, run.seed)
    judged, counts = classifier_rows(
        classifier, bytes_of(test), data.test_labels[: size.test_images], bytes_of(draws)
    )
    rarest = Row("rarest class among the draws", counts.min() / counts.sum(), None, "share")
    rows = [*bits_rows(tree, _PIXELS, _BITS, _PUBLISHED), *judged, rarest]
    title = f"draws, {T if is_ddpm else CALLS} network calls each"
    figures = {"samples": sheets(data.test, draws, _SHADES, title=title)}
    if is_ddpm:
        least = mean_and_se(floor(diffusion, test))
        rows.insert(5, Row("floor of −log p(x_0 | x_1), variance β_1", *least, _BITS))
        losses = plots.losses(fitted.losses, batch_size=size.recipe.batch_size)
        losses.set(ylabel="L_simple (per example)")
        figures["losses"] = losses.figure
    else:
        rows += _parzen_rows({"draws": draws, "training images": data.train[: size.draws]}, data)
        figures["curve"] = curve(run, _PIXELS, size.held_out, _PUBLISHED)
    text = f"Classes 0 to 9 among {counts.sum()} draws: {', '.join(map(str, counts))}."
    return Found(rows, figures, {"bounds": tree}, {"Draws": text}, (diffusion, fitted.params))


def _parzen_rows(centres: dict[str, np.ndarray], data: datasets.Mnist) -> list[Row]:
    """Parzen windows on draws and on real images in their place, by the published protocol."""
    first = len(data.train) * 5 // 6  # 50,000, as published
    validation, test = data.train[first : first + 1_000] / 255, data.test / 255
    published = {"draws": 317, "training images": 349}  # 10,000 of each
    rows, unit = [], "bits per image in [0, 1]"
    for name, x in centres.items():
        found = diagnostics.parzen(x / 255.0, validation, test)["parzen"].attrs
        value, text = (found["mean_bits"], found["se_bits"]), f"Parzen window on {len(x)} {name}"
        rows.append(Row(text, *value, unit, None, published[name]))
    return rows


def _conduct_cifar10(run: Run) -> Found:
    size, data, keys = run.size, datasets.cifar10(), run.keys("init", "fit", "bound", "draw")
    images, held_out, test = _parts(data, size)
    images = datasets.with_mirrored(images)
    diffusion = define(images, size.recipe, rngs_of(keys["init"]))
    _, fitted, tree = learn(run, keys, diffusion, images, held_out, test, shades=_SHADES)
    run.say("draw")
    draws = sample.ancestral(keys["draw"], diffusion, fitted.params, size.draws, steps=CALLS)
    bits = -tree["bound"]["bound"].values / (_NUMBERS * math.log(2))
    as_paper = 3 * (math.log2(float(diffusion.scale)) - bits)
    rows = [
        *bits_rows(tree, _NUMBERS, _BITS_OF_COLOURS, _PUBLISHED_OF_COLOURS),
        Row("as the paper's K", *mean_and_se(as_paper), "bits per pixel", None, 5.4),
    ]
    figures = {
        "samples": sheets(data.test, draws, _SHADES, title=f"draws, {CALLS} network calls each"),
        "curve": curve(run, _NUMBERS, size.held_out, _PUBLISHED_OF_COLOURS),
    }
    return Found(rows, figures, {"bounds": tree}, model=(diffusion, fitted.params))


MNIST = Experiment("MNIST", _MNIST_TEXT, functools.partial(_conduct_mnist, False), {
    "cpu": Size(Recipe((32, 64), 1, 7_000, 64, 2e-3, patch=2)),
    "gpu": Size(Recipe(
        (96, 192, 256), 2, 12_000, 256, 1e-3, head_width=32, dtype="bfloat16", ema_decay=0.9995
    )),
    "quick": SMALL,
})  # fmt: skip
DDPM_MNIST = Experiment("MNIST by L_simple", _DDPM_TEXT, functools.partial(_conduct_mnist, True), {
    "cpu": Size(Recipe((32, 64), 1, _EPOCHS * 59_000 // 128, 128, 2e-3, patch=2), draws=500),
    "gpu": Size(Recipe((64, 128, 128), 2, _EPOCHS * 59_000 // 128, 128, 1e-3), draws=500),
    "quick": SMALL,
})  # fmt: skip
CIFAR10 = Experiment("CIFAR-10", _CIFAR10_TEXT, _conduct_cifar10, {
    "cpu": Size(Recipe((32, 64, 64), 1, 8_000, 32, 2e-3, patch=2), 49_000, 1_000, 2_000, draws=64),
    "gpu": Size(Recipe(
        (128, 256, 256), 3, 30_000, 256, 5e-4, head_width=48, attention_heads=4, dtype="bfloat16",
        ema_decay=0.9995,
    ), 49_000, draws=64),
    "quick": Size(_SMALL_NETWORK._replace(num_steps=10, batch_size=4), 100, 10, 10, 2, 4),
})  # fmt: skip
