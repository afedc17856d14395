"""The network that starts from a mixture: the mixture's own denoiser, on grids as off them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import norm

import probdiff
from probdiff import Diffusion, GaussianKernel, diagnostics, networks, readouts, schedules


def random_mixture(K=3, d=4, seed=0):
    rng = np.random.default_rng(seed)
    roots = 0.5 * rng.normal(size=(K, d, d))
    covariances = roots @ roots.transpose(0, 2, 1) + 0.05 * np.eye(d)
    return np.array([0.2, 0.3, 0.5]), rng.normal(size=(K, d)), covariances


def made(network, T=100, beta_1=1e-4, last_step=None):
    beta = schedules.log_snr_linear(T, beta_1=beta_1, alpha_bar_T=1e-3)
    diffusion = Diffusion(
        GaussianKernel(), beta, network, event_shape=network.event_shape,
        readout=readouts.Mixture(network.components), last_step=last_step or readouts.Learned(),
    )  # fmt: skip
    return diffusion, {"x_0_network$params": nnx.to_pure_dict(nnx.state(network))}


def moments(x, alpha_bar, weights, means, covariances):
    """E[x_0 | x_t] and the variances, of one x_t."""
    log_w, mu, var, noise = [], [], [], (1 - alpha_bar) * np.eye(len(x))
    for w, m, C in zip(weights, means, covariances, strict=True):
        S = alpha_bar * C + noise
        r = x - np.sqrt(alpha_bar) * m
        log_w.append(np.log(w) - 0.5 * np.linalg.slogdet(S)[1] - 0.5 * r @ np.linalg.solve(S, r))
        mu.append(m + np.sqrt(alpha_bar) * C @ np.linalg.solve(S, r))
        var.append(np.diag(C - alpha_bar * C @ np.linalg.solve(S, C)))
    p = np.exp(log_w - np.max(log_w))
    p /= p.sum()
    mean = p @ np.array(mu)
    return mean, p @ (np.array(var) + (np.array(mu) - mean) ** 2)


@pytest.mark.parametrize("components", [3, pytest.param(5, marks=pytest.mark.long)])
def test_it_starts_as_the_mixtures_own_denoiser(components):
    """5 points at each of 4 levels, float32, with copies of no weight where K is larger."""
    parts = random_mixture()
    network = networks.FromMixture((4,), components, 8, 1, rngs=nnx.Rngs(0))
    network.start(*parts)
    diffusion, params = made(network)
    reverse, rng = diffusion.bind(params), np.random.default_rng(1)
    for t in (1, 20, 50, 100):
        x = rng.normal(size=(5, 4))
        alpha_bar = np.cumprod(1 - diffusion.rates)[t - 1]
        found = reverse.x_0_given(jnp.asarray(x, jnp.float32), t)
        exact = [moments(row, alpha_bar, *parts) for row in x]
        np.testing.assert_allclose(found.mean, [m for m, _ in exact], atol=3e-5)
        np.testing.assert_allclose(found.variance, [v for _, v in exact], rtol=3e-4)


@pytest.mark.filterwarnings("ignore:x_0 has second moment")
@pytest.mark.parametrize("levels", [pytest.param(n, marks=pytest.mark.long) for n in (2, 5, 40)])
def test_levels_start_with_the_masses_of_their_cells(levels):
    """One number, N(0, 1) put on a grid: K is log P of each level to 0.03 nats, 1,600 draws."""
    spacing = {2: 2.0, 5: 0.7, 40: 0.15}[levels]  # 40 are more than there are components
    low = -spacing * (levels - 1) / 2
    values = low + spacing * np.arange(levels)
    p = np.diff(np.r_[0, norm.cdf(values[:-1] + spacing / 2), 1])
    network = networks.FromMixture((1,), min(levels, 12), 8, 1, levels=(levels,), rngs=nnx.Rngs(0))
    network.start([1.0], [[0.0]], [[[1.0]]], lowest=low, spacing=spacing)
    last = readouts.Discretised(low, -low, levels)
    diffusion, params = made(network, T=150, last_step=last)
    draws = 1600 // levels
    x = np.repeat(values, draws)[:, None]
    k = diagnostics.bound(jax.random.key(0), diffusion, params, x, num_draws=2)["bound"]["bound"]
    k = k.values.reshape(levels, draws)
    se = np.sqrt((p**2 * k.var(1) / draws).sum())
    assert abs((p * (k.mean(1) - np.log(p))).sum()) < 4 * se + 0.03


@pytest.mark.long
def test_it_is_saved_and_loaded(tmp_path):
    network = networks.FromMixture((2,), 3, 4, 1, levels=(1, 3), rngs=nnx.Rngs(0))
    network.start([0.5, 0.5], np.eye(2), np.stack([np.eye(2)] * 2), lowest=[0.0, -1.0])
    last = readouts.Discretised([0, -1], [0, 1], [0, 3])
    diffusion, params = made(network, T=4, last_step=last)
    probdiff.save(tmp_path / "m", diffusion, params)
    again, other = probdiff.load(tmp_path / "m")
    x = jnp.ones((2, 2))
    first, second = (d.bind(p).x_0_hat(x, 2) for d, p in ((diffusion, params), (again, other)))
    assert (first == second).all()


def test_what_is_no_mixture_is_refused():
    network = networks.FromMixture((2,), 3, 4, 1, rngs=nnx.Rngs(0))
    eyes = np.stack([np.eye(2)] * 2)
    for given, message in (
        (([1.0] * 4, np.ones((4, 2)), np.stack([np.eye(2)] * 4)), "weights must be of 1 to 3"),
        (([0.5, -0.5], np.eye(2), eyes), "weights must be positive"),
        (([0.5, 0.5], np.eye(3), eyes), "means must have shape"),
        (([0.5, 0.5], np.eye(2), -eyes), "covariances must be positive definite"),
    ):
        with pytest.raises(ValueError, match=message):
            network.start(*given)
    with pytest.raises(ValueError, match="levels must be 2 numbers, one for each entry"):
        networks.FromMixture((2,), 3, 4, 1, levels=(4,), rngs=nnx.Rngs(0))
