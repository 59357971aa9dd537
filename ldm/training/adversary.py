"""How a discriminator sharpens a first stage.

    AdversarialTraining   the two, each with its optimizer
    AdversaryWatch        callback: begins once the reconstruction has settled, and turns down what goes wrong
    CodeBank              the code maps seen last, from which new ones are mixed

The first stage itself comes as a value: any autoencoder of `modules` will do.
"""

import keras
import tensorflow as tf
from einops import rearrange
from keras import layers, ops

from ldm.nets.networks import conditions_of
from ldm.nets.saving import register
from ldm.training import distribution, losses
from ldm.training.reports import Reports, leaves_no_trace


@register
class AdversarialTraining(Reports, keras.Model):
    """An autoencoder and a discriminator that sharpens it (arXiv 2012.09841, section 3.1), each with its optimizer.

    Until `begin` is called the autoencoder is trained as by itself. From then on the discriminator learns to tell the
    autoencoder's pictures from real ones, and the autoencoder learns to deceive it, with a weight that rises from 0 to
    its full value over `ramp_steps`. The weight is relative: it makes the adversarial gradient in the decoder's last
    layer `weight` times as long as the reconstruction's (eq. 7 there). The adversarial loss itself never weighs more
    than `cap`.

    Args:
        autoencoder: a `modules.VQVAE` or `modules.VAE`.
        discriminator: a `ldm.nets.networks.Discriminator`.
        weight: of the adversarial loss, relative to the reconstruction's.
        cap: most that the loss itself may weigh.
        ramp_steps: training steps over which the weight rises.
        random_latents: show the discriminator pictures decoded from random latents as well (`random_pictures`).
    """

    names = ("adversarial", "adaptive_weight", "d_real", "d_fake", "d_loss")  # reported by training only

    def __init__(self, autoencoder, discriminator, weight=0.1, cap=0.1, ramp_steps=500, random_latents=False, **kwargs):
        super().__init__(**kwargs)
        self.autoencoder, self.discriminator = autoencoder, discriminator
        self.weight, self.cap, self.ramp_steps = weight, cap, ramp_steps
        self.only_training = (*autoencoder.only_training, *self.names)
        self.only_validation = autoencoder.only_validation
        options = {"shape": (), "trainable": False, "aggregation": "only_first_replica"}
        self.begun = self.add_weight(name="begun", initializer=keras.initializers.Constant(-1.0), **options)
        self.strength = self.add_weight(name="strength", initializer="ones", **options)  # turned down by the callback
        self.random_latents, self.bank = random_latents, None
        if random_latents and autoencoder.bottleneck.num_codes:
            self.bank = CodeBank(512, autoencoder.bottleneck.code_shape)
        self.trackers = {name: keras.metrics.Mean(name=name) for name in self.names}
        self.active, self.built = False, True

    def for_use(self):
        return self.autoencoder

    def learned(self):
        return self.autoencoder.trainable_variables

    @property
    def metrics(self):
        return [*self.trackers.values(), *self.autoencoder.metrics]

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

        Where latents are named by codes, `CodeBank` mixes the codes of the slices of the same index seen last.
        Elsewhere latents are Gaussian noise with the mean and the standard deviation of this batch's latents.
        """
        seed = tf.stack([self.autoencoder.seed + 1, tf.cast(step, tf.int32)])
        rows = tf.shape(batch["z"])[0]
        if self.bank is not None:
            codes, everyone = (distribution.gather_rows(part) for part in (state["codes"], batch["z"]))
            self.bank.remember(codes, everyone)
            latents = self.autoencoder.bottleneck.latents_of(distribution.own_rows(self.bank.mix(everyone, seed), rows))
        else:
            mean, std = distribution.moments(state["latents"])
            latents = mean + std * distribution.normal((rows, *self.autoencoder.latent_shape), seed)
        return self.autoencoder.decoder(
            {"latents": latents, **conditions_of(batch["z"], batch["label"])}, training=True
        )["image"]

    def adaptive_weight(self, tape, reconstruction, adversarial):
        """Ratio of the two losses' gradients in the decoder's last layer (arXiv 2012.09841, eq. 7), at most the cap."""
        last = self.autoencoder.decoder.get_layer("to_image").kernel
        scale = distribution.loss_scale(self.optimizer)
        norms = [
            tf.norm(distribution.sum_over_replicas(tape.gradient(loss, last))) / scale
            for loss in (reconstruction, adversarial)
        ]
        return tf.minimum(self.weight * norms[0] / (norms[1] + 1e-8), self.cap)

    @leaves_no_trace
    def train_step(self, batch):
        autoencoder, step = self.autoencoder, self.optimizer.iterations
        batch = autoencoder.cropped(batch)
        ramp = (tf.cast(step, tf.float32) + 1.0 - tf.convert_to_tensor(self.begun)) / self.ramp_steps
        ramp = tf.clip_by_value(ramp, 0.0, 1.0)
        own = dict.fromkeys(self.names, 0.0)
        with tf.GradientTape(persistent=True) as tape:
            values, fake, state = autoencoder.forward(batch, step, training=True)
            parts, weights = [distribution.replica_loss(values["loss"], self.optimizer)], [tf.constant(1.0)]
            if self.active:
                fakes = [fake, self.random_pictures(batch, state, step)] if self.random_latents else [fake]
                adversarial = losses.hinge_generator([self.discriminate(picture, batch) for picture in fakes])
                parts.append(distribution.replica_loss(adversarial, self.optimizer))
        if self.active:
            own |= {"adversarial": ramp, "adaptive_weight": self.adaptive_weight(tape, *parts)}
            weights.append(own["adaptive_weight"] * ramp * tf.convert_to_tensor(self.strength))
        gradients = tape.gradient(parts, self.learned(), output_gradients=weights)
        norm = distribution.apply_gradients(self.optimizer, gradients, self.learned(), autoencoder.clip_norm)
        autoencoder.update_bottleneck(state, batch, step)
        if self.active:
            own |= self.train_discriminator(batch, fakes)
        autoencoder.record({**values, "gradient_norm": norm})
        self.record(own)
        return distribution.for_logs(self.report(training=True))

    def train_discriminator(self, batch, fakes):
        """One step of the discriminator against pictures that are held fixed; returns what it reports.

        The mean logit that is reported for fakes, "d_fake", is that of reconstructions alone: pictures from random
        latents are so easy to tell from real ones that a mean over both would hide a discriminator that has given up
        on the reconstructions.
        """
        variables = self.discriminator.trainable_variables
        with tf.GradientTape() as tape:
            real = self.discriminate(batch["image"], batch)
            fake_logits = [self.discriminate(tf.stop_gradient(picture), batch) for picture in fakes]
            loss = losses.hinge_discriminator(real, fake_logits)
            part = distribution.replica_loss(loss, self.discriminator_optimizer)
        gradients = tape.gradient(part, variables)
        distribution.apply_gradients(self.discriminator_optimizer, gradients, variables, self.autoencoder.clip_norm)
        return {"d_real": ops.mean(real), "d_fake": ops.mean(fake_logits[0]), "d_loss": loss}

    def test_step(self, batch):
        return self.autoencoder.test_step(batch)


# Stated here, and named in the lines that are printed when they are crossed.
SETTLED = 0.1  # the last two epochs lowered the best reconstruction by less than this share of the first one
GAP = 0.05  # a discriminator whose mean logits of real and fake differ by less says nothing
DROP = 0.02  # most foreground SSIM on the validation people that sharpness may cost


def settled(reconstructions):
    """Whether the last two epochs lowered the least value before them by less than `SETTLED` of the first value.

    Two, because a single epoch may be unlucky while the learning rate is high. Of the first value, because the learning
    rate decays over the whole training, and so the relative gains do not end before it does.
    """
    if len(reconstructions) < 3:
        return False
    return min(reconstructions[:-2]) - min(reconstructions[-2:]) < SETTLED * reconstructions[0]


def is_constant(d_real, d_fake):
    """Whether the discriminator's mean logits of real and of fake pictures are the same, for all that matters."""
    return abs(d_real - d_fake) < GAP


class AdversaryWatch(keras.callbacks.Callback):
    """Begins adversarial training once the reconstruction has settled; halves its weight where it does harm.

    Harm is a discriminator that has become constant, so that its gradient means nothing; or a foreground SSIM on the
    validation people that has dropped by more than `DROP` below the best before adversarial training began. Each is
    said in one line.

    Args:
        read: callable -> rows of the epochs before an interruption, {column: value}.
        trained: whether the autoencoder was trained before: then one epoch, to compare with, is enough.
    """

    def __init__(self, read=list, trained=False):
        super().__init__()
        self.read, self.trained = read, trained

    def on_train_begin(self, logs=None):
        self.rows = self.read()

    def on_epoch_end(self, epoch, logs=None):
        self.rows.append(dict(logs))
        if not self.model.active:
            if self.trained or settled([row["val_reconstruction"] for row in self.rows]):
                self.model.begin()
                why = f"epochs {epoch} and {epoch + 1} gained less than a tenth of the first"
                print(f"adversarial training begins: {'the first stage is a trained one' if self.trained else why}")
            return
        if logs["adversarial"] < 1.0:  # still on its way up
            return
        before = max(row["val_foreground_ssim"] for row in self.rows if row["adversarial"] == 0.0)
        if is_constant(logs["d_real"], logs["d_fake"]):
            self.turn_down(f"the discriminator has become constant ({logs['d_real']:.2f} for real and fake alike)")
        elif logs["val_foreground_ssim"] < before - DROP:
            self.turn_down(
                f"foreground SSIM of the validation people is {logs['val_foreground_ssim']:.3f}, more than {DROP} "
                f"below the {before:.3f} before"
            )

    def turn_down(self, reason):
        strength = float(keras.ops.convert_to_numpy(self.model.strength)) / 2
        self.model.strength.assign(strength)
        print(f"adversarial weight turned down to {strength:g} of its value: {reason}")

    def on_train_end(self, logs=None):
        if self.rows and not any(row["adversarial"] == 1.0 for row in self.rows):
            print("adversarial training never came to its full weight: give it more epochs with --epochs")


class CodeBank(layers.Layer):
    """The code maps seen last: a histogram of codes per position and slice index, kept as examples, and mixed.

    A new map takes, at each position, the code that a random example of the same slice index has there, each
    position by itself: anatomy stays where it is, and nothing ties neighbours together. It is the weakest prior that
    knows about places.

    Args:
        capacity: M, number of code maps kept.
        shape: (h, w) of a code map.
    """

    def __init__(self, capacity, shape, **kwargs):
        # 64 bits, because TensorFlow keeps 32-bit integer variables off the GPU, where XLA cannot reach them.
        super().__init__(**{**kwargs, "autocast": False})
        self.capacity, self.shape = capacity, tuple(shape)
        options = {"trainable": False, "initializer": "zeros", "aggregation": "only_first_replica", "dtype": "int64"}
        self.maps = self.add_weight(shape=(capacity, *self.shape), name="maps", **options)
        self.z = self.add_weight(shape=(capacity,), name="z", **options)
        self.seen = self.add_weight(shape=(), name="seen", **options)
        self.built = True

    def remember(self, codes, z):
        """Keep code maps (B, h, w) int32 of the slice indices z (B,), the same on all replicas; B <= M."""
        rows = tf.shape(z, out_type=tf.int64)[0]
        places = ((tf.convert_to_tensor(self.seen) + tf.range(rows, dtype=tf.int64)) % self.capacity)[:, None]
        codes, z = tf.cast(codes, tf.int64), tf.cast(z, tf.int64)
        self.maps.assign(tf.tensor_scatter_nd_update(tf.convert_to_tensor(self.maps), places, codes))
        self.z.assign(tf.tensor_scatter_nd_update(tf.convert_to_tensor(self.z), places, z))
        self.seen.assign(tf.convert_to_tensor(self.seen) + rows)

    def mix(self, z, seed):
        """Slice indices (B,), of each of which an example is kept -> code maps (B, h, w) int32.

        Args:
            seed: two integers; equal seeds mix equally.
        """
        kept = tf.range(self.capacity, dtype=tf.int64) < tf.convert_to_tensor(self.seen)
        same = kept & (tf.convert_to_tensor(self.z) == tf.cast(z, tf.int64)[:, None])
        height, width = self.shape
        logits = tf.where(same, 0.0, -1e9)
        example = tf.random.stateless_categorical(logits, height * width, seed, dtype=tf.int32)  # (B, h w)
        position = tf.broadcast_to(tf.range(height * width), tf.shape(example))
        flat = rearrange(tf.convert_to_tensor(self.maps), "m h w -> m (h w)")
        drawn = tf.gather_nd(flat, tf.stack([example, position], axis=-1))
        return rearrange(tf.cast(drawn, tf.int32), "b (h w) -> b h w", h=height)
