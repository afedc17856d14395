"""Likelihood bounds of a trained diffusion, per example and per step, for ArviZ.

The bound of one example is a sum whose terms say where the nats go (Appendix B):

    K(x_0) = log p(x_0 | x_1) − Σ_{t=2}^{T} KL_t − KL_T^prior,
    KL_t = KL( q(x_s | x_t, x_0) ‖ p(x_s | x_t) ),    KL_T^prior = KL( q(x_T | x_0) ‖ π ),

each estimated at draws of x_1 and of every x_t; under a tied last step the first is in closed form.
It is a bound on log p(x_0) in expectation over those draws. `entropy_form` is the paper's eq. 14,
in which the first and last terms have been replaced by entropies; where the data do not have the
stationary law's moments it is no bound, and the correction it then needs is returned beside it.

A bound has dim `example` and no chain or draw: `loo` is not for it and refuses it.

Source: Sohl-Dickstein et al. (2015), eqs. 10 to 14 and appendix B.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from probdiff.diffusion import Data, Diffusion, Mask
from probdiff.elbo import prior_kl, step_kl
from probdiff.readouts import Tied
from probdiff.trajectories import ForwardTrajectory
from probdiff.types import Params

BITS_PER_NAT = 1 / math.log(2)


def bound(
    key: Array,
    diffusion: Diffusion,
    params: Params,
    x_0: Data,
    *,
    context: Any = None,
    mask: Mask | None = None,
    num_draws: int = 1,
    block_size: int = 4096,
    progress: bool = False,
) -> xr.DataTree:
    """Bound K on log p(x_0) for every example, with the term of every step.

    Args:
        key: Randomness; block b of examples uses `fold_in(key, b)`.
        diffusion: The model.
        params: Its parameters.
        x_0: Examples in the user's units, `(N, *event_shape)`.
        context: One context per example, `(N, *context_shape)`.
        mask: True where x_0 is observed; the bound is then of the observed part.
        num_draws: Trajectory levels drawn per example and step, averaged.
        block_size: Examples handled at once.
        progress: Show a bar over the blocks.

    Returns:
        DataTree with group `bound`, all in nats: `bound` and its parts `reconstruction` and
        `prior_kl` per `example`, `kl` per `example` and `step` (2..T). Attributes: `mean`, `se`
        (standard error over examples), `mean_bits`, `se_bits`, `T`, `num_draws`.

    Raises:
        ValueError: if data, context, mask or parameters do not fit.
    """
    if np.ndim(x_0) != len(diffusion.event_shape) + 1 or np.shape(x_0)[0] < 1:
        raise ValueError(
            f"x_0 must have shape (N, *{diffusion.event_shape}) with N at least 1; "
            f"got {np.shape(x_0)}"
        )
    if num_draws < 1 or block_size < 1:
        raise ValueError(f"num_draws and block_size must be positive; got {num_draws, block_size}")
    diffusion._check_data(x_0, mask)
    diffusion.bind(params, context=context)
    blocks = []
    for block, start in enumerate(
        tqdm(range(0, len(x_0), block_size), desc="bound", disable=not progress)
    ):
        rows = slice(start, start + block_size)
        given = (None if a is None else jnp.asarray(a[rows]) for a in (x_0, context, mask))
        key_block = jax.random.fold_in(key, block)
        blocks.append(_bound_block(key_block, params, *given, diffusion, num_draws))
    reconstruction, kl, prior = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return _tree(diffusion, reconstruction, kl, prior, num_draws)


@functools.partial(jax.jit, static_argnames=("diffusion", "num_draws"))
def _bound_block(
    key: Array,
    params: Params,
    x_0: Any,
    context: Any,
    mask: Any,
    diffusion: Diffusion,
    num_draws: int,
) -> tuple[Any, Any, Any]:
    key_first, key_steps = jax.random.split(key)
    reverse, steps = diffusion.bind(params, context=context, mask=mask)
    forward = diffusion.forward_trajectory(steps, x_0, mask)
    lead = (num_draws, *forward.batch_shape)

    def kl_at(inputs: Any) -> Any:
        t, key = inputs
        times = jnp.full(lead, t)
        return jnp.mean(step_kl(forward, reverse, forward.sample_at(key, times), times), 0)

    keys = jax.random.split(key_steps, steps.T - 1)
    kl = jax.lax.map(kl_at, (jnp.arange(2, steps.T + 1), keys))
    if isinstance(diffusion.last_step, Tied):
        reconstruction = _tied_reconstruction(diffusion, forward)
    else:
        x_1 = forward.sample_at(key_first, jnp.ones(lead, jnp.int32))
        last = diffusion.data_given_first(reverse, x_1, mask)
        reconstruction = jnp.mean(last.log_prob(x_0), 0)
    return reconstruction, kl.T, prior_kl(forward)


def _tied_reconstruction(diffusion: Diffusion, forward: ForwardTrajectory) -> Float[Array, " N"]:
    """E log p(x_0 | x_1) in closed form, in the user's units.

    By detailed balance log T(x_0 | x_1) = log T(x_1 | x_0) + log π(x_0) − log π(x_1), and the mean
    of the first over x_1 is −H(X_1 | X_0).
    """
    kernel = forward.kernel
    q_1 = kernel.marginal(forward.x_0, forward.step_at(jnp.array(1)))
    log_pi_0 = kernel.stationary(forward.x_0.shape).log_prob(forward.x_0)
    terms = log_pi_0 - q_1.entropy() - kernel.expected_log_stationary(q_1)
    if diffusion.scale is not None:
        terms -= jnp.log(diffusion.scale)
    if forward.observed is not None:
        terms = jnp.where(forward.observed, terms, 0.0)
    return forward.sum_event(terms)


def _tree(
    diffusion: Diffusion, reconstruction: Any, kl: Any, prior: Any, num_draws: int
) -> xr.DataTree:
    total = reconstruction - kl.sum(1) - prior
    n = len(total)
    mean = float(total.mean())
    se = float(total.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    group = xr.Dataset(
        {
            "bound": ("example", total),
            "reconstruction": ("example", reconstruction),
            "kl": (("example", "step"), kl),
            "prior_kl": ("example", prior),
        },
        coords={"example": np.arange(n), "step": np.arange(2, diffusion.T + 1)},
        attrs={
            "units": "nats",
            "mean": mean,
            "se": se,
            "mean_bits": mean * BITS_PER_NAT,
            "se_bits": se * BITS_PER_NAT,
            "T": diffusion.T,
            "num_draws": num_draws,
        },
    )
    return xr.DataTree.from_dict({"bound": group})


def entropy_form(
    diffusion: Diffusion, params: Params, x_0: Data, kl: Float[Any, "example step"]
) -> tuple[Float[Array, " example"], Float[Array, " example"]]:
    """The paper's eq. 14 for every example, and the correction that makes it a bound.

    K_14 = −Σ_{t ≥ 2} KL_t + H(X_T | X_0) − H(X_1 | X_0) − H_π takes −E log π(x_t) for the same at
    every level. That holds for Gaussian data with unit second moment and for bits whose mean
    activity is the kernel's rate. The correction is what it leaves out,

        E[log π(x_T)] + H_π + log π(x_0) − E[log π(x_1)];

    for the Gaussian −½ (ᾱ_T + β_1) Σ_i (x_i² − 1), x on the scale of the chain.

    Args:
        diffusion: The model; its last step must be tied, as eq. 14 assumes.
        params: Its parameters (the schedule may be among them).
        x_0: Examples in the user's units, `(N, *event_shape)`.
        kl: KL_t in nats, as in `bound(...)["bound"]["kl"]`.

    Returns:
        K_14 and the correction, nats per example; their sum is the bound.

    Raises:
        ValueError: if the last step is not tied.
    """
    if not isinstance(diffusion.last_step, Tied):
        raise ValueError(f"last_step must be Tied() for eq. 14; got {diffusion.last_step}")
    _, steps = diffusion.bind(params)
    kernel, event_dim = diffusion.kernel, len(diffusion.event_shape)
    x = diffusion.to_chain(jnp.asarray(x_0))
    q_1 = kernel.marginal(x, steps.at(1, event_dim))
    q_T = kernel.marginal(x, steps.at(diffusion.T, event_dim))
    pi = kernel.stationary(x.shape)
    edges = q_T.entropy() - q_1.entropy() - pi.entropy()
    if diffusion.scale is not None:
        edges -= jnp.log(diffusion.scale)
    correction = (
        kernel.expected_log_stationary(q_T)
        + pi.entropy()
        + pi.log_prob(x)
        - kernel.expected_log_stationary(q_1)
    )
    axes = tuple(range(1, 1 + event_dim))
    return jnp.sum(edges, axes) - jnp.sum(jnp.asarray(kl), 1), jnp.sum(correction, axes)
