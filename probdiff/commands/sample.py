"""`probdiff sample`: rows drawn from a trained model."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from probdiff import files
from probdiff.commands.console import UsageError, positive, seed, write_csv
from probdiff.commands.rows import COLUMNS, check_model, columns_of, loaded

SAMPLE = """\
Draw rows from a trained model: a CSV file of a table; of any other model an array for numpy.load.
"""


def add(commands: Any) -> None:
    """Add the parser."""
    as_written = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    sample = commands.add_parser(
        "sample", help="draw from a trained model", description=SAMPLE, **as_written
    )
    add = sample.add_argument
    add("model", metavar="MODEL", help="folder of `probdiff fit`, of a run or of probdiff.save")
    add("--num", type=positive, default=1000, help="how many (default: 1000)")
    add("--out", metavar="FILE", help="CSV (default: standard output); .npy of other models")
    add("--seed", type=seed, default=0, help="same seed, same draws (default: 0)")
    sample.set_defaults(command=_sample)


def _sample(args: argparse.Namespace) -> None:
    out = None if args.out is None else Path(args.out)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UsageError(f"{out} must be a file in a folder that exists")
    check_model(args.model)
    is_array = not (Path(args.model) / COLUMNS).is_file()
    if is_array and (out is None or out.suffix != ".npy"):
        raise UsageError(f"{args.model} is no model of a table: --out must end in .npy")
    import jax

    from probdiff import load, sample

    table = None
    try:
        if is_array:
            diffusion, params = load(args.model)
        else:
            table, diffusion, params = loaded(args.model)
        x_0 = sample.ancestral(
            jax.random.key(args.seed), diffusion, params, args.num, progress=True
        )
    except (ValueError, FloatingPointError) as error:
        raise UsageError(error) from error
    if table is not None:
        columns = columns_of(table, x_0)
        write_csv(out, [[*columns], *zip(*map(_as_cells, columns.values()), strict=True)])
    elif out is not None:
        with files.replacing(out) as partial, partial.open("wb") as file:
            np.save(file, x_0)


def _as_cells(values: np.ndarray) -> list[str]:
    if values.dtype.kind in "mM":
        return values.astype(str).tolist()
    return ["" if v != v else str(v) for v in values.tolist()]
