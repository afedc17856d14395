"""`Guided`: draws led by a twist and not weighed; with `KernelTwist` the rule of 2015.

Multiplying by r asks for p̃(x_0) ∝ p(x_0) r(x_0). The paper gives every level a density of its own,
p̃(x_t) ∝ p(x_t) r(x_t), and wants reverse steps that carry one into the other (eqs. 16 to 20), for
which

    p̃(x_s | x_t) = p(x_s | x_t) Z̃_t r(x_s) / (Z̃_s r(x_t))                             eq. 21
    p̃(x_s | x_t) = p(x_s | x_t) r(x_s)^c / Z̃_s(x_t),    c = 1 or (T − s)/T            eqs. 22, 23

The second is a law, and what `KernelTwist` draws: log r to second order at the mean of
p(x_s | x_t), exact where it is quadratic. (The paper's table App. 1 stops at the first order, which
moves the mean and leaves the variance.) It drops Z̃_s(x_t)/r(x_t)^c of the first, which `SMC` keeps
as a weight; without it the draws tend to another law, p r² for Gaussian data with constant r.

Unweighted draws x_s ~ q(x_s | x_t) of any twist are cheap, with `PointTwist` the guidance of DPS.
They tend to the wrong law, and nothing in them tells. So the means of one small `SMC` are compared:

    difference = max over entries of |mean − mean of SMC| / (posterior standard deviation of SMC).

Small differences prove nothing: both may miss a mode.

Sources: Sohl-Dickstein et al. (2015), section 2.5 and appendix C; Chung et al. (2023) for DPS.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from probdiff.arguments import check_at_least, check_flag, check_key
from probdiff.infer import results
from probdiff.infer.evidence import log_evidence
from probdiff.infer.health import systems
from probdiff.infer.program import Program
from probdiff.infer.results import Result
from probdiff.infer.smc import Sampler
from probdiff.infer.twist import Tilt, Twist, View

_CHECK = 2**31 - 3  # folded into the run's key for the small SMC
_CHECK_PARTICLES, _CHECK_RUNS = 64, 2
_APART = 0.5  # difference of means, in standard deviations, that is warned of
_WIDER = 1.5  # ratio of standard deviations that is: 90 % intervals would hold 73 % or 99 %
_APPROXIMATE = "approximate: not weighed, so the draws do not tend to the posterior"


@dataclasses.dataclass(frozen=True)
class KernelTwist(Twist):
    """r(x_t)^c, each step multiplied by r itself: the rule of 2015.

    Without weights (`Guided`) it tends to the wrong law; with weights (`SMC`) to the right one,
    slowly.

    Args:
        decays: Whether c = (T − t)/T, which is 0 at t = T, instead of 1 throughout.

    Example:
        y = 2, of noise 1, is measured of x_0 ~ N(0, 1). The posterior has mean 1, p r² has 4/3:

        >>> prior = standard_diffusion().prior({})
        >>> program = lambda y: numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
        >>> twist = infer.KernelTwist()
        >>> guided = infer.Guided(program, twist=twist, num_samples=4000, check=False)
        >>> guided.run(jax.random.key(0), y=2.0)
        >>> round(float(guided.get_samples()["x_0"].mean()), 1)
        1.3

    Source: Sohl-Dickstein et al. (2015), eqs. 22 and 23, appendix C.
    """

    decays: bool = False
    takes_known = False

    def __post_init__(self) -> None:
        check_flag(decays=self.decays)

    def __call__(self, view: View) -> Tilt:
        """ψ_t = r(x_t)^c, and N(mean, variance) · r(x_s)^c."""
        return self._multiply(view, self._power(view, 1))

    def last(self, view: View) -> Tilt:
        """N(mean, variance) · r(x_0)."""
        return self._multiply(view, 1.0)

    def _power(self, view: View, down: int) -> Array | float:
        """c at the level, or levels below."""
        if not self.decays:
            return 1.0
        reverse = view.problem.reverse
        times = jnp.concatenate([jnp.zeros(1, jnp.int32), reverse.steps.t])
        return (reverse.T - times[view.t - down]) / reverse.T

    def _multiply(self, view: View, power: Array | float) -> Tilt:
        """log r to second order at the mean."""
        tilt = super().last(_Powered(view, power))
        return tilt._replace(log_psi=self._power(view, 0) * view.log_r(view.x_t))

    def products(self, size: int, *, is_known_alone: bool) -> int:
        """None: r is asked at x_t."""
        return 0

    def advice(self, more: str, *, has_covariance: bool) -> str:
        """Another twist."""
        return f"Use LaplaceTwist, or raise {more}"


class _Powered(View):
    """A view of a power of r."""

    def __init__(self, view: View, power: Array | float):
        self.__dict__ = {"mean": view.mean, "variance": view.variance} | view.__dict__
        self._power, self.ridges = power, None

    def log_r(self, x: Array) -> Array:
        """power · log r."""
        return self._power * super().log_r(x)


class Check(NamedTuple):
    """What one small SMC says, for each entry of the plates."""

    log_evidence: np.ndarray  # log Z, nats
    ess: np.ndarray  # its effective number of draws, of 128
    difference: np.ndarray
    """Largest difference of a posterior mean, in posterior standard deviations."""
    ratio: np.ndarray
    """Largest ratio of the two standard deviations of an entry, the larger over the smaller."""


class Guided(Sampler):
    """Draws led by a twist without weights: approximate, with `KernelTwist` the rule of 2015.

    One walk for each draw, x_s ~ q(x_s | x_t), the proposal that `SMC` would weigh. Cheap; its law
    is as good as the twist, whatever the number of draws, and there is no evidence.

    Args:
        program: As in `SMC`, like `steps`, `block_size` and `progress`.
        twist: What leads the draws, by default as in `SMC`.
        num_samples: Number of draws, at least 1, independent of each other.
        check: Whether to run one small SMC, 2 runs of 64 particles with a `LaplaceTwist`, and
            compare means and spreads; the attribute `check` then holds what it says.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> prior = standard_diffusion().prior({})
        >>> program = lambda y: numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
        >>> guided = infer.Guided(program, num_samples=4000, check=False)
        >>> guided.run(jax.random.key(0), y=2.0)
        >>> x_0 = guided.get_samples()["x_0"]
        >>> x_0.shape, round(float(x_0.mean()), 1)  # here close to the posterior of x_0, N(1, 1/2)
        ((4000,), 1.0)
        >>> guided.to_datatree().attrs["approximate"]
        1

    Sources: Sohl-Dickstein et al. (2015), section 2.5; Chung et al. (2023) for DPS.
    """

    def __init__(
        self, program: Program, *, twist: Twist | None = None, num_samples: int = 1000,
        steps: int | None = None, check: bool = True, block_size: int = 4096,
        progress: bool = False,
    ):  # fmt: skip
        """Prepare the sampler; the arguments are those of the class."""
        check_at_least(1, num_samples=num_samples)
        check_flag(check=check)
        super().__init__(
            program, progress, twist, num_particles=num_samples, num_runs=1, steps=steps,
            is_weighted=False, threshold=0.0, block_size=block_size,
        )  # fmt: skip
        self.check: Check | None = None
        self._checks = check

    def run(self, key: Array, *args: Any, **kwargs: Any) -> None:
        """Draw at these arguments of the program, and check the draws; arguments as in `SMC.run`.

        Warns:
            InferenceWarning: if means or standard deviations differ from those of the small SMC, a
                twist was not finite, or the trajectory does not end in noise.

        Example:
            The rule of 2015 multiplies by r at every step, and goes too far:

            >>> import warnings
            >>> prior = standard_diffusion().prior({})
            >>> program = lambda y: numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
            >>> guided = infer.Guided(program, twist=infer.KernelTwist())
            >>> with warnings.catch_warnings(record=True) as caught:
            ...     warnings.simplefilter("always", infer.InferenceWarning)
            ...     guided.run(jax.random.key(0), y=4.0)  # the posterior is N(2, 1/2)
            >>> print(caught[0].message)
            the draws differ from those of a small SMC, means by up to ... Use SMC
            >>> bool(guided.check.difference > 0.5)  # posterior standard deviations
            True
        """
        check_key(key)
        options, run = self._options, (args, kwargs)
        result = results.sample(self.program, options, key, *run, progress=self.progress)
        if self._checks:
            size = {"num_particles": _CHECK_PARTICLES, "num_runs": _CHECK_RUNS}
            small = options._replace(
                twist=None, is_weighted=True, threshold=0.5, stand_in=None, **size
            )
            key = jax.random.fold_in(key, _CHECK)
            beside = results.sample(self.program, small, key, *run, progress=False)
            self.check = _compare(result, beside)
            result = result._replace(complaints=result.complaints + _doubts(result, self.check))
        self._keep(result)

    def _counts(self) -> str:
        return f"num_samples={self._options.num_particles}"

    def _lines(self, limit: int) -> list[str]:
        lines = [_APPROXIMATE, results.cost_line(self.result)]
        if self.check is not None:
            lines.append(
                f"a small SMC ({_CHECK_RUNS} runs of {_CHECK_PARTICLES} particles, LaplaceTwist): "
                f"log evidence {_range(self.check.log_evidence, '.2f')}, effective number "
                f"{_range(self.check.ess, '.0f')}, means apart by {_range(self.check.difference)} "
                f"posterior standard deviations, these by a factor of {_range(self.check.ratio)}"
            )
        return lines

    def _attrs(self) -> dict[str, Any]:
        check = {} if self.check is None else self.check._asdict()
        return {"sampler": "Guided"} | {f"check_{name}": value for name, value in check.items()}


def _compare(result: Result, small: Result) -> Check:
    """Draws beside a small SMC; an entry that is certain in either is not compared."""
    x_0 = results.pooled(result.outcome.x_0).astype(np.float64)
    other = results.pooled(small.outcome.x_0).astype(np.float64)
    weights = np.exp(results.pooled_log_weights(small.outcome))
    weights = weights.reshape(*weights.shape, *[1] * (other.ndim - weights.ndim))
    mean = np.sum(weights * other, 0)
    sd = np.sqrt(np.sum(weights * (other - mean) ** 2, 0))
    apart = np.abs(x_0.mean(0) - mean) / np.where(sd > 0, sd, np.inf)
    both = (sd > 0) & (x_0.std(0) > 0)
    ratio = np.where(both, x_0.std(0), 1.0) / np.where(both, sd, 1.0)
    axes = tuple(range(small.health.ess.ndim, apart.ndim))
    largest = (np.asarray(a.max(axes)) for a in (apart, np.maximum(ratio, 1 / ratio)))
    return Check(log_evidence(small.outcome.log_evidences), small.health.ess, *largest)


def _doubts(result: Result, check: Check) -> tuple[str, ...]:
    """Warnings from the check: laws that are further apart than the errors of both allow."""
    noise = 4 * np.sqrt(1 / check.ess + 1 / result.options.num_particles)
    is_apart = check.difference > np.maximum(_APART, noise)
    if not result.read.conditioned.reverse.kernel.is_discrete:  # their spread is in their mean
        is_apart |= np.log(check.ratio) > np.maximum(math.log(_WIDER), noise / math.sqrt(2))
    if not np.any(is_apart):
        return ()
    return (
        f"{systems(is_apart)}the draws differ from those of a small SMC, means by up "
        f"to {check.difference.max():.2g} posterior standard deviations, these by a factor of up "
        f"to {check.ratio.max():.2g} (log evidence {_range(check.log_evidence, '.2f')}, effective "
        f"number {_range(check.ess, '.0f')}): unweighted draws do not tend to the posterior. "
        "Use SMC",
    )


def _range(values: np.ndarray, form: str = ".2g") -> str:
    """A value, or the least and the largest of several."""
    low, high = (format(end, form) for end in (values.min(), values.max()))
    return low if values.ndim == 0 else f"{low} to {high}"
