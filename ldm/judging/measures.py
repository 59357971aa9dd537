"""The measures of an evaluation: sets of slices in, plain facts out.

    reconstruction   what the first stage loses          copies      samples that show a training person
    distribution     how far samples are from people     leaks       people and slices in two splits
    anatomy          are they brains                     embedding   all of them on a map
    texture          soft, mottled, whose fault          scales      at which size a classifier is fooled
    power            the smallest faults that are found

Each is a function of the values that it needs. None needs what another has found, so their order does not matter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from ldm import batches, tissue
from ldm.judging import anatomy as anatomies
from ldm.judging import audit, blame, faults, fidelity, metrics
from ldm.judging import scales as classifiers
from ldm.judging import texture as textures

LEAST_PEOPLE = 4  # below which a distance's error cannot be told from person to person
LEAST = 50  # samples below which no distance is given: its own error would exceed it
NOISY = (0, *faults.DEVIATIONS)  # of noise in latents, for `power`
INDICES = 8  # slice indices at which faults are planted
LEARNT = 1000  # slices of each kind that a classifier learns from at most
PATCHES = (16, 32)  # pixels
NEIGHBOURS = 5  # of precision, recall, density, coverage
EMBEDDED = 1000  # points of each kind in the UMAP
FEW = 10  # test people below which the copy threshold is shaky
FLOOR = "floor: validation people"


@dataclass(frozen=True)
class Slices:
    """A set of slices: images (N, H, W, 1) in [0, 1], z, label (-1 = unknown) and case (N,), features (N, D).

    guessed_z (N,) is the slice index that the feature network reads off the picture; None where it reads none.
    """

    images: np.ndarray
    z: np.ndarray
    label: np.ndarray
    case: np.ndarray
    features: np.ndarray | None = None
    guessed_z: np.ndarray | None = None

    def __len__(self):
        return len(self.z)

    @property
    def people(self):
        """How many people they are of."""
        return len(np.unique(self.case))

    def take(self, rows):
        parts = {name: None if value is None else value[rows] for name, value in vars(self).items()}
        return Slices(**parts)

    def at(self, indices):
        """Those at some slice indices."""
        return self.take(np.isin(self.z, indices))

    def joined(self, other):
        """They and others, without features."""
        names = ("images", "z", "label", "case")
        return Slices(*(np.concatenate([getattr(self, name), getattr(other, name)]) for name in names))

    def spread(self, count):
        """`count` of them, evenly spread over the slice indices: so sets are compared at the same ones."""
        return self.take(np.argsort(self.z, kind="stable")[batches.evenly(len(self), count)])

    def described(self, describe):
        """The same slices with their features; `describe` is a function of images, see `features.of_run`."""
        found, z = describe(self.images)
        return replace(self, features=found, guessed_z=z)


class Measured(NamedTuple):
    """What a measure found.

    Attributes:
        facts: the part of report.json that it fills, {key: numbers}; empty where nothing can be said.
        shown: what its section says beside that: counts, and arrays for figures.
        lacks: what is missing where nothing can be said, a key of `ldm.drawing.pages.LACKING`.
    """

    facts: Mapping[str, object]
    shown: Mapping[str, object]
    lacks: str | None = None


def bar(parts, name):
    """The parts of a long measurement, one by one, with a bar that only a terminal shows."""
    return tqdm(parts, desc=name, leave=False, disable=None)


def bad_generators(train, count, seed):
    """Two that must lose to any good one: mean images with noise, and blurred training slices.

    The noise has a standard deviation of 0.05 within the mean brain; the blur one of 1/64 of the picture's width.

    Args:
        train: Slices of the training people.
        count: most slices of each, evenly spread over the slice indices.
        seed: of the noise.

    Returns:
        {name: Slices}, without features.
    """
    train = train.spread(count)
    mean = metrics.mean_image_prediction(metrics.mean_images([(train.images, train.z)]), train.z)[..., None]
    noise = 0.05 * np.random.default_rng(seed).standard_normal(mean.shape)
    sigma = train.images.shape[1] / 64
    made = {
        "mean images with noise": np.where(mean > 0.02, np.clip(mean + noise, 0, 1), 0),
        "blurred training slices": ndimage.gaussian_filter(train.images, (0, sigma, sigma, 0)),
    }
    return {name: replace(train, images=images.astype("float32"), features=None) for name, images in made.items()}


def reconstruction(train, test, decoded, bits, in_pixels):
    """Test people through the first stage, beside predictors that know nothing of the slice."""
    if in_pixels or test is None:
        return Measured({}, {}, "first stage" if in_pixels else "test people")
    mean = metrics.mean_images([(train.images, train.z)])
    scores = metrics.beside_trivial(test.images, decoded.images, mean, test.z)
    facts = {name: metrics.over_people(values, test.case) for name, values in scores.items()}
    some = batches.evenly(len(test), 8)
    shown = {
        "slices": len(test),
        "people": test.people,
        "pairs": (test.images[some], decoded.images[some], test.z[some]),
        "by slice": {name: (test.z, row["foreground SSIM"]) for name, row in scores.items() if name != metrics.BLACK},
    }
    return Measured({"reconstruction": facts, "bits_per_slice": bits}, shown)


def distribution(samples, test, validate, bad, seed, by_own_network=True, saw_masks=False):
    """KID, Frechet distance, precision and recall to the test people, beside the floor and the bad generators.

    All sets have the same number of slices, at the same slice indices.
    """
    if test is None or len(samples) < LEAST:
        return Measured({}, {"count": len(samples), "least": LEAST}, "test people" if test is None else "samples")
    sets = {FLOOR: validate} if validate is not None else {}
    sets |= {"samples": samples, **bad}
    count = min(len(test), *(len(slices) for slices in sets.values()))
    reference, facts = test.spread(count), {}
    few = min(slices.people for slices in (reference, *sets.values())) < LEAST_PEOPLE
    for name, slices in sets.items():
        some = slices.spread(count)
        groups = (None, None) if few else (reference.case, some.case)
        kid, error = fidelity.kernel_distance(reference.features, some.features, *groups)
        facts[name] = {
            "KID": kid,
            "KID's standard error": error,
            "Frechet distance": fidelity.frechet_distance(reference.features, some.features),
            **fidelity.precision_recall(reference.features, some.features, NEIGHBOURS),
        }
    for name, slices in {"real people": test, "samples": samples}.items():
        facts.setdefault(name, {})["MS-SSIM of pairs"] = likeness_of_pairs(slices, seed)
    shown = {
        "count": count,
        "people": test.people,
        "neighbours": NEIGHBOURS,
        "floor": FLOOR,
        "few": few,
        "by own network": by_own_network,
        "saw masks": saw_masks,
    }
    return Measured({"distribution": facts}, shown)


def likeness_of_pairs(slices, seed):
    """Mean MS-SSIM of pairs of different people at the same slice index; None where there is no such pair."""
    if not any(len(np.unique(slices.case[slices.z == index])) > 1 for index in np.unique(slices.z)):
        return None
    return fidelity.diversity(slices.images, slices.z, metrics.ms_ssim, slices.case, seed=seed)[0]


def anatomy(samples, train, test, label_names, phantoms):
    """Tissue, ventricles, symmetry: of samples and of real people, and whether conditions hold.

    Args:
        samples, train, test: Slices; test may be None.
        label_names: of the labels 0, 1, ...
        phantoms: images (N, H, W) in [0, 1] and tissue classes (N, H, W): brains whose tissue is known exactly.
    """
    sets = {"training people": train, "test people": test, "samples": samples}
    sets = {kind: slices for kind, slices in sets.items() if slices is not None}
    measured = {kind: anatomies.measure(slices.images) for kind, slices in sets.items()}
    distance, error = {}, {}
    for kind, slices in sets.items():
        if kind != "training people":
            distance[kind] = anatomies.difference(measured["training people"], train.z, measured[kind], slices.z)
            if slices.guessed_z is not None:
                error[kind] = float(np.abs(slices.guessed_z - slices.z).mean())
    areas = {kind: values["ventricle_area"] for kind, values in measured.items()}
    effects, refused = label_effects(sets, areas, label_names)
    facts = {
        "distance": distance,
        "dice": segmenter_dice(*phantoms),
        "slice index error": error,
        "label effect": effects,
    }
    means = {
        kind: {name: [float(f(v)) for f in (np.nanmean, np.nanstd)] for name, v in values.items()}
        for kind, values in measured.items()
    }
    reference = train if test is None else test
    shown = {
        "means": means,
        "ventricles": {kind: (slices.z, areas[kind]) for kind, slices in sets.items()},
        "grey levels": tuple(anatomies.histograms(slices.images) for slices in (reference, samples)),
        "labels": list(label_names),
        "refused": refused,
    }
    return Measured({"anatomy": facts}, shown)


def label_effects(sets, areas, names):
    """What the first two labels do to the ventricle area.

    Args:
        sets: {kind: Slices}.
        areas: {kind: (N,)} their ventricle areas.
        names: of the labels.

    Returns:
        {kind: {"d", "interval", "ratio"}}: Cohen's d, its interval, the ratio of the means; and {kind: why not}.
    """
    effects, refused = {}, {}
    for kind, slices in sets.items() if len(names) >= 2 else ():
        chosen = np.isin(slices.label, (0, 1))
        area, label = areas[kind][chosen], slices.label[chosen]
        try:
            d, interval = anatomies.effect_size(area, label, slices.case[chosen], names)
        except ValueError as error:
            refused[kind] = str(error)
        else:
            ratio = float(area[label == 0].mean() / max(area[label == 1].mean(), 1e-9))
            effects[kind] = {"d": d, "interval": list(interval), "ratio": ratio}
    return effects, refused


def segmenter_dice(images, classes):
    """{tissue: Dice} of the segmenter on brains whose tissue is known exactly."""
    return dict(zip(tissue.NAMES[1:], metrics.dice(classes, anatomies.tissues(images)), strict=True))


def texture(samples, train, test, validate, decoded):
    """How soft and how mottled slices are, beside people, and which stage is to blame.

    Args:
        samples, validate, decoded: Slices or None; decoded are the test people after the first stage.
        train, test: Slices; their mean images are subtracted for the residuals. Test may be None.
    """
    if test is None:
        return Measured({}, {}, "test people")
    mean = metrics.mean_images([(train.images, train.z)])
    sets = {"test people": test, "validation people": validate, "decoded": decoded, "samples": samples}
    sets = {kind: slices for kind, slices in sets.items() if slices is not None}
    measured = {
        kind: textures.measure(slices.images, metrics.mean_image_prediction(mean, slices.z))
        for kind, slices in sets.items()
    }
    facts = {}
    for name in measured["test people"]:
        numbers = {kind: blame.Numbers(measured[kind][name], s.z, s.case) for kind, s in sets.items()}
        reference, through = numbers.pop("test people"), numbers.pop("decoded", None)
        found = blame.beside(reference, numbers, through, relative="power" in name)
        if found:
            blamed = blame.stages(found)
            facts[name] = found if blamed is None else {**found, "to blame": blamed}
    size = test.images.shape[1]
    soft = [textures.POWER.format(period) for period in textures.soft_periods(size)]
    islands = {kind: (s.z, measured[kind][textures.ISLANDS]) for kind, s in sets.items()}
    shown = {"people": test.people, "few": test.people < LEAST_PEOPLE, "soft": soft, "islands": islands}
    return Measured({"texture": facts}, shown)


def scales(samples, train, test, validate, decoded, bad):
    """At which size a classifier tells samples from people, and distances of small pieces.

    Args:
        samples, validate, decoded: Slices or None; decoded are the test people after the first stage.
        train, test: Slices; test may be None.
        bad: {name: Slices} of generators that must lose.
    """
    if test is None or test.people < LEAST_PEOPLE:
        return Measured({}, {"least": LEAST_PEOPLE}, "test people")
    sets = {"validation people": validate, "decoded": decoded, "samples": samples, **bad}
    sets = {kind: s for kind, s in sets.items() if s is not None and s.people >= LEAST_PEOPLE}
    some, facts = train.spread(LEARNT), {}
    real = classifiers.describe(some), classifiers.describe(test)
    for kind, slices in sets.items():
        described, same = classifiers.describe(slices.spread(LEARNT)), kind == "decoded"
        rows = classifiers.judge(real[0], described, real[1], same)
        needed = None
        if rows[-1]["AUC"] > classifiers.CERTAIN:
            needed = classifiers.pairs_needed(real[0], described, real[1], same)
        pieces = {f"{size} pixels": classifiers.patch_distance(test, slices, size, some) for size in PATCHES}
        facts[kind] = {"levels": rows, "pairs needed": needed, "patches": pieces}
    sizes = [level.shape[1] for level in classifiers.levels(test.images[:1, ..., 0])]
    shown = {"people": test.people, "reached": classifiers.REACHED}
    return Measured({"scales": {"pixels": sizes, "sets": facts}}, shown)


def power(train, test, validate, noisy, label_names):
    """The smallest of planted faults that the measures find at two errors, with as many people as there are.

    Args:
        train, test, validate: Slices; test and validate may be None.
        noisy: {deviation: Slices}, see `faults.of_images`.
        label_names: of the labels 0, 1, ...
    """
    if test is None or test.people < LEAST_PEOPLE:
        return Measured({}, {"least": LEAST_PEOPLE}, "test people")
    few = test.at(np.unique(test.z)[batches.evenly(len(np.unique(test.z)), INDICES)])
    moves = faults.of_images(few, noisy)
    moves[faults.INDEX] = faults.of_index(train.spread(LEARNT), few)
    if validate is not None:
        moves[faults.LEFT_OUT] = faults.of_people(
            *(classifiers.describe(s.at(np.unique(few.z))) for s in (few, validate))
        )
    if len(np.unique(few.case)) >= 2 * LEAST_PEOPLE:
        usual = audit.nearest(audit.shrunk(few.images), audit.shrunk(train.at(np.unique(few.z)).images)).distance
        moves[faults.COPIES] = faults.of_copies(usual, few.case)
    labelled = test if validate is None else test.joined(validate)
    of_label = faults.of_label(labelled.at(np.unique(few.z)), label_names)
    if of_label:
        moves[faults.LABEL.format(*label_names)] = of_label
    shown = {"people": test.people, "labels": list(label_names), "first stage": bool(noisy)}
    return Measured({"power": {fault: faults.smallest(of) for fault, of in moves.items()}}, shown)


def copies(samples, train, test, decoded, case_names):
    """For every sample its nearest training slice, against what test people's slices have.

    What a decoder loses brings everything nearer together, so the test people went through the same decoder, where
    there is one.
    """
    if test is None:
        return Measured({}, {}, "test people")
    honest = test if decoded is None else decoded
    small = [audit.shrunk(slices.images) for slices in (samples, honest, train)]
    found = audit.nearest(small[0], small[2], progress=lambda parts: bar(parts, "copies"))
    usual = audit.nearest(small[1], small[2], progress=lambda parts: bar(parts, "copies, test people"))
    near, near_usual = (audit.nearest_features(slices.features, train.features) for slices in (samples, honest))
    rates = {
        "pixels": audit.copy_rate(found.distance, usual.distance, groups=test.case),
        "features": audit.copy_rate(near.distance, near_usual.distance, groups=test.case),
    }
    people = audit.by_person(found.index, found.distance, rates["pixels"]["threshold"], train.case)
    closest = np.argsort(found.distance)[:8]
    partners = train.images[found.index[closest]]
    partners = np.where(found.mirrored[closest][:, None, None, None], partners[:, :, ::-1], partners)
    whose = [case_names[int(train.case[row])] for row in found.index[closest]]
    shown = {
        "distances": (found.distance, usual.distance),
        "pairs": (samples.images[closest], partners, found.distance[closest], whose),
        "few": test.people < FEW,
    }
    return Measured({"copies": {**rates, "people": {case_names[case]: n for case, n in people.items() if n}}}, shown)


def leaks(real, case_names, saw, kind, each=False, repeated=None):
    """Whether people or pictures are in two splits, or a stage saw people that the data now calls test people.

    Args:
        real: {split: Slices}.
        case_names: {case: name}.
        saw: (stage, names of people) each: whom a stage was trained or validated on.
        kind: of the archive, see `dataset.Source`.
        each: whether every slice counted as a person (`--person each`).
        repeated: (name, name) of scans in two splits that look like one person's; None: it could not be told.
    """
    tested = {case_names[case] for case in np.unique(real["test"].case).tolist()} if "test" in real else set()
    seen = [(stage, both) for stage, people in saw if (both := sorted(tested & set(people)))]

    def who(split, row):
        return case_names[int(real[split].case[row])], int(real[split].z[row])

    small = {split: audit.shrunk(slices.images) for split, slices in real.items()}
    counts, alike = {}, []
    splits = list(real)
    for i, one in enumerate(splits):
        for other in splits[i + 1 :]:
            pairs = audit.near_identical(small[one], small[other])
            counts[f"{one}, {other}"] = len(pairs)
            alike += [((*who(one, a), one), (*who(other, b), other)) for a, b in pairs[:3]]
    misfiled = []
    if "test" in real:
        pairs = audit.misfiled(small["test"], real["test"].z, real["test"].case, small["train"])
        misfiled = [(who("test", a), who("train", b)) for a, b in pairs]
    facts = {"near-identical pairs": counts, "misfiled": misfiled, "repeated": repeated}
    return Measured({"leaks": facts}, {"kind": kind, "each": each, "seen": seen, "alike": alike})


def embedding(samples, real, label_names, seed):
    """UMAP of real and generated slices."""
    import umap  # takes seconds to import

    some = {kind: slices.spread(EMBEDDED) for kind, slices in {**real, "samples": samples}.items()}
    rows = np.concatenate([slices.features for slices in some.values()])
    reducer = umap.UMAP(n_neighbors=min(15, len(rows) - 1), random_state=seed, n_jobs=1)
    label = np.concatenate([slices.label for slices in some.values()])
    shown = {
        "points": reducer.fit_transform(rows),
        "kind": np.concatenate([[name] * len(slices) for name, slices in some.items()]),
        "z": np.concatenate([slices.z for slices in some.values()]),
        "label": np.array([*label_names, "unknown"])[label] if label_names else None,
    }
    return Measured({}, shown)
