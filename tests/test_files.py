"""Published files: where they are taken from, and that their checksums are compared."""

import errno
import gzip
import hashlib

import pooch
import pytest
import requests

from probdiff import cli, datasets
from probdiff.datasets.files import fetch, given

CHECKSUMS = {"a": hashlib.sha256(b"abc").hexdigest()}
URL = "https://example.invalid/"


@pytest.mark.parametrize(
    "take", [lambda name: fetch(name, CHECKSUMS, URL), lambda name: given(name, CHECKSUMS)]
)
def test_altered_file_is_refused_by_name(monkeypatch, tmp_path, take):
    (tmp_path / "a").write_bytes(b"something else")
    monkeypatch.setenv("PROBDIFF_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=rf"a must have the SHA-256 {CHECKSUMS['a']}"):
        take("a")


def test_file_with_the_right_checksum_is_taken_from_the_folder(monkeypatch, tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    monkeypatch.setenv("PROBDIFF_DATA", str(tmp_path))
    assert fetch("a", CHECKSUMS, URL) == tmp_path / "a"


@pytest.mark.parametrize("folder", [None, "empty"])
def test_file_that_is_not_given_is_downloaded_under_its_checksum(monkeypatch, tmp_path, folder):
    asked = []

    def retrieve(url, known_hash, fname, progressbar):
        asked.append((url, known_hash, fname))
        return str(tmp_path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    if folder is None:
        monkeypatch.delenv("PROBDIFF_DATA", raising=False)
    else:
        monkeypatch.setenv("PROBDIFF_DATA", str(tmp_path / folder))
    assert given("a", CHECKSUMS) is None
    assert fetch("a", CHECKSUMS, URL) == tmp_path / "a"
    assert asked == [(URL + "a", CHECKSUMS["a"], "a")]


@pytest.mark.parametrize("folder", [None, "elsewhere"])
def test_without_a_network_it_is_said_where_to_put_the_file(monkeypatch, tmp_path, folder):
    def retrieve(*args, **kwargs):
        raise requests.exceptions.ConnectionError("no route to host")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    monkeypatch.delenv("PROBDIFF_DATA", raising=False)
    if folder is not None:
        monkeypatch.setenv("PROBDIFF_DATA", str(tmp_path / folder))
    now = "which is not set" if folder is None else f"now {tmp_path / folder}, which has no such"
    with pytest.raises(ConnectionError, match=r"^a must be downloaded .*no route") as error:
        fetch("a", CHECKSUMS, URL)
    assert f"PROBDIFF_DATA, {now}" in str(error.value)


def test_a_download_of_another_checksum_names_file_and_place(monkeypatch, tmp_path):
    def retrieve(*args, **kwargs):
        raise ValueError("SHA256 hash of downloaded file does not match")

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    monkeypatch.delenv("PROBDIFF_DATA", raising=False)
    with pytest.raises(ValueError, match=rf"a from {URL} must have the SHA-256 {CHECKSUMS['a']}"):
        fetch("a", CHECKSUMS, URL)


FOREIGN = {
    "empty": b"",
    "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "npz": b"PK\x03\x04" + bytes(100),
    "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "bomb": gzip.compress(bytes(10**7)),
    "huge": b"\x00\x00\x08\x03" + b"\x7f\xff\xff\xff" * 3,
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize(
    ("load", "name"),
    [
        (datasets.mnist, "train-images-idx3-ubyte.gz"),
        (datasets.binarised_mnist, "binarized_mnist_train.amat"),
        (datasets.cifar10, "cifar-10-binary.tar.gz"),
        (datasets.cifar10, "cifar-10-batches-bin/data_batch_1.bin"),
    ],
)
def test_a_foreign_file_is_refused_before_it_is_unpacked(
    monkeypatch, tmp_path, load, name, content
):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    monkeypatch.setenv("PROBDIFF_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=rf"{name} must have the SHA-256"):
        load()


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_texture_that_is_no_picture_is_named(tmp_path, content):
    (tmp_path / "bark.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"bark.png must be a PNG file; "):
        datasets.grey_images(tmp_path)


def npy(shape, dtype="<f4", data=b"1234"):
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


ARRAYS = FOREIGN | {
    "huge array": npy((10**13,)),
    "negative": npy((-5,)),
    "cut": npy((5,)),
    "code": npy("(__import__('os').getpid(),)"),
    "objects": npy((1,), "|O"),
    "complex": npy((1,), "<c8", bytes(8)),
    "torn": npy("((("),
}


@pytest.mark.parametrize("content", ARRAYS.values(), ids=ARRAYS)
def test_data_for_the_command_line_that_are_none_are_named_in_a_line(tmp_path, content, capsys):
    (tmp_path / "x.npy").write_bytes(content)
    (tmp_path / "config.json").write_text("{}")  # data are looked at before the model
    assert cli.main(["bound", str(tmp_path), str(tmp_path / "x.npy")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"probdiff: {tmp_path / 'x.npy'} must") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConnectionError("a must be downloaded"), 2, "a must be downloaded"),
        (OSError(errno.ENOSPC, "No space left", "x.nc"), 2, "[Errno 28] No space left: 'x.nc'"),
        (KeyboardInterrupt("after step 3: go on"), 130, "after step 3: go on"),
    ],
)
def test_what_the_system_refuses_is_said_in_a_line(monkeypatch, capsys, error, status, said):
    def refuse(args):
        raise error

    monkeypatch.setattr(cli, "_list", refuse)
    assert cli.main(["list"]) == status
    assert capsys.readouterr().err == f"probdiff: {said}\n"
