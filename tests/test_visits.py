"""Which names are scans of one person."""

import pytest

from ldm.data import names
from ldm.data.archive import DataError

PEOPLE = range(1, 9)


def read(found, volumes=False):
    """The listing, its people, and how many scans there are."""
    listing = names.understand(found, "here", volumes=volumes)
    return listing, sorted({row.person for row in listing.rows}), len({(row.person, row.scan) for row in listing.rows})


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("", "_scan2"),
        ("", "-b"),
        ("", "_2"),
        ("_v1", "_v2"),
        ("_bl", "_m12"),
        ("V1", "V2"),
        ("_1.5T", "_3T"),
        ("_20252_2_0", "_20252_3_0"),
        (".v1", ".v2"),
    ],
)
@pytest.mark.parametrize("start", ["p", "study2_p"])
def test_a_few_people_were_scanned_twice(start, one, two):
    found = [f"{start}{p}{one}_z{z}.png" for p in PEOPLE for z in (80, 81)]
    listing, people, scans = read([*found, *(f"{start}{p}{two}_z{z}.png" for p in (3, 5) for z in (80, 81))])
    assert people == [f"{start}{p}" for p in PEOPLE] and scans == 10
    assert {row.z for row in listing.rows} == {80, 81} and "taken for scans" in listing.notes[0]


def test_a_few_codes_with_a_common_start_are_people():
    """TCIA09 is a hospital: nobody is called that alone, as all others are."""
    found = [f"{p}_t1.nii" for p in ("AAB_1", "ABE_1", "ALX_1", "AMH_1", "TCIA09_254_1", "TCIA09_312_1")]
    assert len(read(found, volumes=True)[1]) == 6


def test_visits_in_folders_and_files():
    name = "HCA600223{p}_V{v}_MR/T1w_MPR/HCA600223{p}_V{v}_MR_T1w_MPR_RMS.nii.gz"
    _, people, scans = read([name.format(p=p, v=v) for p in PEOPLE for v in (1, 2)], volumes=True)
    assert people == [f"HCA600223{p}" for p in PEOPLE] and scans == 16


def test_a_number_that_recurs_in_another_year_is_one_person_and_a_note_says_so():
    found = [f"{year}_00{p}_{z}.png" for p in PEOPLE for year in (2019, 2020) for z in (80, 81)]
    listing, people, scans = read(found)
    assert people == [f"00{p}" for p in PEOPLE] and scans == 16
    assert listing.notes[0].startswith("'2019_001' and '2020_001' are taken for one person in two years")
    listing, people, _ = read([f"{2019 + p % 2}_00{p}_{z}.png" for p in PEOPLE for z in (80, 81)])
    assert people[0] == "2019_002" and len(people) == 8 and not listing.notes
    _, people, _ = read([f"{2000 + p}_{visit}_{z}.png" for p in PEOPLE for visit in (1, 2) for z in (80, 81)])
    assert people == [f"{2000 + p}" for p in PEOPLE]  # these are no years


def test_the_first_word_may_be_the_visit():
    found = [f"baseline_p0{p}_{z}.png" for p in PEOPLE for z in (80, 81)]
    _, people, scans = read([*found, "followup_p03_80.png"])
    assert people == [f"p0{p}" for p in PEOPLE] and scans == 9
    _, people, scans = read([f"V{visit}_S0{p}_{z}.png" for p in PEOPLE for visit in (1, 2) for z in (80, 81)])
    assert people == [f"S0{p}" for p in PEOPLE] and scans == 16
    assert read([f"scan_0{p}_80.png" for p in PEOPLE])[1][0] == "scan_01"
    assert read([f"m0{p}_v{visit}_80.png" for p in PEOPLE for visit in (1, 2)])[1][0] == "m01"


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("p0{p}/scan1/{z}.png", "p0{p}/scan2/{z}.png"),
        ("p0{p}/{z}.png", "p0{p}_scan2/{z}.png"),
        ("p00{p}/bl/{z}.png", "p00{p}/m12/{z}.png"),
        ("p0{p}_20190{p}01/{z}.png", "p0{p}_20200{p}01/{z}.png"),
        ("{h}/p0{p}/20190{p}01/{z}.png", "{h}/p0{p}/20200{p}01/{z}.png"),
    ],
)
def test_folders_of_a_few_second_scans(one, two):
    found = [
        form.format(p=p, z=z, h=("NC", "AD")[p % 2])
        for form, who in ((one, PEOPLE), (two, (3, 4)))
        for p in who
        for z in (80, 81)
    ]
    listing, people, scans = read(found)
    assert len(people) == 8 and scans == 10 and people[0] in ("p01", "p001")
    assert {row.label for row in listing.rows} == ({"AD", "NC"} if "{h}" in one else {""})


def test_two_pictures_of_one_slice_are_no_two_scans():
    for one, other in (("HR", "LR"), ("raw", "processed")):
        with pytest.raises(DataError, match="may be one slice twice, or two scans; leave one of their folders out"):
            read([f"p0{p}/{kind}/{z}.png" for p in PEOPLE for kind in (one, other) for z in (80, 81)])
    found = [f"p0{p}/{kind}/{z}.png" for p in PEOPLE for kind in ("pre", "post") for z in (80, 81)]
    assert read(found)[2] == 16
