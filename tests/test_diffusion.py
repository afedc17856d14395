"""The programs of a diffusion: their sites, their densities by hand, what they refuse.

Densities are compared with loops over steps and numbers, `log_p` and `log_q`, in float64.
"""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.util import log_density
from scipy import stats

import reference
from probdiff import (
    Diffusion,
    GaussianKernel,
    SampledTimeELBO,
    diagnostics,
    networks,
    readouts,
    sample,
    schedules,
    standard_diffusion,
    validation,
)
from probdiff.trajectories import ForwardTrajectory, ReverseTrajectory

T = 5
BETA = schedules.linear(T, beta_1=0.05, beta_T=0.6)
SHAPES = [(), (2,), (2, 3)]
every_shape = pytest.mark.parametrize("event_shape", SHAPES, ids=str)


def outputs(x, t):
    """Both outputs of the network for one number of x: mean and variance of `Perturbation`."""
    return 0.4 * np.sin(2 * x) + 0.1 * t, 0.3 * x - 0.05 * t


def network(x_t, t):
    t = t.reshape(-1, *[1] * (x_t.ndim - 1))
    z, v = 0.4 * jnp.sin(2 * x_t) + 0.1 * t, 0.3 * x_t - 0.05 * t
    return jnp.stack([z, v], -1) if x_t.ndim == 1 else jnp.concatenate([z, v], -1)


def make(event_shape=(2,), network=network, beta=BETA, **options):
    return Diffusion(GaussianKernel(), beta, network, event_shape=event_shape, **options)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def log_p(x_0, x, loc=0.0, scale=1.0):
    """log p(x_0..x_T), entry by entry of x_0; x has time first, and is on the diffusion's scale."""
    total = reference.log_normal(x[-1], 0.0, 1.0)
    for t in range(2, T + 1):
        beta = BETA[t - 1]
        z, v = outputs(x[t - 1], t)
        mean, variance = np.sqrt(1 - beta) * x[t - 1] + np.sqrt(beta) * z, 0.0
        variance = 1 / (1 + np.exp(-v) * (1 - beta) / beta)
        total = total + reference.log_normal(x[t - 2], mean, variance)
    mean, variance = reference.transition(x[0], BETA, 1)
    return total + reference.log_normal(x_0, loc + scale * mean, scale**2 * variance)


def log_q(x_0, x):
    """log q(x_1..x_T | x_0), entry by entry; x_0 and x on the diffusion's scale, time first."""
    levels = [x_0, *x]
    return sum(
        reference.log_normal(levels[t], *reference.transition(levels[t - 1], BETA, t))
        for t in range(1, T + 1)
    )


def sites_of(program, *args, **kwargs):
    """Sites of one run, by name."""
    return handlers.trace(handlers.seed(program, 0)).get_trace(*args, **kwargs)


def density(program, values, *args, **kwargs):
    """Log density of a program at given values of its sites."""
    return jax.jit(lambda values: log_density(program, args, kwargs, values)[0])(values)


# sites


@pytest.mark.parametrize(
    ("event_shape", "name"), [((), "x_0"), ((2,), "roll"), ((2, 3), "x_0")], ids=str
)
def test_sites_have_their_names_and_shapes(event_shape, name):
    diffusion = make(event_shape, name=name)
    x_0 = numbers(7, *event_shape)
    for program in (diffusion.model, diffusion.guide):
        sites = sites_of(program, x_0)
        trajectory = sites[f"{name}_trajectory"]
        assert trajectory["value"].shape == (7, T, *event_shape)
        assert trajectory["fn"].batch_shape == (7,)
        assert trajectory["fn"].event_shape == (T, *event_shape)
        assert sites["data"]["type"] == "plate" and sites["data"]["value"].shape == (7,)
        assert set(sites) - {name} == {"data", f"{name}_trajectory"}
    model = sites_of(diffusion.model, x_0)
    assert model[name]["is_observed"] and model[name]["fn"].event_shape == event_shape
    assert name not in sites_of(diffusion.guide, x_0)


@every_shape
def test_model_without_data_draws_one_event(event_shape):
    sites = sites_of(make(event_shape, loc=1.0, scale=2.0).model)
    assert list(sites) == ["x_0_trajectory", "x_0"]
    assert sites["x_0"]["value"].shape == event_shape and not sites["x_0"]["is_observed"]
    assert sites["x_0_trajectory"]["value"].shape == (T, *event_shape)


@every_shape
def test_pair_by_step_has_a_site_for_every_level(event_shape):
    diffusion, x_0 = make(event_shape), numbers(3, *event_shape)
    levels = [f"x_0_trajectory_{t}" for t in range(T, 0, -1)]
    assert [*sites_of(diffusion.guide_by_step, x_0)] == ["data", *levels]
    assert [*sites_of(diffusion.model_by_step, x_0)] == ["data", *levels, "x_0"]
    assert [*sites_of(diffusion.model_by_step)] == [*levels, "x_0"]
    for site in sites_of(diffusion.model_by_step, x_0).values():
        if site["type"] == "sample":
            assert site["value"].shape == (3, *event_shape)
            assert site["fn"].event_shape == event_shape


def test_parameters_begin_with_the_models_name():
    diffusion = make(
        network=networks.RadialBasis((2,), 3, T, rngs=nnx.Rngs(0)),
        beta=schedules.learned(BETA),
        name="roll",
    )
    expected = {"roll_network$params", "roll_beta"}
    assert set(diffusion.params_template) == expected
    sites = sites_of(diffusion.model, numbers(3, 2).astype(np.float32))
    assert {name for name, site in sites.items() if site["type"] == "param"} == expected
    assert sites["roll_beta"]["value"].shape == diffusion.params_template["roll_beta"].shape


# densities by hand


@every_shape
def test_densities_are_the_products_over_steps(x64, event_shape):
    loc, scale = 0.7, 2.5
    diffusion = make(event_shape, loc=loc, scale=scale)
    x_0, x = loc + scale * numbers(4, *event_shape), numbers(T, 4, *event_shape, seed=1)
    values = {"x_0_trajectory": np.moveaxis(x, 0, 1)}
    by_hand = log_p(x_0, x, loc, scale).sum()
    np.testing.assert_allclose(density(diffusion.model, values, x_0), by_hand, rtol=1e-10)
    by_hand = log_q((x_0 - loc) / scale, x).sum()
    np.testing.assert_allclose(density(diffusion.guide, values, x_0), by_hand, rtol=1e-10)


@pytest.mark.parametrize("program", ["model", "guide", "model_by_step", "guide_by_step"])
def test_numpy_and_jax_arrays_are_the_same_data(program):
    statement, x_0 = getattr(make(), program), numbers(4, 2).astype(np.float32)
    ours, theirs = (sites_of(statement, array(x_0)) for array in (np.asarray, jnp.asarray))
    assert list(ours) == list(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name]["value"], theirs[name]["value"])


@every_shape
def test_pair_by_step_is_the_same_law_in_another_order(x64, event_shape):
    diffusion = make(event_shape, loc=0.7, scale=2.5)
    x_0, x = numbers(4, *event_shape), numbers(T, 4, *event_shape, seed=1)
    whole = {"x_0_trajectory": np.moveaxis(x, 0, 1)}
    levels = {f"x_0_trajectory_{t}": x[t - 1] for t in range(1, T + 1)}
    for program, by_step in (
        (diffusion.model, diffusion.model_by_step),
        (diffusion.guide, diffusion.guide_by_step),
    ):
        expected = density(program, whole, x_0)
        np.testing.assert_allclose(density(by_step, levels, x_0), expected, rtol=1e-10)


def test_units_of_each_entry_are_its_own(x64):
    loc, scale = np.array([3.0, -1.0]), np.array([0.1, 20.0])
    diffusion, x = make(loc=loc, scale=scale), numbers(T, 4, 2, seed=1)
    x_0 = loc + scale * numbers(4, 2)
    actual = density(diffusion.model, {"x_0_trajectory": np.moveaxis(x, 0, 1)}, x_0)
    np.testing.assert_allclose(actual, log_p(x_0, x, loc, scale).sum(), rtol=1e-10)


def test_missing_entries_are_noise_in_both_programs(x64):
    """Forward they start at π; in the model they run the stationary process and leave x_0 out."""
    x_0, x = numbers(4, 2), numbers(T, 4, 2, seed=1)
    mask = np.array([[True, False], [True, True], [False, False], [False, True]])
    diffusion, values = make(), {"x_0_trajectory": np.moveaxis(x, 0, 1)}
    noise = reference.log_normal(x[0], 0.0, 1.0) + sum(
        reference.log_normal(x[t - 1], *reference.transition(x[t - 2], BETA, t))
        for t in range(2, T + 1)
    )
    holes = np.where(mask, x_0, np.nan)
    guide = density(diffusion.guide, values, holes, mask=mask)
    np.testing.assert_allclose(guide, np.where(mask, log_q(x_0, x), noise).sum(), rtol=1e-10)
    model = density(diffusion.model, values, holes, mask=mask)
    np.testing.assert_allclose(model, np.where(mask, log_p(x_0, x), noise).sum(), rtol=1e-10)


def test_missing_entries_send_no_nan_into_the_gradient(x64, key):
    diffusion = make(beta=schedules.learned(BETA))
    holes = np.array([[np.nan, 0.3], [0.1, -0.4]])
    mask = np.isfinite(holes)
    for objective in (Trace_ELBO(), SampledTimeELBO()):

        def loss(beta, objective=objective):
            programs = diffusion.model, diffusion.guide
            return objective.loss(key, {"x_0_beta": beta}, *programs, holes, mask=mask)

        assert np.isfinite(jax.jit(jax.grad(loss))(jnp.asarray(BETA[1:]))).all()


# draws


@pytest.mark.parametrize("missing", [False, True])
def test_drawn_trajectories_follow_their_kernels(x64, key, missing):
    """Standardised steps are N(0, 1): Kolmogorov-Smirnov per step and axis, 2000 trajectories."""
    diffusion, n = make(), 2000
    mask = np.tile([True, False], (n, 1)) if missing else np.ones((n, 2), bool)
    x_0 = np.where(mask, numbers(n, 2), np.nan)
    reverse, seen = diffusion.bind({}), jnp.asarray(mask) if missing else None
    forward = ForwardTrajectory.of(reverse, x_0, seen)
    x = np.moveaxis(forward.sample(key), 1, 0)
    y = np.moveaxis(ReverseTrajectory(reverse, seen).sample(key, () if missing else (n,)), 1, 0)
    assert x.shape == y.shape == (T, n, 2)
    residuals = [y[-1], np.where(mask, (x[0] - np.sqrt(1 - BETA[0]) * x_0) / BETA[0] ** 0.5, x[0])]
    for t in range(2, T + 1):
        beta = BETA[t - 1]
        residuals.append((x[t - 1] - np.sqrt(1 - beta) * x[t - 2]) / np.sqrt(beta))
        z, v = outputs(y[t - 1], t)
        sd = 1 / np.sqrt(1 + np.exp(-v) * (1 - beta) / beta)
        z, sd = np.where(mask, z, 0.0), np.where(mask, sd, np.sqrt(beta))
        residuals.append((y[t - 2] - np.sqrt(1 - beta) * y[t - 1] - np.sqrt(beta) * z) / sd)
    for residual in residuals:
        for column in residual.T:
            assert stats.kstest(column, "norm").pvalue > 1e-3


def test_one_level_alone_has_the_law_it_has_in_the_trajectory(x64, key):
    """`sample_at` is q(x_t | x_0): Kolmogorov-Smirnov for each t, 4000 draws; π where missing."""
    x_0, mask = np.full((4000, 2), 1.7), np.tile([True, False], (4000, 1))
    forward = ForwardTrajectory.of(make().bind({}), x_0, jnp.asarray(mask))
    for t in range(1, T + 1):
        mean, variance = reference.marginal(1.7, BETA, t)
        x_t = forward.sample_at(jax.random.fold_in(key, t), jnp.full(4000, t))
        known, missing = np.asarray(x_t).T
        assert stats.kstest((known - mean) / np.sqrt(variance), "norm").pvalue > 1e-3
        assert stats.kstest(missing, "norm").pvalue > 1e-3


def test_x_1_alone_is_the_one_of_the_trajectory(key):
    reverse = ReverseTrajectory(make((2, 3)).bind({}))
    whole, x_1 = reverse.sample(key, (4,)), reverse.walk(key, (4,))[0]
    np.testing.assert_allclose(whole[:, 0], x_1, rtol=1e-6)


# inside larger programs


@pytest.mark.long
def test_two_models_train_together_in_one_program(key):
    def named(name):
        network = networks.RadialBasis((2,), 3, T, rngs=nnx.Rngs(0))
        return make(network=network, name=name, beta=schedules.learned(BETA))

    a, b = named("a"), named("b")

    def model(x, y):
        with numpyro.plate("n", 16):
            a.reverse(x), b.reverse(y)

    def guide(x, y):
        with numpyro.plate("n", 16):
            a.forward(x), b.forward(y)

    x, y = numbers(2, 16, 2).astype(np.float32)
    svi = SVI(model, guide, optax.adam(1e-2), SampledTimeELBO())
    state = svi.init(key, x, y)
    before = svi.get_params(state)
    after = svi.get_params(jax.jit(svi.update)(state, x, y)[0])
    assert set(after) == {"a_network$params", "a_beta", "b_network$params", "b_beta"}
    for name in after:
        moved = jax.tree.map(lambda u, v: np.abs(u - v).max() > 1e-4, before[name], after[name])
        assert any(jax.tree.leaves(moved)), name


@pytest.mark.parametrize("event_shape", [(), (2, 3)], ids=str)
def test_nested_plates_multiply_the_examples(x64, event_shape):
    diffusion = make(event_shape)
    x_0, x = numbers(3, 4, *event_shape), numbers(T, 3, 4, *event_shape, seed=1)

    def plates(statement):
        def program(x_0=None):
            with numpyro.plate("rows", 3, dim=-2), numpyro.plate("columns", 4, dim=-1):
                return statement(x_0)

        return program

    values = {"x_0_trajectory": np.moveaxis(x, 0, 2)}
    for statement, by_hand in (
        (diffusion.reverse, log_p(x_0, x)),
        (diffusion.forward, log_q(x_0, x)),
    ):
        actual = density(plates(statement), values, x_0)
        np.testing.assert_allclose(actual, by_hand.sum(), rtol=1e-10)
    drawn = handlers.seed(plates(diffusion.reverse), 0)()
    assert drawn.shape == (3, 4, *event_shape)
    assert len(np.unique(drawn)) == drawn.size


def bound_prior(**options):
    diffusion = make(network=networks.RadialBasis((2,), 3, T, rngs=nnx.Rngs(0)), **options)
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), diffusion.params_template
    )
    return diffusion, params


def test_prior_is_a_statement_without_parameters(x64):
    diffusion, params = bound_prior(name="roll", loc=1.0, scale=2.0)
    prior = diffusion.prior(params)

    def denoise(y=None):
        x = prior()
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    y = np.array([0.3, -0.2])
    sites = sites_of(denoise, y)
    assert list(sites) == ["roll_trajectory", "roll", "y"]
    assert {site["type"] for site in sites.values()} == {"sample"}
    values = {name: sites[name]["value"] for name in ("roll_trajectory", "roll")}
    by_model = density(handlers.substitute(diffusion.model, data=params), values)
    likelihood = reference.log_normal(y, np.asarray(values["roll"]), 0.25).sum()
    np.testing.assert_allclose(density(denoise, values, y), by_model + likelihood, rtol=1e-10)


def test_prior_in_a_plate_draws_for_every_row(x64):
    diffusion, params = bound_prior()
    prior = diffusion.prior(params)

    def program():
        with numpyro.plate("rows", 5):
            return prior()

    draws = Predictive(program, num_samples=3)(jax.random.key(0))
    assert draws["x_0"].shape == (3, 5, 2) and len(np.unique(draws["x_0"])) == 30
    assert draws["x_0_trajectory"].shape == (3, 5, T, 2)


# handlers


def test_handlers_act_on_the_sites(x64):
    diffusion, x_0, x = make(), numbers(4, 2), numbers(T, 4, 2, seed=1)
    model, values = diffusion.model, {"x_0_trajectory": np.moveaxis(x, 0, 1)}
    rows, by_hand = np.array([True, False, True, True]), log_p(x_0, x).sum(-1)
    latent = {**values, "x_0": x_0}  # x_0 of four rows, put where the program would draw it

    def generative():
        with numpyro.plate("data", 4):
            diffusion.reverse()

    cases = {
        "condition": (handlers.condition(model, data=values), {}, (x_0,), by_hand),
        "substitute": (handlers.substitute(model, data=values), {}, (x_0,), by_hand),
        "condition x_0": (handlers.condition(generative, data=latent), {}, (), by_hand),
        "mask": (handlers.mask(model, mask=rows), values, (x_0,), by_hand[rows]),
        "scale": (handlers.scale(model, scale=2.5), values, (x_0,), 2.5 * by_hand),
        "block": (
            handlers.block(handlers.condition(model, data=values), hide=["x_0_trajectory"]),
            {},
            (x_0,),
            reference.log_normal(x_0, *reference.transition(x[0], BETA, 1)),
        ),
    }
    for name, (program, given, args, expected) in cases.items():
        actual = density(program, given, *args)
        np.testing.assert_allclose(actual, expected.sum(), rtol=1e-10, err_msg=name)
    conditioned = sites_of(handlers.condition(model, data=values), x_0)
    assert conditioned["x_0_trajectory"]["is_observed"]
    assert not sites_of(handlers.substitute(model, data=values), x_0)["x_0_trajectory"][
        "is_observed"
    ]


def test_a_subsampling_plate_scales_the_density(x64):
    diffusion, x_0, x = make(), numbers(4, 2), numbers(T, 4, 2, seed=1)

    def model(batch):
        with numpyro.plate("data", 40, subsample_size=4):
            diffusion.reverse(batch)

    values = {"x_0_trajectory": np.moveaxis(x, 0, 1)}
    actual = density(handlers.seed(model, 0), values, x_0)
    np.testing.assert_allclose(actual, 10 * log_p(x_0, x).sum(), rtol=1e-10)


# pytrees


def distributions():
    """One of each, with a value: batch (3,), event (2,), half of the entries missing."""
    network = networks.RadialBasis((2,), 3, T, rngs=nnx.Rngs(0))
    diffusion = make(network=network, loc=0.5, scale=np.array([2.0, 0.3]))
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.2), diffusion.params_template)
    mask = jnp.tile(jnp.array([True, False]), (3, 1))
    reverse = diffusion.bind(params)
    x = jnp.asarray(numbers(3, T, 2))
    return {
        "forward": (ForwardTrajectory.of(reverse, x[:, -1], mask), x),
        "reverse": (ReverseTrajectory(reverse, mask), x),
        "last": (reverse.data(x[:, 0], mask), x[:, 1]),
    }


@pytest.mark.parametrize("name", ["forward", "reverse", "last"])
def test_distributions_survive_flattening_and_jit(x64, key, name):
    law, x = distributions()[name]
    leaves, structure = jax.tree.flatten(law)
    again = jax.tree.unflatten(structure, leaves)
    assert jax.tree.structure(again) == structure
    expected = law.log_prob(x)
    use = jax.jit(lambda law: (law, law.log_prob(x), law.sample(key)))
    returned, inside, draw = use(law)
    assert returned.batch_shape == law.batch_shape and returned.event_shape == law.event_shape
    np.testing.assert_allclose(inside, expected, rtol=1e-12)
    for other in (again, returned):
        np.testing.assert_array_equal(use(other)[1], inside)
        np.testing.assert_array_equal(use(other)[2], draw)


def test_sets_of_parameters_are_mapped_over(x64):
    diffusion, one = bound_prior()
    other = jax.tree.map(lambda leaf: 0.5 * leaf - 0.1, one)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, other)
    x = jnp.asarray(numbers(T, 2))
    trajectories = jax.vmap(lambda params: ReverseTrajectory(diffusion.bind(params)))(both)
    mapped = jax.jit(jax.vmap(lambda trajectory: trajectory.log_prob(x)))(trajectories)
    score = jax.jit(lambda params: ReverseTrajectory(diffusion.bind(params)).log_prob(x))
    alone = [score(params) for params in (one, other)]
    np.testing.assert_allclose(mapped, alone, rtol=1e-12)
    assert abs(alone[0] - alone[1]) > 0.1


# what is refused


def wide(x_t, t):
    return jnp.concatenate([x_t, x_t, x_t], -1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "draw"}, "name must be a string other than .* DataTrees .*; got 'draw'"),
        ({"name": "log_r"}, "name must be a string other than .* DataTrees .*; got 'log_r'"),
        ({"beta": [0.1, 1.2, 0.3]}, r"beta must lie in \(0, 1\); got 1.2 at t = 2"),
        ({"beta": [0.0, 0.2]}, r"beta must lie in \(0, 1\); got 0.0 at t = 1"),
        ({"beta": 0.1}, r"beta must have shape \(T,\)"),
        ({"loc": np.zeros(3)}, r"loc must be broadcastable to event_shape \(2,\); got .*3"),
        ({"loc": np.nan}, "loc must be finite; got nan"),
        ({"scale": np.ones((2, 2))}, "scale must be broadcastable"),
        ({"scale": 0.0}, "scale must be positive; got 0.0"),
        ({"scale": [1.0, -1.0]}, "scale must be positive"),
        ({"scale": np.inf}, "scale must be finite"),
        ({"network": wide}, r"network must return shape \(B, 4\) .*; got \(B, 6\)"),
        ({"network": lambda x_t, t: x_t}, r"network must return shape \(B, 4\) .*got \(B, 2\)"),
        ({"network": lambda x_t, t: x_t.sum()}, r"network must return shape \(B, 4\)"),
        (
            {"readout": readouts.Data(readouts.ForwardVariance())},
            r"network must return shape \(B, 2\) .*; got \(B, 4\)",
        ),
        (
            {"network": networks.RadialBasis((2,), 3, T + 1, rngs=nnx.Rngs(0))},
            f"network must be made for T = {T} steps; got one for T = {T + 1}",
        ),
        (
            {"network": networks.Perceptron((2,), 3, 1, 7, rngs=nnx.Rngs(0))},
            f"network must be made for T = {T} steps; got one for T = 7",
        ),
        (
            {"beta": schedules.harmonic(T), "readout": readouts.Epsilon()},
            "beta_T must be below 1 for readout Epsilon, .*; got 1. Use Data, Velocity",
        ),
        (
            {"beta": schedules.harmonic(T), "readout": readouts.Score()},
            "beta_T must be below 1 for readout Score, .*; got 1. Use Data, Velocity",
        ),
    ],
)
def test_what_makes_no_model_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"event_shape": 12}, "event_shape must be a tuple of ints such as (12,); got 12"),
        ({"event_shape": (2.0,)}, "event_shape must be a tuple of ints such as (12,); got (2.0,)"),
        ({"context_shape": 4}, "context_shape must be a tuple of ints such as (12,); got 4"),
    ],
)
def test_a_shape_that_is_none_is_refused_by_name(unchecked, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**options)


@pytest.mark.parametrize(
    "readout", [readouts.Data(), readouts.Velocity(), readouts.Perturbation()], ids=repr
)
def test_other_readouts_serve_a_schedule_that_forgets_everything(x64, readout):
    diffusion = make(beta=schedules.harmonic(T), readout=readout)
    assert np.isfinite(density(handlers.seed(diffusion.model, 0), {}, numbers(3, 2)))


GOOD = np.zeros((3, 2), np.float32)
CONTEXT = np.zeros((3, 4), np.float32)


def with_entry(value):
    bad = GOOD.copy()
    bad[1, 0] = value
    return bad


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize(
    ("x_0", "mask", "message"),
    [
        (np.zeros((3, 3)), None, r"x_0 must have shape \(\.\.\., 2\); got \(3, 3\)"),
        (np.zeros(()), None, r"x_0 must have shape .*; got \(\)"),
        (
            with_entry(np.nan),
            None,
            r"x_0 must be finite.*; got 1 values that are not; missing values want mask=, True",
        ),
        (with_entry(np.inf), None, r"x_0 must be finite.*; got 1 values"),
        (with_entry(-np.inf), GOOD == 0, r"x_0 must be finite where .*; got 1 values"),
        (
            GOOD.astype(np.int32),
            None,
            r"x_0 must be of a floating dtype; got int32: pass x_0.astype\(numpy.float64\)",
        ),
        (GOOD == 0, None, "x_0 must be of a floating dtype; got bool"),
        (GOOD, np.ones(2, bool), r"mask must have the shape of x_0, \(3, 2\); got \(2,\)"),
    ],
    ids=["shape", "scalar", "nan", "inf", "inf_seen", "integers", "bits", "mask"],
)
def test_data_that_are_none_are_refused_by_name(unchecked, x_0, mask, message, array):
    diffusion, mask = make(), None if mask is None else array(mask)
    for statement in (diffusion.model, diffusion.guide, diffusion.forward, diffusion.reverse):
        with pytest.raises(ValueError, match=message), handlers.seed(rng_seed=0):
            statement(array(x_0), mask=mask)


@pytest.mark.parametrize(
    ("context_shape", "context", "message"),
    [
        ((4,), None, r"context must be given .* got context None with context_shape \(4,\)"),
        (None, CONTEXT, r"context must be given .* got context \(3, 4\) with context_shape None"),
        ((4,), CONTEXT[:, :3], r"context must have shape \(\.\.\., 4\); got \(3, 3\)"),
        ((4,), CONTEXT[:2], "x_0 and context must have the same number of rows"),
    ],
    ids=["missing", "extra", "shape", "rows"],
)
def test_a_context_that_does_not_fit_is_refused_by_name(context_shape, context, message):
    def conditional(x_t, t, context=None):
        return network(x_t, t)

    diffusion = make(network=conditional, context_shape=context_shape)
    for program in (diffusion.model, diffusion.model_by_step):
        with pytest.raises(ValueError, match=message), handlers.seed(rng_seed=0):
            program(GOOD, context=context)


@pytest.mark.parametrize(
    ("shape", "text"), [((), "(N,)"), ((12,), "(N, 12)"), ((8, 8), "(N, 8, 8)")]
)
def test_a_shape_is_said_as_python_writes_it(shape, text):
    assert validation.shape_text("N", shape) == text


def test_data_that_would_broadcast_are_refused():
    """Rows of data need a plate: without one NumPyro scores one trajectory against them all."""
    diffusion = make()
    with handlers.seed(rng_seed=0):
        with pytest.raises(
            ValueError, match=r"batch shape of the plates .*\(\); got shape \(3, 2\)"
        ):
            diffusion.reverse(GOOD)
        with numpyro.plate("rows", 3):
            with pytest.raises(ValueError, match=r"\(3,\); got shape \(2,\).*numpyro.plate"):
                diffusion.reverse(GOOD[0])


def test_programs_over_examples_take_one_batch_axis():
    diffusion = make()
    with handlers.seed(rng_seed=0):
        for program in (diffusion.model, diffusion.guide, diffusion.model_by_step):
            with pytest.raises(ValueError, match=r"got \(1, 3, 2\). For more plates use forward"):
                program(GOOD[None])
        for guide in (diffusion.guide, diffusion.guide_by_step):
            with pytest.raises(ValueError, match="x_0 must be given to the guide"):
                guide()


@pytest.mark.parametrize("taker", ["prior", "bind", "check_params"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: {}, "missing: .*weights.*unknown: none"),
        (lambda p: {"x_0_network$params": {**p["x_0_network$params"], "z": 0.0}}, "unknown: .*'z'"),
        (lambda p: p | {"other": 0.0}, "missing: none, unknown: .*other"),
        (
            lambda p: {"x_0_network$params": {**p["x_0_network$params"], "biases": np.zeros(4)}},
            rf"biases'\] must have shape \({T}, 4\); got \(4,\)",
        ),
        (lambda p: [p], "params must be a dict by site name; got list"),
    ],
    ids=["missing", "extra_leaf", "extra_site", "shape", "list"],
)
def test_parameters_that_do_not_fit_are_refused_by_name(unchecked, taker, change, message):
    diffusion, params = bound_prior()
    with pytest.raises(ValueError, match=message):
        getattr(diffusion, taker)(change(params))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parameters_that_are_not_finite_are_refused_by_name(value):
    diffusion, params = bound_prior()
    site = params["x_0_network$params"]
    weights = np.array(site["weights"])
    weights[0, 0, 0] = value
    params = {"x_0_network$params": {**site, "weights": weights}}
    message = r"\['weights'\] must be finite; got [14] numbers that are not"
    for taker in (diffusion.bind, diffusion.prior, diffusion.check_params):
        with pytest.raises(ValueError, match=message):
            taker(params)
    with pytest.raises(ValueError, match=message):
        diagnostics.bound(jax.random.key(0), diffusion, params, GOOD)
    with pytest.raises(ValueError, match=message):
        sample.ancestral(jax.random.key(0), diffusion, params, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": np.array([1e-37, 0.5, 0.5])}, "beta must be at least .* float32; got 1e-37 at t"),
        ({"beta": np.array([0.5, 1e-45, 0.5])}, "beta must be at least .* float32; got 1e-45 at t"),
        ({"beta": schedules.learned(np.array([1e-38, 0.5]))}, "beta must .* float32; got 1e-38"),
        (
            {"beta": np.array([1e-20, 1e-20, 0.5])},
            r"beta_t \(1 - alpha_bar_s\).*got 1e-40 at t = 2",
        ),
        ({"scale": 1e-40}, "scale must lie between .* float32; got 1e-40"),
        ({"scale": 1e36}, "scale must lie between .* float32; got 1e\\+36"),
        ({"scale": np.array([1.0, 1e-38])}, "scale must lie between .* float32; got 1e-38"),
        ({"loc": -1e39}, "loc must be at most .* float32; got 1e\\+39"),
    ],
)
def test_what_float32_cannot_hold_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_rates_and_units_that_float64_holds_are_taken(x64):
    options = {"beta": np.array([1e-60, 0.5, 0.5]), "scale": 1e-60, "loc": 1e50}
    diffusion = standard_diffusion((2,), **options)
    assert float(diffusion.bind({}).steps.beta[0]) == 1e-60


@pytest.mark.parametrize("beta_1", [1e-33, 1e-20, 1e-9])
def test_small_rates_that_are_taken_give_the_bound(beta_1):
    beta = np.array([beta_1, 0.5, 0.9])
    x = jnp.array([[0.5, -1.0], [2.0, 0.1]])
    args = jax.random.key(0), standard_diffusion((2,), beta=beta), {}, x
    tree = diagnostics.bound(*args, num_draws=2000)["bound"]
    exact = dist.Normal(0, 1).log_prob(x).sum(1)  # K of the exact diffusion
    assert np.all(np.abs(tree["bound"] - exact) < 4 * tree["bound_se"] + 1e-3)


# the second moment


@pytest.mark.parametrize("moment", [0.2, 3.0])
@pytest.mark.parametrize("beta", [BETA, schedules.learned(BETA)], ids=["fixed", "learned"])
@pytest.mark.parametrize("program", ["model", "guide"])
def test_a_second_moment_far_from_one_warns_with_the_correction(program, beta, moment):
    x_0 = numbers(64, 2)
    x_0 *= np.sqrt(moment / np.mean(x_0**2))
    statement = handlers.seed(getattr(make(beta=beta), program), 0)
    with pytest.warns(UserWarning, match=f"second moment {moment:.3g} .* nats") as caught:
        statement(x_0.astype(np.float32))
    assert len(caught) == 1
    stated = float(re.search(r"off by (\S+) nats", str(caught[0].message))[1])
    np.testing.assert_allclose(stated, reference.correction_eq14(moment, BETA, 2), rtol=6e-3)


def test_a_second_moment_near_one_or_made_so_does_not_warn():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x_0 = numbers(64, 2)
        x_0 /= np.sqrt(np.mean(x_0**2))
        for scale in (0.8, 1.0, 1.3):
            handlers.seed(make().model, 0)((scale * x_0).astype(np.float32))
        handlers.seed(make(loc=100.0, scale=10.0).model, 0)((100 + 10 * x_0).astype(np.float32))
        seen = np.zeros((64, 2), bool)
        seen[:, 0] = True
        far = np.where(seen, x_0, 1e6).astype(np.float32)
        handlers.seed(make().model, 0)(far, mask=seen)
    assert not caught
