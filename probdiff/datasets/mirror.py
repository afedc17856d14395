"""Images and their mirror images: the augmentation that photographs bear."""

import numpy as np
from jaxtyping import Shaped


def with_mirrored(
    images: Shaped[np.ndarray, "n height width *channels"],
) -> Shaped[np.ndarray, "_ height width *channels"]:
    """The images, then each of them with left and right exchanged.

    A model of photographs trained on both is one whose law does not know left from right; its bound
    on held-out images stays one, for they are as they are. Not for digits or letters.

    Args:
        images: Images, grey or with channels last, of any dtype.

    Returns:
        Twice as many images: those given, in their order, then their mirror images.

    Example:
        >>> datasets.with_mirrored(np.array([[[1, 2, 3]]])).tolist()
        [[[1, 2, 3]], [[3, 2, 1]]]
    """
    return np.concatenate([images, images[:, :, ::-1]])
