"""Fit any NumPyro `SVI`: what is asked for, what is returned, and the checkpoint between.

The result of `fit` is a function of its arguments, bit for bit on one machine, whatever interrupted
it. A checkpoint holds the record of a run after a whole chunk of steps (see `chunks`), and what
tells the run from others.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.sharding import Mesh
from jaxtyping import Float, PRNGKeyArray
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from probdiff import batches, devices
from probdiff import checkpoint as checkpoints
from probdiff.arguments import check_at_least
from probdiff.chunks import Record, Run, evaluated, first_record, held_out_losses, last_record
from probdiff.compiled import compiled_of
from probdiff.journal import HeldOutLosses, Journal, Progress


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

    def __repr__(self) -> str:
        size = sum(np.size(leaf) for leaf in jax.tree.leaves(self.params))
        return (
            f"Fit(num_steps={self.num_steps}, last loss {self.losses[-1]:.6g}, {size:,} parameters)"
        )


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
    compiled = compiled_of(svi)
    state = compiled.init(key_init, source.first)
    global_latents = compiled.global_latents(state, source.known)
    if batch_size is not None and global_latents:
        raise ValueError(
            "batch_size must be None where a latent site is outside every plate, since each "
            "minibatch would count it in full: use a subsampling plate instead, "
            f"numpyro.plate(..., subsample_size=); got the site {global_latents[0]!r}"
        )
    run = Run(
        compiled=compiled,
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
    record, save = first_record(run, state), lambda record: None
    if checkpoint is not None:
        file = _File(Path(checkpoint), _identity(key, run, batch_size))
        record, save = file.resume(run, record), partial(file.save, run)
    if devices.is_shared(mesh):
        _check_same(run, record, state, _identity(key, run, batch_size))
    run.journal.resume(record.step)
    return _result(run, last_record(run, record, save, checkpoint_every, progress))


def _check(
    num_steps: int,
    ema_decay: float | None,
    held_out: Any,
    evaluate_every: int,
    patience: int | None,
) -> None:
    check_at_least(1, num_steps=num_steps, evaluate_every=evaluate_every)
    if patience is not None:
        check_at_least(1, patience=patience)
    if ema_decay is not None and not 0 < ema_decay < 1:
        raise ValueError(f"ema_decay must lie in (0, 1); got {ema_decay}")
    if patience is not None and held_out is None:
        raise ValueError(f"held_out must be given with patience; got None and patience={patience}")


def _check_same(run: Run, record: Record, state: SVIState, identity: dict[str, str]) -> None:
    """Raise a `ValueError` where processes that share the devices would do different things."""
    steps = {"num_steps": str(run.num_steps), "the step that checkpoint is at": str(record.step)}
    devices.check_same({**identity, **steps, "the first state": checkpoints.digest(state)})


def _journal(log: Any, callback: Any, mesh: Mesh | None) -> Journal:
    if log is not None and not devices.is_first(mesh):
        log = os.devnull  # for a run with a log is cut into other chunks than one without
    return Journal(None if log is None else Path(log), callback)


def _result(run: Run, record: Record) -> Fit:
    if run.held_out is not None and record.step not in dict(record.evaluations):
        # It came after the checkpoint, for a run that goes on has no evaluation at this step.
        record = evaluated(run, record)
    weights = run.compiled.weights(record.carry) if run.patience is None else record.best
    return Fit(
        params=weights.params,
        raw_params=weights.raw_params,
        losses=run.losses[: record.step],
        state=record.carry.state,
        held_out_losses=held_out_losses(record),
        num_steps=record.step,
    )


class _File(NamedTuple):
    """The checkpoint of a run, and what tells the run from others."""

    path: Path
    identity: dict[str, str]

    def save(self, run: Run, record: Record) -> None:
        """Write the record, in one process if several share the devices."""
        if not devices.is_first(run.mesh):
            return
        arrays = checkpoints.flatten({"best": record.best, "carry": record.carry})
        arrays["losses"] = run.losses[: record.step]
        arrays["evaluations"] = np.array(record.evaluations, np.float64).reshape(-1, 2)
        checkpoints.write(self.path, arrays, self.identity)

    def resume(self, run: Run, record: Record) -> Record:
        """The record in the file; the one given if there is no file."""
        if not self.path.parent.is_dir():
            raise ValueError(f"checkpoint must lie in a folder that exists; got {self.path}")
        if not self.path.exists():
            return record
        arrays, found = checkpoints.read(self.path)
        for name in self.identity | found:
            if (there := found.get(name)) != (here := self.identity.get(name)):
                raise ValueError(
                    f"checkpoint must be of this run; {self.path} has {name} {there}, not {here}"
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
            raise ValueError(
                f"checkpoint must be of this run; {self.path} is not: {error}"
            ) from error
        run.losses[: losses.size] = losses
        done = tuple((int(step), float(loss)) for step, loss in evaluations)
        return Record(losses.size, tree["carry"], tree["best"], done)


def _identity(key: PRNGKeyArray, run: Run, batch_size: int | None) -> dict[str, str]:
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
