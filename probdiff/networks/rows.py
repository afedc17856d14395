"""Whether a network takes every row by itself.

A row of a network's input is one x_t. Its output must depend on that row alone: else K of an
example, and a draw, would hang on the company it is in, and on the size of blocks. Normalising or
attending over axis 0 breaks this.

It is tried where no number has been printed yet: the first of three rows stays as it is, the others
change, and the first row of the output must not move. Weights are random, N(0, 1/inputs), for a
last layer that begins at 0 would hide what comes before it. What is compiled is compiled fast and
dropped; a network whose code has been tried is not tried again.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jaxtyping import Array, PyTree

from probdiff.compilation import Traced, trace

_ROWS = 3
_MOVED = 1e-3  # of the output's size: more than rounding
_SCALES = (1.0, 0.1)  # of weights and numbers, the second where the first give no number
_KEPT = 256
_tried: dict[int, float] = {}


def is_by_row(network: Any) -> bool:
    """Whether a network needs no try: ours, and one that is given a row at a time, do not."""
    equinox = sys.modules.get("equinox")
    is_mapped = equinox is not None and isinstance(network, equinox.Module)
    return is_mapped or type(network).__module__.startswith("probdiff.")


def coupling(
    apply: Callable[..., Array], template: PyTree, event_shape: tuple[int, ...],
    context_shape: tuple[int, ...] | None, T: int, states: int | None,
) -> float:  # fmt: skip
    """How far a row's output moves with the other rows, as a share of its size; 0 where it stays.

    Args:
        apply: `apply(weights, x_t, t, context)`.
        template: Shapes of the weights.
        event_shape: Shape of one x_t.
        context_shape: Shape of one context, or None.
        T: Number of steps.
        states: Number of values of a symbol; None for numbers.
    """
    if any(jnp.issubdtype(a.dtype, jax.dtypes.extended) for a in jax.tree.leaves(template)):
        return 0.0  # random keys, of which there are no other values to try
    rng = np.random.default_rng(0)

    def inputs() -> list[np.ndarray | None]:
        shape = (_ROWS, *event_shape)
        is_number = states is None
        x = rng.standard_normal(shape) if is_number else rng.integers(0, states, shape)
        context = None
        if context_shape is not None:
            context = rng.standard_normal((_ROWS, *context_shape)).astype(jnp.result_type(float))
        x = x.astype(jnp.result_type(float) if is_number else np.int32)
        return [x, rng.integers(1, T + 1, _ROWS).astype(np.int32), context]

    first, other = inputs(), inputs()
    first[1][1:], other[1][1:] = 1, T
    traced = trace(apply, template, *first)
    is_known = not any(isinstance(const, jax.core.Tracer) for const in traced.consts)
    if not is_known or not _reads_inputs(traced, len(jax.tree.leaves(template))):
        return 0.0
    key = hash(traced.fingerprint())  # the code itself would be kept alive
    if key not in _tried:
        if len(_tried) >= _KEPT:
            _tried.clear()
        _tried[key] = _move(traced, template, first, other, rng)
    return _tried[key]


def _move(
    traced: Traced, template: PyTree, first: list, other: list, rng: np.random.Generator
) -> float:
    with jax.ensure_compile_time_eval():
        compiled = None
        for scale in _SCALES:
            weights = jax.tree.map(lambda leaf, scale=scale: _random(rng, leaf, scale), template)
            if compiled is None:
                lowered = jax.jit(lambda *args: traced(*args)).lower(weights, *first)
                compiled = lowered.compile({"xla_backend_optimization_level": 0})
            near = [_scaled(a, scale) for a in first]
            far = [None if a is None else np.concatenate([a[:1], b[1:]])
                   for a, b in zip(near, other, strict=True)]  # fmt: skip
            before, after = (
                np.asarray(compiled(weights, *rows)[0], np.float64) for rows in (near, far)
            )
            if np.isfinite(before).all():
                moved = float(np.max(np.abs(after - before)))
                size = max(float(np.max(np.abs(before))), np.finfo(np.float32).tiny)
                moved = moved / size if np.isfinite(moved) else np.inf
                return moved if moved > _MOVED else 0.0
    return 0.0


def _scaled(a: np.ndarray | None, scale: float) -> np.ndarray | None:
    return a if a is None or a.dtype.kind != "f" else np.asarray(a * a.dtype.type(scale))


def _random(rng: np.random.Generator, leaf: Any, scale: float) -> np.ndarray:
    """Weights whose sums over their inputs are of order one."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return np.zeros(leaf.shape, leaf.dtype)
    inputs = max(1, int(np.prod(leaf.shape[:-1])))
    return np.asarray(scale / np.sqrt(inputs) * rng.standard_normal(leaf.shape), leaf.dtype)


def _reads_inputs(traced: Traced, weights: int) -> bool:
    """Whether the output can depend on what follows the weights among the inputs."""
    jaxpr = traced.code.jaxpr
    reached = set(jaxpr.invars[weights:])
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, core.Literal) and v in reached for v in eqn.invars):
            reached.update(eqn.outvars)
    return any(not isinstance(v, core.Literal) and v in reached for v in jaxpr.outvars)
