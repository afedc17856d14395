"""Moves of trajectories of symbols against enumeration, alone and with an unknown flip rate.

The diffusions of three symbols are those of `test_smc_symbols`: four steps, a network of random
outputs, for which q(x_1..x_T | x_0) is not p(x_1..x_T | x_0), so that every ratio counts.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from arviz_stats.base import array_stats
from scipy.special import betaln

from probdiff import BernoulliKernel, Diffusion, datasets, infer, readouts, schedules
from probdiff.experiments.heartbeat.exact import RATE, exact_network
from probdiff.infer import conditional
from probdiff.infer.program import read
from probdiff.infer.spread import Problem
from probdiff.infer.symbols import SymbolTwist
from test_smc_symbols import KERNELS, L, lookup, total, within

CHAINS, SWEEPS = 300, 40


def shares(model, x_0):
    """Share of each state of x_0 among draws `(draws, chains, L)`, `(chains, states)`."""
    index = (x_0 * model.diffusion.kernel.num_data_states ** np.arange(L)[::-1]).sum(-1)
    return np.stack([(index == i).mean(0) for i in range(len(model.data))], 1)


@pytest.mark.parametrize(
    "kernel",
    KERNELS,
)
@pytest.mark.long
def test_moves_of_three_particles_keep_the_posterior(kernel, monkeypatch):
    """300 chains of 40 moves after 5: each state's share within 4 standard errors over chains."""
    model = lookup(kernel, scale=2.5)
    prior = model.diffusion.prior({})
    monkeypatch.setattr(conditional, "_THRESHOLD", 1.1)

    def program():
        with numpyro.plate("chains", CHAINS):
            numpyro.factor("r", total(prior()))

    conditioned = read(program, (), {}).conditioned
    problem = Problem(conditioned, conditioned.reverse, None, None, False, False)

    joint = model.p * np.exp(np.asarray(total(jnp.asarray(model.data)), float))
    posterior = joint / joint.sum()
    rng = np.random.default_rng(0)
    x_0 = jnp.asarray(model.data[rng.choice(len(posterior), CHAINS, p=posterior)], jnp.int32)

    @jax.jit
    def moved(key):
        def move(trajectory, key):
            trajectory, *_ = conditional.move(key, problem, SymbolTwist(), 3, trajectory)
            return trajectory, trajectory.x[0]

        key_begin, key_moves = jax.random.split(key)
        start = conditional.begin(key_begin, problem, x_0)
        return jax.lax.scan(move, start, jax.random.split(key_moves, 5 + SWEEPS))[1][5:]

    x_0 = np.asarray(moved(jax.random.key(0)))
    assert within(shares(model, x_0), posterior)


A, B = 2.0, 8.0  # an unknown flip rate ε ~ Beta(A, B)


def flips(x_0, rate, num_states):
    """Law of what is seen of symbols: each, with probability ε, any other state."""
    is_state = x_0[..., None] == jnp.arange(num_states)
    rate = jnp.asarray(rate)[..., None, None]
    probs = jnp.where(is_state, 1 - rate, rate / (num_states - 1))
    return dist.Categorical(probs=probs).to_event(1)


def exact_joint(data, p, seen, num_states):
    """p(x_0, y), ε summed over, and E[ε | x_0, y]: h entries of y differ from those of x_0."""
    size = data.shape[1]
    h = (data != seen).sum(1)
    log_r = betaln(A + h, B + size - h) - betaln(A, B) - h * np.log(num_states - 1)
    return p * np.exp(log_r), (A + h) / (A + B + size)


def mean_and_se(draws):
    """Of `(chains, draws)`, by ArviZ's effective number; that of a constant is 0."""
    draws = draws.astype(np.float64)
    if draws.std() == 0:
        return draws.mean(), 0.0
    number = array_stats.ess(draws, chain_axis=0, draw_axis=1)
    assert array_stats.rhat(draws, chain_axis=0, draw_axis=1) < 1.03
    return draws.mean(), draws.std() / np.sqrt(number)


def heartbeats_of_12_bits(T=8):
    """The best diffusion of four sequences, and its p(x_0) by matrices between all states."""
    network = exact_network(
        schedules.steps(schedules.harmonic(T)), datasets.heartbeat_sequences(length=12, period=4)
    )
    diffusion = Diffusion(
        BernoulliKernel(RATE),
        schedules.harmonic(T),
        network,
        event_shape=(12,),
        readout=readouts.DataLogits(),
        last_step=readouts.Tied(),
    )
    x = np.array(list(itertools.product((0, 1), repeat=12)))
    reverse = diffusion.bind({})

    def matrix(law):
        one = np.asarray(law.mean, np.float64)
        return np.exp(np.log(one) @ x.T + np.log1p(-one) @ (1 - x.T))

    p = matrix(reverse.kernel.stationary((1, 12)))[0]
    for t in range(T, 1, -1):
        p = p @ matrix(jax.jit(reverse.step)(jnp.asarray(x), jnp.full(len(x), t)))
    return diffusion, x, p @ matrix(reverse.data(jnp.asarray(x)).base)


@pytest.mark.long
def test_12_bits_and_an_unknown_flip_rate_have_their_joint_posterior(capsys):
    """Two phases are possible; 16 chains of 500."""
    diffusion, data, p = heartbeats_of_12_bits()
    prior, seen = diffusion.prior({}), np.array([1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0])

    def program(seen):
        rate = numpyro.sample("rate", dist.Beta(A, B))
        numpyro.sample("y", flips(prior(), rate, 2), obs=seen)

    options = {"num_chains": 16, "num_warmup": 50, "num_samples": 500, "num_particles": 16}
    gibbs = infer.ParticleGibbs(program, **options)
    gibbs.run(jax.random.key(0), jnp.asarray(seen))
    draws = gibbs.get_samples(group_by_chain=True)
    joint, rate = exact_joint(data, p, seen, 2)
    posterior = joint / joint.sum()
    found, error = zip(*(mean_and_se(draws["x_0"][..., i]) for i in range(12)), strict=True)
    assert np.abs(np.array(found) - posterior @ data).max() < 0.02
    assert (np.abs(np.array(found) - posterior @ data) < 4 * np.array(error)).all()
    mean, se = mean_and_se(draws["rate"])
    assert abs(mean - posterior @ rate) < 4 * se < 0.02
    gibbs.print_summary()
    assert "no warnings" in capsys.readouterr().out
    of_z = gibbs.log_evidence(jax.random.key(1), num_samples=100)
    assert abs(of_z.log_evidence - np.log(joint.sum())) < 3 * of_z.se < 0.3


@pytest.mark.parametrize(
    "kernel",
    [pytest.param(k, marks=pytest.mark.slow if i else pytest.mark.long)
     for i, k in enumerate(KERNELS)],
)  # fmt: skip
def test_symbols_beside_a_known_one_and_an_unknown_flip_rate_have_their_posterior(kernel):
    """Two systems in a plate, each with a flip rate; 16 chains of 400."""
    model = lookup(kernel)
    num_states, prior = model.diffusion.kernel.num_data_states, model.diffusion.prior({})
    known, mask = np.array([[1, 0, 0]] * 2), np.array([[True, False, False]] * 2)
    seen = np.array([[1, 0, 1], [0, 1, 1]])

    def program(seen):
        with numpyro.plate("rows", 2):
            rate = numpyro.sample("rate", dist.Beta(A, B))
            numpyro.sample("y", flips(prior(known=known, mask=mask), rate, num_states), obs=seen)

    options = {"num_chains": 16, "num_warmup": 50, "num_samples": 400, "num_particles": 4}
    gibbs = infer.ParticleGibbs(program, **options)
    gibbs.run(jax.random.key(0), jnp.asarray(seen))
    draws = gibbs.get_samples(group_by_chain=True)
    assert (draws["x_0"][..., 0] == 1).all()
    is_met, log_z = model.data[:, 0] == 1, 0.0
    for row in range(2):
        joint, rate = exact_joint(model.data, model.p * is_met, seen[row], num_states)
        posterior, log_z = joint / joint.sum(), log_z + np.log(joint.sum())
        for i, k in itertools.product((1, 2), range(num_states)):
            mean, se = mean_and_se(draws["x_0"][:, :, row, i] == k)
            assert abs(mean - posterior @ (model.data[:, i] == k)) < 4 * se
        mean, se = mean_and_se(draws["rate"][..., row])
        assert abs(mean - posterior @ rate) < 4 * se
    of_z = gibbs.log_evidence(jax.random.key(1), num_samples=100)
    assert abs(of_z.log_evidence - log_z) < 4 * of_z.se < 0.8
    tree = gibbs.to_datatree()
    assert tree["posterior"]["x_0"].dims == ("chain", "draw", "rows", "x_0_dim_0")
    assert tree["sample_stats"]["acceptance_rate"].dims == ("chain", "draw", "rows")
    assert tree.attrs["num_particles"] == 4
