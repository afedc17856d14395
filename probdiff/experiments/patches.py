"""Dead leaves and bark: bits per pixel beside Gaussians fitted to the same patches.

    dead leaves   discs of 256 greys that hide one another, a law that is known and can be drawn
    bark          crops of photographs, T = 500; a hole of 100 × 100 pixels is painted in

Patches of 32 × 32 pixels are dequantised (a uniform number of one level's width is added) and
have variance 1, one shift and one scale for all pixels. K is then a density's, in bits per pixel,
and so are the log densities of the baselines, in closed form,

    a Gaussian with the patches' mean and full covariance,
    a mixture of Gaussians with full covariances, of the best size on validation patches,

whose figures are exact where K is a bound; higher is better. Errors are standard errors over
patches, paired ones of the difference patch by patch. A model of independent unit Gaussians has
−2.0471. How far up one can get hangs on the noise that dequantises: a pixel known to its level has
log2 of scale/level bits, the ceiling that is printed; no picture allows it for all pixels.

The diffusion: log signal-to-noise linear from noise of one level to ᾱ_T = 1e-4; a U-Net of the
log-SNR; a mixture of 4 Gaussians per pixel; last step learned.

The figures of 2015 are not comparable. Dead leaves: 1.489 on files of Theis et al. (2012), another
law of discs, where a mixture of conditional Gaussians has 1.244. Bark: −0.55 on photographs, crops
and a split that are not known.

Source: Sohl-Dickstein et al. (2015), table 1, figures 4 and 5.
"""

import functools
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

import probdiff
from probdiff import Diffusion, datasets, diagnostics, infer, plots, readouts, sample, schedules
from probdiff.experiments.judging import baselines, flat
from probdiff.experiments.report import Experiment, Found, Row, Run, mean_and_se
from probdiff.experiments.training import CALLS, Recipe, learn, rngs_of, sheets
from probdiff.types import Params

_SIDE, _COMPONENTS = 32, 4
_ALPHA_BAR_T = 1e-4
_HELD_OUT = 0.3
"""Share of every photograph's rows that is held out."""
_UNIT = "bits per pixel, variance 1"
_WHITE = -0.5 * math.log2(2 * math.pi * math.e)
"""Mean log density of unit-variance data under N(0, 1), bits per pixel: L_null."""


class Size(NamedTuple):
    """How it learns, and how much of everything a run does."""

    recipe: Recipe
    train: int = 20_000
    validation: int = 500
    test: int = 1_000
    test_times: int = 40
    draws: int = 64
    components: tuple[int, ...] = (4, 12)
    iterations: int = 15
    picture: int = 300
    hole: int = 100
    paint_steps: int = 500


_FIGURE_5 = (
    "Figure 5 as in the paper: a held-out photograph; the same with its central {hole} × {hole} "
    "pixels unknown, which is sky blue; the hole painted in by a draw that the rest guides and "
    "that is not weighed, so an approximate posterior draw; and by the rule of 2015. One draw of "
    "each is made, so no posterior standard deviation is known."
)
SIZES = {
    "cpu": Size(Recipe((32, 64), 1, 2_000, 64, 2e-3, patch=2)),
    "gpu": Size(Recipe(
        (96, 192, 256), 2, 10_000, 256, 1e-3, head_width=32, dtype="bfloat16", ema_decay=0.9995
    )),
    "quick": Size(
        Recipe((8, 8), 1, 10, 4, 2e-3, patch=2, evaluations=2), 60, 20, 20, 2, 4, (2,), 1, 32, 8, 4
    ),
}  # fmt: skip


class _Patches(NamedTuple):
    """Training, validation and test patches of variance 1, dequantised."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    level: float
    """Distance of two grey levels."""
    picture: np.ndarray | None
    """A large held-out picture whose hole is to be painted in."""

    @classmethod
    def of(cls, x: np.ndarray, size: Size, level: float, picture: np.ndarray | None) -> "_Patches":
        """Patches divided into the three parts."""
        return cls(*np.split(x, [size.train, size.train + size.validation]), level, picture)


def dead_leaves(key: Array, size: Size) -> _Patches:
    """Patches of the generator, discs of radius 2 to 100 in 256 greys."""
    key_leaves, key_noise = jax.random.split(key)
    greys = np.arange(256.0)
    n = size.train + size.validation + size.test
    patches = datasets.dead_leaves(
        key_leaves, n, size=_SIDE, r_min=2.0, r_max=100.0, greys=greys.astype(np.float32)
    )
    loc, scale = greys.mean() + 0.5, math.sqrt(greys.var() + 1 / 12)
    x = (np.asarray(datasets.dequantise(key_noise, patches)) - loc) / scale
    return _Patches.of(x, size, 1 / scale, None)


def bark(key: Array, size: Size) -> _Patches:
    """Crops of the photographs in the folder `bark` of `PROBDIFF_DATA`.

    Raises:
        ValueError: if there are none.
    """
    folder = Path(os.environ.get("PROBDIFF_DATA", ".")) / "bark"
    if not folder.is_dir():
        raise ValueError(
            f"PROBDIFF_DATA must name a folder that holds bark/*.png, grey photographs of bark; "
            f"{folder} is not there"
        )
    key_crops, key_noise, key_picture = jax.random.split(key, 3)
    images = datasets.grey_images(folder)
    n_test = size.validation + size.test
    crops = datasets.textures(
        key_crops, size.train, images, size=_SIDE, n_test=n_test, test_share=_HELD_OUT
    )
    level = 1 / 255 / crops.scale
    x = np.concatenate([crops.train, crops.test])
    x = np.asarray(datasets.dequantise(key_noise, jnp.asarray(x), levels_width=level)) - level / 2
    side = size.picture
    wide = [a for a in images if min(_HELD_OUT * a.shape[0], a.shape[1]) >= side]
    if not wide:
        raise ValueError(
            f"{folder} must hold a photograph with {side} columns and {side / _HELD_OUT:.0f} rows, "
            f"of which {side} are held out; got {[a.shape for a in images]}"
        )
    picture = jnp.asarray((wide[0][-side:, :side] - crops.loc) / crops.scale, jnp.float32)
    picture = np.asarray(datasets.dequantise(key_picture, picture, levels_width=level))
    return _Patches.of(x, size, level, picture - level / 2)


def _conduct(make: Callable[[Array, Size], _Patches], T: int, run: Run) -> Found:
    size, recipe = run.size, run.size.recipe
    keys = run.keys("data", "init", "fit", "bound", "draw", "paint")
    patches = make(keys["data"], size)
    run.say("fit the baselines")
    mixtures = baselines(
        patches.train, patches.validation, size.components, (patches.level**2,),
        (patches.level**2,), max_iter=size.iterations, random_state=run.seed,
        init_params="random_from_data",
    )  # fmt: skip
    scores = {name: m.score_samples(flat(patches.test)) for name, m in mixtures.items()}
    shades = tuple(np.quantile(patches.train, (0.001, 0.999)))
    diffusion, fitted, tree = learn(
        run, keys, _define((_SIDE, _SIDE), T, patches, recipe, keys["init"]), *patches[:3],
        what="patches", shades=shades, block_size=100,
    )  # fmt: skip
    draws = sample.ancestral(keys["draw"], diffusion, fitted.params, size.draws, steps=CALLS)
    figures = {
        "samples": sheets(patches.test, draws, shades, title=f"draws, {CALLS} network calls each"),
        "losses": plots.losses(fitted.losses, batch_size=recipe.batch_size).figure,
    }
    sections = {}
    if patches.picture is not None:
        run.say("paint the hole in")
        sections["Figures"] = _FIGURE_5.format(hole=size.hole)
        large = _define(patches.picture.shape, T, patches, recipe, keys["init"])
        figures["figure_5"] = _figure_5(keys["paint"], large, fitted.params, patches, size, shades)
    rows = _density_rows({"diffusion, bound K": tree["bound"]["bound"].values} | scores, patches)
    return Found(rows, figures, {"bounds": tree}, sections, (diffusion, fitted.params))


DEAD_LEAVES = Experiment(
    "Dead leaves", __doc__, functools.partial(_conduct, dead_leaves, 1000), SIZES
)
BARK = Experiment("Bark", __doc__, functools.partial(_conduct, bark, 500), SIZES)


def _define(
    shape: tuple[int, ...], T: int, patches: _Patches, recipe: Recipe, key: Array
) -> Diffusion:
    """The diffusion of images of any such shape: the weights do not depend on it."""
    lowest, highest = (float(v) for v in np.quantile(patches.train, (0.01, 0.99)))
    beta = schedules.log_snr_linear(T, beta_1=patches.level**2, alpha_bar_T=_ALPHA_BAR_T)
    network = recipe.network(shape, rngs_of(key), outputs=3 * _COMPONENTS)
    return Diffusion(
        probdiff.GaussianKernel(), beta, network, event_shape=shape,
        readout=readouts.Mixture(_COMPONENTS, lowest, highest), last_step=readouts.Learned(),
    )  # fmt: skip


def _density_rows(scores: dict[str, np.ndarray], patches: _Patches) -> list[Row]:
    """Bits per pixel of each model, and how far the first is above the others."""
    to_bits = diagnostics.BITS_PER_NAT / _SIDE**2
    ceiling = -math.log2(patches.level)
    first = next(iter(scores.values()))
    gain = mean_and_se(first * to_bits - _WHITE)
    return [
        *(Row(f"{name}, test", *mean_and_se(score * to_bits), _UNIT, ceiling)
          for name, score in scores.items()),
        *(Row(f"diffusion − {name}, paired", *mean_and_se((first - score) * to_bits), _UNIT)
          for name, score in list(scores.items())[1:]),
        Row("K − L_null", *gain, _UNIT, ceiling - _WHITE),
    ]  # fmt: skip


def _figure_5(
    key: Array, diffusion: Diffusion, params: Params, patches: _Patches, size: Size,
    shades: tuple[float, float],
) -> Figure:  # fmt: skip
    """Figure 5 of the paper: a hole in a held-out picture painted in, by two approximate draws."""
    picture, side = patches.picture, patches.picture.shape[0]
    inside = slice((side - size.hole) // 2, (side + size.hole) // 2)
    mask = np.ones(picture.shape, bool)
    mask[inside, inside] = False
    prior = diffusion.prior(params)

    def program() -> Any:
        prior(known=np.where(mask, picture, 0.0).astype(np.float32), mask=mask)

    panels = {"held-out bark": picture, "with a hole": np.where(mask, picture, np.nan)}
    twists = {"guided": infer.LaplaceTwist(), "rule of 2015": infer.KernelTwist()}
    options = {"num_samples": 1, "steps": size.paint_steps, "check": False}
    for i, (name, twist) in enumerate(twists.items()):
        guided = infer.Guided(program, twist=twist, **options)
        # that x_T still holds a little of so large a picture is small beside no weights
        with warnings.catch_warnings(action="ignore", category=infer.InferenceWarning):
            guided.run(jax.random.fold_in(key, i))
        panels[f"painted in, {name}"] = np.asarray(guided.get_samples()["x_0"])[0]
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), layout="constrained")
    for (name, panel), ax in zip(panels.items(), axes, strict=True):
        plots.images(panel[None], columns=1, vmin=shades[0], vmax=shades[1], title=name, ax=ax)
    return figure
