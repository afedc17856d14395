"""All benchmarks, briefly: one table of ratios with their 95 % intervals.

    python -m tests.benchmarks [--rounds 6] [--only core fit smc leapfrog bound ...]

Each line is ours over a floor written by hand, or over another library, in interleaved rounds of
one process; what cannot be run here is named with the reason. `bench_*.py` of this folder, each run
by itself, has the settings for figures to quote.
"""

import argparse
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpyro.infer import SVI
from scipy import stats

from probdiff import SampledTimeELBO, datasets, fit, sample
from tests.benchmarks import (
    bench_bound,
    bench_core,
    bench_fit,
    bench_images,
    bench_leapfrog,
    bench_memory,
    bench_others,
    bench_smc,
    clock,
)

Lines = Iterator[clock.Ratio]
NOT_TIMED = {
    "same_numbers": "compares the numbers of two commits, run it by itself",
    "structure": "counts files and lines, run it by itself",
}


def core(rounds: int) -> Lines:
    """Training and sampling of a perceptron, numbers and bits."""
    x, steps = datasets.swiss_roll(jax.random.key(0), 10_240, noise=0.1), 200
    diffusion = bench_core.model(40)
    train = bench_core.fitted(diffusion, x, steps)
    floor = bench_core.hand_written(diffusion, x, steps)
    yield clock.pair("fit / scan by hand", train, floor, rounds, steps, "a step")
    long, many, _ = bench_core.stepper(1000, x)
    short, few, _ = bench_core.stepper(40, x)
    yield clock.pair("step, T = 1000 / T = 40", long, short, rounds, 100, "a step")
    yield clock.Ratio("temporary memory, T = 1000 / T = 40", many / few)
    bits = jnp.asarray(datasets.heartbeat(jax.random.key(0), bench_core.BATCH))
    ours, floor = bench_core.bits_steps(2000, bits)
    yield clock.pair("step of bits / scan by hand", ours, floor, rounds, 100, "a step")
    ours, floor = bench_core.samplers(diffusion, train())
    yield clock.pair("ancestral / scan by hand", ours, floor, rounds, 400, "a network call")


def of_fit(rounds: int) -> Lines:
    """The training loop over a scan of `svi.update`."""
    svi, steps = bench_fit.make_svi(), 200
    data, rows = bench_fit.data_and_rows(steps)
    ours, floor = bench_fit.fitted(svi, data, steps), bench_fit.start(svi, data, rows)
    yield clock.pair("fit / scan of svi.update", ours, floor, rounds, steps, "a step")


def smc(rounds: int) -> Lines:
    """SMC over its network calls; compile times."""
    for d, width, depth, n in ((2, 64, 2, 1024), (64, 256, 2, 256)):
        diffusion, params = bench_smc.model(d, width, depth, 40)
        sampler, y = bench_smc.sampler(diffusion, params, n), np.zeros(d, np.float32)
        floor = bench_smc.scan(diffusion, params, n)

        def ours(sampler=sampler, y=y):
            sampler.run(jax.random.key(0), y)

        name = f"SMC / its network calls, {d} numbers"
        yield clock.pair(name, ours, floor, rounds, 40, "a level")
    yield clock.Ratio("compile time of SMC, T = 40", bench_smc.compile_time(40, 256), unit="s")


def leapfrog(rounds: int) -> Lines:
    """A step of a move of whole trajectories over the gradient that it needs."""
    yield bench_leapfrog.ratio(rounds, width=256, depth=2, T=40)


def bound(rounds: int) -> Lines:
    """Bounds of images over their network calls."""
    diffusion, x = bench_bound.model(20, 16)
    ours, floor = bench_bound.bounded(diffusion, x), bench_bound.calls_alone(diffusion, x)
    yield clock.pair("bound / its network calls, U-Net", ours, floor, rounds, 19, "a call")


def images(rounds: int, steps: int = 4, draws: int = 2) -> Lines:
    """Training and sampling of a U-Net, and the same in PyTorch."""
    data = np.random.default_rng(0).normal(size=(256, 28, 28)).astype(np.float32)
    diffusion, key = bench_images.make_diffusion(), jax.random.key(0)
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(bench_images.RATE), SampledTimeELBO())
    options = {"batch_size": bench_images.BATCH, "ema_decay": bench_images.DECAY}
    floor, on_device = bench_images.make_floor(), jnp.asarray(data)
    rows = jax.random.randint(key, (steps, bench_images.BATCH), 0, len(data))
    contestants = {
        "ours": lambda: fit(key, svi, data, num_steps=steps, **options, progress=False).losses,
        "floor": lambda: floor(key, on_device, rows),
    }
    if bench_others.has("torch"):
        eager = bench_images.make_torch()
        contestants["torch"] = lambda: eager(data, steps)
    found = clock.rounds_of(contestants, rounds)
    per = steps, "a step"
    yield clock.ratio("U-Net: fit / scan by hand", found["ours"], found["floor"], *per)
    if "torch" in found:
        yield clock.ratio("U-Net: fit / PyTorch", found["ours"], found["torch"], *per)
    else:
        yield clock.skipped("U-Net: fit / PyTorch", "torch can't be imported")
    draw, params = bench_images.make_draw(draws), svi.get_params(svi.init(key, data[:1]))
    yield clock.pair(
        "U-Net: ancestral / scan by hand",
        lambda: sample.ancestral(key, diffusion, params, draws), lambda: draw(key),
        max(2, rounds // 3), bench_images.T, "a network call",
    )  # fmt: skip


def others(rounds: int) -> Lines:
    """The same work by other libraries."""
    yield from bench_others.lines(rounds, steps=400)


def memory(rounds: int) -> Lines:
    """Objects made and dropped: what each leaves; two of their four uses, which compile sooner."""
    for name, slope, error in bench_memory.slopes(20, ["fit", "sample"]):
        half = stats.t.ppf(0.975, 3) * error  # five points, two coefficients
        note = "fit and sample, the last 10 of 20 objects"
        yield clock.Ratio(
            f"{name} left by an object", slope, slope - half, slope + half, name, note
        )


BENCHES: dict[str, Callable[[int], Lines]] = {
    "core": core, "fit": of_fit, "smc": smc, "leapfrog": leapfrog, "bound": bound,
    "images": images, "others": others, "memory": memory,
}  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    args = parser.parse_args()
    lines = []
    for name in args.only:
        print(f"{name} ...", flush=True)
        try:
            lines += BENCHES[name](args.rounds)
        except Exception as error:  # one that fails must not hide the others
            lines.append(clock.skipped(name, f"{type(error).__name__}: {error}"))
    lines += [clock.skipped(name, why) for name, why in NOT_TIMED.items()]
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {args.rounds} rounds")
    print(clock.table(lines))


if __name__ == "__main__":
    main()
