"""What K can reach on strings of symbols whose law is known, by enumeration.

All strings x_0 and all levels x_t are listed, so posteriors and expectations are finite sums. With
m_i(k | x_t) = P(x_0i = k | x_t) the posterior of one letter, the best reverse step that treats
letters alone is the bridge averaged over it, r_i = Σ_k m_i(k) q(x_s,i | x_t,i, k), and the
diffusion of best steps has

    K = −Σ_i H(X_0i | X_1) − Σ_{t ≥ 2} E Σ_i Σ_k m_i(k) KL( q(· | x_t,i, k) ‖ r_i ) − E KL_T^prior.

It is below −H(X_0), by what letters that change in the same step could have told each other, and
approaches it as T grows. All results are in bits per string.

Sources: Sohl-Dickstein et al. (2015), eqs. 10 to 14; Austin et al. (2021) for the kernels.
"""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

LN_2 = math.log(2)


class Language(NamedTuple):
    """Strings and their probabilities."""

    strings: Int[np.ndarray, "strings length"]
    probs: Float[np.ndarray, " strings"]
    num_letters: int

    @property
    def entropy(self) -> float:
        """H(X_0), bits."""
        return float(-self.probs @ np.log2(self.probs))


class Ceiling(NamedTuple):
    """The best factorised diffusion, bits per string."""

    bound: float
    """K."""
    kl: Float[np.ndarray, " steps"]
    """KL_t for t = 2..T."""
    prior_kl: float


def markov_language(
    first: Float[np.ndarray, " K"], then: Float[np.ndarray, "K K"], length: int
) -> Language:
    """All strings of a Markov chain of letters that have any probability.

    Args:
        first: Law of the first letter.
        then: Row j is the law of the letter after j.
        length: Letters of a string.
    """
    strings = np.array(list(itertools.product(range(len(first)), repeat=length)))
    probs = first[strings[:, 0]] * np.prod(then[strings[:, :-1], strings[:, 1:]], axis=1)
    return Language(strings[probs > 0], probs[probs > 0], len(first))


def ceiling(
    language: Language, beta: Float[np.ndarray, " T"], pi: Float[np.ndarray, " states"]
) -> Ceiling:
    """What K can reach with a learned last step, exactly (float64 sums over all levels).

    Args:
        language: Law of the data, over letters 0..K−1.
        beta: Rates β_1..β_T.
        pi: Law that replaces a letter: K probabilities, or K zeros and a one (absorbing).
    """
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    kl = np.array(
        [
            _step(language, alpha_bar[t - 1 : t + 1], beta[t - 1], pi)
            for t in range(2, len(beta) + 1)
        ]
    )
    law, posteriors = _posteriors(language, alpha_bar[1], pi)
    last = sum(float(law @ _xlogx(m).sum(1)) for m in posteriors)
    prior = _prior_kl(language, alpha_bar[-1], pi)
    terms = np.array([last, *-kl, -prior]) / LN_2
    return Ceiling(float(terms.sum()), kl / LN_2, prior / LN_2)


def _replace(K: int, alpha_bar: float, pi: np.ndarray) -> np.ndarray:
    """q(x_t | x_0) of one letter, rows x_0 among the letters, columns x_t among the states."""
    return alpha_bar * np.eye(len(pi))[:K] + (1 - alpha_bar) * pi


def _posteriors(
    language: Language, alpha_bar: float, pi: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """q(x_t) over all levels in the order of `itertools.product`, and m_i for every letter i."""
    letter = _replace(language.num_letters, alpha_bar, pi)
    rows = [letter[column] for column in language.strings.T]
    joint = language.probs[:, None] * functools.reduce(_outer, rows)
    law = joint.sum(0)
    one_hot = np.eye(language.num_letters)[language.strings]
    scale = np.where(law > 0, law, 1.0)[:, None]
    return law, [joint.T @ one_hot[:, i] / scale for i in range(one_hot.shape[1])]


def _outer(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left[:, :, None] * right[:, None, :]).reshape(len(left), -1)


def _step(language: Language, alpha_bar: np.ndarray, beta: float, pi: np.ndarray) -> float:
    """E Σ_i Σ_k m_i(k) KL(q(· | x_t,i, k) ‖ r_i) at one step, nats."""
    law, posteriors = _posteriors(language, alpha_bar[1], pi)
    bridges = _bridges(language.num_letters, alpha_bar[0], beta, pi)  # (x_t, k, x_s)
    levels = itertools.product(range(len(pi)), repeat=len(posteriors))
    states = np.array(list(levels)).T
    total = 0.0
    for x_t, m in zip(states, posteriors, strict=True):
        mixed = np.einsum("nk,nks->ns", m, bridges[x_t])
        own = _xlogx(bridges).sum(-1)[x_t]
        total += float(law @ ((m * own).sum(1) - _xlogx(mixed).sum(1)))
    return total


def _bridges(K: int, alpha_bar_s: float, beta: float, pi: np.ndarray) -> np.ndarray:
    """q(x_s | x_t, x_0 = k), axes (x_t, k, x_s); zero where x_t cannot come from k."""
    step = (1 - beta) * np.eye(len(pi)) + beta * pi  # rows x_s, columns x_t
    joint = _replace(K, alpha_bar_s, pi)[None] * step.T[:, None]
    norm = joint.sum(-1, keepdims=True)
    return joint / np.where(norm > 0, norm, 1.0)


def _xlogx(p: np.ndarray) -> np.ndarray:
    """p log p with 0 log 0 = 0."""
    return p * np.log(np.where(p > 0, p, 1.0))


def _prior_kl(language: Language, alpha_bar_T: float, pi: np.ndarray) -> float:
    """E KL(q(x_T | x_0) ‖ π), nats."""
    q = _replace(language.num_letters, alpha_bar_T, pi)
    ratio = np.where(q > 0, q, 1.0) / np.where(q > 0, pi, 1.0)
    per_letter = (q * np.log(ratio)).sum(1)
    return float(language.probs @ per_letter[language.strings].sum(1))
