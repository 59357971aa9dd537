"""What a diffusion model's training takes away from a batch: its data, by noise, and its conditions, now and then.

randomness   times and noise of a batch, from a seed alone
hide         hides conditions from some of the examples
"""

import numpy as np
import tensorflow as tf
from einops import rearrange

from ldm.training import distribution


def randomness(shape, seed):
    """All random numbers of a batch, which depend on nothing but the seed.

    The times of a batch are one random offset plus an even grid, shuffled: every batch covers all noise levels
    (arXiv 2107.00630, appendix I.1).

    Args:
        shape: of the batch's data, on this replica.
        seed: two integers.

    Returns:
        Times (B,) in [0, 1), standard normal noise of the shape, and uniform numbers (B,) in [0, 1).
    """
    rows = shape[0]
    offset, noise, uniform, order = tf.unstack(tf.random.experimental.stateless_split(seed, 4))

    def times(n):
        grid = (tf.cast(tf.range(n), tf.float32) + tf.random.stateless_uniform((), offset)) / tf.cast(n, tf.float32)
        return tf.random.experimental.stateless_shuffle(grid, order)

    return (
        distribution.global_rows(times, rows),
        distribution.normal(shape, noise),
        distribution.global_rows(lambda n: tf.random.stateless_uniform((n,), uniform), rows),
    )


def hide(batch, names, share, uniform, seed):
    """Hide conditions from some training examples, so that a network learns to do without any of them.

    From a share p of the examples everything is hidden, from another p the mask alone, from a third the label alone.
    And each covariate by itself is hidden from a share p of all examples.

    Args:
        batch: with its conditions.
        names: of the conditions; of these, "covariates" and "mask" can be hidden by themselves.
        share: p, at most a third.
        uniform: (B,) random numbers in [0, 1), which choose among these cases.
        seed: two integers, for the covariates.

    Returns:
        The batch with unknown conditions in place of hidden ones, and (B,): 0.0 where everything is hidden, else 1.0.
    """
    batch = {**batch, "label": tf.where((uniform >= 2 * share) & (uniform < 3 * share), -1, batch["label"])}
    if "covariates" in names:
        kinds = batch["covariates"].shape[-1]
        other = seed + tf.constant([1_000_003, 0])  # a stream of its own
        uniforms = distribution.global_rows(
            lambda n: tf.random.stateless_uniform((n, kinds), other), tf.shape(uniform)[0]
        )
        batch["covariates"] = tf.where(uniforms < share, np.nan, batch["covariates"])
    if "mask" in names:
        batch["mask"] *= rearrange(tf.cast(uniform >= 2 * share, tf.float32), "b -> b 1 1 1")
    return batch, tf.cast(uniform >= share, tf.float32)
