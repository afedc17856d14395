"""Training: the line that every experiment shares, and a recipe for images at length.

A recipe says how large a network is and how long it learns, on a CPU or a GPU. The optimiser is
Adam behind a limit on the gradient's norm, its rate warmed up along a line and brought to 0 along a
cosine,

    rate(i) = r i/w  for i ≤ w,    r (1 + cos π (i−w)/(n−w))/2  after,

and what is kept is the average of the weights. A run leaves in its folder

    training.safetensors    the checkpoint, every 30 seconds; the same command goes on from it
    metrics.jsonl           step, seconds, loss per image, loss on held-out images
    progress.png            a few draws and the losses so far

so that a run can be stopped at any time, watched while it goes, and cut into pieces.
"""

import json
import math
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import xarray as xr
from flax import nnx
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from numpyro.infer import ELBO, SVI

from probdiff import Diffusion, Fit, SampledTimeELBO, diagnostics, fit, networks, plots, sample
from probdiff.experiments.report import Row, Run, mean_and_se
from probdiff.train import Progress
from probdiff.types import Params

_Images = Array | np.ndarray
CALLS = 50
"""Network calls for a draw that is to be looked at."""


def train(
    key: Array, diffusion: Diffusion, data: _Images, optimiser: optax.GradientTransformation, *,
    objective: ELBO | None = None, **options: Any,
) -> Fit:  # fmt: skip
    """Fit a diffusion to the bound, or to another objective; the options are those of `fit`."""
    objective = SampledTimeELBO() if objective is None else objective
    svi = SVI(diffusion.model, diffusion.guide, optimiser, objective)
    return fit(key, svi, data, **options)


def cosine_adam(rate: float, num_steps: int) -> optax.GradientTransformation:
    """Adam, its learning rate falling to 0 along a cosine."""
    return optax.adam(optax.cosine_decay_schedule(rate, num_steps))


class Trained(NamedTuple):
    """A model that was trained, and its bound on data that it has not seen."""

    diffusion: Diffusion
    fitted: Fit
    tree: xr.DataTree

    @property
    def model(self) -> tuple[Diffusion, Params]:
        """What is saved, drawn from and conditioned."""
        return self.diffusion, self.fitted.params


def train_and_bound(
    run: Run, keys: dict[str, Array], diffusion: Diffusion, x: _Images, held_out: _Images, *,
    num_draws: int, objective: ELBO | None = None,
) -> Trained:  # fmt: skip
    """Train by Adam as the run's size says, average the weights, and bound held-out data."""
    size = run.size
    fitted = train(
        keys["fit"], diffusion, x, cosine_adam(size.learning_rate, size.num_steps),
        objective=objective, num_steps=size.num_steps, batch_size=min(size.batch_size, len(x)),
        ema_decay=0.999, progress=run.progress,
    )  # fmt: skip
    tree = diagnostics.bound(keys["bound"], diffusion, fitted.params, held_out, num_draws=num_draws)
    return Trained(diffusion, fitted, tree)


def in_bits(tree: xr.DataTree, name: str = "bound") -> Float[np.ndarray, "rows *steps"]:
    """A part of the bound, for each row of the data."""
    return tree["bound"][name].values.astype(np.float64) * diagnostics.BITS_PER_NAT


class Recipe(NamedTuple):
    """A network and how long it learns."""

    widths: tuple[int, ...]
    depth: int
    num_steps: int
    batch_size: int
    learning_rate: float
    patch: int = 1
    head_width: int = 16
    attention_heads: int = 0
    dtype: str | None = None
    warm_up: float = 0.05
    """Share of the steps."""
    clip: float = 200.0
    """Largest norm of the gradient of the loss, in nats per number of a batch: on MNIST it is 20 to
    140 once the first hundred steps are over, for a sharp p(x_0 | x_1) has steep ones, and the
    limit is for the step that would undo the others."""
    ema_decay: float = 0.999
    evaluations: int = 10
    """Times that held-out images are bounded and a few drawn, while it learns."""

    def network(
        self, event_shape: tuple[int, ...], rngs: nnx.Rngs, *, outputs: int, T: int | None = None
    ) -> networks.UNet:
        """The U-Net of this recipe; of the log-SNR unless T is given."""
        return networks.UNet(
            event_shape, self.widths, self.depth, T=T, patch=self.patch, outputs=outputs,
            head_width=self.head_width, attention_heads=self.attention_heads, dtype=self.dtype,
            rngs=rngs,
        )  # fmt: skip

    def optimiser(self, numbers: int) -> optax.GradientTransformation:
        """Adam for images of so many numbers."""
        warm_up = max(1, int(self.warm_up * self.num_steps))
        rate = optax.warmup_cosine_decay_schedule(0, self.learning_rate, warm_up, self.num_steps)
        clip = optax.clip_by_global_norm(self.clip * numbers * self.batch_size)
        return optax.chain(clip, optax.adam(rate))


def train_at_length(
    key: Array, diffusion: Diffusion, images: np.ndarray, held_out: np.ndarray, recipe: Recipe,
    run: Run, *, shades: tuple[float, float], objective: ELBO | None = None,
) -> Fit:  # fmt: skip
    """Fit a diffusion by a recipe, on from what is in the folder of the run.

    Held-out images are bounded on the way, and a few drawn, which the key of the fit serves too;
    `shades` are the values of a pixel shown black and white. The loss is the bound if absent.
    """
    painter = _Painter(key, diffusion, recipe.batch_size, len(held_out), shades, run)
    return train(
        key, diffusion, images, recipe.optimiser(math.prod(diffusion.event_shape)),
        objective=objective, num_steps=recipe.num_steps, batch_size=recipe.batch_size,
        ema_decay=recipe.ema_decay, held_out=held_out,
        evaluate_every=max(1, recipe.num_steps // recipe.evaluations),
        checkpoint=run.out_dir / "training.safetensors", log=run.out_dir / "metrics.jsonl",
        callback=painter, progress=run.progress,
    )  # fmt: skip


def rngs_of(key: Array) -> nnx.Rngs:
    """Randomness of a network's first weights."""
    return nnx.Rngs(jax.random.bits(key).item())


def learn(
    run: Run, keys: dict[str, Array], diffusion: Diffusion, images: np.ndarray,
    held_out: np.ndarray, test: np.ndarray, *, shades: tuple[float, float],
    objective: ELBO | None = None, what: str = "images", **options: Any,
) -> Trained:  # fmt: skip
    """Train by the recipe of the run's size, and bound test images; options of the bound."""
    run.say("train the diffusion")
    fitted = train_at_length(
        keys["fit"], diffusion, images, held_out, run.size.recipe, run, shades=shades,
        objective=objective,
    )  # fmt: skip
    run.say(f"bound the test {what}")
    tree = diagnostics.sampled_bound(
        keys["bound"], diffusion, fitted.params, test, num_times=run.size.test_times,
        progress=run.progress, **options,
    )  # fmt: skip
    return Trained(diffusion, fitted, tree)


class _Painter(NamedTuple):
    """Draws of the model and the losses so far, as `progress.png`."""

    key: Array
    diffusion: Diffusion
    batch_size: int
    held_out: int
    shades: tuple[float, float]
    run: Run

    def __call__(self, state: Progress) -> None:
        steps = min(CALLS, self.diffusion.T)
        # the same key every time, so that draws can be compared as the model learns
        draws = sample.ancestral(self.key, self.diffusion, state.params, 16, steps=steps)
        figure = plt.figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        low, high = self.shades
        title = f"draws after {state.step} steps"
        plots.images(draws, columns=4, vmin=low, vmax=high, title=title, ax=left)
        done, losses = state.held_out_losses
        held_out = (done, losses / self.held_out) if len(done) else None
        plots.losses(state.losses, batch_size=self.batch_size, held_out=held_out, ax=right)
        figure.savefig(self.run.out_dir / "progress.png", dpi=120)
        plt.close(figure)


def bits_rows(tree: xr.DataTree, numbers: int, unit: str, published: float) -> list[Row]:
    """Bits per number of images on a grid, whole and in parts, from `diagnostics.sampled_bound`."""
    names = ("bound", "reconstruction", "prior_kl")
    k, reconstruction, prior = (tree["bound"][name].values for name in names)
    parts = {
        "of which −log p(x_0 | x_1)": -reconstruction,
        "of which KL of the steps": reconstruction - prior - k,
        "of which KL(q(x_T | x_0) ‖ π)": prior,
    }
    to_bits = diagnostics.BITS_PER_NAT / numbers
    return [
        Row("diffusion, −K, test", *mean_and_se(-k * to_bits), unit, None, published),
        *(Row(name, *mean_and_se(part * to_bits), unit) for name, part in parts.items()),
        Row("diffusion, K, test", *mean_and_se(k), "nats per image"),
    ]


def curve(run: Run, numbers: int, held_out: int, published: float) -> Figure:
    """Bits of held-out images against minutes of training, from the log."""
    log = (run.out_dir / "metrics.jsonl").read_text()
    lines = [line for line in map(json.loads, log.splitlines()) if "held_out" in line]
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    minutes = [line["seconds"] / 60 for line in lines]
    bits = [line["held_out"] / held_out * diagnostics.BITS_PER_NAT / numbers for line in lines]
    ax.plot(minutes, bits, marker="o", color=plots.BLUE, label="held-out images, one step each")
    ax.axhline(published, color="0.4", linestyle="--", label=f"published {published:g}")
    ax.set(xlabel="minutes of training", ylabel="−K (bits per number)")
    ax.legend(frameon=False)
    return figure


def sheets(
    images: _Images, draws: np.ndarray, shades: tuple[float, float] = (0.0, 1.0), *,
    title: str = "draws of the model", columns: int = 8,
) -> Figure:  # fmt: skip
    """Held-out images beside draws."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.8), layout="constrained")
    low, high = shades
    texts = {"held-out images": images, title: draws}
    for (text, x), ax in zip(texts.items(), axes, strict=True):
        x = np.asarray(x[: columns**2], float)
        plots.images(x, columns=columns, vmin=low, vmax=high, title=text, ax=ax)
    return figure
