"""ldm/data/table.py: what a table of people says, without any archive."""

import math

import pytest

from ldm.data import people, table
from ldm.data.archive import DataError
from ldm.data.names import Listing, Row


def test_the_unknown_is_left_out_however_it_is_written():
    text = b"case,age,sex\n1,N/A,NaN\n2,Unknown,none\n3,70,F\n4,,?\n5,NA,nan\n"
    assert table.read(text) == {"age": {3: "70"}, "sex": {3: "F"}}


@pytest.mark.parametrize("cell", ["#NA", "NA.", "n.a.", "--", "\u2013", "<null>", "nil", "not available", "\u00a0"])
def test_the_unknown_is_told_by_its_letters(cell):
    assert table.read(f"case,age\n1,61\n2,{cell}\n".encode()) == {"age": {1: "61"}}


@pytest.mark.parametrize("cell", ["90+", ">89", '"61,5"', "5%", "1e999", "1e300", "inf", "6_1", "#DIV/0!"])
def test_what_is_no_number_beside_numbers_is_refused_by_its_cells(cell):
    with pytest.raises(ValueError, match="numbers in the column 'age', but also .* of case 2"):
        table.read(f"case,age\n1,61\n2,{cell}\n3,{'70' * (cell == 'inf')}\n".encode())
    assert table.read(b"case,site\n1,4\n2,Rome\n3,Oslo\n")["site"][2] == "Rome"


def test_a_column_of_decimal_commas_is_refused():
    with pytest.raises(ValueError, match="has '61,5' of case 1 in the column 'age'; write numbers with a point"):
        table.read(b'case,age\n1,"61,5"\n2,"70,2"\n')
    assert table.read(b'case,label\n1,"1,2"\n')["label"] == {1: "1,2"}


def test_a_cell_of_two_lines_is_said_in_one():
    assert table.read(b'case,label\n1,"AD\n or  so"\n') == {"label": {1: "AD or so"}}


@pytest.mark.parametrize("cell", ["inf", "-Infinity", "1e999"])
def test_a_number_must_be_finite(cell):
    with pytest.raises(ValueError, match=f"numbers in the column 'age', but also '{cell}' of case 2"):
        table.read(f"case,age\n1,61\n2,{cell}\n".encode())


def test_columns_without_a_name_say_nothing_and_doubled_ones_are_refused():
    assert table.read(b"case,age,,\n1,61,,\n") == {"age": {1: "61"}}
    with pytest.raises(ValueError, match="column 'Age' twice"):
        table.read(b"case,age,Age\n1,2,3\n")


def test_a_person_is_the_same_with_and_without_zeros_or_a_word_in_front():
    assert [table.person(name) for name in ("1", "001", "sub-01", " ann ", "1a")] == [1, 1, 1, "ann", "1a"]
    assert table.read("\ufeffcase,age\n001,70\n1,70\n sub-02 ,71\n".encode()) == {"age": {1: "70", 2: "71"}}


def test_numbers_are_measured_on_finite_values_of_the_training_people():
    column = {1: "60", 2: "80", 3: "inf", 4: "1000", 5: "nan"}
    assert table.describe(column, train={1, 2, 3, 5}) == {"kind": "number", "mean": 70.0, "std": 10.0}
    assert table.describe({4: "5"}, train={1}) == {"kind": "number", "mean": 0.0, "std": 1.0}
    about = table.describe(column, train={1, 2})
    assert table.encode("85", about) == 1.5 and math.isnan(table.encode(None, about))
    with pytest.raises(ValueError, match="no finite number"):
        table.encode("inf", about)


def test_categories_are_numbered_by_name_whoever_has_them():
    about = table.describe({1: "M", 2: "F", 3: "M", 4: "other"}, train={1})
    assert about == {"kind": "category", "values": ["F", "M", "other"]}
    assert [table.encode(value, about) for value in about["values"]] == [0.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="X is none of F, M, other"):
        table.encode("X", about)


class _Store:
    path = "a.zip"

    def __init__(self, **tables):
        self.tables = {f"{folder}/labels.csv": text.encode() for folder, text in tables.items()}
        self.names = ["p.png", *self.tables]

    def read(self, name):
        return self.tables[name]


def test_the_table_in_an_archive_that_knows_nobody_says_nothing():
    somebody = _Store(a="case,label\n7,AD\n1,NC\n")
    assert table.find(somebody, None, {"sub-01", "sub-02"}) == {"label": {7: "AD", 1: "NC"}}
    assert table.find(_Store(a="case,label\n7,AD\n"), None, {"sub-01", "sub-02"}) == {}
    row = Row("p.png", "", "sub-01", "", 0, "")
    for store, notes in ((somebody, 0), (_Store(), 0), (_Store(a="case,label\n7,AD\n"), 1)):
        listing = Listing("flat", [row])
        labels, _ = people.with_table(listing, store, None, "a.zip")
        assert (len(listing.notes), labels) == (notes, ("AD", "NC") if store is somebody else ())
    assert listing.notes == ["labels.csv in there names nobody of this data, and is not used"]


def test_a_table_without_a_word_of_anybody_is_refused():
    with pytest.raises(ValueError, match="says nothing of anybody"):
        table.read(b"case,label,age\n1,NA,\n2,,.\n")


def test_two_tables_in_an_archive_are_refused_unless_one_is_named(tmp_path):
    two = _Store(a="case,label\n1,AD\n", b="case,label\n2,NC\n")
    with pytest.raises(DataError, match=r"'a/labels\.csv' and 'b/labels\.csv': join them into one"):
        table.find(two, None, {"1", "2"})
    for other in ("case,label\n7,NC\n", "case,label\n1,AD\n"):  # of others; the same
        assert table.find(_Store(a="case,label\n1,AD\n", b=other), None, {"1", "2"}) == {"label": {1: "AD"}}
        assert table.find(_Store(a=other, b="case,label\n1,AD\n"), None, {"1", "2"}) == {"label": {1: "AD"}}
    notes = []
    table.find(_Store(a="case,label\n7,NC\n", b="case,label\n1,AD\n"), None, {"1", "2"}, notes=notes)
    assert len(notes) == 1 and notes[0].startswith(
        "of the tables of people 'b/labels.csv' is used; 'a/labels.csv' says"
    )
    (tmp_path / "t.csv").write_text("case,label\n2,NC\n")
    assert table.find(two, tmp_path / "t.csv", {"1", "2"}) == {"label": {2: "NC"}}


def test_a_table_with_other_separators_is_refused_with_its_first_line():
    with pytest.raises(ValueError, match="separated by commas; it begins 'case;label'"):
        table.read("\ufeffcase;label\r\n1;AD\r\n".encode())
