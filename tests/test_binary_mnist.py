"""The binary images' run: its files, its table, and going on after a stop. Data are made up."""

import json

import jax
import numpy as np
import pytest
import xarray as xr

from probdiff import datasets, load
from probdiff.experiments import binary_mnist


@pytest.fixture
def made_up(monkeypatch):
    """Images of a thick horizontal bar each, in place of the real ones."""

    def bars(n, seed):
        rows = np.random.default_rng(seed).integers(4, 20, n)
        return (np.abs(np.arange(28)[None, :, None] - rows[:, None, None]) < 3).repeat(28, 2)

    splits = [bars(n, i).astype(np.uint8) for i, n in enumerate((300, 40, 60))]
    data = datasets.BinarisedMnist(*splits)
    monkeypatch.setattr(datasets, "binarised_mnist", lambda: data)
    return data


@pytest.mark.long
def test_run_leaves_its_files_and_goes_on_from_them(made_up, tmp_path):
    rows = binary_mnist.EXPERIMENT.run(tmp_path / "a", quick=True, progress=False)
    files = {p.name for p in (tmp_path / "a").iterdir()}
    assert {"report.md", "table.json", "curve.png", "samples.png", "bounds.nc"} <= files
    tree = xr.open_datatree(tmp_path / "a" / "bounds.nc", engine="h5netcdf")
    assert rows[0].value == pytest.approx(-float(tree["bound"]["bound"].mean()), rel=1e-5)
    tree.close()
    diffusion, params = load(tmp_path / "a")
    assert diffusion.T == binary_mnist.SMALL.T
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))

    curve = json.loads((tmp_path / "a" / "curve.json").read_text())
    assert [p["step"] for p in curve] == [2 * i for i in range(1, 11)]
    assert rows[1].value == pytest.approx(-curve[-1]["mean"])
    assert curve[-1]["mean"] > curve[0]["mean"]  # it learns
    # a second run in the same folder goes on from the finished training
    again = binary_mnist.EXPERIMENT.run(tmp_path / "a", quick=True, progress=False)
    assert [tuple(r) for r in again] == [tuple(r) for r in rows]
