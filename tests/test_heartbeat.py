"""Heartbeat and toy language: ceilings against enumeration, exact diffusions, whole runs."""

import itertools
import json

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from probdiff import Diffusion, datasets, diagnostics, load, readouts, schedules
from probdiff.experiments import heartbeat, toy_language
from probdiff.experiments.heartbeat import exact
from probdiff.experiments.heartbeat.exact import ceilings
from probdiff.experiments.report import QUICK, Row, above_ceiling, mean_and_se
from probdiff.experiments.toy_language import Language, ceiling

FILES = {
    "report.md", "table.json", "bounds.nc", "params.safetensors", "config.json", "losses.png",
}  # fmt: skip
OWN_FILES = {
    heartbeat: {"figure_2.png", "k_against_T.png", "bound_per_step.png"},
    toy_language: {"k_against_T.png", "kl_per_step.png", "absorbing"},
}


@pytest.mark.parametrize(
    ("T", "limit", "tied", "learned"),
    [
        (20, -4.5837, -4.8426, -2.5813),
        (100, -2.9238, -2.9737, -2.3718),
        (500, -2.4721, -2.4820, -2.3318),
        (2000, -2.3659, -2.3683, -2.3244),
    ],
)
def test_ceilings_of_the_heartbeat(T, limit, tied, learned):
    found = ceilings(schedules.harmonic(T))
    expected = (tied, learned, limit, -np.log2(5))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def enumerated(beta, rate, length, period):
    """(tied, learned, −H(X_1)) of the best factorised diffusion in bits, summing over all x_t."""
    data = datasets.heartbeat_sequences(length=length, period=period)
    states = np.array(list(itertools.product((0, 1), repeat=length)))
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - beta)])

    def law(x, x_0, a):
        """q(x | x_0) bit by bit, for share a of the signal left."""
        one = a * x_0 + rate * (1 - a)
        return np.where(x == 1, one, 1 - one)

    total = np.zeros(2)
    for t in range(1, len(beta) + 1):
        q = np.stack([law(states, x_0, alpha_bar[t]).prod(1) for x_0 in data], 1) / period
        posterior = q / q.sum(1, keepdims=True)
        bridge = []  # q(x_s = 1 | x_t, x_0), (states, sequences, length)
        for x_0 in data:
            joint = [
                law(bit, x_0, alpha_bar[t - 1]) * law(states, bit, 1 - beta[t - 1])
                for bit in (0, 1)
            ]
            bridge.append(joint[1] / (joint[0] + joint[1]))
        bridge = np.stack(bridge, 1)
        best = np.einsum("np,npl->nl", posterior, bridge)[:, None]
        if t == 1:
            tied = law(states, 1, 1 - beta[0])[:, None]  # T(x_0 = 1 | x_1) = T(1 | x_1)
            one = (1 - beta[0]) * states[:, None] + rate * beta[0]
            assert tied.shape == one.shape
            log_p = [np.where(data == 1, p, 1 - p) for p in (one, best)]
            total += [np.sum(q[..., None] * np.log(p)) for p in log_p]
            limit = np.sum(q.sum(1) * np.log(q.sum(1)))
        else:
            kl = bridge * np.log(bridge / best) + (1 - bridge) * np.log((1 - bridge) / (1 - best))
            total -= np.sum(q[..., None] * kl)
    end = alpha_bar[-1] * data + rate * (1 - alpha_bar[-1])
    prior = end * np.log(end / rate) + (1 - end) * np.log((1 - end) / (1 - rate))
    total -= prior.sum() / period
    return *(total / np.log(2)), limit / np.log(2)


@pytest.mark.parametrize(
    "beta", [schedules.harmonic(7), schedules.linear(4, beta_1=0.1, beta_T=0.5)]
)
@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_counting_gives_what_enumeration_gives(beta, rate):
    found = ceilings(beta, rate=rate, length=6, period=3)
    tied, learned, limit = enumerated(beta, rate, 6, 3)
    np.testing.assert_allclose(found, (tied, learned, limit, -np.log2(3)), rtol=1e-10)


def test_two_enumerations_agree_on_bits():
    sequences = datasets.heartbeat_sequences(length=6, period=3)
    bits = Language(sequences, np.full(3, 1 / 3), 2)
    beta = schedules.linear(5, beta_1=0.1, beta_T=0.5)
    found = ceiling(bits, beta, np.array([0.8, 0.2])).bound
    assert found == pytest.approx(ceilings(beta, length=6, period=3).learned, rel=1e-10)


def test_bound_of_the_exact_diffusion_is_its_ceiling():
    """The library's own K, with the posterior over phases for a network."""
    x, best = exact.examples(), exact.define_exact(20)
    tree = diagnostics.bound(jax.random.key(0), best, {}, x, num_draws=50)
    k, se = mean_and_se(heartbeat.in_bits(tree))
    assert abs(k - ceilings(best.schedule).tied) < 4 * se
    assert se < 0.02


def test_exact_network_is_bayes_rule(x64):
    sequences = datasets.heartbeat_sequences(length=6, period=3)
    states = np.array(list(itertools.product((0, 1), repeat=6)), np.int32)
    beta = schedules.harmonic(4)
    network = exact.exact_network(schedules.steps(beta), sequences, rate=0.3)
    for t in range(1, 5):
        a = 1 - t / 4
        one = a * sequences + 0.3 * (1 - a)
        like = np.where(states[:, None] == 1, one, 1 - one).prod(-1)
        p = like @ sequences / like.sum(1, keepdims=True)
        logits = network(jnp.asarray(states), jnp.full(len(states), t))
        np.testing.assert_allclose(jax.nn.sigmoid(logits), p, rtol=1e-8)


def test_phases_of_draws():
    sequences = datasets.heartbeat_sequences()
    wrong = sequences[3].copy()
    wrong[0] ^= 1
    draws = np.stack([sequences[2], wrong, sequences[0], np.zeros(20, np.int32)])
    np.testing.assert_array_equal(exact.phases_of(draws), [2, -1, 0, -1])


def test_gain_over_the_null_model_is_that_of_the_paper_at_its_bound():
    assert heartbeat.null_bits() == pytest.approx(-14.4386, abs=1e-4)
    assert heartbeat.PUBLISHED_K - heartbeat.null_bits() == pytest.approx(12.024, abs=1e-3)


def test_last_step_is_measured_without_bias():
    """A tied one, whose mean is known: p(x_0 = 1 | x_1) is 1 − 0.8 β after a 1, 0.2 β after a 0."""
    best = exact.define_exact(20)
    one, zero = 1 - 0.8 / 20, 0.2 / 20
    per_one = one * np.log2(one) + (1 - one) * np.log2(zero)
    per_zero = zero * np.log2(1 - one) + (1 - zero) * np.log2(1 - zero)
    found = heartbeat.last_step(jax.random.key(2), best, {}, exact.examples())
    k, se = mean_and_se(found)
    assert abs(k - 4 * per_one - 16 * per_zero) < 4 * se
    assert se < 0.02


def test_a_bound_above_its_ceiling_is_named():
    rows = [
        Row("K (tied), T = 20", -4.84, 0.001, "bits", -4.8426),
        Row("K (tied), T = 100", -2.90, 0.01, "bits", -2.9737),
        Row("draws", 120.0, 0.0, "%", 100.0),
    ]
    assert above_ceiling(rows) == ["K (tied), T = 100"]
    rows = [Row("K, uniform", -0.9, 0.001, "bits", -0.9084), Row("best K", 2.0, 0.1, "", 1.0)]
    assert above_ceiling(rows) == ["K, uniform"]


# The toy language

UNIFORM, ABSORBING = (toy_language.stationary(k) for k in toy_language.KERNELS.values())


def test_language_has_the_entropy_of_its_markov_chain():
    words = toy_language.language()
    rate = -(0.2 * np.log2(0.2) + 0.8 * np.log2(0.8))
    assert words.entropy == pytest.approx(np.log2(3) + 5 * rate, rel=1e-12)
    assert words.probs.sum() == pytest.approx(1, rel=1e-12)
    assert len(words.strings) == 3 * 2**5
    np.testing.assert_array_equal(
        toy_language.log2_prob(words, np.array([[0, 2, 2, 0, 1, 1]])), -np.inf
    )
    p = toy_language.log2_prob(words, np.array([[0, 1, 1, 2, 0, 1]]))
    np.testing.assert_allclose(p, np.log2(0.8**4 * 0.2 / 3))


def test_strings_are_drawn_by_their_law(key):
    words, n = toy_language.language(3), 20_000
    x = toy_language.draw_strings(key, words, n)
    share = (x[:, None] == words.strings).all(-1).mean(0)
    assert (np.abs(share - words.probs) < 4 * np.sqrt(words.probs / n)).all()


@pytest.mark.parametrize("pi", [UNIFORM, ABSORBING], ids=["uniform", "absorbing"])
def test_best_diffusion_approaches_the_entropy_from_below(pi):
    words = toy_language.language(3)
    found = [ceiling(words, schedules.harmonic(T), pi).bound for T in (3, 10, 30, 100, 1000)]
    assert (np.diff([*found, -words.entropy]) > 0).all()
    gap = -words.entropy - np.array(found)
    assert gap[-1] == pytest.approx(gap[-2] / 10, rel=0.2)  # what is lost falls like 1/T


@pytest.mark.parametrize("pi", [UNIFORM, ABSORBING], ids=["uniform", "absorbing"])
def test_independent_letters_lose_nothing(pi):
    """One letter, or letters that tell nothing of each other: the best K is −H for any T."""
    p = np.array([0.5, 0.3, 0.2])
    strings = np.array(list(itertools.product(range(3), repeat=2)))
    words = Language(strings, p[strings].prod(1), 3)
    found = ceiling(words, schedules.harmonic(4), pi)
    assert found.bound == pytest.approx(-words.entropy, rel=1e-10)
    early = ceiling(words, schedules.linear(4, beta_1=0.1, beta_T=0.5), UNIFORM)
    assert early.bound < -words.entropy and early.prior_kl > 0


@pytest.mark.parametrize("name", toy_language.KERNELS)
def test_bound_of_the_exact_letters_is_their_ceiling(name):
    """The library's own K, with posteriors by Bayes' rule for a network."""
    kernel, words, T = toy_language.KERNELS[name], toy_language.language(3), 5
    beta = schedules.harmonic(T)
    steps = schedules.steps(beta)

    def network(x_t, t):
        log_q = kernel.marginal(jnp.asarray(words.strings), steps.at(t, 2)).log_prob(x_t[:, None])
        log_joint = jnp.log(words.probs) + log_q.sum(-1)
        letter = words.strings[..., None] == np.arange(3)  # (strings, length, letters)
        log_m = jax.nn.logsumexp(jnp.where(letter, log_joint[..., None, None], -jnp.inf), axis=1)
        return jnp.maximum(jnp.moveaxis(log_m, -1, 1), -60.0).reshape(len(x_t), -1)

    diffusion = Diffusion(
        kernel, beta, network, event_shape=(3,),
        readout=readouts.DataLogits(), last_step=readouts.Learned(),
    )  # fmt: skip
    x = toy_language.draw_strings(jax.random.key(0), words, 2000)
    tree = diagnostics.bound(jax.random.key(1), diffusion, {}, x, num_draws=20)
    k, se = toy_language.k_per_letter(tree, x, words)
    best = ceiling(words, beta, toy_language.stationary(kernel))
    assert abs(k - best.bound / 3) < 4 * se
    assert se < 0.005
    kl = tree["bound"]["kl"].values * diagnostics.BITS_PER_NAT
    error = kl.std(0) / np.sqrt(len(kl))
    assert (np.abs(kl.mean(0) - best.kl) < 4.5 * error + 1e-4).all()


# Whole runs


@pytest.fixture(scope="module", params=[heartbeat, toy_language], ids=["heartbeat", "language"])
def finished(request, tmp_path_factory):
    """An experiment, the folder it filled and its rows."""
    folder = tmp_path_factory.mktemp("run")
    return (
        request.param,
        folder,
        request.param.EXPERIMENT.run(folder, seed=3, quick=True, progress=False),
    )


def test_a_run_leaves_its_files(finished):
    experiment, folder, _ = finished
    assert {file.name for file in folder.iterdir()} == FILES | OWN_FILES[experiment]
    assert QUICK in (folder / "report.md").read_text(encoding="utf-8")
    assert plt.get_fignums() == []


def test_the_table_holds_the_rows(finished):
    _, folder, rows = finished
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    assert [line["row"] for line in table] == [row.row for row in rows]
    assert all(np.isfinite(line["value"]) for line in table)


def test_an_untrained_bound_is_below_its_ceiling(finished):
    _, _, rows = finished
    assert above_ceiling(rows) == []
    bounds = [row for row in rows if row.row.startswith("K") and row.ceiling is not None]
    assert len(bounds) >= 3


def test_the_saved_model_is_bounded_as_reported(finished):
    experiment, folder, rows = finished
    diffusion, params = load(folder)
    with xr.open_datatree(folder / "bounds.nc", engine="h5netcdf") as tree:
        if experiment is heartbeat:
            saved, x = mean_and_se(heartbeat.in_bits(tree)), exact.examples()
        else:
            words = toy_language.language()
            saved, x = tree["bound"].attrs["mean_bits"] / 6, words.strings
            saved = saved, tree["bound"].attrs["se_bits"] / 6
    reported = {row.row: row.value for row in rows}
    name = "K (tied), measured by itself, T = 12" if experiment is heartbeat else rows[0].row
    assert saved[0] == pytest.approx(reported[name], abs=4 * saved[1])
    again = diagnostics.bound(jax.random.key(6), diffusion, params, np.tile(x, (5, 1)))
    unit = 1 if experiment is heartbeat else 6
    k, se = again["bound"].attrs["mean_bits"] / unit, again["bound"].attrs["se_bits"] / unit
    if experiment is toy_language:
        per = again["bound"]["bound"].values.reshape(5, -1).mean(0) * diagnostics.BITS_PER_NAT
        k = float(words.probs @ per) / 6
    assert abs(k - saved[0]) < 4 * np.hypot(se, saved[1])


@pytest.mark.parametrize("finished", [heartbeat], ids=["heartbeat"], indirect=True)
def test_the_same_seed_gives_the_same_table(finished, tmp_path):
    experiment, folder, _ = finished
    experiment.EXPERIMENT.run(tmp_path, seed=3, quick=True, progress=False)
    for name in ("table.json", "report.md"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_fewer_steps_ask_the_same_network_at_the_same_level():
    """p(x_0 | x_t) of the diffusion of 4 steps at t is that of the diffusion of 12 at 3 t."""
    diffusion = exact.define(12)
    noise = jax.random.normal(jax.random.key(1), (10_000,))
    params = jax.tree.map(
        lambda p: 0.3 * noise[: p.size].reshape(p.shape), diffusion.params_template
    )
    shorter = exact.with_fewer_steps(diffusion, params, 4)
    few, many = shorter.bind({}), diffusion.bind(params)
    np.testing.assert_allclose(few.steps.alpha_bar_t, many.steps.alpha_bar_t[2::3], rtol=1e-6)
    x_t, t = jnp.asarray(exact.examples()[:4]), jnp.arange(1, 5)
    np.testing.assert_allclose(few.x_0_hat(x_t, t), many.x_0_hat(x_t, 3 * t), rtol=1e-6)


@pytest.mark.slow
def test_the_heartbeat_reaches_its_ceiling(tmp_path):
    rows = {row.row: row for row in heartbeat.EXPERIMENT.run(tmp_path, progress=False)}
    main = rows["K (tied), T = 2000"]
    assert main.value >= -2.375 and main.se <= 0.002
    alone = rows["K (tied), measured by itself, T = 2000"]
    assert alone.value < ceilings(schedules.harmonic(2000)).tied_limit + 3 * alone.se
    assert alone.se <= 0.002
    for T in (20, 100, 500):
        assert rows[f"K (tied), T = {T}"].value > rows[f"K (tied), T = {T}"].ceiling - 0.01
    assert rows["draws that are a heartbeat, T = 2000"].value >= 98.5
    assert rows["phases of the draws uniform, χ² test"].value > 1e-3


@pytest.mark.slow
def test_the_language_reaches_its_ceilings(tmp_path):
    rows = {row.row: row for row in toy_language.EXPERIMENT.run(tmp_path, progress=False)}
    for name in toy_language.KERNELS:
        row = rows[f"best possible K − K, {name}"]
        assert -3 * row.se < row.value < 0.02
