"""Faults: a killed writer, a full disk, a second writer; what then stands is whole, or is named."""

import errno
import os
import subprocess
import sys
import threading

import pytest

from probdiff import files


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
