"""Fit any NumPyro `SVI`: the loop on the host.

Steps run in chunks, one call of the compiled loop in `steps` each. A chunk's length follows the
clock, so that it takes about two seconds. Between chunks the host checks that all is finite,
evaluates on held-out data, moves the bar and writes the checkpoint, by one rule:

    keyed to a step's number    what changes the result: batches, averages, evaluations, early stop
    may follow the clock        what does not: length of chunks, bar, checkpoints

So the result of `fit` is a function of its arguments, bit for bit on one machine, whatever
interrupted it. The record of a run is never changed in place: an interrupt finds the one of the
last whole chunk.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.sharding import Mesh
from jaxtyping import Float, Int, PRNGKeyArray
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState
from tqdm import tqdm

from probdiff import batches, devices
from probdiff import checkpoint as checkpoints
from probdiff.journal import Journal, Progress
from probdiff.steps import Carry, Steps, Weights, batch_at, is_finite, steps_of

_CHUNK_SECONDS = 2.0
"""Of steps between two looks at how things go. A call of a compiled function begins in fresh
memory, which on a CPU costs a U-Net a quarter of a step: at 0.3 s it was a tenth of the time."""


class HeldOutLosses(NamedTuple):
    """Evaluations on held-out data.

    Args:
        step: Steps done before each of them.
        loss: Loss of all the held-out data, summed as SVI sums it.
    """

    step: Int[np.ndarray, "evaluations"]
    loss: Float[np.ndarray, "evaluations"]


class Fit(NamedTuple):
    """What `fit` returns.

    Args:
        params: Values at the parameter sites: the average with `ema_decay`, else `raw_params`.
        raw_params: The optimiser's values, after the last step or, with `patience`, at the best
            evaluation.
        losses: Loss of each step, summed over the batch as SVI sums it.
        state: SVI's state after the last step.
        held_out_losses: Evaluations on held-out data, summed over all of them; empty without.
        num_steps: Steps done; less than asked for after an early stop.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from optax import sgd
        >>> from probdiff import fit
        >>> def model(x):
        ...     loc = numpyro.param("loc", 0.0)
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("x", dist.Normal(loc, 1), obs=x)
        >>> svi = SVI(model, lambda x: None, sgd(0.25), Trace_ELBO())
        >>> x = jnp.array([1.0, 3.0])
        >>> fitted = fit(jax.random.key(0), svi, x, num_steps=20, progress=False)
        >>> round(float(fitted.params["loc"]), 3), fitted.losses.shape  # the mean of x
        (2.0, (20,))
    """

    params: dict[str, Any]
    raw_params: dict[str, Any]
    losses: Float[np.ndarray, "steps"]
    state: SVIState
    held_out_losses: HeldOutLosses
    num_steps: int


class _Record(NamedTuple):
    """All that changes from step to step."""

    step: int
    carry: Carry
    best: Weights | None
    evaluations: tuple[tuple[int, float], ...]


class _Run(NamedTuple):
    """All that does not; of `losses` the first `record.step` are meant."""

    steps: Steps
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
        return self.steps.chunk(carry, *feed, *options, mesh=self.mesh)

    def room(self, step: int, n: int) -> int:
        """How many steps may follow `step` in one chunk, at most n."""
        n = min(n, self.source.capacity, self.num_steps - step)
        if self.held_out is not None or self.journal:
            n = min(n, self.evaluate_every - step % self.evaluate_every)
        return n

    def is_report_due(self, step: int) -> bool:
        """Whether the journal gets a word after this many steps."""
        return bool(self.journal) and (step % self.evaluate_every == 0 or step == self.num_steps)


def fit(
    key: PRNGKeyArray,
    svi: SVI,
    data: Any,
    *,
    num_steps: int,
    batch_size: int | None = None,
    ema_decay: float | None = None,
    held_out: Any = None,
    evaluate_every: int = 1000,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: float = 30.0,
    log: str | Path | None = None,
    callback: Callable[[Progress], Any] | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> Fit:
    """Fit the parameters of an SVI.

    Args:
        key: Seeds the parameters, the noise, the order of batches and the evaluations.
        svi: Any SVI; it starts from the initial values that its program has at this call. With
            `optax.MultiSteps(optimiser, k).gradient_transformation()` for its optimiser the
            weights move at every k-th batch, by the mean of the k gradients; a batch k times as
            large would give their sum. All counts of steps are then of the small batches.
        data: Arguments of guide and model: an array or a tuple goes by position, a dict by
            keyword. Or an iterator of such batches; a resumed run skips one for each step done.
        num_steps: Steps in all, those of an interrupted run included.
        batch_size: Examples a step, along axis 0, drawn without replacement within an epoch. None
            gives each step all of the data: so is a program with its own subsampling plate fitted.
        ema_decay: Decay of the averaged weights, in (0, 1), after a warm-up; None keeps no average.
        held_out: Data to evaluate on, in the form of `data`, with the same noise every time.
        evaluate_every: Steps between evaluations, between lines of the log and calls of the
            callback; there is one more of each at the end.
        patience: Evaluations without improvement after which to stop; the best one's weights are
            then returned, whether it stopped or not.
        checkpoint: File of the run, `.safetensors`. A run whose file is there goes on from it;
            `num_steps` may then be larger than before, all other arguments that change the
            result must be the same.
        checkpoint_every: Seconds between checkpoints; there is one more at the end or interrupt.
        log: File that gets a line of JSON with step, seconds and losses; see `journal`. A run that
            goes on adds to it, a new one starts it afresh.
        callback: Called with the run's `Progress`, to draw samples or a picture as it goes, such as
            `plots.LiveLosses`.
        mesh: Devices to divide each batch among, on one axis. Data and weights are on all of them.
            If they belong to several processes (`jax.distributed`), each calls `fit` with the same
            arguments; the first writes the files, and all must see the checkpoint.
        progress: Whether to show a bar, with the loss per example.

    Returns:
        Parameters, losses and last state.

    Raises:
        ValueError: An argument does not fit, or the checkpoint is damaged or another run's.
        FloatingPointError: Loss or weights are not finite; says at which step and sites.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from numpyro.infer import SVI
        >>> from optax import adam
        >>> from probdiff import Diffusion, GaussianKernel, SampledTimeELBO
        >>> from probdiff import fit, networks, schedules
        >>> diffusion = Diffusion(
        ...     GaussianKernel(), schedules.linear(5, beta_1=0.01, beta_T=0.9),
        ...     networks.RadialBasis((), width=4, T=5, rngs=nnx.Rngs(0)), event_shape=(),
        ... )
        >>> x = jax.random.bernoulli(jax.random.key(0), 0.5, (64,)) * 2.0 - 1  # −1 or 1
        >>> svi = SVI(diffusion.model, diffusion.guide, adam(0.05), SampledTimeELBO())
        >>> fitted = fit(jax.random.key(1), svi, x, num_steps=20, batch_size=32, progress=False)
        >>> list(fitted.params), fitted.losses.shape
        (['x_0_network$params'], (20,))
    """
    _check(num_steps, ema_decay, held_out, evaluate_every, patience)
    mesh = devices.checked(mesh)
    key_init, key_batches, key_held_out = random.split(key, 3)
    source = batches.from_data(key_batches, data, batch_size, mesh)
    held_out = None if held_out is None else batches.as_arrays(held_out, "held_out")
    steps = steps_of(svi)
    state = steps.init(key_init, source.first)
    global_latents = steps.global_latents(state, source.known)
    if batch_size is not None and global_latents:
        raise ValueError(
            "batch_size must be None where a latent site is outside every plate, since each "
            "minibatch would count it in full: use a subsampling plate instead, "
            f"numpyro.plate(..., subsample_size=); got the site {global_latents[0]!r}"
        )
    run = _Run(
        steps=steps,
        source=source,
        num_steps=num_steps,
        ema_decay=ema_decay,
        held_out=devices.replicate(held_out, mesh),
        key_held_out=devices.replicate(key_held_out, mesh),
        evaluate_every=evaluate_every,
        patience=patience,
        mesh=mesh,
        journal=_journal(log, callback, mesh),
        losses=np.zeros(num_steps, jnp.result_type(float)),
    )
    record, save = _start(run, state), lambda record: None
    if checkpoint is not None:
        file = _File(Path(checkpoint), _identity(key, run, batch_size))
        record, save = file.resume(run, record), partial(file.save, run)
    if devices.is_shared(mesh):
        _check_same(run, record, state, _identity(key, run, batch_size))
    run.journal.resume(record.step)
    return _result(run, _train(run, record, save, checkpoint_every, progress))


def _check(
    num_steps: int,
    ema_decay: float | None,
    held_out: Any,
    evaluate_every: int,
    patience: int | None,
) -> None:
    counts = {"num_steps": num_steps, "evaluate_every": evaluate_every, "patience": patience}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1; got {count}")
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise ValueError(f"ema_decay must lie in (0, 1); got {ema_decay}")
    if patience is not None and held_out is None:
        raise ValueError(f"patience needs held_out, which must then be given; got {patience}")


def _check_same(run: _Run, record: _Record, state: SVIState, identity: dict[str, str]) -> None:
    """Raise a `ValueError` where processes that share the devices would do different things."""
    steps = {"num_steps": str(run.num_steps), "the step that checkpoint is at": str(record.step)}
    devices.check_same({**identity, **steps, "the first state": checkpoints.digest(state)})


def _journal(log: Any, callback: Any, mesh: Mesh | None) -> Journal:
    if log is not None and not devices.is_first(mesh):
        log = os.devnull  # for a run with a log is cut into other chunks than one without
    return Journal(None if log is None else Path(log), callback)


def _start(run: _Run, state: SVIState) -> _Record:
    carry = run.steps.start(state, averaged=run.ema_decay is not None)
    carry = devices.replicate(carry, run.mesh)
    # A stand-in until the first evaluation, so that the tree of a checkpoint is always the same.
    best = None if run.patience is None else run.steps.weights(carry)
    return _Record(0, carry, best, ())


def _train(
    run: _Run,
    record: _Record,
    save: Callable[[_Record], None],
    checkpoint_every: float,
    progress: bool,
) -> _Record:
    """The record after the last step; saved by the clock, at the end, and when interrupted."""
    saved_step, saved_time = record.step, time.monotonic()
    disable = not (progress and devices.is_first(run.mesh))
    bar = tqdm(total=run.num_steps, initial=record.step, disable=disable, unit="step")
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


def _records(run: _Run, record: _Record) -> Iterator[_Record]:
    """The record after each chunk."""
    length = 1  # the first chunk may compile: its time says nothing about a step's
    n = 0 if _is_stale(run, record) else run.room(record.step, length)
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
            record = _evaluated(run, record)
        if run.is_report_due(record.step):
            _report(run, record)
        yield record
        if _is_stale(run, record):
            return
        n, feed = following, ahead


def _chunk_length(n: int, seconds: float) -> int:
    """Steps of a chunk that would take two seconds, given how long n steps took."""
    # At most fourfold growth: the time of a short chunk is overhead and noise.
    return max(1, min(4 * n, int(n * _CHUNK_SECONDS / seconds)))


def _show(bar: tqdm, run: _Run, start: int, stop: int) -> None:
    loss = run.losses[start:stop].mean() / run.source.examples
    bar.set_postfix_str(f"loss per example {loss:.4g}", refresh=False)
    bar.update(stop - start)


def _checked(run: _Run, record: _Record, feed: tuple, n: int, output: tuple) -> _Record:
    """The record after a chunk, all of it finite."""
    carry, losses, finite = output
    losses = np.asarray(losses)[:n]
    if not (finite and np.isfinite(losses).all()):
        raise FloatingPointError(_explain(run, record, feed, losses))
    run.losses[record.step : record.step + n] = losses
    return record._replace(step=record.step + n, carry=carry)


def _explain(run: _Run, record: _Record, feed: tuple, losses: np.ndarray) -> str:
    """What was not finite first, found by doing the chunk again up to there."""
    bad = np.flatnonzero(~np.isfinite(losses))
    n = int(bad[0]) if bad.size else len(losses)
    carry, step = run.chunk(record.carry, feed, record.step, n)[0], record.step + n
    params = run.steps.weights(carry).raw_params
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
    faults = run.steps.faults(key, params, carry.state.mutable_state, batch_at(*feed, n))
    return f"the loss is {losses[n]} at step {step + 1}; not finite: {', '.join(faults)}"


def _evaluated(run: _Run, record: _Record) -> _Record:
    """The record with one more evaluation."""
    weights = run.steps.weights(record.carry)
    judged = (run.key_held_out, weights.params, record.carry.state.mutable_state, run.held_out)
    loss = float(run.steps.loss(*judged))
    if not np.isfinite(loss):
        faults = ", ".join(run.steps.faults(*judged))
        raise FloatingPointError(
            f"the loss on held_out is {loss} after step {record.step}; not finite: {faults}"
        )
    if run.patience is not None and all(loss < other for _, other in record.evaluations):
        record = record._replace(best=weights)
    return record._replace(evaluations=(*record.evaluations, (record.step, loss)))


def _report(run: _Run, record: _Record) -> None:
    params = run.steps.weights(record.carry).params
    losses, held_out = run.losses[: record.step], _held_out_losses(record)
    run.journal.report(Progress(record.step, params, losses, held_out), run.source.examples)


def _held_out_losses(record: _Record) -> HeldOutLosses:
    return HeldOutLosses(
        np.array([step for step, _ in record.evaluations], np.int64),
        np.array([loss for _, loss in record.evaluations], np.float64),
    )


def _is_stale(run: _Run, record: _Record) -> bool:
    """Whether the last `patience` evaluations brought no improvement."""
    losses = [loss for _, loss in record.evaluations]
    if run.patience is None or not losses:
        return False
    return len(losses) - 1 - losses.index(min(losses)) >= run.patience


def _result(run: _Run, record: _Record) -> Fit:
    if run.held_out is not None and record.step not in dict(record.evaluations):
        # It came after the checkpoint, for a run that goes on has no evaluation at this step.
        record = _evaluated(run, record)
    weights = run.steps.weights(record.carry) if run.patience is None else record.best
    return Fit(
        params=weights.params,
        raw_params=weights.raw_params,
        losses=run.losses[: record.step],
        state=record.carry.state,
        held_out_losses=_held_out_losses(record),
        num_steps=record.step,
    )


class _File(NamedTuple):
    """The checkpoint of a run, and what tells the run from others."""

    path: Path
    identity: dict[str, str]

    def save(self, run: _Run, record: _Record) -> None:
        """Write the record, in one process if several share the devices."""
        if not devices.is_first(run.mesh):
            return
        arrays = checkpoints.flatten({"best": record.best, "carry": record.carry})
        arrays["losses"] = run.losses[: record.step]
        arrays["evaluations"] = np.array(record.evaluations, np.float64).reshape(-1, 2)
        checkpoints.write(self.path, arrays, self.identity)

    def resume(self, run: _Run, record: _Record) -> _Record:
        """The record in the file; the one given if there is no file."""
        if not self.path.parent.is_dir():
            raise ValueError(f"checkpoint must lie in a folder that exists; got {self.path}")
        if not self.path.exists():
            return record
        arrays, found = checkpoints.read(self.path)
        for name in self.identity | found:
            if (there := found.get(name)) != (here := self.identity.get(name)):
                raise ValueError(
                    f"{self.path} holds another run: {name} is {there} there and {here} here"
                )
        losses, evaluations = arrays.pop("losses"), arrays.pop("evaluations")
        if losses.size > run.num_steps:
            raise ValueError(
                f"num_steps must be at least the {losses.size} steps in {self.path}; "
                f"got {run.num_steps}"
            )
        template = {"best": record.best, "carry": record.carry}
        try:
            tree = devices.replicate(checkpoints.unflatten(template, arrays), run.mesh)
        except ValueError as error:
            raise ValueError(f"{self.path} holds another run: {error}") from error
        run.losses[: losses.size] = losses
        done = tuple((int(step), float(loss)) for step, loss in evaluations)
        return _Record(losses.size, tree["carry"], tree["best"], done)


def _identity(key: PRNGKeyArray, run: _Run, batch_size: int | None) -> dict[str, str]:
    """All arguments that change the result, but for the program and the number of steps."""
    options = {
        "format": "probdiff.fit 1",
        "batch_size": str(batch_size),
        "ema_decay": str(run.ema_decay),
        "key": str(np.asarray(random.key_data(key)).tolist()),
        "evaluate_every": str(run.evaluate_every),
        "patience": str(run.patience),
    }
    held_out = {} if run.held_out is None else batches.identity(run.held_out, "held_out")
    return {**options, **run.source.identity(), **held_out}
