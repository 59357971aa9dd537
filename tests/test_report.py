"""ldm/drawing/report.py: well-formed, self-contained, escaped; nothing that it is told gets lost."""

import base64
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ldm.drawing import pages, report
from ldm.drawing.report import Section, Table

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
EVIL = """<script>alert("x")</script>&'"""
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """What a page holds: every tag with its attributes, the text, and whether tags are closed in order."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def page(tmp_path):
    """A report with one of everything, and with a run whose name is an attack."""
    (tmp_path / "figure.png").write_bytes(PNG)
    table = Table(["", "SSIM", EVIL], [["ours", "0.9 ± 0.1", EVIL], ["black", float("nan"), 3]], "a note")
    sections = [
        Section("Reconstruction", ["first", EVIL], [table], [(tmp_path / "figure.png", EVIL)], [EVIL]),
        Section("Copies", "one paragraph", figures=[(PNG, "from memory"), (b"GIF89a...", "a film")]),
    ]
    report.write_html(tmp_path / "report.html", f"Report of {EVIL}", sections, {"run": EVIL, "count": 1000})
    return Page(tmp_path / "report.html")


def test_page_says_everything_and_closes_every_tag(page):
    words = "".join(page.words)
    for expected in (
        f"Report of {EVIL}",
        "first",
        "one paragraph",
        "a note",
        "0.9 ± 0.1",
        "n/a",
        "from memory",
        "1000",
    ):
        assert expected in words
    assert words.count(EVIL) == 8, "title twice, fact, warning, paragraph, column, cell, caption: all as words"
    assert page.words.count("Copies") == page.words.count("Reconstruction") == 2, "contents and heading"
    assert [a["href"].lstrip("#") for a in page.all("a")] == [section["id"] for section in page.all("section")]


def test_page_runs_no_script_and_needs_no_network(page, tmp_path):
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "#").startswith("#")
    text = re.sub(r"base64,[^\"]*", "", (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not re.search(r"https?:|url\(|@import|//", text)
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert "default-src 'none'" in policy and "script" not in policy


def test_figures_lie_within_byte_for_byte(page):
    sources = [image["src"] for image in page.all("img")]
    kinds, data = zip(*(source.split(";base64,") for source in sources), strict=True)
    assert kinds == ("data:image/png", "data:image/png", "data:image/gif")
    assert [base64.b64decode(code, validate=True) for code in data] == [PNG, PNG, b"GIF89a..."]
    assert [image["alt"] for image in page.all("img")] == [EVIL, "from memory", "a film"]


def test_numbers_are_flush_right_and_rows_and_columns_have_heads(page):
    cells = page.all("td")
    assert [cell.get("class") for cell in cells] == [None, "number", "number", None, "number", "number"]
    assert [head["scope"] for head in page.all("th")] == ["row", "row", "col", "col", "col", "row", "row"]


def test_style_serves_paper_and_dark_and_telephones(page):
    assert all(f"@media {what}" in report.STYLE for what in ("print", "screen and (prefers-color-scheme: dark)"))
    assert report.STYLE.count("{") == report.STYLE.count("}")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert len([div for div in page.all("div") if div["class"] == "scroll"]) == len(page.all("table")) == 2


def test_an_empty_report_is_a_page(tmp_path):
    report.write_html(tmp_path / "a.html", "nothing", [], {})
    page = Page(tmp_path / "a.html")
    assert page.words.count("nothing") == 2 and not page.all("table") and not page.all("nav")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (Section("a", tables=[Table(["x", "y"], [[1, 2], [3]])]), "2 columns has a row of 1"),
        (Section("a", figures=[(b"<svg/>", "a drawing")]), "'a drawing' is none of png"),
    ],
)
def test_what_cannot_be_shown_is_refused_and_leaves_the_old_page(tmp_path, section, message):
    report.write_html(tmp_path / "a.html", "old", [], {})
    before = (tmp_path / "a.html").read_bytes()
    with pytest.raises(ValueError, match=message):
        report.write_html(tmp_path / "a.html", "new", [section], {})
    assert (tmp_path / "a.html").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.html"]


def test_scores_of_people_are_spelt_with_their_deviations():
    assert pages.of_people({"black": {"PSNR": (9.74163, 0.4256)}}) == {"black": {"PSNR": "9.742 ± 0.426"}}


def test_a_failing_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    report.write_model_card(tmp_path / "card.md", {"title": "old"})
    before = (tmp_path / "card.md").read_bytes()

    def disk_full(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", disk_full)
        with pytest.raises(OSError, match="no space"):
            report.write_model_card(tmp_path / "card.md", {"title": "new"})
    assert (tmp_path / "card.md").read_bytes() == before
    assert os.listdir(tmp_path) == ["card.md"]


@pytest.mark.parametrize(
    ("value", "digits", "words"),
    [
        (None, 3, "n/a"),
        (math.nan, 3, "n/a"),
        (np.float32("nan"), 3, "n/a"),
        (1234567, 0, "1,234,567"),
        (np.float32(0.5), 2, "0.50"),
        (-0.0004, 3, "0.000"),
        (-0.0006, 3, "-0.001"),
        (math.inf, 3, "inf"),
    ],
)
def test_number(value, digits, words):
    assert report.number(value, digits) == words


# ----------------------------------------------------------------------------------------------------------- model card

FACTS = {
    "title": "oasis_256 | v2",
    "summary": "Latent diffusion of <brain> slices.",
    "data": {"source": "oasis1.zip", "splits": {"train": {"people": 36, "cases": ["001", "002"]}, "test": {}}},
    "terms": "OASIS data use agreement",
    "people": Table(["split", "people"], [["train", 36], ["test", 6]], "by person"),
    "settings": {"learning_rate": 1e-4, "steps": np.int64(1234567), "ema": None, "attention": True},
    "seeds": [0, 7],
    "versions": {"keras": "3.15"},
    "numbers": [Table(["", "SSIM"], [["ours", 0.912345]]), Table(["", "KID"], [["ours", -0.01]])],
    "use": ["teaching *only*"],
    "limits": ["36 people", "one scanner"],
    "contact": "lab@example.org",
    "run": "oasis_256",
}


def test_card_contains_every_fact_under_its_heading(tmp_path):
    report.write_model_card(tmp_path / "card.md", FACTS)
    card = (tmp_path / "card.md").read_text(encoding="utf-8")
    first, *parts = card.split("\n## ")
    assert first == "# oasis_256 \\| v2\n\nLatent diffusion of \\<brain\\> slices.\n"
    parts = dict(part.split("\n\n", 1) for part in parts)
    assert list(parts) == [*report.CARD.values(), "contact"]
    expected = {
        "Run": "oasis_256\n",
        "Training data": "- **source:** oasis1.zip\n- **splits:**\n  - **train:**\n    - **people:** 36\n"
        "    - **cases:** 001, 002\n  - **test:** none\n",
        "Terms of the data": "OASIS data use agreement\n",
        "People per split": "| split | people |\n| --- | --- |\n| train | 36 |\n| test | 6 |\n\nby person\n",
        "Recipe": "- **learning_rate:** 0.0001\n- **steps:** 1234567\n- **ema:** n/a\n- **attention:** True\n",
        "Seeds": "- 0\n- 7\n",
        "Versions": "- **keras:** 3.15\n",
        "Evaluation": "|  | SSIM |\n| --- | --- |\n| ours | 0.912345 |\n\n"
        "|  | KID |\n| --- | --- |\n| ours | -0.01 |\n",
        "Intended use": "- teaching \\*only\\*\n",
        "Limits": "- 36 people\n- one scanner\n",
        "contact": "lab@example.org\n",
    }
    assert {heading: text.rstrip("\n") for heading, text in parts.items()} == {
        heading: text.rstrip("\n") for heading, text in expected.items()
    }


def test_card_never_lacks_terms_use_and_limits(tmp_path):
    report.write_model_card(tmp_path / "card.md", {"terms": None, "versions": {}})
    card = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert "## Terms of the data\n\nNot recorded" in card
    assert "Not for diagnosis" in card and card.count("\n- ") == len(report.USUAL["limits"])
    assert "## Versions\n\nnone\n" in card and "## Recipe" not in card


def test_card_cannot_be_broken_by_its_facts(tmp_path):
    report.write_model_card(tmp_path / "card.md", {"run": "x](http://a) ![y\n# <b> |", "t": Table(["a"], [["b | c"]])})
    card = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert "\n## Run\n\nx\\](http://a) !\\[y # \\<b\\> \\|\n" in card
    assert "\n| b \\| c |" in card


def test_same_input_same_bytes(tmp_path):
    section = Section("Copies", ["text"], [Table(["a", "b"], [["x", 0.1]])], [(PNG, "figure")])
    for name in ("a", "new/folder/b"):
        report.write_html(tmp_path / f"{name}.html", "title", [section], {"run": "r"})
        report.write_model_card(tmp_path / f"{name}.md", FACTS)
    for kind in ("html", "md"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"new/folder/b.{kind}").read_bytes()
