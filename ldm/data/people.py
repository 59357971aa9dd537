"""People: what names must not say of them, who is whom by the table, and who goes into which split (`carve`)."""

import collections
import re

import numpy as np

from ldm.batches import evenly
from ldm.data import archive, table

SPLITS = ("train", "validate", "test")
LAST_SEED = 2_000_000_000  # as in training
TWO = (
    "but training and validation need two people at least; add another (names such as case_002_slice_0.png or "
    "002_0.png tell people apart, others `--person REGEX`)"
)
HELD_OUT = 0.15  # part of the people that a missing split is carved with


def check(rows: list, shown: str, what: str = "slice") -> None:
    """Refuses names that contradict each other.

    Args:
        rows: of `ldm.data.names.Row`.
        shown: what was opened, for messages.
        what: a row is, "slice" or "volume".

    Raises:
        DataError: naming two people who may be one (`1` beside `001`, `P1` beside `p1`), two labels that differ in case
            only, one person in two splits, one scan under two labels, two files for one slice.
    """
    same: dict = {}
    for name in sorted({row.person for row in rows}):
        other = same.setdefault(_spelled_alike(name), name)
        if other != name:
            raise archive.DataError(
                f"--data {shown}: {other!r} and {name!r} may be one person or two; rename one, or say `--person REGEX`."
            )
    same = {}
    for label in sorted({row.label for row in rows}):
        other = same.setdefault(label.casefold(), label)
        if other != label:
            raise archive.DataError(
                f"--data {shown}: the labels {other!r} and {label!r} differ in case only; rename one."
            )
    splits: dict[str, tuple] = {}
    scans: dict[tuple, tuple] = {}
    slices: dict[tuple, tuple] = {}
    for row in rows:
        first = splits.setdefault(row.person, row)
        if first.split != row.split:
            _refuse_two_splits(shown, row.person, first.entry, row.entry)
        first = scans.setdefault((row.person, row.scan), row)
        if first.label != row.label:
            raise archive.DataError(
                f"--data {shown}: {row.person} is labelled {first.label} and {row.label} ({first.entry!r} and "
                f"{row.entry!r}); keep every scan under one label, or say `--person REGEX`."
            )
        first = slices.setdefault((row.person, row.scan, row.z), row)
        if first is not row:
            raise archive.DataError(
                f"--data {shown}: {first.entry!r} and {row.entry!r} are the same {what} of {row.person}; remove one, "
                "or say who is who with `--person REGEX`."
            )


def _spelled_alike(name: str):
    """What `p01`, `P1` and `p-1` have in common: they may be one person, written in several ways."""
    plain = re.sub(r"[\W_]+", "-", str(table.person(name)).casefold())
    plain = re.sub(r"\d+", lambda found: found[0].lstrip("0") or "0", plain)
    return re.sub(r"(?<=[a-z])-(?=\d)", "", plain)


def with_table(listing, store, path, shown: str, missing=()) -> tuple[tuple[str, ...], dict[str, dict]]:
    """Gives the rows of a listing the labels and people of its table, and returns label names and the other columns.

    Args:
        listing: a `ldm.data.names.Listing`, whose rows are changed.
        store, path: where the table is, see `ldm.data.table.find`.
        shown: what was opened, for messages.
        missing: as in `ldm.data.table.read`.

    Raises:
        DataError: for labels by folder and by a named table, or scans of one person that disagree.
    """
    columns = table.find(store, path, {row.person for row in listing.rows}, missing, listing.notes)
    if not columns and path is None and any(map(archive.is_table, getattr(store, "names", ()))):
        listing.notes.append("labels.csv in there names nobody of this data, and is not used")
    if "person" in columns:
        link(listing, columns.pop("slice", {}), path or "labels.csv")
    labels = {row.label for row in listing.rows} - {""}
    written = columns.pop("label", None)
    if written is not None and labels and path is not None:
        raise archive.DataError(f"--labels {path}: the folders of {shown} are its labels; take the column label out.")
    if written is not None and not labels:
        listing.rows = [row._replace(label=written.get(table.person(row.person), "")) for row in listing.rows]
        labels = set(written.values())  # of all rows, so that a part of the people has the same labels
    if joined := columns.pop("person", None):
        join(listing, {row.person: joined.get(table.person(row.person)) for row in listing.rows})
        columns = table.by_person(columns, joined, path or "labels.csv")
    return tuple(sorted(labels)), columns


def check_people(shown: str, entries: list[str], split: np.ndarray, case: np.ndarray, case_names: dict) -> None:
    """A person in two splits would let a model be tested on a brain that it was trained on."""
    moved = np.flatnonzero((case[1:] == case[:-1]) & (split[1:] != split[:-1]))
    if len(moved):
        _refuse_two_splits(shown, case_names[int(case[moved[0]])], entries[moved[0]], entries[moved[0] + 1])


def _refuse_two_splits(shown: str, person: str, first: str, second: str):
    raise archive.DataError(
        f"--data {shown}: {person} is in two splits ({first!r} and {second!r}); keep every person in one split only."
    )


def check_seed(seed: int) -> None:
    """Raises DataError for a seed that NumPy's generators or, later, tensors do not take."""
    if seed < 0:
        raise archive.DataError(f"--seed {seed} is negative; give 0 or more.")
    if seed > LAST_SEED:
        raise archive.DataError(f"--seed {str(seed)[:20]} is too large; give {LAST_SEED} at most.")


def join(listing, people: dict[str, str | None]) -> None:
    """Gives scans to the people that a table names; what the names took for the person becomes the scan.

    Whoever is in two splits then stays in the last of them only, so that nobody is tested who was trained on.
    """
    known = {name for name in people.values() if name}
    joined = [
        row._replace(person=people[row.person] or row.person, scan="_".join(filter(None, (row.person, row.scan))))
        for row in listing.rows
    ]
    last: dict[str, int] = {}
    for row in joined:
        if row.split:
            last[row.person] = max(last.get(row.person, 0), SPLITS.index(row.split))
    out = [row for row in joined if row.split and row.person in known and SPLITS.index(row.split) < last[row.person]]
    listing.leave_out("the table says that the person is in a later split as well", [row.entry for row in out])
    gone = {row.entry for row in out}
    _rename(listing, joined)
    listing.rows = [row for row in joined if row.entry not in gone]
    listing.notes.append(f"people as the table names them: {len({row.person for row in listing.rows})}")


def link(listing, links: dict, shown) -> None:
    """Gives slices to those whose they are, where stacks change heads; they get the split, label and scan of these.

    Args:
        listing: whose rows and masks are changed.
        links: {case: {first slice: whose stack the slices of that case go on with}}.
        shown: the table, for messages.

    Raises:
        DataError: for somebody who is not there or has several scans, and for two slices that would become one.
    """
    links = {table.person(str(case)): onward for case, onward in links.items()}
    stacks, scans = {}, collections.defaultdict(set)
    for row in sorted(listing.rows, key=lambda row: row.z, reverse=True):
        stacks[table.person(row.person)] = row  # in the end the lowest
        scans[table.person(row.person)].add(row.scan)
    linked, used = [], set()
    for row in listing.rows:
        said = links.get(table.person(row.person), {})
        first = max((z for z in said if z <= row.z), default=None)
        if first is not None:
            used.add((table.person(row.person), first))
            stack = stacks.get(table.person(said[first]))
            if stack is None:
                raise archive.DataError(
                    f"{shown}: nobody is called {said[first]!r}, whose the slices of {row.person} are said to be."
                )
            if several := [s for s in (row, stack) if len(scans[table.person(s.person)]) > 1]:
                raise archive.DataError(
                    f"{shown}: {several[0].person} has several scans, so that its column 'slice' could mean any."
                )
            row = stack._replace(entry=row.entry, z=row.z)
        linked.append(row)
    same: dict[tuple, str] = {}
    for row in linked if links else ():
        if (other := same.setdefault((row.person, row.scan, row.z), row.entry)) != row.entry:
            raise archive.DataError(
                f"{shown}: {other!r} and {row.entry!r} would both be slice {row.z} of {row.person}; mend its column "
                "'slice'."
            )
    if unused := [(who, first) for who, said in links.items() for first in said if (who, first) not in used]:
        some = "case {} from slice {} on".format(*unused[0])
        listing.notes.append(f"rows of the table that move no slice: {len(unused)} (such as {some})")
    moved = sum(new != old for new, old in zip(linked, listing.rows, strict=True))
    if moved:
        _rename(listing, linked)
        listing.rows = linked
        listing.notes.append(f"the table gives {moved} slices to another head than their names do")


def _rename(listing, rows) -> None:
    """Gives the masks of a listing the names that its slices will have, `rows` in the same order."""
    masks = {(row.person, row.scan, row.z): row.entry for row in listing.masks}
    listing.masks = [
        new._replace(entry=masks[old.person, old.scan, old.z])
        for old, new in zip(listing.rows, rows, strict=True)
        if (old.person, old.scan, old.z) in masks
    ]


def number_cases(names) -> dict[str, int]:
    """Person's name -> number: the name itself where all are integers, else the place in sorted order."""
    names = sorted(set(names))
    if all(name.isdecimal() and len(name) <= 10 and int(name) < 2**31 for name in names):
        return {name: int(name) for name in names}
    return {name: place for place, name in enumerate(names)}


def carve(shown: str, split: np.ndarray, case: np.ndarray, label: np.ndarray, seed: int):
    """Fills in missing splits, by person. Returns split (N,) and split -> how it was made.

    Every label that is there in training stays there: its last person is not moved.
    """
    split = np.where(split == "", "train", split)
    made = {name: "archive" if name in split else "missing" for name in SPLITS}
    missing = [name for name in ("test", "validate") if name not in split]
    if not missing or "train" not in split:
        return split, made
    cases, first = np.unique(case[split == "train"], return_index=True)
    if len(cases) < 2 and "validate" in missing:
        raise archive.DataError(f"--data {shown} holds one person only, {TWO}.")
    labels = dict(zip(cases.tolist(), label[split == "train"][first].tolist(), strict=True))
    people = _interleave(cases, label[split == "train"][first], np.random.default_rng(seed)).tolist()
    for name in missing:
        # Training keeps one person, and validation, which is carved after the test split, gets one before it does.
        spare = len(people) - 1 - ("validate" in missing and name == "test")
        count = min(max(1, round(HELD_OUT * len(people))), spare)
        left = collections.Counter(labels[person] for person in people)
        moved = []
        for person in people:
            if len(moved) < count and (labels[person] < 0 or left[labels[person]] > 1):
                moved.append(person)
                left[labels[person]] -= 1
        if moved:
            split = np.where(np.isin(case, moved), name, split)
            people = [person for person in people if person not in set(moved)]
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


def counted(number: int) -> str:
    """ "1 person", "2 people"."""
    return f"{number} {'person' if number == 1 else 'people'}"


def describe(source) -> list[str]:
    """Lines that say what was read from the names of a source: three examples, who is where, what is left out."""
    rows = source.listing.rows
    lines = [f"names: {source.kind}; people told apart by {source.person or 'their names'}"]
    for row in [rows[place] for place in evenly(len(rows), 3)]:
        said = [f"person {row.person}", f"scan {row.scan}" * bool(row.scan), f"slice {row.z}"]
        said += [f"label {row.label}" * bool(row.label), f"split {row.split}" * bool(row.split)]
        lines.append(f"    {row.entry!r}: {', '.join(filter(None, said))}")
    for split in SPLITS:
        for number in np.unique(source.label[source.split == split]).tolist():
            chosen = (source.split == split) & (source.label == number)
            people, scans = (len(np.unique(column[chosen])) for column in (source.case, source.scan))
            name = source.label_names[number] if number >= 0 else "no label"
            more = f" in {scans} scans" if scans > people else ""
            lines.append(f"    {split}, {name}: {counted(people)}{more}, {int(chosen.sum())} slices")
    for reason, left in source.listing.left_out:
        lines.append(f"left out, {reason}: {len(left)}, such as {left[0]!r}")
    lines += [f"note: {note}" for note in source.listing.notes]
    for name, about in source.columns().items():
        known = len({who for who in map(table.person, source.case_names.values()) if who in source.covariates[name]})
        lines.append(f"column {name}: {about['kind']}, known of {known} of {len(source.case_names)} people")
    if source.person == "each":
        lines.append("note: every slice counts as a person, so that one person may be in two splits")
    return lines
