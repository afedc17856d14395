"""The table of layers: its totals against the leaves and by hand, plain text, what is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from probdiff import networks, storage

CASES = {
    "Perceptron": ((2, 3), 5, 2, 9, {"bumps": 3}),
    "UNet": ((8, 8), (8, 16), 1, {"T": 9, "attention_heads": 2}),
    "RadialBasis": ((2,), 4, 9, {}),
    "MultiScaleConvolution": ((8, 8), 4, 2, 9, {"dense_width": 6}),
}


@functools.cache
def case(name):
    """A network and the shape of its events."""
    *sizes, options = CASES[name]
    return sizes[0], getattr(networks, name)(*sizes, rngs=nnx.Rngs(0), **options)


class OneLayer(nnx.Module):
    """Nothing but y = A x + b."""

    def __init__(self, n, m):
        self.layer = nnx.Linear(n, m, rngs=nnx.Rngs(0))

    def __call__(self, x_t, t, context=None):
        x = x_t if context is None else jnp.concatenate([x_t, context], -1)
        return self.layer(x)


def cells(text):
    """Rows of the table that begin a layer: path, type, inputs, outputs, flops, parameters."""
    rows = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    rows = [[cell.strip() for cell in row] for row in rows]
    return [row for row in rows if row[1]]


def total(text, what):
    return int(re.search(rf"^Total {what}: ([\d,]+)", text, re.MULTILINE)[1].replace(",", ""))


@pytest.mark.parametrize("name", CASES)
def test_totals_are_those_of_the_leaves_and_of_the_call(name):
    event_shape, network = case(name)
    text = networks.summary(network, event_shape)
    graph, params = nnx.split(network)
    leaves = jax.tree.leaves(params)
    assert total(text, "Parameters") == sum(leaf.size for leaf in leaves)
    x_t, t = jnp.zeros((1, *event_shape)), jnp.ones(1, jnp.int32)
    call = jax.jit(lambda params, *given: nnx.merge(graph, params)(*given)).lower(params, x_t, t)
    rows = cells(text)
    assert total(text, "FLOPs") == int(rows[0][4]) == int(call.cost_analysis()["flops"])
    assert rows[0][1] == type(network).__name__
    shape = ",".join(map(str, call.out_info.shape))
    assert rows[0][3] == f"float32[{shape}]"


@pytest.mark.parametrize("batch_size", [1, 7])
def test_operations_of_a_linear_layer_are_two_for_each_weight_and_one_for_each_bias(batch_size):
    text = networks.summary(OneLayer(5, 3), (5,), batch_size=batch_size)
    expected = batch_size * (2 * 5 * 3 + 3)
    assert total(text, "FLOPs") == expected and f"batch of {batch_size})" in text
    whole, layer = cells(text)
    assert (layer[0], layer[3]) == ("layer", f"float32[{batch_size},3]")
    assert int(layer[4]) == int(whole[4]) == expected


def test_layers_stand_in_the_order_of_their_calls():
    event_shape, network = case("Perceptron")
    rows = cells(networks.summary(network, event_shape))
    assert [row[0] for row in rows] == ["", "layers/0", "layers/1", "readout"]
    rows = cells(networks.summary(network, event_shape, depth=1))
    assert [row[0] for row in rows] == ["", "readout"]


def test_context_and_symbols_are_taken():
    text = networks.summary(OneLayer(5, 3), (3,), context_shape=(2,))
    assert total(text, "FLOPs") == 33
    network = networks.Perceptron((4,), 5, 1, 9, states=3, rngs=nnx.Rngs(0))
    assert "int32[1,4]" in networks.summary(network, (4,), dtype=int)


def test_the_text_is_plain(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "40")
    event_shape, network = case("UNet")
    text = networks.summary(network, event_shape)
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())
    assert any(row[0] == "bottom/0/attention/into" for row in cells(text))


def test_a_network_still_works_after_a_call_that_fails():
    network = OneLayer(5, 3)
    with pytest.raises(TypeError, match=r"same shape|dot_general"):
        networks.summary(network, (7,))
    assert network(jnp.zeros((1, 5)), jnp.ones(1, jnp.int32)).shape == (1, 3)
    event_shape, network = case("Perceptron")
    with pytest.raises(ValueError, match=r"event_shape must be that of the network, \(2, 3\)"):
        networks.summary(network, (7,))
    out = network(jnp.zeros((1, *event_shape)), jnp.ones(1, jnp.int32))
    np.testing.assert_array_equal(out, np.zeros((1, 2, 6)))


def test_what_has_no_table_is_refused():
    with pytest.raises(ValueError, match=r"network must be a flax.nnx module; got Dense"):
        networks.summary(linen.Dense(3), (3,))
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        networks.summary(OneLayer(5, 3), (5,), batch_size=0)


def test_only_networks_can_be_loaded_by_name():
    assert "summary" not in storage.NETWORKS
    assert all(issubclass(network, nnx.Module) for network in storage.NETWORKS.values())


def test_a_network_of_the_log_snr_has_a_summary():
    network = networks.UNet((8, 8), (8,), 1, rngs=nnx.Rngs(0))
    assert "Total Parameters" in networks.summary(network, (8, 8))
