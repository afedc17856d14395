"""Devices that share a computation, be they one process's or several processes'.

A mesh of D devices on one axis divides work in two ways.

*Rows of a batch*, in `fit`. The loss is a sum over examples, so its gradient is one too,

    ∇ Σ_i ℓ(x_i) = Σ_d ∇ Σ_{i in share d} ℓ(x_i),

and a step exchanges D partial sums, in one all-reduce of loss and gradient. The compiler divides
the arrays; a program does not know of it, and draws the noise that it would draw on one device.

*Blocks*, in `ancestral`, `bound` and the ladder. Block b of draws or examples takes its noise from
`fold_in(key, b)` and shares nothing with the others: each device does one at a time and nothing is
exchanged. A block has the shape that it has on one device, hence the same noise, and the same
numbers but for a last digit that the compiler may round otherwise. Devices without a block are
idle, which is why blocks that are too large for the mesh are refused.

Where the devices belong to several processes (`jax.distributed`), every process runs the same
program with the same arguments and holds what its own devices hold. An array that is whole on each
device can be read everywhere; one that is divided is gathered first. What follows a clock or a disk
has to be agreed on, or the processes would wait for each other for ever.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import ArrayLike, PyTree

from probdiff.arguments import check_object
from probdiff.compilation import Programs


def checked(mesh: Mesh | None) -> Mesh | None:
    """The same devices on an axis that the compiler may use as it sees fit."""
    if mesh is None:
        return None
    check_object(Mesh, "a jax.sharding.Mesh", mesh=mesh)
    if len(mesh.axis_names) != 1:
        raise ValueError(f"mesh must have one axis; got {mesh.axis_names}")
    count = len({device.process_index for device in mesh.devices.flat})
    if count not in (1, jax.process_count()):
        wanted = f"one process or of all {jax.process_count()}"
        raise ValueError(f"mesh must hold devices of {wanted}; got those of {count}")
    # Axes of `jax.make_mesh` are explicit unless told, and most programs do not run on such.
    return Mesh(mesh.devices, mesh.axis_names)


def is_shared(mesh: Mesh | None) -> bool:
    """Whether the devices belong to several processes."""
    return mesh is not None and mesh.is_multi_process


def is_first(mesh: Mesh | None) -> bool:
    """Whether this is the one process of those that share the mesh that writes and shows."""
    return not is_shared(mesh) or jax.process_index() == 0


def agreed(number: int, mesh: Mesh | None) -> int:
    """The first process's number, in every process."""
    if not is_shared(mesh):
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def check_same(values: dict[str, str]) -> None:
    """Raise a `ValueError` in every process unless all have the same text under every name."""
    for name, text in {"arguments": str(list(values)), **values}.items():
        digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int32)
        digests = multihost_utils.process_allgather(digest)
        if (digests != digests[0]).any():
            raise ValueError(f"{name} must be the same in every process; here it is {text}")


def replicate(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """The tree on every device of the mesh; the tree itself without a mesh."""
    return tree if mesh is None else place(tree, NamedSharding(mesh, PartitionSpec()))


def place(tree: PyTree, sharding: NamedSharding | None) -> PyTree:
    """The tree on devices as `sharding` says, from arrays that every process has whole."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(functools.partial(_place_shares, sharding=sharding), tree)


def fetch(tree: PyTree) -> PyTree:
    """The tree with NumPy arrays for leaves, whole in every process."""

    def whole(leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


def check_block_size(block_size: int, count: int, of_what: str, mesh: Mesh | None) -> None:
    """Raise a `ValueError` unless every device of the mesh has a block, or there are fewer rows."""
    if mesh is not None and -(-count // block_size) < min(mesh.size, count):
        raise ValueError(
            f"block_size must be at most {max(1, count // mesh.size)}, so that each of the "
            f"{mesh.size} devices in mesh has a block of the {count} {of_what}; got {block_size}"
        )


def blockwise(
    programs: Programs, function: Callable[..., Any], given: PyTree,
    blocks: Iterable[tuple[PyTree, ...]], mesh: Mesh | None, **static: Hashable,
) -> Iterator[PyTree]:  # fmt: skip
    """Apply a function to every block, on all devices at once where there is a mesh.

    Args:
        programs: Keeps what is compiled.
        function: A module's `function(key, given, *rows, **static)`, which reads nothing else.
        given: Pytree of arrays that every block gets.
        blocks: Tuples `(key, *rows)`, rows arrays or None.
        mesh: As `checked` returns it.

    Returns:
        What the function returns for each block, in their order, as NumPy arrays.
    """
    if mesh is None:
        for key, *rows in blocks:
            yield fetch(programs(function, key, given, *rows, **static))
        return
    given = replicate(given, mesh)
    divided = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    for group in _rounds(blocks, mesh.size):
        # A round that is not full does its last block again: what else would the others do?
        filled = group + group[-1:] * (mesh.size - len(group))
        own = place(jax.tree.map(_stack, *filled), divided)
        out = fetch(programs(_on_each_device, given, own, of=function, mesh=mesh, **static))
        for i in range(len(group)):
            yield jax.tree.map(lambda leaf, i=i: leaf[i], out)


def _on_each_device(
    given: PyTree, own: PyTree, *, of: Callable[..., Any], mesh: Mesh, **static: Hashable
) -> PyTree:
    """One block on each device; `own` and what is returned lead with an axis of devices."""

    def on_one(given: PyTree, own: PyTree) -> PyTree:
        key, *rows = jax.tree.map(lambda leaf: leaf[0], own)
        # A unit of its own, to be rounded as it is without a mesh.
        out = jax.jit(functools.partial(of, **static))(key, given, *rows)
        return jax.tree.map(lambda leaf: leaf[None], out)

    divided = PartitionSpec(mesh.axis_names)
    # Unchecked: what a program's loops start from is the same everywhere, and then it is not.
    return jax.shard_map(
        on_one, mesh=mesh, in_specs=(PartitionSpec(), divided), out_specs=divided, check_vma=False
    )(given, own)


def _place_shares(leaf: ArrayLike, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
        return leaf
    if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        words = _place_shares(random.key_data(leaf), sharding)
        return random.wrap_key_data(words, impl=random.key_impl(leaf))
    # `device_put` would send all of the array between processes, to see whether it is the same.
    array = np.asarray(leaf)
    array = array.astype(jnp.result_type(leaf), copy=False)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _rounds(blocks: Iterable[tuple[PyTree, ...]], size: int) -> Iterator[list[tuple[PyTree, ...]]]:
    """Blocks in groups of one shape, at most `size` in each."""

    def shapes(block: tuple[PyTree, ...]) -> list[tuple[int, ...]]:
        return [np.shape(leaf) for leaf in jax.tree.leaves(block)]

    for _, same in itertools.groupby(blocks, shapes):
        while group := list(itertools.islice(same, size)):
            yield group


def _stack(*leaves: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    is_key = jnp.issubdtype(jnp.result_type(leaves[0]), jax.dtypes.prng_key)
    return (jnp if is_key else np).stack(leaves)
