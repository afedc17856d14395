"""`SMC`: the posterior of x_0 under a program, exact as particles grow, with its evidence.

R independent runs of N particles each walk the reverse chain as `particles` says. Their draws are
pooled with weights in proportion to each run's Ẑ, so that the pooled estimate is that of one larger
importance sample, and

    log Z ≈ log (1/R) Σ_r Ẑ_r,    se = sd(Ẑ_r) / (√R · mean(Ẑ_r)),

with Student-t intervals of R − 1 degrees of freedom. Z is the evidence of the chain that was
walked: of all T steps, or of the n-step chain where `steps=n`; known entries of x_0 count in it.

Source: Sohl-Dickstein et al. (2015), section 2.5, for conditioning by r; Del Moral et al. (2006).
"""

from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from scipy import stats

from probdiff.infer import results, summary
from probdiff.infer.program import Program
from probdiff.infer.sampler import Sampler
from probdiff.infer.twists import LaplaceTwist, Twist
from probdiff.infer.walk import Walk


class SMC(Sampler):
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
        """Prepare the sampler of a program.

        Args:
            program: Any NumPyro program with one `prior()` and observed sites or factors below it.
            num_particles: Particles N of one run. What a posterior needs, a run must hold: more
                runs do not help where one of them collapses.
            num_runs: Independent runs R, between which errors are told; with one of them
                `log_evidence_se` is nan.
            twist: Guess of E[r(x_0) | x_t], `LaplaceTwist()` if absent; `ReadoutTwist()` where
                many entries are known exactly and the readout is a `Mixture`. Chains of symbols
                have one of their own.
            steps: Number n in 2..T of levels to walk, another model than the T-step chain; T if
                absent.
            ess_threshold: Share of N in [0, 1] below which the effective number calls for
                resampling; 0 for never.
            block_size: Particles, times entries of the plates, that the network sees at once.
            mesh: Devices that share out the runs.
            progress: Show a bar.

        Raises:
            ValueError: if an argument is out of range.
        """
        if not 0 <= ess_threshold <= 1:
            raise ValueError(f"ess_threshold must lie in [0, 1]; got {ess_threshold}")
        self.progress = progress
        self._walk = Walk(
            program, LaplaceTwist() if twist is None else twist, num_particles=num_particles,
            num_runs=num_runs, steps=steps, is_weighted=True, threshold=ess_threshold,
            block_size=block_size, mesh=mesh,
        )  # fmt: skip

    def run(self, key: Array, *args: Any, **kwargs: Any) -> None:
        """Sample the posterior of the program at these arguments.

        Arrays among the arguments may change from run to run without compiling anew; all else must
        be hashable.

        Args:
            key: Randomness; entry b of the prior's plates uses `fold_in(key, b)`.
            *args: Arguments of the program.
            **kwargs: Keyword arguments of the program.

        Raises:
            ValueError: if the program is not one prior with observed sites inside its plates, or
                the twist does not fit.
        """
        self._result = results.run(self._walk, key, args, kwargs, self.progress)
        results.warn(self._result.complaints)

    def _lines(self, limit: int) -> list[str]:
        low, high = self.log_evidence_interval()
        values = map(np.asarray, (self.log_evidence, low, high))
        return [
            *summary.evidence(*values, self.result, limit),
            *summary.particles(self.result),
            summary.cost(self.result),
            *summary.complaints(self.result.complaints),
        ]

    def _attrs(self) -> dict[str, Any]:
        return {"sampler": "SMC"}

    def get_weighted_samples(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """All particles of all runs, and their log weights.

        Returns:
            Arrays `(num_runs · num_particles, *plates, *event_shape)` by site name, and log weights
            `(num_runs · num_particles, *plates)`, which sum to one over the particles.
        """
        return results.weighted_samples(self.result)

    @property
    def log_evidence(self) -> Any:
        """log Z, nats: a number, or `(*plates,)`; −inf where all weights are zero."""
        return _plain(results.log_evidence(self.result.outcome))

    @property
    def log_evidence_se(self) -> Any:
        """Standard error of log Z over the runs, shape of `log_evidence`; nan for one run."""
        return _plain(results.log_evidence_se(self.result.outcome))

    def log_evidence_interval(self, prob: float = 0.95) -> tuple[Any, Any]:
        """Student-t interval of log Z, num_runs − 1 degrees of freedom.

        Args:
            prob: Probability of the interval, in (0, 1).

        Returns:
            Lower and upper end, each of the shape of `log_evidence`; nan for one run.
        """
        if not 0 < prob < 1:
            raise ValueError(f"prob must lie in (0, 1); got {prob}")
        half = self.log_evidence_se * float(stats.t.ppf((1 + prob) / 2, self._walk.num_runs - 1))
        return self.log_evidence - half, self.log_evidence + half


def _plain(value: np.ndarray) -> Any:
    """A float where there are no plates."""
    return float(value) if value.ndim == 0 else value
