"""Faults: a killed writer, a full disk, a second writer; what then stands is whole, or is named."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from flax import nnx
from jax import random

from probdiff import Diffusion, GaussianKernel, files, fit, load, networks, save, schedules
from probdiff.train import checkpoint
from regression import data, make_svi


@pytest.fixture(scope="module")
def svi():
    """One SVI for most tests, so that its programs compile once."""
    return make_svi()


@pytest.fixture
def run(svi):
    """`fit` on little data; options in its keywords."""

    def run(**options):
        options = {"num_steps": 20, "batch_size": 8, "evaluate_every": 10} | options
        return fit(random.key(0), svi, data(), progress=False, **options)

    return run


def start(program, *arguments, env=None, **options):
    """A process that runs a program from here."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | (env or {})
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.Popen(command, env=env, **options)


# Files.


def test_two_writers_of_one_file_leave_one_of_the_two_whole(tmp_path):
    """Each writes a neighbour of its own: in a common one the shorter cuts the longer."""
    path = tmp_path / "run"
    contents = [bytes([i]) * 3_000_000 for i in range(4)]

    def write(data):
        for _ in range(10):
            files.replace(path, data)

    threads = [threading.Thread(target=write, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert path.read_bytes() in contents
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["run"]


def test_a_write_that_fails_leaves_nothing_and_names_the_file(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match=r"No space left on device: '.*run'"):
        files.replace(tmp_path / "run", b"abc")
    assert os.listdir(tmp_path) == []


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    program = f"""
import os, pathlib, signal
from probdiff import files
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
files.replace(pathlib.Path({str(tmp_path / "run")!r}), b"abc")
"""
    subprocess.run([sys.executable, "-c", program], check=False)
    left = os.listdir(tmp_path)
    assert len(left) == 1 and left[0].endswith(".partial")
    files.replace(tmp_path / "another", b"abc")  # not its business
    assert len(os.listdir(tmp_path)) == 2
    files.replace(tmp_path / "run", b"abc")
    assert sorted(os.listdir(tmp_path)) == ["another", "run"]


def most_bytes(count):
    """The largest file that this process may write; None for any."""
    resource = pytest.importorskip("resource")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if count is None else count, hard))


@pytest.fixture
def full():
    """A disk that takes a thousand bytes a file, when it is told to."""
    yield lambda: most_bytes(1000)
    most_bytes(None)


def test_a_checkpoint_on_a_full_disk_leaves_the_one_before(run, tmp_path, full):
    path = tmp_path / "run"
    done = run(checkpoint=path)
    before = path.read_bytes()
    assert len(before) > 1000
    full()
    with pytest.raises(OSError, match=r"too large: '.*run'"):
        run(checkpoint=path, num_steps=30)
    most_bytes(None)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["run"]
    whole = run(num_steps=30)
    np.testing.assert_array_equal(run(checkpoint=path, num_steps=30).losses, whole.losses)
    np.testing.assert_array_equal(whole.losses[:20], done.losses)


def test_a_model_saved_on_a_full_disk_leaves_the_one_before(tmp_path, full):
    network = networks.RadialBasis((2,), 16, 5, rngs=nnx.Rngs(0))
    rates = schedules.linear(5, beta_T=0.5)
    diffusion = Diffusion(GaussianKernel(), rates, network, event_shape=(2,))
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), diffusion.params_template)
    save(tmp_path, diffusion, params)
    full()
    with pytest.raises(OSError, match=r"too large: '.*params-.*safetensors'"):
        save(tmp_path, diffusion, jax.tree.map(jnp.zeros_like, params))
    most_bytes(None)
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(load(tmp_path)[1]))
    assert sorted(os.listdir(tmp_path)) == ["config.json", "params.safetensors"]


def test_a_log_on_a_full_disk_is_named_and_mended(run, tmp_path, full):
    log, path = tmp_path / "log.jsonl", tmp_path / "run"
    run(log=log, checkpoint=path)
    log.write_text('{"step": 1, "seconds": 0.0}\n' * 1000)
    most_bytes(log.stat().st_size + 5)
    with pytest.raises(OSError, match=r"too large: '.*log.jsonl'"):
        run(log=log, num_steps=40, checkpoint=path, callback=None)
    most_bytes(None)
    run(log=log, num_steps=40, checkpoint=path)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()][-2:] == [30, 40]


# One run at a time.


def test_a_second_run_on_a_checkpoint_is_refused_while_the_first_goes_on(run, tmp_path):
    path, refused = tmp_path / "run", []

    def second(progress):
        with pytest.raises(
            ValueError, match=r"written by one run at a time; got .*process"
        ) as error:
            run(checkpoint=path)
        refused.append(str(error.value))

    first = run(checkpoint=path, callback=second)
    assert len(refused) == 2 and str(os.getpid()) in refused[0]
    assert os.listdir(tmp_path) == ["run"]
    np.testing.assert_array_equal(run(checkpoint=path).losses, first.losses)


def test_the_lock_of_a_killed_run_binds_nobody(run, tmp_path):
    path = tmp_path / "run"
    program = """
        import os, pathlib, signal, sys
        from probdiff import files
        with files.locked(pathlib.Path(sys.argv[1])) as is_ours:
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert start(program, path).wait() == -signal.SIGKILL
    assert os.listdir(tmp_path) == ["run.lock"]
    assert run(checkpoint=path).num_steps == 20
    assert os.listdir(tmp_path) == ["run"]


def test_a_folder_that_cannot_be_written_is_named_before_training(run, tmp_path, monkeypatch):
    path = tmp_path / "run"
    done = run(checkpoint=path)

    def refuse(name, flags, *mode, open_=os.open):
        if flags & os.O_CREAT and str(name).startswith(str(path)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return open_(name, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=r"Read-only file system: '.*run'"):
        run(checkpoint=path, num_steps=30, callback=pytest.fail)
    again = run(checkpoint=path)  # done, it writes nothing
    np.testing.assert_array_equal(again.losses, done.losses)


# The log.


@pytest.mark.parametrize("torn", [b'{"ste', b'{"step": 20', b"3", b'{"a": "\xc3', b"[[[[", b"{}"])
def test_a_line_that_was_cut_is_taken_back(run, tmp_path, torn):
    log, path = tmp_path / "metrics.jsonl", tmp_path / "run"
    run(log=log, checkpoint=path)
    whole = log.read_bytes()
    log.write_bytes(whole + torn)
    run(log=log, checkpoint=path, num_steps=30)
    assert log.read_bytes().startswith(whole)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [10, 20, 30]


@pytest.mark.parametrize("line", ["step,loss", '{"step": "a", "seconds": 1}', '["step"]', ""])
def test_a_file_that_is_no_log_is_refused_and_left(run, tmp_path, line):
    log, path = tmp_path / "metrics.jsonl", tmp_path / "run"
    run(checkpoint=path)
    log.write_text(f"{line}\n1,2\n")
    with pytest.raises(ValueError, match=r"log must hold lines .* in line 1 of .*metrics.jsonl"):
        run(log=log, checkpoint=path, num_steps=30)
    assert log.read_text() == f"{line}\n1,2\n"


def test_log_and_checkpoint_of_one_name_are_refused(run, tmp_path):
    for log in (tmp_path / "run", tmp_path / "." / "run", str(tmp_path / "run")):
        with pytest.raises(ValueError, match=r"log and checkpoint must be two files; got .*run"):
            run(log=log, checkpoint=tmp_path / "run")
    (tmp_path / "alias").symlink_to(tmp_path / "run")
    with pytest.raises(ValueError, match="log and checkpoint must be two files"):
        run(log=tmp_path / "alias", checkpoint=tmp_path / "run")
    for option in ("log", "checkpoint"):
        with pytest.raises(ValueError, match=f"{option} must be a file; got the folder"):
            run(**{option: tmp_path})


def test_what_a_callback_does_to_the_losses_stays_outside(run):
    def spoil(progress):
        with pytest.raises(ValueError, match="read-only"):
            progress.losses[:] = 0
        heard.append(progress.losses)

    heard, quiet = [], run()
    fitted = run(callback=spoil)
    np.testing.assert_array_equal(fitted.losses, quiet.losses)
    fitted.losses[:] = 0  # the user's own
    np.testing.assert_array_equal(heard[-1], quiet.losses)


# Interrupts.


@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupt_says_in_one_line_how_to_go_on(run, tmp_path, kept):
    def interrupt(progress):
        raise KeyboardInterrupt

    options = {"checkpoint": tmp_path / "run"} if kept else {}
    with pytest.raises(KeyboardInterrupt) as error:
        run(callback=interrupt, **options)
    text = str(error.value)
    assert text.startswith("interrupted after step ") and "\n" not in text
    assert text.endswith(
        f"of 20: the same call goes on from there, by {tmp_path / 'run'}"
        if kept
        else "with checkpoint=, the same call would go on from there"
    )


INTERRUPTED = """
    import sys
    import jax
    from probdiff import fit
    from regression import data, make_svi

    def started(progress):
        print("started", flush=True)

    fit(jax.random.key(0), make_svi(), data(), num_steps=10**8, batch_size=8, evaluate_every=100,
        callback=started, checkpoint=sys.argv[1], progress=False)
"""


@pytest.mark.long
def test_ctrl_c_in_a_terminal_ends_in_that_line(tmp_path):
    with start(
        INTERRUPTED, tmp_path / "run", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate()
    last = shown.strip().splitlines()[-1]
    assert last.startswith("KeyboardInterrupt: interrupted after step ")
    assert last.endswith(f"goes on from there, by {tmp_path / 'run'}")
    assert os.listdir(tmp_path) == ["run"]


def test_an_interrupt_in_a_notebook_ends_in_that_line(run, tmp_path, capsys, monkeypatch):
    shell_module = pytest.importorskip("IPython.core.interactiveshell")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    def interrupt(progress):
        raise KeyboardInterrupt

    shell = shell_module.InteractiveShell()
    shell.user_ns |= {"run": run, "interrupt": interrupt, "path": tmp_path / "run"}
    capsys.readouterr()
    result = shell.run_cell("run(callback=interrupt, checkpoint=path)")
    assert isinstance(result.error_in_exec, KeyboardInterrupt)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "goes on from there" in last and "interrupted after step " in last


# Kills: 50, at random moments.

ANYTHING = """
    import pathlib, sys
    import jax, numpy as np, optax
    from flax import nnx
    from numpyro.infer import SVI
    import numpyro, numpyro.distributions as dist
    from probdiff import (
        Diffusion, GaussianKernel, SampledTimeELBO, fit, infer, networks, save, schedules
    )

    folder = pathlib.Path(sys.argv[1])
    network = networks.Perceptron((2,), 8, 1, 5, rngs=nnx.Rngs(0))
    diffusion = Diffusion(
        GaussianKernel(), schedules.linear(5, beta_T=0.5), network, event_shape=(2,)
    )
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), SampledTimeELBO())
    x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)

    def train(num_steps, callback=None, **options):
        return fit(
            jax.random.key(0), svi, x, num_steps=num_steps, batch_size=8, ema_decay=0.9,
            held_out=x, evaluate_every=50, callback=callback, progress=False, **options
        )

    def ready(*ignored):
        print("ready", flush=True)
"""
TRAINING = """
    files = {"checkpoint": folder / "run.safetensors", "log": folder / "log.jsonl"}
    train(10**8, ready, checkpoint_every=0.0, **files)
"""
SAVING = """
    params = diffusion.params_template
    sets = [jax.tree.map(lambda leaf: np.full(leaf.shape, i, leaf.dtype), params) for i in (1, 2)]
    save(folder / "model", diffusion, sets[0])
    ready()
    while True:
        for values in sets:
            save(folder / "model", diffusion, values)
"""
INFERENCE = """
    from probdiff.experiments.report import Row, write_report
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), diffusion.params_template)
    prior = diffusion.prior(params)

    def program(y=None):
        numpyro.sample("y", dist.Normal(prior(), 0.5).to_event(1), obs=y)

    smc = infer.SMC(program, num_particles=64, num_runs=2)
    for i in range(10**6):
        smc.run(jax.random.key(i), y=np.array([1.0, -1.0], np.float32))
        rows = [Row("log Z", smc.log_evidence, smc.log_evidence_se)]
        write_report(folder, "a report", rows, trees={"posterior": smc.to_datatree()})
        if i == 0:
            ready()
"""
FINISH = """
    fitted = train(int(sys.argv[2]), **(
        {"checkpoint": folder / "run.safetensors", "log": folder / "log.jsonl"}
        if sys.argv[3] == "resumed" else {"log": folder / "other.jsonl"}
    ))
    leaves = jax.tree.leaves((fitted.params, fitted.raw_params, fitted.state.optim_state))
    np.savez(folder / sys.argv[3], fitted.losses, *fitted.held_out_losses, *leaves)
"""


def assert_training_goes_on(folder):
    """After all its kills the run is the one that nothing interrupted."""
    arrays, _ = checkpoint.read(folder / "run.safetensors")
    num_steps = len(arrays["losses"]) + 100
    for kind in ("resumed", "whole"):
        done = textwrap.dedent(ANYTHING) + textwrap.dedent(FINISH)
        assert start(done, folder, num_steps, kind).wait() == 0
    resumed, whole = (np.load(folder / f"{kind}.npz") for kind in ("resumed", "whole"))
    assert len(whole.files) > 10 and resumed["arr_0"].shape == (num_steps,)
    for name in whole.files:
        np.testing.assert_array_equal(resumed[name], whole[name])
    logs = ((folder / name).read_text().splitlines() for name in ("log.jsonl", "other.jsonl"))
    steps = [[json.loads(line)["step"] for line in log] for log in logs]
    assert steps[0] == steps[1]
    assert not list(folder.glob("*.partial")) and not list(folder.glob("*.lock"))


def assert_a_model_is_whole(folder):
    _, params = load(folder / "model")
    values = {float(value) for leaf in jax.tree.leaves(params) for value in np.unique(leaf)}
    assert values in ({1.0}, {2.0})


def assert_a_report_is_whole(folder):
    with xr.open_datatree(folder / "posterior.nc", engine="h5netcdf") as tree:
        assert tree["posterior"]["x_0"].shape[-1] == 2
        assert np.isfinite(tree["posterior"]["x_0"].values).all()
    assert len(json.loads((folder / "table.json").read_text())) == 1
    assert (folder / "report.md").read_text().endswith("\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "kills", "judge", "is_judged_once"),
    [
        (TRAINING, 20, assert_training_goes_on, True),
        (SAVING, 15, assert_a_model_is_whole, False),
        (INFERENCE, 15, assert_a_report_is_whole, False),
    ],
    ids=["training", "saving", "inference"],
)
def test_kills_at_random_leave_what_is_whole(tmp_path, program, kills, judge, is_judged_once):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "PYTHONWARNINGS": "ignore"}
    quick = {"env": cache | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}}
    rng, program = np.random.default_rng(), textwrap.dedent(ANYTHING) + textwrap.dedent(program)
    for i in range(kills):
        with start(program, tmp_path, stdout=subprocess.PIPE, text=True, **quick) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        if not is_judged_once or i == kills - 1:
            judge(tmp_path)
    print(f"{kills} survived of {kills}")
