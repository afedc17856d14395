"""Restoring digits: are posteriors under a trained model right, and are they worth anything?

The runs `denoise`, `inpaint` and `super-resolution` take the model that `digits` leaves, observe
images as `conditioning` says, and infer them by SMC over all T steps. The truths are of two kinds:

    draws of the model      the prior is the truth: intervals must cover 90 %, else SMC is wrong
    held-out digits         how far the model itself is from the digits adds to it

The posterior mean is judged beside that of a Gaussian with the training images' covariance, which
is the best linear guess.

Source: Sohl-Dickstein et al. (2015), section 3.2.4 and figure 3, which denoise and inpaint images.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import xarray as xr
from matplotlib.figure import Figure

from probdiff import Diffusion, Prior, datasets, load, plots, sample
from probdiff.experiments import conditioning, digits
from probdiff.experiments.conditioning import Posterior, Task
from probdiff.experiments.report import Row, write_report
from probdiff.types import Params

TRAINED = Path("runs/digits")
"""Where `probdiff run digits` leaves its model."""
KEPT, EVIDENCES = 8, 20
DURATION = "about 6 minutes on one CPU core, once digits has run"


class Size(NamedTuple):
    """How much of everything a run does.

    With 64 particles the effective number of denoising is 0.45 at its least. Exact pixels ask for
    more: with 64, 256 and 1024 particles 90 % intervals hold 0.73, 0.81 and 0.88 of the inpainted
    pixels where truths are draws of the model. So that time is spent on fewer images.
    """

    images: int = 100
    num_particles: int = 64
    num_runs: int = 4


SMALL = Size(images=2, num_particles=8, num_runs=2)
MANY_IMAGES = Size()
EXACT_PIXELS = Size(images=20, num_particles=1024)
BLOCK_MEANS = Size(images=20, num_particles=256)


@dataclasses.dataclass(frozen=True)
class Restoration:
    """An experiment: infer images from observations of them.

    Args:
        TITLE: Heading of the report.
        SUMMARY: What it asks, for `probdiff list`.
        task: From a prior and the data's sd to what is observed.
        size: How much a full run does.
        DURATION: How long it takes.
        is_figure_3: Whether the posteriors of held-out digits are drawn as in the paper's figure.
    """

    TITLE: str
    SUMMARY: str
    task: Callable[[Prior, float], Task]
    size: Size = MANY_IMAGES
    DURATION: str = DURATION
    is_figure_3: bool = False

    def run(
        self,
        out_dir: str | Path,
        *,
        seed: int = 0,
        quick: bool = False,
        progress: bool = True,
        say: Callable[[str], None] = lambda text: None,
        model: str | Path | None = None,
    ) -> list[Row]:
        """Observe, infer and judge; write report, table, figures and a few posteriors.

        Args:
            out_dir: Folder of the run, made if absent.
            seed: Seeds everything but the split of the data, which is fixed.
            quick: Two images and few particles, to see that all runs; the numbers mean nothing.
            progress: Show bars.
            say: Told what is being done.
            model: Folder of a trained model of digits; `runs/digits` if absent, which is trained
                first where it is not there.

        Returns:
            The rows of the table.

        Raises:
            ValueError: if the model is not one of digits.
        """
        size, out_dir = SMALL if quick else self.size, Path(out_dir)
        folder = trained(
            digits, TRAINED, model, out_dir, quick=quick, say=say, seed=seed, progress=progress
        )
        diffusion, params = load_digits(folder)
        keys = jax.random.split(jax.random.key(seed), 4)
        data = datasets.digits()
        gaussian = conditioning.gaussian_of(data.train)
        task = self.task(conditioning.prior_of(diffusion, params, gaussian), float(diffusion.scale))
        truths = {
            "digits": datasets.dequantise(keys[0], data.test[: size.images]),
            "draws": sample.ancestral(keys[1], diffusion, params, size.images),
        }
        smc = conditioning.sampler(
            task, num_particles=size.num_particles, num_runs=size.num_runs, progress=progress
        )
        found = {}
        for key, (name, x) in zip(keys[2:], truths.items(), strict=True):
            say(f"infer {size.images} {NAMES[name]}")
            found[name] = conditioning.posterior(key, smc, task, x)
        rows = [
            row
            for name, posterior in found.items()
            for row in conditioning.rows(NAMES[name], task, posterior, gaussian)
        ]
        sections = _sections(size, folder, found)
        if self.is_figure_3:
            figures = {"figure_3": figure_3(found["digits"], found["draws"].truth)}
            sections["Figures"] = FIGURE_3
        else:
            figures = {"posterior_digits": conditioning.sheet(found["digits"])}
        figures["posterior_draws"] = conditioning.sheet(found["draws"])
        figures |= {f"sampler_{name}": trust(posterior) for name, posterior in found.items()}
        write_report(
            out_dir,
            self.TITLE,
            rows,
            sections=sections,
            figures=figures,
            trees={"posterior": few(found["digits"], KEPT)},
            quick=quick,
        )
        return rows


SIDE_BY_SIDE, LEVELS = 3, 17.0
FIGURE_3 = (
    "Figure 3 as in the paper, on digits, an image a row: held-out digits; the same with noise of "
    "variance 1 in units in which the training images have variance 1; draws from the posterior "
    "given the noisy image; draws of the model, which know nothing of the image beside them. The "
    "last column, which the paper has not, is each pixel's posterior standard deviation. Grey "
    "values below 0 and above 17 are shown black and white."
)
NAMES = {"digits": "held-out digits", "draws": "draws of the model"}

DENOISE = Restoration(
    "Denoising of digits",
    "posteriors of digits under noise as large as they vary: coverage, error, evidence",
    conditioning.denoising,
    is_figure_3=True,
)
INPAINT = Restoration(
    "Inpainting of digits",
    "posteriors of the lower half of a digit, the upper known exactly: coverage, error, evidence",
    lambda prior, scale: conditioning.inpainting(prior),
    EXACT_PIXELS,
    "about 15 minutes on one CPU core, once digits has run",
)
SUPER_RESOLUTION = Restoration(
    "Super-resolution of digits",
    "posteriors of digits from means of 2 × 2 blocks: coverage, error, evidence",
    lambda prior, scale: conditioning.super_resolution(prior, 0.05 * scale),
    BLOCK_MEANS,
)


def load_digits(folder: str | Path) -> tuple[Diffusion, Params]:
    """A saved model, if it is one of digits.

    Raises:
        ValueError: if there is no model, or one of something else.
    """
    diffusion, params = load(folder)
    shape = (8, 8)
    if diffusion.event_shape != shape or diffusion.scale is None:
        raise ValueError(
            f"model must be one of digits, numbers of event_shape {shape}; got event_shape "
            f"{diffusion.event_shape} in {folder}"
        )
    return diffusion, params


def few(posterior: Posterior, count: int) -> xr.DataTree:
    """The first posteriors as a DataTree of a size to keep."""
    return posterior.tree.isel(image=slice(count), missing_dims="ignore")


def figure_3(posterior: Posterior, draws: Any) -> Figure:
    """Figure 3 of the paper, an image a row: held out, under noise, inferred; draws; posterior sd.

    Args:
        posterior: Of held-out digits under noise.
        draws: Draws of the model.
    """
    rows = min(len(posterior.truth), conditioning.SHOWN)
    inferred = posterior.tree["posterior"]["x_0"].values[0, :SIDE_BY_SIDE, :rows].swapaxes(0, 1)
    columns = min(SIDE_BY_SIDE, len(draws) // rows)
    sheets = {
        "held-out\ndigits": posterior.truth[:rows],
        "with noise of\nvariance 1": posterior.y[:rows],
        "draws from the posterior\ngiven the noisy image": inferred.reshape(
            -1, *inferred.shape[2:]
        ),
        "draws of\nthe model": draws[: columns * rows],
    }
    sd = posterior.sd[:rows]
    widths = [len(images) // rows for images in (*sheets.values(), sd)]
    figure = plt.figure(figsize=(0.85 * sum(widths) + 2.5, 0.85 * rows + 0.7), layout="constrained")
    axes = figure.subplots(1, len(widths), width_ratios=widths)
    for ax, (title, images), width in zip(axes, sheets.items(), widths, strict=False):
        plots.images(images, columns=width, vmax=LEVELS, title=title, ax=ax)
    plots.images(
        sd, columns=1, vmax=float(sd.max()), cmap="viridis", title="posterior\nsd", ax=axes[-1]
    )
    for ax in axes:
        ax.title.set_fontsize("medium")
    figure.colorbar(axes[-2].images[0], ax=axes[-2], label="grey level", shrink=0.6)
    figure.colorbar(axes[-1].images[0], ax=axes[-1], label="posterior sd, grey levels", shrink=0.6)
    return figure


def trust(posterior: Posterior) -> Figure:
    """Effective number at each level, and log evidence of each run."""
    figure = plt.figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plots.ess_trace(posterior.tree, ax=left)
    plots.evidence(few(posterior, EVIDENCES), ax=right)
    return figure


def trained(
    experiment: Any, default: Path, model: str | Path | None, out_dir: Path, *, quick: bool,
    say: Callable[[str], None], **options: Any,
) -> Path:  # fmt: skip
    """Folder of a trained model; the experiment is run now where there is none.

    Args:
        experiment: Module that trains it.
        default: Where the experiment leaves its model by itself.
        model: Folder that was asked for, if any.
        out_dir: Folder of this run.
        quick: Whether a few steps are enough.
        say: Told what is being done.
        **options: Passed on to the experiment.
    """
    if model is not None:
        return Path(model)
    if (default / "config.json").is_file():
        return default
    # what a quick run trains must not stand where a trained model is looked for
    folder = out_dir / default.name if quick else default
    say(f"no model in {default}: train one first, in {folder} ({experiment.DURATION})")
    experiment.run(folder, quick=quick, say=say, **options)
    return folder


def warnings_of(found: dict[str, Posterior]) -> str:
    """What the samplers warned of, as a list for a report."""
    lines = [
        f"- {NAMES[name]}: {text}"
        for name, posterior in found.items()
        for text in posterior.complaints
    ]
    return "\n".join(lines) or "None."


def _sections(size: Size, folder: Path, found: dict[str, Posterior]) -> dict[str, str]:
    return {
        "Reading": (
            "A central 90 % interval of the right posterior holds a truth that was drawn from the "
            "prior 90 % of the time. On draws of the model this must hold, and is a test of the "
            "sampler; on held-out digits the model's own error adds to it. Pixels whose level "
            "hardly ever changes in the training images are counted apart: they hold the uniform "
            "noise of dequantisation and little else. RMSE is over the pixels that are inferred. "
            "The Gaussian has the training images' mean and covariance; its posterior mean is the "
            "best linear guess. Log evidences are densities of an image's observation, in grey "
            "levels. Errors are standard errors over images. The spread is of log evidence between "
            "the independent runs of one image, the effective number the least of any step and "
            "run, as a share of the particles."
        ),
        "Settings": (
            f"Model: `{folder.as_posix()}`. {size.images} images of each kind, {size.num_runs} "
            f"runs of {size.num_particles} particles each, all steps of the diffusion; the twist "
            "knows the covariance of the training images. `posterior.nc` holds the first "
            "posteriors of held-out digits."
        ),
        "Warnings": warnings_of(found),
    }
