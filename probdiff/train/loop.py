"""The loop on the host: chunks of steps, and what is done between them.

A chunk is one call of a compiled loop (see `step`), whose length follows the clock: about two
seconds. Between chunks the host checks that all is finite, evaluates on held-out data, moves the
bar and writes the checkpoint, by one rule:

    keyed to a step's number    what changes the result: batches, averages, evaluations, early stop
    may follow the clock        what does not: length of chunks, bar, checkpoints

The record of a run is never changed in place: an interrupt finds the one of the last whole chunk,
and a checkpoint holds that, with what tells the run from others.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax import random
from jax.sharding import Mesh
from jaxtyping import Array, PRNGKeyArray, PyTree
from tqdm import tqdm

from probdiff import bars, devices, files
from probdiff.train import checkpoint, identity
from probdiff.train import data as batches
from probdiff.train.identity import Program
from probdiff.train.log import HeldOutLosses, Log, Progress
from probdiff.train.step import Carry, TracedSVI, Weights, is_finite

_Feed = tuple[PyTree, Array | None]
_CHUNK_SECONDS = 2.0
"""Of steps between two looks at how things go. A call of a compiled function begins in fresh
memory, which on a CPU costs a U-Net a quarter of a step: at 0.3 s it was a tenth of the time."""
_FEW = 4
"""Steps of a chunk of a large model, where they take longer than that and no more than 20 s."""


_REPLAYED = 16
_SAME_HERE, _SAME_ELSEWHERE = 1e-5, 1e-2
"""Steps done again, and how far their losses may be from what they were, of the largest: where all
is as it was, by the order of sums; on another machine by its matrix products, in ten bits."""


class _Record(NamedTuple):
    """All that changes from step to step, but for the losses."""

    step: int
    carry: Carry
    best: Weights | None
    evaluations: tuple[tuple[int, float], ...]

    @property
    def held_out_losses(self) -> HeldOutLosses:
        """The evaluations as two arrays."""
        table = np.array(self.evaluations, np.float64).reshape(-1, 2)
        return HeldOutLosses(table[:, 0].astype(np.int64), table[:, 1])


class Run(NamedTuple):
    """All that stays the same from step to step; of `losses` the first `record.step` are meant."""

    svi: TracedSVI
    source: batches.Source
    num_steps: int
    ema_decay: float | None
    held_out: PyTree
    key_held_out: PRNGKeyArray
    evaluate_every: int
    patience: int | None
    checkpoint: Path | None
    checkpoint_every: float
    identity: dict[str, str]
    """All arguments that change the result, but for the program and the number of steps."""
    program: Program | None
    """What tells the program from others, for a run with a checkpoint."""
    log: Log
    mesh: Mesh | None
    progress: bool
    losses: np.ndarray

    def first_record(self) -> _Record:
        """The record to begin with: the checkpoint's if there is one."""
        carry = self.svi.start(averaged=self.ema_decay is not None)
        # A stand-in until the first evaluation, so that a checkpoint's tree is always the same.
        best = None if self.patience is None else self.svi.weights(carry)
        record = _Record(0, carry, best, ())
        return record if self.checkpoint is None else self._resumed(record, self.checkpoint)

    def last_record(self, record: _Record) -> _Record:
        """The record after the last step; saved by the clock, at the end, and when interrupted."""
        with self._sole_writer(record):
            return self._trained(record)

    def _trained(self, record: _Record) -> _Record:
        saved_step, saved_time = record.step, time.monotonic()
        with bars.bar(
            total=self.num_steps, initial=record.step, unit="step",
            disable=not (self.progress and devices.is_first(self.mesh)),
            postfix="compiling" if self._room(record, 1) else None,
        ) as bar:  # fmt: skip
            try:
                for newer in self._records(record):
                    self._show(bar, record.step, newer.step)
                    record = newer
                    if time.monotonic() - saved_time >= self.checkpoint_every:
                        self._save(record)
                        saved_step, saved_time = record.step, time.monotonic()
            except FloatingPointError:
                saved_step = record.step  # what was saved before is further from the fault
                raise
            except KeyboardInterrupt as interrupt:
                interrupt.args = (self._afterwards(record),)  # the last line that is shown
                raise
            finally:
                if record.step > saved_step:
                    self._save(record)
        return record

    def _afterwards(self, record: _Record) -> str:
        """How to go on after an interrupt."""
        done = f"interrupted after step {record.step} of {self.num_steps}"
        if self.checkpoint is None:
            return f"{done}, which are lost: with checkpoint=, the same call would go on from there"
        return f"{done}: the same call goes on from there, by {self.checkpoint}"

    @contextlib.contextmanager
    def _sole_writer(self, record: _Record) -> Iterator[None]:
        """A `ValueError` in every process if another run writes the checkpoint."""
        is_writer = self.checkpoint is not None and devices.is_first(self.mesh)
        with contextlib.ExitStack() as stack:
            is_free = True
            if is_writer and self._room(record, 1):
                is_free = stack.enter_context(files.locked(self.checkpoint))
            if not devices.agreed(int(is_free), self.mesh):
                raise ValueError(
                    "checkpoint must be written by one run at a time; got "
                    f"{self.checkpoint}, which {files.holder(self.checkpoint)} writes: wait for "
                    "it, or give this run a file of its own"
                )
            yield

    def evaluated(self, record: _Record) -> _Record:
        """The record with one more evaluation."""
        weights = self.svi.weights(record.carry)
        judged = (self.key_held_out, weights.params, record.carry.state.mutable_state)
        loss = float(self.svi.loss(*judged, self.held_out))
        if not np.isfinite(loss):
            faults = self.svi.faults(*judged, self.held_out)
            raise FloatingPointError(
                f"the loss on held_out is {loss} after step {record.step}; not finite: {faults}"
            )
        if self.patience is not None and all(loss < other for _, other in record.evaluations):
            record = record._replace(best=weights)
        return record._replace(evaluations=(*record.evaluations, (record.step, loss)))

    def _records(self, record: _Record) -> Iterator[_Record]:
        """The record after each chunk."""
        length = 1  # the first chunk may compile: its time says nothing about a step's
        n = self._room(record, length)
        feed = self.source.take(record.step, n) if n else None
        while n:
            began = time.monotonic()
            output = self._chunk(record, feed, n)
            # The device works; meanwhile the next chunk's batches are made ready.
            following = self._steps_after(record.step + n, length)
            ahead = self.source.take(record.step + n, following) if following else None
            record = self._checked(record, feed, n, output)
            length = devices.agreed(_chunk_length(n, time.monotonic() - began), self.mesh)
            if self.held_out is not None and record.step % self.evaluate_every == 0:
                record = self.evaluated(record)
            is_due = record.step % self.evaluate_every == 0 or record.step == self.num_steps
            if self.log and is_due:
                params = self.svi.weights(record.carry).params
                losses = self.losses[: record.step]
                losses.flags.writeable = False  # of this view, which a callback gets
                progress = Progress(record.step, params, losses, record.held_out_losses)
                self.log.report(progress, self.source.examples)
            yield record
            if self._is_stale(record):
                return
            n, feed = following, ahead

    def _chunk(self, record: _Record, feed: _Feed | None, n: int) -> tuple[Carry, Array, Array]:
        """n steps from the record on, under way: (carry, losses, whether weights are finite)."""
        losses = np.zeros(self.source.capacity, self.losses.dtype)
        numbers = np.int32(record.step), np.int32(n), self.ema_decay or 0.0
        return self.svi.chunk(record.carry, feed, *numbers, losses)

    def _room(self, record: _Record, n: int) -> int:
        """Steps that may follow the record in one chunk, at most n; none of a run that is done."""
        return 0 if self._is_stale(record) else self._steps_after(record.step, n)

    def _steps_after(self, step: int, n: int) -> int:
        n = min(n, self.source.capacity, self.num_steps - step)
        if self.held_out is not None or self.log:
            n = min(n, self.evaluate_every - step % self.evaluate_every)
        return n

    def _is_stale(self, record: _Record) -> bool:
        """Whether the last `patience` evaluations brought no improvement."""
        losses = [loss for _, loss in record.evaluations]
        if self.patience is None or not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self.patience

    def _show(self, bar: tqdm, start: int, stop: int) -> None:
        loss = self.losses[start:stop].mean() / self.source.examples
        bar.set_postfix_str(f"loss per example {loss:.4g}", refresh=False)
        bar.update(stop - start)

    def _checked(self, record: _Record, feed: _Feed | None, n: int, output: tuple) -> _Record:
        """The record after a chunk, all of it finite."""
        carry, losses, finite = output
        losses = np.asarray(losses)[:n]
        if not (finite and np.isfinite(losses).all()):
            raise FloatingPointError(self._explain(record, feed, losses))
        self.losses[record.step : record.step + n] = losses
        return record._replace(step=record.step + n, carry=carry)

    def _explain(self, record: _Record, feed: _Feed | None, losses: np.ndarray) -> str:
        """What was not finite first, found by doing the chunk again up to there."""
        bad = np.flatnonzero(~np.isfinite(losses))
        n = int(bad[0]) if bad.size else len(losses)
        carry, step = self._chunk(record, feed, n)[0], record.step + n
        params = self.svi.weights(carry).raw_params
        finite = {name: map(is_finite, jax.tree.leaves(value)) for name, value in params.items()}
        names = [name for name in params if not all(finite[name])]
        if names and step == 0:
            return f"the initial values of the parameters {names} are not finite"
        if names:
            where = f"at step {step}, whose loss is {losses[n - 1]:.6g}"
            return f"the gradient is not finite {where}: it spoiled the parameters {names}"
        _, key = random.split(carry.state.rng_key)  # as `svi.update` does
        batch = batches.at(*feed, n)
        faults = self.svi.faults(key, params, carry.state.mutable_state, batch)
        return f"the loss is {losses[n]} at step {step + 1}; not finite: {faults}"

    def _save(self, record: _Record) -> None:
        """Write the checkpoint, in one process if several share the devices."""
        if self.checkpoint is None or not devices.is_first(self.mesh):
            return
        arrays = checkpoint.flatten({"best": record.best, "carry": record.carry})
        arrays["losses"] = self.losses[: record.step]
        arrays["evaluations"] = np.array(record.evaluations, np.float64).reshape(-1, 2)
        about = {**self.identity, "program": self.program.text()}
        checkpoint.write(self.checkpoint, arrays, about)

    def _resumed(self, record: _Record, path: Path) -> _Record:
        """The record in the file; the one given if there is no file."""
        if not path.parent.is_dir():
            raise ValueError(f"checkpoint must lie in a folder that exists; got {path}")
        if path.is_dir():
            raise ValueError(f"checkpoint must be a file; got the folder {path}")
        if not path.exists():
            return record
        arrays, found = checkpoint.read(path)
        program = identity.read(found.pop("program", None))
        is_same = self.program.is_same(program)
        differences = [] if is_same else self.program.differences(program)
        listed = [f"{name} {there}, not {here}" for name, there, here in differences]
        if units := [text for text in listed if text.startswith("loc ")]:  # data are less loc
            raise ValueError(_of_another_run(path, f"it has {units[0]}"))
        for name in self.identity | found:
            if (there := found.get(name)) != (here := self.identity.get(name)):
                raise ValueError(_of_another_run(path, f"it has {name} {there}, not {here}"))
        nothing = np.zeros(())
        losses, evaluations = (arrays.pop(n, nothing) for n in ("losses", "evaluations"))
        if losses.ndim != 1 or evaluations.ndim != 2 or evaluations.shape[1] != 2:
            raise ValueError(_of_another_run(path, "it has no losses and evaluations"))
        if losses.size > self.num_steps:
            least = f"the {losses.size} steps in {path}"
            raise ValueError(f"num_steps must be at least {least}; got {self.num_steps}")
        if listed:
            raise ValueError(_of_another_run(path, f"it has {'; '.join(listed[:3])}"))
        template = {"best": record.best, "carry": record.carry}
        try:
            tree = checkpoint.unflatten(template, arrays)
        except ValueError as error:
            raise ValueError(_of_another_run(path, str(error))) from error
        if not is_same:
            self._replay(record, losses, program, path)
        self.losses[: losses.size] = losses
        done = tuple((int(step), float(loss)) for step, loss in evaluations)
        return _Record(losses.size, **devices.replicate(tree, self.mesh), evaluations=done)

    def _replay(
        self, record: _Record, losses: np.ndarray, program: Program | None, path: Path
    ) -> None:
        """Do the first steps again, and compare their losses with those of the file.

        Operations are others by a rewritten program or other versions, or come in another order
        (NumPyro sums some terms in that of a set): then numbers say whether it is the run. A
        `ValueError` if not.
        """
        n = min(_REPLAYED, losses.size, self.source.capacity)
        if not n:
            return
        there, here = losses[:n], np.asarray(self._chunk(record, self.source.take(0, n), n)[1])[:n]
        is_at_home = program is not None and program.environment == self.program.environment
        error = np.max(np.abs(here - there)) / max(np.max(np.abs(there)), 1e-30)
        tolerance = _SAME_HERE if is_at_home else _SAME_ELSEWHERE
        if not error <= tolerance:
            i = int(np.argmax(~(np.abs(here - there) <= tolerance * np.max(np.abs(there)))))
            raise ValueError(
                _of_another_run(
                    path,
                    f"its step {i + 1} had the loss {there[i]:.7g}, that of this program, or from "
                    f"these initial values, is {here[i]:.7g}",
                )
            )


def _of_another_run(path: Path, difference: str) -> str:
    return (
        f"checkpoint must be of this run; got {path}, of another: {difference}. Go on with the "
        "arguments it was begun with, or give this run a file of its own"
    )


def _chunk_length(n: int, seconds: float) -> int:
    """Steps of a chunk that takes two seconds or is a few steps, given how long n steps took."""
    # At most fourfold growth: the time of a short chunk is overhead and noise.
    least = _FEW if _FEW * seconds / n < 10 * _CHUNK_SECONDS else 1
    return max(least, min(4 * n, int(n * _CHUNK_SECONDS / seconds)))
