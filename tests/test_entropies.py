"""Entropy of reverse steps and information of levels, against Gaussian and heartbeat data."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from oracles import gaussian_network
from probdiff import (
    AbsorbingKernel,
    CategoricalKernel,
    Diffusion,
    GaussianKernel,
    diagnostics,
    readouts,
    schedules,
)
from probdiff.experiments.heartbeat import exact as heartbeat_models

KEY = jax.random.key(0)


def gaussian(sd, T=15):
    """The exact diffusion of N(0, sd²), and its exact H(X_s | X_t) and I(X_0; X_t), nats."""
    beta = schedules.log_snr_linear(T, beta_1=0.01, alpha_bar_T=1e-3)
    sd = np.asarray(sd, float)
    diffusion = Diffusion(
        GaussianKernel(),
        beta,
        gaussian_network(np.zeros(len(sd)), sd, beta),
        event_shape=sd.shape,
        readout=readouts.Data(),
    )
    alpha_bar = np.cumprod(1 - np.asarray(beta, float))[:, None]
    variance = 1 + alpha_bar * (sd**2 - 1)  # of x_t
    beta = np.asarray(beta, float)[1:, None]
    entropy = 0.5 * np.log(2 * np.pi * np.e * beta * variance[:-1] / variance[1:]).sum(1)
    return diffusion, entropy, 0.5 * np.log(variance / (1 - alpha_bar)).sum(1)


def data(sd, n=2_000):
    """Draws with exactly these second moments."""
    x = np.random.default_rng(0).standard_normal((n, len(sd)))
    return np.asarray(x / np.sqrt((x**2).mean(0)) * sd, np.float32)


def heartbeat(T=100):
    """The exact diffusion of the heartbeat, its H(X_t) for t = 1..T, by the ones in each phase."""
    diffusion = heartbeat_models.define_exact(T)
    alpha_bar = np.cumprod(1 - np.asarray(diffusion.schedule, float))
    counts = np.array(list(itertools.product(range(5), repeat=5)))
    orders = np.array([math.comb(4, k) for k in range(5)])[counts].prod(1)
    entropy = []
    for a in alpha_bar:
        one, zero = a + 0.2 * (1 - a), 0.2 * (1 - a)
        own = one**counts * (1 - one) ** (4 - counts)
        other = zero**counts * (1 - zero) ** (4 - counts)
        p = np.mean([own[:, j] * np.delete(other, j, 1).prod(1) for j in range(5)], 0)
        seen = p > 0
        entropy.append(-(orders * p)[seen] @ np.log(p[seen]))
    return diffusion, np.array(entropy)


def measured(diffusion, x, **options):
    tree = diagnostics.bound(KEY, diffusion, {}, x, **options)
    return tree, diagnostics.entropies(KEY, diffusion, {}, x, tree)["entropy"]


def test_bounds_hold_at_every_step_of_gaussian_data_of_unit_moment():
    sd = np.sqrt([1.7, 0.3])
    diffusion, exact, _ = gaussian(sd)
    _, g = measured(diffusion, data(sd), num_draws=4)
    assert g["step"].values.tolist() == list(range(2, 16))
    assert (g["lower"] <= exact).all() and (exact <= g["upper"] + 1e-5).all()
    assert g.attrs["log_pi_change"] == pytest.approx(0, abs=1e-4)
    assert (
        np.abs((g["model"] - exact) / g["model_se"]).max() < 4
    )  # a perfect model: its bound is exact
    beta = np.asarray(diffusion.schedule, float)
    alpha_bar = np.cumprod(1 - beta)
    small = beta[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    for name, variance in (("upper", beta[1:]), ("lower", small)):  # DDPM's two variances
        np.testing.assert_allclose(g[name], np.log(2 * np.pi * np.e * variance), atol=1e-4)


def test_upper_bound_needs_its_condition_and_the_correction_repairs_it():
    sd = np.sqrt([3.0, 2.0])
    diffusion, exact, _ = gaussian(sd)
    with pytest.warns(UserWarning, match="second moment"):
        _, g = measured(diffusion, data(sd))
    assert (exact > g["upper"]).all()
    assert (exact <= g["upper"] + g["correction"]).all()
    assert g.attrs["log_pi_change"] == pytest.approx(-0.5 * (2 + 1), abs=1e-4)
    assert "unit second moment" in g.attrs["condition"]


@pytest.mark.long
def test_bounds_hold_at_every_step_of_the_heartbeat():
    diffusion, entropy = heartbeat()
    x = heartbeat_models.examples()
    _, g = measured(diffusion, x, num_draws=200)
    exact = g["upper"].values + entropy[:-1] - entropy[1:]  # H(X_t | X_s) + H(X_s) − H(X_t)
    assert (g["lower"] <= exact + 1e-5).all() and (exact <= g["upper"] + 1e-5).all()
    np.testing.assert_allclose(g["correction"], 0, atol=1e-5)  # a fifth of the bits are on
    # The best model that treats bins alone is not better than the truth
    assert (g["model"] > exact - 4 * g["model_se"] - 1e-4).all()
    assert (
        g.attrs["condition"] == "eq. 24's upper bound needs data whose mean activity is that of π"
    )


def test_forward_entropy_averages_over_the_states(x64):
    """H(X_t | X_s) of classes, against a sum over both states."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(4, 6)))
    diffusion = Diffusion(
        CategoricalKernel(3), schedules.harmonic(4), lambda x_t, t: table[t - 1],
        event_shape=(2,), readout=readouts.DataLogits(), last_step=readouts.Learned(),
    )  # fmt: skip
    x = rng.integers(0, 3, (5, 2)).astype(np.int32)
    _, g = measured(diffusion, x)
    a, beta = 1 - np.arange(1, 5) / 4, np.asarray(schedules.harmonic(4))
    expected = []
    for t in (2, 3, 4):
        stay = (1 - beta[t - 1]) * np.eye(3) + beta[t - 1] / 3
        rows = -(stay * np.log(stay)).sum(1)
        p = a[t - 2] * np.eye(3)[x] + (1 - a[t - 2]) / 3
        expected.append((p @ rows).sum(1).mean())
    np.testing.assert_allclose(g["upper"], expected, rtol=1e-10)
    assert g.attrs["condition"] == "eq. 24's upper bound holds for all data, as π is uniform"


def test_information_of_gaussian_data_lies_between_its_bounds():
    sd = np.sqrt([1.7, 0.3])
    diffusion, _, exact = gaussian(sd)
    x = data(sd)
    tree, _ = measured(diffusion, x, num_draws=4)
    g = diagnostics.information(KEY, diffusion, {}, x, tree, num_levels=8)["information"]
    assert np.abs((g["model"] - exact) / g["model_se"]).max() < 4
    gap = exact[g["contrasted"].values - 1] - g["contrast"]
    assert (gap > -4 * g["contrast_se"]).all()
    far = g["contrasted"].values > 5
    assert np.abs(gap[far]).max() < 0.05 + 4 * g["contrast_se"].max()  # 2,000 examples are many
    assert (np.diff(g["model"]) < 0).all()
    assert (g["contrast"] <= g.attrs["most_contrast"]).all()


@pytest.mark.long
def test_information_of_the_heartbeat_is_its_entropy_at_first():
    diffusion, entropy = heartbeat(40)
    x = heartbeat_models.examples()
    tree, _ = measured(diffusion, x, num_draws=4)
    g = diagnostics.information(KEY, diffusion, {}, x, tree)["information"]
    a = np.cumprod(1 - np.asarray(diffusion.schedule, float))

    def h(p):
        return -(p * np.log(p) + (1 - p) * np.log1p(-p))

    exact = entropy - 4 * h(a + 0.2 * (1 - a)) - 16 * h(0.2 * (1 - a))
    # Each sequence is there 50 times: the contrast is with the five of them
    # At first a draw that hides its sequence is too rare for the standard error to have met it.
    assert (np.abs(g["contrast"] - exact) < 4.5 * g["contrast_se"] + 0.02).all()
    assert (g["model"] > exact - 4 * g["model_se"] - 1e-4).all()
    assert abs(float(g["contrast"][0]) - math.log(5)) < 0.1


def test_trees_are_kept_by_netcdf(tmp_path):
    diffusion, _, _ = gaussian(np.ones(2), T=3)
    x = data(np.ones(2), 20)
    _, g = measured(diffusion, x)
    xr.DataTree.from_dict({"entropy": g}).to_netcdf(tmp_path / "e.nc")
    with xr.open_datatree(tmp_path / "e.nc") as back:
        assert back["entropy"].attrs == g.attrs


def test_what_does_not_fit_is_refused_by_name():
    diffusion, _, _ = gaussian(np.ones(2), T=3)
    x = data(np.ones(2), 20)
    tree, _ = measured(diffusion, x)
    for call in (
        lambda x, tree: diagnostics.entropies(KEY, diffusion, {}, x, tree),
        lambda x, tree: diagnostics.information(KEY, diffusion, {}, x, tree),
    ):
        with pytest.raises(
            ValueError, match=r"tree must hold kl of shape \(10, 2\); got \(20, 2\)"
        ):
            call(x[:10], tree)
        with pytest.raises(ValueError, match="tree must be of the examples in x_0"):
            call(x + 1, tree)
        with pytest.raises(ValueError, match="tree must be what"):
            call(x, xr.DataTree())
    with pytest.raises(ValueError, match="x_0 must be at least 2 examples to contrast; got 1"):
        one = diagnostics.bound(KEY, diffusion, {}, x[:1])
        diagnostics.information(KEY, diffusion, {}, x[:1], one)
    table = jnp.zeros((4, 6))
    absorbing = Diffusion(
        AbsorbingKernel(3), schedules.harmonic(4), lambda x_t, t: table[t - 1],
        event_shape=(2,), readout=readouts.DataLogits(), last_step=readouts.Learned(),
    )  # fmt: skip
    x = np.zeros((2, 2), np.int32)
    with pytest.raises(ValueError, match=r"kernel must put mass on data for eq\. 24"):
        diagnostics.entropies(KEY, absorbing, {}, x)
