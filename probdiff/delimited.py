"""Tables as text: a header and rows, split at commas, semicolons, tabs or bars (CSV).

What a column is, is told by its cells:

    numbers   12   -0.5   .5   6e-3   1,234.50 (of thousands)   3,14 (a comma for the point)
    dates     2024-05-06   2024-05-06 07:08:09.5   2024-05-06T07:08Z   2024-05-06T07:08+02:00 (UTC)
    texts     all else; numbers with zeros in front, 01234, are codes, and so texts
    missing   nothing, NA, N/A, NaN, NaT, null, ?, and what the reader is told

The delimiter is the one by which all rows have the same number of cells. Files may be compressed by
gzip, xz or bzip2; they are UTF-8, UTF-16 with its mark, or else Windows-1252. Whatever had to be
decided is noted in words. NumPy and Python's own `csv` do it, and the same file is read alike on
every machine.
"""

import bz2
import csv
import gzip
import io
import itertools
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

_DELIMITERS = ",;\t|"
_LOOKED_AT = 100  # rows by which the delimiter is told
_MISSING = frozenset(("", "na", "n/a", "nan", "nat", "null", "<na>", "#n/a", "?"))
_FEW = 20  # different cells up to which numbers among texts are codes
_COMPRESSED: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress, b"\xfd7zXZ\x00": lzma.decompress, b"BZh": bz2.decompress,
}  # fmt: skip
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?", re.IGNORECASE)
_WHOLE, _CODE = re.compile(r"[+-]?\d{1,18}"), re.compile(r"0\d+")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?")
_COMMA = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+),\d+([eE][+-]?\d+)?")
_DATE = re.compile(
    r"(\d{4}-\d\d(?:-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,9})?)?)?)?) ?(?:(Z)|([+-]\d\d):?(\d\d))?"
)
_DATES = "dates as 2024-05-06 07:08:09"


class Cells(NamedTuple):
    """The cells of a file, as text, by column."""

    path: Path
    columns: dict[str, list[str]]
    """Cells by name, all of the same number; nothing in them where they are missing."""
    lines: list[int]
    """Line of the file in which each row begins."""
    delimiter: str
    notes: list[str]
    """What was decided, in words."""


def read(path: Path, missing: Iterable[str] = ()) -> Cells:
    """The cells of a file.

    Args:
        path: Where it is.
        missing: Texts that mean that a value is missing, besides those of this file's docstring.

    Raises:
        ValueError: if the file is not there or no such table; says in which line.
    """
    if path.is_dir() or not path.exists():
        raise ValueError(f"{path} is a folder" if path.is_dir() else f"no such file: {path}")
    text, notes = _text(path)
    rows = _rows(path, text, notes)
    names, count = rows.names, len(rows.names)
    for line, row in zip(rows.lines, rows.cells, strict=True):
        if len(row) != count:
            raise ValueError(
                f"{path}, line {line}: {len(row)} cells where the header has {count}, split at "
                f"{rows.delimiter!r}; put quotes around a cell with {rows.delimiter!r} in it"
            )
    if not rows.cells:
        raise ValueError(f"{path} must have rows below its header; got none")
    gone = _MISSING | {m.lower() for m in missing}
    columns = {
        i: ["" if c.lower() in gone else c for c in map(str.strip, cells)]
        for i, cells in enumerate(zip(*rows.cells, strict=True))
    }
    kept = _named(path, names, columns, notes)
    return Cells(path, kept, rows.lines, rows.delimiter, notes)


Parser = Callable[[Cells, str], np.ndarray]
"""What turns the cells of a named column into values."""


class _Rows(NamedTuple):
    names: list[str]
    cells: list[list[str]]
    lines: list[int]
    delimiter: str


def _text(path: Path) -> tuple[str, list[str]]:
    """The whole text, and notes."""
    data = path.read_bytes()
    for magic, decompress in _COMPRESSED.items():
        if data.startswith(magic):
            try:
                data = decompress(data)
            except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
                raise ValueError(f"{path} cannot be decompressed: {error}") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace"), []
    if data.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path} is a workbook or an archive; save it as CSV")
    if b"\0" in data[:4096]:
        raise ValueError(f"{path} must be a table in text (CSV); it is not text")
    try:
        return data.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace"), ["it is not UTF-8: read as Windows-1252"]


def _rows(path: Path, text: str, notes: list[str]) -> _Rows:
    """Header and rows, without comments and empty lines."""
    start, comment, skipped = 0, "", 0
    lines = io.StringIO(text, newline="")
    for line in lines:
        if line.strip() and not line.startswith("#"):
            break
        comment = line.lstrip("# ") if line.startswith("#") else comment
        start, skipped = start + len(line), skipped + 1
    text = text[start:]
    told = re.match(r"sep=(.)\r?\n", text)  # as Excel writes it
    if told:
        text, skipped = text[told.end() :], skipped + 1
    delimiter = told[1] if told else _delimiter(text)
    rows = _split(path, text, delimiter, skipped)
    found = next(rows, None)
    if found is None:
        raise ValueError(f"{path} is empty; it must have a header and rows")
    header, above = found[1], next(csv.reader([comment], delimiter=delimiter), [])
    if _are_values(header) and len(above) == len(header) and not _are_values(above):
        notes.append("the header is the comment above the rows")
        header, rows = above, itertools.chain([found], rows)
    names = [name.strip() for name in header]
    if _are_values(names):
        raise ValueError(
            f"{path} must have a header, a first line that names the columns; got "
            f"{delimiter.join(names[:4])!r}"
        )
    rest = list(rows)
    if rest and len(names) + 1 == len(rest[0][1]) and len(rest[0][1]) > 2:
        names = ["", *names]  # as R writes names of rows
    return _Rows(names, [row for _, row in rest], [line for line, _ in rest], delimiter)


def _split(path: Path, text: str, delimiter: str, skipped: int) -> Iterator[tuple[int, list[str]]]:
    """Rows that hold something, and the lines in which they begin."""
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True
    )
    line = skipped + 1
    try:
        for row in reader:
            if len(row) > 1 or any(map(str.strip, row)):  # no blank line
                yield line, row
            line = skipped + reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f'{path}, line {line}: {error}; is a quote (") left open there?') from None


def _delimiter(text: str) -> str:
    """By which all rows have the same number of cells; else the one of most cells of the header."""

    def key(delimiter: str) -> tuple[bool, int]:
        # a row may go on over lines, so that all is parsed; what is wrong is told when it is read
        counts = []
        try:
            rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
            counts = [len(row) for row in itertools.islice(rows, _LOOKED_AT) if row]
        except csv.Error:
            pass
        return len(set(counts)) == 1 and counts[0] > 1, counts[0] if counts else 0

    return max(_DELIMITERS, key=key)


def _are_values(names: Sequence[str]) -> bool:
    """Whether a header is a row of numbers and so none; 0, 1, 2, … are names."""
    if not all(_NUMBER.fullmatch(name.strip()) for name in names):
        return False
    if not all(_WHOLE.fullmatch(name.strip()) for name in names) or len(names) < 2:
        return True
    return any(int(b) != int(a) + 1 for a, b in itertools.pairwise(names))


def _named(
    path: Path, names: list[str], columns: dict[int, list[str]], notes: list[str]
) -> dict[str, list[str]]:
    """Columns by name; those without one are row numbers, or empty, or refused."""
    kept: dict[str, list[str]] = {}
    for i, name in enumerate(names):
        cells = columns[i]
        if not name and i == 0 and len(set(cells)) == len(cells):
            notes.append("the first column has no name: taken for names of rows, and left out")
        elif not name and not any(cells):
            notes.append(f"column {i + 1} has neither name nor values: left out")
        elif not name:
            raise ValueError(f"{path}: column {i + 1} must have a name in the header")
        elif name in kept:
            raise ValueError(
                f"{path}: columns {names.index(name) + 1} and {i + 1} must not both be called "
                f"{name!r}"
            )
        else:
            kept[name] = cells
    return kept


# cells of a column as values


def numbers(cells: Cells, name: str) -> np.ndarray:
    """Cells of a column as numbers, whatever they look like.

    Raises:
        ValueError: if one is no number; says in which line.
    """
    parsed = _parsed(cells, name, _as_numbers, are_codes=False)
    if parsed is None:
        _refused(cells, name, "numbers", _other(cells, name, _NUMBER))
    return parsed


def dates(cells: Cells, name: str) -> np.ndarray:
    """Cells of a column as dates.

    Raises:
        ValueError: if one is no date; says in which line.
    """
    parsed = _parsed(cells, name, _as_dates)
    if parsed is None:
        _refused(cells, name, _DATES, _other(cells, name, _DATE))
    return parsed


def texts(cells: Cells, name: str) -> np.ndarray:
    """Cells of a column as they are; None where they are missing."""
    return np.array([cell or None for cell in cells.columns[name]], object)


def flags(cells: Cells, name: str) -> np.ndarray:
    """Cells of a column as True and False; None where they are missing.

    Raises:
        ValueError: if one is neither; says in which line.
    """
    meanings = {"": None, "true": True, "false": False, "1": True, "0": False}
    found = [meanings.get(cell.lower(), cell) for cell in cells.columns[name]]
    wrong = [i for i, flag in enumerate(found) if isinstance(flag, str)]
    if wrong:
        _refused(cells, name, "True or False", wrong)
    return np.array(found, object)


def values(cells: Cells, name: str) -> np.ndarray:
    """Cells of a column as what they look like.

    Raises:
        ValueError: if numbers or dates have other cells among them; says in which line.
    """
    for parse in (_as_numbers, _as_dates):
        parsed = _parsed(cells, name, parse)
        if parsed is not None:
            return parsed
    distinct = set(cells.columns[name]) - {""}
    for pattern, what in ((_NUMBER, "numbers"), (_DATE, _DATES)):
        count = sum(pattern.fullmatch(c) is not None and not _CODE.match(c) for c in distinct)
        if len(distinct) > _FEW and count > len(distinct) / 2:
            _refused(cells, name, what, _other(cells, name, pattern))
    return texts(cells, name)


def _refused(cells: Cells, name: str, what: str, wrong: Sequence[int]) -> NoReturn:
    line, cell = cells.lines[wrong[0]], cells.columns[name][wrong[0]]
    raise ValueError(
        f"{cells.path}, line {line}: column {name!r} must hold {what}; got {cell[:40]!r}"
    )


def _other(cells: Cells, name: str, pattern: re.Pattern) -> list[int]:
    """Rows whose cell is not of a pattern; all that are not empty if there is none."""
    there = [i for i, cell in enumerate(cells.columns[name]) if cell]
    return [i for i in there if not pattern.fullmatch(cells.columns[name][i])] or there


def _parsed(
    cells: Cells, name: str, parse: Callable[..., np.ndarray | None], **options: bool
) -> np.ndarray | None:
    """Values of all cells, each different cell parsed once; None where one is not so."""
    column = cells.columns[name]
    distinct = [c for c in dict.fromkeys(column) if c]
    found = parse(cells, name, distinct, **options) if distinct else np.zeros(0)
    if found is None:
        return None
    place = {cell: i for i, cell in enumerate(distinct)}
    index = np.array([place.get(cell, -1) for cell in column])
    if (index >= 0).all():
        return found[index]
    if found.dtype.kind == "i":  # of which float64 holds not all
        found = found.astype(np.float64 if np.abs(found).max() <= 2**53 else object)
    gone = {"M": np.datetime64("NaT"), "f": np.nan, "O": None}[found.dtype.kind]
    return np.append(found, np.array([gone], found.dtype))[index]


def _as_numbers(
    cells: Cells, name: str, distinct: list[str], *, are_codes: bool = True
) -> np.ndarray | None:
    plain = [re.sub("[\u00a0\u202f]", "", c).replace("\u2212", "-") for c in distinct]
    if are_codes and any(map(_CODE.fullmatch, plain)):
        return None
    if not all(map(_NUMBER.fullmatch, plain)) and not (plain := _with_points(cells, name, plain)):
        return None
    if all(map(_WHOLE.fullmatch, plain)):
        return np.array([int(c) for c in plain], np.int64)
    return np.array([float(c) for c in plain], np.float64)


def _with_points(cells: Cells, name: str, plain: list[str]) -> list[str]:
    """Numbers whose commas part thousands, or stand for the point; none where they are neither."""
    rest = [c for c in plain if not _NUMBER.fullmatch(c)]
    are_thousands, are_decimals = (all(map(p.fullmatch, rest)) for p in (_THOUSANDS, _COMMA))
    if are_thousands and not (are_decimals and cells.delimiter == ";"):
        plain = [c.replace(",", "") for c in plain]
        way, read_as = "commas part thousands", rest[0].replace(",", "")
    elif are_decimals and (any("." in c for c in rest) or not any("." in c for c in plain)):
        plain = [c.replace(".", "").replace(",", ".") for c in plain]
        way, read_as = "a comma is the point", rest[0].replace(".", "").replace(",", ".")
    else:
        return []
    if not any(note.startswith(way) for note in cells.notes):
        cells.notes.append(f"{way}: {rest[0]} is {read_as}, in column {name!r}")
    return plain


def _as_dates(cells: Cells, name: str, distinct: list[str]) -> np.ndarray | None:
    found = list(filter(None, map(_DATE.fullmatch, distinct)))
    if len(found) < len(distinct):
        return None
    try:
        at = np.array([match[1].replace(" ", "T") for match in found], "datetime64")
    except ValueError:  # the 30th of February
        return None
    if not any(match[2] or match[3] for match in found):
        return at
    cells.notes.append(f"column {name!r}: times are turned into UTC")
    ahead = [(int(m[3]) * 60 + int(m[3][0] + m[4])) if m[3] else 0 for m in found]
    return at - np.array(ahead, "timedelta64[m]")
