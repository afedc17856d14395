"""Entropy of every reverse step, held between bounds, and what depth destroys.

How uncertain x_s is once x_t is known, s = t − 1, is bounded without a model (eq. 24) and with one:

    H(X_s | X_t, X_0) = H(X_t | X_s) + H(X_s | X_0) − H(X_t | X_0)      lower
                      ≤ H(X_s | X_t)
                      ≤ H(X_t | X_s)                                    upper
    H(X_s | X_t)      ≤ H(X_s | X_t, X_0) + KL_t = −E log p(x_s | x_t)  by the model

So a step's term of the bound K is the model's bound less the lower one. The paper's upper bound
takes H(X_t) ≥ H(X_s), which needs E log π(x_t) to be the same at every level: unit second moment
for numbers, mean activity m for bits under B(m), nothing for B(½) and uniform classes. Any data
have

    H(X_s | X_t) ≤ H(X_t | X_s) + E log π(x_t) − E log π(x_s),

as KL(q(x_t) ‖ π) never grows; `correction` is what it adds.

What x_t still tells of x_0 falls with t, and lies between

    E log q(x_t | x_0) − E log (1/N) Σ_j q(x_t | x_0^j)  ≤  I(X_0; X_t)
                                                         ≤  KL_T^prior + Σ_{u > t} KL_u

where the left contrasts N examples, and cannot exceed log N; the right is what the model pays for
the levels from T down to t. Gaussian data of variance 1 have I = −½ log(1 − ᾱ_t) a number.

Sources: Sohl-Dickstein et al. (2015), eq. 24 and appendix A; van den Oord et al. (2018) and Poole
et al. (2019) for the contrastive bound.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import xarray as xr
from jaxtyping import Array, Float

from probdiff.arguments import check_at_least, check_key, check_object, plain
from probdiff.diagnostics.bounds import bound, check_examples, digest
from probdiff.diffusion import Data, Diffusion
from probdiff.kernels import AbsorbingKernel, DiscreteKernel, GaussianKernel
from probdiff.reverse import Reverse
from probdiff.trajectories import ForwardTrajectory
from probdiff.types import Params, Step

_Kernel = GaussianKernel | DiscreteKernel


def entropies(
    key: Array, diffusion: Diffusion, params: Params, x_0: Data, tree: xr.DataTree | None = None
) -> xr.DataTree:
    """Bounds on the entropy of every reverse step.

    Args:
        key: Randomness of `bound`, where no tree is given.
        diffusion: The model.
        params: Its parameters (the schedule may be among them).
        x_0: As in `bound`.
        tree: What `bound` returned for these examples, without a mask; made by it if absent.

    Returns:
        DataTree with group `entropy`, nats, mean over examples and summed over an example's entries
        on the scale of the diffusion, by `step` (2..T): `lower`, `upper`, `correction` (to be added
        to `upper` where the data do not meet the condition), `model` and `model_se`. Attributes:
        `units`, `condition` (what `upper` needs), `log_pi_change` (by how far the data miss it:
        E log π(x_0) + H(π), 0 where they meet it).

    Raises:
        ValueError: if data, parameters or tree do not fit, or π puts no mass on data (absorbing).

    Example:
        For the true model of N(0, 1) the entropy of a step is that of N(·, β_t), and the model's
        bound meets it:

        >>> diffusion = standard_diffusion(T=5)
        >>> key, key_x = jax.random.split(jax.random.key(0))
        >>> x = jax.random.normal(key_x, (2000,))
        >>> tree = diagnostics.bound(key, diffusion, {}, x)
        >>> group = diagnostics.entropies(key, diffusion, {}, x, tree)["entropy"]
        >>> bool((group["lower"] < group["upper"]).all())
        True
        >>> exact = 0.5 * np.log(2 * np.pi * np.e * schedules.cosine(5)[1:])
        >>> gap = group["model"].values - exact
        >>> bool((abs(gap) < 4 * group["model_se"].values).all())
        True
    """
    check_key(key)
    check_object(Diffusion, diffusion=diffusion)
    kernel = diffusion.kernel
    if isinstance(kernel, AbsorbingKernel):
        raise ValueError(f"kernel must put mass on data for eq. 24; got {kernel}")
    tree = _checked(key, diffusion, params, x_0, tree)
    kl = _kl(tree, diffusion, x_0)
    x = jnp.asarray(diffusion.to_state(plain("x_0", x_0)))
    steps = diffusion.bind(params).steps
    forward, before, after, log_pi = _closed_forms(kernel, x, steps, len(diffusion.event_shape))
    lower = (forward + before - after).mean(1)
    pi = kernel.stationary(x.shape)
    axes = tuple(range(1, x.ndim))
    miss = float(jnp.mean(jnp.sum(pi.log_prob(x) + pi.entropy(), axes)))
    variables = {
        "lower": ("step", lower), "upper": ("step", forward.mean(1)),
        "correction": ("step", log_pi.mean(1)), "model": ("step", lower + kl.mean(0)),
        "model_se": ("step", _se((forward + before - after).T + kl)),
    }  # fmt: skip
    attrs = {"units": "nats", "condition": _condition(kernel), "log_pi_change": miss}
    group = xr.Dataset(variables, {"step": np.arange(2, diffusion.T + 1)}, attrs)
    return xr.DataTree.from_dict({"entropy": group})


def information(
    key: Array, diffusion: Diffusion, params: Params, x_0: Data, tree: xr.DataTree | None = None, *,
    num_levels: int = 50,
) -> xr.DataTree:  # fmt: skip
    """Bounds on I(X_0; X_t), what level t still tells of the data; arguments as in `entropies`.

    Both are estimates: within their standard errors the lower may come out above the upper.

    Args:
        key: Randomness, also of `bound` where no tree is given.
        x_0: N at least 2 examples. Every level compares each with each.
        num_levels: Levels at which the contrast is made, evenly spread over 1..T.

    Returns:
        DataTree with group `information`, nats per example: `model` (upper bound) and `model_se` by
        `level` (1..T); `contrast` (lower bound) and `contrast_se` by `contrasted` level. Attribute
        `most_contrast`, log N.

    Example:
        Data of N(0, 1), of which level t tells −½ log(1 − ᾱ_t) nats:

        >>> diffusion = standard_diffusion(T=5)
        >>> key, key_x = jax.random.split(jax.random.key(0))
        >>> x = jax.random.normal(key_x, (1000,))
        >>> tree = diagnostics.bound(key, diffusion, {}, x)
        >>> group = diagnostics.information(key, diffusion, {}, x, tree)["information"]
        >>> exact = -0.5 * np.log(1 - np.cumprod(1 - schedules.cosine(5)))
        >>> low, high = group["contrast"].values, group["model"].values
        >>> [round(float(nats[2]), 1) for nats in (low, exact, high)]  # level 3
        [0.2, 0.2, 0.2]
        >>> bool((abs(high - exact) < 4 * group["model_se"].values).all())  # for the true model
        True
    """
    check_key(key)
    check_at_least(1, num_levels=num_levels)
    if np.ndim(x_0) and len(x_0) < 2:
        raise ValueError(f"x_0 must be at least 2 examples to contrast; got {len(x_0)}")
    tree = _checked(jax.random.fold_in(key, 0), diffusion, params, x_0, tree)
    kl = _kl(tree, diffusion, x_0)
    T = diffusion.T
    paid = np.concatenate([kl, tree["bound"]["prior_kl"].values[:, None]], 1)  # steps 2..T, and π
    above = np.cumsum(paid[:, ::-1], 1)[:, ::-1]  # at level t: steps t + 1..T, and π
    levels = np.unique(np.round(np.linspace(1, T, min(num_levels, T))).astype(int))
    reverse = diffusion.bind(params)
    inputs = key, reverse.relative(), jnp.asarray(reverse.less_loc(x_0)), jnp.asarray(levels)
    contrast = np.asarray(diffusion.programs(_contrast, *inputs))
    variables = {
        "model": ("level", above.mean(0)), "model_se": ("level", _se(above)),
        "contrast": ("contrasted", contrast.mean(1)),
        "contrast_se": ("contrasted", _se(contrast.T)),
    }  # fmt: skip
    coords = {"level": np.arange(1, T + 1), "contrasted": levels}
    attrs = {"units": "nats", "most_contrast": math.log(len(x_0))}
    group = xr.Dataset(variables, coords, attrs)
    return xr.DataTree.from_dict({"information": group})


def _checked(
    key: Array, diffusion: Diffusion, params: Params, x_0: Data, tree: xr.DataTree | None
) -> xr.DataTree:
    """The tree, or the one that `bound` makes, which checks the examples too."""
    if tree is None:
        return bound(key, diffusion, params, x_0)
    check_examples(diffusion, params, x_0, None, None)
    return tree


def _kl(tree: xr.DataTree, diffusion: Diffusion, x_0: Data) -> np.ndarray:
    """KL_t by example and step, of the tree that `bound` made of these examples."""
    check_object(xr.DataTree, "what diagnostics.bound returned", tree=tree)
    shape = (len(x_0), diffusion.T - 1)
    if "bound" not in tree.children or "kl" not in tree["bound"]:
        raise ValueError("tree must be what `diagnostics.bound` returned; got one without its kl")
    kl = tree["bound"]["kl"].values
    if kl.shape != shape:
        raise ValueError(f"tree must hold kl of shape {shape}; got {kl.shape}")
    if tree["bound"].attrs["data"] != digest(x_0):
        raise ValueError("tree must be of the examples in x_0; got one of others, or with a mask")
    return np.asarray(kl, np.float64)


def _closed_forms(
    kernel: _Kernel, x_0: Array, steps: Step, event_dim: int
) -> tuple[np.ndarray, ...]:
    """H(X_t | X_s), H(X_s | X_0), H(X_t | X_0) and E log π(x_t) − E log π(x_s), `(T − 1, N)`."""
    axes = tuple(range(1, 1 + event_dim))

    def at(t: Array) -> tuple[Array, ...]:
        before, after = (kernel.marginal(x_0, steps.at(u, event_dim)) for u in (t - 1, t))
        forward = _transition_entropy(kernel, before, steps.at(t, event_dim))
        change = kernel.expected_log_stationary(after) - kernel.expected_log_stationary(before)
        terms = forward, before.entropy(), after.entropy(), change
        return tuple(jnp.sum(jnp.broadcast_to(a, x_0.shape), axes) for a in terms)

    out = jax.lax.map(at, jnp.arange(2, steps.T + 1))
    return tuple(np.asarray(a, np.float64) for a in out)


def _transition_entropy(
    kernel: _Kernel, before: dist.Distribution, step: Step
) -> Float[Array, "..."]:
    """H(X_t | X_s) entry by entry, X_s from an elementwise law."""
    if not isinstance(kernel, DiscreteKernel):
        return kernel.transition(before.loc, step).entropy()  # the same wherever x_s is
    probs = before.probs
    states = jnp.arange(kernel.num_states).reshape(-1, *[1] * (probs.ndim - 1))
    states = jnp.broadcast_to(states, (kernel.num_states, *probs.shape[:-1]))
    return jnp.sum(jnp.moveaxis(probs, -1, 0) * kernel.transition(states, step).entropy(), 0)


def _condition(kernel: _Kernel) -> str:
    if not isinstance(kernel, DiscreteKernel):
        return "eq. 24's upper bound needs data of unit second moment on average over entries"
    if np.ptp(kernel.log_pi) == 0:
        return "eq. 24's upper bound holds for all data, as π is uniform"
    return "eq. 24's upper bound needs data whose mean activity is that of π"


def _contrast(key: Array, reverse: Reverse, x_0: Array, levels: Array) -> Float[Array, "levels N"]:
    """log q(x_t | x_0) − log (1/N) Σ_j q(x_t | x_0^j) at one draw per example and level."""
    forward = ForwardTrajectory.of(reverse, x_0)
    n = len(x_0)

    def at(inputs: tuple[Array, Array]) -> Array:
        t, key = inputs
        x_t = forward.sample_at(key, jnp.full(n, t))
        law = forward.kernel.marginal(forward.x_0, forward.step_at(t))
        at_once = max(1, 2**22 // max(1, x_t.size))
        log_q = jax.lax.map(lambda x: forward.sum_event(law.log_prob(x)), x_t, batch_size=at_once)
        return jnp.diagonal(log_q) - jax.nn.logsumexp(log_q, 1) + math.log(n)

    return jax.lax.map(at, (levels, jax.random.split(key, len(levels))))


def _se(values: np.ndarray) -> np.ndarray:
    """Standard error of means over the first axis, NaN of one value."""
    n = len(values)
    return values.std(0, ddof=1) / math.sqrt(n) if n > 1 else np.full(values.shape[1:], math.nan)
