"""Commands for tables: from a CSV file to draws of what is missing in another."""

import csv
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from flax import nnx

from probdiff import (
    Diffusion,
    GaussianKernel,
    Table,
    cli,
    diagnostics,
    infer,
    networks,
    save,
    schedules,
)
from probdiff.commands import fit, impute, kinds
from probdiff.commands.console import UsageError
from probdiff.tables import read_csv


def rows(n=300, seed=0):
    rng = np.random.default_rng(seed)
    x = np.round(rng.normal(3, 2, n), 3)
    return {
        "x": x, "price": np.round(np.exp(1 + 0.3 * x + rng.normal(0, 1, n)), 2),
        "n": rng.poisson(np.exp(0.2 * x)), "colour": rng.choice(["red", "green", "blue"], n),
        "day": np.datetime64("2024-05-06") + rng.integers(0, 400, n), "id": np.arange(n) + 1,
    }  # fmt: skip


def write(path, columns):
    """As CSV; None and NaN are empty cells."""
    lines = zip(*(np.asarray(v).tolist() for v in columns.values()), strict=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([list(columns), *lines])
    return str(path)


@pytest.fixture
def table(tmp_path):
    return write(tmp_path / "t.csv", rows())


@pytest.fixture
def model(tmp_path):
    """A model of the table with nothing learned: independent columns about their means."""
    described = Table({n: v for n, v in rows().items() if n != "id"})
    network = networks.Perceptron(described.event_shape, width=4, depth=1, T=5, rngs=nnx.Rngs(0))
    beta = schedules.log_snr_linear(5, beta_1=0.01, alpha_bar_T=0.01)
    diffusion = Diffusion(
        GaussianKernel(), beta, network, event_shape=described.event_shape, loc=described.loc,
        scale=described.scale, last_step=described.last_step,
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), diffusion.params_template)
    save(tmp_path / "model", diffusion, params)
    described.save(tmp_path / "model" / "columns.json")
    return str(tmp_path / "model"), described, diffusion, params


def test_fit_without_out_says_what_columns_are_taken_for(table, capsys):
    argv = ["fit", table, "--drop", "id", "--kind", "n=Count(40)", "--kind", "x=Continuous"]
    assert cli.main([*argv, "--kind", "colour = Ordered(blue, green, red)"]) == 0
    said = capsys.readouterr()
    data = {n: v for n, v in read_csv(table).items() if n != "id"}
    corrected = {n: kinds.made(n, kinds.parse(f"{n}={k}", data)[1], data[n]) for n, k in {
        "n": "Count(40)", "x": "Continuous", "colour": "Ordered(blue, green, red)",
    }.items()}  # fmt: skip
    assert said.out == f"{table}: 300 rows\n{Table(data, kinds=corrected)}\n"
    assert "--out MODEL" in said.err and corrected["x"].step == 0.001
    assert corrected["colour"].values == ("blue", "green", "red")


def test_fit_says_what_it_decided(tmp_path, capsys):
    text = "i;x;when\n" + "".join(f"{i};{i % 7},5;2024-01-{1 + i % 9:02}\n" for i in range(80))
    (tmp_path / "t.csv").write_text(text + ";;\n;;\n")
    assert cli.main(["fit", str(tmp_path / "t.csv"), "--missing", "3,5"]) == 0
    said = capsys.readouterr()
    assert "a comma is the point: 0,5 is 0.5, in column 'x'" in said.err
    assert "2 rows hold nothing and are left out" in said.err
    assert "column 'i' counts the rows; --drop it" in said.err
    assert "t.csv: 80 rows" in said.out
    assert re.search(r"^x  .* 11  ", said.out, re.MULTILINE)  # missing: 3,5 of each 7 rows


@pytest.mark.parametrize(
    ("text", "kind", "args", "options"),
    [
        ("x=Positive", "Positive", (), {}),
        (" x = Count(120) ", "Count", (120,), {}),
        ("x=Rounded(0.5, -3, +3)", "Rounded", (0.5, -3, 3), {}),
        ("x=HeavyTailed(centre=1e3, width=2, step=.5)", "HeavyTailed", (),
         {"centre": 1000.0, "width": 2, "step": 0.5}),
        ("x=Ordered(S, M, 'very large')", "Ordered", (("S", "M", "very large"),), {}),
        ("x=Ordered(very small, semi-large)", "Ordered", (("very small", "semi-large"),), {}),
        ("x=Category(('f', 'm'))", "Category", (("f", "m"),), {}),
        ("x=Category(1, 2, 3)", "Category", ((1, 2, 3),), {}),
        ("x=Hurdle(Positive(), 0)", "Hurdle", (kinds.Told("Positive", (), {}), 0), {}),
        ("a=b=Bounded(0, 1)", "Bounded", (0, 1), {}),
    ],
)  # fmt: skip
def test_a_kind_is_read(text, kind, args, options):
    assert kinds.parse(text, ["x", "a=b"])[1] == kinds.Told(kind, args, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "--kind must be as price=Positive; got 'x'"),
        ("x=", "must be as"),
        ("x=Postive", "no kind 'Postive'; there are .* Did you mean Positive?"),
        ("z=Positive", "no column 'z'; there are x"),
        ("x=Count(1, 2", "must be as"),
        ("x=Count(1 2)", r"cannot read Count\(1 2\)"),
        ("x=Count(__import__('os').system('echo'))", "cannot read"),
        ("x=Count((lambda: 1)())", "cannot read"),
        ("x=Count(*[1])", "cannot read"),
        ("x=Count(**{})", "cannot read"),
        ("x=Count(b'1')", "cannot read"),
        ("x=Bounded(" + "-" * 10**5 + "1)", "cannot read"),
    ],
)
def test_a_kind_that_is_none_is_refused_and_nothing_run(text, message):
    with pytest.raises(UsageError, match=message):
        kinds.parse(text, ["x"])


@pytest.mark.parametrize(
    ("told", "made"),
    [
        ("n=Count", "Count(7)"), ("n=Category", "Category((0, 1, 2, 3, 4, 5, 6, 7))"),
        ("h=Rounded", "Rounded(0.5, -1, 1.5)"), ("h=HeavyTailed", "HeavyTailed(step=0.5, 0, 0.74"),
        ("n=Ordered", "Ordered((0, 1,"), ("h=Bounded(-9, 9)", "Bounded(step=0.5, -9, 9)"),
        ("c=Category", "Category(('a', 'b'))"),
        ("c=Ordered(b, a)", "Ordered(('b', 'a'))"), ("f=Category(True, False)", "('True', 'False'"),
        ("z=Category", "Category(('01', '02'))"), ("z=Continuous", "Continuous()"),
        ("d=Category", "Category(('2024-01-01', '2024-01-02'))"),
        ("h=Hurdle(Continuous, 0)", "Hurdle(Continuous(step=0.5), 0)"),
        ("h=Hurdle(HeavyTailed(1, 2, step=0.25))", "Hurdle(HeavyTailed(step=0.25, 1, 2), 0)"),
    ],
)  # fmt: skip
def test_what_a_kind_is_not_told_is_taken_from_the_column(told, made, tmp_path):
    cells = {
        "n": [*range(8), 7], "h": np.arange(9) % 6 * 0.5 - 1, "c": [*"abbabaab", None],
        "f": [True, False] * 4 + [True], "z": ["01", "02"] * 4 + [None],
        "d": ["2024-01-01", "2024-01-02"] * 4 + [None],
    }  # fmt: skip
    write(tmp_path / "t.csv", {n: np.array(v, object) for n, v in cells.items()})
    read = kinds.delimited.read(tmp_path / "t.csv")
    name, as_told = kinds.parse(told, read.columns)
    values = kinds.values(read, name, as_told)
    kind = kinds.made(name, as_told, values)
    assert made in repr(kind)
    Table({name: values, "other": np.arange(9.0)}, kinds={name: kind})


def wrong(tmp_path, model):
    """Arguments that are wrong, with a part of what is said about them."""
    table, few = str(tmp_path / "t.csv"), str(tmp_path / "few.csv")
    write(few, {n: v[:20] for n, v in rows().items()})
    names = write(tmp_path / "names.csv", {
        "x": rows()["x"], "who": [f"p{i}" for i in range(300)],
        "us": [f"{i}/2/2020" for i in range(300)],
    })  # fmt: skip
    new = {"pink": "x,colour\n1.5,pink\n", "off": "n\n-1\n", "text": "x\nabc\n", "none": "z\n1\n",
           "whole": "x,price,n,colour,day\n1,1,1,red,2024-05-06\n", "gap": "x,n\n1,\n"}  # fmt: skip
    for name, text in new.items():
        (tmp_path / f"{name}.csv").write_text(text)
    new = {name: str(tmp_path / f"{name}.csv") for name in new}
    folder, out = model[0], str(tmp_path / "d.nc")
    other = tmp_path / "other"
    other.mkdir()
    for file in (tmp_path / "model").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    Table({"z": [0.1, 0.2, 0.5]}).save(other / "columns.json")
    plain = tmp_path / "plain"
    save(plain, *model[2:])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in (tmp_path / "model").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[:-9])
    impute = ["impute", folder, new["gap"], "--out", out]
    return {
        "no table": (["fit", "none.csv"], "no such file: none.csv"),
        "no column": (["fit", table, "--drop", "pric"], "no column 'pric'.*Did you mean price?"),
        "no kind": (["fit", table, "--kind", "x=Postive"], "Did you mean Positive?"),
        "kind of dropped": (["fit", table, "--drop", "x", "--kind", "x=Positive"], "no column 'x'"),
        "kind that does not fit": (["fit", table, "--kind", "x=Positive"], "column 'x': values of"),
        "kind of texts": (["fit", table, "--kind", "colour=Positive"], "line 2: column 'colour'"),
        "order": (["fit", table, "--kind", "colour=Ordered"], "must say the order"),
        "argument of kind": (["fit", table, "--kind", "n=Count(0)"], "most must be at least 1"),
        "hurdle": (["fit", table, "--kind", "x=Hurdle"], r"as Hurdle\(Positive, 0\), of Contin"),
        "hurdle of counts": (["fit", table, "--kind", "x=Hurdle(Count(3))"], "must be as Hurdle"),
        "class left out": (["fit", table, "--kind", "colour=Category(red, blue)"], "got green"),
        "names": (["fit", names], r"'who' \(300, such as 'p0'\); 'us' .*--drop who --drop us"),
        "few rows": (["fit", few, "--out", out], "at least 70 rows; got 20"),
        "fit into a file": (["fit", table, "--out", table], "must be a folder"),
        "no model": (["impute", "nowhere", table, "--out", out], "config.json is not there"),
        "no table of it": (["impute", str(plain), table, "--out", out], "columns.json is not"),
        "other table": (["sample", str(other)], "of another table than the model beside it"),
        "damaged": (["sample", str(damaged)], "config.json must be JSON as saved"),
        "no folder": ([*impute[:3], "--out", "no/such/d.nc"], "a file in a folder that exists"),
        "new class": (["impute", folder, new["pink"], "--out", out], "colour'; got pink"),
        "off its grid": (["impute", folder, new["off"], "--out", out], "'n'.*wider --kind"),
        "text": (["impute", folder, new["text"], "--out", out], "line 2: column 'x' must hold num"),
        "no columns": (["impute", folder, new["none"], "--out", out], "none of the model's"),
        "nothing missing": (["impute", folder, new["whole"], "--out", out], "nothing to impute"),
        "noise": ([*impute, "--noise", "x"], "--noise must be as weight=0.5; got 'x'"),
        "noise of 0": ([*impute, "--noise", "x=0"], "sd must be positive and finite; got 0"),
        "noise of none": ([*impute, "--noise", "y=1"], "no column 'y'"),
        "noise of text": ([*impute[:2], new["pink"], *impute[3:], "--noise", "colour=1"],
                          "for columns of numbers; 'colour' is of Category"),
        "bound of gaps": (["bound", folder, new["gap"]], "all rows have missing entries"),
        "array of a table": (["sample", str(plain)], "--out must end in .npy"),
    }  # fmt: skip


def test_what_is_wrong_is_said_in_one_line_with_status_2(tmp_path, table, model, capsys):
    cases = wrong(tmp_path, model)
    for case, (argv, message) in cases.items():
        assert cli.main(argv) == 2, case
        said = capsys.readouterr()
        assert said.out == "", case
        line = said.err.splitlines()[-1]
        assert line.startswith("probdiff: ") and re.search(message, line), (case, said.err)
    assert not (tmp_path / "d.nc").exists()


def test_what_computes_nothing_imports_nothing_slow(tmp_path, table):
    """In a fresh process: mistakes in files, columns, kinds and options are quick."""
    program = f"""
import sys
from probdiff import cli

for argv in (
    ["fit", "--help"], ["impute", "--help"], ["sample", "--help"], ["fti"], ["fit", "none.csv"],
    ["fit", {table!r}, "--drop", "y"], ["fit", {table!r}, "--kind", "x=Odd"],
    ["impute", "nowhere", {table!r}, "--out", "d.nc"], ["sample", "nowhere"],
    ["bound", "nowhere", {table!r}],
    ["impute", "nowhere", {table!r}, "--out", "d.nc", "--noise", "x=-1"],
):
    try:
        assert cli.main(argv) == 2
    except SystemExit:
        pass
slow = {{"sklearn", "scipy", "matplotlib", "jax", "numpyro", "flax", "xarray", "pandas"}}
found = slow & {{name.split(".")[0] for name in sys.modules}}
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _tree(values):
    return xr.DataTree.from_dict({"bound": xr.Dataset({"bound": ("example", values)})})


def test_the_report_says_when_a_baseline_is_better(model, monkeypatch):
    """By pairs, in the units of the table; and what is too slow may be left out."""
    _, described, diffusion, params = model
    data = {n: v for n, v in rows().items() if n != "id"}
    data["x"][7] = np.nan
    train, test = ({n: v[of] for n, v in data.items()} for of in (slice(100, None), slice(100)))
    test["n"] = np.minimum(test["n"], described.kinds["n"].most)
    k = np.random.default_rng(0).normal(-3, 2, 99)
    found = {"independent": k - 1, "mixture": k + 0.5 + 0.1 * np.sin(np.arange(99))}
    monkeypatch.setattr(diagnostics, "bound", lambda *_, **__: _tree(k))
    monkeypatch.setattr(
        diagnostics, "baselines", lambda *_: {n: _tree(of) for n, of in found.items()}
    )
    keys = jax.random.split(jax.random.key(0))
    lines = fit.judged(keys, described, diffusion, params, train, test)
    in_units = k - np.log(np.delete(data["price"][:100], 7))  # but for the noise of cents
    mean = float(re.search(r"diffusion, K +(\S+) ±", lines[2])[1])
    assert "log p of 99 held-out rows" in lines[0] and abs(mean - in_units.mean()) < 0.02
    assert "K less this   1.000 ± 0.000" in lines[3] and "K less this  -0.5" in lines[4]
    assert "The trained model is worse than mixture by 0.50" in lines[-1]
    assert "independent" not in lines[-1]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(diagnostics, "baselines", interrupted)
    assert len(fit.judged(keys, described, diffusion, params, train, test)) == 3


def test_equal_rows_are_held_out_together():
    """Those with the same entries missing, too."""
    x = np.repeat([[1.0, 2.0], [3.0, np.nan], [np.nan, 5.0]] + [[i, 0.0] for i in range(50)], 4, 0)
    data = {"a": x[:, 0], "b": x[:, 1]}
    for seed in range(5):
        is_out = fit.held_out(jax.random.key(seed), Table(data), data).reshape(-1, 4)
        assert (is_out == is_out[:, :1]).all() and is_out.any(1).sum() == 5


def test_names_are_such_as_netcdf_takes():
    names = ("a/b", "a_b", "draw", "chain", "row", "Temperatur °C", "x")
    safe = impute.safe(names)
    assert list(safe) == list(names) and len(set(safe.values())) == len(names)
    assert list(safe.values()) == ["a_b", "a_b_", "draw_", "chain_", "row_", "Temperatur °C", "x"]


def test_bound_of_rows_is_of_the_density_in_their_units(model, tmp_path, capsys):
    """K of the numbers, and the slope of the logarithm of a price."""
    folder, described, diffusion, params = model
    new = {n: v[:30].astype(object) for n, v in rows(seed=1).items()}
    new["n"][:] = np.minimum(new["n"], described.kinds["n"].most)
    new["x"][3], new["colour"][5] = None, None
    file = write(tmp_path / "new.csv.gz", new).removesuffix(".gz")
    (tmp_path / "new.csv.gz").rename(file)
    assert cli.main(["bound", folder, file, "--seed", "4"]) == 0
    said = capsys.readouterr()
    assert "2 of 30 rows have missing entries and are left out" in said.err
    assert "not in the model, left out: id" in said.err
    key = jax.random.key(4)
    encoded = described.encode(read_csv(file, described), key=jax.random.fold_in(key, 1))
    x_0 = np.delete(encoded.x_0, [3, 5], 0)
    k = diagnostics.bound(key, diffusion, params, x_0)["bound"]["bound"].values
    k -= x_0[:, described.place("price")][:, 0]  # log dz/dx = −z of z = log x
    with xr.open_datatree(f"{folder}/bounds-new.nc", engine="h5netcdf") as tree:
        np.testing.assert_allclose(tree["bound"]["bound"], k, rtol=1e-5)
        assert abs(tree["bound"].attrs["mean"] - k.mean()) < 1e-4
    assert f"K = {k.mean():.6g} ± {k.std(ddof=1) / 28**0.5:.2g} nats" in said.out


def test_sample_writes_rows_of_the_table(model, tmp_path, capsys):
    folder, described, *_ = model
    out = str(tmp_path / "more.csv")
    assert cli.main(["sample", folder, "--num", "40", "--out", out]) == 0
    data = read_csv(out, described)
    assert list(data) == list(described.names) and len(data["x"]) == 40
    assert described.encode(data).mask.all()
    assert data["n"].dtype == np.int64 and data["day"].dtype == "M8[D]"
    capsys.readouterr()
    assert cli.main(["sample", folder, "--num", "40"]) == 0
    assert capsys.readouterr().out == (tmp_path / "more.csv").read_text()
    (tmp_path / "model" / "columns.json").unlink()
    assert cli.main(["sample", folder, "--num", "40", "--out", str(tmp_path / "x.npy")]) == 0
    np.testing.assert_allclose(described.decode(np.load(tmp_path / "x.npy"))["x"], data["x"])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::probdiff.infer.InferenceWarning")
def test_what_is_missing_is_drawn_and_the_rest_kept(model, tmp_path, capsys):
    """Columns are independent: what is missing is about the mean, what has noise nearer to it."""
    folder, described, *_ = model
    new = {n: v[:20].astype(object) for n, v in rows(seed=1).items() if n not in ("day", "id")}
    new["n"][:] = 2
    new["x"][::2], new["price"][1::4], new["colour"][4:8], new["n"][5] = None, None, None, None
    for values in new.values():
        values[12] = None  # of which nothing is known
    file, out = write(tmp_path / "new.csv", new), str(tmp_path / "d.nc")
    argv = ["impute", folder, file, "--out", out, "--table", str(tmp_path / "i.csv")]
    argv += ["--particles", "200", "--runs", "2", "--draws", "150"]
    assert cli.main(argv) == 0
    said = capsys.readouterr()
    assert "not in the file, missing throughout: day" in said.err
    assert "20 rows, 20 with something to draw, of 1 nothing is known" in said.err
    with xr.open_datatree(out, engine="h5netcdf") as tree:
        draws = tree["posterior"].to_dataset().load()
        assert tree["smc"].sizes["row"] == 20
    assert dict(draws.sizes) == {"chain": 1, "draw": 150, "row": 20}
    for name, values in new.items():
        for i, value in enumerate(values):
            got = draws[name].values[0, :, i]
            assert (value is None and len(set(got)) > 1) or (got == value).all(), (name, i)
    x = draws["x"].values[0][:, ::2]
    assert abs(x.mean() - described.loc[0]) < 4 * described.scale[0] / (150 * 10) ** 0.5 + 0.3
    assert np.issubdtype(draws["day"].dtype, np.datetime64)
    lines = list(csv.DictReader((tmp_path / "i.csv").read_text().splitlines()))
    assert len(lines) == sum(v is None for values in new.values() for v in values) + 20
    for line in lines[:5]:
        assert f"row {line['row']:<6} {line['column']:6}" in said.out
    assert "more rows" in said.out


@pytest.mark.long
def test_entries_with_noise_are_drawn_towards_the_mean(model, tmp_path, capsys):
    """Columns N(m, s²): given y with noise 2 s, x is m + (y − m)/5; a count with little noise."""
    folder, described, *_ = model
    m, s = described.loc[0], described.scale[0]
    y = np.round(m + s * np.linspace(-2, 2, 16), 6)
    file = write(tmp_path / "new.csv", {"x": y, "n": np.arange(16) % 4 + 0.2})
    argv = ["impute", folder, file, "--out", str(tmp_path / "d.nc"), "--draws", "1000"]
    assert cli.main([*argv, "--noise", f"x={2 * s}", "--noise", "n=0.3", "--seed", "1"]) == 0
    with xr.open_datatree(tmp_path / "d.nc", engine="h5netcdf") as tree:
        x, n = (tree["posterior"][name].values[0] for name in ("x", "n"))
    assert abs(np.polyfit(y - m, x.mean(0) - m, 1)[0] - 0.2) < 0.05
    assert abs(x.std(0).mean() / s - 0.8**0.5) < 0.1
    near = np.arange(16) % 4
    assert (np.median(n, 0) == near).all() and (np.abs(n - near) <= 1).all()


@pytest.mark.long
def test_what_was_drawn_before_an_interrupt_is_kept(model, tmp_path, monkeypatch, capsys):
    file = write(tmp_path / "new.csv", {"x": np.full(7, 2.5)})
    argv = ["impute", model[0], file, "--out", str(tmp_path / "d.nc"), "--particles", "100"]
    monkeypatch.setattr(impute, "_AT_ONCE", 2)
    run, calls = infer.SMC.run, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) > 2:
            raise KeyboardInterrupt
        run(*args)

    monkeypatch.setattr(infer.SMC, "run", interrupted)
    assert cli.main(argv) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"probdiff: interrupted: 4 of 7 rows are in {argv[4]}"
    with xr.open_datatree(argv[4], engine="h5netcdf") as tree:
        assert tree["posterior"]["row"].values.tolist() == [1, 2, 3, 4]
        assert (tree["posterior"]["x"] == 2.5).all()
    (tmp_path / "d.nc").unlink()
    assert cli.main(argv) == 130  # before any
    assert capsys.readouterr().err.splitlines()[-1] == "probdiff: interrupted; nothing was written"
    assert not (tmp_path / "d.nc").exists()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_from_a_file_to_a_posterior(table, tmp_path, capsys):
    """All commands of a table in a row, with a few steps of training."""
    folder = str(tmp_path / "m")
    assert cli.main(["fit", table, "--drop", "id", "--out", folder, "--steps", "3"]) == 0
    said = capsys.readouterr().out
    assert "diffusion, K" in said and "mixture" in said and "K less this" in said
    names = {"columns.json", "config.json", "params.safetensors", "report.md"}
    assert {file.name for file in (tmp_path / "m").iterdir()} == names
    new = {n: v[:3].astype(object) for n, v in rows().items() if n != "id"}
    file = write(tmp_path / "new.csv", new)
    assert cli.main(["bound", folder, file, "--ladder", "4"]) == 0
    assert "SMC, S = 4" in capsys.readouterr().out
    new["x"][0] = new["colour"][1] = None
    file, out = write(tmp_path / "new.csv", new), str(tmp_path / "d.nc")
    argv = ["impute", folder, file, "--out", out, "--particles", "20", "--runs", "1"]
    assert cli.main(argv) == 0
    assert "row 1      x       " in capsys.readouterr().out
    more = str(tmp_path / "more.csv")
    assert cli.main(["sample", folder, "--num", "10", "--out", more]) == 0
    assert len(read_csv(more)["x"]) == 10
