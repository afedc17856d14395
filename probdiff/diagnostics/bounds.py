"""Likelihood bounds of a trained diffusion, per example and per step, for ArviZ.

The bound of one example is a sum whose terms say where the nats go (Appendix B):

    K(x_0) = log p(x_0 | x_1) − Σ_{t=2}^{T} KL_t − KL_T^prior,
    KL_t = KL( q(x_s | x_t, x_0) ‖ p(x_s | x_t) ),    KL_T^prior = KL( q(x_T | x_0) ‖ π ),

each estimated at draws of x_1 and of every x_t, with control variates (see `control`) where x_t are
numbers; under a tied last step the first is in closed form. K is a bound on log p(x_0) in
expectation over those draws. `entropy_form` is the paper's eq. 14, in which the first and last
terms have been replaced by entropies; where the data do not have the stationary law's moments it
is no bound, and the correction it then needs is returned beside it.

A bound has dim `example` and no chain or draw: `loo` is not for it and refuses it. Of symbols, and
of numbers on a grid, it bounds a probability, of other numbers a density in the user's units, which
changes with the units: the attributes `reference_measure` and `num_dims` say which, and over how
many entries.

Source: Sohl-Dickstein et al. (2015), eqs. 10 to 14 and appendix B.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax.sharding import Mesh
from jaxtyping import Array, Float

from probdiff import bars, devices
from probdiff.arguments import (
    as_array,
    check_at_least,
    check_flag,
    check_key,
    check_object,
    plain,
    read_array,
    shape_text,
    shown,
)
from probdiff.diagnostics.continuous import check_steps, kl_rate, with_steps
from probdiff.diagnostics.control import controlled
from probdiff.diagnostics.program import Rows
from probdiff.diffusion import Data, Diffusion, Mask
from probdiff.elbo import prior_kl, step_kl
from probdiff.kernels import DiscreteKernel
from probdiff.readouts import Tied
from probdiff.readouts.grid import is_on_grid
from probdiff.reverse import Reverse, Units
from probdiff.times import StratifiedTimes
from probdiff.trajectories import ForwardTrajectory
from probdiff.types import Params
from probdiff.validation import check_context_rows

BITS_PER_NAT = 1 / math.log(2)
"""Bits in a nat, log₂ e = 1.4427: what turns `mean` and `se` of a bound into bits."""


def bound(
    key: Array, diffusion: Diffusion | tuple, params: Params, x_0: Data | tuple | dict, *,
    context: Any = None, mask: Mask | None = None, num_draws: int = 1, block_size: int = 4096,
    mesh: Mesh | None = None, progress: bool = False,
) -> xr.DataTree:  # fmt: skip
    """Bound K on log p(x_0) for every example, with the term of every step.

    A program, any NumPyro model and guide with the rows of x_0 in one plate, is a pair in place of
    the diffusion, and its bound is the ELBO of every row.

    Args:
        key: Randomness; block b of examples uses `fold_in(key, b)`.
        diffusion: The model; or a program `(model, guide)`, both called as `model(x_0)`, with a
            tuple as `model(*x_0)`, with a dict as `model(**x_0)`. They have to take any number of
            rows; what is no row is bound by `functools.partial`. context, mask and mesh are for a
            diffusion.
        params: Its parameters.
        x_0: Examples in the user's units, `(N, *event_shape)`.
        context: One context per example, `(N, *context_shape)`.
        mask: True where x_0 is observed. K then bounds the density of the observed part under the
            program that sees noise in place of the rest, not the marginal of the whole model.
        num_draws: Trajectory levels drawn per example and step, averaged.
        block_size: Examples handled at once, by each device.
        mesh: Devices that take a block each at the same time, on one axis; no figure depends on it.
        progress: Show a bar over the blocks.

    Returns:
        DataTree with group `bound`, all in nats: `bound` and its parts `reconstruction` and
        `prior_kl` per `example`, `kl` per `example` and `step` (2..T); `bound_se`, the standard
        error of each K over the draws of the noise, nan for one draw. Attributes: `mean`, `se`
        (standard error over examples), `mean_bits`, `se_bits`, `T`, `num_draws`;
        `reference_measure`, "counting" for symbols and for numbers on a grid, else "Lebesgue, in
        the user's units", or which entries are which; `num_dims`, entries observed of one example,
        nan where examples differ; `data`, a digest of the examples, by which other functions know
        them again.

        Of a program `bound` and `bound_se`, and parts by the name of their site:
        `log_likelihood_y` of every observed site y; `kl_z` of every latent z, a KL in closed form
        or a sampled log-ratio; `log_q_a` of what the guide alone draws; of a diffusion's x_0
        `reconstruction_x_0`, `prior_kl_x_0` and, by step, `step_kl_x_0`, and where its x_0 is a
        latent z `log_q_z` too, and in `kl_z` the sum of it all. Masks and scales count as in
        `SampledTimeELBO`: under a scale this is the objective, no bound. `num_dims` counts the
        entries of observed sites less those of latents that are `dist.ImproperUniform`; T is there
        where there is one diffusion.

    Raises:
        ValueError: if arguments do not fit the model, or blocks are too large for the mesh; if a
            site of a program is not in the plate of the rows, or lacks its counterpart.
        FloatingPointError: if a part of the bound is NaN; says which, and of which examples.

    Example:
        A model whose law is known, N(0, 1), so that K can be held beside log p:

        >>> diffusion = standard_diffusion()
        >>> key, key_x = jax.random.split(jax.random.key(0))
        >>> x = jax.random.normal(key_x, (500,))
        >>> tree = diagnostics.bound(key, diffusion, {}, x, num_draws=10)  # {}: no parameters
        >>> exact = float(dist.Normal(0.0, 1.0).log_prob(x).mean())
        >>> abs(tree["bound"].attrs["mean"] - exact) < 0.05  # of −1.4 nats
        True
        >>> dict(tree["bound"]["kl"].sizes)  # steps 2..10
        {'example': 500, 'step': 9}

        A diffusion as the prior of a code z, of which x is a noisy look: x ~ N(0, 2). The guide has
        the exact posterior N(x/2, 1/2), so every row's ELBO is log p(x):

        >>> prior = standard_diffusion(name="z")
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("x", dist.Normal(prior.reverse(), 1.0), obs=x)
        >>> def guide(x):
        ...     with numpyro.plate("data", len(x)):
        ...         prior.forward(numpyro.sample("z", dist.Normal(x / 2, 0.5**0.5)))
        >>> x = jnp.linspace(-2.0, 2.0, 200)
        >>> group = diagnostics.bound(key, (model, guide), {}, x, num_draws=50)["bound"]
        >>> sorted(group)[:5]
        ['bound', 'bound_se', 'kl_z', 'log_likelihood_x', 'log_q_z']
        >>> exact = dist.Normal(0.0, 2.0**0.5).log_prob(x).mean()
        >>> abs(group.attrs["mean"] - float(exact)) < 0.05
        True
    """
    if isinstance(diffusion, tuple):
        return _of_program(
            key, diffusion, params, x_0, num_draws, block_size, progress,
            {"context": context, "mask": mask, "mesh": mesh},
        )  # fmt: skip
    reconstruction, kl, prior, se = _parts(
        key, diffusion, params, x_0, context, mask, _bound_block, block_size, mesh,
        progress=progress, num_draws=num_draws,
    )  # fmt: skip
    check_numbers({"reconstruction": reconstruction, "kl": kl, "prior_kl": prior})
    tree = _tree(reconstruction - kl.sum(1) - prior, reconstruction, prior)
    steps = {"step": np.arange(2, diffusion.T + 1)}
    tree["bound"]["kl"] = xr.DataArray(kl, dims=("example", "step"), coords=steps)
    tree["bound"]["bound_se"] = xr.DataArray(se, dims="example")
    tree["bound"].attrs |= measure(diffusion, x_0, mask) | {"num_draws": num_draws}
    return tree


def _of_program(
    key: Array, pair: tuple, params: Params, data: Any, num_draws: int, block_size: int,
    progress: bool, refused: Mapping[str, Any],
) -> xr.DataTree:  # fmt: skip
    check_key(key)
    check_flag(progress=progress)
    check_at_least(1, num_draws=num_draws, block_size=block_size)
    rows = checked_rows(pair, params, data, refused)
    parts, variance = rows.parts(key, num_draws=num_draws, block_size=block_size, progress=progress)
    total = parts.pop("bound")
    check_numbers(parts)
    several = len(rows.lengths) > 1
    variables: dict[str, Any] = {"bound": ("example", total)}
    coords: dict[str, Any] = {"example": np.arange(len(total))}
    for name, values in parts.items():
        variables[name] = ("example", values)
        if values.ndim == 2:
            step = f"{name.removeprefix('step_kl_')}_step" if several else "step"
            variables[name] = (("example", step), values)
            coords[step] = np.arange(2, values.shape[1] + 2)
    variables["bound_se"] = ("example", np.sqrt(variance))
    attrs = summary(total) | rows.about | {"data": digest_of(data), "num_draws": num_draws}
    return xr.DataTree.from_dict({"bound": xr.Dataset(variables, coords, attrs)})


def checked_rows(pair: tuple, params: Params, data: Any, refused: Mapping[str, Any]) -> Rows:
    """A program with rows of data, without the arguments that are a diffusion's alone."""
    for name, value in refused.items():
        if value is not None:
            raise ValueError(
                f"{name} must be left out of a program, whose x_0 may be a dict of arrays; got "
                f"{shown(value)}"
            )
    return Rows(pair, params, data)


def sampled_bound(
    key: Array, diffusion: Diffusion, params: Params, x_0: Data, *, context: Any = None,
    mask: Mask | None = None, num_times: int = 10, steps: int | float | None = None,
    block_size: int = 500, mesh: Mesh | None = None, progress: bool = False,
) -> xr.DataTree:  # fmt: skip
    """Bound K for every example at a few random steps: unbiased, at a cost that T does not enter.

    The sum over t of KL_t is estimated at `num_times` steps per example, stratified over 2..T as in
    `SampledTimeELBO`. For many examples and a large T; `bound` gives every step, and takes and
    raises the same otherwise.

    Args:
        num_times: Steps at which each example's KL is drawn.
        steps: Number n of steps in place of T, at least 2, or `math.inf` for their limit: the bound
            of the model that asks the same network at n levels between the same ends. Under one
            key the noise of all n is the same, so that `compare` has little error. It needs a
            network that takes the log-SNR, and a readout of x̂_0 with `BridgeVariance()` or
            `ForwardVariance()`, or `Mixture`.
        block_size: Examples handled at once, by each device.

    Returns:
        DataTree with group `bound`, nats: `bound`, `reconstruction`, `prior_kl` per `example`.
        Attributes as those of `bound`, with `num_times`.

    Example:
        >>> diffusion = standard_diffusion(T=200)  # x_0 ~ N(0, 1)
        >>> key, key_x = jax.random.split(jax.random.key(0))
        >>> x = jax.random.normal(key_x, (2000,))
        >>> tree = diagnostics.sampled_bound(key, diffusion, {}, x, num_times=10)  # 10 of 200 steps
        >>> mean, se = tree["bound"].attrs["mean"], tree["bound"].attrs["se"]
        >>> exact = float(dist.Normal(0.0, 1.0).log_prob(x).mean())
        >>> abs(mean - exact) < 4 * se
        True
    """
    check_object(Diffusion, diffusion=diffusion)
    if steps is not None:
        check_steps(diffusion, steps)
    reconstruction, kl, prior = _parts(
        key, diffusion, params, x_0, context, mask,
        _limit_block if steps == math.inf else _sampled_block, block_size, mesh,
        steps=None if steps == math.inf else steps, progress=progress, num_times=num_times,
    )  # fmt: skip
    check_numbers({"reconstruction": reconstruction, "kl": kl, "prior_kl": prior})
    tree = _tree(reconstruction - kl - prior, reconstruction, prior)
    tree["bound"].attrs |= measure(diffusion, x_0, mask) | {"num_times": num_times}
    if steps is not None:
        tree["bound"].attrs["T"] = steps
    return tree


def check_examples(
    diffusion: Diffusion, params: Params, x_0: Data, context: Any, mask: Mask | None, **counts: int
) -> None:
    """Raise a `ValueError` unless examples, what comes with them, and counts fit the model."""
    check_object(Diffusion, diffusion=diffusion)
    read_array("x_0", x_0, jnp.number, jnp.bool_)
    if np.ndim(x_0) != len(diffusion.event_shape) + 1 or np.shape(x_0)[0] < 1:
        raise ValueError(
            f"x_0 must have shape {shape_text('N', diffusion.event_shape)} with N at least 1; "
            f"got {np.shape(x_0)}"
        )
    check_at_least(1, **counts)
    diffusion.check_params(params)
    diffusion.check_data(x_0, mask)
    check_context_rows(context, diffusion.context_shape, len(x_0))


def check_numbers(parts: Mapping[str, np.ndarray]) -> None:
    """Raise a `FloatingPointError` that names the part and the examples where there is NaN."""
    for name, values in parts.items():
        is_nan = np.isnan(values.reshape(len(values), -1))
        if is_nan.any():
            rows = np.flatnonzero(is_nan.any(1))
            at = ""
            if values.ndim == 2 and "kl" in name:
                at = f" at steps {_some(np.flatnonzero(is_nan.any(0)) + 2)}"
            raise FloatingPointError(
                f"{name} is NaN{at} for {len(rows)} of {len(values)} examples, rows {_some(rows)}: "
                "the network's output is not finite there, or too large to be squared"
            )


def _some(numbers: np.ndarray, most: int = 5) -> str:
    """The first few numbers, and how many more there are."""
    rest = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most].tolist())) + rest


def _parts(
    key: Array, diffusion: Diffusion, params: Params, x_0: Data, context: Any, mask: Mask | None,
    function: Callable[..., tuple[Array, ...]], block_size: int, mesh: Mesh | None, *,
    progress: bool, steps: int | None = None, **counts: int,
) -> Iterator[np.ndarray]:  # fmt: skip
    """What a function of blocks returns, of all examples."""
    check_key(key)
    check_flag(progress=progress)
    check_examples(diffusion, params, x_0, context, mask, **counts, block_size=block_size)
    mesh = devices.checked(mesh)
    devices.check_block_size(block_size, len(x_0), "examples", mesh)
    starts = range(0, len(x_0), block_size)
    disable = not (progress and devices.is_first(mesh))
    reverse, rows_of = relative_rows(diffusion, params, x_0, context, mask)
    reverse = reverse if steps is None else with_steps(reverse, steps)

    def blocks() -> Iterator[tuple[Array | np.ndarray | None, ...]]:
        for block, start in enumerate(bars.bar(starts, desc="bound", disable=disable)):
            rows = slice(start, start + block_size)
            given = (None if a is None else a[rows] for a in rows_of)
            yield jax.random.fold_in(key, block), *given

    parts = devices.blockwise(diffusion.programs, function, reverse, blocks(), mesh, **counts)
    return (np.concatenate(part).astype(np.float64) for part in zip(*parts, strict=True))


def relative_rows(
    diffusion: Diffusion, params: Params, x_0: Data, context: Any, mask: Mask | None
) -> tuple[Reverse, tuple[np.ndarray | None, ...]]:
    """The process of x_0 − loc, whose density is the same, with its x_0, contexts and masks."""
    reverse = diffusion.bind(params)
    context, mask = plain("context", context), plain("mask", mask)
    given = (None if a is None else np.asarray(a) for a in (context, mask))
    return reverse.relative(), (reverse.less_loc(x_0), *given)


def _bound_block(
    key: Array, reverse: Reverse, x_0: Array, context: Array | None, mask: Array | None, *,
    num_draws: int,
) -> tuple[Float[Array, "..."], ...]:  # fmt: skip
    key_first, key_steps = jax.random.split(key)
    reverse = reverse if context is None else reverse.given(context)
    forward = ForwardTrajectory.of(reverse, x_0, mask)
    lead = (num_draws, *forward.batch_shape)

    def kl_at(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        t, key = inputs
        times = jnp.full(lead, t)
        x_t = forward.sample_at(key, times)
        kl = step_kl(forward, reverse.step(x_t, times, examples_first=True), x_t, times)
        return _mean_and_variance(controlled(kl, forward, x_t, times))

    keys = jax.random.split(key_steps, reverse.T - 1)
    kl, variance = jax.lax.map(kl_at, (jnp.arange(2, reverse.T + 1), keys))
    reconstruction, first = _reconstruction(key_first, forward, reverse, x_0, num_draws)
    return reconstruction, kl.T, prior_kl(forward), jnp.sqrt(jnp.sum(variance, 0) + first)


def _mean_and_variance(
    draws: Float[Array, "draws N"],
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Mean over draws and the variance of that mean, NaN of one draw."""
    count = len(draws)
    if count == 1:
        return draws[0], jnp.full_like(draws[0], jnp.nan)
    return jnp.mean(draws, 0), jnp.var(draws, 0, ddof=1) / count


def _sampled_block(
    key: Array, reverse: Reverse, x_0: Array, context: Array | None, mask: Array | None, *,
    num_times: int,
) -> tuple[Float[Array, "..."], ...]:  # fmt: skip
    key_first, key_t, key_x = jax.random.split(key, 3)  # as in `_limit_block`
    reverse = reverse if context is None else reverse.given(context)
    forward = ForwardTrajectory.of(reverse, x_0, mask)
    lead = (num_times, *forward.batch_shape)
    t, law = StratifiedTimes().draw(key_t, lead, jnp.zeros(reverse.T - 1))

    def kl_at(inputs: tuple[Array, Array]) -> Array:
        t, key = inputs
        x_t = forward.sample_at(key, t)
        return step_kl(forward, reverse.step(x_t, t, examples_first=True), x_t, t)

    kl = jax.lax.map(kl_at, (t, jax.random.split(key_x, num_times)))
    reconstruction, _ = _reconstruction(key_first, forward, reverse, x_0, num_times)
    return reconstruction, jnp.mean(kl / law, 0), prior_kl(forward)


def _limit_block(
    key: Array, reverse: Reverse, x_0: Array, context: Array | None, mask: Array | None, *,
    num_times: int,
) -> tuple[Float[Array, "..."], ...]:  # fmt: skip
    key_first, key_t, key_x = jax.random.split(key, 3)
    reverse = reverse if context is None else reverse.given(context)
    forward = ForwardTrajectory.of(reverse, x_0, mask)
    u = StratifiedTimes().uniforms(key_t, (num_times, *forward.batch_shape))
    inputs = u, jax.random.split(key_x, num_times)
    kl = jax.lax.map(lambda each: kl_rate(each[1], forward, reverse, each[0]), inputs)
    reconstruction, _ = _reconstruction(key_first, forward, reverse, x_0, num_times)
    return reconstruction, jnp.mean(kl, 0), prior_kl(forward)


def _reconstruction(
    key: Array, forward: ForwardTrajectory, reverse: Reverse, x_0: Array, num_draws: int
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """E log p(x_0 | x_1) and the variance of its estimate; in closed form under a tied last step,
    else by draws of x_1.
    """
    if isinstance(reverse.last_step, Tied):
        exact = _tied_reconstruction(reverse.units, forward)
        return exact, jnp.zeros_like(exact)

    def one(key: Array) -> Array:
        x_1 = forward.sample_at(key, jnp.ones(forward.batch_shape, jnp.int32))
        return reverse.data(x_1, forward.observed).log_prob(x_0)

    return _mean_and_variance(jax.lax.map(one, jax.random.split(key, num_draws)))


def _tied_reconstruction(units: Units, forward: ForwardTrajectory) -> Float[Array, " N"]:
    """E log p(x_0 | x_1) in closed form, in the user's units.

    By detailed balance log T(x_0 | x_1) = log T(x_1 | x_0) + log π(x_0) − log π(x_1), and the mean
    of the first over x_1 is −H(X_1 | X_0).
    """
    kernel = forward.kernel
    q_1 = kernel.marginal(forward.x_0, forward.step_at(jnp.array(1)))
    log_pi_0 = kernel.stationary(forward.x_0.shape).log_prob(forward.x_0)
    terms = log_pi_0 - q_1.entropy() - kernel.expected_log_stationary(q_1)
    if units.scale is not None:
        terms -= jnp.log(units.scale)
    if forward.observed is not None:
        terms = jnp.where(forward.observed, terms, 0.0)
    return forward.sum_event(terms)


def digest(x_0: Data, mask: Mask | None = None) -> str:
    """A name for examples, the same for the same values."""
    x_0 = np.asarray(x_0, np.float64)
    if mask is not None:
        x_0 = np.where(mask, x_0, np.nan)
    return hashlib.sha256(x_0.tobytes()).hexdigest()[:16]


def digest_of(data: Any) -> str:
    """The same of an array, or of several rows by rows."""
    leaves = jax.tree.leaves(data)
    if len(leaves) == 1:
        return digest(leaves[0])
    return hashlib.sha256("".join(map(digest, leaves)).encode()).hexdigest()[:16]


def measure(diffusion: Diffusion, x_0: Data, mask: Mask | None) -> dict[str, str | int | float]:
    """What a density is taken against, over how many entries of which examples; and T."""
    is_symbol = isinstance(diffusion.kernel, DiscreteKernel)
    is_on = np.broadcast_to(is_on_grid(diffusion.last_step.grid), diffusion.event_shape)
    num_dims = math.prod(diffusion.event_shape)
    if mask is not None:
        counts = np.asarray(mask).reshape(len(mask), -1).sum(1)
        num_dims = int(counts[0]) if (counts == counts[0]).all() else math.nan
    measure = "counting" if is_symbol or is_on.all() else "Lebesgue, in the user's units"
    if is_on.any() and not is_on.all():
        places = ", ".join(
            str(tuple(p) if len(p) > 1 else p[0]) for p in np.argwhere(is_on).tolist()
        )
        measure = f"counting at entries {places}, elsewhere {measure}"
    about = {"reference_measure": measure, "num_dims": num_dims}
    return about | {"data": digest(x_0, mask), "T": diffusion.T}


def summary(values: np.ndarray) -> dict[str, str | int | float]:
    """Attributes of values in nats by example: their mean and its standard error, in bits too."""
    n, mean = len(values), float(values.mean())
    se = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    bits = {"mean_bits": mean * BITS_PER_NAT, "se_bits": se * BITS_PER_NAT}
    return {"units": "nats", "mean": mean, "se": se} | bits


def _tree(total: np.ndarray, reconstruction: np.ndarray, prior: np.ndarray) -> xr.DataTree:
    parts = {"bound": total, "reconstruction": reconstruction, "prior_kl": prior}
    variables = {name: ("example", values) for name, values in parts.items()}
    group = xr.Dataset(variables, {"example": np.arange(len(total))}, summary(total))
    return xr.DataTree.from_dict({"bound": group})


def entropy_form(
    key: Array,
    diffusion: Diffusion,
    params: Params,
    x_0: Data,
    kl: Float[Any, "example step"] | None = None,
) -> tuple[Float[Array, " example"], Float[Array, " example"]]:
    """The paper's eq. 14 for every example, and the correction that makes it a bound.

    K_14 = −Σ_{t ≥ 2} KL_t + H(X_T | X_0) − H(X_1 | X_0) − H_π takes −E log π(x_t) for the same at
    every level. That holds for Gaussian data with unit second moment and for bits whose mean
    activity is the kernel's rate. The correction is what it leaves out,

        E[log π(x_T)] + H_π + log π(x_0) − E[log π(x_1)];

    for the Gaussian −½ (ᾱ_T + β_1) Σ_i (x_i² − 1), x on the scale of the diffusion.

    Args:
        key: Randomness of `bound`, where kl is not given.
        diffusion: The model; its last step must be tied, as eq. 14 assumes.
        params: Its parameters (the schedule may be among them).
        x_0: As in `bound`.
        kl: KL_t in nats, as in `bound(...)["bound"]["kl"]`; by default what `bound` says.

    Returns:
        K_14 and the correction, nats per example; their sum is the bound.

    Raises:
        ValueError: if the last step is not tied, or data or kl do not fit.

    Example:
        Data of second moment 4, where the model has 1: eq. 14 alone misses the bound.

        >>> diffusion = standard_diffusion()
        >>> x = 2 * np.array([-1.0, 1.0], np.float32)
        >>> key = jax.random.key(0)
        >>> group = diagnostics.bound(key, diffusion, {}, x)["bound"]
        >>> k_14, correction = diagnostics.entropy_form(key, diffusion, {}, x, group["kl"].values)
        >>> bool(jnp.allclose(k_14 + correction, group["bound"].values, atol=1e-4))
        True
        >>> beta = schedules.cosine(10)
        >>> exact = -0.5 * (np.prod(1 - beta) + beta[0]) * (4 - 1)  # −½ (ᾱ_T + β_1)(x² − 1)
        >>> bool(jnp.allclose(correction, exact, atol=1e-4))
        True
    """
    check_key(key)
    check_object(Diffusion, diffusion=diffusion)
    if not isinstance(diffusion.last_step, Tied):
        raise ValueError(f"last_step must be Tied() for eq. 14; got {diffusion.last_step}")
    read_array("x_0", x_0, jnp.number, jnp.bool_)
    if np.ndim(x_0) != len(diffusion.event_shape) + 1:
        raise ValueError(
            f"x_0 must have shape {shape_text('N', diffusion.event_shape)}; got {np.shape(x_0)}"
        )
    diffusion.check_data(x_0)
    if kl is None:
        kl = bound(key, diffusion, params, x_0)["bound"]["kl"].values
    kl = as_array("kl", kl)
    if np.shape(kl) != (len(x_0), diffusion.T - 1):
        raise ValueError(f"kl must have shape {(len(x_0), diffusion.T - 1)}; got {np.shape(kl)}")
    steps = diffusion.bind(params).steps
    kernel, event_dim = diffusion.kernel, len(diffusion.event_shape)
    x = jnp.asarray(diffusion.to_state(plain("x_0", x_0)))
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
