"""Faults: a killed writer, a full disk, a second writer; what then stands is whole, or is named."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from jax import random

from probdiff import files, fit
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


def start(program, *arguments, **options):
    """A process that runs a program from here."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
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
