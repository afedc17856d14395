"""The last reverse step p(x_0 | x_1): tied to the forward kernel, or learned like the others.

Tied, it is the forward kernel with its arguments exchanged, T_π(x_0 | x_1; β_1): no network is
asked, and no bound exceeds −H(X_1). Learned, the limit is −H(X_0).

Source: Sohl-Dickstein et al. (2015), appendix B.2.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import numpyro.distributions as dist

from probdiff.types import Step


class LastStep(abc.ABC):
    """How x_0 follows from x_1."""

    @abc.abstractmethod
    def __call__(
        self,
        kernel: Any,
        reverse_step: Callable[[Any, Step], dist.Distribution],
        x_1: Any,
        step: Step,
    ) -> dist.Distribution:
        """p(x_0 | x_1), elementwise; `reverse_step(x_1, step)` is what the network says."""


@dataclasses.dataclass(frozen=True)
class Tied(LastStep):
    """p(x_0 | x_1) = T_π(x_0 | x_1; β_1): no network, and K is at most −H(X_1) (2015, app. B.2)."""

    def __call__(
        self,
        kernel: Any,
        reverse_step: Callable[[Any, Step], dist.Distribution],
        x_1: Any,
        step: Step,
    ) -> dist.Distribution:
        """Forward kernel with its arguments exchanged (detailed balance)."""
        return kernel.transition(x_1, step)


@dataclasses.dataclass(frozen=True)
class Learned(LastStep):
    """p(x_0 | x_1) from the network, like every other step; K is at most −H(X_0)."""

    def __call__(
        self,
        kernel: Any,
        reverse_step: Callable[[Any, Step], dist.Distribution],
        x_1: Any,
        step: Step,
    ) -> dist.Distribution:
        """What the network says at t = 1."""
        return reverse_step(x_1, step)
