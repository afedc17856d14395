"""How a model is judged from outside: tests of draws, a classifier, mixtures of Gaussians.

**Are two sets of points draws of one law?** For a function k of the distance between two points,
X, X' of one law and Y, Y' of the other, all independent,

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

**Draws of digits** are read by a classifier that has seen real digits only: does it find all ten
classes, and is it as sure as with test digits? **Bounds** stand beside the exact log densities of
Gaussians with full covariance fitted to the same images: one, and the best mixture.

Sources: Székely & Rizzo (2004), Testing for equal distributions in high dimension; Gretton et al.
(2012), A kernel two-sample test.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int
from scipy.spatial.distance import cdist
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from sklearn.neural_network import MLPClassifier

from probdiff.experiments.report import Row, mean_and_se

Points = Float[np.ndarray, "_ _"]
_Distances = Float[np.ndarray, "n n"]
_BLOCK = 500
_GROUPS = 20


class TwoSampleTest(NamedTuple):
    """What a test found."""

    distance: float
    """D² of the two sets, not negative but for rounding."""
    p_value: float
    """Share of divisions with at least this D², in [1/(1 + B), 1]."""


def energy(distances: _Distances) -> _Distances:
    """k(d) = −d, of the energy distance."""
    return -distances


def gaussian(width: float) -> Callable[[_Distances], _Distances]:
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
    k: Callable[[_Distances], _Distances],
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
    at_least, (full, rest) = 0, divmod(num_permutations, _BLOCK)  # as many as fit memory
    for count in [_BLOCK] * full + [rest] * (rest > 0):
        divided = rng.permuted(np.tile(signs, (count, 1)), axis=1).T
        # a division may repeat the sets as they are, up to rounding
        at_least += np.sum(_form(matrix, divided) >= observed - 1e-12)
    return TwoSampleTest(float(observed), float((1 + at_least) / (1 + num_permutations)))


def _centred(matrix: _Distances) -> _Distances:
    """Means of rows and columns taken out: the same D², s having sum 0, with more digits."""
    mean = matrix.mean(0)
    return matrix - mean - mean[:, None] + mean.mean()


def _form(matrix: _Distances, signs: Float[np.ndarray, "n b"]) -> Float[np.ndarray, " b"]:
    """D² of every column of signs."""
    return np.sum(signs * (matrix @ signs), 0)


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


def flat(images: Array | np.ndarray) -> Float[np.ndarray, "n numbers"]:
    """Images as rows of numbers."""
    return np.asarray(images, np.float64).reshape(len(images), -1)


def classifier_of_bytes(
    images: np.ndarray, labels: np.ndarray, epochs: int, seed: int
) -> MLPClassifier:
    """A perceptron of one layer that tells real digits of 256 grey levels apart."""
    perceptron = MLPClassifier((256,), batch_size=128, max_iter=epochs, random_state=seed)
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        return perceptron.fit(bytes_of(images), labels)  # judged on test images, not by it


def bytes_of(images: np.ndarray) -> Float[np.ndarray, "n numbers"]:
    """What `classifier_of_bytes` reads: grey levels as rows of numbers in [0, 1]."""
    return np.asarray(images, np.float32).reshape(len(images), -1) / 255


def classifier_rows(
    classifier: Any, test: np.ndarray, labels: Any, draws: np.ndarray, name: str = "test digits"
) -> tuple[list[Row], Int[np.ndarray, "10"]]:
    """What a classifier of digits says of test images and of draws, and classes of the draws."""
    correct = classifier.predict(test) == np.asarray(labels)
    sure, sure_of_real = (classifier.predict_proba(x).max(1) for x in (draws, test))
    counts = np.bincount(classifier.predict(draws), minlength=10)
    share = counts[counts > 0] / counts.sum()
    rows = [
        Row(f"classifier: right on {name}", *mean_and_se(100 * correct), "%"),
        Row("classifier: probability of its class, test digits", *mean_and_se(sure_of_real)),
        Row("classifier: probability of its class, draws", *mean_and_se(sure)),
        Row("entropy of the classes of the draws", -float(np.sum(share * np.log2(share))), None,
            "bits", math.log2(10)),
    ]  # fmt: skip
    return rows, counts


def baselines(
    train: Array | np.ndarray, validation: Array | np.ndarray, components: tuple[int, ...],
    added: tuple[float, ...], added_to_one: tuple[float, ...], **options: Any,
) -> dict[str, GaussianMixture]:  # fmt: skip
    """The mixture with full covariances, and the Gaussian, that are best on validation images.

    Args:
        train: Images to fit to.
        validation: Images to choose by.
        components: Numbers of components of the mixtures that are tried.
        added: What is added to their variances, each of which is tried.
        added_to_one: The same for the Gaussian.
        **options: Of scikit-learn's `GaussianMixture`.
    """
    train, validation = flat(train), flat(validation)

    def best(counts: tuple[int, ...], added: tuple[float, ...]) -> GaussianMixture:
        tried = [GaussianMixture(n, reg_covar=a, **options) for n in counts for a in added]
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            fitted = [mixture.fit(train) for mixture in tried]  # judged by validation, not by it
        return max(fitted, key=lambda mixture: mixture.score(validation))

    gaussian, mixture = best((1,), added_to_one), best(components, added)
    name = f"Gaussian mixture, {mixture.n_components} components"
    return {name: mixture, "Gaussian, full covariance": gaussian}
