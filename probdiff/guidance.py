"""Classifier-free guidance: the reverse process pushed towards a context, by a weight.

A network that was trained with its context left out in a share of the examples says both laws, and

    output = output(x_t, no context) + w · (output(x_t, context) − output(x_t, no context))

goes on beyond them: w = 0 is the process without context, w = 1 the conditional one, w > 1
extrapolates the denoised point of numbers (the variance stays the conditional one's), and of
symbols log p(x_0 | x_t), which is normalised anew.

Only w of 0 and 1 are laws that were learned. Above 1 the draws are those of no conditional: they
keep away from what other contexts would explain as well, and vary less. To condition on a label
exactly, observe it in a program below `prior()`, by a classifier's probabilities; `infer` then says
the evidence too.

Source: Ho and Salimans (2022), eq. 6, where the weight is w − 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from probdiff.arguments import FINITE, SHARE, as_array, check_key, check_number, check_object
from probdiff.diffusion import Diffusion
from probdiff.kernels import DiscreteKernel
from probdiff.readouts import Denoiser, DiscreteReadout
from probdiff.types import Params


def flagged(context: Any, *, key: Array | None = None, share: float = 0.0) -> np.ndarray:
    """Contexts with a last entry 1, which says that they are there; a share left out, all zeros.

    The flag is there because 0 may be a context.

    Args:
        context: `(N, c)`, finite.
        key: Randomness, where a share is left out.
        share: Probability in [0, 1] that a row is left out, 0.1 to 0.2 in practice.

    Returns:
        NumPy array `(N, c + 1)`, for a diffusion of `context_shape=(c + 1,)`.

    Raises:
        ValueError: if context has another shape, or a share is left out without a key.

    Example:
        >>> guidance.flagged(np.array([[0.0, 1.0], [3.0, 2.0]])).tolist()
        [[0.0, 1.0, 1.0], [3.0, 2.0, 1.0]]
    """
    check_number(SHARE, share=share)
    context = np.asarray(as_array("context", context))
    if context.ndim != 2:
        raise ValueError(f"context must have shape (N, c); got {context.shape}")
    rows = np.concatenate([context, np.ones((len(context), 1), context.dtype)], 1)
    if share == 0:
        return rows
    if key is None:
        raise ValueError(f"key must be given where a share is left out; got share={share}")
    check_key(key)
    is_there = np.asarray(jax.random.uniform(key, (len(rows), 1))) >= share
    return np.where(is_there, rows, np.zeros_like(rows))


def guided(diffusion: Diffusion, params: Params, weight: float) -> Diffusion:
    """The diffusion of the weighted outputs, its context without the flag, nothing to train.

    Args:
        diffusion: One that was trained with contexts of `flagged`, `context_shape=(c + 1,)`.
        params: Its parameters.
        weight: w, finite: 0 without context, 1 conditional, above 1 beyond.

    Returns:
        A `Diffusion` of `context_shape=(c,)` whose parameters are `{}`; a call of its network is
        one of the trained network with twice as many rows.

    Raises:
        ValueError: if the diffusion has no such context, or a readout of no one point or law.

    Example:
        >>> def network(x_t, t, context):  # x_0 is near 3 with the context, else near 0
        ...     return 3.0 * context[:, :1] * context[:, 1:] + 0 * x_t
        >>> diffusion = Diffusion(
        ...     GaussianKernel(), schedules.cosine(5), network, event_shape=(1,),
        ...     readout=readouts.Data(readouts.BridgeVariance()), context_shape=(2,),
        ... )
        >>> beyond = guidance.guided(diffusion, {}, 1.5)
        >>> beyond.context_shape
        (1,)
        >>> reverse = beyond.bind({}).given(jnp.ones((1, 1)))
        >>> float(reverse.x_0_hat(jnp.zeros((1, 1)), 3)[0, 0])
        4.5
    """
    check_object(Diffusion, diffusion=diffusion)
    check_number(FINITE, weight=weight)
    weight = float(weight)
    shape = diffusion.context_shape
    if shape is None or len(shape) != 1 or shape[0] < 2:
        raise ValueError(
            f"diffusion must have a context of shape (c + 1,), as flagged makes it; got {shape}"
        )
    if not isinstance(diffusion.readout, Denoiser | DiscreteReadout):
        raise ValueError(
            "diffusion must have a readout whose first output is a point, or a law of symbols: "
            f"there is no weighing the parts of {diffusion.readout}"
        )
    reverse = diffusion.bind(params)
    is_discrete = isinstance(diffusion.kernel, DiscreteKernel)
    size = diffusion.event_shape[-1] if diffusion.event_shape else 1

    def network(x_t: Array, t: Array, context: Array) -> Array:
        there = jnp.concatenate([context, jnp.ones((len(context), 1), context.dtype)], -1)
        twice = [jnp.concatenate([a, a]) for a in (x_t, t)]
        both = reverse.network(*twice, jnp.concatenate([there, jnp.zeros_like(there)]))
        given, without = jnp.split(both, 2)
        beyond = without + weight * (given - without)
        if is_discrete or beyond.shape[-1] == size or beyond.ndim == 1:
            return beyond
        return jnp.concatenate([beyond[..., :size], given[..., size:]], -1)  # the variance stays

    return Diffusion(
        diffusion.kernel, np.asarray(reverse.trained.beta), network,
        event_shape=diffusion.event_shape, readout=diffusion.readout,
        last_step=diffusion.last_step, loc=0.0 if diffusion.loc is None else diffusion.loc,
        scale=1.0 if diffusion.scale is None else diffusion.scale,
        data_variance=diffusion.data_variance, context_shape=(shape[0] - 1,), name=diffusion.name,
    )  # fmt: skip
