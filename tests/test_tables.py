"""Tables: kinds that are inferred, rows there and back, and what does not fit refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats

from probdiff import Table, diagnostics, infer, sample, standard_diffusion
from probdiff.tables import (
    Bounded,
    Category,
    Constant,
    Continuous,
    Count,
    Empty,
    HeavyTailed,
    Hurdle,
    Ordered,
    Positive,
    Rounded,
)

KEY = jax.random.key(0)


def columns(n=400, seed=0):
    """One of every kind that is inferred."""
    rng = np.random.default_rng(seed)
    days = np.datetime64("2019-03-01") + rng.integers(0, 9000, n)
    return {
        "length": rng.normal(3.0, 2.0, n), "size": np.exp(rng.normal(0, 1.5, n)),
        "tail": rng.standard_t(1.5, n), "children": rng.poisson(1.0, n),
        "half": np.round(2 * rng.normal(0, 1, n)) / 2, "fine": np.round(rng.normal(0, 1, n), 3),
        "sex": rng.choice(["f", "m"], n), "smokes": rng.random(n) < 0.3,
        "colour": rng.choice(["red", "green", "blue"], n), "day": days,
        "unix": 1_700_000_000 + rng.integers(0, 10**6, n), "one": np.full(n, 7), "none": n * [None],
    }  # fmt: skip


def test_kinds_are_inferred_and_may_be_corrected():
    table = Table(columns())
    found = {name: type(kind) for name, kind in table.kinds.items()}
    assert found == {
        "length": Continuous, "size": Positive, "tail": HeavyTailed, "children": Count,
        "half": Rounded, "fine": Continuous, "sex": Category, "smokes": Category,
        "colour": Category, "day": Continuous, "unix": Continuous, "one": Constant, "none": Empty,
    }  # fmt: skip
    assert table.kinds["fine"].step == 0.001 and table.kinds["half"].step == 0.5
    assert table.kinds["unix"].step == table.kinds["day"].step == 1.0
    assert table.event_shape == (13,) and table.is_on_grid.sum() == 7
    kinds = {"colour": Ordered(("blue", "green", "red")), "children": Rounded(1.0, 0.0, 50.0)}
    other = Table(columns(), kinds=kinds)
    assert other.event_shape == (11,) and other.kinds["children"].high == 50
    assert other.encode({"colour": ["red", "blue"]}).x_0[:, other.place("colour")].tolist() == [
        [2], [0]
    ]  # fmt: skip
    text = repr(table)
    assert len(text.splitlines()) == 15 and "Count(" in text and "from 2019-03" in text


def as_structured(data):
    types = [(n, v.dtype if (v := np.asarray(data[n])).dtype.kind != "U" else "U5") for n in data]
    rows = np.empty(len(data["length"]), types)
    for name in data:
        rows[name] = data[name]
    return rows


@pytest.mark.parametrize(
    "form", [dict, pd.DataFrame, lambda d: xr.Dataset({n: ("row", v) for n, v in d.items()}),
             as_structured], ids=["dict", "pandas", "xarray", "structured"],
)  # fmt: skip
def test_rows_come_back_as_they_were(form):
    """Bit for bit where there is a step or a class, to 1e-13 elsewhere; NaN where missing."""
    data = columns()
    table = Table(form(data))
    rows = table.encode(form(data))
    assert rows.x_0.dtype == np.float64 and rows.mask.all()
    again = table.decode(rows.x_0)
    assert isinstance(again, pd.DataFrame) == (form is pd.DataFrame)
    for name in data:
        got, given = np.asarray(again[name]), np.asarray(data[name])
        if name in ("length", "size", "tail"):
            np.testing.assert_allclose(got, given, rtol=1e-13, atol=1e-13)
        elif name != "none":
            assert (got == given).all(), name
            assert np.asarray(got).dtype.kind in ("i" if name == "one" else given.dtype.kind, "O")
    assert np.isnan(np.asarray(again["none"], float)).all()


def test_missing_entries_are_masked_in_every_kind():
    data = pd.DataFrame(columns())
    seen = np.random.default_rng(1).random(data.shape) < 0.7
    table = Table(data.where(seen, None))
    rows = table.encode(data.where(seen, None))
    for i, name in enumerate(n for n in data.columns):
        mask = rows.mask[:, table.place(name)]
        assert (mask == seen[:, i : i + 1]).all() or name in ("one", "none")
    assert (np.isnan(rows.x_0) == ~rows.mask).all() and np.isfinite(rows.log_jacobian).all()
    none = table.encode({name: [None, None] for name in table.names})
    assert not none.mask.any() and none.mask.shape == (2, 13)
    only = table.encode({"children": [2, 3]})
    assert only.mask.sum(1).tolist() == [1, 1]


@pytest.mark.parametrize(
    "kind", [Continuous(), Positive(), Bounded(low=0.0, high=9.0), HeavyTailed(2.0, 0.7)], ids=str
)
def test_slopes_are_those_of_the_maps(kind):
    x = np.array([0.3, 2.0, 8.7])
    slope = (kind.encode(x + 1e-6) - kind.encode(x - 1e-6))[:, 0] / 2e-6
    np.testing.assert_allclose(kind.log_slope(x), np.log(slope), atol=1e-7)
    np.testing.assert_allclose(kind.decode(kind.encode(x)), x, rtol=1e-13)
    in_jax = kind.decode(jnp.asarray(kind.encode(x), jnp.float32))
    assert isinstance(in_jax, jax.Array)
    np.testing.assert_allclose(in_jax, x, rtol=1e-5)


def rain(n=500, seed=0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(n) < 0.6, 0.0, np.round(np.exp(rng.normal(0, 1, n)), 3) + 0.001)


def test_a_value_that_is_there_again_and_again_is_a_hurdle():
    x = rain()
    table = Table({"rain": x, "shifted": rain(seed=1) - 3.0})
    assert table.kinds["rain"] == Hurdle(Positive(step=0.001), 0.0)
    assert table.kinds["shifted"].at == -3.0 and table.event_shape == (4,)
    assert table.is_on_grid.tolist() == [True, False] * 2
    rows = table.encode({"rain": np.append(x, np.nan)})
    assert (rows.mask[:-1, :2] == np.stack([np.ones(500), x > 0], 1)).all()
    assert not rows.mask[-1].any() and (rows.log_jacobian[:-1][x == 0] == 0).all()
    np.testing.assert_allclose(rows.log_jacobian[:-1][x > 0], -np.log(x[x > 0]))
    filled = table.encode({"rain": x, "shifted": rain(seed=1)[::-1] - 3.0}, key=KEY)
    assert filled.mask.all()
    np.testing.assert_allclose(table.decode(filled.x_0)["rain"], x, atol=1e-12)
    inside = table.columns(jnp.asarray(filled.x_0))["rain"]
    np.testing.assert_allclose(np.asarray(inside), x, atol=0.00051)


def test_what_a_hurdle_leaves_out_costs_nothing():
    """log p(0 or not, a draw) − log q(draw) is log P(0) where the draw's law is q."""
    x = rain()
    table = Table({"rain": x})
    rows = table.encode({"rain": x}, key=KEY)
    z = (rows.x_0[:, 1] - table.loc[1]) / table.scale[1]
    assert abs(z[x == 0].mean()) < 4 / np.sqrt((x == 0).sum()) and 0.8 < z[x == 0].std() < 1.2
    log_q = stats.norm.logpdf(rows.x_0[:, 1], table.loc[1], table.scale[1])
    np.testing.assert_allclose(rows.log_jacobian[x == 0], -log_q[x == 0])
    with pytest.raises(ValueError, match=r"at must be a multiple of the step, 0\.5; got 0\.7"):
        Hurdle(Continuous(step=0.5), at=0.7)
    with pytest.raises(ValueError, match="rest must be a kind with a density"):
        Hurdle(Count(3))


def test_a_step_is_told_from_digits_that_only_look_like_one():
    rng = np.random.default_rng(0)
    z = rng.normal(size=300)
    for scale in (1.0, 100.0, 1e5):
        data = {"any": scale * (10 + z), "cents": np.round(scale * (10 + z), 2)}
        steps = {name: kind.step for name, kind in Table(data).kinds.items()}
        assert steps["any"] == 0 and steps["cents"] == 0.01, scale


def test_noise_of_a_step_stays_within_it():
    table = Table(columns())
    x, there = (table.encode(columns(), key=key).x_0[:, table.place("fine")] for key in (KEY, None))
    away = np.abs(x - there)
    assert 0.00049 < away.max() <= 0.0005 and (np.round(x, 3) == there).all()
    assert (table.decode(table.encode(columns(), key=KEY).x_0)["fine"] == columns()["fine"]).all()


@pytest.mark.parametrize("offset", [pytest.param(0.0, marks=pytest.mark.long), 2459000.0])
def test_an_offset_loses_nothing(offset):
    """2459000 + 0.1 N(0, 1): 1,000 draws by `sample` and by `SMC`, and K to 1e-3."""
    z = 0.1 * np.random.default_rng(0).standard_normal(300)
    table = Table({"julian": offset + z})
    rows = table.encode({"julian": offset + z})
    model = standard_diffusion((1,), T=8, loc=table.loc, scale=table.scale)
    k = diagnostics.bound(KEY, model, {}, rows.x_0, num_draws=2)["bound"]["bound"].values
    base = standard_diffusion((1,), T=8, loc=z.mean(), scale=z.std())
    exact = diagnostics.bound(KEY, base, {}, z[:, None], num_draws=2)["bound"]["bound"].values
    assert np.abs(k - exact).max() < 1e-3
    draws = table.decode(sample.ancestral(KEY, model, {}, 1000))["julian"]
    prior = model.prior({})
    smc = infer.SMC(lambda: prior(), num_particles=1000)
    smc.run(KEY)
    posterior = table.decode(smc.get_samples()["x_0"])["julian"]
    for x in (draws, posterior):
        assert len(np.unique(x)) >= 990 and abs(x.mean() - offset) < 0.02
        assert abs(x.std() - 0.1) < 0.01


def test_programs_see_columns():
    table = Table(columns())
    x = jnp.asarray(table.encode(columns()).x_0[:5], jnp.float32)
    seen = jax.jit(table.columns)(x)
    assert (seen["children"] == columns()["children"][:5]).all()
    places = [table.kinds["colour"].values.index(c) for c in columns()["colour"][:5]]
    assert seen["colour"].tolist() == places
    late = columns()["unix"][:5] - table.origin("unix")
    np.testing.assert_allclose(seen["unix"], late, atol=0.1)
    np.testing.assert_allclose(seen["size"], columns()["size"][:5], rtol=1e-5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"children": [-1]}, "column 'children'.*Count column must be 0, 1, …"),
        ({"children": [1.5]}, "column 'children'.*1.5"),
        ({"half": [0.25]}, "column 'half'.*Rounded column"),
        ({"half": [50.0]}, "column 'half'.*50.0"),
        ({"colour": ["pink"]}, "column 'colour'; got pink"),
        ({"size": [0.0]}, "column 'size'.*above 0"),
        ({"length": [np.inf]}, "column 'length'.*must be finite"),
        ({"length": ["a"]}, "numbers in column 'length'; got 'a'"),
        ({"length": [np.datetime64("2020-01-01")]}, "numbers in column 'length'; got dates"),
        ({"day": [3.0]}, "dates in column 'day'"),
        ({"one": [8]}, "7 throughout in column 'one'"),
        ({"none": [1.0]}, "Empty column must be missing"),
        ({"other": [1.0]}, "data must have columns of .*'other'"),
        ({"length": [1.0], "size": [1.0, 2.0]}, "N the same"),
        ({"length": [1.0, "a", None]}, "of one type in column 'length'; got float, str"),
        (3.0, "data must be a DataFrame"),
        ({}, "at least 1 column"),
    ],
)
def test_rows_that_do_not_fit_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        Table(columns()).encode(data)


def test_draws_of_another_shape_are_refused():
    table = Table(columns())
    with pytest.raises(ValueError, match=r"x_0 must have shape \(..., 13\); got shape \(2,\)"):
        table.decode(np.zeros(2))
    with pytest.raises(ValueError, match="kinds must name columns"):
        Table(columns(), kinds={"other": Continuous()})
    with pytest.raises(ValueError, match="must be Category or Ordered for texts"):
        Table(columns(), kinds={"sex": Continuous()})
    with pytest.raises(ValueError, match="data must fit column 'length'"):
        Table(columns(), kinds={"length": Count(4)})
