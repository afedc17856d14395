"""The evidence of R independent runs, its standard error, and an interval that holds what it says.

    log Z ≈ log (1/R) Σ_r Ẑ_r,    se = sd(Ẑ_r) / (√R · mean(Ẑ_r))

For many particles log Ẑ is normal with mean log Z − σ²/2 and a variance σ² that runs alone tell. A
Student-t interval about log of the mean of Ẑ misses low: the largest Ẑ are rare. With ψ = log Z,
v = σ², the mean ȳ of log Ẑ_r, S their sum of squares about it and m = ȳ − ψ + v/2,

    ℓ(ψ, v) = −R/2 log v − (S + R m²)/(2v),        v̂ = S/R,   ψ̂ = ȳ + v̂/2,
    v_ψ = 2 (√(1 + v̂ + (ȳ − ψ)²) − 1),             the best v given ψ,
    r(ψ) = sign(ψ̂ − ψ) √(2 [ℓ(ψ̂, v̂) − ℓ(ψ, v_ψ)]),
    q(ψ) = (ψ̂ − ψ) (v̂/v_ψ)² √(R² / (2 v̂³ j)),      j = −∂²ℓ/∂v² at (ψ, v_ψ),

r* = r + log(q/r)/r is standard normal to third order: of three runs already the ends of a 95 %
interval are right within a percent, whatever σ is.

Sources: Bérard et al. (2014) for the limit; Barndorff-Nielsen (1986) for r*; Wu et al. (2003) for
the mean of a lognormal.
"""

import numpy as np

_NEAR = 1e-3  # of ψ to ψ̂, in standard deviations of log Ẑ, where r* is 0/0
_DOUBLINGS, _HALVINGS = 60, 60


def log_evidence(by_run: np.ndarray) -> np.ndarray:
    """log of the mean of Ẑ over runs, from log Ẑ `(R, *plates)`."""
    z = by_run.astype(np.float64)
    top = z.max(0)
    finite = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(finite + np.log(np.mean(np.exp(z - finite), 0)))


def log_evidence_se(by_run: np.ndarray) -> np.ndarray:
    """Standard error of log Z over runs, `(*plates,)`; nan for one run or no weight."""
    z = by_run.astype(np.float64)
    if len(z) == 1:
        return np.full(z.shape[1:], np.nan)
    top = z.max(0)
    ratio = np.exp(z - np.where(np.isfinite(top), top, 0.0))
    mean = ratio.mean(0)
    error = ratio.std(0, ddof=1) / np.sqrt(len(z))
    return np.asarray(np.where(mean > 0, error / np.where(mean > 0, mean, 1.0), np.nan))


def log_evidence_interval(by_run: np.ndarray, prob: float) -> tuple[np.ndarray, np.ndarray]:
    """Ends of an interval of log Z, `(*plates,)`; nan for one run, or a run without weight."""
    from scipy import special  # slow to import

    z = by_run.astype(np.float64).reshape(len(by_run), -1)
    is_there = np.isfinite(z).all(0) & (len(z) > 1)
    z = np.where(is_there, z, 0.0)
    mean, variance = z.mean(0), z.var(0)
    quantile = special.ndtri((1 + prob) / 2)
    ends = []
    for side in (-1.0, 1.0):
        sd = np.sqrt(variance)
        far = sd.copy()
        for _ in range(_DOUBLINGS):
            is_inside = side * _root(side * far, mean, variance, len(z)) > -quantile
            far = np.where(is_inside, 2 * far, far)
        near = np.zeros_like(far)
        for _ in range(_HALVINGS):
            middle = 0.5 * (near + far)
            is_inside = side * _root(side * middle, mean, variance, len(z)) > -quantile
            near, far = np.where(is_inside, middle, near), np.where(is_inside, far, middle)
        end = mean + 0.5 * variance + side * far
        ends.append(np.where(is_there, end, np.nan).reshape(by_run.shape[1:]))
    return ends[0], ends[1]


def _root(move: np.ndarray, mean: np.ndarray, variance: np.ndarray, runs: int) -> np.ndarray:
    """r* at ψ̂ + move."""
    v = np.where(variance > 0, variance, 1.0)
    least = _NEAR * np.sqrt(v)
    move = np.where(np.abs(move) < least, np.where(move < 0, -least, least), move)
    gap = -0.5 * v - move  # ȳ − ψ
    best = 2 * (np.sqrt(1 + v + gap**2) - 1)
    m = gap + 0.5 * best
    square = v + m**2
    drop = 0.5 * runs * (np.log(best / v) + square / best - 1)
    r = -np.sign(move) * np.sqrt(2 * drop)
    j = runs * (square / best**3 - 0.5 / best**2 - m / best**2 + 0.25 / best)
    q = -move * (v / best) ** 2 * np.sqrt(runs**2 / (2 * v**3 * j))
    return r + np.log(q / r) / r
