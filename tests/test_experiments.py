"""Experiments run from end to end in a few steps: what they leave, and that a seed fixes it."""

import json

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from probdiff import datasets, diagnostics, load
from probdiff.experiments import (
    TABLE,
    conditioning,
    ddpm_swiss_roll,
    digits,
    find,
    restoration,
    swiss_roll,
)
from probdiff.experiments.report import QUICK, Row, above_ceiling, mean_and_se, verdict

FILES = {"report.md", "table.json", "bounds.nc", "params.safetensors", "config.json"}
FIGURES = {
    swiss_roll: {
        "figure_1.png", "samples.png", "bound_per_step.png", "losses.png", "denoising.png",
        "ladder.png",
    },
    ddpm_swiss_roll: {"trajectories.png", "samples.png", "kl_per_step.png", "losses.png"},
    digits: {
        "samples.png", "bound_per_step.png", "losses.png", "denoised.png", "inpainted.png",
    },
}  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[swiss_roll, pytest.param(ddpm_swiss_roll, marks=pytest.mark.slow), digits],
    ids=["swiss-roll", "ddpm-swiss-roll", "digits"],
)
def finished(request, tmp_path_factory):
    """An experiment, the folder it filled, its rows and what it said."""
    folder, said = tmp_path_factory.mktemp("run"), []
    rows = request.param.EXPERIMENT.run(folder, seed=3, quick=True, progress=False, say=said.append)
    return request.param, folder, rows, said


def test_a_run_leaves_its_files(finished):
    experiment, folder, _, said = finished
    assert {file.name for file in folder.iterdir()} == FILES | FIGURES[experiment]
    assert said


def test_the_table_holds_the_rows(finished):
    _, folder, rows, _ = finished
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    assert [set(line) for line in table] == [set(Row._fields)] * len(rows)
    assert [line["row"] for line in table] == [row.row for row in rows]
    assert all(np.isfinite(line["value"]) for line in table)


def test_the_report_says_that_a_quick_run_means_nothing(finished):
    assert QUICK in (finished[1] / "report.md").read_text(encoding="utf-8")


def test_the_saved_bounds_are_those_of_the_table(finished):
    _, folder, rows, _ = finished
    with xr.open_datatree(folder / "bounds.nc", engine="h5netcdf") as tree:
        attrs, values = tree["bound"].attrs, tree["bound"]["bound"].values
    assert rows[0].value == pytest.approx(
        attrs["mean_bits" if rows[0].unit.startswith("bits") else "mean"], rel=1e-5
    )
    assert attrs["mean"] == pytest.approx(values.mean(), rel=1e-5)


def test_the_saved_model_bounds_data_as_before(finished):
    """The bound of the saved model on fresh data is near the one that was reported."""
    experiment, folder, rows, _ = finished
    diffusion, params = load(folder)
    if experiment is digits:
        x = digits.copies(jax.random.key(5), datasets.digits().test[:50], 1)
        reported, se = rows[0].value, rows[0].se
    else:
        x = datasets.swiss_roll(jax.random.key(5), 300, noise=experiment.NOISE)
        reported, se = rows[0].value * np.log(2), rows[0].se * np.log(2)
    again = diagnostics.bound(jax.random.key(6), diffusion, params, x)["bound"].attrs
    assert abs(again["mean"] - reported) < 4 * np.hypot(again["se"], se)


def test_figures_are_closed(finished):
    assert plt.get_fignums() == []


@pytest.mark.parametrize("finished", [digits], ids=["digits"], indirect=True)
def test_the_same_seed_gives_the_same_table(finished, tmp_path):
    experiment, folder, _, _ = finished
    experiment.EXPERIMENT.run(tmp_path, seed=3, quick=True, progress=False)
    for name in ("table.json", "report.md"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("finished", [digits], ids=["digits"], indirect=True)
def test_coverage_has_a_ceiling_and_the_report_says_where_more_particles_are(finished):
    _, folder, rows, _ = finished
    ceilings = [row.ceiling for row in rows if conditioning.COVERAGE in row.row]
    assert ceilings == [0.9, 0.9]
    text = " ".join((folder / "report.md").read_text(encoding="utf-8").split())
    assert "`probdiff run inpaint` takes more of them" in text
    assert restoration.INPAINT.sizes["cpu"].num_particles > digits.Size().particles


@pytest.mark.long
def test_ceilings_of_the_roll():
    """Figures computed by another program, good to 0.02."""
    for beta, expected in ((1e-4, 0.10), (1e-3, -0.87), (0.0, 0.38)):
        value, se = swiss_roll.ceiling(jax.random.key(0), 4000, beta)
        assert abs(value - expected) < 4 * se + 0.02


def test_a_row_above_its_ceiling_is_named():
    rows = [
        Row("K, fine", 0.12, 0.01, "bits", 0.1),
        Row("K, too high", 0.16, 0.01, "bits", 0.1),
        Row("K, no ceiling", 9.0, 0.01),
        Row("no bound", 9.0, 0.01, "bits", 0.1),
        Row("ladder, 4 points: K", 0.11, 0.0, "bits", 0.1),
        Row("K (tied), T = 20", -4.84, 0.001, "bits", -4.8426),
        Row("K (tied), T = 100", -2.90, 0.01, "bits", -2.9737),
        Row("K − best, paired: a", 0.5, 0.1, "bits", 0.0),
    ]
    known = ["K, too high", "ladder, 4 points: K", "K (tied), T = 100", "K − best, paired: a"]
    assert above_ceiling(rows, 0.001) == known
    assert above_ceiling(rows, 0.02) == known[2:]
    assert "K (tied), T = 100, K − best, paired: a. This is a bug" in verdict(rows, 0.02)
    assert verdict(rows[:1]).startswith("No bound is above")


def test_data_are_as_often_off_the_roll_as_they_should_be():
    """Draws of a perfect model: data, noisy as a tied last step leaves them."""
    keys = jax.random.split(jax.random.key(1), 4)
    held_out, x = (datasets.swiss_roll(k, 4000, noise=swiss_roll.NOISE) for k in keys[:2])
    noise = swiss_roll.BETA_1 * (2 - swiss_roll.BETA_1)
    perfect = np.sqrt(1 - noise) * x + np.sqrt(noise) * jax.random.normal(keys[2], x.shape)
    share, se = swiss_roll.share_off_roll(keys[3], perfect, held_out)
    # the edge is a quantile of 4000 points and errs by as much as the share
    assert abs(share - 1) < 4 * np.sqrt(2) * se


def test_brute_force_finds_a_gaussian_posterior():
    """x ~ N(0, I), y = x + ε with sd σ: p(y) = N(0, 1 + σ²), E[x | y] = y / (1 + σ²)."""
    x = np.asarray(jax.random.normal(jax.random.key(2), (100_000, 2)))
    y = np.array([[0.0, 0.5], [1.0, -1.5]])
    log_p, se, mean = swiss_roll.by_force(y, x)
    variance = 1 + swiss_roll.SIGMA**2
    exact = np.sum(-0.5 * y**2 / variance - 0.5 * np.log(2 * np.pi * variance), 1)
    assert (np.abs(log_p - exact) < 4 * se).all() and (se < 0.02).all()
    np.testing.assert_allclose(mean, y / variance, atol=0.02)


def test_drift_of_an_untrained_model_shrinks_towards_zero():
    """A perturbation of 0 is the diffusion of N(0, I), whose reverse step is √(1−β) x."""
    diffusion = swiss_roll.define(40)
    svi_params = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), diffusion.params_template
    )
    grid, (drift,) = swiss_roll.drift_fields(diffusion, svi_params, [30])
    shrink = np.sqrt(1 - diffusion.schedule[29]) - 1
    np.testing.assert_allclose(drift, shrink * grid, atol=1e-5)


def test_copies_of_an_image_are_one_example():
    copies = digits.HELD_OUT_COPIES
    values = np.r_[np.arange(copies), 10 + np.arange(copies)].astype(float)
    group = xr.Dataset(
        {"bound": ("example", values), "kl": (("example", "step"), np.outer(values, [1, 2]))},
        coords={"example": np.arange(2 * copies), "step": [2, 3]},
        attrs={"T": 3, "se": 0.0},
    )
    group = digits.per_image(xr.DataTree.from_dict({"bound": group}))["bound"]
    middle = (copies - 1) / 2
    np.testing.assert_allclose(group["bound"], [middle, 10 + middle])
    np.testing.assert_allclose(group["kl"], np.outer([middle, 10 + middle], [1, 2]))
    assert (group.attrs["mean"], group.attrs["se"], group.attrs["T"]) == (5 + middle, 5, 3)
    np.testing.assert_array_equal(group["step"], [2, 3])


def test_densities_of_digits_are_turned_into_bits():
    diffusion = np.array([-64.0, -128.0]) * np.log(2)
    rows = digits._density_rows({"a": diffusion, "b": 2 * diffusion, "c": diffusion})
    by_name = {(row.row, row.unit): row for row in rows}
    bits = by_name["a, test", digits.BITS]
    assert (bits.value, bits.se) == (pytest.approx(1.5), pytest.approx(0.5))
    gain = "diffusion − mixture, paired"
    assert by_name[gain, digits.BITS].value == pytest.approx(-1.5)
    assert by_name[gain, digits.NATS].value == pytest.approx(96 * np.log(2))


def test_the_table_says_what_each_experiment_takes():
    for name, entry in TABLE.items():
        experiment = find(name)
        assert set(experiment.sizes) == {"cpu", "quick"} | ({"gpu"} if entry.has_gpu else set())
        assert (experiment.load is not None) == bool(entry.model)
        assert not entry.model or entry.model in TABLE


def test_what_an_experiment_does_not_take_is_refused(tmp_path):
    with pytest.raises(ValueError, match="recipe must be one of cpu, quick; got 'gpu'"):
        swiss_roll.EXPERIMENT.run(tmp_path, recipe="gpu")
    with pytest.raises(ValueError, match="model must be absent, Swiss roll trains its own"):
        swiss_roll.EXPERIMENT.run(tmp_path, model=tmp_path)


def test_standard_error_of_a_mean():
    assert mean_and_se(np.array([1.0, 3.0])) == (2.0, 1.0)
