"""Fixtures of all tests.

Nothing here imports `probdiff`: its annotations become run-time checks through an import hook
that is set after this file is read (`--jaxtyping-packages` in pyproject.toml).
"""

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jax
import jaxtyping
import matplotlib
import numpyro
import pytest
from jaxtyping import PRNGKeyArray

# Most of the suite's time is compiling, and half of that goes to XLA's newer code for loops on
# CPUs. The flags are read when JAX first computes; an XLA that has lost one would end the process.
_QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = f"{_QUICK} {os.environ.get('XLA_FLAGS', '')}"

matplotlib.use("Agg")
numpyro.enable_validation()
# Tests compare with formulas; a GPU multiplies float32 matrices with ten bits unless told.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What looks at a finished experiment has to run one: minutes of compiling."""
    for item in items:
        if "finished" in getattr(item, "fixturenames", ()):
            item.add_marker("long")


COMPUTING = {
    "test_conditioning", "test_control", "test_dead_leaves", "test_discretised", "test_entropies",
    "test_ladder", "test_predictive", "test_readme", "test_smc_mixtures",
    "test_smc_oracles", "test_textures", "test_train",
}  # fmt: skip
"""Modules that compute for longer than they compile."""


@pytest.fixture(scope="module", autouse=True)
def _compilation(request: pytest.FixtureRequest) -> None:
    """All others compile without optimisations, which takes a quarter off their time."""
    is_plain = request.module.__name__ not in COMPUTING
    jax.config.update("jax_disable_most_optimizations", is_plain)


MOST_MAPS = 20_000
"""Memory maps of a process, a few for every compiled program, of which Linux allows 65,530."""


@pytest.fixture(scope="module", autouse=True)
def _few_memory_maps() -> Iterator[None]:
    """Forget what one module compiled before the next runs out of maps and the process dies."""
    yield
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        gc.collect()
        jax.clear_caches()


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
