"""Phantom brains: what a slice must be, and that the stated effect of the label is the one drawn."""

import numpy as np
import pytest
from scipy import ndimage

import dataset
from ldm import tissue
from ldm.data import phantom

AD, NC = phantom.LABELS.index("AD"), phantom.LABELS.index("NC")
CSF, GREY, WHITE = tissue.LEVELS[1:]


@pytest.fixture(scope="module")
def cohort():
    """24 persons at 64 pixels: key -> array of shape (24, 32, ...)."""
    items = list(phantom.slices(24, image_size=64, seed=0))
    return {key: np.stack([item[key] for item in items]).reshape(24, 32, *np.shape(items[0][key])) for key in items[0]}


@pytest.fixture(scope="module")
def person():
    """One person at full size: key -> array of shape (32, ...)."""
    items = list(phantom.slices(1, image_size=256, seed=5))
    return {key: np.stack([item[key] for item in items]) for key in items[0]}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_order_and_types(cohort):
    assert phantom.LABELS == tuple(sorted(phantom.LABELS))  # a class folder's index is the label
    assert np.array_equal(cohort["z"], np.tile(np.arange(phantom.SLICES), (24, 1)))
    assert np.array_equal(cohort["case"], np.repeat(np.arange(1, 25), phantom.SLICES).reshape(24, -1))
    assert (cohort["label"] == cohort["label"][:, :1]).all()
    assert cohort["image"].dtype == cohort["mask"].dtype == np.uint8
    assert cohort["ventricles"].dtype == bool


@pytest.mark.parametrize("people", [0, 2, 3])
def test_labels_are_balanced(people):
    labels = [item["label"] for item in phantom.slices(people, image_size=16) if item["z"] == 0]
    assert len(labels) == people
    assert abs(labels.count(AD) - labels.count(NC)) <= 1
    assert labels == [NC if case % 2 else AD for case in range(1, people + 1)]


def test_a_person_depends_on_seed_and_case_only():
    both = list(phantom.slices(2, image_size=32, seed=7))
    first = list(phantom.slices(1, image_size=32, seed=7))
    assert all(same(a, b) for a, b in zip(both[:32], first, strict=True))
    other = next(iter(phantom.slices(1, image_size=32, seed=8)))
    assert not np.array_equal(both[0]["mask"], other["mask"])


def test_persons_differ(cohort):
    masks = cohort["mask"][:, 16]
    for i in range(24):
        for j in range(i):
            assert np.mean(masks[i] != masks[j]) > 0.03


@pytest.mark.parametrize("image_size", [16, 64, 96, 130, 256])
def test_image_size_is_honoured_and_changes_no_anatomy(image_size):
    item = next(iter(phantom.slices(1, image_size=image_size, seed=1)))
    assert item["image"].shape == item["mask"].shape == item["ventricles"].shape == (image_size, image_size)
    full = next(iter(phantom.slices(1, image_size=256, seed=1)))
    assert np.mean(item["mask"] > 0) == pytest.approx(np.mean(full["mask"] > 0), rel=0.05)
    assert item["image"][item["mask"] > 0].mean() == pytest.approx(full["image"][full["mask"] > 0].mean(), rel=0.05)


@pytest.mark.parametrize("image_size", [0, 15, 65])
def test_unusable_image_size_is_refused(image_size):
    with pytest.raises(ValueError, match="image_size"):
        next(phantom.slices(1, image_size=image_size))


def test_masks_hold_the_four_levels(cohort):
    assert set(np.unique(cohort["mask"])) == set(tissue.LEVELS)
    for mask in cohort["mask"].reshape(-1, 64 * 64):
        assert set(np.unique(mask)) == set(tissue.LEVELS)  # every slice has every tissue


def test_background_is_exactly_zero_and_brain_is_not(cohort, person):
    for volume in (cohort, person):
        assert np.array_equal(volume["image"] > 0, volume["mask"] > 0)


def test_slices_go_up(cohort):
    """The cistern before the third ventricle is in the lowest slices only."""
    middle = np.mean(cohort["mask"][:, :, 22:29, 31:33] == CSF, axis=(0, 2, 3))  # 12 to 40 mm before the centre
    assert middle[0] > 2 * middle[8]


def test_brain_lies_in_the_frame_with_a_margin(cohort):
    brain = cohort["mask"].reshape(-1, 64, 64) > 0
    border = brain.copy()
    border[:, 8:-8, 12:-12] = False  # 32 mm above and below, 48 mm at the sides
    assert not border.any()
    fraction = brain.mean(axis=(1, 2))
    assert 0.24 < fraction.min() and fraction.max() < 0.36


def test_tissues_are_ordered_as_in_t1(cohort, person):
    for volume in (cohort, person):
        images, masks = (volume[key].reshape(-1, *volume[key].shape[-2:]) for key in ("image", "mask"))
        for image, mask in zip(images, masks, strict=True):
            csf, grey, white = (image[mask == level].mean() for level in (CSF, GREY, WHITE))
            assert csf + 15 < grey and grey + 15 < white
    assert 190 < np.median(person["image"][person["mask"] == WHITE]) < 235


def test_noise_in_the_ventricles_is_rician(person):
    """In deep CSF the signal nu is constant, and a Rician's second moment is nu^2 + 2 sigma^2."""
    cross = ndimage.generate_binary_structure(2, 1)[None]
    inside = ndimage.binary_erosion(person["ventricles"], cross, iterations=4)  # 4 mm from any wall, beyond the blur
    values = person["image"][inside] / 255
    assert inside.sum() > 1000
    assert values.std() == pytest.approx(phantom.NOISE, rel=0.25)
    assert np.mean(values**2) == pytest.approx(phantom.T1["csf"] ** 2 + 2 * phantom.NOISE**2, rel=0.25)


def test_a_smooth_field_has_mean_0_and_variance_1_everywhere():
    x, y = np.float32([0, 13]), np.float32([0, 40])
    values = np.array([phantom.Waves(np.random.default_rng(k), 20, 10)(x, y, 5.0) for k in range(1500)]).reshape(
        1500, 4
    )
    np.testing.assert_allclose(values.mean(axis=0), 0, atol=4 / np.sqrt(1500))
    np.testing.assert_allclose(values.var(axis=0), 1, atol=0.15)
    first = phantom.Waves(np.random.default_rng(0), 20, 10)
    matrix = np.cos(first.k @ np.array([[0, 13, 0, 13], [0, 0, 40, 40], [5, 5, 5, 5]]) + first.phase[:, None])
    np.testing.assert_allclose(first(x, y, 5.0).ravel(), matrix.sum(axis=0) * np.sqrt(2 / 10), atol=1e-4)


def test_signal_is_that_of_the_tissue_times_gain_bias_field_and_texture(monkeypatch):
    monkeypatch.setattr(phantom, "NOISE", 0.0)
    _, x, y, _ = phantom._grid(64)
    white = np.zeros((5, *x.shape))
    white[4] = 1.0
    rng = np.random.default_rng(0)
    person = phantom._person(rng, NC)
    u, v = x / 100, y / 100
    bias = person.bias @ np.stack([u, v, u * v, u * u - 0.3, v * v - 0.3]).reshape(5, -1)
    expected = phantom.T1["white"] * person.gain * np.exp(bias.reshape(x.shape))
    expected = expected * (1 + 0.02 * person.texture(x[0], y[:, 0], 7.0))
    assert abs(person.gain - 1) > 0.005 and np.ptp(bias) > 0.05
    found = phantom._acquire(person, white, x, y, 7.0, rng)
    np.testing.assert_allclose(found[9:-9, 9:-9], expected[9:-9, 9:-9], rtol=0.02)  # the blur smooths the texture


def test_noise_where_there_is_no_signal_is_rayleigh():
    """The magnitude of two Gaussians (a Rician without signal): mean sqrt(pi / 2) sigma, second moment 2 sigma^2."""
    _, x, y, _ = phantom._grid(64)
    person = phantom._person(np.random.default_rng(0), NC)
    found = phantom._acquire(person, np.zeros((5, *x.shape)), x, y, 7.0, np.random.default_rng(0))
    assert found.mean() / phantom.NOISE == pytest.approx(np.sqrt(np.pi / 2), rel=0.02)
    assert np.mean(found**2) / phantom.NOISE**2 == pytest.approx(2, rel=0.03)


def test_brain_is_never_0_however_dark(monkeypatch):
    """The outline is read off the image."""
    monkeypatch.setattr(phantom, "_acquire", lambda person, fractions, *more: np.zeros(fractions.shape[1:]))
    item = next(phantom.slices(1, image_size=32))
    np.testing.assert_array_equal(item["image"], item["mask"] > 0)


def test_the_blur_has_one_width_in_millimetres(monkeypatch):
    """White beside nothing: the signal reaches 16 % one standard deviation before the edge, at every picture size."""
    monkeypatch.setattr(phantom, "NOISE", 0.0)
    monkeypatch.setattr(phantom, "POINT_SPREAD", 4.0)
    person = phantom._person(np.random.default_rng(0), NC)
    for image_size in (96, 256):
        _, x, y, _ = phantom._grid(image_size)
        fractions = np.zeros((5, *x.shape))
        fractions[4] = x > 0
        found = phantom._acquire(person, fractions, x, y, 7.0, np.random.default_rng(0))
        middle = found[len(found) // 2] / found[len(found) // 2, x[0] > 20].mean()
        assert np.interp(-4.0, x[0], middle) == pytest.approx(0.159, abs=0.03)


def test_the_forehead_is_up_and_left_is_left():
    """Row 0 is the most anterior; and a brain is widest behind its middle."""
    window, x, y, _ = phantom._grid(64)
    assert (np.diff(y[:, 0]) < 0).all() and (np.diff(x[0]) > 0).all()
    assert x.mean() == pytest.approx(0, abs=1e-3) and y.mean() == pytest.approx(0, abs=1e-3)
    behind = []
    for item in phantom.slices(6, image_size=64, seed=3):
        if item["z"] == 28:
            widths = (item["mask"] > 0).sum(axis=1)
            rows = np.flatnonzero(widths)
            behind.append(np.flatnonzero(widths >= widths.max() - 1).mean() - rows.mean())
    assert np.mean(behind) > 1


def test_anatomy_moves_smoothly_through_the_slices(person):
    images = person["image"].reshape(32, -1).astype(float)
    correlation = np.corrcoef(images)
    by_distance = [np.diag(correlation, distance).mean() for distance in (1, 3, 8, 20)]
    assert by_distance[0] > 0.95
    assert all(np.diff(by_distance) < -0.01)
    changed = np.mean(person["mask"][1:] != person["mask"][:-1], axis=(1, 2))
    assert changed.max() < 3 * np.median(changed)  # no slice jumps


def test_both_hemispheres_are_alike_but_not_mirrored(person):
    mirrored = person["mask"][:, :, ::-1]
    assert np.mean((person["mask"] > 0) == (mirrored > 0)) > 0.95
    assert np.mean(person["mask"] != mirrored) > 0.05


def test_ventricles_are_csf_in_the_middle_of_the_brain(cohort, person):
    assert (cohort["mask"][cohort["ventricles"]] == CSF).all()
    areas = person["ventricles"].sum(axis=(1, 2))  # mm^2, as a pixel is 1 mm
    assert 50 < areas.min() and 600 < areas.max() < 4000
    rows, columns = np.nonzero(person["ventricles"].any(axis=0))
    assert abs(columns.mean() - 127.5) < 8 and 60 < rows.min() and rows.max() < 200


def test_cortex_is_a_folded_ribbon(person):
    """Grey matter lines far more boundary than the outline is long: that is what folding means."""
    for z in (4, 16, 28):
        mask = person["mask"][z]
        pial = (mask[:, 1:] == GREY) & (mask[:, :-1] == CSF) | (mask[:, 1:] == CSF) & (mask[:, :-1] == GREY)
        outline = (mask[:, 1:] > 0) != (mask[:, :-1] > 0)
        assert pial.sum() > 3 * outline.sum()


def test_ad_enlarges_the_ventricles_by_the_stated_factor(cohort):
    area = cohort["ventricles"].sum(axis=(1, 2, 3))
    label = cohort["label"][:, 0]
    ratio = area[label == AD].mean() / area[label == NC].mean()
    # 12 persons a side with a spread of 15 % each: the ratio's standard error is 6 %.
    assert ratio == pytest.approx(phantom.AD_VENTRICLE_AREA, rel=0.15)


def test_label_is_the_only_difference_between_twins():
    """The same random numbers under either label: the effect of AD without the spread between persons."""
    ventricles, sulci = [], []
    for case in range(4):
        totals = {}
        for label in (AD, NC):
            rng = np.random.default_rng(case)
            twin = phantom._person(rng, label)
            masks, inner = zip(*[(m, v) for _, m, v in phantom._person_slices(twin, 96, rng)], strict=True)
            csf = np.sum(np.stack(masks) == CSF)
            totals[label] = np.sum(inner), csf - np.sum(inner), twin.sulcus, np.sum(np.stack(masks) > 0)
        ventricles.append(totals[AD][0] / totals[NC][0])
        sulci.append(totals[AD][1] / totals[NC][1])
        assert totals[AD][2] == pytest.approx(phantom.AD_SULCUS_WIDTH * totals[NC][2])
        assert totals[AD][3] == totals[NC][3]  # the head does not change size
    assert np.mean(ventricles) == pytest.approx(phantom.AD_VENTRICLE_AREA, rel=0.05)
    # Wider sheets merge and partial volume hides the thinnest, so the area does not follow the width exactly.
    assert 1.2 < np.mean(sulci) < 2.0


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--people", "1000000000000"], "--people"),
        (["--image-size", "1000000"], "--image-size"),
        (["--out", "a" * 250 + ".zip"], "too long"),
    ],
)
def test_what_no_machine_can_draw_is_refused_at_once(argv, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert dataset.main(["phantom", *argv]) == 2
    said = capsys.readouterr().err
    assert word in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_table_that_cannot_be_written_is_known_before_pictures_are_compared(capsys, tmp_path):
    dataset.write_phantoms(tmp_path / "p.zip", people=3, image_size=32)
    assert dataset.main(["people", "--data", str(tmp_path / "p.zip"), "--out", str(tmp_path / ("a" * 250))]) == 2
    assert "give a shorter name" in capsys.readouterr().err
