"""`standard_diffusion`: a diffusion that needs no training and whose every law is known.

Data from the stationary law π stay there at every level, so the reverse step that undoes a forward
one is the forward kernel itself, T_π(x_s | x_t), and

    p(x_0) = π(x_0):    N(0, I) for numbers, B(rate) for bits, uniform for classes.

Its network says 0 and has no parameters. Bounds, posteriors and evidences of it have closed forms:
it is the model of the examples, and the first oracle of the tests.

Source: Sohl-Dickstein et al. (2015), section 2.3: a reversible kernel runs both ways alike.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from probdiff import readouts, schedules
from probdiff.arguments import check_at_least, check_object, check_shape
from probdiff.diffusion import Diffusion
from probdiff.kernels import BernoulliKernel, DiscreteKernel, GaussianKernel, Kernel
from probdiff.networks.binding import output_shape


def standard_diffusion(
    event_shape: tuple[int, ...] = (),
    T: int = 10,
    *,
    kernel: GaussianKernel | DiscreteKernel | None = None,
    **options: Any,
) -> Diffusion:
    """The exact diffusion of independent entries, untrained: N(0, I) unless the kernel says other.

    Args:
        event_shape: Shape of one example; `()` for a number.
        T: Number of steps, at least 2.
        kernel: `GaussianKernel()` if absent.
        options: Further arguments of `Diffusion`, such as `last_step`, `loc`, `scale` and `name`;
            `beta` for rates of one's own, by default `cosine` for numbers, else `harmonic`.

    Returns:
        A `Diffusion` whose parameters are `{}`.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> diffusion = standard_diffusion((2,))  # x_0 ~ N(0, I)
        >>> prior = diffusion.prior({})
        >>> def program(y=None):
        ...     numpyro.sample("y", dist.Normal(prior(), 1.0).to_event(1), obs=y)
        >>> smc = infer.SMC(program, num_particles=1000)
        >>> smc.run(jax.random.key(0), y=jnp.array([2.0, 0.0]))
        >>> [round(float(m), 1) + 0.0 for m in smc.get_samples()["x_0"].mean(0)]  # y/2
        [1.0, 0.0]
    """
    kernel = GaussianKernel() if kernel is None else kernel
    check_object(Kernel, "a kernel such as GaussianKernel()", kernel=kernel)
    event_shape = check_shape("event_shape", event_shape)
    check_at_least(2, T=T)
    is_gaussian = isinstance(kernel, GaussianKernel)
    beta = options.pop("beta", (schedules.cosine if is_gaussian else schedules.harmonic)(T))
    readout = options.pop("readout", _readout(kernel))
    shape = output_shape(event_shape, readout.num_outputs(kernel))

    def network(x_t: Any, t: Any, context: Any = None) -> Float[Array, "..."]:
        return jnp.zeros((x_t.shape[0], *shape))

    return Diffusion(kernel, beta, network, event_shape=event_shape, readout=readout, **options)


def _readout(kernel: Any) -> Any:
    """The one of which an output of 0 is exact."""
    if isinstance(kernel, GaussianKernel):
        return readouts.Perturbation(readouts.ForwardVariance())
    is_of_bits = isinstance(kernel, BernoulliKernel)
    return readouts.Logits() if is_of_bits else readouts.DataLogits()
