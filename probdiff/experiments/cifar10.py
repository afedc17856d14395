"""CIFAR-10: bits per colour channel of a pixel, and draws.

As `mnist`, with colours: noise of one level at first, mixtures of Gaussians for each number, the
last step put on 256 levels, one shift and one scale for all numbers from the training images.

    bits per dimension = −K / (3072 ln 2)

The 2015 paper prints K = 5.4 ± 0.2 bits per pixel of three channels, a density of data divided by
their overall sd s (in 0..255) and dequantised. A density's K becomes bits per dimension by
log2 s − K/3 = 4.20; the row "as the paper's K" is this one turned round, 3 (log2 s − bits).

Training images are seen with their mirror images. On a CPU the recipe is a small network for an
hour's worth of patience; on a GPU it is the one to quote.

Published: 2015's diffusion 4.20, DDPM 3.70, variational diffusion 2.65 bits per dimension.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from probdiff import Diffusion, datasets, sample
from probdiff.experiments.mnist import ALPHA_BAR_T, COMPONENTS, LEVELS, SHADES, T, define
from probdiff.experiments.report import Row, mean_and_se, write_report
from probdiff.experiments.training import CALLS, Recipe, bits_rows, curve, learn, sheets

SUMMARY = "colour photographs of 32 × 32 pixels: bits per dimension, and draws"
DURATION = "about an hour on two CPU cores; 25 minutes with --recipe gpu on a GPU"

NUMBERS = 3072
BITS = "bits per dimension, 256 levels"
PUBLISHED, PUBLISHED_K = 3.70, 5.4

RECIPES = {
    "cpu": Recipe(
        widths=(32, 64, 64), depth=1, patch=2, num_steps=8_000, batch_size=32, learning_rate=2e-3
    ),
    "gpu": Recipe(
        widths=(128, 256, 256), depth=3, num_steps=30_000, batch_size=256, learning_rate=5e-4,
        head_width=48, attention_heads=4, dtype="bfloat16", ema_decay=0.9995,
    ),
    "quick": Recipe(
        widths=(8, 8), depth=1, patch=2, num_steps=10, batch_size=4, learning_rate=2e-3,
        evaluations=2,
    ),
}  # fmt: skip


class Size(NamedTuple):
    """How much is measured once it has learned."""

    train_images: int = 49_000
    held_out: int = 1_000
    """Of the training images, to watch while it learns."""
    test_images: int = 10_000
    test_times: int = 10
    draws: int = 64


SIZES = {
    "cpu": Size(test_images=2_000),
    "gpu": Size(),
    "quick": Size(100, 10, 10, 2, 4),
}


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
    name = "quick" if quick else recipe
    size, chosen = SIZES[name], RECIPES[name]
    out_dir = Path(out_dir)
    data = datasets.cifar10()
    images = datasets.with_mirrored(data.train[: size.train_images]).astype(np.float32)
    diffusion, fitted, tree, key_draw = learn(
        seed, functools.partial(define, images, chosen), images,
        data.train[-size.held_out :].astype(np.float32),
        data.test[: size.test_images].astype(np.float32), chosen, out_dir,
        num_times=size.test_times, shades=SHADES, progress=progress, say=say,
    )  # fmt: skip
    say("draw")
    draws = sample.ancestral(key_draw, diffusion, fitted.params, size.draws, steps=CALLS)
    bits = -tree["bound"]["bound"].values / (NUMBERS * math.log(2))
    as_paper = 3 * (math.log2(float(diffusion.scale)) - bits)
    rows = [
        *bits_rows(tree, NUMBERS, BITS, PUBLISHED),
        Row("as the paper's K", *mean_and_se(as_paper), "bits per pixel", None, PUBLISHED_K),
    ]
    figures = {
        "samples": sheets(data.test, draws, SHADES, calls=CALLS),
        "curve": curve(out_dir, NUMBERS, size.held_out, PUBLISHED),
    }
    write_report(
        out_dir,
        "CIFAR-10",
        rows,
        sections=_sections(size, chosen, diffusion),
        figures=figures,
        trees={"bounds": tree},
        quick=quick,
    )
    return rows


def _sections(size: Size, recipe: Recipe, diffusion: Diffusion) -> dict[str, str]:
    count = sum(leaf.size for leaf in jax.tree.leaves(diffusion.params_template))
    return {
        "Reading": (
            "Bits per dimension are −K over 3072 numbers, an upper bound on the code length of one "
            "of 256 levels; lower is better. K of every test image is estimated without bias at "
            f"{size.test_times} random steps; errors are standard errors over images. Published is "
            "DDPM's; a variational diffusion has 2.65, the diffusion of 2015 4.20, of which its "
            "printed 5.4 bits per pixel are another form: a log density, higher is better."
        ),
        "Settings": (
            f"T = {T}, log signal-to-noise linear, first noise one level, ᾱ_T = {ALPHA_BAR_T}; "
            f"readout: a mixture of {COMPONENTS} Gaussians per number; the last step put on "
            f"{LEVELS} levels. {size.train_images} training images and their mirror images, "
            f"{size.test_images} test images. {count:,} parameters. {recipe.describe()}"
        ),
    }
