"""Restoring digits: are posteriors under a trained model right, and are they worth anything?

The runs `denoise`, `inpaint` and `super-resolution` take the model that `digits` leaves, observe
images as `conditioning` says, and infer them by SMC over all T steps, in 4 runs; the twist knows
the covariance of the training images. The truths are of two kinds:

    draws of the model      the prior is the truth: intervals must cover 90 %, else SMC is wrong
    held-out digits         how far the model itself is from the digits adds to it

Pixels whose level hardly ever changes in the training images are counted apart: they hold the
uniform noise of dequantisation and little else. RMSE is over the pixels that are inferred. The
posterior mean is judged beside that of a Gaussian with the training images' mean and covariance,
which is the best linear guess. Log evidences are densities of an image's observation, in grey
levels. The spread is of log evidence between the runs of one image, the effective number the least
of any step and run, as a share of the particles. Errors are standard errors over images.

Source: Sohl-Dickstein et al. (2015), section 3.2.4 and figure 3, which denoise and inpaint images.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from probdiff import Diffusion, Prior, datasets, load, plots, sample
from probdiff.experiments import conditioning
from probdiff.experiments.conditioning import Posterior, Task, few, infer_all, trained, trust
from probdiff.experiments.report import Experiment, Found, Run
from probdiff.types import Params

_SIDE_BY_SIDE, LEVELS = 3, 17.0


class Size(NamedTuple):
    """How much of everything a run does.

    With 64 particles the effective number of denoising is 0.45 at its least. Exact pixels ask for
    more: with 64, 256 and 1024 particles 90 % intervals hold 0.73, 0.81 and 0.88 of the inpainted
    pixels where truths are draws of the model. So that time is spent on fewer images.
    """

    images: int = 100
    num_particles: int = 64
    num_runs: int = 4


def _load(folder: str | Path) -> tuple[Diffusion, Params]:
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


def _conduct(observe: Callable[[Prior, float], Task], is_figure_3: bool, run: Run) -> Found:
    size, folder = run.size, trained(run, "digits")
    diffusion, params = _load(folder)
    keys = jax.random.split(jax.random.key(run.seed), 4)
    data = datasets.digits()
    gaussian = conditioning.gaussian_of(data.train)
    task = observe(conditioning.prior_of(diffusion, params, gaussian), float(diffusion.scale))
    truths = {
        "digits": datasets.dequantise(keys[0], data.test[: size.images]),
        "draws": sample.ancestral(keys[1], diffusion, params, size.images),
    }
    smc = conditioning.sampler(
        task, num_particles=size.num_particles, num_runs=size.num_runs, progress=run.progress
    )
    found, rows, warned = infer_all(run, keys[2:], smc, task, truths, gaussian)
    sections = {"Model": f"`{folder.as_posix()}`", "Warnings": warned}
    if is_figure_3:
        figures = {"figure_3": figure_3(found["digits"], found["draws"].truth)}
        sections["Figures"] = _FIGURE_3
    else:
        figures = {"posterior_digits": conditioning.sheet(found["digits"])}
    figures["posterior_draws"] = conditioning.sheet(found["draws"])
    figures |= {f"sampler_{name}": trust(posterior) for name, posterior in found.items()}
    return Found(rows, figures, {"posterior": few(found["digits"], 8)}, sections)


_FIGURE_3 = (
    "Figure 3 as in the paper, on digits, an image a row: held-out digits; the same with noise of "
    "variance 1 in units in which the training images have variance 1; draws from the posterior "
    "given the noisy image; draws of the model, which know nothing of the image beside them. The "
    "last column, which the paper has not, is each pixel's posterior standard deviation. Grey "
    "values below 0 and above 17 are shown black and white."
)


def _experiment(title: str, observe: Any, size: Size, is_figure_3: bool = False) -> Experiment:
    sizes = {"cpu": size, "quick": Size(images=2, num_particles=8, num_runs=2)}
    conduct = functools.partial(_conduct, observe, is_figure_3)
    return Experiment(f"{title} of digits", __doc__, conduct, sizes, _load)


DENOISE = _experiment("Denoising", conditioning.denoising, Size(), is_figure_3=True)
INPAINT = _experiment("Inpainting", lambda prior, scale: conditioning.inpainting(prior),
    Size(20, 1024))  # fmt: skip
SUPER_RESOLUTION = _experiment("Super-resolution",
    lambda prior, scale: conditioning.super_resolution(prior, 0.05 * scale),
    Size(20, 256))  # fmt: skip


def figure_3(posterior: Posterior, draws: Any) -> Figure:
    """Figure 3 of the paper, an image a row: held out, noisy, inferred; draws; posterior sd."""
    rows = min(len(posterior.truth), conditioning.SHOWN)
    inferred = posterior.tree["posterior"]["x_0"].values[0, :_SIDE_BY_SIDE, :rows].swapaxes(0, 1)
    columns, sd = min(_SIDE_BY_SIDE, len(draws) // rows), posterior.sd[:rows]
    sheets = {
        "held-out\ndigits": posterior.truth[:rows],
        "with noise of\nvariance 1": posterior.y[:rows],
        "draws from the posterior\ngiven the noisy image": np.concatenate(inferred),
        "draws of\nthe model": draws[: columns * rows],
        "posterior\nsd": sd,
    }
    widths = [len(images) // rows for images in sheets.values()]
    figure = plt.figure(figsize=(0.85 * sum(widths) + 2.5, 0.85 * rows + 0.7), layout="constrained")
    axes = figure.subplots(1, len(widths), width_ratios=widths)
    looks = [{"vmax": LEVELS}] * 4 + [{"vmax": float(sd.max()), "cmap": "viridis"}]
    for ax, (title, images), width, look in zip(axes, sheets.items(), widths, looks, strict=True):
        plots.images(images, columns=width, title=title, ax=ax, **look)
        ax.title.set_fontsize("medium")
    for ax, label in zip(axes[-2:], ("grey level", "posterior sd, grey levels"), strict=True):
        figure.colorbar(ax.images[0], ax=ax, label=label, shrink=0.6)
    return figure
