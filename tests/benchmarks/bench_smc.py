"""Cost of `infer.SMC` over a hand-written scan with the same network calls, and its compile time.

    python tests/benchmarks/bench_smc.py [--rounds 10]

A step of SMC calls the network once and pulls one vector back through it. The floor does the same
for as many particles and draws the reverse step: no likelihood, no twist, no weights, no
resampling. Two perceptrons: of a million parameters on 64 numbers, and a small one on 2. Compile
time is that of a first run less that of a second, at other T and other numbers of particles.
"""

import argparse
import math
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx

from probdiff import Diffusion, GaussianKernel, infer, networks, schedules

warnings.simplefilter("ignore", infer.InferenceWarning)  # of a network that was never trained


def model(d, width, depth, T):
    network = networks.Perceptron((d,), width, depth, T, rngs=nnx.Rngs(0))
    beta = schedules.log_snr_linear(T, beta_1=1e-3, alpha_bar_T=1e-3)
    diffusion = Diffusion(GaussianKernel(), beta, network, event_shape=(d,))
    return diffusion, {"x_0_network$params": diffusion._binding.init}


def sampler(diffusion, params, n):
    prior = diffusion.prior(params)

    def program(y):
        numpyro.sample("y", dist.Normal(prior(), 0.5).to_event(1), obs=y)

    return infer.SMC(program, num_particles=n, num_runs=1, block_size=n)


def scan(diffusion, params, n):
    """Network, one vector through its transpose, and a Gaussian draw, level by level."""
    steps, weights = schedules.steps(diffusion.schedule), params["x_0_network$params"]
    apply, shape = diffusion._binding.apply, (n, *diffusion.event_shape)

    @jax.jit
    def run(key, weights):
        def one(x, inputs):
            t, key = inputs
            out, pull_back = jax.vjp(lambda x: apply(weights, x, jnp.full(n, t), None), x)
            z, v = jnp.split(out, 2, -1)
            beta = steps.beta[t - 1]
            pulled = pull_back(jnp.concatenate([x, jnp.zeros_like(x)], -1))[0]
            mean = jnp.sqrt(1 - beta) * x + jnp.sqrt(beta) * z + 1e-6 * pulled
            sd = jnp.sqrt(jax.nn.sigmoid(v + jnp.log(beta) - jnp.log1p(-beta)))
            return mean + sd * jax.random.normal(key, shape), None

        times = jnp.arange(2, diffusion.T + 1)
        x = jax.random.normal(key, shape)
        keys = jax.random.split(key, len(times))
        return jax.lax.scan(one, x, (times, keys), reverse=True)[0]

    return lambda: jax.block_until_ready(run(jax.random.key(0), weights))


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cost(d, width, depth, n, rounds, T=100):
    diffusion, params = model(d, width, depth, T)
    smc, y = sampler(diffusion, params, n), np.zeros(d, np.float32)
    runs = {"smc": lambda: smc.run(jax.random.key(0), y), "floor": scan(diffusion, params, n)}
    for run in runs.values():
        run()
    ratios = []
    for i in range(rounds):
        spent = {name: seconds(runs[name]) for name in sorted(runs, reverse=bool(i % 2))}
        ratios.append(spent["smc"] / spent["floor"])
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    error = np.std(ratios, ddof=1) / math.sqrt(rounds)
    print(
        f"{count:,} parameters, {d} numbers, {n} particles, T = {T}: "
        f"{np.mean(ratios):.3f} ± {error:.3f} (median {np.median(ratios):.3f})",
        flush=True,
    )


def compile_time(T, n):
    diffusion, params = model(2, 64, 2, T)
    smc, y = sampler(diffusion, params, n), np.zeros(2, np.float32)
    first, second = (seconds(lambda: smc.run(jax.random.key(0), y)) for _ in range(2))
    return first - second


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    cost(64, 660, 3, 1024, rounds)
    cost(2, 64, 2, 1024, rounds)
    for T, n in ((40, 256), (1000, 256), (40, 4096)):
        print(f"compile time, T = {T}, {n} particles: {compile_time(T, n):.1f} s", flush=True)


if __name__ == "__main__":
    main()
