"""What a network should predict, and by which loss it should learn: one table.

The same network, data, steps and noise; only the readout and the loss change:

    readouts   the noise ε, the data x_0, the velocity, the perturbed forward kernel of 2015, and
               a mixture of Gaussians for each pixel
    losses     the bound; L_simple, which weighs all steps alike; L_simple with a thousandth of
               the bound for the variances

on the 8 × 8 digits of 17 grey levels. Two figures judge each: bits per pixel, which the bound
trains, and the energy distance between draws and held-out digits,

    2 E|x − y| − E|x − x'| − E|y − y'|,

0 where the two laws are the same and positive elsewhere, in grey levels, without any classifier.
Its floor is the distance between training and held-out digits.

Sources: Ho et al. (2020), table 2, does this for CIFAR-10; Székely & Rizzo (2013) for the distance.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array
from matplotlib.figure import Figure
from numpyro.infer import SVI

from probdiff import (
    CombinedLoss,
    Diffusion,
    GaussianKernel,
    SampledTimeELBO,
    SimpleLoss,
    datasets,
    diagnostics,
    fit,
    networks,
    plots,
    readouts,
    sample,
    schedules,
)
from probdiff.experiments.report import Row, mean_and_se, write_report
from probdiff.experiments.two_sample import energy_distance

SUMMARY = "noise, data or velocity, L_simple or the bound: bits per pixel and distance of draws"
DURATION = "about 12 minutes on two CPU cores"

T, ALPHA_BAR_T, LEVELS, FIRST_NOISE = 200, 1e-3, 17, 1.2
BATCH_SIZE, LEARNING_RATE, EMA_DECAY = 128, 2e-3, 0.995
PIXELS = 64
BITS, LEVEL = "bits per pixel, 17 levels", "grey levels"


class Size(NamedTuple):
    """How much of everything a run does."""

    num_steps: int = 2_000
    draws: int = 1_000
    test_images: int = 300
    num_draws: int = 4


SMALL = Size(4, 20, 20, 1)

READOUTS = {
    "x_0": readouts.Data(),
    "ε": readouts.Epsilon(),
    "v": readouts.Velocity(),
    "2015": readouts.Perturbation(),
    "mixture": readouts.Mixture(4, -1.0, 2.0),
}
LOSSES = {"bound": SampledTimeELBO, "L_simple": SimpleLoss, "combined": CombinedLoss}
CELLS = [(readout, "bound") for readout in READOUTS] + [
    (readout, loss) for loss in ("L_simple", "combined") for readout in ("x_0", "ε", "v")
]
"""What is compared: L_simple says nothing of the rest's variances, or is theirs by another name."""


def run(
    out_dir: str | Path,
    *,
    seed: int = 0,
    quick: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Train each, bound and draw; write report, table and figure into `out_dir`.

    Args:
        out_dir: Folder of the run, made if absent.
        seed: Seeds everything but the split of the data, which is fixed.
        quick: A few steps only, to see that all runs; the numbers mean nothing.
        progress: Show bars.
        say: Told what is being done.

    Returns:
        The rows of the table.
    """
    size = SMALL if quick else Size()
    data = datasets.digits()
    train, validation, test = (np.asarray(x) for x in (data.train, data.validation, data.test))
    test = test[: size.test_images]
    draws, rows = {}, []
    for readout, loss in CELLS:
        name = f"{readout}, {loss}"
        say(f"train: {name}")
        # the same key for all: the same weights, noise and batches as far as they can be
        bits, x = one(
            jax.random.key(seed), readout, loss, train, validation, test, size, progress=progress
        )
        draws[name] = x
        rows += [
            Row(f"{name}: −K, test", *bits, BITS),
            Row(f"{name}: energy distance of draws", *energy_distance(x, test), LEVEL),
        ]
    floor = energy_distance(train[: size.draws], test)
    rows.append(Row("training digits: energy distance", *floor, LEVEL))
    figure = _sheets(test, draws)
    write_report(
        out_dir,
        "Readouts and losses",
        rows,
        sections=_sections(size),
        figures={"draws": figure},
        quick=quick,
    )
    return rows


def one(
    key: Array,
    readout: str,
    loss: str,
    train: np.ndarray,
    validation: np.ndarray,
    test: np.ndarray,
    size: Size,
    *,
    progress: bool,
) -> tuple[tuple[float, float], np.ndarray]:
    """Bits per pixel with their error, and draws, of one readout trained by one loss."""
    key_init, key_fit, key_bound, key_draw = jax.random.split(key, 4)
    diffusion = define(READOUTS[readout], train, nnx.Rngs(jax.random.bits(key_init).item()))
    rate = optax.warmup_cosine_decay_schedule(0, LEARNING_RATE, 100, max(101, size.num_steps))
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(rate), LOSSES[loss]())
    fitted = fit(
        key_fit, svi, train, num_steps=size.num_steps, batch_size=BATCH_SIZE,
        ema_decay=EMA_DECAY, held_out=validation, evaluate_every=max(1, size.num_steps // 20),
        patience=20, progress=progress,
    )  # fmt: skip
    tree = diagnostics.bound(key_bound, diffusion, fitted.params, test, num_draws=size.num_draws)
    bits = -tree["bound"]["bound"].values / (PIXELS * math.log(2))
    return mean_and_se(bits), sample.ancestral(key_draw, diffusion, fitted.params, size.draws)


def define(readout: readouts.GaussianReadout, images: np.ndarray, rngs: nnx.Rngs) -> Diffusion:
    """A diffusion of digits on their 17 levels, the first noise a little more than a level."""
    scale = float(images.std())
    network = networks.SharedHead(
        (8, 8), width=256, depth=2, T=T, channels=6, head_width=24,
        outputs=readout.num_outputs(GaussianKernel()), rngs=rngs,
    )  # fmt: skip
    return Diffusion(
        GaussianKernel(),
        schedules.log_snr_linear(T, beta_1=(FIRST_NOISE / scale) ** 2, alpha_bar_T=ALPHA_BAR_T),
        network,
        event_shape=(8, 8),
        readout=readout,
        last_step=readouts.Discretised(0, LEVELS - 1, LEVELS),
        loc=float(images.mean()),
        scale=scale,
    )


def _sections(size: Size) -> dict[str, str]:
    return {
        "Reading": (
            "Bits per pixel are −K over 64 pixels, an upper bound on the code length of a pixel of "
            "17 levels; lower is better. The energy distance is between draws over all steps and "
            "held-out digits, 0 where their laws are the same; below it stands that of training "
            "digits. Errors are standard errors over images, and jackknifed for the distance. "
            "L_simple leaves a learned variance where it began, at β_t: in its rows the bound pays "
            "for that too; the combined loss trains it by the bound."
        ),
        "Settings": (
            f"T = {T}, log signal-to-noise linear, first noise {FIRST_NOISE} levels, ᾱ_T = "
            f"{ALPHA_BAR_T}; variances learned; the last step put on {LEVELS} levels. One network "
            f"for all: a shared head, width 256, depth 2. Adam, {size.num_steps} steps of "
            f"{BATCH_SIZE} images, learning rate {LEARNING_RATE} falling to 0 along a cosine, "
            f"averaged weights (decay {EMA_DECAY}), those of the evaluation that was best on 200 "
            f"validation digits by the loss itself; {size.draws} draws."
        ),
    }


def _sheets(test: np.ndarray, draws: dict[str, np.ndarray]) -> Figure:
    """A few held-out digits, and as many draws of each."""
    panels = {"held-out digits": test} | draws
    figure, axes = plt.subplots(3, 4, figsize=(10, 7.6), layout="constrained")
    for ax, (name, x) in zip(axes.flat, panels.items(), strict=False):
        plots.images(x[:25], columns=5, vmax=LEVELS - 1.0, title=name, ax=ax)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    return figure
