"""SMC on inverse problems with many modes, against their exact posteriors.

See `gaussian_mixtures` for the problems and metrics. A diffusion that misses a mode has its weights
wrong (TV), and log Z with them. Floors are no zero: 2000 draws of the posterior differ from 2000
others, and with the exact twist p(y | x_t) SMC does what its 1000 particles can; what a twist costs
is its SW over that of the exact one on the same problems.

`LaplaceTwist` is told one variance, that of x_0 along its widest direction; "narrow" is told that
of one entry, with which one problem of 20 at (8, 2) missed a mode, and "covariance" all of Σ.

The full table: `pytest -m slow tests/test_smc_mixtures.py -s`; `MIXTURE_PROBLEMS=1` for a short
look at it.
"""

import os

import numpy as np
import pytest

from gaussian_mixtures import (
    Method,
    OptimalTwist,
    Problem,
    Score,
    floor,
    judge,
    means,
    of_entries,
    posterior,
    problem,
    run,
    whole,
)
from probdiff.infer import KernelTwist, LaplaceTwist, PointTwist, TweedieTwist

pytestmark = pytest.mark.filterwarnings("ignore::probdiff.infer.InferenceWarning")

SIZES = [(8, 1), (8, 2), (80, 1), (80, 4)]
PROBLEMS = int(os.environ.get("MIXTURE_PROBLEMS", "20"))
LAPLACE = Method(LaplaceTwist())
RULE_2015 = Method(KernelTwist(), is_weighted=False)
METHODS = {
    "SMC optimal": Method(OptimalTwist()),
    "SMC Laplace": LAPLACE,
    "SMC Laplace, narrow": Method(LaplaceTwist(), variance=of_entries),
    "SMC Laplace, covariance": Method(LaplaceTwist(), variance=whole),
    "SMC Tweedie": Method(TweedieTwist()),
    "guided, point": Method(PointTwist(), is_weighted=False),
    "guided, 2015": RULE_2015,
}
SHIPPED = ("SMC Laplace", "SMC Laplace, narrow", "SMC Laplace, covariance", "SMC Tweedie")


def test_evidence_by_hand_is_the_mean_of_the_likelihood():
    """The oracle's Z against exact draws of the prior."""
    p, rng, n = problem(0, 8, 1), np.random.default_rng(0), 400_000
    x = means(8)[rng.choice(25, p=p.weights, size=n)] + rng.normal(size=(n, 8))
    r = np.exp(-0.5 * ((p.y - x @ p.matrix.T)[:, 0] / p.noise) ** 2)
    r /= p.noise * np.sqrt(2 * np.pi)
    assert abs(r.mean() - np.exp(posterior(p).log_z)) < 4 * r.std() / np.sqrt(n)
    mean = (r[:, None] * x).mean(0) / r.mean()
    error = (r[:, None] * (x - mean)).std(0) / np.sqrt(n) / r.mean()
    q = posterior(p)
    assert (np.abs(mean - q.weights @ q.means) < 4 * error).all()


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1])
def test_modes_and_evidence_are_found(seed):
    score = run(seed, 8, 1, LAPLACE)
    assert score.tv < 0.06
    assert abs(score.log_z_error) < 0.35  # of which the 100-step diffusion itself has 0.15
    assert score.least_ess > 0.2
    assert score.sw < 0.5


@pytest.mark.long
@pytest.mark.parametrize(
    ("entry", "y", "noise"),
    [(1, 0.5, 0.1), (1, 0.5, 8.0), (0, 0.0, 2.0), (0, 0.0, 8.0)],
    ids=["blind, sharp", "blind", "between", "between, wide"],
)
def test_two_modes_keep_their_weights(entry, y, noise):
    """Modes at ±(8, 0, …), 0.7 and 0.3: entry 1 says nothing of which, entry 0 is halfway."""
    weights, matrix = np.full(25, 1e-12), np.eye(8)[entry : entry + 1]
    weights[[7, 17]] = 0.7, 0.3
    score = judge(Problem(weights, matrix, noise, np.array([y])), LAPLACE, seed=0)
    assert score.tv < 0.05
    assert abs(score.log_z_error) < 0.2


@pytest.mark.long
def test_unweighted_guidance_does_not_find_the_modes():
    """What a metric must see: the rule of 2015 is far from the posterior."""
    assert run(0, 8, 1, RULE_2015).tv > 0.2


@pytest.mark.slow
@pytest.mark.parametrize(("dx", "dy"), SIZES)
def test_a_twist_costs_little_next_to_the_exact_one(dx, dy):
    """Means over problems; the least ESS is the mean of each problem's least over its levels.

    In 80 dimensions one number for the variance, as `LaplaceTwist` then has it, is not enough: at
    (80, 1) its SW was 1.30 ± 0.18 times that of the exact twist and its TV 0.034 ± 0.008, at
    (80, 4) one problem of 20 missed a mode. There the best twist is held to the limits.
    """
    table = {"exact": [floor(seed, dx, dy) for seed in range(PROBLEMS)]}
    for name, method in METHODS.items():
        table[name] = [run(seed, dx, dy, method) for seed in range(PROBLEMS)]
    table = {name: Score(*np.array(scores).T) for name, scores in table.items()}
    optimal, ours = table["SMC optimal"], table["SMC Laplace"]
    print(f"\n({dx}, {dy}), {PROBLEMS} problems")
    for name, score in table.items():
        print(line(name, score, optimal))
    best = min((table[name] for name in SHIPPED), key=lambda score: score.sw.mean())
    for score in (best,) if dx == 80 else (best, ours):
        assert score.sw.mean() <= 1.25 * optimal.sw.mean()
        assert score.tv.mean() <= 0.03
    assert abs(ours.log_z_error.mean()) <= 0.05 + 2 * error(ours.log_z_error)
    assert ours.least_ess.mean() >= 0.3


def error(values):
    """Standard error of a mean; 0 of one value."""
    return values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0


def ratio(a, b):
    """Ratio of the means of a and b, and its standard error by resampling problems."""
    pick = np.random.default_rng(0).integers(len(a), size=(2000, len(a)))
    return a.mean() / b.mean(), (a[pick].mean(1) / b[pick].mean(1)).std()


def line(name, score, optimal):
    """A row of the table."""
    parts = [f"{field} {v.mean():7.3f} ± {error(v):.3f}" for field, v in score._asdict().items()]
    parts.append(f"(least {score.least_ess.min():.3f})")
    parts.append("SW / optimal {:.3f} ± {:.3f}".format(*ratio(score.sw, optimal.sw)))
    return f"  {name:24s} " + "  ".join(parts)
