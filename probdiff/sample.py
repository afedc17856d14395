"""Drawing from a trained diffusion: `ancestral`, from x_T ~ π step by step, or `draw` by a sampler.

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
from probdiff.samplers import Sampler
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
    check_flag(keep_trajectory=keep_trajectory)
    _check(key, diffusion, num_samples, context, block_size)
    reverse = diffusion.bind(params).respaced(steps)
    inputs = diffusion, reverse, num_samples, context, block_size, mesh, progress
    x_0, *trajectories = _drawn(key, _draw_block, *inputs, keep=keep_trajectory)
    return (x_0, *trajectories) if keep_trajectory else x_0


def draw(
    key: Array, diffusion: Diffusion, params: Params, num_samples: int, sampler: Sampler, *,
    context: Any = None, block_size: int = 4096, mesh: Mesh | None = None, progress: bool = False,
) -> np.ndarray:  # fmt: skip
    """Draw x_0 of numbers by a sampler of few network calls; see `samplers` for their laws.

    Args:
        sampler: `samplers.DDIM(n)`, `samplers.DPMSolver(n)` or `samplers.Heun(n)`.
        key, diffusion, params, num_samples, context, block_size, mesh, progress: As in `ancestral`.

    Returns:
        NumPy array `(num_samples, *event_shape)` in the user's units, float64.

    Raises:
        ValueError, FloatingPointError: as in `ancestral`; if x_0 are symbols.

    Example:
        >>> diffusion = standard_diffusion((2,), T=100)
        >>> x_0 = sample.draw(jax.random.key(0), diffusion, {}, 4000, samplers.DPMSolver(10))
        >>> x_0.shape, bool(abs(x_0.var() - 1) < 0.1)
        ((4000, 2), True)
    """
    check_object(Sampler, "one such as samplers.DPMSolver(20)", sampler=sampler)
    _check(key, diffusion, num_samples, context, block_size)
    if diffusion.kernel.is_discrete:
        raise ValueError(
            f"sampler must not be given for symbols, which have no x_0 between them; use "
            f"sample.ancestral with steps; got {sampler} for {diffusion.kernel}"
        )
    reverse = diffusion.bind(params)
    inputs = diffusion, reverse, num_samples, context, block_size, mesh, progress
    times = tuple(sampler.times(reverse).tolist())
    return _drawn(key, _solve_block, *inputs, sampler=sampler, times=times)[0]


def _check(key: Any, diffusion: Any, num_samples: Any, context: Any, block_size: Any) -> None:
    check_key(key)
    check_object(Diffusion, diffusion=diffusion)
    check_at_least(1, num_samples=num_samples, block_size=block_size)
    check_context_rows(context, diffusion.context_shape, num_samples)


def _drawn(
    key: Array, function: Any, diffusion: Diffusion, reverse: Reverse, num_samples: int,
    context: Any, block_size: int, mesh: Mesh | None, progress: bool, **options: Any,
) -> list[np.ndarray]:  # fmt: skip
    """What a function of blocks draws, x_0 first and in the user's units."""
    check_flag(progress=progress)
    context = None if context is None else np.asarray(plain("context", context))
    mesh = devices.checked(mesh)
    devices.check_block_size(block_size, num_samples, "draws", mesh)
    progress = progress and devices.is_first(mesh)
    blocks = _blocks(key, num_samples, context, block_size, progress)
    drawn = devices.blockwise(
        diffusion.programs, function, reverse.relative(), blocks, mesh, **options
    )
    x_0, *rest = (np.concatenate(part) for part in zip(*drawn, strict=True) if part[0] is not None)
    x_0 = reverse.plus_loc(x_0)
    is_finite = np.isfinite(x_0).reshape(num_samples, -1).all(1)
    if not is_finite.all():
        raise FloatingPointError(
            f"{np.sum(~is_finite)} of {num_samples} draws are not finite: the network's output is "
            "not at some level, or too large"
        )
    return [x_0, *rest]


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


def _solve_block(
    key: Array, reverse: Reverse, numbers: Array, context: Any, *, sampler: Sampler,
    times: tuple[int, ...],
) -> tuple[State]:  # fmt: skip
    reverse = reverse if context is None else reverse.given(context)
    return (sampler(key, reverse, np.array(times), numbers.shape),)
