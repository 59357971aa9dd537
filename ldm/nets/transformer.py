"""A causal transformer over tokens (arXiv 1706.03762), for whole sequences and for one token at a time.

`call` sees all tokens at once and is what training uses; `step` sees one, and the keys and values of those before it
in a cache. The two are the same function, and a test holds them to it. Attention weights are float32.
"""

import numpy as np
from einops import rearrange
from keras import layers, ops

from ldm.nets.saving import register

MASKED = -1e9  # exp(MASKED - anything) is exactly 0 in float32


@register
class CausalAttention(layers.Layer):
    """Multi-head attention of each token to itself and to those before it (arXiv 1706.03762, section 3.2).

    The output projection starts at zero.

    Args:
        heads: number of heads; divides C.

    Call arguments: x (B, N, C) -> (B, N, C).
    """

    def __init__(self, heads, **kwargs):
        super().__init__(**kwargs)
        self.heads = heads

    def build(self, x_shape):
        width = x_shape[-1]
        if width % self.heads:
            raise ValueError(f"a width of {width} cannot be divided into {self.heads} heads")
        self.to_query_key_value = layers.Dense(3 * width, use_bias=False, dtype=self.dtype_policy)
        self.to_out = layers.Dense(width, kernel_initializer="zeros", dtype=self.dtype_policy)
        self.to_query_key_value.build(x_shape)
        self.to_out.build(x_shape)

    def query_key_value(self, x):
        """(B, N, C) -> three of (B, h, N, d), the query divided by sqrt(d)."""
        parts = ops.split(self.to_query_key_value(x), 3, axis=-1)
        query, key, value = (rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in parts)
        return query * query.shape[-1] ** -0.5, key, value

    def attend(self, query, key, value, visible):
        """Queries (B, h, N, d), keys and values (B, h, M, d), visible (N, M) bool -> (B, N, C)."""
        logits = ops.cast(ops.matmul(query, ops.transpose(key, (0, 1, 3, 2))), "float32")  # (B, h, N, M)
        weights = ops.softmax(ops.where(visible, logits, MASKED), axis=-1)
        mixed = ops.matmul(ops.cast(weights, value.dtype), value)
        return self.to_out(rearrange(mixed, "b h n d -> b n (h d)"))

    def call(self, x):
        visible = np.tril(np.ones((x.shape[1], x.shape[1]), bool))
        return self.attend(*self.query_key_value(x), visible)

    def empty_cache(self, rows):
        """Keys and values of no token: two of (rows, h, 0, d). `lengthen` makes room."""
        size = self.to_out.kernel.shape[0] // self.heads
        return (ops.zeros((rows, self.heads, 0, size), self.compute_dtype),) * 2

    def step(self, x, cache, position):
        """One token of each sequence.

        Args:
            x: (B, 1, C).
            cache: keys and values (B, h, M, d), of which those before `position` are known.
            position: of the token, a scalar below M.

        Returns:
            (B, 1, C), and the cache with this token in it.
        """
        query, key, value = self.query_key_value(x)
        key = ops.slice_update(cache[0], (0, 0, position, 0), key)
        value = ops.slice_update(cache[1], (0, 0, position, 0), value)
        visible = ops.arange(key.shape[2])[None] <= position
        return self.attend(query, key, value, visible), (key, value)

    def compute_output_shape(self, x_shape):
        return x_shape


@register
class TransformerBlock(layers.Layer):
    """Causal attention, then a GELU MLP, each on normalised input and residual (pre-norm, arXiv 2002.04745).

    Args:
        heads: number of heads.
        dropout: rate on what attention and MLP add.
        expansion: hidden units of the MLP over C.

    Call arguments: x (B, N, C); uniform as of `dropout`, or None -> (B, N, C). A fresh block is the identity.
    """

    def __init__(self, heads, dropout=0.0, expansion=4, **kwargs):
        super().__init__(**kwargs)
        self.rate, self.expansion = dropout, expansion
        self.norm_attention, self.norm_mlp = layers.LayerNormalization(), layers.LayerNormalization()
        self.attention = CausalAttention(heads)

    def build(self, x_shape, uniform_shape=None):
        width = x_shape[-1]
        self.hidden = layers.Dense(self.expansion * width, activation="gelu", dtype=self.dtype_policy)
        self.out = layers.Dense(width, kernel_initializer="zeros", dtype=self.dtype_policy)
        for layer in (self.norm_attention, self.norm_mlp, self.attention, self.hidden):
            layer.build(x_shape)
        self.out.build((*x_shape[:-1], self.expansion * width))

    def mlp(self, x):
        return self.out(self.hidden(self.norm_mlp(x)))

    def call(self, x, uniform=None):
        x = x + dropout(self.attention(self.norm_attention(x)), self.rate, uniform)
        return x + dropout(self.mlp(x), self.rate, uniform)

    def step(self, x, cache, position):
        """As `CausalAttention.step`."""
        added, cache = self.attention.step(self.norm_attention(x), cache, position)
        x = x + added
        return x + self.mlp(x), cache

    def compute_output_shape(self, x_shape, uniform_shape=None):
        return x_shape


def lengthen(cache, places):
    """Keys and values (B, h, M, d) -> (B, h, M + places, d), the new ones empty."""
    return tuple(ops.pad(part, [(0, 0), (0, 0), (0, places), (0, 0)]) for part in cache)


def dropout(x, rate, uniform):
    """Set a share `rate` of x (B, ...) to zero and scale up the rest (Srivastava et al., JMLR 15, 2014).

    Args:
        uniform: callable (B, ...) -> as many random numbers in [0, 1), new ones at each call; None leaves x as it is.
            The caller draws, so that what is dropped need not depend on how a batch is spread over devices.
    """
    if uniform is None or not rate:
        return x
    return x * ops.cast(uniform(x.shape) >= rate, x.dtype) / (1.0 - rate)


def draw_tokens(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """One token per row, by inverting the cumulative distribution over the tokens from likely to unlikely.

    Args:
        logits: (B, K).
        uniform: (B,) random numbers in [0, 1). A row's token depends on its own logits and number alone; small
            numbers stand for likely tokens.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the fewest likeliest tokens that have this probability together, after `top_k` (nucleus sampling,
            arXiv 1904.09751).

    Returns:
        (B,) int32.

    Raises:
        ValueError: if temperature, top_k or top_p is out of range.
    """
    logits, count = ops.cast(logits, "float32"), logits.shape[-1]
    if temperature < 0:
        raise ValueError(f"temperature must be 0 or more, not {temperature}")
    if not 0 <= top_k <= count:
        raise ValueError(f"top_k must be from 0 (all) to the number of tokens {count}, not {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {top_p}")
    if temperature == 0:
        return ops.cast(ops.argmax(logits, axis=-1), "int32")
    values, tokens = ops.top_k(logits / temperature, top_k or count)  # sorted
    weights = ops.softmax(values, axis=-1)
    if top_p < 1:
        before = ops.cumsum(weights, axis=-1) - weights
        weights = ops.where(before < top_p, weights, 0.0)
    cumulative = ops.cumsum(weights, axis=-1)
    chosen = ops.sum(ops.cast(cumulative <= uniform[:, None] * cumulative[:, -1:], "int32"), axis=-1)
    return ops.cast(ops.take_along_axis(tokens, chosen[:, None], axis=-1)[:, 0], "int32")
