"""Readouts of bits and classes: a network's output as p(x_s | x_t), with s = t − 1.

    Logits       bits only: p(x_s = 1 | x_t) = f_b = sigmoid(z + logit T_π(1 | x_t; β_t))
    DataLogits   p(x_0 | x_t) = softmax(z), and the bridge averaged over it:
                 p(x_s | x_t) = Σ_j p(x_0 = j | x_t) q(x_s | x_t, x_0 = j)

`Logits` is the paper's f_b with the forward kernel's own logit taken out, as the Gaussian readout
perturbs the Gaussian kernel: z = 0 is the exact reverse step of data from π, and any f_b can be
reached. `DataLogits` says what the data are and leaves the steps to the bridge (Austin et al.
2021); its network gives a bit one number, the logit of 1, and a class K, on the last axis.

Sources: Sohl-Dickstein et al. (2015), table App. 1; Austin et al. (2021), equation 4.
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from probdiff.arguments import check_object
from probdiff.kernels import BernoulliKernel, Bits, DiscreteKernel, GaussianKernel, Kernel, States
from probdiff.kernels.laws import Symbols
from probdiff.readouts.gaussian import checked
from probdiff.types import Step

_Kernel = DiscreteKernel | GaussianKernel
_Outputs = tuple[Array, ...]


class DiscreteReadout(abc.ABC):
    """Reverse step of a diffusion of symbols, read from a network's output.

    Abstract; `Logits` says where the next bit goes, `DataLogits` where x_0 is. `num_outputs` is how
    many numbers the network owes for each symbol, laid side by side along its last axis.

    Example:
        >>> readouts.Logits().num_outputs(BernoulliKernel(0.5))
        1
        >>> readouts.DataLogits().num_outputs(CategoricalKernel(5))
        5
    """

    needs_signal = False
    doubt: float = 0.0
    """Share of an even law that inference mixes into `x_0_given`: a certainty there may be none."""

    @abc.abstractmethod
    def num_outputs(self, kernel: _Kernel) -> int:
        """Numbers the network gives per symbol of x."""

    @abc.abstractmethod
    def __call__(
        self, kernel: DiscreteKernel, outputs: _Outputs, x_t: Symbols, step: Step
    ) -> States | Bits:
        """Reverse step p(x_s | x_t), elementwise; as many outputs as `num_outputs`."""

    @abc.abstractmethod
    def x_0_given(
        self, kernel: DiscreteKernel, outputs: _Outputs, x_t: Symbols, step: Step
    ) -> States | Bits:
        """Law p(x_0 | x_t), elementwise."""

    def longer_step(
        self, kernel: DiscreteKernel, outputs: _Outputs, x_t: Symbols, trained: Step, step: Step
    ) -> States | Bits:
        """Reverse step from x_t over several levels at once: the bridge averaged over x_0.

        `trained` are the coefficients of the single step, which the network was trained for.
        """
        _checked(self, kernel, outputs, x_t, trained, step)
        law = self.x_0_given(kernel, outputs, x_t, trained)
        return kernel.bridge_given(law.log_probs, x_t, step)

    def x_0_hat(
        self, kernel: DiscreteKernel, outputs: _Outputs, x_t: Symbols, step: Step
    ) -> Float[Array, "..."]:
        """E[x_0 | x_t] of bits, the probability of 1; classes have no mean, see `x_0_given`."""
        check_object(Kernel, "a kernel such as BernoulliKernel(0.5)", kernel=kernel)
        if not isinstance(kernel, BernoulliKernel):
            raise ValueError(f"x_0_hat is for numbers and bits; got {kernel}. Use x_0_given")
        return self.x_0_given(kernel, outputs, x_t, step).mean


@dataclasses.dataclass(frozen=True)
class Logits(DiscreteReadout):
    """Bits: p(x_s = 1 | x_t) by its logit, relative to the forward kernel's. No arguments.

    Example:
        >>> step = schedules.steps(schedules.harmonic(4)).at(2, event_dim=1)
        >>> x_t, z = jnp.array([0, 1]), jnp.zeros(2)
        >>> law = readouts.Logits()(BernoulliKernel(0.2), (z,), x_t, step)
        >>> [round(p, 3) for p in law.mean.tolist()]  # (1 − β_2) x_t + β_2 · 0.2, with β_2 = 1/3
        [0.067, 0.733]
    """

    doubt = 0.05  # f_b alone says p(x_0 | x_t), held to [0, 1]

    def num_outputs(self, kernel: _Kernel) -> int:
        """1."""
        check_object(Kernel, "a kernel such as BernoulliKernel(0.5)", kernel=kernel)
        if not isinstance(kernel, BernoulliKernel):
            raise ValueError(f"readout Logits is for bits; got {kernel}. Use DataLogits")
        return 1

    def __call__(self, kernel: DiscreteKernel, outputs: _Outputs, x_t: Symbols, step: Step) -> Bits:
        """B(sigmoid(z + logit T_π(1 | x_t; β_t)))."""
        outputs, x_t = _checked(self, kernel, outputs, x_t, step)
        return Bits(outputs[0] + kernel.transition(x_t, step).logit)

    def x_0_given(
        self, kernel: DiscreteKernel, outputs: _Outputs, x_t: Symbols, step: Step
    ) -> States | Bits:
        """The p(x_0 = 1 | x_t) whose averaged bridge is f_b, held to [0, 1].

        f_b is a mixture of two bridges, b_0 + (b_1 − b_0) p; a network far from any posterior may
        leave the range that mixtures have, hence the limits.
        """
        outputs, x_t = _checked(self, kernel, outputs, x_t, step)
        f_b = self(kernel, outputs, x_t, step).mean
        b_0, b_1 = (kernel.bridge(x_t, jnp.full_like(x_t, bit), step).mean for bit in (0, 1))
        p = jnp.clip((f_b - b_0) / (b_1 - b_0), 0.0, 1.0)
        return Bits(jnp.log(p) - jnp.log1p(-p))


@dataclasses.dataclass(frozen=True)
class DataLogits(DiscreteReadout):
    """p(x_0 | x_t) by its logits; the reverse step is the bridge averaged over it. No arguments.

    The network gives one number for a bit, the logit of 1, and K for a symbol of K classes.

    Example:
        >>> kernel = CategoricalKernel(3)
        >>> step = schedules.steps(schedules.harmonic(4)).at(2, event_dim=0)
        >>> certain = jnp.array(0.0), jnp.array(-jnp.inf), jnp.array(-jnp.inf)  # x_0 = 0
        >>> law = readouts.DataLogits()(kernel, certain, jnp.array(1), step)
        >>> bridge = kernel.bridge(jnp.array(1), jnp.array(0), step)
        >>> bool(jnp.allclose(law.probs, bridge.probs))
        True
    """

    def num_outputs(self, kernel: _Kernel) -> int:
        """1 for bits, K for K classes."""
        check_object(Kernel, "a kernel such as BernoulliKernel(0.5)", kernel=kernel)
        if not isinstance(kernel, DiscreteKernel):
            raise ValueError(f"readout DataLogits is for symbols; got {kernel}. Use Data")
        return 1 if isinstance(kernel, BernoulliKernel) else kernel.num_data_states

    def __call__(
        self, kernel: DiscreteKernel, outputs: _Outputs, x_t: Symbols, step: Step
    ) -> States | Bits:
        """Σ_j p(x_0 = j | x_t) q(x_s | x_t, x_0 = j)."""
        outputs, x_t = _checked(self, kernel, outputs, x_t, step)
        if isinstance(kernel, BernoulliKernel):
            return kernel.bridge_of_logit(outputs[0], x_t, step)
        return kernel.bridge_given(self._log_p_0(kernel, outputs), x_t, step)

    def x_0_given(
        self, kernel: DiscreteKernel, outputs: _Outputs, x_t: Symbols, step: Step
    ) -> States | Bits:
        """softmax(z) over the states of the data."""
        outputs, x_t = _checked(self, kernel, outputs, x_t, step)
        if isinstance(kernel, BernoulliKernel):
            return Bits(outputs[0])
        return States(self._log_p_0(kernel, outputs))

    def _log_p_0(self, kernel: DiscreteKernel, outputs: _Outputs) -> Float[Array, "..."]:
        log_p = jax.nn.log_softmax(jnp.stack(outputs, -1), -1)
        extra = kernel.num_states - kernel.num_data_states
        return jnp.pad(log_p, [(0, 0)] * (log_p.ndim - 1) + [(0, extra)], constant_values=-jnp.inf)


def _checked(
    readout: DiscreteReadout, kernel: DiscreteKernel, outputs: _Outputs, x_t: Symbols, *steps: Step
) -> tuple[_Outputs, Symbols]:
    """Outputs and symbols as arrays, refused where they do not fit."""
    readout.num_outputs(kernel)
    return checked(readout, kernel, outputs, x_t, *steps, states=kernel.num_states)
