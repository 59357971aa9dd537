"""Tissue masks: read from files, fitted to a square as their slices are, and laid on the grid of the latents.

A mask is (H, W) of classes, the places in `ldm.tissue.NAMES`; -1 throughout stands for a slice without a mask.
"""

import io
from pathlib import Path

import numpy as np
from einops import reduce
from PIL import Image
from tqdm import tqdm

from ldm import tissue
from ldm.data import archive, centring
from ldm.later import tensorflow as tf


def of_row(source, row: int, size: int) -> np.ndarray:
    """The tissue classes of one slice, (size, size) int8 as in `make_dataset`; -1 throughout where it has no mask.

    Each class is fitted to the square as its slice is, with Pillow's antialiased triangle filter, which is that of
    `pixels.fit`; a pixel belongs to the class that covers most of it, the first of two that cover half each.

    Raises:
        DataError: names the mask that is damaged, or not an 8-bit grey PNG of tissue.LEVELS.
    """
    entry = source.masks.get(source.entries[row])
    if entry is None:
        return np.full((size, size), -1, np.int8)
    data, code = source.read(entry)
    classes = _tissue(data, code, size, f"{source.path}: {entry!r}")
    return centring.moved(classes, centring.offsets(source, [row], size)[0]).numpy() if source.center else classes


def read(path, size: int) -> np.ndarray:
    """The tissue mask in a file, as the archive's are: (size, size) int8 classes.

    Raises:
        DataError: names the file that is none.
    """
    try:
        data = Path(path).read_bytes()
        code = archive.probe(data)
    except (OSError, ValueError) as error:
        raise archive.DataError(f"--mask {path} cannot be read as a picture ({error}).") from error
    return _tissue(data, code, size, f"--mask {path}")


def _tissue(data: bytes, code: int, size: int, shown: str) -> np.ndarray:
    """An encoded mask, padded to a square and resized, class by class."""
    try:
        levels = np.asarray(Image.open(io.BytesIO(data)))
    except (OSError, SyntaxError) as error:  # Pillow's ways to say that a PNG is broken
        raise archive.DataError(f"{shown} cannot be decoded; replace it or remove it.") from error
    if code != archive.GREY8 or levels.ndim != 2 or not np.isin(levels, tissue.LEVELS).all():
        raise archive.DataError(
            f"{shown} is no tissue mask: it must be an 8-bit grey PNG with the levels "
            f"{', '.join(map(str, tissue.LEVELS))} for background, CSF, grey and white matter; mend it or do without."
        )
    side = max(levels.shape)
    square = np.zeros((side, side), np.uint8)
    top, left = ((side - length) // 2 for length in levels.shape)
    square[top : top + levels.shape[0], left : left + levels.shape[1]] = levels
    cover = [Image.fromarray((square == level).astype(np.float32)) for level in tissue.LEVELS]
    return np.argmax([image.resize((size, size), Image.Resampling.BILINEAR) for image in cover], axis=0).astype(np.int8)


def of_split(source, split: str, size: int, budget: int):
    """A function: places within the split (B,) -> classes (B, size, size) int32. Read at once if the budget allows."""
    rows = source.select(split)
    if not source.masks:
        raise archive.DataError(
            f"{source.path} has no tissue masks: do without, or use an archive with keras_png_slices_seg_* folders."
        )
    if len(rows) * size * size > budget:
        return lambda places: np.stack([of_row(source, rows[place], size) for place in places]).astype(np.int32)
    key = (f"{split} masks", size)
    if key not in source.kept:
        source.kept[key] = np.stack(
            [of_row(source, row, size) for row in tqdm(rows, desc=key[0], delay=5, disable=None)]
        )
    return lambda places: source.kept[key][places].astype(np.int32)


def tissue_fractions(masks, shape, crop_box=None):
    """How much of each pixel of the latents each tissue covers: the condition that a denoising network gets of a mask.

    Args:
        masks: (B, H, W) int32: 0 background, 1 CSF, 2 grey matter, 3 white matter; -1 = unknown.
        shape: (h, w) of the latents; divides that of the crop box.
        crop_box: [top, left, height, width] in pixels, the part of the picture that the latents show; None: all.

    Returns:
        (B, h, w, 4) float32, which sum to 1; 0 throughout where nothing is known.
    """
    top, left, height, width = crop_box or (0, 0, *masks.shape[1:])
    seen = tf.one_hot(masks[:, top : top + height, left : left + width], 4)
    return reduce(seen, "b (h i) (w j) c -> b h w c", "mean", h=shape[0], w=shape[1])
