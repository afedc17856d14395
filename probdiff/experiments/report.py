"""What a run of an experiment is told, what it finds, and its report: a table, text and figures.

A line of the table is a figure with its standard error, beside the ceiling that no correct program
passes and the number that others published:

    | row          | value            | unit           | ceiling | published |
    |--------------|------------------|----------------|---------|-----------|
    | K, test part | -0.1364 ± 0.0042 | bits per point | 0.1000  | –         |

A standard error is given to two significant digits and its value to the same decimals; a value
without one to four digits; what is absent is a dash, and a column of dashes alone is left out. The
same lines go to `table.json` unrounded, with all fields. Times are no part of the table, so that a
rerun with the same seed leaves the same table.
"""

import dataclasses
import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat

import jax
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from jaxtyping import Array, Num
from matplotlib.figure import Figure

from probdiff import Diffusion, files, save
from probdiff.types import Params

QUICK = "This was a quick run of a few steps, to see that all works: its numbers mean nothing."

_ABSENT = "–"
_BOUNDS = ("K,", "K (", "K − best", "ladder,")


class Row(NamedTuple):
    """One figure of a report; None is what does not apply or is not known."""

    row: str
    """What was measured, and on what."""
    value: SupportsFloat | None
    se: SupportsFloat | None = None
    unit: str | None = None
    """Unit of all the numbers, with the reference measure where `value` is a density."""
    ceiling: SupportsFloat | None = None
    """`value` of a perfect model."""
    published: SupportsFloat | None = None


class Run(NamedTuple):
    """What one run was told; `Experiment.run` says what each is."""

    out_dir: Path
    size: Any
    """How much to do."""
    seed: int
    quick: bool
    recipe: str
    progress: bool
    say: Callable[[str], None]
    model: Path | None

    def keys(self, *names: str) -> dict[str, Array]:
        """A key for each of the names, all from the seed."""
        keys = jax.random.split(jax.random.key(self.seed), len(names))
        return dict(zip(names, keys, strict=True))


class Found(NamedTuple):
    """What one run found: lines of the table, and what is left in the folder."""

    rows: list[Row]
    figures: dict[str, Figure]
    trees: dict[str, xr.DataTree] = {}  # noqa: RUF012
    sections: dict[str, str] = {}  # noqa: RUF012
    model: tuple[Diffusion, Params] | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment: what is done, how much of it, and what is said of it.

    Args:
        title: Heading of the report.
        text: What is done and how to read it, for the report; a docstring.
        conduct: Does it.
        sizes: How much is done, by recipe: "cpu", "gpu" if there is one, and "quick".
        load: Reads, and checks, the trained model that `conduct` takes, if it takes one.
    """

    title: str
    text: str
    conduct: Callable[[Run], Found]
    sizes: Mapping[str, Any]
    load: Callable[[str | Path], tuple[Diffusion, Params]] | None = None

    def run(
        self,
        out_dir: str | Path,
        *,
        seed: int = 0,
        quick: bool = False,
        recipe: str = "cpu",
        progress: bool = True,
        say: Callable[[str], None] = lambda text: None,
        model: str | Path | None = None,
    ) -> list[Row]:
        """Do it; write report, table, figures, bounds or posteriors and model into `out_dir`.

        Args:
            out_dir: Folder of the run, made if absent; a checkpoint in it is gone on from.
            seed: Seeds everything; data that are published, and their split, are fixed.
            quick: A few steps only, to see that all runs; the numbers mean nothing.
            recipe: "cpu" or "gpu".
            progress: Show bars.
            say: Told what is being done.
            model: Folder of the trained model, for an experiment that takes one; if absent what
                `probdiff run` leaves, which is trained first where it is not there.

        Returns:
            The rows of the table.

        Raises:
            ValueError: If there is no such recipe, or the model is one of other data, or none is
                taken.
        """
        if recipe not in self.sizes:
            raise ValueError(f"recipe must be one of {', '.join(self.sizes)}; got {recipe!r}")
        if model is not None and self.load is None:
            raise ValueError(f"model must be absent, {self.title} trains its own; got {model}")
        size, out_dir = self.sizes["quick" if quick else recipe], Path(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        model = None if model is None else Path(model)
        found = self.conduct(Run(out_dir, size, seed, quick, recipe, progress, say, model))
        settings = [f"- {name}: {value}" for name, value in _settings(size)]
        if found.model is not None:
            save(out_dir, *found.model)
            count = sum(leaf.size for leaf in jax.tree.leaves(found.model[1]))
            settings.append(f"- parameters of the model: {count:,}")
        texts = {"What was done": inspect.cleandoc(self.text)}
        texts |= found.sections | {"Settings": "\n".join(settings)}
        left = {"sections": texts, "figures": found.figures, "trees": found.trees}
        write_report(out_dir, self.title, found.rows, **left, quick=quick)
        return found.rows


def _settings(size: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of a size, those of the tuples in it among them."""
    for name, value in size._asdict().items():
        if isinstance(value, tuple) and type(value) is not tuple:
            yield from _settings(value)
        else:
            yield name, ", ".join(map(str, value)) if isinstance(value, tuple) else value


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, aligned to be read as plain text too.

    Unit, ceiling and published are columns only where some row has one.
    """
    lines = [("row", "value", "unit", "ceiling", "published")]
    for row in rows:
        unit = _ABSENT if row.unit is None else row.unit
        others = (_format_value(value, None) for value in (row.ceiling, row.published))
        cells = (row.row, _format_value(row.value, row.se), unit, *others)
        lines.append(tuple(cell.replace("|", r"\|") for cell in cells))
    columns = [c for c in zip(*lines, strict=True)
               if c[0] in ("row", "value") or set(c[1:]) != {_ABSENT}]  # fmt: skip
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    texts = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])


def mean_and_se(values: Num[np.ndarray, " examples"]) -> tuple[float, float]:
    """Mean over independent examples and its standard error."""
    values = np.asarray(values, np.float64)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def root_mean_square(errors: Num[np.ndarray, "examples numbers"]) -> tuple[float, float]:
    """Root of the mean square over independent examples, and its standard error."""
    mean, se = mean_and_se(np.mean(errors**2, 1))
    root = float(np.sqrt(mean))
    return root, se / (2 * root)


def write_report(
    out_dir: str | Path,
    title: str,
    rows: Sequence[Row],
    *,
    sections: Mapping[str, str] | None = None,
    figures: Mapping[str, Figure] | None = None,
    trees: Mapping[str, xr.DataTree] | None = None,
    quick: bool = False,
) -> Path:
    """Writes `report.md`, `table.json`, figures and data, over what an earlier run left.

    A number that is infinite or not a number is null in `table.json`, which has no word for it; the
    table in `report.md` shows which it is.

    Args:
        out_dir: Folder of the run, made if absent.
        title: Heading of the report.
        rows: Lines of the table.
        sections: Headings and their Markdown text, below the table.
        figures: File names without ending, and what they show; linked at the end, and closed.
        trees: File names without ending, and what is kept in them as netCDF.
        quick: Whether the report begins by saying that its numbers mean nothing.

    Returns:
        Path of `report.md`.

    Raises:
        ValueError: If the name of a figure or tree is no plain file name.
    """
    figures, trees = figures or {}, trees or {}
    for argument, names in {"figures": figures, "trees": trees}.items():
        if wrong := [name for name in names if name != Path(name).name]:
            raise ValueError(f"{argument} must be named by plain file names; got {wrong[0]!r}")
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    parts = [f"# {title}", format_table(rows)]
    sections = ({"Quick run": QUICK} if quick else {}) | dict(sections or {})
    for heading, text in sections.items():
        parts += [f"## {heading}", text.strip()]
    for name, figure in figures.items():
        figure.savefig(out_dir / f"{name}.png", dpi=150, bbox_inches="tight")
        plt.close(figure)
        parts.append(f"![{name}]({name}.png)")
    for name, tree in trees.items():
        with files.replacing(out_dir / f"{name}.nc") as partial:
            tree.to_netcdf(partial, engine="h5netcdf")
    table = [{name: _to_json(field) for name, field in row._asdict().items()} for row in rows]
    texts = {
        "table.json": json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False),
        "report.md": "\n\n".join(parts),
    }
    for name, text in texts.items():
        files.replace(out_dir / name, (text + "\n").encode())
    return out_dir / "report.md"


def _format_value(value: SupportsFloat | None, se: SupportsFloat | None) -> str:
    if value is None:
        return _ABSENT
    value = float(value)
    if se is None:
        return _format_number(value)
    se = float(se)
    if not (math.isfinite(value) and math.isfinite(se) and se > 0):
        return f"{_format_number(value)} ± {se:g}"
    if not 1e-6 <= se < 1e6:
        return f"{value:g} ± {se:.1e}"
    decimals = max(0, 1 - math.floor(math.log10(se)))
    return f"{value:.{decimals}f} ± {se:.{decimals}f}"


def _format_number(value: float) -> str:
    """Four significant digits, and all digits of a larger whole part."""
    if value == 0:
        return "0"
    if not math.isfinite(value) or not 1e-4 <= abs(value) < 1e9:
        return f"{value:.4g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def _to_json(field: str | SupportsFloat | None) -> str | float | None:
    is_number = not (field is None or isinstance(field, str))
    return (float(field) if math.isfinite(field) else None) if is_number else field


def above_ceiling(rows: Sequence[Row], ceiling_se: SupportsFloat = 0.0) -> list[str]:
    """Names of the bounds (K, and rungs of a ladder) above their ceiling by three standard errors.

    `ceiling_se` is the standard error of the ceilings.
    """
    bounds = [row for row in rows if row.row.startswith(_BOUNDS) and row.ceiling is not None]
    return [row.row for row in bounds
            if row.value - row.ceiling > 3 * math.hypot(row.se or 0.0, ceiling_se) + 1e-4
    ]  # fmt: skip


def verdict(rows: Sequence[Row], ceiling_se: SupportsFloat = 0.0) -> str:
    """No bound passes its ceiling; or which do, in bold. See `above_ceiling`."""
    too_high = ", ".join(above_ceiling(rows, ceiling_se))
    if not too_high:
        return "No bound is above its ceiling by more than three standard errors."
    return (
        f"**Above the ceiling by more than three standard errors: {too_high}. "
        "This is a bug: no correct bound can be there.**"
    )
