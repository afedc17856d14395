"""Gaussian data and Gaussian mixtures, on which diffusion models can be checked exactly."""

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, PRNGKeyArray

from probdiff.arguments import as_array, check_at_least, check_key


def gaussian(
    key: PRNGKeyArray, n: int, *, covariance: Float[Array | np.ndarray, "d d"],
    mean: Float[Array | np.ndarray, "d"] | None = None,
) -> Float[Array, "{n} d"]:  # fmt: skip
    """Draws from N(mean, covariance), `(n, d)`.

    Args:
        key: Random key.
        n: Number of points, at least 1.
        covariance: Symmetric and positive definite; a `ValueError` if not.
        mean: Zero if absent.

    Example:
        >>> covariance = np.array([[1.0, 0.8], [0.8, 1.0]])
        >>> x = datasets.gaussian(jax.random.key(0), 10_000, covariance=covariance)
        >>> x.shape, round(float(np.corrcoef(x.T)[0, 1]), 1)
        ((10000, 2), 0.8)
    """
    check_key(key)
    check_at_least(1, n=n)
    covariance = _covariance("covariance", covariance)
    d = len(covariance)
    mean = jnp.zeros(d) if mean is None else jnp.asarray(as_array("mean", mean, d, is_finite=True))
    return dist.MultivariateNormal(mean, jnp.asarray(covariance)).sample(key, (n,))


def gaussian_mixture(
    key: PRNGKeyArray, n: int, *, means: Float[Array | np.ndarray, "k d"],
    covariances: Float[Array | np.ndarray, "k d d"],
    weights: Float[Array | np.ndarray, "k"] | None = None,
) -> Float[Array, "{n} d"]:  # fmt: skip
    """Draws from `gaussian_mixture_distribution(means=, covariances=, weights=)`, `(n, d)`.

    Example:
        >>> means, covariances = np.array([[-2.0], [2.0]]), np.ones((2, 1, 1))
        >>> key = jax.random.key(0)
        >>> x = datasets.gaussian_mixture(key, 10_000, means=means, covariances=covariances)
        >>> round(float(x.var()), 1)  # 1 within components, 4 between them
        5.0
    """
    check_key(key)
    check_at_least(1, n=n)
    mixture = gaussian_mixture_distribution(means=means, covariances=covariances, weights=weights)
    return mixture.sample(key, (n,))


def gaussian_mixture_distribution(
    *, means: Float[Array | np.ndarray, "k d"], covariances: Float[Array | np.ndarray, "k d d"],
    weights: Float[Array | np.ndarray, "k"] | None = None,
) -> dist.MixtureSameFamily:  # fmt: skip
    """The mixture Σ_k weights_k N(means_k, covariances_k), with its exact log density.

    Args:
        means: Means of the components.
        covariances: Symmetric and positive definite; a `ValueError` if not.
        weights: Probabilities of the components, with sum 1; equal if absent.

    Returns:
        Mixture over points: batch shape (), event shape (d,).

    Example:
        >>> means, covariances = np.array([[-2.0], [2.0]]), np.ones((2, 1, 1))
        >>> law = datasets.gaussian_mixture_distribution(means=means, covariances=covariances)
        >>> log_p = law.log_prob(np.zeros((3, 1)))
        >>> log_p.shape, round(float(log_p[0]), 2)  # −2 − log √(2π)
        ((3,), -2.92)
    """
    means = as_array("means", means, "k", "d", is_finite=True)
    count, d = means.shape
    if not means.size:
        raise ValueError(f"means must be one or more points; got shape {means.shape}")
    covariances = as_array("covariances", covariances, count, d, d)
    for k, covariance in enumerate(covariances):
        _covariance(f"covariances[{k}]", covariance)
    weights = np.full(count, 1 / count) if weights is None else as_array("weights", weights, count)
    if not (np.all(np.asarray(weights) >= 0) and abs(np.sum(weights) - 1) <= 1e-5):
        raise ValueError(f"weights must be probabilities with sum 1; got {weights}")
    return dist.MixtureSameFamily(
        dist.Categorical(jnp.asarray(weights)),
        dist.MultivariateNormal(jnp.asarray(means), jnp.asarray(covariances)),
    )


def _covariance(name: str, covariance: Float[Array | np.ndarray, "d d"]) -> np.ndarray:
    covariance = np.asarray(as_array(name, covariance, "d", "d", is_finite=True))
    if not covariance.size or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"{name} must have shape (d, d); got {covariance.shape}")
    # The tolerance is float32 rounding of a product of matrices.
    symmetric = np.allclose(covariance, covariance.T, rtol=1e-5, atol=1e-6)
    if not symmetric or np.linalg.eigvalsh(covariance).min() <= 0:
        raise ValueError(f"{name} must be symmetric and positive definite; got {covariance}")
    return covariance
