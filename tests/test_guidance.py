"""guidance: exact answers for denoisers that are formulas."""

import numpy as np
import pytest
from keras import ops

from ldm.diffusion import guidance, schedules


def denoise(x_t, t, conditions):
    """A denoiser that answers with its condition, plus some of x_t; without one, with 1."""
    level = 1.0 if conditions is None else conditions["z"]
    return 0.5 * x_t + ops.cast(ops.reshape(level, (-1, 1, 1, 1)), "float32")


X = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype("float32")
T = np.full(3, 0.5, "float32")
Z, OTHER = {"z": np.array([3, 5, 7])}, {"z": np.array([2, 2, 2])}


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("negative", [None, OTHER])
def test_guidance_moves_on_from_the_negative_through_the_condition(scale, negative):
    x_0 = guidance.guided(denoise, Z, scale, negative=negative)(X, T)
    away = np.array([1, 1, 1]) if negative is None else OTHER["z"]
    expected = 0.5 * X + (away + scale * (Z["z"] - away)).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(x_0, expected, rtol=1e-5, atol=1e-5)


def test_guiding_x_0_is_guiding_eps():
    alpha, sigma = 0.6, 0.8
    x_0 = guidance.guided(denoise, Z, 2.5)(X, T)
    eps = [schedules.to_eps(denoise(X, T, c), X, alpha, sigma) for c in (Z, None)]
    np.testing.assert_allclose(schedules.to_eps(x_0, X, alpha, sigma), eps[1] + 2.5 * (eps[0] - eps[1]), atol=1e-4)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guided_pixels_stay_in_their_range(rescale):
    """Whatever else was done to them: the threshold comes last."""

    def stretching(x_t, t, conditions):
        return x_t if conditions is None else 3.0 * x_t

    def threshold(x_0, t):
        assert t is T
        return np.clip(x_0, -4, 4)

    free, limited = (
        np.asarray(guidance.guided(stretching, Z, 2.5, rescale, None, one)(X, T)) for one in (None, threshold)
    )
    assert free.max() > 6 and free.min() < -6 and np.mean(np.abs(free) < 4) > 0.3
    np.testing.assert_array_equal(limited, np.clip(free, -4, 4))


@pytest.mark.parametrize("rescale", [0.0, 0.4, 1.0])
def test_rescaling_takes_added_contrast_back(rescale):
    def stretching(x_t, t, conditions):
        return x_t if conditions is None else 2.0 * x_t

    x_0 = np.asarray(guidance.guided(stretching, Z, 3.0, rescale)(X, T))  # 4 x_t; the conditional one is 2 x_t
    np.testing.assert_allclose(x_0, (4.0 - 2.0 * rescale) * X, rtol=1e-5)


def test_each_slice_is_rescaled_by_its_own_contrast():
    """A share of 1 gives each guided x_0 the deviation of its conditional one, whatever slices stand beside it."""
    contrast = np.array([1.0, 10.0, 0.1], "float32").reshape(-1, 1, 1, 1)

    def uneven(x_t, t, conditions):  # the first slice gains much by guidance, the last one hardly anything
        return (
            contrast * x_t
            if conditions is not None
            else np.array([-5.0, 5.0, 0.09], "float32")[:, None, None, None] * x_t
        )

    x_0 = np.asarray(guidance.guided(uneven, Z, 3.0, rescale=1.0)(X, T))
    np.testing.assert_allclose(x_0.std(axis=(1, 2, 3)), (contrast * X).std(axis=(1, 2, 3)), rtol=1e-4)


def test_without_guidance_the_network_is_called_once():
    calls = []
    guidance.guided(lambda *told: calls.append(told) or told[0], Z)(X, T)
    assert len(calls) == 1


def test_spherical_interpolation_keeps_length_and_even_angles():
    rng = np.random.default_rng(1)
    first, last = rng.normal(size=(2, 50))
    last *= np.linalg.norm(first) / np.linalg.norm(last)
    points = guidance.spherical(first, last, 5)
    np.testing.assert_allclose(points[[0, -1]], [first, last], rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), np.linalg.norm(first), rtol=1e-5)
    cosines = [points[i] @ points[i + 1] for i in range(4)]
    np.testing.assert_allclose(cosines, cosines[0], rtol=1e-5)
    np.testing.assert_allclose(guidance.spherical(first, first, 3), [first] * 3, rtol=1e-5)
    with pytest.raises(ValueError, match="at least 2 points"):
        guidance.spherical(first, last, 1)
