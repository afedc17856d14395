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

Problems of one size differ by weights, A, σ and y alone. They reach the program as one array, the
prior's context, so that what is compiled for a size and a twist serves all its problems; the means,
and the covariance Σ of x_0 that twists are told, that of even weights, are common to them.

Source: the problem law of Cardoso et al. (2023), section 4.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from probdiff import Diffusion, GaussianKernel, readouts, schedules
from probdiff.infer import SMC, Guided, Twist
from probdiff.infer.spread import PERFECT, spread
from probdiff.infer.twist import Tilt

BETA = schedules.linear(1000, beta_1=1e-4, beta_T=0.02)
STEPS, DRAWS = 100, 2000


class Problem(NamedTuple):
    """Weights of the prior, measurement and its outcome."""

    weights: Any
    matrix: Any
    noise: Any
    y: Any


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


def widest(covariance):
    """Variance along the widest direction: 64 dx + 1, where an entry has 129."""
    return np.linalg.eigvalsh(covariance).max()


def of_entries(covariance):
    """Mean variance of an entry."""
    return np.diag(covariance).mean()


def whole(covariance):
    """All of Σ."""
    return covariance


@dataclasses.dataclass(frozen=True)
class Method:
    """How the posterior is drawn from."""

    twist: Twist
    is_weighted: bool = True
    """`SMC`, 2 runs of 1000 particles, or `Guided`."""
    variance: Callable[[np.ndarray], Any] = widest
    """What the prior is told of the covariance Σ of x_0."""


def means(dx):
    """μ_k, `(25, dx)`."""
    corners = [(8.0 * i, 8.0 * j) for i in range(-2, 3) for j in range(-2, 3)]
    return np.array([np.resize(corner, dx) for corner in corners])


def problem(seed, dx, dy):
    """Draw a problem."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=25) ** 2
    weights /= weights.sum()
    u, _, v = np.linalg.svd(rng.normal(size=(dy, dx)), full_matrices=False)
    sizes = np.sort(rng.uniform(size=dy))[::-1]
    noise = rng.uniform() * sizes.max()
    matrix = u @ np.diag(sizes) @ v
    x = means(dx)[rng.choice(25, p=weights)] + rng.normal(size=dx)
    return Problem(weights, matrix, noise, matrix @ x + noise * rng.normal(size=dy))


def packed(p):
    """A problem as one array."""
    return jnp.concatenate([jnp.ravel(jnp.asarray(part, jnp.float32)) for part in p])


def unpacked(values, dx):
    """The problem that was packed; `values` may have leading axes."""
    dy = (values.shape[-1] - 26) // (dx + 1)
    ends = np.cumsum([25, dy * dx, 1])
    weights, matrix, noise, y = jnp.split(values, ends, axis=-1)
    return Problem(weights, matrix.reshape(*matrix.shape[:-1], dy, dx), noise[..., 0], y)


def posterior(p):
    """The exact posterior."""
    c = p.matrix @ p.matrix.T + p.noise**2 * np.eye(len(p.y))
    mu = means(p.matrix.shape[1])
    gap = p.y - mu @ p.matrix.T
    log_w = np.log(p.weights) - 0.5 * np.einsum("ki,ij,kj->k", gap, np.linalg.inv(c), gap)
    log_w -= 0.5 * np.linalg.slogdet(2 * np.pi * c)[1]
    log_z = np.logaddexp.reduce(log_w)
    gain = np.linalg.solve(c, p.matrix)
    covariance = np.eye(p.matrix.shape[1]) - p.matrix.T @ gain
    return Posterior(np.exp(log_w - log_z), mu + gap @ gain, covariance, log_z)


def draw(rng, q):
    """Exact draws."""
    root = np.linalg.cholesky(q.covariance + 1e-10 * np.eye(len(q.covariance)))
    k = rng.choice(25, p=q.weights, size=DRAWS)
    return q.means[k] + rng.normal(size=(DRAWS, len(root))) @ root.T


def sliced_distance(a, b):
    """SW between two sets of as many draws."""
    u = np.random.default_rng(0).normal(size=(500, a.shape[1]))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    return float(np.mean(np.abs(np.sort(a @ u.T, 0) - np.sort(b @ u.T, 0))))


def mode_distance(draws, q):
    """TV between the shares of the nearest modes and the posterior's weights."""
    mu = means(draws.shape[1])
    nearest = ((mu**2).sum(1) - 2 * draws @ mu.T).argmin(1)
    return float(0.5 * np.abs(np.bincount(nearest, minlength=25) / len(draws) - q.weights).sum())


def log_components(weights, x_t, step):
    """log p(k | x_t), `(B, 25)`; the square of x_t − √ᾱ_t μ_k multiplied out, |x_t|² cancels."""
    mu, root = jnp.asarray(means(x_t.shape[-1]), jnp.float32), jnp.sqrt(step.alpha_bar_t)
    log_likelihood = root * (x_t @ mu.T) - 0.5 * step.alpha_bar_t * (mu**2).sum(-1)
    return jax.nn.log_softmax(jnp.log(weights) + log_likelihood, -1)


def diffusion(dx, dy):
    """The mixture with its exact denoiser; its context is a packed problem."""
    steps = schedules.steps(BETA)

    def network(x_t, t, context):
        step = steps.at(t, 1)
        log_k = log_components(unpacked(context, dx).weights, x_t, step)
        x_k = jnp.exp(log_k) @ jnp.asarray(means(dx), jnp.float32)
        return step.noise_t * x_k + jnp.sqrt(step.alpha_bar_t) * x_t

    readout, size = readouts.Data(readouts.BridgeVariance()), 26 + dy * (dx + 1)
    return Diffusion(
        GaussianKernel(), BETA, network, event_shape=(dx,), readout=readout, context_shape=(size,)
    )


def program(dx, dy, variance=widest):
    """The mixture, measured, as a program of a packed problem."""
    covariance = np.eye(dx) + np.cov(means(dx).T, bias=True)
    prior = diffusion(dx, dy).prior({}, variance=variance(covariance))

    def measured(context):
        p, x_0 = unpacked(context, dx), prior(context=context)
        numpyro.sample("y", dist.Normal(p.matrix @ x_0, p.noise).to_event(1), obs=p.y)

    return measured


class OptimalTwist(Twist):
    """p(y | x_t) of the diffusion that is walked, and the proposal that it makes exact within k.

    The variance of x_0 given x_t and k is what a diffusion with data N(·, I) has: 1 − ᾱ_t but where
    steps are long.
    """

    def __call__(self, view):
        reverse, d = view.problem.reverse, view.problem.size
        variance = spread(view.problem, PERFECT, np.ones(d)).variance[:, 0]
        p = unpacked(reverse.context, d)
        w_t, w_s = variance[view.t - 1], variance[view.t - 2]
        nearer = reverse.steps.at(view.t - 1, 1)
        log_psi = log_likelihood(p, view.x_t, view.step, w_t)
        gradient = jax.grad(lambda x: log_likelihood(p, x, nearer, w_s).sum())(view.mean)
        v, step = view.variance.ravel()[0], view.step
        root = jnp.linalg.cholesky(covariance_of_y(p, w_s))
        rows = jnp.sqrt(step.alpha_bar_s) * jax.scipy.linalg.solve_triangular(
            root, p.matrix, lower=True
        )
        narrowed = jnp.linalg.inv(jnp.eye(rows.shape[1]) + v * rows.T @ rows)
        factors = jnp.broadcast_to(rows[:, None, None], (len(rows), *view.x_t.shape))
        none = jnp.zeros_like(view.x_t)
        return Tilt(log_psi, v * gradient @ narrowed, none, factors)


def covariance_of_y(p, variance):
    """Cov[y | x_t, k] for x_0 of this variance given x_t and k."""
    return variance * p.matrix @ p.matrix.T + p.noise**2 * jnp.eye(len(p.y))


def log_likelihood(p, x_t, step, variance):
    """log p(y | x_t) = log Σ_k p(k | x_t) N(y; A E[x_0 | x_t, k], Cov[y | x_t, k])."""
    mu = jnp.asarray(means(x_t.shape[-1]), jnp.float32)
    c = covariance_of_y(p, variance)
    left = p.y - (jnp.sqrt(step.alpha_bar_t) * x_t) @ p.matrix.T
    left = left[..., None, :] - step.noise_t * mu @ p.matrix.T
    log_y = -0.5 * jnp.einsum("...i,ij,...j->...", left, jnp.linalg.inv(c), left)
    log_y -= 0.5 * jnp.linalg.slogdet(2 * jnp.pi * c)[1]
    return jax.nn.logsumexp(log_components(p.weights, x_t, step) + log_y, -1)


def floor(seed, dx, dy):
    """Exact draws against exact draws."""
    q, rng = posterior(problem(seed, dx, dy)), np.random.default_rng(seed + 1000)
    a, b = draw(rng, q), draw(rng, q)
    return Score(sliced_distance(a, b), mode_distance(a, q), 0.0, 1.0)


@functools.cache
def sampler(dx, dy, method, steps):
    """One sampler for all problems of a size, compiled once."""
    measured = program(dx, dy, method.variance)
    if method.is_weighted:
        return SMC(measured, num_particles=1000, num_runs=2, twist=method.twist, steps=steps)
    return Guided(measured, twist=method.twist, num_samples=DRAWS, steps=steps, check=False)


def run(seed, dx, dy, method, *, steps=STEPS):
    """Score of a method on a drawn problem."""
    return judge(problem(seed, dx, dy), method, seed, steps=steps)


def judge(p, method, seed, *, steps=STEPS):
    """Score of a method on a problem."""
    q, infer = posterior(p), sampler(*p.matrix.shape[::-1], method, steps)
    infer.run(jax.random.key(seed), packed(p))
    draws, error, ess = infer.get_samples()["x_0"].astype(np.float64), np.nan, np.nan
    if method.is_weighted:
        error = infer.log_evidence - q.log_z
        ess = float(infer.result.outcome.trace.ess.min()) / 1000
    reference = draw(np.random.default_rng(seed + 1000), q)
    return Score(sliced_distance(draws, reference), mode_distance(draws, q), float(error), ess)
