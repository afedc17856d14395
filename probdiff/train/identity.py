"""What tells the program of a run from others: its step, its parts by name, its first losses.

A checkpoint goes on only in the run that it is of. Data, key and options are compared as they are
(see `data.identity`). Program, objective and optimiser are code, and are compared in three ways,
each where the one before it cannot decide.

    operations    of one step as they were traced, and its constants: equal, so is the run
    parts         readable: hyperparameters and learning rates of the optimiser, the objective, the
                  sites of guide and model; where one differs the run is another, and it is named
    first losses  of the first steps done again; they decide what is left: a rewritten program, or
                  other versions of JAX or NumPyro, in which operations and parts have other names

Operations and parts are those of one environment: versions, platform, the package's own source.
"""

import functools
import hashlib
import importlib.metadata
import inspect
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from numpyro.infer import SVI

from probdiff.compilation import Traced
from probdiff.reverse import Reverse

_PACKAGES = ("jax", "jaxlib", "numpyro", "flax", "optax")
_COUNTS = (0, 1, 10, 100, 1_000, 10_000, 100_000)
"""Steps at which a learning rate's schedule is looked at."""
_DEPTH = 12
"""Of objects within objects; those of optax reach 8."""


class Program(NamedTuple):
    """A step's program; made of what JSON can hold."""

    environment: dict[str, str]
    operations: str
    constants: list[list[float]]
    """Number of entries, mean, root of the mean square of each, and of its product with a wave."""
    parts: dict[str, str]

    def text(self) -> str:
        """As JSON."""
        return json.dumps(self._asdict(), sort_keys=True)

    def is_same(self, other: "Program | None") -> bool:
        """Whether a step computes the same; the last digits of constants are their machine's."""
        if other is None or self.operations != other.operations:
            return False
        one, two = (np.asarray(p.constants, np.float64).reshape(-1, 4) for p in (self, other))
        if one.shape != two.shape:
            return False
        return bool((np.abs(one - two) <= 1e-6 * np.maximum(one[:, 2:3], two[:, 2:3])).all())

    def differences(self, other: "Program | None") -> list[tuple[str, str, str]]:
        """Names of parts, what they are there, and here; of one environment."""
        if other is None or self.environment != other.environment:
            return []
        # First what both have, then numbers, then names of functions.
        names = sorted(self.parts.keys() & other.parts)
        names += sorted(self.parts.keys() ^ other.parts, key=lambda name: ("." not in name, name))
        both = ((n, other.parts.get(n, "nothing"), self.parts.get(n, "nothing")) for n in names)
        return [(name, there, here) for name, there, here in both if there != here]


def program(svi: SVI, step: Traced, sites: dict[str, dict[str, dict]]) -> Program:
    """Of an SVI's step as it was traced, and the sites of its guide and model, by these names."""
    # Of its three functions the update holds all that the others do.
    options = {k: v for k, v in vars(svi.optim).items() if k not in ("init_fn", "get_params_fn")}
    parts = {"optimiser": type(svi.optim).__name__, "objective": type(svi.loss).__name__}
    parts |= dict(_numbered(_parts({"": options.pop("update_fn", None), **options}, "optimiser")))
    parts |= dict(_numbered(_parts(vars(svi.loss), "objective")))
    for name, found in sites.items():
        for site, message in found.items():
            if message["type"] in ("sample", "param"):
                parts |= dict(_numbered(_site(f"site {site!r} of the {name}", message)))
    return Program(_environment(), step.code.portable_digest(), _sketches(step.consts), parts)


def read(text: str | None) -> Program | None:
    """What `Program.text` made; None if there is none, as in older files, or it is another's."""
    try:
        return None if text is None else Program(**json.loads(text))
    except (TypeError, ValueError):
        return None


@functools.cache
def _source() -> str:
    """Of this package: another one may do a step by other operations."""
    total = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        total.update(file.read_bytes())
    return total.hexdigest()


def _environment() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    python = ".".join(platform.python_version_tuple()[:2])
    own = {"python": python, "platform": jax.default_backend(), "source": _source()}
    return versions | own


def _sketches(constants: list[Any]) -> list[list[float]]:
    return [_sketch(np.asarray(_words(c)).astype(np.float64, copy=False)) for c in constants]


def _words(array: Any) -> Any:
    is_key = jax.dtypes.issubdtype(jax.numpy.result_type(array), jax.dtypes.prng_key)
    return jax.random.key_data(array) if is_key else array


def _sketch(array: np.ndarray) -> list[float]:
    """A few numbers that tell arrays apart, whatever their last digits."""
    values = array.ravel()
    if not values.size:
        return [0.0, 0.0, 0.0, 0.0]
    # Infinities (a mask's), NaN and the largest floats would hide all that stands beside them.
    signs = np.clip(np.nan_to_num(values, nan=0.5), -1, 1)
    values = np.where(np.abs(values) < 1e100, values, signs)
    wave = np.cos(np.arange(values.size) ** 1.5)
    size, mean, rms = values.size, values.mean(), np.sqrt(np.mean(values**2))
    return [float(size), float(mean), float(rms), float(np.mean(values * wave))]


def _site(name: str, message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if message["type"] == "param":
        shapes = jax.tree_util.tree_leaves_with_path(message["value"])
        yield f"{name}", str([(jax.tree_util.keystr(p), np.shape(leaf)) for p, leaf in shapes])
        return
    fn = message["fn"]
    while fn is not None:
        yield f"{name}, law", type(fn).__name__
        reverse = getattr(fn, "reverse", None)
        if isinstance(reverse, Reverse):
            for part in ("kernel", "readout", "last_step", "event_shape", "context_shape"):
                yield part, repr(getattr(reverse, part))
            yield "rates", _text(reverse.steps.beta)
            yield from ((name, _text(value)) for name, value in reverse.units._asdict().items())
        for parameter in sorted(fn.arg_constraints):
            yield f"{name}, {parameter}", _text(getattr(fn, parameter, None))
        fn = getattr(fn, "base_dist", None)


def _numbered(parts: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Names made different: a second gets a 2."""
    seen: dict[str, int] = {}
    for name, text in parts:
        seen[name] = seen.get(name, 0) + 1
        yield (name if seen[name] == 1 else f"{name} ({seen[name]})"), text


def _parts(value: Any, name: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Names and texts of all that an object holds, the variables of functions among it."""
    if depth > _DEPTH or isinstance(value, ModuleType):
        return
    if isinstance(value, functools.partial):
        held = {"": value.func, **value.keywords}
        held |= {f"argument {i}": argument for i, argument in enumerate(value.args)}
    elif isinstance(value, MethodType):
        held = {"": value.__func__, "self": value.__self__}
    elif isinstance(value, FunctionType):
        rates = _scheduled(value)
        if rates is not None:
            yield f"{name} at steps {', '.join(map(str, _COUNTS))}", rates
            return
        name = f"{name.split(':')[0]}: {value.__qualname__.split('.')[0]}"
        yield name, value.__qualname__
        held = inspect.getclosurevars(value).nonlocals
    elif isinstance(value, tuple) and getattr(value, "_fields", None):
        held = value._asdict()
    elif isinstance(value, tuple | list):
        held = {f"[{i}]": item for i, item in enumerate(value)}
    elif isinstance(value, dict):
        held = {str(key): item for key, item in value.items()}
    elif _is_plain(value) or not getattr(value, "__dict__", None):
        yield name, _text(value)
        return
    else:
        yield name, type(value).__name__
        held = vars(value)
    for key, item in held.items():
        yield from _parts(item, _joined(name, key), depth + 1)


def _joined(name: str, key: str) -> str:
    return name + key if not key or key.startswith("[") else f"{name}.{key}"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(
        value, bool | int | float | str | np.ndarray | np.generic | jax.Array | type
    )


def _text(value: Any) -> str:
    """A value that every process says alike."""
    if isinstance(value, jax.core.Tracer):
        return f"computed, {value.dtype}{value.shape}"
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = np.asarray(_words(value))
        if value.ndim == 0 or value.size <= 4:
            return f"{value.dtype} {np.array2string(value, precision=6)}"
        numbers = " ".join(f"{number:.6g}" for number in _sketch(value.astype(np.float64))[1:])
        return f"{value.dtype}{value.shape} {numbers}"
    if isinstance(value, type):
        return value.__name__
    return repr(value) if _is_plain(value) else type(value).__name__


def _scheduled(function: FunctionType) -> str | None:
    """What a learning rate's schedule says, or None if the function is none."""
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    if len(needed) != 1 or needed[0].kind in (needed[0].VAR_KEYWORD, needed[0].VAR_POSITIONAL):
        return None
    try:
        with jax.ensure_compile_time_eval():
            rates = [float(function(np.int32(count))) for count in _COUNTS]
    except Exception:  # a function of something else
        return None
    return ", ".join(f"{rate:.6g}" for rate in rates)
