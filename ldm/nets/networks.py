"""The networks of the first stage, built of `layers`: encoder, decoder, and the discriminator that sharpens them."""

import math

import keras
from keras import layers, ops

from ldm.nets.layers import (
    Agreement,
    AttentionBlock,
    DepthToSpace,
    Embedding,
    GroupNorm,
    ResBlock,
    SpaceToDepth,
    downsample,
    upsample,
)
from ldm.nets.saving import Recorded, register


def conditions_of(z, label=None):
    """Slice indices and labels as every network of ours takes them.

    Args:
        z: (B,) slice indices.
        label: (B,) int32, -1 = unknown; None where all are unknown.

    Returns:
        {"z" (B,), "label" (B,)}.
    """
    z = ops.convert_to_tensor(z)
    return {"z": z, "label": ops.zeros_like(z) - 1 if label is None else ops.convert_to_tensor(label)}


def embed(z, label, size, condition_on_z, num_labels):
    """Slice index and label as one vector (B, size), the sum of theirs; None for a network without conditions."""
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

    The image is not clipped. The tissues are logits; with `tissues` 0 that output is missing.
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
class Discriminator(Recorded, keras.Model):
    """PatchGAN (arXiv 1611.07004, section 3.2): says of each patch of a picture whether it is real.

    Slice index and label enter by projection: a patch's logit is the sum of a term for the picture alone, and of one
    for how well the patch goes with these conditions (arXiv 1802.05637, eq. 3).

    Args:
        shape: (H, W) of the pictures.
        patch: side of the patches that the first layer trades for channels.
        width: channels of the first level; the second has twice as many.
        condition_on_z: whether the slice index is one of its inputs.
        num_labels: number of labels; 0 where the label is none of its inputs.

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
        conditions = embed(z, label, 2 * width, condition_on_z, num_labels)
        if conditions is not None:
            logits = logits + Agreement(dtype="float32")(x, layers.Dense(2 * width)(conditions))
        super().__init__({"image": image, "z": z, "label": label}, logits, **kwargs)
        self.remember(locals())
