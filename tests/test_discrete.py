"""Diffusions of bits and classes: kernels by their identities, programs by enumeration."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO

from probdiff import (
    AbsorbingKernel,
    BernoulliKernel,
    CategoricalKernel,
    Diffusion,
    SampledTimeELBO,
    diagnostics,
    networks,
    readouts,
    schedules,
)
from probdiff.kernels import Bits, DiscreteKernel, States
from probdiff.trajectories import ForwardTrajectory, ReverseTrajectory

KERNELS = {
    "bits": BernoulliKernel(0.5),
    "rare bits": BernoulliKernel(0.2),
    "classes": CategoricalKernel(3),
    "absorbing": AbsorbingKernel(3),
}
BETAS = {
    "harmonic": schedules.harmonic(6),
    "log_snr": schedules.log_snr_linear(6, beta_1=0.05, alpha_bar_T=0.01),
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
every_beta = pytest.mark.parametrize("beta", BETAS.values(), ids=BETAS)


def matrix(law, kernel):
    """Rows: from-state; columns: probability of each to-state."""
    states = jnp.arange(kernel.num_states)
    return np.asarray(law(states).probs)


@every_kernel
@every_beta
def test_stationary_law_is_kept_and_reversible(x64, kernel, beta):
    pi = np.asarray(kernel.stationary(()).probs)
    for t in range(1, 7):
        step = schedules.steps(beta).at(t, 0)
        T = matrix(lambda x, step=step: kernel.transition(x, step), kernel)
        np.testing.assert_allclose(pi @ T, pi, atol=1e-12)
        np.testing.assert_allclose(pi[:, None] * T, (pi[:, None] * T).T, atol=1e-12)
        np.testing.assert_allclose(T.sum(1), 1, atol=1e-12)


@every_kernel
@every_beta
def test_marginal_is_the_product_of_transitions(x64, kernel, beta):
    table, product = schedules.steps(beta), np.eye(kernel.num_states)
    for t in range(1, 7):
        step = table.at(t, 0)
        product = product @ matrix(lambda x, step=step: kernel.transition(x, step), kernel)
        marginal = matrix(lambda x, step=step: kernel.marginal(x, step), kernel)
        np.testing.assert_allclose(marginal, product, atol=1e-12)


@every_kernel
@every_beta
def test_bridge_and_marginal_give_the_joint(x64, kernel, beta):
    """q(x_s | x_0) q(x_t | x_s) = q(x_t | x_0) q(x_s | x_t, x_0) for all three states."""
    table, K = schedules.steps(beta), kernel.num_states
    x_0, x_t = jnp.meshgrid(jnp.arange(K), jnp.arange(K), indexing="ij")
    for t in range(2, 7):
        step = table.at(t, 0)
        before = matrix(lambda x, t=t: kernel.marginal(x, table.at(t - 1, 0)), kernel)
        T = matrix(lambda x, step=step: kernel.transition(x, step), kernel)
        after = matrix(lambda x, step=step: kernel.marginal(x, step), kernel)
        bridge = np.asarray(kernel.bridge(x_t, x_0, step).probs)  # (x_0, x_t, x_s)
        joint = before[:, :, None] * T[None]  # (x_0, x_s, x_t)
        np.testing.assert_allclose(joint, (after[..., None] * bridge).swapaxes(1, 2), atol=1e-12)


@every_kernel
def test_bridge_given_a_law_is_the_mixture_of_bridges(x64, kernel):
    table, K = schedules.steps(BETAS["harmonic"]), kernel.num_data_states
    p = np.random.default_rng(0).dirichlet(np.ones(K))
    log_p = jnp.concatenate([jnp.log(p), jnp.full(kernel.num_states - K, -jnp.inf)])
    for t, x_t in itertools.product(range(1, 7), range(kernel.num_states)):
        step, x = table.at(t, 0), jnp.array(x_t)
        reach = np.asarray(
            [float(kernel.marginal(jnp.array(j), step).probs[x_t]) > 0 for j in range(K)]
        )
        if not reach.any():
            continue
        weight = np.where(reach, p, 0) / p[reach].sum()
        bridges = np.stack([kernel.bridge(x, jnp.array(j), step).probs for j in range(K)])
        mixed = kernel.bridge_given(log_p, x, step).probs
        np.testing.assert_allclose(mixed, weight @ bridges, atol=1e-12)


def test_two_classes_are_bits_of_rate_one_half(x64):
    step = schedules.steps(BETAS["log_snr"]).at(3, 0)
    x_t, x_0 = jnp.meshgrid(jnp.arange(2), jnp.arange(2))
    for law in ("transition", "marginal"):
        one, two = (getattr(k, law)(x_0, step) for k in (CategoricalKernel(2), BernoulliKernel()))
        np.testing.assert_allclose(one.log_probs, two.log_probs, atol=1e-12)
    one, two = (k.bridge(x_t, x_0, step) for k in (CategoricalKernel(2), BernoulliKernel()))
    np.testing.assert_allclose(one.log_probs, two.log_probs, atol=1e-12)
    z = jnp.linspace(-3.0, 3.0, 4).reshape(2, 2)
    bits = readouts.DataLogits()(BernoulliKernel(), (z,), x_t, step)
    classes = readouts.DataLogits()(CategoricalKernel(2), (0 * z, z), x_t, step)
    np.testing.assert_allclose(bits.log_probs, classes.log_probs, atol=1e-12)


def test_rate_may_differ_by_position(x64):
    kernel = BernoulliKernel(np.array([0.1, 0.7]))
    step = schedules.steps(BETAS["log_snr"]).at(4, 1)
    both = np.asarray(kernel.marginal(jnp.array([1, 0]), step).probs[:, 1])
    for i, (x, rate) in enumerate([(1, 0.1), (0, 0.7)]):
        expected = step.alpha_bar_t[0] * x + rate * step.noise_t[0]
        assert both[i] == pytest.approx(float(expected), abs=1e-12)


def test_paper_formula_of_the_bits(x64):
    kernel, step = BernoulliKernel(0.2), schedules.steps(BETAS["log_snr"]).at(2, 0)
    for x in (0, 1):
        p = float(kernel.transition(jnp.array(x), step).probs[1])
        assert p == pytest.approx(float((1 - step.beta) * x + 0.2 * step.beta), abs=1e-12)


def test_logits_of_zero_are_the_forward_kernel_and_find_their_data(x64):
    kernel, step = BernoulliKernel(0.2), schedules.steps(BETAS["log_snr"]).at(3, 0)
    x_t = jnp.array([0, 1])
    zero = readouts.Logits()(kernel, (jnp.zeros(2),), x_t, step)
    np.testing.assert_allclose(zero.probs, kernel.transition(x_t, step).probs, atol=1e-12)
    p_0 = jnp.log(jnp.array([[0.7, 0.3], [0.1, 0.9]]))
    mixed = kernel.bridge_given(p_0, x_t, step)
    forward = kernel.transition(x_t, step).log_probs
    z = mixed.log_probs[:, 1] - mixed.log_probs[:, 0] - forward[:, 1] + forward[:, 0]
    found = readouts.Logits().x_0_given(kernel, (z,), x_t, step)
    np.testing.assert_allclose(found.probs, jnp.exp(p_0), atol=1e-10)


def as_states(probs):
    return States(jnp.asarray(np.log(probs), jnp.float32))


def as_bits(probs):
    return Bits(jnp.asarray(np.log(probs[1] / probs[0]), jnp.float32))


@pytest.mark.parametrize("law", [as_states, as_bits])
@pytest.mark.parametrize("rare", [1e-4, 0.05, 0.4, 0.5])
@pytest.mark.parametrize("turn", [1, -1])
def test_kl_keeps_its_digits(law, rare, turn):
    """float32 against float64 where q and p differ in the third digit."""
    q, p = (np.array([1 - r, r])[::turn] for r in (rare, 1.002 * rare))
    exact = float((q * np.log(q / p)).sum())
    assert float(dist.kl_divergence(law(q), law(p))) == pytest.approx(exact, rel=0.02)


def test_written_out_kl_loses_its_digits():
    q, p = np.array([1 - 1e-4, 1e-4]), np.array([1 - 1.001e-4, 1.001e-4])
    exact = float((q * np.log(q / p)).sum())
    kl = float(dist.kl_divergence(as_states(q), as_states(p)))
    naive = float(jnp.sum(jnp.float32(q) * (jnp.log(jnp.float32(q)) - jnp.log(jnp.float32(p)))))
    assert abs(naive - exact) > 10 * abs(kl - exact)


def test_kl_with_impossible_states():
    for law in (as_states, as_bits):
        with np.errstate(divide="ignore"):
            certain, open_ = law(np.array([1.0, 0.0])), law(np.array([0.25, 0.75]))
            other = law(np.array([0.0, 1.0]))
        check_certain(certain, open_, other)


def check_certain(certain, open_, other):
    assert float(dist.kl_divergence(certain, other)) == math.inf
    assert float(dist.kl_divergence(certain, open_)) == pytest.approx(math.log(4), rel=1e-6)
    assert float(dist.kl_divergence(open_, certain)) == math.inf
    assert float(dist.kl_divergence(certain, certain)) == 0.0


def test_draws_have_the_law_they_should(key):
    probs = jnp.array([[0.7, 0.0, 0.3], [1e-3, 0.5, 0.499]])
    n = 200_000
    draws = np.asarray(States(jnp.log(probs)).sample(key, (n,)))
    for i in range(2):
        share = np.bincount(draws[:, i], minlength=3) / n
        error = np.sqrt(probs[i] * (1 - probs[i]) / n)
        assert (np.abs(share - probs[i]) <= 4 * error + 1e-12).all()


@pytest.mark.long
def test_impossible_states_never_come_up(key):
    """float32 sums of probabilities may end below 1; what is left must not go to state 0."""
    third = States(jnp.array([-jnp.inf, math.log(0.3) - 3e-7, math.log(0.7)]))
    sure = States(jnp.array([-jnp.inf, -3e-7, -jnp.inf]))
    draws = jax.lax.map(
        lambda k: jnp.array([(law.sample(k, (2_000_000,)) == 0).sum() for law in (third, sure)]),
        jax.random.split(key, 30),
    )
    assert int(draws.sum()) == 0


def test_values_that_are_no_states_are_impossible():
    for law in (as_states(np.array([0.3, 0.7])), as_bits(np.array([0.3, 0.7]))):
        log_p = np.asarray(law.log_prob(jnp.array([0.0, 1.0, 0.7, 2.0, -1.0, jnp.nan])))
        np.testing.assert_allclose(np.exp(log_p[:2]), [0.3, 0.7], rtol=1e-6)
        assert (log_p[2:] == -np.inf).all()


@pytest.mark.long
def test_rare_states_come_up_as_rarely_as_they_should(key):
    p, n = 2e-7, 2_000_000
    draws = jax.lax.map(
        lambda k: States(jnp.log(jnp.array([1 - p, p]))).sample(k, (n,)).sum(),
        jax.random.split(key, 50),
    )
    expected = p * n * 50
    assert abs(int(draws.sum()) - expected) < 4 * math.sqrt(expected)


# Enumeration: three symbols, four steps, a network that was never trained


def tiny(kernel, last_step, T=4, L=3):
    classes = kernel.num_data_states
    outputs = 1 if classes == 2 else classes
    network = networks.Perceptron((L,), 12, 1, T, outputs=outputs, bumps=3, rngs=nnx.Rngs(2))
    diffusion = Diffusion(
        kernel,
        schedules.harmonic(T),
        network,
        event_shape=(L,),
        readout=readouts.DataLogits(),
        last_step=last_step,
    )
    noise = jax.random.normal(jax.random.key(8), (1000,))
    params = jax.tree.map(
        lambda p: jnp.zeros(p.shape) + 0.7 * noise[: math.prod(p.shape)].reshape(p.shape),
        diffusion.params_template,
    )
    return diffusion, params


CASES = {
    "bits, tied": (BernoulliKernel(0.3), readouts.Tied()),
    "bits, learned": (BernoulliKernel(0.3), readouts.Learned()),
    "classes, tied": (CategoricalKernel(3), readouts.Tied()),
    "absorbing": (AbsorbingKernel(3), readouts.Learned()),
}


def enumerate_diffusion(diffusion, params):
    """All joint states, exact p(x_0) and exact K(x_0), by summing over every trajectory level."""
    kernel, T, L = diffusion.kernel, diffusion.T, diffusion.event_shape[0]
    levels = np.array(list(itertools.product(range(kernel.num_states), repeat=L)))
    data = np.array(list(itertools.product(range(kernel.num_data_states), repeat=L)))
    reverse = diffusion.bind(params)

    def joint(law, targets):
        """P(targets | each row), (rows, targets)."""
        logs = np.asarray(law.log_probs, float)
        return np.exp(sum(logs[:, i][:, targets[:, i]] for i in range(L)))

    def reverse_law(t):
        return reverse.step(jnp.asarray(levels), jnp.full(len(levels), t))

    marginal = joint(kernel.stationary((1, L)), levels)[0]
    for t in range(T, 1, -1):
        marginal = marginal @ joint(reverse_law(t), levels)
    last = reverse.data(jnp.asarray(levels))
    log_last = np.stack(
        [np.asarray(last.log_prob(jnp.broadcast_to(x, levels.shape))) for x in jnp.asarray(data)], 1
    )
    p_0 = marginal @ np.exp(log_last)

    bound = np.zeros(len(data))
    for i, x_0 in enumerate(data):
        forward = ForwardTrajectory.of(reverse, jnp.asarray(x_0)[None])
        q = {
            t: joint(forward.marginal_at(jnp.array([t]), (1, L)), levels)[0]
            for t in range(1, T + 1)
        }
        bound[i] = np.sum(np.where(q[1] > 0, q[1] * np.where(q[1] > 0, log_last[:, i], 0), 0))
        for t in range(2, T + 1):
            start = jnp.broadcast_to(jnp.asarray(x_0), levels.shape)
            bridge = kernel.bridge(jnp.asarray(levels), start, reverse.steps.at(t, 0))
            kl = np.asarray(dist.kl_divergence(bridge, reverse_law(t))).sum(-1)
            bound[i] -= np.sum(np.where(q[t] > 0, q[t] * np.where(q[t] > 0, kl, 0), 0))
        pi = joint(kernel.stationary((1, L)), levels)[0]
        here = q[T] > 0
        bound[i] -= np.sum(q[T][here] * np.log(q[T][here] / pi[here]))
    return data, p_0, bound


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_bound_and_importance_estimate_agree_with_enumeration(case):
    diffusion, params = tiny(*CASES[case])
    data, p_0, bound = enumerate_diffusion(diffusion, params)
    assert p_0.sum() == pytest.approx(1, abs=1e-5)
    assert (bound <= np.log(p_0) + 1e-6).all()
    assert (np.log(p_0) - bound).max() > 1e-3  # the network is no posterior: the bound is strict

    n = 5_000
    tree = diagnostics.bound(jax.random.key(0), diffusion, params, data, num_draws=n)
    found = tree["bound"]["bound"].values
    draws = diagnostics.bound(jax.random.key(1), diffusion, params, np.repeat(data, 200, axis=0))[
        "bound"
    ]["bound"].values.reshape(len(data), 200)
    error = draws.std(1) / math.sqrt(n)
    assert (np.abs(found - bound) < 4.5 * error + 1e-4).all()

    # eq. 9: the mean over forward trajectories of p(x_0..T)/q(x_1..T | x_0) is p(x_0)
    reverse = diffusion.bind(params)
    forward = ForwardTrajectory.of(reverse, jnp.asarray(data))
    trajectories = forward.sample(jax.random.key(2), (n,))
    x_1 = trajectories[:, :, 0]
    log_w = (
        ReverseTrajectory(reverse).log_prob(trajectories)
        - forward.log_prob(trajectories)
        + reverse.data(x_1).log_prob(jnp.asarray(data))
    )
    w = np.exp(np.asarray(log_w, float))
    assert (np.abs(w.mean(0) - p_0) < 4.5 * w.std(0) / math.sqrt(n) + 1e-7).all()
    elbo = np.asarray(log_w, float)
    assert (np.abs(elbo.mean(0) - bound) < 4.5 * elbo.std(0) / math.sqrt(n) + 1e-4).all()


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_every_objective_estimates_the_enumerated_bound(case):
    diffusion, params = tiny(*CASES[case])
    data, _, bound = enumerate_diffusion(diffusion, params)
    x = jnp.asarray(data[[1, 5]])
    expected = bound[[1, 5]].sum()
    routes = [
        (Trace_ELBO(), diffusion.model, diffusion.guide),
        (SampledTimeELBO(), diffusion.model, diffusion.guide),
        (TraceMeanField_ELBO(), diffusion.model_by_step, diffusion.guide_by_step),
    ]
    for objective, model, guide in routes:
        one = jax.jit(lambda k, o=objective, m=model, g=guide: -o.loss(k, params, m, g, x))
        values = np.asarray(jax.lax.map(one, jax.random.split(jax.random.key(4), 6_000)), float)
        error = values.std() / math.sqrt(len(values))
        assert abs(values.mean() - expected) < 4 * error, type(objective).__name__


@pytest.mark.long
def test_draws_of_the_model_have_the_enumerated_law():
    for case in ("bits, tied", "absorbing"):
        diffusion, params = tiny(*CASES[case])
        data, p_0, _ = enumerate_diffusion(diffusion, params)
        n = 20_000
        draws = Predictive(diffusion.model, params=params, num_samples=n, parallel=True)(
            jax.random.key(3)
        )["x_0"]
        share = (np.asarray(draws)[:, None] == data[None]).all(-1).mean(0)
        assert (np.abs(share - p_0) < 4.5 * np.sqrt(p_0 * (1 - p_0) / n)).all()


@pytest.mark.long
def test_stock_svi_trains_bits_without_a_warning():
    """Warnings are errors here; the loss must fall by more than its noise."""
    diffusion, _ = tiny(BernoulliKernel(0.5), readouts.Tied())
    x = jnp.array([[0, 0, 0], [1, 1, 1]] * 8)
    for objective in (Trace_ELBO(), SampledTimeELBO(num_times=4)):
        svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-2), objective)
        losses = svi.run(jax.random.key(0), 1_500, x, progress_bar=False).losses
        first, last = np.asarray(losses[:100]), np.asarray(losses[-100:])
        error = np.hypot(first.std(), last.std()) / math.sqrt(100)
        assert last.mean() < first.mean() - 4 * error


@pytest.mark.long
def test_missing_bits_leave_the_bound_of_the_observed():
    """With bits that the network treats alone, what is missing must not count."""
    rate = 0.3
    diffusion = Diffusion(
        BernoulliKernel(rate),
        schedules.harmonic(6),
        lambda x_t, t: jnp.zeros(x_t.shape),
        event_shape=(3,),
        readout=readouts.Logits(),
    )
    # data whose entries are B(rate): the process is stationary, so K = log p(x_0) exactly
    x = jnp.array([[0, 1, 1], [1, 0, 0]])
    mask = jnp.array([[True, False, True], [True, True, False]])
    expected = float(jnp.sum(jnp.where(mask, jnp.log(jnp.where(x == 1, rate, 1 - rate)), 0)))
    for key in range(3):
        loss = Trace_ELBO().loss(
            jax.random.key(key), {}, diffusion.model, diffusion.guide, x, mask=mask
        )
        assert float(-loss) == pytest.approx(expected, abs=1e-4)


@pytest.mark.long
def test_entropy_form_is_a_bound_only_with_its_correction():
    """Bits far from the kernel's rate: eq. 14 alone is off by the correction."""
    diffusion, params = tiny(BernoulliKernel(0.3), readouts.Tied())
    data, _, bound = enumerate_diffusion(diffusion, params)
    kl = diagnostics.bound(jax.random.key(0), diffusion, params, data, num_draws=20_000)
    key, kl = jax.random.key(0), kl["bound"]["kl"].values
    plain, correction = diagnostics.entropy_form(key, diffusion, params, data, kl)
    assert np.allclose(plain + correction, bound, atol=0.03)
    # FACTS of the correction: −(a − m)(ᾱ_T + β_1) log((1−m)/m) for each bit of mean activity a
    activity = data.sum(1)
    by_hand = -(activity - 3 * 0.3) * (0 + 1 / 4) * math.log(0.7 / 0.3)
    assert np.allclose(correction, by_hand, atol=1e-5)
    assert np.abs(by_hand).max() > 0.1


def test_gradient_based_mcmc_refuses_a_diffusion_of_bits():
    diffusion, params = tiny(BernoulliKernel(0.3), readouts.Tied())
    prior = diffusion.prior(params)
    with pytest.raises(NotImplementedError):
        MCMC(NUTS(prior), num_warmup=1, num_samples=1, progress_bar=False).run(jax.random.key(0))


def bits(**options):
    arguments = {
        "kernel": BernoulliKernel(0.3),
        "beta": schedules.harmonic(5),
        "network": lambda x_t, t: jnp.zeros(x_t.shape),
        "event_shape": (3,),
    } | options
    return Diffusion(
        arguments.pop("kernel"), arguments.pop("beta"), arguments.pop("network"), **arguments
    )


def made_for(outputs):
    return networks.Perceptron((3,), 4, 1, 5, outputs=outputs, rngs=nnx.Rngs(0))


BAD = {
    "for Logits(); got (B, 6); pass outputs= to the network: 1 for bits": lambda: bits(
        network=made_for(2)
    ),
    "shape (B, 12) at event_shape (3,) for DataLogits(); got (B, 3); pass outputs= to the "
    "network: 1 for bits, the number of classes (with states=) for classes": lambda: bits(
        kernel=CategoricalKernel(4), network=made_for(1)
    ),
    "rate must lie in (0, 1); got 0.0": lambda: BernoulliKernel(0.0),
    "rate must lie in (0, 1); got 1.0": lambda: BernoulliKernel(1.0),
    "num_classes must be at least 2; got 1": lambda: CategoricalKernel(1),
    "beta must be fixed": lambda: bits(
        beta=schedules.learned(schedules.linear(5, beta_1=0.1, beta_T=0.5))
    ),
    "loc and scale must be 0 and 1 for symbols; got 0.0, 2.0": lambda: bits(scale=2.0),
    "last_step must be Learned": lambda: bits(
        kernel=AbsorbingKernel(2),
        readout=readouts.DataLogits(),
        last_step=readouts.Tied(),
        network=lambda x_t, t: jnp.zeros((*x_t.shape[:-1], 6)),
    ),
    "beta_T must be 1": lambda: bits(
        kernel=AbsorbingKernel(2),
        beta=schedules.linear(5),
        network=lambda x_t, t: jnp.zeros((*x_t.shape[:-1], 6)),
    ),
    "readout Logits is for bits": lambda: bits(
        kernel=CategoricalKernel(3), readout=readouts.Logits()
    ),
    "readout Epsilon is for GaussianKernel": lambda: bits(
        readout=readouts.Epsilon(), beta=schedules.linear(5)
    ),
    "rate must be a number or broadcastable to event_shape (3,); got shape (2,)": lambda: bits(
        kernel=BernoulliKernel((0.1, 0.2))
    ),
    "x_0_hat is for numbers and bits": lambda: readouts.DataLogits().x_0_hat(
        CategoricalKernel(3), (), jnp.zeros(1, int), schedules.steps(BETAS["harmonic"]).at(2, 0)
    ),
    "x_0 must hold only 0..1": lambda: bits().guide(jnp.array([[0, 1, 2]])),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_name(message):
    with numpyro.handlers.seed(rng_seed=0), pytest.raises(ValueError, match=re.escape(message)):
        BAD[message]()


def test_a_network_of_ones_own_is_not_told_of_outputs_that_it_does_not_take():
    with pytest.raises(ValueError, match=re.escape("for Logits(); got (B, 6)") + "$"):
        bits(network=lambda x_t, t: jnp.zeros((len(x_t), 6)))


def test_a_kernel_of_ones_own_is_read_as_classes_are():
    class Letters(DiscreteKernel):
        num_states = num_data_states = 3

        @property
        def log_pi(self):
            return jnp.log(jnp.array([0.5, 0.3, 0.2]))

    def network(x_t, t):
        return jnp.zeros((len(x_t), 3))

    diffusion = Diffusion(Letters(), schedules.harmonic(4), network, event_shape=())
    assert diffusion.readout == readouts.DataLogits()
    assert diffusion.last_step == readouts.Learned()
