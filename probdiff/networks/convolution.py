"""Convolutions and patches of images.

Pixels may be gathered into patches (2 × 2 pixels become 4 channels), so that the widest layers run
at a quarter of the pixels.

On a CPU the gradients of a convolution are asked for in the one layout its compiler has a fast
kernel for (NHWC × HWIO): in the layouts that automatic differentiation emits, a convolution in a
compiled loop is some fifty times slower. On other devices the stock convolution is used.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LAYOUT = ("NHWC", "HWIO", "NHWC")


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


def convolve(x: Array, kernel: Array, *args: Any, **kwargs: Any) -> Array:
    """3 × 3 convolution, NHWC × HWIO, padded to the same size; fast gradients in loops on a CPU.

    `nnx.Conv` hands over strides, padding and layout too, which are always those of `_plain`.
    """
    if jax.default_backend() == "cpu":
        return _canonical(x, kernel)
    return _plain(x, kernel)


def _plain(x: Array, kernel: Array) -> Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)


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
        x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (1, 1), edges, dimension_numbers=LAYOUT
    )
    return _plain(dy, turned), d_kernel.transpose(1, 2, 0, 3)


_canonical.defvjp(_canonical_forward, _canonical_backward)
