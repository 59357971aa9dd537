"""Whatever names, tables and headers say: an answer, or one sentence; never another exception."""

import io

import hypothesis
import nibabel
import numpy as np
import pytest
from hypothesis import strategies as st
from small_archives import brain, encode

from ldm.data import archive, names, people, table, volumes, words

pytestmark = pytest.mark.slow
often = hypothesis.settings(max_examples=2000, deadline=None, derandomize=True, database=None)

PIECES = st.sampled_from(
    "sub subject patient case ses run mpr slice z img t1 T1w flair seg mask label aug copy train test dev AD NC "
    "OAS1_0028 002_S_0295 001 1 07 200000 256x256 224 (2) x y".split()
)
NAME = st.one_of(
    st.text(max_size=12), st.lists(PIECES, max_size=6).map("_".join), st.lists(PIECES, max_size=4).map("-".join)
)
PATH = st.lists(NAME.filter(lambda name: "/" not in name), min_size=1, max_size=3).map("/".join)


@often
@hypothesis.given(NAME, st.booleans())
def test_any_name_can_be_read(name, sliced):
    said = words.read(name, sliced)
    assert said.z is None or 0 <= said.z < 10**words.LONGEST
    assert sliced or said.z is None


@often
@hypothesis.given(st.lists(PATH, max_size=12, unique=True), st.one_of(st.none(), st.just("each"), st.text(max_size=8)))
def test_any_archive_is_understood_or_refused(paths, person):
    """Every file is a slice, a mask, or left out with a reason; nothing is in two of these."""
    paths = [f"{path}.png" for path in paths]
    try:
        found = names.understand(paths, "a.zip", person)
    except archive.DataError as error:
        assert "a.zip" in str(error) or "--person" in str(error)
        return
    used = [row.entry for row in found.rows] + [row.entry for row in found.masks]
    left = [name for _, entries in found.left_out for name in entries]
    assert len(set(used)) == len(used) and not set(used) & set(left)
    assert set(used) | set(left) <= set(paths)


CELL = st.one_of(
    st.sampled_from(["", "1", "001", "2", "x", "AD", "ad", "-4", "nan", "inf", "1e999", '"a,b"', "\u00b2"]),
    st.text(max_size=4),
)
COLUMNS = st.lists(st.sampled_from(["slice", "person", "label", "age", "", "case", " label"]), max_size=4)
LINES = st.lists(st.lists(CELL, min_size=1, max_size=5).map(",".join), max_size=6)
TABLE = st.one_of(
    st.binary(max_size=200),
    st.tuples(COLUMNS, LINES).map(lambda t: "\n".join([",".join(["case", *t[0]]), *t[1]]).encode(errors="replace")),
)


@often
@hypothesis.given(TABLE)
def test_any_table_is_read_or_refused(data):
    try:
        found = table.read(data, ["-4"])
    except ValueError as error:
        assert str(error)
        return
    for name, column in found.items():
        if name not in ("person", "slice"):
            about = table.describe(column, set(column))
            for value in column.values():
                if not (about["kind"] == "number" and not np.isfinite(float(value))):
                    assert np.isfinite(table.encode(value, about))


class Listed:
    """An archive of names, with a table."""

    def __init__(self, names, data):
        self.names, self.data, self.path = [*names, "labels.csv"], data, "a.zip"

    def read(self, name):
        return self.data


FEW = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3), st.sampled_from(["train", "test"])), min_size=1)
FEW = FEW.map(lambda rows: sorted({f"{split}/sub-{who}_z{z}.png" for who, z, split in rows}))


@often
@hypothesis.given(FEW, TABLE)
def test_any_table_of_an_archive_is_heard_or_refused(paths, data):
    """And then no slice is lost without a word, and nobody is in two splits."""
    store = Listed(paths, data)
    try:
        found = names.understand(store.names, "a.zip")
        people.with_table(found, store, None, "a.zip")
    except archive.DataError as error:
        assert "a.zip" in str(error) or "labels.csv" in str(error)
        return
    left = [name for _, entries in found.left_out for name in entries]
    assert sorted([row.entry for row in found.rows] + left) == paths
    assert len({(row.person, row.split) for row in found.rows}) == len({row.person for row in found.rows})


def damaged(good):
    """A strategy: a file with some of its bytes changed, cut out, or put in."""

    def damage(changes):
        data = bytearray(good)
        for place, kind, more in changes:
            place = int(place * (len(data) - 1)) if data else 0
            if kind == 0:
                data[place : place + len(more)] = more
            elif kind == 1:
                del data[place : place + 4 * len(more)]
            else:
                data[place:place] = more
        return bytes(data)

    early = st.floats(0, 1).map(lambda where: where**3)  # headers come first
    change = st.tuples(early, st.integers(0, 2), st.binary(min_size=1, max_size=8))
    return st.lists(change, min_size=1, max_size=4).map(damage)


def jpeg():
    return encode(brain(7), "JPEG")


@often
@hypothesis.given(st.one_of(damaged(encode(brain(7))), damaged(jpeg()), st.binary(max_size=300)))
def test_any_picture_is_probed_or_refused(data):
    try:
        assert archive.probe(data) in range(archive.RAW)
    except ValueError as error:
        assert str(error)


VOXELS = np.zeros((6, 7, 8), np.float32)
VOXELS[1:5, 1:6, 1:7] = np.arange(4 * 5 * 6).reshape(4, 5, 6) + 1


@hypothesis.settings(often, max_examples=600)
@hypothesis.given(st.data())
def test_any_header_of_a_volume_is_read_or_refused(tmp_path_factory, data):
    kind, suffix = data.draw(
        st.sampled_from([(nibabel.Nifti1Image, "nii"), (nibabel.Nifti2Image, "nii"), (nibabel.MGHImage, "mgh")])
    )
    stream = io.BytesIO(kind(VOXELS, np.eye(4)).to_bytes())
    path = tmp_path_factory.getbasetemp() / f"fuzz.{suffix}"
    path.write_bytes(data.draw(damaged(stream.getvalue())))
    try:
        store = volumes.VolumeStore({"a": path})
    except archive.DataError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    for name in store.names:
        assert len(store.read(name)) == np.prod(store.shape(name))
