"""Batches out of archives: a stream that depends on (seed, n) alone, tables of people, the command line."""

import dataclasses
import io
import json
import os
import zipfile

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from small_archives import REAL, THREE, assert_same, brain, encode, needs_real, oasis_entries, take, write

import dataset
from dataset import DataError, make_dataset, open_source


@pytest.fixture
def course(tmp_path):
    """A small archive in the OASIS course layout, 4 / 1 / 1 people."""
    return write(tmp_path / "oasis.zip", oasis_entries(THREE))


def test_labels_table(tmp_path):
    entries = oasis_entries(THREE) | {"keras_png_slices_data/labels.csv": b"case,label,age\n001,NC,70\n2,AD,71\n3,,4\n"}
    source = open_source(write(tmp_path / "a.zip", entries))
    assert source.label_names == ("AD", "NC")
    assert [source.label[source.case == case][0] for case in (1, 2, 3, 4)] == [1, 0, -1, -1]
    bad = entries | {"keras_png_slices_data/labels.csv": b"person;label\n1;AD\n"}
    with pytest.raises(DataError, match="column case"):
        open_source(write(tmp_path / "b.zip", bad))


def test_facts_of_people(tmp_path):
    """Numbers in standard deviations of the training people, categories by place, the unknown NaN; in every batch."""
    path = write(tmp_path / "a.zip", oasis_entries(THREE, slices=2))
    table = tmp_path / "people.csv"
    table.write_text("case,label,age,sex\n1,NC,70,M\n002,AD,74,F\n6,AD,90,\n")
    source = open_source(path, labels=table)
    columns = source.columns(["age", "sex"])
    assert columns == {
        "age": {"kind": "number", "mean": 72.0, "std": 2.0},
        "sex": {"kind": "category", "values": ["F", "M"]},
    }
    known = {1: (-1, 1), 2: (1, 0), 3: (np.nan, np.nan), 4: (np.nan, np.nan), 6: (9, np.nan)}  # 6 is a test person
    for case, facts in known.items():
        np.testing.assert_array_equal(dataset.covariates_of(source, np.array([case]), columns), [facts])
    batches = dataset.with_covariates(make_dataset(source, "train", 16, 3, True), source, source.columns(["sex"]))
    for batch in take(batches, 3):
        np.testing.assert_array_equal(batch["covariates"][:, 0], [known[case][1] for case in batch["case"].tolist()])


def test_tables_as_people_write_them(tmp_path):
    """Blanks around names, equal rows, words for the unknown, a constant column; labels are those of all rows."""
    path, table = write(tmp_path / "a.zip", oasis_entries(THREE, slices=2)), tmp_path / "people.csv"
    table.write_text("case, label, age,site\n1, NC, 70,4\n1,NC,70,4\n2,AD,unknown,4\n99,MCI,71,4\n")
    source = open_source(path, labels=table)
    assert source.label_names == ("AD", "MCI", "NC")
    assert source.label[source.case == 1].tolist() == [2, 2]
    columns = source.columns()
    assert columns["age"] == {"kind": "number", "mean": 70.0, "std": 1.0}
    np.testing.assert_array_equal(dataset.covariates_of(source, np.array([1, 2]), columns), [[0, 0], [np.nan, 0]])
    table.write_text("case,age\n1,inf\n")
    source = open_source(path, labels=table)
    with pytest.raises(DataError, match="case 001: inf is no finite number"):
        dataset.covariates_of(source, np.array([1]), source.columns())
    with pytest.raises(DataError, match="nothing says the sex"):
        dataset.covariates_of(source, np.array([1]), {"sex": {"kind": "category", "values": ["F"]}})


@pytest.mark.parametrize(
    "text, said",
    [
        ("case,label\n1,AD\n001,NC\n", "two rows for case 1 that disagree"),
        ("case,label\n77,AD\n", "names nobody"),
        ("case\n1\n", "another"),
        ("case,label\n1,A\0D\n", "zero bytes"),
        (",".join(["case", *map(str, range(50_000))]) + "\n", "50,001 columns"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(tmp_path, text, said):
    path, table = write(tmp_path / "a.zip", oasis_entries(THREE)), tmp_path / "people.csv"
    table.write_text(text)
    with pytest.raises(DataError, match=said):
        open_source(path, labels=table)
    with pytest.raises(DataError, match="cannot be read"):
        open_source(path, labels=tmp_path / "none.csv")


def test_unknown_split_and_bad_numbers(course):
    with pytest.raises(DataError, match="train, validate, test"):
        make_dataset(course, "valid", 16, 2, training=False)
    with pytest.raises(DataError, match="--seed"):
        open_source(course, seed=-1)
    with pytest.raises(DataError, match="positive"):
        make_dataset(course, "train", 16, 0, training=True)


def test_manifest_is_json_and_names_everybody(course):
    manifest = json.loads(json.dumps(open_source(course, seed=5).manifest()))
    assert manifest["bytes"] == course.stat().st_size
    assert manifest["images"] == manifest["masks"] == 18
    assert manifest["seed"] == 5 and manifest["z"] == [0, 2] and manifest["kind"] == "oasis"
    assert manifest["splits"]["test"] == {"people": 1, "images": 3, "cases": ["006"], "made": "archive"}
    before = manifest["sha256"]
    assert len(before) == 64
    write(course, oasis_entries(THREE, slices=2))
    assert open_source(course).manifest()["sha256"] != before


def test_an_archive_is_hashed_once(course, monkeypatch):
    calls = []
    monkeypatch.setattr(dataset.archive, "fingerprint", lambda files: calls.append(files) or "0" * 64)
    source = open_source(course)
    assert not calls  # who writes nothing down does not pay for it
    assert source.manifest() == source.manifest() and source.manifest()["sha256"] == "0" * 64
    assert len(calls) == 1


def test_describe_says_what_was_understood(tmp_path, capsys):
    stacks = [f"set/train/{'AD' if p % 2 else 'NC'}/sub-{p}_ses-1" for p in range(9)]
    entries = {f"{stack}_{z}.png": encode(brain(z)) for stack in stacks for z in (7, 8)}
    entries |= {"set/cover.png": encode(brain(0)), "set/labels.csv": b"case,age\n1,70\n"}
    path = str(write(tmp_path / "a.zip", entries))
    assert dataset.main(["describe", path]) == 0
    said = capsys.readouterr().out
    for line in (
        "class folders, 18 slices",
        "'set/train/NC/sub-0_ses-1_7.png': person sub-0, scan ses-1, slice 7, label NC, split train",
        "train, AD: 3 people, 6 slices",
        "left out, the name says no person: 1, such as 'set/cover.png'",
        "column age: number, known of 1 of 9 people",
    ):
        assert line in said, said
    assert dataset.main(["describe", path, "--person", r"sub-(?P<person>\d)"]) == 2
    assert "finds nobody in 'set/cover.png'" in capsys.readouterr().err
    assert dataset.main(["describe", path, "--person", "each", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["person"] == "each"


def test_tables_are_read_strictly(tmp_path):
    path, table = write(tmp_path / "a.zip", oasis_entries({"train": range(1, 11)}, slices=1)), tmp_path / "people.csv"
    rows = "".join(f"{case},{60 + case}\n" for case in range(1, 9))
    for text, said in (
        (f"case,age\n{rows}9,about 70\n", "numbers in the column 'age', but also 'about 70' of case 9"),
        ("case,sex\n1,f\n2,F\n", "both 'f' and 'F' in the column 'sex'"),
        ("case,sex\n1,f,70\n", "more cells than columns"),
        ("case,sex,sex\n1,f,f\n", "'sex' twice"),
        ('case,sex\n1,"f\n2,m\n', "quote"),
    ):
        table.write_text(text)
        with pytest.raises(DataError, match=said):
            open_source(path, labels=table)
    table.write_text("case,site\n1,1\n2,A\n3,2\n4,B\nsub-05,null\n")  # names of places, some of them numbers
    assert open_source(path, labels=table).columns()["site"]["values"] == ["1", "2", "A", "B"]
    with open(table, "wb") as file:
        file.truncate(2**30)
    with pytest.raises(DataError, match="no table of people"):
        open_source(path, labels=table)


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_one_pass_in_table_order(tmp_path, cache_bytes, compression):
    path = write(tmp_path / "a.zip", oasis_entries(THREE), compression)
    batches = take(make_dataset(path, "train", 24, 5, False, cache_bytes=cache_bytes), 99)
    assert [len(batch["z"]) for batch in batches] == [5, 5, 2]
    case = np.concatenate([batch["case"] for batch in batches])
    z = np.concatenate([batch["z"] for batch in batches])
    np.testing.assert_array_equal(case, np.repeat([1, 2, 3, 4], 3))
    np.testing.assert_array_equal(z, np.tile([0, 1, 2], 4))
    images = np.concatenate([batch["image"] for batch in batches])
    # The picture belongs to its case and slice: the grey level says which.
    np.testing.assert_allclose(images[:, 12, 12, 0], (40 + 10 * case + z) / 127.5 - 1, atol=1e-6)
    assert (images[:, 0, 0] == -1).all()
    assert images.dtype == np.float32 and case.dtype == z.dtype == batches[0]["label"].dtype == np.int32


def test_every_epoch_is_a_fresh_permutation(course):
    batches = take(make_dataset(course, "train", 24, 5, True, augment=0.0), 12)  # 5 epochs of 12, batches straddle
    assert all(batch["image"].shape == (5, 24, 24, 1) for batch in batches)
    keys = np.concatenate([10 * batch["case"] + batch["z"] for batch in batches]).reshape(5, 12)
    for epoch in keys:
        np.testing.assert_array_equal(np.sort(epoch), np.sort(keys[0]))
    assert len(np.unique(keys[0])) == 12
    assert len({tuple(epoch) for epoch in keys}) == 5
    grey = np.concatenate([batch["image"][:, 12, 12, 0] for batch in batches])
    np.testing.assert_allclose(grey, (40 + keys.ravel()) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_a_resumed_stream_equals_an_unbroken_one(course, cache_bytes):
    source = open_source(course)

    def stream(**flags):
        return make_dataset(source, "train", 24, 5, True, cache_bytes=cache_bytes, flip=True, **flags)

    unbroken = take(stream(seed=1), 9)
    for skipped in (1, 4, 7):
        assert_same(take(stream(seed=1, start_step=skipped), 9 - skipped), unbroken[skipped:])
    assert_same(take(stream(seed=1), 9), unbroken)
    assert any((a["case"] != b["case"]).any() for a, b in zip(take(stream(seed=2), 9), unbroken, strict=True))
    far = take(stream(seed=1, start_step=10**9), 1)  # skipping is free
    assert far[0]["image"].shape == (5, 24, 24, 1)


def test_element_n_does_not_depend_on_the_batch_size(course):
    def elements(batch_size):
        batches = take(make_dataset(course, "train", 24, batch_size, True), 30 // batch_size)
        return [{key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}]

    assert_same(elements(1), elements(5))


def test_augmentation_is_a_function_of_the_seed_and_the_element(course):
    """Every element is changed in its own way: within a batch, in the next one, the next epoch, under another seed."""

    def changes(seed):
        """{(case, z): what the 1st, 2nd, 3rd epoch shows}; the conditions say which slice it is."""
        seen = {}
        for batch in take(make_dataset(course, "train", 24, 4, True, seed=seed), 9):  # 3 epochs of 12
            for case, z, image in zip(batch["case"].tolist(), batch["z"].tolist(), batch["image"], strict=True):
                seen.setdefault((case, z), []).append(image)
        return seen

    one, other = changes(1), changes(2)
    for key, images in one.items():
        assert len({image.tobytes() for image in [*images, *other[key]]}) == 6, key
    shapes = {(images[0][..., 0] > -0.9).tobytes() for images in one.values()}  # all slices are the same square
    assert len(shapes) > 8


def test_cache_changes_nothing(course):
    def stream(cache_bytes):
        return take(make_dataset(course, "train", 20, 5, True, seed=7, cache_bytes=cache_bytes), 6)

    assert_same(stream(2**30), stream(0))


def test_budget_decides_whether_slices_are_kept(course):
    source = open_source(course)
    make_dataset(source, "train", 16, 4, True, cache_bytes=12 * 16 * 16 - 1)
    assert not source.kept
    make_dataset(source, "train", 16, 4, True, cache_bytes=12 * 16 * 16)
    assert source.kept["train", 16].nbytes == 12 * 16 * 16


def test_the_last_steps_see_slices_as_they_are(course):
    """From a step on, whichever step the stream begins at; mirrored slices stay mirrored, pixel by pixel."""

    def images(flip=False, first=0, **options):
        batches = make_dataset(course, "train", 24, 5, True, flip=flip, start_step=first, **options).take(6 - first)
        return [batch["image"].numpy() for batch in batches]

    always, ending, never = images(), images(augmented_steps=4), images(augment=0.0)
    for step in range(6):
        np.testing.assert_array_equal(ending[step], always[step] if step < 4 else never[step])
        assert not np.array_equal(always[step], never[step])
    np.testing.assert_array_equal(images(first=3, augmented_steps=4), ending[3:])
    mirrored = images(flip=True, augmented_steps=4)[5]
    for row, plain in zip(mirrored, never[5], strict=True):
        assert any(np.array_equal(side, plain) for side in (row, row[:, ::-1]))


def test_augmented_epochs_differ_but_keep_their_conditions(course):
    batches = take(make_dataset(course, "train", 24, 12, True), 2)
    order = [np.argsort(10 * batch["case"] + batch["z"]) for batch in batches]
    first, second = (batch["image"][rows] for batch, rows in zip(batches, order, strict=True))
    assert (first != second).any(axis=(1, 2, 3)).all()
    plain = take(make_dataset(course, "train", 24, 12, False), 1)[0]["image"]
    assert np.abs(first - plain).mean() < 0.1  # small changes: still the same slice of the same person
    assert (first[:, :2, :2] == -1).all()


def test_nothing_is_written_to_disk(tmp_path, course):
    before = sorted(tmp_path.rglob("*"))
    take(make_dataset(course, "train", 24, 4, True, cache_bytes=0), 3)
    assert sorted(tmp_path.rglob("*")) == before


def test_replicas_get_contiguous_parts(course):
    devices = tf.config.list_logical_devices("CPU")
    if len(devices) < 2:
        pytest.skip("two logical CPUs are set up in tests/conftest.py")
    strategy = tf.distribute.MirroredStrategy([device.name for device in devices[:2]])
    plain = take(make_dataset(course, "train", 16, 4, True), 3)
    spread = iter(strategy.experimental_distribute_dataset(make_dataset(course, "train", 16, 4, True)))
    for batch in plain:
        parts = strategy.experimental_local_results(next(spread)["image"])
        np.testing.assert_array_equal(parts[0], batch["image"][:2])
        np.testing.assert_array_equal(parts[1], batch["image"][2:])


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_shares_together_are_the_batch_and_read_no_more_of_what_is_not_kept(course, cache_bytes, monkeypatch):
    asked, read = [], dataset.pixels.read
    monkeypatch.setattr(
        dataset.pixels, "read", lambda source, rows, *more: asked.append(rows) or read(source, rows, *more)
    )

    def stream(**more):
        options = {"seed": 1, "flip": True, "augmented_steps": 2, "cache_bytes": cache_bytes, "start_step": 1}
        return take(make_dataset(course, "train", 24, 9, True, **options, **more), 4)  # 9 of 12: epochs are straddled

    whole, shares = stream(), [stream(share=(part, 3)) for part in range(3)]
    for step, batch in enumerate(whole):
        for key, values in batch.items():
            np.testing.assert_array_equal(np.concatenate([share[step][key] for share in shares]), values)
    if not cache_bytes:
        assert [[len(rows) for rows in stream.take(4)] for stream in asked] == [[9] * 4, *[[3] * 4] * 3]


@pytest.mark.parametrize(
    ("batch_size", "training", "share"), [(6, False, (1, 2)), (4, True, (2, 3)), (2, True, (0, 3))]
)
def test_a_share_that_does_not_fit_is_refused(course, batch_size, training, share):
    with pytest.raises(ValueError, match="only training batches are shared, in equal parts"):
        make_dataset(course, "train", 24, batch_size, training, share=share)


def test_phantom_zip_is_read_back(tmp_path, capsys):
    out = tmp_path / "new" / "phantom.zip"
    argv = ["phantom", "--people", "4", "--out", str(out), "--image-size", "32"]
    assert dataset.main(argv) == 0
    assert capsys.readouterr().out.startswith(f"-> {out}: 4 people; ")
    assert os.listdir(out.parent) == ["phantom.zip"]  # no temporary file is left
    source = open_source(out)
    assert [len(source.select(split)) for split in dataset.SPLITS] == [64, 32, 32]
    assert source.label_names == ("AD", "NC") and set(source.label.tolist()) == {0, 1}
    assert set(source.label[source.select("train")].tolist()) == {0, 1}
    mask = Image.open(io.BytesIO(source.store.read(source.masks[source.entries[5]])))
    assert set(np.unique(mask)) <= {0, 85, 170, 255}
    assert "keras_png_slices_data/labels.csv" in source.store.names
    again = tmp_path / "again.zip"
    dataset.write_phantoms(again, 4, image_size=32)
    with zipfile.ZipFile(out) as left, zipfile.ZipFile(again) as right:
        assert left.namelist() == right.namelist()
        assert all(left.read(name) == right.read(name) for name in left.namelist())
    written = out.read_bytes()
    assert dataset.main([*argv, "--seed", "1"]) == 2 and f"{out} is there already" in capsys.readouterr().err
    assert out.read_bytes() == written, "nobody's archive is written over"
    assert dataset.main(["describe", str(out)]) == 0
    assert "2 people" in capsys.readouterr().out


def test_command_line_mistakes_are_one_sentence(tmp_path, capsys):
    for argv in (
        ["describe", str(tmp_path / "nowhere")],
        ["phantom", "--people", "2", "--out", str(tmp_path / "a.zip")],
        ["phantom", "--people", "4", "--image-size", "31", "--out", str(tmp_path / "a.zip")],
        ["phantom", "--people", "4", "--image-size", "32", "--out", str(tmp_path / "a.txt")],
    ):
        assert dataset.main(argv) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and len(shown.err.strip().splitlines()) == 1 and "Traceback" not in shown.err
    assert not list(tmp_path.iterdir())


@needs_real
def test_real_oasis():
    source = open_source(REAL / "oasis1_slices.zip")
    facts = source.manifest()["splits"]
    assert [facts[split]["people"] for split in dataset.SPLITS] == [120, 20, 20]
    assert [facts[split]["images"] for split in dataset.SPLITS] == [3840, 640, 640]
    for size in (64, 128, 256):
        images = take(make_dataset(source, "test", size, 192, False), 1)[0]["image"]
        edge = size // 16
        assert (images[:, :edge] == -1).all() and (images[:, -edge:, -edge:] == -1).all()
        assert 0.1 < (images > -1).mean() < 0.5 and images.max() > 0.5
    batch = take(make_dataset(source, "train", 64, 64, True), 1)[0]["image"]
    assert (batch[:, :2] == -1).all()


@needs_real
def test_real_adni_layout():
    source = open_source(REAL / "ad_nc.zip")
    assert source.label_names == ("AD", "NC")
    people = {split: set(source.case[source.select(split)].tolist()) for split in dataset.SPLITS}
    assert [len(people[split]) for split in dataset.SPLITS] == [31, 5, 12]
    images = take(make_dataset(source, "test", 128, 96, False), 1)[0]["image"]
    assert (images[:, :8] == -1).all()  # JPEG noise does not lift the background


def test_labels_of_other_data_are_numbered_by_name(tmp_path):
    table = {"keras_png_slices_data/labels.csv": b"case,label\n1,NC\n2,AD\n3,AD\n"}
    source = open_source(write(tmp_path / "a.zip", oasis_entries(THREE) | table))
    assert source.label_names == ("AD", "NC")
    other = source.with_labels_of(["NC", "MCI", "AD"])
    assert other.label_names == ("NC", "MCI", "AD")
    assert [other.label[other.case == case][0] for case in (1, 2, 3, 4)] == [0, 2, 2, -1]
    assert source.with_labels_of([]) is source
    unknown = dataclasses.replace(source, label=np.full_like(source.label, -1)).with_labels_of(["NC"])
    assert set(unknown.label) == {-1}
    with pytest.raises(DataError, match="labelled AD"):
        source.with_labels_of(["NC", "MCI"])
