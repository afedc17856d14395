"""`SMC`: the posterior of x_0 under a program, exact as particles grow, with its evidence.

R independent runs of N particles each walk the reverse chain as `particles` says. Their draws are
pooled with weights in proportion to each run's Ẑ, so that the pooled estimate is that of one larger
importance sample, and

    log Z ≈ log (1/R) Σ_r Ẑ_r,    se = sd(Ẑ_r) / (√R · mean(Ẑ_r)),

with Student-t intervals of R − 1 degrees of freedom. Z is the evidence of the chain that was walked:
of all T steps, or of the n-step chain where `steps=n`.

Source: Sohl-Dickstein et al. (2015), section 2.5, for conditioning by r; Del Moral et al. (2006).
"""

import math
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from probdiff.infer.program import Program
from probdiff.infer.twists import LaplaceTwist, Twist
from probdiff.infer.walk import Walk


class SMC:
    """Twisted sequential Monte Carlo: weighted draws of the posterior of x_0 and its evidence."""

    def __init__(
        self,
        program: Program,
        *,
        num_particles: int = 256,
        num_runs: int = 4,
        twist: Twist | None = None,
        steps: int | None = None,
        ess_threshold: float = 0.5,
        block_size: int = 4096,
        mesh: Mesh | None = None,
        progress: bool = False,
    ):
        if not 0 <= ess_threshold <= 1:
            raise ValueError(f"ess_threshold must lie in [0, 1]; got {ess_threshold}")
        self.progress = progress
        self.walk = Walk(
            program, LaplaceTwist() if twist is None else twist, num_particles=num_particles,
            num_runs=num_runs, steps=steps, threshold=ess_threshold, block_size=block_size,
            mesh=mesh,
        )  # fmt: skip

    def run(self, key: Array, *args: Any, **kwargs: Any) -> None:
        self.outcome = self.walk(key, args, kwargs, self.progress)

    @property
    def log_evidence(self) -> Any:
        z = self.outcome.log_evidences
        top = z.max(0)
        return top + np.log(np.mean(np.exp(z - top), 0))

    @property
    def log_evidence_se(self) -> Any:
        z = self.outcome.log_evidences
        ratio = np.exp(z - z.max(0))
        return ratio.std(0, ddof=1) / math.sqrt(len(z)) / ratio.mean(0)
