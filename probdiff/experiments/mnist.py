"""MNIST: how many bits a pixel of 256 grey levels takes, and what the draws look like.

    diffusion T = 1000, log signal-to-noise linear from noise of one grey level to ᾱ_T = 1e-4
    readout   a mixture of four Gaussians for each pixel, conditioned on its own noise exactly
    last step put on the 256 levels, so that K is of a probability

    bits per pixel = −K / (784 ln 2)

Draws walk 50 of the 1000 levels, one network call each. They are judged by a classifier that has
seen real digits only: does it find all ten classes, and is it as sure as with test digits? The
figure of the 2015 paper is a Parzen window's: 10,000 draws as centres of Gaussians; see
`diagnostics.parzen`. It says little (k-means centres beat the data by it: Theis et al. 2016), so
that it stands beside what training images in place of draws give.

Sources: Sohl-Dickstein et al. (2015), table 2, for the Parzen figure; published bits per pixel of
grey MNIST: 0.94 for a variational diffusion of 4.0 million parameters, 0.97 to 1.06 for flows.
"""

import functools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from probdiff import (
    Diffusion,
    GaussianKernel,
    datasets,
    diagnostics,
    readouts,
    sample,
    schedules,
)
from probdiff.experiments.report import Row, mean_and_se, write_report
from probdiff.experiments.training import CALLS, Recipe, bits_rows, curve, learn, sheets

SUMMARY = "grey digits of 28 × 28 pixels: bits per pixel, and draws"
DURATION = "about 40 minutes on one CPU core"

T, ALPHA_BAR_T, COMPONENTS, LEVELS = 1000, 1e-4, 4, 256
PIXELS, SHADES = 784, (0.0, LEVELS - 1.0)
BITS = "bits per pixel, 256 levels"
PUBLISHED = 0.936
PARZEN = {"draws": 317, "training images": 349}
"""Published, for 10,000 of each: the diffusion of 2015, and training images."""
PARZEN_UNIT = "bits per image in [0, 1]"

RECIPES = {
    "cpu": Recipe(
        widths=(32, 64), depth=1, patch=2, num_steps=7_000, batch_size=64, learning_rate=2e-3
    ),
    "gpu": Recipe(
        widths=(96, 192, 256), depth=2, num_steps=12_000, batch_size=256, learning_rate=1e-3,
        head_width=32, dtype="bfloat16", ema_decay=0.9995,
    ),
    "quick": Recipe(
        widths=(8, 8), depth=1, patch=2, num_steps=20, batch_size=8, learning_rate=2e-3,
        evaluations=2,
    ),
}  # fmt: skip


class Size(NamedTuple):
    """How much is measured once it has learned."""

    train_images: int = 59_000
    held_out: int = 1_000
    """Of the training images, to watch while it learns."""
    test_images: int = 10_000
    test_times: int = 10
    draws: int = 10_000
    epochs: int = 10
    """Of the classifier."""


SMALL = Size(200, 20, 20, 2, 20, 1)


def run(
    out_dir: str | Path,
    *,
    seed: int = 0,
    quick: bool = False,
    recipe: str = "cpu",
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Train, bound and draw; write report, table, figures, bounds and model into `out_dir`.

    Args:
        out_dir: Folder of the run, made if absent; a checkpoint in it is gone on from.
        seed: Seeds everything; the data and their split are fixed.
        quick: A few steps only, to see that all runs; the numbers mean nothing.
        recipe: "cpu" or "gpu".
        progress: Show bars.
        say: Told what is being done.

    Returns:
        The rows of the table.
    """
    size = SMALL if quick else Size()
    chosen = RECIPES["quick" if quick else recipe]
    out_dir = Path(out_dir)
    data = datasets.mnist()
    images = data.train[: size.train_images].astype(np.float32)
    test = data.test[: size.test_images].astype(np.float32)
    diffusion, fitted, tree, key_draw = learn(
        seed, functools.partial(define, images, chosen), images,
        data.train[-size.held_out :].astype(np.float32), test, chosen, out_dir,
        num_times=size.test_times, shades=SHADES, progress=progress, say=say,
    )  # fmt: skip
    say("draw, and ask a classifier of real digits")
    draws = sample.ancestral(
        key_draw, diffusion, fitted.params, size.draws, steps=CALLS, progress=progress
    )
    classifier = train_classifier(images, data.train_labels[: size.train_images], size.epochs, seed)
    counts = read(classifier, draws)
    rows = [
        *bits_rows(tree, PIXELS, BITS, PUBLISHED),
        *judge(classifier, test, data.test_labels[: size.test_images], draws, counts),
        *parzen_rows({"draws": draws, "training images": data.train[: size.draws]}, data),
    ]
    figures = {
        "samples": sheets(data.test, draws, SHADES, calls=CALLS),
        "curve": curve(out_dir, PIXELS, size.held_out, PUBLISHED),
    }
    write_report(
        out_dir,
        "MNIST",
        rows,
        sections=_sections(size, chosen, diffusion, counts),
        figures=figures,
        trees={"bounds": tree},
        quick=quick,
    )
    return rows


def define(images: np.ndarray, recipe: Recipe, rngs: nnx.Rngs) -> Diffusion:
    """The diffusion of images of bytes, one shift and one scale for all their numbers."""
    loc, scale = float(images.mean(dtype=np.float64)), float(images.std(dtype=np.float64))
    outputs = 3 * COMPONENTS
    return Diffusion(
        GaussianKernel(),
        schedules.log_snr_linear(T, beta_1=scale**-2, alpha_bar_T=ALPHA_BAR_T),
        recipe.network(images.shape[1:], rngs, outputs=outputs),
        event_shape=images.shape[1:],
        readout=readouts.Mixture(COMPONENTS, -loc / scale, (LEVELS - 1 - loc) / scale),
        last_step=readouts.Discretised(0, LEVELS - 1, LEVELS),
        loc=loc,
        scale=scale,
    )


def train_classifier(
    images: np.ndarray, labels: np.ndarray, epochs: int, seed: int
) -> MLPClassifier:
    """A perceptron of one layer that tells real digits apart."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # judged on test images, not by it
        return MLPClassifier((256,), batch_size=128, max_iter=epochs, random_state=seed).fit(
            _flat(images), labels
        )


def read(classifier: MLPClassifier, images: np.ndarray) -> np.ndarray:
    """How many images are read as each of the ten digits."""
    return np.bincount(classifier.predict(_flat(images)), minlength=10)


def _flat(images: np.ndarray) -> np.ndarray:
    return np.asarray(images, np.float32).reshape(len(images), -1) / 255


def parzen_rows(centres: dict[str, np.ndarray], data: datasets.Mnist) -> list[Row]:
    """Parzen windows on draws and on real images in their place, by the published protocol."""
    first = len(data.train) * 5 // 6  # 50,000, as published
    validation, test = data.train[first : first + 1_000] / 255, data.test / 255
    rows = []
    for name, x in centres.items():
        found = diagnostics.parzen(x / 255.0, validation, test)["parzen"].attrs
        mean, se = found["mean_bits"], found["se_bits"]
        published = PARZEN[name]
        rows.append(
            Row(f"Parzen window on {len(x)} {name}", mean, se, PARZEN_UNIT, None, published)
        )
    return rows


def judge(
    classifier: MLPClassifier,
    test: np.ndarray,
    labels: np.ndarray,
    draws: np.ndarray,
    counts: np.ndarray,
) -> list[Row]:
    """What the classifier says about test images and draws."""
    correct = classifier.predict(_flat(test)) == labels
    sure, sure_of_real = (classifier.predict_proba(_flat(x)).max(1) for x in (draws, test))
    share = counts[counts > 0] / counts.sum()
    return [
        Row("classifier: right on test digits", *mean_and_se(100 * correct), "%"),
        Row("classifier: probability of its class, test digits", *mean_and_se(sure_of_real)),
        Row("classifier: probability of its class, draws", *mean_and_se(sure)),
        Row(
            "entropy of the classes of the draws", -float(np.sum(share * np.log2(share))), None,
            "bits", math.log2(10),
        ),
        Row("rarest class among the draws", counts.min() / counts.sum(), None, "share"),
    ]  # fmt: skip


def _sections(
    size: Size, recipe: Recipe, diffusion: Diffusion, counts: np.ndarray
) -> dict[str, str]:
    count = sum(leaf.size for leaf in jax.tree.leaves(diffusion.params_template))
    return {
        "Reading": (
            "Bits per pixel are −K over 784 pixels, an upper bound on the code length of a pixel "
            "of 256 levels; lower is better. K of every test image is estimated without bias at "
            f"{size.test_times} random steps; errors are standard errors over images. The "
            "published figure is a variational diffusion's of 4.0 million parameters; flows have "
            "0.97 to 1.06."
        ),
        "Settings": (
            f"T = {T}, log signal-to-noise linear, first noise one grey level, ᾱ_T = "
            f"{ALPHA_BAR_T}; readout: a mixture of {COMPONENTS} Gaussians per pixel; the last step "
            f"put on {LEVELS} levels. {count:,} parameters. {recipe.describe()}"
        ),
        "Draws": (
            f"Classes 0 to 9 among {counts.sum()} draws of {CALLS} network calls each, read by a "
            f"perceptron trained on real digits: {', '.join(map(str, counts))}."
        ),
    }
