"""Names: who is in an archive. Which layout its names follow (`parse_names`), which person, slice, label and split each
of them says, and who is moved into a split that the archive does not have (`carve`).
"""

import re

import numpy as np

from ldm.data import archive

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
        if archive.is_image(name):
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
        raise archive.DataError(
            f"--data {shown} holds segmentation masks only (such as {masks[0][0]!r}); point --data at the archive with "
            "the brain slices (keras_png_slices_train, ...)."
        )
    if not rows:
        hint = "expected are PNG or JPEG files, or a folder of NIfTI volumes"
        inner = next((name for name in names if name.lower().endswith((".zip", *archive.VOLUME_SUFFIXES))), None)
        if inner:
            hint = f"point --data at {inner!r} inside it (unpacked, where it lies in a zip)"
        raise archive.DataError(f"--data {shown} holds no brain slices; {hint}.")
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
        raise archive.DataError(
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
        raise archive.DataError(
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


def check_seed(seed: int) -> None:
    """Raises DataError for a seed that NumPy's generators do not take."""
    if seed < 0:
        raise archive.DataError(f"--seed {seed} is negative; give 0 or more.")
