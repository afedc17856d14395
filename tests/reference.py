"""The Gaussian diffusion of the 2015 paper in plain NumPy, float64: the oracle of the other tests.

β_1..β_T is an array whose entry t − 1 belongs to step t; so is everything else that has one entry
per step. s = t − 1. Values are in nats, summed over dimensions unless said otherwise.

Gaussian data x_0 ~ N(0, C) make everything known. With C_t = ᾱ_t C + (1 − ᾱ_t) I,

    Cov(x_s, x_t) = √α_t C_s,        x_s | x_t ~ N(A_t x_t, S_t),
    A_t = √α_t C_s C_t⁻¹,            S_t = C_s − α_t C_s C_t⁻¹ C_s.

Source: Sohl-Dickstein et al. (2015), sections 2.1 to 2.4 and appendices A and B.
"""

from typing import NamedTuple

import numpy as np

LOG_2_PI_E = np.log(2 * np.pi * np.e)


class ReverseTrajectory(NamedTuple):
    """Linear reverse kernels, p(x_s | x_t) = N(A[t − 1] x_t, covariance[t − 1])."""

    A: np.ndarray
    covariance: np.ndarray


class EntropyBounds(NamedTuple):
    """lower[t − 1] ≤ H_q(X_s | X_t) ≤ upper[t − 1], nats per dimension."""

    lower: np.ndarray
    upper: np.ndarray


def harmonic(T):
    """β_t = 1/(T − t + 1): each step erases 1/T of the data's variance, ᾱ_t = 1 − t/T."""
    return np.array([1 / (T - t + 1) for t in range(1, T + 1)])


def alpha_bar(beta):
    """ᾱ_t = ∏_{r ≤ t} (1 − β_r) for t = 1..T."""
    result, product = [], 1.0
    for rate in beta:
        product = product * (1 - rate)
        result.append(product)
    return np.array(result)


def alpha_bar_at(beta, t):
    """ᾱ_t for t = 0..T, with ᾱ_0 = 1."""
    return 1.0 if t == 0 else alpha_bar(beta)[t - 1]


def transition(x_s, beta, t):
    """Mean and variance of q(x_t | x_s), eq. 2 and table App.1."""
    return np.sqrt(1 - beta[t - 1]) * x_s, beta[t - 1]


def marginal(x_0, beta, t):
    """Mean and variance of q(x_t | x_0), by taking the t steps one after the other."""
    mean, variance = np.asarray(x_0, np.float64), 0.0
    for r in range(1, t + 1):
        mean, _ = transition(mean, beta, r)
        variance = (1 - beta[r - 1]) * variance + beta[r - 1]
    return mean, variance


def bridge(x_t, x_0, beta, t):
    """Mean and variance of q(x_s | x_t, x_0), t ≥ 2.

    q(x_s | x_t, x_0) ∝ q(x_t | x_s) q(x_s | x_0): precisions add, and the mean is weighted by them.
    """
    alpha = 1 - beta[t - 1]
    mean_s, variance_s = marginal(x_0, beta, t - 1)
    precision = alpha / beta[t - 1] + 1 / variance_s
    mean = (np.sqrt(alpha) / beta[t - 1] * x_t + mean_s / variance_s) / precision
    return mean, 1 / precision


def log_normal(x, mean, variance):
    """log N(x; mean, variance), elementwise."""
    return -0.5 * (np.log(2 * np.pi * variance) + (x - mean) ** 2 / variance)


def kl_normal(mean_q, variance_q, mean_p, variance_p):
    """KL(N(mean_q, variance_q) ‖ N(mean_p, variance_p)), elementwise."""
    ratio = variance_q / variance_p
    return 0.5 * (ratio - 1 - np.log(ratio) + (mean_q - mean_p) ** 2 / variance_p)


def entropy_normal(variance):
    """Entropy of N(·, variance), elementwise."""
    return 0.5 * (LOG_2_PI_E + np.log(variance))


def log_ratio(trajectory, beta, reverse):
    """log p(x_0..x_T) − log q(x_1..x_T | x_0), whose mean under q is K: eqs. 9 to 11.

    log π(x_T) + Σ_{t ≥ 1} [ log p(x_s | x_t) − log q(x_t | x_s) ]

    Args:
        trajectory: x_0..x_T, shape (T + 1, d).
        beta: β_1..β_T.
        reverse: Function (x_t, t) to mean and elementwise variance of p(x_s | x_t), for t ≥ 2 where
            the last step is tied, p(x_0 | x_1) = N(√(1 − β_1) x_1, β_1): return that for t = 1.
    """
    T = len(beta)
    total = log_normal(trajectory[T], 0.0, 1.0).sum()
    for t in range(1, T + 1):
        total += log_normal(trajectory[t - 1], *reverse(trajectory[t], t)).sum()
        total -= log_normal(trajectory[t], *transition(trajectory[t - 1], beta, t)).sum()
    return total


def bound_eq14(x_0, trajectory, beta, reverse):
    """One draw of the entropy form of K, eq. 14, with the KLs in closed form.

    − Σ_{t ≥ 2} KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)) + H_q(X_T | X_0) − H_q(X_1 | X_0) − H_p(X_T)

    Args:
        x_0: Data, shape (d,).
        trajectory: x_0..x_T, shape (T + 1, d).
        beta: β_1..β_T.
        reverse: As in `log_ratio`; not called for t = 1.
    """
    total = len(x_0) * entropies_eq14(beta)
    for t in range(2, len(beta) + 1):
        x_t = trajectory[t]
        total -= kl_normal(*bridge(x_t, x_0, beta, t), *reverse(x_t, t)).sum()
    return total


def entropies_eq14(beta):
    """H_q(X_T | X_0) − H_q(X_1 | X_0) − H_p(X_T), nats per dimension."""
    spread = entropy_normal(1 - alpha_bar(beta)[-1])
    return spread - entropy_normal(beta[0]) - entropy_normal(1.0)


def correction_eq14(second_moment, beta, d):
    """What to add to eq. 14 so that it equals eq. 12 on data with E|x_0|²/d = second_moment.

    −(d/2) (second_moment − 1) (ᾱ_T + β_1)

    The paper takes E_q[−log π(x_t)] for the constant H_p(X_T) at t = 0, 1 and T; it is
    d/2 (log 2π + 1 + ᾱ_t (second_moment − 1)). The tied step brings t = 0 less t = 1, the start T.
    """
    return -0.5 * d * (second_moment - 1) * (alpha_bar(beta)[-1] + beta[0])


def covariance_at(C, beta, t):
    """Covariance C_t of x_t where x_0 ~ N(0, C)."""
    share = alpha_bar_at(beta, t)
    return share * C + (1 - share) * np.eye(len(C))


def optimal_reverse_trajectory(C, beta, *, diagonal):
    """Reverse kernels that maximise K on x_0 ~ N(0, C), the last step tied.

    E log N(x_s; A x_t, V) is greatest at the regression A_t and V = S_t; among diagonal V it is
    greatest at the diagonal of S_t, for it then is −½ Σ_i [log 2πV_ii + (S_t)_ii / V_ii].

    Args:
        C: Covariance of the data, shape (d, d).
        beta: β_1..β_T.
        diagonal: Whether V is held to be diagonal, as in all experiments of the paper.
    """
    A = [np.sqrt(1 - beta[0]) * np.eye(len(C))]
    V = [beta[0] * np.eye(len(C))]
    for t in range(2, len(beta) + 1):
        C_s, C_t = covariance_at(C, beta, t - 1), covariance_at(C, beta, t)
        A.append(np.sqrt(1 - beta[t - 1]) * C_s @ np.linalg.inv(C_t))
        S = C_s - A[-1] @ C_t @ A[-1].T
        V.append(np.diag(np.diag(S)) if diagonal else S)
    return ReverseTrajectory(np.array(A), np.array(V))


def cross_entropy_normal(covariance, V):
    """E[−log N(x; 0, V)] for zero-mean x with the given covariance, both (d, d)."""
    log_det = np.linalg.slogdet(2 * np.pi * V)[1]
    return 0.5 * (log_det + np.trace(np.linalg.solve(V, covariance)))


def bound_eq12_gaussian_data(C, beta, reverse):
    """Exact K, eq. 12, of linear reverse kernels on x_0 ~ N(0, C).

    K = −E[−log π(x_T)] − Σ_{t ≥ 1} ( E[−log p(x_s | x_t)] − H_q(X_t | X_s) ), with
    x_s − A x_t of covariance C_s − √α_t (A C_s + C_s Aᵀ) + A C_t Aᵀ.
    """
    total = -cross_entropy_normal(covariance_at(C, beta, len(beta)), np.eye(len(C)))
    for t in range(1, len(beta) + 1):
        C_s, C_t, A = covariance_at(C, beta, t - 1), covariance_at(C, beta, t), reverse.A[t - 1]
        cross = np.sqrt(1 - beta[t - 1]) * A @ C_s
        error = C_s - cross - cross.T + A @ C_t @ A.T
        total -= cross_entropy_normal(error, reverse.covariance[t - 1])
        total += len(C) * entropy_normal(beta[t - 1])
    return total


def bound_eq14_gaussian_data(C, beta, reverse):
    """Exact entropy form of K, eq. 14, of the same; without `correction_eq14`.

    The bridge has mean a x_0 + b x_t and variance v I; a x_0 + (b I − A) x_t has covariance R, and
    E KL = ½ [ log det V − d log v − d + tr V⁻¹ (v I + R) ].
    """
    d = len(C)
    total = d * entropies_eq14(beta)
    for t in range(2, len(beta) + 1):
        a, v = bridge(0.0, 1.0, beta, t)
        b, _ = bridge(1.0, 0.0, beta, t)
        B = b * np.eye(d) - reverse.A[t - 1]
        C_t, V = covariance_at(C, beta, t), reverse.covariance[t - 1]
        cross = a * np.sqrt(alpha_bar_at(beta, t)) * B @ C
        R = a**2 * C + cross + cross.T + B @ C_t @ B.T
        total -= cross_entropy_normal(v * np.eye(d) + R, V) - d * entropy_normal(v)
    return total


def log_density_ceiling(C, beta):
    """−h(X_1) for x_0 ~ N(0, C): no K with a tied last step is greater."""
    return -0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance_at(C, beta, 1))[1]


def entropy_bounds(beta):
    """Bounds on the entropy of a reverse step for data of unit second moment, eq. 24.

    H_q(X_t | X_s) + H_q(X_s | X_0) − H_q(X_t | X_0) ≤ H_q(X_s | X_t) ≤ H_q(X_t | X_s); the lower
    one is −∞ at t = 1, where X_s is X_0.
    """
    lower, upper = [-np.inf], [entropy_normal(beta[0])]
    for t in range(2, len(beta) + 1):
        (_, variance_s), (_, variance_t) = marginal(0.0, beta, t - 1), marginal(0.0, beta, t)
        upper.append(entropy_normal(beta[t - 1]))
        lower.append(upper[-1] + entropy_normal(variance_s) - entropy_normal(variance_t))
    return EntropyBounds(np.array(lower), np.array(upper))


def reverse_entropy_gaussian_data(C, beta):
    """H_q(X_s | X_t) for t = 1..T and x_0 ~ N(0, C), nats per dimension: ½ log det 2πe S_t / d."""
    entropies = []
    for t in range(1, len(beta) + 1):
        C_s, C_t = covariance_at(C, beta, t - 1), covariance_at(C, beta, t)
        S = C_s - (1 - beta[t - 1]) * C_s @ np.linalg.solve(C_t, C_s)
        entropies.append(0.5 * np.linalg.slogdet(2 * np.pi * np.e * S)[1] / len(C))
    return np.array(entropies)
