"""Models whose bound is known: the exact reverse trajectory of Gaussian data with independent
entries.

For x_0 ~ N(m, s²) entry by entry, x_s given x_t is Gaussian,

    E[x_0 | x_t] = v (m/s² + √ᾱ_t x_t / (1−ᾱ_t)),    v = 1 / (1/s² + ᾱ_t/(1−ᾱ_t)),
    Var[x_s | x_t] = bridge variance + w_0² v,

so a network that says so makes log p(x_0..T) − log q(x_1..T | x_0) equal to log p(x_0) for every
draw of the trajectory, whatever is paired, masked or scaled around it.

And models that need not be right, whose own p(x_0) is known: `gaussian_law` of a diffusion whose
steps are affine, `enumerate_diffusion` of a few symbols.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from probdiff import Diffusion, GaussianKernel, readouts, schedules
from probdiff.kernels import bridge_weights


def gaussian_network(mean, sd, beta):
    """Network for `Data(LearnedVariance())`; mean and sd broadcast to the event."""
    table = schedules.steps(np.asarray(beta))
    event_dim = max(np.ndim(mean), np.ndim(sd))

    def network(x_t, t, context=None):
        step = table.at(t, event_dim)
        variance_0 = 1 / (1 / sd**2 + step.alpha_bar_t / step.noise_t)
        x_0_hat = variance_0 * (mean / sd**2 + jnp.sqrt(step.alpha_bar_t) * x_t / step.noise_t)
        weight_0, _ = bridge_weights(step)
        variance = step.beta * step.noise_s / step.noise_t + weight_0**2 * variance_0
        logit = jnp.log(variance) - jnp.log1p(-variance)
        logit_beta = jnp.log(step.beta) - jnp.log1p(-step.beta)
        outputs = x_0_hat, jnp.broadcast_to(logit - logit_beta, x_t.shape)
        return jnp.stack(outputs, -1) if event_dim == 0 else jnp.concatenate(outputs, -1)

    return network


def exact_gaussian(mean, sd, T=20, **options):
    """`Diffusion` whose bound is the log density of N(mean, sd²) for every trajectory."""
    mean, sd = np.broadcast_arrays(np.asarray(mean, float), np.asarray(sd, float))
    beta = schedules.log_snr_linear(T, beta_1=0.01, alpha_bar_T=1e-24)  # x_T forgets x_0
    return Diffusion(
        GaussianKernel(),
        beta,
        gaussian_network(mean, sd, beta),
        event_shape=mean.shape,
        readout=readouts.Data(),
        last_step=readouts.Learned(),
        **options,
    )


def log_normal(x, mean, sd):
    """Log density of N(mean, sd²), entry by entry, nats."""
    return -0.5 * ((x - mean) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2 * np.pi)


def gaussian_law(diffusion, params=None):
    """Mean and sd of p(x_0), entry by entry, where steps are Gaussian and affine in each entry."""
    reverse = diffusion.bind(params or {})
    ends = jnp.stack([jnp.zeros(diffusion.event_shape), jnp.ones(diffusion.event_shape)])
    mean, variance = np.zeros(diffusion.event_shape), np.ones(diffusion.event_shape)
    for t in range(diffusion.T, 0, -1):
        law = reverse.step(ends, jnp.full(2, t))
        law = reverse.data(ends).base if t == 1 else law
        at_0, at_1 = np.asarray(law.loc, float)
        spread = np.broadcast_to(np.asarray(law.scale, float), ends.shape)[0]
        mean = at_0 + (at_1 - at_0) * mean
        variance = (at_1 - at_0) ** 2 * variance + spread**2
    return mean, np.sqrt(variance)


def enumerate_diffusion(diffusion, params=None):
    """States of x_0 and their probabilities, through all states of all levels."""
    kernel, (length,) = diffusion.kernel, diffusion.event_shape
    levels = np.array(list(itertools.product(range(kernel.num_states), repeat=length)))
    data = np.array(list(itertools.product(range(kernel.num_data_states), repeat=length)))
    reverse = diffusion.bind(params or {})

    def to(targets, law):
        logs = np.asarray(law.log_prob(jnp.asarray(targets)[:, None]), float)
        return np.exp(logs if logs.ndim == 2 else logs.sum(-1)).T

    p = to(levels, kernel.stationary((1, length)))[0]
    for t in range(diffusion.T, 1, -1):
        p = p @ to(levels, reverse.step(jnp.asarray(levels), jnp.full(len(levels), t)))
    return data, p @ to(data, reverse.data(jnp.asarray(levels)))


def covariance_of_diffusion(diffusion, d):
    """Covariance of p(x_0) of a diffusion of mean 0 and linear steps, x_s = A x_t + noise."""
    reverse = diffusion.bind({})
    ones = jnp.concatenate([jnp.zeros((1, d)), jnp.eye(d)])

    def matrices(law):
        loc, scale = np.asarray(law.loc, np.float64), np.asarray(law.scale, np.float64)
        return (loc[1:] - loc[0]).T, np.diag(scale[0] ** 2)

    cov = np.eye(d)
    law_at = jax.jit(lambda t: reverse.step(ones, jnp.full(1 + d, t)))
    for t in range(reverse.T, 1, -1):
        a, noise = matrices(law_at(t))
        cov = a @ cov @ a.T + noise
    a, noise = matrices(reverse.data(ones).base)
    return a @ cov @ a.T + noise


def moments(smc):
    """Weighted mean and variance of every entry."""
    sites, log_w = smc.get_weighted_samples()
    w = np.exp(log_w)[:, None]
    mean = (w * sites["x_0"]).sum(0)
    return mean, (w * (sites["x_0"] - mean) ** 2).sum(0)
