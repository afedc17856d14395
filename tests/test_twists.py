"""Parts of inference by their own laws: expansion, eigenpairs, proposals, covariances.

Against dense linear algebra in NumPy: for a quadratic log r the integral over a Gaussian,

    log ∫ r N(m, C) = log r(m) + ½ gᵀ C (I + H C)⁻¹ g − ½ log det(I + H C),

is exact, and so must the expansion be; a proposal N(mean + shift, (V⁻¹ + D + Σ f fᵀ)⁻¹) must have
that covariance and report its own density.
"""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probdiff import infer, standard_diffusion
from probdiff.infer import spread
from probdiff.infer.quadratic import diagonal, eigh, krylov, local, low_rank
from probdiff.infer.steps import GaussianProposal

D, LEAD = 5, 3
place = jax.jit(GaussianProposal.place)


def quadratic(seed, rank, dtype=np.float64):
    """log r of a linear-Gaussian measurement of some rank; g, H and value by hand."""
    rng = np.random.default_rng(seed)
    a, y = rng.normal(size=(rank, D)).astype(dtype), rng.normal(size=rank).astype(dtype)

    def log_r(x):
        return -0.5 * ((y - x @ a.T) ** 2).sum(-1) / 0.3

    def by_hand(m, c):
        g, h = a.T @ (y - a @ m) / 0.3, a.T @ a / 0.3
        pull = np.linalg.solve(np.eye(D) + h @ c, g)
        log_z = float(log_r(m)) + 0.5 * g @ c @ pull
        return log_z - 0.5 * np.linalg.slogdet(np.eye(D) + h @ c)[1], pull, h

    return log_r, by_hand


def log_integral(at, expansion, sd):
    """log r(m) + ½ gᵀ C (I + H C)⁻¹ g − ½ log det(I + H C)."""
    gain = (at.gradient * sd**2 * expansion.pull).sum(-1)
    return at.value + 0.5 * gain - 0.5 * expansion.log_det


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_low_rank_expansion_is_the_integral_of_a_quadratic(x64, rank):
    log_r, by_hand = quadratic(0, rank)
    rng = np.random.default_rng(1)
    points, sd = rng.normal(size=(LEAD, D)), rng.uniform(0.2, 2, size=(LEAD, D))
    at = local(log_r, jnp.asarray(points))
    found = low_rank(at, jnp.asarray(sd), rank)
    for i in range(LEAD):
        log_z, pull, h = by_hand(points[i], np.diag(sd[i] ** 2))
        assert log_integral(at, found, sd)[i] == pytest.approx(log_z, abs=1e-8)
        np.testing.assert_allclose(found.pull[i], pull, atol=1e-8)
        rows = np.asarray(found.factors[:, i])
        np.testing.assert_allclose(rows.T @ rows, h, atol=1e-7)


@pytest.mark.parametrize(
    "twist", [infer.LaplaceTwist(rank=D), infer.TweedieTwist(rank=D)], ids=repr
)
def test_the_last_integral_keeps_as_many_directions_as_the_rank_says(x64, unchecked, twist):
    """All five, where four are the default."""
    log_r, by_hand = quadratic(0, D)
    rng = np.random.default_rng(1)
    points, sd = rng.normal(size=(LEAD, D)), rng.uniform(0.2, 2, size=(LEAD, D))
    view = SimpleNamespace(problem=SimpleNamespace(is_diagonal=False, size=D))
    at = local(log_r, jnp.asarray(points))
    found = twist.expand(at, jnp.asarray(sd), view)
    for i in range(LEAD):
        log_z, _, _ = by_hand(points[i], np.diag(sd[i] ** 2))
        assert log_integral(at, found, sd)[i] == pytest.approx(log_z, abs=1e-7)


def test_diagonal_expansion_is_the_integral_of_a_product(x64):
    rng = np.random.default_rng(2)
    y, s, points, sd = (rng.uniform(0.3, 2, size=n) for n in (D, D, (LEAD, D), (LEAD, D)))
    at = local(lambda x: -0.5 * (((y - x) / s) ** 2).sum(-1), jnp.asarray(points))
    found = diagonal(at, jnp.asarray(sd))
    total = sd**2 + s**2
    exact = (-0.5 * (y - points) ** 2 / total - 0.5 * np.log(total / s**2)).sum(-1)
    np.testing.assert_allclose(log_integral(at, found, sd), exact, atol=1e-10)
    np.testing.assert_allclose(found.pull, (y - points) / total, atol=1e-10)
    np.testing.assert_allclose(found.diagonal, np.broadcast_to(s**-2, (LEAD, D)), atol=1e-10)


def test_upward_curvature_counts_as_none(x64):
    at = local(lambda x: 0.5 * (x**2).sum(-1), jnp.ones((1, D)))
    sd = 0.5 * jnp.ones((1, D))
    for found in (diagonal(at, sd), low_rank(at, sd, 2)):
        np.testing.assert_allclose(found.log_det, 0, atol=1e-12)
        np.testing.assert_allclose(found.pull, at.gradient, atol=1e-12)


def test_where_r_is_zero_there_is_no_direction():
    at = local(lambda x: jnp.log(jnp.maximum(x.sum(-1), 0.0)), jnp.array([[-1.0, 0.0], [1.0, 1.0]]))
    assert (at.gradient[0] == 0).all()
    np.testing.assert_allclose(at.gradient[1], 0.5)
    assert np.isfinite(at.curvature(jnp.ones((2, 2)))).all()


@pytest.mark.parametrize("last", [0.5, 0.0])
def test_krylov_opens_a_space_that_its_start_closes(x64, last):
    values = jnp.array([4.0, 2.0, last])
    start = jnp.array([[1.0, 1.0, 0.0]])  # closed after two steps
    found, vectors = krylov(start, lambda v: values * v, 3)
    np.testing.assert_allclose(np.sort(found[:, 0]), [last, 2, 4], atol=1e-10)
    lengths = np.sort((vectors**2).sum(-1)[:, 0])
    np.testing.assert_allclose(lengths, [float(last > 0), 1, 1], atol=1e-10)


@pytest.mark.parametrize("tilt", [0.0, 1e-7, 1e-5, 1e-3, 1.0])
def test_no_start_loses_an_eigenvalue(tilt):
    """In float32, where a start near an eigenvector leaves rounding for the next direction."""
    values = jnp.array([4.0, 3.9, 0.0])
    found, _ = krylov(jnp.array([[1.0, tilt, 0.0]]), lambda v: values * v, 3)
    np.testing.assert_allclose(np.sort(found[:, 0]), [0, 3.9, 4], atol=1e-4)


@pytest.mark.parametrize("k", [1, 2, 4, 9])
def test_jacobi_gives_orthonormal_eigenpairs(x64, k):
    a = np.random.default_rng(k).normal(size=(k, k, 6))
    a[..., 0] = 0.0  # all eigenvalues equal
    a[..., 1] = np.diag(np.arange(k))
    a = a + a.swapaxes(0, 1)
    values, vectors = (np.asarray(v) for v in eigh(jnp.asarray(a)))
    for i in range(6):
        v = vectors[..., i]
        np.testing.assert_allclose(v.T @ v, np.eye(k), atol=1e-10)
        np.testing.assert_allclose(v @ np.diag(values[:, i]) @ v.T, a[..., i], atol=1e-9)
        np.testing.assert_allclose(np.sort(values[:, i]), np.linalg.eigvalsh(a[..., i]), atol=1e-9)


def proposal(seed, rank, *, pinned=False):
    """One particle's proposal, and its mean and covariance by hand."""
    rng = np.random.default_rng(seed)
    mean, shift = rng.normal(size=(2, D))
    variance, precision = rng.uniform(0.2, 2, size=(2, D))
    factors = rng.normal(size=(rank, D))
    if pinned:
        precision[0], factors[:, 0] = np.inf, 0.0
    made = GaussianProposal(*map(jnp.asarray, (mean, variance, shift, precision, factors, 0.0)))
    cov = np.linalg.inv(np.diag(1 / variance + precision) + factors.T @ factors)
    return made, mean, variance, mean + shift, cov


def log_normal(x, mean, cov):
    gap = np.asarray(x) - mean
    _, log_det = np.linalg.slogdet(2 * np.pi * cov)
    return -0.5 * (gap @ np.linalg.solve(cov, gap) + log_det)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_gaussian_proposal_has_its_law_and_knows_its_density(x64, rank):
    made, mean, variance, centre, cov = proposal(3, rank)
    base, _ = place(made, jnp.zeros(D))
    np.testing.assert_allclose(base, centre, atol=1e-10)
    columns = np.stack([place(made, row)[0] - centre for row in jnp.eye(D)], 1)
    np.testing.assert_allclose(columns @ columns.T, cov, atol=1e-9)
    x, log_ratio = place(made, jax.random.normal(jax.random.key(0), (D,)))
    exact = log_normal(x, mean, np.diag(variance)) - log_normal(x, centre, cov)
    assert log_ratio == pytest.approx(exact, abs=1e-9)


def test_a_common_precision_adds_to_the_others(x64):
    """P for all particles, given by N with N Nᵀ = (I + v P)⁻¹ at a variance v of every entry."""
    rng, v = np.random.default_rng(6), 0.7
    shift, factors, root = rng.normal(size=D), rng.normal(size=(2, D)), rng.normal(size=(D, D))
    precision = root @ root.T
    matrix = np.linalg.cholesky(np.linalg.inv(np.eye(D) + v * precision))
    parts = np.zeros(D), np.full(D, v), shift, np.zeros(D), factors, 0.0
    made = GaussianProposal(*map(jnp.asarray, parts))
    common = jnp.asarray(matrix), jnp.log(jnp.abs(jnp.diag(jnp.asarray(matrix)))).sum()
    cov = np.linalg.inv(np.eye(D) / v + precision + factors.T @ factors)
    columns = np.stack([place(made, row, common)[0] - shift for row in jnp.eye(D)], 1)
    np.testing.assert_allclose(columns @ columns.T, cov, atol=1e-9)
    x, log_ratio = place(made, jax.random.normal(jax.random.key(0), (D,)), common)
    exact = log_normal(x, np.zeros(D), v * np.eye(D)) - log_normal(x, shift, cov)
    assert log_ratio == pytest.approx(exact, abs=1e-9)


def test_pinned_entries_are_set_exactly_and_do_not_count(x64):
    made, _, _, centre, _ = proposal(4, 2, pinned=True)
    z = jax.random.normal(jax.random.key(1), (D,))
    x, log_ratio = place(made, z)
    assert x[0] == centre[0]
    free = GaussianProposal(*(a[..., 1:] for a in made[:5]), made.pinned)
    y, other = place(free, z[1:])
    np.testing.assert_allclose(x[1:], y, atol=1e-12)
    assert log_ratio == pytest.approx(float(other), abs=1e-12)


def test_all_particles_are_placed_as_each_alone(x64, key):
    """Drawn together, of one key, with and without what is common to them."""
    alone = [proposal(seed, 2)[0] for seed in range(3)]
    together = jax.tree.map(lambda *a: jnp.stack(a), *alone)
    z = jax.random.normal(key, (3, D))
    for common in (None, (0.5 * jnp.eye(D), D * jnp.log(0.5))):
        found = together.draw(key, common)
        for i, made in enumerate(alone):
            x, log_ratio = place(made, z[i], common)
            np.testing.assert_allclose(found[0][i], x, rtol=1e-12)
            assert found[1][i] == pytest.approx(float(log_ratio), rel=1e-12)


def test_proposal_of_a_twist_that_changes_nothing_weighs_exactly_one(key):
    zeros = jnp.zeros((100, D))
    made = GaussianProposal(zeros, 1 + zeros, zeros, zeros, jnp.zeros((100, 0, D)), jnp.zeros(100))
    assert (made.draw(key, None)[1] == 0).all()


@pytest.mark.parametrize("n", [2, 7, 39])
def test_fewer_levels_are_longer_steps_of_the_same_diffusion(x64, n):
    full = standard_diffusion((2,), T=40).bind({})
    few = full.respaced(n)
    assert few.times[0] == 1 and few.times[-1] == full.n and few.n == n
    kept = 1 - np.asarray(full.steps.beta)
    products = [kept[a:b].prod() for a, b in itertools.pairwise([0, *few.times])]
    np.testing.assert_allclose(1 - np.asarray(few.steps.beta), products, atol=1e-10)
    np.testing.assert_allclose(few.steps.alpha_bar_t[:-1], few.steps.alpha_bar_s[1:], atol=0)


def test_a_sharp_quadratic_keeps_its_digits():
    """In float32, A ten million times the identity that it is added to."""
    rng = np.random.default_rng(5)
    axes, _ = np.linalg.qr(rng.normal(size=(D, D)))
    variance, row = np.geomspace(1, 500, D), rng.normal(size=D) / 1e-2
    root = axes * np.sqrt(variance)
    a = root.T @ np.outer(row, row) @ root
    g = 30.0 * root.T @ row  # 30 standard deviations of the noise away
    belief = spread.Belief(*(jnp.asarray(v, jnp.float32) for v in (axes, variance, np.ones(D))))
    given = spread.condition(belief, jnp.asarray(np.outer(row, row), jnp.float32), None)
    exact = g / (1 + np.trace(a))
    found = spread.pulled(given, jnp.asarray(g, jnp.float32))
    np.testing.assert_allclose(found, exact, atol=1e-4 * np.linalg.norm(exact))
    assert given.log_det == pytest.approx(np.log1p(np.trace(a)), abs=1e-4)
    precision = np.linalg.inv(root).T @ (a / (1 + np.trace(a))) @ np.linalg.inv(root)
    np.testing.assert_allclose(given.precision, precision, atol=1e-4)
