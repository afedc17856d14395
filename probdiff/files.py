"""Files that are whole or not there, whoever writes and whatever ends him.

*All or nothing.* What is written goes to a neighbour of the file, is flushed to the disk, and takes
the file's name in one step (`os.replace`). Whatever the moment of a crash, the name holds the old
file or the new one, never a part.

*A neighbour for each writer.* Its name holds host, process and a random word,

    run.safetensors.node7-4711-9f3c2a1b.partial

so that two writers do not write into each other's, and the last to end stands. What a writer that
was killed left behind goes when the same file is written next.

*One at a time.* Where two writers make no sense, as of a run's checkpoint, the first holds
`run.safetensors.lock`, which the system lets go when its process ends, however it ends.
"""

import contextlib
import os
import platform
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks: there two runs are told apart by nobody
    fcntl = None

_STALE_SECONDS = 86_400.0
"""Age from which a neighbour is taken for left behind, whoever wrote it."""


def replace(path: Path, data: bytes) -> None:
    """Put bytes at `path`, all or nothing; an `OSError` names the path."""
    with replacing(path) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to; what is there at the end takes the name `path`, all or nothing.

    An error inside leaves what was at `path`, and an `OSError` names it.
    """
    with naming(path):
        _sweep(path)
        own = f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
        partial = path.with_name(f"{path.name}.{own}.partial")
        try:
            yield partial
            with open(partial, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        _flush_folder(path.parent)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock of the file `path` for as long as the context; False where another holds it."""
    if fcntl is None:
        yield True
        return
    lock = path.with_name(path.name + ".lock")
    with naming(path):
        descriptor = _open_lock(lock)
    try:
        if is_ours := descriptor is not None:
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
        yield is_ours
    finally:
        if descriptor is not None:
            lock.unlink(missing_ok=True)
            os.close(descriptor)


def holder(path: Path) -> str:
    """Who holds the lock of the file `path`, as he wrote it there."""
    try:
        return path.with_name(path.name + ".lock").read_text().strip() or "another process"
    except OSError:
        return "another process"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system name the file that was to be written, not a neighbour or nothing."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _open_lock(lock: Path) -> int | None:
    """The lock's descriptor, or None where another holds it."""
    while True:
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the second on network file systems
            os.close(descriptor)
            return None
        except OSError:  # a file system without locks
            return descriptor
        # The holder before takes the name away when he ends: ours may be of the nameless file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor
        os.close(descriptor)


def _sweep(path: Path) -> None:
    """Remove neighbours whose writer has ended."""
    pattern = re.compile(re.escape(path.name) + r"\.(.+)-(\d+)-[0-9a-f]{8}\.partial")
    for found in filter(None, map(pattern.fullmatch, os.listdir(path.parent))):
        partial = path.with_name(found[0])
        with contextlib.suppress(OSError):  # another may have been quicker
            is_old = time.time() - partial.stat().st_mtime > _STALE_SECONDS
            if is_old or (found[1] == _host() and not _is_alive(int(found[2]))):
                partial.unlink()


def _host() -> str:
    return re.sub(r"[^\w.]", "_", platform.node()) or "host"


def _is_alive(process: int) -> bool:
    if os.name != "posix":
        return True  # nobody can be asked without harm
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush_folder(folder: Path) -> None:
    """A new name, too, is to outlive a power cut; where folders cannot be flushed nothing is."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
