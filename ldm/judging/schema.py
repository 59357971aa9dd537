"""What stands in `report.json`, and how its numbers of two runs are compared.

    SHAPE        which keys there are, and what is under each
    problems     what is not as SHAPE says
    difference   one number of two runs, as well as it is known for people whom both were read against

A shape is one of: NUMBER, int, str, bool, or object for anything; [shape] for a list; (shape, shape) for a list of two;
{name: shape} for names that are fixed, of which one that ends in "?" may be missing; {str: shape} for any names.
"""

from numbers import Real

import numpy as np

FORMAT = 1  # goes up when numbers of another version can no longer be compared
NUMBER = float  # None and NaN, which were not measured, are numbers too
RATE = {"threshold": NUMBER, "rate": NUMBER, "interval": (NUMBER, NUMBER), "expected": NUMBER, "samples": int}
PER_PERSON = {"value": NUMBER, "error": NUMBER, "left out": bool, "people": {str: NUMBER}}
SHAPE = {
    "about": {
        "format": int,
        "run": str,
        "data": str,
        "image size": int,
        "features": [str],  # which networks, see `features.names_of`; none where no section asked for features
        "count": int,
        "sampler": str,
        "steps": int,
        "seed": int,
    },
    "by person": {str: PER_PERSON},
    "reconstruction?": {str: {str: (NUMBER, NUMBER)}},
    "bits_per_slice?": NUMBER,
    "distribution?": {str: {str: NUMBER}},
    "anatomy?": {
        "plane": str,
        "distance": {str: {str: NUMBER}},
        "dice": {str: NUMBER},
        "slice index error": {str: NUMBER},
        "label effect": {str: {"d": NUMBER, "interval": (NUMBER, NUMBER), "ratio": NUMBER}},
    },
    "texture?": {str: {str: object}},
    "scales?": {str: object},
    "power?": {str: {str: object}},
    "copies?": {"pixels": RATE, "features": RATE, "people": {str: int}},
    "use?": {
        "label": {
            str: {
                "AUC": NUMBER,
                "interval": (NUMBER, NUMBER),
                "people": int,
                "gap": NUMBER,
                "gap's interval": (NUMBER, NUMBER),
            }
        },
        "tissue": {str: [(NUMBER, NUMBER)]},
    },
    "leaks?": {
        "near-identical pairs": {str: int},
        "misfiled": [((str, int), (str, int))],
        "repeated": object,  # pairs of names, or None
        "said": [str],
    },
    "cost?": {str: NUMBER},
}


def problems(facts, shape=SHAPE, where="report.json"):
    """Sentences on what in `facts`, as they come out of a JSON file, has not the shape; none where all is well."""
    if shape is NUMBER:
        fits = facts is None or isinstance(facts, Real) and not isinstance(facts, bool)
        return [] if fits else [f"{where} is no number"]
    if isinstance(shape, type):
        fits = isinstance(facts, shape) and (shape is not int or not isinstance(facts, bool))
        return [] if fits else [f"{where} is no {shape.__name__}"]
    if isinstance(shape, list | tuple):
        if not isinstance(facts, list | tuple):
            return [f"{where} is no list"]
        if isinstance(shape, tuple) and len(facts) != len(shape):
            return [f"{where} has {len(facts)} values, not {len(shape)}"]
        each = shape if isinstance(shape, tuple) else shape * len(facts)
        return [
            said for i, (a, b) in enumerate(zip(facts, each, strict=True)) for said in problems(a, b, f"{where}[{i}]")
        ]
    if not isinstance(facts, dict):
        return [f"{where} is no mapping"]
    if str in shape:
        return [said for name, value in facts.items() for said in problems(value, shape[str], f"{where}: {name}")]
    known = {name.removesuffix("?"): part for name, part in shape.items()}
    said = [f"{where} lacks {name}" for name in shape if name[-1] != "?" and name not in facts]
    said += [f"{where} has {name}, which nothing should have" for name in facts if name not in known]
    return said + [s for name in facts if name in known for s in problems(facts[name], known[name], f"{where}: {name}")]


def difference(one, other):
    """A number of one run less that of another, by the people whom both were read against.

    What one person makes hard is hard for both runs, so that the difference, person by person, is known better than
    either number. Of numbers that are no means over people (KID), the jackknife over people says how well.

    Args:
        one, other: of the shape PER_PERSON.

    Returns:
        (difference, standard error, number of people); the error is NaN for fewer than two people.
    """
    shared = sorted(one["people"].keys() & other["people"].keys())
    gaps = np.array([one["people"][name] - other["people"][name] for name in shared])
    count = len(shared)
    if count < 2:
        return float(one["value"] - other["value"]), float("nan"), count
    if one["left out"]:
        value, variance = one["value"] - other["value"], (count - 1) * np.var(gaps)
    else:
        value, variance = gaps.mean(), np.var(gaps, ddof=1) / count
    return float(value), float(np.sqrt(variance + one["error"] ** 2 + other["error"] ** 2)), count
