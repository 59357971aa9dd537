"""Real slices whose fault is known, as it was made by hand: numbers put them in order, words blame the right stage.

The first stage is one by hand, too: the coarse waves of squares of 8x8 pixels (a discrete cosine transform). What it
leaves out makes slices soft; noise in what it keeps makes them mottled, as a denoiser does that errs.
"""

from dataclasses import replace

import numpy as np
import pytest
from scipy import fft, ndimage
from small_archives import REAL, needs_real

import dataset
from ldm.drawing import looks, pages
from ldm.judging import measures, metrics, scales, texture
from ldm.judging.measures import Slices

pytestmark = [pytest.mark.slow, needs_real]
SQUARE = 8  # pixels
INDICES = (9, 13, 17, 21)


def encode(images, kept):
    """(N, H, W, 1) -> latents (N, H / 8, W / 8, kept, kept)."""
    n, height, width, _ = images.shape
    squares = images.reshape(n, height // SQUARE, SQUARE, width // SQUARE, SQUARE).transpose(0, 1, 3, 2, 4)
    return fft.dctn(squares, axes=(3, 4), norm="ortho")[..., :kept, :kept]


def decode(latents):
    n, rows, columns, kept, _ = latents.shape
    whole = np.zeros((n, rows, columns, SQUARE, SQUARE))
    whole[..., :kept, :kept] = latents
    squares = fft.idctn(whole, axes=(3, 4), norm="ortho").transpose(0, 1, 3, 2, 4)
    return np.clip(squares.reshape(n, rows * SQUARE, columns * SQUARE, 1), 0, 1).astype("float32")


def erring(latents, noise, seed=0):
    """Latents with noise, in deviations of each channel, where there is a head."""
    head = np.abs(latents).sum(axis=(3, 4), keepdims=True) > 0
    return latents + noise * latents.std(axis=(0, 1, 2)) * head * np.random.default_rng(seed).standard_normal(
        latents.shape
    )


def collage(latents, z, seed=0):
    """Each cell of the latents from somebody else at the same slice index: what a histogram of each cell draws."""
    rng, mixed = np.random.default_rng(seed), latents.copy()
    for index in np.unique(z):
        rows = np.flatnonzero(z == index)
        for y, x in np.ndindex(latents.shape[1:3]):
            mixed[rows, y, x] = latents[rng.permutation(rows), y, x]
    return mixed


@pytest.fixture(scope="module")
def people():
    """Twelve test people, eight others, and twenty who are training people here, at four slice indices."""
    source, sets = dataset.open_source(REAL / "oasis1_slices.zip"), {}
    for split in ("test", "validate"):
        found = dataset.read_split(source, split, 256)
        sets[split] = Slices(metrics.to_unit(found["image"]), found["z"], found["label"], found["case"]).at(INDICES)
    first = np.isin(sets["test"].case, np.unique(sets["test"].case)[:12])
    return {"test": sets["test"].take(first), "others": sets["test"].take(~first), "train": sets["validate"]}


@pytest.fixture(scope="module")
def kinds(people):
    test = people["test"]
    latents = encode(test.images, kept=4)
    images = {
        "people": test.images,
        "decoded": decode(latents),
        "samples": decode(erring(latents, 0.2)),
        "latent noise 0.3": decode(erring(latents, 0.3)),
        "histogram prior": decode(collage(latents, test.z)),
        "blurred": ndimage.gaussian_filter(test.images, (0, 4, 4, 0)),
    }
    return {name: replace(test, images=each) for name, each in images.items()}


def test_kinds_are_in_order_in_the_measure_that_each_concerns(people, kinds):
    measured = {name: texture.measure(slices.images) for name, slices in kinds.items()}

    def means(number):
        return {name: float(np.nanmean(values[number])) for name, values in measured.items()}

    islands, detail = means(texture.ISLANDS), means(texture.POWER.format(3.2))
    assert islands["decoded"] < 1.2 * islands["people"], "a first stage that keeps the coarse waves does not mottle"
    assert 1.3 * islands["decoded"] < islands["samples"] < islands["latent noise 0.3"] / 1.3
    assert islands["histogram prior"] > 1.3 * islands["samples"]
    assert detail["blurred"] < 0.01 * detail["people"] < detail["decoded"] < 0.6 * detail["people"]
    assert detail["histogram prior"] > max(detail["latent noise 0.3"], 1.5 * detail["people"]), "seams between cells"


def test_a_classifier_tells_them_all_but_people(people, kinds):
    train, test, others = (scales.describe(people[name]) for name in ("train", "test", "others"))
    assert all(looks.passes(row) for row in scales.judge(train, others, test, seeds=2))
    for name, slices in kinds.items():
        if name != "people":
            finest = scales.judge(train, scales.describe(slices), test, same=True, seeds=2)[-1]
            assert finest["AUC"] > 0.9, name


@pytest.mark.parametrize(
    ("kept", "noise", "said"),
    [
        (8, 0.0, {}),
        (3, 0.0, {"Soft": "the first stage is"}),
        (8, 0.3, {"Mottled": "the second stage is"}),
        (3, 0.25, {"Soft": "the first stage is", "Mottled": "the second stage is"}),
    ],
)
def test_soft_and_mottled_slices_are_called_so_and_the_right_stage_is_blamed(people, tmp_path, kept, noise, said):
    """Samples are other people with these faults, test people go through the same first stage: 8 keeps everything."""
    drawn, test = people["others"], people["test"]
    samples = replace(drawn, images=decode(erring(encode(drawn.images, kept), noise)))
    decoded = replace(test, images=decode(encode(test.images, kept)))
    found = measures.texture(samples, people["train"], test, None, decoded)
    section = pages.section("texture", *found[:3], lambda name: tmp_path / f"{name}.png")
    warnings = {words.split(":")[0]: words for words in section.warnings}
    assert {"Soft", "Mottled"} & warnings.keys() == said.keys(), section.warnings
    for fault, blamed in said.items():
        assert f"so {blamed} to blame" in warnings[fault], warnings[fault]
