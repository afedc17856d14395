"""Digits: on real 8 × 8 images, is a diffusion a better density than a mixture of Gaussians?

The levels 0..16 become a density by full-width dequantisation, x + U with U uniform on [0, 1) for
every pixel, so that −log2 p(x)/64 is at least the bits per pixel of the levels themselves; the
diffusion's K bounds log p from below, the baselines' figures are exact. The diffusion trains on 20
copies of each training image, each with its own U; the baselines, one Gaussian with full covariance
and a Gaussian mixture, are fitted to five of these. Components of the mixture, what is added to
their covariances, and when the diffusion stops are chosen on validation images; test images are
seen once, at the end, averaged over five U each. Errors are standard errors over images, of the
difference image by image where it says paired.

The noise is predicted, variances learned; T = 200, log signal-to-noise linear; AdamW, its rate
falling to 0 along a cosine, averaged weights. The last step is learned, not tied: β_1 is 2e-4
(0.085 grey levels), where a tied step would owe the entropy of noise that the data do not have.

Draws, as levels, are read by logistic regression trained on the real digits: how sure it is, and
whether all ten classes appear. A few held-out images are restored, under noise as large as they
vary, and with only their upper half known; SMC, 4 runs. Intervals of the right posterior hold 90 %;
with pixels known exactly so few particles make them too narrow: `probdiff run inpaint` takes more
of them, `probdiff run denoise` more images, and both tell an error of the sampler from the model's.

Source of the data: Alpaydin and Kaynak (1998), with scikit-learn.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from flax import nnx
from jaxtyping import Array
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression

import probdiff
from probdiff import Diffusion, datasets, diagnostics, networks, plots, readouts, sample, schedules
from probdiff.experiments import conditioning
from probdiff.experiments.judging import baselines, classifier_rows, flat
from probdiff.experiments.report import Experiment, Found, Row, Run, mean_and_se
from probdiff.experiments.training import rngs_of, sheets, train

T, _BETA_1, _ALPHA_BAR_T = 200, 2e-4, 1e-3
_PIXELS, HELD_OUT_COPIES, _BASELINE_COPIES = 64, 5, 5
NATS = "nats per image"
BITS = "bits per pixel, 17 levels"


class Size(NamedTuple):
    """How much of everything a run does."""

    num_steps: int = 4_000
    evaluate_every: int = 250
    patience: int = 4
    train_images: int = 1297
    test_images: int = 300
    copies: int = 20
    components: tuple[int, ...] = (5, 8, 11, 14)
    regularisations: tuple[float, ...] = (0.03, 0.1, 0.3)
    draws: int = 500
    restored: int = 20
    particles: int = 64
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    ema_decay: float = 0.998


SMALL = Size(
    num_steps=10, evaluate_every=10, train_images=300, test_images=50, copies=1,
    components=(2,), regularisations=(0.3,), draws=50, restored=2, particles=8,
)  # fmt: skip


def _conduct(run: Run) -> Found:
    size, data = run.size, datasets.digits()
    keys = run.keys("train", "validation", "test", "init", "fit", "bound", "draw")
    images = data.train[: size.train_images]
    train_x = copies(keys["train"], images, size.copies)
    validation = copies(keys["validation"], data.validation, HELD_OUT_COPIES)
    test = copies(keys["test"], data.test[: size.test_images], HELD_OUT_COPIES)

    run.say("fit the baselines")
    few = train_x[:: max(1, size.copies // _BASELINE_COPIES)]  # copies of an image are neighbours
    mixtures = baselines(
        few, validation, size.components, size.regularisations, (1e-3, *size.regularisations),
        max_iter=50, random_state=run.seed,
    )  # fmt: skip
    run.say("train the diffusion")
    diffusion = _define(images, rngs_of(keys["init"]))
    rate = optax.cosine_decay_schedule(size.learning_rate, size.num_steps)
    fitted = train(
        keys["fit"], diffusion, train_x, optax.adamw(rate, weight_decay=size.weight_decay),
        num_steps=size.num_steps, batch_size=size.batch_size, ema_decay=size.ema_decay,
        held_out=validation, evaluate_every=size.evaluate_every, patience=size.patience,
        progress=run.progress,
    )  # fmt: skip
    run.say("bound, draw and judge")
    tree = per_image(diagnostics.bound(keys["bound"], diffusion, fitted.params, test))
    draws = sample.ancestral(keys["draw"], diffusion, fitted.params, size.draws)
    levels = np.clip(np.floor(draws), 0, 16)

    scores = {"diffusion, bound K": tree["bound"]["bound"].values} | {
        name: mixture.score_samples(flat(test)).reshape(-1, HELD_OUT_COPIES).mean(1)
        for name, mixture in mixtures.items()
    }
    mixture, gaussian = mixtures.values()
    labels = np.asarray(data.train_labels[: size.train_images])
    classifier = LogisticRegression(C=0.01, max_iter=2000).fit(flat(images), labels)
    judged, counts = classifier_rows(
        classifier, flat(data.test), data.test_labels, flat(levels), "real test digits"
    )
    run.say("denoise and inpaint")
    key_restore = jax.random.fold_in(keys["draw"], 1)
    restored, figures = _restore(key_restore, diffusion, fitted, images, test, size)
    steps, losses = fitted.held_out_losses
    seen = (steps, losses / len(validation))
    curves = plots.losses(fitted.losses, batch_size=size.batch_size, held_out=seen)
    figures |= {
        "samples": sheets(data.test, levels, (0.0, 16.0), columns=7),
        "bound_per_step": plots.bound_per_step(tree).figure,
        "losses": curves.figure,
    }
    chosen = {
        "Chosen": (
            f"Stopped after {fitted.num_steps} steps; the best on validation images were those of "
            f"step {steps[np.argmin(losses)]}. Added to the variances: mixture {mixture.reg_covar},"
            f" Gaussian {gaussian.reg_covar}."
        ),
        "Draws": f"Classes 0 to 9 among {counts.sum()} draws: {', '.join(map(str, counts))}.",
    }
    rows = [*_density_rows(scores), *judged, *restored]
    return Found(rows, figures, {"bounds": tree}, chosen, (diffusion, fitted.params))


EXPERIMENT = Experiment("Digits", __doc__, _conduct, {"cpu": Size(), "quick": SMALL})


def copies(key: Array, images: Array, n: int) -> Array:
    """Each image n times in a row, dequantised afresh every time."""
    return datasets.dequantise(key, jnp.repeat(images, n, axis=0))


def _define(images: Array, rngs: nnx.Rngs) -> Diffusion:
    """The diffusion; one shift and one scale for all pixels, from the training images."""
    network = networks.SharedHead(
        (8, 8), width=256, depth=2, T=T, channels=6, head_width=24, rngs=rngs
    )
    beta = schedules.log_snr_linear(T, beta_1=_BETA_1, alpha_bar_T=_ALPHA_BAR_T)
    units = {"loc": float(images.mean()) + 0.5, "scale": float(images.std())}  # dequantised
    return Diffusion(
        probdiff.GaussianKernel(), beta, network, event_shape=(8, 8),
        readout=readouts.Epsilon(), last_step=readouts.Learned(), **units,
    )  # fmt: skip


def per_image(tree: xr.DataTree) -> xr.DataTree:
    """Bounds averaged over the copies of each image, which are no independent examples."""
    group = tree["bound"].to_dataset().coarsen(example=HELD_OUT_COPIES).mean()
    group = group.assign_coords(example=np.arange(group.sizes["example"]))
    (mean, se), to_bits = mean_and_se(group["bound"].values), diagnostics.BITS_PER_NAT
    group.attrs = tree["bound"].attrs | {
        "mean": mean, "se": se, "mean_bits": mean * to_bits, "se_bits": se * to_bits,
        "copies": HELD_OUT_COPIES,
    }  # fmt: skip
    return xr.DataTree.from_dict({"bound": group})


def _density_rows(scores: dict[str, np.ndarray]) -> list[Row]:
    units = {NATS: 1.0, BITS: -1 / (_PIXELS * math.log(2))}
    diffusion, mixture, _ = scores.values()
    return [
        *(Row(f"{name}, test", *mean_and_se(score * factor), unit)
          for unit, factor in units.items() for name, score in scores.items()),
        *(Row("diffusion − mixture, paired", *mean_and_se((diffusion - mixture) * factor), unit)
          for unit, factor in units.items()),
    ]  # fmt: skip


def _restore(
    key: Array, diffusion: Diffusion, fitted: probdiff.Fit, images: Array, test: Array, size: Size
) -> tuple[list[Row], dict[str, Figure]]:
    """Denoise and inpaint a few test images: lines of the table, and sheets."""
    gaussian = conditioning.gaussian_of(images)
    prior = conditioning.prior_of(diffusion, fitted.params, gaussian)
    tasks = {
        "denoised": conditioning.denoising(prior, float(diffusion.scale)),
        "inpainted": conditioning.inpainting(prior),
    }
    x = test[::HELD_OUT_COPIES][: size.restored]
    rows, sheets = [], {}
    for i, (name, task) in enumerate(tasks.items()):
        smc = conditioning.sampler(task, num_particles=size.particles, num_runs=4)
        found = conditioning.posterior(jax.random.fold_in(key, i), smc, task, x)
        rows += conditioning.short_rows(name, task, found, gaussian)
        sheets[name] = conditioning.sheet(found)
    return rows, sheets
