"""`fit`: the parameters of any NumPyro `SVI`.

Its result is a function of its arguments, bit for bit on one machine, whatever interrupted it.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.sharding import Mesh
from jaxtyping import Float, PRNGKeyArray, PyTree
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from probdiff import devices
from probdiff.arguments import (
    INNER_SHARE,
    NOT_NEGATIVE,
    check_at_least,
    check_callable,
    check_flag,
    check_key,
    check_number,
    check_object,
    check_path,
)
from probdiff.train import data as batches
from probdiff.train.checkpoint import digest
from probdiff.train.log import HeldOutLosses, Log, Progress
from probdiff.train.loop import Run
from probdiff.train.step import TracedSVI
from probdiff.types import Params


class Fit(NamedTuple):
    """What `fit` returns: values at the parameter sites, losses, and SVI's last state.

    Example:
        >>> def model(x):
        ...     loc = numpyro.param("loc", 0.0)
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("x", dist.Normal(loc, 1), obs=x)
        >>> svi = SVI(model, lambda x: None, optax.sgd(0.25), Trace_ELBO())
        >>> x = jnp.array([1.0, 3.0])
        >>> fitted = fit(jax.random.key(0), svi, x, num_steps=20, progress=False)
        >>> round(float(fitted.params["loc"]), 3), fitted.losses.shape  # the mean of x
        (2.0, (20,))
    """

    params: Params
    """The average with `ema_decay`, else `raw_params`."""
    raw_params: Params
    """The optimiser's values, after the last step or, with `patience`, at the best evaluation."""
    losses: Float[np.ndarray, "steps"]
    """Loss of each step, summed over the batch as SVI sums it."""
    state: SVIState
    held_out_losses: HeldOutLosses
    """Evaluations on held-out data, summed over all of them; empty without."""
    num_steps: int
    """Steps done; less than asked for after an early stop."""

    def __repr__(self) -> str:
        size = sum(np.size(leaf) for leaf in jax.tree.leaves(self.params))
        last = f"last loss {self.losses[-1]:.6g}"
        return f"Fit(num_steps={self.num_steps}, {last}, {size:,} parameters)"


def fit(
    key: PRNGKeyArray, svi: SVI, data: Any, *, num_steps: int, batch_size: int | None = None,
    ema_decay: float | None = None, held_out: PyTree = None, evaluate_every: int = 1000,
    patience: int | None = None, checkpoint: str | Path | None = None,
    checkpoint_every: float = 30.0, log: str | Path | None = None,
    callback: Callable[[Progress], Any] | None = None, mesh: Mesh | None = None,
    progress: bool = True,
) -> Fit:  # fmt: skip
    """Fit the parameters of an SVI.

    Args:
        key: Seeds the parameters, the noise, the order of batches and the evaluations.
        svi: Any SVI; it starts from the initial values that its program has at this call. With
            `optax.MultiSteps(optimiser, k).gradient_transformation()` for its optimiser the
            weights move at every k-th batch, by the mean of the k gradients; a batch k times as
            large would give their sum. All counts of steps are then of the small batches.
        data: Arguments of guide and model: an array or a tuple goes by position, a dict by
            keyword. Or an iterator of such batches; a resumed run skips one for each step done.
            Of a diffusion's own model and guide, loc is taken off x_0 in NumPy's float64.
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
            result must be the same, and so must program, objective and optimiser.
        checkpoint_every: Seconds between checkpoints; there is one more at the end or interrupt.
        log: File that gets lines of JSON with step, seconds and losses; see `train.log`. A run
            that goes on adds to it, a new one starts it afresh.
        callback: Called with the run's `Progress`; draws, say, a picture: `plots.LiveLosses`.
        mesh: Devices to divide each batch among, on one axis. Data and weights are on all of them.
            If they belong to several processes (`jax.distributed`), each calls `fit` with the same
            arguments; the first writes the files, and all must see the checkpoint.
        progress: Whether to show a bar, with the loss per example.

    Raises:
        ValueError: An argument does not fit, or the checkpoint is damaged or another run's, or
            another run is writing it.
        KeyboardInterrupt: Interrupted; says how to go on.
        FloatingPointError: Loss or weights are not finite; says at which step and sites.

    Example:
        >>> network = networks.RadialBasis((), width=4, T=5, rngs=nnx.Rngs(0))
        >>> diffusion = Diffusion(GaussianKernel(), schedules.cosine(5), network, event_shape=())
        >>> x = jax.random.normal(jax.random.key(0), (64,))
        >>> svi = SVI(diffusion.model, diffusion.guide, optax.adam(0.05), SampledTimeELBO())
        >>> fitted = fit(jax.random.key(1), svi, x, num_steps=20, batch_size=32, progress=False)
        >>> list(fitted.params), fitted.losses.shape
        (['x_0_network$params'], (20,))
    """
    check_key(key)
    check_object(SVI, "a numpyro.infer.SVI", svi=svi)
    check_at_least(1, num_steps=num_steps, evaluate_every=evaluate_every)
    check_at_least(1, or_none=True, batch_size=batch_size, patience=patience)
    check_number(INNER_SHARE, or_none=True, ema_decay=ema_decay)
    check_number(NOT_NEGATIVE, checkpoint_every=checkpoint_every)
    checkpoint = None if checkpoint is None else check_path("checkpoint", checkpoint)
    log = None if log is None else check_path("log", log)
    check_callable("callback(progress)", or_none=True, callback=callback)
    check_flag(progress=progress)
    if patience is not None and held_out is None:
        raise ValueError(f"held_out must be given with patience; got None and patience={patience}")
    if None not in (log, checkpoint) and Path(log).resolve() == Path(checkpoint).resolve():
        raise ValueError(f"log and checkpoint must be two files; got {log} for both")
    mesh = devices.checked(mesh)
    key_init, key_batches, key_held_out = random.split(key, 3)
    own = batches.own_diffusion(svi)
    source = batches.from_data(key_batches, data, batch_size, mesh, own)
    held_out = None if held_out is None else batches.as_arrays(held_out, "held_out", own)
    if log is not None and not devices.is_first(mesh):
        log = os.devnull  # for a run with a log is cut into other chunks than one without
    traced = TracedSVI(svi, key_init, source.first, mesh)
    global_latents = traced.global_latents(source.known)
    if batch_size is not None and global_latents:
        raise ValueError(
            "batch_size must be None where a latent site is outside every plate, since each "
            "minibatch would count it in full: use a subsampling plate instead, "
            f"numpyro.plate(..., subsample_size=); got the site {global_latents[0]!r}"
        )
    identity = {}
    if checkpoint is not None or devices.is_shared(mesh):
        words = np.asarray(random.key_data(key)).tolist()
        options = {
            "batch_size": batch_size, "ema_decay": ema_decay, "key": words,
            "evaluate_every": evaluate_every, "patience": patience,
        }  # fmt: skip
        identity = source.identity() | {name: str(value) for name, value in options.items()}
        if held_out is not None:
            identity |= batches.identity(held_out, "held_out")
    run = Run(
        svi=traced, source=source, num_steps=num_steps, ema_decay=ema_decay,
        held_out=devices.replicate(held_out, mesh),
        key_held_out=devices.replicate(key_held_out, mesh), evaluate_every=evaluate_every,
        patience=patience, checkpoint=None if checkpoint is None else Path(checkpoint),
        checkpoint_every=checkpoint_every, identity=identity,
        program=None if checkpoint is None else traced.identity(source.first),
        log=Log(None if log is None else Path(log), callback), mesh=mesh, progress=progress,
        losses=np.zeros(num_steps, jnp.result_type(float)),
    )  # fmt: skip
    record = run.first_record()
    if devices.is_shared(mesh):
        steps = {"num_steps": str(num_steps), "the step that checkpoint is at": str(record.step)}
        devices.check_same({**identity, **steps, "the first state": digest(traced.first_state)})
    run.log.resume(record.step)
    record = run.last_record(record)
    if held_out is not None and record.step not in dict(record.evaluations):
        # It came after the checkpoint, for a run that goes on has no evaluation at this step.
        record = run.evaluated(record)
    weights = traced.weights(record.carry) if record.best is None else record.best
    return Fit(
        params=weights.params, raw_params=weights.raw_params, state=record.carry.state,
        losses=run.losses[: record.step].copy(),  # callbacks keep views of the run's
        held_out_losses=record.held_out_losses, num_steps=record.step,
    )  # fmt: skip
