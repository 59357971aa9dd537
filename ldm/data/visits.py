"""Visits: which names are scans of one person, seen together.

Rows are those of `ldm.data.names`, `Row(entry, split, person, scan, ...)`.
"""

import collections
import os
import re

from ldm.data import archive, folders, words

HEAD = re.compile(r"(\D*\d+)[\s_.\-]*(.*)", re.DOTALL)  # a name to its first number, and how it goes on
VISIT = re.compile(
    r"base|\bbl\b|follow|pre|post|before|after|first|second|early|late|repeat|retest|scan|visit|session", re.IGNORECASE
)
NUMBERED = re.compile(r"(?:m|v|tp|fu|wk|week|scan|visit|se|ser|series|st|study)[_\- ]?\d+", re.IGNORECASE)
YEAR = re.compile(r"(?:19|20)\d\d")


def is_scan(name: str) -> bool:
    """Whether the name of a folder, or a word, says a date or a visit: `2019-01-01`, `m12`, `followup`."""
    return bool(words.DATE.fullmatch(name) or NUMBERED.fullmatch(name) or VISIT.search(name))


def by_ends(rows: list, sure: set[str], notes: list[str]) -> list:
    """Finds scans by how names end, and says so in `notes`; leaves the entries in `sure` as they are.

    `p1_scan1`, `p1_scan2`, `p2_scan1`, ...: what several people's names have in common after their first number is
    the scan, if most people are there in several ways, or a few beside the one that most are there in (`p1`, `p2`,
    `p3`, `p3_scan2`). Whoever is taken for one person by that is in one split at least.
    """
    rows = _without_first_words(rows, sure, notes)
    names = {row.person for row in rows if row.entry not in sure}
    start = re.match(r"(?:.*[\s_.\-])?", os.path.commonprefix(sorted(names)), re.DOTALL)[0]  # `study2_` says nobody
    parts = {name: (found[1], found[2]) for name in names if (found := HEAD.fullmatch(name[len(start) :]))}
    ends, heads = collections.defaultdict(set), collections.defaultdict(set)
    for head, end in parts.values():
        heads[head].add(end)
        ends[end].add(head)
    if 1 < len(heads) < len(ends) and all(map(YEAR.fullmatch, heads)):
        return _by_years(rows, start, parts, ends, notes)
    if not _are_scans(heads, ends):
        return rows
    some = sorted(filter(None, ends))[:2]
    notes.append(f"{' and '.join(map(repr, some))} in names are taken for scans of one person")
    return [_split(row, start, *parts[row.person]) if row.person in parts else row for row in rows]


def _without_first_words(rows: list, sure: set[str], notes: list[str]) -> list:
    """`baseline_p01`, `followup_p01`, or `V1_S01`, `V2_S01`: the first word is the scan, where there are fewer of them
    than of what comes after it.
    """
    names = {row.person for row in rows if row.entry not in sure}
    found = {name: re.fullmatch(r"([A-Za-z]+\d*)[\s_.\-]+(.*\d.*)", name, re.DOTALL) for name in names}
    found = {name: said.groups() for name, said in found.items() if said and is_scan(said[1])}
    first, rest = (sorted(set(each)) for each in zip(*found.values(), strict=True)) if found else ((), ())
    if not 1 < len(first) < len(rest):
        return rows
    notes.append(f"{first[0]!r} and {first[1]!r} in names are taken for scans of one person")
    return [_split(row, "", *reversed(found[row.person])) if row.person in found else row for row in rows]


def _are_scans(heads: dict[str, set], ends: dict[str, set]) -> bool:
    """Whether names go on after their heads as names of scans do: head -> ends, and end -> heads."""
    if any(re.match(r"[a-z]*", head.lower())[0] in folders.NO_PERSON for head in heads):
        return False
    several = sum(len(each) > 1 for each in heads.values())
    if 2 * several <= len(heads):
        usual = max(sorted(ends), key=lambda end: len(ends[end])) if several else ""
        beside = sum(usual in each for each in heads.values() if len(each) > 1)
        return several > 0 and len(heads) > 2 and 2 * len(ends[usual]) > len(heads) and 2 * beside >= several
    complete = len(set(map(frozenset, heads.values()))) == 1
    shared = len(ends) < len(heads) and all(len(each) > 1 for each in ends.values())
    return shared and (complete or not any(map(str.isdecimal, ends)))


def _by_years(rows: list, start: str, parts: dict, ends: dict[str, set], notes: list[str]) -> list:
    """`2019_001`, `2020_001`: one person in two years, or numbers that begin anew each year? They are taken for one, so
    that nobody is in two splits, and a note says so.
    """
    twice = next((end for end in sorted(ends) if end and len(ends[end]) > 1), None)
    if twice is None:
        return rows
    one, other = sorted(name for name, (_, end) in parts.items() if end == twice)[:2]
    notes.append(
        f"{one!r} and {other!r} are taken for one person in two years; if numbers begin anew each year, say who is who "
        "with `--person REGEX`"
    )
    swapped = {name: (end, head) for name, (head, end) in parts.items() if end}
    return [_split(row, start, *swapped[row.person]) if row.person in swapped else row for row in rows]


def _split(row, start: str, person: str, scan: str):
    return row._replace(person=start + person, scan="_".join(filter(None, (scan, row.scan))))


def by_folders(rows: list, said: dict[str, folders.Folder], shown: str) -> tuple[list, set[str]]:
    """`007/1/80.png`, `007/2019-01-01/80.png`: folders inside that of a person, of which most people have several, are
    scans.

    Args:
        rows: of `ldm.data.names.Row`.
        said: what the folders of each entry say.
        shown: what was opened, for messages; "" for volumes.

    Returns:
        The rows, and the names of these folders.

    Raises:
        DataError: for pictures in `007/LR` and `007/HR`, which may be one slice twice.
    """
    inside: dict[str, tuple[str, ...]] = {}
    several = collections.defaultdict(set)
    for row in rows:
        folder = said[row.entry]
        chain = folder.above + folder.inside
        if folder.person:
            inside[row.entry] = folder.below
        elif row.person in chain:
            inside[row.entry] = chain[len(chain) - chain[::-1].index(row.person) :]
        if row.entry in inside:
            several[row.person].add(inside[row.entry])
    twice = [chains for chains in several.values() if len(chains) > 1]
    called = twice and all(any(map(is_scan, chain)) for chains in twice for chain in chains if chain)
    if 2 * len(twice) <= len(several) and not called:
        return rows, set()
    same: dict = {}
    for row in (row for row in rows if shown and row.entry in inside):
        path = "/".join(inside[row.entry])
        if not re.search(r"\d", path) and not VISIT.search(path):
            other = same.setdefault((row.person, row.scan, row.z), row)
            if inside[other.entry] != inside[row.entry]:
                raise archive.DataError(
                    f"--data {shown}: {other.entry!r} and {row.entry!r} may be one slice twice, or two scans; leave "
                    "one of their folders out, or say who is who with `--person REGEX`."
                )
    named = [
        row._replace(scan="_".join(filter(None, (*inside.get(row.entry, ()), row.scan))))
        if row.entry in inside
        else row
        for row in rows
    ]
    return named, {name for each in several.values() for chain in each for name in chain}
