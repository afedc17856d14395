"""Are two sets of points draws of one law? A permutation test, coarse or fine.

For a function k of the distance between two points, X, X' of one law and Y, Y' of the other, all
independent,

    D² = E k(|X − X'|) + E k(|Y − Y'|) − 2 E k(|X − Y|) ≥ 0,

    energy distance      k(d) = −d                   where mass lies on the scale of the whole law
    MMD of width w       k(d) = exp(−d²/2w²)         detail of about the size w

and it is 0 only where the laws agree. Over n and m points, all pairs counted, it is a quadratic
form: with s = (1/n, …, 1/n, −1/m, …, −1/m) and the matrix k_ij of all n + m points,

    D² = Σ_ij s_i s_j k_ij.

If both sets are of one law, it does not matter which point is in which: D² of the sets as they are
is one more draw beside those of B random divisions, and the share that is at least as large,

    p = (1 + #{b : D²_b ≥ D²}) / (1 + B),

is at most α with probability at most α.

Sources: Székely & Rizzo (2004), Testing for equal distributions in high dimension; Gretton et al.
(2012), A kernel two-sample test.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.spatial.distance import cdist

Points = Float[np.ndarray, "_ _"]
Distances = Float[np.ndarray, "n n"]
_BLOCK = 500
_GROUPS = 20


class TwoSampleTest(NamedTuple):
    """What a test found.

    Attributes:
        distance: D² of the two sets, not negative but for rounding.
        p_value: Share of divisions with at least this D², in [1/(1 + B), 1].
    """

    distance: float
    p_value: float


def energy(distances: Distances) -> Distances:
    """k(d) = −d, of the energy distance."""
    return -distances


def gaussian(width: float) -> Callable[[Distances], Distances]:
    """k(d) = exp(−d²/2w²), of the maximum mean discrepancy.

    Args:
        width: w, in the points' unit, above 0.

    Raises:
        ValueError: If `width` is not above 0.
    """
    if not width > 0:
        raise ValueError(f"width must be above 0; got {width}")
    return lambda distances: np.exp(-0.5 * (distances / width) ** 2)


def two_sample_test(
    rng: np.random.Generator,
    x: Points,
    y: Points,
    k: Callable[[Distances], Distances],
    *,
    num_permutations: int = 1999,
) -> TwoSampleTest:
    """Test that two sets of points have one law.

    Args:
        rng: Draws the divisions.
        x: Points, one a row.
        y: Points of the same dimension, as many or not.
        k: What is made of the distances: `energy`, or `gaussian(width)`.
        num_permutations: Number of random divisions B.

    Raises:
        ValueError: If the two sets differ in dimension, or a number is too small.
    """
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"y must have points of dimension {x.shape[1]}, as x; got {y.shape[1]}")
    counts = {"x": len(x), "y": len(y), "num_permutations": num_permutations}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1; got {count}")
    points = np.concatenate([x, y]).astype(np.float64)
    matrix = _centred(k(cdist(points, points)))
    signs = np.repeat([1 / len(x), -1 / len(y)], [len(x), len(y)])
    observed = _form(matrix, signs[:, None])[0]
    at_least = 0
    for count in _block_sizes(num_permutations):
        divided = rng.permuted(np.tile(signs, (count, 1)), axis=1).T
        # a division may repeat the sets as they are, up to rounding
        at_least += np.sum(_form(matrix, divided) >= observed - 1e-12)
    return TwoSampleTest(float(observed), float((1 + at_least) / (1 + num_permutations)))


def _centred(matrix: Distances) -> Distances:
    """Means of rows and columns taken out: the same D², s having sum 0, with more digits."""
    mean = matrix.mean(0)
    return matrix - mean - mean[:, None] + mean.mean()


def _form(matrix: Distances, signs: Float[np.ndarray, "n b"]) -> Float[np.ndarray, " b"]:
    """D² of every column of signs."""
    return np.sum(signs * (matrix @ signs), 0)


def _block_sizes(total: int) -> list[int]:
    """As many blocks of divisions as are needed to fit memory."""
    full, rest = divmod(total, _BLOCK)
    return [_BLOCK] * full + [rest] * (rest > 0)


def energy_distance(
    x: Float[np.ndarray, "n *event"], y: Float[np.ndarray, "m *event"]
) -> tuple[float, float]:
    """2 E|x − y| − E|x − x'| − E|y − y'|, without bias, and its jackknife error over the rows."""
    x, y = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (x, y))
    across, within_x, within_y = cdist(x, y), cdist(x, x), cdist(y, y)

    def distance(i: np.ndarray, j: np.ndarray) -> float:
        """Of the rows i of x and j of y."""
        means = [d[np.ix_(k, k)].sum() / (len(k) * (len(k) - 1))
                 for d, k in ((within_x, i), (within_y, j))]  # fmt: skip
        return 2 * across[np.ix_(i, j)].mean() - sum(means)

    groups = min(_GROUPS, len(x), len(y))
    rows, columns = np.arange(len(x)), np.arange(len(y))
    left_out = [distance(rows[rows % groups != g], columns[columns % groups != g])
                for g in range(groups)]  # fmt: skip
    se = math.sqrt((groups - 1) / groups * np.sum((left_out - np.mean(left_out)) ** 2))
    return distance(rows, columns), se
