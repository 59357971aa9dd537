"""Copies: names that count copies of a picture before a mark or without one; `ldm.data.words` reads those after it."""

import collections
import re

from ldm.data import words

MARK = r"(?P<number>\d{1,2})[_\- ](?P<mark>[a-z]+(?:[_\- ][a-z]+){0,3})"
AFTER = re.compile(rf"(?P<start>(?:.*[_\- ])?\d+)[_\- ]{MARK}(?P<rest>)", re.I | re.S)
BEFORE = re.compile(rf"(?P<start>){MARK}[_\- ](?P<rest>.*\d)", re.I | re.S)
PLAIN = re.compile(r"(?P<start>.*\d)[_\- ](?P<number>\d{1,3})", re.S)
MARKS = words.COPY - set("crop cropped resize resized scale scaled orig original".split())  # done to all pictures once


def respell(stems: list[str]) -> dict[str, str]:
    """`p1_80_0_aug`, `p1_80_1_aug` -> `p1_80_aug_0`, `p1_80_aug_1`, and `0_aug_p1_80` -> `aug_0_p1_80`.

    So is `p1_80_0` -> `p1_80_aug_0`, if `p1_80` is there and the slice of somebody whose name has a digit; numbers of
    two digits are those of copies there only if the name says who that is (`sub-01_80_11`; see `unclear`).

    A number is that of a copy, not a slice, if what is left of most names without number and mark is there as well
    (`p1_80`), or else if all these numbers have one digit. `site1_007_12_aug` stays as it is.

    Args:
        stems: all names, without folders and suffixes.

    Returns:
        How to read those names that count copies.
    """
    times = collections.Counter(stems)
    plain = {stem: f"{start}_aug_{number}" for stem, (start, number, _) in _without_marks(times).items()}
    for stem in unclear(stems):
        del plain[stem]
    return {**plain, **_with_marks(times)}


def unclear(stems: list[str]) -> list[str]:
    """`p1_80_11` beside `p1_80`: the copy 11 of slice 80 of p1, or slice 11 of p1_80, who has a picture of her own?

    Returns:
        All names of that shape, those of one digit too; none if all have one digit.
    """
    found = {stem: number for stem, (_, number, sure) in _without_marks(collections.Counter(stems)).items() if not sure}
    return list(found) if any(len(number) > 1 for number in found.values()) else []


def _without_marks(times: collections.Counter) -> dict[str, tuple[str, str, bool]]:
    """`p1_80_0` beside `p1_80`, a slice of somebody whose name has a digit -> `p1_80`, 0, whether it says whose."""
    found = {}
    for stem in times:
        said = PLAIN.fullmatch(stem)
        if said and said["start"] in times:
            read = words.read(said["start"])
            if read.z is not None and any(map(str.isdigit, read.person)):
                found[stem] = said["start"], said["number"], read.sure
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
