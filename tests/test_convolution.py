"""The convolutional network: its gradients, patches, shapes and dependence on the step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from probdiff.networks import ConvolutionalNetwork
from probdiff.networks.convolution import _canonical, _plain, from_patches, to_patches

SHAPES = {"odd sides": (2, 7, 5, 3, 4), "one pixel": (1, 1, 1, 2, 3), "wide": (3, 4, 9, 1, 6)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_canonical_gradients_are_the_stock_ones(x64, shape):
    B, H, W, C, D = shape
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, c = (
        jax.random.normal(k, s)
        for k, s in zip(keys, [(B, H, W, C), (3, 3, C, D), (B, H, W, D)], strict=True)
    )
    ours, stock = (
        jax.grad(lambda x, w, f=f: jnp.sum(c * f(x, w) ** 2), (0, 1))(x, w)
        for f in (_canonical, _plain)
    )
    for a, b in zip(ours, stock, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12, rtol=1e-12)


def test_second_derivatives_go_through(x64):
    x = jax.random.normal(jax.random.key(0), (1, 3, 3, 1))
    w = jax.random.normal(jax.random.key(1), (3, 3, 1, 2))
    ours, stock = (
        jax.grad(lambda x, f=f: jnp.sum(jax.grad(lambda y: jnp.sum(f(y, w) ** 3))(x) ** 2))(x)
        for f in (_canonical, _plain)
    )
    np.testing.assert_allclose(ours, stock, rtol=1e-10)


def test_patches_keep_neighbours_together_and_come_apart_again():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    patches = to_patches(x, 2)
    assert patches.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(patches[1, 1, 2].reshape(2, 2, 3), x[1, 2:4, 4:6])
    np.testing.assert_array_equal(from_patches(patches, 2), x)


@pytest.mark.parametrize(
    ("event_shape", "outputs", "expected"),
    [((8, 4), 1, (8, 4)), ((8, 4), 3, (8, 12)), ((4, 4, 2), 2, (4, 4, 4))],
)
def test_outputs_stand_in_blocks_of_the_last_axis(event_shape, outputs, expected):
    network = ConvolutionalNetwork(event_shape, 4, 1, 9, outputs=outputs, rngs=nnx.Rngs(0))
    out = network(jnp.ones((3, *event_shape)), jnp.array([1, 5, 9]))
    assert out.shape == (3, *expected)
    # a bias on one channel of the read-out reaches one output at one place of each patch
    channels = event_shape[2] if len(event_shape) == 3 else 1
    bias = jnp.zeros(network.readout.bias.shape).at[-1].set(1.0)
    network.readout.bias[...] = bias
    out = network(jnp.ones((3, *event_shape)), jnp.array([1, 5, 9]))
    parts = np.split(np.asarray(out), outputs, axis=-1)
    assert (parts[-1] == 1).sum() == 3 * event_shape[0] * event_shape[1] // 4
    assert all((part == 0).all() for part in parts[:-1])
    assert channels * outputs * 4 == bias.size


def test_every_pixel_reaches_every_pixel_and_the_step_counts():
    network = ConvolutionalNetwork((8, 8), 4, 2, 9, outputs=1, rngs=nnx.Rngs(0))
    network.readout.kernel[...] = jax.random.normal(jax.random.key(0), network.readout.kernel.shape)
    for block in (*network.down, *network.bottom, *network.up):
        kernel = block.modulate.kernel
        kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape)

    def corner(x):
        return network(x[None], jnp.array([3]))[0, 0, 0]

    x = jax.random.normal(jax.random.key(2), (8, 8))
    assert (np.abs(jax.grad(corner)(x)) > 0).all()
    early, late = (network(x[None], jnp.array([t])) for t in (1, 9))
    assert np.abs(np.asarray(early - late)).max() > 1e-3


def test_sides_that_do_not_halve_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 4; got \(7, 8\)"):
        ConvolutionalNetwork((7, 8), 4, 1, 5, rngs=nnx.Rngs(0))
