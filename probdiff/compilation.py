"""What is compiled, and when: one rule for the whole package.

A function that a user wrote (a NumPyro program, a network, a guide) reads more than its arguments:
closures, globals, objects that change. So it is traced at every use, which costs milliseconds and
sees what it reads now. `Traced` is what comes of it: the operations, and beside them the constants
that they read. It is a pytree. Its leaves are the constants; the rest compares by content, so that
two tracings of the same code over other data have the same structure.

Functions of such values, of weights and of data are compiled: all that varies is an argument.
`Programs` keeps them by function, static options, and structure and shapes of the arguments. So
nothing is compiled again unless what is computed has changed, and nothing stale is run. Each object
with its own code (a network bound by `Diffusion`, an `SVI`) has its `Programs`, which keep the last
few and go with the object.
"""

import collections
import functools
import hashlib
import re
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

KEPT = 24  # compiled functions of one object: each holds tens of a process's 65,530 memory maps
# operations whose parameters hold Python functions that are new at each trace
_RULES = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


class Code:
    """Operations and the structure of what they return; equal if they compute the same."""

    def __init__(self, jaxpr: core.Jaxpr, out_tree: jax.tree_util.PyTreeDef):
        self.jaxpr, self.out_tree = jaxpr, out_tree
        self._digest = hashlib.sha256(_text(jaxpr).encode()).hexdigest()

    def portable_digest(self) -> str:
        """SHA-256 of the operations, the same in every process."""
        return hashlib.sha256(
            re.sub(r" at 0x[0-9a-f]+", "", _text(self.jaxpr)).encode()
        ).hexdigest()

    def __eq__(self, other: object) -> bool:
        is_code = isinstance(other, Code)
        return is_code and (self._digest, self.out_tree) == (other._digest, other.out_tree)

    def __hash__(self) -> int:
        return hash(self._digest)


@jax.tree_util.register_pytree_node_class
class Traced:
    """A function of arrays as it was when it was traced; called with arrays of the same shapes."""

    def __init__(self, consts: Any, code: Code):
        self.consts, self.code = consts, code

    def tree_flatten(self) -> tuple[tuple, Code]:
        """The constants, and the operations."""
        return (self.consts,), self.code

    @classmethod
    def tree_unflatten(cls, code: Code, children: tuple) -> "Traced":
        """The way back."""
        return cls(*children, code)

    def fingerprint(self) -> Hashable:
        """Of the operations and the constants: equal where the function is the same."""
        if any(isinstance(const, jax.core.Tracer) for const in self.consts):
            return object()  # inside another trace values are not known
        return self.code, tuple(map(_value, self.consts))

    def is_same(self, other: "Traced") -> bool:
        """Whether another tracing found the same, but for the addresses of functions."""
        mine, others = self.code, other.code
        if mine != others and _without_addresses(mine) != _without_addresses(others):
            return False
        both = self.consts, other.consts
        return len(both[0]) == len(both[1]) and all(map(is_equal, *both))

    def __call__(self, *args: Any) -> Any:
        closed = core.ClosedJaxpr(self.code.jaxpr, self.consts)
        leaves = core.jaxpr_as_fun(closed)(*jax.tree.leaves(args))
        return jax.tree.unflatten(self.code.out_tree, leaves)


def trace(function: Callable, *args: Any) -> Traced:
    """Trace a function of pytrees of arrays, or of their shapes."""

    def anew(*args: Any) -> Any:  # JAX would keep what it traced of `function` itself
        return function(*args)

    jaxpr, shapes = jax.make_jaxpr(anew, return_shape=True)(*args)
    # NumPy's are copied: they may change in place, and would travel to the device at every call.
    consts = [jnp.array(c) if isinstance(c, np.ndarray) else c for c in jaxpr.consts]
    return Traced(consts, Code(jaxpr.jaxpr, jax.tree.structure(shapes)))


class Programs:
    """The compiled functions of one object, the last few that were used."""

    def __init__(self) -> None:
        self._kept: collections.OrderedDict[Hashable, Callable] = collections.OrderedDict()

    def __call__(self, function: Callable, *args: Any, **static: Hashable) -> Any:
        """`function(*args, **static)`, compiled at most once for arguments like these.

        Args:
            function: A function of a module, which reads nothing but its arguments.
            args: Pytrees of arrays.
            static: Options, compared by value and type.
        """
        leaves, tree = jax.tree.flatten(args)
        options = tuple((name, type(value), value) for name, value in sorted(static.items()))
        key = function, options, tree, tuple(map(_shape, leaves))
        if key not in self._kept:
            self._kept[key] = jax.jit(functools.partial(function, **static))
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key](*args)


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """All operations of a jaxpr, those inside its loops and calls too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for leaf in jax.tree.leaves(list(eqn.params.values())):
            if isinstance(leaf, core.ClosedJaxpr | core.Jaxpr):
                yield from equations(getattr(leaf, "jaxpr", leaf))


def call(function: Callable, *args: Any) -> Any:
    """`function(*args)`: what `Programs` compile of a `Traced` by itself."""
    return function(*args)


def is_equal(a: Any, b: Any) -> bool:
    """Whether two constants are equal, bit for bit; values within a trace are taken to be."""
    if a is b or any(isinstance(value, jax.core.Tracer) for value in (a, b)):
        return True
    return a is not None and b is not None and _value(a) == _value(b)


def _without_addresses(code: Code) -> tuple[str, Any]:
    return re.sub(r" at 0x[0-9a-f]+", "", _text(code.jaxpr)), code.out_tree


def _shape(leaf: Any) -> Hashable:
    return jax.typeof(leaf), getattr(leaf, "sharding", None)


def _text(jaxpr: core.Jaxpr) -> str:
    """All that a jaxpr computes, as text: variables by number, constants by their bytes."""
    numbers: dict[core.Var, int] = {}

    def atom(a: core.Var | core.Literal) -> str:
        if isinstance(a, core.Literal):
            return _value(np.asarray(a.val)) + repr(a.aval)
        return f"{numbers.setdefault(a, len(numbers))}{a.aval!r}"

    lines = [" ".join(map(atom, (*jaxpr.constvars, *jaxpr.invars)))]
    for eqn in jaxpr.eqns:
        is_rule = eqn.primitive.name in _RULES
        params = (f"{k}={_value(v, is_rule=is_rule)}" for k, v in sorted(eqn.params.items()))
        inputs, outputs = (" ".join(map(atom, side)) for side in (eqn.invars, eqn.outvars))
        lines.append(f"{eqn.primitive.name}[{' '.join(params)}] {inputs} -> {outputs}")
    return "\n".join([*lines, " ".join(map(atom, jaxpr.outvars))])


def _value(value: Any, *, is_rule: bool = False) -> str:
    """A parameter of an operation as text."""
    if isinstance(value, core.ClosedJaxpr):
        return f"({_text(value.jaxpr)})" + "".join(map(_value, value.consts))
    if isinstance(value, core.Jaxpr):
        return f"({_text(value)})"
    if isinstance(value, tuple | list):
        return "(" + ",".join(_value(v, is_rule=is_rule) for v in value) + ")"
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        array = np.asarray(value)
        return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value)) if is_rule else repr(value)
