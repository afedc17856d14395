"""Saved models: a folder with `params.safetensors` and `config.json`, no pickle.

`config.json` holds what `Diffusion` was made of, and the checksum of the parameters' file; built-in
networks are rebuilt from their arguments by an allow-list, others have to be handed to `load`.

A model is replaced in one step, the renaming of its `config.json`:

    1. the new parameters are written under a name of their own, params-CHECKSUM.safetensors;
    2. config.json, which holds that checksum, takes the place of the old one;
    3. the new parameters take the name params.safetensors.

`load` takes the parameters that the configuration names, under either name. So whatever the moment
of a crash, there is the old model or the new one. Writers take turns.

What is read may be damaged, foreign or made up: each field is checked before it is used, and a
network's arguments against the parameters' shapes before it is made.
"""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from probdiff import files, kernels, networks, readouts, schedules, validation
from probdiff.arguments import check_object, check_path
from probdiff.diffusion import Diffusion
from probdiff.kernels import DiscreteKernel, GaussianKernel
from probdiff.networks.binding import built_in_config
from probdiff.readouts import DiscreteReadout, GaussianReadout, LastStep, Variance
from probdiff.train import checkpoint
from probdiff.types import Network, Params

_FORMAT = 1
_PATIENCE = 60.0
"""Seconds to wait for another who saves a model in the same folder; he needs a few."""
NETWORKS = {n: c for n in networks.__all__ if isinstance(c := getattr(networks, n), type)}
_PARTS = {
    cls.__name__: cls
    for module in (kernels, readouts)
    for name in module.__all__
    if dataclasses.is_dataclass(cls := getattr(module, name)) and not inspect.isabstract(cls)
}


def save(path: str | Path, diffusion: Diffusion, params: Params) -> None:
    """Write a model and its parameters into the folder `path`, made if it is not there.

    Args:
        path: Folder that gets `params.safetensors` and `config.json`; a model in it is replaced.
        diffusion: The model, made of the package's own parts; its network may be of any kind.
        params: Its parameters.

    Raises:
        ValueError: if the parameters do not fit the model or are not finite, or a part is not the
            package's own.
        OSError: if the disk is full, say; the model that was there before still is.

    Example:
        See `load`, the way back:

        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, standard_diffusion(), {})
        ...     sorted(os.listdir(folder))
        ['config.json', 'params.safetensors']
    """
    check_path("path", path)
    check_object(Diffusion, diffusion=diffusion)
    diffusion.check_params(params)
    leaves = {n: np.asarray(a, order="C") for n, a in validation.leaves_by_path(params).items()}
    _check_numbers(leaves, "params")
    data = safetensors.numpy.save(leaves)
    config = _config(diffusion) | {"params_sha256": checkpoint.sha256(data)}
    config |= {"config_sha256": _digest(config)}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    text, end = json.dumps(config, indent=1).encode(), time.monotonic() + _PATIENCE
    while True:
        with files.locked(folder / "config.json") as is_ours:
            if is_ours:
                _replace_model(folder, config["params_sha256"], data, text)
                return
        if time.monotonic() > end:
            raise TimeoutError(
                f"{folder} is being written by {files.holder(folder / 'config.json')}"
            )
        time.sleep(0.02)


def _replace_model(folder: Path, checksum: str, data: bytes, config: bytes) -> None:
    staged = _staged(folder, checksum)
    files.replace(staged, data)
    files.replace(folder / "config.json", config)
    os.replace(staged, folder / "params.safetensors")
    for left in folder.glob("params-" + "[0-9a-f]" * 16 + ".safetensors"):
        left.unlink(missing_ok=True)  # of one who was killed before step 2


def _staged(folder: Path, checksum: str) -> Path:
    """Where parameters lie until the configuration names them."""
    return folder / f"params-{checksum[:16]}.safetensors"


def load(path: str | Path, *, network: Network | None = None) -> tuple[Diffusion, Params]:
    """Read a model and its parameters from the folder `path`.

    Args:
        path: Folder that `save` wrote.
        network: The network, where it is not one of the library's own.

    Raises:
        ValueError: if a file is missing, altered or of another format, or a network is needed.

    Example:
        >>> import tempfile
        >>> network = networks.RadialBasis((), width=4, T=5, rngs=nnx.Rngs(0))
        >>> diffusion = Diffusion(GaussianKernel(), schedules.harmonic(5), network, event_shape=())
        >>> params = {"x_0_network$params": nnx.to_pure_dict(nnx.state(network))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, diffusion, params)
        ...     again, params_again = load(folder)
        >>> again
        Diffusion(GaussianKernel(), T=5, RadialBasis, event_shape=(), ...)
        >>> same = jax.tree.map(lambda a, b: bool((a == b).all()), params, params_again)
        >>> all(jax.tree.leaves(same))
        True
    """
    check_path("path", path)
    folder = Path(path)
    config, file, data = _read(folder)
    tensors = _unpacked(file, data)
    diffusion = _rebuild(folder / "config.json", config, tensors, network)
    tree = jax.tree.structure(diffusion.params_template)
    names = list(validation.leaves_by_path(diffusion.params_template))
    if sorted(names) != sorted(tensors):
        missing, unknown = sorted(set(names) - set(tensors)), sorted(set(tensors) - set(names))
        found = f"missing: {_short(missing)}, unknown: {_short(unknown)}"
        raise ValueError(f"{file} must hold the parameters of the model; {found}")
    params = jax.tree.unflatten(tree, [jnp.asarray(tensors[name]) for name in names])
    try:
        diffusion.check_params(params)
    except ValueError as error:
        raise ValueError(f"{file} must hold the parameters of the model: {error}") from None
    return diffusion, params


def _config(diffusion: Diffusion) -> dict[str, Any]:
    kind = type(diffusion.network).__name__
    built_in = NETWORKS.get(kind) is type(diffusion.network)
    settings = built_in_config(diffusion.network) if built_in else None
    return {
        "format": _FORMAT, "kernel": _describe(diffusion.kernel), "beta": diffusion.rates.tolist(),
        "beta_learned": isinstance(diffusion.schedule, schedules.LearnedRates),
        "network": {"type": kind, "settings": settings}, "readout": _describe(diffusion.readout),
        "last_step": _describe(diffusion.last_step), "event_shape": diffusion.event_shape,
        "context_shape": diffusion.context_shape, "loc": _as_list(diffusion.loc, 0.0),
        "scale": _as_list(diffusion.scale, 1.0), "name": diffusion.name,
        "data_variance": diffusion.data_variance.tolist(),
    }  # fmt: skip


def _as_list(value: Any, default: float) -> Any:
    return np.asarray(default if value is None else value, np.float64).tolist()


def _describe(part: Any) -> dict[str, Any]:
    """Type and fields of a kernel, readout, variance or last step."""
    if _PARTS.get(kind := type(part).__name__) is not type(part):
        raise ValueError(f"diffusion must be made of built-in parts to be saved; got {kind}")
    fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    values = {k: _describe(v) if dataclasses.is_dataclass(v) else v for k, v in fields.items()}
    return {"type": kind} | values


def _read(folder: Path) -> tuple[dict[str, Any], Path, bytes]:
    """The configuration, and the file and bytes of the parameters that it names."""
    for is_last in (False, False, True):
        config = _read_config(folder / "config.json")
        checksum = _checked(folder / "config.json", "params_sha256", config["params_sha256"])
        for file in (folder / "params.safetensors", _staged(folder, checksum)):
            with contextlib.suppress(FileNotFoundError):
                data = file.read_bytes()
                if checkpoint.sha256(data) == checksum:
                    return config, file, data
        if not is_last:
            time.sleep(0.05)  # perhaps it is being replaced
    file = folder / "params.safetensors"
    if not file.is_file():
        raise ValueError(f"path must be a saved model; {file} is not there")
    raise ValueError(f"{file} must be as it was saved; its checksum is another")


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"path must be a saved model; {file} is not there")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON as saved; {error}") from None
    found = config.get("format") if isinstance(config, dict) else None
    if type(found) is not int or found != _FORMAT:
        raise ValueError(f"{file} must have format {_FORMAT}; got {_short(found)}")
    if config.pop("config_sha256", None) != _digest(config):
        raise ValueError(f"{file} must be as it was saved; its checksum is another")
    config.setdefault("data_variance", 1.0)  # files of before it was one
    _check_names(file, "the configuration", config, ("format", *_FIELDS))
    return config


def _unpacked(file: Path, data: bytes) -> dict[str, np.ndarray]:
    try:
        tensors = checkpoint.unpacked(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{file} must be a safetensors file as saved; {error}") from None
    _check_numbers(tensors, str(file))
    return tensors


def _check_numbers(leaves: dict[str, np.ndarray], where: str) -> None:
    for name, array in leaves.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{where}{name} must be of a floating dtype; got {array.dtype}")
        if not np.isfinite(array.astype(np.float64, copy=False)).all():
            count = int(np.sum(~np.isfinite(array.astype(np.float64, copy=False))))
            raise ValueError(
                f"{where}{name} must be finite; got {count} of {array.size} numbers that are not"
            )


# A configuration is checked field by field, then what is made of it is asked.


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # NaN is not, nor is what overflows


def _are_numbers(value: Any, depth: int = 0) -> bool:
    """A number, or lists of them in lists, as NumPy makes them."""
    if type(value) is not list:
        return _is_number(value)
    return depth < 32 and all(_are_numbers(item, depth + 1) for item in value)


def _is_shape(value: Any) -> bool:
    sizes = type(value) is list and len(value) <= 32
    is_counts = sizes and all(type(n) is int and 1 <= n <= _MOST_NUMBERS for n in value)
    return is_counts and math.prod(value) <= _MOST_NUMBERS


def _is_described(value: Any) -> bool:
    return type(value) is dict and type(value.get("type")) is str


_MOST_NUMBERS = 2**27
"""Of an event: what is larger was not trained."""
_PART = ("a part with its type and fields", _is_described)
_UNITS = ("a number or lists of numbers, all finite", _are_numbers)
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "kernel": _PART,
    "beta": ("a list of numbers", lambda v: type(v) is list and all(map(_is_number, v))),
    "beta_learned": ("true or false", lambda v: type(v) is bool),
    "network": ("an object with type and settings", _is_described),
    "readout": _PART,
    "last_step": _PART,
    "event_shape": (f"a list of counts, {_MOST_NUMBERS} numbers in all at most", _is_shape),
    "context_shape": ("null or a list of counts", lambda v: v is None or _is_shape(v)),
    "loc": _UNITS,
    "scale": _UNITS,
    "data_variance": _UNITS,
    "name": ("a name", lambda v: type(v) is str and v != ""),
    "params_sha256": (
        "a SHA-256",
        lambda v: type(v) is str and re.fullmatch("[0-9a-f]{64}", v) is not None,
    ),
}
_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("an integer", lambda v: type(v) is int and abs(v) < 2**31),
    float: ("a finite number", _is_number),
    Variance: _PART,
}
"""What fields of parts and networks are checked for, by their annotation."""
_SETTINGS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    tuple[int, ...]: ("a list of counts", _is_shape),
    int: ("a count", lambda v: type(v) is int and v >= 0),
    int | None: ("null or a count", lambda v: v is None or (type(v) is int and v >= 1)),
    str | None: ("null or a text", lambda v: v is None or type(v) is str),
}
_LAYERS = {"depth", "dense_depth", "upper_depth", "scales"}
"""Settings of networks that count layers, and widths does by its length."""


def _checked(
    file: Path, field: str, value: Any, kind: tuple[str, Callable[[Any], bool]] | None = None
) -> Any:
    """The value of a field, or a `ValueError` that names file, field, expectation and value."""
    expectation, is_right = _FIELDS[field] if kind is None else kind
    if not is_right(value):
        raise ValueError(f"{field} in {file} must be {expectation}; got {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value) if type(value) is not int or abs(value) < 10**50 else "a huge integer"
    return text if len(text) <= 80 else text[:77] + "..."


def _check_names(file: Path, field: str, values: dict, expected: Iterable[str]) -> None:
    expected = set(expected)
    if values.keys() != expected:
        missing, unknown = sorted(expected - values.keys()), sorted(values.keys() - expected)
        raise ValueError(
            f"{field} in {file} must hold {sorted(expected)}; missing: {missing or 'none'}, "
            f"unknown: {_short(unknown) if unknown else 'none'}"
        )


def _made(file: Path, field: str, make: Callable[..., Any], *args: Any, **values: Any) -> Any:
    """What is made of values from a file; whatever goes wrong in it is the file's fault."""
    try:
        return make(*args, **values)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{field} in {file} must be as it was saved; {reason}") from error


def _revive(file: Path, field: str, described: dict[str, Any], family: Any) -> Any:
    """A kernel, readout, variance or last step."""
    fitting = {name: cls for name, cls in _PARTS.items() if issubclass(cls, family)}
    if (kind := described["type"]) not in fitting:
        known = f"built-in parts {sorted(fitting)}"
        raise ValueError(f"{field} in {file} must name {known}; got {_short(kind)}")
    expected = {f.name: f for f in dataclasses.fields(fitting[kind])}
    _check_names(file, field, described, ("type", *expected))
    values = {}
    for name, f in expected.items():
        here = f"{field}.{name}"
        values[name] = _checked(file, here, described[name], _KINDS.get(f.type, _UNITS))
        if f.type is Variance:
            values[name] = _revive(file, here, values[name], Variance)
    return _made(file, field, fitting[kind], **values)


def _rebuild(
    file: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], network: Network | None
) -> Diffusion:
    for field in _FIELDS:
        _checked(file, field, config[field])
    beta = _made(file, "beta", schedules.check_beta, config["beta"])
    if network is None:
        network = _network(file, config, tensors)
    context_shape = config["context_shape"]
    return _made(
        file, "the configuration", Diffusion,
        _revive(file, "kernel", config["kernel"], (GaussianKernel, DiscreteKernel)),
        _made(file, "beta", schedules.learned, beta) if config["beta_learned"] else beta,
        network, event_shape=tuple(config["event_shape"]),
        readout=_revive(file, "readout", config["readout"], (GaussianReadout, DiscreteReadout)),
        last_step=_revive(file, "last_step", config["last_step"], LastStep),
        loc=_made(file, "loc", np.asarray, config["loc"], np.float64),
        scale=_made(file, "scale", np.asarray, config["scale"], np.float64),
        data_variance=_made(file, "data_variance", np.asarray, config["data_variance"], np.float64),
        context_shape=None if context_shape is None else tuple(context_shape), name=config["name"],
    )  # fmt: skip


def _network(file: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Network:
    """A built-in network, its arguments held against the parameters before it is made."""
    described = config["network"]
    _check_names(file, "network", described, ("type", "settings"))
    kind, saved = described["type"], described["settings"]
    if saved is None or kind not in NETWORKS:
        known = f"is not one of the built-in {sorted(NETWORKS)}"
        raise ValueError(f"network must be given: {_short(kind)} {known}, in {file}")
    _checked(file, "network.settings", saved, ("an object", lambda v: type(v) is dict))
    signature = inspect.signature(NETWORKS[kind].__init__).parameters
    expected = {n: p.annotation for n, p in signature.items() if n not in ("self", "rngs")}
    _check_names(file, "network.settings", saved, expected)
    numbers = sum(tensor.size for tensor in tensors.values())
    most = max(numbers, len(config["beta"]), math.prod(config["event_shape"]))
    for name, annotation in expected.items():
        field, value = (
            f"network.settings.{name}",
            _checked(file, f"network.settings.{name}", saved[name], _SETTINGS[annotation]),
        )
        sizes = value if type(value) is list else [value] if type(value) is int else []
        layers = value if name in _LAYERS else len(sizes)
        if max(sizes, default=0) > most or layers > max(len(tensors), len(config["event_shape"])):
            text = f"no more than the {numbers} parameters in {len(tensors)} arrays say"
            raise ValueError(f"{field} in {file} must be {text}; got {_short(value)}")
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()}

    def make() -> Network:
        return NETWORKS[kind](**settings, rngs=nnx.Rngs(0))

    abstract = _made(file, "network.settings", nnx.eval_shape, make)
    prefix = f"['{config['name']}_network$params']"
    leaves = validation.leaves_by_path(nnx.to_pure_dict(nnx.state(abstract, nnx.Param)))
    for name, leaf in leaves.items():
        found = tensors.get(prefix + name)
        if found is None or found.shape != leaf.shape:
            got = "none" if found is None else f"shape {found.shape}"
            raise ValueError(
                f"network.settings in {file} must be those of the parameters: by them {name} of "
                f"{config['name']!r} has shape {leaf.shape}; got {got}"
            )
    return _made(file, "network.settings", make)


def _digest(config: dict[str, Any]) -> str:
    return checkpoint.sha256(json.dumps(config, sort_keys=True).encode())
