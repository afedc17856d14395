"""What a `Table` holds as a JSON file, and back, every number as it was.

    {"format": 1, "form": "numpy", "loc": [...], "scale": [...], "sha256": "...",
     "columns": [{"name": "day", "kind": {"type": "Continuous", "step": 1.0}, "missing": 0,
                  "dtype": "<M8[s]", "unit": "<M8[D]",
                  "origin": {"dtype": "<M8[D]", "count": 17956}}, ...]}

A kind is its type and its fields; a date the whole number that it is in its type's unit. JSON keeps
float64 exactly, and tells 1, 1.0, true and "1" apart.

What is read may be damaged or edited: fields are checked one by one, so that the wrong one is
named, then the checksum, which knows what was changed into something that could be.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from probdiff import files
from probdiff.arguments import shown
from probdiff.tables import kinds
from probdiff.tables.kinds import Kind

_FORMAT = 1
_KINDS = {
    kind.__name__: kind for kind in vars(kinds).values()
    if isinstance(kind, type) and issubclass(kind, Kind) and kind is not Kind
}  # fmt: skip
_DTYPE = re.compile(r"[<>|=]?([biufcOSUmM])\d*(\[\d*\w+\])?")


def write(path: Path, fields: dict[str, Any], columns: list[dict[str, Any]]) -> None:
    """Write a description: fields of the table, and of each column."""
    content = {"format": _FORMAT} | {n: _as_json(n, v) for n, v in fields.items()}
    content["columns"] = [{n: _as_json(n, v) for n, v in column.items()} for column in columns]
    content["sha256"] = _digest(content)
    files.replace(path, json.dumps(content, indent=1, ensure_ascii=False).encode())


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Fields of the table, and of each column, as `write` was given them.

    Raises:
        ValueError: if the file is not there, damaged, edited or of another format.
    """
    if not path.is_file():
        raise ValueError(f"path must be the saved description of a table; {path} is not there")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON as saved; {error}") from None
    found = content.get("format") if type(content) is dict else None
    if type(found) is not int or found != _FORMAT:
        raise ValueError(f"{path} must have format {_FORMAT}; got {shown(found)}")
    checksum = content.pop("sha256", None)
    digest = _digest(content)
    del content["format"]
    columns = _checked(path, "the file", content, _FIELDS).pop("columns")
    columns = [
        _checked(path, f"columns[{i}]", column, _OF_COLUMN) for i, column in enumerate(columns)
    ]
    _check_whole(path, content, columns)
    if checksum != digest:
        raise ValueError(f"{path} must be as it was saved; its checksum is another")
    return content, columns


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _as_json(name: str, value: Any) -> Any:
    if isinstance(value, Kind):
        if _KINDS.get(type(value).__name__) is not type(value):
            raise ValueError(
                f"kinds must be of {sorted(_KINDS)} to be saved; got {type(value).__name__}"
            )
        known: Any = value  # a dataclass
        fields = {f.name: getattr(known, f.name) for f in dataclasses.fields(known) if f.init}
        return {"type": type(value).__name__} | {n: _as_json(n, v) for n, v in fields.items()}
    if isinstance(value, np.dtype):
        return value.str
    if isinstance(value, np.datetime64 | np.timedelta64):
        return {"dtype": value.dtype.str, "count": int(value.astype(np.int64))}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, tuple):
        return [_as_json(name, v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


# reading: each field has what it must be, and how it becomes what it was


def _kind_of(value: Any) -> Kind:
    fields = {n: _plain(v) for n, v in value.items() if n != "type"}
    return _KINDS[value["type"]](**fields)


def _plain(value: Any) -> Any:
    if type(value) is dict and "type" in value:  # a kind within a kind
        return _kind_of(value)
    if type(value) is dict:
        return np.array(value["count"], np.int64).view(_dtype_of(value["dtype"]))[()]
    return tuple(map(_plain, value)) if type(value) is list else value


def _origin_of(value: Any) -> Any:
    origin = _plain(value)
    if type(origin) not in (int, float, np.datetime64):
        raise ValueError("it is neither")
    return origin


def _dtype_of(value: Any) -> np.dtype:
    if not _DTYPE.fullmatch(value):
        raise ValueError(f"{shown(value)} is no type of a column")
    return np.dtype(value)


def _numbers_of(value: Any) -> np.ndarray:
    if not all(type(v) is float for v in value):
        raise ValueError("not all are numbers with a point")
    return np.array(value, np.float64)


def _text_of(value: Any) -> str:
    if type(value) is not str or not value:
        raise ValueError("it is no text")
    return value


def _count_of(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("it is no count")
    return value


def _list_of(value: Any) -> list:
    if type(value) is not list or not value:
        raise ValueError("it is no list")
    return value


_FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "form": ("a text", _text_of),
    "loc": ("a list of numbers", _numbers_of),
    "scale": ("a list of numbers", _numbers_of),
    "columns": ("a list of columns", _list_of),
}
_OF_COLUMN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "name": ("a text", _text_of),
    "kind": (f"one of {', '.join(_KINDS)} with its fields", _kind_of),
    "dtype": ("a type of NumPy's", _dtype_of),
    "origin": ("a number or a date", _origin_of),
    "unit": ("a type of NumPy's", _dtype_of),
    "missing": ("a count", _count_of),
}


def _checked(path: Path, where: str, values: Any, expected: dict[str, Any]) -> dict[str, Any]:
    """Fields as they were, or a `ValueError` that names file, field, expectation and value."""
    names = values.keys() if type(values) is dict else ()
    if set(names) != set(expected):
        missing, unknown = _listed(set(expected) - set(names)), _listed(set(names) - set(expected))
        raise ValueError(
            f"{where} in {path} must hold {_listed(expected)}; missing: {missing}, unknown: "
            f"{unknown}"
        )
    for name, (text, of) in expected.items():
        try:
            values[name] = of(values[name])
        except Exception as error:  # whatever a foreign value leads to
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{name} of {where} in {path} must be {text}; got {shown(values[name])}: {reason}"
            ) from None
    return values


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(shown, sorted(names))) or "none"


def _check_whole(path: Path, fields: dict[str, Any], columns: list[dict[str, Any]]) -> None:
    """What fields must be to each other."""
    names = [column["name"] for column in columns]
    numbers = sum(column["kind"].entries for column in columns)
    is_finite = all(np.isfinite(fields[n]).all() for n in ("loc", "scale"))
    wrong = {
        "names of columns, all different": len(set(names)) < len(names),
        "a column that varies": not numbers,
        f"loc and scale of {numbers} numbers": any(
            len(fields[n]) != numbers for n in ("loc", "scale")
        ),
        "loc and scale that are finite, scale above 0": not (
            is_finite and (fields["scale"] > 0).all()
        ),
        "a date for the origin of dates alone": any(
            isinstance(c["origin"], np.datetime64) and c["dtype"].kind != "M" for c in columns
        ),
        "form numpy or pandas": fields["form"] not in ("numpy", "pandas"),
    }
    for expected, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(f"{path} must hold {expected}, as saved")
