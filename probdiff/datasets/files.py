"""Published data files: taken from a folder that is named, else downloaded once and kept.

    PROBDIFF_DATA    environment variable naming the folder; a file that lies in it is never
                     downloaded
    cache            otherwise pooch keeps the file in the user's cache folder

Without either, where there is no network, a `ConnectionError` says what to put where.

Either way the file's SHA-256 must be the published one, so that all numbers are about the same
data, and an archive or a binary file is what its authors packed before it is parsed.
"""

import hashlib
import os
from pathlib import Path


def fetch(name: str, checksums: dict[str, str], url: str) -> Path:
    """Path of a published file: from the folder `PROBDIFF_DATA`, or downloaded and kept.

    `checksums` has the SHA-256 of each name; another is a `ValueError`. `url` is up to the name.
    A file that cannot be downloaded is a `ConnectionError`.
    """
    file = given(name, checksums)
    if file is not None:
        return file
    import pooch

    try:
        kept = pooch.retrieve(url + name, checksums[name], fname=name, progressbar=True)
    except OSError as error:  # those of the network and of the cache among them
        folder = os.environ.get("PROBDIFF_DATA")
        there = "which is not set" if folder is None else f"now {folder}, which has no such file"
        raise ConnectionError(
            f"{name} must be downloaded from {url}, which failed ({_first_line(error)}): without a "
            "network, put the file into a folder and name the folder by the environment variable "
            f"PROBDIFF_DATA, {there}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{name} from {url} must have the SHA-256 {checksums[name]}; {_first_line(error)}"
        ) from error
    return Path(kept)


def given(name: str, checksums: dict[str, str]) -> Path | None:
    """Path of a published file in the folder `PROBDIFF_DATA`, checked, or None if not there."""
    folder = os.environ.get("PROBDIFF_DATA")
    if folder is None or not (Path(folder) / name).is_file():
        return None
    file = Path(folder) / name
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != checksums[name]:
        raise ValueError(f"{file} must have the SHA-256 {checksums[name]}; got {found}")
    return file


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
