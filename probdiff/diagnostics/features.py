"""Features: what a layer of the denoiser says of data at a level of noise.

    h(x_0; t) = activations of a layer at (x_t, t),    x_t ~ q(x_t | x_0)

A denoiser has to know what it looks at, so its hidden layers are a code of x_0 that nobody trained:
the rival that every learned code is to be measured against. Which layer and which t serve best is
found on validation data, by a grid over both.

Source: Xiang et al. (2023), Denoising diffusion autoencoders are unified self-supervised learners.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from probdiff.arguments import check_at_least, check_key, check_object, check_text, shown
from probdiff.diagnostics.bounds import check_examples, relative_rows
from probdiff.diffusion import Data, Diffusion, Mask
from probdiff.reverse import Reverse
from probdiff.trajectories import ForwardTrajectory
from probdiff.types import Params


def features(
    key: Array, diffusion: Diffusion, params: Params, x_0: Data, *, layer: str, t: int,
    context: Any = None, mask: Mask | None = None, num_draws: int = 1, block_size: int = 4096,
) -> Float[np.ndarray, "N ..."]:  # fmt: skip
    """Activations of one layer of the network at level t, averaged over draws of x_t.

    Args:
        key: Randomness of x_t; block b of examples uses `fold_in(key, b)`.
        diffusion: Its network must be a flax.nnx module.
        params: Its parameters.
        x_0: Examples in the user's units, `(N, *event_shape)`.
        layer: Path of the layer in the network, as in `networks.summary`: `layers/1` of a
            `Perceptron`, `trunk/1` of a `SharedHead`, `bottom/0` of a `UNet`. What it returns is
            taken, before a non-linearity that is no layer of its own.
        t: Level, in 1..T.
        context: One context per example, `(N, *context_shape)`.
        mask: True where x_0 is observed; the network sees noise in place of the rest.
        num_draws: Draws of x_t per example.
        block_size: Examples handled at once.

    Returns:
        Activations `(N, ...)`, whatever shape the layer has.

    Raises:
        ValueError: if arguments do not fit, the network is no nnx module, or it has no such layer,
            calls it more than once, or returns no array there with a row for each example.

    Example:
        >>> network = networks.Perceptron((2,), width=8, depth=2, T=10, rngs=nnx.Rngs(0))
        >>> diffusion = Diffusion(GaussianKernel(), schedules.cosine(10), network, event_shape=(2,))
        >>> svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), SampledTimeELBO())
        >>> x = jax.random.normal(jax.random.key(0), (100, 2))
        >>> params = svi.get_params(svi.init(jax.random.key(1), x))
        >>> key = jax.random.key(2)
        >>> diagnostics.features(key, diffusion, params, x, layer="layers/1", t=3).shape
        (100, 8)
    """
    check_key(key)
    check_text(layer=layer)
    check_examples(
        diffusion, params, x_0, context, mask, num_draws=num_draws, block_size=block_size
    )
    check_at_least(1, t=t)
    if t > diffusion.T:
        raise ValueError(f"t must lie in 1..{diffusion.T}; got {t}")
    check_object(nnx.Module, "a flax.nnx module", network=diffusion.network)
    _check_layer(diffusion.network, layer)
    reverse, rows_of = relative_rows(diffusion, params, x_0, context, mask)
    graph, weights = nnx.split(diffusion.network)
    nnx.replace_by_pure_dict(weights, params[f"{diffusion.name}_network$params"])
    found, static = [], {"graph": graph, "layer": layer, "num_draws": num_draws}
    for block, start in enumerate(range(0, len(x_0), block_size)):
        given = (None if a is None else a[start : start + block_size] for a in rows_of)
        inputs = jax.random.fold_in(key, block), reverse, weights, jnp.asarray(t), *given
        found.append(np.asarray(diffusion.programs(_block, *inputs, **static)))
    return np.concatenate(found)


def _check_layer(network: nnx.Module, layer: str) -> None:
    """Raise a `ValueError` unless a network has a layer of this path."""
    paths = ["/".join(map(str, path)) for path, part in nnx.iter_modules(network) if path]
    if layer not in paths:
        raise ValueError(f"layer must be one of {', '.join(paths)}; got {shown(layer)}")


def _block(
    key: Array, reverse: Reverse, weights: Any, t: Array, x_0: Array, context: Array | None,
    mask: Array | None, *, graph: Any, layer: str, num_draws: int,
) -> Float[Array, "N ..."]:  # fmt: skip
    """Mean activations of a block of examples."""
    forward = ForwardTrajectory.of(reverse, x_0, mask)

    def one(key: Array) -> Array:
        times = jnp.full(forward.batch_shape, t)
        x_t = forward.sample_at(key, times)
        network = nnx.merge(graph, weights)
        if getattr(network, "takes_log_snr", False):
            step = reverse.steps.at(times, 0)
            times = jnp.log(step.alpha_bar_t) - jnp.log(step.noise_t)
        return _activations(network, layer, x_t, times, context)

    return jnp.mean(jax.lax.map(one, jax.random.split(key, num_draws)), 0)


def _activations(network: nnx.Module, layer: str, x_t: Array, t: Array, context: Any) -> Array:
    """What a layer returns while the network is called."""
    (part,) = (m for path, m in nnx.iter_modules(network) if "/".join(map(str, path)) == layer)
    found = _recorded(part)
    network(x_t, t) if context is None else network(x_t, t, context)
    if len(found) != 1 or not isinstance(found[0], jax.Array):
        raise ValueError(
            f"layer must be called once and return an array; {layer!r} was called {len(found)} "
            "times"
        )
    if found[0].shape[:1] != x_t.shape[:1]:
        raise ValueError(
            f"layer must return a row for each of the {len(x_t)} examples; {layer!r} returned "
            f"shape {found[0].shape}"
        )
    return found[0]


def _recorded(part: nnx.Module) -> list[Any]:
    """What a layer will return, call by call; it stays of its kind, whoever asks."""
    kind, found = type(part), []

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(kind.__call__(self, *args, **kwargs))
        return found[-1]

    object.__setattr__(part, "__class__", type(kind.__name__, (kind,), {"__call__": call}))
    return found
