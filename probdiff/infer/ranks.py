"""Ranks: whether numbers lie among others as draws of one law would, and how sure that is.

    PIT = (#{f_l < f*} + U (1 + #{f_l = f*})) / (L + 1),    U ~ Uniform(0, 1),

is uniform on (0, 1) if f* and the L others are exchangeable, ties or none. Each number's PITs are
tested by Kolmogorov and Smirnov; the least of m p-values rejects below LEVEL/m (Bonferroni).
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from scipy import stats

LEVEL = 0.01
"""Probability that one or more of all the tests reject what is right, at most."""


def pit(key: Array, value: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Randomised PIT of each number among those of `others`, `(L, *shape)`."""
    below, equal = (others < value).sum(0), (others == value).sum(0)
    u = np.asarray(jax.random.uniform(key, below.shape), np.float64)
    return (below + u * (1 + equal)) / (len(others) + 1)


def p_values(pits: np.ndarray) -> np.ndarray:
    """p-values of uniformity over the first axis."""
    return np.asarray(np.apply_along_axis(lambda u: stats.kstest(u, "uniform").pvalue, 0, pits))


def verdict(p_values: dict[str, np.ndarray]) -> dict[str, Any]:
    """Number of tests, least p-value and where it is, and the bound below which it rejects."""
    least = min(p_values, key=lambda name: p_values[name].min())
    place = np.unravel_index(p_values[least].argmin(), p_values[least].shape)
    num_tests = sum(p.size for p in p_values.values())
    return {
        "num_tests": num_tests,
        "least_p_value": float(p_values[least].min()),
        "least_at": least + (str([int(i) for i in place]) if place else ""),
        "bound": LEVEL / num_tests,
    }
