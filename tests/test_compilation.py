"""What is computed is compiled once, and what has changed is seen."""

import gc
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from numpyro.infer import SVI

from probdiff import SampledTimeELBO, standard_diffusion
from probdiff.compilation import KEPT, Programs, call, trace

X = jnp.arange(3.0)


def count(programs):
    """Compiled functions, and compilations of each."""
    return [jitted._cache_size() for jitted in programs._kept.values()]


def run(programs, function, *args):
    return programs(call, trace(function, *args), *args)


def test_the_same_code_over_other_data_is_compiled_once():
    programs = Programs()
    for seed in range(3):
        data = jax.random.normal(jax.random.key(seed), (3,))
        np.testing.assert_allclose(run(programs, lambda x, d=data: x * d, X), X * data)
    assert count(programs) == [1]


def test_data_that_change_in_place_are_seen():
    programs, data = Programs(), np.ones(3, np.float32)

    def function(x):
        return x + jnp.asarray(data)

    assert run(programs, function, X).tolist() == [1, 2, 3]
    data[:] = 5
    assert run(programs, function, X).tolist() == [5, 6, 7]
    assert count(programs) == [1]


def test_what_was_traced_keeps_its_data():
    data = np.ones(3, np.float32)
    traced = trace(lambda x: x + data, X)
    data[:] = 5
    assert traced(X).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("one", "other"), [(1, 2), (0.0, -0.0), (1, True), (1.0, 1), (jnp.float32(1), jnp.float32(2))]
)
def test_another_number_in_the_code_is_another_program(one, other):
    programs, box = Programs(), [one]

    def function(x):
        return jnp.copysign(1.0, jnp.asarray(box[0], float)) * x * box[0]

    first = run(programs, function, X)
    box[0] = other
    second = run(programs, function, X)
    expected = np.copysign(1.0, float(other)) * np.asarray(X) * float(other)
    np.testing.assert_array_equal(np.signbit(second), np.signbit(expected))
    np.testing.assert_array_equal(second, expected)
    assert first.shape == second.shape


def test_numbers_inside_a_compiled_function_are_seen():
    """Constants of an inner `jit` are part of its jaxpr, not arguments."""
    programs = Programs()
    for value in (1.0, 2.0):
        array = jnp.full(3, value)
        inner = jax.jit(lambda x, v=array: x + v)
        assert run(programs, lambda x, f=inner: f(x), X).tolist() == [value, 1 + value, 2 + value]


def test_functions_with_rules_of_their_own_are_compiled_once():
    programs = Programs()
    for _ in range(3):
        run(programs, lambda x: jax.nn.relu(x) + jax.nn.softplus(x) + jax.scipy.special.logit(x), X)
    assert count(programs) == [1]


def test_a_traced_function_has_its_gradient():
    traced = trace(lambda x: jnp.sum(jax.nn.softplus(x) ** 2), X)
    np.testing.assert_allclose(
        jax.grad(traced)(X), jax.grad(lambda x: jnp.sum(jax.nn.softplus(x) ** 2))(X)
    )


def test_shapes_dtypes_and_options_are_programs_of_their_own():
    programs = Programs()

    def power(x, *, by):
        return x**by

    for x in (X, jnp.arange(4.0), jnp.arange(3)):
        for by in (1, 2, True):
            np.testing.assert_allclose(programs(power, x, by=by), np.asarray(x) ** by)
    assert count(programs) == [1] * 9


def test_only_the_last_programs_are_kept():
    programs = Programs()
    for n in range(KEPT + 5):
        run(programs, lambda x: x + 1, jnp.zeros(n + 1))
    assert len(programs._kept) == KEPT


def test_programs_go_with_their_object():
    class Owner:
        def __init__(self):
            self.programs, self.shift = Programs(), jnp.ones(3)

        def __call__(self, x):
            return x + self.shift

    owner = Owner()
    run(owner.programs, owner, X)
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None


@pytest.mark.long
def test_what_is_drawn_outside_of_jit_leaves_nothing_compiled(key):
    """`SVI.init` and draws of diffusions that are dropped: memory maps stay as many."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("no memory maps to count")
    counts = []
    for _ in range(6):
        diffusion = standard_diffusion((2,), T=4)
        svi = SVI(diffusion.model, diffusion.guide, optax.sgd(0.1), SampledTimeELBO())
        svi.init(key, jnp.zeros((8, 2)))
        numpyro.handlers.seed(diffusion.prior({}), key)()
        del diffusion, svi
        gc.collect()
        counts.append(maps.read_bytes().count(b"\n"))
    assert counts[-1] - counts[1] < 4 * 4  # four objects later; it was eighteen for each
