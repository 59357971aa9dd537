"""Names that count copies before their mark, and what registrations leave beside volumes."""

import pytest

from ldm.data import copies, names
from ldm.data.archive import DataError

PEOPLE, SLICES, COPIES = (1, 2, 3, 4), (80, 81), (0, 1, 2)


def rows_of(pattern, originals=(), **options):
    found = [pattern.format(p=p, z=z, k=k) for p in PEOPLE for z in SLICES for k in COPIES]
    return names.understand([*found, *originals], "here", **options).rows[: len(found)]


@pytest.mark.parametrize(
    "pattern",
    "p{p}_{z}_{k}_aug {p}_{z}_{k}_aug p{p}_{z}_{k}_rotated p{p}_{z}_{k}aug {k}_aug_p{p}_{z} p{p}_{z}-{k}-flip "
    "sub-0{p}_{z}_{k}_aug case_00{p}_slice_{z}_{k}_aug p{p}_{z}_aug_{k} patient_00{p}/{z}_{k}_aug "
    "p00{p}/{z}_{k}_aug p{p}_{z}_{k}deg p{p}_{z}_{k}_flip_rot".split(),
)
def test_the_number_of_a_copy_is_neither_person_nor_slice(pattern):
    rows = rows_of(pattern + ".png")
    assert len({row.person for row in rows}) == 4 and [row.z for row in rows] == [
        z for _ in PEOPLE for z in SLICES for _ in COPIES
    ]
    assert len({(row.person, row.scan) for row in rows}) == 12


def test_people_whose_names_have_no_digit():
    found = [f"{p}_{z}_{k}_aug.png" for p in ("ann", "ben", "cid") for z in SLICES for k in COPIES]
    rows = names.understand(found, "here").rows
    assert {row.person for row in rows} == {"ann", "ben", "cid"} and {row.z for row in rows} == {80, 81}
    with pytest.raises(DataError, match="--person each"):  # slices of `hip_001`, or copies of slices of `hip`?
        names.understand([f"hip_00{p}_{k}_aug.png" for p in PEOPLE for k in COPIES], "here")


def test_slices_before_a_mark_stay_slices():
    stems = [f"site1_00{p}_{z}_aug" for p in PEOPLE for z in range(12)]
    assert copies.respell(stems) == {}
    assert copies.respell(["p1_80_5_resized", "sub-01_5_aug", "1_flip_80", "001_5_aug", "p1_80_aug"]) == {}


def test_originals_tell_copies_apart():
    """However many copies there are, where the pictures that they are copies of are there as well."""
    stems = [f"p{p}_{z}_{k}_aug" for p in PEOPLE for z in SLICES for k in range(12)]
    assert copies.respell(stems) == {}
    spelled = copies.respell(stems + [f"p{p}_{z}" for p in PEOPLE for z in SLICES])
    assert len(spelled) == len(stems) and spelled["p3_81_11_aug"] == "p3_81_aug_11"


@pytest.mark.parametrize("folder", ["orig/", ""])
def test_copies_without_a_mark_beside_their_originals(folder):
    originals = [f"{folder}p{p}_{z}.png" for p in PEOPLE for z in SLICES]
    rows = rows_of("augmented/p{p}_{z}_{k}.png" if folder else "p{p}_{z}_{k}.png", originals)
    assert [row.person for row in rows] == [f"p{p}" for p in PEOPLE for _ in SLICES for _ in COPIES]
    assert [row.z for row in rows] == [z for _ in PEOPLE for z in SLICES for _ in COPIES]


def test_slices_beside_a_picture_of_their_person_stay_slices():
    pictures = [f"site1_00{p}" for p in PEOPLE]
    assert copies.respell(pictures + [f"{one}_{z}" for one in pictures for z in range(12)]) == {}
    assert copies.respell(["p1", "p2", "p1_8", "p2_8", "ann_1", "ann_1_0"]) == {}


def test_more_than_ten_copies_without_a_mark_are_asked_about():
    """`p1_80_11` may as well be slice 11 of a person `p1_80`, whose picture `p1_80` is; `sub-01_80_11` may not."""
    ten = [f"{{}}_{z}{end}.png" for z in SLICES for end in ("", *(f"_{k}" for k in range(12)))]
    with pytest.raises(DataError, match="'p4_81_11.png' may be copy 11 of the slice 'p4_81', or slice 11 of a person"):
        names.understand([name.format(f"p{p}") for p in PEOPLE for name in ten], "here")
    rule = r"(?P<person>p\d)_(?P<slice>\d+)(?P<scan>_\d+)?"
    for spelled, person in (("p{}", rule), ("sub-0{}", None)):
        rows = names.understand([name.format(spelled.format(p)) for p in PEOPLE for name in ten], "here", person).rows
        assert [row.person for row in rows] == [spelled.format(p) for p in PEOPLE for _ in ten]
        assert [row.z for row in rows] == [z for _ in PEOPLE for z in SLICES for _ in range(13)]
    for start, slices in (("OAS1_000{}_1", range(80, 90)), ("sub-0{}_1", range(80, 90)), ("s{}_01", range(80, 99))):
        found = [start.format(p) + end for p in PEOPLE for end in (".png", *(f"_{z}.png" for z in slices))]
        assert {row.z for row in names.understand(found, "here").rows} > set(slices)  # they begin at 80: no copies
    found = ["site1_001.png", *(f"site1_0{p:02}_{z}.png" for p in range(1, 13) for z in range(12))]
    assert {"site1_001", "site1_012"} < {row.person for row in names.understand(found, "here").rows}  # one such picture


def test_numbers_drawn_by_lot_are_no_slices():
    """Keras writes `<prefix>_<index>_<number>.png`."""
    found = [f"p{p}_{z}_{k}_{1000 + 971 * p + 97 * z + k}.png" for p in PEOPLE for z in SLICES for k in COPIES]
    with pytest.raises(DataError, match="'p1_80_0_9731.png' do not say whose picture"):
        names.understand(found, "here")


@pytest.mark.parametrize(
    "name", "{}_1Warp {}_1InverseWarp {}_InverseWarped {}SubjectToTemplate1Warp {}_fast_bias".split()
)
def test_fields_of_a_registration_are_no_volumes(name):
    found = [f"p0{p}.nii.gz" for p in PEOPLE]
    made = [f"{name.format(f'p0{p}')}.nii.gz" for p in PEOPLE[:2]]
    listing = names.understand([*found, *made], "here", volumes=True)
    assert [row.entry for row in listing.rows] == found and listing.notes == []
    assert listing.left_out == [("a field of a registration or a bias, no picture", sorted(made))]
    with pytest.raises(DataError, match="fields of registrations only"):
        names.understand(made, "here", volumes=True)


@pytest.mark.parametrize("ending", ["_Warped", "_brain", "_brain_restore", "_BrainExtractionBrain"])
def test_what_tools_name_by_an_ending_is_left_out_beside_the_volume(ending):
    found = [f"p0{p}.nii.gz" for p in PEOPLE]
    made = [f"p0{p}{ending}.nii.gz" for p in PEOPLE]
    listing = names.understand([*found, *made], "here", volumes=True)
    assert [row.entry for row in listing.rows] == found and listing.left_out == [("made of another volume", made)]
    assert len(names.understand(made, "here", volumes=True).rows) == 4


def test_twins_are_two_people_and_spellings_of_one_are_asked_about():
    found = [f"sub-0{p}{twin}_{z}.png" for p in PEOPLE for twin in "ab" for z in SLICES]
    assert len({row.person for row in names.understand(found, "here").rows}) == 8
    with pytest.raises(DataError, match="'sub-01' and 'sub-1' may be one person or two"):
        names.understand(["sub-01_80.png", "sub-1_81.png", "sub-02_80.png"], "here")
