"""A known linear-Gaussian likelihood, whose curvature is given and not looked for."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from probdiff.infer.expansion import Expansion, Local, known_curvature
from probdiff.infer.twists.base import View
from probdiff.infer.twists.widened import Widened
from probdiff.prior import PriorDraw


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianTwist(Widened):
    """∫ r N(x̂_0, w_t I) for y = A x_0 + noise with a known map and noise: the exact integral.

    Where w_t differs between entries, or some are known, its mean over them stands for all. Where
    the prior has the covariance Σ of the data, Σ (I + ᾱ_t/(1−ᾱ_t) Σ)⁻¹ takes the place of w_t I.

    Args:
        matrix: A, `(m, d)`, acting on x_0 in the user's units, flattened to d numbers.
        noise: Standard deviation σ of each measurement, positive, in the units of y; a number or
            `(m,)`.

    Raises:
        ValueError: if the matrix is not finite or not `(m, d)`, or the noise is not positive.

    Example:
        One sum y = x_1 + x_2 + ε measured of two numbers N(0, 1), ε of standard deviation ½:

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from probdiff import Diffusion, GaussianKernel, infer, schedules
        >>> def network(x_t, t):  # x_0 ~ N(0, I)
        ...     return jnp.zeros((len(x_t), 4))
        >>> diffusion = Diffusion(GaussianKernel(), schedules.cosine(10), network, event_shape=(2,))
        >>> prior = diffusion.prior({})
        >>> def program(y):
        ...     numpyro.sample("y", dist.Normal(prior().sum(-1), 0.5), obs=y)
        >>> twist = infer.GaussianTwist(matrix=[[1.0, 1.0]], noise=0.5)
        >>> smc = infer.SMC(program, num_particles=1000, twist=twist)
        >>> smc.run(jax.random.key(0), y=1.8)
        >>> [round(float(m), 1) for m in smc.get_samples()["x_0"].mean(0)]  # y/(2 + ¼) each
        [0.8, 0.8]
        >>> smc.log_evidence_se < 0.01  # every particle has nearly the same weight
        True

    Source: Song et al. (2023).
    """

    matrix: Any
    noise: Any
    uses_covariance = True

    def __post_init__(self) -> None:
        matrix, noise = np.asarray(self.matrix, np.float64), np.asarray(self.noise, np.float64)
        if matrix.ndim != 2:
            raise ValueError(f"matrix must have shape (m, d); got shape {matrix.shape}")
        if not np.isfinite(matrix).all():
            raise ValueError("matrix must be finite; got values that are not")
        if noise.shape not in ((), (len(matrix),)) or not (noise > 0).all():
            raise ValueError(
                f"noise must be positive, a number or one for each of {len(matrix)} measurements; "
                f"got {self.noise}"
            )

    def check(self, draw: PriorDraw) -> None:
        """Raise a `ValueError` unless A has a column for each number of x_0."""
        size = int(np.prod(draw.diffusion.event_shape))
        if np.shape(self.matrix)[1] != size:
            raise ValueError(
                f"matrix must have {size} columns, one for each number of x_0; got shape "
                f"{np.shape(self.matrix)}"
            )

    def expand(self, at: Local, sd: Any, view: View) -> Expansion:
        """By the eigenvectors of Aᵀ A / noise²."""
        diffusion = view.levels.draw.diffusion
        scale = np.broadcast_to(diffusion.scale, diffusion.event_shape).reshape(-1)
        noise = np.broadcast_to(self.noise, len(self.matrix))[:, None]
        whitened = np.asarray(self.matrix, np.float64) * scale / noise
        _, roots, rows = np.linalg.svd(whitened, full_matrices=False)
        dtype = at.gradient.dtype
        vectors = jnp.asarray(rows.reshape(-1, *diffusion.event_shape), dtype)
        width = jnp.mean(sd**2, axis=tuple(range(-view.levels.event_dim, 0)))
        return known_curvature(at, width, jnp.asarray(roots**2, dtype), vectors)
