"""Baselines against laws that are known: their figures are log p on the measure of the bound."""

import jax
import numpy as np
import pytest
from scipy import stats

from oracles import log_normal
from probdiff import BernoulliKernel, diagnostics, standard_diffusion
from probdiff.readouts import Discretised

KEY = jax.random.key(0)


def correlated(n, seed):
    """N(0, [[1, 0.8], [0.8, 1]]) in units of (10 + 3·, 2·), the first rounded to whole numbers."""
    z = np.random.default_rng(seed).standard_normal((n, 2)) @ np.array([[1.0, 0.8], [0.0, 0.6]])
    x = np.array([10.0, 0.0]) + np.array([3.0, 2.0]) * z
    x[:, 0] = np.round(x[:, 0])
    return x


def exact(x):
    """log of mass and density of `correlated`."""
    density = log_normal(x[:, 1], 0.0, 2.0)
    mean, sd = 10 + 3 * 0.8 * x[:, 1] / 2, 3 * 0.6
    cell = stats.norm.cdf(x[:, 0] + 0.5, mean, sd) - stats.norm.cdf(x[:, 0] - 0.5, mean, sd)
    return density + np.log(cell)


def test_a_gaussian_of_mixed_entries_has_their_mass_and_density():
    """5,000 rows to fit: the Gaussian within 0.005 nats of the truth but for noise of the cells."""
    last = Discretised([-10, 0], [30, 0], [41, 0])
    diffusion = standard_diffusion(
        (2,), last_step=last, loc=np.array([10.0, 0]), scale=np.array([3.0, 2])
    )
    x, test = correlated(5000, 0), correlated(1000, 1)
    trees = diagnostics.baselines(KEY, diffusion, x, test, components=(2,))
    gap = {name: tree["bound"]["bound"].values - exact(test) for name, tree in trees.items()}
    assert abs(gap["gaussian"].mean()) < 4 * gap["gaussian"].std() / 1000**0.5 + 0.01
    assert abs(gap["mixture"].mean()) < 0.03
    lost = -0.5 * np.log(1 - 0.64)  # the information of the two entries, less what rounding takes
    assert -lost < gap["independent"].mean() < -0.7 * lost
    tree = trees["gaussian"]["bound"]
    k = diagnostics.bound(KEY, diffusion, {}, test)
    for name in ("reference_measure", "num_dims", "data"):
        assert tree.attrs[name] == k["bound"].attrs[name]
    group = diagnostics.compare({"diffusion": k, **trees})["comparison"]
    assert set(group["model"].values) == {"diffusion", *trees}
    assert "components" in trees["mixture"]["bound"].attrs["chosen"]


def test_a_mixture_is_found_where_there_is_one():
    rng = np.random.default_rng(0)
    centre = rng.choice([-4.0, 0.0, 4.0], (3000, 1))
    x = np.repeat(centre, 2, 1) + rng.standard_normal((3000, 2))
    diffusion = standard_diffusion((2,), loc=0.0, scale=x.std())
    trees = diagnostics.baselines(KEY, diffusion, x[:2000], x[2000:], components=(3,))
    parts = [log_normal(x[2000:], c, 1.0).sum(1) for c in (-4.0, 0.0, 4.0)]
    truth = np.log(np.mean(np.exp(parts), 0))
    assert abs((trees["mixture"]["bound"]["bound"].values - truth).mean()) < 0.03
    assert (trees["gaussian"]["bound"]["bound"].values - truth).mean() < -0.1


def test_bits_have_shares():
    rng = np.random.default_rng(0)
    p = np.array([0.1, 0.7])
    x, test = ((rng.random((n, 2)) < p).astype(np.int32) for n in (4000, 500))
    diffusion = standard_diffusion((2,), kernel=BernoulliKernel(0.5))
    trees = diagnostics.baselines(KEY, diffusion, x, test)
    truth = np.where(test == 1, np.log(p), np.log1p(-p)).sum(1)
    assert list(trees) == ["independent"]
    assert abs((trees["independent"]["bound"]["bound"].values - truth).mean()) < 0.01


def test_what_is_no_data_is_refused():
    diffusion = standard_diffusion((2,))
    x = correlated(30, 0)
    with pytest.raises(ValueError, match=r"held_out must have shape \(N, 2\); got \(30,\)"):
        diagnostics.baselines(KEY, diffusion, x, x[:, 0])
    with pytest.raises(ValueError, match="x_0 must have at least 20 examples to fit; got 10"):
        diagnostics.baselines(KEY, diffusion, x[:10], x)
    with pytest.raises(ValueError, match=r"x_0 must .*finite"):
        diagnostics.baselines(KEY, diffusion, np.where(x > 14, np.nan, x), x)
