"""Features of the denoiser are the activations of the layer that was named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from probdiff import (
    BernoulliKernel,
    Diffusion,
    GaussianKernel,
    diagnostics,
    networks,
    schedules,
)

KEY = jax.random.key(0)
BETA = schedules.log_snr_linear(6, beta_1=0.01, alpha_bar_T=0.02)


class Shift(nnx.Module):
    """A network whose layers are known: 2 x_t, then plus t and the context."""

    def __init__(self):
        self.scale = nnx.Param(jnp.array(1.0))
        self.parts = nnx.List([Times(2.0), Times(3.0)])
        self.out = Times(0.0)
        self.idle = Times(1.0)

    def __call__(self, x_t, t, context=None):
        h = self.parts[0](x_t * self.scale)
        h = self.parts[1](h + t[:, None] + (0 if context is None else context))
        return self.out(jnp.concatenate([h, h], -1))


class Times(nnx.Module):
    def __init__(self, factor):
        self.factor = nnx.Param(jnp.array(factor))

    def __call__(self, x):
        return self.factor * x


def made(network, **options):
    options = {"event_shape": (2,)} | options
    diffusion = Diffusion(GaussianKernel(), BETA, network, **options)
    template = diffusion.params_template
    return diffusion, template


def weights(network):
    return {"x_0_network$params": nnx.to_pure_dict(nnx.state(network, nnx.Param))}


@pytest.mark.parametrize("context", [None, np.full((300, 2), 5.0, np.float32)], ids=["", "context"])
def test_activations_are_those_of_the_layer_at_a_noisy_level(context):
    """On average over x_t they are affine in √ᾱ_t x_0, in the units of the diffusion."""
    network = Shift()
    shape = None if context is None else (2,)
    diffusion, _ = made(network, loc=1.0, scale=2.0, context_shape=shape)
    params = weights(network)
    params["x_0_network$params"]["scale"] = jnp.array(10.0)  # trained ones count, not the first
    x = 2 * np.asarray(jax.random.normal(KEY, (300, 2))) + 1
    root = np.sqrt(np.cumprod(1 - BETA)[3])
    noise = np.sqrt(1 - root**2)
    options = {"t": 4, "context": context, "num_draws": 200, "block_size": 128}
    first = diagnostics.features(KEY, diffusion, params, x, layer="parts/0", **options)
    mean = 20 * root * (x - 1) / 2
    se = 20 * noise / np.sqrt(200)
    assert np.abs(first - mean).max() < 5 * se and np.abs((first - mean).mean()) < 4 * se / 600**0.5
    second = diagnostics.features(KEY, diffusion, params, x, layer="parts/1", **options)
    shift = 4 + (0 if context is None else 5)
    np.testing.assert_allclose(second, 3 * (first + shift), rtol=1e-4, atol=1e-3)


OURS = {
    "Perceptron": (networks.Perceptron, ((8, 8), 16, 2, 6), "layers/1", (16,)),
    "SharedHead": (networks.SharedHead, ((8, 8), 16, 2, 6), "trunk/1", (16,)),
    "UNet": (networks.UNet, ((8, 8), (8, 16), 1), "bottom/0", (4, 4, 16)),
    "MultiScaleConvolution": (networks.MultiScaleConvolution, ((8, 8), 4, 1, 6), "upper/1", None),
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.long
def test_every_network_of_ours_has_features(name):
    make, given, layer, shape = OURS[name]
    network = make(*given, rngs=nnx.Rngs(0))
    diffusion, _ = made(network, event_shape=(8, 8))
    x = np.asarray(jax.random.normal(KEY, (5, 8, 8)))
    found = diagnostics.features(KEY, diffusion, weights(network), x, layer=layer, t=3)
    assert found.shape[0] == 5 and (shape is None or found.shape[1:] == shape)
    assert np.std(found, 0).max() > 1e-3
    again = diagnostics.features(KEY, diffusion, weights(network), x[:2], layer=layer, t=3)
    assert again.shape == (2, *found.shape[1:])


def test_features_of_bits_and_of_data_with_gaps():
    network = networks.Perceptron((3,), 8, 1, 4, outputs=1, rngs=nnx.Rngs(0))
    diffusion = Diffusion(BernoulliKernel(0.5), schedules.harmonic(4), network, event_shape=(3,))
    x, seen = np.array([[0, 1, 1], [1, 0, 0]]), np.array([[True, True, False]] * 2)
    options = {"layer": "layers/0", "t": 2, "num_draws": 500}
    found = [
        diagnostics.features(KEY, diffusion, weights(network), x ^ flip, mask=seen, **options)
        for flip in (0, np.array([0, 0, 1]))
    ]
    np.testing.assert_array_equal(*found)  # what is missing is not looked at


def test_what_has_no_features_is_refused():
    network = Shift()
    diffusion, _ = made(network)
    params, x = weights(network), np.zeros((2, 2), np.float32)
    call = lambda layer, t=1: diagnostics.features(KEY, diffusion, params, x, layer=layer, t=t)  # noqa: E731
    with pytest.raises(ValueError, match=r"layer must be one of .*parts/0.*; got 'parts/2'"):
        call("parts/2")
    with pytest.raises(ValueError, match=r"layer must be called once .*'idle' was called 0 times"):
        call("idle")
    with pytest.raises(ValueError, match=r"t must lie in 1\.\.6; got 7"):
        call("parts/0", 7)
    plain, _ = made(lambda x_t, t: jnp.zeros((len(x_t), 4)))
    with pytest.raises(ValueError, match=r"network must be a flax\.nnx module"):
        diagnostics.features(KEY, plain, {}, x, layer="parts/0", t=1)
