"""ldm/diffusion/samplers.py against the exact denoiser of a Gaussian, for which every sampler's answer is known."""

import numpy as np
import pytest
import tensorflow as tf
from exact import (
    MU,
    SCHEDULES,
    S,
    cosine,
    exact_denoiser,
    exact_flow,
    float64,
    flow,
    linear,
    noise,
    remembered,
    sigmoid,
)

from ldm.diffusion import samplers, schedules

DRAWS = {
    "ddpm": lambda *a: samplers.ddpm(*a, seed=1),
    "ddim": lambda *a: samplers.ddim(*a),
    "ddim_eta_1": lambda *a: samplers.ddim(*a, eta=1.0, seed=1),
    "dpm_solver_pp": lambda *a: samplers.dpm_solver_pp(*a),
    "euler": lambda *a: samplers.euler(*a),
    "heun": lambda *a: samplers.heun(*a),
}
# a flow is so by itself
FROM_1 = [spacing for spacing in samplers.SPACINGS if spacing != "leading"]  # grids that begin at t = 1
ZERO_SNR = {name: remembered(schedules.zero_terminal_snr(SCHEDULES[name])) for name in ("linear", "cosine", "flow")}
every_sampler = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


# ---- the exact answer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        # of scaled_linear, which takes three times the steps, ddpm, euler and heun only with the slow tests
        pytest.param(name, schedule, id=f"{name}-{called}", marks=pytest.mark.slow if costly else ())
        for name in samplers.SAMPLERS
        for called, schedule in SCHEDULES.items()
        for costly in [called == "scaled_linear" and name not in ("ddim", "dpm_solver_pp")]
    ],
)
def test_samples_have_the_mean_and_deviation_of_the_data(name, schedule):
    """The classic mistake, alpha_t where alpha_bar belongs, shrinks the deviation."""
    x_T = noise(20, 1000)
    alpha, sigma = float64(schedule, 1.0)  # the process ends here, in scaled_linear short of pure noise
    x_T = alpha * MU + np.hypot(alpha * S, sigma) * (x_T - x_T.mean()) / x_T.std()
    # The posterior variance is low by O(1 / steps). Rows with seeds of their own get NumPy's noise, which is cheaper.
    steps, options = (800, {"seed": [(1, row) for row in range(20)]}) if name == "ddpm" else (300, {})
    steps *= 3 if schedule is SCHEDULES["scaled_linear"] else 1  # whose first beta is eight times as large
    *_, (x_t, _) = samplers.SAMPLERS[name](exact_denoiser(schedule), x_T, schedule, steps, **options)
    assert abs(np.mean(x_t) - MU) < 0.02 * S
    assert abs(np.std(x_t) / S - 1.0) < 0.02


def error_at(draw, schedule, steps, t):
    """Largest distance to the exact solution at time t, in float64."""
    x_T = np.linspace(-2.0, 2.0, 9)[:, None]
    states = [x_t for x_t, _ in draw(exact_denoiser(schedule), x_T, schedule, steps)]
    x_t = states[round((1.0 - t) * steps) - 1]
    assert x_t.dtype == np.float64
    return np.abs(x_t - exact_flow(schedule, x_T, t)).max()


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpm_solver_pp", 2)])
@pytest.mark.parametrize("t", [0.25, 0.0])
@pytest.mark.parametrize(
    "schedule", [linear, ZERO_SNR["linear"], ZERO_SNR["cosine"]], ids=["linear_as_is", "linear", "cosine"]
)
def test_error_falls_with_the_order_of_the_method(name, order, schedule, t):
    steps = np.array([16, 32, 64]) if t == 0.0 else np.array([32, 64, 128])
    errors = [error_at(DRAWS[name], schedule, n, t) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope > order - 0.2, (slope, errors)
    if t > 0.0:  # at 0 the first-order last step may cancel others' errors, and the sum falls faster
        assert slope < order + 0.4, (slope, errors)


@pytest.mark.parametrize("schedule", [linear, *ZERO_SNR.values()], ids=["linear_as_is", *ZERO_SNR])
def test_error_of_heun_falls_with_the_square_of_the_calls(schedule):
    """Where `steps` is odd all intervals up to t = 1/4 are of second order; where it is even the first is not."""
    x_T = np.linspace(-2.0, 2.0, 9)[:, None]
    intervals = np.array([16, 32, 48])
    for odd in (1, 0):
        errors = []
        for n in intervals:
            *states, _ = samplers.heun(exact_denoiser(schedule), x_T, schedule, 2 * n - 2 + odd)
            x_t = states[3 * n // 2 - 2 + odd][0]  # after 3 n / 4 of n intervals
            errors.append(np.abs(x_t - exact_flow(schedule, x_T, 0.25)).max())
        slope = -np.polyfit(np.log(intervals), np.log(errors), 1)[0]
        assert 1.8 < slope < 2.4, (slope, errors)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpm_solver_pp", 2)])
@pytest.mark.parametrize("schedule", [sigmoid, flow], ids=["sigmoid", "flow"])
def test_karras_spacing_keeps_the_order_to_the_very_end(name, order, schedule):
    """Evenly spaced times do not where sigma starts like the root of t: the last step is then too long."""
    x_T, calls, errors = np.linspace(-2.0, 2.0, 9)[:, None], np.array([25, 49, 97]), []
    for steps in calls:
        *_, (x_t, _) = samplers.SAMPLERS[name](exact_denoiser(schedule), x_T, schedule, steps, spacing="karras")
        errors.append(np.abs(x_t - exact_flow(schedule, x_T, 0.0)).max())
    slope = -np.polyfit(np.log(calls), np.log(errors), 1)[0]
    assert order - 0.2 < slope < order + 0.4, (slope, errors)


def test_second_order_needs_fewer_calls_than_first():
    assert error_at(DRAWS["dpm_solver_pp"], cosine, 20, 0.0) < error_at(DRAWS["ddim"], cosine, 80, 0.0)


def test_one_data_point_is_reached_exactly_in_one_step():
    for draw in DRAWS.values():
        ((x_t, x_0),) = draw(lambda x_t, t: np.full_like(x_t, 0.7), noise(4, 2), cosine, 1)
        np.testing.assert_allclose(x_t, 0.7, atol=1e-6)
        np.testing.assert_allclose(x_0, 0.7, atol=1e-6)


@pytest.mark.parametrize("spacing", FROM_1)
@pytest.mark.parametrize("name", samplers.SAMPLERS)
@pytest.mark.parametrize("schedule", ZERO_SNR.values(), ids=ZERO_SNR)
def test_first_step_from_pure_noise_is_the_definition(schedule, name, spacing, recwarn):
    """At alpha = 0 eps is x_T itself, so x_s = alpha_s x_0 + sigma_s x_T; ancestral sampling draws another eps."""
    x_T, options = noise(50_000, 1), {"spacing": spacing}
    states = list(samplers.SAMPLERS[name](exact_denoiser(schedule), x_T, schedule, 4, **options))
    alpha_s, sigma_s = float64(schedule, grid_of(name, 4, spacing, schedule)[1])
    x_s, x_0 = states[0]
    np.testing.assert_allclose(x_0, MU, atol=1e-6)
    if name == "ddpm":
        assert abs(np.mean(x_s) - alpha_s * MU) < 0.02 and abs(np.std(x_s) / sigma_s - 1.0) < 0.02
        assert abs(np.corrcoef(x_s[:, 0], x_T[:, 0])[0, 1]) < 0.02
    else:
        np.testing.assert_allclose(x_s, alpha_s * MU + sigma_s * x_T, atol=1e-5)
    assert np.all(np.isfinite(states))
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]  # log(0), 0 * inf


# ---- spacings --------------------------------------------------------------------------------------------------------


def grid_of(name, steps, spacing, schedule):
    """Heun has fewer intervals than calls."""
    return samplers.time_grid(steps // 2 + 1 if name == "heun" else steps, spacing, schedule)


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("spacing", samplers.SPACINGS)
@pytest.mark.parametrize("schedule", [sigmoid, *ZERO_SNR.values()], ids=["sigmoid_as_is", *ZERO_SNR])
def test_every_grid_falls_from_1_to_0(schedule, spacing, steps):
    times = samplers.time_grid(steps, spacing, schedule)
    assert times.dtype == np.float32 and times.shape == (steps + 1,)
    assert (times[0] == 1.0) == (spacing != "leading" or steps == 1000)
    assert times[0] <= 1.0 and times[-1] == 0.0 and np.all(np.diff(times) < 0.0)


def test_leading_times_are_those_of_ddim():
    """Every (T // S)-th entry of the table of T = 1000, from its first one on; diffusers' steps_offset is 1 here."""
    times = samplers.time_grid(50, "leading")
    np.testing.assert_allclose(times[[0, 1, -3, -2, -1]], [0.981, 0.961, 0.021, 0.001, 0.0], atol=1e-7)
    np.testing.assert_allclose(samplers.time_grid(7, "leading")[:-1] * 1000, 1 + 142 * np.arange(7)[::-1], atol=1e-3)


def test_trailing_times_are_those_of_the_paper():
    """arXiv 2305.08891, section 3.3: round(flip(arange(T, 0, -T / S))) of a chain of T = 1000, its last entry included;
    where S divides T these are evenly spaced."""
    for steps in (7, 25, 30, 999):
        expected = np.round(1000 - np.arange(steps) * 1000 / steps) / 1000
        np.testing.assert_allclose(samplers.time_grid(steps, "trailing")[:-1], expected, atol=1e-7)
    np.testing.assert_allclose(samplers.time_grid(25, "trailing"), samplers.time_grid(25), atol=1e-7)
    assert np.abs(samplers.time_grid(30, "trailing") - samplers.time_grid(30)).max() > 1e-4


@pytest.mark.parametrize("schedule", [linear, *ZERO_SNR.values()], ids=["linear_as_is", *ZERO_SNR])
def test_karras_levels_are_those_of_the_paper(schedule):
    """arXiv 2206.00364, eq. 5, with rho = 7 and sigma from 80 to 0.002; but the first time is 1."""
    steps = 12
    alpha, sigma = float64(schedule, samplers.time_grid(steps, "karras", schedule))
    i = np.arange(1, steps)
    expected = (80 ** (1 / 7) + i / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(sigma[1:-1] / alpha[1:-1], expected, rtol=0.01)  # float32 has few digits for small sigma


def test_karras_spacing_of_a_process_that_ends_below_80_starts_at_its_end():
    def short(t):  # sigma / alpha is 0.75 at t = 1
        return flow(np.float32(t) * np.float32(3 / 7))

    alpha, sigma = float64(short, samplers.time_grid(12, "karras", short))
    roots = (sigma / alpha)[:-1] ** (1 / 7)
    np.testing.assert_allclose(np.diff(roots), np.diff(roots).mean(), rtol=1e-3)
    np.testing.assert_allclose(roots[[0, -1]] ** 7, [0.75, 0.002], rtol=1e-3)


@every_sampler
def test_unknown_spacing_is_refused(draw):
    name = next(name for name, other in DRAWS.items() if other is draw).removesuffix("_eta_1")
    with pytest.raises(ValueError, match="spacing must be one of"):
        list(samplers.SAMPLERS[name](None, noise(2, 2), cosine, 3, spacing="lagging"))
    with pytest.raises(ValueError, match="at most 1000 steps"):
        list(samplers.SAMPLERS[name](None, noise(2, 2), cosine, 2002, spacing="trailing"))


# ---- flows -----------------------------------------------------------------------------------------------------------


def velocity(x_t, t):
    """dx / dt = eps - x_0 of a rectified flow, as the exact denoiser of the Gaussian sees it."""
    x_0 = exact_denoiser(flow)(x_t, np.float32([t]))
    return (x_t - x_0) / np.float32(t)


@pytest.mark.parametrize("spacing", ["uniform", "karras"])
def test_euler_in_a_flow_is_eulers_method(spacing):
    x_t = np.linspace(-2.0, 2.0, 9)[:, None]
    states = samplers.euler(exact_denoiser(flow), x_t, flow, 10, spacing=spacing)
    times = samplers.time_grid(10, spacing, flow).astype("float64")
    for (found, _), t, s in zip(states, times[:-1], times[1:], strict=True):
        x_t = x_t + (s - t) * velocity(x_t, t)
        np.testing.assert_allclose(found, x_t, atol=1e-6)


@pytest.mark.parametrize("steps", [5, 6])
def test_heun_in_a_flow_is_heuns_method(steps):
    x_t, found = np.linspace(-2.0, 2.0, 9)[:, None], []
    times = np.linspace(1.0, 0.0, steps // 2 + 2)
    for i, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        first = velocity(x_t, t)
        found.append(x_t + (s - t) * first)
        if s == 0.0 or (i == 0 and steps == 6):
            x_t = found[-1]
        else:
            x_t = x_t + (s - t) * (first + velocity(found[-1], s)) / 2
            found.append(x_t)
    states = samplers.heun(exact_denoiser(flow), np.linspace(-2.0, 2.0, 9)[:, None], flow, steps)
    np.testing.assert_allclose([x_t for x_t, _ in states], found, atol=1e-6)


@pytest.mark.parametrize("schedule", [linear, cosine], ids=["linear", "cosine"])
def test_ddim_is_eulers_method_in_sigma_over_alpha(schedule):
    """dx = eps dsigma for x = x_t / alpha (arXiv 2206.00364, eq. 1): the probability-flow ODE."""
    x_T, denoise = np.linspace(-2.0, 2.0, 9)[:, None], exact_denoiser(schedule)
    alpha, sigma = float64(schedule, samplers.time_grid(10))
    level = sigma / alpha
    for name in ("ddim", "euler"):
        x = x_T / alpha[0]
        for i, (found, _) in enumerate(samplers.SAMPLERS[name](denoise, x_T, schedule, 10)):
            x_0 = denoise(alpha[i] * x, samplers.time_grid(10)[i : i + 1])
            x = x + (level[i + 1] - level[i]) * (x - x_0) / level[i]
            np.testing.assert_allclose(found, alpha[i + 1] * x, atol=1e-6)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpm_solver_pp"])
def test_a_flow_is_ddim_where_they_meet(name):
    """On one grid of sigma / alpha, states differ by their scale alone: the Karras grid is the same for all."""
    x_T, ends = np.linspace(-2.0, 2.0, 9)[:, None], []
    for schedule in ZERO_SNR.values():
        states = samplers.SAMPLERS[name](exact_denoiser(schedule), x_T, schedule, 11, spacing="karras")
        ends.append([x_0 for _, x_0 in states])
    np.testing.assert_allclose(ends[0], ends[2], atol=5e-4)  # float32 has few digits for small sigma
    np.testing.assert_allclose(ends[1], ends[2], atol=5e-4)

    def turning(t):  # the ratio of the flow at every t, and alpha^2 + sigma^2 = 1
        alpha, sigma = (np.asarray(value) for value in flow(t))
        return alpha / np.hypot(alpha, sigma), sigma / np.hypot(alpha, sigma)

    pairs = [samplers.SAMPLERS[name](exact_denoiser(s), x_T, s, 11) for s in (turning, flow)]
    for i, ((x_a, _), (x_b, _)) in enumerate(zip(*pairs, strict=True)):
        if name != "heun":
            alpha, sigma = float64(flow, 1.0 - (i + 1) / 11)
            np.testing.assert_allclose(x_a * np.hypot(alpha, sigma), x_b, atol=1e-6)
    np.testing.assert_allclose(x_a, x_b, atol=1e-6)


# ---- brightness ------------------------------------------------------------------------------------------------------

DARK, BRIGHT, SHARE = -0.9, 0.3, 0.3  # of dark pictures


def mixture_denoiser(schedule):
    """The exact denoiser of constant pictures, dark or bright: x_0 is their mean under the posterior of the two."""

    def denoise(x_t, t):
        alpha, sigma = float64(schedule, np.asarray(t)[0])
        x_t = np.asarray(x_t, "float64")
        middle = (x_t - alpha * (DARK + BRIGHT) / 2).sum(axis=1, keepdims=True)
        log_odds = np.log((1 - SHARE) / SHARE) + alpha * (BRIGHT - DARK) * middle / sigma**2
        bright = 1.0 / (1.0 + np.exp(-np.clip(log_odds, -500, 500)))
        return np.broadcast_to(DARK + (BRIGHT - DARK) * bright, x_t.shape)

    return denoise


def share_of_dark(schedule, name, steps):
    x_T = np.random.default_rng(7).normal(size=(1500, 64))  # pictures of 8 x 8
    *_, (x_t, _) = samplers.SAMPLERS[name](mixture_denoiser(schedule), x_T, schedule, steps)
    brightness = np.mean(x_t, axis=1)
    nearest = np.where(np.abs(brightness - DARK) < np.abs(brightness - BRIGHT), DARK, BRIGHT)
    assert np.mean(np.abs(brightness - nearest) < 0.05) > 0.97  # the rest has not made up its mind
    return np.mean(nearest == DARK)


@pytest.mark.parametrize("last", [200, 500])
def test_signal_at_time_1_collapses_the_brightness_and_zero_terminal_snr_mends_it(last):
    """T = 200 or 500 with the betas of T = 1000: noise, as bright as 0 on average, passes for noise on bright pictures.

    With 64 pixels the brightness of the noise is known to 1/8, and alpha(1) is 0.81 or 0.28.
    """

    cut = remembered(lambda t: linear(np.float32(t) * np.float32(last / 1000)))
    mended = remembered(schedules.zero_terminal_snr(cut))
    assert share_of_dark(cut, "ddim", 100) < (0.03 if last == 200 else 0.25)
    for name in ("ddim", "ddpm", "dpm_solver_pp", "heun"):
        found = share_of_dark(mended, name, 75)
        assert abs(found - SHARE) < 0.03, (name, found)


def test_a_flow_draws_both_brightnesses_in_their_shares():
    assert abs(share_of_dark(flow, "euler", 100) - SHARE) < 0.03


# ---- DDPM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 500, 900])
def test_a_ddpm_step_has_the_moments_of_the_paper(number):
    """arXiv 2006.11239, eq. 6 and 7, from the table of betas: the chain of 1000 steps, at i = 1000 - number."""
    beta = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1.0 - beta)
    i = 999 - number
    clean, start = 0.3, 0.8
    mean = (np.sqrt(alpha_bar[i - 1]) * beta[i] * clean + np.sqrt(1.0 - beta[i]) * (1.0 - alpha_bar[i - 1]) * start) / (
        1.0 - alpha_bar[i]
    )
    variance = (1.0 - alpha_bar[i - 1]) / (1.0 - alpha_bar[i]) * beta[i]
    t, s = 1.0 - number / 1000, 1.0 - (number + 1) / 1000
    times = np.array([t, s], "float32")

    x_t = np.full((100_000, 1), start, "float32")
    for draw in (samplers.ddpm, lambda *a, **k: samplers.ddim(*a, eta=1.0, **k)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(samplers, "time_grid", lambda *_: times)
            x_s, _ = next(draw(lambda x_t, t: np.full_like(x_t, clean), x_t, linear, 1, seed=3))
        np.testing.assert_allclose(np.std(x_s), np.sqrt(variance), rtol=0.01)
        np.testing.assert_allclose(np.mean(x_s), mean, atol=5.0 * np.sqrt(variance / 1e5) + 2e-5)


def test_a_long_ddpm_step_has_the_smaller_variance():
    """From t = 0.6 to 0.3 the two choices of section 3.2 differ by a third; in the chain of 1000 they hardly do."""
    x_t = np.full((100_000, 1), 0.8, "float32")
    x_s, _ = next(samplers.ddpm(lambda x_t, t: np.full_like(x_t, 0.3), x_t, cosine, 2, seed=3, start=0.6))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (float64(cosine, t) for t in (0.6, 0.3))
    step = 1.0 - (alpha_t / alpha_s) ** 2  # variance of x_t given x_s
    precision = 1.0 / sigma_s**2 + (alpha_t / alpha_s) ** 2 / step  # Bayes: x_s given x_0, and x_t given x_s
    mean = (alpha_s * 0.3 / sigma_s**2 + (alpha_t / alpha_s) * 0.8 / step) / precision
    np.testing.assert_allclose(np.std(x_s), precision**-0.5, rtol=0.01)
    np.testing.assert_allclose(np.mean(x_s), mean, atol=0.01)
    assert precision**-0.5 < 0.75 * step**0.5  # the larger one


@pytest.mark.parametrize("schedule", [linear, cosine], ids=["linear", "cosine"])
def test_ddim_with_eta_1_is_ddpm(schedule):
    """Same coefficients and, with the same seed, the same noise: the same states, step by step."""
    arguments = (exact_denoiser(schedule), noise(8, 3), schedule, 12)
    ancestral, implicit = samplers.ddpm(*arguments, seed=5), samplers.ddim(*arguments, eta=1.0, seed=5)
    for (x_a, _), (x_b, _) in zip(ancestral, implicit, strict=True):
        np.testing.assert_allclose(x_a, x_b, atol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.9])
def test_eta_is_the_share_of_ddpms_deviation_that_ddim_adds(eta):
    """arXiv 2010.02502, eq. 16; the rest of sigma_s goes along eps, which is x_t / sigma_t where x_0 = 0."""
    x_t = np.full((1, 4000), 0.8, "float32")
    (_, sigma_t), (_, sigma_s) = (float64(cosine, t) for t in samplers.time_grid(2)[:2])
    steps = [
        np.asarray(next(draw(lambda x_t, t: np.zeros_like(x_t), x_t, cosine, 2, seed=[4]))[0], "float64")
        for draw in (samplers.ddpm, lambda *a, **k: samplers.ddim(*a, eta=eta, **k))
    ]
    ancestral, implicit = (step - step.mean() for step in steps)  # the noise alone, the same for both
    np.testing.assert_allclose(implicit, eta * ancestral, atol=1e-6)
    z = np.random.default_rng(4).standard_normal(4000, "float32")
    added = eta * ancestral.std() / z.std()
    expected = np.sqrt(sigma_s**2 - added**2) / sigma_t * 0.8 + added * z.mean()
    np.testing.assert_allclose(steps[1].mean(), expected, rtol=1e-4)


def test_the_first_step_of_the_second_order_solver_is_ddim():
    arguments = (exact_denoiser(cosine), noise(8, 3), cosine, 5)
    np.testing.assert_allclose(
        next(samplers.dpm_solver_pp(*arguments))[0], next(samplers.ddim(*arguments))[0], atol=1e-5
    )


# ---- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7])
@every_sampler
def test_network_is_called_once_per_step_with_float32_times_that_fall_from_1(draw, steps):
    calls, exact = [], exact_denoiser(cosine)

    def denoise(x_t, t):
        calls.append(t)
        assert tuple(x_t.shape) == (3, 2, 2, 1)
        return exact(x_t, t)

    states = list(draw(denoise, noise(3, 2, 2, 1), cosine, steps))
    assert len(states) == len(calls) == steps
    for t in calls:
        assert t.shape == (3,) and t.dtype == tf.float32 and len(set(t.numpy())) == 1
    times = [float(t[0]) for t in calls]
    assert times[0] == 1.0 and min(times) > 0.0 and times == sorted(times, reverse=True)
    again = (steps - 1) // 2 if draw is DRAWS["heun"] else 0  # a second look at the time that a step has reached
    assert len(set(times)) == steps - again


@every_sampler
def test_film_ends_at_the_last_x_0(draw):
    *_, (x_t, x_0) = draw(exact_denoiser(cosine), noise(5, 3), cosine, 6)
    np.testing.assert_array_equal(x_t, x_0)


@every_sampler
def test_x_0_of_each_step_is_what_the_network_saw(draw):
    seen, exact = [], exact_denoiser(linear)

    def denoise(x_t, t):
        seen.append(exact(x_t, t))
        return seen[-1]

    for (_, x_0), expected in zip(draw(denoise, noise(4, 2), linear, 5), seen, strict=False):
        np.testing.assert_array_equal(x_0, expected)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_seed_decides_the_noise(name):
    def run(seed):
        more = {"eta": 1.0} if name == "ddim" else {}
        states = samplers.SAMPLERS[name](exact_denoiser(cosine), noise(4, 2), cosine, 4, seed=seed, **more)
        return np.asarray([x_t for x_t, _ in states])

    assert run(1).tobytes() == run(1).tobytes()
    assert np.abs(run(1)[0] - run(2)[0]).max() > 1e-3


@pytest.mark.parametrize("seed", [3, [(3, row) for row in range(8)]], ids=["one seed", "a seed for each row"])
def test_every_step_adds_standard_normal_noise_of_its_own_to_every_row(seed):
    """Once the mean of q(x_s | x_t, x_0 = 0) is taken away and its deviation divided out."""
    x_t, added = noise(8, 4000), []
    alpha, sigma = float64(cosine, samplers.time_grid(4))
    states = list(samplers.ddpm(lambda x_t, t: np.zeros_like(x_t), x_t, cosine, 4, seed=seed))
    for i, (x_s, _) in enumerate(states[:-1]):
        step = alpha[i] / alpha[i + 1]
        variance = sigma[i] ** 2 - step**2 * sigma[i + 1] ** 2  # of x_t given x_s
        mean = step * sigma[i + 1] ** 2 / sigma[i] ** 2 * x_t
        added.append((np.asarray(x_s) - mean) / (sigma[i + 1] / sigma[i] * np.sqrt(variance)))
        x_t = np.asarray(x_s)
    rows = np.reshape(added, (24, 4000))
    np.testing.assert_allclose(rows.std(axis=1), 1.0, atol=0.05)
    assert np.abs(np.corrcoef(rows) - np.eye(24)).max() < 0.08


def test_first_noise_belongs_to_a_seed_and_a_slice_and_stays_the_same_from_version_to_version():
    found = {pair: samplers.initial_noise(*pair, (40, 50)) for pair in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0))}
    for (seed, i), x_T in found.items():
        assert x_T.shape == (40, 50) and x_T.dtype == np.float32
        np.testing.assert_array_equal(x_T, np.random.default_rng([seed, i]).standard_normal((40, 50), "float32"))
    assert np.abs(np.corrcoef([x_T.ravel() for x_T in found.values()]) - np.eye(5)).max() < 0.1


def test_a_sampler_says_what_it_takes():
    times = {"spacing", "start"}
    assert {name: sampler.takes for name, sampler in samplers.SAMPLERS.items()} == {
        "ddpm": {"seed", *times},
        "ddim": {"eta", "seed", *times},
        **dict.fromkeys(("dpm_solver_pp", "euler", "heun"), times),
    }
    assert samplers.INPAINT.takes == {"known", "mask", "resample", "seed"}


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_the_usual_number_of_calls_is_enough(name):
    """The deviation of the data within 5 %; and no call of Heun's is wasted on a first step of first order."""
    x_T = noise(20, 1000)
    x_T = (x_T - x_T.mean()) / x_T.std()
    options = {"seed": [(1, row) for row in range(20)]} if name == "ddpm" else {}
    steps = samplers.SAMPLERS[name].calls
    *_, (x_t, _) = samplers.SAMPLERS[name](exact_denoiser(cosine), x_T, cosine, steps, **options)
    assert abs(np.std(x_t) / S - 1.0) < 0.05
    assert name != "heun" or steps % 2 == 1


def test_deterministic_samplers_add_no_noise():
    for name in ("ddim", "dpm_solver_pp", "euler", "heun"):
        arguments = (exact_denoiser(cosine), noise(4, 2), cosine, 4)
        for (first, _), (second, _) in zip(DRAWS[name](*arguments), DRAWS[name](*arguments), strict=True):
            np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("steps", [0, -3])
@every_sampler
def test_fewer_than_one_step_is_refused(draw, steps):
    with pytest.raises(ValueError, match="at least 1 step"):
        list(draw(exact_denoiser(cosine), noise(2, 2), cosine, steps))


@every_sampler
def test_nothing_is_clipped(draw):
    """Latents have no bounds; clipping x_t, in pixels too, biases every later step."""
    x_T = noise(2000, 1)
    states = list(draw(exact_denoiser(cosine, mu=5.0, s=2.0), x_T, cosine, 50))
    assert np.max(states[-1][0]) > 8.0
    assert max(np.max(x_t) for x_t, _ in states[:5]) > 2.5


@every_sampler
def test_sampler_needs_only_a_callable_and_runs_on_tensors(draw):
    x_T = tf.constant(noise(2, 4, 4, 3))
    denoise = tf.function(lambda x_t, t: 0.5 * x_t * (1.0 - t)[:, None, None, None])
    *_, (x_t, _) = draw(denoise, x_T, sigmoid, 3)
    assert x_t.shape == x_T.shape and x_t.dtype == tf.float32
    assert np.all(np.isfinite(x_t))


@pytest.mark.parametrize("draw", [samplers.ddpm, lambda *told, **more: samplers.ddim(*told, eta=1.0, **more)])
def test_a_row_with_a_seed_of_its_own_gets_the_same_noise_whatever_stands_beside_it(draw):
    x_T = np.tile(noise(1, 3), (4, 1))

    def ends(rows, seed):
        *_, (x_t, _), _ = draw(lambda x_t, t: 0.5 * x_t, x_T[:rows], cosine, 5, seed=seed)
        return np.asarray(x_t)

    apart = ends(4, [(7, i) for i in range(4)])
    assert len(np.unique(apart[:, 0])) == 4
    np.testing.assert_array_equal(ends(2, [(7, 0), (7, 1)]), apart[:2])
    np.testing.assert_array_equal(ends(1, [(7, 3)]), apart[3:])
    shared = ends(4, [5] * 4)
    np.testing.assert_array_equal(shared[1:], shared[:-1])


def gaussian(mean, std):
    """The exact denoiser of N(mean, std^2) under the cosine schedule."""

    def denoise(x_t, t):
        alpha, sigma = float64(cosine, np.asarray(t)[0])
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)

    return denoise


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_start_in_the_middle_ends_where_the_data_is(name):
    """From q(x_t) of N(2, 0.5^2) at t = 0.6 every sampler comes back to N(2, 0.5^2)."""
    rng = np.random.default_rng(0)
    alpha, sigma = (float(v) for v in cosine(0.6))
    x_t = (alpha * (2.0 + 0.5 * rng.normal(size=40_000)) + sigma * rng.normal(size=40_000)).astype("float32")[:, None]
    options = {"seed": 1} if name in ("ddpm", "ddim") else {}
    *_, (end, _) = samplers.SAMPLERS[name](gaussian(2.0, 0.5), x_t, cosine, 61, start=0.6, **options)
    np.testing.assert_allclose(np.mean(end), 2.0, atol=0.01)
    np.testing.assert_allclose(np.std(end), 0.5, rtol=0.05)


def test_a_start_must_go_with_the_spacing():
    np.testing.assert_allclose(samplers.time_grid(3, start=0.6), [0.6, 0.4, 0.2, 0.0], atol=1e-6)
    for start, spacing in ((0.0, "uniform"), (1.2, "uniform"), (0.5, "karras"), (0.5, "trailing")):
        with pytest.raises(ValueError, match="start must be"):
            samplers.time_grid(3, spacing, cosine, start)
