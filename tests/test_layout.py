"""The package's shape: imports point one way, and what no file may hold."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "probdiff"
FILES = sorted(PACKAGE.rglob("*.py"))
# A place imports from the places above it. A folder is one place: its files may import each other.
# `datasets` is apart: it imports nothing of ours.
ORDER = [
    "bars",
    "datasets",
    "arguments",
    "types",
    "compilation",
    "kernels",
    "schedules",
    "readouts",
    "networks",
    "trajectories",
    "validation",
    "prior",
    "diffusion",
    "standard",
    "times",
    "elbo",
    "simple_loss",
    "devices",
    "train",
    "storage",
    "sample",
    "infer",
    "diagnostics",
    "plots",
    "experiments",
    "cli",
]
# These call the package as a user does; all others name the module they need.
USERS = {"experiments", "cli"}
PRINTERS = {"experiments", "cli", "infer"}


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


def place_of(path):
    """The place in ORDER of a file, or "" for the package's own `__init__`."""
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if part == "__init__" else part


def imported_places(tree, path):
    """Places of ours that a file imports, "" for the package itself; function bodies count."""
    folder = ["probdiff", *path.relative_to(PACKAGE).parts[:-1]]
    targets = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) + 1 - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            # From the package itself, `from probdiff import kernels` names a place.
            targets += [[*base, alias.name] for alias in node.names]
    ours = [target[1:] for target in targets if target[0] == "probdiff"]
    return {target[0] if target and target[0] in ORDER else "" for target in ours}


def calls(tree):
    return {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }


def breach_of_order(path, source):
    """What is wrong with a file's imports, or None."""
    place, imported = place_of(path), imported_places(ast.parse(source), path)
    if place == "":
        return None
    if place not in ORDER:
        return f"{place} has no place in ORDER"
    if place == "datasets" and imported - {"datasets"}:
        return "datasets imports nothing of ours"
    if "" in imported and place not in USERS:
        return "imports the package instead of the module it needs"
    later = [other for other in imported - {"", place} if ORDER.index(other) > ORDER.index(place)]
    return f"{place} comes before {', '.join(sorted(later))}" if later else None


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path):
    assert breach_of_order(path, path.read_text()) is None


@pytest.mark.parametrize(
    ("file", "source", "breach"),
    [
        ("elbo.py", "from probdiff.diffusion import Diffusion", None),
        ("elbo.py", "from probdiff.train import fit", "elbo comes before train"),
        ("elbo.py", "from .train import fit", "elbo comes before train"),
        ("elbo.py", "from . import train", "elbo comes before train"),
        ("elbo.py", "def f():\n    import probdiff.train", "elbo comes before train"),
        ("elbo.py", "from probdiff import train", "elbo comes before train"),
        ("elbo.py", "from probdiff import fit", "imports the package instead"),
        ("cli.py", "from probdiff import fit", None),
        ("infer/smc.py", "from probdiff.infer.twists import KernelTwist", None),
        ("infer/smc.py", "from .twists import KernelTwist", None),
        ("infer/smc.py", "from ..plots import trajectory", "infer comes before plots"),
        ("datasets.py", "from probdiff.types import Array", "datasets imports nothing"),
        ("utils.py", "", "utils has no place in ORDER"),
    ],
)
def test_the_order_is_noticed_when_broken(file, source, breach):
    found = breach_of_order(PACKAGE / file, source)
    assert found is None if breach is None else breach in found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_opens_with_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_annotations_are_not_postponed(path):
    """Postponed ones would be strings to the run-time checker."""
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.module == "__future__")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_errors_are_raised_and_not_asserted(path):
    nodes = ast.walk(ast.parse(path.read_text()))
    assert [node.lineno for node in nodes if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_guessed_by_hasattr(path):
    assert "hasattr" not in calls(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_programs_print(path):
    assert "print" not in calls(ast.parse(path.read_text())) or place_of(path) in PRINTERS


def test_public_names_exist():
    import probdiff

    if probdiff.__file__ is None or "__all__" not in Path(probdiff.__file__).read_text():
        pytest.skip("no public names yet")
    names = probdiff.__all__
    assert sorted(set(names)) == sorted(names)
    assert [name for name in names if getattr(probdiff, name, None) is None] == []
