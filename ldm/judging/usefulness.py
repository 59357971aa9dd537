"""Of what use are drawn slices? What is learned from them is tried on real people.

    trained_and_tested   a classifier of the label: learned from drawn slices, from real ones, from both (TSTR)
    segmented            Dice of a segmenter that has learned from drawn slices and the masks they were drawn from

Both are small and quick on purpose: a better one moves all numbers of a table, not which is larger.

References:
    Esteban, Hyland, Raetsch, "Real-valued (medical) time series generation with recurrent conditional GANs",
    arXiv 1706.02633: train on synthetic, test on real.
"""

import numpy as np
from scipy import ndimage
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ldm import batches
from ldm.judging import audit, metrics

SIDE = 32  # pixels of the slices that the classifier sees
COMPONENTS = 40
SEEDS = 5
LEAST_PEOPLE = 4  # of each label, to learn from and to be tested on
RESAMPLES = 400  # of the tested people, for each seed
PIXELS = 20_000  # that the segmenter learns from
SLICES = 400  # that it takes them from, and that it is tried on, at most


def as_rows(slices, mean):
    """Slices -> rows: each small, less the mean image of its slice index; so the index itself says nothing."""
    small = audit.shrunk(slices.images, SIDE).reshape(len(slices), -1)
    return small - metrics.mean_image_prediction(mean, slices.z).reshape(len(slices), -1)


def trained_and_tested(sets, tested, mean, rival, seeds=SEEDS):
    """Area under the ROC curve of a label, told from the slices of people who were not trained on.

    Principal components and a logistic regression score each slice; a person's score is the mean over the slices.
    Each seed learns from another draw of the people (with replacement), and the 95 % interval holds these and the draw
    of the people who are tested.

    Args:
        sets: {name: [Slices, ...]} to learn from, labels 0 and 1.
        tested: Slices, likewise.
        mean: {slice index: (SIDE, SIDE)} of training people, as `ldm.judging.metrics.mean_images` gives it.
        rival: the name of the set that the others are compared with.
        seeds: how many.

    Returns:
        {name: {"AUC", "interval": (low, high), "people", "gap", "gap's interval"}}; 0.5 is chance. People are those who
        were learned from. The gap is to the rival's AUC; its interval is narrower than that of two AUCs, since the same
        people are tested.
    """
    rows, whose = as_rows(tested, mean), np.unique(tested.case)
    label = np.array([tested.label[tested.case == person][0] for person in whose])
    found, spreads = {}, {}
    for name, parts in sets.items():
        x, y = np.concatenate([as_rows(part, mean) for part in parts]), np.concatenate([part.label for part in parts])
        cases = [np.stack([np.full(len(part), i), part.case], axis=1) for i, part in enumerate(parts)]
        person = np.unique(np.concatenate(cases), axis=0, return_inverse=True)[1].ravel()
        values, spread = [], []
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            drawn = np.concatenate([np.flatnonzero(person == one) for one in drawn_people(person, y, rng)])
            components = min(COMPONENTS, len(np.unique(drawn)) - 1)
            model = make_pipeline(
                PCA(components, svd_solver="randomized", random_state=seed),
                StandardScaler(),
                LogisticRegression(C=0.05, max_iter=500),
            ).fit(x[drawn], y[drawn])
            score = model.decision_function(rows)
            score = np.array([score[tested.case == one].mean() for one in whose])
            one, other = score[label == 1][:, None], score[label == 0]
            wins = (one > other) + 0.5 * (one == other)  # whose mean is the area under the curve (Mann and Whitney)
            values.append(wins.mean())
            tested_again = np.random.default_rng([seed, 1])  # the same people whatever was learned from
            for _ in range(RESAMPLES):
                again = [tested_again.integers(count, size=count) for count in wins.shape]
                spread.append(wins[np.ix_(*again)].mean())
        spreads[name] = np.array(spread)
        found[name] = {"AUC": float(np.mean(values)), "interval": middle(spread), "people": int(person.max()) + 1}
    for name, row in found.items():
        row["gap"] = row["AUC"] - found[rival]["AUC"]
        row["gap's interval"] = middle(spreads[name] - spreads[rival])
    return found


def middle(values):
    """[low, high], which 95 % of the values lie between."""
    return np.percentile(values, [2.5, 97.5]).tolist()


def drawn_people(person, label, rng):
    """People of each label drawn with replacement, as many as there are; `person` and `label` (N,) of their slices."""
    groups = [np.unique(person[label == one]) for one in np.unique(label)]
    return np.concatenate([rng.choice(group, len(group)) for group in groups])


def labelled(slices):
    """Those slices that have one of the first two labels."""
    return slices.take(np.isin(slices.label, (0, 1)))


def enough(slices):
    """Whether both labels have LEAST_PEOPLE people or more."""
    return all(len(np.unique(slices.case[slices.label == label])) >= LEAST_PEOPLE for label in (0, 1))


# ---- tissue ----------------------------------------------------------------------------------------------------------


def looks(images):
    """What a pixel looks like: its grey and that around it, in three widths (N, H, W, 1) -> (N, H, W, 7)."""
    grey = images[..., 0]
    wide = [ndimage.gaussian_filter(grey, (0, sigma, sigma)) for sigma in (1, 2, 4)]
    return np.stack([grey, *wide, *(grey - around for around in wide)], axis=-1)


def segmented(learned, tested, seeds=SEEDS):
    """Dice of CSF, grey and white matter on real slices, by a segmenter that has learned from others.

    A logistic regression on the grey levels around each pixel.

    Args:
        learned: {name: (images (N, H, W, 1) in [0, 1], classes (N, H, W))}.
        tested: images and classes, likewise.
        seeds: how many choices of PIXELS pixels to learn from.

    Returns:
        {name: [[mean Dice, standard deviation over seeds] of CSF, grey and white matter]}.
    """

    def some(images, classes):
        rows = batches.evenly(len(images), SLICES)
        return looks(images[rows]), classes[rows]

    real, truth = some(*tested)
    inside = truth > 0
    found = {}
    for name, slices in learned.items():
        seen, classes = some(*slices)
        x, y = seen[classes > 0], classes[classes > 0]
        scores = []
        for seed in range(seeds):
            pixels = np.random.default_rng(seed).choice(len(y), min(PIXELS, len(y)), replace=False)
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(x[pixels], y[pixels])
            guess = np.zeros_like(truth)
            guess[inside] = model.predict(real[inside])
            scores.append(metrics.dice(truth, guess))
        found[name] = np.stack([np.mean(scores, axis=0), np.std(scores, axis=0)], axis=1).tolist()
    return found
