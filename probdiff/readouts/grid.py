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

A grid may differ from entry to entry of an example, and there may be none: such an entry keeps its
value, and in place of a mass it has the density N(k; m, s²).

Source: Ho et al. (2020), equation 13.
"""

import functools
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

    One grid for all entries, or, by arrays that broadcast to the event, one for each of them;
    `levels` of 0 is none: any number.

    As for symbols, no bijection to the reals is registered, so gradient-based MCMC refuses a site
    of such values.

    Args:
        low: Least value, finite, the user's units.
        high: Largest value, above `low`.
        levels: Number of values K, at least 2; their distance at least 2⁻¹⁶ of the largest of them,
            or float32 would not tell them apart. In an array 0 is no grid; low and high, finite,
            do not count there.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> grid = readouts.Grid(0, 16, 17)  # grey levels of 8 × 8 digits
        >>> grid.nearest(jnp.array([-3.0, 7.4, 7.6])).tolist()
        [0.0, 7.0, 8.0]
        >>> log_mass = jax.jit(grid.log_mass)(jnp.arange(17.0), 8.0, 3.0)  # of N(8, 3²)
        >>> round(float(jnp.exp(log_mass).sum()), 4)
        1.0
        >>> mixed = readouts.Grid(0, [1, 0], [2, 0])  # a class 0 or 1, and any number
        >>> mixed.nearest(jnp.array([0.7, 0.7])).tolist()
        [1.0, 0.699999988079071]
    """

    is_discrete = False
    event_dim = 0

    def __init__(self, low: Any, high: Any, levels: Any):
        ends = f"{low} and {high}"
        if any(np.ndim(value) for value in (low, high, levels)):
            low, high, levels = _by_entry(low, high, levels)
        else:
            check_number(FINITE, low=low, high=high)
            check_at_least(2, levels=levels)
            low, high, levels = float(low), float(high), int(levels)
        self.low, self.high, self.levels = low, high, levels
        lows, highs, counts = (np.asarray(value) for value in self._numbers)
        is_on = counts > 0
        if not (lows < highs)[is_on].all():
            raise ValueError(f"low and high must be low < high; got {ends}")
        largest = np.maximum(np.abs(lows), np.abs(highs))
        if (self.spacing < 2.0**-16 * largest)[is_on].any():
            raise ValueError(
                f"levels must be at least {2.0**-16} of the largest value apart, or float32 would "
                f"not tell them from their neighbours; got {levels} from {low} to {high}"
            )

    def __repr__(self) -> str:
        if isinstance(self.levels, int):
            return f"{self.levels} values from {self.low:g} to {self.high:g}"
        return f"grids of {self.levels} values from {self.low} to {self.high}"

    @property
    def spacing(self) -> Any:
        """Δ, 0 where there is no grid."""
        if isinstance(self.levels, int):
            return (self.high - self.low) / (self.levels - 1)
        low, high, levels = (np.asarray(value) for value in self._numbers)
        return np.where(levels > 0, (high - low) / np.maximum(levels - 1, 1), 0.0)

    @property
    def is_on(self) -> np.ndarray:
        """Where there is a grid; of no axes for one that all entries share."""
        return np.asarray(np.asarray(self.levels) > 0)

    @property
    def _numbers(self) -> tuple[Any, Any, Any]:
        return self.low, self.high, self.levels

    @functools.cached_property
    def values(self) -> np.ndarray:
        """The K values, ascending, float64; of a grid that all entries share."""
        if not isinstance(self.levels, int):
            raise ValueError(f"values must be asked of one grid for all entries; got {self}")
        return np.linspace(self.low, self.high, self.levels)

    def map(self, function: Any) -> "Grid":
        """The grid of low, high and levels after a function of arrays, such as a reshape."""
        if isinstance(self.levels, int):
            return self
        return Grid(*(function(np.asarray(value)) for value in self._numbers))

    def nearest(self, x: ArrayLike) -> Float[Array, "..."]:
        """The value of the grid nearest to each number, nan to nan."""
        x = jnp.asarray(as_array("x", x))
        if not isinstance(self.levels, int):
            low, spacing, top, is_on = self._arrays
            index = jnp.clip(jnp.round((x - low) / spacing), 0, top)
            return jnp.where(is_on, low + index * spacing, x)
        index = jnp.round((x - self.low) / self.spacing)
        index = jnp.clip(index, 0, self.levels - 1).astype(jnp.int32)
        value = jnp.asarray(self.values, jnp.result_type(x, float))[index]
        return jnp.where(jnp.isnan(x), jnp.nan, value)

    def nearest_in_float64(self, x: Any) -> Float[np.ndarray, "..."]:
        """`nearest` in NumPy, with all digits of the values."""
        x = np.asarray(x, np.float64)
        if not isinstance(self.levels, int):
            low, spacing, top, is_on = self._arrays
            index = np.clip(np.round((x - low) / spacing), 0, top)
            return np.asarray(np.where(is_on, low + index * spacing, x))
        index = np.round((x - self.low) / self.spacing)
        return np.asarray(self.values[np.clip(index, 0, self.levels - 1).astype(int)])

    @property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Low, Δ (1 where there is no grid), K − 1, and where there is one."""
        low, _, levels = (np.asarray(value) for value in self._numbers)
        is_on = levels > 0
        return np.where(is_on, low, 0.0), np.where(is_on, self.spacing, 1.0), levels - 1, is_on

    def log_mass(self, x: ArrayLike, mean: ArrayLike, sd: ArrayLike) -> Float[Array, "..."]:
        """log P(x) of N(mean, sd²) put on the grid, elementwise, nats; −∞ for x off the grid.

        Where there is no grid, log N(x; mean, sd²).
        """
        given = {"x": x, "mean": mean, "sd": sd}
        x, mean, sd = (jnp.asarray(as_array(name, value)) for name, value in given.items())
        try:
            np.broadcast_shapes(x.shape, mean.shape, sd.shape)
        except ValueError as error:
            raise ValueError(f"x, mean and sd must broadcast to each other: {error}") from None
        if isinstance(self.levels, int):
            low, high, spacing, is_on = self.low, self.high, self.spacing, None
            c = (x - mean) / sd
        else:
            low, spacing, top, is_on = self._arrays
            low, spacing = (jnp.asarray(a, jnp.result_type(x, float)) for a in (low, spacing))
            high = low + top * spacing
            z = (x - mean) / sd
            c, sd_of_mass = jnp.where(is_on, z, 0.0), jnp.where(is_on, sd, 1.0)
            density = -0.5 * (z**2 + float(_LOG_2_PI)) - jnp.log(sd)
            sd = sd_of_mass
        h = 0.5 * spacing / sd
        inner = log_mass_within(c, h)
        is_low, is_high = x < low + spacing / 2, x > high - spacing / 2
        open_ = log_ndtr(jnp.where(is_low, h + c, h - c))
        mass = jnp.where(self(x), jnp.where(is_low | is_high, open_, inner), -jnp.inf)
        return mass if is_on is None else jnp.where(is_on, mass, density)

    def check_values(self, values: np.ndarray, argument: str) -> None:
        """Raise a `ValueError` unless the values lie on the grid."""
        miss = np.abs(values - self.nearest_in_float64(values)) > _SLACK * self.spacing
        is_off = miss & self.is_on
        if is_off.any():
            off, at = np.asarray(values)[is_off], ""
            if not isinstance(self.levels, int):
                place = np.argwhere(is_off)[0][np.ndim(values) - self.is_on.ndim :]
                at = f" at entry {', '.join(map(str, place.tolist()))}"
            raise ValueError(
                f"{argument} must lie on the grid of {self}; got {off.size} values that do not, "
                f"such as {off[0]}{at}"
            )

    def __call__(self, x: ArrayLike) -> Bool[Array, "..."]:
        is_near = jnp.abs(x - self.nearest(x)) <= _SLACK * self.spacing
        return is_near if isinstance(self.levels, int) else is_near | ~self.is_on

    def feasible_like(self, prototype: Any) -> Any:
        return jnp.broadcast_to(jnp.asarray(self.low, prototype.dtype), prototype.shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and self._numbers == other._numbers

    def __hash__(self) -> int:
        return hash(self._numbers)

    def tree_flatten(self) -> tuple[tuple[()], tuple[Any, dict[str, Any]]]:
        return (), ((), {"low": self.low, "high": self.high, "levels": self.levels})


def _by_entry(low: Any, high: Any, levels: Any) -> tuple[Any, Any, Any]:
    """Arrays of one shape as nested tuples, which a structure can hold and a file."""
    given = {"low": low, "high": high, "levels": levels}
    arrays = {name: np.asarray(as_array(name, value)) for name, value in given.items()}
    for name, array in arrays.items():
        if not array.size:
            raise ValueError(f"{name} must not be empty; got {given[name]}")
    counts = arrays["levels"]
    if not np.issubdtype(counts.dtype, np.integer) or not ((counts >= 2) | (counts == 0)).all():
        raise ValueError(f"levels must be integers of at least 2, or 0 for no grid; got {levels}")
    if not (counts > 0).any():
        raise ValueError(f"levels must not be 0 throughout: use Learned(); got {levels}")
    for name in ("low", "high"):
        if not np.isfinite(arrays[name]).all() or np.abs(arrays[name]).max() > 1e30:
            raise ValueError(f"{name} must be finite; got {given[name]}")
    try:
        shape = np.broadcast_shapes(*(a.shape for a in arrays.values()))
    except ValueError as error:
        raise ValueError(f"low, high and levels must broadcast to each other: {error}") from None
    types = {"low": np.float64, "high": np.float64, "levels": np.int64}
    parts = (np.broadcast_to(a, shape).astype(types[name]) for name, a in arrays.items())
    return tuple(_tuples(part.tolist()) for part in parts)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def is_on_grid(grid: Grid | None) -> np.ndarray:
    """Where numbers lie on a grid, of a shape that broadcasts to the event."""
    return np.asarray(False) if grid is None else grid.is_on


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
