"""Copies: names that count copies of a picture before a mark or without one; `ldm.data.words` reads those after it."""

import collections
import re
from typing import NamedTuple

from ldm.data import words

MARK = r"(?P<number>\d{1,2})[_\- ](?P<mark>[a-z]+(?:[_\- ][a-z]+){0,3})"
AFTER = re.compile(rf"(?P<start>(?:.*[_\- ])?\d+)[_\- ]{MARK}(?P<rest>)", re.I | re.S)
BEFORE = re.compile(rf"(?P<start>){MARK}[_\- ](?P<rest>.*\d)", re.I | re.S)
PLAIN = re.compile(r"(?P<start>.*\d)[_\- ](?P<number>\d{1,3})", re.S)
MARKS = words.COPY - set("crop cropped resize resized scale scaled orig original".split())  # done to all pictures once


def respell(stems: list[str]) -> dict[str, str]:
    """`p1_80_0_aug`, `p1_80_1_aug` -> `p1_80_aug_0`, `p1_80_aug_1`, and `0_aug_p1_80` -> `aug_0_p1_80`.

    So is `p1_80_0` -> `p1_80_aug_0`, if `p1_80` is there and the slice of somebody whose name has a digit; numbers of
    two digits are those of copies there only if they count from 0 or 1 and the name says who that is (`sub-01_80_11`).

    A number is that of a copy, not a slice, if what is left of most names without number and mark is there as well
    (`p1_80`), or else if all these numbers have one digit. `site1_007_12_aug` stays as it is.

    Args:
        stems: all names, without folders and suffixes.

    Returns:
        How to read those names that count copies.
    """
    times = collections.Counter(stems)
    found = _without_marks(times)
    long = any(len(said.number) > 1 for said in found.values() if not said.sure)
    plain = {
        stem: f"{said.start}_aug_{said.number}"
        for stem, said in found.items()
        if (said.counted if said.sure else not long)
    }
    return {**plain, **_with_marks(times)}


def unclear(stems: list[str]) -> dict[str, "Plain"]:
    """`p1_80_11` beside `p1_80`: the copy 11 of slice 80 of p1, or slice 11 of p1_80, who has a picture of her own?

    Returns:
        All names of that shape whose numbers count from 0 or 1 without a gap; none if all have one digit.
    """
    found = {stem: said for stem, said in _without_marks(collections.Counter(stems)).items() if not said.sure}
    counted = {stem: said for stem, said in found.items() if said.counted}
    return counted if any(len(said.number) > 1 for said in counted.values()) else {}


class Plain(NamedTuple):
    """`p1_80_11`: `start` p1_80, `number` 11; whether p1_80 says whose slice it is (`sure`), and whether all numbers
    after it are of one digit or count from 0 or 1 (`counted`).
    """

    start: str
    number: str
    sure: bool
    counted: bool


def _without_marks(times: collections.Counter) -> dict[str, Plain]:
    """`p1_80_0` beside `p1_80`, a slice of somebody whose name has a digit."""
    matches = {stem: said for stem in times if (said := PLAIN.fullmatch(stem)) and said["start"] in times}
    after, found = collections.defaultdict(list), {}
    for said in matches.values():
        after[said["start"]].append(said["number"])
    for stem, said in matches.items():
        read, numbers = words.read(said["start"]), sorted(map(int, after[said["start"]]))
        if read.z is not None and any(map(str.isdigit, read.person)):
            counted = numbers in ([*range(len(numbers))], [*range(1, len(numbers) + 1)])
            counted |= all(len(number) == 1 for number in after[said["start"]])
            found[stem] = Plain(said["start"], said["number"], read.sure, counted)
    return found


def _with_marks(times: collections.Counter) -> dict[str, str]:
    """`p1_80_0_aug` and `0_aug_p1_80`."""
    found = {}
    for stem in times:
        said = AFTER.fullmatch(stem) or BEFORE.fullmatch(stem)
        if said and MARKS.issuperset(re.split(r"[_\- ]", said["mark"].lower())):
            found[stem] = said
    beside = 2 * sum((said["start"] or said["rest"]) in times for said in found.values()) >= len(found)
    if not (beside or all(int(said["number"]) < 10 for said in found.values())):
        return {}
    spelled = {}
    for stem, said in found.items():
        other = "_".join(filter(None, (said["start"], said["mark"], said["number"], said["rest"])))
        read = words.read(other)
        if read.z is not None and (beside or read.person or times[stem] > 1):  # in several folders
            spelled[stem] = other
    return spelled
