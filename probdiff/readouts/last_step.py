"""The last reverse step p(x_0 | x_1): tied to the forward kernel, learned, or put on a grid.

Tied, it is the forward kernel with its arguments exchanged, T_π(x_0 | x_1; β_1): no network is
asked, and no bound exceeds −H(X_1). Learned, the limit is −H(X_0). Where numbers take the values of
a grid, such as the grey levels of pixels, `Discretised` puts what the network says on the nearest
value k, and x_0 has a probability instead of a density,

    p(x_0 = k | x_1) = ∫ over the cell of k of p(x_0 | x_1).

Sources: Sohl-Dickstein et al. (2015), appendix B.2; Ho et al. (2020), section 3.3.
"""

import abc
import dataclasses
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpyro.distributions as dist
from jaxtyping import Array, Shaped

from probdiff.kernels import DiscreteKernel, GaussianKernel
from probdiff.readouts.grid import Grid
from probdiff.types import Step

_Kernel = GaussianKernel | DiscreteKernel
_State = Shaped[Array, "..."]
_ReverseStep = Callable[[_State, Step], dist.Distribution]


class LastStep(abc.ABC):
    """How x_0 follows from x_1: `Tied()`, `Learned()`, `Discretised(low, high, levels)`.

    Abstract: a subclass returns p(x_0 | x_1), elementwise, on the scale of the diffusion, from the
    kernel and from what the network says.

    Example:
        The network's mean with a noise of measurement that is known, 0.1:

        >>> class Measured(readouts.LastStep):
        ...     def __call__(self, kernel, reverse_step, x_1, step):
        ...         return dist.Normal(reverse_step(x_1, step).mean, 0.1)
        >>> reverse = standard_diffusion(last_step=Measured(), beta=schedules.harmonic(4)).bind({})
        >>> law = reverse.last(jnp.array([1.0]))
        >>> round(float(law.mean[0]), 3), round(float(law.scale[0]), 3)  # √(1 − β_1) x_1
        (0.866, 0.1)
    """

    grid: Grid | None = None
    """Values that x_0 takes, the user's units; None where it takes any."""
    is_tied: bool = False
    """Whether the step is the forward kernel's, and no network is asked."""

    @abc.abstractmethod
    def __call__(
        self, kernel: _Kernel, reverse_step: _ReverseStep, x_1: _State, step: Step
    ) -> dist.Distribution:
        """p(x_0 | x_1), elementwise; `reverse_step(x_1, step)` is what the network says.

        On the scale of the diffusion, and before x_0 is put on a grid.
        """


@dataclasses.dataclass(frozen=True)
class Tied(LastStep):
    """p(x_0 | x_1) = T_π(x_0 | x_1; β_1): no network, and K is at most −H(X_1). No arguments.

    Example:
        >>> beta = schedules.linear(4, beta_1=0.19, beta_T=0.5)
        >>> law = standard_diffusion(beta=beta).bind({}).last(jnp.array([2.0]))
        >>> round(float(law.mean[0]), 3), round(float(law.variance[0]), 3)  # N(√(1−β_1) x_1, β_1)
        (1.8, 0.19)
    """

    is_tied = True

    def __call__(
        self, kernel: _Kernel, reverse_step: _ReverseStep, x_1: _State, step: Step
    ) -> dist.Distribution:
        """Forward kernel with its arguments exchanged (detailed balance)."""
        return kernel.transition(x_1, step)


@dataclasses.dataclass(frozen=True)
class Learned(LastStep):
    """p(x_0 | x_1) from the network, like every other step; K is at most −H(X_0). No arguments.

    On data that lie on a curve or a grid −H(X_0), and so K, has no limit.

    Example:
        >>> diffusion = Diffusion(
        ...     GaussianKernel(), schedules.harmonic(4), lambda x_t, t: jnp.full_like(x_t, 3.0),
        ...     event_shape=(2,), last_step=readouts.Learned(),
        ...     readout=readouts.Data(readouts.ForwardVariance()),
        ... )
        >>> diffusion.bind({}).last(jnp.ones(2)).mean.tolist()
        [3.0, 3.0]
    """

    def __call__(
        self, kernel: _Kernel, reverse_step: _ReverseStep, x_1: _State, step: Step
    ) -> dist.Distribution:
        """What the network says at t = 1."""
        return reverse_step(x_1, step)


@dataclasses.dataclass(frozen=True)
class Discretised(LastStep):
    """Numbers on a grid, DDPM's decoder: the network's Gaussian at t = 1, put on the nearest value.

    `Discretised(0, 255, 256)` is for grey levels 0, 1, …, 255; x_0 stays a float in these units.
    The bound is then one of a probability, at most −H(X_0), and `diagnostics.bits_per_dim` applies
    without dequantisation.

    Let the first noise, √β_1 · scale, be about the spacing Δ (1.3 Δ in DDPM): with less, nats are
    paid at levels where the network would have to know the grid. Digits of 17 grey levels, a small
    network after 800 steps: 4.06, 2.52, 2.34 and 2.24 bits per pixel at 0.08, 0.4, 0.7 and 1.2 Δ,
    and 2.69 for the same network on dequantised digits with β_1 = 2e-4 (errors 0.015).

    Entries may differ: arrays that broadcast to the event give each its own grid, and 0 levels
    leave an entry what `Learned` makes of it, a number with a density.

    Args:
        low, high, levels: As in `Grid`.

    Example:
        >>> grid = readouts.Discretised(0, 16, 17)
        >>> diffusion = standard_diffusion(loc=8.0, scale=5.0, last_step=grid)
        >>> x_0 = sample.ancestral(jax.random.key(0), diffusion, {}, 100)
        >>> set(x_0.tolist()) <= set(range(17))  # grey levels, in the user's units
        True
        >>> mixed = readouts.Discretised(0, [1, 10, 0], [2, 11, 0])  # a class, a count, a length
    """

    low: Real | Any
    high: Real | Any
    levels: Real | Any

    def __post_init__(self) -> None:
        grid = Grid(self.low, self.high, self.levels)
        for field in dataclasses.fields(self):  # plain numbers or tuples, which a file can hold
            object.__setattr__(self, field.name, getattr(grid, field.name))

    @property
    def grid(self) -> Grid:
        """Values that x_0 takes."""
        return Grid(self.low, self.high, self.levels)

    def __call__(
        self, kernel: _Kernel, reverse_step: _ReverseStep, x_1: _State, step: Step
    ) -> dist.Distribution:
        """What the network says at t = 1, before it is put on the grid."""
        return reverse_step(x_1, step)
