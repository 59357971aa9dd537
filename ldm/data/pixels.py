"""Pixels: from the bytes of a file to what a network sees.

Decoding, fitting to a square and augmentation are TensorFlow operations; `read` is the way from row numbers of a source
to batches of pixels, `decoded` keeps those of a small split in memory.
"""

import contextlib
import io
import operator
import re
import struct

import numpy as np
from einops import rearrange
from PIL import Image
from tqdm import tqdm

from ldm.batches import untuned
from ldm.data import archive, centring
from ldm.later import tensorflow as tf

JPEG_NOISE = 8  # grey levels up to this are compression noise around the head: black, as in the PNGs
ORIENTATION = 0x0112  # the EXIF tag that says how to turn and mirror a picture
MISSING = 128  # the grey that decoders paint where a JPEG has no more pixels
DEEP_WHITE = 99.9  # percentile of a 16-bit slice's non-zero pixels that becomes white
SHARPEN = np.outer(*2 * [[-0.112, 1.224, -0.112]]).astype(np.float32)  # a = (sqrt(3 / 2) - 1) / 2; see `augment`


def decode(data, code, shape):
    """One encoded slice -> (H, W, 1) uint8 grey levels.

    8-bit files keep their levels. In 16-bit files the DEEP_WHITE-th percentile of the non-zero pixels becomes white, as
    nothing in the file says what its largest value means. What is transparent becomes black, and so do levels up to
    JPEG_NOISE in JPEGs.
    """

    def grey(image):  # integer weights with the sum 256, so that grey stored as colour comes back exactly
        return tf.reduce_sum(tf.cast(image, tf.float32) * [77.0, 150.0, 29.0], axis=-1, keepdims=True) / 256.0

    def eight_bit(image):
        return tf.cast(tf.round(image), tf.uint8)

    def deep(image):
        positive = tf.sort(tf.boolean_mask(image, image > 0))
        last = tf.cast(tf.shape(positive)[0] - 1, tf.float32)
        white = tf.concat([positive, [1.0]], 0)[tf.cast(tf.round(tf.maximum(last, 0.0) * DEEP_WHITE / 100), tf.int32)]
        return eight_bit(tf.minimum(image * (255.0 / white), 255.0))

    def opaque(kind):
        image = tf.io.decode_png(data, channels=4, dtype=kind)
        return grey(image[..., :3]) * (tf.cast(image[..., 3:], tf.float32) / float(kind.max))

    def jpeg():
        image = tf.io.decode_jpeg(data, channels=1, dct_method="INTEGER_ACCURATE")
        suspect = tf.reduce_all(image[-8:, -8:] == MISSING)
        whole = tf.cond(suspect, lambda: tf.numpy_function(_check_whole, [data], tf.bool), lambda: True)
        image = tf.where(tf.ensure_shape(whole, []), image, tf.zeros_like(image))
        return tf.where(image <= JPEG_NOISE, tf.zeros_like(image), image)

    return tf.switch_case(
        code,
        {
            archive.GREY8: lambda: tf.io.decode_png(data, channels=1),
            archive.COLOUR8: lambda: eight_bit(grey(tf.io.decode_png(data, channels=3))),
            archive.ALPHA8: lambda: eight_bit(opaque(tf.uint8)),
            archive.GREY16: lambda: deep(tf.cast(tf.io.decode_png(data, channels=1, dtype=tf.uint16), tf.float32)),
            archive.COLOUR16: lambda: deep(grey(tf.io.decode_png(data, channels=3, dtype=tf.uint16))),
            archive.ALPHA16: lambda: deep(opaque(tf.uint16)),
            archive.JPEG: jpeg,
            archive.RAW: lambda: tf.reshape(tf.io.decode_raw(data, tf.uint8), [shape[0], shape[1], 1]),
        },
    )


PROGRESSIVE = b"\xff\xc2"  # the marker of its frame


def is_cut_off(data: bytes) -> bool:
    """Whether a JPEG ends before its pixels do, although it has an end marker.

    A decoder paints what is missing grey. That alone may be a picture of a grey corner; so other bytes are put before
    the end marker: a decoder that still needed pixels takes them, one that had all passes over them. A progressive
    JPEG comes in several passes over the whole picture, so half of one shows no grey.
    """
    with contextlib.suppress(OSError, SyntaxError):  # other damage is found by others
        image = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
        if (image[-8:, -8:] != MISSING).any() and PROGRESSIVE not in data:
            return False
        end = data.rindex(b"\xff\xd9")
        noise = np.random.default_rng(0).integers(0, 255, 4096, dtype=np.uint8).tobytes()
        return bool((np.asarray(Image.open(io.BytesIO(data[:end] + noise + data[end:])).convert("L")) != image).any())
    return False


def notes(entries: list[str], read) -> list[str]:
    """What is odd about some pictures of an archive, a sentence each: all are of one grey, from which nothing can be
    learned; some are in colour, of which only the brightness is read; some are to be turned when shown, and are not.

    Args:
        entries: some pictures of an archive.
        read: callable entry -> bytes.
    """
    plain, coloured, turned = [], [], []
    for before, entry in enumerate(entries):
        try:
            image = Image.open(io.BytesIO(read(entry)))  # its pixels are decoded only where they are asked for
            all_plain = len(plain) == before
            ranges = np.atleast_2d(image.getextrema()) if all_plain else np.array([[0, 255]])  # of one band, or of each
            unseen = image.mode[-1] == "A" and ranges[-1, 1] == 0  # transparent throughout
            if np.all(np.ptp(ranges, axis=1) == 0) or unseen:
                plain.append(entry)
            elif image.mode in ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr"):
                red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), "int16"), -1, 0)
                if max(np.abs(red - green).max(), np.abs(blue - green).max()) > JPEG_NOISE:
                    coloured.append(entry)
            if _is_to_be_turned(image):
                turned.append(entry)
        except (OSError, SyntaxError, ValueError):  # damage is found by others
            return []
    looked = f"{len(entries)} pictures that were looked at"
    found = [f"{looked} are of one grey each (such as {plain[0]!r}): no heads"] if len(plain) == len(entries) else []
    if coloured:
        found.append(f"{len(coloured)} of {looked} are in colour (such as {coloured[0]!r}); their brightness is read")
    if turned:
        found.append(
            f"{len(turned)} of {looked} say by EXIF how to turn them (such as {turned[0]!r}), which is not done: turn "
            "the pixels themselves"
        )
    return found


def _is_to_be_turned(image) -> bool:
    """Whether a picture's EXIF asks those who show it to turn or mirror it; what cannot be read asks for nothing."""
    try:
        return image.getexif().get(ORIENTATION) in range(2, 9)
    except (OSError, SyntaxError, ValueError, struct.error):
        return False


def _check_whole(data) -> bool:
    """Raises ValueError for half a JPEG; `data` is what `tf.numpy_function` makes of a string."""
    if is_cut_off(np.asarray(data, dtype=object).item()):
        raise ValueError("this JPEG is cut off")
    return np.True_


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


def augment(images, seeds, flip: bool = False, masks=None, strength=1.0):
    """Small anatomical changes, each slice its own, in one bilinear warp; background stays exactly -1.

    Rotation up to 5 degrees, scale up to 5 %, shift up to 3 % of the side, a bend of the intensities
    `u + b u (1 - u)` with |b| <= 0.15 (black and white stay) and a gain up to 5 %; each times `strength`.

    Bilinear interpolation blurs: over all sub-pixel shifts it keeps (2 + cos w) / 3 of the power at frequency w, that
    is, a third of the finest detail, and a generator would learn the blur. The filter before it, with the response
    1 + 2 a (1 - cos w) and a such that the power at w = pi / 2 comes out as it went in, undoes this on average. It
    cannot give back the hard outline of a skull-stripped brain: by that, changed slices are told from others. With
    a strength of 0 slices are mirrored at most, pixel by pixel.

    Args:
        images: (B, H, W, 1) float32 in [-1, 1].
        seeds: (B, 2) int32 or int64; equal seeds give equal changes, whatever else is in the batch.
        flip: mirror left to right with probability 1/2.
        masks: (B, H, W) int32 classes, or None; they move with their slice. -1 throughout is a slice without a mask.
        strength: share of these ranges that is used; or two shares, of turn and shift, and of scale and intensities. A
            first stage gives back what it is shown, so it is shown everything; a generator draws what it is shown,
            heads too large and too bright as well, so it is shown less.

    Returns:
        (B, H, W, 1) float32 in [-1, 1]; with masks, a pair of that and (B, H, W) int32, 0 where nothing was.
    """
    # (7, B): a generator per slice, so that a slice's change does not depend on its neighbours in the batch.
    draws = tf.map_fn(
        lambda key: tf.random.stateless_uniform([7], key, -1.0, 1.0), seeds, fn_output_signature=tf.float32
    )
    *changes, mirror = tf.unstack(rearrange(draws, "b k -> k b"), num=7)
    pose, look = strength if isinstance(strength, tuple) else (strength, strength)
    if not pose and not look:
        mirrored = (mirror < 0) & flip
        images = tf.where(mirrored[:, None, None, None], tf.reverse(images, [2]), images)
        return images if masks is None else (images, tf.where(mirrored[:, None, None], tf.reverse(masks, [2]), masks))
    turn, zoom, right, down, bend, gain = map(operator.mul, (pose, look, pose, pose, look, look), changes)
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


def read(source, rows: "tf.data.Dataset", size: int, batch_size: int) -> "tf.data.Dataset":
    """Batches of row numbers (B,) -> batches of pixels (B, size, size, 1) uint8, in the same order.

    Bytes are fetched a batch at a time in Python (a pread each, which needs little of the interpreter); decoding and
    resizing run in C++, one slice per thread. Where the source says so, heads are moved to the middle
    (`ldm.data.centring`).
    """

    def fetch(rows):
        entries = [source.entries[row] for row in rows]
        data, codes = zip(*map(source.read, entries), strict=True)
        shapes = [source.store.shape(entry) if source.kind == "volumes" else (0, 0) for entry in entries]
        shifts = centring.offsets(source, rows, size)
        return np.array(data, dtype=object), np.array(codes, np.int32), np.array(shapes, np.int32), shifts

    def fetch_op(rows):
        parts = tf.numpy_function(fetch, [rows], (tf.string, tf.int32, tf.int32, tf.int32))
        return tuple(map(tf.ensure_shape, parts, ([None], [None], [None, 2], [None, 2])))

    def see(data, code, shape, shift):
        image = fit(decode(data, code, shape), size)
        return centring.moved(image, shift) if source.center else image

    slices = rows.map(fetch_op, num_parallel_calls=2).unbatch()
    return slices.map(see, num_parallel_calls=tf.data.AUTOTUNE).batch(batch_size).with_options(untuned())


def decoded(source, split: str, size: int, budget: int) -> np.ndarray | None:
    """All slices of a split as (n, size, size, 1) uint8, in table order; None when they exceed the budget in bytes."""
    rows = source.select(split)
    if len(rows) * size * size > budget:
        return None
    if (split, size) not in source.kept:
        pixels = np.empty((len(rows), size, size, 1), np.uint8)
        batches = read(source, tf.data.Dataset.from_tensor_slices(rows).batch(64), size, 64).prefetch(4)
        place = 0
        with (
            data_errors(source),
            tqdm(total=len(rows), desc=f"{split} slices", delay=5, leave=False, disable=None) as bar,
        ):
            for batch in batches.as_numpy_iterator():
                pixels[place : place + len(batch)] = batch
                place += len(batch)
                bar.update(len(batch))
        source.kept[split, size] = pixels
    return source.kept[split, size]


@contextlib.contextmanager
def data_errors(source=None):
    """Turns what a damaged slice raises inside `tf.data` back into the DataError that names it.

        with data_errors(source):
            model.fit(make_dataset(source, ...))

    Args:
        source: when given, a decoder's own complaint, which names no entry, is traced by decoding slice after slice.

    Raises:
        DataError: instead of the `tf.errors.OpError` around it; other errors pass unchanged.
    """
    try:
        yield
    except tf.errors.OpError as error:
        found = re.search(r"DataError: (.+)", error.message)
        if found:
            raise archive.DataError(found[1]) from error
        if source is not None and re.search(r"PNG|JPEG|decode", error.message):
            for name in source.entries:
                data, code = source.read(name)
                try:
                    decode(data, tf.constant(code), (0, 0))
                except (tf.errors.OpError, ValueError) as inner:
                    raise archive.DataError(
                        f"{source.path}: {name!r} cannot be decoded; replace it or remove it."
                    ) from inner
        raise
