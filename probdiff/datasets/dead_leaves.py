"""Dead leaves: discs that fall on one another until they hide the ground.

Centres are a Poisson process of constant rate in the plane and in time, and radii have the density

    f(r) ∝ r^−3,    r_min ≤ r ≤ r_max,

the one power at which pictures look the same on every scale between the two ends. Each disc has one
grey value, drawn for itself. Seen from below, where the first to fall is in front, the law is the
same and can be drawn exactly: let discs fall until every pixel is hidden. Only those count that may
touch the square of side L through the pixels' centres. The centre of one of radius r then lies in a
square of area

    (L + 2r)² = L² + 4 L r + 4 r²,

so these discs' radii are a mixture of the truncated powers r^−3, r^−2 and r^−1 with the weights
L² ∫r^−3, 4 L ∫r^−2 and 4 ∫r^−1. Nothing is cut off at the border: the law is invariant under shifts
and turns, and a crop has the law of a smaller picture. With γ(h) the mean area that a disc has in
common with itself moved by h, two pixels at distance h show the same disc with probability

    P(h) = γ(h) / (2 γ(0) − γ(h)),

and the covariance of their grey values is P(h) times the variance of one. Pixels on one disc are
equal, so the law has no density: a likelihood needs noise added, and depends on it.

Source: Lee, Mumford and Huang (2001), Occlusion Models for Natural Images; for drawing from the
front, Kendall and Thönnes (1999), Perfect Simulation in Stochastic Geometry.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from probdiff.arguments import POSITIVE, Range, as_array, check_at_least, check_key, check_number

_RADII = Range("lie in [1e-6, 1e18]", lambda r: 1e-6 <= r <= 1e18)
"""Of others the squares are 0 or infinite in float32, and no disc would ever hide the ground."""
_Number = Float[Array, ""] | float
_Greys = Float[Array | np.ndarray, "k"] | None


def dead_leaves(
    key: PRNGKeyArray, n: int, *, size: int, r_min: float = 1.0, r_max: float = 100.0,
    greys: _Greys = None,
) -> Float[Array, "{n} {size} {size}"]:  # fmt: skip
    """Pictures of dead leaves: discs with density of radii ∝ r^−3 on [r_min, r_max].

    A pixel shows the disc over its centre: edges are sharp. Time grows as n size⁴ / r_min²
    where `size` is far above `r_min`. The 2015 paper does not tell its r_min and r_max.

    Args:
        key: Random key.
        n: Number of pictures, at least 1.
        size: Pixels a side, at least 1.
        r_min: Smallest radius in pixels, positive.
        r_max: Largest radius in pixels, above `r_min`.
        greys: Grey values, all equally likely; if absent, a value uniform on [0, 1).

    Example:
        >>> x = datasets.dead_leaves(jax.random.key(0), 200, size=16, r_min=2.0)
        >>> x.shape, round(float(x.mean()), 1)
        ((200, 16, 16), 0.5)
        >>> same = (x[:, :, 1:] == x[:, :, :-1]).mean()  # neighbours on one disc
        >>> round(float(same), 1)
        0.8
    """
    check_key(key)
    check_at_least(1, n=n, size=size)
    check_number(POSITIVE, r_min=r_min, r_max=r_max)
    check_number(_RADII, r_min=r_min, r_max=r_max)
    if r_max <= r_min:
        raise ValueError(f"r_max must be finite and above r_min = {r_min}; got {r_max}")
    if greys is not None:
        greys = as_array("greys", greys, "k", is_finite=True)
        if not len(greys):
            raise ValueError("greys must be at least one number; got none")
    return _pictures(key, float(r_min), float(r_max), greys, n=n, size=size)


@partial(jax.jit, static_argnames=("n", "size"))
def _pictures(
    key: PRNGKeyArray, r_min: _Number, r_max: _Number, greys: _Greys, *, n: int, size: int
) -> Float[Array, "{n} {size} {size}"]:
    """All pictures at once, disc by disc from the front, until the last pixel is hidden."""
    pixel = jnp.arange(size, dtype=float)

    def fall(state):
        key, pictures, bare = state
        key, key_leaf, key_grey = jax.random.split(key, 3)
        radius, *centre = _leaves(key_leaf, n, span=float(size - 1), r_min=r_min, r_max=r_max)
        down, right = ((pixel - place[:, None]) ** 2 for place in centre)
        inside = down[:, :, None] + right[:, None, :] <= radius[:, None, None] ** 2
        if greys is None:
            grey = jax.random.uniform(key_grey, (n, 1, 1))
        else:
            grey = jax.random.choice(key_grey, jnp.asarray(greys, dtype=float), (n, 1, 1))
        return key, jnp.where(inside & bare, grey, pictures), bare & ~inside

    start = key, jnp.zeros((n, size, size)), jnp.ones((n, size, size), dtype=bool)
    return jax.lax.while_loop(lambda state: state[2].any(), fall, start)[1]


def _leaves(
    key: PRNGKeyArray, n: int, *, span: float, r_min: _Number, r_max: _Number
) -> tuple[Float[Array, "{n}"], Float[Array, "{n}"], Float[Array, "{n}"]]:
    """Radii and centres (row, column) of discs whose bounding squares touch [0, span]²."""
    key_power, key_radius, key_row, key_column = jax.random.split(key, 4)
    integrals = [(r_min**-2 - r_max**-2) / 2, 1 / r_min - 1 / r_max, jnp.log(r_max / r_min)]
    weights = jnp.array([span**2, 4 * span, 4]) * jnp.array(integrals)
    power = jax.random.categorical(key_power, jnp.log(weights), shape=(n,))
    u = jax.random.uniform(key_radius, (n,))
    quantiles = [
        ((1 - u) * r_min**-2 + u * r_max**-2) ** -0.5,  # of r^−3
        1 / ((1 - u) / r_min + u / r_max),  # of r^−2
        r_min * (r_max / r_min) ** u,  # of r^−1
    ]
    radius = jnp.choose(power, quantiles, mode="clip")
    row, column = (
        jax.random.uniform(k, (n,)) * (span + 2 * radius) - radius for k in (key_row, key_column)
    )
    return radius, row, column
