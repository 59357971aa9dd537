"""ldm/nets/bottlenecks.py: nearest code, straight-through gradient, moving averages in closed form, revival, usage."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from ldm.nets.quantizers import CodebookUsage, FiniteScalarQuantizer, VectorQuantizer, count


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def made(num_codes=6, size=3, codebook=None, **options):
    layer = VectorQuantizer(num_codes, size, **options)
    layer.build((None, 4, 4, size))
    layer.codebook.assign(normal(num_codes, size, seed=9) if codebook is None else codebook)
    return layer


def settle(layer, counts):
    """Put averages in place as if `counts` had held for ever."""
    layer.average_count.assign(counts)
    layer.average_sum.assign(np.asarray(layer.codebook) * np.asarray(counts)[:, None])


def test_every_latent_takes_the_nearest_code():
    layer, latents = made(17, 5), normal(3, 4, 4, 5)
    distance = ((latents[..., None, :] - np.asarray(layer.codebook)) ** 2).sum(-1)
    codes = layer.encode(latents)
    np.testing.assert_array_equal(codes, distance.argmin(-1))
    assert codes.dtype == tf.int32 and codes.shape == (3, 4, 4)
    vectors, same = layer(latents)
    np.testing.assert_array_equal(same, codes)
    np.testing.assert_allclose(vectors, np.asarray(layer.codebook)[np.asarray(codes)], atol=1e-6)


def test_a_code_decodes_and_encodes_to_itself():
    layer = made(17, 5)
    codes = np.random.default_rng(0).integers(0, 17, (2, 4, 4))
    np.testing.assert_array_equal(layer.encode(layer.decode(codes)), codes)


def test_distances_are_float32_under_mixed_bfloat16(bfloat16):
    """Codes closer together than bfloat16 can tell at their size."""
    codebook = (8.0 + 0.01 * np.arange(6, dtype="float32"))[:, None] * np.ones(3, "float32")
    layer = made(codebook=codebook)
    np.testing.assert_array_equal(layer.encode(codebook[None, None])[0, 0], np.arange(6))
    vectors, codes = layer(codebook[None, None])
    np.testing.assert_array_equal(codes[0, 0], np.arange(6))
    assert vectors.dtype == tf.float32


def test_gradient_passes_straight_through_and_none_reaches_the_codebook():
    layer, latents, weight = made(), tf.Variable(normal(2, 4, 4, 3)), normal(2, 4, 4, 3, seed=1)
    with tf.GradientTape() as tape:
        tape.watch(layer.codebook.value)
        vectors, _ = layer(latents)
        loss = tf.reduce_sum(weight * vectors)
    to_latents, to_codebook = tape.gradient(loss, [latents, layer.codebook.value])
    np.testing.assert_array_equal(to_latents, weight)
    assert to_codebook is None
    assert layer.trainable_variables == []


def test_statistics_are_counts_and_sums_per_code():
    layer, latents = made(), normal(2, 4, 4, 3)
    codes = np.asarray(layer.encode(latents))
    counts, sums = count(codes, layer.num_codes), layer.sum(latents, codes)
    for code in range(6):
        chosen = latents[codes == code]
        assert counts[code] == len(chosen)
        np.testing.assert_allclose(sums[code], chosen.sum(0), atol=1e-5)
    assert float(tf.reduce_sum(counts)) == 32


def test_update_is_the_moving_average_of_the_paper():
    """arXiv 1711.00937, appendix A.1, eq. 6 to 8: N <- g N + (1 - g) n, m <- g m + (1 - g) sum, e = m / N."""
    decay, rng = 0.9, np.random.default_rng(1)
    layer = made(decay=decay)
    settle(layer, np.full(6, 20.0, "float32"))
    count, total = np.full(6, 20.0), 20.0 * np.asarray(layer.codebook, "float64")
    for _ in range(3):
        counts = rng.integers(10, 30, 6).astype("float32")
        sums = normal(6, 3, seed=int(counts[0])) * counts[:, None]
        revived = layer.update(counts, sums, np.full((6, 3), 99.0, "float32"))
        count, total = decay * count + (1 - decay) * counts, decay * total + (1 - decay) * sums
        assert float(revived) == 0
        np.testing.assert_allclose(layer.codebook, total / count[:, None], rtol=1e-5)
        np.testing.assert_allclose(layer.average_count, count, rtol=1e-6)


def test_dead_codes_move_onto_candidates_and_live_ones_stay():
    layer = made(decay=0.5, revival=0.1)
    settle(layer, np.array([10, 0, 10, 0.1, 10, 10], "float32"))
    before = np.asarray(layer.codebook).copy()
    counts = np.array([10, 0, 10, 0, 10, 10], "float32")  # even share 40 / 6: below 0.67 is dead
    candidates = normal(6, 3, seed=5) + 50.0
    revived = layer.update(counts, before * counts[:, None], candidates)
    after = np.asarray(layer.codebook)
    assert float(revived) == 2
    np.testing.assert_allclose(after[[1, 3]], candidates[[1, 3]], rtol=1e-6)
    np.testing.assert_allclose(after[[0, 2, 4, 5]], before[[0, 2, 4, 5]], rtol=1e-5)


def test_a_revived_code_is_not_dead_at_once_again():
    layer = made(decay=0.9, revival=0.1)
    settle(layer, np.array([0, 10, 10, 10, 10, 10], "float32"))
    counts = np.array([0, 10, 10, 10, 10, 10], "float32")
    sums = np.asarray(layer.codebook) * counts[:, None]
    assert float(layer.update(counts, sums, normal(6, 3))) == 1
    assert float(layer.update(counts, sums, normal(6, 3))) == 0


def test_first_update_puts_every_code_among_the_data():
    """The random start says nothing about where latents are: here far away, near (40, 40, 40)."""
    layer, latents = made(), normal(4, 4, 4, 3) + 40.0
    flat = latents.reshape(-1, 3)
    codes = layer.encode(latents)
    assert len(np.unique(codes)) < 6  # some would stay unused for ever
    layer.update(count(codes, layer.num_codes), layer.sum(latents, codes), flat[:6])
    codebook = np.asarray(layer.codebook)
    assert np.all(codebook >= flat.min(0)) and np.all(codebook <= flat.max(0))
    assert len(np.unique(layer.encode(latents))) >= 5


def test_codebook_and_averages_come_back_from_disk(tmp_path):
    latents = keras.Input((4, 4, 3))
    layer = VectorQuantizer(6, 3, decay=0.8, revival=0.2)
    model = keras.Model(latents, layer(latents))
    x = normal(2, 4, 4, 3)
    codes = layer.encode(x)
    layer.update(count(codes, layer.num_codes), layer.sum(x, codes), normal(6, 3))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for ours, theirs in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    copy = loaded.layers[-1]
    assert (copy.num_codes, copy.size, copy.decay, copy.revival) == (6, 3, 0.8, 0.2)


@pytest.mark.parametrize(
    ("counts", "usage", "perplexity"),
    [
        ([5.0] * 8, 1.0, 8.0),
        ([0, 0, 7, 0, 0, 0, 0, 0], 1 / 8, 1.0),
        ([3, 3, 0, 0, 0, 0, 0, 0], 2 / 8, 2.0),
        ([0.0] * 8, 0.0, 1.0),
    ],
)
def test_usage_and_perplexity_of_known_counts(counts, usage, perplexity):
    for statistic, expected in (("usage", usage), ("perplexity", perplexity)):
        metric = CodebookUsage(8, statistic)
        metric.update_state(np.array(counts, "float32"))
        np.testing.assert_allclose(metric.result(), expected, rtol=1e-5)


def test_usage_adds_up_over_batches_and_forgets_at_reset():
    usage, perplexity = CodebookUsage(4), CodebookUsage(4, "perplexity")
    for metric, expected in ((usage, 0.5), (perplexity, np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))):
        metric.update_state(np.array([3, 0, 0, 0], "float32"))
        metric.update_state(np.array([0, 1, 0, 0], "float32"))
        np.testing.assert_allclose(metric.result(), expected, rtol=1e-5)
        metric.reset_state()
        metric.update_state(np.array([0, 0, 0, 2], "float32"))
        np.testing.assert_allclose(metric.result(), 0.25 if metric is usage else 1.0, rtol=1e-5)


# ---- finite scalar quantisation --------------------------------------------------------------------------------------

LEVELS = [[3, 5, 4], [8, 5, 5, 5], [3, 3], [7], [256]]


@pytest.mark.parametrize("levels", LEVELS)
def test_codes_number_the_whole_grid(levels):
    """Every code stands for a point of the grid of its own, and comes back from it (arXiv 2309.15505, section 3)."""
    layer = FiniteScalarQuantizer(levels)
    codes = np.arange(np.prod(levels), dtype="int32")
    vectors = np.asarray(layer.decode(codes))
    assert layer.num_codes == len(np.unique(vectors, axis=0)) == np.prod(levels)
    np.testing.assert_array_equal(layer.encode(vectors), codes)
    for channel, level in enumerate(levels):
        steps = np.arange(level) - level // 2
        np.testing.assert_allclose(np.unique(vectors[:, channel]), steps / (level // 2), atol=1e-6)


@pytest.mark.parametrize("levels", LEVELS)
def test_bounded_latents_reach_every_level_and_no_other(levels):
    layer = FiniteScalarQuantizer(levels)
    sweep = np.linspace(-8, 8, 40001, dtype="float32")
    vectors, codes = layer(layer.bound(np.repeat(sweep[:, None], len(levels), axis=1)))
    for channel, level in enumerate(levels):
        assert len(np.unique(np.round(np.asarray(vectors)[:, channel], 4))) == level
    assert 0 <= np.min(codes) and np.max(codes) < layer.num_codes
    np.testing.assert_allclose(layer.decode(codes), vectors, atol=1e-6)


def test_zero_is_bounded_to_the_middle_of_a_channel():
    """An encoder that says nothing says 0, also where the number of levels is even."""
    for levels in LEVELS:
        np.testing.assert_allclose(FiniteScalarQuantizer(levels).bound(np.zeros((1, len(levels)))), 0.0, atol=1e-6)


def test_gradient_passes_rounding_straight_through():
    layer, weight = FiniteScalarQuantizer([5, 4]), normal(2, 4, 4, 2)
    latents = tf.constant(np.clip(normal(2, 4, 4, 2, seed=1) / 3, -1, 1))
    with tf.GradientTape() as tape:
        tape.watch(latents)
        loss = tf.reduce_sum(weight * layer(latents)[0])
    np.testing.assert_array_equal(tape.gradient(loss, latents), weight)


def test_count_of_the_grid_is_a_histogram():
    layer = FiniteScalarQuantizer([3, 3])
    np.testing.assert_array_equal(count(np.array([[0, 5, 5], [1, 5, 0]]), layer.num_codes), [2, 1, 0, 0, 0, 3, 0, 0, 0])


@pytest.mark.parametrize("levels", [[8, 2], [257], [8] * 7])
def test_levels_that_cannot_be_are_refused(levels):
    with pytest.raises(ValueError, match="levels must be 3 to 256 each"):
        FiniteScalarQuantizer(levels)


def test_count_may_weigh_each_use():
    codes, where = np.array([[[0, 1], [1, 1]]], "int32"), np.array([[[1, 0], [1, 1]]], "float32")
    np.testing.assert_array_equal(count(codes, 3, where), [1, 2, 0])


def test_cosine_codes_are_the_nearest_by_angle_and_stay_unit_vectors():
    layer = VectorQuantizer(6, 3, cosine=True)
    layer.build((None, 4, 4, 3))
    layer.codebook.assign(layer.bound(normal(6, 3, seed=1)))
    x = 5.0 * normal(2, 4, 4, 3)
    bound = np.asarray(layer.bound(x))
    np.testing.assert_allclose(np.linalg.norm(bound, axis=-1), 1.0, rtol=1e-5)
    cosine = np.einsum("bhwd,kd->bhwk", x, np.asarray(layer.codebook)) / np.linalg.norm(x, axis=-1, keepdims=True)
    codes = np.asarray(layer.encode(bound))
    np.testing.assert_array_equal(codes, cosine.argmax(-1))
    layer.update(count(codes, 6), layer.sum(bound, codes), bound.reshape(-1, 3)[:6])
    np.testing.assert_allclose(np.linalg.norm(layer.codebook, axis=-1), 1.0, rtol=1e-5)
