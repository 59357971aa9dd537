"""What stands between the encoder and the decoder of a first stage, with the state and the metrics that it needs.

    Gaussian    a posterior of the latents, tied to N(0, I): the KL-VAE's
    Codebook    K learned vectors, which follow moving averages of the latents: the VQ-VAE's
    Grid        a fixed grid instead, finite scalar quantisation: nothing to learn, nothing that can die

    ActiveUnits, CodebookUsage    metrics: which latents, and which codes, say something

Raw latents are what the encoder's output becomes before any quantisation, (B, h, w, C) float32. A model normalises
them afterwards.
"""

import keras
import numpy as np
from einops import rearrange
from keras import layers, ops

from ldm.nets.saving import register


class Bottleneck(layers.Layer):
    """The interface that all bottlenecks share. Everything in here is float32: distances must not be rounded.

    Args:
        latent_shape: (h, w, C) of one slice's latents.

    Call arguments: encoded (B, h, w, outputs C), the encoder's output; normal, a callable (shape) -> standard normal
    noise, or None for no noise -> (latents for the decoder (B, h, w, C), {name: loss, a scalar}, state). The state is
    {name: tensor (B, ...)}, for `update` and `watch`.
    """

    outputs = 1  # channels that the encoder must give for each channel of the latents
    num_codes = 0  # K; 0 where latents are not named by codes
    loss_names = ()

    def __init__(self, latent_shape, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.latent_shape = tuple(latent_shape)

    def latents(self, encoded):
        """Encoder output -> raw latents, without sampling and before quantisation."""
        raise NotImplementedError

    def quantized(self, latents):
        """Raw latents -> latents as the decoder was trained on; here, themselves."""
        return latents

    def update(self, state, total, pick):
        """What a training step changes besides the weights that have gradients; here, nothing.

        Args:
            state: of the call.
            total: callable that adds up a nest of tensors over all replicas.
            pick: callable (rows (N, D), K) -> (K, D), so many rows drawn at random from those of all replicas; the same
                ones everywhere.
        """

    def watch(self, state, images):
        """Feed the metrics.

        Args:
            state: of the call.
            images: (B, H, W, 1) in [-1, 1], what the encoder has seen.
        """


# ---- a Gaussian posterior --------------------------------------------------------------------------------------------


@register
class Gaussian(Bottleneck):
    """A diagonal Gaussian per latent, of which training draws one sample (arXiv 1312.6114, section 2.4).

    Its loss is the KL divergence to N(0, I) in nats per slice (appendix B there).
    """

    outputs = 2  # mean and log variance
    loss_names = ("kl",)

    def __init__(self, latent_shape, **kwargs):
        super().__init__(latent_shape, **kwargs)
        self.active_units = ActiveUnits(self.latent_shape, name="active_units")
        self.built = True

    def latents(self, encoded):
        return encoded[..., : self.latent_shape[-1]]

    def call(self, encoded, normal=None):
        mean, log_variance = ops.split(encoded, 2, axis=-1)
        log_variance = ops.clip(log_variance, -30.0, 20.0)
        divergence = 0.5 * (ops.square(mean) + ops.exp(log_variance) - 1.0 - log_variance)
        kl = ops.mean(ops.sum(divergence, axis=(1, 2, 3)))
        sample = mean if normal is None else mean + ops.exp(0.5 * log_variance) * normal(ops.shape(mean))
        return sample, {"kl": kl}, {"latents": ops.stop_gradient(mean)}

    def watch(self, state, images):
        self.active_units.update_state(state["latents"])


# ---- codes -----------------------------------------------------------------------------------------------------------


class Codes(Bottleneck):
    """What codebook and grid share: latents named by integers, and how many of these are in use.

    A latent is cut into `codes_per_latent` parts, and each part has a code of its own, all out of one codebook (product
    quantisation, Jegou et al., doi:10.1109/TPAMI.2010.57). The parts of a latent lie side by side, as more columns.
    Gradients pass the quantisation straight through (arXiv 1711.00937, section 3.2).

    A subclass says what a part is before it is quantised (`bound`), and which code (`encode`) and vector (`decode`) are
    its own.
    """

    def __init__(self, latent_shape, num_codes, codes_per_latent, **kwargs):
        super().__init__(latent_shape, **kwargs)
        height, width, channels = self.latent_shape
        if channels % codes_per_latent:
            raise ValueError(f"{channels} latent channels cannot be cut into {codes_per_latent} codes")
        self.num_codes, self.codes_per_latent = num_codes, codes_per_latent
        self.code_shape = (height, width * codes_per_latent)
        statistics = {"usage": "usage", "usage_foreground": "usage", "usage_background": "usage"}
        statistics["perplexity"] = "perplexity"
        self.usage = {name: CodebookUsage(num_codes, statistic, name) for name, statistic in statistics.items()}

    def bound(self, parts):
        """Parts of the encoder's output (B, h, w n, D) -> what is compared with the codes."""
        raise NotImplementedError

    def encode(self, parts):
        """Bounded parts (B, h, w n, D) -> codes (B, h, w n) int32."""
        raise NotImplementedError

    def decode(self, codes):
        """Codes (B, h, w n) int32 -> their vectors (B, h, w n, D)."""
        raise NotImplementedError

    def losses_of(self, parts, vectors):
        """{name: loss} of bounded parts and the vectors that they became."""
        return {}

    def split_codes(self, latents):
        """(B, h, w, C) -> (B, h, w n, D): one vector for each code."""
        return rearrange(latents, "b h w (n d) -> b h (w n) d", n=self.codes_per_latent)

    def merge_codes(self, parts):
        """The inverse of `split_codes`."""
        return rearrange(parts, "b h (w n) d -> b h w (n d)", n=self.codes_per_latent)

    def latents(self, encoded):
        return self.merge_codes(self.bound(self.split_codes(encoded)))

    def codes(self, latents):
        """Raw latents (B, h, w, C) -> codes (B, *code_shape) int32."""
        return self.encode(self.split_codes(latents))

    def latents_of(self, codes):
        """Codes (B, *code_shape) int32 -> the raw latents that they stand for (B, h, w, C)."""
        return self.merge_codes(self.decode(codes))

    def quantized(self, latents):
        return self.latents_of(self.codes(latents))

    def call(self, encoded, normal=None):
        parts = self.bound(self.split_codes(encoded))
        codes = self.encode(parts)
        vectors = self.decode(codes)
        straight_through = parts + ops.stop_gradient(vectors - parts)
        state = {"latents": ops.stop_gradient(parts), "codes": codes}
        return self.merge_codes(straight_through), self.losses_of(parts, ops.stop_gradient(vectors)), state

    def watch(self, state, images):
        counts = count(state["codes"], self.num_codes)
        in_brain = count(state["codes"], self.num_codes, self.shows_brain(images))
        for name, used in {"usage_foreground": in_brain, "usage_background": counts - in_brain}.items():
            self.usage[name].update_state(used)
        for name in ("usage", "perplexity"):
            self.usage[name].update_state(counts)

    def shows_brain(self, images):
        """(B, H, W, 1) in [-1, 1] -> (B, *code_shape): 1.0 for codes whose patch is not all black, else 0.0.

        Black is what is no brighter than 0.05 of the range.
        """
        height, width, _ = self.latent_shape
        patches = rearrange(images, "b (h p) (w q) c -> b h w (p q c)", h=height, w=width)
        return ops.repeat(ops.cast(ops.any(patches > -0.9, axis=-1), "float32"), self.codes_per_latent, axis=2)


@register
class Codebook(Codes):
    """Vector quantisation with a codebook that follows moving averages (arXiv 1711.00937, appendix A.1).

    No gradient reaches the codebook; each training step, `update` moves it. All replicas add up what they have counted
    first, so that the codebook is the same everywhere, and the same as on one device.
    A code that is used less than `revival` times the even share is dead, and is moved onto a latent of the batch. The
    averages start at zero, so after the first batch all codes but the few that were used much are dead: the codebook
    is initialised with data.

    Its loss, "commitment", keeps the encoder near its codes (eq. 3 there, third term, without its weight).

    Args:
        latent_shape: (h, w, C).
        num_codes: K.
        codes_per_latent: n; a code's vector has D = C / n channels.
        decay: of the moving averages.
        revival: share of the even usage below which a code is dead.
        cosine: latents and codes are unit vectors, only directions are compared (arXiv 2110.04627, section 3.2).
    """

    loss_names = ("commitment",)

    def __init__(self, latent_shape, num_codes, codes_per_latent=1, decay=0.97, revival=0.03, cosine=False, **kwargs):
        super().__init__(latent_shape, num_codes, codes_per_latent, **kwargs)
        self.decay, self.revival, self.cosine = decay, revival, cosine
        self.revived = keras.metrics.Sum(name="revived")
        shape = (num_codes, self.latent_shape[-1] // codes_per_latent)
        # After the sum over replicas every replica assigns the same value: keeping the first one's copy is exact.
        options = {"trainable": False, "aggregation": "only_first_replica"}
        self.codebook = self.add_weight(shape=shape, initializer="random_normal", name="codebook", **options)
        self.average_sum = self.add_weight(shape=shape, initializer="zeros", name="average_sum", **options)
        self.average_count = self.add_weight(shape=shape[:1], initializer="zeros", name="average_count", **options)
        self.built = True

    def bound(self, parts):
        """Themselves, or their directions."""
        return ops.normalize(parts, axis=-1) if self.cosine else parts

    def encode(self, parts):
        """The nearest code: |z - e|^2 = |z|^2 - 2 z.e + |e|^2, whose first term does not matter."""
        codebook = ops.convert_to_tensor(self.codebook)
        # As rows: (B, 1, w, D) times a matrix reads and writes beyond its arrays on CPUs (TensorFlow's issue 117700).
        rows = rearrange(parts, "b h w d -> (b h w) d")
        distance = ops.sum(ops.square(codebook), -1) - 2.0 * ops.matmul(rows, ops.transpose(codebook))
        return ops.reshape(ops.argmin(distance, axis=-1), ops.shape(parts)[:-1])

    def decode(self, codes):
        return ops.take(self.codebook, codes, axis=0)

    def losses_of(self, parts, vectors):
        return {"commitment": ops.mean(ops.square(parts - vectors))}

    def update(self, state, total, pick):
        rows = rearrange(state["latents"], "b h w d -> (b h w) d")
        sums = ops.segment_sum(rows, ops.reshape(state["codes"], (-1,)), self.num_codes)
        counts, sums, replicas = total((count(state["codes"], self.num_codes), sums, ops.ones(())))
        revived = self.follow(counts, sums, pick(rows, self.num_codes))
        self.revived.update_state(revived / replicas)  # which the metric adds up over replicas again

    def follow(self, counts, sums, candidates):
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


@register
class Grid(Codes):
    """Finite scalar quantisation (arXiv 2309.15505): each channel is rounded to one of a few levels.

    The codes number all combinations of levels. The encoder's output goes through tanh, so that it can reach every
    level and nothing else.

    Args:
        latent_shape: (h, w, C).
        levels: number of levels per channel of a code, 3 to 256 each; their product, the number of codes, is at most
            2^20.
        codes_per_latent: n, with C = n len(levels).

    Raises:
        ValueError: for levels that are out of range, or do not make C channels.
    """

    def __init__(self, latent_shape, levels, codes_per_latent=1, **kwargs):
        if min(levels) < 3 or max(levels) > 256 or np.prod(levels, dtype=float) > 2**20:
            raise ValueError(f"levels must be 3 to 256 each, with a product of at most 2^20, not {list(levels)}")
        super().__init__(latent_shape, int(np.prod(levels)), codes_per_latent, **kwargs)
        if latent_shape[-1] != codes_per_latent * len(levels):
            raise ValueError(
                f"{codes_per_latent} codes of {len(levels)} levels do not make {latent_shape[-1]} channels"
            )
        self.levels = list(levels)
        self.half = np.array([level // 2 for level in levels], "float32")  # level 0 of a channel lies at -1
        self.basis = np.cumprod([1, *levels[:-1]]).astype("int32")
        self.built = True

    def bound(self, parts):
        """Within half a level of the grid's ends, 0 -> 0.

        The shift by half a level for even numbers of levels is the paper's (its listing in the appendix), but exact:
        arctanh where the listing has tan.
        """
        width = (np.array(self.levels, "float32") - 1.0) * (1.0 + 1e-3) / 2.0
        offset = np.where(np.array(self.levels) % 2 == 0, 0.5, 0.0).astype("float32")
        return (ops.tanh(parts + np.arctanh(offset / width)) * width - offset) / self.half

    def encode(self, parts):
        """The number whose digits are the levels."""
        top = np.array(self.levels, "float32") - 1.0
        digits = ops.clip(ops.round(parts * self.half) + self.half, 0.0, top)
        return ops.sum(ops.cast(digits, "int32") * self.basis, axis=-1)

    def decode(self, codes):
        digits = (codes[..., None] // self.basis) % np.array(self.levels, "int32")
        return (ops.cast(digits, "float32") - self.half) / self.half


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


# ---- metrics ---------------------------------------------------------------------------------------------------------


@register
class ActiveUnits(keras.metrics.Metric):
    """Share of latents whose posterior mean varies from slice to slice (arXiv 1509.00519, section 5.2).

    A unit is active if the variance of its mean over the dataset is above 0.01; the others have collapsed onto the
    prior, or, as at the rim of the background, have nothing to say.

    Args:
        shape: (h, w, C) of the latents.
    """

    def __init__(self, shape, name=None, **kwargs):
        super().__init__(name=name, **kwargs)
        self.total = self.add_variable(shape=shape, initializer="zeros", name="total")
        self.squares = self.add_variable(shape=shape, initializer="zeros", name="squares")
        self.rows = self.add_variable(shape=(), initializer="zeros", name="rows")

    def update_state(self, mean):
        mean = ops.cast(mean, "float32")
        self.total.assign_add(ops.sum(mean, axis=0))
        self.squares.assign_add(ops.sum(ops.square(mean), axis=0))
        self.rows.assign_add(ops.cast(ops.shape(mean)[0], "float32"))

    def result(self):
        rows = ops.maximum(self.rows, 1.0)
        variance = self.squares / rows - ops.square(self.total / rows)
        return ops.mean(ops.cast(variance > 0.01, "float32"))


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
