"""A tree of arrays in one file that is whole or refused.

The file is safetensors: a JSON header (names, dtypes, shapes, text metadata), then the tensors'
bytes. Reading it runs no code. Two things are added to the format.

1. *All or nothing.* The bytes go to a neighbour file, are flushed to the disk, and the neighbour
   takes the name in one step (`os.replace`). Whatever the moment of a crash, the name holds the old
   file or the new one, never a part.
2. *A seal.* The metadata hold the SHA-256 of every name, dtype, shape and byte and of the other
   metadata: damaged or edited files are told from good ones before any number of theirs is used.

A tree is stored leaf by leaf under its path (`.optim_state[1].mu['w']`) and put back into a
template, a tree of the same structure. Paths are never parsed back into a tree: they do not tell a
list's index from a dict's key. PRNG keys travel as their words. dtypes stand in the metadata
because the NumPy reader of safetensors has none for bfloat16.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """Leaves of a tree by path, as NumPy arrays in C order.

    Args:
        tree: Any pytree of arrays and PRNG keys.

    Returns:
        Path of each leaf to its values, in the order of the leaves.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): _words(leaf) for path, leaf in leaves}


def unflatten(template: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The tree that has the structure of `template` and the values `arrays`.

    Args:
        template: Tree whose leaves say name, shape and dtype; its values are not used.
        arrays: What `flatten` returned for a tree of this structure.

    Returns:
        A tree of JAX arrays.

    Raises:
        ValueError: The first leaf whose name, shape or dtype differs.
    """
    wanted = flatten(template)
    if difference := _first_difference(wanted, arrays):
        raise ValueError(difference)
    # `jnp.asarray` would compile a copy for every shape.
    leaves = [
        jax.random.wrap_key_data(jax.device_put(array), impl=jax.random.key_impl(leaf))
        if _is_key(leaf)
        else jax.device_put(array)
        for leaf, array in zip(
            jax.tree.leaves(template), (arrays[name] for name in wanted), strict=True
        )
    ]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def write(path: str | Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Put arrays and metadata at `path`, all or nothing.

    Args:
        path: The file; its folder must exist. What was there is replaced.
        arrays: Values by name.
        metadata: Text by name.
    """
    path = Path(path)
    dtypes = json.dumps({name: array.dtype.name for name, array in arrays.items()})
    sealed = {**metadata, "dtypes": dtypes}
    sealed["sha256"] = _seal(arrays, sealed)
    replace(path, safetensors.numpy.save(arrays, metadata=sealed))


def replace(path: Path, data: bytes) -> None:
    """Put bytes at `path`, all or nothing."""
    # One fixed name, so that what a killed process left behind is overwritten and never piles up.
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata that `write` put at `path`.

    Args:
        path: The file.

    Returns:
        Values by name, text by name.

    Raises:
        ValueError: The file is truncated, altered, or was written by something else.
    """
    raw = Path(path).read_bytes()
    try:
        tensors = dict(safetensors.deserialize(raw))
        length = int.from_bytes(raw[:8], "little")
        sealed = json.loads(raw[8 : 8 + length]).get("__metadata__", {})
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    if "sha256" not in sealed or "dtypes" not in sealed:
        raise ValueError(f"{path} must hold the seal that a checkpoint is written with; got none")
    seal = sealed.pop("sha256")
    try:
        arrays = {
            name: _array(tensors[name], d) for name, d in json.loads(sealed["dtypes"]).items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was altered: its tensors do not fit their dtypes") from error
    if len(arrays) != len(tensors) or _seal(arrays, sealed) != seal:
        raise ValueError(f"{path} was altered: its contents do not have the SHA-256 it names")
    del sealed["dtypes"]
    return arrays, sealed


def digest(tree: Any) -> str:
    """SHA-256 of a tree's values, names, shapes and dtypes, as hexadecimal digits."""
    return _seal(flatten(tree), {})


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def _words(leaf: Any) -> np.ndarray:
    # safetensors writes memory as it lies, whatever the strides: C order is asked for here.
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf, order="C")


def _array(tensor: dict[str, Any], dtype: str) -> np.ndarray:
    return np.frombuffer(tensor["data"], dtype=jnp.dtype(dtype)).reshape(tensor["shape"])


def _seal(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    seal = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        seal.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        # A view as bytes, because bfloat16 has no buffer of its own.
        seal.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return seal.hexdigest()


def _first_difference(wanted: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> str | None:
    for name, array in wanted.items():
        if name not in found:
            return f"it has no {name}"
        if (there := _spec(found[name])) != (here := _spec(array)):
            return f"{name} is {there} there and {here} here"
    extra = [name for name in found if name not in wanted]
    return f"{extra[0]} is there and not here" if extra else None


def _spec(array: np.ndarray) -> str:
    return f"{array.dtype.name}[{','.join(map(str, array.shape))}]"
