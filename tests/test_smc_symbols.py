"""SMC over diffusions of bits and classes against full enumeration.

A diffusion of L = 3 symbols and T = 4 steps has so few states that the product of its transition
matrices gives the exact law p(x_0), and with it for any r

    Z = Σ p(x_0) r(x_0),    p(x_0 | r) = p(x_0) r(x_0) / Z.

The network is a table of random outputs, one row for each state and time: no posterior of any data,
so that the twist is wrong and the weights have work to do. A plate of equal entries gives
independent runs, over which Ẑ must have mean Z whatever the number of particles.

Source: Sohl-Dickstein et al. (2015), section 2.5; Del Moral et al. (2006) for the mean of Ẑ.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from oracles import enumerate_diffusion
from probdiff import (
    AbsorbingKernel,
    BernoulliKernel,
    CategoricalKernel,
    Diffusion,
    infer,
    readouts,
    schedules,
)
from probdiff.infer.steps import SymbolProposal
from probdiff.infer.symbols import inform

T, L = 4, 3
KERNELS = {
    "bits, logits": (BernoulliKernel(0.3), readouts.Logits(), readouts.Tied()),
    "bits, data logits": (BernoulliKernel(0.3), readouts.DataLogits(), readouts.Learned()),
    "classes": (CategoricalKernel(3), readouts.DataLogits(), readouts.Learned()),
    "absorbing": (AbsorbingKernel(3), readouts.DataLogits(), readouts.Learned()),
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS)
pytestmark = pytest.mark.filterwarnings("ignore::probdiff.infer.InferenceWarning")


class Lookup(NamedTuple):
    """A diffusion with its exact law."""

    diffusion: Diffusion
    data: np.ndarray
    """All states of x_0, `(K^L, L)`."""
    p: np.ndarray
    """Their probabilities."""


def lookup(kernel, scale=0.9):
    """A diffusion whose network looks its outputs up, random numbers of sd `scale`."""
    law, readout, last_step = KERNELS[kernel]
    outputs = L * readout.num_outputs(law)
    table = scale * np.random.default_rng(4).normal(size=(T, law.num_states**L, outputs))
    table = jnp.asarray(table, jnp.float32)
    place = law.num_states ** jnp.arange(L)

    def network(x_t, t):
        return table[t - 1, (x_t * place).sum(-1)]

    diffusion = Diffusion(
        law,
        schedules.harmonic(T),
        network,
        event_shape=(L,),
        readout=readout,
        last_step=last_step,
    )
    return Lookup(diffusion, *enumerate_diffusion(diffusion))


# Likelihoods: log r of states, the same function for the program and for the oracle

FLIPS = 0.15
SEEN = 1, 0, 1


def noisy(x):
    """Every entry read with errors, uniform over the other states: a product over entries."""
    return jnp.where(x == jnp.array(SEEN), math.log(1 - FLIPS), math.log(FLIPS / 2)).sum(-1)


def total(x):
    """The sum of the entries, read with noise: no product over entries."""
    return dist.Normal(2.0, 0.5).log_prob(x.sum(-1))


def even(x):
    """The sum is even, for sure: no change of one entry keeps r above 0."""
    return jnp.where(x.sum(-1) % 2 == 0, 0.0, -jnp.inf)


LIKELIHOODS = noisy, total, even
KNOWN = np.array([1, 0, 2])
MASKS = [False] * 3, [True, False, False]
RUNS, SIZE = 400, 64


def compiled(kernel):
    """A diffusion, and a sampler of many small runs whose likelihood and mask are arguments."""
    model = lookup(kernel)
    prior = model.diffusion.prior({})
    known = jnp.broadcast_to(KNOWN % model.diffusion.kernel.num_data_states, (RUNS, L))

    def program(which, mask):
        with numpyro.plate("run", RUNS):
            x = prior(known=known, mask=jnp.broadcast_to(mask, (RUNS, L)))
            numpyro.factor("r", jnp.stack([f(x) for f in LIKELIHOODS])[which])

    return model, infer.SMC(program, num_particles=SIZE, num_runs=1)


def check_run(model, smc, joint):
    """Over runs Ẑ has mean Z, and Ẑ times the weight of each state its p r."""
    outcome = smc.result.outcome
    weights = np.exp(outcome.log_weights[0] + outcome.log_evidences)
    assert within(np.exp(smc.log_evidence), joint.sum())
    assert within(shares(model, outcome.x_0[0], weights), joint)


def shares(model, draws, weights):
    """Weight of each state of x_0, `(RUNS, states)`, from draws `(SIZE, RUNS, L)`."""
    place = model.diffusion.kernel.num_data_states ** np.arange(L)[::-1]
    index = (draws * place).sum(-1)
    return np.stack([(weights * (index == i)).sum(0) for i in range(len(model.data))], 1)


def within(found, expected):
    """Whether means over runs are within 4 standard errors.

    A state that is hardly ever drawn has no error to speak of: a thousandth of all is let pass.
    """
    error = found.std(0) / math.sqrt(len(found))
    gap = np.abs(found.mean(0) - expected)
    return (gap <= 4 * error + 1e-3 * np.sum(expected)).all() and error.max() < 0.2 * expected.max()


def joint_of(model, log_r, mask):
    """p(x_0) r(x_0) where the known entries are met."""
    known = KNOWN % model.diffusion.kernel.num_data_states
    is_met = ((model.data == known) | ~np.array(mask)).all(-1)
    return model.p * is_met * np.exp(np.asarray(log_r(jnp.asarray(model.data)), float))


@pytest.mark.long
@every_kernel
def test_evidence_and_posterior_have_no_bias_however_few_the_particles(kernel):
    """E Ẑ = Z, and E Ẑ Σ w f(x_0) = Σ p r f for the indicator f of every state."""
    model, smc = compiled(kernel)
    for (which, log_r), mask in itertools.product(enumerate(LIKELIHOODS), MASKS):
        smc.run(jax.random.key(2), jnp.array(which), jnp.array(mask))
        check_run(model, smc, joint_of(model, log_r, mask))


@pytest.mark.long
def test_known_entries_alone_are_conditioned_on_exactly():
    model = lookup("absorbing")
    prior, mask = model.diffusion.prior({}), MASKS[1]
    known = np.broadcast_to(KNOWN % model.diffusion.kernel.num_data_states, (RUNS, L))

    def program():
        with numpyro.plate("run", RUNS):
            prior(known=known, mask=np.broadcast_to(mask, (RUNS, L)))

    smc = infer.SMC(program, num_particles=SIZE, num_runs=1)
    smc.run(jax.random.key(3))
    check_run(model, smc, joint_of(model, lambda x: jnp.zeros(len(x)), mask))
    assert (smc.get_samples()["x_0"][..., 0] == known[0, 0]).all()


# The twist by itself

informed = jax.jit(inform, static_argnums=1)


@jax.jit
def draw(key, proposal):
    """States, and the log ratios of p to what they were drawn from."""
    return proposal.draw(key, None)


def law(seed, shape=(5, 1, L, 3)):
    """log p_i(k) of five particles."""
    return jax.nn.log_softmax(jax.random.normal(jax.random.key(seed), shape), -1)


def brute_force(log_p, log_r):
    """log E[r] under a product of laws, by all states, of particles of one system."""
    states = jnp.array(list(itertools.product(range(log_p.shape[-1]), repeat=L)))
    log_joint = sum(log_p[:, 0, i, states[:, i]] for i in range(L)) + log_r(states)
    return jax.nn.logsumexp(log_joint, -1), states, log_joint


def test_twist_is_the_exact_integral_where_r_is_a_product(x64):
    log_p = law(0)
    found = informed(log_p, noisy, None, None)
    log_z, states, log_joint = brute_force(log_p, noisy)
    np.testing.assert_allclose(found.log_psi[:, 0], log_z, atol=1e-10)
    for i, k in itertools.product(range(L), range(3)):
        mass = jax.nn.logsumexp(jnp.where(states[:, i] == k, log_joint, -jnp.inf), -1) - log_z
        np.testing.assert_allclose(found.log_p_0[:, 0, i, k], mass, atol=1e-10)


def test_twist_counts_the_mass_of_known_entries(x64):
    log_p, mask = law(1), jnp.array([True, False, True])
    found = informed(log_p, None, jnp.array([KNOWN]), mask)
    log_p, log_p_0 = log_p[:, 0], found.log_p_0[:, 0]
    np.testing.assert_allclose(found.log_psi[:, 0], log_p[:, 0, 1] + log_p[:, 2, 2], atol=1e-12)
    np.testing.assert_allclose(jnp.exp(log_p_0[:, 2]), [[0, 0, 1]] * 5)
    np.testing.assert_allclose(log_p_0[:, 1], log_p[:, 1], atol=1e-12)


@pytest.mark.parametrize("log_r", [total, even])
def test_twist_stays_near_the_integral_where_r_joins_entries(x64, log_r):
    """One sweep at the most probable state may promise e^10000 times too much."""
    log_p = law(2, (200, 1, L, 3))
    found = informed(log_p, log_r, None, None)
    log_z, _, _ = brute_force(log_p, log_r)
    assert np.abs(found.log_psi[:, 0] - log_z).max() < 2.5


def test_proposal_that_is_p_leaves_weights_that_are_exactly_one(key):
    log_p = law(3, (1000, L, 3))
    _, log_ratio = draw(key, SymbolProposal(log_p, log_p, jnp.zeros(1000)))
    assert (np.asarray(log_ratio) == 0).all()


def test_proposal_weighs_every_state_to_its_probability(key):
    """Σ over draws of p/q at a state is p; and no weight exceeds ten."""
    n = 40_000
    log_p, log_q = (jnp.broadcast_to(law(s, (1, 2, 3)), (n, 2, 3)) for s in (4, 5))
    sure = jnp.where(jnp.arange(3) == 1, 0.0, -1e3) + jnp.zeros_like(log_q)
    for proposed in (log_q, sure):
        x, log_ratio = draw(key, SymbolProposal(log_p, proposed, jnp.zeros(n)))
        weight = np.exp(log_ratio)
        assert weight.max() < 10.01
        for state in itertools.product(range(3), repeat=2):
            found = weight * (np.asarray(x) == state).all(-1)
            exact = float(jnp.exp(log_p[0, 0, state[0]] + log_p[0, 1, state[1]]))
            assert abs(found.mean() - exact) < 4 * found.std() / math.sqrt(n)


def test_proposal_never_takes_a_state_that_is_ruled_out(key):
    log_p = law(6, (5000, L, 3))
    log_q = jnp.where(jnp.arange(3) == 0, -1e4, log_p)
    x, log_ratio = draw(key, SymbolProposal(log_p, log_q, jnp.zeros(5000)))
    assert (x > 0).all()
    assert np.isfinite(log_ratio).all()
