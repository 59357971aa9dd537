"""What a table says of people: `labels.csv`, a row for each person, a column for each thing known of them (label, age,
sex, ...).
"""

import csv
import io
from pathlib import Path

import numpy as np

from ldm.data import archive

UNKNOWN = ("", "?", "na", "n/a", "nan", "none", "unknown")


def person(name: str):
    """A person's name as tables and archives both may write it: "1" and "001" are the same."""
    name = name.strip()
    return int(name) if name.isdecimal() else name


def read(data: bytes) -> dict[str, dict]:
    """A CSV table with a column `case` and others.

    Args:
        data: the file, UTF-8.

    Returns:
        Column -> {person: what it says}; what is UNKNOWN is left out.

    Raises:
        ValueError: one clause that says what is wrong with the table.
    """
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig")))
        names, lines = [name.strip() for name in reader.fieldnames or ()], list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"is not a CSV table ({error}); write it as UTF-8 text") from error
    if "case" not in names or len(names) < 2:
        raise ValueError("needs a column case and another, such as label, separated by commas")
    found = {name: {} for name in names if name != "case"}
    rows = {}
    for line in lines:
        row = {name: (line[written] or "").strip() for name, written in zip(names, reader.fieldnames, strict=True)}
        who = person(row.pop("case"))
        if rows.setdefault(who, row) != row:
            raise ValueError(f"has two rows for case {who} that disagree; keep one")
        for name, value in row.items():
            if value.lower() not in UNKNOWN:
                found[name][who] = value
    return found


def find(store, path, people: set[str]) -> dict[str, dict]:
    """The table named, else `labels.csv` in the archive; {} without any.

    Args:
        store: of the archive.
        path: of the table, or None.
        people: names that the archive has for its people.

    Returns:
        As `read`.

    Raises:
        DataError: naming the table that cannot be read, or, if it was named, that knows none of the people.
    """
    inside = [name for name in getattr(store, "names", []) if name.rsplit("/", 1)[-1] == "labels.csv"]
    if path is None and not inside:
        return {}
    shown = f"{store.path}: {inside[0]!r}" if path is None else f"--labels {path}"
    try:
        found = read(store.read(inside[0]) if path is None else Path(path).read_bytes())
    except OSError as error:
        raise archive.DataError(f"{shown} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise archive.DataError(f"{shown} {error}.") from error
    known = {person(name) for name in people}
    if path is not None and not any(known & set(column) for column in found.values()):
        some = ", ".join(sorted(people)[:3])
        raise archive.DataError(f"{shown} names nobody of this data, whose cases are called {some}, ...")
    return found


def describe(column: dict, train: set) -> dict:
    """What kind of values a column holds, ready for `json.dump`.

    Args:
        column: {person: what it says}.
        train: the training people.

    Returns:
        {"kind": "number", "mean", "std"} over the training people, where all that is said are numbers; else {"kind":
        "category", "values": sorted}.
    """
    try:
        values = {who: float(value) for who, value in column.items()}
    except ValueError:
        return {"kind": "category", "values": sorted(set(column.values()))}
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
