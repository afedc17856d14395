"""`probdiff fit`: from a CSV file to a model of it, judged on rows that were held out."""

import argparse
import shlex
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probdiff import files
from probdiff.commands import kinds
from probdiff.commands.console import MISSING, UsageError, listed, positive, say, seed
from probdiff.commands.kinds import is_missing
from probdiff.commands.rows import COLUMNS, complete, read_cells

if TYPE_CHECKING:
    from probdiff import Diffusion, Table
    from probdiff.types import Params

_FEW_CLASSES, _MOST_CLASSES = 20, 50  # of a column of texts that is taken for a category unasked
_QUICK = 20  # steps
_FEWEST_TO_FIT = 20  # complete rows that baselines ask for
_FEWEST = 70  # rows, of which a tenth is held out and the recipe wants 50
FIT = """\
Train a diffusion of a table. Without --out: only say which kinds the columns are taken for.

TABLE is a CSV file: a header, then a row a line, cells parted by , ; tab or |, perhaps compressed
(.gz, .xz, .bz2). Numbers, dates as 2024-05-06 07:08:09, texts; missing are empty cells, NA, NaN,
null and ?. A tenth of the rows, equal rows together, is held out for the report.
"""
KINDS = """\
kinds, where another is meant than what is printed:
  --kind price=Positive              above 0, by its logarithm
  --kind share=Bounded(0, 1)         between two ends, which are not taken
  --kind income=HeavyTailed          a few values far out, of either sign
  --kind rain=Hurdle(Positive, 0)    one value again and again, the others of a kind with density
  --kind height=Continuous           any number
  --kind age=Count(120)              0, 1, ..., 120; without (120): up to the largest that is there
  --kind dose=Rounded(0.5, 0, 10)    0, 0.5, ..., 10; each value has a probability
  --kind code=Category               classes without order, though they are numbers
  --kind size=Ordered(S, M, L)       levels with an order
Put quotes around what has brackets: --kind "age=Count(120)".

The folder MODEL holds the model (probdiff.load), columns.json (probdiff.Table.load) and report.md.
"""


def add(commands: Any) -> None:
    """Add the parser."""
    as_written = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    fit = commands.add_parser(
        "fit", help="train a model of a table", description=FIT, epilog=KINDS, **as_written
    )
    add = fit.add_argument
    add("table", metavar="TABLE", help="CSV file")
    add("--out", metavar="MODEL", help="folder for the model; a model in it is replaced")
    add("--kind", action="append", default=[], metavar="COLUMN=KIND", help="see below")
    add("--drop", action="append", default=[], metavar="COLUMN", help="leave a column out")
    add("--missing", **MISSING)
    add("--steps", type=positive, help="steps of training (default: by the number of rows)")
    add("--seed", type=seed, default=0, help="same seed, same model (default: 0)")
    add("--quick", action="store_true", help=f"{_QUICK} steps only, to see that it runs")
    fit.set_defaults(command=_fit)


def _check_texts(columns: dict[str, np.ndarray], told: dict[str, kinds.Told]) -> None:
    """Refuse texts that are names or sentences, no classes."""
    found = []
    for name, values in columns.items():
        if values.dtype == object and name not in told:
            texts = {v for v in values if v is not None}
            most = min(_MOST_CLASSES, max(_FEW_CLASSES, len(values) // 2))
            if len(texts) > most and any(isinstance(v, str) for v in texts):
                found.append((name, len(texts), min(texts)))
    if found:
        text = "; ".join(f"{name!r} ({count}, such as {one[:20]!r})" for name, count, one in found)
        drop = " ".join(f"--drop {shlex.quote(name)}" for name, *_ in found)
        raise UsageError(
            f"too many different texts for a category: {text}. Leave out by {drop}, or say "
            "--kind COLUMN=Category; dates must be as 2024-05-06, numbers without units"
        )


def _taken(columns: dict[str, np.ndarray], rows: Any) -> dict[str, np.ndarray]:
    return {name: values[rows] for name, values in columns.items()}


def _fit(args: argparse.Namespace) -> None:
    cells = read_cells(args.table, args.missing)
    for name in args.drop:
        if name not in cells.columns:
            raise UsageError(f"--drop: no column {name!r}; there are {listed(cells.columns, name)}")
    names = [name for name in cells.columns if name not in args.drop]
    told = dict(kinds.parse(text, names) for text in args.kind)
    out = None if args.out is None else Path(args.out)
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out must be a folder; {out} is a file")
    try:
        columns = {name: kinds.values(cells, name, told.get(name)) for name in names}
    except ValueError as error:
        raise UsageError(error) from None
    for note in cells.notes:
        say(f"{args.table}: {note}")
    _check_texts(columns, told)
    columns = _without_empty_rows(args.table, columns)
    count = len(next(iter(columns.values()), ()))
    if out is not None and count < _FEWEST:
        raise UsageError(f"{args.table} must have at least {_FEWEST} rows; got {count}")
    for name, values in columns.items():
        if count > 2 and values.dtype.kind in "if" and (np.diff(values) == 1).all():
            say(f"{args.table}: column {name!r} counts the rows; --drop it if it says nothing else")
    table = _described(args.table, columns, told)
    print(f"{args.table}: {count:,} rows")
    print(table, flush=True)
    if out is None:
        say("to train: the same with --out MODEL; to correct a kind: --kind, see --help")
        return
    report = _trained(args, out, table, columns)
    files.replace(out / "report.md", "\n".join(report).encode())
    print("\n".join(report))
    say(f"{out} holds the model; go on with `probdiff bound`, `impute` and `sample`")


def _without_empty_rows(path: str, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    missing = np.array([is_missing(values) for values in columns.values()])
    is_empty = missing.all(0) if len(missing) else np.zeros(0, bool)
    if not is_empty.any():
        return columns
    say(f"{path}: {is_empty.sum()} rows hold nothing and are left out")
    return _taken(columns, ~is_empty)


def _described(path: str, columns: dict[str, np.ndarray], told: dict[str, kinds.Told]) -> "Table":
    from probdiff import Table

    corrected = {name: kinds.made(name, of, columns[name]) for name, of in told.items()}
    try:
        return Table(columns, kinds=corrected)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None


def _trained(
    args: argparse.Namespace, out: Path, table: "Table", columns: dict[str, np.ndarray]
) -> list[str]:
    """Train and save; the report in lines."""
    import jax

    from probdiff import recipes, save

    keys = jax.random.split(jax.random.key(args.seed), 4)
    is_held_out = held_out(keys[0], table, columns)
    train, test = (_taken(columns, of) for of in (~is_held_out, is_held_out))
    say(f"training on {np.sum(~is_held_out):,} rows; {np.sum(is_held_out):,} are held out")
    steps = args.steps or (_QUICK if args.quick else None)
    began, checkpoint = time.monotonic(), _made(out) / "run.safetensors"
    try:
        diffusion, params, fitted = recipes.table(
            keys[1], table, train, num_steps=steps, checkpoint=checkpoint
        )
    except (ValueError, FloatingPointError) as error:
        raise UsageError(f"{args.table}: {error}") from error
    table.save(out / COLUMNS)
    save(out, diffusion, params)
    checkpoint.unlink(missing_ok=True)
    say(f"{fitted.num_steps:,} steps in {time.monotonic() - began:.0f} s; held-out rows follow")
    quick = ["quick run: the numbers mean nothing"] if args.quick else []
    return quick + judged(keys[2:], table, diffusion, params, train, test)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def held_out(key: Any, table: "Table", columns: dict[str, np.ndarray]) -> np.ndarray:
    """A tenth of the different rows; equal ones together."""
    import jax

    x_0 = np.nan_to_num(table.encode(columns).x_0, nan=1e300)
    _, group = np.unique(x_0, axis=0, return_inverse=True)
    count = int(group.max()) + 1
    return np.asarray(jax.random.permutation(key, count))[group.ravel()] < max(1, count // 10)


def judged(
    keys: Any, table: "Table", diffusion: "Diffusion", params: "Params", train: Any, test: Any
) -> list[str]:
    """K of held-out rows beside the baselines, and whether one of these is better."""
    from probdiff import diagnostics

    parts = [table.encode(of, key=key) for of, key in zip((train, test), keys, strict=True)]
    rows, scored = (complete(part) for part in parts)
    if len(scored.x_0) < 2:
        return ["no rows without missing entries are held out: nothing to hold K beside"]
    draws = int(np.clip(2_000 // len(scored.x_0), 1, 20))
    trees = {"diffusion": diagnostics.bound(
        keys[0], diffusion, params, scored.x_0, num_draws=draws, progress=True
    )}  # fmt: skip
    if len(rows.x_0) >= _FEWEST_TO_FIT:
        say("baselines on the same rows; of many rows they take minutes (Ctrl-C leaves them out)")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trees |= diagnostics.baselines(keys[1], diffusion, rows.x_0, scored.x_0)
        except KeyboardInterrupt:
            say("baselines are left out")
    log_p = {n: tree["bound"]["bound"].values + scored.log_jacobian for n, tree in trees.items()}
    lines = [
        f"log p of {len(scored.x_0):,} held-out rows, nats a row, in the units of the table:",
        "",
    ]
    width, worse = max(map(len, log_p)) + 3, []
    for name, values in log_p.items():
        mean, se = _mean_and_se(values)
        line = (
            f"    {name + (', K' if name == 'diffusion' else ''):{width}}  {mean:9.3f} ± {se:.3f}"
        )
        if name != "diffusion":
            ahead, se = _mean_and_se(log_p["diffusion"] - values)
            line += f"    K less this {ahead:7.3f} ± {se:.3f}"
            worse += [f"{name} by {-ahead:.3f} ± {se:.3f}"] if ahead < -2 * se else []
        lines.append(line)
    if worse:
        text = f"The trained model is worse than {', '.join(worse)} nats a row, by K, a lower bound"
        lines += ["", f"{text}; `probdiff bound MODEL ROWS --ladder 100` says how loose it is."]
    return lines


def _mean_and_se(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)
