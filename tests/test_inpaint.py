"""samplers.inpaint: what is known stays, what is drawn fits to it, and the network sees what the process would show."""

import numpy as np
import pytest
from exact import MU, S, cosine, exact_denoiser, float64

from ldm.diffusion import samplers


def test_inpainting_keeps_what_is_known_and_draws_the_rest_to_fit():
    """Two pixels that are always equal: where one is known, the other must come out as it."""

    def denoise(x_t, t):  # exact for x = (a, a), a ~ N(0, 1)
        alpha, sigma = float64(cosine, np.asarray(t)[0])
        mean = np.asarray(x_t).mean(axis=2, keepdims=True)
        return np.repeat(alpha * mean / (alpha**2 + sigma**2 / 2), 2, axis=2).astype("float32")

    rng, seeds = np.random.default_rng(0), [(0, row) for row in range(4)]
    known = np.repeat(rng.normal(size=(4, 125, 1, 1)), 2, axis=2).astype("float32")
    mask = np.zeros((4, 125, 2, 1), "float32")
    mask[:, :, 1] = 1.0
    x_T = rng.normal(size=known.shape).astype("float32")
    correlations = []
    for steps, resample in ((8, 1), (80, 10), (300, 1)):  # going through 8 levels again and again does what more do
        film = list(samplers.inpaint(denoise, known, mask, x_T, cosine, steps, resample, seed=seeds))
        assert len(film) == steps
        end = np.asarray(film[-1][0])
        np.testing.assert_allclose(end[:, :, 0], known[:, :, 0], atol=1e-6)
        correlations.append(np.corrcoef(end[:, :, 1].ravel(), known[:, :, 0].ravel())[0, 1])
    assert min(correlations[1:]) > 0.97 and correlations[1] > correlations[0]
    with pytest.raises(ValueError, match="resample must lie"):
        next(samplers.inpaint(denoise, known, mask, x_T, cosine, 3, resample=4))


def test_inpainting_shows_the_network_what_the_process_would():
    """Pixels of N(mu, s^2), each by itself: at every call, known or not, x_t is of N(alpha mu, alpha^2 s^2 + sigma^2).

    So what is known must be noised, as much as the level says; and going back up a level must add the noise that is
    missing there, not all of it. (Ancestral steps of a finite length lose a few percent of the deviation.)
    """
    shown, exact = [], exact_denoiser(cosine)

    def denoise(x_t, t):
        shown.append((float(t[0]), np.asarray(x_t)))
        return exact(x_t, t)

    rng = np.random.default_rng(0)
    known = (MU + S * rng.normal(size=(5_000, 1, 2, 1))).astype("float32")
    mask = np.zeros_like(known)
    mask[:, :, 1] = 1.0
    x_T = rng.normal(size=known.shape).astype("float32")
    *_, (end, _) = samplers.inpaint(denoise, known, mask, x_T, cosine, 240, resample=3, seed=0)
    assert len(shown) == 240
    for t, x_t in shown[1:]:
        alpha, sigma = float64(cosine, t)
        for pixel in range(2):
            np.testing.assert_allclose(x_t[:, 0, pixel].mean(), alpha * MU, atol=0.07)
            np.testing.assert_allclose(x_t[:, 0, pixel].std(), np.sqrt(alpha**2 * S**2 + sigma**2), rtol=0.15)
    np.testing.assert_allclose(np.asarray(end)[:, 0, 1].std(), S, rtol=0.15)
    np.testing.assert_array_equal(np.asarray(end)[:, 0, 0], known[:, 0, 0])
