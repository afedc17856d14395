"""The U-Net: shapes, what reaches what, steps and log-SNR, context, attention, lower precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from probdiff import Diffusion, GaussianKernel, load, networks, sample, save, schedules

T = 9


def make(event_shape=(8, 8), widths=(8, 16), depth=1, **options):
    options = {"T": T, "outputs": 1} | options
    return networks.UNet(event_shape, widths, depth, rngs=nnx.Rngs(0), **options)


def run(network, *inputs):
    """The network compiled as a whole: op by op it compiles each of them."""
    graph, state = nnx.split(network)
    return jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs))(state, *inputs)


def randomise(network, seed=1):
    """Random numbers instead of the zeros at which it starts."""
    rng = np.random.default_rng(seed)
    state = nnx.state(network, nnx.Param)
    nnx.update(
        network, jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), state)
    )
    return network


@pytest.mark.long
@pytest.mark.parametrize(
    ("event_shape", "options", "expected"),
    [
        ((8, 4), {}, (8, 4)),
        ((8, 4), {"outputs": 3, "patch": 2}, (8, 12)),
        ((4, 4, 2), {"outputs": 2}, (4, 4, 4)),
        ((28, 28), {"widths": (8, 8, 8)}, (28, 28)),
        ((16, 8, 3), {"widths": (8, 8, 8, 8), "attention_heads": 2}, (16, 8, 3)),
    ],
)
def test_outputs_stand_in_blocks_of_the_last_axis(event_shape, options, expected):
    network = make(event_shape, **options)
    x, t = jnp.ones((3, *event_shape)), jnp.array([1, 5, 9])
    # the bias of the head's last channel reaches the last output alone, everywhere
    bias = network.head.readout.bias
    bias[...] = jnp.zeros(bias.shape).at[-1].set(1.0)
    out = run(network, x, t)
    assert out.shape == (3, *expected)
    parts = np.split(np.asarray(out), network.outputs, axis=-1)
    channels = event_shape[2] if len(event_shape) == 3 else 1
    assert (parts[-1].reshape(-1, channels)[:, -1] == 1).all()
    assert all((part == 0).all() for part in parts[:-1])


@pytest.mark.parametrize("options", [{}, {"patch": 2}, {"attention_heads": 2}], ids=str)
def test_every_pixel_reaches_every_pixel_and_the_step_counts(options):
    network = randomise(make(**options))

    def corner(x):
        return run(network, x[None], jnp.array([3]))[0, 0, 0]

    x = jax.random.normal(jax.random.key(2), (8, 8))
    assert (np.abs(jax.grad(corner)(x)) > 0).all()
    early, late = (run(network, x[None], jnp.array([t])) for t in (1, 9))
    assert np.abs(np.asarray(early - late)).max() > 1e-3


def test_examples_do_not_see_each_other():
    network = randomise(make(attention_heads=2))
    x = jax.random.normal(jax.random.key(0), (4, 8, 8))
    t = jnp.array([1, 3, 5, 9])
    together = run(network, x, t)
    alone = jnp.concatenate([run(network, x[i : i + 1], t[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


def test_attention_does_not_care_where_its_places_are():
    network = randomise(make((4, 4), widths=(8,), attention_heads=4))
    attention = network.bottom[0].attention
    h = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    order = np.random.default_rng(0).permutation(16)
    permuted = h.reshape(2, 16, 8)[:, order].reshape(2, 4, 4, 8)
    expected = attention(h).reshape(2, 16, 8)[:, order].reshape(2, 4, 4, 8)
    np.testing.assert_allclose(attention(permuted), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(attention(h) - h)).max() > 1e-2


def test_context_counts_and_only_where_there_is_one():
    network = randomise(make(context_size=6))
    x, t = jnp.ones((2, 8, 8)), jnp.array([3, 3])
    context = jax.random.normal(jax.random.key(0), (2, 2, 3))
    out = run(network, x, t, context)
    assert np.abs(np.asarray(out[0] - out[1])).max() > 1e-3


def of_log_snr(beta, network):
    return Diffusion(GaussianKernel(), beta, network, event_shape=(8, 8))


@pytest.mark.long
def test_network_of_the_log_snr_serves_any_schedule(x64):
    """Level 2 of 4 and level 3 of 7, evenly spaced between the same ends, have the same noise."""
    network = randomise(make(T=None, outputs=2))
    assert network.takes_log_snr
    x_t = jax.random.normal(jax.random.key(0), (2, 8, 8))
    outputs = []
    for steps, t in ((4, 2), (7, 3)):
        diffusion = of_log_snr(
            schedules.log_snr_linear(steps, beta_1=0.01, alpha_bar_T=0.01), network
        )
        params = {"x_0_network$params": nnx.to_pure_dict(nnx.state(network, nnx.Param))}
        reverse = diffusion.bind(params)
        outputs.append(jax.jit(reverse.outputs)(x_t, jnp.full(2, t))[0])
        table = reverse.steps
        log_snr = np.log(table.alpha_bar_t[t - 1] / table.noise_t[t - 1])
        direct = jnp.split(run(network, x_t, jnp.full(2, log_snr)), 2, -1)[0]
        np.testing.assert_allclose(outputs[-1], direct, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-7, atol=1e-9)


def test_network_of_the_log_snr_is_saved_and_sampled(tmp_path):
    diffusion = of_log_snr(
        schedules.log_snr_linear(4, beta_1=0.01, alpha_bar_T=0.01), make(T=None, outputs=2)
    )
    params = {"x_0_network$params": nnx.to_pure_dict(nnx.state(diffusion.network, nnx.Param))}
    save(tmp_path, diffusion, params)
    again, params = load(tmp_path)
    assert again.network.takes_log_snr
    ours, theirs = (
        sample.ancestral(jax.random.key(0), d, params, 3, steps=3) for d in (diffusion, again)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_log_snr_of_nothing_but_noise_is_refused():
    with pytest.raises(ValueError, match="log-SNR of x_T is then −∞; got a UNet"):
        of_log_snr(schedules.harmonic(4), make(T=None, outputs=2))


def test_lower_precision_is_for_what_lies_between():
    network = randomise(make(dtype="bfloat16", attention_heads=2))
    full = randomise(make(attention_heads=2))
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8)), jnp.array([2, 7])
    out, expected = run(network, x, t), run(full, x, t)
    assert out.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(network))} == {jnp.dtype("float32")}
    scale = np.abs(np.asarray(expected)).max()
    difference = np.abs(np.asarray(out - expected)).max()
    assert 0 < difference < 0.1 * scale


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"event_shape": (6, 8), "patch": 2}, r"multiples of 4; got \(6, 8\)"),
        ({"event_shape": (8,)}, r"event_shape must be \(height, width\)"),
        ({"widths": (8, 12)}, r"widths must be multiples of 8; got \(8, 12\)"),
        ({"attention_heads": 3}, "attention_heads must divide the last of widths, 16; got 3"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)
