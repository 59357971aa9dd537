"""What would the report find? Faults of known size are planted in people's slices, and the measures are asked.

    plant       images -> the same with a fault of a size
    index_told  slices -> the slice index that their texture tells
    smallest    a fault at several sizes -> the smallest that is found, and by which number

A fault moves a number of the people whom it is planted in. That move is known well, from a few slices of each, because
the same slices stand on both sides; what the report knows of other people is less, its standard error, which all slices
of people say. The fault is found where the move is at least two such errors. So the answer is about the size of the
test, not about the luck of one try: "cannot be told" means that as many people as there are here cannot tell such a
fault from people's own differences.
"""

from dataclasses import replace

import numpy as np
from scipy import ndimage

from ldm.judging import anatomy, audit, blame, texture

BLUR, GAIN, NOISE = "blur, pixels", "gain lowered by", "noise in the latents, deviations"
COPIES, LABEL = "share of copies", "share of {} drawn under the label {}"
INDEX, LEFT_OUT = "slice index off by", "share of people left out"
SIZES = {BLUR: (0.5, 1, 2), GAIN: (0.05, 0.1, 0.2), INDEX: (1, 2, 4), COPIES: (0.02, 0.05, 0.1, 0.2)}
DEVIATIONS = (0.1, 0.2, 0.3)  # of noise in the latents
SHARES = (0.25, 0.5, 1.0)  # of one label under the other
LEFT = (0.25, 0.5, 0.75)  # of people
TOLD, VENTRICLES, NEAREST = "slice index told by texture", "ventricle area", "distance to the nearest of them"


def plant(slices, fault, size):
    """People's slices with a blur or a gain of a size; see `SIZES`."""
    if fault == BLUR:
        return replace(slices, images=ndimage.gaussian_filter(slices.images, (0, size, size, 0)))
    return replace(slices, images=slices.images * np.float32(1 - size))


def numbers(slices):
    """The numbers of a slice that the report compares with people's: {name: (N,)}; of the brain's inside only.

    A decoder's faintest grain lifts the background above the 0 that people have, and any blur moves the brain's
    outline, whose area is the same in all people where an archive was made so.
    """
    tissue = anatomy.tissues(slices.images)
    found = {**texture.measure(slices.images, tissue=tissue), **anatomy.measure(slices.images, tissue)}
    return {name: values for name, values in found.items() if name not in ("background", "brain_area")}


def index_told(train, slices, level=1):
    """The slice index that texture tells, by a ridge regression on the statistics of training people.

    Args:
        train, slices: `ldm.judging.scales.Described`.
        level: the finest that is used.
    """
    level = min(level, len(train.levels) - 1)
    inputs = train.up_to(level)
    mean, deviation = inputs.mean(axis=0), inputs.std(axis=0) + 1e-6
    known = (inputs - mean) / deviation
    penalty = 0.1 * len(known) * np.eye(known.shape[1])
    weights = np.linalg.solve(known.T @ known + penalty, known.T @ (train.z - train.z.mean()))
    return train.z.mean() + (slices.up_to(level) - mean) / deviation @ weights


def error_of(values, z, case):
    """Standard error of the difference of a number between these people and as many others; NaN where nothing is known.

    Args:
        values, z, case: (N,) a number of each slice, its slice index and its person; of all slices that the report has,
            since people differ by less in the mean of many slices than of few.
    """
    numbers = blame.Numbers(values, z, case)
    found = blame.beside(numbers, {"samples": numbers})
    return found["samples"]["error"] * found["people"]["spread"] if "samples" in found else float("nan")


def move(before, after, z, case, error=None):
    """How many standard errors of the report a fault moves a number, in absolute value; 0 where nothing is known.

    Args:
        before, after: (N,) of the same slices without and with the fault.
        z, case: (N,) their slice indices and people.
        error: see `error_of`; None is that of these slices.
    """
    found = blame.beside(blame.Numbers(before, z, case), {}, blame.Numbers(after, z, case))
    error = error_of(before, z, case) if error is None else error
    if "decoded" not in found or not error > 0:
        return 0.0
    return abs(found["decoded"]["z"]) * found["people"]["spread"] / error


def smallest(moves):
    """The smallest size of a fault that is found, and all larger ones with it.

    Args:
        moves: {size: {name of a number: move}}, from the smallest size on.

    Returns:
        {"found": size or None, "by": name or None, "errors": {size as text: largest move}}.
    """
    largest = {size: max(of.items(), key=lambda item: item[1], default=(None, 0.0)) for size, of in moves.items()}
    found = None
    for size in reversed(largest):
        if largest[size][1] < blame.ERRORS:
            break
        found = size
    return {
        "found": found,
        "by": None if found is None else largest[found][0],
        "errors": {f"{size:g}": errors for size, (_, errors) in largest.items()},
    }


def of_images(test, indices, noisy):
    """Faults that change pictures: {fault: {size: {name: move}}}.

    Args:
        test: Slices of test people.
        indices: slice indices at which the faults are planted.
        noisy: {deviation of the noise: Slices}, test people decoded from noisy latents; 0 is without noise. Empty where
            there is no first stage.
    """
    known = numbers(test)
    error = {name: error_of(values, test.z, test.case) for name, values in known.items()}

    def moves(before, after, of):
        return {name: move(before[name], after[name], of.z, of.case, error[name]) for name in known}

    rows = np.isin(test.z, indices)
    few, before, found = test.take(rows), {name: values[rows] for name, values in known.items()}, {}
    for fault in (BLUR, GAIN):
        found[fault] = {size: moves(before, numbers(plant(few, fault, size)), few) for size in SIZES[fault]}
    if noisy:
        clean = numbers(noisy[0])
        found[NOISE] = {size: moves(clean, numbers(noisy[size]), noisy[size]) for size in sorted(noisy)[1:]}
    return found


def of_index(train, test):
    """Slices told that they are another index: {size: {name: move}}; both are `ldm.judging.scales.Described`."""
    error = index_told(train, test) - test.z
    return {size: {TOLD: move(error, error - size, test.z, test.case)} for size in SIZES[INDEX]}


def of_label(people, names):
    """People of one label under another: {size: {name: move}}; None where there are no two labels.

    Args:
        people: Slices of as many people as have labels.
        names: of the labels 0, 1, ...
    """
    if len(names) < 2:
        return None
    area = anatomy.measure(people.images)["ventricle_area"]
    one, other = (
        blame.Numbers(*(values[people.label == label] for values in (area, people.z, people.case))) for label in (0, 1)
    )
    if min(len(np.unique(part.case)) for part in (one, other)) < anatomy.LEAST_PEOPLE:
        return None
    row = blame.beside(other, {"samples": one}).get("samples")
    return row and {share: {VENTRICLES: share * abs(row["z"]) / row["error"]} for share in SHARES}


def of_people(test, others):
    """Some people left out: each test slice is farther from the nearest one that is left: {size: {name: move}}.

    Args:
        test, others: `ldm.judging.scales.Described` of test people, and of those who stand for the samples.
    """
    mean, deviation = (f(others.up_to(1), axis=0) for f in (np.mean, np.std))
    here, there = ((part.up_to(1) - mean) / (deviation + 1e-6) for part in (test, others))
    apart = np.sqrt(((here[:, None] - there[None]) ** 2).mean(axis=2))
    apart[test.z[:, None] != others.z[None]] = np.inf
    people, nearest = np.random.default_rng(0).permutation(np.unique(others.case)), {}
    for share in (0, *LEFT):
        left = np.isin(others.case, people[: max(1, round((1 - share) * len(people)))])
        nearest[share] = apart[:, left].min(axis=1)
        nearest[share][~np.isfinite(nearest[share])] = np.nan
    return {share: {NEAREST: move(nearest[0], nearest[share], test.z, test.case)} for share in LEFT}


def of_copies(honest, usual, case):
    """Copies among samples that are else as honest as people: {size: {name: move}}.

    Args:
        honest: (N,) distances to the nearest training slice, of slices of people who stand for the samples.
        usual: (M,) those of test people's slices.
        case: (M,) these test people.
    """
    honest, found = np.sort(honest), {}
    for share in SIZES[COPIES]:
        copied = honest.copy()
        copied[-max(1, round(share * len(honest))) :] = 0.0  # the farthest of them become copies
        rate = audit.copy_rate(copied, usual, groups=case)
        error = (rate["interval"][1] - rate["interval"][0]) / 4  # an interval of 95 % is four of them
        found[share] = {"share of copies": max(0.0, rate["rate"] - rate["expected"]) / error}
    return found
