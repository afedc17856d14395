"""Which examples a training step sees.

Step i sees a batch that depends on (key, i) alone: not on where the loop was cut into chunks, nor
on whether it was interrupted. Three sources give the loop its data, n steps from `start` on.

- `Minibatches`: the rows 0..N−1 in a random order, one permutation an epoch,

      ρ_0(0), …, ρ_0(N−1), ρ_1(0), …, ρ_1(N−1), ρ_2(0), …

  and step i takes elements iB, …, (i+1)B − 1 of that stream. Within an epoch nothing is drawn
  twice; a batch may end one epoch and begin the next, so that no example is left over.
- `Whole`: all of the data at every step; a program with a subsampling plate draws its batch itself.
- `Stream`: an iterator's batches in its order, fetched ahead on a thread and stacked, so that many
  steps share a transfer.

`take` returns `(data, indices)`: the batch of the chunk's i-th step is `data[indices[i]]`, or
`data` where `indices` is None. `indices` always has `capacity` rows, of which the first n are
meant: its shape does not depend on n, and neither does what is compiled.

The permutations are NumPy's, drawn on the host while the device is busy; a device would sort.
"""

import functools
import itertools
import json
import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int32, PRNGKeyArray

from probdiff import checkpoint, devices
from probdiff.arguments import check_at_least

_MAX_STEPS = 1024  # of a chunk: their losses and indices are kept
_MAX_INDICES = 2**20  # 4 MiB of indices a chunk
_MAX_STREAM_BYTES = 2**24  # 16 MiB of stacked batches a chunk
_BLOCK = 2**16  # rows drawn at a time: NumPy's generators are slow to make, and N may be small


def arguments(batch: Any) -> tuple[tuple, dict]:
    """A batch as arguments of guide and model: a tuple goes by position, a dict by keyword."""
    if isinstance(batch, dict):
        return (), batch
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def as_arrays(data: Any, name: str = "data") -> Any:
    """`data` with JAX arrays for leaves.

    Args:
        data: An array, or a tuple or dict of arrays.
        name: What an error calls it.

    Returns:
        A tree of the same structure.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(data, (np.ndarray, jax.Array, tuple, dict)):
        raise ValueError(
            f"{name} must be an array, or a tuple or dict of arrays; got {type(data).__name__}"
        )
    return jax.tree.map(jnp.asarray, data)


def from_data(
    key: PRNGKeyArray, data: Any, batch_size: int | None, mesh: Mesh | None
) -> "Whole | Minibatches | Stream":
    """The source that a user's `data` and `batch_size` ask for.

    Args:
        key: Orders the minibatches.
        data: An array, a tuple or dict of arrays, or an iterator of these.
        batch_size: Examples a step, or None for all of them.
        mesh: Devices to divide each batch among, or None.

    Returns:
        A source.

    Raises:
        ValueError: `batch_size` does not fit the data or the mesh.
    """
    if isinstance(data, Iterator):
        if batch_size is not None:
            raise ValueError(
                f"batch_size must be None where data is an iterator of batches; got {batch_size}"
            )
        return Stream(data, mesh)
    data = as_arrays(data)
    if batch_size is not None:
        return Minibatches(key, data, batch_size, mesh)
    if mesh is not None:
        raise ValueError("batch_size must be given with a mesh, which divides batches; got None")
    return Whole(data)


class Whole:
    """All of the data, every step."""

    capacity = _MAX_STEPS

    def __init__(self, data: Any):
        leaves = jax.tree.leaves(data)
        self.first = self.known = self._data = data
        self.examples = leaves[0].shape[0] if leaves and leaves[0].ndim else 1

    def take(self, start: int, n: int) -> tuple[Any, None]:
        """Data of steps start, …, start + n − 1."""
        return self._data, None

    def identity(self) -> dict[str, str]:
        """What tells these data from others."""
        return identity(self._data, "data")

    def close(self) -> None:
        """Nothing is held open."""


class Minibatches:
    """Batches without replacement, in an order that depends on the key alone.

    Args:
        key: Orders the rows.
        data: Tree of arrays that share the length N of axis 0.
        batch_size: Examples a step, B in 1..N.
        mesh: Devices to divide each batch among, or None.

    Raises:
        ValueError: Lengths differ, or B does not fit N or the mesh.
    """

    def __init__(self, key: PRNGKeyArray, data: Any, batch_size: int, mesh: Mesh | None):
        self._N = _shared_length(data, "data")
        check_at_least(1, batch_size=batch_size)
        if batch_size > self._N:
            raise ValueError(
                f"batch_size must be at most the {self._N} examples in data; got {batch_size}"
            )
        self.examples = batch_size
        self.capacity = max(1, min(_MAX_STEPS, _MAX_INDICES // batch_size))
        self._sharding = _divided(batch_size, mesh)
        self._data = devices.replicate(data, mesh)
        words = np.asarray(jax.random.key_data(key)).ravel().tolist()
        # Two blocks: a chunk may end one and begin the next.
        self._block = functools.lru_cache(maxsize=2)(functools.partial(_block, words, self._N))
        self.known = data
        self.first = jax.tree.map(lambda leaf: leaf[self.rows(0, 1)[0]], data)

    def rows(self, start: int, n: int) -> Int32[np.ndarray, "n B"]:
        """Rows of the batches of steps start, …, start + n − 1."""
        rows = np.empty(n * self.examples, np.int32)
        filled, first = 0, start * self.examples
        while filled < rows.size:
            block, offset = divmod(first + filled, self._block(0).size)
            piece = self._block(block)[offset : offset + rows.size - filled]
            rows[filled : filled + piece.size] = piece
            filled += piece.size
        return rows.reshape(n, self.examples)

    def take(self, start: int, n: int) -> tuple[Any, Int32[jax.Array, "capacity B"]]:
        """Data, and the rows of steps start, …, start + n − 1."""
        indices = np.zeros((self.capacity, self.examples), np.int32)
        indices[:n] = self.rows(start, n)
        return self._data, devices.place(indices, self._sharding)

    def identity(self) -> dict[str, str]:
        """What tells these data from others."""
        return identity(self._data, "data")

    def close(self) -> None:
        """Nothing is held open."""


class Stream:
    """An iterator's batches, fetched ahead on a thread.

    Args:
        iterator: Yields arrays, or tuples or dicts of arrays, of one shape throughout. More
            is drawn from it than is used.
        mesh: Devices to divide each batch among, or None.

    Raises:
        ValueError: There is no first batch, or its length does not fit the mesh.
    """

    def __init__(self, iterator: Iterator, mesh: Mesh | None):
        first = next(iterator, None)
        if first is None:
            raise ValueError(
                "data must yield at least one batch; got an iterator that is at its end"
            )
        self.first = self.known = as_arrays(first, "a batch of data")
        self.examples = _shared_length(self.first, "a batch of data")
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.first))
        self.capacity = max(1, min(_MAX_STEPS, _MAX_STREAM_BYTES // max(size, 1)))
        self._sharding = _divided(self.examples, mesh)
        self._indices = devices.replicate(jnp.arange(self.capacity, dtype=np.int32), mesh)
        self._batches = itertools.chain([first], iterator)
        self._ready: queue.Queue = queue.Queue(self.capacity)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, start: int, n: int) -> tuple[Any, Int32[jax.Array, "capacity"]]:
        """Stacked batches of steps start, …, start + n − 1, which follow those taken before."""
        if self._thread is None:
            # The first call says how many batches an interrupted run has used up.
            self._thread = threading.Thread(target=self._fetch, args=(start,), daemon=True)
            self._thread.start()
        stacked = jax.tree.map(
            lambda leaf: np.zeros((self.capacity, *leaf.shape), leaf.dtype), self.first
        )
        for i in range(n):
            batch = self._ready.get()
            if isinstance(batch, BaseException):
                raise batch
            for into, leaf in zip(jax.tree.leaves(stacked), batch, strict=True):
                into[i] = leaf
        return devices.place(stacked, self._sharding), self._indices

    def identity(self) -> dict[str, str]:
        """What tells these batches from others: their shapes, for their values pass by once."""
        return {"data": _shapes(self.first)}

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def _fetch(self, skip: int) -> None:
        step = 0
        try:
            for step, batch in enumerate(self._batches, start=1):
                if step <= skip:
                    continue
                self._check(step, batch)
                if not self._put([np.asarray(leaf) for leaf in jax.tree.leaves(batch)]):
                    return
            self._put(ValueError(f"data must yield a batch for every step; it ended after {step}"))
        except BaseException as error:
            self._put(error)

    def _check(self, step: int, batch: Any) -> None:
        if (there := _shapes(batch)) != (first := _shapes(self.first)):
            raise ValueError(f"batch {step} of data must be like the first, {first}; got {there}")

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def identity(data: Any, name: str) -> dict[str, str]:
    """Shapes and SHA-256 of an array or a tree of arrays, under `name`."""
    return {name: _shapes(data), f"{name} (SHA-256)": checkpoint.digest(data)}


def _block(words: list[int], N: int, block: int) -> Int32[np.ndarray, "rows"]:
    """A whole number of permutations of 0..N−1, one after another."""
    epochs = max(1, _BLOCK // N)
    # NumPy permutes words of 64 bits two to three times as fast as those of 32.
    rows = np.tile(np.arange(N, dtype=np.int64), (epochs, 1))
    np.random.default_rng([*words, block]).permuted(rows, axis=1, out=rows)
    return rows.astype(np.int32).ravel()


def _shared_length(data: Any, name: str) -> int:
    lengths = {
        f"{name}{jax.tree_util.keystr(path)}": leaf.shape[0] if leaf.ndim else None
        for path, leaf in jax.tree_util.tree_flatten_with_path(data)[0]
    }
    if not lengths:
        raise ValueError(f"{name} must hold at least one array to be cut into batches; got none")
    if len(set(lengths.values())) > 1 or None in lengths.values():
        listed = ", ".join(f"{leaf}: {length}" for leaf, length in lengths.items())
        raise ValueError(f"{name} must share the length of axis 0; got {listed}")
    return next(iter(lengths.values()))


def _divided(examples: int, mesh: Mesh | None) -> NamedSharding | None:
    """Sharding of an array (steps, examples, ...) along its examples."""
    if mesh is None:
        return None
    if examples % mesh.size:
        raise ValueError(
            f"batch_size must be a multiple of the {mesh.size} devices in mesh; got {examples}"
        )
    return NamedSharding(mesh, PartitionSpec(None, mesh.axis_names[0]))


def _shapes(tree: Any) -> str:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return json.dumps(
        [[jax.tree_util.keystr(p), jnp.result_type(x).name, np.shape(x)] for p, x in leaves]
    )
