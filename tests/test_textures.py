"""Texture crops: where they lie, with what law, in what units. Bark is used where it is given."""

import math
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from probdiff import datasets

SHARED = Path(os.environ.get("PROBDIFF_SHARED", Path(__file__).parents[2] / "shared")) / "data"
needs_bark = pytest.mark.skipif(
    not (SHARED / "textures").is_dir(), reason="texture images are not at hand"
)
SHAPES = [(20, 14), (12, 50)]
CUTS = [14, 8]  # rows for training at a share of 0.3


def numbered():
    """Images in which no value occurs twice: 1000 a picture, row by row."""
    return [1_000 * k + np.arange(h * w).reshape(h, w) for k, (h, w) in enumerate(SHAPES)]


def places(crops, data):
    """Image, row and column of the crops' upper left corners."""
    first = np.rint(crops[:, 0, 0].astype(np.float64) * data.scale + data.loc).astype(int)
    image, rest = np.divmod(first, 1_000)
    return image, *np.divmod(rest, np.array(SHAPES)[image, 1])


def all_crops(image, size):
    """Every crop of one image, by loops."""
    height, width = image.shape
    return [
        image[i : i + size, j : j + size]
        for i in range(height - size + 1)
        for j in range(width - size + 1)
    ]


@pytest.fixture
def data(key):
    return datasets.textures(key, 8_000, numbered(), size=4, n_test=2_000, test_share=0.3)


def test_crops_are_blocks_of_the_images(data):
    images = numbered()
    for crops in (data.train, data.test):
        assert crops.dtype == np.float32
        for k, i, j, crop in zip(*places(crops, data), crops, strict=True):
            values = np.rint(crop.astype(np.float64) * data.scale + data.loc)
            np.testing.assert_array_equal(values, images[k][i : i + 4, j : j + 4])


def test_no_pixel_is_both_trained_on_and_held_out(data):
    cuts = np.array(CUTS)
    image, row, _ = places(data.train, data)
    assert (row + 4 <= cuts[image]).all() and (row + 4 == cuts[image]).any()
    image, row, _ = places(data.test, data)
    assert (row >= cuts[image]).all() and (row == cuts[image]).any()


def test_every_placement_is_equally_likely(data):
    """Over all images at once: a small image has fewer crops, not more frequent ones."""
    for crops, heights in [(data.train, CUTS), (data.test, [6, 4])]:
        counts = np.zeros((2, 20, 50), int)
        np.add.at(counts, places(crops, data), 1)
        number = sum((h - 3) * (shape[1] - 3) for h, shape in zip(heights, SHAPES, strict=True))
        seen = counts[counts > 0]
        assert len(seen) == number
        assert stats.chisquare(seen).pvalue > 1e-3


def test_scaling_is_that_of_all_training_crops():
    images = [np.random.default_rng(k).normal(3, 2, shape) for k, shape in enumerate(SHAPES)]
    data = datasets.textures(jax.random.key(0), 5, images, size=5, n_test=5, test_share=0.4)
    crops = np.concatenate([all_crops(images[0][:12], 5), all_crops(images[1][:7], 5)])
    assert data.loc == pytest.approx(crops.mean(), rel=1e-12)
    assert data.scale == pytest.approx(crops.std(), rel=1e-12)


def test_training_crops_are_centred_with_unit_variance(key):
    images = [np.random.default_rng(k).integers(0, 256, shape) for k, shape in enumerate(SHAPES)]
    n = 20_000
    crops = datasets.textures(key, n, images, size=3).train.astype(np.float64)
    for values, expected in [(crops.mean((1, 2)), 0.0), ((crops**2).mean((1, 2)), 1.0)]:
        assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(n)


def test_held_out_rows_do_not_reach_the_training_part(key):
    images, altered = numbered(), numbered()
    for image, cut in zip(altered, CUTS, strict=True):
        image[cut:] += 77
    one, two = (
        datasets.textures(key, 50, given, size=4, n_test=50, test_share=0.3)
        for given in (images, altered)
    )
    np.testing.assert_array_equal(one.train, two.train)
    assert (one.loc, one.scale) == (two.loc, two.scale)
    np.testing.assert_allclose((two.test - one.test) * one.scale, 77, atol=1e-3)


def test_half_the_crops_are_mirrored_if_asked(key):
    plain, mirrored = (
        datasets.textures(key, 4_000, numbered(), size=4, test_share=0.3, flip=flip)
        for flip in (False, True)
    )
    for crops, flipped in [(plain.train, mirrored.train), (plain.test, mirrored.test)]:
        kept = (crops == flipped).all((1, 2))
        turned = (crops[:, :, ::-1] == flipped).all((1, 2))
        assert (kept ^ turned).all()
        assert abs(turned.mean() - 0.5) < 4 * 0.5 / math.sqrt(len(crops))


def test_crops_are_those_of_their_key(key):
    first, again = (datasets.textures(key, 20, numbered(), size=3) for _ in range(2))
    np.testing.assert_array_equal(first.train, again.train)
    np.testing.assert_array_equal(first.test, again.test)
    other = datasets.textures(jax.random.key(1), 20, numbered(), size=3)
    assert not np.array_equal(first.train, other.train)


def test_grey_images_are_read_in_the_order_of_their_names(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    Image.fromarray(levels[::-1]).save(tmp_path / "b.png")
    Image.fromarray(levels).save(tmp_path / "a.png")
    (tmp_path / "readme.txt").write_text("no image")
    first, second = datasets.grey_images(tmp_path)
    np.testing.assert_array_equal(np.rint(255 * first), levels)
    np.testing.assert_array_equal(np.rint(255 * second), levels[::-1])


def test_colour_image_is_refused_by_name(tmp_path):
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "red.png")
    with pytest.raises(ValueError, match=r"red.png must be grey; got 3 channels"):
        datasets.grey_images(tmp_path)


def test_folder_without_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"folder must hold files \*.png; got"):
        datasets.grey_images(tmp_path)


@needs_bark
def test_bark_is_cropped_at_unit_variance(key, tmp_path):
    for name in ("bark_ambientcg_bark001.png", "bark_ambientcg_bark012.png"):
        (tmp_path / name).symlink_to(SHARED / "textures" / name)
    images = datasets.grey_images(tmp_path)
    assert [image.shape for image in images] == [(1024, 512), (1024, 1024)]
    n = 4_000
    data = datasets.textures(key, n, images, size=16, flip=True)
    squares = (data.train.astype(np.float64) ** 2).mean((1, 2))
    assert abs(squares.mean() - 1) < 4 * squares.std() / math.sqrt(n)
    levels = 255 * (data.test * data.scale + data.loc)
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be at least 1; got 0"),
        ({"n_test": 0}, "n_test must be at least 1; got 0"),
        ({"size": 0}, "size must be at least 1; got 0"),
        ({"test_share": 1.0}, r"test_share must lie in \(0, 1\); got 1.0"),
        ({"images": []}, "images must hold at least one image; got none"),
        (
            {"size": 5, "test_share": 0.3},
            r"images\[1\] must hold crops of 5 × 5 in its 8 training and its 4 held-out rows; "
            r"got shape \(12, 50\)",
        ),
        ({"images": [np.zeros((40, 3))]}, r"images\[0\] must hold crops .*got shape \(40, 3\)"),
        (
            {"images": [np.ones((40, 40))]},
            "images must be finite and vary; got standard deviation 0",
        ),
        (
            {"images": [np.full((40, 40), math.nan)]},
            "images must be finite and vary; got standard deviation nan",
        ),
    ],
)
def test_bad_arguments_are_named(key, options, message):
    options = {"n": 2, "images": numbered(), "size": 4, "test_share": 0.4, **options}
    with pytest.raises(ValueError, match=message):
        datasets.textures(key, options.pop("n"), options.pop("images"), **options)


def test_colour_array_is_refused(key, unchecked):
    with pytest.raises(ValueError, match=r"images\[0\] must have shape \(height, width\)"):
        datasets.textures(key, 2, [np.zeros((9, 9, 3))], size=2)
