"""The commands of the benchmarks: ratios and their intervals, pieces done once, all in small."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import clock

ROOT = Path(__file__).parents[1]


def command(*arguments, timeout=600):
    """A module of the benchmarks as it is run from the root."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_ratio_and_its_interval_are_those_of_its_logarithms():
    line = clock.ratio("same", np.full(4, 3.0), np.full(4, 2.0), per=10, of="a step")
    assert (line.ratio, line.low, line.high) == pytest.approx((1.5, 1.5, 1.5))
    assert "floor 200 ms a step, 4 rounds" in line.note
    ours = np.exp([0.0, 0.2, 0.4])
    line = clock.ratio("spread", ours, np.ones(3))
    half = stats.t.ppf(0.975, 2) * 0.2 / math.sqrt(3)
    expected = tuple(np.exp([0.2, 0.2 - half, 0.2 + half]))
    assert (line.ratio, line.low, line.high) == pytest.approx(expected)


def test_intervals_hold_the_ratio_as_often_as_they_say():
    """n = 1000 of 5 rounds, 95 %: within four standard errors of 0.7 %."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        line = clock.ratio("", 2 * np.exp(0.3 * rng.normal(size=5)), np.ones(5))
        held += line.low < 2 < line.high
    assert abs(held / 1000 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 1000)


def test_contestants_alternate_and_are_timed():
    order = []
    contestants = {
        "slow": lambda: (order.append("slow"), time.sleep(0.02)),
        "quick": lambda: order.append("quick"),
    }
    found = clock.rounds_of(contestants, 2)
    assert order == ["slow", "quick", "slow", "quick", "quick", "slow"]
    assert (found["slow"] >= 0.02).all() and (found["quick"] < 0.02).all()


def test_a_table_names_what_was_skipped():
    text = clock.table([clock.Ratio("one", 1.0, 0.9, 1.1), clock.skipped("two", "no torch")])
    _, one, two = text.splitlines()
    assert one.split() == ["one", "1", "0.9", "to", "1.1", "times"]
    assert two.endswith("skipped: no torch")


@pytest.mark.slow
def test_every_piece_for_a_gpu_is_done_once(tmp_path):
    """All of them in small on a CPU, and nothing again when asked again."""
    arguments = "tests.benchmarks.gpu", "--quick", "--out", tmp_path
    assert command(*arguments).endswith("all done\n")
    names = {path.stem for path in tmp_path.glob("*.json")}
    assert names == {"device", "exactness", "ratios", "peak", "others", "mnist", "cifar10"}
    assert all(json.loads(path.read_text())["quick"] for path in tmp_path.glob("*.json"))
    again = command(*arguments)
    assert again.count("done before") == len(names) and again.endswith("all done\n")


@pytest.mark.slow
def test_a_training_run_that_runs_out_of_time_goes_on(tmp_path):
    """A first call that has a second for MNIST leaves it, and says so; the next one ends it."""
    arguments = "-m", "tests.benchmarks.gpu", "--quick", "--out", str(tmp_path), "--only", "mnist"
    program = [sys.executable, *arguments, "--minutes", "0.02"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and not (tmp_path / "mnist.json").exists()
    assert "left to do, by the same command: mnist" in done.stdout, done.stdout + done.stderr
    assert command(*arguments[1:]).endswith("all done\n")


@pytest.mark.slow
def test_the_benchmarks_print_one_table():
    text = command("tests.benchmarks", "--rounds", 2, "--only", "fit")
    assert "fit / scan of svi.update" in text and "95 % interval" in text
    assert "same_numbers" in text and "skipped: compares the numbers" in text
