"""A checkpoint is whole or refused."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from probdiff.train import checkpoint


def tree():
    return {
        "bits": jnp.array([True, False, True]),
        "bfloat": jnp.linspace(0, 1, 5, dtype=jnp.bfloat16),
        "empty": jnp.zeros((0, 3)),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(8), 3),
        "list": [jnp.float32(0.1), jnp.arange(6).reshape(2, 3).T],
        "old key": jax.random.PRNGKey(9),
    }


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.array_equal(a, b)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.safetensors"
    checkpoint.write(path, checkpoint.flatten(tree()), {"name": "kärnel", "T": "40"})
    return path


def test_what_is_read_is_what_was_written(path):
    arrays, metadata = checkpoint.read(path)
    blank = jax.tree.map(lambda leaf: leaf[..., :] if leaf.ndim else leaf, tree())
    assert metadata == {"name": "kärnel", "T": "40"}
    assert_same(checkpoint.unflatten(blank, arrays), tree())


def test_memory_that_is_not_in_c_order_is_written_in_c_order(tmp_path):
    transposed = np.arange(6.0).reshape(2, 3).T
    checkpoint.write(tmp_path / "a", checkpoint.flatten({"x": transposed}), {})
    arrays, _ = checkpoint.read(tmp_path / "a")
    assert np.array_equal(arrays["['x']"], transposed)


def test_a_file_cut_anywhere_is_refused_by_name(path):
    raw = path.read_bytes()
    for length in [0, 5, 8, 100, len(raw) // 2, len(raw) - 1]:
        path.write_bytes(raw[:length])
        with pytest.raises(ValueError, match=r"run\.safetensors is not a whole"):
            checkpoint.read(path)


def test_a_byte_changed_anywhere_is_refused_by_name(path):
    raw = path.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    padding = len(raw[8:header]) - len(raw[8:header].rstrip())
    for position in [*range(0, header - padding, 3), *range(header, len(raw))]:
        altered = bytearray(raw)
        altered[position] ^= 1
        path.write_bytes(altered)
        with pytest.raises(ValueError, match=r"run\.safetensors"):
            checkpoint.read(path)


def test_a_file_without_a_seal_is_refused(path):
    safetensors.numpy.save_file({"x": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="must hold the seal"):
        checkpoint.read(path)


def test_a_file_of_another_format_is_refused_by_its_name(path, monkeypatch):
    old = {"format": "probdiff.fit 1", "dtypes": "{}", "sha256": "0"}
    safetensors.numpy.save_file({"losses": np.zeros(3)}, path, metadata=old)
    ours = r"run\.safetensors must have the format 'probdiff.fit 2'"
    with pytest.raises(ValueError, match=f"{ours}; got 'probdiff.fit 1'"):
        checkpoint.read(path)
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "_FORMAT", "probdiff.fit 3")
        checkpoint.write(path, {}, {})
    with pytest.raises(ValueError, match=f"{ours}; got 'probdiff.fit 3'"):
        checkpoint.read(path)


def sealed(path, arrays, metadata):
    """A file with a seal that is right, by one who knows of it."""
    seal = checkpoint.sha256(safetensors.numpy.save(arrays, metadata))
    path.write_bytes(safetensors.numpy.save(arrays, metadata | {"sha256": seal}))


@pytest.mark.parametrize(
    "metadata",
    [{}, {"about": ""}, {"about": "[1]"}, {"about": "3"}, {"about": "{}"}, {"about": "[" * 10**5}],
    ids=range(6),
)
def test_a_sealed_file_that_is_no_checkpoint_is_named(path, metadata):
    sealed(path, {"x": np.zeros(3)}, metadata)
    with pytest.raises(ValueError, match=r"run\.safetensors must (say what|have the format)"):
        checkpoint.read(path)


FOREIGN = [
    b"\x89PNG\r\n\x1a\n" + bytes(100),
    b"PK\x03\x04" + bytes(100),
    b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    (2**62).to_bytes(8, "little") + b"{}",
    (2).to_bytes(8, "little") + b"{}",
    (10**5).to_bytes(8, "little") + b"[" * 10**5,
    *(
        len(header).to_bytes(8, "little") + header
        for header in (
            b'{"x":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
            b'{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
            b'{"../x":{"dtype":"F13","shape":[],"data_offsets":[0,4]}}1234',
            b'{"x":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}1234',
            b'{"x":null}',
        )
    ),
]


@pytest.mark.parametrize("content", FOREIGN, ids=range(len(FOREIGN)))
def test_a_foreign_file_is_refused_by_name(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.safetensors"):
        checkpoint.read(path)


def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(path, {"x": np.zeros(3)}, {})
    assert path.read_bytes() == before


def test_a_file_being_read_is_replaced_and_not_written_into(path):
    with open(path, "rb") as old:
        checkpoint.write(path, {"x": np.zeros(3)}, {})
        assert "['bits']" in old.read().decode(errors="ignore")
    assert list(checkpoint.read(path)[0]) == ["x"]


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"a": np.zeros(3), "b": np.zeros(2)}, r"\['b'\] is float64\[2\] there and"),
        ({"a": np.zeros(3, np.int8), "b": np.zeros(4)}, r"\['a'\] is int8\[3\] there"),
        ({"a": np.zeros(3)}, r"it has no \['b'\]"),
        ({"a": np.zeros(3), "b": np.zeros(4), "c": np.zeros(1)}, r"\['c'\] is there and not here"),
    ],
)
def test_another_tree_is_refused_with_its_first_difference(other, difference):
    template = {"a": np.zeros(3), "b": np.zeros(4)}
    with pytest.raises(ValueError, match=difference):
        checkpoint.unflatten(template, checkpoint.flatten(other))


def test_digest_tells_values_shapes_and_names_apart():
    trees = [
        {"x": np.zeros(4)},
        {"y": np.zeros(4)},
        {"x": np.zeros((2, 2))},
        {"x": np.zeros(4, np.int64)},
        {"x": np.array([0, 0, 0, 1e-300])},
    ]
    assert len({checkpoint.digest(tree) for tree in trees}) == len(trees)
    assert checkpoint.digest(trees[0]) == checkpoint.digest({"x": np.zeros(4)})
