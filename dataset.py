"""Slices in: a zip, a folder, class folders or NIfTI volumes -> a table of slices -> batches for training.

What lives here: which person, slice index, label and split every entry of an archive belongs to (`open_source`), the
`tf.data` pipeline that reads and decodes them (`make_dataset`), and the command line that writes phantom brains in the
same layout. How bytes come out of a zip, and what names in it mean, is `ldm.data.archive`; resizing and augmentation
are `ldm.data.transforms`.

    source = open_source("dataset/oasis.zip")
    for batch in make_dataset(source, "train", image_size=128, batch_size=32, training=True):
        batch["image"]  # (32, 128, 128, 1) float32 in [-1, 1], background exactly -1

Three promises. A person is in one split only, never two. Nothing is extracted to disk. Element number n of a training
stream is a pure function of (seed, n): whoever skips the first k batches sees what an unbroken run would have seen.

    python dataset.py phantom --people 128 --out dataset/phantom.zip
    python dataset.py describe dataset/oasis.zip
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import io
import json
import os
import re
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image
from tqdm import tqdm

from ldm import tissue
from ldm.data import archive, phantom, table, transforms
from ldm.data.archive import SPLITS, DataError

CHECK_ALL = 20_000  # archives up to this many slices are checked whole when opened,
CHECK_SAMPLE = 2_000  # larger ones by a seeded sample of this many; the rest is checked as it is read
BOX_SAMPLE = 4_000  # so many training slices tell where brains lie
HASH_BYTES = 200 * 10**6
JPEG_NOISE = 8  # grey levels up to this are compression noise around the head: black, as in the PNGs
DEEP_WHITE = 99.9  # percentile of a 16-bit slice's non-zero pixels that becomes white


@dataclasses.dataclass(eq=False)
class Source:
    """A table of slices, sorted by (case, z), and the store that their bytes come from.

    Attributes:
        path: what was opened, as it was given.
        kind: "oasis", "class folders", "flat" or "volumes".
        store: offers `read(name) -> bytes`.
        seed: what missing splits were carved with.
        entries: N names.
        split: (N,) str, one of SPLITS.
        z: (N,) int32 slice index.
        label: (N,) int32 index into `label_names`, -1 = unknown.
        case: (N,) int32 person.
        label_names: sorted.
        covariates: what a table says of people, column -> {person: text} (see `ldm.data.table`).
        case_names: case -> the name that it has in the archive.
        masks: entry -> entry of its mask, read with `store.read`; may be empty.
        made: split -> "archive" or "carved by case, seed S".
    """

    path: str
    kind: str
    store: object = dataclasses.field(repr=False)
    seed: int
    entries: list[str] = dataclasses.field(repr=False)
    split: np.ndarray = dataclasses.field(repr=False)
    z: np.ndarray = dataclasses.field(repr=False)
    label: np.ndarray = dataclasses.field(repr=False)
    case: np.ndarray = dataclasses.field(repr=False)
    label_names: tuple[str, ...]
    case_names: dict[int, str] = dataclasses.field(repr=False)
    masks: dict[str, str] = dataclasses.field(repr=False)
    made: dict[str, str]
    covariates: dict[str, dict] = dataclasses.field(default_factory=dict, repr=False)
    _decoded: dict = dataclasses.field(default_factory=dict, repr=False)

    def columns(self, names=None) -> dict[str, dict]:
        """What kind of fact each column of the table holds, all of them or those named (see
        `ldm.data.table.describe`).
        """
        train = {table.person(self.case_names[case]) for case in np.unique(self.case[self.split == "train"]).tolist()}
        return {
            name: table.describe(self.covariates[name], train) for name in (self.covariates if names is None else names)
        }

    def with_labels_of(self, names) -> "Source":
        """The same slices with labels numbered as a run numbers them, which knows these names; as is, if it knows none.

        Raises:
            DataError: a slice has a label that the run does not know.
        """
        if not names or self.label_names == tuple(names):
            return self
        found = {self.label_names[i] for i in np.unique(self.label).tolist() if i >= 0}
        if foreign := sorted(found - set(names)):
            raise DataError(
                f"--data {self.path}: slices are labelled {foreign[0]}, and this run knows {' and '.join(names)}; "
                "rename the label."
            )
        number = np.array([*(names.index(name) if name in names else -1 for name in self.label_names), -1], "int32")
        return dataclasses.replace(self, label=number[self.label], label_names=tuple(names), _decoded={})

    def select(self, split: str) -> np.ndarray:
        """Row numbers of one split, ascending, (n,) int64.

        Raises:
            DataError: an unknown split, or one without slices.
        """
        if split not in SPLITS:
            raise DataError(f"there is no split {split!r}: choose one of {', '.join(SPLITS)}.")
        rows = np.flatnonzero(self.split == split)
        if not len(rows):
            people = len(np.unique(self.case))
            raise DataError(
                f"--data {self.path}: the {split} split is empty ({people} people in all); add people to that split "
                "or point --data at an archive that has more of them."
            )
        return rows

    def check(self) -> None:
        """Reads the slices without decoding them: checksums, signature, dimensions, end-of-file marker.

        Archives of more than CHECK_ALL slices are checked by a seeded sample; what is not looked at here is looked at
        when it is read.

        Raises:
            DataError: names the first entry that is no image, truncated, damaged or absurdly large.
        """
        if self.kind == "volumes":  # opening them has read every voxel
            return
        entries = self.entries
        if len(entries) > CHECK_ALL:
            sample = np.random.default_rng(self.seed).choice(len(entries), CHECK_SAMPLE, replace=False)
            entries = [entries[row] for row in np.sort(sample)]
        for name in entries:
            self.read(name)

    def read(self, name: str) -> tuple[bytes, int]:
        """The bytes of one slice and what a decoder has to know about them (GREY8, ..., JPEG, RAW of
        `ldm.data.archive`).

        Raises:
            DataError: names the entry that is damaged.
        """
        data = self.store.read(name)
        if self.kind == "volumes":
            return data, archive.RAW
        try:
            return data, archive.probe(data)
        except ValueError as error:
            raise DataError(f"{self.path}: {name!r} {error}; replace it or remove it.") from error

    def manifest(self) -> dict:
        """What a run writes down about its data, ready for `json.dump`."""
        splits = {}
        for split in SPLITS:
            chosen = self.split == split
            cases = np.unique(self.case[chosen])
            splits[split] = {
                "people": len(cases),
                "images": int(chosen.sum()),
                "cases": [self.case_names[case] for case in cases.tolist()],
                "made": self.made[split],
            }
        files = self.store.files()
        size = sum(path.stat().st_size for path in files)
        modified = max(path.stat().st_mtime for path in files)
        return {
            "source": self.path,
            "kind": self.kind,
            "bytes": size,
            "modified": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(modified)),
            "sha256": archive.fingerprint(files) if size < HASH_BYTES else None,
            "seed": self.seed,
            "axis": getattr(self.store, "axis", None),
            "images": len(self.entries),
            "masks": len(self.masks),
            "labels": list(self.label_names),
            "z": [int(self.z.min()), int(self.z.max())],
            "splits": splits,
        }


# ---------------------------------------------------------------------------------------------------------------------
# Opening: names -> table
# ---------------------------------------------------------------------------------------------------------------------


def open_source(data, seed: int = 0, axis: int = 2, check: bool = True, labels=None) -> Source:
    """Reads the listing of an archive and says who is in it; no slice is decoded.

    Args:
        data: a path, or a list of paths to volumes. Understood are, as a zip or as a folder: the OASIS course layout
            (`keras_png_slices_{train,validate,test}/case_001_slice_0.nii.png`, with or without a folder around it,
            masks in `keras_png_slices_seg_*`, a table `labels.csv` with columns case, label, ...); the ADNI course
            layout (`{train,test}/<label>/<scan>_<slice>.jpeg`); one flat folder of PNG or JPEG. And NIfTI volumes,
            or a folder of them. Hidden files and files of other types are passed over.
        seed: decides who goes into a split that the archive does not have.
        axis: of NIfTI volumes in RAS orientation: 0 sagittal, 1 coronal, 2 axial.
        check: look at the bytes of the slices (see `Source.check`).
        labels: path of a table like `labels.csv` that takes its place.

    Returns:
        A `Source`. Splits are by person: those of the archive are kept, a missing test split takes about 15 % of the
        training people, a missing validate split about 15 % of the remaining ones.

    Raises:
        DataError: one sentence for each thing that can be wrong with the data.
    """
    if isinstance(data, Source):
        return data
    _check_seed(seed)
    paths = [Path(item) for item in ([data] if isinstance(data, (str, os.PathLike)) else data)]
    shown = ", ".join(str(path) for path in paths)
    if not paths:
        raise DataError("--data names no file: give a zip, a folder or NIfTI volumes.")
    with _collector_paused():
        store, kind, rows, masks = _read_listing(paths, shown, axis)
        source = _make_table(shown, kind, store, rows, masks, seed, labels)
    if check:
        source.check()
    return source


def open_recorded(about: dict, data=None) -> Source:
    """The data that a run was trained on, or other data read in the same way.

    Args:
        about: what the run wrote down of one of its stages.
        data: other data; its labels are those that it brings along.
    """
    settings = about["settings"]
    own = settings["data"] or about["data"]["source"]
    named = data[0] if isinstance(data, list) and len(data) == 1 else data
    labels = settings.get("labels") if data is None or named == own else None
    data = data or own
    return open_source(data, seed=settings["seed"], axis=settings["axis"], labels=labels)


@contextlib.contextmanager
def _collector_paused():
    """A listing makes a million small objects that stay; looking for garbage among them takes 40 % of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise DataError(f"--seed {seed} is negative; give 0 or more.")


def _read_listing(paths: list[Path], shown: str, axis: int):
    """Finds out what kind of data the paths are.

    Returns:
        store, kind, rows, masks: rows are (entry, split or "", case name, z, label name or ""), masks likewise.
    """
    for path in paths:
        if not path.exists():
            raise DataError(f"--data {path} does not exist; give a zip, a folder of slices or NIfTI volumes.")
    path = paths[0]
    volumes = [item for item in paths if item.name.lower().endswith(archive.VOLUME_SUFFIXES)]
    if path.is_dir() and len(paths) == 1:
        store = archive.FolderStore(path)
        volumes = [path / name for name in store.names if name.lower().endswith(archive.VOLUME_SUFFIXES)]
        if volumes and any(map(archive.is_image, store.names)):
            raise DataError(
                f"--data {path} holds NIfTI volumes and PNG or JPEG files; keep the two in separate folders."
            )
        if not volumes:
            return store, *archive.parse_names(store.names, shown)
    elif len(volumes) != len(paths):
        if len(paths) > 1:
            raise DataError(f"--data takes one zip or folder, or several NIfTI volumes, but not a mixture: {shown}.")
        if path.suffix.lower() != ".zip":
            raise DataError(f"--data {path} has an unsupported suffix; give a .zip, a folder, .nii or .nii.gz.")
        store = archive.ZipStore(path)
        return store, *archive.parse_names(store.names, shown)
    store = archive.VolumeStore(volumes, axis)
    return store, "volumes", [(name, "", case, z, "") for name, case, z in store.slices], []


def _make_table(shown: str, kind: str, store, rows: list, masks: list, seed: int, labels_file=None) -> Source:
    """Numbers people and labels, gives everybody a split, sorts by (case, z)."""
    entries, splits, case_names, z, label_names = zip(*rows, strict=True)
    numbers = archive.number_cases(case_names)
    case = np.array([numbers[name] for name in case_names], np.int32)
    z = np.array(z, np.int32)
    labels = tuple(sorted(set(label_names) - {""}))
    label = np.array([labels.index(name) if name else -1 for name in label_names], np.int32)
    told = _read_table(store, labels_file, case_names)
    written = told.pop("label", None)
    if written is not None and kind == "class folders" and labels_file is not None:
        raise DataError(f"--labels {labels_file}: the folders of {shown} are its labels; take the column label out.")
    if written is not None and kind != "class folders":
        labels = tuple(sorted(set(written.values())))  # of all rows, so that a part of the people has the same labels
        known = {name: labels.index(written[table.person(name)]) for name in numbers if table.person(name) in written}
        label = np.array([known.get(name, -1) for name in case_names], np.int32)
    order = np.lexsort((z, case))
    entries = [entries[row] for row in order]
    split = np.array(splits, dtype="U8")[order]
    case, z, label = case[order], z[order], label[order]
    archive.check_people(shown, entries, split, case)
    split, made = archive.carve(shown, split, case, label, seed)
    keys = zip(case.tolist(), z.tolist(), strict=True)
    mask_of = {(numbers.get(name), index): entry for entry, _, name, index, _ in masks}
    return Source(
        path=shown,
        kind=kind,
        store=store,
        seed=seed,
        entries=entries,
        split=split,
        z=z,
        label=label,
        case=case,
        label_names=labels,
        case_names={number: name for name, number in numbers.items()},
        masks={entry: mask_of[key] for entry, key in zip(entries, keys, strict=True) if key in mask_of},
        made=made,
        covariates=told,
    )


def _read_table(store, path, case_names) -> dict[str, dict]:
    """Column -> {person: what it says}, of the table named, else of `labels.csv` in the archive; {} without any.

    Raises:
        DataError: naming the table.
    """
    inside = [name for name in getattr(store, "names", []) if name.rsplit("/", 1)[-1] == "labels.csv"]
    if path is None and not inside:
        return {}
    shown = f"{store.path}: {inside[0]!r}" if path is None else f"--labels {path}"
    try:
        found = table.read(store.read(inside[0]) if path is None else Path(path).read_bytes())
    except (ValueError, OSError) as error:
        raise DataError(
            f"{shown} {error if isinstance(error, ValueError) else 'cannot be read: ' + error.strerror}."
        ) from error
    people = {table.person(name) for name in case_names}
    if path is not None and not any(people & set(column) for column in found.values()):
        some = ", ".join(sorted(set(case_names))[:3])
        raise DataError(f"{shown} names nobody of this data, whose cases are called {some}, ...")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Reading: rows of the table -> pixels
# ---------------------------------------------------------------------------------------------------------------------


def _decode(data, code, shape):
    """One encoded slice -> (H, W, 1) uint8 grey levels.

    8-bit files keep their levels. In 16-bit files the DEEP_WHITE-th percentile of the non-zero pixels becomes white, as
    nothing in the file says what its largest value means. In JPEGs levels up to JPEG_NOISE become black.
    """

    def grey(image):  # integer weights with the sum 256, so that grey stored as colour comes back exactly
        return tf.reduce_sum(tf.cast(image, tf.float32) * [77.0, 150.0, 29.0], axis=-1, keepdims=True) / 256.0

    def eight_bit(image):
        return tf.cast(tf.round(image), tf.uint8)

    def deep(image):
        positive = tf.sort(tf.boolean_mask(image, image > 0))
        last = tf.cast(tf.shape(positive)[0] - 1, tf.float32)
        white = tf.concat([positive, [1.0]], 0)[tf.cast(tf.round(tf.maximum(last, 0.0) * DEEP_WHITE / 100), tf.int32)]
        return eight_bit(tf.minimum(image * (255.0 / white), 255.0))

    def jpeg():
        image = tf.io.decode_jpeg(data, channels=1, dct_method="INTEGER_ACCURATE")
        return tf.where(image <= JPEG_NOISE, tf.zeros_like(image), image)

    return tf.switch_case(
        code,
        {
            archive.GREY8: lambda: tf.io.decode_png(data, channels=1),
            archive.COLOUR8: lambda: eight_bit(grey(tf.io.decode_png(data, channels=3))),
            archive.GREY16: lambda: deep(tf.cast(tf.io.decode_png(data, channels=1, dtype=tf.uint16), tf.float32)),
            archive.COLOUR16: lambda: deep(grey(tf.io.decode_png(data, channels=3, dtype=tf.uint16))),
            archive.JPEG: jpeg,
            archive.RAW: lambda: tf.reshape(tf.io.decode_raw(data, tf.uint8), [shape[0], shape[1], 1]),
        },
    )


def _read_pixels(source: Source, rows: tf.data.Dataset, size: int, batch_size: int) -> tf.data.Dataset:
    """Batches of row numbers (B,) -> batches of pixels (B, size, size, 1) uint8, in the same order.

    Bytes are fetched a batch at a time in Python (a pread each, which needs little of the interpreter); decoding and
    resizing run in C++, one slice per thread.
    """

    def fetch(rows):
        entries = [source.entries[row] for row in rows]
        data, codes = zip(*map(source.read, entries), strict=True)
        shapes = [source.store.shape(entry) if source.kind == "volumes" else (0, 0) for entry in entries]
        return np.array(data, dtype=object), np.array(codes, np.int32), np.array(shapes, np.int32)

    def fetch_op(rows):
        data, codes, shapes = tf.numpy_function(fetch, [rows], (tf.string, tf.int32, tf.int32))
        return tf.ensure_shape(data, [None]), tf.ensure_shape(codes, [None]), tf.ensure_shape(shapes, [None, 2])

    slices = rows.map(fetch_op, num_parallel_calls=2).unbatch()
    pixels = slices.map(lambda *item: transforms.fit(_decode(*item), size), num_parallel_calls=tf.data.AUTOTUNE)
    return pixels.batch(batch_size)


def _decoded(source: Source, split: str, size: int, budget: int) -> np.ndarray | None:
    """All slices of a split as (n, size, size, 1) uint8, in table order; None when they exceed the budget in bytes."""
    rows = source.select(split)
    if len(rows) * size * size > budget:
        return None
    if (split, size) not in source._decoded:
        pixels = np.empty((len(rows), size, size, 1), np.uint8)
        batches = _read_pixels(source, tf.data.Dataset.from_tensor_slices(rows).batch(64), size, 64).prefetch(4)
        place = 0
        with data_errors(source), tqdm(total=len(rows), desc=f"{split} slices", delay=5, leave=False) as bar:
            for batch in batches.as_numpy_iterator():
                pixels[place : place + len(batch)] = batch
                place += len(batch)
                bar.update(len(batch))
        source._decoded[split, size] = pixels
    return source._decoded[split, size]


def _read_mask(source: Source, row: int, size: int) -> np.ndarray:
    """The tissue classes of one slice, (size, size) int8 as in `make_dataset`; -1 throughout where it has no mask.

    Each class is fitted to the square as its slice is, with Pillow's antialiased triangle filter, which is that of
    `transforms.fit`; a pixel belongs to the class that covers most of it, the first of two that cover half each.

    Raises:
        DataError: names the mask that is damaged, or not an 8-bit grey PNG of tissue.LEVELS.
    """
    entry = source.masks.get(source.entries[row])
    if entry is None:
        return np.full((size, size), -1, np.int8)
    data, code = source.read(entry)
    return _tissue(data, code, size, f"{source.path}: {entry!r}")


def read_mask(path, size: int) -> np.ndarray:
    """The tissue mask in a file, as the archive's are: (size, size) int8 classes.

    Raises:
        DataError: names the file that is none.
    """
    try:
        data = Path(path).read_bytes()
        code = archive.probe(data)
    except (OSError, ValueError) as error:
        raise DataError(f"--mask {path} cannot be read as a picture ({error}).") from error
    return _tissue(data, code, size, f"--mask {path}")


def _tissue(data: bytes, code: int, size: int, shown: str) -> np.ndarray:
    """An encoded mask, padded to a square and resized, class by class."""
    try:
        levels = np.asarray(Image.open(io.BytesIO(data)))
    except (OSError, SyntaxError) as error:  # Pillow's ways to say that a PNG is broken
        raise DataError(f"{shown} cannot be decoded; replace it or remove it.") from error
    if code != archive.GREY8 or levels.ndim != 2 or not np.isin(levels, tissue.LEVELS).all():
        raise DataError(
            f"{shown} is no tissue mask: it must be an 8-bit grey PNG with the levels "
            f"{', '.join(map(str, tissue.LEVELS))} for background, CSF, grey and white matter; mend it or do without."
        )
    side = max(levels.shape)
    square = np.zeros((side, side), np.uint8)
    top, left = ((side - length) // 2 for length in levels.shape)
    square[top : top + levels.shape[0], left : left + levels.shape[1]] = levels
    cover = [Image.fromarray((square == level).astype(np.float32)) for level in tissue.LEVELS]
    return np.argmax([image.resize((size, size), Image.Resampling.BILINEAR) for image in cover], axis=0).astype(np.int8)


def _masks(source: Source, split: str, size: int, budget: int):
    """A function: places within the split (B,) -> classes (B, size, size) int32. Read at once if the budget allows."""
    rows = source.select(split)
    if not source.masks:
        raise DataError(
            f"{source.path} has no tissue masks: do without, or use an archive with keras_png_slices_seg_* folders."
        )
    if len(rows) * size * size > budget:
        return lambda places: np.stack([_read_mask(source, rows[place], size) for place in places]).astype(np.int32)
    key = (f"{split} masks", size)
    if key not in source._decoded:
        source._decoded[key] = np.stack([_read_mask(source, row, size) for row in tqdm(rows, desc=key[0], delay=5)])
    return lambda places: source._decoded[key][places].astype(np.int32)


def brain_box(source: Source, size: int, step: int) -> list[int] | None:
    """The part of the pictures that is not black in all training slices, with a little room around it for augmentation.

    Args:
        source: of the slices; of a training split larger than BOX_SAMPLE, so many of them are looked at, evenly spread.
        size: side of the pictures in pixels.
        step: the window's sides are multiples of this.

    Returns:
        [top, left, height, width] in pixels; None where that is the whole picture.
    """
    rows = source.select("train")
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), BOX_SAMPLE)).astype(int)]
    seen = np.zeros((size, size), np.uint8)
    with data_errors(source):
        batches = _read_pixels(source, tf.data.Dataset.from_tensor_slices(rows).batch(64), size, 64)
        for batch in batches.as_numpy_iterator():
            seen = np.maximum(seen, batch.max(axis=0)[..., 0])
    window = []
    for axis in (1, 0):
        filled = np.flatnonzero(seen.max(axis=axis))
        first, last = (filled[0], filled[-1] + 1) if len(filled) else (0, size)
        room = size // 40  # `modules.Autoencoder.pad` counts on it
        length = min(-(-(last - first + 2 * room) // step) * step, size)
        window.append((int(np.clip((first + last - length) // 2, 0, size - length)), int(length)))
    (top, height), (left, width) = window
    return None if height == width == size else [top, left, height, width]


@contextlib.contextmanager
def data_errors(source: Source | None = None):
    """Turns what a damaged slice raises inside `tf.data` back into the DataError that names it.

        with data_errors(source):
            model.fit(make_dataset(source, ...))

    Args:
        source: when given, a decoder's own complaint, which names no entry, is traced by decoding slice after slice.

    Raises:
        DataError: instead of the `tf.errors.OpError` around it; other errors pass unchanged.
    """
    try:
        yield
    except tf.errors.OpError as error:
        found = re.search(r"DataError: (.+)", error.message)
        if found:
            raise DataError(found[1]) from error
        if source is not None and re.search(r"PNG|JPEG|decode", error.message):
            for name in source.entries:
                data, code = source.read(name)
                try:
                    _decode(data, tf.constant(code), (0, 0))
                except tf.errors.OpError as inner:
                    raise DataError(f"{source.path}: {name!r} cannot be decoded; replace it or remove it.") from inner
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


def make_dataset(
    source,
    split: str,
    image_size: int,
    batch_size: int,
    training: bool,
    *,
    seed: int = 0,
    start_step: int = 0,
    augment: float = 1.0,
    flip: bool = False,
    masks: bool = False,
    cache_bytes: int = 2 * 2**30,
) -> tf.data.Dataset:
    """Batches of slices, in an order and with pixels that depend on the arguments only.

    Args:
        source: a `Source`, or anything `open_source` takes.
        split: "train", "validate" or "test".
        image_size: S, the side of the pictures in pixels. Slices are padded to a square with black, then resized.
        batch_size: B, over all replicas.
        training: True: an endless stream of full batches, each epoch in a fresh order without replacement, augmented.
            A batch may straddle two epochs. False: one pass in table order (by case, then z), as is; the last batch
            may be smaller.
        seed: of order and augmentation. Element n of the training stream is a function of (seed, n) alone.
        start_step: batches to skip; nothing is read for them.
        augment: how strongly training slices are augmented, 0 = not at all (`strength` of
        `ldm.data.transforms.augment`).
        flip: whether they are mirrored left to right at random, too.
        masks: whether tissue masks come along.
        cache_bytes: a split that fits into this at one byte per pixel is decoded at once and kept in memory (so are its
            masks, as much again); a larger one is read from the archive again every epoch. The batches are the same
            either way.

    Returns:
        Dataset of {"image": (B, S, S, 1) float32 in [-1, 1] with background exactly -1, "z": (B,) int32,
        "label": (B,) int32, -1 = unknown, "case": (B,) int32}; with masks also "mask": (B, S, S) int32, 0 background,
        1 CSF, 2 grey matter, 3 white matter, and -1 throughout for a slice without a mask. Replica r of R under
        `experimental_distribute_dataset` gets the r-th part of every batch.

    Raises:
        DataError: an empty split, a slice that cannot be decoded, or masks where there are none. What shows only while
            a split larger than `cache_bytes` is read comes out of the iteration: put `data_errors(source)` around it.
    """
    _check_seed(seed)
    source = open_source(source, seed)
    rows = source.select(split)
    if image_size < 1 or batch_size < 1:
        raise DataError("--image-size and --batch-size must be positive integers.")
    classes = _masks(source, split, image_size, cache_bytes) if masks else None
    pixels = _decoded(source, split, image_size, cache_bytes)

    order = _element_order(len(rows), batch_size, training, seed)

    def plan(step):
        """Step -> element numbers, places within the split and conditions, (B,) each. Reads nothing."""
        n, place = order(step)
        row = rows[place]
        return n, place, row, source.z[row], source.label[row], source.case[row]

    changed = training and augment
    full = batch_size if training else None  # a static batch size lets tf.distribute split batches exactly

    def plan_op(step):
        values = tf.numpy_function(plan, [step], [tf.int64] * 3 + [tf.int32] * 3)
        return tuple(tf.ensure_shape(value, [full]) for value in values)

    plans = _steps(len(rows), batch_size, training, start_step).map(plan_op)
    if pixels is not None:
        images = plans.map(
            lambda n, place, *_: tf.numpy_function(lambda p: pixels[p], [place], tf.uint8), num_parallel_calls=2
        )
    else:
        images = _read_pixels(source, plans.map(lambda n, place, row, *_: row), image_size, batch_size)

    def finish(image, planned):
        n, place, _, z, label, case = planned
        image = tf.ensure_shape(image, [full, image_size, image_size, 1])
        image = tf.cast(image, tf.float32) / 127.5 - 1.0
        mask = None
        if masks:
            mask = tf.numpy_function(classes, [place], tf.int32)
            mask = tf.ensure_shape(mask, [full, image_size, image_size])
        if changed:
            seeds = tf.stack([tf.fill(tf.shape(n), tf.constant(seed, tf.int64)), n], axis=-1)
            image = transforms.augment(image, seeds, flip, mask, augment)
            image, mask = image if masks else (image, None)
        return {"image": image, "z": z, "label": label, "case": case, **({"mask": mask} if masks else {})}

    return _in_order(tf.data.Dataset.zip(images, plans).map(finish, num_parallel_calls=tf.data.AUTOTUNE))


def read_split(source, split: str, image_size: int, batch_size: int = 32, **options) -> dict[str, np.ndarray]:
    """All slices of a split as they are, in table order: what `make_dataset` yields, as one array each."""
    batches = make_dataset(source, split, image_size, batch_size, training=False, **options)
    parts = list(batches.as_numpy_iterator())
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def make_latents_dataset(
    path,
    batch_size: int,
    training: bool,
    *,
    seed: int = 0,
    start_step: int = 0,
    codes: bool = False,
    masks: bool = False,
):
    """Batches of the latents that `train.py latents` has written, in the same order as `make_dataset` gives slices.

    Args:
        path: an .npz with latents (V, N, h, w, C), V views of N slices, and z, label, case (N,).
        batch_size, training, seed, start_step: as in `make_dataset`. Training goes through the views, epoch by epoch;
            otherwise it is view 0, the slices as they are.
        codes: the codes instead of the latents.
        masks: what lies there of tissue masks comes along, "mask" (B, h, w, 4) (see
        `ldm.data.transforms.tissue_fractions`).

    Returns:
        Dataset of {"image": (B, h, w, C) float32, the latents, "z", "label", "case": (B,) int32}; or, instead of
        "image", "codes": (B, h, w) int32.
    """
    name, kind = ("codes", "int32") if codes else ("image", "float32")
    with np.load(path) as file:
        latents, z, label, case = (file[key] for key in ("codes" if codes else "latents", "z", "label", "case"))
        shares = file["mask"] if masks else None
    views, count, *shape = latents.shape
    order = _element_order(count, batch_size, training, seed)

    def gather(step):
        n, place = order(step)
        view = (n // count + place) % views if training else 0
        share = shares[view, place].astype("float32") if masks else np.zeros(0, "float32")
        return latents[view, place].astype(kind), z[place], label[place], case[place], share

    full = batch_size if training else None

    def batch(step):
        kinds = [tf.as_dtype(kind), *[tf.int32] * 3, tf.float32]
        image, *conditions, share = tf.numpy_function(gather, [step], kinds)
        named = zip(("z", "label", "case"), conditions, strict=True)
        return {
            name: tf.ensure_shape(image, [full, *shape]),
            **{key: tf.ensure_shape(value, [full]) for key, value in named},
            **({"mask": tf.ensure_shape(share, [full, *shares.shape[2:]])} if masks else {}),
        }

    return _in_order(_steps(count, batch_size, training, start_step).map(batch))


def with_covariates(batches: tf.data.Dataset, source: Source, columns: dict[str, dict]) -> tf.data.Dataset:
    """Adds what the table says of the people: "covariates" (B, K) float32, see `covariates_of`."""
    cases = np.unique(source.case)
    known = covariates_of(source, cases, columns)
    return batches.map(lambda batch: {**batch, "covariates": tf.gather(known, tf.searchsorted(cases, batch["case"]))})


def covariates_of(source: Source, case: np.ndarray, columns: dict[str, dict]) -> np.ndarray:
    """What the table says of these people (N,), as a network is told it: (N, K) float32, NaN = unknown.

    Args:
        columns: column -> its kind, as it was when the network was trained.

    Raises:
        DataError: for a column that the table does not have, or a value that the column did not have then.
    """
    covariates = np.full((len(case), len(columns)), np.nan, np.float32)
    for k, (name, about) in enumerate(columns.items()):
        if name not in source.covariates:
            raise DataError(f"{source.path}: nothing says the {name} of its people; give a table with that column.")
        for row, who in enumerate(case.tolist()):
            try:
                covariates[row, k] = table.encode(
                    source.covariates[name].get(table.person(source.case_names[who])), about
                )
            except ValueError as error:
                raise DataError(f"{source.path}: the {name} of case {source.case_names[who]}: {error}.") from error
    return covariates


def _element_order(count: int, batch_size: int, training: bool, seed: int):
    """The order of a split: a function step -> (element numbers n, their places within the split), (B,) each."""

    @functools.lru_cache(maxsize=3)  # a batch may straddle epochs, and batches are made in parallel
    def permutation(epoch):
        return np.random.default_rng([seed, epoch]).permutation(count)

    def order(step):
        n = np.arange(step * batch_size, (step + 1) * batch_size)
        if not training:
            n = n[n < count]
            return n, n
        place = np.empty_like(n)
        for epoch in np.unique(n // count).tolist():
            here = n // count == epoch
            place[here] = permutation(epoch)[n[here] % count]
        return n, place

    return order


def _steps(count: int, batch_size: int, training: bool, start_step: int) -> tf.data.Dataset:
    """Step numbers: without end in training, otherwise as many as it takes to see every element once."""
    steps = 2**62 // batch_size if training else -(-count // batch_size)
    return tf.data.Dataset.range(min(start_step, steps), steps)


def _in_order(batches: tf.data.Dataset) -> tf.data.Dataset:
    """Made ahead of their use, in their order, and shared out to replicas by batch, not by file."""
    options = tf.data.Options()
    options.deterministic = True
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return batches.prefetch(tf.data.AUTOTUNE).with_options(options)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def write_phantoms(out, people: int, image_size: int = 256, seed: int = 0) -> None:
    """Writes phantom brains as a zip in the OASIS course layout, with masks and `labels.csv`.

    About 75 / 12.5 / 12.5 % of the people are in train / validate / test, at least one in each; as labels alternate
    from person to person, every split has about as many of each.

    Args:
        out: the zip to write; it appears under this name only when it is whole.
        people: number of people, at least 3.
        image_size: height and width of the slices in pixels.
        seed: of the phantoms.

    Raises:
        DataError: too few people, an image size that phantoms do not have, or a folder that cannot be written.
    """
    _check_seed(seed)
    if people < len(SPLITS):
        raise DataError(f"--people {people} is too few: train, validate and test need one each, so give 3 or more.")
    held_out = max(1, round(people / 8))
    ends = {"train": people - 2 * held_out, "validate": people - held_out, "test": people}  # last case of each split
    out = Path(out)
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    labels = {}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as file:  # PNGs do not shrink further
            slices = phantom.slices(people, image_size, seed)
            for item in tqdm(slices, total=people * phantom.SLICES, desc=out.name, unit="slice", delay=1):
                case, z = item["case"], item["z"]
                split = next(name for name, end in ends.items() if case <= end)
                labels[case] = phantom.LABELS[item["label"]]
                for folder, prefix, pixels in (("", "case", item["image"]), ("seg_", "seg", item["mask"])):
                    entry = (
                        f"keras_png_slices_data/keras_png_slices_{folder}{split}/{prefix}_{case:03d}_slice_{z}.nii.png"
                    )
                    file.writestr(entry, _png(pixels))
            table = "".join(f"{case:03d},{label}\n" for case, label in labels.items())
            file.writestr("keras_png_slices_data/labels.csv", "case,label\n" + table)
        os.replace(part, out)
    except OSError as error:
        raise DataError(f"--out {out} cannot be written ({error.strerror}).") from error
    except ValueError as error:
        raise DataError(f"--image-size {image_size} does not suit phantoms: {error}.") from error
    finally:
        part.unlink(missing_ok=True)


def _png(pixels: np.ndarray) -> bytes:
    """(H, W) uint8 -> the bytes of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _describe(source: Source) -> None:
    """Prints the manifest for people: one line per fact, one per split."""
    manifest = source.manifest()
    print(f"{manifest['source']}: {manifest['kind']}, {manifest['images']} slices, {manifest['bytes']:,} bytes")
    print(f"labels: {', '.join(manifest['labels']) or 'none'}; masks: {manifest['masks']}; z: {manifest['z']}")
    for split, facts in manifest["splits"].items():
        print(f"{split:>8}: {facts['people']:5} people {facts['images']:7} slices  ({facts['made']})")


def main(argv=None) -> int:
    """Command line. Returns 0, or 2 after one sentence on stderr where the user can mend something."""
    parser = argparse.ArgumentParser(description="Write phantom brains, or say what an archive of slices holds.")
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("phantom", help="write phantom brains as a zip in the OASIS layout")
    write.add_argument("--people", type=int, default=128, help="number of people (default: %(default)s)")
    write.add_argument("--out", default="dataset/phantom.zip", help="zip to write (default: %(default)s)")
    write.add_argument("--image-size", type=int, default=256, help="side in pixels (default: %(default)s)")
    write.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    describe = commands.add_parser("describe", help="say what an archive holds and how it is split")
    describe.add_argument("data", nargs="+", help="a zip, a folder, or NIfTI volumes")
    describe.add_argument("--seed", type=int, default=0, help="of splits that are carved (default: %(default)s)")
    describe.add_argument("--axis", type=int, default=2, help="of volumes: 0 sagittal, 1 coronal, 2 axial")
    describe.add_argument("--json", action="store_true", help="print the whole manifest as JSON")
    flags = parser.parse_args(argv)
    try:
        if flags.command == "phantom":
            write_phantoms(flags.out, flags.people, flags.image_size, flags.seed)
        else:
            source = open_source(flags.data, flags.seed, flags.axis)
            print(json.dumps(source.manifest(), indent=2)) if flags.json else _describe(source)
    except DataError as error:
        print(f"dataset.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
