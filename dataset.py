"""Slices in: a zip, a folder, class folders or NIfTI volumes -> a table of slices -> batches for training.

Here are the table of slices (`Source`, made by `open_source`), the `tf.data` pipeline that reads them (`make_dataset`),
what a table says of people (`covariates_of`), and the command line. The rooms under it, in `ldm.data`: `archive` gets
bytes out of a zip or a folder, `volumes` out of NIfTI; `names` says who a file name speaks of; `pixels` decodes, fits
and augments; `masks` reads tissue masks; `latents` is the same for what a first stage has encoded.

    source = open_source("dataset/oasis.zip")
    for batch in make_dataset(source, "train", image_size=128, batch_size=32, training=True):
        batch["image"]  # (32, 128, 128, 1) float32 in [-1, 1], background exactly -1

Three promises. A person is in one split only, never two. Nothing is extracted to disk. Element number n of a training
stream is a pure function of (seed, n): whoever skips the first k batches sees what an unbroken run would have seen.

    python dataset.py phantom --people 128 --out dataset/phantom.zip
    python dataset.py describe dataset/oasis.zip
    python dataset.py people --data dataset/oasis.zip --out people.csv
"""

import argparse
import dataclasses
import functools
import io
import json
import os
import time
from pathlib import Path

import command

if __name__ == "__main__":
    command.from_the_start("dataset.py")

import numpy as np
from PIL import Image

from ldm import files
from ldm.batches import UNSHARED, evenly
from ldm.data import archive, crop, dicom, latents, names, order, people, phantom, pixels, repeats, table, volumes
from ldm.data import masks as tissue_masks
from ldm.data.archive import DataError, refuse_absent
from ldm.data.people import SPLITS
from ldm.later import tensorflow as tf

# What others call by these names; their rooms say what they do.
brain_box = crop.brain_box
data_errors = pixels.data_errors
make_latents_dataset = latents.make_dataset
read_mask = tissue_masks.read
write_phantoms = phantom.write

CHECK_ALL = 20_000  # archives up to this many slices are checked whole when opened,
CHECK_SAMPLE = 2_000  # larger ones by a seeded sample of this many; the rest is checked as it is read
HASH_BYTES = 200 * 10**6  # archives from this size on are told apart by size and date only


@dataclasses.dataclass(eq=False)
class Source:
    """A table of slices, sorted by (case, scan, z), and the store that their bytes come from.

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
        scan: (N,) int32 of a person who was scanned more than once; numbers within the source.
        label_names: sorted.
        covariates: what a table says of people, column -> {person: text} (see `ldm.data.table`).
        case_names: case -> the name that it has in the archive.
        masks: entry -> entry of its mask, read with `store.read`; may be empty.
        made: split -> "archive" or "carved by case, seed S".
        listing: what was understood of the names (see `ldm.data.names.Listing`).
        person: how people were told apart: None by their names, "each" or a regular expression.
        center: whether heads are moved to the middle of the picture as they are read (see `ldm.data.centring`).
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
    scan: np.ndarray = dataclasses.field(repr=False)
    label_names: tuple[str, ...]
    case_names: dict[int, str] = dataclasses.field(repr=False)
    masks: dict[str, str] = dataclasses.field(repr=False)
    made: dict[str, str]
    listing: names.Listing = dataclasses.field(repr=False)
    person: str | None = None
    center: bool = False
    covariates: dict[str, dict] = dataclasses.field(default_factory=dict, repr=False)
    kept: dict = dataclasses.field(default_factory=dict, repr=False)

    def columns(self, chosen=None) -> dict[str, dict]:
        """What kind of fact each column of the table holds, all or those named (see `ldm.data.table.describe`)."""
        train = {table.person(self.case_names[case]) for case in np.unique(self.case[self.split == "train"]).tolist()}
        return {
            name: table.describe(self.covariates[name], train)
            for name in (self.covariates if chosen is None else chosen)
        }

    def with_labels_of(self, known) -> "Source":
        """The same slices with labels numbered as a run numbers them, which knows these names; as is, if it knows none.

        Raises:
            DataError: a slice has a label that the run does not know.
        """
        if not known or self.label_names == tuple(known):
            return self
        found = {self.label_names[i] for i in np.unique(self.label).tolist() if i >= 0}
        if foreign := sorted(found - set(known)):
            raise DataError(
                f"--data {self.path}: slices are labelled {foreign[0]}, and this run knows {' and '.join(known)}; "
                "rename the label."
            )
        number = np.array([*(known.index(name) if name in known else -1 for name in self.label_names), -1], "int32")
        return dataclasses.replace(self, label=number[self.label], label_names=tuple(known), kept={})

    def select(self, split: str) -> np.ndarray:
        """Row numbers of one split, ascending, (n,) int64.

        Raises:
            DataError: an unknown split, or one without slices.
        """
        if split not in SPLITS:
            raise DataError(f"there is no split {split!r}: choose one of {', '.join(SPLITS)}.")
        rows = np.flatnonzero(self.split == split)
        if not len(rows):
            raise DataError(
                f"--data {self.path}: the {split} split is empty ({len(np.unique(self.case))} people in all); add "
                "people to that split or point --data at an archive that has more of them."
            )
        return rows

    def of_some(self, most: int) -> "Source":
        """Whole people, evenly spread over those of each split, with about `most` slices of it at most; the source
        itself where it has no more.
        """
        keep = np.ones(len(self.entries), bool)
        for split in SPLITS:
            mine = self.split == split
            people_there = np.unique(self.case[mine])
            if mine.sum() > most:
                chosen = people_there[evenly(len(people_there), max(1, most * len(people_there) // mine.sum()))]
                keep &= ~mine | np.isin(self.case, chosen)
        if keep.all():
            return self
        columns = {name: getattr(self, name)[keep] for name in ("split", "z", "label", "case", "scan")}
        entries = [self.entries[row] for row in np.flatnonzero(keep)]
        return dataclasses.replace(self, entries=entries, **columns, kept={})

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels of the first slice, as it lies in the archive."""
        if self.kind == "volumes":
            return self.store.shape(self.entries[0])
        width, height = Image.open(io.BytesIO(self.store.read(self.entries[0]))).size
        return height, width

    def check(self) -> None:
        """Reads the slices: checksums, signature, dimensions, end-of-file marker, and whether a JPEG is cut off.

        Archives of more than CHECK_ALL slices are checked by a seeded sample, and so are JPEGs that have to be decoded
        for it; what is not looked at here is looked at when it is read.

        Raises:
            DataError: names the first entry that is no image, truncated, damaged or absurdly large.
        """
        if self.kind == "volumes":  # opening them has read every voxel
            return
        chosen = len(self.entries) if len(self.entries) <= CHECK_ALL else CHECK_SAMPLE
        rows = np.random.default_rng(self.seed).permutation(len(self.entries))[:chosen]
        for place, row in enumerate(rows.tolist()):
            data, code = self.read(self.entries[row])
            if code == archive.JPEG and place < CHECK_SAMPLE and pixels.is_cut_off(data):
                raise DataError(f"{self.path}: {self.entries[row]!r} is half a JPEG; replace it or remove it.")
        self.listing.notes += pixels.notes([self.entries[row] for row in rows[:20]], self.store.read)

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

    @functools.cached_property
    def _fingerprint(self) -> tuple[int, float, str | None]:
        """Bytes, time of the last change and SHA-256 of what was opened; read once, however often it is asked for."""
        files = self.store.files()
        size = sum(path.stat().st_size for path in files)
        modified = max(path.stat().st_mtime for path in files)
        return size, modified, archive.fingerprint(files) if size < HASH_BYTES else None

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
        size, modified, sha256 = self._fingerprint
        return {
            "source": self.path,
            "kind": self.kind,
            "bytes": size,
            "modified": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(modified)),
            "sha256": sha256,
            "seed": self.seed,
            "person": self.person,
            "contrast": self.listing.contrast,
            "axis": getattr(self.store, "axis", None),
            "images": len(self.entries),
            "masks": len(self.masks),
            "labels": list(self.label_names),
            "z": [int(self.z.min()), int(self.z.max())],
            "splits": splits,
        }


# ---- opening: names -> table -----------------------------------------------------------------------------------------


def open_source(
    data, seed=0, axis=2, check=True, labels=None, *, person=None, contrast=None, missing=None, center=False
) -> Source:
    """Reads the listing of an archive and says who is in it; no slice is decoded.

    Understood are, as a zip or as a folder: the OASIS course layout
    (`keras_png_slices_{train,validate,test}/case_001_slice_0.nii.png`, with or without a folder around it, masks in
    `keras_png_slices_seg_*`, a table `labels.csv`); folders of labels, of splits and of people, and names with keywords
    or numbers (see `ldm.data.names`); NIfTI volumes, or a folder of them. Hidden files and files of other types are
    passed over. Splits are by person: those of the archive are kept, a missing test split takes about 15 % of the
    training people, a missing validate split about 15 % of the remaining ones.

    Args:
        data: a path, or a list of paths to volumes; a `Source` is given back as it is.
        seed: int >= 0, decides who goes into a split that the archive does not have.
        axis: of NIfTI volumes in RAS orientation: 0 sagittal, 1 coronal, 2 axial.
        check: look at the bytes of the slices (see `Source.check`).
        labels: path of a table (columns case, label, person, ...) that takes the place of `labels.csv`.
        person: how people are told apart where names do not do it: "each", every slice is somebody else, or a regular
            expression with the group person and, if need be, scan, slice and label.
        contrast: the one to use of several (t1, t2, flair, ...); None is T1, if there is one.
        missing: texts that mean "unknown" in the table, beside those that always do: ("-4",) in ADNI's.
        center: move heads to the middle of the picture, each scan as a whole.

    Raises:
        DataError: one sentence for each thing that can be wrong with the data.
    """
    if isinstance(data, Source):
        return data
    people.check_seed(seed)
    named = [data] if isinstance(data, (str, os.PathLike)) else data
    refuse_absent(named)
    paths = [Path(item) for item in named]
    shown = ", ".join(str(path) for path in paths)
    if not paths:
        raise DataError("--data names no file: give a zip, a folder or volumes.")
    with archive.collector_paused():
        store, listing = _read_listing(paths, shown, axis, person, contrast)
        source = dataclasses.replace(_make_table(shown, store, listing, seed, labels, person, missing), center=center)
    if check:
        source.check()
    return source


def open_recorded(about: dict, data=None) -> Source:
    """The data that a run was trained on, or other data read in the same way.

    Args:
        about: what the run wrote down of one of its stages.
        data: other data; its labels are those that it brings along, and its people are told apart by its names.
    """
    settings = about["settings"]
    own = settings["data"] or about["data"]["source"]
    if data is None and not settings["data"] and Path(own) == phantom.STAND_IN:
        phantom.stand_in()  # a model that came along has learned from them elsewhere
    named = data[0] if isinstance(data, list) and len(data) == 1 else data
    its_own = ("labels", "person", "missing") if data is None or named == own else ()
    options = {name: settings.get(name) for name in (*its_own, "contrast", "center")}
    return open_source(data or own, seed=settings["seed"], axis=settings["axis"], **options)


def _read_listing(paths: list[Path], shown: str, axis: int, person, contrast):
    """Finds out what kind of data the paths are. Returns the store and what was understood of the names in it."""
    path, notes, beside, dangling = paths[0], [], [], []
    if path.is_dir() and len(paths) == 1:
        store = archive.FolderStore(path)
        found = {name: store.path_of(name) for name in store.names if archive.is_volume(name)}
        beside, dangling = [name for name in store.names if name not in found], store.dangling
        if not any(map(archive.is_image, store.names)) and all(name.lower().endswith(".dcm") for name in found):
            found, notes = dicom.find(path, [store.path_of(name) for name in store.names])
            if found:  # names of files may say who a patient is
                beside, dangling = [], []
        if found and any(map(archive.is_image, store.names)):
            raise DataError(f"--data {path} holds volumes and PNG or JPEG files; put the two into two folders.")
        if not found:
            return store, names.understand(store.names, shown, person, contrast, dangling=dangling)
    elif not all(archive.is_volume(item.name) for item in paths):
        if len(paths) > 1:
            raise DataError(f"--data takes one zip or folder, or several volumes, but not a mixture: {shown}.")
        if path.suffix.lower() != ".zip":
            raise DataError(f"--data {path} has an unsupported suffix; give a .zip, a folder, .nii, .nii.gz or .mgz.")
        store = archive.ZipStore(path)
        return store, names.understand(store.names, shown, person, contrast)
    else:
        found = volumes.name_files(paths)
    listing = names.understand([*found, *beside], shown, person, contrast, volumes=True, dangling=dangling)
    store = volumes.VolumeStore({row.entry: found[row.entry] for row in listing.rows}, axis)
    listing.notes += notes + store.notes
    of_volume = {row.entry: row for row in listing.rows}
    listing.rows = [of_volume[volume]._replace(entry=name, z=z) for name, volume, z in store.slices]
    return store, listing


def _make_table(
    shown: str, store, listing: names.Listing, seed: int, labels_file=None, person=None, missing=None
) -> Source:
    """Numbers people and labels, gives everybody a split, sorts by (case, scan, z)."""
    labels, columns = people.with_table(listing, store, labels_file, shown, missing or ())
    entries, splits, case_names, scan_names, z, label_names = zip(*listing.rows, strict=True)
    numbers = people.number_cases(case_names)
    scans = {key: place for place, key in enumerate(sorted(set(zip(case_names, scan_names, strict=True))))}
    case = np.array([numbers[name] for name in case_names], np.int32)
    scan = np.array([scans[key] for key in zip(case_names, scan_names, strict=True)], np.int32)
    z = np.array(z, np.int32)
    places = {name: place for place, name in enumerate(labels)}
    label = np.array([places.get(name, -1) for name in label_names], np.int32)
    rows = np.lexsort((z, scan, case))
    entries = [entries[row] for row in rows]
    split = np.array(splits, dtype="U8")[rows]
    case, scan, z, label = case[rows], scan[rows], z[rows], label[rows]
    named = {number: name for name, number in numbers.items()}
    people.check_people(shown, entries, split, case, named)
    split, made = people.carve(shown, split, case, label, seed)
    masks = {(row.person, row.scan, row.z): row.entry for row in listing.masks}
    keys = ((row.entry, (row.person, row.scan, row.z)) for row in listing.rows)
    return Source(
        path=shown,
        kind=listing.kind,
        store=store,
        seed=seed,
        entries=entries,
        split=split,
        z=z,
        label=label,
        case=case,
        scan=scan,
        label_names=labels,
        case_names=named,
        masks={entry: masks[key] for entry, key in keys if key in masks},
        made=made,
        listing=listing,
        person=person,
        covariates=columns,
    )


# ---- batches ---------------------------------------------------------------------------------------------------------


def make_dataset(
    source,
    split: str,
    image_size: int,
    batch_size: int,
    training: bool,
    *,
    seed: int = 0,
    start_step: int = 0,
    augment=1.0,
    augmented_steps=None,
    flip: bool = False,
    masks: bool = False,
    most: int | None = None,
    share: tuple[int, int] = UNSHARED,
    cache_bytes: int = 2 * 2**30,
) -> "tf.data.Dataset":
    """Batches of slices, in an order and with pixels that depend on the arguments only.

    Args:
        source: a `Source`, or anything `open_source` takes.
        split: "train", "validate" or "test".
        image_size: S, the side of the pictures in pixels. Slices are padded to a square with black, then resized.
        batch_size: B, over all replicas.
        training: True: an endless stream of full batches, each epoch in a fresh order without replacement, augmented.
            A batch may straddle two epochs. False: one pass in table order (by case, then z), as is; the last batch
            may be smaller.
        seed: of order and augmentation. Element n of the training stream depends on (seed, n) and the arguments below.
        start_step: batches to skip; nothing is read for them.
        augment: how strongly training slices are augmented, 0 = not at all (`strength` of `ldm.data.pixels.augment`).
        augmented_steps: number of batches, from the first on, that are; later ones are mirrored at most. None: all.
        flip: whether they are mirrored left to right at random, whatever `augment` is.
        masks: whether tissue masks come along.
        most: without training, at most so many slices, evenly spread over people and slice indices; None: all.
        share: (part, parts) of a training stream: the part-th of so many equal parts of every batch, B / parts rows.
            Of a split that is not kept in memory, nothing else is read. For several hosts (`distribution.own_share`).
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
    people.check_seed(seed)
    source = open_source(source, seed)
    rows = source.select(split)
    if image_size < 1 or batch_size < 1:
        raise DataError("--image-size and --batch-size must be positive integers.")
    classes = tissue_masks.of_split(source, split, image_size, cache_bytes) if masks else None
    kept = pixels.decoded(source, split, image_size, cache_bytes)
    elements = order.element_order(len(rows), batch_size, training, seed, most, share)
    augmented = 2**62 if augmented_steps is None else augmented_steps * batch_size
    rows_made = batch_size // share[1]
    full = rows_made if training else None  # a static batch size lets tf.distribute split batches exactly

    def plan(step):
        """Step -> element numbers, places within the split and conditions, (B,) each. Reads nothing."""
        n, place = elements(step)
        row = rows[place]
        return n, place, row, source.z[row], source.label[row], source.case[row]

    def plan_op(step):
        values = tf.numpy_function(plan, [step], [tf.int64] * 3 + [tf.int32] * 3)
        return tuple(tf.ensure_shape(value, [full]) for value in values)

    plans = order.steps(min(len(rows), most or len(rows)), batch_size, training, start_step).map(plan_op)
    if kept is not None:
        images = plans.map(
            lambda n, place, *_: tf.numpy_function(lambda p: kept[p], [place], tf.uint8), num_parallel_calls=2
        )
    else:
        images = pixels.read(source, plans.map(lambda n, place, row, *_: row), image_size, rows_made)

    def finish(image, planned):
        n, place, _, z, label, case = planned
        image = tf.ensure_shape(image, [full, image_size, image_size, 1])
        image = tf.cast(image, tf.float32) / 127.5 - 1.0
        mask = None
        if masks:
            mask = tf.numpy_function(classes, [place], tf.int32)
            mask = tf.ensure_shape(mask, [full, image_size, image_size])
        if training and (augment or flip):
            seeds = tf.stack([tf.fill(tf.shape(n), tf.constant(seed, tf.int64)), n], axis=-1)
            change = functools.partial(pixels.augment, image, seeds, flip, mask)
            image = tf.cond(n[0] < augmented, lambda: change(augment), lambda: change(0.0))
            image, mask = image if masks else (image, None)
        return {"image": image, "z": z, "label": label, "case": case, **({"mask": mask} if masks else {})}

    return order.in_order(tf.data.Dataset.zip(images, plans).map(finish, num_parallel_calls=tf.data.AUTOTUNE))


def read_split(source, split: str, image_size: int, batch_size: int = 32, **options) -> dict[str, np.ndarray]:
    """All slices of a split as they are, in table order: what `make_dataset` yields, as one array each."""
    batches = make_dataset(source, split, image_size, batch_size, training=False, **options)
    count, found, place = len(source.select(split)), {}, 0
    for part in batches.as_numpy_iterator():
        if not found:  # all parts beside the whole would take twice the memory
            found = {name: np.empty((count, *values.shape[1:]), values.dtype) for name, values in part.items()}
        for name, values in part.items():
            found[name][place : place + len(values)] = values
        place += len(values)
    return {name: values[:place] for name, values in found.items()}  # an option may ask for fewer


def with_covariates(batches: "tf.data.Dataset", source: Source, columns: dict[str, dict]) -> "tf.data.Dataset":
    """Adds what the table says of the people: "covariates" (B, K) float32, see `covariates_of`."""
    cases = np.unique(source.case)
    known = covariates_of(source, cases, columns)
    return batches.map(lambda batch: {**batch, "covariates": tf.gather(known, tf.searchsorted(cases, batch["case"]))})


def covariates_of(source: Source, case: np.ndarray, columns: dict[str, dict]) -> np.ndarray:
    """What the table says of these people (N,), as conditions of a network: (N, K) float32, NaN = unknown.

    Args:
        columns: column -> its kind, as it was when the network was trained.

    Raises:
        DataError: for a column that the table does not have, or a value that the column did not have then.
    """
    people_named = [source.case_names[number] for number in case.tolist()]
    return table.encode_all(source.covariates, people_named, columns, source.path)


# ---- command line ----------------------------------------------------------------------------------------------------


def _describe(source: Source) -> None:
    """Prints the manifest for people: one line per fact, one per split; then what was understood of the names."""
    manifest = source.manifest()
    print(f"{manifest['source']}: {manifest['kind']}, {manifest['images']} slices, {manifest['bytes']:,} bytes")
    labels = ", ".join(manifest["labels"]) or "none"
    print(f"labels: {labels}; masks: {manifest['masks']}; slice indices: {' to '.join(map(str, manifest['z']))}")
    for split, facts in manifest["splits"].items():
        made = facts["made"].replace("carved by case", "whole people by lot").replace("archive", "of the archive")
        print(f"{split:>8}: {people.counted(facts['people']):>12} {facts['images']:7} slices  ({made})")
    print("\n".join(people.describe(source) + repeats.describe(source)))


def _find_people(source: Source, labels, missing, out: Path) -> None:
    """Prints which stacks change heads, and who looks like whom, and writes the table of both that `--labels` takes."""
    files.check_file(out)
    said, links = repeats.propose_links(source)
    if links:  # who was scanned twice is asked of whole heads
        people.link(source.listing, links, out)
        source = _make_table(source.path, source.store, source.listing, source.seed)
    more, found = repeats.propose(source, labels, missing, links)
    print("\n".join(said + more))
    if found:
        files.write(out, found)
        print(f"-> {out}: who is who; use it as `--labels {out}`")


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog="dataset.py", description="Write phantom brains, or say what an archive of slices holds, and who is in it."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("phantom", help="write phantom brains as a zip in the OASIS layout")
    write.add_argument("--people", type=int, default=128, help="number of people (default: %(default)s)")
    write.add_argument("--out", default="dataset/phantom.zip", help="zip to write (default: %(default)s)")
    write.add_argument("--image-size", type=int, default=256, help="side in pixels (default: %(default)s)")
    write.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    describe = commands.add_parser("describe", help="say what an archive holds and how it is split")
    describe.add_argument("data", nargs="+", help="a zip, a folder, or volumes")
    describe.add_argument("--json", action="store_true", help="print the whole manifest as JSON")
    who = commands.add_parser("people", help="find scans of one person, and stacks that change heads, by their looks")
    who.add_argument("--data", nargs="+", required=True, help="a zip, a folder, or volumes")
    who.add_argument("--out", default="people.csv", help="table to write, for --labels (default: %(default)s)")
    for command_ in (describe, who):
        command_.add_argument("--seed", type=int, default=0, help="of splits that are carved (default: %(default)s)")
        command_.add_argument("--axis", type=int, default=2, choices=(0, 1, 2), help="0 sagittal, 1 coronal, 2 axial")
        command_.add_argument("--labels", help="table of people, with the columns case, label, person, ...")
        command_.add_argument("--person", help="'each', or a regular expression with the group (?P<person>...)")
        command_.add_argument("--missing", nargs="+", help="texts that mean unknown in the table, such as -4")
        command_.add_argument("--contrast", help="of several: t1 (default), t2, flair, ...")
    return parser


def _refuse_present(path: str) -> None:
    """Refuses to write over a file: it may be somebody's data, or labels."""
    if os.path.isfile(path):  # False for a name that is too long, which is told elsewhere
        raise DataError(f"{path} is there already: move it away, or name another --out")


def _work(flags) -> int:
    """Does what the flags say; returns the exit status."""
    if flags.command == "people":
        _refuse_present(flags.out)
    if flags.command == "phantom":
        if not flags.out.lower().endswith(".zip"):
            raise DataError(f"--out {flags.out} does not end in .zip, by which `--data` would know it.")
        _refuse_present(flags.out)
        write_phantoms(flags.out, flags.people, flags.image_size, flags.seed)
        print(f"-> {flags.out}: {flags.people} people; see them with `python dataset.py describe {flags.out}`")
        return 0
    # who looks like whom is asked of scans, so what a table says of people is not heard here
    labels = flags.labels if flags.command == "describe" else None
    options = {"labels": labels, "person": flags.person, "contrast": flags.contrast, "missing": flags.missing}
    source = open_source(flags.data, flags.seed, flags.axis, **options)
    if flags.command == "people" or not flags.json:  # both look at pictures
        command.load("dataset.py", "tensorflow")
    if flags.command == "people":
        _find_people(source, flags.labels, flags.missing or (), Path(flags.out))
    elif flags.json:
        print(json.dumps(source.manifest(), indent=2))
    else:
        _describe(source)
    return 0


def main(argv=None) -> int:
    """Runs the command line. Returns 0, or 2 after one sentence on stderr where the user can mend something."""
    flags = _parser().parse_args(argv)
    return command.run("dataset.py", lambda: _work(flags), (DataError,))


if __name__ == "__main__":
    command.leave(main())
