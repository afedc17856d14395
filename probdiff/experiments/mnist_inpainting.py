"""The lower half of a digit from its upper half: exact posteriors beside the 2015 rule's.

The upper 14 rows are known exactly, as mass points of 256 levels; the lower 14 are inferred, on a
diffusion of 50 of the model's 1000 levels,

    SMC          weighted particles led by `ReadoutTwist`, exact as they grow; log evidence
    2015 rule    known pixels set to their values at every level, no weights: another law

A classifier that has seen real digits only reads the completed images. Its accuracy has a ceiling:
the upper half does not always tell the digit. Whether posteriors are right is told by truths that
are draws of the same 50-step diffusion: central 90 % intervals hold 90 % of them.

Source: Sohl-Dickstein et al. (2015), section 2.5 and figure 3.
"""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from sklearn.neural_network import MLPClassifier

from probdiff import Diffusion, datasets, infer, load, plots, sample
from probdiff.experiments import conditioning, mnist
from probdiff.experiments.conditioning import Posterior, Task
from probdiff.experiments.report import Row, mean_and_se, write_report
from probdiff.experiments.restoration import NAMES, few, trained, trust, warnings_of
from probdiff.experiments.training import CALLS
from probdiff.types import Params

SUMMARY = "the lower half of MNIST digits from the upper: posteriors, and what a classifier reads"
DURATION = "about 30 minutes on one CPU core, once mnist has run"

TRAINED = Path("runs/mnist")
"""Where `probdiff run mnist` leaves its model."""
KEPT = 5


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


def run(
    out_dir: str | Path,
    *,
    seed: int = 0,
    quick: bool = False,
    recipe: str = "cpu",
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
    model: str | Path | None = None,
) -> list[Row]:
    """Infer, complete and judge; write report, table, figures and a few posteriors.

    Args:
        out_dir: Folder of the run, made if absent.
        seed: Seeds everything but the data and their split.
        quick: Two images and few particles, to see that all runs; the numbers mean nothing.
        recipe: "cpu" or "gpu".
        progress: Show bars.
        say: Told what is being done.
        model: Folder of a trained model of MNIST; `runs/mnist` if absent, which is trained first
            where it is not there.

    Returns:
        The rows of the table.

    Raises:
        ValueError: if the model is not one of MNIST.
    """
    size, out_dir = SIZES["quick" if quick else recipe], Path(out_dir)
    folder = trained(
        mnist, TRAINED, model, out_dir, quick=quick, say=say, seed=seed, recipe=recipe,
        progress=progress,
    )  # fmt: skip
    diffusion, params = load_mnist(folder)
    keys = jax.random.split(jax.random.key(seed), 5)
    data = datasets.mnist()
    images = data.train[: size.train_images].astype(np.float32)
    gaussian = conditioning.gaussian_of(images, offset=0.0)  # digits stay on their levels
    task = conditioning.inpainting(conditioning.prior_of(diffusion, params, gaussian))
    labels = data.test_labels[: size.images]
    truths = {
        "digits": data.test[: size.images].astype(np.float32),
        "draws": sample.ancestral(keys[0], diffusion, params, size.images, steps=size.steps),
    }
    say("train a classifier of real digits")
    classifier = mnist.train_classifier(
        images, data.train_labels[: size.train_images], size.epochs, seed
    )
    smc = infer.SMC(
        task.program, num_particles=size.num_particles, num_runs=size.num_runs, steps=size.steps,
        twist=infer.ReadoutTwist(), progress=progress,
    )  # fmt: skip
    found = {}
    for key, (name, x) in zip(keys[1:3], truths.items(), strict=True):
        say(f"infer {size.images} {NAMES[name]}")
        began = time.monotonic()
        found[name] = conditioning.posterior(key, smc, task, x)
        say(f"{(time.monotonic() - began) / size.images:.1f} s per image")
    say("complete them by the rule of 2015")
    clamped = by_rule_of_2015(keys[3], task, truths["digits"], size)
    completed = found["digits"].tree["posterior"]["x_0"].values[0]
    rows = [
        *_known_rows(task, found["digits"].truth, completed),
        *_classifier_rows(classifier, labels, truths["digits"], completed, clamped),
        *(
            row
            for name, posterior in found.items()
            for row in conditioning.rows(NAMES[name], task, posterior, gaussian)
        ),
    ]
    figures = {
        f"posterior_{name}": conditioning.sheet(p, vmax=255.0) for name, p in found.items()
    } | {
        "sampler": trust(found["digits"]),
        "rules": _rules(task, truths["digits"], completed, clamped),
    }
    write_report(
        out_dir,
        "Inpainting of MNIST",
        rows,
        sections=_sections(size, folder, found),
        figures=figures,
        trees={"posterior": few(found["digits"], KEPT)},
        quick=quick,
    )
    return rows


def load_mnist(folder: str | Path) -> tuple[Diffusion, Params]:
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


def by_rule_of_2015(key: jax.Array, task: Task, x: np.ndarray, size: Size) -> np.ndarray:
    """Completed images `(draws, images, 28, 28)`, as many draws as SMC has particles in all."""
    guided = infer.Guided(
        task.program, num_samples=size.num_particles * size.num_runs, steps=size.steps,
        twist=infer.KernelTwist(), check=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", infer.InferenceWarning)  # it is here as what it is
        guided.run(key, jnp.asarray(task.measure(x)))
    return np.asarray(guided.get_samples()["x_0"])


def _known_rows(task: Task, truth: np.ndarray, completed: np.ndarray) -> list[Row]:
    wrong = np.abs(completed - truth)[..., ~task.unseen].max()
    return [Row("known pixels: largest error", wrong, None, "grey levels", 0.0)]


def _classifier_rows(
    classifier: MLPClassifier,
    labels: np.ndarray,
    truth: np.ndarray,
    completed: np.ndarray,
    clamped: np.ndarray,
) -> list[Row]:
    """Share of completions read as the digit that they are of; errors over images."""

    def right(images: np.ndarray) -> np.ndarray:
        flat = images.reshape(-1, 784) / 255
        return (classifier.predict(flat).reshape(images.shape[:2]) == labels).mean(0)

    posterior, rule = right(completed), right(clamped)
    return [
        Row("classifier: right on the whole digit", *mean_and_se(right(truth[None])), "share"),
        Row("classifier: right on completions by SMC", *mean_and_se(posterior), "share"),
        Row("classifier: right on completions by the 2015 rule", *mean_and_se(rule), "share"),
        Row("SMC − 2015 rule, paired", *mean_and_se(posterior - rule), "share"),
    ]


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
        columns = len(truth[shown])
        plots.images(stack, columns=columns, vmax=255.0, title=title, ax=ax)
    return figure


def _sections(size: Size, folder: Path, found: dict[str, Posterior]) -> dict[str, str]:
    return {
        "Reading": (
            "A central 90 % interval of the right posterior holds a truth that was drawn from the "
            "prior 90 % of the time: on draws of the model this tests the sampler, on held-out "
            "digits the model's own error adds to it. Pixels that hardly ever vary are counted "
            "apart. Errors are standard errors over images. A classifier reads each completion; "
            "its share of right ones is limited by what the upper half tells."
        ),
        "Settings": (
            f"Model: `{folder.as_posix()}`. {size.images} images of each kind, {size.num_runs} "
            f"runs of {size.num_particles} particles each, {size.steps} levels of the diffusion; "
            "the twist is the readout's mixture at the known pixels, tempered by the covariance of "
            "the training images. The 2015 rule draws as many."
        ),
        "Warnings": warnings_of(found),
    }
