"""Names and sizes of what a sampler returns: dims of every site, levels, network calls.

Axes are named by the program's own plates; axes without one are `site_dim_i`, as in ArviZ. A plate
over the prior that would take a name of ArviZ's or ours becomes `name_plate`.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from probdiff.infer.levels import Levels, levels
from probdiff.infer.program import Conditioned
from probdiff.infer.twists import KernelTwist, ReadoutTwist, TweedieTwist, Twist
from probdiff.kernels import DiscreteKernel
from probdiff.readouts import GaussianReadout, Tied

TAKEN = {"chain", "draw", "level", "run"}


class Layout(NamedTuple):
    """A program's names and sizes."""

    name: str
    """Site of x_0."""
    T: int
    """Steps of the diffusion."""
    times: np.ndarray
    """t of each level that is walked, and 0 for the data, ascending, `(n + 1,)`."""
    is_discrete: bool
    """Whether x_0 are symbols."""
    plates: tuple[str, ...]
    """Plates around the prior."""
    dims: dict[str, list[str]]
    """Dims of each site's value."""
    batch_dims: dict[str, list[str]]
    """Dims of each observed site's log density."""
    calls: int
    """Network calls of one particle, each product with the Jacobian counted as one."""
    note: str = ""
    """What else must be said of the diffusion that is walked."""
    has_covariance: bool = False
    """Whether the prior was told the covariance of the data."""


def layout(conditioned: Conditioned, steps: int | None, twist: Twist) -> Layout:
    """Names and sizes of a program; traced values do not enter."""
    draw = conditioned.draw
    diffusion, batch_shape = draw.diffusion, conditioned.batch_shape
    sites = conditioned.sites_at(
        jnp.zeros((*batch_shape, *diffusion.event_shape), diffusion.kernel.dtype)
    )
    plates = plate_dims(sites[diffusion.trajectory_name], "plate", batch_shape)
    events = [f"{diffusion.name}_dim_{i}" for i in range(len(diffusion.event_shape))]
    dims, batch_dims = {diffusion.name: [*plates, *events]}, {}
    for name in conditioned.observed:
        law, value = sites[name]["fn"], sites[name]["value"]
        shape = jnp.broadcast_shapes(law.shape(), jnp.shape(value))
        first = len(shape) - law.event_dim
        batch_dims[name] = plate_dims(sites[name], name, shape[:first])
        dims[name] = batch_dims[name] + numbered(name, first, len(shape))
    for name, site in sites.items():
        if site["type"] == "deterministic" and name != diffusion.name:
            dims[name] = _deterministic_dims(site, plates, batch_shape)
    walked = levels(draw, steps)
    is_discrete = isinstance(diffusion.kernel, DiscreteKernel)
    size = math.prod(diffusion.event_shape)
    per_level = 1 if is_discrete else 1 + _products(twist, size, conditioned)
    last = 0 if isinstance(diffusion.last_step, Tied) else 1
    return Layout(
        diffusion.name, diffusion.T, np.concatenate([[0], walked.times]), is_discrete,
        tuple(plates), dims, batch_dims,
        per_level * (walked.n - 1) + last, _note(walked), draw.covariance is not None,
    )  # fmt: skip


def _note(walked: Levels) -> str:
    """A learned variance has no value for the longer steps of a shorter diffusion."""
    readout = walked.draw.trajectory.readout
    loses_variance = (
        isinstance(readout, GaussianReadout)
        and readout.fixed_variance(longer=False) is None
        and readout.fixed_variance(longer=True) is not None
    )
    if not (loses_variance and walked.is_respaced):
        return ""
    return (
        f"steps={walked.n} has no learned variance, which belongs to T steps: the bridge's is used"
    )


def _products(twist: Twist, size: int, conditioned: Conditioned) -> int:
    """Products with the network's Jacobian per level; one for twists that are not ours."""
    is_known_alone = conditioned.draw.known is not None and not conditioned.observed
    if isinstance(twist, KernelTwist) or (isinstance(twist, ReadoutTwist) and is_known_alone):
        return 0
    return min(twist.rank, size) if isinstance(twist, TweedieTwist) else 1


def plate_dims(site: dict[str, Any], name: str, batch_shape: tuple[int, ...]) -> list[str]:
    """Plates that make the axes of a site's batch."""
    frames = {frame.dim: _free(frame.name) for frame in site["cond_indep_stack"]}
    count = len(batch_shape)
    return [frames.get(axis - count, f"{name}_dim_{axis}") for axis in range(count)]


def _deterministic_dims(
    site: dict[str, Any], plates: list[str], batch_shape: tuple[int, ...]
) -> list[str]:
    """Plates in front where the value has their shape; what else it has is not known."""
    shape, count = np.shape(site["value"]), len(plates)
    own = {_free(frame.name) for frame in site["cond_indep_stack"]}
    is_inside = own >= set(plates) and shape[:count] == batch_shape
    first = count if is_inside else 0
    return plates[:first] + numbered(site["name"], first, len(shape))


def numbered(name: str, first: int, last: int) -> list[str]:
    return [f"{name}_dim_{axis}" for axis in range(first, last)]


def _free(plate: str) -> str:
    return f"{plate}_plate" if plate in TAKEN else plate
