"""`from_denoiser`: anyone's denoiser as a `Diffusion`.

A network trained elsewhere was shown data in units of its own, with noise by a convention of its
own. All conventions are one: it knows x_0 + σ ε at levels σ_1 < … < σ_T, and

    ᾱ_t = 1/(1 + σ_t²),    x_t = √ᾱ_t (x_0 + σ_t ε),    β_t = (σ_t² − σ_s²)/(1 + σ_t²)

is a variance-preserving diffusion of the same x_0. What the network takes and says there, and what
a readout is to be given, differ by three numbers a level and a label,

    z = k_t x_t + g_t F(c_t x_t, label_t),

    what F takes            c_t             k_t                g_t           said by
    x_t                     1               0                  1             `alphas_cumprod`
    s_t (x_0 + σ_t ε)       s_t/√ᾱ_t        0                  1             `sigma`, `input_scale`
    the same, F its score   s_t/√ᾱ_t        0                  c_t           and `Score`
    EDM's raw network       1/(√ᾱ_t h_t)    σ_d²/(√ᾱ_t h_t²)   σ_t σ_d/h_t   `sigma_data`

with σ_d the standard deviation that EDM takes the data to have and h_t² = σ_t² + σ_d². What z then
stands for is the readout's to know, as for any network. All are taken in float64. The velocity
u = ε − x_0 of a flow, at (1−t) x_0 + t ε, is a function away: D = x − t u, σ = t/(1−t), s = 1 − t.

σ lives in the network's units. So loc and scale lead to these, not to second moment 1, and
`data_variance` says what the data have there (σ_d² for EDM).

Sources: Ho et al. (2020) for ε and labels 0..T−1; Salimans & Ho (2022), section 4, for v; Song et
al. (2021) for scores and σ(t); Karras et al. (2022), table 1 and section 5, for EDM; Nichol &
Dhariwal (2021), eq. 15, for a learned variance.
"""

import functools
import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jaxtyping import Array

from probdiff import readouts, schedules
from probdiff.arguments import (
    POSITIVE,
    as_array,
    check_flag,
    check_number,
    check_object,
    check_shape,
    shape_text,
    shown,
)
from probdiff.diffusion import Diffusion
from probdiff.kernels import GaussianKernel
from probdiff.networks.binding import bind, check_signature, example_inputs
from probdiff.readouts import Data, Denoiser
from probdiff.types import Network, Step

_SEEN = 1e-3
"""Share of σ by which a level may miss the network's nearest one without a word."""
_MOST = 1e30
"""What is beyond it is all noise."""


class _Levels(NamedTuple):
    """A network's levels, least noise first, arrays `(T,)` in float64."""

    sigma: np.ndarray
    """σ_t, infinite where ᾱ_T = 0."""
    beta: np.ndarray
    """β_t of the diffusion that has them."""
    scale: np.ndarray | None
    """s_t; None for √ᾱ_t."""
    label: np.ndarray
    """What the network is told, float64 or int32."""


class _Convention(NamedTuple):
    """How a network is asked at each level of the diffusion, and what is made of its answer."""

    into: np.ndarray
    """c_t; with k_t and g_t float64, `(T,)`."""
    skip: np.ndarray
    gain: np.ndarray
    label: np.ndarray
    readout: Denoiser
    steps: Step
    limits: tuple[float, float] | None
    """Least and largest x̂_0."""
    channels_first: bool

    def order(self, event_shape: tuple[int, ...]) -> tuple[int, ...]:
        """An example's shape as the network has it."""
        if not self.channels_first:
            return event_shape
        if not event_shape:
            raise ValueError("channels_first must be False for numbers, event_shape (); got True")
        return (event_shape[-1], *event_shape[:-1])


def from_denoiser(
    network: Network,
    readout: Denoiser,
    *,
    event_shape: tuple[int, ...],
    alphas_cumprod: Any = None,
    sigma: Any = None,
    input_scale: Any = None,
    time: Any = None,
    sigma_data: Real | None = None,
    beta: Any = None,
    data_range: tuple[Real, Real] | None = None,
    clip: tuple[Real, Real] | None = None,
    channels_first: bool = False,
    trainable: bool = False,
    context_shape: tuple[int, ...] | None = None,
    **options: Any,
) -> Diffusion:
    """A `Diffusion` of a denoiser trained elsewhere.

    Its noise is given by `alphas_cumprod`, or by `sigma`; levels run from the least noise to the
    most, and T is their number.

    Args:
        network: `network(x, label)`, or `network(x, label, context)` where there is a
            `context_shape`; x is `(B, *event_shape)`, label `(B,)`. A function, an nnx or equinox
            module, or `(apply, weights)`, as `(module.apply, variables)` of linen. One of another
            framework is a function that calls `jax.pure_callback`: it has no gradient, unless
            `jax.custom_vjp` gives it one, and then twists take the slope that `data_variance`
            says instead, `SMC` stays exact, and gradient-based MCMC is refused by JAX.
        readout: What the network predicts, and the variance of a reverse step: `Epsilon`, `Data`,
            `Velocity` or `Score` of `BridgeVariance()` (fixed small), `ForwardVariance()` (fixed
            large) or `InterpolatedVariance()` (learned, a second block of outputs along the
            channels). `Data` is also what to say of a whole EDM denoiser D(x; σ), and of its raw
            network. (On a mixture in two dimensions, with its exact denoiser, a hundred levels of
            DDPM's kind have a bound 0.07 nats below log p(x_0) with the large variance, 2.35 with
            the small one.)
        event_shape: Shape of one example.
        alphas_cumprod: ᾱ_1..ᾱ_T in (0, 1), decreasing; ᾱ_T may be 0. The network takes x_t. In
            float64 where they can be had: 1 − ᾱ_1 has three digits in float32.
        sigma: σ_1..σ_T, positive, increasing, in the network's units. The network takes
            `input_scale` · (x_0 + σ_t ε).
        input_scale: s_1..s_T; 1 if absent.
        time: Labels of the levels, `(T,)`, whatever they are: `np.arange(1, T + 1)`,
            `np.log(sigma)`, `np.linspace(0, 1, T)`. If absent 0..T−1 as integers with
            `alphas_cumprod`, `sigma` with `sigma`, ¼ ln σ with `sigma_data`.
        sigma_data: σ_d of EDM, positive, where the network is EDM's raw one and has to be
            preconditioned.
        beta: Rates of the diffusion where its levels are to be others than the network's, which is
            then asked at the nearest one.
        data_range: Values (low, high) of the data that the network knows as −1 and 1, such as
            (0, 255); instead of `loc` and `scale`.
        clip: Least and largest x̂_0, in the network's units; none by default, for a clipped x̂_0 is
            no mean.
        channels_first: Whether the network has the channels of an example first, while the data
            have them last.
        trainable: Whether the weights are parameters of the model, `name_network$params`; else they
            are constants, and the parameters `{}`.
        context_shape: Shape of one example's context, None where there is none.
        options: Further arguments of `Diffusion`: `loc` and `scale`, which lead to the network's
            units; `data_variance`, there too, by default `sigma_data`² or 1; `last_step`, by
            default `Learned()`; `name`.

    Raises:
        ValueError: if an argument is out of range or does not go with another, or the network does
            not return what the readout needs.

    Warns:
        UserWarning: if levels by `beta` are not the network's, with how far σ is off.

    Example:
        N(1, 0.5²) has the denoiser D(x, σ) = (x/σ² + 4)/(1/σ² + 4), of which anyone may have
        trained a network:

        >>> def denoiser(x, sigma):
        ...     precision = 1 / sigma[:, None] ** 2
        ...     return (x * precision + 4.0) / (precision + 4.0)
        >>> sigma = np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 200) ** 7  # EDM's levels
        >>> readout = readouts.Data(readouts.BridgeVariance())
        >>> diffusion = from_denoiser(
        ...     denoiser, readout, sigma=sigma, event_shape=(1,), loc=-1.0, data_variance=0.25
        ... )
        >>> f"{diffusion.rates[0]:.1e}", f"{np.prod(1 - diffusion.rates):.1e}"  # β_1 and ᾱ_T
        ('4.0e-06', '1.6e-04')
        >>> x_0 = sample.ancestral(jax.random.key(0), diffusion, {}, 4000)
        >>> round(float(x_0.mean()), 1), round(float(x_0.std()), 1)  # less loc, as data are
        (0.0, 0.5)
    """
    such = "one such as readouts.Epsilon(readouts.BridgeVariance())"
    check_object(Denoiser, such, readout=readout)
    check_flag(channels_first=channels_first, trainable=trainable)
    event_shape = check_shape("event_shape", event_shape)
    if context_shape is not None:
        context_shape = check_shape("context_shape", context_shape)
    limits = None if clip is None else _limits("clip", clip)
    options = _options(data_range, sigma_data, options)
    levels = _levels(alphas_cumprod, sigma, input_scale, time, sigma_data)
    index, rates = _nearest(levels, beta)
    convention = _Convention(
        *_affine(levels, index, rates, sigma_data, readout), levels.label[index], readout,
        schedules.steps(rates), limits, channels_first,
    )  # fmt: skip
    init, apply = _bound(network, convention.order(event_shape), context_shape, trainable)
    said = functools.partial(_said, apply, convention)
    return Diffusion(
        GaussianKernel(), rates, (said, init) if trainable else functools.partial(said, init),
        event_shape=event_shape, readout=readout if limits is None else Data(readout.variance),
        context_shape=context_shape, **options,
    )  # fmt: skip


def _said(
    apply: Callable[..., Array], convention: _Convention, weights: Any, x_t: Array, t: Array,
    context: Any = None,
) -> Array:  # fmt: skip
    """What the readout is given at x_t: z and, of a learned variance, v."""
    rows = (-1, *[1] * (x_t.ndim - 1))
    affine = convention.into, convention.skip, convention.gain
    into, skip, gain = (jnp.asarray(a, x_t.dtype)[t - 1].reshape(rows) for a in affine)
    is_index = convention.label.dtype.kind == "i"
    label = jnp.asarray(convention.label, jnp.int32 if is_index else x_t.dtype)[t - 1]
    x = into * x_t
    x = jnp.moveaxis(x, -1, 1) if convention.channels_first else x
    outputs = _split(apply(weights, x, label, context), x.shape, convention.readout)
    if convention.channels_first:
        outputs = [jnp.moveaxis(each, 1, -1) for each in outputs]
    z = skip * x_t + gain * outputs[0]
    if convention.limits is not None:
        step = convention.steps.at(t, x_t.ndim - 1)
        z = jnp.clip(convention.readout.denoise(z, x_t, step), *convention.limits)
    outputs = [z, *outputs[1:]]
    if x_t.ndim > 1:
        return jnp.concatenate(outputs, -1)
    return z if len(outputs) == 1 else jnp.stack(outputs, -1)


def _split(out: Any, shape: tuple[int, ...], readout: Denoiser) -> list[Array]:
    """A network's outputs, each of this shape, from side by side along whichever axis."""
    check_object(jax.Array, "a function that returns an array", network=out)
    count = readout.outputs_per_number
    if len(shape) == 1 and out.shape == (shape if count == 1 else (*shape, count)):
        return [out] if count == 1 else list(jnp.moveaxis(out, -1, 0))
    for axis in range(len(shape) - 1, 0, -1):
        if out.shape == (*shape[:axis], count * shape[axis], *shape[axis + 1 :]):
            return jnp.split(out, count, axis)
    hint = "InterpolatedVariance()" if count == 1 else "BridgeVariance() or ForwardVariance()"
    raise ValueError(
        f"network must return {count} output{'s' * (count > 1)} of shape "
        f"{shape_text('B', shape[1:])} for {readout}; got {shape_text('B', out.shape[1:])}. One "
        f"of another number of outputs wants a readout of {hint}"
    )


def _bound(
    network: Network, event_shape: tuple[int, ...], context_shape: tuple[int, ...] | None,
    trainable: bool,
) -> tuple[Any, Callable[..., Array]]:  # fmt: skip
    """Weights, or what makes them from a key, and `apply(weights, x, label, context)`."""
    check_signature(network, example_inputs(event_shape, context_shape))
    init, apply = bind(network, event_shape, context_shape)
    if trainable and init is None:
        raise ValueError(
            "trainable must be False for a function, which has no weights; got True. Pass "
            "(apply, weights)"
        )
    if not trainable and isinstance(network, linen.Module):
        raise ValueError(
            "network must come with its weights, (module.apply, variables), unless it is "
            f"trainable; got the linen module {type(network).__name__}"
        )
    if not trainable and not isinstance(network, tuple) and callable(init):
        init = init(None)  # of an equinox module, which has its weights
    return init, apply


def _levels(
    alphas_cumprod: Any, sigma: Any, input_scale: Any, time: Any, sigma_data: Real | None
) -> _Levels:
    """A network's levels, by whichever of the two says its noise."""
    if (alphas_cumprod is None) == (sigma is None):
        found = "neither" if sigma is None else "both"
        raise ValueError(f"alphas_cumprod or sigma must be given, one of them; got {found}")
    if sigma is None:
        alpha_bar = _row("alphas_cumprod", alphas_cumprod)
        if not (alpha_bar[0] < 1 and (np.diff(alpha_bar) < 0).all() and alpha_bar[-1] >= 0):
            raise ValueError(
                "alphas_cumprod must decrease within (0, 1), its last may be 0; got "
                f"{_ends(alpha_bar)}"
            )
        before = np.concatenate([[1.0], alpha_bar[:-1]])
        beta = (before - alpha_bar) / before
        with np.errstate(divide="ignore"):
            sigma = np.sqrt((1 - alpha_bar) / alpha_bar)
        default = np.arange(len(alpha_bar))
    else:
        sigma = _row("sigma", sigma)
        if not (sigma[0] > 0 and (np.diff(sigma) > 0).all()):
            raise ValueError(
                "sigma must be positive and increase, from the least noise to the most, without "
                f"a 0 for the data; got {_ends(sigma)}"
            )
        beta = np.diff(sigma**2, prepend=0.0) / (1 + sigma**2)
        default = sigma
    T, scale = len(sigma), None
    if sigma_data is not None:
        with np.errstate(divide="ignore"):
            default = np.log(sigma) / 4
    if input_scale is not None and (alphas_cumprod is not None or sigma_data is not None):
        raise ValueError(
            "input_scale must be left out unless sigma is given without sigma_data: by "
            f"alphas_cumprod the network takes x_t; got {shown(input_scale)}"
        )
    if alphas_cumprod is None and sigma_data is None:
        scale = np.ones(T) if input_scale is None else _row("input_scale", input_scale, T)
        if not (scale > 0).all():
            raise ValueError(f"input_scale must be positive; got {_ends(scale)}")
    label = default if time is None else as_array("time", time, T, is_finite=True)
    label = np.asarray(label, np.int32 if np.issubdtype(label.dtype, np.integer) else np.float64)
    return _Levels(sigma, beta, scale, label)


def _nearest(levels: _Levels, beta: Any) -> tuple[np.ndarray, np.ndarray]:
    """The network's level for each of the diffusion, by index, and the diffusion's rates."""
    if beta is None:
        return np.arange(len(levels.sigma)), levels.beta
    beta = schedules.check_beta(beta)
    with np.errstate(divide="ignore", over="ignore"):
        sigma = np.sqrt(np.expm1(-np.cumsum(np.log1p(-beta))))
    own, wanted = (np.log(np.minimum(a, _MOST)) for a in (levels.sigma, sigma))
    index = np.searchsorted((own[1:] + own[:-1]) / 2, wanted)
    off = np.abs(np.expm1(own[index] - wanted))
    if off.max() > _SEEN:
        t = int(off.argmax()) + 1
        warnings.warn(
            f"beta has levels that the network was not trained for: at the nearest one sigma is "
            f"off by up to {off.max():.2g} of itself, at t = {t} ({sigma[t - 1]:.3g}, and the "
            f"network's {levels.sigma[index[t - 1]]:.3g}); {np.mean(off):.2g} on average",
            stacklevel=3,
        )
    return index, beta


def _affine(
    levels: _Levels, index: np.ndarray, beta: np.ndarray, sigma_data: Real | None,
    readout: Denoiser,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """c_t, k_t and g_t of z = k_t x_t + g_t F(c_t x_t, label_t); the file's docstring."""
    one, none = np.ones(len(beta)), np.zeros(len(beta))
    if sigma_data is None and levels.scale is None:
        return one, none, one
    if beta[-1] == 1:
        raise ValueError(
            "alphas_cumprod must end above 0, and beta_T must be below 1, for a network that "
            "takes x_0 + sigma * noise; got ᾱ_T = 0"
        )
    root = np.exp(0.5 * np.cumsum(np.log1p(-beta)))
    if sigma_data is None:
        into = levels.scale[index] / root
        return into, none, into if isinstance(readout, readouts.Score) else one
    if not isinstance(readout, Data):
        raise ValueError(
            f"readout must be Data where sigma_data is given, of which EDM makes x_0; got {readout}"
        )
    sigma, sigma_data = levels.sigma[index], float(sigma_data)
    h = np.sqrt(sigma**2 + sigma_data**2)
    return 1 / (root * h), sigma_data**2 / (root * h**2), sigma * sigma_data / h


def _options(data_range: Any, sigma_data: Real | None, options: dict[str, Any]) -> dict[str, Any]:
    """Further arguments of `Diffusion`: units by data_range, and what is not its own default."""
    if data_range is not None:
        low, high = _limits("data_range", data_range)
        if options.keys() & {"loc", "scale"}:
            raise ValueError(
                f"data_range must be left out where loc or scale is given; got {data_range}"
            )
        options = options | {"loc": (low + high) / 2, "scale": (high - low) / 2}
    if sigma_data is not None:
        check_number(POSITIVE, sigma_data=sigma_data)
    variance = 1.0 if sigma_data is None else float(sigma_data) ** 2
    return {"last_step": readouts.Learned(), "data_variance": variance} | options


def _limits(argument: str, value: Any) -> tuple[float, float]:
    """Two numbers, the lower first."""
    limits = as_array(argument, value, 2, is_finite=True)
    if not limits[0] < limits[1]:
        raise ValueError(f"{argument} must be (low, high) with low < high; got {shown(value)}")
    return float(limits[0]), float(limits[1])


def _row(argument: str, value: Any, T: int | str = "T") -> np.ndarray:
    row = np.asarray(as_array(argument, value, T, is_finite=True), np.float64)
    if len(row) < 2:
        raise ValueError(f"{argument} must hold at least 2 levels; got {shown(row)}")
    return row


def _ends(row: np.ndarray) -> str:
    return f"{row[0]:.6g} at level 1 to {row[-1]:.6g} at level {len(row)}"
