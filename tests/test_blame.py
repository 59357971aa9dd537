"""ldm/judging/blame.py and ldm/drawing/looks.py: planted differences are found in size and said of their stage."""

import numpy as np
import pytest

from ldm.drawing import looks
from ldm.judging import blame
from ldm.judging.blame import Numbers

INDICES = np.arange(8)
SLOPE = 10.0 * INDICES  # what the slice index does to the number


def people(count, shift=0.0, spread=1.0, first=0, seed=0):
    """A number per slice of people who differ by exactly `spread`: the slice index's, the person's own, and noise."""
    rng = np.random.default_rng(seed)
    own = rng.standard_normal(count)
    own = shift + spread * (own - own.mean()) / own.std(ddof=1)
    noise = rng.standard_normal((count, 8))
    noise -= noise.mean(axis=1, keepdims=True) + noise.mean(axis=0) - noise.mean()
    values = SLOPE + own[:, None] + 0.3 * noise
    return Numbers(values.ravel(), np.tile(INDICES, count), np.repeat(np.arange(count) + first, 8))


def samples(count, shift, seed=1):
    """Single slices, more of the high ones; everyone is somebody of their own."""
    rng = np.random.default_rng(seed)
    z = rng.choice(INDICES, count, p=(1 + INDICES) / 36)
    return Numbers(SLOPE[z] + shift + rng.standard_normal(count), z, np.arange(count))


def test_people_beside_others_are_their_difference_in_deviations_of_people():
    found = blame.beside(people(20, spread=2.0), {"others": people(30, shift=3.0, first=100, seed=5)})
    assert found["people"] == pytest.approx({"mean": SLOPE.mean(), "spread": 2.0})
    assert found["others"]["mean"] == pytest.approx(SLOPE.mean() + 3.0) and found["others"]["z"] == pytest.approx(1.5)
    assert found["others"]["error"] == pytest.approx(np.sqrt(4 / 20 + 1 / 30) / 2)


def test_more_slices_of_some_indices_are_no_difference():
    found = blame.beside(people(20), {"samples": samples(2000, 0.0)})
    assert abs(found["samples"]["z"]) < 3 * found["samples"]["error"]
    elsewhere = Numbers(np.full(5, 1e6), np.full(5, 99), np.arange(5))
    assert "elsewhere" not in blame.beside(people(20), {"elsewhere": elsewhere}), "no people have that index"


def test_errors_are_those_of_repetition():
    found = [blame.beside(people(20), {"samples": samples(50, 0.0, seed)})["samples"] for seed in range(300)]
    squared = np.mean([row["error"] ** 2 for row in found]) - 1 / 20  # these people stay the same
    assert np.std([row["z"] for row in found]) == pytest.approx(np.sqrt(squared), rel=0.15)


def test_decoded_people_are_compared_with_themselves():
    real = people(20)
    decoded = real._replace(values=real.values - 0.5)
    found = blame.beside(real, {"samples": samples(500, -0.5)}, decoded)
    assert found["decoded"] == pytest.approx({"mean": SLOPE.mean() - 0.5, "z": -0.5, "error": 0.0}, abs=1e-9)
    assert found["second stage"]["z"] == pytest.approx(found["samples"]["z"] + 0.5)


def test_a_number_that_is_missing_is_left_out():
    real, fake = people(20), people(10, shift=2.0, first=50)
    fake.values[3] = np.nan
    found = blame.beside(real, {"fake": fake, "nobody": fake._replace(values=np.full(80, np.nan))})
    assert found["fake"]["z"] == pytest.approx(2.0, abs=0.05) and "nobody" not in found
    assert blame.beside(real._replace(values=np.full(160, np.nan)), {}) == {}
    one = Numbers(np.zeros(8), INDICES, np.zeros(8))
    assert blame.beside(real, {"one": one})["one"]["error"] == np.inf, "one head tells nothing"


@pytest.mark.parametrize(
    ("first", "second", "blamed"),
    [
        (0.0, 0.0, None),
        (0.0, 0.6, None),  # told, but less than people differ by
        (-3.0, 0.0, ["first stage"]),
        (-3.0, 0.5, ["first stage"]),
        (0.0, 3.0, ["second stage"]),
        (-0.5, 4.0, ["second stage"]),
        (2.0, 2.0, ["first stage", "second stage"]),
    ],
)
def test_the_stage_is_blamed_that_adds_the_difference(first, second, blamed):
    real = people(20)
    decoded = real._replace(values=real.values + first)
    found = blame.beside(real, {"samples": samples(1000, first + second)}, decoded)
    assert blame.stages(found) == blamed
    assert blame.stages(blame.beside(real, {}, decoded)) == (["first stage"] if abs(first) > 1 else None)
    alone = blame.stages(blame.beside(real, {"samples": samples(1000, first + second)}))
    assert alone == (["model"] if blamed else None)


def test_too_few_samples_blame_nobody():
    real = people(20)
    found = blame.beside(real, {"samples": samples(3, 0.0)}, real)
    found["samples"] = {"mean": 0.0, "z": 1.5, "error": 1.0}
    assert blame.stages(found) is None


# ---- in words --------------------------------------------------------------------------------------------------------

ISLANDS, POWER = "Euler number of bright white matter", "power at 5.6 pixels"


def row(mean, z):
    return {"mean": mean, "z": z, "error": 0.2}


def test_sentences_name_the_fault_and_the_stage():
    mottled = {"people": {"mean": 4.4, "spread": 1.5}, "decoded": row(4.1, -0.2), "samples": row(10.3, 3.9)}
    assert looks.verdict(ISLANDS, {**mottled, "to blame": ["second stage"]}) == (
        "Mottled: white matter of samples falls into 10.3 islands, people's into 4.40 ± 1.50; "
        "decoded test people have 4.10, so the second stage is to blame."
    )
    soft = {"people": {"mean": 1.0, "spread": 0.17}, "decoded": row(0.49, -3), "samples": row(0.41, -3.5)}
    assert looks.verdict(POWER, {**soft, "to blame": ["first stage"]}) == (
        "Soft: samples have 41% of people's power at 5.6 pixels, and people differ by 17%; "
        "decoded test people have 49%, so the first stage is to blame."
    )
    assert looks.verdict(POWER, {**soft, "to blame": ["first stage", "second stage"]}).endswith(
        "so both stages are to blame."
    )
    assert looks.verdict(POWER, {**soft, "to blame": []}).endswith("which stage is to blame cannot be told.")
    del soft["samples"]
    assert looks.verdict(POWER, {**soft, "to blame": ["first stage"]}).startswith("Soft: decoded test people have 49%")
    del mottled["decoded"]
    assert "no first stage, so the model is" in looks.verdict(ISLANDS, {**mottled, "to blame": ["model"]})
    assert looks.verdict(ISLANDS, mottled) is None


def test_what_no_person_has_is_counted_in_units_of_one_slice():
    """All people have none: without the least unit, one slice would be infinitely many of their deviations."""
    z, case = np.tile(np.arange(8), 4), np.repeat(np.arange(4), 8)
    people = blame.Numbers(np.zeros(32), z, case)
    some = blame.Numbers((np.arange(32) % 8 < 2).astype(float), z, case)  # two slices of eight
    assert blame.beside(people, {"samples": some}, least=1 / 8)["samples"]["z"] == pytest.approx(2)
