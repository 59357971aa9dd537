"""Latents on disk: what the stage `latents` writes for each split, and the batches that the second stage reads.

A file holds V views of each of N slices. View 0 is the slice as it is; the others show it augmented, because a second
stage that learns from latents has no other augmentation.
"""

import contextlib
import functools
import os
import struct
import zipfile
import zlib

import numpy as np

from ldm import files
from ldm.batches import UNSHARED, evenly
from ldm.data import archive, order, pixels
from ldm.later import tensorflow as tf

WHOLE = 2**28  # bytes: files up to this size are read into memory and checked, larger ones as they are needed
SEEN = 2**24  # latents that tell the range of a channel; of more, so many evenly spread
VIEWED = {"latents": 5, "codes": 4, "mask": 5}  # dimensions of the arrays that have V views of N slices; others: N


def view(batches, number: int, *, seed: int = 0, flip: bool = False, strength=1.0, first: int = 0):
    """The slices of a split as one view shows them.

    Args:
        batches: the slices of the split as they are, in table order, from `dataset.make_dataset`.
        number: of the view: 0, the slices as they are; from 1 on, augmented, each slice of each view in its own way.
        seed: of the augmentation: what view v makes of slice n depends on (seed + v, n) alone.
        flip, strength: of the augmentation, see `ldm.data.pixels.augment`. Masks move with their slices.
        first: number within the split of the first of these slices.

    Yields:
        The same batches with "image", and "mask" where there is one, of that view.
    """
    for batch in batches:
        count = len(batch["z"])
        if number:
            rows = np.arange(first, first + count, dtype=np.int64)
            seeds = np.stack([np.full_like(rows, seed + number), rows], axis=-1)
            augment = _compiled_augment(flip, strength)
            if "mask" in batch:
                image, mask = augment(batch["image"], seeds, masks=batch["mask"])
                batch = {**batch, "image": image, "mask": mask}
            else:
                batch = {**batch, "image": augment(batch["image"], seeds)}
        first += count
        yield batch


@functools.cache
def _compiled_augment(flip, strength):
    """`pixels.augment` as a graph: eagerly it costs more than encoding what it has changed."""
    change = functools.partial(pixels.augment, flip=flip, strength=strength)
    return tf.function(change, reduce_retracing=True, autograph=False)


def write(path, latents, z, label, case, codes=None, mask=None) -> None:
    """Writes the latents of a split, whole or not at all.

    Args:
        path: the .npz.
        latents: (V, N, h, w, C), V views of N slices; kept as float16.
        z, label, case: (N,) int32, what belongs to each slice.
        codes: (V, N, h, w) int32, of a first stage that has a codebook.
        mask: (V, N, h, w, 4), tissue fractions (see `ldm.data.masks.tissue_fractions`); kept as float16.
    """
    arrays = {"latents": np.asarray(latents, "float16"), "z": z, "label": label, "case": case}
    arrays |= {} if codes is None else {"codes": codes}
    arrays |= {} if mask is None else {"mask": np.asarray(mask, "float16")}
    files.write_by(path, lambda temporary: np.savez(temporary, **arrays))


@contextlib.contextmanager
def opened(path):
    """The arrays of an .npz, by name, each read when it is asked for; nothing in it is executed.

    Raises:
        DataError: naming the file, if it is damaged, or something else.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except (EOFError, KeyError, TypeError, ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise archive.DataError(
            f"{path} cannot be read ({str(error) or type(error).__name__}); remove it and run `train.py latents` again."
        ) from error


def read(path, *names):
    """Some arrays of a file of latents; those of a large file stay on disk, and are read where they are looked at.

    Args:
        path: what `write` has written.
        names: of its arguments.

    Returns:
        The arrays, in that order.

    Raises:
        DataError: naming the file, if it is damaged, lacks one of them, or they do not belong together.
    """
    with opened(path) as file:
        large = os.path.getsize(path) > WHOLE
        arrays = [mapped(file, name) if large and name in VIEWED else file[name] for name in names]
        count = len(file["z"])
        for name, array in zip(names, arrays, strict=True):
            views = VIEWED.get(name, 0)
            fits = array.ndim == (views or 1) and array.shape[views > 0] == count and (not views or len(array))
            if array.dtype.kind not in "iuf" or not fits:
                raise ValueError(f"its {name} are of shape {array.shape} and type {array.dtype}")
            if not large and array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"its {name} are no numbers")
    return arrays


def codes(path, shape, number):
    """The codes in a file, checked before anybody looks them up in a codebook.

    Args:
        path: what `write` has written.
        shape: of the codes of one slice.
        number: of the codes that there are.

    Returns:
        (V, N, *shape), whole numbers from 0 to `number` - 1.

    Raises:
        DataError: as `read`; or if they are not of that shape, or others.
    """
    (found,) = read(path, "codes")
    with opened(path):  # for its message
        if found.dtype.kind not in "iu" or found.shape[2:] != tuple(shape) or found.min() < 0 or found.max() >= number:
            raise ValueError(f"its codes are not of shape {tuple(shape)}, or not from 0 to {number - 1}")
    return found


def mapped(file, name):
    """An array of an open .npz as a memory map: `write` compresses nothing, so that it lies in the file as in memory.

    Unlike what is read whole, it is not compared with its checksum.
    """
    entry, stream = file.zip.getinfo(f"{name}.npy"), file.fid
    if entry.compress_type != zipfile.ZIP_STORED:  # not by `write`
        return file[name]
    stream.seek(entry.header_offset + 26)
    stream.seek(entry.header_offset + 30 + sum(struct.unpack("<HH", stream.read(4))))  # over its name and extra field
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, kind = header(stream)
    if by_columns:
        return file[name]
    return np.memmap(stream.name, kind, "r", stream.tell(), shape)


def ranges(path):
    """The range of each channel of the latents in a file, in all views: what a second stage's x_0 is clipped to.

    Returns:
        (lows, highs), tuples of C numbers: all but a 10,000th of the latents on either side lie between them.
    """
    (latents,) = read(path, "latents")
    views, count, *_, channels = latents.shape
    slices = np.array(evenly(views * count, max(1, SEEN * views * count // latents.size)))
    seen = latents[slices // count, slices % count].reshape(-1, channels).astype("float32")
    edges = np.quantile(seen, (1e-4, 1.0 - 1e-4), axis=0)
    return tuple(map(tuple, edges.tolist()))


def make_dataset(
    path,
    batch_size: int,
    training: bool,
    *,
    seed: int = 0,
    start_step: int = 0,
    codes: bool = False,
    masks=False,
    most: int | None = None,
    share: tuple[int, int] = UNSHARED,
) -> "tf.data.Dataset":
    """Batches of the latents in a file, in the same order as `dataset.make_dataset` gives slices.

    Args:
        path: what `write` has written.
        batch_size, training, seed, start_step, most, share: as in `dataset.make_dataset`. Training goes through the
            views, epoch by epoch; otherwise it is view 0, the slices as they are.
        codes: the codes instead of the latents.
        masks: whether the tissue fractions come along.

    Returns:
        Dataset of {"image": (B, h, w, C) float32, the latents, "z", "label", "case": (B,) int32, "augmented": (B,)
        float32, 0 where the view is 0, else 1}; or, instead of "image", "codes": (B, h, w) int32. With masks also
        "mask": (B, h, w, 4) float32.
    """
    name, kind = ("codes", "int32") if codes else ("image", "float32")
    latents, z, label, case = read(path, "codes" if codes else "latents", "z", "label", "case")
    (fractions,) = read(path, "mask") if masks else (None,)
    views, count, *shape = latents.shape
    elements = order.element_order(count, batch_size, training, seed, most, share)

    def gather(step):
        n, place = elements(step)
        view = (n // count + place) % views if training else 0
        fraction = fractions[view, place].astype("float32") if masks else np.zeros(0, "float32")
        augmented = np.full(len(place), view > 0, "float32")
        return latents[view, place].astype(kind), z[place], label[place], case[place], augmented, fraction

    full = batch_size // share[1] if training else None

    def batch(step):
        kinds = [tf.as_dtype(kind), *[tf.int32] * 3, tf.float32, tf.float32]
        image, *conditions, fraction = tf.numpy_function(gather, [step], kinds)
        named = zip(("z", "label", "case", "augmented"), conditions, strict=True)
        return {
            name: tf.ensure_shape(image, [full, *shape]),
            **{key: tf.ensure_shape(value, [full]) for key, value in named},
            **({"mask": tf.ensure_shape(fraction, [full, *fractions.shape[2:]])} if masks else {}),
        }

    return order.in_order(order.steps(min(count, most or count), batch_size, training, start_step).map(batch))
