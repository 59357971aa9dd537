"""What stands in `report.json`, and how its numbers of two runs are compared.

SHAPE        which keys there are, and what is under each, as `ldm.shapes` has it
problems     what is not as SHAPE says
difference   one number of two runs, as well as it is known for people whom both were read against
"""

import numpy as np

from ldm import shapes
from ldm.shapes import NUMBER

FORMAT = 1  # goes up when numbers of another version can no longer be compared
RATE = {"threshold": NUMBER, "rate": NUMBER, "interval": (NUMBER, NUMBER), "expected": NUMBER, "samples": int}
PER_PERSON = {"value": NUMBER, "error": NUMBER, "left out": bool, "people": {str: NUMBER}}
SHAPE = {
    "about": {
        "format": int,
        "run": str,
        "samples?": str,  # archive of slices that another generator drew; sampler and steps then say nothing
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
    "texture?": {str: {"people": {"mean": NUMBER, "spread": NUMBER}, "to blame?": [str], str: {str: NUMBER}}},
    "scales?": {
        "pixels": [int],
        "sets": {str: {"levels": [{"AUC": NUMBER, "error": NUMBER, str: NUMBER}], str: object}},
    },
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


def problems(facts):
    """Sentences on what in `facts`, as they come out of a JSON file, is not as SHAPE says; none where all is well."""
    return shapes.problems(facts, SHAPE, "report.json")


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
