"""Denoising points of a roll: SMC beside brute force.

Points x are seen as y = x + ε with noise of sd 0.5, as wide as the gap between the roll's turns, so
that a posterior lies on several of them. In the plane the right answer can be had by force, from
many draws x_m of the model and w_m = p(y | x_m):

    p(y) ≈ (1/M) Σ_m w_m,    E[x | y] ≈ Σ_m w_m x_m / Σ_m w_m,

to which SMC must come with a few hundred particles.

Source: Sohl-Dickstein et al. (2015), section 2.5 and appendix C.
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array
from matplotlib.figure import Figure

from probdiff import Diffusion, infer, plots, sample
from probdiff.experiments.report import Row, mean_and_se
from probdiff.types import Params

SIGMA = 0.5
SHOWN = 6


class Denoised(NamedTuple):
    """Posteriors of points."""

    truth: np.ndarray
    y: np.ndarray
    draws: np.ndarray
    """Of the posteriors, `(draws, points, 2)`."""
    prior: np.ndarray
    """Draws of the model."""
    mean: np.ndarray
    mean_by_force: np.ndarray
    log_evidence: np.ndarray
    log_evidence_se: np.ndarray
    by_force: np.ndarray
    """log p(y) by force."""
    by_force_se: np.ndarray


def denoise(
    key: Array, diffusion: Diffusion, params: Params, x: Any, *, num_draws: int, num_particles: int
) -> Denoised:
    """See points under noise, and infer them by SMC and by force.

    Args:
        key: Randomness.
        diffusion: A trained model of the roll.
        params: Its parameters.
        x: The true points.
        num_draws: Draws of the model, for force.
        num_particles: Particles of each of four runs.
    """
    key_noise, key_smc, key_draw = jax.random.split(key, 3)
    prior, x = diffusion.prior(params), np.asarray(x)
    y = x + SIGMA * np.asarray(jax.random.normal(key_noise, x.shape))

    def program(y: Any) -> None:
        with numpyro.plate("point", len(x)):
            numpyro.sample("y", dist.Normal(prior(), SIGMA).to_event(1), obs=y)

    smc = infer.SMC(program, num_particles=num_particles, num_runs=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", infer.InferenceWarning)  # the table tells
        smc.run(key_smc, y)
    draws = smc.get_samples()["x_0"]
    from_model = sample.ancestral(key_draw, diffusion, params, num_draws)
    by_force, se, mean_by_force = force(y, from_model)
    return Denoised(
        x, y, draws, from_model, draws.mean(0), mean_by_force, np.asarray(smc.log_evidence),
        np.asarray(smc.log_evidence_se), by_force, se,
    )  # fmt: skip


def force(y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log p(y), its standard error and E[x | y] of each y, from draws x of the prior."""
    log_w = jax.vmap(lambda y: dist.Normal(jnp.asarray(x), SIGMA).to_event(1).log_prob(y))(y)
    log_w = np.asarray(log_w, np.float64)
    top = log_w.max(1, keepdims=True)
    w = np.exp(log_w - top)
    mean = w.mean(1)
    se = w.std(1, ddof=1) / np.sqrt(len(x)) / mean
    return np.log(mean) + top[:, 0], se, w @ x / w.sum(1, keepdims=True)


def denoising_rows(found: Denoised) -> list[Row]:
    """Lines of the table."""
    apart = mean_and_se(found.log_evidence - found.by_force)
    allowed = np.hypot(found.log_evidence_se, found.by_force_se)
    rows = [
        Row("denoising: log evidence, SMC − by force", *apart, "nats per point", 0.0),
        Row("denoising: error of log evidence by SMC, median", np.median(found.log_evidence_se),
            None, "nats"),
        Row("denoising: difference over its error, root mean square",
            float(np.sqrt(np.mean(((found.log_evidence - found.by_force) / allowed) ** 2)))),
    ]  # fmt: skip
    for name, mean in {"SMC": found.mean, "by force": found.mean_by_force, "y": found.y}.items():
        square, se = mean_and_se(np.mean((mean - found.truth) ** 2, 1))
        root = np.sqrt(square)
        rows.append(Row(f"denoising: RMSE, {name}", root, se / (2 * root), "scaled units"))
    return rows


def denoising_figure(found: Denoised) -> Figure:
    """Posterior draws of the first points, on draws of the model."""
    figure = plt.figure(figsize=(10, 6.6), layout="constrained")
    for i, ax in enumerate(figure.subplots(2, SHOWN // 2).flat):
        plots.posterior_points(
            found.draws[:, i], truth=found.truth[i], observation=found.y[i],
            behind=found.prior[:2000], ax=ax,
        )  # fmt: skip
        if i < SHOWN - 1:
            ax.get_legend().remove()
    return figure
