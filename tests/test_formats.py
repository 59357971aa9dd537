"""Volumes in the formats of scanners and laboratories: MGZ, Analyze and DICOM show the head that NIfTI shows."""

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from small_archives import refuse, volume

import dataset
from ldm.data import dicom, table, volumes

SECRET = "Doe^Jane 1931"


def shown(found, axis=2):
    """All slices of one volume as `VolumeStore` shows them."""
    store = volumes.VolumeStore({"head": found}, axis)
    return np.stack([np.frombuffer(store.read(name), np.uint8).reshape(store.shape(name)) for name in store.names])


def slices_of(folder, voxels, affine, patient=SECRET, series="T1 MPRAGE", leave_out=(), shuffled=True):
    """Writes a volume (x, y, z), whose affine leads to RAS, as a DICOM series with names that say nothing of the order.

    Rows of a DICOM slice run along y, columns along x; its coordinates are LPS.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1, -1, 1, 1]) @ affine
    size = np.linalg.norm(lps[:3, :3], axis=0)
    right, down, along = (lps[:3, :3] / size).T
    if np.cross(right, down) @ along < 0:  # DICOM's slices have no direction but that of their positions
        mirror = np.diag([1, 1, -1, 1])
        mirror[2, 3] = voxels.shape[2] - 1
        voxels, lps = voxels[:, :, ::-1], lps @ mirror
    uid, names = generate_uid(), np.random.default_rng(0).permutation(voxels.shape[2])
    for z in range(voxels.shape[2]):
        if z in leave_out:
            continue
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = MRImageStorage
        data.PatientID, data.PatientName, data.SeriesDescription = patient, patient, series
        data.SeriesInstanceUID, data.SOPInstanceUID, data.SOPClassUID = uid, generate_uid(), MRImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        data.Rows, data.Columns = voxels.shape[1], voxels.shape[0]
        data.PixelSpacing = [float(size[1]), float(size[0])]
        data.ImageOrientationPatient = [float(v) for v in (*right, *down)]
        data.ImagePositionPatient = [float(v) for v in lps[:3] @ [0, 0, z, 1]]
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
        data.RescaleSlope, data.RescaleIntercept = 2.0, 0.0
        data.PixelData = np.ascontiguousarray(voxels[:, :, z].T).astype(np.uint16).tobytes()
        name = f"IM{names[z]:03d}" if shuffled else f"{z}.{'dcm' if z % 2 else 'DCM'}"
        data.save_as(folder / name, enforce_file_format=True)
    return folder


@pytest.fixture
def head(tmp_path):
    return nibabel.load(volume(tmp_path / "reference" / "head.nii"))


@pytest.mark.parametrize("suffix", ["mgz", "mgh", "hdr"])
@pytest.mark.parametrize("axis", [0, 2])
def test_other_formats_show_what_nifti_shows(tmp_path, head, suffix, axis):
    kind = {"mgz": nibabel.MGHImage, "mgh": nibabel.MGHImage, "hdr": nibabel.Nifti1Pair}[suffix]
    nibabel.save(kind(head.get_fdata().astype(np.float32), head.affine), tmp_path / f"head.{suffix}")
    np.testing.assert_array_equal(
        shown(tmp_path / f"head.{suffix}", axis), shown(tmp_path / "reference/head.nii", axis)
    )


def test_analyze_is_read_and_its_guess_is_said(tmp_path, head):
    """The format of OASIS-1's raw scans: two files, big-endian, no orientation; left is taken to come last."""
    voxels = head.get_fdata().astype(">i2")
    (tmp_path / "raw").mkdir()
    for number in (1, 2, 3):
        raw = nibabel.AnalyzeImage(voxels[::-1], None)
        nibabel.save(raw, tmp_path / "raw" / f"OAS1_000{number}_MR1_mpr-1_anon.img")
    source = dataset.open_source(tmp_path / "raw")
    assert sorted(source.case_names.values()) == ["OAS1_0001", "OAS1_0002", "OAS1_0003"]
    assert any("Analyze says no orientation" in note for note in source.listing.notes)
    np.testing.assert_array_equal(
        shown(tmp_path / "raw/OAS1_0001_MR1_mpr-1_anon.hdr"), shown(tmp_path / "reference/head.nii")
    )
    assert {path.suffix for path in source.store.files()} == {".hdr", ".img"}
    (tmp_path / "raw/OAS1_0002_MR1_mpr-1_anon.img").unlink()
    refuse(tmp_path / "raw", "OAS1_0002", ".img", "not beside it")


def test_a_damaged_mgz_is_refused(tmp_path, head):
    nibabel.save(nibabel.MGHImage(head.get_fdata().astype(np.float32), head.affine), tmp_path / "a.mgz")
    data = bytearray((tmp_path / "a.mgz").read_bytes())
    data[-6] ^= 1  # in the checksum
    (tmp_path / "b.mgz").write_bytes(data)
    refuse([tmp_path / "a.mgz", tmp_path / "b.mgz"], "b.mgz", "cannot be read")


@pytest.mark.parametrize("codes", [("R", "A", "S"), ("L", "P", "S"), ("S", "L", "A"), ("P", "S", "R")])
def test_a_dicom_series_shows_what_nifti_shows(tmp_path, codes):
    """However the scanner lays its slices, and whatever the files are called."""
    stored = nibabel.load(volume(tmp_path / "head.nii", codes, 900.0))
    slices_of(tmp_path / "series", stored.get_fdata(), stored.affine)
    found, notes = dicom.find(tmp_path, sorted((tmp_path / "series").iterdir()))
    (series,) = found.values()
    assert not notes
    for axis in (0, 1, 2):
        np.testing.assert_array_equal(shown(series, axis), shown(tmp_path / "head.nii", axis))


def test_dicom_people_are_told_apart_and_never_named(tmp_path, head, capsys):
    """As ADNI delivers it: label / patient / series / date / files. Two patients a label, one of them scanned twice."""
    voxels, affine = head.get_fdata(), head.affine
    for label, patient in (("AD", "002_S_0001"), ("AD", "002_S_0002"), ("CN", "002_S_0003"), ("CN", "002_S_0004")):
        slices_of(tmp_path / "ADNI" / label / patient / "MPRAGE" / "2006", voxels, affine, patient)
    slices_of(tmp_path / "ADNI/AD/002_S_0001/MPRAGE/2008", voxels, affine, "002_S_0001 ")
    slices_of(tmp_path / "ADNI/AD/002_S_0001/scout", voxels[:, :, :4], affine, "002_S_0001")
    slices_of(tmp_path / "ADNI/AD/002_S_0001/FLAIR", voxels, affine, "002_S_0001", series="AX T2 FLAIR")
    slices_of(tmp_path / "ADNI/CN/002_S_0005/MPRAGE/2006", voxels[:, :, :7], affine, "002_S_0005")
    (tmp_path / "ADNI" / "DICOMDIR").write_bytes(b"\0" * 200)
    assert dataset.main(["describe", str(tmp_path / "ADNI")]) == 0
    source = dataset.open_source(tmp_path / "ADNI")
    said = capsys.readouterr().out + repr(source) + repr(source.manifest()) + repr(source.entries)
    assert "002_S" not in said and "_S_000" not in said
    assert "2 DICOM series of fewer than 8 slices are left out; of 1 people there is nothing else" in said
    assert len(source.case_names) == 4 and len(np.unique(source.scan)) == 5
    assert source.label_names == ("AD", "CN")
    assert all(name.startswith("sub-") and len(name) == 4 + dicom.DIGITS for name in source.case_names.values())
    assert len(source.store.files()) == 5 * voxels.shape[2]
    image = dataset.read_split(source, "train", 30)["image"]
    assert image.max() > 0.9 and image.min() == -1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("tag", ["PixelSpacing", "ImageOrientationPatient"])
def test_dicom_without_a_geometry_is_refused(tmp_path, head, tag):
    slices_of(tmp_path / "a", head.get_fdata(), head.affine)
    for path in (tmp_path / "a").iterdir():
        data = pydicom.dcmread(path)
        setattr(data, tag, [0.0] * len(data[tag].value))
        data.save_as(path)
    refuse(tmp_path / "a", "says no size of its pixels, or no directions of its rows and columns")


def test_dicom_without_a_patient_is_said(tmp_path, head):
    """Whoever is called nothing, or blanks, is not one person; two scans of one may then be two people."""
    for place, patient in (("a", ""), ("b", "  "), ("c", None), ("d", "X1"), ("e", "X2")):
        slices_of(tmp_path / "all" / place, head.get_fdata(), head.affine, patient)
    source = dataset.open_source(tmp_path / "all")
    assert len(source.case_names) == 5
    (said,) = [note for note in source.listing.notes if "PatientID" in note]
    assert said.startswith("3 DICOM series say no PatientID, and each counts as somebody else")


def test_dicom_of_another_modality_is_left_out(tmp_path, head):
    """Archives of dementia hold CT and PET beside MR."""
    for place in "abc":
        slices_of(tmp_path / "all" / place, head.get_fdata(), head.affine, f"X{place}")
    for place, modality in (("a", "CT"), ("b", "MR")):
        for path in (tmp_path / "all" / place).iterdir():
            data = pydicom.dcmread(path)
            data.Modality = modality
            data.save_as(path)
    source = dataset.open_source(tmp_path / "all")
    assert len(source.case_names) == 2 and "1 DICOM series of CT, not of MR, left out" in source.listing.notes
    refuse(tmp_path / "all" / "a", "no MR series of 8 slices or more with one orientation (there is CT); give")


@pytest.mark.filterwarnings("error")
def test_a_scale_beyond_all_numbers_costs_no_warning(tmp_path, head):
    nibabel.save(nibabel.Nifti1Image(head.get_fdata().astype(np.int16), head.affine), tmp_path / "a.nii")
    data = (tmp_path / "a.nii").read_bytes()
    (tmp_path / "a.nii").write_bytes(data[:112] + np.array([3e38, 0], "<f4").tobytes() + data[120:])
    refuse(tmp_path / "a.nii", "a.nii is black")


def test_what_is_beside_volumes_is_said(tmp_path, head):
    """An .img without its header is somebody who is missing; so is who comes in a format that is not read."""
    for p in (1, 2, 3):
        nibabel.save(nibabel.Nifti1Pair(head.get_fdata().astype(np.float32), head.affine), tmp_path / f"sub-{p}.img")
    (tmp_path / "sub-3.hdr").unlink()
    (tmp_path / "sub-4.nrrd").write_bytes(b"NRRD0004")
    (tmp_path / "notes.txt").write_text("")
    assert dataset.open_source(tmp_path).listing.left_out == [
        ("of a type that is not read", ["sub-4.nrrd"]),
        ("without the .hdr that belongs to it", ["sub-3.img"]),
    ]


def test_the_shape_of_a_damaged_mgz_is_said_in_plain_numbers(tmp_path):
    nibabel.save(nibabel.MGHImage(np.zeros((4, 4, 4), np.float32), np.eye(4)), tmp_path / "a.mgh")
    data = (tmp_path / "a.mgh").read_bytes()
    (tmp_path / "a.mgh").write_bytes(data[:4] + np.array([2**30] * 3, ">i4").tobytes() + data[16:])
    refuse(tmp_path / "a.mgh", "has the shape (1073741824, 1073741824, 1073741824)")


def test_dicom_that_is_no_volume_is_refused_in_one_sentence(tmp_path, head):
    voxels, affine = head.get_fdata(), head.affine
    slices_of(tmp_path / "few", voxels[:, :, :5], affine)
    refuse(tmp_path / "few", "no MR series of 8 slices")
    slices_of(tmp_path / "gap", voxels, affine, leave_out=(9, 10))
    slices_of(tmp_path / "gap/other", voxels, affine, "somebody else")
    refuse(tmp_path / "gap", "distance to the next slice")
    slices_of(tmp_path / "cut", voxels, affine)
    slices_of(tmp_path / "cut/other", voxels, affine, "somebody else")
    cut = tmp_path / "cut/IM003"
    cut.write_bytes(cut.read_bytes()[:-50])
    refuse(tmp_path / "cut", "IM003", "cannot be read as a DICOM slice")
    slices_of(tmp_path / "one", voxels, affine, shuffled=False)
    refuse(tmp_path / "one/3.dcm", "give the folder of the series")


def test_a_written_volume_says_its_units_and_orientation(tmp_path):
    volumes.save_volume(tmp_path / "a.nii.gz", np.full((5, 6, 7), 9, np.uint8), (1.0, 2.0, 3.0))
    header = nibabel.load(tmp_path / "a.nii.gz").header
    assert header.get_xyzt_units()[0] == "mm" and header["qform_code"] == header["sform_code"] == 1
    np.testing.assert_allclose(header.get_qform(), header.get_sform())


def test_minus_four_is_missing_where_the_user_says_so():
    data = b"case,MMSCORE,note\n1,29,-4\n2,-4,b\n3,-4.0,c\n4,-1,missing\n"
    assert table.read(data)["MMSCORE"] == {1: "29", 2: "-4", 3: "-4.0", 4: "-1"}
    found = table.read(data, ["-4"])
    assert found == {"MMSCORE": {1: "29", 4: "-1"}, "note": {2: "b", 3: "c"}}
    assert table.read(data, ["-4", "-1", "C"])["MMSCORE"] == {1: "29"}
    assert table.read(data, ["-4", "-1", "C"])["note"] == {2: "b"}
