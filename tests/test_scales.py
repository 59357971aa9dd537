"""ldm/judging/scales.py: areas are those of scikit-learn, people pass, planted faults are told, and nothing else is."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage, stats
from sklearn.metrics import roc_auc_score

from ldm.drawing import looks, pages
from ldm.judging import measures, scales
from ldm.judging.measures import Slices
from ldm.judging.scales import Described


def taken(slices, which):
    return slices.take(np.isin(slices.case, np.unique(slices.case)[which]))


@pytest.fixture(scope="module")
def brains():
    """48 people, four slices each, 64 pixels: a disc of blobs and grain, whose contrast is the person's own."""
    rng, count = np.random.default_rng(0), 48
    z, case = np.tile(np.arange(4), count), np.repeat(np.arange(count), 4)
    noise = rng.standard_normal((2, len(z), 64, 64))
    blobs = ndimage.gaussian_filter(noise[0], (0, 3, 3)) * 10 * (1 + 0.1 * rng.standard_normal(count)[case, None, None])
    grain = ndimage.gaussian_filter(noise[1], (0, 0.7, 0.7))
    inside = np.hypot(*np.mgrid[-32:32, -32:32])[None] < 20 + 2 * z[:, None, None]
    images = np.where(inside, np.clip(0.5 + 0.12 * blobs + 0.05 * grain, 0.1, 1), 0)[..., None].astype("float32")
    return Slices(images, z, np.zeros(len(z), int), case)


@pytest.fixture(scope="module")
def described(brains):
    parts = {"train": slice(0, 24), "validate": slice(24, 36), "test": slice(36, 48)}
    return {name: scales.describe(taken(brains, part)) for name, part in parts.items()}


def scored(values, z=None, case=None):
    z = np.zeros(len(values), int) if z is None else z
    return Described([], z, np.arange(len(values)) if case is None else case)


def test_the_area_is_scikit_learns_at_one_index_and_known_for_two_bells():
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal(4000), 1 + rng.standard_normal(3000)
    area, error = scales.auc(real, scored(real), fake, scored(fake))
    assert area == pytest.approx(roc_auc_score(np.repeat([0, 1], [4000, 3000]), np.concatenate([real, fake])))
    assert area == pytest.approx(stats.norm.cdf(1 / np.sqrt(2)), abs=4 * error) and error < 0.01
    tied = scales.auc(np.zeros(5), scored(range(5)), np.zeros(4), scored(range(4)))
    assert tied == (0.5, 0.0)


def test_slices_of_other_indices_are_no_evidence():
    """Scores that follow the slice index say nothing, even if the generated set has more of the high ones."""
    rng = np.random.default_rng(0)
    z, more = rng.integers(0, 4, 500), np.minimum(3, rng.integers(0, 6, 500))
    area, _ = scales.auc(10.0 * z, scored(z, z), 10.0 * more, scored(more, more))
    assert area == 0.5
    assert np.isnan(scales.auc(np.zeros(2), scored([0, 0]), np.ones(2), scored([1, 1], np.array([9, 9])))[0])


def test_the_error_is_that_of_other_people():
    """Ten slices of a person are not ten people: the spread over repetitions is what the error says."""
    rng, found = np.random.default_rng(0), []
    case = np.repeat(np.arange(12), 10)
    for _ in range(150):
        real = np.repeat(rng.standard_normal(12), 10) + 0.1 * rng.standard_normal(120)
        fake = rng.standard_normal(100)
        found.append(scales.auc(real, scored(real, case=case), fake, scored(fake)))
    areas, errors = np.transpose(found)
    assert np.std(areas) == pytest.approx(np.sqrt(np.mean(errors**2)), rel=0.15)


def test_gain_place_and_mirroring_change_no_statistic(brains):
    some = brains.take(np.arange(6))
    base = scales.describe(some).up_to(9)
    same = {
        "gain": 0.7 * some.images,
        "mirror": some.images[:, :, ::-1],
        "place": np.roll(some.images, (2, -2), axis=(1, 2)),  # two pixels are one of the coarsest level
    }
    for name, images in same.items():
        other = scales.describe(replace(some, images=images)).up_to(9)
        scale = base.std(axis=0) + 1e-3
        assert np.median(np.abs(other - base) / scale) < 0.05, name


def test_levels_are_means_of_squares():
    images = np.random.default_rng(0).random((2, 96, 96))
    found = scales.levels(images)
    assert [level.shape[1] for level in found] == [24, 48, 96]
    np.testing.assert_allclose(found[0][0, 1, 2], images[0, 4:8, 8:12].mean())


def test_people_pass_and_planted_faults_do_not(brains, described):
    train, validate, test = (described[name] for name in ("train", "validate", "test"))
    people = scales.judge(train, validate, test, seeds=2)
    assert all(looks.passes(row) for row in people) and len(people) == 2
    own = taken(brains, slice(36, 48))
    rng = np.random.default_rng(0)
    brain = own.images > 0.04
    speckled = np.clip(own.images + 0.08 * rng.standard_normal(own.images.shape) * brain, 0, 1).astype("float32")
    faults = {"soft": ndimage.gaussian_filter(own.images, (0, 0.7, 0.7, 0)), "speckled": speckled}
    for name, images in faults.items():
        fake = scales.describe(replace(own, images=images))
        rows = scales.judge(train, fake, test, same=True, seeds=2)
        assert rows[-1]["AUC"] > 0.9 and not looks.passes(rows[-1]), name
        assert rows[-1]["AUC"] > rows[0]["AUC"] - 0.05, "a finer picture has all that a coarser one has"
        assert scales.pairs_needed(train, fake, test, same=True) <= 16
    assert scales.pairs_needed(train, validate, test) is None


def test_a_slice_is_never_judged_by_who_has_learnt_it(described):
    """With statistics that are a person's name and nothing else, learning by heart must give 0.5."""
    rng = np.random.default_rng(0)

    def named(count, first):
        case = np.repeat(np.arange(count), 4) + first
        values = rng.standard_normal((count, 200)).repeat(4, axis=0)
        return Described([values], np.tile(np.arange(4), count), case)

    train, fake = named(40, 0), named(30, 100)
    (row,) = scales.judge(train, fake, named(30, 200), seeds=2)
    assert abs(row["AUC"] - 0.5) < 3 * row["error"]
    mixed = named(30, 300)
    (row,) = scales.judge(
        train, mixed, mixed, same=True, seeds=4
    )  # those who taught what is generated would score high
    assert row["AUC"] > 0.4


def test_pieces_lie_in_the_brain_and_equal_sets_are_at_no_distance(brains):
    pieces, rows = scales.patches(brains.images[:8], 8, 3)
    assert pieces.shape == (24, 64) and np.bincount(rows).tolist() == [3] * 8
    assert np.abs(pieces.mean(axis=1)).max() < 1e-5 and pieces.std(axis=1).min() > 0
    own, other, third = (taken(brains, part) for part in (slice(0, 16), slice(16, 32), slice(32, 48)))
    value, error = scales.patch_distance(own, other, 8, third, count=8)
    assert abs(value) < 3 * error
    soft = replace(other, images=ndimage.gaussian_filter(other.images, (0, 1, 1, 0)))
    value, error = scales.patch_distance(own, soft, 8, third, count=8)
    assert value > 3 * error
    assert scales.patch_distance(own, other, 128, third) is None


def rows_of(*areas):
    return {"levels": [{"AUC": area, "error": 0.02, "seeds": 0.0} for area in areas]}


def test_what_passes_and_what_does_not_is_said():
    found = {"validation people": rows_of(0.5, 0.52), "decoded": rows_of(0.5, 0.97), "samples": rows_of(0.52, 1.0)}
    said = looks.scale_warnings(found, [32, 64])
    assert said[0].startswith("Samples are told from people at 64 pixels already: a classifier is right in 100%")
    assert said[1].startswith("Decoded test people are told from people at 64 pixels") and len(said) == 2
    assert "too few slices" in looks.scale_warnings({"samples": rows_of(0.9, 0.5)}, [32, 64])[1]
    assert "does not even tell blurred" in looks.scale_warnings({"blurred": rows_of(0.5, 0.5)}, [32, 64])[0]
    assert looks.scale_warnings({"samples": rows_of(0.5, 0.51)}, [32, 64]) == []


def test_the_section_has_every_set_at_every_size(brains, tmp_path):
    train, validate, test = (taken(brains, s) for s in (slice(0, 24), slice(24, 36), slice(36, 48)))
    soft = replace(train, images=ndimage.gaussian_filter(train.images, (0, 1, 1, 0)))
    samples = replace(validate, case=np.arange(len(validate)))
    measured = measures.scales(samples, train, test, validate, None, {"blurred": soft})
    assert measured.facts["scales"]["pixels"] == [32, 64]
    assert set(measured.facts["scales"]["sets"]) == {"validation people", "samples", "blurred"}
    section = pages.section("scales", *measured[:3], None)
    assert section.tables[0].columns[1:3] == ["32 pixels", "64 pixels"]
    assert [row[0] for row in section.tables[0].rows] == ["validation people", "samples", "blurred"]
    assert measured.facts["scales"]["sets"]["blurred"]["pairs needed"] <= 16
    level = measured.facts["scales"]["sets"]["samples"]["levels"][0]  # as `evaluate.py compare` and docs/ write it
    assert section.tables[0].rows[1][1] == f"{level['AUC']:.2f} ± {level['error']:.2f}"
    assert "Samples pass at 32, 64 pixels." in section.text
