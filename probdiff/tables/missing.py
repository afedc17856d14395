"""Missing entries of rows, drawn from a Gaussian mixture given the others."""

from typing import Any

import numpy as np
from scipy.special import logsumexp


def drawn(
    rng: Any, z: np.ndarray, is_missing: np.ndarray, mixture: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Rows with missing entries drawn from a mixture given the others, and log p of these.

    In component k they are N(μ, P⁻¹), P their block of its precision, and k has the share of its
    density of the others, which is the joint density at μ over that of N(μ, P⁻¹) there.
    """
    count, d = z.shape
    draws, log_p = np.empty((len(mixture.means_), count, d)), np.empty((len(mixture.means_), count))
    which = np.flatnonzero(is_missing.any(1))
    m = is_missing[which]
    parts = zip(mixture.weights_, mixture.means_, mixture.precisions_, strict=True)
    for k, (weight, mean, precision) in enumerate(parts):
        away, log_det = z - mean, np.full(count, np.linalg.slogdet(precision)[1])
        block = np.where(m[:, :, None] & m[:, None, :], precision, np.eye(d))
        pull = np.where(m, 0.0, away[which]) @ precision
        mu = -np.linalg.solve(block, np.where(m, pull, 0.0)[..., None])[..., 0]
        root = np.linalg.cholesky(block).swapaxes(1, 2)
        noise = np.linalg.solve(root, rng.standard_normal((len(which), d, 1)))[..., 0]
        away[which] = np.where(m, mu, away[which])
        log_det[which] -= np.linalg.slogdet(block)[1]
        log_p[k] = np.log(weight) + 0.5 * (log_det - np.sum((away @ precision) * away, 1))
        draws[k] = mean + away
        draws[k][which] += np.where(m, noise, 0.0)
    k = np.argmax(log_p + rng.gumbel(size=log_p.shape), 0)
    log_p = logsumexp(log_p, 0) - 0.5 * np.log(2 * np.pi) * np.sum(~is_missing, 1)
    return np.where(is_missing, draws[k, np.arange(count)], z), log_p
