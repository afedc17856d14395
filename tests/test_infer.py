"""`SMC` and `Guided` as a user meets them: draws, evidence, warnings, summaries, DataTrees.

The oracle is a diffusion that is N(0, 1) at every level, whose posteriors and evidences are closed.
"""

import contextlib
import math
import re
import warnings

import arviz_stats
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from jax.sharding import AbstractMesh, Mesh
from scipy import stats

from probdiff import (
    BernoulliKernel,
    Diffusion,
    GaussianKernel,
    infer,
    readouts,
    schedules,
    standard_diffusion,
)
from probdiff.infer import InferenceWarning, evidence, health, results
from probdiff.infer.particles import Options, Outcome, Trace

T = 50
QUIET = "ignore::probdiff.infer.InferenceWarning"


def standard_normal(event_shape=(), **options):
    """A diffusion that is N(0, 1) at every level, exactly."""
    beta = schedules.log_snr_linear(T, beta_1=1e-4, alpha_bar_T=1e-4)
    readout = readouts.Perturbation(readouts.ForwardVariance())
    return Diffusion(
        GaussianKernel(),
        beta,
        lambda x, t: 0 * x,
        event_shape=event_shape,
        readout=readout,
        **options,
    )


PRIOR = standard_normal().prior({})
ASIDE = standard_normal().prior({})  # for single runs: `PRIOR` keeps what the fixtures compiled
PAIR = standard_normal((2,)).prior({})
BITS = Diffusion(
    BernoulliKernel(0.5), schedules.harmonic(5), lambda x, t: 0.0 * x, event_shape=(2,)
).prior({})


def measured(y, sigma, shift=None, *, prior=PRIOR):
    """A number measured with noise, and a factor that does not depend on it."""
    x = prior()
    numpyro.deterministic("square", x**2)
    numpyro.sample("y", dist.Normal(x, sigma), obs=y)
    if shift is not None:
        numpyro.factor("shift", shift)


def measured_aside(y, sigma):
    """The same, of another diffusion."""
    measured(y, sigma, prior=ASIDE)


def in_plates(y):
    """A pair of numbers for each row and column, one of each measured."""
    prior = standard_normal((2,)).prior({})
    with numpyro.plate("column", y.shape[1]), numpyro.plate("row", y.shape[0]):
        x = prior()
        numpyro.deterministic("first", x[..., 0])
        numpyro.sample("y", dist.Normal(x[..., 0], 0.5), obs=y)


def array(value):
    return np.float32(value)


@pytest.fixture(scope="module")
def pair():
    """A diffusion of two numbers."""
    return standard_normal((2,))


@pytest.fixture(scope="module")
def smc():
    """One compiled sampler for many runs; each test runs it anew."""
    return infer.SMC(measured, num_particles=64, num_runs=16)


@pytest.fixture(scope="module")
def guided():
    """The sampler of 2015."""
    return infer.Guided(measured, twist=infer.KernelTwist(), num_samples=2000)


@pytest.fixture(scope="module")
def done():
    """A run whose results are only looked at."""
    sampler = infer.SMC(in_plates, num_particles=64, num_runs=4)
    sampler.run(jax.random.key(3), np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3))
    return sampler


def run(sampler, y, sigma, shift=0.0, *, seed=0):
    sampler.run(jax.random.key(seed), *map(array, (y, sigma, shift)))
    return sampler


# evidence and draws


@pytest.mark.parametrize(("y", "sigma"), [(1.0, 0.5), (-2.0, 0.3), (0.5, 2.0)])
def test_posterior_and_evidence_are_those_of_the_gaussian_oracle(smc, y, sigma):
    run(smc, y, sigma)
    mean, sd = y / (1 + sigma**2), sigma / math.sqrt(1 + sigma**2)
    log_z = stats.norm.logpdf(y, 0, math.sqrt(1 + sigma**2))
    assert abs(smc.log_evidence - log_z) < 4 * smc.log_evidence_se
    assert smc.log_evidence_se < 0.05
    draws = smc.get_samples()["x_0"]
    ess = float(smc.result.health.ess)
    assert abs(draws.mean() - mean) < 4 * sd / math.sqrt(ess)
    assert abs(draws.var() - sd**2) < 4 * sd**2 * math.sqrt(2 / ess)


def test_weighted_draws_have_the_moments_of_the_oracle(smc):
    run(smc, 1.0, 0.5)
    sites, log_w = smc.get_weighted_samples()
    assert sites["x_0"].shape == sites["square"].shape == log_w.shape == (16 * 64,)
    weights = np.exp(log_w)
    assert weights.sum() == pytest.approx(1)
    assert np.sum(weights * sites["x_0"]) == pytest.approx(0.8, abs=4 * math.sqrt(0.2 / 900))
    np.testing.assert_allclose(sites["square"], sites["x_0"] ** 2, rtol=1e-6)  # of float32


def test_a_likelihood_of_one_leaves_evidence_exactly_one(key):
    sampler = infer.SMC(lambda: ASIDE(), num_particles=512, num_runs=1, steps=10)
    sampler.run(key)
    assert sampler.log_evidence == 0.0
    draws = sampler.get_samples()["x_0"]
    assert stats.kstest(draws, "norm").pvalue > 1e-3
    pool = sampler.get_weighted_samples()[0]["x_0"]
    np.testing.assert_array_equal(np.sort(draws), np.sort(pool))
    assert math.isnan(sampler.log_evidence_se)  # one run has no error
    assert all(map(math.isnan, sampler.log_evidence_interval()))


def test_a_constant_factor_shifts_the_evidence_and_nothing_else(smc):
    before = run(smc, 1.0, 0.5, 0.0).log_evidence
    draws = smc.get_samples()["x_0"]
    after = run(smc, 1.0, 0.5, 3.0).log_evidence
    assert after - before == pytest.approx(3.0, abs=1e-5)
    np.testing.assert_allclose(smc.get_samples()["x_0"], draws, rtol=1e-4, atol=1e-5)


def test_the_same_key_gives_the_same_draws_and_another_key_others(smc):
    draws = run(smc, 1.0, 0.5).get_samples()["x_0"]
    np.testing.assert_array_equal(run(smc, 1.0, 0.5).get_samples()["x_0"], draws)
    smc.run(jax.random.PRNGKey(0), array(1.0), array(0.5), array(0.0))
    np.testing.assert_array_equal(smc.get_samples()["x_0"], draws)
    assert not np.isin(run(smc, 1.0, 0.5, seed=1).get_samples()["x_0"], draws).any()


@pytest.mark.long
def test_an_entry_of_a_plate_is_the_program_without_the_plate(x64):
    prior = standard_normal().prior({})
    y = np.linspace(-2, 2, 8)

    def alone(y):
        numpyro.sample("y", dist.Normal(prior(), 0.5), obs=y)

    def together(y):
        with numpyro.plate("row", 8):
            alone(y)

    key, options = jax.random.key(5), {"num_particles": 64, "num_runs": 4}
    plated, single = infer.SMC(together, **options), infer.SMC(alone, **options)
    plated.run(key, y)
    assert plated.log_evidence.shape == (8,)
    for i in (0, 3, 7):
        single.run(jax.random.fold_in(key, i), np.asarray(y[i]))
        for ours, alones in [
            (plated.get_samples()["x_0"][:, i], single.get_samples()["x_0"]),
            (plated.get_weighted_samples()[1][:, i], single.get_weighted_samples()[1]),
            (plated.log_evidence[i], single.log_evidence),
            (plated.log_evidence_se[i], single.log_evidence_se),
        ]:
            np.testing.assert_allclose(ours, alones, rtol=1e-9)


def test_draws_of_two_plates_have_their_shapes(done):
    draws = done.get_samples()
    assert {name: a.shape for name, a in draws.items()} == {
        "x_0": (256, 2, 3, 2),
        "first": (256, 2, 3),
    }
    np.testing.assert_array_equal(draws["first"], draws["x_0"][..., 0])
    sites, log_w = done.get_weighted_samples()
    assert sites["x_0"].shape == (256, 2, 3, 2)
    assert log_w.shape == (256, 2, 3)
    np.testing.assert_allclose(np.exp(log_w).sum(0), 1, rtol=1e-6)
    for a in (done.log_evidence, done.log_evidence_se, *done.log_evidence_interval()):
        assert a.shape == (2, 3)
    y = np.linspace(-1, 1, 6).reshape(2, 3)
    error = 4 * math.sqrt(0.2 / 200)
    np.testing.assert_allclose(draws["first"].mean(0), 0.8 * y, rtol=0, atol=error)


def test_evidence_and_its_error_are_those_over_the_runs(smc):
    run(smc, 1.0, 0.5)
    z = np.exp(smc.result.outcome.log_evidences.astype(float))
    assert smc.log_evidence == pytest.approx(math.log(z.mean()), abs=1e-6)
    assert smc.log_evidence_se == pytest.approx(z.std(ddof=1) / 4 / z.mean(), rel=1e-3)


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_intervals_hold_what_they_say_whatever_the_spread(sigma):
    """Of 4 runs with log Ẑ ~ N(−σ²/2, σ²), log Z = 0; n = 1000, two-sided at 4 standard errors."""
    z = np.random.default_rng(1).normal(-(sigma**2) / 2, sigma, (4, 1000))
    low, high = evidence.log_evidence_interval(z, 0.95)
    miss = 4 * math.sqrt(0.95 * 0.05 / 1000)
    assert abs(np.mean((low <= 0) & (0 <= high)) - 0.95) < miss
    below, above = int(np.sum(high < 0)), int(np.sum(low > 0))
    assert stats.binomtest(below, below + above).pvalue > 1e-3


@pytest.mark.long
def test_an_interval_of_two_runs_is_warned_of(smc):
    two = infer.SMC(smc.program, num_particles=16, num_runs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", infer.InferenceWarning)
        run(two, 1.0, 0.5)
    with pytest.warns(infer.InferenceWarning, match="num_runs is 2"):
        two.log_evidence_interval()


@pytest.mark.filterwarnings(QUIET)
def test_no_weight_at_all_is_said_and_never_nan(smc):
    run(smc, 1.0, 0.5, -np.inf)
    assert smc.result.complaints[0].startswith("all weights are zero")
    assert smc.log_evidence == -math.inf
    assert math.isnan(smc.log_evidence_se)
    np.testing.assert_allclose(smc.get_weighted_samples()[1], -math.log(16 * 64))
    assert np.isfinite(smc.get_samples()["x_0"]).all()


@pytest.mark.filterwarnings(QUIET)
def test_a_likelihood_that_is_not_a_number_counts_as_zero(smc):
    run(smc, 1.0, -0.5)  # log of a negative sd
    assert smc.log_evidence == -math.inf
    assert "the twist was not finite" in " ".join(smc.result.complaints)


def test_a_sampler_is_shown_on_a_line():
    sampler = infer.SMC(measured, num_particles=7, num_runs=3)
    assert repr(sampler) == (
        "SMC(measured, the usual twist, num_particles=7, num_runs=3, not run yet)"
    )
    many = infer.TweedieTwist(rank=50)
    assert repr(infer.Guided(measured, twist=many)) == (
        "Guided(measured, TweedieTwist, num_samples=1000, not run yet)"
    )


def test_a_sampler_that_has_run_says_so(smc):
    run(smc, 1.0, 0.5)
    assert repr(smc).endswith(", has run)")


def test_systematic_resampling_takes_each_particle_within_one_of_its_share(key):
    log_w = np.log(np.random.default_rng(0).dirichlet(np.full(40, 0.5), 3).T)
    index = results.resample(jax.random.split(key, 3), log_w)
    for column, weights in zip(index.T, np.exp(log_w).T, strict=True):
        counts = np.bincount(column, minlength=40)
        assert (np.abs(counts - 40 * weights) < 1).all()
    assert not (np.diff(index, axis=0) >= 0).all()  # in random order


def test_a_run_without_weight_is_not_pooled():
    outcome = healthy(log_evidences=np.array([0.0, -np.inf, np.log(3.0)]), runs=3)
    weights = np.exp(results.pooled_log_weights(outcome)).reshape(3, -1).sum(1)
    np.testing.assert_allclose(weights, [0.25, 0, 0.75], atol=1e-12)


@pytest.mark.long
def test_one_device_or_a_mesh_of_one_gives_the_same(smc, key):
    run(smc, 1.0, 0.5)
    mesh = Mesh(np.array(jax.devices()[:1]), ("run",))
    sharded = infer.SMC(measured, num_particles=64, num_runs=16, mesh=mesh)
    run(sharded, 1.0, 0.5)
    np.testing.assert_allclose(
        sharded.get_samples()["x_0"], smc.get_samples()["x_0"], rtol=1e-4, atol=1e-5
    )


def test_a_bar_changes_nothing(smc, capfd):
    draws = run(smc, 1.0, 0.5).get_samples()["x_0"]
    smc.progress = True
    try:
        run(smc, 1.0, 0.5)
    finally:
        smc.progress = False
    assert "infer: 100%" in capfd.readouterr().err
    np.testing.assert_array_equal(smc.get_samples()["x_0"], draws)


# guided


@pytest.mark.long
def test_the_rule_of_2015_tends_to_the_square_of_the_likelihood(guided):
    run(guided, 0.0, 1.0)
    sd = 1 / math.sqrt(3)  # of p r², not of p r
    draws = guided.get_samples()["x_0"]
    assert len(np.unique(draws)) == 2000
    assert abs(draws.mean()) < 4 * sd / math.sqrt(2000)
    assert guided.check.difference < 0.5  # both means are 0: nothing to see in them
    run_loudly(guided, 3.0, 1.0)
    draws = guided.get_samples()["x_0"]
    assert abs(draws.mean() - 2) < 4 * sd / math.sqrt(2000)
    assert abs(draws.var() - sd**2) < 4 * sd**2 * math.sqrt(2 / 2000)


def run_loudly(guided, y, sigma):
    with pytest.warns(InferenceWarning, match=r"draws differ from.*Use SMC"):
        run(guided, y, sigma)


@pytest.mark.long
def test_guided_warns_of_a_spread_that_is_wrong_where_the_means_are_right():
    prior = standard_diffusion((2,)).prior({})

    def program(y):
        numpyro.sample("y", dist.Normal(prior(), 0.1).to_event(1), obs=y)

    guided = infer.Guided(program, twist=infer.PointTwist(), num_samples=2000)
    with pytest.warns(InferenceWarning, match=r"draws differ from.*Use SMC"):
        guided.run(jax.random.key(0), jnp.zeros(2))
    assert guided.check.difference < 0.5 < 1.5 < guided.check.ratio
    right = infer.Guided(program, num_samples=2000)
    right.run(jax.random.key(0), jnp.zeros(2))  # without a warning
    assert right.check.ratio < 1.25


@pytest.mark.long
def test_guided_says_that_it_is_approximate_and_how_far_off(guided, capsys):
    run_loudly(guided, 3.0, 1.0)
    log_z = stats.norm.logpdf(3, 0, math.sqrt(2))
    assert guided.check.log_evidence == pytest.approx(log_z, abs=0.3)
    assert 50 < guided.check.ess <= 128
    assert guided.check.difference == pytest.approx((2 - 1.5) / math.sqrt(0.5), abs=0.4)
    guided.print_summary()
    assert "approximate: not weighed" in capsys.readouterr().out
    tree = guided.to_datatree()
    assert tree.attrs["approximate"] == 1
    assert tree.attrs["twist"] == "KernelTwist(decays=False)"
    assert "log_evidence" not in tree["smc"]


@pytest.mark.filterwarnings(QUIET)
def test_known_entries_need_finite_weights_or_none(key):
    prior = standard_normal((2,)).prior({})
    known, mask = np.array([0.7, 0.0], np.float32), np.array([True, False])

    def program():
        prior(known=known, mask=mask)

    with pytest.raises(ValueError, match=r"finite weights where .*; got PointTwist. Use .*Guided"):
        infer.SMC(program, twist=infer.PointTwist()).run(key)
    guided = infer.Guided(program, twist=infer.PointTwist(), num_samples=64, check=False)
    guided.run(key)
    assert (guided.get_samples()["x_0"][:, 0] == known[0]).all()


# warnings


def healthy(*, runs=2, size=200, **changes):
    """An outcome with nothing to complain of, but for what is changed."""
    rng = np.random.default_rng(0)
    log_w = normalised(0.1 * rng.normal(size=(runs, size)))
    levels = np.full((T + 1, runs), 0.0)
    trace = {"ess": levels + 0.9 * size, "resampled": levels > 0, "shift": levels, "bad": levels}
    trace |= {name: changes.pop(name) for name in trace if name in changes}
    return Outcome(
        x_0=rng.normal(size=(runs, size)),
        log_weights=log_w,
        log_evidences=np.zeros(runs),
        log_r=rng.normal(size=(runs, size)),
        ancestors=np.broadcast_to(np.arange(size), (runs, size)),
        worst_log_weights=0.1 * rng.normal(size=(runs, size)),
        trace=Trace(**trace),
    )._replace(**changes)


def complaints_of(outcome, *, left=0.0):
    """What is said of an outcome, with "Help yourself" as advice."""
    runs, size = outcome.log_weights.shape
    options = Options(infer.LaplaceTwist(), size, runs, None, True, 0.5, 1)
    log_w = results.pooled_log_weights(outcome)
    keys = jax.random.split(jax.random.key(0), 1 + runs)[:, None]
    in_runs = np.stack([results.resample(keys[1 + r], outcome.log_weights[r]) for r in range(runs)])
    index = results.resample(keys[0], log_w)
    measures = health.health(outcome, log_w, index, in_runs, left)
    return health.complaints(options, measures, "Help yourself")


def heavy(shape, power=2.0):
    """Log weights with a Pareto tail of shape `power`."""
    return power * np.random.default_rng(1).exponential(size=shape)


def normalised(log_w):
    return log_w - np.log(np.exp(log_w).sum(1, keepdims=True))


def few_with_weight(runs, size, count):
    log_w = np.full((runs, size), -np.inf)
    log_w[:, :count] = -math.log(count)
    return log_w


def test_a_healthy_run_is_not_complained_of():
    assert complaints_of(healthy()) == ()


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        ({"log_evidences": np.array([0.0, 1.2])}, "log evidence differs by up to 1.2 nats"),
        ({"ess": np.full((T + 1, 2), 19.0)}, "fell to 9.5% of num_particles at one level"),
        (
            {"log_weights": few_with_weight(2, 200, 45)},
            "effective number of draws is 90, below 100",
        ),
        ({"ancestors": np.arange(200)[None] % 9 + np.zeros((2, 1), int)}, "from 18 particles"),
        (
            {"worst_log_weights": heavy((2, 200)), "resampled": np.ones((T + 1, 2), bool)},
            "worst step",
        ),
        ({"log_r": np.arange(400.0).reshape(2, 200)}, "R-hat over the runs is"),
        ({"x_0": np.arange(400.0).reshape(2, 200)}, "R-hat over the runs is"),
        ({"bad": np.full((T + 1, 2), 0.25)}, "twist was not finite for up to 25.0%"),
        ({"log_evidences": np.full(2, -np.inf)}, "all weights are zero"),
    ],
)
def test_each_trouble_is_warned_of_alone(outcome, words):
    (complaint,) = complaints_of(healthy(**outcome))
    assert words in complaint


def test_without_resampling_the_final_weights_show_what_a_step_did():
    assert complaints_of(healthy(worst_log_weights=heavy((2, 200)))) == ()


def test_a_heavy_tail_of_the_final_weights_is_warned_of():
    outcome = healthy(log_weights=normalised(heavy((2, 2000), 1.0)), size=2000)
    assert "Pareto k of the final weights" in " ".join(complaints_of(outcome))


def test_a_diffusion_that_does_not_end_in_noise_is_warned_of():
    (complaint,) = complaints_of(healthy(), left=0.2)
    assert "alpha_bar_T times E|x_0|^2 is 0.2" in complaint
    assert complaints_of(healthy(), left=0.09) == ()


@pytest.mark.parametrize("is_known", [True, False])
def test_what_is_far_out_is_said_in_standard_deviations(key, is_known):
    scale = 7.0
    prior = standard_normal((2,), scale=scale, loc=3.0).prior({})
    value = 3 + scale * jnp.array([50.0, 0.5])

    def program():
        if is_known:
            return prior(known=value, mask=jnp.array([True, False]))
        numpyro.sample("y", dist.Normal(prior(), 0.1 * scale).to_event(1), obs=value)

    smc = infer.SMC(program, num_particles=200)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        smc.run(key)
    texts = [str(warning.message) for warning in caught]
    what = "a known value" if is_known else "an entry"
    said = f"{what} of x_0 lies (\\d+) standard deviations from loc"
    (far,) = (int(found[1]) for text in texts if (found := re.search(said, text)))
    assert (far == 50) if is_known else (20 < far <= 50), texts
    assert not any("alpha_bar_T" in text for text in texts)


@pytest.mark.parametrize(("variance", "shown"), [(1.0, False), (0.09, True), (100.0, False)])
def test_far_out_is_by_the_variance_of_the_prior(key, variance, shown):
    prior = standard_normal((2,)).prior({}, variance=variance)
    known, mask = jnp.array([3.0, 0.0]), jnp.array([True, False])
    smc = infer.SMC(lambda: prior(known=known, mask=mask), num_particles=200)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        smc.run(key)
    is_said = any("lies 10 standard deviations" in str(warning.message) for warning in caught)
    assert is_said == shown


@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize(
    ("options", "variance", "advice"),
    [
        ({}, None, "Raise num_particles; give Diffusion.prior the covariance"),
        ({"steps": 10}, None, "Raise num_particles or steps; give Diffusion.prior the covariance"),
        ({"steps": 10}, np.eye(2), "Raise num_particles or steps"),
        ({"twist": infer.KernelTwist()}, None, "Use LaplaceTwist, or raise num_particles"),
        ({"twist": infer.PointTwist()}, None, "Use LaplaceTwist, or raise num_particles"),
        ({"twist": infer.TweedieTwist()}, None, "Raise num_particles, or the twist's rank"),
    ],
)
def test_advice_fits_the_sampler(pair, options, variance, advice, key):
    """Two particles are too few for any."""
    prior = pair.prior({}, variance=variance)
    sampler = infer.SMC(lambda: prior(), num_particles=2, num_runs=1, **options)
    sampler.run(key)
    assert advice in sampler.result.complaints[-1]
    asks = "give Diffusion.prior the covariance"
    assert [asks in text for text in sampler.result.complaints][-1] == (asks in advice)


@pytest.mark.filterwarnings(QUIET)
def test_advice_for_symbols_asks_for_particles_alone(key):
    sampler = infer.SMC(lambda: BITS(), num_particles=2, num_runs=1)
    sampler.run(key)
    assert sampler.result.complaints[-1].endswith("below 100. Raise num_particles")


def test_equal_weights_have_no_tail():
    assert np.isnan(health.pareto_k(np.zeros(1000)))
    assert np.isnan(health.pareto_k(np.linspace(0, 1, 99)))  # too few for a fit
    light = health.pareto_k(np.random.default_rng(0).normal(size=1000) * 0.1)
    assert light < 0.5 < health.pareto_k(heavy(1000, 1.0))


@pytest.mark.long
def test_a_collapse_is_warned_of_once_a_kind_and_listed_in_the_summary(capsys):
    def program(y):
        with numpyro.plate("row", 2):
            measured_aside(y, 0.01)

    sampler = infer.SMC(program, num_particles=32, num_runs=2, twist=infer.KernelTwist())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampler.run(jax.random.key(0), np.full(2, 3.0, np.float32))
    texts = [str(w.message) for w in caught if w.category is InferenceWarning]
    assert len(texts) == len(set(texts)) >= 3
    assert all(text.startswith(("in 1 of 2 systems", "in 2 of 2 systems")) for text in texts)
    sampler.print_summary()
    out = capsys.readouterr().out
    assert all(f"warning: {text}" in out for text in texts)


# summary and DataTree


def test_the_summary_holds_entries_evidence_and_particles(smc, capsys):
    run(smc, 1.0, 0.5).print_summary()
    out = capsys.readouterr().out
    draws = smc.get_samples()["x_0"].astype(float)
    row = (draws.mean(), draws.std(), *np.quantile(draws, [0.05, 0.95]))
    assert "x_0 " + " ".join(f"{v:10.4g}" for v in row) in out
    low, high = smc.log_evidence_interval()
    assert f"{smc.log_evidence:.4f} (95% from {low:.4f} to {high:.4f})" in out
    assert "LaplaceTwist(rank=4): 50 of T = 50 steps, 16 run(s) of 64 particles" in out
    assert f"network calls: {98 * 16 * 64}, 98 a particle" in out
    assert "no warnings" in out


def test_the_summary_says_what_it_leaves_out(done, capsys):
    done.print_summary(limit=4)
    out = capsys.readouterr().out
    assert "x_0[0, 1, 1]" in out
    assert "x_0[0, 2, 0]" not in out
    assert "... and 8 more entries of x_0" in out
    assert "by row, column:" in out
    assert "... and 2 more systems" in out


def test_the_tree_has_named_dims_and_all_groups(done):
    tree = done.to_datatree()
    plates = ("row", "column")
    expected = {
        "posterior": {"x_0": ("chain", "draw", *plates, "x_0_dim_0"), "first": None},
        "sample_stats": {
            "log_r": ("chain", "draw", *plates),
            "log_weight": None,
            "log_likelihood_y": ("chain", "draw", *plates),
        },
        "posterior_predictive": {"y": ("chain", "draw", *plates)},
        "observed_data": {"y": plates},
        "runs": {"x_0": ("chain", "draw", *plates, "x_0_dim_0"), "log_r": None},
        "smc": {
            "ess": ("level", "run", *plates),
            "log_evidence_by_run": ("run", *plates),
            "pareto_k": plates,
        },
    }
    assert set(tree.children) == set(expected)
    for group, variables in expected.items():
        for name, dims in variables.items():
            assert dims is None or tree[group][name].dims == dims, (group, name)
    assert dict(tree["runs"].sizes)["chain"] == 4
    assert dict(tree["posterior"].sizes)["draw"] == 256
    np.testing.assert_array_equal(tree["smc"]["t"], np.arange(T + 1))
    for node in tree.subtree:
        for variable in node.variables.values():
            assert isinstance(variable.data, np.ndarray)


def test_the_tree_holds_the_numbers_of_the_run(done):
    tree, draws = done.to_datatree(), done.get_samples()
    np.testing.assert_array_equal(tree["posterior"]["x_0"][0], draws["x_0"])
    y = tree["observed_data"]["y"].values
    log_lik = stats.norm.logpdf(y, draws["first"], 0.5)
    for name in ("log_likelihood_y", "log_r"):
        np.testing.assert_allclose(tree["sample_stats"][name][0], log_lik, rtol=1e-4, atol=1e-4)
    noise = tree["posterior_predictive"]["y"].values[0] - draws["first"]
    assert stats.kstest(noise.ravel() / 0.5, "norm").pvalue > 1e-3
    np.testing.assert_array_equal(tree["smc"]["log_evidence"], done.log_evidence)
    np.testing.assert_array_equal(tree["smc"]["ess"][0], done.result.outcome.trace.ess[-1])


def test_the_tree_says_what_was_run(done):
    attrs = done.to_datatree().attrs
    assert attrs["approximate"] == 0
    assert attrs["sampler"] == "SMC"
    assert (attrs["T"], attrs["steps"]) == (T, T)
    assert (attrs["num_particles"], attrs["num_runs"]) == (64, 4)
    assert attrs["network_calls"] == 98 * 64 * 4 * 6
    assert attrs["jax_version"] == jax.__version__


def test_the_tree_goes_to_a_file_and_back_and_into_arviz(done, tmp_path):
    tree = done.to_datatree()
    tree.to_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "posterior.nc", engine="h5netcdf") as back:
        assert back.equals(tree)
        assert back.attrs["twist"] == "LaplaceTwist(rank=4)"
    table = arviz_stats.summary(tree, var_names=["first"])
    assert len(table) == 6
    r_hat = arviz_stats.rhat(tree["runs"].to_dataset())
    assert float(r_hat["x_0"].max()) < 1.05


def test_factors_are_likelihoods_and_not_data(smc):
    tree = run(smc, 1.0, 0.5, 2.0).to_datatree()
    stats = tree["sample_stats"]
    assert {"log_likelihood_y", "log_likelihood_shift"} < set(stats.data_vars)
    assert set(tree["posterior_predictive"].data_vars) == {"y"}
    assert set(tree["observed_data"].data_vars) == {"y"}
    np.testing.assert_array_equal(stats["log_likelihood_shift"], np.full((1, 1024), 2.0))


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")
@pytest.mark.parametrize("size", [None, pytest.param(2, marks=pytest.mark.long)])
def test_loo_of_several_looks_at_one_x_0_is_that_of_the_gaussian_oracle(size):
    """Six looks at each x_0 ~ N(0, 1): log p(y_i | the others), by the joint law of all."""
    y = np.random.default_rng(0).normal(0.7, 1.0, size=(6, size) if size else 6)

    def program(y):
        with numpyro.plate("row", size) if size else contextlib.nullcontext():
            x = ASIDE()
            with numpyro.plate("look", 6, dim=-2 if size else -1):
                numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    sampler = infer.SMC(program, num_particles=500, num_runs=4, steps=10)
    sampler.run(jax.random.key(0), y.astype(np.float32))
    tree = sampler.to_datatree()
    joint = stats.multivariate_normal(np.zeros(6), np.eye(6) + 1)
    one_less = stats.multivariate_normal(np.zeros(5), np.eye(5) + 1)
    columns = y.reshape(6, -1).T
    exact = [joint.logpdf(c) - one_less.logpdf(np.delete(c, i)) for c in columns for i in range(6)]
    found = arviz_stats.loo(tree, var_name="y", pointwise=True)
    assert dict(tree["log_likelihood"]["y"].sizes) == (
        {"chain": 1, "draw": 2000, "look": 6} | ({"row": size} if size else {})
    )
    ours = found.elpd_i.transpose(*(["row"] if size else []), "look").values.ravel()
    np.testing.assert_allclose(ours, exact, atol=0.1)


def test_the_only_look_at_an_x_0_does_not_invite_loo(done):
    """Its loo is the evidence, which 1,536 values of p(y | x_0) under the posterior miss."""
    assert "log_likelihood" not in done.to_datatree().children


@pytest.mark.long
def test_a_shorter_diffusion_says_what_becomes_of_a_learned_variance(key, capsys):
    diffusion = Diffusion(
        GaussianKernel(),
        schedules.log_snr_linear(T, beta_1=1e-4, alpha_bar_T=1e-4),
        lambda x, t: jnp.zeros((len(x), 2)),
        event_shape=(1,),
    )
    prior = diffusion.prior({})
    text = "steps=10 has no learned variance"
    for steps in (None, T, 10):
        sampler = infer.Guided(lambda: prior(), num_samples=2, steps=steps, check=False)
        sampler.run(key)
        sampler.print_summary()
        for note in (sampler.to_datatree().attrs["note"], capsys.readouterr().out):
            assert (text in note) == (steps == 10)


# refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_particles": 0}, "num_particles must be at least 1; got 0"),
        ({"num_runs": 0}, "num_runs must be at least 1; got 0"),
        ({"block_size": 0}, "block_size must be at least 1; got 0"),
        ({"ess_threshold": 1.5}, r"ess_threshold must lie in \[0, 1\]; got 1.5"),
    ],
)
def test_smc_refuses_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        infer.SMC(measured, **options)


def test_observations_that_are_nan_are_named_before_anything_is_walked(smc):
    with pytest.raises(ValueError, match=r"must not observe nan.*Mask what is missing"):
        smc.run(jax.random.key(0), np.float32(np.nan), np.float32(1.0))


def test_runs_that_devices_cannot_share_are_refused(unchecked):
    with pytest.raises(ValueError, match="num_runs must be a multiple of the 2 devices"):
        infer.SMC(measured, num_runs=3, mesh=AbstractMesh((2,), ("run",)))


def test_guided_refuses_no_draws():
    with pytest.raises(ValueError, match="num_samples must be at least 1; got 0"):
        infer.Guided(measured, num_samples=0)


def test_nothing_is_there_before_a_run():
    with pytest.raises(ValueError, match="run must be called first"):
        infer.SMC(measured).get_samples()


def test_an_interval_needs_a_probability(smc):
    with pytest.raises(ValueError, match=r"prob must lie in \(0, 1\); got 95.0"):
        run(smc, 1.0, 0.5).log_evidence_interval(95.0)


@pytest.mark.parametrize("steps", [1, T + 1])
def test_steps_out_of_range_are_refused(steps, key):
    with pytest.raises(ValueError, match=rf"steps must lie in 2..T = {T}; got {steps}"):
        infer.SMC(measured_aside, steps=steps).run(key, array(1.0), array(0.5))


def no_prior():
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=1.0)


def latent_site():
    numpyro.sample("y", dist.Normal(ASIDE(), numpyro.sample("s", dist.HalfNormal(1.0))), obs=1.0)


def delta():
    numpyro.sample("y", dist.Delta(ASIDE()), obs=1.0)


def outside_the_plate():
    with numpyro.plate("row", 3):
        x = ASIDE()
    numpyro.sample("y", dist.Normal(x.sum(), 1.0), obs=1.0)


def coupled():
    with numpyro.plate("row", 3):
        x = ASIDE()
        numpyro.sample("y", dist.Normal(x + x.sum(), 1.0), obs=1.0)


def unbound():
    numpyro.sample("y", dist.Normal(ASIDE(), numpyro.param("s", 1.0)), obs=1.0)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (no_prior, "must call a prior made by Diffusion.prior; got no call"),
        (latent_site, "latent site 's' must have a value"),
        (delta, r"observed site 'y' must have a density; got a Delta.*prior\(known=values"),
        (outside_the_plate, r"observed site 'y' must lie inside the plates.*outside \['row'\]"),
        (coupled, "program must keep the entries of the plates around the prior apart"),
        (unbound, "param 's' is unbound"),
    ],
)
def test_a_program_that_is_not_priors_with_observations_is_refused(program, words, key):
    with pytest.raises(ValueError, match=words):
        infer.SMC(program).run(key)


def test_a_twist_for_numbers_is_refused_for_symbols(key):
    with pytest.raises(ValueError, match="twist must be left out for symbols"):
        infer.SMC(lambda: BITS(), twist=infer.PointTwist()).run(key)


def test_a_twist_for_symbols_is_refused_for_numbers(key):
    with pytest.raises(ValueError, match="twist must be one of numbers for GaussianKernel"):
        infer.SMC(measured_aside, twist=infer.SymbolTwist()).run(key, array(1.0), array(0.5))


@pytest.mark.parametrize("twist", [infer.LaplaceTwist, infer.TweedieTwist, infer.ReadoutTwist])
def test_a_rank_below_one_is_refused(twist):
    with pytest.raises(ValueError, match="rank must be at least 1; got 0"):
        twist(rank=0)


# symbols


@pytest.mark.long
def test_bits_are_drawn_from_their_posterior(key):
    """Two fair bits, of which one is observed through noise."""

    def program():
        x = BITS()
        numpyro.sample("y", dist.Bernoulli(0.2 + 0.6 * x[0]), obs=1)

    sampler = infer.SMC(program, num_particles=128, num_runs=4)
    sampler.run(key)
    draws = sampler.get_samples()["x_0"]
    assert draws.shape == (512, 2)
    assert abs(sampler.log_evidence - math.log(0.5)) <= max(4 * sampler.log_evidence_se, 1e-5)
    assert abs(draws[:, 0].mean() - 0.8) < 4 * math.sqrt(0.16 / 400)
    assert abs(draws[:, 1].mean() - 0.5) < 4 * math.sqrt(0.25 / 400)
    assert sampler.to_datatree().attrs["twist"] == "symbols"


def rows(n, *, to_event=1, plate=None):
    """Measurements of a pair each, a row per system where the plate has one."""

    def program(y):
        with numpyro.plate("row", plate) if plate else contextlib.nullcontext():
            numpyro.sample("y", dist.Normal(PAIR(), 1.0).to_event(to_event), obs=y)

    return program, np.zeros((n, 2), np.float32)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (rows(25), r"'y' must lie in a plate of size 25.*plate\(name, 25\)"),
        (rows(3, plate=4), r"'y' must have values of shape \(4, 2\), as its law has; got \(3, 2\)"),
    ],
)
def test_rows_without_a_plate_of_their_size_are_refused(case, words):
    program, y = case
    with pytest.raises(ValueError, match=words):
        infer.SMC(program, num_particles=4).run(jax.random.key(0), y)


def test_shapes_that_do_not_fit_are_explained_where_numpyro_raises():
    program, y = rows(4, plate=4, to_event=0)
    with pytest.raises(ValueError, match="Incompatible shapes") as raised:
        infer.SMC(program, num_particles=4).run(jax.random.key(0), y)
    assert "declared by .to_event" in raised.value.__notes__[0]


@pytest.mark.long
def test_rows_that_repeat_a_measurement_have_a_plate_of_their_own():
    def repeated(y):
        x_0 = PAIR()
        with numpyro.plate("repeat", len(y)):
            numpyro.sample("y", dist.Normal(x_0, 1.0).to_event(1), obs=y)

    smc = infer.SMC(repeated, num_particles=64, num_runs=2)
    smc.run(jax.random.key(0), np.ones((3, 2), np.float32))
    assert smc.get_samples()["x_0"].shape == (128, 2)


def test_a_known_entry_that_is_not_a_number_is_refused_at_once():
    def program(known):
        PAIR(known=known, mask=np.array([True, False]))

    with pytest.raises(ValueError, match="known must be finite wherever mask is True"):
        infer.SMC(program, num_particles=4).run(jax.random.key(0), np.array([np.nan, 0.0], "f"))


def test_advice_is_given_once():
    texts = complaints_of(healthy(ess=np.full((T + 1, 2), 1.0), log_evidences=np.array([0.0, 9.0])))
    assert [text.endswith("Help yourself") for text in texts] == [False, True]


@pytest.mark.filterwarnings(QUIET)
def test_the_only_look_keeps_the_dims_of_its_plates_and_trees_stay_out():
    prior = standard_diffusion((2,), T=3).prior({})

    def program(y):
        with numpyro.plate("a", 3):
            x = prior()
            numpyro.deterministic("both", {"sum": x.sum(-1)})
            with numpyro.plate("rep", 1, dim=-2):
                numpyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=y)

    smc = infer.SMC(program, num_particles=20, num_runs=2)
    smc.run(jax.random.key(0), np.ones((1, 3), np.float32))
    tree = smc.to_datatree()
    stat = tree["sample_stats"]["log_likelihood_y"]
    assert stat.dims == ("chain", "draw", "rep", "a") and stat.shape == (1, 40, 1, 3)
    assert np.isfinite(stat.values).all()
    assert set(tree["posterior"].data_vars) == {"x_0"}
    assert smc.get_samples()["both"]["sum"].shape == (40, 3)
