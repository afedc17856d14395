"""Codes of x_0 as programs: VDRL, DRL, codes that depend on t, and what they are compared with.

    VDRL      z ~ N(0, I) in the model, q(z | x_0) in the guide, the denoiser told z     a bound
    DRL       the denoiser told E(x_0): no latent, no bound on p(x_0)                    L_simple
    E(x_0, t) the denoiser told a code of its own at every level                         L_simple
    AE, VAE   the same encoder with a decoder
    SimCLR    the same encoder, two views of an image to be told from the others'        NT-Xent

All have the same encoder, a perceptron of two hidden layers.

Sources: Mittal et al. (2023) for VDRL, DRL and E(x_0, t); Chen et al. (2020) for SimCLR.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float
from numpyro.contrib.module import nnx_module

from probdiff import Diffusion, GaussianKernel, networks, readouts, schedules
from probdiff.types import Params

Pair = tuple[Callable[..., Any], Callable[..., Any]]
"""Model and guide."""
_ENCODER = "encoder"
_SHIFT, _TURN, _ZOOM = 0.6, 0.15, 0.1
"""Standard deviations of a view: pixels of an 8 × 8 image, radians, share of the size."""
_TEMPERATURE = 0.2


class Images(NamedTuple):
    """Images on grey levels, with labels."""

    train: Float[np.ndarray, "N H W"]
    validation: Float[np.ndarray, "V H W"]
    test: Float[np.ndarray, "M H W"]
    train_labels: np.ndarray
    validation_labels: np.ndarray
    test_labels: np.ndarray
    levels: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return self.train.shape[1:]

    @property
    def units(self) -> dict[str, float]:
        """loc and scale, one for all pixels."""
        return {"loc": float(self.train.mean()), "scale": float(self.train.std())}

    @property
    def splits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images to train, validate and test on."""
        return self.train, self.validation, self.test


class Layers(nnx.Module):
    """A perceptron, on what is flattened."""

    def __init__(self, *sizes: int, rngs: nnx.Rngs):
        pairs = itertools.pairwise(sizes)
        self.layers = nnx.List([nnx.Linear(n, m, rngs=rngs) for n, m in pairs])

    def __call__(self, x: Float[Array, "B ..."]) -> Float[Array, "B out"]:
        x = x.reshape(len(x), -1)
        for layer in self.layers[:-1]:
            x = jax.nn.silu(layer(x))
        return self.layers[-1](x)


class Told(nnx.Module):
    """A denoiser that is told a code where there is much noise: at t well above `first` · T."""

    def __init__(self, denoiser: nnx.Module, width: int, T: int, first: float, rngs: nnx.Rngs):
        self.T, self.first, self.denoiser = T, first, denoiser
        self.told = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x_t: Array, t: Array, context: Array) -> Array:
        told = self.told(context)
        if self.first > 0:
            gate = jax.nn.sigmoid((t - self.first * self.T) / (0.03 * self.T))
            told = told * gate[:, None].astype(told.dtype)
        return self.denoiser(x_t, t, told)


class TimeCode(nnx.Module):
    """A denoiser whose context is x_0 itself, of which it sees a few numbers, others at each t."""

    def __init__(self, denoiser: nnx.Module, encoder: Layers, T: int):
        self.T, self.denoiser, self.encoder = T, denoiser, encoder

    def code(self, x_0: Array, t: Array) -> Float[Array, "B d"]:
        """E(x_0, t)."""
        wave = jnp.pi * t[:, None] / self.T * jnp.arange(4)
        return self.encoder(jnp.concatenate([x_0.reshape(len(x_0), -1), jnp.cos(wave)], -1))

    def __call__(self, x_t: Array, t: Array, context: Array) -> Array:
        return self.denoiser(x_t, t, self.code(context, t))


class LocalDenoiser(nnx.Module):
    """A denoiser that sees 3 × 3 pixels of x_t, the step and a code: the code must say the rest."""

    def __init__(self, shape: tuple[int, ...], width: int, T: int, hidden: int, rngs: nnx.Rngs):
        self.T, self.shape, self.bumps = T, shape, 10
        size = math.prod(shape)
        self.where = nnx.Linear(width + self.bumps, size * 4, rngs=rngs)
        self.near = nnx.Conv(
            1, hidden, (3, 3), conv_general_dilated=networks.convolve, rngs=rngs
        )  # fmt: skip
        self.first = nnx.Linear(hidden + 4 + self.bumps + 1, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, hidden, rngs=rngs)
        self.out = nnx.Linear(hidden, 2, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x_t: Array, t: Array, context: Array) -> Array:
        rows, sides = len(x_t), self.shape
        g = jax.nn.softmax(-0.5 * (t[:, None] / self.T * self.bumps - jnp.arange(self.bumps)) ** 2)
        there = self.where(jnp.concatenate([context, g], -1)).reshape(rows, *sides, 4)
        g = jnp.broadcast_to(g[:, None, None], (rows, *sides, self.bumps))
        x = x_t[..., None]
        h = jnp.concatenate([self.near(x), there, g, x], -1)
        out = self.out(jax.nn.silu(self.second(jax.nn.silu(self.first(h)))))
        return jnp.concatenate([out[..., 0], out[..., 1]], -1)


def exact_diffusion(images: Images, network: nnx.Module, T: int, width: int) -> Diffusion:
    """A diffusion on grey levels whose bound is a probability, told codes of so many numbers."""
    units = images.units
    first = 1.2 / units["scale"] * (images.levels - 1) / 16  # its first noise, of 1.2 of 17 levels
    beta = schedules.log_snr_linear(T, beta_1=first**2, alpha_bar_T=1e-3)
    return Diffusion(
        GaussianKernel(), beta, network, event_shape=images.shape, readout=readouts.Epsilon(),
        last_step=readouts.Discretised(0, images.levels - 1, images.levels),
        context_shape=(width,), **units,
    )  # fmt: skip


def simple_diffusion(images: Images, network: nnx.Module, T: int, context_shape: Any) -> Diffusion:
    """A diffusion for L_simple, from little noise to much: σ from 0.03 to 32."""
    beta = schedules.log_snr_linear(T, beta_1=1e-3, alpha_bar_T=1e-3)
    return Diffusion(
        GaussianKernel(), beta, network, event_shape=images.shape,
        readout=readouts.Epsilon(readouts.ForwardVariance()), last_step=readouts.Learned(),
        context_shape=context_shape, **images.units,
    )  # fmt: skip


def filled(network: nnx.Module, weights: Any) -> nnx.Module:
    """The network with these weights."""
    graph, state = nnx.split(network)
    nnx.replace_by_pure_dict(state, weights)
    return nnx.merge(graph, state)


def moved(key: Array, images: Float[Array, "B H W"]) -> Float[Array, "B H W"]:
    """Views: each image turned, stretched and shifted a little."""
    height, width = images.shape[1:]
    middle = (jnp.array([height, width]) - 1) / 2
    places = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), -1)

    def one(key: Array, image: Array) -> Array:
        noise = jax.random.normal(key, (4,))
        angle, zoom = _TURN * noise[0], 1 + _ZOOM * noise[1]
        turn = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
        shift = _SHIFT * height / 8 * noise[2:]
        at = zoom * (places - middle) @ turn.T + middle + shift
        return map_coordinates(image, [at[..., 0], at[..., 1]], order=1)

    return jax.vmap(one)(jax.random.split(key, len(images)), images)


def noisy(key: Array, images: Float[Array, "B H W"]) -> Float[Array, "B H W"]:
    """Views: each image with noise of its pixels' standard deviation, and nothing else."""
    return images + jnp.std(images) * jax.random.normal(key, images.shape)


class Codes(NamedTuple):
    """Programs that train one encoder, and what it then says."""

    images: Images
    encoder: Layers
    width: int
    is_random: bool = False
    """Whether the encoder says a mean and a standard deviation."""

    def __call__(self, x: Float[Array, "B H W"]) -> Float[Array, "B out"]:
        """What the encoder says of images, within a program."""
        units = self.images.units
        return nnx_module(_ENCODER, self.encoder)((x - units["loc"]) / units["scale"])

    def law(self, x: Float[Array, "B H W"]) -> dist.Distribution:
        """q(z | x_0), within a program."""
        mean, log_sd = jnp.split(self(x), 2, -1)
        return dist.Normal(mean, jnp.exp(jnp.clip(log_sd - 1, -7, 3))).to_event(1)

    def of(self, params: Params, x: np.ndarray) -> Float[np.ndarray, "N d"]:
        """Codes of images, means where they are random; of first weights without others."""
        with numpyro.handlers.block(), numpyro.handlers.substitute(data=params):
            return np.asarray(self(jnp.asarray(x)))[:, : self.width]

    def vdrl(self, diffusion: Diffusion, view: Callable | None = None) -> Pair:
        """A latent code; the encoder sees the image, or a view of it, which is a bound as well."""

        def model(x: Any) -> None:
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Normal(jnp.zeros(self.width), 1.0).to_event(1))
                diffusion.reverse(x, context=z)

        def guide(x: Any) -> None:
            seen = x if view is None else view(numpyro.prng_key(), x)
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", self.law(seen))
                diffusion.forward(x)

        return model, guide

    def drl(self, diffusion: Diffusion) -> Pair:
        """A code without a law."""

        def model(x: Any) -> None:
            diffusion.model(x, context=self(x))

        return model, diffusion.guide

    def autoencoder(self, decoder: Layers) -> Pair:
        """Grey levels as so many dots, each black with the decoder's probability."""

        def model(x: Any) -> None:
            with numpyro.plate("data", len(x)):
                z = self(x)
                if self.is_random:
                    prior = dist.Normal(jnp.zeros(self.width), 1.0).to_event(1)
                    z = numpyro.sample("z", prior)
                logits = nnx_module("decoder", decoder)(z)
                law = dist.Binomial(self.images.levels - 1, logits=logits).to_event(1)
                numpyro.sample("x", law, obs=x.reshape(len(x), -1))

        def guide(x: Any) -> None:
            if self.is_random:
                with numpyro.plate("data", len(x)):
                    numpyro.sample("z", self.law(x))

        return model, guide

    def contrastive(self, head: Layers, view: Callable) -> Pair:
        """Each view has to find the other of the same image among all of the batch."""

        def model(x: Any) -> None:
            keys = jax.random.split(numpyro.prng_key())
            seen = jnp.concatenate([view(key, x) for key in keys])
            h = nnx_module("head", head)(self(seen))
            h = h / jnp.linalg.norm(h, axis=-1, keepdims=True)
            size = len(seen)
            alike = jnp.where(jnp.eye(size, dtype=bool), -1e9, h @ h.T / _TEMPERATURE)
            other = (jnp.arange(size) + size // 2) % size
            found = jax.nn.log_softmax(alike)[jnp.arange(size), other]
            numpyro.factor("nt_xent", jnp.sum(found) / 2)

        return model, lambda x: None
