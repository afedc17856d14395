"""`Sampler`: what `SMC` and `Guided` share once they have run.

Both leave equally weighted draws of x_0, a summary in words and an ArviZ DataTree,

    sampler.run(key, *args)  →  get_samples(),  print_summary(),  to_datatree()

and differ in what stands behind the draws: weights, or nothing but the guidance.
"""

import abc
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Array

from probdiff.infer import results, summary
from probdiff.infer.datatree import datatree
from probdiff.infer.results import Result
from probdiff.infer.walk import Walk


class Sampler(abc.ABC):
    """Draws from the posterior of a program that holds a prior."""

    _walk: Walk
    _result: Result | None = None

    def __repr__(self) -> str:
        program = self._walk.program
        name = getattr(program, "__name__", type(program).__name__)
        return (
            f"{type(self).__name__}({name}, {type(self._walk.twist).__name__}, {self._counts()}, "
            f"{'not run yet' if self._result is None else 'has run'})"
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

    @property
    def result(self) -> Result:
        """What the last run left.

        Raises:
            ValueError: before `run`.
        """
        if self._result is None:
            raise ValueError("run must be called first; there are no draws yet")
        return self._result

    def get_samples(self) -> dict[str, np.ndarray]:
        """Equally weighted draws of x_0 and of the program's deterministic sites, by site name.

        Weighted runs are pooled and resampled, separately for each entry of the prior's plates;
        draws come in random order, and one may come twice.

        Returns:
            Arrays `(M, *plates, *event_shape)`, the user's units; M is `num_runs · num_particles`,
            or `num_samples`.

        Raises:
            ValueError: before `run`.

        Example:
            Deterministic sites of the program come along:

            >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
            >>> from probdiff import Diffusion, GaussianKernel, infer, schedules
            >>> def network(x_t, t):  # x_0 ~ N(0, 1)
            ...     return jnp.zeros((*x_t.shape, 2))
            >>> diffusion = Diffusion(
            ...     GaussianKernel(), schedules.cosine(10), network, event_shape=()
            ... )
            >>> prior = diffusion.prior({})
            >>> def program(y):
            ...     rate = numpyro.deterministic("rate", jnp.exp(prior()))
            ...     numpyro.sample("y", dist.Poisson(rate), obs=y)
            >>> guided = infer.Guided(program, num_samples=200, check=False)
            >>> guided.run(jax.random.key(0), y=3)
            >>> {name: draws.shape for name, draws in guided.get_samples().items()}
            {'x_0': (200,), 'rate': (200,)}
        """
        return results.samples(self.result)

    def print_summary(self, limit: int = 10) -> None:
        """Print the entries of x_0, what they rest on, and warnings with what to do.

        Args:
            limit: Entries of x_0 and systems that are shown.

        Raises:
            ValueError: before `run`.

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
        entries = summary.entries(self.result, limit)
        lines = [self._title(), self.result.layout.note, *entries, *self._lines(limit)]
        print("\n".join(filter(None, lines)))

    def to_datatree(self) -> xr.DataTree:
        """The run as an ArviZ DataTree, NumPy arrays with named dims; see `infer.datatree`.

        Returns:
            Groups `posterior`, `sample_stats`, `log_likelihood`, `posterior_predictive`,
            `observed_data`, `runs` and `smc`.

        Raises:
            ValueError: before `run`.

        Example:
            >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
            >>> from probdiff import Diffusion, GaussianKernel, infer, schedules
            >>> def network(x_t, t):  # x_0 ~ N(0, 1), twice
            ...     return jnp.zeros((len(x_t), 4))
            >>> diffusion = Diffusion(
            ...     GaussianKernel(), schedules.cosine(10), network, event_shape=(2,)
            ... )
            >>> prior = diffusion.prior({})
            >>> def program(y):
            ...     with numpyro.plate("points", 3):
            ...         numpyro.sample("y", dist.Normal(prior().sum(-1), 1.0), obs=y)
            >>> guided = infer.Guided(program, num_samples=200, check=False)
            >>> guided.run(jax.random.key(0), y=jnp.array([-1.0, 0.0, 1.0]))
            >>> tree = guided.to_datatree()
            >>> dict(tree["posterior"]["x_0"].sizes)
            {'chain': 1, 'draw': 200, 'points': 3, 'x_0_dim_0': 2}
            >>> dict(tree["log_likelihood"]["y"].sizes)  # for arviz_stats.loo
            {'chain': 1, 'draw': 200, 'points': 3}
        """
        return datatree(self.result, self._attrs())

    def _title(self) -> str:
        walk, layout = self.result.walk, self.result.layout
        twist = "twist of symbols" if layout.is_discrete else repr(walk.twist)
        return (
            f"{type(self).__name__}, {twist}: {len(layout.times) - 1} of T = {layout.T} steps, "
            f"{walk.num_runs} run(s) of {walk.num_particles} particles"
        )
