"""Numbers on a grid: masses of cells against quadrature, and p(x_0) of exact diffusions."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from flax import nnx
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, Predictive
from scipy.special import log_ndtr, ndtr

import probdiff
from oracles import gaussian_network, log_normal
from probdiff import Diffusion, GaussianKernel, diagnostics, infer, networks, readouts, schedules
from probdiff.readouts import Discretised, Grid
from probdiff.readouts.grid import log_mass_within

pytestmark = pytest.mark.filterwarnings("ignore::probdiff.diagnostics.LadderWarning")
GRID = Discretised(0, 16, 17)
NARROW, WIDE = np.array([6.3, 9.0]), np.array([1.7, 2.5])
"""Mean and standard deviation of data, the user's units: some cells hold little, some much."""


def gridded(last_step=GRID, mean=NARROW, sd=WIDE, beta_1=0.2, loc=8.0, scale=2.5):
    """Exact reverse trajectory of N(mean, sd²) in the user's units, put on a grid at the end.

    As x_1 is exact, p(x_0) is N(mean, sd²) put on the grid. It is not the diffusion of gridded
    data: its x_1 does not know of the grid, so forward noise must fill a cell for weights to be
    even.
    """
    mean, sd = (np.asarray(mean) - loc) / scale, np.asarray(sd) / scale
    beta = schedules.log_snr_linear(12, beta_1=beta_1, alpha_bar_T=1e-24)
    return Diffusion(
        GaussianKernel(), beta, gaussian_network(mean, sd, beta), event_shape=np.shape(mean),
        readout=readouts.Data(), last_step=last_step, loc=loc, scale=scale,
    )  # fmt: skip


def log_cells(mean=NARROW, sd=WIDE, grid=GRID.grid):
    """log P of every value, `(levels, *event)`."""
    values = grid.values.reshape(-1, *[1] * np.ndim(mean))
    upper, lower = ((values + s * grid.spacing / 2 - mean) / sd for s in (1, -1))
    upper[-1], lower[0] = np.inf, -np.inf
    return np.log(ndtr(upper) - ndtr(lower))


def on_grid(n, seed=0, mean=NARROW, sd=WIDE):
    x = mean + sd * np.random.default_rng(seed).standard_normal((n, *np.shape(mean)))
    return np.asarray(np.clip(np.round(x), 0, 16), np.float32)


def log_p(x, **options):
    """Sum of log P over the entries of whole numbers."""
    cells = log_cells(**options)
    return sum(cells[x[:, i].astype(int), i] for i in range(x.shape[1]))


# masses

X, W = np.polynomial.legendre.leggauss(400)


def by_quadrature(c, h):
    """log(Φ(c + h) − Φ(c − h)) by Gauss's rule on the cell, scaled by the largest value on it."""
    near, far = np.abs(c) - h, np.abs(c) + h
    top = max(near, 0.0)
    near, far = max(near, -12.0), min(far, top + 12.0)
    u = near + (far - near) * (X + 1) / 2
    terms = W * np.exp(-0.5 * (u - top) * (u + top))
    return -0.5 * top**2 - 0.5 * np.log(2 * np.pi) + np.log((far - near) / 2 * terms.sum())


def cells_to_try():
    rng = np.random.default_rng(0)
    c = np.concatenate([rng.uniform(-11.5, 11.5, 300), 0.1 * rng.standard_normal(100)])
    h = np.exp(rng.uniform(np.log(1e-6), np.log(20), 400))
    return c.astype(np.float32), h.astype(np.float32)


def test_masses_down_to_1e_30_have_all_their_digits():
    """float32, cells from 1e-6 to 40 standard deviations wide."""
    c, h = cells_to_try()
    exact = np.array([by_quadrature(*map(float, pair)) for pair in zip(c, h, strict=True)])
    assert exact.min() < -65  # 1e-30 is −69
    found = np.asarray(log_mass_within(jnp.asarray(c), jnp.asarray(h)), float)
    np.testing.assert_allclose(found, exact, rtol=5e-7, atol=5e-7)


def test_gradients_of_masses_are_the_densities_at_the_edges():
    c, h = cells_to_try()
    gradients = jax.vmap(jax.grad(log_mass_within, (0, 1)))(jnp.asarray(c), jnp.asarray(h))
    c, h = c.astype(float), h.astype(float)
    mass = np.array([by_quadrature(*pair) for pair in zip(c, h, strict=True)])
    above, below = (np.exp(log_normal(c + s * h, 0, 1) - mass) for s in (1, -1))
    by_c = np.where(np.abs(c) * h < 1e-3, -c * (1 - h**2 / 3), above - below)
    for found, exact in zip(gradients, (by_c, above + below), strict=True):
        np.testing.assert_allclose(found, exact, rtol=2e-5, atol=2e-5)


@pytest.mark.long
def test_masses_and_gradients_are_finite_however_far_out():
    c, h = (jnp.asarray(a, jnp.float32) for a in np.meshgrid([30.0, 1e3, 1e5, 1e7], [1e-6, 0.1, 9]))
    for value in (
        log_mass_within(c, h),
        *jax.grad(lambda *a: log_mass_within(*a).sum(), (0, 1))(c, h),
    ):
        assert np.isfinite(value).all()
    slope = jax.grad(lambda c, h: log_mass_within(c, h).sum())(c[:, :2], h[:, :2])
    np.testing.assert_allclose(slope, -c[:, :2] + jnp.where(c * h > 1, h, 0)[:, :2], rtol=0.05)


@pytest.mark.parametrize("sd", [1e-3, 0.3, 1.0, 40.0, 1e4])
@pytest.mark.parametrize(("low", "high", "levels"), [(0, 255, 256), (-1, 1, 2), (-3, 0.5, 15)])
@pytest.mark.long
def test_masses_of_all_values_sum_to_one(x64, low, high, levels, sd):
    grid = Grid(low, high, levels)
    mean = np.linspace(2 * low - high, 2 * high - low, 41)
    total = jax.nn.logsumexp(grid.log_mass(jnp.asarray(grid.values)[:, None], mean, sd), 0)
    np.testing.assert_allclose(total, 0, atol=1e-11)


def test_open_cells_hold_all_that_is_outside(x64):
    grid, mean = Grid(0, 16, 17), np.array([-30.0, 0.2, 16.0, 45.0])
    low, high = (grid.log_mass(jnp.full(4, k), mean, 2.0) for k in (0.0, 16.0))
    np.testing.assert_allclose(low, log_ndtr((0.5 - mean) / 2), rtol=1e-8, atol=1e-30)
    np.testing.assert_allclose(high, log_ndtr((mean - 15.5) / 2), rtol=1e-8, atol=1e-30)


@pytest.mark.long
def test_draws_have_the_masses_of_their_cells(key):
    """40,000 draws of two entries at once; each share within 4.5 standard errors."""
    n, diffusion = 40_000, gridded()
    law = diffusion.bind({}).data(jnp.array([[-0.4, 0.3]]))
    x = np.asarray(law.sample(key, (n,)))[:, 0]
    pairs = np.stack(np.meshgrid(np.arange(17.0), np.arange(17.0), indexing="ij"), -1)
    p = np.exp(np.asarray(law.log_prob(jnp.asarray(pairs, jnp.float32)[:, :, None])))[..., 0]
    share = np.zeros((17, 17))
    np.add.at(share, tuple(x.astype(int).T), 1 / n)
    assert abs(p.sum() - 1) < 1e-5
    assert (np.abs(share - p) <= 4.5 * np.sqrt(p * (1 - p) / n) + 1e-6).all()


def test_values_of_the_grid_come_back_bit_for_bit():
    for grid in (Grid(0, 255, 256), Grid(0, 1, 256), Grid(-1, 1, 65_536)):
        values = grid.values.astype(np.float32)
        np.testing.assert_array_equal(grid.nearest(values), values)
        np.testing.assert_array_equal(jax.jit(grid.nearest)(values + 0.4 * grid.spacing), values)
        assert grid(values).all() and not grid(values + 0.1 * grid.spacing).any()
    assert float(Grid(0, 16, 17).log_mass(jnp.array(3.5), 3.0, 1.0)) == -np.inf


# the exact diffusion


@pytest.mark.long
def test_importance_weighting_finds_the_mass_of_every_value():
    """One number; and so the masses of the model sum to 1."""
    mean, sd = np.array([0.6]), np.array([0.9])
    last = Discretised(-1, 3, 5)
    diffusion = gridded(last, mean, sd, loc=0.3, scale=1.1)
    x = last.grid.values[:, None].astype(np.float32)
    g = diagnostics.ladder(
        jax.random.key(0), diffusion, {}, x, sizes=(1, 1000), num_repeats=40, num_draws=10
    )["ladder"]
    p = np.exp(g["importance"][:, -1].values)
    se = p * g["importance_se"][:, -1].values
    exact = np.exp(log_cells(mean, sd, last.grid))[:, 0]
    assert (np.abs(p - exact) < 4 * se + 1e-5).all()
    assert abs(p.sum() - 1) < 4 * np.sqrt((se**2).sum()) + 1e-5
    assert se.max() < 0.01


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:x_0 is 4.663 in 22% of the examples")
def test_bound_with_fine_cells_is_that_of_the_density_times_their_width():
    last = Discretised(0, 16, 16_001)
    x = np.asarray(np.clip(on_grid(200) - 0.337, 0.1, 15.9), np.float32)
    fine = diagnostics.bound(jax.random.key(0), gridded(last), {}, x, num_draws=4)["bound"]
    smooth = diagnostics.bound(
        jax.random.key(0), gridded(readouts.Learned()), {}, x, num_draws=4
    )["bound"]  # fmt: skip
    np.testing.assert_allclose(fine["kl"], smooth["kl"])
    np.testing.assert_allclose(
        fine["reconstruction"], smooth["reconstruction"] + 2 * np.log(1e-3), atol=2e-3
    )
    assert smooth.attrs["reference_measure"] == "Lebesgue, in the user's units"


def test_bound_is_of_a_probability_and_has_bits():
    x = on_grid(400)
    tree = diagnostics.bound(jax.random.key(0), gridded(), {}, x, num_draws=20)
    attrs = tree["bound"].attrs
    assert (attrs["reference_measure"], attrs["num_dims"]) == ("counting", 2)
    bits = diagnostics.bits_per_dim(tree)
    exact = log_p(x)
    gap = exact - tree["bound"]["bound"].values
    assert bits.mean == pytest.approx(-attrs["mean"] / 2 / np.log(2))
    assert gap.mean() > -3 * gap.std() / 20
    some = diagnostics.sampled_bound(jax.random.key(1), gridded(), {}, x, num_times=10)["bound"]
    paired = some["bound"].values - tree["bound"]["bound"].values
    assert abs(paired.mean()) < 4 * paired.std() / 20
    assert some.attrs["reference_measure"] == "counting"


@pytest.mark.long
def test_units_of_the_diffusion_do_not_enter():
    """Other loc and scale, the same masses: no Jacobian."""
    x = on_grid(20)
    found = []
    for loc, scale in ((8.0, 2.5), (np.array([6.0, 9.5]), np.array([2.0, 3.0]))):
        g = diagnostics.ladder(
            jax.random.key(0), gridded(loc=loc, scale=scale), {}, x, sizes=(1, 100), num_repeats=2,
            num_draws=2,
        )["ladder"]  # fmt: skip
        found.append(g["importance"][:, -1].values)
    for values in found:
        gap = values - log_p(x)
        assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(20) + 5e-3


@pytest.mark.long
def test_bounds_from_both_sides_close_in_on_draws_of_the_grid():
    tree = diagnostics.sandwich(
        jax.random.key(1), gridded(beta_1=0.05), {}, 200, sizes=(1, 10, 100), num_repeats=2
    )
    x, g = tree["draws"]["x_0"].values, tree["sandwich"]
    np.testing.assert_array_equal(x, np.clip(np.round(x), 0, 16))
    for name, sign in (("lower", 1), ("upper", -1)):
        gap = sign * (g[name].values - log_p(x)[:, None])
        assert (gap.mean(0) < 3 * gap.std(0, ddof=1) / np.sqrt(200) + 1e-4).all()
    assert (np.diff(g["gap_mean"]) < 0).all()
    assert 0 < float(g["gap_mean"][-1]) < 0.05


def test_missing_entries_do_not_count():
    x, mask = on_grid(30), np.array([[True, False]] * 30)
    holes = np.where(mask, x, np.nan).astype(np.float32)
    tree = diagnostics.bound(jax.random.key(0), gridded(), {}, holes, mask=mask, num_draws=50)
    alone = gridded(mean=NARROW[:1], sd=WIDE[:1])
    other = diagnostics.bound(jax.random.key(1), alone, {}, x[:, :1], num_draws=50)
    gap = tree["bound"]["bound"].values - other["bound"]["bound"].values
    assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(30) + 1e-3
    assert diagnostics.bits_per_dim(tree).mean == pytest.approx(
        -tree["bound"].attrs["mean"] / np.log(2)
    )


# programs


def test_model_draws_and_observes_values_of_the_grid(key):
    diffusion = gridded()
    draws = Predictive(diffusion.model, params={}, num_samples=4_000)(key)["x_0"]
    np.testing.assert_array_equal(draws, np.clip(np.round(draws), 0, 16))
    cells = np.exp(log_cells())
    mean = (cells * np.arange(17)[:, None]).sum(0)
    sd = np.sqrt((cells * np.arange(17)[:, None] ** 2).sum(0) - mean**2)
    assert (np.abs(draws.mean(0) - mean) < 4 * sd / np.sqrt(4_000)).all()
    x = on_grid(3)
    sites = handlers.trace(handlers.seed(diffusion.model, key)).get_trace(x)
    np.testing.assert_array_equal(sites["x_0"]["value"], x)
    assert sites["x_0"]["value"] is x


@pytest.mark.long
def test_training_has_a_gradient_from_the_start():
    """float32, an untrained network on 256 grey levels: some values start 1e3 deviations away."""
    network = networks.Perceptron((4,), 8, 1, 10, rngs=nnx.Rngs(0))
    beta = schedules.log_snr_linear(10, beta_1=1e-6, alpha_bar_T=1e-3)
    diffusion = Diffusion(
        GaussianKernel(), beta, network, event_shape=(4,), last_step=Discretised(0, 255, 256),
        loc=127.5, scale=70.0,
    )  # fmt: skip
    params = jax.tree.map(lambda p: jnp.full(p.shape, 0.3), diffusion.params_template)
    x = jnp.asarray(np.random.default_rng(0).integers(0, 256, (64, 4)), jnp.float32)

    def loss(params):
        return probdiff.SampledTimeELBO().loss(
            jax.random.key(0), params, diffusion.model, diffusion.guide, x
        )

    value, gradient = jax.value_and_grad(loss)(params)
    leaves = jax.tree.leaves(gradient)
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in leaves)
    assert any(np.abs(leaf).max() > 0 for leaf in leaves)


# inference


def posterior(y, noise):
    """log Z and the probabilities of every value of each entry, given y ~ N(x_0, noise²)."""
    logs = log_cells() + log_normal(y, np.arange(17.0)[:, None], noise)
    log_z = np.logaddexp.reduce(logs, 0)
    return log_z, np.exp(logs - log_z)


@pytest.mark.long
def test_smc_finds_the_posterior_over_values_of_the_grid():
    """A likelihood as sharp as a cell: what counts is r at the values, not between them."""
    prior, y, noise = gridded().prior({}), np.array([5.4, 11.2], np.float32), 0.6

    def program():
        with numpyro.plate("rows", 2):
            x = prior()
            numpyro.sample("y", numpyro.distributions.Normal(x, noise).to_event(1), obs=y)

    smc = infer.SMC(program, num_particles=1024, num_runs=8)
    smc.run(jax.random.key(0))
    log_z, p = posterior(y, noise)
    assert (np.abs(smc.log_evidence - log_z.sum()) < 4 * smc.log_evidence_se + 0.01).all()
    x = smc.get_samples()["x_0"]
    np.testing.assert_array_equal(x, np.clip(np.round(x), 0, 16))
    share = (x[..., None] == np.arange(17)).mean(0)
    np.testing.assert_allclose(share, np.stack([p.T] * 2), atol=0.04)


@pytest.mark.long
@pytest.mark.parametrize(
    ("beta_1", "both"), [(0.2, (0, 16)), (0.002, (4, 12))], ids=["wide step", "step within a cell"]
)
def test_evidence_of_known_values_is_their_mass(beta_1, both):
    prior = gridded(beta_1=beta_1).prior({}, variance=(WIDE / 2.5) ** 2)
    known = np.array([[9.0, np.nan], both, [7.0, 9.0]], np.float32)
    mask = np.array([[True, False], [True, True], [False, False]])

    def program():
        with numpyro.plate("rows", 3):
            prior(known=known, mask=mask)

    smc = infer.SMC(program, num_particles=512, num_runs=8)
    smc.run(jax.random.key(1))
    cells = log_cells()
    exact = np.array([cells[9, 0], cells[both[0], 0] + cells[both[1], 1], 0.0])
    assert (np.abs(smc.log_evidence - exact) < 4 * smc.log_evidence_se + 0.01).all()
    assert smc.log_evidence_se.max() < 0.2
    x = smc.get_samples()["x_0"]
    np.testing.assert_array_equal(x[:, mask], np.broadcast_to(known[mask], (len(x), 3)))
    np.testing.assert_array_equal(x, np.clip(np.round(x), 0, 16))
    mean = (np.exp(cells) * np.arange(17)[:, None]).sum(0)
    for row, entry in ((0, 1), (2, 0), (2, 1)):
        assert abs(x[:, row, entry].mean() - mean[entry]) < 0.2


def test_nuts_is_refused_since_a_grid_has_no_slope():
    prior = gridded().prior({})
    with pytest.raises(ValueError, match=r"got numbers on a grid.*Use infer\.SMC"):
        MCMC(NUTS(infer.noncentered(prior)), num_warmup=1, num_samples=1).run(jax.random.key(0))


BAD_DATA = {
    "half way": np.array([[3.5, 2.0]], np.float32),
    "above": np.array([[3.0, 17.0]], np.float32),
    "dequantised": np.array([[3.02, 4.1]], np.float32),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_values_off_the_grid_are_refused_by_name(kind):
    x, diffusion = BAD_DATA[kind], gridded()
    message = "x_0 must lie on the grid of 17 values from 0 to 16; got . values that do not, such"
    with pytest.raises(ValueError, match=message):
        diffusion.check_data(x)
    with pytest.raises(ValueError, match=message):
        diagnostics.bound(jax.random.key(0), diffusion, {}, x)
    with pytest.raises(ValueError, match="known must lie on the grid"):
        diffusion.prior({})(known=x[0], mask=np.ones(2, bool))
    diffusion.check_data(
        np.where([[True, False]], 3, x).astype(np.float32), np.array([[True, False]])
    )


def test_whole_numbers_of_another_type_are_refused_not_cast():
    with pytest.raises(ValueError, match="x_0 must be of a floating dtype; got uint8"):
        gridded().check_data(np.array([[3, 4]], np.uint8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Discretised(3, 3, 2), "low < high; got 3 and 3"),
        (lambda: Discretised(0, np.inf, 2), "high must be finite; got inf"),
        (lambda: Discretised(0, 1, 1), "levels must be at least 2; got 1"),
        (lambda: Discretised(0, 1, 2.5), "levels must be an integer of at least 2; got 2.5"),
        (lambda: Discretised(0, 1, 2**20), "float32 would not tell them"),
        (
            lambda: Diffusion(
                probdiff.BernoulliKernel(), schedules.harmonic(4), lambda x, t: x * 1.0,
                event_shape=(2,), last_step=GRID,
            ),
            r"last_step must be Tied\(\) or Learned\(\) for symbols",
        ),
    ],
)  # fmt: skip
def test_what_is_no_grid_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_saved_model_keeps_its_grid(tmp_path):
    network = networks.RadialBasis((2,), 4, 5, rngs=nnx.Rngs(0))
    beta = schedules.log_snr_linear(5, beta_1=1e-3, alpha_bar_T=0.01)
    diffusion = Diffusion(
        GaussianKernel(), beta, network, event_shape=(2,), loc=1 / 3, scale=0.7,
        last_step=Discretised(np.float32(-1), 1, np.int64(256)),
    )  # fmt: skip
    params = jax.tree.map(lambda p: jnp.full(p.shape, 0.3), diffusion.params_template)
    probdiff.save(tmp_path, diffusion, params)
    loaded, again = probdiff.load(tmp_path)
    assert loaded.last_step == Discretised(-1.0, 1.0, 256)
    reverses = diffusion.bind(params), loaded.bind(again)
    assert reverses[0].support == reverses[1].support == Grid(-1.0, 1.0, 256)
    laws = [reverse.data(jnp.array([0.3, -0.2])) for reverse in reverses]
    x = jnp.asarray(diffusion.last_step.grid.values[[70, 140]], jnp.float32)
    np.testing.assert_array_equal(*(law.log_prob(x) for law in laws))


# a grid for some entries, none for the others

MIXED = Discretised([0, 0], [16, 0], [17, 0])


def mixed_rows(n, seed=0):
    x = NARROW + WIDE * np.random.default_rng(seed).standard_normal((n, 2))
    x[:, 0] = np.clip(np.round(x[:, 0]), 0, 16)
    return x.astype(np.float32)


def mixed_log_p(x):
    return log_cells()[x[:, 0].astype(int), 0] + log_normal(x[:, 1], NARROW[1], WIDE[1])


def test_grids_by_entry_are_those_of_all_entries(x64):
    one, two = Grid(0, 16, 17), Grid([0, -3.0], [16, 0.5], [17, 15])
    x, sd = np.stack(np.meshgrid(np.arange(17.0), [1.0, 2.0]), -1), np.array([1.7, 0.3])
    x[..., 1] = Grid(-3, 0.5, 15).nearest(x[..., 1] - 2)
    apart = [g.log_mass(x[..., i], 0.3, sd[i]) for i, g in enumerate((one, Grid(-3, 0.5, 15)))]
    np.testing.assert_allclose(two.log_mass(x, 0.3, sd), np.stack(apart, -1), rtol=1e-9)
    np.testing.assert_allclose(two.nearest_in_float64(x + 0.1), x, atol=1e-12)
    assert two(x).all() and hash(two) == hash(Grid([0, -3.0], [16, 0.5], [17, 15])) != hash(one)
    assert two == Grid([0, -3.0], [16, 0.5], [17, 15]) != Grid([0, -3.0], [16, 0.5], [17, 29])


@pytest.mark.long
def test_bound_and_ladder_of_mixed_entries_find_mass_and_density():
    x, exact = mixed_rows(200), mixed_log_p(mixed_rows(200))
    tree = diagnostics.ladder(
        jax.random.key(0), gridded(MIXED), {}, x, sizes=(1, 300), num_repeats=8, num_draws=10
    )["ladder"]
    gap = tree["importance"][:, -1].values - exact
    assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(200) + 2e-3 and gap.std() < 0.15
    k = diagnostics.bound(jax.random.key(0), gridded(MIXED), {}, x, num_draws=10)["bound"]
    assert k.attrs["reference_measure"] == "counting at entries 0, elsewhere Lebesgue, in the " + (
        "user's units"
    )
    assert -0.2 < (k["bound"].values - exact).mean() < 4 * np.std(k["bound"].values - exact) / 14
    with pytest.raises(ValueError, match="must bound probabilities"):
        diagnostics.bits_per_dim(xr.DataTree.from_dict({"bound": k.to_dataset()}))


@pytest.mark.long
@pytest.mark.parametrize("known", [0, 1])
def test_evidence_of_a_known_entry_is_its_mass_or_density(key, known):
    """And the other, observed with noise, has its exact posterior: 4 runs of 1,000 particles."""
    value, noisy, sigma = np.array([5.0, 10.2]), 1 - known, 1.5
    prior, y = gridded(MIXED).prior({}), np.array([8.0, 11.0])[noisy]

    def program():
        x = prior(known=jnp.asarray(value, jnp.float32), mask=np.arange(2) == known)
        numpyro.sample("y", dist.Normal(x[noisy], sigma), obs=y)

    smc = infer.SMC(program, num_particles=1000, num_runs=4)
    smc.run(key)
    x = smc.get_samples()["x_0"]
    assert (x[:, known] == np.float32(value[known])).all()
    k = np.arange(17.0)
    if known == 0:
        seen = log_cells()[5, 0]
        var = 1 / (1 / WIDE[1] ** 2 + 1 / sigma**2)
        mean = var * (NARROW[1] / WIDE[1] ** 2 + y / sigma**2)
        exact = seen + log_normal(y, NARROW[1], np.hypot(WIDE[1], sigma))
    else:
        joint = np.exp(log_cells()[:, 0] + log_normal(y, k, sigma))
        mean = (joint * k).sum() / joint.sum()
        exact = log_normal(10.2, NARROW[1], WIDE[1]) + np.log(joint.sum())
        assert set(np.unique(x[:, 0])) <= set(k)
    assert abs(smc.log_evidence - exact) < 4 * smc.log_evidence_se + 0.01
    assert abs(x[:, noisy].mean() - mean) < 0.12  # sd 1.1 to 1.3, and some 800 effective draws


def test_a_mixed_diffusion_is_saved_and_refused_by_name_where_it_must(tmp_path):
    network = networks.RadialBasis((2,), width=4, T=4, rngs=nnx.Rngs(0))
    diffusion = Diffusion(
        GaussianKernel(), schedules.harmonic(4), network, event_shape=(2,), last_step=MIXED
    )
    params = {"x_0_network$params": nnx.to_pure_dict(nnx.state(network))}
    probdiff.save(tmp_path / "mixed", diffusion, params)
    again, _ = probdiff.load(tmp_path / "mixed")
    assert again.last_step == MIXED and hash(again.last_step) == hash(MIXED)
    prior = gridded(MIXED).prior({})
    with pytest.raises(ValueError, match=r"numbers that are smooth.*Discretised\(low=\(0.0, 0.0\)"):
        handlers.seed(infer.noncentered(lambda: prior()), 0)()
    with pytest.raises(ValueError, match=r"x_0 must lie on the grid.*such as 0\.5 at entry 0"):
        diagnostics.bound(jax.random.key(0), gridded(MIXED), {}, np.full((3, 2), 0.5, np.float32))
    with pytest.raises(ValueError, match=r"broadcastable to event_shape \(2,\); got shape \(3,\)"):
        gridded(Discretised(0, 1, [2, 2, 0]))
    with pytest.raises(ValueError, match="levels must not be 0 throughout"):
        Discretised(0, 1, [0, 0])
    with pytest.raises(ValueError, match="levels must be integers of at least 2, or 0"):
        Discretised(0, 1, [0, 1])


@pytest.mark.long
def test_a_large_loc_of_a_mixed_entry_costs_no_digits(key):
    """2459000 + 0.1 N(0, 1) beside a class: 1,000 draws, and K as without the offset."""
    off, options = np.array([0.0, 2459000.0]), {"scale": np.array([0.5, 0.1])}
    last = Discretised([0, 0], [1, 0], [2, 0])
    x = np.stack([np.arange(200) % 2, 0.1 * np.random.default_rng(0).standard_normal(200)], 1)
    made = {
        loc: probdiff.standard_diffusion(
            (2,), T=8, last_step=last, loc=np.array([0.5, loc]), **options
        )
        for loc in off
    }
    k = [
        diagnostics.bound(key, made[loc], {}, x + np.array([0, loc]), num_draws=4)["bound"]
        for loc in off
    ]
    np.testing.assert_allclose(k[0]["bound"], k[1]["bound"], atol=1e-3)
    draws = probdiff.sample.ancestral(key, made[off[1]], {}, 1000)
    assert len(np.unique(draws[:, 1])) >= 990 and set(draws[:, 0]) == {0.0, 1.0}
    with pytest.warns(UserWarning, match="held too coarsely.*column 1"):
        handlers.seed(made[off[1]].prior({}), 0)()
