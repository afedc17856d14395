"""A trained diffusion as a statement: its sites, exact conditioning on entries, what it refuses.

Factors are compared with p(x_0 | x_1) by hand, N(√(1−β_1) x_1, β_1) on the scale of the diffusion
for a tied last step, divided by the scale for the user's units.
"""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer import MCMC, NUTS, Predictive
from numpyro.infer.util import log_density

import reference
from oracles import exact_gaussian
from probdiff import (
    BernoulliKernel,
    CategoricalKernel,
    Diffusion,
    GaussianKernel,
    infer,
    readouts,
    schedules,
    standard_diffusion,
)
from probdiff.trajectories import ReverseTrajectory

T = 4
BETA = schedules.linear(T, beta_1=0.05, beta_T=0.6)
LOC, SCALE = np.array([0.5, -1.0]), np.array([2.0, 0.3])
KNOWN = np.array([[0.1, 2.0], [-3.0, 0.7], [1.5, 1.1]])
MASK = np.array([[True, False], [True, True], [False, False]])
PAIR = standard_diffusion((2,), T=4).prior({})  # x_0 ~ N(0, I)


def network(x_t, t, context=None):
    shift = 0.1 * t[:, None] if context is None else 5 * context
    return jnp.concatenate([0.4 * jnp.sin(2 * x_t) + shift, 0.3 * x_t], -1)


def numbers(**options):
    options = {"event_shape": (2,), "loc": LOC, "scale": SCALE} | options
    return Diffusion(GaussianKernel(), BETA, network, **options)


def bits():
    return Diffusion(
        BernoulliKernel(0.3),
        schedules.harmonic(T),
        lambda x_t, t: 0.5 * x_t - 0.2,
        event_shape=(2,),
    )


def classes():
    def network(x_t, t):
        return jnp.concatenate([jnp.cos(x_t + 1.0 * k) for k in range(3)], -1)

    return Diffusion(CategoricalKernel(3), schedules.harmonic(T), network, event_shape=(2,))


def in_plate(prior, size=3, **arguments):
    def program():
        with numpyro.plate("rows", size):
            return prior(**arguments)

    return program


def sites_of(program, key=0):
    return handlers.trace(handlers.seed(program, key)).get_trace()


def log_last(known, x_1):
    """log p(x_0 = known | x_1), entry by entry, in the user's units."""
    mean, variance = reference.transition(np.asarray(x_1), BETA, 1)
    return reference.log_normal(known, LOC + SCALE * mean, SCALE**2 * variance)


# sites


def test_sites_without_known_are_two_draws(x64):
    sites = sites_of(numbers(name="roll").prior({}))
    assert {name: site["type"] for name, site in sites.items()} == {
        "roll_trajectory": "sample", "roll": "sample",
    }  # fmt: skip
    assert not any(site["is_observed"] for site in sites.values())


def test_sites_with_known_are_two_draws_and_a_factor(x64):
    prior = numbers(name="roll").prior({})
    sites = sites_of(in_plate(prior, known=KNOWN, mask=MASK))
    kinds = {n: (s["type"], s["is_observed"]) for n, s in sites.items() if n != "rows"}
    assert kinds == {
        "roll_trajectory": ("sample", False),
        "roll": ("sample", False),
        "roll_known": ("sample", True),
    }
    x_0 = np.asarray(sites["roll"]["value"])
    np.testing.assert_array_equal(x_0[MASK], KNOWN[MASK])
    free = np.asarray(sites_of(in_plate(prior))["roll"]["value"])
    np.testing.assert_array_equal(x_0[~MASK], free[~MASK])


def test_the_density_of_x_0_is_that_of_the_entries_that_are_not_known(x64):
    prior = numbers().prior({})
    sites = sites_of(in_plate(prior, known=KNOWN, mask=MASK))
    x_1, x_0 = sites["x_0_trajectory"]["value"][:, 0], np.random.default_rng(0).normal(size=(3, 2))
    expected = np.where(MASK, 0.0, log_last(x_0, x_1)).sum(-1)
    np.testing.assert_allclose(sites["x_0"]["fn"].log_prob(x_0), expected, rtol=1e-10)


def test_the_trajectory_carries_what_inference_needs(x64):
    diffusion = numbers()
    prior = diffusion.prior({}, variance=np.array([0.5, 2.0]))
    draw = sites_of(in_plate(prior, known=KNOWN, mask=MASK))["x_0_trajectory"]["infer"]["prior"]
    reverse = diffusion.bind({})
    assert draw.name == diffusion.name
    assert jax.tree.structure(draw.reverse) == jax.tree.structure(reverse)
    np.testing.assert_array_equal(draw.variance, [0.5, 2.0])
    np.testing.assert_array_equal(draw.known, KNOWN)
    np.testing.assert_array_equal(draw.mask, MASK)
    x = np.random.default_rng(0).normal(size=(T, 2))
    np.testing.assert_allclose(
        ReverseTrajectory(draw.reverse).log_prob(x), ReverseTrajectory(reverse).log_prob(x)
    )
    draw = sites_of(diffusion.prior({}))["x_0_trajectory"]["infer"]["prior"]
    assert draw.known is None and draw.mask is None
    np.testing.assert_array_equal(draw.variance, 1.0)


# known entries


def test_factor_is_the_log_density_of_known_entries_in_the_users_units(x64):
    sites = sites_of(in_plate(numbers().prior({}), known=KNOWN, mask=MASK))
    x_1 = sites["x_0_trajectory"]["value"][:, 0]
    factor = sites["x_0_known"]
    actual = factor["fn"].log_prob(factor["value"])
    expected = np.where(MASK, log_last(KNOWN, x_1), 0.0).sum(-1)
    assert actual.shape == (3,) and expected[2] == 0
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_conditioning_on_all_entries_is_observing_them(x64):
    """p(trajectory) p(known | x_1) is what `reverse` gives an observed x_0."""
    diffusion = numbers()
    prior = diffusion.prior({})
    trajectory = np.random.default_rng(0).normal(size=(3, T, 2))

    def observed():
        with numpyro.plate("rows", 3):
            diffusion.reverse(KNOWN)

    values = {"x_0_trajectory": trajectory}
    expected, _ = log_density(observed, (), {}, values)
    program = in_plate(prior, known=KNOWN, mask=np.ones((3, 2), bool))
    actual, _ = log_density(program, (), {}, values | {"x_0": KNOWN})
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_conditioning_on_nothing_is_no_conditioning(x64):
    prior = numbers().prior({})
    sites = sites_of(in_plate(prior, known=KNOWN, mask=np.zeros((3, 2), bool)))
    assert np.all(sites["x_0_known"]["fn"].log_prob(sites["x_0_known"]["value"]) == 0)
    free = sites_of(in_plate(prior))["x_0"]["value"]
    np.testing.assert_array_equal(sites["x_0"]["value"], free)


@pytest.mark.parametrize(
    ("make", "place"),
    [(numbers, np.asarray), (numbers, jnp.asarray), (numbers, list), (bits, list), (classes, list)],
    ids=lambda f: f.__name__,
)
def test_known_entries_come_back_bit_for_bit(make, place):
    """0.1 and 1 + 2⁻²³ would not survive a change of units."""
    known = np.array([[0.1, 1 + 2**-23], [1e-30, 1 / 3], [3e7, 0]], np.float32)
    if make is not numbers:
        known = np.array([[0, 1], [1, 0], [1, 1]])
    program = in_plate(make().prior({}), known=place(known), mask=place(MASK))
    value = sites_of(program)["x_0"]["value"]
    alone = sites_of(in_plate(make().prior({})))["x_0"]["value"]
    assert value.dtype == alone.dtype
    np.testing.assert_array_equal(np.asarray(value)[MASK], known[MASK])


def test_a_known_number_is_conditioned_on_without_axes(x64):
    prior = Diffusion(
        GaussianKernel(), BETA, lambda x, t: 0 * jnp.stack([x, x], -1), event_shape=()
    )
    sites = sites_of(lambda: prior.prior({})(known=0.3, mask=True))
    x_1 = sites["x_0_trajectory"]["value"][0]
    expected = reference.log_normal(0.3, *reference.transition(np.asarray(x_1), BETA, 1))
    factor = sites["x_0_known"]
    np.testing.assert_allclose(factor["fn"].log_prob(factor["value"]), expected, rtol=1e-10)
    assert sites["x_0"]["value"] == 0.3


@pytest.mark.parametrize("make", [bits, classes], ids=lambda f: f.__name__)
def test_masses_of_all_symbols_sum_to_one(x64, make):
    diffusion = make()
    prior, mask = diffusion.prior({}), np.array([True, False])
    trajectory = sites_of(prior)["x_0_trajectory"]["value"]
    total = 0.0
    for state in range(diffusion.kernel.num_data_states):
        program = handlers.substitute(
            lambda state=state: prior(known=np.array([state, 0]), mask=mask),
            data={"x_0_trajectory": trajectory},
        )
        factor = sites_of(program)["x_0_known"]
        total += np.exp(factor["fn"].log_prob(factor["value"]))
    assert total == pytest.approx(1, abs=1e-10)


def test_what_is_not_known_is_not_read(x64):
    """Values outside the mask may be NaN; nothing of them enters, forwards or backwards."""
    prior, holes = numbers().prior({}), np.where(MASK, KNOWN, np.nan)
    trajectory = jnp.asarray(np.random.default_rng(0).normal(size=(3, T, 2)))
    x_0 = jnp.asarray(KNOWN)

    def density(trajectory, known):
        values = {"x_0_trajectory": trajectory, "x_0": x_0}
        return log_density(in_plate(prior, known=known, mask=MASK), (), {}, values)[0]

    slopes = (jax.jit(jax.grad(density, argnums=i)) for i in (0, 1))
    for of in (density, *slopes):
        with_holes = of(trajectory, jnp.asarray(holes))
        np.testing.assert_array_equal(with_holes, of(trajectory, jnp.asarray(KNOWN)))
    slope = of(trajectory, jnp.asarray(holes))
    assert np.all(slope[~MASK] == 0) and np.all(slope[MASK] != 0)


def test_known_may_be_traced(x64):
    prior = numbers().prior({})

    def factor(known, mask):
        site = sites_of(in_plate(prior, known=known, mask=mask))["x_0_known"]
        return site["fn"].log_prob(site["value"])

    np.testing.assert_allclose(jax.jit(factor)(KNOWN, MASK), factor(KNOWN, MASK), rtol=1e-10)


A, Y, SIGMA = 1.2, 2.5, 0.3  # the known entry, and a noisy look at the sum of both


def sum_of_two(y=None):
    """x_0 ~ N(0, I), of which entry 0 is known: entry 1 given y is N((y − a)/(1 + σ²), …)."""
    x = PAIR(known=np.array([A, 0.0], np.float32), mask=np.array([True, False]))
    return numpyro.sample("y", dist.Normal(x.sum(), SIGMA), obs=y)


def draws_of(sampler):
    """Draws of `sum_of_two` given Y, by site name."""
    if sampler == "SMC":
        smc = infer.SMC(sum_of_two, num_particles=400, num_runs=4)
        smc.run(jax.random.key(0), y=Y)
        return smc.get_samples()
    program = sum_of_two if sampler == "NUTS" else infer.noncentered(sum_of_two)
    mcmc = MCMC(NUTS(program), num_warmup=300, num_samples=1500, progress_bar=False)
    mcmc.run(jax.random.key(0), y=Y)
    return mcmc.get_samples()


@pytest.mark.parametrize("sampler", ["SMC", pytest.param("NUTS", marks=pytest.mark.long), "noise"])
def test_posterior_draws_with_known_entries_go_into_predictive(sampler):
    """Of 1,500 draws or more, those of NUTS worth at least 400."""
    draws = draws_of(sampler)
    sites = {"x_0": draws["x_0"]} if sampler == "noise" else draws
    predicted = Predictive(sum_of_two, sites)(jax.random.key(1))["y"]
    mean, variance = (Y - A) / (1 + SIGMA**2), SIGMA**2 / (1 + SIGMA**2)
    assert np.all(draws["x_0"][:, 0] == np.float32(A))
    assert abs(draws["x_0"][:, 1].mean() - mean) < 4 * np.sqrt(variance / 400)
    assert abs(draws["x_0"][:, 1].var() - variance) < 4 * variance * np.sqrt(2 / 400)
    assert abs(predicted.mean() - A - mean) < 4 * np.sqrt((variance + SIGMA**2) / 400)
    assert abs(predicted.var() / (variance + SIGMA**2) - 1) < 4 * np.sqrt(2 / 400)


def test_what_nuts_walks_over_where_entries_are_known_has_a_proper_law(x64):
    """Coordinates of known entries are N(0, 1), of free ones those of x_0: nothing is flat."""
    prior = numbers().prior({})
    law = sites_of(in_plate(prior, known=KNOWN, mask=MASK))["x_0"]["fn"]
    to_x_0 = biject_to(law.support)
    u = np.random.default_rng(0).normal(size=(3, 2))
    value = to_x_0(u)
    np.testing.assert_array_equal(value, np.where(MASK, KNOWN, u))
    volume = to_x_0.log_abs_det_jacobian(u, value)
    expected = np.where(MASK, reference.log_normal(u, 0.0, 1.0), 0.0).sum(-1)
    np.testing.assert_allclose(volume, expected, rtol=1e-10)
    np.testing.assert_allclose(to_x_0(to_x_0.inv(value)), value)
    assert np.all(law.support(value)) and not np.any(law.support(value + 1)[MASK.any(-1)])


@pytest.mark.long
def test_a_known_entry_may_be_a_latent_of_the_program():
    """x_0[0] = a ~ N(0, 1) is what the prior says of it anyway: a given x_0[0] + x_0[1] = y."""

    def program():
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        x = PAIR(known=jnp.stack([a, 0.0]), mask=np.array([True, False]))
        numpyro.sample("y", dist.Normal(x.sum(), SIGMA), obs=Y)

    mcmc = MCMC(NUTS(program), num_warmup=300, num_samples=1000, progress_bar=False)
    mcmc.run(jax.random.key(0))
    draws = mcmc.get_samples()
    np.testing.assert_array_equal(draws["x_0"][:, 0], draws["a"])
    # a has the density N(a; 0, 1) twice, once of its own and once that of the factor
    precision = np.linalg.inv(np.diag([2.0, 1.0]) + np.ones((2, 2)) / SIGMA**2)
    mean = precision @ np.full(2, Y / SIGMA**2)
    sd = np.sqrt(np.diag(precision))
    assert np.all(np.abs(draws["x_0"].mean(0) - mean) < 4 * sd / np.sqrt(150))


def test_a_prior_predictive_with_known_entries_is_refused():
    """It would draw the unconditional law, and put the known entries in."""
    for program in (sum_of_two, infer.noncentered(sum_of_two)):
        with pytest.raises(ValueError, match=r"'x_0' has known entries.*Predictive.*infer.SMC"):
            Predictive(program, num_samples=3)(jax.random.key(0))
    noise = {"x_0_noise": jnp.zeros((3, 5, 2))}
    assert Predictive(program, noise)(jax.random.key(0))["x_0"].shape == (3, 2)
    sites_of(sum_of_two)  # to look at is no draw
    plain = Predictive(lambda: PAIR(), num_samples=3)(jax.random.key(0))
    assert plain["x_0"].shape == (3, 2)


# context


def test_context_reaches_the_network_row_by_row(x64):
    diffusion = numbers(context_shape=(2,))
    context = np.array([[3.0, -3.0], [-3.0, 3.0], [0.0, 0.0]])
    sites = sites_of(in_plate(diffusion.prior({}), context=context, known=KNOWN, mask=MASK))
    x = sites["x_0_trajectory"]["value"]
    law = sites["x_0_trajectory"]["fn"]
    by_rows = [
        ReverseTrajectory(diffusion.bind({}, context=c)).log_prob(x_i)
        for c, x_i in zip(context, x, strict=True)
    ]
    np.testing.assert_allclose(law.log_prob(x), by_rows, rtol=1e-10)
    draw = sites["x_0_trajectory"]["infer"]["prior"]
    np.testing.assert_array_equal(draw.reverse.context, context)
    np.testing.assert_array_equal(np.sign(x[:2, 0]), np.sign(context[:2]))


@pytest.mark.long
def test_context_may_be_a_latent_of_the_program(x64):
    prior = numbers(context_shape=(2,)).prior({})

    def program():
        c = numpyro.sample("c", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        prior(context=c)

    trajectory = np.random.default_rng(0).normal(size=(T, 2))

    def density(c):
        values = {"c": c, "x_0_trajectory": trajectory, "x_0": np.zeros(2)}
        return log_density(program, (), {}, values)[0]

    slope = jax.grad(density)(jnp.ones(2))
    step = 1e-5
    for i in range(2):
        moved = step * jnp.eye(2)[i]
        by_hand = float(density(1.0 + moved) - density(1.0 - moved)) / (2 * step)
        assert float(slope[i]) == pytest.approx(by_hand, rel=1e-6) and abs(by_hand + 1) > 0.1


# what is refused


def with_nan(place):
    known = KNOWN.copy()
    known[place] = np.nan
    return known


@pytest.mark.parametrize(
    ("known", "mask", "message"),
    [
        (KNOWN, None, "given together; got only known"),
        (None, MASK, "given together; got only mask"),
        (KNOWN[:, 0], MASK[:, 0], "known must have shape (..., 2); got (3,)"),
        (KNOWN, MASK[0], "mask must have the shape of known, (3, 2); got (2,)"),
        (KNOWN, MASK.astype(int), "mask must be boolean"),
        (
            KNOWN.astype(int),
            MASK,
            "known must be of a floating dtype; got int64: pass known.astype(numpy.float64)",
        ),
        (with_nan((0, 0)), MASK, "known must be finite"),
        (KNOWN[0], MASK[0], "known must have the batch shape of the plates around it, (3,)"),
        (KNOWN[:2], MASK[:2], "known must have the batch shape of the plates around it, (3,)"),
    ],
)
def test_known_values_that_do_not_fit_are_refused(x64, known, mask, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sites_of(in_plate(numbers().prior({}), known=known, mask=mask))


def test_known_values_without_their_plate_are_refused(x64):
    prior = numbers().prior({})
    with pytest.raises(ValueError, match=re.escape("around it, (); got shape (3, 2)")):
        sites_of(lambda: prior(known=KNOWN, mask=MASK))


@pytest.mark.parametrize("make", [bits, classes], ids=lambda f: f.__name__)
def test_known_symbols_that_are_none_are_refused(make):
    prior, mask = make().prior({}), np.array([True, False])
    with pytest.raises(ValueError, match="known must hold only 0"):
        prior(known=np.array([3, 0]), mask=mask)
    sites_of(lambda: prior(known=np.array([0, 3]), mask=mask))  # outside the mask: not read


@pytest.mark.parametrize(
    ("context_shape", "context", "message"),
    [
        ((2,), None, "context must be given exactly where context_shape is"),
        (None, np.zeros(2), "context must be given exactly where context_shape is"),
        ((2,), np.zeros(3), "context must have shape (..., 2); got (3,)"),
    ],
)
def test_context_that_does_not_fit_is_refused(context_shape, context, message):
    prior = numbers(context_shape=context_shape).prior({})
    with pytest.raises(ValueError, match=re.escape(message)):
        sites_of(lambda: prior(context=context))


@pytest.mark.parametrize("variance", [0.0, -1.0, np.nan, np.inf, [1.0, 0.0], np.ones(3)])
def test_a_variance_that_is_none_is_refused(variance):
    with pytest.raises(ValueError, match="variance must be"):
        numbers().prior({}, variance=variance)


def test_a_variance_by_columns_is_no_covariance():
    prior = standard_diffusion((4, 3), T=3).prior({}, variance=np.full((1, 3), 0.5))
    assert prior.covariance is None and prior.variance.shape == (1, 3)


def test_a_covariance_in_the_units_of_the_user_is_noticed():
    diffusion = exact_gaussian(np.zeros(3), 1.0, T=3, loc=0.0, scale=20.0)
    covariance = np.eye(3) + 0.2
    diffusion.prior({}, variance=covariance)
    with pytest.warns(UserWarning, match="looks like a covariance in the user's units"):
        diffusion.prior({}, variance=400 * covariance)


SIX = 0.8 ** np.abs(np.arange(6)[:, None] - np.arange(6))
ROWS = np.random.default_rng(0).multivariate_normal(np.zeros(6), SIX, 60)
SIGNS = (-1.0) ** np.add.outer(np.arange(6), np.arange(6))


@pytest.fixture(scope="module")
def correlated():
    """x_0 ~ N(0, Σ), 30 steps, by the x̂_0 that is exact for it."""
    beta = schedules.log_snr_linear(30, beta_1=1e-3, alpha_bar_T=1e-3)
    alpha_bar = jnp.asarray(np.cumprod(1 - beta), jnp.float32)
    variances, axes = (jnp.asarray(a, jnp.float32) for a in np.linalg.eigh(SIX))

    def network(x_t, t):
        a = alpha_bar[t - 1][:, None]
        gain = jnp.sqrt(a) * variances / (a * variances + 1 - a)
        return ((x_t @ axes) * gain) @ axes.T

    readout = readouts.Data(readouts.BridgeVariance())
    return Diffusion(GaussianKernel(), beta, network, event_shape=(6,), readout=readout)


@pytest.mark.parametrize(
    ("covariance", "ratio"),
    [
        (0.01 * SIX, "times as much as it says"), (100 * SIX, r"wider half 0\.0"),
        (SIX * SIGNS, "times as much as it says"), (1e-3 * np.eye(6), "vary .* times as much"),
    ],
    ids=["narrow", "wide", "signs", "white"],
)  # fmt: skip
def test_a_covariance_that_is_plainly_not_the_datas_is_noticed(correlated, covariance, ratio):
    with pytest.warns(UserWarning, match=f"does not fit the prior.*{ratio}"):
        correlated.prior({}, variance=covariance)


@pytest.mark.parametrize(
    "covariance",
    [
        SIX, np.cov(ROWS.T), np.cov(ROWS[:20].T), 0.5 * SIX + 0.5 * np.eye(6), np.eye(6),
        0.5 * SIX, 2 * SIX, SIX - 0.1 * np.eye(6),
    ],
    ids=["exact", "sample", "few_rows", "shrunk", "white", "half", "twice", "sharper"],
)  # fmt: skip
def test_nothing_is_said_of_a_covariance_that_is_about_the_datas(correlated, covariance):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        prior = correlated.prior({}, variance=covariance)
    assert not said and prior.covariance is not None


def test_a_prior_is_shown_on_a_line():
    shown = [repr(numbers().prior({}, variance=v)) for v in (None, np.ones(2), 0.5 * np.eye(2))]
    start = "Prior(event_shape=(2,), name='x_0', "
    ends = ["variance=1)", "variance of each entry)", "covariance)"]
    assert shown == [start + end for end in ends]
