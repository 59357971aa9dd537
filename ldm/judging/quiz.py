"""Can people tell drawn slices from real ones? Pairs to choose from, and what the answers say.

    pairs   one real and one drawn slice of the same index, side by side, and the answer sheet
    score   answers and the sheet -> the share that was right, with its interval, size by size

Who cannot tell is right half of the time (forced choice: Macmillan, Creelman, "Detection Theory", 2nd edition, 2005,
chapter 7). Pictures are shown in three sizes, because what passes at 64 pixels may not at 256.
"""

import numpy as np

from ldm.judging.audit import shrunk
from ldm.later import Later

stats = Later("scipy.stats")

PAIRS = 40  # at each size
SIDES = ("left", "right")
SHEET = {"quiz": str, "sheet": [{"size": int, "drawn": str, "z": int}], str: object}  # of a file, see `ldm.shapes`


def sizes(side):
    """The three sizes of pictures of `side` pixels: a quarter, a half, the whole; but at least 16."""
    return sorted({max(16, side // 4), max(16, side // 2), side})


def pairs(real, drawn, seed, count=PAIRS):
    """Pairs for a quiz.

    Args:
        real, drawn: `Slices` of people who were not trained on, and of samples.
        seed: of the choice, the order and the sides.
        count: at each size.

    Returns:
        Pictures [(left, right)], (S, S) uint8 each, and the sheet [{"size", "drawn": "left" or "right", "z"}], in the
        same order. No slice comes twice as long as there are enough.
    """
    rng = np.random.default_rng(seed)
    asked = np.repeat(sizes(real.images.shape[1]), count).tolist()
    rows = np.resize(rng.permutation(len(drawn)), len(asked))
    free = rng.permutation(len(real))
    shown, sheet = [], []
    for size, row in zip(asked, rows, strict=True):
        place = np.abs(real.z[free] - drawn.z[row]).argmin()  # the first of those that are nearest
        mine, free = free[place], np.delete(free, place)
        free = free if len(free) else rng.permutation(len(real))
        two = [as_grey(slices.images[one : one + 1], size) for slices, one in ((drawn, row), (real, mine))]
        side = int(rng.integers(2))
        shown.append(tuple(two if side == 0 else two[::-1]))
        sheet.append({"size": size, "drawn": SIDES[side], "z": int(drawn.z[row])})
    order = rng.permutation(len(shown))
    return [shown[i] for i in order], [sheet[i] for i in order]


def as_grey(image, size):
    """A picture (1, S, S, 1) in [0, 1] -> (size, size) uint8, by area."""
    return np.round(255 * np.clip(shrunk(image, size).reshape(size, size), 0, 1)).astype(np.uint8)


def score(sheet, answers):
    """How often the drawn one was pointed out.

    Args:
        sheet: of `pairs`.
        answers: {number of the pair: "left" or "right"}, which side was taken for drawn; not all need be there.

    Returns:
        {"all" or a size: {"right", "answered", "share", "interval"}}, Wilson's interval of 95 %
        (doi:10.1080/01621459.1927.10502953); what was never answered is left out.

    Raises:
        ValueError: for a pair that is not on the sheet, or no side; or where nothing was answered.
    """
    hits = {}
    for number, side in answers.items():
        if not 0 <= number < len(sheet) or side not in SIDES:
            raise ValueError(f"pair {number}: {side!r} is no answer to this quiz of {len(sheet)} pairs")
        for key in ("all", sheet[number]["size"]):
            hits.setdefault(key, []).append(side == sheet[number]["drawn"])
    if not hits:
        raise ValueError("nothing was answered")
    found = {}
    for key in ["all", *sorted(key for key in hits if key != "all")]:
        right, answered = int(sum(hits[key])), len(hits[key])
        low, high = stats.binomtest(right, answered).proportion_ci(0.95, method="wilson")
        found[key] = {
            "right": right,
            "answered": answered,
            "share": right / answered,
            "interval": (float(low), float(high)),
        }
    return found
