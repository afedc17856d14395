"""Hamiltonian moves of whole trajectories in forward coordinates.

The posterior of a program over (z, ε) has the density w(z, ε) r(x_0) ∏ N(ε_t; 0, I). With
U = −log w − log r − log |∂x/∂z| and momenta p_z, p_ε ~ N(0, I), one leapfrog step of size h is

    half a kick    p_z −= h/2 ∂U/∂z,    p_ε −= h/2 ∂U/∂ε
    drift          z += h p_z
    rotation       (ε, p_ε) by the angle h, which solves the flow of ½|ε|² + ½|p_ε|² exactly
    half a kick,

so that where the network says all there is of ε (U constant) no error is made of it, however many
levels there are. The move is accepted with probability min(1, e^−ΔH), H = U + ½|ε|² + ½|p|², and
leaves the posterior as it is. A step costs one network call and one pull-back for each level.

Each chain of each system moves by itself; step sizes are a system's, for all its chains.

Sources: Duane et al. (1987); Shahbaba et al. (2014) for splitting off a Gaussian part.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from probdiff.infer.coordinates import Coordinates, Path, levels
from probdiff.infer.spread import Problem
from probdiff.trajectories import ReverseTrajectory

_JITTER = 0.2  # share by which a move's step size varies: a rotation by 2π leads nowhere


class Point(NamedTuple):
    """A chain's place, with what was computed there."""

    path: Path
    log_density: Float[Array, "C B"]  # −U
    gradient: Path


def log_density(
    problem: Problem, by: Coordinates, log_r: Callable[[Array], Array], path: Path
) -> Float[Array, "C B"]:
    """log w + log r + log |∂x/∂z|, without the N(ε; 0, I): −U.

    Where x_0 is on a grid it is x_1's, with the mass of the known entries.
    """
    reverse = problem.reverse.relative()
    found, lead = levels(reverse, by, path), path.z.shape[:-1]
    x = found.x.reshape(reverse.n, len(path.z), *problem.conditioned.batch_shape,
                        *reverse.event_shape)  # fmt: skip
    whole = jnp.moveaxis(x, 0, x.ndim - 1 - reverse.event_dim)
    value = ReverseTrajectory(reverse).log_prob(whole).reshape(lead) + found.log_volume
    x_1, start = x[0], problem.shaped(found.x_0.reshape(*lead, -1))
    if reverse.grid is None:
        law = reverse.data(x_1)
        log_scale = jnp.broadcast_to(jnp.log(reverse.units.scale), reverse.event_shape)
        mask = jnp.ones((), bool) if problem.draw.mask is None else ~jnp.asarray(problem.draw.mask)
        axes = tuple(range(-reverse.event_dim, 0))
        log_scale = jnp.sum(jnp.where(mask, log_scale, 0.0) + jnp.zeros(reverse.event_shape), axes)
        log_p = law.log_prob(reverse.units.to_data(start)) + log_scale
        return value + log_p.reshape(lead) + log_r(by.x(path.z))
    if problem.known is None:
        return value
    law = reverse.data(x_1, problem.draw.mask)
    known = reverse.to_data(problem.shaped(problem.known[None])[0])
    return value + law.log_prob(known).reshape(lead)


def at(density: Callable[[Path], Array], path: Path) -> Point:
    """Value and gradient of −U at a path."""

    def total(path: Path) -> tuple[Array, Array]:
        value = density(path)
        return jnp.sum(value), value

    gradient, value = jax.grad(total, has_aux=True)(path)
    return Point(path, value, gradient)


def move(
    key: Array, density: Callable[[Path], Array], point: Point, step: Float[Array, " B"], count: int
) -> tuple[Point, Float[Array, "C B"]]:
    """One move of `count` leapfrog steps of every chain, and its probability of acceptance."""
    key_z, key_noise, key_accept, key_step = jax.random.split(key, 4)
    lead = point.log_density.shape
    h = step * jax.random.uniform(key_step, lead, minval=1 - _JITTER, maxval=1 + _JITTER)
    z, noise = point.path
    momentum = Path(jax.random.normal(key_z, z.shape), jax.random.normal(key_noise, noise.shape))
    by = h[..., None]
    cos, sin = jnp.cos(by), jnp.sin(by)

    def kick(momentum: Path, gradient: Path) -> Path:
        return jax.tree.map(lambda p, g: p + 0.5 * by * g, momentum, gradient)

    def leap(_: Array, carry: tuple[Point, Path]) -> tuple[Point, Path]:
        point, momentum = carry
        p_z, p = kick(momentum, point.gradient)
        z, noise = point.path
        path = Path(z + by * p_z, cos * noise + sin * p)
        point = at(density, path)
        return point, kick(Path(p_z, cos * p - sin * noise), point.gradient)

    there, momentum_there = jax.lax.fori_loop(0, count, leap, (point, momentum))
    gain = _log_joint(there, momentum_there) - _log_joint(point, momentum)
    share = jnp.exp(jnp.minimum(jnp.where(jnp.isnan(gain), -jnp.inf, gain), 0.0))
    is_accepted = jax.random.uniform(key_accept, lead) < share
    return _where(is_accepted, there, point), share


def _log_joint(point: Point, momentum: Path) -> Array:
    """−H."""
    noise = jnp.sum(point.path.noise**2, (0, -1))
    return point.log_density - 0.5 * (
        noise + jnp.sum(momentum.z**2, -1) + jnp.sum(momentum.noise**2, (0, -1))
    )


def _where(is_so: Array, there: Point, otherwise: Point) -> Point:
    def pick(a: Array, b: Array) -> Array:
        if a.ndim == is_so.ndim:
            return jnp.where(is_so, a, b)
        return jnp.where(is_so[..., None], a, b)  # noise has its levels in front

    return jax.tree.map(pick, there, otherwise)
