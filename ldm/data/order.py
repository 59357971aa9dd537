"""The order of a stream: which slice is its element number n. `dataset.make_dataset` and `latents.make_dataset` share
it, so that the same seed shows a second stage the same slices, whether they come as pictures or as latents.
"""

import functools

import numpy as np

from ldm.batches import UNSHARED, evenly, untuned
from ldm.later import tensorflow as tf


def element_order(
    count: int, batch_size: int, training: bool, seed: int, most: int | None = None, share: tuple[int, int] = UNSHARED
):
    """The order of a split: a function step -> (element numbers n, their places within the split), (B,) each.

    Without training, `most` elements at most are seen, evenly spread over the split, the same ones each time. In
    training, `share` = (part, parts) leaves the part-th of so many equal parts of every batch, B / parts rows.

    Raises:
        ValueError: for a share of what is not for training, or of batches that cannot be shared out evenly.
    """
    if share != UNSHARED and (not training or batch_size % share[1] or not 0 <= share[0] < share[1]):
        raise ValueError(f"share {share}: only training batches are shared, in equal parts, not {batch_size} rows")
    rows = batch_size // share[1]
    seen = evenly(count, count if most is None else most)

    @functools.lru_cache(maxsize=3)  # a batch may straddle epochs, and batches are made in parallel
    def permutation(epoch):
        return np.random.default_rng([seed, epoch]).permutation(count)

    def order(step):
        if not training:
            n = np.arange(step * batch_size, min((step + 1) * batch_size, len(seen)))
            return n, seen[n]
        n = step * batch_size + share[0] * rows + np.arange(rows)
        place = np.empty_like(n)
        for epoch in np.unique(n // count).tolist():
            here = n // count == epoch
            place[here] = permutation(epoch)[n[here] % count]
        return n, place

    return order


def steps(count: int, batch_size: int, training: bool, start_step: int) -> "tf.data.Dataset":
    """Step numbers: without end in training, otherwise as many as it takes to see every element once."""
    end = 2**62 // batch_size if training else -(-count // batch_size)
    return tf.data.Dataset.range(min(start_step, end), end)


def in_order(batches: "tf.data.Dataset") -> "tf.data.Dataset":
    """Made ahead of their use, in their order, and shared out to replicas by batch, not by file."""
    options = untuned()
    options.deterministic = True
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return batches.prefetch(tf.data.AUTOTUNE).with_options(options)
