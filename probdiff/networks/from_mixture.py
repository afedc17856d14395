"""`FromMixture`: a perceptron that starts from a Gaussian mixture of the data, and corrects it.

Were the data Σ_k w_k N(m_k, Σ_k), x_t given component k would be N(a m_k, S_k) with a = √ᾱ_t,
n = 1 − ᾱ_t and S_k = a² Σ_k + n I, and by P_k = S_k⁻¹ the law of an entry given all others

    x_t,i | rest of x_t, k ~ N(x_t,i − [P_k (x_t − a m_k)]_i / P_k,ii,  1 / P_k,ii),

hence that of x_0,i given the rest of x_t, without the entry's own noise n:

    mean   (x_t,i − [P_k (x_t − a m_k)]_i / P_k,ii) / a        variance   (1/P_k,ii − n) / a²
    weight w_k N(x_t; a m_k, S_k) / N(x_t,i; its mean above, 1/P_k,ii).

That is what the readout `Mixture(K)` asks for, so with no correction x̂_0 and Var[x_0,i | x_t] are
the mixture's own at every level, and training begins where the mixture ends. An entry on a grid has
its levels for components instead, each with the mass that the law above gives its cell; of more
than K levels those around x_t/a, and the law above where noise hides the grid, √n/a > 0.7 Δ. A
perceptron adds to logits, means (in standard deviations) and log widths.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy.special import ndtr
from jaxtyping import Array, Float

from probdiff.arguments import as_array, check_at_least, check_object, check_shape
from probdiff.networks.binding import check_call

_LOW, _HIGH = -2.0, 2.0
"""Ends of the readout `Mixture` as it comes."""
_FIRST, _LAST, _BUMPS = -8.0, 16.0, 13  # log-SNRs over which bumps are spread
_ABSENT = -15.0  # log weight of a component that is not there, from which it can still be raised
_SPIKE = 1e-4  # width of a level, over the distance of two: below the noise of x_1
_LEAST_MASS = 1e-7
_HIDDEN = 0.7  # noise over the distance of two levels from which they leave no trace, e^−2π²·0.49
_LEAST = 1e-7  # of a variance that is left when noise is taken off it


class FromMixture(nnx.Module):
    """Residual perceptron on a Gaussian mixture's own denoiser, for the readout `Mixture`.

    Called as `network(x_t, log_snr)`. Until `start` has set a mixture it is N(0, I). The mixture
    itself is not trained.

    Args:
        event_shape: Shape of one example.
        components: K of the mixture and of the readout `Mixture(components)`, at least 2.
        width: Units per hidden layer.
        depth: Number of hidden layers.
        levels: Number of levels of each entry, flat; 1 for entries on no grid. All 1 if absent.
        rngs: Draws the initial weights.

    Example:
        >>> network = networks.FromMixture((2,), components=2, width=8, depth=1, rngs=nnx.Rngs(0))
        >>> network.start([0.5, 0.5], [[-1, 0], [1, 0]], np.stack([0.1 * np.eye(2)] * 2))
        >>> diffusion = Diffusion(
        ...     GaussianKernel(), schedules.log_snr_linear(50, beta_1=1e-3, alpha_bar_T=1e-3),
        ...     network, event_shape=(2,), readout=readouts.Mixture(2),
        ...     last_step=readouts.Learned(),
        ... )
        >>> params = {"x_0_network$params": nnx.to_pure_dict(nnx.state(network))}
        >>> x_0_hat = diffusion.bind(params).x_0_hat(jnp.array([0.5, 0.1]), 25)  # ᾱ = 0.5, about
        >>> [round(x, 1) for x in x_0_hat.tolist()]
        [0.6, 0.0]
    """

    takes_log_snr = True

    def __init__(
        self, event_shape: tuple[int, ...], components: int, width: int, depth: int, *,
        levels: tuple[int, ...] = (), rngs: nnx.Rngs,
    ):  # fmt: skip
        event_shape = check_shape("event_shape", event_shape)
        levels = check_shape("levels", levels) or (1,) * math.prod(event_shape)
        check_at_least(2, components=components)
        check_at_least(1, width=width, depth=depth)
        check_object(nnx.Rngs, "nnx.Rngs(seed)", rngs=rngs)
        self.event_shape, self.components = event_shape, components
        self.width, self.depth, self.outputs = width, depth, 3 * components
        d = math.prod(event_shape)
        if len(levels) != d:
            raise ValueError(f"levels must be {d} numbers, one for each entry; got {levels}")
        self.levels = levels
        self.lowest, self.spacing = nnx.Param(jnp.zeros(d)), nnx.Param(jnp.ones(d))
        self.log_weights = nnx.Param(jnp.full(components, -math.log(components)))
        self.means = nnx.Param(jnp.zeros((components, d)))
        self.axes = nnx.Param(jnp.broadcast_to(jnp.eye(d), (components, d, d)))
        self.variances = nnx.Param(jnp.ones((components, d)))
        pairs = itertools.pairwise([2 * d + components, *[width] * depth])
        self.layers = nnx.List(nnx.Linear(n + _BUMPS, m, rngs=rngs) for n, m in pairs)
        zeros = nnx.initializers.zeros
        self.readout = nnx.Linear(width + _BUMPS, 3 * components * d, kernel_init=zeros, rngs=rngs)

    def start(
        self, weights: Any, means: Any, covariances: Any, *, lowest: Any = 0.0, spacing: Any = 1.0
    ) -> None:
        """Set the mixture and the levels of entries that have any, on the diffusion's scale.

        Args:
            weights, means, covariances: Of K components, or of fewer: arrays `(K,)`, `(K, d)` and
                `(K, d, d)`.
            lowest: Lowest level of each entry, flat, or one for all.
            spacing: Distance of its levels.

        Raises:
            ValueError: if shapes do not fit, weights are not positive, or a covariance is none.
        """
        most, d = self.means[...].shape
        count = len(as_array("weights", weights, "K"))
        if not 1 <= count <= most:
            raise ValueError(f"weights must be of 1 to {most} components; got {count}")
        given = {"weights": (weights, (count,)), "means": (means, (count, d)),
                 "covariances": (covariances, (count, d, d))}  # fmt: skip
        parts = [
            np.asarray(as_array(name, value, *shape, is_finite=True), np.float64)
            for name, (value, shape) in given.items()
        ]
        if not (parts[0] > 0).all():
            raise ValueError(f"weights must be positive; got {parts[0].min()}")
        variances, axes = np.linalg.eigh(parts[2])
        if not (variances > 0).all():
            raise ValueError(
                f"covariances must be positive definite; got an eigenvalue of {variances.min():.3g}"
            )
        log_weights = np.log(parts[0] / parts[0].sum())
        index = np.arange(most) % count  # copies of next to no weight where there are too few
        log_weights = np.where(np.arange(most) < count, log_weights[index], _ABSENT)
        dtype = self.means[...].dtype
        self.log_weights[...] = jnp.asarray(log_weights, dtype)
        self.means[...], self.axes[...] = (jnp.asarray(a[index], dtype) for a in (parts[1], axes))
        self.variances[...] = jnp.asarray(variances[index], dtype)
        for name, value in {"lowest": lowest, "spacing": spacing}.items():
            value = as_array(name, value, is_finite=True)
            if value.shape not in ((), (d,)):
                raise ValueError(f"{name} must have shape () or ({d},); got {value.shape}")
            getattr(self, name)[...] = jnp.broadcast_to(jnp.asarray(value, dtype), (d,))

    def __call__(
        self, x_t: Float[Array, "B ..."], t: Float[Array, " B"], context: None = None
    ) -> Float[Array, "B ..."]:
        """Outputs `(B, *event_shape)`, the last axis 3K times as long; t is the log-SNR."""
        check_call(self, x_t, t, context)
        rows = x_t.shape[0]
        x = x_t.reshape(rows, -1)
        logits, mean, variance, share = self._of_mixture(x, t)  # (B, K, d), share (B, K)
        logits, mean, variance = self._with_levels(x, t, logits, mean, variance)
        g = jax.nn.softmax(-0.5 * ((t[:, None] - jnp.linspace(_FIRST, _LAST, _BUMPS)) / 2) ** 2, -1)
        weight = jax.nn.softmax(logits, 1)
        x_0_hat = jnp.clip(jnp.sum(weight * mean, 1), -10.0, 10.0)  # in view of the rest
        h = jax.nn.silu(self.layers[0](jnp.concatenate([x, x_0_hat, share, g], -1)))
        for layer in list(self.layers)[1:]:
            h = h + jax.nn.silu(layer(jnp.concatenate([h, g], -1)))
        added = self.readout(jnp.concatenate([h, g], -1)).reshape(rows, 3, self.components, -1)
        sd = jnp.sqrt(variance)
        distance = (_HIGH - _LOW) / (self.components - 1)
        centres = jnp.linspace(_LOW, _HIGH, self.components)[:, None]
        parts = (
            logits + added[:, 0], mean + sd * added[:, 1] - centres,
            jnp.log(sd / (distance / 4)) + added[:, 2],
        )  # fmt: skip
        # Outputs lie side by side along the last axis of the event, the first one first.
        out = jnp.concatenate(parts, 1).reshape(rows, self.outputs, *self.event_shape)
        out = jnp.moveaxis(out, 1, 1 if not self.event_shape else -2)
        last = self.outputs * (self.event_shape[-1] if self.event_shape else 1)
        return out.reshape(rows, *self.event_shape[:-1], last)

    def _with_levels(
        self, x: Array, log_snr: Array, logits: Array, mean: Array, variance: Array
    ) -> tuple[Array, ...]:
        """Components that are levels, for the entries that have any."""
        places = np.flatnonzero(np.array(self.levels) > 1)
        if not len(places):
            return logits, mean, variance
        counts = np.array(self.levels)[places]
        low, spacing = (jax.lax.stop_gradient(a[...])[places] for a in (self.lowest, self.spacing))
        a = jnp.sqrt(jax.nn.sigmoid(log_snr))[:, None]
        nearest = jnp.round((x[:, places] / a - low) / spacing)
        first = jnp.clip(nearest - self.components // 2, 0, np.maximum(counts - self.components, 0))
        number = first[:, None] + np.arange(self.components + 1)[:, None]  # (B, K + 1, e)
        edges = low + spacing * (number - 0.5)
        m, sd = mean[:, :, None, places], jnp.sqrt(variance[:, :, None, places])
        below = ndtr((edges[:, None] - m) / sd)
        below = jnp.einsum("bke,bkle->ble", jax.nn.softmax(logits[:, :, places], 1), below)
        below = jnp.where(number >= counts, 1.0, jnp.where(number == 0, 0.0, below))
        mass = jnp.maximum(below[:, 1:] - below[:, :-1], 0.0)
        number = number[:, :-1]
        found = (
            jnp.where(number < counts, jnp.log(mass + _LEAST_MASS), 2 * _ABSENT),
            low + spacing * number, jnp.broadcast_to((_SPIKE * spacing) ** 2, mass.shape),
        )  # fmt: skip
        is_hidden = jnp.exp(-0.5 * log_snr)[:, None] > _HIDDEN * spacing
        is_hidden = (is_hidden & (counts > self.components))[:, None]
        return tuple(
            old.at[:, :, places].set(jnp.where(is_hidden, old[:, :, places], new))
            for old, new in zip((logits, mean, variance), found, strict=True)
        )

    def _of_mixture(
        self, x: Float[Array, "B d"], log_snr: Float[Array, " B"]
    ) -> tuple[Array, Array, Array, Array]:
        """Logits, means and variances of x_0,i given the rest of x_t; shares given all of it."""
        log_weights, means, axes, variances = (
            jax.lax.stop_gradient(a[...])
            for a in (self.log_weights, self.means, self.axes, self.variances)
        )
        signal, n = jax.nn.sigmoid(log_snr)[:, None, None], jax.nn.sigmoid(-log_snr)[:, None, None]
        a = jnp.sqrt(signal)
        precision = 1 / (signal * variances + n)  # (B, K, d), along the axes
        along = jnp.einsum("bki,kij->bkj", x[:, None] - a * means, axes)
        pull = jnp.einsum("bkj,kij->bki", precision * along, axes)
        own = 1 / jnp.einsum("bkj,kij->bki", precision, axes**2)  # 1/P_ii
        rest = x[:, None] - own * pull
        log_p = 0.5 * jnp.sum(jnp.log(precision) - precision * along**2, -1) + log_weights
        logits = log_p[..., None] + 0.5 * (jnp.log(own) + own * pull**2)
        logits = logits - jnp.max(logits, 1, keepdims=True)
        variance = jnp.maximum(own - n, _LEAST * own) / signal
        return logits, rest / a, variance, jax.nn.softmax(log_p, -1)
