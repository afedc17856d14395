"""Binarised MNIST: what is the likelihood of a diffusion that hides bits one after another?

The fixed binarisation, for which likelihoods are published. A bit is a class of two; the forward
trajectory absorbs pixels into a third state, about 1/T of them per step, and the reverse trajectory
fills them in, by what a U-Net says of x_0 given the pixels it sees; the last step is learned. T =
500; a training step sees one t per image, so T costs nothing in training. −K in nats is an upper
bound on the negative log-likelihood of an image; lower is better. K of every test image is
estimated without bias at 10 random steps; errors are standard errors over images. An absorbing
diffusion ends where no data are, so there is no K − L_null.

A run that was stopped goes on from its checkpoint, and K on validation images, ten times on the
way, against the time spent is the curve in `curve.png`.

Sources: Salakhutdinov & Murray (2008) and Larochelle & Murray (2011) for the bits; Austin et al.
(2021) for absorbing diffusions. Published nats on this split: PixelRNN 79.2, IAF 79.9 and
PixelCNN 81.3.
"""

import json
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import optax
from jaxtyping import Array
from matplotlib.figure import Figure

import probdiff
from probdiff import Diffusion, datasets, diagnostics, files, networks, plots, sample, schedules
from probdiff.experiments.report import Experiment, Found, Row, Run
from probdiff.experiments.training import rngs_of, sheets, train
from probdiff.train import Progress

_UNIT = "nats per image"
_PUBLISHED = 79.2


class Size(NamedTuple):
    """How much of everything a run does."""

    T: int = 500
    widths: tuple[int, ...] = (32, 64)
    num_steps: int = 4_000
    train_images: int = 50_000
    validation_images: int = 1_000
    test_images: int = 10_000
    draws: int = 64
    batch_size: int = 64
    learning_rate: float = 2e-3


SMALL = Size(
    T=8, widths=(8, 8), num_steps=20, train_images=200, validation_images=20, test_images=40,
    draws=4,
)  # fmt: skip


def _conduct(run: Run) -> Found:
    size, data = run.size, datasets.binarised_mnist()
    keys = run.keys("init", "fit", "check", "bound", "draw")
    network = networks.UNet(
        (28, 28), size.widths, depth=1, T=size.T, patch=2, outputs=2, states=3,
        rngs=rngs_of(keys["init"]),
    )  # fmt: skip
    beta = schedules.harmonic(size.T)
    diffusion = Diffusion(probdiff.AbsorbingKernel(2), beta, network, event_shape=(28, 28))
    run.say("train the diffusion")
    rate = optax.warmup_cosine_decay_schedule(
        0, size.learning_rate, size.num_steps // 60, size.num_steps
    )
    validation = data.validation[: size.validation_images]
    watch = _Watch(keys["check"], diffusion, validation, run.out_dir)
    fitted = train(
        keys["fit"], diffusion, data.train[: size.train_images], optax.adam(rate),
        num_steps=size.num_steps, batch_size=size.batch_size, ema_decay=0.999,
        evaluate_every=size.num_steps // 10, checkpoint=run.out_dir / "training.safetensors",
        log=watch.log, callback=watch, progress=run.progress,
    )  # fmt: skip
    run.say("bound the test images")
    tree = diagnostics.sampled_bound(
        keys["bound"], diffusion, fitted.params, data.test[: size.test_images], num_times=10,
        progress=run.progress,
    )  # fmt: skip
    run.say("draw")
    draws = sample.ancestral(
        keys["draw"], diffusion, fitted.params, size.draws, progress=run.progress
    )
    bound, curve = tree["bound"].attrs, watch.curve()
    last = curve[-1]
    rows = [
        Row("−K, absorbing diffusion, test", -bound["mean"], bound["se"], _UNIT, None, _PUBLISHED),
        Row("−K, absorbing diffusion, validation", -last["mean"], last["se"], _UNIT),
        Row("bits per pixel, test", -bound["mean_bits"] / 784, bound["se_bits"] / 784, "bits"),
        Row("share of ones in training images", float(data.train.mean()), None, ""),
        Row("share of ones in draws", float(draws.mean()), None, ""),
    ]
    spread = data.test[:: max(1, len(data.test) // 64)]  # published class by class
    figures = {
        "samples": sheets(spread, draws),
        "curve": _figure(curve),
        "losses": plots.losses(fitted.losses, batch_size=size.batch_size).figure,
    }
    return Found(rows, figures, {"bounds": tree}, model=(diffusion, fitted.params))


EXPERIMENT = Experiment("Binarised MNIST", __doc__, _conduct, {"cpu": Size(), "quick": SMALL})


class _Watch(NamedTuple):
    """K on validation images after some training, as `curve.json`."""

    key: Array
    diffusion: Diffusion
    validation: np.ndarray
    out_dir: Path

    @property
    def log(self) -> Path:
        return self.out_dir / "metrics.jsonl"

    def curve(self) -> list[dict[str, float | int]]:
        """Step, seconds of training, mean and standard error of K, so far."""
        path = self.out_dir / "curve.json"
        return json.loads(path.read_text()) if path.is_file() else []

    def __call__(self, state: Progress) -> None:
        tree = diagnostics.sampled_bound(self.key, self.diffusion, state.params, self.validation)
        k, line = tree["bound"].attrs, json.loads(self.log.read_text().splitlines()[-1])
        point = {"step": state.step, "seconds": line["seconds"], "mean": k["mean"], "se": k["se"]}
        points = [*(p for p in self.curve() if p["step"] < state.step), point]
        files.replace(self.out_dir / "curve.json", json.dumps(points).encode())


def _figure(curve: list[dict[str, float | int]]) -> Figure:
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    minutes = [point["seconds"] / 60 for point in curve]
    k, errors = ([point[name] for point in curve] for name in ("mean", "se"))
    ax.errorbar(minutes, -np.array(k), yerr=2 * np.array(errors), marker="o", capsize=3)
    ax.axhline(_PUBLISHED, color="0.4", linestyle="--")
    ax.annotate("PixelRNN 79.2", (minutes[-1], _PUBLISHED), ha="right", va="bottom")
    ax.set(
        xlabel="minutes of training",
        ylabel="−K on validation images, nats",
        title="Bound against training time (± 2 standard errors)",
    )
    return figure
