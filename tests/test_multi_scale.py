"""The 2015 image network: its formula in loops, what reaches what, both pathways, saved models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from probdiff import Diffusion, GaussianKernel, load, networks, sample, save, schedules
from probdiff.networks.binding import built_in_config

T = 9
SMALL = {"dense_width": 5, "dense_depth": 2, "upper_width": 6, "upper_depth": 2, "bumps": 3}
PATHWAYS = {"both": {}, "convolution": {"dense_depth": 0}, "dense": {"depth": 0}}
by_pathway = pytest.mark.parametrize("options", PATHWAYS.values(), ids=PATHWAYS)


def make(event_shape=(8, 4), width=4, depth=2, **options):
    options = SMALL | {"T": T, "scales": 3} | {"width": width, "depth": depth} | options
    return networks.MultiScaleConvolution(event_shape, rngs=nnx.Rngs(0), **options)


def randomise(network, seed=1):
    """Random numbers instead of the zeros at which the read-out starts."""
    rng = np.random.default_rng(seed)
    state = nnx.state(network, nnx.Param)
    nnx.update(
        network, jax.tree.map(lambda p: jnp.asarray(0.4 * rng.normal(size=p.shape), p.dtype), state)
    )
    return network


def convolve_at(a, kernel, scale):
    """Pool by 2^scale, 3 × 3 with zeros around, upsampled: pixel by pixel of the full image."""
    side, (H, W, _) = 2**scale, a.shape
    h, w = H // side, W // side
    pooled = np.zeros((h + 2, w + 2, a.shape[2]))
    for r in range(h):
        for c in range(w):
            square = a[r * side : (r + 1) * side, c * side : (c + 1) * side]
            pooled[r + 1, c + 1] = square.reshape(side**2, -1).mean(0)
    out = np.zeros((H, W, kernel.shape[3]))
    for row in range(H):
        for col in range(W):
            for i in range(3):
                for j in range(3):
                    out[row, col] += pooled[row // side + i, col // side + j] @ kernel[i, j]
    return out


def arrays(layer):
    return np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])


def by_hand(network, x, t):
    """Outputs of one image, `(H, W, outputs, channels)`."""
    (H, W), J = network.event_shape[:2], network.bumps
    x = x.reshape(H, W, -1)
    parts = []
    if network.depth:
        a = x
        for layer in network.convolutions:
            total = arrays(layer.scales[0])[1]
            for scale, convolution in enumerate(layer.scales):
                total = total + convolve_at(a, np.asarray(convolution.kernel[...]), scale)
            a = np.log(1 + np.exp(total))
        parts.append(a)
    if network.dense_depth:
        h = x.ravel()
        for kernel, bias in map(arrays, network.dense):
            h = np.tanh(h @ kernel + bias)
        parts.append(h.reshape(H, W, -1))
    centres, spacing = np.linspace(1, T, J), (T - 1) / (J - 1)
    bumps = np.exp(-((t - centres) ** 2) / (2 * spacing**2))
    g = bumps / bumps.sum()
    channels, upper = x.shape[2], [arrays(layer) for layer in (*network.upper, network.readout)]
    z = np.zeros((H, W, network.outputs, channels))
    for row in range(H):
        for col in range(W):
            u = np.concatenate([part[row, col] for part in parts])
            for kernel, bias in upper[:-1]:
                u = np.tanh(u @ kernel + bias)
            y = u @ upper[-1][0] + upper[-1][1]
            for output in range(network.outputs):
                for channel in range(channels):
                    at = (output * channels + channel) * J
                    z[row, col, output, channel] = y[at : at + J] @ g
    return z


@by_pathway
@pytest.mark.parametrize("event_shape", [(8, 4), (4, 8, 3)], ids=str)
def test_the_network_is_its_formula(x64, event_shape, options):
    network = randomise(make(event_shape, outputs=3, **options))
    x, t = jax.random.normal(jax.random.key(0), (2, *event_shape)), jnp.array([2, 7])
    blocks = np.stack(np.split(np.asarray(nnx.jit(network)(x, t)), 3, axis=-1), 3)
    for i in range(2):
        z = by_hand(network, np.asarray(x[i]), int(t[i])).reshape(blocks[i].shape)
        np.testing.assert_allclose(blocks[i], z, rtol=1e-10, atol=1e-12)
        assert np.abs(z).max() > 0.1


def corner_gradient(network):
    """How one corner of the output moves with every pixel."""
    x = jax.random.normal(jax.random.key(2), network.event_shape)
    gradient = jax.jit(jax.grad(lambda x: network(x[None], jnp.array([3]))[0, 0, 0]))
    return np.abs(gradient(x))


def test_every_pixel_reaches_every_pixel_with_enough_scales():
    """One layer; squares of 4 × 4 pixels leave an 8 × 8 image with 2 × 2."""
    alone = {"event_shape": (8, 8), "depth": 1, "dense_depth": 0, "outputs": 1}
    assert (corner_gradient(randomise(make(scales=3, **alone))) > 0).all()
    for scales, side in ((1, 2), (2, 4)):
        reached = corner_gradient(randomise(make(scales=scales, **alone))) > 0
        assert reached[:side, :side].all() and reached.sum() == side**2


def test_every_pixel_reaches_every_pixel_on_the_dense_pathway():
    assert (corner_gradient(randomise(make(scales=1, depth=0, outputs=1))) > 0).all()


@by_pathway
def test_output_starts_at_zero_and_the_step_counts(options):
    network = make(**options)
    x = jax.random.normal(jax.random.key(0), (2, 8, 4))
    np.testing.assert_array_equal(network(x, jnp.array([1, 9])), np.zeros((2, 8, 8)))
    call = nnx.jit(randomise(network))
    early, late = (call(x, jnp.full(2, t)) for t in (1, 9))
    assert np.abs(np.asarray(early - late)).max() > 1e-2


def test_examples_do_not_see_each_other():
    network, t = nnx.jit(randomise(make())), jnp.array([1, 3, 9])
    x = jax.random.normal(jax.random.key(0), (3, 8, 4))
    alone = jnp.concatenate([network(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(network(x, t), alone, rtol=1e-4, atol=1e-5)


def test_activations_keep_their_size_whatever_the_scales():
    """Second moment of the last convolution, within a factor of two of that of one scale."""
    x = jax.random.normal(jax.random.key(0), (4, 16, 16, 1))
    moments = []
    for scales in (1, 3):
        a = x
        for layer in make((16, 16), 32, 4, scales=scales).convolutions:
            a = nnx.jit(layer)(a)
        moments.append(float(jnp.mean(a**2)))
    assert 0.5 < moments[1] / moments[0] < 2


@by_pathway
def test_a_model_is_saved_loaded_and_sampled(tmp_path, options):
    beta = schedules.log_snr_linear(T, beta_1=0.01, alpha_bar_T=0.01)
    diffusion = Diffusion(GaussianKernel(), beta, make(**options), event_shape=(8, 4))
    state = nnx.state(randomise(diffusion.network), nnx.Param)
    params = {"x_0_network$params": nnx.to_pure_dict(state)}
    save(tmp_path, diffusion, params)
    again, loaded = load(tmp_path)
    assert built_in_config(again.network) == built_in_config(diffusion.network)
    ours, theirs = (
        sample.ancestral(jax.random.key(0), d, p, 3)
        for d, p in ((diffusion, params), (again, loaded))
    )
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"event_shape": (6, 8)}, r"multiples of 4; got \(6, 8\)"),
        ({"event_shape": (8, 10), "scales": 4}, r"multiples of 8; got \(8, 10\)"),
        ({"event_shape": (8,)}, r"event_shape must be \(height, width\)"),
        ({"depth": 0, "dense_depth": 0}, "depth or dense_depth must be at least 1; got 0 and 0"),
        ({"scales": 0}, "scales must be at least 1; got 0"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_sides_do_not_matter_without_convolutions():
    network = make((7, 5), depth=0)
    assert network(jnp.ones((2, 7, 5)), jnp.array([1, 2])).shape == (2, 7, 10)
