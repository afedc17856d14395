"""Textures: random crops of grey images, training and held-out crops from disjoint regions.

Every image is cut once, the upper rows for training and the lower ones held out, so that no pixel
is seen in both. Within either part all placements of the crop are equally likely, over all images;
a placement may be drawn again. With c_i the number of placements that cover row i of a region of H
rows, and c_j that for its column j,

    c_i = Σ_a 1[a ≤ i < a + size],    a = 0 .. H − size,

a grey value of a random training crop has the moments

    loc = Σ c_i c_j x_ij / Σ c_i c_j,        scale² = Σ c_i c_j (x_ij − loc)² / Σ c_i c_j,

sums over the pixels of all training regions. Both parts are returned as (x − loc) / scale: mean 0
and variance 1 under the law of the training crops, not of the sample, so that all draws share one
scaling. A model's log density per pixel in units of x is the one in these units minus log scale.

Grey levels stay discrete, 1/scale apart if they were integers, and want `dequantise` with that
`levels_width` before a density is asked for.

Source: Sohl-Dickstein et al. (2015), section 3.2, on bark of Lazebnik, Schmid and Ponce (2005);
crops and split of the paper are unpublished, so its number is not comparable.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PRNGKeyArray, Real

from probdiff.arguments import (
    INNER_SHARE,
    as_array,
    check_at_least,
    check_flag,
    check_key,
    check_number,
    check_object,
    check_path,
)

_Image = Real[Array | np.ndarray, "_ _"]


class Textures(NamedTuple):
    """Crops (grey − loc) / scale of the training and of the held-out regions.

    Example:
        >>> stripes = np.tile([0.0, 100.0], (8, 8))
        >>> data = datasets.textures(jax.random.key(0), 5, [stripes], size=2, n_test=3)
        >>> data.loc, data.scale, data.train[0].tolist()
        (50.0, 50.0, [[-1.0, 1.0], [-1.0, 1.0]])
    """

    train: Float32[np.ndarray, "n size size"]
    test: Float32[np.ndarray, "n_test size size"]
    loc: float
    """Mean grey value of a random training crop, in the images' unit; `scale` its deviation."""
    scale: float


def textures(
    key: PRNGKeyArray, n: int, images: Sequence[_Image], *, size: int, n_test: int = 1_000,
    test_share: float = 0.25, flip: bool = False,
) -> Textures:  # fmt: skip
    """Random crops of grey images, `n` for training and `n_test` held out, at unit variance.

    Args:
        key: Random key.
        n: Number of training crops, at least 1.
        images: Grey images of any sizes, in any one unit.
        size: Pixels a side of a crop, at least 1.
        n_test: Number of held-out crops, at least 1.
        test_share: Share of every image's rows that is held out, the lowest ones; in (0, 1).
        flip: Whether to mirror each crop left to right with probability 1/2.

    Raises:
        ValueError: If an option is out of range, a crop does not fit in, or images do not vary.

    Example:
        >>> photograph = np.random.default_rng(0).uniform(size=(80, 60))
        >>> data = datasets.textures(jax.random.key(0), 500, [photograph], size=8, n_test=100)
        >>> data.train.shape, data.test.shape, round(float(data.train.std()), 1)
        ((500, 8, 8), (100, 8, 8), 1.0)
    """
    check_key(key)
    check_at_least(1, n=n, n_test=n_test, size=size)
    check_number(INNER_SHARE, test_share=test_share)
    check_flag(flip=flip)
    train, test = _split(images, size, test_share)
    loc = _mean(train, size)
    scale = math.sqrt(_mean([(region - loc) ** 2 for region in train], size))
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"images must be finite and vary; got standard deviation {scale}")
    key_train, key_test = jax.random.split(key)

    def crops(key: PRNGKeyArray, n: int, regions: list[np.ndarray]) -> np.ndarray:
        scaled = [((region - loc) / scale).astype(np.float32) for region in regions]
        return _crops(key, n, scaled, size, flip)

    return Textures(crops(key_train, n, train), crops(key_test, n_test, test), loc, scale)


def grey_images(folder: Path) -> list[Float[np.ndarray, "_ _"]]:
    """The grey PNG files of a folder in the order of their names, for `textures`.

    Floats, black 0 and white 1; levels of 8 bits are 1/255 apart. There must be files, and none
    with colours or transparency.

    Example:
        >>> import pathlib, tempfile, PIL.Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     PIL.Image.new("L", (60, 80), 51).save(f"{folder}/grey.png")
        ...     images = datasets.grey_images(pathlib.Path(folder))
        >>> images[0].shape, round(float(images[0].mean()), 2)  # 51 / 255
        ((80, 60), 0.2)
    """
    files = sorted(check_path("folder", folder).glob("*.png"))
    if not files:
        raise ValueError(f"folder must hold files *.png; got {folder}")
    from matplotlib.image import imread

    images = []
    for file in files:
        try:
            images.append(imread(file))
        except Exception as error:  # whatever the reader of damaged or foreign files comes upon
            raise ValueError(f"{file} must be a PNG file; {error}") from error
    for file, image in zip(files, images, strict=True):
        if image.ndim != 2:
            raise ValueError(f"{file} must be grey; got {image.shape[2]} channels")
    return images


def _split(
    images: Sequence[_Image], size: int, test_share: float
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Upper and lower part of every image, in float64."""
    check_object(Sequence | np.ndarray | jax.Array, "a sequence of arrays", images=images)
    if not len(images):
        raise ValueError("images must hold at least one image; got none")
    train, test = [], []
    for k, image in enumerate(images):
        image = as_array(f"images[{k}]", image, "height", "width")
        height, width = image.shape
        cut = height - round(test_share * height)
        if min(cut, height - cut, width) < size:
            raise ValueError(
                f"images[{k}] must hold crops of {size} × {size} in its {cut} training and its "
                f"{height - cut} held-out rows; got shape {image.shape}"
            )
        image = np.asarray(image, np.float64)
        train.append(image[:cut])
        test.append(image[cut:])
    return train, test


def _mean(regions: list[np.ndarray], size: int) -> float:
    """Mean of a value in a random crop, Σ c_i c_j x_ij / Σ c_i c_j."""
    total = weight = 0.0
    for region in regions:
        rows, columns = (np.convolve(np.ones(m - size + 1), np.ones(size)) for m in region.shape)
        total += float(rows @ region @ columns)
        weight += float(rows.sum() * columns.sum())
    return total / weight


def _crops(
    key: PRNGKeyArray, n: int, regions: list[np.ndarray], size: int, flip: bool
) -> Float32[np.ndarray, "{n} {size} {size}"]:
    """Crops at places drawn uniformly from all that fit into a region."""
    key_region, key_row, key_column, key_flip = jax.random.split(key, 4)
    places = np.array([region.shape for region in regions]) - size + 1
    share = places.prod(axis=1) / places.prod(axis=1).sum()
    which = np.asarray(jax.random.choice(key_region, len(regions), (n,), p=jnp.asarray(share)))
    row = np.asarray(jax.random.randint(key_row, (n,), 0, places[which, 0]))
    column = np.asarray(jax.random.randint(key_column, (n,), 0, places[which, 1]))
    crops = np.empty((n, size, size), np.float32)
    for k, region in enumerate(regions):
        mine = which == k
        windows = np.lib.stride_tricks.sliding_window_view(region, (size, size))
        crops[mine] = windows[row[mine], column[mine]]
    if flip:
        mirrored = np.asarray(jax.random.bernoulli(key_flip, shape=(n,)))
        crops[mirrored] = crops[mirrored, :, ::-1]
    return crops
