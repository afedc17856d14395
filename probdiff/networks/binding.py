"""One face for every kind of network: initial parameters, and a pure function of parameters.

A program needs a network as `apply(params, x_t, t, context)` with `params` at a `numpyro.param`
site. Where the parameters come from differs:

    flax.nnx     the module carries them; everything else it carries must be static
    flax.linen   `module.init(key, x_t, t)` makes them
    equinox      the module is its own tree of arrays and takes one example at a time
    function     nothing to train; with its weights, `(apply, params)`, it is like a module

State that changes as the network runs (batch statistics, a dropout stream) is refused: a reverse
trajectory calls the network in a scan, where such state cannot leave the loop.

A network returns `outputs` numbers per entry of x, on a last axis `outputs` times as long: block i
of that axis is the i-th number of each entry, so that a readout splits it into equal parts.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jaxtyping import Array, PyTree
from numpyro.primitives import _PYRO_STACK

from probdiff.arguments import as_array, known, read_array, shown


class _Binding(NamedTuple):
    """A network split into what is trained and what is not, `apply(params, x_t, t, context)`."""

    init: PyTree | Callable[[Array], PyTree]
    """Initial parameters, or `init(key)` that makes them; None where nothing is trained."""
    apply: Callable[..., Array]


def output_shape(event_shape: tuple[int, ...], outputs: int) -> tuple[int, ...]:
    """Event shape with its last axis `outputs` times as long; `(outputs,)` for scalars."""
    if not event_shape:
        return () if outputs == 1 else (outputs,)
    return (*event_shape[:-1], outputs * event_shape[-1])


def example_inputs(
    event_shape: tuple[int, ...], context_shape: tuple[int, ...] | None, dtype: Any = float,
    time: Any = jnp.int32,
) -> tuple[Array, Array, Array | None]:  # fmt: skip
    """Zeros as a network is called with, two rows: x_t, t and, where there is one, context.

    `time` is float where it is told the log-SNR.
    """
    context = None if context_shape is None else jnp.zeros((2, *context_shape))
    return jnp.zeros((2, *event_shape), dtype), jnp.ones((2,), time), context


def check_signature(network: Any, inputs: tuple[Array | None, ...]) -> None:
    """Raise a `ValueError` unless a network can be called with x_t, t and, if not None, context."""
    if isinstance(network, type):
        raise ValueError(f"network must be made first; got the class {network}")
    try:
        function, *given = network if isinstance(network, tuple) else (network,)
        called = (a for a in (*given, *inputs) if a is not None)
        inspect.signature(function).bind(*called)
    except TypeError as error:
        form = (
            "network(x_t, t)"
            if inputs[-1] is None
            else "network(x_t, t, context), as there is a context_shape"
        )
        raise ValueError(f"network must be callable as {form}; {error}") from None


def check_call(network: Any, x_t: Any, t: Any, context: Any = None) -> None:
    """Raise a `ValueError` unless a built-in network is called as it was made.

    Its attributes `event_shape`, `context_size` and, where it knows log-SNRs, `takes_log_snr` say
    how.
    """
    x_t = as_array("x_t", x_t, "B", *network.event_shape)
    rows = x_t.shape[0]
    is_real = getattr(network, "takes_log_snr", False)
    t = read_array("t", t, jnp.floating if is_real else jnp.integer)
    if t.shape != (rows,):
        raise ValueError(f"t must have shape ({rows},), one for each of x_t; got {t.shape}")
    times = None if is_real else known(t)
    if times is not None and not ((times >= 1) & (times <= network.T)).all():
        raise ValueError(f"t must lie in 1..{network.T}; got {shown(t)}")
    size = getattr(network, "context_size", 0)
    if (context is None) != (size == 0):
        raise ValueError(
            f"context must be given exactly where context_size is above 0; got {shown(context)} "
            f"with context_size {size}"
        )
    if context is not None and np.size(as_array("context", context)) != rows * size:
        raise ValueError(
            f"context must hold {size} numbers for each of the {rows} rows of x_t; got shape "
            f"{np.shape(context)}"
        )


def built_in_config(network: Any) -> dict[str, Any]:
    """Arguments that rebuild a built-in network, read from its attributes of the same names."""
    names = inspect.signature(type(network).__init__).parameters
    return {name: getattr(network, name) for name in names if name not in ("self", "rngs")}


def bind(
    network: Any, event_shape: tuple[int, ...], context_shape: tuple[int, ...] | None,
    dtype: Any = float,
) -> _Binding:  # fmt: skip
    """Split any supported network; a `ValueError` if it keeps state or cannot be called."""
    if isinstance(network, nnx.Module):
        return _bind_nnx(network)
    if isinstance(network, linen.Module):
        time = float if getattr(network, "takes_log_snr", False) else jnp.int32
        return _bind_linen(network, example_inputs(event_shape, context_shape, dtype, time))
    equinox = sys.modules.get("equinox")
    if equinox is not None and isinstance(network, equinox.Module):
        return _bind_equinox(network, equinox)
    if isinstance(network, tuple) and len(network) == 2 and callable(network[0]):
        function, params = network
        _check_given(params)
        return _Binding(params, lambda values, *args: function(values, *_given(*args)))
    if callable(network):
        return _Binding(None, lambda _, *args: network(*_given(*args)))
    raise ValueError(
        "network must be callable as network(x_t, t), or a pair (apply, params); got "
        f"{type(network).__name__}"
    )


def _given(x_t: Array, t: Array, context: Array | None) -> tuple[Array, ...]:
    return (x_t, t) if context is None else (x_t, t, context)


def _check_given(weights: PyTree) -> None:
    """Refuse weights that a program draws or computes, where initial values are meant."""
    is_in_program = bool(_PYRO_STACK)
    if is_in_program and any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(weights)):
        raise ValueError(
            "network must come with the values its weights start from, which are trained; got "
            "weights that a program computes. Make it outside of the program; where its weights "
            "have a prior, pass a function that closes over them, lambda x_t, t: network(x_t, t), "
            "which has nothing to train, or give them to diffusion.prior as params"
        )


def _check_stateless(kind: str, network: nnx.Module | linen.Module, kept: set[str]) -> None:
    if kept:
        raise ValueError(
            f"network must be stateless; got the {kind} module {type(network).__name__} that keeps "
            f"{', '.join(sorted(kept))}. The reverse trajectory calls it inside a scan: use "
            "LayerNorm, GroupNorm or RMSNorm, and no dropout or batch statistics"
        )


def _bind_nnx(network: nnx.Module) -> _Binding:
    graph, params, rest = nnx.split(network, nnx.Param, ...)
    _check_given(nnx.to_pure_dict(params))
    _check_stateless("nnx", network, {type(leaf).__name__ for _, leaf in nnx.to_flat_state(rest)})

    def apply(values: PyTree, *args: Array | None) -> Array:
        state = jax.tree.map(lambda leaf: leaf, params)  # a copy: replacing works in place
        nnx.replace_by_pure_dict(state, values)
        return nnx.merge(graph, state)(*_given(*args))

    return _Binding(nnx.to_pure_dict(params), apply)


def _bind_linen(network: linen.Module, example: tuple[Array | None, ...]) -> _Binding:
    inputs = _given(*example)
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    _check_stateless("linen", network, set(shapes) - {"params"})

    def apply(values: PyTree, *args: Array | None) -> Array:
        return network.apply({"params": values}, *_given(*args))

    return _Binding(lambda key: network.init(key, *inputs)["params"], apply)


def _bind_equinox(network: Any, equinox: Any) -> _Binding:
    values, static = equinox.partition(network, equinox.is_inexact_array)
    _check_given(values)

    def apply(values: PyTree, *args: Array | None) -> Array:
        return jax.vmap(equinox.combine(values, static))(*_given(*args))

    return _Binding(lambda _: values, apply)  # a bare module is callable: it would pass for an init
