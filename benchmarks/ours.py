"""Worker: this project's side of `throughput.py`. Each task is one unit of work on random data of the stated shape."""

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as command.py does
sys.path.insert(0, str(Path(__file__).parents[1]))

import keras
import numpy as np
import serving
import tensorflow as tf

import dataset
import modules
import stages
from ldm.diffusion import samplers
from ldm.training import distribution, optimizers, presets


def optimizer():
    return optimizers.FusedAdamW(1e-4, weight_decay=1e-2)


def batches(shape):
    """An endless dataset of one random batch, already in memory."""
    rng = np.random.default_rng(0)
    rows = shape[0]
    batch = {
        "image": np.clip(rng.normal(size=shape) * 0.5, -1, 1).astype("float32"),
        "z": np.arange(rows, dtype="int32") % 32,
        "label": np.full(rows, -1, "int32"),
        "case": np.zeros(rows, "int32"),
    }
    return batch, tf.data.Dataset.from_tensors(batch).repeat()


def trainer(model, data):
    """One optimiser step, through the function that `fit` calls."""
    strategy = model.distribute_strategy
    with strategy.scope():
        model.compile(optimizer=optimizer(), jit_compile=False)
    model.make_train_function()
    iterator = iter(strategy.experimental_distribute_dataset(data))

    def train():
        float(model.train_function(iterator)["loss"])

    return train


def forward_flops(model, inputs):
    """Floating-point operations of one forward pass, as TensorFlow counts them: two per multiply-add."""
    graph = tf.function(lambda: model(inputs)).get_concrete_function().graph
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    options["output"] = "none"
    return tf.compat.v1.profiler.profile(graph, options=options).total_float_ops


def unet(flags):
    """The diffusion model in pixels: widths of 64 times the multipliers, attention at a quarter of the resolution."""
    size, rows = flags.image_size, flags.batch_size
    with distribution.make_strategy(flags.replicas).scope():
        network = modules.UNet(
            size,
            1,
            flags.width,
            flags.multipliers,
            blocks=2,
            attention=(size // 4,),
            head_size=min(flags.head_size, flags.width),
        )
        model = modules.DiffusionModel(network)
    batch, data = batches((rows, size, size, 1))
    step = trainer(model, data)
    step()
    conditions = {"z": tf.constant(batch["z"])}
    denoise = tf.function(lambda x_t, t: model.denoise(x_t, t, conditions))
    x_T, half = tf.random.stateless_normal((rows, size, size, 1), (0, 0)), tf.fill((rows,), 0.5)

    def sample():
        *_, (x_t, _) = samplers.ddim(denoise, x_T, model.schedule, flags.steps)
        x_t.numpy()

    def calls():
        for _ in range(flags.steps):
            x_0 = denoise(x_T, half)
        x_0.numpy()

    filters = tf.cast(tf.random.stateless_normal((3, 3, 128, 128), (0, 0)), network.compute_dtype)
    maps = tf.cast(tf.random.stateless_normal((8, 64, 64, 128), (0, 0)), network.compute_dtype)
    convolve = tf.function(lambda: tf.nn.conv2d(maps, filters, 1, "SAME"))

    def forward():
        denoise(x_T, half).numpy()

    def count():
        inputs = {"x": x_T, "t": half, "keep": half, **{key: tf.constant(batch[key]) for key in ("z", "label")}}
        return {"flops": forward_flops(network, inputs)}

    def convolution():  # 9.7 GFLOP
        convolve()[0, 0, 0, 0].numpy()
        return {"flops": 2 * 9 * 128 * 128 * 8 * 64 * 64}

    tasks = {"train": step, "forward": forward, "ddim": sample, "calls": calls}
    return {**tasks, "count": count, "convolution": convolution}, model


def first_stage(flags):
    """A VQ-VAE, f8: latents of an eighth of the resolution with 4 channels, 1,024 codes."""
    size, rows = flags.image_size, flags.batch_size
    model = modules.VQVAE(size, num_codes=1024, downsampling=8, width=flags.width, latent_channels=4)
    batch, data = batches((rows, size, size, 1))
    step = trainer(model, data)
    step()
    compiled = tf.function(model.encode)
    images, z = tf.constant(batch["image"]), tf.constant(batch["z"])

    def encode():
        compiled(images, z).numpy()

    tasks = {"train": step, "encode": encode}
    if flags.data:  # the same step, fed by the loader
        slices = dataset.make_dataset(flags.data, "train", size, rows, training=True)
        iterator = iter(model.distribute_strategy.experimental_distribute_dataset(slices))

        def train_from_archive():
            float(model.train_function(iterator)["loss"])

        tasks["train_from_archive"] = train_from_archive
    return tasks, model


class TimedCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Warm-up, then a cosine that reaches its end when the time is up, however many steps that takes."""

    def __init__(self, peak):
        super().__init__()
        self.peak, self.total = peak, tf.Variable(1e4, trainable=False)

    def __call__(self, step):
        step = tf.cast(step, tf.float32)
        cosine = 0.5 + 0.5 * tf.cos(np.pi * tf.minimum(step / self.total, 1.0))
        return self.peak * tf.minimum(1.0, (step + 1.0) / 200.0) * (0.02 + 0.98 * cosine)

    def get_config(self):
        return {"peak": self.peak}


def autoencoder(flags):
    """The VQ-VAE of a `<pixels>-f8` preset, trained on real slices for so many minutes."""
    size = flags.image_size
    source = dataset.open_source(flags.data)
    settings = stages.with_found(presets.of(f"{size}-f8"), source)
    group = settings["autoencoder"]
    model = stages.make_autoencoder(settings, 0)
    rate = TimedCosine(group["learning_rate"])
    model.compile(optimizer=optimizers.FusedAdamW(rate, beta_2=0.99, weight_decay=1e-4), jit_compile=False)
    model.make_train_function()

    def learn():
        stream = dataset.make_dataset(source, "train", size, group["batch_size"], training=True)
        iterator = iter(model.distribute_strategy.experimental_distribute_dataset(stream))
        began, steps = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < 60 * flags.minutes:
            model.train_function(iterator)
            steps += 1
            if steps % 50 == 0:
                rate.total.assign(steps * 60 * flags.minutes / spent)
        return {"steps": steps, "slices": steps * group["batch_size"]}

    def reconstruct():
        through = tf.function(model.reconstruct, reduce_retracing=True)
        test = dataset.make_dataset(source, "test", size, 32, training=False)
        np.save(flags.out, np.concatenate([through(batch["image"], batch["z"]).numpy() for batch in test]))

    return {"learn": learn, "reconstruct": reconstruct}, model


def loader(flags):
    """The training stream of one split, decoded and shuffled, without augmentation (the peers have none)."""
    batches = None

    def start():
        nonlocal batches
        began = time.perf_counter()
        source = dataset.open_source(flags.data)
        options = {"augment": False, "cache_bytes": flags.cache_bytes}
        batches = iter(
            dataset.make_dataset(source, "train", flags.image_size, flags.batch_size, training=True, **options)
        )
        next(batches)
        return {"first_batch_s": time.perf_counter() - began}

    def read():
        for _ in range(flags.steps):
            next(batches)

    return {"start": start, "read": read}, None


def archive(flags):
    """Opening an archive: its listing read and checked, no picture decoded."""
    return {"open": lambda: {"slices": len(dataset.open_source(flags.data).entries)}}, None


WORK = {"unet": unet, "first_stage": first_stage, "autoencoder": autoencoder, "loader": loader, "archive": archive}


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("what", choices=tuple(WORK))
    p.add_argument("--image-size", type=int, default=64)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--multipliers", type=int, nargs="+", default=[1, 2, 4, 4])
    p.add_argument("--head-size", type=int, default=64)
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--replicas", type=int, help="logical CPU devices")
    p.add_argument("--data")
    p.add_argument("--minutes", type=float, default=20, help="autoencoder: time to learn")
    p.add_argument("--out", help="autoencoder: .npy for the test people's reconstructions")
    p.add_argument("--cache-bytes", type=int, default=2 * 2**30)
    p.add_argument("--precision", default="auto")
    flags = p.parse_args()
    tf.get_logger().setLevel("ERROR")
    precision = distribution.set_precision(flags.precision)
    tasks, model = WORK[flags.what](flags)
    parameters = model.count_params() if model else 0
    serving.serve(tasks, parameters=parameters, precision=precision, version=f"TensorFlow {tf.__version__}")


if __name__ == "__main__":
    main()
