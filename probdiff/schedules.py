"""Diffusion rates β_1..β_T: how fast the forward trajectory forgets the data.

A schedule is an array of shape `(T,)`, β_t in (0, 1); β_T = 1 is allowed and forgets everything.
With ᾱ_t = ∏ (1 − β), level t of a Gaussian diffusion has signal-to-noise ratio ᾱ_t / (1 − ᾱ_t).

    harmonic        β_t = 1 / (T − t + 1), hence ᾱ_t = 1 − t/T (2015, binomial diffusion)
    linear          β_t from β_1 to β_T in equal steps (Ho et al. 2020)
    cosine          ᾱ_t ∝ cos² (Nichol & Dhariwal 2021)
    log_snr_linear  log ᾱ_t/(1 − ᾱ_t) in equal steps: every step costs a like number of nats

`learned(beta)` makes β_2..β_T a parameter. β_1 stays fixed bit for bit: under a tied last step
K ≤ −H(X_1), and for data on a curve or a grid shrinking β_1 raises that without limit, so a learned
β_1 finds spikes, not structure.

Sources: Sohl-Dickstein et al. (2015), section 2.4.1; Kingma et al. (2021) for the log-SNR scale.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int

from probdiff.arguments import (
    INNER_SHARE,
    POSITIVE_SHARE,
    Range,
    as_array,
    check_at_least,
    check_number,
    check_object,
    check_text,
)
from probdiff.types import Step

_OFFSETS = Range("lie in (0, 1000]", lambda x: 0 < x <= 1000)
"""Beyond, the cosine is a straight line and its differences have no digits."""


def harmonic(T: int) -> Float[np.ndarray, " T"]:
    """Erase 1/T of the signal per step: β_t = 1 / (T − t + 1), hence ᾱ_t = 1 − t/T, β_T = 1.

    Args:
        T: Number of steps, at least 2.

    Raises:
        ValueError: if T is below 2.

    Example:
        >>> beta = schedules.harmonic(5)
        >>> np.round(beta, 3).tolist()
        [0.2, 0.25, 0.333, 0.5, 1.0]
        >>> np.round(np.cumprod(1 - beta), 3).tolist()  # ᾱ_t = 1 − t/5
        [0.8, 0.6, 0.4, 0.2, 0.0]

    Source: Sohl-Dickstein et al. (2015), section 2.4.1.
    """
    check_at_least(2, T=T)
    return 1 / (T - np.arange(1, T + 1) + 1.0)


def linear(T: int, *, beta_1: float = 1e-4, beta_T: float = 0.02) -> Float[np.ndarray, " T"]:
    """β_t in equal steps from `beta_1` to `beta_T` (Ho et al. 2020: 1e-4 to 0.02, T = 1000).

    Args:
        T: Number of steps, at least 2. The data are forgotten if T is large or `beta_T` is; the
            default rates are meant for T = 1000.
        beta_1: First rate, in (0, 1).
        beta_T: Last rate, in (0, 1].

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> np.round(schedules.linear(5, beta_1=0.1, beta_T=0.5), 3).tolist()
        [0.1, 0.2, 0.3, 0.4, 0.5]
        >>> left = [np.prod(1 - schedules.linear(T)) for T in (1000, 40)]  # ᾱ_T
        >>> np.round(left, 2).tolist()  # 40 such steps forget a third of the variance
        [0.0, 0.67]

    Source: Ho et al. (2020), section 4.
    """
    check_at_least(2, T=T)
    check_number(INNER_SHARE, beta_1=beta_1)
    check_number(POSITIVE_SHARE, beta_T=beta_T)
    return np.linspace(beta_1, beta_T, T)


def cosine(T: int, *, offset: float = 0.008, beta_max: float = 0.999) -> Float[np.ndarray, " T"]:
    """ᾱ_t = f(t)/f(0) with f(t) = cos²(π/2 · (t/T + offset)/(1 + offset)), β_t at most `beta_max`.

    The limit keeps β_T below 1, as in the source.

    Args:
        T: Number of steps, at least 2.
        offset: Keeps the first steps from being too small; in (0, 1000].
        beta_max: Largest rate, in (0, 1].

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> beta = schedules.cosine(100)
        >>> round(float(np.prod(1 - beta[:50])), 2)  # half of the variance is left half way
        0.49
        >>> round(float(beta[-1]), 3)
        0.999

    Source: Nichol & Dhariwal (2021), equation 17.
    """
    check_at_least(2, T=T)
    check_number(POSITIVE_SHARE, beta_max=beta_max)
    check_number(_OFFSETS, offset=offset)
    angle = 0.5 * math.pi * (np.arange(T + 1) / T + offset) / (1 + offset)
    alpha_bar = np.cos(angle) ** 2
    return check_beta(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], beta_max))


def log_snr_linear(T: int, *, beta_1: float, alpha_bar_T: float) -> Float[np.ndarray, " T"]:
    """log ᾱ_t/(1 − ᾱ_t) in equal steps from ᾱ_1 = 1 − `beta_1` to `alpha_bar_T`.

    Args:
        T: Number of steps, at least 2.
        beta_1: First rate, the share of noise in x_1; in (0, 1).
        alpha_bar_T: Share of the data's variance left in x_T; in (0, 1 − `beta_1`).

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> beta = schedules.log_snr_linear(5, beta_1=0.01, alpha_bar_T=0.01)
        >>> alpha_bar = np.cumprod(1 - beta)
        >>> log_snr = np.log(alpha_bar / (1 - alpha_bar))
        >>> np.round(log_snr / log_snr[0], 3).tolist()  # equal steps, log 99 to −log 99
        [1.0, 0.5, 0.0, -0.5, -1.0]

    Source: Kingma et al. (2021) for the scale.
    """
    check_at_least(2, T=T)
    check_number(INNER_SHARE, beta_1=beta_1, alpha_bar_T=alpha_bar_T)
    if alpha_bar_T >= 1 - beta_1:
        raise ValueError(f"alpha_bar_T must be below 1 - beta_1 = {1 - beta_1}; got {alpha_bar_T}")
    first = math.log1p(-beta_1) - math.log(beta_1)
    last = math.log(alpha_bar_T) - math.log1p(-alpha_bar_T)
    log_alpha_bar = -np.logaddexp(0, -np.linspace(first, last, T))
    return check_beta(-np.expm1(np.diff(log_alpha_bar, prepend=0.0)))


@dataclasses.dataclass(frozen=True)
class LearnedRates:
    """A schedule whose β_2..β_T are trained; made by `learned`.

    Args:
        beta: Initial rates β_1..β_T; the first stays as it is.
    """

    beta: np.ndarray

    def __call__(self, name: str) -> Float[Array, " T"]:
        """Rates at a `numpyro.param` site of this name, β_1 put before it unchanged."""
        check_text(name=name)
        init = jnp.asarray(self.beta[1:], jnp.result_type(float))
        rest = numpyro.param(name, init, constraint=dist.constraints.unit_interval)
        return jnp.concatenate([jnp.asarray(self.beta[:1], init.dtype), rest])


def learned(beta: Any) -> LearnedRates:
    """Make β_2..β_T one trained `numpyro.param`, starting at `beta`; β_1 is pinned.

    Gradients flow through x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε with ε held fixed ("frozen noise").

    Args:
        beta: Initial rates β_1..β_T in (0, 1), shape `(T,)`.

    Returns:
        A schedule to hand to `Diffusion` in place of rates; its site is `name_beta`, β_2..β_T.

    Raises:
        ValueError: if a rate is outside (0, 1); β_T = 1 cannot be trained.

    Example:
        >>> diffusion = standard_diffusion(beta=schedules.learned(schedules.cosine(5)))
        >>> diffusion.params_template["x_0_beta"].shape  # β_2..β_5
        (4,)

        Frozen noise: under one key a draw of x_2 moves smoothly with the rates.

        >>> def x_2(beta):
        ...     step = schedules.steps(beta).at(2, event_dim=0)
        ...     return GaussianKernel().marginal(jnp.array(1.0), step).sample(jax.random.key(0))
        >>> beta = jnp.array([0.1, 0.3])
        >>> change = (x_2(beta.at[1].add(0.01)) - x_2(beta.at[1].add(-0.01))) / 0.02
        >>> bool(jnp.isclose(jax.grad(x_2)(beta)[1], change, rtol=1e-2))
        True

    Source: Sohl-Dickstein et al. (2015), section 2.4.1.
    """
    beta = check_beta(beta)
    if beta[-1] >= 1:
        raise ValueError("beta must lie in (0, 1) to be learned; got beta_T = 1")
    return LearnedRates(beta)


def check_beta(beta: Any) -> Float[np.ndarray, " T"]:
    """The rates as a float64 array `(T,)`, or a `ValueError` that says what is wrong with them.

    Args:
        beta: Rates β_1..β_T, T at least 2; in (0, 1), β_T in (0, 1].

    Example:
        >>> schedules.check_beta([0.1, 0.2, 1.0]).dtype
        dtype('float64')
        >>> schedules.check_beta([0.1, 1.0, 0.2])
        Traceback (most recent call last):
            ...
        ValueError: beta must lie in (0, 1); got 1.0 at t = 2
    """
    beta = np.asarray(as_array("beta", beta), np.float64)
    if beta.ndim != 1 or beta.shape[0] < 2:
        raise ValueError(f"beta must have shape (T,) with T of at least 2; got shape {beta.shape}")
    inside = (beta > 0) & (beta < 1)
    inside[-1] = 0 < beta[-1] <= 1
    if not inside.all():
        t = int(np.flatnonzero(~inside)[0]) + 1
        interval = "(0, 1]" if t == len(beta) else "(0, 1)"
        raise ValueError(f"beta must lie in {interval}; got {beta[t - 1]} at t = {t}")
    return beta


def steps(beta: Any) -> Step:
    """All coefficients of a schedule, as a `Step` of arrays `(T,)`.

    Fixed rates (a NumPy array) are multiplied up in float64; traced rates in their own precision,
    where summing log(1 − β) and taking expm1 keeps the digits of 1 − ᾱ.

    Args:
        beta: Rates β_1..β_T, a NumPy or JAX array `(T,)`.

    Returns:
        The table: t, β_t, ᾱ_s, ᾱ_t, 1 − ᾱ_s and 1 − ᾱ_t in JAX's default float, s = t − 1;
        `table.at(t, event_dim)` picks a step's.

    Example:
        >>> schedules.steps(schedules.harmonic(4)).alpha_bar_t.tolist()
        [0.75, 0.5, 0.25, 0.0]
        >>> table = schedules.steps(np.array([1e-9, 0.5]))
        >>> f"{table.noise_t[0]:.1e}", f"{1 - table.alpha_bar_t[0]:.1e}"  # 1 − ᾱ_1 keeps its digits
        ('1.0e-09', '0.0e+00')
    """
    beta = as_array("beta", beta, "T")
    beta = check_beta(beta) if isinstance(beta, np.ndarray) else beta
    xp = np if isinstance(beta, np.ndarray) else jnp
    with np.errstate(divide="ignore"):  # log(0) = −inf is right for β_T = 1: ᾱ_T = 0
        log_alpha_bar_t = xp.cumsum(xp.log1p(-beta))
    log_alpha_bar_s = xp.concatenate([xp.zeros_like(log_alpha_bar_t[:1]), log_alpha_bar_t[:-1]])
    logs = (log_alpha_bar_s, log_alpha_bar_t)
    columns = (beta, *(xp.exp(a) for a in logs), *(-xp.expm1(a) for a in logs))
    t = jnp.arange(1, beta.shape[0] + 1, dtype=jnp.int32)
    return Step(t, *(jnp.asarray(column, jnp.result_type(float)) for column in columns))


def respaced(table: Step, steps: int) -> tuple[Int[np.ndarray, " n"], Step]:
    """Fewer and longer steps: n levels of a table, evenly spread, the first and the last of them.

    Args:
        table: Coefficients of all T steps.
        steps: Number n of them, in 2..T.

    Returns:
        The levels' times, and the coefficients of the step from each level to the one before it;
        their `t` is the time.

    Raises:
        ValueError: if n is not in 2..T.

    Example:
        >>> table = schedules.steps(schedules.harmonic(9))
        >>> times, longer = schedules.respaced(table, 3)
        >>> times.tolist()
        [1, 5, 9]
        >>> [round(a, 3) for a in longer.alpha_bar_s.tolist()]  # of the levels 0, 1 and 5
        [1.0, 0.889, 0.444]
    """
    check_object(Step, "the table of schedules.steps", table=table)
    check_at_least(0, steps=steps)
    if not 2 <= steps <= table.T:
        raise ValueError(f"steps must lie in 2..T = {table.T}; got {steps}")
    times = evenly_spread(table.T, steps)
    if steps == table.T:
        return times, table
    return times, table.between(times, np.concatenate([[0], times[:-1]]))


def evenly_spread(T: int, n: int) -> Int[np.ndarray, " n"]:
    """n times of 1..T, evenly spread, the first and the last of them.

    Example:
        >>> schedules.evenly_spread(10, 4).tolist()
        [1, 4, 7, 10]
    """
    check_at_least(1, T=T, n=n)
    return np.unique(np.round(np.linspace(1, T, n)).astype(int))
