"""Parzen-window log-likelihood: the density of draws with Gaussian noise on them, at test images.

    log p̂_σ(x) = log (1/M) Σ_m N(x; c_m, σ² I)
               = log Σ_m exp(−|x − c_m|² / 2σ²) − log M − (d/2) log(2πσ²)

c_1..c_M are draws of the model, and σ is the one of a few bandwidths under which validation images
are likeliest. The protocol of the papers on MNIST of 2014 and 2015: M = 10,000, images of d = 784
numbers in [0, 1], σ among 10 values log-spaced in [0.1, 1] on the first 1000 of the training images
50,000 to 59,999, the mean over all 10,000 test images. Training images as draws then score some 242
nats, 349 bits, an image.

It is here to meet published numbers, not to rank models. What it scores is draws plus noise, from
few draws in many dimensions: it prefers centres of clusters to the data's own law, and knows
nothing of grey levels finer than σ. `bound` bounds the model's own log density.

Sources: Goodfellow et al. (2014), section 5; Sohl-Dickstein et al. (2015), table 2; Theis, van den
Oord & Bethge (2016) for what is wrong with it.
"""

import math
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
import xarray as xr

from probdiff import bars
from probdiff.arguments import as_array, check_at_least, check_flag, read_array
from probdiff.diagnostics.bounds import digest, summary
from probdiff.diffusion import Data

_BANDWIDTHS = tuple(np.logspace(-1, 0, 10).tolist())
"""Those of the protocol, for data in [0, 1]."""


def parzen(
    draws: Data, validation: Data, test: Data, *,
    bandwidths: Sequence[float] | np.ndarray = _BANDWIDTHS, block_size: int = 500,
    progress: bool = False,
) -> xr.DataTree:  # fmt: skip
    """Log density of test images under Gaussians around draws, of the bandwidth best elsewhere.

    Args:
        draws: Draws of the model, `(M, *event_shape)`, on the scale the bandwidths are for.
        validation: Images to choose the bandwidth on; no test images, and none of the draws.
        test: Images to score.
        bandwidths: Standard deviations σ to choose from. If an end of them is chosen, a better one
            may lie beyond.
        block_size: Images handled at once; memory is some `16 * block_size * M` bytes.

    Returns:
        DataTree with group `parzen`, nats per image: `log_density` by `example`, and
        `validation_mean` by `bandwidth`, of which the chosen one is largest. Attributes: `mean`,
        `se` (standard error over test images, the draws and σ held fixed), `mean_bits`, `se_bits`,
        `bandwidth`, `num_draws`, `num_validation`, `reference_measure`, `num_dims`, and `data`, a
        digest of the test images. Computed in float64.

    Raises:
        ValueError: if images are none, of other shapes or not finite, or an option is not positive.

    Example:
        Draws of the data's own law N(0, 1), whose mean log density is −1.42:

        >>> random = np.random.default_rng(0)
        >>> draws, validation, test = (random.normal(size=n) for n in (2000, 500, 2000))
        >>> tree = diagnostics.parzen(draws, validation, test, bandwidths=(0.01, 0.2, 1.0))
        >>> tree["parzen"].attrs["bandwidth"], round(tree["parzen"].attrs["mean"], 1)
        (0.2, -1.4)
    """
    _check(draws, validation, test, bandwidths, block_size, progress)
    centres, seen, asked = (
        np.asarray(x, np.float64).reshape(len(x), -1) for x in (draws, validation, test)
    )
    loc, num_dims = centres.mean(0), centres.shape[1]
    centres = centres - loc  # so that the squares of distances lose no digits to where the data are
    blocks = _distances(centres, seen - loc, block_size, progress, "bandwidth")
    sums = sum(np.array([_log_density(d, s, num_dims).sum() for s in bandwidths]) for d in blocks)
    validation_mean = sums / len(validation)
    bandwidth = float(bandwidths[int(validation_mean.argmax())])
    blocks = _distances(centres, asked - loc, block_size, progress, "log density")
    log_density = np.concatenate([_log_density(d, bandwidth, num_dims) for d in blocks])
    variables = {
        "log_density": ("example", log_density),
        "validation_mean": ("bandwidth", validation_mean),
    }
    coords = {"example": np.arange(len(test)), "bandwidth": np.asarray(bandwidths, np.float64)}
    attrs = summary(log_density) | {
        "bandwidth": bandwidth, "num_draws": len(draws),
        "num_validation": len(validation), "reference_measure": "Lebesgue, in the user's units",
        "num_dims": num_dims, "data": digest(test),
    }  # fmt: skip
    return xr.DataTree.from_dict({"parzen": xr.Dataset(variables, coords, attrs)}, name="probdiff")


def _check(
    draws: Data, validation: Data, test: Data, bandwidths: Sequence[float] | np.ndarray,
    block_size: int, progress: bool,
) -> None:  # fmt: skip
    check_at_least(1, block_size=block_size)
    check_flag(progress=progress)
    for name, x in (("draws", draws), ("validation", validation), ("test", test)):
        read_array(name, x, jnp.integer, jnp.floating)
        if np.ndim(x) < 1 or len(x) < 1 or np.shape(x)[1:] != np.shape(draws)[1:]:
            raise ValueError(
                f"{name} must have one or more rows, each of the shape of those of draws, "
                f"{np.shape(draws)[1:]}; got shape {np.shape(x)}"
            )
        if not np.isfinite(np.asarray(x)).all():
            raise ValueError(f"{name} must be finite; got nan or infinity")
    as_array("bandwidths", bandwidths, "bandwidths")
    if len(bandwidths) < 1 or not all(0 < s < math.inf for s in bandwidths):
        raise ValueError(f"bandwidths must be one or more positive numbers; got {bandwidths}")


def _distances(
    centres: np.ndarray, x: np.ndarray, block_size: int, progress: bool, name: str
) -> Iterator[np.ndarray]:
    """Squared distances of images to all centres, |x|² − 2 x·c + |c|², block by block `(b, M)`."""
    squares = (centres**2).sum(1)
    for start in bars.bar(range(0, len(x), block_size), desc=name, disable=not progress):
        rows = x[start : start + block_size]
        distance = rows @ centres.T
        distance *= -2  # in place, for these are the largest arrays here
        distance += (rows**2).sum(1, keepdims=True)
        distance += squares
        yield distance


def _log_density(distance: np.ndarray, bandwidth: float, num_dims: int) -> np.ndarray:
    """log p̂_σ of the images of a block, `(b,)`."""
    exponent = distance / (-2 * bandwidth**2)
    largest = exponent.max(1)
    exponent -= largest[:, None]
    total = largest + np.log(np.exp(exponent, out=exponent).sum(1))
    size = distance.shape[1]
    return total - math.log(size) - num_dims / 2 * math.log(2 * math.pi * bandwidth**2)
