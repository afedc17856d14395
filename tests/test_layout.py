"""The package's shape: imports point one way, and what no file may hold."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "probdiff"
# A place imports from the places above it. A folder is one place: its files may import each other.
ORDER = """
    bars files delimited arguments types datasets compilation devices
    kernels schedules readouts tables networks validation columns reverse trajectories prior
    diffusion standard denoiser times elbo simple_loss guidance train storage samplers flow sample
    infer diagnostics plots recipes experiments commands cli
""".split()
# These call the package as a user does; all others name the module they need.
USERS = {"recipes", "experiments", "commands", "cli"}
PRINTERS = {"experiments", "commands", "cli", "infer"}


def place_of(path):
    """The place in ORDER of a file, or "" for the package's own `__init__`."""
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if part == "__init__" else part


def imports(nodes, path):
    """`["kernels", "GaussianKernel"]` and the like: what the nodes of a file import of ours."""
    folder = ["probdiff", *path.relative_to(PACKAGE).parts[:-1]]
    targets = []
    for node in nodes:
        if isinstance(node, ast.Import):
            targets += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) + 1 - node.level] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            # From the package itself, `from probdiff import kernels` names a place.
            targets += [[*base, alias.name] for alias in node.names]
    return [target[1:] for target in targets if target[0] == "probdiff"]


def breach_of_order(path, source):
    """What is wrong with a file's imports, or None; those in bodies of functions count."""
    place = place_of(path)
    targets = imports(ast.walk(ast.parse(source)), path)
    imported = {target[0] if target and target[0] in ORDER else "" for target in targets}
    if place == "":
        return None
    if place not in ORDER:
        return f"{place} has no place in ORDER"
    if place == "datasets" and imported - {"datasets", "arguments"}:
        return "datasets imports nothing of ours but arguments"
    if "" in imported and place not in USERS:
        return "imports the package instead of the module it needs"
    later = [other for other in imported - {"", place} if ORDER.index(other) > ORDER.index(place)]
    return f"{place} comes before {', '.join(sorted(later))}" if later else None


def breach_of_privacy(path, source):
    targets = imports(ast.walk(ast.parse(source)), path)
    private = [
        ".".join(target) for target in targets if any(re.match("_(?!_)", part) for part in target)
    ]
    return f"imports what is private, {', '.join(private)}" if private else None


def breach_of_docstring(path, source):
    return None if ast.get_docstring(ast.parse(source)) else "does not open with a docstring"


def breach_of_annotations(path, source):
    """Postponed ones would be strings to the run-time checker."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return "postpones annotations" if any(n.module == "__future__" for n in nodes) else None


def breach_of_errors(path, source):
    lines = [n.lineno for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Assert)]
    return f"asserts in lines {lines} instead of raising" if lines else None


def breach_of_calls(path, source):
    """Nothing is guessed by `hasattr`, and only programs print."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    called = {node.func.id for node in nodes if isinstance(node.func, ast.Name)}
    refused = {"hasattr"} if place_of(path) in PRINTERS else {"hasattr", "print"}
    return f"calls {', '.join(called & refused)}" if called & refused else None


RULES = [value for name, value in dict(globals()).items() if name.startswith("breach_of")]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_file_breaks_a_rule(rule):
    found = {file: rule(file, file.read_text()) for file in PACKAGE.rglob("*.py")}
    assert len(found) > 50
    breaches = {file: breach for file, breach in found.items() if breach}
    text = [f"{file.relative_to(PACKAGE)} {breach}" for file, breach in breaches.items()]
    assert not text, "\n".join(text)


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
        ("datasets.py", "from probdiff.arguments import check_at_least", None),
        ("datasets.py", "from probdiff.types import Array", "datasets imports nothing"),
        ("utils.py", "", "utils has no place in ORDER"),
        ("infer/smc.py", "from .twists import _Twist", "private, infer.twists._Twist"),
        ("elbo.py", "from probdiff._hidden import f", "private, _hidden.f"),
        ("elbo.py", "import numpy", "does not open with a docstring"),
        ("elbo.py", "from __future__ import annotations", "postpones annotations"),
        ("elbo.py", "def f():\n    assert True", "asserts in lines [3]"),
        ("elbo.py", "print()", "calls print"),
        ("infer/smc.py", "print()", None),
        ("infer/smc.py", "hasattr(1, 'x')", "calls hasattr"),
    ],
)
def test_a_breach_is_noticed(file, source, breach):
    source = source if breach and "docstring" in breach else f'"""."""\n{source}'
    found = [text for rule in RULES if (text := rule(PACKAGE / file, source))]
    assert found == [] if breach is None else any(breach in text for text in found)


def module_level(nodes):
    """Nodes that run when a file is imported: not functions' bodies, nor what types alone need."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            continue
        yield node
        yield from module_level(ast.iter_child_nodes(node))


def graph_of(sources):
    """Files that each file imports as it is imported, by their module names."""
    graph = {}
    for path, source in sources.items():
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        targets = imports(module_level(ast.parse(source).body), path)
        graph[tuple(part for part in parts if part != "__init__")] = targets
    longest = {}
    for module, targets in graph.items():
        # `["kernels", "GaussianKernel"]` is a name in `kernels`, not a file
        found = (tuple(t) if tuple(t) in graph else tuple(t[:-1]) for t in targets)
        longest[module] = {target for target in found if target in graph}
    return longest


def test_no_files_import_each_other_in_a_circle():
    graph = graph_of({file: file.read_text() for file in PACKAGE.rglob("*.py")})
    assert len(graph[("networks",)]) > 3
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises a CycleError that names them


def test_a_circle_is_noticed():
    sources = {
        PACKAGE / "infer/smc.py": "from probdiff.infer import twists",
        PACKAGE / "infer/twists.py": "from probdiff.infer.smc import SMC",
    }
    with pytest.raises(graphlib.CycleError, match="smc"):
        tuple(graphlib.TopologicalSorter(graph_of(sources)).static_order())


def test_public_names_exist():
    import probdiff

    names = probdiff.__all__
    assert sorted(set(names)) == sorted(names)
    assert [name for name in names if getattr(probdiff, name, None) is None] == []
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        probdiff.no_such_name  # noqa: B018


def test_public_names_are_imported_when_they_are_asked_for():
    program = """
import sys, probdiff
assert not {"jax", "numpyro", "flax"} & set(sys.modules)
assert set(probdiff.__all__) <= set(dir(probdiff))
from probdiff import *
assert Diffusion is probdiff.diffusion.Diffusion
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SLOW = "sklearn pandas xarray matplotlib arviz arviz_base arviz_stats arviz_plots pooch".split()


def test_the_package_imports_nothing_slow_until_it_is_used():
    program = (
        "import sys; from probdiff import Diffusion, datasets, networks, readouts, sample, fit"
    )
    program += f"; print(set({SLOW}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stdout + done.stderr
