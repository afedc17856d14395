"""Saved models: a folder with `params.safetensors` and `config.json`, no pickle.

`config.json` holds what `Diffusion` was made of, and the checksum of the parameters' file; built-in
networks are rebuilt from their arguments by an allow-list, others have to be handed to `load`.
Each file is written beside its place and renamed into it, the configuration last, so that a killed
`save` leaves either the old model, or a mismatch that `load` names.
"""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from probdiff import files, kernels, networks, readouts, schedules, validation
from probdiff.diffusion import Diffusion
from probdiff.networks.binding import built_in_config
from probdiff.train import checkpoint
from probdiff.types import Network, Params

_FORMAT = 1
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
        ValueError: if the parameters do not fit the model, or a part is not the package's own.

    Example:
        See `load`, the way back:

        >>> import os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, standard_diffusion(), {})
        ...     sorted(os.listdir(folder))
        ['config.json', 'params.safetensors']
    """
    diffusion.check_params(params)
    leaves = validation.leaves_by_path(params)
    data = safetensors.numpy.save({name: np.asarray(a, order="C") for name, a in leaves.items()})
    config = _config(diffusion) | {"params_sha256": checkpoint.sha256(data)}
    config |= {"config_sha256": _digest(config)}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    files.replace(folder / "params.safetensors", data)
    files.replace(folder / "config.json", json.dumps(config, indent=1).encode())


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
    folder = Path(path)
    config = _read_config(folder / "config.json")
    diffusion = _rebuild(config, network)
    file = folder / "params.safetensors"
    if not file.is_file():
        raise ValueError(f"path must be a saved model; {file} is not there")
    data = file.read_bytes()
    if checkpoint.sha256(data) != config["params_sha256"]:
        raise ValueError(f"{file} must be as it was saved; its checksum is another")
    tensors = checkpoint.unpacked(data)
    tree = jax.tree.structure(diffusion.params_template)
    names = list(validation.leaves_by_path(diffusion.params_template))
    if sorted(names) != sorted(tensors):
        raise ValueError(f"{file} must hold the parameters {sorted(names)}; got {sorted(tensors)}")
    params = jax.tree.unflatten(tree, [jnp.asarray(tensors[name]) for name in names])
    diffusion.check_params(params)
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


def _revive(described: dict[str, Any]) -> Any:
    values = {k: v for k, v in described.items() if k != "type"}
    values = {k: _revive(v) if isinstance(v, dict) else v for k, v in values.items()}
    if (kind := described["type"]) not in _PARTS:
        raise ValueError(f"config.json must name built-in parts {sorted(_PARTS)}; got {kind!r}")
    return _PARTS[kind](**values)


def _rebuild(config: dict[str, Any], network: Network | None) -> Diffusion:
    described = config["network"]
    if network is None:
        if described["settings"] is None or described["type"] not in NETWORKS:
            known = f"is not one of the built-in {sorted(NETWORKS)}"
            raise ValueError(f"network must be given: {described['type']!r} {known}")
        saved = described["settings"].items()
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in saved}
        network = NETWORKS[described["type"]](**settings, rngs=nnx.Rngs(0))
    beta = np.asarray(config["beta"])
    context_shape = config["context_shape"]
    return Diffusion(
        _revive(config["kernel"]), schedules.learned(beta) if config["beta_learned"] else beta,
        network, event_shape=tuple(config["event_shape"]), readout=_revive(config["readout"]),
        last_step=_revive(config["last_step"]), loc=np.asarray(config["loc"]),
        scale=np.asarray(config["scale"]),
        context_shape=None if context_shape is None else tuple(context_shape), name=config["name"],
    )  # fmt: skip


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"path must be a saved model; {file} is not there")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} must be JSON as saved; {error}") from None
    found = config.get("format") if isinstance(config, dict) else None
    if found != _FORMAT:
        raise ValueError(f"{file} must have format {_FORMAT}; got {found}")
    if config.pop("config_sha256", None) != _digest(config):
        raise ValueError(f"{file} must be as it was saved; its checksum is another")
    return config


def _digest(config: dict[str, Any]) -> str:
    return checkpoint.sha256(json.dumps(config, sort_keys=True).encode())
