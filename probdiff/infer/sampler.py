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


class Sampler(abc.ABC):
    """Draws from the posterior of a program that holds a prior."""

    _result: Result | None = None

    @abc.abstractmethod
    def run(self, key: Array, *args: Any, **kwargs: Any) -> None:
        """Sample the posterior of the program at these arguments."""

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
        """
        return results.samples(self.result)

    def print_summary(self, limit: int = 10) -> None:
        """Print the entries of x_0, what they rest on, and warnings with what to do.

        Args:
            limit: Entries of x_0 and systems that are shown.
        """
        entries = summary.entries(self.result, limit)
        lines = [self._title(), self.result.layout.note, *entries, *self._lines(limit)]
        print("\n".join(filter(None, lines)))

    def to_datatree(self) -> xr.DataTree:
        """The run as an ArviZ DataTree, NumPy arrays with named dims; see `infer.datatree`."""
        return datatree(self.result, self._attrs())

    def _title(self) -> str:
        walk, layout = self.result.walk, self.result.layout
        twist = "twist of symbols" if layout.is_discrete else repr(walk.twist)
        return (
            f"{type(self).__name__}, {twist}: {len(layout.times) - 1} of T = {layout.T} steps, "
            f"{walk.num_runs} run(s) of {walk.num_particles} particles"
        )
