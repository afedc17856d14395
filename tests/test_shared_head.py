"""The network with a head that all entries share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from probdiff.networks import SharedHead


def network(event_shape, **options):
    return SharedHead(event_shape, width=8, depth=2, T=5, rngs=nnx.Rngs(0), **options)


@nnx.jit
def run(net, *inputs):
    """The network compiled as a whole: op by op it compiles each of them."""
    return net(*inputs)


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 4)])
@pytest.mark.parametrize("outputs", [1, 2])
def test_outputs_lie_side_by_side_on_the_last_axis(event_shape, outputs):
    net = network(event_shape, outputs=outputs)
    net.readout.bias[...] = jnp.arange(10.0, 10 + outputs)
    out = run(net, jnp.ones((4, *event_shape)), jnp.array([1, 2, 3, 5]))
    if event_shape:
        shape = (4, *event_shape[:-1], outputs * event_shape[-1])
        expected = np.broadcast_to(np.repeat(np.arange(10, 10 + outputs), event_shape[-1]), shape)
    else:
        expected = np.tile(np.arange(10, 10 + outputs), (4, 1)) if outputs == 2 else np.full(4, 10)
    np.testing.assert_allclose(out, expected)


def test_all_entries_share_the_head():
    """With the same word from the trunk for all, permuted entries give permuted outputs."""
    net = network((6,), outputs=1)
    net.to_channels.kernel[...] = jnp.zeros_like(net.to_channels.kernel[...])
    net.readout.kernel[...] = jnp.ones_like(net.readout.kernel[...])
    x, t = jax.random.normal(jax.random.key(0), (3, 6)), jnp.array([1, 3, 5])
    order = jnp.array([2, 0, 1, 5, 4, 3])
    np.testing.assert_allclose(run(net, x, t)[:, order], run(net, x[:, order], t), rtol=1e-5)
    assert np.std(run(net, x, t)) > 1e-3


def test_every_entry_may_depend_on_every_other():
    net = network((6,), outputs=1)
    net.readout.kernel[...] = jnp.ones_like(net.readout.kernel[...])
    x, t = jax.random.normal(jax.random.key(0), (1, 6)), jnp.array([2])
    jacobian = jax.jit(jax.jacobian(lambda x: net(x[None], t)[0]))(x[0])
    assert (np.abs(jacobian) > 1e-6).all()


def test_context_is_a_shift_of_every_layer():
    """Layers that see c add W c: the network without context, that much added to its biases."""
    c, t = jnp.array([0.5, -1.0, 2.0]), jnp.array([1, 4])
    net, plain = network((6,), context_size=3), network((6,))
    keys = iter(jax.random.split(jax.random.key(1), 20))
    layers = [[*n.trunk, n.to_channels, n.skip, n.head[0]] for n in (net, plain)]
    for layer, without in zip(*layers, strict=True):
        kernel = jax.random.normal(next(keys), layer.kernel.shape)
        layer.kernel[...], without.kernel[...] = kernel, kernel[:-3]
        without.bias[...] = layer.bias[...] + c @ kernel[-3:]
    plain.head[1].kernel[...] = net.head[1].kernel[...]
    for n in (net, plain):
        n.readout.kernel[...] = jnp.ones_like(n.readout.kernel[...])
    x = jax.random.normal(next(keys), (2, 6))
    out = run(net, x, t, jnp.broadcast_to(c, (2, 3)))
    np.testing.assert_allclose(out, run(plain, x, t), rtol=1e-4)
    assert np.abs(out - run(net, x, t, jnp.zeros((2, 3)))).min() > 1e-3
