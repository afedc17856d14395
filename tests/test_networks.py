"""Networks: the two built-in ones against their formulas, and every kind through `Diffusion`."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from flax import linen, nnx
from numpyro.infer import SVI, Trace_ELBO

from probdiff import Diffusion, GaussianKernel, networks, sample, schedules
from probdiff.networks.binding import built_in_config
from probdiff.networks.perceptron import bump_functions

T = 5
BETA = schedules.linear(T, beta_1=0.02, beta_T=0.4)
SITE = "x_0_network$params"


def diffusion_of(network, **options):
    return Diffusion(GaussianKernel(), BETA, network, event_shape=(2,), **options)


def randomise(network, seed=0):
    """Fill an nnx module with random numbers: built-in ones start with output zero."""
    rng = np.random.default_rng(seed)
    _, state = nnx.split(network)
    nnx.update(network, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), state))
    return network


def radial_basis(event_shape=(2,), outputs=2):
    return networks.RadialBasis(event_shape, 4, T, outputs=outputs, rngs=nnx.Rngs(0))


def perceptron(event_shape=(2,), outputs=2, context_size=0):
    return networks.Perceptron(
        event_shape, 6, 2, T, bumps=3, outputs=outputs, context_size=context_size, rngs=nnx.Rngs(0)
    )


def some_inputs(event_shape=(2,), n=7):
    x_t = np.random.default_rng(1).normal(size=(n, *event_shape))
    return jnp.asarray(x_t), jnp.arange(n, dtype=jnp.int32) % T + 1


def softmax(a):
    return np.exp(a) / np.exp(a).sum()


def test_radial_basis_is_its_formula(x64):
    network = randomise(radial_basis(event_shape=(2, 3)))
    x_t, t = some_inputs((2, 3))
    centres, widths = np.asarray(network.centres[...]), np.exp(network.log_widths[...])
    for x, step, out in zip(np.asarray(x_t), np.asarray(t), network(x_t, t), strict=True):
        h = softmax(-((x.ravel() - centres) ** 2).sum(-1) / (2 * widths**2))
        expected = h @ network.weights[...][step - 1] + network.biases[...][step - 1]
        np.testing.assert_allclose(out, expected.reshape(2, 6), rtol=1e-10)


def test_radial_basis_reads_out_each_step_by_its_own_weights():
    """The gradient of the output at step 3 touches the weights of step 3 alone."""
    graph, params = nnx.split(randomise(radial_basis()))
    x_t = some_inputs()[0].astype(jnp.float32)

    def output(params):
        return jnp.sum(nnx.merge(graph, params)(x_t, jnp.full(7, 3)))

    gradient = nnx.to_pure_dict(jax.grad(output)(params))
    for name in ("weights", "biases"):
        touched = np.abs(gradient[name]).reshape(T, -1).max(-1) > 0
        np.testing.assert_array_equal(touched, np.arange(1, T + 1) == 3)


@pytest.mark.parametrize("context_size", [0, 3])
def test_perceptron_is_its_formula(x64, context_size):
    network = randomise(perceptron((2, 3), context_size=context_size))
    x_t, t = some_inputs((2, 3))
    context = jnp.asarray(np.random.default_rng(2).normal(size=(7, 3))) if context_size else None
    out = network(x_t, t, context)
    centres = np.linspace(1, T, 3)
    for i in range(7):
        g = softmax(-((int(t[i]) - centres) ** 2) / (2 * 2.0**2))  # centres 1, 3, 5: spacing 2
        h = np.ravel(x_t[i]) if context is None else np.concatenate([np.ravel(x_t[i]), context[i]])
        for layer in network.layers:
            a = np.concatenate([h, g]) @ layer.kernel[...] + layer.bias[...]
            h = a / (1 + np.exp(-a))
        expected = np.concatenate([h, g]) @ network.readout.kernel[...] + network.readout.bias[...]
        np.testing.assert_allclose(out[i], expected.reshape(2, 6), rtol=1e-9)


def test_bump_functions_sum_to_one_and_peak_at_their_centres(x64):
    g = bump_functions(jnp.arange(1, 42), 41, 5)
    np.testing.assert_allclose(g.sum(-1), 1.0, rtol=1e-12)
    np.testing.assert_array_equal(np.argmax(g[np.array([0, 10, 20, 30, 40])], -1), np.arange(5))
    np.testing.assert_allclose(bump_functions(jnp.arange(1, 4), 3, 1), 1.0)


@pytest.mark.parametrize("make", [radial_basis, perceptron])
@pytest.mark.parametrize("event_shape", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("outputs", [1, 2])
def test_built_in_networks_start_with_output_zero_of_the_needed_shape(make, event_shape, outputs):
    network = make(event_shape, outputs)
    x_t, t = some_inputs(event_shape)
    shapes = {
        (): {1: (7,), 2: (7, 2)},
        (2,): {1: (7, 2), 2: (7, 4)},
        (2, 3): {1: (7, 2, 3), 2: (7, 2, 6)},
    }
    expected = np.zeros(shapes[event_shape][outputs])
    np.testing.assert_array_equal(network(x_t.astype(jnp.float32), t), expected)


@pytest.mark.parametrize("make", [radial_basis, perceptron])
def test_built_in_networks_are_rebuilt_from_their_arguments(make):
    network = make((2, 3), 1)
    again = type(network)(**built_in_config(network), rngs=nnx.Rngs(0))
    ours, theirs = (jax.tree.leaves(nnx.state(n)) for n in (network, again))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


class LinenNetwork(linen.Module):
    norm: bool = False

    @linen.compact
    def __call__(self, x_t, t, context=None):
        h = linen.Dense(4)(jnp.concatenate([x_t, t[:, None] / T], -1))
        if self.norm:
            h = linen.BatchNorm(use_running_average=False)(h)
        return h


class NnxNetwork(nnx.Module):
    """One layer, and perhaps another that keeps state."""

    def __init__(self, after=None):
        self.layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.after = after

    def __call__(self, x_t, t, context=None):
        h = self.layer(jnp.concatenate([x_t, t[:, None] / T], -1))
        return h if self.after is None else self.after(h)


def equinox_network():
    eqx = pytest.importorskip("equinox")

    class Network(eqx.Module):
        layer: eqx.nn.Linear

        def __call__(self, x_t, t):  # of one example
            return self.layer(jnp.append(x_t, t / T))

    return Network(eqx.nn.Linear(3, 4, key=jax.random.key(0)))


def nnx_by_hand(network, values, *inputs):
    nnx.update(network, values)
    return network(*inputs)


def linen_by_hand(network, values, *inputs):
    return network.apply({"params": values}, *inputs)


def equinox_by_hand(network, values, *inputs):
    return jax.vmap(values)(*inputs)


@pytest.mark.parametrize(
    ("make", "by_hand"),
    [
        (NnxNetwork, nnx_by_hand),
        (LinenNetwork, linen_by_hand),
        (equinox_network, equinox_by_hand),
    ],
    ids=["nnx", "linen", "equinox"],
)
def test_every_kind_of_module_trains_at_one_site_and_is_what_it_is_alone(key, make, by_hand):
    network = make()
    diffusion = diffusion_of(network)
    x_0 = np.random.default_rng(0).normal(size=(16, 2)).astype(np.float32)
    svi = SVI(diffusion.model, diffusion.guide, optax.sgd(1e-3), Trace_ELBO())
    state = svi.init(key, x_0)
    start = svi.get_params(state)
    state, _ = jax.jit(svi.update)(state, x_0)
    params = svi.get_params(state)
    assert list(params) == [SITE]
    for before, after in zip(*map(jax.tree.leaves, (start, params)), strict=True):
        assert np.abs(before - after).max() > 0
    reverse = diffusion.bind(params)
    x_t, t = some_inputs()
    z, v = reverse.outputs(x_t.astype(jnp.float32), t)
    alone = by_hand(network, params[SITE], x_t.astype(jnp.float32), t)
    np.testing.assert_allclose(np.concatenate([z, v], -1), alone, rtol=1e-6)


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_nnx_modules_start_from_their_own_weights_and_keep_them(key):
    network = randomise(radial_basis())
    before = nnx.to_pure_dict(nnx.state(network))
    diffusion = diffusion_of(network)
    x_0 = np.zeros((4, 2), np.float32)
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(0.1), Trace_ELBO())
    state = svi.init(key, x_0)
    assert_same(svi.get_params(state)[SITE], before)
    jax.jit(svi.update)(state, x_0)
    assert_same(nnx.to_pure_dict(nnx.state(network)), before)


def test_a_plain_function_has_nothing_to_train():
    diffusion = diffusion_of(lambda x_t, t: jnp.concatenate([x_t * t[:, None], x_t], -1))
    assert diffusion.params_template == {}
    reverse = diffusion.bind({})
    z, v = reverse.outputs(jnp.ones((3, 2)), jnp.array([1, 2, 5]))
    np.testing.assert_array_equal(z, [[1, 1], [2, 2], [5, 5]])
    np.testing.assert_array_equal(v, np.ones((3, 2)))


def with_context(network):
    return lambda x_t, t, context: network(x_t, t) + context.mean(-1, keepdims=True)


@pytest.mark.parametrize(
    "make",
    [lambda: randomise(perceptron(context_size=3)), lambda: with_context(NnxNetwork())],
    ids=["perceptron", "function"],
)
def test_context_of_an_example_reaches_that_examples_output(make):
    diffusion = diffusion_of(make(), context_shape=(3,))
    start = numpyro.handlers.trace(numpyro.handlers.seed(diffusion.model, 0))
    params = {
        name: site["value"]
        for name, site in start.get_trace(context=jnp.zeros(3)).items()
        if site["type"] == "param"
    }
    context = jnp.zeros((4, 3)).at[2].set(1.0)
    reverse = diffusion.bind(params, context=context)
    z, _ = reverse.outputs(jnp.ones((4, 2)), jnp.full(4, 3))
    differs = np.abs(z - z[0]).max(-1) > 1e-3
    np.testing.assert_array_equal(differs, [False, False, True, False])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NnxNetwork(nnx.BatchNorm(4, rngs=nnx.Rngs(0))), "NnxNetwork that keeps BatchStat"),
        (lambda: NnxNetwork(nnx.Dropout(0.5, rngs=nnx.Rngs(0))), "NnxNetwork that keeps RngC"),
        (lambda: LinenNetwork(norm=True), "LinenNetwork that keeps batch_stats"),
    ],
    ids=["nnx_batch_norm", "nnx_dropout", "linen_batch_norm"],
)
def test_a_network_that_keeps_state_is_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=f"must be stateless; got the .* module {message}.* scan"):
        diffusion_of(make())


def test_what_cannot_be_called_is_refused(unchecked):
    with pytest.raises(ValueError, match=r"callable as network\(x_t, t\), or a pair .*; got str"):
        diffusion_of("unet")


BUILT_IN = {
    "MultiScaleConvolution": (8, 2, T),
    "Perceptron": (8, 2, T),
    "FromMixture": (2, 8, 2),
    "RadialBasis": (8, T),
    "SharedHead": (8, 2, T),
    "SigmoidPerceptron": (8, 2, T),
    "UNet": ((8,), 1),
}


@pytest.mark.parametrize("name", [n for n in networks.__all__ if n[0].isupper()])
def test_a_shape_that_is_none_is_refused(unchecked, name):
    message = r"event_shape must be a tuple of ints such as \(12,\); got 12"
    with pytest.raises(ValueError, match=message):
        getattr(networks, name)(12, *BUILT_IN[name], rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["Perceptron", "SharedHead", "SigmoidPerceptron"])
def test_a_network_without_layers_is_refused(name):
    for argument, counts in {"width": (0, 2), "depth": (8, 0)}.items():
        with pytest.raises(ValueError, match=f"{argument} must be at least 1; got 0"):
            getattr(networks, name)((2,), *counts, T, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["Perceptron", "RadialBasis", "SharedHead", "SigmoidPerceptron"])
def test_bits_are_seen_as_the_numbers_they_are(name):
    network = randomise(getattr(networks, name)((2,), *BUILT_IN[name], rngs=nnx.Rngs(0)))
    bits, t = jnp.array([[0, 1], [0, 1], [1, 1]]), jnp.array([1, T, T])
    out = network(bits, t)
    np.testing.assert_array_equal(out, network(bits.astype(float), t))
    assert np.abs(np.asarray(out[0] - out[1])).max() > 1e-3  # the step counts


def test_a_function_with_its_weights_beside_it_is_trained_like_a_module():
    def apply(params, x_t, t):
        return jnp.concatenate([params["w"] * x_t, jnp.zeros_like(x_t)], -1)

    beta = schedules.linear(5, beta_T=0.5)
    pair = (apply, {"w": jnp.float32(0.5)})
    diffusion = Diffusion(GaussianKernel(), beta, pair, event_shape=(2,))
    svi = SVI(diffusion.model, diffusion.guide, optax.sgd(0.1), Trace_ELBO())
    x = jnp.ones((4, 2))
    state, _ = jax.jit(svi.update)(jax.jit(svi.init)(jax.random.key(0), x), x)
    params = svi.get_params(state)
    assert params["x_0_network$params"]["w"] != 0.5
    reverse = diffusion.bind(params)
    z, _ = reverse.outputs(x, 3)
    np.testing.assert_allclose(z, params["x_0_network$params"]["w"] * x)


@pytest.mark.parametrize("weight", [[0.0], np.zeros(1, np.float32)], ids=["list", "array"])
def test_a_function_that_reads_what_changes_is_bound_anew(weight):
    diffusion = Diffusion(
        GaussianKernel(),
        schedules.linear(5, beta_T=0.5),
        lambda x_t, t: jnp.concatenate([jnp.asarray(weight) * x_t, jnp.zeros_like(x_t)], -1),
        event_shape=(2,),
    )
    first = sample.ancestral(jax.random.key(0), diffusion, {}, 4)
    weight[0] = 1.0
    second = sample.ancestral(jax.random.key(0), diffusion, {}, 4)
    assert np.abs(first - second).max() > 0.1
