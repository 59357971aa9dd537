"""ldm/judging/usefulness.py: sets whose use is known by construction, and what cannot be said."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from ldm.drawing import pages
from ldm.judging import audit, measures, metrics, usefulness
from ldm.judging.measures import Slices


def slices(people, seed, shift=0.3, each=4):
    """People with labels 0 and 1 in turn; a square in the middle is brighter by `shift` in label 1."""
    rng = np.random.default_rng(seed)
    case, z = np.repeat(np.arange(people), each), np.tile(np.arange(each), people)
    label = case % 2
    images = 0.4 + 0.1 * rng.standard_normal((people, 1, 8, 8))[case].repeat(4, axis=2).repeat(4, axis=3)
    images = images[:, 0, :, :, None] + 0.02 * rng.standard_normal((len(z), 32, 32, 1)) + z[:, None, None, None] / 50
    images[:, 12:20, 12:20] += shift * label[:, None, None, None]
    return Slices(np.clip(images, 0, 1).astype("float32"), z, label, case + 1000 * seed)


TRAIN, HELD = slices(40, 1), slices(24, 2)


def test_good_slices_teach_what_people_teach_and_wrong_labels_teach_nothing():
    good = slices(40, 3)
    wrong = replace(good, label=good.case // 2 % 2)  # half right, half wrong
    rows = measures.use(good, TRAIN, HELD, ["AD", "NC"]).facts["use"]["label"]
    assert list(rows) == ["drawn slices", "as many real people", "all real people", "real and drawn"]
    assert [row["people"] for row in rows.values()] == [40, 40, 40, 80]
    assert min(row["AUC"] for row in rows.values()) > 0.9
    low, high = rows["drawn slices"]["interval"]
    assert low > 0.6 and high == pytest.approx(1.0, abs=0.01)
    bad = measures.use(wrong, TRAIN, HELD, ["AD", "NC"]).facts["use"]["label"]
    assert bad["drawn slices"]["interval"][0] < 0.5 < bad["drawn slices"]["interval"][1]
    low, high = bad["drawn slices"]["gap's interval"]
    assert low < bad["drawn slices"]["gap"] < high < 0, "the same people were tested, so that a gap is told"
    assert rows["drawn slices"]["gap's interval"][0] <= 0 <= rows["drawn slices"]["gap's interval"][1]
    assert rows["all real people"]["gap"] == 0 and rows["all real people"]["gap's interval"] == [0, 0]
    assert bad["all real people"] == rows["all real people"], "which has nothing to do with the samples"


def test_a_classifier_that_knows_the_slice_index_only_knows_nothing():
    """Label and slice index go together in the drawn slices; of people they do not."""
    tied = slices(40, 3, shift=0.0)
    tied = replace(tied, label=(tied.z >= 2).astype(int), case=np.arange(len(tied)))
    row = measures.use(tied, TRAIN, HELD, ["AD", "NC"]).facts["use"]["label"]["drawn slices"]
    assert row["interval"][0] < 0.5 < row["interval"][1]


def test_the_page_says_it():
    found = measures.use(slices(40, 3), TRAIN, HELD, ["AD", "NC"])
    section = pages.section("use", *found[:3], None)
    assert section.text[0].startswith("AD or NC, told by a small classifier") and len(section.tables[0].rows) == 4
    assert "Drawn slices teach as much, as far as can be told, as all real people: AUC " in section.text[1]


def test_the_area_is_scikit_learns(monkeypatch):
    """Of the scores of people, which are means over their slices; one seed, nobody resampled."""
    noisy, scores = slices(40, 3, shift=0.02), []
    decide = LogisticRegression.decision_function
    monkeypatch.setattr(LogisticRegression, "decision_function", lambda *a: scores.append(decide(*a)) or scores[-1])
    mean = metrics.mean_images([(audit.shrunk(TRAIN.images, usefulness.SIDE), TRAIN.z)])
    found = usefulness.trained_and_tested({"one": [noisy]}, HELD, mean, "one", seeds=1)
    people = np.unique(HELD.case)
    of_person = [scores[0][HELD.case == person].mean() for person in people]
    label = [HELD.label[HELD.case == person][0] for person in people]
    assert found["one"]["AUC"] == pytest.approx(roc_auc_score(label, of_person)) and found["one"]["AUC"] < 1


def test_few_people_or_no_labels_are_said():
    for arguments, sentence in (
        ((slices(4, 3), TRAIN, HELD, ["AD", "NC"]), "Fewer than 4 people or heads of each label"),
        ((TRAIN, TRAIN, HELD, []), "The data has no labels"),
        ((TRAIN, TRAIN, None, ["AD", "NC"]), "There are no test people"),
    ):
        found = measures.use(*arguments)
        assert not found.facts and pages.section("use", *found[:3], None).warnings[0].startswith(sentence)


def test_a_segmenter_learns_what_masks_say():
    """Three grey levels with noise; masks whose classes are named in turn teach nothing of use."""
    rng = np.random.default_rng(0)
    classes = rng.integers(1, 4, (12, 4, 4)).repeat(8, axis=1).repeat(8, axis=2)
    images = (classes / 4 + 0.03 * rng.standard_normal(classes.shape))[..., None].astype("float32")
    tested = (images[8:], classes[8:])
    sets = {"right": (images[:8], classes[:8]), "wrong": (images[:8], classes[:8] % 3 + 1)}
    found = usefulness.segmented(sets, tested, seeds=2)
    assert min(mean for mean, _ in found["right"]) > 0.95
    assert max(mean for mean, _ in found["wrong"]) < 0.05
    assert all(0 <= deviation < 0.1 for _, deviation in found["right"])
