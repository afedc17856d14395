"""`SMC`: the posterior of x_0 under a program, exact as particles grow, with its evidence.

R independent runs of N particles each walk the reverse trajectory as `particles` says. Their draws
are pooled with weights in proportion to each run's Ẑ, so that the pooled estimate is that of one
larger importance sample, and

    log Z ≈ log (1/R) Σ_r Ẑ_r,    se = sd(Ẑ_r) / (√R · mean(Ẑ_r)),

with Student-t intervals of R − 1 degrees of freedom. Z is the evidence of the diffusion that was
walked, of all T steps or, where `steps=n`, of n of them; known entries of x_0 count in it.

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
    """Twisted sequential Monte Carlo: weighted draws of the posterior of x_0 and its evidence.

    Particles walk the reverse trajectory x_T → x_0. A twist ψ_t, the guess of E[r(x_0) | x_t],
    leads each step by a proposal q, and the weights repair what it gets wrong:

        w_s = w_t · p(x_s | x_t) ψ_s(x_s) / (q(x_s | x_t) ψ_t(x_t)),    ψ_0 = r = the likelihood.

    So the draws tend to the posterior, and the mean weight to the evidence Z, whatever the twist.

    Args:
        program: Any NumPyro program with one `prior()` and observed sites or factors below it.
        num_particles: Particles N of one run, at least 1. What a posterior needs, a run must hold:
            more runs do not help where one of them collapses.
        num_runs: Independent runs R, at least 1, between which errors are told; with one of them
            `log_evidence_se` is nan.
        twist: Guess of E[r(x_0) | x_t], `LaplaceTwist()` if absent; `ReadoutTwist()` where many
            entries are known exactly and the readout is a `Mixture`. Diffusions of symbols have one
            of their own.
        steps: Number n in 2..T of levels to walk, another model than the T-step diffusion; T if
            absent.
        ess_threshold: Share of N in [0, 1] below which the effective number calls for resampling;
            0 for never.
        block_size: Particles, times entries of the plates, that the network sees at once.
        mesh: Devices that share out the runs; `num_runs` is a multiple of their number.
        progress: Show a bar.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        A measurement y = 2, of noise 1, of a number x_0 ~ N(0, 1):

        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from probdiff import Diffusion, GaussianKernel, infer, schedules
        >>> def network(x_t, t):  # outputs of 0 leave the law of the noise: x_0 ~ N(0, 1)
        ...     return jnp.zeros((*x_t.shape, 2))
        >>> diffusion = Diffusion(GaussianKernel(), schedules.cosine(10), network, event_shape=())
        >>> prior = diffusion.prior({})  # {} are the parameters: this network has none
        >>> def program(y):
        ...     x_0 = prior()
        ...     numpyro.sample("y", dist.Normal(x_0, 1.0), obs=y)
        >>> smc = infer.SMC(program, num_particles=1000, num_runs=4)
        >>> smc.run(jax.random.key(0), y=2.0)
        >>> x_0 = smc.get_samples()["x_0"]
        >>> x_0.shape, round(float(x_0.mean()), 1), round(float(x_0.var()), 1)  # N(1, 1/2)
        ((4000,), 1.0, 0.5)
        >>> exact = dist.Normal(0.0, 2**0.5).log_prob(2.0)  # y ~ N(0, 2)
        >>> round(smc.log_evidence, 1), round(float(exact), 1)
        (-2.3, -2.3)

    Sources: Sohl-Dickstein et al. (2015), section 2.5, for r; Del Moral et al. (2006); Wu et al.
    (2023) for twists of diffusions.
    """

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
        """Prepare the sampler; the arguments are those of the class."""
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

        Warns:
            InferenceWarning: if the draws or the evidence are not to be trusted.

        Example:
            Three systems in a plate, each with particles and an evidence of its own:

            >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
            >>> from probdiff import Diffusion, GaussianKernel, infer, schedules
            >>> def network(x_t, t):  # x_0 ~ N(0, 1)
            ...     return jnp.zeros((*x_t.shape, 2))
            >>> diffusion = Diffusion(
            ...     GaussianKernel(), schedules.cosine(10), network, event_shape=()
            ... )
            >>> prior = diffusion.prior({})
            >>> def program(y):
            ...     with numpyro.plate("points", 3):
            ...         numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
            >>> smc = infer.SMC(program, num_particles=1000)
            >>> smc.run(jax.random.key(0), y=jnp.array([-2.0, 1.6, 2.0]))
            >>> [round(float(m), 1) for m in smc.get_samples()["x_0"].mean(0)]  # y/2
            [-1.0, 0.8, 1.0]
            >>> smc.log_evidence.shape
            (3,)
        """
        self._result = results.run(self._walk, key, args, kwargs, self.progress)
        results.warn(self._result.complaints)

    def _counts(self) -> str:
        return f"num_particles={self._walk.num_particles}, num_runs={self._walk.num_runs}"

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
            `(num_runs · num_particles, *plates)`, nats; the weights sum to one over the particles.

        Raises:
            ValueError: before `run`.

        Example:
            Particles as the proposals of `PointTwist` left them, not once resampled: the weights
            carry what these get wrong.

            >>> import jax, jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist
            >>> from probdiff import Diffusion, GaussianKernel, infer, schedules
            >>> def network(x_t, t):  # x_0 ~ N(0, 1)
            ...     return jnp.zeros((*x_t.shape, 2))
            >>> diffusion = Diffusion(
            ...     GaussianKernel(), schedules.cosine(10), network, event_shape=()
            ... )
            >>> prior = diffusion.prior({})
            >>> def program(y):
            ...     numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
            >>> smc = infer.SMC(
            ...     program, num_particles=4000, twist=infer.PointTwist(), ess_threshold=0.0
            ... )
            >>> smc.run(jax.random.key(0), y=2.0)
            >>> sites, log_weights = smc.get_weighted_samples()
            >>> weights = np.exp(log_weights)
            >>> x_0 = sites["x_0"]
            >>> round(float(x_0.mean()), 1), round(float(weights @ x_0), 1)  # y/2 = 1
            (1.3, 1.0)
        """
        return results.weighted_samples(self.result)

    @property
    def log_evidence(self) -> Any:
        """log Z, nats: a number, or `(*plates,)`; −inf where all weights are zero.

        Raises:
            ValueError: before `run`.

        Example:
            Which of two likelihoods do the data prefer? The ratio of evidences, a Bayes factor:

            >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
            >>> from probdiff import Diffusion, GaussianKernel, infer, schedules
            >>> def network(x_t, t):  # x_0 ~ N(0, 1)
            ...     return jnp.zeros((*x_t.shape, 2))
            >>> diffusion = Diffusion(
            ...     GaussianKernel(), schedules.cosine(10), network, event_shape=()
            ... )
            >>> prior = diffusion.prior({})
            >>> def program(y, sigma):
            ...     numpyro.sample("y", dist.Normal(prior(), sigma), obs=y)
            >>> smc = infer.SMC(program, num_particles=1000)
            >>> log_evidence = []
            >>> for sigma in jnp.array([1.0, 3.0]):  # an array: compiled once for both
            ...     smc.run(jax.random.key(0), 4.0, sigma)
            ...     log_evidence.append(smc.log_evidence)
            >>> [round(z, 1) for z in log_evidence]  # log N(4; 0, 1 + σ²) = −5.3, −2.9
            [-5.3, -2.9]
        """
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

        Raises:
            ValueError: before `run`, or if `prob` is out of range.

        Example:
            >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
            >>> from probdiff import Diffusion, GaussianKernel, infer, schedules
            >>> def network(x_t, t):  # x_0 ~ N(0, 1)
            ...     return jnp.zeros((*x_t.shape, 2))
            >>> diffusion = Diffusion(
            ...     GaussianKernel(), schedules.cosine(10), network, event_shape=()
            ... )
            >>> prior = diffusion.prior({})
            >>> def program(y):
            ...     numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
            >>> smc = infer.SMC(program, num_particles=200, twist=infer.PointTwist())
            >>> smc.run(jax.random.key(0), y=2.0)
            >>> low, high = smc.log_evidence_interval(0.99)
            >>> low < float(dist.Normal(0.0, 2**0.5).log_prob(2.0)) < high
            True
            >>> 0 < smc.log_evidence_se < 0.1  # of Ẑ, relative: 10 %
            True
        """
        if not 0 < prob < 1:
            raise ValueError(f"prob must lie in (0, 1); got {prob}")
        half = self.log_evidence_se * float(stats.t.ppf((1 + prob) / 2, self._walk.num_runs - 1))
        return self.log_evidence - half, self.log_evidence + half


def _plain(value: np.ndarray) -> Any:
    """A float where there are no plates."""
    return float(value) if value.ndim == 0 else value
