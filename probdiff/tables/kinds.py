"""Kinds of columns: how a column's values become numbers of a diffusion, and back.

A kind maps values x to `entries` numbers z, on grids or not. Where x has a density and z = g(x),

    log p(x) = log p(z) + log g'(x),

the second term being `log_slope`; on a grid values have a probability, which no map changes.
"""

import abc
import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from probdiff.arguments import FINITE, POSITIVE, check_at_least, check_number, check_object, shown

_SLACK = 1e-6
"""Share of a step by which a value may miss it, in float64."""


class Kind(abc.ABC):
    """How one column becomes numbers; see `probdiff.tables` for the kinds there are.

    Example:
        >>> tables.Positive().encode(np.array([1.0, np.e])).tolist()
        [[0.0], [1.0]]
    """

    entries: int = 1
    """Numbers of a value."""
    step: float = 0.0
    """To which values are rounded, the user's units; 0 where they are not."""

    def __repr__(self) -> str:
        texts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            text = f"{value:g}" if isinstance(value, float) else shown(value)
            if not field.kw_only or value != field.default:
                texts.append(f"{field.name}={text}" if field.kw_only else text)
        return f"{type(self).__name__}({', '.join(texts)})"

    @property
    def grid(self) -> tuple[float, float, int]:
        """Least and largest value and number of levels of an entry; no levels: no grid."""
        return 0.0, 0.0, 0

    @property
    def grids(self) -> tuple[tuple[float, float, int], ...]:
        """`grid` of each entry."""
        return (self.grid,) * self.entries

    def dequantised(self, x: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Values with noise in [−½, ½] steps, where they are rounded and have a density."""
        return x if self.grid[2] else x + self.step * noise

    @abc.abstractmethod
    def encode(self, x: np.ndarray) -> np.ndarray:
        """Numbers `(N, entries)` of values `(N,)`, float64; NaN, which is missing, stays NaN.

        Raises:
            ValueError: if a value is not of this kind.
        """

    @abc.abstractmethod
    def decode(self, z: Any) -> Any:
        """Values `(...)` of numbers `(..., entries)`, in NumPy or JAX as they come."""

    def log_slope(self, x: np.ndarray) -> np.ndarray:
        """log |dz/dx| at values, NaN where they are missing; 0 on a grid."""
        return np.where(np.isnan(x), np.nan, 0.0)

    def units(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """loc and scale of numbers `(N, entries)`: mean and standard deviation, if not fixed."""
        return np.nanmean(z, 0), np.maximum(np.nanstd(z, 0), 1e-12)


def _is_numpy(z: Any) -> bool:
    return isinstance(z, np.ndarray | np.generic)


def _refuse(is_wrong: np.ndarray, x: np.ndarray, expected: str) -> None:
    if is_wrong.any():
        wrong = x[is_wrong]
        raise ValueError(f"{expected}; got {wrong.size} values that are not, such as {wrong[0]}")


# with a density


@dataclasses.dataclass(frozen=True, repr=False)
class Continuous(Kind):
    """Numbers as they are.

    Args:
        step: To which they are rounded; 0 where they are not. As for the next three kinds.

    Example:
        >>> tables.Continuous(step=0.1)
        Continuous(step=0.1)
    """

    step: float = dataclasses.field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        check_number(FINITE, step=self.step)
        if self.step < 0:
            raise ValueError(f"step must not be negative; got {self.step}")

    def encode(self, x: np.ndarray) -> np.ndarray:
        """x."""
        _refuse(np.isinf(x), x, "values must be finite")
        return x[:, None]

    def decode(self, z: Any) -> Any:
        """z."""
        return z[..., 0]


@dataclasses.dataclass(frozen=True, repr=False)
class Positive(Continuous):
    """Numbers above 0, by their logarithm; `step` as of `Continuous`.

    Example:
        >>> kind = tables.Positive()
        >>> kind.decode(kind.encode(np.array([2.0]))).tolist()
        [2.0]
    """

    def encode(self, x: np.ndarray) -> np.ndarray:
        """log x."""
        _refuse((x <= 0) | np.isinf(x), x, "values of a Positive column must be above 0 and finite")
        return np.log(x)[:, None]

    def decode(self, z: Any) -> Any:
        """exp z."""
        return (np if _is_numpy(z) else jnp).exp(z[..., 0])

    def log_slope(self, x: np.ndarray) -> np.ndarray:
        """−log x."""
        return -np.log(x)


@dataclasses.dataclass(frozen=True, repr=False)
class Bounded(Continuous):
    """Numbers between two others, by log (x − low)/(high − x); `step` as of `Continuous`.

    Args:
        low, high: The ends, which are not taken.

    Example:
        >>> tables.Bounded(low=0.0, high=1.0).encode(np.array([0.5])).tolist()
        [[0.0]]
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(FINITE, low=self.low, high=self.high)
        if not self.low < self.high:
            raise ValueError(f"low must be below high = {self.high}; got {self.low}")

    def encode(self, x: np.ndarray) -> np.ndarray:
        """log (x − low)/(high − x)."""
        expected = f"values of a Bounded column must lie between {self.low} and {self.high}"
        _refuse((x <= self.low) | (x >= self.high), x, expected)
        return (np.log(x - self.low) - np.log(self.high - x))[:, None]

    def decode(self, z: Any) -> Any:
        """low + (high − low)/(1 + e^−z)."""
        return self.low + (self.high - self.low) * 0.5 * (
            1 + (np if _is_numpy(z) else jnp).tanh(0.5 * z[..., 0])
        )

    def log_slope(self, x: np.ndarray) -> np.ndarray:
        """log (high − low) − log (x − low)(high − x)."""
        return math.log(self.high - self.low) - np.log(x - self.low) - np.log(self.high - x)


@dataclasses.dataclass(frozen=True, repr=False)
class HeavyTailed(Continuous):
    """Numbers far from their centre, by arsinh (x − centre)/width; `step` as of `Continuous`.

    Args:
        centre: Where most of them are.
        width: Beyond which the map is as a logarithm; positive.

    Example:
        >>> kind = tables.HeavyTailed(centre=1.0, width=2.0)
        >>> bool(np.isclose(kind.decode(kind.encode(np.array([1e6])))[0], 1e6))
        True
    """

    centre: float = 0.0
    width: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(FINITE, centre=self.centre)
        check_number(POSITIVE, width=self.width)

    def encode(self, x: np.ndarray) -> np.ndarray:
        """arsinh (x − centre)/width."""
        return np.arcsinh((super().encode(x) - self.centre) / self.width)

    def decode(self, z: Any) -> Any:
        """centre + width sinh z."""
        return self.centre + self.width * (np if _is_numpy(z) else jnp).sinh(z[..., 0])

    def log_slope(self, x: np.ndarray) -> np.ndarray:
        """−½ log (width² + (x − centre)²)."""
        return -0.5 * np.log(self.width**2 + (x - self.centre) ** 2)


# with a probability


@dataclasses.dataclass(frozen=True, repr=False)
class Rounded(Kind):
    """Numbers rounded to a step, so coarsely that each value has a probability.

    Args:
        step: Distance of neighbours, positive.
        low, high: Least and largest value; what would be beyond them counts as theirs.

    Example:
        >>> tables.Rounded(step=0.5, low=0.0, high=2.0).grid
        (0.0, 2.0, 5)
    """

    step: float = dataclasses.field()  # has no default, though the base has
    low: float = dataclasses.field()
    high: float = dataclasses.field()

    def __post_init__(self) -> None:
        check_number(POSITIVE, step=self.step)
        check_number(FINITE, low=self.low, high=self.high)
        count = (self.high - self.low) / self.step
        if not 0.5 < count < 2**24 or abs(count - round(count)) > 1e-6 * max(count, 1):
            raise ValueError(
                f"high must be a number of steps above low = {self.low}; got {self.high} at a step "
                f"of {self.step}"
            )

    @property
    def grid(self) -> tuple[float, float, int]:
        """The values."""
        return float(self.low), float(self.high), round((self.high - self.low) / self.step) + 1

    def encode(self, x: np.ndarray) -> np.ndarray:
        """x, exactly on its grid."""
        place = (x - self.low) / self.step
        with np.errstate(invalid="ignore"):
            is_off = np.abs(place - np.round(place)) > _SLACK * np.maximum(np.abs(place), 1)
            is_out = (np.round(place) < 0) | (np.round(place) >= self.grid[2])
        what = f"values of a {type(self).__name__} column must be "
        steps = f"{self.low:g}, {self.low + self.step:g}, …, {self.high:g}"
        _refuse(is_off | is_out | np.isinf(x), x, what + steps)
        return (self.low + np.round(place) * self.step)[:, None]

    def decode(self, z: Any) -> Any:
        """The nearest value."""
        xp = np if _is_numpy(z) else jnp
        return self.low + xp.round((z[..., 0] - self.low) / self.step) * self.step


@dataclasses.dataclass(frozen=True, repr=False)
class Count(Rounded):
    """Whole numbers 0, 1, …, `most`.

    Args:
        most: The largest; what would be beyond counts as it.

    Example:
        >>> tables.Count(most=3).encode(np.array([0.0, 3.0])).tolist()
        [[0.0], [3.0]]
    """

    step: float = dataclasses.field(default=1.0, init=False)
    low: float = dataclasses.field(default=0.0, init=False)
    high: float = dataclasses.field(default=0.0, init=False)
    most: int = 1

    def __post_init__(self) -> None:
        check_at_least(1, most=self.most)
        object.__setattr__(self, "high", float(self.most))
        super().__post_init__()

    def __repr__(self) -> str:
        return f"Count({self.most})"


@dataclasses.dataclass(frozen=True, repr=False)
class Ordered(Kind):
    """Levels with an order, as their places 0, 1, …, K − 1.

    Args:
        values: The levels in their order: numbers or texts, at least 2.

    Example:
        >>> tables.Ordered(("low", "middle", "high")).grid
        (0.0, 2.0, 3)
    """

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _as_values(self.values))

    @property
    def grid(self) -> tuple[float, float, int]:
        """Places."""
        return 0.0, float(len(self.values) - 1), len(self.values)

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Places, as they were read."""
        return x[:, None]

    def decode(self, z: Any) -> Any:
        """Places, whole numbers."""
        xp = np if _is_numpy(z) else jnp
        return xp.clip(xp.round(z[..., 0]), 0, len(self.values) - 1)

    def units(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Those of evenly spread levels."""
        count = len(self.values)
        return np.array([(count - 1) / 2]), np.array([math.sqrt((count**2 - 1) / 12)])


@dataclasses.dataclass(frozen=True, repr=False)
class Category(Kind):
    """Classes without an order: one number, 0 or 1, for two; for more one 0/1 number a class.

    Args:
        values: The classes: numbers or texts, at least 2.

    Example:
        >>> tables.Category(("red", "green", "blue")).encode(np.array([1.0])).tolist()
        [[0.0, 1.0, 0.0]]
    """

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _as_values(self.values))

    @property
    def entries(self) -> int:
        """1 for two classes, else one for each."""
        return len(self.codes[0])

    @property
    def codes(self) -> np.ndarray:
        """0/1 numbers of each class, `(K, entries)`."""
        count = len(self.values)
        return np.eye(count) if count > 2 else np.array([[0.0], [1.0]])

    @property
    def grid(self) -> tuple[float, float, int]:
        """0 and 1."""
        return 0.0, 1.0, 2

    def encode(self, x: np.ndarray) -> np.ndarray:
        """The code of each class."""
        code = self.codes[np.where(np.isnan(x), 0, x).astype(int)]
        return np.where(np.isnan(x)[:, None], np.nan, code)

    def decode(self, z: Any) -> Any:
        """The class with the nearest code."""
        xp = np if _is_numpy(z) else jnp
        return xp.argmin(xp.sum((z[..., None, :] - self.codes) ** 2, -1), -1)

    def units(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """So that 0 and 1 become −1 and 1."""
        half = np.full(self.entries, 0.5)
        return half, half


# with both


@dataclasses.dataclass(frozen=True, repr=False)
class Hurdle(Kind):
    """Numbers with a density, but for one value that has a probability, such as no rain.

    Two parts: whether x is another value than that one, 0 or 1, and x by the kind `rest`, missing
    where it is that one.

    Args:
        rest: Kind of the other values, one with a density.
        at: The value, a multiple of the step of `rest`.

    Example:
        >>> kind = tables.Hurdle(tables.Positive(), at=0.0)
        >>> kind.encode(np.array([0.0, 1.0])).tolist()
        [[0.0, nan], [1.0, 0.0]]
        >>> kind.decode(np.array([[0.1, 3.0], [0.9, 0.0]])).tolist()
        [0.0, 1.0]
    """

    rest: Kind = dataclasses.field(default_factory=Continuous)
    at: float = 0.0
    entries = 2

    def __post_init__(self) -> None:
        check_object(Continuous, "a kind with a density, such as Positive()", rest=self.rest)
        check_number(FINITE, at=self.at)
        if self.step and not math.isclose(self.at, round(self.at / self.step) * self.step):
            raise ValueError(f"at must be a multiple of the step, {self.step}; got {self.at}")

    @property
    def step(self) -> float:  # type: ignore[override]
        """That of the others."""
        return self.rest.step

    @property
    def grids(self) -> tuple[tuple[float, float, int], ...]:
        """0 and 1, and none."""
        return (0.0, 1.0, 2), self.rest.grid

    def dequantised(self, x: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """The others with noise."""
        return np.where(x == self.at, x, self.rest.dequantised(x, noise))

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Whether x is another value, and that value."""
        is_other = np.where(np.isnan(x), np.nan, x != self.at)
        return np.column_stack([is_other, self.rest.encode(np.where(x == self.at, np.nan, x))])

    def decode(self, z: Any) -> Any:
        """`at` below one half, else the other value."""
        xp = np if _is_numpy(z) else jnp
        return xp.where(z[..., 0] < 0.5, self.at, self.rest.decode(z[..., 1:]))

    def log_slope(self, x: np.ndarray) -> np.ndarray:
        """That of the others; 0 at the one value."""
        slope = self.rest.log_slope(np.where(x == self.at, np.nan, x))
        return np.where(x == self.at, 0.0, slope)

    def units(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """0 and 1 become −1 and 1."""
        loc, scale = self.rest.units(z[:, 1:])
        return np.append(0.5, loc), np.append(0.5, scale)


# with neither


@dataclasses.dataclass(frozen=True, repr=False)
class Constant(Kind):
    """One value in all rows: no number of the diffusion, and back in all draws.

    Args:
        value: The value.

    Example:
        >>> tables.Constant(3.0).entries
        0
    """

    value: Any
    entries = 0

    def __post_init__(self) -> None:
        kinds = str | bool | int | float | np.datetime64 | np.timedelta64
        check_object(kinds, "a text, a number or a date", value=self.value)

    def encode(self, x: np.ndarray) -> np.ndarray:
        """None; x is 0 where the value is there."""
        return np.zeros((len(x), 0))

    def decode(self, z: Any) -> Any:
        """0 for each."""
        return (np if _is_numpy(z) else jnp).zeros(z.shape[:-1])


@dataclasses.dataclass(frozen=True, repr=False)
class Empty(Kind):
    """A column that is missing throughout: no number, and missing in all draws. No arguments.

    Example:
        >>> bool(np.isnan(tables.Empty().decode(np.zeros((1, 0)))[0]))
        True
    """

    entries = 0

    def encode(self, x: np.ndarray) -> np.ndarray:
        """None."""
        _refuse(~np.isnan(x), x, "values of an Empty column must be missing")
        return np.zeros((len(x), 0))

    def decode(self, z: Any) -> Any:
        """NaN for each."""
        return (np if _is_numpy(z) else jnp).full(z.shape[:-1], np.nan)


def _as_values(values: Any) -> tuple[Any, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, tuple | list | np.ndarray):
        raise ValueError(f"values must be a tuple of at least 2 values; got {shown(values)}")
    values = tuple(v.item() if isinstance(v, np.generic) else v for v in values)
    kinds = (str, bool, int, float)
    if not all(isinstance(v, kinds) and v == v for v in values):
        raise ValueError(f"values must be texts or numbers; got {shown(values)}")
    if len(values) < 2 or len(set(values)) < len(values):
        raise ValueError(f"values must be at least 2, all different; got {shown(values)}")
    return values
