"""`Table`: what is told once of a table, and serves from its file to its posterior.

Each column has a `Kind`, inferred from its values unless it is given:

    nothing observed            Empty          one value          Constant
    texts, booleans             Category       two values         Category
    rounded to Δ ≥ sd/10        Rounded, or Count where they are whole numbers from 0, 1 or 2 on
    1 value in 10 rows or more  Hurdle, and 5 times as often as any other, the rest as below
    above 0 and skew > 1        Positive, where the logarithm is less skew
    kurtosis > 8                HeavyTailed
    all others                  Continuous

Dates are counted in the unit of their type. Where numbers are large beside their spread, as dates
and Unix times are, an `origin` is taken off, in integers or in float64, before anything is rounded
to float32, and put back by `decode`: nothing is lost.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from probdiff.arguments import as_array, check_key, check_object, check_path, shown
from probdiff.readouts import Discretised, LastStep, Learned
from probdiff.tables import description
from probdiff.tables.kinds import (
    Category,
    Constant,
    Continuous,
    Count,
    Empty,
    HeavyTailed,
    Hurdle,
    Kind,
    Ordered,
    Positive,
    Rounded,
)

_COARSE = 0.1  # step over standard deviation from which a column is put on a grid
_MOST_LEVELS = 2**14  # of a grid
_MOST_DECIMALS = 9
_FAR = 2.0**10  # |x| over its spread beyond which an origin is taken off
_SKEW, _KURTOSIS = 1.0, 8.0  # beyond which a column is transformed
_SHARE, _TIMES, _FEWEST = 0.1, 5, 10  # for a hurdle: rows of one value, over the next's; values


class Rows(NamedTuple):
    """Rows of a table as a diffusion has them; made by `Table.encode`.

    Example:
        >>> rows = Table({"x": [1.0, 2.0, 4.0, 8.5]}).encode({"x": [4.0, None]})
        >>> fit_to = {"x_0": rows.x_0, "mask": rows.mask}  # data for `fit`
        >>> rows.mask.tolist()
        [[True], [False]]
    """

    x_0: Float[np.ndarray, "N d"]
    """Numbers, float64; NaN where missing."""
    mask: Bool[np.ndarray, "N d"]
    """False where they are missing."""
    log_jacobian: Float[np.ndarray, " N"]
    """Nats to add to log p(x_0) of each row for its density in the user's units, of transformed
    columns; 0 where there are none."""


@dataclasses.dataclass(frozen=True)
class _Column:
    """A column's name, kind and way of being written."""

    name: str
    kind: Kind
    dtype: np.dtype
    origin: Any
    """Taken off in the column's own type; a date of dates."""
    unit: np.dtype
    """Its type, dates in the coarsest unit that holds them all."""
    missing: int
    """Number of rows without it, in the data that described it."""

    @property
    def has_origin(self) -> bool:
        """Whether anything is taken off."""
        return self.dtype.kind == "M" or bool(self.origin != 0)


class Table:
    """Columns of different kinds as one vector of numbers; see `probdiff.tables` for the kinds.

    Args:
        data: Rows to describe: a pandas DataFrame, an xarray Dataset of variables of one dim, a
            NumPy structured array, a mapping of names to columns, or an array `(N, columns)`.
            Missing are NaN, None, NaT, and masked entries.
        kinds: Kinds by name, in place of those inferred.
        names: Names of the columns of a plain array; by default "0", "1", ….

    Raises:
        ValueError: if data are of another form, a kind does not fit its column, or a name is
            unknown.

    Example:
        >>> data = {"age": [31, 45, 28, 60], "sex": ["f", "m", None, "f"]}
        >>> table = Table(data, kinds={"age": tables.Count(120)})
        >>> table
        Table of 2 columns, 2 numbers
        column  kind                 numbers  missing  loc  scale
        age     Count(120)           0              0   41   12.7
        sex     Category(('f', 'm'))  1              1  0.5    0.5
        >>> rows = table.encode(data)
        >>> rows.x_0.tolist()
        [[31.0, 0.0], [45.0, 1.0], [28.0, nan], [60.0, 0.0]]
        >>> table.decode(rows.x_0[:2])["sex"].tolist()
        ['f', 'm']
        >>> table.last_step
        Discretised(low=(0.0, 0.0), high=(120.0, 1.0), levels=(121, 2))
    """

    def __init__(
        self, data: Any, *, kinds: Mapping[str, Kind] | None = None,
        names: tuple[str, ...] | list[str] | None = None,
    ):  # fmt: skip
        columns, self._form = _read(data, names)
        kinds = {} if kinds is None else kinds
        check_object(Mapping, "a mapping of names to kinds", kinds=kinds)
        for name, kind in kinds.items():
            if name not in columns:
                raise ValueError(f"kinds must name columns of {list(columns)}; got {name!r}")
            check_object(Kind, "a kind such as tables.Continuous()", **{f"kinds[{name!r}]": kind})
        if len(next(iter(columns.values()))) < 1:
            raise ValueError("data must have at least 1 row; got none")
        self._columns = [_described(n, v, kinds.get(n)) for n, v in columns.items()]
        if not sum(c.kind.entries for c in self._columns):
            raise ValueError(f"data must have a column that varies; got {list(columns)}, none does")
        parts = self._parts(self._values(columns))
        units = [c.kind.units(z) for c, z in zip(self._columns, parts, strict=True) if z.size]
        self.loc: Float[np.ndarray, " d"] = np.concatenate([loc for loc, _ in units])
        """Mean of each number, or the middle of 0 and 1."""
        self.scale: Float[np.ndarray, " d"] = np.concatenate([scale for _, scale in units])
        """Their standard deviation."""

    def __repr__(self) -> str:
        head = ("column", "kind", "numbers", "missing", "loc", "scale")
        rows = [head]
        for column, place in zip(self._columns, self._places, strict=True):
            numbers = list(range(place.start, place.stop))
            units = [f"{a[numbers[0]]:.3g}" if numbers else "" for a in (self.loc, self.scale)]
            where = (
                f"{numbers[0]}..{numbers[-1]}" if len(numbers) > 1 else "".join(map(str, numbers))
            )
            kind = repr(column.kind) + (f" from {column.origin}" if column.has_origin else "")
            rows.append((column.name, kind, where, str(column.missing), *units))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        count = f"Table of {len(self._columns)} columns, {len(self.loc)} numbers"
        return "\n".join([count, *lines])

    def save(self, path: str | Path) -> None:
        """Write the description into a JSON file; one that is there is replaced.

        Raises:
            ValueError: if a kind is not one of `probdiff.tables`.

        Example:
            >>> import tempfile
            >>> table = Table({"x": [0.1, 0.7, 0.2], "c": ["a", "b", None]})
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     table.save(f"{folder}/columns.json")
            ...     again = Table.load(f"{folder}/columns.json")
            >>> again.kinds == table.kinds, bool((again.loc == table.loc).all())
            (True, True)
        """
        fields = {"form": self._form, "loc": self.loc, "scale": self.scale}
        columns = [dict(vars(column)) for column in self._columns]
        description.write(check_path("path", path), fields, columns)

    @classmethod
    def load(cls, path: str | Path) -> "Table":
        """Read the description that `save` wrote: it encodes and decodes as the one saved.

        Raises:
            ValueError: if the file is not there, damaged or edited; says what is wrong in it.
        """
        fields, columns = description.read(check_path("path", path))
        table = cls.__new__(cls)
        table._form, table.loc, table.scale = (fields[n] for n in ("form", "loc", "scale"))
        table._columns = [_Column(**column) for column in columns]
        return table

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(column.name for column in self._columns)

    @property
    def kinds(self) -> dict[str, Kind]:
        """Kind of each column."""
        return {column.name: column.kind for column in self._columns}

    @property
    def event_shape(self) -> tuple[int]:
        """`(d,)`: numbers of a row."""
        return (len(self.loc),)

    @property
    def last_step(self) -> LastStep:
        """`Discretised` with the grids of the numbers that have one; `Learned()` if none has."""
        grids = [grid for column in self._columns for grid in column.kind.grids]
        low, high, levels = (np.array(values) for values in zip(*grids, strict=True))
        return Discretised(low, high, levels) if levels.any() else Learned()

    @property
    def is_on_grid(self) -> Bool[np.ndarray, " d"]:
        """Which numbers have a probability, not a density."""
        return np.array([grid[2] > 0 for column in self._columns for grid in column.kind.grids])

    def place(self, name: str) -> slice:
        """Which numbers of a row are those of a column.

        Raises:
            ValueError: if there is no such column.
        """
        if name not in self.names:
            raise ValueError(f"name must be one of {list(self.names)}; got {shown(name)}")
        return self._places[self.names.index(name)]

    def encode(self, data: Any, *, key: Any = None) -> Rows:
        """Rows as numbers, with their mask and Jacobian.

        Args:
            data: In any form that describes a table; columns that are not in it are missing.
            key: If given, columns with a density that are rounded to a step get uniform noise as
                wide as it, so that a density is the mean over a cell; and what a `Hurdle` leaves
                out, a draw of N(loc, scale²), whose log density is taken off in `log_jacobian`.

        Raises:
            ValueError: if a column is unknown or a value is not of its column's kind: off its grid,
                a class not seen before, a negative count.
        """
        columns, _ = _read(data, self.names)
        unknown = sorted(set(columns) - set(self.names))
        if unknown:
            raise ValueError(f"data must have columns of {list(self.names)}; got {unknown}")
        check_key(key, or_none=True)
        noise = None
        if key is not None:
            noise = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
        values = self._values(columns, noise)
        parts = self._parts(values)
        x_0 = np.concatenate(parts, 1)
        slopes = [c.kind.log_slope(x) for c, x in zip(self._columns, values, strict=True)]
        log_jacobian = np.nan_to_num(np.stack(slopes)).sum(0)
        if noise is not None:
            entries = [column.kind.entries for column in self._columns]
            is_there = np.repeat(~np.isnan(np.stack(values, 1)), entries, axis=1)
            is_left_out, z = is_there & np.isnan(x_0), noise.standard_normal(x_0.shape)
            x_0 = np.where(is_left_out, self.loc + self.scale * z, x_0)
            log_q = -0.5 * z**2 - np.log(self.scale) - 0.5 * math.log(2 * math.pi)
            log_jacobian = log_jacobian - np.where(is_left_out, log_q, 0.0).sum(1)
        return Rows(x_0, ~np.isnan(x_0), log_jacobian)

    def decode(self, x_0: Any) -> Any:
        """Named columns in the user's units: a DataFrame if the table was one, else a dict.

        Args:
            x_0: Numbers `(..., d)`, draws or posteriors, as `sample` or `SMC` gives them.

        Returns:
            Columns `(...)` in their own types; whole numbers as integers, classes as they were. A
            DataFrame has one row for each, whatever the leading axes.

        Raises:
            ValueError: if x_0 has another last axis, or is not finite.
        """
        x_0 = np.asarray(as_array("x_0", x_0, ..., len(self.loc)), np.float64)
        if not np.isfinite(x_0).all():
            raise ValueError("x_0 must be finite; got numbers that are not")
        columns = {
            c.name: _written(c, x_0[..., place])
            for c, place in zip(self._columns, self._places, strict=True)
        }
        if self._form != "pandas":
            return columns
        import pandas  # may be slow to import, where the description was read from a file

        return pandas.DataFrame({n: v.reshape(-1) for n, v in columns.items()})

    def columns(self, x_0: Any) -> dict[str, Any]:
        """Columns of x_0 inside a program, JAX arrays `(...)`, to be observed with noise.

        Numbers are in the user's units less `origin`, which is 0 but where `repr` shows one;
        classes and levels are their places 0, 1, ….

        Raises:
            ValueError: if x_0 has another last axis.
        """
        x_0 = jnp.asarray(as_array("x_0", x_0, ..., len(self.loc)))
        return {
            c.name: c.kind.decode(x_0[..., place])
            for c, place in zip(self._columns, self._places, strict=True)
        }

    def origin(self, name: str) -> Any:
        """What is taken off a column before all else, in its own type; 0 mostly.

        Raises:
            ValueError: if there is no such column.
        """
        self.place(name)
        return self._columns[self.names.index(name)].origin

    @property
    def _places(self) -> list[slice]:
        ends = np.cumsum([0, *(c.kind.entries for c in self._columns)]).tolist()
        return [slice(*pair) for pair in itertools.pairwise(ends)]

    def _values(self, columns: dict[str, np.ndarray], noise: Any = None) -> list[np.ndarray]:
        """Each column less its origin, `(N,)`, NaN where missing; with noise of a step."""
        count, values = len(next(iter(columns.values()))), []
        for column in self._columns:
            if column.name not in columns:
                values.append(np.full(count, np.nan))
                continue
            x = _numbers(column, columns[column.name])
            if noise is not None and column.kind.step > 0:
                x = column.kind.dequantised(x, noise.random(count) - 0.5)
            values.append(x)
        return values

    def _parts(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Numbers of each column, `(N, entries)`; NaN where it is missing."""
        parts = []
        for column, x in zip(self._columns, values, strict=True):
            try:
                parts.append(column.kind.encode(x))
            except ValueError as error:
                raise ValueError(f"data must fit column {column.name!r}: {error}") from None
        return parts


# reading


def _read(data: Any, names: Any) -> tuple[dict[str, np.ndarray], str]:
    """Columns by name, `(N,)` in their own types, and the form that they came in."""
    modules, form = sys.modules, "numpy"
    if "pandas" in modules and isinstance(data, modules["pandas"].DataFrame):
        columns = {n: _of_pandas(data[n]) for n in data.columns}
        form = "pandas"
    elif "xarray" in modules and isinstance(data, modules["xarray"].Dataset):
        columns = {str(n): np.asarray(v) for n, v in data.data_vars.items()}
    elif isinstance(data, Mapping):
        columns = {n: _as_column(v) for n, v in data.items()}
    else:
        array = data if isinstance(data, np.ma.MaskedArray) else np.asarray(data)
        if array.dtype.names:
            columns = {n: _as_column(array[n]) for n in array.dtype.names}
        elif array.ndim == 2:
            names = [str(i) for i in range(array.shape[1])] if names is None else list(names)
            if len(names) != array.shape[1] or len(set(names)) < len(names):
                raise ValueError(f"names must be {array.shape[1]} different texts; got {names}")
            columns = {n: _as_column(array[:, i]) for i, n in enumerate(names)}
        else:
            raise ValueError(
                "data must be a DataFrame, a Dataset, a mapping of columns, a structured array or "
                f"an array of shape (N, columns); got {shown(data)}"
            )
    if not columns:
        raise ValueError("data must have at least 1 column; got none")
    if not all(isinstance(n, str) and n for n in columns):
        raise ValueError(f"data must have texts for names of columns; got {shown(list(columns))}")
    shapes = {n: v.shape for n, v in columns.items()}
    if any(len(s) != 1 for s in shapes.values()) or len(set(shapes.values())) > 1:
        raise ValueError(f"data must have columns of shape (N,), N the same; got {shapes}")
    return columns, form


def _as_column(values: Any) -> np.ndarray:
    if isinstance(values, np.ma.MaskedArray):
        plain = values.astype(object)
        return np.asarray(plain.filled(None))
    return np.asarray(values)


def _of_pandas(series: Any) -> np.ndarray:
    """A column of pandas as NumPy has it, texts and what may be missing as objects."""
    if isinstance(series.dtype, np.dtype):
        return series.to_numpy()
    if getattr(series.dtype, "tz", None) is not None:
        return series.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy()
    return series.astype(object).where(series.notna(), None).to_numpy()


def _is_missing(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind in "fc":
        return np.isnan(values)
    if values.dtype.kind in "mM":
        return np.isnat(values)
    if values.dtype.kind == "O":
        return np.array([v is None or v != v or str(v) == "<NA>" for v in values], bool)
    return np.zeros(len(values), bool)


def _simplified(name: str, values: np.ndarray) -> np.ndarray:
    """Objects as what they are, if that is one type: numbers with None are floats."""
    if values.dtype.kind in "biufMmUS":
        return values
    missing = _is_missing(values) if values.dtype.kind == "O" else np.ones(len(values), bool)
    there = [v for v in values[~missing]]
    if values.dtype.kind == "O" and not there:
        return np.full(len(values), np.nan)
    if values.dtype.kind != "O":
        raise ValueError(
            f"data must have numbers, dates or texts in column {name!r}; got {values.dtype}"
        )
    types = {type(v.item() if isinstance(v, np.generic) else v) for v in there}
    if types <= {int, float} and not any(abs(v) > 2**53 for v in there if isinstance(v, int)):
        return np.array([np.nan if m else v for v, m in zip(values, missing, strict=True)], float)
    if types <= {str} or types <= {bool}:
        return values
    if missing.any() or not (types <= {int}):
        text = ", ".join(sorted(t.__name__ for t in types))
        raise ValueError(
            f"data must have numbers, dates or texts of one type in column {name!r}; got {text}"
        )
    return values.astype(np.int64)


def _numbers(column: _Column, values: np.ndarray) -> np.ndarray:
    """Values less the origin, float64, places of classes; NaN where missing."""
    values = _simplified(column.name, values)
    missing, kind = _is_missing(values), column.kind
    if missing.all():  # of whatever type
        return np.full(len(values), np.nan)
    if isinstance(kind, Category | Ordered):
        places = {v: i for i, v in enumerate(kind.values)}
        plain = [v.item() if isinstance(v, np.generic) else v for v in values]
        unseen = sorted(
            {str(v) for v, m in zip(plain, missing, strict=True) if not m and v not in places}
        )
        if unseen:
            raise ValueError(
                f"data must have values of {shown(kind.values)} in column {column.name!r}; got "
                f"{', '.join(unseen[:3])}"
            )
        rows = zip(plain, missing, strict=True)
        return np.array([np.nan if m else places[v] for v, m in rows], np.float64)
    if isinstance(kind, Constant):
        plain = values if values.dtype.kind in "mM" else values.tolist()
        other = [v for v, m in zip(plain, missing, strict=True) if not m and v != kind.value]
        if other:
            raise ValueError(
                f"data must have {shown(kind.value)} throughout in column {column.name!r}, as the "
                f"described rows had; got {shown(other[0])}"
            )
        return np.where(missing, np.nan, 0.0)
    if values.dtype.kind in "OUS":
        got = shown(str(values[~missing][0]))
        raise ValueError(f"data must have numbers in column {column.name!r}; got {got}")
    if values.dtype.kind == "M":
        if column.dtype.kind != "M":
            raise ValueError(f"data must have numbers in column {column.name!r}; got dates")
        counted = (values.astype(column.unit) - column.origin).astype(np.int64)
        if (values[~missing] != values[~missing].astype(column.unit)).any():
            raise ValueError(f"data must be whole {column.unit} in column {column.name!r}")
        return np.where(missing, np.nan, counted.astype(np.float64))
    if column.dtype.kind == "M" and not isinstance(kind, Empty):
        raise ValueError(f"data must have dates in column {column.name!r}; got {values.dtype}")
    if values.dtype.kind == "m":
        values = np.where(missing, np.nan, values.astype(column.unit).astype(np.int64))
    if values.dtype.kind in "iu" and column.origin:
        return (values.astype(object) - column.origin).astype(np.float64)  # in Python's integers
    return values.astype(np.float64) - column.origin


def _written(column: _Column, z: np.ndarray) -> np.ndarray:
    """Values of a column in its own type."""
    x, kind = np.asarray(column.kind.decode(z)), column.kind
    if isinstance(kind, Constant):
        return np.full(x.shape, kind.value)
    if isinstance(kind, Category | Ordered):
        values = np.array(kind.values, object if isinstance(kind.values[0], str) else None)
        return values[x.astype(int)]
    if isinstance(kind, Empty):
        return x
    whole = column.dtype.kind in "iumM"
    step = 1.0 if whole and not kind.step else kind.step
    if step > 0:
        decimals = max(0, -math.floor(math.log10(step)) + 3) if step < 1 else 3
        x = np.round(np.round((x - kind.grid[0]) / step) * step + kind.grid[0], decimals)
    if column.dtype.kind in "mM":
        counted = np.round(x).astype(np.int64).view(column.unit.str.replace("M8", "m8"))
        counted = counted if column.dtype.kind == "m" else column.origin + counted
        return counted.astype(column.dtype)
    if whole:
        return (np.round(x).astype(np.int64) + int(column.origin)).astype(np.int64)
    return x + column.origin


# kinds by what is there


def _described(name: str, values: np.ndarray, kind: Kind | None) -> _Column:
    values = _simplified(name, values)
    missing, dtype = _is_missing(values), values.dtype
    there, count = values[~missing], int(missing.sum())
    column = _Column(name, kind or Empty(), dtype, 0, dtype, count)
    is_placed = isinstance(kind, Category | Ordered | Constant | Empty)
    if is_placed or (kind is None and not len(there)):
        return column
    if dtype.kind in "OUSb":
        if kind is not None:
            raise ValueError(f"kinds[{name!r}] must be Category or Ordered for texts; got {kind}")
        return dataclasses.replace(column, kind=_of_values(np.array(sorted(set(there.tolist())))))
    if dtype.kind == "f" and np.isinf(there).any():
        raise ValueError(f"data must be finite in column {name!r}; got {there[np.isinf(there)][0]}")
    distinct = np.unique(there)
    if kind is None and (len(distinct) == 1 or (len(distinct) == 2 and dtype.kind not in "mM")):
        return dataclasses.replace(column, kind=_of_values(distinct))
    if dtype.kind in "mM":
        column = dataclasses.replace(column, unit=_coarsest(distinct))
        distinct = distinct.astype(column.unit)
    may_move = kind is None or type(kind) is Continuous or dtype.kind == "M"
    column = dataclasses.replace(column, origin=_origin(distinct) if may_move else 0)
    if kind is not None:
        return column
    x = _numbers(dataclasses.replace(column, kind=Continuous()), there)
    is_plain = dtype.kind not in "mM" and bool(column.origin == 0)
    kind = _inferred(x, may_be_positive=is_plain, is_whole=dtype.kind in "iumM")
    return dataclasses.replace(column, kind=kind)


def _of_values(values: np.ndarray) -> Kind:
    if values.dtype.kind not in "mM":
        values = values.tolist()
    return Category(tuple(values)) if len(values) > 1 else Constant(values[0])


def _coarsest(dates: np.ndarray) -> np.dtype:
    """The type with the coarsest unit, days at most, in which dates are what they are."""
    for unit in ("D", "h", "m", "s", "ms", "us"):
        dtype = np.dtype(f"{dates.dtype.kind}8[{unit}]")
        if dates.dtype >= dtype and (dates == dates.astype(dtype)).all():
            return dtype
    return dates.dtype


def _origin(distinct: np.ndarray) -> Any:
    """What is taken off: of dates the first; of numbers large beside their spread one of them."""
    if distinct.dtype.kind == "M" and len(distinct):
        return distinct[0]
    if distinct.dtype.kind == "m" or not len(distinct):
        return 0
    middle, spread = distinct[len(distinct) // 2], float(distinct[-1]) - float(distinct[0])
    is_far = abs(float(middle)) > _FAR * max(spread / 4, 1e-300)
    if not is_far:
        return 0
    return int(distinct[0]) if distinct.dtype.kind in "iu" else float(np.round(middle))


def _inferred(x: np.ndarray, *, may_be_positive: bool, is_whole: bool) -> Kind:
    """The kind of numbers, all there, of three values or more."""
    sd, low, high = float(x.std()), float(x.min()), float(x.max())
    step = 1.0 if is_whole else _step(x)
    levels = round((high - low) / step) + 1 if step else 0
    if step and step >= _COARSE * sd and levels <= _MOST_LEVELS:
        if is_whole and 0 <= low <= 2 and step == 1:
            return Count(int(high))
        return Rounded(step, low, low + (levels - 1) * step)
    values, counts = np.unique(x, return_counts=True)
    most, next_most = np.sort(counts)[[-1, -2]]
    if len(values) > _FEWEST and most >= max(_SHARE * len(x), _TIMES * next_most):
        at = float(values[np.argmax(counts)])
        rest = _inferred(x[x != at], may_be_positive=may_be_positive, is_whole=is_whole)
        if isinstance(rest, Continuous):
            return Hurdle(dataclasses.replace(rest, step=step), at)
    if may_be_positive and low - step / 2 > 0 and _moment(x, 3) > _SKEW:
        log_x = np.log(x)
        if abs(_moment(log_x, 3)) < _moment(x, 3):
            return Positive(step=step)
    if _moment(x, 4) > _KURTOSIS:
        low, centre, high = np.quantile(x, (0.25, 0.5, 0.75))
        if high > low:
            return HeavyTailed(float(centre), float(high - low) / 1.35, step=step)
    return Continuous(step=step)


def _moment(x: np.ndarray, power: int) -> float:
    return float(np.mean(((x - x.mean()) / x.std()) ** power))


def _step(x: np.ndarray) -> float:
    """The step that all numbers are multiples of, by their decimals; 0 where there is none."""
    for decimals in range(_MOST_DECIMALS):
        units = np.round(x * 10.0**decimals)
        slack = np.clip(1e-9 * np.abs(units), 1e-9, 0.01)  # or any large number would be whole
        if np.all(np.abs(x * 10.0**decimals - units) <= slack):
            if np.abs(units).max() > 2**52:
                return 0.0
            whole = np.unique(units.astype(np.int64))
            return float(np.gcd.reduce(whole)) / 10.0**decimals
    return 0.0
