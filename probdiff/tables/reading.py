"""Files of text as columns of a table."""

from pathlib import Path

import numpy as np

from probdiff import delimited
from probdiff.arguments import check_object, check_path
from probdiff.delimited import Cells, Parser
from probdiff.tables.kinds import Category, Constant, Empty, Kind, Ordered
from probdiff.tables.table import Table


def read_csv(path: str | Path, table: Table | None = None) -> dict[str, np.ndarray]:
    """Columns of a CSV file: numbers, dates as 2024-05-06 and texts, for `Table` and `encode`.

    The delimiter is one of , ; tab |, the first line a header. Missing are empty cells, NA, NaN,
    null and ?. Files may be compressed by gzip, xz or bzip2. Where pandas is at hand, what
    `pandas.read_csv` returns does as well.

    Args:
        path: The file.
        table: A table whose columns are read as it has them, whatever they look like here; others
            are left out.

    Raises:
        ValueError: if the file is not there or no such table; says in which line.

    Example:
        >>> import pathlib, tempfile
        >>> text = "day;size;colour\\n2024-05-06;1,5;red\\n2024-05-07;;green\\n2024-05-09;2,5;?\\n"
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "t.csv"
        ...     count = file.write_text(text)
        ...     data = tables.read_csv(file)
        >>> data["size"].tolist(), data["colour"].tolist()
        ([1.5, nan, 2.5], ['red', 'green', None])
    """
    check_path("path", path)
    check_object(Table, or_none=True, table=table)
    try:
        cells = delimited.read(Path(path))
        return columns(cells, {} if table is None else of_table(table))
    except ValueError as error:
        raise ValueError(f"path must be of a table in text: {error}") from None


def columns(cells: Cells, parsers: dict[str, Parser]) -> dict[str, np.ndarray]:
    """Columns of cells: those that `parsers` names by its parsers; all where it is empty."""
    if not parsers:
        return {name: delimited.values(cells, name) for name in cells.columns}
    return {name: parse(cells, name) for name, parse in parsers.items() if name in cells.columns}


def of_table(table: Table) -> dict[str, Parser]:
    """How cells of each column of a table are read."""
    dates = {name for name in table.names if isinstance(table.origin(name), np.datetime64)}
    return {
        name: delimited.dates if name in dates else of_kind(kind)
        for name, kind in table.kinds.items()
    }


def of_kind(kind: Kind) -> Parser:
    """How cells of a column of a kind are read, dates apart."""
    if isinstance(kind, Empty):
        return delimited.values
    if not isinstance(kind, Category | Ordered | Constant):
        return delimited.numbers
    value = kind.value if isinstance(kind, Constant) else kind.values[0]
    if isinstance(value, np.datetime64):
        return delimited.dates
    if isinstance(value, bool):
        return delimited.flags
    return delimited.texts if isinstance(value, str) else delimited.numbers
