"""Fixtures of all tests.

Nothing here imports `probdiff`: its annotations become run-time checks through an import hook
that is set after this file is read (`--jaxtyping-packages` in pyproject.toml).
"""

from collections.abc import Iterator

import jax
import jaxtyping
import matplotlib
import numpyro
import pytest
from jaxtyping import PRNGKeyArray

matplotlib.use("Agg")
numpyro.enable_validation()
# Tests compare with formulas; a GPU multiplies float32 matrices with ten bits unless told.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What looks at a finished experiment has to run one: minutes of compiling."""
    for item in items:
        if "finished" in getattr(item, "fixturenames", ()):
            item.add_marker("experiments")


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 within one test; arrays made before it stay float32."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key() -> PRNGKeyArray:
    """A fixed key, the same in every test."""
    return jax.random.key(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations unchecked within one test, as in use: what is refused then is our own doing."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
