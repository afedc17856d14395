"""The loop on the host: chunks of steps, and what is done between them.

Steps run in chunks, one call of the compiled loop of `compiled` each. A chunk's length follows the
clock, so that it takes about two seconds. Between chunks the host checks that all is finite,
evaluates on held-out data, moves the bar and writes the checkpoint, by one rule:

    keyed to a step's number    what changes the result: batches, averages, evaluations, early stop
    may follow the clock        what does not: length of chunks, bar, checkpoints

The record of a run is never changed in place: an interrupt finds the one of the last whole chunk.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import random
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray
from numpyro.infer.svi import SVIState
from tqdm import tqdm

from probdiff import bars, batches, devices
from probdiff.compiled import Carry, Compiled, Weights, batch_at, is_finite
from probdiff.journal import HeldOutLosses, Journal, Progress

_CHUNK_SECONDS = 2.0
"""Of steps between two looks at how things go. A call of a compiled function begins in fresh
memory, which on a CPU costs a U-Net a quarter of a step: at 0.3 s it was a tenth of the time."""


class Record(NamedTuple):
    """All that changes from step to step."""

    step: int
    carry: Carry
    best: Weights | None
    evaluations: tuple[tuple[int, float], ...]


class Run(NamedTuple):
    """All that stays the same from step to step; of `losses` the first `record.step` are meant."""

    compiled: Compiled
    source: batches.Whole | batches.Minibatches | batches.Stream
    num_steps: int
    ema_decay: float | None
    held_out: Any
    key_held_out: PRNGKeyArray
    evaluate_every: int
    patience: int | None
    mesh: Mesh | None
    journal: Journal
    losses: np.ndarray

    def chunk(self, carry: Carry, feed: tuple, start: int, n: int) -> tuple:
        """n steps from `start` on, under way: (carry, losses, whether the weights are finite)."""
        losses = np.zeros(self.source.capacity, self.losses.dtype)
        options = (np.int32(start), np.int32(n), self.ema_decay or 0.0, losses)
        return self.compiled.chunk(carry, *feed, *options, mesh=self.mesh)

    def room(self, step: int, n: int) -> int:
        """How many steps may follow `step` in one chunk, at most n."""
        n = min(n, self.source.capacity, self.num_steps - step)
        if self.held_out is not None or self.journal:
            n = min(n, self.evaluate_every - step % self.evaluate_every)
        return n

    def is_report_due(self, step: int) -> bool:
        """Whether the journal gets a word after this many steps."""
        return bool(self.journal) and (step % self.evaluate_every == 0 or step == self.num_steps)


def first_record(run: Run, state: SVIState) -> Record:
    """The record before the first step."""
    carry = run.compiled.start(state, averaged=run.ema_decay is not None)
    carry = devices.replicate(carry, run.mesh)
    # A stand-in until the first evaluation, so that the tree of a checkpoint is always the same.
    best = None if run.patience is None else run.compiled.weights(carry)
    return Record(0, carry, best, ())


def last_record(
    run: Run,
    record: Record,
    save: Callable[[Record], None],
    checkpoint_every: float,
    progress: bool,
) -> Record:
    """The record after the last step; saved by the clock, at the end, and when interrupted."""
    saved_step, saved_time = record.step, time.monotonic()
    disable = not (progress and devices.is_first(run.mesh))
    bar = bars.bar(
        total=run.num_steps, initial=record.step, disable=disable, unit="step",
        postfix="compiling" if _room(run, record, 1) else None,
    )  # fmt: skip
    with contextlib.closing(run.source), bar:
        try:
            for newer in _records(run, record):
                _show(bar, run, record.step, newer.step)
                record = newer
                if time.monotonic() - saved_time >= checkpoint_every:
                    save(record)
                    saved_step, saved_time = record.step, time.monotonic()
        except FloatingPointError:
            raise  # what was saved before is further from the fault
        except BaseException:
            if record.step > saved_step:
                save(record)
            raise
    if record.step > saved_step:
        save(record)
    return record


def _records(run: Run, record: Record) -> Iterator[Record]:
    """The record after each chunk."""
    length = 1  # the first chunk may compile: its time says nothing about a step's
    n = _room(run, record, length)
    feed = run.source.take(record.step, n) if n else None
    while n:
        began = time.monotonic()
        output = run.chunk(record.carry, feed, record.step, n)
        # The device works; meanwhile the next chunk's batches are made ready.
        following = run.room(record.step + n, length)
        ahead = run.source.take(record.step + n, following) if following else None
        record = _checked(run, record, feed, n, output)
        length = devices.agreed(_chunk_length(n, time.monotonic() - began), run.mesh)
        if run.held_out is not None and record.step % run.evaluate_every == 0:
            record = evaluated(run, record)
        if run.is_report_due(record.step):
            _report(run, record)
        yield record
        if _is_stale(run, record):
            return
        n, feed = following, ahead


def _room(run: Run, record: Record, n: int) -> int:
    """How many steps may follow the record in one chunk, at most n; none of a run that is done."""
    return 0 if _is_stale(run, record) else run.room(record.step, n)


def _chunk_length(n: int, seconds: float) -> int:
    """Steps of a chunk that would take two seconds, given how long n steps took."""
    # At most fourfold growth: the time of a short chunk is overhead and noise.
    return max(1, min(4 * n, int(n * _CHUNK_SECONDS / seconds)))


def _show(bar: tqdm, run: Run, start: int, stop: int) -> None:
    loss = run.losses[start:stop].mean() / run.source.examples
    bar.set_postfix_str(f"loss per example {loss:.4g}", refresh=False)
    bar.update(stop - start)


def _checked(run: Run, record: Record, feed: tuple, n: int, output: tuple) -> Record:
    """The record after a chunk, all of it finite."""
    carry, losses, finite = output
    losses = np.asarray(losses)[:n]
    if not (finite and np.isfinite(losses).all()):
        raise FloatingPointError(_explain(run, record, feed, losses))
    run.losses[record.step : record.step + n] = losses
    return record._replace(step=record.step + n, carry=carry)


def _explain(run: Run, record: Record, feed: tuple, losses: np.ndarray) -> str:
    """What was not finite first, found by doing the chunk again up to there."""
    bad = np.flatnonzero(~np.isfinite(losses))
    n = int(bad[0]) if bad.size else len(losses)
    carry, step = run.chunk(record.carry, feed, record.step, n)[0], record.step + n
    params = run.compiled.weights(carry).raw_params
    names = [
        name
        for name, value in params.items()
        if not all(is_finite(leaf) for leaf in jax.tree.leaves(value))
    ]
    if names and step == 0:
        return f"the initial values of the parameters {names} are not finite"
    if names:
        return (
            f"the gradient is not finite at step {step}, whose loss is {losses[n - 1]:.6g}: "
            f"it spoiled the parameters {names}"
        )
    _, key = random.split(carry.state.rng_key)  # as `svi.update` does
    faults = run.compiled.faults(key, params, carry.state.mutable_state, batch_at(*feed, n))
    return f"the loss is {losses[n]} at step {step + 1}; not finite: {', '.join(faults)}"


def evaluated(run: Run, record: Record) -> Record:
    """The record with one more evaluation."""
    weights = run.compiled.weights(record.carry)
    judged = (run.key_held_out, weights.params, record.carry.state.mutable_state, run.held_out)
    loss = float(run.compiled.loss(*judged))
    if not np.isfinite(loss):
        faults = ", ".join(run.compiled.faults(*judged))
        raise FloatingPointError(
            f"the loss on held_out is {loss} after step {record.step}; not finite: {faults}"
        )
    if run.patience is not None and all(loss < other for _, other in record.evaluations):
        record = record._replace(best=weights)
    return record._replace(evaluations=(*record.evaluations, (record.step, loss)))


def _report(run: Run, record: Record) -> None:
    params = run.compiled.weights(record.carry).params
    losses, held_out = run.losses[: record.step], held_out_losses(record)
    run.journal.report(Progress(record.step, params, losses, held_out), run.source.examples)


def held_out_losses(record: Record) -> HeldOutLosses:
    """The evaluations of a record as two arrays."""
    return HeldOutLosses(
        np.array([step for step, _ in record.evaluations], np.int64),
        np.array([loss for _, loss in record.evaluations], np.float64),
    )


def _is_stale(run: Run, record: Record) -> bool:
    """Whether the last `patience` evaluations brought no improvement."""
    losses = [loss for _, loss in record.evaluations]
    if run.patience is None or not losses:
        return False
    return len(losses) - 1 - losses.index(min(losses)) >= run.patience
