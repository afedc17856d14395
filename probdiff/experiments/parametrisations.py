"""What a network should predict, and by which loss it should learn: one table.

The same network, data, steps and noise; only the readout and the loss change:

    readouts   the noise ε, the data x_0, the velocity, the perturbed forward kernel of 2015, and
               a mixture of Gaussians for each pixel
    losses     the bound; L_simple, which weighs all steps alike; L_simple with a thousandth of
               the bound for the variances

on the 8 × 8 digits of 17 grey levels, put on these levels by the last step. Two figures judge each:
bits per pixel, −K over 64 pixels, which the bound trains (lower is better), and the energy distance
between draws over all steps and held-out digits,

    2 E|x − y| − E|x − x'| − E|y − y'|,

0 where the two laws are the same and positive elsewhere, in grey levels, without any classifier.
Its floor is the distance between training and held-out digits. Errors are standard errors over
images, and jackknifed for the distance. L_simple leaves a learned variance where it began, at β_t:
in its rows the bound pays for that too.

T = 200, log signal-to-noise linear from noise of 1.2 levels; one network for all, a shared head of
width 256, depth 2. Adam, its rate falling to 0 along a cosine, averaged weights, those of the
evaluation that was best on 200 validation digits by the loss itself.

Sources: Ho et al. (2020), table 2, does this for CIFAR-10; Székely & Rizzo (2013) for the distance.
"""

import math
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure

import probdiff
from probdiff import Diffusion, datasets, diagnostics, networks, plots, readouts, sample, schedules
from probdiff.experiments.judging import energy_distance
from probdiff.experiments.report import Experiment, Found, Row, Run, mean_and_se
from probdiff.experiments.training import rngs_of, train

T, _ALPHA_BAR_T, LEVELS, _FIRST_NOISE = 200, 1e-3, 17, 1.2
_BITS, _LEVEL = "bits per pixel, 17 levels", "grey levels"


class Size(NamedTuple):
    """How much of everything a run does."""

    num_steps: int = 2_000
    draws: int = 1_000
    test_images: int = 300
    num_draws: int = 4
    batch_size: int = 128
    learning_rate: float = 2e-3
    ema_decay: float = 0.995


SIZES = {"cpu": Size(), "quick": Size(4, 20, 20, 1)}
READOUTS = {
    "x_0": readouts.Data(),
    "ε": readouts.Epsilon(),
    "v": readouts.Velocity(),
    "2015": readouts.Perturbation(),
    "mixture": readouts.Mixture(4, -1.0, 2.0),
}
_LOSSES = {
    "bound": probdiff.SampledTimeELBO,
    "L_simple": probdiff.SimpleLoss,
    "combined": probdiff.CombinedLoss,
}
CELLS = [(readout, "bound") for readout in READOUTS] + [
    (readout, loss) for loss in ("L_simple", "combined") for readout in ("x_0", "ε", "v")
]
"""What is compared: L_simple says nothing of the rest's variances, or is theirs by another name."""


def _conduct(run: Run) -> Found:
    size, data = run.size, datasets.digits()
    images, validation, test = (np.asarray(x) for x in (data.train, data.validation, data.test))
    test = test[: size.test_images]
    # the same keys for all: the same weights, noise and batches as far as they can be
    keys = run.keys("init", "fit", "bound", "draw")
    rate = optax.warmup_cosine_decay_schedule(0, size.learning_rate, 100, max(101, size.num_steps))
    draws, rows = {}, []
    for readout, loss in CELLS:
        name = f"{readout}, {loss}"
        run.say(f"train: {name}")
        diffusion = _define(READOUTS[readout], images, rngs_of(keys["init"]))
        fitted = train(
            keys["fit"], diffusion, images, optax.adam(rate), objective=_LOSSES[loss](),
            num_steps=size.num_steps, batch_size=size.batch_size, ema_decay=size.ema_decay,
            held_out=validation, evaluate_every=max(1, size.num_steps // 20), patience=20,
            progress=run.progress,
        )  # fmt: skip
        tree = diagnostics.bound(
            keys["bound"], diffusion, fitted.params, test, num_draws=size.num_draws
        )
        bits = -tree["bound"]["bound"].values / (64 * math.log(2))
        draws[name] = sample.ancestral(keys["draw"], diffusion, fitted.params, size.draws)
        rows += [
            Row(f"{name}: −K, test", *mean_and_se(bits), _BITS),
            Row(f"{name}: energy distance of draws", *energy_distance(draws[name], test), _LEVEL),
        ]
    floor = energy_distance(images[: size.draws], test)
    rows.append(Row("training digits: energy distance", *floor, _LEVEL))
    return Found(rows, {"draws": _sheets(test, draws)})


EXPERIMENT = Experiment("Readouts and losses", __doc__, _conduct, SIZES)


def _define(readout: readouts.GaussianReadout, images: np.ndarray, rngs: nnx.Rngs) -> Diffusion:
    """A diffusion of digits on their 17 levels, the first noise a little more than a level."""
    scale = float(images.std())
    network = networks.SharedHead(
        (8, 8), width=256, depth=2, T=T, channels=6, head_width=24,
        outputs=readout.num_outputs(probdiff.GaussianKernel()), rngs=rngs,
    )  # fmt: skip
    beta = schedules.log_snr_linear(T, beta_1=(_FIRST_NOISE / scale) ** 2, alpha_bar_T=_ALPHA_BAR_T)
    return Diffusion(
        probdiff.GaussianKernel(), beta, network, event_shape=(8, 8), readout=readout,
        last_step=readouts.Discretised(0, LEVELS - 1, LEVELS), loc=float(images.mean()),
        scale=scale,
    )  # fmt: skip


def _sheets(test: np.ndarray, draws: dict[str, np.ndarray]) -> Figure:
    """A few held-out digits, and as many draws of each."""
    panels = {"held-out digits": test} | draws
    figure, axes = plt.subplots(3, 4, figsize=(10, 7.6), layout="constrained")
    for ax, (name, x) in zip(axes.flat, panels.items(), strict=False):
        plots.images(x[:25], columns=5, vmax=LEVELS - 1.0, title=name, ax=ax)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    return figure
