"""The fast group normalisation is the plain formula: values, gradients, and precision under bfloat16."""

import numpy as np
import pytest
import tensorflow as tf

from ldm.nets import normalization
from ldm.nets.normalization import fused_group_norm, group_norm, plain_group_norm

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers_in_any_order(monkeypatch):
    monkeypatch.setitem(globals(), "rng", np.random.default_rng(0))


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


@pytest.mark.parametrize("ratio", [4.0, 16.0, 32.0])
def test_a_large_mean_does_not_drown_the_deviation(ratio):
    """E[x^2] - E[x]^2 of bfloat16 squares would be off by tens of per cent here, or negative."""
    x = tf.cast(rng.normal(ratio, 1.0, (2, 32, 32, 8)), tf.bfloat16)
    ones, zeros = tf.ones((2, 8)), tf.zeros((2, 8))
    exact = plain_group_norm(tf.cast(x, tf.float32), ones, zeros, 2, 1e-5, False)
    y = tf.cast(fused_group_norm(x, ones, zeros, 2, 1e-5, False), tf.float32)
    assert abs(float(tf.math.reduce_std(y) / tf.math.reduce_std(exact)) - 1.0) < 5e-3
    assert abs(float(tf.reduce_mean(y - exact))) < 2**-8 * ratio


def test_flat_background_is_normalised_as_by_the_formula():
    picture = np.full((1, 64, 64, 8), 10.7, "float32")
    picture[:, 20:40, 20:40] += rng.normal(0.0, 2.0, (1, 20, 20, 8))
    x = tf.cast(picture, tf.bfloat16)
    ones, zeros = tf.ones((1, 8)), tf.zeros((1, 8))
    exact = plain_group_norm(tf.cast(x, tf.float32), ones, zeros, 2, 1e-5, False)
    y = tf.cast(fused_group_norm(x, ones, zeros, 2, 1e-5, False), tf.float32)
    assert float(tf.norm(y - exact) / tf.norm(exact)) < 0.02


def test_float16_does_not_overflow():
    sources = arguments((2, 8, 8, 8))
    sources = (tf.cast(400.0 * sources[0], tf.float16), *sources[1:])
    exact = (tf.cast(sources[0], tf.float32), *sources[1:])
    y, reference = fused_group_norm(*sources, 4, 1e-5, True), plain_group_norm(*exact, 4, 1e-5, True)
    np.testing.assert_allclose(tf.cast(y, tf.float32), reference, atol=0.03)
    weight = rng.normal(size=(2, 8, 8, 8)).astype("float32")
    fast, plain = gradients(fused_group_norm, sources, weight, True), gradients(plain_group_norm, exact, weight, True)
    for ours, theirs in zip(fast, plain, strict=True):
        assert float(tf.norm(tf.cast(ours, tf.float32) - theirs) / tf.norm(theirs)) < 0.02


def test_rounding_by_whole_numbers_is_that_of_a_cast():
    """All exponents, both signs, ties to even and odd, and what lies next to them; whatever is NaN stays NaN."""
    high = np.arange(2**16, dtype="uint32") << 16
    exact = (high[:, None] + np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], "uint32")).view("float32").ravel()
    rounded = tf.function(normalization._bfloat16, jit_compile=True)(tf.constant(exact)).numpy().astype("float32")
    with np.errstate(over="ignore", invalid="ignore"):
        expected = exact.astype(tf.bfloat16.as_numpy_dtype).astype("float32")
    nan = np.isnan(exact)
    assert np.isnan(rounded[nan]).all() and nan.sum() > 1000
    np.testing.assert_array_equal(rounded[~nan].view("uint32"), expected[~nan].view("uint32"))
