"""A small program with noise, to train in tests, and the plain loop that `fit` must equal."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from jax import random
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO

from probdiff.train.data import Minibatches


def data(seed=0):
    """100 examples (x, y), y linear in x with noise."""
    key_x, key_y = random.split(random.key(seed))
    x = random.normal(key_x, (100, 3))
    return x, x @ jnp.array([1.0, -2.0, 3.0]) + random.normal(key_y, (100,))


def model(x, y):
    """y = w·x + z + noise, with one latent z an example."""
    w = numpyro.param("w", jnp.zeros(3))
    scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x @ w + z, scale), obs=y)


def guide(x, y):
    """z given (x, y), with one mean and one scale for all."""
    loc = numpyro.param("loc", 0.0)
    scale = numpyro.param("scale_z", 0.5, constraint=constraints.positive)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(loc, scale))


def make_svi(optimizer=None):
    """A new SVI of the program."""
    return SVI(model, guide, optimizer or optax.adam(0.01), Trace_ELBO())


def loop(key, svi, data, num_steps, batch_size):
    """Plain loop over `svi.update`: (state, losses, parameters before and after each step)."""
    key_init, key_batches, _ = random.split(key, 3)
    rows = Minibatches(key_batches, data, batch_size, None).rows(0, num_steps)
    state = jax.jit(svi.init)(key_init, *(leaf[rows[0]] for leaf in data))
    losses, history, update = [], [svi.get_params(state)], jax.jit(svi.update)
    for row in rows:
        state, loss = update(state, *(leaf[row] for leaf in data))
        losses.append(loss)
        history.append(svi.get_params(state))
    return state, jnp.array(losses), history
