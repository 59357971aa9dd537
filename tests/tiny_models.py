"""Models of a few channels and batches of a few slices, for the tests of `modules` and of what trains it."""

import numpy as np
import tensorflow as tf

import modules
from ldm.batches import untuned
from ldm.nets.networks import Discriminator
from ldm.training.adversary import AdversarialTraining
from ldm.training.optimizers import FusedAdamW

SIZE = 16
BOX = [3, 0, 8, 16]  # top, left, height, width
FIRST_STAGE = {"width": 8, "latent_channels": 3, "seed": 5}


def images(count, size=SIZE, seed=0):
    """Blobs of different place and brightness on -1."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    centre, height = rng.uniform(0.3, 0.7, (count, 2, 1, 1)), rng.uniform(0.8, 1.9, (count, 1, 1))
    blob = height * np.exp(-((x - centre[:, 0]) ** 2 + (y - centre[:, 1]) ** 2) / 0.05)
    return (blob - 1.0)[..., None].astype("float32")


def batch_of(count, size=SIZE, channels=1, seed=0, unmasked=3):
    rng = np.random.default_rng(seed + 1)
    values = images(count, size, seed) if channels == 1 else rng.normal(size=(count, size, size, channels))
    return {
        "image": values.astype("float32"),
        "z": rng.integers(0, 40, count).astype("int32"),
        "label": rng.integers(-1, 2, count).astype("int32"),
        "case": np.arange(count, dtype="int32"),
        # the first of every 8 slices have no mask: over replicas they are not shared out evenly
        "mask": np.where(
            np.arange(count)[:, None, None] % 8 < unmasked, -1, rng.integers(0, 4, (count, size, size))
        ).astype("int32"),
    }


def tensors(batch):
    return {name: tf.constant(value) for name, value in batch.items()}


def dataset_of(count, batch_size, **options):
    """Batches of one static size, or, where the count is not divisible, a smaller last one."""
    batches = tf.data.Dataset.from_tensor_slices(batch_of(count, **options))
    batches = batches.batch(batch_size, drop_remainder=count % batch_size == 0)
    return batches.with_options(untuned())


def make_vqvae(**options):
    return modules.VQVAE(SIZE, **{"num_codes": 16, **FIRST_STAGE, **options})


def make_fsq(**options):
    return make_vqvae(**{"quantizer": "fsq", "levels": (5, 4, 3), **options})


def make_vae(**options):
    return modules.VAE(SIZE, **{"kl_weight": 1e-3, **FIRST_STAGE, **options})


def make_adversarial(make, **options):
    """Adversarial training from the first step, at its full weight from the third."""
    autoencoder = make(num_labels=2, tissues=4, patch=4)  # one level: the fewer layers, the sooner they are traced
    discriminator = Discriminator(autoencoder.crop_box[2:], patch=2, width=8, num_labels=2)
    model = AdversarialTraining(autoencoder, discriminator, ramp_steps=3, random_latents=True, **options)
    model.begun.assign(0.0)
    return model


def make_cropped(**options):
    """A VQ-VAE that sees 8x16 of 16x16 pixels, 2x4 latents of 4 channels, and writes each with two codes."""
    return make_vqvae(crop_box=BOX, latent_channels=4, codes_per_latent=2, **options)


def make_adversarial_vqvae(**options):
    return make_adversarial(make_cropped, **options)


def make_adversarial_vae(**options):
    return make_adversarial(make_vae, **options)


def make_unet(**options):
    arguments = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "head_size": 4, "num_labels": 2}
    return modules.UNet(**{"size": 8, "channels": 2, **arguments, **options})


def make_diffusion(unet=None, **options):
    return modules.DiffusionModel(unet or make_unet(), **{"seed": 3, **options})


def make_small_diffusion(**options):
    """For training: fewer layers are traced sooner."""
    return make_diffusion(make_unet(multipliers=(1,), attention=(), num_labels=0), **options)


def randomised(model, seed=0):
    """Random weights, so that layers which start at zero hide nothing."""
    rng = np.random.default_rng(seed)
    model.set_weights([(0.2 * rng.normal(size=w.shape) + (w.ndim == 1)).astype(w.dtype) for w in model.get_weights()])
    return model


def compiled(model, learning_rate=2e-3, kind=FusedAdamW, **options):
    optimizer = kind(learning_rate, epsilon=1e-4, **options)
    more = {}
    if isinstance(model, AdversarialTraining):
        more["discriminator_optimizer"] = FusedAdamW(learning_rate, epsilon=1e-4)
    model.compile(optimizer=optimizer, jit_compile=False, **more)  # as train.py on a CPU
    return model
