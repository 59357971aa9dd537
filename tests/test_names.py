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


def test_carved_splits_have_the_labels_in_the_proportion_of_the_whole(tmp_path):
    """10 people of 40 have AD: of 6 or 5 carved ones, whatever the seed, 1 or 2."""
    image = encode(brain(0, 8))
    entries = {f"{'AD' if case < 10 else 'NC'}/{case}_{z}.png": image for case in range(40) for z in range(2)}
    path = write(tmp_path / "a.zip", entries)
    for seed in range(10):
        source = open_source(path, seed=seed)
        for split in ("validate", "test"):
            people = np.unique(source.case[source.select(split)])
            assert 1 <= (people < 10).sum() <= 2, (seed, split)


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
    refuse(write(tmp_path / "a.zip", oasis_entries({"train": [1, 2], "test": [2]})), "002 is in two splits", "_test/")


def test_masks_offered_as_images(tmp_path):
    entries = {name: data for name, data in oasis_entries(THREE).items() if "_seg_" in name}
    refuse(write(tmp_path / "a.zip", entries), "masks only", "seg_001")
    folder = write(tmp_path / "b", entries)
    refuse(folder / "keras_png_slices_data" / "keras_png_slices_seg_train", "masks only", "seg_001")


# ---- names seen together ---------------------------------------------------------------------------------------------

PEOPLE = (1, 2, 3, 4)
LABEL = ("AD", "NC")


def people_of(found, volumes=False, **options):
    """Sorted people and labels of these names."""
    listing = names.understand(found, "here", volumes=volumes, **options)
    return sorted({row.person for row in listing.rows}), sorted({row.label for row in listing.rows} - {""})


@pytest.mark.parametrize(
    ("pattern", "first", "labels"),
    [
        ("{label}/00{p}_S_029{p}_{z}.png", "001_S_0291", 2),
        ("train/{label}/sub-0{p}_ses-1_{z}.png", "sub-01", 2),
        ("{label}/train/p{p}_{z}.png", "p1", 2),
        ("{label}/patient{p}/img_{z}.png", "patient1", 2),
        ("{label}/01{p}/{z}.png", "011", 2),
        ("data/Subject {p}/Slice {z}.png", "Subject 1", 0),
        ("s0{p}/im_{z}.png", "s01", 0),
        ("sub-0{p}/ses-1/slice_{z}.png", "sub-01", 0),
        ("TCGA_CS_494{p}_19960909/TCGA_CS_494{p}_19960909_{z}.png", "TCGA_CS_4941", 0),
        ("Subject{p}/Session2/slice{z}.png", "Subject1", 0),
        ("lgg-mri-segmentation/{label}/p00{p}_20190101_{z}.png", "p001", 2),
        ("2019010{p}_{z}.png", "20190101", 0),
        ("0000000{p}-aac5-4193-9e2a-7b16d6d5b5f2_{z}.png", "00000001-aac5-4193-9e2a-7b16d6d5b5f2", 0),
        ("fold_0{l}/sub-{p}_z{z}.png", "sub-1", 0),
        ("T1-weighted/{label}/p{p}_{z}.png", "p1", 2),
        ("p{p}_{z}_224.png", "p1", 0),
        ("CDR0{l}/1{p}_{z}.png", "11", 2),
        ("{label}/p{p}_{z}_256_256.png", "p1", 2),
        ("train_set/{label}/p{p}_{z}.png", "p1", 2),
        ("imagesTr/p{p}_{z}.png", "p1", 0),
        ("Train {label}/p{p}_{z}.png", "p1", 2),
        ("T1_{label}/p{p}_{z}.png", "p1", 2),
        ("T1_MPRAGE/{label}/p{p}_{z}.png", "p1", 2),
        ("patient{p}slice{z}.png", "patient1", 0),
        ("00{p}-S-029{p}/{z}.png", "001-S-0291", 0),
    ],
)
def test_people_and_labels_of_many_layouts(pattern, first, labels):
    found = [pattern.format(label=LABEL[p % 2], l=5 * (p % 2), p=p, z=z) for p in PEOPLE for z in (80, 81)]
    people, called = people_of(found)
    assert people[0] == first and len(people) == 4 and len(called) == labels


@pytest.mark.parametrize(
    "pattern",
    [
        "p{p}_scan{visit}_{z}.png",
        "p{p}_m0{visit}_{z}.png",
        "p{p}_201{visit}-01-0{p}_{z}.png",
        "sub0{p}ses{visit}slice{z}.png",
        "Patient{p}Visit{visit}Slice{z}.png",
        "p00{p}_{visit}_{z}.png",
        "patient_00{p}/{visit}/slice_{z}.png",
        "00{p}/scan{visit}/{z}.png",
        "00{p}/2019-01-0{visit}/{z}.png",
        "00{p}_S_000{p}/MPRAGE/200{visit}-04-18_08_20_30.0/S13408/img_{z}.png",
    ],
)
def test_two_visits_in_pictures_are_one_person(pattern):
    found = [pattern.format(p=p, visit=visit, z=z) for p in PEOPLE for visit in (1, 2) for z in (80, 81)]
    rows = names.understand(found, "here").rows
    assert len({row.person for row in rows}) == 4 and len({(row.person, row.scan) for row in rows}) == 8
    assert {row.z for row in rows} == {80, 81} and {row.label for row in rows} == {""}


def test_numbers_below_sites_are_people():
    """`site1_007` goes on in many ways, and 1 and 2 are two sites."""
    found = [f"{site}{s}_{p:03d}_{z}.png" for site in ("site", "x") for s in (1, 2) for p in range(6) for z in (80, 81)]
    assert len(people_of([name for name in found if name[0] == "s"])[0]) == 12
    assert len(people_of([name for name in found if name[0] == "x"])[0]) == 12


@pytest.mark.parametrize("pattern", ["p{p}/{z}.png", "{label}/{p}/slice_{z}.png"])
def test_folders_of_one_digit_are_people_beside_those_of_two(pattern):
    found = [pattern.format(label=LABEL[p % 2], p=p, z=z) for p in range(200) for z in (80, 81)]
    assert len(people_of(found)[0]) == 200


@pytest.mark.parametrize(
    "mark", ["brightness_0.8", "shift_5_10", "rot-15", "Copy", "copy (2)", "shear_3", "contrast_1.1"]
)
def test_copies_are_scans_of_their_person(mark):
    found = [f"p{p}_{z}{end}.png" for p in PEOPLE for z in (80, 81) for end in ("", f"_{mark}")]
    rows = names.understand(found, "here").rows
    assert {row.person for row in rows} == {"p1", "p2", "p3", "p4"} and {row.z for row in rows} == {80, 81}
    assert people_of([f"{'Copy of ' * copy}p{p}_80.png" for p in PEOPLE for copy in (0, 1)])[0] == [
        "p1",
        "p2",
        "p3",
        "p4",
    ]


@pytest.mark.parametrize(
    "mask",
    [
        *(
            "p{p}_{z}Mask",
            "p{p}_{z}_brainmask",
            "p{p}_{z}_gt",
            "p{p}_{z}_pve_1",
            "GT/p{p}_{z}",
            "ground truth/p{p}_{z}",
        ),
        *("label_maps/p{p}_{z}", "masks-train/p{p}_{z}", "SegmentationMasks/p{p}_{z}", "lesion_masks/p{p}_{z}"),
    ],
)
def test_masks_under_many_names(mask):
    found = [f"images/p{p}_{z}.png" for p in PEOPLE for z in (80, 81)]
    masks = [f"{mask.format(p=p, z=z)}.png" for p in PEOPLE for z in (80, 81)]
    listing = names.understand(found + masks, "here")
    assert [row.entry for row in listing.rows] == found and [reason for reason, _ in listing.left_out] == ["masks"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("T1", "T1_ce"),
        ("T1WI", "T2WI"),
        ("T1", "T2FLAIR"),
        ("T1", "FLAIR_T2"),
        ("3DT1", "PD"),
        ("T1", "MRA"),
        ("T1", "ADC"),
    ],
)
def test_of_many_contrasts_t1_is_used(one, other):
    for pattern in ("p{p}_80_{c}.png", "p{p}_80_{c}.nii.gz", "{c}/p{p}_80.png"):
        if not (other == "PD" and pattern[0] == "{"):  # as a folder it may be a diagnosis
            found = [pattern.format(p=p, c=c) for p in PEOPLE for c in (one, other)]
            rows = names.understand(found, "here", volumes=".nii" in pattern).rows
            assert len(rows) == 4 and all(f"{one}/" in row.entry or f"{one}." in row.entry for row in rows), pattern


def test_what_lies_beside_t1_and_says_no_contrast_is_left_out():
    ends = ("T1w", "ce-gadolinium_T1w", "UNIT1", "inplaneT2", "inv-1_MP2RAGE")
    found = [f"sub-0{p}/anat/sub-0{p}_{end}.nii.gz" for p in PEOPLE for end in ends]
    found += [f"sub-0{p}/fmap/sub-0{p}_phasediff.nii.gz" for p in PEOPLE]
    assert {row.entry[19:] for row in names.understand(found, "here", volumes=True).rows} == {"T1w.nii.gz"}
    space = [f"sub-0{p}_space-MNI_T1w.nii.gz" for p in PEOPLE]  # no ce-
    assert len(names.understand(space, "here", volumes=True, contrast="t1").rows) == 4


def test_channels_are_contrasts():
    """nnU-Net numbers them; where there is one only, or people are numbered so, nothing is left out."""
    found = [f"imagesTr/BRATS_00{p}_000{c}.nii.gz" for p in PEOPLE for c in range(4)]
    listing = names.understand(found + [f"labelsTr/BRATS_00{p}.nii.gz" for p in PEOPLE], "here", volumes=True)
    assert [row.person for row in listing.rows] == [f"BRATS_00{p}" for p in PEOPLE]
    assert listing.contrast == "0000" and {row.split for row in listing.rows} == {"train"}
    assert len(people_of([f"hip_00{p}_0000.nii.gz" for p in PEOPLE], volumes=True)[0]) == 4
    assert len(people_of([f"hip_1_000{p}.nii.gz" for p in (0, *PEOPLE)], volumes=True)[0]) == 5


@pytest.mark.parametrize("other", ["targets", "predictions", "overlay", "gradcam"])
@pytest.mark.parametrize("form", ["{kind}/p{p}_{z}.png", "p00{p}/{kind}/{z}.png", "train/{kind}/AD/p{p}_{z}.png"])
def test_what_is_made_of_images_is_left_out_beside_them(form, other):
    found = [form.format(kind="images", p=p, z=z) for p in PEOPLE for z in (80, 81)]
    made = [form.format(kind=other, p=p, z=z) for p in PEOPLE[:2] for z in (80, 81)]
    listing = names.understand([*found, *made], "here")
    assert [row.entry for row in listing.rows] == found and len({row.person for row in listing.rows}) == 4
    assert listing.left_out == [("beside images of the same names", made)]


def test_visits_beside_images_are_slices():
    found = [f"p0{p}/{kind}/{z}.png" for p in PEOPLE for kind in ("images", "visit2") for z in (80, 81)]
    assert len(names.understand(found, "here").rows) == 16


@pytest.mark.parametrize(
    ("folder", "split", "label"),
    [
        ("MICCAI_BraTS2020_TrainingData", "train", ""),
        ("singlecoil_val", "validate", ""),
        ("oasis_test_png", "test", ""),
        ("OAS2_RAW_PART1", "", ""),
        ("{label}_part1", "", "{label}"),
        ("train_{label}", "train", "{label}"),
    ],
)
def test_folders_are_read_word_by_word(folder, split, label):
    found = [f"{folder}/p{p}_{z}.png".format(label=LABEL[p % 2]) for p in PEOPLE for z in (80, 81)]
    rows = names.understand(found, "here").rows
    assert {row.split for row in rows} == {split}
    assert [row.label for row in rows] == [label.format(label=LABEL[p % 2]) for p in PEOPLE for _ in (80, 81)]


def test_folders_inside_those_of_people_are_no_labels():
    found = [f"training/{p}/pre/reg_T1.nii.gz" for p in PEOPLE]
    assert people_of(found, volumes=True) == (["1", "2", "3", "4"], [])
    scan = "AIBL/{p}/MPRAGE/201{v}-01-21_13_00_00.0/AIBL_{p}_MR_MPRAGE_Br_201{v}0121130000_S{v}_I{v}.nii"
    found = [scan.format(p=p, v=v) for p in PEOPLE for v in (1, 2)]
    assert people_of(found, volumes=True) == (["AIBL_1", "AIBL_2", "AIBL_3", "AIBL_4"], [])


def test_channels_of_pictures_are_contrasts():
    found = [f"imagesTr/p00{p}_0{z}_000{c}.png" for p in PEOPLE for z in (80, 81) for c in (0, 1)]
    for several in (found, found[::2]):
        rows = names.understand(several, "here").rows
        assert [row.entry for row in rows] == found[::2] and [row.z for row in rows] == [80, 81] * 4
        assert [row.person for row in rows[::2]] == ["p001", "p002", "p003", "p004"]
    assert len(people_of([f"hip_00{p}_0000.png" for p in PEOPLE])[0]) == 4  # everybody's first slice


def test_volumes_that_tools_made_of_others_are_left_out():
    found = [f"p0{p}_T1.nii" for p in PEOPLE]
    made = [f"{prefix}p0{p}_T1.nii" for p in PEOPLE for prefix in ("c1", "mwp2", "w", "y_")]
    listing = names.understand([*found, *made], "here", volumes=True)
    assert [row.entry for row in listing.rows] == found and listing.left_out == [("made of another volume", made)]
    assert len(people_of(["ann1.nii", "mann1.nii", *found], volumes=True)[0]) == 6  # one name is no rule


def test_folders_of_sizes_are_nobody():
    found = [f"{side}/p{p}_{z}.png" for side in (256, 128) for p in PEOPLE for z in (80, 81)]
    assert len(people_of(found[:8])[0]) == 4
    with pytest.raises(DataError, match="p1 is labelled 256 and 128"):
        people_of(found)


@pytest.mark.parametrize("train, test", [("train_set", "test_set"), ("imagesTr", "imagesTs"), ("trainset", "testset")])
def test_splits_are_called_in_many_ways_and_what_is_beside_them_is_left_out(train, test):
    found = [f"{train if p < 3 else test}/p{p}_{z}.png" for p in PEOPLE for z in (80, 81)]
    listing = names.understand([*found, "holdout/p9_80.png", "holdout/p9_81.png"], "here")
    assert [row.split for row in listing.rows] == ["train"] * 4 + ["test"] * 4 and not listing.rows[0].label
    assert listing.left_out == [("in no folder of a split", ["holdout/p9_80.png", "holdout/p9_81.png"])]


@pytest.mark.parametrize(("one", "other"), [("P1", "p1"), ("p01", "p1"), ("TCGA_01", "TCGA-01"), ("Sub-1", "sub01")])
def test_one_person_written_in_two_ways_is_asked_about(one, other):
    with pytest.raises(DataError, match="may be one person or two"):
        people_of([f"{one}_80.png", f"{other}_81.png", "q2_80.png"])
    assert len(people_of(["1_2_80.png", "12_80.png", "a1_80.png", "a-b_80.png", "ab_80.png"])[0]) == 5


def test_scans_in_the_folder_of_their_person_count_anew():
    """001/1_80 and 002/1_80 are two people, as their folders say."""
    assert people_of([f"00{p}/{scan}_{z}.png" for p in PEOPLE for scan in (1, 2) for z in (80, 81)])[0] == [
        "001",
        "002",
        "003",
        "004",
    ]


@pytest.mark.parametrize(
    ("pattern", "first"),
    [
        ("sub-0{p}/anat/sub-0{p}_T1w.nii.gz", "sub-01"),
        ("study/p{p}/T1.nii.gz", "p1"),
        ("IXI00{p}-Guys-0828-T1.nii.gz", "IXI001-Guys-0828"),
        ("OAS1_000{p}_MR1/RAW/OAS1_000{p}_MR1_mpr-1_anon.nii", "OAS1_0001"),
        ("bert{p}/mri/brain.mgz", "bert1"),
        ("{word}/mri/brain.mgz", "anna"),
        ("p{p}_20190101.nii", "p1"),
    ],
)
def test_people_of_volumes(pattern, first):
    word = dict(zip(PEOPLE, ("anna", "bert", "carl", "dora"), strict=True))
    people, _ = people_of([pattern.format(p=p, word=word[p]) for p in PEOPLE], volumes=True)
    assert people[0] == first and len(people) == 4


@pytest.mark.parametrize(
    ("pattern", "first"),
    [
        ("BraTS-GLI-0000{p}-00{visit}/BraTS-GLI-0000{p}-00{visit}-t1n.nii.gz", "BraTS-GLI-00001"),
        ("miriad_18{p}_AD_M_0{visit}_MR_1.nii", "miriad_181"),
        ("AIBL_{p}_MR_MPRAGE_ADNI_confirmed_Br_20140301141414_S1234{visit}_I4123{visit}.nii", "AIBL_1"),
        ("PPMI_300{p}_MR_MPRAGE_Br_20140301141414_S1234{visit}_I4123{visit}.nii", "PPMI_3001"),
        ("OAS2_000{p}_MR{visit}/RAW/mpr-1.nifti.nii", "OAS2_0001"),
        ("p{p}_2019010{visit}.nii.gz", "p1"),
        ("ses-0{visit}_sub-0{p}_T1w.nii.gz", "sub-01"),
        (
            "ADNI_002_S_029{p}_MR_MPR__GradWarp__B1_Correction__N3__Scaled_Br_2007052513572181{visit}_S13408_I4510{visit}"
            ".nii",
            "002_S_0291",
        ),
    ],  # fmt: skip
)
def test_two_visits_are_one_person_in_two_scans(pattern, first):
    found = [pattern.format(p=p, visit=visit) for p in PEOPLE for visit in (1, 2)]
    rows = names.understand(found, "here", volumes=True).rows
    assert min(row.person for row in rows) == first and len({row.person for row in rows}) == 4
    assert len({(row.person, row.scan) for row in rows}) == 8


@pytest.mark.parametrize("top", ["", "subjects/"])
def test_one_volume_of_each_freesurfer_folder(top):
    """Its person is the folder above `mri`; what was made on the way, and FreeSurfer's templates, are left out."""
    made = ("T1", "orig/001", "orig/002", "brain", "aseg", "brain.finalsurfs", "wm")
    found = [
        f"{top}{name}/mri/{volume}.mgz" for name in ("bert", "p02", "sub-03_ses-1", "fsaverage") for volume in made
    ]
    found += [f"{top}dora/mri/orig/001.mgz", f"{top}p09/mri/T1.nii.gz"]  # only begun; not of FreeSurfer
    listing = names.understand(found, "here", volumes=True)
    used = {row.entry.removeprefix(top): (row.person, row.scan) for row in listing.rows}
    assert used == {
        "bert/mri/brain.mgz": ("bert", ""),
        "p02/mri/brain.mgz": ("p02", ""),
        "sub-03_ses-1/mri/brain.mgz": ("sub-03", "ses-1"),
        "dora/mri/orig/001.mgz": ("dora", ""),
        "p09/mri/T1.nii.gz": ("p09", ""),
    }
    assert [len(left) for _, left in listing.left_out] == [18, 7] and not any(row.label for row in listing.rows)


def test_folders_and_names_of_masks_of_other_tools():
    """FSL's FSL_SEG and FreeSurfer's aparc+aseg are no slices, labels or people."""
    found = [f"disc{p % 2}/OAS1_000{p}_MR1/{name}" for p in PEOPLE for name in ("T1/a.nii", "FSL_SEG/a_fseg.nii")]
    found += [f"disc{p % 2}/OAS1_000{p}_MR1/mri/aparc+aseg.mgz" for p in PEOPLE]
    listing = names.understand(found, "here", volumes=True)
    assert {row.entry.rpartition("/")[2] for row in listing.rows} == {"a.nii"} and listing.rows[0].label == ""
    assert [(reason, len(left)) for reason, left in listing.left_out] == [("masks", 8)]


@pytest.mark.parametrize(
    "pattern",
    [
        "{label}/{label}{n}.jpg",
        "{label}/{n}.png",
        "{label}/{n} ({n}).png",
        "{label}/IMG_{n}.png",
        "fold_01/{n}.png",
        "{label}/0000000{n}-aac5-4193-9e2a-7b16d6d5b5f2.jpg",
        "{label}/{n}d41d8cd98f00b204e9800998ecf8427.png",
        "{label}_{n}.png",
        "images/img{n}_80.png",
    ],  # fmt: skip
)
def test_names_that_say_nobody_are_refused_with_a_way_out(pattern):
    found = [pattern.format(label=label, n=n) for label in LABEL for n in range(9)]
    with pytest.raises(DataError, match="--person REGEX.*--person each"):
        people_of(sorted(set(found)))


def test_two_words_for_a_whole_class_say_nobody():
    found = [f"{label}/Te-{label}{end}_{n:04d}.jpg" for label in LABEL for end in ("", "Tr") for n in range(9)]
    with pytest.raises(DataError, match="--person each"):
        people_of(found)


def test_person_by_a_regular_expression():
    found = [f"{LABEL[p % 2]}/scan{p}of{q}at{z}.png" for p in PEOPLE for q in (1, 2) for z in (7, 8)]
    rule = r"(?P<label>\w+)/scan(?P<person>\d)of(?P<scan>\d)at(?P<slice>\d)"
    rows = names.understand(found, "here", person=rule).rows
    assert rows[3] == names.Row("NC/scan1of2at8.png", "", "1", "2", 8, "NC")
    for wrong, said in (
        ("(", "no regular expression"),
        ("a", "no group"),
        ("q(?P<person>x)", "finds nobody in 'NC/scan1"),
    ):
        with pytest.raises(DataError, match=said):
            names.understand(found, "here", person=wrong)


def test_strays_and_masks_are_left_out():
    found = [f"set/{LABEL[p % 2]}/{p}_{z}.png" for p in range(100, 120) for z in (1, 2)]
    strays = ["set/cover.png", "set/preview1.png"]
    listing = names.understand([*found, *strays, "set/AD/101_1_mask.png", "masks/AD/101_1.png"], "here")
    assert len(listing.rows) == len(found) and {row.label for row in listing.rows} == set(LABEL)
    assert dict(listing.left_out) == {
        "masks": ["set/AD/101_1_mask.png", "masks/AD/101_1.png"],
        "the name says no person": sorted(strays),
    }


def test_files_of_types_that_are_not_read_are_said():
    found = [f"p{p}_{z}.png" for p in PEOPLE for z in (80, 81)]
    assert names.understand([*found, "p9_80.tif", "a.txt"], "here").left_out == [
        ("of a type that is not read", ["p9_80.tif"])
    ]


def test_archives_beside_pictures_are_said():
    found = [f"p{p}_{z}.png" for p in PEOPLE for z in (80, 81)]
    assert names.understand([*found, "more.zip", "rest.tar.gz"], "here").left_out == [
        ("of a type that is not read", ["more.zip", "rest.tar.gz"])
    ]


def test_a_day_and_a_number_of_six_digits_need_not_be_a_moment():
    for name in ("patient_00{p}/20110203_{z:06d}.png", "case_2001020{p}_{z:06d}.png", "sub-2001020{p}_{z:06d}.png"):
        rows = names.understand([name.format(p=p, z=z) for p in PEOPLE for z in range(40, 120)], "here").rows
        assert len({row.person for row in rows}) == 4 and {row.z for row in rows} == set(range(40, 120))
    for other in ("mask", "flair"):
        stems = [f"{word}_20200115_1010{s}" for word in ("t1", other) for s in (10, 11)]
        found = [f"patient_00{p}/{stem}.png" for p in PEOPLE for stem in stems]
        listing = names.understand(found, "here")
        assert {row.entry for row in listing.rows} == {name for name in found if "/t1_" in name}


@pytest.mark.parametrize(
    "name",
    [
        "Screenshot 2024-03-{d:02d} at 10.{i:02d}.{j:02d}.png",
        "Screenshot 2024-03-{d:02d} at 10.{i:02d}.{j:02d} (2).png",
        "Screenshot from 2024-03-{d:02d} 10-{i:02d}-{j:02d}.png",
        "Screenshot_202403{d:02d}-10{i:02d}{j:02d}.png",
        "WhatsApp Image 2024-03-{d:02d} at 10.{i:02d}.{j:02d} PM.jpeg",
        "2024-03-{d:02d}T10:{i:02d}:{j:02d}.png",
        "202403{d:02d}_10{i:02d}{j:02d}.jpg",
    ],
)
def test_a_moment_is_nobody(name):
    """A screenshot says when it was made: neither its day nor its hour and minute is somebody."""
    found = [name.format(d=1 + i % 7, i=i, j=3 * i) for i in range(20)]
    with pytest.raises(DataError, match="do not say whose picture"):
        names.understand(found, "here")
    inside = [f"patient_{i % 5:03d}/{one}" for i, one in enumerate(found)]
    assert len({row.person for row in names.understand(inside, "here").rows}) == 5


def test_dev_is_a_validation_split(tmp_path):
    image = encode(brain(0))
    people = {"train": (1, 2), "dev": (3,), "test": (4,)}
    entries = {f"{split}/{case}_{z}.png": image for split in people for case in people[split] for z in (0, 1)}
    source = open_source(write(tmp_path / "a.zip", entries))
    assert set(source.made.values()) == {"archive"} and set(source.case[source.select("validate")]) == {3}


@pytest.mark.parametrize("people", [4, 5, 9])
def test_a_label_of_the_archive_stays_in_training(tmp_path, people):
    """One person has the label MCI, two have AD: whatever the seed, somebody of each is trained on."""
    image = encode(brain(0, 8))
    label = ["MCI", "AD", "AD", *["NC"] * (people - 3)]
    entries = {f"{label[case]}/{case}_{z}.png": image for case in range(people) for z in (0, 1)}
    path = write(tmp_path / "a.zip", entries)
    for seed in range(20):
        source = open_source(path, seed=seed)
        assert set(source.label[source.select("train")].tolist()) == {0, 1, 2}


def test_a_table_says_who_was_scanned_twice(tmp_path):
    """Scans join their person: one split, numbers averaged; a person in two splits stays in the later one."""
    image = encode(brain(0, 8))
    entries = {
        f"train/{label}/{scan}_{z}.png": image for label, scan in (("AD", 1), ("NC", 2), ("NC", 3)) for z in (0, 1)
    }
    entries |= {f"test/NC/{scan}_{z}.png": image for scan in (8, 9) for z in (0, 1)}
    table = tmp_path / "people.csv"
    table.write_text("case,person,age\n1,ann,70\n2,ann,72\n3,ben,60\n8,cid,50\n9,ben,62\n")
    source = open_source(write(tmp_path / "a.zip", entries | {"train/AD/4_0.png": image}), labels=table)
    assert sorted(source.case_names.values()) == ["4", "ann", "ben", "cid"]
    number = {name: case for case, name in source.case_names.items()}
    assert set(source.split[source.case == number["ben"]]) == {"test"} and len(source.entries) == 9
    assert source.listing.left_out[0][1] == ["train/NC/3_0.png", "train/NC/3_1.png"]
    columns = source.columns()
    np.testing.assert_array_equal(
        dataset.covariates_of(source, np.array([number["ann"], number["4"]]), columns), [[0], [np.nan]]
    )
    table.write_text("case,person,sex\n1,ann,F\n2,ann,M\n")
    with pytest.raises(DataError, match="scans of ann disagree in the column 'sex'"):
        open_source(tmp_path / "a.zip", labels=table)
