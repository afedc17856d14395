"""`probdiff impute`: what is missing in rows of a table, given what is there."""

import argparse
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from probdiff import files
from probdiff.bars import bar
from probdiff.commands.console import (
    MISSING,
    UsageError,
    listed,
    no_pair,
    pair,
    positive,
    say,
    seed,
    write_csv,
)
from probdiff.commands.kinds import is_missing
from probdiff.commands.rows import columns_of, encoded, loaded, read_cells, read_for

if TYPE_CHECKING:
    from probdiff import Diffusion, Table
    from probdiff.delimited import Cells
    from probdiff.tables import Kind, Rows
    from probdiff.types import Params

_SHOWN = 10  # rows whose intervals are printed
_LEVELS = 0.05, 0.5, 0.95
_AT_ONCE = 16  # rows of one run of particles
_ADVICE = "Raise --particles."
IMPUTE = """\
Draw what is missing in the rows of a table, given what is there.

Each row is conditioned on its own entries by sequential Monte Carlo, exact as --particles grows.
Printed are the median and central 90 % interval of the missing entries of the first rows, or the
probabilities of classes. In DRAWS.nc are the draws, as named columns in their units, of the rows
with something missing: xarray.open_datatree(FILE)["posterior"].
"""


def add(commands: Any) -> None:
    """Add the parser."""
    as_written = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    impute = commands.add_parser(
        "impute", help="draw what is missing in rows of a table", description=IMPUTE, **as_written
    )
    add = impute.add_argument
    add("model", metavar="MODEL", help="folder that `probdiff fit` left")
    add("table", metavar="NEW", help="CSV file; columns that are not in it are missing throughout")
    add("--out", metavar="DRAWS.nc", required=True, help="draws, netCDF")
    add("--table", metavar="FILE.csv", dest="intervals", help="intervals of all rows, CSV")
    add("--noise", action="append", default=[], metavar="COLUMN=SD",
        help="entries of a column of numbers have normal noise of this sd")  # fmt: skip
    add("--missing", **MISSING)
    add("--draws", type=positive, default=200, help="draws of a row to keep (default: 200)")
    add("--particles", type=positive, default=256, help="particles of a run (default: 256)")
    add("--runs", type=positive, default=2, help="independent runs (default: 2)")
    add("--steps", type=positive, help="levels to walk: fewer are quicker and less exact "
        "(default: all of the model)")  # fmt: skip
    add("--seed", type=seed, default=0, help="same seed, same draws (default: 0)")
    impute.set_defaults(command=_impute)


class _Problem(NamedTuple):
    """Rows with something to draw."""

    numbers: np.ndarray
    """Which rows of the file, from 1 on."""
    rows: "Rows"
    """What is known of them exactly."""
    noisy: dict[str, tuple[np.ndarray, float]]
    """Entries that are measured with noise, less the column's origin, and its sd."""
    given: dict[str, np.ndarray]
    """Columns that are known exactly, as they were given."""
    drawn: dict[str, np.ndarray]
    """Which entries are to be told, of the columns that have numbers."""


class _Block(NamedTuple):
    """Draws of a few rows, and what they rest on."""

    x_0: np.ndarray
    """All of them, `(M, rows, d)`."""
    ess: np.ndarray
    log_evidence: np.ndarray
    """log p of what is known of each row, nats, in the units of the table."""
    log_evidence_se: np.ndarray
    warning: np.ndarray
    """Text for each row, empty where there is nothing to say."""


def _impute(args: argparse.Namespace) -> None:
    cells = read_cells(args.table, args.missing)
    for path in map(Path, filter(None, (args.out, args.intervals))):
        if path.is_dir() or not path.parent.is_dir():
            raise UsageError(f"{path} must be a file in a folder that exists")
    noise = dict(_noise(text, cells.columns) for text in args.noise)
    table, diffusion, params = loaded(args.model)
    _check_noise(table, noise)
    problem = _problem(table, cells, noise)
    count, done, kept, lines = len(problem.numbers), 0, [], []
    with bar(total=count, desc="impute", unit="row") as progress:
        try:
            for block in _blocks(args, table, diffusion, params, problem):
                of = slice(done, done := done + len(block.ess))
                lines += _intervals(table, problem, of, block)
                kept.append(block._replace(x_0=np.swapaxes(block.x_0[: args.draws], 0, 1)))
                progress.update(len(block.ess))
        except KeyboardInterrupt:
            if not kept:
                raise
    whole = _Block(*map(np.concatenate, zip(*kept, strict=True)))
    _print_first(lines)
    _write_draws(args, table, problem, whole._replace(x_0=np.swapaxes(whole.x_0, 0, 1)))
    if args.intervals is not None:
        head = ("row", "column", "value", "low", "high", "probabilities", "warning")
        write_csv(Path(args.intervals), [head, *lines])
    bad = np.flatnonzero(whole.warning != "")
    if len(bad):
        rows = ", ".join(map(str, problem.numbers[bad[:5]])) + (", ..." if len(bad) > 5 else "")
        say(
            f"draws of {len(bad)} of {done} rows are not to be trusted as they are (row {rows}): "
            f"{whole.warning[bad[0]]}"
        )
    say(f"draws are in {args.out}: xarray.open_datatree({args.out!r})['posterior']")
    if done < count:
        raise KeyboardInterrupt(f"interrupted: {done} of {count} rows are in {args.out}")


def _problem(table: "Table", cells: "Cells", noise: dict[str, float]) -> _Problem:
    """What is known and what is not; says how much."""
    columns, count = read_for(table, cells), len(cells.lines)
    missing = {name: np.ones(count, bool) for name in table.names}
    missing |= {name: is_missing(values) for name, values in columns.items()}
    given = {name: values for name, values in columns.items() if name not in noise}
    nothing = {next(iter(columns)): np.full(count, np.nan)}
    rows = encoded(table, cells.path, given or nothing)
    drawn = {
        name: missing[name] | (name in noise) for name, kind in table.kinds.items() if kind.entries
    }
    todo = np.flatnonzero(np.any(list(drawn.values()), 0))
    if not len(todo):
        raise UsageError(f"{cells.path}: nothing to impute, no entry is missing")
    noisy = {}
    for name, sd in noise.items():
        y = columns[name].astype(np.float64) - float(table.origin(name))
        if np.isinf(y).any():
            raise UsageError(f"{cells.path}: column {name!r} must be finite")
        noisy[name] = y[todo], sd
    is_blank = ~rows.mask[todo].any(1) & np.all([np.isnan(y) for y, _ in noisy.values()], 0)
    blank = f", of {is_blank.sum():,} nothing is known" if is_blank.any() else ""
    say(f"{cells.path}: {count:,} rows, {len(todo):,} with something to draw{blank}")
    return _Problem(
        todo + 1, type(rows)(*(part[todo] for part in rows)), noisy,
        {name: values[todo] for name, values in given.items()},
        {name: of[todo] for name, of in drawn.items()},
    )  # fmt: skip


def _noise(text: str, names: Iterable[str]) -> tuple[str, float]:
    found = pair("--noise", text, names, r"([^=]*)")
    try:
        sd = float(found[2])
    except ValueError:
        return no_pair("--noise", text)
    if not 0 < sd < 1e30:
        raise UsageError(f"--noise: the sd must be positive and finite; got {found[2]}")
    return found[1], sd


def _check_noise(table: "Table", noise: dict[str, float]) -> None:
    from probdiff import tables

    for name in noise:
        if name not in table.names:
            raise UsageError(f"--noise: no column {name!r} in the model; there are "
                             f"{listed(table.names, name)}")  # fmt: skip
        kind = table.kinds[name]
        is_date = isinstance(table.origin(name), np.datetime64)
        if is_date or not isinstance(kind, tables.Continuous | tables.Rounded):
            what = "dates" if is_date else kind
            raise UsageError(f"--noise is for columns of numbers; {name!r} is of {what}")


def _blocks(
    args: argparse.Namespace, table: "Table", diffusion: "Diffusion", params: "Params",
    problem: _Problem,
) -> Iterator[_Block]:  # fmt: skip
    """Draws of all rows, a few at a time."""
    import jax
    import numpyro
    import numpyro.distributions as dist

    from probdiff import infer, readouts

    key, prior = jax.random.key(args.seed), diffusion.prior(params)
    x_0, mask, log_jacobian = problem.rows
    size = -(-len(x_0) // -(-len(x_0) // _AT_ONCE))  # blocks of one size, the last full as well
    is_known = bool(mask.any())

    def program(known: Any, mask: Any, noisy: dict[str, tuple[Any, Any]]) -> None:
        with numpyro.plate("rows", size):
            x = prior(known=known, mask=mask) if is_known else prior()
            columns = table.columns(x)
            for name, (y, is_seen) in noisy.items():
                on_grid = table.kinds[name].grid[2] > 0  # where rounding would hide the slope
                value = x[..., table.place(name).start] if on_grid else columns[name]
                law = dist.Normal(value, problem.noisy[name][1]).mask(is_seen)
                numpyro.sample(f"{name} with noise", law, obs=y)

    is_mixture = isinstance(diffusion.readout, readouts.Mixture)
    twist = infer.ReadoutTwist() if is_mixture else infer.LaplaceTwist()
    options = {"num_particles": args.particles, "num_runs": args.runs, "steps": args.steps}
    smc = infer.SMC(program, twist=twist, **options)
    for block, start in enumerate(range(0, len(x_0), size)):
        of = np.minimum(np.arange(start, start + size), len(x_0) - 1)  # the last row fills it up
        noisy = {n: (np.nan_to_num(y[of]), ~np.isnan(y[of])) for n, (y, _) in problem.noisy.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", infer.InferenceWarning)
            smc.run(jax.random.fold_in(key, block), np.nan_to_num(x_0[of]), mask[of], noisy)
        log_z = np.asarray(smc.log_evidence) + log_jacobian[of]
        se, ess, warned = np.asarray(smc.log_evidence_se), smc.result.health.ess, _warned(smc)
        rows = slice(0, len(x_0) - start)
        draws = smc.get_samples()["x_0"][:, rows]
        yield _Block(draws, ess[rows], log_z[rows], se[rows], np.array(warned, object)[rows])


def _warned(smc: Any) -> list[str]:
    """What is to be said of each row of a run."""
    from probdiff.infer.health import Health, complaints

    of = smc.result
    rows = (Health(*(np.asarray(a)[i, ...] for a in of.health)) for i in range(len(of.health.ess)))
    return [" ".join(complaints(of.options, row, _ADVICE)) for row in rows]


def _intervals(
    table: "Table", problem: _Problem, of: slice, block: _Block
) -> list[tuple[Any, ...]]:
    """Row, column, value, low, high, probabilities and warning of every entry that was drawn."""
    lines, decoded = [], columns_of(table, block.x_0)
    for i, number in enumerate(problem.numbers[of]):
        for name, is_drawn in problem.drawn.items():
            if is_drawn[of][i]:
                told = _told(table.kinds[name], decoded[name][:, i])
                lines.append((number, name, *told, block.warning[i]))
    return lines


def _told(kind: "Kind", draws: np.ndarray) -> tuple[str, str, str, str]:
    """Median and 90 % interval, or the likeliest class and the probabilities of all."""
    from probdiff import tables

    if isinstance(kind, tables.Category | tables.Ordered):
        values, counts = np.unique(draws.astype(str), return_counts=True)
        order = np.argsort(-counts, kind="stable")
        text = ", ".join(f"{values[k]} {counts[k] / len(draws):.2f}" for k in order)
        return str(values[order[0]]), "", "", text
    ordered = np.sort(draws)
    ends = (ordered[round(q * (len(draws) - 1))] for q in _LEVELS)
    low, middle, high = _to_digits(kind.step, *ends)
    return middle, low, high, ""


def _to_digits(step: float, low: Any, *rest: Any) -> list[str]:
    """Numbers as they are, where they have a step; else as fine as their interval asks for."""
    if step or not isinstance(low, float) or low == rest[-1]:
        return [str(value) for value in (low, *rest)]
    decimals = int(np.clip(2 - np.floor(np.log10(rest[-1] - low)), 0, 12))
    return [f"{value:.{decimals}f}" for value in (low, *rest)]


def _print_first(lines: list[tuple[Any, ...]]) -> None:
    """Of the first rows."""
    rows = list(dict.fromkeys(line[0] for line in lines))
    first = [line for line in lines if line[0] in rows[:_SHOWN]]
    width = max((len(line[1]) for line in first), default=0)
    for number, name, value, low, high, text, _ in first:
        text = text or f"{value}  (90 % from {low} to {high})"
        print(f"row {number:<6} {name:{width}}  {' '.join(text.split())}")
    if len(rows) > _SHOWN:
        print(f"... and {len(rows) - _SHOWN} more rows")


def _write_draws(
    args: argparse.Namespace, table: "Table", problem: _Problem, found: _Block
) -> None:
    """The draws as named columns; entries that are known as they were given."""
    import xarray as xr

    posterior, names, rows = {}, safe(table.names), problem.numbers[: len(found.ess)]
    for name, draws in columns_of(table, found.x_0).items():
        if name in problem.given:
            known = np.flatnonzero(~is_missing(problem.given[name][: len(rows)]))
            draws[:, known] = problem.given[name][known]
        attrs = {"long_name": name} if names[name] != name else {}
        posterior[names[name]] = (("chain", "draw", "row"), draws[None], attrs)
    coords = {"chain": [0], "draw": np.arange(len(found.x_0)), "row": rows}
    smc = {n: ("row", of) for n, of in found._asdict().items() if n != "x_0"}
    groups = {"posterior": xr.Dataset(posterior, coords), "smc": xr.Dataset(smc, {"row": rows})}
    tree = xr.DataTree.from_dict(groups, name="probdiff")
    tree.attrs = {"model": args.model, "table": args.table, "row": "1 is the first of the table"}
    packed = {n: {"zlib": True} for n, v in posterior.items() if v[1].dtype.kind in "iuf"}
    with files.replacing(Path(args.out)) as partial:
        tree.to_netcdf(partial, engine="h5netcdf", encoding={"/posterior": packed})


def safe(names: Iterable[str]) -> dict[str, str]:
    """Names as netCDF takes them."""
    safe: dict[str, str] = {}
    for name in names:
        plain = name.replace("/", "_")
        while plain in ("chain", "draw", "row") or plain in safe.values():
            plain += "_"
        safe[name] = plain
    return safe
