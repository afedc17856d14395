"""Eigenpairs of many small symmetric matrices at once, by Jacobi rotations.

A rotation in the plane (p, q) by the angle whose tangent t solves t² + 2 t θ = 1, with
θ = (a_qq − a_pp)/(2 a_pq), puts a zero at a_pq; sweeps over all planes converge quadratically.
LAPACK takes the matrices of a batch one after another, which for 4 × 4 is far slower than these few
operations on whole arrays.

Source: Golub and Van Loan (2013), section 8.5.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SWEEPS = 6
"""Enough for float64 up to eight rows."""
LARGEST = 8
"""Rows from which LAPACK is the better choice."""


def eigh(
    matrix: Float[Array, "k k *batch"],
) -> tuple[Float[Array, "k *batch"], Float[Array, "k k *batch"]]:
    """Eigenvalues, in no order, and eigenvectors in the second axis."""
    k = matrix.shape[0]
    if k == 1:
        return matrix[0], jnp.ones_like(matrix)
    if k > LARGEST:
        values, vectors = eigh_each(jnp.moveaxis(matrix, (0, 1), (-2, -1)))
        return jnp.moveaxis(values, -1, 0), jnp.moveaxis(vectors, (-2, -1), (0, 1))
    rows = [[matrix[i, j] for j in range(k)] for i in range(k)]
    one, zero = jnp.ones_like(matrix[0, 0]), jnp.zeros_like(matrix[0, 0])
    vectors = [[one if i == j else zero for j in range(k)] for i in range(k)]

    def sweep(_: Array, pair: Any) -> Any:
        for p, q in itertools.combinations(range(k), 2):
            pair = _rotate(*pair, p, q)
        return pair

    rows, vectors = jax.lax.fori_loop(0, SWEEPS, sweep, (rows, vectors))
    return jnp.stack([rows[i][i] for i in range(k)]), jnp.stack([jnp.stack(v) for v in vectors])


def eigh_each(
    matrix: Float[Array, "*batch k k"],
) -> tuple[Float[Array, "*batch k"], Float[Array, "*batch k k"]]:
    """Eigenpairs by LAPACK, one matrix at a time, ascending.

    A whole batch at once is shared out among threads on a CPU, and two such calls of one program
    can wait for each other for ever.
    """
    batch, k = matrix.shape[:-2], matrix.shape[-1]
    if not batch:
        return tuple(jnp.linalg.eigh(matrix))
    values, vectors = jax.lax.map(lambda m: tuple(jnp.linalg.eigh(m)), matrix.reshape(-1, k, k))
    return values.reshape(*batch, k), vectors.reshape(*batch, k, k)


def _rotate(a: Any, vectors: Any, p: int, q: int) -> tuple[Any, Any]:
    """Rotate rows and columns p and q so that a_pq becomes 0; entries are arrays of their own."""
    is_zero = a[p][q] == 0
    theta = (a[q][q] - a[p][p]) / (2 * jnp.where(is_zero, 1.0, a[p][q]))
    t = jnp.where(theta < 0, -1.0, 1.0) / (jnp.abs(theta) + jnp.sqrt(1 + theta**2))
    t = jnp.where(is_zero, 0.0, t)
    c = jax.lax.rsqrt(1 + t**2)
    s = t * c

    def columns(m: Any) -> Any:
        turned = [list(row) for row in m]
        for row in turned:
            row[p], row[q] = c * row[p] - s * row[q], s * row[p] + c * row[q]
        return turned

    a = columns(a)
    a[p], a[q] = (
        [c * x - s * y for x, y in zip(a[p], a[q], strict=True)],
        [s * x + c * y for x, y in zip(a[p], a[q], strict=True)],
    )
    return a, columns(vectors)
