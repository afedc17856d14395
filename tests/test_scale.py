"""Several devices or processes give what one gives, and exchange no more than they must."""

import os
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh
from numpyro.infer import SVI, Trace_ELBO

from probdiff import (
    Diffusion,
    GaussianKernel,
    SampledTimeELBO,
    fit,
    networks,
    readouts,
    sample,
    schedules,
)

T = 5


def plane():
    """The model that the processes have too."""
    network = networks.Perceptron((2,), 8, 2, T, rngs=nnx.Rngs(0))
    beta = schedules.log_snr_linear(T=T, beta_1=1e-2, alpha_bar_T=1e-2)
    return Diffusion(GaussianKernel(), beta, network, event_shape=(2,))


COMMON = f"""
    import re, sys
    from functools import partial
    import jax, numpy as np, optax
    import jax.numpy as jnp
    from flax import nnx
    from jax import random
    from jax.sharding import Mesh
    from numpyro.infer import SVI, Trace_ELBO
    from probdiff import (
        Diffusion, GaussianKernel, SampledTimeELBO, devices, diagnostics, fit, networks, readouts,
        sample, schedules,
    )
    from probdiff.train.data import from_data
    from probdiff.train.step import TracedSVI, _chunk

    T = {T}
    beta = schedules.log_snr_linear(T=T, beta_1=1e-2, alpha_bar_T=1e-2)
    mesh = Mesh(jax.devices(), ("data",))
    x = random.normal(random.key(7), (100, 2))

    def plane():
        network = networks.Perceptron((2,), 8, 2, T, rngs=nnx.Rngs(0))
        return Diffusion(GaussianKernel(), beta, network, event_shape=(2,))

    def collectives(text):
        kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
        return re.findall(rf" ({{kinds}})(?:-start)?\\(", text)

    def in_a_step(svi, data, batch_size):
        source = from_data(random.key(2), data, batch_size, mesh)
        svi = TracedSVI(svi, random.key(0), source.first, mesh)
        functions, carry = (svi._update, svi._get_params), svi.start(averaged=True)
        options = np.int32(0), np.int32(1), 0.9, np.zeros(source.capacity, np.float32)
        chunk = jax.jit(partial(_chunk, mesh=mesh))
        lowered = chunk.lower(*functions, carry, *source.take(0, 1), *options)
        return collectives(lowered.compile().as_text())

    def in_a_round(function, reverse, block, **static):
        own = jax.tree.map(lambda leaf: jnp.stack([leaf] * mesh.size), block)
        on_each = partial(devices._on_each_device, of=function, mesh=mesh, **static)
        lowered = jax.jit(on_each).lower(reverse, own)
        return collectives(lowered.compile().as_text())

    def close(ours, theirs, **tolerance):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, **tolerance)

    def equal(ours, theirs):
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(a, b)
"""


def start(program, count=4, arguments=(), first=""):
    """A process with so many virtual devices that runs the program after what is common."""
    devices = f"--xla_force_host_platform_device_count={count}"
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}", "JAX_PLATFORMS": "cpu"}
    env = os.environ | flags | {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = first + textwrap.dedent(COMMON) + textwrap.dedent(program)
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def check(*processes):
    """What each process wrote to its second stream, once all have ended well."""
    errors = [process.communicate(timeout=600)[1] for process in processes]
    ends = [error[-3000:] for error in errors]
    assert all(process.returncode == 0 for process in processes), "\n".join(ends)
    return errors


# Four devices.


@pytest.mark.long
def test_a_step_on_four_devices_is_one_all_reduce():
    check(start("""
        diffusion = plane()
        svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-3), SampledTimeELBO())
        assert in_a_step(svi, x, 8) == ["all-reduce"]
    """))  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(
    "objective",
    ["Trace_ELBO()", "SampledTimeELBO(num_times=2)", "SampledTimeELBO(num_particles=2)"],
)
def test_every_objective_is_one_all_reduce(objective):
    check(start(f"""
        diffusion = plane()
        optimiser = optax.MultiSteps(optax.adam(1e-3), 4).gradient_transformation()
        svi = SVI(diffusion.model, diffusion.guide, optimiser, {objective})
        found = in_a_step(svi, x, 8)
        assert found == ["all-reduce"], found
    """))  # fmt: skip


@pytest.mark.long
def test_a_step_of_a_u_net_on_four_devices_is_one_all_reduce_and_equals_one_devices():
    check(start("""
        network = networks.UNet((8, 8), (8, 16), 1, T=T, outputs=6, rngs=nnx.Rngs(0))
        diffusion = Diffusion(
            GaussianKernel(), beta, network, event_shape=(8, 8), readout=readouts.Mixture(2)
        )
        images = random.normal(random.key(1), (40, 8, 8))
        svi = SVI(diffusion.model, diffusion.guide, optax.sgd(1e-3), SampledTimeELBO())
        one, four = (
            fit(random.key(0), svi, images, num_steps=1, batch_size=16, ema_decay=0.9, mesh=m,
                progress=False)
            for m in (None, mesh)
        )
        start = svi.get_params(svi.init(random.split(random.key(0), 3)[0], images[:16]))
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), one.raw_params, start)
        assert max(jax.tree.leaves(moved)) > 1e-3
        close(one.losses, four.losses, rtol=1e-5)
        close(one.raw_params, four.raw_params, rtol=1e-4, atol=1e-6)
        close(one.params, four.params, rtol=1e-4, atol=1e-6)
        assert in_a_step(svi, images, 16) == ["all-reduce"]
    """))  # fmt: skip


@pytest.mark.long
def test_a_long_run_on_four_devices_ends_where_one_devices_does():
    """K after 1,000 steps, five seeds: moved by less than a fifth of the spread over seeds."""
    check(start("""
        centres = 2 * random.randint(random.key(1), (2_000, 2), 0, 2) - 1
        data = centres + 0.3 * random.normal(random.key(2), (2_000, 2))

        diffusion = plane()
        svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-2), SampledTimeELBO())

        def bound(params):
            tree = diagnostics.bound(random.key(0), diffusion, params, data[:500])
            return float(tree["bound"]["bound"].mean())

        def train(seed, mesh):
            return bound(fit(random.key(seed), svi, data, num_steps=1_000, batch_size=32,
                             mesh=mesh, progress=False).params)

        one, four = (np.array([train(seed, m) for seed in range(5)]) for m in (None, mesh))
        untrained = bound(svi.get_params(svi.init(random.key(0), data[:32])))
        print(one, four, untrained, file=sys.stderr)
        assert one.min() > untrained + 0.2
        assert np.abs(four - one).max() < 0.2 * one.std(ddof=1)
    """))  # fmt: skip


@pytest.mark.long
def test_diagnostics_on_four_devices_give_the_figures_of_one_and_exchange_nothing():
    check(start("""
        from probdiff.diagnostics import bounds, weights

        diffusion = plane()
        params = diffusion.params_template
        params = jax.tree.map(lambda a: 0.3 * random.normal(random.key(3), a.shape), params)
        block, reverse = (random.key(0), x[:4], None, None), diffusion.bind(params)
        assert in_a_round(bounds._bound_block, reverse, block, num_draws=2) == []
        assert in_a_round(bounds._sampled_block, reverse, block, num_times=2) == []
        block = random.key(0), np.arange(4), np.arange(4), x[:4], None, None
        assert in_a_round(weights._weigh_block, reverse, block, size=10, threshold=0.5) == []

        def alike(one, four):
            assert list(one.dataset) == list(four.dataset)
            for name in one.dataset:
                np.testing.assert_allclose(one[name], four[name], rtol=1e-5, atol=1e-5)

        seen = random.bernoulli(random.key(4), 0.7, x.shape)
        for function, options in (
            (diagnostics.bound, {"num_draws": 2, "mask": seen}),
            (diagnostics.sampled_bound, {}),
        ):
            one, four = (
                function(random.key(1), diffusion, params, x, block_size=11, mesh=m, **options)
                for m in (None, mesh)
            )
            alike(one["bound"], four["bound"])
        one, four = (
            diagnostics.ladder(
                random.key(1), diffusion, params, x[:9], sizes=(1, 10), num_draws=2, mesh=m
            )["ladder"]
            for m in (None, mesh)
        )
        alike(one, four)
        one, four = (
            diagnostics.sandwich(random.key(1), diffusion, params, 9, sizes=(1, 10), mesh=m)
            for m in (None, mesh)
        )
        alike(one["sandwich"], four["sandwich"])
    """))  # fmt: skip


@pytest.mark.long
def test_blocks_of_a_traced_function_on_four_devices_are_those_of_one_and_see_its_data():
    check(start("""
        from probdiff.compilation import Programs, trace

        def draw(key, given, x):
            function, w = given
            return function(w, random.normal(key, x.shape) + x)

        programs = Programs()
        blocks = [(random.fold_in(random.key(0), b), np.full(3, b, float)) for b in range(6)]
        for data in (np.ones(3), np.arange(3.0)):
            function = trace(lambda w, x: jnp.tanh(w * x) + data, jnp.ones(3), jnp.ones(3))
            one, four = (
                list(devices.blockwise(programs, draw, (function, 2 * jnp.ones(3)), blocks, m))
                for m in (None, mesh)
            )
            equal(one, four)
        assert len(programs._kept) == 2
    """))  # fmt: skip


@pytest.mark.long
def test_draws_on_four_devices_are_those_of_one_and_exchange_nothing():
    check(start("""
        diffusion = plane()
        params = diffusion.params_template
        params = jax.tree.map(lambda a: 0.3 * random.normal(random.key(3), a.shape), params)
        block = random.key(0), np.arange(4), None
        assert in_a_round(sample._draw_block, diffusion.bind(params), block, keep=False) == []
        options = {"num_samples": 23, "block_size": 4}
        one, four = (
            sample.ancestral(random.key(1), diffusion, params, mesh=m, **options)
            for m in (None, mesh)
        )
        equal(one, four)
    """))  # fmt: skip


@pytest.mark.long
def test_on_four_devices_contexts_keep_their_rows_and_what_does_not_divide_is_refused():
    check(start("""
        diffusion = Diffusion(
            GaussianKernel(), beta, lambda x_t, t, c: jnp.broadcast_to(c, x_t.shape),
            event_shape=(2,), context_shape=(1,),
            readout=readouts.Data(readouts.BridgeVariance()), last_step=readouts.Learned(),
        )
        context = 10.0 * np.arange(30.0)[:, None]
        one, four = (
            sample.ancestral(
                random.key(1), diffusion, {}, 30, context=context, block_size=7, steps=3,
                keep_trajectory=True, mesh=m,
            )
            for m in (None, mesh)
        )
        equal(one, four)
        for function, arguments in (
            (sample.ancestral, {"num_samples": 100}),
            (diagnostics.bound, {"x_0": x}),
            (diagnostics.sampled_bound, {"x_0": x}),
        ):
            try:
                function(random.key(0), plane(), plane().params_template, mesh=mesh, **arguments)
            except ValueError as error:
                assert "block_size must be at most 25, so that each of the 4 devices" in str(error)
            else:
                raise AssertionError(function)
        assert len(sample.ancestral(
            random.key(1), diffusion, {}, 3, context=context[:3], block_size=1, mesh=mesh
        )) == 3
        svi = SVI(diffusion.model, diffusion.guide, optax.sgd(1e-3), SampledTimeELBO())
        try:
            fit(random.key(0), svi, x, num_steps=1, batch_size=30, mesh=mesh)
        except ValueError as error:
            assert "batch_size must be a multiple of the 4 devices in mesh; got 30" in str(error)
        else:
            raise AssertionError
    """))  # fmt: skip


# Two processes.

PROCESS = """
    import warnings

    index, folder = int(sys.argv[1]), sys.argv[3]
    assert jax.process_count() == 2 and jax.local_device_count() == 2
    diffusion = plane()
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-2), SampledTimeELBO())
    options = {
        "batch_size": 20, "ema_decay": 0.9, "held_out": x[:30], "evaluate_every": 7, "mesh": mesh
    }
    assert devices.agreed(5 + index, mesh) == 5
    def refused(data, what, **more):
        try:
            fit(random.key(0), svi, data, num_steps=3, progress=False, **more, **options)
        except ValueError as error:
            assert f"{what} must be the same in every process" in str(error), error
        else:
            raise AssertionError(what)

    refused(x + index, "data (SHA-256)")
    own = {"checkpoint": f"{folder}/run{index}.safetensors"}
    fit(random.key(0), svi, x, num_steps=2, progress=False, **own, **options)
    refused(x, "the step that checkpoint is at", **own)
    shared = {"checkpoint": f"{folder}/run.safetensors", "log": f"{folder}/log"}
    fit(random.key(0), svi, x, num_steps=15, patience=9, **shared, **options)
    fitted = fit(random.key(0), svi, x, num_steps=40, patience=9, **shared, **options)
    stream = (np.asarray(x[i % 5 * 20:][:20]) for i in range(6))
    streamed = fit(random.key(0), svi, stream, num_steps=5, mesh=mesh, progress=False)

    params = fitted.params
    draws = sample.ancestral(random.key(1), diffusion, params, 23, block_size=4, mesh=mesh)
    alone = sample.ancestral(random.key(1), diffusion, params, 23, block_size=4)
    np.testing.assert_allclose(draws, alone, rtol=1e-5, atol=1e-6)
    bound = diagnostics.bound(random.key(1), diffusion, params, x, block_size=25, mesh=mesh)
    alone = diagnostics.bound(random.key(1), diffusion, params, x, block_size=25)
    np.testing.assert_allclose(
        bound["bound"]["bound"], alone["bound"]["bound"], rtol=1e-5, atol=1e-5
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diagnostics.ladder(
            random.key(1), diffusion, params, x[:4], sizes=(1, 4), num_draws=2, mesh=mesh
        )
    leaves = {f"leaf_{i}": leaf for i, leaf in enumerate(jax.tree.leaves(params))}
    np.savez(
        f"{folder}/{index}.npz", **leaves, losses=fitted.losses, draws=draws,
        held_out=fitted.held_out_losses.loss, streamed=streamed.losses,
    )
"""
JOIN = """
import sys, jax
jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1]))
"""


@pytest.mark.long
def test_two_processes_give_what_one_gives(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    bars = check(*(start(PROCESS, 2, (i, port, tmp_path), JOIN) for i in range(2)))
    assert ["40/40" in bar for bar in bars] == [True, False]
    assert [(tmp_path / f"run{i}.safetensors").exists() for i in range(2)] == [True, False]
    one, other = (np.load(tmp_path / f"{i}.npz") for i in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert len((tmp_path / "log").read_text().splitlines()) == 6 + 1

    diffusion = plane()
    svi = SVI(diffusion.model, diffusion.guide, optax.adam(1e-2), SampledTimeELBO())
    x = jax.random.normal(jax.random.key(7), (100, 2))
    fitted = fit(
        jax.random.key(0), svi, x, num_steps=40, batch_size=20, ema_decay=0.9, held_out=x[:30],
        evaluate_every=7, patience=9, progress=False,
    )  # fmt: skip
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(one["losses"], fitted.losses, **close)
    np.testing.assert_allclose(one["held_out"], fitted.held_out_losses.loss, **close)
    for i, leaf in enumerate(jax.tree.leaves(fitted.params)):
        np.testing.assert_allclose(one[f"leaf_{i}"], leaf, **close)
    draws = sample.ancestral(jax.random.key(1), diffusion, fitted.params, 23, block_size=4)
    np.testing.assert_allclose(one["draws"], draws, rtol=1e-3, atol=1e-3)


# One device.


def test_a_mesh_of_one_device_changes_nothing(key):
    diffusion = plane()
    params = jax.tree.map(lambda a: jnp.full(a.shape, 0.1), diffusion.params_template)
    mesh = jax.make_mesh((1,), ("any",))
    one, same = (
        sample.ancestral(key, diffusion, params, 10, block_size=4, mesh=m) for m in (None, mesh)
    )
    np.testing.assert_array_equal(one, same)


def test_a_step_at_several_times_keeps_rows_and_contexts_together(key):
    """Rows are moved on their way to the network and back."""
    diffusion = Diffusion(
        GaussianKernel(),
        schedules.linear(T, beta_1=0.1, beta_T=0.5),
        lambda x_t, t, context: x_t * t[:, None] + context,
        event_shape=(2,),
        context_shape=(2,),
        readout=readouts.Epsilon(readouts.BridgeVariance()),
    )
    keys = jax.random.split(key)
    x, context = jax.random.normal(keys[0], (3, 4, 2)), jax.random.normal(keys[1], (4, 2))
    t = jnp.array([[2, 3, 4, 5], [5, 2, 3, 4], [2, 2, 5, 5]])
    reverse = diffusion.bind({}, context=context)
    mean = reverse.step(x, t, examples_first=True).mean
    for x_t, times, expected in zip(x, t, mean, strict=True):
        np.testing.assert_allclose(reverse.step(x_t, times).mean, expected, rtol=1e-6)


def test_a_mesh_of_two_axes_is_refused(key):
    diffusion = plane()
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("a", "b"))
    with pytest.raises(ValueError, match=r"mesh must have one axis; got \('a', 'b'\)"):
        sample.ancestral(key, diffusion, diffusion.params_template, 3, mesh=mesh)


@pytest.mark.parametrize("optimiser", [optax.sgd(1e-2), optax.adam(1e-2)], ids=["sgd", "adam"])
def test_gathering_gradients_of_k_batches_is_one_step_on_their_sum(key, optimiser):
    """Rows of step i of kB are those of steps ki to ki + k − 1 of B; MultiSteps takes the mean."""

    def model(x, y):
        w = numpyro.param("w", jnp.zeros(3))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(jnp.tanh(x @ w), 1.0), obs=y)

    k, x = 4, jax.random.normal(jax.random.key(1), (100, 3))
    data = x, x @ jnp.array([1.0, -2.0, 3.0])
    summed = optax.chain(optax.scale(k), optimiser)
    gathered = optax.MultiSteps(summed, k).gradient_transformation()
    options = {"progress": False}
    small = fit(
        key, SVI(model, lambda x, y: None, gathered, Trace_ELBO()), data, num_steps=5 * k,
        batch_size=8, **options,
    )  # fmt: skip
    large = fit(
        key, SVI(model, lambda x, y: None, optimiser, Trace_ELBO()), data, num_steps=5,
        batch_size=8 * k, **options,
    )  # fmt: skip
    np.testing.assert_allclose(small.losses.reshape(5, k).sum(1), large.losses, rtol=1e-5)
    np.testing.assert_allclose(small.params["w"], large.params["w"], rtol=1e-5)
    assert np.abs(large.params["w"]).max() > 1e-2
