"""Every public name says what it is, and shows its use by an example that runs.

The examples are those of `help`: for a class its own docstring's and its public methods'. Each runs
in a namespace and a folder of its own, and leaves no file behind. The namespace holds what the
package's docstring says that it imports.
"""

import ast
import contextlib
import doctest
import functools
import importlib
import inspect
import io
import itertools
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import pytest

PACKAGE = Path(__file__).parents[1] / "probdiff"
BY_ALL = (
    "probdiff",
    "probdiff.kernels",
    "probdiff.readouts",
    "probdiff.networks",
    "probdiff.datasets",
    "probdiff.diagnostics",
    "probdiff.flow",
    "probdiff.infer",
    "probdiff.plots",
    "probdiff.tables",
)
"""Their public names are listed in `__all__`."""
BY_FUNCTION = ("probdiff.schedules", "probdiff.sample", "probdiff.recipes")
"""Their public names are the functions that they define."""


def functions(module):
    """Names of the public functions that a module defines."""
    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]


def public():
    """(module, name) of everything public, what several modules list but once."""
    seen = set()
    for module_name in (*BY_ALL, *BY_FUNCTION):
        module = importlib.import_module(module_name)
        names = module.__all__ if module_name in BY_ALL else functions(module)
        for name in names:
            value = getattr(module, name, None)
            if callable(value) and id(value) in seen:
                continue
            seen.add(id(value))
            yield module_name, name


PUBLIC = list(public())
OF_EXTRAS = {"Flow": "diffrax", "flow_density": "diffrax"}
"""What examples need beside the package."""


def is_exempt(value):
    """Whether no example is asked for: modules, constants, exceptions and warnings."""
    if isinstance(value, ModuleType | str | float | int):
        return True
    return inspect.isclass(value) and issubclass(value, BaseException)


def documented_constants():
    """Names assigned at the top of one of the package's files with a docstring behind."""
    for file in PACKAGE.rglob("*.py"):
        body = ast.parse(file.read_text()).body
        for node, following in itertools.pairwise(body):
            is_docstring = (
                isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            )
            if isinstance(node, ast.Assign) and is_docstring:
                names = (name for target in node.targets for name in ast.walk(target))
                yield from (name.id for name in names if isinstance(name, ast.Name))


CONSTANTS = set(documented_constants())


@functools.cache
def imports():
    """What the package's docstring says that examples import, run."""
    text = importlib.import_module("probdiff").__doc__
    lines = [line[4:] for line in text.splitlines() if line.startswith(("    import", "    from"))]
    names = {}
    exec("\n".join(lines), names)
    return names


def examples(value, name):
    """The doctests of an object; of a class those of its public methods too."""
    found = doctest.DocTestFinder().find(value, name, module=False, globs=dict(imports()))
    own = [test for test in found if not any(p.startswith("_") for p in test.name.split(".")[1:])]
    return [test for test in own if test.examples]


def failures(test):
    """What the examples of a docstring gave instead of what they say, or an empty text."""
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    runner, output = doctest.DocTestRunner(optionflags=flags), io.StringIO()
    with contextlib.redirect_stdout(output):  # from where `run` takes what an example prints
        result = runner.run(test, out=output.write)
    return output.getvalue() if result.failed else ""


def what_lacks(module_name, name):
    """What a public name lacks: its value, an explanation or an example; or an empty text."""
    value = getattr(importlib.import_module(module_name), name, None)
    if isinstance(value, str | float | int):
        return "" if name in CONSTANTS else "a docstring"
    if value is None:
        return "a value"
    if not (value.__doc__ and value.__doc__.strip()):
        return "a docstring"
    return "" if is_exempt(value) or examples(value, name) else "an example"


def test_public_names_are_explained_and_have_an_example():
    found = {".".join(public): what_lacks(*public) for public in PUBLIC}
    assert len(found) > 80
    assert {name: lack for name, lack in found.items() if lack} == {}


SHOWN = [
    public
    for public in PUBLIC
    if not is_exempt(getattr(importlib.import_module(public[0]), public[1], ""))
]


@pytest.mark.long
@pytest.mark.parametrize(("module_name", "name"), SHOWN, ids=map(".".join, SHOWN))
def test_an_example_runs_and_leaves_no_file(module_name, name, tmp_path, monkeypatch):
    if name in OF_EXTRAS:
        pytest.importorskip(OF_EXTRAS[name])
    value = getattr(importlib.import_module(module_name), name)
    monkeypatch.chdir(tmp_path)
    try:
        for test in examples(value, name):
            assert not (found := failures(test)), found
    finally:
        plt.close("all")
    assert list(tmp_path.iterdir()) == []


def test_public_names_are_listed_once():
    for module_name in BY_ALL:
        names = importlib.import_module(module_name).__all__
        assert sorted(set(names)) == sorted(names), module_name


@pytest.mark.parametrize(
    ("example", "is_right"),
    [(">>> 1 + 1\n2", True), (">>> 1 + 1\n3", False), (">>> 1 / 0\n2", False)],
)
def test_a_wrong_example_is_noticed(example, is_right):
    def function():
        pass

    function.__doc__ = example
    (test,) = examples(function, "function")
    assert (failures(test) == "") == is_right


def test_a_class_may_show_its_use_in_a_public_method_alone():
    class Shown:
        def method(self):
            """>>> 1\n1"""

    class Hidden:
        def _method(self):
            """>>> 1\n1"""

    assert len(examples(Shown, "Shown")) == 1
    assert examples(Hidden, "Hidden") == []
