"""The reverse process as a value: its longer steps against exact laws, its leaves, its units."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import reference
from oracles import gaussian_network
from probdiff import (
    AbsorbingKernel,
    BernoulliKernel,
    CategoricalKernel,
    Diffusion,
    GaussianKernel,
    networks,
    readouts,
    schedules,
    standard_diffusion,
)
from probdiff.compilation import Programs
from probdiff.kernels import bridge_variance, bridge_weights
from probdiff.trajectories import ForwardTrajectory, ReverseTrajectory
from probdiff.types import Step

SCHEDULES = {
    "near the data": schedules.log_snr_linear(30, beta_1=1e-9, alpha_bar_T=1e-6),
    "linear": schedules.linear(30, beta_1=1e-4, beta_T=0.5),
    "beta_T = 1": schedules.harmonic(30),
}
every_schedule = pytest.mark.parametrize("beta", SCHEDULES.values(), ids=SCHEDULES)


def pairs(T, least=0):
    """All levels t and s with least <= s < t <= T."""
    return np.array([(t, s) for t in range(1, T + 1) for s in range(least, t)]).T


# coefficients of longer steps


@every_schedule
def test_a_step_between_neighbours_is_that_of_the_table(x64, beta):
    table, t = schedules.steps(beta), np.arange(1, 31)
    for found, expected in zip(table.between(t, t - 1), table, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@every_schedule
def test_longer_steps_multiply_what_single_ones_keep(x64, beta):
    """1 − β = ∏ (1 − β_r) over s < r ≤ t, for every pair of levels; the data are level 0."""
    t, s = pairs(30)
    with np.errstate(divide="ignore"):
        sums = np.concatenate([[0.0], np.cumsum(np.log1p(-beta))])
        log_kept = np.array([np.log1p(-beta[b:a]).sum() for a, b in zip(t, s, strict=True)])
    step = schedules.steps(beta).between(t, s)
    expected = Step(
        t, -np.expm1(log_kept), np.exp(sums[s]), np.exp(sums[t]), -np.expm1(sums[s]),
        -np.expm1(sums[t]),
    )  # fmt: skip
    for name in Step._fields:
        np.testing.assert_allclose(getattr(step, name), getattr(expected, name), rtol=1e-12)


# longer reverse steps, numbers

MEAN, SD = np.array([0.4, -0.7]), np.array([0.8, 0.3])


@dataclasses.dataclass(frozen=True)
class ExactVariance(readouts.Variance):
    """Variance of x_s given x_t for data N(m, sd²), whatever the step."""

    num_outputs: int = 0

    def __call__(self, output, step):
        variance_0 = 1 / (1 / SD**2 + step.alpha_bar_t / step.noise_t)
        return bridge_variance(step) + bridge_weights(step)[0] ** 2 * variance_0


def gaussian(beta, readout):
    """Diffusion of N(MEAN, SD²) with an exact denoiser, said as x̂_0 or as velocity."""
    table = schedules.steps(beta)

    def network(x_t, t):
        x_0_hat, v = jnp.split(gaussian_network(MEAN, SD, beta)(x_t, t), 2, -1)
        step = table.at(t, 1)
        velocity = (jnp.sqrt(step.alpha_bar_t) * x_t - x_0_hat) / jnp.sqrt(step.noise_t)
        z = velocity if isinstance(readout, readouts.Velocity) else x_0_hat
        return jnp.concatenate([z, v], -1)[:, : 2 * readout.outputs_per_number]

    return Diffusion(
        GaussianKernel(), beta, network, event_shape=(2,), readout=readout,
        last_step=readouts.Learned(),
    )  # fmt: skip


def conditioned(beta, x_t, t, s):
    """Mean and variance of x_s given x_t, two numbers of one Gaussian."""
    a_t, a_s = (reference.alpha_bar(beta)[levels - 1][:, None] for levels in (t, s))
    variance_t, variance_s = (a * SD**2 + 1 - a for a in (a_t, a_s))
    slope = np.sqrt(a_t / a_s) * variance_s / variance_t
    mean = np.sqrt(a_s) * MEAN + slope * (x_t - np.sqrt(a_t) * MEAN)
    return mean, variance_s - slope**2 * variance_t


BETAS = {
    "log_snr": schedules.log_snr_linear(7, beta_1=0.01, alpha_bar_T=1e-3),
    "beta_T = 1": schedules.harmonic(7),
}
every_beta = pytest.mark.parametrize("beta", BETAS.values(), ids=BETAS)


@pytest.mark.parametrize("readout", [readouts.Data, readouts.Velocity])
@every_beta
def test_a_jump_is_the_exact_reverse_law_of_gaussian_data(x64, beta, readout):
    t, s = pairs(7, least=1)
    x_t = np.random.default_rng(0).normal(size=(len(t), 2))
    reverse = gaussian(beta, readout(ExactVariance())).bind({})
    mean, variance = conditioned(beta, x_t, t, s)
    law = jax.jit(reverse.jump)(jnp.asarray(x_t), t, s)
    np.testing.assert_allclose(law.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(law.variance, variance, rtol=1e-10)
    one = jax.jit(lambda x_t: reverse.jump(x_t, 7, 6))(jnp.asarray(x_t[-1]))  # levels as numbers
    np.testing.assert_allclose(one.mean, mean[-1], rtol=1e-10)
    np.testing.assert_allclose(one.variance, variance[-1], rtol=1e-10)


@every_beta
def test_a_jump_has_the_bridges_variance_where_the_network_says_that_of_single_steps(x64, beta):
    t, s = pairs(7, least=1)
    x_t = np.random.default_rng(0).normal(size=(len(t), 2))
    law = jax.jit(gaussian(beta, readouts.Data()).bind({}).jump)(jnp.asarray(x_t), t, s)
    np.testing.assert_allclose(law.mean, conditioned(beta, x_t, t, s)[0], rtol=1e-10)
    a_t, a_s = (reference.alpha_bar(beta)[levels - 1] for levels in (t, s))
    expected = (1 - a_t / a_s) * (1 - a_s) / (1 - a_t)
    np.testing.assert_allclose(law.variance, np.stack([expected] * 2, -1), rtol=1e-10)


# longer reverse steps, symbols

KERNELS = {
    "bits": (BernoulliKernel(0.3), 3),
    "classes": (CategoricalKernel(3), 2),
    "absorbing": (AbsorbingKernel(3), 2),
}
T = 5


class Enumerated:
    """All states of a few symbols at each level, and a network that says p(x_0 | x_t) exactly."""

    def __init__(self, kernel, length):
        self.kernel, self.length, self.beta = kernel, length, schedules.harmonic(T)
        self.states = np.array(list(itertools.product(range(kernel.num_states), repeat=length)))
        p_0 = np.random.default_rng(0).dirichlet(np.ones(len(self.states)))
        self.p_0 = np.where((self.states < kernel.num_data_states).all(1), p_0, 0.0)
        self.p_0 /= self.p_0.sum()

    def moves(self, s, t):
        """q(x_t | x_s) for all states, by multiplying the steps of one symbol."""
        one, pi = np.eye(self.kernel.num_states), np.exp(self.kernel.log_pi)
        for b in self.beta[s:t]:
            one = one @ ((1 - b) * np.eye(len(pi)) + b * pi)
        whole = np.ones((1, 1))
        for _ in range(self.length):
            whole = np.kron(whole, one)
        return whole

    def given(self, t, s):
        """P(x_s,i = k | x_t), rows of x_t; NaN where x_t cannot be."""
        joint = (self.p_0 @ self.moves(0, s))[:, None] * self.moves(s, t)
        joint = joint / np.where(joint.sum(0) > 0, joint.sum(0), np.nan)
        one_hot = self.states[..., None] == np.arange(self.kernel.num_states)
        return np.einsum("st,sik->tik", joint, one_hot)

    def diffusion(self):
        k = self.kernel.num_data_states
        with np.errstate(divide="ignore"):
            log_p = np.log([np.nan_to_num(self.given(t, 0), nan=1.0) for t in range(1, T + 1)])
        out = np.moveaxis(log_p[..., :k], -1, -2).reshape(T, len(self.states), -1)  # class by class
        if k == 2:
            out = log_p[..., 1] - log_p[..., 0]
        base = self.kernel.num_states ** np.arange(self.length)[::-1]

        def network(x_t, t):
            return jnp.asarray(out)[t - 1, x_t @ base]

        return Diffusion(
            self.kernel, self.beta, network, event_shape=(self.length,),
            readout=readouts.DataLogits(),
        )  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_a_jump_is_the_exact_reverse_law_of_each_symbol(x64, name):
    exact = Enumerated(*KERNELS[name])
    reverse, x_t = exact.diffusion().bind({}), jnp.asarray(exact.states)
    values = jnp.arange(exact.kernel.num_states)[:, None, None] + 0 * x_t
    log_p = jax.jit(lambda t, s: reverse.jump(x_t, t, s).log_prob(values))
    for t, s in pairs(T, least=1).T:
        expected = exact.given(t, s)
        found = np.moveaxis(np.exp(log_p(t, s)), 0, -1)
        there = ~np.isnan(expected).any((1, 2))
        assert there.any()
        np.testing.assert_allclose(found[there], expected[there], rtol=1e-9, atol=1e-12)


# respaced


def rough(readout=None, kernel=None, beta=BETAS["log_snr"], **options):
    """Something different for each output, entry and level; exact for nothing."""
    kernel = GaussianKernel() if kernel is None else kernel
    readout = readouts.Data() if readout is None else readout
    count = readout.num_outputs(kernel)

    def network(x_t, t):
        z = jnp.sin(x_t + 0.3 * t[:, None])
        return jnp.concatenate([z * (1 - 0.2 * i) + 0.1 * i for i in range(count)], -1)

    return Diffusion(kernel, beta, network, event_shape=(2,), readout=readout, **options)


ROUGH = {
    "learned variance": (readouts.Epsilon(), GaussianKernel()),
    "forward variance": (readouts.Perturbation(readouts.ForwardVariance()), GaussianKernel()),
    "mixture": (readouts.Mixture(2), GaussianKernel()),
    "bits": (readouts.Logits(), BernoulliKernel(0.3)),
    "classes": (readouts.DataLogits(), CategoricalKernel(3)),
}
LAST = readouts.Learned()


@pytest.mark.parametrize("name", ROUGH)
def test_a_respaced_process_jumps_from_level_to_level(x64, key, name):
    diffusion = rough(*ROUGH[name], last_step=LAST)
    reverse = diffusion.bind({})
    fewer, times = reverse.respaced(4), [1, 3, 5, 7]

    @jax.jit
    def walk(fewer, reverse):
        """A trajectory, its log density; those of steps and jumps; outputs; log p(x_0 | x_1)."""
        law = ReverseTrajectory(fewer)
        x = law.sample(key, (3,))
        levels = list(zip(range(2, 5), times[1:], times[:-1], strict=True))
        steps = [fewer.step(x[:, i - 1], i).log_prob(x[:, i - 2]) for i, _, _ in levels]
        jumps = [reverse.jump(x[:, i - 1], t, s).log_prob(x[:, i - 2]) for i, t, s in levels]
        outputs = [(fewer.outputs(x[:, i - 1], i), reverse.outputs(x[:, i - 1], t))
                   for i, t, _ in levels]  # fmt: skip
        pi = diffusion.kernel.stationary((3, 2)).log_prob(x[:, -1])
        last = [r.data(x[:, 0]).log_prob(reverse.to_state(x[:, 1])) for r in (fewer, reverse)]
        by_time = fewer.jump(x[:, 1], 3, 1).log_prob(x[:, 0])
        return x, law.log_prob(x), pi, steps, jumps, by_time, outputs, last

    x, total, pi, steps, jumps, by_time, outputs, last = walk(fewer, reverse)
    assert x.shape == (3, 4, 2)
    np.testing.assert_allclose(steps, jumps, rtol=1e-12)
    np.testing.assert_allclose(by_time, jumps[0], rtol=1e-12)  # times are those of all T steps
    np.testing.assert_allclose(total, (pi + sum(jumps)).sum(-1), rtol=1e-12)
    np.testing.assert_array_equal(*last)
    for ours, theirs in outputs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize(
    ("n", "times"), [(2, [1, 7]), (3, [1, 4, 7]), (4, [1, 3, 5, 7]), (7, [1, 2, 3, 4, 5, 6, 7])]
)
def test_levels_are_evenly_spread(n, times):
    reverse = standard_diffusion((2,), T=7).bind({}).respaced(n)
    assert (reverse.n, reverse.T, reverse.is_respaced) == (n, 7, n < 7)
    np.testing.assert_array_equal(reverse.times, times)
    np.testing.assert_array_equal(reverse.steps.t, times)


def test_all_levels_are_the_process_itself(x64):
    reverse = rough().bind({})
    assert reverse.respaced(7) is reverse and reverse.respaced(None) is reverse
    back, x_t = reverse.respaced(3).respaced(7), jnp.ones((6, 2))
    step = jax.jit(lambda reverse: reverse.step(x_t, jnp.arange(2, 8)))
    ours, theirs = step(back), step(reverse)
    np.testing.assert_array_equal(ours.mean, theirs.mean)
    np.testing.assert_array_equal(ours.scale, theirs.scale)
    assert reverse.variance is None  # the network says it, of single steps
    assert reverse.respaced(3).variance == readouts.BridgeVariance()


@pytest.mark.parametrize("n", [0, 1, 8])
def test_a_number_of_levels_there_is_not_is_refused(n):
    with pytest.raises(ValueError, match=re.escape(f"steps must lie in 2..T = 7; got {n}")):
        rough().bind({}).respaced(n)


def test_the_forward_trajectory_of_a_respaced_process_has_every_level(x64):
    reverse = rough(loc=3.0, scale=2.0).bind({})
    forward = ForwardTrajectory.of(reverse.respaced(3), jnp.ones((4, 2)))
    np.testing.assert_array_equal(forward.x_0, -np.ones((4, 2)))
    assert forward.event_shape == (7, 2)
    jax.tree.map(np.testing.assert_array_equal, forward.steps, reverse.steps)


# a pytree


@pytest.fixture(scope="module")
def with_everything():
    """A diffusion with weights, rates, units and context, two sets of parameters, and inputs."""
    network = networks.Perceptron((2,), 4, 1, 7, context_size=3, rngs=nnx.Rngs(0))
    diffusion = Diffusion(
        GaussianKernel(), schedules.learned(BETAS["log_snr"]), network, event_shape=(2,),
        context_shape=(3,), loc=[1.0, -2.0], scale=[3.0, 0.5], last_step=LAST,
    )  # fmt: skip
    template, rng = diffusion.params_template, np.random.default_rng(0)

    def drawn():
        of = {"x_0_beta": lambda leaf: rng.uniform(0.1, 0.6, leaf.shape)}
        draw = {name: of.get(name, lambda leaf: rng.normal(size=leaf.shape)) for name in template}
        return {
            name: jax.tree.map(lambda leaf, f=draw[name]: jnp.asarray(f(leaf), jnp.float32), tree)
            for name, tree in template.items()
        }

    context = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    return diffusion, (drawn(), drawn()), context, jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)


def laws(reverse, x):
    """What its four laws say at x."""
    step, jump = reverse.step(x, 3), reverse.jump(x, 5, 2)
    x_0_hat, last = reverse.x_0_hat(x, 4), reverse.data(x).log_prob(reverse.to_data(x))
    return step.mean, step.scale, jump.mean, jump.scale, x_0_hat, last


def denoised(reverse, x):
    return reverse.x_0_hat(x, 4)


compiled = jax.jit(laws)


def assert_differ(ours, theirs):
    assert all(np.abs(a - b).max() > 1e-2 for a, b in zip(ours, theirs, strict=True))


def assert_close(ours, theirs, rtol=2e-5):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


def test_a_reverse_process_is_an_argument_of_what_is_compiled(with_everything):
    """`jit` takes it and returns it; `vmap` takes several, stacked."""
    diffusion, params, context, x = with_everything
    several = [diffusion.bind(p, context=context) for p in params]
    alone = [jax.jit(functools.partial(laws, reverse))(x) for reverse in several]
    for reverse, expected in zip(several, alone, strict=True):
        assert_close(compiled(reverse, x), expected)
        assert_close(compiled(jax.jit(lambda reverse: reverse)(reverse), x), expected)
    assert_differ(*alone)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    mapped = jax.jit(jax.vmap(laws, in_axes=(0, None)))(stacked, x)
    assert_close(mapped, [jnp.stack(both) for both in zip(*alone, strict=True)])


def test_binding_twice_gives_one_structure_and_one_compilation(with_everything):
    diffusion, params, context, x = with_everything
    one, other = (diffusion.bind(p, context=context) for p in params)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.structure(one) != jax.tree.structure(diffusion.bind(params[0]))
    programs = Programs()
    ours, theirs = (programs(denoised, reverse, x) for reverse in (one, other))
    assert [jitted._cache_size() for jitted in programs._kept.values()] == [1]
    assert np.abs(ours - theirs).max() > 1e-2


def test_weights_rates_units_and_context_are_leaves(with_everything):
    """Each that is changed through `jax.tree.map` gives what binding the changed value gives."""
    diffusion, (params, other), context, x = with_everything
    reverse = diffusion.bind(params, context=context)
    leaves = {id(leaf) for leaf in jax.tree.leaves(reverse)}
    parts = reverse.network, reverse.steps, reverse.units, reverse.context
    assert leaves == {id(leaf) for leaf in jax.tree.leaves(parts)}
    doubled = {name: jax.tree.map(lambda w: 2 * w, tree) for name, tree in params.items()}
    doubled["x_0_beta"] = params["x_0_beta"]
    network = jax.tree.map(lambda w: 2 * w, reverse.network)
    changed = dataclasses.replace(reverse, network=network)
    assert_close(compiled(changed, x), compiled(diffusion.bind(doubled, context=context), x))
    assert np.abs(compiled(changed, x)[0] - compiled(reverse, x)[0]).max() > 1e-2
    both = diffusion.bind({**params, "x_0_beta": other["x_0_beta"]}, context=context[::-1])
    moved = jax.tree.map(lambda _, leaf: leaf, reverse, both)  # every leaf in its place
    assert_close(compiled(moved, x), compiled(both, x), rtol=0)
    assert_differ(compiled(both, x), compiled(reverse, x))
    units = jax.tree.map(lambda leaf: 2 * leaf, reverse.units)
    further = dataclasses.replace(reverse, units=units).to_data(x)
    np.testing.assert_allclose(further, 2 * reverse.to_data(x), rtol=1e-6)


def test_gradients_reach_weights_and_rates(with_everything):
    diffusion, (params, _), context, x = with_everything

    def total(params):
        return diffusion.bind(params, context=context).jump(x, 5, 2).log_prob(x).sum()

    for leaf in jax.tree.leaves(jax.jit(jax.grad(total))(params)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0


# context


def test_a_context_put_in_later_is_the_one_it_was_bound_with(with_everything):
    diffusion, (params, _), context, x = with_everything
    reverse, hat = diffusion.bind(params), jax.jit(denoised)
    given, bound = reverse.given(context), diffusion.bind(params, context=context)
    assert reverse.context is None
    assert_close(compiled(given, x), compiled(bound, x), rtol=0)
    by_rows = [hat(reverse.given(c), x_t) for c, x_t in zip(context, x, strict=True)]
    np.testing.assert_allclose(hat(given, x), by_rows, rtol=2e-5, atol=1e-6)
    backwards = given.given(context[::-1])  # in place of the first
    np.testing.assert_array_equal(hat(backwards, x), hat(reverse.given(context[::-1]), x))
    assert np.abs(hat(backwards, x) - hat(given, x)).max() > 1e-2
    fewer = given.respaced(3), reverse.respaced(3).given(context)
    assert jax.tree.structure(fewer[0]) == jax.tree.structure(fewer[1])
    jax.tree.map(np.testing.assert_array_equal, *fewer)


def test_one_context_serves_all_draws(with_everything):
    """Contexts have the last axes of the batch; draws or times may lead."""
    diffusion, (params, _), context, x = with_everything
    reverse = diffusion.bind(params, context=context)
    many = jnp.stack([x, x + 1, x - 1])
    t = jnp.array([[2, 3, 4, 5], [5, 2, 3, 4], [7, 7, 2, 2]])
    alone = jax.jit(jax.vmap(lambda x_t, t: reverse.step(x_t, t).mean))(many, t)
    for first in (False, True):
        mean = jax.jit(lambda f=first: reverse.step(many, t, examples_first=f).mean)()
        np.testing.assert_allclose(mean, alone, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("context", [None, np.zeros((4, 2), np.float32), np.float32(0.0)])
def test_a_context_that_does_not_fit_is_refused(with_everything, context):
    diffusion, (params, _), _, _ = with_everything
    with pytest.raises(ValueError, match="context must"):
        diffusion.bind(params).given(context)
    with pytest.raises(ValueError, match="context must be given exactly where"):
        standard_diffusion((2,)).bind({}).given(np.zeros((4, 3)))


# units


def test_units_lead_to_the_state_and_back(x64):
    loc, scale = np.array([1.0, -2.0]), np.array([3.0, 0.5])
    reverse = standard_diffusion((2,), loc=loc, scale=scale).bind({})
    x = np.random.default_rng(0).normal(size=(5, 2))
    np.testing.assert_allclose(reverse.to_state(x), (x - loc) / scale, rtol=1e-14)
    np.testing.assert_allclose(reverse.to_data(reverse.to_state(x)), x, rtol=1e-13)
    assert reverse.grid is None and reverse.support is reverse.kernel.support


def test_numbers_on_a_grid_come_back_as_they_were():
    last_step = readouts.Discretised(0, 255, 256)
    reverse = standard_diffusion((2,), loc=127.5, scale=74.0, last_step=last_step).bind({})
    x = np.arange(256, dtype=np.float32)[:, None] * np.ones(2, np.float32)
    np.testing.assert_array_equal(reverse.to_data(reverse.to_state(x)), x)
    np.testing.assert_array_equal(reverse.to_data(reverse.to_state(x + 0.2)), x)
    assert reverse.support == reverse.grid == last_step.grid


@pytest.mark.parametrize("kernel", [BernoulliKernel(0.3), CategoricalKernel(3)], ids=str)
def test_symbols_have_no_units(kernel):
    reverse = standard_diffusion((2,), kernel=kernel).bind({})
    x = np.array([[0, 1], [1, 0]], np.uint8)
    assert reverse.to_state(x).dtype == jnp.int32
    np.testing.assert_array_equal(reverse.to_state(x), x)
    np.testing.assert_array_equal(reverse.to_data(reverse.to_state(x)), x)
    assert jax.tree.leaves(reverse.units) == []


@pytest.mark.parametrize("readout", [readouts.Data, readouts.Epsilon, readouts.Velocity,
                                     readouts.Score])  # fmt: skip
def test_scores_of_all_parametrisations_are_that_of_the_mixture(x64, readout):
    """0.7 N(1, ¼) + 0.3 N(−2, 1): to 1e-10 of the gradient of log p(x_t), at all levels."""
    beta = schedules.log_snr_linear(12, beta_1=1e-3, alpha_bar_T=1e-3)
    table = schedules.steps(beta)
    shares, means, variances = jnp.array([0.7, 0.3]), jnp.array([1.0, -2.0]), jnp.array([0.25, 1.0])

    def log_p(x, left):
        """log p(x_t) of one number."""
        a, total = jnp.sqrt(left), left * variances + 1 - left
        terms = jnp.log(shares) - 0.5 * ((x - a * means) ** 2 / total + jnp.log(total))
        return jax.nn.logsumexp(terms)

    def scores(x_t, t):
        return jax.vmap(jax.grad(log_p))(x_t, table.alpha_bar_t[t - 1])

    def network(x_t, t):
        left, noise = table.alpha_bar_t[t - 1], table.noise_t[t - 1]
        score = scores(x_t, t)
        eps = -jnp.sqrt(noise) * score
        x_0_hat = (x_t - jnp.sqrt(noise) * eps) / jnp.sqrt(left)
        said = {
            readouts.Data: x_0_hat, readouts.Epsilon: eps, readouts.Score: score,
            readouts.Velocity: jnp.sqrt(left) * eps - jnp.sqrt(noise) * x_0_hat,
        }  # fmt: skip
        return said[readout]

    reverse = Diffusion(
        GaussianKernel(), beta, network, event_shape=(), readout=readout(readouts.BridgeVariance())
    ).bind({})
    x_t, t = jnp.linspace(-4, 4, 36), jnp.tile(jnp.arange(1, 13), 3)
    np.testing.assert_allclose(reverse.score(x_t, t), scores(x_t, t), rtol=1e-10, atol=1e-10)
    fewer = reverse.respaced(4)
    np.testing.assert_allclose(
        fewer.score(x_t[:4], jnp.arange(1, 5)), scores(x_t[:4], fewer.times), rtol=1e-10
    )


def test_symbols_have_no_score():
    reverse = standard_diffusion((2,), T=4, kernel=BernoulliKernel()).bind({})
    with pytest.raises(ValueError, match="score is for numbers"):
        reverse.score(jnp.zeros((1, 2), jnp.int32), 2)
