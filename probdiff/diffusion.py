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
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jaxtyping import Array, Bool, Shaped
from numpyro.distributions import constraints

from probdiff import readouts, schedules, validation
from probdiff.arguments import check_shape, shape_text
from probdiff.compilation import Programs
from probdiff.kernels import BernoulliKernel, DiscreteKernel, GaussianKernel
from probdiff.networks.binding import bind, example_inputs
from probdiff.networks.shapes import output_shape
from probdiff.prior import Prior
from probdiff.trajectories import (
    TRAJECTORY_SUFFIX,
    DataGivenFirst,
    ForwardTrajectory,
    ReverseTrajectory,
    first,
    to_data,
)
from probdiff.types import Network, Params, Step

Data = Shaped[Array | np.ndarray, "..."]
Mask = Bool[Array | np.ndarray, "..."]


class Diffusion:
    """A kernel, a schedule and a network, as two NumPyro programs.

        guide    x_1..x_T ~ q(· | x_0)                 the forward trajectory, only β to learn
        model    x_1..x_T ~ p(·),  x_0 ~ p(x_0 | x_1)  the learned reverse trajectory

    Their ELBO is the bound K on log p(x_0), nats. `model` and `guide` are for `SVI` and
    `Predictive`; `forward` and `reverse` are statements for larger programs, `prior` is one with
    parameters bound.

    Args:
        kernel: What one forward step does to one number or symbol.
        beta: Rates β_1..β_T, shape `(T,)`, in (0, 1), β_T in (0, 1]; or `schedules.learned(beta)`.
        network: `network(x_t, t)`, with x_t `(B, *event_shape)` and t int32 `(B,)` in 1..T,
            returning `(B, *event_shape)`, the last axis as many times as long as the readout
            needs outputs (2 with a learned variance, K for K classes);
            `network(x_t, t, context)` where there is a `context_shape`. One whose attribute
            `takes_log_snr` is true is given log ᾱ_t/(1−ᾱ_t), a float, in place of t.
        event_shape: Shape of one example; `()` for a number.
        readout: How the network's output becomes p(x_s | x_t); by default `Perturbation()` for
            numbers, `Logits()` for bits, `DataLogits()` for classes.
        last_step: p(x_0 | x_1): `Tied()`, `Learned()`, or `Discretised(low, high, levels)` for
            numbers on a grid; tied by default, learned for classes.
        loc: Subtracted from the data, broadcastable to `event_shape`.
        scale: Then divided by; the diffusion runs on (x − loc)/scale, which should have second
            moment near 1. `x_0` and every density stay in the user's units.
        context_shape: Shape of one example's context, None where there is none.
        name: Name of the data site; the trajectory is `name + "_trajectory"`, parameters begin
            with it. Two models in one program need two names.

    Raises:
        ValueError: if an argument is out of range, the network keeps state, or its output has
            another shape than the readout needs.

    Example:
        Before training this network says 0: the model is N(0, I), and K its log density.

        >>> import jax
        >>> import jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> from flax import nnx
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from optax import adam
        >>> from probdiff import Diffusion, GaussianKernel, networks, schedules
        >>> network = networks.RadialBasis((2,), width=4, T=5, rngs=nnx.Rngs(0))
        >>> beta = schedules.linear(5, beta_T=0.5)
        >>> diffusion = Diffusion(GaussianKernel(), beta, network, event_shape=(2,))
        >>> svi = SVI(diffusion.model, diffusion.guide, adam(1e-3), Trace_ELBO())
        >>> x = jnp.array([[0.5, -1.0], [2.0, 0.0], [1.0, 1.0]])
        >>> loss = jax.jit(svi.evaluate)(svi.init(jax.random.key(0), x), x)
        >>> bool(jnp.isclose(-loss, dist.Normal(0, 1).log_prob(x).sum(), atol=1e-3))
        True

    Source: Sohl-Dickstein et al. (2015), sections 2.2 to 2.4.
    """

    def __init__(
        self,
        kernel: GaussianKernel | DiscreteKernel,
        beta: np.ndarray | schedules.LearnedRates | Any,
        network: Network,
        *,
        event_shape: tuple[int, ...],
        readout: readouts.GaussianReadout | readouts.DiscreteReadout | None = None,
        last_step: readouts.LastStep | None = None,
        loc: Any = 0.0,
        scale: Any = 1.0,
        context_shape: tuple[int, ...] | None = None,
        name: str = "x_0",
    ):
        self.kernel, self.network, self.name = kernel, network, name
        self.event_shape = check_shape("event_shape", event_shape)
        self.context_shape = None
        if context_shape is not None:
            self.context_shape = check_shape("context_shape", context_shape)
        self.readout = _default_readout(kernel) if readout is None else readout
        self.last_step = _default_last_step(kernel) if last_step is None else last_step
        is_learned = isinstance(beta, schedules.LearnedRates)
        self.schedule = beta if is_learned else schedules.check_beta(beta)
        self.loc, self.scale = validation.check_units(kernel, self.event_shape, loc, scale)
        validation.check_schedule(
            kernel, self.readout, self.last_step, self.rates, is_learned=is_learned
        )
        self._fixed_steps = None if is_learned else schedules.steps(self.schedule)
        self._binding = bind(network, self.event_shape, self.context_shape, kernel.dtype)
        # made once, for what is compiled is kept by the identity of the function
        self._apply_at_log_snr = functools.partial(_at_log_snr, self._binding.apply)
        self.programs = Programs()
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

    def forward(self, x_0: Data, *, mask: Mask | None = None) -> Any:
        """Statement of a guide: the trajectory x_1..x_T given data.

        Args:
            x_0: Data in the user's units, `(*plates, *event_shape)`; may be a latent of the guide.
            mask: True where x_0 is observed, same shape; None where all of it is.

        Returns:
            The trajectory, `(*plates, T, *event_shape)`, on the scale of the diffusion.

        Raises:
            ValueError: if shapes or values do not fit.

        Example:
            >>> import jax.numpy as jnp
            >>> import numpyro
            >>> from numpyro.handlers import seed
            >>> from probdiff import Diffusion, GaussianKernel, schedules
            >>> diffusion = Diffusion(
            ...     GaussianKernel(), schedules.linear(5, beta_T=0.5),
            ...     lambda x_t, t: jnp.zeros((len(x_t), 4)), event_shape=(2,),
            ... )
            >>> def guide(x_0):  # 3 people with 4 days each
            ...     with numpyro.plate("people", 3, dim=-2), numpyro.plate("days", 4, dim=-1):
            ...         return diffusion.forward(x_0)
            >>> seed(guide, 0)(jnp.zeros((3, 4, 2))).shape
            (3, 4, 5, 2)
        """
        self.check_data(x_0, mask)
        return self._forward(self._steps(), x_0, mask)

    def reverse(
        self, x_0: Data | None = None, *, context: Any = None, mask: Mask | None = None
    ) -> Any:
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
            >>> import jax.numpy as jnp
            >>> import numpyro
            >>> from numpyro.handlers import seed
            >>> from probdiff import Diffusion, GaussianKernel, schedules
            >>> diffusion = Diffusion(
            ...     GaussianKernel(), schedules.linear(5, beta_T=0.5),
            ...     lambda x_t, t: jnp.zeros((len(x_t), 4)), event_shape=(2,),
            ... )
            >>> def model(x_0=None):  # 3 people with 4 days each
            ...     with numpyro.plate("people", 3, dim=-2), numpyro.plate("days", 4, dim=-1):
            ...         return diffusion.reverse(x_0)
            >>> seed(model, 0)().shape
            (3, 4, 2)
        """
        self.check_data(x_0, mask)
        self.check_context(context)
        trajectory = self.reverse_trajectory(*self._bound(), context, mask)
        return self._reverse(trajectory, x_0, mask)

    # programs over examples

    def model(
        self, x_0: Data | None = None, *, context: Any = None, mask: Mask | None = None
    ) -> Any:
        """The learned reverse trajectory: `reverse` in a plate "data" over the rows of x_0.

        Without x_0 (and context) there is no plate: one example is drawn.

        Args:
            x_0: Observed data in the user's units, `(N, *event_shape)` or `event_shape`, or None.
            context: Handed to the network, `(N, *context_shape)`.
            mask: True where x_0 is observed, shape of x_0.

        Returns:
            x_0 in the user's units, observed or drawn.

        Raises:
            ValueError: if shapes or values do not fit.

        Example:
            >>> import jax.numpy as jnp
            >>> from numpyro.handlers import seed, trace
            >>> from probdiff import Diffusion, GaussianKernel, schedules
            >>> diffusion = Diffusion(
            ...     GaussianKernel(), schedules.linear(5, beta_T=0.5),
            ...     lambda x_t, t: jnp.zeros((len(x_t), 4)), event_shape=(2,),
            ... )
            >>> sites = trace(seed(diffusion.model, 0)).get_trace(jnp.ones((3, 2)))
            >>> {name: sites[name]["value"].shape for name in ("x_0_trajectory", "x_0")}
            {'x_0_trajectory': (3, 5, 2), 'x_0': (3, 2)}
            >>> seed(diffusion.model, 0)().shape  # one draw
            (2,)
        """
        with self._plate(x_0, context):
            return self.reverse(x_0, context=context, mask=mask)

    def guide(
        self, x_0: Data | None = None, *, context: Any = None, mask: Mask | None = None
    ) -> Any:
        """The forward trajectory: `forward` in a plate "data" over the rows of x_0.

        Args:
            x_0: Data in the user's units, `(N, *event_shape)` or `event_shape`.
            context: Of use to the model alone.
            mask: True where x_0 is observed, shape of x_0.

        Returns:
            The trajectory, `(N, T, *event_shape)`, on the scale of the diffusion.

        Raises:
            ValueError: if x_0 is not given, or shapes or values do not fit.

        Example:
            >>> import jax.numpy as jnp
            >>> from numpyro.handlers import seed
            >>> from probdiff import Diffusion, GaussianKernel, schedules
            >>> diffusion = Diffusion(
            ...     GaussianKernel(), schedules.linear(5, beta_T=0.5),
            ...     lambda x_t, t: jnp.zeros((len(x_t), 4)), event_shape=(2,),
            ... )
            >>> trajectory = seed(diffusion.guide, 0)(jnp.ones((1000, 2)))
            >>> trajectory.shape  # x_1..x_5 of each row
            (1000, 5, 2)
            >>> left = jnp.sqrt(jnp.cumprod(1 - diffusion.rates))
            >>> bool(jnp.allclose(trajectory.mean((0, 2)), left, atol=0.1))  # √ᾱ_t x_0
            True
        """
        if x_0 is None:
            raise ValueError("x_0 must be given to the guide, which starts at data; got None")
        with self._plate(x_0, context):
            return self.forward(x_0, mask=mask)

    def model_by_step(self, x_0: Data | None = None, *, context: Any = None) -> Any:
        """`model` with a site for every level, from x_T down; sites `name_trajectory_t`."""
        self.check_data(x_0, None)
        self.check_context(context)
        trajectory = self.reverse_trajectory(*self._bound(), context)
        event_dim = len(self.event_shape)
        with self._plate(x_0, context):
            pi = self.kernel.stationary((*trajectory.batch_shape, *self.event_shape))
            x = numpyro.sample(f"{self.trajectory_name}_{self.T}", pi.to_event(event_dim))
            lead = x.shape[: x.ndim - event_dim]
            for t in range(self.T, 1, -1):
                p = trajectory.reverse_step(x, jnp.full(lead, t))
                x = numpyro.sample(f"{self.trajectory_name}_{t - 1}", p.to_event(event_dim))
            return numpyro.sample(self.name, self.data_given_first(trajectory, x), obs=x_0)

    def guide_by_step(self, x_0: Data | None = None, *, context: Any = None) -> None:
        """`guide` with a site for every level: q(x_T | x_0), then the bridge down to x_1."""
        if x_0 is None:
            raise ValueError("x_0 must be given to the guide, which starts at data; got None")
        self.check_data(x_0, None)
        event_dim, steps = len(self.event_shape), self._steps()
        x_0_scaled = self.to_state(jnp.asarray(x_0))
        with self._plate(x_0, context):
            q = self.kernel.marginal(x_0_scaled, steps.at(self.T, event_dim))
            x = numpyro.sample(f"{self.trajectory_name}_{self.T}", q.to_event(event_dim))
            for t in range(self.T, 1, -1):
                q = self.kernel.bridge(x, x_0_scaled, steps.at(t, event_dim))
                x = numpyro.sample(f"{self.trajectory_name}_{t - 1}", q.to_event(event_dim))

    def prior(self, params: Params, *, variance: Any = None) -> Prior:
        """The trained model as a statement `prior()` for anyone's program, its parameters bound.

        Args:
            params: Values of the parameters.
            variance: Variance τ² or covariance of the data on the scale of the diffusion, 1 if
                absent; see `Prior`.

        Returns:
            The `Prior`.

        Raises:
            ValueError: if parameters are missing, unknown or of another shape.

        Example:
            >>> import jax.numpy as jnp
            >>> import numpyro
            >>> import numpyro.distributions as dist
            >>> from numpyro.handlers import seed, trace
            >>> from probdiff import Diffusion, GaussianKernel, schedules
            >>> diffusion = Diffusion(
            ...     GaussianKernel(), schedules.linear(5, beta_T=0.5),
            ...     lambda x_t, t: jnp.zeros((len(x_t), 4)), event_shape=(2,),
            ... )
            >>> prior = diffusion.prior({})  # this network has no parameters
            >>> def program(y=None):
            ...     x_0 = prior()
            ...     numpyro.sample("y", dist.Normal(x_0, 0.1).to_event(1), obs=y)
            >>> list(trace(seed(program, 0)).get_trace())
            ['x_0_trajectory', 'x_0', 'y']
        """
        return Prior(self, params, variance=variance)

    # pieces, for objectives, samplers and diagnostics

    def bind(self, params: Params, *, context: Any = None, mask: Any = None):
        """The reverse trajectory with parameters bound, and the table of steps.

        Args:
            params: Values of the parameters, by site name.
            context: Handed to the network, `(*batch, *context_shape)`.
            mask: True where x_0 is observed, `(*batch, *event_shape)`.

        Returns:
            p(x_1..x_T), a NumPyro distribution with methods `reverse_step(x_t, t)` and
            `x_0_hat(x_t, t)`; and the coefficients of all steps, arrays `(T,)`.

        Raises:
            ValueError: if parameters are missing, unknown or of another shape.

        Example:
            >>> import jax.numpy as jnp
            >>> from probdiff import Diffusion, GaussianKernel, schedules
            >>> diffusion = Diffusion(
            ...     GaussianKernel(), schedules.linear(5, beta_T=0.5),
            ...     lambda x_t, t: jnp.zeros((len(x_t), 4)), event_shape=(2,),
            ... )
            >>> reverse, steps = diffusion.bind({})
            >>> x_t, t = jnp.array([[1.0, -2.0]]), jnp.array([3])
            >>> x_0_hat = jnp.sqrt(steps.alpha_bar_t[2]) * x_t  # for N(0, I): √ᾱ_t x_t
            >>> bool(jnp.allclose(reverse.x_0_hat(x_t, t), x_0_hat, atol=1e-5))
            True
        """
        self.check_params(params)
        self.check_context(context)
        with numpyro.handlers.block(), numpyro.handlers.substitute(data=params):
            network, steps = self._bound()
        return self.reverse_trajectory(network, steps, context, mask), steps

    def steps_given(self, params: Params) -> Step:
        """The table of steps under given parameters, which the rates may be among."""
        self.check_params(params)
        with numpyro.handlers.block(), numpyro.handlers.substitute(data=params):
            return self._steps()

    def forward_trajectory(self, steps: Step, x_0: Data, mask: Any = None) -> ForwardTrajectory:
        """q(x_1..x_T | x_0) for data in the user's units."""
        x_0 = jnp.asarray(x_0) if mask is None else jnp.where(mask, x_0, jnp.zeros_like(x_0))
        return ForwardTrajectory(
            self.kernel, steps, self.to_state(x_0), len(self.event_shape), mask
        )

    def reverse_trajectory(
        self, network: Any, steps: Step, context: Any = None, mask: Any = None
    ) -> ReverseTrajectory:
        """p(x_1..x_T) for a bound network."""
        context_dim = len(self.context_shape or ())
        return ReverseTrajectory(
            self.kernel, steps, self.readout, network, self.event_shape, context, context_dim, mask
        )

    def data_given_first(
        self, trajectory: ReverseTrajectory, x_1: Any, mask: Any = None
    ) -> DataGivenFirst:
        """p(x_0 | x_1) in the user's units."""
        event_dim = len(self.event_shape)
        t = jnp.ones(x_1.shape[: x_1.ndim - event_dim], jnp.int32)

        def reverse_step(x_1: Any, step: Step) -> Any:
            return self.readout(self.kernel, trajectory.outputs(x_1, t), x_1, step)

        base = self.last_step(self.kernel, reverse_step, x_1, trajectory.step_at(t))
        return DataGivenFirst(base, self.support, event_dim, self.loc, self.scale, mask)

    @property
    def support(self) -> constraints.Constraint:
        """Values one number of x_0 may take, the user's units."""
        grid = self.last_step.grid
        return self.kernel.support if grid is None else grid

    def to_state(self, x_0: Any) -> Any:
        """Data as the diffusion holds them: (x_0 − loc)/scale, or symbols as int32."""
        return self.kernel.to_state(x_0 if self.scale is None else (x_0 - self.loc) / self.scale)

    def to_data(self, x: Any) -> Any:
        """What the last step draws on the scale of the diffusion, as data: the way back."""
        return to_data(x, self.support, self.loc, self.scale)

    @functools.cached_property
    def params_template(self) -> Params:
        """Shapes and dtypes of the parameters, by site name."""

        def trace(key: Array) -> Params:
            with numpyro.handlers.trace() as sites, numpyro.handlers.seed(rng_seed=key):
                self._bound()
            return {name: s["value"] for name, s in sites.items() if s["type"] == "param"}

        return jax.eval_shape(trace, jax.random.key(0))

    def check_params(self, params: Params) -> None:
        """Raise a `ValueError` that names what is missing, unknown or of another shape."""
        validation.check_params(self.params_template, params, self.name)

    def check_data(self, x_0: Any, mask: Any = None) -> None:
        """Raise a `ValueError` unless data and mask fit; warn of a second moment far from 1."""
        if x_0 is None:
            if mask is not None:
                raise ValueError("mask must come with x_0, of which it says what is observed")
            return
        validation.check_data(self.kernel, self.event_shape, x_0, mask, grid=self.last_step.grid)
        if self.scale is not None and not isinstance(x_0, jax.core.Tracer):
            x = (np.asarray(x_0) - self.loc) / self.scale
            validation.warn_about_moment(self.kernel, self.event_shape, self.rates, x, mask)

    def check_batch_shape(self, x_0: Any, x_1: Any, *, argument: str = "x_0") -> None:
        """Raise a `ValueError` unless x_0 has the batch shape that the plates gave to x_1."""
        if np.shape(x_0) != x_1.shape:
            batch_shape = x_1.shape[: x_1.ndim - len(self.event_shape)]
            raise ValueError(
                f"{argument} must have the batch shape of the plates around it, {batch_shape}; got "
                f"shape {np.shape(x_0)} with event_shape {self.event_shape}. Open a numpyro.plate "
                "for each batch axis"
            )

    def check_context(self, context: Any) -> None:
        """Raise a `ValueError` unless context is given as `context_shape` says."""
        validation.check_context(context, self.context_shape)

    def check_context_rows(self, context: Any, rows: int) -> None:
        """Raise a `ValueError` unless there is one context for each of so many rows, or none."""
        self.check_context(context)
        if context is not None and np.shape(context) != (rows, *self.context_shape):
            raise ValueError(
                f"context must have {rows} rows, shape {(rows, *self.context_shape)}; "
                f"got shape {np.shape(context)}"
            )

    # private

    @property
    def _takes_log_snr(self) -> bool:
        return getattr(self.network, "takes_log_snr", False)

    def _bound(self) -> tuple[Any, Step]:
        """The network with its parameters, from the site `name_network$params`, and the steps."""
        init, apply = self._binding
        params = None if init is None else numpyro.param(f"{self.name}_network$params", init)
        steps = self._steps()
        if self._takes_log_snr:
            return jax.tree_util.Partial(self._apply_at_log_snr, params, steps), steps
        return jax.tree_util.Partial(apply, params), steps

    def _steps(self) -> Step:
        """Table of steps; the rates from the site `name_beta` where they are learned."""
        if self._fixed_steps is None:
            return schedules.steps(self.schedule(f"{self.name}_beta"))
        return self._fixed_steps

    def _forward(self, steps: Step, x_0: Any, mask: Any) -> Any:
        return numpyro.sample(self.trajectory_name, self.forward_trajectory(steps, x_0, mask))

    def _reverse(self, trajectory: ReverseTrajectory, x_0: Any, mask: Any) -> Any:
        event_dim = len(self.event_shape)
        x_1 = first(numpyro.sample(self.trajectory_name, trajectory), event_dim)
        if x_0 is not None:
            self.check_batch_shape(x_0, x_1)
        return numpyro.sample(self.name, self.data_given_first(trajectory, x_1, mask), obs=x_0)

    def _plate(self, x_0: Any, context: Any) -> Any:
        if context is not None:
            self.check_context(context)
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
        try:
            inspect.signature(self.network).bind(*(a for a in inputs if a is not None))
        except TypeError as error:
            form = "network(x_t, t)" if self.context_shape is None else "network(x_t, t, context)"
            raise ValueError(f"network must be callable as {form}; {error}") from None

        def call(key: Array) -> Any:
            with numpyro.handlers.block(), numpyro.handlers.seed(rng_seed=key):
                return self._bound()[0](*inputs)

        out = jax.eval_shape(call, jax.random.key(0))
        count = self.readout.num_outputs(self.kernel)
        expected = (2, *output_shape(self.event_shape, count))
        if out.shape != expected:
            raise ValueError(
                f"network must return shape {shape_text('B', expected[1:])} for "
                f"{self.readout}; got {shape_text('B', out.shape[1:])}"
                f"{self._outputs_hint(count)}"
            )

    def _outputs_hint(self, count: int) -> str:
        """What to say of a network that takes `outputs`, made for another number of them."""
        outputs = getattr(self.network, "outputs", None)
        is_other = isinstance(outputs, int) and outputs != count
        if not (is_other and isinstance(self.kernel, DiscreteKernel)):
            return ""
        return (
            "; pass outputs= to the network: 1 for bits, the number of classes (with states=) for "
            "classes"
        )


def _at_log_snr(apply: Any, params: Params, steps: Step, x_t: Any, t: Any, context: Any) -> Any:
    """A network that is told log ᾱ_t/(1 − ᾱ_t) instead of t."""
    step = steps.at(t, 0)
    return apply(params, x_t, jnp.log(step.alpha_bar_t) - jnp.log(step.noise_t), context)


def _default_readout(kernel: Any) -> Any:
    """2015 for numbers and bits; for classes the law of x_0."""
    if isinstance(kernel, GaussianKernel):
        return readouts.Perturbation()
    return readouts.Logits() if isinstance(kernel, BernoulliKernel) else readouts.DataLogits()


def _default_last_step(kernel: Any) -> readouts.LastStep:
    """2015 for numbers and bits; classes learn it, as an absorbing diffusion must."""
    is_of_2015 = isinstance(kernel, GaussianKernel | BernoulliKernel)
    return readouts.Tied() if is_of_2015 else readouts.Learned()
