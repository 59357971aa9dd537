"""Slices as features, in which sets of slices are compared: what `evaluate.py` and `train.py --select kid` judge by.

FeatureNet   a small network that has seen training slices only, and never a generated one
of_run       those that belong to a run and its people, trained where they are not there yet
names_of     which these are: distances of two runs compare only in the features of the same networks
inception    Inception-v3, for those who want numbers as other papers have them
"""

import functools
import hashlib
import json
import shutil
import zipfile

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

import dataset
from ldm import batches
from ldm.data import pixels
from ldm.nets.layers import GroupNorm, ResBlock, SpaceToDepth, downsample
from ldm.nets.saving import Recorded, register
from ldm.training import distribution, losses, optimizers, runs

BATCH = 32
STEPS = 400
SEEDS = 3  # networks that an evaluation asks: what one of them thinks important is chance, in part
PLACES = 4  # a feature is of one of so many places down, and as many across


def of_run(run, source, image_size, steps=STEPS, progress=lambda: None, seeds=1):
    """The run's feature networks, trained first where they are not there for just these people, this size, these steps.

    Those of another run in the same folder are taken over where they fit, so that the distances of both runs compare.

    Args:
        run: folder, of its `features_0.keras`, `features_1.keras`, ...
        source: a `dataset.Source`.
        image_size: pixels a side.
        steps: of training, with batches of BATCH slices.
        progress: called after each of these steps.
        seeds: how many networks there are, each from a seed of its own.

    Returns:
        Function of images (N, H, W, 1) in [0, 1] -> features (N, seeds * D), those of one network after those of
        another, and the slice index as the networks see it, on average (N,).
    """
    splits = {split: part["cases"] for split, part in source.manifest()["splits"].items()}
    key = hashlib.sha256(repr((splits, (image_size, image_size), steps, source.label_names)).encode()).hexdigest()
    models, train = [], None
    for seed in range(seeds):
        path = run / f"features_{seed}.keras"
        beside = sorted(run.resolve().parent.glob(f"*/{path.name}"))
        fitting = next((there for there in (path, *beside) if trained_on(there) == key), None)
        if fitting is None:
            train = train or dataset.read_split(source, "train", image_size)
            models.append(trained(train, len(source.label_names), key, steps, seed, progress))
            runs.write(path, models[-1].save)
        else:
            models.append(runs.load_model(fitting))
            if fitting != path:
                runs.write(path, functools.partial(shutil.copyfile, fitting))

    def describe(images):
        found, z = [], []
        for part in batches.parts(len(images), 64):
            said = [model.describe(2 * images[part] - 1) for model in models]
            found.append(np.concatenate([one["features"] for one in said], axis=1))
            z.append(np.mean([one["z"] for one in said], axis=0))
        return np.concatenate(found), np.concatenate(z)

    return describe


def trained_on(path):
    """What a feature network says that it was trained on, without reading its weights; None if that cannot be read."""
    try:
        with zipfile.ZipFile(path) as file:
            return json.loads(file.read("config.json"))["config"]["trained_on"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def names_of(run, seeds):
    """A name for each of a run's feature networks, which another one has only if its weights are the same."""
    names = []
    for seed in range(seeds):
        with zipfile.ZipFile(run / f"features_{seed}.keras") as file:
            names.append(hashlib.sha256(file.read("model.weights.h5")).hexdigest()[:12])
    return names


def trained(slices, num_labels, key, steps, seed, progress):
    """A feature network that has learned from slices, as `dataset.read_split` gives them."""
    keras.utils.set_random_seed(seed)
    z_range = [int(slices["z"].min()), int(slices["z"].max())]
    model = FeatureNet(slices["image"].shape[1], num_labels, z_range, seed=seed, trained_on=key)
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: progress())
    model.learn(neighbours(slices, seed), steps, callbacks=[count])
    model.measure(slices["image"])
    return model


def neighbours(slices, seed, size=BATCH):
    """An endless dataset of batches in which many slices have the same index, and no two are of one person.

    Slices of other indices are easily told apart, so that a network which sees those only learns little else; and two
    slices of one person should not be driven apart.

    Args:
        slices: as `dataset.read_split` gives them.
        seed: of the choice.
        size: of a batch; there are fewer in it where there are fewer people.
    """
    kept = {name: slices[name] for name in ("image", "z", "label")}
    shapes = {name: tf.TensorSpec((None, *value.shape[1:]), value.dtype) for name, value in kept.items()}

    def batches_of_neighbours():
        rng = np.random.default_rng(seed)
        while True:
            rows = rows_of_neighbours(slices["z"], slices["case"], size, rng)
            yield {name: value[rows] for name, value in kept.items()}

    stream = tf.data.Dataset.from_generator(batches_of_neighbours, output_signature=shapes)
    return stream.prefetch(2).with_options(batches.untuned())


def rows_of_neighbours(z, case, size, rng):
    """Rows (at most `size`,) of slices of different people; each half of them lies about a slice index of its own."""
    rows = np.empty(0, int)
    for part in (size // 2, size - size // 2):
        free = np.flatnonzero(~np.isin(case, case[rows]))
        if len(free):
            near = free[np.lexsort((rng.random(len(free)), np.abs(z[free] - z[rng.choice(free)])))]
            firsts = np.unique(case[near], return_index=True)[1]  # of each person, the slice that is nearest
            rows = np.concatenate([rows, near[np.sort(firsts)[:part]]])
    return rows


def inception(batch_size=BATCH):
    """Inception-v3's pooled features of slices as colour pictures of 299 pixels.

    Returns:
        Function of images (N, H, W, 1) in [0, 1] -> features (N, 2048), None.

    Raises:
        RunError: if its weights cannot be had.
    """
    try:
        network = keras.applications.InceptionV3(include_top=False, pooling="avg", weights="imagenet")
    except Exception as error:  # whatever the download raises: no network, no space, a broken file
        raise runs.RunError(
            f"--features inception: its weights could not be downloaded ({type(error).__name__}): leave the flag out"
        ) from error

    @tf.function
    def step(images):
        return network(2 * tf.image.grayscale_to_rgb(tf.image.resize(images, (299, 299))) - 1)

    def describe(images):
        return batches.in_batches(step, images, size=batch_size), None

    return describe


@register
class FeatureNet(Recorded, keras.Model):
    """Knows slices by their features, in which sets of slices can be compared; it has never seen a generated one.

    It learns three things at once on real training slices: the slice index, the label, and, contrastively, to know a
    slice again after a small change (SimCLR, arXiv 2002.05709, eq. 1), which asks for all that tells people apart.
    Each feature is of one of 4 x 4 places of the picture.

    Args:
        image_size: pixels a side.
        num_labels: number of labels; 0 learns none.
        z_range: least and greatest slice index.
        width: channels of the first level; they double twice.
        size: length D of the features, a multiple of 16.
        temperature: of the contrastive loss.
        seed: of the changes.
        trained_on: says what it was trained on; nothing but a name, kept in the file.
    """

    def __init__(
        self,
        image_size,
        num_labels=0,
        z_range=(0, 31),
        width=32,
        size=128,
        temperature=0.2,
        seed=0,
        trained_on="",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.remember(locals())
        self.network = feature_network(image_size, width, size, num_labels)
        self.mean = self.add_weight(name="mean", shape=(size,), initializer="zeros", trainable=False)
        self.std = self.add_weight(name="std", shape=(size,), initializer="ones", trainable=False)
        self.trackers = {name: keras.metrics.Mean(name=name) for name in ("loss", "z_error", "contrast")}
        self.compiled_call = tf.function(self.call, reduce_retracing=True, autograph=False)
        self.built = True

    def call(self, images, training=False):
        """Images (B, H, W, 1) in [-1, 1] -> {"features" (B, D), "z" (B,), "label" (B, L), "projection" (B, 64)}.

        Features have zero mean and unit variance over the training slices; z is in slice indices; labels are logits.
        """
        said = self.network(images, training=training)
        low, high = self.z_range
        z = low + (high - low) * said["z"][:, 0]
        return {**said, "features": (said["features"] - self.mean) / self.std, "z": z}

    def learn(self, slices, steps, learning_rate=1e-3, callbacks=()):
        """Train for `steps` steps on an endless dataset of training slices as they are: it changes them itself.

        No two slices of a batch should be of one person, see `neighbours`.
        """
        rate = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
        self.compile(optimizer=optimizers.FusedAdamW(rate, weight_decay=1e-3), jit_compile=False, auto_scale_loss=False)
        self.fit(slices, steps_per_epoch=steps, epochs=1, shuffle=False, verbose=0, callbacks=list(callbacks))

    def measure(self, images):
        """Set the features' mean and deviation from training slices (N, H, W, 1)."""
        features = self.describe(images)["features"] * np.asarray(self.std) + np.asarray(self.mean)
        self.mean.assign(features.mean(axis=0))
        self.std.assign(features.std(axis=0) + 1e-6)

    def describe(self, images, batch_size=64):
        """As `call`, for any number of images, as NumPy arrays."""
        parts = [self.compiled_call(tf.constant(images[part])) for part in batches.parts(len(images), batch_size)]
        return {name: np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]}

    def train_step(self, batch):
        rows, step = tf.shape(batch["z"])[0], tf.cast(self.optimizer.iterations, tf.int32)
        places = tf.range(2 * rows) + 2 * rows * step
        seeds = tf.stack([tf.fill((2 * rows,), self.seed), places], axis=-1)
        views = pixels.augment(tf.repeat(batch["image"], 2, axis=0), seeds)  # 2 i and 2 i + 1 show slice i
        views = tf.ensure_shape(views, (None, self.image_size, self.image_size, 1))
        z, label = (tf.repeat(batch[name], 2) for name in ("z", "label"))
        with tf.GradientTape() as tape:
            said = self(views, training=True)
            low, high = self.z_range
            z_loss = losses.mean_squared(z, said["z"]) / max(high - low, 1) ** 2
            contrast = losses.contrastive(said["projection"], self.temperature)
            loss = contrast + 10.0 * z_loss
            if self.num_labels:
                known = tf.cast(label >= 0, tf.float32)
                each = keras.losses.sparse_categorical_crossentropy(tf.maximum(label, 0), said["label"], True)
                loss += tf.reduce_sum(known * each) / tf.maximum(tf.reduce_sum(known), 1.0)
            part = distribution.replica_loss(loss, self.optimizer)
        variables = self.trainable_variables
        distribution.apply_gradients(self.optimizer, tape.gradient(part, variables), variables)
        error = losses.mean_absolute(z, said["z"])
        for name, value in {"loss": loss, "z_error": error, "contrast": contrast}.items():
            self.trackers[name].update_state(value)
        return {name: tracker.result() for name, tracker in self.trackers.items()}


def feature_network(image_size, width, size, num_labels):
    """Image -> {"features" (size), "z" (1) in [0, 1] for what was seen, "label" (num_labels), "projection" (64)}.

    Any size will do. From 128 pixels on the picture is folded by `image_size // 64`; what is missing to a multiple of
    that is background, added below and on the right, the same for every slice of a run, so that their features compare.
    """
    image = x = keras.Input((image_size, image_size, 1), name="image")
    factor = max(image_size // 64, 1)
    if missing := -image_size % factor:  # 224 pixels by 3: one row and one column of background make it 225
        x = ops.pad(x, ((0, 0), (0, missing), (0, missing), (0, 0)), constant_values=-1.0)
    x = SpaceToDepth(factor)(x)  # 64 to 95 pixels a side: detail goes into channels, nothing is thrown away
    for channels in (width, 2 * width, 4 * width):
        x = GroupNorm(activation="silu")(downsample(channels)(x))
        x = ResBlock(channels)(x, None)
    x = layers.Conv2D(size // PLACES**2, 1)(GroupNorm(activation="silu")(x))
    # No layer mixes the places: what is wrong in one would be lost among what is right in the others.
    x = layers.Flatten()(layers.AdaptiveAveragePooling2D(PLACES)(x))
    features = layers.Activation("linear", dtype="float32", name="features")(x)
    hidden = layers.Activation("silu", dtype="float32")(layers.Dense(size, dtype="float32")(features))

    def head(outputs, name):
        return layers.Dense(outputs, dtype="float32", name=name)(hidden)

    outputs = {"features": features, "z": head(1, "z"), "projection": head(64, "projection")}
    if num_labels:
        outputs["label"] = head(num_labels, "label")
    return keras.Model(image, outputs, name="feature_network")
