"""ldm/judging/faults.py: a planted fault moves what it must by as many errors as a formula says."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from ldm.drawing import pages
from ldm.judging import faults, measures, scales
from ldm.judging.measures import Slices
from ldm.judging.scales import Described


@pytest.fixture(scope="module")
def people():
    """24 people, four slices each, 64 pixels: a grey disc of a bright blotchy core and a dark hole, larger in AD."""
    rng, count = np.random.default_rng(0), 24
    z, case = np.tile(np.arange(4), count), np.repeat(np.arange(count), 4)
    label, own = case % 2, rng.standard_normal(count)[case]
    radius = np.hypot(*np.mgrid[-32:32, -32:32])[None]
    core = (
        radius < 16 + 1.5 * z[:, None, None] + ndimage.gaussian_filter(rng.standard_normal((96, 64, 64)), (0, 2, 2)) * 8
    )
    hole = radius < (5 + 3 * (label == 0) + 0.3 * own)[:, None, None]
    images = np.where(hole, 0.15, np.where(core, 0.8 + 0.02 * own[:, None, None], 0.5))
    images += 0.03 * ndimage.gaussian_filter(rng.standard_normal(images.shape), (0, 0.5, 0.5))
    images = np.where(radius < (22 + 2 * z)[:, None, None], np.clip(images, 0.1, 1), 0)
    return Slices(images[..., None].astype("float32"), z, label, case)


def test_a_move_is_in_errors_of_two_sets_of_people():
    rng = np.random.default_rng(0)
    own = rng.standard_normal(20)
    own = 2 * (own - own.mean()) / own.std(ddof=1)
    case, z = np.repeat(np.arange(20), 3), np.tile(np.arange(3), 20)
    before = own[case] + 5.0 * z
    assert faults.move(before, before - 1.5, z, case) == pytest.approx(1.5 / (2 * np.sqrt(2 / 20)))
    assert faults.move(before, before, z, case) == pytest.approx(0, abs=1e-9)
    assert faults.move(np.full(60, np.nan), before, z, case) == 0
    assert faults.move(before, before - 1.5, z, case, 0.5) == pytest.approx(3)
    assert np.isnan(faults.error_of(np.full(60, np.nan), z, case))


def test_more_slices_of_a_person_make_the_error_smaller_and_the_move_as_large(people):
    """Faults are planted in some slices, errors are of all: a noisy number of 32 slices is known better than of two."""
    rng = np.random.default_rng(0)
    case, z = np.repeat(np.arange(20), 32), np.tile(np.arange(32), 20)
    values = 0.1 * rng.standard_normal(20)[case] + rng.standard_normal(640)
    few = np.isin(z, (8, 24))
    errors = [faults.error_of(values[rows], z[rows], case[rows]) for rows in (few, np.full(640, True))]
    assert errors[1] == pytest.approx(np.sqrt(0.01 + 1 / 32) * np.sqrt(2 / 20), rel=0.3) and errors[0] > 2 * errors[1]

    some = people.take(people.case < 6)
    rows = np.isin(some.z, (0, 2))
    part = some.take(rows)
    before, after = faults.numbers(some), faults.numbers(faults.plant(part, faults.GAIN, 0.1))
    found = faults.of_images(some, (0, 2), {})[faults.GAIN][0.1]
    for name, values in before.items():
        error = faults.error_of(values, some.z, some.case)
        assert found[name] == pytest.approx(faults.move(values[rows], after[name], part.z, part.case, error)), name


def test_the_smallest_is_found_with_all_larger_ones():
    moves = {0.5: {"a": 2.5, "b": 1.0}, 1: {"a": 1.0, "b": 1.9}, 2: {"a": 2.1, "b": 3.0}, 4: {"a": 9.0}}
    found = faults.smallest(moves)
    assert (found["found"], found["by"]) == (2, "b") and found["errors"] == {"0.5": 2.5, "1": 1.9, "2": 3.0, "4": 9.0}
    assert faults.smallest({1: {"a": 1.9}})["found"] is None and faults.smallest({1: {}})["errors"] == {"1": 0.0}


def test_blur_gain_and_noise_are_found_by_what_they_change(people):
    people, rng = people.take(people.case < 12), np.random.default_rng(1)
    noisy = np.clip(people.images + 0.1 * rng.standard_normal(people.images.shape), 0, 1) * (people.images > 0)
    same = {0: people, 0.1: people, 0.3: replace(people, images=noisy.astype("float32"))}
    moves = faults.of_images(people, np.unique(people.z), same)
    found = {fault: faults.smallest(of) for fault, of in moves.items()}
    assert found[faults.BLUR]["found"] == 0.5
    assert found[faults.NOISE]["found"] == 0.3 and found[faults.NOISE]["errors"]["0.1"] == 0
    assert moves[faults.GAIN][0.2]["white matter's peak"] > moves[faults.GAIN][0.1]["white matter's peak"] > 2


def test_the_index_is_told_and_a_wrong_one_is_found(people):
    z = np.arange(400) % 32
    values = np.stack([z + 0.0, np.random.default_rng(0).standard_normal(400)], axis=1)
    told = faults.index_told(Described([values], z, z), Described([values], z, z))
    assert np.corrcoef(told, z)[0, 1] > 0.99 and np.abs(told - z).mean() < 2  # the penalty pulls towards the middle
    train, test = people.take(people.case < 12), people.take(people.case >= 12)
    moves = [of[faults.TOLD] for of in faults.of_index(*map(scales.describe, (train, test))).values()]
    assert moves == pytest.approx(moves[0] * np.array([1, 2, 4])) and moves[1] > 2


def test_a_label_under_the_other_is_found_by_the_ventricles(people):
    found = faults.of_label(people, ("AD", "NC"))
    assert found[1.0][faults.VENTRICLES] > 2
    assert found[0.5][faults.VENTRICLES] == pytest.approx(found[1.0][faults.VENTRICLES] / 2)
    assert faults.of_label(people, ("AD",)) is None
    assert faults.of_label(people.take(people.label == 0), ("AD", "NC")) is None


def test_people_left_out_leave_those_farther_away_who_are_like_them():
    rng = np.random.default_rng(0)
    case, z = np.repeat(np.arange(30), 2), np.tile([3, 4], 30)
    values = rng.standard_normal((30, 8))[case]
    test = Described([values + 0.01 * rng.standard_normal(values.shape), values], z, case)
    others = Described([values, values], z, case)
    moves = [of[faults.NEAREST] for of in faults.of_people(test, others).values()]
    assert 2 < moves[0] < moves[1] < moves[2]
    apart = Described([values, values], z + 10, case)
    assert [*faults.of_people(test, apart).values()][0][faults.NEAREST] == 0, "slices of other indices are not near"


def test_copies_are_found_where_there_are_more_than_chance_brings():
    rng = np.random.default_rng(0)
    honest, usual = 0.2 + 0.05 * rng.random((2, 640))
    found = faults.of_copies(honest, usual, np.repeat(np.arange(20), 32))
    moves = [of["share of copies"] for of in found.values()]
    assert moves == sorted(moves) and moves[-1] > 2


def test_the_section_says_what_cannot_be_told(people):
    train, test = people.take(people.case < 12), people.take(people.case >= 12)
    measured = measures.power(train, test, train, {}, ("AD", "NC"))
    section = pages.section("power", *measured[:3], None)
    rows = {row[0]: row for row in section.tables[0].rows}
    assert set(rows) == {faults.BLUR, faults.GAIN, faults.INDEX, faults.LEFT_OUT, faults.COPIES} | {
        "share of AD drawn under the label NC"
    }
    assert rows[faults.BLUR][1] == "0.5" and "There is no first stage" in section.text[1]
    alone = measures.power(train, test, None, {}, ("AD", "NC")).facts["power"]
    assert set(alone) == set(rows), "without validation people half of the test people stand for samples"
    nothing = {"power": {faults.BLUR: faults.smallest({1: {"a": 0.5}})}}
    section = pages.section("power", nothing, {"people": 4, "first stage": True, "labels": []}, None, None)
    assert section.tables[0].rows[0][1] == "cannot be told" and "no labels" in section.text[1]
