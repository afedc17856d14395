"""Forward coordinates: x_0 and the noise of its forward trajectory, a program over them for MCMC.

The forward process is a map with a constant Jacobian of (x_0, ε_1..ε_T) onto trajectories,

    x_t = √(1−β_t) x_s + √β_t ε_t,    s = t − 1,

and in these coordinates the learned joint density p(x_0, …, x_T) is

    w(x_0, ε) ∏ N(ε_t; 0, I),    log w = log p(x_0, …, x_T) − log q(x_1, …, x_T | x_0).

As E_ε[w] = p(x_0), the law of x_0 is the learned one, and known entries of it are coordinates that
stay where they are: nothing has to be guessed of p(x_0 | x_t). All T network calls are one batch,
where `noncentered` has them one after another. Moves in them do not cross between modes either.

x_0 itself is written as x = m + σ L z by the prior's variance or covariance, m and L those of the
unknown entries given the known ones, so that z is about N(0, I) where the data are Gaussian.

Where x_0 lies on a grid it has no gradient, and the coordinates start at x_1: z is x_1's, and the
density that of x_1, …, x_T and of the known entries' cells, P(known | x_1).

Source: Sohl-Dickstein et al. (2015), sections 2.1 to 2.3.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float

from probdiff.arguments import check_at_least, check_callable
from probdiff.infer.noncentered import Reparametrised, Start, over
from probdiff.infer.program import Program, Site, refuse, unexpanded
from probdiff.prior import FLOOR, PriorDraw
from probdiff.reverse import Reverse, State
from probdiff.trajectories import TRAJECTORY_SUFFIX, ReverseTrajectory

_Vector = Float[Array | np.ndarray, "... d"]


class Coordinates(NamedTuple):
    """x = center + sd · L z for the d numbers of x_0 (of x_1 on a grid), the diffusion's scale."""

    center: _Vector
    root: Any  # L, `(..., d, d)` lower triangular, or None for the identity
    sd: _Vector
    known: Any  # values `(..., d)` that take the place of x, or None
    is_known: Any  # where they do

    def x(self, z: _Vector) -> Array:
        """x of z, known entries put in."""
        y = z if self.root is None else jnp.einsum("...ij,...j->...i", self.root, z)
        x = self.center + self.sd * y
        return x if self.known is None else jnp.where(self.is_known, self.known, x)

    def z(self, x: _Vector) -> Array:
        """The way back; 0 for known entries."""
        y = (x - self.center) / self.sd
        y = y if self.known is None else jnp.where(self.is_known, 0.0, y)
        if self.root is None:
            return y
        root = jnp.broadcast_to(self.root, (*y.shape, y.shape[-1]))
        return jax.scipy.linalg.solve_triangular(root, y[..., None], lower=True)[..., 0]

    @property
    def log_volume(self) -> Array:
        """log |∂x/∂z| of the entries that are not known."""
        terms = jnp.log(self.sd * 1.0)
        if self.root is not None:
            terms = terms + jnp.log(jnp.diagonal(self.root, axis1=-2, axis2=-1))
        terms = jnp.broadcast_to(terms, jnp.broadcast_shapes(terms.shape, jnp.shape(self.center)))
        return jnp.sum(terms if self.known is None else jnp.where(self.is_known, 0.0, terms), -1)


def coordinates(draw: PriorDraw, known: Any, is_known: Any) -> Coordinates:
    """Of a prior's x_0, or x_1 where x_0 is on a grid, given its known entries.

    Args:
        draw: The prior.
        known: Known entries on the scale of the diffusion, `(..., d)`, or None.
        is_known: Where they count, of a shape that broadcasts.
    """
    d, dtype = math.prod(draw.reverse.event_shape), draw.reverse.kernel.dtype
    given = [a for a in (draw.variance, draw.covariance, known, is_known) if a is not None]
    is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given))
    xp = jnp if is_traced else np
    center, root = xp.zeros(d), None
    shape = draw.reverse.event_shape if np.ndim(draw.variance) else ()
    sd = xp.sqrt(xp.broadcast_to(xp.asarray(draw.variance), shape).reshape(-1)) * xp.ones(d)
    if draw.covariance is not None:
        center, root = _conditional(xp, draw.covariance, known, is_known)
        sd = xp.ones(d)
    if draw.reverse.grid is not None:
        step = draw.reverse.steps
        share = step.alpha_bar_t[0] if is_traced else np.asarray(step.alpha_bar_t)[0]
        center, known = xp.sqrt(share) * center, None
        if root is None:
            sd = xp.sqrt(share * sd**2 + 1 - share)
        else:
            root = xp.linalg.cholesky(
                share * root @ xp.swapaxes(root, -1, -2) + (1 - share) * xp.eye(d)
            )
    center, sd = (jnp.asarray(a, dtype) for a in (center, sd))
    return Coordinates(center, None if root is None else jnp.asarray(root, dtype), sd, known,
                       None if known is None else is_known)  # fmt: skip


def _conditional(xp: Any, covariance: Any, known: Any, is_known: Any) -> tuple[Any, Any]:
    """Mean and root of the covariance of N(0, Σ) given entries; identity on those."""
    sigma = (covariance.axes * covariance.variances) @ covariance.axes.T
    eye = xp.eye(sigma.shape[-1])
    if known is None:
        return xp.zeros(len(sigma)), xp.linalg.cholesky(sigma)
    m = xp.asarray(is_known) * 1.0
    block = sigma * m[..., :, None] * m[..., None, :] + eye * (1 - m)[..., None]
    gain = xp.swapaxes(xp.linalg.solve(block, sigma * m[..., :, None]), -1, -2) * m[..., None, :]
    rest = sigma - gain @ sigma
    free = 1 - m
    rest = rest * free[..., :, None] * free[..., None, :] + eye * m[..., None]
    floor = FLOOR * xp.max(covariance.variances)
    values = xp.where(xp.asarray(is_known), known, 0.0)
    return (gain @ values[..., None])[..., 0], xp.linalg.cholesky(rest + floor * eye)


class Path(NamedTuple):
    """A point in forward coordinates."""

    z: Float[Array, "*lead d"]
    noise: Float[Array, "levels *lead d"]
    """ε_1..ε_n; where the coordinates start at x_1, ε_2..ε_n."""


class Levels(NamedTuple):
    """The trajectory at a point."""

    x_0: State  # on the scale of the diffusion; x_1 where x_0 is on a grid
    x: State  # x_1..x_n, `(n, *lead, *event_shape)`
    log_volume: Array  # log |∂(x_0, x_1, …)/∂(z, ε)|


def levels(reverse: Reverse, by: Coordinates, path: Path) -> Levels:
    """The trajectory x_0, x_1, …, x_n at a point, events in their shape."""
    lead = path.z.shape[:-1]
    start = by.x(path.z).reshape(*lead, *reverse.event_shape)
    noise = path.noise.reshape(*path.noise.shape[:-1], *reverse.event_shape)
    first = reverse.n - len(noise) + 1

    def advance(x_s: State, inputs: tuple) -> tuple[State, tuple[State, Array]]:
        t, noise = inputs
        law = reverse.kernel.transition(x_s, reverse.coefficients(t))
        return (x_t := law.loc + law.scale * noise), (x_t, jnp.mean(jnp.log(law.scale)))

    _, (x, log_sd) = jax.lax.scan(advance, start, (jnp.arange(first, reverse.n + 1), noise))
    x = x if first == 1 else jnp.concatenate([start[None], x])
    return Levels(start, x, by.log_volume + path.z.shape[-1] * jnp.sum(log_sd))


def path_of(key: Array, reverse: Reverse, by: Coordinates, x_0: State) -> Path:
    """The coordinates of x_0, `(*lead, *event_shape)`, its noise drawn forward.

    Where they start at x_1, that is drawn as well.
    """
    key_first, key_noise = jax.random.split(key)
    n, lead = reverse.n, x_0.shape[: x_0.ndim - reverse.event_dim]
    if reverse.grid is not None:
        x_0, n = reverse.kernel.transition(x_0, reverse.coefficients(1)).sample(key_first), n - 1
    z = by.z(x_0.reshape(*lead, -1))
    return Path(z, jax.random.normal(key_noise, (n, *z.shape), z.dtype))


def forward_coordinates(program: Program, *, steps: int | None = None) -> Program:
    """The same program over x_0 and the noise of its forward trajectory, for MCMC.

    For `MCMC(NUTS(forward_coordinates(program)))`: any number of priors, and any other latent
    sites, which NUTS infers along, in one density. A prior `x_0` has the sites `x_0_coordinates`, z
    of event shape `(d,)` for d numbers, and `x_0_noise`, ε_1..ε_n of event shape
    `(n, *event_shape)`, the factor `x_0_weight`, log w and the volume of z, and `x_0`,
    deterministic. A leapfrog step calls the network for all levels at once.

    Args:
        program: A program that calls priors of numbers; condition it before, on what it observes.
        steps: Steps n of the diffusion, in 2..T; all T if absent. Fewer are another, coarser model.

    Returns:
        A program with the arguments of `program`. When called it raises a `ValueError` where
        `noncentered` does, and if `x_0` is observed: known entries are `prior(known=…, mask=…)`.

    Example:
        >>> prior = standard_diffusion((2,), T=4).prior({})  # x_0 ~ N(0, I)
        >>> def program(y):
        ...     sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        ...     x_0 = prior(known=jnp.array([1.0, 0.0]), mask=np.array([True, False]))
        ...     numpyro.sample("y", dist.Normal(x_0[1], sigma), obs=y)
        >>> options = {"num_warmup": 200, "num_samples": 1000, "progress_bar": False}
        >>> mcmc = MCMC(NUTS(infer.forward_coordinates(program)), **options)
        >>> mcmc.run(jax.random.key(0), y=1.0)
        >>> draws = mcmc.get_samples()
        >>> draws["x_0"].shape, bool((draws["x_0"][:, 0] == 1.0).all())
        ((1000, 2), True)
    """
    check_callable("program(*args)", program=program)
    check_at_least(1, or_none=True, steps=steps)
    return over(program, lambda: _Advance(steps))


class _Advance(Reparametrised):
    """Puts forward coordinates, and what follows from them, in place of trajectory and x_0."""

    def __init__(self, steps: int | None):
        super().__init__(steps)
        self.placed: dict[int, tuple[Levels, Array]] = {}  # of each draw of a prior

    def put_trajectory(self, msg: Site, reverse: Reverse) -> Array:
        draw, lead = msg["infer"]["prior"], msg["fn"].batch_shape
        by = _of_site(draw, lead)
        name = msg["name"].removesuffix(TRAJECTORY_SUFFIX)  # with the prefix of a scope
        shape, d = (*lead, *reverse.event_shape), math.prod(reverse.event_shape)

        def start(key: Array, x_0: Array) -> Path:
            x = reverse.to_state(x_0)
            return path_of(key, reverse, by, x)

        def noise_of(key: Array, x_0: Array) -> Array:
            noise = start(key, x_0).noise.reshape(-1, *shape)
            return jnp.moveaxis(noise, 0, len(lead))

        law = _Coordinate(name).expand((*lead, d)).to_event(1)
        to_z = Start(name, reverse, lead, None, lambda key, x_0: start(key, x_0).z)
        z = numpyro.sample(f"{draw.name}_coordinates", law, infer={"start": to_z})
        law = dist.Normal(0.0, 1.0).expand((*lead, reverse.n, *reverse.event_shape))
        law = law.to_event(1 + reverse.event_dim)
        infer = {"start": Start(name, reverse, lead, reverse.times, noise_of)}
        noise = numpyro.sample(f"{draw.name}_noise", law, infer=infer)
        of_z = dist.Normal(0.0, 1.0).log_prob(z)
        of_z = of_z if by.known is None else jnp.where(by.is_known, 0.0, of_z)
        density = jnp.sum(of_z, -1) + law.log_prob(noise)
        noise = jnp.moveaxis(noise, len(lead), 0).reshape(reverse.n, *lead, d)
        found = levels(reverse, by, Path(z, noise))
        whole = jnp.moveaxis(found.x, 0, len(lead))
        log_w = ReverseTrajectory(reverse).log_prob(whole) + found.log_volume - density
        self.placed[id(draw)] = found, log_w
        return found.x[0]

    def put_data(self, msg: Site, reverse: Reverse) -> Array:
        draw, law = msg["infer"]["data_of"], unexpanded(msg["fn"])
        if msg["is_observed"]:
            refuse(f"site {msg['name']!r} must not be observed in forward coordinates; give its "
                   "known entries to the prior, prior(known=values, mask=mask)")  # fmt: skip
        found, log_w = self.placed[id(draw)]
        x_0 = reverse.to_data(found.x_0)
        x_0 = x_0 if draw.known is None else jnp.where(draw.mask, draw.known, x_0)
        weight = dist.Unit(log_w + law.log_prob(x_0) + _log_scale(reverse, law.observed))
        infer = {"is_auxiliary": True}
        numpyro.sample(f"{draw.name}_weight", weight, obs=weight.sample(None), infer=infer)
        return x_0


def _log_scale(reverse: Reverse, is_free: Any) -> Array:
    """log |∂x_0/∂x| from the scale of the diffusion to the user's units, of the free entries."""
    log_scale = jnp.broadcast_to(jnp.log(reverse.units.scale), reverse.event_shape)
    log_scale = log_scale if is_free is None else jnp.where(is_free, log_scale, 0.0)
    return jnp.sum(log_scale, tuple(range(-reverse.event_dim, 0)))


def _of_site(draw: PriorDraw, lead: tuple[int, ...]) -> Coordinates:
    """Coordinates at a prior's site, whose known entries are given in the user's units."""
    if draw.known is None:
        return coordinates(draw, None, None)
    shape, d = (*lead, *draw.reverse.event_shape), math.prod(draw.reverse.event_shape)
    is_traced = any(isinstance(a, jax.core.Tracer) for a in (draw.known, draw.mask))
    xp = jnp if is_traced else np
    values = draw.reverse.to_state(xp.where(draw.mask, draw.known, 0))
    known = xp.broadcast_to(xp.asarray(values), shape).reshape(*lead, d)
    rows = xp.broadcast_to(draw.mask, shape).reshape(*lead, d)
    return coordinates(draw, known, rows)


class _Coordinate(dist.Normal):
    """N(0, 1), not to be drawn by `Predictive`: the factor of its site would not count."""

    pytree_aux_fields = ("name",)

    def __init__(self, name: str):
        super().__init__(0.0, 1.0)
        self.name = name

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        if numpyro.get_mask() is False:
            raise ValueError(
                f"prior {self.name!r} in forward coordinates must not be drawn by Predictive, "
                "which counts no factor. Give it posterior draws, or the program as it was"
            )
        return super().sample(key, sample_shape)
