"""Digits: on real 8 × 8 images, is a diffusion a better density than a mixture of Gaussians?

The levels 0..16 become a density by full-width dequantisation, x + U with U uniform on [0, 1) for
every pixel, so that −log2 p(x)/64 is at least the bits per pixel of the levels themselves. The
diffusion trains on 20 copies of each training image, each with its own U; the baselines, one
Gaussian with full covariance and a Gaussian mixture, are fitted to five of these. Components of the
mixture, what is added to their covariances, and when the diffusion stops are chosen on validation
images; test images are seen once, at the end, averaged over five U each.

The last step is learned, not tied: β_1 is 2e-4 (0.085 grey levels), where a tied step would owe the
entropy of noise that the data do not have.

For samples there is a check from outside: logistic regression trained on the real digits reads the
draws, and reports how sure it is and whether all ten classes appear.

Source of the data: Alpaydin and Kaynak (1998), with scikit-learn.
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import xarray as xr
from flax import nnx
from jaxtyping import Array
from matplotlib.figure import Figure
from numpyro.infer import SVI
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.mixture import GaussianMixture

from probdiff import (
    Diffusion,
    Fit,
    GaussianKernel,
    SampledTimeELBO,
    datasets,
    diagnostics,
    fit,
    networks,
    plots,
    readouts,
    sample,
    save,
    schedules,
)
from probdiff.experiments import conditioning
from probdiff.experiments.report import Row, mean_and_se, write_report

SUMMARY = "real 8 × 8 digits: bits per pixel beside baselines, samples, denoising and inpainting"
DURATION = "about 3 minutes on one CPU core"

T, BETA_1, ALPHA_BAR_T = 200, 2e-4, 1e-3
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, EMA_DECAY = 128, 2e-3, 0.1, 0.998
PIXELS, HELD_OUT_COPIES, BASELINE_COPIES = 64, 5, 5
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


SMALL = Size(
    num_steps=10, evaluate_every=10, train_images=300, test_images=50, copies=1,
    components=(2,), regularisations=(0.3,), draws=50,
    restored=2, particles=8,
)  # fmt: skip


class Baselines(NamedTuple):
    """What was fitted beside the diffusion."""

    gaussian: GaussianMixture
    mixture: GaussianMixture


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
        out_dir: Folder of the run, made if absent.
        seed: Seeds everything but the split of the data, which is fixed.
        quick: A few steps only, to see that all runs; the numbers mean nothing.
        progress: Show bars.
        say: Told what is being done.

    Returns:
        The rows of the table.
    """
    size = SMALL if quick else Size()
    keys = jax.random.split(jax.random.key(seed), 7)
    key_train, key_validation, key_test, key_init, key_fit, key_bound, key_draw = keys
    data = datasets.digits()
    images = data.train[: size.train_images]
    train = copies(key_train, images, size.copies)
    validation = copies(key_validation, data.validation, HELD_OUT_COPIES)
    test = copies(key_test, data.test[: size.test_images], HELD_OUT_COPIES)

    say("fit the baselines")
    few = train[:: max(1, size.copies // BASELINE_COPIES)]  # the copies of an image are neighbours
    baselines = fit_baselines(few, validation, size, seed)
    say("train the diffusion")
    diffusion = define(images, nnx.Rngs(jax.random.bits(key_init).item()))
    fitted = train_diffusion(key_fit, diffusion, train, validation, size, progress=progress)
    say("bound, draw and judge")
    tree = per_image(diagnostics.bound(key_bound, diffusion, fitted.params, test))
    draws = sample.ancestral(key_draw, diffusion, fitted.params, size.draws)

    scores = {
        "diffusion, bound K": tree["bound"]["bound"].values,
        f"Gaussian mixture, {baselines.mixture.n_components} components": (
            _score(baselines.mixture, test)
        ),
        "Gaussian, full covariance": _score(baselines.gaussian, test),
    }
    judged, counts = _judge(images, data, size, draws)
    say("denoise and inpaint")
    key_restore = jax.random.fold_in(key_draw, 1)
    restored, sheets = _restore(key_restore, diffusion, fitted, images, test, size)
    rows = [*_density_rows(scores), *judged, *restored]
    figures = {
        "samples": _samples(data.test, draws),
        "bound_per_step": plots.bound_per_step(tree).figure,
        "losses": plots.losses(
            fitted.losses, batch_size=BATCH_SIZE,
            held_out=(fitted.held_out_losses.step, fitted.held_out_losses.loss / len(validation)),
        ).figure,
    } | sheets  # fmt: skip
    write_report(
        out_dir,
        "Digits",
        rows,
        sections=_sections(size, fitted, baselines, counts),
        figures=figures,
        trees={"bounds": tree},
        quick=quick,
    )
    save(out_dir, diffusion, fitted.params)
    return rows


def copies(key: Array, images: Array, n: int) -> Array:
    """Each image n times in a row, dequantised afresh every time."""
    return datasets.dequantise(key, jnp.repeat(images, n, axis=0))


def define(images: Array, rngs: nnx.Rngs) -> Diffusion:
    """The diffusion; one shift and one scale for all pixels, from the training images."""
    return Diffusion(
        GaussianKernel(),
        schedules.log_snr_linear(T, beta_1=BETA_1, alpha_bar_T=ALPHA_BAR_T),
        networks.SharedHead((8, 8), width=256, depth=2, T=T, channels=6, head_width=24, rngs=rngs),
        event_shape=(8, 8),
        readout=readouts.Epsilon(),
        last_step=readouts.Learned(),
        loc=float(images.mean()) + 0.5,  # dequantised
        scale=float(images.std()),
    )


def train_diffusion(
    key: Array, diffusion: Diffusion, train: Array, validation: Array, size: Size, *, progress: bool
) -> Fit:
    """Fit by AdamW until the validation images stop gaining; the best averaged weights."""
    rate = optax.cosine_decay_schedule(LEARNING_RATE, size.num_steps)
    adam = optax.adamw(rate, weight_decay=WEIGHT_DECAY)
    svi = SVI(diffusion.model, diffusion.guide, adam, SampledTimeELBO())
    return fit(
        key, svi, train, num_steps=size.num_steps, batch_size=BATCH_SIZE, ema_decay=EMA_DECAY,
        held_out=validation, evaluate_every=size.evaluate_every, patience=size.patience,
        progress=progress,
    )  # fmt: skip


def fit_baselines(train: Array, validation: Array, size: Size, seed: int) -> Baselines:
    """A Gaussian, and the mixture that is best on validation images among those of `size`."""

    def fitted(components: int, regularisation: float) -> GaussianMixture:
        mixture = GaussianMixture(
            components, reg_covar=regularisation, max_iter=50, random_state=seed
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # judged by validation, not by it
            return mixture.fit(_flat(train))

    def best(candidates: list[GaussianMixture]) -> GaussianMixture:
        return max(candidates, key=lambda mixture: mixture.score(_flat(validation)))

    return Baselines(
        best([fitted(1, r) for r in (1e-3, *size.regularisations)]),
        best([fitted(n, r) for n in size.components for r in size.regularisations]),
    )


def per_image(tree: xr.DataTree) -> xr.DataTree:
    """Bounds averaged over the copies of each image, which are no independent examples."""
    group = tree["bound"].to_dataset()
    attrs = group.attrs
    group = group.coarsen(example=HELD_OUT_COPIES).mean()
    group = group.assign_coords(example=np.arange(group.sizes["example"]))
    mean, se = mean_and_se(group["bound"].values)
    to_bits = diagnostics.BITS_PER_NAT
    group.attrs = attrs | {
        "mean": mean, "se": se, "mean_bits": mean * to_bits, "se_bits": se * to_bits,
        "copies": HELD_OUT_COPIES,
    }  # fmt: skip
    return xr.DataTree.from_dict({"bound": group})


def _flat(images: Array | np.ndarray) -> np.ndarray:
    return np.asarray(images, np.float64).reshape(len(images), -1)


def _score(mixture: GaussianMixture, images: Array) -> np.ndarray:
    """Log density of each image, averaged over its copies."""
    return mixture.score_samples(_flat(images)).reshape(-1, HELD_OUT_COPIES).mean(1)


def _density_rows(scores: dict[str, np.ndarray]) -> list[Row]:
    to_bits = -1 / (PIXELS * math.log(2))
    diffusion, mixture, _ = scores.values()
    rows = [Row(f"{name}, test", *mean_and_se(v), NATS) for name, v in scores.items()]
    rows += [Row(f"{name}, test", *mean_and_se(v * to_bits), BITS) for name, v in scores.items()]
    gain = diffusion - mixture
    rows.append(Row("diffusion − mixture, paired", *mean_and_se(gain), NATS))
    rows.append(Row("diffusion − mixture, paired", *mean_and_se(gain * to_bits), BITS))
    return rows


def _judge(
    images: Array, data: datasets.Digits, size: Size, draws: np.ndarray
) -> tuple[list[Row], np.ndarray]:
    """What a classifier of real digits says about the draws; counts of its ten classes."""
    labels = np.asarray(data.train_labels[: size.train_images])
    classifier = LogisticRegression(C=0.01, max_iter=2000).fit(_flat(images), labels)
    correct = classifier.predict(_flat(data.test)) == np.asarray(data.test_labels)
    levels = np.clip(np.floor(draws), 0, 16)
    sure = classifier.predict_proba(_flat(levels)).max(1)
    sure_of_real = classifier.predict_proba(_flat(data.test)).max(1)
    counts = np.bincount(classifier.predict(_flat(levels)), minlength=10)
    share = counts / counts.sum()
    share = share[share > 0]
    rows = [
        Row("classifier: right on real test digits", *mean_and_se(100 * correct), "%"),
        Row("classifier: probability of its class, test digits", *mean_and_se(sure_of_real)),
        Row("classifier: probability of its class, draws", *mean_and_se(sure)),
        Row(
            "entropy of the classes of the draws", -float(np.sum(share * np.log2(share))), None,
            "bits", math.log2(10),
        ),
    ]  # fmt: skip
    return rows, counts


def _restore(
    key: Array, diffusion: Diffusion, fitted: Fit, images: Array, test: Array, size: Size
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


def _sections(size: Size, fitted: Fit, baselines: Baselines, counts: np.ndarray) -> dict[str, str]:
    best_step = fitted.held_out_losses.step[np.argmin(fitted.held_out_losses.loss)]
    gaussian, mixture = baselines
    return {
        "Reading": (
            "Log densities of the dequantised levels x + U, in nats with respect to volume in grey "
            "levels; higher is better. Bits per pixel are -log2 of them over 64 pixels, and bound "
            "the bits per pixel of the 17 levels from above, because U has full width; lower is "
            "better. The diffusion's K is a lower bound on its log density, the baselines' figures "
            "are exact. Errors are standard errors over the test images, each averaged over "
            f"{HELD_OUT_COPIES} draws of U; paired ones are of the difference image by image."
        ),
        "Settings": (
            f"T = {T}, log signal-to-noise linear from β_1 = {BETA_1} to ᾱ_T = {ALPHA_BAR_T}; "
            "readout: the noise, variance and last step learned. Training: AdamW (weight decay "
            f"{WEIGHT_DECAY}), batches of {BATCH_SIZE}, learning rate {LEARNING_RATE} falling to 0 "
            f"along a cosine over {size.num_steps} steps, averaged weights (decay {EMA_DECAY}), "
            f"{size.copies} dequantised copies of {size.train_images} images, of which the "
            f"baselines get {min(size.copies, BASELINE_COPIES)}. Stopped after {fitted.num_steps} "
            f"steps; the best on validation images were those of step {best_step}. "
            f"Mixture: {mixture.n_components} components, {mixture.reg_covar} added to their "
            f"variances; Gaussian: {gaussian.reg_covar} added."
        ),
        "Restored": (
            f"{size.restored} held-out images under noise as large as they vary, and with only "
            f"their upper half known; SMC, 4 runs of {size.particles} particles. Intervals of the "
            "right posterior hold 90 %. With pixels known exactly so few particles make them too "
            "narrow: `probdiff run inpaint` takes more of them, `probdiff run denoise` more "
            "images, and both tell an error of the sampler from one of the model."
        ),
        "Draws": (
            "Draws as levels, read by logistic regression on the real training digits. Classes 0 "
            f"to 9 among {counts.sum()} draws: {', '.join(map(str, counts))}."
        ),
    }


def _samples(test: Array, draws: np.ndarray) -> Figure:
    figure = plt.figure(figsize=(9, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    plots.images(test[:49], columns=7, vmax=16.0, title="held-out digits", ax=left)
    levels = np.clip(np.floor(draws[:49]), 0, 16)
    plots.images(levels, columns=7, vmax=16.0, title="draws of the model", ax=right)
    return figure
