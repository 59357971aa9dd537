"""ldm/judging/audit.py: planted copies must be found, new people must not, and intervals must hold what they
promise.
"""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, special, stats
from scipy.spatial.distance import cdist

from ldm.data import phantom
from ldm.judging import audit

ARCHIVE = Path(__file__).resolve().parents[2] / "shared" / "data" / "oasis1_slices.zip"
needs_real = pytest.mark.skipif(not ARCHIVE.exists(), reason="the OASIS slices are not beside this checkout")


# ------------------------------------------------------------------------------------------------------- planted copies


def warped(images, rng, turn=5.0, scale=0.05, shift=0.04):
    """Every picture turned by up to `turn` degrees, scaled and shifted by up to a few percent."""
    result = []
    for image in images:
        angle = np.deg2rad(rng.uniform(-turn, turn))
        matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix /= rng.uniform(1 - scale, 1 + scale)
        centre = (np.array(image.shape) - 1) / 2
        move = rng.uniform(-shift, shift, 2) * image.shape
        result.append(ndimage.affine_transform(image, matrix, centre - matrix @ (centre + move), order=1))
    return np.stack(result)


def noisy(images, rng, sigma=0.03):
    return np.where(images > 0, np.clip(images + sigma * rng.normal(size=images.shape), 0, 1), 0)


def decoded(images, rng):
    """Blurred and a little noisy, as a decoder leaves them; the width of the blur is 1 pixel of 128."""
    return noisy(ndimage.gaussian_filter(images, (0, *2 * [images.shape[1] / 128])), rng)


KINDS = {
    "exact": lambda images, rng: images,
    "flipped": lambda images, rng: images[:, :, ::-1],
    "warped": warped,
    "brightness": lambda images, rng: np.where(images > 0, 0.75 * images + 0.1, 0),
    "gain": lambda images, rng: 0.5 * images,
    "decoded": decoded,
    "all at once": lambda images, rng: noisy(0.8 * warped(images, rng), rng)[:, :, ::-1],
}


def measure(train, baseline, fresh, picked):
    """Recall, share of right indices and of right sides by kind; false alarms among slices of new people."""
    rng = np.random.default_rng(0)
    usual = audit.nearest(baseline, train).distance
    threshold = audit.copy_rate(usual, usual)["threshold"]
    found = {}
    for kind, plant in KINDS.items():
        nearest = audit.nearest(plant(train[picked], rng), train)
        flipped = kind in ("flipped", "all at once")
        found[kind] = [
            np.mean(part)
            for part in (nearest.distance < threshold, nearest.index == picked, nearest.mirrored == flipped)
        ]
    alarms = {
        "as they are": np.mean(audit.nearest(fresh, train).distance < threshold),
        "warped": np.mean(audit.nearest(warped(fresh, rng), train).distance < threshold),
    }
    return found, alarms


@pytest.fixture(scope="module")
def phantoms():
    """Every fourth slice of 8 phantoms, every second of 16 others, (N, 96, 96) in [0, 1], and whose each is."""
    found = [piece for piece in phantom.slices(24, 96, seed=5) if piece["z"] % (4 if piece["case"] <= 8 else 2) == 0]
    return np.stack([p["image"] for p in found]) / np.float32(255), np.array([p["case"] for p in found])


def test_bits_that_differ_are_counted():
    a, b = np.random.default_rng(0).integers(0, 2**64, (2, 50), dtype="uint64")
    assert audit.differing_bits(a, b).tolist() == [bin(int(x) ^ int(y)).count("1") for x, y in zip(a, b, strict=True)]
    assert audit.differing_bits(a, a[3]).argmin() == 3


def test_planted_copies_of_phantoms_are_found(phantoms):
    images, case = phantoms
    train, baseline, fresh = images[case <= 8], images[(case > 8) & (case <= 18)], images[case > 18]
    found, alarms = measure(train, baseline, fresh, np.arange(0, len(train), 3))
    for kind, (recall, right_index, right_side) in found.items():
        assert min(recall, right_index, right_side) >= 0.95, kind
    assert max(alarms.values()) <= 0.03, alarms


def oasis(split, people):
    """Every second slice of every third training person, or of every second other person, (N, 128, 128) in [0, 1].

    Args:
        split: "train", "validate" or "test".
        people: how many there are in the split.
    """
    folder = f"keras_png_slices_data/keras_png_slices_{split}/"
    pictures = []
    with zipfile.ZipFile(ARCHIVE) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(f"{folder}case_"))
        persons = sorted({name.split("_slice_")[0] for name in names})
        assert len(persons) == people
        chosen = set(persons[:: 3 if split == "train" else 2])
        for name in names:
            person, slice_index = name.split("_slice_")
            if person in chosen and int(slice_index.split(".")[0]) % 2 == 0:
                picture = np.asarray(Image.open(io.BytesIO(archive.read(name))))
                pictures.append(picture.reshape(128, 2, 128, 2).mean(axis=(1, 3), dtype=np.float32) / 255)
    return np.stack(pictures)


@needs_real
def test_planted_copies_of_real_people_are_found_and_no_two_splits_share_a_slice():
    train, baseline, fresh = oasis("train", 120), oasis("test", 20), oasis("validate", 20)
    found, alarms = measure(train, baseline, fresh[::2], np.arange(0, len(train), 48))
    for kind, (recall, right_index, right_side) in found.items():
        assert min(recall, right_index, right_side) >= 0.95, kind
    assert max(alarms.values()) <= 0.03, alarms
    assert audit.near_identical(baseline, train) == []
    assert audit.near_identical(recompressed(train[7:9]), train[::2]) == [(1, 4)]


# -------------------------------------------------------------------------------------------------------------- shrunk


@pytest.mark.parametrize("size", [130, 200, 208, 224, 256, 400, 448, 1024])
def test_pictures_of_any_size_shrink_by_area(size):
    image = np.random.default_rng(0).random((1, size, size, 1), np.float32)
    small = audit.shrunk(image)
    assert small.shape == (1, 128, 128, 1) and small.mean() == pytest.approx(image.mean(), abs=1e-5)
    fine = np.repeat(image[0, :, :, 0], 128, axis=0)[: size * 3]  # rows in 128ths of a pixel: a new pixel has `size`
    rows = fine.reshape(3, size, size).mean(axis=1)  # the first three rows
    columns = np.repeat(rows, 128, axis=1)[:, : size * 3].reshape(3, 3, size).mean(axis=2)
    np.testing.assert_allclose(small[0, :3, :3, 0], columns, atol=1e-5)


def test_small_pictures_are_left_alone_and_halves_are_means_of_blocks():
    images = np.random.default_rng(0).random((2, 256, 256, 1))
    np.testing.assert_allclose(audit.shrunk(images)[1, 3, 5, 0], images[1, 6:8, 10:12, 0].mean(), rtol=1e-6)
    assert audit.shrunk(images[:, :64, :64]).shape == (2, 64, 64, 1)
    assert audit.shrunk(images[:, :64, :200]).shape == (2, 64, 128, 1)


# -------------------------------------------------------------------------------------------------------------- nearest


def test_distance_ignores_gain_offset_and_size_of_the_picture(phantoms):
    images = phantoms[0][:6]
    bigger = np.repeat(np.repeat(images, 2, axis=1), 2, axis=2)
    for same in (images, 0.3 + 0.5 * images, bigger, images[..., None]):
        result = audit.nearest(same, images)
        np.testing.assert_array_equal(result.index, np.arange(6))
        np.testing.assert_allclose(result.distance, 0, atol=1e-5)
        assert not result.mirrored.any()


def test_alignment_undoes_a_known_warp(phantoms):
    images = phantoms[0][:8]
    moved = warped(images, np.random.default_rng(1))
    pictures, queries = (audit._comparable(stack, "images") for stack in (images, moved))
    raw = np.array([audit._correlation(q, p[None])[0] for q, p in zip(queries, pictures, strict=True)])
    aligned = np.array([audit._aligned_distance(q, p[None], 1)[0] for q, p in zip(queries, pictures, strict=True)])
    assert aligned.max() < 0.0006 < 0.01 < np.median(1 - raw)


def test_unaligned_distance_is_numpys_correlation_over_the_union():
    rng = np.random.default_rng(0)
    query, picture = rng.random((2, 16, 16), np.float32) * (rng.random((2, 16, 16)) > 0.5)
    union = (query > audit.BRAIN) | (picture > audit.BRAIN)
    expected = np.corrcoef(query[union], picture[union])[0, 1]
    assert audit._correlation(query, picture[None])[0] == pytest.approx(expected, abs=1e-6)


def test_noise_has_no_copies():
    """Pictures of uniform noise share their square outline and nothing else: only chance makes one nearer."""
    noise = np.random.default_rng(0).random((280, 32, 32))
    references, baseline, queries = noise[:40], noise[40:160], noise[160:]
    found, usual = audit.nearest(queries, references), audit.nearest(baseline, references)
    assert found.distance.min() > 0.1
    assert 0.3 < found.mirrored.mean() < 0.7 and len(np.unique(found.index)) > 20
    low, high = audit.copy_rate(found.distance, usual.distance, groups=np.arange(120))["interval"]
    assert low <= 0.01 <= high < 0.15
    assert audit.near_identical(queries, references) == []


def test_a_blank_picture_is_nobodys_copy(phantoms):
    result = audit.nearest(np.zeros((1, 32, 32)), phantoms[0][:9])
    np.testing.assert_allclose(result.distance, 1)


def test_progress_wraps_the_batches(phantoms):
    seen = []
    audit.nearest(phantoms[0][:40], phantoms[0][:3], progress=lambda batches: (seen.append(b) or b for b in batches))
    assert len(seen) == -(-40 // audit.BATCH)


def test_nearest_features_is_scipys_cosine_distance():
    rng = np.random.default_rng(0)
    queries, references = rng.normal(size=(1100, 6)), rng.normal(size=(70, 6))
    queries[3] = 0
    result = audit.nearest_features(queries, references)
    expected = cdist(np.delete(queries, 3, 0), references, "cosine")
    np.testing.assert_array_equal(np.delete(result.index, 3), expected.argmin(axis=1))
    np.testing.assert_allclose(np.delete(result.distance, 3), expected.min(axis=1), atol=1e-12)
    assert result.distance[3] == 1 and not result.mirrored.any()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: audit.nearest(np.zeros((2, 8)), np.zeros((1, 8, 8))), "queries must be at least one picture"),
        (lambda: audit.nearest(np.zeros((1, 8, 8)), np.zeros((0, 8, 8))), "references must be at least one picture"),
        (lambda: audit.nearest(np.full((1, 8, 8), -1.0), np.zeros((1, 8, 8))), r"floats in \[0, 1\]"),
        (lambda: audit.fingerprints(np.full((1, 8, 8), np.nan)), r"floats in \[0, 1\]"),
        (lambda: audit.fingerprints(np.zeros((1, 8, 8), np.uint8)), "divide 8-bit pictures by 255"),
        (lambda: audit.nearest(np.zeros((1, 8, 8)), np.zeros((1, 8, 8)), shortlist=0), "shortlist"),
        (lambda: audit.nearest_features(np.ones((2, 3)), np.ones((2, 4))), "3 features each, but references 4"),
        (lambda: audit.nearest_features(np.ones((2, 3)), np.full((2, 3), np.nan)), "references must be .* finite"),
        (lambda: audit.copy_rate([], [1.0]), "at least one"),
        (lambda: audit.copy_rate([1.0], [np.nan]), "no NaN"),
        (lambda: audit.copy_rate([1.0], [1.0], percentile=0), "percentile"),
        (lambda: audit.copy_rate([1.0], [1.0, 2.0], groups=[1]), "a person for each of the 2"),
        (lambda: audit.by_person([0, 1], [0.1], 0.2, [1, 2]), "2 indices, but 1 distances"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------------------ copy rate


def test_copy_rate_counts_and_wilsons_interval_is_the_textbooks():
    baseline = np.arange(101.0)  # its 1st percentile is 1
    result = audit.copy_rate(np.repeat([0.0, 1.0, 5.0], [10, 20, 70]), baseline)
    assert result["threshold"] == 1 and result["rate"] == 0.1 and result["expected"] == 0.01
    # 10 of 100: centre (k + z^2 / 2) / (n + z^2), half width z / (n + z^2) sqrt(k (n - k) / n + z^2 / 4)
    assert result["interval"] == pytest.approx((0.05523, 0.17437), abs=1e-5)
    low, high = audit.copy_rate(np.full(50, 9.0), baseline)["interval"]
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(1.96**2 / (50 + 1.96**2), abs=1e-4)


def test_interval_holds_the_expected_share_when_people_differ(monkeypatch):
    """Honest samples: the interval must hold 1 % far more often than Wilson's, which trusts few people's threshold."""
    monkeypatch.setattr(audit, "RESAMPLES", 200)
    rng = np.random.default_rng(0)
    held = {"people": 0, "wilson": 0}
    groups = np.repeat(np.arange(12), 32)
    for seed in range(40):
        baseline = (0.7 * rng.normal(size=(12, 1)) + rng.normal(size=(12, 32))).ravel()
        samples = 0.7 * rng.normal(size=500) + rng.normal(size=500)
        for name, who in {"people": groups, "wilson": None}.items():
            low, high = audit.copy_rate(samples, baseline, groups=who, seed=seed)["interval"]
            held[name] += low <= 0.01 <= high
    assert held["people"] >= 30 and held["people"] > held["wilson"] + 4, held  # of 40


def test_interval_over_people_is_that_of_a_sample_of_people():
    """Two people: a bootstrap draws the one, both, or the other, 1/4, 1/2, 1/4; its variance is n / (n - 1) too small,
    and Student's t has one degree of freedom. So many samples that their own chance does not count."""
    samples = np.linspace(0, 1, 400_001)  # the share below a threshold is the threshold
    people = [np.full(200, 0.020), np.full(200, 0.024)]
    found = audit.copy_rate(samples, np.concatenate(people), percentile=50.0, groups=np.repeat([0, 1], 200))
    logits = special.logit([0.020, 0.022, 0.024])  # with both, the median lies halfway
    middle = logits @ [0.25, 0.5, 0.25]
    spread = np.sqrt((logits - middle) ** 2 @ [0.25, 0.5, 0.25]) * np.sqrt(2 / 1) * stats.t.ppf(0.975, 1)
    low, high = special.logit(found["interval"])
    assert found["rate"] == pytest.approx(0.022, abs=1e-4)
    assert (high - low) / 2 == pytest.approx(spread, rel=0.1) and (high + low) / 2 == pytest.approx(middle, abs=0.01)


def test_interval_over_people_narrows_with_people_and_is_reproducible():
    rng = np.random.default_rng(0)
    samples, baseline = rng.normal(size=1000), rng.normal(size=4000)

    def width(people, seed=0):
        low, high = audit.copy_rate(samples, baseline, groups=np.arange(4000) % people, seed=seed)["interval"]
        assert 0 <= low < high <= 1
        return high - low

    assert width(1) == 1
    assert width(3) > width(10) > width(100)
    assert width(10) == width(10) != width(10, seed=1)


def test_samples_of_few_heads_say_less_than_as_many_of_their_own():
    """Heads that are copies whole make the interval that of so many heads; heads like independent samples change it
    not at all."""
    rng = np.random.default_rng(0)
    baseline, people = rng.uniform(1, 2, 1280), np.repeat(np.arange(40), 32)
    heads, copied = np.repeat(np.arange(30), 32), rng.random(30) < 0.2

    def width(distances, owners):
        low, high = audit.copy_rate(distances, baseline, groups=people, owners=owners)["interval"]
        return high - low

    whole = np.where(copied[heads], 0.5, 1.5)
    few = audit.copy_rate(np.where(copied, 0.5, 1.5), baseline, groups=people)["interval"]
    assert width(whole, heads) == pytest.approx(few[1] - few[0], rel=0.15)
    assert width(whole, None) < 0.3 * width(whole, heads)
    spread = np.where(np.arange(960) % 32 < 6, 0.5, 1.5)  # as many in every head
    assert width(spread, heads) == pytest.approx(width(spread, None), rel=1e-6)
    assert width(np.full(960, 1.5), heads) > 5 * width(np.full(960, 1.5), None), "nothing shows how alike they are"


def test_products_by_rows_are_numpys():
    rng = np.random.default_rng(0)
    for rows, columns in (((5, 64, 30), (5, 30, 20)), ((7, 30), (5, 30, 20)), ((5, 8, 30), (30, 20))):
        a, b = rng.random(rows), rng.random(columns)
        np.testing.assert_allclose(audit._product(a, b), a @ b, rtol=1e-12)


def test_by_person_counts_samples_below_the_threshold():
    found = audit.by_person([0, 1, 2, 2, 3], [0.1, 0.1, 0.1, 0.3, 0.1], 0.2, np.array(["b", "a", "a", "c"]))
    assert found == {"a": 2, "b": 1, "c": 1} and list(found)[0] == "a"
    assert audit.by_person([0], [0.2], 0.2, [7]) == {}


# ---------------------------------------------------------------------------------------------------------------- leaks


def recompressed(images):
    result = []
    for image in images:
        Image.fromarray(np.round(255 * image).astype(np.uint8)).save(file := io.BytesIO(), "JPEG", quality=50)
        result.append(np.asarray(Image.open(file)) / 255)
    return np.stack(result)


def resized(images, factor):
    size = round(factor * images.shape[1])
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), Image.BILINEAR)) for image in images])


COPIES = {
    "recompressed": recompressed,
    "brighter": lambda images: np.where(images > 0, 0.8 * images + 0.1, 0),
    "darker": lambda images: 0.6 * images,
    "fewer pixels": lambda images: resized(images, 0.85),
    "more pixels": lambda images: resized(images, 1.2),
    "framed anew": lambda images: np.pad(images, ((0, 0), (9, 3), (5, 11))),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_across_splits_are_found_and_nothing_else(phantoms, kind):
    images = phantoms[0]
    picked = np.arange(0, len(images), 13)
    copies = COPIES[kind](images[picked])
    bits = audit.differing_bits(audit.fingerprints(copies), audit.fingerprints(images[picked]))
    assert bits.max() <= 8
    assert audit.near_identical(copies, images) == list(enumerate(picked.tolist()))


def test_fingerprints_do_not_depend_on_gain_and_offset(phantoms):
    images = phantoms[0][:20]
    hashes = audit.fingerprints(images)
    assert hashes.dtype == np.uint64 and hashes.shape == (20,)
    assert audit.differing_bits(hashes, audit.fingerprints(0.2 + 0.5 * images)).max() <= 1


def test_new_people_share_no_slice(phantoms):
    images, case = phantoms
    assert audit.near_identical(images[case <= 4], images[(case > 4) & (case <= 12)]) == []


def test_both_steps_of_near_identical_can_refuse(phantoms):
    images = phantoms[0][:10]
    copies = recompressed(images)
    assert audit.near_identical(copies, images, most_distance=0) == []
    differ = audit.differing_bits(audit.fingerprints(copies), audit.fingerprints(images))
    agree = audit.near_identical(copies, images, most_bits=0)
    assert agree == [(i, i) for i in np.flatnonzero(differ == 0)] and len(agree) < 10
