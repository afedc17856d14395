"""Step i sees the same examples however the loop is cut, and an epoch sees each example once."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from probdiff.train.data import Minibatches, Stream, Whole, arguments, from_data


def minibatches(N, batch_size, seed=0):
    return Minibatches(jax.random.key(seed), jnp.arange(N), batch_size, None)


@pytest.mark.parametrize(("N", "batch_size"), [(100, 10), (100, 7), (7, 7), (1, 1), (70_000, 512)])
def test_every_epoch_holds_every_row_once(N, batch_size):
    epochs = 3
    stream = minibatches(N, batch_size).rows(0, -(-epochs * N // batch_size)).ravel()
    for epoch in stream[: epochs * N].reshape(epochs, N):
        assert np.array_equal(np.sort(epoch), np.arange(N))


@pytest.mark.parametrize("N", [50, 70_000])
def test_epochs_differ_in_order(N):
    first, second = minibatches(N, N).rows(0, 2)
    assert not np.array_equal(first, second)


def test_rows_do_not_depend_on_where_the_stream_is_cut():
    whole = minibatches(30, 7).rows(0, 20_000)
    for start, n in [(0, 1), (9_000, 3), (12_345, 7_655), (19_999, 1)]:
        assert np.array_equal(minibatches(30, 7).rows(start, n), whole[start : start + n])


def test_order_depends_on_the_key_and_not_on_its_style():
    typed = minibatches(50, 10).rows(0, 5)
    raw = Minibatches(jax.random.PRNGKey(0), jnp.arange(50), 10, None).rows(0, 5)
    assert np.array_equal(typed, raw)
    assert not np.array_equal(typed, minibatches(50, 10, seed=1).rows(0, 5))


def test_take_gives_the_rows_in_a_buffer_of_fixed_length():
    batches = minibatches(50, 10)
    for n in (1, 3):
        _, indices = batches.take(4, n)
        assert indices.shape == (batches.capacity, 10)
        assert np.array_equal(indices[:n], batches.rows(4, n))


def test_the_first_batch_is_that_of_step_zero():
    batches = minibatches(50, 10)
    assert np.array_equal(batches.first, batches.rows(0, 1)[0])


def numbered(stop):
    return (np.full((4, 2), i, np.float32) for i in range(stop))


@pytest.mark.parametrize("start", [0, 5])
def test_a_stream_keeps_its_order_from_where_it_starts(start):
    stream = Stream(numbered(100), None)
    seen = []
    for n in (1, 4, 2, 8):
        data, indices = stream.take(start + len(seen), n)
        seen += [int(data[row, 0, 0]) for row in indices[:n]]
    assert seen == list(range(start, start + 15))


def test_no_batch_is_drawn_that_no_step_sees():
    batches, threads = numbered(100), threading.active_count()
    stream = Stream(batches, None)
    stream.take(0, 1)
    stream.take(1, 3)
    assert next(batches)[0, 0] == 4
    assert threading.active_count() == threads


def test_a_stream_that_ends_says_after_how_many_batches():
    stream = Stream(numbered(3), None)
    with pytest.raises(ValueError, match="a batch for every step; it ended after 3"):
        stream.take(0, 4)


def test_an_error_of_the_iterator_is_raised_where_its_batch_is_taken():
    def broken():
        yield np.zeros(3)
        raise OSError("no such shard")

    stream = Stream(broken(), None)
    stream.take(0, 1)
    with pytest.raises(OSError, match="no such shard"):
        stream.take(1, 1)


@pytest.mark.parametrize("odd", [np.zeros(4), np.zeros(3, np.int8), (np.zeros(3),)])
def test_a_batch_unlike_the_first_is_refused_by_its_number(odd):
    stream = Stream(iter([np.zeros(3), np.zeros(3), odd]), None)
    with pytest.raises(ValueError, match="batch 3 of data must be like the first"):
        stream.take(0, 3)


def test_a_dict_goes_by_keyword_and_a_tuple_by_position():
    assert arguments({"x": 1}) == ((), {"x": 1})
    assert arguments((1, 2)) == ((1, 2), {})
    assert arguments(1) == ((1,), {})


def test_examples_are_counted_along_axis_0():
    assert Whole(jnp.zeros((5, 2))).examples == 5
    assert Whole(()).examples == 1
    assert minibatches(50, 10).examples == 10
    assert Stream(numbered(1), None).examples == 4


@pytest.mark.parametrize(
    ("data", "batch_size", "message"),
    [
        ([1.0, 2.0], 1, "data must be an array, or a tuple or dict of arrays; got list"),
        (np.zeros(100), 512, "at most the 100 examples in data; got 512"),
        (np.zeros(100), 0, "batch_size must be at least 1; got 0"),
        ((np.zeros(3), np.zeros(4)), 2, r"axis 0; got data\[0\]: 3, data\[1\]: 4"),
        ({"x": np.zeros(3), "s": np.array(1.0)}, 2, r"got data\['s'\]: None, data\['x'\]: 3"),
        ((), 2, "data must hold at least one array"),
        (iter([np.zeros(3)]), 2, "batch_size must be None where data is an iterator.*; got 2"),
        (iter([]), None, "must yield at least one batch"),
    ],
)
def test_data_and_batch_size_that_do_not_fit_are_refused(data, batch_size, message):
    with pytest.raises(ValueError, match=message):
        from_data(jax.random.key(0), data, batch_size, None)
