"""Diffusion kernels: what one forward step does to one number or symbol.

A kernel T_π(x_t | x_s; β) mixes x_s with its stationary law π and keeps π as it is:

    ∫ T_π(x_t | x_s; β) π(x_s) dx_s = π(x_t)                  eq. 1
    q(x_t | x_s) = T_π(x_t | x_s; β_t)                        eq. 2

From it follow the marginal q(x_t | x_0), which jumps over steps 1..t at once, and the bridge
q(x_s | x_t, x_0), the forward process pinned at both ends, which the learned reverse step has to
imitate. A kernel acts on each entry alone: coefficients arrive broadcastable to x and every method
returns an elementwise NumPyro distribution (batch shape that of x, no event dims). All kernels here
are reversible, π(x_s) T(x_t | x_s) = π(x_t) T(x_s | x_t), so the same kernel runs both ways at
stationarity; that is what a tied last step uses.

Source: Sohl-Dickstein et al. (2015), sections 2.1 to 2.3 and table App. 1.
"""

from probdiff.kernels.discrete import (
    AbsorbingKernel,
    BernoulliKernel,
    CategoricalKernel,
    DiscreteKernel,
)
from probdiff.kernels.gaussian import GaussianKernel, bridge_mean, bridge_variance, bridge_weights
from probdiff.kernels.laws import Bits, States

Kernel = GaussianKernel | DiscreteKernel

__all__ = [
    "AbsorbingKernel", "BernoulliKernel", "Bits", "CategoricalKernel", "DiscreteKernel",
    "GaussianKernel", "States", "bridge_mean", "bridge_variance", "bridge_weights",
]  # fmt: skip
