"""A prior over the codes of a VQ-VAE: a transformer that is trained on the code maps of slices, and draws new ones."""

import itertools
import math

import keras
import numpy as np
import tensorflow as tf
from einops import rearrange
from keras import layers, ops

from ldm.nets.layers import Embedding
from ldm.nets.networks import conditions_of
from ldm.nets.saving import Recorded, register
from ldm.nets.transformer import TransformerBlock, draw_tokens, dropout, lengthen
from ldm.training import distribution
from ldm.training.reports import Reports, leaves_no_trace


@register
class CodePrior(Recorded, Reports, keras.Model):
    """A causal transformer over the codes of a slice, in raster order: p(codes | z, label), code by code.

    The prior of a VQ-VAE (arXiv 1711.00937, section 3.3) as a transformer (arXiv 2012.09841, section 3.2). To predict
    a code, the network takes the code before it (a start token for the first), the row and the column where the new
    code is to stand, the slice index and the label; earlier codes it finds by attention. Its output is added to the log
    frequencies of the codes at that place, where `start_from` has counted them.

    A batch is {"codes" (B, h, w) int32, "z" (B,), "label" (B,)}; the loss is in nats per code.

    Args:
        num_codes: K.
        code_shape: (h, w), as `VQVAE.code_shape`.
        width: features per token.
        depth: number of blocks.
        heads: of attention; divides `width`.
        num_labels: number of labels; 0 where the label is no condition.
        dropout: rate on the first features and in the blocks.
        clip_norm: global norm to which gradients are clipped.
        seed: of the dropout.
    """

    segments = 4  # of the loop over the places: attention reads a whole cache, filled or not, so it grows by quarters

    def __init__(
        self,
        num_codes,
        code_shape,
        width=256,
        depth=6,
        heads=4,
        num_labels=0,
        dropout=0.1,
        clip_norm=1.0,
        seed=0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.remember(locals())
        height, columns = self.code_shape
        small = keras.initializers.RandomNormal(0.02)
        self.code = layers.Embedding(num_codes + 1, width, small)  # the last is the start token
        self.row = self.add_weight(shape=(height, 1, width), initializer=small, name="row")
        self.column = self.add_weight(shape=(1, columns, width), initializer=small, name="column")
        self.slice = Embedding(width)
        self.label = layers.Embedding(num_labels + 1, width, small) if num_labels else None  # the first is unknown
        self.blocks = [TransformerBlock(heads, dropout) for _ in range(depth)]
        self.norm = layers.LayerNormalization()
        self.head = layers.Dense(num_codes, kernel_initializer="zeros", dtype="float32")
        options = {"trainable": False, "aggregation": "only_first_replica", "initializer": "zeros", "autocast": False}
        self.log_frequency = self.add_weight(shape=(height * columns, num_codes), name="log_frequency", **options)
        for layer in (self.code, self.slice, *([self.label] if num_labels else [])):
            layer.build((None,))
        for layer in (*self.blocks, self.norm, self.head):
            layer.build((None, height * columns, width))
        self.trackers = {name: keras.metrics.Mean(name=name) for name in ("loss", "bits", "gradient_norm")}
        self._compiled_sample = tf.function(
            self._sample, jit_compile=True
        )  # caches then grow in place: half the time on a CPU
        self.built = True

    def features(self, previous, condition, places=slice(None)):
        """Codes before those that are asked for, (B, N), at these places of the raster -> (B, N, width)."""
        positions = rearrange(self.row + self.column, "h w c -> (h w) c")[places]
        return self.code(previous) + ops.cast(positions, self.compute_dtype) + condition[:, None]

    def scores(self, x, places=slice(None)):
        """The blocks' output at these places, (B, N, width) -> logits (B, N, K) float32."""
        return self.head(self.norm(x)) + self.log_frequency[places]

    def condition(self, conditions):
        """Conditions, as `conditions_of` gives them -> one vector for each slice (B, width)."""
        vector = self.slice(conditions["z"])
        return vector if self.label is None else vector + self.label(conditions["label"] + 1)

    def call(self, inputs, training=False, uniform=None):
        """{"codes" (B, h, w) int32, "z" (B,), "label" (B,)} -> logits (B, h, w, K) float32, each for its own place.

        `uniform` draws the random numbers of `ldm.nets.transformer.dropout`; None drops nothing.
        """
        height, _ = self.code_shape
        codes = rearrange(ops.cast(inputs["codes"], "int32"), "b h w -> b (h w)")
        start = ops.full_like(codes[:, :1], self.num_codes)
        x = self.features(ops.concatenate([start, codes[:, :-1]], axis=1), self.condition(inputs))
        x = dropout(x, self.dropout, uniform)
        for block in self.blocks:
            x = block(x, uniform=uniform)
        return rearrange(self.scores(x), "b (h w) k -> b h w k", h=height)

    def logits(self, codes, z, label=None):
        """Codes (B, h, w) int32 and the arguments of `conditions_of` -> logits (B, h, w, K) float32.

        At each place they are log p(code | the codes before it) plus a number that is the same for all codes.
        """
        return self({"codes": ops.convert_to_tensor(codes), **conditions_of(z, label)})

    def sample(self, z, label=None, seed=0, temperature=1.0, top_k=0, top_p=1.0):
        """Draw codes, in one compiled graph that loops over the places and keeps keys and values of those before.

        Args:
            z: (B,) slice indices.
            label: (B,) int32; None or -1 is unknown.
            seed: an integer. The same seed gives the same codes, to each row whatever the others are.
            temperature, top_k, top_p: as `ldm.nets.transformer.draw_tokens`.

        Returns:
            (B, h, w) int32.

        Raises:
            ValueError: if temperature, top_k or top_p is out of range.
        """
        conditions = {name: ops.cast(value, "int32") for name, value in conditions_of(z, label).items()}
        uniform = tf.random.stateless_uniform((conditions["z"].shape[0], math.prod(self.code_shape)), (seed, 0))
        return self._compiled_sample(conditions, uniform, temperature, top_k, top_p)

    def _sample(self, conditions, uniform, temperature, top_k, top_p):
        """`sample` as one graph: uniform (B, h w) are the random numbers, one for each code."""
        rows, length = uniform.shape
        condition = self.condition(conditions)

        def next_code(i, state):
            codes, previous, caches = state
            x, grown = self.features(previous, condition, i), []
            for block, cache in zip(self.blocks, caches, strict=True):
                x, cache = block.step(x, cache, i)
                grown.append(cache)
            code = draw_tokens(self.scores(x, i)[:, 0], uniform[:, i], temperature, top_k, top_p)[:, None]
            return ops.slice_update(codes, (0, i), code), code, grown

        codes, previous = ops.zeros((rows, length), "int32"), ops.full((rows, 1), self.num_codes, "int32")
        caches = [block.attention.empty_cache(rows) for block in self.blocks]
        ends = sorted({length * part // self.segments for part in range(self.segments + 1)})
        for begin, end in itertools.pairwise(ends):
            caches = [lengthen(cache, end - begin) for cache in caches]
            codes, previous, caches = ops.fori_loop(begin, end, next_code, (codes, previous, caches))
        return rearrange(codes, "b (h w) -> b h w", h=self.code_shape[0])

    # -- training

    def start_from(self, codes, weight=100.0):
        """Let the logits start at the log frequencies of the training codes, place by place.

        A network of this kind would take many passes over the data to find these h w K numbers. So they are counted
        here and stay fixed, and the network only has to learn what they leave open: how a code depends on the slice
        index, on the label and on the codes before it. Frequencies of a place are counted together with `weight` more
        codes that are distributed as over all places, and each code is counted once more than it was seen, so that
        none is impossible.

        Args:
            codes: the training split's, (M, h, w) integers.
            weight: how many slices the frequencies over all places count as.
        """
        codes = rearrange(np.asarray(codes), "m h w -> m (h w)")
        everywhere = np.bincount(codes.ravel(), minlength=self.num_codes) + 1.0
        counts = np.stack([np.bincount(column, minlength=self.num_codes) for column in codes.T])
        frequency = (counts + weight * everywhere / everywhere.sum()) / (len(codes) + weight)
        self.log_frequency.assign(np.log(frequency))

    def cross_entropy(self, batch, training=False, uniform=None):
        """Mean over a batch's codes, in nats."""
        logits = self(batch, training=training, uniform=uniform)
        return ops.mean(keras.losses.sparse_categorical_crossentropy(batch["codes"], logits, from_logits=True))

    def numbers(self, rows, seed):
        """Random numbers for the dropout of this replica's rows, the same however many replicas there are."""
        draws = itertools.count()

        def uniform(shape):
            here = tf.random.experimental.stateless_fold_in(seed, next(draws))
            return distribution.global_rows(lambda n: tf.random.stateless_uniform((n, *shape[1:]), here), rows)

        return uniform

    @leaves_no_trace
    def train_step(self, batch):
        seed = tf.stack([self.seed, tf.cast(self.optimizer.iterations, tf.int32)])
        uniform = self.numbers(tf.shape(batch["codes"])[0], seed)
        with tf.GradientTape() as tape:
            loss = self.cross_entropy(batch, True, uniform)
            part = distribution.replica_loss(loss, self.optimizer)
        variables = self.trainable_variables
        norm = distribution.apply_gradients(self.optimizer, tape.gradient(part, variables), variables, self.clip_norm)
        self.record({"loss": loss, "bits": loss / math.log(2), "gradient_norm": norm})
        return distribution.for_logs(self.report(training=True))

    def test_step(self, batch):
        rows, batch = distribution.at_least_one_row(batch)
        loss = self.cross_entropy(batch)
        self.record({"loss": loss, "bits": loss / math.log(2)}, rows)
        return distribution.for_logs(self.report(training=False))
