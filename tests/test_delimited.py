"""Tables as text: what people's files are like, and what is wrong with them by its line."""

import bz2
import gzip
import lzma

import numpy as np
import pandas as pd
import pytest

from probdiff import Table, delimited
from probdiff.tables import Category, Continuous, Ordered, read_csv


@pytest.fixture
def read(tmp_path):
    """Columns of a text, and what was noted."""

    def of(text, missing=(), name="t.csv"):
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / name).write_bytes(data)
        cells = delimited.read(tmp_path / name, missing)
        return {n: delimited.values(cells, n) for n in cells.columns}, cells.notes

    return of


def lists(columns):
    return {name: values.tolist() for name, values in columns.items()}


TEXT = "a,b,c\n1,x,0.5\n2,y z,-1e-3\n3,,.25\n"
VALUES = {"a": [1, 2, 3], "b": ["x", "y z", None], "c": [0.5, -0.001, 0.25]}


@pytest.mark.parametrize(
    "change",
    {
        "as it is": lambda t: t, "semicolons": lambda t: t.replace(",", ";"),
        "tabs": lambda t: t.replace(",", "\t"), "bars": lambda t: t.replace(",", "|"),
        "blanks": lambda t: t.replace(",", " , "), "Windows": lambda t: t.replace("\n", "\r\n"),
        "old Mac": lambda t: t.replace("\n", "\r"), "no last end": lambda t: t[:-1],
        "empty lines": lambda t: "\n" + t.replace("\n", "\n\n"), "BOM": lambda t: "\ufeff" + t,
        "UTF-16": lambda t: t.encode("utf-16"), "gzip": lambda t: gzip.compress(t.encode()),
        "xz": lambda t: lzma.compress(t.encode()), "bzip2": lambda t: bz2.compress(t.encode()),
        "Excel": lambda t: "sep=;\n" + t.replace(",", ";"), "comment": lambda t: "# by me, 3\n" + t,
        "quotes": lambda t: '"' + t.replace(",", '","').replace("\n", '"\n"')[:-1],
        "blank lines": lambda t: t + " \n\t\n\n",
    }.values(),
)  # fmt: skip
def test_a_file_is_read_whatever_wrote_it(read, change):
    columns, notes = read(change(TEXT))
    assert lists(columns) == VALUES and not notes
    assert columns["a"].dtype == np.int64


@pytest.mark.parametrize("gone", ["", "NA", "na", "N/A", "NaN", "?", "null", "<NA>", '""', "-99"])
def test_missing_cells_are_missing_in_every_kind(read, gone):
    text = f"x,n,d,c\n1.5,1,2024-05-06,a\n{gone},{gone},{gone},{gone}\n"
    columns, _ = read(text, missing=("-99",))
    assert np.isnan(columns["x"][1]) and np.isnan(columns["n"][1]) and np.isnat(columns["d"][1])
    assert columns["c"].tolist() == ["a", None]


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", "+2", "\u22123"], [1, 2, -3]),
        (["1,234.50", "12", "1,234,567"], [1234.5, 12, 1234567]),
        (["3,14", "2,5"], [3.14, 2.5]),
        (["1.234,5", "1.234,0"], [1234.5, 1234.0]),
        (["1\u202f234", "5"], [1234, 5]),
        (["9007199254740993", ""], [9007199254740993, None]),
        (["12345678901234567890", "1"], [12345678901234567890.0, 1.0]),
        (["01234", "00501"], ["01234", "00501"]),
        (["0", "0.5", "-0"], [0.0, 0.5, -0.0]),
        (["1_000", "2"], ["1_000", "2"]),
        (["inf", "1"], [np.inf, 1.0]),
        (["True", "False"], ["True", "False"]),
        (["1", "2", "a"], ["1", "2", "a"]),
        (["2024-02-30", "x"], ["2024-02-30", "x"]),
        (["none", "None"], ["none", "None"]),
    ],
)
def test_cells_are_what_they_look_like(read, cells, values):
    columns, notes = read("x|y\n" + "".join(f"{c}|0\n" for c in cells))
    assert columns["x"].tolist() == values
    assert bool(notes) == any("," in c for c in cells)


def test_a_comma_is_the_point_after_semicolons_and_parts_thousands_after_commas(read):
    columns, notes = read("x;y\n1,234;1\n5,678;2\n")
    assert columns["x"].tolist() == [1.234, 5.678] and notes == [
        "a comma is the point: 1,234 is 1.234, in column 'x'"
    ]
    columns, notes = read('x,y\n"1,234",1\n"5,678",2\n')
    assert columns["x"].tolist() == [1234, 5678] and notes == [
        "commas part thousands: 1,234 is 1234, in column 'x'"
    ]


def test_dates_keep_their_unit_and_come_into_utc(read):
    text = "a,b,c\n2024-05-06,2024-05-06 07:08,2024-05-06T01:00:00.25+02:00\n"
    columns, notes = read(text + "2024-05-07,2024-05-06T07:09:10,2024-05-06T01:00Z\n")
    assert [columns[n].dtype.str for n in "abc"] == ["<M8[D]", "<M8[s]", "<M8[ms]"]
    assert columns["c"].astype(str).tolist() == [
        "2024-05-05T23:00:00.250", "2024-05-06T01:00:00.000"
    ]  # fmt: skip
    assert notes == ["column 'c': times are turned into UTC"]
    before = read("a\n2024-05-06 00:10-00:30\n")[0]["a"]
    assert before.astype(str).tolist() == ["2024-05-06T00:40"]


def test_headers_are_found_or_asked_for(read):
    savetxt = "# a, b\n1.0,2.0\n3.0,4.5\n"
    columns, notes = read(savetxt)
    assert lists(columns) == {"a": [1, 3], "b": [2, 4.5]} and "comment" in notes[0]
    assert list(read("0,1,2\n1.5,2.5,3.5\n")[0]) == ["0", "1", "2"]
    pandas = pd.DataFrame({"u": [1.5, 2.5], "v": ["a", "b"]}).to_csv()
    columns, notes = read(pandas)
    assert list(columns) == ["u", "v"] and "names of rows" in notes[0]
    columns, _ = read('"u" "v"\n"1" 1.5 2\n'.replace(" ", "\t"))  # R's write.table
    assert lists(columns) == {"u": [1.5], "v": [2]}
    columns, notes = read("a,b,\n1,2,\n3,4,\n")
    assert list(columns) == ["a", "b"] and "column 3" in notes[0]
    assert lists(read("a,b\n,\n1,2\n")[0])["b"][1] == 2  # a row of nothing is a row
    assert read("one\n1\n\n3\n")[0]["one"].tolist() == [1, 3]


def test_quotes_hold_delimiters_quotes_and_ends_of_lines(read):
    text = 'a,"b\nc"\n1,"x, ""y"""\n2,"two\r\nlines"\n3,plain\n'
    columns, _ = read(text)
    assert columns["b\nc"].tolist() == ['x, "y"', "two\r\nlines", "plain"]
    with pytest.raises(ValueError, match=r"line 7: 3 cells where the header has 2, split at ','"):
        read(text + "4,5,6\n")


def test_a_file_of_windows_is_read_and_said_to_be(read):
    columns, notes = read("größe,b\n1,café\n2,naïve\n".encode("cp1252"))
    assert columns["b"].tolist() == ["café", "naïve"] and list(columns) == ["größe", "b"]
    assert notes == ["it is not UTF-8: read as Windows-1252"]


WRONG = {
    "ragged": ("a,b\n1,2\n3\n", "line 3: 1 cells where the header has 2"),
    "twice": ("a,b,a\n1,2,3\n", "columns 1 and 3 must not both be called 'a'"),
    "no header": ("1.5,2\n3,4\n", "must have a header.*got '1.5,2'"),
    "no name": ("a,,c\n1,2,3\n", "column 2 must have a name"),
    "empty": ("", "is empty"), "blank": ("\n \n", "is empty"), "no rows": ("a,b\n", "rows below"),
    "open quote": ('a,b\n1,"2\n3,4\n', "line 2: unexpected end of data; is a quote"),
    "binary": (b"\x89PNG\r\n\0\0\0", "it is not text"),
    "workbook": (b"PK\x03\x04abc", "workbook or an archive; save it as CSV"),
    "cut": (gzip.compress(b"a,b\n" * 999)[:-9], "cannot be decompressed"),
    "cut xz": (lzma.compress(b"a,b\n" * 999)[:-9], "cannot be decompressed"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_its_line(read, case):
    text, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as error:
        read(text)
    assert "t.csv" in str(error.value) and "\n" not in str(error.value)


def test_a_stray_text_among_numbers_or_dates_is_named(read):
    rows = "".join(f"{i}.5,2024-01-{i:02}\n" for i in range(1, 30))
    for stray, what in (("n.d.,2024-01-30", "numbers"), ("1.5,30.1.2024", "dates")):
        with pytest.raises(ValueError, match=rf"line 31: column '.' must hold {what}.*; got '"):
            read("x,d\n" + rows + stray + "\n")


def test_a_folder_or_nothing_is_no_table(tmp_path):
    with pytest.raises(ValueError, match=r"no such file: nowhere\.csv"):
        read_csv("nowhere.csv")
    with pytest.raises(ValueError, match="is a folder"):
        read_csv(tmp_path)


def test_new_rows_are_read_as_the_table_has_them(tmp_path):
    """Codes of few rows look like numbers, and empty columns like nothing."""
    data = {
        "code": ["1", "b", "2", "b"], "x": [0.1, 0.25, 7.0, 1.0], "level": [1, 2, 3, 1],
        "d": np.array(["2024-05-06", "2024-05-07", "2024-06-07", "2024-06-07"], "M8[D]"),
        "flag": [True, False, True, True], "one": ["07"] * 4, "none": [None] * 4,
    }  # fmt: skip
    table = Table(data, kinds={"level": Ordered((1, 2, 3)), "x": Continuous()})
    file = tmp_path / "t.csv"
    file.write_text("one,level,code,d,x,flag,more\n07,3,1,,01,true,z\n,,2,2024-06-01,,FALSE,z\n")
    rows = table.encode(read_csv(file, table))
    again = table.decode(np.nan_to_num(rows.x_0))
    assert again["code"].tolist() == ["1", "2"] and again["level"][0] == 3 and again["x"][0] == 1
    assert again["flag"].tolist() == [True, False] and str(again["d"][1]) == "2024-06-01"
    seen = {n: rows.mask[:, table.place(n)][:, :1].ravel().tolist() for n in ("d", "x", "level")}
    assert seen == {"d": [False, True], "x": [True, False], "level": [True, False]}
    assert isinstance(table.kinds["flag"], Category)
    for column, cell, what in (("x", "a", "numbers"), ("d", "5", "dates"), ("flag", "a", "True")):
        file.write_text(f"one,{column}\n07,{cell}\n")
        with pytest.raises(ValueError, match=f"line 2: column '{column}' must hold {what}"):
            read_csv(file, table)
