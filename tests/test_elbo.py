"""`SampledTimeELBO` estimates what `Trace_ELBO` estimates, at a cost that does not grow with T."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from oracles import exact_gaussian, log_normal
from probdiff import (
    CategoricalKernel,
    Diffusion,
    GaussianKernel,
    ImportanceTimes,
    SampledTimeELBO,
    StratifiedTimes,
    UniformTimes,
    networks,
    readouts,
    schedules,
    standard_diffusion,
    track_kl,
)
from probdiff.trajectories import ForwardTrajectory

TIMES = {
    "uniform": UniformTimes(),
    "stratified": StratifiedTimes(),
    "importance": ImportanceTimes(),
}
MEMORY = "x_0_trajectory_mean_square_kl"


@pytest.fixture(scope="module")
def rough():
    """An untrained model (far from exact, so every term counts) and data."""
    network = networks.Perceptron((2,), 16, 1, 15, rngs=nnx.Rngs(3))
    beta = schedules.log_snr_linear(15, beta_1=0.02, alpha_bar_T=0.02)
    diffusion = Diffusion(GaussianKernel(), beta, network, event_shape=(2,))
    x = jax.random.normal(jax.random.key(0), (12, 2)) * jnp.array([1.2, 0.6]) + 0.3
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-2), SampledTimeELBO())
    params = svi.get_params(svi.init(jax.random.key(1), x))
    noise = jax.random.normal(jax.random.key(2), (1000,))
    params = jax.tree.map(lambda p: p + 0.3 * noise[: p.size].reshape(p.shape), params)
    return diffusion, params, x


def draws(objective, params, model, guide, *args, n, key=4, **kwargs):
    """n independent losses, nats."""
    one = jax.jit(lambda k: objective.loss(k, params, model, guide, *args, **kwargs))
    return np.asarray(jax.lax.map(one, jax.random.split(jax.random.key(key), n)), float)


def assert_agree(a, b):
    """Two sets of draws have the same mean, two-sided within 4 standard errors."""
    error = math.hypot(a.std() / math.sqrt(len(a)), b.std() / math.sqrt(len(b)))
    assert abs(a.mean() - b.mean()) < 4 * error, (a.mean(), b.mean(), error)


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize(("num_times", "num_particles"), [(1, 1), (3, 2)])
def test_every_law_of_t_estimates_the_elbo_of_whole_trajectories(
    rough, name, num_times, num_particles
):
    diffusion, params, x = rough
    whole = draws(Trace_ELBO(), params, diffusion.model, diffusion.guide, x, n=3_000)
    objective = SampledTimeELBO(num_particles, num_times=num_times, times=TIMES[name])
    uneven = params | {MEMORY: jnp.linspace(0.1, 5, 14) ** 2}
    guide = track_kl(diffusion.guide)
    assert_agree(whole, draws(objective, uneven, diffusion.model, guide, x, n=6_000))


def test_gradients_agree_with_those_of_whole_trajectories(rough):
    diffusion, params, x = rough

    def gradients(objective, n):
        def one(k):
            g = jax.grad(lambda p: objective.loss(k, p, diffusion.model, diffusion.guide, x))(
                params
            )
            return g["x_0_network$params"]["readout"]["bias"]

        return np.asarray(jax.lax.map(one, jax.random.split(jax.random.key(6), n)), float)

    a, b = gradients(Trace_ELBO(), 1_000), gradients(SampledTimeELBO(), 8_000)
    error = np.hypot(a.std(0) / math.sqrt(len(a)), b.std(0) / math.sqrt(len(b)))
    assert (np.abs(a.mean(0) - b.mean(0)) < 4 * error).all()
    assert (np.abs(a.mean(0)) > 4 * error).any()


@pytest.mark.long
def test_gradient_of_learned_rates_agrees_with_that_of_whole_trajectories():
    mean, sd = np.array([0.4]), np.array([0.7])
    fixed = exact_gaussian(mean, sd, T=6)
    diffusion = Diffusion(
        GaussianKernel(),
        schedules.learned(schedules.log_snr_linear(6, beta_1=0.05, alpha_bar_T=0.05)),
        fixed.network,
        event_shape=(1,),
        readout=fixed.readout,
    )
    x = jnp.array([[0.2], [1.1], [-0.4]])
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-2), Trace_ELBO())
    params = svi.get_params(svi.init(jax.random.key(1), x))

    def gradients(objective, n):
        def one(k):
            loss = lambda p: objective.loss(k, p, diffusion.model, diffusion.guide, x)  # noqa: E731
            return jax.grad(loss)(params)["x_0_beta"]

        return np.asarray(jax.lax.map(one, jax.random.split(jax.random.key(6), n)), float)

    a, b = gradients(Trace_ELBO(), 8_000), gradients(SampledTimeELBO(), 40_000)
    error = np.hypot(a.std(0) / math.sqrt(len(a)), b.std(0) / math.sqrt(len(b)))
    assert (np.abs(a.mean(0) - b.mean(0)) < 4 * error).all()
    assert (np.abs(a.mean(0)) > 4 * error).any()


@pytest.mark.long
def test_stratified_spreads_less_than_uniform_and_importance_least(rough):
    _, _, x = rough
    zero = Diffusion(  # no network: a KL that falls steeply with t
        GaussianKernel(),
        schedules.linear(40, beta_1=0.01, beta_T=0.3),
        lambda x_t, t: jnp.zeros_like(x_t),
        event_shape=(2,),
        readout=readouts.Perturbation(readouts.ForwardVariance()),
    )
    diffusion, params = zero, {}
    args = (diffusion.model, track_kl(diffusion.guide), x)
    svi = SVI(*args[:2], optax.sgd(0.0), SampledTimeELBO(times=ImportanceTimes()))
    state = svi.init(jax.random.key(0), x, init_params=params)
    state = jax.lax.fori_loop(0, 300, lambda _, s: svi.update(s, x)[0], state)
    params = params | state.mutable_state
    spread = {
        name: draws(SampledTimeELBO(times=times), params, *args, n=3_000).std()
        for name, times in TIMES.items()
    }
    assert spread["importance"] < 0.9 * spread["stratified"] < 0.9 * spread["uniform"]


@pytest.mark.long
def test_running_kl_is_the_root_mean_square_of_each_step(rough):
    diffusion, params, x = rough
    guide = track_kl(diffusion.guide)
    objective = SampledTimeELBO(times=ImportanceTimes(), num_times=500)
    svi = SVI(diffusion.model, guide, optax.sgd(0.0), objective)
    state = svi.init(jax.random.key(0), x, init_params=params)
    assert (state.mutable_state[MEMORY] == 0).all()
    state = jax.lax.fori_loop(0, 400, lambda _, s: svi.update(s, x)[0], state)
    # sgd(0.0) leaves the parameters alone, so the exact mean square can be drawn directly
    from probdiff.elbo import step_kl

    reverse = diffusion.bind(params)
    forward = ForwardTrajectory.of(reverse, x).broadcast_to((12,))
    t = jnp.broadcast_to(jnp.arange(2, 16)[:, None, None], (14, 20_000, 12))
    x_t = forward.sample_at(jax.random.key(5), t)
    kl = step_kl(forward, reverse.step(x_t, t, examples_first=True), x_t, t)
    # squares of a heavy-tailed KL: about 3 % noise in either root at these numbers of draws
    expected = np.sqrt((kl**2).mean((1, 2)))
    assert np.allclose(np.sqrt(state.mutable_state[MEMORY]), expected, rtol=0.12)


def test_importance_times_without_the_running_kl_are_refused(rough):
    diffusion, params, x = rough
    objective = SampledTimeELBO(times=ImportanceTimes())
    with pytest.raises(ValueError, match=r"track_kl\(guide\)"):
        objective.loss(jax.random.key(0), params, diffusion.model, diffusion.guide, x)


@pytest.mark.parametrize("arguments", [{"num_particles": 0}, {"num_times": 0}])
def test_counts_below_one_are_refused(arguments):
    with pytest.raises(ValueError, match="must be at least 1; got 0"):
        SampledTimeELBO(**arguments)


@pytest.mark.parametrize("n", [1, 7, 100])
def test_stratified_times_visit_every_stratum_once(n):
    u = np.asarray(StratifiedTimes().uniforms(jax.random.key(n), (n,)))
    assert sorted(np.floor(u * n + 1e-4).astype(int) % n) == list(range(n))
    t, probability = StratifiedTimes().draw(jax.random.key(n), (n,), jnp.zeros(50))
    assert t.min() >= 2 and t.max() <= 51
    assert np.allclose(probability, 1 / 50)


def test_each_law_of_t_draws_its_own_probabilities():
    mean_square = jnp.array([4.0, 1.0, 0.0, 0.25])
    for times in TIMES.values():
        law = np.asarray(times.law(mean_square))
        assert law.sum() == pytest.approx(1, abs=1e-6)
        t, probability = jax.vmap(lambda k, times=times: times.draw(k, (), mean_square))(
            jax.random.split(jax.random.key(0), 20_000)
        )
        share = np.bincount(np.asarray(t), minlength=6)[2:] / 20_000
        assert (np.abs(share - law) < 4 * np.sqrt(law * (1 - law) / 20_000)).all()
        assert np.allclose(probability, law[np.asarray(t) - 2])
    # root mean squares 2, 1, (unvisited: the largest, 2), 0.5, nine tenths of the whole
    expected = 0.9 * np.array([2, 1, 2, 0.5]) / 5.5 + 0.1 / 4
    assert np.allclose(ImportanceTimes().law(mean_square), expected)


MEAN, SD = np.array([0.3, -0.5]), np.array([0.9, 0.6])


def assert_mean_is_minus(objective_draws, expected):
    """Losses whose mean is −expected, within 4 standard errors."""
    error = objective_draws.std() / math.sqrt(len(objective_draws))
    assert abs(objective_draws.mean() + expected) < 4 * error


@pytest.mark.long
def test_plates_masks_scales_and_missing_entries_count_as_in_trace_elbo():
    diffusion = exact_gaussian(MEAN, SD)
    x = MEAN + SD * np.array([[0.1, 1.2], [-0.7, 0.4], [1.5, -0.2], [0.3, 0.6]])
    log_p = log_normal(x, MEAN, SD)
    x = jnp.asarray(x, jnp.float32)
    keep, observed = jnp.array([True, False, True, True]), np.ones((4, 2), bool)
    observed[0, 1] = observed[2, 0] = False

    def nested(statement):
        def program(x):
            with numpyro.plate("a", 2, dim=-2), numpyro.plate("b", 2, dim=-1):
                statement(x.reshape(2, 2, 2))

        return program

    def subsampled(statement):
        def program(x):
            with numpyro.plate("a", 4, subsample_size=1):
                statement(numpyro.subsample(x, event_dim=1))

        return program

    def both(wrap):
        return wrap(diffusion.model), wrap(diffusion.guide)

    cases = {
        "mask": (*both(lambda p: numpyro.handlers.mask(p, mask=keep)), {}, log_p[keep].sum()),
        "scale": (*both(lambda p: numpyro.handlers.scale(p, scale=3.0)), {}, 3 * log_p.sum()),
        "nested": (nested(diffusion.reverse), nested(diffusion.forward), {}, log_p.sum()),
        "part": (subsampled(diffusion.reverse), subsampled(diffusion.forward), {}, log_p.sum()),
        "missing": (
            diffusion.model,
            diffusion.guide,
            {"mask": jnp.asarray(observed)},
            log_p[observed].sum(),
        ),
    }
    for model, guide, kwargs, expected in cases.values():
        assert_mean_is_minus(
            draws(SampledTimeELBO(), {}, model, guide, x, n=20_000, **kwargs), expected
        )


def test_other_latents_are_scored_as_mean_field_does():
    """A diffusion beside a latent with a closed-form KL: the KL is exact, not sampled."""
    diffusion = exact_gaussian(MEAN, SD)
    x = jnp.asarray(MEAN + SD * 0.5)[None]

    def model(x):
        numpyro.sample("w", dist.Normal(0.0, 1.0))
        diffusion.model(x)

    def guide(x):
        numpyro.sample("w", dist.Normal(0.7, 0.3))
        diffusion.guide(x)

    w = dist.kl_divergence(dist.Normal(0.7, 0.3), dist.Normal(0.0, 1.0))
    stock = TraceMeanField_ELBO().loss(
        jax.random.key(0),
        {},
        lambda: numpyro.sample("w", dist.Normal(0.0, 1.0)),
        lambda: numpyro.sample("w", dist.Normal(0.7, 0.3)),
    )
    assert float(stock) == pytest.approx(float(w), rel=1e-6)
    with_w = draws(SampledTimeELBO(), {}, model, guide, x, n=200)
    without = draws(SampledTimeELBO(), {}, diffusion.model, diffusion.guide, x, n=200)
    assert_mean_is_minus(
        draws(SampledTimeELBO(), {}, model, guide, x, n=20_000),
        log_normal(np.asarray(x), MEAN, SD).sum() - float(w),
    )
    assert with_w.std() < 1.5 * without.std()


@pytest.mark.long
def test_svi_trains_evaluates_and_runs_with_it(rough):
    diffusion, _, x = rough
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-2), SampledTimeELBO(num_times=4))
    result = svi.run(jax.random.key(0), 400, x, progress_bar=False)
    before = draws(
        SampledTimeELBO(),
        svi.get_params(svi.init(jax.random.key(0), x)),
        diffusion.model,
        diffusion.guide,
        x,
        n=500,
    ).mean()
    after = draws(SampledTimeELBO(), result.params, diffusion.model, diffusion.guide, x, n=500)
    assert after.mean() < before - 4 * after.std() / math.sqrt(500)
    assert np.isfinite(svi.evaluate(result.state, x))


def test_latents_out_of_order_are_scored_by_sampling():
    """Where w comes first in the guide and depends on z in the model, no closed form is right."""

    def model():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("w", dist.Normal(z, 0.5))

    def guide():
        w = numpyro.sample("w", dist.Normal(0.0, 1.5))
        numpyro.sample("z", dist.Normal(-w, 0.7))

    stock = draws(Trace_ELBO(), {}, model, guide, n=20_000)
    assert_agree(stock, draws(SampledTimeELBO(), {}, model, guide, n=20_000, key=7))


@pytest.mark.long
def test_trajectory_before_the_latents_of_its_model_is_refused():
    diffusion = exact_gaussian(MEAN, SD)
    x = jnp.asarray(MEAN)[None]

    def model(x):
        numpyro.sample("w", dist.Normal(0.0, 1.0))
        diffusion.model(x)

    def guide(x):
        diffusion.guide(x)
        numpyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'x_0_trajectory' must come in the guide after"):
        SampledTimeELBO().loss(jax.random.key(0), {}, model, guide, x)


def test_mutable_sites_of_the_model_are_kept():
    diffusion = exact_gaussian(MEAN, SD, T=5)
    x = jnp.asarray(MEAN)[None]

    def model(x):
        count = numpyro.primitives.mutable("count", {"n": jnp.zeros((), jnp.int32)})
        count["n"] = count["n"] + 1
        diffusion.model(x)

    for particles in (1, 2):
        svi = SVI(model, diffusion.guide, optax.adam(1e-3), SampledTimeELBO(particles))
        result = svi.run(jax.random.key(0), 5, x, progress_bar=False)
        assert result.state.mutable_state["count"]["n"] == 6  # init counts once
        assert result.state.mutable_state["count"]["n"].dtype == jnp.int32


@pytest.mark.parametrize("share", [0.0, 3.0])
def test_uniform_share_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match=rf"uniform_share must lie in \(0, 1\]; got {share}"):
        ImportanceTimes(uniform_share=share)


def test_law_of_t_must_be_an_instance(unchecked):
    with pytest.raises(ValueError, match="times must be a law of t"):
        SampledTimeELBO(times=UniformTimes)


def test_model_without_its_guide_statement_is_refused(rough):
    diffusion, params, x = rough
    with pytest.raises(ValueError, match=r"diffusion\.forward"), pytest.warns(UserWarning):
        SampledTimeELBO().loss(jax.random.key(0), params, diffusion.model, lambda x: None, x)


@pytest.mark.long
def test_compiled_step_does_not_grow_with_T():
    """Temporary memory and arithmetic of one step, as XLA counts them: T = 1000 over T = 40."""

    def cost(T):
        network = networks.Perceptron((2,), 32, 2, T, rngs=nnx.Rngs(0))
        beta = schedules.log_snr_linear(T, beta_1=1e-4, alpha_bar_T=1e-3)
        diffusion = Diffusion(GaussianKernel(), beta, network, event_shape=(2,))
        svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), SampledTimeELBO())
        x = jax.random.normal(jax.random.key(0), (256, 2))
        state = svi.init(jax.random.key(0), x)
        compiled = jax.jit(svi.update).lower(state, x).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        return memory, compiled.cost_analysis()["flops"]

    (memory_40, flops_40), (memory_1000, flops_1000) = cost(40), cost(1000)
    assert memory_1000 <= 1.1 * memory_40
    assert flops_1000 <= 1.1 * flops_40


def with_last_step(last_step, size=10, **options):
    """An untrained network of 2 numbers or 3 classes, and data on the grid 0..4 or 0..2."""
    network = networks.Perceptron((2,), 16, 1, size, rngs=nnx.Rngs(3), **options.pop("outputs"))
    diffusion = Diffusion(
        options.pop("kernel"), schedules.log_snr_linear(size, beta_1=0.05, alpha_bar_T=0.02),
        network, event_shape=(2,), last_step=last_step, **options,
    )  # fmt: skip
    x = np.array([[0, 1], [2, 2], [1, 0], [2, 1]])
    x = x.astype(np.int32 if diffusion.kernel.is_discrete else np.float32)
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-2), SampledTimeELBO())
    params = svi.get_params(svi.init(jax.random.key(1), x))
    noise = jax.random.normal(jax.random.key(2), (2000,))
    params = jax.tree.map(lambda p: p + 0.3 * noise[: p.size].reshape(p.shape), params)
    return diffusion, params, x


NUMBERS = {"kernel": GaussianKernel(), "outputs": {"outputs": 2}, "loc": 1.0}
CLASSES = {"kernel": CategoricalKernel(3), "outputs": {"outputs": 3, "states": 3}}
CASES = {
    "learned": (readouts.Learned(), NUMBERS, {}),
    "grid": (readouts.Discretised(0, 4, 5), NUMBERS, {"num_times": 3}),
    "classes": (readouts.Learned(), CLASSES, {"times": UniformTimes()}),
}


@pytest.mark.parametrize(
    "name", ["classes", *(pytest.param(n, marks=pytest.mark.long) for n in ("learned", "grid"))]
)
def test_the_data_at_a_share_of_times_leave_the_mean_and_take_one_call(name):
    """Loss and gradient, each within 4 standard errors; the network's work is halved."""
    last_step, model, options = CASES[name]
    diffusion, params, x = with_last_step(last_step, **model)
    mask = jnp.array([[True, True], [True, False], [True, True], [True, True]])
    pair = diffusion.model, diffusion.guide

    def both(objective):
        def loss(params, key):
            return objective.loss(key, params, *pair, x, mask=mask)

        one = jax.jit(jax.value_and_grad(loss))
        keys = jax.random.split(jax.random.key(5), 6000)
        value, gradient = jax.jit(lambda ks: jax.lax.map(lambda k: one(params, k), ks))(keys)
        direction = jax.tree.map(lambda g: jnp.sum(jnp.sin(jnp.arange(g[0].size)) * g.reshape(
            len(g), -1), -1), gradient)  # fmt: skip
        flops = one.lower(params, keys[0]).compile().cost_analysis()["flops"]
        return np.asarray(value), np.asarray(sum(jax.tree.leaves(direction))), flops

    plain = both(SampledTimeELBO(**options))
    shared = both(SampledTimeELBO(first_share=0.3, **options))
    assert_agree(plain[0], shared[0])
    assert_agree(plain[1], shared[1])
    if name == "learned":  # elsewhere the laws cost more than so small a network
        assert shared[2] < 0.65 * plain[2]


def test_a_first_share_of_a_tied_step_is_refused(rough):
    diffusion, params, x = rough
    with pytest.raises(ValueError, match="first_share must be None where the last step is tied"):
        objective = SampledTimeELBO(first_share=0.2)
        objective.loss(jax.random.key(0), params, diffusion.model, diffusion.guide, x)
    with pytest.raises(ValueError, match=r"first_share must lie in \(0, 1\); got 1.0"):
        SampledTimeELBO(first_share=1.0)


def test_a_first_share_is_the_share_of_ones():
    t, probability = ImportanceTimes().draw(jax.random.key(0), (1000,), jnp.array([4.0, 1.0]), 0.25)
    assert np.mean(np.asarray(t) == 1) == 0.25 and set(np.unique(t)) == {1, 2, 3}
    law = np.asarray(ImportanceTimes().law(jnp.array([4.0, 1.0]))) * 0.75
    np.testing.assert_allclose(probability, np.array([0.25, *law])[np.asarray(t) - 1], 1e-6)


@pytest.mark.long
def test_no_step_remembers_the_loss_of_the_data():
    diffusion, _, x = with_last_step(readouts.Learned(), size=2, **NUMBERS)
    objective = SampledTimeELBO(times=ImportanceTimes(), first_share=0.999)
    svi = SVI(diffusion.model, track_kl(diffusion.guide), optax.adam(1e-2), objective)
    state, _ = svi.update(svi.init(jax.random.key(0), x), x)
    assert state.mutable_state[MEMORY].tolist() == [0.0]  # no t = 2 among four


def coded(sd=0.5):
    """Two codes of a number, one with a KL in closed form, and the number given their sum."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            a = numpyro.sample("a", dist.Laplace(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z.sum(-1) + a, 1.0), obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            mean = jnp.stack([0.3 * x, 0.1 * x], -1)
            numpyro.sample("z", dist.Normal(mean, sd).to_event(1))
            numpyro.sample("a", dist.Normal(0.0, 0.7))

    return model, guide


def parts_of(model, guide, x, key):
    """Each latent's cost, summed over rows, and all the rest."""
    terms, _ = SampledTimeELBO().terms(key, {}, model, guide, (x,), {})
    cost = {n: sum(float(t.total()) for t in terms if t.is_cost and t.name == n) for n in "za"}
    return cost, sum(float(t.total()) for t in terms if not t.is_cost)


def test_codes_cost_as_the_objective_says():
    """loss = rest + β max(KL, λ N ln 2) site by site, at the same draws."""
    (model, guide), x, key = coded(), jnp.linspace(-2, 2, 9), jax.random.key(3)
    cost, rest = parts_of(model, guide, x, key)

    def loss(**options):
        return float(SampledTimeELBO(**options).loss(key, {}, model, guide, x))

    np.testing.assert_allclose(loss(), rest + sum(cost.values()), rtol=1e-5)
    np.testing.assert_allclose(loss(kl_weight=0.3), rest + 0.3 * sum(cost.values()), rtol=1e-5)
    low, high = sorted(cost.values())
    bits = 0.5 * (low + high) / math.log(2) / len(x)
    paid = high + bits * math.log(2) * len(x)
    np.testing.assert_allclose(loss(free_bits=bits, kl_weight=2.0), rest + 2 * paid, rtol=1e-5)
    for judge in (SampledTimeELBO(kl_weight=0.3).judge, SampledTimeELBO().judge):
        exact = float(judge.loss(key, {}, model, guide, x))
        np.testing.assert_allclose(exact, rest + sum(cost.values()), rtol=1e-5)


def test_free_bits_stop_pressing_on_a_code():
    """Under its free bits a code's KL has no gradient; above, all of it."""
    x, key = jnp.linspace(-2, 2, 9), jax.random.key(3)

    def pull(bits):
        def loss(sd):
            return SampledTimeELBO(free_bits=bits).loss(key, {}, *coded(sd), x)

        return float(jax.grad(loss)(0.5))

    def free(sd):
        return SampledTimeELBO(kl_weight=0.0).loss(key, {}, *coded(sd), x)

    np.testing.assert_allclose(pull(1e3), float(jax.grad(free)(0.5)), rtol=1e-5)
    assert abs(pull(1e3) - pull(0.0)) > 1


def test_free_bits_count_examples_by_their_masks_and_scales():
    x, key, seen = jnp.linspace(-2, 2, 8), jax.random.key(3), jnp.arange(8) < 5

    def program(of):
        def handled(x):
            with numpyro.handlers.scale(scale=10.0), numpyro.handlers.mask(mask=seen):
                return of(x)

        return handled

    model, guide = map(program, coded())
    loss = SampledTimeELBO(free_bits=1e3).loss(key, {}, model, guide, x)
    _, rest = parts_of(model, guide, x, key)
    np.testing.assert_allclose(float(loss) - rest, 2 * 1e3 * math.log(2) * 50, rtol=1e-4)


def test_a_warm_up_grows_with_the_steps_of_svi():
    (model, guide), x = coded(), jnp.linspace(-2, 2, 9)
    loss = SampledTimeELBO(kl_weight=0.5, warm_up=4)
    svi = SVI(model, track_kl(guide), optax.sgd(0.0), loss)
    state, update = svi.init(jax.random.key(0), x), jax.jit(svi.update)
    for i in range(6):
        key = jax.random.split(state.rng_key)[1]
        cost, rest = parts_of(model, track_kl(guide), x, key)
        state, value = update(state, x)
        expected = rest + 0.5 * min(1, i / 4) * sum(cost.values())
        np.testing.assert_allclose(float(value), expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"warm_up needs .* track_kl\(guide\)"):
        loss.loss(jax.random.key(0), {}, model, guide, x)


def test_an_x_0_of_the_guide_is_a_cost_with_its_trajectory():
    """As a code whose prior is a diffusion: all that `kl_z` of its bound holds is weighed."""
    diffusion = standard_diffusion((), T=4, name="z", last_step=readouts.Learned())

    def model(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(diffusion.reverse(), 1.0), obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            diffusion.forward(numpyro.sample("z", dist.Normal(0.5 * x, 0.6)))

    x, key = jnp.linspace(-1, 1, 5), jax.random.key(1)
    terms, _ = SampledTimeELBO().terms(key, {}, model, guide, (x,), {})
    cost = sum(float(t.total()) for t in terms if t.is_cost)
    assert {(t.name, t.part) for t in terms if not t.is_cost} == {("x", "log_p")}
    whole = [float(SampledTimeELBO(kl_weight=w).loss(key, {}, model, guide, x)) for w in (1.0, 0.0)]
    np.testing.assert_allclose(whole[0] - whole[1], cost, rtol=1e-4)


@pytest.mark.parametrize("name", ["kl_weight", "free_bits", "warm_up"])
def test_options_of_codes_are_checked(name, unchecked):
    for value in (-1, "a", math.nan):
        with pytest.raises(ValueError, match=name):
            SampledTimeELBO(**{name: value})
