"""Linear inverse problems under a mixture of 25 Gaussians, whose posteriors are known.

Prior: Σ_k w_k N(μ_k, I) in d_x dimensions, means (8i, 8j, 8i, 8j, …) with i, j in −2..2, weights
the normalised squares of normals. Measurement: y = A x + σ ε, singular values of A and σ drawn at
random. Posterior and evidence,

    w'_k ∝ w_k N(y; A μ_k, C),   C = A Aᵀ + σ² I,
    μ'_k = μ_k + Aᵀ C⁻¹ (y − A μ_k),   cov' = I − Aᵀ C⁻¹ A,   Z = Σ_k w_k N(y; A μ_k, C),

are closed, and so are denoiser and exact twist: at level t the mixture has means √ᾱ_t μ_k and
covariance I, and x_0 given x_t and k is N(μ_k + √ᾱ_t (x_t − √ᾱ_t μ_k), (1 − ᾱ_t) I).

Metrics, against 2000 exact draws: SW, the mean over 500 random directions of the distance W1
between projections; TV, the total variation between the weights of modes.

Source: the problem law of Cardoso et al. (2023), section 4.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from probdiff import Diffusion, GaussianKernel, readouts, schedules
from probdiff.infer import SMC, Guided, Twist, twists

BETA = schedules.linear(1000, beta_1=1e-4, beta_T=0.02)
STEPS, DRAWS = 100, 2000


class Problem(NamedTuple):
    """Prior, measurement and its outcome."""

    means: np.ndarray
    weights: np.ndarray
    matrix: np.ndarray
    noise: float
    y: np.ndarray


class Posterior(NamedTuple):
    """Weights, means and common covariance of the posterior's components, and log Z."""

    weights: np.ndarray
    means: np.ndarray
    covariance: np.ndarray
    log_z: float


class Score(NamedTuple):
    """How far draws are from the posterior."""

    sw: float
    tv: float
    log_z_error: float
    least_ess: float
    """Least effective number over levels and runs, a share of the particles."""


def problem(seed, dx, dy):
    """Draw a problem."""
    rng = np.random.default_rng(seed)
    corners = [(8.0 * i, 8.0 * j) for i in range(-2, 3) for j in range(-2, 3)]
    means = np.array([np.resize(corner, dx) for corner in corners])
    weights = rng.normal(size=25) ** 2
    weights /= weights.sum()
    u, _, v = np.linalg.svd(rng.normal(size=(dy, dx)), full_matrices=False)
    sizes = np.sort(rng.uniform(size=dy))[::-1]
    noise = rng.uniform() * sizes.max()
    matrix = u @ np.diag(sizes) @ v
    x = means[rng.choice(25, p=weights)] + rng.normal(size=dx)
    return Problem(means, weights, matrix, noise, matrix @ x + noise * rng.normal(size=dy))


def posterior(p):
    """The exact posterior."""
    c = p.matrix @ p.matrix.T + p.noise**2 * np.eye(len(p.y))
    gap = p.y - p.means @ p.matrix.T
    log_w = np.log(p.weights) - 0.5 * np.einsum("ki,ij,kj->k", gap, np.linalg.inv(c), gap)
    log_w -= 0.5 * np.linalg.slogdet(2 * np.pi * c)[1]
    log_z = np.logaddexp.reduce(log_w)
    gain = np.linalg.solve(c, p.matrix)
    covariance = np.eye(p.matrix.shape[1]) - p.matrix.T @ gain
    return Posterior(np.exp(log_w - log_z), p.means + gap @ gain, covariance, log_z)


def draw(rng, q):
    """Exact draws."""
    root = np.linalg.cholesky(q.covariance + 1e-10 * np.eye(len(q.covariance)))
    k = rng.choice(25, p=q.weights, size=DRAWS)
    return q.means[k] + rng.normal(size=(DRAWS, len(root))) @ root.T


def sliced_distance(a, b):
    """SW between two sets of as many draws."""
    u = np.random.default_rng(0).normal(size=(500, a.shape[1]))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    return float(np.mean([np.abs(np.sort(a @ v) - np.sort(b @ v)).mean() for v in u]))


def mode_distance(draws, p, q):
    """TV between the shares of the nearest modes and the posterior's weights."""
    nearest = ((draws[:, None] - p.means) ** 2).sum(-1).argmin(1)
    return float(0.5 * np.abs(np.bincount(nearest, minlength=25) / len(draws) - q.weights).sum())


def diffusion(p):
    """The mixture with its exact denoiser."""
    steps = schedules.steps(BETA)
    means, log_w = jnp.asarray(p.means, jnp.float32), jnp.log(jnp.asarray(p.weights, jnp.float32))

    def network(x_t, t):
        root = jnp.sqrt(steps.at(t, 1).alpha_bar_t)
        gap = x_t[:, None] - root[..., None] * means
        x_k = jax.nn.softmax(log_w - 0.5 * (gap**2).sum(-1), -1) @ means
        return x_k + root * (x_t - root * x_k)

    dx = p.means.shape[1]
    readout = readouts.Data(readouts.BridgeVariance())
    return Diffusion(GaussianKernel(), BETA, network, event_shape=(dx,), readout=readout)


def program(p):
    """The mixture, measured."""
    mean = p.weights @ p.means
    variance = 1 + (p.weights @ p.means**2 - mean**2).mean()
    prior, matrix = diffusion(p).prior({}, variance=variance), jnp.asarray(p.matrix, jnp.float32)

    def measured(y):
        numpyro.sample("y", dist.Normal(matrix @ prior(), p.noise).to_event(1), obs=y)

    return measured


class OptimalTwist(Twist):
    """p(y | x_t), exactly."""

    def __init__(self, p):
        self.problem = Problem(*(jnp.asarray(a, jnp.float32) for a in p))

    def log_psi(self, x_t, view):
        """log Σ_k p(k | x_t) N(y; A E[x_0 | x_t, k], (1 − ᾱ_t) A Aᵀ + σ² I)."""
        p, step = self.problem, view.levels.step(view.i)
        root, noise = jnp.sqrt(step.alpha_bar_t).reshape(()), step.noise_t.reshape(())
        gap = x_t[..., None, :] - root * p.means
        c = noise * p.matrix @ p.matrix.T + p.noise**2 * jnp.eye(len(p.y))
        log_k = jax.nn.log_softmax(jnp.log(p.weights) - 0.5 * (gap**2).sum(-1), -1)
        left = p.y - (p.means + root * gap) @ p.matrix.T
        log_y = -0.5 * jnp.einsum("...i,ij,...j->...", left, jnp.linalg.inv(c), left)
        log_y -= 0.5 * jnp.linalg.slogdet(2 * jnp.pi * c)[1]
        return jax.nn.logsumexp(log_k + log_y, -1)

    def __call__(self, view):
        log_psi, pull_back = jax.vjp(lambda x: self.log_psi(x, view), view.x_t)
        (gradient,) = pull_back(jnp.ones_like(log_psi))
        step = view.levels.step(view.i)
        shift = step.beta * jnp.sqrt(step.alpha_bar_s / step.alpha_bar_t) * gradient
        none = jnp.zeros((0, *shift.shape))
        return twists.Tilt(log_psi, shift, jnp.zeros_like(shift), none)


def floor(seed, dx, dy):
    """Exact draws against exact draws."""
    p = problem(seed, dx, dy)
    q, rng = posterior(p), np.random.default_rng(seed + 1000)
    a, b = draw(rng, q), draw(rng, q)
    return Score(sliced_distance(a, b), mode_distance(a, p, q), 0.0, 1.0)


def run(seed, dx, dy, twist, *, is_weighted=True, steps=STEPS):
    """Score of `SMC`, 2 runs of 1000 particles, or of `Guided`; `twist` of a problem."""
    p = problem(seed, dx, dy)
    q, y = posterior(p), jnp.asarray(p.y, jnp.float32)
    reference = draw(np.random.default_rng(seed + 1000), q)
    if is_weighted:
        sampler = SMC(program(p), num_particles=1000, num_runs=2, twist=twist(p), steps=steps)
    else:
        sampler = Guided(program(p), twist=twist(p), num_samples=DRAWS, steps=steps, check=False)
    sampler.run(jax.random.key(seed), y)
    draws, error, ess = sampler.get_samples()["x_0"], np.nan, np.nan
    if is_weighted:
        error = sampler.log_evidence - q.log_z
        ess = float(sampler.result.outcome.ess.min()) / 1000
    sw, tv = sliced_distance(draws, reference), mode_distance(draws, p, q)
    return Score(sw, tv, float(error), ess)
