"""ldm/batches.py: every row once and in order, whatever the size of a batch; an even choice with both ends."""

import numpy as np
import pytest
import tensorflow as tf

from ldm import batches


@pytest.mark.parametrize(("count", "size", "lengths"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 3, [2]), (0, 3, [])])
def test_parts_hold_every_row_once_and_in_order(count, size, lengths):
    rows = np.arange(count)
    found = [rows[part] for part in batches.parts(count, size)]
    assert [len(part) for part in found] == lengths
    assert [row for part in found for row in part] == rows.tolist()


def test_parts_end_within_the_rows():
    """A slice beyond the end would be cut by an array, but not by who counts with it."""
    assert batches.parts(5, 4) == [slice(0, 4), slice(4, 5)]
    assert [part.stop - part.start for part in batches.parts(batches.SIZE + 1)] == [batches.SIZE, 1]


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_results_do_not_depend_on_the_size_of_a_batch(size):
    first, second = np.random.default_rng(0).normal(size=(2, 7, 4))
    seen = []

    def function(a, b):
        seen.append(len(a))
        assert a.shape == b.shape  # the same rows of both
        return tf.constant(a - 2.0 * b)

    found = batches.in_batches(function, first, second, size=size)
    assert isinstance(found, np.ndarray) and max(seen) == min(size, 7) and sum(seen) == 7
    np.testing.assert_array_equal(found, first - 2.0 * second)


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    [
        (5, 5, [0, 1, 2, 3, 4]),
        (3, 8, [0, 1, 2]),  # never one place twice
        (9, 3, [0, 4, 8]),
        (32, 8, [0, 4, 9, 13, 18, 22, 27, 31]),
        (10, 2, [0, 9]),
        (4, 1, [0]),
    ],
)
def test_an_even_choice_has_both_ends(length, count, expected):
    chosen = batches.evenly(length, count)
    assert chosen.tolist() == expected and np.issubdtype(chosen.dtype, np.integer)


def test_an_even_choice_is_even():
    for length in range(1, 60):
        for count in range(2, 12):
            gaps = np.diff(batches.evenly(length, count))
            assert len(gaps) == min(length, count) - 1 and (not len(gaps) or np.ptp(gaps) <= 1), (length, count)
