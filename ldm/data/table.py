"""What a table says of people: `labels.csv`, a row for each person, a column for each fact (label, age, sex, ...)."""

import csv
import io

import numpy as np

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


def describe(column: dict, train: set) -> dict:
    """What kind of fact a column holds, ready for `json.dump`.

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
    """A fact as a network is told it: standard deviations from the mean, or the place among the values; NaN = unknown.

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
