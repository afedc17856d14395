"""Bits per dimension: the length of a code for discrete data, per entry.

A model of symbols gives an example x of D entries a probability, and an ideal code spends
−log₂ p(x) bits on it. From a bound K ≤ log p(x) in nats,

    −log₂ p(x) / D ≤ −K / (D ln 2),

so the number is an upper bound on the bits per entry. A density has none: at half the unit of
length it falls by one bit per entry, and no code goes with it.
"""

import math
from typing import NamedTuple

import xarray as xr

from probdiff.arguments import check_object


class BitsPerDim(NamedTuple):
    """Bits per entry of one example, an upper bound: mean over examples, its standard error.

    Example:
        >>> bits = diagnostics.BitsPerDim(mean=0.95, se=0.01)
        >>> f"{bits.mean} ± {bits.se}"
        '0.95 ± 0.01'
    """

    mean: float
    se: float
    """Over examples; nan for one example."""


def bits_per_dim(tree: xr.DataTree) -> BitsPerDim:
    """Mean bits per entry, −K / (D ln 2), of discrete data; lower is better.

    Args:
        tree: What `bound` or `sampled_bound` returned for symbols.

    Raises:
        ValueError: if the tree is no bound, bounds a density, or entries observed differ.

    Example:
        Under a model of fair coins every bit of data costs one bit:

        >>> diffusion = standard_diffusion((8,), kernel=BernoulliKernel(0.5))
        >>> tree = diagnostics.bound(jax.random.key(0), diffusion, {}, jnp.ones((500, 8), int))
        >>> round(diagnostics.bits_per_dim(tree).mean, 1)
        1.0
    """
    check_object(xr.DataTree, "what diagnostics.bound returned", tree=tree)
    group = tree.children.get("bound")
    if group is None or not {"reference_measure", "num_dims"} <= set(group.attrs):
        got = list(tree.children)
        raise ValueError(
            f"tree must come from diagnostics.bound or sampled_bound; got groups {got}"
        )
    measure, num_dims = group.attrs["reference_measure"], group.attrs["num_dims"]
    if measure != "counting":
        raise ValueError(
            "tree must bound probabilities of discrete data, reference_measure 'counting'; got "
            f"densities, reference_measure {measure!r}, whose bits change with the units"
        )
    if not num_dims >= 1:
        raise ValueError(
            "tree must have the same number of observed entries in every example, one or more; "
            f"got num_dims {num_dims}"
        )
    to_bits = 1 / (num_dims * math.log(2))
    return BitsPerDim(-group.attrs["mean"] * to_bits, group.attrs["se"] * to_bits)
