"""`Diffusion`: a diffusion probabilistic model as two NumPyro programs, guide and model.

    guide    x_1..x_T ~ q(· | x_0)                 the forward trajectory, nothing to learn but β
    model    x_1..x_T ~ p(·),  x_0 ~ p(x_0 | x_1)  the learned reverse trajectory

With guide and model in `SVI`, the ELBO is the bound of 2015 on log p(x_0), in nats and summed over
examples (eqs. 10 to 12):

    K = E_q [ log π(x_T) + Σ_t log p(x_{t−1} | x_t) − Σ_t log q(x_t | x_{t−1}) ].

Only numbers may have learned rates, and their trajectories are differentiated by them; a guide of
bits or classes has nothing to learn. So no score-function term is missing.

`forward` and `reverse` are the two statements to use inside a larger program, under any plates,
masks and scales; `model` and `guide` add a plate over examples around them. `model_by_step` and
`guide_by_step` are the same pair with one site per level in the order of the bridge,
q(x_T | x_0) ∏ q(x_s | x_t, x_0): with it `TraceMeanField_ELBO` computes each KL in closed form
(eq. 14 before the entropies are taken out). It is slow to compile; meant for T up to about 50.

Source: Sohl-Dickstein et al. (2015), sections 2.2 to 2.4.
"""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array, Shaped

from probdiff import columns, readouts, schedules, validation
from probdiff.arguments import (
    check_object,
    check_shape,
    plain,
    plain_arrays,
    read_array,
    shape_text,
)
from probdiff.compilation import Programs, trace
from probdiff.kernels import BernoulliKernel, DiscreteKernel, GaussianKernel, Kernel
from probdiff.networks.binding import bind, check_signature, example_inputs, output_shape
from probdiff.networks.rows import coupling, is_by_row
from probdiff.prior import Prior
from probdiff.readouts.grid import is_on_grid
from probdiff.reverse import (
    AtLogSNR,
    Mask,
    Reverse,
    State,
    Units,
    Values,
    less_loc,
    taken_off,
    where_observed,
)
from probdiff.trajectories import TRAJECTORY_SUFFIX, ForwardTrajectory, ReverseTrajectory, first
from probdiff.types import Network, Params, Step

Data = Shaped[Array | np.ndarray, "..."]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class Deviations:
    """Data less loc, taken in float64: what `fit` hands to a diffusion's own programs."""

    values: Any


class Diffusion:
    """A kernel, a schedule and a network, as two NumPyro programs.

    `model` and `guide` are for `SVI` and `Predictive`; `forward` and `reverse` are statements for
    larger programs; with parameters bound, `prior` is one and `bind` the reverse process itself.

    Args:
        kernel: What one forward step does to one number or symbol.
        beta: Rates β_1..β_T, shape `(T,)`, in (0, 1), β_T in (0, 1]; or `schedules.learned(beta)`.
        network: `network(x_t, t)`, with x_t `(B, *event_shape)` and t int32 `(B,)` in 1..T,
            returning `(B, *event_shape)`, the last axis as many times as long as the readout
            needs outputs (2 with a learned variance, K for K classes);
            `network(x_t, t, context)` where there is a `context_shape`. One whose attribute
            `takes_log_snr` is true is given log ᾱ_t/(1−ᾱ_t), a float, in place of t. A module, a
            function, or a function and its weights, `(apply, params)`. A function has nothing to
            train: one that closes over latent sites of a program gives weights a prior.
        event_shape: Shape of one example; `()` for a number.
        readout: How the network's output becomes p(x_s | x_t); by default `Perturbation()` for
            numbers, `Logits()` for bits, `DataLogits()` for classes.
        last_step: p(x_0 | x_1): `Tied()`, `Learned()`, or `Discretised(low, high, levels)` for
            numbers on a grid, one for all or one by entry; tied by default, learned for classes.
        loc: Subtracted from the data, broadcastable to `event_shape`; kept in float64. Where it is
            large beside scale, data want NumPy's float64, and draws have it; inside a program x_0
            is of JAX's float type, and a warning says where that is too coarse.
        scale: Then divided by; the diffusion runs on (x − loc)/scale, which should have second
            moment near 1. `x_0` and every density stay in the user's units.
        data_variance: Variance of the data on the scale of the diffusion, broadcastable to
            `event_shape`, or their covariance, `(d, d)` for d numbers in an event: of which `prior`
            makes twists, and which data are held against. For a network whose units leave the data
            another variance than 1 (see `from_denoiser`).
        context_shape: Shape of one example's context, None where there is none.
        name: Name of the data site; the trajectory is `name + "_trajectory"`, parameters begin
            with it. Two models in one program need two names; those that DataTrees give to dims
            and variables of their own, such as "draw", are refused.

    Raises:
        ValueError: if an argument is out of range, the network keeps state or looks at other rows
            than one, or its output has another shape than the readout needs.

    Example:
        Before training this network says 0: the model is N(0, I), and K its log density.

        >>> network = networks.RadialBasis((2,), width=4, T=5, rngs=nnx.Rngs(0))
        >>> beta = schedules.linear(5, beta_T=0.5)
        >>> diffusion = Diffusion(GaussianKernel(), beta, network, event_shape=(2,))
        >>> svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), Trace_ELBO())
        >>> x = jnp.array([[0.5, -1.0], [2.0, 0.0], [1.0, 1.0]])
        >>> loss = jax.jit(svi.evaluate)(svi.init(jax.random.key(0), x), x)
        >>> bool(jnp.isclose(-loss, dist.Normal(0, 1).log_prob(x).sum(), atol=1e-3))
        True
    """

    def __init__(
        self,
        kernel: Kernel,
        beta: np.ndarray | schedules.LearnedRates | Any,
        network: Network,
        *,
        event_shape: tuple[int, ...],
        readout: readouts.GaussianReadout | readouts.DiscreteReadout | None = None,
        last_step: readouts.LastStep | None = None,
        loc: Any = 0.0,
        scale: Any = 1.0,
        data_variance: Any = 1.0,
        context_shape: tuple[int, ...] | None = None,
        name: str = "x_0",
    ):
        check_object(Kernel, "a kernel such as GaussianKernel()", kernel=kernel)
        family = readouts.GaussianReadout | readouts.DiscreteReadout
        check_object(family, "one such as readouts.Epsilon()", or_none=True, readout=readout)
        check_object(
            readouts.LastStep, "one such as readouts.Tied()", or_none=True, last_step=last_step
        )
        validation.check_name(name)
        self.kernel, self.network, self.name = kernel, network, name
        self.event_shape = check_shape("event_shape", event_shape)
        is_given = context_shape is not None
        self.context_shape = check_shape("context_shape", context_shape) if is_given else None
        self.readout = _default_readout(kernel) if readout is None else readout
        self.last_step = _default_last_step(kernel) if last_step is None else last_step
        is_learned = isinstance(beta, schedules.LearnedRates)
        self.schedule = beta if is_learned else schedules.check_beta(beta)
        validation.check_grid(self.last_step.grid, self.event_shape)
        self.loc, self.scale = validation.check_units(kernel, self.event_shape, loc, scale)
        self.data_variance = validation.check_variance(
            self.event_shape, data_variance, "data_variance"
        )
        if isinstance(kernel, DiscreteKernel) and np.any(self.data_variance != 1):
            raise ValueError(f"data_variance must be 1 for symbols; got {data_variance}")
        self.programs = Programs()
        self._read: Any = None
        validation.check_rates(self.rates)
        validation.check_schedule(
            kernel, self.readout, self.last_step, self.rates, is_learned=is_learned
        )
        self._fixed_steps = None if is_learned else schedules.steps(self.schedule)
        self._binding = bind(network, self.event_shape, self.context_shape, kernel.dtype)
        init = self._binding.init
        weights = jax.eval_shape(init, jax.random.key(0)) if callable(init) else init
        self._weights = jax.tree.map(np.shape, weights)
        self._check_network()

    def __repr__(self) -> str:
        return (
            f"Diffusion({self.kernel}, T={self.T}, {type(self.network).__name__}, "
            f"event_shape={self.event_shape}, {self.readout}, {self.last_step}, name={self.name!r})"
        )

    @property
    def T(self) -> int:
        """Number of steps."""
        return len(self.rates)

    @property
    def rates(self) -> np.ndarray:
        """β_1..β_T; of a learned schedule, those it starts from."""
        is_learned = isinstance(self.schedule, schedules.LearnedRates)
        return self.schedule.beta if is_learned else self.schedule

    @property
    def trajectory_name(self) -> str:
        """Name of the trajectory's site."""
        return self.name + TRAJECTORY_SUFFIX

    # statements, for anyone's program

    def forward(self, x_0: Data, *, mask: Mask = None) -> Any:
        """Statement of a guide: the trajectory x_1..x_T given data.

        Args:
            x_0: Data in the user's units, `(*plates, *event_shape)`; may be a latent of the guide.
            mask: True where x_0 is observed, same shape; None where all of it is.

        Returns:
            The trajectory, `(*plates, T, *event_shape)`, on the scale of the diffusion.

        Raises:
            ValueError: if shapes or values do not fit.

        Example:
            >>> diffusion = standard_diffusion((2,), T=5)
            >>> def guide(x_0):  # 3 people with 4 days each
            ...     with numpyro.plate("people", 3, dim=-2), numpyro.plate("days", 4, dim=-1):
            ...         return diffusion.forward(x_0)
            >>> seed(guide, 0)(jnp.zeros((3, 4, 2))).shape
            (3, 4, 5, 2)
        """
        if x_0 is None:
            raise ValueError("x_0 must be given to the guide, which starts at data; got None")
        x_0, _, mask = self._checked(x_0, None, mask)
        x_0 = jnp.asarray(self.to_state(where_observed(mask, x_0, 0)))
        law = ForwardTrajectory(self.kernel, self._steps(), x_0, len(self.event_shape), mask)
        return numpyro.sample(self.trajectory_name, law)

    def reverse(self, x_0: Data | None = None, *, context: Any = None, mask: Mask = None) -> State:
        """Statement of a model: the reverse trajectory, then x_0 given x_1.

        Args:
            x_0: Observed data in the user's units, or None where x_0 is to be drawn.
            context: Handed to the network, `(*plates, *context_shape)`.
            mask: True where x_0 is observed, shape of x_0; the rest does not count, and the network
                sees noise in its place.

        Returns:
            x_0, `(*plates, *event_shape)`, in the user's units.

        Raises:
            ValueError: if shapes or values do not fit, or a plate is missing.

        Example:
            >>> diffusion = standard_diffusion((2,), T=5)
            >>> def model():  # 3 people with 4 days each
            ...     with numpyro.plate("people", 3, dim=-2), numpyro.plate("days", 4, dim=-1):
            ...         return diffusion.reverse()
            >>> seed(model, 0)().shape
            (3, 4, 2)
        """
        x_0, context, mask = self._checked(x_0, context, mask)
        reverse = self._unconditional().given(context)
        trajectory = numpyro.sample(self.trajectory_name, ReverseTrajectory(reverse, mask))
        x_1 = first(trajectory, len(self.event_shape))
        if x_0 is not None:
            validation.check_batch_shape(x_0, x_1, self.event_shape)
        return numpyro.sample(self.name, reverse.data(x_1, mask), obs=x_0)

    # programs over examples

    def model(
        self, x_0: Data | Deviations | None = None, *, context: Any = None, mask: Mask = None
    ) -> State:
        """The learned reverse trajectory: `reverse` in a plate "data" over the rows of x_0.

        Without x_0 (and context) there is no plate: one example is drawn. Arguments, what is
        returned and what is raised are those of `reverse`, x_0 `(N, *event_shape)` or
        `event_shape`, context `(N, *context_shape)`.

        Example:
            >>> diffusion = standard_diffusion((2,), T=5)
            >>> sites = trace(seed(diffusion.model, 0)).get_trace(jnp.ones((3, 2)))
            >>> {name: sites[name]["value"].shape for name in ("x_0_trajectory", "x_0")}
            {'x_0_trajectory': (3, 5, 2), 'x_0': (3, 2)}
            >>> seed(diffusion.model, 0)().shape  # one draw
            (2,)
        """
        diffusion, x_0 = self._of(x_0)
        with self._plate(x_0, context):
            return diffusion.reverse(x_0, context=context, mask=mask)

    def guide(
        self, x_0: Data | Deviations | None = None, *, context: Any = None, mask: Mask = None
    ) -> Any:
        """The forward trajectory: `forward` in a plate "data" over the rows of x_0.

        Arguments are those of `model`, though x_0 must be given and context is of use to the model
        alone; returned is the trajectory, `(N, T, *event_shape)`, on the scale of the diffusion.

        Example:
            >>> diffusion = standard_diffusion((2,), T=5)
            >>> trajectory = seed(diffusion.guide, 0)(jnp.ones((1000, 2)))
            >>> left = jnp.sqrt(jnp.cumprod(1 - diffusion.rates))
            >>> trajectory.shape, bool(jnp.allclose(trajectory.mean((0, 2)), left, atol=0.1))
            ((1000, 5, 2), True)
        """
        if x_0 is None:
            raise ValueError("x_0 must be given to the guide, which starts at data; got None")
        diffusion, x_0 = self._of(x_0)
        with self._plate(x_0, context):
            return diffusion.forward(x_0, mask=mask)

    def model_by_step(self, x_0: Data | Deviations | None = None, *, context: Any = None) -> State:
        """`model` with a site for every level, from x_T down; sites `name_trajectory_t`."""
        diffusion, x_0 = self._of(x_0)
        x_0, context, _ = diffusion._checked(x_0, context, None)
        reverse, event_dim = diffusion._unconditional().given(context), len(self.event_shape)
        with self._plate(x_0, context):
            batch_shape = ReverseTrajectory(reverse).batch_shape
            pi = self.kernel.stationary((*batch_shape, *self.event_shape))
            x = numpyro.sample(f"{self.trajectory_name}_{self.T}", pi.to_event(event_dim))
            lead = x.shape[: x.ndim - event_dim]
            for t in range(self.T, 1, -1):
                p = reverse.step(x, jnp.full(lead, t))
                x = numpyro.sample(f"{self.trajectory_name}_{t - 1}", p.to_event(event_dim))
            return numpyro.sample(self.name, reverse.data(x), obs=x_0)

    def guide_by_step(self, x_0: Data | Deviations | None = None, *, context: Any = None) -> None:
        """`guide` with a site for every level: q(x_T | x_0), then the bridge down to x_1."""
        if x_0 is None:
            raise ValueError("x_0 must be given to the guide, which starts at data; got None")
        diffusion, x_0 = self._of(x_0)
        x_0, context, _ = diffusion._checked(x_0, context, None)
        event_dim, steps = len(self.event_shape), self._steps()
        x_0_scaled = jnp.asarray(diffusion.to_state(x_0))
        with self._plate(x_0, context):
            q = self.kernel.marginal(x_0_scaled, steps.at(self.T, event_dim))
            x = numpyro.sample(f"{self.trajectory_name}_{self.T}", q.to_event(event_dim))
            for t in range(self.T, 1, -1):
                q = self.kernel.bridge(x, x_0_scaled, steps.at(t, event_dim))
                x = numpyro.sample(f"{self.trajectory_name}_{t - 1}", q.to_event(event_dim))

    def prior(self, params: Params, *, variance: Any = None, name: str | None = None) -> Prior:
        """The trained model as a statement `prior()` for anyone's program, its parameters bound.

        Args:
            params: Values of the parameters.
            variance: Variance τ² or covariance of the data on the scale of the diffusion,
                `data_variance` if absent; see `Prior`.
            name: Name of the site of x_0, by default the diffusion's: two priors of one program
                need two.

        Raises:
            ValueError: if parameters are missing, unknown, of another shape or not finite, or a
                DataTree would lose the name.

        Example:
            >>> diffusion = standard_diffusion((2,), T=5)
            >>> prior = diffusion.prior({})  # this network has no parameters
            >>> def program(y=None):
            ...     x_0 = prior()
            ...     numpyro.sample("y", dist.Normal(x_0, 0.1).to_event(1), obs=y)
            >>> list(trace(seed(program, 0)).get_trace())
            ['x_0_trajectory', 'x_0', 'y']
        """
        variance = self.data_variance if variance is None else variance
        name = self.name if name is None else name
        validation.check_name(name)
        return Prior(self.bind(params), name, variance=variance, programs=self.programs)

    def bind(self, params: Params, *, context: Any = None) -> Reverse:
        """The reverse process with parameters bound: what samples, scores and conditions.

        Args:
            params: Values of the parameters, by site name.
            context: Handed to the network, `(*batch, *context_shape)`; `Reverse.given` puts it in
                later, too.

        Raises:
            ValueError: if parameters are missing, unknown, of another shape or not finite.

        Example:
            >>> reverse = standard_diffusion((2,), T=5).bind({})
            >>> x_t, t = jnp.array([[1.0, -2.0]]), jnp.array([3])
            >>> x_0_hat = jnp.sqrt(reverse.steps.alpha_bar_t[2]) * x_t  # for N(0, I): √ᾱ_t x_t
            >>> bool(jnp.allclose(reverse.x_0_hat(x_t, t), x_0_hat, atol=1e-5))
            True
        """
        self.check_params(params)
        params = plain_arrays("params", params)
        self._bind_anew()
        with numpyro.handlers.block(), numpyro.handlers.substitute(data=params):
            reverse = self._unconditional()
        return reverse if context is None else reverse.given(context)

    @property
    def units(self) -> Units:
        """loc and scale, None and None for symbols."""
        return Units(self.loc, self.scale)

    def to_state(self, x_0: Values) -> Values:
        """Data as the diffusion holds them: (x_0 − loc)/scale, or symbols as int32."""
        x_0 = read_array("x_0", x_0, jnp.integer, jnp.floating, jnp.bool_)
        return self.kernel.to_state(self.units.to_state(x_0))

    def less_loc(self, x_0: Data) -> Deviations | np.ndarray:
        """Data for the diffusion's own programs, loc taken off in float64 where it matters.

        They are as they were for symbols, for numbers on a grid, and where loc is 0.
        """
        x_0 = np.asarray(plain("x_0", x_0))
        has_loc = self.loc is not None and np.any(self._taken_off != 0)
        is_fit = x_0.shape[x_0.ndim - len(self.event_shape) :] == self.event_shape
        if not (has_loc and is_fit and jnp.issubdtype(x_0.dtype, jnp.floating)):
            return x_0  # what does not fit is refused by the program
        self._warn_about_precision(x_0)
        return Deviations(less_loc(x_0, self._taken_off, self.kernel.dtype))

    @functools.cached_property
    def params_template(self) -> Params:
        """Shapes and dtypes of the parameters, by site name."""

        def trace(key: Array) -> Params:
            seed = numpyro.handlers.seed(rng_seed=key)
            with numpyro.handlers.block(), numpyro.handlers.trace() as sites, seed:
                self._unconditional()  # not a part of the program in which it is asked for
            return {name: s["value"] for name, s in sites.items() if s["type"] == "param"}

        return jax.eval_shape(trace, jax.random.key(0))

    def check_params(self, params: Params) -> None:
        """Raise a `ValueError` that names what is missing, unknown, of another shape or NaN."""
        validation.check_params(self.params_template, params, self.name)

    def check_data(self, x_0: Any, mask: Any = None) -> None:
        """Raise a `ValueError` unless data and mask fit.

        Warns of columns that cannot be learned, and of a float type that is too coarse for loc.
        """
        if x_0 is None:
            if mask is not None:
                raise ValueError("mask must come with x_0, of which it says what is observed")
            return
        validation.check_data(self.kernel, self.event_shape, x_0, mask, grid=self.last_step.grid)
        self._warn_about_precision(plain("x_0", x_0))
        if not any(isinstance(a, jax.core.Tracer) for a in (x_0, mask)):
            columns.check_columns(
                self.kernel, self.event_shape, self.rates, self.units, x_0, mask,
                is_on_grid=is_on_grid(self.last_step.grid), variance=self._mean_variance,
            )  # fmt: skip

    # private

    def _checked(self, x_0: Any, context: Any, mask: Any) -> tuple[Any, Any, Any]:
        """Arguments of a statement as JAX reads them right, checked."""
        context, mask = plain("context", context), plain("mask", mask)
        self.check_data(x_0, mask)
        if x_0 is None:
            self._warn_about_precision(None)
        return plain("x_0", x_0), context, mask

    @property
    def _mean_variance(self) -> float:
        """Of the data's numbers."""
        is_matrix = validation.is_covariance(self.event_shape, self.data_variance)
        return float(np.mean(np.diag(self.data_variance) if is_matrix else self.data_variance))

    def _warn_about_precision(self, x_0: Any) -> None:
        """Of data, or of what a program draws; a grid is no finer than float32."""
        dtype = self.kernel.dtype if x_0 is None else x_0.dtype
        validation.warn_about_precision(
            self._taken_off, self.scale, self.event_shape, dtype, stacklevel=6
        )

    @property
    def _taken_off(self) -> np.ndarray | None:
        """What `less_loc` takes off; None for symbols."""
        return None if self.loc is None else taken_off(self.loc, self.last_step.grid)

    def _of(self, x_0: Any) -> tuple["Diffusion", Any]:
        """The diffusion that data are of: with loc 0 for `Deviations`; and their values."""
        if not isinstance(x_0, Deviations):
            return self, x_0
        relative = copy.copy(self)
        relative.loc = np.asarray(self.loc - self._taken_off)
        return relative, x_0.values

    @property
    def _takes_log_snr(self) -> bool:
        return getattr(self.network, "takes_log_snr", False)

    def _unconditional(self) -> Reverse:
        """The reverse process, weights from the site `name_network$params`, without context."""
        init, apply = self._binding
        site = f"{self.name}_network$params"
        params = None if init is None else numpyro.param(site, init)
        validation.check_weights(site, self._weights, params)
        steps = self._steps()
        network = jax.tree_util.Partial(apply, params)
        if self._takes_log_snr:
            network = AtLogSNR(network, steps)
        return Reverse(
            self.kernel, self.readout, self.last_step, self.event_shape, steps, steps, network,
            self.units, self.context_shape,
        )  # fmt: skip

    def _bind_anew(self) -> None:
        """Bind a function without weights again where it computes something else than before.

        What is compiled tells networks apart by identity, and a function may read what changes.
        """
        if self._binding.init is not None:
            return
        time = float if self._takes_log_snr else jnp.int32
        inputs = example_inputs(self.event_shape, self.context_shape, self.kernel.dtype, time)
        read = trace(self._binding.apply, None, *inputs).fingerprint()
        if self._read not in (None, read):
            self._binding = bind(
                self.network, self.event_shape, self.context_shape, self.kernel.dtype
            )
        self._read = read

    def _steps(self) -> Step:
        """Table of steps; the rates from the site `name_beta` where they are learned."""
        if self._fixed_steps is None:
            return schedules.steps(self.schedule(f"{self.name}_beta"))
        return self._fixed_steps

    def _plate(self, x_0: Any, context: Any) -> contextlib.AbstractContextManager:
        if context is not None:
            validation.check_context(context, self.context_shape)
        shapes = {"x_0": (x_0, self.event_shape), "context": (context, self.context_shape)}
        sizes = {}
        for argument, (array, event_shape) in shapes.items():
            if array is None:
                continue
            batch = np.shape(array)[: np.ndim(array) - len(event_shape or ())]
            if len(batch) > 1:
                raise ValueError(
                    f"{argument} must have shape {shape_text('N', event_shape)} or "
                    f"{event_shape}; got {np.shape(array)}. For more plates use forward and "
                    "reverse inside your own"
                )
            sizes[argument] = batch
        if len(set(sizes.values())) > 1:
            raise ValueError(f"x_0 and context must have the same number of rows; got {sizes}")
        batch = next(iter(sizes.values()), ())
        return numpyro.plate("data", batch[0]) if batch else contextlib.nullcontext()

    def _check_network(self) -> None:
        """Run the network on shapes alone and compare what comes with what the readout needs."""
        T = getattr(self.network, "T", None) or self.T
        if T != self.T:
            raise ValueError(f"network must be made for T = {self.T} steps; got one for T = {T}")
        if self._takes_log_snr and self.rates[-1] == 1:
            raise ValueError(
                "network must know t where beta_T = 1, for the log-SNR of x_T is then −∞; got a "
                f"{type(self.network).__name__} that takes the log-SNR"
            )
        inputs = example_inputs(self.event_shape, self.context_shape, self.kernel.dtype)
        check_signature(self.network, inputs)

        def call(key: Array) -> Array:
            with numpyro.handlers.block(), numpyro.handlers.seed(rng_seed=key):
                return self._unconditional().network(*inputs)

        out = jax.eval_shape(call, jax.random.key(0))
        count = self.readout.num_outputs(self.kernel)
        expected = (2, *output_shape(self.event_shape, count))
        check_object(jax.ShapeDtypeStruct, "a function that returns an array", network=out)
        if out.shape != expected:
            raise ValueError(
                f"network must return shape {shape_text('B', expected[1:])} at "
                f"event_shape {self.event_shape} for {self.readout}; got "
                f"{shape_text('B', out.shape[1:])}{self._outputs_hint(count)}"
            )
        self._check_rows()

    def _check_rows(self) -> None:
        """Refuse a network that looks across the batch."""
        if is_by_row(self.network):
            return
        function = self._binding.apply
        if self._takes_log_snr:
            function = functools.partial(_of_log_snr, function, schedules.steps(self.rates))
        template = self.params_template.get(f"{self.name}_network$params")
        states = self.kernel.num_states if isinstance(self.kernel, DiscreteKernel) else None
        moved = coupling(function, template, self.event_shape, self.context_shape, self.T, states)
        if moved > 0:
            raise ValueError(
                "network must take every row of x_t by itself, or K and draws depend on the rest "
                f"of the batch; got a {type(self.network).__name__} whose output for a row moves "
                f"by {moved:.2g} of its size as other rows change. Normalise, attend and pool over "
                "the axes of one example (LayerNorm, GroupNorm), not over axis 0"
            )

    def _outputs_hint(self, count: int) -> str:
        """What to say of a network that takes `outputs`, made for another number of them."""
        outputs = getattr(self.network, "outputs", None)
        is_other = isinstance(outputs, int) and outputs != count
        text = "; pass outputs= to the network: 1 for bits, the number of classes (with states=) "
        return f"{text}for classes" if is_other and isinstance(self.kernel, DiscreteKernel) else ""


def _of_log_snr(
    apply: Callable[..., Array], steps: Step, params: Any, x_t: State, t: Array, context: Any
) -> Array:
    """A network that is told the log-SNR, its arguments those of one that is told t."""
    return AtLogSNR(functools.partial(apply, params), steps)(x_t, t, context)


def _default_readout(kernel: Kernel) -> readouts.GaussianReadout | readouts.DiscreteReadout:
    """2015 for numbers and bits; for classes the law of x_0."""
    if isinstance(kernel, GaussianKernel):
        return readouts.Perturbation()
    return readouts.Logits() if isinstance(kernel, BernoulliKernel) else readouts.DataLogits()


def _default_last_step(kernel: Kernel) -> readouts.LastStep:
    """2015 for numbers and bits; classes learn it, as an absorbing diffusion must."""
    is_of_2015 = isinstance(kernel, GaussianKernel | BernoulliKernel)
    return readouts.Tied() if is_of_2015 else readouts.Learned()
