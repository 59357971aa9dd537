"""ldm/judging/anatomy.py: exact answers on drawn pictures, phantoms' exact masks, known shifts, and what is refused."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data import phantom
from ldm.judging import anatomy, metrics

ARCHIVE = Path(__file__).resolve().parents[2] / "shared" / "data" / "oasis1_slices.zip"
GREYS = np.float32([0, 0.15, 0.55, 0.9])  # background, CSF, grey, white


def rings(size=96, centre=(48.5, 47.5), radii=(40, 34, 24, 10)):
    """White within CSF within white within grey within CSF: the tissue of a drawn brain, (size, size)."""
    y, x = np.ogrid[:size, :size]
    distance = np.hypot(y - centre[0], x - centre[1])
    tissue = np.zeros((size, size), np.int8)
    for radius, kind in zip(radii, (1, 2, 3, 1), strict=True):
        tissue[distance < radius] = kind
    return tissue


@pytest.fixture(scope="module")
def people():
    """Six phantom persons at 128 pixels, every fourth slice, and what we find in them."""
    items = [item for item in phantom.slices(6, image_size=128, seed=0) if item["z"] % 4 == 0]
    found = {key: np.stack([item[key] for item in items]) for key in items[0]}
    found["tissue"] = found["mask"] // 85
    found["image"] = found["image"].astype(np.float32) / 255
    found["ours"] = anatomy.tissues(found["image"])
    found["inner"] = anatomy.ventricles(found["ours"])
    return found


# -------------------------------------------------------------------------------------------------------------- tissues


def test_a_drawn_brain_is_segmented_exactly():
    tissue = rings()
    np.testing.assert_array_equal(anatomy.tissues(GREYS[tissue][None])[0], tissue)
    np.testing.assert_array_equal(anatomy.ventricles(tissue[None])[0], np.hypot(*np.ogrid[-48.5:47, -47.5:48]) < 10)


def test_neither_brightness_nor_a_faint_background_matters():
    tissue = rings()
    for gain in (0.6, 1.1):
        np.testing.assert_array_equal(anatomy.tissues(np.maximum(gain * GREYS[tissue], 0.01)[None])[0], tissue)


def test_a_slice_without_csf_has_none():
    """Three equal clusters would be found instead: the darker grey, the brighter grey, white."""
    tissue = np.where(rings() == 1, 2, rings())
    spread = 0.1 * np.random.default_rng(0).uniform(-1, 1, tissue.shape)
    picture = GREYS[tissue] + np.where(tissue == 2, spread, np.where(tissue == 3, spread / 4, 0))
    np.testing.assert_array_equal(anatomy.tissues(picture[None])[0], tissue)


def test_black_csf_inside_the_brain_is_csf_and_specks_outside_are_background():
    tissue = rings()
    picture = GREYS[tissue]
    picture[np.hypot(*np.ogrid[-48.5:47, -47.5:48]) < 10] = 0
    picture[3, 3] = 0.9
    np.testing.assert_array_equal(anatomy.tissues(picture[None])[0], tissue)


def test_both_hemispheres_count_where_black_parts_them():
    tissue = rings()
    picture = GREYS[tissue]
    picture[:, 38:46] = 0  # wider than any closing, and off the middle, so that one is larger
    ours = anatomy.tissues(picture[None])[0]
    np.testing.assert_array_equal(ours[:, :38] > 0, tissue[:, :38] > 0)
    np.testing.assert_array_equal(ours[:, 46:] > 0, tissue[:, 46:] > 0)


def test_a_brain_that_touches_the_border_is_not_eaten_there():
    whole = rings(centre=(34, 47.5))[:, 8:88]
    ours = anatomy.tissues(GREYS[whole][None])[0]
    np.testing.assert_array_equal(ours > 0, whole > 0)


def test_a_bias_field_is_divided_out():
    tissue = rings(size=128, centre=(63.5, 63.5), radii=(56, 50, 44, 10))
    field = np.linspace(0.6, 1.1, 128, dtype=np.float32)
    picture = np.clip(np.where(tissue == 2, np.float32(0.65), GREYS[tissue]) * field, 0, 1)
    assert picture[tissue == 2].max() > 1.05 * picture[tissue == 3].min(), "no pair of grey levels parts the two"
    assert min(metrics.dice(tissue[None], anatomy.tissues(picture[None]))) > 0.99


def test_tissues_and_ventricles_of_phantoms(people):
    assert metrics.dice(people["tissue"] > 0, people["ours"] > 0, (True,))[0] > 0.995
    csf, grey, white = metrics.dice(people["tissue"], people["ours"])
    assert csf > 0.9 and grey > 0.87 and white > 0.92
    assert metrics.dice(people["ventricles"], people["inner"], (True,))[0] > 0.87


def test_the_labels_effect_on_the_ventricles_of_phantoms_is_recovered(people):
    ill = people["label"] == phantom.LABELS.index("AD")
    exact, ours = (people[key][ill].sum() / people[key][~ill].sum() for key in ("ventricles", "inner"))
    assert exact > 1.3
    assert ours == pytest.approx(exact, rel=0.1) and ours == pytest.approx(phantom.AD_VENTRICLE_AREA, rel=0.25)
    # And per person, which means that it is not the label's other effect, wider sulci, that was counted.
    exact, ours = (
        [people[key][people["case"] == case].sum() for case in range(1, 7)] for key in ("ventricles", "inner")
    )
    np.testing.assert_allclose(ours, exact, rtol=0.2)


def test_sulci_and_fissure_are_no_ventricles():
    tissue = np.where(rings() > 0, 3, 0)
    tissue[10:30, 47:49] = 1  # fissure before the corpus callosum, from the rim
    tissue[70:88, 47:49] = 1  # and behind it
    tissue[45:52, 8:30] = 1  # a sulcus that reaches in
    pieces = np.where(rings() > 0, 3, 0)
    pieces[28:36, 46:50] = pieces[68:74, 46:50] = 1  # the same fissure, not connected with anything
    assert not anatomy.ventricles(pieces[None]).any()
    assert not anatomy.ventricles(tissue[None]).any()
    inner = np.zeros_like(tissue, bool)
    inner[40:58, 40:45] = inner[40:58, 52:57] = inner[30:38, 30:36] = True  # two bodies and a frontal horn
    np.testing.assert_array_equal(anatomy.ventricles(np.where(inner, 1, tissue)[None])[0], inner)


# ------------------------------------------------------------------------------------------------------------- measures


def test_measures_of_a_drawn_brain_are_exact():
    tissue = rings()
    picture = np.where(tissue > 0, GREYS[tissue], 0.01).astype(np.float32)
    measured = {name: values.item() for name, values in anatomy.measure(picture[None, ..., None]).items()}
    brain, inner = tissue > 0, np.hypot(*np.ogrid[-48.5:47, -47.5:48]) < 10
    expected = {
        "csf": np.mean(tissue[brain] == 1),
        "grey": np.mean(tissue[brain] == 2),
        "white": np.mean(tissue[brain] == 3),
        "ventricle_area": inner.sum() / brain.sum(),
        "brain_area": brain.mean(),
        "symmetry": 1.0,
        "background": 0.01,
        "mean": picture[brain].mean(),
        "deviation": picture[brain].std(),
    }
    assert measured.keys() == expected.keys()
    assert measured == pytest.approx(expected, abs=1e-6)


def test_symmetry_is_about_the_brains_own_midline():
    rng = np.random.default_rng(0)
    half = 0.2 + 0.8 * rng.random((40, 20))
    for middle, picture in ((0, np.hstack([half, half[:, ::-1]])), (1, np.hstack([half, half[:, -2::-1]]))):
        for left in (0, 7, 64 - 40):  # anywhere in the frame, its border included; the mirror on a pixel or between two
            framed = np.zeros((1, 64, 64))
            framed[0, 12:52, left : left + 40 - middle] = picture
            assert anatomy.measure(framed)["symmetry"][0] == pytest.approx(1)
    noise = np.zeros((1, 64, 64))
    noise[0, 12:52, 12:52] = 0.2 + 0.8 * rng.random((40, 40))
    assert abs(anatomy.measure(noise)["symmetry"][0]) < 0.15
    ramp = np.zeros((1, 64, 64))
    ramp[0, 12:52, 12:52] = np.linspace(0.2, 1, 40)
    assert anatomy.measure(ramp)["symmetry"][0] == pytest.approx(-1), "left is dark where right is bright"


def test_a_symmetric_phantom_is_more_symmetric_than_a_real_one(people):
    image = people["image"][:4]
    mirrored = np.concatenate([image[:, :, :64], image[:, :, 63::-1]], axis=2)
    plain, perfect = (anatomy.measure(part)["symmetry"] for part in (image, mirrored))
    np.testing.assert_allclose(perfect, 1)
    assert ((plain > 0.3) & (plain < 0.9)).all()


def test_a_slice_without_brain_has_no_measures_and_leaves_the_others_alone():
    drawn = GREYS[rings()]
    alone, both = anatomy.measure(drawn[None]), anatomy.measure(np.stack([np.full_like(drawn, 0.01), drawn]))
    for name in both:
        assert both[name][1] == alone[name][0]
        assert np.isnan(both[name][0]) == (name not in ("brain_area", "background"))
    assert both["brain_area"][0] == 0 and both["background"][0] == pytest.approx(0.01)
    assert all(len(values) == 0 for values in anatomy.measure(np.zeros((0, 16, 16))).values())
    assert np.isnan(anatomy.histograms(np.zeros((1, 16, 16)))).all()
    full = anatomy.measure(np.ones((1, 16, 16)))
    assert full["brain_area"] == 1 and np.isnan(full["background"])


def test_each_slice_is_measured_by_itself():
    """Beside a darker one, and with a faint background that is no brain and a faint rim that is."""
    drawn = GREYS[rings()]
    drawn[rings() == 0], drawn[rings(radii=(40, 38, 24, 10)) == 1] = 0.03, 0.07
    pictures = np.stack([drawn, 0.6 * drawn + 0.02 * (rings() > 0)])
    together = anatomy.measure(pictures)
    for name, values in together.items():
        np.testing.assert_array_equal(values, [anatomy.measure(one[None])[name][0] for one in pictures], err_msg=name)
    np.testing.assert_allclose(together["brain_area"], np.mean(rings() > 0))
    np.testing.assert_allclose(together["deviation"], [picture[rings() > 0].std() for picture in pictures], rtol=1e-5)


def test_histograms_count_the_brain_only():
    tissue = rings()
    shares = anatomy.histograms(GREYS[tissue][None], bins=10)
    expected = np.zeros(10)
    expected[[1, 5]] = [np.mean(tissue[tissue > 0] == kind) for kind in (1, 2)]
    expected[int(np.float32(0.9) * np.float32(10))] = np.mean(tissue[tissue > 0] == 3)
    np.testing.assert_allclose(shares[0], expected)
    with pytest.raises(ValueError, match="bins"):
        anatomy.histograms(GREYS[tissue][None], bins=0)


@pytest.mark.parametrize("function", [anatomy.tissues, anatomy.measure, anatomy.histograms])
def test_wrong_images_are_refused(function):
    for picture, message in (
        (np.zeros((16, 16)), "shape"),
        (np.zeros((1, 16, 16), np.uint8), "uint8"),
        (np.full((1, 16, 16), -1.0), r"\[0, 1\]"),
        (np.full((1, 16, 16), np.nan), r"\[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            function(picture)
    with pytest.raises(ValueError, match="shape"):
        anatomy.ventricles(np.zeros((16, 16), int))


# ---------------------------------------------------------------------------------------------------------- comparisons


def test_a_known_shift_is_found_per_slice_index_in_standard_deviations():
    rng = np.random.default_rng(0)
    z = np.repeat(np.arange(10), 30)
    about = rng.normal(size=300)
    about = (about.reshape(10, 30) - about.reshape(10, 30).mean(1, keepdims=True)).ravel()
    about *= 2 / about.std()
    real = {"one": z * 100.0 + about, "two": about, "wide": about, "flat": np.zeros(300)}
    order = rng.permutation(300)  # the order of slices means nothing
    fake = {"one": (real["one"] + 1)[order], "two": (about - 3)[order], "wide": 2 * about[order]}
    fake["flat"] = np.full(300, 2 / 255)
    expected = {"one": 0.5, "two": 1.5, "wide": np.abs(about).mean() / 2, "flat": 2.0}  # the spread counts, too
    # In units of the spread within a slice index: that along z, of hundreds, would hide any shift.
    assert anatomy.difference(real, z, fake, z[order]) == pytest.approx(expected)
    assert set(anatomy.difference(real, z, real, z).values()) == {0}
    # A slice index that only one side has is left out.
    some = z[order] % 2 == 0
    fewer = {name: values[order][some] for name, values in real.items()}
    assert max(anatomy.difference(real, z, fewer, z[order][some]).values()) == pytest.approx(0)


def test_slice_indices_average_evenly_however_many_slices_each_has():
    real, real_z = {"m": np.array([-1.0, 1.0] * 10)}, np.repeat([0, 1], [2, 18])
    fake, fake_z = {"m": np.array([1.0, 3.0, -1.0, 1.0])}, np.array([0, 0, 1, 1])
    assert anatomy.difference(real, real_z, fake, fake_z)["m"] == pytest.approx((2 + 0) / 2)


def test_slice_indices_that_only_one_side_has_do_not_count():
    z = np.arange(16)
    real = {"m": (z % 2).astype(float)}
    beyond = {"m": np.append(real["m"], 99.0)}
    assert anatomy.difference(real, z, beyond, np.append(z, 40))["m"] == 0
    with pytest.raises(ValueError, match="no slice index in common"):
        anatomy.difference(real, z, real, z + 16)


def test_missing_values_are_left_out_of_differences():
    z = np.zeros(4, int)
    real = {"m": np.array([0.0, 1.0, np.nan, np.nan]), "none": np.full(4, np.nan)}
    fake = {"m": np.array([np.nan, 1.0, 2.0, 1.0]), "none": np.zeros(4)}
    found = anatomy.difference(real, z, fake, z)
    # Quantiles 0, 1 against 1, 1, 2: |1 - 0| on the lower half, |1 - 1| to two thirds, |2 - 1| on the last third.
    assert found["m"] == pytest.approx((1 / 2 + 1 / 3) / 0.5) and np.isnan(found["none"])


def test_differences_of_unlike_things_are_refused():
    one = {"m": np.zeros(3)}
    for arguments, message in (
        ((one, np.zeros(3), {"n": np.zeros(3)}, np.zeros(3)), "same measures"),
        ((one, np.zeros(2), one, np.zeros(3)), "one value for each"),
        ((one, np.zeros(3), {"m": np.zeros(0)}, np.zeros(0)), "to compare"),
    ):
        with pytest.raises(ValueError, match=message):
            anatomy.difference(*arguments)


def test_differences_rank_a_blurred_brain_behind_other_people(people):
    first = people["case"] <= 3
    one, other = (anatomy.measure(people["image"][chosen]) for chosen in (first, ~first))
    blurred = people["image"][~first]
    for _ in range(2):
        blurred = sum(np.roll(blurred, (i, j), (1, 2)) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9
    z, other_z = people["z"][first], people["z"][~first]
    floor = anatomy.difference(one, z, other, other_z)
    bad = anatomy.difference(one, z, anatomy.measure(blurred), other_z)
    assert all(bad[name] > 1.5 * floor[name] for name in ("symmetry", "deviation", "white"))


# --------------------------------------------------------------------------------------------------------- effect sizes


def test_effect_size_has_people_as_its_unit():
    means = {0: np.array([1.0, 2.0, 3.0, 4.0, 5.0]), 1: np.array([0.0, 1.0, 2.0, 3.0])}
    values, labels, people = [], [], []
    for label, group in means.items():
        for k, mean in enumerate(group):
            for offset in [-0.5, 0.5] * (k + 1):  # people with more slices count no more
                values.append(mean + offset), labels.append(label), people.append(f"{label}-{k}")
    pooled = np.sqrt((4 * means[0].var(ddof=1) + 3 * means[1].var(ddof=1)) / 7)
    found, (low, high) = anatomy.effect_size(values, labels, people)
    assert found == pytest.approx(1.5 / pooled) and low < found < high
    # Unknown labels and missing values change nothing; turned labels turn the sign.
    more = anatomy.effect_size([*values, 99, np.nan], [*labels, -1, 0], [*people, "x", "y"])
    assert more == (found, (low, high))
    assert anatomy.effect_size(values, 1 - np.array(labels), people)[0] == pytest.approx(-found)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    labels, people = np.repeat([0, 1], 20), np.arange(40)
    held = 0
    for seed in range(100):
        values = rng.normal(size=40) + np.where(labels == 0, 1.0, 0.0)  # d = 1
        _, (low, high) = anatomy.effect_size(values, labels, people, resamples=300, seed=seed)
        held += low < 1 < high
    assert 86 <= held <= 99  # 95 %, less what a percentile bootstrap of 20 people loses; binomial noise is 2.2


def test_the_interval_is_as_wide_as_95_percent_of_two_independent_groups():
    """For d = 0 and many people the standard error is sqrt(2 / n): each label's people are drawn on their own."""
    group = np.random.default_rng(0).normal(size=150)
    values, labels = np.tile(group, 2), np.repeat([0, 1], 150)
    found, (low, high) = anatomy.effect_size(values, labels, np.arange(300))
    assert found == pytest.approx(0, abs=1e-12)
    assert (high - low) / (2 * np.sqrt(2 / 150)) == pytest.approx(1.96, rel=0.08)
    assert (high + low) / (high - low) == pytest.approx(0, abs=0.1)


def test_effect_sizes_that_mean_nothing_are_refused():
    people = np.arange(8)
    labels, values = people % 2, people.astype(float)
    for arguments, message in (
        ((values[:7], labels[:7], people[:7]), "4 people per label, but 1 has 3"),
        ((values, np.zeros(8, int), people), "compares two labels"),
        ((values, people % 3, people), "compares two labels"),
        ((values, labels, people // 4), "two labels"),
        ((labels * 1.0, labels, people), "same value"),
        ((values, labels[:4], people), "as long"),
    ):
        with pytest.raises(ValueError, match=message):
            anatomy.effect_size(*arguments)
    with pytest.raises(ValueError, match="but NC has 3"):
        anatomy.effect_size(values[:7], labels[:7], people[:7], ("AD", "NC"))


# ---------------------------------------------------------------------------------------------------------- real slices


@pytest.mark.skipif(not ARCHIVE.exists(), reason="the OASIS slices are not beside this checkout (shared/data)")
def test_real_slices_have_plausible_anatomy():
    with zipfile.ZipFile(ARCHIVE) as archive:
        # Slices 12 and 22 of each test person.
        names = [n for n in archive.namelist() if "slices_test/" in n and n.endswith(("_12.nii.png", "_22.nii.png"))]
        pictures = [Image.open(io.BytesIO(archive.read(name))) for name in names]
    small = [np.asarray(picture.resize((128, 128), Image.Resampling.BOX), np.float32) / 255 for picture in pictures]
    measured = anatomy.measure(np.stack(small))
    assert len(small) == 2 * 20  # people
    beyond = set()
    for name, low, high in (
        ("csf", 0.08, 0.35),
        ("grey", 0.3, 0.6),
        ("white", 0.25, 0.5),
        ("ventricle_area", 0.02, 0.17),
        ("brain_area", 0.25, 0.32),
        ("symmetry", 0.5, 0.9),
        ("background", 0, 0.003),
    ):
        outside = np.flatnonzero((measured[name] < low) | (measured[name] > high))
        beyond |= {(name, Path(names[row]).name.removesuffix(".nii.png")) for row in outside}
    # Three slices of low contrast, in which grey matter is more than 0.7 times as bright as white (their peaks): the
    # segmenter takes much of it for white.
    low_contrast = {"case_204_slice_12", "case_205_slice_12", "case_212_slice_12"}
    assert beyond == {("grey", "case_212_slice_12"), *(("white", name) for name in low_contrast)}
