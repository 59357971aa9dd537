"""Archives: the bytes of named files in a zip or a folder, and whether they are pictures.

Nothing is ever extracted to disk. `ZipStore` reads the central directory once; after that an entry is one `pread` at
a known offset (plus an inflate where the entry is compressed), safe from many threads at once. `FolderStore` offers
the same for a folder (and `ldm.data.volumes.VolumeStore` for the slices of volumes). `probe` checks an encoded PNG or
JPEG without decoding it, so that a damaged file is named before a training starts and not by a decoder deep inside it.

Whatever is the user's mistake is raised as `DataError`.
"""

import contextlib
import gc
import hashlib
import os
import re
import struct
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
VOLUME_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh", ".hdr", ".dcm")  # .hdr: Analyze or NIfTI, beside an .img
MAX_ENTRY_BYTES = 64 * 2**20  # a slice is some 20 kB; an entry that declares more than this is an accident or an attack
MAX_TABLE_BYTES = 16 * 2**20  # a table of people has some bytes for each; more is an accident or an attack
MAX_SIDE = 8192  # pixels; checked in the header, before a decoder allocates width x height,
MAX_PIXELS = 2**25  # as is their product,
MAX_DECODED = 2**26  # and bytes in all channels
MAX_RATIO = 2000  # deflate cannot exceed ~1032 : 1, so anything beyond has a forged directory

# What a decoder has to be told about an image, as returned by `probe`.
GREY8, COLOUR8, ALPHA8, GREY16, COLOUR16, ALPHA16, JPEG, RAW = range(8)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"
JPEG_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")


class DataError(ValueError):
    """The user's mistake about data: one sentence that names the file, entry or flag, and the way out."""


def refuse_absent(paths, flag="--data") -> None:
    """Raises DataError for the first path that does not exist."""
    for path in paths:
        if not str(path):
            raise DataError(f"{flag} '' names nothing; give a zip, a folder of slices, or volumes.")
        if not Path(path).exists():
            raise DataError(f"{flag} {path} does not exist; give a zip, a folder of slices, or volumes.")
        if Path(path).is_fifo() or Path(path).is_socket():  # reading it would wait without end
            raise DataError(f"{flag} {path} is neither a file nor a folder; give a zip, or slices in a folder.")


@contextlib.contextmanager
def collector_paused():
    """A listing makes a million small objects that stay; looking for garbage among them takes 40 % of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def is_image(name: str) -> bool:
    """Whether an entry counts as a slice: an image suffix, and no hidden or resource-fork file (`._a.png`)."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not _is_hidden(name)


def is_volume(name: str) -> bool:
    """Whether an entry counts as a volume, likewise."""
    return name.lower().endswith(VOLUME_SUFFIXES) and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return "/." in name or name.startswith((".", "__MACOSX/"))


def is_table(name: str) -> bool:
    """Whether an entry is the table of people."""
    return name.rsplit("/", 1)[-1] == "labels.csv"


def _printable(name: str) -> str:
    """A name whose line ends, and other commands to a terminal, are written out, as \\x1b."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", name)


def _limit(name: str) -> float:
    """The most bytes that an entry may have."""
    return MAX_TABLE_BYTES if is_table(name) else MAX_ENTRY_BYTES if is_image(name) else float("inf")


def _kind(name: str) -> str:
    return "table of people" if is_table(name) else "brain slice"


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
                infos = archive.infolist()
                _check_count(archive.fp, len(infos))
                infos = [info for info in infos if not info.is_dir()]
        except (zipfile.BadZipFile, struct.error, UnicodeDecodeError, NotImplementedError) as error:
            raise DataError(
                f"{path} is not a readable zip file ({error}): it is damaged or incomplete, fetch it again."
            ) from error
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}).") from error
        # Of two entries with one name the later one counts, as it does for unzip.
        by_name = {_printable(info.filename.replace("\\", "/")): info for info in infos}
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
            if not (is_image(name) or is_table(name)):
                continue
            if info.flag_bits & 1:
                raise DataError(f"{self.path}: entry {name!r} is encrypted; unpack it and zip it without a password.")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(
                    f"{self.path}: entry {name!r} is packed with a method other than deflate; zip it again with the "
                    "default method."
                )
            if info.file_size > min(_limit(name), MAX_RATIO * info.compress_size + 1024):
                raise DataError(
                    f"{self.path}: entry {name!r} declares {info.file_size:,} bytes, which is no {_kind(name)} "
                    f"(limit {_limit(name):,}); remove it from the zip."
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
        header = self._pread(30, offset) if offset >= 0 else b""
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


def _check_count(file, listed: int) -> None:
    """Compares the directory of an open zip with its end record, which says how many entries there should be.

    Raises:
        BadZipFile: they differ, so that a part of the directory is lost.
    """
    file.seek(-min(file.seek(0, os.SEEK_END), 2**16 + 42), os.SEEK_END)  # the record, a comment, and what is before it
    tail = file.read()
    place = tail.rfind(b"PK\5\6")
    (count,) = struct.unpack_from("<H", tail, place + 10)
    if tail[max(place - 20, 0) : place][:4] != b"PK\6\7" and count != listed % 2**16:  # else another record says it
        raise zipfile.BadZipFile(f"its end says {count:,} entries, and it lists {listed:,}")


class FolderStore:
    """Files below a folder, under names relative to it (with `/` on every system), sorted.

    Attributes:
        path: the folder.
        names: every file's name; bytes that are not UTF-8 as \\xff, so that any name can be printed and written down.
        dangling: names of links that lead nowhere, as git-annex and DataLad keep what was not fetched.
    """

    def __init__(self, path: Path):
        self.path, self.dangling = path, []
        found = self._sizes()
        self._files = {self._spelt(name): name for name in found}
        sizes = {name: found[file] for name, file in self._files.items()}
        self.names = sorted(sizes)
        for name in self.names:
            if sizes[name] > _limit(name):
                raise DataError(
                    f"{path / name} holds {sizes[name]:,} bytes, which is no {_kind(name)} (limit {_limit(name):,}); "
                    "remove it from the folder."
                )

    @staticmethod
    def _spelt(name: str) -> str:
        return _printable(os.fsencode(name).decode("utf-8", "backslashreplace"))

    def _sizes(self) -> dict[str, int]:
        """File -> bytes. A folder is entered once, so that a link back to one above it is not followed."""
        sizes: dict[str, int] = {}
        entered = set()
        pending = [""]
        while pending:
            below = pending.pop()
            try:
                place = os.stat(self.path / below)
                if (place.st_dev, place.st_ino) in entered:
                    continue
                entered.add((place.st_dev, place.st_ino))
                items = sorted(os.scandir(self.path / below), key=lambda item: item.is_symlink())
                for item in items:
                    name = below + item.name
                    if item.is_dir():
                        pending.insert(0 if item.is_symlink() else len(pending), name + "/")  # links come last
                    elif item.is_file():
                        sizes[name] = item.stat().st_size
                    elif item.is_symlink():
                        self.dangling.append(self._spelt(name))
            except OSError as error:
                raise DataError(f"{self.path / below} cannot be read ({error.strerror}).") from error
        return sizes

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises DataError when it cannot be read."""
        try:
            return self.path_of(name).read_bytes()
        except OSError as error:
            raise DataError(f"{self.path / name} cannot be read ({error.strerror}).") from error

    def files(self) -> list[Path]:
        """The files on disk that the slices come from."""
        return [self.path_of(name) for name in self.names]

    def path_of(self, name: str) -> Path:
        """Where the file of a name lies."""
        return self.path / self._files[name]


def fingerprint(files: list[Path]) -> str:
    """SHA-256 of one file's bytes; of several, over their names and contents in the given order."""
    digest = hashlib.sha256()
    for path in files:
        if len(files) > 1:
            digest.update(os.fsencode(path.name) + b"\0")
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def probe(data: bytes) -> int:
    """Checks an encoded slice without decoding it: signature, dimensions, chunk checksums, end-of-file marker.

    Args:
        data: the bytes of a PNG or JPEG file.

    Returns:
        GREY8, COLOUR8, ALPHA8, GREY16, COLOUR16, ALPHA16 (PNG, by bit depth and colour type) or JPEG.

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
    _check_side(width, height, {0: 1, 4: 2, 6: 4}.get(colour, 3) * (1 + (depth == 16)))
    place = len(PNG_SIGNATURE)
    alpha = colour in (4, 6)
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
        alpha |= kind == b"tRNS"
        place = end
    if alpha:
        return ALPHA16 if depth == 16 else ALPHA8
    grey = colour == 0
    if depth == 16:
        return GREY16 if grey else COLOUR16
    return GREY8 if grey else COLOUR8


def _probe_jpeg(data: bytes) -> int:
    """Goes from marker to marker, to the end marker; some writers leave bytes behind it.

    A progressive JPEG comes in several scans, each of which says which bits of which coefficients it brings. One that
    was cut off between two of them is whole to a decoder, if blurred, but some coefficients lack their last bits.
    """
    place, framed, scanned = 2, False, False
    missing: dict[int, set[int]] = {}  # component of a progressive JPEG -> coefficients whose last bit has not come
    while True:
        # Between a scan and the next marker lie its pixels, in which FF 00 and FF D0 ... D7 are no markers.
        found = JPEG_MARKER.search(data, place) if scanned else JPEG_MARKER.match(data, place)
        if not found:
            break
        marker = found[1][0]
        if marker == 0xD9:
            if framed and scanned and not any(missing.values()):
                return JPEG
            break
        place = found.end()
        if place + 7 > len(data):
            break
        # Start-of-frame markers hold the dimensions: C0..CF, without the tables C4, C8 and CC.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, place + 3)
            channels = data[place + 7] if place + 7 < len(data) else 1
            _check_side(width, height, channels)
            if channels == 4:  # no decoder here turns these into grey
                raise ValueError("is a JPEG in the colours of printers (CMYK); save it in grey")
            framed = True
            if marker in (0xC2, 0xCA):  # progressive
                missing = {name: set(range(64)) for name in data[place + 8 : place + 8 + 3 * channels : 3]}
        if marker == 0xDA:
            scanned = True
            end = place + 3 + 2 * data[place + 2]
            first, last, bits = (*data[end : end + 3], 0, 0, 1)[:3]
            for name in data[place + 3 : end : 2] if bits & 15 == 0 else ():
                missing.get(name, set()).difference_update(range(first, last + 1))
        place += struct.unpack_from(">H", data, place)[0]
    raise ValueError("is a truncated or damaged JPEG")


def _check_side(width: int, height: int, channels: int) -> None:
    """Raises ValueError for too many pixels; `channels` in bytes for each."""
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise ValueError(f"declares {width} x {height} pixels (limit {MAX_SIDE} a side)")
    if width * height > MAX_PIXELS:
        raise ValueError(f"declares {width} x {height} pixels (limit {MAX_PIXELS:,} in all)")
    if width * height * channels > MAX_DECODED:
        raise ValueError(f"declares {width} x {height} pixels of {channels} bytes (limit {MAX_DECODED:,} bytes in all)")
