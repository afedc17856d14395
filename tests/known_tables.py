"""A table of mixed columns with a known law: two categories, two rounded, a count, three numbers.

colour   red, green, blue by 0.5, 0.3, 0.2
sold     yes by 0.2, 0.5, 0.8 given colour
u, v     normal about means of (colour, sold), correlation 0.6 or −0.6
w        log-normal about exp(0.3 u)
half     0.7 u + noise, rounded to 0.5;    tenth   v/2 + noise, rounded to 0.25
count    Poisson of mean exp(0.5 + 0.5 v)
"""

import numpy as np
from scipy import stats
from scipy.special import log_ndtr, ndtr

COLOURS, SHARES = ("red", "green", "blue"), np.array([0.5, 0.3, 0.2])
SOLD = np.array([0.2, 0.5, 0.8])
MEANS = np.array([[[-1.5, 0.5], [1.0, -1.0]], [[0.0, 0.0], [2.0, 1.0]], [[-1.0, -1.0], [1.0, 1.5]]])
"""Of u and v, by colour and sold."""
RHO = np.array([0.6, -0.6])
NOISE = {"half": 0.4, "tenth": 0.3}
STEPS = {"half": 0.5, "tenth": 0.25}
ENDS = {"half": 5.0, "tenth": 4.0}


def draw(seed, n):
    """n rows, by column."""
    rng = np.random.default_rng(seed)
    c = rng.choice(3, n, p=SHARES)
    s = (rng.random(n) < SOLD[c]).astype(int)
    e = rng.standard_normal((n, 2))
    u = MEANS[c, s, 0] + 0.8 * e[:, 0]
    v = MEANS[c, s, 1] + 0.8 * (RHO[s] * e[:, 0] + np.sqrt(1 - RHO[s] ** 2) * e[:, 1])
    w = np.exp(0.3 * u + 0.5 * rng.standard_normal(n))
    half, tenth = 0.7 * u + 0.4 * rng.standard_normal(n), 0.5 * v + 0.3 * rng.standard_normal(n)
    rounded = {"half": half, "tenth": tenth}
    rounded = {
        k: np.clip(np.round(x / STEPS[k]) * STEPS[k], -ENDS[k], ENDS[k]) for k, x in rounded.items()
    }
    count = rng.poisson(np.exp(0.5 + 0.5 * v))
    colour, sold = np.array(COLOURS)[c], np.array(["no", "yes"])[s]
    return {"colour": colour, "sold": sold, "u": u, "v": v, "w": w, **rounded, "count": count}


def log_p(row):
    """Log of the law, nats: a density in u, v and w, in their own units; broadcasts."""
    places = {name: i for i, name in enumerate(COLOURS)}
    c = np.vectorize(places.get)(row["colour"])
    s = (np.asarray(row["sold"]) == "yes").astype(int)
    u, v, w = (np.asarray(row[k], float) for k in "uvw")
    total = np.log(SHARES[c]) + np.log(np.where(s == 1, SOLD[c], 1 - SOLD[c]))
    mean, rho = MEANS[c, s], RHO[s]
    a, b = (u - mean[..., 0]) / 0.8, (v - mean[..., 1]) / 0.8
    total += -0.5 * (a**2 - 2 * rho * a * b + b**2) / (1 - rho**2)
    total += -np.log(2 * np.pi * 0.64) - 0.5 * np.log(1 - rho**2)
    total += stats.norm.logpdf(np.log(w), 0.3 * u, 0.5) - np.log(w)
    for name, mean in (("half", 0.7 * u), ("tenth", 0.5 * v)):
        total += _log_cell(row[name], mean, NOISE[name], STEPS[name], ENDS[name])
    return total + stats.poisson.logpmf(row["count"], np.exp(0.5 + 0.5 * v))


def _log_cell(x, mean, sd, step, end):
    above, below = (x + step / 2 - mean) / sd, (x - step / 2 - mean) / sd
    sign = np.where(above + below > 0, -1.0, 1.0)  # both tails to the left, where digits are left
    inside = np.log(np.maximum(np.abs(ndtr(sign * above) - ndtr(sign * below)), 1e-300))
    return np.where(x >= end, log_ndtr(-below), np.where(x <= -end, log_ndtr(above), inside))
