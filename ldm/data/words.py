"""Words: what one file or folder name says of itself: person, scan, slice, contrast, or that it is a mask.

A name is cut into tokens at every `_`, `-`, `.` and blank, and before a keyword with a number (`sub01run2`). Some
tokens are keywords wherever they stand (`sub`, `patient`; `ses`, `run`; `slice`, `z`; `t1`; `mask`), most of them with
a value in the same token or the next. Dates are scans. Picture sizes and marks of copies or augmentation are neither
person nor slice. What is left is the person, but for the last number, which is the slice.

    sub-01_ses-02_T1w         person sub-01, scan ses-02, contrast t1
    OAS1_0028_MR1_mpr-3_100   person OAS1_0028, scan MR1_mpr-3, slice 100
    patient_007_z12_flip      person patient_007, scan flip, slice 12
    200000_78                 person 200000, slice 78
"""

import functools
import re
from typing import NamedTuple

KNOWN = re.compile(  # OASIS, ADNI, BraTS since 2023 (what follows is the visit), MIRIAD
    r"(?<![A-Za-z0-9])(?:OAS[12]_\d{4}|OAS[34]\d{4}|\d{3}[_-]S[_-]\d{4,5}|BraTS-[A-Z]+-\d{5}|miriad_\d{3})(?![0-9])",
    re.IGNORECASE,
)
LONI = re.compile(r"([A-Za-z]+_[A-Za-z0-9]+)_(?:MR|PT)_.*_\d{14,}_S\d+_I\d+")  # AIBL, PPMI: <study>_<person>_MR_...
HASH = re.compile(
    r"(?=.*\d)[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}|(?=.*\d)(?=.*[a-f])[0-9a-f]{16,}", re.IGNORECASE
)
DAY = r"(?<!\d)(?:19|20)\d\d(?P<gap>[-_.]?)(?:0[1-9]|1[0-2])(?P=gap)(?:0[1-9]|[12]\d|3[01])"
DATE = re.compile(DAY + r"(?:[-_T ]\d\d([-_.:])\d\d\2\d\d(?:\.\d+)?)?(?!\d)")  # and perhaps the time of day
MOMENT = re.compile(  # alone in a name, but for such words and a `(2)`; 000059 after a day may count slices
    r"(?:(?:screen ?shot|whatsapp|bildschirmfoto|photo|img|pxl)\D*)?" + DAY + r"\D{1,4}"
    r"(?:(?:[01]\d|2[0-3])([-_.:])[0-5]\d\2[0-5]\d|(?:0[1-9]|1\d|2[0-3])(?:[0-5]\d){2})"
    r"(?:\.\d+|-?\d{3})?(?:\D*|[^\d(]*\(\d+\))",
    re.IGNORECASE,
)
NUMBERED = re.compile(r"(.*[_\- ])([0-9]{1,9})", re.DOTALL)
PARTS = re.compile(r"([a-z]*)(\d*)([a-z0-9]*)")  # of a token: a word, a number, and what comes after it
PERSON = {"sub", "subj", "subject", "patient", "pat", "case", "person", "participant", "volunteer"}
SCAN = {
    "ses",
    "sess",
    "session",
    "run",
    "mpr",
    "acq",
    "visit",
    "timepoint",
    "mr",
    "task",
    "space",
    "desc",
    "rec",
    "echo",
}
SLICE = {word: rank for rank, word in enumerate(("slice", "slices", "slc", "z", "img", "image"))}
KEYWORD = "|".join(sorted(PERSON | SCAN | set(SLICE), key=len, reverse=True))
TOKEN = re.compile(rf"{DATE.pattern}|\([^()]*\)|[^\s_.,()\-]+?(?=[\s_.,()\-]|$|(?<=\d)(?:{KEYWORD})\d)", re.IGNORECASE)
COPY = set(
    "copy copies kopie copia of duplicate dup aug augmented augmentation flip flipped hflip vflip fliplr flipud mirror "
    "mirrored rot rotate rotated rotation noise noisy gauss gaussian blur blurred sharpen sharpened bright brightness "
    "contrast gamma clahe shift shifted translate translated shear sheared affine zoom zoomed crop cropped scale "
    "scaled elastic jitter resized resize orig original deg degrees".split()
)
MASK = re.compile(r"(?:.*(?:mask|seg)s?|segm|segmentations?|msk|aparc|wmparc|labelmaps?)\d*")
MASK_AT_AN_END = set(
    "label labels roi gt groundtruth truth lesion lesions annotation manual pve csf gm wm ribbon filled".split()
)
CONTRASTS = {
    name: re.compile(pattern)
    for name, pattern in {
        "t1": "(?:3d|ax|cor|sag)?t1(?:wi?|n|pre)?",
        "t1c": r"(?:3d|ax|cor|sag)?t1w?(?:ce?|\+c|c\+|gd|post)",
        "t2": "(?:3d|ax|cor|sag|inplane)?t2(?:wi?)?",
        "flair": "(?:3d|ax|cor|sag)?(?:t2)?flair|t2f",
        "pd": "pdw",
        "t2star": r"t2(?:star|\*)w?",
        "angio": "angio|mra|tof",
        **{word: word for word in ("dwi", "dti", "adc", "swi", "bold", "asl", "func", "fmap", "perf")},
    }.items()
}
ENHANCED = {"c", "ce", "gd", "gad", "post", "contrast", "enhanced"}  # after T1
AT_THE_END = {"pd", "pet", "ct", "fa", "qsm"}  # contrasts, which may as well be a diagnosis or somebody's initials
SIZE = re.compile(r"\d{2,4}x\d{2,4}(?:x\d{1,4})?(?:px)?|\d{2,4}px")
ROBOFLOW = re.compile(r"_(?:png|jpe?g)\.rf\.[0-9a-f]+$")
LONGEST = 9  # digits of a slice index; ten and more are dates or identifiers


class Words(NamedTuple):
    """What a name says; "" and None where it says nothing."""

    person: str = ""
    sure: bool = False  # whether a keyword or a known pattern says who it is
    scan: str = ""
    z: int | None = None
    contrast: str = ""
    mask: bool = False


def contrast(token: str) -> str:
    """What a token calls a contrast: `T1w` is t1; "" for other tokens."""
    token = token.lower()
    return next((name for name, pattern in CONTRASTS.items() if pattern.fullmatch(token)), "")


def read(stem: str, sliced: bool = True) -> Words:
    """Reads a name without its suffix.

    Args:
        stem: of a file, or the name of a folder.
        sliced: whether the file is one slice; a volume has no slice index.
    """
    if sliced and HASH.fullmatch(stem):  # a number that somebody has drawn by lot
        return Words()
    if sliced and MOMENT.fullmatch(stem):  # says when it was made, and nobody
        return Words(scan=stem)
    numbered = NUMBERED.fullmatch(stem) if sliced else None
    stack = _read_stack(numbered[1], len(numbered[2])) if numbered else None
    return stack._replace(z=int(numbered[2])) if stack else _Reader(stem, sliced).words()


@functools.lru_cache(maxsize=2**16)
def _read_stack(start: str, digits: int) -> Words | None:
    """Reads all names at once that differ in a last number of so many digits; None where that number is no slice."""
    one, other = (_Reader(start + digits * digit, sliced=True).words() for digit in "07")
    return one if one.z == 0 and one._replace(z=other.z) == other and other.z == int(digits * "7") else None


class _Reader:
    """Gives every token of one name its meaning: `role[i]` is "person", "scan", "slice", "" (not yet known), ..."""

    def __init__(self, stem: str, sliced: bool):
        self.stem, self.sliced = ROBOFLOW.sub("", stem), sliced
        found = list(TOKEN.finditer(self.stem))
        self.spans = [match.span() for match in found]  # of what is left of each token
        self.ends = [match.end() for match in found]
        self.text = [match[0] for match in found]
        self.parts = [PARTS.fullmatch(text.lower()) for text in self.text]
        self.role = [""] * len(found)
        self.sure, self.z, self.contrast, self.mask = False, None, "", False

    def words(self) -> Words:
        self._known_pattern()
        self._marks()
        self._keywords(SCAN, "scan")
        if self.sliced:
            self._slice_keywords()
        self._person_keyword()
        if self.sliced and self.z is None:
            self._last_number()
        person, scan = self._person()
        return Words(person, self.sure, scan, self.z, self.contrast, self.mask)

    def free(self):
        """Places of tokens whose meaning is not known yet."""
        return [i for i, role in enumerate(self.role) if not role]

    def word(self, i: int) -> str:
        """The word that a token starts with, if nothing but a number follows it; "" otherwise."""
        parts = self.parts[i]
        return parts[1] if parts and not parts[3] else ""

    def number(self, i: int) -> str:
        """The digits that a token consists of, up to LONGEST; "" for other tokens."""
        return self.text[i] if self.text[i].isdecimal() and len(self.text[i]) <= LONGEST else ""

    def _known_pattern(self):
        if found := KNOWN.search(self.stem) or LONI.match(self.stem):
            first, last = found.span(found.re.groups)
            for i, (start, end) in enumerate(self.spans):
                if start >= first and end <= last:
                    self.role[i], self.sure = "person", True

    def _marks(self):
        """Sizes, copies, contrasts, masks: they are what they are wherever they stand (but `PD` only at the end)."""
        ends = {0, max((i for i, text in enumerate(self.text) if re.search("[A-Za-z]", text)), default=0)}
        numbers = {i for i in self.free() if self.number(i)}
        for i in self.free():
            if self.role[i]:
                continue
            text, word = self.text[i].lower(), self.word(i)
            if SIZE.fullmatch(text):
                self.role[i] = "size"
            elif DATE.fullmatch(text) and self._others_with_digits(i) > self.sliced:
                self.role[i] = "scan"
            elif named := contrast(text) or (text in AT_THE_END and i == len(self.text) - 1 and text):
                self.role[i], self.contrast = "contrast", self._more_of(named)
                if i + 1 < len(self.text) and named == "t1" and self.text[i + 1].lower() in ENHANCED:
                    self.role[i + 1], self.contrast = "contrast", "t1c"
            elif text.startswith("("):
                self.role[i] = "copy"
            elif word in COPY or text.lstrip("0123456789") in COPY:  # aug, aug0, 0aug
                self._copy(i, numbers)
            elif MASK.fullmatch(text.rpartition("+")[2]) or ((word in MASK_AT_AN_END or text == "wmh") and i in ends):
                self.role[i], self.mask = "mask", True
            elif text == "ot" and f".{self.text[i]}." in self.stem:  # `VSD.Brain.XX.O.OT.345967`, a lesion of ISLES
                self.role[i], self.mask = "mask", True
        if self.contrast == "t1" and re.search("(?:^|_)ce-", self.stem):  # as BIDS says it: ce-gadolinium_T1w
            self.contrast = "t1c"

    def _more_of(self, named: str) -> str:
        """Of several contrasts the last one, but `FLAIR_T2` and `T2_FLAIR` are both FLAIR."""
        return "flair" if {self.contrast, named} == {"flair", "t2"} else named

    def _copy(self, i: int, numbers: set[int]) -> None:
        """`aug_3`, and `shift_5_10` at the end: the numbers are the mark's, if the slice has another one."""
        self.role[i], last = "copy", i
        while last + 1 in numbers:
            last += 1
        taken = set(range(i + 1, (last if last == len(self.text) - 1 else i + 1) + 1)) & numbers
        taken = taken if len(taken) < len(numbers) else {i + 1} & numbers
        if len(taken) < len(numbers):
            for k in taken:
                self.role[k] = "copy"
            numbers -= taken

    def _others_with_digits(self, i: int) -> int:
        return sum(any(map(str.isdigit, text)) for k, text in enumerate(self.text) if k != i and not self.role[k])

    def _keywords(self, words, role):
        """Keywords with their values: `run-1`, `run_1`, `run1`."""
        for i in self.free():
            if self.role[i] or self.word(i) not in words:
                continue
            if self.parts[i][2]:
                self.role[i] = role
            elif i + 1 < len(self.text) and not self.role[i + 1]:
                bound = self.stem[self.spans[i][1] : self.spans[i + 1][0]] == "-"
                last = self.sliced and not any(map(self.number, range(i + 2, len(self.text))))
                # `p1_MR_80` is slice 80 of a magnetic resonance image
                if bound or (self.number(i + 1) and not (last and self.word(i) == "mr")):
                    self.role[i] = self.role[i + 1] = role

    def _slice_keywords(self):
        """The slice after a keyword; of several, that of the first in SLICE, and the others belong to the scan."""
        ranked = []
        for i in self.free():
            word = self.word(i)
            if word not in SLICE:
                continue
            if self.parts[i][2]:
                ranked.append((SLICE[word], i, i, self.parts[i][2]))
            elif i + 1 < len(self.text) and not self.role[i + 1] and self.number(i + 1):
                ranked.append((SLICE[word], i, i + 1, self.text[i + 1]))
        ranked = [item for item in sorted(ranked) if len(item[3]) <= LONGEST]
        for rank, (_, first, last, digits) in enumerate(ranked):
            self.role[first] = self.role[last] = "scan" if rank else "slice"
            self.z = self.z if rank else int(digits)

    def _person_keyword(self):
        """`sub-01`, `patient007`, `case_ann_b`: the value ends with the first token that has a digit."""
        if self.sure:
            return
        for i in self.free():
            if self.word(i) not in PERSON:
                continue
            if self.parts[i][2]:
                self.role[i], self.sure = "person", True
                return
            value = []
            for k in range(i + 1, len(self.text)):
                if self.role[k] or (value and self.number(k) and self.sliced and self.z is None):
                    break
                value.append(k)
                bound = self.stem[self.spans[k - 1][1] : self.spans[k][0]] == "-"
                if any(char.isdigit() for char in self.text[k]) or (k == i + 1 and bound):
                    break
            if value:
                # the course archive calls its people by the number alone
                named = value if self.text[i].lower() == "case" else [i, *value]
                self.role[i] = "keyword"
                for k in named:
                    self.role[k] = "person"
                self.sure = True
                return

    def _last_number(self):
        """The slice is the last number that is a token of its own, else the last that a token ends or begins with."""
        numbers = [i for i in self.free() if self.number(i)]
        if numbers:
            self.z = int(self.text[numbers[-1]])
            self.role[numbers[-1]] = "slice"
            return
        for i in reversed(self.free()):
            found = re.search(r"\d+$", self.text[i][-LONGEST - 1 :]) or re.match(r"\d+", self.text[i][: LONGEST + 1])
            if found and len(found[0]) <= LONGEST:
                self.z = int(found[0])
                start, end = self.spans[i]
                if self.sure:  # the rest of the token says nothing
                    self.role[i] = "slice"
                elif self.text[i].endswith(found[0]):
                    self.spans[i] = start, end - len(found[0])
                else:
                    self.spans[i] = start + len(found[0]), end
                return

    def _person(self):
        """(person, scan) from the tokens: what a keyword says, else whatever is left over."""
        if self.sure:
            chosen = [i for i, role in enumerate(self.role) if role == "person"]
            others = ("", "scan", "copy")
        else:
            chosen = self.free()
            if "slice" in self.role:  # what stands before the slice; after it, if nothing does
                place = self.role.index("slice")
                before = [i for i in chosen if i < place]
                # `img1_80`: is 80 the slice of person 1, or is it the other way round?
                unclear = self.word(place) in ("img", "image") and all(map(self.number, chosen))
                chosen = before or ([] if unclear else chosen)
            others = ("scan", "copy")
        taken = set(chosen)
        rest = [i for i, role in enumerate(self.role) if role in others and i not in taken]
        return self._spell(chosen), self._spell(rest)

    def _spell(self, places) -> str:
        """Tokens as they stand in the name; those that are no neighbours are joined by `_`."""
        out, before = "", None
        for i in places:
            start, end = self.spans[i]
            if start == end:
                continue
            gap = self.stem[self.ends[before] : start] if before is not None and before == i - 1 else "_"
            out += (gap if out else "") + self.stem[start:end]
            before = i
        return out.strip("_-., ")


@functools.lru_cache(maxsize=4096)
def read_folder(name: str) -> Words:
    """Reads the name of a folder: it names a person or a scan only with a keyword and digits, or in a known pattern."""
    words = read(name, sliced=False)
    return words if words.sure and any(char.isdigit() for char in words.person) else words._replace(sure=False)
