"""DICOM: the series in folders as scanners and archives deliver them, as NIfTI images (`find`, `Series.image`).

A file is recognised by the letters DICM behind its first 128 bytes, whatever its name is. Files of one
SeriesInstanceUID, and of one shape and orientation, are a series: a stack of slices, ordered by where they lie in the
patient, not by their names. DICOM's coordinates run to the left, to the back and up; those of a NIfTI image to the
right, to the front and up.

A PatientID is somebody's: it is never printed or written down. People are told apart by a hash of it, and names of
files and folders, which often hold it as well, are left out but for folders that several people share (labels, splits)
and the sentence that refuses a damaged file.
The hash is the same on every machine, so that runs can be compared; whoever has a list of all IDs could find it again.
"""

import collections
import dataclasses
import hashlib
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ldm.data import archive, words
from ldm.later import Later

nibabel, pydicom = Later("nibabel"), Later("pydicom")

LEAST = 8  # slices of a series that is a volume; what has fewer is a scout or a picture of the protocol
EVEN = 0.2  # part of the usual distance by which that of two slices may differ; more, and one is missing
DIGITS = 12  # of the number that stands for a PatientID
FOREIGN = {"CT", "PT", "NM", "CR", "DX", "RF", "XA", "US"}  # modalities beside MR; converters write OT or none
TAGS = [
    "PatientID",
    "Modality",
    "SeriesInstanceUID",
    "SeriesDescription",
    "SOPInstanceUID",
    "Rows",
    "Columns",
    "ImageOrientationPatient",
    "ImagePositionPatient",
]


class Key(NamedTuple):
    """What the slices of one series share: files that differ in any of it are of two.

    Attributes:
        patient: the number that stands for the PatientID, or for the series where there is none.
        series: SeriesInstanceUID.
        described: SeriesDescription.
        orientation: six direction cosines.
        shape: rows and columns.
        named: whether there is a PatientID.
        modality: "MR", "CT", ...
    """

    patient: str
    series: str
    described: str
    orientation: tuple[float, ...]
    shape: tuple[int, int]
    named: bool
    modality: str


@dataclasses.dataclass(frozen=True)
class Series:
    """The files of one volume, from one end to the other.

    Attributes:
        paths: of its slices.
        places: of each, in mm along the direction from slice to slice.
    """

    paths: tuple[Path, ...]
    places: tuple[float, ...]

    @property
    def name(self) -> str:
        """What its user knows it by: a file of it."""
        return f"{self.paths[0]} and {len(self.paths) - 1} more"

    def image(self) -> "nibabel.Nifti1Image":
        """The volume, in RAS coordinates.

        Raises:
            DataError: naming the slice that cannot be read, or the place where one is missing.
        """
        steps = np.diff(self.places)
        step = float(np.median(steps))
        if (np.abs(steps - step) > EVEN * step).any():
            gap = self.paths[int(np.argmax(np.abs(steps - step)))]
            raise archive.DataError(
                f"{gap}: the distance to the next slice of its series is not that of the others; add what is missing, "
                "or remove what is there twice."
            )
        slices, first = [], None
        for path in self.paths:
            try:
                read = pydicom.dcmread(path)
                first = first or read
                pixels = read.pixel_array * float(read.get("RescaleSlope", 1)) + float(read.get("RescaleIntercept", 0))
            except Exception as error:  # pydicom and its decoders raise whatever they meet
                raise archive.DataError(
                    f"{path} cannot be read as a DICOM slice ({_short(error)}); fetch it again, or convert the series "
                    "to NIfTI with dcm2niix."
                ) from error
            slices.append(pixels.astype(np.float32))
        right, down = np.reshape([float(value) for value in first.ImageOrientationPatient], (2, 3))
        height, width = (float(value) for value in first.PixelSpacing)  # of a pixel, mm: between rows, between columns
        if not (height > 0 and width > 0 and np.linalg.norm(np.cross(right, down)) > 0.5):
            raise archive.DataError(
                f"{self.paths[0]} says no size of its pixels, or no directions of its rows and columns; convert the "
                "series to NIfTI with dcm2niix."
            )
        affine = np.eye(4)
        affine[:3, 0], affine[:3, 1], affine[:3, 2] = right * width, down * height, np.cross(right, down) * step
        affine[:3, 3] = [float(value) for value in first.ImagePositionPatient]
        return nibabel.Nifti1Image(np.stack(slices).transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM; what cannot be read is none."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def find(folder: Path, files: list[Path]) -> tuple[dict[str, Series], list[str]]:
    """The volumes among the files of a folder, by names that say who it is and give nothing away.

    Args:
        folder: what was opened.
        files: in it.

    Returns:
        `<shared folders>/sub-<number>/ses-<number>_<contrast>.dcm` -> series; empty if no file is DICOM. And sentences
        on what is left out.

    Raises:
        DataError: if files are DICOM, but no series is a volume, or a file is damaged.
    """
    found, notes = [path for path in files if is_dicom(path)], []
    series = collections.defaultdict(dict)
    for path in found:
        about = _read_about(path)
        if about is not None:
            key, slice_id, place = about
            series[key].setdefault(slice_id, (place, path))  # the same slice twice counts once
    others = {key: key.modality for key in series if key.modality in FOREIGN}
    for key in others:
        del series[key]
    foreign = ", ".join(sorted(set(others.values())))
    stacks = {key: sorted(slices.values()) for key, slices in series.items() if len(slices) >= LEAST}
    if found and not stacks:
        raise archive.DataError(
            f"--data {folder} holds DICOM files, but no MR series of {LEAST} slices or more with one orientation"
            f"{f' (there is {foreign})' * bool(others)}; give the folder of whole series, or convert them to NIfTI "
            "with dcm2niix."
        )
    if short := len(series) - len(stacks):
        nobody = len({key.patient for key in series} - {key.patient for key in stacks})
        lost = f"; of {nobody} people there is nothing else" if nobody else ""
        notes = [f"{short} DICOM series of fewer than {LEAST} slices are left out{lost}"]
    if others:
        notes.append(f"{len(others)} DICOM series of {foreign}, not of MR, left out")
    if unnamed := len({key.patient for key in stacks if not key.named}):
        notes.append(
            f"{unnamed} DICOM series say no PatientID, and each counts as somebody else, so that one person may be in "
            "two splits"
        )
    shared = _shared_folders({key: slices[0][1].relative_to(folder).parts[:-1] for key, slices in stacks.items()})
    counted, volumes = collections.Counter(), {}
    for key, slices in sorted(stacks.items(), key=lambda item: item[1][0][1]):
        counted[key.patient] += 1
        contrast = words.read(key.described.replace(" ", "_"), sliced=False).contrast
        name = f"sub-{key.patient}/ses-{counted[key.patient]}" + (f"_{contrast}" if contrast else "") + ".dcm"
        places, paths = zip(*slices, strict=True)
        volumes["/".join([*shared[key], name])] = Series(paths, places)
    return volumes, notes


def _read_about(path: Path):
    """(`Key` of its series, its own ID, place in mm) of a slice; None for what is no slice of a volume."""
    try:
        with warnings.catch_warnings(action="ignore"):
            about = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS)
            orientation = tuple(round(float(value), 3) for value in about.get("ImageOrientationPatient") or ())
            position = [float(value) for value in about.get("ImagePositionPatient") or ()]
            shape = int(about.get("Rows") or 0), int(about.get("Columns") or 0)
            named = str(about.get("PatientID") or "").strip()
            patient = _number(named or str(about.get("SeriesInstanceUID", "")))
    except Exception as error:
        raise archive.DataError(f"{path} is a damaged DICOM file ({_short(error)}); fetch it again.") from error
    if len(orientation) != 6 or len(position) != 3 or not all(shape):
        return None
    place = float(np.cross(orientation[:3], orientation[3:]) @ position)
    series, described = (str(about.get(tag, "")) for tag in ("SeriesInstanceUID", "SeriesDescription"))
    key = Key(patient, series, described, orientation, shape, bool(named), str(about.get("Modality") or ""))
    return key, str(about.get("SOPInstanceUID", path.name)), place


def _number(patient: str) -> str:
    """A PatientID as a number that says nothing."""
    digest = hashlib.sha256(patient.strip().encode()).digest()
    return f"{int.from_bytes(digest[:8]) % 10**DIGITS:0{DIGITS}d}"


def _shared_folders(folders: dict) -> dict:
    """Series -> those of the folders above it, outermost first, that hold several people."""
    people = collections.defaultdict(set)
    for key, parts in folders.items():
        for depth in range(len(parts)):
            people[parts[: depth + 1]].add(key.patient)
    return {
        key: [part for depth, part in enumerate(parts) if len(people[parts[: depth + 1]]) > 1]
        for key, parts in folders.items()
    }


def _short(error) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:120]
