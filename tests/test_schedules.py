"""ldm/diffusion/schedules.py: invariants, the papers' formulas in float64, and exact round trips."""

import numpy as np
import pytest
import tensorflow as tf

from ldm.diffusion import schedules

GRID = np.linspace(0.0, 1.0, 2001, dtype="float32")
CURVED = {name: schedule for name, schedule in schedules.SCHEDULES.items() if name != "flow"}
RESCALED = {f"{name}_zero_snr": schedules.zero_terminal_snr(schedule) for name, schedule in CURVED.items()}
PRESERVING = {**CURVED, **RESCALED}  # alpha^2 + sigma^2 = 1
ALL = {**PRESERVING, "flow": schedules.flow}
every_schedule = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)


def values(schedule, t):
    return tuple(np.asarray(value, "float64") for value in schedule(t))


# ---- the functions t -> (alpha, sigma) -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", PRESERVING.values(), ids=PRESERVING)
def test_variance_is_preserved_at_every_time(schedule):
    alpha, sigma = values(schedule, GRID)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, atol=3e-7)


@every_schedule
def test_signal_falls_and_noise_rises(schedule):
    alpha, sigma = values(schedule, GRID)
    assert np.all(np.diff(alpha) <= 0) and np.all(np.diff(sigma) >= -1.2e-7)  # float32's last digit near 1
    coarse_alpha, coarse_sigma = alpha[::20], sigma[::20]  # float32 can tell these apart
    assert np.all(np.diff(coarse_alpha) < 0)
    assert np.all(np.diff(coarse_sigma[:-1]) > 0)


@every_schedule
def test_time_0_is_clean_exactly(schedule):
    alpha, sigma = values(schedule, 0.0)
    assert alpha == 1.0 and sigma == 0.0


@pytest.mark.parametrize("schedule", CURVED.values(), ids=CURVED)
def test_hardly_anything_of_the_picture_is_left_at_time_1(schedule):
    """Otherwise the mean brightness of training leaks through t = 1, and samples collapse to it."""
    alpha, sigma = values(schedule, 1.0)
    most = 0.0047 if schedule is schedules.scaled_linear else 1e-4  # as published, with its known leak
    assert 0.0 < alpha**2 < most  # above 0: x_0 from eps divides by alpha
    assert sigma > 0.9976


@pytest.mark.parametrize("schedule", CURVED.values(), ids=CURVED)
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


def test_scaled_linear_is_the_table_of_latent_diffusion():
    """sqrt(beta) evenly spaced, alpha_bar_i = prod (1 - beta_j); it ends at alpha = 0.068 (published checkpoints)."""
    alpha_bar = np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    alpha, _ = values(schedules.scaled_linear, np.arange(1, 1001) / 1000)
    np.testing.assert_allclose(alpha, np.sqrt(alpha_bar), rtol=5e-6)
    assert abs(alpha[-1] - 0.0683) < 5e-5


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


def test_the_cosine_ends_as_its_discrete_chain_does():
    """That one clips beta at 0.999 (arXiv 2102.09672, section 3.2), or the last step would divide by 0."""
    alpha_bar = np.cos(0.5 * np.pi * (np.arange(1001) / 1000 + 0.008) / 1.008) ** 2
    beta = np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    np.testing.assert_allclose(schedules.cosine(1.0)[0], np.sqrt(np.prod(1.0 - beta)), rtol=0.02)


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
    np.testing.assert_allclose(alpha, schedule(np.asarray(GRID, "float64"))[0], atol=3e-7)


@every_schedule
def test_schedule_gives_the_same_inside_a_graph(schedule):
    eager, traced = schedule(GRID), tf.function(schedule)(GRID)
    np.testing.assert_allclose(eager[0], traced[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(eager[1], traced[1], rtol=1e-5, atol=3e-4)  # sqrt(1 - 1) at t = 0


def test_flow_is_a_straight_line():
    alpha, sigma = values(schedules.flow, GRID)
    np.testing.assert_allclose(alpha, 1.0 - GRID.astype("float64"), atol=1e-7)
    np.testing.assert_array_equal(sigma, GRID)


# ---- zero terminal SNR -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CURVED)
def test_rescaled_schedule_is_algorithm_1_of_the_paper(name):
    """arXiv 2305.08891, on the table of sqrt(alpha_bar): shift the last to 0, scale the first back to where it was."""
    t = np.linspace(0.0, 1.0, 1001, dtype="float32")
    table, _ = values(CURVED[name], t)
    table = table - table[-1]
    table = table / table[0]
    alpha, sigma = values(RESCALED[f"{name}_zero_snr"], t)
    np.testing.assert_allclose(alpha, table, atol=3e-7)
    np.testing.assert_allclose(sigma, np.sqrt(1.0 - table**2), atol=2e-4)
    last, _ = values(CURVED[name], 1.0)
    before = values(CURVED[name], t[1:50])[1] ** 2 / (1.0 + values(CURVED[name], t[1:50])[0])
    gap = before / (1.0 - last)  # 1 - alpha, with its digits
    np.testing.assert_allclose(sigma[1:50], np.sqrt(gap * (2.0 - gap)), rtol=1e-6)


@pytest.mark.parametrize("schedule", [*RESCALED.values(), schedules.flow], ids=[*RESCALED, "flow"])
def test_a_process_without_terminal_signal_ends_at_0_exactly(schedule):
    for t in (1.0, np.ones(33), tf.ones((4, 5))):
        for found in (schedule(t), tf.function(schedule)(tf.convert_to_tensor(t))):
            np.testing.assert_array_equal(found[0], 0.0)
            np.testing.assert_array_equal(found[1], 1.0)
    assert schedules.zero_terminal_snr(schedule) is schedule


def test_rescaling_ends_any_schedule_at_0_and_leaves_no_jump():
    """The first 200 of the 1000 betas, as an earlier project had them, leave 80 % of the picture."""
    cut = schedules.zero_terminal_snr(lambda t: schedules.linear(0.2 * tf.convert_to_tensor(t)))
    alpha, sigma = values(cut, GRID)
    assert alpha[0] == 1.0 and alpha[-1] == 0.0 and sigma[-1] == 1.0
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, atol=2e-6)  # the stretch by 5 is one of float32's digits too
    assert np.abs(np.diff(alpha)).max() < 5.0 / len(GRID)


# ---- eps, v, x_0 -----------------------------------------------------------------------------------------------------


MOMENTS = {f"{name}_{t}": (schedule, t) for name, schedule in ALL.items() for t in (0.02, 0.5, 0.98)}


@pytest.fixture(params=[*MOMENTS.values(), (None, (1.7, 0.4))], ids=[*MOMENTS, "neither"])
def noisy(request):
    """x_0, eps, alpha, sigma and x_t, by the definition in float64; also where neither sum is 1."""
    rng = np.random.default_rng(0)
    x_0, eps = rng.normal(size=(2, 3, 4, 4, 1))
    schedule, t = request.param
    alpha, sigma = values(schedule, t) if schedule else t
    return x_0, eps, alpha, sigma, alpha * x_0 + sigma * eps


def test_add_noise_is_the_forward_process(noisy):
    x_0, eps, alpha, sigma, x_t = noisy
    np.testing.assert_array_equal(schedules.add_noise(x_0, eps, alpha, sigma), x_t)


@pytest.mark.parametrize("prediction", schedules.PREDICTIONS)
def test_x_0_comes_back_from_every_prediction(noisy, prediction):
    x_0, eps, alpha, sigma, x_t = noisy
    target = schedules.to_target(prediction, x_0, eps, alpha, sigma)
    np.testing.assert_allclose(schedules.to_x_0(prediction, target, x_t, alpha, sigma), x_0, atol=1e-5)


@pytest.mark.parametrize("prediction", [name for name in schedules.PREDICTIONS if name != "eps"])
@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
def test_x_0_comes_back_at_both_ends(schedule, t, prediction):
    """At t = 1 of a zero-SNR process x_t says nothing, so it is the output that does; at t = 0 it is x_t."""
    x_0, eps = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 1))
    alpha, sigma = values(schedule, t)
    x_t = schedules.add_noise(x_0, eps, alpha, sigma)
    target = schedules.to_target(prediction, x_0, eps, alpha, sigma)
    np.testing.assert_allclose(schedules.to_x_0(prediction, target, x_t, alpha, sigma), x_0, atol=1e-6)


def test_targets_are_what_the_papers_say():
    x_0, eps = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 1))
    alpha, sigma = values(schedules.cosine, 0.4)
    angle = np.arctan2(sigma, alpha)  # v is the derivative of x by the angle (arXiv 2202.00512, appendix D)
    step = 1e-5
    ahead = np.cos(angle + step) * x_0 + np.sin(angle + step) * eps
    behind = np.cos(angle - step) * x_0 + np.sin(angle - step) * eps
    derivative = (ahead - behind) / (2 * step)
    np.testing.assert_allclose(schedules.to_target("v", x_0, eps, alpha, sigma), derivative, atol=1e-6)
    np.testing.assert_array_equal(schedules.to_target("eps", x_0, eps, alpha, sigma), eps)
    np.testing.assert_array_equal(schedules.to_target("x_0", x_0, eps, alpha, sigma), x_0)
    ahead, behind = ((1 - t) * x_0 + t * eps for t in (0.7 + step, 0.7 - step))
    velocity = (ahead - behind) / (2 * step)  # dx / dt of a rectified flow (arXiv 2209.03003, eq. 1)
    np.testing.assert_allclose(schedules.to_target("flow", x_0, eps, *values(schedules.flow, 0.7)), velocity, atol=1e-6)


@pytest.mark.parametrize("sigma_data", [schedules.SIGMA_DATA, 1.0, 2.0])
def test_edm_is_table_1_of_the_paper(noisy, sigma_data):
    """arXiv 2206.00364: D(x; s) = c_skip x + c_out F(c_in x), for x = x_t / alpha and s = sigma / alpha."""
    x_0, eps, alpha, sigma, x_t = noisy
    if alpha == 0.0:
        pytest.skip("the paper's sigma is infinite")
    x, s, d = x_t / alpha, sigma / alpha, sigma_data
    c_skip, c_out, c_in = d**2 / (s**2 + d**2), s * d / np.sqrt(s**2 + d**2), 1.0 / np.sqrt(s**2 + d**2)
    ours = schedules.preconditioning("edm", alpha, sigma, d)
    np.testing.assert_allclose(ours[2] * x_t, c_in * x, rtol=1e-9)
    np.testing.assert_allclose(ours[:2], [c_skip / alpha, c_out], rtol=1e-9)
    target = schedules.to_target("edm", x_0, eps, alpha, sigma, d)
    np.testing.assert_allclose(target, (x_0 - c_skip * x) / c_out, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(schedules.to_x_0("edm", target, x_t, alpha, sigma, d), x_0, atol=1e-6)


@every_schedule
def test_edm_gives_the_network_unit_variance_and_asks_for_unit_variance(schedule):
    """In a flow too, whose x_t has neither: so the unweighted error is the paper's loss, lambda c_out^2 = 1."""
    rng, d = np.random.default_rng(1), 0.5  # sigma_data of table 1, which is what is taken unless told
    x_0, eps = d * rng.normal(size=100_000), rng.normal(size=100_000)
    for t in (0.0, 0.3, 0.8, 1.0):
        alpha, sigma = values(schedule, t)
        _, _, c_in = schedules.preconditioning("edm", alpha, sigma)
        x_t, target = alpha * x_0 + sigma * eps, schedules.to_target("edm", x_0, eps, alpha, sigma)
        np.testing.assert_allclose([np.std(c_in * x_t), np.std(target)], 1.0, atol=0.02)
        assert abs(np.corrcoef(x_t, target)[0, 1]) < 0.02  # c_skip leaves to the network what x_t does not say


@pytest.mark.parametrize("schedule", PRESERVING.values(), ids=PRESERVING)
def test_v_is_edm_for_data_of_unit_variance_up_to_the_sign(schedule):
    x_0, eps = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 1))
    for t in (0.0, 0.1, 0.6, 1.0):
        alpha, sigma = values(schedule, t)
        edm, v = (schedules.to_target(name, x_0, eps, alpha, sigma, 1.0) for name in ("edm", "v"))
        np.testing.assert_allclose(edm, -v, atol=1e-6)
        ours, theirs = (schedules.preconditioning(name, alpha, sigma, 1.0) for name in ("edm", "v"))
        np.testing.assert_allclose(ours, [theirs[0], -theirs[1], theirs[2]], atol=1e-6)


def test_eps_comes_back_from_x_0(noisy):
    x_0, eps, alpha, sigma, x_t = noisy
    np.testing.assert_allclose(schedules.to_eps(x_0, x_t, alpha, sigma), eps, atol=1e-9)


@pytest.mark.parametrize("prediction", schedules.PREDICTIONS)
def test_what_the_network_is_shown_has_the_variance_that_the_preconditioning_says(noisy, prediction):
    """c_in x_t: of unit variance for "edm" and data of SIGMA_DATA, x_t as it is for all others."""
    x_0, eps, alpha, sigma, x_t = noisy
    shown = np.asarray(schedules.to_input(prediction, x_t, alpha, sigma))
    scale = np.sqrt(np.square(sigma) + np.square(schedules.SIGMA_DATA * alpha)) if prediction == "edm" else 1.0
    np.testing.assert_allclose(shown * scale, x_t, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prediction", ["noise", "", None])
def test_unknown_prediction_is_refused(noisy, prediction):
    x_0, eps, alpha, sigma, x_t = noisy
    with pytest.raises(ValueError, match="prediction must be one of"):
        schedules.to_target(prediction, x_0, eps, alpha, sigma)
    with pytest.raises(ValueError, match="prediction must be one of"):
        schedules.to_x_0(prediction, x_0, x_t, alpha, sigma)


@pytest.mark.parametrize("schedule", [schedules.cosine, schedules.flow])
def test_an_error_of_v_counts_as_the_error_in_eps_that_it_makes(noisy, schedule):
    """Whatever the network says for v, eps = (x_t - alpha x_0) / sigma of the x_0 that follows from it."""
    x_0, eps = noisy[:2]
    alpha, sigma = values(schedule, 0.4)
    x_t = schedules.add_noise(x_0, eps, alpha, sigma)
    output = np.random.default_rng(3).standard_normal(x_0.shape)
    said = schedules.to_eps(schedules.to_x_0("eps_v", output, x_t, alpha, sigma), x_t, alpha, sigma)
    miss = output - schedules.to_target("v", x_0, eps, alpha, sigma)
    if schedule is schedules.flow:  # its v is a combination that alone does not name x_0 and eps
        miss = output - schedules.to_target("eps_v", x_0, eps, alpha, sigma)
    np.testing.assert_allclose(schedules.error_scale("eps_v", alpha, sigma) * miss, said - eps, atol=1e-5)
    assert schedules.error_scale("v", alpha, sigma) == schedules.error_scale("eps", alpha, sigma) == 1.0


# ---- min-SNR-gamma ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", PRESERVING.values(), ids=PRESERVING)
def test_min_snr_weights_are_those_of_the_paper(schedule):
    """arXiv 2303.09556, section 3.4: min(SNR, gamma) for x_0, over SNR for eps, over SNR + 1 for v."""
    t, gamma = np.linspace(0.02, 0.98, 25), 5.0
    alpha, sigma = values(schedule, t)
    snr = (alpha / sigma) ** 2
    assert snr.min() < gamma < snr.max()
    for prediction, divisor in (("x_0", 1.0), ("eps", snr), ("v", snr + 1.0)):
        weight = schedules.min_snr_weight(prediction, alpha, sigma, gamma)
        np.testing.assert_allclose(weight, np.minimum(snr, gamma) / divisor, rtol=1e-5)


def test_min_snr_makes_every_prediction_weigh_an_error_in_x_0_the_same(noisy):
    x_0, eps, alpha, sigma, x_t = noisy
    wrong = x_0 + 0.1  # and eps such that x_t stays what it is
    other = schedules.to_eps(wrong, x_t, alpha, sigma)
    for prediction in schedules.PREDICTIONS:
        miss = schedules.to_target(prediction, x_0, eps, alpha, sigma)
        miss = miss - schedules.to_target(prediction, wrong, other, alpha, sigma)
        weight = np.asarray(schedules.min_snr_weight(prediction, alpha, sigma, 5.0))
        np.testing.assert_allclose(weight * miss**2, 0.01 * min((alpha / sigma) ** 2, 5.0), rtol=1e-4)


@every_schedule
@pytest.mark.parametrize("prediction", schedules.PREDICTIONS)
def test_min_snr_weights_are_finite_from_end_to_end(schedule, prediction):
    alpha, sigma = schedule(GRID)
    if prediction == "eps":  # refused by the model where alpha is 0
        alpha, sigma = alpha[alpha > 0], sigma[alpha > 0]
    weight = np.asarray(schedules.min_snr_weight(prediction, alpha, sigma, 5.0))
    assert np.all(np.isfinite(weight)) and np.all(weight >= 0.0) and weight.max() <= 5.0
    assert weight[0] == (5.0 if prediction == "x_0" else 0.0)
