"""Trajectories x_1..x_T as NumPyro distributions: the forward one, and the learned reverse one.

One trajectory is one value of shape `(T, *event_shape)`, level t at index t − 1:

    ForwardTrajectory   q(x_1..x_T | x_0) = ∏_{t ≥ 1} q(x_t | x_{t−1})                eq. 3
    ReverseTrajectory   p(x_1..x_T) = π(x_T) ∏_{t ≥ 2} p(x_{t−1} | x_t)              eqs. 4 and 5
    DataGivenFirst      p(x_0 | x_1), the last reverse step, in the user's units

As one vector site the trajectory does not care in which order a guide or a model walks it, works
under any plate and handler, and is scored by a single batched network call. No closed form of KL
is registered for these classes, for p(x_s | x_t) asks a network at x_t: an objective that looks for
one (`TraceMeanField_ELBO`) falls back to sampled log-ratios.

Missing entries of x_0 (mask False) carry no information: forward they start at stationarity,
x_1 ~ π; in the model they follow the same stationary process backwards, T_π(x_s | x_t) by detailed
balance, and do not enter p(x_0 | x_1). Their terms cancel, so what remains is the bound of the
program that sees noise in place of what is missing.

`SampledTimes` is what `SampledTimeELBO` puts in place of a trajectory: x_1, and x_t at a few times.

Source: Sohl-Dickstein et al. (2015), sections 2.1 to 2.3.
"""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int
from numpyro.distributions import constraints

from probdiff import schedules
from probdiff.readouts.grid import Grid
from probdiff.types import Step

TRAJECTORY_SUFFIX = "_trajectory"
"""Of a trajectory's site, behind the name of its data."""


class SampledTimes(NamedTuple):
    """Levels of a trajectory at x_1 and at sampled times, in place of the whole."""

    x_1: Any
    """`(*batch, *event)`."""
    x_t: Any
    """`(num_times, *batch, *event)`."""
    t: Int[Array, "..."]
    """`(num_times, *batch)`, in 2..T."""
    weight: Float[Array, "..."]
    """`(num_times, *batch)`: 1 / (num_times · P(t)), so that a weighted sum estimates Σ_t."""


def first(trajectory: Any, event_dim: int) -> Any:
    """x_1 of a trajectory, whole or `SampledTimes`."""
    if isinstance(trajectory, SampledTimes):
        return trajectory.x_1
    return jax.lax.index_in_dim(trajectory, 0, -1 - event_dim, keepdims=False)


class _Trajectory(dist.Distribution):
    """What both trajectories share: the shape of a value and its support."""

    pytree_data_fields = ("steps", "observed")
    pytree_aux_fields = ("kernel",)
    has_rsample = True  # for symbols too: the guide has no parameters to differentiate by

    def __init__(self, kernel: Any, steps: Step, mask: Any, batch_shape: Any, x_shape: Any):
        self.kernel, self.steps, self.observed = kernel, steps, mask
        super().__init__(tuple(batch_shape), (steps.T, *x_shape))

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of one x_t, `event_shape` of the diffusion."""
        return self.event_shape[1:]

    @property
    def x_dim(self) -> int:
        """Number of axes of one x_t."""
        return self.event_dim - 1

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(self.kernel.support, self.event_dim)

    def sum_event(self, terms: Float[Array, "..."]) -> Float[Array, "..."]:
        """Sum over the axes of one x_t."""
        return jnp.sum(terms, axis=tuple(range(-self.x_dim, 0)))

    def step_at(self, t: Int[Array, "..."]) -> Step:
        """Coefficients of steps t, broadcastable to x of shape `(*t.shape, *event)`."""
        return self.steps.at(t, self.x_dim)

    def over_time(self, x: Any) -> Any:
        """Put the time axis in front: `(..., T, *event)` to `(T, ..., *event)`."""
        return jnp.moveaxis(x, -1 - self.x_dim, 0)


def _where(mask: Any, kept: Any, otherwise: Any) -> Any:
    return kept if mask is None else jnp.where(mask, kept, otherwise)


class ForwardTrajectory(_Trajectory):
    """Forward trajectory q(x_1..x_T | x_0), started at data; batch shape that of x_0."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("x_0",)

    def __init__(self, kernel: Any, steps: Step, x_0: Any, x_dim: int, mask: Any = None):
        self.x_0 = x_0
        split = x_0.ndim - x_dim
        super().__init__(kernel, steps, mask, x_0.shape[:split], x_0.shape[split:])

    def broadcast_to(self, batch_shape: tuple[int, ...]) -> "ForwardTrajectory":
        """The same law for a larger batch, by repeating x_0."""
        shape = (*batch_shape, *self.x_shape)
        mask = None if self.observed is None else jnp.broadcast_to(self.observed, shape)
        x_0 = jnp.broadcast_to(self.x_0, shape)
        return ForwardTrajectory(self.kernel, self.steps, x_0, self.x_dim, mask)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Any:
        key_missing, key_steps = jax.random.split(key)
        shape = (*sample_shape, *self.batch_shape, *self.x_shape)
        x_0 = jnp.broadcast_to(self.x_0, shape)
        if self.observed is not None:
            x_0 = jnp.where(self.observed, x_0, self.kernel.stationary(shape).sample(key_missing))

        def advance(x_s: Any, inputs: Any) -> Any:
            step, key = inputs
            x_t = self.kernel.transition(x_s, step).sample(key)
            return x_t, x_t

        keys = jax.random.split(key_steps, self.steps.T)
        _, trajectory = jax.lax.scan(advance, x_0, (self.steps, keys))
        return jnp.moveaxis(trajectory, 0, -1 - self.x_dim)

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        x = self.over_time(value)
        x_0 = jnp.broadcast_to(self.x_0, x.shape[1:])
        x_s = jnp.concatenate([x_0[None], x[:-1]])
        step = self.steps.at(_times(1, self.steps.T, x.ndim - 1 - self.x_dim), self.x_dim)
        terms = self.kernel.transition(x_s, step).log_prob(x)
        if self.observed is not None:
            start = self.kernel.stationary(x.shape[1:]).log_prob(x[0])
            terms = terms.at[0].set(jnp.where(self.observed, terms[0], start))
        return jnp.sum(self.sum_event(terms), 0)

    def marginal_at(self, t: Int[Array, "..."], shape: tuple[int, ...]) -> dist.Distribution:
        """q(x_t | x_0), elementwise over `shape` that ends in batch and event; any t ≥ 1."""
        return self.kernel.marginal(jnp.broadcast_to(self.x_0, shape), self.step_at(t))

    def sample_at(self, key: Array, t: Int[Array, "..."]) -> Any:
        """Draw x_t given x_0 for t of shape `(*sample, *batch)`: one level, no trajectory."""
        key_known, key_missing = jax.random.split(key)
        shape = (*t.shape, *self.x_shape)
        x_t = self.marginal_at(t, shape).sample(key_known)
        if self.observed is None:
            return x_t
        return jnp.where(self.observed, x_t, self.kernel.stationary(shape).sample(key_missing))


class ReverseTrajectory(_Trajectory):
    """Learned reverse trajectory p(x_1..x_T), from x_T ~ π down to x_1."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("network", "context")
    pytree_aux_fields = ("readout", "context_dim")

    def __init__(
        self,
        kernel: Any,
        steps: Step,
        readout: Any,
        network: Any,
        x_shape: tuple[int, ...],
        context: Any = None,
        context_dim: int = 0,
        mask: Any = None,
    ):
        self.readout, self.network = readout, network
        self.context, self.context_dim = context, context_dim
        lead = [] if context is None else [context.shape[: context.ndim - context_dim]]
        lead += [] if mask is None else [mask.shape[: mask.ndim - len(x_shape)]]
        super().__init__(kernel, steps, mask, jnp.broadcast_shapes((), *lead), x_shape)

    def outputs(
        self, x_t: Any, t: Int[Array, "..."], *, examples_first: bool = False
    ) -> tuple[Any, ...]:
        """Network outputs for x_t of shape `(*t.shape, *event)`, one array of it per output.

        With `examples_first` the rows that the network gets run over the first axis of t, of times
        or draws, for one example after another: examples divided among devices stay in place.
        """
        lead, context = t.shape, self.context
        last = len(lead) - 1 if examples_first and len(lead) > 1 else 0

        def rows(x: Any) -> Any:
            return jnp.moveaxis(x, 0, last).reshape(-1, *x.shape[len(lead) :]) if lead else x[None]

        def entries(out: Any, shape: tuple[int, ...]) -> Any:
            if last == 0:
                return out.reshape(*lead, *shape)
            return jnp.moveaxis(out.reshape(*lead[1:], lead[0], *shape), last, 0)

        if context is not None:
            shape = context.shape[context.ndim - self.context_dim :]
            context = rows(jnp.broadcast_to(context, (*lead, *shape)))
        out = self.network(rows(x_t), rows(t).astype(jnp.int32), context)
        count = self.readout.num_outputs(self.kernel)
        if self.x_dim == 0 and count > 1:
            return tuple(entries(out[:, i], ()) for i in range(count))
        return tuple(entries(o, self.x_shape) for o in jnp.split(out, count, axis=-1))

    def reverse_step(self, x_t: Any, t: Int[Array, "..."]) -> dist.Distribution:
        """p(x_s | x_t) as the network says it, elementwise; x_t of shape `(*t.shape, *event)`.

        With several axes the first is of times or draws, the others are of examples.
        """
        outputs = self.outputs(x_t, t, examples_first=True)
        return self.readout(self.kernel, outputs, x_t, self.step_at(t))

    def reverse_step_at(self, x_t: Any, t: Int[Array, ""]) -> dist.Distribution:
        """p(x_s | x_t) for all x_t at one t: the step's coefficients are a number each."""
        outputs = self.outputs(x_t, jnp.broadcast_to(t, x_t.shape[: x_t.ndim - self.x_dim]))
        return self.readout(self.kernel, outputs, x_t, self.step_at(t))

    def x_0_hat(self, x_t: Any, t: Int[Array, "..."]) -> Any:
        """Denoised point E[x_0 | x_t] on the scale of the diffusion."""
        outputs = self.outputs(x_t, t)
        return self.readout.x_0_hat(self.kernel, outputs, x_t, self.step_at(t))

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Any:
        return self.walk(key, sample_shape, keep=True)[1]

    def walk(
        self,
        key: Array,
        sample_shape: tuple[int, ...] = (),
        *,
        steps: int | None = None,
        keep: bool = False,
    ) -> tuple[Any, Any]:
        """Draw from x_T down to x_1, over all T levels or over `steps` of them.

        Returns:
            x_1, and the levels x_1..x_T on the axis in front of x's own if they are kept, or None.
        """
        n = self.steps.T if steps is None else steps
        times, table = schedules.respaced(self.steps, n)
        key_T, key_steps = jax.random.split(key)
        lead = (*sample_shape, *self.batch_shape)
        x_T = self.kernel.stationary((*lead, *self.x_shape)).sample(key_T)

        def retreat(x_t: Any, inputs: Any) -> Any:
            t, step, key = inputs
            x_s = self._draw(key, x_t, t, step, is_longer=n < self.steps.T)
            return x_s, x_s if keep else None

        keys = jax.random.split(key_steps, n - 1)
        inputs = (jnp.asarray(times[1:]), jax.tree.map(lambda column: column[1:], table), keys)
        x_1, x = jax.lax.scan(retreat, x_T, inputs, reverse=True)
        if keep:
            x = jnp.moveaxis(jnp.concatenate([x, x_T[None]]), 0, -1 - self.x_dim)
        return x_1, x

    def _draw(self, key: Array, x_t: Any, t: Int[Array, ""], step: Step, *, is_longer: bool) -> Any:
        """One draw of x_s given x_t, all at one t; missing entries stay in the stationary law."""
        if is_longer:
            outputs = self.outputs(x_t, jnp.broadcast_to(t, x_t.shape[: x_t.ndim - self.x_dim]))
            trained = self.step_at(t)
            law = self.readout.longer_step(self.kernel, outputs, x_t, trained, step)
        else:
            law = self.reverse_step_at(x_t, t)
        x_s = law.sample(key)
        if self.observed is None:
            return x_s
        missing = self.kernel.transition(x_t, step).sample(jax.random.fold_in(key, 1))
        return jnp.where(self.observed, x_s, missing)

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        x = self.over_time(value)
        lead = x.shape[1 : x.ndim - self.x_dim]
        t = jnp.broadcast_to(_times(2, self.steps.T, len(lead)), (self.steps.T - 1, *lead))
        terms = self.reverse_step(x[1:], t).log_prob(x[:-1])
        if self.observed is not None:
            missing = self.kernel.transition(x[1:], self.step_at(t)).log_prob(x[:-1])
            terms = jnp.where(self.observed, terms, missing)
        end = self.kernel.stationary(x.shape[1:]).log_prob(x[-1])
        return self.sum_event(end) + jnp.sum(self.sum_event(terms), 0)


def _times(start: int, stop: int, lead_dim: int) -> Int[Array, "..."]:
    """Times start..stop on a leading axis, with `lead_dim` axes of size 1 behind."""
    return jnp.arange(start, stop + 1).reshape(-1, *[1] * lead_dim)


def to_data(x: Any, support: Any, loc: Any, scale: Any) -> Any:
    """From the scale of the diffusion to the user's units, and onto the grid where there is one.

    Symbols are as they are.
    """
    if scale is None:
        return x
    x_0 = x * scale + loc
    return support.nearest(x_0) if isinstance(support, Grid) else x_0


class DataGivenFirst(dist.Distribution):
    """Last reverse step p(x_0 | x_1) in the user's units: loc + scale · x, x ~ `base`.

    Where the support is a `Grid`, x_0 is put on its nearest value, and `log_prob` is of a mass.
    Symbols have no units: for them `loc` and `scale` are None. Entries whose mask is False do not
    enter `log_prob`.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("base", "loc", "scale", "observed")
    pytree_aux_fields = ("data_support",)
    has_rsample = True

    def __init__(self, base: dist.Distribution, support: Any, x_dim: int, loc, scale, mask=None):
        self.base, self.loc, self.scale, self.observed = base, loc, scale, mask
        self.data_support = support
        split = len(base.batch_shape) - x_dim
        super().__init__(base.batch_shape[:split], base.batch_shape[split:])

    def with_base(self, base: dist.Distribution) -> "DataGivenFirst":
        """The same with another law on the scale of the diffusion."""
        scaled = (self.loc, self.scale, self.observed)
        return DataGivenFirst(base, self.data_support, self.event_dim, *scaled)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(self.data_support, self.event_dim)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Any:
        return to_data(self.base.sample(key, sample_shape), self.data_support, self.loc, self.scale)

    def log_prob(self, value: Any, intermediates: Any = None) -> Float[Array, "..."]:
        value = _where(self.observed, value, jnp.zeros((), jnp.asarray(value).dtype))
        if self.scale is None:
            terms = self.base.log_prob(value)
        elif isinstance(self.data_support, Grid):
            mean, sd = self.base.loc * self.scale + self.loc, self.base.scale * self.scale
            terms = self.data_support.log_mass(value, mean, sd)
        else:
            terms = self.base.log_prob((value - self.loc) / self.scale) - jnp.log(self.scale)
        terms = _where(self.observed, terms, 0.0)  # a missing entry may be NaN
        return jnp.sum(terms, axis=tuple(range(-self.event_dim, 0)))
