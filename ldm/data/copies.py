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

    So is `p1_80_0` -> `p1_80_aug_0`, if `p1_80` is there and the slice of somebody whose name has a digit.

    A number is that of a copy, not a slice, if what is left of most names without number and mark is there as well
    (`p1_80`), or else if all these numbers have one digit. `site1_007_12_aug` stays as it is.

    Args:
        stems: all names, without folders and suffixes.

    Returns:
        How to read those names that count copies.
    """
    times = collections.Counter(stems)
    return {**_without_marks(times), **_with_marks(times)}


def _without_marks(times: collections.Counter) -> dict[str, str]:
    """`p1_80_0` beside `p1_80`. Numbers of two digits are slices: `site1_007` is a picture beside its own."""
    spelled = {}
    for stem in times:
        said = PLAIN.fullmatch(stem)
        if said and said["start"] in times:
            read = words.read(said["start"])
            if read.z is not None and any(map(str.isdigit, read.person)):
                if len(said["number"]) > 1:
                    return {}
                spelled[stem] = f"{said['start']}_aug_{said['number']}"
    return spelled


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
