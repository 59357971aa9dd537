"""ldm/judging/measures.py and ldm/drawing/pages.py: planted answers, closed forms, what is said where nothing can be.

No network is involved: slices are phantoms, and their features are projections of their pixels.
"""

import inspect
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
from scipy import ndimage

from ldm.data import phantom
from ldm.drawing import pages
from ldm.judging import audit, fidelity, measures, metrics, texture
from ldm.judging.measures import Slices

SIZE = 32
NAMES = [f"p{case}" for case in range(40)]


def project(images):
    """Features of images: 12 projections of their pixels; and no slice index."""
    directions = np.random.default_rng(9).standard_normal((images[0].size, 12)).astype("float32")
    return images.reshape(len(images), -1) @ directions / SIZE, None


@pytest.fixture(scope="module")
def sets():
    """Train (8 people), validate and test (4 each): every fourth slice of phantoms, with features, not to be
    written into."""
    found = [piece for piece in phantom.slices(16, SIZE, seed=2) if piece["z"] % 4 == 1]
    columns = {key: np.array([piece[key] for piece in found]) for key in ("z", "label", "case")}
    images = (np.stack([piece["image"] for piece in found]) / np.float32(255))[..., None]
    whole = Slices(images, columns["z"], columns["label"], columns["case"]).described(project)
    first, last = {"train": 1, "validate": 9, "test": 13}, {"train": 8, "validate": 12, "test": 16}
    made = {name: whole.take((whole.case >= first[name]) & (whole.case <= last[name])) for name in first}
    for slices in made.values():
        for entry in fields(slices):
            if (array := getattr(slices, entry.name)) is not None:
                array.setflags(write=False)
    return made


def as_samples(slices, images=None):
    """Slices as if they had been drawn: a person is a head."""
    images = slices.images if images is None else images
    return replace(slices, images=images, case=slices.case + 100).described(project)


# ---- sets of slices --------------------------------------------------------------------------------------------------


def test_sets_are_compared_at_the_same_slice_indices():
    z = np.random.default_rng(0).integers(0, 8, 1000)
    z = np.concatenate([z, np.arange(8)])
    slices = Slices(np.zeros((len(z), 1, 1, 1)), z, z, np.arange(len(z)))
    counts = np.bincount(slices.spread(96).z)
    assert len(counts) == 8 and np.ptp(counts / np.bincount(z)) < 0.02  # in proportion, none left out
    people = Slices(np.zeros((64, 1, 1, 1)), np.tile(np.arange(8), 8), np.tile(z[:8], 8), np.arange(64))
    assert (np.bincount(people.spread(32).z) == 4).all()


def test_rows_of_a_set_stay_together_and_nobody_writes_into_it(sets):
    train = sets["train"]
    some = train.take(np.array([5, 2]))
    for entry in fields(train):
        if (whole := getattr(train, entry.name)) is not None:
            np.testing.assert_array_equal(getattr(some, entry.name), whole[[5, 2]])
    assert train.people == 8 and some.people == 1
    with pytest.raises(FrozenInstanceError):
        train.features = None


# ---- reconstruction --------------------------------------------------------------------------------------------------


def test_reconstruction_has_the_scores_of_their_definitions(sets):
    train, test = sets["train"], sets["test"]
    decoded = replace(test, images=np.clip(test.images + np.float32(0.1), 0, 1))
    found = measures.reconstruction(train, test, decoded, 640.0, in_pixels=False)
    rows = found.facts["reconstruction"]
    assert list(rows) == ["first stage", metrics.MEAN_IMAGE, metrics.BLACK] and found.facts["bits_per_slice"] == 640.0
    error = np.abs(test.images - decoded.images).mean(axis=(1, 2, 3))
    by_person = [error[test.case == case].mean() for case in np.unique(test.case)]
    assert rows["first stage"]["MAE"] == pytest.approx([error.mean(), np.std(by_person)], rel=1e-5)
    means = np.stack([train.images[train.z == z].mean(axis=0) for z in test.z])
    assert rows[metrics.MEAN_IMAGE]["MAE"][0] == pytest.approx(np.abs(test.images - means).mean(), rel=1e-5)
    assert rows[metrics.BLACK]["MAE"][0] == pytest.approx(test.images.mean(), rel=1e-5)
    z, values = found.shown["by slice"]["first stage"]
    np.testing.assert_array_equal(z, test.z)
    np.testing.assert_array_equal(values, metrics.foreground_ssim(test.images, decoded.images))
    assert metrics.BLACK not in found.shown["by slice"]


# ---- distribution ----------------------------------------------------------------------------------------------------


def distribution_of(sets, samples, **options):
    made = measures.bad_generators(sets["train"], sets["test"], seed=0)
    bad = {name: slices.described(project) for name, slices in made.items()}
    return measures.distribution(samples, sets["test"], sets["validate"], bad, seed=0, **options)


@pytest.fixture
def many(monkeypatch):
    monkeypatch.setattr(measures, "LEAST", 30)  # every fourth slice of four test people are 32


def test_distances_are_on_equal_terms_and_each_held_out_set_is_the_reference_once(sets, many):
    """Of 8 heads 4 are taken, as many as there are people; of KID, which does not depend on numbers, all."""
    samples, test, validate = as_samples(sets["train"]), sets["test"], sets["validate"]
    found = distribution_of(sets, samples)
    shown = found.shown
    assert [shown[k] for k in ("count", "people", "held out", "heads", "few")] == [32, 4, 8, 8, False]
    rows = found.facts["distribution"]
    np.testing.assert_allclose(
        [rows[measures.FLOOR]["KID"], rows[measures.FLOOR]["KID's standard error"]],
        fidelity.kernel_distance(test.features, validate.features, test.case, validate.case),
    )
    whole, people = np.concatenate([test.features, validate.features]), np.concatenate([test.case, validate.case])
    np.testing.assert_allclose(
        [rows["samples"]["KID"], rows["samples"]["KID's standard error"]],
        fidelity.kernel_distance(whole, samples.features, people, samples.case),
    )
    some = samples.take(np.isin(samples.case, np.unique(samples.case)[[0, 2, 5, 7]]))
    for name, pairs in (
        (measures.FLOOR, [(test, validate), (validate, test)]),
        ("samples", [(test, some), (validate, some)]),
    ):
        near = [fidelity.precision_recall(a.features, b.features, 5, a.case, b.case) for a, b in pairs]
        for key in near[0]:
            assert rows[name][key] == pytest.approx(np.mean([row[key] for row in near])), (name, key)
        distances = [fidelity.frechet_distance(a.features, b.features) for a, b in pairs]
        assert rows[name]["Frechet distance"] == pytest.approx(np.mean(distances), rel=1e-6)
    pairs = rows["real people"]["MS-SSIM of pairs"]
    assert 0 < pairs < 1 and set(rows["real people"]) == {"MS-SSIM of pairs"}


def test_test_people_themselves_are_precise_and_complete(sets):
    test = sets["test"]
    near = fidelity.precision_recall(test.features, test.features, 5, test.case, test.case)
    assert near["precision"] == near["recall"] == near["coverage"] == 1.0
    assert fidelity.frechet_distance(test.features, test.features) < 1e-3


def drawn_people(rng, count, first, each=8):
    """`count` people of `each` slices, by features only: the slice index, the person, and a rest."""
    case, z = np.repeat(np.arange(count), each), np.tile(np.arange(each), count)
    index = np.random.default_rng(1).normal(size=(each, 10))
    rows = 0.3 * index[z] + 0.8 * rng.normal(size=(count, 10))[case] + 0.2 * rng.normal(size=(len(z), 10))
    return Slices(np.zeros((len(z), 1, 1, 1)), z, np.zeros(len(z), int), case + first, rows)


def test_people_in_place_of_samples_cannot_be_told_from_the_floor(monkeypatch):
    """The very same distribution, 40 times: 12 test people, 12 validation people, 30 heads. Of 100 heads with a slice
    each, the recall was another."""
    monkeypatch.setattr(measures, "likeness_of_pairs", lambda *_: None)
    rng, gaps, before = np.random.default_rng(0), [], []
    names = ("recall", "coverage", "precision", "density", "Frechet distance", "KID")
    for _ in range(40):
        test, validate, samples = (drawn_people(rng, count, first) for count, first in ((12, 0), (12, 100), (30, 200)))
        rows = measures.distribution(samples, test, validate, {}, seed=0).facts["distribution"]
        gaps.append([rows["samples"][name] - rows[measures.FLOOR][name] for name in names])
        heads = drawn_people(rng, 96, 300)
        heads = heads.take(np.arange(96) * 8 + np.arange(96) % 8)  # a slice of each
        near = [fidelity.precision_recall(test.features, some.features) for some in (heads, validate)]
        before.append(near[0]["recall"] - near[1]["recall"])
    mean, error = np.mean(gaps, axis=0), np.std(gaps, axis=0, ddof=1) / np.sqrt(len(gaps))
    assert (np.abs(mean) < 3 * error).all(), dict(zip(names, mean / error, strict=True))
    assert (error[:3] < 0.03).all() and np.mean(before) > 0.2


def test_samples_have_the_conditions_of_whole_people(sets):
    train = sets["train"]  # 8 people, 8 slices each
    rows, heads = measures.rows_of_heads(train, 130, seed=1)
    assert np.bincount(heads).tolist() == [8] * 16 + [2]
    for head in range(16):
        mine = rows[heads == head]
        assert len(np.unique(train.case[mine])) == 1 and sorted(train.z[mine]) == sorted(np.unique(train.z))
    assert len(np.unique(train.case[rows[:64]])) == 8, "nobody twice before all had their turn"
    rows, heads = measures.rows_of_heads(train, 32, seed=1)
    assert np.bincount(heads).tolist() == [2] * 16 and np.ptp(np.bincount(train.z[rows])[1::4]) <= 2
    each = replace(train, case=np.arange(len(train)))  # every slice is a person
    rows, heads = measures.rows_of_heads(each, 50, seed=1)
    assert len(np.unique(rows)) == 50 and heads.tolist() == list(range(50))


def test_several_networks_count_alike_and_their_difference_is_an_error(sets, many):
    """Features of two networks, one after the other: means of the distances; of one twice, the same as of one."""
    samples = as_samples(sets["train"])

    def with_features(make):
        them = {name: replace(slices, features=make(slices.features)) for name, slices in sets.items()}
        drawn = replace(samples, features=make(samples.features))
        found = measures.distribution(drawn, them["test"], them["validate"], {}, 0, networks=2)
        return found.facts["distribution"]["samples"]

    one = distribution_of(sets, samples).facts["distribution"]["samples"]
    assert with_features(lambda f: np.concatenate([f, f], axis=1)) == pytest.approx(one)
    other, error = with_features(lambda f: np.concatenate([f, 2 * f], axis=1)), "KID's standard error"
    assert other["Frechet distance"] == pytest.approx(one["Frechet distance"] * 2.5)
    assert other["recall"] == pytest.approx(one["recall"]) and other[error] > one[error]


def test_with_few_people_the_error_of_kid_counts_slices(sets, many):
    """Three test people and no validation people: halves of them are each other's floor."""
    test, samples = sets["test"].take(sets["test"].case <= 15), as_samples(sets["train"])
    found = measures.distribution(samples, test, None, {}, seed=0)
    assert (found.shown["count"], found.shown["few"], found.shown["halves"]) == (8, True, True) and not found.people
    row = found.facts["distribution"]["samples"]
    assert [sorted(set(half.case)) for half in measures.two_sets(test, None)] == [[13, 15], [14]]
    whole = measures.together(*measures.two_sets(test, None))
    expected = fidelity.kernel_distance(whole.features, samples.features)
    assert (row["KID"], row["KID's standard error"]) == pytest.approx(expected)


def test_kid_by_person_is_what_is_left_without_each(sets, many):
    samples, names = as_samples(sets["train"]), dict(enumerate(NAMES))
    kid = distribution_of(sets, samples, case_names=names).people["KID"]
    whole = measures.together(sets["test"], sets["validate"])
    assert kid.left_out and set(kid.people) == {f"p{case}" for case in range(9, 17)}
    rest = whole.take(whole.case != 13)
    expected = fidelity.kernel_distance(rest.features, samples.features, rest.case, samples.case)[0]
    assert kid.people["p13"] == pytest.approx(expected)


def test_bad_generators_are_the_mean_with_noise_and_a_blur_of_known_width(sets):
    """The noise must be there: a mean image alone is another generator, and a worse one in other features."""
    train = sets["train"]
    made = measures.bad_generators(train, train, seed=3)
    noisy, blurred = made.values()
    means = metrics.mean_images([(train.images, train.z)])
    mean = metrics.mean_image_prediction(means, noisy.z)[..., None]
    inside = (mean > 0.2) & (mean < 0.8)  # where nothing is clipped
    assert (noisy.images - mean)[inside].std() == pytest.approx(0.05, rel=0.05)
    assert abs((noisy.images - mean)[inside].mean()) < 0.005 and (noisy.images[mean <= 0.02] == 0).all()
    one, other = np.flatnonzero(noisy.z == noisy.z[0])[:2]
    assert np.abs(noisy.images[one] - noisy.images[other]).mean() > 0.005, "noise of their own"
    np.testing.assert_array_equal(noisy.z, train.z)
    spot = np.zeros((1, 64, 64, 1), "float32")
    spot[0, 32, 32] = 1.0  # a Gaussian of sigma 1 pixel of 64: its peak is that of the sampled kernel, squared
    alone = Slices(spot, np.zeros(1), np.zeros(1), np.zeros(1))
    (_, smooth) = measures.bad_generators(alone, alone, 0).values()
    kernel = np.exp(-(np.arange(-4, 5.0) ** 2) / 2)
    assert smooth.images[0, 32, 32, 0] == pytest.approx((1 / kernel.sum()) ** 2, rel=1e-5)
    assert smooth.images.sum() == pytest.approx(1.0, rel=1e-5) and blurred.features is None is noisy.features


# ---- anatomy ---------------------------------------------------------------------------------------------------------


def test_what_a_label_does_is_said_with_people_as_the_unit(sets):
    train = sets["train"]
    area = np.where(train.label == 0, 0.2, 0.1) + 0.01 * (train.case % 5)
    effects, refused = measures.label_effects({"real": train}, {"real": area}, ("AD", "NC"))
    people = np.unique(train.case)
    each = np.array([area[train.case == case].mean() for case in people])
    label = np.array([train.label[train.case == case][0] for case in people])
    a, b = each[label == 0], each[label == 1]
    pooled = np.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(people) - 2))
    assert effects["real"]["d"] == pytest.approx((a.mean() - b.mean()) / pooled) and not refused
    assert effects["real"]["ratio"] == pytest.approx(area[train.label == 0].mean() / area[train.label == 1].mean())
    one = train.take(train.label == 0)
    effects, refused = measures.label_effects({"one": one}, {"one": np.ones(len(one))}, ("AD", "NC"))
    assert not effects and "compares two labels" in refused["one"]
    assert measures.label_effects({"real": train}, {"real": area}, ()) == ({}, {})


def test_anatomy_of_the_training_people_themselves_is_at_no_distance(sets):
    train, test = sets["train"], sets["test"]
    classes = np.zeros((1, 16, 16), int)
    found = measures.anatomy(replace(train, guessed_z=train.z + 2.0), train, test, ("AD", "NC"), (classes, classes))
    facts = found.facts["anatomy"]
    assert max(facts["distance"]["samples"].values()) == 0 < facts["distance"]["test people"]["white"]
    assert facts["slice index error"] == {"samples": 2.0}
    assert list(facts["dice"]) == ["CSF", "grey matter", "white matter"]
    assert set(found.shown["means"]) == {"training people", "test people", "samples"}
    without = measures.anatomy(train, train, None, (), (classes, classes))
    assert set(without.shown["means"]) == {"training people", "samples"}
    assert not without.facts["anatomy"]["label effect"]


# ---- texture ---------------------------------------------------------------------------------------------------------


def test_texture_is_that_of_each_set_at_the_same_slice_indices_and_a_soft_first_stage_is_blamed(tmp_path):
    found = [piece for piece in phantom.slices(24, 64, seed=2) if piece["z"] % 8 == 4]
    z, case = (np.array([piece[key] for piece in found]) for key in ("z", "case"))
    images = (np.stack([piece["image"] for piece in found]) / np.float32(255))[..., None]
    whole = Slices(images, z, np.zeros(len(z), int), case)
    train, test = whole.take(case <= 12), whole.take(case > 12)
    soft = replace(test, images=ndimage.gaussian_filter(test.images, (0, 1, 1, 0)))
    samples = replace(soft, case=np.arange(len(soft)))
    measured = measures.texture(samples, train, test, None, soft)
    row = measured.facts["texture"]["power at 2.8 pixels"]
    power = [texture.power(s.images, [2.8])[:, 0] for s in (test, soft)]
    of_index = [np.mean([values[test.z == index].mean() for index in np.unique(test.z)]) for values in power]
    assert row["decoded"]["mean"] == pytest.approx(of_index[1] / of_index[0]) and row["people"]["mean"] == 1
    assert row["to blame"] == ["first stage"] and row["samples"]["mean"] == pytest.approx(row["decoded"]["mean"])
    section = pages.section("texture", *measured[:3], lambda name: tmp_path / f"{name}.png")
    assert section.warnings[0].startswith("Soft: samples have") and "first stage is to blame" in section.warnings[0]
    assert section.tables[0].columns == ["", "test people", "decoded test people", "samples"]
    people = measures.texture(None, train, test, test, test)
    assert not any("to blame" in row for row in people.facts["texture"].values())
    section = pages.section("texture", *people[:3], lambda name: tmp_path / f"{name}.png")
    assert not section.warnings and "Nothing here tells" in section.text[1]


# ---- copies ----------------------------------------------------------------------------------------------------------


def test_planted_copies_are_counted_and_their_people_named(sets):
    train, test = sets["train"], sets["test"]
    planted = np.flatnonzero(train.case == 3)
    images = np.concatenate([test.images[:24], train.images[planted][:, :, ::-1]])  # honest ones, and mirrored copies
    samples = as_samples(replace(test, features=None).take(np.arange(24 + len(planted))), images)
    found = measures.copies(samples, train, test, None, NAMES)
    row = found.facts["copies"]["pixels"]
    usual = audit.nearest(test.images, train.images).distance
    assert row["threshold"] == pytest.approx(np.percentile(usual, 1))
    assert row["rate"] == pytest.approx((len(planted) + (usual[:24] < row["threshold"]).sum()) / len(samples))
    assert found.facts["copies"]["people"]["p3"] == len(planted)
    fake, partners, distance, whose = found.shown["pairs"]
    assert whose == ["p3"] * 8 and len(planted) == 8 and found.shown["few"]
    np.testing.assert_array_equal(fake, partners, "the training slice is shown as it was mirrored")
    assert np.abs(distance).max() < 1e-5
    assert row["interval"][0] <= row["rate"] <= row["interval"][1]


def test_the_copy_threshold_comes_from_people_who_went_through_the_same_decoder(sets):
    train, test = sets["train"], sets["test"]
    soft = replace(test, images=ndimage.gaussian_filter(test.images, (0, 1, 1, 0))).described(project)
    rows = measures.copies(as_samples(test), train, test, soft, NAMES).facts["copies"]
    usual = audit.nearest(soft.images, train.images).distance
    assert rows["pixels"]["threshold"] == pytest.approx(np.percentile(usual, 1))
    near = audit.nearest_features(soft.features, train.features).distance
    assert rows["features"]["threshold"] == pytest.approx(np.percentile(near, 1))


# ---- leaks -----------------------------------------------------------------------------------------------------------


def leaks_of(real, saw=(), kind="oasis", each=False):
    found = measures.leaks(real, NAMES, saw, kind, each)
    return found, pages.section("leaks", *found[:3], None)


def test_without_a_leak_nothing_is_said(sets):
    others = [("autoencoder", [f"p{case}" for case in range(1, 9)])]
    found, section = leaks_of(sets, others)
    assert found.facts["leaks"] == {
        "near-identical pairs": {"train, validate": 0, "train, test": 0, "validate, test": 0},
        "misfiled": [],
        "repeated": None,
    }
    facts = {"leaks": found.facts["leaks"] | {"repeated": [("p1", "p9")]}}
    assert "1 pairs of scans in two splits" in pages.leaks(facts, dict(found.shown), None)[3][0]
    assert not section.warnings and "Nothing was found." in section.text
    assert "one person may be in two splits" in leaks_of(sets, each=True)[1].warnings[0]
    assert "In ADNI's archive that is a scan" in leaks_of(sets, kind="class folders")[1].warnings[0]


def test_a_test_person_whom_a_stage_saw_is_named(sets):
    found, section = leaks_of(sets, [("diffusion", ["p1", "p14", "p13"]), ("prior", ["p2"])])
    assert found.shown["seen"] == [("diffusion", ["p13", "p14"])]
    assert section.warnings == ["The diffusion stage saw 2 of the test people, p13 among them."]


def test_planted_slices_are_found_across_splits(sets):
    train, test = sets["train"], sets["test"]
    images = test.images.copy()
    images[3] = 0.9 * train.images[40]
    found, section = leaks_of({**sets, "test": replace(test, images=images)})
    assert found.facts["leaks"]["near-identical pairs"]["train, test"] == 1
    who = f"{NAMES[train.case[40]]}, slice {train.z[40]} (train), and {NAMES[test.case[3]]}, slice {test.z[3]} (test)."
    assert f"Nearly the same slice: {who}" in section.warnings


def test_a_person_filed_under_two_names_is_named():
    """Somebody else's neighbours are farther away than one's own; every second slice of train is in test as well."""
    found = [piece for piece in phantom.slices(6, SIZE, seed=4)]
    z, case = (np.array([piece[key] for piece in found]) for key in ("z", "case"))
    images = np.stack([piece["image"] for piece in found]) / 255.0
    test, train = (case == 6) | ((case == 2) & (z % 2 == 0)), (case <= 3) & ~((case == 2) & (z % 2 == 0))
    whose = np.where(case == 2, 7, case)  # filed under a name of its own
    pairs = audit.misfiled(images[test], z[test], whose[test], images[train])
    named = [(case[test][a], case[train][b]) for a, b in pairs]
    assert named.count((2, 2)) >= 10 and len(pairs) - named.count((2, 2)) <= 5
    assert audit.misfiled(images[test][::2] * 0 + 0.1, z[test][::2] * 2, whose[test][::2], images[train]) == []


# ---- what cannot be said ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values", "sentence"),
    [
        ("reconstruction", {"test": None, "in_pixels": False}, "There are no test people: how faithful"),
        ("distribution", {"test": None}, "There are no test people: the distance"),
        ("distribution", {}, "32 samples are too few for a distance: at least 50 are needed (--count)."),
        ("copies", {"test": None}, "There are no test people: how near"),
        ("texture", {"test": None, "decoded": None}, "There are no test people: how soft or mottled"),
        ("scales", {"test": None, "decoded": None, "bad": {}}, "There are fewer than 4 test people"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence_and_no_number(sets, name, values, sentence):
    measure = getattr(measures, name)
    given = {"samples": sets["test"], "train": sets["train"], "test": sets["test"], "validate": None, **values}
    needed = inspect.signature(measure).parameters
    arguments = {key: given.get(key) for key, p in needed.items() if p.default is p.empty}
    found = measure(**arguments)
    section = pages.section(name, *found[:3], None)
    assert not found.facts and section.warnings[0].startswith(sentence)
    assert not section.tables and not section.figures


def test_in_pixels_there_is_no_first_stage_and_nothing_wrong_with_that(sets):
    found = measures.reconstruction(sets["train"], sets["test"], None, None, in_pixels=True)
    section = pages.section("reconstruction", *found[:3], None)
    assert section.text == ["This model works in pixels: there is no first stage."] and not section.warnings


def test_an_order_that_makes_numbers_meaningless_is_said():
    def said(floor, samples, noisy, blurred):
        kid = {"floor": floor, "samples": samples, "noisy": noisy, "blurred": blurred}
        rows = {name: {"KID": value, "KID's standard error": 0.03} for name, value in kid.items()}
        rows |= {"real people": {"MS-SSIM of pairs": 0.8}}
        return " ".join(pages.rank_warnings(rows, "floor"))

    assert said(0.0, 0.1, 0.5, 0.3) == ""
    assert said(0.0, 0.4, 0.5, 0.3) == "The model is no better than: blurred."
    assert "suspect a leak" in said(0.2, 0.1, 0.5, 0.3) and said(0.2, 0.12, 0.5, 0.3) == "", "within two errors"
