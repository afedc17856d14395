"""Data with known laws, and the small real images that come with scikit-learn.

Swiss roll: with u uniform on [0, 1), θ = 3π/2 (1 + 2u) and ε ~ N(0, I),

    x_raw = (θ cos θ, θ sin θ) + noise · ε,        x = (x_raw − m) / s.

m and s are those of the law, not of the sample, so that all draws share one law. Integrating over
θ uniform on [3π/2, 9π/2],

    m  = (2, 2/(3π)),
    s² = (E|x_raw|² − |m|²) / 2 = 39π²/8 − 2 − 2/(9π²) + noise²,        1/s = 0.1473 at noise 0,

one constant for both coordinates: the variance is 1 on average over them.

The bound K of a diffusion on the roll cannot pass −h(X^(1)), the negative entropy after one step
x_1 = √(1−β_1) x_0 + √β_1 ε, and depends on `noise` and β_1 far more than on the model. Hence
`swiss_roll_log_density`: its mean over draws is that ceiling.

Gaussian data and Gaussian mixtures are the cases that diffusion models can be checked on exactly.
Digits: 1797 images of 8 × 8 pixels, levels 0..16.

Source: Sohl-Dickstein et al. (2015), section 3.1.1, which leaves open the generator and its noise;
the generator is the customary one (scikit-learn's `make_swiss_roll` without its third axis).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int, PRNGKeyArray
from sklearn.datasets import load_digits

_ROLL_MEAN = (2.0, 2 / (3 * math.pi))


def swiss_roll(key: PRNGKeyArray, n: int, *, noise: float) -> Float[Array, "{n} 2"]:
    """Draws from the noisy Swiss roll, centred and scaled to unit mean variance.

    Args:
        key: Random key.
        n: Number of points, at least 1.
        noise: Standard deviation of the noise in raw units, where the roll's radius runs from 4.7
            to 14.1; not negative.

    Raises:
        ValueError: If `n` or `noise` is out of range.

    Source: see the module.
    """
    _check_count(n)
    _check_not_negative("noise", noise)
    key_angle, key_noise = jax.random.split(key)
    u = jax.random.uniform(key_angle, (n,))
    return _roll(u, noise) + noise / _roll_scale(noise) * jax.random.normal(key_noise, (n, 2))


def swiss_roll_log_density(
    x: Float[Array, "*batch 2"],
    *,
    noise: float,
    extra_variance: float = 0.0,
    shrink: float = 1.0,
) -> Float[Array, "*batch"]:
    """Log density of the noisy Swiss roll, or of the roll after diffusion steps.

    The law is that of √shrink x_0 + √extra_variance ε with x_0 from `swiss_roll`. Given u it is
    Gaussian around a point of the curve, with variance v = shrink (noise/s)² + extra_variance:

        p(x) = ∫ N(x; √shrink c(u), v I) du  ≈  1/M Σ_m N(x; √shrink c((m − 1/2)/M), v I).

    Neighbours on the grid lie at most √v/4 apart, where the midpoint rule is exact to float32
    except within √v of the two ends of the curve, where it is good to about one in a thousand.

    Args:
        x: Points, in the scaled units of `swiss_roll`.
        noise: As in `swiss_roll`.
        extra_variance: Variance added in scaled units; β_1 for the ceiling of a tied last step.
        shrink: Factor in (0, 1] on the variance of the roll; 1 − β_1 for the same ceiling.

    Returns:
        Log density in nats with respect to area in scaled units.

    Raises:
        ValueError: If an option is out of range, or if no noise is left and there is no density.

    Source: see the module.
    """
    _check_not_negative("noise", noise)
    _check_not_negative("extra_variance", extra_variance)
    if not 0 < shrink <= 1:
        raise ValueError(f"shrink must lie in (0, 1]; got {shrink}")
    variance = shrink * (noise / _roll_scale(noise)) ** 2 + extra_variance
    if variance == 0:
        raise ValueError(
            "noise and extra_variance must not both be zero, a curve has no density; "
            f"got noise={noise}, extra_variance={extra_variance}"
        )
    theta_end = 4.5 * math.pi
    speed = 3 * math.pi * math.hypot(1, theta_end) * math.sqrt(shrink) / _roll_scale(noise)
    grid_size = math.ceil(speed / (math.sqrt(variance) / 4))
    curve = math.sqrt(shrink) * _roll((jnp.arange(grid_size) + 0.5) / grid_size, noise)

    def log_density(point: Float[Array, "2"]) -> Float[Array, ""]:
        log_kernel = -jnp.sum((point - curve) ** 2, axis=-1) / (2 * variance)
        return logsumexp(log_kernel) - math.log(grid_size * 2 * math.pi * variance)

    # Points times grid do not fit into memory at once; four million pairs do.
    points_at_once = max(1, 4_000_000 // grid_size)
    values = jax.lax.map(log_density, x.reshape(-1, 2), batch_size=points_at_once)
    return values.reshape(x.shape[:-1])


def gaussian(
    key: PRNGKeyArray,
    n: int,
    *,
    covariance: Float[Array | np.ndarray, "d d"],
    mean: Float[Array | np.ndarray, "d"] | None = None,
) -> Float[Array, "{n} d"]:
    """Draws from N(mean, covariance).

    Args:
        key: Random key.
        n: Number of points, at least 1.
        covariance: Symmetric and positive definite.
        mean: Mean; zero if absent.

    Raises:
        ValueError: If `n` is out of range or `covariance` is not a covariance.
    """
    _check_count(n)
    _check_covariance("covariance", covariance)
    mean = jnp.zeros(len(covariance)) if mean is None else jnp.asarray(mean)
    return dist.MultivariateNormal(mean, jnp.asarray(covariance)).sample(key, (n,))


def gaussian_mixture(
    key: PRNGKeyArray,
    n: int,
    *,
    means: Float[Array | np.ndarray, "k d"],
    covariances: Float[Array | np.ndarray, "k d d"],
    weights: Float[Array | np.ndarray, "k"] | None = None,
) -> Float[Array, "{n} d"]:
    """Draws from Σ_k weights_k N(means_k, covariances_k).

    Args:
        key: Random key.
        n: Number of points, at least 1.
        means: Means of the components.
        covariances: Covariances of the components, each symmetric and positive definite.
        weights: Probabilities of the components; equal if absent.

    Raises:
        ValueError: If `n`, a covariance or a weight is out of range.
    """
    _check_count(n)
    mixture = gaussian_mixture_distribution(means=means, covariances=covariances, weights=weights)
    return mixture.sample(key, (n,))


def gaussian_mixture_distribution(
    *,
    means: Float[Array | np.ndarray, "k d"],
    covariances: Float[Array | np.ndarray, "k d d"],
    weights: Float[Array | np.ndarray, "k"] | None = None,
) -> dist.MixtureSameFamily:
    """The law that `gaussian_mixture` draws from, with its exact log density.

    Args:
        means: Means of the components.
        covariances: Covariances of the components, each symmetric and positive definite.
        weights: Probabilities of the components; equal if absent.

    Returns:
        Mixture over points: batch shape (), event shape (d,).

    Raises:
        ValueError: If a covariance or a weight is out of range.
    """
    for k, covariance in enumerate(covariances):
        _check_covariance(f"covariances[{k}]", covariance)
    if weights is None:
        weights = np.full(len(means), 1 / len(means))
    if np.any(np.asarray(weights) < 0) or abs(np.sum(weights) - 1) > 1e-5:
        raise ValueError(f"weights must be probabilities with sum 1; got {weights}")
    return dist.MixtureSameFamily(
        dist.Categorical(jnp.asarray(weights)),
        dist.MultivariateNormal(jnp.asarray(means), jnp.asarray(covariances)),
    )


class Digits(NamedTuple):
    """Images with levels 0..16 and their labels 0..9, in three parts."""

    train: Float[Array, "1297 8 8"]
    validation: Float[Array, "200 8 8"]
    test: Float[Array, "300 8 8"]
    train_labels: Int[Array, "1297"]
    validation_labels: Int[Array, "200"]
    test_labels: Int[Array, "300"]


def digits() -> Digits:
    """Handwritten digits of 8 × 8 pixels: 1297 to train, 200 to validate, 300 to test.

    Pixels count the black dots of a 4 × 4 block: integers 0..16, kept as floats in these units.
    The split is one fixed permutation. Part of scikit-learn: nothing is downloaded.

    Source: Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI; test part.
    """
    bundle = load_digits()
    # The stream of RandomState is frozen for good; that of default_rng may change.
    order = np.random.RandomState(0).permutation(len(bundle.images))
    images = jnp.asarray(bundle.images[order], dtype=float)
    labels = jnp.asarray(bundle.target[order], dtype=int)
    return Digits(
        images[:1297], images[1297:1497], images[1497:],
        labels[:1297], labels[1297:1497], labels[1497:],
    )  # fmt: skip


def dequantise(
    key: PRNGKeyArray, x: Float[Array, "*shape"], *, levels_width: float = 1.0
) -> Float[Array, "*shape"]:
    """Integer levels as a density, x + levels_width · U with U uniform on [0, 1).

    A density p of the sum bounds the probability P of the levels from below: with width w and d
    pixels, Jensen's inequality gives

        log P(x) ≥ E_U log p(x + w U) + d log w,

    so on digits, at width 1, −log2 p / 64 is an upper bound on bits per pixel on the scale of 17
    levels. This holds at full width only (a narrower U makes p grow without limit), and for p in
    these units: a model of (x − loc)/scale owes the Jacobian.

    Args:
        key: Random key.
        x: Levels, multiples of `levels_width`.
        levels_width: Distance between levels, positive.

    Returns:
        Values in [x, x + levels_width): floor(value / levels_width) is the level again.

    Raises:
        ValueError: If `levels_width` is not positive.

    Source: Theis, van den Oord and Bethge (2016), section 3.1.
    """
    if not (math.isfinite(levels_width) and levels_width > 0):
        raise ValueError(f"levels_width must be positive and finite; got {levels_width}")
    value = x + levels_width * jax.random.uniform(key, x.shape, dtype=x.dtype)
    # In float32, 16 + (1 − 2⁻²⁴) rounds to 17, which belongs to the next level.
    return jnp.minimum(value, jnp.nextafter(x + levels_width, x))


def _roll_scale(noise: float) -> float:
    """Root mean variance s of the raw roll."""
    return math.sqrt(39 * math.pi**2 / 8 - 2 - 2 / (9 * math.pi**2) + noise**2)


def _roll(u: Float[Array, "n"], noise: float) -> Float[Array, "n 2"]:
    """Points c(u) of the noise-free curve, in the scaled units that `noise` leads to."""
    theta = 1.5 * math.pi * (1 + 2 * u)
    raw = theta[:, None] * jnp.stack([jnp.cos(theta), jnp.sin(theta)], axis=-1)
    return (raw - jnp.array(_ROLL_MEAN)) / _roll_scale(noise)


def _check_count(n: int) -> None:
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")


def _check_not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative; got {value}")


def _check_covariance(name: str, covariance: Float[Array | np.ndarray, "d d"]) -> None:
    covariance = np.asarray(covariance)
    # The tolerance is float32 rounding of a product of matrices.
    symmetric = np.allclose(covariance, covariance.T, rtol=1e-5, atol=1e-6)
    if not symmetric or np.linalg.eigvalsh(covariance).min() <= 0:
        raise ValueError(f"{name} must be symmetric and positive definite; got {covariance}")
