"""Values on a grid: the nearest one, and how much of a Gaussian is nearest to it.

The grid has K values k from low to high, Δ = (high − low)/(K − 1) apart. A number drawn from
N(m, s²) and put on the nearest of them is k with the mass of k's cell,

    P(k) = Φ(c + h) − Φ(c − h),    c = (k − m)/s,    h = Δ/(2s),

where the cells of low and high reach to infinity, so that the masses sum to 1. The difference of
two numbers near 0 or near 1 has no digits left, so its logarithm is taken as

    log Φ(h + c), log Φ(h − c)                        the cells of low and of high
    log φ(c) + log ∫_{−h}^{h} e^{−cu − u²/2} du        narrow cells, (1 + |c|) h < 1
    log Φ(h − |c|) + log(1 − Φ(−h − |c|)/Φ(h − |c|))   all others

with Gauss's rule of six points for the integral, right to 1e-12 where exponents stay below 3/2.

Source: Ho et al. (2020), equation 13.
"""

import functools
from numbers import Real
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from jaxtyping import Array, ArrayLike, Bool, Float
from numpyro.distributions import constraints

from probdiff.arguments import FINITE, as_array, check_at_least, check_number

_LOG_2_PI = np.log(2 * np.pi)
_NODES, _WEIGHTS = (part[3:] for part in np.polynomial.legendre.leggauss(6))  # the rule is even
_SLACK = 0.01
"""Share of Δ by which a value may miss the grid: float32 keeps 65,536 values that well."""


class Grid(constraints.Constraint):
    """K values from low to high, evenly spaced; a constraint that does not call itself discrete.

    As for symbols, no bijection to the reals is registered, so gradient-based MCMC refuses a site
    of such values.

    Args:
        low: Least value, finite, the user's units.
        high: Largest value, above `low`.
        levels: Number of values K, at least 2; their distance at least 2⁻¹⁶ of the largest of them,
            or float32 would not tell them apart.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> grid = readouts.Grid(0, 16, 17)  # grey levels of 8 × 8 digits
        >>> grid.nearest(jnp.array([-3.0, 7.4, 7.6])).tolist()
        [0.0, 7.0, 8.0]
        >>> log_mass = jax.jit(grid.log_mass)(jnp.arange(17.0), 8.0, 3.0)  # of N(8, 3²)
        >>> round(float(jnp.exp(log_mass).sum()), 4)
        1.0
    """

    is_discrete = False
    event_dim = 0

    def __init__(self, low: Real, high: Real, levels: Real):
        check_number(FINITE, low=low, high=high)
        if not low < high:
            raise ValueError(f"low and high must be low < high; got {low} and {high}")
        check_at_least(2, levels=levels)
        self.low, self.high, self.levels = float(low), float(high), int(levels)
        if self.spacing < 2.0**-16 * max(abs(low), abs(high)):
            raise ValueError(
                f"levels must be at least {2.0**-16} of the largest value apart, or float32 would "
                f"not tell them from their neighbours; got {levels} from {low} to {high}"
            )

    def __repr__(self) -> str:
        return f"{self.levels} values from {self.low:g} to {self.high:g}"

    @property
    def spacing(self) -> float:
        """Δ."""
        return (self.high - self.low) / (self.levels - 1)

    @property
    def _numbers(self) -> tuple[float, float, int]:
        return self.low, self.high, self.levels

    @functools.cached_property
    def values(self) -> np.ndarray:
        """The K values, ascending, float64."""
        return np.linspace(self.low, self.high, self.levels)

    def nearest(self, x: ArrayLike) -> Float[Array, "..."]:
        """The value of the grid nearest to each number, nan to nan."""
        x = jnp.asarray(as_array("x", x))
        index = jnp.round((x - self.low) / self.spacing)
        index = jnp.clip(index, 0, self.levels - 1).astype(jnp.int32)
        value = jnp.asarray(self.values, jnp.result_type(x, float))[index]
        return jnp.where(jnp.isnan(x), jnp.nan, value)

    def nearest_in_float64(self, x: Any) -> Float[np.ndarray, "..."]:
        """`nearest` in NumPy, with all digits of the values."""
        index = np.round((np.asarray(x, np.float64) - self.low) / self.spacing)
        return np.asarray(self.values[np.clip(index, 0, self.levels - 1).astype(int)])

    def log_mass(self, x: ArrayLike, mean: ArrayLike, sd: ArrayLike) -> Float[Array, "..."]:
        """log P(x) of N(mean, sd²) put on the grid, elementwise, nats; −∞ for x off the grid."""
        given = {"x": x, "mean": mean, "sd": sd}
        x, mean, sd = (jnp.asarray(as_array(name, value)) for name, value in given.items())
        try:
            np.broadcast_shapes(x.shape, mean.shape, sd.shape)
        except ValueError as error:
            raise ValueError(f"x, mean and sd must broadcast to each other: {error}") from None
        c, h = (x - mean) / sd, 0.5 * self.spacing / sd
        inner = log_mass_within(c, h)
        is_low, is_high = x < self.low + self.spacing / 2, x > self.high - self.spacing / 2
        open_ = log_ndtr(jnp.where(is_low, h + c, h - c))
        return jnp.where(self(x), jnp.where(is_low | is_high, open_, inner), -jnp.inf)

    def check_values(self, values: np.ndarray, argument: str) -> None:
        """Raise a `ValueError` unless the values lie on the grid."""
        nearest = self.nearest_in_float64(values)
        off = np.asarray(values)[np.abs(values - nearest) > _SLACK * self.spacing]
        if off.size:
            raise ValueError(
                f"{argument} must lie on the grid of {self}; got {off.size} values that do not, "
                f"such as {off[0]}"
            )

    def __call__(self, x: ArrayLike) -> Bool[Array, "..."]:
        return jnp.abs(x - self.nearest(x)) <= _SLACK * self.spacing

    def feasible_like(self, prototype: Any) -> Any:
        return jnp.full_like(prototype, self.low)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and self._numbers == other._numbers

    def __hash__(self) -> int:
        return hash(self._numbers)

    def tree_flatten(self) -> tuple[tuple[()], tuple[Any, dict[str, Any]]]:
        return (), ((), {"low": self.low, "high": self.high, "levels": self.levels})


def log_mass_within(c: Float[Array, "*#shape"], h: Float[Array, "*#shape"]) -> Float[Array, "..."]:
    """log(Φ(c + h) − Φ(c − h)), h > 0, in whichever way leaves digits."""
    is_narrow = (1 + jnp.abs(c)) * h < 1
    narrow = _narrow(jnp.where(is_narrow, c, 0.0), jnp.where(is_narrow, h, 0.5))
    wide = _wide(jnp.where(is_narrow, 0.0, jnp.abs(c)), jnp.where(is_narrow, 1.0, h))
    return jnp.where(is_narrow, narrow, wide)


def _narrow(c: Array, h: Array) -> Array:
    """log φ(c) + log ∫_{−h}^{h} e^{−cu − u²/2} du."""
    terms = 0.0
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        u = float(node) * h
        terms += 2 * float(weight) * jnp.cosh(c * u) * jnp.exp(-0.5 * u**2)
    return -0.5 * (c**2 + float(_LOG_2_PI)) + jnp.log(h) + jnp.log(terms)


def _wide(c: Array, h: Array) -> Array:
    """log Φ(h − c) + log(1 − Φ(−h − c)/Φ(h − c)), c ≥ 0."""
    near, far = log_ndtr(h - c), log_ndtr(-h - c)
    # Φ(−h−c)/Φ(h−c) ≤ e^{−2ch}, as Mills's ratio falls: far out far − near has no digits left
    return near + jnp.log1p(-jnp.exp(jnp.minimum(far - near, -2 * c * h)))
