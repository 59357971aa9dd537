"""Slices in: every layout, every mistake a user can make, and a stream that depends on (seed, n) alone."""

import dataclasses
import io
import json
import os
import struct
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import dataset
from dataset import DataError, data_errors, make_dataset, open_source
from ldm.data import archive
from ldm.data.transforms import augment

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


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for key in ("image", "z", "label", "case"):
            np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture
def course(tmp_path):
    """A small archive in the OASIS course layout, 4 / 1 / 1 people."""
    return write(tmp_path / "oasis.zip", oasis_entries(THREE))


# --------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("place", ["a.zip", "folder"])
@pytest.mark.parametrize("top", ["keras_png_slices_data/", "", "deeper/keras_png_slices_data/"])
def test_oasis_layout_in_zip_and_folder(tmp_path, place, top):
    source = open_source(write(tmp_path / place, oasis_entries(THREE, slices=12, top=top)))
    assert source.kind == "oasis"
    assert [len(source.select(split)) for split in dataset.SPLITS] == [48, 12, 12]
    assert set(source.made.values()) == {"archive"}
    assert sorted(set(source.case.tolist())) == [1, 2, 3, 4, 5, 6]
    assert (source.label == -1).all()
    np.testing.assert_array_equal(source.z[:12], np.arange(12))  # slice 10 after slice 9, not after slice 1
    assert source.entries[10].endswith("case_001_slice_10.nii.png")
    entry = source.entries[10]
    assert source.masks[entry].endswith("keras_png_slices_seg_train/seg_001_slice_10.nii.png")
    assert len(source.masks) == len(source.entries)


@pytest.mark.parametrize("place", ["a.zip", "folder"])
def test_adni_layout_takes_grey_and_colour(tmp_path, place):
    colour = np.repeat(np.pad(brain(0, 240), ((0, 0), (8, 8)))[..., None], 3, axis=-1)
    entries = {}
    for split, scans in {"train": range(100, 108), "test": range(200, 204)}.items():
        for scan in scans:
            for z in (9, 10, 78):
                pixels = colour if scan % 4 < 2 else colour[..., 0]
                label = "AD" if scan % 2 else "NC"
                entries[f"AD_NC/{split}/{label}/{scan}_{z}.jpeg"] = encode(pixels, "JPEG")
    source = open_source(write(tmp_path / place, entries))
    assert source.label_names == ("AD", "NC")
    np.testing.assert_array_equal(source.label, np.where(source.case % 2, 0, 1))
    assert source.made == {"train": "archive", "validate": "carved by case, seed 0", "test": "archive"}
    assert set(source.case[source.select("test")].tolist()) == set(range(200, 204))
    assert set(source.case[source.select("validate")].tolist()) < set(range(100, 108))
    assert source.z[:3].tolist() == [9, 10, 78]
    batch = take(make_dataset(source, "test", 64, 12, False), 1)[0]
    for grey in batch["image"]:
        np.testing.assert_array_equal(grey, batch["image"][0])  # colour comes out as grey does
    assert batch["image"].shape == (12, 64, 64, 1)


def test_class_folders_without_split_folders_are_carved_with_both_labels(tmp_path):
    image = encode(brain(0))
    entries = {f"{'AD' if case % 2 else 'NC'}/{case}_{z}.png": image for case in range(40) for z in range(2)}
    source = open_source(write(tmp_path / "a.zip", entries))
    for split in dataset.SPLITS:
        assert set(source.label[source.select(split)].tolist()) == {0, 1}
    assert [len(np.unique(source.case[source.select(s)])) for s in dataset.SPLITS] == [29, 5, 6]


@pytest.mark.parametrize(
    ("name", "case", "z"),
    [
        ("case_007_slice_12.png", "007", 12),
        ("201739_83.jpeg", "201739", 83),
        ("sub-ann_t1_s4.png", "sub-ann_t1_s", 4),
        ("ann5_axial.png", "ann_axial", 5),
        ("ann.png", "ann", 0),
        ("scan_20240101123456.png", "scan_20240101123456", 0),
    ],
)
def test_case_and_slice_from_file_names(name, case, z):
    assert archive._case_and_slice(name) == (case, z)


def test_flat_folder_passes_over_other_files(tmp_path):
    entries = {f"case_{case}_slice_{z}.png": encode(brain(case)) for case in range(1, 9) for z in range(2)}
    entries |= {"readme.txt": b"hello", ".hidden.png": b"x", "__MACOSX/._case_1_slice_0.png": b"x"}
    source = open_source(write(tmp_path / "flat", entries))
    assert source.kind == "flat"
    assert len(source.entries) == 16
    assert source.made["train"] == "archive" and source.made["test"] == "carved by case, seed 0"
    named = {f"{name}.jpg": encode(brain(0), "JPEG") for name in ("ann", "ben", "cid", "dora")}
    source = open_source(write(tmp_path / "named", named))
    assert sorted(source.case_names.values()) == ["ann", "ben", "cid", "dora"]
    assert (source.z == 0).all()


def test_flat_slices_in_split_folders(tmp_path):
    image = encode(brain(0))
    people = {"train": range(3), "val": range(3, 5), "test": range(5, 7)}
    entries = {f"slices/{split}/{case}_{z}.png": image for split in people for case in people[split] for z in (0, 1)}
    source = open_source(write(tmp_path / "a.zip", entries))
    assert source.label_names == () and set(source.made.values()) == {"archive"}
    assert [len(source.select(split)) for split in dataset.SPLITS] == [6, 4, 4]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_later_of_two_equal_names_counts(tmp_path):
    path = write(tmp_path / "a.zip", oasis_entries(THREE))
    name = "keras_png_slices_data/keras_png_slices_train/case_001_slice_0.nii.png"
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(name, encode(brain(150)))
    source = open_source(path)
    assert len(source.entries) == 18
    first = take(make_dataset(source, "train", 24, 1, False), 1)[0]["image"]
    assert first.max() == pytest.approx(190 / 127.5 - 1)


def test_labels_table(tmp_path):
    entries = oasis_entries(THREE) | {"keras_png_slices_data/labels.csv": b"case,label,age\n001,NC,70\n2,AD,71\n3,,4\n"}
    source = open_source(write(tmp_path / "a.zip", entries))
    assert source.label_names == ("AD", "NC")
    assert [source.label[source.case == case][0] for case in (1, 2, 3, 4)] == [1, 0, -1, -1]
    bad = entries | {"keras_png_slices_data/labels.csv": b"person;label\n1;AD\n"}
    with pytest.raises(DataError, match="column case"):
        open_source(write(tmp_path / "b.zip", bad))


def test_facts_of_people(tmp_path):
    """Numbers in standard deviations of the training people, categories by place, the unknown NaN; in every batch."""
    path = write(tmp_path / "a.zip", oasis_entries(THREE, slices=2))
    table = tmp_path / "people.csv"
    table.write_text("case,label,age,sex\n1,NC,70,M\n002,AD,74,F\n6,AD,90,\n")
    source = open_source(path, labels=table)
    columns = source.columns(["age", "sex"])
    assert columns == {
        "age": {"kind": "number", "mean": 72.0, "std": 2.0},
        "sex": {"kind": "category", "values": ["F", "M"]},
    }
    known = {1: (-1, 1), 2: (1, 0), 3: (np.nan, np.nan), 4: (np.nan, np.nan), 6: (9, np.nan)}  # 6 is a test person
    for case, facts in known.items():
        np.testing.assert_array_equal(dataset.covariates_of(source, np.array([case]), columns), [facts])
    batches = dataset.with_covariates(make_dataset(source, "train", 16, 3, True), source, source.columns(["sex"]))
    for batch in take(batches, 3):
        np.testing.assert_array_equal(batch["covariates"][:, 0], [known[case][1] for case in batch["case"].tolist()])


def test_tables_as_people_write_them(tmp_path):
    """Blanks around names, equal rows, words for the unknown, a constant column; labels are those of all rows."""
    path, table = write(tmp_path / "a.zip", oasis_entries(THREE, slices=2)), tmp_path / "people.csv"
    table.write_text("case, label, age,site\n1, NC, 70,4\n1,NC,70,4\n2,AD,unknown,4\n99,MCI,71,4\n")
    source = open_source(path, labels=table)
    assert source.label_names == ("AD", "MCI", "NC")
    assert source.label[source.case == 1].tolist() == [2, 2]
    columns = source.columns()
    assert columns["age"] == {"kind": "number", "mean": 70.0, "std": 1.0}
    np.testing.assert_array_equal(dataset.covariates_of(source, np.array([1, 2]), columns), [[0, 0], [np.nan, 0]])
    table.write_text("case,age\n1,inf\n")
    source = open_source(path, labels=table)
    with pytest.raises(DataError, match="case 001: inf is no finite number"):
        dataset.covariates_of(source, np.array([1]), source.columns())
    with pytest.raises(DataError, match="nothing says the sex"):
        dataset.covariates_of(source, np.array([1]), {"sex": {"kind": "category", "values": ["F"]}})


@pytest.mark.parametrize(
    "text, said",
    [
        ("case,label\n1,AD\n001,NC\n", "two rows for case 1 that disagree"),
        ("case,label\n77,AD\n", "names nobody"),
        ("case\n1\n", "another"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(tmp_path, text, said):
    path, table = write(tmp_path / "a.zip", oasis_entries(THREE)), tmp_path / "people.csv"
    table.write_text(text)
    with pytest.raises(DataError, match=said):
        open_source(path, labels=table)
    with pytest.raises(DataError, match="cannot be read"):
        open_source(path, labels=tmp_path / "none.csv")


# ---------------------------------------------------------------------------------------------------------- splits


def test_missing_splits_are_carved_by_case_with_the_seed(tmp_path):
    path = write(tmp_path / "a.zip", oasis_entries({"train": range(1, 41)}, slices=2))
    source = open_source(path, seed=3)
    people = {split: set(source.case[source.select(split)].tolist()) for split in dataset.SPLITS}
    assert [len(people[split]) for split in dataset.SPLITS] == [29, 5, 6]
    assert set.union(*people.values()) == set(range(1, 41))
    assert sum(len(group) for group in people.values()) == 40
    np.testing.assert_array_equal(open_source(path, seed=3).split, source.split)
    assert (open_source(path, seed=4).split != source.split).any()
    assert source.manifest()["splits"]["test"]["made"] == "carved by case, seed 3"


def test_only_what_is_missing_is_carved(tmp_path):
    source = open_source(write(tmp_path / "a.zip", oasis_entries({"train": range(1, 21), "validate": [30]})))
    assert set(source.case[source.select("validate")].tolist()) == {30}
    assert len(np.unique(source.case[source.select("test")])) == 3
    source = open_source(write(tmp_path / "b.zip", oasis_entries({"test": [1, 2]})))
    with pytest.raises(DataError, match="train split is empty"):
        source.select("train")


def test_few_people(tmp_path):
    two = open_source(write(tmp_path / "two.zip", oasis_entries({"train": [1, 2]})))
    assert len(two.select("train")) == len(two.select("validate")) == 3
    with pytest.raises(DataError, match="the test split is empty"):
        two.select("test")
    with pytest.raises(DataError, match="the test split is empty"):
        make_dataset(two, "test", 16, 2, training=False)
    with pytest.raises(DataError, match="two people"):
        open_source(write(tmp_path / "one.zip", oasis_entries({"train": [1]})))
    three = open_source(write(tmp_path / "three.zip", oasis_entries({"train": [1, 2, 3]})))
    assert [len(three.select(split)) for split in dataset.SPLITS] == [3, 3, 3]


def test_unknown_split_and_bad_numbers(course):
    with pytest.raises(DataError, match="train, validate, test"):
        make_dataset(course, "valid", 16, 2, training=False)
    with pytest.raises(DataError, match="--seed"):
        open_source(course, seed=-1)
    with pytest.raises(DataError, match="positive"):
        make_dataset(course, "train", 16, 0, training=True)


def test_manifest_is_json_and_names_everybody(course):
    manifest = json.loads(json.dumps(open_source(course, seed=5).manifest()))
    assert manifest["bytes"] == course.stat().st_size
    assert manifest["images"] == manifest["masks"] == 18
    assert manifest["seed"] == 5 and manifest["z"] == [0, 2] and manifest["kind"] == "oasis"
    assert manifest["splits"]["test"] == {"people": 1, "images": 3, "cases": ["006"], "made": "archive"}
    before = manifest["sha256"]
    assert len(before) == 64
    write(course, oasis_entries(THREE, slices=2))
    assert open_source(course).manifest()["sha256"] != before


# --------------------------------------------------------------------------------------------------------- mistakes


def refuse(data, *words):
    """Opening must fail with one sentence that has all the words in it."""
    with pytest.raises(DataError) as caught:
        open_source(data)
    message = str(caught.value)
    assert "\n" not in message and message.endswith("."), message
    for word in words:
        assert word in message, message


def test_paths_that_are_no_data(tmp_path):
    refuse(tmp_path / "nowhere.zip", "nowhere.zip", "does not exist")
    refuse(write(tmp_path / "empty", {"a.txt": b""}), "no brain slices")
    (tmp_path / "data.tar").write_bytes(b"x")
    refuse(tmp_path / "data.tar", "unsupported suffix", ".zip")
    refuse([], "--data")
    refuse(write(tmp_path / "outer", {"inner/oasis.zip": b"x"}), "point --data at 'inner/oasis.zip'")
    refuse(write(tmp_path / "volumes.zip", {"a.nii.gz": b"x", "b.nii.gz": b"x"}), "a.nii.gz", "unpacked")


def test_case_in_two_splits(tmp_path):
    refuse(write(tmp_path / "a.zip", oasis_entries({"train": [1, 2], "test": [2]})), "case 2", "two splits", "_test/")


def test_masks_offered_as_images(tmp_path):
    entries = {name: data for name, data in oasis_entries(THREE).items() if "_seg_" in name}
    refuse(write(tmp_path / "a.zip", entries), "masks only", "seg_001")
    folder = write(tmp_path / "b", entries)
    refuse(folder / "keras_png_slices_data" / "keras_png_slices_seg_train", "masks only", "seg_001")


@pytest.mark.parametrize("place", ["a.zip", "folder"])
@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda data: b"this is no image", "neither a PNG nor a JPEG"),
        (lambda data: b"", "empty"),
        (lambda data: data[:40], "truncated"),
        (lambda data: data[:-12], "truncated"),
        (lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:], "damaged"),
    ],
)
def test_damaged_image_is_named(tmp_path, place, damage, word):
    entries = oasis_entries(THREE)
    name = "keras_png_slices_data/keras_png_slices_train/case_002_slice_1.nii.png"
    entries[name] = damage(entries[name])
    refuse(write(tmp_path / place, entries), name, word)


def test_truncated_jpeg_is_named(tmp_path):
    entries = {f"{case}_{z}.jpg": encode(brain(9, 64), "JPEG") for case in range(4) for z in range(2)}
    entries["2_1.jpg"] = entries["2_1.jpg"][:-30]
    refuse(write(tmp_path / "a", entries), "2_1.jpg", "truncated")


def test_damaged_zip(tmp_path, course):
    data = course.read_bytes()
    broken = tmp_path / "broken.zip"
    broken.write_bytes(data[: len(data) // 2])
    refuse(broken, "broken.zip", "not a readable zip")
    broken.write_bytes(b"no zip at all")
    refuse(broken, "broken.zip", "not a readable zip")
    place = data.index(b"IDAT") + 8  # one flipped bit within the first slice: its checksum in the directory differs
    broken.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    refuse(broken, "case_001_slice_0", "size or checksum")


def patch_directory(path, offset, value):
    """Overwrites bytes of the first entry in the central directory."""
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x01\x02") + offset
    data[place : place + len(value)] = value
    path.write_bytes(data)
    return path


def test_encrypted_zip(course):
    refuse(patch_directory(course, 8, b"\x01\x00"), "case_001_slice_0", "encrypted")


def test_unknown_compression(tmp_path):
    path = write(tmp_path / "a.zip", oasis_entries(THREE), zipfile.ZIP_LZMA)
    refuse(path, "case_001_slice_0", "deflate")


@pytest.mark.parametrize("name", ["../evil_1.png", "/etc/evil_1.png", "a/../../evil_1.png", "C:/evil_1.png"])
def test_path_outside_the_archive(tmp_path, name):
    refuse(write(tmp_path / "a.zip", oasis_entries(THREE) | {name: encode(brain(0))}), name, "outside the archive")


def test_decompression_bombs(tmp_path):
    big = write(tmp_path / "big.zip", oasis_entries(THREE) | {"bomb_1.png": bytes(70 * 2**20)}, zipfile.ZIP_DEFLATED)
    refuse(big, "bomb_1.png", "declares")
    # An entry that says 100 bytes and inflates to 50 million: never more than it declares is inflated.
    liar = write(tmp_path / "liar.zip", {"a_1.png": bytes(5 * 10**7), "b_1.png": b""}, zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    refuse(patch_directory(liar, 24, struct.pack("<I", 100)), "a_1.png", "damaged")
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()
    # A tiny file whose header declares 60,000 x 60,000 pixels.
    entries = oasis_entries(THREE)
    name = next(iter(entries))
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + b"\x08\0\0\0\0"
    entries[name] = entries[name][:12] + header + struct.pack(">I", zlib.crc32(header)) + entries[name][33:]
    refuse(write(tmp_path / "wide.zip", entries), name, "60000 x 60000")


def test_mixtures(tmp_path, course):
    refuse([course, course], "mixture")
    volume(tmp_path / "both" / "a.nii")
    (tmp_path / "both" / "b_1.png").write_bytes(encode(brain(0)))
    refuse(tmp_path / "both", "NIfTI volumes and PNG")


def undecodable():
    """A PNG whose chunks, checksums and end are right, but whose pixels are missing."""
    good, junk = encode(brain(0)), b"IDAT" + zlib.compress(b"\0" * 7)
    end = good.index(b"IDAT") - 4
    return good[:end] + struct.pack(">I", len(junk) - 4) + junk + struct.pack(">I", zlib.crc32(junk)) + good[-12:]


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


# ----------------------------------------------------------------------------------------------------------- pixels


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


# ----------------------------------------------------------------------------------------------------- NIfTI volumes


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


@pytest.mark.parametrize("codes", [("R", "A", "S"), ("L", "P", "S"), ("S", "L", "A")])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_volumes_are_upright_however_they_are_stored(tmp_path, codes, axis):
    paths = [volume(tmp_path / f"{name}.nii.gz", codes, scale) for name, scale in (("a", 1000.0), ("b", 3.0))]
    source = open_source(paths, axis=axis)
    first, last = [(4, 15), (5, 24), (4, 19)][axis]
    assert (source.z.min(), source.z.max()) == (first, last)  # the speck is no brain
    image = take(make_dataset(source, "train", 30, 64, False), 1)[0]["image"][-1, :, :, 0]
    rows, columns = np.nonzero(image > 0.9)
    assert rows.mean() < 14  # anterior (axial), superior (coronal, sagittal) is up
    assert columns.mean() > 16  # the patient's right, and anterior in sagittal slices, is at the picture's right
    assert image[15, 15] == pytest.approx(0.0, abs=0.02) and image[0, 0] == -1.0


def test_volume_sources(tmp_path):
    for name in ("sub-1/t1.nii.gz", "sub-2/t1.nii.gz", "sub-3/t1.nii"):
        volume(tmp_path / "study" / name)
    source = open_source(tmp_path / "study")
    assert source.kind == "volumes" and len(source.case_names) == 3  # equal file names are not one person
    assert [len(np.unique(source.case[source.select(s)])) for s in dataset.SPLITS] == [1, 1, 1]
    assert source.manifest()["axis"] == 2
    one = tmp_path / "study/sub-1/t1.nii.gz"
    refuse(one, "two people")
    refuse([one, one], "twice")
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(one.read_bytes()[:200])
    refuse([one, broken], "broken.nii.gz", "NIfTI")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 2), np.float32), np.eye(4)), tmp_path / "time.nii")
    refuse([one, tmp_path / "time.nii"], "time.nii", "three-dimensional")


# ----------------------------------------------------------------------------------------------------------- stream


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_one_pass_in_table_order(tmp_path, cache_bytes, compression):
    path = write(tmp_path / "a.zip", oasis_entries(THREE), compression)
    batches = take(make_dataset(path, "train", 24, 5, False, cache_bytes=cache_bytes), 99)
    assert [len(batch["z"]) for batch in batches] == [5, 5, 2]
    case = np.concatenate([batch["case"] for batch in batches])
    z = np.concatenate([batch["z"] for batch in batches])
    np.testing.assert_array_equal(case, np.repeat([1, 2, 3, 4], 3))
    np.testing.assert_array_equal(z, np.tile([0, 1, 2], 4))
    images = np.concatenate([batch["image"] for batch in batches])
    # The picture belongs to its case and slice: the grey level says which.
    np.testing.assert_allclose(images[:, 12, 12, 0], (40 + 10 * case + z) / 127.5 - 1, atol=1e-6)
    assert (images[:, 0, 0] == -1).all()
    assert images.dtype == np.float32 and case.dtype == z.dtype == batches[0]["label"].dtype == np.int32


def test_every_epoch_is_a_fresh_permutation(course):
    batches = take(make_dataset(course, "train", 24, 5, True, augment=0.0), 12)  # 5 epochs of 12, batches straddle
    assert all(batch["image"].shape == (5, 24, 24, 1) for batch in batches)
    keys = np.concatenate([10 * batch["case"] + batch["z"] for batch in batches]).reshape(5, 12)
    for epoch in keys:
        np.testing.assert_array_equal(np.sort(epoch), np.sort(keys[0]))
    assert len(np.unique(keys[0])) == 12
    assert len({tuple(epoch) for epoch in keys}) == 5
    grey = np.concatenate([batch["image"][:, 12, 12, 0] for batch in batches])
    np.testing.assert_allclose(grey, (40 + keys.ravel()) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_a_resumed_stream_equals_an_unbroken_one(course, cache_bytes):
    source = open_source(course)

    def stream(**flags):
        return make_dataset(source, "train", 24, 5, True, cache_bytes=cache_bytes, flip=True, **flags)

    unbroken = take(stream(seed=1), 9)
    for skipped in (1, 4, 7):
        assert_same(take(stream(seed=1, start_step=skipped), 9 - skipped), unbroken[skipped:])
    assert_same(take(stream(seed=1), 9), unbroken)
    assert any((a["case"] != b["case"]).any() for a, b in zip(take(stream(seed=2), 9), unbroken, strict=True))
    far = take(stream(seed=1, start_step=10**9), 1)  # skipping is free
    assert far[0]["image"].shape == (5, 24, 24, 1)


def test_element_n_does_not_depend_on_the_batch_size(course):
    def elements(batch_size):
        batches = take(make_dataset(course, "train", 24, batch_size, True), 30 // batch_size)
        return [{key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}]

    assert_same(elements(1), elements(5))


def test_cache_changes_nothing(course):
    def stream(cache_bytes):
        return take(make_dataset(course, "train", 20, 5, True, seed=7, cache_bytes=cache_bytes), 6)

    assert_same(stream(2**30), stream(0))


def test_budget_decides_whether_slices_are_kept(course):
    source = open_source(course)
    make_dataset(source, "train", 16, 4, True, cache_bytes=12 * 16 * 16 - 1)
    assert not source._decoded
    make_dataset(source, "train", 16, 4, True, cache_bytes=12 * 16 * 16)
    assert source._decoded["train", 16].nbytes == 12 * 16 * 16


def test_augmented_epochs_differ_but_keep_their_conditions(course):
    batches = take(make_dataset(course, "train", 24, 12, True), 2)
    order = [np.argsort(10 * batch["case"] + batch["z"]) for batch in batches]
    first, second = (batch["image"][rows] for batch, rows in zip(batches, order, strict=True))
    assert (first != second).any(axis=(1, 2, 3)).all()
    plain = take(make_dataset(course, "train", 24, 12, False), 1)[0]["image"]
    assert np.abs(first - plain).mean() < 0.1  # small changes: still the same slice of the same person
    assert (first[:, :2, :2] == -1).all()


@pytest.mark.parametrize(
    ("size", "step", "expected"),
    [
        (80, 8, [22, 34, 24, 32]),  # rows 25-42, columns 36-63, room of 2: 22 and 32 pixels
        (80, 1, [23, 34, 22, 32]),
        (80, 40, [14, 30, 40, 40]),
        (80, 80, None),
    ],
)
def test_the_window_holds_what_training_slices_show(tmp_path, size, step, expected):
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


def test_nothing_is_written_to_disk(tmp_path, course):
    before = sorted(tmp_path.rglob("*"))
    take(make_dataset(course, "train", 24, 4, True, cache_bytes=0), 3)
    assert sorted(tmp_path.rglob("*")) == before


def test_replicas_get_contiguous_parts(course):
    devices = tf.config.list_logical_devices("CPU")
    if len(devices) < 2:
        pytest.skip("two logical CPUs are set up in tests/conftest.py")
    strategy = tf.distribute.MirroredStrategy([device.name for device in devices[:2]])
    plain = take(make_dataset(course, "train", 16, 4, True), 3)
    spread = iter(strategy.experimental_distribute_dataset(make_dataset(course, "train", 16, 4, True)))
    for batch in plain:
        parts = strategy.experimental_local_results(next(spread)["image"])
        np.testing.assert_array_equal(parts[0], batch["image"][:2])
        np.testing.assert_array_equal(parts[1], batch["image"][2:])


def test_large_archive_opens_fast(tmp_path):
    image = encode(brain(0, 8))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for case in range(2_000):
            for z in range(25):
                split = "train" if case < 1_800 else "validate" if case < 1_900 else "test"
                file.writestr(f"keras_png_slices_{split}/case_{case:04d}_slice_{z}.nii.png", image)
    start = time.perf_counter()
    source = open_source(tmp_path / "a.zip")
    seconds = time.perf_counter() - start
    assert len(source.entries) == 50_000
    assert seconds < 5, f"{seconds:.1f} s for 50,000 slices"  # 200,000 take 2.5 s; slack for busy machines


# ---------------------------------------------------------------------------------------------------------- augment


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


def test_augment_keeps_fine_detail():
    rng = np.random.default_rng(0)
    window = np.hanning(64)[:, None] * np.hanning(64)
    images = (window * rng.uniform(0.4, 1.4, (64, 64, 64)) - 1).astype(np.float32)[..., None]

    def power(pictures):  # between a quarter and the half of the sampling frequency; a bare warp keeps half of it
        frequency = np.fft.fftfreq(64)
        radius = np.hypot(frequency[:, None], frequency)
        return (np.abs(np.fft.fft2(pictures[..., 0])) ** 2)[:, (radius > 0.25) & (radius < 0.5)].sum()

    assert 0.75 < power(augment(images, seeds(64)).numpy()) / power(images) < 1.2


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


# ------------------------------------------------------------------------------------------------------ command line


def test_phantom_zip_is_read_back(tmp_path, capsys):
    out = tmp_path / "new" / "phantom.zip"
    assert dataset.main(["phantom", "--people", "4", "--out", str(out), "--image-size", "32"]) == 0
    assert os.listdir(out.parent) == ["phantom.zip"]  # no temporary file is left
    source = open_source(out)
    assert [len(source.select(split)) for split in dataset.SPLITS] == [64, 32, 32]
    assert source.label_names == ("AD", "NC") and set(source.label.tolist()) == {0, 1}
    assert set(source.label[source.select("train")].tolist()) == {0, 1}
    mask = Image.open(io.BytesIO(source.store.read(source.masks[source.entries[5]])))
    assert set(np.unique(mask)) <= {0, 85, 170, 255}
    assert "keras_png_slices_data/labels.csv" in source.store.names
    again = tmp_path / "again.zip"
    dataset.write_phantoms(again, 4, image_size=32)
    with zipfile.ZipFile(out) as left, zipfile.ZipFile(again) as right:
        assert left.namelist() == right.namelist()
        assert all(left.read(name) == right.read(name) for name in left.namelist())
    assert dataset.main(["describe", str(out)]) == 0
    assert "2 people" in capsys.readouterr().out


def test_command_line_mistakes_are_one_sentence(tmp_path, capsys):
    for argv in (
        ["describe", str(tmp_path / "nowhere")],
        ["phantom", "--people", "2", "--out", str(tmp_path / "a.zip")],
        ["phantom", "--people", "4", "--image-size", "31", "--out", str(tmp_path / "a.zip")],
    ):
        assert dataset.main(argv) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and len(shown.err.strip().splitlines()) == 1 and "Traceback" not in shown.err
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- real data


@needs_real
def test_real_oasis():
    source = open_source(REAL / "oasis1_slices.zip")
    facts = source.manifest()["splits"]
    assert [facts[split]["people"] for split in dataset.SPLITS] == [120, 20, 20]
    assert [facts[split]["images"] for split in dataset.SPLITS] == [3840, 640, 640]
    for size in (64, 128, 256):
        images = take(make_dataset(source, "test", size, 192, False), 1)[0]["image"]
        edge = size // 16
        assert (images[:, :edge] == -1).all() and (images[:, -edge:, -edge:] == -1).all()
        assert 0.1 < (images > -1).mean() < 0.5 and images.max() > 0.5
    batch = take(make_dataset(source, "train", 64, 64, True), 1)[0]["image"]
    assert (batch[:, :2] == -1).all()


@needs_real
def test_real_adni_layout():
    source = open_source(REAL / "ad_nc.zip")
    assert source.label_names == ("AD", "NC")
    people = {split: set(source.case[source.select(split)].tolist()) for split in dataset.SPLITS}
    assert [len(people[split]) for split in dataset.SPLITS] == [31, 5, 12]
    images = take(make_dataset(source, "test", 128, 96, False), 1)[0]["image"]
    assert (images[:, :8] == -1).all()  # JPEG noise does not lift the background


@needs_real
def test_real_volumes():
    source = open_source(REAL / "t1_volumes")
    assert len(source.case_names) == 2
    assert 15 <= source.z.min() < source.z.max() <= 145
    images = take(make_dataset(source, "train", 128, 32, False), 9)
    middle = images[len(images) // 2]["image"]
    assert (middle[:, :4, :4] == -1).all() and middle.max() > 0.8 and 0.1 < (middle > -1).mean() < 0.6


# ------------------------------------------------------------------------------------------------------------- masks


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


def test_a_volume_gives_back_the_slices_that_were_written(tmp_path):
    slices = np.random.default_rng(0).integers(1, 256, (5, 12, 10)).astype(np.uint8)
    slices[:, 0, 0] = 255
    archive.save_volume(tmp_path / "head.nii.gz", slices, (1.0, 1.5, 2.0))
    stored = nibabel.load(tmp_path / "head.nii.gz")
    assert nibabel.aff2axcodes(stored.affine) == ("R", "A", "S")
    np.testing.assert_allclose(stored.header.get_zooms(), (1.0, 1.5, 2.0))
    np.testing.assert_allclose(stored.affine @ [4.5, 5.5, 2.0, 1.0], [0.0, 0.0, 0.0, 1.0], atol=1e-6)
    store = archive.VolumeStore([tmp_path / "head.nii.gz"])
    read = [np.frombuffer(store.read(name), np.uint8).reshape(store.shape(name)) for name in store.names]
    np.testing.assert_allclose(read, slices, atol=3)  # white is a high percentile there
    for axis in (0, 1):
        archive.save_volume(tmp_path / "other.nii.gz", slices, (1.0, 1.0, 1.0), axis)
        other = archive.VolumeStore([tmp_path / "other.nii.gz"], axis)
        read = [np.frombuffer(other.read(name), np.uint8).reshape(other.shape(name)) for name in other.names]
        np.testing.assert_allclose(read, slices, atol=3)


def test_labels_of_other_data_are_numbered_by_name(tmp_path):
    table = {"keras_png_slices_data/labels.csv": b"case,label\n1,NC\n2,AD\n3,AD\n"}
    source = open_source(write(tmp_path / "a.zip", oasis_entries(THREE) | table))
    assert source.label_names == ("AD", "NC")
    other = source.with_labels_of(["NC", "MCI", "AD"])
    assert other.label_names == ("NC", "MCI", "AD")
    assert [other.label[other.case == case][0] for case in (1, 2, 3, 4)] == [0, 2, 2, -1]
    assert source.with_labels_of([]) is source
    unknown = dataclasses.replace(source, label=np.full_like(source.label, -1)).with_labels_of(["NC"])
    assert set(unknown.label) == {-1}
    with pytest.raises(DataError, match="labelled AD"):
        source.with_labels_of(["NC", "MCI"])
