"""Arguments that many functions have, counts and shapes: checked, and said in messages."""

import operator
from typing import Any


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


def shape_text(lead: str, shape: tuple[int, ...]) -> str:
    """A shape whose first axes have a name and no number, as text: `(N, 8, 8)`."""
    return f"({lead},)" if not shape else f"({lead}, {', '.join(map(str, shape))})"
