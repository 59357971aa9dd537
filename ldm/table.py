"""What a table says of people: `labels.csv`, a row for each person, a column for each fact (label, age, sex, ...)."""

import csv
import io

import numpy as np


def read(data: bytes, numbers: dict[str, int]) -> dict[str, dict[int, str]]:
    """A CSV table with a column `case` and others.

    Args:
        data: the file, UTF-8.
        numbers: a person's name in the archive -> their number. "1" in the table and "001" in the archive are the same
            person.

    Returns:
        Column -> {number: what it says}; what is empty, and who is in no row, is left out.

    Raises:
        ValueError: one clause that says what is wrong with the table.
    """
    try:
        lines = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"is not a CSV table ({error}); write it as UTF-8 text") from error
    names = list(lines[0]) if lines else []
    if "case" not in names or len(names) < 2:
        raise ValueError("needs a column case and another, such as label, separated by commas")
    by_value = {int(name): number for name, number in numbers.items() if name.isdecimal()}
    found = {name: {} for name in names if name not in ("case", None)}
    seen = set()
    for line in lines:
        case = (line["case"] or "").strip()
        number = numbers.get(case, by_value.get(int(case)) if case.isdecimal() else None)
        if number is None:
            continue
        if number in seen:
            raise ValueError(f"has two rows for case {case}; keep one")
        seen.add(number)
        for name, column in found.items():
            if value := (line[name] or "").strip():
                column[number] = value
    return found


def describe(column: dict[int, str], train: set[int]) -> dict:
    """What kind of fact a column holds, ready for `json.dump`.

    Returns:
        {"kind": "number", "mean", "std"} over the training people, where all that is said are numbers; else {"kind":
        "category", "values": sorted}.
    """
    try:
        values = {number: float(value) for number, value in column.items()}
    except ValueError:
        return {"kind": "category", "values": sorted(set(column.values()))}
    known = [value for number, value in values.items() if number in train and np.isfinite(value)]
    spread = float(np.std(known)) if known else 0.0
    return {"kind": "number", "mean": float(np.mean(known)) if known else 0.0, "std": spread or 1.0}


def encode(value: str | None, about: dict) -> float:
    """A fact as a network is told it: standard deviations from the mean, or the place among the values; NaN = unknown.

    Raises:
        ValueError: for what the column does not know.
    """
    if value is None:
        return float("nan")
    if about["kind"] == "number":
        return (float(value) - about["mean"]) / about["std"]
    if value not in about["values"]:
        raise ValueError(f"{value} is none of {', '.join(about['values'])}")
    return float(about["values"].index(value))
