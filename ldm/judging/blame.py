"""How far slices are from people in a number per slice, in units of what people differ by; and which stage it is from.

    by_person   numbers of slices -> what each person has beyond people's mean at the same slice indices
    beside      sets of slices beside the people that they are read against
    stages      who is to blame for a difference: the first stage, the second, or both

Two rules keep this honest. Slices are only ever compared with slices of the same index, so a set that has more of the
high slices is not called different. And people are the unit, because slices of one person are not independent.
"""

from typing import NamedTuple

import numpy as np

ERRORS = 2.0  # a difference below so many of its own standard errors cannot be told
ALARM = 3.0  # the same for a warning: a dozen numbers are asked at once, and one of them is two errors off by chance
LARGE = 1.0  # standard deviations of people: a smaller difference is told, but no matter for a warning
SHARE = 1 / 3  # of a difference: a stage that adds less than this is not to blame for it


class Numbers(NamedTuple):
    """A number for each slice of a set: values, slice indices z and people, (N,) each. NaN is left out."""

    values: np.ndarray
    z: np.ndarray
    case: np.ndarray


def by_person(numbers, means):
    """What each person has beyond people's mean at the same slice indices.

    Args:
        numbers: `Numbers` of a set.
        means: {slice index: mean of people there}; slices at other indices are left out.

    Returns:
        {person: mean over the person's slices}.
    """
    expected = np.array([means.get(int(index), np.nan) for index in numbers.z])
    beyond = np.asarray(numbers.values, "float64") - expected
    known = np.isfinite(beyond)
    people, place = np.unique(numbers.case[known], return_inverse=True)
    mean = np.bincount(place, beyond[known]) / np.bincount(place)
    return dict(zip(people.tolist(), mean.tolist(), strict=True))


def _squared_error(values):
    """Squared standard error of a mean; infinite for fewer than two values, of which nothing can be told."""
    return np.var(values, ddof=1) / len(values) if len(values) > 1 else np.inf


def beside(reference, sets, decoded=None, relative=False, least=0.0):
    """Sets of slices beside the people that they are read against.

    Args:
        reference: `Numbers` of these people.
        sets: {name: Numbers} of others.
        decoded: `Numbers` of the same people as a first stage gives them back; None where there is no first stage.
        relative: give means as multiples of people's own.
        least: the unit of z where people differ by less: all of them may have none of something that is counted.

    Returns:
        {"people": {"mean", "spread"}, name: {"mean", "z", "error"}, ...}; "decoded" among the names where it was given,
        and "second stage" {"z", "error"}, what samples have beyond decoded people, where both were. The spread is the
        standard deviation from person to person, z is a difference of means in this unit, and its error is the standard
        error of z. Empty if no two people have a number.
    """
    finite = np.isfinite(reference.values)
    indices = np.unique(reference.z[finite])
    means = {int(index): float(np.mean(reference.values[finite & (reference.z == index)])) for index in indices}
    people = by_person(reference, means)
    if len(people) < 2:
        return {}
    spread, grand = float(np.std([*people.values()], ddof=1)), float(np.mean([*means.values()]))
    unit = max(spread, least, 1e-12)
    scale = abs(grand) if relative and grand else 1.0
    own = _squared_error([*people.values()])

    def row(mean, squared_error):
        return {"mean": (grand + mean) / scale, "z": mean / unit, "error": float(np.sqrt(squared_error)) / unit}

    found = {"people": {"mean": grand / scale, "spread": spread / scale}}
    beyond = {name: [*by_person(numbers, means).values()] for name, numbers in sets.items()}
    for name, values in beyond.items():
        if values:
            found[name] = row(float(np.mean(values)), own + _squared_error(values))
    if decoded is not None:
        after = by_person(decoded, means)
        changed = [after[person] - people[person] for person in people if person in after]  # the same people: pairs
        if changed:
            found["decoded"] = row(float(np.mean(changed)), _squared_error(changed))
        if changed and beyond.get("samples"):
            added = float(np.mean(beyond["samples"])) - float(np.mean(changed))
            error = _squared_error(beyond["samples"]) + _squared_error([*after.values()])
            found["second stage"] = {"z": added / unit, "error": float(np.sqrt(error)) / unit}
    return found


def told(row):
    """Whether a difference is larger than its error allows for, and than what people differ by."""
    return abs(row["z"]) > max(ALARM * row["error"], LARGE)


def stages(found):
    """Who is to blame for the difference of the samples from people, or of decoded people where there are no samples.

    Args:
        found: what `beside` returned.

    Returns:
        None if there is no difference that can be told and is larger than what people differ by. Else some of "first
        stage" and "second stage", none of them where it cannot be told which; "model" where there is no first stage.
    """
    last = found.get("samples", found.get("decoded"))
    if last is None or not told(last):
        return None
    if "samples" not in found:
        return ["first stage"]
    if "decoded" not in found:
        return ["model"]
    parts = {"first stage": found["decoded"], "second stage": found["second stage"]}
    return [
        name
        for name, part in parts.items()
        if part["z"] / last["z"] >= SHARE and abs(part["z"]) > ERRORS * part["error"]
    ]
