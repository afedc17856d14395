"""The public API type-checks in a user's program: mypy passes the README's and finds a wrong one's
mistakes, so that what passes is checked and not merely unknown."""

import re
from pathlib import Path

import pytest

api = pytest.importorskip("mypy.api")
README = (Path(__file__).parents[1] / "README.md").read_text()
WRONG = """\
import jax, numpy as np
from probdiff import Diffusion, GaussianKernel, diagnostics, infer, load, schedules

def program(y: object = None) -> None: ...

infer.SMC(program, num_particles="many", num_runs=4)
diagnostics.bound(jax.random.key(0), 3, {}, np.zeros(3))
schedules.harmonic(T=40, beta_1=0.1)
diffusion, params = load("roll")
diffusion.prior(params).no_such_thing
"""


def check(program, folder):
    file = folder / "of_a_user.py"
    file.write_text(program)
    options = ["--strict", "--ignore-missing-imports", "--disable-error-code=no-untyped-def"]
    options += ["--follow-imports=silent", f"--cache-dir={folder / 'cache'}"]
    found, failure, _ = api.run([*options, str(file)])
    assert not failure, failure
    return re.findall(r"of_a_user\.py:(\d+): error: (.*)", found)


@pytest.mark.long
def test_a_users_program_passes_and_a_wrong_one_does_not(tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert check(program, tmp_path) == []
    lines = {int(line) for line, _ in check(WRONG, tmp_path)}
    assert lines == {6, 7, 8, 10}


@pytest.mark.long
def test_every_name_in_the_package_is_defined(tmp_path):
    """The linter cannot tell: to it the axes of an annotation are undefined names too."""
    package = str(Path(__file__).parents[1] / "probdiff")
    options = ["--ignore-missing-imports", f"--cache-dir={tmp_path}"]
    found, failure, _ = api.run([*options, package])
    assert not failure, failure
    assert "checked" in found  # it ran over the whole of it
    assert [line for line in found.splitlines() if "[name-defined]" in line] == []
