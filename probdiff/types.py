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
from jaxtyping import Array, Float, Int

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
        index = jnp.asarray(t) - 1
        shape = index.shape + (1,) * event_dim
        return Step(*(jnp.reshape(column[index], shape) for column in self))
