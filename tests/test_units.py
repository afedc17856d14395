"""Numbers far from 0 keep their digits, and arrays of any kind are read as what they say.

The oracle is `standard_diffusion` with loc and scale, N(loc, scale²) in the user's units: shifted
by any loc, densities, evidences and draws relative to loc are the same.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray as xr
from flax import nnx
from numpyro import handlers
from numpyro.infer import SVI, Predictive, Trace_ELBO
from scipy import stats

import probdiff
from probdiff import (
    BernoulliKernel,
    CombinedLoss,
    Diffusion,
    GaussianKernel,
    ImportanceTimes,
    SampledTimeELBO,
    cli,
    diagnostics,
    fit,
    infer,
    networks,
    readouts,
    sample,
    schedules,
    standard_diffusion,
    track_kl,
)

OFFSETS = [0.0, 1e6, 1e7, 1e8]
JULIAN = 2459000.25  # a day of 2020, which float32 rounds to a quarter


def normal(loc, scale=1.0, event_shape=(), **options):
    """N(loc, scale²)."""
    return standard_diffusion(event_shape, 4, loc=loc, scale=scale, **options)


def numbers(*shape, seed=0):
    """Such that x + 1e8 is exact in float64, and x in float32."""
    x = np.random.default_rng(seed).normal(size=shape)
    return np.round(x * 2**16) / 2**16


def with_long(names, *long):
    """Names as parameters, some of them for the long tests."""
    return [pytest.param(name, marks=[pytest.mark.long] if name in long else []) for name in names]


def mean_and_sd(draws, mean, sd):
    """Two-sided, within four standard errors."""
    n = len(draws)
    assert draws.dtype == np.float64
    np.testing.assert_array_less(np.abs(draws.mean(0) - mean), 4 * sd / np.sqrt(n))
    np.testing.assert_array_less(np.abs(draws.std(0) / sd - 1), 4 / np.sqrt(2 * n))


# Diagnostics and draws: the same at every offset.

DIAGNOSTICS = {
    "bound": lambda key, d, x: diagnostics.bound(key, d, {}, x, num_draws=2)["bound"]["bound"],
    "sampled_bound": lambda key, d, x: diagnostics.sampled_bound(key, d, {}, x)["bound"]["bound"],
    "ladder": lambda key, d, x: [
        diagnostics.ladder(key, d, {}, x, sizes=(1, 4), num_draws=2)["ladder"][name]
        for name in ("smc", "bound")
    ],
    "entropy_form": lambda key, d, x: np.concatenate(
        diagnostics.entropy_form(
            key, d, {}, x, diagnostics.bound(key, d, {}, x)["bound"]["kl"].values
        )
    ),
    "entropies": lambda key, d, x: (
        diagnostics.entropies(key, d, {}, x, diagnostics.bound(key, d, {}, x))["entropy"][
            "correction"
        ]
    ),
    "information": lambda key, d, x: diagnostics.information(
        key, d, {}, x, diagnostics.bound(key, d, {}, x), num_levels=2
    )["information"]["contrast"],
}  # fmt: skip


@pytest.mark.parametrize("name", with_long(DIAGNOSTICS, "ladder", "information"))
def test_diagnostics_do_not_depend_on_the_offset(key, name):
    """To 1e-3 nats for the same key, 20 examples; learned last step where there is a choice."""
    last_step = readouts.Tied() if name == "entropy_form" else readouts.Learned()
    x, offsets = numbers(20), OFFSETS if name == "bound" else OFFSETS[::3]
    values = [
        np.asarray(DIAGNOSTICS[name](key, normal(loc, last_step=last_step), x + loc))
        for loc in offsets
    ]
    for value in values[1:]:
        np.testing.assert_allclose(value, values[0], rtol=0, atol=1e-3)


def test_bound_is_the_density_in_every_column_of_a_table(key):
    """Columns of unequal scale and offset, some entries missing."""
    loc, scale = np.array([JULIAN, 1e8, 0.0]), np.array([0.1, 3.0, 1e-3])
    z = numbers(40, 3)
    x, mask = loc + scale * z, numbers(40, 3, seed=1) < 1
    x[~mask] = np.nan
    tree = diagnostics.bound(key, normal(loc, scale, (3,)), {}, x, mask=mask)
    near = diagnostics.bound(key, normal(0.0, scale, (3,)), {}, x - loc, mask=mask)
    np.testing.assert_allclose(tree["bound"]["bound"], near["bound"]["bound"], atol=1e-3)
    assert tree["bound"]["bound"].dtype == np.float64


def test_draws_far_from_zero_are_distinct_and_have_mean_and_sd(key):
    loc, scale = np.array([JULIAN, 1e8]), np.array([0.1, 2.0])
    draws = sample.ancestral(key, normal(loc, scale, (2,)), {}, 1000)
    assert [len(np.unique(column)) for column in draws.T] == [1000, 1000]
    mean_and_sd(draws - loc, 0.0, scale)


def test_draws_of_symbols_stay_ints_and_those_of_a_grid_lie_on_it(key):
    bits = sample.ancestral(key, standard_diffusion((3,), kernel=BernoulliKernel(0.5)), {}, 9)
    assert np.issubdtype(bits.dtype, np.integer)
    last_step = readouts.Discretised(0, 1, 256)
    draws = sample.ancestral(key, normal(0.5, 0.2, last_step=last_step), {}, 500)
    assert draws.dtype == np.float64 and np.isin(draws, np.linspace(0, 1, 256)).all()


def test_a_sandwich_and_replicates_keep_their_digits(key):
    diffusion = normal(JULIAN, 0.1)
    tree = diagnostics.sandwich(key, diffusion, {}, 100, sizes=(1, 4), num_repeats=1)
    x = tree["draws"]["x_0"].values
    mean_and_sd(x - JULIAN, 0.0, 0.1)
    exact = stats.norm.logpdf(x, JULIAN, 0.1)
    np.testing.assert_allclose(tree["sandwich"]["lower"][:, -1], exact, atol=1e-3)
    tree = diagnostics.predictive_check(key, diffusion, {}, x, num_replicates=20)
    assert len(np.unique(tree["posterior_predictive"]["x_0"])) == 2000
    assert tree["uniformity"]["x_0"] > 1e-3


def test_pits_of_a_grid_see_ties_whatever_the_float_type(key):
    """Of two values, f64(1/3) and 2/3; a tie counted as less would push all PITs to one side."""
    last_step = readouts.Discretised(1 / 3, 2 / 3, 2)
    diffusion = normal(0.5, 0.2, last_step=last_step)
    x = np.random.default_rng(0).choice([1 / 3, 2 / 3], 200)
    for given in (x, x.astype(np.float32)):
        tree = diagnostics.predictive_check(key, diffusion, {}, given, num_replicates=20)
        assert tree["uniformity"]["x_0"] > 1e-3


# Training.


def trainable(loc, scale=1.0, **options):
    """A network whose weights move."""
    network = networks.RadialBasis((), width=4, T=5, rngs=nnx.Rngs(0))
    beta = options.pop("beta", schedules.cosine(5))
    return Diffusion(
        GaussianKernel(), beta, network, event_shape=(), loc=loc, scale=scale, **options
    )


def losses_of(diffusion, x, loss=None, held_out=None, wrap=None, **options):
    """Losses of a few steps, and the evaluations."""
    guide = diffusion.guide if wrap is None else wrap(diffusion.guide)
    loss = SampledTimeELBO() if loss is None else loss
    svi = SVI(diffusion.model, guide, optax.adam(1e-2), loss)
    fitted = fit(
        jax.random.key(1), svi, x, num_steps=3, held_out=held_out, progress=False, **options
    )
    return fitted.losses / 16, np.asarray(fitted.held_out_losses.loss) / 64


LOSSES = {
    "elbo": {},
    "trace": {"loss": Trace_ELBO()},
    "combined": {"loss": CombinedLoss()},
    "tracked": {"loss": SampledTimeELBO(times=ImportanceTimes()), "wrap": track_kl},
}


@pytest.mark.parametrize("name", with_long(LOSSES, "trace", "combined"))
def test_training_does_not_depend_on_the_offset(name):
    """Losses per example, within 1e-3 nats, in minibatches and on held-out data."""
    x, options = numbers(64), {"batch_size": 16, **LOSSES[name]}
    near = losses_of(trainable(0.0), x, held_out=x, **options)
    far = losses_of(trainable(1e8), x + 1e8, held_out=x + 1e8, **options)
    np.testing.assert_allclose(far[0], near[0], atol=1e-3)
    np.testing.assert_allclose(far[1], near[1], atol=1e-3)


FORMS = {
    "tuple": lambda x, seen: (x,),
    "dict with a mask": lambda x, seen: {"x_0": x, "mask": seen},
    "iterator": lambda x, seen: iter([x] * 4),
    "iterator of dicts": lambda x, seen: iter([{"x_0": x, "mask": seen}] * 4),
}


@pytest.mark.parametrize("form", with_long(FORMS, "tuple", "iterator"))
def test_data_of_every_form_are_shifted(form):
    x = numbers(64)
    seen = numbers(64, seed=1) < 1
    near, _ = losses_of(trainable(0.0), FORMS[form](x, seen))
    far, _ = losses_of(trainable(1e8), FORMS[form](x + 1e8, seen))
    np.testing.assert_allclose(far, near, atol=1e-3)


def test_contexts_stay_as_they_are():
    def network(x_t, t, context):
        return jnp.stack([0 * x_t + context, 0 * x_t], -1)

    options = {"event_shape": (), "context_shape": (), "scale": 2.0}
    beta = schedules.learned(schedules.cosine(5))
    near, far = (
        Diffusion(GaussianKernel(), beta, network, loc=loc, **options) for loc in (0.0, 1e7)
    )
    x, context = 2 * numbers(64), numbers(64, seed=2)
    ours = losses_of(far, {"x_0": x + 1e7, "context": context})[0]
    np.testing.assert_allclose(ours, losses_of(near, {"x_0": x, "context": context})[0], atol=1e-3)


def test_a_run_far_from_zero_goes_on_and_knows_its_data(tmp_path):
    """Data that float32 does not tell apart are other data."""
    x, path = numbers(64) + 1e8, tmp_path / "run.safetensors"
    diffusion = trainable(1e8)
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-2), SampledTimeELBO())
    options = {"batch_size": 16, "progress": False}
    whole = fit(jax.random.key(0), svi, x, num_steps=4, **options)
    fit(jax.random.key(0), svi, x, num_steps=2, checkpoint=path, **options)
    again = fit(jax.random.key(0), svi, x, num_steps=4, checkpoint=path, **options)
    np.testing.assert_array_equal(again.losses, whole.losses)
    with pytest.raises(ValueError, match=r"checkpoint must be of this run; .* has data"):
        fit(jax.random.key(0), svi, x + 0.5, num_steps=6, checkpoint=path, **options)


def test_stock_svi_is_right_on_numpys_float64(key):
    """Its programs close over the data."""
    x, losses = numbers(64), []
    for loc in (0.0, 1e8):
        diffusion = trainable(loc)
        svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-2), SampledTimeELBO())
        losses.append(svi.run(key, 3, x + loc, progress_bar=False).losses / 64)
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-3)


# Posteriors.


@pytest.mark.filterwarnings("ignore:x_0 is held too coarsely")
def test_known_entries_far_from_zero_are_exact(key):
    """log N(known; loc, scale²), entries bit for bit in float64, the others N(loc, scale²)."""
    loc, scale = np.array([JULIAN, 1e8, -1e7]), np.array([0.1, 2.0, 1.0])
    known, mask = loc + scale * numbers(3), np.array([True, False, True])
    prior = normal(loc, scale, (3,)).prior({})
    exact = stats.norm.logpdf(known, loc, scale)[mask].sum()
    programs = [
        (lambda known: prior(known=known, mask=mask), (known,)),  # an argument
        (lambda: prior(known=known, mask=mask), ()),  # closed over
    ]
    for program, args in programs:
        smc = infer.SMC(program, num_particles=500, num_runs=2)
        with pytest.warns(UserWarning, match="x_0 is held too coarsely"):
            smc.run(key, *args)
        np.testing.assert_allclose(smc.log_evidence, exact, atol=1e-3)
        draws, weighted = smc.get_samples()["x_0"], smc.get_weighted_samples()[0]["x_0"]
        for x in (draws, weighted):
            np.testing.assert_array_equal(x[:, mask], np.tile(known[mask], (len(x), 1)))
        mean_and_sd(draws[:, 1] - loc[1], 0.0, scale[1])
        tree = smc.to_datatree()
        np.testing.assert_array_equal(tree["posterior"]["x_0"].values[0], draws)


@pytest.mark.filterwarnings("ignore:x_0 is held too coarsely")
def test_known_entries_may_differ_between_systems(key):
    known = JULIAN + 0.1 * numbers(3, 2)
    mask = np.array([[True, False], [False, True], [True, True]])
    prior = normal(JULIAN, 0.1, (2,)).prior({})

    def program(known):
        with numpyro.plate("systems", 3):
            prior(known=known, mask=mask)

    smc = infer.SMC(program, num_particles=200, num_runs=2)
    smc.run(key, known)
    exact = np.where(mask, stats.norm.logpdf(known, JULIAN, 0.1), 0).sum(1)
    np.testing.assert_allclose(smc.log_evidence, exact, atol=1e-3)
    assert (smc.get_samples()["x_0"] == known)[:, mask].all()


def test_a_posterior_far_from_zero_has_mean_and_sd(key):
    """One site that measures x_0 relative to loc within float32: the draws keep their digits."""
    loc, prior = 4096.0, normal(4096.0, 1.0).prior({})
    program = lambda y: numpyro.sample("y", dist.Normal(prior() - loc, 1.0), obs=y)  # noqa: E731
    smc = infer.SMC(program, num_particles=1000, num_runs=4)
    smc.run(key, y=2.0)
    mean_and_sd(smc.get_samples()["x_0"] - loc, 1.0, 0.5**0.5)
    guided = infer.Guided(program, num_samples=2000, check=False)
    guided.run(key, y=2.0)
    draws = guided.get_samples()["x_0"]
    assert draws.dtype == np.float64 and len(np.unique(draws)) > 1990


# Where float32 is too coarse, it is said.


@functools.cache
def programs_in_float32():
    """Each runs a program in which x_0 is a number of float32, in the user's units."""
    diffusion = normal(np.array([0.0, JULIAN]), np.array([1.0, 0.1]), (2,))
    x = np.array([[0.5, JULIAN]])
    prior = diffusion.prior({})

    def observed(y):
        numpyro.sample("y", dist.Normal(prior()[..., 1], 1.0), obs=y)

    def own(x_0):
        with numpyro.plate("data", len(x_0)):
            diffusion.reverse(x_0)

    def own_guide(x_0):
        with numpyro.plate("data", len(x_0)):
            diffusion.forward(x_0)

    svi = SVI(own, own_guide, optax.adam(1e-2), Trace_ELBO())
    return {
        "Predictive": lambda key: Predictive(diffusion.model, num_samples=2)(key),
        "SMC": lambda key: infer.SMC(observed, num_particles=9, num_runs=1).run(key, y=JULIAN),
        "a program of the user's": lambda key: svi.init(key, jnp.asarray(x, jnp.float32)),
        "NUTS": lambda key: handlers.seed(infer.noncentered(observed), key)(JULIAN),
        "by step": lambda key: Predictive(diffusion.model_by_step, num_samples=2)(key),
        "float32 data": lambda key: diagnostics.bound(key, diffusion, {}, np.float32(x)),
        "JAX's data": lambda key: diagnostics.bound(key, diffusion, {}, jnp.asarray(x)),
    }


@pytest.mark.parametrize("name", programs_in_float32())
@pytest.mark.filterwarnings("ignore::probdiff.infer.InferenceWarning")
def test_float32_that_is_too_coarse_is_said_by_column(key, name):
    with pytest.warns(UserWarning, match=r"column 1: float32 .* 0\.25 apart, .* scale of 0\.1"):
        programs_in_float32()[name](key)


def test_nothing_is_said_under_x64_or_where_float32_is_fine(x64, key):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        draws = Predictive(normal(JULIAN, 0.1).model, num_samples=2)(key)["x_0"]
        with jax.enable_x64(False):
            Predictive(normal(1000.0, 1.0).model, num_samples=2)(jax.random.key(0))
    assert not said and draws.dtype == np.float64


# Files.


def test_loc_and_scale_are_saved_with_all_their_digits(tmp_path, key):
    diffusion = normal(JULIAN + 1e-9, 0.1)
    assert diffusion.loc == JULIAN + 1e-9 and diffusion.scale == 0.1
    network = diffusion.network
    probdiff.save(tmp_path / "model", diffusion, {})
    again, _ = probdiff.load(tmp_path / "model", network=network)
    assert again.loc == diffusion.loc and again.scale == diffusion.scale


@pytest.mark.long
def test_the_command_line_reads_files_with_all_their_digits(tmp_path, key):
    """In either order of bytes."""
    diffusion, x = trainable(1e8), numbers(20) + 1e8
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-2), SampledTimeELBO())
    params = fit(key, svi, x, num_steps=1, progress=False).params
    probdiff.save(tmp_path / "model", diffusion, params)
    np.save(tmp_path / "x.npy", x.astype(">f8"))
    assert cli.main(["bound", str(tmp_path / "model"), str(tmp_path / "x.npy")]) == 0
    with xr.open_datatree(tmp_path / "model" / "bounds-x.nc", engine="h5netcdf") as tree:
        ours = tree["bound"]["bound"].values
    exact = diagnostics.bound(jax.random.key(0), diffusion, params, x)["bound"]["bound"]
    np.testing.assert_allclose(ours, exact, atol=1e-6)


# Arrays of other kinds: right, or refused by name.


def swapped(x):
    """The same values, their bytes the other way round."""
    x = np.asarray(x)
    return x.astype(x.dtype.newbyteorder(">"))


def shifted_by_context(**options):
    """Its draws and bounds depend on the context."""

    def network(x_t, t, context):
        return jnp.stack([0 * x_t + context, 0 * x_t], -1)

    beta = schedules.cosine(3)
    return Diffusion(GaussianKernel(), beta, network, event_shape=(), context_shape=(), **options)


@functools.cache
def doors():
    """What takes arrays, each as a function of one array."""
    key, near, mask = jax.random.key(0), normal(0.0), np.array([True, False, True])
    table, by_context = normal(0.0, 1.0, (3,)), shifted_by_context()
    bits = standard_diffusion((3,), 3, kernel=BernoulliKernel(0.5))
    x, whole = np.zeros(3, np.float32), lambda a: (a > 0).astype(f"{a.dtype.byteorder}i4")
    weights = lambda w, x_t, t: jnp.stack([0 * x_t + w.sum(), 0 * x_t], -1)  # noqa: E731
    weighted = Diffusion(
        GaussianKernel(), schedules.cosine(3), (weights, np.zeros(3, np.float32)), event_shape=()
    )
    measured = infer.SMC(
        lambda y: numpyro.sample("y", dist.Normal(table.prior({})(), 1.0).to_event(1), obs=y),
        num_particles=100,
        num_runs=1,
    )
    known = infer.SMC(
        lambda known: table.prior({})(known=known, mask=mask), num_particles=100, num_runs=1
    )
    closed = lambda known: infer.SMC(  # noqa: E731
        lambda: table.prior({})(known=known, mask=mask), num_particles=100, num_runs=1
    )
    svi = SVI(near.model, near.guide, optax.adam(1e-2), SampledTimeELBO())

    def evidence(smc, *args):
        smc.run(key, *args)
        return smc.log_evidence

    return {
        "data": lambda a: diagnostics.bound(key, near, {}, a)["bound"]["bound"],
        "symbols": lambda a: diagnostics.bound(key, bits, {}, whole(a)[None])["bound"]["bound"],
        "context": lambda a: diagnostics.bound(key, by_context, {}, x, context=a)["bound"]["bound"],
        "context of draws": lambda a: sample.ancestral(key, by_context, {}, 3, context=a),
        "params": lambda a: sample.ancestral(key, weighted, {"x_0_network$params": a}, 4),
        "loc": lambda a: sample.ancestral(key, normal(a, 1.0, (3,)), {}, 2),
        "training": lambda a: fit(key, svi, a, num_steps=1, progress=False).losses,
        "held-out": lambda a: (
            fit(key, svi, x, num_steps=1, held_out=a, progress=False).held_out_losses.loss
        ),
        "stock SVI": lambda a: svi.run(key, 1, a, progress_bar=False).losses,
        "an argument": lambda a: evidence(measured, a),
        "known": lambda a: evidence(known, a),
        "known, closed over": lambda a: evidence(closed(a)),
    }


@pytest.mark.filterwarnings("ignore::probdiff.infer.InferenceWarning")
@pytest.mark.parametrize("door", doors())
def test_bytes_of_the_other_order_are_read_right(door):
    """After a native call of the same shape, where JAX would read them as they lie."""
    a = np.array([0.5, -1.0, 2.0], np.float32)
    at = doors()[door]
    native = np.asarray(at(a))
    for dtype in (">f4", ">f8"):
        np.testing.assert_array_equal(np.asarray(at(a.astype(dtype))), native)


def test_masks_and_booleans_have_no_order(key):
    x, mask = np.ones((2, 3)), np.array([[True, False, True]] * 2)
    diffusion = normal(0.0, 1.0, (3,))
    tree = diagnostics.bound(key, diffusion, {}, swapped(x), mask=mask)
    near = diagnostics.bound(key, diffusion, {}, x, mask=jnp.asarray(mask))
    np.testing.assert_array_equal(tree["bound"]["bound"], near["bound"]["bound"])


@functools.cache
def table():
    """N(0, I) of three columns, compiled once."""
    return normal(0.0, 1.0, (3,))


def kinds(x):
    """The same numbers (multiples of 1/4), held otherwise."""
    import pandas as pd

    wide = np.zeros((len(x), 6), np.float32)
    wide[:, ::2] = x
    frozen = x.copy()
    frozen.flags.writeable = False
    return {
        "float16": x.astype(np.float16),
        "bfloat16": x.astype(jnp.bfloat16),
        "JAX's bfloat16": jnp.asarray(x, jnp.bfloat16),
        "float64": x.astype(np.float64),
        "long double": x.astype(np.longdouble),
        "every other column": wide[:, ::2],
        "columns first": np.asfortranarray(x),
        "read only": frozen,
        "backwards": x[::-1].copy()[::-1],
        "DataFrame": pd.DataFrame(x),
        "DataArray": xr.DataArray(x),
        "nothing masked": np.ma.array(x),
    }


@pytest.mark.parametrize("name", kinds(np.zeros((1, 3), np.float32)))
def test_the_same_numbers_held_otherwise_have_the_same_bound(unchecked, key, name):
    diffusion, x = table(), np.round(4 * numbers(8, 3)).astype(np.float32) / 4
    near = diagnostics.bound(key, diffusion, {}, x)["bound"]
    tree = diagnostics.bound(key, diffusion, {}, kinds(x)[name])["bound"]
    np.testing.assert_array_equal(tree["bound"], near["bound"])
    assert tree.attrs["data"] == near.attrs["data"]


def test_a_view_of_one_row_many_times_is_read_as_its_rows(key):
    diffusion, row = normal(0.0, 1.0, (3,)), np.array([0.5, -1.0, 2.0], np.float32)
    view = np.broadcast_to(row, (5, 3))
    near = diagnostics.bound(key, diffusion, {}, view.copy())["bound"]["bound"]
    np.testing.assert_array_equal(
        diagnostics.bound(key, diffusion, {}, view)["bound"]["bound"], near
    )


MASKED = np.ma.array([0.5, -1.0, 2.0], mask=[False, True, False])


@pytest.mark.parametrize("door", sorted({*doors()} - {"symbols"}))
def test_a_masked_array_is_refused_by_name(unchecked, door):
    with pytest.raises(
        ValueError, match=r"must not be a masked array.* 1 masked .*numpy\.ma\.getmask"
    ):
        doors()[door](MASKED)


def test_a_masked_table_is_refused_as_data(key):
    x = np.ma.masked_less(np.array([[0.5, -9.0]]), -5)
    message = r"x_0 must not be a masked array.* 1 masked entries: pass x_0\.data, and a mask"
    for call in (diagnostics.bound, diagnostics.sampled_bound, diagnostics.ladder):
        with pytest.raises(ValueError, match=message):
            call(key, normal(0.0, 1.0, (2,)), {}, x)


def test_objects_are_refused_by_name(key):
    bits = standard_diffusion((3,), 3, kernel=BernoulliKernel(0.5))
    for diffusion in (normal(0.0, 1.0, (3,)), bits):
        with pytest.raises(ValueError, match=r"x_0 must be an array of numbers.*dtype object"):
            diagnostics.bound(key, diffusion, {}, np.ones((2, 3), object))
