"""Ratios of the objective, the training loop and the sampler, each over a hand-written floor.

    python tests/benchmarks/bench_core.py [--rounds 30]

Prints, with standard errors over interleaved rounds of one process: the training step at T = 1000
over T = 40 (time, and temporary memory as the compiler counts it), `fit` with EMA over a jitted
`lax.scan` with the same objective written out, the sampler over a jitted `lax.scan`, compile time
at T = 1000 over T = 40, the training step of a diffusion of bits over a hand-written one, and the
spread of one draw of the loss for the three laws of t.
"""

import argparse
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from numpyro.infer import SVI

from probdiff import (
    BernoulliKernel,
    Diffusion,
    GaussianKernel,
    ImportanceTimes,
    SampledTimeELBO,
    StratifiedTimes,
    UniformTimes,
    datasets,
    fit,
    networks,
    readouts,
    sample,
    schedules,
    track_kl,
)

BATCH, WIDTH, DEPTH, DECAY = 1024, 128, 2, 0.999


def model(T):
    network = networks.Perceptron((2,), WIDTH, DEPTH, T, rngs=nnx.Rngs(0))
    beta = schedules.log_snr_linear(T, beta_1=1e-4, alpha_bar_T=1e-3)
    return Diffusion(GaussianKernel(), beta, network, event_shape=(2,))


def ratios(ours, floor, rounds):
    """CPU and wall time of ours over the floor, mean ± standard error over interleaved rounds."""
    found = []
    for i in range(rounds):
        spent = {}
        for run in (ours, floor) if i % 2 else (floor, ours):
            cpu, wall = time.process_time(), time.perf_counter()
            jax.block_until_ready(run())
            spent[run] = time.process_time() - cpu, time.perf_counter() - wall
        found.append(np.array(spent[ours]) / np.array(spent[floor]))
    found = np.array(found)
    mean, error = found.mean(0), found.std(0, ddof=1) / math.sqrt(rounds)
    median = np.median(found, 0)
    return (
        f"CPU {mean[0]:.3f} ± {error[0]:.3f} (median {median[0]:.3f}), "
        f"wall {mean[1]:.3f} ± {error[1]:.3f} (median {median[1]:.3f})"
    )


def stepper(T, x, n=100):
    """n training steps in one compiled loop, and the compiled step."""
    diffusion = model(T)
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), SampledTimeELBO())
    state = svi.init(jax.random.key(0), x[:BATCH])
    batch = x[:BATCH]
    start = time.perf_counter()
    step = jax.jit(svi.update).lower(state, batch).compile()
    compile_s = time.perf_counter() - start
    loop = jax.jit(lambda s, b: jax.lax.fori_loop(0, n, lambda _, s: svi.update(s, b)[0], s))
    jax.block_until_ready(loop(state, batch))
    return lambda: loop(state, batch), step.memory_analysis().temp_size_in_bytes, compile_s


def hand_written(diffusion, x, num_steps):
    """The same training, by hand: marginals, bridge, KL of Normals, Adam, EMA, in a scan."""
    steps = schedules.steps(diffusion.schedule)
    params = {"net": diffusion._binding.init}
    optimiser = optax.adam(1e-3)

    def loss(params, key, x):
        k_u, k_1, k_t = jax.random.split(key, 3)
        u = (jax.random.uniform(k_u) + jnp.arange(BATCH) / BATCH) % 1.0
        t = 2 + jnp.minimum((u * (diffusion.T - 1)).astype(int), diffusion.T - 2)
        at = [c[t - 1][:, None] for c in steps[1:]]
        beta, alpha_bar_s, alpha_bar_t, noise_s, noise_t = at
        x_1 = jnp.sqrt(steps.alpha_bar_t[0]) * x + jnp.sqrt(steps.noise_t[0]) * (
            jax.random.normal(k_1, x.shape)
        )
        x_t = jnp.sqrt(alpha_bar_t) * x + jnp.sqrt(noise_t) * jax.random.normal(k_t, x.shape)
        z, v = jnp.split(diffusion._binding.apply(params["net"], x_t, t, None), 2, -1)
        q_mean = (jnp.sqrt(alpha_bar_s) * beta * x + jnp.sqrt(1 - beta) * noise_s * x_t) / noise_t
        q_sd = jnp.sqrt(beta * noise_s / noise_t)
        p_mean = jnp.sqrt(1 - beta) * x_t + jnp.sqrt(beta) * z
        p_sd = jnp.sqrt(jax.nn.sigmoid(v + jnp.log(beta) - jnp.log1p(-beta)))
        ratio = (q_sd / p_sd) ** 2
        kl = 0.5 * (ratio + ((q_mean - p_mean) / p_sd) ** 2 - 1 - jnp.log(ratio))
        sd_1 = jnp.sqrt(steps.beta[0])
        error = (x - jnp.sqrt(1 - steps.beta[0]) * x_1) / sd_1
        log_last = -0.5 * error**2 - jnp.log(sd_1) - 0.5 * math.log(2 * math.pi)
        a, s = jnp.sqrt(steps.alpha_bar_t[-1]) * x, steps.noise_t[-1]
        prior = 0.5 * (s + a**2 - 1 - jnp.log(s))
        return jnp.sum((diffusion.T - 1) * kl - log_last + prior)

    def step(carry, inputs):
        params, state, ema, key = carry
        i, rows = inputs
        key, draw = jax.random.split(key)
        value, gradient = jax.value_and_grad(loss)(params, draw, x[rows])
        updates, state = optimiser.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        d = jnp.minimum(DECAY, (1.0 + i) / (10.0 + i))
        ema = jax.tree.map(lambda e, p: d * e + (1 - d) * p, ema, params)
        return (params, state, ema, key), value

    run = jax.jit(lambda carry, rows: jax.lax.scan(step, carry, (jnp.arange(num_steps), rows)))
    rng = np.random.default_rng(0)
    start = (params, optimiser.init(params), params, jax.random.key(1))

    def once():
        order = np.concatenate(
            [rng.permutation(len(x)) for _ in range(num_steps * BATCH // len(x) + 1)]
        )
        rows = order[: num_steps * BATCH].reshape(num_steps, BATCH).astype(np.int32)
        return run(start, rows)[0]

    jax.block_until_ready(once())
    return once


def fitted(diffusion, x, num_steps):
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), SampledTimeELBO())

    def once():
        return fit(
            jax.random.key(1),
            svi,
            x,
            num_steps=num_steps,
            batch_size=BATCH,
            ema_decay=DECAY,
            progress=False,
        ).params

    jax.block_until_ready(once())
    return once


def bits_steps(T, x, n=100, rate=0.2):
    """n training steps of a diffusion of bits: ours, and by hand with the same parametrisation."""
    network = networks.Perceptron((20,), WIDTH, DEPTH, T, outputs=1, rngs=nnx.Rngs(0))
    diffusion = Diffusion(
        BernoulliKernel(rate),
        schedules.harmonic(T),
        network,
        event_shape=(20,),
        readout=readouts.DataLogits(),
    )
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), SampledTimeELBO())
    state = svi.init(jax.random.key(0), x)
    ours = jax.jit(lambda s, x: jax.lax.fori_loop(0, n, lambda _, s: svi.update(s, x)[0], s))
    steps, optimiser = schedules.steps(diffusion.schedule), optax.adam(1e-3)

    def loss(params, key):
        k_u, k_1, k_t = jax.random.split(key, 3)
        u = (jax.random.uniform(k_u) + jnp.arange(len(x)) / len(x)) % 1.0
        t = 2 + jnp.minimum((u * (T - 1)).astype(int), T - 2)
        beta, alpha_bar_s, alpha_bar_t, noise_s, noise_t = (c[t - 1][:, None] for c in steps[1:])
        one = steps.alpha_bar_t[0] * x + rate * steps.noise_t[0]
        x_1 = (jax.random.uniform(k_1, x.shape) < one).astype(float)
        x_t = jax.random.uniform(k_t, x.shape) < alpha_bar_t * x + rate * noise_t
        p_0 = jax.nn.sigmoid(diffusion._binding.apply(params, x_t.astype(jnp.int32), t, None))
        seen_1 = jnp.where(x_t, 1 - beta + rate * beta, (1 - rate) * beta)
        seen_0 = jnp.where(x_t, rate * beta, 1 - rate * beta)

        def bridge(x_0):
            prior = alpha_bar_s * x_0 + rate * noise_s
            return seen_1 * prior / (seen_1 * prior + seen_0 * (1 - prior))

        b_0, b_1 = bridge(0.0), bridge(1.0)
        q, p = jnp.where(x == 1, b_1, b_0), p_0 * b_1 + (1 - p_0) * b_0
        kl = q * jnp.log(q / p) + (1 - q) * jnp.log((1 - q) / (1 - p))
        r = (1 - steps.beta[0]) * x_1 + rate * steps.beta[0]
        return jnp.sum((T - 1) * kl - x * jnp.log(r) - (1 - x) * jnp.log(1 - r))

    def step(carry, _):
        params, adam, key = carry
        key, draw = jax.random.split(key)
        updates, adam = optimiser.update(jax.grad(loss)(params, draw), adam, params)
        return (optax.apply_updates(params, updates), adam, key), None

    floor = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=n)[0])
    params = diffusion._binding.init
    carry = params, optimiser.init(params), jax.random.key(1)
    runs = (lambda: ours(state, x)), (lambda: floor(carry))
    for run in runs:
        jax.block_until_ready(run())
    return runs


def samplers(diffusion, params, n=1024):
    steps, T = schedules.steps(diffusion.schedule), diffusion.T
    network = params["x_0_network$params"]

    @jax.jit
    def floor(key):
        key, k_T, k_0 = jax.random.split(key, 3)
        x = jax.random.normal(k_T, (n, 2))

        def retreat(x, inputs):
            t, beta, key = inputs
            out = diffusion._binding.apply(network, x, jnp.full(n, t), None)
            z, v = jnp.split(out, 2, -1)
            sd = jnp.sqrt(jax.nn.sigmoid(v + jnp.log(beta) - jnp.log1p(-beta)))
            mean = jnp.sqrt(1 - beta) * x + jnp.sqrt(beta) * z
            return mean + sd * jax.random.normal(key, x.shape), None

        inputs = steps.t[1:], steps.beta[1:], jax.random.split(key, T - 1)
        x, _ = jax.lax.scan(retreat, x, inputs, reverse=True)
        sd = jnp.sqrt(steps.beta[0])
        return jnp.sqrt(1 - steps.beta[0]) * x + sd * jax.random.normal(k_0, x.shape)

    def repeat(draw):
        def once():
            return [np.asarray(draw(jax.random.key(i))) for i in range(10)]

        once()
        return once

    return repeat(lambda k: sample.ancestral(k, diffusion, params, n)), repeat(floor)


def spreads(x, diffusion, params):
    """Standard deviation of one loss per example, nats, for a batch."""
    guide = track_kl(diffusion.guide)
    objective = SampledTimeELBO(times=ImportanceTimes())
    svi = SVI(diffusion.model, guide, optax.sgd(0.0), objective)
    state = svi.init(jax.random.key(0), x, init_params=params)
    state = jax.lax.fori_loop(0, 500, lambda _, s: svi.update(s, x)[0], state)
    params = {**params, **state.mutable_state}
    for times in (UniformTimes(), StratifiedTimes(), ImportanceTimes()):
        objective = SampledTimeELBO(times=times)
        one = jax.jit(lambda k, o=objective: o.loss(k, params, diffusion.model, guide, x))
        draws = np.asarray(jax.lax.map(one, jax.random.split(jax.random.key(2), 2_000)))
        sd, n = draws.std() / len(x), len(draws)
        print(
            f"spread of one draw, {type(times).__name__}: {sd:.4f} ± {sd / math.sqrt(2 * n):.4f} "
            f"nats per example (batch of {len(x)}), mean {draws.mean() / len(x):.3f}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    x = datasets.swiss_roll(jax.random.key(0), 10_240, noise=0.1)

    long, memory_long, compile_long = stepper(1000, x)
    short, memory_short, compile_short = stepper(40, x)
    print("step, T = 1000 over T = 40:", ratios(long, short, rounds))
    print(f"temporary memory: {memory_long / memory_short:.3f} ({memory_short} bytes at T = 40)")
    print(f"compile time of the step: {compile_long / compile_short:.2f} ({compile_short:.1f} s)")

    num_steps, diffusion = 1_000, model(40)
    train, floor = fitted(diffusion, x, num_steps), hand_written(diffusion, x, num_steps)
    print(f"fit of {num_steps} steps over a scan:", ratios(train, floor, rounds))

    bits = jnp.asarray(datasets.heartbeat(jax.random.key(0), BATCH))
    print("step of bits over a scan, T = 2000:", ratios(*bits_steps(2000, bits), rounds))
    flat = bits_steps(2000, bits)[0], bits_steps(100, bits)[0]
    print("step of bits, T = 2000 over T = 100:", ratios(*flat, rounds))

    params = train()
    print("sampler over a scan, T = 40:", ratios(*samplers(diffusion, params), rounds))
    spreads(x[:512], diffusion, params)


if __name__ == "__main__":
    main()
