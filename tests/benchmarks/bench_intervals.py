"""Do 95 % intervals of log evidence hold what they say?

Runs of one sampler are taken four at a time, each four an interval of its own; the truth is log of
the mean of Ẑ over all runs, which is unbiased for the evidence of the diffusion that was walked.
The region for a share that is 0.95 is the exact binomial one of 99 %; misses below and above are
compared by a binomial test.

    python -m tests.benchmarks.bench_intervals --repeats 200
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))

import gaussian_mixtures
from probdiff import datasets, infer, load
from probdiff.experiments import conditioning
from probdiff.infer.evidence import log_evidence, log_evidence_interval
from probdiff.standard import standard_diffusion

RUNS, SHARE = 4, 0.95


def of_normals(law, y, num_particles=64):
    """Eight normals, of which four sums are measured."""
    prior = standard_diffusion((8,), T=40).prior({})
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8)) / np.sqrt(8))

    def program(y):
        numpyro.sample("y", law(matrix @ prior()).to_event(1), obs=y)

    return program, (jnp.asarray(y),), {"num_particles": num_particles}


def of_mixture():
    """25 modes in 8 dimensions, one sharp measurement."""
    p = gaussian_mixtures.problem(0, 8, 1)._replace(noise=0.01)
    rng = np.random.default_rng(0)
    k = rng.choice(25, p=p.weights)
    x = gaussian_mixtures.means(8)[k] + rng.normal(size=8)
    p = p._replace(y=p.matrix @ x + 0.01 * rng.normal(size=1))
    options = {"num_particles": 64, "steps": 50}
    return gaussian_mixtures.program(8, 1), (gaussian_mixtures.packed(p),), options


def of_digits(folder):
    """A held-out digit with noise as large as digits vary."""
    diffusion, params = load(folder)
    data = datasets.digits()
    prior = conditioning.prior_of(diffusion, params, conditioning.gaussian_of(data.train))
    sigma, x = float(diffusion.scale), np.asarray(data.test[0]) + 0.5

    def program(y):
        numpyro.sample("y", dist.Normal(prior(), sigma).to_event(2), obs=y)

    y = jnp.asarray(x + sigma * np.random.default_rng(0).standard_normal(x.shape), jnp.float32)
    return program, (y,), {"num_particles": 16, "steps": 50}


def problems(folder):
    """Programs with their arguments and the sampler's options, by name."""
    y = np.array([0.5, -1.0, 2.0, 0.3], np.float32)
    found = {
        "Laplace": of_normals(lambda x: dist.Laplace(x, 0.1), y),
        "Student-t(2)": of_normals(lambda x: dist.StudentT(2.0, x, 0.1), y),
        "Poisson": of_normals(lambda x: dist.Poisson(jnp.exp(2 * x)), np.array([1, 0, 9, 2])),
        "mixture, sigma 0.01": of_mixture(),
    }
    return found if folder is None else found | {"digits, denoising": of_digits(folder)}


def main():
    """One line for each problem."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--model", help="folder of `probdiff run digits`")
    given = parser.parse_args()
    low, high = stats.binom.interval(0.99, given.repeats, SHARE)
    print(f"region of 99 %: {low / given.repeats:.3f} to {high / given.repeats:.3f}")
    for name, (program, args, options) in problems(given.model).items():
        start = time.time()
        smc = infer.SMC(program, num_runs=RUNS * given.repeats, block_size=2048, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", infer.InferenceWarning)
            smc.run(jax.random.key(0), *args)
        z = smc.result.outcome.log_evidences
        truth = log_evidence(z)
        ends = log_evidence_interval(z.reshape(-1, RUNS).T, SHARE)
        below, above = int((ends[1] < truth).sum()), int((ends[0] > truth).sum())
        p = stats.binomtest(below, below + above).pvalue if below + above else 1.0
        print(
            f"{name:20} sd of log Z of a run {z.std():.3f}: hold "
            f"{1 - (below + above) / given.repeats:.3f}, below {below}, above {above} (p {p:.2f}), "
            f"median width {np.median(ends[1] - ends[0]):.3f}; {time.time() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
