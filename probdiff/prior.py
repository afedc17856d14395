"""`Prior`: a trained diffusion as one statement of anyone's program.

    x = prior()                            x_0 ~ p, through its trajectory
    x = prior(context=c)                   x_0 ~ p(· | c)
    x = prior(known=values, mask=mask)     the same, given that x_0 = values wherever mask is True

The last is exact conditioning: known entries come back bit for bit, and the program gains the
factor log p(x_0 = values on the mask | x_1), a density for numbers, a mass for symbols and for
numbers on a grid. Under handlers that only draw (`Predictive`) the factor is ignored, as every
observation is; `infer` and `MCMC` count it.

Source: Sohl-Dickstein et al. (2015), section 2.5.
"""

import warnings
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpyro

from probdiff import validation
from probdiff.trajectories import ReverseTrajectory, first
from probdiff.types import Params

FLOOR = 1e-5
"""Least variance along an axis, as a share of the largest: data need not fill their space."""


class Covariance(NamedTuple):
    """Covariance Σ = U diag(λ) Uᵀ of the d numbers of x_0."""

    axes: np.ndarray
    """U, `(d, d)`."""
    variances: np.ndarray
    """λ, `(d,)`, positive."""


class PriorDraw(NamedTuple):
    """What `infer` needs to know of one call of a prior; kept with the trajectory's site."""

    diffusion: Any
    """The `Diffusion`."""
    trajectory: ReverseTrajectory
    """Its reverse trajectory, parameters and context bound."""
    variance: np.ndarray
    """Variance τ² of x_0 on the scale of the diffusion, which sets the width of a twist."""
    covariance: Covariance | None
    """Covariance of x_0 on that scale, where it was given."""
    known: Any
    """Known values in the user's units, `(*plates, *event_shape)`, or None."""
    mask: Any
    """True where x_0 is known, shape of `known`, or None."""


class Prior:
    """A trained diffusion as a statement `prior()`; made by `Diffusion.prior`.

        x = prior()                            x_0 ~ p, through its trajectory
        x = prior(context=c)                   x_0 ~ p(· | c)
        x = prior(known=values, mask=mask)     the same, given x_0 = values wherever mask is True

    Args:
        diffusion: The `Diffusion`.
        params: Its parameters.
        variance: Variance τ² of the data on the scale of the diffusion, positive, broadcastable to
            `event_shape`; 1 if absent. It sets how wide `infer` takes x_0 to be given a noisy
            level; too wide is safer than too narrow. Or their covariance, `(d, d)` for d
            numbers in an event: the better choice for images, whose numbers hang together.

    Raises:
        ValueError: if parameters do not fit, or the variance is not positive (a covariance:
            not symmetric, or with a negative eigenvalue).

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro.handlers import seed, trace
        >>> from probdiff import Diffusion, GaussianKernel, schedules
        >>> def network(x_t, t):  # z = v = 0: exact for data from N(0, I)
        ...     return jnp.zeros((len(x_t), 4))
        >>> diffusion = Diffusion(
        ...     GaussianKernel(), schedules.linear(5, beta_T=0.5), network, event_shape=(2,)
        ... )
        >>> prior = diffusion.prior({})
        >>> def program():
        ...     return prior(known=jnp.array([3.0, 0.0]), mask=jnp.array([True, False]))
        >>> sites = trace(seed(program, 0)).get_trace()
        >>> list(sites)
        ['x_0_trajectory', 'x_0_free', 'x_0_known', 'x_0']
        >>> float(sites["x_0"]["value"][0])
        3.0

    Source: Sohl-Dickstein et al. (2015), section 2.5.
    """

    def __init__(self, diffusion: Any, params: Params, *, variance: Any = None):
        diffusion.check_params(params)
        self.diffusion, self.params = diffusion, params
        self.variance = validation.check_variance(diffusion.event_shape, variance)
        self.covariance = None
        if self.variance.ndim == 2 and self.variance.shape != diffusion.event_shape:
            _warn_about_units(diffusion, self.variance)
            self.covariance = _eigen(self.variance)
            self.variance = np.diag(self.variance).reshape(diffusion.event_shape)

    def __repr__(self) -> str:
        variance = "variance of each entry" if self.variance.ndim else f"variance={self.variance:g}"
        return (
            f"Prior(event_shape={self.diffusion.event_shape}, name={self.diffusion.name!r}, "
            f"{variance if self.covariance is None else 'covariance'})"
        )

    def __call__(self, *, context: Any = None, known: Any = None, mask: Any = None) -> Any:
        """Draw x_0: sites `name_trajectory` and `name`, no parameters.

        With `known` the sites are `name_trajectory`, `name_free` (what is drawn before the known
        entries are put in), the factor `name_known`, and `name`, deterministic.

        Args:
            context: Handed to the network, `(*plates, *context_shape)`.
            known: Values of x_0 in the user's units, `(*plates, *event_shape)`; read only where
                `mask` is True.
            mask: True where x_0 is known, shape of `known`.

        Returns:
            x_0, `(*plates, *event_shape)`, in the user's units.

        Raises:
            ValueError: if shapes or values do not fit, or only one of known and mask is given.
        """
        diffusion = self.diffusion
        if (known is None) != (mask is None):
            given = "mask" if known is None else "known"
            raise ValueError(f"known and mask must be given together; got only {given}")
        if known is not None:
            validation.check_data(
                diffusion.kernel, diffusion.event_shape, known, mask, "known",
                grid=diffusion.last_step.grid,
            )  # fmt: skip
            known = jnp.asarray(known)
            mask = mask if isinstance(mask, np.ndarray) else jnp.asarray(mask)
        trajectory, _ = diffusion.bind(self.params, context=context)
        draw = PriorDraw(diffusion, trajectory, self.variance, self.covariance, known, mask)
        site = numpyro.sample(diffusion.trajectory_name, trajectory, infer={"prior": draw})
        x_1 = first(site, len(diffusion.event_shape))
        if known is None:
            return numpyro.sample(diffusion.name, diffusion.data_given_first(trajectory, x_1))
        diffusion.check_batch_shape(known, x_1, argument="known")
        free = diffusion.data_given_first(trajectory, x_1)
        x_0 = numpyro.sample(f"{diffusion.name}_free", free)
        observed = diffusion.data_given_first(trajectory, x_1, mask)
        numpyro.factor(f"{diffusion.name}_known", observed.log_prob(known))
        return numpyro.deterministic(diffusion.name, jnp.where(mask, known, x_0))


def _warn_about_units(diffusion: Any, covariance: np.ndarray) -> None:
    """Warn of a covariance in the user's units, where that can be told."""
    if diffusion.scale is None:
        return
    sd = np.broadcast_to(np.asarray(diffusion.scale), diffusion.event_shape).reshape(-1)
    given = np.diag(covariance)
    scaled = given / sd**2

    def is_near_1(variances: np.ndarray) -> bool:
        return bool(0.5 < variances.mean() < 2)

    if is_near_1(scaled) and not is_near_1(given):
        warnings.warn(
            f"variance has mean {given.mean():.3g} along its diagonal, and {scaled.mean():.3g} if "
            "divided by scale²: it looks like a covariance in the user's units. Give that of "
            "(x − loc)/scale",
            stacklevel=4,
        )


def _eigen(covariance: np.ndarray) -> Covariance:
    variances, axes = np.linalg.eigh(0.5 * (covariance + covariance.T))
    if variances[0] < -FLOOR * variances[-1] or variances[-1] <= 0:
        raise ValueError(
            f"variance must be a covariance; got one with an eigenvalue of {variances[0]:.3g}"
        )
    return Covariance(axes, np.maximum(variances, FLOOR * variances[-1]))
