"""Training at length on images: one recipe for a CPU and one for a GPU, resumed where it was.

A recipe says how large the network is and how long it learns. The optimiser is Adam behind a limit
on the gradient's norm, its rate warmed up along a line and brought to 0 along a cosine,

    rate(i) = r i/w  for i ≤ w,    r (1 + cos π (i−w)/(n−w))/2  after,

and what is kept is the average of the weights. A run leaves in its folder

    training.safetensors    the checkpoint, every 30 seconds; the same command goes on from it
    metrics.jsonl           step, seconds, loss per image, loss on held-out images
    progress.png            a few draws and the losses so far

so that a run can be stopped at any time, watched while it goes, and cut into pieces.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import xarray as xr
from flax import nnx
from jaxtyping import Array
from matplotlib.figure import Figure
from numpyro.infer import SVI

from probdiff import Diffusion, Fit, diagnostics, fit, networks, plots, sample, save
from probdiff.elbo import SampledTimeELBO, SampledTimeLoss
from probdiff.experiments.report import Row, mean_and_se
from probdiff.train import Progress

CALLS = 50
"""Network calls for a draw that is to be looked at."""
LOG = "metrics.jsonl"


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

    def describe(self) -> str:
        """What a report says of it."""
        heads = f", {self.attention_heads} heads of attention" if self.attention_heads else ""
        return (
            f"U-Net, widths {', '.join(map(str, self.widths))}, depth {self.depth}, patches of "
            f"{self.patch}, head {self.head_width}{heads}"
            + (f", computed in {self.dtype}" if self.dtype else "")
            + f". Training: Adam, {self.num_steps} steps of {self.batch_size} images, learning "
            f"rate {self.learning_rate} after a warm-up of {self.warm_up:.0%}, falling to 0 along "
            f"a cosine; gradient's norm at most {self.clip:g} nats per number; averaged weights "
            f"(decay {self.ema_decay})."
        )


def bits_rows(tree: xr.DataTree, numbers: int, unit: str, published: float) -> list[Row]:
    """Bits per number of images on a grid, whole and in parts, from `diagnostics.sampled_bound`."""
    bound = tree["bound"]
    k, reconstruction, prior = (
        bound[name].values for name in ("bound", "reconstruction", "prior_kl")
    )
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


def curve(out_dir: Path, numbers: int, held_out: int, published: float) -> Figure:
    """Bits of held-out images against minutes of training, from the log."""
    lines = [json.loads(line) for line in (out_dir / LOG).read_text().splitlines()]
    lines = [line for line in lines if "held_out" in line]
    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    minutes = [line["seconds"] / 60 for line in lines]
    bits = [line["held_out"] / held_out * diagnostics.BITS_PER_NAT / numbers for line in lines]
    ax.plot(minutes, bits, marker="o", color=plots.BLUE, label="held-out images, one step each")
    ax.axhline(published, color="0.4", linestyle="--", label=f"published {published:g}")
    ax.set(xlabel="minutes of training", ylabel="−K (bits per number)")
    ax.legend(frameon=False)
    return figure


def sheets(
    images: np.ndarray, draws: np.ndarray, shades: tuple[float, float], *, calls: int
) -> Figure:
    """Held-out images beside draws."""
    figure = plt.figure(figsize=(9, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    low, high = shades
    texts = {"held-out images": images, f"draws, {calls} network calls each": draws}
    for (title, x), ax in zip(texts.items(), (left, right), strict=True):
        x = np.asarray(x[:64], float)
        plots.images(x, columns=8, vmin=low, vmax=high, title=title, ax=ax)
    return figure


class Learned(NamedTuple):
    """A model that was trained, and its bound on test images."""

    diffusion: Diffusion
    fitted: Fit
    tree: xr.DataTree
    key: Array
    """Randomness that is left, for draws."""


def learn(
    seed: int,
    define: Callable[[nnx.Rngs], Diffusion],
    images: np.ndarray,
    held_out: np.ndarray,
    test: np.ndarray,
    recipe: Recipe,
    out_dir: Path,
    *,
    num_times: int,
    shades: tuple[float, float],
    objective: SampledTimeLoss | None = None,
    progress: bool,
    say: Callable[[str], None],
) -> Learned:
    """Train by a recipe, save the model, and bound test images.

    Args:
        seed: Seeds everything.
        define: Makes the diffusion.
        images: To learn from, the user's units.
        held_out: To bound on the way.
        test: To bound at the end.
        recipe: How.
        out_dir: Folder of the run, made if absent; a checkpoint in it is gone on from.
        num_times: Random steps at which K of a test image is estimated.
        shades: Values of a pixel shown black and white.
        objective: The loss; the bound if absent.
        progress: Show bars.
        say: Told what is being done.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    key_init, key_fit, key_bound, key_draw = jax.random.split(jax.random.key(seed), 4)
    diffusion = define(nnx.Rngs(jax.random.bits(key_init).item()))
    say("train the diffusion")
    fitted = train(
        key_fit, diffusion, images, held_out, recipe, out_dir, shades=shades,
        objective=objective, progress=progress,
    )  # fmt: skip
    save(out_dir, diffusion, fitted.params)
    say("bound the test images")
    tree = diagnostics.sampled_bound(
        key_bound, diffusion, fitted.params, test, num_times=num_times, progress=progress
    )
    return Learned(diffusion, fitted, tree, key_draw)


def train(
    key: Array,
    diffusion: Diffusion,
    images: np.ndarray,
    held_out: np.ndarray,
    recipe: Recipe,
    out_dir: Path,
    *,
    shades: tuple[float, float],
    objective: SampledTimeLoss | None = None,
    progress: bool,
) -> Fit:
    """Fit a diffusion by a recipe, on from what is in the folder.

    Args:
        key: Randomness of the fit; the draws on the way use it too.
        diffusion: The model.
        images: To learn from, the user's units.
        held_out: To bound on the way.
        recipe: How.
        out_dir: Folder of the run.
        shades: Values of a pixel shown black and white.
        objective: The loss; the bound if absent.
        progress: Show a bar.
    """
    numbers = math.prod(diffusion.event_shape)
    svi = SVI(
        diffusion.model,
        diffusion.guide,
        recipe.optimiser(numbers),
        SampledTimeELBO() if objective is None else objective,
    )
    return fit(
        key,
        svi,
        images,
        num_steps=recipe.num_steps,
        batch_size=recipe.batch_size,
        ema_decay=recipe.ema_decay,
        held_out=held_out,
        evaluate_every=max(1, recipe.num_steps // recipe.evaluations),
        checkpoint=out_dir / "training.safetensors",
        log=out_dir / LOG,
        callback=_Painter(key, diffusion, recipe.batch_size, len(held_out), shades, out_dir),
        progress=progress,
    )


class _Painter(NamedTuple):
    """Draws of the model and the losses so far, as `progress.png`."""

    key: Array
    diffusion: Diffusion
    batch_size: int
    held_out: int
    shades: tuple[float, float]
    out_dir: Path

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
        figure.savefig(self.out_dir / "progress.png", dpi=120)
        plt.close(figure)
