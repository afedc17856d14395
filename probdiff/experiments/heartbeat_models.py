"""Diffusions for the binary heartbeat: one to train, the one of 2015, and the exact one.

The exact diffusion is the best whose steps treat bins alone. Its network is Bayes' rule: given x_t
the sequence of phase j has weight w_j ∝ ∏_i q(x_t,i | x_0,i), so that p(x_0,i = 1 | x_t) is the
weight of the phases that have a 1 in bin i. `heartbeat_ceilings` computes its K, the ceiling.

Source: Sohl-Dickstein et al. (2015), section 3.1.2 and appendix D.1.2.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from probdiff import BernoulliKernel, Diffusion, datasets, networks, readouts, schedules
from probdiff.types import Params, Step

RATE = 0.2
LENGTH, PERIOD = 20, 5
COPIES = 50


def examples() -> Int[np.ndarray, "rows length"]:
    """The five sequences, each as often as the others: the whole law, with no noise of sampling."""
    return np.tile(datasets.heartbeat_sequences(length=LENGTH, period=PERIOD), (COPIES, 1))


@functools.cache  # what is compiled for a diffusion is kept with it
def define(T: int) -> Diffusion:
    """A diffusion of bits that predicts x_0, its last step learned."""
    network = networks.Perceptron(
        (LENGTH,), width=64, depth=3, T=T, bumps=20, outputs=1, rngs=nnx.Rngs(0)
    )
    return _define(T, network, readouts.DataLogits(), readouts.Learned())


@functools.cache
def define_2015(T: int) -> Diffusion:
    """The paper's model: three layers of 50 sigmoids, a read-out of f_b for every step."""
    network = networks.SigmoidPerceptron((LENGTH,), width=50, depth=3, T=T, rngs=nnx.Rngs(0))
    return _define(T, network, readouts.Logits(), readouts.Tied())


@functools.cache
def define_exact(T: int) -> Diffusion:
    """The best diffusion whose steps treat bins alone: its network is the exact posterior."""
    steps = schedules.steps(schedules.harmonic(T))
    sequences = datasets.heartbeat_sequences(length=LENGTH, period=PERIOD)
    network = exact_network(steps, sequences)
    return _define(T, network, readouts.DataLogits(), readouts.Tied())


def _define(T: int, network: Any, readout: Any, last_step: readouts.LastStep) -> Diffusion:
    return Diffusion(
        BernoulliKernel(RATE), schedules.harmonic(T), network, event_shape=(LENGTH,),
        readout=readout, last_step=last_step,
    )  # fmt: skip


def with_fewer_steps(diffusion: Diffusion, params: Params, T: int) -> Diffusion:
    """The diffusion of T steps, a divisor of the model's, asking the same network at the same ᾱ_t.

    Its parameters are bound: it has none of its own.
    """
    stride, reverse = diffusion.T // T, diffusion.bind(params)

    def network(x_t: Int[Array, "B length"], t: Int[Array, " B"]) -> Float[Array, "B length"]:
        return reverse.network(x_t, stride * t, None)

    return _define(T, network, diffusion.readout, diffusion.last_step)


@functools.lru_cache(maxsize=8)
def tied(diffusion: Diffusion) -> Diffusion:
    """The same model with its last step tied; the same parameters fit."""
    return _define(diffusion.T, diffusion.network, diffusion.readout, readouts.Tied())


def exact_network(
    steps: Step, sequences: Int[np.ndarray, "period length"], rate: float = RATE
) -> Callable[[Array, Array], Array]:
    """Network whose output is the exact logit of p(x_0i = 1 | x_t), for equally likely sequences.

    A 1 in bin i belongs to the sequences that have one there, so the logit is the log of their
    posterior weight over that of the others.
    """
    has_one = jnp.asarray(sequences, bool)

    def network(x_t: Int[Array, "B length"], t: Int[Array, " B"]) -> Float[Array, "B length"]:
        noise = steps.noise_t[t - 1][:, None]
        one, zero = 1 - (1 - rate) * noise, rate * noise  # q(x_t = 1 | x_0 = 1), and given 0
        bit_1 = jnp.where(x_t == 1, jnp.log(one), jnp.log1p(-one))
        bit_0 = jnp.where(x_t == 1, jnp.log(zero), jnp.log1p(-zero))
        log_w = jnp.sum(jnp.where(has_one, bit_1[:, None], bit_0[:, None]), -1)[..., None]
        with_one = jax.nn.logsumexp(jnp.where(has_one, log_w, -jnp.inf), 1)
        return with_one - jax.nn.logsumexp(jnp.where(has_one, -jnp.inf, log_w), 1)

    return network


def phases_of(x_0: Int[np.ndarray, "draws length"]) -> Int[np.ndarray, " draws"]:
    """Phase of every draw that is a heartbeat, −1 for the others."""
    sequences = datasets.heartbeat_sequences(length=LENGTH, period=PERIOD)
    same = (np.asarray(x_0)[:, None] == sequences).all(-1)
    return np.where(same.any(1), same.argmax(1), -1)
