"""Columns as the user has told: cells to values, and the kinds of `--kind`."""

import ast
import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from probdiff import delimited
from probdiff.commands.console import UsageError, listed, pair

if TYPE_CHECKING:
    from probdiff.delimited import Cells
    from probdiff.tables import Kind

_KINDS = (
    "Continuous", "Positive", "Bounded", "HeavyTailed", "Hurdle", "Rounded", "Count", "Ordered",
    "Category",
)  # fmt: skip
_OF_VALUES = ("Ordered", "Category")


class Told(NamedTuple):
    """A kind as it stands in `--kind`."""

    kind: str
    args: tuple[Any, ...]
    options: dict[str, Any]


def parse(text: str, names: Iterable[str]) -> tuple[str, Told]:
    """Column and kind of `COLUMN=KIND`; nothing in it is evaluated."""
    found = pair("--kind", text, names, r"(\w+)\s*(\(.*\))?")
    if found[2] not in _KINDS:
        raise UsageError(f"--kind: no kind {found[2]!r}; there are {listed(_KINDS, found[2])}")
    try:
        call: Any = ast.parse(f"f{found[3] or '()'}", mode="eval").body
        args = tuple(map(_literal, call.args))
        options = {word.arg: _literal(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, AttributeError, RecursionError, MemoryError):
        if found[2] not in _OF_VALUES:
            raise UsageError(f"--kind: cannot read {found[2]}{found[3]} in {text!r}") from None
        args, options = tuple(cell.strip() for cell in found[3][1:-1].split(",")), {}
    if found[2] in _OF_VALUES and args and not isinstance(args[0], tuple):
        args = (args,)
    elif found[2] not in (*_OF_VALUES, "Count"):
        args, options = tuple(map(_real, args)), {n: _real(v) for n, v in options.items()}
    return found[1], Told(found[2], args, options)


def _literal(node: ast.expr) -> Any:
    """A number, a text, with or without quotes, or a tuple of them."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(map(_literal, node.elts))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):  # a kind within a kind
        options = {word.arg: _real(_literal(word.value)) for word in node.keywords}
        return Told(node.func.id, tuple(_real(_literal(arg)) for arg in node.args), options)
    value = ast.literal_eval(node)
    if not isinstance(value, str | bool | int | float):
        raise ValueError
    return value


def _real(value: Any) -> Any:
    return float(value) if type(value) is int else value


def values(cells: "Cells", name: str, told: Told | None) -> np.ndarray:
    """Cells of a column as the kind that was told has them, or as they look."""
    if told is None:
        return delimited.values(cells, name)
    if told.kind == "Continuous" and (looks := delimited.values(cells, name)).dtype.kind == "M":
        return looks
    if told.kind not in _OF_VALUES:
        return delimited.numbers(cells, name)
    if told.args and all(isinstance(v, str | bool) for v in told.args[0]):
        return delimited.texts(cells, name)
    try:
        looks = delimited.values(cells, name)
    except ValueError:  # numbers and texts
        return delimited.texts(cells, name)
    return delimited.texts(cells, name) if looks.dtype.kind == "M" else looks


def made(name: str, told: Told, values: np.ndarray) -> "Kind":
    """The kind that was told; what was not told of it is taken from the values."""
    from probdiff import Table, tables

    there = values[~is_missing(values)]
    family, args, options = getattr(tables, told.kind), told.args, dict(told.options)
    if told.kind in _OF_VALUES:
        distinct = tuple(np.unique(there).tolist())
        if not args and "values" not in options:
            if told.kind == "Ordered" and there.dtype == object:
                raise UsageError(f"--kind {name}=Ordered must say the order, as Ordered(S, M, L)")
            args = (distinct,)
        elif args and values.dtype == object:
            args = (tuple(map(str, args[0])),)
    elif not args and not options and len(there):
        if told.kind == "Count":
            args = (max(1, int(there.max())),)
        if told.kind == "HeavyTailed":
            low, centre, high = np.quantile(there.astype(np.float64), (0.25, 0.5, 0.75))
            args = float(centre), float(high - low) / 1.35 or 1.0
    try:
        inferred = Table({name: values}).kinds[name] if len(np.unique(there)) > 2 else None
        step = 0.0 if inferred is None else inferred.step
        if told.kind == "Hurdle":
            return inferred if not args and isinstance(inferred, family) else _hurdle(told, step)
        if told.kind == "Rounded" and not args and not options:
            args = (step, float(there.min()), float(there.max()))
        kind = family(*args, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--kind {name}={told.kind}: {error}") from None
    is_plain = isinstance(kind, tables.Continuous) and "step" not in options
    return dataclasses.replace(kind, step=step) if is_plain and step else kind


def _hurdle(told: Told, step: float) -> "Kind":
    """Of the kind of the other values, with or without brackets."""
    from probdiff import tables

    rest, *more = told.args or ("",)
    rest = Told(rest, (), {}) if isinstance(rest, str) else rest
    families = tables.Continuous, *tables.Continuous.__subclasses__()
    found = {family.__name__: family for family in families}
    if not isinstance(rest, Told) or rest.kind not in found:
        raise ValueError(f"it must be as Hurdle(Positive, 0), of {', '.join(found)}")
    return tables.Hurdle(found[rest.kind](*rest.args, **{"step": step} | rest.options), *more)


def is_missing(values: np.ndarray) -> np.ndarray:
    """Which cells, read by `delimited`, are missing."""
    if values.dtype == object:
        return np.array([v is None for v in values], bool)
    return np.isnat(values) if values.dtype.kind == "M" else np.isnan(values)
