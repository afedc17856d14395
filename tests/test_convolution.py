"""Convolutions: gradients in the fast layout are the stock ones, and patches come apart again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
