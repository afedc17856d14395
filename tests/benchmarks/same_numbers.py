"""Numbers at fixed keys, to compare two commits: what a change of structure must not move.

    python tests/benchmarks/same_numbers.py before.json        # on one commit
    python tests/benchmarks/same_numbers.py after.json         # on the other
    python tests/benchmarks/same_numbers.py --compare before.json after.json

Losses of a short `fit` on numbers, bits and classes, draws, bounds, the ladder, `SMC` with each
twist, `Guided`, `noncentered` under NUTS, and `calibrate`, all by the public API. Each entry is an
array; the comparison prints the largest difference, relative to the array's largest magnitude.
"""

import argparse
import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.infer import MCMC, NUTS, SVI, Predictive

import probdiff
from probdiff import (
    AbsorbingKernel,
    BernoulliKernel,
    CategoricalKernel,
    Diffusion,
    GaussianKernel,
    ImportanceTimes,
    SampledTimeELBO,
    datasets,
    diagnostics,
    fit,
    infer,
    networks,
    readouts,
    sample,
    schedules,
)

KEY = jax.random.key(7)


def of_numbers(T=20, **options):
    network = networks.Perceptron((2,), width=16, depth=2, T=T, rngs=nnx.Rngs(0))
    beta = schedules.log_snr_linear(T, beta_1=1e-3, alpha_bar_T=1e-3)
    return Diffusion(GaussianKernel(), beta, network, event_shape=(2,), **options)


def of_symbols(kernel, states, outputs, T=10):
    network = networks.Perceptron(
        (6,), width=16, depth=2, T=T, states=states, outputs=outputs, rngs=nnx.Rngs(0)
    )
    return Diffusion(kernel, schedules.harmonic(T), network, event_shape=(6,))


def mixture():
    outputs = 3 * 3
    network = networks.Perceptron((4,), 24, 2, 20, outputs=outputs, rngs=nnx.Rngs(0))
    beta = schedules.log_snr_linear(20, beta_1=1e-2, alpha_bar_T=1e-3)
    return Diffusion(
        GaussianKernel(), beta, network, event_shape=(4,), loc=2.0, scale=1.5,
        readout=readouts.Mixture(3, -1.0, 1.0), last_step=readouts.Discretised(0, 4, 5),
    )  # fmt: skip


def trained(diffusion, x, loss=None, guide=None):
    loss = loss or SampledTimeELBO()
    svi = SVI(diffusion.model, guide or diffusion.guide, optax.adam(1e-2), loss)
    return fit(KEY, svi, x, num_steps=60, batch_size=64, ema_decay=0.99, progress=False)


def models():
    """Name, diffusion and data of each kind."""
    roll = np.asarray(datasets.swiss_roll(KEY, 500, noise=0.1))
    rng = np.random.default_rng(0)
    bits = (rng.random((500, 1)) < 0.5).astype(np.int32) ^ (rng.random((500, 6)) < 0.2)
    classes = (rng.integers(0, 3, (500, 1)) + (rng.random((500, 6)) < 0.3)) % 3
    grid = np.clip(np.round(rng.normal(2, 1.5, (500, 1)) + rng.normal(0, 0.7, (500, 4))), 0, 4)
    yield "numbers", of_numbers(), roll
    yield "learned last step", of_numbers(last_step=readouts.Learned()), roll
    yield "data, bridge", of_numbers(readout=readouts.Data()), roll
    yield "mixture on a grid", mixture(), grid.astype(np.float32)
    yield "bits", of_symbols(BernoulliKernel(0.4), 2, 1), bits.astype(np.int32)
    yield "classes", of_symbols(CategoricalKernel(3), 3, 3), classes.astype(np.int32)
    yield "absorbed", of_symbols(AbsorbingKernel(3), 4, 3), classes.astype(np.int32)


def learned_rates():
    network = networks.Perceptron((2,), width=16, depth=2, T=10, rngs=nnx.Rngs(0))
    beta = schedules.learned(schedules.log_snr_linear(10, beta_1=1e-3, alpha_bar_T=1e-2))
    return Diffusion(GaussianKernel(), beta, network, event_shape=(2,))


def sampler_numbers(out, name, sampler, *args, **kwargs):
    sampler.run(KEY, *args, **kwargs)
    draws = sampler.get_samples()["x_0"]
    out[f"{name}: mean"], out[f"{name}: sd"] = draws.mean(0), draws.std(0)
    out[f"{name}: first"] = draws[:3]
    if isinstance(sampler, infer.SMC):
        out[f"{name}: log evidence"] = sampler.log_evidence
        out[f"{name}: se"] = sampler.log_evidence_se


def conditioned(out, fitted):
    """`SMC` with every twist, known entries, symbols, plates, fewer steps; `Guided`."""
    diffusion, params, x = fitted["numbers"]
    prior = diffusion.prior(params)
    wide = diffusion.prior(params, variance=np.cov(x.T))

    def noisy(y, prior=prior, sigma=0.5):
        with numpyro.plate("points", 3):
            numpyro.sample("y", dist.Normal(prior(), sigma).to_event(1), obs=y)

    def total(y, prior=prior):
        numpyro.sample("y", dist.Normal(prior().sum(-1), 0.3), obs=y)

    def counts(y, prior=prior):
        numpyro.sample("y", dist.Poisson(jnp.exp(prior())).to_event(1), obs=y)

    def given(prior=prior):
        prior(known=jnp.array([0.5, 0.0]), mask=jnp.array([True, False]))

    y = jnp.asarray(x[:3] + 0.3)
    small = {"num_particles": 64, "num_runs": 3}
    for twist in (
        infer.LaplaceTwist(), infer.PointTwist(), infer.TweedieTwist(rank=2), infer.KernelTwist(),
        infer.KernelTwist(decays=True),
    ):  # fmt: skip
        sampler_numbers(out, f"SMC {twist} noisy", infer.SMC(noisy, twist=twist, **small), y)
        sampler_numbers(out, f"SMC {twist} sum", infer.SMC(total, twist=twist, **small), 0.4)
        guided = infer.Guided(noisy, twist=twist, num_samples=50)
        sampler_numbers(out, f"Guided {twist} noisy", guided, y)
    for name, program, args in (
        ("counts", counts, (jnp.array([1, 2]),)), ("known", given, ()), ("sum", total, (0.4,)),
        ("noisy", noisy, (y,)),
    ):  # fmt: skip
        sampler_numbers(out, f"SMC {name}", infer.SMC(program, **small), *args)
        sampler_numbers(out, f"SMC {name}, 7 steps", infer.SMC(program, steps=7, **small), *args)

        def told(*args, program=program):
            return program(*args, prior=wide)

        sampler_numbers(out, f"SMC {name}, covariance", infer.SMC(told, **small), *args)
    tweedie = infer.SMC(given, twist=infer.TweedieTwist(), **small)
    sampler_numbers(out, "SMC Tweedie known", tweedie)

    diffusion, params, x = fitted["mixture on a grid"]
    prior = diffusion.prior(params, variance=np.cov(((x - 2) / 1.5).T))
    mask = np.array([True, True, False, False])

    def pixels(y=None):
        x_0 = prior(known=jnp.array([1.0, 3.0, 0.0, 0.0]), mask=mask)
        if y is not None:
            numpyro.sample("y", dist.Normal(x_0[2], 1.0), obs=y)

    for twist in (infer.ReadoutTwist(), infer.LaplaceTwist()):
        sampler_numbers(out, f"SMC {twist} pixels", infer.SMC(pixels, twist=twist, **small))
        sampler_numbers(out, f"SMC {twist} pixels, y", infer.SMC(pixels, twist=twist, **small), 3.0)
    for kind in ("bits", "classes", "absorbed"):
        diffusion, params, x = fitted[kind]
        prior = diffusion.prior(params)

        def symbols(y, prior=prior):
            x_0 = prior(known=jnp.array([1, 0, 0, 0, 0, 0]), mask=np.arange(6) < 2)
            numpyro.sample("y", dist.Normal(x_0.sum(), 1.0), obs=y)

        sampler_numbers(out, f"SMC {kind}", infer.SMC(symbols, **small), 4.0)
        sampler_numbers(out, f"SMC {kind}, 5 steps", infer.SMC(symbols, steps=5, **small), 4.0)


def by_mcmc(out, fitted):
    diffusion, params, _ = fitted["numbers"]
    prior = diffusion.prior(params)

    def program(y=None, sigma=0.5):
        numpyro.sample("y", dist.Normal(prior(), sigma).to_event(1), obs=y)

    for steps in (None, 5):
        over_noise = infer.noncentered(program, steps=steps)
        start = infer.initial_noise(KEY, over_noise, {"x_0": jnp.ones((1, 2))}, y=jnp.ones(2))
        out[f"noncentered, steps={steps}: start"] = start["x_0_noise"]
        there = Predictive(over_noise, {"x_0_noise": start["x_0_noise"][None]})(KEY, jnp.ones(2))
        out[f"noncentered, steps={steps}: x_0"] = there["x_0"]
    mcmc = MCMC(NUTS(infer.noncentered(program)), num_warmup=20, num_samples=20, progress_bar=False)
    mcmc.run(KEY, y=jnp.ones(2), init_params=None)
    out["noncentered under NUTS: first"] = mcmc.get_samples()["x_0"][:3]
    tree = infer.calibrate(
        KEY, program, infer.SMC(program, num_particles=32, num_runs=2), num_simulations=5
    )
    out["calibrate: PIT"] = tree["prior_sbc"]["x_0"].values
    out["calibrate: PIT of log r"] = tree["prior_sbc"]["log_r"].values


def numbers():
    out, fitted = {}, {}
    for name, diffusion, x in models():
        result = trained(diffusion, x)
        fitted[name] = diffusion, result.params, x
        out[f"fit {name}: losses"] = result.losses
        out[f"sample {name}"] = sample.ancestral(KEY, diffusion, result.params, 5)
        out[f"sample {name}, 5 steps"] = sample.ancestral(KEY, diffusion, result.params, 5, steps=5)
        tree = diagnostics.bound(KEY, diffusion, result.params, x[:8], num_draws=4)
        for column in ("bound", "kl", "reconstruction"):
            out[f"bound {name}: {column}"] = tree["bound"][column].values
        tree = diagnostics.sampled_bound(KEY, diffusion, result.params, x[:8], num_times=4)
        out[f"sampled bound {name}"] = tree["bound"]["bound"].values
        tree = diagnostics.ladder(KEY, diffusion, result.params, x[:4], num_repeats=2, sizes=(1, 8))
        for column in ("bound", "importance", "smc"):
            out[f"ladder {name}: {column}"] = tree["ladder"][column].values
    diffusion, _, x = fitted["numbers"]
    rates = learned_rates()
    result = trained(rates, x)
    out["fit learned rates: losses"] = result.losses
    out["fit learned rates: beta"] = result.params["x_0_beta"]
    out["bound learned rates"] = diagnostics.bound(KEY, rates, result.params, x[:8])["bound"][
        "bound"
    ].values
    times = SampledTimeELBO(times=ImportanceTimes(), num_times=2)
    tracked = trained(diffusion, x, times, probdiff.track_kl(diffusion.guide))
    out["fit importance times: losses"] = tracked.losses
    simple = of_numbers(readout=readouts.Epsilon(), last_step=readouts.Learned())
    out["fit combined loss: losses"] = trained(simple, x, probdiff.CombinedLoss()).losses
    conditioned(out, fitted)
    by_mcmc(out, fitted)
    return {name: np.asarray(value, np.float64) for name, value in out.items()}


def compare(before, after):
    """A line for each entry that differs, and how many do not."""
    same = 0
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            print(f"{name}: only {'before' if name in before else 'after'}")
            continue
        a, b = (np.asarray(side[name], np.float64) for side in (before, after))
        if a.shape == b.shape and np.array_equal(a, b, equal_nan=True):
            same += 1
            continue
        if a.shape != b.shape:
            print(f"{name}: shape {a.shape} and {b.shape}")
            continue
        scale = np.nanmax(np.abs(a)) or 1.0
        print(f"{name}: differs by {np.nanmax(np.abs(a - b)) / scale:.1e} of {scale:.3g}")
    print(f"{same} of {len(before)} entries are the same bit for bit")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--compare", action="store_true")
    options = parser.parse_args()
    if options.compare:
        compare(*(json.loads(file.read_text()) for file in options.files))
        return
    warnings.simplefilter("ignore", infer.InferenceWarning)
    found = {name: value.tolist() for name, value in numbers().items()}
    options.files[0].write_text(json.dumps(found))


if __name__ == "__main__":
    main()
