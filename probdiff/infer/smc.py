"""`SMC`: the posterior of x_0 under a program, exact as particles grow, with its evidence.

R independent runs of N particles each walk the reverse trajectory as `particles` says. Their draws
are pooled with weights in proportion to each run's Ẑ, so that the pooled estimate is that of one
larger importance sample, and

    log Z ≈ log (1/R) Σ_r Ẑ_r,

with an error and intervals from their spread (see `evidence`). Z is the evidence of the diffusion
that was walked, of all T steps or, where `steps=n`, of n of them; known entries of x_0 count in it.

`Sampler` is what `SMC` and `Guided` share: equally weighted draws of x_0, a summary in words and an
ArviZ DataTree. Behind the draws stand weights, or nothing but the guidance.

Source: Sohl-Dickstein et al. (2015), section 2.5, for conditioning by r; Del Moral et al. (2006).
"""

import abc
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array

from probdiff.arguments import (
    INNER_SHARE,
    SHARE,
    check_at_least,
    check_callable,
    check_flag,
    check_key,
    check_number,
    check_object,
)
from probdiff.infer import evidence, results
from probdiff.infer.health import InferenceWarning
from probdiff.infer.particles import Options
from probdiff.infer.program import Program
from probdiff.infer.results import Result
from probdiff.infer.twist import Twist

if TYPE_CHECKING:
    import xarray as xr


class Sampler(abc.ABC):
    """Draws from the posterior of a program that holds priors.

    All that is read of a run raises a `ValueError` before `run`.
    """

    def __init__(self, program: Program, progress: bool, twist: Twist | None, **options: Any):
        counts = ("num_particles", "num_runs", "block_size")
        check_at_least(1, **{name: options[name] for name in counts})
        check_callable("program(*args)", program=program)
        check_object(Twist, "one such as infer.LaplaceTwist()", or_none=True, twist=twist)
        check_at_least(1, or_none=True, steps=options["steps"])
        check_flag(progress=progress)
        mesh, num_runs = options.get("mesh"), options["num_runs"]
        check_object(Mesh | AbstractMesh, "a jax.sharding.Mesh", or_none=True, mesh=mesh)
        if mesh is not None and num_runs % mesh.size:
            raise ValueError(
                f"num_runs must be a multiple of the {mesh.size} devices of the mesh, which share "
                f"out the runs; got {num_runs}"
            )
        self.program, self.progress = program, progress
        is_ours = twist is None or type(twist).__module__.startswith("probdiff.")
        self._options = Options(twist, **options, stand_in=None if is_ours else object())
        self._result: Result | None = None

    def __repr__(self) -> str:
        name = getattr(self.program, "__name__", type(self.program).__name__)
        twist = self._options.twist if self._result is None else self._result.options.twist
        called = "the usual twist" if twist is None else type(twist).__name__
        return (
            f"{type(self).__name__}({name}, {called}, "
            f"{self._counts()}, {'not run yet' if self._result is None else 'has run'})"
        )

    @abc.abstractmethod
    def run(self, key: Array, *args: Any, **kwargs: Any) -> None:
        """Sample the posterior of the program at these arguments."""

    @abc.abstractmethod
    def _counts(self) -> str:
        """How much a run draws."""

    @abc.abstractmethod
    def _lines(self, limit: int) -> list[str]:
        """Lines of the summary below the entries."""

    @abc.abstractmethod
    def _attrs(self) -> dict[str, Any]:
        """Attributes of the DataTree that are this sampler's own."""

    def _keep(self, result: Result) -> None:
        """Hold a result, and warn of what was found."""
        self._result = result
        for text in result.complaints:
            warnings.warn(text, InferenceWarning, stacklevel=3)

    @property
    def result(self) -> Result:
        """What the last run left."""
        if self._result is None:
            raise ValueError("run must be called first; there are no draws yet")
        return self._result

    def get_samples(self) -> dict[str, np.ndarray]:
        """Equally weighted draws of x_0 and of the program's deterministic sites, by site name.

        Those of several priors go together, row by row. Weighted runs are pooled and resampled,
        separately for each entry of the plates of all priors;
        draws come in random order, and one may come twice.

        Returns:
            Arrays `(M, *plates, *event_shape)`, the user's units, x_0 in float64 or symbols; M is
            `num_runs · num_particles`, or `num_samples`.

        Example:
            >>> prior = standard_diffusion().prior({})
            >>> def program(y):
            ...     rate = numpyro.deterministic("rate", jnp.exp(prior()))
            ...     numpyro.sample("y", dist.Poisson(rate), obs=y)
            >>> guided = infer.Guided(program, num_samples=200, check=False)
            >>> guided.run(jax.random.key(0), y=3)
            >>> {name: draws.shape for name, draws in guided.get_samples().items()}
            {'x_0': (200,), 'rate': (200,)}
        """
        return self.result.read.by_site(self.result.draws)

    def print_summary(self, limit: int = 10) -> None:
        """Print `limit` entries of x_0 and systems, what they rest on, and warnings with advice.

        Example:
            >>> prior = standard_diffusion().prior({})
            >>> program = lambda y: numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
            >>> smc = infer.SMC(program, num_particles=200)
            >>> smc.run(jax.random.key(0), y=2.0)
            >>> smc.print_summary()
            SMC, LaplaceTwist(rank=4): 10 of T = 10 steps, 4 run(s) of 200 particles
                      mean         sd         5%        95%
            x_0 ...
            log evidence of the diffusion of 10 steps: -2.2... (95% from -2.2... to -2.2...)
            effective number: least at one level ...% of 200, final ... of 800
            ...
            no warnings
        """
        check_at_least(1, limit=limit)
        of, options = self.result, self.result.options
        title = (
            f"{type(self).__name__}, {options.twist!r}: {of.num_steps} of "
            f"T = {of.read.conditioned.reverse.T} steps, "
            f"{options.num_runs} run(s) of {options.num_particles} particles"
        )
        found = [f"warning: {text}" for text in of.complaints] or ["no warnings"]
        lines = [title, of.note, *results.entry_lines(of, limit), *self._lines(limit), *found]
        print("\n".join(filter(None, lines)))

    def to_datatree(self) -> "xr.DataTree":
        """The run as an ArviZ DataTree, NumPy arrays with named dims.

        Groups `posterior`, `sample_stats`, `posterior_predictive`, `observed_data`, `runs` and
        `smc`, and `log_likelihood` for `arviz_stats.loo` where a site has several values for one
        x_0; `infer.results` says what they hold.

        Example:
            >>> prior = standard_diffusion((2,)).prior({})
            >>> def program(y):
            ...     with numpyro.plate("points", 3):
            ...         numpyro.sample("y", dist.Normal(prior().sum(-1), 1.0), obs=y)
            >>> guided = infer.Guided(program, num_samples=200, check=False)
            >>> guided.run(jax.random.key(0), y=jnp.array([-1.0, 0.0, 1.0]))
            >>> tree = guided.to_datatree()
            >>> dict(tree["posterior"]["x_0"].sizes)
            {'chain': 1, 'draw': 200, 'points': 3, 'x_0_dim_0': 2}
            >>> dict(tree["sample_stats"]["log_likelihood_y"].sizes)
            {'chain': 1, 'draw': 200, 'points': 3}
        """
        return results.datatree(self.result, self._attrs())


class SMC(Sampler):
    """Twisted sequential Monte Carlo: weighted draws of the posterior of x_0 and its evidence.

    Particles walk the reverse trajectory x_T → x_0. A twist ψ_t, the guess of E[r(x_0) | x_t],
    leads each step by a proposal q, and the weights repair what it gets wrong:

        w_s = w_t · p(x_s | x_t) ψ_s(x_s) / (q(x_s | x_t) ψ_t(x_t)),    ψ_0 = r = the likelihood.

    So the draws tend to the posterior, and the mean weight to the evidence Z, whatever the twist.

    Args:
        program: Any NumPyro program with one `prior()` or several, and observed sites or factors
            below. Several have one kernel, readout, last step and schedule, and move together; a
            plate that not all of them stand in is part of one posterior. Another latent site needs
            a value: by `handlers.substitute` it is a constant, which the evidence does not count;
            by `handlers.condition` an observation, which it does. Programs that draw by themselves,
            and handlers that change a prior, are refused.
        num_particles: Particles N of one run, at least 1. What a posterior needs, a run must hold:
            more runs do not help where one of them collapses.
        num_runs: Independent runs R, at least 1, whose spread is the error; of one it is nan.
        twist: Guess of E[r(x_0) | x_t]. If absent `SymbolTwist()` for symbols, `ReadoutTwist()`
            where entries are known and the readout is a `Mixture`, else `LaplaceTwist()`.
        steps: Number n in 2..T of levels to walk, another model than that of all T, the default.
        ess_threshold: Share of N in [0, 1] below which the effective number resamples; 0 for never.
        block_size: Particles, times entries of the plates, that the network sees at once.
        mesh: Devices that share out the runs; `num_runs` is a multiple of their number.
        progress: Show a bar.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        A measurement y = 2, of noise 1, of a number x_0 ~ N(0, 1):

        >>> prior = standard_diffusion().prior({})  # {} are the parameters: it has none
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

    Sources: Del Moral et al. (2006); Wu et al. (2023) for twists of diffusions.
    """

    def __init__(
        self, program: Program, *, num_particles: int = 256, num_runs: int = 4,
        twist: Twist | None = None, steps: int | None = None, ess_threshold: float = 0.5,
        block_size: int = 4096, mesh: Mesh | None = None, progress: bool = False,
    ):  # fmt: skip
        """Prepare the sampler; the arguments are those of the class."""
        check_number(SHARE, ess_threshold=ess_threshold)
        super().__init__(
            program, progress, twist, num_particles=num_particles, num_runs=num_runs, steps=steps,
            is_weighted=True, threshold=ess_threshold, block_size=block_size, mesh=mesh,
        )  # fmt: skip

    def run(self, key: Array, *args: Any, **kwargs: Any) -> None:
        """Sample the posterior of the program at these arguments.

        What the program computes is compiled once: arrays and floats among its arguments, and
        arrays that it closes over, may change from run to run. An int, a bool, a number in the
        program, or a float by which the program decides what to do, compiles anew.

        Args:
            key: Randomness; entry b of the prior's plates uses `fold_in(key, b)`.
            *args: Arguments of the program.
            **kwargs: Keyword arguments of the program.

        Raises:
            ValueError: if the program is not priors with observed sites inside the plates of all,
                priors differ in kind or schedule, or the twist does not fit.

        Warns:
            InferenceWarning: if the draws or the evidence are not to be trusted.

        Example:
            Three systems in a plate, each with particles and an evidence of its own:

            >>> prior = standard_diffusion().prior({})
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
        check_key(key)
        run = args, kwargs
        self._keep(results.sample(self.program, self._options, key, *run, progress=self.progress))

    def _counts(self) -> str:
        return f"num_particles={self._options.num_particles}, num_runs={self._options.num_runs}"

    def _lines(self, limit: int) -> list[str]:
        of = self.result
        ends = evidence.log_evidence_interval(of.outcome.log_evidences, 0.95)
        values = map(np.asarray, (self.log_evidence, *ends))
        lines = results.evidence_lines(*values, of, limit)
        return [*lines, *results.particle_lines(of), results.cost_line(of)]

    def _attrs(self) -> dict[str, Any]:
        return {"sampler": "SMC"}

    def get_weighted_samples(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """All particles of all runs, and their log weights.

        Returns:
            Arrays `(num_runs · num_particles, *plates, *event_shape)` by site name, and log weights
            `(num_runs · num_particles, *plates)`, nats; the weights sum to one over the particles.

        Example:
            Never resampled, so that the weights carry what the proposals get wrong:

            >>> prior = standard_diffusion().prior({})
            >>> program = lambda y: numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
            >>> options = {"num_particles": 4000, "ess_threshold": 0.0}
            >>> smc = infer.SMC(program, twist=infer.PointTwist(), **options)
            >>> smc.run(jax.random.key(0), y=2.0)
            >>> sites, log_weights = smc.get_weighted_samples()
            >>> weights, x_0 = np.exp(log_weights), sites["x_0"]
            >>> round(float(x_0.mean()), 1), round(float(weights @ x_0), 1)  # y/2 = 1
            (1.3, 1.0)
        """
        outcome = self.result.outcome
        sites = self.result.read.by_site(results.pooled(outcome.x_0))
        return sites, results.pooled_log_weights(outcome)

    @property
    def log_evidence(self) -> Any:
        """log Z, nats: a number, or `(*plates,)`; −inf where all weights are zero.

        Example:
            Two likelihoods, whose ratio of evidences is a Bayes factor:

            >>> prior = standard_diffusion().prior({})
            >>> program = lambda y, sigma: numpyro.sample("y", dist.Normal(prior(), sigma), obs=y)
            >>> smc = infer.SMC(program, num_particles=1000)
            >>> log_evidence = []
            >>> for sigma in (1.0, 3.0):  # compiled once for both
            ...     smc.run(jax.random.key(0), 4.0, sigma)
            ...     log_evidence.append(smc.log_evidence)
            >>> [round(z, 1) for z in log_evidence]  # log N(4; 0, 1 + σ²) = −5.3, −2.9
            [-5.3, -2.9]
        """
        return _plain(evidence.log_evidence(self.result.outcome.log_evidences))

    @property
    def log_evidence_se(self) -> Any:
        """Standard error of log Z over the runs, shape of `log_evidence`; nan for one run."""
        return _plain(evidence.log_evidence_se(self.result.outcome.log_evidences))

    def log_evidence_interval(self, prob: float = 0.95) -> tuple[Any, Any]:
        """Interval of log Z from the spread over runs; nan for one run, or one without weight.

        It counts log Ẑ as normal with mean log Z − σ²/2 and an unknown variance σ², as it is for
        many particles (see `evidence.log_evidence_interval`). With few runs it is wide, more so
        above log_evidence than below, since the largest Ẑ are rare.

        Args:
            prob: Probability of the interval, in (0, 1); else a `ValueError`.

        Returns:
            Lower and upper end, each of the shape of `log_evidence`.

        Example:
            >>> prior = standard_diffusion().prior({})
            >>> program = lambda y: numpyro.sample("y", dist.Normal(prior(), 1.0), obs=y)
            >>> smc = infer.SMC(program, num_particles=200, twist=infer.PointTwist())
            >>> smc.run(jax.random.key(0), y=2.0)
            >>> low, high = smc.log_evidence_interval(0.99)
            >>> low < float(dist.Normal(0.0, 2**0.5).log_prob(2.0)) < high
            True
            >>> 0 < smc.log_evidence_se < 0.1  # of Ẑ, relative: 10 %
            True
        """
        check_number(INNER_SHARE, prob=prob)
        by_run = self.result.outcome.log_evidences
        if len(by_run) == 2:
            warnings.warn(
                "num_runs is 2: the spread of two runs says little of their error, and the "
                "interval of log_evidence is very wide. Use at least 4",
                InferenceWarning,
                stacklevel=2,
            )
        low, high = evidence.log_evidence_interval(by_run, prob)
        return _plain(low), _plain(high)


def _plain(value: np.ndarray) -> Any:
    """A float where there are no plates."""
    return float(value) if value.ndim == 0 else value
