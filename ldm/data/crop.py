"""The crop box: the part of the pictures where brains lie, which is all that a first stage has to see."""

import numpy as np

from ldm.batches import evenly
from ldm.cropping import CropBox
from ldm.data import pixels
from ldm.later import tensorflow as tf

SAMPLE = 4_000  # so many training slices tell where brains lie;
STRAYS = 2_000  # what is not black in at most one of so many is no reason for a larger box


def brain_box(source, size: int, step: int) -> list[int] | None:
    """The part of the pictures that is not black in all training slices, STRAYS apart, with a little room around it for
    augmentation.

    Args:
        source: of the slices; of a training split larger than SAMPLE, so many of them are looked at, evenly spread.
        size: side of the pictures in pixels.
        step: the box's sides are multiples of this.

    Returns:
        [top, left, height, width] in pixels; None where that is the whole picture.
    """
    rows = source.select("train")
    rows = rows[evenly(len(rows), SAMPLE)]
    seen = np.zeros((size, size), np.int32)
    with pixels.data_errors(source):
        batches = pixels.read(source, tf.data.Dataset.from_tensor_slices(rows).batch(64), size, 64)
        for batch in batches.as_numpy_iterator():
            seen += (batch[..., 0] > 0).sum(axis=0)
    box = CropBox.around(seen > len(rows) // STRAYS, step)
    return None if box.shape == (size, size) else list(box)
