"""One file by itself, of whomever it is: a picture, or a volume as a stack of slices; fitted as those of an archive."""

from pathlib import Path

import numpy as np

from ldm.data import archive, centring, pixels, volumes
from ldm.later import tensorflow as tf

SUFFIXES = (*archive.IMAGE_SUFFIXES, ".nii", ".nii.gz", ".mgz", ".mgh")
MOST_BYTES = 128 * 2**20
MOST_VOXELS = 2**26  # four times 256^3


def read(path, size: int, axis: int = 2, center: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """The slices in a file, as `dataset.make_dataset` yields them.

    Args:
        path: a PNG or a JPEG, or a volume in one file.
        size: pixels of a side.
        axis: along which a volume is cut.
        center: move the head to the middle, as `dataset.open_source` does.

    Returns:
        (N, size, size, 1) float32 in [-1, 1]; and the places of a volume's slices along the axis, (N,) int, or None.

    Raises:
        DataError: names the file that is too large, damaged, or something else.
    """
    path = Path(path)
    if not path.name.lower().endswith(SUFFIXES):
        raise archive.DataError(f"{path} is none of {', '.join(SUFFIXES)}: give a picture, or a volume in one file.")
    if (length := path.stat().st_size) > MOST_BYTES:
        raise archive.DataError(f"{path} has {length:,} bytes, and {MOST_BYTES:,} are the limit: make it smaller.")
    if not archive.is_volume(path.name):
        return _scaled(center, _picture(path, size)), None
    store = volumes.VolumeStore({path.name: path}, axis, MOST_VOXELS)
    found = [_fitted(store.read(name), archive.RAW, size, store.shape(name)) for name in store.names]
    return _scaled(center, *found), np.array([place for _, _, place in store.slices])


def _picture(path: Path, size: int):
    data = path.read_bytes()
    try:
        code = archive.probe(data)
    except ValueError as error:
        raise archive.DataError(f"{path} {error}; replace it.") from error
    try:
        return _fitted(data, code, size)
    except (tf.errors.OpError, ValueError) as error:
        raise archive.DataError(f"{path} cannot be decoded; replace it.") from error


def _fitted(data: bytes, code: int, size: int, shape=(0, 0)):
    return pixels.fit(pixels.decode(data, tf.constant(code), shape), size).numpy()


def _scaled(center, *slices):
    if center:
        shift = centring.of_stack(np.stack(slices)[..., 0])
        slices = [centring.moved(image, shift) for image in slices]
    return np.stack(slices).astype("float32") / np.float32(127.5) - np.float32(1.0)
