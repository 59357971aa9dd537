"""Tissue masks: read, fitted as their slices are, moved with them, laid on the grid of the latents."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from small_archives import THREE, brain, encode, oasis_entries, take, undecodable, write

import dataset
from dataset import DataError, data_errors, make_dataset, open_source
from ldm.data import masks
from ldm.data.pixels import augment


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    path = tmp_path_factory.mktemp("masks") / "phantom.zip"
    dataset.write_phantoms(path, people=3, image_size=64)
    return open_source(path)


def masks_in_order(source, size=64, split="train", **options):
    batches = make_dataset(source, split, size, 5, False, masks=True, **options)
    return np.concatenate([batch["mask"] for batch in batches.as_numpy_iterator()])


@pytest.mark.parametrize("split", ["train", "test"])  # rows of the table start at 0 in the first, not in the second
def test_masks_are_the_levels_of_their_files(phantoms, split):
    expected = [
        np.asarray(Image.open(io.BytesIO(phantoms.store.read(phantoms.masks[phantoms.entries[row]])))) // 85
        for row in phantoms.select(split)
    ]
    found = masks_in_order(phantoms, split=split)
    assert found.dtype == np.int32 and set(np.unique(found)) == {0, 1, 2, 3}
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(masks_in_order(phantoms, split=split, cache_bytes=0), expected)


def test_a_smaller_mask_stays_where_its_slice_is(phantoms):
    small = masks_in_order(phantoms, 32)
    assert small.shape[1:] == (32, 32)
    halves = masks_in_order(phantoms).reshape(len(small), 32, 2, 32, 2)
    agree = (halves == small[:, :, None, :, None]).all(axis=(2, 4))  # all four pixels are of that class
    uniform = (halves == halves[:, :, :1, :, :1]).all(axis=(2, 4))
    assert agree[uniform].mean() > 0.99 and uniform.mean() > 0.5


@pytest.mark.parametrize("size", [32, 61, 100, 200])
def test_a_mask_is_fitted_as_its_slice_is(tmp_path, size):
    """A picture that is its own mask: white where most of a pixel is white, whatever the margins and the scale."""
    waves = np.sin(np.arange(100)[:, None] / 7) + np.cos(np.arange(60) / 5 + np.arange(100)[:, None] / 11)
    pixels = encode(np.where(waves > 0, 255, 0).astype(np.uint8))
    entries = {name: pixels for name in oasis_entries(THREE, slices=1)}
    batch = take(make_dataset(write(tmp_path / "a.zip", entries), "train", size, 1, False, masks=True), 1)[0]
    light = batch["image"][..., 0] * 127.5 + 127.5
    clear = np.abs(light - 127.5) > 1  # where black and white cover half each, either is right
    assert set(np.unique(batch["mask"])) == {0, 3} and clear.mean() > 0.9
    np.testing.assert_array_equal((batch["mask"] == 3)[clear], (light > 127.5)[clear])


def test_masks_move_with_their_slices(phantoms):
    """Slices whose pixels say the class: after augmentation, picture and mask still say the same."""
    masks = masks_in_order(phantoms)[10:26].astype("int32")
    images = (masks[..., None] / 1.5 - 1.0).astype("float32")
    seeds = np.stack([np.zeros(16, "int64"), np.arange(16)], axis=-1)
    plain = np.asarray(augment(images, seeds, flip=True))
    changed, moved = augment(images, seeds, flip=True, masks=masks)
    np.testing.assert_array_equal(changed, plain)  # asking for masks changes no picture
    moved = np.asarray(moved)
    assert moved.dtype == np.int32 and (moved != masks).any(axis=(1, 2)).all()
    _, ends = augment(images, seeds, flip=True, masks=np.where(masks > 0, 3, 0).astype("int32"))
    assert set(np.unique(ends)) == {0, 3}  # no grey matter between background and white
    for tissue in (0, 3):  # black and white stay through the bend of intensities, and the rest is between them
        inside = (
            np.asarray(
                tf.nn.erosion2d(
                    (moved == tissue).astype("float32")[..., None],
                    np.zeros((5, 5, 1), "float32"),
                    [1] * 4,
                    "SAME",
                    "NHWC",
                    [1] * 4,
                )
            )[..., 0]
            > 0
        )
        assert inside.sum() > 100
        np.testing.assert_allclose(np.asarray(changed)[inside, 0], -1.0 if tissue == 0 else 1.0, atol=0.12)


def test_training_masks_are_a_function_of_the_seed_and_of_nothing_else(phantoms):
    def some(**options):
        return take(make_dataset(phantoms, "train", 64, 4, True, masks=True, flip=True, seed=3, **options), 2)

    first, second = some(), some(cache_bytes=0)
    without = take(make_dataset(phantoms, "train", 64, 4, True, flip=True, seed=3), 2)
    for one, other, plain in zip(first, second, without, strict=True):
        np.testing.assert_array_equal(one["mask"], other["mask"])
        np.testing.assert_array_equal(one["image"], plain["image"])
        brain = one["image"][..., 0] > -0.7
        assert ((one["mask"] > 0) == brain).mean() > 0.95 and brain.any()
    np.testing.assert_array_equal(some(start_step=1)[0]["mask"], first[1]["mask"])


def test_a_slice_without_a_mask_is_unknown_throughout(tmp_path):
    entries = oasis_entries(THREE)
    entries = {name: data for name, data in entries.items() if not name.endswith("seg_001_slice_1.nii.png")}
    levels = encode(np.full((24, 24), 170, np.uint8))
    entries = {name: levels if "/seg_" in name else data for name, data in entries.items()}
    source = open_source(write(tmp_path / "a.zip", entries))
    found = masks_in_order(source, 24)
    assert (found[1] == -1).all() and (np.delete(found, 1, axis=0) == 2).all()
    for batch in take(make_dataset(source, "train", 24, 4, True, masks=True), 3):
        unknown = (batch["mask"] < 0).any(axis=(1, 2))
        np.testing.assert_array_equal(unknown, (batch["case"] == 1) & (batch["z"] == 1))
        assert (batch["mask"][unknown] == -1).all()


def test_a_source_without_masks_is_refused(tmp_path):
    without = write(tmp_path / "a.zip", oasis_entries(THREE, masks=False))
    with pytest.raises(DataError, match="no tissue masks: do without"):
        make_dataset(without, "train", 24, 4, True, masks=True)


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (lambda: encode(np.full((24, 24), 7, np.uint8)), "is no tissue mask.*0, 85, 170, 255"),
        (lambda: encode(np.full((24, 24), 170, np.uint16)), "is no tissue mask.*8-bit grey"),
        (lambda: encode(np.zeros((24, 24, 3), np.uint8)), "is no tissue mask.*8-bit grey"),
        (lambda: encode(brain(0))[:40], "truncated"),
        (lambda: encode(np.zeros((8200, 1), np.uint8)), "limit 8192"),
        (undecodable, "cannot be decoded"),
    ],
)
def test_a_bad_mask_is_named(tmp_path, cache_bytes, mask, words):
    entries = oasis_entries(THREE)
    name = "keras_png_slices_data/keras_png_slices_seg_train/seg_002_slice_1.nii.png"
    source = open_source(write(tmp_path / "a.zip", entries | {name: mask()}))
    take(make_dataset(source, "train", 24, 4, False, cache_bytes=cache_bytes), 99)  # who wants no masks reads none
    with pytest.raises(DataError, match=f"seg_002_slice_1.*{words}") as caught, data_errors(source):
        take(make_dataset(source, "train", 24, 4, False, masks=True, cache_bytes=cache_bytes), 99)
    assert "\n" not in str(caught.value)


def test_tissue_fractions_are_means_over_the_pixels_of_a_latent():
    classes = np.zeros((2, 8, 8), "int32")
    classes[0, 2:4, 4:6] = 3  # one latent of 2x2 pixels, and within the crop box
    classes[0, 4, 4] = 1
    classes[1] = -1
    found = masks.tissue_fractions(tf.constant(classes), (2, 3), crop_box=[2, 2, 4, 6]).numpy()
    expected = np.zeros((2, 3, 4))
    expected[..., 0] = 1
    expected[0, 1] = (0, 0, 0, 1)
    expected[1, 1] = (0.75, 0.25, 0, 0)
    np.testing.assert_allclose(found[0], expected)
    assert (found[1] == 0).all()
