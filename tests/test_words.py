"""What one name says of itself."""

import time

import pytest

from ldm.data import words
from ldm.data.words import Words


@pytest.mark.parametrize(
    ("stem", "person", "scan", "z"),
    [
        ("case_007_slice_12", "007", "", 12),
        ("201739_83", "201739", "", 83),
        ("sub-ann_t1_s4", "sub-ann", "", 4),
        ("ann5_axial", "ann_axial", "", 5),
        ("ann", "ann", "", None),
        ("scan_20240101123456", "scan_20240101123456", "", None),
        ("OAS1_0028_MR1_mpr-3_100", "OAS1_0028", "MR1_mpr-3", 100),
        ("OAS1_0028_MR1_mpr_n4_anon_111_t88_gfc_sag_66", "OAS1_0028", "MR1_mpr_n4_anon_111_t88_gfc_sag", 66),
        ("sub-01_ses-02_run-1_80", "sub-01", "ses-02_run-1", 80),
        ("002_S_0295_80", "002_S_0295", "", 80),
        ("sub-001_080", "sub-001", "", 80),
        ("slice_080_sub-001", "sub-001", "", 80),
        ("Subject 7, slice 3", "Subject 7", "", 3),
        ("case_ann_b_slice_3", "ann_b", "", 3),
        ("patient_007_axial_12", "patient_007", "axial", 12),
        ("patient007_visit2_z12", "patient007", "visit2", 12),
        ("HCA6002231_V1_MR_80", "HCA6002231_V1_MR", "", 80),
        ("p1_MR_2_80", "p1", "MR_2", 80),
        ("p1_img80", "p1", "", 80),
        ("img1_80", "", "", 1),
        ("slice_080", "", "", 80),
        ("img_0001", "", "", 1),
        ("12", "", "", 12),
        ("26 (19)", "", "(19)", 26),
        ("p1_80_256x256", "p1", "", 80),
        ("p1_80_rot90", "p1", "rot90", 80),
        ("p1_80_aug_3", "p1", "aug_3", 80),
        ("p1_80 - Copy", "p1", "Copy", 80),
        ("p1_80_jpg.rf.0a1b2c", "p1", "", 80),
        ("p1_2019-01-02 10.11.12_80", "p1", "2019-01-02 10.11.12", 80),
        ("p1_20190102_10.11.12_80", "p1", "20190102_10.11.12", 80),
        ("TCGA_01_80", "TCGA_01", "", 80),
        ("", "", "", None),
    ],
)
def test_person_scan_and_slice(stem, person, scan, z):
    found = words.read(stem)
    assert (found.person, found.scan, found.z) == (person, scan, z)


def test_names_that_differ_in_their_number_only_are_read_alike():
    """The quick way for stacks gives what reading each name by itself gives."""
    for stem in (
        "OAS1_{}_100",
        "OAS1_0028_MR1_{}",
        "sub-{}_80",
        "p1_{}",
        "{}_S_0295",
        "a-{}",
        "rot_{}",
        "p1_80_aug_{}",
    ):
        for number in ("7", "12", "0028", "123456789"):
            name = stem.format(number)
            assert words.read(name) == words._Reader(name, sliced=True).words(), name


@pytest.mark.parametrize(
    "stem",
    "p1_80_mask p1_80_seg mask_p1_80 seg_001_slice_2 p1_80_label a_dseg wmh ground_truth VSD.Brain.XX.O.OT.34".split(),
)
def test_masks(stem):
    assert words.read(stem).mask
    assert (
        not words.read("WMH001_80").mask
        and not words.read("masked_p1_80").mask
        and not words.read("p1_label-AD_80").mask
    )


@pytest.mark.parametrize(
    ("stem", "contrast"),
    [
        ("a_T1w", "t1"),
        ("b_t1ce", "t1c"),
        ("c_FLAIR", "flair"),
        ("d_PD", "pd"),
        ("e_T1wCE", "t1c"),
        ("f_AXT1", "t1"),
        ("g_sagT2", "t2"),
    ],
)
def test_contrasts(stem, contrast):
    assert words.read(stem, sliced=False) == Words(stem[0], contrast=contrast)
    assert words.read("PD_12_80").person == "PD_12"  # a diagnosis as likely


def test_a_volume_has_no_slice():
    assert words.read("p1", sliced=False).person == "p1"
    assert words.read("BraTS_001_t1", sliced=False).person == "BraTS_001"


def test_a_folder_is_a_person_by_a_keyword_with_a_number_only():
    assert words.read_folder("patient_007").sure and words.read_folder("OAS1_0028_MR1").scan == "MR1"
    assert not any(words.read_folder(name).sure for name in ("case", "control", "Mild Dementia", "patients", "ses-01"))


def test_long_names_cost_no_time():
    start = time.perf_counter()
    for name in ("1" * 20_000, "a1" * 10_000, "1_" * 10_000, "-" * 20_000, "(" * 20_000, "1" * 20_000 + "_5"):
        words.read(name)
    assert words.read("1" * 5_000).z is None
    assert time.perf_counter() - start < 5
