"""Archives: the bytes of named slices in a zip, a folder or NIfTI volumes, and what their names say.

Nothing is ever extracted to disk. `ZipStore` reads the central directory once; after that an entry is one `pread` at
a known offset (plus an inflate where the entry is compressed), safe from many threads at once. `FolderStore` offers
the same for a folder, `VolumeStore` for the slices of volumes. `probe` checks an encoded PNG or JPEG without decoding
it, so that a damaged file is named before a training starts and not by a decoder deep inside it.

What the names mean is here as well: which layout they follow (`parse_names`), who is in which split, and who is moved
into a split that the archive does not have (`carve`).

Whatever is the user's mistake is raised as `DataError`. Imports nothing of ours, and
no TensorFlow.
"""

import hashlib
import os
import re
import struct
import threading
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import nibabel
import numpy as np
from tqdm import tqdm

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
MAX_ENTRY_BYTES = 64 * 2**20  # a slice is some 20 kB; an entry that declares more than this is an accident or an attack
MAX_SIDE = 8192  # pixels; checked in the header, before a decoder allocates width x height
MAX_RATIO = 2000  # deflate cannot exceed ~1032 : 1, so anything beyond has a forged directory

VOLUME_SUFFIXES = (".nii", ".nii.gz")
VOLUME_WHITE = 99.8  # percentile of a volume's positive voxels that becomes white
VOLUME_DARK = 12  # grey levels up to this do not count as brain
VOLUME_MIN_AREA = 0.15  # slices with less brain than this part of the fullest slice are left out
VOLUME_MEMORY = 2**30  # bytes of decoded volumes that are kept

SPLITS = ("train", "validate", "test")
SPLIT_NAMES = {  # folder -> split
    "train": "train",
    "training": "train",
    "validate": "validate",
    "validation": "validate",
    "valid": "validate",
    "val": "validate",
    "test": "test",
    "testing": "test",
}
HELD_OUT = 0.15  # part of the people that a missing split is carved with

OASIS_FOLDER = re.compile(r"keras_png_slices_(seg_)?(train|validate|test)$")
MASK_NAME = re.compile(r"seg_.*_slice_\d+\.[^.]*(\.[^.]*)?$")
CASE_SLICE = re.compile(r"(?:case|seg)_(.+)_slice_(\d{1,9})$")
LAST_INTEGER = re.compile(r"(.*?)(\d+)(\D*)$")

# What a decoder has to be told about an image, as returned by `probe`.
GREY8, COLOUR8, GREY16, COLOUR16, JPEG, RAW = range(6)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"


class DataError(ValueError):
    """The user's mistake about data: one sentence that names the file, entry or flag, and the way out."""


def is_image(name: str) -> bool:
    """Whether an entry counts as a slice: an image suffix, and no hidden or resource-fork file (`._a.png`)."""
    return name.lower().endswith(IMAGE_SUFFIXES) and "/." not in name and not name.startswith((".", "__MACOSX/"))


class ZipStore:
    """Entries of a zip file, read in place.

    Attributes:
        path: the archive.
        names: every file's name as it stands in the archive, in archive order (folders left out).

    Raises:
        DataError: no zip file, a damaged one, an encrypted entry, an entry whose path leaves the archive, an entry
            that declares an absurd size, or a compression other than deflate.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                infos = [info for info in archive.infolist() if not info.is_dir()]
        except (zipfile.BadZipFile, struct.error, UnicodeDecodeError, NotImplementedError) as error:
            raise DataError(
                f"{path} is not a readable zip file ({error}): it is damaged or incomplete, fetch it again."
            ) from error
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}).") from error
        # Of two entries with one name the later one counts, as it does for unzip.
        by_name = {info.filename.replace("\\", "/"): info for info in infos}
        self.names, infos = list(by_name), list(by_name.values())
        self._check(infos)
        # Plain columns instead of 200,000 ZipInfo objects: a tenth of the memory.
        self._rows = {name: row for row, name in enumerate(self.names)}
        columns = ((i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type) for i in infos)
        self._table = np.fromiter(columns, dtype=np.dtype((np.int64, 5)), count=len(infos))
        self._file = open(path, "rb")  # open as long as the store lives
        self._lock = threading.Lock()

    def _check(self, infos: list[zipfile.ZipInfo]) -> None:
        for name, info in zip(self.names, infos, strict=True):
            if name.startswith("/") or name[1:3] == ":/" or (".." in name and ".." in name.split("/")):
                raise DataError(f"{self.path}: entry {name!r} points outside the archive; remove it from the zip.")
            if not is_image(name):
                continue
            if info.flag_bits & 1:
                raise DataError(f"{self.path}: entry {name!r} is encrypted; unpack it and zip it without a password.")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(
                    f"{self.path}: entry {name!r} is packed with a method other than deflate; zip it again with the "
                    "default method."
                )
            if info.file_size > MAX_ENTRY_BYTES or info.file_size > MAX_RATIO * info.compress_size + 1024:
                raise DataError(
                    f"{self.path}: entry {name!r} declares {info.file_size:,} bytes, which is no brain slice "
                    f"(limit {MAX_ENTRY_BYTES:,}); remove it from the zip."
                )

    def _pread(self, count: int, offset: int) -> bytes:
        if hasattr(os, "pread"):  # no shared file position, so threads need not wait for one another
            return os.pread(self._file.fileno(), count, offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.read(count)

    def read(self, name: str) -> bytes:
        """The bytes of one entry, checked against the size and CRC-32 that the archive's directory gives.

        Raises:
            DataError: the entry is missing, truncated or damaged.
        """
        if name not in self._rows:
            raise DataError(f"{self.path} has no entry {name!r}.")
        offset, packed, size, crc, method = self._table[self._rows[name]].tolist()
        header = self._pread(30, offset)
        data = None
        if len(header) == 30 and header[:4] == b"PK\x03\x04":
            # The local header's name and extra field may differ in length from the directory's: read them here.
            name_length, extra_length = struct.unpack_from("<HH", header, 26)
            data = self._pread(packed, offset + 30 + name_length + extra_length)
            if method == zipfile.ZIP_DEFLATED:
                try:
                    # The bound keeps an entry that lies about its size from filling the memory.
                    data = zlib.decompressobj(-15).decompress(data, size + 1)
                except zlib.error:
                    data = None
        if data is None or len(data) != size or zlib.crc32(data) != crc:
            raise DataError(f"{self.path}: entry {name!r} is damaged (size or checksum differ); fetch the zip again.")
        return data

    def files(self) -> list[Path]:
        """The files on disk that the slices come from."""
        return [self.path]


class FolderStore:
    """Files below a folder, under names relative to it (with `/` on every system), sorted.

    Attributes:
        path: the folder.
        names: every file's name.
    """

    def __init__(self, path: Path):
        self.path = path
        sizes: dict[str, int] = {}
        pending = [""]
        while pending:
            below = pending.pop()
            try:
                items = list(os.scandir(path / below))
            except OSError as error:
                raise DataError(f"{path / below} cannot be read ({error.strerror}).") from error
            for item in items:
                name = below + item.name
                if item.is_dir():
                    pending.append(name + "/")
                elif item.is_file():  # a dangling link is neither
                    sizes[name] = item.stat().st_size
        self.names = sorted(sizes)
        for name in self.names:
            if is_image(name) and sizes[name] > MAX_ENTRY_BYTES:
                raise DataError(
                    f"{path / name} holds {sizes[name]:,} bytes, which is no brain slice "
                    f"(limit {MAX_ENTRY_BYTES:,}); remove it from the folder."
                )

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises DataError when it cannot be read."""
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise DataError(f"{self.path / name} cannot be read ({error.strerror}).") from error

    def files(self) -> list[Path]:
        """The files on disk that the slices come from."""
        return [self.path / name for name in self.names]


class VolumeStore:
    """Slices of NIfTI volumes, as 8-bit grey levels.

    A volume is brought into RAS orientation, so that slices look alike whichever way it was stored: axial ones have
    anterior up and the patient's left at the left of the picture, as `numpy.rot90` of the array lays them. 0 and below
    becomes black, the VOLUME_WHITE-th percentile of the positive voxels white, one scale for the whole volume. Every
    volume is read once to find the slices that hold brain; later reads keep VOLUME_MEMORY bytes of volumes decoded.

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
            raise DataError(f"--axis {axis} does not exist; choose 0 (sagittal), 1 (coronal) or 2 (axial).")
        self.axis = axis
        self.slices: list[tuple[str, str, int]] = []
        self._places: dict[str, tuple[Path, int]] = {}
        self._volumes: OrderedDict[Path, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        for case, path in tqdm(_name_volumes(paths).items(), desc="volumes", delay=5, leave=False):
            area = (self._volume(path) > VOLUME_DARK).sum((1, 2))
            if not area.any():
                raise DataError(f"{path} is black: it holds no voxel above zero; remove it.")
            for z in np.flatnonzero(area >= VOLUME_MIN_AREA * area.max()).tolist():
                name = f"{path}#{z}"
                self.slices.append((name, case, z))
                self._places[name] = (path, z)
        self.names = list(self._places)

    def _volume(self, path: Path) -> np.ndarray:
        """(slices, H, W) uint8, from memory where possible."""
        with self._lock:  # a thread that waits for a volume another one is loading finds it afterwards
            if path not in self._volumes:
                self._volumes[path] = _load_volume(path, self.axis)
                while len(self._volumes) > 1 and sum(v.nbytes for v in self._volumes.values()) > VOLUME_MEMORY:
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
        raise DataError("--data names the same volume twice; give every person's volume once.")
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
        raise DataError(f"{path} cannot be read as a NIfTI volume ({error}); fetch it again.") from error
    while voxels.ndim > 3 and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    if voxels.ndim != 3 or max(voxels.shape) > MAX_SIDE:
        raise DataError(f"{path} has the shape {voxels.shape}, but one three-dimensional volume is needed.")
    voxels = np.nan_to_num(voxels, nan=0.0, posinf=0.0, neginf=0.0)
    positive = voxels[voxels > 0]
    white = np.percentile(positive, VOLUME_WHITE) if positive.size else 1.0
    grey = np.rint(np.clip(voxels / white, 0.0, 1.0) * 255.0).astype(np.uint8)
    # (x, y, z) -> (slice, column, row) -> (slice, row, column) with the last axis, superior or anterior, upwards.
    return np.ascontiguousarray(np.rot90(np.moveaxis(grey, axis, 0), axes=(1, 2)))


def fingerprint(files: list[Path]) -> str:
    """SHA-256 of one file's bytes; of several, over their names and contents in the given order."""
    digest = hashlib.sha256()
    for path in files:
        if len(files) > 1:
            digest.update(path.name.encode() + b"\0")
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def probe(data: bytes) -> int:
    """Checks an encoded slice without decoding it: signature, dimensions, chunk checksums, end-of-file marker.

    Args:
        data: the bytes of a PNG or JPEG file.

    Returns:
        GREY8, COLOUR8, GREY16, COLOUR16 (PNG, by bit depth and colour type) or JPEG.

    Raises:
        ValueError: with a fragment ("is truncated", ...) that the caller puts behind the entry's name.
    """
    if data.startswith(PNG_SIGNATURE):
        return _probe_png(data)
    if data.startswith(JPEG_SIGNATURE):
        return _probe_jpeg(data)
    raise ValueError("is empty" if not data else "is neither a PNG nor a JPEG image")


def _probe_png(data: bytes) -> int:
    if len(data) < 33 or data[12:16] != b"IHDR":
        raise ValueError("is a truncated PNG")
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    _check_side(width, height)
    place = len(PNG_SIGNATURE)
    while True:
        if place + 12 > len(data):
            raise ValueError("is a truncated PNG")
        (length,) = struct.unpack_from(">I", data, place)
        end = place + 12 + length
        if end > len(data):
            raise ValueError("is a truncated PNG")
        kind = data[place + 4 : place + 8]
        if zlib.crc32(memoryview(data)[place + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise ValueError("is a damaged PNG (a chunk's checksum differs)")
        if kind == b"IEND":
            break
        place = end
    grey = colour in (0, 4)  # grey, grey with alpha
    if depth == 16:
        return GREY16 if grey else COLOUR16
    return GREY8 if grey else COLOUR8


def _probe_jpeg(data: bytes) -> int:
    place = 2
    while place + 9 < len(data):
        marker = data[place + 1]
        if data[place] != 0xFF:
            break
        if marker == 0xFF:  # padding
            place += 1
            continue
        # Start-of-frame markers hold the dimensions: C0..CF, without the tables C4, C8 and CC.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, place + 5)
            _check_side(width, height)
            # Some writers leave bytes behind the end marker.
            if b"\xff\xd9" not in data[-64:]:
                raise ValueError("is a truncated JPEG")
            return JPEG
        place += 2 + struct.unpack_from(">H", data, place + 2)[0]
    raise ValueError("is a truncated or damaged JPEG")


def _check_side(width: int, height: int) -> None:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise ValueError(f"declares {width} x {height} pixels (limit {MAX_SIDE} a side)")


# ---------------------------------------------------------------------------------------------------------------------
# Names: who is in an archive
# ---------------------------------------------------------------------------------------------------------------------


def _case_and_slice(name: str) -> tuple[str, int]:
    """Reads person and slice index out of a file name.

    `case_001_slice_10.nii.png` -> ("001", 10); `200000_78.jpeg` -> ("200000", 78); `ann-t1-s7.png` -> ("ann-t1-s", 7);
    a name without an integer is a person of its own, slice 0.
    """
    stem = name.rsplit("/", 1)[-1].rsplit(".", 1)[0].removesuffix(".nii")
    found = CASE_SLICE.search(stem)
    if found:
        return found[1], int(found[2])
    found = LAST_INTEGER.match(stem)
    if not found or len(found[2]) > 9:  # ten digits and more are dates or identifiers, not slice indices
        return stem, 0
    return (found[1] + found[3]).strip("_-. "), int(found[2])


def parse_names(names: list[str], shown: str):
    """Recognises the layout of a zip or folder from its names alone. Returns kind, rows, masks."""
    folders: dict[str, list[str]] = {}  # a layout shows in its folders, which are few however many slices there are
    for name in names:
        if is_image(name):
            folders.setdefault(name.rpartition("/")[0], []).append(name)
    found = {folder: OASIS_FOLDER.search(folder) for folder in folders}
    pairs = {folder: folder.split("/")[-2:] for folder in folders if folder}
    straight = any(pair[-1].lower() in SPLIT_NAMES for pair in pairs.values())  # train/a_1.png: no class folder
    in_split = any(pair[0].lower() in SPLIT_NAMES for pair in pairs.values())
    kind = "class folders" if not straight and (in_split or len(folders) > 1) else "flat"
    if any(found.values()):
        kind = "oasis"
    rows, masks = [], []
    for folder, members in folders.items():
        split, label = "", ""
        if kind == "oasis":
            if not found[folder]:  # previews and the like beside the slices
                continue
            split = found[folder][2]
        elif folder:
            split = SPLIT_NAMES.get(pairs[folder][-1 if straight else 0].lower(), "")
            label = pairs[folder][-1] if kind == "class folders" else ""
        for name in members:
            mask = found[folder][1] if kind == "oasis" else MASK_NAME.match(name.rpartition("/")[2])
            (masks if mask else rows).append((name, split, *_case_and_slice(name), label))
    if not rows and masks:
        raise DataError(
            f"--data {shown} holds segmentation masks only (such as {masks[0][0]!r}); point --data at the archive with "
            "the brain slices (keras_png_slices_train, ...)."
        )
    if not rows:
        hint = "expected are PNG or JPEG files, or a folder of NIfTI volumes"
        inner = next((name for name in names if name.lower().endswith((".zip", *VOLUME_SUFFIXES))), None)
        if inner:
            hint = f"point --data at {inner!r} inside it (unpacked, where it lies in a zip)"
        raise DataError(f"--data {shown} holds no brain slices; {hint}.")
    return kind, rows, masks


def number_cases(names) -> dict[str, int]:
    """Person's name -> number: the name itself where all are integers, else the place in sorted order."""
    names = sorted(set(names))
    if all(name.isdecimal() and int(name) < 2**31 for name in names):
        return {name: int(name) for name in names}
    return {name: place for place, name in enumerate(names)}


def check_people(shown: str, entries: list[str], split: np.ndarray, case: np.ndarray) -> None:
    """A person in two splits would let a model be tested on a brain that it was trained on."""
    moved = np.flatnonzero((case[1:] == case[:-1]) & (split[1:] != split[:-1]))
    if len(moved):
        first, second = moved[0], moved[0] + 1
        raise DataError(
            f"--data {shown}: case {case[first]} is in two splits ({entries[first]!r} and {entries[second]!r}); keep "
            "every person in one split only."
        )


def carve(shown: str, split: np.ndarray, case: np.ndarray, label: np.ndarray, seed: int):
    """Fills in missing splits, by person. Returns split (N,) and split -> how it was made."""
    split = np.where(split == "", "train", split)
    made = {name: "archive" if name in split else "missing" for name in SPLITS}
    missing = [name for name in ("test", "validate") if name not in split]
    if not missing or "train" not in split:
        return split, made
    cases, first = np.unique(case[split == "train"], return_index=True)
    if len(cases) < 2 and "validate" in missing:
        raise DataError(
            f"--data {shown} holds one person only ({case[0]}), but training and validation need two people at least; "
            "add another (names such as case_002_slice_0.png or 002_0.png tell people apart)."
        )
    people = _interleave(cases, label[split == "train"][first], np.random.default_rng(seed))
    for name in missing:
        # Training keeps one person, and validation, which is carved after the test split, gets one before it does.
        spare = len(people) - 1 - ("validate" in missing and name == "test")
        count = min(max(1, round(HELD_OUT * len(people))), spare)
        split = np.where(np.isin(case, people[:count]), name, split)
        people = people[count:]
        made[name] = f"carved by case, seed {seed}"
    return split, made


def _interleave(cases: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shuffles people such that every stretch of the result has the labels in about the proportion of the whole."""
    order = rng.permutation(len(cases))
    cases, labels = cases[order], labels[order]
    place = np.empty(len(cases))
    for label in np.unique(labels):
        member = labels == label
        place[member] = (np.arange(member.sum()) + 0.5) / member.sum()
    return cases[np.argsort(place, kind="stable")]
