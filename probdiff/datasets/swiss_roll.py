"""The Swiss roll, and its exact density.

With u uniform on [0, 1), θ = 3π/2 (1 + 2u) and ε ~ N(0, I),

    x_raw = (θ cos θ, θ sin θ) + noise · ε,        x = (x_raw − m) / s.

m and s are those of the law, not of the sample, so that all draws share one law. Integrating over
θ uniform on [3π/2, 9π/2],

    m  = (2, 2/(3π)),
    s² = (E|x_raw|² − |m|²) / 2 = 39π²/8 − 2 − 2/(9π²) + noise²,        1/s = 0.1473 at noise 0,

one constant for both coordinates: the variance is 1 on average over them.

The bound K of a diffusion on the roll cannot pass −h(X^(1)), the negative entropy after one step
x_1 = √(1−β_1) x_0 + √β_1 ε, and depends on `noise` and β_1 far more than on the model. Hence
`swiss_roll_log_density`: its mean over draws is that ceiling.

Source: Sohl-Dickstein et al. (2015), section 3.1.1, which leaves open the generator and its noise;
the generator is the customary one (scikit-learn's `make_swiss_roll` without its third axis).
"""

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, PRNGKeyArray

from probdiff.arguments import (
    NOT_NEGATIVE,
    POSITIVE_SHARE,
    as_array,
    check_at_least,
    check_key,
    check_number,
)

_ROLL_MEAN = (2.0, 2 / (3 * math.pi))


def swiss_roll(key: PRNGKeyArray, n: int, *, noise: float) -> Float[Array, "{n} 2"]:
    """Draws from the noisy Swiss roll in scaled units: mean 0, mean variance of coordinates 1.

    Args:
        key: Random key.
        n: Number of points, at least 1.
        noise: Standard deviation of the noise in raw units, where the roll's radius runs from 4.7
            to 14.1; not negative.

    Example:
        >>> x = datasets.swiss_roll(jax.random.key(0), 10_000, noise=0.1)
        >>> x.shape, round(float(x.var(axis=0).mean()), 1)
        ((10000, 2), 1.0)
    """
    check_key(key)
    check_at_least(1, n=n)
    check_number(NOT_NEGATIVE, noise=noise)
    key_angle, key_noise = jax.random.split(key)
    u = jax.random.uniform(key_angle, (n,))
    return _roll(u, noise) + noise / _roll_scale(noise) * jax.random.normal(key_noise, (n, 2))


def swiss_roll_log_density(
    x: Float[Array, "*batch 2"], *, noise: float, extra_variance: float = 0.0, shrink: float = 1.0
) -> Float[Array, "*batch"]:
    """Log density of the noisy Swiss roll, or of the roll after diffusion steps.

    The law is that of √shrink x_0 + √extra_variance ε with x_0 from `swiss_roll`. Given u it is
    Gaussian around a point of the curve, with variance v = shrink (noise/s)² + extra_variance:

        p(x) = ∫ N(x; √shrink c(u), v I) du  ≈  1/M Σ_m N(x; √shrink c((m − 1/2)/M), v I).

    Neighbours on the grid lie at most √v/4 apart, where the midpoint rule is exact to float32
    except within √v of the two ends of the curve, where it is good to about one in a thousand.

    Args:
        x, noise: As `swiss_roll` has them.
        extra_variance: Variance added in scaled units; β_1 for the ceiling of a tied last step.
        shrink: Factor in (0, 1] on the variance of the roll; 1 − β_1 for the same ceiling.

    Returns:
        Log density in nats with respect to area in scaled units.

    Raises:
        ValueError: If an option is out of range, or no noise is left and there is no density.

    Example:
        >>> x = jnp.array([[1.54, -0.03], [1.1, -0.03]])  # on the curve, and between two turns
        >>> print(datasets.swiss_roll_log_density(x, noise=0.5).round(1))
        [ -1.2 -19.5]
    """
    x = jnp.asarray(as_array("x", x, ..., 2))
    check_number(NOT_NEGATIVE, noise=noise, extra_variance=extra_variance)
    check_number(POSITIVE_SHARE, shrink=shrink)
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

    at_once = max(1, 4_000_000 // grid_size)  # pairs of points and grid that memory holds
    values = jax.lax.map(log_density, x.reshape(-1, 2), batch_size=at_once)
    return values.reshape(x.shape[:-1])


def _roll_scale(noise: float) -> float:
    """Root mean variance s of the raw roll."""
    return math.sqrt(39 * math.pi**2 / 8 - 2 - 2 / (9 * math.pi**2) + noise**2)


def _roll(u: Float[Array, "n"], noise: float) -> Float[Array, "n 2"]:
    """Points c(u) of the noise-free curve, in the scaled units that `noise` leads to."""
    theta = 1.5 * math.pi * (1 + 2 * u)
    raw = theta[:, None] * jnp.stack([jnp.cos(theta), jnp.sin(theta)], axis=-1)
    return (raw - jnp.array(_ROLL_MEAN)) / _roll_scale(noise)
