"""The blocks that the networks are built of.

Feature maps are (B, H, W, C). All layers run under `mixed_bfloat16`; what must not be rounded (attention weights,
embeddings of time, and what `normalization` says of its statistics) is computed in float32 and cast back.
"""

import keras
import numpy as np
from einops import rearrange
from keras import layers, ops

from ldm.nets.normalization import group_norm
from ldm.nets.saving import register


def sinusoidal_embedding(position, size, max_period=10_000.0):
    """Sines and cosines of geometrically spaced frequencies (arXiv 1706.03762, section 3.5).

    Args:
        position: (B,), any real number.
        size: number of features, even.
        max_period: longest wavelength, in units of `position` and 2 pi.

    Returns:
        (B, size) float32, in [-1, 1].
    """
    frequencies = np.exp(-np.log(max_period) * np.arange(size // 2) / (size // 2)).astype("float32")
    angle = ops.cast(position, "float32")[:, None] * frequencies[None, :]
    return ops.concatenate([ops.cos(angle), ops.sin(angle)], axis=-1)


@register
class Embedding(layers.Layer):
    """A number -> a token: sinusoidal features, then a two-layer MLP. For times and slice indices alike.

    Being smooth in its input, it lets neighbouring slices share what they learn.

    Args:
        size: width of the token.
        scale: factor on the input, so that its useful steps are about 1 (1000 for t in [0, 1], 1 for a slice index).

    Call arguments: position (B,) -> (B, size).
    """

    def __init__(self, size, scale=1.0, **kwargs):
        super().__init__(**kwargs)
        self.size, self.scale = size, scale
        self.hidden = layers.Dense(size, activation="silu")
        self.out = layers.Dense(size)

    def build(self, input_shape):
        self.hidden.build((None, self.size))
        self.out.build((None, self.size))

    def call(self, position):
        features = sinusoidal_embedding(ops.cast(position, "float32") * self.scale, self.size)
        return self.out(self.hidden(ops.cast(features, self.compute_dtype)))

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.size)


@register
class GroupNorm(layers.Layer):
    """Group normalisation (arXiv 1803.08494) with optional FiLM (arXiv 1709.07871) and SiLU, in few passes over memory.

    Args:
        groups: number of groups; lowered to the largest divisor of the channels when it does not divide them.
        activation: "silu" or None.
        epsilon: added to the variance.

    Call arguments: x (B, H, W, C) or (B, N, C); film (B, 2C) holding scale and shift, or None: then
    y = act((gamma x^ + beta) (1 + scale) + shift), x^ the normalised x.
    """

    def __init__(self, groups=32, activation=None, epsilon=1e-5, **kwargs):
        super().__init__(**kwargs)
        if activation not in (None, "silu"):
            raise ValueError(f"activation must be 'silu' or None, not {activation!r}")
        self.groups, self.activation, self.epsilon = groups, activation, epsilon

    def build(self, x_shape, film_shape=None):
        channels = x_shape[-1]
        self.divisor = max(g for g in range(1, min(self.groups, channels) + 1) if channels % g == 0)
        self.gamma = self.add_weight(shape=(channels,), initializer="ones", name="gamma")
        self.beta = self.add_weight(shape=(channels,), initializer="zeros", name="beta")

    def call(self, x, film=None):
        rows = ops.ones((ops.shape(x)[0], 1))
        gamma, beta = (rows * ops.cast(v, "float32") for v in (self.gamma, self.beta))  # (B, C)
        if film is not None:
            scale, shift = ops.split(ops.cast(film, "float32"), 2, axis=-1)
            gamma, beta = gamma * (1.0 + scale), beta * (1.0 + scale) + shift
        return group_norm(x, gamma, beta, self.divisor, self.epsilon, self.activation == "silu")

    def compute_output_shape(self, x_shape, film_shape=None):
        return x_shape


@register
class ResBlock(layers.Layer):
    """Residual block: norm, SiLU, 3x3 conv, twice; the embedding modulates the second norm (arXiv 2105.05233).

    The last convolution starts at zero, so that a fresh block is the identity.

    Args:
        channels: output channels.
        dropout: rate before the last convolution.
        recompute: keep only the input in training, and compute the rest again on the way back (gradient checkpointing,
            arXiv 1604.06174): less memory, more time. Not with dropout, which would be drawn anew.
        groups: of its normalisations.

    Call arguments: x (B, H, W, C'); embedding (B, E), or None -> (B, H, W, channels).
    """

    def __init__(self, channels, dropout=0.0, recompute=False, groups=32, **kwargs):
        super().__init__(**kwargs)
        if recompute and dropout:
            raise ValueError("recompute would draw another dropout on the way back: choose one of the two")
        self.channels, self.rate, self.recompute, self.groups = channels, dropout, recompute, groups
        self.norm_in = GroupNorm(groups, activation="silu")
        self.conv_in = layers.Conv2D(channels, 3, padding="same")
        self.norm_out = GroupNorm(groups, activation="silu")
        self.conv_out = layers.Conv2D(channels, 3, padding="same", kernel_initializer="zeros")
        self.dropout = layers.Dropout(dropout)
        self.film = self.shortcut = None

    def build(self, x_shape, embedding_shape=None):
        inner = (*x_shape[:-1], self.channels)
        self.norm_in.build(x_shape)
        self.conv_in.build(x_shape)
        self.norm_out.build(inner)
        self.conv_out.build(inner)
        if embedding_shape is not None:
            self.film = layers.Dense(2 * self.channels, dtype=self.dtype_policy)
            self.film.build(embedding_shape)
        if x_shape[-1] != self.channels:
            self.shortcut = layers.Conv2D(self.channels, 1, dtype=self.dtype_policy)
            self.shortcut.build(x_shape)

    def call(self, x, embedding=None, training=None):
        if self.recompute and training:
            return keras.remat(self.transform)(x, embedding)
        return self.transform(x, embedding, training)

    def transform(self, x, embedding, training=False):
        film = None if self.film is None else self.film(ops.silu(embedding))
        h = self.conv_in(self.norm_in(x))
        h = self.conv_out(self.dropout(self.norm_out(h, film), training=training))
        return h + (x if self.shortcut is None else self.shortcut(x))

    def compute_output_shape(self, x_shape, embedding_shape=None):
        return (*x_shape[:-1], self.channels)


@register
class Attention(layers.Layer):
    """Multi-head attention (arXiv 1706.03762) from queries to a context; to itself when no context is given.

    A context of few tokens is first seen through the matrices of queries and of the output: `x (W_q k)` in place of
    `(x W_q) k`, and `weights (v W_o)` in place of `(weights v) W_o`. It is the same function, and each of the N queries
    costs heads x M products per channel and matrix in place of C.

    Args:
        head_size: channels per head; the number of heads is channels // head_size, at least 1.

    Call arguments: x (B, N, C); context (B, M, D) or None -> (B, N, C). The output projection starts at zero.
    """

    def __init__(self, head_size=64, **kwargs):
        super().__init__(**kwargs)
        self.head_size = head_size

    def build(self, x_shape, context_shape=None):
        channels = x_shape[-1]
        if channels % self.head_size and channels > self.head_size:
            raise ValueError(f"{channels} channels cannot be divided into heads of {self.head_size}")
        self.heads = max(1, channels // self.head_size)
        source = context_shape or x_shape
        self.to_query = layers.Dense(channels, use_bias=False, dtype=self.dtype_policy)
        self.to_key_value = layers.Dense(2 * channels, use_bias=False, dtype=self.dtype_policy)
        self.to_out = layers.Dense(channels, kernel_initializer="zeros", dtype=self.dtype_policy)
        self.to_query.build(x_shape)
        self.to_key_value.build(source)
        self.to_out.build(x_shape)

    def call(self, x, context=None):
        key_value = self.to_key_value(x if context is None else context)
        key, value = ops.split(key_value, 2, axis=-1)
        if context is not None and self.heads * context.shape[1] < x.shape[-1]:
            return self.to_few(x, key, value)
        query = rearrange(self.to_query(x), "b n (h d) -> b h n d", h=self.heads)
        key = rearrange(key, "b m (h d) -> b h d m", h=self.heads)
        value = rearrange(value, "b m (h d) -> b h m d", h=self.heads)

        size = query.shape[-1]
        logits = ops.cast(ops.matmul(query * size**-0.5, key), "float32")  # (B, h, N, M)
        weights = ops.cast(ops.softmax(logits, axis=-1), value.dtype)
        return self.to_out(rearrange(ops.matmul(weights, value), "b h n d -> b n (h d)"))

    def to_few(self, x, key, value):
        """As `call`, with the keys and values (B, M, C) of few tokens."""
        dtype, bias = x.dtype, self.to_out.bias
        from_query = rearrange(ops.cast(self.to_query.kernel, dtype), "c (h d) -> c h d", h=self.heads)
        to_out = rearrange(ops.cast(self.to_out.kernel, dtype), "(h d) c -> h d c", h=self.heads)
        key, value = (rearrange(part, "b m (h d) -> b m h d", h=self.heads) for part in (key, value))
        key = ops.einsum("chd,bmhd->bchm", from_query, key * key.shape[-1] ** -0.5)
        value = ops.einsum("bmhd,hdc->bhmc", value, to_out)
        logits = ops.matmul(x, rearrange(key, "b c h m -> b c (h m)"))  # (B, N, h M)
        logits = rearrange(ops.cast(logits, "float32"), "b n (h m) -> b n h m", h=self.heads)
        weights = rearrange(ops.cast(ops.softmax(logits, axis=-1), dtype), "b n h m -> b n (h m)")
        return ops.matmul(weights, rearrange(value, "b h m c -> b (h m) c")) + ops.cast(bias, dtype)

    def compute_output_shape(self, x_shape, context_shape=None):
        return x_shape


@register
class AttentionBlock(layers.Layer):
    """Self-attention over the pixels, then, with tokens, cross-attention to them, each residual.

    The tokens (time, slice index, label) stand where a text-to-image model has its words (arXiv 2112.10752).

    Args:
        head_size: channels per head.
        recompute, groups: as for `ResBlock`.

    Call arguments: x (B, H, W, C); tokens (B, M, D) or None -> (B, H, W, C).
    """

    def __init__(self, head_size=64, recompute=False, groups=32, **kwargs):
        super().__init__(**kwargs)
        self.head_size, self.recompute, self.groups = head_size, recompute, groups
        self.norm_self, self.self_attention = GroupNorm(groups), Attention(head_size)
        self.norm_cross = self.cross_attention = None

    def build(self, x_shape, tokens_shape=None):
        pixels = (x_shape[0], None, x_shape[-1])
        self.norm_self.build(pixels)
        self.self_attention.build(pixels)
        if tokens_shape is not None:
            self.norm_cross = GroupNorm(self.groups, dtype=self.dtype_policy)
            self.cross_attention = Attention(self.head_size, dtype=self.dtype_policy)
            self.norm_cross.build(pixels)
            self.cross_attention.build(pixels, tokens_shape)

    def call(self, x, tokens=None, training=None):
        if self.recompute and training:
            return keras.remat(self.transform)(x, tokens)
        return self.transform(x, tokens)

    def transform(self, x, tokens):
        height = ops.shape(x)[1]
        h = rearrange(x, "b h w c -> b (h w) c")
        h = h + self.self_attention(self.norm_self(h))
        if tokens is not None:
            h = h + self.cross_attention(self.norm_cross(h), tokens)
        return rearrange(h, "b (h w) c -> b h w c", h=height)

    def compute_output_shape(self, x_shape, tokens_shape=None):
        return x_shape


@register
class AttentionGate(layers.Layer):
    """Weighs the pixels of a skip connection by what the way up is looking for (arXiv 1804.03999, equations 1 and 2).

    Here both have the same resolution, so nothing is resampled.

    Args:
        channels: in which the two are compared.

    Call arguments: x (B, H, W, C), skip (B, H, W, C') -> skip times a weight in (0, 1) per pixel.
    """

    def __init__(self, channels, **kwargs):
        super().__init__(**kwargs)
        self.from_x = layers.Conv2D(channels, 1)
        self.from_skip = layers.Conv2D(channels, 1, use_bias=False)
        self.weigh = layers.Conv2D(1, 1, activation="sigmoid")

    def build(self, x_shape, skip_shape):
        self.from_x.build(x_shape)
        self.from_skip.build(skip_shape)
        self.weigh.build((*x_shape[:-1], self.from_x.filters))

    def call(self, x, skip):
        return skip * self.weigh(ops.relu(self.from_x(x) + self.from_skip(skip)))

    def compute_output_shape(self, x_shape, skip_shape):
        return skip_shape


@register
class NullableEmbedding(layers.Layer):
    """A condition's token, or, where it is dropped, one learned null token: the unconditional case.

    Classifier-free guidance (arXiv 2207.12598) trains on both and compares them when sampling.

    Call arguments: token (B, D); keep (B,) of 1 (keep) and 0 (drop) -> (B, D).
    """

    def build(self, token_shape, keep_shape=None):
        self.null = self.add_weight(shape=(token_shape[-1],), initializer="zeros", name="null")

    def call(self, token, keep):
        keep = ops.cast(keep, token.dtype)[:, None]
        return token * keep + ops.cast(self.null, token.dtype) * (1.0 - keep)

    def compute_output_shape(self, token_shape, keep_shape=None):
        return token_shape


@register
class Covariate(layers.Layer):
    """Something known of a person -> a token; the unknown, NaN, has a learned token of its own.

    Args:
        size: width of the token.
        values: how many values a category has; 0 for a number, in standard deviations.

    Call arguments: covariate (B,) -> (B, size).
    """

    def __init__(self, size, values=0, **kwargs):
        super().__init__(**{"autocast": False, **kwargs})  # bfloat16 would round it
        self.size, self.values = size, values
        if values:
            self.embedding = layers.Embedding(values + 1, size)
        else:
            self.embedding, self.known = Embedding(size, scale=10.0, autocast=False), NullableEmbedding()

    def build(self, fact_shape):
        self.embedding.build(fact_shape)
        if not self.values:
            self.known.build((None, self.size))

    def call(self, covariate):
        known = ops.logical_not(ops.isnan(covariate))
        covariate = ops.where(known, covariate, 0.0)
        if self.values:
            return self.embedding(ops.cast(ops.where(known, covariate + 1.0, 0.0), "int32"))
        return self.known(self.embedding(covariate), known)

    def compute_output_shape(self, fact_shape):
        return (fact_shape[0], self.size)


@register
class Tokens(layers.Layer):
    """Line up vectors as the tokens of one sequence. Call arguments: list of M tensors (B, D) -> (B, M, D)."""

    def call(self, vectors):
        return ops.stack(vectors, axis=1)


@register
class Agreement(layers.Layer):
    """Inner product of each pixel with a vector: how well the two go together (arXiv 1802.05637, eq. 3).

    Call arguments: x (B, H, W, C); direction (B, C) -> (B, H, W, 1), divided by sqrt(C).
    """

    def call(self, x, direction):
        product = ops.einsum("bhwc,bc->bhw", x, direction)
        return product[..., None] / x.shape[-1] ** 0.5

    def compute_output_shape(self, x_shape, direction_shape=None):
        return (*x_shape[:-1], 1)


@register
class SpaceToDepth(layers.Layer):
    """Trade resolution for channels: each `size` x `size` patch of pixels becomes one pixel. Loses nothing.

    Call arguments: x (B, H, W, C) -> (B, H / size, W / size, size^2 C).
    """

    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.size = size

    def call(self, x):
        return rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=self.size, q=self.size)

    def compute_output_shape(self, shape):
        return (shape[0], shape[1] // self.size, shape[2] // self.size, shape[3] * self.size**2)


@register
class DepthToSpace(SpaceToDepth):
    """The inverse of `SpaceToDepth`.

    Call arguments: x (B, H, W, size^2 C) -> (B, H size, W size, C).
    """

    def call(self, x):
        return rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=self.size, q=self.size)

    def compute_output_shape(self, shape):
        return (shape[0], shape[1] * self.size, shape[2] * self.size, shape[3] // self.size**2)


def downsample(channels, name=None):
    """Half the resolution, by a strided 3x3 convolution."""
    return layers.Conv2D(channels, 3, strides=2, padding="same", name=name)


def upsample(x, channels):
    """Twice the resolution: repeat each pixel, then a 3x3 convolution (no checkerboard)."""
    x = layers.UpSampling2D(2, interpolation="nearest")(x)
    return layers.Conv2D(channels, 3, padding="same")(x)
