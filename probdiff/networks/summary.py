"""A table of a network's layers: parameters, shapes, floating-point operations.

    print(networks.summary(diffusion.network, diffusion.event_shape))

The table is flax's own (`nnx.tabulate`), a row for each call of a layer in the order of the calls,
the whole network first; a row of a block counts all that is inside it. It is plain text, without
colours, and never wraps.

Operations are XLA's count: a layer y = A x + b of n inputs and m outputs has 2nm + m for each
example, and tanh, exp and their like have none. They are those of one call of the network, which
trains at some three times the operations with its gradients, and is called T times for a draw.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from probdiff.arguments import check_at_least, check_object, check_shape, shown
from probdiff.networks.binding import bind

_PLAIN = {"force_terminal": False, "force_jupyter": False, "color_system": None, "width": 1000}


def summary(
    network: Any, event_shape: tuple[int, ...], *, batch_size: int = 1,
    context_shape: tuple[int, ...] | None = None, dtype: Any = float, depth: int | None = None,
) -> str:  # fmt: skip
    """Table of layers with parameters, shapes and FLOPs, and their totals for one call, as text.

    Args:
        network: A stateless flax.nnx module, called as `network(x_t, t)` or with a context.
        event_shape: Shape of one example.
        batch_size: Examples in the call.
        context_shape: Shape of one example's context; None where there is none.
        dtype: Type of x_t, float, or int for symbols.
        depth: Most parts of a path, such as 2 of `layers/0`, in what is shown; None for all.

    Example:
        >>> network = networks.RadialBasis((2,), width=16, T=40, rngs=nnx.Rngs(0))
        >>> print(networks.summary(network, (2,)))
        RadialBasis Summary
        ...
        Total Parameters: 2,768 (11.1 KB)
        Total FLOPs: ...
    """
    check_object(nnx.Module, "a flax.nnx module", network=network)
    event_shape = check_shape("event_shape", event_shape)
    context_shape = None if context_shape is None else check_shape("context_shape", context_shape)
    if (own := getattr(network, "event_shape", event_shape)) != event_shape:
        raise ValueError(f"event_shape must be that of the network, {own}; got {event_shape}")
    check_at_least(1, batch_size=batch_size)
    check_at_least(1, or_none=True, depth=depth)
    if not isinstance(dtype, type) or dtype not in (int, float):
        raise ValueError(f"dtype must be float, or int for symbols; got {shown(dtype)}")
    time = float if getattr(network, "takes_log_snr", False) else jnp.int32
    inputs = [jnp.zeros((batch_size, *event_shape), dtype), jnp.ones(batch_size, time)]
    if context_shape is not None:
        inputs.append(jnp.zeros((batch_size, *context_shape)))
    try:
        inspect.signature(network).bind(*inputs)
    except TypeError as error:
        raise ValueError(
            f"context_shape must be given exactly where the network takes a context; {error}"
        ) from None
    # before the table, during which an error would leave flax's classes with replaced methods
    flops = _flops(network, inputs)
    table = nnx.tabulate(network, *inputs, depth=depth, compute_flops=True, console_kwargs=_PLAIN)
    lines = [line.rstrip() for line in table.strip("\n").splitlines()]
    totals = [lines.pop().strip(), f"Total FLOPs: {flops:,} (one call, batch of {batch_size})"]
    return "\n".join([*lines, *totals])


def _flops(network: nnx.Module, inputs: list[Array]) -> int:
    """Operations of one call, as XLA counts them."""
    binding = bind(network, (), None)
    x_t, t, context = (*inputs, None)[:3]
    lowered = jax.jit(binding.apply).lower(binding.init, x_t, t, context)
    cost = lowered.cost_analysis() or lowered.compile().cost_analysis() or {}
    return int(cost.get("flops", 0))
