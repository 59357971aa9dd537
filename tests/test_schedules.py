"""ldm/schedules.py: invariants, the papers' formulas in float64, and exact round trips."""

import numpy as np
import pytest
import tensorflow as tf

from ldm import schedules

GRID = np.linspace(0.0, 1.0, 2001, dtype="float32")
every_schedule = pytest.mark.parametrize("schedule", schedules.SCHEDULES.values(), ids=schedules.SCHEDULES)


def values(schedule, t):
    return tuple(np.asarray(value, "float64") for value in schedule(t))


# ---- the functions t -> (alpha, sigma) -------------------------------------------------------------------------------


@every_schedule
def test_variance_is_preserved_at_every_time(schedule):
    alpha, sigma = values(schedule, GRID)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, atol=3e-7)


@every_schedule
def test_signal_falls_and_noise_rises(schedule):
    alpha, sigma = values(schedule, GRID)
    assert np.all(np.diff(alpha) <= 0) and np.all(np.diff(sigma) >= 0)
    coarse_alpha, coarse_sigma = alpha[::20], sigma[::20]  # float32 can tell these apart
    assert np.all(np.diff(coarse_alpha) < 0)
    assert np.all(np.diff(coarse_sigma[:-1]) > 0)


@every_schedule
def test_time_0_is_clean_exactly(schedule):
    alpha, sigma = values(schedule, 0.0)
    assert alpha == 1.0 and sigma == 0.0


@every_schedule
def test_nothing_of_the_picture_is_left_at_time_1(schedule):
    """Otherwise the mean brightness of training leaks through t = 1, and samples collapse to it."""
    alpha, sigma = values(schedule, 1.0)
    assert 0.0 < alpha**2 < 1e-4  # above 0: x_0 from eps divides by alpha
    assert sigma > 0.9999


@every_schedule
def test_alpha_never_reaches_0_so_that_x_0_from_eps_stays_finite(schedule):
    alpha, sigma = schedule(GRID)
    assert float(tf.reduce_min(alpha)) >= 0.99 * schedules.SMALLEST_ALPHA
    assert np.all(np.isfinite(schedules.to_x_0("eps", 1.0, 1.0, np.asarray(alpha), np.asarray(sigma))))


def test_linear_is_the_table_of_1000_betas():
    """alpha_bar_i = prod (1 - beta_j), beta from 1e-4 to 0.02 (arXiv 2006.11239, section 4), read at t = i / 1000."""
    alpha_bar = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
    t = np.arange(1, 1001) / 1000
    alpha, sigma = values(schedules.linear, t)
    np.testing.assert_allclose(alpha, np.sqrt(alpha_bar), rtol=5e-6)
    np.testing.assert_allclose(sigma, np.sqrt(1.0 - alpha_bar), rtol=5e-5)


def test_linear_between_two_entries_lies_between_them():
    alpha, _ = values(schedules.linear, np.array([0.500, 0.5005, 0.501]))
    np.testing.assert_allclose(alpha[1], np.sqrt(alpha[0] * alpha[2]), rtol=1e-6)


def test_cosine_is_the_formula_of_the_paper():
    """arXiv 2102.09672, eq. 17: alpha_bar = f(t) / f(0), f(t) = cos^2(pi / 2 (t + s) / (1 + s)), s = 0.008."""

    def f(t):
        return np.cos(0.5 * np.pi * (t + 0.008) / 1.008) ** 2

    t = GRID[:-10].astype("float64")
    alpha, _ = values(schedules.cosine, t)
    np.testing.assert_allclose(alpha**2, f(t) / f(0.0), atol=5e-7)


def test_sigmoid_is_the_formula_of_the_paper():
    """arXiv 2301.10972, algorithm 1, with start -3, end 3, tau 1."""

    def logistic(x):
        return 1.0 / (1.0 + np.exp(-x))

    t = GRID[:-10].astype("float64")
    gamma = (logistic(3.0) - logistic(-3.0 + 6.0 * t)) / (logistic(3.0) - logistic(-3.0))
    alpha, _ = values(schedules.sigmoid, t)
    np.testing.assert_allclose(alpha**2, gamma, atol=5e-7)


@every_schedule
def test_schedule_keeps_shape_and_takes_any_float(schedule):
    for t in (0.3, np.full((2, 3), 0.3), tf.fill((2, 3), 0.3), tf.fill((4,), tf.cast(0.3, "float64"))):
        alpha, sigma = schedule(t)
        assert tuple(alpha.shape) == tuple(sigma.shape) == np.shape(t)
        np.testing.assert_allclose(alpha, schedule(0.3)[0], rtol=1e-6)


@every_schedule
def test_schedule_is_float32_under_mixed_bfloat16(schedule, bfloat16):
    alpha, sigma = schedule(GRID)
    assert alpha.dtype == sigma.dtype == tf.float32
    np.testing.assert_allclose(np.asarray(alpha, "float64") ** 2 + np.asarray(sigma, "float64") ** 2, 1.0, atol=3e-7)


@every_schedule
def test_schedule_gives_the_same_inside_a_graph(schedule):
    eager, traced = schedule(GRID), tf.function(schedule)(GRID)
    np.testing.assert_allclose(eager[0], traced[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(eager[1], traced[1], rtol=1e-5, atol=3e-4)  # sqrt(1 - 1) at t = 0


def test_log_snr_is_the_log_of_the_power_ratio():
    alpha, sigma = schedules.cosine(GRID[1:])
    expected = np.log(np.asarray(alpha, "float64") ** 2 / np.asarray(sigma, "float64") ** 2)
    np.testing.assert_allclose(schedules.log_snr(alpha, sigma), expected, rtol=1e-5, atol=1e-5)


# ---- eps, v, x_0 -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0.02, 0.5, 0.98])
def noisy(request):
    """x_0, eps, alpha, sigma and x_t, by the definition in float64."""
    rng = np.random.default_rng(0)
    x_0, eps = rng.normal(size=(2, 3, 4, 4, 1))
    alpha, sigma = values(schedules.cosine, request.param)
    return x_0, eps, alpha, sigma, alpha * x_0 + sigma * eps


def test_add_noise_is_the_forward_process(noisy):
    x_0, eps, alpha, sigma, x_t = noisy
    np.testing.assert_array_equal(schedules.add_noise(x_0, eps, alpha, sigma), x_t)


@pytest.mark.parametrize("prediction", schedules.PREDICTIONS)
def test_x_0_comes_back_from_every_prediction(noisy, prediction):
    x_0, eps, alpha, sigma, x_t = noisy
    target = schedules.to_target(prediction, x_0, eps, alpha, sigma)
    np.testing.assert_allclose(schedules.to_x_0(prediction, target, x_t, alpha, sigma), x_0, atol=1e-5)


def test_targets_are_what_the_papers_say(noisy):
    x_0, eps, alpha, sigma, _ = noisy
    angle = np.arctan2(sigma, alpha)  # v is the derivative of x by the angle (arXiv 2202.00512, appendix D)
    step = 1e-5
    ahead = np.cos(angle + step) * x_0 + np.sin(angle + step) * eps
    behind = np.cos(angle - step) * x_0 + np.sin(angle - step) * eps
    derivative = (ahead - behind) / (2 * step)
    np.testing.assert_allclose(schedules.to_target("v", x_0, eps, alpha, sigma), derivative, atol=1e-6)
    np.testing.assert_array_equal(schedules.to_target("eps", x_0, eps, alpha, sigma), eps)
    np.testing.assert_array_equal(schedules.to_target("x_0", x_0, eps, alpha, sigma), x_0)


def test_eps_comes_back_from_x_0(noisy):
    x_0, eps, alpha, sigma, x_t = noisy
    np.testing.assert_allclose(schedules.to_eps(x_0, x_t, alpha, sigma), eps, atol=1e-9)


@pytest.mark.parametrize("prediction", ["noise", "", None])
def test_unknown_prediction_is_refused(noisy, prediction):
    x_0, eps, alpha, sigma, x_t = noisy
    with pytest.raises(ValueError, match="prediction must be one of"):
        schedules.to_target(prediction, x_0, eps, alpha, sigma)
    with pytest.raises(ValueError, match="prediction must be one of"):
        schedules.to_x_0(prediction, x_0, x_t, alpha, sigma)
