"""What adversarial training needs besides its two networks: when it starts, when it is turned down, random codes.

AdversaryWatch     callback: begins once the reconstruction has settled, and turns down what goes wrong
CodeBank           the code maps seen last, from which new ones are mixed
"""

import keras
import tensorflow as tf
from einops import rearrange
from keras import layers

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
    """

    def __init__(self, read=list):
        super().__init__()
        self.read = read

    def on_train_begin(self, logs=None):
        self.rows = self.read()

    def on_epoch_end(self, epoch, logs=None):
        self.rows.append(dict(logs))
        if not self.model.active:
            if settled([row["val_reconstruction"] for row in self.rows]):
                self.model.begin()
                print(
                    f"adversarial training begins: epochs {epoch} and {epoch + 1} gained less than a tenth of the first"
                )
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
    """The code maps seen last: a histogram of codes per position and slice index, kept as examples, and drawn from.

    To draw a code for a position is to take the one that a random example of the same slice index has there, each
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

    def draw(self, z, seed):
        """Slice indices (B,), of each of which an example is kept -> code maps (B, h, w) int32.

        Args:
            seed: two integers; equal seeds draw equally.
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
