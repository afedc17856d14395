"""Command line: `probdiff list`, `probdiff run NAME`, `probdiff bound MODEL_DIR DATA.npy`.

A run prints its table to standard output and what it is doing to standard error. What a user got
wrong (an unknown name, a file that is not there) is said in one line, with exit status 2.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from probdiff import GaussianKernel, diagnostics, load
from probdiff.experiments import (
    binary_mnist,
    cifar10,
    ddpm_mnist,
    ddpm_swiss_roll,
    digits,
    heartbeat,
    mnist,
    mnist_inpainting,
    parametrisations,
    patches,
    restoration,
    swiss_roll,
    toy_language,
)
from probdiff.experiments.report import format_table

RESTORATIONS = {
    "denoise": restoration.DENOISE,
    "inpaint": restoration.INPAINT,
    "super-resolution": restoration.SUPER_RESOLUTION,
}
EXPERIMENTS = {
    "digits": digits,
    "swiss-roll": swiss_roll,
    "ddpm-swiss-roll": ddpm_swiss_roll,
    "heartbeat": heartbeat,
    "toy-language": toy_language,
    "binary-mnist": binary_mnist,
    "mnist": mnist,
    "mnist-inpaint": mnist_inpainting,
    "cifar10": cifar10,
    "ddpm-mnist": ddpm_mnist,
    "readouts": parametrisations,
    "dead-leaves": patches.DEAD_LEAVES,
    "bark": patches.BARK,
} | RESTORATIONS
LOADERS = dict.fromkeys(RESTORATIONS, restoration.load_digits) | {
    "mnist-inpaint": mnist_inpainting.load_mnist
}
"""What reads, and checks, the trained model of an experiment that takes one."""
WITH_RECIPES = ("mnist", "mnist-inpaint", "cifar10", "ddpm-mnist", "dead-leaves", "bark")
"""Experiments that have a recipe for a CPU and one for a GPU."""
RESUMED = ("binary-mnist", "mnist", "cifar10", "ddpm-mnist", "dead-leaves", "bark")
"""Experiments that go on from a checkpoint."""


EXAMPLES = """\
examples:
  probdiff list                        which experiments there are, and how long each takes
  probdiff run digits                  the main job: train, bound, sample, infer
  probdiff run swiss-roll --quick      the same in a few steps, to see that it runs
  probdiff bound runs/digits x.npy     how probable the trained model finds the rows of x.npy

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
"""What a file that a run leaves is, by its name or its ending."""
FROM_PYTHON = """\
DATA.npy is an array of examples along axis 0, in the units the model was trained on:
  >>> numpy.save("x.npy", probdiff.datasets.digits().test)
  $ probdiff bound runs/digits x.npy
Each example's bound is in the file, group "bound": xarray.open_datatree(FILE). From Python it is
probdiff.diagnostics.bound.
"""


class UsageError(Exception):
    """What the user can mend; its text is the whole message."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 for a mistake, 130 if interrupted.

    Args:
        argv: Arguments after the program's name; those of the process if absent.
    """
    args = _parser().parse_args(argv)
    try:
        args.command(args)
    except UsageError as error:
        _say(f"probdiff: {error}")
        return 2
    except KeyboardInterrupt:
        _say("probdiff: interrupted; see `probdiff run --help` for what goes on from a checkpoint")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    as_written = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        prog="probdiff",
        description="Diffusion probabilistic models: run experiments, bound data.",
        epilog=EXAMPLES,
        **as_written,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="say which experiments there are")
    listing.set_defaults(command=_list)

    run = commands.add_parser(
        "run",
        help="run an experiment",
        description=RUN,
        epilog="\n  ".join(["experiments:", *_summaries()])
        + AFTERWARDS.format(resumed=", ".join(RESUMED)),
        **as_written,
    )
    run.add_argument("name", metavar="NAME", help="name of the experiment, see `probdiff list`")
    run.add_argument("--out", metavar="DIR", help="folder for the results (default: runs/NAME)")
    run.add_argument(
        "--model",
        metavar="DIR",
        help=f"trained model, for {', '.join(LOADERS)} (default: what `probdiff run digits`, or "
        "mnist, leaves, trained first if it is not there)",
    )
    run.add_argument(
        "--recipe",
        choices=("cpu", "gpu"),
        help=f"how much to train and measure, for {', '.join(WITH_RECIPES)} (default: cpu)",
    )
    run.add_argument("--seed", type=_seed, default=0, help="same seed, same table (default: 0)")
    run.add_argument(
        "--quick",
        action="store_true",
        help="a few steps, to see that it runs; numbers mean nothing",
    )
    run.set_defaults(command=_run)

    bound = commands.add_parser(
        "bound",
        help="bound the log density of data under a trained model",
        description=BOUND,
        epilog=FROM_PYTHON,
        **as_written,
    )
    bound.add_argument("model", metavar="MODEL_DIR", help="folder of a run or of probdiff.save")
    bound.add_argument("data", metavar="DATA.npy", help="examples along axis 0, the data's units")
    bound.add_argument("--out", metavar="FILE", help="bounds (default: MODEL_DIR/bounds-DATA.nc)")
    bound.add_argument("--seed", type=_seed, default=0, help="seeds the noise (default: 0)")
    bound.add_argument(
        "--ladder",
        type=int,
        metavar="S",
        help="also say how loose K is: importance-weighted bounds and SMC with S trajectories for "
        "each example, four times",
    )
    bound.set_defaults(command=_bound)
    return parser


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"must lie in 0..2**32 - 1; got {seed}")
    return seed


def _list(args: argparse.Namespace) -> None:
    durations = [experiment.DURATION for experiment in EXPERIMENTS.values()]
    for line, duration in zip(_summaries(), durations, strict=True):
        print(f"{line} ({duration})")


def _summaries() -> list[str]:
    width = max(map(len, EXPERIMENTS))
    return [f"{name:{width}}  {experiment.SUMMARY}" for name, experiment in EXPERIMENTS.items()]


def _run(args: argparse.Namespace) -> None:
    if args.name not in EXPERIMENTS:
        raise UsageError(f"no experiment {args.name!r}; there are {', '.join(EXPERIMENTS)}")
    experiment = EXPERIMENTS[args.name]
    options = _model_option(args) | _recipe_option(args)
    out = Path(args.out or Path("runs") / args.name)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out must be a folder; {out} is a file")
    _say(f"{args.name}: {experiment.SUMMARY}")
    _say("quick run, numbers mean nothing" if args.quick else f"takes {experiment.DURATION}")
    began = time.monotonic()
    rows = experiment.run(out, seed=args.seed, quick=args.quick, progress=True, say=_say, **options)
    print(format_table(rows))
    _say(f"done in {time.monotonic() - began:.0f} s; {out} holds:")
    files = sorted(out.iterdir())
    width = max((len(file.name) for file in files), default=0)
    for file in files:
        _say(f"  {file.name:{width}}  {_meaning(file, out)}".rstrip())


def _meaning(file: Path, out: Path) -> str:
    """What a file of a run is, or how to open it; nothing of a file unknown."""
    if file.name in ("params.safetensors", "config.json"):
        return f"the model: probdiff.load({out.as_posix()!r})"
    return MEANINGS.get(file.name, MEANINGS.get(file.suffix, ""))


def _model_option(args: argparse.Namespace) -> dict[str, Path]:
    """`--model` as an option of the experiment, looked at before anything is run."""
    if args.model is None:
        return {}
    if args.name not in LOADERS:
        raise UsageError(f"--model is for {', '.join(LOADERS)}; {args.name} trains its own")
    try:
        LOADERS[args.name](args.model)
    except ValueError as error:
        raise UsageError(f"--model: {error}") from error
    return {"model": Path(args.model)}


def _recipe_option(args: argparse.Namespace) -> dict[str, str]:
    """`--recipe` as an option of the experiment."""
    if args.recipe is None:
        return {}
    if args.name not in WITH_RECIPES:
        raise UsageError(f"--recipe is for {', '.join(WITH_RECIPES)}; {args.name} has one")
    return {"recipe": args.recipe}


def _bound(args: argparse.Namespace) -> None:
    if args.ladder is not None and args.ladder < 2:
        raise UsageError(f"--ladder must be at least 2 trajectories; got {args.ladder}")
    x_0 = _read_array(Path(args.data))
    try:
        diffusion, params = load(args.model)
    except ValueError as error:
        raise UsageError(error) from error
    if isinstance(diffusion.kernel, GaussianKernel):
        x_0 = x_0.astype(np.float32)
    out = Path(args.out or Path(args.model) / f"bounds-{Path(args.data).stem}.nc")
    if not out.parent.is_dir():
        raise UsageError(f"--out must lie in a folder that exists; got {out}")
    key = jax.random.key(args.seed)
    try:
        tree = diagnostics.bound(key, diffusion, params, x_0, progress=True)
        if args.ladder is not None:
            tree["ladder"] = _ladder(key, diffusion, params, x_0, args.ladder)
    except ValueError as error:
        raise UsageError(f"{args.data}: {error}") from error
    tree.to_netcdf(out, engine="h5netcdf")
    k = tree["bound"].attrs
    print(
        f"K = {k['mean']:.6g} ± {k['se']:.2g} nats = {k['mean_bits']:.6g} ± {k['se_bits']:.2g} bits"
    )
    if args.ladder is not None:
        group = tree["ladder"]
        texts = {
            "bound": f"K, {group.attrs['num_draws']} draws a step",
            "importance": f"importance weighted, S = {args.ladder}",
            "smc": f"SMC, S = {args.ladder}",
        }
        for name, text in texts.items():
            mean, se = (
                float(group[v].values.flat[-1]) for v in (f"{name}_mean", f"{name}_mean_se")
            )
            print(f"{text}: {mean:.6g} ± {se:.2g} nats")
    print(f"per example, mean and standard error over {len(x_0)} examples; each example in {out}")


def _ladder(key: Any, diffusion: Any, params: Any, x_0: np.ndarray, size: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diagnostics.LadderWarning)  # said below, as a line
        tree = diagnostics.ladder(
            key, diffusion, params, x_0, sizes=(1, size), progress=True
        )["ladder"]  # fmt: skip
    if tree.attrs["warnings"]:
        _say(tree.attrs["warnings"])
    return tree


def _read_array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UsageError(f"no such file: {path}")
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    except (ValueError, EOFError) as error:
        raise UsageError(
            f"{path} must be an array of numbers saved by numpy.save; for text: numpy.save("
            f"{str(path.with_suffix('.npy'))!r}, numpy.loadtxt({str(path)!r}, delimiter=','))"
        ) from error
    if not isinstance(array, np.ndarray):
        raise UsageError(f"{path} must hold one array; it is an archive of several")
    is_number = np.issubdtype(array.dtype, np.number) or array.dtype == bool
    if not (is_number and np.isrealobj(array)):
        raise UsageError(f"{path} must hold real numbers; got dtype {array.dtype}")
    return array


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
