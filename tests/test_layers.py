"""ldm/nets/layers.py against plain formulas, Keras' own layers, and mixed precision's rounding."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from ldm.nets import layers


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def randomised(layer, seed=0):
    """The built layer with random weights, so that neither a zero nor a one hides a mistake."""
    rng = np.random.default_rng(seed)
    layer.set_weights([0.3 * rng.normal(size=w.shape) + (w.ndim == 1) for w in layer.get_weights()])
    return layer


# ---- group normalisation ---------------------------------------------------------------------------------------------


def plain_group_norm(x, groups, gamma, beta, film=None, epsilon=1e-5, library=np):
    """Two passes over the centred values, as in arXiv 1803.08494, eq. 1 and 2; then FiLM."""
    shape = x.shape
    grouped = library.reshape(x, (shape[0], -1, groups, shape[-1] // groups))
    mean = library.mean(grouped, axis=(1, 3), keepdims=True)
    variance = library.mean((grouped - mean) ** 2, axis=(1, 3), keepdims=True)
    y = library.reshape((grouped - mean) / library.sqrt(variance + epsilon), shape) * gamma + beta
    if film is not None:
        middle = (shape[0], *[1] * (len(shape) - 2), shape[-1])
        scale, shift = (library.reshape(part, middle) for part in library.split(film, 2, axis=-1))
        y = y * (1.0 + scale) + shift
    return y


@pytest.mark.parametrize("shape", [(3, 6, 5, 16), (3, 7, 16)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_group_norm_is_that_of_keras(shape, activation):
    x = 2.0 * normal(*shape) + 0.5
    ours, theirs = layers.GroupNorm(4, activation), keras.layers.GroupNormalization(4, epsilon=1e-5)
    ours.build(shape), theirs.build(shape)
    theirs.set_weights(randomised(ours).get_weights())
    expected = theirs(x)
    np.testing.assert_allclose(ours(x), ops.silu(expected) if activation else expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 6, 5, 16), (3, 7, 16)])
def test_group_norm_with_film_is_the_formula(shape):
    x, film = 2.0 * normal(*shape) + 0.5, normal(shape[0], 2 * shape[-1], seed=1)
    layer = layers.GroupNorm(4, "silu")
    layer.build(shape, film.shape)
    gamma, beta = randomised(layer).get_weights()
    y = plain_group_norm(x.astype("float64"), 4, gamma, beta, film)
    np.testing.assert_allclose(layer(x, film), y / (1.0 + np.exp(-y)), atol=2e-5)


def test_gradient_of_group_norm_is_that_of_the_formula():
    shape = (2, 4, 4, 8)
    x, film, weight = tf.Variable(normal(*shape) + 0.5), tf.Variable(normal(2, 16, seed=1)), normal(*shape, seed=2)
    layer = layers.GroupNorm(2)
    layer.build(shape, film.shape)
    randomised(layer)
    sources = [x, film, layer.gamma.value, layer.beta.value]
    with tf.GradientTape(persistent=True) as tape:
        ours = tf.reduce_sum(weight * layer(x, film))
        plain = tf.reduce_sum(weight * plain_group_norm(x, 2, *sources[2:], film, library=ops))
    for a, b in zip(tape.gradient(ours, sources), tape.gradient(plain, sources), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_group_norm_of_constant_pictures_is_beta_with_a_finite_gradient():
    """Mean of squares minus square of the mean may round below 0; slices are constant outside the head."""
    value = np.linspace(-50.0, 50.0, 101, dtype="float32")[:, None, None, None]
    x = tf.Variable(np.broadcast_to(value, (101, 7, 9, 6)))
    layer = layers.GroupNorm(2)
    layer.build(x.shape)
    layer.beta.assign(normal(6))
    with tf.GradientTape() as tape:
        y = layer(x)
        loss = tf.reduce_sum(y**2)
    assert np.all(np.abs(y - normal(6)) <= 1e-5 + 1e-3 * np.abs(value))
    assert np.all(np.isfinite(tape.gradient(loss, x)))


def test_group_norm_of_nearly_constant_pictures_is_finite():
    """Here the variance, 1e-8, is less than the rounding of the squares, 1e-4, and comes out on either side of 0."""
    x = np.linspace(20.0, 60.0, 99, dtype="float32")[:, None, None, None] + 1e-4 * normal(99, 7, 9, 6)
    assert np.all(np.isfinite(layers.GroupNorm(2)(x)))


def test_group_norm_adds_the_epsilon_it_was_given():
    x = 0.1 * normal(2, 4, 4, 8)
    expected = plain_group_norm(x, 2, 1.0, 0.0, epsilon=0.5)
    np.testing.assert_allclose(layers.GroupNorm(2, epsilon=0.5)(x), expected, atol=1e-5)


def test_group_norm_lowers_the_number_of_groups_to_a_divisor_of_the_channels():
    x = normal(2, 4, 4, 12)
    layer = layers.GroupNorm(8)  # 6 is the largest divisor of 12 up to 8
    np.testing.assert_allclose(layer(x), plain_group_norm(x, 6, 1.0, 0.0), atol=1e-5)
    assert layers.GroupNorm()(normal(2, 4, 4, 7)).shape == (2, 4, 4, 7)


def test_group_norm_measures_in_float32_under_mixed_bfloat16(bfloat16):
    """A bfloat16 sum of ones stops growing at 256: over 4096 pixels such statistics would be far off."""
    x = tf.cast(1.0 + 0.5 * normal(2, 64, 64, 4), "bfloat16")
    layer = layers.GroupNorm(2)
    y = layer(x)
    assert y.dtype == tf.bfloat16
    exact = plain_group_norm(np.asarray(x, "float64"), 2, 1.0, 0.0)
    error = np.asarray(y, "float64") - exact
    assert np.abs(error).max() < 0.05  # bfloat16 keeps 8 bits: 2^-8 of values up to 4, and of the offset
    assert abs(error.mean()) < 5e-3 and abs(np.asarray(y, "float64").std() - 1.0) < 5e-3


def test_examples_of_a_batch_do_not_see_each_other():
    layer, x = layers.GroupNorm(2), normal(3, 4, 4, 8)
    alone = [layer(x[i : i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(layer(x), alone, atol=1e-6)


# ---- attention -------------------------------------------------------------------------------------------------------


def plain_attention(x, context, to_query, to_key_value, out, bias, heads):
    """softmax(q k^T / sqrt(d)) v, head by head (arXiv 1706.03762, eq. 1)."""
    channels = x.shape[-1]
    size = channels // heads
    query, key, value = x @ to_query, context @ to_key_value[:, :channels], context @ to_key_value[:, channels:]
    result = np.empty_like(query)
    for b in range(len(x)):
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            logits = query[b, :, part] @ key[b, :, part].T / np.sqrt(size)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            result[b, :, part] = weights / weights.sum(-1, keepdims=True) @ value[b, :, part]
    return result @ out + bias


def made_attention(x, context=None, head_size=4):
    layer = layers.Attention(head_size)
    layer.build(x.shape, None if context is None else context.shape)
    layer.set_weights([normal(*w.shape, seed=i) for i, w in enumerate(layer.get_weights())])
    return layer


def test_self_attention_is_the_formula():
    x = normal(2, 5, 12)
    layer = made_attention(x)
    expected = plain_attention(x, x, *layer.get_weights(), heads=3)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [3, 5], ids=["few", "many"])  # with 3 heads of 4 channels, few are less than 4
def test_cross_attention_is_the_formula(tokens):
    x, context = normal(2, 5, 12), normal(2, tokens, 7, seed=1)
    layer = made_attention(x, context)
    expected = plain_attention(x, context, *layer.get_weights(), heads=3)
    np.testing.assert_allclose(layer(x, context), expected, rtol=1e-4, atol=1e-4)


def test_few_tokens_have_the_gradients_of_the_formula():
    x, context, probe = tf.constant(normal(2, 5, 12)), tf.constant(normal(2, 3, 7, seed=1)), normal(2, 5, 12, seed=2)
    layer = made_attention(x, context)

    def formula(x, context):
        to_query, to_key_value, out, bias = (tf.convert_to_tensor(weight) for weight in layer.weights)
        key, value = tf.split(context @ to_key_value, 2, axis=-1)
        query, key, value = (tf.reshape(part, (2, -1, 3, 4)) for part in (x @ to_query, key, value))
        weights = tf.nn.softmax(tf.einsum("bnhd,bmhd->bhnm", query, key) / 2.0)
        return tf.reshape(tf.einsum("bhnm,bmhd->bnhd", weights, value), (2, 5, 12)) @ out + bias

    def gradients(attend):
        with tf.GradientTape() as tape:
            tape.watch((x, context))
            loss = tf.reduce_sum(attend(x, context) * probe)
        return tape.gradient(loss, [x, context, *(weight.value for weight in layer.weights)])

    for ours, theirs in zip(gradients(layer), gradients(formula), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(tf.reduce_max(tf.abs(theirs))))


def test_attention_follows_a_permutation_of_its_queries_and_ignores_one_of_its_context():
    x, context = normal(2, 6, 8), normal(2, 4, 8, seed=1)
    order, other = np.array([3, 1, 5, 0, 2, 4]), np.array([2, 0, 3, 1])
    alone, cross = made_attention(x), made_attention(x, context)
    np.testing.assert_allclose(alone(x[:, order]), ops.convert_to_numpy(alone(x))[:, order], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(cross(x, context[:, other]), cross(x, context), rtol=1e-4, atol=1e-4)


def test_fewer_channels_than_a_head_make_one_head_and_uneven_heads_are_refused():
    x = normal(1, 3, 6)
    layer = made_attention(x, head_size=64)
    np.testing.assert_allclose(layer(x), plain_attention(x, x, *layer.get_weights(), heads=1), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cannot be divided into heads of 4"):
        layers.Attention(4)(x)


def test_attention_block_is_the_identity_at_the_start_and_sees_tokens_later():
    x, tokens = normal(2, 4, 3, 8), normal(2, 3, 5, seed=1)
    block = layers.AttentionBlock(4)
    np.testing.assert_allclose(block(x, tokens), x, atol=1e-6)
    block.cross_attention.to_out.kernel.assign(normal(8, 8))
    assert np.abs(block(x, tokens) - block(x, tokens[::-1])).max() > 1e-3


# ---- embeddings ------------------------------------------------------------------------------------------------------


def test_sinusoidal_embedding_is_the_formula():
    """arXiv 1706.03762, section 3.5: cos and sin of position / 10000^(i / (size / 2))."""
    position = np.array([0.0, 0.25, 7.0, 1000.0])
    angle = position[:, None] / 10_000.0 ** (np.arange(8) / 8)
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    np.testing.assert_allclose(layers.sinusoidal_embedding(position, 16), expected, atol=2e-4)  # float32 of angle 1000


def test_embedding_is_an_mlp_with_silu_of_the_sines():
    position = np.array([0.0, 0.3, 1.0], "float32")
    layer = layers.Embedding(8, scale=20.0)
    layer.build((None,))
    randomised(layer)
    hidden, out = layer.hidden.get_weights(), layer.out.get_weights()
    h = np.asarray(layers.sinusoidal_embedding(20.0 * position, 8)) @ hidden[0] + hidden[1]
    np.testing.assert_allclose(layer(position), h / (1.0 + np.exp(-h)) @ out[0] + out[1], rtol=1e-4, atol=1e-5)


def test_embedding_tells_neighbouring_times_apart_under_mixed_bfloat16(bfloat16):
    """bfloat16 has 8 bits: 0.5 and 0.5005 are one number in it. The cast must come after the sines."""
    embedding = layers.Embedding(32, scale=1000.0, autocast=False)
    token = ops.cast(embedding(tf.constant([0.5, 0.5005])), "float32")
    assert embedding(tf.constant([0.5])).dtype == tf.bfloat16
    assert np.abs(token[0] - token[1]).max() > 0.02


def test_embedding_takes_whole_numbers_without_rounding_under_mixed_bfloat16(bfloat16):
    """Slice indices above 256 are not all whole in bfloat16."""
    embedding = layers.Embedding(32)
    tokens = ops.convert_to_numpy(ops.cast(embedding(tf.range(250, 270)), "float32"))
    assert np.abs(np.diff(tokens, axis=0)).max(axis=1).min() > 5e-3


def test_dropped_condition_leaves_no_trace_and_kept_one_is_untouched():
    layer = layers.NullableEmbedding()
    layer.build((None, 6))
    layer.null.assign(normal(6, seed=3))
    first, second = normal(2, 6), normal(2, 6, seed=1)
    np.testing.assert_array_equal(layer(first, np.zeros(2)), layer(second, np.zeros(2)))
    np.testing.assert_array_equal(layer(first, np.zeros(2))[0], layer.null)
    np.testing.assert_array_equal(layer(first, np.ones(2)), first)
    mixed = layer(first, np.array([1.0, 0.0]))
    np.testing.assert_array_equal(mixed[0], first[0])
    np.testing.assert_array_equal(mixed[1], layer.null)


def randomised_covariate(values):
    layer = layers.Covariate(6, values)
    layer.build((None,))
    return randomised(layer)


def test_each_category_and_the_unknown_have_tokens_of_their_own():
    layer = randomised_covariate(3)
    table = np.asarray(layer.embedding.embeddings)
    np.testing.assert_array_equal(layer(np.array([np.nan, 0.0, 1.0, 2.0], "float32")), table)


def test_a_number_is_embedded_and_the_unknown_has_a_token_of_its_own():
    """The unknown is not the mean, 0; and a known number is what `Embedding` makes of it, whatever the others are."""
    layer = randomised_covariate(0)
    tokens = np.asarray(layer(np.array([0.0, np.nan, 0.7], "float32")))
    np.testing.assert_array_equal(tokens[1], layer.known.null)
    known = layer.embedding(np.array([0.0, 0.7], "float32"))
    np.testing.assert_allclose(tokens[[0, 2]], known, rtol=1e-6, atol=2e-7)  # an ulp of what cancels
    assert np.abs(tokens[0] - tokens[1]).max() > 1e-2 and np.abs(tokens[0] - tokens[2]).max() > 1e-2


def test_tokens_are_the_vectors_in_their_order():
    vectors = [normal(2, 5, seed=seed) for seed in range(3)]
    np.testing.assert_array_equal(layers.Tokens()(vectors), np.stack(vectors, axis=1))


def test_agreement_is_the_inner_product_of_pixel_and_vector():
    x, direction = normal(2, 4, 3, 5), normal(2, 5, seed=1)
    expected = np.einsum("bhwc,bc->bhw", x, direction)[..., None] / np.sqrt(5)
    np.testing.assert_allclose(layers.Agreement()(x, direction), expected, rtol=1e-5)


# ---- blocks ----------------------------------------------------------------------------------------------------------


def test_residual_block_is_the_identity_at_the_start():
    x, embedding = normal(2, 6, 6, 8), normal(2, 5, seed=1)
    np.testing.assert_array_equal(layers.ResBlock(8)(x), x)
    np.testing.assert_array_equal(layers.ResBlock(8)(x, embedding), x)


def test_residual_block_sees_its_embedding_and_changes_channels():
    x, embedding = normal(2, 6, 6, 8), normal(2, 5, seed=1)
    block = layers.ResBlock(12)
    block.build(x.shape, embedding.shape)
    block.conv_out.kernel.assign(normal(3, 3, 12, 12))
    assert block(x, embedding).shape == block.compute_output_shape(x.shape, embedding.shape) == (2, 6, 6, 12)
    assert np.abs(block(x, embedding) - block(x, embedding[::-1])).max() > 1e-2


def silu(x):
    return x / (1.0 + np.exp(-x))


def convolved(x, kernel, bias):
    """Convolution with zeros around the picture, pixel by pixel, as a sum over the kernel's places."""
    reach = kernel.shape[0] // 2
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    places = np.ndindex(kernel.shape[:2])
    return bias + sum(padded[:, i : i + x.shape[1], j : j + x.shape[2]] @ kernel[i, j] for i, j in places)


@pytest.mark.parametrize("channels", [6, 9])
def test_residual_block_is_the_formula(channels):
    """h = conv(silu(norm(x))); h = conv(silu(norm(h) (1 + scale) + shift)), scale and shift from silu(embedding);
    and x beside it, through a 1x1 convolution where the channels change.
    """
    x, embedding = normal(2, 5, 4, 6), normal(2, 7, seed=1)
    block = layers.ResBlock(channels)
    block.build(x.shape, embedding.shape)
    randomised(block)
    parts = (block.norm_in, block.conv_in, block.norm_out, block.conv_out, block.film)
    norm_in, conv_in, norm_out, conv_out, film = (part.get_weights() for part in parts)
    h = convolved(silu(plain_group_norm(x.astype("float64"), 6, *norm_in)), *conv_in)
    h = convolved(silu(plain_group_norm(h, channels, *norm_out, silu(embedding) @ film[0] + film[1])), *conv_out)
    beside = x if channels == 6 else convolved(x, *block.shortcut.get_weights())
    np.testing.assert_allclose(block(x, embedding), beside + h, rtol=1e-4, atol=1e-4)


def test_residual_block_drops_only_in_training():
    x = normal(1, 6, 6, 8)
    block = layers.ResBlock(8, dropout=0.5)
    block.build(x.shape)
    block.conv_out.kernel.assign(normal(3, 3, 8, 8))
    np.testing.assert_array_equal(block(x, training=False), block(x))
    assert np.abs(block(x, training=True) - block(x)).max() > 1e-2


def test_what_is_dropped_is_0_and_never_normalised_again():
    """Half of what the last convolution sees is 0, and the rest twice as large: dropout comes after norm and SiLU."""
    x = normal(1, 6, 6, 8)
    block = layers.ResBlock(8, dropout=0.5)
    block.build(x.shape)
    seen, convolve = [], block.conv_out
    block.conv_out = lambda h: seen.append(np.asarray(h)) or convolve(h)
    block(x, training=False), block(x, training=True)
    whole, dropped = seen
    assert 0.4 < np.mean(dropped == 0.0) < 0.6
    np.testing.assert_allclose(dropped[dropped != 0.0], 2.0 * whole[dropped != 0.0], rtol=1e-5)


def test_tokens_stand_in_the_order_of_the_list():
    first, second = normal(2, 4), normal(2, 4, seed=1)
    np.testing.assert_array_equal(layers.Tokens()([first, second]), np.stack([first, second], axis=1))


@pytest.mark.parametrize("size", [2, 4])
def test_depth_to_space_undoes_space_to_depth(size):
    x = normal(2, 8, 12, 3)
    folded = layers.SpaceToDepth(size)(x)
    assert folded.shape == (2, 8 // size, 12 // size, 3 * size**2)
    np.testing.assert_array_equal(folded[0, 1, 2], x[0, size : 2 * size, 2 * size : 3 * size].reshape(-1))
    np.testing.assert_array_equal(layers.DepthToSpace(size)(folded), x)


def test_upsample_doubles_and_downsample_halves():
    x = keras.Input((8, 12, 4))
    assert layers.upsample(x, 6).shape == (None, 16, 24, 6)
    assert layers.downsample(6)(x).shape == (None, 4, 6, 6)


def test_upsample_repeats_each_pixel():
    """Nothing is interpolated: with a convolution that passes its middle on, every pixel is there four times."""
    inputs = keras.Input((3, 2, 4))
    model = keras.Model(inputs, layers.upsample(inputs, 4))
    kernel = np.zeros((3, 3, 4, 4), "float32")
    kernel[1, 1] = np.eye(4)
    model.set_weights([kernel, np.zeros(4)])
    x = normal(2, 3, 2, 4)
    np.testing.assert_array_equal(model(x), x.repeat(2, axis=1).repeat(2, axis=2))


# ---- gates and gradient checkpointing --------------------------------------------------------------------------------


def test_gate_weighs_pixels_between_0_and_1_by_both_its_inputs():
    gate = layers.AttentionGate(4)
    rng = np.random.default_rng(0)
    x, skip = (tf.constant(rng.normal(size=(2, 5, 4, 3)), "float32") for _ in range(2))
    weight = gate(x, skip) / skip
    assert (weight.numpy() > 0).all() and (weight.numpy() < 1).all()
    np.testing.assert_allclose(weight, np.repeat(weight[..., :1], 3, axis=-1), rtol=1e-4)  # one for all channels
    a, b, c = (layer.get_weights() for layer in (gate.from_x, gate.from_skip, gate.weigh))
    hidden = np.maximum(x.numpy() @ a[0][0, 0] + a[1] + skip.numpy() @ b[0][0, 0], 0)
    expected = 1 / (1 + np.exp(-(hidden @ c[0][0, 0] + c[1])))  # equations 1 and 2
    np.testing.assert_allclose(weight[..., :1], expected, rtol=1e-4)


@pytest.mark.parametrize("make", [lambda **o: layers.ResBlock(6, **o), lambda **o: layers.AttentionBlock(2, **o)])
def test_recomputed_blocks_have_the_same_gradients(make):
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(2, 4, 4, 6)), "float32")
    vector = tf.constant(rng.normal(size=(2, 8)), "float32")
    found = []
    for recompute in (False, True):
        block = make(recompute=recompute)
        condition = vector if isinstance(block, layers.ResBlock) else vector[:, None, :]
        block(x, condition)
        draw = np.random.default_rng(1)
        block.set_weights([draw.normal(size=w.shape) for w in block.get_weights()])
        calls, once = [], block.transform
        block.transform = lambda *inputs, calls=calls, once=once: calls.append(0) or once(*inputs)
        with tf.GradientTape() as tape:
            tape.watch([x, condition])
            loss = tf.reduce_sum(tf.square(block(x, condition, training=True)))
        forward = len(calls)
        found.append([loss, *tape.gradient(loss, [x, condition, *block.trainable_variables])])
        assert len(calls) - forward == recompute  # on the way back it is computed once more
    for plain, again in zip(*found, strict=True):
        np.testing.assert_allclose(again, plain, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="dropout"):
        layers.ResBlock(6, dropout=0.1, recompute=True)
