"""Command line: `probdiff list`, `run`, `fit`, `bound`, `impute` and `sample`.

A run prints its table to standard output and what it is doing to standard error. What a user got
wrong (an unknown name, a file that is not there) is said in one line, with exit status 2. What a
command needs is imported when it runs: to list experiments is quick. `commands` holds those for
tables.
"""

import argparse
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from probdiff import files
from probdiff.commands import fit, impute, rows, sample
from probdiff.commands.console import UsageError, listed, say, seed
from probdiff.experiments import TABLE, find

EXAMPLES = """\
examples:
  probdiff list                        which experiments there are, and how long each takes
  probdiff run digits                  the main job: train, bound, sample, infer
  probdiff run swiss-roll --quick      the same in a few steps, to see that it runs
  probdiff bound runs/digits x.npy     how probable the trained model finds the rows of x.npy

  probdiff fit table.csv               what the columns of a table are taken for
  probdiff fit table.csv --out model   a model of the table, weighed against simpler ones
  probdiff impute model new.csv --out draws.nc   what is missing, given what is there
  probdiff sample model --out more.csv           rows as the model has them

A run prints its table to standard output, says what it is doing on standard error, and leaves
everything in a folder. `probdiff COMMAND --help` says more.
"""
RUN = """\
Run an experiment: train, sample and bound, or condition a trained model.

It prints one table, each figure with its standard error, beside the best that is possible
("ceiling") and what others published, and leaves in a folder:
  report.md, table.json     the table, what was done, and links to the figures
  *.png                     figures
  bounds.nc, posterior.nc   bounds per example, posterior draws: for ArviZ and xarray
  config.json, params.safetensors   the model, for probdiff.load and `probdiff bound`
"""
AFTERWARDS = """

How long each takes: `probdiff list`. Interrupt with Ctrl-C; the long ones keep checkpoints in their
folder, and the same command goes on from the last ({resumed}).
"""
BOUND = """\
Bound the log density (of bits, classes or grey levels: the log probability) of data under a
trained model, from below: the mean of K over examples and its standard error, in nats and bits.
"""
MEANINGS = {
    "report.md": "the table",
    "table.json": "the table",
    ".nc": "open with xarray.open_datatree",
    ".png": "figure",
}
FROM_PYTHON = """\
DATA is a CSV file of rows, for a model that `probdiff fit` left: columns by name, in any order. The
bound is then of the density in the table's units; rows with missing entries are left out, and
numbers that were rounded to a step get noise as wide.

Or an array of examples along axis 0, in the units the model was trained on:
  >>> numpy.save("x.npy", probdiff.datasets.digits().test)
  $ probdiff bound runs/digits x.npy
Each example's bound is in the file, group "bound": xarray.open_datatree(FILE). From Python it is
probdiff.diagnostics.bound.
"""
COMMANDS = ("list", "run", "fit", "bound", "impute", "sample")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 for a mistake, 130 if interrupted.

    Args:
        argv: Arguments after the program's name; those of the process if absent.
    """
    argv, parser = sys.argv[1:] if argv is None else argv, _parser()
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        parser.error(f"no command {argv[0]!r}; there are {listed(COMMANDS, argv[0])}")
    args = parser.parse_args(argv)
    if args.command is not _list:
        _keep_compiled()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
            args.command(args)
    except UsageError as error:
        say(f"probdiff: {error}")
        return 2
    except OSError as error:  # no network, a full disk, a folder that cannot be written
        say(f"probdiff: {error}")
        return 2
    except KeyboardInterrupt as interrupt:
        kept = "see `probdiff run --help` for what goes on from a checkpoint"
        kept = kept if args.command is _run else "nothing was written"
        say(f"probdiff: {interrupt}" if str(interrupt) else f"probdiff: interrupted; {kept}")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    as_written = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        "probdiff", epilog=EXAMPLES, **as_written,
        description="Diffusion probabilistic models: run experiments, model tables, bound data.",
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("list", help="say which experiments there are").set_defaults(command=_list)
    afterwards = AFTERWARDS.format(resumed=_those("resumes"))
    run = commands.add_parser(
        "run", help="run an experiment", description=RUN, **as_written,
        epilog="\n  ".join(["experiments:", *_summaries()]) + afterwards,
    )  # fmt: skip
    add = run.add_argument
    add("name", metavar="NAME", help="name of the experiment, see `probdiff list`")
    add("--out", metavar="DIR", help="folder for the results (default: runs/NAME)")
    add("--model", metavar="DIR", help=f"trained model, for {_those('model')} (default: what "
        "`probdiff run digits`, or mnist, leaves, trained first if it is not there)")  # fmt: skip
    add("--recipe", choices=("cpu", "gpu"),
        help=f"how much to train and measure, for {_those('has_gpu')} (default: cpu)")  # fmt: skip
    add("--seed", type=seed, default=0, help="same seed, same table (default: 0)")
    add("--quick", action="store_true", help="a few steps only; numbers mean nothing")
    run.set_defaults(command=_run)

    fit.add(commands)
    bound = commands.add_parser(
        "bound", help="bound the log density of data under a trained model", description=BOUND,
        epilog=FROM_PYTHON, **as_written,
    )  # fmt: skip
    add = bound.add_argument
    add("model", metavar="MODEL_DIR", help="folder of a run or of probdiff.save")
    add("data", metavar="DATA", help="examples: .npy along axis 0, the data's units; or CSV, for "
        "a model of a table")  # fmt: skip
    add("--out", metavar="FILE", help="bounds (default: MODEL_DIR/bounds-DATA.nc)")
    add("--seed", type=seed, default=0, help="seeds the noise (default: 0)")
    add("--ladder", type=int, metavar="S", help="also say how loose K is: importance-weighted "
        "bounds and SMC with S trajectories for each example, four times")  # fmt: skip
    bound.set_defaults(command=_bound)
    impute.add(commands)
    sample.add(commands)
    return parser


def _keep_compiled() -> None:
    """Let JAX keep what it compiles in the user's cache folder, if it can be written.

    JAX reads this as it is imported. Who has set its folder, or imported it before, is left alone.
    """
    if "jax" in sys.modules or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = cache / "probdiff" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no place, or no home
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder.resolve())


def _those(field: str) -> str:
    """Names of the experiments that have something."""
    return ", ".join(name for name, entry in TABLE.items() if getattr(entry, field))


def _list(args: argparse.Namespace) -> None:
    for line, entry in zip(_summaries(), TABLE.values(), strict=True):
        print(f"{line} ({entry.duration})")


def _summaries() -> list[str]:
    width = max(map(len, TABLE))
    return [f"{name:{width}}  {entry.summary}" for name, entry in TABLE.items()]


def _run(args: argparse.Namespace) -> None:
    if args.name not in TABLE:
        raise UsageError(f"no experiment {args.name!r}; there are {listed(TABLE, args.name)}")
    entry = TABLE[args.name]
    if args.model is not None and not entry.model:
        raise UsageError(f"--model is for {_those('model')}; {args.name} trains its own")
    if args.recipe is not None and not entry.has_gpu:
        raise UsageError(f"--recipe is for {_those('has_gpu')}; {args.name} has one")
    out = Path(args.out or Path("runs") / args.name)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out must be a folder; {out} is a file")
    from probdiff.experiments.report import format_table

    experiment = find(args.name)
    if args.model is not None:
        try:
            experiment.load(args.model)
        except (ValueError, FloatingPointError) as error:
            raise UsageError(f"--model: {error}") from error
    say(f"{args.name}: {entry.summary}")
    say("quick run, numbers mean nothing" if args.quick else f"takes {entry.duration}")
    began = time.monotonic()
    rows = experiment.run(
        out, seed=args.seed, quick=args.quick, recipe=args.recipe or "cpu", progress=True,
        say=say, model=args.model,
    )  # fmt: skip
    print(format_table(rows))
    say(f"done in {time.monotonic() - began:.0f} s; {out} holds:")
    found = sorted(out.iterdir())
    width = max((len(file.name) for file in found), default=0)
    for file in found:
        say(f"  {file.name:{width}}  {_meaning(file, out)}".rstrip())


def _meaning(file: Path, out: Path) -> str:
    """What a file of a run is, or how to open it; nothing of a file unknown."""
    if file.name in ("params.safetensors", "config.json"):
        return f"the model: probdiff.load({out.as_posix()!r})"
    return MEANINGS.get(file.name, MEANINGS.get(file.suffix, ""))


def _bound(args: argparse.Namespace) -> None:
    if args.ladder is not None and args.ladder < 2:
        raise UsageError(f"--ladder must be at least 2 trajectories; got {args.ladder}")
    rows.check_model(args.model)
    if rows.is_table(args.model, args.data):
        diffusion, params, found = rows.rows_to_bound(args.model, args.data, args.seed)
        x_0, log_jacobian = found.x_0, found.log_jacobian
    else:
        diffusion, params, x_0 = _model_and_array(args)
        log_jacobian = None
    import jax
    import xarray as xr

    from probdiff import diagnostics

    stem = Path(re.sub(r"\.(gz|xz|bz2)$", "", Path(args.data).name)).stem
    out = Path(args.out or Path(args.model) / f"bounds-{stem}.nc")
    if not out.parent.is_dir():
        raise UsageError(f"--out must lie in a folder that exists; got {out}")
    problem = (jax.random.key(args.seed), diffusion, params, x_0)
    try:
        tree = diagnostics.bound(*problem, progress=True)
        if args.ladder is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", diagnostics.LadderWarning)  # said below, as a line
                rungs = diagnostics.ladder(*problem, sizes=(1, args.ladder), progress=True)
            tree["ladder"] = rungs["ladder"]
    except (ValueError, FloatingPointError) as error:
        raise UsageError(f"{args.data}: {error}") from error
    if log_jacobian is not None:
        for name in tree.children:
            tree[name] = xr.DataTree(rows.in_units(tree[name].to_dataset(), log_jacobian))
    with files.replacing(out) as partial:
        tree.to_netcdf(partial, engine="h5netcdf")
    k = tree["bound"].attrs
    nats, bits = (f"{k['mean' + u]:.6g} ± {k['se' + u]:.2g}" for u in ("", "_bits"))
    print(f"K = {nats} nats = {bits} bits")
    if args.ladder is not None:
        _print_ladder(tree["ladder"], args.ladder)
    print(f"per example, mean and standard error over {len(x_0)} examples; each example in {out}")


def _model_and_array(args: argparse.Namespace) -> tuple[Any, Any, np.ndarray]:
    x_0 = _read_array(Path(args.data))
    from probdiff import GaussianKernel, load

    try:
        diffusion, params = load(args.model)
    except (ValueError, FloatingPointError) as error:
        raise UsageError(error) from error
    if isinstance(diffusion.kernel, GaussianKernel) and not np.issubdtype(x_0.dtype, np.floating):
        x_0 = x_0.astype("float64")
    return diffusion, params, x_0


def _print_ladder(group: Any, size: int) -> None:
    if group.attrs["warnings"]:
        say(group.attrs["warnings"])
    texts = {
        "bound": f"K, {group.attrs['num_draws']} draws a step",
        "importance": f"importance weighted, S = {size}",
        "smc": f"SMC, S = {size}",
    }
    for name, text in texts.items():
        mean, se = (float(group[v].values.flat[-1]) for v in (f"{name}_mean", f"{name}_mean_se"))
        print(f"{text}: {mean:.6g} ± {se:.2g} nats")


def _read_array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    try:
        with path.open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # whatever a foreign or damaged file leads to
        raise UsageError(
            f"{path} must be an array of numbers saved by numpy.save; for text: numpy.save("
            f"{str(path.with_suffix('.npy'))!r}, numpy.loadtxt({str(path)!r}, delimiter=','))"
        ) from error
    if not isinstance(array, np.ndarray):
        raise UsageError(f"{path} must hold one array; it is an archive of several")
    if array.dtype.kind not in "biuf":
        raise UsageError(f"{path} must hold real numbers; got dtype {array.dtype}")
    return array


if __name__ == "__main__":
    sys.exit(main())
