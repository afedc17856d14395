"""Which examples a training step sees.

Step i sees a batch that depends on (key, i) alone: not on where the loop was cut into chunks, nor
on whether it was interrupted. Three sources give the loop its data, n steps from `start` on.

- `Minibatches`: the rows 0..N−1 in a random order, one permutation an epoch,

      ρ_0(0), …, ρ_0(N−1), ρ_1(0), …, ρ_1(N−1), ρ_2(0), …

  and step i takes elements iB, …, (i+1)B − 1 of that stream. Within an epoch nothing is drawn
  twice; a batch may end one epoch and begin the next, so that no example is left over.
- `Whole`: all of the data at every step; a program with a subsampling plate draws its batch itself.
- `Stream`: an iterator's batches in its order, stacked, so that many steps share a transfer.

A diffusion's own programs are given x_0 − loc, the difference taken in float64 before data are
arrays of JAX's float type, which may not hold the digits behind a large loc.

The permutations are NumPy's: they are drawn, as an iterator's batches are fetched, on the host
while the device is busy with the chunk before.
"""

import abc
import functools
import inspect
import itertools
import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import ArrayLike, Int, Int32, PRNGKeyArray, PyTree
from numpyro.infer import SVI

from probdiff import devices
from probdiff.arguments import check_at_least, plain_arrays, read_array
from probdiff.diffusion import Diffusion
from probdiff.elbo import untracked
from probdiff.train import checkpoint

_MAX_STEPS = 1024  # of a chunk: their losses and indices are kept
_MAX_INDICES = 2**20  # 4 MiB of indices a chunk
_MAX_STREAM_BYTES = 2**24  # 16 MiB of stacked batches a chunk
_BLOCK = 2**16  # rows drawn at a time: NumPy's generators are slow to make, and N may be small


def arguments(batch: PyTree) -> tuple[tuple, dict]:
    """A batch as arguments of guide and model: a tuple goes by position, a dict by keyword."""
    if isinstance(batch, dict):
        return (), batch
    return (batch if isinstance(batch, tuple) else (batch,)), {}


def own_diffusion(svi: SVI) -> Diffusion | None:
    """The diffusion whose own model and guide an SVI has; None for any other programs."""
    model, guide = svi.model, untracked(svi.guide)
    if not (inspect.ismethod(model) and inspect.ismethod(guide)):
        return None
    pairs = {
        Diffusion.model: Diffusion.guide, Diffusion.model_by_step: Diffusion.guide_by_step,
    }  # fmt: skip
    is_own = guide.__func__ is pairs.get(model.__func__) and guide.__self__ is model.__self__
    return model.__self__ if is_own else None


def as_arrays(data: PyTree, name: str = "data", diffusion: Diffusion | None = None) -> PyTree:
    """`data` with JAX arrays for leaves; a `ValueError` unless it is an array, tuple or dict.

    Where the programs are a diffusion's own, its x_0 are less loc, taken off in float64.
    """
    if not isinstance(data, (np.ndarray, jax.Array, tuple, dict)):
        got = type(data).__name__
        raise ValueError(f"{name} must be an array, or a tuple or dict of arrays; got {got}")
    data = jax.tree.map(lambda leaf: read_array(name, leaf, jnp.number, jnp.bool_), data)
    return jax.tree.map(jnp.asarray, data if diffusion is None else _less_loc(data, diffusion))


def _less_loc(data: PyTree, diffusion: Diffusion) -> PyTree:
    """x_0 is the first of a tuple."""
    if isinstance(data, dict):
        is_given = data.get("x_0") is not None
        return data | {"x_0": diffusion.less_loc(data["x_0"])} if is_given else data
    if isinstance(data, tuple):
        return (diffusion.less_loc(data[0]), *data[1:]) if data else data
    return diffusion.less_loc(data)


class Source(abc.ABC):
    """Where a run's batches come from: `first`, and `examples` a step."""

    known: PyTree
    """What can be seen of the data before training: all of them, or a stream's first batch."""
    first: PyTree
    examples: int
    capacity: int = _MAX_STEPS
    """Most steps of a chunk."""

    @abc.abstractmethod
    def take(self, start: int, n: int) -> tuple[PyTree, Int32[jax.Array, "capacity *B"] | None]:
        """`(data, indices)` for steps start, …, start + n − 1: see `at`.

        `indices` always has `capacity` rows, of which the first n are meant: its shape does not
        depend on n, and neither does what is compiled.
        """

    def identity(self) -> dict[str, str]:
        """What tells these data from others."""
        return identity(self.known, "data")


def at(
    data: PyTree, indices: Int32[jax.Array, "capacity *B"] | None, i: Int[ArrayLike, ""]
) -> PyTree:
    """Batch of the i-th step of a chunk: `data[indices[i]]`, or `data` without indices."""
    if indices is None:
        return data
    rows = indices[i]
    return jax.tree.map(lambda leaf: leaf.at[rows].get(mode="promise_in_bounds"), data)


class Whole(Source):
    """All of the data, every step."""

    def __init__(self, data: PyTree):
        leaves = jax.tree.leaves(data)
        self.first = self.known = data
        self.examples = leaves[0].shape[0] if leaves and leaves[0].ndim else 1

    def take(self, start: int, n: int) -> tuple[PyTree, None]:
        """The data."""
        return self.known, None


class Minibatches(Source):
    """Batches of B examples without replacement, in an order that depends on the key alone."""

    def __init__(self, key: PRNGKeyArray, data: PyTree, batch_size: int, mesh: Mesh | None):
        self._N = _shared_length(data, "data")
        check_at_least(1, batch_size=batch_size)
        if batch_size > self._N:
            most = f"the {self._N} examples in data"
            raise ValueError(f"batch_size must be at most {most}; got {batch_size}")
        self.examples = batch_size
        self.capacity = max(1, min(_MAX_STEPS, _MAX_INDICES // batch_size))
        self._sharding = _divided(batch_size, mesh)
        words = np.asarray(jax.random.key_data(key)).ravel().tolist()
        # Two blocks: a chunk may end one and begin the next.
        self._block = functools.lru_cache(maxsize=2)(functools.partial(_block, words, self._N))
        self.known, self._data = data, devices.replicate(data, mesh)
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

    def take(self, start: int, n: int) -> tuple[PyTree, Int32[jax.Array, "capacity B"]]:
        """All of the data, and the rows of each step."""
        indices = np.zeros((self.capacity, self.examples), np.int32)
        indices[:n] = self.rows(start, n)
        return self._data, devices.place(indices, self._sharding)


class Stream(Source):
    """An iterator's batches: arrays, or tuples or dicts of arrays, of one shape throughout."""

    def __init__(self, iterator: Iterator, mesh: Mesh | None, diffusion: Diffusion | None = None):
        first, self._diffusion = next(iterator, None), diffusion
        if first is None:
            raise ValueError(
                "data must yield at least one batch; got an iterator that is at its end"
            )
        self.first = self.known = as_arrays(first, "a batch of data", diffusion)
        self.examples = _shared_length(self.first, "a batch of data")
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.first))
        self.capacity = max(1, min(_MAX_STEPS, _MAX_STREAM_BYTES // max(size, 1)))
        self._sharding = _divided(self.examples, mesh)
        self._indices = devices.replicate(jnp.arange(self.capacity, dtype=np.int32), mesh)
        self._batches, self._taken = itertools.chain([first], iterator), 0

    def take(self, start: int, n: int) -> tuple[PyTree, Int32[jax.Array, "capacity"]]:
        """Stacked batches, and their numbers; those before `start` are skipped."""
        stacked = jax.tree.map(
            lambda leaf: np.zeros((self.capacity, *leaf.shape), leaf.dtype), self.first
        )
        while self._taken < start:  # an interrupted run has used them up
            self._next()
        for i in range(n):
            batch = self._next()
            if (got := _shapes(batch)) != (first := _shapes(self.first)):
                which = f"batch {self._taken} of data"
                raise ValueError(f"{which} must be like the first, {first}; got {got}")
            for into, leaf in zip(*map(jax.tree.leaves, (stacked, batch)), strict=True):
                into[i] = leaf
        return devices.place(stacked, self._sharding), self._indices

    def identity(self) -> dict[str, str]:
        """Shapes alone, for the values pass by once."""
        return {"data": _shapes(self.first)}

    def _next(self) -> PyTree:
        for batch in self._batches:
            self._taken += 1
            batch = plain_arrays("data", batch)
            return batch if self._diffusion is None else _less_loc(batch, self._diffusion)
        raise ValueError(f"data must yield a batch for every step; it ended after {self._taken}")


def from_data(
    key: PRNGKeyArray, data: PyTree, batch_size: int | None, mesh: Mesh | None,
    diffusion: Diffusion | None = None,
) -> Source:  # fmt: skip
    """What the arguments of `fit` ask for, or a `ValueError`; `key` orders minibatches."""
    if isinstance(data, Iterator):
        if batch_size is not None:
            where = "where data is an iterator of batches"
            raise ValueError(f"batch_size must be None {where}; got {batch_size}")
        return Stream(data, mesh, diffusion)
    data = as_arrays(data, diffusion=diffusion)
    if batch_size is not None:
        return Minibatches(key, data, batch_size, mesh)
    if mesh is not None:
        raise ValueError("batch_size must be given with a mesh, which divides batches; got None")
    return Whole(data)


def identity(data: PyTree, name: str) -> dict[str, str]:
    """Shapes and SHA-256 of an array or a tree of arrays, under `name`."""
    return {name: _shapes(data), f"{name} (SHA-256)": checkpoint.digest(data)}


def _block(words: list[int], N: int, block: int) -> Int32[np.ndarray, "rows"]:
    """A whole number of permutations of 0..N−1, one after another."""
    epochs = max(1, _BLOCK // N)
    # NumPy permutes words of 64 bits two to three times as fast as those of 32.
    rows = np.tile(np.arange(N, dtype=np.int64), (epochs, 1))
    np.random.default_rng([*words, block]).permuted(rows, axis=1, out=rows)
    return rows.astype(np.int32).ravel()


def _shared_length(data: PyTree, name: str) -> int:
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
        devices_in = f"the {mesh.size} devices in mesh"
        raise ValueError(f"batch_size must be a multiple of {devices_in}; got {examples}")
    return NamedSharding(mesh, PartitionSpec(None, mesh.axis_names[0]))


def _shapes(tree: PyTree) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    shapes = [[jax.tree_util.keystr(p), jnp.result_type(x).name, np.shape(x)] for p, x in leaves]
    return json.dumps(shapes)
