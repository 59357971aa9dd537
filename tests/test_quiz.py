"""ldm/judging/quiz.py, ldm/drawing/quiz.py: pairs, answers of known skill, and the page, in Node where there is one."""

import base64
import io
import json
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from ldm.drawing import quiz as page
from ldm.judging import quiz
from ldm.judging.measures import Slices


def slices(people, each, grey, size=64):
    z, case = np.tile(np.arange(each), people), np.repeat(np.arange(people), each)
    images = np.full((len(z), size, size, 1), grey, "float32") + z[:, None, None, None] / 1000
    return Slices(images, z, z, case)


REAL, DRAWN = slices(10, 16, 0.2), slices(9, 16, 0.8)


def test_each_pair_has_a_real_and_a_drawn_slice_of_one_index_at_one_size():
    pictures, sheet = quiz.pairs(REAL, DRAWN, seed=0)
    assert len(pictures) == 3 * quiz.PAIRS == len(sheet)
    sizes, counts = np.unique([row["size"] for row in sheet], return_counts=True)
    assert sizes.tolist() == [16, 32, 64] and (counts == quiz.PAIRS).all()
    for (left, right), row in zip(pictures, sheet, strict=True):
        drawn, real = (left, right) if row["drawn"] == "left" else (right, left)
        assert drawn.shape == real.shape == (row["size"], row["size"]) and drawn.dtype == np.uint8
        assert (drawn == round(255 * (0.8 + row["z"] / 1000))).all()
        assert (real == round(255 * (0.2 + row["z"] / 1000))).all()
    sides = [row["drawn"] for row in sheet]
    assert 40 < sides.count("left") < 80 and [row["size"] for row in sheet] != sorted(row["size"] for row in sheet)
    assert quiz.pairs(REAL, DRAWN, seed=0)[1] == sheet != quiz.pairs(REAL, DRAWN, seed=1)[1]


def test_few_slices_come_again_rather_than_fewer_pairs():
    assert len(quiz.pairs(slices(1, 4, 0.2), slices(1, 4, 0.8), seed=0)[0]) == 3 * quiz.PAIRS


def test_score_counts_and_has_wilsons_interval():
    _, sheet = quiz.pairs(REAL, DRAWN, seed=0)
    best = quiz.score(sheet, {n: row["drawn"] for n, row in enumerate(sheet)})
    assert [row["share"] for row in best.values()] == [1.0] * 4 and best["all"]["answered"] == 120
    few = quiz.score(sheet, {n: "left" for n, row in enumerate(sheet) if row["size"] == 32})
    assert set(few) == {"all", 32} and few[32]["right"] == sum(r["drawn"] == "left" for r in sheet if r["size"] == 32)
    low, high = stats.binomtest(few[32]["right"], 40).proportion_ci(method="wilson")
    assert few[32]["interval"] == (low, high)
    for bad in ({999: "left"}, {0: "both"}, {}):
        with pytest.raises(ValueError):
            quiz.score(sheet, bad)


def test_the_page_holds_all_pictures_and_no_answer():
    pictures, sheet = quiz.pairs(REAL, DRAWN, seed=0)
    text = page.page("</script>", pictures)
    assert text.count("</script>") == 2 and "http" not in text.replace("http-equiv", "")
    held = json.loads(text.split('id="quiz">')[1].split("</script>")[0])
    assert held["name"] == "</script>" and set(held) == {"name", "pairs"}
    for pair, found in zip(pictures, held["pairs"], strict=True):
        for picture, code in zip(pair, found, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(code)))), picture)


STAGE = """
const elements = {};
const fresh = () => ({ listeners: {}, firstElementChild: {}, addEventListener(kind, f) { this.listeners[kind] = f; } });
const keys = fresh(), saved = [];
const document = {
  getElementById: (id) => elements[id] ??= fresh(),
  addEventListener: (kind, f) => keys.addEventListener(kind, f),
  createElement: () => ({ click() { saved.push(this); } }),
};
URL.createObjectURL = (blob) => blob;
document.getElementById("quiz").textContent = QUIZ;
"""
PLAY = """
const click = (id) => elements[id].listeners.click();
const press = (key) => keys.listeners.keydown({ key, target: { tagName: "BODY" } });
const seen = [elements.left.firstElementChild.src];
click("left"); press("ArrowRight"); click("right"); press("Backspace"); click("left");
seen.push(elements.right.firstElementChild.src, elements.place.textContent, elements.question.hidden);
press("ArrowRight"); press("ArrowRight"); click("save");
seen.push(elements.question.hidden, elements.done.textContent, saved[0].download);
saved[0].href.text().then((text) => console.log(JSON.stringify({ seen, answers: JSON.parse(text) })));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="Node, which runs the page's script here, is not installed")
def test_the_script_shows_takes_back_and_saves():
    """Four pairs: left, right, right taken back for left, right; a fifth answer does nothing."""
    text = page.page("q", [(np.full((2, 2), 2 * n, np.uint8), np.full((2, 2), 2 * n + 1, np.uint8)) for n in range(4)])
    held = text.split('id="quiz">')[1].split("</script>")[0]
    stage = STAGE.replace("QUIZ", json.dumps(held))
    done = subprocess.run(["node", "-e", stage + page.SCRIPT + PLAY], capture_output=True, text=True, check=True)
    found, pairs = json.loads(done.stdout), json.loads(held)["pairs"]
    prefix = "data:image/png;base64,"
    assert found["seen"][:4] == [prefix + pairs[0][0], prefix + pairs[3][1], "pair 4 of 4", False]
    assert found["seen"][4:] == [True, "That was the last pair. Thank you.", "answers.json"]
    assert found["answers"] == {"quiz": "q", "answers": {"0": "left", "1": "right", "2": "left", "3": "right"}}
