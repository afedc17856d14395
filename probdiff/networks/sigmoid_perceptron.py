"""The 2015 network for bits: sigmoid layers shared by all steps, a linear read-out per step.

    h_1 = σ(W_1 x + b_1),  h_{k+1} = σ(W_{k+1} h_k + b_{k+1}),    output_t = A_t h + c_t

The hidden layers do not know the step; A_t and c_t belong to step t. The paper's f_b puts a sigmoid
on the output, which is the readout's part here.

Source: Sohl-Dickstein et al. (2015), appendix D.1.2.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from probdiff.arguments import check_at_least, check_shape
from probdiff.networks.perceptron import as_numbers
from probdiff.networks.shapes import output_shape


class SigmoidPerceptron(nnx.Module):
    """Sigmoid layers on the flattened example, with a linear read-out per step: for bits.

        h_1 = σ(W_1 x + b_1),  h_{k+1} = σ(W_{k+1} h_k + b_{k+1}),    output_t = A_t h + c_t

    Called as `network(x_t, t)`; the hidden layers do not know the step, and the output starts at 0.

    Args:
        event_shape: Shape of one example.
        width: Units per hidden layer.
        depth: Number of hidden layers, at least 1.
        T: Number of steps; the network serves no other T.
        outputs: 1 for bits, 2 for a readout with learned variance.
        rngs: Draws the initial weights of the hidden layers; the read-outs start at 0.

    Example:
        >>> network = networks.SigmoidPerceptron((20,), width=8, depth=2, T=40, rngs=nnx.Rngs(0))
        >>> out = jax.eval_shape(network, jnp.ones((5, 20), jnp.int32), jnp.full(5, 40))
        >>> out.shape  # a logit of each bit
        (5, 20)

    Source: Sohl-Dickstein et al. (2015), appendix D.1.2.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        width: int,
        depth: int,
        T: int,
        *,
        outputs: int = 1,
        rngs: nnx.Rngs,
    ):
        event_shape = check_shape("event_shape", event_shape)
        check_at_least(1, width=width, depth=depth)
        self.event_shape, self.width, self.depth, self.T = event_shape, width, depth, T
        self.outputs = outputs
        size = math.prod(event_shape)
        # Glorot's range four times as wide is his own for this sigmoid: its slope at 0 is 1/4.
        init = nnx.initializers.variance_scaling(16.0, "fan_avg", "uniform")
        sizes = [size, *[width] * depth]
        self.layers = nnx.List(
            nnx.Linear(n, m, kernel_init=init, rngs=rngs) for n, m in itertools.pairwise(sizes)
        )
        self.weights = nnx.Param(jnp.zeros((T, width, outputs * size)))
        self.biases = nnx.Param(jnp.zeros((T, outputs * size)))

    def __call__(self, x_t: Num[Array, "B ..."], t: Int[Array, " B"]) -> Float[Array, "B ..."]:
        """Outputs `(B, *event_shape)`, the last axis `outputs` times as long."""
        h = as_numbers(x_t, 0).reshape(x_t.shape[0], -1)
        for layer in self.layers:
            h = jax.nn.sigmoid(layer(h))
        out = jnp.einsum("bw,bwo->bo", h, self.weights[...][t - 1]) + self.biases[...][t - 1]
        return out.reshape(x_t.shape[0], *output_shape(self.event_shape, self.outputs))
