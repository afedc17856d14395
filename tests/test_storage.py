"""Saved models come back as they were, and what is not a saved model is refused by name."""

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
from flax import nnx

import probdiff
from probdiff import (
    AbsorbingKernel,
    BernoulliKernel,
    Diffusion,
    GaussianKernel,
    files,
    networks,
    readouts,
    schedules,
    storage,
)
from probdiff.trajectories import ReverseTrajectory

T = 5
BETA = schedules.log_snr_linear(T, beta_1=1e-3, alpha_bar_T=0.01)
X_0 = np.random.default_rng(0).normal(size=(3, 2))


def function(x_t, t):
    """A network of the user's own."""
    return 0.3 * x_t


def random_params(diffusion, seed=0):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(rng.uniform(0.1, 0.9, size=leaf.shape), leaf.dtype)

    return jax.tree.map(draw, diffusion.params_template)


def plain():
    return Diffusion(
        GaussianKernel(),
        BETA,
        networks.RadialBasis((2,), 4, T, rngs=nnx.Rngs(0)),
        event_shape=(2,),
    )


def with_everything():
    return Diffusion(
        GaussianKernel(),
        schedules.learned(BETA),
        networks.Perceptron((2,), 4, 1, T, bumps=3, outputs=1, context_size=3, rngs=nnx.Rngs(0)),
        event_shape=(2,),
        readout=readouts.Velocity(readouts.BridgeVariance()),
        last_step=readouts.Learned(),
        loc=np.array([1 / 3, -0.1]),
        scale=np.array([0.7, 2.0]),
        context_shape=(3,),
        name="roll",
    )


def of_the_users_own():
    return Diffusion(
        GaussianKernel(),
        BETA,
        function,
        event_shape=(2,),
        readout=readouts.Data(readouts.ForwardVariance()),
    )


def log_density(diffusion, params):
    """Of some trajectory and data: everything a model is made of enters."""
    context = None if diffusion.context_shape is None else jnp.asarray(X_0[:, :1] * np.ones(3))
    trajectory = jnp.asarray(np.random.default_rng(1).normal(size=(3, T, 2)))

    @jax.jit
    def total(params):
        reverse = diffusion.bind(params, context=context)
        last = reverse.data(trajectory[:, 0])
        return ReverseTrajectory(reverse).log_prob(trajectory) + last.log_prob(jnp.asarray(X_0))

    return total(params)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("precision", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("make", [plain, with_everything, of_the_users_own])
def test_a_model_comes_back_bit_for_bit(tmp_path, make, precision):
    with jax.enable_x64(precision == "float64"):
        diffusion = make()
        params = jax.tree.map(lambda p: p.astype(precision), random_params(diffusion))
        probdiff.save(tmp_path / "model", diffusion, params)
        network = function if make is of_the_users_own else None
        loaded, loaded_params = probdiff.load(tmp_path / "model", network=network)
        assert repr(loaded) == repr(diffusion)
        assert_same(loaded_params, params)
        assert_same(
            list(loaded.bind(loaded_params, context=context_of(loaded)).steps),
            list(diffusion.bind(params, context=context_of(diffusion)).steps),
        )
        np.testing.assert_array_equal(loaded.loc, diffusion.loc)
        np.testing.assert_array_equal(loaded.scale, diffusion.scale)
        np.testing.assert_array_equal(
            log_density(loaded, loaded_params), log_density(diffusion, params)
        )


def context_of(diffusion):
    return None if diffusion.context_shape is None else jnp.zeros(diffusion.context_shape)


def test_parameters_lie_in_the_file_as_safetensors_writes_them(tmp_path):
    """So do those of models that were saved by its own routine."""
    diffusion = with_everything()
    params = random_params(diffusion)
    probdiff.save(tmp_path, diffusion, params)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    theirs = safetensors.flax.save({jax.tree_util.keystr(path): leaf for path, leaf in leaves})
    assert (tmp_path / "params.safetensors").read_bytes() == theirs
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["params_sha256"] == hashlib.sha256(theirs).hexdigest()


def test_rates_stay_the_same_doubles(tmp_path):
    """JSON keeps float64; a learned schedule keeps its initial rates, β_1 among them."""
    diffusion = with_everything()
    probdiff.save(tmp_path, diffusion, random_params(diffusion))
    loaded, _ = probdiff.load(tmp_path)
    assert isinstance(loaded.schedule, schedules.LearnedRates)
    assert loaded.schedule.beta.tobytes() == BETA.tobytes()


def test_saving_over_a_model_replaces_it_and_leaves_nothing_else(tmp_path):
    first, second = plain(), with_everything()
    probdiff.save(tmp_path, first, random_params(first))
    probdiff.save(tmp_path, second, random_params(second, seed=1))
    loaded, params = probdiff.load(tmp_path)
    assert repr(loaded) == repr(second)
    assert_same(params, random_params(second, seed=1))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "params.safetensors"]


def test_parameters_that_do_not_fit_are_not_saved(tmp_path):
    diffusion = plain()
    with pytest.raises(ValueError, match=r"missing: .*weights"):
        probdiff.save(tmp_path / "model", diffusion, {})
    assert not (tmp_path / "model").exists()


def test_a_part_of_the_users_own_is_not_saved(tmp_path):
    class Halved(readouts.ForwardVariance):
        pass

    diffusion = Diffusion(
        GaussianKernel(), BETA, function, event_shape=(2,), readout=readouts.Data(Halved())
    )
    with pytest.raises(ValueError, match="made of built-in parts to be saved; got Halved"):
        probdiff.save(tmp_path, diffusion, {})


def test_a_network_of_the_users_own_has_to_be_handed_over(tmp_path):
    probdiff.save(tmp_path, of_the_users_own(), {})
    with pytest.raises(ValueError, match=r"network must be given: 'function' is not .* built-in"):
        probdiff.load(tmp_path)


def test_a_model_saved_before_data_variance_was_kept_is_read(tmp_path):
    diffusion = plain()
    probdiff.save(tmp_path, diffusion, random_params(diffusion))
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("data_variance") == 1.0 and config.pop("config_sha256")
    seal(file, config)
    assert probdiff.load(tmp_path)[0].data_variance == 1.0


def truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def alter(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def set_field(**fields):
    """An edit by somebody who knows of the checksum."""

    def change(file):
        config = json.loads(file.read_text()) | fields
        del config["config_sha256"]
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        file.write_text(json.dumps(config | {"config_sha256": digest}))

    return change


def edit_a_rate(file):
    config = json.loads(file.read_text())
    config["beta"][0] *= 2
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("params.safetensors", alter, "params.safetensors must be as it was saved"),
        ("params.safetensors", truncate, "params.safetensors must be as it was saved"),
        ("params.safetensors", lambda f: f.unlink(), "params.safetensors is not there"),
        ("config.json", truncate, "config.json must be JSON as saved"),
        ("config.json", lambda f: f.unlink(), "config.json is not there"),
        ("config.json", set_field(format=2), "config.json must have format 1; got 2"),
        ("config.json", set_field(format=None), "config.json must have format 1; got None"),
        ("config.json", lambda f: f.write_text("[1]"), "config.json must have format 1; got None"),
        (
            "config.json",
            set_field(last_step={"type": "system"}),
            "built-in parts .* got 'system'",
        ),
        (
            "config.json",
            set_field(network={"type": "system", "settings": {}}),
            "network must be given: 'system' is not one of the built-in",
        ),
        ("config.json", edit_a_rate, "config.json must be as it was saved"),
        ("config.json", set_field(beta_learned=True), "must hold the parameters .*x_0_beta"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_damage_is_named(tmp_path, name, damage, message):
    diffusion = plain()
    probdiff.save(tmp_path, diffusion, random_params(diffusion))
    damage(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        probdiff.load(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"path must be a saved model; .*nowhere"):
        probdiff.load(tmp_path / "nowhere")


# Edits, of which none may end inside.


def discretised():
    network = networks.Perceptron((2,), 4, 1, T, outputs=6, rngs=nnx.Rngs(0))
    last = readouts.Discretised(0, 15, 16)
    options = {"readout": readouts.Mixture(2), "last_step": last, "loc": 7.5, "scale": 4.0}
    return Diffusion(GaussianKernel(), BETA, network, event_shape=(2,), **options)


def of_bits():
    network = networks.RadialBasis((2,), 3, T, outputs=1, rngs=nnx.Rngs(0))
    kernel = BernoulliKernel((0.5, 0.4))
    return Diffusion(kernel, schedules.harmonic(T), network, event_shape=(2,))


def of_classes():
    network = networks.Perceptron((2,), 4, 1, T, outputs=3, states=4, rngs=nnx.Rngs(0))
    return Diffusion(AbsorbingKernel(3), schedules.harmonic(T), network, event_shape=(2,))


def of_images():
    network = networks.UNet((4, 4), (8, 8), 1, rngs=nnx.Rngs(0))
    return Diffusion(GaussianKernel(), BETA, network, event_shape=(4, 4))


def of_scales():
    network = networks.MultiScaleConvolution(
        (4, 4), 2, 1, T, scales=2, dense_width=3, dense_depth=1, rngs=nnx.Rngs(0)
    )
    return Diffusion(GaussianKernel(), BETA, network, event_shape=(4, 4))


MISSING = object()
WRONG = [
    MISSING, None, "system", "", "../../etc/passwd", True, -1, 0, 10**9, 10**40, -2.5, 1e300,
    math.nan, math.inf, [], [1], [-1, 2], [10**9, 10**9], [[]], ["x"], [None], {}, {"type": "x"},
    {"type": "Tied"}, {"type": 3}, {"type": "Velocity", "variance": {"type": "Velocity"}},
    "0" * 64, [[[[[[1]]]]]],
]  # fmt: skip


def places(value, path=()):
    """Paths of all fields, and of the first items of lists."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list) and value:
        items = [(0, value[0]), (len(value) - 1, value[-1])]
    for name, item in items:
        yield from places(item, (*path, name))


def with_edit(config, path, wrong):
    config = json.loads(json.dumps(config))
    *lead, name = path
    parent = functools.reduce(lambda value, key: value[key], lead, config)
    if wrong is MISSING:
        del parent[name]
    else:
        parent[name] = wrong
    return config


def seal(file, config):
    """Write a configuration with the checksum of one that was saved."""
    config = {name: value for name, value in config.items() if name != "config_sha256"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(config | {"config_sha256": digest}))


MODELS = [plain, with_everything, discretised, of_bits, of_classes, of_images, of_scales]


@pytest.mark.parametrize(
    "make", [MODELS[0], *(pytest.param(make, marks=pytest.mark.long) for make in MODELS[1:])]
)
def test_every_edit_of_a_configuration_is_named_or_makes_a_model(tmp_path, make, unchecked):
    """The checksum stands, as by one who knows of it: what is wrong has to be found by itself."""
    diffusion = make()
    probdiff.save(tmp_path, diffusion, random_params(diffusion))
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config.pop("config_sha256")
    tried, passed = 0, []
    edits = [(path, wrong) for path in places(config) for wrong in WRONG]
    edits += [((*path[:-1], "unknown"), 3) for path in places(config) if type(path[-1]) is str]
    for path, wrong in edits:
        edited = with_edit(config, path, wrong)
        if edited == config:
            continue
        seal(file, edited)
        tried += 1
        try:
            loaded, params = probdiff.load(tmp_path)
        except ValueError as error:
            text = str(error)
            assert str(file) in text or "params.safetensors" in text, (path, wrong, text)
            assert len(text) < 1000, (path, wrong, text)
        else:
            passed.append((path, wrong))
            loaded.check_params(params)
            assert np.isfinite(loaded.rates).all()
    assert tried > 400
    print(f"{make.__name__}: {tried} edits, {len(passed)} of them models")
    # what passes is another model: of other units or rates, or with a setting that is not used
    known = {"loc", "scale", "data_variance", "beta", "readout", "kernel", "last_step", "network"}
    known |= {"context_shape"}
    assert {path[0] for path, _ in passed} <= known, passed
    assert len(passed) < 0.1 * tried, passed


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04" + bytes(100), b"[" * 100_000,
        b"\x80\x04cos\nsystem\n(S'true'\ntR.", b"\xff\xfe", b"9" * 10_000, b"null",
        b'{"format": 1}', b'{"format": true}', b"NaN", b'{"format": ' + b"9" * 5000 + b"}",
    ],
    ids=range(12),
)  # fmt: skip
@pytest.mark.parametrize("name", ["config.json", "params.safetensors"])
def test_a_foreign_file_is_named(tmp_path, name, content):
    diffusion = plain()
    probdiff.save(tmp_path, diffusion, random_params(diffusion))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name)):
        probdiff.load(tmp_path)
    if name != "config.json":  # and where its checksum is right
        config = json.loads((tmp_path / "config.json").read_text())
        seal(
            tmp_path / "config.json",
            config | {"params_sha256": hashlib.sha256(content).hexdigest()},
        )
        with pytest.raises(ValueError, match=r"params.safetensors must be a safetensors file"):
            probdiff.load(tmp_path)


def sealed_params(folder, change):
    """Parameters that were changed, their checksum with them."""
    file = folder / "params.safetensors"
    tensors = safetensors.numpy.load(file.read_bytes())
    data = safetensors.numpy.save(change(tensors))
    file.write_bytes(data)
    config = json.loads((folder / "config.json").read_text())
    seal(folder / "config.json", config | {"params_sha256": hashlib.sha256(data).hexdigest()})


def one_of(change):
    return lambda tensors: tensors | {(name := min(tensors)): change(tensors[name])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_of(lambda a: np.full_like(a, np.nan)), "must be finite; got 20 of 20 numbers"),
        (one_of(lambda a: a.astype(np.int32)), "must be of a floating dtype; got int32"),
        (one_of(lambda a: a[..., :-1]), "by them .* has shape"),
        (lambda tensors: {}, "by them .* got none|no more than the 0 parameters"),
        (lambda tensors: tensors | {"../x": np.zeros(1)}, r"must hold the parameters .*\.\./x"),
    ],
)
def test_parameters_that_are_none_are_named(tmp_path, change, message):
    diffusion = plain()
    probdiff.save(tmp_path, diffusion, random_params(diffusion))
    sealed_params(tmp_path, change)
    with pytest.raises(ValueError, match=rf"(params.safetensors|config.json).*({message})"):
        probdiff.load(tmp_path)


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    diffusion = plain()
    params = jax.tree.map(lambda leaf: leaf * jnp.nan, random_params(diffusion))
    with pytest.raises(ValueError, match=r"params.* must be finite"):
        probdiff.save(tmp_path / "model", diffusion, params)
    assert not (tmp_path / "model").exists()


# A save that is killed.


class Killed(BaseException):
    """Ends a process at once, as far as files go."""


@pytest.mark.parametrize("step", range(6))
def test_a_save_that_is_killed_leaves_the_old_model_or_the_new(tmp_path, monkeypatch, step):
    old, new = plain(), with_everything()
    old_params, new_params = random_params(old), random_params(new, seed=1)
    probdiff.save(tmp_path, old, old_params)
    count = iter(range(100))

    def step_by_step(function):
        def take(*args, **kwargs):
            if next(count) == step:
                raise Killed
            return function(*args, **kwargs)

        return take

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync"):
            patch.setattr(os, name, step_by_step(getattr(os, name)))
        with contextlib.suppress(Killed):
            probdiff.save(tmp_path, new, new_params)
    loaded, params = probdiff.load(tmp_path)
    is_new = repr(loaded) == repr(new)
    assert_same(params, new_params if is_new else old_params)
    probdiff.save(tmp_path, new, new_params)
    assert_same(probdiff.load(tmp_path)[1], new_params)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "params.safetensors"]


def test_two_who_save_at_once_leave_one_of_the_two_whole(tmp_path):
    diffusion = plain()
    sets = [random_params(diffusion, seed) for seed in range(3)]
    probdiff.save(tmp_path, diffusion, sets[0])

    def save(params):
        for _ in range(5):
            probdiff.save(tmp_path, diffusion, params)

    threads = [threading.Thread(target=save, args=(params,)) for params in sets]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        probdiff.load(tmp_path)
    probdiff.load(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "params.safetensors"]


def test_one_who_keeps_the_folder_to_himself_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_PATIENCE", 0.1)
    with (
        files.locked(tmp_path / "config.json"),
        pytest.raises(TimeoutError, match=f"is being written by process {os.getpid()}"),
    ):
        probdiff.save(tmp_path, plain(), random_params(plain()))
