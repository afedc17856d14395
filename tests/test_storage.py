"""Saved models come back as they were, and what is not a saved model is refused by name."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
from flax import nnx

import probdiff
from probdiff import Diffusion, GaussianKernel, networks, readouts, schedules
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
