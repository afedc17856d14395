"""Shapes of an example and of a network's outputs for it.

A network returns `outputs` numbers per entry of x, on a last axis `outputs` times as long: block i
of that axis is the i-th number of each entry, so that a readout splits it into equal parts.
"""

import operator
from typing import Any


def check_shape(argument: str, shape: Any) -> tuple[int, ...]:
    """A shape as a tuple of Python's ints."""
    try:
        return tuple(operator.index(size) for size in shape)
    except TypeError:
        raise ValueError(
            f"{argument} must be a tuple of ints such as (12,); got {shape!r}"
        ) from None


def check_counts(**counts: int) -> None:
    """Raise a `ValueError` unless every count is at least 1."""
    for argument, count in counts.items():
        if count < 1:
            raise ValueError(f"{argument} must be at least 1; got {count}")


def output_shape(event_shape: tuple[int, ...], outputs: int) -> tuple[int, ...]:
    """Event shape with its last axis `outputs` times as long; `(outputs,)` for scalars."""
    if not event_shape:
        return () if outputs == 1 else (outputs,)
    return (*event_shape[:-1], outputs * event_shape[-1])
