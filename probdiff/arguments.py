"""Arguments by kind: each is checked in one way everywhere, before anything is computed.

    count     a whole number: no bool and no float, not even 2.0       `check_at_least`
    number    a real number in a range such as `SHARE`, no bool        `check_number`
    flag      True or False                                            `check_flag`
    text      a str                                                    `check_text`
    key       `jax.random.key(seed)`, or PRNGKey(seed), as before      `check_key`
    shape     a tuple of sizes, each at least 1                        `check_shape`
    array     of real numbers; what NumPy reads as one (a list, a      `as_array`
              pandas or xarray object) is taken as NumPy reads it
    object    one of a family, such as a kernel                        `check_object`
    path      a str or a path                                          `check_path`

All raise a `ValueError` that names the argument, what was expected and what came. What may be None
besides is said by `or_none`. `validation` has the checks that need a model.
"""

import math
import operator
import os
import types
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_MOST = 2**31 - 1
"""Largest count: JAX numbers levels, draws and examples by int32."""
_KINDS = {
    jnp.integer: "integers", jnp.floating: "real numbers", jnp.number: "numbers",
    jnp.bool_: "True and False",
}  # fmt: skip
_LARGEST = 2.0**126
"""Numbers beyond it, and below its inverse, are no numbers of float32."""
_WIDTH = 100
"""Characters of a value in a message."""


class Range(NamedTuple):
    """Real numbers that an argument may be."""

    text: str
    """How a message goes on after "must"."""
    holds: Callable[[float], bool]


# 1e300 is infinite, and 1e-300 zero, in float32
FINITE = Range("be finite", lambda x: abs(x) < _LARGEST)
POSITIVE = Range("be positive and finite", lambda x: 1 / _LARGEST < x < _LARGEST)
NOT_NEGATIVE = Range("be finite and not negative", lambda x: 0 <= x < _LARGEST)
SHARE = Range("lie in [0, 1]", lambda x: 0 <= x <= 1)
POSITIVE_SHARE = Range("lie in (0, 1]", lambda x: 0 < x <= 1)
INNER_SHARE = Range("lie in (0, 1)", lambda x: 0 < x < 1)


def shown(value: Any) -> str:
    """A value as a message has it: an array of many numbers by its shape, text cut short."""
    if isinstance(value, np.ndarray | jax.Array) and value.size > 8:
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    text = str(value) if isinstance(value, Real | type) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]} ..."


def check_at_least(least: int, *, or_none: bool = False, **values: Any) -> None:
    """Raise a `ValueError` that names the argument and its value, unless each is such a count."""
    for name, value in values.items():
        if value is None and or_none:
            continue
        if not _is_count(value):
            raise ValueError(f"{name} must be an integer of at least {least}; got {shown(value)}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {shown(value)}")
        if value > _MOST:
            raise ValueError(f"{name} must be at most {_MOST}; got {shown(value)}")


def check_number(within: Range, *, or_none: bool = False, **values: Any) -> None:
    """Raise a `ValueError` unless each is a real number in the range."""
    for name, value in values.items():
        if value is None and or_none:
            continue
        number = as_number(value)
        if number is None or not within.holds(number):
            kind = "" if number is not None else "be a number and "
            raise ValueError(f"{name} must {kind}{within.text}; got {shown(value)}")


def check_flag(**values: Any) -> None:
    """Raise a `ValueError` unless each is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{name} must be True or False; got {shown(value)}")


def check_text(**values: Any) -> None:
    """Raise a `ValueError` unless each is a str."""
    check_object(str, "a str", **values)


def check_key(key: Any, *, or_none: bool = False) -> None:
    """Raise a `ValueError` unless it is one random key, typed or the two words of an older one."""
    if key is None and or_none:
        return
    shape, dtype = getattr(key, "shape", None), getattr(key, "dtype", None)
    if dtype is not None and shape is not None:
        if jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ():
            return
        if dtype == np.uint32 and shape in ((2,), (4,)):
            return
    raise ValueError(f"key must be a random key, jax.random.key(seed); got {shown(key)}")


def check_shape(argument: str, shape: Any) -> tuple[int, ...]:
    """A shape as a tuple of Python's ints."""
    is_row = isinstance(shape, tuple | list) or (
        isinstance(shape, np.ndarray) and shape.ndim == 1 and shape.dtype.kind in "iu"
    )
    sizes = tuple(shape) if is_row else ()
    if not is_row or not all(map(_is_count, sizes)):
        raise ValueError(f"{argument} must be a tuple of ints such as (12,); got {shown(shape)}")
    if any(not 1 <= size <= _MOST for size in sizes):
        raise ValueError(f"{argument} must hold sizes of at least 1; got {shown(shape)}")
    return tuple(map(operator.index, sizes))


def as_array(
    argument: str, value: Any, *shape: Any, is_finite: bool = False
) -> np.ndarray | jax.Array:
    """Real numbers as an array, those of JAX as they are.

    Args:
        argument: Its name.
        value: What was given.
        shape: Sizes of the axes: a number, or a name for any; `...` in front for any axes. Any
            shape if absent.
        is_finite: Whether values must be finite.
    """
    array = read_array(argument, value, jnp.integer, jnp.floating)
    fixed = shape[1:] if shape[:1] == (...,) else shape
    last = array.shape[max(array.ndim - len(fixed), 0) :]
    wanted = [size if isinstance(size, int) else n for size, n in zip(fixed, last, strict=False)]
    fits = list(last) == wanted and len(wanted) == len(fixed)
    if shape and (not fits or (fixed is shape and array.ndim != len(fixed))):
        text = ", ".join("..." if size is ... else str(size) for size in shape)
        text += "," * (len(shape) == 1)
        raise ValueError(f"{argument} must have shape ({text}); got shape {array.shape}")
    values = known(array) if is_finite else None
    if values is not None and not (np.abs(values) < _LARGEST).all():
        raise ValueError(f"{argument} must be finite; got {shown(value)}")
    return array


def read_array(argument: str, value: Any, *kinds: Any) -> np.ndarray | jax.Array:
    """What was given as an array, refused where its dtype is of none of these kinds."""
    array = value
    if not isinstance(value, jax.Array):
        try:
            array = value if isinstance(value, np.ndarray) else np.asarray(value)
        except jax.errors.TracerArrayConversionError:  # a list that holds traced numbers
            array = jnp.asarray(value)
        except Exception as error:  # whatever a stranger's object raises
            raise ValueError(f"{argument} must be an array; got {shown(value)}: {error}") from None
        array = plain(argument, array)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        names = " or ".join(_KINDS.get(kind, "text") for kind in kinds)
        raise ValueError(
            f"{argument} must be an array of {names}; got {shown(value)} of dtype {array.dtype}"
        )
    return array


def known(array: np.ndarray | jax.Array) -> np.ndarray | None:
    """Values where they can be looked at, None while they are traced.

    As NumPy's, for a comparison of JAX's own would be traced within `jit`.
    """
    return None if isinstance(array, jax.core.Tracer) else np.asarray(array)


def check_object(
    family: type | types.UnionType | tuple[type, ...], such_as: str = "", *,
    or_none: bool = False, **values: Any,
) -> None:  # fmt: skip
    """Raise a `ValueError` unless each is an object of a family; `such_as` says which it is."""
    for name, value in values.items():
        if not (isinstance(value, family) or (value is None and or_none)):
            expected = such_as or f"a {family.__name__}"
            raise ValueError(f"{name} must be {expected}; got {shown(value)}")


def check_callable(such_as: str, *, or_none: bool = False, **values: Any) -> None:
    """Raise a `ValueError` unless each can be called, as `such_as` says."""
    for name, value in values.items():
        if not (callable(value) or (value is None and or_none)):
            raise ValueError(f"{name} must be callable, {such_as}; got {shown(value)}")


def check_path(argument: str, value: Any) -> Path:
    """A path, refused where it is empty."""
    if not isinstance(value, str | os.PathLike) or not (text := os.fspath(value)):
        raise ValueError(f"{argument} must be a path, a str or pathlib.Path; got {shown(value)}")
    return Path(text)


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
    try:
        array = np.asarray(value)
    except jax.errors.TracerArrayConversionError:  # a list that holds traced numbers
        return jnp.asarray(value)
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


def as_number(value: Any) -> float | None:
    """A real number, an array of one without axes among them; None for anything else."""
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    is_array = isinstance(value, np.ndarray | jax.Array) and not isinstance(value, jax.core.Tracer)
    return float(value) if is_array and value.shape == () and value.dtype.kind in "iuf" else None


def _is_count(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and operator.index(value) is not None
    except TypeError:
        return False
