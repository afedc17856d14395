"""Several priors in one program, against exact posteriors of linear Gaussian programs.

x ~ N(loc, scale²) of exact diffusions, observed by y = H (x, z, …) + noise: mean and covariance of
all numbers together, cross-covariances included, and log Z are those of one Gaussian.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from arviz_stats.base import array_stats
from numpyro import handlers
from numpyro.infer import MCMC, NUTS
from scipy import stats

from probdiff import (
    BernoulliKernel,
    Diffusion,
    GaussianKernel,
    diagnostics,
    from_denoiser,
    infer,
    readouts,
    schedules,
    standard_diffusion,
)

pytestmark = pytest.mark.filterwarnings("ignore::probdiff.infer.InferenceWarning")

T, SIGMA = 6, 0.4
FLOOR = 2e-3
"""What float32 leaves of a log evidence."""
FEW = {"num_particles": 16, "num_runs": 2}


def normal(name, loc=0.0, scale=1.0, shape=(2,), **options):
    """Prior N(loc, scale²)."""
    return standard_diffusion(shape, T, name=name, loc=loc, scale=scale, **options).prior({})


X = normal("x", np.array([1.0, -2.0]), 2.0)
Z = normal("z", 3.0, np.array([0.5, 1.5]))


def posterior(H, y, mean, variance, sigma=SIGMA):
    """Mean, covariance and log evidence of numbers N(mean, diag variance), H of them measured."""
    H, y, mean, prior = (np.asarray(a, np.float64) for a in (H, y, mean, np.diag(variance)))
    of_y = H @ prior @ H.T + sigma**2 * np.eye(len(y))
    gain = prior @ H.T @ np.linalg.inv(of_y)
    log_z = stats.multivariate_normal(H @ mean, of_y).logpdf(y)
    return mean + gain @ (y - H @ mean), prior - gain @ H @ prior, log_z


def check(draws, mean, covariance):
    """Moments of draws `(M, d)` within 4 standard errors, entry by entry of the covariance."""
    count = len(draws)
    sd = np.sqrt(np.maximum(np.diag(covariance), 0))
    known = sd < 1e-9
    np.testing.assert_allclose(draws[:, known], np.broadcast_to(mean[known], (count, known.sum())))
    se = np.where(known, 1.0, sd) / np.sqrt(count)
    assert (np.abs(draws.mean(0) - mean) < 4 * se + FLOOR)[~known].all()
    error = np.sqrt((np.outer(sd, sd) ** 2 + covariance**2) / count)
    assert (np.abs(np.cov(draws.T) - covariance) <= 4 * error + FLOOR).all()


def check_evidence(smc, log_z):
    """log Z within 3 standard errors, and what float32 leaves."""
    assert (np.abs(smc.log_evidence - log_z) < 3 * smc.log_evidence_se + FLOOR).all()


def of_sum(y, known=None, mask=None):
    """y = 1.5 x − z + noise."""
    x, z = X(), Z(known=known, mask=mask)
    numpyro.deterministic("sum", x + z)
    numpyro.sample("y", dist.Normal(1.5 * x - z, SIGMA).to_event(1), obs=y)


H = np.hstack([1.5 * np.eye(2), -np.eye(2)])
MEAN, VARIANCE = np.array([1.0, -2.0, 3.0, 3.0]), np.array([4.0, 4.0, 0.25, 2.25])
Y = np.array([0.5, -4.0], np.float32)


@pytest.fixture(scope="module")
def done():
    smc = infer.SMC(of_sum, num_particles=2000)
    smc.run(jax.random.key(0), Y)
    return smc


def test_posterior_of_two_priors_is_exact_with_its_cross_covariance(done):
    mean, covariance, log_z = posterior(H, Y, MEAN, VARIANCE)
    draws = done.get_samples()
    assert {name: a.shape for name, a in draws.items()} == dict.fromkeys("xz", (8000, 2)) | {
        "sum": (8000, 2)
    }
    check(np.concatenate([draws["x"], draws["z"]], 1), mean, covariance)
    np.testing.assert_allclose(draws["sum"], draws["x"] + draws["z"], atol=1e-5)
    check_evidence(done, log_z)
    assert done.result.health.ess > 7900  # the twist is exact: it sees the cross-curvature


def test_the_tree_and_the_summary_name_both(done, capsys):
    tree = done.to_datatree()
    assert dict(tree["posterior"]["z"].sizes) == {"chain": 1, "draw": 8000, "z_dim_0": 2}
    assert tree["runs"]["x"].dims == ("chain", "draw", "x_dim_0")
    sites, log_w = done.get_weighted_samples()
    assert sites["x"].shape == sites["z"].shape == (8000, 2) and log_w.shape == (8000,)
    done.print_summary(1)
    text = capsys.readouterr().out
    assert "x[0]" in text and "z[0]" in text and "1 more entries of z" in text


@pytest.mark.long
def test_in_plates_with_known_entries_of_one_prior():
    """Two systems, z_1 known in the first and both in the second, given in float64."""
    y = np.stack([Y, Y + 1])
    known = np.array([[9.0, 2.0 + 1e-9], [2.5, 3.5]])
    mask = np.array([[False, True], [True, True]])

    def program(y, known):
        with numpyro.plate("rows", 2):
            of_sum(y, known, mask)

    smc = infer.SMC(program, num_particles=1000)
    smc.run(jax.random.key(1), y, known)
    draws = smc.get_samples()
    assert draws["z"][0, 0, 1] == known[0, 1] and (draws["z"][:, 1] == known[1]).all()
    for row in range(2):
        free = np.r_[True, True, ~mask[row]]
        at = np.where(free, 0.0, np.r_[0, 0, known[row]])
        mean, covariance, log_z = posterior(H[:, free], y[row] - H @ at, MEAN[free], VARIANCE[free])
        log_z += stats.norm(MEAN, VARIANCE**0.5).logpdf(at)[~free].sum()
        both = np.concatenate([draws["x"][:, row], draws["z"][:, row]], 1)
        check(both[:, free], mean, covariance)
        error = abs(smc.log_evidence[row] - log_z)
        assert error < 3 * smc.log_evidence_se[row] + FLOOR
    tree = smc.to_datatree()
    assert tree["observed_data"]["z_known"].dims == ("rows", "z_dim_0")
    assert np.isnan(tree["observed_data"]["z_known"].values).sum() == 1
    assert "x_known" not in tree["observed_data"]


def groups(y):
    """A common x and a z for each group, all in systems."""
    with numpyro.plate("systems", 2, dim=-1):
        x = X()
        with numpyro.plate("groups", 3, dim=-2):
            z = Z()
            numpyro.deterministic("both", x + z)
            numpyro.sample("y", dist.Normal(x + z, SIGMA).to_event(1), obs=y)


@pytest.mark.long
def test_a_plate_around_one_prior_is_part_of_its_systems():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(3, 2, 2)) * 2
    smc = infer.SMC(groups, num_particles=1000)
    smc.run(jax.random.key(2), jnp.asarray(y, jnp.float32))
    draws = smc.get_samples()
    assert draws["x"].shape == (4000, 2, 2) and draws["z"].shape == (4000, 3, 2, 2)
    rows = np.hstack([np.tile(np.eye(2), (3, 1)), np.eye(6)])
    mean, variance = np.r_[[1, -2], [3] * 6], np.r_[[4, 4], [0.25, 2.25] * 3]
    for b in range(2):
        exact = posterior(rows, y[:, b].reshape(-1), mean, variance)
        both = [draws["x"][:, b], draws["z"][:, :, b].reshape(4000, 6)]
        check(np.concatenate(both, 1), *exact[:2])
        error = abs(smc.log_evidence[b] - exact[2])
        assert error < 3 * smc.log_evidence_se[b] + FLOOR
    tree = smc.to_datatree()
    assert tree["posterior"]["z"].dims == ("chain", "draw", "groups", "systems", "z_dim_0")
    assert tree["posterior"]["x"].dims == ("chain", "draw", "systems", "x_dim_0")
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "groups", "systems")
    assert tree["smc"]["log_evidence"].dims == ("systems",)


@pytest.mark.long
def test_plates_that_no_other_prior_stands_in_cross():
    """y_ij = u_i + v_j, of numbers in rows and columns within a plate that both stand in."""
    u, v = normal("u", shape=()), normal("v", 1.0, 2.0, shape=())

    def program(y):
        rows, columns = numpyro.plate("rows", 2, dim=-1), numpyro.plate("columns", 3, dim=-3)
        with numpyro.plate("systems", 2, dim=-2):
            with rows:
                a = u()
            with columns:
                b = v()
            with rows, columns:
                numpyro.sample("y", dist.Normal(a + b, SIGMA), obs=y)

    y = np.random.default_rng(1).normal(size=(3, 2, 2)).astype(np.float32)
    smc = infer.SMC(program, num_particles=1000, twist=infer.LaplaceTwist(rank=5))
    smc.run(jax.random.key(3), y)
    draws = smc.get_samples()
    assert draws["u"].shape == (4000, 2, 2) and draws["v"].shape == (4000, 3, 2, 1)
    rows = np.hstack([np.tile(np.eye(2), (3, 1)), np.repeat(np.eye(3), 2, 0)])
    mean, variance = np.r_[0, 0, 1, 1, 1], np.r_[1, 1, 4, 4, 4]
    for b in range(2):
        exact = posterior(rows, y[:, b].reshape(-1), mean, variance)
        check(np.concatenate([draws["u"][:, b], draws["v"][:, :, b, 0]], 1), *exact[:2])
        error = abs(smc.log_evidence.ravel()[b] - exact[2])
        assert error < 3 * smc.log_evidence_se.ravel()[b] + FLOOR


@pytest.mark.long
def test_symbols_of_several_priors_have_their_enumerated_posterior():
    """Two bits and one more, B(0.3) each, told by the difference of their sums."""
    bits = [
        standard_diffusion(shape, 4, kernel=BernoulliKernel(0.3), name=name).prior({})
        for name, shape in (("b", (2,)), ("c", ()))
    ]

    def program():
        b, c = (prior() for prior in bits)
        numpyro.factor("f", -((b.sum() - 2.0 * c) ** 2))

    smc = infer.SMC(program, num_particles=2000)
    smc.run(jax.random.key(0))
    all_bits = np.array(list(np.ndindex(2, 2, 2)))
    p = np.where(all_bits, 0.3, 0.7).prod(1)
    p = p * np.exp(-((all_bits[:, 0] + all_bits[:, 1] - 2.0 * all_bits[:, 2]) ** 2))
    check_evidence(smc, np.log(p.sum()))
    draws = smc.get_samples()
    assert draws["b"].shape == (8000, 2) and draws["c"].shape == (8000,)
    found = np.bincount(draws["b"] @ [4, 2] + draws["c"], minlength=8) / 8000
    expected = p / p.sum()
    assert (np.abs(found - expected) < 5 * np.sqrt(expected / 4000) + FLOOR).all()


def of_context(name, loc):
    """N(c, 1) of the context c, shape `()`; N(loc + c, 1) in the user's units."""
    table = schedules.steps(np.asarray(schedules.log_snr_linear(12, beta_1=0.01, alpha_bar_T=1e-6)))

    def network(x_t, t, context):
        step = table.at(t, 1)
        c = jnp.asarray(context, x_t.dtype)[:, None]
        return jnp.sqrt(step.alpha_bar_t) * x_t + step.noise_t * c

    readout = readouts.Data(readouts.ForwardVariance())
    return Diffusion(
        GaussianKernel(), table.beta, network, event_shape=(1,), readout=readout, name=name,
        loc=loc, scale=1.0, context_shape=(), last_step=readouts.Learned(),
    ).prior({}, variance=np.eye(1))  # fmt: skip


@pytest.mark.long
def test_each_prior_has_its_context_a_label_or_a_number():
    """A label without and a number with plates of its own, beside a prior without context."""
    u, v = LABELLED

    def program(y, number):
        with numpyro.plate("rows", 2):
            a = u(context=np.array([1, 3], np.int32))
            with numpyro.plate("own", 3):
                b = v(context=number)
                numpyro.sample("y", dist.Normal(a + b, SIGMA).to_event(1), obs=y)

    number = np.arange(6, dtype=np.float32).reshape(3, 2)
    y = (np.random.default_rng(0).normal(size=(3, 2, 1)) + 14).astype(np.float32)
    smc = infer.SMC(program, num_particles=1000)
    smc.run(jax.random.key(0), y, number)
    draws = smc.get_samples()
    rows = np.hstack([np.ones((3, 1)), np.eye(3)])
    for b, label in enumerate((1, 3)):
        exact = posterior(rows, y[:, b, 0], np.r_[label, 10 + number[:, b]], np.ones(4))
        both = np.concatenate([draws["u"][:, b], draws["v"][:, :, b, 0]], 1)
        assert (np.abs(both.mean(0) - exact[0]) < 0.1).all()  # 12 steps are not quite N(c, 1)
        np.testing.assert_allclose(np.cov(both.T), exact[1], atol=0.1)
        assert abs(smc.log_evidence[b] - exact[2]) < 0.1


@pytest.mark.long
def test_denoisers_of_others_stand_beside_each_other_with_their_own_variances():
    """N(1, 0.5²) and N(−2, 0.25²), of two denoisers at the same levels of noise."""
    sigma = np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 100) ** 7

    def prior(name, mean, sd):
        def denoiser(x, sigma):
            precision = 1 / sigma[:, None] ** 2
            return (x * precision + mean / sd**2) / (precision + 1 / sd**2)

        return from_denoiser(
            denoiser, readouts.Data(readouts.BridgeVariance()), sigma=sigma, event_shape=(1,),
            name=name, data_variance=sd**2,
        ).prior({})  # fmt: skip

    u, v = prior("u", 1.0, 0.5), prior("v", -2.0, 0.25)

    def program(y):
        numpyro.sample("y", dist.Normal(u() + 2 * v(), 0.2).to_event(1), obs=y)

    smc = infer.SMC(program, num_particles=2000)
    smc.run(jax.random.key(0), jnp.array([-2.0]))
    exact = posterior([[1.0, 2.0]], [-2.0], [1.0, -2.0], [0.25, 0.0625], 0.2)
    both = np.concatenate([smc.get_samples()[name] for name in "uv"], 1)
    assert (np.abs(both.mean(0) - exact[0]) < 0.03).all()
    np.testing.assert_allclose(np.cov(both.T), exact[1], atol=0.02)  # the bridge is narrow
    assert smc.log_evidence == pytest.approx(exact[2], abs=0.1)


LABELLED = of_context("u", 0.0), of_context("v", 10.0)


def pair(first, second):
    """A program of two priors."""

    def program():
        numpyro.factor("f", -0.1 * (jnp.sum(first()) + jnp.sum(second())) ** 2)

    return program


def hidden(y):
    with handlers.block(hide=["z_trajectory"]), handlers.seed(rng_seed=0):
        z = Z()
    numpyro.sample("y", dist.Normal(X() + z, SIGMA).to_event(1), obs=y)


def rows_without_plate():
    u, v = LABELLED[0](context=jnp.zeros(3)), LABELLED[1](context=jnp.zeros(()))
    numpyro.factor("f", -(jnp.sum(u) ** 2) - jnp.sum(v) ** 2)


def outside():
    with numpyro.plate("rows", 3):
        x, z = X(), Z()
    numpyro.sample("y", dist.Normal((x + z).sum(0), 1.0).to_event(1), obs=np.zeros(2))


BITS = standard_diffusion((2,), T, kernel=BernoulliKernel(0.3), name="b").prior({})
BENT = readouts.Perturbation(readouts.BridgeVariance())
MUST = "priors 'x' and '.' of one program must have the same"
DIFFERENT = {
    "rates": (pair(X, normal("z", beta=schedules.harmonic(T))), f"{MUST} rates; got beta_1"),
    "T": (
        pair(X, standard_diffusion((2,), 9, name="z").prior({})),
        f"{MUST} rates; got T = 6 and 9.*one schedule.*beta=rates.*forward_coordinates",
    ),
    "readout": (pair(X, normal("z", readout=BENT)), f"{MUST} readout; got .*with one;"),
    "last step": (pair(X, normal("z", last_step=readouts.Learned())), f"{MUST} last_step"),
    "kernel": (pair(X, BITS), rf"{MUST} kernel; got .*Make both diffusions with one$"),
    "one name": (pair(X, X), r"'x_trajectory' twice.*diffusion.prior\(params, name=\.\.\.\)"),
    "hidden": (lambda: hidden(Y), r"sites \['z_trajectory'\] must be seen"),
    "rows": (rows_without_plate, "prior 'u', one of several, must stand in a plate"),
    "outside": (outside, r"plates of the prior 'x and z'.*outside \['rows'\]"),
    "conditioned": (
        handlers.condition(lambda: of_sum(Y), {"z": np.zeros(2)}), "'z' must be left to its prior"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_cannot_be_one_prior_is_refused_with_what_to_do(case):
    program, words = DIFFERENT[case]
    with pytest.raises(ValueError, match=words):
        infer.SMC(program, **FEW).run(jax.random.key(0))


def test_two_priors_of_one_model_have_names_of_their_own():
    diffusion = standard_diffusion((2,), T)
    a, b = (diffusion.prior({}, name=name) for name in "ab")
    assert list(handlers.trace(handlers.seed(pair(a, b), 0)).get_trace())[:4] == [
        "a_trajectory", "a", "b_trajectory", "b"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="name must be a string"):
        diffusion.prior({}, name="chain")


def either(y, share, which=None):
    """y of x with probability `share`, of z otherwise; or of one of them, if that is told."""
    x, z = X(), Z()
    log_p = [dist.Normal(v, 1.0).to_event(1).log_prob(y) for v in (x, z)]
    both = jnp.logaddexp(jnp.log(share) + log_p[0], jnp.log1p(-share) + log_p[1])
    numpyro.factor("y", both if which is None else log_p[which])


@pytest.mark.long
def test_an_indicator_between_two_priors_is_summed_over_or_compared():
    """Of which of two priors y is: by the factor of both, and by evidences with prior weights."""
    y, share = jnp.array([1.5, 1.0]), 0.7
    means, variances = MEAN.reshape(2, 2), VARIANCE.reshape(2, 2)
    log_z = [stats.norm(m, (v + 1) ** 0.5).logpdf(y).sum()
             for m, v in zip(means, variances, strict=True)]  # fmt: skip
    log_joint = np.log([share, 1 - share]) + log_z
    total = np.logaddexp(*log_joint)
    first = np.exp(log_joint[0] - total)
    smc = infer.SMC(either, num_particles=8000)
    smc.run(jax.random.key(0), y, share)
    check_evidence(smc, total)
    pulled = variances / (variances + 1)
    at = means + pulled * (np.asarray(y) - means)
    expected = first * at[0] + (1 - first) * means[0], first * means[1] + (1 - first) * at[1]
    draws = smc.get_samples()
    for name, mean, variance in zip("xz", expected, variances, strict=True):
        assert (np.abs(draws[name].mean(0) - mean) < 0.15 * variance**0.5).all()
    models = {}
    for name, prior in (("x", X), ("z", Z)):

        def program(y, prior=prior):
            numpyro.sample("y", dist.Normal(prior(), 1.0).to_event(1), obs=y)

        one = infer.SMC(program, num_particles=1000)
        one.run(jax.random.key(1), y)
        models[name] = one.to_datatree()
    found = diagnostics.compare(models, weights={"x": share, "z": 1 - share})["comparison"]
    assert float(found["probability"].sel(model="x")) == pytest.approx(first, abs=0.01)


def of_unknown_noise(y):
    """Ten measurements of x + z in plates of their own, and of x alone, with unknown noise."""
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    u, v = U(), V()
    with numpyro.plate("looks", 10):
        numpyro.sample("y", dist.Normal(u + 0.5 * v, sigma), obs=y)
    numpyro.sample("other", dist.Normal(v, 0.5), obs=0.5)


U, V = normal("u", 1.0, 2.0, ()), normal("v", shape=())
LOOKS = np.random.default_rng(3).normal(2.0, 0.5, 10).astype(np.float32)


def exact_with_unknown_noise():
    """Means of u, v and σ by a grid over σ."""
    sigmas = np.linspace(0.05, 3, 600)
    rows = np.vstack([np.tile([1.0, 0.5], (10, 1)), [[0.0, 1.0]]])
    values = np.append(LOOKS, 0.5)
    found, log_w = [], []
    for s in sigmas:
        scaled = np.append(np.full(10, s), 0.5)
        mean, _, log_z = posterior(rows / scaled[:, None], values / scaled, [1, 0], [4, 1], 1.0)
        found.append([*mean, s])
        log_w.append(log_z - np.log(scaled).sum() - 0.5 * s**2)
    w = np.exp(np.array(log_w) - max(log_w))
    return w @ np.array(found) / w.sum()


@pytest.mark.long
def test_chains_of_two_priors_and_an_unknown_noise_have_their_joint_posterior():
    options = {"num_chains": 16, "num_warmup": 30, "num_samples": 60, "num_leapfrog": 8}
    gibbs = infer.ParticleGibbs(of_unknown_noise, num_particles=32, **options)
    gibbs.run(jax.random.key(0), LOOKS)
    draws = gibbs.get_samples(group_by_chain=True)
    assert {name: a.shape for name, a in draws.items()} == dict.fromkeys(
        ("u", "v", "sigma"), (16, 60)
    )
    for name, mean in zip(("u", "v", "sigma"), exact_with_unknown_noise(), strict=True):
        a = draws[name]
        se = a.std() / np.sqrt(array_stats.ess(a, chain_axis=0, draw_axis=1))
        assert abs(a.mean() - mean) < 4 * se, (name, a.mean(), mean, se)
    assert gibbs.to_datatree()["posterior"]["v"].dims == ("chain", "draw")


@pytest.mark.long
@pytest.mark.parametrize("over", [infer.noncentered, infer.forward_coordinates])
def test_stock_nuts_has_the_posterior_that_particles_have(over):
    mcmc = MCMC(NUTS(over(of_sum)), num_warmup=300, num_samples=1500, progress_bar=False)
    mcmc.run(jax.random.key(0), Y)
    draws = mcmc.get_samples()
    mean, covariance, _ = posterior(H, Y, MEAN, VARIANCE)
    both = np.concatenate([draws["x"], draws["z"]], 1)[None]
    count = array_stats.ess(both, chain_axis=0, draw_axis=1)
    assert (np.abs(both[0].mean(0) - mean) < 4 * np.sqrt(np.diag(covariance) / count)).all()
    np.testing.assert_allclose(np.cov(both[0].T), covariance, atol=0.3)


def of_modes(name, first, loc, scale):
    """loc + scale · x, x of N(−1, 0.2²) with probability `first`, else of N(1, 0.2²)."""
    outputs = jnp.array([np.log(first), np.log1p(-first), 0, 0, *[np.log(0.4)] * 2], jnp.float32)
    beta = schedules.log_snr_linear(200, beta_1=1e-4, alpha_bar_T=1e-4)
    return Diffusion(
        GaussianKernel(), beta, lambda x_t, t: jnp.broadcast_to(outputs, (len(x_t), 6)),
        event_shape=(), readout=readouts.Mixture(2, -1.0, 1.0), last_step=readouts.Learned(),
        loc=loc, scale=scale, name=name,
    ).prior({})  # fmt: skip


@pytest.mark.long
def test_a_sum_of_mixtures_has_its_enumerated_modes_however_sharp_it_is():
    """x of modes −1 and 1, z of −0.9 and 1.5; four sums, told apart by y or not; 3 seeds each."""
    laws = {"x": (0.3, 0.0, 1.0), "z": (0.6, 0.3, 1.2)}
    priors = [of_modes(name, *law) for name, law in laws.items()]

    def program(y, sigma):
        x, z = (prior() for prior in priors)
        numpyro.sample("y", dist.Normal(x + z, sigma), obs=y)

    smc = infer.SMC(program, num_particles=4000, twist=infer.TweedieTwist(rank=1))
    means = np.array([[law[1] - law[2], law[1] + law[2]] for law in laws.values()])
    weights = np.array([[law[0], 1 - law[0]] for law in laws.values()])
    total = sum(law[2] ** 2 for law in laws.values()) * 0.04
    for sigma, seed in [(1.0, 0), (0.1, 1), (0.1, 2), (0.03, 3)]:
        rng = np.random.default_rng(seed)
        y = float(rng.choice(np.add.outer(*means).ravel()) + rng.normal() * 0.3)
        log_joint = np.log(np.multiply.outer(*weights)) + stats.norm(
            np.add.outer(*means), np.sqrt(total + sigma**2)
        ).logpdf(y)
        log_z = np.logaddexp.reduce(log_joint.ravel())
        smc.run(jax.random.key(seed), y, sigma)
        assert abs(smc.log_evidence - log_z) < 3 * smc.log_evidence_se + 0.02
        draws = smc.get_samples()
        high = [draws[name] > law[1] for name, law in laws.items()]
        found = np.bincount(2 * high[0] + high[1], minlength=4) / len(high[0])
        np.testing.assert_allclose(found, np.exp(log_joint - log_z).ravel(), atol=0.03)
