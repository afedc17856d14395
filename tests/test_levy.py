"""Lévy processes: the exact denoiser, the Gibbs samplers, the twist, and the run in small."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

from probdiff import infer
from probdiff.experiments import levy
from probdiff.experiments.conditioning import COVERAGE
from probdiff.experiments.levy import gibbs, laws
from probdiff.experiments.levy.twist import EntrywiseTwist, inverse_of_triangular

LAWS = {"Bernoulli–Laplace": laws.BernoulliLaplace(0.3, 0.8), "Student": laws.Student(3.0)}


def pieces(law, count=8000):
    """Nodes and masses of the law of an increment, dense enough for sums to be integrals."""
    u = np.sinh(np.linspace(-9, 9, count))
    du = np.gradient(u)
    if isinstance(law, laws.Student):
        return u, stats.t(law.df).pdf(u) * du
    slab = law.p * stats.laplace(scale=law.b).pdf(u) * du
    return np.append(u, 0.0), np.append(slab, 1 - law.p)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.long
def test_the_denoiser_is_the_integral(name):
    law = LAWS[name]
    u, mass = pieces(law)
    assert mass.sum() == pytest.approx(1, abs=1e-6)
    scale, reverse = np.sqrt(law.variance), laws.exact_diffusion(law, 25, T=20).bind({})
    for t in (2, 9, 14, 20):
        step = reverse.steps.at(t, 1)
        root, v = np.sqrt(step.alpha_bar_t), law.variance * step.noise_t / step.alpha_bar_t
        w = np.linspace(-6, 6, 25) * np.sqrt(v + law.variance)
        p = mass * np.exp(-0.5 * (w[:, None] - u) ** 2 / v)
        p /= p.sum(1, keepdims=True)
        mean = p @ u
        variance = p @ u**2 - mean**2
        x_t = jnp.asarray(w * root / scale, jnp.float32)[None]
        found = reverse.x_0_given(x_t, t, reverse.outputs(x_t, t))
        np.testing.assert_allclose(found.mean[0] * scale, mean, rtol=1e-3, atol=1e-3)
        tolerance = {"rtol": 4e-3, "atol": 2e-3 * variance.max()}
        np.testing.assert_allclose(found.variance[0] * law.variance, variance, **tolerance)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.long
def test_gibbs_draws_have_the_moments_of_quadrature(name):
    """Two increments, of which two mixtures are measured; within 4 standard errors."""
    law, A, sigma = LAWS[name], np.array([[1.0, 0.4], [0.9, 1.1]]), 0.5
    y = np.array([[0.3, 1.2], [-1.5, 0.2]])
    u, mass = pieces(law, count=1000)  # none of the nodes of the slab is 0
    first, second = np.meshgrid(u, u, indexing="ij")
    draws = gibbs.draw_chains(jax.random.key(1), law, A, sigma, y, num_chains=50, num_warmup=20,
                        num_samples=400)  # fmt: skip
    for i, seen in enumerate(y):
        a = [A[j, 0] * first + A[j, 1] * second for j in range(2)]
        log_p = sum(-0.5 * ((seen[j] - a[j]) / sigma) ** 2 for j in range(2))
        p = np.outer(mass, mass) * np.exp(log_p - log_p.max())
        p /= p.sum()
        exact = [first, second, first**2, first * second, (first == 0) & (second == 0)]
        x, z = draws[:, :, i, 0], draws[:, :, i, 1]
        found = [x, z, x**2, x * z, (x == 0) & (z == 0)]
        for value, drawn in itertools.zip_longest(exact, found):
            chains = drawn.mean(1)
            se = chains.std(ddof=1) / np.sqrt(len(chains))
            assert abs(chains.mean() - (p * value).sum()) < 4 * se + 1e-3


@pytest.mark.parametrize("d", [1, 3, 16])
def test_blocks_invert_a_triangular_matrix(d):
    L = np.tril(np.random.default_rng(0).normal(size=(2, 3, d, d))) + 4 * np.eye(d)
    found = jax.jit(inverse_of_triangular)(jnp.asarray(L, jnp.float32))
    np.testing.assert_allclose(found, np.linalg.inv(L), atol=1e-5)


@pytest.mark.long
def test_the_twist_tells_jumps_from_zeros():
    """Three increments, sums of them measured: evidence and means by a million draws of the law."""
    law, A, sigma = LAWS["Bernoulli–Laplace"], np.tril(np.ones((3, 3)))[1:], 0.2
    y = np.array([1.2, 0.9])
    prior = laws.exact_diffusion(law, 3, T=40).prior({})

    def program(y):
        with numpyro.plate("signal", 1):
            measured = prior() @ jnp.asarray(A.T, jnp.float32)
            numpyro.sample("y", dist.Normal(measured, sigma).to_event(1), obs=y[None])

    smc = infer.SMC(program, num_particles=500, num_runs=2, twist=EntrywiseTwist())
    smc.run(jax.random.key(2), jnp.asarray(y, jnp.float32))
    u = np.asarray(law.sample(jax.random.key(3), (1_000_000, 3)), np.float64)
    r = np.exp(stats.norm(y, sigma).logpdf(u @ A.T).sum(1))
    assert abs(float(smc.log_evidence[0]) - np.log(r.mean())) < 0.1
    assert smc.result.health.least_ess.min() > 0.3
    found = smc.get_samples()["x_0"].reshape(-1, 3)
    np.testing.assert_allclose(found.mean(0), r @ u / r.sum(), atol=0.06)
    np.testing.assert_allclose((found**2).mean(0), r @ u**2 / r.sum(), atol=0.08)


def test_a_gap_is_the_ratio_of_two_sums_in_decibels():
    exact = np.array([1.0, 2.0, 3.0, 6.0])
    assert levy.gap(1.1 * exact, exact) == (pytest.approx(10 * np.log10(1.1)), pytest.approx(0))
    rng = np.random.default_rng(0)
    of = [levy.gap(*rng.exponential(size=(2, 40))) for _ in range(400)]
    values, se = np.array(of).T
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(400)
    assert np.median(se) == pytest.approx(values.std(), rel=0.15)


def test_operators_keep_their_shape_and_what_is_not_seen_is_noise():
    of = levy.operators(64)
    assert {name: int(H.any(1).sum()) for name, H in of.items()} == {
        "denoising": 64, "deconvolution": 64, "imputation": 26
    }  # fmt: skip
    np.testing.assert_allclose(of["deconvolution"].sum(1), 1)
    found = levy.measure(jax.random.key(0), laws.Student(), of["imputation"], 200)
    is_seen = of["imputation"].any(1)
    assert found.y[:, ~is_seen].std() == pytest.approx(found.sigma, rel=0.05)
    noise = (found.y - found.u @ found.matrix.T)[:, is_seen]
    assert noise.std() == pytest.approx(found.sigma, rel=0.05)


@pytest.mark.long
def test_a_run_leaves_table_figure_and_means(tmp_path):
    rows = levy.EXPERIMENT.run(tmp_path, quick=True, progress=False)
    assert {file.name for file in tmp_path.iterdir()} == {
        "report.md", "table.json", "signals.png", "means.nc"
    }  # fmt: skip
    assert len([row for row in rows if row.row.endswith(COVERAGE)]) == 2 * 3 * 2
    assert all(np.isfinite(float(row.value)) for row in rows)
