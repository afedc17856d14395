"""What a U-Net costs in `fit` and `ancestral` over loops written by hand, and in eager PyTorch.

The floor of a training step is one compiled scan that knows nothing of NumPyro: noise, the KL of a
step in closed form, Adam and the averaged weights, the same network, batches of 64 images of
28 × 28. The floor of a draw is one compiled scan over the steps. Rounds alternate. Where `torch`
can be imported, a U-Net of the same layers takes the same steps there, op by op.

    python tests/benchmarks/bench_images.py --rounds 12
"""

import argparse
import importlib.util
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax, random
from numpyro.infer import SVI

from probdiff import (
    Diffusion,
    GaussianKernel,
    SampledTimeELBO,
    fit,
    networks,
    readouts,
    sample,
    schedules,
)

T, BATCH, DECAY, RATE = 1000, 64, 0.999, 1e-3
WIDTHS, DEPTH, PATCH, HEAD = (32, 64), 1, 2, 16
BETA = schedules.linear(T)


def make_network():
    return networks.UNet(
        (28, 28), WIDTHS, DEPTH, T=T, patch=PATCH, head_width=HEAD, outputs=1, rngs=nnx.Rngs(0)
    )


def make_diffusion():
    return Diffusion(
        GaussianKernel(),
        BETA,
        make_network(),
        event_shape=(28, 28),
        readout=readouts.Epsilon(readouts.ForwardVariance()),
    )


def tables():
    """β, ᾱ_s and ᾱ_t of all steps, float32."""
    alpha_bar = np.cumprod(1 - BETA)
    before = np.concatenate([[1.0], alpha_bar[:-1]])
    return tuple(jnp.asarray(c, jnp.float32) for c in (BETA, before, alpha_bar))


def make_floor(rate=RATE):
    """A function (key, data, rows) of one compiled scan: weights and losses."""
    graph, start = nnx.split(make_network())
    beta, before, alpha_bar = tables()
    adam = optax.adam(rate)

    def mean_of(params, x_t, t):
        b, a = beta[t - 1][:, None, None], alpha_bar[t - 1][:, None, None]
        noise = nnx.merge(graph, params)(x_t, t)
        return (x_t - b / jnp.sqrt(1 - a) * noise) / jnp.sqrt(1 - b)

    def loss_of(params, x_0, key):
        key_t, key_x, key_1 = random.split(key, 3)
        t = 2 + (random.uniform(key_t) + jnp.arange(BATCH) / BATCH) % 1.0 * (T - 1)
        t = jnp.minimum(t.astype(jnp.int32), T)
        b, s, a = (c[t - 1][:, None, None] for c in (beta, before, alpha_bar))
        x_t = jnp.sqrt(a) * x_0 + jnp.sqrt(1 - a) * random.normal(key_x, x_0.shape)
        bridge = (jnp.sqrt(s) * b * x_0 + jnp.sqrt(1 - b) * (1 - s) * x_t) / (1 - a)
        v = b * (1 - s) / (1 - a)
        kl = 0.5 * (v / b + (bridge - mean_of(params, x_t, t)) ** 2 / b - 1 - jnp.log(v / b))
        x_1 = jnp.sqrt(1 - beta[0]) * x_0 + jnp.sqrt(beta[0]) * random.normal(key_1, x_0.shape)
        last = (x_0 - jnp.sqrt(1 - beta[0]) * x_1) ** 2 / beta[0]
        end = alpha_bar[-1] * x_0**2 - alpha_bar[-1] - jnp.log1p(-alpha_bar[-1])
        constant = 0.5 * (last + jnp.log(2 * jnp.pi * beta[0]) + end)
        return jnp.sum((T - 1) * kl + constant)

    def step(data, carry, inputs):
        params, state, ema = carry
        i, rows, key = inputs
        loss, gradient = jax.value_and_grad(loss_of)(params, data[rows], key)
        updates, state = adam.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        d = jnp.minimum(DECAY, (1.0 + i) / (10.0 + i))
        return (params, state, jax.tree.map(lambda m, p: d * m + (1 - d) * p, ema, params)), loss

    @jax.jit
    def run(key, data, rows):
        keys = random.split(key, len(rows))
        carry = (start, adam.init(start), start)
        return lax.scan(lambda c, i: step(data, c, i), carry, (jnp.arange(len(rows)), rows, keys))

    return run


def make_draw(count):
    """Draws by one compiled scan; the last step is the tied kernel's."""
    graph, params = nnx.split(make_network())
    beta, _, alpha_bar = tables()

    @jax.jit
    def draw(key, params):
        key_end, key_steps = random.split(key)

        def retreat(x, inputs):
            t, key = inputs
            b, a = beta[t - 1], alpha_bar[t - 1]
            noise = nnx.merge(graph, params)(x, jnp.full(count, t))
            mean = (x - b / jnp.sqrt(1 - a) * noise) / jnp.sqrt(1 - b)
            return mean + jnp.sqrt(b) * random.normal(key, x.shape), None

        x = random.normal(key_end, (count, 28, 28))
        keys = random.split(key_steps, T)
        x, _ = lax.scan(retreat, x, (jnp.arange(2, T + 1), keys[1:]), reverse=True)
        return jnp.sqrt(1 - beta[0]) * x + jnp.sqrt(beta[0]) * random.normal(keys[0], x.shape)

    return lambda key: draw(key, params)


def make_torch():
    """A function of the number of steps, in eager PyTorch, same layers, Adam and average."""
    import torch
    from torch import nn

    size = 4 * WIDTHS[0]

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norms = nn.ModuleList(nn.GroupNorm(width // 8, width) for _ in range(2))
            self.modulate = nn.Linear(size, 2 * width)
            self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

        def forward(self, h, e):
            scale, shift = self.modulate(e)[:, :, None, None].chunk(2, 1)
            inner = self.convs[0](nn.functional.silu(self.norms[0](h)))
            inner = self.norms[1](inner) * (1 + scale) + shift
            return h + self.convs[1](nn.functional.silu(inner))

    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            fine, coarse = WIDTHS
            self.embed = nn.Sequential(nn.Linear(64, size), nn.SiLU(), nn.Linear(size, size))
            self.entry = nn.Conv2d(PATCH**2, fine, 3, padding=1)
            self.blocks = nn.ModuleList(Block(width) for width in (fine, coarse, fine))
            self.halve = nn.Conv2d(4 * fine, coarse, 1)
            self.refine, self.merge = nn.Conv2d(coarse, 4 * fine, 1), nn.Conv2d(2 * fine, fine, 1)
            self.norm = nn.GroupNorm(fine // 8, fine)
            self.features = nn.Conv2d(fine, HEAD * PATCH**2, 1)
            self.pixel, self.modulate = nn.Conv2d(1, HEAD, 1), nn.Linear(size, 2 * HEAD)
            self.hidden, self.readout = nn.Conv2d(HEAD, HEAD, 1), nn.Conv2d(HEAD, 1, 1)

        def forward(self, x, t):
            silu, F = nn.functional.silu, nn.functional
            angles = t[:, None] * 1e4 ** (-torch.arange(32) / 32)
            e = silu(self.embed(torch.cat([angles.sin(), angles.cos()], 1)))
            h = self.blocks[0](self.entry(F.pixel_unshuffle(x, PATCH)), e)
            down = self.blocks[1](self.halve(F.pixel_unshuffle(h, 2)), e)
            h = self.merge(torch.cat([h, F.pixel_shuffle(self.refine(down), 2)], 1))
            h = silu(self.norm(self.blocks[2](h, e)))
            scale, shift = self.modulate(e)[:, :, None, None].chunk(2, 1)
            inner = F.pixel_shuffle(self.features(h), PATCH) + self.pixel(x)
            return self.readout(silu(self.hidden(silu(inner * (1 + scale) + shift))))

    torch.manual_seed(0)
    network = UNet()
    average = [p.detach().clone() for p in network.parameters()]
    adam = torch.optim.Adam(network.parameters(), RATE)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T), 0)
    ours = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(make_network(), nnx.Param)))
    theirs = sum(p.numel() for p in network.parameters())
    print(f"parameters: {ours:,} here, {theirs:,} in PyTorch {torch.__version__}")

    def run(data, steps):
        for _ in range(steps):
            x = data[torch.randint(len(data), (BATCH,))]
            t = torch.randint(2, T + 1, (BATCH,))
            a, noise = alpha_bar[t - 1][:, None, None, None], torch.randn_like(x)
            loss = ((network(a.sqrt() * x + (1 - a).sqrt() * noise, t) - noise) ** 2).sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                for mean, p in zip(average, network.parameters(), strict=True):
                    mean.lerp_(p, 1 - DECAY)

    def run_on(data, steps):
        # PyTorch of a distribution may know an older NumPy: only bytes are handed over
        images = torch.frombuffer(bytearray(data.tobytes()), dtype=torch.float32)
        run(images.reshape(-1, 1, 28, 28), steps)

    return run_on


def check_the_same_loss(diffusion, key, data, count=64):
    """At the first weights both losses have one mean: within 4 standard errors, n = 64 each."""
    rows = random.randint(key, (count, BATCH), 0, len(data))
    still = SVI(diffusion.model, diffusion.guide, optax.adam(0.0), SampledTimeELBO())
    ours = fit(key, still, data, num_steps=count, batch_size=BATCH, progress=False).losses
    theirs = np.asarray(make_floor(0.0)(key, jnp.asarray(data), rows)[1])
    error = np.sqrt((ours.var(ddof=1) + theirs.var(ddof=1)) / count)
    assert abs(ours.mean() - theirs.mean()) < 4 * error, (ours.mean(), theirs.mean(), error)


def ratios(contestants, rounds):
    """Seconds of each round of each contestant, alternating."""
    seconds = {name: [] for name in contestants}
    for call in contestants.values():
        call()  # compiles
    for i in range(rounds):
        for name in sorted(contestants, reverse=bool(i % 2)):
            began = time.perf_counter()
            jax.block_until_ready(contestants[name]())
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(s) for name, s in seconds.items()}


def say(what, mine, floor, unit, per):
    logs = np.log(mine / floor)
    mean, se = np.exp(logs.mean()), logs.std(ddof=1) / len(logs) ** 0.5
    print(
        f"{what}: {mean:.4f} ± {mean * se:.4f}, best / best {mine.min() / floor.min():.4f}; floor "
        f"{np.median(floor) / per * 1e3:.1f} ms {unit}"
    )


def main():
    """Print the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--draws", type=int, default=16)
    options = parser.parse_args()
    data = np.random.default_rng(0).normal(size=(1000, 28, 28)).astype(np.float32)
    diffusion, key, steps = make_diffusion(), random.key(0), options.steps
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(RATE), SampledTimeELBO())
    floor, on_device = make_floor(), jnp.asarray(data)
    rows = random.randint(key, (steps, BATCH), 0, len(data))

    def fitted():
        return fit(
            key, svi, data, num_steps=steps, batch_size=BATCH, ema_decay=DECAY, progress=False
        )

    check_the_same_loss(diffusion, key, data)
    contestants = {"fit": lambda: fitted().losses, "floor": lambda: floor(key, on_device, rows)}
    if importlib.util.find_spec("torch"):
        eager = make_torch()
        contestants["torch"] = lambda: eager(data, steps)
    found = ratios(contestants, options.rounds)
    say("step, fit / floor", found["fit"], found["floor"], "a step", steps)
    if "torch" in found:
        say("step, fit / eager PyTorch", found["fit"], found["torch"], "a step", steps)
    params = fitted().params
    draw = make_draw(options.draws)
    contestants = {
        "ancestral": lambda: sample.ancestral(key, diffusion, params, options.draws),
        "floor": lambda: draw(key),
    }
    found = ratios(contestants, options.rounds)
    say("draws, ancestral / floor", found["ancestral"], found["floor"], "a network call", T)


if __name__ == "__main__":
    main()
