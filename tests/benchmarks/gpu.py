"""All figures of a GPU by one command, in pieces that are done once.

    python -m tests.benchmarks.gpu --out runs/gpu [--minutes 9] [--only exactness ...]
    python -m tests.benchmarks.gpu --out runs/quick --quick      # all of it in small, on a CPU

Each piece writes `NAME.json` into the folder and is left out where that is there already, so that
the same command goes on where the last one stopped; it starts no piece, and interrupts a training
run, once its minutes are over. Pieces, in their order:

    device      what there is, and FLOP/s of a large product of matrices
    exactness   exact models: bound, evidence, draws, and a U-Net against the CPU
    ratios      training and sampling over floors written by hand
    peak        the share of peak FLOP/s that the U-Net of CIFAR-10 trains at
    others      the same work by other libraries, at equal network calls
    mnist, cifar10   the experiments by their recipe for a GPU, from their checkpoints

`PROBDIFF_DATA` names the folder of the images, which are made up with --quick.
"""

import argparse
import json
import os
import platform
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.infer import SVI
from scipy import stats

from probdiff import (
    SampledTimeELBO,
    datasets,
    diagnostics,
    infer,
    networks,
    sample,
    standard_diffusion,
)
from probdiff.experiments import find
from probdiff.experiments.images import define
from tests.benchmarks import __main__ as benches
from tests.benchmarks import clock

NOMINAL = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}
"""Dense bfloat16 FLOP/s as their maker states them."""


class Given(NamedTuple):
    """What a piece is told."""

    out: Path
    quick: bool
    ends: float
    """When the command has to end, by `time.monotonic`."""


def seconds(run: Callable[[], Any], rounds: int) -> float:
    """Median wall time of a call after the first."""
    jax.block_until_ready(run())
    spent = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        spent.append(time.perf_counter() - start)
    return float(np.median(spent))


def of_device(given: Given) -> dict[str, Any]:
    """What there is; products of two n × n matrices, 2 n³ operations each."""
    device, n = jax.devices()[0], 512 if given.quick else 8192
    found = {
        "kind": device.device_kind, "count": jax.device_count(), "jax": jax.__version__,
        "platform": platform.platform(), "cpus": os.cpu_count(),
        "memory_GiB": (device.memory_stats() or {}).get("bytes_limit", 0) / 2**30,
    }  # fmt: skip
    for name in ("bfloat16", "float32"):
        a = jax.random.normal(jax.random.key(0), (n, n), name)
        product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
        found[f"flops_{name}"] = 2 * n**3 / seconds(lambda a=a, f=product: f(a), 10)
    return found


def exactness(given: Given) -> dict[str, Any]:
    """Errors of exact models, products of matrices in full float32; raises where one is off."""
    with jax.default_matmul_precision("highest"):
        found = {**_bound(), **_evidence(), **_draws(100_000), **_unet()}
    limits = {
        "bound_z": 4.0, "evidence_nats": 1e-3, "evidence_map_nats": 1e-3, "mean_z": 4.0,
        "variance_z": 4.0, "unet_vs_cpu": 1e-4,
    }  # fmt: skip
    off = {name: value for name, value in found.items() if not value <= limits[name]}
    if off:
        raise FloatingPointError(f"beyond their limits {limits}: {off}")
    return found


def _bound() -> dict[str, float]:
    """K is log N(x; loc, scale²), where both trajectories are one law: in standard errors."""
    loc, scale = np.array([0.7, -3.0]), np.array([0.5, 12.0])
    diffusion = standard_diffusion((2,), T=20, loc=loc, scale=scale)
    x = loc + scale * np.random.default_rng(0).normal(size=(4096, 2))
    k = diagnostics.bound(jax.random.key(0), diffusion, {}, x)["bound"]["bound"].values
    gap = k - stats.norm.logpdf(x, loc, scale).sum(-1)
    return {"bound_z": float(abs(gap.mean()) / gap.std(ddof=1) * np.sqrt(len(gap)))}


def _evidence() -> dict[str, float]:
    prior, y = standard_diffusion((3,)).prior({}), np.array([1.0, -2.0, 0.5], np.float32)
    A, found = np.array([[1.0, 0.5, 0.0], [0.0, -1.0, 2.0]], np.float32), {}

    def alone(y):
        numpyro.sample("y", dist.Normal(prior(), 0.5).to_event(1), obs=y)

    def mapped(y):
        numpyro.sample("y", dist.Normal(A @ prior(), 0.5).to_event(1), obs=y[:2])

    laws = {"evidence_nats": (alone, np.eye(3)), "evidence_map_nats": (mapped, A)}
    for name, (program, rows) in laws.items():
        smc = infer.SMC(program, num_particles=256)
        smc.run(jax.random.key(0), y)
        law = stats.multivariate_normal(cov=rows @ rows.T + 0.25 * np.eye(len(rows)))
        found[name] = abs(smc.log_evidence - float(law.logpdf(y[: len(rows)])))
    return found


def _draws(n: int) -> dict[str, float]:
    """Mean and variance of N(0, 1) in standard errors, the larger of two entries."""
    x = sample.ancestral(jax.random.key(1), standard_diffusion((2,), T=20), {}, n)
    mean, variance = np.abs(x.mean(0)) * np.sqrt(n), np.abs(x.var(0) - 1) * np.sqrt(n / 2)
    return {"mean_z": float(mean.max()), "variance_z": float(variance.max())}


def _unet() -> dict[str, float]:
    """Largest difference of a U-Net's outputs from the CPU's, relative to their largest."""
    network = networks.UNet((28, 28), (32, 64), 1, T=10, patch=2, outputs=1, rngs=nnx.Rngs(0))
    graph, params = nnx.split(network)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.05 * rng.normal(size=p.shape).astype(p.dtype), params)
    x, t = rng.normal(size=(4, 28, 28)).astype(np.float32), np.arange(1, 5, dtype=np.int32)
    outputs = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        placed = jax.device_put((params, x, t), device)
        outputs.append(np.asarray(jax.jit(lambda p, *a: nnx.merge(graph, p)(*a))(*placed)))
    gap = np.abs(outputs[0] - outputs[1]).max()
    return {"unet_vs_cpu": float(gap / np.abs(outputs[1]).max())}


def ratios(given: Given) -> dict[str, Any]:
    """Of training and sampling; the quick ones of a U-Net are those of `tests.benchmarks`."""
    names = ("fit",) if given.quick else ("core", "fit", "smc", "bound", "images")
    rounds = 2 if given.quick else 20
    lines = [line for name in names for line in benches.BENCHES[name](rounds)]
    print(clock.table(lines), flush=True)
    return {line.name: line._asdict() for line in lines}


def others(given: Given) -> dict[str, Any]:
    """By other libraries, those that can be imported."""
    lines = list(benches.bench_others.lines(2 if given.quick else 20, 20 if given.quick else 500))
    print(clock.table(lines), flush=True)
    return {line.name: line._asdict() for line in lines}


def peak(given: Given) -> dict[str, Any]:
    """FLOP/s of a training step by the compiler's own count, over peak."""
    size = find("cifar10").sizes["quick" if given.quick else "gpu"]
    recipe = size.recipe
    x = np.random.default_rng(0).integers(0, 256, (recipe.batch_size, 32, 32, 3))
    diffusion = define(x, recipe, nnx.Rngs(0))
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-4), SampledTimeELBO())
    batch = jnp.asarray(x, jnp.float32)
    state = jax.jit(svi.init)(jax.random.key(0), batch)
    lowered = jax.jit(lambda s, x: svi.update(s, x)).lower(state, batch)
    flops, step = lowered.cost_analysis()["flops"], lowered.compile()
    spent = seconds(lambda: step(state, batch), 2 if given.quick else 30)
    known = given.out / "device.json"
    facts = json.loads(known.read_text()) if known.exists() else of_device(given)
    kind = next((kind for kind in NOMINAL if kind in facts["kind"]), None)
    share = {} if kind is None else {"share_of_nominal": flops / spent / NOMINAL[kind]}
    return {
        "images_a_step": len(batch), "ms_a_step": spent * 1e3, "flops_a_step": flops,
        "flops": flops / spent, "share_of_product": flops / spent / facts["flops_bfloat16"],
        "dtype": str(recipe.dtype), **share,
    }  # fmt: skip


def experiment(name: str, given: Given) -> dict[str, Any]:
    """An experiment from its checkpoint, interrupted when the time is over."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, given.ends - time.monotonic()))
    began = time.monotonic()
    try:
        rows = find(name).run(
            given.out / name, quick=given.quick, recipe="gpu", progress=False, say=print
        )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    found = {row.row: [row.value, row.se, row.unit] for row in rows}
    return {"seconds_of_the_last_call": time.monotonic() - began, "rows": found}


def made_up() -> tuple[datasets.Mnist, datasets.Cifar10]:
    """Noise of the shapes of MNIST and CIFAR-10."""
    rng = np.random.default_rng(0)

    def images(n: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.integers(0, 256, (n, *shape), np.uint8), (np.arange(n) % 10).astype(np.uint8)

    (a, b), (c, d) = images(300, 28, 28), images(40, 28, 28)
    (e, f), (g, h) = images(200, 32, 32, 3), images(20, 32, 32, 3)
    return datasets.Mnist(a, c, b, d), datasets.Cifar10(e, g, f, h)


PIECES: dict[str, Callable[[Given], dict[str, Any]]] = {
    "device": of_device, "exactness": exactness, "ratios": ratios, "peak": peak, "others": others,
    "mnist": lambda given: experiment("mnist", given),
    "cifar10": lambda given: experiment("cifar10", given),
}  # fmt: skip


def conduct(names: list[str], given: Given) -> list[str]:
    """Do the pieces that are not done; what is left to do."""
    left = []
    for name in names:
        path = given.out / f"{name}.json"
        if path.exists():
            print(f"{name}: done before", flush=True)
            continue
        if time.monotonic() > given.ends:
            left.append(name)
            continue
        print(f"{name} ...", flush=True)
        began = time.monotonic()
        try:
            found = PIECES[name](given)
        except KeyboardInterrupt:
            if time.monotonic() < given.ends:
                raise
            left.append(name)
            print(f"{name}: interrupted, goes on from its checkpoint", flush=True)
            continue
        except Exception as error:  # one that fails must not hide the others
            left.append(name)
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        found = {"seconds": time.monotonic() - began, "quick": given.quick, **found}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1, default=float))
        partial.replace(path)
        print(f"{name}: {json.dumps(found, default=float)[:400]}", flush=True)
    return left


def main() -> int:
    """Do what is left; exit status 1 where something still is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=9.0, help="how long this call may take")
    parser.add_argument("--only", nargs="+", choices=PIECES, default=list(PIECES))
    parser.add_argument("--quick", action="store_true", help="all in small: numbers mean nothing")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_disable_most_optimizations", args.quick)  # compiles in half the time
    given = Given(args.out, args.quick, time.monotonic() + 60 * args.minutes)
    digits, colours = made_up() if args.quick else (None, None)
    real = datasets.mnist, datasets.cifar10
    functions = (lambda: digits, lambda: colours) if args.quick else real
    with mock.patch.object(datasets, "mnist", functions[0]):
        with mock.patch.object(datasets, "cifar10", functions[1]):
            left = conduct(args.only, given)
    print(f"left to do, by the same command: {', '.join(left)}" if left else "all done")
    return int(bool(left))


if __name__ == "__main__":
    raise SystemExit(main())
