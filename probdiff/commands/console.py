"""What commands share: what they say, and options that several take."""

import argparse
import csv
import difflib
import io
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from probdiff import files

MISSING: dict[str, Any] = {
    "action": "append", "default": [], "metavar": "TEXT",
    "help": "a text that means missing, such as -99; may be repeated",
}  # fmt: skip
"""Of `--missing`."""


class UsageError(Exception):
    """What the user can mend; its text is the whole message."""


def say(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


def listed(names: Iterable[str], wrong: str) -> str:
    """Names there are, and the one that was meant, where one is close."""
    names = list(names)
    lower = {name.lower(): name for name in names}
    found = difflib.get_close_matches(wrong.lower(), lower, n=1)
    return ", ".join(names) + "".join(f". Did you mean {lower[name]}?" for name in found)


def seed(text: str) -> int:
    """Of `--seed`."""
    if not 0 <= (number := int(text)) < 2**32:
        raise argparse.ArgumentTypeError(f"must lie in 0..2**32 - 1; got {number}")
    return number


def positive(text: str) -> int:
    """Of options that count."""
    if not 1 <= (number := int(text)) < 2**31:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number


def pair(option: str, text: str, names: Iterable[str], pattern: str) -> re.Match[str]:
    """What stands around the = of an option, for a column that there is."""
    found = re.fullmatch(rf"\s*(.+?)\s*=\s*{pattern}\s*", text, re.DOTALL)
    if not found:
        return no_pair(option, text)
    if found[1] not in names:
        raise UsageError(f"{option}: no column {found[1]!r}; there are {listed(names, found[1])}")
    return found


def no_pair(option: str, text: str) -> Any:
    """Refuse an option that is not as `COLUMN=...`."""
    example = "price=Positive" if option == "--kind" else "weight=0.5"
    raise UsageError(f"{option} must be as {example}; got {text!r}")


def write_csv(path: Path | None, rows: Iterable[Iterable[Any]]) -> None:
    """Rows as CSV, all or nothing; on standard output without a path."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    if path is None:
        sys.stdout.write(text.getvalue())
    else:
        files.replace(path, text.getvalue().encode())
