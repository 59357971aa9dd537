"""What happens to a slice before a network sees it: fitting to a square, and augmentation. TensorFlow ops."""

import numpy as np
import tensorflow as tf
from einops import rearrange, reduce

SHARPEN = np.outer(*2 * [[-0.112, 1.224, -0.112]]).astype(np.float32)  # a = (sqrt(3 / 2) - 1) / 2; see `augment`


def fit(image, size: int):
    """(H, W, 1) uint8 -> (size, size, 1) uint8: black margins to a square, then an antialiased bilinear resize.

    A resize is linear in rows and in columns, so it is one matrix on each side, and the margins are the matrices'
    columns that are left out. This is what `tf.image.resize(..., antialias=True)` computes, in a third of the time.
    The triangle filter has no negative lobes, so there is no ringing and black stays exactly 0.
    """
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    side = tf.maximum(height, width)

    def weights(length):
        """(size, length): the part of each of `length` source pixels, centred in `side`, in each target pixel."""
        scale = tf.cast(side, tf.float32) / size
        target = (tf.range(size, dtype=tf.float32) + 0.5) * scale
        source = tf.range(tf.cast(side, tf.float32)) + 0.5
        triangle = tf.nn.relu(1.0 - tf.abs(target[:, None] - source) / tf.maximum(scale, 1.0))
        triangle /= tf.reduce_sum(triangle, axis=1, keepdims=True)
        start = (side - length) // 2
        return triangle[:, start : start + length]

    def resize():
        pixels = tf.cast(image[:, :, 0], tf.float32)
        pixels = tf.matmul(weights(height) @ pixels, weights(width), transpose_b=True)
        return tf.cast(tf.round(pixels), tf.uint8)[:, :, None]

    image = tf.cond((height == size) & (width == size), lambda: image, resize)
    return tf.ensure_shape(image, [size, size, 1])


def augment(images, seeds, flip: bool = False, masks=None, strength: float = 1.0):
    """Small anatomical changes, each slice its own, in one bilinear warp; background stays exactly -1.

    Rotation up to 5 degrees, scale up to 5 %, shift up to 3 % of the side, a bend of the intensities
    `u + b u (1 - u)` with |b| <= 0.15 (black and white stay) and a gain up to 5 %; each times `strength`.

    Bilinear interpolation blurs: over all sub-pixel shifts it keeps (2 + cos w) / 3 of the power at frequency w, that
    is, a third of the finest detail, and a generator would learn the blur. The filter before it, with the response
    1 + 2 a (1 - cos w) and a such that the power at w = pi / 2 comes out as it went in, undoes this on average.

    Args:
        images: (B, H, W, 1) float32 in [-1, 1].
        seeds: (B, 2) int32 or int64; equal seeds give equal changes, whatever else is in the batch.
        flip: mirror left to right with probability 1/2.
        masks: (B, H, W) int32 classes, or None; they move with their slice. -1 throughout is a slice without a mask.
        strength: share of these ranges that is used. A first stage gives back what it is shown, so it is shown
            everything; a generator draws what it is shown, heads too large and too bright as well, so it is shown less.

    Returns:
        (B, H, W, 1) float32 in [-1, 1]; with masks, a pair of that and (B, H, W) int32, 0 where nothing was.
    """
    # (7, B): a generator per slice, so that a slice's change does not depend on its neighbours in the batch.
    draws = tf.map_fn(
        lambda key: tf.random.stateless_uniform([7], key, -1.0, 1.0), seeds, fn_output_signature=tf.float32
    )
    *changes, mirror = tf.unstack(rearrange(draws, "b k -> k b"), num=7)
    turn, zoom, right, down, bend, gain = (strength * change for change in changes)
    height, width = tf.shape(images)[1], tf.shape(images)[2]
    centre_x, centre_y = tf.cast(width - 1, tf.float32) / 2, tf.cast(height - 1, tf.float32) / 2
    angle, scale = turn * (np.pi / 36), 1.0 + 0.05 * zoom
    cos, sin = tf.cos(angle) * scale, tf.sin(angle) * scale
    sign = tf.where(mirror < 0, -1.0, 1.0) if flip else tf.ones_like(mirror)
    # Output pixel -> input pixel, about the centre: x' = sign (cos x - sin y) + right, y' = sin x + cos y + down.
    a0, a1, b0, b1 = sign * cos, -sign * sin, sin, cos
    a2 = centre_x - a0 * centre_x - a1 * centre_y + 0.03 * right * tf.cast(width, tf.float32)
    b2 = centre_y - b0 * centre_x - b1 * centre_y + 0.03 * down * tf.cast(height, tf.float32)
    zero = tf.zeros_like(a0)
    light = (images + 1.0) / 2.0  # black is 0 here, so that neither the warp's border nor the curve can lift it

    def warp(values, interpolation):
        return tf.raw_ops.ImageProjectiveTransformV3(
            images=values,
            transforms=tf.stack([a0, a1, a2, b0, b1, b2, zero, zero], axis=-1),
            output_shape=tf.shape(images)[1:3],
            fill_value=0.0,
            interpolation=interpolation,
            fill_mode="CONSTANT",
        )

    light = warp(tf.nn.conv2d(light, rearrange(SHARPEN, "h w -> h w 1 1"), strides=1, padding="SAME"), "BILINEAR")
    bend, gain = (rearrange(value, "b -> b 1 1 1") for value in (0.15 * bend, 1.0 + 0.05 * gain))
    light = gain * (light + bend * light * (1.0 - light))
    changed = tf.clip_by_value(2.0 * light - 1.0, -1.0, 1.0)
    if masks is None:
        return changed
    unknown = tf.reduce_all(masks < 0, axis=(1, 2), keepdims=True)
    return changed, tf.where(unknown, -1, warp(masks[..., None], "NEAREST")[..., 0])


def tissue_fractions(masks, shape, window=None):
    """How much of each pixel of the latents each tissue covers: what a denoising network is told of a mask.

    Args:
        masks: (B, H, W) int32: 0 background, 1 CSF, 2 grey matter, 3 white matter; -1 = unknown.
        shape: (h, w) of the latents; divides that of the window.
        window: [top, left, height, width], the part of the picture that the latents show; None: all.

    Returns:
        (B, h, w, 4) float32, which sum to 1; 0 throughout where nothing is known.
    """
    top, left, height, width = window or (0, 0, *masks.shape[1:])
    seen = tf.one_hot(masks[:, top : top + height, left : left + width], 4)
    return reduce(seen, "b (h i) (w j) c -> b h w c", "mean", h=shape[0], w=shape[1])
