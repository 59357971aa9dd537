"""At which scale do pictures pass for people's? A classifier tells real from generated, on slices it has not seen.

    levels     pictures of half the size, half of that, ...: what is seen from far away
    describe   pictures -> texture statistics of each level; gain, offset, place and mirroring change nothing
    learn      a classifier from such statistics, as strict as people held back ask for
    auc        how often a generated slice looks more generated than a real one of the same index; error over people
    judge      all of that: AUC at each level, by cross-fitting and several seeds
    patches    pieces of pictures, for a distance between sets (`fidelity.kernel_distance`)

A finer picture contains the coarser one: the statistics of a level are kept at all finer ones, and a finer classifier
is used only where people held back prefer it. So an AUC that falls as pictures get finer means too few slices, not a
pass.

The statistics are chosen to hold what blur, noise, speckle and mottle change: the energy of a band, how peaked and how
skewed it is, how it goes with the next coarser band, each near the rim of the brain and deep inside, and Euler numbers
(compare Portilla, Simoncelli, "A parametric texture model based on joint statistics of complex wavelet coefficients",
International Journal of Computer Vision 40, 2000, doi:10.1023/A:1026553619983). A logistic regression on them and on
their squares learns from some hundred slices in a fraction of a second.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from sklearn.linear_model import LogisticRegression

from ldm import batches
from ldm.judging import anatomy, fidelity, texture

COARSEST = 24  # pixels: a smaller picture is not looked at
RIM = 1 / 16  # of the picture's width: nearer to the outside is cortex rather than white matter
THRESHOLDS = (-0.5, 0.5, 1.0)  # of Euler numbers, in standard deviations of the brain's grey levels
QUANTILES = (5, 25, 50, 75, 95)  # per cent
STRICTNESS = (1e-3, 1e-2, 1e-1)  # C of the logistic regression, the strictest first
HELD_BACK = 0.25  # of people and samples: they choose the strictness and the level
CERTAIN = 0.95  # of the AUC: above, the number of pairs that is needed says more
REACHED = 0.75  # the AUC that this number of pairs gives
WHITENED = 1e-4  # of the strongest wave's variance: weaker ones are left weak
PAIRS = (2, 4, 8, 16, 32, 64, 128, 256)


class Described(NamedTuple):
    """Slices as their statistics: one array (N, D) per level, the coarsest first, each level's own; z and case (N,)."""

    levels: list[np.ndarray]
    z: np.ndarray
    case: np.ndarray

    def take(self, rows):
        return Described([values[rows] for values in self.levels], self.z[rows], self.case[rows])

    def up_to(self, level):
        """(N, D) the statistics of a level and of all coarser ones."""
        return np.concatenate(self.levels[: level + 1], axis=1)


def levels(images):
    """Pictures at all sizes, by averaging squares of 2x2 pixels: [(N, h, w)], the coarsest first."""
    found = [images]
    while min(found[0].shape[1:]) % 2 == 0 and min(found[0].shape[1:]) // 2 >= COARSEST:
        n, height, width = found[0].shape
        found.insert(0, found[0].reshape(n, height // 2, 2, width // 2, 2).mean(axis=(2, 4)))
    return found


def _enlarged(pictures, like):
    """Pictures with each pixel repeated, so that they are as large as `like`."""
    step = like.shape[1] // pictures.shape[1]
    return pictures.repeat(step, axis=1).repeat(step, axis=2)


def _moments(values, where):
    """(N, 3): logarithm of the root mean square, mean size over it, and skewness, of values inside a mask."""
    count = np.maximum(where.sum(axis=(1, 2)), 1)
    rms = np.sqrt((values**2 * where).sum(axis=(1, 2)) / count) + 1e-6
    size, cube = ((f(values) * where).sum(axis=(1, 2)) / count for f in (np.abs, lambda v: v**3))
    return np.stack([np.log(rms), size / rms, cube / rms**3], axis=1)


def _correlation(a, b, where):
    """(N, 1) Pearson correlation of two pictures inside a mask."""
    count = np.maximum(where.sum(axis=(1, 2)), 1)
    a, b = (v - ((v * where).sum(axis=(1, 2)) / count)[:, None, None] for v in (a, b))
    product, one, other = ((x * y * where).sum(axis=(1, 2)) for x, y in ((a, b), (a, a), (b, b)))
    return (product / np.sqrt(one * other + 1e-12))[:, None]


def _standardised(pictures):
    """Pictures (B, H, W) in deviations of their brain's grey levels, 0 outside of it; and the masks of the brain.

    Of each level by itself, since the mask and the deviation of a finer one would give away what only that one shows.
    """
    brain = pictures > anatomy.BACKGROUND
    count = np.maximum(brain.sum(axis=(1, 2), keepdims=True), 1)
    mean = (pictures * brain).sum(axis=(1, 2), keepdims=True) / count
    deviation = np.sqrt((((pictures - mean) * brain) ** 2).sum(axis=(1, 2), keepdims=True) / count) + 1e-6
    return np.where(brain, (pictures - mean) / deviation, 0).astype("float32"), brain


def _quantiles(picture, brain):
    return np.percentile(picture[brain], QUANTILES) if brain.any() else np.zeros(len(QUANTILES))


def _describe(images):
    """`describe` of one batch (B, H, W): [(B, D)] per level."""
    found, coarser, deep = [], None, None
    for level in levels(images):
        picture, mask = _standardised(level)
        if deep is None:
            reach = max(1, round(RIM * picture.shape[1]))
            deep = np.stack([ndimage.binary_erosion(ndimage.binary_fill_holes(m), iterations=reach) for m in mask])
        band = picture - ndimage.gaussian_filter(picture, (0, 1, 1), truncate=3.0)
        core = mask & _enlarged(deep, picture)
        parts = [_moments(band, where) for where in (core, mask & ~core)]
        along, across = (np.abs(np.diff(picture, axis=axis)).mean(axis=(1, 2)) + 1e-6 for axis in (1, 2))
        parts += [np.log(along / across)[:, None]]
        parts += [texture.euler_number((picture > threshold) & mask)[:, None] for threshold in THRESHOLDS]
        if coarser is None:
            parts += [np.stack([*map(_quantiles, picture, mask)]), mask.mean(axis=(1, 2))[:, None]]
        else:
            above = _enlarged(coarser, picture)
            parts += [_correlation(band, above, mask), _correlation(np.abs(band), np.abs(above), mask)]
        found.append(np.concatenate(parts, axis=1).astype("float32"))
        coarser = band
    return found


def describe(slices):
    """Texture statistics of slices, level by level; gain, offset, place and mirroring change nothing.

    Args:
        slices: `ldm.judging.measures.Slices`.

    Returns:
        `Described`.
    """
    images = anatomy.as_stack(slices.images)
    parts = [_describe(images[part]) for part in batches.parts(len(images))]
    return Described([np.concatenate(level) for level in zip(*parts, strict=True)], slices.z, slices.case)


# ---- the classifier --------------------------------------------------------------------------------------------------


def _of_index(z):
    """(N, 4) a cubic in the slice index: what of a statistic belongs to the place of the slice."""
    return (np.asarray(z, "float64")[:, None] / 32) ** np.arange(4)


class Classifier:
    """A logistic regression on the statistics of a level and of coarser ones: what is beyond the slice index's, and its
    square.

    Args:
        real, fake: Described, to learn from.
        level: of 0 (the coarsest) and up.
        strictness: C, the inverse of the penalty on the weights.
        people: Described, who say what belongs to the slice index and how large a deviation is; None is `real`.
    """

    def __init__(self, real, fake, level, strictness, people=None):
        people = real if people is None else people
        values = people.up_to(level)
        self.level = level
        self.expected = np.linalg.lstsq(_of_index(people.z), values, rcond=None)[0]
        self.deviation = np.std(values - _of_index(people.z) @ self.expected, axis=0) + 1e-6
        self.model = LogisticRegression(C=strictness, max_iter=300)
        z, made = np.concatenate([real.z, fake.z]), np.repeat([0, 1], [len(real.z), len(fake.z)])
        inputs = np.concatenate([self.inputs(real), self.inputs(fake)])
        # each side has the same weight at each slice index
        _, place, count = np.unique(np.stack([z, made]), axis=1, return_inverse=True, return_counts=True)
        weight = 1 / count[place.ravel()]
        self.model.fit(inputs, made, sample_weight=weight / weight.mean())

    def inputs(self, slices):
        beyond = (slices.up_to(self.level) - _of_index(slices.z) @ self.expected) / self.deviation
        beyond = np.clip(beyond, -8, 8)  # one odd slice must not decide
        return np.concatenate([beyond, beyond**2 - 1], axis=1)

    def scores(self, slices):
        """(N,) how generated each slice looks."""
        return self.model.decision_function(self.inputs(slices))


def auc(real_scores, real, fake_scores, fake):
    """How often a generated slice scores higher than a real one of the same slice index.

    Args:
        real_scores, fake_scores: (N,) and (M,).
        real, fake: their `Described`, or anything with z and case.

    Returns:
        The area under the receiver operating characteristic, averaged over slice indices: 0.5 = cannot tell, 1 =
        always; and its standard error over people and samples (DeLong et al., Biometrics 44, 1988,
        doi:10.2307/2531595, with people for slices). NaN where they have no slice index in common.
    """
    won, lost = np.full(len(real_scores), np.nan), np.full(len(fake_scores), np.nan)
    for index in np.intersect1d(real.z, fake.z):
        a, b = np.flatnonzero(real.z == index), np.flatnonzero(fake.z == index)
        higher = np.sign(fake_scores[b] - real_scores[a][:, None]) / 2 + 0.5
        won[a], lost[b] = higher.mean(axis=1), higher.mean(axis=0)
    if np.isnan(won).all():
        return float("nan"), float("nan")
    indices = np.unique(real.z[~np.isnan(won)])
    area = float(np.mean([won[real.z == index].mean() for index in indices]))
    squared = 0.0
    for values, case in ((won, real.case), (lost, fake.case)):
        known = ~np.isnan(values)
        of_person = [values[known & (case == person)].mean() for person in np.unique(case[known])]
        squared += np.var(of_person, ddof=1) / len(of_person) if len(of_person) > 1 else np.inf
    return area, float(np.sqrt(squared))


def _parted(described, share, rng):
    """Two parts of a set, `share` of its people in the first; nobody in both."""
    people = rng.permutation(np.unique(described.case))
    first = np.isin(described.case, people[: max(1, round(share * len(people)))])
    return described.take(first), described.take(~first)


def learn(real, fake, rng):
    """For each level the classifier that people held back prefer: its own, or that of a coarser one.

    Args:
        real, fake: Described, to learn from.
        rng: draws who is held back.

    Returns:
        A `Classifier` per level, the coarsest first.
    """
    (real_back, real), (fake_back, fake) = _parted(real, HELD_BACK, rng), _parted(fake, HELD_BACK, rng)
    best, classifier, chosen = -1.0, None, []
    for level in range(len(fake.levels)):
        for strictness in STRICTNESS:
            tried = Classifier(real, fake, level, strictness)
            area, _ = auc(tried.scores(real_back), real_back, tried.scores(fake_back), fake_back)
            if classifier is None or area >= best:  # on a tie the finer one
                best, classifier = area, tried
        chosen.append(classifier)
    return chosen


def _without(described, other, same):
    """A set without the people of another one, where both are the `same` people."""
    return described.take(~np.isin(described.case, other.case)) if same else described


def judge(train, fake, test, same=False, seeds=3):
    """AUC of generated slices against people whom neither the generator nor the classifier has seen, at each level.

    Half of the generated slices (by person or sample) teach, the other half is judged, and the other way round.

    Args:
        train: Described of the training people: they teach what is real.
        fake: Described of generated slices, or of real ones as if they were.
        test: Described of other people: they are judged.
        same: whether fake slices are made from these very test people.
        seeds: how many times the halves are drawn.

    Returns:
        A dictionary per level, the coarsest first: "AUC", "error" over people and samples, "seeds" (its standard
        deviation over the seeds).
    """
    areas, errors = [], []  # (2 seeds, levels)
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        halves = _parted(fake, 0.5, rng)
        for teaching, judged in (halves, halves[::-1]):
            real = _without(test, teaching, same)
            told = [auc(c.scores(real), real, c.scores(judged), judged) for c in learn(train, teaching, rng)]
            areas.append([area for area, _ in told])
            errors.append([error for _, error in told])
    of_seeds = np.reshape(areas, (seeds, 2, -1)).mean(axis=1)
    # two halves of one set: the people are the same in both, so their mean is taken to be no more certain than one
    columns = zip(of_seeds.mean(axis=0), np.mean(errors, axis=0), of_seeds.std(axis=0), strict=True)
    return [{"AUC": float(area), "error": float(error), "seeds": float(spread)} for area, error, spread in columns]


def pairs_needed(train, fake, test, same=False, seeds=5):
    """How many pairs of a real and a generated slice teach an AUC of `REACHED` at the finest level; None if no number
    of `PAIRS` does.
    """
    level = len(fake.levels) - 1
    for count in PAIRS:
        areas = []
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            teaching, judged = _parted(fake, 0.5, rng)
            if len(teaching.z) < count or len(train.z) < count:
                return None
            some = [part.take(rng.permutation(len(part.z))[:count]) for part in (train, teaching)]
            classifier, real = Classifier(*some, level, STRICTNESS[0], people=train), _without(test, teaching, same)
            areas.append(auc(classifier.scores(real), real, classifier.scores(judged), judged)[0])
        if np.mean(areas) >= REACHED:
            return count
    return None


# ---- patches ---------------------------------------------------------------------------------------------------------


def patches(images, size, count, seed=0):
    """Pieces of pictures, each with its mean taken away, where there is brain.

    Args:
        images: (N, H, W) or (N, H, W, 1) in [0, 1].
        size: of the pieces, pixels.
        count: of the pieces per picture.
        seed: of their places.

    Returns:
        pieces (M, size * size) in deviations of their picture's brain, and the row of each one's picture (M,).
    """
    images, rng = anatomy.as_stack(images), np.random.default_rng(seed)
    found, rows = [], []
    for row, image in enumerate(images):
        brain = image > anatomy.BACKGROUND
        if min(image.shape) < size or not brain.any():
            continue
        deviation = image[brain].std() + 1e-6
        middle = np.argwhere(brain[size // 2 : image.shape[0] - size // 2, size // 2 : image.shape[1] - size // 2])
        for y, x in middle[rng.permutation(len(middle))[:count]]:
            piece = image[y : y + size, x : x + size]
            found.append(((piece - piece.mean()) / deviation).ravel())
            rows.append(row)
    return np.array(found, "float32").reshape(-1, size * size), np.array(rows, int)


def patch_distance(real, fake, size, people, count=2, seed=0):
    """Unbiased squared MMD of pieces of two sets of slices, as of `fidelity.kernel_distance`, and its standard error.

    The pieces are whitened by those of third people, or the coarse waves, which are the strongest, would hide the rest.

    Args:
        real, fake, people: `ldm.judging.measures.Slices`; people should be neither.
        size: of the pieces, pixels.
        count: of the pieces per slice.
        seed: of their places.

    Returns:
        (value, standard error over people), or None where pictures are too small or people too few for it.
    """
    usual, _ = patches(people.images, size, 4 * count, seed)  # more, as there are more numbers to be known
    # places of their own, or pieces of the same place would be nearer to each other than those of two people are
    found = [patches(slices.images, size, count, seed + n) for n, slices in enumerate((real, fake), 1)]
    groups = [slices.case[rows] for slices, (_, rows) in zip((real, fake), found, strict=True)]
    if not len(usual) or any(len(np.unique(case)) < 4 for case in groups):
        return None
    variance, axes = np.linalg.eigh(usual.T @ usual / len(usual))
    white = axes / np.sqrt(variance + WHITENED * variance.max())
    return fidelity.kernel_distance(*(pieces @ white for pieces, _ in found), *groups)
