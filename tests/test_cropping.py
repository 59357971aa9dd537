"""ldm/cropping.py: a crop comes back to its place, and the box around a brain has room and whole steps."""

import numpy as np
import pytest

from ldm.cropping import CropBox


def test_a_box_is_the_list_of_the_settings():
    box = CropBox(*[3, 0, 8, 16])
    assert list(box) == [3, 0, 8, 16] and list(box[2:]) == [8, 16] == list(box.shape)
    top, left, height, width = box
    assert (top, left, height, width) == (3, 0, 8, 16)


@pytest.mark.parametrize("last", [(), (1,), (3,)])
def test_padding_puts_a_crop_back_to_its_place(last):
    images = np.random.default_rng(0).normal(size=(2, 16, 16, *last)).astype("float32")
    box = CropBox(3, 0, 8, 12)
    inside = np.asarray(box.crop(images))
    np.testing.assert_array_equal(inside, images[:, 3:11, 0:12])
    whole = np.asarray(box.pad(inside, -1.0, 16))
    expected = np.full_like(images, -1.0)
    expected[:, 3:11, 0:12] = images[:, 3:11, 0:12]
    np.testing.assert_array_equal(whole, expected)


def test_the_rim_is_blank_where_an_edge_is_not_the_pictures_own():
    whole = np.asarray(CropBox(3, 0, 8, 12).pad(np.ones((1, 8, 12), "float32"), 0.0, 16, rim=2))[0]
    expected = np.zeros((16, 16))
    expected[5:9, 0:10] = 1.0  # above, below and to the right; on the left the picture ends
    np.testing.assert_array_equal(whole, expected)


def filled(size, top, left, height, width):
    seen = np.zeros((size, size), bool)
    seen[top, left] = seen[top + height - 1, left + width - 1] = True
    return seen


def test_a_box_holds_the_brain_with_room_on_every_side_in_whole_steps():
    """80 pixels leave room of 2: 21 + 4 rows make 32, and 31 + 4 columns make 40, in steps of 8; both centred."""
    box = CropBox.around(filled(80, 30, 25, 21, 31), step=8)
    assert box == (24, 20, 32, 40) and all(type(side) is int for side in box)


def test_a_box_does_not_leave_the_picture():
    assert CropBox.around(filled(80, 0, 60, 20, 20), step=8) == (0, 56, 24, 24)
    assert CropBox.around(filled(80, 0, 0, 80, 79), step=32) == (0, 0, 80, 80)
    assert CropBox.around(np.zeros((80, 80), bool), step=8) == (0, 0, 80, 80)
