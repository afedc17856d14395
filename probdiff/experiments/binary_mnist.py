"""Binarised MNIST: what is the likelihood of a diffusion that hides bits one after another?

The fixed binarisation, for which likelihoods are published. A bit is a class of two; the forward
trajectory absorbs pixels into a third state, about 1/T of them per step, and the reverse trajectory
fills them in, by what a U-Net says of x_0 given the pixels it sees. T = 500; a training step sees
one t per image, so T costs nothing in training. K of every test image is estimated at `TEST_TIMES`
random steps.

Training is cut into ten pieces with a checkpoint between them: a run that was stopped goes on where
it was, and K on validation images against the time spent is the curve in `curve.png`.

Sources: Salakhutdinov & Murray (2008) and Larochelle & Murray (2011) for the bits; Austin et al.
(2021) for absorbing diffusions. Published nats on this split: PixelRNN 79.2, IAF 79.9 and
PixelCNN 81.3.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, PRNGKeyArray
from matplotlib.figure import Figure
from numpyro.infer import SVI

from probdiff import (
    AbsorbingKernel,
    Diffusion,
    Fit,
    SampledTimeELBO,
    datasets,
    diagnostics,
    fit,
    networks,
    plots,
    sample,
    save,
    schedules,
)
from probdiff.experiments.report import Row, write_report

SUMMARY = "binary images: nats per test image of an absorbing diffusion, fixed binarisation"
DURATION = "about 25 minutes on one CPU core"

UNIT = "nats per image"
PUBLISHED = 79.2
BATCH_SIZE, LEARNING_RATE, EMA_DECAY = 64, 2e-3, 0.999
PIECES, TEST_TIMES = 10, 10


class Size(NamedTuple):
    """How much of everything a run does."""

    T: int = 500
    widths: tuple[int, ...] = (32, 64)
    num_steps: int = 4_000
    train_images: int = 50_000
    validation_images: int = 1_000
    test_images: int = 10_000
    draws: int = 64


SMALL = Size(
    T=8,
    widths=(8, 8),
    num_steps=20,
    train_images=200,
    validation_images=20,
    test_images=40,
    draws=4,
)


class Point(NamedTuple):
    """K on validation images after some training."""

    step: int
    seconds: float
    mean: float
    se: float


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
        out_dir: Folder of the run, made if absent; a checkpoint in it is gone on from.
        seed: Seeds everything; the data and their split are fixed.
        quick: A few steps only, to see that all runs; the numbers mean nothing.
        progress: Show bars.
        say: Told what is being done.

    Returns:
        The rows of the table.
    """
    size = SMALL if quick else Size()
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    key_init, key_fit, key_check, key_bound, key_draw = jax.random.split(jax.random.key(seed), 5)
    data = datasets.binarised_mnist()
    diffusion = define(size, nnx.Rngs(jax.random.bits(key_init).item()))
    say("train the diffusion")
    validation = data.validation[: size.validation_images]
    fitted, curve = train_in_pieces(
        key_fit,
        key_check,
        diffusion,
        data.train[: size.train_images],
        validation,
        size,
        out_dir,
        progress=progress,
    )
    say("bound the test images")
    tree = diagnostics.sampled_bound(
        key_bound,
        diffusion,
        fitted.params,
        data.test[: size.test_images],
        num_times=TEST_TIMES,
        progress=progress,
    )
    say("draw")
    draws = sample.ancestral(key_draw, diffusion, fitted.params, size.draws, progress=progress)
    bound = tree["bound"].attrs
    rows = [
        Row("−K, absorbing diffusion, test", -bound["mean"], bound["se"], UNIT, None, PUBLISHED),
        Row("−K, absorbing diffusion, validation", -curve[-1].mean, curve[-1].se, UNIT),
        Row("bits per pixel, test", -bound["mean_bits"] / 784, bound["se_bits"] / 784, "bits"),
        Row("share of ones in training images", float(data.train.mean()), None, ""),
        Row("share of ones in draws", float(draws.mean()), None, ""),
    ]
    figures = {
        "samples": _samples(data.test, draws),
        "curve": _curve(curve),
        "losses": plots.losses(fitted.losses, batch_size=BATCH_SIZE).figure,
    }
    write_report(
        out_dir,
        "Binarised MNIST",
        rows,
        sections=_sections(size, diffusion),
        figures=figures,
        trees={"bounds": tree},
        quick=quick,
    )
    save(out_dir, diffusion, fitted.params)
    return rows


def define(size: Size, rngs: nnx.Rngs) -> Diffusion:
    """The absorbing diffusion of bits and its network."""
    network = networks.UNet(
        (28, 28), size.widths, depth=1, T=size.T, patch=2, outputs=2, states=3, rngs=rngs
    )
    return Diffusion(AbsorbingKernel(2), schedules.harmonic(size.T), network, event_shape=(28, 28))


def train_in_pieces(
    key_fit: PRNGKeyArray,
    key_check: PRNGKeyArray,
    diffusion: Diffusion,
    train: np.ndarray,
    validation: np.ndarray,
    size: Size,
    out_dir: Path,
    *,
    progress: bool,
) -> tuple[Fit, list[Point]]:
    """Fit piece by piece from one checkpoint to the next; K on validation images after each."""
    rate = optax.warmup_cosine_decay_schedule(
        0, LEARNING_RATE, size.num_steps // 60, size.num_steps
    )
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(rate), SampledTimeELBO())
    log = out_dir / "curve.json"
    curve = [Point(**point) for point in json.loads(log.read_text())] if log.is_file() else []
    fitted = None
    for piece in range(1, PIECES + 1):
        step = size.num_steps * piece // PIECES
        if any(point.step >= step for point in curve) and piece < PIECES:
            continue
        start = time.monotonic()
        fitted = fit(
            key_fit,
            svi,
            train,
            num_steps=step,
            batch_size=BATCH_SIZE,
            ema_decay=EMA_DECAY,
            checkpoint=out_dir / "training.safetensors",
            progress=progress,
        )
        seconds = time.monotonic() - start + (curve[-1].seconds if curve else 0.0)
        if not curve or curve[-1].step < step:
            curve.append(Point(step, seconds, *_check(key_check, diffusion, fitted, validation)))
            log.write_text(json.dumps([point._asdict() for point in curve]))
    return fitted, curve


def _check(
    key: Array, diffusion: Diffusion, fitted: Fit, validation: np.ndarray
) -> tuple[float, float]:
    tree = diagnostics.sampled_bound(key, diffusion, fitted.params, validation)
    return tree["bound"].attrs["mean"], tree["bound"].attrs["se"]


def _sections(size: Size, diffusion: Diffusion) -> dict[str, str]:
    count = sum(leaf.size for leaf in jax.tree.leaves(diffusion.params_template))
    return {
        "Reading": (
            "−K in nats is an upper bound on the negative log-likelihood of an image; lower is "
            "better. The published figure is PixelRNN's on the same split; IAF has 79.9, PixelCNN "
            "81.3. Every test image's K is estimated without bias at "
            f"{TEST_TIMES} random steps; errors are standard errors over images. An absorbing "
            "diffusion ends where no data are, so there is no K − L_null."
        ),
        "Settings": (
            f"T = {size.T}, harmonic rates, last step learned; a U-Net, channels {size.widths} at "
            f"1/2 and 1/4 of the resolution, {count:,} parameters. Training: Adam, "
            f"{size.num_steps} steps of {BATCH_SIZE} images, learning rate {LEARNING_RATE} falling "
            f"to 0 along a cosine, averaged weights (decay {EMA_DECAY})."
        ),
    }


def _samples(test: np.ndarray, draws: np.ndarray) -> Figure:
    figure = plt.figure(figsize=(9, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    spread = test[:: max(1, len(test) // 64)][:64]  # the published test images come class by class
    plots.images(spread.astype(float), columns=8, vmax=1.0, title="held-out images", ax=left)
    plots.images(
        draws[:64].astype(float), columns=8, vmax=1.0, title="draws of the model", ax=right
    )
    return figure


def _curve(curve: list[Point]) -> Figure:
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    minutes = [point.seconds / 60 for point in curve]
    ax.errorbar(
        minutes,
        [-point.mean for point in curve],
        yerr=[2 * point.se for point in curve],
        marker="o",
        capsize=3,
    )
    ax.axhline(PUBLISHED, color="0.4", linestyle="--")
    ax.annotate("PixelRNN 79.2", (minutes[-1], PUBLISHED), ha="right", va="bottom")
    ax.set(
        xlabel="minutes of training",
        ylabel="−K on validation images, nats",
        title="Bound against training time (± 2 standard errors)",
    )
    return figure
