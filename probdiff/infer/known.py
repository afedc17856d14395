"""Known entries by the readout's own law of each, and the bridge to them as proposal.

A Gaussian of the data's covariance knows how numbers depend on each other, not their shape. The
`Mixture` readout knows the shape of each, not their dependence. For known x_0,i = y_i it says

    log ψ_t = γ_t Σ_{i known} log p(x_0,i = y_i | x_t),         its mass where x_0 is on a grid,

and its proposal is the bridge q(x_s,i | x_t,i, x_0,i = y_i), averaged over the cell of a grid; a
diffusion of independent entries then has weights of one. A product over entries counts many times
over what correlated ones share; the power γ_t undoes that. For Gaussian x_0 of covariance C, and
C_t given x_t, with D = diag(C_t)⁻¹, M = C − C_t the covariance of x̂_0 and E that of its error, all
on the known entries, it is the regression of the exact log-likelihood on the product's as x̂_0
varies,

    γ_t = tr(M D) / tr(D C_t D (M + E)),

1 for independent entries and a perfect network, and 0 where x̂_0 is mostly error.

Other sites count as in `LaplaceTwist` without the data's covariance: widened by w_t, known entries
put in. Where there are none, no pull-back through the network is needed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float

from probdiff import readouts
from probdiff.infer.laplace import Known, LaplaceTwist
from probdiff.infer.spread import Problem, within_cells
from probdiff.infer.twist import Tilt, View
from probdiff.kernels import bridge_mean, bridge_variance, bridge_weights
from probdiff.prior import PriorDraw
from probdiff.readouts.mixture import LEAST_VARIANCE
from probdiff.types import Step


@dataclasses.dataclass(frozen=True)
class ReadoutTwist(LaplaceTwist):
    """Known entries by p(x_0,i | x_t) of a `Mixture` readout: for exact pixels.

    Give the prior the covariance of its data; without it entries count as independent, γ_t = 1 but
    for the network's own error. Other observed sites count as in `LaplaceTwist`.

    Args:
        rank: As in `LaplaceTwist`, for the other sites.

    Raises:
        ValueError: if `rank` is below 1; at the run, if the readout is not a `Mixture`.

    Example:
        Two pixels near −1 or 1, as ½ N(−1, ¼) + ½ N(1, ¼) each, of which the first is seen:

        >>> rates = schedules.log_snr_linear(30, beta_1=1e-3, alpha_bar_T=1e-3)
        >>> options = {"readout": readouts.Mixture(2, -1.0, 1.0), "last_step": readouts.Learned()}
        >>> prior = standard_diffusion((2,), beta=rates, **options).prior({})
        >>> program = lambda known: prior(known=known, mask=np.array([True, False]))
        >>> smc = infer.SMC(program, num_particles=1000, twist=infer.ReadoutTwist())
        >>> smc.run(jax.random.key(0), jnp.array([1.0, 0.0]))
        >>> round(smc.log_evidence, 1)  # log ½ N(1; 1, ¼) = −0.9
        -0.9
        >>> [round(float(sd), 1) for sd in smc.get_samples()["x_0"].std(0)]  # 2nd as before, √1.25
        [0.0, 1.1]
    """

    uses_covariance = False

    def check(self, draw: PriorDraw) -> None:
        """Raise a `ValueError` unless the readout says a law of x_0."""
        super().check(draw)
        readout = draw.reverse.readout
        if not isinstance(readout, readouts.Mixture):
            raise ValueError(
                f"twist ReadoutTwist needs the readout Mixture, which says a law of each number of "
                f"x_0 given x_t; got {readout}. Use LaplaceTwist"
            )

    def __call__(self, view: View) -> Tilt:
        """The bridge for known entries, the expansion of log r for the others."""
        tilt = super().__call__(view)
        if view.known is None:
            return tilt
        target, _ = _x_0_known(view)
        to_known = bridge_mean(view.x_t, target, view.step) - view.mean
        shift = jnp.where(view.mask, to_known, tilt.shift if view.problem.is_observed else 0.0)
        return tilt._replace(shift=shift, factors=jnp.where(view.mask, 0.0, tilt.factors))

    def of_known(self, view: View) -> Known:
        """Their law, and the precision of the bridge."""
        weight_0, _ = bridge_weights(view.step)
        _, width = _x_0_known(view)
        bridge = bridge_variance(view.step) + weight_0**2 * width
        narrower = jnp.maximum(1 / bridge - 1 / view.variance, 0.0)
        log_p = jnp.where(view.mask, _log_law(view), 0.0)
        share = power(view.problem, view.problem.reverse.steps.at(view.t, 0), view.reading.error)
        return Known(share * jnp.sum(log_p, -1), 0.0, narrower)

    def products(self, size: int, *, is_known_alone: bool) -> int:
        """None where only known entries are observed."""
        return 0 if is_known_alone else super().products(size, is_known_alone=is_known_alone)


def _x_0_known(view: View) -> tuple[Array, Array]:
    """Mean and variance of a known x_0 given x_t: of its cell, where it is on a grid.

    A cell counts as the Gaussian of its variance Δ²/12: a wider law leaves the cell, a narrower
    one itself.
    """
    law, cell = view.x_0_given(), within_cells(view.problem)
    mean, variance = (view.problem.flat(a) for a in (law.mean, law.variance))
    share = variance / (variance + cell)
    return mean + share * (view.known - mean), share * cell


def _log_law(view: View) -> Float[Array, "P B d"]:
    """log p(x_0,i = known | x_t), elementwise; no narrower than the last step may be."""
    problem, law = view.problem, view.x_0_given()
    reverse, parts = problem.reverse, law.component_distribution
    lead = view.x_t.shape
    mean, variance = (a.reshape(*lead, -1) for a in (parts.mean, parts.variance))
    sd = jnp.sqrt(variance + LEAST_VARIANCE * reverse.steps.beta[0])
    known = view.known[..., None]
    if reverse.grid is None:
        log_p = dist.Normal(mean, sd).log_prob(known)
    else:
        loc, scale = (problem.of_entries(a)[:, None] for a in reverse.units)
        grid = reverse.grid.map(
            lambda a: np.broadcast_to(a, reverse.event_shape).reshape(-1, 1)  # as known is
        )
        values = grid.nearest(known * scale + loc)
        log_p = grid.log_mass(values, mean * scale + loc, sd * scale)
    logits = law.mixing_distribution.logits.reshape(*lead, -1)
    return jax.nn.logsumexp(logits + log_p, -1)


def power(problem: Problem, step: Step, error: Array | float) -> Float[Array, "*B"]:
    """γ_t, one for all systems, or one for each where they differ in what is known.

    `error` is the mean squared error of the noise that the network reads.
    """
    dtype, covariance = step.alpha_bar_t.dtype, problem.draw.covariance
    signal, noise = step.alpha_bar_t, step.noise_t
    if covariance is None:
        tau2 = jnp.broadcast_to(problem.of_entries(problem.draw.variance), problem.size)
        axes = jnp.eye(problem.size, dtype=dtype)
    else:
        axes, tau2 = jnp.asarray(covariance.axes, dtype), covariance.variances
    tau2 = jnp.asarray(tau2, dtype)
    inside = (axes * (noise * tau2 / (noise + signal * tau2))) @ axes.T  # C_t
    moves = (axes * (tau2**2 / (noise + signal * tau2))) @ axes.T  # M/ᾱ_t, which β_T = 1 leaves
    inverse = 1 / jnp.diag(inside)
    weighted = jnp.asarray(problem.mask, dtype) * inverse
    shared = jnp.sum(weighted @ (inside * moves) * weighted, -1)
    errors = error * noise * jnp.sum(weighted, -1)  # ᾱ_t E = error · noise
    total = signal**2 * shared + errors
    useful = signal**2 * (weighted @ jnp.diag(moves))
    return jnp.where(total > 0, useful / jnp.where(total > 0, total, 1.0), 1.0)
