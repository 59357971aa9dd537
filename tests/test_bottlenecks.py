"""ldm/nets/bottlenecks.py: nearest code, straight-through gradient, moving averages in closed form, revival, usage."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from ldm.nets.bottlenecks import ActiveUnits, Codebook, CodebookUsage, Gaussian, Grid, count


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def made(num_codes=6, size=3, codebook=None, **options):
    layer = Codebook((4, 4, size), num_codes, **options)
    layer.codebook.assign(normal(num_codes, size, seed=9) if codebook is None else codebook)
    return layer


def settle(layer, counts):
    """Put averages in place as if `counts` had held for ever."""
    layer.average_count.assign(counts)
    layer.average_sum.assign(np.asarray(layer.codebook) * np.asarray(counts)[:, None])


def sums_of(layer, latents, codes):
    """Sum of the latents that chose each code (K, D)."""
    return np.stack([latents[np.asarray(codes) == code].sum(0) for code in range(layer.num_codes)])


def grid(levels):
    return Grid((4, 4, len(levels)), levels)


@pytest.mark.parametrize("shape", [(3, 4, 4, 5), (3, 1, 6, 2)])
def test_every_latent_takes_the_nearest_code(shape):
    layer, latents = made(9, shape[-1]), normal(*shape)
    distance = ((latents[..., None, :] - np.asarray(layer.codebook)) ** 2).sum(-1)
    codes = layer.encode(latents)
    np.testing.assert_array_equal(codes, distance.argmin(-1))
    assert codes.dtype == tf.int32 and codes.shape == shape[:3]
    vectors, _, state = layer(latents)
    np.testing.assert_array_equal(state["codes"], codes)
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
    vectors, _, state = layer(codebook[None, None])
    np.testing.assert_array_equal(state["codes"][0, 0], np.arange(6))
    assert vectors.dtype == tf.float32


def test_gradient_passes_straight_through_and_none_reaches_the_codebook():
    layer, latents, weight = made(), tf.Variable(normal(2, 4, 4, 3)), normal(2, 4, 4, 3, seed=1)
    with tf.GradientTape() as tape:
        tape.watch(layer.codebook.value)
        vectors, _, _ = layer(latents)
        loss = tf.reduce_sum(weight * vectors)
    to_latents, to_codebook = tape.gradient(loss, [latents, layer.codebook.value])
    np.testing.assert_array_equal(to_latents, weight)
    assert to_codebook is None
    assert layer.trainable_variables == []


def test_a_step_moves_the_codebook_by_what_all_replicas_counted_together():
    """Counts and sums go through `total`, here of three replicas that saw the same; dead codes go where `pick` says."""
    layer, other, latents = made(), made(), normal(2, 4, 4, 3)
    _, _, state = layer(latents)
    codes, picked = np.asarray(state["codes"]), normal(6, 3, seed=4) + 9.0

    def total(nest):
        return tf.nest.map_structure(lambda part: 3.0 * part, nest)

    def pick(rows, number):
        np.testing.assert_array_equal(rows, latents.reshape(-1, 3))
        return picked[:number]

    layer.update(state, total, pick)
    counts, sums = np.bincount(codes.ravel(), minlength=6).astype("float32"), sums_of(layer, latents, codes)
    revived = other.follow(3.0 * counts, 3.0 * sums, picked)
    for ours, theirs in zip(layer.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert float(layer.revived.result()) == pytest.approx(float(revived) / 3) and float(revived) > 0


def test_update_is_the_moving_average_of_the_paper():
    """arXiv 1711.00937, appendix A.1, eq. 6 to 8: N <- g N + (1 - g) n, m <- g m + (1 - g) sum, e = m / N."""
    decay, rng = 0.9, np.random.default_rng(1)
    layer = made(decay=decay)
    settle(layer, np.full(6, 20.0, "float32"))
    count, total = np.full(6, 20.0), 20.0 * np.asarray(layer.codebook, "float64")
    for _ in range(3):
        counts = rng.integers(10, 30, 6).astype("float32")
        sums = normal(6, 3, seed=int(counts[0])) * counts[:, None]
        revived = layer.follow(counts, sums, np.full((6, 3), 99.0, "float32"))
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
    revived = layer.follow(counts, before * counts[:, None], candidates)
    after = np.asarray(layer.codebook)
    assert float(revived) == 2
    np.testing.assert_allclose(after[[1, 3]], candidates[[1, 3]], rtol=1e-6)
    np.testing.assert_allclose(after[[0, 2, 4, 5]], before[[0, 2, 4, 5]], rtol=1e-5)


def test_dead_is_what_is_used_less_than_a_part_of_the_even_share_not_of_the_largest():
    layer = made(decay=0.5, revival=0.5)
    counts = np.array([28, 5, 5, 4, 3, 3], "float32")  # even share 8; half of the largest is 14
    settle(layer, counts)
    candidates = normal(6, 3, seed=5)
    assert float(layer.follow(counts, np.asarray(layer.codebook) * counts[:, None], candidates)) == 2
    np.testing.assert_allclose(layer.average_count, [28, 5, 5, 4, 8, 8], rtol=1e-6)  # revived with the even share


def test_a_revived_code_is_not_dead_at_once_again():
    layer = made(decay=0.9, revival=0.1)
    settle(layer, np.array([0, 10, 10, 10, 10, 10], "float32"))
    counts = np.array([0, 10, 10, 10, 10, 10], "float32")
    sums = np.asarray(layer.codebook) * counts[:, None]
    assert float(layer.follow(counts, sums, normal(6, 3))) == 1
    assert float(layer.follow(counts, sums, normal(6, 3))) == 0


def test_first_update_puts_every_code_among_the_data():
    """The random start says nothing about where latents are: here far away, near (40, 40, 40)."""
    layer, latents = made(), normal(4, 4, 4, 3) + 40.0
    flat = latents.reshape(-1, 3)
    codes = layer.encode(latents)
    assert len(np.unique(codes)) < 6  # some would stay unused for ever
    layer.follow(count(codes, layer.num_codes), sums_of(layer, latents, codes), flat[:6])
    codebook = np.asarray(layer.codebook)
    assert np.all(codebook >= flat.min(0)) and np.all(codebook <= flat.max(0))
    assert len(np.unique(layer.encode(latents))) >= 5


def test_codebook_and_averages_come_back_from_disk(tmp_path):
    latents = keras.Input((4, 4, 3))
    layer = Codebook((4, 4, 3), 6, decay=0.8, revival=0.2)
    model = keras.Model(latents, layer(latents)[0])
    x = normal(2, 4, 4, 3)
    codes = layer.encode(x)
    layer.follow(count(codes, layer.num_codes), sums_of(layer, x, codes), normal(6, 3))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for ours, theirs in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    copy = loaded.layers[-1]
    assert (copy.num_codes, copy.latent_shape, copy.decay, copy.revival) == (6, (4, 4, 3), 0.8, 0.2)


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
    layer = grid(levels)
    codes = np.arange(np.prod(levels), dtype="int32")
    vectors = np.asarray(layer.decode(codes))
    assert layer.num_codes == len(np.unique(vectors, axis=0)) == np.prod(levels)
    np.testing.assert_array_equal(layer.encode(vectors), codes)
    for channel, level in enumerate(levels):
        steps = np.arange(level) - level // 2
        np.testing.assert_allclose(np.unique(vectors[:, channel]), steps / (level // 2), atol=1e-6)


def test_codes_count_up_in_the_first_channel_first():
    """As in the paper's listing; codes on disk and priors that were trained on them depend on it."""
    layer = grid([3, 5, 4])
    digits = np.asarray(layer.decode(np.arange(60, dtype="int32"))) * [1, 2, 2] + [1, 2, 2]
    np.testing.assert_allclose(digits @ [1, 3, 15], np.arange(60), atol=1e-4)


@pytest.mark.parametrize("levels", LEVELS)
def test_bounded_latents_go_a_little_beyond_the_ends_of_the_grid(levels):
    """So that a finite output of the encoder reaches them; and by less than would round to another level."""
    ends = [(np.array(levels) - 1 - np.array(levels) // 2), np.array(levels) // 2]
    for sign, end in zip((1, -1), ends, strict=True):
        beyond = sign * np.asarray(grid(levels).bound(np.full((1, len(levels)), sign * 50.0)))[0]
        beyond = beyond * (np.array(levels) // 2) - end  # in levels
        assert (beyond > 1e-4).all() and (beyond < 0.5).all()


@pytest.mark.parametrize("levels", LEVELS)
def test_bounded_latents_reach_every_level_and_no_other(levels):
    layer = grid(levels)
    sweep = np.linspace(-8, 8, 40001, dtype="float32")
    parts = layer.bound(np.repeat(sweep[:, None], len(levels), axis=1))
    codes = layer.encode(parts)
    vectors = layer.decode(codes)
    for channel, level in enumerate(levels):
        assert len(np.unique(np.round(np.asarray(vectors)[:, channel], 4))) == level
    assert 0 <= np.min(codes) and np.max(codes) < layer.num_codes
    np.testing.assert_allclose(layer.decode(codes), vectors, atol=1e-6)


def test_zero_is_bounded_to_the_middle_of_a_channel():
    """An encoder that says nothing says 0, also where the number of levels is even."""
    for levels in LEVELS:
        np.testing.assert_allclose(grid(levels).bound(np.zeros((1, len(levels)))), 0.0, atol=1e-6)


def test_gradient_passes_rounding_straight_through():
    """Nothing but the derivative of `bound` is left of it."""
    layer, encoded, weight = grid([5, 4]), tf.constant(normal(2, 4, 4, 2, seed=1)), normal(2, 4, 4, 2)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(encoded)
        loss = tf.reduce_sum(weight * layer(encoded)[0])
        smooth = tf.reduce_sum(weight * layer.bound(encoded))
    np.testing.assert_allclose(tape.gradient(loss, encoded), tape.gradient(smooth, encoded), rtol=1e-6)


def test_count_of_the_grid_is_a_histogram():
    layer = grid([3, 3])
    np.testing.assert_array_equal(count(np.array([[0, 5, 5], [1, 5, 0]]), layer.num_codes), [2, 1, 0, 0, 0, 3, 0, 0, 0])


@pytest.mark.parametrize("levels", [[8, 2], [257], [8] * 7])
def test_levels_that_cannot_be_are_refused(levels):
    with pytest.raises(ValueError, match="levels must be 3 to 256 each"):
        grid(levels)


def test_count_may_weigh_each_use():
    codes, where = np.array([[[0, 1], [1, 1]]], "int32"), np.array([[[1, 0], [1, 1]]], "float32")
    np.testing.assert_array_equal(count(codes, 3, where), [1, 2, 0])


def test_cosine_codes_are_the_nearest_by_angle_and_stay_unit_vectors():
    layer = Codebook((4, 4, 3), 6, cosine=True)
    layer.codebook.assign(layer.bound(normal(6, 3, seed=1)))
    x = 5.0 * normal(2, 4, 4, 3)
    bound = np.asarray(layer.bound(x))
    np.testing.assert_allclose(np.linalg.norm(bound, axis=-1), 1.0, rtol=1e-5)
    cosine = np.einsum("bhwd,kd->bhwk", x, np.asarray(layer.codebook)) / np.linalg.norm(x, axis=-1, keepdims=True)
    codes = np.asarray(layer.encode(bound))
    np.testing.assert_array_equal(codes, cosine.argmax(-1))
    layer.follow(count(codes, 6), sums_of(layer, bound, codes), bound.reshape(-1, 3)[:6])
    np.testing.assert_allclose(np.linalg.norm(layer.codebook, axis=-1), 1.0, rtol=1e-5)


def test_active_units_are_those_whose_mean_varies():
    metric = ActiveUnits((1, 2, 2))
    mean = np.zeros((4, 1, 2, 2), "float32")
    mean[:, 0, 0, 0] = [0.3, -0.3, 0.3, -0.3]  # variance 0.09
    mean[:, 0, 0, 1] = 7.0  # constant
    mean[:, 0, 1, 0] = [0.05, -0.05, 0.05, -0.05]  # variance 0.0025
    for part in (mean[:3], mean[3:]):
        metric.update_state(part)
    assert float(metric.result()) == 0.25


# ---- product codes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: Codebook((2, 3, 4), 9, 2), lambda: Grid((2, 3, 4), [3, 5], 2)])
def test_parts_of_a_latent_have_codes_of_their_own_side_by_side(make):
    """Column 2 x and 2 x + 1 of the codes are those of the first and the second half of the channels of column x."""
    layer, encoded = make(), normal(5, 2, 3, 4)
    latents, codes = np.asarray(layer.latents(encoded)), np.asarray(layer.codes(layer.latents(encoded)))
    assert layer.code_shape == (2, 6) and codes.shape == (5, 2, 6)
    for part in (0, 1):
        channels = slice(2 * part, 2 * part + 2)
        np.testing.assert_array_equal(codes[:, :, part::2], layer.encode(latents[..., channels]))
        np.testing.assert_allclose(layer.latents_of(codes)[..., channels], layer.decode(codes[:, :, part::2]))
    decoded, _, state = layer(encoded)
    np.testing.assert_array_equal(state["codes"], codes)
    np.testing.assert_allclose(decoded, layer.quantized(latents), atol=1e-6)


def test_channels_that_make_no_codes_are_refused():
    with pytest.raises(ValueError, match="4 latent channels cannot be cut into 3 codes"):
        Codebook((2, 3, 4), 9, 3)
    with pytest.raises(ValueError, match="2 codes of 3 levels do not make 4 channels"):
        Grid((2, 3, 4), [3, 3, 3], 2)


def test_commitment_pulls_the_encoder_towards_its_codes():
    """The loss is the mean squared distance to the nearest code; its gradient, 2 (z - e) / N, moves z alone."""
    layer, latents = made(), tf.Variable(normal(2, 4, 4, 3))
    with tf.GradientTape() as tape:
        _, losses, _ = layer(latents)
    distance = latents - layer.quantized(latents)
    np.testing.assert_allclose(losses["commitment"], np.mean(np.square(distance)), rtol=1e-5)
    np.testing.assert_allclose(tape.gradient(losses["commitment"], latents), 2 * distance / 96, atol=1e-6)
    assert grid([3, 5])(normal(2, 4, 4, 2))[1] == {}


# ---- Gaussian --------------------------------------------------------------------------------------------------------


def test_gaussian_is_its_mean_or_a_sample_and_its_kl_is_the_closed_form():
    layer = Gaussian((4, 4, 3))
    encoded = tf.concat([tf.fill((2, 4, 4, 3), 1.5), tf.fill((2, 4, 4, 3), np.log(4.0).astype("float32"))], axis=-1)
    latents, losses, _ = layer(encoded)
    np.testing.assert_array_equal(latents, encoded[..., :3])
    np.testing.assert_array_equal(layer.latents(encoded), encoded[..., :3])
    each = 0.5 * (1.5**2 + 4.0 - 1.0 - np.log(4.0))  # KL(N(1.5, 4) || N(0, 1))
    np.testing.assert_allclose(losses["kl"], each * 4 * 4 * 3, rtol=1e-5)
    noise = normal(2, 4, 4, 3)
    sample, same, _ = layer(encoded, normal=lambda shape: noise.reshape(shape))
    np.testing.assert_allclose(sample, 1.5 + 2.0 * noise, rtol=1e-5)
    np.testing.assert_array_equal(same["kl"], losses["kl"])
