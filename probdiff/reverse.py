"""`Reverse`: the learned reverse process with its parameters bound, one value.

Everything that samples, scores or conditions a trained diffusion asks it for four laws, at any
level t of 1..T:

    p(x_s | x_t)           one reverse step, to the level below or to any s < t
    x̂_0 = E[x_0 | x_t]     the denoised point; the law p(x_0 | x_t), where the readout says one
    p(x_0 | x_1)           the last step, on the scale of the diffusion and in the user's units

It is a pytree: weights, rates, units and context are its leaves, so that what is compiled takes
them as arguments; kernel, readout and last step are its structure.

`respaced(n)` is the process that keeps n levels t_1 = 1 < … < t_n = T, evenly spread. Its level i
is t_i, and its steps are longer than those that the network was trained for:

    p(x_s | x_t) = N(w_0 x̂_0 + w_t x_t, variance)                numbers
    p(x_s | x_t) = Σ_j p(x_0 = j | x_t) q(x_s | x_t, x_0 = j)     symbols

with the coefficients of the longer step. A learned variance has no value for it, and the bridge's
stands there. It is another model than the T-step one: its evidence is its own.

Source: Sohl-Dickstein et al. (2015), section 2.2, eqs. 4 and 5.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Shaped
from numpyro.distributions import constraints

from probdiff import schedules
from probdiff.arguments import check_at_least, plain
from probdiff.kernels import Kernel
from probdiff.readouts import DiscreteReadout, GaussianReadout, Variance
from probdiff.readouts.grid import Grid, is_on_grid
from probdiff.readouts.last_step import LastStep
from probdiff.types import Step
from probdiff.validation import check_context

State = Shaped[Array | np.ndarray, "..."]
Values = Shaped[ArrayLike, "..."]
Outputs = tuple[Array, ...]
Mask = Bool[Array | np.ndarray, "..."] | None
Level = Int[Any, "..."] | int


class Units(NamedTuple):
    """The user's units, x_0 = loc + scale · x; None and None for symbols, which have none.

    Both are NumPy's float64, so that NumPy's float64 data lose no digits to a large loc. Inside
    what is compiled they have JAX's float type, as x_0 has.
    """

    loc: Any = None
    scale: Any = None

    def to_state(self, x_0: Values) -> Values:
        """From the user's units to the scale of the diffusion."""
        return x_0 if self.scale is None else (x_0 - self.loc) / self.scale

    def to_data(self, x: Values) -> Values:
        """The way back."""
        return x if self.scale is None else x * self.scale + self.loc


class AtLogSNR(NamedTuple):
    """A network that is told log ᾱ_t/(1−ᾱ_t) instead of t, as `network(x_t, t, context)`."""

    apply: Any
    """`apply(x_t, log_snr, context)`."""
    steps: Step
    """Table of the levels."""

    def __call__(self, x_t: State, t: Level, context: Any) -> Array:
        """What it says at levels t, one for each row."""
        step = self.steps.at(t, 0)
        return self.apply(x_t, jnp.log(step.alpha_bar_t) - jnp.log(step.noise_t), context)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["trained", "steps", "network", "units", "context"],
    meta_fields=["kernel", "readout", "last_step", "event_shape", "context_shape"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Reverse:
    """The learned reverse process, parameters bound; made by `Diffusion.bind`.

    Levels are 1..`n`, T of them unless it was `respaced`; x_t is `(*lead, *event_shape)` on the
    scale of the diffusion, and a level is a number or has the shape `lead`.

    Example:
        >>> reverse = standard_diffusion((2,), T=10).bind({})  # x_0 ~ N(0, I)
        >>> x_t, t = jnp.array([1.0, -2.0]), 7
        >>> step = reverse.steps.at(t, 0)
        >>> bool(jnp.allclose(reverse.x_0_hat(x_t, t), jnp.sqrt(step.alpha_bar_t) * x_t))
        True
        >>> reverse.respaced(4).times.tolist()
        [1, 4, 7, 10]
    """

    kernel: Kernel
    readout: GaussianReadout | DiscreteReadout
    last_step: LastStep
    event_shape: tuple[int, ...]
    trained: Step
    """Coefficients of the T steps that the network was trained for."""
    steps: Step
    """Coefficients of the step from each level to the one below; `t` is the level's time."""
    network: Any
    """`network(x_t, t, context)`, weights inside."""
    units: Units
    context_shape: tuple[int, ...] | None = None
    context: Any = None
    """Handed to the network, `(*lead, *context_shape)`, or None."""

    @property
    def T(self) -> int:
        """Number of steps that the network was trained for."""
        return self.trained.T

    @property
    def n(self) -> int:
        """Number of steps."""
        return self.steps.T

    @property
    def times(self) -> Int[np.ndarray, " n"]:
        """t of each level."""
        return schedules.evenly_spread(self.T, self.n)

    @property
    def is_respaced(self) -> bool:
        """Whether levels are left out."""
        return self.n < self.T

    @property
    def event_dim(self) -> int:
        """Number of axes of one x_t."""
        return len(self.event_shape)

    @property
    def grid(self) -> Grid | None:
        """Values that x_0 takes, the user's units; None where it takes any."""
        return self.last_step.grid

    @property
    def support(self) -> constraints.Constraint:
        """Values one number of x_0 may take, the user's units."""
        return self.kernel.support if self.grid is None else self.grid

    @property
    def variance(self) -> Variance | None:
        """Variance of a step; None where the network says it."""
        return self.readout.fixed_variance(longer=self.is_respaced)

    def respaced(self, n: int | None) -> "Reverse":
        """The process of n levels, evenly spread with the first and the last; itself for None.

        Raises:
            ValueError: if n is not in 2..T.
        """
        check_at_least(0, or_none=True, steps=n)
        if n is None or n == self.n:
            return self
        return dataclasses.replace(self, steps=schedules.respaced(self.trained, n)[1])

    def on_levels(self, table: Step) -> "Reverse":
        """The process on other levels than it was trained for, whose coefficients are `table`.

        Raises:
            ValueError: if its network is told t, of which it knows those of training alone.
        """
        if not isinstance(self.network, AtLogSNR):
            raise ValueError(
                "network must take the log-SNR, as networks.FromMixture does, to be asked at other "
                "levels than those of training; got one that takes t"
            )
        network = self.network._replace(steps=table)
        return dataclasses.replace(self, trained=table, steps=table, network=network)

    def given(self, context: Any) -> "Reverse":
        """The process with this context, `(*lead, *context_shape)`.

        Raises:
            ValueError: unless context is given as `context_shape` says.
        """
        check_context(context, self.context_shape)
        return dataclasses.replace(self, context=context)

    def coefficients(self, t: Level) -> Step:
        """Coefficients of the step from level t, broadcastable to x_t."""
        return self.steps.at(t, self.event_dim)

    # relative to loc

    def relative(self) -> "Reverse":
        """The process of x_0 − loc, of the same density: for what float32 is to hold in full.

        Values of a grid stay where they are, and symbols.
        """
        if not self._has_loc:
            return self
        loc, scale = self.units
        left = loc - taken_off(loc, self.grid)
        return dataclasses.replace(self, units=Units(left, scale))

    def less_loc(self, x_0: Any) -> np.ndarray:
        """x_0 as `relative` has it, NumPy: float64 until loc is taken off."""
        x_0 = np.asarray(plain("x_0", x_0))
        if not self._has_loc:
            return x_0
        return less_loc(x_0, taken_off(self.units.loc, self.grid), self.kernel.dtype)

    def plus_loc(self, x_0: Any) -> np.ndarray:
        """What `relative` draws in the user's units, NumPy's float64; symbols stay ints."""
        x_0 = np.asarray(x_0)
        if self._has_loc:
            loc = taken_off(self.units.loc, self.grid)
            x_0 = x_0.astype(np.float64) + np.asarray(loc, np.float64)
        return x_0 if self.grid is None else self.grid.nearest_in_float64(x_0)

    @property
    def _has_loc(self) -> bool:
        return self.units.loc is not None and not is_on_grid(self.grid).all()

    # what the network says

    def outputs(self, x_t: State, t: Level, *, examples_first: bool = False) -> Outputs:
        """The network's outputs at x_t, an array of its shape for each.

        With `examples_first` the rows that the network gets run over the first axis of x_t, of
        times or draws, for one example after another: examples divided among devices stay in place.
        """
        lead = x_t.shape[: x_t.ndim - self.event_dim]
        last = len(lead) - 1 if examples_first and len(lead) > 1 else 0

        def rows(x: State) -> Array:
            return jnp.moveaxis(x, 0, last).reshape(-1, *x.shape[len(lead) :]) if lead else x[None]

        def entries(out: Array, shape: tuple[int, ...]) -> Array:
            if last == 0:
                return out.reshape(*lead, *shape)
            return jnp.moveaxis(out.reshape(*lead[1:], lead[0], *shape), last, 0)

        context = self.context
        if context is not None:
            context = rows(jnp.broadcast_to(context, (*lead, *self.context_shape)))
        time = jnp.broadcast_to(self._time(t), lead)
        out = self.network(rows(x_t), rows(time).astype(jnp.int32), context)
        count = self.readout.num_outputs(self.kernel)
        if self.event_dim == 0 and count > 1:
            return tuple(entries(out[:, i], ()) for i in range(count))
        return tuple(entries(o, self.event_shape) for o in jnp.split(out, count, axis=-1))

    def x_0_hat(self, x_t: State, t: Level, outputs: Outputs | None = None) -> Float[Array, "..."]:
        """Denoised point E[x_0 | x_t], numbers and bits.

        Args:
            x_t: State.
            t: Its level.
            outputs: What the network said there; it is asked where they are absent, here and below.
        """
        outputs = self.outputs(x_t, t) if outputs is None else outputs
        return self.readout.x_0_hat(self.kernel, outputs, x_t, self._trained(t))

    def score(self, x_t: State, t: Level, outputs: Outputs | None = None) -> Float[Array, "..."]:
        """∇ log p(x_t) by Tweedie's formula, (√ᾱ_t x̂_0 − x_t)/(1−ᾱ_t), numbers.

        It is that of the data's own law where x̂_0 is, on the scale of the diffusion; −√(1−ᾱ_t)
        times it is the noise ε̂, and √ᾱ_t ε̂ − √(1−ᾱ_t) x̂_0 the velocity.

        Raises:
            ValueError: if x_t are symbols, which have none.
        """
        if self.kernel.is_discrete:
            raise ValueError(f"score is for numbers; got {self.kernel}")
        step = self._trained(t)
        x_0_hat = self.x_0_hat(x_t, t, outputs)
        return (jnp.sqrt(step.alpha_bar_t) * x_0_hat - x_t) / step.noise_t

    def x_0_given(self, x_t: State, t: Level, outputs: Outputs | None = None) -> dist.Distribution:
        """Law p(x_0 | x_t), elementwise, where the readout says one."""
        outputs = self.outputs(x_t, t) if outputs is None else outputs
        return self.readout.x_0_given(self.kernel, outputs, x_t, self._trained(t))

    def step(
        self, x_t: State, t: Level, outputs: Outputs | None = None, *, examples_first: bool = False
    ) -> dist.Distribution:
        """p(x_s | x_t) to the level below, elementwise; t of 2 or above."""
        if outputs is None:
            outputs = self.outputs(x_t, t, examples_first=examples_first)
        step = self.coefficients(t)
        if self.is_respaced:
            return self.readout.longer_step(self.kernel, outputs, x_t, self._trained(t), step)
        return self.readout(self.kernel, outputs, x_t, step)

    def jump(
        self, x_t: State, t: Level, s: Level, outputs: Outputs | None = None
    ) -> dist.Distribution:
        """p(x_s | x_t) to any time s < t in one longer step, elementwise; times of 1..T."""
        trained = dataclasses.replace(self, steps=self.trained)
        outputs = trained.outputs(x_t, t) if outputs is None else outputs
        t, s = jnp.broadcast_arrays(jnp.asarray(t), jnp.asarray(s))
        axes, step = range(-self.event_dim, 0), self.trained.between(t, s)
        step = Step(*(jnp.expand_dims(column, axes) for column in step))
        at = trained.coefficients(t)
        return self.readout.longer_step(self.kernel, outputs, x_t, at, step)

    # the last step, and the data

    def last(self, x_1: State, outputs: Outputs | None = None) -> dist.Distribution:
        """p(x_0 | x_1), elementwise, before x_0 is put on a grid; no network under a tied step."""

        def step(x_1: State, step: Step) -> dist.Distribution:
            said = self.outputs(x_1, 1) if outputs is None else outputs
            return self.readout(self.kernel, said, x_1, step)

        lead = x_1.shape[: x_1.ndim - self.event_dim]
        return self.last_step(self.kernel, step, x_1, self.coefficients(jnp.ones(lead, jnp.int32)))

    def data(self, x_1: State, mask: Mask = None) -> "DataGivenFirst":
        """p(x_0 | x_1) in the user's units; entries whose mask is False do not count."""
        return DataGivenFirst(self.last(x_1), self.support, self.event_dim, self.units, mask)

    def to_state(self, x_0: Values) -> Values:
        """Data as the diffusion holds them: (x_0 − loc)/scale, or symbols as int32."""
        return self.kernel.to_state(self.units.to_state(x_0))

    def to_data(self, x: Values) -> Values:
        """What the last step draws on the scale of the diffusion, as data: the way back."""
        return _on_grid(self.units.to_data(x), self.support)

    def _time(self, t: Level) -> Array:
        return self.steps.t[jnp.asarray(t) - 1] if self.is_respaced else jnp.asarray(t)

    def _trained(self, t: Level) -> Step:
        """Coefficients of the single step from level t, which the network was trained for."""
        return self.trained.at(self._time(t), self.event_dim)


def taken_off(loc: Any, grid: Grid | None) -> Any:
    """What of loc is taken off data before all else: nothing where they lie on a grid."""
    if isinstance(loc, jax.Array):
        return jnp.where(is_on_grid(grid), 0.0, loc)
    return np.where(is_on_grid(grid), 0.0, loc)


def less_loc(x_0: np.ndarray, loc: Any, dtype: Any) -> np.ndarray:
    """x_0 − loc, the difference taken in float64, without a copy of all of it in float64."""
    if x_0.dtype == dtype and not np.any(loc):
        return x_0
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused as data
        difference = np.empty(x_0.shape, dtype)
        return np.subtract(x_0, loc, out=difference, dtype=np.float64, casting="same_kind")


def where_observed(mask: Any, there: Any, otherwise: Any) -> Any:
    """`there` where the mask, which may be None, is True; of NumPy's arrays as NumPy has it."""
    if mask is None:
        return there
    is_numpy = isinstance(there, np.ndarray) and isinstance(mask, np.ndarray)
    return (np if is_numpy else jnp).where(mask, there, otherwise)


def _on_grid(x_0: Values, support: Any) -> Values:
    return support.nearest(x_0) if isinstance(support, Grid) else x_0


class DataGivenFirst(dist.Distribution):
    """Last reverse step p(x_0 | x_1) in the user's units: loc + scale · x, x ~ `base`.

    Where the support is a `Grid`, x_0 is put on its nearest value, and `log_prob` is of a mass;
    entries that have none keep their density.
    Entries whose mask is False do not enter `log_prob`.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("base", "units", "observed")
    pytree_aux_fields = ("data_support",)
    has_rsample = True

    def __init__(
        self, base: dist.Distribution, support: Any, x_dim: int, units: Units, mask: Mask = None
    ):
        self.base, self.units, self.observed, self.data_support = base, units, mask, support
        split = len(base.batch_shape) - x_dim
        super().__init__(base.batch_shape[:split], base.batch_shape[split:])

    def with_base(self, base: dist.Distribution) -> "DataGivenFirst":
        """The same with another law on the scale of the diffusion."""
        return DataGivenFirst(base, self.data_support, self.event_dim, self.units, self.observed)

    def masked(self, mask: Mask) -> "DataGivenFirst":
        """The law of the entries whose mask is True."""
        return DataGivenFirst(self.base, self.data_support, self.event_dim, self.units, mask)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(self.data_support, self.event_dim)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> State:
        x = self.base.sample(key, sample_shape)
        return _on_grid(self.units.to_data(x), self.data_support)

    def log_prob(self, value: Any, intermediates: Any = None) -> Float[Array, "..."]:
        value = where_observed(self.observed, value, 0)
        loc, scale = self.units
        if isinstance(self.data_support, Grid):
            mean, sd = self.base.loc * scale + loc, self.base.scale * scale
            terms = self.data_support.log_mass(value, mean, sd)
        else:
            terms = self.base.log_prob(self.units.to_state(value))
            terms = terms if scale is None else terms - jnp.log(scale)
        terms = where_observed(self.observed, terms, 0.0)  # a missing entry may be NaN
        return jnp.sum(terms, axis=tuple(range(-self.event_dim, 0)))
