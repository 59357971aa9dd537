"""Volumes (NIfTI, MGZ, Analyze, DICOM series): read as stacks of slices (`VolumeStore`); written as NIfTI
(`save_volume`).
"""

import gzip
import logging
import os
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ldm.data import archive, dicom
from ldm.later import Later

nibabel, ndimage = Later("nibabel"), Later("scipy.ndimage")

logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # what it would say of a header, a sentence of ours says

WHITE = 99.8  # percentile of a volume's positive voxels that becomes white
DARK = 12  # grey levels up to this do not count as brain
MIN_AREA = 0.15  # slices with less brain than this part of the fullest slice are left out
BELOW = 0.05  # so many of the voxels that are not background below it: it is no zero of a scale
NOISE = 0.01  # of the range of a volume, which values of its background stay within
MAX_VOXELS = 2**29  # of a volume, unless somebody says otherwise
INTERCEPT = slice(116, 120)  # of a NIfTI-1 header
MEMORY = 2**30  # bytes of decoded volumes that are kept


class VolumeStore:
    """Slices of volumes, as 8-bit grey levels.

    A volume is brought into RAS orientation, so that slices look alike whichever way it was stored: axial ones have
    anterior up and the patient's left at the left of the picture, as `numpy.rot90` of the array lays them. Where voxels
    are not square in the plane of the slices, the coarser side is resampled. One scale for the whole volume: the
    background becomes black, the WHITE-th percentile of the voxels above it white (see `_grey`). Every volume is read
    once to find the slices that hold brain; later reads keep MEMORY bytes of volumes decoded.

    Args:
        volumes: name -> file, or DICOM series.
        axis: 0 sagittal, 1 coronal, 2 axial.
        most: voxels that a volume may have.

    Attributes:
        names: every slice that holds brain, `<name>#<voxel index>`.
        notes: sentences about volumes whose header had to be guessed at.
        slices: (name, name of the volume, voxel index along the axis) of each.

    Raises:
        DataError: names the file that cannot be read or is not three-dimensional.
    """

    def __init__(self, volumes: dict[str, Path | dicom.Series], axis: int = 2, most: int = MAX_VOXELS):
        if axis not in (0, 1, 2):
            raise archive.DataError(f"--axis {axis} does not exist; choose 0 (sagittal), 1 (coronal) or 2 (axial).")
        self.axis, self.most = axis, most
        self.slices: list[tuple[str, str, int]] = []
        self.notes: list[str] = []
        self._found = volumes
        self._places: dict[str, tuple[str, int]] = {}
        self._volumes: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        for volume in tqdm(volumes, desc="volumes", delay=5, leave=False, disable=None):
            area = (self._volume(volume, self.notes) > DARK).sum((1, 2))
            if not area.any():
                raise archive.DataError(
                    f"{_shown(volumes[volume])} is black: no voxel is above its background; remove it."
                )
            for z in np.flatnonzero(area >= MIN_AREA * area.max()).tolist():
                name = f"{volume}#{z}"
                self.slices.append((name, volume, z))
                self._places[name] = (volume, z)
        self.names = list(self._places)

    def _volume(self, volume: str, notes=None) -> np.ndarray:
        """(slices, H, W) uint8, from memory where possible."""
        with self._lock:  # a thread that waits for a volume another one is loading finds it afterwards
            if volume not in self._volumes:
                notes = [] if notes is None else notes
                self._volumes[volume] = _load_volume(self._found[volume], self.axis, notes, self.most)
                while len(self._volumes) > 1 and sum(v.nbytes for v in self._volumes.values()) > MEMORY:
                    self._volumes.popitem(last=False)
            self._volumes.move_to_end(volume)
            return self._volumes[volume]

    def read(self, name: str) -> bytes:
        """The grey levels of one slice, (H, W) uint8 in C order."""
        volume, z = self._places[name]
        return self._volume(volume)[z].tobytes()

    def shape(self, name: str) -> tuple[int, int]:
        """Height and width of one slice."""
        volume, _ = self._places[name]
        return self._volume(volume).shape[1:]

    def files(self) -> list[Path]:
        """The files on disk that the slices come from."""
        found = [self._found[volume] for volume in dict.fromkeys(volume for volume, _ in self._places.values())]
        return [path for each in found for path in _files(each)]


def _files(volume: Path | dicom.Series) -> list[Path]:
    """The files of a volume: an Analyze or NIfTI pair has two, a series one for each slice."""
    if isinstance(volume, dicom.Series):
        return list(volume.paths)
    return [volume, *(pixels for pixels in [_pixels_of(volume)] if pixels)]


def _pixels_of(path: Path) -> Path | None:
    """The .img beside a .hdr; None for volumes that are one file."""
    if path.suffix.lower() != ".hdr":
        return None
    return path.with_suffix(".IMG" if path.suffix.isupper() else ".img")


def _shown(volume: Path | dicom.Series):
    return volume.name if isinstance(volume, dicom.Series) else volume


def name_files(paths: list[Path]) -> dict[str, Path]:
    """Files by their names below the folder that holds all of them; of a single file, its folder may be the person.

    Raises:
        DataError: one is named twice.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise archive.DataError("--data names the same volume twice; give every volume once.")
    above = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    above = above.parent if len(paths) == 1 else above
    return {path.absolute().relative_to(above).as_posix(): path for path in paths}


def save_volume(
    path: Path, slices: np.ndarray, voxel: tuple[float, float, float], axis: int = 2, said: str = ""
) -> None:
    """Writes slices as a NIfTI volume in RAS orientation: `VolumeStore` with the same axis gives them back.

    Args:
        path: .nii or .nii.gz.
        slices: (N, H, W) uint8, as `VolumeStore` shows them; with axis 2 they are axial, from the lowest up, anterior
            at the top, the patient's left at the left.
        voxel: its size in mm, left-right, posterior-anterior, up. The origin is the middle of the volume.
        axis: along which the slices were cut.
        said: a description for the header, of which NIfTI keeps 79 bytes.
    """
    volume = laid(slices, axis)
    affine = np.diag([*voxel, 1.0])
    affine[:3, 3] = -np.array(voxel) * (np.array(volume.shape) - 1) / 2
    image = nibabel.Nifti1Image(np.ascontiguousarray(volume), affine)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = said.encode()[:79]
    nibabel.save(image, path)


def laid(slices: np.ndarray, axis: int) -> np.ndarray:
    """Slices (N, H, W) across an axis -> the volume in RAS orientation, (x, y, z)."""
    return np.moveaxis(np.rot90(slices, -1, axes=(1, 2)), 0, axis)


def cut(volume: np.ndarray, axis: int) -> np.ndarray:
    """A volume in RAS orientation -> its slices across an axis (N, H, W), superior or anterior upwards."""
    # (x, y, z) -> (slice, column, row) -> (slice, row, column) with the last axis upwards.
    return np.rot90(np.moveaxis(volume, axis, 0), axes=(1, 2))


def voxel_of(z, voxel, axis: int) -> list[float]:
    """The size of a stack's voxels in mm, longer along its axis where slice indices are left out.

    Args:
        z: the slice indices, ascending.
        voxel: mm along the three axes, from one slice index to the next.
        axis: along which the slices were cut.
    """
    voxel = list(voxel)
    voxel[axis] *= float(z[-1] - z[0]) / max(1, len(z) - 1) or 1.0
    return voxel


@np.errstate(all="ignore")  # nibabel reckons with whatever a header holds; what is wrong with it is said here
def _load_volume(found: Path | dicom.Series, axis: int, notes: list[str], most: int) -> np.ndarray:
    """Reads a volume as (slices, H, W) uint8; see `VolumeStore` for orientation and grey levels.

    Raises:
        DataError: naming the file that is damaged or no single three-dimensional volume of numbers.
    """
    path = _shown(found)
    try:
        volume = found.image() if isinstance(found, dicom.Series) else _open(found, notes, most)
        shape = tuple(int(length) for place, length in enumerate(volume.shape) if place < 3 or length > 1)
        if len(shape) != 3 or min(shape) < 1 or max(shape) > archive.MAX_SIDE or np.prod(shape, dtype=float) > most:
            several = ": write one of several, or their mean, into a file of its own" if len(shape) > 3 else ""
            raise archive.DataError(
                f"{path} has the shape {tuple(map(int, volume.shape))}, but one three-dimensional volume of at most "
                f"{most:,} voxels is needed{several}."
            )
        if volume.get_data_dtype().kind not in "iuf":
            complex_ones = ": write their magnitude" if volume.get_data_dtype().kind == "c" else ""
            raise archive.DataError(
                f"{path} holds {volume.get_data_dtype()}, but one number per voxel is needed{complex_ones}."
            )
        volume = nibabel.as_closest_canonical(volume)
        voxels = np.asarray(volume.dataobj, dtype=np.float32).reshape(volume.shape[:3])
    except archive.DataError:
        raise
    except Exception as error:  # a damaged header leads nibabel into any, plain Exception among them
        said = " ".join(str(error).split())  # nibabel says more than one line
        raise archive.DataError(f"{path} cannot be read as a volume ({said}); fetch it again.") from error
    grey = _grey(np.nan_to_num(voxels, nan=0.0, posinf=0.0, neginf=0.0))
    slices = cut(grey, axis)
    column, row = (float(size) for place, size in enumerate(volume.header.get_zooms()[:3]) if place != axis)
    square = squared(slices, row, column)
    if square is slices and not 0.99 < row / max(column, 1e-30) < 1.01:
        notes.append(f"{path}: pixels of {row:g} x {column:g} mm cannot be; they are taken as square")
    return np.ascontiguousarray(square)


def _check_gzip(path: Path, most: int) -> None:
    """Reads a .gz to its end, where its checksum is, which nibabel does not; not if there is no end to it."""
    left = 16 * most + 2**24  # bytes: no type of voxel is longer than 16, and headers have extensions
    if path.name.lower().endswith((".gz", ".mgz")):
        with gzip.open(path) as file:
            while block := file.read(2**22):
                left -= len(block)
                if left < 0:
                    raise archive.DataError(f"{path} unpacks to more than {most:,} voxels; fetch it again.")


def _open(path: Path, notes: list[str], most: int):
    """The image of a file, not yet read, with a scale and an orientation even if its header has none."""
    if path.suffix.lower() == ".dcm":
        raise archive.DataError(f"{path} is one slice of a DICOM series: give the folder of the series.")
    _check_gzip(path, most)
    pixels = _pixels_of(path)
    if pixels and not pixels.exists():
        raise archive.DataError(f"{path} is the header of {pixels.name}, which is not beside it; put it there.")
    try:
        image = nibabel.load(path)
    except nibabel.spatialimages.HeaderDataError:
        if pixels:
            raise
        # A slope without an intercept: 0 then. The four bytes are the same in either byte order.
        opener = gzip.open if path.name.lower().endswith(".gz") else open
        with opener(path, "rb") as file:
            data = bytearray(file.read())
        data[INTERCEPT] = bytes(4)
        image = nibabel.Nifti1Image.from_bytes(bytes(data))
        notes.append(f"{path}: its intercept is no number, and counts as 0")
    if not isinstance(image, nibabel.Nifti1Pair | nibabel.MGHImage):
        notes.append(f"{path}: Analyze says no orientation; its voxels are taken to go left, forward and up")
    if image.affine is None or not np.isfinite(image.affine).all() or not np.linalg.det(image.affine[:3, :3]):
        by_quaternion = isinstance(image.header, nibabel.Nifti1Header) and int(image.header["qform_code"])
        affine = image.get_qform() if by_quaternion else image.header.get_base_affine()
        if not np.isfinite(affine).all() or not np.linalg.det(affine[:3, :3]):
            affine = np.eye(4)
        image = nibabel.Nifti1Image(image.dataobj, affine)
        notes.append(f"{path}: its sform says no orientation; the qform or the order of the voxels is used")
    return image


def _grey(voxels: np.ndarray) -> np.ndarray:
    """Grey levels of a volume, uint8.

    The background is the value that most of the border has, exactly or but for noise (see `_background`), else 0.
    Voxels are scaled from there to the WHITE-th percentile of those above. If many lie below the background (as in
    volumes scaled to mean 0), all that is not background is scaled from its lowest to its highest percentile instead,
    and nothing of it becomes black.
    """
    background, noise = _background(voxels)
    inside = voxels[np.abs(voxels - background) > noise]
    if inside.size and (inside < background).mean() > BELOW:
        black, white = np.percentile(inside, (100 - WHITE, WHITE))
        light = DARK + 1 + (254 - DARK) * np.clip((voxels - black) / max(white - black, 1e-30), 0.0, 1.0)
        return np.where(np.abs(voxels - background) <= noise, 0, np.rint(light)).astype(np.uint8)
    above = inside[inside > background] - background
    white = np.percentile(above, WHITE) if above.size else 1.0
    return np.rint(np.clip((voxels - background) / white, 0.0, 1.0) * 255.0).astype(np.uint8)


def _background(voxels: np.ndarray) -> tuple[float, float]:
    """(value, how far noise goes from it) of what lies around a head."""
    border = np.concatenate([side.ravel() for axis in range(3) for side in np.take(voxels, [0, -1], axis)], axis=None)
    values, counts = np.unique(border, return_counts=True)
    if counts.max() > len(border) / 2:
        return float(values[counts.argmax()]), 0.0
    middle = float(np.median(border))
    away = np.abs(border - middle)
    low, high = np.percentile(voxels, (100 - WHITE, WHITE))
    near = away[away <= NOISE * (high - low)]
    return (middle, float(near.max())) if len(near) > len(border) / 2 else (0.0, 0.0)


def squared(slices: np.ndarray, height: float, width: float) -> np.ndarray:
    """Resamples (N, H, W) slices whose pixels are not square, so that both sides are as fine as the finer one.

    Args:
        height, width: of a pixel, mm. Where they are no lengths, or would make a side of more than `MAX_SIDE` pixels,
            the slices stay as they are.
    """
    fine = min(height, width)
    if not (fine > 0 and np.isfinite(height) and np.isfinite(width)) or max(height, width) < 1.01 * fine:
        return slices
    shape = [length * size / fine for length, size in zip(slices.shape[1:], (height, width), strict=True)]
    if max(shape) > archive.MAX_SIDE:  # or infinite: a header may hold any number
        return slices
    shape = [round(length) for length in shape]
    factors = [new / old for new, old in zip(shape, slices.shape[1:], strict=True)]
    return np.stack([ndimage.zoom(one, factors, order=1, grid_mode=True, mode="nearest") for one in slices])
