"""What K can reach on the binary heartbeat, by counting ones per phase.

A heartbeat is one of `period` sequences: a 1 in every `period`-th bin, the phase uniform. Given x_t
the posterior over phases depends on x_t only through n_j, the number of ones among the bins of
phase j, and the n_j are independent binomials, with success rate u_1 = ᾱ_t + m (1−ᾱ_t) for the
true phase and u_0 = m (1−ᾱ_t) for the others. So every expectation is a finite sum over counts,
where the counts of the wrong phases are exchangeable and only their multiset matters.

The best reverse step that treats bins alone is the bridge averaged over P(phase | x_t); its KL to
the bridge of the true x_0 is what each step costs. All results in bits per sequence.

Source: Sohl-Dickstein et al. (2015), section 3.1.2 and appendix D.1.2.
"""

import itertools
import math
from collections import Counter
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

LN_2 = math.log(2)


class Ceilings(NamedTuple):
    """Limits on K, bits per sequence."""

    tied: float
    """K with the best factorised reverse steps and a tied last step."""
    learned: float
    """The same with the best factorised last step."""
    tied_limit: float
    """−H(X_1): no K with a tied last step is above."""
    learned_limit: float
    """−H(X_0) = −log2(period): no K is above."""


def ceilings(
    beta: Float[np.ndarray, " T"], *, rate: float = 0.2, length: int = 20, period: int = 5
) -> Ceilings:
    """What K can reach for a schedule, exactly (float64 sums over counts).

    Args:
        beta: Rates β_1..β_T.
        rate: Stationary rate m of the Bernoulli kernel.
        length: Bins of a sequence, a multiple of `period`.
        period: Bins between two ones.
    """
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    counts, weights = _counts(length // period, period)
    steps = sum(
        _kl(counts, weights, alpha_bar, t, beta[t - 1], rate, length // period)
        for t in range(2, len(beta) + 1)
    )
    last = _prior_kl(alpha_bar[-1], rate, length, period)
    p_1 = _law_of_counts(counts, weights, alpha_bar[1], rate, length // period)
    log_tied, log_learned = _last_step(counts, alpha_bar[1], beta[0], rate, length // period)
    return Ceilings(
        tied=float(p_1 @ log_tied - steps - last) / LN_2,
        learned=float(p_1 @ log_learned - steps - last) / LN_2,
        tied_limit=float(p_1 @ _log_p_1(counts, alpha_bar[1], rate, length // period)) / LN_2,
        learned_limit=-math.log2(period),
    )


def _counts(repeats: int, period: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts (true phase first, the others sorted), and how many orders the others have."""
    others = Counter(
        tuple(sorted(c)) for c in itertools.product(range(repeats + 1), repeat=period - 1)
    )
    rows = [(n, *c) for n in range(repeats + 1) for c in others]
    orders = [others[row[1:]] for row in rows]
    return np.array(rows), np.array(orders, float)


def _rates(alpha_bar: float, rate: float) -> tuple[float, float]:
    """Success rates (u_1, u_0) of bins that hold a 1 and a 0 in x_0."""
    return alpha_bar + rate * (1 - alpha_bar), rate * (1 - alpha_bar)


def _law_of_counts(
    counts: np.ndarray, weights: np.ndarray, alpha_bar: float, rate: float, repeats: int
) -> np.ndarray:
    """Probability of each row of counts."""
    u_1, u_0 = _rates(alpha_bar, rate)
    choose = np.array([math.comb(repeats, k) for k in range(repeats + 1)])
    k = np.arange(repeats + 1)
    true, wrong = (choose * u**k * (1 - u) ** (repeats - k) for u in (u_1, u_0))
    return weights * true[counts[:, 0]] * np.prod(wrong[counts[:, 1:]], axis=1)


def _log_likelihoods(counts: np.ndarray, alpha_bar: float, rate: float, repeats: int) -> np.ndarray:
    """log q(x_t | phase j) for each row and phase, (rows, period)."""
    u_1, u_0 = _rates(alpha_bar, rate)
    own = _times(counts, u_1) + _times(repeats - counts, 1 - u_1)
    other = _times(counts, u_0) + _times(repeats - counts, 1 - u_0)
    rest = [np.delete(other, j, axis=1).sum(1) for j in range(counts.shape[1])]
    return own + np.stack(rest, axis=1)


def _times(n: np.ndarray, u: float) -> np.ndarray:
    """n log u with 0 log 0 = 0."""
    return np.where(n > 0, n * (np.log(u) if u > 0 else -np.inf), 0.0)


def _posterior(counts: np.ndarray, alpha_bar: float, rate: float, repeats: int) -> np.ndarray:
    """P(phase | x_t), (rows, period)."""
    logs = _log_likelihoods(counts, alpha_bar, rate, repeats)
    weights = np.exp(logs - logs.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def _bridge(x_t: int, x_0: int, alpha_bar_s: float, beta: float, rate: float) -> float:
    """q(x_s = 1 | x_t, x_0)."""
    u_1, u_0 = 1 - beta + rate * beta, rate * beta
    prior = alpha_bar_s * x_0 + rate * (1 - alpha_bar_s)
    one = (u_1 if x_t else 1 - u_1) * prior
    zero = (u_0 if x_t else 1 - u_0) * (1 - prior)
    return one / (one + zero)


def _kl(
    counts: np.ndarray,
    weights: np.ndarray,
    alpha_bar: np.ndarray,
    t: int,
    beta: float,
    rate: float,
    repeats: int,
) -> float:
    """E KL(bridge of the true x_0 ‖ bridge averaged over the phases) at step t, nats."""
    w = _posterior(counts, alpha_bar[t], rate, repeats)
    total = np.zeros(len(counts))
    for j in range(counts.shape[1]):
        for x_t, bins in ((1, counts[:, j]), (0, repeats - counts[:, j])):
            b_0, b_1 = (_bridge(x_t, x_0, alpha_bar[t - 1], beta, rate) for x_0 in (0, 1))
            true = b_1 if j == 0 else b_0
            mixed = w[:, j] * b_1 + (1 - w[:, j]) * b_0
            total += bins * _binary_kl(true, mixed)
    return float(_law_of_counts(counts, weights, alpha_bar[t], rate, repeats) @ total)


def _binary_kl(q: float, p: float | np.ndarray) -> float | np.ndarray:
    return q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))


def _prior_kl(alpha_bar_T: float, rate: float, length: int, period: int) -> float:
    """KL(q(x_T | x_0) ‖ π), nats."""
    u_1, u_0 = _rates(alpha_bar_T, rate)
    ones = length // period
    return float(ones * _binary_kl(u_1, rate) + (length - ones) * _binary_kl(u_0, rate))


def _log_p_1(counts: np.ndarray, alpha_bar_1: float, rate: float, repeats: int) -> np.ndarray:
    """log p(x_1) under the data, rows of counts."""
    logs = _log_likelihoods(counts, alpha_bar_1, rate, repeats)
    top = logs.max(1)
    return top + np.log(np.mean(np.exp(logs - top[:, None]), 1))


def _last_step(
    counts: np.ndarray, alpha_bar_1: float, beta_1: float, rate: float, repeats: int
) -> tuple[np.ndarray, np.ndarray]:
    """log p(x_0 | x_1) for the true x_0: tied, and best factorised."""
    u_1, u_0 = 1 - beta_1 + rate * beta_1, rate * beta_1
    right, wrong = counts[:, 0], counts[:, 1:].sum(1)
    zeros = repeats * (counts.shape[1] - 1)
    tied = (
        right * np.log(u_1)
        + (repeats - right) * np.log(u_0)
        + wrong * np.log(1 - u_1)
        + (zeros - wrong) * np.log(1 - u_0)
    )
    logs = _log_likelihoods(counts, alpha_bar_1, rate, repeats)
    total = np.logaddexp.reduce(logs, axis=1)
    others = [np.logaddexp.reduce(np.delete(logs, j, 1), axis=1) for j in range(logs.shape[1])]
    learned = repeats * (logs[:, 0] + sum(others[1:]) - logs.shape[1] * total)
    return tied, learned
