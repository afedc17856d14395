"""The pages of the API: every public name stands on exactly one, every page in the contents."""

import collections
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import probdiff

FOLDER = Path(__file__).parents[1] / "notebooks"
TEXT = "\n".join(page.read_text() for page in sorted(FOLDER.glob("api/*.rst")))


def public_names():
    """Public names with their module: `__all__`, or the functions of a public module without."""
    for info in pkgutil.iter_modules(probdiff.__path__):
        module = importlib.import_module(f"probdiff.{info.name}")
        if "__all__" in vars(module):
            names = module.__all__
        elif info.name in probdiff.__all__:
            functions = inspect.getmembers(module, inspect.isfunction)
            own = [(n, f) for n, f in functions if f.__module__ == module.__name__]
            names = [name for name, _ in own if not name.startswith("_")]
        else:
            continue
        yield from (f"{module.__name__}.{name}" for name in names)
    yield from (f"probdiff.{name}" for name in probdiff.__all__)


def identity(name):
    """What a name stands for: two names may be of one class; constants go by their name."""
    module, _, own = name.rpartition(".")
    if module == "":
        return id(importlib.import_module(name))
    value = getattr(importlib.import_module(module), own)
    return id(value) if callable(value) or inspect.ismodule(value) else name


def kind_of(name):
    """The directive that shows a name."""
    module, _, own = name.rpartition(".")
    value = getattr(importlib.import_module(module), own) if module else probdiff
    if inspect.ismodule(value):
        return "module"
    if inspect.isclass(value):
        return "exception" if issubclass(value, BaseException) else "class"
    return "function" if callable(value) else "data"


def listed(text):
    """(directive, name) of everything that pages show."""
    return re.findall(r"^\.\. auto(\w+):: ([\w.]+)$", text, re.MULTILINE)


def faults(text):
    """Public names that are on no page, and names of pages that are on more than one."""
    shown = collections.defaultdict(list)
    for _, name in listed(text):
        shown[identity(name)].append(name)
    missing = {name for name in public_names() if identity(name) not in shown}
    return missing | {name for names in shown.values() if len(names) > 1 for name in names}


def test_every_public_name_is_on_exactly_one_page():
    assert len(listed(TEXT)) > 100
    assert faults(TEXT) == set()


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (".. autoclass:: probdiff.Prior\n", "", "probdiff.Prior"),
        (
            ".. autoclass:: probdiff.Prior\n",
            2 * ".. autoclass:: probdiff.Prior\n",
            "probdiff.Prior",
        ),
        (".. autodata:: probdiff.plots.BLUE\n", "", "probdiff.plots.BLUE"),
        (".. autofunction:: probdiff.schedules.cosine\n", "", "probdiff.schedules.cosine"),
        (".. automodule:: probdiff.infer\n", "", "probdiff.infer"),
    ],
)
def test_a_name_on_no_page_or_on_two_is_noticed(old, new, fault):
    assert old in TEXT
    assert faults(TEXT.replace(old, new)) == {fault}


def test_a_page_shows_a_name_as_what_it_is():
    wrong = [(kind, name) for kind, name in listed(TEXT) if kind != kind_of(name)]
    assert wrong == []


def test_every_page_and_notebook_is_in_the_contents():
    index = (FOLDER / "index.md").read_text()
    contents = re.findall(r"^(?:.* <)?([\w/]+)>?$", index, re.MULTILINE)
    files = [*FOLDER.glob("*.ipynb"), *FOLDER.glob("*.md"), *FOLDER.glob("api/*")]
    pages = [file.relative_to(FOLDER).with_suffix("").as_posix() for file in files]
    assert sorted([*contents, "index"]) == sorted(pages)
