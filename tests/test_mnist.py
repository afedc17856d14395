"""MNIST as published: files, binarisations. Real files are used where they are given."""

import gzip
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from probdiff import datasets
from probdiff.datasets.mnist import _BINARISED, _MNIST, _amat, _idx

SHARED = Path(os.environ.get("PROBDIFF_SHARED", Path(__file__).parents[2] / "shared")) / "data"
needs_images = pytest.mark.skipif(
    not (SHARED / "mnist").is_dir(), reason="MNIST files are not at hand"
)
needs_bits = pytest.mark.skipif(
    not (SHARED / "mnist_binarized.npz").is_file(), reason="binarised MNIST is not at hand"
)


def write_published(folder):
    """The fixed binarisation in the text form it was published in."""
    packed = np.load(SHARED / "mnist_binarized.npz")
    for split in ("train", "valid", "test"):
        bits = np.unpackbits(packed[split], axis=1)
        text = np.full((len(bits), 2 * 784), ord(" "), np.uint8)
        text[:, ::2], text[:, -1] = bits + ord("0"), ord("\n")
        (folder / f"binarized_mnist_{split}.amat").write_bytes(text.tobytes())


@needs_images
def test_grey_images_are_the_published_ones(monkeypatch):
    monkeypatch.setenv("PROBDIFF_DATA", str(SHARED / "mnist"))
    data = datasets.mnist()
    assert data.train.mean() == pytest.approx(33.3184, abs=1e-4)
    assert data.test.std() == pytest.approx(79.1725, abs=1e-4)
    assert np.bincount(data.test_labels).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip


@needs_bits
def test_bits_are_the_published_ones(monkeypatch, tmp_path):
    write_published(tmp_path)
    monkeypatch.setenv("PROBDIFF_DATA", str(tmp_path))
    data = datasets.binarised_mnist()
    means = [split.mean() for split in data]
    assert means == pytest.approx([0.130562, 0.131127, 0.132512], abs=1e-6)
    assert [split.shape for split in data] == [(50_000, 28, 28), (10_000, 28, 28), (10_000, 28, 28)]
    assert set(np.unique(data.test)) == {0, 1}


def test_formats_are_read_as_written(tmp_path):
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    header = bytes([0, 0, 8, 3]) + np.array([2, 3, 4], ">i4").tobytes()
    (tmp_path / "images.gz").write_bytes(gzip.compress(header + images.tobytes()))
    np.testing.assert_array_equal(_idx(tmp_path / "images.gz"), images)
    bits = np.random.default_rng(0).integers(0, 2, (2, 784))
    lines = "".join(" ".join(map(str, row)) + "\n" for row in bits)
    (tmp_path / "bits.amat").write_text(lines)
    np.testing.assert_array_equal(_amat(tmp_path / "bits.amat"), bits.reshape(2, 28, 28))


def test_dynamic_bits_follow_the_grey_levels():
    images = np.array([[0, 51, 255]], np.uint8)
    n = 20_000
    draws = jax.vmap(lambda k: datasets.binarise(k, images))(jax.random.split(jax.random.key(0), n))
    share = np.asarray(draws).mean((0, 1))
    assert share[0] == 0 and share[2] == 1
    assert abs(share[1] - 0.2) < 4 * np.sqrt(0.16 / n)


def test_checksums_cover_all_files():
    assert len(_BINARISED) == 3 and len(_MNIST) == 4
    assert all(len(v) == 64 for v in (_BINARISED | _MNIST).values())
