"""Drawing from a trained diffusion: ancestral sampling, step by step from x_T ~ π to x_0.

`numpyro.infer.Predictive(diffusion.model, params=..., num_samples=...)` does the same through the
program. `ancestral` is for many draws: one compiled loop, kept between calls, that holds a single
level unless whole trajectories are asked for, and runs in blocks that fit memory. Blocks have keys
of their own, so several devices draw one each at the same time and never exchange anything (see
`devices`).

Source: Sohl-Dickstein et al. (2015), section 2.2.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from probdiff import bars, devices
from probdiff.arguments import check_at_least, check_flag, check_key, check_object, plain
from probdiff.diffusion import Diffusion
from probdiff.reverse import Reverse, State
from probdiff.trajectories import ReverseTrajectory
from probdiff.types import Params
from probdiff.validation import check_context_rows


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
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Any:
    """Draw x_0 from the learned reverse trajectory.

    Args:
        key: Randomness; block b uses `fold_in(key, b)`, so draws depend on `block_size`.
        diffusion: The model.
        params: Its parameters.
        num_samples: Number of draws.
        context: One context for each draw, `(num_samples, *context_shape)`.
        steps: Levels to walk, evenly spread over T; None walks them all. Fewer is faster and
            draws from another law: each longer step is one Gaussian, or one draw of every symbol
            by itself, where several would have followed each other.
        keep_trajectory: Also return the levels walked, x_1 first, on the scale of the diffusion.
        block_size: Draws made at once, by each device.
        mesh: Devices that draw a block each at the same time, on one axis; no draw depends on it.
        progress: Show a bar over the blocks.

    Returns:
        NumPy array `(num_samples, *event_shape)` in the user's units, float64 or symbols as ints;
        with `keep_trajectory` a pair of it and the trajectories, `(num_samples, T or steps,
        *event_shape)`.

    Raises:
        ValueError: if a number is out of range, parameters do not fit, contexts do not match, or
            blocks are too large to give every device of the mesh one.
        FloatingPointError: if a draw is not finite.

    Example:
        >>> x_0 = sample.ancestral(jax.random.key(0), standard_diffusion((2,), T=5), {}, 4000)
        >>> x_0.shape, bool(abs(x_0.var() - 1) < 0.1)
        ((4000, 2), True)
    """
    check_key(key)
    check_object(Diffusion, diffusion=diffusion)
    check_flag(keep_trajectory=keep_trajectory, progress=progress)
    check_at_least(1, num_samples=num_samples, block_size=block_size)
    reverse = diffusion.bind(params).respaced(steps)
    check_context_rows(context, diffusion.context_shape, num_samples)
    context = None if context is None else np.asarray(plain("context", context))
    mesh = devices.checked(mesh)
    devices.check_block_size(block_size, num_samples, "draws", mesh)
    progress = progress and devices.is_first(mesh)
    blocks = _blocks(key, num_samples, context, block_size, progress)
    drawn = devices.blockwise(
        diffusion.programs, _draw_block, reverse.relative(), blocks, mesh, keep=keep_trajectory
    )
    x_0, trajectories = zip(*drawn, strict=True)
    x_0 = reverse.plus_loc(np.concatenate(x_0))
    is_finite = np.isfinite(x_0).reshape(num_samples, -1).all(1)
    if not is_finite.all():
        raise FloatingPointError(
            f"{np.sum(~is_finite)} of {num_samples} draws are not finite: the network's output is "
            "not at some level, or too large"
        )
    return (x_0, np.concatenate(trajectories)) if keep_trajectory else x_0


def _blocks(
    key: Array, num_samples: int, context: Any, block_size: int, progress: bool
) -> Iterator[tuple[Array, np.ndarray, np.ndarray | None]]:
    """A key for each block of draws, their numbers and their contexts."""
    starts = range(0, num_samples, block_size)
    for block, start in enumerate(bars.bar(starts, desc="sample", disable=not progress)):
        numbers = np.arange(start, min(start + block_size, num_samples))
        given = None if context is None else context[start : start + block_size]
        yield jax.random.fold_in(key, block), numbers, given


def _draw_block(
    key: Array, reverse: Reverse, numbers: Array, context: Any, *, keep: bool
) -> tuple[State, State | None]:
    key_walk, key_last = jax.random.split(key)
    reverse = reverse if context is None else reverse.given(context)
    shape = () if context is not None else numbers.shape  # contexts bring the batch themselves
    x_1, trajectory = ReverseTrajectory(reverse).walk(key_walk, shape, keep=keep)
    return reverse.data(x_1).sample(key_last), trajectory
