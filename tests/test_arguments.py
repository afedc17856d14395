"""Arguments by kind, and hostile calls of every public name: named, never an error from inside."""

import importlib
import inspect
import math
import random
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import xarray as xr

import hostile
import probdiff
from probdiff import arguments, datasets, diagnostics, networks, sample, schedules
from probdiff import standard_diffusion as standard

KEY = jax.random.key(0)


@pytest.mark.parametrize("count", [3, np.int64(3), np.int32(3), np.array(3), np.uint8(3)])
def test_a_count_is_any_integer(unchecked, count):
    assert schedules.harmonic(count).shape == (3,)


@pytest.mark.parametrize("value", [2.5, 3.0, True, np.True_, np.float64(3), "3", None, [3], 3 + 0j])
def test_a_count_is_nothing_else(unchecked, value):
    """harmonic(2.5) once returned β = 2."""
    with pytest.raises(ValueError, match="T must be an integer of at least 2; got"):
        schedules.harmonic(value)


@pytest.mark.parametrize("value", [10**5000, 10**12, 2**31], ids=["5000", "12", "31"])
def test_a_count_beyond_int32_is_refused_before_memory_is_asked_for(value):
    with pytest.raises(ValueError, match="T must be at most 2147483647; got"):
        schedules.harmonic(value)


@pytest.mark.parametrize("share", [0.5, Fraction(1, 2), np.float32(0.5), np.array(0.5)])
def test_a_number_is_any_real_one(unchecked, share):
    for value in (share, jnp.float32(share)):
        arguments.check_number(arguments.INNER_SHARE, share=value)
        assert arguments.as_number(value) == 0.5


@pytest.mark.parametrize("value", ["0.5", True, np.array([0.5]), 0.5j, None, math.nan, 1.0])
def test_a_share_is_nothing_else(value):
    with pytest.raises(ValueError, match=r"share must (be a number and )?lie in \(0, 1\); got"):
        arguments.check_number(arguments.INNER_SHARE, share=value)


def test_numbers_that_float32_does_not_hold_are_refused():
    """r_max = 1e300 once left discs of infinite radius falling for ever."""
    for value in (1e300, 1e-300, math.inf):
        with pytest.raises(ValueError, match="noise must be positive and finite; got"):
            arguments.check_number(arguments.POSITIVE, noise=value)
    with pytest.raises(ValueError, match=r"r_max must be positive and finite; got 1e\+300"):
        datasets.dead_leaves(KEY, 1, size=2, r_max=1e300)


def test_keys_of_both_kinds_draw_alike(unchecked):
    old, new = jax.random.PRNGKey(7), jax.random.key(7)
    drawn = [datasets.swiss_roll(key, 3, noise=0.1) for key in (old, new, np.asarray(old))]
    assert np.array_equal(drawn[0], drawn[1]) and np.array_equal(drawn[0], drawn[2])


@pytest.mark.parametrize("key", [0, None, "0", np.zeros(2), np.zeros(3, np.uint32), jnp.zeros(2)])
def test_what_is_no_key_is_told_how_to_make_one(unchecked, key):
    diffusion = standard(T=3)
    sentence = re.escape("key must be a random key, jax.random.key(seed); got")
    for call in (
        lambda: sample.ancestral(key, diffusion, {}, 2),
        lambda: diagnostics.bound(key, diffusion, {}, np.zeros(2, np.float32)),
        lambda: datasets.swiss_roll(key, 3, noise=0.1),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


def test_several_keys_are_no_key(unchecked):
    with pytest.raises(ValueError, match="key must be a random key"):
        datasets.swiss_roll(jax.random.split(KEY, 3), 3, noise=0.1)


@pytest.mark.parametrize(
    "of",
    [list, tuple, np.asarray, jnp.asarray, pd.DataFrame, xr.DataArray],
    ids=lambda of: f"{of.__module__}.{of.__name__}",
)
def test_an_array_is_whatever_numpy_reads_as_one(unchecked, of):
    rows = [[0.5, -1.0], [1.5, 0.25]]
    expected = datasets.swiss_roll_log_density(jnp.array(rows), noise=0.5)
    assert np.array_equal(datasets.swiss_roll_log_density(of(rows), noise=0.5), expected)


@pytest.mark.parametrize("value", ["text", None, {}, [["a"]], [[1.0], [2.0, 3.0]], object(), True])
def test_what_is_no_array_of_numbers_is_refused_by_name(unchecked, value):
    with pytest.raises(ValueError, match=r"x must (be an array|have shape)"):
        datasets.swiss_roll_log_density(value, noise=0.5)


def test_shapes_are_tuples_lists_and_arrays_of_sizes():
    for shape in ((2, 3), [2, 3], np.array([2, 3]), (np.int64(2), 3)):
        assert arguments.check_shape("event_shape", shape) == (2, 3)
    assert arguments.check_shape("event_shape", ()) == ()
    for shape in (
        5,
        ((1, 2), 3),
        np.zeros((2, 2), int),
        "text",
        b"bytes",
        {},
        (2.0,),
        (True,),
        (0,),
        (-1,),
        None,
        np.array(3),
    ):
        with pytest.raises(ValueError, match="event_shape must"):
            arguments.check_shape("event_shape", shape)


def test_a_symbol_that_is_none_of_the_kernel_is_refused(unchecked):
    """One-hot coded, it once had no state at all, and a law of NaN."""
    kernel, step = hostile.probdiff.CategoricalKernel(3), schedules.steps([0.1, 0.2]).at(1, 0)
    for value in (-1, 3, 1.5):
        with pytest.raises(ValueError, match="x_s must"):
            kernel.transition(value, step)


def test_nan_is_nearest_to_no_value_of_a_grid():
    """It was once the least."""
    assert np.isnan(hostile.readouts.Grid(0, 3, 4).nearest(jnp.array(jnp.nan)))


def test_steps_outside_a_table_are_refused(unchecked):
    """Step 0 of a table was once its last."""
    for t in (-1, 0, 4):
        with pytest.raises(ValueError, match=r"t must lie in 1\.\.3; got"):
            schedules.steps([0.1, 0.2, 0.3]).at(t, 0)
        with pytest.raises(ValueError, match=r"t must lie in 1\.\.3; got"):
            network = networks.RadialBasis((), 2, 3, rngs=hostile.nnx.Rngs(0))
            network(jnp.zeros(1), jnp.array([t]))


def test_diagnostics_take_a_key_a_model_its_parameters_and_examples():
    """Without a tree they make it, with the key."""
    diffusion, x = standard(T=3), np.linspace(-1, 1, 5, dtype=np.float32)
    tree = diagnostics.bound(KEY, diffusion, {}, x)
    given = diagnostics.entropies(KEY, diffusion, {}, x, tree)
    assert diagnostics.entropies(KEY, diffusion, {}, x).identical(given)
    pairs = zip(
        diagnostics.entropy_form(KEY, diffusion, {}, x),
        diagnostics.entropy_form(KEY, diffusion, {}, x, tree["bound"]["kl"].values),
        strict=True,
    )
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert "information" in diagnostics.information(KEY, diffusion, {}, x).children


def run(calls):
    """What ended inside or not at all, as text."""
    ends = ((*call, *hostile.outcome(*call)) for call in calls)
    bad = [(c.name, *rest) for c, *rest in ends if rest[-2] in ("inside", "slow")]
    return "\n".join(map(str, bad))


@pytest.mark.parametrize(
    "group", ["schedules", "kernels", "readouts", "networks", "diffusions", "tables"]
)
def test_hostile_calls_end_with_the_name_of_the_argument(unchecked, tmp_path, monkeypatch, group):
    monkeypatch.chdir(tmp_path)
    calls = list(hostile.calls(hostile.GROUPS[group]()))
    assert not run(random.Random(0).sample(calls, 60))


@pytest.mark.long
@pytest.mark.parametrize("group", hostile.GROUPS)
def test_all_hostile_calls_end_with_the_name_of_the_argument(
    unchecked, tmp_path, monkeypatch, group
):
    monkeypatch.chdir(tmp_path)
    assert not run(hostile.calls(hostile.GROUPS[group]()))


def takes_arguments(value):
    """Whether a public name is a function, or a class with a constructor that checks."""
    is_exempt = isinstance(value, type) and (
        inspect.isabstract(value) or issubclass(value, tuple | Warning)
    )
    return callable(value) and not is_exempt and bool(inspect.signature(value).parameters)


@pytest.mark.long
def test_every_public_name_is_called_with_hostile_arguments():
    """More than 5,000 calls."""
    cases = [case for group in hostile.GROUPS.values() for case in group()]
    assert sum(1 for _ in hostile.calls(cases)) > 5_000
    names = "infer diagnostics datasets networks readouts kernels plots tables train".split()
    modules = [probdiff, *(importlib.import_module(f"probdiff.{name}") for name in names)]
    public = [getattr(module, name) for module in modules for name in module.__all__]
    called = [case.function for case in cases]
    kept = {"Fit"}  # holds what a run left
    missing = {v.__name__ for v in public if takes_arguments(v) and v not in called} - kept
    assert not missing
