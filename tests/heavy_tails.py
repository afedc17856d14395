"""Likelihoods that are not Gaussian, under two priors, with long references.

Four measurements, y = A x_0 + noise of scale 0.5, or counts, of eight numbers:

    normal    N(0, I), T = 40, exact at every level; A = 10 N(0, 1)/√8
    mixture   25 Gaussians, 100 steps; A of `gaussian_mixtures`

Reference on the normal prior: importance sampling of z = A x_0, by half from the noise around y and
half from the prior (for counts, by half from the prior and half from wide Gaussians about its
mode). On the mixture: importance sampling by draws of the diffusion itself, whose 100 steps are not
quite the mixture.
"""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import gaussian_mixtures as mixtures
from probdiff import infer, sample, standard_diffusion

D, M, SCALE, LONG = 8, 4, 0.5, 200_000


def contaminated(z):
    """A tenth of the measurements has ten times the noise."""
    shares = dist.Categorical(probs=jnp.broadcast_to(jnp.array([0.9, 0.1]), (*z.shape, 2)))
    scales = SCALE * jnp.broadcast_to(jnp.array([1.0, 10.0]), (*z.shape, 2))
    return dist.MixtureSameFamily(shares, dist.Normal(z[..., None], scales))


LAWS = {
    "student": lambda z: dist.StudentT(2.0, z, SCALE),
    "cauchy": lambda z: dist.Cauchy(z, SCALE),
    "laplace": lambda z: dist.Laplace(z, SCALE),
    "contaminated": contaminated,
    "poisson": lambda z: dist.Poisson(jax.nn.softplus(z + 1.0)),
    "gaussian": lambda z: dist.Normal(z, SCALE),
}


class Exact(NamedTuple):
    """Posterior mean and standard deviation of x_0, log Z and its standard error."""

    mean: np.ndarray
    sd: np.ndarray
    log_z: float
    se: float


class Score(NamedTuple):
    """How far SMC is from the reference."""

    error: float
    """log Ẑ − log Z, nats."""
    ess: float
    """Least effective number over levels and runs, a share of the particles."""
    mean: float
    """Largest error of a posterior mean, in posterior standard deviations."""
    reference: float
    """Standard error of the reference's log Z."""
    seconds: float
    """Of the run, with what it compiles."""


def weighed(log_w, x, within=0.0):
    """Moments of weighted draws; `within` is the variance that each draw stands for."""
    log_w = np.asarray(log_w, np.float64)
    w = np.exp(log_w - log_w.max())
    share = w / w.sum()
    mean = share @ x
    sd = np.sqrt(share @ (x - mean) ** 2 + within)
    log_z = np.log(w.mean()) + log_w.max()
    return Exact(mean, sd, log_z, w.std() / w.mean() / np.sqrt(len(w)))


def matrix(prior, seed):
    rng = np.random.default_rng(seed)
    if prior == "normal":
        return 10 * rng.normal(size=(M, D)) / np.sqrt(D)
    return np.asarray(mixtures.problem(seed, D, M).matrix)


def observation(prior, law, seed):
    """A x*, x* of the prior, and y."""
    rng, A = np.random.default_rng(1000 + seed), matrix(prior, seed)
    x = rng.normal(size=D)
    if prior == "mixture":
        weights = mixtures.problem(seed, D, M).weights
        x += mixtures.means(D)[rng.choice(25, p=weights)]
    y = LAWS[law](jnp.asarray(A @ x)).sample(jax.random.key(seed))
    return np.asarray(y, np.float32)


def on_normal(law, A, y, n=LONG):
    """By importance sampling of z = A x_0."""
    key_e, key_z = jax.random.split(jax.random.key(7))
    S = A @ A.T
    prior = dist.MultivariateNormal(jnp.zeros(M), jnp.asarray(S, jnp.float32))
    of_z = LAWS[law]
    if law == "poisson":

        def log_p(z):
            return of_z(z).log_prob(y).sum() + prior.log_prob(z)

        def newton(_, z):
            return z - 0.5 * jnp.linalg.solve(jax.hessian(log_p)(z), jax.grad(log_p)(z))

        z = jax.lax.fori_loop(0, 100, newton, jnp.zeros(M))
        H = -jax.hessian(log_p)(z)
        near = dist.MultivariateStudentT(4.0, z, jnp.linalg.cholesky(1.5 * jnp.linalg.inv(H)))
        log_near = near.log_prob
        first = near.sample(key_e, (n // 2,))
    else:  # symmetric: the density of y about z is that of z about y

        def log_near(z):
            return of_z(z).log_prob(y).sum(-1)

        first = of_z(jnp.asarray(y)).sample(key_e, (n // 2,))
    z = jnp.concatenate([first, prior.sample(key_z, (n // 2,))])
    log_prior = prior.log_prob(z)
    log_q = jnp.logaddexp(log_near(z), log_prior) - jnp.log(2.0)
    log_w = of_z(z).log_prob(y).sum(-1) + log_prior - log_q
    gain = np.linalg.solve(S, A)
    return weighed(log_w, np.asarray(z, np.float64) @ gain, np.diag(np.eye(D) - A.T @ gain))


@functools.cache
def draws_of_mixture(seed):
    p = np.asarray(mixtures.packed(mixtures.problem(seed, D, M)))
    return sample.ancestral(
        jax.random.key(9), mixtures.diffusion(D, M), {}, LONG,
        context=np.broadcast_to(p, (LONG, len(p))), steps=mixtures.STEPS, block_size=100_000,
    ).astype(np.float32)  # fmt: skip


@functools.cache
def prior_of(prior):
    if prior == "normal":
        return standard_diffusion((D,), T=40).prior({})
    covariance = np.eye(D) + np.cov(mixtures.means(D).T, bias=True)
    return mixtures.diffusion(D, M).prior({}, variance=mixtures.widest(covariance))


@functools.cache
def sampler(prior, law, particles, runs, twist):
    made = prior_of(prior)

    def program(A, y, context):
        x = made() if prior == "normal" else made(context=context)
        numpyro.sample("y", LAWS[law](A @ x).to_event(1), obs=y)

    steps = None if prior == "normal" else mixtures.STEPS
    return infer.SMC(program, num_particles=particles, num_runs=runs, steps=steps, twist=twist)


def score(prior, law, seed, particles=1000, runs=2, twist=None):
    """How SMC does on a problem."""
    A, y = matrix(prior, seed), observation(prior, law, seed)
    if prior == "normal":
        exact = on_normal(law, A, y)
    else:
        draws = draws_of_mixture(seed)
        exact = weighed(LAWS[law](jnp.asarray(draws @ A.T)).log_prob(y).sum(-1), draws)
    smc = sampler(prior, law, particles, runs, twist)
    context = mixtures.packed(mixtures.problem(seed, D, M))
    A = A.astype(np.float32)
    start = time.perf_counter()
    smc.run(jax.random.key(seed), A, y, context)
    seconds = time.perf_counter() - start
    sites, log_w = smc.get_weighted_samples()
    mean = np.exp(log_w) @ sites["x_0"]
    ess = float(smc.result.outcome.trace.ess.min()) / particles
    off = np.abs(mean - exact.mean) / exact.sd
    return Score(smc.log_evidence - exact.log_z, ess, off.max(), exact.se, seconds)
