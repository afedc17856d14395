"""A tree of arrays in one file that is whole or refused.

The file is safetensors: a JSON header (names, dtypes, shapes, text metadata), then the tensors'
bytes. Reading it runs no code. Two things are added to the format.

1. *All or nothing.* Whatever the moment of a crash, the name holds the old file or the new one,
   never a part (see `files`).
2. *A seal.* The metadata hold the SHA-256 of the file as it would be without it: damaged or edited
   files are told from good ones before any number of theirs is used.

A tree is stored leaf by leaf under its path (`.optim_state[1].mu['w']`) and put back into a
template, a tree of the same structure. Paths are never parsed back into a tree: they do not tell a
list's index from a dict's key. PRNG keys travel as their words.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jaxtyping import PyTree
from safetensors.numpy import save

from probdiff import files

_FORMAT = "probdiff.fit 2"
_DTYPES = {"BOOL": "bool", "C64": "complex64", "BF16": "bfloat16"} | {
    f"{kind[0].upper()}{bits}": f"{kind}{bits}"
    for kind in ("int", "uint", "float")
    for bits in (8, 16, 32, 64)
}
"""What safetensors' own reader for NumPy knows, and bfloat16, which it does not."""


def flatten(tree: PyTree) -> dict[str, np.ndarray]:
    """Leaves of a tree of arrays and PRNG keys by path, in C order."""
    arrays = {
        jax.tree_util.keystr(path): jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    # safetensors writes memory as it lies, whatever the strides.
    return {name: np.asarray(array, order="C") for name, array in arrays.items()}


def unflatten(template: PyTree, arrays: dict[str, np.ndarray]) -> PyTree:
    """The tree of `template`, whose values are not used, with JAX arrays of the values `arrays`.

    A `ValueError` names the first leaf whose name, shape or dtype differs.
    """
    wanted = flatten(template)
    for name, array in wanted.items():
        if name not in arrays:
            raise ValueError(f"it has no {name}")
        if (there := _spec(arrays[name])) != (here := _spec(array)):
            raise ValueError(f"{name} is {there} there and {here} here")
    if extra := [name for name in arrays if name not in wanted]:
        raise ValueError(f"{extra[0]} is there and not here")
    leaves, tree = jax.tree.flatten(template)
    # `jnp.asarray` would compile a copy for every shape.
    values = [jax.device_put(arrays[name]) for name in wanted]
    for i, leaf in enumerate(leaves):
        if _is_key(leaf):
            values[i] = jax.random.wrap_key_data(values[i], impl=jax.random.key_impl(leaf))
    return jax.tree.unflatten(tree, values)


def write(path: Path, arrays: dict[str, np.ndarray], about: dict[str, str]) -> None:
    """Put arrays and text, both by name, at `path`, all or nothing; its folder must exist."""
    # One entry, for the order of several differs from process to process.
    metadata = {"about": json.dumps({**about, "format": _FORMAT}, sort_keys=True)}
    sealed = metadata | {"sha256": sha256(save(arrays, metadata))}
    files.replace(path, save(arrays, sealed))


def read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and text that `write` put at `path`; a `ValueError` if it is altered or another."""
    raw = path.read_bytes()
    try:
        arrays = unpacked(raw)
        length = int.from_bytes(raw[:8], "little")
        metadata = json.loads(raw[8 : 8 + length]).get("__metadata__", {})
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if metadata.get("format"):  # before 2 it stood there
        raise ValueError(f"{path} must have the format {_FORMAT!r}; got {metadata['format']!r}")
    if (seal := metadata.pop("sha256", None)) is None:
        raise ValueError(f"{path} must hold the seal that a checkpoint is written with; got none")
    if sha256(save(arrays, metadata)) != seal:
        raise ValueError(f"{path} was altered: its contents do not have the SHA-256 it names")
    try:
        about = dict(json.loads(metadata["about"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must say what it is about, as JSON; {error!r}") from error
    if (found := about.pop("format", None)) != _FORMAT:
        raise ValueError(f"{path} must have the format {_FORMAT!r}; got {found!r}")
    return arrays, about


def digest(tree: PyTree) -> str:
    """SHA-256 of a tree's values, names, shapes and dtypes."""
    return sha256(save(flatten(tree)))


def sha256(data: bytes) -> str:
    """The checksum of bytes, as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def unpacked(data: bytes) -> dict[str, np.ndarray]:
    """The arrays, bfloat16 included."""
    try:
        tensors = dict(safetensors.deserialize(data))
        dtypes = {name: jnp.dtype(_DTYPES[tensor["dtype"]]) for name, tensor in tensors.items()}
    except KeyError as error:
        raise ValueError(f"dtype {error} is unknown") from error
    return {
        name: np.frombuffer(tensor["data"], dtypes[name]).reshape(tensor["shape"])
        for name, tensor in tensors.items()
    }


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def _spec(array: np.ndarray) -> str:
    return f"{array.dtype.name}[{','.join(map(str, array.shape))}]"
