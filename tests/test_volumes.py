"""NIfTI volumes: upright however they are stored, and written so that they are read back."""

import nibabel
import numpy as np
import pytest
from small_archives import REAL, needs_real, refuse, take, volume

import dataset
from dataset import make_dataset, open_source
from ldm.data import volumes


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
    refuse([one, broken], "broken.nii.gz", "cannot be read")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 2), np.float32), np.eye(4)), tmp_path / "time.nii")
    refuse([one, tmp_path / "time.nii"], "time.nii", "three-dimensional", "into a file of its own")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.complex64), np.eye(4)), tmp_path / "waves.nii")
    refuse([one, tmp_path / "waves.nii"], "waves.nii", "complex64", "write their magnitude")


@pytest.mark.parametrize("size", [1e308, 1e-300, 1e9, np.inf, np.nan])
def test_pixels_of_an_impossible_size_count_as_square_and_that_is_said(tmp_path, size):
    image = nibabel.Nifti2Image(np.arange(60, dtype=np.float32).reshape(3, 4, 5), np.eye(4))
    image.header["pixdim"][1] = size  # nibabel itself takes only what it can write
    path = tmp_path / "head.nii"
    path.write_bytes(image.header.binaryblock + bytes(4) + image.get_fdata().astype("<f4").tobytes("F"))
    with np.errstate(all="ignore"):
        store = volumes.VolumeStore({"head": path})
    assert {store.shape(name) for name in store.names} == {(4, 3)}
    assert [note for note in store.notes if "taken as square" in note and "head.nii" in note]


def test_a_volume_gives_back_the_slices_that_were_written(tmp_path):
    slices = np.random.default_rng(0).integers(1, 256, (5, 12, 10)).astype(np.uint8)
    slices[:, 0, 0] = 255
    volumes.save_volume(tmp_path / "head.nii.gz", slices, (1.5, 1.5, 2.0))
    stored = nibabel.load(tmp_path / "head.nii.gz")
    assert nibabel.aff2axcodes(stored.affine) == ("R", "A", "S")
    np.testing.assert_allclose(stored.header.get_zooms(), (1.5, 1.5, 2.0))
    np.testing.assert_allclose(stored.affine @ [4.5, 5.5, 2.0, 1.0], [0.0, 0.0, 0.0, 1.0], atol=1e-6)
    store = volumes.VolumeStore({"head": tmp_path / "head.nii.gz"})
    read = [np.frombuffer(store.read(name), np.uint8).reshape(store.shape(name)) for name in store.names]
    np.testing.assert_allclose(read, slices, atol=3)  # white is a high percentile there
    for axis in (0, 1):
        volumes.save_volume(tmp_path / "other.nii.gz", slices, (1.0, 1.0, 1.0), axis)
        other = volumes.VolumeStore({"other": tmp_path / "other.nii.gz"}, axis)
        read = [np.frombuffer(other.read(name), np.uint8).reshape(other.shape(name)) for name in other.names]
        np.testing.assert_allclose(read, slices, atol=3)


@needs_real
def test_real_volumes():
    source = open_source(REAL / "t1_volumes")
    assert len(source.case_names) == 2
    assert 15 <= source.z.min() < source.z.max() <= 145
    images = take(make_dataset(source, "train", 128, 32, False), 9)
    middle = images[len(images) // 2]["image"]
    assert (middle[:, :4, :4] == -1).all() and middle.max() > 0.8 and 0.1 < (middle > -1).mean() < 0.6


def test_the_background_is_black_under_noise_as_well():
    """A head scaled to mean 0 and an offset of 1,000, with noise around it or without: black where no head is."""
    place = np.indices((24, 24, 24)) - 11.5
    radius = np.sqrt((place**2).sum(0))
    head = np.where(radius < 9, 4 - radius, 0.0)
    noise = np.random.default_rng(0).normal(0, 0.005, head.shape)
    for values in (head, head + noise, 100 * head + 1000 + noise):
        grey = volumes._grey(values.astype("float32"))
        assert (grey[radius > 9] == 0).mean() > 0.95 and (grey[radius < 8.9] > volumes.DARK).mean() > 0.95
