"""A network that looks across the batch is refused, and no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from probdiff import BernoulliKernel, Diffusion, GaussianKernel, networks, readouts, schedules
from probdiff.networks.binding import bind
from probdiff.networks.rows import coupling

T = 5


def make(network, event_shape=(4,), kernel=None, **options):
    kernel = GaussianKernel() if kernel is None else kernel
    is_number = isinstance(kernel, GaussianKernel)
    readout = readouts.Epsilon(readouts.ForwardVariance()) if is_number else readouts.Logits()
    return Diffusion(
        kernel, schedules.cosine(T), network, event_shape=event_shape, readout=readout, **options
    )


class Net(nnx.Module):
    """Layers around something that may mix rows; the last starts at zero."""

    def __init__(self, between):
        zeros = nnx.initializers.zeros
        self.first = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
        self.last = nnx.Linear(8, 4, kernel_init=zeros, rngs=nnx.Rngs(0))
        self.between = between

    def __call__(self, x_t, t, context=None):
        return self.last(self.between(self.first(x_t) + t[:, None] / T))


class LinenNet(linen.Module):
    axis: int

    @linen.compact
    def __call__(self, x_t, t):
        h = linen.Dense(8)(x_t)
        h = (h - h.mean(self.axis, keepdims=True)) / (h.std(self.axis, keepdims=True) + 1e-3)
        return linen.Dense(4, kernel_init=linen.initializers.zeros)(h)


def attention(h):  # over the batch
    return jax.nn.softmax(h @ h.T) @ h


def scaled(params, x_t, t):
    return params * x_t / jnp.sqrt(jnp.mean(x_t**2))


class OtherPerceptron(networks.Perceptron):
    def __call__(self, x_t, t, context=None):
        out = super().__call__(x_t, t, context)
        return out - out.mean(0)


MIXING = {
    "normalised": lambda: Net(lambda h: (h - h.mean(0)) / (h.std(0) + 1e-3)),
    "attention": lambda: Net(attention),
    "shifted": lambda: Net(lambda h: jnp.roll(h, 1, 0)),
    "sorted": lambda: Net(lambda h: jnp.sort(h, 0)),
    "linen": lambda: LinenNet(0),
    "pair": lambda: (scaled, jnp.zeros(4)),
    "function": lambda: lambda x_t, t: x_t - x_t.mean(0),
    "time": lambda: lambda x_t, t: x_t * jnp.max(t),
    "nan": lambda: lambda x_t, t: jnp.where(jnp.max(x_t) > 1.3, jnp.nan, x_t),
    "child": lambda: OtherPerceptron((4,), width=8, depth=2, T=T, outputs=1, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_network_that_looks_across_the_batch_is_refused(name):
    with pytest.raises(ValueError, match=r"network must take every row of x_t by itself.*axis 0"):
        make(MIXING[name]())


def test_contexts_and_symbols_are_tried_too():
    def of_context(x_t, t, context):
        return x_t + context.mean()

    def of_bits(x_t, t):
        return x_t.astype(float) - x_t.mean(0)

    with pytest.raises(ValueError, match="every row"):
        make(of_context, context_shape=(2,))
    with pytest.raises(ValueError, match="every row"):
        make(of_bits, kernel=BernoulliKernel())


def packed(h):
    """Attention over all numbers of the batch at once, kept to a row by a mask."""
    flat = h.reshape(-1, 1)
    row = jnp.repeat(jnp.arange(len(h)), h.shape[1])
    logits = jnp.where(row[:, None] == row, flat @ flat.T, -1e9)
    return (jax.nn.softmax(logits) @ flat).reshape(h.shape)


def over_entries(h):
    return (jax.nn.softmax(h[:, :, None] * h[:, None]) @ h[..., None])[..., 0]


ALONE = {
    "plain": lambda: Net(jnp.tanh),
    "layer_norm": lambda: Net(nnx.LayerNorm(8, rngs=nnx.Rngs(0))),
    "group_norm": lambda: Net(nnx.GroupNorm(8, num_groups=2, rngs=nnx.Rngs(0))),
    "dropout": lambda: Net(nnx.Dropout(0.5, deterministic=True)),
    "attention": lambda: Net(over_entries),
    "packed": lambda: Net(packed),
    "mapped": lambda: Net(lambda h: jax.lax.map(lambda row: row * row.sum(), h)),
    "linen": lambda: LinenNet(-1),
    "function": lambda: lambda x_t, t: jnp.cumsum(x_t, -1) / t[:, None],
    "constant": lambda: lambda x_t, t: jnp.zeros_like(x_t),
    "overflowing": lambda: Net(lambda h: jnp.exp(200 * h)),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_network_that_takes_each_row_by_itself_is_taken(name):
    network = ALONE[name]()
    assert make(network).network is network


OURS = {
    "RadialBasis": ((2, 3), {"width": 4, "T": T}),
    "SigmoidPerceptron": ((3,), {"width": 4, "depth": 1, "T": T}),
    "Perceptron": ((2, 3), {"width": 8, "depth": 2, "T": T}),
    "SharedHead": ((4, 4), {"width": 8, "depth": 2, "T": T, "channels": 2, "head_width": 4}),
    "UNet": ((8, 8), {"widths": (8, 16), "depth": 1, "T": T, "attention_heads": 2}),
    "MultiScaleConvolution": ((8, 8), {"width": 2, "depth": 1, "T": T, "dense_width": 4}),
}


@pytest.mark.parametrize("name", OURS)
def test_our_networks_take_each_row_by_itself(name):
    shape, options = OURS[name]
    binding = bind(getattr(networks, name)(shape, **options, rngs=nnx.Rngs(0)), shape, None)
    template = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, binding.init))
    assert coupling(binding.apply, template, shape, None, T, None) == 0

    def mixing(params, x_t, t, context):
        return binding.apply(params, x_t - x_t.mean(0), t, context)

    assert coupling(mixing, template, shape, None, T, None) > 1e-3


def test_a_diffusion_is_made_inside_a_trace():
    @jax.jit
    def traced(scale):
        make(lambda x_t, t: scale * x_t)  # the weights of this network are not known
        return make(Net(jnp.tanh)).T + 0 * scale

    assert np.asarray(traced(1.0)) == T
