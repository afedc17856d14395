"""Gaussian mixtures of which half the entries are known: posteriors in closed form.

Prior: Σ_k w_k N(μ_k, Σ) in d dimensions, Σ_ij = exp(−|i − j|/8), scaled to unit mean variance.
Known entries a of x, the others b:

    w'_k ∝ w_k N(a; μ_k^a, Σ_aa),   μ'_k = μ_k^b + Σ_ba Σ_aa⁻¹ (a − μ_k^a),
    Σ' = Σ_bb − Σ_ba Σ_aa⁻¹ Σ_ab,   Z = Σ_k w_k N(a; μ_k^a, Σ_aa).

`one` has three components so near that the posterior has one mode; in `two`, two components differ
by 6 posterior standard deviations in one hidden direction and in nothing that is known, so that the
posterior has the weights 0.7 and 0.3 of the prior.

The diffusion has the exact denoiser: on the axes of Σ, with eigenvalues λ, the components of x_t
have means √ᾱ_t μ_k and variances ᾱ_t λ + 1 − ᾱ_t.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro

from probdiff import Diffusion, GaussianKernel, readouts, schedules

D = 64
IS_KNOWN = np.arange(D) % 2 == 0


class Mixture(NamedTuple):
    """Weights, means and common covariance."""

    weights: np.ndarray
    means: np.ndarray
    covariance: np.ndarray


class Posterior(NamedTuple):
    """Of the hidden entries, and log Z."""

    weights: np.ndarray
    means: np.ndarray
    covariance: np.ndarray
    log_z: float

    @property
    def mean(self) -> np.ndarray:
        return self.weights @ self.means

    @property
    def sd(self) -> np.ndarray:
        second = self.weights @ (self.means**2) + np.diag(self.covariance)
        return np.sqrt(second - self.mean**2)


def mixture(kind: str) -> Mixture:
    """`one` or `two` modes."""
    places = np.arange(D)
    covariance = np.exp(-np.abs(places[:, None] - places) / 8.0)
    if kind == "one":
        means = (
            1.0
            * np.random.default_rng(7).standard_normal((3, D))
            @ np.linalg.cholesky(covariance).T
        )
        return _scaled(Mixture(np.array([0.5, 0.3, 0.2]), means, covariance))
    hidden = ~IS_KNOWN
    rest = _conditional(covariance)[1]
    values, vectors = np.linalg.eigh(rest)
    shift = np.zeros(D)
    shift[hidden] = 6 * np.sqrt(values[-1]) * vectors[:, -1]
    means = np.stack([-0.3 * shift, 0.7 * shift])
    return _scaled(Mixture(np.array([0.7, 0.3]), means, covariance))


def _scaled(m: Mixture) -> Mixture:
    mean = m.weights @ m.means
    variance = np.diag(whole(m)).mean()
    return Mixture(m.weights, (m.means - mean) / np.sqrt(variance), m.covariance / variance)


def whole(m: Mixture) -> np.ndarray:
    """Covariance of all components together."""
    gap = m.means - m.weights @ m.means
    return m.covariance + (gap.T * m.weights) @ gap


def _conditional(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gain and covariance of hidden entries given known ones."""
    a, b = IS_KNOWN, ~IS_KNOWN
    gain = np.linalg.solve(covariance[np.ix_(a, a)], covariance[np.ix_(a, b)]).T
    return gain, covariance[np.ix_(b, b)] - gain @ covariance[np.ix_(a, b)]


def posterior(m: Mixture, x: np.ndarray) -> Posterior:
    """Given the known entries of x."""
    a, b = IS_KNOWN, ~IS_KNOWN
    gap = x[a] - m.means[:, a]
    of_known = m.covariance[np.ix_(a, a)]
    log_w = np.log(m.weights) - 0.5 * np.einsum("ki,ki->k", gap, np.linalg.solve(of_known, gap.T).T)
    log_w -= 0.5 * np.linalg.slogdet(2 * np.pi * of_known)[1]
    log_z = np.logaddexp.reduce(log_w)
    gain, rest = _conditional(m.covariance)
    return Posterior(np.exp(log_w - log_z), m.means[:, b] + gap @ gain.T, rest, log_z)


def draw(rng: np.random.Generator, m: Mixture, count: int) -> np.ndarray:
    """Draws of the prior."""
    k = rng.choice(len(m.weights), p=m.weights, size=count)
    return m.means[k] + rng.standard_normal((count, D)) @ np.linalg.cholesky(m.covariance).T


def diffusion(m: Mixture, T: int, **options: Any) -> Diffusion:
    """The mixture with its exact denoiser."""
    beta = schedules.log_snr_linear(T, beta_1=1e-3, alpha_bar_T=1e-4)
    steps = schedules.steps(beta)
    values, axes = np.linalg.eigh(m.covariance)
    axes, values, means = (jnp.asarray(a, jnp.float32) for a in (axes, values, m.means @ axes))
    log_weights = jnp.log(jnp.asarray(m.weights, jnp.float32))

    def network(x_t: Any, t: Any, context: Any = None) -> Any:
        step = steps.at(t, 1)
        root, variance = jnp.sqrt(step.alpha_bar_t), step.alpha_bar_t * values + step.noise_t
        y = x_t @ axes
        gaps = y[:, None] - root[:, None] * means  # (B, K, d)
        log_k = jax.nn.log_softmax(log_weights - 0.5 * jnp.sum(gaps**2 / variance[:, None], -1), -1)
        nearest = jnp.exp(log_k) @ means
        x_0 = nearest + root * values / variance * (y - root * nearest)
        return x_0 @ axes.T

    readout = readouts.Data(options.pop("variance", readouts.BridgeVariance()))
    return Diffusion(GaussianKernel(), beta, network, event_shape=(D,), readout=readout, **options)


def program(m: Mixture, T: int, count: int, **options: Any) -> Any:
    """Known entries of `count` systems."""
    prior = diffusion(m, T, **options).prior({}, variance=whole(m))

    def known(x: Any) -> None:
        with numpyro.plate("problems", count):
            prior(known=x, mask=np.broadcast_to(IS_KNOWN, (count, D)))

    return known
