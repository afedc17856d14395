"""Several priors of one program as one prior: the product of their laws.

Priors are independent before anything is observed, so that their trajectories, side by side, are
one trajectory of a diffusion of all their numbers,

    p(x_0:T) p(z_0:T) = p((x, z)_0:T),    E[(x_0, z_0) | x_t, z_t] = (x̂_0(x_t), ẑ_0(z_t)),

whose network asks the network of each at its own entries. What conditions a prior conditions this
one, and moves all trajectories of a system at once: x and z may be told by their sum alone.

Entries of plates that all priors stand in are systems. A plate around some of them, as of z_g below
a common x, is part of the event: all z_g and x hang on each other in one posterior. The event is
flat, `(d,)`: of each prior in turn its own plates, then its event.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from probdiff.prior import Covariance, PriorDraw
from probdiff.reverse import Reverse, Units


@dataclasses.dataclass(frozen=True)
class Part:
    """What one prior has of x_0."""

    name: str  # of the site of its x_0
    is_known: bool  # whether some of its entries are known
    plates: tuple[int, ...]  # shape of all plates around it
    own: tuple[int, ...]  # axes of those that not all priors stand in
    event_shape: tuple[int, ...]

    @property
    def copies(self) -> int:
        """Entries of its own plates."""
        return math.prod(self.plates[axis] for axis in self.own)

    @property
    def size(self) -> int:
        """Numbers in the event of the product."""
        return self.copies * math.prod(self.event_shape)

    @property
    def _axes(self) -> tuple[int, ...]:
        """Axes of the plates, its own behind the others."""
        return (*(i for i in range(len(self.plates)) if i not in self.own), *self.own)

    def flat(self, value: Any, shape: tuple[int, ...], systems: tuple[int, ...]) -> np.ndarray:
        """A value that broadcasts to `(*plates, *shape)` as `(*systems, numbers)`."""
        value = np.broadcast_to(np.asarray(value), (*self.plates, *shape))
        last = range(len(self.plates), value.ndim)
        return value.transpose(*self._axes, *last).reshape(*systems, -1)

    def shaped(self, x: Any, systems: int) -> Any:
        """`(*lead, *systems, size)`, of so many axes of systems, as `(*lead, *plates, *event)`."""
        lead = x.shape[: x.ndim - 1 - systems]
        plates = tuple(self.plates[axis] for axis in self._axes)
        x = x.reshape(*lead, *plates, *self.event_shape)
        back = (len(lead) + place for place in np.argsort(self._axes))
        last = range(len(lead) + len(plates), x.ndim)
        return x.transpose(*range(len(lead)), *map(int, back), *last)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the priors of a program stand in x_0; of a single one x_0 is its own."""

    plates: tuple[int, ...]  # shape of the plates that all priors stand in: one system each
    parts: tuple[Part, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Sites of x_0."""
        return tuple(part.name for part in self.parts)

    def split(self, x_0: Any) -> dict[str, Any]:
        """x_0 `(*lead, *plates, *event_shape)`, by site as the program has it."""
        if len(self.parts) == 1:
            return {self.parts[0].name: x_0}
        ends = np.cumsum([0, *(part.size for part in self.parts)])
        return {
            part.name: part.shaped(x_0[..., low:high], len(self.plates))
            for part, (low, high) in zip(self.parts, itertools.pairwise(ends), strict=True)
        }

    def product(self, draws: Sequence[PriorDraw]) -> PriorDraw:
        """The prior of x_0; a single one as it is.

        Raises:
            ValueError: if priors differ in kernel, readout, last step or rates.
        """
        if len(draws) == 1:
            return draws[0]
        _check_alike(draws)
        pairs = list(zip(self.parts, draws, strict=True))
        is_known = any(part.is_known for part in self.parts)
        known, mask = zip(*(self._known(*pair) for pair in pairs), strict=True)
        return PriorDraw(
            " and ".join(self.names), self._reverse(draws),
            np.concatenate([_of_entries(part, draw, draw.variance) for part, draw in pairs]),
            _covariance(pairs),
            np.concatenate(known, -1) if is_known else None,
            np.concatenate(mask, -1) if is_known else None,
        )  # fmt: skip

    def _known(self, part: Part, draw: PriorDraw) -> tuple[np.ndarray, np.ndarray]:
        """Known entries and where they are, `(*plates, size)` each."""
        none = np.zeros((), draw.reverse.kernel.dtype), np.array(False)
        values = (draw.known, draw.mask) if part.is_known else none
        values = (part.flat(value, part.event_shape, self.plates) for value in values)
        return tuple(values)

    def _reverse(self, draws: Sequence[PriorDraw]) -> Reverse:
        first, reverses = draws[0].reverse, [draw.reverse for draw in draws]
        pairs = list(zip(self.parts, draws, strict=True))
        units = Units()
        if first.units.scale is not None:
            ends = ([getattr(r.units, end) for r in reverses] for end in ("loc", "scale"))
            units = Units(*(
                np.concatenate([_of_entries(*pair, v) for pair, v in zip(pairs, row, strict=True)])
                for row in ends
            ))  # fmt: skip
        given = [
            part.flat(draw.reverse.context, draw.reverse.context_shape, self.plates)
            for part, draw in pairs if draw.reverse.context is not None
        ]  # fmt: skip
        context = jnp.concatenate([jnp.asarray(c) for c in given], -1) if given else None
        dtypes = tuple(None if r.context is None else jnp.asarray(r.context).dtype
                       for r in reverses)  # fmt: skip
        network = _Networks(tuple(map(_of_time, reverses)), self.parts, dtypes)
        return dataclasses.replace(
            first, event_shape=(sum(part.size for part in self.parts),), network=network,
            units=units, context=context,
            context_shape=None if context is None else context.shape[-1:],
        )  # fmt: skip


def layout(sites: Sequence[dict[str, Any]], names: Sequence[str]) -> Layout:
    """Where priors stand, told by the sites of their trajectories; `names` are those of x_0.

    Raises:
        ValueError: if one of several priors has rows that no plate has.
    """
    shapes = [site["fn"].batch_shape for site in sites]
    draws = [site["infer"]["prior"] for site in sites]
    frames = {frame.dim: frame.size for frame in shared_frames(sites)}
    systems, own = shapes[0], [()]
    if len(sites) > 1:
        systems = tuple(frames.get(dim, 1) for dim in range(min(frames, default=0), 0))
        own = [
            tuple(i for i, size in enumerate(s) if size > 1 and i - len(s) not in frames)
            for s in shapes
        ]
        for site, shape, axes in zip(sites, shapes, own, strict=True):
            _check_rows(site, shape, axes)
    parts = (
        Part(name, draw.known is not None, shape, axes, draw.reverse.event_shape)
        for name, draw, shape, axes in zip(names, draws, shapes, own, strict=True)
    )
    return Layout(systems, tuple(parts))


def shared_frames(sites: Sequence[dict[str, Any]]) -> list[Any]:
    """Plates that all of some sites stand in."""
    first, *others = (site["cond_indep_stack"] for site in sites)
    return [frame for frame in first if all(frame in stack for stack in others)]


def _check_rows(site: dict[str, Any], shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    plates = {len(shape) + frame.dim for frame in site["cond_indep_stack"]}
    if set(axes) - plates:
        raise ValueError(
            f"prior {site['infer']['prior'].name!r}, one of several, must stand in a plate for "
            f"each axis of its rows; got rows of shape {shape}"
        )


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["reverses"], meta_fields=["parts", "dtypes"]
)
@dataclasses.dataclass(frozen=True)
class _Networks:
    """The network of a product: each prior's at its own entries."""

    reverses: tuple[Reverse, ...]
    parts: tuple[Part, ...]
    dtypes: tuple[Any, ...]  # of their contexts, None without

    def __call__(self, x_t: Array, t: Array, context: Array | None = None) -> Array:
        """Outputs `(B, count · d)`, the j-th of all numbers together, at states `(B, d)`."""
        outputs, low, at = [], 0, 0
        for reverse, part, dtype in zip(self.reverses, self.parts, self.dtypes, strict=True):
            lead = len(x_t), part.copies
            x = x_t[:, low : low + part.size].reshape(*lead, *part.event_shape)
            low += part.size
            if dtype is not None:
                size = part.copies * math.prod(reverse.context_shape)
                own = context[:, at : at + size].reshape(*lead, *reverse.context_shape)
                reverse, at = dataclasses.replace(reverse, context=own.astype(dtype)), at + size
            outputs.append([out.reshape(len(x_t), -1) for out in reverse.outputs(x, t[:, None])])
        return jnp.concatenate([out for row in zip(*outputs, strict=True) for out in row], -1)


def _of_time(reverse: Reverse) -> Reverse:
    """The process that is asked by time, its context to be given."""
    return dataclasses.replace(reverse, steps=reverse.trained, context=None)


def _of_entries(part: Part, draw: PriorDraw, values: Any) -> np.ndarray:
    """Numbers that broadcast to a prior's event, `(size,)`."""
    shape = draw.reverse.event_shape
    return np.broadcast_to(np.asarray(values), (part.copies, *shape)).reshape(-1)


def _covariance(pairs: list[tuple[Part, PriorDraw]]) -> Covariance | None:
    """In blocks, a variance being diagonal; None where all have variances."""
    if all(draw.covariance is None for _, draw in pairs):
        return None
    size = sum(part.size for part, _ in pairs)
    axes, variances, low = np.eye(size), np.ones(size), 0
    for part, draw in pairs:
        here = slice(low, low := low + part.size)
        variances[here] = _of_entries(part, draw, draw.variance)
        if draw.covariance is not None:
            axes[here, here] = np.kron(np.eye(part.copies), draw.covariance.axes)
            variances[here] = np.tile(draw.covariance.variances, part.copies)
    return Covariance(axes, variances)


def _check_alike(draws: Sequence[PriorDraw]) -> None:
    first, name = draws[0].reverse, draws[0].name
    for draw in draws[1:]:
        other = draw.reverse
        both = f"priors {name!r} and {draw.name!r} of one program must have the same"
        for what in ("kernel", "readout", "last_step"):
            pair = getattr(first, what), getattr(other, what)
            if pair[0] != pair[1]:
                raise ValueError(
                    f"{both} {what}; got {pair[0]} and {pair[1]}. Make both diffusions with one"
                    f"{_otherwise(first, other)}"
                )
        if (first.T, first.n) != (other.T, other.n):
            got = f"T = {first.T} and {other.T}, {first.n} and {other.n} levels"
        elif not np.array_equal(first.trained.beta, other.trained.beta):
            t = int(np.argmax(np.asarray(first.trained.beta) != np.asarray(other.trained.beta)))
            ends = (float(r.trained.beta[t]) for r in (first, other))
            got = "beta_{} = {:.6g} and {:.6g}".format(t + 1, *ends)
        else:
            continue
        raise ValueError(
            f"{both} rates; got {got}. Make both diffusions with one schedule"
            f"{_otherwise(first, other)}"
        )


def _otherwise(*reverses: Reverse) -> str:
    """What to do where numbers cannot be trained again."""
    if any(reverse.kernel.is_discrete for reverse in reverses):
        return ""
    return (
        "; from_denoiser(..., beta=rates) takes a denoiser to other rates, and "
        "MCMC(NUTS(infer.forward_coordinates(program))) any priors of numbers"
    )
