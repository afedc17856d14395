"""CIFAR-10 as published: archive, order, axes. Real images are used where they are given."""

import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from probdiff import datasets
from probdiff.datasets.cifar10 import _ARCHIVE, _ARCHIVES, _BATCHES, _records

try:
    import pillow_jxl  # noqa: F401
except ImportError:
    jxl = False
else:
    jxl = True

SHARED = Path(os.environ.get("PROBDIFF_SHARED", Path(__file__).parents[2] / "shared")) / "data"
needs_images = pytest.mark.skipif(
    not (SHARED / "cifar10").is_dir(), reason="CIFAR-10's images are not at hand"
)
needs_jxl = pytest.mark.skipif(not jxl, reason="pillow_jxl, which reads the images, is not there")


def tiles(file):
    """Images of one mosaic of 32 × 32 tiles, row by row."""
    mosaic = np.asarray(Image.open(file))
    side = len(mosaic) // 32
    return mosaic.reshape(side, 32, side, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)


def as_published(images, labels):
    """A batch in the binary layout: a label, then the red, green and blue planes."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([labels[:, None], planes], axis=1).tobytes()


def write_archive(file, contents):
    """The archive, its members in another order than that of the images, and one more."""
    with tarfile.open(file, "w:gz") as archive:
        for name, content in [("cifar-10-batches-bin/readme.html", b"?"), *contents.items()][::-1]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def contents():
    """Six batches of two images each, of which no two are equal."""
    draw = np.random.default_rng(0).integers
    return {
        name: as_published(
            draw(0, 256, (2, 32, 32, 3), dtype=np.uint8), draw(0, 10, 2, dtype=np.uint8)
        )
        for name in _BATCHES
    }


def check_against(data, contents):
    labels, images = zip(*(_records(content) for content in contents.values()), strict=True)
    np.testing.assert_array_equal(data.train, np.concatenate(images[:5]))
    np.testing.assert_array_equal(data.train_labels, np.concatenate(labels[:5]))
    np.testing.assert_array_equal(data.test, images[5])
    np.testing.assert_array_equal(data.test_labels, labels[5])


def test_record_holds_label_then_red_green_and_blue_rows():
    record = np.zeros(3073, np.uint8)
    record[0] = 7
    record[1 + 1024 + 5 * 32 + 9] = 200  # green, row 5, column 9
    labels, images = _records(record.tobytes())
    assert labels.tolist() == [7]
    assert np.argwhere(images).tolist() == [[0, 5, 9, 1]]
    assert images[0, 5, 9, 1] == 200


def test_archive_is_read_in_the_order_of_the_images(monkeypatch, tmp_path, contents):
    write_archive(tmp_path / _ARCHIVE, contents)
    monkeypatch.setenv("PROBDIFF_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=rf"{_ARCHIVE} must have the SHA-256 c4a38c50"):
        datasets.cifar10()
    found = hashlib.sha256((tmp_path / _ARCHIVE).read_bytes()).hexdigest()
    monkeypatch.setitem(_ARCHIVES, _ARCHIVE, found)
    check_against(datasets.cifar10(), contents)


def test_unpacked_batches_are_taken_from_the_folder(monkeypatch, tmp_path, contents):
    monkeypatch.setenv("PROBDIFF_DATA", str(tmp_path))
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"data_batch_1.bin must have the SHA-256 cee91656"):
        datasets.cifar10()
    for name, content in contents.items():
        monkeypatch.setitem(_BATCHES, name, hashlib.sha256(content).hexdigest())
    check_against(datasets.cifar10(), contents)


@needs_images
@pytest.mark.parametrize(
    ("batch", "split", "mosaic"),
    [("data_batch_1", "train", "train_00000-09999"), ("test_batch", "test", "test_00000-09999")],
)
def test_batches_at_hand_are_the_published_ones(batch, split, mosaic):
    images = tiles(SHARED / "cifar10" / f"{mosaic}.webp")
    labels = np.load(SHARED / "cifar10" / "labels.npz")[split][:10_000]
    content = as_published(images, labels)
    name = f"cifar-10-batches-bin/{batch}.bin"
    assert hashlib.sha256(content).hexdigest() == _BATCHES[name]
    again_labels, again = _records(content)
    np.testing.assert_array_equal(again, images)
    np.testing.assert_array_equal(again_labels, labels)


@pytest.mark.slow
@needs_images
@needs_jxl
def test_images_are_the_published_ones(monkeypatch, tmp_path):
    labels = np.load(SHARED / "cifar10" / "labels.npz")
    train = np.concatenate([tiles(f) for f in sorted((SHARED / "cifar10").glob("train_*"))])
    test = tiles(SHARED / "cifar10" / "test_00000-09999.webp")
    images = [*np.split(train, 5), test]
    answers = [*np.split(labels["train"], 5), labels["test"]]
    (tmp_path / "cifar-10-batches-bin").mkdir()
    for name, batch, answer in zip(_BATCHES, images, answers, strict=True):
        (tmp_path / name).write_bytes(as_published(batch, answer))
    monkeypatch.setenv("PROBDIFF_DATA", str(tmp_path))
    data = datasets.cifar10()
    np.testing.assert_allclose(data.train.mean((0, 1, 2)), [125.307, 122.950, 113.865], atol=6e-4)
    np.testing.assert_allclose(data.test.mean((0, 1, 2)), [126.025, 123.709, 114.854], atol=6e-4)
    assert np.bincount(data.train_labels).tolist() == [5_000] * 10
    assert np.bincount(data.test_labels).tolist() == [1_000] * 10
    assert data.train.shape == (50_000, 32, 32, 3) and data.test.shape == (10_000, 32, 32, 3)
