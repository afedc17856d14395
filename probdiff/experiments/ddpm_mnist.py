"""MNIST as a tutorial on DDPM has it: noise predicted, L_simple, fixed variances.

    T = 1000, β from 1e-4 to 0.02 in equal steps, grey levels scaled to [−1, 1]
    x̂_0 by the noise ε̂, variance β_t; U-Net with a perceptron of the step
    10 epochs of batches of 128, L_simple

The draws are what such a tutorial shows; beside them stands the bound that it leaves out. A fixed
variance is dear at the last step: p(x_0 | x_1) is a Gaussian of sd √β_1 = 1.28 levels put on 256
levels, so that even a perfect network, x̂_0 = x_0, pays for every pixel

    −log2 P(level | x̂_0 = level) = 0.62 bits at both ends of the grey scale, 1.71 between them.

The floor of −K that this sets is printed beside it. `mnist` spends its bits elsewhere.

Source: Ho et al. (2020). T, rates, batches and epochs are those of the tutorials.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from probdiff import (
    Diffusion,
    GaussianKernel,
    SimpleLoss,
    datasets,
    diagnostics,
    plots,
    readouts,
    sample,
    schedules,
)
from probdiff.experiments.mnist import (
    BITS,
    LEVELS,
    PIXELS,
    PUBLISHED,
    SHADES,
    SMALL,
    Size,
    judge,
    read,
    train_classifier,
)
from probdiff.experiments.report import Row, mean_and_se, write_report
from probdiff.experiments.training import Recipe, bits_rows, learn, sheets

SUMMARY = "MNIST as DDPM tutorials have it, and the bound they leave out"
DURATION = "about 50 minutes on two CPU cores"

T, BETA_1, BETA_T, EPOCHS = 1000, 1e-4, 0.02, 10

RECIPES = {
    "cpu": Recipe(
        widths=(32, 64), depth=1, patch=2, num_steps=EPOCHS * 59_000 // 128, batch_size=128,
        learning_rate=2e-3,
    ),
    "gpu": Recipe(
        widths=(64, 128, 128), depth=2, num_steps=EPOCHS * 59_000 // 128, batch_size=128,
        learning_rate=1e-3,
    ),
    "quick": Recipe(
        widths=(8, 8), depth=1, patch=2, num_steps=20, batch_size=8, learning_rate=2e-3,
        evaluations=2,
    ),
}  # fmt: skip


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
    size = SMALL if quick else Size(draws=500)
    chosen = RECIPES["quick" if quick else recipe]
    out_dir = Path(out_dir)
    data = datasets.mnist()
    images = data.train[: size.train_images].astype(np.float32)
    test = data.test[: size.test_images].astype(np.float32)
    diffusion, fitted, tree, key_draw = learn(
        seed, functools.partial(define, chosen), images,
        data.train[-size.held_out :].astype(np.float32), test, chosen, out_dir,
        num_times=size.test_times, shades=SHADES, objective=SimpleLoss(), progress=progress,
        say=say,
    )  # fmt: skip
    say("draw, and ask a classifier of real digits")
    draws = sample.ancestral(
        key_draw, diffusion, fitted.params, size.draws, block_size=100, progress=progress
    )
    labels = data.train_labels[: size.train_images]
    classifier = train_classifier(images, labels, size.epochs, seed)
    counts = read(classifier, draws)
    rows = [
        *bits_rows(tree, PIXELS, BITS, PUBLISHED),
        Row("floor of −log p(x_0 | x_1), variance β_1", *mean_and_se(floor(diffusion, test)), BITS),
        *judge(classifier, test, data.test_labels[: size.test_images], draws, counts),
    ]
    figures = {
        "samples": sheets(data.test, draws, SHADES, calls=T),
        "losses": plots.losses(fitted.losses, batch_size=chosen.batch_size).figure,
    }
    figures["losses"].axes[0].set(ylabel="L_simple (per example)")
    write_report(
        out_dir,
        "MNIST by L_simple",
        rows,
        sections=_sections(size, chosen, counts),
        figures=figures,
        trees={"bounds": tree},
        quick=quick,
    )
    return rows


def define(recipe: Recipe, rngs: nnx.Rngs) -> Diffusion:
    """The diffusion of grey levels scaled to [−1, 1]."""
    return Diffusion(
        GaussianKernel(),
        schedules.linear(T, beta_1=BETA_1, beta_T=BETA_T),
        recipe.network((28, 28), rngs, outputs=1, T=T),
        event_shape=(28, 28),
        readout=readouts.Epsilon(readouts.ForwardVariance()),
        last_step=readouts.Discretised(0, LEVELS - 1, LEVELS),
        loc=(LEVELS - 1) / 2,
        scale=(LEVELS - 1) / 2,
    )


def floor(diffusion: Diffusion, images: np.ndarray) -> np.ndarray:
    """Bits per pixel of the last step where x̂_0 is right, image by image."""
    sd = np.sqrt(BETA_1) * diffusion.scale
    grid = diffusion.last_step.grid
    levels = jnp.arange(LEVELS, dtype=jnp.float32)
    bits = -np.asarray(grid.log_mass(levels, levels, jnp.float32(sd))) * diagnostics.BITS_PER_NAT
    return bits[images.astype(int)].reshape(len(images), -1).mean(1)


def _sections(size: Size, recipe: Recipe, counts: np.ndarray) -> dict[str, str]:
    return {
        "Reading": (
            "Bits per pixel are −K over 784 pixels; lower is better. The floor is what the last "
            "step costs a perfect network, for its variance is fixed. Published is a variational "
            "diffusion's, whose variances and rates are chosen for the bound."
        ),
        "Settings": (
            f"T = {T}, β from {BETA_1} to {BETA_T}; noise predicted, variance β_t; L_simple; "
            f"{recipe.num_steps * recipe.batch_size / size.train_images:.3g} epochs. "
            f"{recipe.describe()}"
        ),
        "Draws": (
            f"Classes 0 to 9 among {counts.sum()} draws over all {T} steps, read by a perceptron "
            f"trained on real digits: {', '.join(map(str, counts))}."
        ),
    }
