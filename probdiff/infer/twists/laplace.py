"""The default: any smooth likelihood, by its second-order expansion."""

import dataclasses
from typing import Any

from probdiff.infer.expansion import Expansion, Local, diagonal, low_rank
from probdiff.infer.twists.base import RANK, View, check_rank, size_of
from probdiff.infer.twists.widened import Widened


@dataclasses.dataclass(frozen=True)
class LaplaceTwist(Widened):
    """∫ r N(x̂_0, w_t I), log r to second order at x̂_0: for any smooth likelihood.

    Args:
        rank: Directions in which the curvature of log r is kept, where it is not diagonal; the
            number of measurements is enough.
    """

    rank: int = RANK
    uses_covariance = True

    def __post_init__(self) -> None:
        check_rank(self.rank)

    def expand(self, at: Local, sd: Any, view: View) -> Expansion:
        """By a diagonal where there is one, else by Lanczos."""
        return (
            diagonal(at, sd)
            if view.is_diagonal
            else low_rank(at, sd, min(self.rank, size_of(view)))
        )
