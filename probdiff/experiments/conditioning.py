"""Posteriors of images: what is observed, what is inferred, and what tells that it is right.

Each task measures an image linearly and infers the rest by SMC, with σ the data's overall sd:

    denoising           y = x + σ ε                             all pixels are inferred
    inpainting          y = upper half of x, known exactly      the lower half is inferred
    super-resolution    y = means of 2 × 2 blocks + σ/20 · ε    all pixels are inferred

Where truths x are draws of the prior itself, the rank of a pixel among its posterior draws is
uniform and a central 90 % interval holds it 90 % of the time, whatever the model. With weights W_i
of effective number n = 1/Σ W_i², and V uniform on [0, 1),

    u = (n Σ_i W_i 1[x_i < x] + V (n Σ_i W_i 1[x_i = x] + 1)) / (n + 1)

is uniform for n equal weights and n + 1 exchangeable values, on a grid too; a pixel is covered
where 0.05 < u < 0.95. Pixels of one image are not independent: errors are over images.

Beside it stands the Gaussian with the training images' mean m and covariance C, in closed form:

    E[x | y] = m + C Aᵀ (A C Aᵀ + s² I)⁻¹ (y − A m),    log p(y) = log N(y; A m, A C Aᵀ + s² I).

Source: Cook, Gelman and Rubin (2006) and Talts et al. (2018) for ranks.
"""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray as xr
from jaxtyping import Array, Float
from matplotlib.figure import Figure
from scipy.stats import multivariate_normal

from probdiff import Diffusion, Prior, infer, plots
from probdiff.experiments import TABLE, find
from probdiff.experiments.report import Row, Run, mean_and_se, root_mean_square
from probdiff.types import Params

SHOWN, _SHOWN_DRAWS = 8, 6
_DEQUANTISED = 1 / 12
"""Variance of U: what a pixel has whose level never changes."""
_INSIDE = 0.9
_NAMES = {"digits": "held-out digits", "draws": "draws of the model"}
COVERAGE = "inside 90 % intervals"
LEVELS, NATS = "grey levels", "nats per image"

Images = Float[Array | np.ndarray, "_ side side"]
_Measure = Callable[[Array | np.ndarray], Array | np.ndarray]


class Task(NamedTuple):
    """One way to observe an image."""

    measure: _Measure
    """What is measured of images `(..., side, side)`; linear."""
    noise: float
    """Standard deviation of a measurement; 0 where it is exact."""
    program: Callable[[Any], None]
    """What is conditioned, a function of the observations."""
    unseen: np.ndarray
    """True where a pixel is inferred, `(side, side)`."""

    @property
    def matrix(self) -> Float[np.ndarray, "m pixels"]:
        """A of y = A x + noise."""
        pixels = self.unseen.size
        basis = self.measure(np.eye(pixels).reshape(pixels, *self.unseen.shape))
        return np.asarray(basis, np.float64).reshape(pixels, -1).T

    def observe(self, key: Array, x: Images) -> Array:
        """Observations of images."""
        y = self.measure(jnp.asarray(x))
        return y + self.noise * jax.random.normal(key, y.shape)


def denoising(prior: Prior, sigma: float) -> Task:
    """Noise of sd σ on every pixel."""
    return _under_noise(prior, lambda x: x, sigma)


def super_resolution(prior: Prior, sigma: float) -> Task:
    """Means of blocks of 2 × 2 pixels, with noise of sd σ."""
    return _under_noise(prior, block_means, sigma)


def _under_noise(prior: Prior, measure: _Measure, sigma: float) -> Task:
    def program(y: Array | np.ndarray) -> None:
        with numpyro.plate("image", len(y)):
            numpyro.sample("y", dist.Normal(measure(prior()), sigma).to_event(2), obs=y)

    return Task(measure, sigma, program, np.ones(prior.reverse.event_shape, bool))


def inpainting(prior: Prior) -> Task:
    """The upper half as it is, nothing of the lower."""
    shape = prior.reverse.event_shape
    half = shape[0] // 2
    is_known = np.broadcast_to(np.arange(shape[0])[:, None] < half, shape)

    def program(y: Array | np.ndarray) -> None:
        known = jnp.concatenate([y, jnp.zeros_like(y)], -2)
        with numpyro.plate("image", len(y)):
            prior(known=known, mask=np.broadcast_to(is_known, known.shape))

    return Task(lambda x: x[..., :half, :], 0.0, program, ~is_known)


def block_means(x: Array | np.ndarray) -> Array | np.ndarray:
    """Means of blocks of 2 × 2 pixels."""
    *lead, height, width = x.shape
    return x.reshape(*lead, height // 2, 2, width // 2, 2).mean((-3, -1))


class Gaussian(NamedTuple):
    """A Gaussian law of images."""

    mean: Float[np.ndarray, "side side"]
    covariance: Float[np.ndarray, "pixels pixels"]

    @property
    def is_constant(self) -> np.ndarray:
        """Pixels whose level varies less than the noise that dequantises it, `(side, side)`."""
        return (np.diag(self.covariance) < 2 * _DEQUANTISED).reshape(self.mean.shape)

    def given(self, task: Task, y: Array | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """E[x | y] and log p(y) of each observation."""
        A, flat = task.matrix, np.asarray(y, np.float64).reshape(len(y), -1)
        covariance = A @ self.covariance @ A.T + task.noise**2 * np.eye(len(A))
        gain = np.linalg.solve(covariance, A @ self.covariance).T
        expected = A @ self.mean.ravel()
        mean = self.mean.ravel() + (flat - expected) @ gain.T
        log_p = multivariate_normal(expected, covariance).logpdf(flat)
        return mean.reshape(-1, *self.mean.shape), np.atleast_1d(log_p)


def gaussian_of(images: Images, *, offset: float = 0.5) -> Gaussian:
    """Mean and covariance of images of levels once they are dequantised, which needs no U.

    Args:
        images: Levels.
        offset: Mean of U; 0 for images that stay on their levels, each the middle of its cell.
    """
    images = np.asarray(images, np.float64)
    flat = images.reshape(len(images), -1)
    covariance = np.cov(flat, rowvar=False) + _DEQUANTISED * np.eye(flat.shape[1])
    return Gaussian(images.mean(0) + offset, covariance)


def prior_of(diffusion: Diffusion, params: Params, gaussian: Gaussian) -> Prior:
    """The trained model, told the covariance of its data."""
    with warnings.catch_warnings():  # the covariance is the data's: a quick run's network is not
        warnings.filterwarnings("ignore", "variance is a covariance that does not fit the prior")
        return diffusion.prior(params, variance=gaussian.covariance / diffusion.scale**2)


def sampler(task: Task, *, num_particles: int, num_runs: int, progress: bool = False) -> infer.SMC:
    """SMC of a task, its twist with a direction for each measurement where these mix pixels."""
    is_mixed = 0 < len(task.matrix) < task.unseen.size and task.noise > 0
    twist = infer.LaplaceTwist(rank=len(task.matrix)) if is_mixed else infer.LaplaceTwist()
    options = {"num_particles": num_particles, "num_runs": num_runs, "progress": progress}
    return infer.SMC(task.program, twist=twist, **options)


class Posterior(NamedTuple):
    """What was inferred of B images of which the truth is known, grey levels."""

    truth: Float[np.ndarray, "B side side"]
    y: Float[np.ndarray, "B ..."]
    mean: Float[np.ndarray, "B side side"]
    sd: Float[np.ndarray, "B side side"]
    rank: Float[np.ndarray, "B side side"]
    """u of every pixel, uniform where the truth came from the prior."""
    tree: xr.DataTree
    """All of the run."""
    health: Any
    """Measures of the run, image by image."""
    complaints: tuple[str, ...]
    """What was warned of."""


def posterior(key: Array, smc: infer.SMC, task: Task, x: Images) -> Posterior:
    """Observe images and infer them, all at once.

    Args:
        key: Randomness of the noise, of SMC and of the ranks.
        smc: What `sampler` made of the task; compiled once for runs of as many images.
        task: What is observed.
        x: The truths: densities (dequantised), or levels where the last step is on a grid.
    """
    key_noise, key_smc, key_rank = jax.random.split(key, 3)
    x = np.asarray(x)
    y = np.asarray(task.observe(key_noise, x))
    with warnings.catch_warnings(action="ignore", category=infer.InferenceWarning):
        smc.run(key_smc, y)  # what it warns of stands in the report
    sites, log_w = smc.get_weighted_samples()
    weights, draws = np.exp(log_w.astype(np.float64)), sites["x_0"].astype(np.float64)
    mean = np.einsum("mb,mbij->bij", weights, draws)
    sd = np.sqrt(np.einsum("mb,mbij->bij", weights, (draws - mean) ** 2))
    uniform = np.asarray(jax.random.uniform(key_rank, x.shape))
    ranks = rank(draws, weights, x, uniform)
    result = smc.result
    return Posterior(x, y, mean, sd, ranks, smc.to_datatree(), result.health, result.complaints)


def rank(
    draws: Float[np.ndarray, "draws images *event"],
    weights: Float[np.ndarray, "draws images"],
    truth: Float[np.ndarray, "images *event"],
    uniform: Float[np.ndarray, "images *event"],
) -> Float[np.ndarray, "images *event"]:
    """u of each number of each truth; see the file's docstring.

    Args:
        draws: Particles.
        weights: Their weights, which sum to one over the draws.
        truth: The truths.
        uniform: V.
    """
    n = (1 / np.sum(weights**2, 0)).reshape(-1, *[1] * (truth.ndim - 1))
    is_so = (compare(draws, truth) for compare in (np.less, np.equal))
    below, equal = (np.einsum("mb,mb...->b...", weights, there) for there in is_so)
    return (n * below + uniform * (n * equal + 1)) / (n + 1)


def coverage(
    ranks: Float[np.ndarray, "images *event"], is_counted: np.ndarray
) -> tuple[float, float]:
    """Share of counted numbers inside their central 90 % interval; error over images."""
    is_inside = np.abs(ranks - 0.5) < 0.5 - (1 - _INSIDE) / 2
    return mean_and_se(is_inside[:, is_counted].mean(1))


def rows(name: str, task: Task, found: Posterior, gaussian: Gaussian) -> list[Row]:
    """Lines of a table: coverage, errors, evidence, and what the sampler says of itself.

    `name` is what the truths are, and `gaussian` that of the training images.
    """
    constant, health = task.unseen & gaussian.is_constant, found.health
    counted = {"": task.unseen & ~constant, f", {constant.sum()} constant pixels": constant}
    guess, log_p = gaussian.given(task, found.y)
    wrong, of_guess = ((m - found.truth)[:, task.unseen] for m in (found.mean, guess))
    gain = np.mean(wrong**2, 1) - np.mean(of_guess**2, 1)
    log_z = found.tree["smc"]["log_evidence"].values.astype(np.float64)
    with np.errstate(invalid="ignore"):  # −inf where all weights are zero
        evidence, advantage = mean_and_se(log_z), mean_and_se(log_z - log_p)
    spread, ess = "spread of log evidence over runs", "least effective number"
    lines = [
        *(Row(f"{COVERAGE}{text}", *coverage(found.rank, pixels), "share", _INSIDE)
          for text, pixels in counted.items() if pixels.any()),
        Row("RMSE of the posterior mean", *root_mean_square(wrong), LEVELS),
        Row("RMSE of the Gaussian's posterior mean", *root_mean_square(of_guess), LEVELS),
        Row("mean square, posterior − Gaussian, paired", *mean_and_se(gain), f"{LEVELS}²"),
        Row("log evidence", *evidence, NATS),
        Row("log evidence of the Gaussian", *mean_and_se(log_p), NATS),
        Row("log evidence − the Gaussian's, paired", *advantage, NATS),
        Row(f"{spread}, median", np.median(health.spread), None, "nats"),
        Row(f"{spread}, worst", health.spread.max(), None, "nats"),
        Row(f"{ess}, median", np.median(health.least_ess), None, "share"),
        Row(f"{ess}, worst", health.least_ess.min(), None, "share"),
    ]  # fmt: skip
    return [row._replace(row=f"{name}: {row.row}") for row in lines]


def short_rows(name: str, task: Task, found: Posterior, gaussian: Gaussian) -> list[Row]:
    """Of `rows` the coverage of pixels that vary, and both errors."""
    lines = rows(name, task, found, gaussian)
    return [row for row in lines if row.unit == LEVELS or row.row == f"{name}: {COVERAGE}"]


def infer_all(
    run: Run, keys: Array, smc: infer.SMC, task: Task, truths: dict[str, Images], gaussian: Gaussian
) -> tuple[dict[str, Posterior], list[Row], str]:
    """Posteriors of every kind of truth, lines of the table, and what the samplers warned of."""
    found = {}
    for key, (name, x) in zip(keys, truths.items(), strict=True):
        run.say(f"infer {len(x)} {_NAMES[name]}")
        began = time.monotonic()
        found[name] = posterior(key, smc, task, x)
        run.say(f"{(time.monotonic() - began) / len(x):.1f} s per image")
    lines = [row for kind, p in found.items() for row in rows(_NAMES[kind], task, p, gaussian)]
    texts = [f"- {_NAMES[kind]}: {text}" for kind, p in found.items() for text in p.complaints]
    return found, lines, "\n".join(texts) or "None."


def trained(run: Run, name: str) -> Path:
    """Folder of the trained model of an experiment, which is run now where there is none."""
    if run.model is not None:
        return run.model
    default = Path("runs") / name
    if (default / "config.json").is_file():
        return default
    # what a quick run trains must not stand where a trained model is looked for
    folder = run.out_dir / name if run.quick else default
    run.say(f"no model in {default}: train one first, in {folder} ({TABLE[name].duration})")
    options = {"recipe": run.recipe} if TABLE[name].has_gpu else {}
    find(name).run(
        folder, seed=run.seed, quick=run.quick, progress=run.progress, say=run.say, **options
    )
    return folder


def few(found: Posterior, count: int) -> xr.DataTree:
    """The first posteriors as a DataTree of a size to keep."""
    return found.tree.isel(image=slice(count), missing_dims="ignore")


def trust(found: Posterior) -> Figure:
    """Effective number at each level, and log evidence of each run."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    plots.ess_trace(found.tree, ax=left)
    plots.evidence(few(found, 20), ax=right)
    return figure


def sheet(found: Posterior, *, vmax: float = 17.0) -> Figure:
    """Truth, observation, draws, mean and sd, an image a row."""
    y = found.y[:SHOWN]
    if y.shape[1] < y.shape[2]:  # the rows below were not observed
        y = np.concatenate([y, np.full_like(y, np.nan)], 1)
    draws = found.tree["posterior"]["x_0"].values[0, :, :SHOWN]
    truth, mean, sd = (a[:SHOWN] for a in (found.truth, found.mean, found.sd))
    axes = plots.posterior_images(truth, y, draws, mean, sd, num_draws=_SHOWN_DRAWS, vmax=vmax)
    return axes[0, 0].figure
