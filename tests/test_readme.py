"""The README's program runs as written, and its commands are those of the package."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from probdiff.experiments import TABLE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::probdiff.infer.InferenceWarning")  # 300 steps make no prior
def test_program_runs_and_says_what_it_should(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert program.count("num_steps=2_000") == 1
    names = {}
    exec(compile(program.replace("num_steps=2_000", "num_steps=300"), "README.md", "exec"), names)
    assert names["draws"].shape == (100, 2)
    assert names["y"].shape == (1, 20, 2)
    mean, se = re.search(r"(-?[\d.]+) ± ([\d.]+) bits per point", capsys.readouterr().out).groups()
    assert float(mean) > -4.09 + 4 * float(se)  # better than N(0, I) already
    assert sorted(p.name for p in Path("roll").iterdir()) == ["config.json", "params.safetensors"]
    assert np.isfinite(names["result"].losses).all()
    points, y = names["points"], names["y"][0]
    assert points.shape == (1024, 20, 2)
    # a posterior lies between the prior's mean, near 0, and the observation: nearer than either
    assert np.mean((points.mean(0) - y) ** 2) < np.mean(y**2)
    assert names["log_z"].shape == names["se"].shape == (20,) and np.isfinite(names["log_z"]).all()


def test_commands_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "pip install . && probdiff run digits" in README
    assert "pip install '.[test]' && pytest" in README
    assert "probdiff" in project["scripts"]
    assert "test" in project["optional-dependencies"]


def test_readme_is_short():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert len(prose.split()) < 700


def test_experiments_are_those_of_the_package():
    """Rows of the README are rows of the whole table, whose runs and commands exist."""
    whole = (ROOT / "notebooks" / "experiments.md").read_text()
    rows = re.findall(r"^\|.*\|$", README.split("## Experiments")[1], re.MULTILINE)
    assert len(rows) == 7 and set(rows) <= set(whole.splitlines())
    names = set(re.findall(r"^\| `([\w-]+)` \|", whole, re.MULTILINE))
    (loop,) = re.findall(r"for name in (.*?); do", whole, re.DOTALL)
    assert set(loop.replace("\\", "").split()) == names
    assert names | set(re.findall(r"`([\w-]+)`", whole.split("The others")[1])) == set(TABLE)
