"""ldm/nets/transformer.py against plain formulas; what it draws is tested with the prior, in test_prior.py."""

import numpy as np
import pytest
from scipy.special import erf

from ldm.nets import transformer


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def built(layer, shape):
    layer.build(shape)
    layer.set_weights([0.4 * normal(*w.shape, seed=i) + (w.ndim == 1) for i, w in enumerate(layer.get_weights())])
    return layer


def plain_attention(x, to_query_key_value, out, bias, heads):
    """softmax(q k^T / sqrt(d)) v over a token and those before it, head by head (arXiv 1706.03762, eq. 1)."""
    query, key, value = np.split(x @ to_query_key_value, 3, axis=-1)
    size, result = x.shape[-1] // heads, np.empty_like(query)
    for b, n, h in np.ndindex(*x.shape[:2], heads):
        part = slice(h * size, (h + 1) * size)
        logits = key[b, : n + 1, part] @ query[b, n, part] / np.sqrt(size)
        weights = np.exp(logits - logits.max())
        result[b, n, part] = weights / weights.sum() @ value[b, : n + 1, part]
    return result @ out + bias


def plain_norm(x, gamma, beta):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 1e-3) * gamma + beta


def test_causal_attention_is_the_formula():
    x = normal(2, 5, 12)
    layer = built(transformer.CausalAttention(3), x.shape)
    np.testing.assert_allclose(layer(x), plain_attention(x, *layer.get_weights(), heads=3), rtol=1e-4, atol=1e-5)


def test_a_block_is_attention_and_a_gelu_mlp_on_normalised_input_each_beside_its_input():
    x = normal(2, 5, 8)
    block = built(transformer.TransformerBlock(2), x.shape)
    parts = (block.norm_attention, block.attention, block.norm_mlp, block.hidden, block.out)
    norm_attention, attention, norm_mlp, hidden, out = (part.get_weights() for part in parts)
    assert hidden[0].shape == (8, 32)
    y = x + plain_attention(plain_norm(x, *norm_attention), *attention, heads=2)
    h = plain_norm(y, *norm_mlp) @ hidden[0] + hidden[1]
    expected = y + (h * (1 + erf(h / np.sqrt(2))) / 2) @ out[0] + out[1]
    np.testing.assert_allclose(block(x), expected, rtol=1e-4, atol=1e-4)


def test_a_fresh_block_is_the_identity():
    x = normal(2, 5, 8)
    np.testing.assert_array_equal(transformer.TransformerBlock(2)(x), x)


@pytest.mark.parametrize("room", [0, 3])
def test_token_by_token_is_the_whole_sequence(room):
    """Whether the cache grows with each token or has had room from the start."""
    x = normal(2, 5, 8)
    block = built(transformer.TransformerBlock(2), x.shape)
    cache = transformer.lengthen(block.attention.empty_cache(2), 5 + room if room else 0)
    found = []
    for position in range(5):
        cache = cache if room else transformer.lengthen(cache, 1)
        token, cache = block.step(x[:, position : position + 1], cache, position)
        found.append(np.asarray(token)[:, 0])
    np.testing.assert_allclose(np.stack(found, axis=1), block(x), rtol=1e-4, atol=1e-4)


def test_dropout_sets_the_share_to_0_and_scales_up_the_rest():
    x, numbers = normal(2, 3, 4), np.random.default_rng(1).random((2, 3, 4)).astype("float32")
    found = transformer.dropout(x, 0.25, lambda shape: numbers.reshape(shape))
    np.testing.assert_allclose(found, np.where(numbers < 0.25, 0.0, x / 0.75), rtol=1e-6)
    for rate, uniform in ((0.0, lambda shape: numbers), (0.25, None)):
        assert transformer.dropout(x, rate, uniform) is x
