"""The lower half of a digit from its upper half: exact posteriors beside the 2015 rule's.

The upper 14 rows are known exactly, as mass points of 256 levels; the lower 14 are inferred, on a
diffusion of 50 of the model's 1000 levels,

    SMC          weighted particles led by `ReadoutTwist`, the readout's mixture at the known pixels
                 tempered by the covariance of the training images; exact as they grow; log evidence
    2015 rule    known pixels set to their values at every level, no weights: another law; as many

A classifier that has seen real digits only reads the completed images. Its accuracy has a ceiling:
the upper half does not always tell the digit. Whether posteriors are right is told by truths that
are draws of the same 50-step diffusion: central 90 % intervals hold 90 % of them, which tests the
sampler; on held-out digits the model's own error adds to it. Pixels that hardly ever vary are
counted apart. Errors are standard errors over images.

Source: Sohl-Dickstein et al. (2015), section 2.5 and figure 3.
"""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from probdiff import Diffusion, datasets, infer, load, plots, sample
from probdiff.experiments import conditioning
from probdiff.experiments.conditioning import Task, few, infer_all, trained, trust
from probdiff.experiments.judging import bytes_of, classifier_of_bytes
from probdiff.experiments.report import Experiment, Found, Row, Run, mean_and_se
from probdiff.experiments.training import CALLS
from probdiff.types import Params


class Size(NamedTuple):
    """How much of everything a run does."""

    images: int = 20
    num_particles: int = 256
    num_runs: int = 2
    steps: int = CALLS
    train_images: int = 59_000
    epochs: int = 10


SIZES = {
    "cpu": Size(),
    "gpu": Size(images=100, num_particles=512, num_runs=4),
    "quick": Size(images=2, num_particles=4, steps=4, train_images=200, epochs=1),
}


def _load(folder: str | Path) -> tuple[Diffusion, Params]:
    """A saved model, if it is one of MNIST.

    Raises:
        ValueError: if there is no model, or one of something else.
    """
    diffusion, params = load(folder)
    if diffusion.event_shape != (28, 28) or diffusion.last_step.grid is None:
        raise ValueError(
            f"model must be one of MNIST, grey levels of event_shape (28, 28); got event_shape "
            f"{diffusion.event_shape}, {diffusion.last_step} in {folder}"
        )
    return diffusion, params


def _conduct(run: Run) -> Found:
    size, folder = run.size, trained(run, "mnist")
    diffusion, params = _load(folder)
    keys = jax.random.split(jax.random.key(run.seed), 5)
    data = datasets.mnist()
    images = data.train[: size.train_images].astype(np.float32)
    gaussian = conditioning.gaussian_of(images, offset=0.0)  # digits stay on their levels
    task = conditioning.inpainting(conditioning.prior_of(diffusion, params, gaussian))
    truths = {
        "digits": data.test[: size.images].astype(np.float32),
        "draws": sample.ancestral(keys[0], diffusion, params, size.images, steps=size.steps),
    }
    run.say("train a classifier of real digits")
    labels = data.train_labels[: size.train_images]
    classifier = classifier_of_bytes(images, labels, size.epochs, run.seed)
    smc = infer.SMC(
        task.program, num_particles=size.num_particles, num_runs=size.num_runs, steps=size.steps,
        twist=infer.ReadoutTwist(), progress=run.progress,
    )  # fmt: skip
    found, rows, warned = infer_all(run, keys[1:3], smc, task, truths, gaussian)
    run.say("complete them by the rule of 2015")
    digits, truth = found["digits"], found["digits"].truth
    clamped = _by_rule_of_2015(keys[3], task, truth, size)
    completed = digits.tree["posterior"]["x_0"].values[0]
    wrong = np.abs(completed - truth)[..., ~task.unseen].max()
    rows = [
        Row("known pixels: largest error", wrong, None, "grey levels", 0.0),
        *_classifier_rows(classifier, data.test_labels[: size.images], truth, completed, clamped),
        *rows,
    ]
    figures = {f"posterior_{n}": conditioning.sheet(p, vmax=255.0) for n, p in found.items()}
    figures |= {"sampler": trust(digits), "rules": _rules(task, truth, completed, clamped)}
    sections = {"Model": f"`{folder.as_posix()}`", "Warnings": warned}
    return Found(rows, figures, {"posterior": few(digits, 5)}, sections)


EXPERIMENT = Experiment("Inpainting of MNIST", __doc__, _conduct, SIZES, _load)


def _by_rule_of_2015(key: jax.Array, task: Task, x: np.ndarray, size: Size) -> np.ndarray:
    """Completed images `(draws, images, 28, 28)`, as many draws as SMC has particles in all."""
    guided = infer.Guided(
        task.program, num_samples=size.num_particles * size.num_runs, steps=size.steps,
        twist=infer.KernelTwist(), check=False,
    )  # fmt: skip
    with warnings.catch_warnings(action="ignore", category=infer.InferenceWarning):
        guided.run(key, jnp.asarray(task.measure(x)))  # it is here as what it is
    return np.asarray(guided.get_samples()["x_0"])


def _classifier_rows(
    classifier: Any, labels: Any, truth: np.ndarray, completed: np.ndarray, clamped: np.ndarray
) -> list[Row]:
    """Share of completions read as the digit that they are of; errors over images."""
    whole, posterior, rule = (
        (classifier.predict(bytes_of(x.reshape(-1, 784))).reshape(x.shape[:2]) == labels).mean(0)
        for x in (truth[None], completed, clamped)
    )
    shares = {
        "classifier: right on the whole digit": whole,
        "classifier: right on completions by SMC": posterior,
        "classifier: right on completions by the 2015 rule": rule,
        "SMC − 2015 rule, paired": posterior - rule,
    }
    return [Row(name, *mean_and_se(share), "share") for name, share in shares.items()]


def _rules(task: Task, truth: np.ndarray, completed: np.ndarray, clamped: np.ndarray) -> Figure:
    """Four completions by each rule, below the digits and what is known of them."""
    shown = slice(0, min(10, len(truth)))
    known = np.where(task.unseen, np.nan, truth[shown])
    every = max(1, len(completed) // 4)
    stacks = {
        "digits, and what is known of them": np.concatenate([truth[shown], known]),
        "posterior draws by SMC": completed[::every][:4, shown].reshape(-1, 28, 28),
        "draws by the 2015 rule": clamped[:4, shown].reshape(-1, 28, 28),
    }
    figure, axes = plt.subplots(3, 1, figsize=(7, 7), height_ratios=(2, 4, 4), layout="constrained")
    for (title, stack), ax in zip(stacks.items(), axes, strict=True):
        plots.images(stack, columns=len(known), vmax=255.0, title=title, ax=ax)
    return figure
