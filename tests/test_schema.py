"""ldm/judging/schema.py and ldm/drawing/comparison.py: what a report may hold, and differences of known size."""

import copy

import numpy as np
import pytest

from ldm.drawing import comparison
from ldm.judging import schema

GOOD = {
    "about": {
        "format": 1,
        "run": "a",
        "data": "x",
        "image size": 64,
        "features": ["f0"],
        "count": 9,
        "sampler": "ddim",
        "steps": 3,
        "seed": 0,
    },
    "by person": {"KID": {"value": 0.1, "error": 0.0, "left out": True, "people": {"p1": 0.1, "p2": 0.2}}},
    "distribution": {"samples": {"KID": 0.1, "recall": None}},
    "leaks": {
        "near-identical pairs": {"train, test": 0},
        "misfiled": [[["p1", 3], ["p2", 4]]],
        "repeated": None,
        "said": [],
    },
}


def test_a_good_report_has_no_problems():
    assert schema.problems(GOOD) == []
    assert schema.problems({**GOOD, "bits_per_slice": None, "cost": {"minutes": float("nan")}}) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.pop("about"), "report.json lacks about"),
        (lambda r: r["about"].pop("seed"), "report.json: about lacks seed"),
        (lambda r: r["about"].pop("features"), "report.json: about lacks features"),
        (lambda r: r["about"].update({"image size": "64"}), "report.json: about: image size is no int"),
        (lambda r: r["about"].update(seed="0"), "report.json: about: seed is no int"),
        (lambda r: r["about"].update(seed=True), "report.json: about: seed is no int"),
        (lambda r: r.update(beauty=1.0), "report.json has beauty, which nothing should have"),
        (lambda r: r["distribution"]["samples"].update(KID="low"), "distribution: samples: KID is no number"),
        (lambda r: r["distribution"].update(samples=3), "report.json: distribution: samples is no mapping"),
        (lambda r: r["leaks"]["misfiled"][0].append(5), "leaks: misfiled[0] has 3 values, not 2"),
        (lambda r: r["leaks"].update(said="nothing"), "report.json: leaks: said is no list"),
        (lambda r: r["by person"]["KID"].update({"left out": 0}), "by person: KID: left out is no bool"),
    ],
)
def test_what_does_not_fit_is_named(change, said):
    report = copy.deepcopy(GOOD)
    change(report)
    assert any(said in problem for problem in schema.problems(report)), schema.problems(report)
    assert len(schema.problems(report)) == 1


def entry(values, error=0.0, left_out=False, value=None):
    people = {f"p{i}": v for i, v in enumerate(values)}
    return {
        "value": np.mean(values) if value is None else value,
        "error": error,
        "left out": left_out,
        "people": people,
    }


def test_a_difference_of_means_is_that_of_pairs():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=20)  # what a person makes hard for both
    one, other = hard + 0.3 + 0.1 * rng.normal(size=20), hard
    value, error, people = schema.difference(entry(one), entry(other))
    assert people == 20 and value == pytest.approx(np.mean(one - other))
    assert error == pytest.approx(np.std(one - other, ddof=1) / np.sqrt(20)) and error < 0.05 < np.std(one) / 5
    fewer = schema.difference(entry(one), entry(other[:12]))
    assert fewer[2] == 12 and fewer[0] == pytest.approx(np.mean((one - other)[:12])), "people whom both have"
    wider = schema.difference(entry(one, error=0.3), entry(other, error=0.4))[1]
    assert wider == pytest.approx(np.hypot(error, 0.5))
    assert np.isnan(schema.difference(entry(one[:1]), entry(other[:1]))[1])


def test_where_people_are_left_out_the_error_is_the_jackknifes():
    """Of a mean the jackknife's error is the usual one, whichever way it is told."""
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(2, 15))
    left = [entry([(v.sum() - x) / 14 for x in v], left_out=True, value=v.mean()) for v in (one, other)]
    assert schema.difference(*left) == pytest.approx(schema.difference(entry(one), entry(other)))


def test_runs_side_by_side_say_what_cannot_be_told():
    rng = np.random.default_rng(2)
    values = rng.normal(size=10)
    reports = [{"by person": {"SSIM": entry(values + shift), "only here": entry(values)}} for shift in (0, 0.5, 0.0)]
    reports[2]["by person"]["SSIM"] = entry(values + 0.1 * rng.normal(size=10))
    del reports[2]["by person"]["only here"]
    made = comparison.table(["a", "b", "c"], reports, schema.difference)
    assert made.columns == ["", "a", "b", "c", "b less a", "c less a"] and len(made.rows) == 2
    assert made.rows[0][4] == "+0.500 ± 0.000" and made.rows[0][5].endswith("(cannot be told)")
    assert made.rows[1][0] == "only here" and made.rows[1][3] == made.rows[1][5] == "n/a" != made.rows[1][4]
    lines = comparison.plain(made).splitlines()
    assert len(lines) == 4 and len({line.index("b less a") for line in lines[:1]}) == 1
    beside = comparison.others(["a"], [{"distribution": {"samples": {"recall": 0.5}}}])
    assert ["recall", "0.500"] in beside.rows and ["precision", "n/a"] in beside.rows


def test_how_samples_look_stands_beside_people_and_beside_each_other():
    islands = {"people": {"mean": 4.8, "spread": 1.6}, "samples": {"mean": 6.0, "z": 0.7, "error": 0.1}}
    levels = {
        kind: {"levels": [{"AUC": auc, "error": 0.05}]} for kind, auc in (("validation people", 0.5), ("samples", 0.7))
    }
    seen = {"texture": {"islands": islands}, "scales": {"pixels": [64], "sets": levels}}
    made = comparison.looks(["a", "b"], [{}, seen])
    assert made.rows == [
        ["islands", "4.80 ± 1.60", "n/a", "6.00"],
        ["told from people at 64 pixels, AUC", "0.50 ± 0.05", "n/a", "0.70 ± 0.05"],
    ]
    decoded = {"texture": {"islands": {"people": islands["people"], "decoded": islands["samples"]}}}
    assert comparison.looks(["a"], [decoded]).rows == [], "a run that has drawn nothing has no samples to look at"
