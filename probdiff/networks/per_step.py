"""The 2015 networks for toy data: a hidden layer h that all steps share, and a read-out per step.

    output_t = A_t h(x) + b_t

`RadialBasis`, for numbers: normalised radial basis functions with shared centres c and widths w,

    h_j(x) = exp(−|x − c_j|² / 2w_j²) / Σ_k exp(−|x − c_k|² / 2w_k²).

`SigmoidPerceptron`, for bits: sigmoid layers one after the other,

    h_1 = σ(W_1 x + c_1),    h_{k+1} = σ(W_{k+1} h_k + c_{k+1}).

The paper's f_b puts a sigmoid on the output too, which is the readout's part here.

Source: Sohl-Dickstein et al. (2015), appendix D.1.1 (numbers) and D.1.2 (bits).
"""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from probdiff.arguments import check_at_least, check_object, check_shape
from probdiff.networks.binding import check_call, output_shape
from probdiff.networks.perceptron import as_numbers


class RadialBasis(nnx.Module):
    """One hidden layer of normalised radial basis functions with a linear read-out per step.

    Called as `network(x_t, t)`. A_t and b_t start at 0, widths at 1.

    Args:
        event_shape: Shape of one example.
        width: Number of basis functions.
        T: Number of steps; the network serves no other T.
        outputs: 2 for a readout with learned variance, 1 for one without.
        rngs: Draws the centres from N(0, 1), the stationary law.

    Example:
        >>> network = networks.RadialBasis((2,), width=16, T=40, rngs=nnx.Rngs(0))
        >>> jax.eval_shape(network, jnp.ones((5, 2)), jnp.full(5, 40)).shape
        (5, 4)
        >>> sum(p.size for p in jax.tree.leaves(nnx.state(network)))  # 16 (2 + 1) + 40 (16 + 1) 4
        2768
    """

    def __init__(
        self, event_shape: tuple[int, ...], width: int, T: int, *, outputs: int = 2, rngs: nnx.Rngs
    ):
        event_shape = check_shape("event_shape", event_shape)
        check_at_least(1, width=width, outputs=outputs)
        check_at_least(2, T=T)
        check_object(nnx.Rngs, "nnx.Rngs(seed)", rngs=rngs)
        self.event_shape, self.width, self.T, self.outputs = event_shape, width, T, outputs
        size = math.prod(event_shape)
        self.centres = nnx.Param(jax.random.normal(rngs.params(), (width, size)))
        self.log_widths = nnx.Param(jnp.zeros(width))
        self.weights, self.biases = _zeros(T, width, outputs * size)

    def __call__(self, x_t: Num[Array, "B ..."], t: Int[Array, " B"]) -> Float[Array, "B ..."]:
        """Outputs `(B, *event_shape)`, the last axis `outputs` times as long."""
        check_call(self, x_t, t)
        x = x_t.reshape(x_t.shape[0], -1)
        # |x − c|² term by term: a matrix product would lose digits where x is near a centre
        distance = jnp.sum((x[:, None] - self.centres[...]) ** 2, -1)
        h = jax.nn.softmax(-0.5 * distance * jnp.exp(-2 * self.log_widths[...]), axis=-1)
        return _read_out(self, h, t)


class SigmoidPerceptron(nnx.Module):
    """Sigmoid layers on the flattened example, with a linear read-out per step: for bits.

    Called as `network(x_t, t)`. A_t and b_t start at 0.

    Args:
        event_shape, T: As in `RadialBasis`.
        width: Units per hidden layer.
        depth: Number of hidden layers, at least 1.
        outputs: 1 for bits, 2 for a readout with learned variance.
        rngs: Draws the initial weights of the hidden layers.

    Example:
        >>> network = networks.SigmoidPerceptron((20,), width=8, depth=2, T=40, rngs=nnx.Rngs(0))
        >>> out = jax.eval_shape(network, jnp.ones((5, 20), jnp.int32), jnp.full(5, 40))
        >>> out.shape  # a logit of each bit
        (5, 20)
    """

    def __init__(
        self, event_shape: tuple[int, ...], width: int, depth: int, T: int, *, outputs: int = 1,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        event_shape = check_shape("event_shape", event_shape)
        check_at_least(1, width=width, depth=depth, outputs=outputs)
        check_at_least(2, T=T)
        check_object(nnx.Rngs, "nnx.Rngs(seed)", rngs=rngs)
        self.event_shape, self.width, self.depth, self.T = event_shape, width, depth, T
        self.outputs, size = outputs, math.prod(event_shape)
        # Glorot's range four times as wide is his own for this sigmoid: its slope at 0 is 1/4.
        init = nnx.initializers.variance_scaling(16.0, "fan_avg", "uniform")
        self.layers = nnx.List(
            nnx.Linear(n, m, kernel_init=init, rngs=rngs)
            for n, m in itertools.pairwise([size, *[width] * depth])
        )
        self.weights, self.biases = _zeros(T, width, outputs * size)

    def __call__(self, x_t: Num[Array, "B ..."], t: Int[Array, " B"]) -> Float[Array, "B ..."]:
        """Outputs `(B, *event_shape)`, the last axis `outputs` times as long."""
        check_call(self, x_t, t)
        h = as_numbers(x_t, 0).reshape(x_t.shape[0], -1)
        for layer in self.layers:
            h = jax.nn.sigmoid(layer(h))
        return _read_out(self, h, t)


def _zeros(T: int, width: int, size: int) -> tuple[nnx.Param, nnx.Param]:
    """A_t and b_t of all steps."""
    return nnx.Param(jnp.zeros((T, width, size))), nnx.Param(jnp.zeros((T, size)))


def _read_out(
    network: RadialBasis | SigmoidPerceptron, h: Float[Array, "B width"], t: Int[Array, " B"]
) -> Float[Array, "B ..."]:
    """A_t h + b_t."""
    out = jnp.einsum("bw,bwo->bo", h, network.weights[...][t - 1]) + network.biases[...][t - 1]
    return out.reshape(len(h), *output_shape(network.event_shape, network.outputs))
