"""Probes: what a classifier reads off codes that were made without labels.

    linear        logistic regression of the standardised code, its penalty by validation rows
    perceptron    512 rectified units, its rate of learning chosen and stopped likewise
    few labels    logistic regression from k labels a class, its penalty by cross-validation
    silhouette    mean over examples of (b − a)/max(a, b): a the mean distance to the same class, b
                  that to the nearest other

A linear probe says what is laid out plainly, a perceptron what is there; from few labels a code is
worth what it spares. Codes are compared on the same examples, so that errors are paired.

Sources: Alain and Bengio (2017) for probes; Mittal et al. (2023) for the perceptron, here without
dropout; Rousseeuw (1987) for the silhouette.
"""

import math
import warnings
from typing import Any

import jax
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, Int

from probdiff.arguments import (
    INNER_SHARE,
    as_array,
    check_at_least,
    check_key,
    check_number,
    check_shape,
    read_array,
    shown,
)

_PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Inverses C of the penalty's weight."""
_RATES = (1e-3, 2e-4)
"""Rates of learning of the perceptron."""
_UNITS, _BATCH, _WEIGHT_DECAY = 512, 256, 1e-5
_FOLDS = 3


def probe(
    key: Array, codes: Float[Any, "N ..."], labels: Int[Any, " N"], test_codes: Float[Any, "M ..."],
    test_labels: Int[Any, " M"], *, few: tuple[int, ...] = (10, 100), num_repeats: int = 5,
    validation: float = 0.2, max_epochs: int = 100,
) -> xr.DataTree:  # fmt: skip
    """Which test examples classifiers of the codes get right.

    Args:
        key: Splits off validation rows, and draws the few labels and the perceptron's weights.
        codes: One code per row; any number of axes, which are flattened.
        labels: Their classes.
        test_codes, test_labels: What is classified.
        few: Numbers of labels a class, each at least 3 and no more than the rarest class has.
        num_repeats: Draws of the few labels, averaged.
        validation: Share of the rows by which penalty, rate and stop are chosen; the linear probe
            is then fitted to all.
        max_epochs: Most passes of the perceptron over its rows.

    Returns:
        DataTree with group `probes`: `correct` by `probe` and `example`, 0 or 1, or the share of
        repeats; `accuracy` and `accuracy_se` by `probe`, over examples. Probes are "linear",
        "perceptron" and "linear, k a class". Attributes: `silhouette` of the standardised test
        codes, `num_examples`, `width`.

    Raises:
        ValueError: if shapes do not fit, there are fewer than two classes, codes are not finite, or
            a class has too few labels.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> labels = np.arange(400) % 4
        >>> codes = np.eye(4)[labels] + 0.1 * rng.normal(size=(400, 4))
        >>> given = codes[:300], labels[:300], codes[300:], labels[300:]
        >>> tree = diagnostics.probe(jax.random.key(0), *given, few=(10,), max_epochs=5)
        >>> tree["probes"]["accuracy"].sel(probe="linear").item()
        1.0
        >>> tree["probes"].attrs["silhouette"] > 0.5
        True
    """
    check_key(key)
    given = _checked(codes, labels, test_codes, test_labels)
    few = check_shape("few", few)
    check_at_least(1, num_repeats=num_repeats, max_epochs=max_epochs)
    check_number(INNER_SHARE, validation=validation)
    x, y, x_test, y_test = given
    rarest = int(np.unique(y, return_counts=True)[1].min())
    if few and not _FOLDS <= min(few) <= max(few) <= rarest:
        raise ValueError(f"few must lie in {_FOLDS}..{rarest}, labels of a class; got {few}")
    rng = np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))
    mean, sd = x.mean(0), x.std(0)
    x, x_test = ((a - mean) / np.where(sd > 0, sd, 1.0) for a in (x, x_test))
    is_kept = _split(rng, y, validation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what has not converged is judged all the same
        correct = {
            "linear": _linear(x, y, is_kept, x_test) == y_test,
            "perceptron": _perceptron(rng, x, y, is_kept, x_test, max_epochs) == y_test,
        }
        for count in few:
            hits = [_few(rng, x, y, count, x_test) == y_test for _ in range(num_repeats)]
            correct[f"linear, {count} a class"] = np.mean(hits, 0)
        from sklearn.metrics import silhouette_score

        silhouette = float(silhouette_score(x_test, y_test))
    values = np.stack([np.asarray(hit, np.float64) for hit in correct.values()])
    count = len(y_test)
    variables = {
        "correct": (("probe", "example"), values),
        "accuracy": ("probe", values.mean(1)),
        "accuracy_se": ("probe", values.std(1, ddof=1) / math.sqrt(count)),
    }
    coords = {"probe": list(correct), "example": np.arange(count)}
    attrs = {"silhouette": silhouette, "num_examples": count, "width": x.shape[1]}
    return xr.DataTree.from_dict({"probes": xr.Dataset(variables, coords, attrs)})


def _checked(codes: Any, labels: Any, test_codes: Any, test_labels: Any) -> list[np.ndarray]:
    """Flat codes in float64, and labels as numbers of classes, refused where they do not fit."""
    found = []
    for name, x, y in (("codes", codes, labels), ("test_codes", test_codes, test_labels)):
        label = name.replace("codes", "labels")
        rows = np.asarray(as_array(name, x, is_finite=True), np.float64)
        classes = np.asarray(read_array(label, y, jax.numpy.integer))
        if rows.ndim < 1 or classes.ndim != 1 or len(rows) != len(classes) or len(rows) < 2:
            raise ValueError(
                f"{label} must have one class for each of at least two rows of {name}; got shapes "
                f"{classes.shape} and {rows.shape}"
            )
        found += [rows.reshape(len(rows), -1), classes]
    if found[0].shape[1] != found[2].shape[1] or not found[0].shape[1]:
        raise ValueError(
            f"test_codes must be as wide as codes; got {found[2].shape[1]} and {found[0].shape[1]}"
        )
    for label, classes in (("labels", found[1]), ("test_labels", found[3])):
        if not 2 <= len(np.unique(classes)) < len(classes):
            raise ValueError(
                f"{label} must hold at least two classes, and fewer than rows; got {shown(classes)}"
            )
    return found


def _split(rng: np.random.Generator, y: np.ndarray, validation: float) -> np.ndarray:
    """Rows to fit: of each class the same share, at least one."""
    is_kept = np.ones(len(y), bool)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        is_kept[rows[: min(len(rows) - 1, round(validation * len(rows)))]] = False
    return is_kept


def _linear(x: np.ndarray, y: np.ndarray, is_kept: np.ndarray, x_test: np.ndarray) -> np.ndarray:
    """Classes of test codes."""
    from sklearn.linear_model import LogisticRegression  # slow to import

    def fitted(penalty: float, rows: Any) -> Any:
        return LogisticRegression(C=penalty, max_iter=500).fit(x[rows], y[rows])

    rest = ~is_kept
    best = max(_PENALTIES, key=lambda c: fitted(c, is_kept).score(x[rest], y[rest]))
    return fitted(best, slice(None)).predict(x_test)


def _perceptron(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, is_kept: np.ndarray,
    x_test: np.ndarray, max_epochs: int,
) -> np.ndarray:  # fmt: skip
    """Classes of test codes."""
    from sklearn.neural_network import MLPClassifier

    fitted, rest = [], ~is_kept
    for rate in _RATES:
        model = MLPClassifier(
            _UNITS, learning_rate_init=rate, alpha=_WEIGHT_DECAY, early_stopping=True,
            batch_size=min(_BATCH, int(is_kept.sum())), max_iter=max_epochs,
            random_state=int(rng.integers(2**31)),
        ).fit(x[is_kept], y[is_kept])  # fmt: skip
        fitted.append((model.score(x[rest], y[rest]), model))
    return max(fitted, key=lambda pair: pair[0])[1].predict(x_test)


def _few(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, count: int, x_test: np.ndarray
) -> np.ndarray:
    """Classes of test codes, from a few labels of each class."""
    from sklearn.linear_model import LogisticRegressionCV

    rows = np.concatenate(
        [rng.choice(np.flatnonzero(y == label), count, replace=False) for label in np.unique(y)]
    )
    model = LogisticRegressionCV(Cs=_PENALTIES, cv=_FOLDS, max_iter=500)
    return model.fit(x[rows], y[rows]).predict(x_test)
