"""Models of tables and rows for them: a folder with `columns.json` beside what `save` leaves."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probdiff import delimited
from probdiff.commands.console import UsageError, say

if TYPE_CHECKING:
    import xarray as xr

    from probdiff import Diffusion, Table
    from probdiff.delimited import Cells
    from probdiff.tables import Rows
    from probdiff.types import Params

COLUMNS = "columns.json"
"""File with the description of a table, in the folder of a model."""


def read_cells(path: str, missing: Sequence[str]) -> "Cells":
    """The cells of a CSV file."""
    try:
        return delimited.read(Path(path), missing)
    except ValueError as error:
        raise UsageError(error) from None


def check_model(folder: str) -> None:
    """Refuse what is no model, before anything is imported to read it."""
    if not (Path(folder) / "config.json").is_file():
        raise UsageError(f"{folder} holds no model: {Path(folder) / 'config.json'} is not there")


def loaded(folder: str) -> "tuple[Table, Diffusion, Params]":
    """A model of a table, whose two parts belong together."""
    check_model(folder)
    if not (Path(folder) / COLUMNS).is_file():
        raise UsageError(
            f"{folder} holds no model of a table: {COLUMNS} is not there; `probdiff fit` makes one"
        )
    from probdiff import Table, load

    try:
        diffusion, params = load(folder)
        table = Table.load(Path(folder) / COLUMNS)
    except (ValueError, FloatingPointError) as error:
        raise UsageError(error) from error
    is_of = (
        diffusion.event_shape == table.event_shape and diffusion.last_step == table.last_step
        and np.array_equal(np.asarray(diffusion.loc, np.float64), table.loc)
        and np.array_equal(np.asarray(diffusion.scale, np.float64), table.scale)
    )  # fmt: skip
    if not is_of:
        raise UsageError(f"{folder}: {COLUMNS} is of another table than the model beside it")
    return table, diffusion, params


def read_for(table: "Table", cells: "Cells") -> dict[str, np.ndarray]:
    """Columns of a table's new rows; what does not match is said."""
    from probdiff.tables import reading

    unknown = [name for name in cells.columns if name not in table.names]
    absent = [name for name in table.names if name not in cells.columns]
    if len(absent) == len(table.names):
        raise UsageError(f"{cells.path} has none of the model's columns {', '.join(table.names)}")
    try:
        columns = reading.columns(cells, reading.of_table(table))
    except ValueError as error:
        raise UsageError(error) from None
    for note in cells.notes:
        say(f"{cells.path}: {note}")
    if unknown:
        say(f"{cells.path}: not in the model, left out: {', '.join(unknown)}")
    if absent:
        say(f"{cells.path}: not in the file, missing throughout: {', '.join(absent)}")
    return columns


def encoded(table: "Table", path: Any, columns: dict[str, np.ndarray], key: Any = None) -> "Rows":
    """Rows as numbers of the diffusion."""
    try:
        return table.encode(columns, key=key)
    except ValueError as error:
        hint = "" if "must be" not in str(error) else (
            ". `probdiff fit` takes a wider --kind, such as Count(50); an empty cell is missing"
        )  # fmt: skip
        raise UsageError(f"{path}: {error}{hint}") from None


def is_table(model: str, data: str) -> bool:
    """Whether data are rows of a table for a model of one, and no array."""
    return Path(data).suffix != ".npy" and (Path(model) / COLUMNS).is_file()


def rows_to_bound(model: str, data: str, key_seed: int) -> "tuple[Diffusion, Params, Rows]":
    """A model and the complete rows of a CSV file; those with missing entries are left out."""
    cells = read_cells(data, ())
    import jax

    table, diffusion, params = loaded(model)
    key = jax.random.fold_in(jax.random.key(key_seed), 1)
    rows = encoded(table, data, read_for(table, cells), key)
    whole = complete(rows)
    left = len(rows.x_0) - len(whole.x_0)
    if not len(whole.x_0):
        raise UsageError(f"{data}: all rows have missing entries; K is of complete rows alone")
    if left:
        say(f"{data}: {left} of {len(rows.x_0)} rows have missing entries and are left out")
    return diffusion, params, whole


def in_units(group: "xr.Dataset", log_jacobian: np.ndarray) -> "xr.Dataset":
    """Bounds by example as densities in the units of the table."""
    import xarray as xr

    from probdiff.diagnostics.bounds import summary

    shift = xr.DataArray(log_jacobian, dims="example")
    for name in ("bound", "importance", "smc"):
        for part in (name, f"{name}_low", f"{name}_high"):
            if part in group:
                group[part] = (group[part] + shift).transpose(*group[part].dims)
        if f"{name}_mean" in group:
            count = group.sizes["example"]
            group[f"{name}_mean"] = group[name].mean("example")
            if count > 1:
                group[f"{name}_mean_se"] = group[name].std("example", ddof=1) / count**0.5
    if "mean" in group.attrs:
        group.attrs |= summary(group["bound"].values)
    return group.assign(log_jacobian=shift)


def complete(rows: "Rows") -> "Rows":
    """Rows of which nothing is missing."""
    return type(rows)(*(part[rows.mask.all(1)] for part in rows))


def columns_of(table: "Table", x_0: np.ndarray) -> dict[str, np.ndarray]:
    """Draws `(..., d)` as named columns `(...)`, in whatever form the table was described."""
    decoded = table.decode(x_0)
    columns = {name: np.asarray(decoded[name]).reshape(x_0.shape[:-1]) for name in table.names}
    return {name: _as_whole(values, table.kinds[name].step) for name, values in columns.items()}


def _as_whole(values: np.ndarray, step: float) -> np.ndarray:
    """Whole numbers as integers, though missing ones made the column one of floats."""
    is_whole = values.dtype.kind == "f" and step >= 1 and (values == np.round(values)).all()
    return values.astype(np.int64) if is_whole else values
