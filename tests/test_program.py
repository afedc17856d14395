"""A program is read anew at every run, and what it computes is compiled once.

The oracle: two measurements of one x_0 ~ N(0, 1), y ~ N(0, σ² I + 1 1ᵀ).
"""

import dataclasses
import gc
import math
import random
import time
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from scipy import stats

from probdiff import (
    BernoulliKernel,
    Diffusion,
    GaussianKernel,
    diagnostics,
    infer,
    sample,
    schedules,
    standard_diffusion,
)
from probdiff.infer.twist import Tilt

pytestmark = pytest.mark.filterwarnings("ignore::probdiff.infer.InferenceWarning")

SIGMA = 0.5
ONE, OTHER = np.array([1.0, 0.4], np.float32), np.array([-3.0, -2.5], np.float32)


@pytest.fixture(scope="module")
def prior():
    """x_0 ~ N(0, 1), exactly."""
    return standard_diffusion(T=6).prior({})


def compiled(prior):
    """Compilations of what the prior's diffusion keeps."""
    return sum(jitted._cache_size() for jitted in prior.programs._kept.values())


def over(prior, data):
    """A program that closes over its data."""

    def program():
        x = numpyro.deterministic("x", prior())
        numpyro.sample("y", dist.Normal(x, SIGMA).expand([2]).to_event(1), obs=data)

    return program


def run(program, *args):
    """A new sampler that has run; options and key are always the same."""
    smc = infer.SMC(program, num_particles=64, num_runs=2)
    smc.run(jax.random.key(0), *args)
    return smc


def check(smc, y):
    """Evidence and mean are those of y, within 0.1 nats and four standard errors of 128 draws."""
    law = stats.multivariate_normal(np.zeros(2), SIGMA**2 * np.eye(2) + 1)
    assert smc.log_evidence == pytest.approx(law.logpdf(y), abs=0.1)
    precision = 1 + 2 / SIGMA**2
    mean = np.sum(y) / SIGMA**2 / precision
    draws = smc.get_samples()["x"]
    assert abs(draws.mean() - mean) < 4 / np.sqrt(100 * precision)


def test_another_sampler_of_the_same_program_compiles_nothing(prior):
    program = over(prior, ONE)
    first = run(program)
    check(first, ONE)
    before = compiled(prior)
    second = run(program)
    np.testing.assert_array_equal(second.get_samples()["x"], first.get_samples()["x"])
    assert compiled(prior) == before > 0


@pytest.mark.parametrize("kind", [np.array, jnp.array])
def test_the_same_code_over_other_data_compiles_nothing_and_has_their_numbers(prior, kind):
    check(run(over(prior, kind(ONE))), ONE)
    before = compiled(prior)
    for y in (OTHER, ONE):
        check(run(over(prior, kind(y))), y)
    assert compiled(prior) == before


def test_floats_among_the_arguments_are_data(prior):
    def program(y, sigma, count=2):
        x = numpyro.deterministic("x", prior())
        numpyro.sample("y", dist.Normal(x, sigma).expand([count]).to_event(1), obs=y)

    check(run(program, ONE, SIGMA), ONE)
    before = compiled(prior)
    wide = run(program, ONE, 10 * SIGMA)
    assert compiled(prior) == before
    expected = stats.multivariate_normal(np.zeros(2), 25 * np.eye(2) + 1).logpdf(ONE)
    assert wide.log_evidence == pytest.approx(expected, abs=0.02)


def test_data_that_change_in_place_are_seen(prior):
    data = ONE.copy()
    smc = run(over(prior, data))
    check(smc, ONE)
    before = compiled(prior)
    data[:] = OTHER
    smc.run(jax.random.key(0))
    check(smc, OTHER)
    assert compiled(prior) == before


def test_data_that_are_rebound_are_seen(prior):
    data = ONE

    def program():
        over(prior, data)()

    smc = run(program)
    check(smc, ONE)
    before = compiled(prior)
    data = OTHER
    smc.run(jax.random.key(0))
    check(smc, OTHER)
    assert compiled(prior) == before


def test_numbers_that_are_rebound_are_seen(prior):
    """A number is part of the code, and another one compiled for."""
    y = 1.0

    def program():
        numpyro.sample("y", dist.Normal(prior(), SIGMA), obs=y)

    smc = run(program)
    for y in (1.0, -4.0):
        smc.run(jax.random.key(0))
        exact = stats.norm.logpdf(y, 0, np.hypot(1, SIGMA))
        assert smc.log_evidence == pytest.approx(exact, abs=0.1)


@pytest.mark.long
def test_other_arguments_of_the_same_shape_compile_nothing(prior):
    def program(y):
        over(prior, y)()

    smc = run(program, ONE)
    check(smc, ONE)
    before = compiled(prior)
    smc.run(jax.random.key(0), OTHER)
    check(smc, OTHER)
    assert compiled(prior) == before


class Box:
    """An argument that changes and has no hash."""

    __hash__ = None

    def __init__(self, y):
        self.y = y

    def __eq__(self, other):
        return isinstance(other, Box)


def test_an_argument_that_changes_is_seen(prior):
    def program(box):
        over(prior, box.y)()

    box = Box(ONE)
    smc = run(program, box)
    check(smc, ONE)
    box.y = OTHER
    smc.run(jax.random.key(0), box)
    check(smc, OTHER)


@dataclasses.dataclass(frozen=True)
class Flag:
    """Equal, and of one hash, for 1, True and 1.0."""

    value: Any


@pytest.mark.long
@pytest.mark.parametrize("wrap", [Flag, lambda value: value], ids=["in an object", "bare"])
def test_arguments_that_compare_equal_are_not_taken_for_one_another(prior, wrap):
    def program(flag):
        prior()
        kind = type(flag.value if isinstance(flag, Flag) else flag)  # a float's is an array's
        numpyro.factor("kind", {int: 0.0, bool: 1.0}.get(kind, 2.0))

    smc = infer.SMC(program, num_particles=2, num_runs=1)
    for i, value in enumerate((1, True, 1.0)):
        smc.run(jax.random.key(0), wrap(value))
        assert smc.log_evidence == pytest.approx(i, abs=1e-5)


@pytest.mark.long
def test_zero_and_minus_zero_are_two_numbers(prior):
    zero = 0.0

    def program():
        numpyro.factor("sign", jnp.copysign(1 + 0 * prior(), zero))

    smc = infer.SMC(program, num_particles=2, num_runs=1)
    for zero, sign in ((0.0, 1), (-0.0, -1), (0.0, 1)):  # noqa: B007, the program reads it
        smc.run(jax.random.key(0))
        assert smc.log_evidence == pytest.approx(sign, abs=1e-5)


class Push(infer.Twist):
    """Moves every step by as much; compared by identity."""

    def __init__(self, by):
        self.by = by

    def __call__(self, view):
        nothing = jnp.zeros_like(view.x_t)
        return Tilt(nothing[..., 0], nothing + self.by, nothing, nothing[None][:0])


@dataclasses.dataclass
class EqualPush(infer.Twist):
    """The same, without a hash and all equal."""

    by: Any = dataclasses.field(compare=False)

    __call__ = Push.__call__


@pytest.mark.long
@pytest.mark.parametrize("make", [Push, EqualPush])
def test_a_twist_of_the_users_own_is_what_it_is_when_the_sampler_is_made(prior, make):
    """Every step moves by as much, which the mean of the draws shows."""
    means, twist = [], make(0.0)
    for by in (0.0, 1.0):
        twist.by = by
        guided = infer.Guided(lambda: prior(), twist=twist, num_samples=50, check=False)
        guided.run(jax.random.key(0))
        means.append(guided.get_samples()["x_0"].mean())
    assert means[1] > means[0] + 0.5


@pytest.mark.long
def test_calibration_compiles_once_for_all_simulations(prior):
    def program(y=None):
        numpyro.sample("y", dist.Normal(prior(), SIGMA).expand([2]).to_event(1), obs=y)

    smc = infer.SMC(program, num_particles=8, num_runs=1)
    counts = []
    for n in (1, 3):
        infer.calibrate(jax.random.key(0), program, smc, num_simulations=n)
        counts.append(compiled(prior))
    assert counts[0] == counts[1]


@pytest.mark.long
def test_a_diffusion_goes_with_all_that_was_compiled_for_it(key):
    def network(x_t, t):
        return jnp.zeros((len(x_t), 4))

    beta = schedules.cosine(4)
    diffusion = Diffusion(GaussianKernel(), beta, network, event_shape=(2,))
    prior = diffusion.prior({})

    def program():
        numpyro.sample("y", dist.Normal(prior(), SIGMA).to_event(1), obs=ONE)

    smc = run(program)
    smc.to_datatree()
    diagnostics.bound(key, diffusion, {}, np.stack([ONE, OTHER]), num_draws=2)
    sample.ancestral(key, diffusion, {}, 3)
    gone = [weakref.ref(it) for it in (diffusion, prior, program, smc)]
    del diffusion, prior, program, smc
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


# handlers around the program


def noisy(prior, sigma=SIGMA):
    """One measurement y = 1 of x_0 ~ N(0, 1)."""

    def program():
        numpyro.sample("y", dist.Normal(prior(), sigma), obs=1.0)

    return program


def masked(prior):
    def program():
        with handlers.mask(mask=False):
            x = prior()
        numpyro.sample("y", dist.Normal(x, SIGMA), obs=1.0)

    return program


def subsampled(prior):
    def program():
        x = prior()
        with numpyro.plate("rows", 10, subsample_size=5):
            numpyro.sample("y", dist.Normal(x, SIGMA), obs=1.0)

    return program


def in_scan(prior):
    def program():
        x, _ = scan(lambda x, _: (numpyro.sample("z", dist.Normal(x, 1.0)),) * 2, prior(), None, 3)
        numpyro.sample("y", dist.Normal(x, SIGMA), obs=1.0)

    return program


def halved(prior):
    """Of two known entries the factor of one hides."""
    known = handlers.block(lambda: prior(known=1.0, mask=True), hide=["x_0_known"])
    return lambda: known()


def with_key(prior):
    def program():
        noise = jax.random.normal(numpyro.prng_key())
        numpyro.sample("y", dist.Normal(prior() + noise, SIGMA), obs=1.0)

    return program


TRAJECTORY = {"x_0_trajectory": jnp.ones(6)}
REFUSED = {
    "x_0 conditioned": (
        lambda p: handlers.condition(noisy(p), {"x_0": 2.0}),
        r"'x_0' must be left to its prior.*use prior\(known=values, mask=mask\)",
    ),
    "x_0 substituted": (
        lambda p: handlers.substitute(noisy(p), {"x_0": 2.0}),
        r"'x_0' must be left to its prior.*use prior\(known=values, mask=mask\)",
    ),
    "trajectory conditioned": (
        lambda p: handlers.condition(noisy(p), TRAJECTORY), "'x_0_trajectory' must be left to"
    ),
    "trajectory substituted": (
        lambda p: handlers.substitute(noisy(p), TRAJECTORY), "'x_0_trajectory' must be left to"
    ),
    "trajectory replaced": (
        lambda p: handlers.do(noisy(p), TRAJECTORY), "'x_0_trajectory' must not be replaced"
    ),
    "x_0 hidden": (
        lambda p: handlers.block(handlers.seed(noisy(p), 0), hide=["x_0"]),
        r"sites \['x_0'\] must be seen",
    ),
    "trajectory hidden": (
        lambda p: handlers.block(handlers.seed(noisy(p), 0), hide=["x_0_trajectory"]),
        r"got no call that no handler",
    ),
    "factor hidden": (halved, r"sites \['x_0', 'x_0_known'\] must be seen"),
    "prior masked": (masked, "must keep its density at site 'x_0_trajectory'"),
    "all masked": (lambda p: handlers.mask(noisy(p), mask=False), "must keep its density"),
    "all scaled": (lambda p: handlers.scale(noisy(p), 2.0), "must keep its density"),
    "subsampled": (subsampled, "plate 'rows' must not be subsampled.*got 5 of 10"),
    "latent in a scan": (in_scan, "latent site 'z' must have a value"),
    "key": (with_key, "must not draw by numpyro.prng_key"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_ignored_is_refused(prior, case):
    make, words = REFUSED[case]
    for sampler in (infer.SMC(make(prior)), infer.Guided(make(prior), check=False)):
        with pytest.raises(ValueError, match=words) as raised:
            sampler.run(jax.random.key(0))
    assert "raised in the program" not in str(getattr(raised.value, "__notes__", ""))


AROUND = {
    "mask": lambda: handlers.mask(mask=False),
    "scale": lambda: handlers.scale(scale=2.0),
    "condition": lambda: handlers.condition(data={"x_0": 1.0}),
    "plate": lambda: numpyro.plate("rows", 3),
}


@pytest.mark.parametrize("case", AROUND)
def test_a_handler_around_the_run_is_refused(prior, case):
    with pytest.raises(ValueError, match=f"{case} must be put around the program"), AROUND[case]():
        infer.SMC(noisy(prior)).run(jax.random.key(0))


def evidence(program):
    """log Z by two runs of 64 particles."""
    return run(program).log_evidence


LOG_Z = stats.norm.logpdf(1.0, 0, np.hypot(1, SIGMA))


def with_sigma(prior, size=None):
    """The scale of the noise is a latent site outside the plate."""

    def program():
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        if size is None:
            return noisy(prior, sigma)()
        with numpyro.plate("rows", size):
            return noisy(prior, sigma)()

    return program


@pytest.mark.parametrize("size", [None, 2])
def test_a_latent_with_a_substituted_value_is_a_constant(prior, size):
    program = with_sigma(prior, size)
    with pytest.raises(ValueError, match=r"latent site 'sigma' must have a value.*substitute"):
        infer.SMC(program).run(jax.random.key(0))
    program = handlers.substitute(program, {"sigma": SIGMA})
    np.testing.assert_allclose(evidence(program), np.full(size or (), LOG_Z), atol=0.1)


def test_a_conditioned_latent_counts_as_the_observation_that_it_is(prior):
    program = handlers.condition(with_sigma(prior), {"sigma": SIGMA})
    log_p = stats.halfnorm.logpdf(SIGMA)
    assert evidence(program) == pytest.approx(LOG_Z + log_p, abs=0.1)
    program = handlers.condition(with_sigma(prior, 2), {"sigma": SIGMA})
    with pytest.raises(ValueError, match=r"'sigma' must lie inside the plates.*substitute"):
        evidence(program)


def test_a_bound_parameter_is_a_constant(prior):
    def program():
        noisy(prior, numpyro.param("sigma", 3.0))()

    assert evidence(handlers.substitute(program, {"sigma": SIGMA})) == pytest.approx(LOG_Z, abs=0.1)


def test_an_intervention_on_x_0_leaves_its_draws_to_the_prior(prior):
    smc = infer.SMC(
        handlers.do(noisy(prior), {"x_0": jnp.array(2.0)}), num_particles=500, num_runs=2
    )
    smc.run(jax.random.key(0))
    assert smc.log_evidence == pytest.approx(stats.norm.logpdf(1.0, 2.0, SIGMA), abs=1e-4)
    assert stats.kstest(smc.get_samples()["x_0"], "norm").pvalue > 1e-3


@pytest.mark.long
def test_a_scope_gives_its_prefix_to_x_0(prior):
    smc = run(handlers.scope(noisy(prior), prefix="a", divider="."))
    assert smc.log_evidence == pytest.approx(LOG_Z, abs=0.1)
    assert set(smc.get_samples()) == {"a.x_0"}
    assert list(smc.to_datatree()["posterior"].data_vars) == ["a.x_0"]


# systems

ROWS = 40  # systems


def in_rows(prior, mean, *, y=0.0, size=ROWS):
    """One measurement for each system, of what `mean` makes of all of them."""

    def program():
        with numpyro.plate("rows", size):
            numpyro.sample("y", dist.Normal(mean(prior()), SIGMA), obs=y)

    return program


COUPLED = {
    "a later entry": (lambda x: x.at[37].add(3 * x[11]), 0.0),
    "a later entry, weakly": (lambda x: x.at[37].add(0.01 * x[11]), 0.0),
    "neighbours": (lambda x: x + 0.1 * jnp.roll(x, 1), 0.0),
    "where x is large": (lambda x: x.at[7].add(jnp.where(x[3] > 2.5, 3.0, 0.0)), 0.0),
    "the order": (lambda x: jnp.sort(x), 0.0),
}


@pytest.mark.parametrize("case", COUPLED)
def test_entries_of_plates_that_depend_on_each_other_are_refused(prior, case):
    mean, y = COUPLED[case]
    with pytest.raises(ValueError, match=r"must keep the entries of the plates .* apart"):
        run(in_rows(prior, mean, y=y))


@pytest.mark.long
def test_entries_that_depend_on_each_other_where_the_posterior_is_are_refused(prior):
    """Beyond 14 standard deviations of the prior, where no point was tried before the run."""
    with pytest.raises(ValueError, match=r"must keep the entries of the plates .* apart"):
        run(in_rows(prior, lambda x: x + jnp.where(x > 14, 0.1 * x.sum(), 0.0), y=30.0, size=3))


def test_symbols_of_plates_that_depend_on_each_other_are_refused():
    bits = standard_diffusion((2,), kernel=BernoulliKernel(0.5)).prior({})

    def program():
        with numpyro.plate("rows", 6):
            x = bits().sum(-1)
            numpyro.sample("y", dist.Normal(x + 1.0 * x[4] * x[5], SIGMA), obs=0.0)

    with pytest.raises(ValueError, match=r"must keep the entries of the plates .* apart"):
        run(program)


@pytest.mark.long
@pytest.mark.parametrize(
    "mean",
    [
        lambda x: x - x.mean() + x.mean(),
        lambda x: jnp.linalg.inv(jnp.eye(ROWS) + 1) @ (x + x.sum()),
    ],
    ids=["mean taken and given back", "solved for"],
)
def test_entries_that_are_apart_but_for_rounding_are_not_refused(prior, mean):
    z = evidence(in_rows(prior, mean))
    np.testing.assert_allclose(
        z, np.full(ROWS, stats.norm.logpdf(0, 0, np.hypot(1, SIGMA))), atol=0.1
    )


# names


def test_an_observed_site_counts_whatever_its_name(prior):
    def program():
        numpyro.sample("x_0_known", dist.Normal(prior(), SIGMA), obs=1.0)

    assert evidence(program) == pytest.approx(LOG_Z, abs=0.1)


def test_a_site_that_the_tree_would_lose_is_refused_there(prior):
    def program():
        numpyro.deterministic("draw", 2 * prior())

    smc = run(program)
    draws = smc.get_samples()
    np.testing.assert_array_equal(draws["draw"], 2 * draws["x_0"])
    with pytest.raises(ValueError, match="'draw' must not name a dim and a variable of group post"):
        smc.to_datatree()


# draws inside the program


def adding(prior, draw, site=numpyro.deterministic):
    """Something is drawn inside, and its value used."""

    def program():
        numpyro.sample("y", dist.Normal(prior() + site("noise", draw()), SIGMA), obs=1.0)

    return program


GENERATOR, STREAM = np.random.default_rng(0), iter(range(100))
DRAWS = {
    "NumPy's generator": np.random.normal,
    "a generator closed over": GENERATOR.normal,
    "an array": lambda: jnp.asarray(GENERATOR.normal(size=3)).sum(),
    "Python's": random.random,
    "an iterator": lambda: float(next(STREAM)),
    "a key made of the time": lambda: jax.random.normal(jax.random.key(time.time_ns() % 2**31)),
}


@pytest.mark.parametrize("case", DRAWS)
def test_draws_of_the_programs_own_are_refused(prior, case):
    with pytest.raises(ValueError, match="must say the same each time it is read"):
        run(adding(prior, DRAWS[case]))


def test_draws_that_only_a_deterministic_site_or_a_known_value_shows_are_refused(prior):
    def shown():
        prior()
        numpyro.deterministic("noise", jnp.asarray(np.random.normal()))

    def known():
        prior(known=np.float32(np.random.normal()), mask=True)

    for program in (shown, known):
        with pytest.raises(ValueError, match="must say the same each time it is read"):
            run(program)


@pytest.mark.long
def test_what_a_program_keeps_and_calls_is_no_draw(prior):
    """A value made at the first call, a function new at each, a diffusion made inside."""
    made = []

    def kept():
        made.append(None)
        return 0.0 * (len(made) == 1) + 0.5 * (len(made) > 1)

    def called():
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(lambda: np.float32(0.5), shape, vmap_method="broadcast_all")

    expected = stats.norm.logpdf(0.5, 0, np.hypot(1, SIGMA))
    own = lambda: standard_diffusion(T=6).prior({})()  # noqa: E731
    for of, value in ((prior, kept), (prior, called), (own, lambda: 0.5)):
        assert evidence(adding(of, value)) == pytest.approx(expected, abs=0.1)


def test_a_float_may_decide_what_the_program_does(prior):
    def program(y, sigma, powers):
        x = numpyro.deterministic("x", prior())
        law = dist.Normal(x, math.sqrt(sigma)) if sigma > 0.1 else dist.Normal(x, np.sum(powers))
        numpyro.sample("y", law.expand([2]).to_event(1), obs=np.asarray(y, np.float32))

    for sigma, powers in ((SIGMA**2, [0.0]), (0.01, [SIGMA - 0.1, 0.1])):
        check(run(program, list(map(float, ONE)), sigma, powers), ONE)


def test_a_coin_that_decides_is_refused_however_it_falls(prior):
    def program():
        sigma = 1.0 if np.random.random() < 0.01 else 3.0
        numpyro.sample("y", dist.Normal(prior(), sigma), obs=2.0)

    with pytest.raises(ValueError, match="must say the same each time"):
        run(program)


def test_an_intervention_where_entries_are_known_is_refused():
    prior = standard_diffusion((2,), T=3).prior({})

    def program():
        with numpyro.handlers.do(data={"x_0": jnp.ones(2)}):
            x = prior(known=jnp.zeros(2), mask=jnp.array([True, False]))
        numpyro.sample("y", dist.Normal(x.sum(), 1.0), obs=2.0)

    with pytest.raises(ValueError, match=r"'x_0' must not be replaced by handlers\.do"):
        run(program)


IN_PYTHON = {
    "np.exp(x)": lambda x: np.exp(x),
    "np.asarray(x)": lambda x: np.asarray(x),
    "math.exp(x)": lambda x: math.exp(x),
    "float(x)": lambda x: float(x),
    "x if x > 0 else -x": lambda x: x if x > 0 else -x,
    "x.repeat(int(x))": lambda x: x.repeat(int(x)),
    "x[x > 0].sum()": lambda x: x[x > 0].sum(),
}


@pytest.mark.parametrize("line", IN_PYTHON)
def test_python_and_numpy_on_x_0_are_refused_with_the_line_and_what_to_write(prior, line):
    def program():
        numpyro.sample("y", dist.Normal(IN_PYTHON[line](prior()), 1.0), obs=1.0)

    with pytest.raises(ValueError, match=r"program must use x_0.*by JAX alone") as error:
        run(program)
    assert f'"{line}": lambda x: {line}' in str(error.value)
    assert "jnp.where(x > 0, a, b)" in str(error.value)


def test_a_prior_that_is_called_twice_is_refused_with_what_to_write(prior):
    def program():
        numpyro.sample("y", dist.Normal(prior() + prior(), 1.0), obs=1.0)

    with pytest.raises(ValueError, match=r"exactly once; got 'x_0_trajectory' twice.*in a plate"):
        run(program)
