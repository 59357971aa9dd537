"""Who looks like whom: planted repeats are found and nobody else, and so are stacks that change heads."""

import csv
import re

import numpy as np
import pytest
from scipy import ndimage
from small_archives import REAL, encode, needs_real, oasis_entries, write

import dataset
from ldm.data import repeats

SIDE, DEPTH, PEOPLE = 64, 12, 30


def head(seed, ahead=0, turn=0.0, shift=(0, 0), gain=1.0):
    """A stack (DEPTH, SIDE, SIDE) uint8 of an ellipse filled with folds that nobody else has."""
    folds = np.random.default_rng(seed).standard_normal((DEPTH + 4, SIDE, SIDE))
    folds = ndimage.gaussian_filter(folds, (2, 2, 2))[ahead : ahead + DEPTH]
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    brain = (x / 0.6) ** 2 + (y / 0.75) ** 2 < 1
    stack = np.where(brain, 120 + 50 * folds / folds.std(), 0).clip(0, 255)
    if turn:
        stack = ndimage.rotate(stack, turn, axes=(1, 2), reshape=False, order=1)
    return np.clip(gain * ndimage.shift(stack, (0, *shift), order=1), 0, 255).astype(np.uint8)


def archive_of(path, stacks, splits=None):
    """A zip in the course layout of {number: stack}; every fifth person is a test person."""
    entries = {}
    for number, stack in stacks.items():
        split = (splits or {}).get(number, "test" if number % 5 == 0 else "train")
        for z, picture in enumerate(stack):
            entries[f"keras_png_slices_{split}/case_{number:03d}_slice_{z}.nii.png"] = encode(picture)
    return write(path, entries)


PLANTED = {  # number -> who that is, and how the second scan differs
    101: (1, {"shift": (3, -4)}),
    102: (2, {"turn": 5.0, "gain": 1.2}),
    103: (3, {"ahead": 2, "gain": 0.8}),
    104: (5, {"turn": -3.0, "ahead": 1, "shift": (-2, 2)}),  # 5 is a test person
    105: (1, {"turn": 2.0}),  # a third scan of 1
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    stacks = {number: head(number) for number in range(1, PEOPLE + 1)}
    stacks |= {number: head(who, **how) for number, (who, how) in PLANTED.items()}
    splits = {number: "train" for number in PLANTED}
    return archive_of(tmp_path_factory.mktemp("planted") / "oasis.zip", stacks, splits)


def test_planted_repeats_are_found_and_nobody_else(planted, tmp_path, capsys):
    out = tmp_path / "people.csv"
    assert dataset.main(["people", "--data", str(planted), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    expected = {f"{number:03d}": f"{number:03d}" for number in range(1, PEOPLE + 1)}
    expected |= {f"{number:03d}": f"{who:03d}" for number, (who, _) in PLANTED.items()}
    assert {row["case"]: row["person"] for row in csv.DictReader(out.open())} == expected
    assert f"{PEOPLE + len(PLANTED)} by names, {PEOPLE} by looks; 4 have several names, 3 at most, and 1 of" in said
    source = dataset.open_source(planted, labels=out)
    assert sorted(source.case_names.values()) == [f"{number:03d}" for number in range(1, PEOPLE + 1)]
    assert set(source.split[source.case == 5]) == {"test"}  # the training scan of a test person is left out


def test_the_report_hears_of_scans_in_two_splits(planted):
    assert repeats.across_splits(dataset.open_source(planted)) == [("005", "104")]


def test_strangers_are_nobodys_repeats(tmp_path):
    source = dataset.open_source(archive_of(tmp_path / "a.zip", {n: head(n) for n in range(1, PEOPLE + 1)}))
    assert len(repeats.search(source).pairs) == 0


def test_other_columns_of_a_table_are_kept_and_its_people_are_not_believed(planted, tmp_path):
    known, out = tmp_path / "known.csv", tmp_path / "people.csv"
    known.write_text('case,label,person\n1,"A, or B",x\n2,NC,x\n')
    assert dataset.main(["people", "--data", str(planted), "--labels", str(known), "--out", str(out)]) == 0
    rows = {row["case"]: row for row in csv.DictReader(out.open())}
    assert rows["001"] == {"case": "001", "person": "001", "label": "A, or B"}
    assert rows["002"]["person"] == "002" and rows["003"]["label"] == ""


def test_pairs_of_different_labels_set_the_threshold(monkeypatch):
    """Half of the scans are of one kind that is alike by itself: labels tell that this is no likeness of a person."""
    rng = np.random.default_rng(0)
    detail = rng.standard_normal((40, 4, repeats.FRAME**2)).astype(np.float32)
    label = np.arange(40) % 2
    detail[label == 1] += 0.35 * rng.standard_normal(detail.shape[1:]).astype("float32")  # the kind
    detail[2] = detail[0] + 0.1 * detail[2]  # one person
    stacks = repeats.Stacks(np.arange(40), np.zeros((40, 4), int), repeats._unit(detail))
    monkeypatch.setattr(repeats, "CERTAIN", 100)
    found = repeats.find(stacks, label)
    assert found.certain == 400 and found.compared == 780
    assert found.pairs.tolist() == [[0, 2]] and found.likeness[0] > 0.9
    assert repeats.find(stacks, np.full(40, -1)).certain == 0


def test_false_alarms_are_as_many_as_expected(monkeypatch):
    """Where strangers' scores fall exponentially, as many of them lie beyond the threshold as it says."""
    monkeypatch.setattr(repeats, "FALSE_ALARMS", 20.0)
    strangers = np.random.default_rng(0).exponential(0.3, 200_000)
    assert np.sum(strangers > repeats._threshold(strangers, 200_000)) == pytest.approx(20, abs=12)


def test_too_few_stacks_and_single_slices_are_said(tmp_path, capsys):
    few = archive_of(tmp_path / "few.zip", {number: head(number)[:4] for number in range(1, 8)})
    assert dataset.main(["people", "--data", str(few), "--out", str(tmp_path / "a.csv")]) == 0
    assert "too few" in capsys.readouterr().out and not (tmp_path / "a.csv").exists()


def relinked(stacks, first, onward):
    """Stacks that go on with another from slice `first` on: that of number n with the slices of onward[n]."""
    return {n: np.concatenate([stack[:first], stacks[onward[n]][first:]]) for n, stack in stacks.items()}


def test_stacks_that_change_heads_are_said_and_linked_anew(tmp_path, capsys):
    whole = {number: head(number) for number in range(1, PEOPLE + 1)}
    moved = {n: n % PEOPLE + 1 for n in whole} | {7: 7, 6: 8}  # 6 goes on with 8, 7 with itself
    path = archive_of(tmp_path / "a.zip", relinked(whole, 8, moved))
    source = dataset.open_source(path)
    (change,) = repeats.head_changes(source)
    names = [int(source.case_names[c]) for c in source.case[np.unique(source.scan, return_index=True)[1]]]
    assert (change.z, change.after, change.stacks) == (7, 8, PEOPLE)
    assert sorted(names[scan] for scan in change.changed) == sorted(set(whole) - {7})
    onward = {names[a]: names[b] for a, b in zip(change.changed, change.onward, strict=True)}
    assert {moved[there]: n for n, there in onward.items()} == {n: n for n in whole if n != 7}
    assert change.likeness > 0.9
    assert dataset.main(["describe", str(path)]) == 0
    assert "of 24 people change heads between slices 7 and 8" in capsys.readouterr().out
    assert dataset.main(["people", "--data", str(path), "--out", str(tmp_path / "who.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "who.csv").open()))
    links = {(int(row["case"]), int(row["person"])) for row in rows if row["slice"]}
    assert links == {(n, moved[n]) for n in whole if n != 7} and {row["slice"] for row in rows} == {"", "8"}
    linked = dataset.open_source(path, labels=tmp_path / "who.csv")
    assert repeats.head_changes(linked) == []  # and every slice is in the split of its own head
    assert slices_of(linked) == {
        (n, z): (n if z < 8 else {b: a for a, b in moved.items()}[n], z)
        for n, z in ((n, z) for n in whole for z in range(DEPTH))
    }
    assert {int(linked.case_names[c]) for c in np.unique(linked.case[linked.split == "test"])} == set(range(5, 31, 5))


def slices_of(source):
    """{(person, slice): (case, slice) of its file}."""
    files = [tuple(int(word) for word in re.findall(r"case_(\d+)_slice_(\d+)", name)[0]) for name in source.entries]
    people = (int(source.case_names[number]) for number in source.case.tolist())
    return dict(zip(zip(people, source.z.tolist(), strict=True), files, strict=True))


def test_who_was_scanned_twice_is_found_among_stacks_that_change_heads(tmp_path):
    """Two scans of one person, each of which goes on with somebody else from slice 5 on."""
    whole = {number: head(number) for number in range(1, PEOPLE + 1)} | {31: head(2, turn=4.0, gain=1.1)}
    moved = {n: n % 31 + 1 for n in whole}
    path, out = archive_of(tmp_path / "a.zip", relinked(whole, 5, moved)), tmp_path / "who.csv"
    assert dataset.main(["people", "--data", str(path), "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert {row["case"]: row["person"] for row in rows if not row["slice"]}["031"] == "002"
    source = dataset.open_source(path, labels=out)
    assert len(source.case_names) == PEOPLE and len(np.unique(source.scan)) == PEOPLE + 1
    second = [name for name, case in zip(source.entries, source.case, strict=True) if source.case_names[case] == "002"]
    assert {re.search(r"case_(\d+)_", name)[1] for name in second} == {"002", "001", "031", "030"}


SWAP = "case,slice,person,label\n1,,1,NC\n2,,2,NC\n3,,3,AD\n4,,4,AD\n2,2,4,\n4,2,2,\n"  # 2 and 4 from slice 2 on


def test_masks_labels_and_splits_go_along_with_the_head(tmp_path):
    path = write(tmp_path / "a.zip", oasis_entries({"train": [1, 2], "validate": [3], "test": [4]}, slices=4))
    (tmp_path / "t.csv").write_text(SWAP)
    source = dataset.open_source(path, labels=tmp_path / "t.csv")
    found = slices_of(source)
    assert found == {(n, z): ({2: 4, 4: 2}.get(n, n) if z > 1 else n, z) for n in range(1, 5) for z in range(4)}
    assert all(re.findall(r"\d+", source.masks[name]) == re.findall(r"\d+", name) for name in source.entries)
    for person, split, label in ((2, "train", "NC"), (4, "test", "AD")):
        mine = source.case == person
        assert set(source.split[mine]) == {split} and {source.label_names[n] for n in source.label[mine]} == {label}
    assert len(np.unique(source.scan)) == 4
    assert "the table gives 4 slices to another head than their names do" in source.listing.notes
    (tmp_path / "t.csv").write_text(SWAP + "3,4,1,\n")
    (note,) = [
        note for note in dataset.open_source(path, labels=tmp_path / "t.csv").listing.notes if "move no slice" in note
    ]
    assert note == "rows of the table that move no slice: 1 (such as case 3 from slice 4 on)"


@pytest.mark.parametrize(
    "rows, words",
    [
        ("2,2,4,\n", ["_slice_2.nii.png' and ", "would both be slice 2 of 004", "'slice'"]),
        ("2,2,9,\n", ["nobody is called '9'", "slices of 002"]),
        ("2,-1,4,\n", ["'-1' in the column 'slice' of case 2"]),
        ("2,x,4,\n", ["'x' in the column 'slice' of case 2"]),
        ("2," + "1" * 400 + ",4,\n", ["in the column 'slice' of case 2"]),
        ("2,2,4,AD\n", ["case 2 from slice 2 on", "nothing else"]),
        ("2,2,,\n", ["case 2 from slice 2 on", "must say the person"]),
    ],
)
def test_links_that_cannot_be_are_one_sentence(rows, words, tmp_path):
    path = write(tmp_path / "a.zip", oasis_entries({"train": [1, 2], "validate": [3], "test": [4]}, slices=4))
    (tmp_path / "t.csv").write_text("case,slice,person,label\n1,,1,NC\n2,,2,NC\n" + rows)
    with pytest.raises(dataset.DataError) as caught:
        dataset.open_source(path, labels=tmp_path / "t.csv")
    said = str(caught.value)
    assert "\n" not in said and "t.csv" in said and all(word in said for word in words), said


def test_two_changes_are_composed(tmp_path):
    """Slices from the second change on belong to whom the first change has moved the slices before it."""
    whole = {number: head(number) for number in range(1, PEOPLE + 1)}
    once, twice = ({n: (n + by - 1) % PEOPLE + 1 for n in whole} for by in (1, 5))
    path = archive_of(tmp_path / "a.zip", relinked(relinked(whole, 5, once), 9, twice))
    lines, links = repeats.propose_links(dataset.open_source(path))
    assert ["slices 4 and 5" in lines[0], "slices 8 and 9" in lines[1], len(lines)] == [True, True, 2]
    belongs = {(int(n), z): int(whose) for n, onward in links.items() for z, whose in onward.items()}
    # From slice 9 on, stack n has what stack twice[n] had: of person once[twice[n]], as built by `relinked`.
    assert belongs == {(n, 5): once[n] for n in whole} | {(n, 9): once[twice[n]] for n in whole}


def test_good_stacks_single_slices_and_slices_far_apart_change_no_heads(tmp_path):
    path = archive_of(tmp_path / "a.zip", {number: head(number) for number in range(1, 9)})
    assert repeats.describe(dataset.open_source(path)) == []
    apart = archive_of(tmp_path / "c.zip", {number: head(number, ahead=0)[::6] for number in range(1, 9)})
    noise = {number: np.concatenate([head(number + 50 * z)[:1] for z in range(5)]) for number in range(1, 9)}
    assert repeats.describe(dataset.open_source(apart)) == []
    assert repeats.describe(dataset.open_source(archive_of(tmp_path / "d.zip", noise))) == []
    single = archive_of(tmp_path / "b.zip", {number: head(number)[:1] for number in range(1, 9)})
    assert repeats.describe(dataset.open_source(single)) == []


@needs_real
@pytest.mark.slow
def test_planted_repeats_among_real_people():
    """OASIS: of 40 second scans, shifted, turned, brighter and with other slice indices, most are found; no others."""
    source = dataset.open_source(REAL / "oasis1_slices.zip", check=False)
    pictures = [dataset.read_split(source, split, repeats.SIDE)["image"] for split in dataset.SPLITS]
    order = np.concatenate([source.select(split) for split in dataset.SPLITS])
    images = np.empty((len(order), repeats.SIDE, repeats.SIDE), np.float32)
    images[order] = 127.5 * (np.concatenate(pictures)[..., 0] + 1)
    rng, stacks = np.random.default_rng(0), [images[source.scan == scan] for scan in np.unique(source.scan)]
    planted = {number: len(stacks) + place for place, number in enumerate(range(0, 160, 4))}
    for number in planted:
        first = rng.integers(4)
        stack = ndimage.rotate(stacks[number][first : first + 29], rng.uniform(-8, 8), axes=(1, 2), reshape=False)
        stack = ndimage.shift(stack, (0, *rng.uniform(-6, 6, 2)), order=1)
        stacks.append(np.clip(rng.uniform(0.7, 1.3) * stack, 0, 255))
    detail = np.zeros((len(stacks), repeats.PLACES, repeats.FRAME**2), np.float32)
    for place, stack in enumerate(stacks):
        middle = len(stack) // 2
        detail[place] = repeats._detail(stack[middle - 7 : middle + 7])
    found = repeats.find(
        repeats.Stacks(np.arange(len(stacks)), np.zeros(detail.shape[:2], int), detail), -np.ones(len(stacks))
    )
    pairs = {tuple(pair) for pair in found.pairs.tolist()}
    print(
        f"{len(pairs & set(planted.items()))} of {len(planted)} found, {len(pairs - set(planted.items()))} false alarms"
    )
    assert pairs <= set(planted.items()) and len(pairs) >= 0.9 * len(planted)
