"""ldm/samplers.py against the exact denoiser of a Gaussian, for which every sampler's answer is known.

For data N(mu, s^2) the best x_0 given x_t is mu + alpha s^2 (x_t - alpha mu) / (alpha^2 s^2 + sigma^2), and the
probability-flow ODE has the solution x_t = alpha mu + sqrt(alpha^2 s^2 + sigma^2) n with a constant n.
"""

import numpy as np
import pytest
import tensorflow as tf

from ldm import samplers, schedules

MU, S = 0.4, 0.3

DRAWS = {
    "ddpm": lambda *a: samplers.ddpm(*a, seed=1),
    "ddim": lambda *a: samplers.ddim(*a),
    "ddim_eta_1": lambda *a: samplers.ddim(*a, eta=1.0, seed=1),
    "dpm_solver_pp": lambda *a: samplers.dpm_solver_pp(*a),
}
every_sampler = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)


def float64(schedule, t):
    return tuple(np.asarray(value, "float64") for value in schedule(np.float32(t)))


def exact_denoiser(schedule, mu=MU, s=S):
    def denoise(x_t, t):
        alpha, sigma = float64(schedule, t[0])  # samplers give all rows the same time
        x_0 = mu + alpha * s**2 * (np.asarray(x_t, "float64") - alpha * mu) / (alpha**2 * s**2 + sigma**2)
        return x_0.astype(np.asarray(x_t).dtype)

    return denoise


def exact_flow(schedule, x_T, t, mu=MU, s=S):
    alpha_T, sigma_T = float64(schedule, 1.0)
    alpha, sigma = float64(schedule, t)
    n = (x_T - alpha_T * mu) / np.sqrt(alpha_T**2 * s**2 + sigma_T**2)
    return alpha * mu + np.sqrt(alpha**2 * s**2 + sigma**2) * n


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


# ---- the exact answer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", schedules.SCHEDULES.values(), ids=schedules.SCHEDULES)
@pytest.mark.parametrize("draw", [DRAWS[name] for name in ("ddpm", "ddim", "dpm_solver_pp")], ids=samplers.SAMPLERS)
def test_samples_have_the_mean_and_deviation_of_the_data(draw, schedule):
    """The classic mistake, alpha_t where alpha_bar belongs, shrinks the deviation."""
    x_T = noise(20_000, 1)
    x_T = (x_T - x_T.mean()) / x_T.std()
    steps = (
        800 if draw is DRAWS["ddpm"] and schedule is schedules.linear else 300
    )  # the posterior variance is low by O(1 / steps)
    *_, (x_t, _) = draw(exact_denoiser(schedule), x_T, schedule, steps)
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
@pytest.mark.parametrize("schedule", [schedules.linear, schedules.cosine], ids=["linear", "cosine"])
def test_error_falls_with_the_order_of_the_method(name, order, schedule, t):
    steps = np.array([16, 32, 64]) if t == 0.0 else np.array([32, 64, 128])
    errors = [error_at(DRAWS[name], schedule, n, t) for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope > order - 0.2, (slope, errors)
    if t > 0.0:  # at 0 the first-order last step may cancel others' errors, and the sum falls faster
        assert slope < order + 0.4, (slope, errors)


def test_second_order_needs_fewer_calls_than_first():
    assert error_at(DRAWS["dpm_solver_pp"], schedules.cosine, 20, 0.0) < error_at(
        DRAWS["ddim"], schedules.cosine, 80, 0.0
    )


def test_one_data_point_is_reached_exactly_in_one_step():
    for draw in DRAWS.values():
        ((x_t, x_0),) = draw(lambda x_t, t: np.full_like(x_t, 0.7), noise(4, 2), schedules.cosine, 1)
        np.testing.assert_allclose(x_t, 0.7, atol=1e-6)
        np.testing.assert_allclose(x_0, 0.7, atol=1e-6)


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
            patch.setattr(samplers, "time_grid", lambda steps: times)
            x_s, _ = next(draw(lambda x_t, t: np.full_like(x_t, clean), x_t, schedules.linear, 1, seed=3))
        np.testing.assert_allclose(np.std(x_s), np.sqrt(variance), rtol=0.01)
        np.testing.assert_allclose(np.mean(x_s), mean, atol=5.0 * np.sqrt(variance / 1e5) + 2e-5)


@pytest.mark.parametrize("schedule", [schedules.linear, schedules.cosine], ids=["linear", "cosine"])
def test_ddim_with_eta_1_is_ddpm(schedule):
    """Same coefficients and, with the same seed, the same noise: the same states, step by step."""
    arguments = (exact_denoiser(schedule), noise(8, 3), schedule, 12)
    ancestral, implicit = samplers.ddpm(*arguments, seed=5), samplers.ddim(*arguments, eta=1.0, seed=5)
    for (x_a, _), (x_b, _) in zip(ancestral, implicit, strict=True):
        np.testing.assert_allclose(x_a, x_b, atol=2e-5)


def test_the_first_step_of_the_second_order_solver_is_ddim():
    arguments = (exact_denoiser(schedules.cosine), noise(8, 3), schedules.cosine, 5)
    np.testing.assert_allclose(
        next(samplers.dpm_solver_pp(*arguments))[0], next(samplers.ddim(*arguments))[0], atol=1e-5
    )


# ---- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7])
@every_sampler
def test_network_is_called_once_per_step_with_float32_times_that_fall_from_1(draw, steps):
    calls, exact = [], exact_denoiser(schedules.cosine)

    def denoise(x_t, t):
        calls.append(t)
        assert tuple(x_t.shape) == (3, 2, 2, 1)
        return exact(x_t, t)

    states = list(draw(denoise, noise(3, 2, 2, 1), schedules.cosine, steps))
    assert len(states) == len(calls) == steps
    for t in calls:
        assert t.shape == (3,) and t.dtype == tf.float32 and len(set(t.numpy())) == 1
    times = [float(t[0]) for t in calls]
    assert times[0] == 1.0 and min(times) > 0.0 and times == sorted(set(times), reverse=True)


@every_sampler
def test_film_ends_at_the_last_x_0(draw):
    *_, (x_t, x_0) = draw(exact_denoiser(schedules.cosine), noise(5, 3), schedules.cosine, 6)
    np.testing.assert_array_equal(x_t, x_0)


@every_sampler
def test_x_0_of_each_step_is_what_the_network_saw(draw):
    seen, exact = [], exact_denoiser(schedules.linear)

    def denoise(x_t, t):
        seen.append(exact(x_t, t))
        return seen[-1]

    for (_, x_0), expected in zip(draw(denoise, noise(4, 2), schedules.linear, 5), seen, strict=False):
        np.testing.assert_array_equal(x_0, expected)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_seed_decides_the_noise(name):
    def run(seed):
        more = {"eta": 1.0} if name == "ddim" else {}
        states = samplers.SAMPLERS[name](
            exact_denoiser(schedules.cosine), noise(4, 2), schedules.cosine, 4, seed=seed, **more
        )
        return np.asarray([x_t for x_t, _ in states])

    assert run(1).tobytes() == run(1).tobytes()
    assert np.abs(run(1)[0] - run(2)[0]).max() > 1e-3


def test_deterministic_samplers_add_no_noise():
    for name in ("ddim", "dpm_solver_pp"):
        arguments = (exact_denoiser(schedules.cosine), noise(4, 2), schedules.cosine, 4)
        for (first, _), (second, _) in zip(DRAWS[name](*arguments), DRAWS[name](*arguments), strict=True):
            np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("steps", [0, -3])
@every_sampler
def test_fewer_than_one_step_is_refused(draw, steps):
    with pytest.raises(ValueError, match="at least 1 step"):
        list(draw(exact_denoiser(schedules.cosine), noise(2, 2), schedules.cosine, steps))


@every_sampler
def test_nothing_is_clipped(draw):
    """Latents have no bounds; clipping x_t, in pixels too, biases every later step."""
    x_T = noise(2000, 1)
    states = list(draw(exact_denoiser(schedules.cosine, mu=5.0, s=2.0), x_T, schedules.cosine, 50))
    assert np.max(states[-1][0]) > 8.0
    assert max(np.max(x_t) for x_t, _ in states[:5]) > 2.5


@every_sampler
def test_sampler_needs_only_a_callable_and_runs_on_tensors(draw):
    x_T = tf.constant(noise(2, 4, 4, 3))
    denoise = tf.function(lambda x_t, t: 0.5 * x_t * (1.0 - t)[:, None, None, None])
    *_, (x_t, _) = draw(denoise, x_T, schedules.sigmoid, 3)
    assert x_t.shape == x_T.shape and x_t.dtype == tf.float32
    assert np.all(np.isfinite(x_t))
