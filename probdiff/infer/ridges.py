"""The integral of r against a Gaussian where log r is a sum of functions of one direction each.

Most likelihoods are of elements, log r(x) = Σ_i ℓ_i(x), and each depends on x through one number
z_i = a_i·x: a measurement of a linear map, whatever its noise, a count of a rate exp(a_i·x), a
logistic regression. These ridge functions are found before a run, with their directions a_i, and
ℓ_i is put on a table, denser towards its peak c,

    z = c + b sinh(u),    u evenly spread,    b the distance at which ℓ_i is half a nat lower.

For x_0 ~ N(m, C) the numbers z are N(A m, S), S = A C Aᵀ. Expectation propagation puts Gaussian
sites s̃_i exp(ν_i z_i − ½ τ_i z_i²) in the place of e^{ℓ_i}, one after another, each such that with
the others as they are (the cavity, one Gaussian of z_i) it has the integral, the mean and the
variance of e^{ℓ_i}, which are integrals over one number. Then

    log ∫ r N(m, C) ≈ Σ log s̃_i + log ∫ exp(Σ ν_i z_i − ½ τ_i z_i²) N(z; A m, S)
    E[x_0 | r] ≈ m + C Aᵀ (ν − τ E[z | r]).

Up to the quadrature, a few thousandths of a nat, it is exact for one direction, and for Gaussian r;
a hundredth where a sharp r and the belief are ten standard deviations apart. What has tails or
several peaks is covered as a whole: a curvature at one point of it would say nothing. A site whose
variance would be above that of its cavity gets none, τ = 0, and moves the mean alone.

Arrays lead with sites and nodes; particles and systems, P and B, come last.

Sources: Minka (2001); Rasmussen and Williams (2006), section 3.6, for sites of one direction.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from probdiff.infer.quadratic import Expansion, eigh

LIMIT = 8
"""Elements of log r up to which sites are fitted: the work grows with their cube."""

_SWEEPS = 3  # over all sites, the first of them undamped
_DAMPING = 0.7  # share of its way that a site goes after the first sweep
_REACH = 12.0  # standard deviations of the prior that a table covers on each side of its peak
_NODES, _FINER = 49, 32  # of the table that are summed over; how much denser it is in between
_STRIDE, _STEPS = 0.75, 8  # nodes about a cavity, in its standard deviations, and on each side
_BATCH = 4096  # values of r that are computed at once for a table, over all systems
_ZOOMS = 5  # narrower scans for a peak, each of a sixteenth of the width
_PARALLEL = 1e-4  # 1 − cos² of two gradients below which they are of one direction
_LEAST = -1e4  # ℓ where r is 0
_NARROWEST = 1e-3  # of a cavity, in widths: where z is known there is no rounding to be divided by


class Ridges(NamedTuple):
    """The elements of log r as functions of one number each."""

    directions: Float[Array, "m B d"]  # a_i, of length 1; 0 for an element without x_0
    peak: Float[Array, "m B"]  # c
    width: Float[Array, "m B"]  # b
    spacing: Float[Array, "m B"]  # of u on the table that is summed over
    table: Float[Array, "k m B"]  # ℓ_i there and in between, nats

    def at(self, i: Array | int) -> "Ridges":
        """One of the elements."""
        return Ridges(*(a[i] for a in self[:4]), self.table[:, i])

    @property
    def nodes(self) -> Float[Array, "n ..."]:
        """z at the nodes that are summed over."""
        u = jnp.arange(_NODES) - (_NODES - 1) / 2
        u = u.reshape(-1, *[1] * self.peak.ndim) * self.spacing
        return self.peak + self.width * jnp.sinh(u)

    def value(self, z: Float[Array, "n P B"]) -> Float[Array, "n P B"]:
        """ℓ_i of one element, between the entries of its table linear in u."""
        u = jnp.arcsinh((z - self.peak) / self.width) / self.spacing + (_NODES - 1) / 2
        place = jnp.clip(u * _FINER, 0.0, len(self.table) - 1.0)
        low = jnp.minimum(place.astype(int), len(self.table) - 2)
        share = place - low
        pick = jax.vmap(lambda row, index: row[index], (-1, -1), -1)
        return (1 - share) * pick(self.table, low) + share * pick(self.table, low + 1)


class Fit(NamedTuple):
    """What expectation propagation finds."""

    log_integral: Float[Array, "P B"]  # log ∫ r N(m, C)
    pull: Float[Array, "m P B"]  # ν − τ E[z | r], so that E[x_0 | r] = m + C Aᵀ pull
    precision: Float[Array, "m P B"]  # τ

    def factors(
        self, a: Float[Array, "m B d"], S: Float[Array, "m m *particles B"]
    ) -> tuple[Float[Array, "m P B"], Float[Array, "m P B d"]]:
        """Eigenvalues of H C, H = Σ τ_i a_i a_iᵀ, and rows f along them with H = Σ f fᵀ."""
        root = jnp.sqrt(self.precision)
        S = S if S.ndim == 4 else S[:, :, None]
        values, rotation = eigh(root[:, None] * root[None] * S)
        return jnp.maximum(values, 0.0), jnp.einsum("mkpb,mpb,mbd->kpbd", rotation, root, a)


def directions(
    log_elements: Callable[[Array], Array], points: Float[Array, "p B d"]
) -> tuple[Float[Array, "m B d"], Bool[Array, ""]]:
    """Directions of the elements of log r, and whether each has one, the same at all points.

    Not where r is 0 at all of them.
    """
    values, pull_back = jax.vjp(log_elements, points)
    one = jnp.eye(values.shape[-1], dtype=values.dtype)
    slopes = jax.vmap(lambda v: pull_back(jnp.broadcast_to(v, values.shape))[0])(one)
    slopes = jnp.where(jnp.isfinite(slopes), slopes, 0.0)  # (m, p, B, d)
    square = jnp.sum(slopes**2, -1)
    steepest = jnp.argmax(square, 1)[:, None, :, None]
    a = jnp.take_along_axis(slopes, steepest, 1)[:, 0]
    length = jnp.linalg.norm(a, axis=-1, keepdims=True)
    a = jnp.where(length > 0, a / jnp.where(length > 0, length, 1.0), 0.0)
    off = square - jnp.sum(slopes * a[:, None], -1) ** 2
    is_ever = jnp.any(jnp.isfinite(jnp.sum(values, -1)))
    return a, jnp.all(off <= _PARALLEL * square) & is_ever


def tabulate(
    log_elements: Callable[[Array], Array], a: Float[Array, "m B d"], mean: Array, sd: Array
) -> Ridges:
    """Tables of ℓ_i over ± 12 standard deviations of a prior N(mean, sd²)."""
    middle = jnp.sum(a * mean, -1)
    reach = _REACH * jnp.sqrt(jnp.sum((a * sd) ** 2, -1))
    reach = jnp.where(reach > 0, reach, 1.0)

    def along(z: Float[Array, "n m B"]) -> Float[Array, "n m B"]:
        """ℓ_i at z_i."""

        def of_one(row: tuple[Array, Array]) -> Array:
            i, z = row
            x = mean + (z - middle[i])[..., None] * a[i]
            value = log_elements(x[None])[0, :, i]
            return jnp.where(jnp.isfinite(value), jnp.maximum(value, _LEAST), _LEAST)

        rows = jnp.tile(jnp.arange(len(a)), len(z)), z.reshape(-1, *z.shape[2:])
        return jax.lax.map(of_one, rows, batch_size=max(1, _BATCH // a.shape[1])).reshape(z.shape)

    grid = jnp.linspace(-1.0, 1.0, 2 * 16 * int(_REACH) + 1)[:, None, None]

    def zoom(i: Array, peak: Array) -> Array:
        z = peak + reach * 16.0**-i * grid
        prior = -0.5 * ((z - middle) * _REACH / (3 * reach)) ** 2  # so that there is a peak
        best = jnp.argmax(along(z) + prior, 0)
        return jnp.take_along_axis(z, best[None], 0)[0]

    peak = jax.lax.fori_loop(0, _ZOOMS, zoom, middle)
    top = along(peak[None])[0]
    distances = reach * jnp.exp2(-jnp.arange(60) / 3)[:, None, None]
    both = jnp.concatenate([peak + distances, peak - distances])
    drop = jnp.max((top - along(both)).reshape(2, *distances.shape[:1], *peak.shape), 0)
    width = jnp.min(jnp.where(drop >= 0.5, distances, reach / 3), 0)
    spacing = 2 * jnp.arcsinh(2 * reach / width) / (_NODES - 1)
    found = Ridges(a, peak, width, spacing, jnp.zeros((0, *peak.shape)))
    count = (_NODES - 1) * _FINER + 1
    u = (jnp.arange(count) - (count - 1) / 2)[:, None, None] / _FINER * spacing
    return found._replace(table=along(peak + width * jnp.sinh(u)))


def integrate(
    ridges: Ridges, point: Float[Array, "P B d"], sd: Array
) -> tuple[Float[Array, "P B"], Expansion]:
    """log ∫ r N(point, sd²), and the Gaussian that stands for r there."""
    a, variance = ridges.directions, jnp.broadcast_to(sd**2, jnp.shape(sd)[:-1] + point.shape[-1:])
    spread = jnp.einsum("mbd,nbd,...d->mn...b" if variance.ndim < 2 else
                        "mbd,nbd,...bd->mn...b", a, a, variance)  # fmt: skip
    fit = propagate(ridges, jnp.einsum("mbd,pbd->mpb", a, point), spread)
    sizes, rows = fit.factors(a, spread)
    rows = jnp.where(sd > 0, rows, 0.0)  # a known entry has no direction
    pull, none = jnp.einsum("mpb,mbd->pbd", fit.pull, a), jnp.zeros_like(point)
    return fit.log_integral, Expansion(jnp.sum(jnp.log1p(sizes), 0), pull, none, rows, sizes)


def propagate(
    ridges: Ridges, mean: Float[Array, "m P B"], S: Float[Array, "m m *particles B"]
) -> Fit:
    """Fit sites to r under z ~ N(mean, S)."""
    m, shape = len(mean), mean.shape[1:]
    S = jnp.broadcast_to(S if S.ndim == 4 else S[:, :, None], (m, m, *shape))
    zeros = jnp.zeros_like(mean)
    state = _State(zeros, S, zeros, zeros, zeros, jnp.zeros(shape, mean.dtype))

    def visit(count: Array, state: _State) -> _State:
        share = jnp.where(count < m, 1.0, _DAMPING)
        return _visit(ridges, mean, state, count % m, share)

    state = jax.lax.fori_loop(0, m * _SWEEPS, visit, state)
    total = jnp.sum(state.log_scale, 0) + state.log_gaussian
    return Fit(total, state.nu - state.tau * state.mean, state.tau)


class _State(NamedTuple):
    """Sites, and the Gaussian that they make of the belief; numbers z less its mean."""

    mean: Float[Array, "m P B"]
    covariance: Float[Array, "m m P B"]
    nu: Float[Array, "m P B"]
    tau: Float[Array, "m P B"]
    log_scale: Float[Array, "m P B"]  # log s̃
    log_gaussian: Float[Array, "P B"]  # log ∫ exp(Σ ν z − ½ τ z²) N(z; 0, S)


def _visit(ridges: Ridges, middle: Array, state: _State, i: Array, share: Array) -> _State:
    """Fit one site anew, and go a share of the way to it."""
    tau, nu, row = state.tau[i], state.nu[i], state.covariance[i]
    mean, variance = state.mean[i], jnp.maximum(row[i], (_NARROWEST * ridges.width[i]) ** 2)
    left = jnp.maximum(1 - tau * variance, 1e-6)  # of the precision, for the cavity
    cavity, cavity_mean = variance / left, (mean - variance * nu) / left
    log_z, step, shrunk = tilted(ridges.at(i), middle[i] + cavity_mean, jnp.sqrt(cavity))
    new_tau = jnp.maximum(1 / shrunk - 1, 0.0) / cavity
    new_nu = new_tau * (cavity_mean + jnp.sqrt(cavity) * step) + step / jnp.sqrt(cavity)
    d_tau, d_nu = share * (new_tau - tau), share * (new_nu - nu)
    tau, nu = tau + d_tau, nu + d_nu
    log_scale = log_z - _log_mean(cavity_mean, cavity, nu, tau)
    change = 1 / jnp.maximum(1 + d_tau * variance, 1e-6)
    moved = state.mean + row * (d_nu - d_tau * mean) * change
    covariance = state.covariance - d_tau * change * row[:, None] * row[None]
    covariance = covariance.at[i].set(row * change).at[:, i].set(row * change)
    return _State(
        moved, covariance, state.nu.at[i].set(nu), state.tau.at[i].set(tau),
        state.log_scale.at[i].set(log_scale),
        state.log_gaussian + _log_mean(mean, variance, d_nu, d_tau),
    )  # fmt: skip


def _log_mean(mean: Array, variance: Array, nu: Array, tau: Array) -> Array:
    """log E[exp(ν z − ½ τ z²)] of z ~ N(mean, variance)."""
    whole = jnp.maximum(1 + tau * variance, 1e-6)
    return (nu * mean + 0.5 * variance * nu**2 - 0.5 * tau * mean**2) / whole - 0.5 * jnp.log(whole)


def tilted(
    ridge: Ridges, mean: Float[Array, "P B"], sd: Float[Array, "P B"]
) -> tuple[Float[Array, "P B"], Float[Array, "P B"], Float[Array, "P B"]]:
    """log ∫ e^ℓ N(mean, sd²) of one element; the mean's move in sd and the variance in sd² there.

    By the trapezoid rule twice: over the table, which is dense at the peak of ℓ, and over nodes
    about the mean. They share out the integrand by the fourth powers of their densities.
    """
    near = jnp.arange(-_STEPS, _STEPS + 1)[:, None, None] * _STRIDE
    nodes, points = ridge.nodes[:, None], mean + sd * near
    far = (nodes - mean) / sd
    log_far = ridge.table[::_FINER, None] - 0.5 * far**2
    log_near = ridge.value(points) - 0.5 * near**2
    top = jnp.maximum(jnp.max(log_far, 0), jnp.max(log_near, 0))

    def densities(z: Array, v: Array) -> tuple[Array, Array]:
        """Nodes in a standard deviation, of the table and about the mean, whose last count less."""
        of_table = jax.lax.rsqrt(ridge.width**2 + (z - ridge.peak) ** 2) / ridge.spacing
        return sd * of_table, 1 / (_STRIDE * (1 + (v / 5) ** 8))

    def moments(log_p: Array, v: Array, weight: Array) -> Array:
        w = jnp.exp(log_p - top) * weight
        return jnp.stack([jnp.sum(w, 0), jnp.sum(w * v, 0), jnp.sum(w * v**2, 0)])

    of_table, of_near = densities(nodes, far)
    total = moments(log_far, far, of_table**3 / (of_table**4 + of_near**4))
    of_table, of_near = densities(points, near)
    share = of_near**4 / (of_table**4 + of_near**4)
    mass, first, second = total + moments(log_near, near, _STRIDE * share)
    step = first / mass
    return top + jnp.log(mass) - 0.5 * math.log(2 * math.pi), step, second / mass - step**2
