"""Convolutions: gradients in the fast layout are the stock ones, and patches come apart again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpyro.infer import SVI

from probdiff import Diffusion, GaussianKernel, SampledTimeELBO, fit, networks, schedules
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


@pytest.mark.long
def test_convolve_is_the_stock_convolution_whatever_its_options():
    x = jax.random.normal(jax.random.key(0), (2, 6, 5, 4))
    options = [
        {"kernel_size": (3, 3)}, {"kernel_size": (2, 2)}, {"kernel_size": (3, 3), "strides": 2},
        {"kernel_size": (3, 3), "padding": "VALID"}, {"kernel_size": (3, 3), "padding": "CIRCULAR"},
        {"kernel_size": (1, 5), "kernel_dilation": 2},
        {"kernel_size": (3, 3), "feature_group_count": 2}, {"kernel_size": 3},
        {"kernel_size": (3, 3), "padding": 1, "input_dilation": 2},
    ]  # fmt: skip
    for option in options:
        of = x[:, 0] if option["kernel_size"] == 3 else x

        def loss(conv, of=of):
            return jnp.sum(jnp.sin(conv(of)))

        stock, ours = (
            nnx.grad(loss)(nnx.Conv(4, 2, rngs=nnx.Rngs(1), **option, **own))
            for own in ({}, {"conv_general_dilated": networks.convolve})
        )
        for a, b in zip(jax.tree.leaves(stock), jax.tree.leaves(ours), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=str(option))


class Slow(nnx.Module):
    def __init__(self, **options):
        self.conv = nnx.Conv(1, 2, (3, 3), rngs=nnx.Rngs(0), **options)

    def __call__(self, x_t, t):
        return self.conv(x_t)


def test_fit_warns_of_convolutions_that_are_slow_in_a_loop():
    def trained(network):
        diffusion = Diffusion(GaussianKernel(), schedules.cosine(3), network, event_shape=(4, 4, 1))
        svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), SampledTimeELBO())
        x = jax.random.normal(jax.random.key(0), (8, 4, 4, 1))
        return fit(jax.random.key(1), svi, x, num_steps=1, progress=False)

    with pytest.warns(UserWarning, match=r"conv_general_dilated=probdiff\.networks\.convolve"):
        slow = trained(Slow())
    fast = trained(Slow(conv_general_dilated=networks.convolve))
    np.testing.assert_allclose(slow.losses, fast.losses, rtol=1e-5)
