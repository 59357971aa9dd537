"""Every `keras.Model` of the project, with its losses and its `train_step`.

    VQVAE, VAE       first stage: images <-> latents
    UNet             attention U-Net with time embedding, the denoising network
    DiffusionModel   the U-Net with its schedule and prediction: training, and denoise(x_t, t) -> x_0

Networks are built of `keras.ops` and run on every Keras backend; `train_step` and `test_step` are TensorFlow's.
A batch is {"image" (B, H, W, C), "z" (B,), "label" (B,), "case" (B,)}; its "image" may be latents.
"""

import keras
import tensorflow as tf
from einops import rearrange
from keras import layers, ops

from ldm import distribution, losses, schedules
from ldm.layers import (
    AttentionBlock,
    DepthToSpace,
    Embedding,
    GroupNorm,
    NullableEmbedding,
    ResBlock,
    SpaceToDepth,
    Tokens,
    downsample,
    register,
    upsample,
)
from ldm.quantizers import CodebookUsage, FiniteScalarQuantizer, VectorQuantizer


class Reports:
    """What a training or validation step reports: means over the epoch's examples, wherever they were computed."""

    def record(self, values, rows=1):
        """Feed the running means in `trackers`, weighted by the number of examples, and return them."""
        for name, value in values.items():
            self.trackers[name].update_state(value, sample_weight=tf.cast(rows, tf.float32))
        return {name: self.trackers[name].result() for name in values}

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Our models are built before `fit`; Keras' attempt to build them fails with several workers (Keras 3.15)."""

    def get_metrics_result(self):
        """The metrics of the phase, added up over replicas; Keras uses them where the names are those of the step."""
        training = float(ops.convert_to_numpy(self.trackers["gradient_norm"].count)) > 0
        only_training = ("gradient_norm", "revived")
        return {m.name: m.result() for m in self.metrics if training or m.name not in only_training}


# ---- first stage -----------------------------------------------------------------------------------------------------


class Autoencoder(Reports, keras.Model):
    """What VQ-VAE and KL-VAE share: networks, latent normalisation, training loop.

    A subclass says what happens in the middle: `bottleneck`, and optionally `after_step`.

    The first and last layers trade 2x2 pixels for channels, so that no convolution runs at full resolution, where
    most of the cost and little of the content would be.

    Args:
        image_size: pixels a side, divisible by the downsampling.
        downsampling: image pixels per latent pixel, along one side: 4, 8, 16.
        width: channels of the first level; they double per level, up to four times.
        blocks: residual blocks per level.
        latent_channels: C.
        condition_on_z: tell encoder and decoder the slice index.
        structure_weight: weight of 1 - SSIM in the reconstruction loss, beside L1 and MSE.
        clip_norm: global norm to which gradients are clipped.
        seed: of all randomness in training.
    """

    moments = 1  # encoder outputs per latent channel
    arguments = (  # of the constructor; Keras records a Layer's by itself, but not a Model's
        *("image_size", "downsampling", "width", "blocks", "latent_channels", "condition_on_z"),
        *("structure_weight", "clip_norm", "seed"),
    )

    def __init__(
        self,
        image_size,
        downsampling=4,
        width=64,
        blocks=1,
        latent_channels=4,
        condition_on_z=True,
        structure_weight=0.3,
        clip_norm=1.0,
        seed=0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if downsampling not in (2, 4, 8, 16, 32):
            raise ValueError(f"downsampling must be a power of two from 2 to 32, not {downsampling}")
        if image_size % downsampling:
            raise ValueError(f"image size {image_size} is not divisible by the downsampling {downsampling}")
        self.image_size, self.latent_size = image_size, image_size // downsampling
        self.downsampling, self.width, self.blocks = downsampling, width, blocks
        widths = [width * min(2**level, 4) for level in range(downsampling.bit_length() - 1)]
        self.latent_channels, self.condition_on_z = latent_channels, condition_on_z
        self.structure_weight, self.clip_norm, self.seed = structure_weight, clip_norm, seed
        self.encoder = encoder(image_size, widths, blocks, self.moments * latent_channels, condition_on_z)
        self.decoder = decoder(self.latent_size, widths, blocks, latent_channels, condition_on_z)
        options = {"shape": (latent_channels,), "trainable": False, "aggregation": "only_first_replica"}
        self.latent_mean = self.add_weight(name="latent_mean", initializer="zeros", **options)
        self.latent_std = self.add_weight(name="latent_std", initializer="ones", **options)
        self.trackers = {name: keras.metrics.Mean(name=name) for name in ("loss", "reconstruction", "gradient_norm")}

    def get_config(self):
        return {"name": self.name, **{argument: getattr(self, argument) for argument in self.arguments}}

    @property
    def latent_shape(self):
        """(h, w, C) of one slice's latents."""
        return (self.latent_size, self.latent_size, self.latent_channels)

    # -- the contract of the first stage: images <-> normalised latents

    def encode(self, images, z):
        """Images (B, H, W, 1) in [-1, 1], slice indices z (B,) -> normalised latents (B, h, w, C), no sampling."""
        return (self.raw_latents(images, z) - self.latent_mean) / self.latent_std

    def decode(self, latents, z):
        """Normalised latents (B, h, w, C), slice indices z (B,) -> images (B, H, W, 1) in [-1, 1]."""
        raw = self.snap(ops.cast(latents, "float32") * self.latent_std + self.latent_mean)
        return ops.clip(self.decoder({"latents": raw, "z": ops.convert_to_tensor(z)}), -1.0, 1.0)

    def raw_latents(self, images, z):
        """Latents before normalisation and quantisation (B, h, w, C)."""
        inputs = {"image": ops.convert_to_tensor(images), "z": ops.convert_to_tensor(z)}
        return self.encoder(inputs)[..., : self.latent_channels]

    def snap(self, raw):
        """Raw latents -> what the decoder was trained on; here, themselves."""
        return raw

    def measure_latents(self, dataset):
        """Set the latents' mean and standard deviation per channel from the batches of the training split."""
        encode = tf.function(self.raw_latents, reduce_retracing=True)
        count, total, squares = 0, 0.0, 0.0
        for batch in dataset:
            flat = tf.cast(rearrange(encode(batch["image"], batch["z"]), "b h w c -> (b h w) c"), tf.float64)
            count += flat.shape[0]
            total, squares = total + tf.reduce_sum(flat, 0), squares + tf.reduce_sum(flat**2, 0)
        mean = total / count
        self.latent_mean.assign(tf.cast(mean, tf.float32))
        self.latent_std.assign(tf.cast(tf.sqrt(tf.maximum(squares / count - mean**2, 1e-12)), tf.float32))

    # -- training

    def bottleneck(self, encoded, training):
        """Encoder output -> (latents for the decoder, {name: extra loss}, whatever `after_step` needs)."""
        raise NotImplementedError

    def after_step(self, state, training):
        """What a step changes besides the weights that have gradients."""

    def call(self, inputs, training=False):
        """{"image", "z"} -> reconstruction, quantised where there is a codebook."""
        images, z = inputs["image"], inputs["z"]
        latents, _, _ = self.bottleneck(self.encoder({"image": images, "z": z}, training=training), training=False)
        return self.decoder({"latents": latents, "z": z}, training=training)

    def forward(self, batch, training):
        """One pass: ({name: loss}, state for `after_step`)."""
        images, z = batch["image"], batch["z"]
        latents, extra, state = self.bottleneck(self.encoder({"image": images, "z": z}, training=training), training)
        fake = self.decoder({"latents": latents, "z": z}, training=training)
        reconstruction = (
            losses.mean_absolute(images, fake)
            + losses.mean_squared(images, fake)
            + self.structure_weight * losses.structural_dissimilarity(images, fake)
        )
        return {"loss": reconstruction + sum(extra.values()), "reconstruction": reconstruction, **extra}, state

    def train_step(self, batch):
        with tf.GradientTape() as tape:
            values, state = self.forward(batch, training=True)
            loss = distribution.replica_loss(values["loss"])
        variables = self.trainable_variables
        values["gradient_norm"] = distribution.apply_gradients(
            self.optimizer, tape.gradient(loss, variables), variables, self.clip_norm
        )
        self.after_step(state, training=True)
        return distribution.for_logs(self.record(values))

    def test_step(self, batch):
        rows, batch = distribution.at_least_one_row(batch)
        values, state = self.forward(batch, training=False)
        self.after_step(tuple(part[:rows] for part in state), training=False)
        return distribution.for_logs(self.record(values, rows))


@register
class VQVAE(Autoencoder):
    """VQ-VAE (arXiv 1711.00937), with a learned codebook or a fixed grid of codes.

    `encode` returns the latents before quantisation, `decode` quantises: a diffusion model then works in a continuous
    space, and its small errors vanish in the codebook (arXiv 2112.10752, section 3.1).

    Args:
        quantizer: "ema", a codebook of moving averages with revival of dead codes; or "fsq", finite scalar
            quantisation.
        num_codes: size of the learned codebook.
        levels: of finite scalar quantisation, one per latent channel.
        commitment: weight of the loss that keeps the encoder near its learned codes (beta, 0.25 in the paper).
        Others: as `Autoencoder`.
    """

    arguments = (*Autoencoder.arguments, "quantizer", "num_codes", "levels", "commitment")

    def __init__(self, image_size, quantizer="ema", num_codes=1024, levels=(8, 5, 5, 5), commitment=0.25, **kwargs):
        if quantizer not in ("ema", "fsq"):
            raise ValueError(f"quantizer must be 'ema' or 'fsq', not {quantizer!r}")
        if quantizer == "fsq":
            kwargs["latent_channels"] = len(levels)
        super().__init__(image_size, **kwargs)
        self.kind, self.levels, self.commitment = quantizer, list(levels), commitment
        if self.kind == "ema":
            self.quantizer = VectorQuantizer(num_codes, self.latent_channels)
            self.quantizer.build((None, *self.latent_shape))
            self.trackers["commitment"] = keras.metrics.Mean(name="commitment")
            self.revived = keras.metrics.Sum(name="revived")
        else:
            self.quantizer = FiniteScalarQuantizer(levels)
        self.num_codes = self.quantizer.num_codes
        self.usage = CodebookUsage(self.num_codes, "usage")
        self.perplexity = CodebookUsage(self.num_codes, "perplexity")
        self.built = True

    def get_config(self):
        return {**super().get_config(), "quantizer": self.kind}

    def raw_latents(self, images, z):
        return self.quantizer.bound(super().raw_latents(images, z))

    def bottleneck(self, encoded, training):
        latents = self.quantizer.bound(encoded)
        vectors, codes = self.quantizer(latents)
        extra = {}
        if self.kind == "ema":
            extra["commitment"] = self.commitment * losses.mean_squared(latents, ops.stop_gradient(vectors))
        return vectors, extra, (ops.stop_gradient(latents), codes)

    def after_step(self, state, training):
        latents, codes = state
        counts = self.quantizer.count(codes)
        self.usage.update_state(counts)
        self.perplexity.update_state(counts)
        if self.kind == "fsq" or not training:
            return
        flat = rearrange(latents, "b h w c -> (b h w) c")
        everywhere = tf.shape(flat)[0] * tf.distribute.get_replica_context().num_replicas_in_sync
        seed = tf.stack([self.seed, tf.cast(self.optimizer.iterations, tf.int32)])
        picks = tf.random.stateless_uniform((self.num_codes,), seed, 0, everywhere, dtype=tf.int32)
        candidates = distribution.pick_rows(flat, picks)
        sums = self.quantizer.sum(latents, codes)
        revived = self.quantizer.update(*distribution.sum_over_replicas((counts, sums, candidates)))
        self.revived.update_state(distribution.replica_loss(revived))  # a Sum adds up over replicas

    def record(self, values, rows=1):
        metrics = [self.usage, self.perplexity]
        if self.kind == "ema" and "gradient_norm" in values:
            metrics.append(self.revived)
        return super().record(values, rows) | {metric.name: metric.result() for metric in metrics}

    def snap(self, raw):
        return self.quantizer.decode(self.quantizer.encode(raw))

    def codes(self, images, z):
        """Images (B, H, W, 1), z (B,) -> codes (B, h, w) int32."""
        return self.quantizer.encode(self.raw_latents(images, z))


@register
class VAE(Autoencoder):
    """KL-VAE: a Gaussian posterior, lightly tied to N(0, I) (arXiv 1312.6114, appendix B; 2112.10752, section 3.1).

    Args:
        kl_weight: weight of the KL divergence, per pixel of the image.
        Others: as `Autoencoder`.
    """

    moments = 2
    arguments = (*Autoencoder.arguments, "kl_weight")

    def __init__(self, image_size, kl_weight=1e-6, **kwargs):
        super().__init__(image_size, **kwargs)
        self.kl_weight = kl_weight
        self.trackers["kl"] = keras.metrics.Mean(name="kl")
        self.built = True

    def bottleneck(self, encoded, training):
        mean, log_variance = ops.split(encoded, 2, axis=-1)
        log_variance = ops.clip(log_variance, -30.0, 20.0)
        divergence = 0.5 * (ops.square(mean) + ops.exp(log_variance) - 1.0 - log_variance)
        kl = self.kl_weight * ops.mean(ops.sum(divergence, axis=(1, 2, 3)))
        if not training:
            return mean, {"kl": kl}, ()
        seed = tf.stack([self.seed, tf.cast(self.optimizer.iterations, tf.int32)])
        noise = distribution.global_rows(
            lambda n: tf.random.stateless_normal((n, *self.latent_shape), seed), tf.shape(mean)[0]
        )
        return mean + ops.exp(0.5 * log_variance) * noise, {"kl": kl}, ()


def encoder(image_size, widths, blocks, outputs, condition_on_z):
    """{"image" (H, W, 1), "z" ()} -> (h, w, outputs), float32."""
    image = keras.Input((image_size, image_size, 1), name="image")
    z = keras.Input((), dtype="int32", name="z")
    embedding = Embedding(2 * widths[0])(z) if condition_on_z else None
    x = SpaceToDepth(2)(image)
    x = layers.Conv2D(widths[0], 3, padding="same")(x)
    for level, width in enumerate(widths):
        if level:
            x = downsample(width)(x)
        for _ in range(blocks):
            x = ResBlock(width)(x, embedding)
    x = AttentionBlock()(x)
    x = ResBlock(widths[-1])(x, embedding)
    x = GroupNorm(activation="silu")(x)
    return keras.Model({"image": image, "z": z}, layers.Conv2D(outputs, 1, dtype="float32")(x), name="encoder")


def decoder(latent_size, widths, blocks, latent_channels, condition_on_z):
    """{"latents" (h, w, C), "z" ()} -> image (H, W, 1), float32, not clipped."""
    latents = keras.Input((latent_size, latent_size, latent_channels), name="latents")
    z = keras.Input((), dtype="int32", name="z")
    embedding = Embedding(2 * widths[0])(z) if condition_on_z else None
    x = layers.Conv2D(widths[-1], 3, padding="same")(latents)
    x = ResBlock(widths[-1])(x, embedding)
    x = AttentionBlock()(x)
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(blocks):
            x = ResBlock(width)(x, embedding)
        if level:
            x = upsample(x, widths[level - 1])
    x = GroupNorm(activation="silu")(x)
    x = layers.Conv2D(4, 3, padding="same", dtype="float32")(x)
    return keras.Model({"latents": latents, "z": z}, DepthToSpace(2, dtype="float32")(x), name="decoder")


# ---- second stage ----------------------------------------------------------------------------------------------------


@register
class UNet(keras.Model):
    """Attention U-Net with time embedding (arXiv 2006.11239, appendix B; 2105.05233; 2112.10752).

    Time, slice index and label are tokens. Their sum modulates each residual block (FiLM); attention blocks see them
    one by one, by cross-attention.

    Args:
        size: pixels a side of what is denoised (image or latents).
        channels: of what is denoised.
        width: channels of the first level.
        multipliers: channels of each level, as multiples of `width`; each level halves the resolution.
        blocks: residual blocks per level on the way down (one more on the way up).
        attention: resolutions, in pixels a side, at which attention blocks follow residual blocks.
        head_size: channels per attention head.
        num_labels: number of labels; 0 has no label token.
        dropout: rate in residual blocks.

    Call arguments: {"x" (B, size, size, channels), "t" (B,) in [0, 1], "z" (B,) int32, "label" (B,) int32 (-1 =
    unknown), "keep" (B,) 1 or 0 (0 = unconditional)} -> (B, size, size, channels) float32.
    """

    def __init__(
        self,
        size,
        channels,
        width=64,
        multipliers=(1, 2, 4),
        blocks=2,
        attention=(16, 8),
        head_size=64,
        num_labels=0,
        dropout=0.0,
        **kwargs,
    ):
        if size % 2 ** (len(multipliers) - 1):
            raise ValueError(f"{len(multipliers)} levels do not fit {size} pixels: halving must stay whole")
        inputs = {
            "x": keras.Input((size, size, channels), name="x"),
            "t": keras.Input((), name="t"),
            "z": keras.Input((), dtype="int32", name="z"),
            "label": keras.Input((), dtype="int32", name="label"),
            "keep": keras.Input((), name="keep"),
        }
        tokens = [Embedding(4 * width, scale=1000.0, autocast=False, name="time")(inputs["t"])]
        tokens += [NullableEmbedding(name="z_or_null")(Embedding(4 * width, name="slice")(inputs["z"]), inputs["keep"])]
        if num_labels:
            label = layers.Embedding(num_labels + 1, 4 * width, name="label_token")(inputs["label"] + 1)
            tokens += [NullableEmbedding(name="label_or_null")(label, inputs["keep"])]
        film = layers.Add()(tokens)  # (B, 4 width)
        tokens = Tokens()(tokens)  # (B, M, 4 width)

        def level(x, channels):
            x = ResBlock(channels, dropout)(x, film)
            return AttentionBlock(head_size)(x, tokens) if x.shape[1] in attention else x

        x = layers.Conv2D(width, 3, padding="same")(inputs["x"])
        skips = [x]
        for depth, multiplier in enumerate(multipliers):  # down
            if depth:
                x = downsample(width * multiplier)(x)
                skips.append(x)
            for _ in range(blocks):
                x = level(x, width * multiplier)
                skips.append(x)

        x = ResBlock(width * multipliers[-1], dropout)(x, film)  # middle
        x = AttentionBlock(head_size)(x, tokens)
        x = ResBlock(width * multipliers[-1], dropout)(x, film)

        for depth, multiplier in reversed(list(enumerate(multipliers))):  # up: each skip is used once
            for _ in range(blocks + 1):
                x = level(layers.Concatenate()([x, skips.pop()]), width * multiplier)
            if depth:
                x = upsample(x, width * multiplier)

        x = GroupNorm(activation="silu")(x)
        x = layers.Conv2D(channels, 3, padding="same", kernel_initializer="zeros", dtype="float32")(x)
        super().__init__(inputs, x, **kwargs)
        self.arguments = {
            "size": size,
            "channels": channels,
            "width": width,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "attention": list(attention),
            "head_size": head_size,
            "num_labels": num_labels,
            "dropout": dropout,
        }

    def get_config(self):
        return {"name": self.name, **self.arguments}


@register
class DiffusionModel(Reports, keras.Model):
    """A denoising network with the process it inverts: trains it, and answers `denoise(x_t, t, conditions) -> x_0`.

    Args:
        unet: a `UNet`.
        schedule: name in `ldm.schedules.SCHEDULES`.
        prediction: what the network says: "eps", "v" or "x_0".
        drop_conditions: share of training examples that see no condition.
        clip_x_0: clip the predicted x_0 to [-1, 1]; for pixels, never for latents.
        clip_norm: global norm to which gradients are clipped.
        seed: of the noise in training and in validation.
    """

    def __init__(
        self,
        unet,
        schedule="cosine",
        prediction="v",
        drop_conditions=0.1,
        clip_x_0=False,
        clip_norm=1.0,
        seed=0,
        **kwargs,
    ):
        super().__init__(**{"autocast": False, **kwargs})  # bfloat16 would round t
        if schedule not in schedules.SCHEDULES:
            raise ValueError(f"schedule must be one of {tuple(schedules.SCHEDULES)}, not {schedule!r}")
        if prediction not in schedules.PREDICTIONS:
            raise ValueError(f"prediction must be one of {schedules.PREDICTIONS}, not {prediction!r}")
        self.unet, self.schedule_name, self.prediction = unet, schedule, prediction
        self.drop_conditions, self.clip_x_0, self.clip_norm, self.seed = drop_conditions, clip_x_0, clip_norm, seed
        self.trackers = {name: keras.metrics.Mean(name=name) for name in ("loss", "gradient_norm")}
        self.built = True

    @property
    def data_shape(self):
        """(H, W, C) of what is denoised."""
        size, channels = self.unet.arguments["size"], self.unet.arguments["channels"]
        return (size, size, channels)

    @property
    def schedule(self):
        """The function t -> (alpha, sigma)."""
        return schedules.SCHEDULES[self.schedule_name]

    def get_config(self):
        names = ("prediction", "drop_conditions", "clip_x_0", "clip_norm", "seed")
        config = {name: getattr(self, name) for name in names}
        unet = keras.saving.serialize_keras_object(self.unet)
        return {"unet": unet, "schedule": self.schedule_name, "name": self.name, **config}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "unet": keras.saving.deserialize_keras_object(config["unet"])})

    def call(self, inputs, training=False):
        """The network itself; see `UNet`."""
        return self.unet(inputs, training=training)

    def denoise(self, x_t, t, conditions=None):
        """The clean data that the network sees in x_t: the contract of every sampler.

        Args:
            x_t: (B, H, W, C) float32.
            t: (B,) float32 in [0, 1].
            conditions: {"z" (B,) int32, "label" (B,) int32}; None, or a missing key, is the unconditional case or an
                unknown label.

        Returns:
            x_0, (B, H, W, C) float32.
        """
        rows = ops.shape(x_t)[0]
        conditions = conditions or {}
        inputs = {
            "x": x_t,
            "t": t,
            "z": conditions.get("z", ops.zeros((rows,), "int32")),
            "label": conditions.get("label", ops.full((rows,), -1, "int32")),
            "keep": ops.full((rows,), 1.0 if "z" in conditions else 0.0),
        }
        inputs = {name: ops.convert_to_tensor(value) for name, value in inputs.items()}  # Keras refuses a mixture
        alpha, sigma = self.coefficients(inputs["t"])
        x_0 = schedules.to_x_0(self.prediction, self.unet(inputs), inputs["x"], alpha, sigma)
        return ops.clip(x_0, -1.0, 1.0) if self.clip_x_0 else x_0

    def coefficients(self, t):
        """alpha(t), sigma(t) shaped (B, 1, 1, 1)."""
        return tuple(rearrange(value, "b -> b 1 1 1") for value in self.schedule(t))

    def loss_at(self, batch, t, eps, keep, training):
        """Mean squared error of the network's output at times t (B,) and noise eps; a scalar."""
        alpha, sigma = self.coefficients(t)
        x_0 = batch["image"]
        inputs = {
            "x": schedules.add_noise(x_0, eps, alpha, sigma),
            "t": t,
            "z": batch["z"],
            "label": batch["label"],
            "keep": keep,
        }
        target = schedules.to_target(self.prediction, x_0, eps, alpha, sigma)
        return losses.mean_squared(target, self.unet(inputs, training=training))

    def draw(self, shape, seed):
        """Times, noise and kept conditions for one batch, as a function of `seed` (two integers) alone.

        The times of a batch are one random offset plus an even grid: every batch covers all noise levels
        (arXiv 2107.00630, appendix I.1).
        """
        rows, rest = shape[0], shape[1:]
        split = tf.random.experimental.stateless_split(seed, 4)

        def times(n):
            grid = (tf.cast(tf.range(n), tf.float32) + tf.random.stateless_uniform((), split[0])) / tf.cast(
                n, tf.float32
            )
            return tf.random.experimental.stateless_shuffle(grid, split[3])

        t = distribution.global_rows(times, rows)
        eps = distribution.global_rows(lambda n: tf.random.stateless_normal((n, *rest), split[1]), rows)
        uniform = distribution.global_rows(lambda n: tf.random.stateless_uniform((n,), split[2]), rows)
        return t, eps, uniform

    def train_step(self, batch):
        images = batch["image"]
        shape = (tf.shape(images)[0], *images.shape[1:])  # the tensor's own batch: a replica's part
        seed = tf.stack([self.seed, tf.cast(self.optimizer.iterations, tf.int32)])
        t, eps, uniform = self.draw(shape, seed)
        keep = tf.cast(uniform >= self.drop_conditions, tf.float32)
        with tf.GradientTape() as tape:
            loss = self.loss_at(batch, t, eps, keep, training=True)
            part = distribution.replica_loss(loss)
        variables = self.unet.trainable_variables
        norm = distribution.apply_gradients(self.optimizer, tape.gradient(part, variables), variables, self.clip_norm)
        return distribution.for_logs(self.record({"loss": loss, "gradient_norm": norm}))

    def test_step(self, batch):
        rows, batch = distribution.at_least_one_row(batch)
        images = batch["image"]
        shape = (tf.shape(images)[0], *images.shape[1:])
        t, eps, _ = self.draw(shape, (self.seed, -1))  # the same noise and times in every epoch
        loss = self.loss_at(batch, t, eps, tf.ones_like(t), training=False)
        return distribution.for_logs(self.record({"loss": loss}, rows))
