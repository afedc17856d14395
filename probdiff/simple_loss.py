"""L_simple and its sum with the bound: objectives that pay for samples rather than for nats.

The reverse step's mean and the bridge's differ by how far x̂_0 is from x_0, which in units of the
noise in x_t is the error of the noise that the network reads,

    |ε̂ − ε|² = ᾱ_t/(1−ᾱ_t) |x̂_0 − x_0|² = ᾱ_t/(1−ᾱ_t) |mean_p − mean_q|² / w_0²,

w_0 the bridge's weight on x_0. The bound weighs it by β_t² / (2σ² (1−β_t)(1−ᾱ_t)) and so looks
hardest at the smallest noise, where the bits are; L_simple weighs all steps alike:

    L_simple = (1/T) Σ_t E |ε̂ − ε|².

A code of x_0 that the network is told then holds what lowers the error at levels that weigh most,
the coarse features of x_0 at high noise, the fine ones at low noise: `SimpleLoss` takes weights
w(σ_t), of mean 1, with σ_t² = (1−ᾱ_t)/ᾱ_t.

It says nothing of the variance of a reverse step. `CombinedLoss` adds a small multiple of −K in
which the means are held fixed, so that the bound trains the variances and L_simple the means.

Neither is a bound: report K of what they trained. Under a tied last step the term of t = 1 is that
of the tied kernel, which no network has part in.

Sources: Ho et al. (2020), eqs. 12 and 14; Nichol & Dhariwal (2021), section 3.1, for the sum;
Mittal et al. (2023) for weights that choose what a code holds.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int

from probdiff.arguments import POSITIVE, check_callable, check_number, known, shown
from probdiff.elbo import SampledTimeLoss, bridge_at, prior_kl, step_kl
from probdiff.kernels import GaussianKernel, bridge_weights
from probdiff.reverse import DataGivenFirst, Outputs, Reverse, State, Values
from probdiff.trajectories import ForwardTrajectory


class SimpleLoss(SampledTimeLoss):
    """L_simple: the mean squared error of the noise, summed over the numbers of an example.

    An objective of `SVI` that pays for samples rather than for nats: it is no bound, and says
    nothing of the variance of a reverse step. For `GaussianKernel` alone.

    Args:
        noise_weight: Weight w(σ) of a level whose noise is σ times its signal, an elementwise
            function, divided by its mean over the levels; all alike if absent. σ itself makes a
            code of x_0 hold what is coarse, 1/σ what is fine. Where most of the weight is at few
            levels, `ImportanceTimes` looks there most.
        **options: Those of `SampledTimeELBO`.

    Raises:
        ValueError: where it is called, if weights are not finite, or negative, or all zero.

    Example:
        >>> epsilon = readouts.Epsilon(readouts.ForwardVariance())
        >>> diffusion = standard_diffusion(readout=epsilon, last_step=readouts.Learned())  # ε̂ = 0
        >>> svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), SimpleLoss())
        >>> x_0 = jnp.ones(20_000)
        >>> loss = jax.jit(svi.evaluate)(svi.init(jax.random.key(0), x_0), x_0) / 20_000
        >>> bool(abs(loss - 1) < 0.1)  # E ε² = 1
        True

    Sources: Ho et al. (2020), eq. 14; Mittal et al. (2023), section 2, for weights.
    """

    def __init__(
        self, num_particles: int = 1, *, noise_weight: Callable[[Array], Any] | None = None,
        **options: Any,
    ):  # fmt: skip
        check_callable("noise_weight(sigma)", or_none=True, noise_weight=noise_weight)
        self.noise_weight = noise_weight
        super().__init__(num_particles, **options)

    def step_loss(
        self, forward: ForwardTrajectory, reverse: Reverse, x_t: State, t: Array,
        outputs: Outputs | None = None,
    ) -> Float[Array, "*lead"]:  # fmt: skip
        """w_t |ε̂ − ε|² / T at t."""
        error = _noise_error(forward, reverse.step(x_t, t, outputs, examples_first=True), x_t, t)
        return error if self.noise_weight is None else self._weights(forward)[t - 1] * error

    def end_loss(self, forward: ForwardTrajectory) -> Float[Array, "*batch"]:
        """0."""
        return jnp.zeros(forward.batch_shape)

    def data_loss(
        self, forward: ForwardTrajectory, x_0_given_x_1: DataGivenFirst, x_0: Values
    ) -> Float[Array, "*batch"]:
        """w_1 |ε̂ − ε|² / T at t = 1."""
        error = _first_noise_error(forward, x_0_given_x_1)
        return error if self.noise_weight is None else self._weights(forward)[0] * error

    def _weights(self, forward: ForwardTrajectory) -> Float[Array, " T"]:
        """w_1..w_T."""
        with jax.ensure_compile_time_eval():  # fixed rates are looked at within `jit`, too
            sigma = jnp.sqrt(forward.steps.noise_t / forward.steps.alpha_bar_t)
            weights = jnp.broadcast_to(jnp.asarray(self.noise_weight(sigma)), sigma.shape)
        values = known(weights)
        if values is not None and not (np.isfinite(values) & (values >= 0)).all():
            raise ValueError(
                f"noise_weight must be finite and not negative at every level; got {shown(values)} "
                f"at sigma = {shown(known(sigma))}"
            )
        if values is not None and not values.any():
            raise ValueError("noise_weight must be positive at some level; got 0 at all")
        return weights / jnp.mean(weights)


class CombinedLoss(SampledTimeLoss):
    """L_simple − `weight` · K, the means of the reverse steps held fixed in K.

    So the bound trains the variances and L_simple the means. For `GaussianKernel` alone.

    Args:
        weight: Weight of −K in nats, above 0; 0.001 in Nichol & Dhariwal (2021).
        **options: Those of `SampledTimeELBO`.

    Raises:
        ValueError: if the weight is not above 0.

    Example:
        >>> diffusion = standard_diffusion()  # it is N(0, 1)
        >>> svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), CombinedLoss(weight=1.0))
        >>> x_0 = jnp.ones(20_000)
        >>> loss = jax.jit(svi.evaluate)(svi.init(jax.random.key(0), x_0), x_0) / 20_000
        >>> simple = np.cumprod(1 - diffusion.rates).mean()  # L_simple is the mean of ᾱ_t here
        >>> bool(abs(loss - simple - 0.5 * np.log(2 * np.pi) - 0.5) < 0.1)  # −K = −log N(1; 0, 1)
        True

    Source: Nichol & Dhariwal (2021), section 3.1.
    """

    def __init__(self, weight: float = 1e-3, **options: Any):
        check_number(POSITIVE, weight=weight)
        self.weight = weight
        super().__init__(**options)

    def step_loss(
        self, forward: ForwardTrajectory, reverse: Reverse, x_t: State, t: Array,
        outputs: Outputs | None = None,
    ) -> Float[Array, "*lead"]:  # fmt: skip
        """|ε̂ − ε|² / T, and `weight` times the KL of the step."""
        law = reverse.step(x_t, t, outputs, examples_first=True)
        kl = step_kl(forward, _mean_held(law), x_t, t)
        return _noise_error(forward, law, x_t, t) + self.weight * kl

    def end_loss(self, forward: ForwardTrajectory) -> Float[Array, "*batch"]:
        """`weight` times KL( q(x_T | x_0) ‖ π )."""
        return self.weight * prior_kl(forward)

    def data_loss(
        self, forward: ForwardTrajectory, x_0_given_x_1: DataGivenFirst, x_0: Values
    ) -> Float[Array, "*batch"]:
        """|ε̂ − ε|² / T at t = 1, and −`weight` log p(x_0 | x_1)."""
        held = x_0_given_x_1.with_base(_mean_held(x_0_given_x_1.base))
        return _first_noise_error(forward, x_0_given_x_1) - self.weight * held.log_prob(x_0)


def _mean_held(step: dist.Distribution) -> dist.Distribution:
    return dist.Normal(jax.lax.stop_gradient(step.loc), step.scale)


def _noise_error(
    forward: ForwardTrajectory, law: dist.Distribution, x_t: State, t: Int[Array, "*lead"]
) -> Float[Array, "*lead"]:
    """|ε̂ − ε|² / T at given levels."""
    _check(forward)
    weight_0, _ = bridge_weights(forward.step_at(t))
    return _scaled(forward, (law.mean - bridge_at(forward, x_t, t).mean) / weight_0, t)


def _first_noise_error(
    forward: ForwardTrajectory, x_0_given_x_1: DataGivenFirst
) -> Float[Array, "*batch"]:
    _check(forward)
    return _scaled(forward, x_0_given_x_1.base.mean - forward.x_0, jnp.ones((), jnp.int32))


def _scaled(forward: ForwardTrajectory, error: Array, t: Int[Array, "*lead"]) -> Array:
    """ᾱ_t/(1−ᾱ_t) |x̂_0 − x_0|² / T over the observed entries."""
    step = forward.step_at(t)
    square = step.alpha_bar_t / step.noise_t * error**2
    return forward.sum_observed(square) / forward.steps.T


def _check(forward: ForwardTrajectory) -> None:
    if not isinstance(forward.kernel, GaussianKernel):
        raise ValueError(
            "kernel must be GaussianKernel() for L_simple, whose noise is Gaussian; got "
            f"{forward.kernel}. Use SampledTimeELBO"
        )
