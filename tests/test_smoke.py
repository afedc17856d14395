"""The package as installed, on whatever versions of its dependencies came with it."""

import importlib
import pkgutil

import probdiff


def test_every_module_imports():
    names = [module.name for module in pkgutil.walk_packages(probdiff.__path__, "probdiff.")]
    assert "probdiff.datasets" in names
    for name in names:
        assert importlib.import_module(name).__doc__
