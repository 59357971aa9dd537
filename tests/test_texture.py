"""ldm/judging/texture.py against closed forms and scikit-image; and planted faults move it the way they must."""

import numpy as np
import pytest
from scipy import ndimage
from skimage.measure import euler_number, perimeter_crofton

from ldm.data import phantom
from ldm.drawing import looks
from ldm.judging import texture


@pytest.fixture(scope="module")
def brains():
    found = [piece["image"] for piece in phantom.slices(4, 128, seed=3) if piece["z"] % 8 == 4]
    return np.stack(found).astype("float32") / 255


def test_white_noise_has_its_variance_at_every_period():
    noise = 0.3 * np.random.default_rng(0).standard_normal((300, 64, 48))
    np.testing.assert_allclose(texture.power(noise, (16, 8, 4, 2.5)).mean(axis=0), 0.09, rtol=0.05)


@pytest.mark.parametrize("axis", [1, 2])
def test_a_wave_has_its_power_at_its_own_period_only(axis):
    wave = np.sin(2 * np.pi * np.indices((1, 64, 64))[axis] / 8)
    found = texture.power(wave, (16, 8, 4))[0]
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64)))
    ring = np.count_nonzero((frequency >= 1 / 8 / texture.RING) & (frequency < texture.RING / 8))
    assert found[1] == pytest.approx(0.5 * 64 * 64 / ring)  # Parseval: the sum of the density is the sum of squares
    assert found[0] < 1e-12 and found[2] < 1e-12


def test_power_of_a_blurred_picture_falls_as_the_blurs_transfer_function_says(brains):
    periods, sigma = np.array([16.0, 8.0]), 1.0
    blurred = ndimage.gaussian_filter(brains, (0, sigma, sigma), mode="wrap")
    ratio = texture.power(blurred, periods).mean(axis=0) / texture.power(brains, periods).mean(axis=0)
    np.testing.assert_allclose(ratio, np.exp(-((2 * np.pi * sigma / periods) ** 2)), rtol=0.1)


def test_a_period_that_a_picture_cannot_show_is_refused():
    with pytest.raises(ValueError, match="no frequency near a period of 1 pixels"):
        texture.power(np.zeros((1, 16, 16)), (1.0,))


def test_euler_numbers_are_those_of_scikit_image():
    masks = np.random.default_rng(0).random((20, 30, 40)) < np.linspace(0.1, 0.9, 20)[:, None, None]
    masks[0], masks[1] = False, True
    expected = [euler_number(mask, connectivity=2) for mask in masks]
    np.testing.assert_array_equal(texture.euler_number(masks), expected)


def test_outlines_of_discs_are_circles_and_those_of_blobs_scikit_images():
    y, x = np.mgrid[:120, :120] - 60
    discs = np.stack([np.hypot(x, y) < radius for radius in (15, 30, 45)])
    np.testing.assert_allclose(texture.outline_length(discs), 2 * np.pi * np.array([15, 30, 45]), rtol=0.02)
    blobs = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((5, 80, 80)), (0, 4, 4)) > 0.02
    blobs[:, [0, -1]] = blobs[:, :, [0, -1]] = False
    np.testing.assert_allclose(texture.outline_length(blobs), [perimeter_crofton(blob) for blob in blobs], rtol=0.02)


def test_the_width_of_a_ring_is_the_difference_of_its_radii():
    y, x = np.mgrid[:128, :128] - 64
    radius = np.hypot(x, y)
    rings = np.stack([(radius >= 40) & (radius < 40 + width) for width in (4, 8, 12)] + [np.zeros((128, 128), bool)])
    np.testing.assert_allclose(texture.ribbon_width(rings), [4, 8, 12, np.nan], rtol=0.03)


def test_peaks_are_where_they_were_put_and_a_valley_fills_up_with_noise():
    rng = np.random.default_rng(0)
    levels = np.where(np.arange(64 * 64).reshape(64, 64) % 5 < 2, 0.5, 0.8)
    clear, faint = (np.clip(levels + sigma * rng.standard_normal((64, 64)), 0, 1) for sigma in (0.04, 0.1))
    found = texture.grey_peaks(np.stack([clear, faint, np.zeros((64, 64))]))
    np.testing.assert_allclose(found[0, :2], [0.5, 0.8], atol=0.02)
    assert found[0, 2] < 0.05 < 0.3 < found[1, 2] <= 1
    assert np.isnan(found[2]).all()
    flat = np.where(np.hypot(*(np.mgrid[:64, :64] - 32)) < 25, 0.8, 0.0)  # white matter alone
    share = texture.measure(np.stack([clear, faint, flat, np.zeros((64, 64))]))[texture.ONE_PEAK]
    np.testing.assert_array_equal(share, [0, 0, 1, np.nan])


def test_softness_is_seen(brains):
    soft = ndimage.gaussian_filter(brains, (0, 1, 1))
    real, blurred = ({key: np.nanmean(v) for key, v in texture.measure(x).items()} for x in (brains, soft))
    assert blurred["power at 2.2 pixels"] < 0.2 * real["power at 2.2 pixels"]
    assert blurred["width of the cortical ribbon"] > real["width of the cortical ribbon"]


def test_white_matter_in_islands_is_told_from_a_ribbon():
    y, x = np.mgrid[:256, :256] - 128
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    ribbon = (radius > 60) & (radius < 80)
    islands = ribbon & (np.cos(12 * angle) > 0)
    head = np.where(radius < 100, 0.5, 0.0)
    found = texture.measure(np.stack([np.where(part, 0.8, head) for part in (ribbon, islands)]))
    assert found["Euler number of bright white matter"].tolist() == [0, 12]  # one piece around one hole; twelve pieces


def test_a_black_slice_has_nothing_to_measure():
    measured = texture.measure(np.zeros((1, 64, 64)))
    assert np.isnan(measured["white matter's peak"][0]) and measured["Euler number of bright white matter"][0] == 0


def test_fluid_is_not_taken_for_grey_matter():
    levels = np.repeat([0.2, 0.5, 0.8], [2000, 700, 1396]).reshape(1, 64, 64)
    noisy = np.clip(levels + 0.03 * np.random.default_rng(0).standard_normal(levels.shape), 0, 1)
    np.testing.assert_allclose(texture.grey_peaks(noisy)[0, :2], [0.5, 0.8], atol=0.02)


def test_every_number_has_words_of_its_own(brains):
    measured = texture.measure(np.repeat(np.repeat(brains[:2], 2, axis=1), 2, axis=2), np.zeros((2, 256, 256)))
    for name in measured:
        assert sum(name.startswith(start) for start in looks.SAID) == 1, name
    assert {"power at 5.6 pixels", "residual power at 32 pixels", "Euler number of grey matter"} <= measured.keys()


@pytest.mark.parametrize(("size", "periods"), [(256, [5.6, 4.4]), (128, [2.8, 2.2]), (64, [2.8]), (32, [])])
def test_softness_is_judged_at_the_shortest_periods_that_a_picture_shows(size, periods):
    assert texture.soft_periods(size) == pytest.approx(periods)
    assert texture.measure(np.zeros((1, size, size)), np.zeros((1, size, size)))


def test_what_is_left_without_the_mean_image_is_ones_own(brains):
    """Where everybody is the mean image, nothing is left; a person's own deviation has its own power."""
    mean = brains.mean(axis=0, keepdims=True).repeat(len(brains), axis=0)
    alike, own = texture.measure(mean, mean), texture.measure(brains, mean)
    name = "residual power at 16 pixels"
    assert (alike[name] == 0).all() and (own[name] > 0).all()
    np.testing.assert_allclose(own[name], texture.power(brains - mean, [16])[:, 0])
