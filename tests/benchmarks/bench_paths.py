"""How well particles and moves find posteriors of known entries, at equal network calls.

Gaussian mixtures in 64 dimensions, 32 entries known (see `tests/known_entries.py`): error of the
posterior mean in posterior standard deviations (root mean square over entries and problems), share
of central 90 % intervals that hold a draw of the exact posterior, weight of the first mode, error
of log Z.

    python -m tests.benchmarks.bench_paths --kind one --problems 50
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from probdiff import infer
from tests import known_entries as oracle

HIDDEN = ~oracle.IS_KNOWN


def judged(draws, exact, mixture):
    """Mean error, coverage and weight of the first mode, each for a problem."""
    rng = np.random.default_rng(0)
    rows = []
    for x, of in zip(np.moveaxis(draws, 1, 0), exact, strict=True):
        x = x[:, HIDDEN]
        error = np.sqrt(np.mean(((x.mean(0) - of.mean) / of.sd) ** 2))
        low, high = np.quantile(x, [0.05, 0.95], axis=0)
        k = rng.choice(len(of.weights), p=of.weights, size=400)
        root = np.linalg.cholesky(of.covariance)
        truth = of.means[k] + rng.standard_normal((400, len(root))) @ root.T
        held = np.mean((low <= truth) & (truth <= high))
        gap = (
            (x[:, None] - of.means) @ np.linalg.inv(of.covariance) * (x[:, None] - of.means)
        ).sum(-1)
        share = np.mean(gap.argmin(1) == 0) - of.weights[0] if len(of.weights) == 2 else np.nan
        rows.append((error, held, share))
    return np.array(rows)


def show(name, rows, errors, calls, seconds):
    n = len(rows)
    mean, se = rows.mean(0), rows.std(0, ddof=1) / np.sqrt(n)
    print(
        f"{name:22} mean error/sd {mean[0]:.3f} ± {se[0]:.3f}  90 %: {mean[1]:.3f} ± {se[1]:.3f}"
        f"  mode weight off {mean[2]:+.3f} ± {se[2]:.3f} (mean |.| {np.abs(rows[:, 2]).mean():.3f})"
        f"  log Z off {errors.mean():+.3f} ± {errors.std(ddof=1) / np.sqrt(n):.3f}"
        f" (mean |.| {np.abs(errors).mean():.3f})  calls {calls:,}  {seconds:.0f} s",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=("one", "two"), default="one")
    parser.add_argument("--problems", type=int, default=50)
    parser.add_argument("--T", type=int, default=200)
    parser.add_argument("--particles", type=int, default=256)
    parser.add_argument("--chains", type=int, default=32)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--leapfrog", type=int, default=8)
    parser.add_argument("--alone", type=int, default=0, help="particles of SMC alone")
    given = parser.parse_args()
    m = oracle.mixture(given.kind)
    x = oracle.draw(np.random.default_rng(1), m, given.problems)
    exact = [oracle.posterior(m, row) for row in x]
    log_z = np.array([of.log_z for of in exact])
    program = oracle.program(m, given.T, given.problems)
    known = jnp.asarray(x, jnp.float32)
    if given.alone:
        smc, start = infer.SMC(program, num_particles=given.alone, num_runs=4), time.time()
        smc.run(jax.random.key(0), known)
        rows = judged(smc.get_samples()["x_0"], exact, m)
        calls = smc.result.network_calls // given.problems
        show(f"SMC 4 x {given.alone}", rows, smc.log_evidence - log_z, calls, time.time() - start)
    start = time.time()
    gibbs = infer.ParticleGibbs(
        program, num_chains=given.chains, num_warmup=given.warmup, num_samples=given.samples,
        num_leapfrog=given.leapfrog, num_particles=given.particles,
    )  # fmt: skip
    gibbs.run(jax.random.key(0), known)
    of = gibbs.result.particles[0]
    seconds = time.time() - start
    show(
        "its particles", judged(of.get_samples()["x_0"], exact, m), of.log_evidence - log_z,
        of.result.network_calls // given.problems, seconds,
    )  # fmt: skip
    show(
        f"ParticleGibbs {given.chains} chains", judged(gibbs.get_samples()["x_0"], exact, m),
        of.log_evidence - log_z, gibbs.network_calls, seconds,
    )  # fmt: skip
    print(f"accepted {gibbs.result.share.mean():.2f}")


if __name__ == "__main__":
    main()
