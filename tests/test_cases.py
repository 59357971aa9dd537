"""Inputs as people have them, with the right answer beside each: `../shared/cases/make_cases.py`."""

import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from small_archives import REAL, oasis_entries, take, write

import dataset
from dataset import DataError, make_dataset, open_source

MAKER = REAL.parent / "cases" / "make_cases.py"
pytestmark = pytest.mark.skipif(not MAKER.exists(), reason=f"the maker of the cases ({MAKER}) is absent")

REFUSED = {  # one sentence, and what it must name
    "numbered": ["--person REGEX", "--person each"],
    "twins": ["'p1.nii'", "'p1.nii.gz'"],
    "both_labels": ["AD and NC", "train/AD/1_70.png", "train/NC/1_70.png"],
    "leading_zeros": ["'001'", "'1'"],
    "same_slice": ["'again/case_1_slice_70.png'", "'case_1_slice_70.png'"],
    "bit_flip": ["c4.nii.gz"],
    "jpeg_half": ["a4_8"],
    "big_table": ["labels.csv", "419,430,400 bytes"],
}
UNDERSTOOD = [
    *("repeats", "contrasts", "bids", "person_folders", "patient_folders", "slice_first", "masks_beside"),
    *("masks_folder", "stray", "thick", "z_scored", "zero_sform", "nan_intercept", "jpeg_tail", "transparent"),
    *("endless_name", "loop"),
]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, MAKER, folder], check=True, capture_output=True)
    return folder


def test_every_case_has_a_test(cases):
    assert {*REFUSED, *UNDERSTOOD, "tables"} == set(json.loads((cases / "expected.json").read_text()))


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_people_and_labels(cases, name):
    expected = json.loads((cases / "expected.json").read_text())[name]
    source = open_source(cases / expected["data"])
    assert len(source.case_names) == expected["people"]
    assert list(source.label_names) == expected["labels"]
    for split in ("train", "validate"):
        batch = take(make_dataset(source, split, 32, 4, False), 1)[0]
        assert (batch["image"][:, 0, 0] == -1).all() and batch["image"].max() > -1


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(cases, name):
    tracemalloc.start()
    with pytest.raises(DataError) as caught:
        open_source(cases / json.loads((cases / "expected.json").read_text())[name]["data"])
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()
    said = str(caught.value)
    assert "\n" not in said and said.endswith(".") and all(word in said for word in REFUSED[name]), said


def test_scans_of_one_person_stay_together(cases):
    source = open_source(cases / "repeats")
    assert sorted(source.case_names.values()) == [f"OAS1_{number:04d}" for number in range(28, 36)]
    assert len(np.unique(source.scan)) == 8 * 4 and sorted(set(source.z.tolist())) == [100, 101, 102]
    for split in dataset.SPLITS[:2]:
        people = np.unique(source.case[source.split == split])
        assert all((source.split[source.case == person] == split).all() for person in people)
    assert set(source.label[source.split == "train"].tolist()) == {0, 1}


def test_names_that_say_nobody_go_on_when_told_how(cases):
    source = open_source(cases / "numbered", person="each")
    assert len(source.case_names) == len(source.entries) == 3 * 30 + 3 * 8
    assert source.label_names == ("Mild", "NonDemented", "VeryMild")
    assert set(source.label[source.split == "train"].tolist()) == {0, 1, 2}
    assert any("one person may be in two splits" in line for line in dataset.people.describe(source))
    assert source.manifest()["person"] == "each"


def test_of_several_contrasts_one_is_used(cases):
    source = open_source(cases / "contrasts")
    assert {entry.rpartition("_")[2].partition(".")[0] for entry in source.entries} == {"t1"}
    said = "\n".join(dataset.people.describe(source))
    assert "t1 is used" in said and "left out, masks: 5" in said and "left out, contrast flair: 5" in said
    source = open_source(cases / "contrasts", contrast="FLAIR")
    assert {entry.rpartition("_")[2].partition(".")[0] for entry in source.entries} == {"flair"}
    with pytest.raises(DataError, match="--contrast pdw: the names in .* say flair and t1 and t2"):
        open_source(cases / "contrasts", contrast="pdw")


def middle(source, size=48):
    """The middle slice of the first training volume, as light in [0, 1]."""
    batches = take(make_dataset(source, "train", size, 256, False), 1)[0]
    first = batches["image"][batches["case"] == batches["case"][0]]
    return (first[len(first) // 2, :, :, 0] + 1) / 2


def test_a_head_of_thick_slices_keeps_its_shape(cases):
    """The ball is 34 mm wide and, in voxels of 3 mm, 33 high: so is a coronal slice through its middle."""
    rows, columns = np.nonzero(middle(open_source(cases / "thick", axis=1), 40) > 0.1)
    assert np.ptp(columns) + 1 == pytest.approx(34, abs=2) and np.ptp(rows) + 1 == pytest.approx(33, abs=2)


def test_what_lies_below_the_mean_of_a_z_scored_brain_is_not_black(cases):
    light = middle(open_source(cases / "z_scored"), 48)
    inside = np.hypot(*(np.indices((48, 48)) - 23.5)) < 14
    assert light[inside].min() > 0.04 and light[0].max() == 0 and light.max() == 1


def test_what_the_header_does_not_say_is_said(cases):
    assert "qform" in open_source(cases / "zero_sform").listing.notes[0]
    assert "intercept" in open_source(cases / "nan_intercept").listing.notes[0]


def test_what_is_transparent_is_black(cases):
    batch = take(make_dataset(cases / "transparent", "train", 64, 1, False), 1)[0]["image"][0, :, :, 0]
    assert (batch[:5] == -1).all() and batch[32, 32] == pytest.approx(220 / 127.5 - 1, abs=0.01)


def test_tables(cases, tmp_path):
    path = write(tmp_path / "a.zip", oasis_entries({"train": range(1, 7)}))

    def opened(name):
        return open_source(path, labels=cases / "tables" / f"{name}.csv")

    source = opened("missing_words")
    assert source.columns()["age"]["kind"] == "number" and len(source.covariates["age"]) == 3
    for name, words in {
        "not_quite_numbers": ["'61Y' of case 1", "'90+' of case 2"],
        "open_quote": ["quote"],
        "twice": ["'label' twice"],
        "cases_differ": ["'ad' and 'AD'"],
    }.items():
        with pytest.raises(DataError) as caught:
            opened(name)
        assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value
