"""Readouts of a Gaussian diffusion: a network's output as p(x_s | x_t), with s = t − 1.

The reverse step of a Gaussian diffusion is N(mean, variance), elementwise. A readout says what the
network's first output z stands for; each also gives x̂_0 = E[x_0 | x_t], since mean and x̂_0 are
linked by the bridge, mean = w_0 x̂_0 + w_t x_t:

    Perturbation  mean = √(1−β_t) x_t + √β_t z        z = 0, variance β_t: exact for N(0, 1)
    Epsilon       x̂_0 = (x_t − √(1−ᾱ_t) z) / √ᾱ_t     z is the noise
    Data          x̂_0 = z
    Velocity      x̂_0 = √ᾱ_t x_t − √(1−ᾱ_t) z         z = √ᾱ_t ε − √(1−ᾱ_t) x_0
    Score         x̂_0 = (x_t + (1−ᾱ_t) z) / √ᾱ_t      z = ∇ log q(x_t)

`Perturbation` is the 2015 readout in the form of its authors' program: the paper prints
(x − z)(1 − Σ) + z, whose stationary variance is about one half.

Their variance is learned, sigmoid(v + logit β_t) with v the network's second output, or one of the
two ends between which the true one lies when the data have unit variance (eq. 24): β_t
(`ForwardVariance`), or the bridge's β_t (1−ᾱ_s)/(1−ᾱ_t) (`BridgeVariance`, too narrow: on N(0, 1)
data with a perfect denoiser x_1 gets variance .819, .961, .992 at T = 40, 200, 1000 under
`log_snr_linear(T, beta_1=1e-3, alpha_bar_T=1e-4)`, where `ForwardVariance` is exact). Networks
trained elsewhere say where between these it lies (`InterpolatedVariance`).

Sources: Sohl-Dickstein et al. (2015), section 2.2, eq. 24 and appendix D.2.1; Ho et al. (2020), eq.
15, for the noise; Salimans & Ho (2022), section 4, for the velocity; Nichol & Dhariwal (2021), eq.
15, for the interpolation.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float

from probdiff.arguments import as_array, check_object, shown
from probdiff.kernels import (
    DiscreteKernel,
    GaussianKernel,
    Kernel,
    bridge_mean,
    bridge_variance,
    bridge_weights,
)
from probdiff.types import Step, as_states, check_step

Output = Float[Array, "*shape"]
State = Float[Array, "*#shape"]
Outputs = tuple[Array, ...]


class Variance(abc.ABC):
    """Variance of the reverse step p(x_s | x_t), elementwise.

    Abstract: a subclass returns it from the network's second output (None where `num_outputs` is 0)
    and the coefficients of the step; a frozen dataclass compares by its fields.

    Example:
        The geometric mean of the two ends of eq. 24:

        >>> class Middle(readouts.Variance):
        ...     def __call__(self, output, step):
        ...         ends = readouts.ForwardVariance(), readouts.BridgeVariance()
        ...         return jnp.sqrt(ends[0](None, step) * ends[1](None, step))
        >>> step = schedules.steps(schedules.harmonic(4)).at(2, event_dim=0)
        >>> lower, upper = readouts.BridgeVariance(), readouts.ForwardVariance()
        >>> [round(float(v(None, step)), 3) for v in (lower, Middle(), upper)]
        [0.167, 0.236, 0.333]
    """

    num_outputs: int = 0
    """How many numbers the network gives for it, per number of x: 0 or 1."""

    @abc.abstractmethod
    def __call__(self, output: Output | None, step: Step) -> Float[Array, "..."]:
        """Variance, from the network's second output where `num_outputs` is 1."""


@dataclasses.dataclass(frozen=True)
class LearnedVariance(Variance):
    """sigmoid(v + logit β_t), so that v = 0 gives β_t (2015, appendix D.2.1).

    v is the network's second output for each number of x: `outputs=2` in the package's networks.

    Example:
        >>> step = schedules.steps(schedules.harmonic(4)).at(2, event_dim=0)  # β_2 = 1/3
        >>> variance = readouts.LearnedVariance()
        >>> [round(float(variance(jnp.array(v), step)), 3) for v in (-1.0, 0.0, 1.0)]
        [0.155, 0.333, 0.576]
    """

    num_outputs = 1

    def __call__(self, output: Output | None, step: Step) -> Float[Array, "..."]:
        """Variance sigmoid(v + logit β_t) in (0, 1)."""
        output = as_array("output", output)
        check_step(step)
        return jax.nn.sigmoid(output + jnp.log(step.beta) - jnp.log1p(-step.beta))


@dataclasses.dataclass(frozen=True)
class ForwardVariance(Variance):
    """β_t: the upper end of eq. 24, exact for N(0, 1) data; nothing for the network to say.

    Example:
        >>> table = schedules.steps(schedules.harmonic(4))
        >>> [round(v, 3) for v in readouts.ForwardVariance()(None, table).tolist()]
        [0.25, 0.333, 0.5, 1.0]
    """

    def __call__(self, output: Output | None, step: Step) -> Float[Array, "..."]:
        """Variance β_t."""
        check_step(step)
        return step.beta


@dataclasses.dataclass(frozen=True)
class BridgeVariance(Variance):
    """β_t (1−ᾱ_s)/(1−ᾱ_t): the lower end of eq. 24, too narrow unless x̂_0 is certain.

    At t = 1 the bridge has no width, which no density survives: β_1 stands there instead.

    Example:
        >>> table = schedules.steps(schedules.harmonic(4))  # β_t is 1/4, 1/3, 1/2, 1
        >>> [round(v, 3) for v in readouts.BridgeVariance()(None, table).tolist()]
        [0.25, 0.167, 0.333, 0.75]
    """

    def __call__(self, output: Output | None, step: Step) -> Float[Array, "..."]:
        """Variance of the bridge; β_1 at t = 1."""
        check_step(step)
        return jnp.where(step.t == 1, step.beta, bridge_variance(step))


@dataclasses.dataclass(frozen=True)
class InterpolatedVariance(Variance):
    """Between the two ends of eq. 24 on the scale of logarithms, as the network says.

        log variance = (1 + v)/2 · log β_t + (1 − v)/2 · log β̃_t,    β̃_t = β_t (1−ᾱ_s)/(1−ᾱ_t)

    v is the network's second output for each number of x, meant to lie in [−1, 1] as in its
    authors' program; (1 + v)/2 is the v of the paper. At t = 1, where β̃_1 = 0, β_1 stands for it
    (they put β̃_2 there).

    Example:
        >>> step = schedules.steps(schedules.harmonic(4)).at(2, event_dim=0)  # β̃_2 = 1/6, β_2 = 1/3
        >>> variance = readouts.InterpolatedVariance()
        >>> [round(float(variance(jnp.array(v), step)), 3) for v in (-1.0, 0.0, 1.0)]
        [0.167, 0.236, 0.333]

    Source: Nichol & Dhariwal (2021), eq. 15.
    """

    num_outputs = 1

    def __call__(self, output: Output | None, step: Step) -> Float[Array, "..."]:
        """Variance β_t^((1+v)/2) β̃_t^((1−v)/2)."""
        output = as_array("output", output)
        check_step(step)
        least = BridgeVariance()(None, step)
        return least * jnp.exp(0.5 * (1 + output) * (jnp.log(step.beta) - jnp.log(least)))


class GaussianReadout(abc.ABC):
    """Reverse step N(mean, variance) of a Gaussian diffusion, read from a network's output.

    Abstract; `Denoiser` is the base of those that give one point x̂_0, `Mixture` gives a law of
    x_0. `num_outputs` is how many numbers the network owes for each number of x, laid side by side
    along its last axis.

    Example:
        >>> kernel = GaussianKernel()
        >>> readouts.Epsilon(readouts.ForwardVariance()).num_outputs(kernel)  # z
        1
        >>> readouts.Epsilon(readouts.LearnedVariance()).num_outputs(kernel)  # z and v
        2
        >>> readouts.Mixture(components=4).num_outputs(kernel)  # 4 logits, means and widths
        12
    """

    needs_signal: bool = False
    """Whether x̂_0 divides by √ᾱ_t, which rules out ᾱ_T = 0."""

    def num_outputs(self, kernel: GaussianKernel | DiscreteKernel) -> int:
        """Numbers the network gives per number of x."""
        check_object(Kernel, "a kernel such as GaussianKernel()", kernel=kernel)
        if not isinstance(kernel, GaussianKernel):
            raise ValueError(
                f"readout {type(self).__name__} is for GaussianKernel; got {kernel}. Use Logits "
                "or DataLogits"
            )
        return self.outputs_per_number

    @property
    @abc.abstractmethod
    def outputs_per_number(self) -> int:
        """How many numbers the network gives for each number of x."""

    @abc.abstractmethod
    def __call__(
        self, kernel: GaussianKernel, outputs: Outputs, x_t: State, step: Step
    ) -> dist.Distribution:
        """Reverse step p(x_s | x_t), elementwise; as many outputs as `num_outputs`."""

    @abc.abstractmethod
    def longer_step(
        self, kernel: GaussianKernel, outputs: Outputs, x_t: State, trained: Step, step: Step
    ) -> dist.Distribution:
        """Reverse step from x_t over several levels at once, whose coefficients are `step`.

        `trained` are those of the single step from x_t, which the network was trained for.
        """

    @abc.abstractmethod
    def x_0_hat(self, kernel: GaussianKernel, outputs: Outputs, x_t: State, step: Step) -> Output:
        """Denoised point x̂_0 = E[x_0 | x_t]."""

    @abc.abstractmethod
    def fixed_variance(self, *, longer: bool) -> Variance | None:
        """Variance of a reverse step, a longer one or not; None where the network says it."""


def checked(
    readout: Any, kernel: Kernel, outputs: Any, x_t: Any, *steps: Step, states: int = 0
) -> tuple[Outputs, Array]:
    """Outputs and x_t as arrays, refused where they do not fit the readout and the steps.

    Names are those of the arguments, `trained` before `step` where there are two steps.
    """
    count = readout.num_outputs(kernel)
    for name, step in zip(("trained", "step")[-len(steps) :], steps, strict=True):
        check_object(Step, "a Step, as schedules.steps(beta).at(t, event_dim)", **{name: step})
    is_row = isinstance(outputs, tuple | list)
    if not is_row or not 1 <= len(outputs) <= count:
        raise ValueError(
            f"outputs must be a tuple of {count} arrays for {type(readout).__name__}; got "
            f"{shown(outputs)}"
        )
    (x_t,) = as_states(steps[0], states, x_t=x_t)
    outputs = [as_states(steps[0], outputs=each)[0] for each in outputs]
    try:
        x_t, *outputs = jnp.broadcast_arrays(x_t, *outputs)
    except ValueError:
        shapes = [each.shape for each in outputs]
        raise ValueError(f"outputs must have the shape of x_t, {x_t.shape}; got {shapes}") from None
    return tuple(outputs), x_t


class Denoiser(GaussianReadout):
    """A readout of one point x̂_0, and a variance beside it.

        p(x_s | x_t) = N(w_0 x̂_0 + w_t x_t, variance),    w_0 and w_t of `kernels.bridge_weights`

    Abstract: a subclass has a field `variance`, and says by `denoise` what the network's first
    output z stands for.

    Example:
        A network that says by how much x_0 differs from x_t:

        >>> import dataclasses
        >>> @dataclasses.dataclass(frozen=True)
        ... class Residual(readouts.Denoiser):
        ...     variance: readouts.Variance = readouts.BridgeVariance()
        ...     def denoise(self, z, x_t, step):
        ...         return x_t + z
        >>> step = schedules.steps(schedules.harmonic(4)).at(3, event_dim=1)
        >>> x_t, z = jnp.array([0.5, -2.0]), jnp.array([0.5, 3.0])
        >>> Residual().x_0_hat(GaussianKernel(), (z,), x_t, step).tolist()
        [1.0, 1.0]
    """

    variance: Variance

    def __post_init__(self) -> None:
        check_object(
            Variance, "a Variance such as readouts.LearnedVariance()", variance=self.variance
        )

    @property
    def outputs_per_number(self) -> int:
        """2 with a learned variance, else 1."""
        return 1 + self.variance.num_outputs

    def __call__(
        self, kernel: GaussianKernel, outputs: Outputs, x_t: State, step: Step
    ) -> dist.Distribution:
        """N(mean, variance)."""
        outputs, x_t = checked(self, kernel, outputs, x_t, step)
        variance = self.variance(outputs[1] if len(outputs) > 1 else None, step)
        return dist.Normal(self.mean(outputs[0], x_t, step), jnp.sqrt(variance))

    def longer_step(
        self, kernel: GaussianKernel, outputs: Outputs, x_t: State, trained: Step, step: Step
    ) -> dist.Distribution:
        """N(mean of the bridge at x̂_0, variance), a learned variance giving way to the bridge's."""
        outputs, x_t = checked(self, kernel, outputs, x_t, trained, step)
        mean = bridge_mean(x_t, self.denoise(outputs[0], x_t, trained), step)
        variance = self.fixed_variance(longer=True)(None, step)
        return dist.Normal(mean, jnp.sqrt(jnp.broadcast_to(variance, mean.shape)))

    def x_0_hat(self, kernel: GaussianKernel, outputs: Outputs, x_t: State, step: Step) -> Output:
        """What `denoise` makes of z."""
        outputs, x_t = checked(self, kernel, outputs, x_t, step)
        return self.denoise(outputs[0], x_t, step)

    def fixed_variance(self, *, longer: bool) -> Variance | None:
        """The variance unless the network says it, which it does for single steps alone."""
        if not self.variance.num_outputs:
            return self.variance
        return BridgeVariance() if longer else None

    def mean(self, z: Output, x_t: State, step: Step) -> Output:
        """Mean of the reverse step: the bridge's at x_0 = x̂_0."""
        return bridge_mean(x_t, self.denoise(z, x_t, step), step)

    @abc.abstractmethod
    def denoise(self, z: Output, x_t: State, step: Step) -> Output:
        """x̂_0 by what the network's first output z stands for."""


@dataclasses.dataclass(frozen=True)
class Perturbation(Denoiser):
    """Perturbed forward kernel, mean √(1−β_t) x_t + √β_t z: the readout of 2015.

    With z = 0 and variance β_t it is the exact reverse step of N(0, 1) data, from which training
    starts where a network's output starts at 0.

    Example:
        >>> step = schedules.steps(schedules.harmonic(4)).at(2, event_dim=1)
        >>> x_t, zero = jnp.array([0.5, -2.0]), jnp.zeros(2)
        >>> law = readouts.Perturbation()(GaussianKernel(), (zero, zero), x_t, step)  # z = v = 0
        >>> forward = GaussianKernel().transition(x_t, step)
        >>> bool(jnp.allclose(law.mean, forward.mean)), bool(jnp.allclose(law.scale, forward.scale))
        (True, True)
    """

    variance: Variance = LearnedVariance()

    def mean(self, z: Output, x_t: State, step: Step) -> Output:
        """Mean √(1−β_t) x_t + √β_t z."""
        return jnp.sqrt(1 - step.beta) * x_t + jnp.sqrt(step.beta) * z

    def denoise(self, z: Output, x_t: State, step: Step) -> Output:
        """The x_0 at which the bridge has this mean."""
        weight_0, weight_t = bridge_weights(step)
        return (self.mean(z, x_t, step) - weight_t * x_t) / weight_0


@dataclasses.dataclass(frozen=True)
class Epsilon(Denoiser):
    """The network predicts the noise ε of x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε; β_T must be below 1.

    Example:
        >>> step = schedules.steps(schedules.harmonic(4)).at(3, event_dim=1)
        >>> x_0, noise = jnp.array([0.5, -2.0]), jnp.array([0.1, 1.0])
        >>> x_t = jnp.sqrt(step.alpha_bar_t) * x_0 + jnp.sqrt(step.noise_t) * noise
        >>> x_0_hat = readouts.Epsilon().x_0_hat(GaussianKernel(), (noise,), x_t, step)
        >>> bool(jnp.allclose(x_0_hat, x_0, atol=1e-5))  # a network that is right about the noise
        True
    """

    variance: Variance = LearnedVariance()
    needs_signal = True

    def denoise(self, z: Output, x_t: State, step: Step) -> Output:
        """(x_t − √(1−ᾱ_t) z) / √ᾱ_t."""
        return (x_t - jnp.sqrt(step.noise_t) * z) / jnp.sqrt(step.alpha_bar_t)


@dataclasses.dataclass(frozen=True)
class Data(Denoiser):
    """The network predicts x_0 itself, on the scale of the diffusion: x̂_0 = z.

    Example:
        >>> kernel = GaussianKernel()
        >>> step = schedules.steps(schedules.harmonic(4)).at(3, event_dim=0)
        >>> x_0, x_t = jnp.array(0.5), jnp.array(-1.0)
        >>> law = readouts.Data(readouts.BridgeVariance())(kernel, (x_0,), x_t, step)
        >>> pinned = kernel.bridge(x_t, x_0, step)  # what the reverse step is when x̂_0 = x_0
        >>> bool(jnp.allclose(law.mean, pinned.mean)), bool(jnp.allclose(law.scale, pinned.scale))
        (True, True)
    """

    variance: Variance = LearnedVariance()

    def denoise(self, z: Output, x_t: State, step: Step) -> Output:
        """z."""
        return z


@dataclasses.dataclass(frozen=True)
class Velocity(Denoiser):
    """The network predicts √ᾱ_t ε − √(1−ᾱ_t) x_0.

    Example:
        >>> step = schedules.steps(schedules.harmonic(4)).at(3, event_dim=1)
        >>> x_0, noise = jnp.array([0.5, -2.0]), jnp.array([0.1, 1.0])
        >>> x_t = jnp.sqrt(step.alpha_bar_t) * x_0 + jnp.sqrt(step.noise_t) * noise
        >>> z = jnp.sqrt(step.alpha_bar_t) * noise - jnp.sqrt(step.noise_t) * x_0
        >>> x_0_hat = readouts.Velocity().x_0_hat(GaussianKernel(), (z,), x_t, step)
        >>> bool(jnp.allclose(x_0_hat, x_0, atol=1e-5))
        True
    """

    variance: Variance = LearnedVariance()

    def denoise(self, z: Output, x_t: State, step: Step) -> Output:
        """√ᾱ_t x_t − √(1−ᾱ_t) z."""
        return jnp.sqrt(step.alpha_bar_t) * x_t - jnp.sqrt(step.noise_t) * z


@dataclasses.dataclass(frozen=True)
class Score(Denoiser):
    """The network predicts ∇ log q(x_t) = −E[ε | x_t] / √(1−ᾱ_t); β_T must be below 1.

    Example:
        N(0, 1) data stay N(0, 1) at every level, whose score is −x_t:

        >>> step = schedules.steps(schedules.harmonic(4)).at(3, event_dim=0)  # ᾱ_3 = 1/4
        >>> x_t = jnp.array(3.0)
        >>> readouts.Score().x_0_hat(GaussianKernel(), (-x_t,), x_t, step).tolist()  # √ᾱ_3 x_t
        1.5
    """

    variance: Variance = LearnedVariance()
    needs_signal = True

    def denoise(self, z: Output, x_t: State, step: Step) -> Output:
        """(x_t + (1−ᾱ_t) z) / √ᾱ_t."""
        return (x_t + step.noise_t * z) / jnp.sqrt(step.alpha_bar_t)
