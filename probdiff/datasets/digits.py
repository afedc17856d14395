"""Digits: scikit-learn's 1797 real images of 8 × 8 pixels, levels 0..16; dequantisation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from probdiff.arguments import POSITIVE, as_array, check_key, check_number


class Digits(NamedTuple):
    """Images of digits, whole levels 0..16 as floats, and labels 0..9; no image is in two parts.

    Example:
        >>> train, validation, test, *labels = datasets.digits()
        >>> len(train), len(validation), len(test)
        (1297, 200, 300)
    """

    train: Float[Array, "1297 8 8"]
    validation: Float[Array, "200 8 8"]
    test: Float[Array, "300 8 8"]
    train_labels: Int[Array, "1297"]
    validation_labels: Int[Array, "200"]
    test_labels: Int[Array, "300"]


def digits() -> Digits:
    """Handwritten digits of 8 × 8 pixels: 1297 to train, 200 to validate, 300 to test.

    Pixels count the black dots of a 4 × 4 block. The split is one fixed permutation. Part of
    scikit-learn: nothing is downloaded.

    Example:
        >>> data = datasets.digits()
        >>> data.train.shape, float(data.train.max())
        ((1297, 8, 8), 16.0)
        >>> data.test_labels[:5].tolist()
        [8, 8, 2, 2, 2]

    Source: Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI; test part.
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    # The stream of RandomState is frozen for good; that of default_rng may change.
    order = np.random.RandomState(0).permutation(len(bundle.images))
    images = jnp.asarray(bundle.images[order], dtype=float)
    labels = jnp.asarray(bundle.target[order], dtype=int)
    ends = [1297, 1497]
    return Digits(*jnp.split(images, ends), *jnp.split(labels, ends))


def dequantise(
    key: PRNGKeyArray, x: Float[Array, "*shape"], *, levels_width: float = 1.0
) -> Float[Array, "*shape"]:
    """Integer levels as a density, x + levels_width · U with U uniform on [0, 1).

    A density p of the sum bounds the probability P of the levels from below: with width w and d
    pixels, Jensen's inequality gives

        log P(x) ≥ E_U log p(x + w U) + d log w,

    so on digits, at width 1, −log2 p / 64 is an upper bound on bits per pixel on the scale of 17
    levels. This holds at full width only (a narrower U makes p grow without limit), and for p in
    these units: a model of (x − loc)/scale owes the Jacobian.

    Args:
        key: Random key.
        x: Levels, multiples of `levels_width`.
        levels_width: Distance between levels, positive.

    Returns:
        Values in [x, x + levels_width): floor(value / levels_width) is the level again.

    Example:
        >>> x = datasets.digits().train
        >>> u = datasets.dequantise(jax.random.key(0), x)
        >>> bool((jnp.floor(u) == x).all()), round(float((u - x).mean()), 2)
        (True, 0.5)

    Source: Theis, van den Oord and Bethge (2016), section 3.1.
    """
    check_key(key)
    check_number(POSITIVE, levels_width=levels_width)
    x = jnp.asarray(as_array("x", x, is_finite=True))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be of a floating dtype; got {x.dtype}")
    levels_width = float(levels_width)
    value = x + levels_width * jax.random.uniform(key, x.shape, dtype=x.dtype)
    # In float32, 16 + (1 − 2⁻²⁴) rounds to 17, which belongs to the next level.
    return jnp.minimum(value, jnp.nextafter(x + levels_width, x))
