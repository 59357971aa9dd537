"""The models of both stages, with their losses and their `train_step`s.

    VQVAE, VAE       first stage: images <-> latents, through a codebook or through a Gaussian
    DiffusionModel   second stage: a U-Net with its schedule and its prediction, and denoise(x_t, t) -> x_0

Their networks are built in `ldm.nets`, the `UNet` in `ldm.nets.unet`. Three more models have a `train_step` elsewhere:
a first stage against a discriminator in `ldm.training.adversary`, the transformer over codes in `ldm.training.prior`,
and the network whose features an evaluation compares, `features.FeatureNet`.

Networks are built of `keras.ops` and run on every Keras backend; `train_step` and `test_step` are TensorFlow's.
A batch is {"image" (B, H, W, C), "z" (B,), "label" (B,), "case" (B,)}; its "image" may be latents. Where they are used,
it also holds "covariates" (B, K); "mask", for a first stage tissue classes (B, H, W), for diffusion tissue fractions
(B, H, W, 4); "augmented" (B,), 1 or 0, whether latents are of an augmented view; and, in validation, "number" (B,),
which batch of the dataset it is.
"""

import functools
import math

import keras
import numpy as np
import tensorflow as tf
from einops import rearrange
from keras import ops

from ldm.cropping import CropBox
from ldm.diffusion import schedules
from ldm.nets import bottlenecks
from ldm.nets.networks import conditions_of, decoder, encoder
from ldm.nets.saving import Recorded, register
from ldm.nets.unet import UNet
from ldm.training import corruption, distribution, losses
from ldm.training.reports import Reports, leaves_no_trace

__all__ = ["VAE", "VQVAE", "DiffusionModel", "UNet"]

# ---- first stage -----------------------------------------------------------------------------------------------------


class Autoencoder(Recorded, Reports, keras.Model):
    """What VQ-VAE and KL-VAE share: networks, latent normalisation, training loop.

    A subclass chooses the bottleneck between encoder and decoder (`assemble`), and how much its losses weigh
    (`bottleneck_weights`).

    The first and last layers trade patches of pixels for channels, so that no convolution runs at full resolution,
    where most of the cost and little of the content would be. For the same reason the networks see only what lies in a
    crop box, if one is given: outside it everything is black. Cropping and padding happen in here, so all others deal
    with whole pictures.

    Args:
        image_size: pixels a side.
        crop_box: (top, left, height, width) in pixels of what the networks see, sides divisible by the downsampling;
            None is the whole picture.
        downsampling: image pixels per latent pixel, along one side: 2, 4, 8, 16 or 32.
        patch: side of the patches that the first and last layers trade for channels: 2 or 4, at most `downsampling`.
        width: channels of the first level; they double per level, up to 256 or `width` if that is more.
        blocks: residual blocks per level.
        latent_channels: C.
        condition_on_z: whether encoder and decoder know the slice index.
        num_labels: number of labels, if they know the label; 0 if they do not.
        tissues: number of tissue classes that the decoder names beside the picture; 0 names none.
        structure_weight: weight of 1 - SSIM in the reconstruction loss, beside L1 and MSE.
        texture_weight: weight there of `losses.texture_difference`, when it has risen; 0 leaves it out.
        histogram_weight: the same of `losses.histogram_difference`.
        tissue_weight: weight of the tissues' cross-entropy.
        clip_norm: global norm to which gradients are clipped.
        seed: of all randomness in training.
    """

    only_training = (*Reports.only_training, "revived")
    only_validation = ("foreground_ssim", "active_units")

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
        texture_weight=0.0,
        histogram_weight=0.0,
        tissue_weight=0.05,
        clip_norm=1.0,
        seed=0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.remember(locals())
        self.crop_box = CropBox(*(crop_box or (0, 0, image_size, image_size)))
        if downsampling not in (2, 4, 8, 16, 32):
            raise ValueError(f"downsampling must be a power of two from 2 to 32, not {downsampling}")
        height, columns = self.crop_box.shape
        if height % downsampling or columns % downsampling:
            raise ValueError(f"{height}x{columns} pixels are not divisible by the downsampling {downsampling}")
        if patch not in (2, 4) or patch > downsampling:
            raise ValueError(f"patch must be 2 or 4 and at most the downsampling {downsampling}, not {patch}")

    def assemble(self, kind, **options):
        """Make the networks, and between them a bottleneck of that kind with these options."""
        levels = (self.downsampling // self.patch).bit_length()
        widths = [max(self.width, min(self.width * 2**level, 256)) for level in range(levels)]
        known, outputs = (self.condition_on_z, self.num_labels), kind.outputs * self.latent_channels
        self.encoder = encoder(self.crop_box.shape, self.patch, widths, self.blocks, outputs, *known)
        self.decoder = decoder(self.latent_shape, self.patch, widths, self.blocks, self.tissues, *known)
        statistics = {"shape": (self.latent_channels,), "trainable": False, "aggregation": "only_first_replica"}
        self.latent_mean = self.add_weight(name="latent_mean", initializer="zeros", **statistics)
        self.latent_std = self.add_weight(name="latent_std", initializer="ones", **statistics)
        self.bottleneck = kind(self.latent_shape, **options)
        names = ["loss", "reconstruction", "foreground_ssim", "gradient_norm", *kind.loss_names]
        names += ["tissue"] if self.tissues else []
        self.trackers = {name: keras.metrics.Mean(name=name) for name in names}
        self.built = True

    @property
    def latent_shape(self):
        """(h, w, C) of one slice's latents."""
        return (*(side // self.downsampling for side in self.crop_box.shape), self.latent_channels)

    # -- the contract of the first stage: images <-> normalised latents

    def encode(self, images, z, label=None):
        """Images (B, H, W, 1) in [-1, 1] -> normalised latents (B, h, w, C), no sampling.

        Args:
            images: whole pictures.
            z: (B,) slice indices.
            label: (B,) int32, -1 = unknown; None where all are unknown.
        """
        return (self.raw_latents(images, z, label) - self.latent_mean) / self.latent_std

    def decode(self, latents, z, label=None):
        """Normalised latents (B, h, w, C) and conditions as for `encode` -> images (B, H, W, 1) in [-1, 1]."""
        return self.pad(ops.clip(self._decoded(latents, z, label)["image"], -1.0, 1.0), -1.0)

    def decode_tissue(self, latents, z, label=None):
        """As `decode`, for a model with tissues -> the likeliest class of each pixel, (B, H, W) int32."""
        return self.pad(ops.argmax(self._decoded(latents, z, label)["tissue"], axis=-1), 0)

    def reconstruct(self, images, z, label=None):
        """Images (B, H, W, 1) in [-1, 1] and conditions as for `encode` -> what is left of them after `decode`."""
        return self.decode(self.encode(images, z, label), z, label)

    def raw_latents(self, images, z, label=None):
        """As `encode`, before normalisation."""
        return self.bottleneck.latents(self.encoder({"image": self.crop(images), **conditions_of(z, label)}))

    def from_normalised(self, latents):
        """Normalised latents -> raw ones, float32."""
        return ops.cast(latents, "float32") * self.latent_std + self.latent_mean

    def _decoded(self, latents, z, label):
        latents = self.bottleneck.quantized(self.from_normalised(latents))
        return self.decoder({"latents": latents, **conditions_of(z, label)})

    def crop(self, images):
        """(B, H, W, ...) -> what the networks see of it."""
        return self.crop_box.crop(images)

    def pad(self, images, value):
        """Put pictures back where `crop` took them from.

        Everything outside the box becomes `value`, and so does a thin rim inside it, but not where the box ends with
        the picture. A box that was laid around the brains (`CropBox.around`) is empty there, and the decoder makes
        specks there, since its convolutions see zeros beyond the edge.

        Args:
            images: (B, h, w, ...), as `crop` returns them.
            value: a number.

        Returns:
            Whole pictures, (B, H, W, ...).
        """
        rim = min(self.patch, CropBox.room(self.image_size))
        return self.crop_box.pad(images, value, self.image_size, rim)

    def cropped(self, batch):
        """A batch of whole pictures -> the same with what the networks see of them."""
        return batch | {key: self.crop(batch[key]) for key in ("image", "mask") if key in batch}

    def measure_latents(self, dataset):
        """Set the latents' mean and standard deviation per channel from the batches of the training split."""
        encode = tf.function(self.raw_latents, reduce_retracing=True, autograph=False)
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

    def call(self, inputs, training=False):
        """{"image", "z", "label"} -> reconstruction, quantised where there is a codebook; not clipped."""
        conditions = conditions_of(inputs["z"], inputs["label"])
        encoded = self.encoder({"image": self.crop(inputs["image"]), **conditions}, training=training)
        latents, _, _ = self.bottleneck(encoded)
        return self.pad(self.decoder({"latents": latents, **conditions}, training=training)["image"], -1.0)

    @leaves_no_trace
    def train_step(self, batch):
        batch, step = self.cropped(batch), self.optimizer.iterations
        with tf.GradientTape() as tape:
            values, _, state = self.forward(batch, step, training=True)
            loss = distribution.replica_loss(values["loss"], self.optimizer)
        gradients = tape.gradient(loss, self.trainable_variables)
        norm = distribution.apply_gradients(self.optimizer, gradients, self.trainable_variables, self.clip_norm)
        self.update_bottleneck(state, batch, step)
        self.record({**values, "gradient_norm": norm})
        return distribution.for_logs(self.report(training=True))

    def forward(self, batch, step, training):
        """One pass over a cropped batch.

        Args:
            step: number of finished training steps, an integer tensor.

        Returns:
            {name: loss}, "loss" being the sum of all others; reconstructed images, not clipped; the bottleneck's state.
        """
        images, conditions = batch["image"], conditions_of(batch["z"], batch["label"])
        normal = functools.partial(distribution.normal, seed=self.seed_at(step)) if training else None
        encoded = self.encoder({"image": images, **conditions}, training=training)
        latents, extra, state = self.bottleneck(encoded, normal=normal)
        latents = self.disturbed(latents, step) if training else latents
        outputs = self.decoder({"latents": latents, **conditions}, training=training)
        reconstruction = self.compare(images, outputs["image"], losses.texture_share(step) if training else 1.0)
        extra = {name: self.bottleneck_weights(step, training)[name] * loss for name, loss in extra.items()}
        if self.tissues:
            known = None
            # One replica may hold all slices that have masks, so each must divide by what the global batch has. It is
            # the mean over replicas and not the sum, since `replica_loss` divides by their number once more.
            if training:
                known = distribution.mean_over_replicas(tf.reduce_sum(tf.cast(batch["mask"] >= 0, tf.float32)))
            extra["tissue"] = self.tissue_weight * losses.segmentation(outputs["tissue"], batch["mask"], known)
        values = {"loss": reconstruction + sum(extra.values()), "reconstruction": reconstruction, **extra}
        return values, outputs["image"], state

    def disturbed(self, latents, step):
        """Latents (B, h, w, C) -> what the decoder sees of them in training; here, themselves."""
        return latents

    def compare(self, real, fake, share=1.0):
        """The reconstruction loss: L1 + MSE + weight (1 - SSIM) + share (weight texture + weight histograms)."""
        loss = losses.mean_absolute(real, fake) + losses.mean_squared(real, fake)
        loss += self.structure_weight * losses.structural_dissimilarity(real, fake)
        if self.texture_weight:
            loss += share * self.texture_weight * losses.texture_difference(real, fake)
        if self.histogram_weight:
            loss += share * self.histogram_weight * losses.histogram_difference(real, fake)
        return loss

    def bottleneck_weights(self, step, training):
        """{name: weight} of the bottleneck's losses at a training step; at their full value in validation."""
        raise NotImplementedError

    def seed_at(self, step):
        """A seed for each training step, two integers."""
        return tf.stack([self.seed, tf.cast(step, tf.int32)])

    def update_bottleneck(self, state, batch, step):
        """What a training step changes besides the weights that have gradients: codebook and metrics."""
        pick = functools.partial(distribution.random_rows, seed=self.seed_at(step))
        if self.encoder.trainable:  # a frozen one keeps its codes, too
            self.bottleneck.update(state, total=distribution.sum_over_replicas, pick=pick)
        self.bottleneck.watch(state, batch["image"])

    def test_step(self, batch):
        batch = self.cropped(batch)
        rows, padded = distribution.at_least_one_row(batch)
        values, fake, state = self.forward(padded, 0, training=False)
        self.bottleneck.watch({name: part[:rows] for name, part in state.items()}, batch["image"])
        similarity, brain = losses.foreground_ssim(padded["image"], fake)
        self.trackers["foreground_ssim"].update_state(similarity[:rows], sample_weight=brain[:rows])
        self.record(values, rows)
        return distribution.for_logs(self.report(training=False))


@register
class VQVAE(Autoencoder):
    """VQ-VAE (arXiv 1711.00937), with a learned codebook or a fixed grid of codes.

    `encode` returns the latents before quantisation, `decode` quantises: a diffusion model then works in a continuous
    space, and its small errors vanish in the codebook (arXiv 2112.10752, section 3.1).

    Args:
        quantizer: "ema", a codebook of moving averages with revival of dead codes; or "fsq", finite scalar
            quantisation.
        num_codes: size of the learned codebook; a grid has as many as its levels make.
        cosine: the learned codebook compares directions only.
        levels: of finite scalar quantisation, one per channel of a code.
        codes_per_latent: each latent is cut into so many parts, and each part has a code of its own, out of one
            codebook (product quantisation, Jegou et al., doi:10.1109/TPAMI.2010.57).
        commitment: weight of the loss that keeps the encoder near its learned codes (beta, 0.25 in the paper).
        Others: as `Autoencoder`; with "fsq", `latent_channels` is always `codes_per_latent * len(levels)`.
    """

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
        self.remember(locals())
        if quantizer == "ema":
            options = {"num_codes": num_codes, "codes_per_latent": codes_per_latent, "cosine": cosine}
            self.assemble(bottlenecks.Codebook, **options)
        else:
            self.assemble(bottlenecks.Grid, levels=levels, codes_per_latent=codes_per_latent)
        self.num_codes = self.bottleneck.num_codes

    def bottleneck_weights(self, step, training):
        return {"commitment": self.commitment}

    @property
    def code_shape(self):
        """(h, w * codes_per_latent), the shape of one slice's codes."""
        return self.bottleneck.code_shape

    @property
    def bits_per_slice(self):
        """Bits that name one slice's codes."""
        return math.prod(self.code_shape) * math.log2(self.num_codes)

    def codes(self, latents):
        """Normalised latents (B, h, w, C), as `encode` returns them -> codes (B, *code_shape) int32."""
        return self.bottleneck.codes(self.from_normalised(latents))

    def latents_of(self, codes):
        """Codes (B, *code_shape) int32 -> their normalised latents (B, h, w, C)."""
        return (self.bottleneck.latents_of(codes) - self.latent_mean) / self.latent_std

    def count_codes(self, dataset):
        """How often each code is used in the dataset, (num_codes,) int64."""
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
        latent_noise: most noise on what the decoder sees in training, in standard deviations of the latents. A second
            stage errs in each latent, and a decoder that has seen nothing but exact ones makes specks of its errors.
        Others: as `Autoencoder`.
    """

    def __init__(self, image_size, kl_weight=1e-6, kl_cycles=4, kl_cycle_steps=0, latent_noise=0.0, **kwargs):
        super().__init__(image_size, **kwargs)
        self.remember(locals())
        self.assemble(bottlenecks.Gaussian)

    def bottleneck_weights(self, step, training):
        share = losses.cyclical(step, self.kl_cycles, self.kl_cycle_steps) if training else 1.0
        return {"kl": self.kl_weight * share}

    def disturbed(self, latents, step):
        """Latents with noise, of a level of its own for each slice, uniform in [0, `latent_noise`]."""
        if not self.latent_noise:
            return latents
        rows, *shape = tf.shape(latents)[0], *latents.shape[1:]
        first, second = tf.unstack(tf.random.experimental.stateless_split(self.seed_at(step), 2))
        level = distribution.global_rows(lambda n: tf.random.stateless_uniform((n, 1, 1, 1), first), rows)
        _, deviation = distribution.moments(tf.stop_gradient(latents))
        return latents + self.latent_noise * level * deviation * distribution.normal((rows, *shape), second)


# ---- second stage ----------------------------------------------------------------------------------------------------


@register
class DiffusionModel(Recorded, Reports, keras.Model):
    """A denoising network with the process it inverts: trains it, and answers `denoise(x_t, t, conditions) -> x_0`.

    Args:
        unet: a `UNet`.
        schedule: name in `ldm.diffusion.schedules.SCHEDULES`.
        prediction: what the network's output is: one of `ldm.diffusion.schedules.PREDICTIONS`.
        drop_conditions: share of the training examples whose conditions are all hidden, as guidance needs it;
            `ldm.training.corruption.hide` tells what else is hidden as often.
        clip_x_0: the range of the data to which the predicted x_0 is clipped (`threshold`): True for pixels, [-1, 1];
            for latents (lows, highs), C numbers each; False for none.
        clip_norm: global norm to which gradients are clipped.
        seed: of the noise in training and in validation.
        zero_snr: rescale the schedule so that nothing of the picture is left at t = 1; not with "eps".
        min_snr_gamma: weigh squared errors in x_0 by min(SNR, gamma), in training and in validation; None leaves the
            error of the network's output unweighted. The paper's is 5. For the loss "mse": a run's settings refuse it
            with any other.
        loss: of the network's output: "mse", "l1" or "huber". Only the first estimates the mean, which is what samplers
            expect of x_0; l1 estimates the median.
        accumulate: number of parts into which a training batch is cut, one after the other, to save memory; the step
            stays the same. The rows of a replica must be a multiple of it.
        sigma_data: standard deviation of the data, for the prediction "edm".
    """

    renamed = {"schedule": "schedule_name", "loss": "penalty"}  # `loss` is Keras' own
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
        self.remember(locals())
        self._schedule = schedules.SCHEDULES[schedule]
        if zero_snr:
            self._schedule = schedules.zero_terminal_snr(self._schedule)
        if prediction == "eps" and float(self._schedule(1.0)[0]) == 0.0:
            raise ValueError(
                "zero terminal SNR needs the prediction v, eps_v, x_0, flow or edm: eps leaves x_0 open at t = 1"
            )
        self.extra_conditions = [name for name in ("covariates", "mask", "augmented") if name in unet.input]
        names = ("loss", "gradient_norm", *self.only_validation)
        self.trackers = {name: keras.metrics.Mean(name=name) for name in names}
        self.built = True

    @property
    def data_shape(self):
        """(H, W, C) of what is denoised."""
        return (*self.unet.size, self.unet.channels)

    @property
    def schedule(self):
        """The function t -> (alpha, sigma), rescaled where `zero_snr` asks for it."""
        return self._schedule

    def get_config(self):
        return {**super().get_config(), "unet": keras.saving.serialize_keras_object(self.unet)}

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
            conditions: {"z" (B,) int32, "label" (B,) int32, "covariates" (B, K) float32, "mask" (B, H, W, 4) float32}.
                Label, covariates and mask are unknown where their key is missing; without "z" all conditions are
                hidden, which is the unconditional case, as is None.

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
        if "covariates" in self.extra_conditions:
            unknown = ops.full((rows, self.unet.input["covariates"].shape[-1]), float("nan"))
            inputs["covariates"] = conditions.get("covariates", unknown)
        if "mask" in self.extra_conditions:
            inputs["mask"] = conditions.get("mask", ops.zeros((rows, *self.data_shape[:2], 4)))
        if "augmented" in self.extra_conditions:  # samples are slices as they were scanned
            inputs["augmented"] = ops.zeros((rows,))
        inputs = {name: ops.convert_to_tensor(value) for name, value in inputs.items()}  # of NumPy arrays and tensors
        alpha, sigma = self.coefficients(inputs["t"])
        known = (alpha, sigma, self.sigma_data)
        output = self.unet({**inputs, "x": schedules.to_input(self.prediction, inputs["x"], *known)})
        x_0 = schedules.to_x_0(self.prediction, output, inputs["x"], *known)
        return self.threshold(x_0, inputs["t"])

    def threshold(self, x_0, t):
        """Clip x_0 (B, H, W, C) at the times t (B,) to the range of the data, widened where noise prevails.

        A network's x_0 is unsure by about sigma / alpha times its error in eps. Clipped to the range itself, an unsure
        background of -1 could only become brighter. So the range is wider on both sides by min(sigma / alpha, 1) times
        half its width: by nothing at t = 0, and by as much as it takes to keep an eps without skip from exploding.
        """
        if not self.clip_x_0:
            return x_0
        low, high = ((-1.0,), (1.0,)) if self.clip_x_0 is True else self.clip_x_0
        low, high = (ops.convert_to_tensor(edge, "float32") for edge in (low, high))
        alpha, sigma = self.coefficients(ops.convert_to_tensor(t))
        margin = sigma / ops.maximum(sigma, alpha) * (high - low) / 2.0
        return ops.minimum(ops.maximum(x_0, low - margin), high + margin)

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
            **{name: batch[name] for name in self.extra_conditions},
        }
        target = schedules.to_target(self.prediction, x_0, eps, alpha, sigma, self.sigma_data)
        output = self.unet(inputs, training=training)
        if self.min_snr_gamma is None:
            scale = schedules.error_scale(self.prediction, alpha, sigma)
            loss = self.penalties[self.penalty](scale * target, scale * output)  # (B, H, W)
        else:
            weight = schedules.min_snr_weight(self.prediction, alpha, sigma, self.min_snr_gamma, self.sigma_data)
            loss = weight[..., 0] * self.penalties[self.penalty](target, output)
        return ops.mean(loss, axis=(1, 2))

    @leaves_no_trace
    def train_step(self, batch):
        images = batch["image"]
        shape = (tf.shape(images)[0], *images.shape[1:])  # rows on this replica
        seed = tf.stack([self.seed, tf.cast(self.optimizer.iterations, tf.int32)])
        t, eps, uniform = corruption.randomness(shape, seed)
        batch, keep = corruption.hide(batch, self.extra_conditions, self.drop_conditions, uniform, seed)
        variables = self.unet.trainable_variables

        def learn(batch, t, eps, keep):
            with tf.GradientTape() as tape:
                loss = ops.mean(self.loss_at(batch, t, eps, keep, training=True)) / self.accumulate
                part = distribution.replica_loss(loss, self.optimizer)
            return loss, tape.gradient(part, variables)

        loss, gradients = distribution.accumulated(learn, (batch, t, eps, keep), self.accumulate, variables)
        norm = distribution.apply_gradients(self.optimizer, gradients, variables, self.clip_norm)
        self.record({"loss": loss, "gradient_norm": norm})
        return distribution.for_logs(self.report(training=True))

    def test_step(self, batch):
        """Each validation batch has its own times and noise, the same in every epoch.

        They are seeded by the batch's "number" (B,) int32. Without it all batches would share one draw; and since the
        validation split comes in the order of its people, so that a row of a batch may always show the same slice
        index, each slice index would be judged at one noise level only.
        """
        rows, batch = distribution.at_least_one_row(batch)
        images = batch["image"]
        shape = (tf.shape(images)[0], *images.shape[1:])
        number = batch["number"][0] if "number" in batch else 0
        t, eps, _ = corruption.randomness(shape, tf.stack([self.seed, -1 - number]))
        each = self.loss_at(batch, t, eps, tf.ones_like(t), training=False)
        quarter = tf.minimum(tf.cast(4.0 * t, tf.int32), 3)
        for i, name in enumerate(self.only_validation):
            here = tf.cast(quarter == i, tf.float32) * tf.cast(rows > 0, tf.float32)
            self.trackers[name].update_state(each, sample_weight=here)
        self.record({"loss": ops.mean(each)}, rows)
        return distribution.for_logs(self.report(training=False))
