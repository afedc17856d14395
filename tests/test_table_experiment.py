"""Tables: the known law, the files, and the run in small."""

import os

import numpy as np
import pytest

from probdiff import datasets
from probdiff.experiments import tables


def test_the_known_law_is_one():
    """Summed over classes, levels and counts and integrated over two numbers it is t(3)."""
    side = np.linspace(-6, 6, 61)
    u, v, rounded, count = (a.ravel() for a in np.meshgrid(
        side, side, np.arange(-14.0, 15.0), np.arange(25), sparse=False
    ))  # fmt: skip
    data = {"u": u, "v": v, "rounded": rounded, "count": count, "tail": 0.5 * u + 1.0}
    total = sum(
        np.exp(tables.known_log_p(data | {"regime": np.full(u.shape, regime)})).sum()
        for regime in ("low", "high")
    ) * (side[1] - side[0]) ** 2  # fmt: skip
    assert total == pytest.approx(0.2067, abs=2e-3)  # t(3) at 1 is 3√3/8π
    drawn = tables.known_law(0, 4_000)
    gap = tables.known_log_p(drawn)
    assert np.isfinite(gap).all() and set(drawn["regime"]) == {"low", "high"}


@pytest.mark.skipif("PROBDIFF_DATA" not in os.environ, reason="PROBDIFF_DATA is not set")
@pytest.mark.parametrize("name, rows", [("red_wine", 1_599), ("protein", 45_730)])
def test_published_tables_are_read(name, rows):
    try:
        data = getattr(datasets, name)()
    except ConnectionError as error:
        pytest.skip(str(error))
    assert {column.shape for column in data.values()} == {(rows,)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::probdiff.infer.InferenceWarning")
def test_a_run_leaves_table_figures_and_model(tmp_path):
    rows = tables.EXPERIMENT.run(tmp_path, quick=True, progress=False)
    names = {file.name for file in tmp_path.iterdir()}
    assert {"report.md", "table.json", "density.png", "intervals.png"} <= names
    found = {row.row: float(row.value) for row in rows}
    assert all(np.isfinite(list(found.values())))
    assert found["iris: K − independent, paired"] > 1.0
