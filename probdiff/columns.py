"""What data say of themselves, column by column, before anything is computed of them.

A column is one entry of an example, over the examples. On the scale of the diffusion,
x = (x_0 − loc)/scale, a column should have second moment near 1, as x_T ~ π has, or near the
`data_variance` that a `Diffusion` was told. What else goes wrong without a word is told here, of
numbers that are no grid's:

    few values     a density has no limit on a lattice of step Δ: of the nats that training gains,
                   up to log(Δ/√(2πe β_1)) for each number are the lattice, not the law
    one value      the same where a share of the rows hold one value; or all of them
    few rows       Σ x⁴ ≈ (Σ x²)²: a few rows make the column's scale, and the others have none
    other scales   x_1 has noise of variance β_1: what is narrower is hidden in it
    copies         two columns that are one have no density

Sums run over blocks of rows, in float64; values are compared in a sample of rows.
"""

import math
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from probdiff.kernels import DiscreteKernel, Kernel

FEW_ROWS = 32
"""Fewer examples say nothing of a second moment."""
_BLOCK, _SAMPLE = 2**20, 2**20  # numbers of a block of rows, and of the sample
_MOST_ROWS, _MOST_COLUMNS = 1000, 512  # of the sample; and of those looked through for copies
_TIED = 0.1  # share of rows with another's value from which a column is looked at
_WIDE = 25.0  # second moment that is far from 1 by itself
_NAMED = 3  # columns named in a warning


class _Sums(NamedTuple):
    """Sums over rows of powers of x, `(*event_shape,)`, observed entries alone."""

    count: np.ndarray
    first: np.ndarray
    second: np.ndarray
    fourth: np.ndarray


def check_columns(
    kernel: Kernel, event_shape: tuple[int, ...], rates: np.ndarray, units: tuple[Any, Any],
    x_0: Any, mask: Any, *, is_on_grid: np.ndarray, variance: float = 1.0,
) -> None:  # fmt: skip
    """Warn of columns that no diffusion of these rates can learn as they are.

    Args:
        kernel: Of numbers; nothing is said of symbols.
        event_shape: Shape of one example.
        rates: β_1..β_T.
        units: loc and scale.
        x_0: Data in the user's units, `(..., *event_shape)`, checked and concrete.
        mask: True where x_0 is observed, or None.
        is_on_grid: Where x_0 takes the values of a grid, for which second moments alone count;
            of a shape that broadcasts to the event.
        variance: Second moment that a number should have.

    Raises:
        ValueError: if numbers are so far out that their squares overflow.
    """
    if isinstance(kernel, DiscreteKernel):
        return
    rows = np.asarray(x_0).reshape(-1, *event_shape)
    seen = None if mask is None else np.asarray(mask).reshape(rows.shape)
    loc, scale = (np.broadcast_to(np.asarray(u, np.float64), event_shape) for u in units)
    sums = _sums(rows, seen, loc, scale)
    _check_range(kernel, sums, rows, event_shape)
    if len(rows) < FEW_ROWS or not sums.count.any():
        return
    moment = float(sums.second.sum() / sums.count.sum())
    is_moment_far = not 0.5 <= moment / variance <= 2
    if is_moment_far:
        _warn_about_moment(moment, variance, math.prod(event_shape), rates)
    if is_on_grid.all():
        return
    sample, said = _sample(rows, seen), np.broadcast_to(is_on_grid, event_shape).copy()
    if (sample == sample[0]).all():  # one example many times, to average over the noise
        return
    texts = _of_values(sample, scale, rates[0], said)
    texts += _of_scale(sums, sample, scale, rates[0], said, is_moment_far=is_moment_far)
    texts += _of_copies(sample, said)
    for text in texts:
        warnings.warn(text, stacklevel=5)


def _blocks(
    rows: np.ndarray, seen: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    size = max(1, _BLOCK // max(1, math.prod(rows.shape[1:])))
    for start in range(0, len(rows), size):
        block = slice(start, start + size)
        yield rows[block].astype(np.float64), None if seen is None else seen[block]


def _sums(rows: np.ndarray, seen: np.ndarray | None, loc: np.ndarray, scale: np.ndarray) -> _Sums:
    sums = _Sums(*(np.zeros(rows.shape[1:]) for _ in range(4)))
    with np.errstate(over="ignore"):
        for x, of in _blocks(rows, seen):
            x -= loc
            x /= scale
            x = x if of is None else np.where(of, x, 0.0)  # what is missing may be NaN
            square = x * x
            new = (
                len(x) if of is None else of.sum(0), x.sum(0), square.sum(0), (square**2).sum(0)
            )  # fmt: skip
            sums = _Sums(*(a + b for a, b in zip(sums, new, strict=True)))
    return sums


def _check_range(
    kernel: Kernel, sums: _Sums, rows: np.ndarray, event_shape: tuple[int, ...]
) -> None:
    """Squares of what is far out must not overflow in the diffusion's own type."""
    most = float(np.sqrt(np.finfo(kernel.dtype).max)) * 1e-4
    rms = np.sqrt(sums.second / np.maximum(sums.count, 1))
    is_far = ~(rms <= most)
    if is_far.any():
        place = tuple(int(i) for i in np.argwhere(is_far)[0])
        raise ValueError(
            f"x_0 must lie within {most:.2g} times scale of loc in {kernel.dtype}, or its squares "
            f"overflow; got {rms[place]:.2g}{_at(is_far)} of {len(rows)} examples of shape "
            f"{event_shape}. Pass loc= and scale="
        )


def _warn_about_moment(moment: float, variance: float, size: int, rates: np.ndarray) -> None:
    told = "x_T ~ π has 1" if variance == 1 else f"data_variance is {variance:.3g}"
    correction = -0.5 * size * (moment - 1) * float(np.prod(1 - rates) + rates[0])
    warnings.warn(
        f"x_0 has second moment {moment:.3g} after loc and scale, where {told}: the "
        f"entropy form of the bound (eq. 14) is off by {correction:.3g} nats per example, and "
        "sampling starts from another law than the forward trajectory reaches. Pass loc= and "
        "scale=",
        stacklevel=6,
    )


def _sample(rows: np.ndarray, seen: np.ndarray | None) -> np.ndarray:
    """A few rows, evenly picked, flat, in their own type; NaN where missing."""
    size = max(1, math.prod(rows.shape[1:]))
    count = min(len(rows), max(2 * FEW_ROWS, min(_MOST_ROWS, _SAMPLE // size)))
    index = np.linspace(0, len(rows) - 1, count).astype(int)
    sample = rows[index].reshape(count, -1)
    return sample if seen is None else np.where(seen[index].reshape(count, -1), sample, np.nan)


def _ties(sample: np.ndarray) -> np.ndarray:
    """Share of values that come again; whole examples that do, as copies of a few, count once."""
    if sample.shape[1] > 1:
        sample = np.unique(sample, axis=0)
    ordered = np.sort(sample, 0)  # NaN comes last and equals nothing
    return np.sum(ordered[1:] == ordered[:-1], 0) / np.maximum(np.sum(~np.isnan(ordered), 0), 1)


def _of_values(sample: np.ndarray, scale: np.ndarray, beta_1: float, said: np.ndarray) -> list[str]:
    """Columns that take few values, or one in many rows; marked in `said`."""
    there, ties = ~np.isnan(sample), _ties(sample)
    few, one, same, coarse = (np.zeros(scale.size, bool) for _ in range(4))
    about: dict[int, tuple[int, float, float, float]] = {}
    for i in np.flatnonzero((ties >= _TIED) & (there.sum(0) >= FEW_ROWS) & ~said.reshape(-1)):
        values, counts = np.unique(sample[there[:, i], i].astype(np.float64), return_counts=True)
        share = float(counts.max() / counts.sum())
        gap = float(np.diff(values).min()) if len(values) > 1 else 0.0
        about[i] = len(values), gap, float(values[counts.argmax()]), share
        same[i] = len(values) == 1
        few[i] = gap / scale.reshape(-1)[i] > 4 * math.sqrt(beta_1)
        spacing = np.spacing(np.nanmax(np.abs(sample[:, i])))  # of its own type
        coarse[i] = few[i] and gap <= 4 * float(spacing)
        one[i] = not same[i] and not few[i] and share >= _TIED
    texts = []
    for found in (same, few, one):
        said |= found.reshape(said.shape)
    few &= ~coarse  # of which a warning of precision, or of the second moment, tells
    noise = (
        "put it on a grid (last_step=readouts.Discretised(low, high, levels)), or add uniform "
        "noise as wide as a step (as datasets.dequantise does)"
    )
    if same.any():
        i = int(np.flatnonzero(same)[0])
        texts.append(
            f"x_0 is constant{_at(same.reshape(said.shape))}, {about[i][2]:.6g} in all of "
            f"the {len(sample)} examples looked at: a density there has no limit. Leave it out"
        )
    if few.any():
        i = int(np.flatnonzero(few)[0])
        count, gap, *_ = about[i]
        gain = math.log(gap / scale.reshape(-1)[i]) - 0.5 * math.log(2 * math.pi * math.e * beta_1)
        texts.append(
            f"x_0 takes few values{_at(few.reshape(said.shape))} ({count}, no less than {gap:.3g} "
            f"apart): a density there has no limit, and under rates that begin with "
            f"{beta_1:.2g} up to {gain:.2g} nats of K for each such number say where the values "
            f"lie, not how they are spread. Wherever x_0 is rounded, {noise}"
        )
    if one.any():
        i = int(np.flatnonzero(one)[0])
        texts.append(
            f"x_0 is {about[i][2]:.6g} in {about[i][3]:.0%} of the examples"
            f"{_at(one.reshape(said.shape))}: a density there has no limit. Mask these values "
            f"and model apart which they are, or {noise}"
        )
    return texts


def _of_scale(
    sums: _Sums, sample: np.ndarray, scale: np.ndarray, beta_1: float, said: np.ndarray, *,
    is_moment_far: bool,
) -> list[str]:  # fmt: skip
    """Columns whose scale is a few rows' doing, or not the diffusion's; marked in `said`."""
    texts, count = [], np.maximum(sums.count, 1)
    moment = sums.second / count
    variance = np.maximum(moment - (sums.first / count) ** 2, 0.0)
    rows = np.where(sums.fourth > 0, sums.second**2 / np.where(sums.fourth > 0, sums.fourth, 1), 1)
    heavy = ~said & (rows < 10) & (count >= 2 * FEW_ROWS)
    if heavy.any():
        x = np.where(heavy.reshape(-1), sample, 0.0).astype(np.float64)
        low, high = (np.nanquantile(x, q, 0).reshape(scale.shape) for q in (0.25, 0.75))
        heavy &= ((high - low) / scale) ** 2 < 0.02 * moment  # 1.8 times it for a Gaussian
    said |= heavy
    if heavy.any():
        place = tuple(np.argwhere(heavy)[0])
        texts.append(
            f"the second moment of x_0{_at(heavy)} comes from about {rows[place]:.0f} of "
            f"{int(count[place])} examples: a scale made of it leaves the others no width. See "
            "whether these are right; transform what has such tails (a logarithm), or give scale= "
            "by quantiles"
        )
    # entries of a picture are of one unit: its background is what it is
    narrow = ~said & (count >= FEW_ROWS) & (variance < beta_1) & (scale.ndim < 2)
    wide = ~said & (count >= FEW_ROWS) & (moment > _WIDE)
    odd = (narrow | wide) & (not is_moment_far)
    said |= narrow | wide
    if odd.any():
        place = tuple(np.argwhere(odd)[0])
        texts.append(
            f"x_0 has standard deviation {math.sqrt(variance[place]):.2g} and second moment "
            f"{moment[place]:.2g} after loc and scale{_at(odd)}, where 1 is meant, and x_1 "
            f"has noise of {math.sqrt(beta_1):.2g}: K and draws do not tell a narrower column from "
            "that noise. Pass loc= and scale= by column, x_0.mean(0) and x_0.std(0), unless all "
            "columns are of one unit and this one has little to say"
        )
    return texts


def _of_copies(sample: np.ndarray, said: np.ndarray) -> list[str]:
    """Columns that are another, in other units perhaps."""
    left = np.flatnonzero(~said.reshape(-1))
    sample = np.unique(sample, axis=0)
    if not 2 <= len(left) <= _MOST_COLUMNS or len(sample) < FEW_ROWS or np.isnan(sample).any():
        return []
    x = sample[:, left].astype(np.float64)
    x -= x.mean(0)
    size = np.sqrt(np.sum(x * x, 0))
    left, x = left[size > 0], x[:, size > 0] / size[size > 0]
    first, second = np.nonzero(np.triu(1 - np.abs(x.T @ x) < 1e-9, 1))
    if not len(first):
        return []
    of = np.zeros(said.size, bool)
    of[left[second]] = True
    one = np.zeros(said.size, bool)
    one[left[first[0]]] = True
    at, at_one = _at(of.reshape(said.shape)), _at(one.reshape(said.shape))
    return [
        f"x_0{at} is a copy of another number of the same example, in the same or other units (the "
        f"first of the one{at_one}): together they have no density, and draws keep to this no "
        "better than the noise of x_1. Leave copies out"
    ]


def _at(which: np.ndarray) -> str:
    """The first few columns by index, and how many more there are; nothing of a number alone."""
    places = [", ".join(map(str, place.tolist())) for place in np.argwhere(which)]
    if which.ndim == 0:
        return ""
    word = ("column" if which.ndim == 1 else "entry") if len(places) == 1 else ""
    word = word or ("columns" if which.ndim == 1 else "entries")
    names = [f"[{place}]" if which.ndim > 1 else place for place in places[:_NAMED]]
    more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
    return f" at {word} {', '.join(names)}{more}"
