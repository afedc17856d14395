"""The few types that every module shares: one step of the diffusion, and what a network is.

A diffusion with rates β_1..β_T has levels 0..T; step t leads from level s = t − 1 to level t. With

    ᾱ_t = ∏_{r ≤ t} (1 − β_r),    ᾱ_0 = 1,

everything a kernel or a readout needs of step t is β_t, ᾱ_s and ᾱ_t. Their complements 1 − ᾱ are
carried beside them as numbers of their own: near the data 1 − ᾱ is 1e-4 or less, and in float32 the
subtraction would leave three digits of it.

Source: Sohl-Dickstein et al. (2015), section 2.2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from probdiff.arguments import as_array, check_at_least, check_object, known, read_array, shown

Network = Callable[..., Array] | tuple[Callable[..., Array], Any]
"""`network(x_t, t, context=None)`: x_t `(B, *event_shape)`, t int32 `(B,)` in 1..T; or a pair of
`apply(params, x_t, t, context=None)` and params."""

Params = dict[str, Any]
"""Values of the `numpyro.param` sites of a program, by site name."""


class Step(NamedTuple):
    """Coefficients of step t, from level s = t − 1 to level t.

    A table of all steps has arrays of shape `(T,)`; `at` picks entries and makes them
    broadcastable to x, which is how kernels and readouts receive them.
    """

    t: Int[Array, "..."]
    """Index of the step, 1..T."""
    beta: Float[Array, "..."]
    """Diffusion rate β_t in (0, 1]."""
    alpha_bar_s: Float[Array, "..."]
    """Share of the data's variance left before the step, ᾱ_s; 1 for t = 1."""
    alpha_bar_t: Float[Array, "..."]
    """Share of the data's variance left after the step, ᾱ_t in [0, 1)."""
    noise_s: Float[Array, "..."]
    """Share of noise before the step, 1 − ᾱ_s; 0 for t = 1."""
    noise_t: Float[Array, "..."]
    """Share of noise after the step, 1 − ᾱ_t."""

    @property
    def T(self) -> int:
        """Number of steps of a table."""
        return self.t.shape[0]

    def between(self, t: Int[Any, "..."], s: Int[Any, "..."]) -> "Step":
        """Coefficients of one step from level s up to level t, s < t, of a table; 0 is the data.

            1 − β = ᾱ_t / ᾱ_s

        Args:
            t: Upper levels, 1..T.
            s: Lower ones, 0..T − 1, of the same shape.
        """
        up = Step(*(column[t - 1] for column in self))
        is_data, below = s == 0, jnp.maximum(s - 1, 0)
        alpha_bar_s = jnp.where(is_data, 1.0, self.alpha_bar_t[below])
        noise_s = jnp.where(is_data, 0.0, self.noise_t[below])
        # 1 − ᾱ_t/ᾱ_s by the smaller of ᾱ and 1 − ᾱ, which has the digits
        by_noise = (up.noise_t - noise_s) / alpha_bar_s
        beta = jnp.where(up.noise_t < 0.5, by_noise, 1 - up.alpha_bar_t / alpha_bar_s)
        return up._replace(beta=beta, alpha_bar_s=alpha_bar_s, noise_s=noise_s)

    def at(self, t: Int[Array, "*batch"] | int, event_dim: int) -> "Step":
        """Entries t of a table, with `event_dim` axes of size 1 behind, so that they meet x."""
        check_at_least(0, event_dim=event_dim)
        t = read_array("t", t, jnp.integer)
        times = known(t)
        if times is not None and not ((times >= 1) & (times <= self.T)).all():
            raise ValueError(f"t must lie in 1..{self.T}; got {shown(t)}")
        index = jnp.asarray(t) - 1
        shape = index.shape + (1,) * event_dim
        return Step(*(jnp.reshape(column[index], shape) for column in self))


def check_step(step: Step) -> None:
    """Raise a `ValueError` unless these are the coefficients of a step."""
    check_object(Step, "a Step, as schedules.steps(beta).at(t, event_dim)", step=step)


def as_states(step: Step, num_states: int = 0, **states: Any) -> list[Array]:
    """States at a step as arrays of JAX: symbols 0..num_states − 1, or numbers where it is 0.

    A `ValueError` names the one that is something else, or does not broadcast with the rest.
    """
    check_step(step)
    kinds = (jnp.integer, jnp.bool_) if num_states else (jnp.integer, jnp.floating)
    arrays = []
    for name, state in states.items():
        array = read_array(name, state, *kinds)
        symbols = known(array) if num_states else None
        if symbols is not None and ((symbols < 0) | (symbols >= num_states)).any():
            raise ValueError(f"{name} must hold symbols 0..{num_states - 1}; got {shown(array)}")
        if not num_states and isinstance(array, np.ndarray):  # JAX's own may be NaN where masked
            as_array(name, array, is_finite=True)
        arrays.append(jnp.asarray(array, jnp.int32 if array.dtype == bool else None))
    shapes = {name: array.shape for name, array in zip(states, arrays, strict=True)}
    try:
        np.broadcast_shapes(np.shape(step.beta), *shapes.values())
    except ValueError:
        raise ValueError(
            f"{' and '.join(shapes)} must broadcast with the coefficients of step, of shape "
            f"{np.shape(step.beta)}; got {shapes}"
        ) from None
    return arrays
