"""Folders: what the folders above a file say of it: split, person, scan, contrast, or that it holds masks.

A folder is read word by word (`imagesTr`, `Train AD`, `lesion_masks`). What no word explains is kept as it is: whether
it is a label, a person or nothing shows only when all names are seen together (`ldm.data.names`).
"""

import functools
import re
from typing import NamedTuple

from ldm.data import words

SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training", "trainset", "tr"), "train"),
    **dict.fromkeys(("validate", "validation", "valid", "val", "valset", "dev", "devset"), "validate"),
    **dict.fromkeys(("test", "testing", "testset", "ts"), "test"),
}
OASIS_FOLDER = re.compile(r"keras_png_slices_(seg_)?(train|validate|test)$")
MASK_FOLDERS = set("label labels labelmaps roi rois gt annotations groundtruth truth truths manual".split())
OF_MASKS = set("ground maps map brain lesion lesions tumor tumour tissue predicted".split())  # words beside these
PLAIN_FOLDERS = set(  # say nothing
    "images image imgs img pictures slices data dataset set png pngs jpg jpgs jpeg jpegs anat raw nifti nii volumes "
    "mri scans axial coronal sagittal weighted only mprage spgr tse fse".split()
)
NO_LABEL = re.compile(r"(?:^|[_\- ])(?:fold|part|batch|disc|disk)[_\- ]?\d+$", re.IGNORECASE)
NO_PERSON = set("cdr mmse grade stage class label group score site fold batch part cluster day month year".split())


class Folder(NamedTuple):
    """What the folders above a file say."""

    split: str = ""
    person: str = ""  # by a keyword or a known pattern
    scan: str = ""
    contrast: str = ""
    mask: bool = False
    inside: tuple[str, ...] = ()  # other folders below that of the split, which may be labels or people
    above: tuple[str, ...] = ()  # other folders, if there is no split or they are above it
    below: tuple[str, ...] = ()  # those of them that are inside the folder of the person


def read_course(path: str) -> Folder:
    found = OASIS_FOLDER.search(path)
    return Folder(split=found[2], mask=bool(found[1]))


def read(path: str) -> Folder:
    """Gives each folder of a path its meaning."""
    split, person, scan, contrast, mask, inside, above, below = "", "", [], "", False, [], [], []
    for name in path.split("/") if path else ():
        said, found = words.read_folder(name), _read_one(name)
        mask |= found.mask
        if found.split:
            split, above, inside = found.split, [*above, *inside, *filter(None, [found.rest])], []
        if said.sure:
            person = person or said.person  # the outermost: people may be counted anew inside
            scan += [said.scan] if said.scan else []
        elif said.scan and not said.person:
            scan.append(said.scan)
        elif found.rest and not found.split:
            inside.append(found.rest)
            below += [found.rest] if person else []
        contrast = said.contrast or found.contrast or contrast
    if not split:
        above, inside = inside, []
    return Folder(split, person, "_".join(scan), contrast, mask, tuple(inside), tuple(above), tuple(below))


class _Said(NamedTuple):
    """What the words of one folder's name say; `rest`: of which nothing is known, "" if it all is."""

    split: str
    contrast: str
    mask: bool
    rest: str


@functools.lru_cache(maxsize=4096)
def _read_one(name: str) -> _Said:
    """`imagesTr`, `BraTS_TrainingData`, `Train AD`, `T1-weighted`, `lesion_masks`, `FSL_SEG`: word by word."""
    name = NO_LABEL.sub("", name)
    pieces = re.findall(r"[^\s_.\-]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name))
    plain = [piece.lower() for piece in pieces]
    last = next((word for word in reversed(plain) if word not in PLAIN_FOLDERS), "")
    ends = [SPLIT_FOLDERS[word] for word in (*plain[:1], last) if word in SPLIT_FOLDERS]
    split = ends[0] if len(set(ends)) == 1 else ""
    contrast = next(filter(None, map(words.contrast, plain)), "")
    masks = [bool(words.MASK.fullmatch(word)) for word in plain]
    told = [
        word in PLAIN_FOLDERS or bool(words.contrast(word)) or (split and (word in SPLIT_FOLDERS or word.isdecimal()))
        for word in plain
    ]
    rest = [i for i in range(len(plain)) if not told[i]]
    mask = any(masks[i] or plain[i] in MASK_FOLDERS for i in rest) and all(
        masks[i] or plain[i] in MASK_FOLDERS | OF_MASKS for i in rest
    )
    # FSL_SEG; whole data sets are called segmentation as well
    mask |= bool(masks) and masks[-1] and not plain[-1].startswith("segmentation")
    if mask or not rest:
        return _Said(split, contrast, mask, "")
    return _Said(split, contrast, False, "_".join(pieces[i] for i in rest) if split or contrast else name)
