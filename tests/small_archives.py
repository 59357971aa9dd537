"""Small archives for tests, and how tests look at them."""

import io
import struct
import zipfile
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from dataset import DataError, open_source

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real slices (shared/data beside the project) are absent")


def encode(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def brain(tag, size=24):
    """A bright square on black, whose grey level tells slices apart."""
    pixels = np.zeros((size, size), np.uint8)
    pixels[size // 4 : -size // 4, size // 4 : -size // 4] = 40 + tag % 200
    return pixels


def oasis_entries(people, slices=3, masks=True, top="keras_png_slices_data/"):
    """people: split -> case numbers. The grey level of slice z of case c is 40 + 10 c + z."""
    entries = {}
    for split, cases in people.items():
        for case in cases:
            for z in range(slices):
                image = encode(brain(10 * case + z))
                entries[f"{top}keras_png_slices_{split}/case_{case:03d}_slice_{z}.nii.png"] = image
                if masks:
                    mask = encode(np.where(brain(0) > 0, 170, 0).astype(np.uint8))
                    entries[f"{top}keras_png_slices_seg_{split}/seg_{case:03d}_slice_{z}.nii.png"] = mask
    return entries


THREE = {"train": [1, 2, 3, 4], "validate": [5], "test": [6]}


def write(path, entries, compression=zipfile.ZIP_STORED):
    """Writes entries as a zip (path ends in .zip) or as a folder."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", compression) as file:
            for name, data in entries.items():
                file.writestr(name, data)
    else:
        for name, data in entries.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def take(stream, count):
    return list(stream.take(count).as_numpy_iterator())


def undecodable():
    """A PNG whose chunks, checksums and end are right, but whose pixels are missing."""
    good, junk = encode(brain(0)), b"IDAT" + zlib.compress(b"\0" * 7)
    end = good.index(b"IDAT") - 4
    return good[:end] + struct.pack(">I", len(junk) - 4) + junk + struct.pack(">I", zlib.crc32(junk)) + good[-12:]


def volume(path, codes=("R", "A", "S"), scale=1000.0, shape=(20, 30, 24)):
    """A box of tissue in RAS, bright in the right anterior superior corner, stored in any orientation."""
    voxels = np.zeros(shape, np.float32)
    voxels[4:16, 5:25, 4:20] = 0.5 * scale
    voxels[13:16, 21:25, 16:20] = scale
    voxels[8:10, 14:16, 1] = 0.5 * scale  # a speck below the brain
    image = nibabel.Nifti1Image(voxels, np.eye(4))
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt(("R", "A", "S")), nibabel.orientations.axcodes2ornt(codes)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image.as_reoriented(turn), path)
    return path


def refuse(data, *words):
    """Opening must fail with one sentence that has all the words in it."""
    with pytest.raises(DataError) as caught:
        open_source(data)
    message = str(caught.value)
    assert "\n" not in message and message.endswith("."), message
    for word in words:
        assert word in message, message


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for key in ("image", "z", "label", "case"):
            np.testing.assert_array_equal(a[key], b[key])
