"""A run that goes on is the run that was begun: program, objective and optimiser are compared."""

import functools
import json
import os
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from jax import random
from numpyro.infer import SVI, Trace_ELBO

from probdiff import (
    Diffusion,
    GaussianKernel,
    SampledTimeELBO,
    SimpleLoss,
    UniformTimes,
    fit,
    networks,
    readouts,
    schedules,
)
from probdiff.train import checkpoint as checkpoints

T = 5
X = np.random.default_rng(0).normal(size=(32, 2)).astype(np.float32)
RATES = schedules.linear(T, beta_T=0.5)


class Network(nnx.Module):
    """One hidden layer; the last is zero, and hides what is before it at first."""

    def __init__(self, activation):
        self.activation = activation
        self.first = nnx.Linear(2, 8, rngs=nnx.Rngs(0))
        self.last = nnx.Linear(8, 4, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(1))

    def __call__(self, x_t, t):
        return self.last(self.activation(self.first(x_t)))


def make(
    *, optimiser=None, objective=None, beta=RATES, activation=nnx.relu, network=None, **options
):
    network = Network(activation) if network is None else network
    diffusion = Diffusion(GaussianKernel(), beta, network, event_shape=(2,), **options)
    optimiser = optax.adam(1e-2) if optimiser is None else optimiser
    objective = SampledTimeELBO() if objective is None else objective
    return SVI(diffusion.model, diffusion.guide, optimiser, objective)


def run(path, num_steps=20, svi=None, **options):
    svi = make(**options) if svi is None else svi
    return fit(
        random.key(0), svi, X, num_steps=num_steps, batch_size=16, checkpoint=path, progress=False
    )


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.safetensors"
    run(path)
    return path


def scheduled(steps):
    return optax.adam(optax.cosine_decay_schedule(1e-2, steps))


QUICK = [
    ({"optimiser": optax.adam(2e-2)}, r"has optimiser: scale.step_size -0.01, not -0.02"),
    ({"objective": SampledTimeELBO(num_times=2)}, r"objective.num_times 1, not 2"),
    ({"beta": schedules.linear(T, beta_T=0.4)}, r"has rates"),
    ({"activation": nnx.gelu}, r"its step [23] had the loss"),
]
LONG = [
    ({"optimiser": optax.adam(1e-2, b1=0.8)}, r"optimiser: scale_by_adam.b1 0.9, not 0.8"),
    ({"optimiser": scheduled(50)}, r"optimiser: scale"),
    ({"optimiser": optax.adamw(1e-2)}, r"optimiser: add_decayed_weights"),
    ({"optimiser": numpyro.optim.Adam(1e-2)}, r"has optimiser _NumPyroOptim, not Adam"),
    ({"objective": SimpleLoss()}, r"has objective SampledTimeELBO, not SimpleLoss"),
    ({"objective": Trace_ELBO()}, r"has objective SampledTimeELBO, not Trace_ELBO"),
    ({"objective": SampledTimeELBO(times=UniformTimes())}, r"objective.times S.*, not Uniform"),
    ({"beta": schedules.linear(T + 1, beta_T=0.5)}, r"has rates"),
    ({"readout": readouts.Data()}, r"has readout Perturbation.*, not Data"),
    ({"last_step": readouts.Learned()}, r"has last_step Tied\(\), not Learned\(\)"),
    ({"scale": 1.1}, r"has scale .*1.*, not .*1.1"),
    ({"loc": np.array([0.0, 0.1])}, r"has loc"),
    (
        {"network": networks.Perceptron((2,), 8, 1, T, rngs=nnx.Rngs(0))},
        r"has site 'x_0_network\$params'",
    ),
]


@pytest.mark.parametrize(
    ("change", "difference"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)],
)
def test_a_run_of_another_program_is_refused_and_its_file_left(begun, change, difference):
    before = begun.read_bytes()
    with pytest.raises(ValueError, match=r"must be of this run; got .*run.safetensors") as error:
        run(begun, 30, **change)
    assert error.match(difference)
    assert begun.read_bytes() == before


def test_a_finished_run_of_another_program_is_refused(begun):
    with pytest.raises(ValueError, match=r"must be of this run; .*step_size -0.01, not -0.03"):
        run(begun, optimiser=optax.adam(3e-2))


@pytest.mark.long
def test_a_schedule_that_differs_only_later_is_another(tmp_path):
    run(tmp_path / "run", optimiser=scheduled(1000))
    with pytest.raises(ValueError, match=r"scale_by_schedule.step_size_fn at steps 0, 1, 10"):
        run(tmp_path / "run", 30, optimiser=scheduled(2000))


@pytest.mark.long
def test_the_same_program_written_otherwise_goes_on(begun, tmp_path):
    """An activation of one's own is the same numbers by other operations."""
    path = tmp_path / "run"
    path.write_bytes(begun.read_bytes())
    whole = run(None, 30)
    other = run(path, 30, activation=lambda x: jnp.where(x > 0, x, 0 * x))
    np.testing.assert_allclose(other.losses, whole.losses, rtol=1e-5)


def edited(path, into, change):
    """A copy of a checkpoint whose program's entry is changed."""
    arrays, about = checkpoints.read(path)
    program = change(json.loads(about.pop("program")))
    about |= {} if program is None else {"program": json.dumps(program)}
    checkpoints.write(into, arrays, about)
    return into


@pytest.mark.parametrize(
    "change",
    [
        lambda program: None,  # as files were before
        pytest.param(
            lambda program: program | {"environment": {}, "operations": "", "parts": {}},
            marks=pytest.mark.long,
        ),
        pytest.param(lambda program: {"a": 1}, marks=pytest.mark.long),
    ],
)
def test_where_there_is_no_identity_the_first_losses_decide(begun, tmp_path, change):
    path = edited(begun, tmp_path / "run", change)
    with pytest.raises(ValueError, match=r"its step 1 had the loss .*, that of this program"):
        run(path, 30, scale=1.1)
    np.testing.assert_array_equal(run(path, 30).losses, run(None, 30).losses)


@pytest.mark.parametrize("beside", [0.5, -np.inf])
def test_constants_that_a_program_closes_over_belong_to_it(tmp_path, beside):
    def svi(spread):
        scale = jnp.append(jnp.linspace(1.0, spread, 16), beside)

        def model(x):
            with numpyro.plate("data", len(x)):
                law = dist.Normal(numpyro.param("w", 0.0), scale[:16, None] * jnp.ones(2))
                numpyro.sample("x", law.to_event(1), obs=x)

        return SVI(model, lambda x: None, optax.sgd(1e-4), Trace_ELBO())

    run(tmp_path / "run", svi=svi(2.0))
    with pytest.raises(ValueError, match="must be of this run"):
        run(tmp_path / "run", 30, svi=svi(2.01))
    assert run(tmp_path / "run", 30, svi=svi(2.0)).num_steps == 30


IN_ANOTHER = """
    import sys
    from test_identity import make
    import jax
    from probdiff.train.step import TracedSVI
    from test_identity import X
    svi = make(**eval(sys.argv[1]))
    print(TracedSVI(svi, jax.random.key(0), jax.numpy.asarray(X), None).identity(X).text())
"""


@pytest.mark.long
@pytest.mark.parametrize("options", ["{}", "{'readout': __import__('probdiff').readouts.Data()}"])
def test_the_identity_is_the_same_in_every_process(options):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(IN_ANOTHER), options]
    ask = functools.partial(subprocess.check_output, command, text=True)
    one, other = (ask(env=env | {"PYTHONHASHSEED": seed}) for seed in ("1", "2"))
    assert one == other and len(json.loads(one)["parts"]) > 20


def test_hyperparameters_are_told_by_name(begun):
    parts = json.loads(checkpoints.read(begun)[1]["program"])["parts"]
    assert parts["optimiser: scale.step_size"] == "-0.01"
    assert parts["objective"] == "SampledTimeELBO"
    assert parts["readout"] == "Perturbation(variance=LearnedVariance())"
    assert not any(" at 0x" in text for text in parts.values())
