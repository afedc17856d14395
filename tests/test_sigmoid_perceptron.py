"""The 2015 network for bits against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from probdiff import BernoulliKernel, Diffusion, load, networks, readouts, save, schedules
from probdiff.networks.binding import built_in_config

T = 5


def network(event_shape=(2, 3), outputs=1):
    return networks.SigmoidPerceptron(event_shape, 4, 3, T, outputs=outputs, rngs=nnx.Rngs(0))


def randomise(net):
    """The same network with random read-outs, which start at zero."""
    rng = np.random.default_rng(0)
    _, state = nnx.split(net)
    nnx.update(net, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), state))
    return net


def some_bits(event_shape=(2, 3), n=7):
    x_t = np.random.default_rng(1).integers(0, 2, size=(n, *event_shape))
    return jnp.asarray(x_t, jnp.int32), jnp.arange(n, dtype=jnp.int32) % T + 1


def test_it_is_its_formula(x64):
    net = randomise(network())
    x_t, t = some_bits()
    for x, step, out in zip(np.asarray(x_t), np.asarray(t), nnx.jit(net)(x_t, t), strict=True):
        h = x.ravel()
        for layer in net.layers:
            h = 1 / (1 + np.exp(-(h @ layer.kernel[...] + layer.bias[...])))
        expected = h @ net.weights[...][step - 1] + net.biases[...][step - 1]
        np.testing.assert_allclose(out, expected.reshape(2, 3), rtol=1e-10)


def test_only_the_read_out_belongs_to_a_step():
    """The gradient of the output at step 3: its own read-out, and all hidden layers."""
    graph, params = nnx.split(randomise(network()))
    x_t = some_bits()[0]

    def output(params):
        return jnp.sum(nnx.merge(graph, params)(x_t, jnp.full(7, 3)))

    gradient = nnx.to_pure_dict(jax.jit(jax.grad(output))(params))
    for name in ("weights", "biases"):
        touched = np.abs(gradient[name]).reshape(T, -1).max(-1) > 0
        np.testing.assert_array_equal(touched, np.arange(1, T + 1) == 3)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["layers"]))


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("outputs", [1, 2])
def test_it_starts_with_output_zero_of_the_needed_shape(event_shape, outputs):
    x_t, t = some_bits(event_shape)
    if event_shape:
        shape = (7, *event_shape[:-1], outputs * event_shape[-1])
    else:
        shape = (7,) if outputs == 1 else (7, 2)
    run = nnx.jit(network(event_shape, outputs))
    np.testing.assert_array_equal(run(x_t, t), np.zeros(shape))


def test_hidden_units_tell_examples_apart_at_the_start():
    """Narrow initial weights leave all sigmoids near 1/2 after three layers."""
    net = networks.SigmoidPerceptron((20,), 50, 3, T, rngs=nnx.Rngs(0))
    h = some_bits((20,), 200)[0].astype(float)
    for layer in net.layers:
        h = jax.nn.sigmoid(layer(h))
    assert np.std(h, axis=0).mean() > 0.05


def test_it_is_saved_with_its_model(tmp_path):
    assert built_in_config(network()) == {
        "event_shape": (2, 3), "width": 4, "depth": 3, "T": T, "outputs": 1,
    }  # fmt: skip
    diffusion = Diffusion(
        BernoulliKernel(0.2), schedules.harmonic(T), network(), event_shape=(2, 3),
        readout=readouts.Logits(),
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), diffusion.params_template)
    save(tmp_path, diffusion, params)
    again, loaded = load(tmp_path)
    assert isinstance(again.network, networks.SigmoidPerceptron)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
