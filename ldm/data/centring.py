"""Heads in the middle: where a scan is moved to, so that the box around its head has the picture's middle for its own.

Slices that no one has registered, as ADNI's, show heads anywhere. Moved, they lie in a common box that is far smaller
than the picture, and no network has to learn that a head may be anywhere. All slices of a scan move alike, by whole
pixels: nothing is resampled, and a stack stays a stack.
"""

import io

import numpy as np
from PIL import Image

from ldm.data import archive
from ldm.later import Later
from ldm.later import tensorflow as tf

ndimage = Later("scipy.ndimage")

HEAD = 0.16  # of what is brighter than this part of a scan's white, the largest piece is the head


def offset(source, scan: int) -> tuple[float, float]:
    """How far down and right the middle of a scan's head lies from that of its pictures, in parts of the longer side.

    (0, 0) for a scan without any head, and for one that cannot be decoded: whoever reads it for its pixels says so.
    """
    key = ("centre", scan)
    if key not in source.kept:
        names = [source.entries[row] for row in np.flatnonzero(source.scan == scan)]
        try:
            source.kept[key] = _middle([_grey(source, name) for name in names])
        except (OSError, SyntaxError, ValueError, archive.DataError):
            source.kept[key] = (0.0, 0.0)
    return source.kept[key]


def offsets(source, rows, size: int) -> np.ndarray:
    """Pixels down and right by which heads lie off the middle of pictures of `size` pixels a side: (B, 2) int32.

    All zeros for a source whose heads are left where they are.
    """
    if not source.center:
        return np.zeros((len(rows), 2), np.int32)
    return np.round([np.multiply(offset(source, source.scan[row]), size) for row in rows]).astype(np.int32)


def of_stack(slices: np.ndarray) -> np.ndarray:
    """The same, (2,) int32, for one head by itself: (N, S, S) grey levels."""
    return np.round(np.multiply(_middle(slices), slices.shape[1])).astype(np.int32)


def moved(image, shift):
    """A picture, (S, S, ...) array or tensor, whose point `shift` (2,) off the middle comes to the middle; black, or
    zero, where nothing was.
    """
    size = image.shape[0]
    room = size // 2
    start = tf.clip_by_value(shift, -room, room) + room
    around = tf.pad(image, [[room, room], [room, room], *[[0, 0]] * (len(image.shape) - 2)])
    return around[start[0] : start[0] + size, start[1] : start[1] + size]


def _middle(slices):
    """(down, right) of the middle of the head in slices, (H, W) each, in parts of the longer side."""
    white = max(float(np.percentile(image, 99)) for image in slices)
    side = max(max(image.shape) for image in slices)
    bright = np.zeros((side, side), bool)
    for image in slices:
        top, left = ((side - length) // 2 for length in image.shape)
        bright[top : top + image.shape[0], left : left + image.shape[1]] |= image > HEAD * white
    parts, count = ndimage.label(bright)
    if not white or not count:
        return 0.0, 0.0
    head = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
    rows, columns = (np.flatnonzero(head.any(axis)) for axis in (1, 0))
    return (rows[0] + rows[-1] + 1 - side) / 2 / side, (columns[0] + columns[-1] + 1 - side) / 2 / side


def _grey(source, name):
    """One slice as it lies in the archive, (H, W) float32."""
    data, code = source.read(name)
    if code == archive.RAW:
        return np.frombuffer(data, np.uint8).reshape(source.store.shape(name)).astype(np.float32)
    image = Image.open(io.BytesIO(data))
    return np.asarray(image if image.mode.startswith("I") else image.convert("L"), np.float32)
