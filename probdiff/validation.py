"""Checks of what a user hands in: each raises a `ValueError` with name, expectation and value.

NumPyro and JAX accept a missing plate, data that broadcast, missing weights or a NaN without a
word, and inside `jit` values cannot be looked at. So all that can be known is checked before
tracing: shapes and dtypes always, values where they are concrete.
"""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probdiff import readouts
from probdiff.arguments import as_array, plain, plain_arrays, read_array, shape_text
from probdiff.kernels import AbsorbingKernel, BernoulliKernel, DiscreteKernel, Kernel

_ROOM = 1e4
"""Between what a number may be and the least and the largest of its type."""
_COARSEST = 1e-3
"""Share of scale by which numbers of a float type may be apart: their rounding is then unseen."""
_MOST_COLUMNS = 3
"""Columns named in a warning."""


def check_units(
    kernel: Kernel, event_shape: tuple[int, ...], loc: Any, scale: Any
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """loc and scale in float64; None for symbols, which have no units."""
    if isinstance(kernel, DiscreteKernel):
        if np.any(np.asarray(loc) != 0) or np.any(np.asarray(scale) != 1):
            raise ValueError(f"loc and scale must be 0 and 1 for symbols; got {loc}, {scale}")
        if isinstance(kernel, BernoulliKernel) and not _fits(kernel.rate, event_shape):
            raise ValueError(
                f"rate must be a number or broadcastable to event_shape {event_shape}; got shape "
                f"{np.shape(kernel.rate)}"
            )
        return None, None
    given = {"loc": loc, "scale": scale}
    units = {n: np.array(as_array(n, v), np.float64) for n, v in given.items()}
    for argument, value in units.items():
        if not _fits(value, event_shape):
            raise ValueError(
                f"{argument} must be broadcastable to event_shape {event_shape}; "
                f"got shape {value.shape}"
            )
        if not np.isfinite(value).all():
            raise ValueError(f"{argument} must be finite; got {value}")
    if not np.all(units["scale"] > 0):
        raise ValueError(f"scale must be positive; got {scale}")
    _check_magnitude(kernel.dtype, **units)
    return units["loc"], units["scale"]


def _check_magnitude(dtype: Any, loc: np.ndarray, scale: np.ndarray) -> None:
    """Units in which numbers have room above and below: noise is far smaller than the data."""
    limits = np.finfo(dtype)
    least, most = _ROOM * float(limits.tiny), float(limits.max) / _ROOM
    if scale.min() < least or scale.max() > most:
        far = scale.min() if scale.min() < least else scale.max()
        raise ValueError(
            f"scale must lie between {least:.2g} and {most:.2g} in {limits.dtype}; got {far}: "
            "measure x_0 in other units"
        )
    if np.abs(loc).max() > most:
        raise ValueError(
            f"loc must be at most {most:.2g} in {limits.dtype}; got {np.abs(loc).max()}: "
            "measure x_0 in other units"
        )


def check_rates(rates: np.ndarray) -> None:
    """The rates, and the variances made of them, are numbers that JAX's float type can hold."""
    limits = np.finfo(jnp.result_type(float))
    least = _ROOM * float(limits.tiny)
    if rates.min() < least:
        t = int(rates.argmin()) + 1
        raise ValueError(
            f"beta must be at least {least:.2g} in {limits.dtype}; got {rates[t - 1]} at t = {t}"
        )
    noise_s = -np.expm1(np.cumsum(np.log1p(-rates[:-1])))
    product = rates[1:] * noise_s  # in the variance of the bridge, β_t (1 − ᾱ_s)/(1 − ᾱ_t)
    if product.min() < least:
        t = int(product.argmin()) + 2
        raise ValueError(
            f"beta_t (1 - alpha_bar_s), s = t - 1, must be at least {least:.2g} in {limits.dtype}; "
            f"got {product[t - 2]:.3g} at t = {t}, where beta_t = {rates[t - 1]:.3g}"
        )


def check_schedule(
    kernel: Kernel, readout: Any, last_step: Any, rates: np.ndarray, *, is_learned: bool
) -> None:
    """What a readout or a diffusion of symbols asks of the rates and the last step."""
    if readout.needs_signal and rates[-1] == 1:
        raise ValueError(
            f"beta_T must be below 1 for readout {type(readout).__name__}, which divides by "
            "sqrt(alpha_bar_T); got 1. Use Data, Velocity or Perturbation"
        )
    if isinstance(kernel, DiscreteKernel) and is_learned:
        text = "beta must be fixed for symbols, which cannot be differentiated by it"
        raise ValueError(f"{text}; got a learned schedule")
    if isinstance(kernel, DiscreteKernel) and last_step.grid is not None:
        raise ValueError(
            "last_step must be Tied() or Learned() for symbols, which lie on no grid; got "
            f"{last_step}"
        )
    if not isinstance(kernel, AbsorbingKernel):
        return
    if isinstance(last_step, readouts.Tied):
        raise ValueError(
            "last_step must be Learned() for AbsorbingKernel, whose stationary law has no mass on "
            "data; got Tied()"
        )
    if rates[-1] != 1:
        raise ValueError(
            "beta_T must be 1 for AbsorbingKernel, or data would not all be absorbed; "
            f"got {rates[-1]}. Use schedules.harmonic"
        )


def check_grid(grid: readouts.Grid | None, event_shape: tuple[int, ...]) -> None:
    """Grids by entry broadcast to the event."""
    if grid is not None and not _fits(grid.is_on, event_shape):
        raise ValueError(
            "last_step must have low, high and levels broadcastable to event_shape "
            f"{event_shape}; got shape {grid.is_on.shape}"
        )


def check_data(
    kernel: Kernel, event_shape: tuple[int, ...], x_0: Any, mask: Any, argument: str = "x_0", *,
    grid: readouts.Grid | None = None,
) -> None:  # fmt: skip
    """Shape and dtype of data and mask; their values where they are concrete."""
    x_0 = read_array(argument, x_0, jnp.number, jnp.bool_)
    mask = None if mask is None else read_array("mask", mask, jnp.number, jnp.bool_)
    shape, dim = np.shape(x_0), len(event_shape)
    if len(shape) < dim or shape[len(shape) - dim :] != event_shape:
        expected = shape_text("...", event_shape)
        raise ValueError(f"{argument} must have shape {expected}; got {shape}")
    is_of_numbers = not isinstance(kernel, DiscreteKernel)
    if is_of_numbers and not jnp.issubdtype(x_0.dtype, jnp.floating):
        raise ValueError(
            f"{argument} must be of a floating dtype; got {x_0.dtype}: pass "
            f"{argument}.astype(numpy.float64)"
        )
    if mask is not None and np.shape(mask) != shape:
        raise ValueError(f"mask must have the shape of {argument}, {shape}; got {np.shape(mask)}")
    if mask is not None and mask.dtype != bool:
        raise ValueError(f"mask must be boolean; got dtype {mask.dtype}")
    is_data = mask is not None and argument == "x_0" and _is_concrete(mask)
    if is_data and not np.asarray(mask).any():
        warnings.warn(
            "mask is False throughout: nothing of x_0 is observed, and its bound is 0. It must be "
            "True where x_0 is observed",
            stacklevel=4,
        )
    if not _is_concrete(x_0, mask):
        return
    kernel.check_values(_observed(x_0, mask), argument)
    if grid is not None:
        seen = np.asarray(x_0) if mask is None else np.where(mask, x_0, np.asarray(grid.low))
        grid.check_values(seen, argument)


def check_variance(
    event_shape: tuple[int, ...], variance: Any, argument: str = "variance"
) -> np.ndarray:
    """A positive variance that broadcasts to the event, or a covariance of its d numbers."""
    given = 1.0 if variance is None else as_array(argument, variance)
    value = np.asarray(given, np.float64)
    d, is_matrix = math.prod(event_shape), is_covariance(event_shape, value)
    if not (is_matrix or _fits(value, event_shape)):
        raise ValueError(
            f"{argument} must be broadcastable to event_shape {event_shape} or a covariance of "
            f"shape {(d, d)}; got shape {value.shape}"
        )
    is_finite = np.isfinite(value).all()
    if not is_matrix and not (is_finite and (value > 0).all()):
        raise ValueError(f"{argument} must be positive and finite; got {variance}")
    if is_matrix and not (is_finite and np.allclose(value, value.T)):
        asymmetry = np.max(np.abs(value - value.T))
        raise ValueError(
            f"{argument} must be a symmetric, finite covariance; got one that differs from its "
            f"transpose by {asymmetry:.3g}"
        )
    return value


def is_covariance(event_shape: tuple[int, ...], variance: np.ndarray) -> bool:
    """Whether it is a covariance of an event's d numbers, not a variance of each."""
    d = math.prod(event_shape)
    return variance.shape == (d, d) and not _fits(variance, event_shape)


def warn_about_precision(
    loc: Any, scale: Any, event_shape: tuple[int, ...], dtype: Any, stacklevel: int
) -> None:
    """Warn by column where numbers near loc are further apart than 1e-3 of scale."""
    if not isinstance(loc, np.ndarray):  # symbols have none, and of a traced one nothing is known
        return
    dtype = jnp.dtype(dtype)
    spacing = np.ldexp(float(jnp.finfo(dtype).eps), np.frexp(np.abs(loc))[1] - 1)
    coarse = np.broadcast_to((loc != 0) & (spacing > _COARSEST * scale), event_shape)
    if not coarse.any():
        return
    places = [tuple(map(int, place)) for place in np.argwhere(coarse)]
    texts = []
    for place in places[:_MOST_COLUMNS]:
        at, apart, width = (
            float(np.broadcast_to(a, event_shape)[place]) for a in (loc, spacing, scale)
        )
        column = f"column {place[0]}" if len(place) == 1 else f"entry {place}"
        texts.append(
            f"{f'in {column}: ' if place else ''}{dtype} numbers near the loc of {at:.9g} are "
            f"{apart:.3g} apart, with a scale of {width:.3g}"
        )
    if len(places) > _MOST_COLUMNS:
        texts.append(f"and so in {len(places) - _MOST_COLUMNS} more")
    warnings.warn(
        f"x_0 is held too coarsely, in steps above 1e-3 of scale; {'; '.join(texts)}. Densities "
        "and draws are off by as much. Give data to fit and diagnostics as NumPy's float64; in a "
        "program of your own use a Diffusion with loc=0, whose parameters are the same, and give "
        "it observations less loc, or switch x64 on by "
        'jax.config.update("jax_enable_x64", True)',
        stacklevel=stacklevel,
    )


def check_context(context: Any, context_shape: tuple[int, ...] | None) -> None:
    """Context is given exactly where it is expected, with the expected shape."""
    if (context is None) != (context_shape is None):
        given = "None" if context is None else np.shape(context)
        raise ValueError(
            f"context must be given exactly where context_shape is; got context {given} with "
            f"context_shape {context_shape}"
        )
    if context is None:
        return
    plain("context", context)
    shape, dim = np.shape(context), len(context_shape)
    if len(shape) < dim or shape[len(shape) - dim :] != context_shape:
        raise ValueError(f"context must have shape {shape_text('...', context_shape)}; got {shape}")


def check_context_rows(context: Any, context_shape: tuple[int, ...] | None, rows: int) -> None:
    """There is one context for each of so many rows, or none where none is expected."""
    check_context(context, context_shape)
    if context is not None and np.shape(context) != (rows, *context_shape):
        raise ValueError(
            f"context must have {rows} rows, shape {(rows, *context_shape)}; "
            f"got shape {np.shape(context)}"
        )


def check_batch_shape(
    x_0: Any, x_1: Any, event_shape: tuple[int, ...], *, argument: str = "x_0"
) -> None:
    """x_0 has the batch shape that the plates gave to x_1."""
    if np.shape(x_0) != x_1.shape:
        batch_shape = x_1.shape[: x_1.ndim - len(event_shape)]
        raise ValueError(
            f"{argument} must have the batch shape of the plates around it, {batch_shape}; got "
            f"shape {np.shape(x_0)} with event_shape {event_shape}. Open a numpyro.plate "
            "for each batch axis"
        )


TAKEN = {"chain", "draw", "example", "level", "log_r", "projection", "step", "t"}
"""Names that DataTrees give to dims, coordinates and variables of their own."""


def check_name(name: str) -> None:
    """A name that no DataTree would lose."""
    if not isinstance(name, str) or not name or name in TAKEN or "/" in name:
        raise ValueError(
            f"name must be a string other than {sorted(TAKEN)}, which DataTrees give to dims and "
            f"variables of their own, and without /; got {name!r}"
        )


def check_params(template: Any, params: Any, name: str) -> None:
    """Parameters are those of the template: names, tree and shapes; no array is masked."""
    if not isinstance(params, dict):
        raise ValueError(f"params must be a dict by site name; got {type(params).__name__}")
    plain_arrays("params", params)
    expected, given = leaves_by_path(template), leaves_by_path(params)
    missing = sorted(expected.keys() - given.keys())
    unknown = sorted(given.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"params must hold exactly the parameters of {name!r}; "
            f"missing: {missing or 'none'}, unknown: {unknown or 'none'}"
        )
    for path, leaf in expected.items():
        if (shape := np.shape(given[path])) != leaf.shape:
            raise ValueError(f"params{path} must have shape {leaf.shape}; got {shape}")
        if (count := _count_not_finite(given[path])) > 0:
            raise ValueError(f"params{path} must be finite; got {count} numbers that are not")


def check_weights(site: str, shapes: Any, weights: Any) -> None:
    """What a handler gives for a network's weights is a tree of the same shapes."""
    if jax.tree.map(np.shape, weights) != shapes:
        what = "a tree of others" if isinstance(weights, dict) else f"{type(weights).__name__}"
        raise ValueError(
            f"param {site!r} must be a tree of the shapes of the network's weights; got {what}. "
            "handlers.lift would draw one array: draw the weights before, by "
            "random_nnx_module, and pass a function that closes over them as the network"
        )


def _count_not_finite(leaf: Any) -> int:
    """How many numbers are not finite; 0 where they cannot be seen."""
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array | np.ndarray | float):
        return 0
    is_here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    if not (is_here and jnp.issubdtype(getattr(leaf, "dtype", float), jnp.inexact)):
        return 0
    xp = jnp if isinstance(leaf, jax.Array) else np
    return int(xp.sum(~xp.isfinite(leaf)))


def _fits(value: Any, event_shape: tuple[int, ...]) -> bool:
    """Whether a value broadcasts to the event, not the event to it."""
    try:
        return np.broadcast_shapes(np.shape(value), event_shape) == event_shape
    except ValueError:
        return False


def _is_concrete(*arrays: Any) -> bool:
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def _observed(x: Any, mask: Any) -> np.ndarray:
    values = np.asarray(x)
    return values if mask is None else values[np.asarray(mask)]


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Leaves by their path, as text."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
