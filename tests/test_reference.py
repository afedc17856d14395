"""The reference against itself, written two ways, and against numbers known beforehand."""

import numpy as np
import pytest
from scipy import integrate

import reference

LOG_2 = np.log(2)
LINEAR = np.linspace(0.01, 0.3, 8)
SCHEDULES = {"harmonic": reference.harmonic(8), "linear": LINEAR, "constant": np.full(5, 0.2)}


def correlated(rho):
    return np.array([[1.0, rho], [rho, 1.0]])


def diagonal_reverse(trajectory):
    """A diffusion's kernels as the function that single trajectories are scored with."""
    return lambda x_t, t: (trajectory.A[t - 1] @ x_t, np.diag(trajectory.covariance[t - 1]))


def draw_trajectory(rng, C, beta):
    trajectory = [rng.multivariate_normal(np.zeros(len(C)), C)]
    for t in range(1, len(beta) + 1):
        mean, variance = reference.transition(trajectory[-1], beta, t)
        trajectory.append(mean + np.sqrt(variance) * rng.normal(size=len(C)))
    return np.array(trajectory)


@pytest.mark.parametrize("T", [10, 40])
def test_harmonic_erases_the_same_share_each_step(T):
    steps = np.arange(1, T + 1)
    np.testing.assert_allclose(
        reference.alpha_bar(reference.harmonic(T)), 1 - steps / T, atol=1e-14
    )


@pytest.mark.parametrize("beta", SCHEDULES.values(), ids=SCHEDULES)
def test_marginal_has_its_closed_form(beta):
    for t, share in enumerate(reference.alpha_bar(beta), start=1):
        mean, variance = reference.marginal(1.7, beta, t)
        np.testing.assert_allclose([mean, variance], [np.sqrt(share) * 1.7, 1 - share], rtol=1e-12)


def test_bridge_and_marginal_give_the_joint():
    """q(x_s | x_t, x_0) q(x_t | x_0) = q(x_t | x_s) q(x_s | x_0)."""
    x_0, x_s, x_t = 0.4, -1.1, 0.8
    for t in range(2, len(LINEAR) + 1):
        left = reference.log_normal(x_s, *reference.bridge(x_t, x_0, LINEAR, t))
        left += reference.log_normal(x_t, *reference.marginal(x_0, LINEAR, t))
        right = reference.log_normal(x_t, *reference.transition(x_s, LINEAR, t))
        right += reference.log_normal(x_s, *reference.marginal(x_0, LINEAR, t - 1))
        np.testing.assert_allclose(left, right, rtol=1e-12)


def test_kl_and_entropy_are_the_integrals():
    q, p = (0.3, 0.5), (-0.2, 1.4)

    def density(x):
        return np.exp(reference.log_normal(x, *q))

    def kl(x):
        return density(x) * (reference.log_normal(x, *q) - reference.log_normal(x, *p))

    def entropy(x):
        return -density(x) * reference.log_normal(x, *q)

    for integrand, value in [
        (kl, reference.kl_normal(*q, *p)),
        (entropy, reference.entropy_normal(q[1])),
    ]:
        np.testing.assert_allclose(integrate.quad(integrand, -12, 12)[0], value, rtol=1e-8)


@pytest.mark.parametrize("beta", SCHEDULES.values(), ids=SCHEDULES)
def test_standard_normal_data_are_kept_by_the_forward_kernel(beta):
    """K = −½ log2 2πe = −2.0471 bits per dimension; the KLs are ½ log2((1 − ᾱ_T)/β_1)."""
    reverse = reference.optimal_reverse_trajectory(np.eye(1), beta, diagonal=True)
    for t in range(1, len(beta) + 1):
        np.testing.assert_allclose(reverse.A[t - 1], [[np.sqrt(1 - beta[t - 1])]], rtol=1e-12)
        np.testing.assert_allclose(reverse.covariance[t - 1], [[beta[t - 1]]], rtol=1e-12)
    bound = reference.bound_eq12_gaussian_data(np.eye(1), beta, reverse) / LOG_2
    assert bound == pytest.approx(-2.0471, abs=5e-5)
    kl = reference.entropies_eq14(beta) / LOG_2 - bound
    expected = 0.5 * np.log2((1 - reference.alpha_bar(beta)[-1]) / beta[0])
    assert kl == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("rho", "T", "diagonal_bits", "full_bits"),
    [
        (0.5, 10, -3.9499, -3.9310),
        (0.5, 40, -3.9037, -3.8984),
        (0.5, 100, -3.8936, -3.8914),
        (0.5, 1000, -3.8874, -3.8872),
        (0.9, 10, -3.4363, -3.3242),
        (0.9, 40, -3.0760, -3.0340),
        (0.9, 100, -2.9736, -2.9550),
        (0.9, 1000, -2.9043, -2.9023),
    ],
)
def test_optimal_bound_on_correlated_data(rho, T, diagonal_bits, full_bits):
    C, beta = correlated(rho), reference.harmonic(T)
    for diagonal, bits in [(True, diagonal_bits), (False, full_bits)]:
        reverse = reference.optimal_reverse_trajectory(C, beta, diagonal=diagonal)
        bound = reference.bound_eq12_gaussian_data(C, beta, reverse)
        assert bound / LOG_2 == pytest.approx(bits, abs=1e-4)
    assert bound == pytest.approx(reference.log_density_ceiling(C, beta), abs=1e-10)


@pytest.mark.parametrize("beta", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("scale", [1.0, 1.5])
@pytest.mark.parametrize("diagonal", [True, False])
def test_entropy_form_needs_its_correction(beta, scale, diagonal):
    """Eq. 14 is eq. 12 once corrected, also for kernels that are not the best ones."""
    C = scale * correlated(0.7)
    reverse = reference.optimal_reverse_trajectory(C, beta, diagonal=diagonal)
    reverse = reverse._replace(A=0.9 * reverse.A, covariance=1.2 * reverse.covariance)
    tied = reference.optimal_reverse_trajectory(C, beta, diagonal=diagonal)
    reverse.A[0], reverse.covariance[0] = tied.A[0], tied.covariance[0]
    exact = reference.bound_eq12_gaussian_data(C, beta, reverse)
    entropy_form = reference.bound_eq14_gaussian_data(C, beta, reverse)
    correction = reference.correction_eq14(scale, beta, d=2)
    assert entropy_form + correction == pytest.approx(exact, abs=1e-10)
    assert (abs(correction) > 1e-2) == (scale != 1)


@pytest.mark.parametrize("diagonal", [True, False])
def test_no_other_kernels_do_better(diagonal):
    C, beta = correlated(0.9), reference.harmonic(10)
    best = reference.optimal_reverse_trajectory(C, beta, diagonal=diagonal)
    at_best = reference.bound_eq12_gaussian_data(C, beta, best)
    for factor in (0.99, 1.01):
        for other in (best._replace(A=factor * best.A), best._replace(covariance=factor * best[1])):
            assert reference.bound_eq12_gaussian_data(C, beta, other) < at_best


def test_trajectories_average_to_the_exact_bounds():
    """Eqs. 12 and 14 of single draws against their expectations, within 4 standard errors."""
    C, n = 1.3 * correlated(0.8), 2_000
    best = reference.optimal_reverse_trajectory(C, LINEAR, diagonal=True)
    reverse = diagonal_reverse(best)
    rng = np.random.default_rng(0)
    trajectories = [draw_trajectory(rng, C, LINEAR) for _ in range(n)]
    for draws, exact in [
        (
            [reference.log_ratio(x, LINEAR, reverse) for x in trajectories],
            reference.bound_eq12_gaussian_data(C, LINEAR, best),
        ),
        (
            [reference.bound_eq14(x[0], x, LINEAR, reverse) for x in trajectories],
            reference.bound_eq14_gaussian_data(C, LINEAR, best),
        ),
    ]:
        assert abs(np.mean(draws) - exact) < 4 * np.std(draws) / np.sqrt(n)


@pytest.mark.parametrize("beta", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.99])
def test_reverse_entropy_lies_between_its_bounds(beta, rho):
    lower, upper = reference.entropy_bounds(beta)
    entropy = reference.reverse_entropy_gaussian_data(correlated(rho), beta)
    assert np.all(lower <= entropy + 1e-12)
    assert np.all(entropy <= upper + 1e-12)
    if rho == 0:
        np.testing.assert_allclose(entropy, upper, atol=1e-12)


def test_entropy_bounds_are_those_of_the_two_fixed_variances():
    """β_t above and the bridge's variance below."""
    lower, upper = reference.entropy_bounds(LINEAR)
    np.testing.assert_allclose(upper, reference.entropy_normal(LINEAR), rtol=1e-12)
    assert lower[0] == -np.inf
    for t in range(2, len(LINEAR) + 1):
        _, variance = reference.bridge(0.0, 0.0, LINEAR, t)
        assert lower[t - 1] == pytest.approx(reference.entropy_normal(variance), abs=1e-12)
