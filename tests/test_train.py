"""`fit` is the plain loop over `svi.update`, whatever its chunks, interrupts and devices."""

import functools
import gc
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from jax import random
from numpyro import handlers
from numpyro.contrib.module import nnx_module
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from probdiff import BernoulliKernel, SampledTimeELBO, fit, standard_diffusion
from probdiff.train import checkpoint as checkpoints
from probdiff.train import data as batches
from probdiff.train import loop as chunks
from regression import data, loop, make_svi


@pytest.fixture(scope="module")
def svi():
    """One SVI for most tests, so that its programs compile once."""
    return make_svi()


@pytest.fixture(scope="module")
def plain(svi):
    """What the loop over `svi.update` gives in 50 steps: (state, losses, parameters)."""
    return loop(random.key(0), svi, data(), 50, 32)


quiet = functools.partial(fit, progress=False)


def leaves(tree):
    """Leaves as NumPy arrays, keys as their words."""
    is_key = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)  # noqa: E731
    words = [random.key_data(leaf) if is_key(leaf) else leaf for leaf in jax.tree.leaves(tree)]
    return [np.asarray(leaf) for leaf in words]


def assert_equal(one, other):
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_close(one, other, rtol=1e-5):
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


def chunks_of(monkeypatch, length):
    monkeypatch.setattr(chunks, "_chunk_length", lambda n, seconds: length)


def param_svi(log_density, initial=0.0, steps=0.1):
    """An SVI without data whose loss is −log_density(w), at sites "w" and "term"."""

    def model():
        w = numpyro.param("w", jnp.float32(initial))
        numpyro.factor("term", log_density(w))

    return SVI(model, lambda: None, optax.sgd(steps), Trace_ELBO())


# The same as the plain loop.


def test_fit_is_the_loop_over_update(key, svi, plain):
    fitted = quiet(key, svi, data(), num_steps=50, batch_size=32)
    state, losses, _ = plain
    assert_close(fitted.losses, losses)
    assert_close(fitted.state.optim_state, state.optim_state)
    assert_equal(fitted.state.rng_key, state.rng_key)
    assert_equal(fitted.params, fitted.raw_params)
    assert fitted.num_steps == 50


def test_params_are_the_average_of_constrained_values(key, svi, plain):
    fitted = quiet(key, svi, data(), num_steps=50, batch_size=32, ema_decay=0.8)
    _, _, history = plain
    mean = history[0]
    for i, params in enumerate(history[1:]):
        d = min(0.8, (1 + i) / (10 + i))
        mean = jax.tree.map(lambda m, p, d=d: d * m + (1 - d) * p, mean, params)
    assert_close(fitted.params, mean)
    assert_close(fitted.raw_params, history[-1])


def test_the_average_moves_in_sixteen_bits(key):
    def model():
        numpyro.factor("term", numpyro.param("w", jnp.bfloat16(1.0)).astype(jnp.float32))

    svi = SVI(model, lambda: None, optax.sgd(2.0**-6), Trace_ELBO())
    fitted = quiet(key, svi, (), num_steps=400, ema_decay=0.998)
    w, mean = 1.0, 1.0
    for i in range(400):
        # Past 4 the steps of 2^-6 are half the spacing of bfloat16, and round to even.
        w = float(jnp.bfloat16(w) + jnp.bfloat16(2.0**-6))
        d = min(0.998, (1 + i) / (10 + i))
        mean = d * mean + (1 - d) * w
    assert fitted.params["w"].dtype == jnp.bfloat16
    assert float(fitted.params["w"]) == float(jnp.bfloat16(mean))


@pytest.mark.parametrize("length", [1, 7, 10_000])
def test_results_do_not_depend_on_chunk_lengths(key, svi, monkeypatch, length):
    run = functools.partial(
        quiet, key, data=data(), num_steps=100, batch_size=32, ema_decay=0.9, held_out=data()
    )
    free = run(svi=svi, evaluate_every=25)
    chunks_of(monkeypatch, length)
    assert_equal(run(svi=svi, evaluate_every=25), free)


def test_steps_past_the_capacity_of_a_chunk_are_done(key, svi, plain, monkeypatch):
    chunks_of(monkeypatch, 10**9)
    monkeypatch.setattr(batches, "_MAX_STEPS", 16)
    fitted = quiet(key, svi, data(), num_steps=50, batch_size=32)
    assert_close(fitted.losses, plain[1])


def test_an_iterator_of_batches_trains_as_the_array_does(key, svi):
    x, y = data()
    _, key_batches, _ = random.split(key, 3)
    rows = batches.Minibatches(key_batches, x, 32, None).rows(0, 60)
    stream = ((np.asarray(x)[row], np.asarray(y)[row]) for row in rows)
    from_stream = quiet(key, svi, stream, num_steps=60, ema_decay=0.9)
    from_arrays = quiet(key, svi, (x, y), num_steps=60, batch_size=32, ema_decay=0.9)
    assert_close(from_stream, from_arrays)


def test_a_dict_goes_by_keyword(key, svi):
    x, y = data()
    by_keyword = quiet(key, svi, {"y": y, "x": x}, num_steps=20, batch_size=32)
    assert_equal(by_keyword, quiet(key, svi, (x, y), num_steps=20, batch_size=32))


def test_old_style_keys_give_the_same_fit(svi):
    old = quiet(random.PRNGKey(3), svi, data(), num_steps=20, batch_size=32)
    new = quiet(random.key(3), svi, data(), num_steps=20, batch_size=32)
    assert_equal(old.losses, new.losses)


@pytest.mark.long
def test_a_subsampling_plate_gives_the_posterior_of_all_the_data(key):
    y = 2.0 + random.normal(random.key(5), (200,))

    def model(y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(y), subsample_size=50) as rows:
            numpyro.sample("y", dist.Normal(w, 1.0), obs=y[rows])

    svi = SVI(
        model, AutoNormal(model), optax.adam(optax.linear_schedule(0.1, 0, 1000)), Trace_ELBO()
    )
    params = quiet(key, svi, y, num_steps=1000, ema_decay=0.99).params
    assert abs(params["w_auto_loc"] - y.sum() / 201) < 0.01
    assert abs(params["w_auto_scale"] / 201**-0.5 - 1) < 0.1


def test_an_autoguide_inside_handlers_trains(key):
    def model(y):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(w, 1.0).to_event(1), obs=y)

    guide = handlers.block(AutoNormal(model), hide=[])
    svi = SVI(model, guide, optax.adam(optax.linear_schedule(0.1, 0, 1000)), Trace_ELBO())
    y = jnp.array([-1.0, 3.0])
    for _ in range(2):  # what the first has left in the guide must serve the second
        params = quiet(key, svi, y, num_steps=1000).params
        np.testing.assert_allclose(params["w_auto_loc"], y / 2, atol=0.1)


def test_a_bound_that_the_program_computes_is_kept(key):
    def model(y):
        lower = jnp.exp(jnp.zeros(1))
        w = numpyro.param("w", 3.0 + lower, constraint=constraints.greater_than(lower))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(w, 1.0), obs=y)

    svi = SVI(model, lambda y: None, optax.adam(0.1), Trace_ELBO())
    w = quiet(key, svi, jnp.full(100, -5.0), num_steps=300).params["w"]
    assert 1 < w < 1.05


def test_mutable_sites_are_carried(key):
    def model(y):
        count = numpyro.primitives.mutable("count", {"steps": jnp.int32(0)})
        count["steps"] += 1
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(numpyro.param("w", 0.0), 1.0), obs=y)

    svi = SVI(model, lambda y: None, optax.adam(0.1), Trace_ELBO())
    fitted = quiet(key, svi, jnp.ones(10), num_steps=37, held_out=jnp.ones(10))
    # One call of the program before the first step makes the initial state.
    assert fitted.state.mutable_state["count"]["steps"] == 38


def test_a_later_fit_starts_from_the_weights_the_module_has_then(key):
    net = nnx.Linear(1, 1, rngs=nnx.Rngs(0))

    def model(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(nnx_module("net", net)(x)[:, 0], 1.0), obs=x[:, 0])

    svi = SVI(model, lambda x: None, optax.sgd(1e-9), Trace_ELBO())
    quiet(key, svi, jnp.ones((5, 1)), num_steps=1)
    nnx.update(net, {"kernel": jnp.full((1, 1), 7.0)})
    params = quiet(key, svi, jnp.ones((5, 1)), num_steps=1).params["net$params"]
    np.testing.assert_allclose(params["kernel"], 7.0, rtol=1e-5)


def test_a_later_fit_starts_from_the_numbers_the_program_has_then(key):
    initial = {"w": 1.0}

    def model():
        numpyro.factor("term", -numpyro.param("w", initial["w"]))

    svi = SVI(model, lambda: None, optax.sgd(1e-9), Trace_ELBO())
    for w in (1.0, 7.0, 1.0):
        initial["w"] = w
        assert abs(quiet(key, svi, (), num_steps=1).params["w"] - w) < 1e-5


def test_a_later_fit_sees_data_that_the_program_closes_over_and_compiles_nothing(key, caplog):
    seen = {}

    def model():
        with numpyro.plate("data", 10):
            numpyro.sample("y", dist.Normal(numpyro.param("w", 0.0), 1.0), obs=seen["y"])

    svi = SVI(model, lambda: None, optax.sgd(0.05), Trace_ELBO())
    with jax.log_compiles():
        for value in (1.0, -3.0):
            seen["y"] = jnp.full(10, value)
            caplog.clear()
            fitted = quiet(key, svi, (), num_steps=50, held_out=(), ema_decay=0.5)
            assert abs(fitted.params["w"] - value) < 1e-4
            np.testing.assert_allclose(fitted.held_out_losses.loss, 5 * np.log(2 * np.pi), 1e-5)
        assert compiled(caplog.records) == []


# Compiled once, and let go.


def compiled(records):
    return [r.getMessage() for r in records if r.getMessage().startswith("Compiling ")]


def test_a_second_fit_and_a_resumed_one_compile_nothing(key, tmp_path, caplog):
    svi, path = make_svi(), tmp_path / "run"
    options = {"batch_size": 32, "ema_decay": 0.9, "held_out": data(), "patience": 2}
    with jax.log_compiles():
        quiet(key, svi, data(), num_steps=30, checkpoint=path, **options)
        assert any("_chunk" in message for message in compiled(caplog.records))
        caplog.clear()
        quiet(random.key(9), svi, data(), num_steps=77, **options)
        assert compiled(caplog.records) == []
        assert quiet(key, svi, data(), num_steps=60, checkpoint=path, **options).num_steps == 60
        assert compiled(caplog.records) == []


def test_an_svi_is_let_go_after_its_fit(key):
    svi = make_svi()
    quiet(key, svi, data(), num_steps=5, batch_size=32)
    alive = weakref.ref(svi)
    del svi
    gc.collect()
    assert alive() is None


def test_chunks_last_about_two_seconds():
    assert chunks._chunk_length(100, 1.0) == 200
    assert chunks._chunk_length(100, 10.0) == 20
    assert chunks._chunk_length(1, 60.0) == 1
    assert chunks._chunk_length(10, 1e-6) == 40


# Held-out data and early stop.


def test_held_out_losses_are_those_of_the_average_at_one_key(key, svi):
    run = functools.partial(quiet, key, batch_size=32, ema_decay=0.9)
    x, y = data()
    held_out = (x[:40], y[:40])
    fitted = run(svi, (x, y), num_steps=25, held_out=held_out, evaluate_every=10)
    assert fitted.held_out_losses.step.tolist() == [10, 20, 25]
    for step, loss in zip(*fitted.held_out_losses, strict=True):
        params = run(svi, (x, y), num_steps=int(step)).params
        expected = svi.loss.loss(random.split(key, 3)[2], params, svi.model, svi.guide, *held_out)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


def stopping(key, **options):
    """Descent from 0 to 1 where 0.25 would be best on the held-out data."""

    def model(y):
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(numpyro.param("w", 0.0), 1.0), obs=y)

    svi = SVI(model, lambda y: None, optax.sgd(0.001), Trace_ELBO())
    options = {"held_out": jnp.full(5, 0.25), "evaluate_every": 5, "ema_decay": 0.5} | options
    return quiet(key, svi, jnp.ones(10), **{"num_steps": 1000, "patience": 3} | options)


def test_early_stop_returns_the_weights_of_the_best_evaluation(key):
    stopped = stopping(key)
    steps, losses = stopped.held_out_losses
    best = int(np.argmin(losses))
    assert 0 < best == len(losses) - 4
    assert stopped.num_steps == steps[-1] < 1000
    assert len(stopped.losses) == stopped.num_steps
    there = stopping(key, num_steps=int(steps[best]), patience=None)
    assert_equal(stopped.params, there.params)
    assert_equal(stopped.raw_params, there.raw_params)
    assert abs(stopped.params["w"] - 0.25) < 0.03


def test_without_a_stop_patience_returns_the_best_all_the_same(key):
    ended = stopping(key, num_steps=45, patience=100)
    assert ended.num_steps == 45
    assert_equal(ended.params, stopping(key).params)


def test_a_stopped_run_stays_stopped_when_resumed(key, tmp_path):
    stopped = stopping(key, checkpoint=tmp_path / "run")
    assert_equal(stopping(key, checkpoint=tmp_path / "run", num_steps=2000), stopped)


# Faults.


def test_a_loss_that_is_not_finite_names_step_and_site(key, svi, tmp_path, monkeypatch):
    x, y = data()
    _, key_batches, _ = random.split(key, 3)
    rows = batches.Minibatches(key_batches, x, 10, None).rows(0, 10)
    y = y.at[rows[6, 3]].set(jnp.nan)
    path = tmp_path / "run"
    quiet(key, svi, (x, y), num_steps=5, batch_size=10, checkpoint=path)
    before = path.read_bytes()
    for length in (1, 3, 100):
        chunks_of(monkeypatch, length)
        with pytest.raises(FloatingPointError) as error:
            quiet(key, svi, (x, y), num_steps=99, batch_size=10, checkpoint=path)
        assert "the loss is inf at step 7; " in str(error.value)  # -inf: NumPyro validates
        assert "log density of site 'y' in the model" in str(error.value)
        assert "'x'" not in str(error.value)
        assert path.read_bytes() == before


@pytest.mark.parametrize("num_steps", [3, 50])
def test_a_gradient_that_is_not_finite_names_step_and_parameter(key, num_steps):
    # w falls by 0.1 a step from 0.15: at the third it is below zero, where the root's slope is NaN.
    svi = param_svi(lambda w: -jnp.where(w > 0, w, w + 0 * jnp.sqrt(jnp.maximum(w, 0))), 0.15)
    with pytest.raises(FloatingPointError, match=r"gradient is not finite at step 3.*\['w'\]"):
        quiet(key, svi, (), num_steps=num_steps)


def test_initial_values_that_are_not_finite_are_named(key):
    with pytest.raises(FloatingPointError, match=r"initial values of the parameters \['w'\]"):
        quiet(key, param_svi(lambda w: w, jnp.nan), (), num_steps=3)


def test_a_held_out_loss_that_is_not_finite_names_the_site(key, svi):
    held_out = (jnp.ones((4, 3)), jnp.full(4, jnp.nan))
    with pytest.raises(FloatingPointError, match=r"held_out is inf after step 10; .*site 'y'"):
        quiet(key, svi, data(), num_steps=10, batch_size=32, held_out=held_out)


# Checkpoints.

KILLED = """
    import sys
    import jax
    from regression import data, make_svi
    from probdiff import fit
    from probdiff.train import loop

    length, path = int(sys.argv[1]), sys.argv[2]
    if length:
        loop._chunk_length = lambda n, seconds: length
    fit(jax.random.key(0), make_svi(), data(), num_steps=10**8, batch_size=32, ema_decay=0.9,
        held_out=data(), evaluate_every=70, patience=10**6, checkpoint=path,
        checkpoint_every=0.0, progress=False)
"""


@pytest.mark.long
@pytest.mark.parametrize("length", [1, 53, 0])
def test_a_run_killed_at_any_moment_resumes_bit_for_bit(key, svi, tmp_path, length):
    jax.clear_caches()  # another module may have compiled the data with other options
    path = tmp_path / "run.safetensors"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(length), str(path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=env)
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(np.random.default_rng().uniform(0, 0.5))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(checkpoints.read(path)[0]["losses"])
    assert done > 0
    options = {"batch_size": 32, "ema_decay": 0.9, "held_out": data(), "evaluate_every": 70}
    options |= {"num_steps": done + 100, "patience": 10**6}
    resumed = quiet(key, svi, data(), checkpoint=path, **options)
    assert_equal(resumed, quiet(key, svi, data(), **options))


def test_an_interrupt_saves_the_steps_done(key, svi, tmp_path, monkeypatch):
    path = tmp_path / "run"
    chunks_of(monkeypatch, 4)

    def interrupt(run, bar, start, stop):
        if stop > 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(chunks.Run, "_show", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quiet(key, svi, data(), num_steps=60, batch_size=32, checkpoint=path)
    assert 10 < len(checkpoints.read(path)[0]["losses"]) <= 20
    resumed = quiet(key, svi, data(), num_steps=60, batch_size=32, checkpoint=path)
    assert_equal(resumed, quiet(key, svi, data(), num_steps=60, batch_size=32))


def test_a_run_continued_to_more_steps_is_the_longer_run(key, svi, tmp_path):
    options = {"batch_size": 32, "held_out": data(), "evaluate_every": 20, "patience": 50}
    long = quiet(key, svi, data(), num_steps=70, **options)
    for num_steps in (25, 70, 70):
        parts = quiet(key, svi, data(), num_steps=num_steps, checkpoint=tmp_path / "run", **options)
    assert_equal(parts, long)


def test_a_resumed_stream_skips_the_batches_it_has_seen(key, svi, tmp_path):
    def stream():
        return ((x[None], y[None]) for x, y in zip(*data(), strict=True))

    whole = quiet(key, svi, stream(), num_steps=50)
    for num_steps in (20, 50):
        parts = quiet(key, svi, stream(), num_steps=num_steps, checkpoint=tmp_path / "run")
    assert_equal(parts, whole)


def test_a_stream_that_ends_too_soon_leaves_a_checkpoint(key, svi, tmp_path, monkeypatch):
    chunks_of(monkeypatch, 4)
    stream = ((x[None], y[None]) for x, y in zip(*data(), strict=True))
    with pytest.raises(ValueError, match="ended after 100"):
        quiet(key, svi, stream, num_steps=101, checkpoint=tmp_path / "run")
    assert len(checkpoints.read(tmp_path / "run")[0]["losses"]) > 90


def test_checkpoints_follow_the_clock(key, svi, tmp_path, monkeypatch):
    saved = []
    chunks_of(monkeypatch, 5)
    monkeypatch.setattr(chunks.Run, "_save", lambda self, record: saved.append(record.step))
    run = functools.partial(quiet, key, svi, data(), num_steps=20, batch_size=32)
    run(checkpoint=tmp_path / "a", checkpoint_every=1e6)
    assert saved == [20]
    saved.clear()
    run(checkpoint=tmp_path / "a", checkpoint_every=0.0)
    assert saved == [1, 2, 7, 12, 17, 20]


@pytest.fixture
def saved(key, svi, tmp_path):
    path = tmp_path / "run.safetensors"
    quiet(key, svi, data(), num_steps=10, batch_size=32, ema_decay=0.9, checkpoint=path)
    return path


@pytest.mark.parametrize("damage", [lambda raw: raw[:-9], lambda raw: raw[:-9] + b"123456789"])
def test_a_damaged_checkpoint_is_refused_and_left(key, svi, saved, damage):
    damaged = damage(saved.read_bytes())
    saved.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"run\.safetensors (is not a whole|was altered)"):
        quiet(key, svi, data(), num_steps=20, batch_size=32, ema_decay=0.9, checkpoint=saved)
    assert saved.read_bytes() == damaged


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"batch_size": 16}, "has batch_size 32, not 16"),
        ({"ema_decay": 0.99}, "has ema_decay 0.9, not 0.99"),
        ({"ema_decay": None}, "has ema_decay 0.9, not None"),
        ({"key": random.key(1)}, r"has key \[0, 0\], not \[0, 1\]"),
        ({"evaluate_every": 7}, "has evaluate_every 1000, not 7"),
        ({"held_out": data()}, "has held_out None, not"),
        ({"data": data(seed=1)}, r"has data \(SHA-256\)"),
        ({"data": tuple(leaf[:50] for leaf in data())}, r"has data .*100.*, not .*50"),
        ({"svi": make_svi(optax.sgd(0.01))}, r"optimiser: scale_by_adam.b1 0.9, not nothing"),
        ({"svi": make_svi(optax.adam(0.02))}, r"has optimiser: scale.step_size -0.01, not -0.02"),
        ({"num_steps": 9}, "num_steps must be at least the 10 steps in .*; got 9"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused_and_left(key, svi, saved, change, difference):
    before = saved.read_bytes()
    same = {"key": key, "svi": svi, "data": data(), "num_steps": 20, "batch_size": 32}
    with pytest.raises(ValueError, match=difference):
        quiet(**same | {"ema_decay": 0.9, "checkpoint": saved} | change)
    assert saved.read_bytes() == before


# Devices.

DIVIDED = """
    import jax, numpy as np
    from jax import random
    from regression import data, make_svi
    from probdiff import fit

    svi = make_svi()

    def run(mesh, batch_size=32, **options):
        return fit(random.key(0), svi, data(), num_steps=40, batch_size=batch_size,
                   ema_decay=0.9, held_out=data(), evaluate_every=10, mesh=mesh,
                   progress=False, **options)

    one, path = run(None), {path!r}
    for mesh in (jax.sharding.Mesh(jax.devices(), ("data",)), jax.make_mesh((4,), ("data",))):
        four = run(mesh)
        for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(four.params), strict=True):
            assert len(b.sharding.device_set) == 4 and b.sharding.is_fully_replicated
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(one.losses, four.losses, rtol=1e-4)
        np.testing.assert_allclose(one.held_out_losses, four.held_out_losses, rtol=1e-4)
    again = run(mesh, checkpoint=path)
    np.testing.assert_array_equal(again.losses, run(mesh, checkpoint=path).losses)
    stream = lambda: (tuple(leaf[i % 3 * 32:][:32] for leaf in data()) for i in range(40))
    one, four = (fit(random.key(0), svi, stream(), num_steps=40, mesh=m, progress=False)
                 for m in (None, mesh))
    np.testing.assert_allclose(one.losses, four.losses, rtol=1e-4)
    try:
        run(mesh, batch_size=30)
    except ValueError as error:
        print(error)
"""


@pytest.mark.long
def test_four_devices_give_what_one_gives(tmp_path):
    count = "--xla_force_host_platform_device_count=4"
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}", "JAX_PLATFORMS": "cpu"}
    env = os.environ | flags | {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = textwrap.dedent(DIVIDED).replace("{path!r}", repr(str(tmp_path / "run")))
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "batch_size must be a multiple of the 4 devices in mesh; got 30" in done.stdout


# The bar.


def test_the_bar_shows_steps_and_loss_per_example(key, svi, capsys):
    fitted = fit(key, svi, data(), num_steps=1, batch_size=32)
    output = capsys.readouterr()
    assert output.out == ""
    assert "1/1" in output.err
    assert f"loss per example {fitted.losses[0] / 32:.4g}" in output.err


def test_a_fit_is_shown_on_a_line(key, svi):
    fitted = quiet(key, svi, data(), num_steps=5, batch_size=32)
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(fitted.params))
    last = f"{fitted.losses[-1]:.6g}"
    assert repr(fitted) == f"Fit(num_steps=5, last loss {last}, {size} parameters)"


def test_the_bar_says_that_it_compiles_until_the_first_chunk_is_back(key, svi, capsys):
    fit(key, svi, data(), num_steps=5, batch_size=32)
    first, *_, last = re.split(r"[\r\n]+", capsys.readouterr().err.strip())
    assert " 0/5 " in first and "compiling" in first
    assert " 5/5 " in last and "loss per example" in last and "compiling" not in last


def test_a_run_that_is_done_compiles_nothing_and_does_not_say_so(key, svi, tmp_path, capsys):
    options = {"num_steps": 5, "batch_size": 32, "checkpoint": tmp_path / "run.safetensors"}
    quiet(key, svi, data(), **options)
    fit(key, svi, data(), **options)
    assert "compiling" not in capsys.readouterr().err


def test_without_progress_nothing_is_written(key, svi, capsys):
    fit(key, svi, data(), num_steps=5, batch_size=32, progress=False)
    assert capsys.readouterr() == ("", "")


# Refusals.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1; got 0"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1; got 0"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \(0, 1\); got 1.0"),
        ({"ema_decay": 0.0}, r"ema_decay must lie in \(0, 1\); got 0.0"),
        ({"patience": 0, "held_out": data()}, "patience must be at least 1; got 0"),
        ({"patience": 3}, "held_out must be given with patience; got None and patience=3"),
        ({"batch_size": 512}, "batch_size must be at most the 100 examples in data; got 512"),
        ({"held_out": [1.0]}, "held_out must be an array, or a tuple or dict of arrays; got list"),
        ({"checkpoint": "no/such/folder"}, "checkpoint must lie in a folder that exists; got no/"),
        (
            {"mesh": jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("a", "b"))},
            r"mesh must have one axis; got \('a', 'b'\)",
        ),
        (
            {"mesh": jax.sharding.Mesh(jax.devices()[:1], ("a",)), "batch_size": None},
            "batch_size must be given with a mesh",
        ),
    ],
)
def test_an_argument_that_does_not_fit_is_refused(key, svi, options, message):
    with pytest.raises(ValueError, match=message):
        quiet(key, svi, data(), **{"num_steps": 10, "batch_size": 32} | options)


def test_a_latent_site_outside_every_plate_is_refused_in_minibatches(key):
    def model(y):
        w = numpyro.sample("slope", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(w, 1.0), obs=y)

    svi = SVI(model, AutoNormal(model), optax.adam(0.1), Trace_ELBO())
    with pytest.raises(ValueError, match=r"batch_size must be None.*subsample_size.*'slope'"):
        quiet(key, svi, jnp.ones(10), num_steps=3, batch_size=5)
    assert quiet(key, svi, jnp.ones(10), num_steps=3).num_steps == 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.at[70, 1].set(jnp.nan), "x_0 must be finite"),
        (lambda x: x[:, :1], r"x_0 must have shape"),
        (lambda x: x.astype(int), "x_0 must be of a floating dtype"),
    ],
)
def test_data_that_a_diffusion_cannot_take_are_refused_before_training(spoil, message):
    diffusion = standard_diffusion((2,), T=5)
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), SampledTimeELBO())
    x = random.normal(random.key(0), (80, 2))
    with pytest.raises(ValueError, match=message):
        fit(random.key(1), svi, spoil(x), num_steps=3, batch_size=8, progress=False)


def test_log_and_callback_hear_of_every_report_and_change_nothing(key, svi, tmp_path):
    x = data()
    heard, held_out = [], jax.tree.map(lambda leaf: leaf[:16], x)
    options = {"num_steps": 25, "batch_size": 8, "held_out": held_out, "evaluate_every": 10}
    untold = quiet(key, svi, x, **options)
    log = tmp_path / "metrics.jsonl"
    told = quiet(key, svi, x, log=log, callback=heard.append, **options)
    assert_equal(told, untold)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [p.step for p in heard] == [10, 20, 25]
    means = [told.losses[a:b].mean() / 8 for a, b in ((0, 10), (10, 20), (20, 25))]
    np.testing.assert_allclose([line["loss"] for line in lines], means, rtol=1e-6)
    held_out = [line["held_out"] for line in lines[:2]]
    np.testing.assert_allclose(held_out, told.held_out_losses.loss[:2], rtol=1e-6)
    seconds = [line["seconds"] for line in lines]
    assert sorted(seconds) == seconds
    assert_equal(heard[-1].params, told.params)


def test_a_run_that_goes_on_takes_back_the_lines_it_does_again(key, svi, tmp_path):
    x, log, file = data(), tmp_path / "metrics.jsonl", tmp_path / "run.safetensors"
    options = {"batch_size": 8, "evaluate_every": 10, "log": log}
    quiet(key, svi, x, num_steps=20, checkpoint=file, **options)
    first = log.read_text()
    log.write_text(first + '{"step": 30, "seconds": 9.0, "loss": 1.0}\n')  # killed before saving
    quiet(key, svi, x, num_steps=40, checkpoint=file, **options)
    lines = log.read_text()
    assert lines.startswith(first)
    assert [json.loads(line)["step"] for line in lines.splitlines()] == [10, 20, 30, 40]
    quiet(key, svi, x, num_steps=10, **options)  # a new run starts its log afresh
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [10]


def test_a_log_without_a_folder_is_refused(key, svi, tmp_path):
    with pytest.raises(ValueError, match="log must lie in a folder that exists"):
        quiet(key, svi, data(), num_steps=1, log=tmp_path / "no" / "log.jsonl")


# Guide and model that belong together.


def exact(T=4, **options):
    return standard_diffusion((2,), T=T, **options)


def in_own(model, guide):
    """The same statements inside programs of a user."""

    def own_model(x):
        with numpyro.plate("rows", len(x)):
            model.reverse(x)

    def own_guide(x):
        with numpyro.plate("rows", len(x)):
            guide.forward(x)

    return own_model, own_guide


def model_and_guide(model, guide):
    return model.model, guide.guide


OTHERS = {
    "T": (exact(), exact(T=5), r"one kernel and one T at 'x_0_trajectory'.*, 5\).*, 4\)"),
    "rates": (
        exact(), exact(beta=np.linspace(0.3, 0.9, 4)), "the same rates at 'x_0'; .*one Diffusion"
    ),
    "units": (exact(), exact(scale=3.0), "the same loc and scale at 'x_0'"),
    "kernel": (
        exact(kernel=BernoulliKernel(0.3)), exact(kernel=BernoulliKernel(0.5)), "one kernel"
    ),
    "name": (exact(), exact(name="z"), r"must hold the trajectory 'x_0_trajectory'.*\['rows'|data"),
}  # fmt: skip


@pytest.mark.parametrize("programs", [model_and_guide, in_own])
@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.filterwarnings("ignore:Found vars in guide", "ignore:Found non-auxiliary vars")
def test_a_guide_of_another_diffusion_is_refused(key, programs, case):
    model, guide, message = OTHERS[case]
    svi = SVI(*programs(model, guide), optax.sgd(0.1), Trace_ELBO())
    x = np.ones((3, 2), int if case == "kernel" else np.float32)
    with pytest.raises(ValueError, match=message):
        quiet(key, svi, x, num_steps=1)


@pytest.mark.parametrize("loss", [Trace_ELBO(), SampledTimeELBO()])
def test_a_model_is_no_guide_and_a_guide_no_model(key, loss):
    diffusion, x = exact(), np.ones((3, 2), np.float32)
    with pytest.raises(ValueError, match=r"guide must draw trajectories .* holds 'x_0' as a model"):
        quiet(key, SVI(diffusion.model, diffusion.model, optax.sgd(0.1), loss), x, num_steps=1)


@pytest.mark.long
def test_a_guide_of_an_equal_diffusion_is_taken(key):
    """Made anew, with missing entries: K of N(0, I) at zeros."""
    model, guide = (exact(loc=1.0, scale=2.0) for _ in range(2))
    x = np.array([[1.0, 1.0], [1.0, np.nan]], np.float32)
    svi = SVI(*model_and_guide(model, guide), optax.sgd(0.1), Trace_ELBO(num_particles=200))
    losses = quiet(key, svi, {"x_0": x, "mask": ~np.isnan(x)}, num_steps=1).losses
    assert abs(losses[0] - 3 * (0.5 * np.log(2 * np.pi) + np.log(2.0))) < 0.5
