"""CIFAR-10: photographs of 32 × 32 pixels in ten classes, 50,000 to train and 10,000 to test.

The classes 0..9 are aeroplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck. The file
is the published archive of the binary version, six batches of 10,000 records; a record is

    1 byte     the label, 0..9
    3072 bytes the pixels, 0..255: 1024 red, 1024 green, 1024 blue, each 32 rows from the top

Images are returned with the channels last. Levels are integers, on which a density is unbounded:
`dequantise` at full width first. The paper's K for CIFAR-10 is per pixel of three channels, on data
divided by one global standard deviation s (in units of 0..1); K in bits becomes bits per channel as

    log2(255 s) − K/3.

A model of photographs may be trained on their mirror images too (`with_mirrored`).

Source: Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images; the binary version
of https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import tarfile
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped, UInt8

from probdiff.arguments import read_array
from probdiff.datasets.files import fetch, given

_ARCHIVE = "cifar-10-binary.tar.gz"
_ARCHIVES = {_ARCHIVE: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"}
_URL = "https://www.cs.toronto.edu/~kriz/"
# Of the archive's members, in the order of the images; the test images are the last.
_BATCHES = {
    "cifar-10-batches-bin/data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",  # noqa: E501
    "cifar-10-batches-bin/data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",  # noqa: E501
    "cifar-10-batches-bin/data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",  # noqa: E501
    "cifar-10-batches-bin/data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",  # noqa: E501
    "cifar-10-batches-bin/data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",  # noqa: E501
    "cifar-10-batches-bin/test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",  # noqa: E501
}


class Cifar10(NamedTuple):
    """Colour images (red, green and blue last, levels 0..255) and labels 0..9, published order.

    Example:
        >>> datasets.Cifar10._fields
        ('train', 'test', 'train_labels', 'test_labels')
    """

    train: UInt8[np.ndarray, "50000 32 32 3"]
    test: UInt8[np.ndarray, "10000 32 32 3"]
    train_labels: UInt8[np.ndarray, " 50000"]
    test_labels: UInt8[np.ndarray, " 10000"]


def cifar10() -> Cifar10:
    """Load CIFAR-10 in its published order.

    The folder named by `PROBDIFF_DATA` may hold the archive, or the six batches as it unpacks them,
    in `cifar-10-batches-bin/`. Otherwise the archive, 170 MB, is downloaded once. A
    `ValueError` if a file's checksum is another.

    Example:
        >>> data = datasets.cifar10()  # doctest: +SKIP
        >>> data.train.shape, data.train.dtype  # doctest: +SKIP
        ((50000, 32, 32, 3), dtype('uint8'))
    """
    batches = [_records(content) for content in _contents()]
    labels, images = (np.concatenate(parts) for parts in zip(*batches[:-1], strict=True))
    test_labels, test = batches[-1]
    return Cifar10(images, test, labels, test_labels)


def with_mirrored(
    images: Shaped[np.ndarray, "n height width *channels"],
) -> Shaped[np.ndarray, "_ height width *channels"]:
    """The images, of any dtype, then in the same order each with left and right exchanged.

    A model of photographs trained on both is one whose law does not know left from right; its bound
    on held-out images stays one, for they are as they are. Not for digits or letters.

    Example:
        >>> datasets.with_mirrored(np.array([[[1, 2, 3]]])).tolist()
        [[[1, 2, 3]], [[3, 2, 1]]]
    """
    images = read_array("images", images, jnp.integer, jnp.floating, jnp.bool_)
    if images.ndim not in (3, 4):
        raise ValueError(
            f"images must have shape (n, height, width) or (n, height, width, channels); got shape "
            f"{images.shape}"
        )
    return np.concatenate([images, images[:, :, ::-1]])


def _contents() -> list[bytes]:
    """The six batches, from the unpacked folder if it is complete, else from the archive."""
    files = [given(name, _BATCHES) for name in _BATCHES]
    if None not in files:
        return [file.read_bytes() for file in files]
    with tarfile.open(fetch(_ARCHIVE, _ARCHIVES, _URL)) as archive:
        # In the archive's own order: to step back in it would mean to unpack it again.
        members = (member for member in archive if member.name in _BATCHES)
        found = {member.name: archive.extractfile(member).read() for member in members}
    return [found[name] for name in _BATCHES]


def _records(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Labels and images of one batch."""
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return records[:, 0].copy(), np.ascontiguousarray(images)
