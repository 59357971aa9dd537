"""What a table says of people: `labels.csv`, a row for each person, a column for each thing known of them (label, age,
sex, ...).
"""

import csv
import io
import re

import numpy as np

from ldm.data import archive, words

UNKNOWN = ("", "na", "nan", "null", "nil", "none", "unknown", "missing", "notavailable")  # letters and digits of a cell
PERSON_WORD = re.compile(rf"(?:{'|'.join(sorted(words.PERSON))})[-_ ]?(?=\d)", re.IGNORECASE)
MOST_COLUMNS = 1000
MIXED = 0.4  # a column with fewer texts than this part of its cells, beside numbers, is meant to be numbers;
SPOILED = 0.5  # and one with texts in up to this part, if there are digits in them
LARGEST = 1e18  # no number of a column is larger: float32 holds its square


def person(name: str):
    """A person's name as tables and archives both may write it: "1", "001" and "sub-01" are the same."""
    name = name.strip()
    number = name[found.end() :] if (found := PERSON_WORD.match(name)) else name
    return int(number) if number.isdecimal() and len(number) <= 18 else name


def read(data: bytes, missing=()) -> dict[str, dict]:
    """A CSV table with a column `case` and others.

    Beside a column `person` there may be one called `slice`. A row with a number in it says nothing of the case but
    whose its slices are from that index on: stacks can change heads (`ldm.data.repeats`).

    Args:
        data: the file, UTF-8.
        missing: texts that mean "unknown" in this table, beside UNKNOWN; -4 stands for -4.0 as well.

    Returns:
        Column -> {person: what it says}; what is unknown is left out. "slice" -> {person: {first slice: whose}}.

    Raises:
        ValueError: one clause that says what is wrong with the table.
    """
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig")), strict=True)
        names, lines = [name.strip() for name in reader.fieldnames or ()], list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"is not a CSV table ({error}); write it as UTF-8 text, and close every quote") from error
    if b"\0" in data:
        raise ValueError("holds zero bytes, which no text has; write it as UTF-8")
    if len(names) > MOST_COLUMNS:
        raise ValueError(f"has {len(names):,} columns (limit {MOST_COLUMNS}); keep those that say something of people")
    if "case" not in names or len(names) < 2:
        begins = f"; it begins {','.join(names)[:60]!r}" if names else ""
        raise ValueError(f"needs a column case and another, such as label, separated by commas{begins}")
    plain = [name.casefold() for name in names]
    if twice := [name for place, name in enumerate(names) if name and name.casefold() in plain[:place]]:
        raise ValueError(f"has the column {twice[0]!r} twice; keep one")
    found = {name: {} for name in names if name not in ("", "case")}
    links = "slice" in found and "person" in found
    rows = {}
    for line in lines:
        if None in line:
            raise ValueError(f"has a row with more cells than columns (case {line[reader.fieldnames[0]]}); mend it")
        cells = [" ".join((line[written] or "").split()) for written in reader.fieldnames]  # one line each
        row = dict(zip(names, cells, strict=True))
        who = person(row.pop("case"))
        if links and (first := row.pop("slice")):
            found["slice"].setdefault(who, {})[_first_slice(first, who)] = _whose(row, first, who)
            continue
        if rows.setdefault(who, row) != row:
            raise ValueError(f"has two rows for case {who} that disagree; keep one")
        for name, value in row.items():
            if name and not _is_missing(value, missing):
                found[name][who] = value
    if lines and not any(found.values()):
        raise ValueError(
            "says nothing of anybody, as all its cells are empty or stand for unknown; fill it in, or take it out"
        )
    for name, column in found.items():
        if not (name == "person" or (name == "slice" and links)):
            _check_column(name, column)
    return found


def _first_slice(cell: str, who) -> int:
    if not (cell.isdecimal() and len(cell) <= words.LONGEST):
        raise ValueError(f"has {cell!r} in the column 'slice' of case {who}; write the index of the first slice")
    return int(cell)


def _whose(row: dict[str, str], first: str, who) -> str:
    """Who goes on from a slice: the one cell that such a row has."""
    others = {name: value for name, value in row.items() if name != "person" and value}
    if others or not row["person"]:
        raise ValueError(
            f"has a row for case {who} from slice {first} on, which must say the person and nothing else; mend it"
        )
    return row["person"]


def _check_column(name: str, column: dict) -> None:
    """Refuses what is almost a column of numbers, and values that differ in case only.

    Raises:
        ValueError: naming the cells.
    """
    texts = {who: value for who, value in column.items() if not abs(_number(value)) < LARGEST}
    spoiled = any(char.isdigit() for value in texts.values() for char in value)
    spoiled |= any(map(_is_number, texts.values()))  # infinity, 1e300
    few = len(texts) < MIXED * len(column) or (spoiled and len(texts) <= SPOILED * len(column))
    if texts and few and name != "label":
        some = ", ".join(f"{value!r} of case {who}" for who, value in list(texts.items())[:3])
        raise ValueError(
            f"has numbers in the column {name!r}, but also {some}; write numbers, or leave the cells empty"
        )
    comma = next((item for item in texts.items() if re.fullmatch(r"-?\d+,\d+", item[1])), None)
    if comma and name != "label":
        raise ValueError(
            f"has {comma[1]!r} of case {comma[0]} in the column {name!r}; write numbers with a point, not a comma"
        )
    same: dict[str, str] = {}
    for value in texts.values():
        if (other := same.setdefault(value.casefold(), value)) != value:
            raise ValueError(f"writes both {other!r} and {value!r} in the column {name!r}; choose one")


def _is_missing(value: str, missing) -> bool:
    same = (value.lower() == text.strip().lower() or _number(value) == _number(text) for text in missing)
    return re.sub(r"[\W_]", "", value.lower()) in UNKNOWN or any(same)


def _number(value: str) -> float:
    """A number; NaN, which equals nothing, for other texts."""
    return float(value) if _is_number(value) else float("nan")


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return "_" not in value  # Python takes 6_1 for 61


def by_person(columns: dict[str, dict], people: dict, shown) -> dict[str, dict]:
    """What a table says of scans, as said of the people scanned: numbers are averaged, the rest must agree.

    Args:
        columns: column -> {scan: what it says}.
        people: {scan: person}; a scan that is missing is a person of its own.
        shown: the table, for messages.

    Raises:
        DataError: two scans of one person that disagree.
    """
    joined = {}
    for name, column in columns.items():
        values: dict = {}
        for scan, value in column.items():
            values.setdefault(person(people[scan]) if scan in people else scan, []).append(value)
        joined[name] = {}
        for who, said in values.items():
            if len(set(said)) > 1 and not all(map(_is_number, said)):
                raise archive.DataError(f"{shown}: the scans of {who} disagree in the column {name!r}; keep one value.")
            joined[name][who] = (
                said[0] if len(set(said)) == 1 else repr(float(np.mean([float(value) for value in said])))
            )
    return joined


def find(store, path, people: set[str], missing=(), notes=None) -> dict[str, dict]:
    """The table named, else `labels.csv` in the archive; {} without any.

    Args:
        store: of the archive.
        path: of the table, or None.
        people: names that the archive has for its people.
        missing: as in `read`.
        notes: a list to which a sentence is added where one of several tables is taken; or None.

    Returns:
        As `read`; {} as well where no table in the archive knows any of the people.

    Raises:
        DataError: naming the table that cannot be read, or two in the archive that know some of the people and say
            different things, or a named one that knows nobody.
    """
    inside = [name for name in getattr(store, "names", []) if name.rsplit("/", 1)[-1] == "labels.csv"]
    known = {person(name) for name in people}

    def of_them(shown, data):
        """What a table says, or {} if it knows none of the people."""
        try:
            if len(text := data()) > archive.MAX_TABLE_BYTES:
                raise ValueError(f"has more than {archive.MAX_TABLE_BYTES:,} bytes: it is no table of people")
            found = read(text, missing)
        except OSError as error:
            raise archive.DataError(f"{shown} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise archive.DataError(f"{shown} {error}.") from error
        return found if any(known & set(column) for column in found.values()) else {}

    if path is None:  # with `--person` people may have other names than there
        tables = {name: of_them(f"{store.path}: {name!r}", lambda name=name: store.read(name)) for name in inside}
        first, *more = [name for name in inside if tables[name]] or [None]
        if other := next((name for name in more if tables[name] != tables[first]), None):
            raise archive.DataError(
                f"{store.path} holds two tables of people, {first!r} and {other!r}: join them into one, and give that "
                "with --labels."
            )
        if first and len(inside) > 1 and notes is not None:
            left = ", ".join(repr(name) for name in inside if name != first)
            notes.append(
                f"of the tables of people {first!r} is used; {left} says the same, or names nobody of this data"
            )
        return tables.get(first, {})
    if not (found := of_them(f"--labels {path}", lambda: _start_of(path))):
        some = ", ".join(sorted(people)[:3])
        raise archive.DataError(f"--labels {path} names nobody of this data, whose cases are called {some}, ...")
    return found


def _start_of(path) -> bytes:
    """A file, or as much of it as shows that it is too long: what has no end, as /dev/zero, has no size either."""
    with open(path, "rb") as file:
        return file.read(archive.MAX_TABLE_BYTES + 1)


def describe(column: dict, train: set) -> dict:
    """What kind of values a column holds, ready for `json.dump`.

    Args:
        column: {person: what it says}.
        train: the training people.

    Returns:
        {"kind": "number", "mean", "std"} over the training people, where all that is said are numbers; else {"kind":
        "category", "values": sorted}.
    """
    if not all(map(_is_number, column.values())):
        return {"kind": "category", "values": sorted(set(column.values()))}
    values = {who: float(value) for who, value in column.items()}
    known = [value for who, value in values.items() if who in train and np.isfinite(value)]
    mean, spread = (float(np.mean(known)), float(np.std(known))) if known else (0.0, 0.0)
    return {"kind": "number", "mean": mean, "std": spread if spread > 1e-6 * max(1.0, abs(mean)) else 1.0}


def encode(value: str | None, about: dict) -> float:
    """A covariate as a network gets it: standard deviations from the mean, or a place among the values; NaN = unknown.

    Raises:
        ValueError: for what the column does not know.
    """
    if value is None:
        return float("nan")
    if about["kind"] == "number":
        fact = (float(value) - about["mean"]) / about["std"]
        if not np.isfinite(fact):
            raise ValueError(f"{value} is no finite number")
        return fact
    if value not in about["values"]:
        raise ValueError(f"{value} is none of {', '.join(about['values'])}")
    return float(about["values"].index(value))


def encode_all(known: dict[str, dict], people: list[str], columns: dict[str, dict], shown: str) -> np.ndarray:
    """What a table says of people, as a network gets it: (N, K) float32, NaN = unknown.

    Args:
        known: as `read` gives it.
        people: names of N people.
        columns: K columns -> their kinds, as `describe` gives them.
        shown: what was opened, for messages.

    Raises:
        DataError: for a column that the table does not have, or a value that the column did not have.
    """
    encoded = np.full((len(people), len(columns)), np.nan, np.float32)
    for k, (name, about) in enumerate(columns.items()):
        if name not in known:
            raise archive.DataError(f"{shown}: nothing says the {name} of its people; give a table with that column.")
        for row, who in enumerate(people):
            try:
                encoded[row, k] = encode(known[name].get(person(who)), about)
            except ValueError as error:
                raise archive.DataError(f"{shown}: the {name} of case {who}: {error}.") from error
    return encoded
