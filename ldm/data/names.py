"""Names: who is in an archive. Which person, scan, slice, label and split each name speaks of, and what is left out
and why (`understand`).

What one name says of itself is read in `ldm.data.words`, what its folders say in `ldm.data.folders`. Here names are
seen together: a folder is a split, a person, a label or nothing; who nobody can tell apart is refused; nothing is
guessed where two people could become one, or one person two.
"""

import collections
import dataclasses
import re
from typing import NamedTuple

from ldm.data import archive, copies, folders, freesurfer, people, visits, words

STRAYS = 0.1  # up to this part of the pictures may say no person, and is left out; more, and all are refused
MOST_SLICES = 1000  # of a head

OASIS_MASK = re.compile(r"seg_.*_slice_\d+")
PICTURES = set("image images img imgs picture pictures input inputs".split())
CHANNEL = re.compile(r"(.*\d.*)_(000\d)")
TOOL = re.compile("i?y_|[mwrsau]{0,3}[cp][0-6]|[mwrsau]{1,4}")  # prefixes of SPM and CAT12
FIELD = re.compile(  # what registration (ANTs, FSL) and FAST leave beside a volume, and is no picture of a head
    r"(?:.*(?:[_.\-]|subjecttotemplate|templatetosubject))?"
    r"(?:[a-z]*\d*(?:inverse|inv|field)?warp|inversewarped|warp(?:field|coeff?)s?|[a-z]*jac(?:obian)?"
    r"|disp(?:lacement)?field|deformation(?:field)?|bias(?:field)?|mixeltype|xfm)",
    re.IGNORECASE | re.DOTALL,
)
MADE = re.compile(  # endings of other pictures of the same head
    r"(.+?)(?:[_.\-](?:fast|restore|brain|bet|warped|n4|corrected|biascorrected|stripped|skullstripped|denoised|reoriented"
    r"|normali[sz]ed|brainextractionbrain))+",
    re.IGNORECASE | re.DOTALL,
)
SIDES = {64, 96, 112, 128, 160, 192, 224, 240, 256, 299, 320, 384, 448, 512, 1024}  # that pictures often have
UNREAD = tuple(
    ".tif .tiff .bmp .gif .webp .jp2 .npy .npz .mat .h5 .mha .mhd .nrrd .mnc .nii .nii.gz .zip .tar .tar.gz .tgz .7z "
    ".rar".split()
)
OFFER = (
    "give each person a folder with a number (`patient_001/`), say `--person REGEX` (a regular expression with the "
    "group (?P<person>...), and (?P<slice>...) if there is one) or `--person each` to take every slice for itself"
)


class Row(NamedTuple):
    """What is known of one slice, volume or mask: `split` and `label` are "" where the archive does not say."""

    entry: str
    split: str
    person: str
    scan: str
    z: int
    label: str


@dataclasses.dataclass
class Listing:
    """What was understood of an archive.

    Attributes:
        kind: "oasis", "class folders", "flat" or "volumes".
        rows: of the slices, or of the volumes.
        masks: of tissue masks that belong to slices.
        left_out: (reason, names) of what is not used.
        notes: sentences that say what was decided.
        contrast: that is used, if names say several.
    """

    kind: str
    rows: list[Row]
    masks: list[Row] = dataclasses.field(default_factory=list)
    left_out: list[tuple[str, list[str]]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    contrast: str | None = None

    def leave_out(self, reason: str, names: list[str]) -> None:
        if names:
            self.left_out.append((reason, names))


class _Name(NamedTuple):
    """What one name says, and its folders."""

    entry: str
    folder: folders.Folder
    said: words.Words


def understand(
    names: list[str],
    shown: str,
    person: str | None = None,
    contrast: str | None = None,
    volumes: bool = False,
    dangling: list[str] | tuple[str, ...] = (),
) -> Listing:
    """Says who is in a zip, a folder or a list of volumes, from the names alone.

    Args:
        names: of all files, with `/` between folders.
        shown: what was opened, for messages.
        person: None, "each" (every picture is somebody else) or a regular expression that is searched in every name;
            its groups person, scan, slice and label say what they are called.
        contrast: the one to use of several ("t1", "t2", "flair", ...); without it T1, if there is one.
        volumes: whether it is about volumes, not pictures.
        dangling: of links that lead nowhere.

    Raises:
        DataError: one sentence, if the names cannot be meant or nobody can be told apart.
    """
    dangling = sorted(name for name in dangling if archive.is_image(name) or archive.is_volume(name))
    listing, read, course = _read_all(names, shown, volumes)
    masks = [name for name in read if name.folder.mask or (name.said.mask and not course)]
    read = [name for name in read if not (name.folder.mask or (name.said.mask and not course))]
    if not read:
        _refuse_nothing(shown, names, masks, dangling)
    listing.leave_out("links that lead nowhere (to fetch, as by `datalad get`)", dangling)
    read = _with_channels(read, volumes)
    read = _one_contrast(listing, read, contrast, shown)
    if person is not None:
        listing.rows = _by_rule(read, person, shown)
        used = ()
    else:
        if volumes:
            read = _without_what_tools_made(listing, _without_fields(listing, read, shown))
        else:
            read = _without_what_is_beside_images(listing, read)
            _refuse_unclear(read, shown)
        listing.rows, used = _by_names(listing, read, shown)
        # Tissue masks are those of the course archive; what others call a mask may be anything.
        tissue = [name for name in masks if course or OASIS_MASK.fullmatch(_stem(name.entry.rpartition("/")[2]))]
        listing.masks = [_row(name) for name in tissue]
        masks = [name for name in masks if name not in set(tissue)] if len(tissue) < len(masks) else []
    listing.leave_out("masks", [name.entry for name in masks])
    if not course and not any(row.label for row in listing.rows):
        listing.rows = _with_labels(listing.rows, {name.entry: name.folder for name in read}, used)
    if listing.kind == "flat" and any(row.label for row in listing.rows):
        listing.kind = "class folders"
    _leave_out_beside_splits(listing)
    people.check(listing.rows, shown, "volume" if listing.kind == "volumes" else "slice")
    return listing


def _leave_out_beside_splits(listing: Listing) -> None:
    """What is beside the folders train and test is neither: `holdout` must not be trained on."""
    if {"train", "test"} <= {row.split for row in listing.rows}:
        listing.leave_out("in no folder of a split", [row.entry for row in listing.rows if not row.split])
        listing.rows = [row for row in listing.rows if row.split]


def _read_all(names: list[str], shown: str, volumes: bool) -> tuple[Listing, list[_Name], bool]:
    """Reads every name and its folders. Returns an empty listing, the names, and whether it is the course archive."""
    found = list(filter(archive.is_volume if volumes else archive.is_image, names))
    listing, called = Listing("volumes" if volumes else "flat", []), {}
    if volumes:
        _refuse_twins(sorted(found), shown)
        called, more, templates = freesurfer.one_of_each(found)
        listing.leave_out("beside the volume of a FreeSurfer folder that is used", more)
        listing.leave_out("a template of FreeSurfer's", templates)
        found = list(filter({*found}.difference(more, templates).__contains__, found))
    others = sorted({*names} - {*found})
    listing.leave_out("of a type that is not read", [name for name in others if name.lower().endswith(UNREAD)])
    headers = {_stem(name) for name in found if name.lower().endswith(".hdr")}
    lost = [name for name in others if volumes and name.lower().endswith(".img") and _stem(name) not in headers]
    listing.leave_out("without the .hdr that belongs to it", lost)
    paths: dict[str, folders.Folder] = {}
    course = not volumes and any(map(folders.OASIS_FOLDER.search, {name.rpartition("/")[0] for name in found}))
    if course:
        listing.kind = "oasis"
        inside = [name for name in found if folders.OASIS_FOLDER.search(name.rpartition("/")[0])]
        listing.leave_out("beside the folders of slices", sorted(set(found) - set(inside)))
        found = inside
    spelled = {} if volumes else copies.respell([_stem(entry.rpartition("/")[2]) for entry in found])
    read = []
    for entry in found:
        path, _, file = called.get(entry, entry).rpartition("/")
        if path not in paths:
            paths[path] = folders.read_course(path) if course else folders.read(path)
        stem = file if entry in called else _stem(file)
        read.append(_Name(entry, paths[path], words.read(spelled.get(stem, stem), not volumes)))
    return listing, read if volumes else _without_size(read), course


def _stem(file: str) -> str:
    """`case_001_slice_0.nii.png` -> `case_001_slice_0`, `a.nii.gz` -> `a`."""
    stem = file.rpartition(".")[0]
    return stem[:-4] if stem[-4:].lower() == ".nii" else stem


def _without_size(read: list[_Name]) -> list[_Name]:
    """`p1_80_224` and `p1_80_224_224` throughout: 224 is no slice but the side of the pictures."""
    side = read[0].said.z if read else None
    if len({name.said.z for name in read}) > 1 or len(read) < 2 or side not in SIDES:
        return read
    ending = re.compile(rf"(.*?\d.*?)(?:[_\- ]{side}){{1,2}}")
    stems = [ending.fullmatch(_stem(name.entry.rpartition("/")[2])) for name in read]
    return [n._replace(said=words.read(stem[1])) if stem else n for n, stem in zip(read, stems, strict=True)]


def _without_what_is_beside_images(listing: Listing, read: list[_Name]) -> list[_Name]:
    """`p1/targets/80.png` beside `p1/images/80.png`: targets, predictions, overlays, ... are made of images of the same
    name, and are no slices.
    """
    paths = {name.entry.rpartition("/")[0] for name in read}
    if not any(part.lower() in PICTURES for path in paths for part in path.split("/")):
        return read
    images, others = set(), collections.defaultdict(list)
    for name in read:
        parts = [*name.entry.split("/")[:-1], _stem(name.entry.rpartition("/")[2])]
        for k, part in enumerate(parts[:-1]):
            place = (*parts[:k], "", *parts[k + 1 :])
            if part.lower() in PICTURES:
                images.add(place)
            elif not any(map(str.isdigit, part)):
                others["/".join(parts[: k + 1])].append(place)
    made = {folder for folder, places in others.items() if not images.isdisjoint(places)}
    inside = {path for path in paths if any(f"{path}/"[:i] in made for i, char in enumerate(f"{path}/") if char == "/")}
    out = [name.entry for name in read if name.entry.rpartition("/")[0] in inside]
    listing.leave_out("beside images of the same names", out)
    return [name for name in read if name.entry.rpartition("/")[0] not in inside]


def _refuse_unclear(read: list[_Name], shown: str) -> None:
    stems = {name.entry: _stem(name.entry.rpartition("/")[2]) for name in read if not name.folder.person}
    unclear = copies.unclear(list(stems.values()))
    entries = [entry for entry, stem in stems.items() if stem in unclear]
    if len(entries) > STRAYS * len(read):
        start, number, *_ = unclear[stems[entries[-1]]]
        raise archive.DataError(
            f"--data {shown}: {entries[-1]!r} may be copy {number} of the slice {start!r}, or slice {number} of a "
            f"person {start!r}; {OFFER}."
        )


def _without_fields(listing: Listing, read: list[_Name], shown: str) -> list[_Name]:
    """`p01_1Warp`, `p01_1InverseWarp` and other arrays that say where a head was moved, or how bright a coil is."""
    fields = {name.entry for name in read if FIELD.fullmatch(_stem(name.entry.rpartition("/")[2]))}
    if len(fields) == len(read):
        raise archive.DataError(
            f"--data {shown} holds fields of registrations only (such as {read[0].entry!r}); point --data at volumes."
        )
    listing.leave_out("a field of a registration or a bias, no picture", sorted(fields))
    return [name for name in read if name.entry not in fields]


def _without_what_tools_made(listing: Listing, read: list[_Name]) -> list[_Name]:
    """`c1p01`, `mwp01`, ... beside `p01`: SPM names what it makes of a volume as that, with a prefix; others use
    endings, `p01_brain` and `p01_Warped`.
    """
    stems = [_stem(name.entry.rpartition("/")[2]) for name in read]
    there, made = {*stems}, collections.defaultdict(set)
    for stem in stems:
        for end in range(1, 7):
            if stem[end:] in there and TOOL.fullmatch(stem[:end]):
                made[stem[:end]].add(stem)
    all_made = set().union(*made.values())
    usual = set().union(*(each for each in made.values() if 2 * len(each) >= len(there - all_made)))
    usual |= {stem for stem in there if (found := MADE.fullmatch(stem)) and found[1] in there}
    listing.leave_out("made of another volume", [n.entry for n, stem in zip(read, stems, strict=True) if stem in usual])
    return [name for name, stem in zip(read, stems, strict=True) if stem not in usual]


def _with_channels(read: list[_Name], volumes: bool) -> list[_Name]:
    """`BRATS_001_0000`, `BRATS_001_0001` of everybody, as nnU-Net numbers contrasts: they are no people, and no slices
    (`p1_080_0000`).
    """
    stems = [CHANNEL.fullmatch(_stem(name.entry.rpartition("/")[2])) for name in read]
    if not all(stems):
        return read
    channels = collections.defaultdict(set)
    for stem in stems:
        channels[stem[1]].add(stem[2])
    first = next(iter(channels.values()), set())
    if (
        "0000" not in first
        or len(first) < 1 + volumes
        or len(channels) < 2
        or any(c != first for c in channels.values())
    ):
        return read
    said = [words.read(stem[1], not volumes)._replace(contrast=stem[2] * (len(first) > 1)) for stem in stems]
    if not volumes and not all(any(map(str.isdigit, each.person)) for each in said):
        return read  # `hip_001_0000`: somebody's first slice
    return [name._replace(said=each) for name, each in zip(read, said, strict=True)]


def _refuse_nothing(shown: str, names: list[str], masks: list[_Name], dangling: list[str]):
    if masks:
        raise archive.DataError(
            f"--data {shown} holds segmentation masks only (such as {masks[0].entry!r}); point --data at the archive "
            "with the brain slices (keras_png_slices_train, ...)."
        )
    hint = "expected are PNG or JPEG files, or a folder of volumes (NIfTI, MGZ, Analyze, DICOM)"
    inner = next((name for name in names if name.lower().endswith((".zip", *archive.VOLUME_SUFFIXES))), None)
    if dangling:
        hint = f"{dangling[0]!r} and the like are links that lead nowhere: fetch them, as by `datalad get`"
    elif inner:
        hint = f"point --data at {inner!r} inside it (unpacked, where it lies in a zip)"
    raise archive.DataError(f"--data {shown} holds no brain slices; {hint}.")


def _refuse_twins(volumes: list[str], shown: str):
    by_stem = {}
    for name in volumes:
        if (other := by_stem.setdefault(_stem(name), name)) != name:
            raise archive.DataError(f"--data {shown}: {other!r} and {name!r} are one volume twice; remove one of them.")


def _one_contrast(listing: Listing, read: list[_Name], wanted: str | None, shown: str) -> list[_Name]:
    """Keeps one contrast of several. Names without one stay, unless another was asked for."""

    def of(name):
        return name.said.contrast or name.folder.contrast

    counts = collections.Counter(of(name) for name in read)
    there = sorted(set(counts) - {""})
    if there and set(there) <= words.AT_THE_END:  # alone, it is as likely a diagnosis
        return read
    asked, wanted = wanted, (words.contrast(wanted) or wanted.lower()) if wanted else None
    if wanted and wanted not in there:
        raise archive.DataError(
            f"--contrast {asked}: the names in {shown} say {' and '.join(there) or 'no contrast'}; leave it out or "
            "choose one of them."
        )
    if not wanted and len(there) < 2 and not counts[""]:
        return read
    chosen = wanted or ("t1" if "t1" in there else "" if counts[""] else max(there, key=lambda name: counts[name]))
    kept = {chosen} if wanted else {chosen, ""}
    for other in there:
        if other not in kept:
            listing.leave_out(f"contrast {other}", [name.entry for name in read if of(name) == other])
    beside = {_place(name) for name in read if of(name) == chosen and listing.kind == "volumes"}
    unsaid = {name.entry for name in read if chosen and not of(name) and _place(name) in beside}
    listing.leave_out(f"of no known contrast, beside {chosen} of the same person", sorted(unsaid))
    if chosen and len(there) > 1:
        listing.contrast = chosen
        listing.notes.append(f"of the contrasts {', '.join(there)}, {chosen} is used (--contrast chooses another)")
    return [name for name in read if of(name) in kept and name.entry not in unsaid]


def _place(name: _Name) -> tuple[str, str]:
    return name.entry.rpartition("/")[0], name.said.person


def _by_rule(read: list[_Name], rule: str, shown: str) -> list[Row]:
    """Rows as `--person` says."""
    if rule == "each":
        return [Row(n.entry, n.folder.split, n.entry, "", n.said.z or 0, "") for n in read]
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise archive.DataError(f"--person {rule!r} is no regular expression ({error}).") from error
    if "person" not in pattern.groupindex:
        raise archive.DataError(
            f"--person {rule!r} has no group (?P<person>...): say which part of a name is the person."
        )
    rows = []
    for name in read:
        found = pattern.search(name.entry)
        if not found or not found["person"]:
            raise archive.DataError(
                f"--person {rule!r} finds nobody in {name.entry!r} of {shown}; mend the expression."
            )
        groups = {key: value or "" for key, value in found.groupdict().items()}
        number = groups.get("slice", "" if name.said.z is None else str(name.said.z))
        if number and not (number.isdecimal() and len(number) <= words.LONGEST):
            raise archive.DataError(f"--person {rule!r}: the slice {number!r} of {name.entry!r} is no number.")
        scan, label = groups.get("scan", ""), groups.get("label", "")
        rows.append(Row(name.entry, name.folder.split, groups["person"], scan, int(number or 0), label))
    return rows


def _row(name: _Name, person: str | None = None, scan: str = "") -> Row:
    said, folder = name.said, name.folder
    person = said.person if person is None else person
    outer = "" if folder.scan in said.scan else folder.scan
    scan = "_".join(filter(None, (outer, scan, said.scan)))
    return Row(name.entry, folder.split, person, scan, said.z or 0, "")


def _by_names(listing: Listing, read: list[_Name], shown: str) -> tuple[list[Row], set[str]]:
    """Rows as the names say, and the names of folders that are people.

    A keyword or a known pattern says who it is; else a folder with two digits or more, if the file says nobody or the
    same people in each of these folders; else the file. One or two words without digits for a whole folder are nobody.
    """
    numbered = _numbered_folders(read)
    seen = collections.defaultdict(set)
    for name, folder in zip(read, numbered, strict=True):
        if folder and not name.said.sure and name.said.person:
            seen[name.said.person].add(folder)
    recur = any(len(found) > 1 for found in seen.values())
    said_in = collections.defaultdict(set)  # of volumes: bert/mri/brain.mgz and others of that name
    for name in read if listing.kind == "volumes" else ():
        said_in[name.said.person].add(name.folder.above + name.folder.inside)
    members = collections.defaultdict(set)
    for name in read:
        members[name.entry.rpartition("/")[0]].add(name.said.person)
    sizes = collections.Counter(name.entry.rpartition("/")[0] for name in read)
    rows, nobody, used, sure = [], [], set(), set()
    for name, folder in zip(read, numbered, strict=True):
        said, path = name.said, name.entry.rpartition("/")[0]
        vague = not any(map(str.isdigit, said.person))
        sure |= {name.entry} if name.folder.person or said.sure else set()
        if name.folder.person:
            other = "" if vague or said.person == name.folder.person else said.person
            rows.append(_row(name, name.folder.person, other))
        elif said.sure:
            rows.append(_row(name))
        elif folder and (vague or recur):
            used.add(folder)
            own = words.read_folder(folder)  # p01_20190101
            dated = bool(own.scan) and any(map(str.isdigit, own.person))
            rows.append(
                _row(name, own.person if dated else folder, "_".join(filter(None, (own.scan * dated, said.person))))
            )
        elif (listing.kind == "volumes" and (name.folder.inside + name.folder.above)
              and (not said.person or (vague and len(said_in[said.person]) > 1))):  # fmt: skip
            # sub_a/t1.nii, bert/mri/brain.mgz
            chain = name.folder.above + name.folder.inside
            rows.append(_row(name, next(filter(re.compile(r"\d").search, reversed(chain)), chain[-1]), said.person))
            used.add(rows[-1].person)
        elif not said.person or (vague and len(members[path]) < 3 and sizes[path] > len(members[path])):
            nobody.append(name.entry)
        else:
            rows.append(_row(name))
    inside = {name.entry: name.folder for name in read}
    rows, scans = visits.by_folders(rows, inside, shown if listing.kind != "volumes" else "")
    rows = visits.by_ends(rows, sure, listing.notes)
    used |= scans
    strays = _strays(read, rows) if listing.kind != "volumes" else set()
    by_lot = _numbered_by_lot(rows, sure)
    nobody += sorted(by_lot)
    rows = [row for row in rows if row.entry not in strays | by_lot]
    if not rows or len(nobody) > STRAYS * len(read):
        raise archive.DataError(
            f"--data {shown}: names such as {nobody[0]!r} do not say whose picture it is, so that one person could be "
            f"in two splits; {OFFER}."
        )
    listing.leave_out("the name says no person", nobody + sorted(strays))
    return rows, used


def _numbered_folders(read: list[_Name]) -> list[str]:
    """Of each name the innermost folder that has two digits or more side by side, as `001` and `TCGA_01`, or is called
    as others that have (`p7` beside `p10`), but is no date and not `fold_01`; "" where there is none.
    """
    found, wide = {name.folder: "" for name in read}, set()
    for folder in found:
        wide |= {re.sub(r"\d+", "#", name) for name in folder.above + folder.inside if re.search(r"\d\d", name)}
    sides = {name for folder in found for name in folder.above + folder.inside if name.isdecimal() and len(name) > 1}
    sides = sides if all(int(name) in SIDES for name in sides) else set()  # `256/` beside `128/`
    for folder in found:
        numbered = [
            name
            for name in folder.above + folder.inside
            if name not in sides
            and re.sub(r"\d+", "#", name) in wide
            and re.match(r"[a-z]*", name.lower())[0] not in folders.NO_PERSON
        ]
        scans = [name for name in numbered if visits.is_scan(name)]
        found[folder] = ([name for name in numbered if name not in scans] or scans or [""])[-1]
    return [found[name.folder] for name in read]


def _strays(read: list[_Name], rows: list[Row]) -> set[str]:
    """Pictures such as `cover.png`: no number in the name, where nearly all others have one; or a word and a number
    in a folder above those where nearly all others are.
    """
    paths = {name.entry.rpartition("/")[0] for name in read}
    above = {path[:i] for path in paths for i, char in enumerate(path) if char == "/"}
    above |= {""} if len(paths) > 1 else set()
    found = set()
    for name in read:
        path, _, file = name.entry.rpartition("/")
        vague = not name.said.sure and not any(map(str.isdigit, name.said.person))
        if vague and (not any(map(str.isdigit, file)) or path in above):
            found.add(name.entry)
    found &= {row.entry for row in rows}
    return found if len(found) <= max(STRAYS * len(read), 2) and 2 * len(found) < len(read) else set()


def _numbered_by_lot(rows: list[Row], sure: set[str]) -> set[str]:
    """`p1_80_0_6071`, alone of its person: Keras ends the names of augmented pictures with a number drawn by lot."""
    alone = collections.Counter(row.person for row in rows)
    return {row.entry for row in rows if row.z >= MOST_SLICES and alone[row.person] == 1 and row.entry not in sure}


def _with_labels(rows: list[Row], said: dict[str, folders.Folder], used: set[str]) -> list[Row]:
    """The label of each row: its innermost folder that is no split and no person, if such folders hold several people.

    A folder above the split is a label only if there are two of them at least.
    """

    def outer(chain, below):
        """The folders outside that of the person; no dates."""
        chain = chain[: len(chain) - len(below)] if below and chain[-len(below) :] == below else chain
        end = next((place for place, name in enumerate(chain) if name in used), len(chain))
        return [name for name in chain[:end] if not words.DATE.fullmatch(name)]

    inside = [outer(said[row.entry].inside, said[row.entry].below) for row in rows]
    above = [outer(said[row.entry].above, said[row.entry].below) for row in rows]
    for chains, least in ((inside, 1), (above, 2)):
        longer = {tuple(chain[:length]) for chain in chains for length in range(len(chain))}
        chains = [[] if tuple(chain) in longer else chain for chain in chains]  # a folder of labels is none
        while any(chains):
            people = collections.defaultdict(set)
            for row, chain in zip(rows, chains, strict=True):
                if chain:
                    people[chain[-1]].add(row.person)
            several = any(len(members) > 1 for members in people.values())
            if several and len(people) >= least:
                return [row._replace(label=chain[-1] if chain else "") for row, chain in zip(rows, chains, strict=True)]
            deepest = max(map(len, chains))
            for chain in chains:
                if len(chain) == deepest:
                    chain.pop()
    return rows
