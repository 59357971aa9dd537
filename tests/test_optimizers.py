"""ldm/training/optimizers.py: the fused step is Keras' AdamW, to the last digits, on one replica and on two."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from ldm.training import callbacks, distribution
from ldm.training.optimizers import FusedAdamW

SHAPES = ((3, 4), (4,), (), (6, 2))
OPTIONS = {"beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-4, "weight_decay": 0.1}
AVERAGED = {"use_ema": True, "ema_momentum": 0.7}


class KerasAveraging(callbacks.AveragingAdamW, keras.optimizers.AdamW):
    """`AveragingAdamW` with Keras' own step."""

    _backend_apply_gradients = keras.optimizers.AdamW._backend_apply_gradients


KINDS = {
    "plain": (lambda: FusedAdamW(0.05, **OPTIONS), lambda: keras.optimizers.AdamW(0.05, **OPTIONS)),
    "averaged": (
        lambda: FusedAdamW(0.05, **OPTIONS, **AVERAGED),
        lambda: keras.optimizers.AdamW(0.05, **OPTIONS, **AVERAGED),
    ),
    "average that warms up": (
        lambda: callbacks.make_optimizer(0.05, 40, averaged=True),
        lambda: KerasAveraging.from_config(callbacks.make_optimizer(0.05, 40, averaged=True).get_config()),
    ),
}


def trained(optimizer, replicas=1, steps=20):
    """Steps on gradients that are the same for all optimizers; [weights, the optimizer's variables] as arrays."""
    strategy, rng = distribution.make_strategy(replicas), np.random.default_rng(0)
    with strategy.scope():
        weights = [keras.Variable(rng.normal(size=shape).astype("float32"), name=f"w{len(shape)}") for shape in SHAPES]
        optimizer = optimizer()
        optimizer.exclude_from_weight_decay(var_list=weights[3:])
        optimizer.build(weights)

    @tf.function
    def step(*gradients):
        # each replica has its part of the sum
        return strategy.run(lambda *parts: optimizer.apply([g / replicas for g in parts], weights), gradients)

    for _ in range(steps):
        step(*(tf.constant(rng.normal(size=shape).astype("float32")) for shape in SHAPES))
    return [np.asarray(weight) for weight in (*weights, *optimizer.variables)]


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_are_those_of_keras(kind, replicas):
    fused, plain = KINDS[kind]
    for ours, theirs in zip(trained(fused, replicas), trained(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)


def test_a_sparse_gradient_steps_as_its_dense_twin():
    sparse, dense = keras.Variable(np.ones((3, 2))), keras.Variable(np.ones((3, 2)))
    rows = tf.IndexedSlices(tf.ones((2, 2)), tf.constant([1, 1]), tf.constant([3, 2]))
    FusedAdamW(0.1, epsilon=1.0).apply([rows], [sparse])
    FusedAdamW(0.1, epsilon=1.0).apply([tf.constant([[0.0, 0.0], [2.0, 2.0], [0.0, 0.0]])], [dense])
    np.testing.assert_allclose(sparse, dense)


def test_a_weight_takes_few_nodes_of_the_graph():
    weights = [keras.Variable(np.ones((2, 2), "float32")) for _ in range(11)]

    def nodes(count):
        optimizer = callbacks.make_optimizer(0.1, 40, averaged=True)
        optimizer.build(weights[:count])
        step = tf.function(lambda: distribution.apply_gradients(optimizer, [tf.ones((2, 2))] * count, weights[:count]))
        return len(step.get_concrete_function().graph.get_operations())

    assert (nodes(11) - nodes(1)) / 10 <= 15  # of Keras' own step: 84


@pytest.mark.parametrize("option", [{"amsgrad": True}, {"clipnorm": 1.0}, {"gradient_accumulation_steps": 2}])
def test_what_it_does_not_do_is_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        FusedAdamW(0.1, **option)
