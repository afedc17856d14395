"""The image experiments from end to end in a few steps, on made-up images."""

import json

import jax
import matplotlib.image
import numpy as np
import pytest
from flax import nnx
from scipy.stats import norm

from probdiff import Fit, datasets, load
from probdiff.experiments import (
    find,
    images,
    judging,
    mnist_inpainting,
    parametrisations,
    patches,
    training,
)
from probdiff.experiments.report import Run

LEFT_BY_TRAINING = {
    "report.md", "table.json", "bounds.nc", "params.safetensors", "config.json", "samples.png",
    "training.safetensors", "metrics.jsonl", "progress.png",
}  # fmt: skip


def bars(n, seed):
    """Grey images of one thick bar each, and which of ten rows it is at."""
    labels = np.arange(n) % 10
    images = np.zeros((n, 28, 28), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[4 + 2 * label : 7 + 2 * label, 4:24] = 200 + seed
    return images, labels.astype(np.uint8)


@pytest.fixture
def made_up(monkeypatch):
    """Images that are quickly made, in place of the real ones."""
    (train, train_labels), (test, test_labels) = bars(300, 0), bars(40, 1)
    digits = datasets.Mnist(train, test, train_labels, test_labels)
    monkeypatch.setattr(datasets, "mnist", lambda: digits)
    rng = np.random.default_rng(0)
    photographs, labels = rng.integers(0, 256, (200, 32, 32, 3), np.uint8), np.zeros(200, np.uint8)
    colours = datasets.Cifar10(photographs, photographs[:20], labels, labels[:20])
    monkeypatch.setattr(datasets, "cifar10", lambda: colours)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("mnist", marks=pytest.mark.long),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("cifar10", "ddpm-mnist")),
    ],
)
def test_a_run_leaves_its_files_and_goes_on_from_them(made_up, tmp_path, name):
    experiment = find(name)
    rows = experiment.run(tmp_path, quick=True, progress=False)
    assert {file.name for file in tmp_path.iterdir()} > LEFT_BY_TRAINING
    table = json.loads((tmp_path / "table.json").read_text())
    assert [line["row"] for line in table] == [row.row for row in rows]
    assert all(np.isfinite(line["value"]) for line in table)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    recipe = experiment.sizes["quick"].recipe
    assert steps == [recipe.num_steps // 2, recipe.num_steps]
    _, params = load(tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    again = experiment.run(tmp_path, quick=True, progress=False)
    assert [tuple(row) for row in again] == [tuple(row) for row in rows]
    whole, *parts, nats = rows[:5]  # parts of the bound add up
    assert whole.value == pytest.approx(sum(part.value for part in parts), rel=1e-5)
    numbers = 3072 if name == "cifar10" else 784
    assert whole.value == pytest.approx(-nats.value / (numbers * np.log(2)), rel=1e-5)


@pytest.mark.long
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(made_up, tmp_path, monkeypatch):
    """The recipe's own training, stopped at its first report; equal bit for bit."""
    size = images.SMALL
    x = datasets.mnist().train.astype(np.float32)

    def trained(folder) -> Fit:
        folder.mkdir(exist_ok=True)
        run = Run(folder, size, 0, True, "cpu", False, print, None)
        diffusion = images.define(x, size.recipe, nnx.Rngs(0))
        return training.train_at_length(
            jax.random.key(0), diffusion, x, x[:20], size.recipe, run, shades=(0.0, 255.0)
        )

    whole = trained(tmp_path / "whole")
    paint = training._Painter.__call__

    def stop(self, state):
        raise KeyboardInterrupt

    monkeypatch.setattr(training._Painter, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped")
    monkeypatch.setattr(training._Painter, "__call__", paint)
    resumed = trained(tmp_path / "stopped")
    assert resumed.num_steps == size.recipe.num_steps
    for ours, theirs in zip(
        jax.tree.leaves((resumed.params, resumed.losses)),
        jax.tree.leaves((whole.params, whole.losses)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.long
def test_inpainting_keeps_what_is_known(made_up, tmp_path):
    images.MNIST.run(tmp_path / "model", quick=True, progress=False)
    rows = mnist_inpainting.EXPERIMENT.run(
        tmp_path / "out", quick=True, progress=False, model=tmp_path / "model"
    )
    assert rows[0].row == "known pixels: largest error"
    assert rows[0].value == 0
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"report.md", "rules.png", "posterior_digits.png", "posterior.nc"} <= files
    assert "Warnings" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("DEAD_LEAVES", marks=pytest.mark.long),
        pytest.param("BARK", marks=pytest.mark.slow),
    ],
)
def test_patches_are_compared_with_gaussians(tmp_path, monkeypatch, name):
    (tmp_path / "bark").mkdir()
    picture = np.random.default_rng(0).uniform(size=(120, 110)).repeat(2, 0).repeat(2, 1)
    matplotlib.image.imsave(tmp_path / "bark" / "a.png", picture, cmap="gray")
    grey = np.round(255 * picture).astype(np.uint8)
    monkeypatch.setattr(datasets, "grey_images", lambda folder: [grey / 255])
    monkeypatch.setenv("PROBDIFF_DATA", str(tmp_path))
    rows = getattr(patches, name).run(tmp_path / "out", quick=True, progress=False)
    by_name = {row.row: row for row in rows}
    k, gaussian = (
        by_name[f"{model}, test"] for model in ("diffusion, bound K", "Gaussian, full covariance")
    )
    paired = by_name["diffusion − Gaussian, full covariance, paired"]
    assert paired.value == pytest.approx(k.value - gaussian.value, abs=1e-5)
    assert by_name["K − L_null"].value == pytest.approx(k.value + 2.0471, abs=1e-3)
    assert (tmp_path / "out" / "figure_5.png").exists() == (name == "BARK")


def test_patches_have_unit_variance_and_lie_within_their_levels(monkeypatch, tmp_path):
    """n = 200 patches of leaves; the variance of one law's pixels within 4 standard errors."""
    size = patches.SIZES["quick"]._replace(train=160, validation=20, test=20)
    found = patches.dead_leaves(jax.random.key(0), size)
    assert [len(x) for x in found[:3]] == [160, 20, 20]
    x = np.concatenate(found[:3]).astype(np.float64)
    greys = np.arange(256.0)
    assert x.min() >= (0 - greys.mean() - 0.5) * found.level
    assert x.max() <= (256 - greys.mean() - 0.5) * found.level
    squares = (x**2).mean((1, 2))
    assert abs(squares.mean() - 1) < 4 * squares.std(ddof=1) / np.sqrt(len(squares))


def test_bark_without_photographs_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PROBDIFF_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"PROBDIFF_DATA must name a folder that holds bark/"):
        patches.bark(jax.random.key(0), patches.SIZES["quick"])


@pytest.mark.long
def test_floor_of_a_fixed_variance_is_what_a_perfect_network_pays(x64):
    diffusion = images.define_ddpm(images.SMALL.recipe, nnx.Rngs(0))
    x = np.zeros((3, 28, 28), np.uint8)
    x[1], x[2, :14] = 100, 255
    sd = 0.01 * 127.5
    inner = -np.log2(norm.cdf(0.5 / sd) - norm.cdf(-0.5 / sd))
    end = -np.log2(norm.cdf(0.5 / sd))
    np.testing.assert_allclose(images.floor(diffusion, x), [end, inner, end], rtol=1e-5)


def test_energy_distance_is_its_double_sums_and_nothing_within_one_law():
    """n = 400 and 300 points of one law: within 4 errors of 0; one moved by 1 sd: well above."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 3)), rng.normal(size=(300, 3))
    distance, se = judging.energy_distance(x, y)
    assert abs(distance) < 4 * se
    moved, se = judging.energy_distance(x + np.array([1, 0, 0]), y)
    assert moved > 5 * se
    few_x, few_y = x[:5], y[:4]
    pairs = [[np.linalg.norm(a - b) for b in few_y] for a in few_x]
    within = [
        np.mean([np.linalg.norm(a - b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])
        for z in (few_x, few_y)
    ]
    expected = 2 * np.mean(pairs) - sum(within)
    assert judging.energy_distance(few_x, few_y)[0] == pytest.approx(expected)


@pytest.mark.slow
def test_readouts_and_losses_are_all_compared(tmp_path):
    rows = parametrisations.EXPERIMENT.run(tmp_path, quick=True, progress=False)
    assert len(rows) == 2 * len(parametrisations.CELLS) + 1
    assert all(np.isfinite(row.value) and row.se > 0 for row in rows)
    assert (tmp_path / "draws.png").exists()
