"""Many slices, some at a time: a batch at a time for what would not fit into memory, an even choice for what is
shown, and how tf.data streams them.
"""

import numpy as np

from ldm.later import tensorflow as tf

UNSHARED = (0, 1)  # (part, parts) of every batch that a host makes where there is no other
SIZE = 32  # slices that go through a network at a time, unless somebody says otherwise


def parts(count, size=SIZE):
    """Slices that cut `count` rows into batches, in order; the last may be smaller."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def in_batches(function, *arrays, size=SIZE):
    """`function` of arrays with the same number of rows, a batch at a time: its results as one NumPy array.

    Args:
        function: arrays (B, ...) -> array or tensor (B, ...).
        arrays: (N, ...) each, N > 0.
        size: B, most rows at a time.
    """
    return np.concatenate(
        [np.asarray(function(*(array[part] for array in arrays))) for part in parts(len(arrays[0]), size)]
    )


def evenly(length, count):
    """At most `count` of the places 0 ... length - 1, evenly spread, the first and the last among them; int64."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int)


def untuned() -> "tf.data.Options":
    """For a stream without the thread that tunes it as it runs: AUTOTUNE is then as many calls as there are cores.

    That thread sleeps twice as long each time, up to a minute, and may miss that it is to end (TensorFlow 2.21):
    who lets go of a stream, after a training or on Ctrl-C, waits until it wakes.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return options
