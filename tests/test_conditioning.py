"""Posteriors of images: tasks, ranks and coverage, and runs from end to end against an oracle."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from flax import nnx
from scipy import stats

from oracles import exact_gaussian
from probdiff import Diffusion, GaussianKernel, cli, datasets, networks, save, schedules
from probdiff.experiments import TABLE, conditioning, digits, find, restoration
from probdiff.experiments.conditioning import Gaussian
from probdiff.experiments.report import QUICK, Experiment, Run, root_mean_square

TASKS = {
    "denoise": lambda prior: conditioning.denoising(prior, 3.0),
    "inpaint": conditioning.inpainting,
    "super-resolution": lambda prior: conditioning.super_resolution(prior, 0.5),
}
PRIOR = exact_gaussian(np.zeros((8, 8)), 1.0, T=3, loc=0.0, scale=1.0).prior({})
each_task = pytest.mark.parametrize("make", TASKS.values(), ids=TASKS)


@pytest.fixture(scope="module")
def gaussian():
    return conditioning.gaussian_of(datasets.digits().train)


def covariance_of(count):
    """A random covariance of images, of many scales."""
    root = np.random.default_rng(0).normal(size=(64, count))
    return root @ root.T + 0.1 * np.eye(64)


@each_task
def test_the_matrix_of_a_task_measures_what_the_task_measures(make):
    task, x = make(PRIOR), np.random.default_rng(1).normal(size=(5, 8, 8))
    flat = x.reshape(5, 64) @ task.matrix.T
    np.testing.assert_allclose(flat, np.asarray(task.measure(x)).reshape(5, -1), atol=1e-6)


def test_a_block_is_its_mean():
    x = np.arange(64.0).reshape(8, 8)
    assert conditioning.block_means(x)[1, 2] == x[2:4, 4:6].mean()


@each_task
def test_noise_of_an_observation_has_its_sd(make, key):
    task, x = make(PRIOR), jnp.zeros((500, 8, 8))
    y = np.asarray(task.observe(key, x))
    error = 4 * task.noise / np.sqrt(2 * y.size)
    assert abs(y.std() - task.noise) <= error


def test_the_gaussian_is_that_of_dequantised_images(key):
    """Against the moments of 40 dequantised copies; entries of a covariance err by √(v v / n)."""
    images = datasets.digits().train[:300]
    found = conditioning.gaussian_of(images)
    x = np.asarray(digits.copies(key, images, 40), np.float64).reshape(-1, 64)
    error = np.sqrt(1 / 12 / 40 / 300)
    assert np.abs(x.mean(0) - found.mean.ravel()).max() < 4 * error
    sd = np.sqrt(np.diag(found.covariance))
    apart = (np.cov(x, rowvar=False) - found.covariance) / np.outer(sd, sd)
    assert np.abs(apart).max() < 4 / np.sqrt(len(x))


@pytest.mark.parametrize("name", ["denoise", "super-resolution"])
def test_the_gaussian_given_noisy_observations_is_in_information_form(name):
    """Precision C⁻¹ + Aᵀ A/s², and log p(y) = log p(x) + log p(y | x) − log p(x | y) at any x."""
    task, C = TASKS[name](PRIOR), covariance_of(64)
    m = np.linspace(-1, 2, 64)
    y = np.random.default_rng(2).normal(size=(3, *np.shape(task.measure(np.zeros((8, 8))))))
    mean, log_p = Gaussian(m.reshape(8, 8), C).given(task, y)
    A, flat = task.matrix, y.reshape(3, -1)
    V = np.linalg.inv(np.linalg.inv(C) + A.T @ A / task.noise**2)
    for i in range(3):
        expected = V @ (np.linalg.solve(C, m) + A.T @ flat[i] / task.noise**2)
        np.testing.assert_allclose(mean[i].ravel(), expected, atol=1e-8)
        x = m + 0.1
        joint = stats.multivariate_normal(m, C).logpdf(x)
        joint += stats.norm(A @ x, task.noise).logpdf(flat[i]).sum()
        assert log_p[i] == pytest.approx(joint - stats.multivariate_normal(expected, V).logpdf(x))


def test_the_gaussian_given_exact_pixels_keeps_them():
    task, gaussian = conditioning.inpainting(PRIOR), Gaussian(np.zeros((8, 8)), covariance_of(64))
    x = np.random.default_rng(3).normal(size=(2, 8, 8))
    mean, _ = gaussian.given(task, np.asarray(task.measure(x)))
    np.testing.assert_allclose(mean[:, :4], x[:, :4], atol=1e-8)
    assert np.abs(mean[:, 4:] - x[:, 4:]).max() > 0.1


def test_constant_pixels_are_those_of_the_margin(gaussian):
    assert gaussian.is_constant.sum() == 11
    assert not gaussian.is_constant[:, 1:7].any()


def test_ranks_of_equal_weights_are_uniform_however_few():
    rng = np.random.default_rng(4)
    values = rng.normal(size=(4, 20_000, 1))
    weights = np.full((3, 20_000), 1 / 3)
    u = conditioning.rank(values[:3], weights, values[3], rng.uniform(size=(20_000, 1)))
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3


def test_ranks_on_a_grid_are_uniform_though_values_are_equal():
    """n = 20,000 sets of three draws and a truth among four levels."""
    rng = np.random.default_rng(2)
    values = rng.integers(0, 4, size=(4, 20_000, 1)).astype(float)
    weights = np.full((3, 20_000), 1 / 3)
    u = conditioning.rank(values[:3], weights, values[3], rng.uniform(size=(20_000, 1)))
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3


def test_ranks_of_weighted_draws_are_uniform():
    """Draws of N(0, 2²) weighted to be of N(0, 1)."""
    rng = np.random.default_rng(5)
    draws, truth = 2 * rng.normal(size=(2000, 500, 1)), rng.normal(size=(500, 1))
    weights = np.exp(-0.5 * draws[..., 0] ** 2 * (1 - 1 / 4))
    weights /= weights.sum(0)
    u = conditioning.rank(draws, weights, truth, rng.uniform(size=(500, 1)))
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3


def test_coverage_counts_what_it_is_told_and_errs_by_image():
    u = np.full((4, 8, 8), 0.5)
    u[:2, 0], u[:, 7] = 0.01, 0.999
    is_counted = np.zeros((8, 8), bool)
    is_counted[0] = is_counted[1] = True
    share, se = conditioning.coverage(u, is_counted)
    assert share == pytest.approx(0.75)  # two images at a half, two at one
    assert se == pytest.approx(np.std([0.5, 0.5, 1, 1], ddof=1) / 2)


def test_a_root_mean_square_has_the_error_of_its_square():
    values = np.random.default_rng(6).normal(size=(3000, 50, 4)) * 2
    found = [root_mean_square(v.T) for v in np.moveaxis(values, 1, 0)]
    root, se = np.array(found).T
    assert root.mean() == pytest.approx(2, rel=0.01)
    assert np.median(se) < 4 * root.std() / np.sqrt(1) and np.median(se) > 0


LOC, SCALE = 5.0, 6.0


@pytest.fixture(scope="module")
def oracle():
    """A prior that is exactly Gaussian, pixel by pixel, and its law in grey levels."""
    rng = np.random.default_rng(7)
    mean, sd = rng.normal(size=(8, 8)) * 0.5, rng.uniform(0.2, 0.95, (8, 8))
    diffusion = exact_gaussian(mean, sd, T=20, loc=LOC, scale=SCALE)
    law = Gaussian(LOC + SCALE * mean, np.diag((SCALE * sd).ravel() ** 2))
    return diffusion, law


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.long if name == "inpaint" else pytest.mark.slow)
        for name in TASKS
    ],
)
def inferred(request, oracle):
    """32 draws of the oracle, inferred."""
    diffusion, law = oracle
    task = TASKS[request.param](conditioning.prior_of(diffusion, {}, law))
    key_x, key = jax.random.split(jax.random.key(8))
    x = datasets.gaussian(key_x, 32, covariance=law.covariance, mean=law.mean.ravel())
    x = x.reshape(-1, 8, 8)
    smc = conditioning.sampler(task, num_particles=64, num_runs=4)
    return task, law, conditioning.posterior(key, smc, task, x)


def test_posterior_and_evidence_are_those_of_a_gaussian_prior(inferred):
    task, law, found = inferred
    mean, log_p = law.given(task, found.y)
    z = ((found.mean - mean) / np.where(found.sd > 0, found.sd, 1.0))[:, task.unseen]
    bias, error = z.mean(0), z.std(0, ddof=1) / np.sqrt(len(z))
    assert (np.abs(bias) < 4 * error).all()
    assert np.sqrt(np.mean(z**2)) < 0.25  # of a posterior sd; 0.06 for 256 independent draws
    np.testing.assert_allclose(found.mean[:, ~task.unseen], mean[:, ~task.unseen], atol=1e-3)
    apart = found.tree["smc"]["log_evidence"].values - log_p
    assert abs(apart.mean()) < 4 * apart.std() / np.sqrt(32) + 0.02


def test_intervals_cover_truths_that_came_from_the_prior(inferred):
    task, _, found = inferred
    share, se = conditioning.coverage(found.rank, task.unseen)
    assert abs(share - 0.9) < 4 * se
    assert se < 0.03


def test_rows_tell_the_posterior_from_the_gaussian(inferred):
    """On Gaussian truths both are one: no difference of mean squares or evidence is left."""
    task, law, found = inferred
    rows = conditioning.rows("draws", task, found, law)
    table = {row.row: row for row in rows}
    assert table["draws: inside 90 % intervals"].ceiling == 0.9
    gain = table["draws: mean square, posterior − Gaussian, paired"]
    assert abs(gain.value) < 4 * gain.se + 0.1


def nothing_learned(folder, event_shape, **units):
    """Save a model in `folder` that is the reverse trajectory of N(0, I)."""
    network = networks.Perceptron(event_shape, width=4, depth=1, T=10, rngs=nnx.Rngs(0))
    beta = schedules.log_snr_linear(10, beta_1=0.05, alpha_bar_T=1e-3)
    diffusion = Diffusion(GaussianKernel(), beta, network, event_shape=event_shape, **units)
    save(folder, diffusion, jax.tree.map(lambda a: jnp.zeros(a.shape), diffusion.params_template))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return nothing_learned(tmp_path_factory.mktemp("model"), (8, 8), loc=LOC, scale=SCALE)


@pytest.fixture(
    scope="module",
    params=[
        "inpaint",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in TABLE
            if TABLE[name].model == "digits" and name != "inpaint"
        ),
    ],
)
def finished(request, model, tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("run"), []
    rows = find(request.param).run(folder, quick=True, progress=False, say=said.append, model=model)
    return folder, rows, said


def test_a_run_leaves_table_report_figures_and_posterior(finished):
    folder, rows, said = finished
    names = {file.name for file in folder.iterdir()}
    kinds = ("digits", "draws")
    figures = {f"{what}_{kind}.png" for what in ("posterior", "sampler") for kind in kinds}
    if "Denoising" in (folder / "report.md").read_text(encoding="utf-8").splitlines()[0]:
        figures = figures - {"posterior_digits.png"} | {"figure_3.png"}
    assert names == figures | {"report.md", "table.json", "posterior.nc"}
    assert plt.get_fignums() == []
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    assert [line["row"] for line in table] == [row.row for row in rows]
    assert QUICK in (folder / "report.md").read_text(encoding="utf-8")
    assert said


def test_every_line_of_coverage_has_its_ceiling(finished):
    coverage = [row for row in finished[1] if conditioning.COVERAGE in row.row]
    assert {row.row.split(":")[0] for row in coverage} == {"held-out digits", "draws of the model"}
    assert {row.ceiling for row in coverage} == {0.9}


def test_figure_3_has_the_papers_columns_and_the_sd():
    """Three images with four posterior draws each: every sheet has its numbers, an image a row."""
    rng = np.random.default_rng(0)
    truth, y, mean, sd, ranks = rng.uniform(0, 16, (5, 3, 8, 8))
    inferred, draws = rng.uniform(0, 16, (1, 4, 3, 8, 8)), rng.uniform(0, 16, (7, 8, 8))
    x_0 = xr.Dataset({"x_0": (("chain", "draw", "image", "row", "column"), inferred)})
    tree = xr.DataTree.from_dict({"posterior": x_0})
    found = conditioning.Posterior(truth, y, mean, sd, ranks, tree, None, ())
    figure = restoration.figure_3(found, draws)
    sheets = [ax.images[0] for ax in figure.axes[:5]]
    assert [ax.get_title().replace("\n", " ") for ax in figure.axes[:5]] == [
        "held-out digits", "with noise of variance 1",
        "draws from the posterior given the noisy image", "draws of the model", "posterior sd",
    ]  # fmt: skip
    by_row = [truth[:, None], y[:, None], inferred[0, :3].swapaxes(0, 1), draws[:6], sd[:, None]]
    for sheet, images in zip(sheets, by_row, strict=True):
        shown = np.ma.filled(sheet.get_array(), np.nan)
        images = images.reshape(3, -1, 8, 8)
        for i in range(3):
            for j in range(images.shape[1]):
                np.testing.assert_array_equal(
                    shown[9 * i : 9 * i + 8, 9 * j : 9 * j + 8], images[i, j]
                )
    assert [sheet.get_clim() for sheet in sheets] == [(0.0, 17.0)] * 4 + [(0.0, sd.max())]
    plt.close(figure)


def test_a_model_of_something_else_is_refused(tmp_path, capsys):
    nothing_learned(tmp_path, (2,))
    assert cli.main(["run", "denoise", "--model", str(tmp_path)]) == 2
    assert "must be one of digits" in capsys.readouterr().err
    assert cli.main(["run", "digits", "--model", str(tmp_path)]) == 2
    assert "digits trains its own" in capsys.readouterr().err


def test_a_model_is_trained_where_none_is_there(tmp_path, monkeypatch):
    """In the folder of the run if it is a quick one, else where it will be found."""
    trained, said = [], []
    monkeypatch.setattr(Experiment, "run", lambda self, folder, **options: trained.append(folder))
    monkeypatch.chdir(tmp_path)
    for quick in (True, False):
        run = Run(tmp_path / "out", None, 0, quick, "cpu", False, said.append, None)
        assert conditioning.trained(run, "digits") == trained[-1]
    assert trained == [tmp_path / "out" / "digits", Path("runs/digits")]
    assert len(said) == 2 and all("train one first" in text for text in said)
