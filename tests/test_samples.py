"""study.read_samples: slices that somebody else drew, as an evaluation reads them, and what is said of bad ones."""

import zipfile
from dataclasses import replace

import nibabel
import numpy as np
import pytest

import dataset
import study
from ldm.drawing import figures
from ldm.judging import metrics
from ldm.judging.measures import Slices

SIZE = 32
COUNT = 70
SETTINGS = {"image_size": SIZE, "data": None, "seed": 0, "axis": 2, "contrast": None, "center": False}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "phantom.zip"
    dataset.write_phantoms(path, people=6, image_size=SIZE)
    return str(path)


@pytest.fixture(scope="module")
def people(phantoms, tmp_path_factory):
    """Those of a run with slices 0 to 31, of which samples need to know no more than this."""
    source, z = dataset.open_source(phantoms), np.arange(32)
    record = {"settings": SETTINGS, "data": {"source": phantoms, "labels": ["AD", "NC"]}}
    train = Slices(np.zeros((32, SIZE, SIZE, 1), "float32"), z, z % 2, z)
    return study.People(tmp_path_factory.mktemp("run"), {"diffusion": record}, source, source, {"train": train})


def recorded(people, axis=2, labels=("AD", "NC")):
    """The people of a run of other settings."""
    record = {"settings": {**SETTINGS, "axis": axis}, "data": {**people.record["data"], "labels": list(labels)}}
    return replace(people, records={"diffusion": record})


def test_samples_keep_their_heads_and_indices(people, phantoms):
    read = study.read_samples(people, phantoms, COUNT)
    heads, counts = np.unique(read.case, return_counts=True)
    assert sorted(counts) == [6, 32, 32] and len(heads) == 3
    source = people.source
    row = np.flatnonzero(source.case == read.case[40])[int(read.z[40])]
    want = dataset.read_split(source, source.split[row], SIZE)
    match = (want["case"] == read.case[40]) & (want["z"] == read.z[40])
    np.testing.assert_array_equal(read.images[40], metrics.to_unit(want["image"][match][0]))


def grey_heads(path, names):
    """A zip of grey slices with these names."""
    with zipfile.ZipFile(path, "w") as archive:
        for n, name in enumerate(names):
            figures.save_png(path.with_suffix(".png"), np.full((SIZE, SIZE), 10 + n, "uint8"))
            archive.write(path.with_suffix(".png"), name)
    return path


def test_samples_sorted_by_label_are_taken_of_both(people, tmp_path):
    names = [f"{'AD' if head < 20 else 'NC'}/case_{head:03d}_slice_{z}.png" for head in range(40) for z in (3, 4)]
    read = study.read_samples(people, grey_heads(tmp_path / "sorted.zip", names), 20)
    assert len(read) == 20 and len(np.unique(read.case)) == 10 and set(read.label.tolist()) == {0, 1}
    assert np.array_equal(read.case[::2], read.case[1::2]) and read.z.tolist() == [3, 4] * 10


def test_volumes_of_samples_are_cut_along_the_axis_of_the_run(people, tmp_path):
    voxels = np.zeros((5, 40, 40), "float32")
    voxels[:, 10:30, 10:30] = np.arange(1, 401).reshape(20, 20)
    for head in (1, 2):
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / f"sub-{head}.nii.gz")
    read = study.read_samples(recorded(people, axis=0), tmp_path, COUNT)
    assert read.z.tolist() == [0, 1, 2, 3, 4] * 2


def test_labels_that_the_run_does_not_know_of_are_forgotten_or_refused(people, tmp_path):
    path = grey_heads(tmp_path / "mci.zip", [f"{'MCI' if n % 2 else 'NC'}/case_{n}_slice_3.png" for n in range(6)])
    with pytest.raises(dataset.DataError, match="--samples .*mci.zip: slices are labelled MCI, and this run knows AD"):
        study.read_samples(people, path, COUNT)
    read = study.read_samples(recorded(people, labels=[]), path, COUNT)
    assert read.label.tolist() == [-1] * 6


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["00001.png", "00002.png"], "do not say whose picture it is"),
        (["case_001_slice_3.png", "case_001_slice_4.png"], "holds one person only, and of a single one nothing"),
        (["p1_3.png", "P1_3.png"], "may be one person or two"),
        ([], "holds no brain slices"),
        ([f"case_{case}_slice_40.png" for case in (1, 2)], "index 40, and the people of the run from 0 to 31"),
    ],
)
def test_samples_are_not_spoken_of_as_data_to_train_on(people, tmp_path, names, said):
    with pytest.raises(dataset.DataError) as error:
        study.read_samples(people, grey_heads(tmp_path / "heads.zip", names), COUNT)
    sentence = str(error.value)
    assert sentence.startswith("--samples ") and said in sentence
    assert "--data" not in sentence and "--person" not in sentence and "training" not in sentence
