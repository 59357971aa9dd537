"""ldm/training/losses.py: closed forms, and the metric of the same name as its judge."""

import numpy as np
import pytest
import tensorflow as tf
import tiny_models
from scipy import ndimage, stats

from ldm.judging import metrics
from ldm.training import losses


def test_mean_errors_of_known_differences():
    real, fake = np.zeros((2, 1, 2, 1), "float32"), np.array([[0.5, -0.5], [1.0, 2.0]], "float32").reshape(2, 1, 2, 1)
    np.testing.assert_allclose(losses.mean_squared(real, fake), (0.25 + 0.25 + 1 + 4) / 4)
    np.testing.assert_allclose(losses.mean_absolute(real, fake), (0.5 + 0.5 + 1 + 2) / 4)


@pytest.mark.parametrize(
    "loss",
    [losses.mean_squared, losses.mean_absolute, losses.structural_dissimilarity, losses.histogram_difference],
)
def test_losses_of_bfloat16_pictures_are_computed_in_float32(loss):
    """Sums of many small terms, and differences of squares, would be lost in 8 bits."""
    rng = np.random.default_rng(2)
    real, fake = (tf.cast(rng.uniform(-1, 1, (2, 32, 32, 1)), "bfloat16") for _ in range(2))
    ours = loss(real, fake)
    assert ours.dtype == tf.float32
    np.testing.assert_allclose(ours, loss(tf.cast(real, "float32"), tf.cast(fake, "float32")), rtol=1e-6)


def test_foreground_ssim_takes_what_leaves_the_range_for_black_or_white():
    rng = np.random.default_rng(3)
    real = rng.uniform(-1, 1, (2, 24, 24, 1)).astype("float32")
    fake = (real + rng.normal(size=real.shape)).astype("float32")
    assert np.abs(fake).max() > 2
    clipped = losses.foreground_ssim(real, np.clip(fake, -1, 1))[0]
    np.testing.assert_allclose(losses.foreground_ssim(real, fake)[0], clipped, rtol=1e-6)


def test_foreground_ssim_is_that_of_the_metrics():
    rng = np.random.default_rng(0)
    real = rng.random((3, 40, 36, 1)).astype("float32")
    real[:, :10], real[2] = 0.0, 0.0  # background above, and one slice that is nothing else
    fake = np.clip(real + 0.1 * rng.standard_normal(real.shape), 0, 1).astype("float32")
    ours, valid = losses.foreground_ssim(2 * real - 1, 2 * fake - 1)
    np.testing.assert_array_equal(valid, [1, 1, 0])
    np.testing.assert_allclose(ours[:2], metrics.foreground_ssim(real, fake)[:2], atol=1e-5)


def plain_dissimilarity(real, fake):
    """1 - the mean of Wang et al. 2004, eq. 13, window by window; pixels in [0, 2], so L = 2 in both constants."""
    c1, c2, found = (0.01 * 2) ** 2, (0.03 * 2) ** 2, []
    for x, y in zip(real[..., 0].astype("float64") + 1, fake[..., 0].astype("float64") + 1, strict=True):
        for top in range(0, x.shape[0] - 6, 2):
            for left in range(0, x.shape[1] - 6, 2):
                a, b = (image[top : top + 7, left : left + 7] for image in (x, y))
                covariance = np.mean((a - a.mean()) * (b - b.mean()))
                luminance = (2 * a.mean() * b.mean() + c1) / (a.mean() ** 2 + b.mean() ** 2 + c1)
                found.append(luminance * (2 * covariance + c2) / (a.var() + b.var() + c2))
    return 1.0 - np.mean(found)


def pair_of_unlike_contrast():
    """Smooth pictures; the second has a third of the first one's contrast, as a blurred reconstruction has."""
    rng = np.random.default_rng(3)
    real = np.clip(rng.normal(0.0, 0.15, (2, 13, 11, 1)), -1, 1).astype("float32")
    return real, (0.1 + 0.3 * real + rng.normal(0.0, 0.03, real.shape)).astype("float32")


def test_structural_dissimilarity_is_the_formula():
    """At contrasts whose variances, 0.02 and 0.003, are as small as c2 = 0.0036, so that every term of it is seen."""
    real, fake = pair_of_unlike_contrast()
    for x, y in ((real, fake), (fake, real)):
        np.testing.assert_allclose(losses.structural_dissimilarity(x, y), plain_dissimilarity(x, y), rtol=1e-4)


def test_gradient_of_structural_dissimilarity_is_that_of_finite_differences():
    real, fake = pair_of_unlike_contrast()
    fake = tf.constant(fake)
    with tf.GradientTape() as tape:
        tape.watch(fake)
        loss = losses.structural_dissimilarity(real, fake)
    gradient = np.asarray(tape.gradient(loss, fake))
    for place in ((0, 6, 5, 0), (0, 2, 8, 0), (1, 4, 3, 0)):
        step = np.zeros(fake.shape)
        step[place] = 1e-4
        slope = (plain_dissimilarity(real, fake.numpy() + step) - plain_dissimilarity(real, fake.numpy() - step)) / 2e-4
        np.testing.assert_allclose(gradient[place], slope, rtol=1e-2, atol=1e-6)


def test_structural_dissimilarity_is_0_for_equal_images_only():
    rng = np.random.default_rng(1)
    image = rng.uniform(-1, 1, (2, 16, 16, 1)).astype("float32")
    np.testing.assert_allclose(losses.structural_dissimilarity(image, image), 0.0, atol=1e-6)
    assert losses.structural_dissimilarity(image, -image) > 0.5


def test_structural_dissimilarity_minds_a_grey_background():
    """The same error costs more on black than on grey: of two means 0 and 0.04, and 1 and 1.04, in [0, 2]."""
    black, grey = np.full((1, 16, 16, 1), -1.0, "float32"), np.zeros((1, 16, 16, 1), "float32")
    c1 = (0.01 * 2) ** 2
    np.testing.assert_allclose(losses.structural_dissimilarity(black, black + 0.04), 1 - c1 / (0.04**2 + c1), rtol=1e-3)
    assert losses.structural_dissimilarity(grey, grey + 0.04) < 1e-3


def test_hinge_losses_of_known_logits():
    real, fakes = np.array([2.0, 0.5]), [np.array([-3.0, 0.0]), np.array([1.0, 3.0])]
    # max(0, 1 - real) = 0, 0.5; max(0, 1 + fake) = 0, 1 and 2, 4
    np.testing.assert_allclose(losses.hinge_discriminator(real, fakes), 0.5 * (0.25 + (0.5 + 3.0) / 2))
    np.testing.assert_allclose(losses.hinge_generator(fakes), -(-1.5 + 2.0) / 2)  # the generator's side has no hinge


@pytest.mark.parametrize("kinds", [1, 2, 3])
def test_the_two_sides_of_the_hinge_weigh_the_same_whatever_the_kinds_of_fakes(kinds):
    """The trap: three terms, two of them fake. A constant discriminator must gain nothing by moving either way."""

    def at(constant):
        return float(losses.hinge_discriminator(np.full(8, constant), [np.full(8, constant)] * kinds))

    np.testing.assert_allclose([at(-0.5), at(0.0), at(0.5)], 1.0)


def test_annealing_rises_over_half_of_each_cycle_and_ends_at_its_full_value():
    share = [float(losses.cyclical(step, cycles=2, cycle_steps=20)) for step in range(0, 26)]
    cycle = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0]
    np.testing.assert_allclose(share, [*cycle, *cycle, *[1.0] * 6], atol=1e-6)
    assert [float(losses.cyclical(0, *none)) for none in ((0, 20), (4, 0))] == [1.0, 1.0]


def test_segmentation_is_the_cross_entropy_of_known_pixels():
    logits = np.log(np.array([0.7, 0.1, 0.1, 0.1], "float32")) * np.ones((1, 2, 2, 1), "float32")
    tissue = np.array([[[0, 1], [-1, -1]]], "int32")
    np.testing.assert_allclose(losses.segmentation(logits, tissue), -(np.log(0.7) + np.log(0.1)) / 2, rtol=1e-5)
    np.testing.assert_allclose(losses.segmentation(logits, tissue, 4.0), -(np.log(0.7) + np.log(0.1)) / 4, rtol=1e-5)
    assert float(losses.segmentation(logits, np.full_like(tissue, -1))) == 0.0


# ---- texture ---------------------------------------------------------------------------------------------------------


def waves(period, amplitude=0.2, size=64):
    """A sine of some period along both axes, that fades away towards the black edge, (1, size, size, 1)."""
    x = np.hanning(size) * np.sin(2 * np.pi * np.arange(size) / period)
    return (amplitude * x[:, None] * x - 1.0)[None, :, :, None].astype("float32")


def test_texture_counts_the_power_of_detail_and_not_where_it_lies():
    """Half the amplitude is a quarter of the power, |log| of which is log 4; a shift changes no power."""
    real, black = waves(4.6), -np.ones((1, 64, 64, 1), "float32")
    assert float(losses.texture_difference(real, real)) == 0.0
    half = black + 0.5 * (real - black)
    assert float(losses.texture_difference(real, half)) == pytest.approx(
        np.log(4), rel=0.05
    )  # less in the faintest windows
    assert float(losses.texture_difference(real, np.roll(real, 1, axis=1))) < 0.15
    assert float(losses.texture_difference(real, black - (real - black))) < 1e-4


def test_texture_asks_for_nothing_where_the_real_slice_has_none():
    smooth, black = waves(32), -np.ones((1, 64, 64, 1), "float32")
    assert float(losses.texture_difference(black, waves(4.6))) == 0.0
    assert float(losses.texture_difference(smooth, waves(4.6))) == 0.0


def test_texture_tells_a_blurred_slice_from_a_sharp_one():
    sharp = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 64, 64, 1)).astype("float32")
    blurred = (sharp + np.roll(sharp, 1, 1) + np.roll(sharp, 1, 2) + np.roll(sharp, (1, 1), (1, 2))) / 4
    assert float(losses.texture_difference(sharp, blurred)) > 0.5


def test_texture_of_pictures_smaller_than_a_window_is_that_of_one_neighbourhood():
    real, fake = (tiny_models.images(2, 16, seed=seed)[:, :12] for seed in (0, 1))
    small = losses.texture_difference(real, fake)
    assert 0.0 < float(small) == pytest.approx(float(losses.texture_difference(real, fake, window=12)), rel=1e-6)


def test_histograms_of_grey_levels_are_compared_and_not_where_these_lie():
    """The same half of a window bright by 0.6, wherever it lies in there, is the same set of grey levels."""
    bright, other = (-np.ones((1, 16, 16, 1), "float32") for _ in range(2))
    bright[:, :8] += 0.6
    other[:, 8:] += 0.6
    assert float(losses.histogram_difference(bright, bright)) == 0.0
    for picture in (bright, other):
        grey, *_ = losses._greys_and_detail(picture)
        np.testing.assert_allclose(losses._sorted_values(grey, 16), [[0.0] * 128 + [0.6] * 128], atol=1e-6)
    assert float(losses.histogram_difference(bright, other)) < 1e-6  # a mirror image, so its detail is the same, too


def test_histograms_are_those_that_numpy_and_scipy_find():
    real, fake = (tiny_models.images(2, 48, seed=seed) for seed in (0, 1))
    expected = 0.0
    for weight, kind in ((1, "grey"), (2, "fine"), (2, "coarse")):
        sets = []
        for image in (real, fake):
            image = np.asarray(image, "float64")[..., 0] + 1.0
            if kind == "coarse":
                image = image.reshape(2, 24, 2, 24, 2).mean(axis=(2, 4))
            if kind != "grey":
                image = image - ndimage.gaussian_filter(image, (0, 1, 1), mode="constant", truncate=3.0)
            sets.append(image)
        for first in (0, 8):
            end = range(first, sets[0].shape[1] - 15, 16)
            apart = [
                stats.wasserstein_distance(*(values[n, i : i + 16, j : j + 16].ravel() for values in sets))
                for n in range(2)
                for i in end
                for j in end
            ]
            expected += weight * np.mean(apart) / 2
    assert float(losses.histogram_difference(real, fake)) == pytest.approx(expected, rel=1e-4)


def test_histograms_tell_detail_of_the_same_power_by_its_skewness():
    """Thin bright lines on grey against thin dark ones: as much power, the other way round."""
    lines = np.zeros((1, 64, 64, 1), "float32")
    lines[:, ::8] = 0.5
    lines -= lines.mean()
    assert float(losses.texture_difference(lines, -lines)) < 0.2
    for one, other in list(zip(*map(losses._greys_and_detail, (lines, -lines)), strict=True))[1:]:
        a, b = (losses._sorted_values(detail, 16) for detail in (one, other))
        assert float(tf.reduce_mean(tf.abs(a - b))) > 0.3 * float(tf.reduce_mean(tf.abs(a)))


@pytest.mark.parametrize("height, width", [(48, 40), (12, 16), (33, 47), (16, 40)])
def test_histograms_reach_every_pixel_but_corners_of_whatever_size(height, width):
    real = tf.zeros((1, height, width, 1))
    fake = tf.Variable(np.random.default_rng(0).uniform(0.1, 1.0, (1, height, width, 1)).astype("float32"))
    with tf.GradientTape() as tape:
        loss = losses.histogram_difference(real, fake)
    reached = tape.gradient(loss, fake).numpy()[0, :, :, 0] != 0.0
    reached[:16, -16:] = reached[-16:, :16] = True
    assert np.isfinite(loss) and reached.all()


def test_texture_and_histograms_are_parts_of_the_reconstruction_loss_by_their_weights():
    real, fake = tiny_models.images(2, 32), tiny_models.images(2, 32, seed=1)
    plain = tiny_models.make_vae().compare(real, fake)
    for name, loss in (("texture", losses.texture_difference), ("histogram", losses.histogram_difference)):
        more = tiny_models.make_vae(**{f"{name}_weight": 0.7}).compare(real, fake, share=0.5)
        np.testing.assert_allclose(more, plain + 0.35 * loss(real, fake), rtol=1e-5)


def test_texture_is_asked_for_little_by_little_in_training_and_in_full_in_validation():
    model = tiny_models.make_vqvae(texture_weight=0.7)
    batch = tiny_models.tensors(tiny_models.batch_of(2))
    wholly = float(model.forward(batch, 0, training=False)[0]["reconstruction"])
    asked = [float(model.forward(batch, step, training=True)[0]["reconstruction"]) for step in (0, 250, 1000, 9999)]
    model.texture_weight = 0.0
    plain = float(model.forward(batch, 0, training=False)[0]["reconstruction"])
    assert wholly - plain > 0.1
    np.testing.assert_allclose(asked, plain + np.array([0.0, 0.25, 1.0, 1.0]) * (wholly - plain), rtol=1e-4)
