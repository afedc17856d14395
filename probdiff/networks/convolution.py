"""Images: their shapes, convolutions and patches.

Pixels may be gathered into patches (2 × 2 pixels become 4 channels), so that the widest layers run
at a quarter of the pixels.

On a CPU the gradients of a convolution are asked for in the one layout its compiler has a fast
kernel for (NHWC × HWIO): in the layouts that automatic differentiation emits, a convolution in a
compiled loop is some fifty times slower. On other devices the stock convolution is used.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from probdiff.arguments import as_array, check_shape, shown
from probdiff.networks.binding import output_shape

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def check_image(event_shape: tuple[int, ...], side: int) -> tuple[int, ...]:
    """The shape of one image, refused where its sides are no multiples of `side`."""
    event_shape = check_shape("event_shape", event_shape)
    if len(event_shape) not in (2, 3) or any(n % side for n in event_shape[:2]):
        raise ValueError(
            f"event_shape must be (height, width) or (height, width, channels) with sides that "
            f"are multiples of {side}; got {event_shape}"
        )
    return event_shape


def as_events(
    out: Float[Array, "B H W C"], event_shape: tuple[int, ...], outputs: int
) -> Float[Array, "B ..."]:
    """Channels × outputs, the outputs outermost, as a network returns them: blocks of an axis."""
    if len(event_shape) == 2:
        out = jnp.moveaxis(out, -1, -2)
    return out.reshape(len(out), *output_shape(event_shape, outputs))


def to_patches(x: Float[Array, "B H W C"], patch: int) -> Float[Array, "B h w c"]:
    """Squares of `patch` × `patch` pixels as channels."""
    B, H, W, C = x.shape
    x = x.reshape(B, H // patch, patch, W // patch, patch, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, H // patch, W // patch, patch**2 * C)


def from_patches(x: Float[Array, "B h w c"], patch: int) -> Float[Array, "B H W C"]:
    """Inverse of `to_patches`."""
    B, H, W, C = x.shape
    x = x.reshape(B, H, W, patch, patch, C // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, H * patch, W * patch, C // patch**2)


def convolve(
    x: Array, kernel: Array, strides: Any = (1, 1), padding: Any = "SAME", **options: Any
) -> Array:
    """Convolution for `nnx.Conv(..., conv_general_dilated=networks.convolve)`, fast on a CPU.

    Of images, NHWC × HWIO, with an odd kernel, unit strides and the same size behind as before, it
    has fast gradients in compiled loops, by `jax.custom_vjp` (so there is no forward mode). Other
    convolutions, and other devices, get JAX's own.

    Args:
        x: Images, `(B, H, W, C)`.
        kernel: Kernel, `(h, w, C, D)`.
        strides: As `jax.lax.conv_general_dilated` takes them, like all that follow.
        padding: "SAME" for the fast gradients.
        **options: Dilations, groups, layout, precision.

    Raises:
        ValueError: if it is no convolution.

    Example:
        >>> conv = nnx.Conv(
        ...     1, 4, (3, 3), conv_general_dilated=networks.convolve, rngs=nnx.Rngs(0)
        ... )
        >>> stock = nnx.Conv(1, 4, (3, 3), rngs=nnx.Rngs(0))
        >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
        >>> bool(jnp.allclose(conv(x), stock(x), atol=1e-6))
        True
    """
    x, kernel = jnp.asarray(as_array("x", x)), jnp.asarray(as_array("kernel", kernel))
    if kernel.ndim != x.ndim:
        raise ValueError(f"kernel must have {x.ndim} axes, as x has; got shape {kernel.shape}")
    given = {name: value for name, value in options.items() if value is not None}
    if jax.default_backend() == "cpu" and _has_fast_gradients(x, kernel, strides, padding, given):
        return _canonical(x, kernel)
    try:
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, **{"dimension_numbers": _LAYOUT} | given
        )
    except Exception as error:  # JAX has many kinds for it
        raise ValueError(
            f"x, kernel, strides and padding must be such as jax.lax.conv_general_dilated takes; "
            f"got shapes {x.shape} and {kernel.shape}, strides {shown(strides)}, padding "
            f"{shown(padding)}: {error}"
        ) from error


def is_slow(layout: jax.lax.ConvDimensionNumbers) -> bool:
    """Whether a convolution of this layout has no fast kernel on a CPU."""
    return layout != jax.lax.conv_dimension_numbers((1,) * 4, (1,) * 4, _LAYOUT)


def _has_fast_gradients(
    x: Array, kernel: Array, strides: Any, padding: Any, options: dict[str, Any]
) -> bool:
    layout = options.get("dimension_numbers", _LAYOUT)
    ones = [strides, *(options.get(f"{side}_dilation", (1, 1)) for side in ("lhs", "rhs"))]
    return (
        x.ndim == kernel.ndim == 4
        and isinstance(padding, str)
        and padding == "SAME"
        and all(n % 2 for n in kernel.shape[:2])
        and all(np.array_equal(one, (1, 1)) for one in ones)
        and options.get("feature_group_count", 1) == 1
        and not is_slow(jax.lax.conv_dimension_numbers(x.shape, kernel.shape, layout))
        and not options.keys() & {"precision", "preferred_element_type", "batch_group_count"}
    )


def _plain(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_LAYOUT)


@jax.custom_vjp
def _canonical(x: Array, kernel: Array) -> Array:
    return _plain(x, kernel)


def _canonical_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _plain(x, kernel), (x, kernel)


def _canonical_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """Both gradients as NHWC × HWIO convolutions.

    The input's is dy convolved with the kernel turned round; the kernel's is x, channels as batch,
    convolved with dy, batch as channels.
    """
    x, kernel = saved
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    edges = [(n // 2, n // 2) for n in kernel.shape[:2]]
    d_kernel = jax.lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 1), edges, dimension_numbers=_LAYOUT
    )
    return _plain(dy, turned), d_kernel.transpose(1, 2, 0, 3)


_canonical.defvjp(_canonical_forward, _canonical_backward)
