"""The transformer prior over the codes: nothing looks ahead, the cache changes nothing, tokens are drawn as said."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from ldm.batches import untuned
from ldm.nets.networks import conditions_of
from ldm.nets.transformer import draw_tokens, dropout, lengthen
from ldm.training import distribution, runs
from ldm.training.optimizers import FusedAdamW
from ldm.training.prior import CodePrior

SHAPE, CODES = (4, 4), 8
TRAINED = {"width": 32, "depth": 2, "heads": 2, "dropout": 0.0}
PEERS = Path(__file__).parents[1] / "benchmarks" / ".venv" / "bin" / "python"


def make_prior(**options):
    arguments = {"width": 16, "depth": 2, "heads": 2, "num_labels": 2, "seed": 4}
    return CodePrior(CODES, SHAPE, **{**arguments, **options})


def randomised(model, seed=0):
    """Random weights, so that layers which start at zero hide nothing."""
    rng = np.random.default_rng(seed)
    model.set_weights([(0.3 * rng.normal(size=w.shape) + (w.ndim == 1)).astype(w.dtype) for w in model.get_weights()])
    return model


def batch_of(count, seed=0, shape=SHAPE):
    rng = np.random.default_rng(seed)
    return {
        "codes": rng.integers(0, CODES, (count, *shape)).astype("int32"),
        "z": rng.integers(0, 40, count).astype("int32"),
        "label": rng.integers(-1, 2, count).astype("int32"),
    }


def fitted(model, batch, steps, batch_size, learning_rate=1e-2):
    model.compile(optimizer=FusedAdamW(learning_rate), jit_compile=False)
    data = tf.data.Dataset.from_tensor_slices(batch).repeat().batch(batch_size).with_options(untuned())
    model.fit(data, steps_per_epoch=steps, verbose=0)
    return model


def bits_of(model, batch):
    data = tf.data.Dataset.from_tensor_slices(batch).batch(64).with_options(untuned())
    return model.evaluate(data, return_dict=True, verbose=0)


# ---- what a code may know --------------------------------------------------------------------------------------------


def test_logits_of_a_code_depend_on_the_codes_before_it_and_on_no_other():
    model, batch = randomised(make_prior()), batch_of(3)
    before = np.asarray(model.logits(**batch)).reshape(3, 16, CODES)
    assert before.dtype == np.float32
    for place in range(16):
        changed = batch["codes"].reshape(3, 16).copy()
        changed[:, place] = (changed[:, place] + 1) % CODES
        after = np.asarray(model.logits(**batch | {"codes": changed.reshape(3, *SHAPE)})).reshape(3, 16, CODES)
        np.testing.assert_array_equal(after[:, : place + 1], before[:, : place + 1])
        moved = np.abs(after - before).max((0, 2))[place + 1 :]
        assert np.all(moved > 1e-4), f"place {place} is not seen by all that follow"


def test_slice_index_label_row_and_column_reach_the_network():
    model, batch = randomised(make_prior()), batch_of(2) | {"codes": np.zeros((2, *SHAPE), "int32")}
    logits = np.asarray(model.logits(**batch | {"label": [0, 0]}))
    for other in ({"z": batch["z"] + 1, "label": [0, 0]}, {"label": [1, 1]}, {"label": None}):
        assert np.abs(model.logits(**batch | other) - logits).max((1, 2, 3)).min() > 1e-4
    np.testing.assert_array_equal(model.logits(**batch | {"label": None}), model.logits(**batch | {"label": [-1, -1]}))
    for attention in (block.attention for block in model.blocks):  # without it, a place knows only where it is
        attention.to_out.kernel.assign(np.zeros((16, 16)))
    logits = np.asarray(model.logits(**batch))[:, :, 1:]  # not the first column: it holds the start token
    assert np.abs(np.diff(logits, axis=1)).max((0, 3)).min() > 1e-4
    assert np.abs(np.diff(logits, axis=2)).max((0, 3)).min() > 1e-4


def test_cross_entropy_on_uniform_random_codes_stays_at_ln_k():
    """New codes at each step, so that there is nothing to learn by heart; a network that sees its target goes to 0."""
    model = fitted(make_prior(**TRAINED), batch_of(4096), steps=128, batch_size=32, learning_rate=3e-3)
    result = bits_of(model, batch_of(512, seed=1))
    assert result["loss"] == pytest.approx(np.log(CODES), rel=0.01)
    assert result["bits"] == pytest.approx(3.0, rel=0.01)


def planted(count, seed=0):
    """Codes that the slice index decides: a fixed random table for each of 6 slices."""
    z = np.random.default_rng(seed).integers(0, 6, count).astype("int32")
    table = batch_of(6, seed=9)["codes"]
    return {"codes": table[z], "z": 5 * z, "label": np.full(count, -1, "int32")}


@pytest.mark.slow
def test_codes_that_the_slice_index_decides_are_learnt_and_drawn():
    model = fitted(make_prior(**TRAINED), planted(256), steps=150, batch_size=32, learning_rate=5e-3)
    asked = planted(12, seed=2)
    assert bits_of(model, asked)["bits"] < 0.05
    np.testing.assert_array_equal(model.sample(asked["z"], temperature=0.0), asked["codes"])


def test_a_fresh_prior_is_exactly_indifferent():
    np.testing.assert_array_equal(make_prior().logits(**batch_of(2)), 0.0)


def test_a_prior_starts_from_the_histogram_of_each_place_and_keeps_it():
    """A fresh network on top: cross-entropy is the histogram's own; a training step moves the network alone."""
    model, batch = make_prior(dropout=0.0), batch_of(50)
    batch["codes"][:, 0, 0] = np.arange(50) % 2 * 3  # 25 times code 0, 25 times code 3
    model.start_from(batch["codes"], weight=10.0)
    p = np.asarray(keras.ops.softmax(model.logits(**batch_of(1))))[0]
    everywhere = np.bincount(batch["codes"].ravel(), minlength=CODES) + 1.0
    everywhere = everywhere / everywhere.sum()
    expected = 10 * everywhere + 25 * np.isin(np.arange(CODES), (0, 3))
    np.testing.assert_allclose(p[0, 0], expected / 60, rtol=1e-5)
    np.testing.assert_allclose(p.sum(-1), 1.0, rtol=1e-5)
    counts = np.stack([np.bincount(place, minlength=CODES) for place in batch["codes"].reshape(50, 16).T])
    np.testing.assert_allclose(p.reshape(16, CODES), (counts + 10 * everywhere) / 60, rtol=1e-5)
    kept = np.array(model.log_frequency)
    fitted(model, batch, steps=2, batch_size=8)
    np.testing.assert_array_equal(model.log_frequency, kept)


def test_loss_is_the_mean_of_minus_log_p_over_all_codes():
    model, batch = randomised(make_prior()), batch_of(3)
    model.compile(optimizer=keras.optimizers.Adam())
    logits = np.asarray(model.logits(**batch), "float64")
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, batch["codes"][..., None], -1).mean()
    result = bits_of(model, batch)
    assert result["loss"] == pytest.approx(expected, rel=1e-5)
    assert result["bits"] == pytest.approx(expected / np.log(2), rel=1e-5)


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_cached_and_uncached_logits_agree():
    model, batch = randomised(make_prior()), batch_of(3)
    condition = model.condition(conditions_of(batch["z"], batch["label"]))
    codes = batch["codes"].reshape(3, 16)
    previous = np.concatenate([np.full((3, 1), CODES), codes[:, :-1]], axis=1)
    caches = [block.attention.empty_cache(3) for block in model.blocks]
    caches = [lengthen(lengthen(cache, 10), 6) for cache in caches]
    expected = np.asarray(model.logits(**batch)).reshape(3, 16, CODES)
    for place in range(16):
        x = model.features(previous[:, place : place + 1], condition, place)
        for i, block in enumerate(model.blocks):
            x, caches[i] = block.step(x, caches[i], place)
        np.testing.assert_allclose(model.scores(x, place)[:, 0], expected[:, place], atol=1e-4)


@pytest.mark.parametrize("shape", [pytest.param((4, 4), marks=pytest.mark.slow), (3, 5)])  # 15: no four equal parts
def test_greedy_codes_are_the_fixed_point_of_the_uncached_network(shape):
    model = randomised(CodePrior(CODES, shape, 16, 2, 2))
    z = np.arange(5, dtype="int32")
    codes = model.sample(z, temperature=0.0)
    assert codes.shape == (5, *shape) and codes.dtype == tf.int32
    np.testing.assert_array_equal(np.argmax(model.logits(codes, z), -1), codes)


# ---- drawing ---------------------------------------------------------------------------------------------------------

LOGITS = np.log([[0.125, 0.5, 0.0625, 0.25, 0.0625], [0.5, 0.25, 0.125, 0.0625, 0.0625]]).astype("float32")


def shares(**options):
    """How often each token is drawn over an even grid of uniform numbers, for the two rows of LOGITS."""
    uniform = (np.arange(1600, dtype="float32") + 0.5) / 1600
    tokens = [np.asarray(draw_tokens(np.tile(row, (1600, 1)), uniform, **options)) for row in LOGITS]
    return np.stack([np.bincount(t, minlength=5) / 1600 for t in tokens])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[2, 8, 1, 4, 1], [8, 4, 2, 1, 1]]),
        ({"temperature": 0.5}, [[4, 64, 1, 16, 1], [64, 16, 4, 1, 1]]),  # probabilities squared
        ({"temperature": 0.0}, [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]),
        ({"top_k": 1}, [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]),
        ({"top_k": 3}, [[2, 8, 0, 4, 0], [8, 4, 2, 0, 0]]),
        ({"top_k": 5}, [[2, 8, 1, 4, 1], [8, 4, 2, 1, 1]]),
        ({"top_p": 0.5}, [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]),  # 0.5 is reached by one token
        ({"top_p": 0.51}, [[0, 2, 0, 1, 0], [2, 1, 0, 0, 0]]),
        ({"top_p": 0.8}, [[1, 4, 0, 2, 0], [4, 2, 1, 0, 0]]),
        ({"top_p": 1e-6}, [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]),  # never nothing
        ({"top_k": 2, "top_p": 0.6}, [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]),  # 2/3 of what top_k leaves
        ({"top_k": 2, "top_p": 0.7}, [[0, 2, 0, 1, 0], [2, 1, 0, 0, 0]]),
    ],
)
def test_tokens_have_the_probabilities_that_temperature_top_k_and_top_p_leave(options, expected):
    expected = np.array(expected, float)
    np.testing.assert_allclose(shares(**options), expected / expected.sum(-1, keepdims=True), atol=1.1 / 1600)


def test_the_largest_uniform_number_draws_a_token_that_is_allowed():
    largest = np.nextafter(np.float32(1), np.float32(0))
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(size=(64, 50)).astype("float32") * 5
        token = np.asarray(draw_tokens(logits, np.full(64, largest), top_k=7, top_p=0.9))
        rank = (logits > np.take_along_axis(logits, token[:, None], 1)).sum(1)
        assert rank.max() < 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"top_k": 6}, "top_k must be from 0"),
        ({"top_k": -1}, "top_k must be from 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p must be above 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        draw_tokens(LOGITS, np.zeros(2, "float32"), **options)


def test_samples_depend_on_the_seed_and_on_no_other_row():
    model, z = randomised(make_prior()), np.arange(6, dtype="int32")
    codes = np.asarray(model.sample(z, seed=1))
    np.testing.assert_array_equal(model.sample(z, seed=1), codes)
    assert np.mean(model.sample(z, seed=2) != codes) > 0.1
    same = np.asarray(model.sample(np.zeros(6, "int32"), seed=1))
    assert len(np.unique(same.reshape(6, -1), axis=0)) == 6
    other = np.where(np.arange(6) < 3, z, 30)
    np.testing.assert_array_equal(np.asarray(model.sample(other, seed=1))[:3], codes[:3])
    np.testing.assert_array_equal(model.sample(z[:3], seed=1), codes[:3])


def test_samples_are_distributed_as_the_network_says():
    """The first code of many slices against the softmax, by chi-square; 7 degrees of freedom."""
    model = randomised(CodePrior(CODES, (1, 2), 16, 1, 2))
    z = np.full(4000, 7, "int32")
    codes = np.asarray(model.sample(z, seed=3)).reshape(-1, 2)
    first = np.asarray(keras.ops.softmax(model.logits(np.zeros((1, 1, 2), "int32"), z[:1])))[0, 0, 0]
    found = np.bincount(codes[:, 0], minlength=CODES)
    assert ((found - 4000 * first) ** 2 / (4000 * first)).sum() < 24.3  # p = 0.001
    likely = np.argmax(found)
    after = np.asarray(keras.ops.softmax(model.logits(np.array([[[likely, 0]]]), z[:1])))[0, 0, 1]
    found = np.bincount(codes[codes[:, 0] == likely, 1], minlength=CODES)
    assert ((found - found.sum() * after) ** 2 / (found.sum() * after)).sum() < 24.3


# ---- training and files ----------------------------------------------------------------------------------------------


def trained(replicas):
    keras.utils.set_random_seed(1)
    with distribution.make_strategy(replicas).scope():
        model = make_prior(depth=1, dropout=0.3)
        model.compile(optimizer=FusedAdamW(5e-3, epsilon=1e-4), jit_compile=False)
    train, validation = (tf.data.Dataset.from_tensor_slices(batch_of(n, n)) for n in (16, 9))
    data = {"x": train.batch(8, drop_remainder=True), "validation_data": validation.batch(8)}
    return model, model.fit(**data, epochs=2, shuffle=False, verbose=0).history


def test_two_replicas_give_the_weights_and_reports_of_one_with_dropout():
    (one, history_of_one), (two, history_of_two) = trained(1), trained(2)
    for weight, other in zip(one.weights, two.weights, strict=True):
        np.testing.assert_allclose(other, weight, rtol=1e-4, atol=1e-5, err_msg=weight.path)
    assert set(history_of_one) == {"loss", "bits", "gradient_norm", "val_loss", "val_bits"} == set(history_of_two)
    for name, values in history_of_one.items():
        np.testing.assert_allclose(history_of_two[name], values, rtol=1e-4, atol=1e-6, err_msg=name)


def test_dropout_keeps_the_mean_and_draws_anew_at_each_call():
    model, x = make_prior(dropout=0.25), tf.ones((4, 50, 40))
    uniform = model.numbers(4, tf.constant([4, 0]))
    first, second = (np.asarray(dropout(x, 0.25, uniform)) for _ in range(2))
    assert set(np.unique(first)) == {0.0, np.float32(1 / 0.75)}
    assert np.mean(first) == pytest.approx(1.0, abs=0.02)
    assert np.mean((first > 0) == (second > 0)) == pytest.approx(0.75**2 + 0.25**2, abs=0.02)
    np.testing.assert_array_equal(dropout(x, 0.25, model.numbers(4, tf.constant([4, 0]))), first)
    assert np.any(np.asarray(dropout(x, 0.25, model.numbers(4, tf.constant([4, 1])))) != first)
    np.testing.assert_array_equal(dropout(x, 0.25, None), x)


def test_a_file_says_what_it_is(tmp_path):
    model, batch = randomised(make_prior(depth=1, dropout=0.2)), batch_of(3)
    model.save(tmp_path / "prior.keras")
    loaded = runs.load_model(tmp_path / "prior.keras")
    assert loaded.get_config() == model.get_config() and loaded.dropout == 0.2 and loaded.num_labels == 2
    np.testing.assert_array_equal(loaded.logits(**batch), model.logits(**batch))
    np.testing.assert_array_equal(loaded.sample(batch["z"], seed=5), model.sample(batch["z"], seed=5))


@pytest.mark.slow
def test_training_and_sampling_run_under_mixed_bfloat16(bfloat16):
    model = fitted(make_prior(depth=1, dropout=0.1), batch_of(8), steps=2, batch_size=4)
    assert model.logits(**batch_of(2)).dtype == tf.float32
    assert {weight.dtype for weight in model.trainable_variables} == {"float32"}
    assert np.isfinite(bits_of(model, batch_of(4))["loss"])
    codes = np.asarray(model.sample(np.arange(3), top_k=4))
    assert codes.min() >= 0 and codes.max() < CODES


def test_a_width_that_does_not_fit_the_heads_is_refused():
    with pytest.raises(ValueError, match="a width of 16 cannot be divided into 3 heads"):
        make_prior(heads=3)


@pytest.mark.slow
@pytest.mark.skipif(not PEERS.exists(), reason="the peers are not installed: run benchmarks/throughput.py once")
def test_the_benchmark_prints_a_ratio():
    command = [sys.executable, PEERS.parents[2] / "prior.py", "--tiny", "--peers", PEERS]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert "ratio" in out.stdout
