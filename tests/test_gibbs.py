"""`ParticleGibbs` against exact posteriors; what it refuses, and what it says of itself."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from arviz_stats.base import array_stats
from numpyro.infer import HMC
from scipy import stats

from probdiff import BernoulliKernel, GaussianKernel, infer, readouts
from probdiff.standard import standard_diffusion
from test_coordinates import log_evidence, quadrature

FEW = {"num_chains": 2, "num_warmup": 2, "num_samples": 2, "num_leapfrog": 2, "num_particles": 8}


def se(draws):
    """Standard error of the mean of `(C, M)`, by ArviZ's effective number."""
    return draws.std() / np.sqrt(array_stats.ess(draws, chain_axis=0, draw_axis=1))


@pytest.mark.long
def test_posterior_of_known_and_measured_entries_is_exact_in_each_plate():
    """x_0 ~ N(0, I_2) in units, its first entry known, the sum measured; 16 chains of 50."""
    prior = standard_diffusion((2,), T=6, loc=np.array([1.0, 2.0]), scale=3.0).prior({})
    mask, y = np.array([[True, False]] * 2), jnp.array([0.0, 6.0])
    known = np.array([[4.0, 0.0], [-2.0, 0.0]])

    def program(y):
        with numpyro.plate("rows", 2):
            x_0 = prior(known=known, mask=mask)
            numpyro.deterministic("second", x_0[..., 1])
            numpyro.sample("y", dist.Normal(x_0.sum(-1), 1.5), obs=y)

    options = {"num_chains": 16, "num_warmup": 20, "num_samples": 50, "num_leapfrog": 6}
    gibbs = infer.ParticleGibbs(program, num_particles=32, **options)
    gibbs.run(jax.random.key(0), y)
    draws = gibbs.get_samples(group_by_chain=True)
    assert draws["x_0"].shape == (16, 50, 2, 2) and draws["second"].shape == (16, 50, 2)
    np.testing.assert_array_equal(draws["x_0"][..., 0], np.broadcast_to(known[:, 0], (16, 50, 2)))
    np.testing.assert_allclose(draws["second"], draws["x_0"][..., 1], rtol=1e-5)
    precision = 1 / 9 + 1 / 1.5**2
    for row in range(2):
        mean = (2 / 9 + (float(y[row]) - known[row, 0]) / 1.5**2) / precision
        x = draws["x_0"][:, :, row, 1]
        assert abs(x.mean() - mean) < 4 * se(x)
        assert x.std() == pytest.approx(precision**-0.5, rel=0.15)
    tree = gibbs.to_datatree()
    assert dict(tree["posterior"]["x_0"].sizes) == {
        "chain": 16, "draw": 50, "rows": 2, "x_0_dim_0": 2
    }  # fmt: skip
    assert tree["sample_stats"]["acceptance_rate"].dims == ("chain", "draw", "rows")
    assert 0.5 < float(tree["sample_stats"]["acceptance_rate"].mean()) <= 1


@pytest.mark.long
def test_x_0_and_an_unknown_noise_have_their_joint_posterior(capsys):
    """Against quadrature; 16 chains of 300."""
    prior, y = standard_diffusion(T=8).prior({}), np.array([0.9, 1.4, 1.1])

    def program(y):
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Normal(prior(), sigma).expand((3,)).to_event(1), obs=y)

    gibbs = infer.ParticleGibbs(program, num_chains=16, num_warmup=100, num_samples=300)
    gibbs.run(jax.random.key(0), y)
    draws = gibbs.get_samples(group_by_chain=True)
    for name, (mean, sd) in quadrature(y).items():
        a = draws[name].astype(np.float64)
        assert abs(a.mean() - mean) < 4 * se(a)
        assert a.std() == pytest.approx(sd, rel=0.1)
    gibbs.print_summary()
    assert "no warnings" in capsys.readouterr().out
    found = gibbs.log_evidence(jax.random.key(1), num_samples=50)
    assert abs(found.log_evidence - log_evidence(y)) < 4 * found.se < 0.4


@pytest.mark.long
def test_a_latent_site_below_x_0_keeps_its_law():
    """x_0 ~ N(0, 1), z ~ N(x_0, 1) latent, y ~ N(z, 1) in a plate: x_0 | y ~ N(y/3, 2/3)."""
    prior, y = standard_diffusion(T=8).prior({}), jnp.array([3.0, -1.5])

    def program(y):
        with numpyro.plate("rows", 2):
            z = numpyro.sample("z", dist.Normal(prior(), 1.0))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    gibbs = infer.ParticleGibbs(program, num_chains=8, num_warmup=50, num_samples=300)
    gibbs.run(jax.random.key(0), y)
    draws = gibbs.get_samples(group_by_chain=True)
    for row in range(2):
        for name, mean, variance in (("x_0", y[row] / 3, 2 / 3), ("z", 2 * y[row] / 3, 2 / 3)):
            a = draws[name][..., row].astype(np.float64)
            assert abs(a.mean() - float(mean)) < 4 * se(a)
            assert a.std() == pytest.approx(variance**0.5, rel=0.12)
    assert gibbs.to_datatree()["posterior"]["z"].dims == ("chain", "draw", "rows")
    found = gibbs.log_evidence(jax.random.key(1), num_samples=100)
    exact = dist.Normal(0.0, 3**0.5).log_prob(y).sum()
    assert abs(found.log_evidence - float(exact)) < 4 * found.se < 0.4


@pytest.mark.long
def test_known_entries_of_numbers_on_a_grid_are_conditioned_on():
    """Independent entries: the others keep their law, its masses by the grid's own cells."""
    last = readouts.Discretised(-2.0, 2.0, 9)
    diffusion = standard_diffusion((2,), T=8, last_step=last)
    prior, mask = diffusion.prior({}), np.array([True, False])

    def program(known):
        prior(known=known, mask=mask)

    options = {"num_chains": 32, "num_warmup": 20, "num_samples": 100, "num_leapfrog": 6}
    gibbs = infer.ParticleGibbs(program, **options)
    gibbs.run(jax.random.key(0), jnp.array([0.5, 0.0]))
    x = gibbs.get_samples(group_by_chain=True)["x_0"]
    assert set(np.unique(x[..., 0])) == {0.5} and set(np.unique(x[..., 1])) <= set(last.grid.values)
    assert abs(x[..., 1].mean()) < 4 * se(x[..., 1].astype(np.float64))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda x: numpyro.sample("k", dist.Bernoulli(0.5)), "must be continuous"),
        (lambda x: numpyro.sample("y", dist.Delta(x[..., 0]), obs=0.0), "must have a density"),
    ],
)
def test_what_cannot_be_moved_is_refused(make, text):
    prior = standard_diffusion((2,), T=4).prior({})
    gibbs = infer.ParticleGibbs(lambda: make(prior()), **FEW)
    with pytest.raises(ValueError, match=text):
        gibbs.run(jax.random.key(0))


@pytest.mark.parametrize("kernel", [GaussianKernel(), BernoulliKernel(0.5)])
def test_a_latent_site_outside_the_plates_that_hangs_on_x_0_is_refused(kernel):
    prior = standard_diffusion(T=4, kernel=kernel).prior({})

    def program(y):
        with numpyro.plate("rows", 2):
            x_0 = prior()
            numpyro.sample("y", dist.Normal(x_0, 1.0), obs=y)
        numpyro.sample("mean", dist.Normal(x_0.mean(), 0.1))

    with pytest.raises(ValueError, match="must not hang on x_0"):
        infer.ParticleGibbs(program, **FEW).run(jax.random.key(0), jnp.zeros(2))


def test_a_prior_that_hangs_on_another_latent_site_is_refused():
    prior = standard_diffusion((2,), T=4).prior({})

    def program():
        level = numpyro.sample("level", dist.Normal(0.0, 1.0))
        prior(known=jnp.stack([level, 0.0]), mask=np.array([True, False]))

    with pytest.raises(ValueError, match="must not depend on other latent sites"):
        infer.ParticleGibbs(program, **FEW).run(jax.random.key(0))


@pytest.mark.parametrize(
    ("diffusion", "few", "text"),
    [
        (
            standard_diffusion(T=4, kernel=BernoulliKernel(0.5)),
            {"num_particles": 1},
            "num_particles must be at least 2",
        ),
        (
            standard_diffusion(T=4, last_step=readouts.Discretised(-2.0, 2.0, 5)),
            {},
            "must be observed by known entries alone",
        ),
    ],
)
def test_priors_that_no_move_fits_are_refused(diffusion, few, text):
    prior = diffusion.prior({})

    def program():
        numpyro.factor("y", -(prior().astype(float) ** 2))

    with pytest.raises(ValueError, match=text):
        infer.ParticleGibbs(program, **FEW | few).run(jax.random.key(0))


@pytest.mark.long
def test_chains_in_separate_modes_are_said_to_differ():
    """|x_0| measured: two modes that no move joins."""
    prior = standard_diffusion(T=8).prior({})

    def program():
        numpyro.sample("y", dist.Normal(jnp.abs(prior()), 0.05), obs=1.5)

    gibbs = infer.ParticleGibbs(program, num_chains=8, num_samples=50, kernel=HMC)
    with pytest.warns(infer.InferenceWarning, match="R-hat of x_0 is up to"):
        gibbs.run(jax.random.key(0))
    share = (gibbs.get_samples()["x_0"] > 0).mean()
    assert 0.1 < share < 0.9


def test_nothing_is_returned_before_a_run():
    gibbs = infer.ParticleGibbs(lambda: None, **FEW)
    with pytest.raises(ValueError, match="run must be called first"):
        gibbs.get_samples()
    with warnings.catch_warnings(), pytest.raises(ValueError, match="num_chains"):
        infer.ParticleGibbs(lambda: None, num_chains=0)


@pytest.mark.long
def test_ranks_of_x_0_and_of_unknown_noise_and_gain_are_uniform():
    """200 simulations side by side in a plate, ranks of the truth among 100 draws; log r as well.

    Of m quantities the least Kolmogorov p is above 0.01/m.
    """
    count, prior = 200, standard_diffusion((2,), T=8).prior({})
    matrix = jnp.array([[1.0, 0.0], [0.5, 1.0], [-1.0, 0.5], [0.0, -1.0]])

    def law(x_0, gain, sigma):
        return dist.Normal(gain[..., None] * (x_0 @ matrix.T), sigma[..., None]).to_event(1)

    def program(y):
        with numpyro.plate("simulations", count):
            gain = numpyro.sample("gain", dist.Normal(1.0, 0.5))
            sigma = numpyro.sample("sigma", dist.LogNormal(-0.5, 0.5))
            numpyro.sample("y", law(prior(), gain, sigma), obs=y)

    keys = jax.random.split(jax.random.key(3), 5)
    truth = {
        "x_0": jax.random.normal(keys[0], (count, 2)),
        "gain": dist.Normal(1.0, 0.5).sample(keys[1], (count,)),
        "sigma": dist.LogNormal(-0.5, 0.5).sample(keys[2], (count,)),
    }
    y = law(**truth).sample(keys[3])
    gibbs = infer.ParticleGibbs(program, num_chains=4, num_warmup=200, num_samples=500)
    gibbs.run(keys[4], y)
    draws = {n: a[:, ::20].reshape(100, *a.shape[2:]) for n, a in gibbs.get_samples(True).items()}
    log_r = law(*(jnp.asarray(draws[n]) for n in truth)).log_prob(y)
    quantities = {
        "gain": (draws["gain"], truth["gain"]),
        "sigma": (draws["sigma"], truth["sigma"]),
        "first": (draws["x_0"][..., 0], truth["x_0"][:, 0]),
        "second": (draws["x_0"][..., 1], truth["x_0"][:, 1]),
        "log_r": (np.asarray(log_r), law(**truth).log_prob(y)),
    }
    spread = np.random.default_rng(0).uniform(size=count)
    p = {
        name: stats.kstest((np.sum(of < np.asarray(t), 0) + spread) / 101, "uniform").pvalue
        for name, (of, t) in quantities.items()
    }
    assert min(p.values()) > 0.01 / len(p), p


@pytest.mark.long
def test_an_unknown_gain_mixes_with_the_size_of_x_0():
    """Given the one the other hardly moves: both move at once. 4 chains of 500; 24 measurements."""
    prior = standard_diffusion((4,), T=5).prior({})
    rng = np.random.default_rng(1)
    matrix = jnp.asarray(rng.standard_normal((24, 4)), jnp.float32)
    y = 1.3 * np.asarray(matrix) @ rng.standard_normal(4) + 0.3 * rng.standard_normal(24)

    def program(y):
        x_0 = prior()
        gain = numpyro.sample("gain", dist.LogNormal(0.0, 0.5))
        numpyro.sample("y", dist.Normal(gain * (matrix @ x_0), 0.3).to_event(1), obs=y)

    gibbs = infer.ParticleGibbs(
        program, num_particles=64, num_chains=4, num_warmup=200, num_samples=500, num_leapfrog=12
    )
    gibbs.run(jax.random.key(0), jnp.asarray(y, jnp.float32))
    gain = gibbs.get_samples(group_by_chain=True)["gain"]
    assert array_stats.ess(gain, chain_axis=0, draw_axis=1) > 100  # of 2000; 8 one after another

    grid = np.linspace(0.05, 8, 4000)
    values, vectors = np.linalg.eigh(np.asarray(matrix, float) @ np.asarray(matrix, float).T)
    variance = grid[:, None] ** 2 * np.maximum(values, 0) + 0.3**2
    log_p = -0.5 * ((vectors.T @ y) ** 2 / variance + np.log(variance)).sum(1)
    p = np.exp(log_p - log_p.max()) * stats.lognorm.pdf(grid, 0.5)
    p /= p.sum()
    mean = p @ grid
    assert abs(gain.mean() - mean) < 4 * se(gain)
    assert gain.std() == pytest.approx(np.sqrt(p @ (grid - mean) ** 2), rel=0.2)
