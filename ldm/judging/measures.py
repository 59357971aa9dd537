"""The measures of an evaluation: sets of slices in, plain facts out.

    reconstruction   what the first stage loses          copies      samples that show a training person
    distribution     how far samples are from people     leaks       people and slices in two splits
    anatomy          are they brains                     embedding   all of them on a map
    texture          soft, mottled, whose fault          scales      at which size a classifier is fooled
    power            the smallest faults that are found  use         what is learned from them, tried on people

Each is a function of the values that it needs. None needs what another has found, so their order does not matter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from ldm import batches, tissue
from ldm.judging import anatomy as anatomies
from ldm.judging import audit, blame, faults, fidelity, metrics, planes, usefulness
from ldm.judging import scales as classifiers
from ldm.judging import texture as textures

HEADS = 16  # of which samples are, at least, where there are not enough for more with all their slices
LEAST_PEOPLE = 4  # below which a distance's error cannot be told from person to person
LEAST = 50  # samples below which no distance is given: its own error would exceed it
NOISY = (0, *faults.DEVIATIONS)  # of noise in latents, for `power`
INDICES = 8  # slice indices at which faults are planted
LOOKED_AT = 1500  # slices of a set whose texture is measured
LEARNT = 1000  # slices of each kind that a classifier learns from at most
PATCHES = (16, 32)  # pixels
NEIGHBOURS = 5  # of precision, recall, density, coverage
EMBEDDED = 1000  # points of each kind in the UMAP
FEW = 10  # test people below which the copy threshold is shaky
FLOOR = "floor: other people"
NOBODY = MappingProxyType({})


@dataclass(frozen=True)
class Slices:
    """A set of slices: images (N, H, W, 1) in [0, 1], z, label (-1 = unknown) and case (N,), features (N, D).

    The case is the person; of samples, the head: its slices share noise. guessed_z (N,) is the slice index that
    the feature networks read off the picture; None where they read none.
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

    @property
    def slices_each(self):
        """How many slices people have: the median."""
        return int(np.median(np.unique(self.case, return_counts=True)[1]))

    def of_people(self, people, each):
        """`each` slices of each of `people` people, whoever has as many, evenly spread: so sets are on equal terms."""
        cases, counts = np.unique(self.case, return_counts=True)
        cases = cases[counts >= each]
        cases = cases[batches.evenly(len(cases), people)]
        return self.take(np.concatenate([rows_of(self, case, each, n) for n, case in enumerate(cases)]))

    def some(self, most):
        """Some slices of everybody who has as many, `most` in all, if there are more than that."""
        return self if len(self) <= most else self.of_people(self.people, max(1, most // self.people))

    def take(self, rows):
        parts = {name: None if value is None else value[rows] for name, value in vars(self).items()}
        return Slices(**parts)

    def at(self, indices):
        """Those at some slice indices."""
        return self.take(np.isin(self.z, indices))

    def spread(self, count):
        """`count` of them, evenly spread over the slice indices: so sets are compared at the same ones."""
        return self.take(np.argsort(self.z, kind="stable")[batches.evenly(len(self), count)])

    def described(self, describe):
        """The same slices with their features; `describe` is a function of images, see `features.of_run`."""
        found, z = describe(self.images)
        return replace(self, features=found, guessed_z=z)


def rows_of(slices, case, each, n=0):
    """Rows of `each` slices of a person, in order of their index.

    They are evenly spread, beginning elsewhere for another `n`: so that many people have all indices, in equal shares.
    """
    mine = np.flatnonzero(slices.case == case)
    mine = mine[np.argsort(slices.z[mine], kind="stable")]
    begin = n * 0.618034 % 1.0  # the golden ratio: whatever the number of people, they begin evenly
    return mine[((np.arange(each) + begin) * len(mine) / each).astype(int)]


def rows_of_heads(train, count, seed):
    """Training slices whose conditions samples have: all those of one person after another, in random order.

    Where `count`, the number of samples, is too small for HEADS people, some slices of each.

    Returns:
        Rows of training slices (count,), and the number of the head that each sample is of (count,).
    """
    each = min(train.slices_each, max(1, count // HEADS))
    cases, counts = np.unique(train.case, return_counts=True)
    order = np.random.default_rng(seed).permutation(cases[counts >= each])
    heads = np.repeat(np.arange(-(-count // each)), each)[:count]
    rows = [rows_of(train, order[head % len(order)], each, head) for head in range(heads[-1] + 1)]
    return np.concatenate(rows)[:count], heads


class PerPerson(NamedTuple):
    """A number of which the report keeps what each person adds: so that two runs are compared person by person.

    Attributes:
        value: the number.
        people: {name: mean over this person's slices}; with `left_out`, {name: the number without this person}.
        error: how well the number is known as far as samples go; 0 where there are none.
    """

    value: float
    people: Mapping[str, float]
    error: float = 0.0
    left_out: bool = False


class Measured(NamedTuple):
    """What a measure found.

    Attributes:
        facts: the part of report.json that it fills, {key: numbers}; empty where nothing can be said.
        shown: what its section says beside that: counts, and arrays for figures.
        lacks: what is missing where nothing can be said, a key of `ldm.drawing.pages.LACKING`.
        people: {number: PerPerson}, of those that runs are compared by.
    """

    facts: Mapping[str, object]
    shown: Mapping[str, object]
    lacks: str | None = None
    people: Mapping[str, PerPerson] = NOBODY


def bar(parts, name):
    """The parts of a long measurement, one by one, with a bar that only a terminal shows."""
    return tqdm(parts, desc=name, leave=False, disable=None)


def bad_generators(train, like, seed):
    """Two that must lose to any good one: mean images with noise, and blurred training slices.

    The noise has a standard deviation of 0.05 within the mean brain; the blur one of 1/64 of the picture's width.

    Args:
        train: Slices of the training people.
        like: Slices: there are as many people, with as many slices, as far as there are.
        seed: of the noise.

    Returns:
        {name: Slices}, without features.
    """
    train = train.of_people(like.people, min(like.slices_each, train.slices_each))
    mean = metrics.mean_image_prediction(metrics.mean_images([(train.images, train.z)]), train.z)[..., None]
    noise = 0.05 * np.random.default_rng(seed).standard_normal(mean.shape)
    sigma = train.images.shape[1] / 64
    made = {
        "mean images with noise": np.where(mean > 0.02, np.clip(mean + noise, 0, 1), 0),
        "blurred training slices": ndimage.gaussian_filter(train.images, (0, sigma, sigma, 0)),
    }
    return {name: replace(train, images=images.astype("float32"), features=None) for name, images in made.items()}


def reconstruction(train, test, decoded, bits, in_pixels, case_names=NOBODY):
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
    people = {}
    for name, values in scores["first stage"].items():
        mine = means_of_people(values, test.case, case_names)
        people[f"first stage, {name}"] = PerPerson(float(np.mean(list(mine.values()))), mine)
    return Measured({"reconstruction": facts, "bits_per_slice": bits}, shown, people=people)


def means_of_people(values, case, case_names):
    """{name of the person: mean over the slices}; values (N,), of which NaNs do not count."""
    return {case_names.get(one, str(one)): float(np.nanmean(values[case == one])) for one in np.unique(case).tolist()}


def two_sets(test, validate):
    """The people who were not trained on, in two sets: test and validation people, or halves of the test people."""
    if validate is not None:
        return test, validate
    whose = np.unique(test.case)
    half = np.isin(test.case, whose[::2]) if len(whose) > 1 else np.arange(len(test)) % 2 == 0
    return test.take(half), test.take(~half)


def distribution(
    samples, test, validate, bad, seed, *, by_own_network=True, saw_masks=False, networks=1, case_names=NOBODY
):
    """KID, Frechet distance, precision and recall to people, beside the floor and the bad generators.

    All sets are on equal terms: of as many people (or heads) with as many slices each. The people who were not trained
    on are two sets, and each is the reference once; the floor is the other one. KID, which does not depend on numbers,
    is to all of these people.

    Args:
        samples, test, validate: Slices with features; the last two may be None.
        bad: {name: Slices}.
        seed: of pairs.
        by_own_network, saw_masks: see `study.Study`.
        networks: so many have given the features, D of each one after those of another; numbers are means over them.
        case_names: {case: name}.
    """
    if test is None or len(samples) < LEAST:
        return Measured({}, {"count": len(samples), "least": LEAST}, "test people" if test is None else "samples")
    folds, sets = two_sets(test, validate), {"samples": samples, **bad}
    everybody = [*folds, *sets.values()]
    each = min(slices.slices_each for slices in everybody)
    people = min(np.sum(np.unique(slices.case, return_counts=True)[1] >= each) for slices in everybody)
    few = people < LEAST_PEOPLE
    count = min(len(slices) for slices in everybody) if few else people * each
    if count <= NEIGHBOURS:
        return Measured({}, {"count": count}, "slices")

    def cut(slices):
        return slices.spread(count) if few else slices.of_people(people, each)

    equal = [cut(fold) for fold in folds]
    facts = {FLOOR: compared([(equal[0], equal[1]), (equal[1], equal[0])], (folds[0], folds[1]), networks, few)}
    whole = together(*folds)
    for name, slices in sets.items():
        pairs = [(fold, cut(slices)) for fold in equal]
        facts[name] = compared(pairs, (whole, slices), networks, few)
    for name, slices in {"real people": test, "samples": samples}.items():
        facts.setdefault(name, {})["MS-SSIM of pairs"] = likeness_of_pairs(slices, seed)
    shown = {
        "count": count,
        "people": int(people),
        "held out": whole.people,
        "heads": samples.people,
        "neighbours": NEIGHBOURS,
        "networks": networks,
        "floor": FLOOR,
        "halves": validate is None,
        "few": few,
        "by own network": by_own_network,
        "saw masks": saw_masks,
    }
    by_person = {} if few else kid_by_person(whole, samples, networks, case_names)
    return Measured({"distribution": facts}, shown, people=by_person)


def together(*sets):
    """Sets of slices as one."""
    columns = {name: [getattr(slices, name) for slices in sets] for name in vars(sets[0])}
    known = {name: all(value is not None for value in values) for name, values in columns.items()}
    return Slices(**{name: np.concatenate(values) if known[name] else None for name, values in columns.items()})


def compared(pairs, whole, networks, few):
    """One row of the table of distances.

    Args:
        pairs: (reference, set) each, all of one size; numbers are means over them.
        whole: (reference, set) of which KID is.
        networks: see `distribution`.
        few: too few people for an error that counts people.
    """
    groups = (None, None) if few else tuple(slices.case for slices in whole)
    features = [np.split(slices.features, networks, axis=1) for slices in whole]
    kid = np.array([fidelity.kernel_distance(*two, *groups) for two in zip(*features, strict=True)])
    found = []
    for real, fake in pairs:
        for two in zip(*(np.split(slices.features, networks, axis=1) for slices in (real, fake)), strict=True):
            near = fidelity.precision_recall(*two, NEIGHBOURS, *((None, None) if few else (real.case, fake.case)))
            found.append({"Frechet distance": fidelity.frechet_distance(*two), **near})
    means = {name: float(np.mean([row[name] for row in found])) for name in found[0]}
    chance = kid[:, 0].var(ddof=1) / networks if networks > 1 else 0.0  # of which networks these are
    error = float(np.sqrt(np.mean(kid[:, 1]) ** 2 + chance))
    return {"KID": float(kid[:, 0].mean()), "KID's standard error": error, **means}


def kid_by_person(people, samples, networks, case_names):
    """{"KID": PerPerson} of the samples: what it is without each person, and what it owes to which heads there are."""
    parts = zip(*(np.split(slices.features, networks, axis=1) for slices in (people, samples)), strict=True)
    parts = [(*two, people.case, samples.case) for two in parts]
    value = float(np.mean([fidelity.kernel_distance(*part)[0] for part in parts]))
    found = [fidelity.kernel_distance_without(*part) for part in parts]
    without, heads = (np.mean(side, axis=0) for side in zip(*found, strict=True))
    names = [case_names.get(case, str(case)) for case in np.unique(people.case).tolist()]
    error = float(np.sqrt((len(heads) - 1) * np.var(heads)))
    return {"KID": PerPerson(value, dict(zip(names, without.tolist(), strict=True)), error, left_out=True)}


def likeness_of_pairs(slices, seed):
    """Mean MS-SSIM of pairs of different people at the same slice index; None where there is no such pair."""
    if not any(len(np.unique(slices.case[slices.z == index])) > 1 for index in np.unique(slices.z)):
        return None
    return fidelity.diversity(slices.images, slices.z, metrics.ms_ssim, slices.case, seed=seed)[0]


def anatomy(samples, train, test, label_names, phantoms, plane=("axial", "")):
    """Tissue, ventricles, symmetry: of samples and of real people, and whether conditions hold.

    Args:
        samples, train, test: Slices; test may be None.
        label_names: of the labels 0, 1, ...
        phantoms: images (N, H, W) in [0, 1] and tissue classes (N, H, W): brains whose tissue is known exactly.
        plane: one of `planes.PLANES`, and how it is known; what does not hold there is left out.
    """
    holds, train = planes.HOLDS[plane[0]], train.spread(LEARNT)
    sets = {"training people": train, "test people": test, "samples": samples}
    sets = {kind: slices for kind, slices in sets.items() if slices is not None}
    measured = {kind: anatomies.measure(slices.images) for kind, slices in sets.items()}
    measured = {kind: {name: found[name] for name in found if name in holds} for kind, found in measured.items()}
    distance, error = {}, {}
    for kind, slices in sets.items():
        if kind != "training people":
            distance[kind] = anatomies.difference(measured["training people"], train.z, measured[kind], slices.z)
            if slices.guessed_z is not None:
                error[kind] = float(np.abs(slices.guessed_z - slices.z).mean())
    area = "ventricle_area" if "ventricle_area" in holds else "brain_area"
    areas = {kind: values[area] for kind, values in measured.items()}
    effects, refused = label_effects(sets, areas, label_names) if area == "ventricle_area" else ({}, {})
    facts = {
        "plane": plane[0],
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
        "area": area,
        "areas": {kind: (slices.z, areas[kind]) for kind, slices in sets.items()},
        "plane is": plane[1],
        "not said": planes.WHY_NOT.get(plane[0]),
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
    sets = {kind: slices.some(LOOKED_AT) for kind, slices in sets.items() if slices is not None}
    measured = {
        kind: textures.measure(slices.images, metrics.mean_image_prediction(mean, slices.z))
        for kind, slices in sets.items()
    }
    facts, one_slice = {}, test.people / len(test.z)  # of a person's slices: no share is known better
    for name in measured["test people"]:
        numbers = {kind: blame.Numbers(measured[kind][name], s.z, s.case) for kind, s in sets.items()}
        reference, through = numbers.pop("test people"), numbers.pop("decoded", None)
        least = one_slice if name == textures.ONE_PEAK else 0.0
        found = blame.beside(reference, numbers, through, relative="power" in name, least=least)
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
    indices = np.unique(test.z)[batches.evenly(len(np.unique(test.z)), INDICES)]
    moves = faults.of_images(test, indices, noisy)
    one, other = two_sets(test, validate)  # the second stands for samples
    both, first = together(one, other), np.arange(len(one) + len(other)) < len(one)
    described = classifiers.describe(both)
    of_test = described.take(np.isin(both.case, test.case))
    moves[faults.INDEX] = faults.of_index(classifiers.describe(train.spread(LEARNT)), of_test)
    if min(one.people, other.people) >= LEAST_PEOPLE:
        moves[faults.LEFT_OUT] = faults.of_people(described.take(first), described.take(~first))
        near = audit.nearest(audit.shrunk(both.images), audit.shrunk(train.images)).distance
        moves[faults.COPIES] = faults.of_copies(near[~first], near[first], one.case)
    of_label = faults.of_label(both.at(indices), label_names)
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
        "pixels": audit.copy_rate(found.distance, usual.distance, groups=test.case, owners=samples.case),
        "features": audit.copy_rate(near.distance, near_usual.distance, groups=test.case, owners=samples.case),
    }
    people = audit.by_person(found.index, found.distance, rates["pixels"]["threshold"], train.case)
    closest = np.argsort(found.distance)[:8]
    partners = train.images[found.index[closest]]
    partners = np.where(found.mirrored[closest][:, None, None, None], partners[:, :, ::-1], partners)
    whose = [case_names[int(train.case[row])] for row in found.index[closest]]
    shown = {
        "distances": (found.distance, usual.distance),
        "pairs": (audit.shrunk(samples.images[closest], partners.shape[1]), partners, found.distance[closest], whose),
        "few": test.people < FEW,
    }
    return Measured({"copies": {**rates, "people": {case_names[case]: n for case, n in people.items() if n}}}, shown)


def use(samples, train, held, label_names, masks=None):
    """What a classifier of the label, and a segmenter, learn from drawn slices, tried on people nobody trained on.

    Args:
        samples, train: Slices; held: those of test and validation people, or None.
        label_names: of the labels 0, 1, ...
        masks: {"drawn slices", "real slices", "tested": (images, tissue classes)} where the samples were drawn inside
            tissue masks; else None.
    """
    if held is None:
        return Measured({}, {}, "test people")
    small = [replace(s, images=audit.shrunk(s.images, usefulness.SIDE)) for s in (samples, train, held)]
    facts, sets = {"label": {}, "tissue": {}}, list(map(usefulness.labelled, small))
    few = len(label_names) >= 2 and not all(map(usefulness.enough, sets))
    if len(label_names) >= 2 and not few:
        drawn, real, tested = sets
        as_many = real.of_people(min(drawn.people, real.people), min(drawn.slices_each, real.slices_each))
        sets = {"drawn slices": [drawn], "as many real people": [as_many], "all real people": [real]}
        sets = {name: parts for name, parts in sets.items() if all(map(usefulness.enough, parts))}
        sets["real and drawn"] = [real, drawn]
        mean = metrics.mean_images([(small[1].images, train.z)])
        facts["label"] = usefulness.trained_and_tested(sets, tested, mean, "all real people")
    if masks is not None:
        facts["tissue"] = usefulness.segmented({k: v for k, v in masks.items() if k != "tested"}, masks["tested"])
    if not any(facts.values()):
        return Measured({}, {"least": usefulness.LEAST_PEOPLE}, "people" if few else "labels")
    return Measured({"use": facts}, {"labels": list(label_names[:2]), "people": held.people, "seeds": usefulness.SEEDS})


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
