"""Every `keras.Model` of the project, with its losses and its `train_step`.

    VQVAE, VAE       first stage: images <-> latents
    Discriminator    judges the first stage's pictures, patch by patch
    AdversarialTraining    a first stage and its discriminator: how the two are trained
    UNet             attention U-Net with time embedding, the denoising network
    DiffusionModel   the U-Net with its schedule and prediction: training, and denoise(x_t, t) -> x_0
    CodePrior        transformer over the codes of a VQ-VAE: training, and sample(z) -> codes

Networks are built of `keras.ops` and run on every Keras backend; `train_step` and `test_step` are TensorFlow's.
A batch is {"image" (B, H, W, C), "z" (B,), "label" (B,), "case" (B,)}; its "image" may be latents.
"""

import itertools
import math

import keras
import numpy as np
import tensorflow as tf
from einops import rearrange
from keras import layers, ops

from ldm.diffusion import schedules
from ldm.nets.layers import (
    Agreement,
    AttentionBlock,
    AttentionGate,
    Covariate,
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
from ldm.nets.quantizers import CodebookUsage, FiniteScalarQuantizer, VectorQuantizer, count
from ldm.nets.transformer import TransformerBlock, draw_tokens, dropout, lengthen
from ldm.training import distribution, losses
from ldm.training.adversary import CodeBank


class Reports:
    """What a training or validation step reports: means over the epoch's examples, wherever they were computed."""

    # `for_use` and `learned` are methods because Keras saves whatever it finds in a model's properties.
    only_training = ("gradient_norm", "revived")
    only_validation = ("foreground_ssim", "active_units")

    def for_use(self):
        """The model that is kept when training is over."""
        return self

    def learned(self):
        """The variables that the optimizer moves."""
        return self.trainable_variables

    def compile(self, optimizer, **options):
        super().compile(optimizer=optimizer, **options)
        optimizer.build(self.learned())

    def record(self, values, rows=1):
        """Feed the running means in `trackers`, weighted by the number of examples, and return them."""
        for name, value in values.items():
            self.trackers[name].update_state(value, sample_weight=tf.cast(rows, tf.float32))
        return {name: self.trackers[name].result() for name in values}

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Our models are built before `fit`; Keras' attempt to build them fails with several workers (Keras 3.15)."""

    def get_metrics_result(self):
        """The metrics of the phase, added up over replicas; Keras uses them where the names are those of the step."""
        metrics = {metric.name: metric for metric in self.metrics}
        training = float(ops.convert_to_numpy(metrics["gradient_norm"].count)) > 0
        absent = self.only_validation if training else self.only_training
        return {name: metric.result() for name, metric in metrics.items() if name not in absent}


# ---- first stage -----------------------------------------------------------------------------------------------------


class Autoencoder(Reports, keras.Model):
    """What VQ-VAE and KL-VAE share: networks, latent normalisation, training loop.

    A subclass says what happens in the middle: `bottleneck`, and optionally `after_step`.

    The first and last layers trade patches of pixels for channels, so that no convolution runs at full resolution,
    where most of the cost and little of the content would be. For the same reason the networks see a window of the
    picture only, if one is given: outside it everything is black. Cropping and padding happen in here, so all others
    deal with whole pictures.

    Args:
        image_size: pixels a side.
        crop_box: (top, left, height, width) in pixels of what the networks see, sides divisible by the downsampling;
            None is the whole picture.
        downsampling: image pixels per latent pixel, along one side: 4, 8, 16.
        patch: side of the patches that the first and last layers trade for channels: 2 or 4, at most `downsampling`.
        width: channels of the first level; they double per level, up to 256 or `width` if that is more.
        blocks: residual blocks per level.
        latent_channels: C.
        condition_on_z: tell encoder and decoder the slice index.
        num_labels: tell them the label, one of so many; 0 does not.
        tissues: number of tissue classes that the decoder names beside the picture; 0 names none.
        structure_weight: weight of 1 - SSIM in the reconstruction loss, beside L1 and MSE.
        tissue_weight: weight of the tissues' cross-entropy.
        clip_norm: global norm to which gradients are clipped.
        seed: of all randomness in training.
    """

    moments = 1  # encoder outputs per latent channel
    arguments = (  # of the constructor; Keras records a Layer's by itself, but not a Model's
        *("image_size", "crop_box", "downsampling", "patch", "width", "blocks", "latent_channels", "condition_on_z"),
        *("num_labels", "tissues", "structure_weight", "tissue_weight", "clip_norm", "seed"),
    )

    def __init__(
        self,
        image_size,
        crop_box=None,
        downsampling=4,
        patch=2,
        width=64,
        blocks=1,
        latent_channels=4,
        condition_on_z=True,
        num_labels=0,
        tissues=0,
        structure_weight=0.3,
        tissue_weight=0.05,
        clip_norm=1.0,
        seed=0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if downsampling not in (2, 4, 8, 16, 32):
            raise ValueError(f"downsampling must be a power of two from 2 to 32, not {downsampling}")
        self.image_size, self.crop_box = image_size, list(crop_box or (0, 0, image_size, image_size))
        shape = self.crop_box[2:]
        if shape[0] % downsampling or shape[1] % downsampling:
            raise ValueError(f"{shape[0]}x{shape[1]} pixels are not divisible by the downsampling {downsampling}")
        if patch not in (2, 4) or patch > downsampling:
            raise ValueError(f"patch must be 2 or 4 and at most the downsampling {downsampling}, not {patch}")
        self.downsampling, self.patch, self.width, self.blocks = downsampling, patch, width, blocks
        self.latent_channels, self.condition_on_z = latent_channels, condition_on_z
        self.num_labels, self.tissues = num_labels, tissues
        self.structure_weight, self.tissue_weight = structure_weight, tissue_weight
        self.clip_norm, self.seed = clip_norm, seed
        levels = (downsampling // patch).bit_length()
        widths = [max(width, min(width * 2**level, 256)) for level in range(levels)]
        conditions = {"condition_on_z": condition_on_z, "num_labels": num_labels}
        self.encoder = encoder(shape, patch, widths, blocks, self.moments * latent_channels, **conditions)
        self.decoder = decoder(self.latent_shape, patch, widths, blocks, tissues, **conditions)
        options = {"shape": (latent_channels,), "trainable": False, "aggregation": "only_first_replica"}
        self.latent_mean = self.add_weight(name="latent_mean", initializer="zeros", **options)
        self.latent_std = self.add_weight(name="latent_std", initializer="ones", **options)
        names = ["loss", "reconstruction", "foreground_ssim", "gradient_norm", *(["tissue"] if tissues else [])]
        self.trackers = {name: keras.metrics.Mean(name=name) for name in names}

    def get_config(self):
        return {"name": self.name, **{argument: getattr(self, argument) for argument in self.arguments}}

    @property
    def latent_shape(self):
        """(h, w, C) of one slice's latents."""
        height, width = self.crop_box[2:]
        return (height // self.downsampling, width // self.downsampling, self.latent_channels)

    def crop(self, images):
        """(B, H, W, ...) -> what the window shows of it."""
        top, left, height, width = self.crop_box
        return ops.convert_to_tensor(images)[:, top : top + height, left : left + width]

    def pad(self, images, value):
        """The inverse of `crop`, with `value` around the window.

        The window's outermost patch gets it as well, as far as `ldm.data.crop.brain_box` left room there, a fortieth of
        the side: nothing is in it, and the decoder, whose convolutions see zeros beyond, puts specks into the corners.
        """
        top, left, height, width = self.crop_box
        margins = [(top, self.image_size - top - height), (left, self.image_size - left - width)]
        room = min(self.patch, self.image_size // 40)
        rest = len(images.shape) - 3
        cut = [tuple(room if margin else 0 for margin in pair) for pair in margins]
        inside = images[:, cut[0][0] : height - cut[0][1], cut[1][0] : width - cut[1][1]]
        margins = [tuple(np.add(margin, less)) for margin, less in zip(margins, cut, strict=True)]
        return ops.pad(inside, [(0, 0), *margins, *[(0, 0)] * rest], constant_values=value)

    def framed(self, batch):
        """A batch of whole pictures -> the same with what the window shows of them."""
        return batch | {key: self.crop(batch[key]) for key in ("image", "mask") if key in batch}

    # -- the contract of the first stage: images <-> normalised latents

    def encode(self, images, z, label=None):
        """Images (B, H, W, 1) in [-1, 1] -> normalised latents (B, h, w, C), no sampling.

        Args:
            images: as said.
            z: (B,) slice indices.
            label: (B,) int32; None or -1 is unknown.
        """
        return (self.raw_latents(images, z, label) - self.latent_mean) / self.latent_std

    def decode(self, latents, z, label=None):
        """Normalised latents (B, h, w, C) and conditions as for `encode` -> images (B, H, W, 1) in [-1, 1]."""
        return self.pad(ops.clip(self.decoder(self._to_decode(latents, z, label))["image"], -1.0, 1.0), -1.0)

    def reconstruct(self, images, z, label=None):
        """Images (B, H, W, 1) in [-1, 1] and conditions as for `encode` -> what is left of them after `decode`."""
        return self.decode(self.encode(images, z, label), z, label)

    def decode_tissue(self, latents, z, label=None):
        """As `decode`, for a model with tissues -> the likeliest class of each pixel, (B, H, W) int32."""
        return self.pad(ops.argmax(self.decoder(self._to_decode(latents, z, label))["tissue"], axis=-1), 0)

    def _to_decode(self, latents, z, label):
        raw = ops.cast(latents, "float32") * self.latent_std + self.latent_mean
        return {"latents": self.quantized(raw), **conditions_of(z, label)}

    def raw_latents(self, images, z, label=None):
        """Latents before normalisation and quantisation (B, h, w, C)."""
        return self.encoder({"image": self.crop(images), **conditions_of(z, label)})[..., : self.latent_channels]

    def quantized(self, raw):
        """Raw latents -> what the decoder was trained on; here, themselves."""
        return raw

    def measure_latents(self, dataset):
        """Set the latents' mean and standard deviation per channel from the batches of the training split."""
        encode = tf.function(self.raw_latents, reduce_retracing=True)
        count, total, squares = 0, 0.0, 0.0
        for batch in dataset:
            latents = encode(batch["image"], batch["z"], batch["label"])
            flat = tf.cast(rearrange(latents, "b h w c -> (b h w) c"), tf.float64)
            count += flat.shape[0]
            total, squares = total + tf.reduce_sum(flat, 0), squares + tf.reduce_sum(flat**2, 0)
        mean = total / count
        self.latent_mean.assign(tf.cast(mean, tf.float32))
        self.latent_std.assign(tf.cast(tf.sqrt(tf.maximum(squares / count - mean**2, 1e-12)), tf.float32))

    # -- training

    def bottleneck(self, encoded, step, training):
        """Encoder output -> (latents for the decoder, {name: extra loss}, whatever `after_step` needs).

        `step` is the number of finished training steps, an integer tensor.
        """
        raise NotImplementedError

    def after_step(self, state, batch, step, training):
        """What a step changes besides the weights that have gradients."""

    def call(self, inputs, training=False):
        """{"image", "z", "label"} -> reconstruction, quantised where there is a codebook; not clipped."""
        known = conditions_of(inputs["z"], inputs["label"])
        encoded = self.encoder({"image": self.crop(inputs["image"]), **known}, training=training)
        latents, _, _ = self.bottleneck(encoded, 0, training=False)
        return self.pad(self.decoder({"latents": latents, **known}, training=training)["image"], -1.0)

    def forward(self, batch, step, training):
        """One pass over a framed batch: ({name: loss}, reconstructed images, state for `after_step`)."""
        images, known = batch["image"], conditions_of(batch["z"], batch["label"])
        encoded = self.encoder({"image": images, **known}, training=training)
        latents, extra, state = self.bottleneck(encoded, step, training)
        outputs = self.decoder({"latents": latents, **known}, training=training)
        reconstruction = self.compare(images, outputs["image"])
        if self.tissues:
            known = None
            if training:  # of the global batch: one replica may hold all slices that have masks
                known = distribution.mean_over_replicas(tf.reduce_sum(tf.cast(batch["mask"] >= 0, tf.float32)))
            extra["tissue"] = self.tissue_weight * losses.segmentation(outputs["tissue"], batch["mask"], known)
        values = {"loss": reconstruction + sum(extra.values()), "reconstruction": reconstruction, **extra}
        return values, outputs["image"], state

    def compare(self, real, fake):
        """The reconstruction loss: L1 + MSE + weight (1 - SSIM)."""
        return (
            losses.mean_absolute(real, fake)
            + losses.mean_squared(real, fake)
            + self.structure_weight * losses.structural_dissimilarity(real, fake)
        )

    def train_step(self, batch):
        batch, step = self.framed(batch), self.optimizer.iterations
        with tf.GradientTape() as tape:
            values, _, state = self.forward(batch, step, training=True)
            loss = distribution.replica_loss(values["loss"])
        variables = self.trainable_variables
        values["gradient_norm"] = distribution.apply_gradients(
            self.optimizer, tape.gradient(loss, variables), variables, self.clip_norm
        )
        self.after_step(state, batch, step, training=True)
        return distribution.for_logs(self.record(values))

    def test_step(self, batch):
        batch = self.framed(batch)
        rows, padded = distribution.at_least_one_row(batch)
        values, fake, state = self.forward(padded, 0, training=False)
        self.after_step(tuple(part[:rows] for part in state), batch, 0, training=False)
        similarity, brain = losses.foreground_ssim(padded["image"], fake)
        self.trackers["foreground_ssim"].update_state(similarity[:rows], sample_weight=brain[:rows])
        logs = self.record(values, rows) | {"foreground_ssim": self.trackers["foreground_ssim"].result()}
        return distribution.for_logs(logs)


def conditions_of(z, label=None):
    """What encoder, decoder and discriminator are told of a slice: {"z", "label"} (B,) int32, -1 = unknown label."""
    z = ops.convert_to_tensor(z)
    return {"z": z, "label": ops.zeros_like(z) - 1 if label is None else ops.convert_to_tensor(label)}


@register
class VQVAE(Autoencoder):
    """VQ-VAE (arXiv 1711.00937), with a learned codebook or a fixed grid of codes.

    `encode` returns the latents before quantisation, `decode` quantises: a diffusion model then works in a continuous
    space, and its small errors vanish in the codebook (arXiv 2112.10752, section 3.1).

    Args:
        quantizer: "ema", a codebook of moving averages with revival of dead codes; or "fsq", finite scalar
            quantisation.
        num_codes: size of the learned codebook.
        cosine: the learned codebook compares directions only.
        levels: of finite scalar quantisation, one per channel of a code.
        codes_per_latent: each latent is cut into so many parts, and each part has a code of its own, out of one
            codebook (product quantisation, Jegou et al., doi:10.1109/TPAMI.2010.57).
        commitment: weight of the loss that keeps the encoder near its learned codes (beta, 0.25 in the paper).
        Others: as `Autoencoder`.
    """

    arguments = (*Autoencoder.arguments, "quantizer", "num_codes", "cosine", "levels", "codes_per_latent", "commitment")

    def __init__(
        self,
        image_size,
        quantizer="ema",
        num_codes=1024,
        cosine=False,
        levels=(8, 5, 5, 5),
        codes_per_latent=1,
        commitment=0.25,
        **kwargs,
    ):
        if quantizer not in ("ema", "fsq"):
            raise ValueError(f"quantizer must be 'ema' or 'fsq', not {quantizer!r}")
        if quantizer == "fsq":
            kwargs["latent_channels"] = codes_per_latent * len(levels)
        super().__init__(image_size, **kwargs)
        if self.latent_channels % codes_per_latent:
            raise ValueError(f"{self.latent_channels} latent channels cannot be cut into {codes_per_latent} codes")
        self.codes_per_latent = codes_per_latent
        self.kind, self.cosine, self.levels, self.commitment = quantizer, cosine, list(levels), commitment
        if self.kind == "ema":
            self.quantizer = VectorQuantizer(num_codes, self.latent_channels // codes_per_latent, cosine=cosine)
            self.quantizer.build((None, *self.code_shape, self.quantizer.size))
            self.trackers["commitment"] = keras.metrics.Mean(name="commitment")
            self.revived = keras.metrics.Sum(name="revived")
        else:
            self.quantizer = FiniteScalarQuantizer(levels)
        self.num_codes = self.quantizer.num_codes
        self.usage = {
            name: CodebookUsage(self.num_codes, statistic, name)
            for name, statistic in (
                ("usage", "usage"),
                ("usage_foreground", "usage"),
                ("usage_background", "usage"),
                ("perplexity", "perplexity"),
            )
        }
        self.built = True

    def get_config(self):
        return {**super().get_config(), "quantizer": self.kind}

    @property
    def code_shape(self):
        """(h, w codes_per_latent): one slice's codes."""
        height, width, _ = self.latent_shape
        return (height, width * self.codes_per_latent)

    @property
    def bits_per_slice(self):
        """Bits that name one slice's codes."""
        return math.prod(self.code_shape) * math.log2(self.num_codes)

    def split_codes(self, latents):
        """(B, h, w, C) -> one vector for each code."""
        return rearrange(latents, "b h w (n d) -> b h (w n) d", n=self.codes_per_latent)

    def merge_codes(self, vectors):
        """The inverse of `split_codes`."""
        return rearrange(vectors, "b h (w n) d -> b h w (n d)", n=self.codes_per_latent)

    def raw_latents(self, images, z, label=None):
        return self.merge_codes(self.quantizer.bound(self.split_codes(super().raw_latents(images, z, label))))

    def bottleneck(self, encoded, step, training):
        latents = self.quantizer.bound(self.split_codes(encoded))
        vectors, codes = self.quantizer(latents)
        extra = {}
        if self.kind == "ema":
            extra["commitment"] = self.commitment * losses.mean_squared(latents, ops.stop_gradient(vectors))
        return self.merge_codes(vectors), extra, (ops.stop_gradient(latents), codes)

    def after_step(self, state, batch, step, training):
        latents, codes = state
        counts = count(codes, self.num_codes)
        in_brain = count(codes, self.num_codes, self.shows_brain(batch["image"]))
        for name, used in {"usage_foreground": in_brain, "usage_background": counts - in_brain}.items():
            self.usage[name].update_state(used)
        for name in ("usage", "perplexity"):
            self.usage[name].update_state(counts)
        if self.kind == "fsq" or not training:
            return
        flat = rearrange(latents, "b h w c -> (b h w) c")
        everywhere = tf.shape(flat)[0] * tf.distribute.get_replica_context().num_replicas_in_sync
        seed = tf.stack([self.seed, tf.cast(step, tf.int32)])
        picks = tf.random.stateless_uniform((self.num_codes,), seed, 0, everywhere, dtype=tf.int32)
        candidates = distribution.pick_rows(flat, picks)
        sums = self.quantizer.sum(latents, codes)
        revived = self.quantizer.update(*distribution.sum_over_replicas((counts, sums, candidates)))
        self.revived.update_state(distribution.replica_loss(revived))  # a Sum adds up over replicas

    def shows_brain(self, images):
        """Framed images -> 1.0 for each code whose patch holds a pixel brighter than 0.05 of the range, else 0.0."""
        size = self.downsampling
        patches = rearrange(images, "b (h p) (w q) c -> b h w (p q c)", p=size, q=size)
        return ops.repeat(ops.cast(ops.any(patches > -0.9, axis=-1), "float32"), self.codes_per_latent, axis=2)

    def record(self, values, rows=1):
        metrics = list(self.usage.values())
        if self.kind == "ema" and "gradient_norm" in values:
            metrics.append(self.revived)
        return super().record(values, rows) | {metric.name: metric.result() for metric in metrics}

    def quantized(self, raw):
        return self.merge_codes(self.quantizer.decode(self.quantizer.encode(self.split_codes(raw))))

    def codes(self, latents):
        """Normalised latents (B, h, w, C), as `encode` returns them -> codes (B, *code_shape) int32."""
        return self.quantizer.encode(
            self.split_codes(ops.cast(latents, "float32") * self.latent_std + self.latent_mean)
        )

    def latents_of(self, codes):
        """Codes (B, *code_shape) int32 -> their normalised latents (B, h, w, C)."""
        return (self.merge_codes(self.quantizer.decode(codes)) - self.latent_mean) / self.latent_std

    def count_codes(self, dataset):
        """How often each code names a place of the dataset's slices, (K,) int64."""
        encode = tf.function(lambda images, z, label: self.codes(self.encode(images, z, label)), reduce_retracing=True)
        total = np.zeros(self.num_codes, "int64")
        for batch in dataset:
            codes = encode(batch["image"], batch["z"], batch["label"])
            total += np.bincount(codes.numpy().ravel(), minlength=self.num_codes)
        return total


@register
class VAE(Autoencoder):
    """KL-VAE: a Gaussian posterior, lightly tied to N(0, I) (arXiv 1312.6114, appendix B; 2112.10752, section 3.1).

    Args:
        kl_weight: weight of the KL divergence in nats per slice.
        kl_cycles: number of cycles in which the weight rises from 0 (`losses.cyclical`), against posterior collapse.
        kl_cycle_steps: training steps that all cycles take together; 0 for the full weight from the start.
        Others: as `Autoencoder`.
    """

    moments = 2
    arguments = (*Autoencoder.arguments, "kl_weight", "kl_cycles", "kl_cycle_steps")

    def __init__(self, image_size, kl_weight=1e-6, kl_cycles=4, kl_cycle_steps=0, **kwargs):
        super().__init__(image_size, **kwargs)
        self.kl_weight, self.kl_cycles, self.kl_cycle_steps = kl_weight, kl_cycles, kl_cycle_steps
        self.trackers["kl"] = keras.metrics.Mean(name="kl")
        self.active_units = ActiveUnits(self.latent_shape, name="active_units")
        self.built = True

    def bottleneck(self, encoded, step, training):
        mean, log_variance = ops.split(encoded, 2, axis=-1)
        log_variance = ops.clip(log_variance, -30.0, 20.0)
        divergence = 0.5 * (ops.square(mean) + ops.exp(log_variance) - 1.0 - log_variance)
        kl = self.kl_weight * ops.mean(ops.sum(divergence, axis=(1, 2, 3)))
        if not training:
            return mean, {"kl": kl}, (mean,)
        kl *= losses.cyclical(step, self.kl_cycles, self.kl_cycle_steps)
        seed = tf.stack([self.seed, tf.cast(step, tf.int32)])
        noise = distribution.global_rows(
            lambda n: tf.random.stateless_normal((n, *self.latent_shape), seed), tf.shape(mean)[0]
        )
        return mean + ops.exp(0.5 * log_variance) * noise, {"kl": kl}, (mean,)

    def after_step(self, state, batch, step, training):
        if not training:
            self.active_units.update_state(*state)

    def record(self, values, rows=1):
        extra = {} if "gradient_norm" in values else {"active_units": self.active_units.result()}
        return super().record(values, rows) | extra


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


def embed(z, label, size, condition_on_z, num_labels):
    """The sum of what is known of a slice, as one vector (B, size); None where nothing is told."""
    parts = [Embedding(size)(z)] if condition_on_z else []
    parts += [layers.Embedding(num_labels + 1, size)(label + 1)] if num_labels else []
    return sum(parts[1:], parts[0]) if parts else None


def encoder(shape, patch, widths, blocks, outputs, condition_on_z, num_labels):
    """{"image" (H, W, 1), "z" (), "label" ()} -> (h, w, outputs), float32; `shape` is (H, W)."""
    image = keras.Input((*shape, 1), name="image")
    z = keras.Input((), dtype="int32", name="z")
    label = keras.Input((), dtype="int32", name="label")
    embedding = embed(z, label, 2 * widths[0], condition_on_z, num_labels)
    x = SpaceToDepth(patch)(image)
    x = layers.Conv2D(widths[0], 3, padding="same")(x)
    for level, width in enumerate(widths):
        if level:
            x = downsample(width)(x)
        for _ in range(blocks):
            x = ResBlock(width)(x, embedding)
    x = AttentionBlock(math.gcd(widths[-1], 64))(x)
    x = ResBlock(widths[-1])(x, embedding)
    x = GroupNorm(activation="silu")(x)
    x = layers.Conv2D(outputs, 1, dtype="float32")(x)
    return keras.Model({"image": image, "z": z, "label": label}, x, name="encoder")


def decoder(latent_shape, patch, widths, blocks, tissues, condition_on_z, num_labels):
    """{"latents" (h, w, C), "z" (), "label" ()} -> {"image" (H, W, 1), "tissue" (H, W, tissues)}, float32.

    The image is not clipped; the tissues are logits, and absent if there are none.
    """
    latents = keras.Input(latent_shape, name="latents")
    z = keras.Input((), dtype="int32", name="z")
    label = keras.Input((), dtype="int32", name="label")
    embedding = embed(z, label, 2 * widths[0], condition_on_z, num_labels)
    x = layers.Conv2D(widths[-1], 3, padding="same")(latents)
    x = ResBlock(widths[-1])(x, embedding)
    x = AttentionBlock(math.gcd(widths[-1], 64))(x)
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(blocks):
            x = ResBlock(width)(x, embedding)
        if level:
            x = upsample(x, widths[level - 1])
    x = GroupNorm(activation="silu")(x)

    def to_pixels(channels, name):
        y = layers.Conv2D(channels * patch**2, 3, padding="same", dtype="float32", name=name)(x)
        return DepthToSpace(patch, dtype="float32")(y)

    outputs = {"image": to_pixels(1, "to_image")}
    if tissues:
        outputs["tissue"] = to_pixels(tissues, "to_tissue")
    return keras.Model({"latents": latents, "z": z, "label": label}, outputs, name="decoder")


@register
class Discriminator(keras.Model):
    """PatchGAN (arXiv 1611.07004, section 3.2): judges whether each patch of a picture is real.

    It is told the slice index and the label by projection: a patch's logit has a term for the picture, and one for
    how well the patch goes with what was told (arXiv 1802.05637, eq. 3).

    Args:
        shape: (H, W) of the pictures.
        patch: side of the patches that the first layer trades for channels.
        width: channels of the first level; the second has twice as many.
        condition_on_z: tell it the slice index.
        num_labels: number of labels; 0 is told none.

    Call arguments: {"image" (B, H, W, 1), "z" (B,) int32, "label" (B,) int32} -> logits (B, h, w, 1) float32, one for
    each patch of 2 `patch` pixels; it sees 13 `patch` pixels around it.
    """

    def __init__(self, shape, patch=4, width=64, condition_on_z=True, num_labels=0, **kwargs):
        image = keras.Input((*shape, 1), name="image")
        z = keras.Input((), dtype="int32", name="z")
        label = keras.Input((), dtype="int32", name="label")
        x = SpaceToDepth(patch)(image)
        x = layers.LeakyReLU(0.2)(layers.Conv2D(width, 3, padding="same")(x))
        x = layers.LeakyReLU(0.2)(GroupNorm()(downsample(2 * width)(x)))
        x = layers.LeakyReLU(0.2)(GroupNorm()(layers.Conv2D(2 * width, 3, padding="same")(x)))
        logits = layers.Conv2D(1, 3, padding="same", dtype="float32")(x)
        known = embed(z, label, 2 * width, condition_on_z, num_labels)
        if known is not None:
            logits = logits + Agreement(dtype="float32")(x, layers.Dense(2 * width)(known))
        super().__init__({"image": image, "z": z, "label": label}, logits, **kwargs)
        conditions = {"condition_on_z": condition_on_z, "num_labels": num_labels}
        self.arguments = {"shape": list(shape), "patch": patch, "width": width, **conditions}

    def get_config(self):
        return {"name": self.name, **self.arguments}


@register
class AdversarialTraining(Reports, keras.Model):
    """An autoencoder and a discriminator that sharpens it (arXiv 2012.09841, section 3.1), each with its optimizer.

    Until `begin` is called the autoencoder is trained as by itself. From then on the discriminator learns to tell its
    pictures from real ones, and the autoencoder to deceive it, with a weight that rises from 0 to its full value over
    `ramp_steps`. The weight is relative: of the gradients in the decoder's last layer, the adversarial one is `weight`
    times as long as that of the reconstruction (eq. 7 there), and never weighs more than `cap`.

    Args:
        autoencoder: a `VQVAE` or `VAE`.
        discriminator: a `Discriminator`.
        weight: of the adversarial loss, relative to the reconstruction's.
        cap: most that the loss itself may weigh.
        ramp_steps: training steps over which the weight rises.
        random_latents: let the discriminator also judge pictures decoded from random latents (`random_pictures`).
    """

    only_training = (*Reports.only_training, *("adversarial", "adaptive_weight", "d_real", "d_fake", "d_loss"))

    def __init__(self, autoencoder, discriminator, weight=0.1, cap=0.1, ramp_steps=500, random_latents=False, **kwargs):
        super().__init__(**kwargs)
        self.autoencoder, self.discriminator = autoencoder, discriminator
        self.weight, self.cap, self.ramp_steps = weight, cap, ramp_steps
        self.seed = autoencoder.seed
        options = {"shape": (), "trainable": False, "aggregation": "only_first_replica"}
        self.begun = self.add_weight(name="begun", initializer=keras.initializers.Constant(-1.0), **options)
        self.strength = self.add_weight(name="strength", initializer="ones", **options)  # turned down by the callback
        self.random_latents, self.bank = random_latents, None
        if random_latents and isinstance(autoencoder, VQVAE):
            self.bank = CodeBank(512, autoencoder.code_shape)
        names = [name for name in self.only_training if name != "revived"]
        self.trackers = {name: keras.metrics.Mean(name=name) for name in names if name != "gradient_norm"}
        self.active, self.built = False, True

    def for_use(self):
        return self.autoencoder

    def learned(self):
        return self.autoencoder.trainable_variables

    @property
    def metrics(self):
        return super().metrics + self.autoencoder.metrics

    def compile(self, optimizer, discriminator_optimizer, **options):
        super().compile(optimizer=optimizer, **options)
        self.discriminator_optimizer = discriminator_optimizer
        discriminator_optimizer.build(self.discriminator.trainable_variables)

    def make_train_function(self, force=False):
        self.active = float(ops.convert_to_numpy(self.begun)) >= 0  # which of the two steps is compiled
        return super().make_train_function(force)

    def begin(self):
        """Start adversarial training with the next step; both learning rates are at the same place from then on."""
        self.begun.assign(float(ops.convert_to_numpy(self.optimizer.iterations)))
        self.discriminator_optimizer.iterations.assign(self.optimizer.iterations)
        self.make_train_function(force=True)

    def call(self, inputs, training=False):
        return self.autoencoder(inputs, training=training)

    def discriminate(self, pictures, batch):
        """Logits of pictures (B, H, W, 1) with the conditions of the batch."""
        return self.discriminator({"image": pictures, **conditions_of(batch["z"], batch["label"])}, training=True)

    def random_pictures(self, batch, state, step):
        """Pictures decoded from random latents, of the batch's slice indices and labels.

        With codes, they are drawn per position from the slices of the same index seen last (`CodeBank`); without,
        latents are drawn from N(0, I), in units of the latents of this batch.
        """
        seed = tf.stack([self.seed + 1, tf.cast(step, tf.int32)])
        rows = tf.shape(batch["z"])[0]
        if self.bank is not None:
            self.bank.remember(*(distribution.gather_rows(part) for part in (state[1], batch["z"])))
            everyone = distribution.gather_rows(batch["z"])
            codes = distribution.own_rows(self.bank.draw(everyone, seed), rows)
            latents = self.autoencoder.merge_codes(self.autoencoder.quantizer.decode(codes))
        else:
            mean, std = distribution.moments(tf.stop_gradient(state[0]))
            shape = self.autoencoder.latent_shape
            noise = distribution.global_rows(lambda n: tf.random.stateless_normal((n, *shape), seed), rows)
            latents = mean + std * noise
        return self.autoencoder.decoder(
            {"latents": latents, **conditions_of(batch["z"], batch["label"])}, training=True
        )["image"]

    def adaptive_weight(self, tape, reconstruction, adversarial):
        """Ratio of the two losses' gradients in the decoder's last layer (arXiv 2012.09841, eq. 7), at most the cap."""
        last = self.autoencoder.decoder.get_layer("to_image").kernel
        norms = [
            tf.norm(distribution.sum_over_replicas(tape.gradient(loss, last))) for loss in (reconstruction, adversarial)
        ]
        return tf.minimum(self.weight * norms[0] / (norms[1] + 1e-8), self.cap)

    def train_step(self, batch):
        autoencoder, step = self.autoencoder, self.optimizer.iterations
        batch = autoencoder.framed(batch)
        began = tf.convert_to_tensor(self.begun)
        ramp = tf.clip_by_value((tf.cast(step, tf.float32) + 1.0 - began) / self.ramp_steps, 0.0, 1.0)
        own = dict.fromkeys(self.trackers, 0.0)
        with tf.GradientTape(persistent=True) as tape:
            values, fake, state = autoencoder.forward(batch, step, training=True)
            parts = [distribution.replica_loss(values["loss"])]
            if self.active:
                fakes = [fake, self.random_pictures(batch, state, step)] if self.random_latents else [fake]
                adversarial = losses.hinge_generator([self.discriminate(picture, batch) for picture in fakes])
                parts.append(distribution.replica_loss(adversarial))
        weights = [tf.constant(1.0)]
        if self.active:
            own["adaptive_weight"] = self.adaptive_weight(tape, parts[0], parts[1])
            weights.append(own["adaptive_weight"] * ramp * tf.convert_to_tensor(self.strength))
            own["adversarial"] = ramp
        gradients = tape.gradient(parts, self.learned(), output_gradients=weights)
        norm = distribution.apply_gradients(self.optimizer, gradients, self.learned(), autoencoder.clip_norm)
        autoencoder.after_step(state, batch, step, training=True)
        if self.active:
            own |= self.train_discriminator(batch, fakes)
        return distribution.for_logs(autoencoder.record({**values, "gradient_norm": norm}) | self.record(own))

    def train_discriminator(self, batch, fakes):
        """One step of the discriminator against pictures that are held fixed; returns what it reports.

        D(fake) is that of reconstructions: random pictures are told from real ones by anybody.
        """
        variables = self.discriminator.trainable_variables
        with tf.GradientTape() as tape:
            real = self.discriminate(batch["image"], batch)
            fake_logits = [self.discriminate(tf.stop_gradient(picture), batch) for picture in fakes]
            loss = losses.hinge_discriminator(real, fake_logits)
            part = distribution.replica_loss(loss)
        gradients = tape.gradient(part, variables)
        distribution.apply_gradients(self.discriminator_optimizer, gradients, variables, self.autoencoder.clip_norm)
        return {"d_real": ops.mean(real), "d_fake": ops.mean(fake_logits[0]), "d_loss": loss}

    def test_step(self, batch):
        return self.autoencoder.test_step(batch)


# ---- second stage ----------------------------------------------------------------------------------------------------


@register
class UNet(keras.Model):
    """Attention U-Net with time embedding (arXiv 2006.11239, appendix B; 2105.05233; 2112.10752).

    Time, slice index, label and covariates are tokens. Their sum modulates each residual block (FiLM); attention
    blocks see them one by one, by cross-attention.

    Args:
        size: pixels a side of what is denoised (image or latents), or its (height, width).
        channels: of what is denoised.
        width: channels of the first level.
        multipliers: channels of each level, as multiples of `width`; each level halves the resolution.
        blocks: residual blocks per level on the way down (one more on the way up).
        attention: resolutions, in rows, at which attention blocks follow residual blocks.
        head_size: channels per attention head.
        num_labels: number of labels; 0 has no label token.
        dropout: rate in residual blocks.
        covariates: of what else it is told about a person: how many values each category has, 0 for a number.
        mask: whether it is told a tissue mask.
        gates: additive attention gates on the skips (arXiv 1804.03999).
        recompute: gradient checkpointing, block by block; not with dropout.

    Call arguments: {"x" (B, height, width, channels), "t" (B,) in [0, 1], "z" (B,) int32, "label" (B,) int32 (-1 =
    unknown), "keep" (B,) 1 or 0 (0 = unconditional), with covariates also "covariates" (B, K), NaN = unknown, with
    masks "mask"
    (B, height, width, 4), see `ldm.data.masks.tissue_fractions`} -> (B, height, width, channels) float32.
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
        covariates=(),
        mask=False,
        gates=False,
        recompute=False,
        **kwargs,
    ):
        shape = (size, size) if isinstance(size, int) else tuple(size)
        if any(length % 2 ** (len(multipliers) - 1) for length in shape):
            raise ValueError(f"{len(multipliers)} levels do not fit {shape} pixels: halving must stay whole")
        inputs = {
            "x": keras.Input((*shape, channels), name="x"),
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
        if covariates:
            inputs["covariates"] = keras.Input((len(covariates),), name="covariates")
        for k, values in enumerate(covariates):
            covariate = Covariate(4 * width, values, name=f"covariate_{k}")(inputs["covariates"][:, k])
            tokens += [NullableEmbedding(name=f"covariate_{k}_or_null")(covariate, inputs["keep"])]
        film = layers.Add()(tokens)  # (B, 4 width)
        tokens = Tokens()(tokens)  # (B, M, 4 width)

        def level(x, channels):
            x = ResBlock(channels, dropout, recompute)(x, film)
            return AttentionBlock(head_size, recompute)(x, tokens) if x.shape[1] in attention else x

        x = inputs["x"]
        if mask:
            inputs["mask"] = keras.Input((*shape, 4), name="mask")
            x = layers.Concatenate()([x, inputs["mask"] * ops.reshape(inputs["keep"], (-1, 1, 1, 1))])
        x = layers.Conv2D(width, 3, padding="same")(x)
        skips = [x]
        for depth, multiplier in enumerate(multipliers):  # down
            if depth:
                x = downsample(width * multiplier)(x)
                skips.append(x)
            for _ in range(blocks):
                x = level(x, width * multiplier)
                skips.append(x)

        x = ResBlock(width * multipliers[-1], dropout, recompute)(x, film)  # middle
        x = AttentionBlock(head_size, recompute)(x, tokens)
        x = ResBlock(width * multipliers[-1], dropout, recompute)(x, film)

        for depth, multiplier in reversed(list(enumerate(multipliers))):  # up: each skip is used once
            for _ in range(blocks + 1):
                skip = skips.pop()
                skip = AttentionGate(width)(x, skip) if gates else skip
                x = level(layers.Concatenate()([x, skip]), width * multiplier)
            if depth:
                x = upsample(x, width * multiplier)

        x = GroupNorm(activation="silu")(x)
        x = layers.Conv2D(channels, 3, padding="same", kernel_initializer="zeros", dtype="float32")(x)
        super().__init__(inputs, x, **kwargs)
        self.arguments = {
            "size": list(shape),
            "channels": channels,
            "width": width,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "attention": list(attention),
            "head_size": head_size,
            "num_labels": num_labels,
            "dropout": dropout,
            "covariates": list(covariates),
            "mask": mask,
            "gates": gates,
            "recompute": recompute,
        }

    def get_config(self):
        return {"name": self.name, **self.arguments}


@register
class DiffusionModel(Reports, keras.Model):
    """A denoising network with the process it inverts: trains it, and answers `denoise(x_t, t, conditions) -> x_0`.

    Args:
        unet: a `UNet`.
        schedule: name in `ldm.diffusion.schedules.SCHEDULES`.
        prediction: what the network says: one of `ldm.diffusion.schedules.PREDICTIONS`.
        drop_conditions: share of training examples that see no condition; of as many others the label alone is unknown,
            of as many a covariate, of as many the mask.
        clip_x_0: clip the predicted x_0 to [-1, 1]; for pixels, never for latents.
        clip_norm: global norm to which gradients are clipped.
        seed: of the noise in training and in validation.
        zero_snr: rescale the schedule so that nothing of the picture is left at t = 1; not with "eps".
        min_snr_gamma: weigh squared errors in x_0 by min(SNR, gamma), in training and in validation; None leaves the
            error of the network's output unweighted. The paper's is 5.
        loss: of the network's output: "mse", "l1" or "huber". Only the first estimates the mean, which is what samplers
            expect of x_0; l1 estimates the median.
        accumulate: parts that a training batch goes through the network in, one after the other, for less memory and
            the same step; divides a replica's rows.
        sigma_data: standard deviation of the data, for the prediction "edm".
    """

    only_validation = tuple(f"loss_t{start}_{start + 25}" for start in (0, 25, 50, 75))  # by quarter of t, in percent

    penalties = {
        "mse": keras.losses.mean_squared_error,
        "l1": keras.losses.mean_absolute_error,
        "huber": keras.losses.huber,
    }

    def __init__(
        self,
        unet,
        schedule="cosine",
        prediction="v",
        drop_conditions=0.1,
        clip_x_0=False,
        clip_norm=1.0,
        seed=0,
        zero_snr=False,
        min_snr_gamma=None,
        loss="mse",
        accumulate=1,
        sigma_data=schedules.SIGMA_DATA,
        **kwargs,
    ):
        super().__init__(**{"autocast": False, **kwargs})  # bfloat16 would round t
        if schedule not in schedules.SCHEDULES:
            raise ValueError(f"schedule must be one of {tuple(schedules.SCHEDULES)}, not {schedule!r}")
        if prediction not in schedules.PREDICTIONS:
            raise ValueError(f"prediction must be one of {schedules.PREDICTIONS}, not {prediction!r}")
        if loss not in self.penalties:
            raise ValueError(f"loss must be one of {tuple(self.penalties)}, not {loss!r}")
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma must be above 0, or None, not {min_snr_gamma}")
        self._schedule = schedules.SCHEDULES[schedule]
        if zero_snr:
            self._schedule = schedules.zero_terminal_snr(self._schedule)
        if prediction == "eps" and float(self._schedule(1.0)[0]) == 0.0:
            raise ValueError("zero terminal SNR needs the prediction v, x_0, flow or edm: eps leaves x_0 open at t = 1")
        self.zero_snr, self.min_snr_gamma, self.penalty, self.accumulate = zero_snr, min_snr_gamma, loss, accumulate
        self.sigma_data = sigma_data
        self.unet, self.schedule_name, self.prediction = unet, schedule, prediction
        self.drop_conditions, self.clip_x_0, self.clip_norm, self.seed = drop_conditions, clip_x_0, clip_norm, seed
        names = ("loss", "gradient_norm", *self.only_validation)
        self.trackers = {name: keras.metrics.Mean(name=name) for name in names}
        self.built = True

    @property
    def data_shape(self):
        """(H, W, C) of what is denoised."""
        return (*self.unet.arguments["size"], self.unet.arguments["channels"])

    @property
    def schedule(self):
        """The function t -> (alpha, sigma), rescaled where `zero_snr` says so."""
        return self._schedule

    def get_config(self):
        names = "prediction drop_conditions clip_x_0 clip_norm seed zero_snr min_snr_gamma accumulate sigma_data"
        config = {name: getattr(self, name) for name in names.split()} | {
            "loss": self.penalty
        }  # Keras has its own self.loss
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
            conditions: {"z" (B,) int32, "label" (B,) int32, "covariates" (B, K) float32, "mask" (B, H, W, 4) float32};
                None, or a missing key, is the unconditional case, an unknown label, unknown covariates, an unknown
                mask.

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
        if "covariates" in self.unet.input:
            unknown = ops.full((rows, self.unet.input["covariates"].shape[-1]), float("nan"))
            inputs["covariates"] = conditions.get("covariates", unknown)
        if "mask" in self.unet.input:
            inputs["mask"] = conditions.get("mask", ops.zeros((rows, *self.data_shape[:2], 4)))
        inputs = {name: ops.convert_to_tensor(value) for name, value in inputs.items()}  # Keras refuses a mixture
        alpha, sigma = self.coefficients(inputs["t"])
        known = (alpha, sigma, self.sigma_data)
        output = self.unet({**inputs, "x": schedules.to_input(self.prediction, inputs["x"], *known)})
        x_0 = schedules.to_x_0(self.prediction, output, inputs["x"], *known)
        return ops.clip(x_0, -1.0, 1.0) if self.clip_x_0 else x_0

    def coefficients(self, t):
        """alpha(t), sigma(t) shaped (B, 1, 1, 1)."""
        return tuple(rearrange(value, "b -> b 1 1 1") for value in self.schedule(t))

    def loss_at(self, batch, t, eps, keep, training):
        """Loss of the network's output at times t (B,) and noise eps: (B,), the mean squared error by default."""
        alpha, sigma = self.coefficients(t)
        x_0 = batch["image"]
        x_t = schedules.add_noise(x_0, eps, alpha, sigma)
        inputs = {
            "x": schedules.to_input(self.prediction, x_t, alpha, sigma, self.sigma_data),
            "t": t,
            "z": batch["z"],
            "label": batch["label"],
            "keep": keep,
            **{name: batch[name] for name in ("covariates", "mask") if name in self.unet.input},
        }
        target = schedules.to_target(self.prediction, x_0, eps, alpha, sigma, self.sigma_data)
        loss = self.penalties[self.penalty](target, self.unet(inputs, training=training))  # (B, H, W)
        if self.min_snr_gamma is not None:
            weight = schedules.min_snr_weight(self.prediction, alpha, sigma, self.min_snr_gamma, self.sigma_data)
            loss = loss * weight[..., 0]
        return ops.mean(loss, axis=(1, 2))

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
        drop = self.drop_conditions
        keep = tf.cast(uniform >= drop, tf.float32)
        alone = (uniform >= 2 * drop) & (uniform < 3 * drop)  # as often, the label alone is unknown
        batch = {**batch, "label": tf.where(alone, -1, batch["label"])}
        if "covariates" in self.unet.input:  # likewise each of them
            kinds = batch["covariates"].shape[-1]
            other = seed + tf.constant([1_000_003, 0])  # a stream of its own
            uniforms = distribution.global_rows(lambda n: tf.random.stateless_uniform((n, kinds), other), shape[0])
            batch = {**batch, "covariates": tf.where(uniforms < drop, np.nan, batch["covariates"])}
        if "mask" in self.unet.input:  # likewise
            known = tf.cast(uniform >= 2 * drop, tf.float32)
            batch = {**batch, "mask": batch["mask"] * rearrange(known, "b -> b 1 1 1")}
        variables = self.unet.trainable_variables

        def learn(batch, t, eps, keep):
            with tf.GradientTape() as tape:
                loss = ops.mean(self.loss_at(batch, t, eps, keep, training=True)) / self.accumulate
                part = distribution.replica_loss(loss)
            return loss, tape.gradient(part, variables)

        if self.accumulate == 1:
            loss, gradients = learn(batch, t, eps, keep)
        else:
            whole = tf.nest.map_structure(
                lambda value: rearrange(value, "(k b) ... -> k b ...", k=self.accumulate), (batch, t, eps, keep)
            )

            def add(i, sums):
                more = learn(*tf.nest.map_structure(lambda value: value[i], whole))
                return i + 1, tf.nest.map_structure(tf.add, sums, more)

            nothing = (0.0, [tf.zeros(v.shape, v.dtype) for v in variables])
            # strictly one after the other: side by side they would need the memory of the whole batch
            _, (loss, gradients) = tf.while_loop(
                lambda i, _: i < self.accumulate, add, (0, nothing), parallel_iterations=1
            )
        norm = distribution.apply_gradients(self.optimizer, gradients, variables, self.clip_norm)
        return distribution.for_logs(self.record({"loss": loss, "gradient_norm": norm}))

    def test_step(self, batch):
        """The losses of a batch with the same times and noise in every epoch, and others in every batch.

        Of the validation split, which comes in the order of its people, a row of a batch may always show the same slice
        index. So with times that depended on the row alone, each slice index would be fake_logits at one time.
        "number" (B,) int32, the batch's, is what they depend on as well; without it there is one batch only.
        """
        rows, batch = distribution.at_least_one_row(batch)
        images = batch["image"]
        shape = (tf.shape(images)[0], *images.shape[1:])
        number = batch["number"][0] if "number" in batch else 0
        t, eps, _ = self.draw(shape, tf.stack([self.seed, -1 - number]))
        each = self.loss_at(batch, t, eps, tf.ones_like(t), training=False)
        quarter = tf.minimum(tf.cast(4.0 * t, tf.int32), 3)
        for i, name in enumerate(self.only_validation):
            here = tf.cast(quarter == i, tf.float32) * tf.cast(rows > 0, tf.float32)
            self.trackers[name].update_state(each, sample_weight=here)
        said = self.record({"loss": ops.mean(each)}, rows)
        return distribution.for_logs(said | {name: self.trackers[name].result() for name in self.only_validation})


# ---- prior over the codes --------------------------------------------------------------------------------------------


@register
class CodePrior(Reports, keras.Model):
    """A causal transformer over the codes of a slice, in raster order: p(codes | z, label), code by code.

    What a VQ-VAE's codes look like (arXiv 1711.00937, section 3.2), here said by a transformer (arXiv 2012.09841). The
    network that predicts a code is told the code before it (a start token for the first), the row and the column where
    it is to stand, the slice index and the label; what came earlier it finds by attention. What it says is added to
    the log frequencies of the codes at that place, where `start_from` has counted them.

    A batch is {"codes" (B, h, w) int32, "z" (B,), "label" (B,)}; the loss is in nats per code.

    Args:
        num_codes: K.
        code_shape: (h, w), as `VQVAE.code_shape`.
        width: features per token.
        depth: number of blocks.
        heads: of attention; divides `width`.
        num_labels: number of labels; 0 does not tell the label.
        dropout: rate on the first features and in the blocks.
        clip_norm: global norm to which gradients are clipped.
        seed: of the dropout.
    """

    segments = 4  # of the loop over the places: attention reads a whole cache, filled or not, so it grows by quarters
    arguments = ("num_codes", "code_shape", "width", "depth", "heads", "num_labels", "dropout", "clip_norm", "seed")

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
        self.num_codes, self.code_shape, self.width = num_codes, list(code_shape), width
        self.depth, self.heads, self.num_labels = depth, heads, num_labels
        self.dropout, self.clip_norm, self.seed = dropout, clip_norm, seed
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
        self.draw = tf.function(self._draw, jit_compile=True)  # caches then grow in place: half the time on a CPU
        self.built = True

    def get_config(self):
        return {"name": self.name, **{argument: getattr(self, argument) for argument in self.arguments}}

    def features(self, previous, condition, places=slice(None)):
        """Codes before those that are asked for, (B, N), at these places of the raster -> (B, N, width)."""
        positions = rearrange(self.row + self.column, "h w c -> (h w) c")[places]
        return self.code(previous) + ops.cast(positions, self.compute_dtype) + condition[:, None]

    def scores(self, x, places=slice(None)):
        """What the blocks say at these places, (B, N, width) -> logits (B, N, K) float32."""
        return self.head(self.norm(x)) + self.log_frequency[places]

    def condition(self, known):
        """What `conditions_of` says of a slice -> (B, width)."""
        condition = self.slice(known["z"])
        return condition if self.label is None else condition + self.label(known["label"] + 1)

    def call(self, inputs, training=False, uniform=None):
        """{"codes" (B, h, w) int32, "z" (B,), "label" (B,)} -> logits (B, h, w, K) float32, each of its own code.

        `uniform` is what `ldm.nets.transformer.dropout` draws from; None drops nothing.
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
        """Codes (B, h, w) int32, conditions as of `conditions_of` -> float32 (B, h, w, K): log p(code | those before
        it) + c.
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
        known = {name: ops.cast(value, "int32") for name, value in conditions_of(z, label).items()}
        uniform = tf.random.stateless_uniform((known["z"].shape[0], math.prod(self.code_shape)), (seed, 0))
        return self.draw(known, uniform, temperature, top_k, top_p)

    def _draw(self, known, uniform, temperature, top_k, top_p):
        rows, length = uniform.shape
        condition = self.condition(known)

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
        """Let the logits start at the log frequencies of the training codes, place by place; the rest learns the rest.

        A network of this kind would take many passes to find these h w K numbers. A place with few slices behind it
        leans on all places' frequencies, and these on the uniform ones.

        Args:
            codes: the training split's, (M, h, w) integers.
            weight: how many slices the frequencies over all places count for.
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

    def train_step(self, batch):
        seed = tf.stack([self.seed, tf.cast(self.optimizer.iterations, tf.int32)])
        uniform = self.numbers(tf.shape(batch["codes"])[0], seed)
        with tf.GradientTape() as tape:
            loss = self.cross_entropy(batch, True, uniform)
            part = distribution.replica_loss(loss)
        variables = self.trainable_variables
        norm = distribution.apply_gradients(self.optimizer, tape.gradient(part, variables), variables, self.clip_norm)
        return distribution.for_logs(self.record({"loss": loss, "bits": loss / math.log(2), "gradient_norm": norm}))

    def test_step(self, batch):
        rows, batch = distribution.at_least_one_row(batch)
        loss = self.cross_entropy(batch)
        return distribution.for_logs(self.record({"loss": loss, "bits": loss / math.log(2)}, rows))
