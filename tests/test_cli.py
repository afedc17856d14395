"""The command line: exit status, and what is said where."""

import os
import re
import subprocess
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from flax import nnx

from probdiff import Diffusion, GaussianKernel, cli, diagnostics, networks, save, schedules
from probdiff.experiments import TABLE, Entry
from probdiff.experiments.report import Row


@pytest.fixture
def fake(monkeypatch):
    """Puts an experiment into the table whose run is the given function."""

    def put(run):
        monkeypatch.setitem(TABLE, "fake", Entry("fake", "about a second", "a summary"))
        monkeypatch.setattr(cli, "find", lambda name: types.SimpleNamespace(run=run))

    return put


@pytest.fixture
def model(tmp_path):
    """A saved model with nothing learned: the reverse trajectory of N(0, I)."""
    network = networks.Perceptron((2,), width=4, depth=1, T=5, rngs=nnx.Rngs(0))
    beta = schedules.log_snr_linear(5, beta_1=0.1, alpha_bar_T=0.01)
    diffusion = Diffusion(GaussianKernel(), beta, network, event_shape=(2,))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), diffusion.params_template)
    save(tmp_path / "model", diffusion, params)
    return tmp_path / "model", diffusion, params


@pytest.fixture
def data(tmp_path):
    x = np.random.default_rng(0).normal(size=(100, 2))
    np.save(tmp_path / "x.npy", x)
    return tmp_path / "x.npy"


def test_list_names_every_experiment_on_a_line(capsys):
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(TABLE)
    assert all("minutes" in line for line in lines)


def test_run_hands_over_its_options_and_prints_the_table(tmp_path, fake, monkeypatch, capsys):
    calls = []

    def run(out, **options):
        calls.append((out, options))
        out.mkdir(parents=True)
        (out / "report.md").write_text("")
        return [Row("some row", 1.5, 0.25)]

    fake(run)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "fake", "--seed", "7"]) == 0
    out, options = calls[0]
    assert out.as_posix() == "runs/fake"
    assert (options["seed"], options["quick"], options["progress"]) == (7, False, True)
    assert (options["recipe"], options["model"]) == ("cpu", None)
    said = capsys.readouterr()
    assert "| some row | 1.50 ± 0.25 |" in said.out
    assert "a summary" in said.err and "about a second" in said.err and "report.md" in said.err
    assert cli.main(["run", "fake", "--quick", "--out", "elsewhere/deep"]) == 0
    assert calls[1][0].as_posix() == "elsewhere/deep"
    assert calls[1][1]["quick"]
    assert "numbers mean nothing" in capsys.readouterr().err


def test_a_run_says_what_each_file_is(tmp_path, fake, monkeypatch, capsys):
    meanings = {
        "bounds.nc": "open with xarray.open_datatree",
        "config.json": "the model: probdiff.load('out')",
        "log.jsonl": "",
        "params.safetensors": "the model: probdiff.load('out')",
        "report.md": "the table",
        "samples.png": "figure",
        "table.json": "the table",
    }

    def run(out, **options):
        out.mkdir()
        for name in meanings:
            (out / name).touch()
        return [Row("some row", 1.5)]

    fake(run)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "fake", "--out", "out"]) == 0
    said = capsys.readouterr().err.splitlines()[-len(meanings) :]
    assert said == [f"  {name:18}  {text}".rstrip() for name, text in meanings.items()]


def test_bound_prints_what_diagnostics_say_and_writes_it(model, data, capsys):
    folder, diffusion, params = model
    assert cli.main(["bound", str(folder), str(data), "--seed", "4"]) == 0
    x = np.load(data).astype(np.float32)
    expected = diagnostics.bound(jax.random.key(4), diffusion, params, x)["bound"]
    k = expected.attrs
    said = capsys.readouterr().out
    assert f"K = {k['mean']:.6g} ± {k['se']:.2g} nats" in said
    assert f"{k['mean_bits']:.6g} ± {k['se_bits']:.2g} bits" in said
    assert "100 examples" in said
    with xr.open_datatree(folder / f"bounds-{data.stem}.nc", engine="h5netcdf") as tree:
        np.testing.assert_allclose(tree["bound"]["bound"], expected["bound"], rtol=1e-6)


@pytest.mark.long
def test_bound_climbs_the_ladder_when_told(model, data, tmp_path, capsys):
    folder, diffusion, params = model
    few = tmp_path / "few.npy"
    np.save(few, np.load(data)[:5])
    out = tmp_path / "l.nc"
    assert cli.main(["bound", str(folder), str(few), "--out", str(out), "--ladder", "20"]) == 0
    x = np.load(few).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diagnostics.LadderWarning)
        group = diagnostics.ladder(jax.random.key(0), diffusion, params, x, sizes=(1, 20))["ladder"]
    said = capsys.readouterr().out
    texts = {
        "K, 100 draws a step": "bound",
        "importance weighted, S = 20": "importance",
        "SMC, S = 20": "smc",
    }
    for text, name in texts.items():
        mean, se = (float(group[v].values.flat[-1]) for v in (f"{name}_mean", f"{name}_mean_se"))
        assert f"{text}: {mean:.6g} ± {se:.2g} nats" in said
    with xr.open_datatree(out, engine="h5netcdf") as tree:
        assert set(tree.children) == {"bound", "ladder"}


def test_bound_writes_where_it_is_told(model, data, tmp_path):
    assert cli.main(["bound", str(model[0]), str(data), "--out", str(tmp_path / "b.nc")]) == 0
    assert (tmp_path / "b.nc").is_file()
    assert not (model[0] / f"bounds-{data.stem}.nc").exists()


def wrong(tmp_path, model, data):
    """Arguments that are wrong, with a part of what is said about them."""
    folder = str(model[0])
    np.save(tmp_path / "wide.npy", np.zeros((10, 3)))
    np.save(tmp_path / "words.npy", np.array(["a"]))
    np.savez(tmp_path / "two.npz", a=np.zeros(2), b=np.zeros(2))
    csv = tmp_path / "x.csv"
    csv.write_text("1,2\n3,4\n")
    (tmp_path / "empty.npy").touch()
    return {
        "unknown experiment": (
            ["run", "rolls"],
            "no experiment 'rolls'; there are digits, swiss-roll",
        ),
        "out is a file": (["run", "digits", "--out", str(data)], "is a file"),
        "one recipe": (["run", "digits", "--recipe", "gpu"], "digits has one"),
        "no model": (["bound", str(tmp_path / "none"), str(data)], "config.json is not there"),
        "no data": (["bound", folder, "none.npy"], "no such file: none.npy"),
        "text": (
            ["bound", folder, str(csv)],
            f"x.csv must be an array of numbers saved by numpy.save; for text: numpy.save("
            f"'{csv.with_suffix('.npy')}', numpy.loadtxt('{csv}', delimiter=','))",
        ),
        "no array": (["bound", folder, str(tmp_path / "empty.npy")], "saved by numpy.save"),
        "two arrays": (["bound", folder, str(tmp_path / "two.npz")], "must hold one array"),
        "no numbers": (["bound", folder, str(tmp_path / "words.npy")], "must hold real numbers"),
        "other shape": (
            ["bound", folder, str(tmp_path / "wide.npy")],
            "must have shape (..., 2)",
        ),
        "no ladder": (["bound", folder, str(data), "--ladder", "1"], "at least 2 trajectories"),
        "no folder": (["bound", folder, str(data), "--out", "no/such/b.nc"], "folder that exists"),
    }


@pytest.mark.parametrize("case", [
    "unknown experiment", "out is a file", "one recipe", "no model", "no data", "text", "no array",
    "two arrays", "no numbers", "other shape", "no ladder", "no folder",
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_line_with_status_2(case, tmp_path, model, data, capsys):
    argv, message = wrong(tmp_path, model, data)[case]
    assert cli.main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.startswith("probdiff: ") and said.err.count("\n") == 1
    assert "pickle" not in said.err


@pytest.mark.parametrize("argv", [[], ["fly"], ["run"], ["run", "digits", "--seed", "-1"]])
def test_a_command_that_cannot_be_parsed_has_status_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: probdiff" in capsys.readouterr().err


def test_help_teaches_by_commands_that_exist(capsys):
    for arguments in ([], ["run"], ["bound"], ["fit"], ["impute"], ["sample"]):
        with pytest.raises(SystemExit) as left:
            cli.main([*arguments, "--help"])
        assert left.value.code == 0
    said = capsys.readouterr().out
    assert "default: runs/NAME" in said
    for name, entry in TABLE.items():
        assert f"{name} " in said and entry.summary in said
    commands = re.findall(r"^  (?:\$ )?probdiff (\w+) ?(\S*)", said, re.MULTILINE)
    assert {command for command, _ in commands} == set(cli.COMMANDS)
    assert {name for command, name in commands if command == "run"} <= set(TABLE)


def test_an_interrupted_run_says_so_in_a_line(tmp_path, fake, capsys):
    def run(out, **options):
        raise KeyboardInterrupt

    fake(run)
    assert cli.main(["run", "fake", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("probdiff: interrupted")


def test_what_runs_no_experiment_imports_none():
    """In a fresh process: listing, help and a typo are quick."""
    program = """
import sys
from probdiff import cli

for argv in (["list"], ["run", "diggits"], ["lisst"], ["--help"]):
    try:
        cli.main(argv)
    except SystemExit:
        pass
slow = {"sklearn", "scipy", "matplotlib", "arviz_base", "jax", "numpyro", "flax", "xarray"}
found = slow & {name.split(".")[0] for name in sys.modules}
assert not found, found
ours = [name for name in sys.modules if name.startswith("probdiff.experiments.")]
assert not ours, ours
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["bonud"], "there are list, run, fit, bound, impute, sample. Did you mean bound?"),
        (["Lists"], "there are list, run, fit, bound, impute, sample. Did you mean list?"),
        (["fly"], "no command 'fly'; there are list, run, fit, bound, impute, sample\n"),
        (["run", "swis-roll"], "super-resolution. Did you mean swiss-roll?"),
        (["run", "MNIST"], "super-resolution. Did you mean mnist?"),
        (["run", "zzz"], "super-resolution\n"),
    ],
)
def test_a_typo_is_answered_with_what_is_close(argv, meant, capsys):
    try:
        assert cli.main(argv) == 2
    except SystemExit as stop:
        assert stop.code == 2
    assert meant in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ({"XDG_CACHE_HOME": "cache"}, "cache/probdiff/compiled"),
        ({}, "home/.cache/probdiff/compiled"),
        ({"JAX_COMPILATION_CACHE_DIR": "own"}, "own"),
        ({"XDG_CACHE_HOME": "file"}, None),  # nothing can be written there
    ],
)
def test_compiled_programs_are_kept_in_the_users_cache(given, folder, tmp_path):
    (tmp_path / "file").touch()
    program = """
import os
from probdiff import cli

cli.main(["run", "no-such-experiment"])
print(os.environ.get("JAX_COMPILATION_CACHE_DIR"))
"""
    paths = {name: str(tmp_path / place) for name, place in ({"HOME": "home"} | given).items()}
    unset = {"XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"}
    env = {name: value for name, value in os.environ.items() if name not in unset} | paths
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.stdout.strip() == str(folder and tmp_path / folder), done.stderr


@pytest.mark.long
def test_what_is_kept_is_used_and_gives_the_same(model, data, tmp_path):
    cache = tmp_path / "cache"
    env = dict(
        os.environ, XDG_CACHE_HOME=str(cache), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"
    )
    env.pop("JAX_COMPILATION_CACHE_DIR", None)

    def bound(**more):
        command = [sys.executable, "-m", "probdiff.cli", "bound", str(model[0]), str(data)]
        done = subprocess.run(command, capture_output=True, text=True, env=env | more)
        assert done.returncode == 0, done.stderr
        return done.stdout, len(list(cache.rglob("*-cache")))

    without, kept = bound(JAX_ENABLE_COMPILATION_CACHE="false")
    assert kept == 0
    first, kept = bound()
    assert kept > 0
    assert bound() == (first, kept) == (without, kept)
