"""MNIST: grey images, and their two binarisations.

    fixed      every image binarised once and for all (Larochelle & Murray 2011): the split that
               static-binarisation likelihoods are quoted on
    dynamic    bits drawn anew whenever an image is used, P(1) = grey level / 255 (`binarise`)

The two are different data; likelihoods on them are not comparable. Files are the published ones,
found or downloaded, and checked, by `fetch`.
"""

import gzip
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, UInt8

from probdiff.arguments import check_key, known, read_array, shown
from probdiff.datasets.files import fetch

_MNIST = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",  # noqa: E501
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",  # noqa: E501
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
_MNIST_URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_BINARISED = {
    "binarized_mnist_train.amat": "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",  # noqa: E501
    "binarized_mnist_valid.amat": "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",  # noqa: E501
    "binarized_mnist_test.amat": "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
}
_BINARISED_URL = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"


class Mnist(NamedTuple):
    """Grey images (paper 0, ink up to 255) and labels 0..9, in the published order.

    Example:
        >>> datasets.Mnist._fields
        ('train', 'test', 'train_labels', 'test_labels')
    """

    train: UInt8[np.ndarray, "60000 28 28"]
    test: UInt8[np.ndarray, "10000 28 28"]
    train_labels: UInt8[np.ndarray, " 60000"]
    test_labels: UInt8[np.ndarray, " 10000"]


class BinarisedMnist(NamedTuple):
    """Images of bits, paper 0 and ink 1, in the fixed binarisation, published without labels.

    Example:
        >>> datasets.BinarisedMnist._fields
        ('train', 'validation', 'test')
    """

    train: UInt8[np.ndarray, "50000 28 28"]
    validation: UInt8[np.ndarray, "10000 28 28"]
    test: UInt8[np.ndarray, "10000 28 28"]


def mnist() -> Mnist:
    """Load MNIST: handwritten digits of 28 × 28 pixels, 60,000 to train and 10,000 to test.

    The folder named by `PROBDIFF_DATA` may hold the four published files; what is not there, 12 MB
    in all, is downloaded once. A `ValueError` if a file's checksum is another.

    Example:
        >>> data = datasets.mnist()  # doctest: +SKIP
        >>> data.train.shape, data.train.max()  # doctest: +SKIP
        ((60000, 28, 28), np.uint8(255))

    Source: LeCun et al. (1998), Gradient-based learning applied to document recognition.
    """
    images, labels = (
        [_idx(fetch(f"{part}-{kind}-ubyte.gz", _MNIST, _MNIST_URL)) for part in ("train", "t10k")]
        for kind in ("images-idx3", "labels-idx1")
    )
    return Mnist(*images, *labels)


def binarised_mnist() -> BinarisedMnist:
    """Load the fixed binarisation of MNIST: 50,000 images to train, 10,000 to validate and to test.

    The folder named by `PROBDIFF_DATA` may hold the three published files; what is not there,
    110 MB in all, is downloaded once. A `ValueError` if a file's checksum is another.

    Example:
        >>> data = datasets.binarised_mnist()  # doctest: +SKIP
        >>> data.validation.shape, np.unique(data.validation)  # doctest: +SKIP
        ((10000, 28, 28), array([0, 1], dtype=uint8))

    Source: Larochelle and Murray (2011), The Neural Autoregressive Distribution Estimator.
    """
    return BinarisedMnist(*(_amat(fetch(name, _BINARISED, _BINARISED_URL)) for name in _BINARISED))


def binarise(
    key: PRNGKeyArray, images: UInt8[Array | np.ndarray, "*shape"]
) -> Int[Array, "*shape"]:
    """Dynamic binarisation: a bit for each pixel, with P(1) = grey level / 255.

    `key` is a new one for every use of an image.

    Example:
        >>> grey = np.full((100, 28, 28), 51, np.uint8)
        >>> bits = datasets.binarise(jax.random.key(0), grey)
        >>> round(float(bits.mean()), 2)  # 51 / 255
        0.2

    Source: Salakhutdinov and Murray (2008), On the Quantitative Analysis of Deep Belief Networks.
    """
    check_key(key)
    images = read_array("images", images, jnp.integer)
    levels = known(images)
    if levels is not None and not ((levels >= 0) & (levels <= 255)).all():
        raise ValueError(f"images must hold grey levels 0..255; got {shown(images)}")
    return jax.random.bernoulli(key, jnp.asarray(images) / 255.0).astype(jnp.int32)


def _idx(file: Path) -> np.ndarray:
    """An IDX file of bytes: two zero bytes, type 8, the number of axes, their lengths, the data."""
    data = gzip.decompress(file.read_bytes())
    axes = data[3]
    shape = np.frombuffer(data, ">i4", axes, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _amat(file: Path) -> np.ndarray:
    """A text file of bits, 784 a line, one space or newline behind each."""
    text = np.frombuffer(file.read_bytes(), np.uint8)
    return (text[::2] - ord("0")).reshape(-1, 28, 28)
