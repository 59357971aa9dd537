"""Codebooks: continuous latents -> the nearest of K vectors.

A quantizer is called with the encoder's output and answers with vectors and codes; `bound` is what it does to that
output first, and `encode`, `decode` turn bounded latents into codes and codes into vectors.

    VectorQuantizer           K learned vectors, which follow moving averages of the latents
    FiniteScalarQuantizer     a fixed grid: nothing to learn, nothing that can die
    CodebookUsage             a metric: which codes an epoch has used
"""

import keras
import numpy as np
from einops import rearrange
from keras import layers, ops

register = keras.saving.register_keras_serializable("ldm")


def count(codes, num_codes, where=None):
    """How often each code was used.

    Args:
        codes: (B, H, W) int32.
        num_codes: K.
        where: (B, H, W) float32, what each use counts; 1 if left out.

    Returns:
        (K,) float32.
    """
    flat = ops.reshape(codes, (-1,))
    weights = ops.ones_like(flat, dtype="float32") if where is None else ops.reshape(where, (-1,))
    return ops.segment_sum(weights, flat, num_codes)


@register
class VectorQuantizer(layers.Layer):
    """Vector quantisation with a codebook that follows moving averages (arXiv 1711.00937, appendix A.1).

    No gradient reaches the codebook. Each training step takes `count` and `sum`; the caller adds them up over all
    replicas and hands them to `update`, so that the codebook is the same everywhere and the same as on one device.
    A code that is used less than `revival` times the even share is dead, and is moved onto a latent of the batch. The
    averages start at zero, so after the first batch all codes but the few that were used much are dead: the codebook
    is initialised with data.

    Args:
        num_codes: K.
        size: length D of a code.
        decay: of the moving averages.
        revival: share of the even usage below which a code is dead.
        cosine: latents and codes are unit vectors, only directions are compared (arXiv 2110.04627, section 3.2).

    Call arguments: latents (B, H, W, D) float32 -> (codes' vectors (B, H, W, D) with the straight-through gradient,
    codes (B, H, W) int32).
    """

    def __init__(self, num_codes, size, decay=0.97, revival=0.03, cosine=False, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})  # distances and averages must not be rounded
        self.num_codes, self.size, self.decay, self.revival = num_codes, size, decay, revival
        self.cosine = cosine

    def build(self, input_shape):
        # After the sum over replicas every replica assigns the same value: keeping the first one's copy is exact.
        options = {"trainable": False, "aggregation": "only_first_replica"}
        shape = (self.num_codes, self.size)
        self.codebook = self.add_weight(shape=shape, initializer="random_normal", name="codebook", **options)
        self.average_sum = self.add_weight(shape=shape, initializer="zeros", name="average_sum", **options)
        self.average_count = self.add_weight(shape=shape[:1], initializer="zeros", name="average_count", **options)

    def call(self, latents):
        codes = self.encode(latents)
        vectors = self.decode(codes)
        return latents + ops.stop_gradient(vectors - latents), codes

    def bound(self, encoded):
        """Encoder output -> latents: themselves, or their directions."""
        return ops.normalize(encoded, axis=-1) if self.cosine else encoded

    def encode(self, latents):
        """(B, H, W, D) -> (B, H, W) int32: |z - e|^2 = |z|^2 - 2 z.e + |e|^2, whose first term does not matter."""
        codebook = ops.convert_to_tensor(self.codebook)
        distance = ops.sum(ops.square(codebook), -1) - 2.0 * ops.matmul(latents, ops.transpose(codebook))
        return ops.argmin(distance, axis=-1)

    def decode(self, codes):
        """(B, H, W) int32 -> (B, H, W, D)."""
        return ops.take(self.codebook, codes, axis=0)

    def sum(self, latents, codes):
        """(B, H, W, D), (B, H, W) -> sum of the latents that chose each code (K, D)."""
        return ops.segment_sum(rearrange(latents, "b h w d -> (b h w) d"), ops.reshape(codes, (-1,)), self.num_codes)

    def update(self, counts, sums, candidates):
        """Move the averages, and revive dead codes.

        Args:
            counts: (K,) how often each code was used, over all replicas.
            sums: (K, D) sum of the latents that chose each code, over all replicas.
            candidates: (K, D) latents drawn from the batch, where dead codes go; the same on all replicas.

        Returns:
            The number of revived codes, a scalar.
        """
        count = self.decay * self.average_count + (1.0 - self.decay) * counts
        total = self.decay * self.average_sum + (1.0 - self.decay) * sums
        even = ops.sum(counts) / self.num_codes
        dead = count < self.revival * even
        count = ops.where(dead, even, count)
        total = ops.where(dead[:, None], candidates * even, total)
        self.average_count.assign(count)
        self.average_sum.assign(total)
        self.codebook.assign(self.bound(total / count[:, None]))
        return ops.sum(ops.cast(dead, "float32"))

    def compute_output_shape(self, input_shape):
        return input_shape, input_shape[:-1]


@register
class FiniteScalarQuantizer(layers.Layer):
    """Finite scalar quantisation (arXiv 2309.15505): each channel is rounded to one of a few levels.

    The codebook is the grid of all combinations of levels. The encoder's output goes through tanh, so that it can
    reach every level and nothing else; rounding passes the gradient straight through.

    Args:
        levels: number of levels per channel, 3 to 256 each; their product, the number of codes, is at most 2^20.

    Call arguments: latents (B, H, W, D) float32 out of `bound` -> (rounded latents (B, H, W, D) with the
    straight-through gradient, codes (B, H, W) int32).
    """

    def __init__(self, levels, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        if min(levels) < 3 or max(levels) > 256 or np.prod(levels, dtype=float) > 2**20:
            raise ValueError(f"levels must be 3 to 256 each, with a product of at most 2^20, not {list(levels)}")
        self.levels, self.num_codes = list(levels), int(np.prod(levels))
        self.half = np.array([level // 2 for level in levels], "float32")  # level 0 of a channel lies at -1
        self.basis = np.cumprod([1, *levels[:-1]]).astype("int32")

    def build(self, input_shape):
        pass

    def bound(self, encoded):
        """Encoder output -> latents within half a level of the grid's ends, 0 -> 0.

        The shift by half a level for even numbers of levels is the paper's (its listing in the appendix), but exact:
        arctanh where the listing has tan.
        """
        width = (np.array(self.levels, "float32") - 1.0) * (1.0 + 1e-3) / 2.0
        offset = np.where(np.array(self.levels) % 2 == 0, 0.5, 0.0).astype("float32")
        return (ops.tanh(encoded + np.arctanh(offset / width)) * width - offset) / self.half

    def call(self, latents):
        rounded = ops.round(latents * self.half) / self.half
        return latents + ops.stop_gradient(rounded - latents), self.encode(latents)

    def encode(self, latents):
        """(B, H, W, D) -> (B, H, W) int32, the number whose digits are the levels."""
        top = np.array(self.levels, "float32") - 1.0
        digits = ops.clip(ops.round(latents * self.half) + self.half, 0.0, top)
        return ops.sum(ops.cast(digits, "int32") * self.basis, axis=-1)

    def decode(self, codes):
        """(B, H, W) int32 -> (B, H, W, D)."""
        digits = (codes[..., None] // self.basis) % np.array(self.levels, "int32")
        return (ops.cast(digits, "float32") - self.half) / self.half

    def compute_output_shape(self, input_shape):
        return input_shape, input_shape[:-1]


@register
class CodebookUsage(keras.metrics.Metric):
    """How the codebook is used over an epoch: the share of codes seen, or the perplexity of their distribution.

    Args:
        num_codes: K.
        statistic: "usage" (in [0, 1]) or "perplexity" (exp of the entropy in nats, from 1 to K).
    """

    def __init__(self, num_codes, statistic="usage", name=None, **kwargs):
        super().__init__(name=name or statistic, **kwargs)
        self.num_codes, self.statistic = num_codes, statistic
        self.counts = self.add_variable(shape=(num_codes,), initializer="zeros", name="counts")

    def update_state(self, counts):
        self.counts.assign_add(counts)

    def result(self):
        if self.statistic == "usage":
            return ops.mean(ops.cast(self.counts > 0, "float32"))
        share = self.counts / ops.maximum(ops.sum(self.counts), 1.0)
        return ops.exp(-ops.sum(share * ops.log(ops.maximum(share, 1e-12))))
