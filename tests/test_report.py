"""The report of a run: what is rounded, what is absent, and what is left on disk."""

import json
import math

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from probdiff.experiments.report import QUICK, Row, format_table, write_report

ROWS = [
    Row("K, test part", -0.136427, 0.00423, "bits per point", 0.1, 2.35),
    Row("draws on the roll", 0.9871),
]


def cells(row):
    return [cell.strip("| ") for cell in format_table([row]).splitlines()[-1].split(" | ")]


def test_table_is_aligned_with_dashes_for_what_is_absent():
    assert format_table(ROWS).splitlines() == [
        "| row               | value            | unit           | ceiling | published |",
        "|-------------------|------------------|----------------|---------|-----------|",
        "| K, test part      | -0.1364 ± 0.0042 | bits per point | 0.1000  | 2.350     |",
        "| draws on the roll | 0.9871           | –              | –       | –         |",
    ]


def test_a_column_in_which_every_row_is_empty_is_left_out_of_the_table_alone(tmp_path):
    rows = [Row("a", 1.0, None, "nats"), Row("b", None)]
    assert format_table(rows).splitlines() == [
        "| row | value | unit |",
        "|-----|-------|------|",
        "| a   | 1.000 | nats |",
        "| b   | –     | –    |",
    ]
    assert format_table([Row("b", None)]).splitlines()[0] == "| row | value |"
    write_report(tmp_path, "t", rows)
    table = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert all(set(line) == set(Row._fields) for line in table)


@pytest.mark.parametrize(
    ("value", "se", "shown"),
    [
        (None, None, "–"),
        (None, 0.1, "–"),
        (1234.5678, 12.3, "1235 ± 12"),
        (1234.5678, 0.0999, "1234.568 ± 0.100"),
        (1.5, 0.0, "1.500 ± 0"),
        (2.0, 3e-9, "2 ± 3.0e-09"),
        (10_000, None, "10000"),
        (0, None, "0"),
        (0.00012345, None, "0.0001234"),
        (3e-7, None, "3e-07"),
        (-math.inf, math.nan, "-inf ± nan"),
        (jnp.float32(0.25), jnp.float32(0.5), "0.25 ± 0.50"),
    ],
)
def test_value_is_rounded_by_its_standard_error(value, se, shown):
    assert cells(Row("r", value, se))[1] == shown


def test_a_bar_in_a_name_does_not_end_its_cell():
    assert r"log p(x \| y)" in format_table([Row("log p(x | y)", 1.0)])


def test_report_holds_title_table_sections_and_figures(tmp_path):
    figure, axes = plt.subplots()
    axes.plot([0, 1])
    path = write_report(
        tmp_path / "runs" / "roll",
        "Swiss roll",
        ROWS,
        sections={"Settings": "T = 40\n"},
        figures={"drift": figure},
    )
    assert not plt.fignum_exists(figure.number)
    text = path.read_text(encoding="utf-8")
    parts = ["# Swiss roll", format_table(ROWS), "## Settings", "T = 40", "![drift](drift.png)"]
    assert text == "\n\n".join(parts) + "\n"
    assert (path.parent / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_a_quick_run_says_so_first_and_data_lie_beside_the_report(tmp_path):
    tree = xr.DataTree.from_dict({"bound": xr.Dataset({"bound": ("example", [1.0, 2.0])})})
    path = write_report(
        tmp_path, "t", ROWS, sections={"Settings": "T = 40"}, trees={"bounds": tree}, quick=True
    )
    parts = path.read_text(encoding="utf-8").split("\n\n")
    assert parts[2:5] == ["## Quick run", QUICK, "## Settings"]
    kept = xr.open_datatree(tmp_path / "bounds.nc", engine="h5netcdf")
    np.testing.assert_array_equal(kept["bound"]["bound"], [1.0, 2.0])


def test_table_json_holds_the_rows_unrounded(tmp_path):
    write_report(tmp_path, "t", [*ROWS, Row("log Z", -math.inf, jnp.float32(0.5), "nats")])
    table = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert table[0] == {
        "row": "K, test part",
        "value": -0.136427,
        "se": 0.00423,
        "unit": "bits per point",
        "ceiling": 0.1,
        "published": 2.35,
    }
    assert [table[1][name] for name in ("se", "unit", "ceiling", "published")] == [None] * 4
    assert (table[2]["value"], table[2]["se"]) == (None, 0.5)


def test_a_rerun_leaves_the_same_files(tmp_path):
    first = write_report(tmp_path, "t", ROWS).read_bytes(), (tmp_path / "table.json").read_bytes()
    again = write_report(tmp_path, "t", ROWS).read_bytes(), (tmp_path / "table.json").read_bytes()
    assert first == again


def test_a_figure_stays_in_the_folder_of_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"plain file names; got '\.\./drift'"):
        write_report(tmp_path, "t", ROWS, figures={"../drift": plt.figure()})
