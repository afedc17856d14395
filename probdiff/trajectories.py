"""Trajectories x_1..x_T as NumPyro distributions: the forward one, and the learned reverse one.

One trajectory is one value of shape `(T, *event_shape)`, level t at index t − 1:

    ForwardTrajectory   q(x_1..x_T | x_0) = ∏_{t ≥ 1} q(x_t | x_{t−1})                eq. 3
    ReverseTrajectory   p(x_1..x_T) = π(x_T) ∏_{t ≥ 2} p(x_{t−1} | x_t)              eqs. 4 and 5

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

from probdiff.kernels import Kernel
from probdiff.reverse import Mask, Reverse, State, Values, where_observed
from probdiff.types import Step

TRAJECTORY_SUFFIX = "_trajectory"
"""Of a trajectory's site, behind the name of its data."""


class SampledTimes(NamedTuple):
    """Levels of a trajectory at x_1 and at sampled times, in place of the whole."""

    x_1: State
    """`(*batch, *event)`."""
    x_t: State
    """`(num_times, *batch, *event)`."""
    t: Int[Array, "..."]
    """`(num_times, *batch)`, in 2..T."""
    weight: Float[Array, "..."]
    """`(num_times, *batch)`: 1 / (num_times · P(t)), so that a weighted sum estimates Σ_t."""


def first(trajectory: State | SampledTimes, event_dim: int) -> State:
    """x_1 of a trajectory, whole or `SampledTimes`."""
    if isinstance(trajectory, SampledTimes):
        return trajectory.x_1
    return jax.lax.index_in_dim(trajectory, 0, -1 - event_dim, keepdims=False)


class _Trajectory(dist.Distribution):
    """What both trajectories share: the shape of a value and its support."""

    pytree_data_fields = ("steps", "observed")
    pytree_aux_fields = ("kernel",)
    has_rsample = True  # for symbols too: the guide has no parameters to differentiate by

    def __init__(self, kernel: Kernel, steps: Step, mask: Mask, batch_shape: Any, x_shape: Any):
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

    def sum_observed(self, terms: Float[Array, "..."]) -> Float[Array, "..."]:
        """The same over observed entries; missing ones run one process in guide and model."""
        return self.sum_event(
            terms if self.observed is None else jnp.where(self.observed, terms, 0.0)
        )

    def step_at(self, t: Int[Array, "..."]) -> Step:
        """Coefficients of steps t, broadcastable to x of shape `(*t.shape, *event)`."""
        return self.steps.at(t, self.x_dim)

    def over_time(self, x: State) -> State:
        """Put the time axis in front: `(..., T, *event)` to `(T, ..., *event)`."""
        return jnp.moveaxis(x, -1 - self.x_dim, 0)


def _scan(step: Any, start: Any, inputs: Any, **options: Any) -> Any:
    """`lax.scan` as a jitted call of its own.

    What a bare one compiles outside of `jit`, as in `SVI.init`, JAX keeps as long as it runs.
    """
    return jax.jit(lambda *given: jax.lax.scan(step, *given, **options))(start, inputs)


class ForwardTrajectory(_Trajectory):
    """Forward trajectory q(x_1..x_T | x_0), started at data; batch shape that of x_0."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("x_0",)

    def __init__(self, kernel: Kernel, steps: Step, x_0: State, x_dim: int, mask: Mask = None):
        self.x_0 = x_0
        split = x_0.ndim - x_dim
        super().__init__(kernel, steps, mask, x_0.shape[:split], x_0.shape[split:])

    @classmethod
    def of(cls, reverse: Reverse, x_0: Values, mask: Mask = None) -> "ForwardTrajectory":
        """The one that a reverse process undoes, for data in the user's units."""
        x_0 = jnp.asarray(reverse.to_state(where_observed(mask, x_0, 0)))
        return cls(reverse.kernel, reverse.trained, x_0, reverse.event_dim, mask)

    def broadcast_to(self, batch_shape: tuple[int, ...]) -> "ForwardTrajectory":
        """The same law for a larger batch, by repeating x_0."""
        shape = (*batch_shape, *self.x_shape)
        mask = None if self.observed is None else jnp.broadcast_to(self.observed, shape)
        x_0 = jnp.broadcast_to(self.x_0, shape)
        return ForwardTrajectory(self.kernel, self.steps, x_0, self.x_dim, mask)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> State:
        key_missing, key_steps = jax.random.split(key)
        shape = (*sample_shape, *self.batch_shape, *self.x_shape)
        x_0 = jnp.broadcast_to(self.x_0, shape)
        if self.observed is not None:
            x_0 = jnp.where(self.observed, x_0, self.kernel.stationary(shape).sample(key_missing))

        def advance(x_s: State, inputs: tuple[Step, Array]) -> tuple[State, State]:
            step, key = inputs
            x_t = self.kernel.transition(x_s, step).sample(key)
            return x_t, x_t

        keys = jax.random.split(key_steps, self.steps.T)
        _, trajectory = _scan(advance, x_0, (self.steps, keys))
        return jnp.moveaxis(trajectory, 0, -1 - self.x_dim)

    def log_prob(self, value: State, intermediates: Any = None) -> Float[Array, "..."]:
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

    def sample_at(self, key: Array, t: Int[Array, "..."]) -> State:
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
    pytree_data_fields = ("reverse",)

    def __init__(self, reverse: Reverse, mask: Mask = None):
        self.reverse = reverse
        context, lead = reverse.context, []
        if context is not None:
            lead.append(context.shape[: context.ndim - len(reverse.context_shape)])
        if mask is not None:
            lead.append(mask.shape[: mask.ndim - reverse.event_dim])
        batch_shape = jnp.broadcast_shapes((), *lead)
        super().__init__(reverse.kernel, reverse.steps, mask, batch_shape, reverse.event_shape)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> State:
        return self.walk(key, sample_shape, keep=True)[1]

    def walk(
        self, key: Array, sample_shape: tuple[int, ...] = (), *, keep: bool = False
    ) -> tuple[State, State | None]:
        """Draw from x_T down to x_1: x_1, and all levels, x_1 first, if they are kept."""
        key_T, key_steps = jax.random.split(key)
        lead = (*sample_shape, *self.batch_shape)
        x_T = self.kernel.stationary((*lead, *self.x_shape)).sample(key_T)

        def retreat(x_t: State, inputs: tuple[Array, Array]) -> tuple[State, State | None]:
            t, key = inputs
            x_s = self.reverse.step(x_t, t).sample(key)
            if self.observed is not None:
                missing = self.kernel.transition(x_t, self.step_at(t))
                x_s = jnp.where(self.observed, x_s, missing.sample(jax.random.fold_in(key, 1)))
            return x_s, x_s if keep else None

        n = self.reverse.n
        inputs = jnp.arange(2, n + 1), jax.random.split(key_steps, n - 1)
        x_1, x = _scan(retreat, x_T, inputs, reverse=True)
        if keep:
            x = jnp.moveaxis(jnp.concatenate([x, x_T[None]]), 0, -1 - self.x_dim)
        return x_1, x

    def log_prob(self, value: State, intermediates: Any = None) -> Float[Array, "..."]:
        x = self.over_time(value)
        lead = x.shape[1 : x.ndim - self.x_dim]
        t = jnp.broadcast_to(_times(2, self.steps.T, len(lead)), (self.steps.T - 1, *lead))
        terms = self.reverse.step(x[1:], t, examples_first=True).log_prob(x[:-1])
        if self.observed is not None:  # missing entries stay in the stationary law
            missing = self.kernel.transition(x[1:], self.step_at(t)).log_prob(x[:-1])
            terms = jnp.where(self.observed, terms, missing)
        end = self.kernel.stationary(x.shape[1:]).log_prob(x[-1])
        return self.sum_event(end) + jnp.sum(self.sum_event(terms), 0)


def _times(start: int, stop: int, lead_dim: int) -> Int[Array, "..."]:
    """Times start..stop on a leading axis, with `lead_dim` axes of size 1 behind."""
    return jnp.arange(start, stop + 1).reshape(-1, *[1] * lead_dim)
