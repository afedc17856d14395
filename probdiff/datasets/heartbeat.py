"""The binary heartbeat: sequences of bits with a 1 in every fifth bin.

The phase is uniform, so there are exactly five sequences of 20 bits, and the log-likelihood of none
can be above log2(1/5) = −2.3219 bits.

Source: Sohl-Dickstein et al. (2015), section 3.1.2.
"""

import jax
import numpy as np
from jaxtyping import Int, PRNGKeyArray

from probdiff.arguments import check_at_least, check_key


def heartbeat_sequences(*, length: int = 20, period: int = 5) -> Int[np.ndarray, "period length"]:
    """The binary heartbeat's sequences: a 1 in every `period`-th bin, one row for each phase.

    Args:
        length: Bins of a sequence, a multiple of `period`.
        period: Bins from one 1 to the next, at least 2.

    Returns:
        Bits 0 and 1; row `phase` begins with `phase` zeros.

    Example:
        >>> datasets.heartbeat_sequences(length=6, period=3)
        array([[1, 0, 0, 1, 0, 0],
               [0, 1, 0, 0, 1, 0],
               [0, 0, 1, 0, 0, 1]], dtype=int32)
    """
    check_at_least(2, period=period)
    check_at_least(1, length=length)
    if length < period or length % period:
        raise ValueError(f"length must be a multiple of period {period}; got {length}")
    return (np.arange(length) % period == np.arange(period)[:, None]).astype(np.int32)


def heartbeat(
    key: PRNGKeyArray, n: int, *, length: int = 20, period: int = 5
) -> Int[np.ndarray, "n length"]:
    """Draws of `n` heartbeats, each a row of `heartbeat_sequences`: log2(period) bits each.

    Example:
        >>> x = datasets.heartbeat(jax.random.key(0), 1000)
        >>> x.shape, set(x.sum(axis=1).tolist())  # four beats in each
        ((1000, 20), {4})
    """
    check_key(key)
    check_at_least(1, n=n)
    sequences = heartbeat_sequences(length=length, period=period)
    return sequences[np.asarray(jax.random.randint(key, (n,), 0, period))]
