"""From bytes to pixels: levels, sizes, augmentation, the crop box."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from small_archives import THREE, brain, encode, oasis_entries, take, undecodable, write

import dataset
from dataset import DataError, data_errors, make_dataset, open_source
from ldm.data import archive, pixels
from ldm.data.pixels import augment, is_cut_off


def one_picture(tmp_path, data, size, suffix="png"):
    """What `make_dataset` makes of one encoded slice, (size, size)."""
    path = write(tmp_path / "one", {f"{case}_0.{suffix}": data for case in range(2)})
    return take(make_dataset(path, "train", size, 1, False), 1)[0]["image"][0, :, :, 0]


def test_eight_bit_levels_are_kept(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_allclose(one_picture(tmp_path, encode(pixels), 16), pixels / 127.5 - 1, atol=1e-6)


def test_colour_is_weighed(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[..., 1] = 200
    assert one_picture(tmp_path, encode(pixels), 16)[0, 0] == pytest.approx(0.587 * 200 / 127.5 - 1, abs=0.01)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "L"])
def test_what_is_transparent_is_black(tmp_path, mode):
    """White where nothing is to be seen, half seen in one row, 200 elsewhere."""
    alpha = np.full((16, 16), 255, np.uint8)
    alpha[:, 8:], alpha[4, :8] = 0, 128
    light = np.where(alpha == 0, 255, 200).astype(np.uint8)
    picture = Image.fromarray(light)
    buffer = io.BytesIO()
    if mode in ("LA", "RGBA"):
        picture = picture.convert(mode)
        picture.putalpha(Image.fromarray(alpha))
        picture.save(buffer, "PNG")
    else:  # one level or place of the palette is transparent
        (picture.convert(mode) if mode == "L" else picture.quantize(2)).save(
            buffer, "PNG", transparency=255 if mode == "L" else int(np.asarray(picture.quantize(2))[0, 12])
        )
        alpha[4, :8] = 255
    image = one_picture(tmp_path, buffer.getvalue(), 16)
    expected = np.where(alpha == 0, 0, 200 * (alpha / 255.0))
    np.testing.assert_allclose((image + 1) * 127.5, expected, atol=1.01)


def test_sixteen_bit_percentile_becomes_white(tmp_path):
    pixels = np.zeros((64, 64), np.uint16)
    pixels[16:48, 16:48] = np.linspace(100, 4000, 1024).reshape(32, 32)
    pixels[16, 16] = 65535  # one hot pixel must not darken the brain
    image = one_picture(tmp_path, encode(pixels), 64)
    assert image[47, 47] == pytest.approx(1.0, abs=0.01)
    assert image[32, 16] == pytest.approx(2 * pixels[32, 16] / 4000 - 1, abs=0.02)
    assert image[0, 0] == -1.0
    assert (one_picture(tmp_path, encode(np.zeros((64, 64), np.uint16)), 64) == -1).all()


def test_jpeg_noise_is_black(tmp_path):
    pixels = np.pad(brain(160, 60), 20)
    noisy = pixels + np.random.default_rng(0).integers(0, 4, pixels.shape, dtype=np.uint8)
    image = one_picture(tmp_path, encode(noisy, "JPEG"), 100, "jpg")
    assert (image[:16] == -1).all() and (image[:, -16:] == -1).all()
    assert image[50, 50] == pytest.approx(201 / 127.5 - 1, abs=0.05)


@pytest.mark.parametrize("size", [32, 61, 200])
def test_resizing_keeps_the_aspect_ratio_and_the_background(tmp_path, size):
    pixels = np.zeros((100, 60), np.uint8)
    pixels[20:80, 10:50] = 255  # 60 high, 40 wide, centred
    image = one_picture(tmp_path, encode(pixels), size)
    bright = image > 0
    assert bright.any(0).sum() == pytest.approx(0.4 * size, abs=1.5)
    assert bright.any(1).sum() == pytest.approx(0.6 * size, abs=1.5)
    np.testing.assert_array_equal(image, image[:, ::-1])  # the black margins are equal
    margin = int(0.25 * size)
    assert (image[:, :margin] == -1).all() and (image[:, -margin:] == -1).all()
    assert image.max() == 1.0


def test_small_pictures_are_antialiased(tmp_path):
    stripes = np.tile(np.array([0, 255, 255, 0], np.uint8), (128, 32))
    image = one_picture(tmp_path, encode(stripes), 32)
    assert np.abs(image[2:-2, 2:-2]).max() < 0.3  # without antialiasing, every sample would hit white


def disc(size=64):
    y, x = np.indices((size, size)) - (size - 1) / 2
    image = np.where(np.hypot(x, y) < size / 4, 0.4, -1.0) + np.where((np.hypot(x - 6, y - 3) < 5), 0.4, 0.0)
    return np.maximum(image, -1).astype(np.float32)[None, :, :, None]


def seeds(count, start=0):
    return np.stack([np.zeros(count, np.int64), np.arange(start, start + count)], axis=-1)


def test_augment_depends_on_the_seed_of_each_slice_only():
    images = np.repeat(disc(), 6, axis=0)
    together = augment(images, seeds(6)).numpy()
    np.testing.assert_array_equal(augment(images[:2], seeds(2, start=3)).numpy(), together[3:5])
    assert len({image.tobytes() for image in together}) == 6


def test_augment_leaves_background_black_and_stays_in_range():
    images = np.repeat(disc(), 64, axis=0)
    changed = augment(images, seeds(64), flip=True).numpy()
    assert (changed[:, :8] == -1).all() and (changed[:, :, -8:] == -1).all()
    assert changed.min() == -1 and changed.max() <= 1
    assert (augment(np.full((2, 16, 16, 1), -1.0, np.float32), seeds(2)).numpy() == -1).all()
    areas = (changed > -0.5).sum((1, 2, 3)) / (images > -0.5).sum((1, 2, 3))
    assert 0.85 < areas.min() < 0.95 and 1.05 < areas.max() < 1.15  # scale 5 %: area 10 %


def test_augment_changes_in_proportion_to_its_strength():
    images = np.repeat(disc(), 64, axis=0)
    areas, brightness = [], []
    for strength in (0.0, 0.4, 1.0):
        changed = augment(images, seeds(64), strength=strength).numpy()
        areas.append(np.std((changed > -0.5).sum((1, 2, 3))))
        brightness.append(np.std(changed[:, 30, 26]))
        if not strength:  # nothing moves; only the filter against the blur of a warp is at work, on edges
            np.testing.assert_allclose(changed[:, 24:36, 24:30], images[:, 24:36, 24:30], atol=1e-6)
    for spread in (areas, brightness):
        assert spread[0] == pytest.approx(0, abs=1e-3) and spread[1] == pytest.approx(0.4 * spread[2], rel=0.2)


def test_augment_for_a_generator_moves_heads_and_leaves_their_size_and_light():
    """A disc of two greys may move by the whole range, and its area and its greys stay."""
    images = np.repeat(disc(), 64, axis=0)
    changed = augment(images, seeds(64), strength=(1.0, 0.0)).numpy()
    moved = [np.argwhere(image[..., 0] > -0.5).mean(0) for image in changed]
    assert np.std(moved, axis=0).min() > 0.5
    areas = (changed > -0.5).sum((1, 2, 3)) / (images > -0.5).sum((1, 2, 3))
    assert np.abs(areas - 1).max() < 0.03
    assert np.abs(np.median(changed[changed > -0.5]) - np.median(images[images > -0.5])) < 1e-3


def test_augment_keeps_fine_detail():
    rng = np.random.default_rng(0)
    window = np.hanning(64)[:, None] * np.hanning(64)
    images = (window * rng.uniform(0.4, 1.4, (64, 64, 64)) - 1).astype(np.float32)[..., None]

    def power(pictures):  # between a quarter and the half of the sampling frequency; a bare warp keeps half of it
        frequency = np.fft.fftfreq(64)
        radius = np.hypot(frequency[:, None], frequency)
        return (np.abs(np.fft.fft2(pictures[..., 0])) ** 2)[:, (radius > 0.25) & (radius < 0.5)].sum()

    assert 0.75 < power(augment(images, seeds(64)).numpy()) / power(images) < 1.2


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize(
    "draw",
    [*np.eye(6), -np.eye(6)[0], (1, 1, 1, 1, 0, 0), (-1, 1, -1, 0.5, 0, 0)],
    ids=["turn", "zoom", "right", "down", "bend", "gain", "turn back", "all moves", "other moves"],
)
def test_augment_does_what_it_says_at_the_ends_of_its_ranges(draw, strength, monkeypatch):
    """5 degrees, 5 %, 3 % of the side about the middle of the picture; u + 0.15 u (1 - u); 5 % brighter.

    A round spot a quarter of the picture off the middle goes where the inverse of the map to the input sends it.
    """
    numbers = tf.constant([*draw, 1.0], tf.float32)
    monkeypatch.setattr(tf.random, "stateless_uniform", lambda *_: numbers)
    turn, zoom, right, down, bend, gain = strength * np.array(draw)
    place, start = np.arange(64) - 31.5, np.array([16.0, -6.0])
    spot = np.exp(-((place[:, None] - start[1]) ** 2 + (place - start[0]) ** 2) / (2 * 3.0**2))
    level = np.full((64, 64), 0.4)
    images = (2 * np.stack([0.8 * spot, level])[..., None] - 1).astype("float32")
    moved, flat = (augment(images, seeds(2), strength=strength).numpy()[..., 0] + 1) / 2
    angle = np.deg2rad(5 * turn)
    matrix = (1 + 0.05 * zoom) * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    expected = np.linalg.solve(matrix, start - 0.03 * 64 * np.array([right, down]))
    found = [(moved.sum(axis=axis) @ place) / moved.sum() for axis in (0, 1)]  # x, y
    np.testing.assert_allclose(found, expected, atol=0.05)
    light = (1 + 0.05 * gain) * (0.4 + 0.15 * bend * 0.4 * 0.6)
    np.testing.assert_allclose(flat[16:48, 16:48], light, atol=1e-5)


def test_augment_mirrors_about_the_middle(monkeypatch):
    image = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 1)).astype("float32")
    found = []
    for mirror in (1.0, -1.0):
        numbers = tf.constant([0.0] * 6 + [mirror])
        monkeypatch.setattr(tf.random, "stateless_uniform", lambda *_, numbers=numbers: numbers)
        found.append(augment(image, seeds(1), flip=True).numpy())
    np.testing.assert_allclose(found[1], found[0][:, :, ::-1], atol=1e-5)


def test_with_no_strength_slices_are_mirrored_to_the_pixel_and_no_more():
    images = np.random.default_rng(0).uniform(-1, 1, (200, 12, 12, 1)).astype("float32")
    masks = (images[..., 0] > 0).astype("int32")
    changed, moved = augment(images, seeds(200), flip=True, masks=masks, strength=0.0)
    mirrored = np.array([not np.array_equal(*pair) for pair in zip(images, changed, strict=True)])
    assert 70 < mirrored.sum() < 130
    np.testing.assert_array_equal(changed, np.where(mirrored[:, None, None, None], images[:, :, ::-1], images))
    np.testing.assert_array_equal(moved, np.where(mirrored[:, None, None], masks[:, :, ::-1], masks))
    np.testing.assert_array_equal(augment(images, seeds(200), strength=0.0), images)


def test_augment_flips_half_when_asked():
    images = np.repeat(disc(), 200, axis=0)
    half = slice(0, 32)

    def heavier_left(pictures):
        return pictures[:, :, half].sum((1, 2, 3)) > pictures[:, :, ::-1][:, :, half].sum((1, 2, 3))

    light = images + 1
    assert not heavier_left(light).any()

    def centred(flip):  # the spot relative to the disc, so that shifts do not count
        changed = augment(images, seeds(200), flip).numpy()[..., 0]
        x = np.arange(64)
        disc_x = ((changed > -0.5) * x).sum((1, 2)) / (changed > -0.5).sum((1, 2))
        bright = changed > 0.58
        return (bright * x).sum((1, 2)) / np.maximum(bright.sum((1, 2)), 1) - disc_x

    assert (centred(False) > 0).all()
    assert 70 < (centred(True) < 0).sum() < 130


def test_decoder_failure_becomes_a_data_error(tmp_path):
    entries = oasis_entries(THREE)
    name = "keras_png_slices_data/keras_png_slices_train/case_002_slice_1.nii.png"
    entries[name] = undecodable()
    source = open_source(write(tmp_path / "a.zip", entries))
    for training in (True, False):
        with pytest.raises(DataError, match="case_002_slice_1"):
            make_dataset(source, "train", 16, 4, training)
    with pytest.raises(DataError, match="case_002_slice_1"), data_errors(source):
        take(make_dataset(source, "train", 16, 4, False, cache_bytes=0), 99)


def test_unchecked_damage_is_named_while_streaming(tmp_path):
    entries = oasis_entries(THREE)
    name = "keras_png_slices_data/keras_png_slices_train/case_002_slice_1.nii.png"
    entries[name] = b"no image"
    source = open_source(write(tmp_path / "a.zip", entries), check=False)
    with pytest.raises(DataError) as caught, data_errors():
        take(make_dataset(source, "train", 16, 4, True, cache_bytes=0), 99)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "step", "expected"),
    [
        (80, 8, [22, 34, 24, 32]),  # rows 25-42, columns 36-63, room of 2: 22 and 32 pixels
        (80, 1, [23, 34, 22, 32]),
        (80, 40, [14, 30, 40, 40]),
        (80, 80, None),
    ],
)
def test_the_crop_box_holds_what_training_slices_show(tmp_path, size, step, expected):
    entries = {}
    for split, case, rows, columns in (
        ("train", 1, (25, 40), (40, 60)),
        ("train", 2, (30, 43), (36, 64)),
        ("validate", 3, (0, 80), (0, 80)),
        ("test", 4, (0, 80), (0, 80)),
    ):
        pixels = np.zeros((80, 80), np.uint8)
        pixels[slice(*rows), slice(*columns)] = 1
        entries[f"keras_png_slices_{split}/case_{case:03d}_slice_0.nii.png"] = encode(pixels)
    source = dataset.open_source(write(tmp_path / "a.zip", entries))
    assert dataset.brain_box(source, size, step) == expected


def test_half_a_progressive_jpeg_is_cut_off():
    """It shows the whole picture, in few waves: nothing of it is grey."""
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 60, (64, 64), dtype=np.uint8)
    Image.fromarray(brain(0, 64) // 2 + noise).save(stream, "JPEG", progressive=True, quality=92)
    whole = stream.getvalue()
    assert not is_cut_off(whole)
    assert all(is_cut_off(whole[: int(part * len(whole))] + b"\xff\xd9") for part in (0.5, 0.8, 0.95))


def test_pixels_are_bounded_with_their_channels():
    """16-bit RGBA of 5,000 x 5,000 pixels takes 200 MB; as 8-bit grey it takes 25 MB."""
    head = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + b"IHDR" + 2 * (5000).to_bytes(4, "big")
    with pytest.raises(ValueError, match="declares 5000 x 5000 pixels of 8 bytes"):
        archive.probe(head + bytes((16, 6)) + bytes(30))
    with pytest.raises(ValueError, match="PNG"):
        archive.probe(head + bytes((8, 0)) + bytes(30))


@pytest.mark.parametrize("kind", ["L", "I;16", "RGB", "RGBA", "P"])
def test_that_all_pictures_are_of_one_grey_is_said(kind, tmp_path):
    """Black slices beside others are the ends of a stack."""
    plain = Image.fromarray(np.full((8, 8), 7, np.uint16)) if kind == "I;16" else Image.new(kind, (8, 8))
    plain.save(stored := io.BytesIO(), "PNG")
    black = {f"p{p}_{z}.png": stored.getvalue() for p in range(3) for z in (0, 1)}
    (said,) = open_source(write(tmp_path / "black", black)).listing.notes
    assert said.startswith("6 pictures that were looked at are of one grey each (such as 'p")
    assert not open_source(write(tmp_path / "ends", black | {"p1_1.png": encode(brain(0))})).listing.notes


def test_colour_is_said_and_grey_stored_as_colour_is_none():
    grey = Image.fromarray(brain(0))

    def said(image, kind="PNG"):
        image.save(stored := io.BytesIO(), kind)
        return pixels.notes(["a.png", "b.png"], lambda entry: stored.getvalue())

    assert not any(map(said, (grey, grey.convert("RGB"), grey.convert("P")))) and not said(grey.convert("RGB"), "JPEG")
    hot = Image.merge("RGB", (grey, Image.new("L", grey.size), grey))
    assert said(hot) == [
        "2 of 2 pictures that were looked at are in colour (such as 'a.png'); their brightness is read"
    ]
    assert said(hot.convert("P")) == said(hot, "JPEG") == said(hot)


def test_pictures_that_exif_would_turn_are_said():
    def said(orientation):
        exif = Image.Exif()
        exif[pixels.ORIENTATION] = orientation
        Image.fromarray(brain(0)).save(stored := io.BytesIO(), "JPEG", exif=exif)
        return pixels.notes(["a.jpg", "b.jpg"], lambda entry: stored.getvalue())

    assert said(1) == [] and said(6)[0].startswith("2 of 2 pictures that were looked at say by EXIF how to turn them")


@pytest.mark.parametrize("kind", ["LA", "RGBA"])
def test_that_all_pictures_are_transparent_is_said(kind, tmp_path):
    """What is transparent is black, whatever colours lie below."""
    pictures = {}
    for p in range(3):
        for z in (0, 1):
            image = Image.fromarray(brain(9 * p + z)).convert(kind)
            image.putalpha(0)
            image.save(stored := io.BytesIO(), "PNG")
            pictures[f"p{p}_{z}.png"] = stored.getvalue()
    (said,) = open_source(write(tmp_path / "unseen", pictures)).listing.notes
    assert said.startswith("6 pictures that were looked at are of one grey each")
    assert not open_source(write(tmp_path / "seen", pictures | {"p1_1.png": encode(brain(0))})).listing.notes
