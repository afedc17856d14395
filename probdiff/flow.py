"""The probability flow: x_0 as what a differential equation makes of x_T, and its log density.

With λ = log ᾱ/(1−ᾱ), a = √ᾱ and the denoised point x̂_0 = E[x_0 | x] at λ, the equation

    dx/dλ = ½ a (x̂_0 − a x)

takes the law of every level to that of every other, as the reverse trajectory of endless steps
does, and without noise. It is dx̄/dσ̄ = (x̄ − x̂_0)/σ̄ of x̄ = x/a, σ̄ = σ/a, on a scale where neither
end is far away. Started from x_T ~ N(0, I) it gives x_0 a density of its own: with x_T that to
which x_1 = a_1 (x_0 − loc)/scale leads,

    log p(x_0) = log N(x_T; 0, I) − ∫ ∇·(dx/dλ) dλ + Σ log (a_1/scale),    λ from λ_T to λ_1.

It ends at level 1, whose noise stays in x_0, with variance (1 − ᾱ_1)/ᾱ_1: β_1 should be small
beside the data's variance. No bound speaks of this density. The flow and the diffusion of T steps
are different models by one network, which meet as T grows, and either may give data more.

The divergence is exact, by d derivatives of the network for d numbers; or Hutchinson's estimate
v·∂_v of random signs v, each kept along the way, which has no bias for log p, though for p.

The network is asked at any λ, so it has to take the log-SNR, and its readout to do without a step.
The equation is solved by `diffrax`, of the extra `probdiff[flow]`: Tsitouras's method of order 5,
its steps by the tolerances.

Sources: Song et al. (2021), Score-based generative modeling through SDEs, section 4.3 and appendix
D.2; Grathwohl et al. (2019), FFJORD, for the estimate and v kept.
"""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int
from numpyro.distributions import constraints

from probdiff import validation
from probdiff.arguments import Range, check_number, check_object, plain
from probdiff.diffusion import Diffusion
from probdiff.readouts.grid import is_on_grid
from probdiff.reverse import Reverse, State
from probdiff.types import Params, Step

__all__ = ["Flow"]

_TOLERANCE = Range("lie in [1e-12, 0.1]", lambda x: 1e-12 <= x <= 0.1)
_MOST_STEPS = 4096
"""Of a solution; one that needs more is NaN."""
_STAGES = 6
"""Points at which a step asks the network: its last is the next one's first."""
_START = 2
"""Points at which it is asked before the first step, whose length they decide."""


class Flow(dist.Distribution):
    """x_0 of the probability flow, a NumPyro distribution: a prior for NUTS, in low dimension.

    `log_prob` is exact up to the tolerances and differentiable, at the cost of d derivatives of the
    network for each of some 100 points; `sample` draws by the flow. Where a solution needs too many
    steps, both are NaN.

    Args:
        diffusion: A diffusion of numbers, each with a density, whose network takes the log-SNR.
        params: Its parameters.
        context: Handed to the network, `(*batch, *context_shape)`.
        rtol, atol: Tolerances of a step, in [1e-12, 0.1]; less than 1e-6 wants float64.
        probes: To be left out: an estimated log p is unbiased for log p, not for p, and a sampler
            with it would not have the flow for its prior. See `diagnostics.flow_density`.

    Raises:
        ValueError: if the diffusion has no flow: symbols, numbers on a grid, a network that takes
            t, a readout that depends on the step.
        ImportError: from `log_prob` and `sample`, without `diffrax`.

    Example:
        >>> def network(x_t, log_snr):  # of data that are N(0, I): √ᾱ x_t
        ...     return jnp.sqrt(jax.nn.sigmoid(log_snr))[:, None] * x_t
        >>> network.takes_log_snr = True
        >>> beta = schedules.log_snr_linear(50, beta_1=1e-4, alpha_bar_T=1e-6)
        >>> readout = readouts.Data(readouts.BridgeVariance())
        >>> diffusion = Diffusion(
        ...     GaussianKernel(), beta, network, event_shape=(2,), readout=readout, loc=3.0
        ... )
        >>> law, x = flow.Flow(diffusion, {}), jnp.array([3.0, 5.0])
        >>> bool(jnp.isclose(law.log_prob(x), dist.Normal(3.0, 1.0).log_prob(x).sum(), atol=1e-3))
        True
        >>> def program(y):
        ...     numpyro.sample("y", dist.Normal(numpyro.sample("x_0", law), 1.0).to_event(1), obs=y)
        >>> mcmc = MCMC(NUTS(program), num_warmup=100, num_samples=500, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), jnp.array([4.0, 3.0]))
        >>> bool(jnp.allclose(mcmc.get_samples()["x_0"].mean(0), jnp.array([3.5, 3.0]), atol=0.2))
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("reverse",)
    pytree_aux_fields = ("rtol", "atol")

    def __init__(
        self, diffusion: Diffusion, params: Params, *, context: Any = None, rtol: float = 1e-6,
        atol: float = 1e-6, probes: Any = None,
    ):  # fmt: skip
        if probes is not None:
            raise ValueError(
                "probes must be left out of a distribution: Hutchinson's estimate has no bias for "
                "log p, though for p. diagnostics.flow_density takes them"
            )
        check_tolerances(rtol, atol)
        check_flows(diffusion)
        self.reverse = diffusion.bind(params).given(plain("context", context))
        self.rtol, self.atol = float(rtol), float(atol)
        loc, scale = self.reverse.units
        validation.warn_about_precision(
            loc, scale, diffusion.event_shape, diffusion.kernel.dtype, stacklevel=3
        )
        rank = len(diffusion.context_shape or ())
        lead = () if context is None else np.shape(context)[: np.ndim(context) - rank]
        super().__init__(tuple(lead), diffusion.event_shape)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, self.event_dim)

    def log_prob(self, value: Any, intermediates: Any = None) -> Float[Array, "..."]:
        value = jnp.asarray(value, self.reverse.kernel.dtype)
        lead = jnp.broadcast_shapes(self.batch_shape, value.shape[: value.ndim - self.event_dim])

        def one(reverse: Reverse, x_0: Array) -> Array:
            base, divergence, _ = log_density(
                reverse, x_0, axes_of(reverse), rtol=self.rtol, atol=self.atol
            )
            return base + jnp.sum(divergence)

        return self._by_row(one, value, lead)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> State:
        lead = (*sample_shape, *self.batch_shape)
        x_T = self.reverse.kernel.stationary((*lead, *self.event_shape)).sample(key)
        one = functools.partial(_draw, rtol=self.rtol, atol=self.atol)
        return self._by_row(one, x_T, lead)

    def _by_row(self, one: Callable[..., Array], x: Array, lead: tuple[int, ...]) -> Array:
        """`one(reverse, x)` of every event of x, broadcast to `lead` with its context."""
        x = jnp.broadcast_to(x, (*lead, *self.event_shape)).reshape(-1, *self.event_shape)
        context, shape = self.reverse.context, self.reverse.context_shape
        if context is not None:
            context = jnp.broadcast_to(context, (*lead, *shape)).reshape(-1, *shape)
        rows = jax.vmap(lambda x, context: one(self.reverse.given(context), x))(x, context)
        return rows.reshape(*lead, *rows.shape[1:])


def log_density(
    reverse: Reverse, x_0: State, vectors: Float[Array, "vectors ..."], *, rtol: float, atol: float
) -> tuple[Float[Array, ""], Float[Array, " vectors"], Int[Array, ""]]:
    """log p(x_0) of one example in parts, its context given, NaN where there is no solution.

    Args:
        reverse: The reverse process.
        x_0: The example, user's units, `event_shape`.
        vectors: Directions v, of the same shape each.
        rtol, atol: Tolerances of a step.

    Returns:
        What does not depend on the divergence, −∫ v·∂_v (dx/dλ) dλ of each v, nats, and the number
        of points at which the network was asked.
    """
    first, last = log_snr_of(reverse.trained)[jnp.array([0, -1])]
    root = jnp.sqrt(reverse.trained.alpha_bar_t[0])
    x_1 = root * reverse.to_state(x_0)
    x_T, divergence, steps = _solve(reverse, x_1, vectors, first, last, rtol, atol)
    log_ratio = jnp.broadcast_to(jnp.log(root) - jnp.log(reverse.units.scale), x_1.shape)
    base = jnp.sum(reverse.kernel.stationary(x_T.shape).log_prob(x_T) + log_ratio)
    return base, divergence, _START + _STAGES * steps


def axes_of(reverse: Reverse) -> Float[Array, "vectors ..."]:
    """Directions whose v·∂_v sum to the divergence: every axis of an event."""
    shape = reverse.event_shape
    return jnp.eye(math.prod(shape), dtype=reverse.kernel.dtype).reshape(-1, *shape)


def check_tolerances(rtol: Any, atol: Any) -> None:
    """Raise a `ValueError` unless a solver can keep to them."""
    check_number(_TOLERANCE, rtol=rtol, atol=atol)


def check_flows(diffusion: Any) -> None:
    """Raise a `ValueError` unless a diffusion has a flow with a density."""
    check_object(Diffusion, diffusion=diffusion)
    if diffusion.kernel.is_discrete:
        raise ValueError(f"diffusion must be of numbers to have a flow; got {diffusion.kernel}")
    if is_on_grid(diffusion.last_step.grid).any():
        raise ValueError(
            "diffusion must have a density to have a flow: numbers on a grid have masses, which "
            f"diagnostics.bound bounds; got last_step {diffusion.last_step}"
        )
    if not getattr(diffusion.network, "takes_log_snr", False):
        raise ValueError(
            "diffusion must have a network that takes the log-SNR, such as networks.FromMixture, "
            f"for the flow asks between levels; got {type(diffusion.network).__name__}"
        )
    if needs_step(diffusion):
        raise ValueError(
            "diffusion must have a readout whose x_0_hat depends on x_t and the log-SNR alone, "
            f"as Epsilon, Data or Velocity; that of {diffusion.readout} depends on the step"
        )


def needs_step(diffusion: Diffusion) -> bool:
    """Whether x̂_0 is made of more than ᾱ_t: by what NaN in the rest does to it."""
    with jax.ensure_compile_time_eval():
        step = levels_at(jnp.zeros(1)).at(1, len(diffusion.event_shape))
        zeros = jnp.zeros(diffusion.event_shape)
        outputs = (zeros,) * diffusion.readout.num_outputs(diffusion.kernel)
        x_0_hat = diffusion.readout.x_0_hat(diffusion.kernel, outputs, zeros, step)
        return bool(jnp.isnan(x_0_hat).any())


def levels_at(log_snr: Float[Array, " n"]) -> Step:
    """A table of levels of these log-SNRs, in any order, to which no steps lead."""
    none = jnp.full_like(log_snr, jnp.nan)
    left, noise = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
    t = jnp.arange(1, len(log_snr) + 1, dtype=jnp.int32)
    return Step(t, none, none, left, none, noise)


def log_snr_of(table: Step) -> Float[Array, " T"]:
    """log ᾱ/(1−ᾱ) of every level."""
    return jnp.log(table.alpha_bar_t) - jnp.log(table.noise_t)


def _draw(reverse: Reverse, x_T: Array, *, rtol: float, atol: float) -> Array:
    """x_0 in the user's units from one x_T."""
    first, last = log_snr_of(reverse.trained)[jnp.array([0, -1])]
    none = jnp.zeros((0, *reverse.event_shape), x_T.dtype)
    x_1, _, _ = _solve(reverse, x_T, none, last, first, rtol, atol)
    return reverse.to_data(x_1 / jnp.sqrt(reverse.trained.alpha_bar_t[0]))


def _solve(
    reverse: Reverse, x: Array, vectors: Array, start: Array, end: Array, rtol: float, atol: float
) -> tuple[Array, Float[Array, " vectors"], Int[Array, ""]]:
    """x at `end`, the integral of v·∂_v (dx/dλ) for each v on the way there, number of steps."""
    solver = diffrax()
    solution = solver.diffeqsolve(
        solver.ODETerm(_field), solver.Tsit5(), start, end, None,
        (x, jnp.zeros(len(vectors), x.dtype)), (reverse, vectors),
        stepsize_controller=solver.PIDController(rtol, atol), max_steps=_MOST_STEPS, throw=False,
        saveat=solver.SaveAt(t1=True),
    )  # fmt: skip
    is_solved = solution.result == solver.RESULTS.successful
    x, integral = (jnp.where(is_solved, a[0], jnp.nan) for a in solution.ys)
    return x, integral, solution.stats["num_steps"]


def _field(
    log_snr: Array, state: tuple[Array, Array], given: tuple[Reverse, Array]
) -> tuple[Array, Array]:
    """dx/dλ and v·∂_v of it."""
    reverse, vectors = given
    level = levels_at(log_snr[None])
    reverse, root = reverse.on_levels(level), jnp.sqrt(level.alpha_bar_t[0])

    def drift(x: Array) -> Array:
        return 0.5 * root * (reverse.x_0_hat(x, 1) - root * x)

    slope, along = jax.linearize(drift, state[0])
    return slope, jax.vmap(lambda v: jnp.sum(v * along(v)))(vectors)


def diffrax() -> Any:
    """The solvers, or an `ImportError` that says which extra has them."""
    try:
        return importlib.import_module("diffrax")
    except ImportError as error:
        raise ImportError(
            "the flow is solved by diffrax, which is not installed: pip install 'probdiff[flow]'"
        ) from error
