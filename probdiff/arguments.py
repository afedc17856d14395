"""Arguments that many functions have, counts, shapes and arrays: checked, and said in messages."""

import operator
from typing import Any

import jax
import numpy as np


def check_at_least(least: int, **values: int) -> None:
    """Raise a `ValueError` that names the argument and its value."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")


def check_shape(argument: str, shape: Any) -> tuple[int, ...]:
    """A shape as a tuple of Python's ints."""
    try:
        return tuple(operator.index(size) for size in shape)
    except TypeError:
        raise ValueError(
            f"{argument} must be a tuple of ints such as (12,); got {shape!r}"
        ) from None


def plain(argument: str, value: Any) -> Any:
    """An array as JAX reads it right: one of its own, or NumPy's in native byte order; or None.

    JAX reads the bytes of another order as they lie, once it knows the shape, and does not see the
    mask of a masked array; a long double becomes a double.

    Raises:
        ValueError: if entries of a masked array are masked.
    """
    if value is None or isinstance(value, jax.Array):
        return value
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        count = np.ma.count_masked(value)
        raise ValueError(
            f"{argument} must not be a masked array, whose mask would be lost; got one with "
            f"{count} masked entries: pass {argument}.data, and a mask that is True where an entry "
            f"counts, ~numpy.ma.getmaskarray({argument})"
        )
    array = np.asarray(value)
    if array.dtype.char == "g":
        return array.astype(np.float64)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def plain_arrays(argument: str, tree: Any) -> Any:
    """A tree, of whose leaves NumPy's arrays are `plain`; a `ValueError` names the leaf."""

    def leaf_of(path: Any, leaf: Any) -> Any:
        is_array = isinstance(leaf, np.ndarray)
        return plain(argument + jax.tree_util.keystr(path), leaf) if is_array else leaf

    return jax.tree_util.tree_map_with_path(leaf_of, tree)


def shape_text(lead: str, shape: tuple[int, ...]) -> str:
    """A shape whose first axes have a name and no number, as text: `(N, 8, 8)`."""
    return f"({lead},)" if not shape else f"({lead}, {', '.join(map(str, shape))})"
