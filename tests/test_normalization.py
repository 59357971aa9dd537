"""The fast group normalisation is the plain formula: values, gradients, and precision under bfloat16."""

import numpy as np
import pytest
import tensorflow as tf

from ldm.normalization import fused_group_norm, group_norm, plain_group_norm

rng = np.random.default_rng(0)


def arguments(shape, dtype="float32"):
    x = tf.constant(rng.normal(1.0, 2.0, shape), dtype)
    gamma, beta = (tf.constant(rng.normal(c, 0.5, (shape[0], shape[-1])), tf.float32) for c in (1.0, 0.0))
    return x, gamma, beta


def gradients(norm, sources, weight, silu):
    with tf.GradientTape() as tape:
        tape.watch(sources)
        value = tf.reduce_sum(weight * tf.cast(norm(*sources, 4, 1e-5, silu), tf.float32))
    return tape.gradient(value, sources)


def test_tensorflow_takes_the_fast_one():
    assert group_norm is fused_group_norm


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(3, 6, 5, 8), (2, 7, 12), (1, 1, 1, 8)])
def test_value_and_gradients_are_those_of_the_formula(shape, silu):
    sources = arguments(shape)
    np.testing.assert_allclose(
        fused_group_norm(*sources, 4, 1e-5, silu), plain_group_norm(*sources, 4, 1e-5, silu), atol=1e-5
    )
    weight = rng.normal(size=shape).astype("float32")
    fast, plain = (gradients(norm, sources, weight, silu) for norm in (fused_group_norm, plain_group_norm))
    for ours, exact in zip(fast, plain, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=2e-5)


def test_bfloat16_costs_no_more_than_its_own_rounding():
    sources = arguments((2, 32, 32, 16), "bfloat16")
    exact = (tf.cast(sources[0], tf.float32), *sources[1:])
    error = tf.cast(fused_group_norm(*sources, 4, 1e-5, True), tf.float32) - plain_group_norm(*exact, 4, 1e-5, True)
    assert float(tf.norm(error) / tf.norm(plain_group_norm(*exact, 4, 1e-5, True))) < 2**-8
    weight = rng.normal(size=(2, 32, 32, 16)).astype("float32")
    fast, plain = gradients(fused_group_norm, sources, weight, True), gradients(plain_group_norm, exact, weight, True)
    for ours, reference in zip(fast, plain, strict=True):
        assert float(tf.norm(tf.cast(ours, tf.float32) - reference) / tf.norm(reference)) < 2**-6
