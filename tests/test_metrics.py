"""ldm/judging/metrics.py against scikit-image, TensorFlow, closed forms, and the trivial predictors on real slices."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ldm.judging import metrics

ARCHIVE = Path(__file__).resolve().parents[2] / "shared" / "data" / "oasis1_slices.zip"


@pytest.fixture
def pair():
    """Three smooth pictures, not square, and noisy versions of them."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:48, :40] / 40
    real = np.stack([0.5 + 0.4 * np.sin(5 * x + k) * np.cos(7 * y) for k in range(3)]).astype(np.float32)
    fake = np.clip(real + 0.1 * rng.normal(size=real.shape), 0, 1).astype(np.float32)
    return real, fake


# ---------------------------------------------------------------------------------------------------------------- SSIM


def test_ssim_map_equals_scikit_image_away_from_the_border(pair):
    real, fake = pair
    ours = metrics.ssim_map(real, fake)
    for k in range(len(real)):
        _, theirs = structural_similarity(
            real[k].astype(np.float64),
            fake[k].astype(np.float64),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            full=True,
        )
        # 5 pixels in, the 11 x 11 window no longer sees the border, where we pad with zeros and they reflect.
        np.testing.assert_allclose(ours[k, 5:-5, 5:-5], theirs[5:-5, 5:-5], atol=1e-5)


def test_border_is_padded_with_zeros(pair):
    real, fake = pair
    inside = metrics.ssim_map(np.pad(real, ((0, 0), (8, 8), (8, 8))), np.pad(fake, ((0, 0), (8, 8), (8, 8))))
    np.testing.assert_allclose(metrics.ssim_map(real, fake), inside[:, 8:-8, 8:-8], atol=1e-6)


def test_identical_images_score_exactly_one(pair):
    real, _ = pair
    assert (metrics.ssim_map(real, real) == 1).all()
    assert (metrics.ssim(real, real) == 1).all()
    assert (metrics.foreground_ssim(real, real) == 1).all()
    assert np.isposinf(metrics.psnr(real, real)).all()
    assert (metrics.mae(real, real) == 0).all()


def test_constant_images_have_a_closed_form():
    """No variance: the second factor is 1, and the luminance term remains, Wang et al. 2004, equation 6."""
    a, b, c1 = 0.3, 0.7, 0.01**2
    real, fake = np.full((1, 32, 32), a), np.full((1, 32, 32), b)
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    np.testing.assert_allclose(metrics.ssim_map(real, fake)[0, 5:-5, 5:-5], expected, rtol=1e-6)


def test_ssim_is_symmetric_and_bounded(pair):
    real, fake = pair
    np.testing.assert_allclose(metrics.ssim_map(real, fake), metrics.ssim_map(fake, real), atol=1e-6)
    assert np.abs(metrics.ssim_map(real, 1 - real)).max() <= 1
    assert metrics.ssim(real, 1 - real).max() < 0.1, "a negative is not similar"


def test_foreground_ssim_averages_the_map_over_the_brain_of_the_real_slice(pair):
    real, fake = pair
    real, fake = real.copy(), fake.copy()
    real[:, :, :20] = 0  # left half: background
    fake[:, :, :20] = 0
    brain = real[0] > metrics.FOREGROUND
    expected = metrics.ssim_map(real, fake)[0][brain].mean()
    assert metrics.foreground_ssim(real, fake)[0] == pytest.approx(expected, abs=1e-6)
    # More than a window away from the brain, the background may hold anything without changing the score.
    littered = fake.copy()
    littered[:, :, :12] = 0.9
    np.testing.assert_allclose(metrics.foreground_ssim(real, littered), metrics.foreground_ssim(real, fake), atol=1e-6)
    assert (metrics.ssim(real, littered) < metrics.ssim(real, fake) - 0.1).all()


def test_foreground_comes_from_the_real_slice_only(pair):
    real, _ = pair
    assert metrics.foreground_ssim(real, np.zeros_like(real)).max() < 0.05, "an empty fake must not escape its mask"


def test_a_slice_without_foreground_is_nan_and_leaves_the_others_alone(pair):
    real, fake = pair
    empty = real.copy()
    empty[1] = 0
    score = metrics.foreground_ssim(empty, fake)
    assert np.isnan(score).tolist() == [False, True, False]
    assert score[0] == metrics.foreground_ssim(real, fake)[0]


# --------------------------------------------------------------------------------------------------------- MS-SSIM


def test_ms_ssim_equals_tensorflow_on_a_picture_in_wide_background():
    """TensorFlow pads nothing; where the border is background in both, it differs from us by a known number of ones."""
    rng = np.random.default_rng(2)
    real, other = np.zeros((2, 2, 512, 576), np.float32)
    for part in (real, other):  # blocks of every size, so that every scale has something to compare
        for size in (1, 4, 16, 32):
            blocks = rng.random((2, 192 // size, 256 // size)) / 4
            part[:, 160:352, 160:416] += blocks.repeat(size, axis=1).repeat(size, axis=2)
    fake = (real + other) / 2
    weights = metrics.ms_ssim_weights(512, 576)
    expected = np.ones(2)
    for scale in range(5):
        only = np.eye(5)[scale].tolist()  # the power of one scale alone gives its mean
        theirs = tf.image.ssim_multiscale(real[..., None], fake[..., None], 1.0, power_factors=only).numpy()
        height, width = 512 >> scale, 576 >> scale
        expected *= (1 - (1 - theirs) * (height - 10) * (width - 10) / (height * width)) ** weights[scale]
    assert (expected < 0.97).all()
    np.testing.assert_allclose(metrics.ms_ssim(real, fake), expected, atol=2e-5)


def test_ms_ssim_has_as_many_scales_as_windows_fit():
    assert [len(metrics.ms_ssim_weights(size, 512)) for size in (256, 176, 175, 128, 64, 22, 21, 4)] == [
        *(5, 5, 4, 4, 3, 2, 1, 1)
    ]
    np.testing.assert_allclose(metrics.ms_ssim_weights(256, 256), metrics.SCALE_WEIGHTS, rtol=2e-4)
    np.testing.assert_allclose(metrics.ms_ssim_weights(64, 22), [0.0448 / 0.3304, 0.2856 / 0.3304])


def test_ms_ssim_of_one_scale_is_ssim(pair):
    real, fake = (part[:, :21, :30] for part in pair)
    np.testing.assert_allclose(metrics.ms_ssim(real, fake), metrics.ssim(real, fake), rtol=1e-6)


def test_ms_ssim_pads_odd_pictures_with_background(pair):
    real, fake = (part[:, :47, :39] for part in pair)
    assert (metrics.ms_ssim(real, real) == 1).all()
    halves = [metrics._halve(part[0]) for part in (real, np.pad(real, ((0, 0), (0, 1), (0, 1))))]
    np.testing.assert_array_equal(*halves)
    assert metrics.ms_ssim(real, fake).max() < 1


def test_ms_ssim_of_a_negative_is_0_and_not_nan(pair):
    real, _ = pair
    board = np.indices((64, 64)).sum(axis=0)[None] % 2.0
    assert metrics.ms_ssim(board, 1 - board)[0] == 0
    assert np.isfinite(metrics.ms_ssim(real, 1 - real)).all()


def test_ms_ssim_falls_as_noise_grows_and_is_symmetric(pair):
    real, fake = pair
    half = (real + fake) / 2
    assert (metrics.ms_ssim(real, fake) < metrics.ms_ssim(real, half)).all()
    np.testing.assert_allclose(metrics.ms_ssim(real, fake), metrics.ms_ssim(fake, real))


# -------------------------------------------------------------------------------------------------------- PSNR and MAE


def test_psnr_equals_scikit_image(pair):
    real, fake = pair
    expected = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in zip(real, fake, strict=True)]
    np.testing.assert_allclose(metrics.psnr(real, fake), expected, atol=1e-4)


def test_a_constant_error_has_known_psnr_and_mae():
    real = np.full((2, 8, 8), 0.5)
    np.testing.assert_allclose(metrics.psnr(real, real + 0.1), 20.0)  # -10 log10(0.01)
    np.testing.assert_allclose(metrics.mae(real, real - 0.1), 0.1)


@pytest.mark.parametrize("metric", [metrics.ssim, metrics.foreground_ssim, metrics.ms_ssim, metrics.psnr, metrics.mae])
def test_one_number_per_image_with_or_without_a_channel_axis(pair, metric):
    real, fake = pair
    together = metric(real[..., None], fake[..., None])
    assert together.shape == (3,)
    np.testing.assert_array_equal(together, metric(real, fake))
    np.testing.assert_array_equal(together, [metric(real[k : k + 1], fake[k : k + 1])[0] for k in range(3)])


@pytest.mark.parametrize("metric", [metrics.ssim, metrics.foreground_ssim, metrics.ms_ssim, metrics.psnr, metrics.mae])
def test_wrong_input_is_refused(pair, metric):
    real, fake = pair
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        metric(real * 2 - 1, fake * 2 - 1)  # still in [-1, 1]: would give plausible nonsense
    with pytest.raises(ValueError, match="uint8"):
        metric((real * 255).astype(np.uint8), (fake * 255).astype(np.uint8))
    with pytest.raises(ValueError, match="shape"):
        metric(real, fake[:1])  # would broadcast
    with pytest.raises(ValueError, match="shape"):
        metric(real[0], fake[0])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        metric(real, np.full_like(real, np.nan))


# ------------------------------------------------------------------------------------------------------- all together


def test_the_range_of_the_networks_becomes_that_of_the_metrics():
    found = metrics.to_unit(np.array([-1.0, -0.5, 0.0, 1.0, -1.5, 3.0]))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [0.0, 0.25, 0.5, 1.0, 0.0, 1.0])


def test_all_scores_are_those_of_the_functions_of_their_names(pair):
    real, fake = (part[..., None].copy() for part in pair)
    real[:, :, :9] = 0.0  # the brain of the fake is larger, so that real and fake cannot be swapped
    expected = {
        "SSIM": metrics.ssim(real, fake),
        "foreground SSIM": metrics.foreground_ssim(real, fake),
        "MS-SSIM": metrics.ms_ssim(real, fake),
        "PSNR": metrics.psnr(real, fake),
        "MAE": metrics.mae(real, fake),
    }
    found = metrics.all_scores(real, fake)
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    assert np.abs(found["foreground SSIM"] - metrics.foreground_ssim(fake, real)).min() > 0.01


def test_scores_are_the_mean_over_slices_and_the_deviation_over_people():
    scores = {"PSNR": np.array([1.0, 10.0, 3.0, np.nan, 11.0, 12.0]), "MAE": np.full(6, 0.5)}
    case = np.array([7, 9, 7, 7, 9, 9])  # means 2 and 11; a slice without a score counts for nobody
    assert metrics.over_people(scores, case) == {"PSNR": [37 / 5, 9 / 2], "MAE": [0.5, 0.0]}


# -------------------------------------------------------------------------------------------------- trivial predictors


def test_mean_images_do_not_depend_on_how_the_slices_are_batched():
    rng = np.random.default_rng(1)
    images, z = rng.random((20, 4, 5, 1), dtype=np.float32), rng.integers(0, 3, 20)
    whole = metrics.mean_images([(images, z)])
    parts = metrics.mean_images((images[k : k + 3], z[k : k + 3]) for k in range(0, 20, 3))
    assert list(whole) == list(parts) == [0, 1, 2]
    for index in whole:
        assert whole[index].shape == (4, 5)
        np.testing.assert_allclose(whole[index], images[z == index, ..., 0].mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(whole[index], parts[index], atol=1e-6)


def test_prediction_takes_the_nearest_known_slice_index():
    means = {4: np.full((2, 2), 0.4, np.float32), 8: np.full((2, 2), 0.8, np.float32)}
    predicted = metrics.mean_image_prediction(means, [4, 8, 0, 7, 6, 99])
    assert predicted.shape == (6, 2, 2)
    np.testing.assert_allclose(predicted[:, 0, 0], [0.4, 0.8, 0.4, 0.8, 0.4, 0.8])  # 6 is a tie: the lower
    assert metrics.mean_image_prediction(means, []).shape == (0, 2, 2)


def test_a_first_stage_stands_beside_what_knows_nothing(pair):
    real, fake = (part[..., None] for part in pair)
    means = {3: real[0, ..., 0], 4: fake[1, ..., 0]}
    scores = metrics.beside_trivial(real, fake, means, np.array([3, 4, 4]), called="VQ-VAE")
    assert list(scores) == ["VQ-VAE", metrics.MEAN_IMAGE, metrics.BLACK]
    guesses = {"VQ-VAE": fake, metrics.MEAN_IMAGE: np.stack([real[0], fake[1], fake[1]]), metrics.BLACK: 0 * real}
    for name, guess in guesses.items():
        assert list(scores[name]) == ["SSIM", "foreground SSIM", "MS-SSIM", "PSNR", "MAE"]
        np.testing.assert_allclose(scores[name]["MAE"], np.abs(real - guess).mean(axis=(1, 2, 3)), rtol=1e-6)
        np.testing.assert_array_equal(scores[name]["PSNR"], metrics.psnr(real, guess))


def test_scores_are_means_over_slices_and_deviations_over_people():
    values, case = np.array([1.0, 3.0, np.nan, 5.0, 7.0]), np.array([2, 2, 2, 9, 9])
    assert metrics.over_people({"PSNR": values}, case) == {"PSNR": [4.0, 2.0]}


def test_nothing_to_average_and_uneven_batches_are_errors():
    with pytest.raises(ValueError, match="no images"):
        metrics.mean_images([])
    with pytest.raises(ValueError, match="2 images but 3"):
        metrics.mean_images([(np.zeros((2, 4, 4)), [0, 1, 2])])
    with pytest.raises(ValueError, match="empty"):
        metrics.mean_image_prediction({}, [0])


# ---------------------------------------------------------------------------------------------------------- real slices


def _slices(archive: zipfile.ZipFile, split: str):
    """Yield (images, z) of one person at a time, in [0, 1]."""
    people: dict[str, list[tuple[int, str]]] = {}
    for name in archive.namelist():
        folder, _, file = name.rpartition("/")
        if folder.endswith(f"_{split}") and file.startswith("case_"):
            case, _, index = file.partition("_slice_")
            people.setdefault(case, []).append((int(index.split(".")[0]), name))
    for files in people.values():
        images = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for _, name in files]
        yield np.stack(images).astype(np.float32) / 255, np.array([index for index, _ in files])


@pytest.mark.skipif(not ARCHIVE.exists(), reason="the OASIS slices are not beside this checkout (shared/data)")
def test_trivial_predictors_on_real_slices():
    """What a picture is worth that knows nothing of the person: every model must beat these numbers."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        means = metrics.mean_images(_slices(archive, "train"))
        real, z = (np.concatenate(part) for part in zip(*_slices(archive, "test"), strict=True))
    assert len(real) == 20 * 32  # people, slices
    real, z = real[::3], z[::3]  # a third, spread over people and slices, is enough for two digits
    black, mean = np.zeros_like(real), metrics.mean_image_prediction(means, z)
    assert real.shape[1:] == (256, 256)
    assert metrics.ssim(real, black).mean() == pytest.approx(0.69, abs=0.01)
    assert metrics.foreground_ssim(real, black).mean() == pytest.approx(0.00, abs=0.005)
    assert metrics.ssim(real, mean).mean() == pytest.approx(0.83, abs=0.01)
    assert metrics.foreground_ssim(real, mean).mean() == pytest.approx(0.435, abs=0.02)
    assert metrics.psnr(real, mean).mean() == pytest.approx(21.6, abs=0.3)


def test_dice_counts_known_pixels_of_all_slices_together():
    real = np.array([[[1, 1, 2], [0, -1, -1]], [[2, 0, 0], [0, 0, 0]]])
    fake = np.array([[[1, 2, 2], [0, 1, 1]], [[0, 0, 0], [0, 0, 0]]])
    one, two, three = metrics.dice(real, fake)
    assert one == pytest.approx(2 * 1 / (2 + 1)) and two == pytest.approx(2 * 1 / (2 + 2)) and np.isnan(three)
    assert metrics.dice(real, real)[:2] == [1.0, 1.0]
    with pytest.raises(ValueError, match="same shape"):
        metrics.dice(real, fake[:1])


def test_neighbours_correlate_by_the_mean_over_pairs_where_either_is_brain():
    rng = np.random.default_rng(3)
    stack = rng.random((3, 8, 8))
    stack = 0.1 + 0.9 * stack
    stack[:, :, 4:] = 0.0  # both black: does not count
    pairs = [np.corrcoef(stack[i, :, :4].ravel(), stack[i + 1, :, :4].ravel())[0, 1] for i in range(2)]
    np.testing.assert_allclose(metrics.neighbour_correlation(stack), np.mean(pairs))
    np.testing.assert_allclose(metrics.neighbour_correlation(stack[[0, 0, 0]]), 1.0)
    apart = stack[:2].copy()
    apart[1] = apart[1, :, ::-1]  # brain on the left, and on the right: it is all compared
    np.testing.assert_allclose(metrics.neighbour_correlation(apart), np.corrcoef(*apart.reshape(2, -1))[0, 1])
    assert np.isnan(metrics.neighbour_correlation(np.zeros((3, 8, 8))))
