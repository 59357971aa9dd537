"""Samplers: from noise to data, given any `denoise(x_t, t) -> x_0`.

Every sampler is a generator that yields `(x_t, x_0)` after each step: the state it has reached and the clean data that
the network saw on the way. The last x_t is the sample; the list of them is the film. `steps` counts network calls.
A sampler knows no model: `denoise` takes x_t and a float32 array t of shape (B,), and `schedule` is a function
t -> (alpha, sigma) of `ldm.schedules`. Nothing clips x_t, ever; a `denoise` for pixels may clip its x_0.
"""

import keras
import numpy as np
from keras import ops

from ldm import schedules


def time_grid(steps):
    """The `steps + 1` times that a sampler visits, from 1 down to 0, evenly spaced; float32.

    Raises:
        ValueError: if `steps` is less than 1.
    """
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, not {steps}")
    return np.linspace(1.0, 0.0, steps + 1, dtype="float32")


def ddim(denoise, x_T, schedule, steps, eta=0.0, seed=None):
    """DDIM (arXiv 2010.02502, eq. 12): x_s = alpha_s x_0 + sqrt(sigma_s^2 - noise^2) eps + noise z.

    Args:
        denoise: callable (x_t, t) -> x_0.
        x_T: noise, (B, ...), standard normal.
        schedule: callable t -> (alpha, sigma).
        steps: number of network calls.
        eta: 0 is deterministic; 1 has the moments of DDPM.
        seed: integer for the noise that eta > 0 adds.

    Yields:
        (x_t, x_0), each (B, ...), once per network call.
    """
    noise = keras.random.SeedGenerator(seed)
    x_t = x_T
    for t, alpha_t, sigma_t, alpha_s, sigma_s in _steps(schedule, steps):
        x_0 = denoise(x_t, _at(t, x_t))
        eps = schedules.to_eps(x_0, x_t, alpha_t, sigma_t)
        added = eta * _posterior_deviation(alpha_t, sigma_t, alpha_s, sigma_s)
        kept = max(sigma_s**2 - added**2, 0.0) ** 0.5
        x_t = alpha_s * x_0 + kept * eps
        if added > 0:
            x_t = x_t + added * keras.random.normal(ops.shape(x_t), seed=noise)
        yield x_t, x_0


def ddpm(denoise, x_T, schedule, steps, seed=None):
    """Ancestral sampling from q(x_s | x_t, x_0) (arXiv 2006.11239, eq. 6 and 7, for any pair of times s < t).

    With the linear schedule and 1000 steps this is the classic chain; with fewer, the same chain on fewer times.
    The variance is the posterior's (the smaller of the two choices of section 3.2).

    Args and Yields: as `ddim`.
    """
    noise = keras.random.SeedGenerator(seed)
    x_t = x_T
    for t, alpha_t, sigma_t, alpha_s, sigma_s in _steps(schedule, steps):
        x_0 = denoise(x_t, _at(t, x_t))
        alpha_ts = alpha_t / alpha_s  # x_t given x_s: mean alpha_ts x_s, variance sigma_t^2 - alpha_ts^2 sigma_s^2
        weight_x_t = alpha_ts * sigma_s**2 / sigma_t**2
        weight_x_0 = alpha_s * (sigma_t**2 - alpha_ts**2 * sigma_s**2) / sigma_t**2
        x_t = weight_x_t * x_t + weight_x_0 * x_0
        deviation = _posterior_deviation(alpha_t, sigma_t, alpha_s, sigma_s)
        if deviation > 0:  # 0 only on the last step, which ends at x_0
            x_t = x_t + deviation * keras.random.normal(ops.shape(x_t), seed=noise)
        yield x_t, x_0


def dpm_solver_pp(denoise, x_T, schedule, steps):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): second order in log-SNR, one network call per step.

    The first step, and the last one, which ends at sigma = 0, are of first order (equal to DDIM).

    Args and Yields: as `ddim`.
    """
    x_t, last_x_0, last_h = x_T, None, None
    for t, alpha_t, sigma_t, alpha_s, sigma_s in _steps(schedule, steps):
        x_0 = denoise(x_t, _at(t, x_t))
        if sigma_s == 0.0:
            x_t, h = alpha_s * x_0, None
        else:
            h = np.log(alpha_s / sigma_s) - np.log(alpha_t / sigma_t)  # step in lambda = log(alpha / sigma)
            if last_x_0 is None:
                ahead = x_0
            else:
                ratio = h / (2.0 * last_h)
                ahead = (1.0 + ratio) * x_0 - ratio * last_x_0  # x_0 extrapolated to the middle of the step
            x_t = (sigma_s / sigma_t) * x_t - alpha_s * np.expm1(-h) * ahead
        last_x_0, last_h = x_0, h
        yield x_t, x_0


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm_solver_pp": dpm_solver_pp}


def _steps(schedule, steps):
    """(t, alpha_t, sigma_t, alpha_s, sigma_s) of each step t -> s, as Python floats."""
    times = time_grid(steps)
    alpha, sigma = (ops.convert_to_numpy(value).astype("float64").tolist() for value in schedule(times))
    return [(float(times[i]), alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]) for i in range(steps)]


def _at(t, x_t):
    return ops.full((ops.shape(x_t)[0],), t, dtype="float32")


def _posterior_deviation(alpha_t, sigma_t, alpha_s, sigma_s):
    """Standard deviation of q(x_s | x_t, x_0): eq. 7 of arXiv 2006.11239 for any s < t, eq. 16 of arXiv 2010.02502."""
    variance = max(sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2, 0.0)
    return sigma_s / sigma_t * variance**0.5
