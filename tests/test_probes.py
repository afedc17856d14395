"""Probes find what is in a code, and no more."""

import jax
import numpy as np
import pytest

from probdiff import diagnostics

KEY = jax.random.key(0)


def made(n, noise, seed=0, classes=3):
    """Codes (x, y, distractor) of classes on a circle, with the best possible accuracy near 1."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    angle = 2 * np.pi * labels / classes
    codes = np.stack([np.cos(angle), np.sin(angle), 0 * angle], 1)
    return codes + noise * rng.normal(size=codes.shape), labels


def accuracy(tree):
    group = tree["probes"]
    return dict(zip(group["probe"].values, group["accuracy"].values, strict=True))


def test_a_linear_probe_of_gaussian_classes_reaches_bayes():
    """Two unit Gaussians 2 apart: Φ(1) = 0.8413 is the most there is."""
    rng = np.random.default_rng(1)
    labels = np.arange(4000) % 2
    codes = rng.normal(size=(4000, 2)) + np.outer(2 * labels, [1.0, 0.0])
    given = codes[:2000], labels[:2000], codes[2000:], labels[2000:]
    tree = diagnostics.probe(KEY, *given, few=(), max_epochs=3)
    se = np.sqrt(0.8413 * 0.1587 / 2000)
    assert abs(accuracy(tree)["linear"] - 0.8413) < 4 * se
    group = tree["probes"]
    np.testing.assert_allclose(group["accuracy_se"].sel(probe="linear"), se, rtol=0.05)


def test_what_is_not_linear_is_seen_by_the_perceptron_alone():
    rng = np.random.default_rng(2)
    codes = rng.normal(size=(1600, 2))
    labels = (codes[:, 0] * codes[:, 1] > 0).astype(int)  # exclusive or
    given = codes[:1200], labels[:1200], codes[1200:], labels[1200:]
    found = accuracy(diagnostics.probe(KEY, *given, few=(20,), num_repeats=2))
    assert abs(found["linear"] - 0.5) < 4 * np.sqrt(0.25 / 400) + 0.05
    assert found["perceptron"] > 0.93


@pytest.mark.long
def test_more_labels_and_less_noise_read_better_and_shuffled_ones_by_chance():
    codes, labels = made(600, 0.6)
    given = codes[:400], labels[:400], codes[400:], labels[400:]
    tree = diagnostics.probe(KEY, *given, few=(4, 60), max_epochs=5)
    found, group = accuracy(tree), tree["probes"]
    assert found["linear, 4 a class"] < found["linear, 60 a class"] <= found["linear"] + 0.02
    assert group["correct"].sel(probe="linear, 4 a class").values.max() <= 1
    assert group.attrs["num_examples"] == 200 and group.attrs["width"] == 3
    clear, labels = made(600, 0.1)
    given = clear[:400], labels[:400], clear[400:], labels[400:]
    sharp = diagnostics.probe(KEY, *given, few=(), max_epochs=5)["probes"]
    assert sharp.attrs["silhouette"] > group.attrs["silhouette"] + 0.1
    shuffled = np.random.default_rng(3).permutation(labels[:400])
    chance = accuracy(diagnostics.probe(KEY, clear[:400], shuffled, *given[2:], few=()))
    assert abs(chance["linear"] - 1 / 3) < 0.3


def test_a_constant_entry_and_images_of_codes_are_taken():
    codes, labels = made(90, 0.1)
    codes[:, 2] = 7.0
    images = codes.reshape(90, 3, 1)
    given = images[:60], labels[:60], images[60:], labels[60:]
    tree = diagnostics.probe(KEY, *given, few=(5,), max_epochs=2)
    assert accuracy(tree)["linear"] > 0.9


CODES, LABELS = made(40, 0.1)
REFUSED = {
    "labels must have one class for each of at least two rows": {"labels": LABELS[:-1]},
    "test_codes must be as wide as codes; got 2 and 3": {"test_codes": CODES[:, :2]},
    "codes must be finite": {"codes": np.full((40, 3), np.nan)},
    "test_labels must hold at least two classes": {"test_labels": np.zeros(40, int)},
    r"few must lie in 3\.\.\d+, labels of a class; got \(2,\)": {"few": (2,)},
    r"few must lie in 3\.\.\d+, labels of a class; got \(39,\)": {"few": (39,)},
}


@pytest.mark.parametrize("text", REFUSED)
def test_codes_that_do_not_fit_are_refused(unchecked, text):
    given = {"codes": CODES, "labels": LABELS, "test_codes": CODES, "test_labels": LABELS}
    with pytest.raises(ValueError, match=text):
        diagnostics.probe(KEY, **given | {"few": (3,)} | REFUSED[text])
