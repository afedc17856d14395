"""`Prior`: a trained diffusion as one statement of anyone's program.

    x = prior()                            x_0 ~ p, through its trajectory
    x = prior(context=c)                   x_0 ~ p(· | c)
    x = prior(known=values, mask=mask)     the same, given that x_0 = values wherever mask is True

The last is exact conditioning: known entries come back bit for bit, x_0 is a draw of the others,
and the program gains the factor log p(x_0 = values on the mask | x_1), a density for numbers, a
mass for symbols and for numbers on a grid, which `infer` and `MCMC` count. `Predictive` counts no
observation and no factor: it takes posterior draws of x_0, and without them it is refused. (The
trajectory that it draws beside given x_0 is the prior's, as of any site without a draw.)

Source: Sohl-Dickstein et al. (2015), section 2.5.
"""

import dataclasses
import functools
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import Transform

from probdiff import validation
from probdiff.arguments import check_object, check_text, plain
from probdiff.compilation import Programs
from probdiff.reverse import DataGivenFirst, Mask, Reverse, State, taken_off
from probdiff.trajectories import TRAJECTORY_SUFFIX, ReverseTrajectory, first

_CHECKED_DRAWS, _CHECKED_FEW, _CHECKED_STEPS = 128, 32, 20
"""Draws of the prior that a covariance is compared with, fewer where x_0 has more than 256 numbers,
and the most steps by which they come: a network may be slow."""
_NARROW, _MISFIT = 0.05, 4.0
"""Share of the mean variance that is added to all; ratio of variances from which it is no fit."""
FLOOR = 1e-5
"""Least variance along an axis, as a share of the largest: data need not fill their space."""


class Covariance(NamedTuple):
    """Covariance Σ = U diag(λ) Uᵀ of the d numbers of x_0."""

    axes: np.ndarray
    """U, `(d, d)`."""
    variances: np.ndarray
    """λ, `(d,)`, positive."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["reverse", "variance", "covariance", "known", "mask"],
    meta_fields=["name"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class PriorDraw:
    """What `infer` needs to know of one call of a prior; kept with the trajectory's site."""

    name: str
    """Name of the site of x_0."""
    reverse: Reverse
    """The reverse process, context bound."""
    variance: Any
    """Variance τ² of x_0 on the scale of the diffusion, which sets the width of a twist."""
    covariance: Covariance | None
    """Covariance of x_0 on that scale, where it was given."""
    known: Any = None
    """Known values in the user's units, `(*plates, *event_shape)`, or None."""
    mask: Any = None
    """True where x_0 is known, shape of `known`, or None."""


class Prior:
    """A trained diffusion as a statement `prior()`; made by `Diffusion.prior`.

    Args:
        reverse: Its reverse process, parameters bound.
        name: Name of the site of x_0.
        variance: Variance τ² of the data on the scale of the diffusion, positive, broadcastable to
            `event_shape`; 1 if absent. It sets how wide `infer` takes x_0 to be given a noisy
            level; too wide is safer than too narrow. Or their covariance, `(d, d)` for d numbers in
            an event: the better choice where these depend on each other, as in images.
        programs: Where inference keeps what it compiles; the diffusion's.

    Raises:
        ValueError: if the variance is not positive (a covariance: not symmetric, or with a negative
            eigenvalue).

    Warns:
        UserWarning: if a few draws of the prior, by few steps, do not have the covariance given.

    Example:
        >>> prior = standard_diffusion((2,)).prior({})
        >>> def program():
        ...     return prior(known=jnp.array([3.0, 0.0]), mask=jnp.array([True, False]))
        >>> sites = trace(seed(program, 0)).get_trace()
        >>> list(sites)
        ['x_0_trajectory', 'x_0', 'x_0_known']
        >>> float(sites["x_0"]["value"][0])
        3.0
    """

    def __init__(
        self,
        reverse: Reverse,
        name: str = "x_0",
        *,
        variance: Any = None,
        programs: Programs | None = None,
    ):
        check_object(Reverse, "what Diffusion.bind returns", reverse=reverse)
        check_text(name=name)
        check_object(Programs, or_none=True, programs=programs)
        self.reverse, self.name, self.covariance = reverse, name, None
        self.programs = Programs() if programs is None else programs
        self.variance = validation.check_variance(reverse.event_shape, variance)
        if validation.is_covariance(reverse.event_shape, self.variance):
            self.covariance = _eigen(self.variance)
            if not _warn_about_units(reverse, self.variance):
                _warn_of_misfit(reverse, self.covariance, self.programs)
            self.variance = np.diag(self.variance).reshape(reverse.event_shape)

    def __repr__(self) -> str:
        variance = "variance of each entry" if self.variance.ndim else f"variance={self.variance:g}"
        return (
            f"Prior(event_shape={self.reverse.event_shape}, name={self.name!r}, "
            f"{variance if self.covariance is None else 'covariance'})"
        )

    def __call__(self, *, context: Any = None, known: Any = None, mask: Any = None) -> State:
        """Draw x_0: sites `name_trajectory` and `name`, no parameters.

        With `known` the density of `name` is that of the other entries alone, and there is the
        factor `name_known` beside it.

        Args:
            context: Handed to the network, `(*plates, *context_shape)`.
            known: Values of x_0 in the user's units, `(*plates, *event_shape)`; read only where
                `mask` is True.
            mask: True where x_0 is known, shape of `known`.

        Returns:
            x_0, `(*plates, *event_shape)`, in the user's units.

        Raises:
            ValueError: if shapes or values do not fit, or only one of known and mask is given; if
                known entries come with prior predictive draws (`Predictive` without draws of x_0),
                whose law would not be given them.
        """
        reverse = self.reverse.given(plain("context", context))
        if reverse.units.loc is not None:
            loc = taken_off(reverse.units.loc, reverse.grid)
            validation.warn_about_precision(
                loc, reverse.units.scale, reverse.event_shape, reverse.kernel.dtype, stacklevel=3
            )
        if (known is None) != (mask is None):
            given = "mask" if known is None else "known"
            raise ValueError(f"known and mask must be given together; got only {given}")
        if known is not None:
            known, mask = plain("known", known), plain("mask", mask)
            validation.check_data(
                reverse.kernel, reverse.event_shape, known, mask, "known", grid=reverse.grid
            )
        draw = PriorDraw(self.name, reverse, self.variance, self.covariance, known, mask)
        site = self.name + TRAJECTORY_SUFFIX
        law = ReverseTrajectory(reverse)
        infer = {"prior": draw, "prior_law": law, "programs": self.programs}
        x_1 = first(numpyro.sample(site, law, infer=infer), reverse.event_dim)
        law = reverse.data(x_1)
        if known is None:
            return numpyro.sample(self.name, law, infer={"data_of": draw, "prior_law": law})
        validation.check_batch_shape(known, x_1, reverse.event_shape, argument="known")
        factor = dist.Unit(law.masked(mask).log_prob(known))
        law = _DataGivenKnown(law, known, mask, self.name)
        x_0 = numpyro.sample(self.name, law, infer={"data_of": draw, "prior_law": law})
        infer = {"known_of": draw, "prior_law": factor, "is_auxiliary": True}
        numpyro.sample(f"{self.name}_known", factor, obs=factor.sample(None), infer=infer)
        return jnp.where(mask, known, x_0)


class _DataGivenKnown(DataGivenFirst):
    """p(x_0 | x_1) of the entries that are not known; the known ones stand in its draws."""

    pytree_data_fields = ("known",)
    pytree_aux_fields = ("name",)

    def __init__(self, law: DataGivenFirst, known: Any, mask: Mask, name: str):
        free = ~mask if isinstance(mask, jax.Array) else np.asarray(~mask)  # not a scalar
        super().__init__(law.base, law.data_support, law.event_dim, law.units, free)
        self.known, self.name = known, name

    @property
    def support(self) -> constraints.Constraint:
        if self.data_support is not constraints.real:
            return super().support
        low, high = (jnp.where(self.observed, end, self.known) for end in (-jnp.inf, jnp.inf))
        return _Points(low, high, self.event_dim)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> State:
        check_counted(self.name)
        return jnp.where(self.observed, super().sample(key, sample_shape), self.known)


def check_counted(name: str) -> None:
    """Refuse to draw a prior of known entries under `Predictive`, which counts no factor."""
    if numpyro.get_mask() is False:
        raise ValueError(
            f"prior {name!r} has known entries, and Predictive would not draw the others given "
            "them. Give it posterior draws, Predictive(program, smc.get_samples()), of infer.SMC "
            "or of MCMC(NUTS(infer.noncentered(program)))"
        )


class _Points(constraints._Interval):
    """Intervals, of which some are a point: the support of x_0 where entries are known.

    As an interval with computed ends it makes MCMC work out its draws within the program.
    """

    def __init__(self, low: Array, high: Array, event_dim: int):
        super().__init__(low, high)
        self.event_dim = event_dim

    def __call__(self, x: Any) -> Any:
        return jnp.all(super().__call__(jnp.asarray(x)), tuple(range(-self.event_dim, 0)))

    def tree_flatten(self) -> Any:
        fields, (names, _) = super().tree_flatten()
        return fields, (names, {"event_dim": self.event_dim})


class _ToPoints(Transform):
    """Numbers with known ones put in, whose coordinates have the law N(0, 1) in their place."""

    def __init__(self, points: _Points):
        self.points = points

    @property
    def domain(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, self.points.event_dim)

    @property
    def codomain(self) -> constraints.Constraint:
        return self.points

    @property
    def _is_known(self) -> Array:
        return self.points.lower_bound == self.points.upper_bound

    def __call__(self, x: Any) -> Array:
        return jnp.where(self._is_known, self.points.lower_bound, x)

    def _inverse(self, y: Any) -> Array:
        return jnp.where(self._is_known, 0.0, y)

    def log_abs_det_jacobian(self, x: Any, y: Any, intermediates: Any = None) -> Array:
        log_p = jnp.where(self._is_known, dist.Normal(0.0, 1.0).log_prob(x), 0.0)
        return jnp.sum(log_p, tuple(range(-self.points.event_dim, 0)))

    def tree_flatten(self) -> Any:
        return (self.points,), (("points",), {})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ToPoints) and self.points == other.points


biject_to.register(_Points)(_ToPoints)


def _warn_about_units(reverse: Reverse, covariance: np.ndarray) -> bool:
    """Warn of a covariance in the user's units, where that can be told; whether it did."""
    if reverse.units.scale is None:
        return False
    sd = np.broadcast_to(np.asarray(reverse.units.scale), reverse.event_shape).reshape(-1)
    variances = np.diag(covariance)
    given, scaled = variances.mean(), (variances / sd**2).mean()
    is_so = bool(0.5 < scaled < 2 and not 0.5 < given < 2)
    if is_so:
        warnings.warn(
            f"variance has mean {given:.3g} along its diagonal, and {scaled:.3g} if "
            "divided by scale²: it looks like a covariance in the user's units. Give that of "
            "(x − loc)/scale",
            stacklevel=4,
        )
    return is_so


def _warn_of_misfit(reverse: Reverse, covariance: Covariance, programs: Programs) -> None:
    """Warn of a covariance that is plainly not that of the prior's own draws.

    With δ, a share of the mean variance, for what a network leaves of narrow axes, the draws'
    covariance S is compared as (Σ + δ)^{-1/2} (S + δ) (Σ + δ)^{-1/2}, the identity where it fits.
    Its largest eigenvalue may be (1 + √(d/n))² by chance, for n draws. Along the wider axes of Σ
    alone it is asked whether the draws are too narrow, for a shrunk Σ is too wide along the others.
    """
    leaves = [a for a in jax.tree.leaves(reverse) if isinstance(a, jax.Array)]
    is_known = not any(isinstance(a, jax.core.Tracer) for a in leaves) and all(
        a.is_fully_addressable for a in leaves
    )
    if reverse.kernel.is_discrete or reverse.context_shape is not None or not is_known:
        return
    with jax.ensure_compile_time_eval():
        short = reverse.respaced(min(_CHECKED_STEPS, reverse.n))
        x = np.asarray(programs(_draws, jax.random.key(0), short), np.float64)
    d, n = len(covariance.variances), len(x)
    if not np.isfinite(x).all():
        return
    delta = _NARROW * covariance.variances.mean()
    z = (x - x.mean(0)) @ covariance.axes / np.sqrt(covariance.variances + delta)
    noise = delta / (covariance.variances + delta)
    along = np.mean(z**2, 0) + noise
    gram = z.T @ z / n + np.diag(noise)
    most = float(np.linalg.eigvalsh(gram)[-1])
    is_wide = covariance.variances >= covariance.variances.mean()
    least = float(np.median((np.var(x @ covariance.axes, 0) / covariance.variances)[is_wide]))
    if most <= _MISFIT * (1 + np.sqrt(d / n)) ** 2 and least >= 1 / _MISFIT:
        return
    trace = float(np.mean(along))
    warnings.warn(
        f"variance is a covariance that does not fit the prior: in some direction the prior's own "
        f"draws vary {most:.2g} times as much as it says, along its wider half {least:.2g} times, "
        f"and tr(Σ⁻¹ S)/d is {trace:.2g}; 1 is meant. Posteriors need many more particles, and "
        "log_evidence may be far off. Give the covariance of (x_0 − loc)/scale of the training "
        "data, entries in the order of the event, shrunk where there are few rows",
        stacklevel=4,
    )


def _draws(key: Array, reverse: Reverse) -> Array:
    """Draws of x_0 on the scale of the diffusion, flat."""
    key_walk, key_last = jax.random.split(key)
    d = math.prod(reverse.event_shape)
    count = _CHECKED_DRAWS if d <= 2 * _CHECKED_DRAWS else _CHECKED_FEW
    x_1, _ = ReverseTrajectory(reverse).walk(key_walk, (count,))
    return reverse.last(x_1).sample(key_last).reshape(count, d)


def _eigen(covariance: np.ndarray) -> Covariance:
    variances, axes = np.linalg.eigh(0.5 * (covariance + covariance.T))
    if variances[0] < -FLOOR * variances[-1] or variances[-1] <= 0:
        raise ValueError(
            f"variance must be a covariance; got one with an eigenvalue of {variances[0]:.3g}"
        )
    return Covariance(axes, np.maximum(variances, FLOOR * variances[-1]))
