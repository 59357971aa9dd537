"""Heads in the middle: moved by whole pixels, scan by scan, the same wherever they are read."""

import io

import numpy as np
import pytest
from PIL import Image
from small_archives import encode, volume, write

import dataset
from ldm.data import centring, single

SIZE = 48
PLACES = {1: (0, 0), 2: (7, -9), 3: (-12, 4), 4: (3, 3), 5: (-5, 11), 6: (9, 0)}


def head(z):
    """Slice z of a head: the middle one is the largest, and no row of it looks like another."""
    pixels, half = np.zeros((SIZE, SIZE), np.uint8), 6 + 2 * z
    pixels[24 - half : 24 + half, 20:28] = (60 + 10 * z + 4 * np.arange(2 * half))[:, None]
    return pixels


def grey(image):
    """(S, S, 1) in [-1, 1] -> the levels of the file."""
    return np.round((image[..., 0] + 1) * 127.5)


def moved(pixels, place):
    return np.roll(pixels, place, axis=(0, 1))


@pytest.fixture
def heads(tmp_path):
    """Six people with three slices and masks each, somewhere in the picture."""
    entries = {}
    for case, place in PLACES.items():
        split = {5: "validate", 6: "test"}.get(case, "train")
        for z in range(3):
            name = f"{case:03d}_slice_{z}.nii.png"
            mask = np.where(head(z) > 0, 170, 0).astype(np.uint8)
            entries[f"keras_png_slices_{split}/case_{name}"] = encode(moved(head(z), place))
            entries[f"keras_png_slices_seg_{split}/seg_{name}"] = encode(moved(mask, place))
    return write(tmp_path / "heads.zip", entries)


@pytest.mark.parametrize("cache_bytes", [0, 2**20], ids=["streamed", "kept"])
def test_every_scan_is_moved_as_a_whole_into_the_middle(heads, cache_bytes):
    source = dataset.open_source(heads, center=True)
    for split in ("train", "validate", "test"):
        found = dataset.read_split(source, split, SIZE, masks=True, cache_bytes=cache_bytes)
        for image, mask, z in zip(found["image"], found["mask"], found["z"], strict=True):
            np.testing.assert_array_equal(grey(image), head(z))
            np.testing.assert_array_equal(mask, np.where(head(z) > 0, 2, 0))


def test_heads_stay_where_they_are_unasked(heads):
    found = dataset.read_split(dataset.open_source(heads), "test", SIZE)
    np.testing.assert_array_equal(grey(found["image"][0]), moved(head(0), PLACES[6]))


def test_the_common_box_becomes_smaller(heads):
    apart, together = (dataset.open_source(heads, center=center) for center in (False, True))
    assert dataset.brain_box(apart, SIZE, 1) == [1, 10, 41, 23]  # rows 2-40, columns 11-31, room of 1
    assert dataset.brain_box(together, SIZE, 1) == [13, 19, 22, 10]


def test_a_picture_by_itself_is_moved_as_one_of_the_archive(heads, tmp_path):
    source = dataset.open_source(heads, center=True)
    row = int(np.flatnonzero(source.case == 2)[-1])
    path = tmp_path / "one.png"
    path.write_bytes(source.store.read(source.entries[row]))
    images, _ = single.read(path, SIZE, center=True)
    np.testing.assert_array_equal(grey(images[0]), head(2))


def test_a_volume_is_moved_as_a_stack(tmp_path):
    path = volume(tmp_path / "sub-1.nii.gz")
    plain, places = single.read(path, 32)
    images, same = single.read(path, 32, center=True)
    np.testing.assert_array_equal(places, same)
    shift = centring.of_stack((plain[..., 0] + 1) * 127.5)
    for before, after in zip(plain, images, strict=True):
        np.testing.assert_array_equal(after[..., 0], np.roll(before[..., 0], -shift, axis=(0, 1)))
    rows, columns = (np.flatnonzero((images[..., 0] > 0).any(axis=(0, axis))) for axis in (2, 1))
    assert abs(rows[0] + rows[-1] + 1 - 32) <= 1 and abs(columns[0] + columns[-1] + 1 - 32) <= 1


def test_where_no_head_is_nothing_moves():
    assert centring.of_stack(np.zeros((1, 16, 16))).tolist() == [0, 0]


def test_specks_and_letters_are_no_head():
    pixels, rng = moved(head(2), (6, -8)).astype(float), np.random.default_rng(0)
    pixels[rng.random(pixels.shape) < 0.01] = 255
    pixels[0:5, 0:7] = 255  # a letter in the corner
    shift = centring.of_stack(pixels[None])
    assert np.abs(shift - [6, -8]).max() <= 1  # a speck may touch the head


def test_what_is_moved_out_of_the_picture_is_gone(tmp_path):
    """Nothing comes back in at the other side, however far a head lies off."""
    pixels = np.zeros((SIZE, SIZE), np.uint8)
    pixels[0:8, 0:8], pixels[-1, -1] = 200, 200  # a head in the corner, a speck in the other
    path = write(tmp_path / "a.zip", {f"{case}_0.png": encode(pixels) for case in range(2)})
    found = dataset.read_split(dataset.open_source(path, center=True), "train", SIZE)["image"][0]
    expected = np.zeros((SIZE, SIZE))
    expected[20:28, 20:28] = 200
    np.testing.assert_array_equal(grey(found), expected)


def test_depth_and_colour_of_a_file_do_not_matter(tmp_path):
    levels = moved(head(2), (5, -6))
    deep = encode(levels.astype(np.uint16) * 100)
    colour = io.BytesIO()
    Image.fromarray(np.stack([levels] * 3, -1)).save(colour, "PNG")
    path = write(tmp_path / "a.zip", {"1_0.png": deep, "2_0.png": colour.getvalue(), "3_0.png": encode(levels)})
    source = dataset.open_source(path, center=True)
    assert centring.offsets(source, np.arange(3), SIZE).tolist() == [[5, -6]] * 3
