"""Bounds and ladders of programs, a model and a guide, beside exact log densities."""

import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray as xr
from numpyro.infer import SVI, Trace_ELBO

from oracles import exact_gaussian, gaussian_network, log_normal
from probdiff import (
    Diffusion,
    GaussianKernel,
    SampledTimeELBO,
    SimpleLoss,
    diagnostics,
    infer,
    plots,
    readouts,
    schedules,
    standard_diffusion,
)

pytestmark = pytest.mark.filterwarnings("ignore::probdiff.diagnostics.LadderWarning")
KEY = jax.random.key(0)
MEAN, SD = np.array([0.3, -0.5]), np.array([0.9, 0.6])
RATES = schedules.log_snr_linear(6, beta_1=0.05, alpha_bar_T=0.05)
WRONG = Diffusion(  # holds the data for wider than they are, and ends before noise
    GaussianKernel(),
    RATES,
    gaussian_network(MEAN, 1.5 * SD, RATES),
    event_shape=(2,),
    readout=readouts.Data(),
    last_step=readouts.Learned(),
)
LOADINGS = np.array([[1.0, 0.4], [-0.5, 0.8], [0.3, 1.2]])
NOISE = np.array([0.5, 0.7, 0.6])


def rows(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 3)) * 1.2 + 0.2


def marginal(x):
    """log p(x) of x = W z + noise, z ~ N(MEAN, SD²)."""
    covariance = LOADINGS * SD**2 @ LOADINGS.T + np.diag(NOISE**2)
    return np.asarray(dist.MultivariateNormal(LOADINGS @ MEAN, covariance).log_prob(x))


def posterior(x):
    """Mean and covariance of z given x."""
    precision = np.diag(SD**-2) + LOADINGS.T @ np.diag(NOISE**-2) @ LOADINGS
    covariance = np.linalg.inv(precision)
    mean = (MEAN / SD**2 + (x / NOISE**2) @ LOADINGS) @ covariance
    return mean, covariance


def latent_pair(diffusion, shift=0.0, widen=1.0):
    """A diffusion as the prior of z, x its noisy linear image, and q(z | x) moved from exact."""
    scale_tril = widen * np.linalg.cholesky(posterior(np.zeros(3))[1])
    weights = np.stack([posterior(row)[0] for row in np.eye(3)]) - posterior(np.zeros(3))[0]

    def model(x):
        with numpyro.plate("data", len(x)):
            z = diffusion.reverse()
            numpyro.sample("x", dist.Normal(z @ LOADINGS.T, NOISE).to_event(1), obs=x)

    def guide(x):
        mean = posterior(np.zeros(3))[0] + x @ weights + shift
        with numpyro.plate("data", len(x)):
            law = dist.MultivariateNormal(mean, scale_tril=jnp.asarray(scale_tril))
            diffusion.forward(numpyro.sample("z", law))

    return model, guide


def assert_is(group, exact):
    """Every row within 5 standard errors of its draws, all together within 4."""
    gap, se = group["bound"].values - exact, group["bound_se"].values
    assert (np.abs(gap) < 5 * se + 1e-4).all()
    assert abs(gap.mean()) < 4 * np.sqrt(np.mean(se**2) / len(gap)) + 1e-5


def harmonic(last_step):
    """The exact diffusion of N(MEAN, SD²) on rates that end in noise, ᾱ_T = 0."""
    beta = schedules.harmonic(6)
    table = schedules.steps(beta)
    return Diffusion(
        GaussianKernel(),
        beta,
        lambda x_t, t: jnp.sqrt(table.at(t, 1).alpha_bar_t) * x_t,
        event_shape=(2,),
        readout=readouts.Data(readouts.ForwardVariance()),
        last_step=last_step,
        loc=MEAN,
        scale=SD,
        name="z",
    )


EXACT = {
    "harmonic, learned last step": lambda: harmonic(readouts.Learned()),
    "harmonic, tied last step": lambda: harmonic(readouts.Tied()),
    "learned variance": lambda: exact_gaussian(MEAN, SD, T=6, name="z"),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", EXACT)
def test_log_weight_of_the_whole_is_the_log_density_for_every_draw(name):
    x = rows(5)
    pair = latent_pair(EXACT[name]())
    tree = diagnostics.ladder(KEY, pair, {}, x, sizes=(1, 2), num_repeats=4, num_draws=50)
    exact, group = marginal(x), tree["ladder"]
    np.testing.assert_allclose(group["importance"][:, 0], exact, atol=1e-6)
    assert np.abs(group["importance_se"]).max() < 1e-6  # hence each of the eight draws
    assert_is(group, exact)


@pytest.mark.usefixtures("x64")
@pytest.mark.long
def test_bound_under_a_wrong_encoder_is_low_by_its_divergence():
    x, shift, widen = rows(20), np.array([0.2, -0.1]), 1.3
    pair = latent_pair(exact_gaussian(MEAN, SD, T=6, name="z"), shift, widen)
    tree = diagnostics.bound(KEY, pair, {}, x, num_draws=400)
    _, covariance = posterior(x)
    p = dist.MultivariateNormal(jnp.zeros(2), covariance)
    q = dist.MultivariateNormal(shift, widen**2 * covariance)
    divergence = float(dist.kl_divergence(q, p))
    assert divergence > 0.1
    assert_is(tree["bound"], marginal(x) - divergence)


def test_a_pair_of_a_diffusion_has_its_bound():
    x = np.asarray(rows(40)[:, :2], np.float32)
    own = diagnostics.bound(KEY, WRONG, {}, x, num_draws=200)["bound"]
    tree = diagnostics.bound(KEY, (WRONG.model, WRONG.guide), {}, x, num_draws=200, block_size=30)
    group = tree["bound"]
    gap = (group["bound"] - own["bound"]).values
    se = np.hypot(group["bound_se"], own["bound_se"]).values
    assert np.abs(gap / se).max() < 5 and abs(gap.mean()) < 4 * np.sqrt(np.mean(se**2) / 40)
    assert (se > 0).all() and own["kl"].sum("step").mean() > 0.1
    np.testing.assert_allclose(group["prior_kl_x_0"], own["prior_kl"], rtol=1e-4, atol=1e-5)
    difference = group["step_kl_x_0"].mean("example") - own["kl"].mean("example")
    assert np.abs(difference).max() < 0.05 and group["step"].values.tolist() == [2, 3, 4, 5, 6]
    same = ("units", "reference_measure", "num_dims", "data", "T", "num_draws")
    assert {k: group.attrs[k] for k in same} == {k: own.attrs[k] for k in same}
    both = diagnostics.compare({"a": tree, "b": xr.DataTree.from_dict({"bound": own.to_dataset()})})
    assert both["comparison"].attrs["num_examples"] == 40


@pytest.mark.long
def test_rungs_of_a_pair_are_those_of_its_diffusion():
    x = np.asarray(rows(30)[:, :2], np.float32)
    options = {"sizes": (1, 20), "num_repeats": 10, "num_draws": 20}
    own = diagnostics.ladder(KEY, WRONG, {}, x, **options)["ladder"]
    tree = diagnostics.ladder(KEY, (WRONG.model, WRONG.guide), {}, x, **options)
    group = tree["ladder"]
    gap = (group["importance"] - own["importance"]).values
    se = np.hypot(group["importance_se"], own["importance_se"]).values
    assert np.abs(gap / se).max() < 5
    assert "smc" not in group and "least_ess" not in group and group.attrs["T"] == 6
    ax = plots.ladder(tree)
    labels = [text.get_text() for text in ax.get_xticklabels()]
    plt.close(ax.figure)
    assert labels == ["K", "S = 1", "S = 20"]


def test_a_program_without_a_diffusion_has_a_bound_too():
    """Factor analysis: KL in closed form, and two plates of which one is summed."""
    x = jnp.asarray(rows(25), jnp.float32)

    def model(x):
        loadings = numpyro.param("loadings", jnp.zeros((3, 2)))
        with numpyro.plate("data", len(x), dim=-2):
            z = numpyro.sample("z", dist.Normal(MEAN, SD).to_event(1))
            with numpyro.plate("pixels", 3, dim=-1):
                numpyro.sample("x", dist.Normal((z @ loadings.T)[:, 0], NOISE), obs=x)

    params = {"loadings": jnp.asarray(LOADINGS, jnp.float32)}

    def mean_field(x):
        with numpyro.plate("data", len(x), dim=-2):
            numpyro.sample("z", dist.Normal(x[:, None, :2], 0.5).to_event(1))

    tree = diagnostics.bound(KEY, (model, mean_field), params, x, num_draws=300)["bound"]
    q = dist.Normal(x[:, :2], 0.5)
    closed = dist.kl_divergence(q, dist.Normal(MEAN, SD)).sum(-1)
    np.testing.assert_allclose(tree["kl_z"], closed, rtol=1e-5)
    assert set(tree.data_vars) == {"bound", "bound_se", "kl_z", "log_likelihood_x"}
    total = SampledTimeELBO(300, vectorize_particles=True).loss(KEY, params, model, mean_field, x)
    se = np.sqrt(2 * (tree["bound_se"] ** 2).sum())
    assert abs(tree["bound"].sum() + total) < 4 * se
    assert tree.attrs["num_dims"] == 3 and "T" not in tree.attrs


@pytest.mark.long
@pytest.mark.parametrize("last_step", [readouts.Tied(), readouts.Learned()], ids=str)
def test_an_x_0_that_the_guide_draws_is_scored_as_by_whole_trajectories(last_step):
    """log p(z | z_1) − log q(z | x), whichever way the last step is taken."""
    network = gaussian_network(MEAN, 1.3 * SD, RATES)
    readout = readouts.Data()
    diffusion = Diffusion(
        GaussianKernel(), RATES, network, event_shape=(2,), readout=readout, last_step=last_step,
        name="z",
    )  # fmt: skip
    pair, x = latent_pair(diffusion, shift=0.3), jnp.asarray(rows(4), jnp.float32)

    def losses(objective, n, key):
        one = jax.jit(lambda k: objective.loss(k, {}, *pair, x))
        return np.asarray(jax.lax.map(one, jax.random.split(key, n)), float)

    whole, sampled = losses(Trace_ELBO(), 4_000, KEY), losses(SampledTimeELBO(), 8_000, KEY)
    se = np.hypot(whole.std() / np.sqrt(4_000), sampled.std() / np.sqrt(8_000))
    assert abs(whole.mean() - sampled.mean()) < 4 * se < 1
    group = diagnostics.bound(KEY, pair, {}, x, num_draws=1_000)["bound"]
    total, total_se = -group["bound"].sum(), np.sqrt((group["bound_se"] ** 2).sum())
    assert abs(whole.mean() - total) < 4 * np.hypot(total_se, whole.std() / np.sqrt(4_000))
    parts = group["log_q_z"] - group["reconstruction_z"] + group["prior_kl_z"]
    np.testing.assert_allclose(group["kl_z"], parts + group["step_kl_z"].sum("step"), atol=1e-4)
    np.testing.assert_allclose(group["bound"], group["log_likelihood_x"] - group["kl_z"], atol=1e-4)


def test_an_objective_that_is_no_bound_refuses_an_x_0_of_the_guide():
    pair = latent_pair(standard_diffusion((2,), T=3, name="z", last_step=readouts.Learned()))
    with pytest.raises(ValueError, match="'z', where a trajectory starts, must be observed under"):
        jax.eval_shape(lambda key: SimpleLoss().loss(key, {}, *pair, jnp.ones((2, 3))), KEY)


def augmented_pair(diffusion, mean=0.0, sd=1.0):
    """x and coordinates a of the guide's own are one x_0 of the diffusion."""

    def model(x):
        with numpyro.plate("data", len(x)):
            flat = dist.ImproperUniform(dist.constraints.real_vector, (), (1,))
            a = numpyro.sample("a", flat)  # read from the guide; p(x, a) is said by the diffusion
            diffusion.reverse(jnp.concatenate([x, a], -1))

    def guide(x):
        with numpyro.plate("data", len(x)):
            law = dist.Normal(jnp.full((len(x), 1), mean), sd).to_event(1)
            a = numpyro.sample("a", law)
            diffusion.forward(jnp.concatenate([x, a], -1))

    return model, guide


@pytest.mark.usefixtures("x64")
@pytest.mark.long
def test_extra_coordinates_leave_the_bound_of_x_alone():
    """E log p(x, a) − log q(a): log p(x) where q is exact, and below it by KL(q ‖ p) where not."""
    x = np.asarray(rows(20)[:, :2], np.float32)
    exact = log_normal(x, MEAN, SD).sum(1)
    diffusion = exact_gaussian(np.append(MEAN, 0.4), np.append(SD, 0.8), T=6)
    kl = float(dist.kl_divergence(dist.Normal(0.0, 0.6), dist.Normal(0.4, 0.8)))
    pair = augmented_pair(diffusion, 0.0, 0.6)
    group = diagnostics.bound(KEY, pair, {}, x, num_draws=500)["bound"]
    assert_is(group, exact - kl)
    assert kl > 0.1 and group.attrs["num_dims"] == 2
    pair = augmented_pair(diffusion, 0.4, 0.8)
    tree = diagnostics.ladder(KEY, pair, {}, x, sizes=(1,), num_repeats=3, num_draws=2)
    np.testing.assert_allclose(tree["ladder"]["importance"][:, 0], exact, atol=1e-5)


@pytest.mark.long
def test_a_fit_of_a_latent_diffusion_has_a_tree():
    model, guide = latent_pair(
        standard_diffusion((2,), T=4, name="z", beta=schedules.learned(schedules.cosine(4)))
    )
    svi = SVI(model, guide, optax.adam(1e-3), SampledTimeELBO())
    x = jnp.asarray(rows(5), jnp.float32)
    fitted = svi.run(KEY, 2, x, progress_bar=False)
    tree = diagnostics.to_datatree(fitted, x, svi=svi, key=KEY, num_draws=7)
    sizes = {"chain": 1, "draw": 7, "data": 5, "step": 4, "z_dim_0": 2}
    assert dict(tree["posterior"]["z_trajectory"].sizes) == sizes
    assert "step" not in tree["posterior"]["z"].dims
    assert tree["observed_data"]["x"].sizes["data"] == 5
    group = diagnostics.bound(KEY, (model, guide), fitted.params, x)["bound"]
    assert np.isnan(group["bound_se"]).all() and group.attrs["T"] == 4


def of_site(statement, in_guide=True):
    """A program of x with one more statement around its plate."""

    def model(x):
        statement("model")
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0).mask(True), obs=x)

    def guide(x):
        statement("guide")
        with numpyro.plate("data", len(x)):
            if in_guide:
                numpyro.sample("z", dist.Normal(x / 2, 0.7))

    return model, guide


def nothing(_):
    """No statement."""


def subsampled(x):
    with numpyro.plate("data", len(x), subsample_size=2):
        numpyro.sample("x", dist.Normal(0.0, 1.0), obs=numpyro.subsample(x, event_dim=0))


def twice(x):
    with numpyro.plate("a", 4, dim=-2), numpyro.plate("b", 4, dim=-1):
        numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def unplated(x):
    numpyro.sample("x", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1), obs=x)


def with_param(_):
    numpyro.param("w", jnp.zeros(2))


X = np.ones(4, np.float32)
REFUSED = {
    r"site 'w' of the model must stand in plate 'data' of the rows, or no row has a bound": (
        of_site(lambda _: numpyro.sample("w", dist.Normal(0.0, 1.0))), {}, X,
    ),
    "site 'f' of the guide must stand in plate 'data'": (
        of_site(lambda where: where == "guide" and numpyro.factor("f", 0.0)), {}, X,
    ),
    r"model and guide must open a plate over the 4 rows of x_0": ((unplated, nothing), {}, X),
    "of the rows must differ in size from '[ab]' around the same": (
        (twice, nothing), {}, np.ones((4, 4), np.float32),
    ),
    "plate 'data' must not be subsampled .*; got 2 of 4": (
        (subsampled, nothing), {}, X,
    ),
    r"params must hold exactly .* missing: \[\"\['w'\]\"\]": (of_site(with_param), {}, X),
    r"unknown: \[\"\['v'\]\"\]": (of_site(nothing), {"v": jnp.zeros(2)}, X),
    r"params\['w'\] must have shape \(2,\)": (of_site(with_param), {"w": jnp.zeros(3)}, X),
    "guide must draw every latent site of the model; got none named 'z'": (
        of_site(nothing, in_guide=False), {}, X,
    ),
    "model must observe the data": ((nothing, nothing), {}, X),
    r"a program as a pair \(model, guide\)": ((nothing,), {}, X),
    r"x_0 must be an array, or a tuple or dict of arrays; got str": (of_site(nothing), {}, "x"),
    "x_0 must have rows, as many in every array": (
        of_site(nothing), {}, {"x": X, "y": np.ones(3, np.float32)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
@pytest.mark.filterwarnings("ignore:Found")
def test_a_program_without_a_bound_by_row_is_refused(unchecked, sentence):
    pair, params, x = REFUSED[sentence]
    with pytest.raises(ValueError, match=sentence):
        diagnostics.bound(KEY, pair, params, x)


def test_what_is_a_diffusions_alone_is_refused():
    for name, value in {"context": X, "mask": X > 0}.items():
        with pytest.raises(ValueError, match=f"{name} must be left out of a program"):
            diagnostics.bound(KEY, of_site(nothing), {}, X, **{name: value})


def test_rows_of_several_kinds_masks_scales_and_blocks_count():
    """A masked and scaled regression, its rows by keyword, in blocks; another argument is bound."""

    def model(x, c, seen, sd):
        with numpyro.plate("data", len(x)):
            with numpyro.handlers.scale(scale=0.5):
                z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(c + 0.0 * z, sd).mask(seen), obs=x)

    def guide(x, c, seen, sd):
        with numpyro.plate("data", len(x)), numpyro.handlers.scale(scale=0.5):
            numpyro.sample("z", dist.Normal(1.0, 1.0))

    pair = tuple(functools.partial(program, sd=0.3) for program in (model, guide))
    given = {name: np.asarray(a, np.float32) for name, a in zip("xc", rows(7).T[:2], strict=True)}
    seen = np.arange(7) != 3
    tree = diagnostics.bound(KEY, pair, {}, given | {"seen": seen}, block_size=3)["bound"]
    log_p = np.where(seen, log_normal(given["x"], given["c"], 0.3), 0)
    np.testing.assert_allclose(tree["log_likelihood_x"], log_p, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tree["kl_z"], 0.25, rtol=1e-5)  # half of ½
    np.testing.assert_allclose(tree["bound"], log_p - 0.25, rtol=1e-4, atol=1e-5)
    assert np.isnan(tree.attrs["num_dims"])


def test_a_part_that_is_nan_is_named():
    diffusion = Diffusion(
        GaussianKernel(), RATES, lambda x_t, t: jnp.where((t == 3)[:, None], jnp.nan, 0.0 * x_t),
        event_shape=(2,), readout=readouts.Perturbation(readouts.ForwardVariance()),
    )  # fmt: skip
    x = np.zeros((4, 2), np.float32)
    with pytest.raises(FloatingPointError, match="step_kl_x_0 is NaN at steps 3 for 4 of 4"):
        diagnostics.bound(KEY, (diffusion.model, diffusion.guide), {}, x)


@pytest.mark.long
def test_a_posterior_through_a_linear_decoder_is_exact():
    """A prior of z, conditioned on x by SMC: mean, covariance and evidence of the Gaussian."""
    diffusion, x = exact_gaussian(MEAN, SD, T=8, name="z"), jnp.asarray(rows(2), jnp.float32)
    prior = diffusion.prior({}, variance=SD**2)

    def program(x):
        with numpyro.plate("data", len(x)):
            law = dist.Normal(prior() @ LOADINGS.T, NOISE).to_event(1)
            numpyro.sample("x", law, obs=x)

    smc = infer.SMC(program, num_particles=1000, num_runs=2)
    smc.run(KEY, x=x)
    sites, log_w = smc.get_weighted_samples()
    weights = np.exp(log_w)[..., None]
    mean, covariance = posterior(np.asarray(x))
    found = (weights * sites["z"]).sum(0)
    sd = np.sqrt((weights * (sites["z"] - found) ** 2).sum(0))
    exact_sd = np.sqrt(np.diag(covariance))
    assert (np.abs(found - mean) < 4 * exact_sd / np.sqrt(1500)).all()
    np.testing.assert_allclose(sd, np.broadcast_to(exact_sd, sd.shape), rtol=0.1)
    assert (np.abs(smc.log_evidence - marginal(np.asarray(x))) < 0.02).all()
