"""Laws over generated shapes, rates and values, by Hypothesis, which shrinks what breaks one.

A few examples of each law by default and hundreds among the long tests, always the same ones: the
profiles `few` and `many`. Laws are compiled once for a kernel and a shape.
"""

import contextlib
import dataclasses
import functools
import math
import warnings

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from hypothesis import strategies as st
from numpyro.distributions import kl_divergence
from scipy import stats

from probdiff import (
    AbsorbingKernel,
    BernoulliKernel,
    CategoricalKernel,
    GaussianKernel,
    diagnostics,
    infer,
    readouts,
    schedules,
    standard_diffusion,
)
from probdiff.infer.program import read
from probdiff.infer.twist import Problem, View
from probdiff.kernels import DiscreteKernel

COMMON = {"deadline": None, "derandomize": True, "database": None}
SHAPES = {
    "few": st.just((2, 3)),
    "many": st.lists(st.integers(1, 3), max_size=3).map(tuple),
}
hypothesis.settings.register_profile("few", **COMMON)
hypothesis.settings.register_profile(
    "many", suppress_health_check=list(hypothesis.HealthCheck), **COMMON
)


def law(make, x64=True, few=10, many=200):
    """A test of a law: `make(shapes)` is the strategy of its arguments, as a tuple."""

    def wrap(body):
        def test(profile):
            settings = hypothesis.settings.get_profile(profile)
            count = {"few": few, "many": many}[profile]
            settings = hypothesis.settings(settings, max_examples=count)

            @settings
            @hypothesis.given(make(SHAPES[profile]))
            def holds(case):
                body(*case)

            with jax.enable_x64(x64):
                holds()

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        long = pytest.param("many", marks=pytest.mark.long)
        return pytest.mark.parametrize("profile", ["few", long])(test)

    return wrap


# From 1e-6 to 1 − 1e-6, as likely near 0 as near 1.
RATE = st.floats(-6, 6).map(lambda z: 1 / (1 + 10.0**-z))
VALUES = st.floats(-4, 4)


@st.composite
def rates(draw, least=2, most=6):
    """β_1..β_T; the last may be 1."""
    beta = draw(st.lists(RATE, min_size=least, max_size=most))
    return np.array([*beta[:-1], draw(st.sampled_from([beta[-1], 1.0]))])


def times(shape, least, most):
    """A time for each row, the first axis."""
    one = st.integers(least, most)
    return hnp.arrays(np.int32, shape[:1], elements=one)


# Kernels.


class Letters(DiscreteKernel):
    """Redraws by frequencies of which some are small."""

    num_states = num_data_states = 3

    @property
    def log_pi(self):
        return jnp.log(jnp.array([0.9, 0.0999, 1e-4]))


SYMBOLS = [
    BernoulliKernel(1e-3), CategoricalKernel(4), AbsorbingKernel(2), Letters()
]  # fmt: skip
KERNELS = [GaussianKernel(), *SYMBOLS]


@st.composite
def walks(draw, shapes, kernels=KERNELS):
    """Kernel, table, a time t ≥ 2, and x_0, x_s, x_t."""
    kernel, shape, beta = draw(st.sampled_from(kernels)), draw(shapes), draw(rates(4, 4))
    t = draw(times(shape, 2, len(beta)))

    def state(count):
        elements = st.integers(0, count - 1) if kernel.is_discrete else VALUES
        dtype = np.int32 if kernel.is_discrete else np.float64
        return draw(hnp.arrays(dtype, shape, elements=elements))

    count = kernel.num_states if kernel.is_discrete else 0
    x_0 = state(kernel.num_data_states if kernel.is_discrete else 0)
    return kernel, schedules.steps(beta), t, x_0, state(count), state(count)


def step_of(table, t, x):
    return table.at(t, jnp.ndim(x) - jnp.ndim(t))


@functools.partial(jax.jit, static_argnums=0)
def joints(kernel, table, t, x_0, x_s, x_t):
    """Both ways to log q(x_s, x_t | x_0), each in two terms."""
    before, step = step_of(table, t - 1, x_0), step_of(table, t, x_0)
    there = kernel.marginal(x_0, before).log_prob(x_s), kernel.transition(x_s, step).log_prob(x_t)
    back = kernel.marginal(x_0, step).log_prob(x_t), kernel.bridge(x_t, x_0, step).log_prob(x_s)
    return there, back


@law(walks)
@pytest.mark.long
def test_bridge_and_marginal_give_the_joint(*walk):
    """q(x_s | x_0) q(x_t | x_s) = q(x_t | x_0) q(x_s | x_t, x_0), to rounding of its terms."""
    there, back = (np.asarray(terms) for terms in joints(*walk))
    left, right = there.sum(0), back.sum(0)
    assert (np.isneginf(left) == np.isneginf(right)).all()
    is_there = np.isfinite(left)
    scale = 1 + np.abs(np.where(is_there, np.stack([*there, *back]), 0.0)).sum(0)
    gap = np.where(is_there, left, 0.0) - np.where(is_there, right, 0.0)
    assert (np.abs(gap) <= 1e-9 * scale).all()


@functools.partial(jax.jit, static_argnums=0)
def balance(kernel, table, t, x, y):
    pi, step = kernel.stationary(x.shape), step_of(table, t, x)
    there = pi.log_prob(x) + kernel.transition(x, step).log_prob(y)
    return there, pi.log_prob(y) + kernel.transition(y, step).log_prob(x)


@law(walks)
def test_transitions_are_in_detailed_balance(kernel, table, t, x_0, x_s, x_t):
    """π(x) T(y | x) = π(y) T(x | y)."""
    there, back = map(np.asarray, balance(kernel, table, t, x_s, x_t))
    # Gaussian terms reach 1e7, where the rate is 1e-6: rounding of that
    np.testing.assert_allclose(there, back, rtol=1e-9, atol=1e-6)


@functools.partial(jax.jit, static_argnums=0)
def matrices(kernel, table, t, s):
    """π, T of step t, and the transitions from the data to s, from s to t, from the data to t."""
    states = jnp.arange(kernel.num_states)

    def matrix(law):
        return jnp.exp(jax.vmap(law.log_prob, out_axes=1)(jnp.broadcast_to(
            states[:, None], (kernel.num_states,) * 2
        )))  # fmt: skip

    longer = table.between(t, s)
    laws = (
        kernel.transition(states, table.at(t, 0)), kernel.marginal(states, table.at(s, 0)),
        kernel.transition(states, longer), kernel.marginal(states, table.at(t, 0)),
    )  # fmt: skip
    return jnp.exp(jnp.asarray(kernel.log_pi)), *map(matrix, laws)


@st.composite
def jumps(draw, shapes, kernels=SYMBOLS):
    """Kernel, table and two of its levels s < t."""
    beta = draw(rates(5, 5))
    s, t = sorted(draw(st.lists(st.integers(1, 5), min_size=2, max_size=2, unique=True)))
    return draw(st.sampled_from(kernels)), schedules.steps(beta), np.int32(t), np.int32(s)


@law(jumps)
def test_symbols_keep_their_stationary_law_and_jumps_compose(kernel, table, t, s):
    """Rows sum to 1; π T = π; q(x_t | x_0) is q(x_s | x_0) and one step from s to t."""
    pi, step, first, second, both = map(np.asarray, matrices(kernel, table, t, s))
    for matrix in (step, first, second, both):
        np.testing.assert_allclose(matrix.sum(1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(pi @ step, pi, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(first @ second, both, rtol=0, atol=1e-13)


@jax.jit
def moments_of_jump(table, t, s, x_0):
    kernel = GaussianKernel()
    first, both = kernel.marginal(x_0, table.at(s, 0)), kernel.marginal(x_0, table.at(t, 0))
    second = kernel.transition(first.mean, table.between(t, s))
    slope = jnp.sqrt(1 - table.between(t, s).beta)
    return second.mean, slope**2 * first.variance + second.variance, both.mean, both.variance


@law(lambda shapes: jumps(shapes, kernels=[GaussianKernel()]))
def test_numbers_keep_their_stationary_law_and_jumps_compose(kernel, table, t, s):
    mean, variance, expected, width = map(float, moments_of_jump(table, t, s, 1.7))
    # 1 − β has the digits of a number near 1: of a mean of 1e-9 some are lost
    assert mean == pytest.approx(expected, rel=1e-9, abs=1e-10)
    assert variance == pytest.approx(width, rel=1e-9)
    step = table.at(int(t), 0)
    law = kernel.transition(jnp.array(1.0), step)
    assert float(law.mean) ** 2 + float(law.variance) == pytest.approx(1.0, rel=1e-12)


@functools.partial(jax.jit, static_argnums=0)
def mixed_bridges(kernel, table, t, x_t, log_p):
    step = step_of(table, t, x_t)
    law = kernel.bridge_given(log_p, x_t, step)
    each = [
        kernel.bridge(x_t, jnp.full_like(x_t, j), step).probs
        for j in range(kernel.num_data_states)
    ]  # fmt: skip
    return law.probs, jnp.stack(each, -2)


@st.composite
def believed(draw, shapes, kernels=SYMBOLS):
    """A walk, and a law of x_0 that rules nothing out."""
    kernel, table, t, _, _, x_t = draw(walks(shapes, kernels))
    states = kernel.num_states
    z = draw(hnp.arrays(np.float64, (*x_t.shape, states), elements=VALUES))
    z[..., kernel.num_data_states :] = -np.inf
    return kernel, table, t, x_t, z - np.log(np.exp(z).sum(-1, keepdims=True))


@law(believed)
def test_the_bridge_of_a_law_is_the_mixture_of_bridges(kernel, table, t, x_t, log_p):
    """Where x_t can come from every x_0; else what it cannot come from is left out."""
    found, each = map(np.asarray, mixed_bridges(kernel, table, t, x_t, log_p))
    p = np.exp(log_p)[..., : kernel.num_data_states]
    if isinstance(kernel, AbsorbingKernel):  # a class comes from itself alone
        same = np.arange(kernel.num_data_states) == x_t[..., None]
        is_absorbed = (x_t == kernel.num_classes)[..., None]
        p = np.where(is_absorbed, p, same)
    expected = (p[..., None] * each).sum(-2)
    np.testing.assert_allclose(found.sum(-1), 1.0, rtol=1e-9)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-12)


@functools.partial(jax.jit, static_argnums=0)
def divergences(kernel, table, t, x_0, x_t, key):
    step = step_of(table, t, x_0)
    q, p = kernel.bridge(x_t, x_0, step), kernel.transition(x_t, step)
    draw = q.sample(key)
    return kl_divergence(q, p), kl_divergence(q, q), q.log_prob(draw), draw


@law(walks)
def test_divergences_are_not_negative_and_draws_possible(kernel, table, t, x_0, x_s, x_t):
    """KL(q ‖ p) ≥ 0 = KL(q ‖ q), q the bridge; a draw of q has a probability and is a state."""
    found = divergences(kernel, table, t, x_0, x_t, jax.random.key(3))
    kl, itself, log_q, draw = map(np.asarray, found)
    assert (kl >= -1e-12).all() and np.abs(itself).max(initial=0) < 1e-9
    assert np.isfinite(log_q).all()
    assert not kernel.is_discrete or ((draw >= 0) & (draw < kernel.num_states)).all()


# Schedules.


@law(lambda shapes: st.tuples(rates()), few=40, many=500)
def test_a_table_counts_what_is_left_and_what_is_noise(beta):
    """ᾱ + (1 − ᾱ) = 1, both to the last digits, and ᾱ_s is the ᾱ_t before."""
    table = schedules.steps(beta)
    left = np.cumprod((1 - beta).astype(np.longdouble))
    logs = np.cumsum(np.log1p(-beta[:-1].astype(np.longdouble)))
    np.testing.assert_allclose(table.alpha_bar_t, left, rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(table.noise_t[:-1], -np.expm1(logs), rtol=1e-12)
    np.testing.assert_allclose(table.alpha_bar_t + table.noise_t, 1.0, rtol=1e-14)
    np.testing.assert_array_equal(table.alpha_bar_s[1:], table.alpha_bar_t[:-1])
    np.testing.assert_array_equal(table.noise_s[1:], table.noise_t[:-1])
    assert table.alpha_bar_s[0] == 1 and table.noise_s[0] == 0


@law(lambda shapes: st.tuples(rates(5, 5), st.booleans()), x64=False, few=40, many=500)
def test_float32_keeps_what_is_left_and_what_is_noise(beta, is_traced):
    """To five digits, whether rates are NumPy's or traced, from the rates that float32 has."""
    if is_traced:
        beta = np.minimum(beta, 1 - 1e-6).astype(np.float32)
    table = schedules.steps(jnp.asarray(beta) if is_traced else beta)
    with np.errstate(divide="ignore"):
        logs = np.cumsum(np.log1p(-beta.astype(np.float64)))
    assert table.noise_t.dtype == table.alpha_bar_t.dtype == np.float32
    np.testing.assert_allclose(table.noise_t, -np.expm1(logs), rtol=1e-5)
    np.testing.assert_allclose(table.alpha_bar_t, np.exp(logs), rtol=3e-5, atol=1e-37)


between = jax.jit(lambda table, t, s: table.between(t, s))


@st.composite
def three_levels(draw, shapes):
    levels = draw(st.lists(st.integers(0, 5), min_size=3, max_size=3, unique=True))
    return draw(rates(5, 5)), *sorted(levels)


@law(three_levels, few=60, many=500)
def test_longer_steps_compose(beta, r, s, t):
    """(1 − β from r to s)(1 − β from s to t) = 1 − β from r to t; over one level it is the step."""
    table = schedules.steps(beta)
    low, high, both = (between(table, *map(np.int32, ends)) for ends in ((s, r), (t, s), (t, r)))
    for step in (low, high, both):
        assert 0 < step.beta <= 1
        assert step.alpha_bar_t <= step.alpha_bar_s
    left = (1 - low.beta) * (1 - high.beta)
    assert float(left) == pytest.approx(1 - float(both.beta), abs=1e-14)
    one = between(table, np.int32(t), np.int32(t - 1))
    for found, expected in zip(one, table.at(int(t), 0), strict=True):
        assert float(found) == pytest.approx(float(expected), rel=1e-9, abs=1e-14)


@st.composite
def fewer(draw, shapes):
    T = draw(st.integers(2, 60))
    return T, draw(st.integers(2, T))


@law(fewer, few=2, many=60)
def test_fewer_levels_have_the_first_the_last_and_their_rates(T, n):
    full = schedules.steps(schedules.harmonic(T))
    levels, few = schedules.respaced(full, n)
    assert levels[0] == 1 and levels[-1] == T and (np.diff(levels) > 0).all()
    assert len(levels) == n == few.T
    np.testing.assert_allclose(few.alpha_bar_t, np.asarray(full.alpha_bar_t)[levels - 1])
    np.testing.assert_allclose(np.cumprod(1 - np.asarray(few.beta)), 1 - levels / T, atol=1e-12)


MADE = st.one_of(
    st.tuples(st.just("log_snr_linear"), st.integers(2, 300), st.floats(-12, -0.01),
              st.floats(-30, -0.01)),
    st.tuples(st.just("linear"), st.integers(2, 300), st.floats(-12, -0.01), st.floats(-12, 0)),
    st.tuples(st.just("cosine"), st.integers(2, 300), st.floats(-6, 3), st.floats(-6, 0)),
)  # fmt: skip


@law(lambda shapes: MADE.map(lambda made: (made,)), few=60, many=1000)
def test_a_schedule_has_its_ends_or_is_refused(made):
    name, T, first, last = made
    first, last = 10.0**first, 10.0**last
    names = {
        "log_snr_linear": ("beta_1", "alpha_bar_T"), "linear": ("beta_1", "beta_T"),
        "cosine": ("offset", "beta_max"),
    }[name]  # fmt: skip
    make = functools.partial(
        getattr(schedules, name), T, **dict(zip(names, (first, last), strict=True))
    )
    if name == "log_snr_linear" and last >= 1 - first:
        with pytest.raises(ValueError, match="alpha_bar_T must be below"):
            make()
        return
    beta = make()
    assert beta.shape == (T,) and ((beta > 0) & (beta <= 1)).all()
    if name == "cosine":
        assert beta.max() <= last and (np.diff(beta) >= -1e-12).all()
        return
    assert beta[0] == pytest.approx(first, rel=1e-9)
    end = np.prod((1 - beta).astype(np.longdouble)) if name == "log_snr_linear" else beta[-1]
    assert float(end) == pytest.approx(last, rel=1e-6)


# Readouts.

DENOISERS = [
    readouts.Perturbation, readouts.Epsilon, readouts.Data, readouts.Velocity, readouts.Score
]  # fmt: skip
VARIANCES = [readouts.LearnedVariance(), readouts.ForwardVariance(), readouts.BridgeVariance()]


@jax.jit
def said(table, t, x_t, x_0_hat, v):
    """Reverse steps of all readouts whose first output says x̂_0, and the x̂_0 they read."""
    step, kernel = step_of(table, t, x_t), GaussianKernel()
    a, n = jnp.sqrt(step.alpha_bar_t), step.noise_t
    noise = (x_t - a * x_0_hat) / jnp.sqrt(n)
    mean = kernel.bridge(x_t, x_0_hat, step).mean
    z = (
        (mean - jnp.sqrt(1 - step.beta) * x_t) / jnp.sqrt(step.beta), noise, x_0_hat,
        a * noise - jnp.sqrt(n) * x_0_hat, -noise / jnp.sqrt(n),
    )  # fmt: skip
    found = []
    for readout, first in zip(DENOISERS, z, strict=True):
        for variance in VARIANCES:
            reader, outputs = readout(variance), (first, v)[: 1 + variance.num_outputs]
            law = reader(kernel, outputs, x_t, step)
            longer = reader.longer_step(kernel, outputs, x_t, step, step)
            back = reader.x_0_hat(kernel, outputs, x_t, step)
            parts = law.mean, law.variance, back, longer.mean, longer.variance
            found.append(tuple(jnp.broadcast_to(part, x_t.shape) for part in parts))
    return mean, kernel.bridge(x_t, x_0_hat, step).variance + 0 * x_t, step.beta, found


@st.composite
def outputs(draw, shapes):
    shape, beta = draw(shapes), np.clip(draw(rates(4, 4)), 1e-3, 0.99)
    x_t, x_0_hat, v = (draw(hnp.arrays(np.float64, shape, elements=VALUES)) for _ in range(3))
    return schedules.steps(beta), draw(times(shape, 2, len(beta))), x_t, x_0_hat, v


@law(outputs)
def test_all_readouts_of_one_denoised_point_are_one_reverse_step(*case):
    """Mean, variance between the bridge's and β, x̂_0; a longer step over one level is the step."""
    mean, least, most, found = jax.tree.map(np.asarray, said(*case))
    for i, (of_law, variance, back, longer, longer_variance) in enumerate(found):
        np.testing.assert_allclose(of_law, mean, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(back, case[3], rtol=1e-6, atol=1e-6)  # x̂_0 less √ᾱ_t x_t
        np.testing.assert_allclose(longer, mean, rtol=1e-8, atol=1e-8)
        kind = VARIANCES[i % 3]
        if isinstance(kind, readouts.LearnedVariance):
            assert ((variance > 0) & (variance < 1)).all()
            continue
        np.testing.assert_allclose(longer_variance, variance, rtol=1e-12)
        assert (variance >= least * (1 - 1e-12)).all()
        top = np.broadcast_to(np.reshape(most, np.shape(most)), variance.shape)
        assert (variance <= top * (1 + 1e-12)).all()


@functools.partial(jax.jit, static_argnums=0)
def read_symbols(kernel, table, t, x_t, log_p):
    step, readout = step_of(table, t, x_t), readouts.DataLogits()
    log_p = log_p[..., : kernel.num_data_states]
    is_bit = isinstance(kernel, BernoulliKernel)
    z = (log_p[..., 1] - log_p[..., 0],) if is_bit else tuple(jnp.moveaxis(log_p, -1, 0))
    padding = [(0, 0)] * x_t.ndim + [(0, kernel.num_states - kernel.num_data_states)]
    log_p = jnp.pad(log_p, padding, constant_values=-jnp.inf)
    laws = readout(kernel, z, x_t, step), kernel.bridge_given(log_p, x_t, step)
    longer = readout.longer_step(kernel, z, x_t, step, step)
    return *(law.probs for law in (*laws, longer)), readout.x_0_given(kernel, z, x_t, step).probs


@law(believed)
def test_symbols_are_read_as_the_bridge_of_what_is_said(kernel, table, t, x_t, log_p):
    law, bridge, longer, given = map(np.asarray, read_symbols(kernel, table, t, x_t, log_p))
    np.testing.assert_allclose(law, bridge, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(longer, bridge, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(given, np.exp(log_p), rtol=1e-9, atol=1e-12)


@jax.jit
def perturbed_bits(table, t, x_t, z):
    kernel, readout, step = BernoulliKernel(0.3), readouts.Logits(), step_of(table, t, x_t)
    law = readout(kernel, (z,), x_t, step)
    still = readout(kernel, (0 * z,), x_t, step).logit - kernel.transition(x_t, step).logit
    given = readout.x_0_given(kernel, (z,), x_t, step)
    again = kernel.bridge_given(given.log_probs, x_t, step)
    return law.mean, still, given.mean, again.mean


@law(believed)
def test_bits_say_the_law_of_x_0_whose_bridge_they_are(kernel, table, t, x_t, log_p):
    """Wherever there is one; z = 0 is the forward kernel."""
    x_t, z = x_t % 2, log_p[..., 0]
    f_b, still, given, again = map(np.asarray, perturbed_bits(table, t, x_t, z))
    assert (still == 0).all() and ((given >= 0) & (given <= 1)).all()
    inside = (given > 1e-6) & (given < 1 - 1e-6)
    np.testing.assert_allclose(again[inside], f_b[inside], rtol=1e-6)


@jax.jit
def mixtures(table, t, x_t, outputs, points):
    """log p(x_0 | x_t), and log p(x_0) p(x_t | x_0) by the mixture's own formula."""
    step, readout = step_of(table, t, x_t), readouts.Mixture(2, -1.0, 1.0)
    law = readout.x_0_given(GaussianKernel(), outputs, x_t, step)
    logits, shifts, widths = (jnp.stack(outputs[i : i + 2], -1) for i in (0, 2, 4))
    sd = 0.5 * jnp.exp(widths)
    means = jnp.array([-1.0, 1.0]) + shifts
    first = dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(means, sd))
    a, n = jnp.sqrt(step.alpha_bar_t), step.noise_t

    def joint(x_0):
        return first.log_prob(x_0) + dist.Normal(a * x_0, jnp.sqrt(n)).log_prob(x_t)

    x_0_hat = readout.x_0_hat(GaussianKernel(), outputs, x_t, step)
    given = jax.vmap(law.log_prob)(points)
    return given, jax.vmap(joint)(points), law.mean, x_0_hat


@st.composite
def components(draw, shapes):
    table, t, x_t, *_ = draw(outputs(shapes))
    said = hnp.arrays(np.float64, x_t.shape, elements=st.floats(-2, 2))
    points = hnp.arrays(np.float64, (3, *x_t.shape), elements=VALUES)
    return table, t, x_t, tuple(draw(said) for _ in range(6)), draw(points)


@law(components)
def test_a_mixture_obeys_bayes_rule(*case):
    """log p(x_0 | x_t) − log p(x_0) p(x_t | x_0) is the same at all x_0; its mean is x̂_0."""
    given, joint, mean, x_0_hat = map(np.asarray, mixtures(*case))
    gap = given - joint
    np.testing.assert_allclose(gap - gap[0], 0.0, atol=1e-9 * (1 + np.abs(joint).max(initial=0)))
    np.testing.assert_allclose(mean, x_0_hat, rtol=1e-9, atol=1e-9)


GRIDS = [readouts.Grid(0, 255, 17), readouts.Grid(-1, 1, 2), readouts.Grid(1000, 1001, 5)]
masses = jax.jit(lambda grid, mean, sd: grid.log_mass(grid.values, mean, sd), static_argnums=0)


@st.composite
def grids(draw, shapes):
    grid = draw(st.sampled_from(GRIDS))
    width = grid.high - grid.low
    mean = grid.low + width * draw(st.floats(-1.5, 2.5))
    return grid, mean, width * 10.0 ** draw(st.floats(-4, 1))


@law(grids)
def test_masses_of_a_grid_sum_to_one_and_are_those_of_its_cells(grid, mean, sd):
    log_mass = np.asarray(masses(grid, mean, sd))
    assert np.logaddexp.reduce(log_mass) == pytest.approx(0.0, abs=1e-9)
    edges = (grid.values[:-1] + grid.values[1:]) / 2
    cdf = np.concatenate([[0.0], stats.norm.cdf(edges, mean, sd), [1.0]])
    np.testing.assert_allclose(np.exp(log_mass), np.diff(cdf), rtol=1e-6, atol=1e-12)


# Twists.

D, M, LEVELS = 3, 2, 5


@functools.cache
def measured():
    """Two linear measurements of an x_0 ~ N(0, I) of three numbers, float64."""
    prior = standard_diffusion((D,), T=LEVELS).prior({})

    def program(A, b, sd, y):
        numpyro.sample("y", dist.Normal(A @ prior() + b, sd).to_event(1), obs=y)

    arrays = np.zeros((M, D)), np.zeros(M), np.ones(M), np.zeros(M)
    return read(program, arrays, {}).conditioned


@functools.partial(jax.jit, static_argnums=(3, 4))
def twisted(conditioned, arrays, x_t, t, is_diagonal):
    """log ψ_t of two particles, and the mean and variance that x_0 has given x_t."""
    conditioned = dataclasses.replace(conditioned, arrays=list(arrays))
    problem = Problem(conditioned, conditioned.reverse, None, None, is_diagonal, True)
    view = View(problem, x_t[:, None], t)
    tilt = infer.LaplaceTwist(rank=M).look(view)
    step = conditioned.reverse.steps.at(t, 0)
    return tilt.log_psi[:, 0], jnp.sqrt(step.alpha_bar_t) * x_t, step.noise_t


@st.composite
def measurements(draw, shapes):
    def numbers(*shape):
        return draw(hnp.arrays(np.float64, shape, elements=st.floats(-2, 2)))

    sd = 10.0 ** draw(hnp.arrays(np.float64, (M,), elements=st.floats(-2, 1)))
    t = draw(st.sampled_from([1, 3]))
    return numbers(M, D), numbers(M), sd, numbers(M), numbers(2, D), t


@law(measurements)
def test_a_gaussian_likelihood_is_integrated_exactly(A, b, sd, y, x_t, t):
    """ψ_t(x_t) = N(y; A x̂_0 + b, A w A' + σ²), for maps that see two directions about alike.

    One that is seen a thousand times less sharply than another may be left out as rounding, and
    where log r has no slope there is no direction to start from.
    """
    values = np.linalg.eigvalsh(A / sd[:, None] @ (A / sd[:, None]).T)
    hypothesis.assume(values[0] > 0.05 * values[1])
    log_psi, x_0_hat, w = map(np.asarray, twisted(measured(), (A, b, sd, y), x_t, t, False))
    hypothesis.assume((np.abs(y - x_0_hat @ A.T - b).max(-1) > 0.01).all())
    cov = w * A @ A.T + np.diag(sd**2)
    for value, point in zip(log_psi, x_0_hat, strict=True):
        exact = stats.multivariate_normal(A @ point + b, cov).logpdf(y)
        assert value == pytest.approx(exact, rel=1e-6, abs=1e-6)


@law(measurements)
def test_a_likelihood_of_each_entry_is_integrated_exactly(A, b, sd, y, x_t, t):
    """The same where each measurement is of one entry, and known to be."""
    A = np.eye(M, D) * A.sum()
    log_psi, x_0_hat, w = map(np.asarray, twisted(measured(), (A, b, sd, y), x_t, t, True))
    gap, variance = y - x_0_hat @ A.T - b, w * np.diag(A[:, :M]) ** 2 + sd**2
    exact = -0.5 * (gap**2 / variance + np.log(2 * np.pi * variance)).sum(-1)
    np.testing.assert_allclose(log_psi, exact, rtol=1e-8, atol=1e-8)


# Plates and dtypes.


@functools.cache
def number():
    return standard_diffusion(T=3).prior({})


@st.composite
def plated(draw, shapes):
    """Plates around the prior, plates around the likelihood, a scale, and data."""
    around = draw(st.sampled_from([(), (3,), (2, 3)]))
    inside = draw(st.sampled_from([(), (2,)]))
    y = draw(hnp.arrays(np.float64, (*inside, *around), elements=VALUES))
    mask = draw(hnp.arrays(bool, y.shape))
    return around, inside, y, mask, draw(st.floats(0.1, 3)), draw(st.sampled_from(DTYPES))


DTYPES = ["f4", "f8", ">f8", ">f4", "i4", ">i2", "list"]


def as_kind(values, kind):
    """Values as a user may hold them; integers are rounded before."""
    return values.tolist() if kind == "list" else values.astype(kind)


@law(plated, x64=False, few=2, many=60)
def test_log_r_is_the_sum_over_the_plates_inside_for_each_system(
    around, inside, y, mask, scale, kind
):
    """Whatever the data's dtype and byte order; masked entries count nothing, others `scale`."""
    prior = number()

    def program(y):
        plates = [numpyro.plate(f"a{i}", n, dim=i - len(around)) for i, n in enumerate(around)]
        own = [numpyro.plate("own", n, dim=-1 - len(around)) for n in inside]
        with within(plates):
            x = prior()
            with within(own), numpyro.handlers.scale(scale=scale):
                numpyro.sample("y", dist.Normal(x, 0.5).mask(mask), obs=jnp.asarray(y, float))

    data = as_kind(y, kind)
    conditioned = read(program, (data,), {}).conditioned
    assert conditioned.batch_shape == around
    x_0 = np.linspace(-1.0, 1.0, math.prod(around)).reshape(around).astype(np.float32)
    found = np.asarray(conditioned.log_r(jnp.asarray(x_0)))
    values = np.asarray(data, np.float64)
    terms = -0.5 * ((values - x_0) / 0.5) ** 2 - 0.5 * np.log(2 * np.pi) - np.log(0.5)
    expected = scale * np.where(mask, terms, 0.0).sum(tuple(range(len(inside))))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def within(managers):
    """All of them entered, in their order."""
    stack = contextlib.ExitStack()
    for manager in managers:
        stack.enter_context(manager)
    return stack


@functools.cache
def pair():
    """Two numbers far from zero, of unequal scales."""
    return standard_diffusion((2,), T=3, loc=np.array([1e4, -3.0]), scale=np.array([2.0, 0.5]))


LAYOUTS = {
    "C": np.ascontiguousarray, "Fortran": np.asfortranarray, "reversed": lambda x: x[::-1][::-1],
    "strided": lambda x: np.repeat(x, 2, axis=0)[::2],
}  # fmt: skip


@st.composite
def held(draw, shapes):
    x = draw(hnp.arrays(np.float64, (4, 2), elements=st.floats(-3, 3)))
    x = x * np.array([2.0, 0.5]) + np.array([1e4, -3.0])
    return x, draw(st.sampled_from(["f4", "f8", ">f8", ">f4"])), draw(st.sampled_from(
        sorted(LAYOUTS)
    ))  # fmt: skip


@law(held, x64=False, many=60)
def test_a_bound_does_not_see_how_its_data_are_held(x, dtype, layout):
    """Bit for bit that of float64 in C order, whatever dtype, byte order or memory layout."""
    x = x.astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # moments of so few rows, and rounded ones
        one, other = (
            diagnostics.bound(jax.random.key(0), pair(), {}, data)["bound"]["bound"].values
            for data in (x.astype(np.float64), LAYOUTS[layout](x))
        )
    np.testing.assert_array_equal(one, other)
