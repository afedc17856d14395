"""Descriptions of tables as files: what comes back, and damage that is named."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from probdiff import Table
from probdiff.tables import (
    Bounded,
    Category,
    Continuous,
    Count,
    HeavyTailed,
    Kind,
    Ordered,
    Positive,
    Rounded,
)
from test_tables import columns

KINDS = {
    "length": HeavyTailed(0.1, 1 / 3), "size": Positive(step=1e-9),
    "share": Bounded(low=-1e-3, high=1 + 1e-9), "half": Rounded(0.5, -20.0, 20.0),
    "children": Count(77), "colour": Ordered(("red", "green", "blue")),
    "level": Ordered((3, 1, 2)), "flag": Category((True, False)), "grade": Category((0.1, 2.5)),
}  # fmt: skip


def data():
    """Every kind, origins of every type, dates of several units, constants of every type."""
    rng, n = np.random.default_rng(3), 400
    late = np.datetime64("2024-05-06T07:08:09.123456789") + rng.integers(0, 10**12, n)
    return columns() | {
        "share": rng.random(n), "level": rng.integers(1, 4, n), "flag": rng.random(n) < 0.5,
        "grade": rng.choice([0.1, 2.5], n), "late": late, "hour": late.astype("M8[h]"),
        "span": rng.integers(0, 99, n).astype("m8[s]"), "julian": 2459000.1 + 0.1 * rng.random(n),
        "big": 2**60 + rng.integers(0, 2**40, n), "is": np.full(n, True), "word": np.full(n, "ü"),
        "at": np.full(n, np.datetime64("2020-01-01T10", "ns")), "third": np.full(n, 1 / 3),
        "wait": np.full(n, np.timedelta64(5, "m")), "two dates": rng.choice(late[:2], n),
    }  # fmt: skip


@pytest.mark.parametrize("form", [dict, pd.DataFrame])
def test_a_table_comes_back_from_its_file(form, tmp_path):
    """The same numbers of rows, and rows of numbers, bit for bit and in their own types."""
    table = Table(form(data()), kinds=KINDS)
    table.save(tmp_path / "t.json")
    again = Table.load(str(tmp_path / "t.json"))
    assert repr(again) == repr(table) and again.kinds == table.kinds
    assert again.last_step == table.last_step
    for name in table.names:
        origins = table.origin(name), again.origin(name)
        assert origins[0] == origins[1] and type(origins[0]) is type(origins[1])
        types = [[type(v) for v in vars(t.kinds[name]).values()] for t in (table, again)]
        assert types[0] == types[1]
    for a, b in ((table.loc, again.loc), (table.scale, again.scale)):
        assert a.dtype == b.dtype and (a == b).all()
    rows, rows_again = (t.encode(form(data())) for t in (table, again))
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(rows, rows_again, strict=True))
    x = rows.x_0 + 0.01
    decoded, decoded_again = table.decode(x), again.decode(x)
    assert type(decoded) is type(decoded_again)
    for name in table.names:
        a, b = np.asarray(decoded[name]), np.asarray(decoded_again[name])
        assert a.dtype == b.dtype and ((a == b) | (a != a)).all(), name


def test_a_file_that_is_there_is_replaced(tmp_path):
    Table({"x": [0.0, 1.5, 4.0]}).save(tmp_path / "t.json")
    Table({"y": [0.0, 1.5, 4.0]}).save(tmp_path / "t.json")
    assert Table.load(tmp_path / "t.json").names == ("y",)


def test_kinds_of_ones_own_are_not_saved(tmp_path):
    class Own(Continuous):
        pass

    assert issubclass(Own, Kind)
    with pytest.raises(ValueError, match=r"kinds must be of .*'Rounded'\] to be saved; got Own"):
        Table({"x": [0.0, 1.5, 4.0]}, kinds={"x": Own()}).save(tmp_path / "t.json")
    assert not list(tmp_path.iterdir())


def _column(place, **changes):
    return lambda content: content["columns"][place].update(changes)


EDITS = {
    "other format": (lambda c: c.update(format=2), "must have format 1; got 2"),
    "no format": (lambda c: c.pop("format"), "must have format 1; got None"),
    "no loc": (lambda c: c.pop("loc"), "the file in .* must hold .*missing: 'loc', unknown: none"),
    "more": (lambda c: c.update(more=1), "missing: none, unknown: 'more'"),
    "no columns": (lambda c: c.update(columns=[]), "columns of the file .*must be a list"),
    "loc of text": (lambda c: c.update(loc=["a"]), "loc of the file .*must be a list of numbers"),
    "loc too long": (lambda c: c["loc"].append(1.0), "loc and scale of 2 numbers"),
    "loc not finite": (lambda c: c.update(loc=[float("nan"), 0.5]), "that are finite"),
    "scale of zero": (lambda c: c.update(scale=[0.0, 0.5]), "scale above 0"),
    "form": (lambda c: c.update(form="polars"), "form numpy or pandas"),
    "column of text": (lambda c: c.update(columns=["a", "b"]), r"columns\[0\] in .* must hold"),
    "no name": (lambda c: c["columns"][1].pop("name"), r"columns\[1\].*missing: 'name'"),
    "empty name": (_column(0, name=""), r"name of columns\[0\] .*must be a text"),
    "name twice": (_column(0, name="c"), "names of columns, all different"),
    "unknown kind": (_column(0, kind={"type": "Odd"}), r"kind of columns\[0\] .*: 'Odd'"),
    "kind of text": (_column(0, kind="Count"), r"kind of columns\[0\]"),
    "field of kind": (_column(0, kind={"type": "Count", "most": 0}), "most must be at least 1"),
    "more of kind": (_column(0, kind={"type": "Count", "least": 0}), "argument 'least'"),
    "values": (_column(1, kind={"type": "Category", "values": ["a"]}), "at least 2"),
    "type": (_column(0, dtype="f8, f8"), r"dtype of columns\[0\].*no type of a column"),
    "origin of text": (_column(0, origin="1"), r"origin of columns\[0\].*a number or a date"),
    "origin a date": (_column(0, origin={"dtype": "<M8[D]", "count": 3}), "the origin of dates"),
    "missing": (_column(0, missing=-1), r"missing of columns\[0\].*must be a count"),
    "another loc": (lambda c: c.update(loc=[1.0, 0.5]), "its checksum is another"),
    "another name": (_column(0, name="z"), "its checksum is another"),
}  # fmt: skip


@pytest.mark.parametrize("case", EDITS)
def test_an_edited_file_is_refused_by_the_field(case, tmp_path):
    edit, message = EDITS[case]
    file = tmp_path / "t.json"
    Table({"x": [0.0, 1.5, 4.0], "c": ["a", "b", "a"]}).save(file)
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        Table.load(file)
    assert str(file) in str(error.value)


def test_a_damaged_file_is_refused(tmp_path):
    """Cut anywhere, or a bit turned anywhere."""
    file, rng = tmp_path / "t.json", np.random.default_rng(0)
    Table({"x": [0.0, 1.5, 4.0], "c": ["a", "b", "a"]}).save(file)
    whole = file.read_bytes()
    for place in rng.integers(0, len(whole), 100):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        for damaged in (whole[:place], bytes(flipped)):
            file.write_bytes(damaged)
            try:
                same = Table.load(file)
            except ValueError as error:
                assert str(file) in str(error)
            else:  # white space
                assert json.loads(damaged) == json.loads(whole) and same.names == ("x", "c")
    file.unlink()
    with pytest.raises(ValueError, match=r"t\.json is not there"):
        Table.load(file)
    file.write_bytes(b"[" * 10**6)
    with pytest.raises(ValueError, match="must be JSON as saved"):
        Table.load(file)
    assert re.fullmatch("[0-9a-f]{64}", json.loads(whole)["sha256"])
