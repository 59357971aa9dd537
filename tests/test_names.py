"""Who is in an archive: layouts, names, people, splits."""

import numpy as np
import pytest
from small_archives import THREE, brain, encode, oasis_entries, refuse, take, write

import dataset
from dataset import DataError, make_dataset, open_source
from ldm.data import names


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
    assert names._case_and_slice(name) == (case, z)


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


def test_case_in_two_splits(tmp_path):
    refuse(write(tmp_path / "a.zip", oasis_entries({"train": [1, 2], "test": [2]})), "case 2", "two splits", "_test/")


def test_masks_offered_as_images(tmp_path):
    entries = {name: data for name, data in oasis_entries(THREE).items() if "_seg_" in name}
    refuse(write(tmp_path / "a.zip", entries), "masks only", "seg_001")
    folder = write(tmp_path / "b", entries)
    refuse(folder / "keras_png_slices_data" / "keras_png_slices_seg_train", "masks only", "seg_001")
