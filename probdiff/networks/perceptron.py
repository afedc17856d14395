"""Perceptrons that know the step by bump functions of time, which enter every layer.

    g_j(t) = exp(−(t − τ_j)²/2w²) / Σ_k exp(−(t − τ_k)²/2w²),    τ_j evenly spaced over 1..T

with w the spacing of the centres τ. So a layer's response may change smoothly with t while the
number of parameters does not depend on T.

Source of the bumps: Sohl-Dickstein et al. (2015), appendix D.2.1.
"""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from probdiff.arguments import check_at_least, check_object, check_shape
from probdiff.networks.binding import check_call, output_shape


class Perceptron(nnx.Module):
    """Fully connected layers on the flattened example, with bump functions of time.

        h ← silu(A [h, g(t)] + b),    output = A [h, g(t)] + b

    Called as `network(x_t, t)` or `network(x_t, t, context)`, it serves numbers, bits and classes;
    the output starts at 0.

    Args:
        event_shape: Shape of one example.
        width: Units per hidden layer.
        depth: Number of hidden layers.
        T: Number of steps over which the bumps are spread; the network serves no other T.
        bumps: Number of bump functions.
        outputs: Numbers per entry of x, as the readout needs: 2 with a learned variance, 1 without
            one, 1 for bits, K for K classes.
        context_size: Numbers in one example's context; 0 where there is none.
        states: States of a symbol, to be coded one-hot: the kernel's `num_states`, for K classes K,
            or K + 1 with an absorbing state. 0 takes x as the numbers they are, as bits may be.
        rngs: Draws the initial weights.

    Example:
        >>> network = networks.Perceptron((2,), width=8, depth=1, T=40, rngs=nnx.Rngs(0))
        >>> jax.eval_shape(network, jnp.ones((5, 2)), jnp.full(5, 40)).shape  # mean and variance
        (5, 4)
        >>> sum(p.size for p in jax.tree.leaves(nnx.state(network)))
        180
        >>> (2 + 10 + 1) * 8 + (8 + 10 + 1) * 4  # 10 bump functions enter both layers
        180
        >>> letters = networks.Perceptron((2,), 8, 1, 40, outputs=26, states=26, rngs=nnx.Rngs(0))
        >>> jax.eval_shape(letters, jnp.ones((5, 2), int), jnp.full(5, 40)).shape  # 26 logits each
        (5, 52)
    """

    def __init__(
        self, event_shape: tuple[int, ...], width: int, depth: int, T: int, *, bumps: int = 10,
        outputs: int = 2, context_size: int = 0, states: int = 0, rngs: nnx.Rngs,
    ):  # fmt: skip
        event_shape = check_shape("event_shape", event_shape)
        check_at_least(1, width=width, depth=depth, bumps=bumps, outputs=outputs)
        check_at_least(2, T=T)
        check_at_least(0, context_size=context_size, states=states)
        check_object(nnx.Rngs, "nnx.Rngs(seed)", rngs=rngs)
        self.event_shape, self.width, self.depth, self.T = event_shape, width, depth, T
        self.bumps, self.outputs = bumps, outputs
        self.context_size, self.states = context_size, states
        size = math.prod(event_shape)
        pairs = itertools.pairwise([size * max(states, 1) + context_size, *[width] * depth])
        self.layers = nnx.List(nnx.Linear(n + bumps, m, rngs=rngs) for n, m in pairs)
        zeros = nnx.initializers.zeros
        self.readout = nnx.Linear(width + bumps, outputs * size, kernel_init=zeros, rngs=rngs)

    def __call__(
        self, x_t: Num[Array, "B ..."], t: Int[Array, " B"],
        context: Float[Array, "B ..."] | None = None,
    ) -> Float[Array, "B ..."]:  # fmt: skip
        """Outputs `(B, *event_shape)`, the last axis `outputs` times as long."""
        check_call(self, x_t, t, context)
        size = x_t.shape[0]
        x = as_numbers(x_t, self.states)
        g = bump_functions(t, self.T, self.bumps).astype(x.dtype)
        h = x.reshape(size, -1)
        if context is not None:
            h = jnp.concatenate([h, context.reshape(size, -1).astype(h.dtype)], -1)
        for layer in self.layers:
            h = jax.nn.silu(layer(jnp.concatenate([h, g], -1)))
        out = self.readout(jnp.concatenate([h, g], -1))
        return out.reshape(size, *output_shape(self.event_shape, self.outputs))


class SharedHead(nnx.Module):
    """Residual perceptron on the flattened example, with a head applied entry by entry.

        c_1..c_d = trunk(x, t)                  a few channels for each of the d entries
        output_i = head(x_i, c_i, t) + A_i h    the same head for all entries; h: trunk's last layer

    Near the data a denoiser turns sharply with the entry it denoises (a grey level between the
    edges of its range, a value on a grid) and slowly with all others. A perceptron has to learn
    these sharp turns anew for every entry; a head that all entries share learns them once. On the
    8 × 8 digits that is worth some 30 nats per image.

    Called as `network(x_t, t)` or `network(x_t, t, context)`, the context entering wherever time
    does; the output starts at 0.

    Args:
        event_shape, T, bumps, outputs, context_size, rngs: As in `Perceptron`.
        width: Units per hidden layer of the trunk.
        depth: Number of hidden layers of the trunk.
        channels: Numbers that the trunk hands to the head for each entry.
        head_width: Units in each of the head's two hidden layers.

    Example:
        >>> network = networks.SharedHead((8, 8), width=16, depth=2, T=40, rngs=nnx.Rngs(0))
        >>> out = jax.eval_shape(network, jnp.ones((5, 8, 8)), jnp.full(5, 40))
        >>> out.shape  # mean and variance of each pixel
        (5, 8, 16)
    """

    def __init__(
        self, event_shape: tuple[int, ...], width: int, depth: int, T: int, *, channels: int = 4,
        head_width: int = 16, bumps: int = 10, outputs: int = 2, context_size: int = 0,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        event_shape = check_shape("event_shape", event_shape)
        check_at_least(1, width=width, depth=depth, channels=channels, head_width=head_width)
        check_at_least(1, bumps=bumps, outputs=outputs)
        check_at_least(2, T=T)
        check_at_least(0, context_size=context_size)
        check_object(nnx.Rngs, "nnx.Rngs(seed)", rngs=rngs)
        self.event_shape, self.width, self.depth, self.T = event_shape, width, depth, T
        self.channels, self.head_width = channels, head_width
        self.bumps, self.outputs, self.context_size = bumps, outputs, context_size
        size, given = math.prod(event_shape), bumps + context_size
        zeros = nnx.initializers.zeros
        pairs = itertools.pairwise([size, *[width] * depth])
        self.trunk = nnx.List(nnx.Linear(n + given, m, rngs=rngs) for n, m in pairs)
        self.to_channels = nnx.Linear(width + given, size * channels, rngs=rngs)
        self.skip = nnx.Linear(width + given, size * outputs, kernel_init=zeros, rngs=rngs)
        sizes = 1 + channels + given, head_width
        self.head = nnx.List(nnx.Linear(n, head_width, rngs=rngs) for n in sizes)
        self.readout = nnx.Linear(head_width, outputs, kernel_init=zeros, rngs=rngs)

    def __call__(
        self, x_t: Num[Array, "B ..."], t: Int[Array, " B"],
        context: Float[Array, "B ..."] | None = None,
    ) -> Float[Array, "B ..."]:  # fmt: skip
        """Outputs `(B, *event_shape)`, the last axis `outputs` times as long."""
        check_call(self, x_t, t, context)
        batch = x_t.shape[0]
        x = as_numbers(x_t, 0).reshape(batch, -1)
        size = x.shape[1]
        g = bump_functions(t, self.T, self.bumps).astype(x.dtype)
        if context is not None:
            g = jnp.concatenate([g, context.reshape(batch, -1).astype(x.dtype)], -1)
        h = jax.nn.silu(self.trunk[0](jnp.concatenate([x, g], -1)))
        for layer in self.trunk[1:]:
            h = h + jax.nn.silu(layer(jnp.concatenate([h, g], -1)))
        h = jnp.concatenate([h, g], -1)
        c = self.to_channels(h).reshape(batch, size, self.channels)
        given = jnp.broadcast_to(g[:, None], (batch, size, g.shape[-1]))
        entry = jnp.concatenate([x[..., None], c, given], -1)
        for layer in self.head:
            entry = jax.nn.silu(layer(entry))
        out = self.readout(entry) + self.skip(h).reshape(batch, size, self.outputs)
        # The outputs lie side by side along the last axis of the event, the first one first.
        out = out.reshape(batch, *self.event_shape, self.outputs)
        out = jnp.moveaxis(out, -1, 1 if not self.event_shape else -2)
        return out.reshape(batch, *output_shape(self.event_shape, self.outputs))


def as_numbers(x_t: Num[Array, "..."], states: int) -> Float[Array, "..."]:
    """x_t as floats: symbols one-hot on a new last axis where `states` is given."""
    if states:
        return jax.nn.one_hot(x_t, states, dtype=jnp.result_type(float))
    return x_t if jnp.issubdtype(x_t.dtype, jnp.floating) else x_t.astype(jnp.result_type(float))


def bump_functions(t: Int[Array, " B"], T: int, bumps: int) -> Float[Array, "B bumps"]:
    """Bump functions g_j(t), which sum to 1."""
    centres = jnp.linspace(1.0, T, bumps)
    spacing = (T - 1) / max(bumps - 1, 1)
    return jax.nn.softmax(-0.5 * ((t[:, None] - centres) / spacing) ** 2, axis=-1)
