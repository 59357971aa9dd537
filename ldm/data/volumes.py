"""NIfTI volumes: read as stacks of slices (`VolumeStore`), and written (`save_volume`)."""

import threading
import zlib
from collections import OrderedDict
from pathlib import Path

import nibabel
import numpy as np
from tqdm import tqdm

from ldm.data import archive

WHITE = 99.8  # percentile of a volume's positive voxels that becomes white
DARK = 12  # grey levels up to this do not count as brain
MIN_AREA = 0.15  # slices with less brain than this part of the fullest slice are left out
MEMORY = 2**30  # bytes of decoded volumes that are kept


class VolumeStore:
    """Slices of NIfTI volumes, as 8-bit grey levels.

    A volume is brought into RAS orientation, so that slices look alike whichever way it was stored: axial ones have
    anterior up and the patient's left at the left of the picture, as `numpy.rot90` of the array lays them. 0 and below
    becomes black, the WHITE-th percentile of the positive voxels white, one scale for the whole volume. Every
    volume is read once to find the slices that hold brain; later reads keep MEMORY bytes of volumes decoded.

    Args:
        paths: .nii or .nii.gz files, one person each.
        axis: 0 sagittal, 1 coronal, 2 axial.

    Attributes:
        names: every slice that holds brain, `<file>#<voxel index>`.
        slices: (name, case name, voxel index along the axis) of each.

    Raises:
        DataError: names the file that cannot be read or is not three-dimensional.
    """

    def __init__(self, paths: list[Path], axis: int = 2):
        if axis not in (0, 1, 2):
            raise archive.DataError(f"--axis {axis} does not exist; choose 0 (sagittal), 1 (coronal) or 2 (axial).")
        self.axis = axis
        self.slices: list[tuple[str, str, int]] = []
        self._places: dict[str, tuple[Path, int]] = {}
        self._volumes: OrderedDict[Path, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        for case, path in tqdm(_name_volumes(paths).items(), desc="volumes", delay=5, leave=False):
            area = (self._volume(path) > DARK).sum((1, 2))
            if not area.any():
                raise archive.DataError(f"{path} is black: it holds no voxel above zero; remove it.")
            for z in np.flatnonzero(area >= MIN_AREA * area.max()).tolist():
                name = f"{path}#{z}"
                self.slices.append((name, case, z))
                self._places[name] = (path, z)
        self.names = list(self._places)

    def _volume(self, path: Path) -> np.ndarray:
        """(slices, H, W) uint8, from memory where possible."""
        with self._lock:  # a thread that waits for a volume another one is loading finds it afterwards
            if path not in self._volumes:
                self._volumes[path] = _load_volume(path, self.axis)
                while len(self._volumes) > 1 and sum(v.nbytes for v in self._volumes.values()) > MEMORY:
                    self._volumes.popitem(last=False)
            self._volumes.move_to_end(path)
            return self._volumes[path]

    def read(self, name: str) -> bytes:
        """The grey levels of one slice, (H, W) uint8 in C order."""
        path, z = self._places[name]
        return self._volume(path)[z].tobytes()

    def shape(self, name: str) -> tuple[int, int]:
        """Height and width of one slice."""
        path, _ = self._places[name]
        return self._volume(path).shape[1:]

    def files(self) -> list[Path]:
        """The files on disk that the slices come from."""
        return list(dict.fromkeys(path for path, _ in self._places.values()))


def _name_volumes(paths: list[Path]) -> dict[str, Path]:
    """Person -> file. The name is the file's; where two files share it (sub-1/t1.nii, sub-2/t1.nii), their path."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise archive.DataError("--data names the same volume twice; give every person's volume once.")
    stems = [path.name.lower().removesuffix(".gz").removesuffix(".nii") for path in paths]
    unique = len(set(stems)) == len(stems)
    return {stem if unique else path.as_posix(): path for stem, path in zip(stems, paths, strict=True)}


def save_volume(path: Path, slices: np.ndarray, voxel: tuple[float, float, float], axis: int = 2) -> None:
    """Writes slices as a NIfTI volume in RAS orientation: `VolumeStore` with the same axis gives them back.

    Args:
        path: .nii or .nii.gz.
        slices: (N, H, W) uint8, as `VolumeStore` shows them; with axis 2 they are axial, from the lowest up, anterior
            at the top, the patient's left at the left.
        voxel: its size in mm, left-right, posterior-anterior, up. The origin is the middle of the volume.
        axis: along which the slices were cut.
    """
    volume = np.moveaxis(np.rot90(slices, -1, axes=(1, 2)), 0, axis)
    affine = np.diag([*voxel, 1.0])
    affine[:3, 3] = -np.array(voxel) * (np.array(volume.shape) - 1) / 2
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(volume), affine), path)


def _load_volume(path: Path, axis: int) -> np.ndarray:
    """Reads a volume as (slices, H, W) uint8; see `VolumeStore` for orientation and grey levels."""
    try:
        volume = nibabel.as_closest_canonical(nibabel.load(path))
        voxels = np.asarray(volume.dataobj, dtype=np.float32)
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        raise archive.DataError(f"{path} cannot be read as a NIfTI volume ({error}); fetch it again.") from error
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3 or max(voxels.shape) > archive.MAX_SIDE:
        raise archive.DataError(f"{path} has the shape {voxels.shape}, but one three-dimensional volume is needed.")
    voxels = np.nan_to_num(voxels, nan=0.0, posinf=0.0, neginf=0.0)
    positive = voxels[voxels > 0]
    white = np.percentile(positive, WHITE) if positive.size else 1.0
    grey = np.rint(np.clip(voxels / white, 0.0, 1.0) * 255.0).astype(np.uint8)
    # (x, y, z) -> (slice, column, row) -> (slice, row, column) with the last axis, superior or anterior, upwards.
    return np.ascontiguousarray(np.rot90(np.moveaxis(grey, axis, 0), axes=(1, 2)))
