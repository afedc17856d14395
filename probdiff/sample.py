"""Drawing from a trained diffusion: ancestral sampling, step by step from x_T ~ π to x_0.

`numpyro.infer.Predictive(diffusion.model, params=..., num_samples=...)` does the same through the
program. `ancestral` is for many draws: one compiled loop, kept between calls, that holds a single
level of the chain unless trajectories are asked for, and runs in blocks that fit memory.

Source: Sohl-Dickstein et al. (2015), section 2.2.
"""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from probdiff.diffusion import Diffusion
from probdiff.types import Params


def ancestral(
    key: Array,
    diffusion: Diffusion,
    params: Params,
    num_samples: int,
    *,
    context: Any = None,
    steps: int | None = None,
    keep_trajectory: bool = False,
    block_size: int = 4096,
    progress: bool = False,
) -> Any:
    """Draw x_0 from the learned reverse chain.

    Args:
        key: Randomness; block b uses `fold_in(key, b)`, so draws depend on `block_size`.
        diffusion: The model.
        params: Its parameters.
        num_samples: Number of draws.
        context: One context for each draw, `(num_samples, *context_shape)`.
        steps: Levels to walk, evenly spread over T; None walks them all. Fewer is faster and
            draws from another law: each longer step is one Gaussian, or one draw of every symbol
            by itself, where several would have followed each other.
        keep_trajectory: Also return the levels walked, x_1 first, on the scale of the chain.
        block_size: Draws made at once.
        progress: Show a bar over the blocks.

    Returns:
        NumPy array `(num_samples, *event_shape)` in the user's units; with `keep_trajectory` a
        pair of it and the trajectories, `(num_samples, T or steps, *event_shape)`.

    Raises:
        ValueError: if a number is out of range, parameters do not fit, or contexts do not match.
    """
    for argument, value in {"num_samples": num_samples, "block_size": block_size}.items():
        if value < 1:
            raise ValueError(f"{argument} must be at least 1; got {value}")
    if steps is not None and not 2 <= steps <= diffusion.T:
        raise ValueError(f"steps must lie in 2..T = {diffusion.T}; got {steps}")
    diffusion.check_params(params)
    diffusion.check_context_rows(context, num_samples)
    draws, trajectories = [], []
    starts = range(0, num_samples, block_size)
    for block, start in enumerate(tqdm(starts, desc="sample", disable=not progress)):
        size = min(block_size, num_samples - start)
        rows = None if context is None else context[start : start + size]
        out = _draw_block(
            jax.random.fold_in(key, block), params, rows, diffusion, size, steps, keep_trajectory
        )
        draws.append(np.asarray(out[0]))
        trajectories.append(None if out[1] is None else np.asarray(out[1]))
    x_0 = np.concatenate(draws)
    return (x_0, np.concatenate(trajectories)) if keep_trajectory else x_0


@functools.partial(jax.jit, static_argnames=("diffusion", "size", "steps", "keep_trajectory"))
def _draw_block(
    key: Array,
    params: Params,
    context: Any,
    diffusion: Diffusion,
    size: int,
    steps: int | None,
    keep_trajectory: bool,
) -> tuple[Any, Any]:
    key_chain, key_last = jax.random.split(key)
    reverse, _ = diffusion.bind(params, context=context)
    shape = () if context is not None else (size,)  # contexts bring the batch themselves
    x_1, trajectory = reverse.walk(key_chain, shape, num_steps=steps, keep=keep_trajectory)
    return diffusion.data_given_first(reverse, x_1).sample(key_last), trajectory
