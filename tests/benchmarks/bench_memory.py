"""Objects made, used and dropped in one process: its memory and memory maps must stay flat.

Every compiled program takes memory and a few of the 65,530 memory maps that Linux gives a process.
Prints both after each tenth of the objects, and their growth per object over the last half.

    python tests/benchmarks/bench_memory.py [--objects 1000] [--uses sample bound smc fit]
"""

import argparse
import gc
import resource
import warnings
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.infer import SVI

from probdiff import (
    Diffusion,
    GaussianKernel,
    SampledTimeELBO,
    diagnostics,
    fit,
    infer,
    networks,
    sample,
    schedules,
)

USES = ("sample", "bound", "smc", "fit")


def use(number: int, uses: list[str]) -> None:
    """Make a diffusion, train, sample, score and condition it, and forget it."""
    key, shape = jax.random.key(number), (2 + number % 3,)
    network = networks.RadialBasis(shape, width=4, T=4, rngs=nnx.Rngs(number))
    diffusion = Diffusion(GaussianKernel(), schedules.cosine(4), network, event_shape=shape)
    x = jax.random.normal(key, (64, *shape))
    svi = SVI(diffusion.model, diffusion.guide, optax.sgd(1e-3), SampledTimeELBO())
    params = svi.get_params(svi.init(key, x))
    if "fit" in uses:
        params = fit(key, svi, x, num_steps=2, progress=False).params
    if "sample" in uses:
        sample.ancestral(key, diffusion, params, 16)
    if "bound" in uses:
        diagnostics.bound(key, diffusion, params, x)
    if "smc" in uses:
        prior = diffusion.prior(params)

        def program(y: jax.Array) -> None:
            numpyro.sample("y", dist.Normal(prior(), 1.0).to_event(1), obs=y)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", infer.InferenceWarning)  # of so few particles
            infer.SMC(program, num_particles=16, num_runs=2).run(key, x[0])


def measured() -> tuple[float, int]:
    """Resident memory in MiB, and memory maps."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    maps = Path("/proc/self/maps").read_bytes().count(b"\n")
    return pages * resource.getpagesize() / 2**20, maps


def slopes(objects: int, uses: list[str], *, show: bool = False) -> list[tuple]:
    """(name, slope, standard error) of MiB and maps per object, over the last half."""
    rows = []
    for number in range(objects):
        use(number, uses)
        if (number + 1) % max(1, objects // 10) == 0:
            rows.append((number + 1, *measured()))
            if show:
                print(f"{rows[-1][0]:8d} {rows[-1][1]:8.1f} {rows[-1][2]:8d}", flush=True)
    late, found = np.array(rows[len(rows) // 2 :]), []
    for name, column in (("MiB", late[:, 1]), ("maps", late[:, 2])):
        (slope, _), covariance = np.polyfit(late[:, 0], column, 1, cov="unscaled")
        residual = column - np.poly1d(np.polyfit(late[:, 0], column, 1))(late[:, 0])
        error = np.sqrt(covariance[0, 0] * residual.var(ddof=2)) if len(late) > 2 else np.nan
        found.append((name, float(slope), float(error)))
    return found


def main() -> None:
    """Print a line for each tenth, and the slopes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=1000)
    parser.add_argument("--uses", nargs="+", choices=USES, default=list(USES))
    args = parser.parse_args()
    print(f"{'objects':>8} {'MiB':>8} {'maps':>8}")
    for name, slope, error in slopes(args.objects, args.uses, show=True):
        print(f"{name} per object over the last half: {slope:.4f} ± {error:.4f}")


if __name__ == "__main__":
    main()
