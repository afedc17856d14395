"""The 2015 network for toy data: normalised radial basis functions, a read-out per step.

    h_j(x) = exp(−|x − c_j|² / 2w_j²) / Σ_k exp(−|x − c_k|² / 2w_k²),    output_t = A_t h(x) + b_t

Centres c and widths w are shared by all steps and by both outputs; A_t and b_t belong to step t.

Source: Sohl-Dickstein et al. (2015), appendix D.1.1.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from probdiff.arguments import check_at_least, check_shape
from probdiff.networks.shapes import output_shape


class RadialBasis(nnx.Module):
    """One hidden layer of normalised radial basis functions with a linear read-out per step.

        h_j(x) = exp(−|x − c_j|² / 2w_j²) / Σ_k exp(−|x − c_k|² / 2w_k²)
        output_t = A_t h(x) + b_t

    Called as `network(x_t, t)`. For toy data; A_t and b_t start at 0, w at 1.

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

    Source: Sohl-Dickstein et al. (2015), appendix D.1.1.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        width: int,
        T: int,
        *,
        outputs: int = 2,
        rngs: nnx.Rngs,
    ):
        event_shape = check_shape("event_shape", event_shape)
        check_at_least(1, width=width)
        self.event_shape, self.width, self.T, self.outputs = event_shape, width, T, outputs
        size = math.prod(event_shape)
        self.centres = nnx.Param(jax.random.normal(rngs.params(), (width, size)))
        self.log_widths = nnx.Param(jnp.zeros(width))
        self.weights = nnx.Param(jnp.zeros((T, width, outputs * size)))
        self.biases = nnx.Param(jnp.zeros((T, outputs * size)))

    def __call__(self, x_t: Num[Array, "B ..."], t: Int[Array, " B"]) -> Float[Array, "B ..."]:
        """Outputs `(B, *event_shape)`, the last axis `outputs` times as long."""
        x = x_t.reshape(x_t.shape[0], -1)
        # |x − c|² term by term: a matrix product would lose digits where x is near a centre
        distance = jnp.sum((x[:, None] - self.centres[...]) ** 2, -1)
        h = jax.nn.softmax(-0.5 * distance * jnp.exp(-2 * self.log_widths[...]), axis=-1)
        out = jnp.einsum("bw,bwo->bo", h, self.weights[...][t - 1]) + self.biases[...][t - 1]
        return out.reshape(x_t.shape[0], *output_shape(self.event_shape, self.outputs))
