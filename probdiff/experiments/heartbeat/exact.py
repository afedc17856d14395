"""The binary heartbeat: what is known of it exactly, and the diffusions that are held to it.

A heartbeat is one of `period` sequences: a 1 in every `period`-th bin, the phase uniform. Given x_t
the posterior over phases depends on x_t only through n_j, the number of ones among the bins of
phase j, and the n_j are independent binomials, with success rate u_1 = ᾱ_t + m (1−ᾱ_t) for the
true phase and u_0 = m (1−ᾱ_t) for the others. So every expectation is a finite sum over counts,
where the counts of the wrong phases are exchangeable and only their multiset matters.

The best reverse step that treats bins alone is the bridge averaged over P(phase | x_t); its KL to
the bridge of the true x_0 is what each step costs. The diffusion of these steps needs no training:
the sequence of phase j has weight w_j ∝ ∏_i q(x_t,i | x_0,i), and p(x_0,i = 1 | x_t) is the weight
of the phases that have a 1 in bin i.

Source: Sohl-Dickstein et al. (2015), section 3.1.2 and appendix D.1.2.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from probdiff import BernoulliKernel, Diffusion, datasets, networks, readouts, schedules
from probdiff.types import Params, Step

RATE = 0.2
LENGTH, PERIOD = 20, 5
_COPIES = 50
SEQUENCES = datasets.heartbeat_sequences(length=LENGTH, period=PERIOD)


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
    beta: Float[np.ndarray, " T"], *, rate: float = RATE, length: int = LENGTH, period: int = PERIOD
) -> Ceilings:
    """What K can reach for a schedule, exactly (float64 sums over counts).

    Args:
        beta: Rates β_1..β_T.
        rate: Stationary rate m of the Bernoulli kernel.
        length: Bins of a sequence, a multiple of `period`.
        period: Bins between two ones.
    """
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    counts = _Counts.of(rate, length // period, period)
    steps = sum(counts.kl(alpha_bar[t - 1 : t + 1], beta[t - 1]) for t in range(2, len(beta) + 1))
    prior = counts.prior_kl(alpha_bar[-1])
    p_1, logs = counts.law(alpha_bar[1]), counts.log_likelihoods(alpha_bar[1])
    top = logs.max(1)
    log_p_1 = top + np.log(np.mean(np.exp(logs - top[:, None]), 1))
    tied, learned = (float(p_1 @ last - steps - prior) for last in counts.last_steps(logs, beta[0]))
    ln_2 = math.log(2)
    return Ceilings(tied / ln_2, learned / ln_2, float(p_1 @ log_p_1) / ln_2, -math.log2(period))


class _Counts(NamedTuple):
    """Ones in the bins of each phase, the true one first, the others sorted: a row each."""

    n: Int[np.ndarray, "rows period"]
    orders: Float[np.ndarray, " rows"]
    """How many orders the others have."""
    rate: float
    repeats: int
    """Bins of a phase."""

    @classmethod
    def of(cls, rate: float, repeats: int, period: int) -> "_Counts":
        each = range(repeats + 1)
        others = Counter(tuple(sorted(c)) for c in itertools.product(each, repeat=period - 1))
        rows = [(n, *c) for n in each for c in others]
        orders = np.array([others[row[1:]] for row in rows], float)
        return cls(np.array(rows), orders, rate, repeats)

    def rates(self, alpha_bar: float) -> tuple[float, float]:
        """Success rates (u_1, u_0) of bins that hold a 1 and a 0 in x_0."""
        return alpha_bar + self.rate * (1 - alpha_bar), self.rate * (1 - alpha_bar)

    def law(self, alpha_bar: float) -> Float[np.ndarray, " rows"]:
        """Probability of each row."""
        k = np.arange(self.repeats + 1)
        choose = np.array([math.comb(self.repeats, i) for i in k])
        true, wrong = (choose * u**k * (1 - u) ** (self.repeats - k) for u in self.rates(alpha_bar))
        return self.orders * true[self.n[:, 0]] * np.prod(wrong[self.n[:, 1:]], axis=1)

    def log_likelihoods(self, alpha_bar: float) -> Float[np.ndarray, "rows period"]:
        """log q(x_t | phase j) for each row and phase."""
        own, other = (
            _times(self.n, u) + _times(self.repeats - self.n, 1 - u) for u in self.rates(alpha_bar)
        )
        rest = [np.delete(other, j, axis=1).sum(1) for j in range(self.n.shape[1])]
        return own + np.stack(rest, axis=1)

    def kl(self, alpha_bar: Float[np.ndarray, "2"], beta: float) -> float:
        """E KL(bridge of the true x_0 ‖ bridge averaged over the phases), nats; ᾱ_s and ᾱ_t."""
        logs = self.log_likelihoods(alpha_bar[1])
        w = np.exp(logs - logs.max(1, keepdims=True))
        w = w / w.sum(1, keepdims=True)
        total = np.zeros(len(self.n))
        for j in range(self.n.shape[1]):
            for x_t, bins in ((1, self.n[:, j]), (0, self.repeats - self.n[:, j])):
                b_0, b_1 = (self.bridge(x_t, x_0, alpha_bar[0], beta) for x_0 in (0, 1))
                true = b_1 if j == 0 else b_0
                total += bins * _binary_kl(true, w[:, j] * b_1 + (1 - w[:, j]) * b_0)
        return float(self.law(alpha_bar[1]) @ total)

    def bridge(self, x_t: int, x_0: int, alpha_bar_s: float, beta: float) -> float:
        """q(x_s = 1 | x_t, x_0)."""
        u_1, u_0 = 1 - beta + self.rate * beta, self.rate * beta
        prior = alpha_bar_s * x_0 + self.rate * (1 - alpha_bar_s)
        one = (u_1 if x_t else 1 - u_1) * prior
        zero = (u_0 if x_t else 1 - u_0) * (1 - prior)
        return one / (one + zero)

    def prior_kl(self, alpha_bar_T: float) -> float:
        """KL(q(x_T | x_0) ‖ π), nats."""
        one, zero = (_binary_kl(u, self.rate) for u in self.rates(alpha_bar_T))
        return float(self.repeats * one + self.repeats * (self.n.shape[1] - 1) * zero)

    def last_steps(
        self, logs: Float[np.ndarray, "rows period"], beta_1: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """log p(x_0 | x_1) for the true x_0: tied, and best factorised."""
        u_1, u_0 = 1 - beta_1 + self.rate * beta_1, self.rate * beta_1
        period = self.n.shape[1]
        right, wrong = self.n[:, 0], self.n[:, 1:].sum(1)
        tied = right * np.log(u_1) + (self.repeats - right) * np.log(u_0)
        tied = tied + wrong * np.log(1 - u_1)
        tied = tied + (self.repeats * (period - 1) - wrong) * np.log(1 - u_0)
        total = np.logaddexp.reduce(logs, axis=1)
        others = [np.logaddexp.reduce(np.delete(logs, j, 1), axis=1) for j in range(period)]
        return tied, self.repeats * (logs[:, 0] + sum(others[1:]) - period * total)


def _times(n: np.ndarray, u: float) -> np.ndarray:
    """n log u with 0 log 0 = 0."""
    return np.where(n > 0, n * (np.log(u) if u > 0 else -np.inf), 0.0)


def _binary_kl(q: float, p: float | np.ndarray) -> float | np.ndarray:
    return q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))


def examples() -> Int[np.ndarray, "rows length"]:
    """The five sequences, each as often as the others: the whole law, with no noise of sampling."""
    return np.tile(SEQUENCES, (_COPIES, 1))


def phases_of(x_0: Int[np.ndarray, "draws length"]) -> Int[np.ndarray, " draws"]:
    """Phase of every draw that is a heartbeat, −1 for the others."""
    same = (np.asarray(x_0)[:, None] == SEQUENCES).all(-1)
    return np.where(same.any(1), same.argmax(1), -1)


@functools.cache  # what is compiled for a diffusion is kept with it
def define(T: int) -> Diffusion:
    """A diffusion of bits that predicts x_0, its last step learned."""
    network = networks.Perceptron(
        (LENGTH,), width=64, depth=3, T=T, bumps=20, outputs=1, rngs=nnx.Rngs(0)
    )
    return _define(T, network, readouts.DataLogits(), readouts.Learned())


@functools.cache
def define_2015(T: int) -> Diffusion:
    """The paper's model: three layers of 50 sigmoids, a read-out of f_b for every step."""
    network = networks.SigmoidPerceptron((LENGTH,), width=50, depth=3, T=T, rngs=nnx.Rngs(0))
    return _define(T, network, readouts.Logits(), readouts.Tied())


@functools.cache
def define_exact(T: int) -> Diffusion:
    """The best diffusion whose steps treat bins alone: its network is the exact posterior."""
    network = exact_network(schedules.steps(schedules.harmonic(T)), SEQUENCES)
    return _define(T, network, readouts.DataLogits(), readouts.Tied())


def with_fewer_steps(diffusion: Diffusion, params: Params, T: int) -> Diffusion:
    """The diffusion of T steps, a divisor of the model's, asking the same network at the same ᾱ_t.

    Its parameters are bound: it has none of its own.
    """
    stride, reverse = diffusion.T // T, diffusion.bind(params)

    def network(x_t: Int[Array, "B length"], t: Int[Array, " B"]) -> Float[Array, "B length"]:
        return reverse.network(x_t, stride * t, None)

    return _define(T, network, diffusion.readout, diffusion.last_step)


@functools.lru_cache(maxsize=8)
def tied(diffusion: Diffusion) -> Diffusion:
    """The same model with its last step tied; the same parameters fit."""
    return _define(diffusion.T, diffusion.network, diffusion.readout, readouts.Tied())


def _define(T: int, network: Any, readout: Any, last_step: readouts.LastStep) -> Diffusion:
    return Diffusion(
        BernoulliKernel(RATE), schedules.harmonic(T), network, event_shape=(LENGTH,),
        readout=readout, last_step=last_step,
    )  # fmt: skip


def exact_network(
    steps: Step, sequences: Int[np.ndarray, "period length"], rate: float = RATE
) -> Callable[[Array, Array], Array]:
    """Network whose output is the exact logit of p(x_0i = 1 | x_t), for equally likely sequences.

    A 1 in bin i belongs to the sequences that have one there, so the logit is the log of their
    posterior weight over that of the others.
    """
    has_one = jnp.asarray(sequences, bool)

    def network(x_t: Int[Array, "B length"], t: Int[Array, " B"]) -> Float[Array, "B length"]:
        noise = steps.noise_t[t - 1][:, None]
        one, zero = 1 - (1 - rate) * noise, rate * noise  # q(x_t = 1 | x_0 = 1), and given 0
        bit_1 = jnp.where(x_t == 1, jnp.log(one), jnp.log1p(-one))
        bit_0 = jnp.where(x_t == 1, jnp.log(zero), jnp.log1p(-zero))
        log_w = jnp.sum(jnp.where(has_one, bit_1[:, None], bit_0[:, None]), -1)[..., None]
        with_one = jax.nn.logsumexp(jnp.where(has_one, log_w, -jnp.inf), 1)
        return with_one - jax.nn.logsumexp(jnp.where(has_one, -jnp.inf, log_w), 1)

    return network
