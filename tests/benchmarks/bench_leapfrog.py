"""Cost of one leapfrog step of `ParticleGibbs` over a value and gradient of the same density.

    python -m tests.benchmarks.bench_leapfrog [--rounds 10]

The floor is one value and gradient of log w + log r, all T network calls of all chains in one
batch, compiled by itself; ours is a move of 24 steps, its draws and its acceptance included, over
24. A perceptron of a million parameters on 64 numbers, 32 of them known, T = 100.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from probdiff.infer import moves
from probdiff.infer.coordinates import coordinates, path_of
from probdiff.infer.particles import known_of
from probdiff.infer.program import read
from probdiff.infer.spread import Problem
from tests.benchmarks import clock
from tests.benchmarks.bench_smc import model

LEAPS = 24


def ours_and_floor(d, width, depth, T, chains):
    """A move, and a value and gradient, of as many chains at the same trajectories."""
    diffusion, params = model(d, width, depth, T)
    prior, is_known = diffusion.prior(params), np.arange(d) % 2 == 0

    def program(x):
        prior(known=x, mask=is_known)

    conditioned = read(program, (jnp.zeros(d),), {}).conditioned
    known = known_of(conditioned)

    def at(conditioned, known):
        problem = Problem(conditioned, conditioned.reverse, *known, False, False)
        by = coordinates(problem.draw, *known)
        by = by._replace(sd=jnp.broadcast_to(by.sd, (1, d)))

        def density(path):
            return moves.log_density(problem, by, lambda x: jnp.zeros(x.shape[:2]), path)

        return by, density

    by, density = at(conditioned, known)
    x_0 = jax.random.normal(jax.random.key(0), (chains, 1, d))
    path = path_of(jax.random.key(1), conditioned.reverse, by, x_0)
    point = jax.jit(lambda path: moves.at(density, path))(path)

    @jax.jit
    def gradient(conditioned, known, path):
        return moves.at(at(conditioned, known)[1], path)

    @jax.jit
    def move(conditioned, known, point):
        density = at(conditioned, known)[1]
        return moves.move(jax.random.key(2), density, point, jnp.full(1, 1e-3), LEAPS)

    return lambda: move(conditioned, known, point), lambda: gradient(conditioned, known, path)


def ratio(rounds, d=64, width=512, depth=4, T=100, chains=8):
    """One leapfrog over one gradient."""
    ours, floor = ours_and_floor(d, width, depth, T, chains)
    return clock.pair("leapfrog / gradient", ours, lambda: [floor() for _ in range(LEAPS)],
                      rounds, LEAPS, "a step")  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    print(ratio(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
