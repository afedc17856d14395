"""The same work by others, at equal network calls: training, draws, and a posterior.

    python -m tests.benchmarks --only others

A perceptron with two hidden layers of 128 on 2 numbers, T = 40, batches of 1024, as initialised:
what is timed are loops, not what they learn. Contestants, each skipped by name where it can't be
imported (all are in the extra `bench`; PyTorch runs op by op, as its users do):

    training    `fit`; NumPyro's `svi.update` in a scan by hand; a PyTorch loop with the same loss
    draws       `ancestral`; a PyTorch loop; diffusers' DDPMScheduler; azula's DDPMSampler
    posterior   `Guided` with `PointTwist`, the rule of DPS; azula's DPSSampler
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist

from probdiff import datasets, infer, sample
from tests.benchmarks import bench_core, bench_fit, clock

T, BATCH, DRAWS, SIGMA = 40, 1024, 1024, 0.5
Run = Callable[[], Any]


def has(name: str) -> bool:
    """Whether a library can be imported, which others may be there without."""
    if importlib.util.find_spec(name) is None:
        return False
    try:
        importlib.import_module(name)
    except Exception:  # built for another NumPy, or another machine
        return False
    return True


def device() -> str:
    """Where PyTorch computes: where JAX does, if it can."""
    import torch

    return "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"


def make_network() -> Any:
    """The same perceptron in PyTorch: x_t and the step, one output for each number."""
    import torch
    from torch import nn

    torch.manual_seed(0)

    class Perceptron(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = bench_core.WIDTH
            self.embed = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
            self.entry, self.middle = nn.Linear(2, width), nn.Linear(width, width)
            self.out = nn.Linear(width, 2)

        def forward(self, x: Any, t: Any) -> Any:
            angles = t[:, None] * 1e4 ** (-torch.arange(32, device=x.device) / 32)
            e = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
            h = nn.functional.silu(self.entry(x) + e)
            return self.out(nn.functional.silu(self.middle(h)))

    return Perceptron().to(device())


def rates() -> Any:
    """β_1..β_T and ᾱ_1..ᾱ_T of the model, in PyTorch."""
    import torch

    beta = torch.tensor(bench_core.model(T).schedule.tolist(), device=device())
    return beta, torch.cumprod(1 - beta, 0)


def torch_training(x: np.ndarray, steps: int) -> Run:
    """Adam and averaged weights on the squared error of the noise, op by op."""
    import torch

    network, (_, alpha_bar) = make_network(), rates()
    data = torch.tensor(x.tolist(), device=device())
    adam = torch.optim.Adam(network.parameters(), 1e-3)
    average = [p.detach().clone() for p in network.parameters()]

    def run() -> float:
        for _ in range(steps):
            x_0 = data[torch.randint(len(data), (BATCH,), device=device())]
            t = torch.randint(1, T + 1, (BATCH,), device=device())
            a, noise = alpha_bar[t - 1][:, None], torch.randn_like(x_0)
            loss = ((network(a.sqrt() * x_0 + (1 - a).sqrt() * noise, t) - noise) ** 2).sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                for mean, p in zip(average, network.parameters(), strict=True):
                    mean.lerp_(p, 1 - bench_core.DECAY)
        return float(loss.detach())

    return run


def torch_draws() -> Run:
    """Ancestral sampling as a loop, T network calls."""
    import torch

    network, (beta, alpha_bar) = make_network(), rates()

    @torch.no_grad()
    def run() -> Any:
        x = torch.randn(DRAWS, 2, device=device())
        for t in range(T, 0, -1):
            noise = network(x, torch.full((DRAWS,), t, device=device()))
            b, a = beta[t - 1], alpha_bar[t - 1]
            x = (x - b / (1 - a).sqrt() * noise) / (1 - b).sqrt() + b.sqrt() * torch.randn_like(x)
        return x.cpu().tolist()

    return run


def diffusers_draws() -> Run:
    """The same by diffusers' scheduler."""
    import torch
    from diffusers import DDPMScheduler

    network, (beta, _) = make_network(), rates()
    scheduler = DDPMScheduler(T, trained_betas=beta.tolist(), clip_sample=False)
    scheduler.set_timesteps(T)

    @torch.no_grad()
    def run() -> Any:
        x = torch.randn(DRAWS, 2, device=device())
        for t in scheduler.timesteps:
            noise = network(x, torch.full((DRAWS,), int(t) + 1, device=device()))
            x = scheduler.step(noise, t, x).prev_sample
        return x.cpu().tolist()

    return run


def azula_denoiser() -> Any:
    """The network as azula's denoiser, told log σ/α in place of a step."""
    import torch
    from azula.denoise import KarrasDenoiser
    from azula.noise import VPSchedule

    network = make_network()

    class Backbone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Any, c: Any) -> Any:
            return self.network(x, torch.broadcast_to(c.reshape(-1), (len(x),)))

    return KarrasDenoiser(Backbone(), VPSchedule()).to(device())


def azula_draws() -> Run:
    """T steps of azula's DDPM sampler."""
    from azula.sample import DDPMSampler

    sampler = DDPMSampler(azula_denoiser(), steps=T, silent=True)
    return lambda: sampler(sampler.init((DRAWS, 2)).to(device())).cpu().tolist()


def azula_posterior() -> Run:
    """DPS: T network calls, each pulled back once."""
    import torch
    from azula.guidance.dps import DPSSampler

    y = torch.zeros(DRAWS, 2, device=device())
    sampler = DPSSampler(azula_denoiser(), y=y, A=lambda x: x, steps=T, silent=True)
    return lambda: sampler(sampler.init((DRAWS, 2)).to(device())).cpu().tolist()


def our_posterior(params: Any, diffusion: Any) -> Run:
    """The rule of DPS as a twist, unweighted: T network calls, each pulled back once."""
    prior = diffusion.prior(params)

    def program(y: jax.Array) -> None:
        numpyro.sample("y", dist.Normal(prior(), SIGMA).to_event(1), obs=y)

    guided = infer.Guided(
        program, twist=infer.PointTwist(), num_samples=DRAWS, block_size=DRAWS, check=False
    )
    y = np.zeros(2, np.float32)

    def run() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a network that was never trained
            guided.run(jax.random.key(0), y)
        return guided.get_samples()["x_0"]

    return run


def lines(rounds: int, steps: int) -> Iterator[clock.Ratio]:
    """Each of ours over each of the others, at equal network calls."""
    x = np.asarray(datasets.swiss_roll(jax.random.key(0), 10_240, noise=0.1))
    diffusion = bench_core.model(T)
    params = {"x_0_network$params": diffusion._binding.init}
    train = bench_core.fitted(diffusion, x, steps)
    svi, (data, rows) = bench_fit.make_svi(), bench_fit.data_and_rows(steps)
    scan = bench_fit.start(svi, data, rows)
    regression = bench_fit.fitted(svi, data, steps)
    yield clock.pair(
        "training: fit / NumPyro's update in a scan", regression, scan, rounds, steps, "a step"
    )
    others = {"training": {"PyTorch": ("torch", lambda: torch_training(x, steps))},
        "draws": {"PyTorch": ("torch", torch_draws), "diffusers": ("diffusers", diffusers_draws),
                  "azula": ("azula", azula_draws)},
        "posterior by DPS": {"azula": ("azula", azula_posterior)}}  # fmt: skip
    ours = {
        "training": train,
        "draws": lambda: np.asarray(sample.ancestral(jax.random.key(0), diffusion, params, DRAWS)),
        "posterior by DPS": our_posterior(params, diffusion),
    }
    for what, contestants in others.items():
        per, of = (steps, "a step") if what == "training" else (T, "a network call")
        for name, (library, make) in contestants.items():
            title = f"{what}: ours / {name}"
            missing = [each for each in {"torch", library} if not has(each)]
            if missing:
                yield clock.skipped(title, f"{' and '.join(sorted(missing))} can't be imported")
                continue
            yield clock.pair(title, ours[what], make(), rounds, per, of)
