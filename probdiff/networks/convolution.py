"""A convolutional network for images, a small U, that knows the step by bump functions.

Pixels are gathered into patches (2 × 2 pixels become 4 channels), so that the widest layers run at
a quarter of the pixels. Residual blocks at that resolution, more at half of it, and a way back with
a skip; every block is scaled and shifted by the bump functions g_j(t) of `perceptron`.

On a CPU the gradients of a convolution are asked for in the one layout its compiler has a fast
kernel for (NHWC × HWIO): in the layouts that automatic differentiation emits, a convolution in a
compiled loop is some fifty times slower. On other devices the stock convolution is used.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from probdiff.networks.perceptron import as_numbers, bump_functions
from probdiff.networks.radial_basis import output_shape

LAYOUT = ("NHWC", "HWIO", "NHWC")


class ConvolutionalNetwork(nnx.Module):
    """U-shaped convolutions over one grey or coloured image per example.

    Squares of pixels become channels; residual blocks there, more at half the resolution, and a way
    back with a skip. Every block is scaled and shifted by bump functions of time. Called as
    `network(x_t, t)`; the output starts at 0.

    Args:
        event_shape: `(height, width)` or `(height, width, channels)`; the sides must be
            multiples of `2 * patch`.
        width: Channels at the patches' resolution; twice as many at half of it.
        depth: Residual blocks on each of the three stretches (down, bottom, up).
        T: Number of steps over which the bumps are spread; the network serves no other T.
        patch: Side of the square of pixels that become channels.
        bumps: Number of bump functions.
        outputs: Numbers per entry of x, as the readout needs.
        states: States of a symbol, to be coded one-hot; 0 takes x as the numbers they are.
        rngs: Draws the initial weights.

    Raises:
        ValueError: if the sides of the image are not multiples of `2 * patch`.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from probdiff import networks
        >>> def call(x_t, t):
        ...     network = networks.ConvolutionalNetwork((8, 8), 16, depth=1, T=40, rngs=nnx.Rngs(0))
        ...     return network(x_t, t)
        >>> out = jax.eval_shape(call, jnp.ones((5, 8, 8)), jnp.full(5, 40))
        >>> out.shape  # mean and variance of each pixel
        (5, 8, 16)
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        width: int,
        depth: int,
        T: int,
        *,
        patch: int = 2,
        bumps: int = 10,
        outputs: int = 2,
        states: int = 0,
        rngs: nnx.Rngs,
    ):
        if len(event_shape) not in (2, 3) or any(n % (2 * patch) for n in event_shape[:2]):
            raise ValueError(
                f"event_shape must be (height, width) or (height, width, channels) with sides that "
                f"are multiples of {2 * patch}; got {tuple(event_shape)}"
            )
        self.event_shape, self.width, self.depth, self.T = tuple(event_shape), width, depth, T
        self.patch, self.bumps, self.outputs, self.states = patch, bumps, outputs, states
        channels = event_shape[2] if len(event_shape) == 3 else 1
        into, out = channels * max(states, 1) * patch**2, channels * outputs * patch**2
        self.entry = _convolution(into, width, rngs)
        self.down = _blocks(depth, width, bumps, rngs)
        self.to_bottom = nnx.Linear(4 * width, 2 * width, rngs=rngs)
        self.bottom = _blocks(depth, 2 * width, bumps, rngs)
        self.from_bottom = nnx.Linear(2 * width, 4 * width, rngs=rngs)
        self.merge = nnx.Linear(2 * width, width, rngs=rngs)
        self.up = _blocks(depth, width, bumps, rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.readout = nnx.Linear(width, out, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x_t: Num[Array, "B ..."], t: Int[Array, " B"]) -> Float[Array, "B ..."]:
        """Outputs `(B, *event_shape)`, the last axis `outputs` times as long."""
        size, (height, width) = x_t.shape[0], self.event_shape[:2]
        x = as_numbers(x_t, self.states).reshape(size, height, width, -1)
        g = bump_functions(t, self.T, self.bumps).astype(x.dtype)
        h = self.entry(to_patches(x, self.patch))
        for block in self.down:
            h = block(h, g)
        b = self.to_bottom(to_patches(h, 2))
        for block in self.bottom:
            b = block(b, g)
        h = self.merge(jnp.concatenate([h, from_patches(self.from_bottom(b), 2)], -1))
        for block in self.up:
            h = block(h, g)
        out = from_patches(self.readout(jax.nn.silu(self.norm(h))), self.patch)
        # channels × outputs, the outputs outermost: an output is a block of the last axis
        if len(self.event_shape) == 2:
            out = jnp.moveaxis(out, -1, -2)
        return out.reshape(size, *output_shape(self.event_shape, self.outputs))


class _Block(nnx.Module):
    """h + conv(silu(norm)) twice, the first norm scaled and shifted by the step."""

    def __init__(self, width: int, bumps: int, rngs: nnx.Rngs):
        self.norms = nnx.List(nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.modulate = nnx.Linear(bumps, 2 * width, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.first = _convolution(width, width, rngs)
        self.second = _convolution(width, width, rngs)

    def __call__(self, h: Float[Array, "B H W C"], g: Float[Array, "B J"]) -> Array:
        scale, shift = jnp.split(self.modulate(g)[:, None, None], 2, axis=-1)
        inner = self.first(jax.nn.silu(self.norms[0](h) * (1 + scale) + shift))
        return h + self.second(jax.nn.silu(self.norms[1](inner)))


def _blocks(depth: int, width: int, bumps: int, rngs: nnx.Rngs) -> Any:
    return nnx.List(_Block(width, bumps, rngs) for _ in range(depth))


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


def _convolution(into: int, out: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(into, out, (3, 3), conv_general_dilated=convolve, rngs=rngs)


def convolve(x: Array, kernel: Array, *args: Any, **kwargs: Any) -> Array:
    """3 × 3 convolution, NHWC × HWIO, padded to the same size; fast gradients in loops on a CPU."""
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
