"""What `fit` costs over a hand-written `jax.jit(lax.scan)` of the same step.

Both run `svi.update` with the same objective, batches and averaged weights: a perceptron with two
hidden layers of 128, 1024 examples a step. The scan reads nothing back until its end, shows no bar
and checks nothing. Rounds alternate between the two, so that a busy machine troubles both alike.

    python tests/benchmarks/bench_fit.py --rounds 30
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from jax import lax, random
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, Trace_ELBO

from probdiff import fit
from probdiff.train.data import Minibatches

N, BATCH, DECAY = 10_000, 1024, 0.999


def make_svi():
    """Regression of the plane on itself by a perceptron."""
    rngs = nnx.Rngs(0)
    layers = [nnx.Linear(2, 128, rngs=rngs), nnx.silu, nnx.Linear(128, 128, rngs=rngs), nnx.silu]
    net = nnx.Sequential(*layers, nnx.Linear(128, 2, rngs=rngs))

    def model(x):
        mean = nnx_module("net", net)
        with numpyro.plate("data", len(x)):
            noisy = numpyro.sample("noisy", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(mean(noisy), 1.0).to_event(1), obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("noisy", dist.Normal(x, 0.5).to_event(1))

    return SVI(model, guide, optax.adam(1e-3), Trace_ELBO())


def make_scan(svi):
    """The floor: a function (state, average, data, rows) of one compiled scan."""

    def step(carry, rows, data):
        state, ema, i = carry
        state, loss = svi.update(state, data[rows])
        d = jnp.minimum(DECAY, (1.0 + i) / (10.0 + i))
        params = svi.get_params(state)
        ema = jax.tree.map(lambda mean, new: d * mean + (1 - d) * new, ema, params)
        return (state, ema, i + 1), loss

    @jax.jit
    def run(state, ema, data, rows):
        return lax.scan(partial(step, data=data), (state, ema, 0), rows)

    return run


def data_and_rows(num_steps):
    """Points of the plane, and the rows of each batch as `fit` draws them."""
    data = random.normal(random.key(1), (N, 2))
    _, key_batches, _ = random.split(random.key(0), 3)
    return data, jnp.asarray(Minibatches(key_batches, data, BATCH, None).rows(0, num_steps))


def start(svi, data, rows):
    """The scan as a function of nothing, from the state that `fit` starts from."""
    key_init, _, _ = random.split(random.key(0), 3)
    state = jax.jit(svi.init)(key_init, data[rows[0]])
    scan, ema = make_scan(svi), svi.get_params(state)
    return lambda: scan(state, ema, data, rows)


def fitted(svi, data, num_steps):
    """`fit` as a function of nothing."""
    options = {"num_steps": num_steps, "batch_size": BATCH, "ema_decay": DECAY}
    return lambda: fit(random.key(0), svi, data, **options, progress=False)


def timed(call):
    """(wall, CPU) seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - wall, time.process_time() - cpu


def main():
    """Print the ratio of `fit` to the scan, with its standard error over the rounds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    rounds, num_steps = options.rounds, options.steps
    svi, (data, rows) = make_svi(), data_and_rows(num_steps)
    contestants = {"scan": start(svi, data, rows), "fit": fitted(svi, data, num_steps)}
    whole, one_step = contestants["fit"](), fitted(svi, data, 1)
    (_, average, _), losses = contestants["scan"]()
    np.testing.assert_allclose(whole.losses, losses, rtol=1e-3)
    for mine, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-2, atol=1e-4)
    seconds = {name: [] for name in contestants}
    for i in range(rounds):
        for name in sorted(contestants, reverse=bool(i % 2)):
            seconds[name].append(timed(contestants[name]))
    fit_seconds, scan_seconds = np.array(seconds["fit"]), np.array(seconds["scan"])
    logs = np.log(fit_seconds / scan_seconds)
    call = np.median([timed(one_step) for _ in range(10)], axis=0) * 1e3
    for column, clock in enumerate(("wall", "CPU")):
        mean, error = logs[:, column].mean(), logs[:, column].std(ddof=1) / rounds**0.5
        best = fit_seconds[:, column].min() / scan_seconds[:, column].min()
        middle = np.exp(np.median(logs[:, column]))
        median = np.median(scan_seconds[:, column]) / num_steps * 1e6
        print(
            f"{clock}: fit / scan = {np.exp(mean):.4f} ± {np.exp(mean) * error:.4f}, "
            f"median {middle:.4f}, best / best {best:.4f}, scan {median:.0f} us a step; "
            f"a fit of one step {call[column]:.0f} ms"
        )


if __name__ == "__main__":
    main()
