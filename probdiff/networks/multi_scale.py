"""The 2015 network for images: convolutions at several scales beside a dense pathway.

    convolution   a ← log(1 + exp( b + Σ_s up_s( W_s ∗ pool_s(a) ) )),    s = 0, 1, .., scales − 1
    dense         h ← tanh(A h + c) on the whole image; the last layer gives a few h_i per pixel i
    both          u_i ← tanh(A u_i + c) from u_i = (a_i, h_i), pixel by pixel
    read-out      y_i = A u_i + c,    z_i = Σ_j y_ij g_j(t)

pool_s is the mean over squares of 2^s × 2^s pixels, W_s a 3 × 3 convolution, up_s repeats a pixel
over its square: together they are one convolution with a kernel fine at its centre and coarse far
from it, up to the edges of the squares. There is one non-linearity a layer, after the sum.

The layers do not know the step; the bump functions g_j of `perceptron` weigh what they say. Of the
2J numbers y_i half make z_i^μ, half z_i^Σ, which the readout `Perturbation` turns into a law. In
the paper CIFAR-10 has both pathways, MNIST the dense one alone; sizes are not in it, and the
defaults are those of its authors' program, but for `scales`, which is 1 there.

Source: Sohl-Dickstein et al. (2015), appendix D.2.1.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from probdiff.arguments import check_at_least, check_object
from probdiff.networks.binding import check_call
from probdiff.networks.convolution import as_events, check_image, convolve
from probdiff.networks.perceptron import as_numbers, bump_functions


class MultiScaleConvolution(nnx.Module):
    """Multi-scale convolutions beside a dense pathway, for images.

    Called as `network(x_t, t)`, on one grey or coloured image per example; the output starts at 0.

    Args:
        event_shape: `(height, width)` or `(height, width, channels)`; with convolutions the
            sides must be multiples of `2**(scales - 1)`.
        width: Channels of a multi-scale convolution.
        depth: Multi-scale convolutions one after the other; 0 leaves the dense pathway alone.
        T: Number of steps over which the bumps are spread; the network serves no other T.
        scales: Scales of each convolution, 1 for an ordinary one.
        dense_width: Units of a hidden layer of the dense pathway.
        dense_depth: Hidden layers of the dense pathway; 0 leaves the convolutions alone.
        dense_outputs: Numbers per pixel that the dense pathway ends in.
        upper_width: Channels of a 1 × 1 convolution.
        upper_depth: 1 × 1 convolutions, before the read-out.
        bumps: Number J of bump functions.
        outputs: Numbers per entry of x, as the readout needs.
        rngs: Draws the initial weights.

    Raises:
        ValueError: if sides are no multiples of the coarsest square, or there is neither pathway.

    Example:
        >>> network = networks.MultiScaleConvolution((8, 8), 16, 2, T=40, rngs=nnx.Rngs(0))
        >>> out = jax.eval_shape(network, jnp.ones((5, 8, 8)), jnp.full(5, 40))
        >>> out.shape  # mean and variance of each pixel
        (5, 8, 16)
    """

    def __init__(
        self, event_shape: tuple[int, ...], width: int, depth: int, T: int, *, scales: int = 3,
        dense_width: int = 500, dense_depth: int = 4, dense_outputs: int = 2, upper_width: int = 20,
        upper_depth: int = 2, bumps: int = 10, outputs: int = 2, rngs: nnx.Rngs,
    ):  # fmt: skip
        check_at_least(1, width=width, scales=scales, dense_width=dense_width, bumps=bumps)
        check_at_least(1, dense_outputs=dense_outputs, upper_width=upper_width, outputs=outputs)
        check_at_least(0, depth=depth, dense_depth=dense_depth, upper_depth=upper_depth)
        check_at_least(2, T=T)
        check_object(nnx.Rngs, "nnx.Rngs(seed)", rngs=rngs)
        event_shape = check_image(event_shape, 2 ** (scales - 1) if depth else 1)
        if max(depth, dense_depth) < 1:
            got = f"{depth} and {dense_depth}"
            raise ValueError(f"depth or dense_depth must be at least 1; got {got}")
        self.event_shape, self.width, self.depth, self.T = event_shape, width, depth, T
        self.dense_width, self.dense_depth = dense_width, dense_depth
        self.upper_width, self.upper_depth = upper_width, upper_depth
        self.scales, self.dense_outputs = scales, dense_outputs
        self.bumps, self.outputs = bumps, outputs
        pixels, channels = math.prod(event_shape[:2]), math.prod(event_shape[2:])
        self.convolutions = nnx.List(
            _Layer(into, width, scales, rngs) for into in [channels, *[width] * depth][:depth]
        )
        dense = [pixels * channels, *[dense_width] * dense_depth, dense_outputs * pixels]
        self.dense = _linears(dense if dense_depth else [], rngs)
        joined = width * (depth > 0) + dense_outputs * (dense_depth > 0)
        upper = [joined, *[upper_width] * upper_depth]
        self.upper = _linears(upper, rngs)
        size, zeros = outputs * channels * bumps, nnx.initializers.zeros
        self.readout = nnx.Linear(upper[-1], size, kernel_init=zeros, rngs=rngs)

    def __call__(self, x_t: Num[Array, "B ..."], t: Int[Array, " B"]) -> Float[Array, "B ..."]:
        """Outputs `(B, *event_shape)`, the last axis `outputs` times as long."""
        check_call(self, x_t, t)
        size, sides = x_t.shape[0], self.event_shape[:2]
        x = as_numbers(x_t, 0).reshape(size, *sides, -1)
        pathways = []
        if self.depth:
            a = x
            for layer in self.convolutions:
                a = layer(a)
            pathways.append(a)
        if self.dense_depth:
            h = _tanh_layers(self.dense, x.reshape(size, -1))
            pathways.append(h.reshape(size, *sides, -1))
        u = _tanh_layers(self.upper, jnp.concatenate(pathways, -1))
        y = self.readout(u).reshape(size, *sides, -1, self.bumps)
        z = jnp.einsum("bhwoj,bj->bhwo", y, bump_functions(t, self.T, self.bumps).astype(x.dtype))
        return as_events(z, self.event_shape, self.outputs)


class _Layer(nnx.Module):
    """One multi-scale convolution: pool, convolve, upsample and sum, then softplus."""

    def __init__(self, into: int, width: int, scales: int, rngs: nnx.Rngs):
        # a sum of this many terms with the variance of one
        init = nnx.initializers.variance_scaling(1 / scales, "fan_in", "truncated_normal")
        self.scales = nnx.List(
            nnx.Conv(
                into, width, (3, 3), conv_general_dilated=convolve, kernel_init=init,
                use_bias=scale == 0, rngs=rngs,
            )
            for scale in range(scales)
        )  # fmt: skip

    def __call__(self, a: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        pooled = [a]
        for _ in self.scales[1:]:
            pooled.append(_halve(pooled[-1]))
        # from the coarsest up, each sum doubled once: the same as to full size one by one
        total = self.scales[-1](pooled[-1])
        for level in reversed(range(len(pooled) - 1)):
            total = self.scales[level](pooled[level]) + _double(total)
        return jax.nn.softplus(total)


def _linears(sizes: list[int], rngs: nnx.Rngs) -> Sequence[nnx.Linear]:
    return nnx.List(nnx.Linear(n, m, rngs=rngs) for n, m in itertools.pairwise(sizes))


def _tanh_layers(layers: Sequence[nnx.Linear], h: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    for layer in layers:
        h = jnp.tanh(layer(h))
    return h


def _halve(a: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Mean over squares of 2 × 2 pixels."""
    B, H, W, C = a.shape
    return a.reshape(B, H // 2, 2, W // 2, 2, C).mean((2, 4))


def _double(a: Float[Array, "B h w C"]) -> Float[Array, "B H W C"]:
    """Every pixel over a square of 2 × 2."""
    return a.repeat(2, axis=1).repeat(2, axis=2)
