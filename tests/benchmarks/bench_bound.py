"""Peak memory of `diagnostics.bound`, and its time over that of its network calls alone.

    python tests/benchmarks/bench_bound.py [--rounds 4] [--T 1000] [--examples 100]

A U-Net on 28 × 28 images, one draw per step. The floor calls the network T − 1
times on the same number of images in one compiled loop, and does nothing else. Memory is the
process's peak before the floor is built, less what it held when data and model were made.
"""

import argparse
import math
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from probdiff import Diffusion, GaussianKernel, diagnostics, networks, schedules

MEGABYTE = 1024**2


def peak():
    """Largest resident memory so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE


def model(T, examples):
    """A U-Net on 28 × 28 images, its parameters, and as many images of noise."""
    network = networks.UNet((28, 28), (32, 64), 2, T=T, patch=2, rngs=nnx.Rngs(0))
    beta = schedules.log_snr_linear(T, beta_1=1e-4, alpha_bar_T=1e-3)
    diffusion = Diffusion(GaussianKernel(), beta, network, event_shape=(28, 28))
    x = np.random.default_rng(0).standard_normal((examples, 28, 28)).astype(np.float32)
    return diffusion, x


def bounded(diffusion, x):
    """The bound as a function of nothing."""
    params = {"x_0_network$params": diffusion._binding.init}
    bound = diagnostics.bound
    return lambda: bound(jax.random.key(0), diffusion, params, x)["bound"].attrs["mean"]


def calls_alone(diffusion, x):
    """The floor: T − 1 network calls in one compiled loop."""
    init, apply = diffusion._binding

    @jax.jit
    def calls(weights, x):
        def one(total, t):
            out = apply(weights, x + 1e-3 * total, jnp.full(len(x), t), None)
            return total + jnp.mean(out), None  # each call needs the one before

        return jax.lax.scan(one, 0.0, jnp.arange(2, diffusion.T + 1))[0]

    return lambda: jax.block_until_ready(calls(init, x))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--T", type=int, default=1000)
    parser.add_argument("--examples", type=int, default=100)
    given = parser.parse_args()
    diffusion, x = model(given.T, given.examples)
    count = sum(leaf.size for leaf in jax.tree.leaves(diffusion._binding.init))
    before, ours = peak(), bounded(diffusion, x)
    ours()
    print(f"{count:,} parameters; peak memory of the bound: {peak() - before:.0f} MB more than "
          f"{before:.0f} MB before it")  # fmt: skip
    floor = calls_alone(diffusion, x)
    floor()
    ratios = []
    for i in range(given.rounds):
        spent = {}
        for run in (ours, floor) if i % 2 else (floor, ours):
            start = time.perf_counter()
            run()
            spent[run] = time.perf_counter() - start
        ratios.append(spent[ours] / spent[floor])
    error = np.std(ratios, ddof=1) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
    print(f"time over the network calls alone: {np.mean(ratios):.3f} ± {error:.3f}")


if __name__ == "__main__":
    main()
