"""The shape of a network's outputs.

A network returns `outputs` numbers per entry of x, on a last axis `outputs` times as long: block i
of that axis is the i-th number of each entry, so that a readout splits it into equal parts.
"""


def output_shape(event_shape: tuple[int, ...], outputs: int) -> tuple[int, ...]:
    """Event shape with its last axis `outputs` times as long; `(outputs,)` for scalars."""
    if not event_shape:
        return () if outputs == 1 else (outputs,)
    return (*event_shape[:-1], outputs * event_shape[-1])
