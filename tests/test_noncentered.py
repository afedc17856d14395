"""Programs over noise: their law, their density, their posteriors under NUTS, their starts.

Priors have Gaussian laws: N(0, 1) under the network 0, whose diffusion is exact for any levels;
N(m, s²) under `exact_gaussian`; and a correlated one under a linear network, by recursion.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import HMC, MCMC, NUTS, Predictive
from numpyro.infer.util import log_density
from scipy import stats

import reference
from oracles import exact_gaussian
from probdiff import BernoulliKernel, Diffusion, GaussianKernel, readouts, schedules
from probdiff.infer.noncentered import initial_noise, noncentered

T = 10
BETA = schedules.log_snr_linear(T, beta_1=0.05, alpha_bar_T=1e-3)
FORWARD = readouts.Perturbation(readouts.ForwardVariance())


def standard(network=lambda x_t, t: 0 * x_t, event_shape=(2,), beta=BETA, **options):
    """x_0 ~ N(0, 1) entry by entry, unless the network says otherwise."""
    options = {"readout": FORWARD} | options
    return Diffusion(GaussianKernel(), beta, network, event_shape=event_shape, **options)


def curved(x_t, t, context):
    """Both outputs of `Perturbation`: no Gaussian, entries of x_0 coupled, variance of x_t."""
    z = 0.4 * jnp.sin(2 * x_t[:, ::-1]) + 0.1 * t[:, None] + context
    return jnp.concatenate([z, 0.3 * x_t - 0.05 * t[:, None]], -1)


def curved_diffusion(**options):
    options = {"readout": readouts.Perturbation(), "context_shape": (2,)} | options
    return standard(curved, loc=0.5, scale=np.array([2.0, 0.3]), **options)


def sites_of(program, *args, key=0, **kwargs):
    return handlers.trace(handlers.seed(program, key)).get_trace(*args, **kwargs)


def given(program, values, *args):
    """Sites of a program at values of its latent sites."""
    return sites_of(handlers.substitute(program, data=values), *args)


def replay(program, starts, *args):
    """x_0 at several values of the latent sites."""
    return jax.jit(jax.vmap(lambda values: given(program, values, *args)["x_0"]["value"]))(starts)


def sample(program, *args, num_warmup=300, num_samples=600, **options):
    kernel = NUTS(noncentered(program, **options))
    mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, progress_bar=False)
    mcmc.run(jax.random.key(2), *args, extra_fields=("diverging",))
    assert not mcmc.get_extra_fields()["diverging"].any()
    return {name: np.asarray(value, float) for name, value in mcmc.get_samples().items()}


def check_mean(draws, expected):
    """Mean over axis 0 within 4 standard errors, entry by entry."""
    ess = effective_sample_size(draws[None])
    se = draws.std(0) / np.sqrt(ess)
    np.testing.assert_array_less(np.abs(draws.mean(0) - expected), 4 * se)
    assert np.all(ess > 100)


def check_normal(draws, mean, sd):
    check_mean(draws, mean)
    check_mean((draws - mean) ** 2, np.broadcast_to(np.square(sd), draws.shape[1:]))


# the law


def test_sites_are_the_noise_and_x_0(x64):
    diffusion = standard(name="roll")
    prior = diffusion.prior({})

    def program():
        with numpyro.plate("rows", 3):
            x = prior()
        numpyro.sample("y", dist.Normal(x.sum(), 1.0), obs=0.0)
        return x

    sites = sites_of(noncentered(program))
    assert list(sites) == ["rows", "roll_noise", "roll", "y"]
    assert sites["roll_noise"]["value"].shape == (3, T + 1, 2)
    assert sites["roll_noise"]["fn"].event_shape == (T + 1, 2)
    assert sites["roll"]["type"] == "deterministic" and sites["roll"]["value"].shape == (3, 2)
    assert sites_of(noncentered(program, steps=4))["roll_noise"]["value"].shape == (3, 5, 2)


@pytest.mark.parametrize(("steps", "event_shape"), [(None, (2, 2)), (4, ())], ids=str)
def test_noise_gives_x_0_the_law_of_the_prior(x64, steps, event_shape):
    """N(0, 1) on the scale of the diffusion, of which any number of levels is exact."""
    prior = standard(event_shape=event_shape, loc=0.5, scale=2.0).prior({})

    def program():
        with numpyro.plate("rows", 4_000):
            prior()

    x_0 = np.asarray(sites_of(noncentered(program, steps=steps))["x_0"]["value"])
    assert x_0.shape == (4_000, *event_shape)
    for entry in x_0.reshape(4_000, -1).T:
        assert stats.kstest(entry, "norm", (0.5, 2.0)).pvalue > 1e-3


def test_noise_gives_x_0_the_law_of_data_not_at_the_origin(x64):
    prior = exact_gaussian(np.array([0.7, -1.0]), 0.4).prior({})

    def program():
        with numpyro.plate("rows", 4_000):
            prior()

    x_0 = np.asarray(sites_of(noncentered(program))["x_0"]["value"])
    for entry, mean in zip(x_0.T, (0.7, -1.0), strict=True):
        assert stats.kstest(entry, "norm", (mean, 0.4)).pvalue > 1e-3


def program_of(prior, known=None, mask=None):
    def program(context, y):
        with numpyro.plate("rows", 3):
            x = prior(context=context, known=known, mask=mask)
            numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    return program


def centred(diffusion, noise, context):
    """Trajectory, x_0, Σ log σ of all steps and of the last, from noise, in a loop; rows first."""
    reverse = diffusion.bind({}, context=context)
    x, volume = jnp.asarray(noise[:, T]), 0.0
    walked = [x]
    for t in range(T, 1, -1):
        law = reverse.step(x, jnp.full(3, t))
        x = law.loc + law.scale * noise[:, t - 1]
        volume += np.log(law.scale).sum()
        walked.insert(0, x)
    mean, variance = reference.transition(np.asarray(x), BETA, 1)
    x_0 = diffusion.loc + diffusion.scale * (mean + np.sqrt(variance) * noise[:, 0])
    last = np.log(np.sqrt(variance) * diffusion.scale)
    return jnp.stack(walked, 1), x_0, volume, last


@pytest.mark.parametrize("is_known", [False, True])
def test_density_over_noise_is_that_over_levels_times_the_volume(x64, is_known):
    rng = np.random.default_rng(0)
    noise, context, y = rng.normal(size=(3, T + 1, 2)), *rng.normal(size=(2, 3, 2))
    diffusion = curved_diffusion()
    mask = rng.random((3, 2)) < 0.5
    known = rng.normal(size=(3, 2))
    options = {"known": known, "mask": mask} if is_known else {}
    program = program_of(diffusion.prior({}), **options)
    trajectory, x_0, volume, last = centred(diffusion, noise, context)
    is_free = ~mask if is_known else np.ones((3, 2), bool)
    volume += np.where(is_free, last, stats.norm.logpdf(noise[:, 0])).sum()
    values = {"x_0_trajectory": trajectory, "x_0": jnp.where(is_free, x_0, known)}
    by_levels, _ = log_density(program, (context, y), {}, values)
    over_noise, sites = log_density(
        noncentered(program), (context, y), {}, {"x_0_noise": jnp.asarray(noise)}
    )
    np.testing.assert_allclose(over_noise, by_levels + volume, rtol=1e-10)
    expected = np.where(mask, known, x_0) if is_known else x_0
    np.testing.assert_allclose(sites["x_0"]["value"], expected, rtol=1e-10)
    if is_known:
        assert list(sites) == ["rows", "x_0_noise", "x_0", "x_0_known", "y"]
        np.testing.assert_array_equal(np.asarray(sites["x_0"]["value"])[mask], known[mask])


def test_noise_of_known_entries_has_no_effect(x64):
    rng = np.random.default_rng(0)
    noise, context, y = rng.normal(size=(3, T + 1, 2)), *rng.normal(size=(2, 3, 2))
    mask = np.array([[True, False]] * 3)
    program = noncentered(program_of(curved_diffusion().prior({}), np.zeros((3, 2)), mask))

    def likelihood(noise):
        sites = given(program, {"x_0_noise": noise}, context, y)
        return sum(s["fn"].log_prob(s["value"]).sum() for n, s in sites.items() if n != "x_0_noise"
                   and s["type"] == "sample")  # fmt: skip

    slope = jax.grad(likelihood)(jnp.asarray(noise))
    assert np.all(slope[:, 0, 0] == 0) and np.all(slope[:, 0, 1] != 0)
    assert np.all(slope[:, 1] != 0)


def test_an_observed_x_0_stays_observed(x64):
    prior = standard().prior({})
    x_0 = np.array([0.3, -1.0])
    program = noncentered(handlers.condition(lambda: prior(), data={"x_0": x_0}))
    sites = sites_of(program)
    assert list(sites) == ["x_0_noise", "x_0"] and sites["x_0"]["is_observed"]


@pytest.mark.parametrize("site", ["x_0", "x_0_trajectory"])
def test_an_intervention_is_what_follows_and_not_what_is_drawn(x64, site):
    """y depends on the value; the noise, and x_0 without it, do not."""
    prior = standard().prior({})
    value = np.array([0.3, -1.0]) if site == "x_0" else np.full((T, 2), 0.5)
    noise = {"x_0_noise": jnp.asarray(np.random.default_rng(0).normal(size=(T + 1, 2)))}

    def program():
        numpyro.sample("y", dist.Normal(prior(), 1.0).to_event(1), obs=np.zeros(2))

    sites = given(noncentered(handlers.do(program, {site: jnp.asarray(value)})), noise)
    x_0 = (
        value
        if site == "x_0"
        else np.sqrt(1 - BETA[0]) * 0.5 + np.sqrt(BETA[0]) * noise["x_0_noise"][0]
    )
    np.testing.assert_allclose(sites["y"]["fn"].base_dist.loc, x_0, rtol=1e-6)
    if site == "x_0":
        alone = given(noncentered(program), noise)["x_0"]["value"]
        np.testing.assert_array_equal(sites["x_0"]["value"], alone)


def test_a_scope_gives_its_prefix_to_the_noise(x64):
    prior = standard().prior({})

    def program():
        for name in ("a", "b"):
            with handlers.scope(prefix=name):
                prior()

    sites = sites_of(noncentered(program))
    assert list(sites) == ["a/x_0_noise", "a/x_0", "b/x_0_noise", "b/x_0"]
    x_0 = {"a/x_0": np.ones((3, 2)), "b/x_0": np.zeros((3, 2))}
    starts = initial_noise(jax.random.key(0), noncentered(program), x_0)
    assert set(starts) == {"a/x_0_noise", "b/x_0_noise"}


def test_backwards_holds_one_level_for_each_step():
    """A network 256 wide inside: all its steps at once would take 256 levels for each."""
    rows, width, steps = 64, 256, 50
    weights = jnp.linspace(-1.0, 1.0, width)

    def network(x_t, t):
        return jnp.tanh(x_t[..., None] * weights).sum(-1) / width

    beta = schedules.log_snr_linear(steps, beta_1=0.01, alpha_bar_T=1e-3)
    prior = standard(network, (1,), beta).prior({})

    def program():
        with numpyro.plate("rows", rows):
            prior()

    def total(noise):
        return given(noncentered(program), {"x_0_noise": noise})["x_0"]["value"].sum()

    noise = jnp.zeros((rows, steps + 1, 1))
    compiled = jax.jit(jax.grad(total)).lower(noise).compile()
    level = rows * 4
    assert compiled.memory_analysis().temp_size_in_bytes < (10 * steps + 10 * width) * level


# posteriors


@pytest.mark.long
def test_posterior_in_a_plate_is_exact_for_a_gaussian_likelihood():
    prior = standard(loc=1.0, scale=2.0).prior({})
    y, sigma = np.array([[0.5, 3.0], [-2.0, 1.0], [4.0, 0.0]]), np.array([0.5, 2.0])

    def program(y):
        with numpyro.plate("rows", 3):
            numpyro.sample("y", dist.Normal(prior(), sigma).to_event(1), obs=y)

    draws = sample(program, y)
    assert set(draws) == {"x_0_noise", "x_0"}
    variance = 1 / (1 / 4 + 1 / sigma**2)
    check_normal(draws["x_0"], variance * (1 / 4 + y / sigma**2), np.sqrt(variance))


def linear(x_t, t):
    return 0.6 * x_t[:, ::-1]


def covariance():
    """Of x_0 under `linear`: C_s = M C_t Mᵀ + β I, M = √(1−β) I + 0.6 √β J; the last step tied."""
    C, swap = np.eye(2), np.eye(2)[::-1]
    for beta in BETA[:0:-1]:
        M = np.sqrt(1 - beta) * np.eye(2) + 0.6 * np.sqrt(beta) * swap
        C = M @ C @ M.T + beta * np.eye(2)
    return (1 - BETA[0]) * C + BETA[0] * np.eye(2)


@pytest.mark.long
def test_posterior_given_a_known_entry_is_exact():
    """Entry 1 is known and tells of entry 0, of which y is a noisy look."""
    C, known, y = covariance(), 2.0, -0.5
    assert C[0, 1] > 0.5
    prior = standard(linear).prior({})

    def program():
        x = prior(known=np.array([np.nan, known]), mask=np.array([False, True]))
        numpyro.sample("y", dist.Normal(x[0] + x[1], 1.5), obs=y)

    draws = sample(program)
    assert np.all(draws["x_0"][:, 1] == known)
    mean, variance = C[0, 1] / C[1, 1] * known, C[0, 0] - C[0, 1] ** 2 / C[1, 1]
    after = 1 / (1 / variance + 1 / 1.5**2)
    mean = after * (mean / variance + (y - known) / 1.5**2)
    check_normal(draws["x_0"][:, 0], mean, np.sqrt(after))


@pytest.mark.long
def test_another_latent_site_is_inferred_along():
    """y_i ~ N(x_0, σ²), σ ~ HalfNormal(1): the posterior of σ by quadrature."""
    prior = standard(event_shape=()).prior({})
    y = np.array([1.9, 0.8, 1.2, 2.1, 0.6, 1.5])

    def program(y):
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        x = prior()
        with numpyro.plate("looks", len(y)):
            numpyro.sample("y", dist.Normal(x, sigma), obs=y)

    sigma = np.linspace(1e-3, 5, 4_000)
    n, rest = len(y), ((y - y.mean()) ** 2).sum()
    log_p = stats.norm.logpdf(y.mean(), 0, np.sqrt(1 + sigma**2 / n)) - 0.5 * sigma**2
    log_p -= (n - 1) * np.log(sigma) + rest / (2 * sigma**2)
    weights = np.exp(log_p - log_p.max())
    weights /= weights.sum()
    draws = sample(program, y)
    check_mean(draws["sigma"], weights @ sigma)
    check_mean(draws["sigma"] ** 2, weights @ sigma**2)
    check_mean(draws["x_0"], weights @ (y.mean() / (1 + sigma**2 / n)))


def test_two_priors_have_a_noise_each(x64):
    """Each x_0 is what its prior alone makes of its own noise."""
    a, b = (standard(name=name, scale=scale).prior({}) for name, scale in (("a", 1.0), ("b", 2.0)))
    noise = np.random.default_rng(0).normal(size=(2, T + 1, 2))
    both = given(noncentered(lambda: (a(), b())), {"a_noise": noise[0], "b_noise": noise[1]})
    for name, prior, z in (("a", a, noise[0]), ("b", b, noise[1])):
        alone = given(noncentered(lambda prior=prior: prior()), {f"{name}_noise": z})
        np.testing.assert_array_equal(both[name]["value"], alone[name]["value"])
    assert np.abs(both["b"]["value"] - 2 * both["a"]["value"]).min() > 0.1


def test_draws_replay_in_predictive(x64):
    prior = standard(loc=1.0).prior({})

    def program(y=None):
        numpyro.sample("y", dist.Normal(prior(), 1e-9).to_event(1), obs=y)

    noise = jax.random.normal(jax.random.key(0), (5, T + 1, 2))
    out = Predictive(noncentered(program), {"x_0_noise": noise})(jax.random.key(1))
    expected = replay(noncentered(program), {"x_0_noise": noise})
    np.testing.assert_allclose(out["x_0"], expected, rtol=1e-10)
    np.testing.assert_allclose(out["y"], expected, atol=1e-7)


# starts


@pytest.mark.parametrize("steps", [None, 4])
def test_starts_replay_to_the_given_x_0(x64, steps):
    """A context that is itself latent: each chain's trajectory is solved under its own."""
    prior = curved_diffusion().prior({})

    def program():
        c = numpyro.sample("c", dist.LogNormal(jnp.zeros(2), 1.0).to_event(1))
        with numpyro.plate("rows", 3):
            numpyro.sample("y", dist.Normal(prior(context=c), 1.0).to_event(1), obs=np.zeros(2))

    rng = np.random.default_rng(0)
    x_0, c = rng.normal(size=(4, 3, 2)), rng.lognormal(size=(4, 2))
    over_noise = noncentered(program, steps=steps)
    starts = initial_noise(jax.random.key(0), over_noise, {"x_0": x_0, "c": c, "unread": c})
    assert set(starts) == {"x_0_noise", "c"}
    assert starts["x_0_noise"].shape == (4, 3, (steps or T) + 1, 2)
    np.testing.assert_allclose(starts["c"], np.log(c), rtol=1e-10)
    replayed = replay(over_noise, starts | {"c": c})
    np.testing.assert_allclose(replayed, x_0, atol=1e-10)


def test_starts_replay_to_the_given_x_0_in_float32():
    prior = standard().prior({})
    x_0 = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    over_noise = noncentered(lambda: prior())
    starts = initial_noise(jax.random.key(0), over_noise, {"x_0": x_0})
    np.testing.assert_allclose(replay(over_noise, starts), x_0, atol=1e-5)


@pytest.mark.parametrize("steps", [None, 4])
def test_noise_of_draws_of_the_prior_is_standard_normal(x64, steps):
    """For the exact diffusion the way up and the way down have one law."""
    prior = standard(loc=0.5, scale=2.0, event_shape=()).prior({})
    x_0 = stats.norm(0.5, 2.0).rvs(4_000, random_state=1)

    def program():
        with numpyro.plate("rows", 4_000):
            prior()

    noise = initial_noise(jax.random.key(0), noncentered(program, steps=steps), {"x_0": x_0[None]})
    noise = np.asarray(noise["x_0_noise"])
    assert noise.shape == (4_000, (steps or T) + 1)
    for level in noise.T:
        assert stats.kstest(level, "norm").pvalue > 1e-3
    off = np.corrcoef(noise.T) - np.eye(noise.shape[1])
    assert np.abs(off).max() < 4.5 / np.sqrt(4_000)  # 55 pairs: 4 standard errors for one


def test_equal_draws_start_at_different_noise(x64):
    prior = standard().prior({})
    over_noise = noncentered(lambda: prior())
    starts = initial_noise(jax.random.key(0), over_noise, {"x_0": np.ones((3, 2))})
    assert len(np.unique(starts["x_0_noise"])) == 3 * (T + 1) * 2


@pytest.mark.long
def test_chains_start_at_the_given_draws():
    """One leapfrog step too small to move."""
    prior = standard().prior({})

    def program():
        numpyro.sample("y", dist.Normal(prior(), 1.0).to_event(1), obs=np.zeros(2))

    over_noise, x_0 = noncentered(program), np.array([[3.0, -2.0], [0.5, 4.0]])
    starts = initial_noise(jax.random.key(0), over_noise, {"x_0": x_0})
    kernel = HMC(over_noise, step_size=1e-6, num_steps=1, adapt_step_size=False)
    options = {"num_warmup": 0, "num_samples": 1, "progress_bar": False}
    mcmc = MCMC(kernel, num_chains=2, chain_method="sequential", **options)
    mcmc.run(jax.random.key(1), init_params=starts)
    np.testing.assert_allclose(mcmc.get_samples()["x_0"], x_0, atol=1e-3)


def test_the_start_of_a_single_chain_has_no_axis_of_chains(x64):
    over_noise, x_0 = noncentered(standard().prior({})), np.array([[3.0, -2.0]])
    starts = initial_noise(jax.random.key(0), over_noise, {"x_0": x_0})
    assert starts["x_0_noise"].shape == (T + 1, 2)
    np.testing.assert_allclose(given(over_noise, starts)["x_0"]["value"], x_0[0], atol=1e-10)


# what is refused


def bits():
    return Diffusion(
        BernoulliKernel(0.3),
        schedules.harmonic(5),
        lambda x_t, t: jnp.zeros(x_t.shape),
        event_shape=(3,),
        readout=readouts.Logits(),
    )


def refusals():
    prior = standard().prior({})

    def plain():
        return prior()

    def subsampled():
        with numpyro.plate("rows", 10, subsample_size=2):
            prior()

    def masked():
        with handlers.mask(mask=False):
            prior()

    def unbound():
        return prior() * numpyro.param("w", 1.0)

    values = {"x_0_trajectory": jnp.zeros((T, 2))}
    return {
        "no prior": (lambda: numpyro.sample("z", dist.Normal()), "must call a prior"),
        "symbols": (lambda: bits().prior({})(), "Use infer.SMC"),
        "scaled": (handlers.scale(plain, scale=2.0), "must keep its density"),
        "subsampled": (subsampled, "must keep its density"),
        "masked": (masked, "must keep its density"),
        "unbound": (unbound, "param 'w' is unbound"),
        "conditioned": (handlers.condition(plain, data=values), "must be left to its prior"),
        "substituted": (handlers.substitute(plain, data=values), "must be left to its prior"),
        "x_0 substituted": (
            handlers.substitute(plain, data={"x_0": jnp.zeros(2)}),
            "must be left to its prior",
        ),
        "known and conditioned": (
            handlers.condition(
                lambda: prior(known=np.zeros(2), mask=np.array([True, False])),
                data={"x_0": jnp.zeros(2)},
            ),
            "must be left to its prior",
        ),
    }


@pytest.mark.parametrize("case", refusals())
def test_a_program_without_smooth_noise_is_refused(case):
    program, message = refusals()[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        sites_of(noncentered(program))


def test_a_bound_parameter_is_accepted(x64):
    prior = standard().prior({})
    program = handlers.substitute(lambda: prior() * numpyro.param("w", 1.0), data={"w": 2.0})
    assert sites_of(noncentered(program))["w"]["value"] == 2


@pytest.mark.parametrize("steps", [1, T + 1])
def test_steps_outside_the_diffusion_are_refused(steps):
    prior = standard().prior({})
    with pytest.raises(ValueError, match=re.escape(f"steps must lie in 2..T = {T}; got {steps}")):
        sites_of(noncentered(lambda: prior(), steps=steps))


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        ({}, "one row for each chain"),
        ({"x_0": np.zeros((2, 2)), "sigma": np.ones(3)}, "one row for each chain"),
        ({"x_0": np.zeros((2, 2)), "sigma": np.float32(1)}, "one row for each chain"),
        ({"x_0": np.zeros((2, 2))}, "'sigma' is missing"),
        ({"sigma": np.ones(2)}, "'x_0' is missing"),
        (
            {"x_0": np.zeros((2, 3)), "sigma": np.ones(2)},
            "draws['x_0'] must have shape (num_chains, 2)",
        ),
        ({"x_0": np.zeros((2, 2)), "sigma": np.ones((2, 1))}, "draws['sigma'] must have shape"),
    ],
)
def test_draws_that_do_not_fit_are_refused(draws, message):
    prior = standard().prior({})

    def program():
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Normal(prior(), sigma).to_event(1), obs=np.zeros(2))

    with pytest.raises(ValueError, match=re.escape(message)):
        initial_noise(jax.random.key(0), noncentered(program), draws)


# levels


def test_rates_of_longer_steps_keep_their_digits_where_nothing_of_the_data_is_left():
    beta = schedules.log_snr_linear(40, beta_1=1e-4, alpha_bar_T=1e-24)
    program = noncentered(standard(beta=beta).prior({}), steps=10)
    reverse = sites_of(program)["x_0_noise"]["infer"]["start"].reverse
    jumps = itertools.pairwise([0, *reverse.times])
    by_hand = [1 - np.prod(1 - beta[start:stop]) for start, stop in jumps]
    np.testing.assert_allclose(reverse.steps.beta, by_hand, rtol=1e-5)
