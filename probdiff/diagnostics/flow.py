"""Log densities of the probability flow, per example, beside bounds of the T-step model."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jaxtyping import Array, Float, Int

from probdiff import bars, devices, flow
from probdiff.arguments import check_at_least, check_flag, check_key
from probdiff.diagnostics.bounds import check_examples, measure, relative_rows, summary
from probdiff.diffusion import Data, Diffusion
from probdiff.reverse import Reverse
from probdiff.types import Params


def flow_density(
    key: Array, diffusion: Diffusion, params: Params, x_0: Data, *, context: Any = None,
    probes: int | None = None, rtol: float = 1e-6, atol: float = 1e-6, block_size: int = 500,
    progress: bool = False,
) -> xr.DataTree:  # fmt: skip
    """log p(x_0) of the probability flow for every example; see `probdiff.flow`.

    It is no bound, and of another model than the T steps whose bound `diagnostics.bound` is: no
    order of the two is promised.

    Args:
        key: Randomness of the probes; block b of examples uses `fold_in(key, b)`.
        diffusion: A diffusion of numbers whose network takes the log-SNR.
        params: Its parameters.
        x_0: Examples in the user's units, `(N, *event_shape)`.
        context: One context per example, `(N, *context_shape)`.
        probes: Number of Hutchinson's estimates of the divergence, at least 2, each at the cost of
            one derivative of the network; exact if absent, by one for each number of an example,
            which is for a few dozen of them.
        rtol, atol: Tolerances of a step, in [1e-12, 0.1]; less than 1e-6 wants float64.
        block_size: Examples handled at once, all by as many steps as the slowest needs.
        progress: Show a bar over the blocks.

    Returns:
        DataTree with group `flow`, per `example`: `log_density`, nats; `log_density_se`, its
        standard error over the probes, 0 without; `evaluations`, points at which the network was
        asked. Attributes are those of `bound`, with `probes` (0 where exact), `rtol` and `atol` in
        place of T. `compare` takes it beside bounds of the same examples.

    Raises:
        ValueError: if arguments do not fit the model, or it has no flow; see `flow.Flow`.
        FloatingPointError: if there is no solution for an example; says which.
        ImportError: without `diffrax`, of the extra `probdiff[flow]`.

    Example:
        Data of N(0, I) and the network that denoises them, whose flow stands still:

        >>> def network(x_t, log_snr):
        ...     return jnp.sqrt(jax.nn.sigmoid(log_snr))[:, None] * x_t
        >>> network.takes_log_snr = True
        >>> beta = schedules.log_snr_linear(50, beta_1=1e-5, alpha_bar_T=1e-6)
        >>> readout = readouts.Data(readouts.BridgeVariance())
        >>> diffusion = Diffusion(
        ...     GaussianKernel(), beta, network, event_shape=(2,), readout=readout
        ... )
        >>> x = np.array([[0.0, 1.0], [2.0, -1.0]], np.float32)
        >>> group = diagnostics.flow_density(jax.random.key(0), diffusion, {}, x)["flow"]
        >>> exact = dist.Normal(0.0, 1.0).log_prob(x).sum(1)
        >>> bool(jnp.allclose(group["log_density"].values, exact, atol=1e-3))
        True
    """
    check_key(key)
    check_flag(progress=progress)
    check_at_least(2, or_none=True, probes=probes)
    flow.check_tolerances(rtol, atol)
    flow.check_flows(diffusion)
    check_examples(diffusion, params, x_0, context, None, block_size=block_size)
    flow.diffrax()
    reverse, rows_of = relative_rows(diffusion, params, x_0, context, None)

    def blocks() -> Iterator[tuple[Array | np.ndarray | None, ...]]:
        starts = range(0, len(x_0), block_size)
        for block, start in enumerate(bars.bar(starts, desc="flow", disable=not progress)):
            rows = slice(start, start + block_size)
            x, context, _ = (None if a is None else a[rows] for a in rows_of)
            yield jax.random.fold_in(key, block), x, context

    parts = devices.blockwise(
        diffusion.programs, _flow_block, reverse, blocks(), None, probes=probes, rtol=float(rtol),
        atol=float(atol),
    )  # fmt: skip
    value, se, evaluations = (np.concatenate(part) for part in zip(*parts, strict=True))
    value, se = value.astype(np.float64), se.astype(np.float64)
    if (is_nan := np.isnan(value)).any():
        raise FloatingPointError(
            f"log_density is NaN for {is_nan.sum()} of {len(value)} examples, the first in row "
            f"{np.flatnonzero(is_nan)[0]}: the network's output is not finite on the way, or too "
            "rough for the tolerances; try larger rtol and atol"
        )
    parts = {"log_density": value, "log_density_se": se, "evaluations": evaluations}
    about = measure(diffusion, x_0, None) | {"probes": probes or 0, "rtol": rtol, "atol": atol}
    del about["T"]
    variables = {name: ("example", values) for name, values in parts.items()}
    group = xr.Dataset(variables, {"example": np.arange(len(value))}, summary(value) | about)
    return xr.DataTree.from_dict({"flow": group})


def _flow_block(
    key: Array, reverse: Reverse, x_0: Array, context: Array | None, *, probes: int | None,
    rtol: float, atol: float,
) -> tuple[Float[Array, " N"], Float[Array, " N"], Int[Array, " N"]]:  # fmt: skip
    """Log density, its standard error and the points asked for."""

    def one(key: Array, x_0: Array, context: Array | None) -> tuple[Array, ...]:
        given = reverse.given(context)
        if probes is None:
            vectors = flow.axes_of(reverse)
        else:
            shape = (probes, *reverse.event_shape)
            vectors = jax.random.rademacher(key, shape, reverse.kernel.dtype)
        base, along, evaluations = flow.log_density(given, x_0, vectors, rtol=rtol, atol=atol)
        if probes is None:
            return base + jnp.sum(along), jnp.zeros_like(base), evaluations
        return base + jnp.mean(along), jnp.std(along, ddof=1) / probes**0.5, evaluations

    return jax.vmap(one)(jax.random.split(key, len(x_0)), jnp.asarray(x_0), context)
