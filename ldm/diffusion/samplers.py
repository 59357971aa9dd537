"""Samplers: from noise to data, given any `denoise(x_t, t) -> x_0`.

Every sampler is a generator that yields `(x_t, x_0)` after each call of `denoise`: the state it has reached and the
clean data that the network predicted on the way. The last x_t is the sample; the list of them is the trajectory.
`steps` counts calls of `denoise`; guided, each is two of the network. A sampler knows no model: `denoise` takes x_t and
a float32 array t of shape (B,), and `schedule` is a function t -> (alpha, sigma) of `ldm.diffusion.schedules`, which
need not preserve the variance and may end at alpha(1) = 0. A first step that is of first order and adds no noise (that
of ddim with eta 0, euler, dpm_solver_pp, and heun with an even number of calls) is then
x_s = alpha_s x_0 + sigma_s x_T. Nothing clips x_t, ever; a `denoise` for pixels may clip its x_0. What a caller has to
know of each, its usual number of calls and the options it takes, is in SAMPLERS.
"""

import dataclasses
import inspect
from collections.abc import Callable

import numpy as np

from ldm.diffusion import schedules
from ldm.later import keras, ops

SPACINGS = ("uniform", "trailing", "leading", "karras")

# The noise levels sigma / alpha between which the Karras spacing lies, and its exponent (arXiv 2206.00364, table 1).
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0

COHERENCE = 0.935  # of the noises of neighbouring slices of a head, unless somebody says otherwise: see docs/results.md
RESAMPLE = 5  # times that `inpaint` makes each step, unless somebody says otherwise


def time_grid(steps, spacing="uniform", schedule=None, start=1.0):
    """The `steps + 1` times that a sampler visits, from `start` down to 0; float32.

    Args:
        steps: number of steps.
        spacing: "uniform": evenly spaced. "trailing": these times rounded to the table of T = 1000 entries, which is
            the spacing of that name in arXiv 2305.08891, section 3.3; so the uniform one is its continuous form, and
            they are the same where `steps` divides T. "leading": every (T // steps)-th entry of that table from the
            first one on, as DDIM's own code and latent diffusion's have it; it begins short of t = 1. "karras": noise
            levels sigma / alpha whose 7th roots are evenly spaced from 80 (or the schedule's own end, if that is less)
            to 0.002, and then 0 (arXiv 2206.00364, eq. 5); the first of them is moved to t = 1, where x_T is noise and
            next to nothing else.
        schedule: callable t -> (alpha, sigma), for "karras".
        start: the first time, in (0, 1]; less than 1 where x_T is a noised picture, evenly spaced only.

    Raises:
        ValueError: if `steps` is less than 1, the spacing is unknown or does not go with `start`, or a
            "trailing" one has more steps than the table has entries.
    """
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, not {steps}")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {SPACINGS}, not {spacing!r}")
    if not 0 < start <= 1 or (start < 1 and spacing != "uniform"):
        raise ValueError(f"start must be more than 0 and at most 1, and 1 unless evenly spaced, not {start}")
    if spacing == "karras":
        alpha, sigma = _numbers(schedule, 1.0)
        highest = SIGMA_MAX if sigma > SIGMA_MAX * alpha else sigma / alpha
        levels = np.linspace(highest ** (1 / RHO), SIGMA_MIN ** (1 / RHO), steps) ** RHO
        return np.concatenate([[1.0], _times_of(schedule, levels[1:]), [0.0]]).astype("float32")
    uniform = np.linspace(start, 0.0, steps + 1, dtype="float32")
    if spacing == "uniform":
        return uniform
    if steps > schedules.TABLE_LENGTH:
        raise ValueError(f"{spacing} spacing has at most {schedules.TABLE_LENGTH} steps, not {steps}")
    if spacing == "leading":
        entries = 1 + np.arange(steps)[::-1] * (schedules.TABLE_LENGTH // steps)
        return (np.append(entries, 0) / schedules.TABLE_LENGTH).astype("float32")
    return np.round(uniform * schedules.TABLE_LENGTH) / np.float32(schedules.TABLE_LENGTH)


def initial_noise(seed, i, shape):
    """x_T of slice i: standard normal noise, the same however many slices are drawn and in whatever batches."""
    return np.random.default_rng([seed, i]).standard_normal(shape, "float32")


class NoiseOfSlice:
    """Noise of one slice of a head, which correlates with that of the head's other slices, less the farther they lie.

    At a distance of d slices the correlation is 1 / (1 + d^2 (1 / c - 1)), so c at a distance of one: a rational
    quadratic kernel (Rasmussen and Williams 2006, eq. 4.19 with alpha = 1). It is flat at d = 0, and so what is drawn
    moves smoothly from slice to slice; a chain, each slice a share of the one before, would jolt. What a slice gets
    does not depend on how many others are drawn.

    Args:
        seed: sequence of integers, of the head.
        place: the slice's place in the head, from 0 on.
        coherence: c in [0, 1]: 1 gives all slices the same noise, 0 each its own.
    """

    def __init__(self, seed, place, coherence):
        # Row `place` of a matrix L with L L^T = the correlations: slice k is the sum of L[k, j] times stream j <= k.
        weights = np.linalg.cholesky(correlations(place + 1, coherence))[-1]
        seeds = [seed] + [[*seed, 0, k] for k in range(1, place + 1)]
        streams = zip(weights, seeds, strict=True)
        self.parts = [(w, np.random.default_rng(own)) for w, own in streams if abs(w) > 1e-4]

    def standard_normal(self, shape, dtype):
        """As that of a `numpy.random.Generator`."""
        return sum(np.asarray(w, dtype) * stream.standard_normal(shape, dtype) for w, stream in self.parts)


def correlations(count, coherence):
    """Of the noises of a head's first slices, (count, count); 1e-9 keep it from being singular where all are alike."""
    if coherence == 0:
        return np.eye(count)
    distance = np.subtract.outer(np.arange(count), np.arange(count))
    return (1.0 / (1.0 + distance**2 * (1.0 / coherence - 1.0)) + 1e-9 * np.eye(count)) / (1.0 + 1e-9)


def ddim(denoise, x_T, schedule, steps, eta=0.0, seed=None, spacing="uniform", start=1.0):
    """DDIM (arXiv 2010.02502, eq. 12): x_s = alpha_s x_0 + sqrt(sigma_s^2 - added^2) eps + added z.

    Here s is the next time, z is fresh noise, and added is `eta` times the posterior's standard deviation.

    Args:
        denoise: callable (x_t, t) -> x_0.
        x_T: noise, (B, ...), standard normal.
        schedule: callable t -> (alpha, sigma).
        steps: number of calls of `denoise`.
        eta: 0 is deterministic; 1 has the moments of DDPM.
        seed: of the noise that eta > 0 adds: an integer; or one for each row of x_T (each an integer, a sequence of
            them, or a `NoiseOfSlice`), so that what a row gets does not depend on the rows beside it, and equal seeds
            add equal noise.
        spacing, start: of the times; see `time_grid`.

    Yields:
        (x_t, x_0), each (B, ...), once per call of `denoise`.
    """
    noise = _noise(seed)
    x_t = x_T
    for t, alpha_t, sigma_t, alpha_s, sigma_s in _steps(schedule, steps, spacing, start):
        x_0 = denoise(x_t, _at(t, x_t))
        eps = schedules.to_eps(x_0, x_t, alpha_t, sigma_t)
        added = eta * _posterior_deviation(alpha_t, sigma_t, alpha_s, sigma_s)
        kept = max(sigma_s**2 - added**2, 0.0) ** 0.5
        x_t = alpha_s * x_0 + kept * eps
        if added > 0:
            x_t = x_t + added * noise(x_t)
        yield x_t, x_0


def ddpm(denoise, x_T, schedule, steps, seed=None, spacing="uniform", start=1.0):
    """Ancestral sampling from q(x_s | x_t, x_0) (arXiv 2006.11239, eq. 6 and 7, for any pair of times s < t).

    With the linear schedule and 1000 steps this is the classic chain; with fewer, the same chain on fewer times.
    The variance is the posterior's (the smaller of the two choices of section 3.2).

    Args and Yields: as `ddim`.
    """
    noise = _noise(seed)
    x_t = x_T
    for t, alpha_t, sigma_t, alpha_s, sigma_s in _steps(schedule, steps, spacing, start):
        x_0 = denoise(x_t, _at(t, x_t))
        x_t, deviation = _posterior(x_t, x_0, alpha_t, sigma_t, alpha_s, sigma_s)
        if deviation > 0:  # 0 only on the last step, which ends at x_0
            x_t = x_t + deviation * noise(x_t)
        yield x_t, x_0


def dpm_solver_pp(denoise, x_T, schedule, steps, spacing="uniform", start=1.0):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): of second order, with one call of `denoise` per step.

    The order is that in lambda = log(alpha / sigma), half the log-SNR. The first step, and the last one, which ends at
    sigma = 0, are of first order (equal to DDIM); so is the second if the first came from alpha = 0, where lambda is
    minus infinity.

    Args and Yields: as `ddim`.
    """
    x_t, last_x_0, last_h = x_T, None, None
    for t, alpha_t, sigma_t, alpha_s, sigma_s in _steps(schedule, steps, spacing, start):
        x_0 = denoise(x_t, _at(t, x_t))
        if sigma_s == 0.0:
            x_t, h = alpha_s * x_0, None
        else:
            # step in lambda = log(alpha / sigma)
            h = np.log(alpha_s / sigma_s) - np.log(alpha_t / sigma_t) if alpha_t > 0.0 else np.inf
            if last_x_0 is None:
                ahead = x_0
            else:
                ratio = h / (2.0 * last_h)
                ahead = (1.0 + ratio) * x_0 - ratio * last_x_0  # x_0 extrapolated to the middle of the step
            x_t = (sigma_s / sigma_t) * x_t - alpha_s * np.expm1(-h) * ahead
        last_x_0, last_h = x_0, h
        yield x_t, x_0


def euler(denoise, x_T, schedule, steps, spacing="uniform", start=1.0):
    """Euler's method for the probability-flow ODE: in a rectified flow, x_s = x_t + (s - t)(eps - x_0).

    For other schedules it is Euler's step for x / alpha in sigma / alpha, dx = eps dsigma (arXiv 2206.00364, eq. 1).
    Both move along alpha x_0 + sigma eps with x_0 and eps held fixed, which is DDIM without noise: one formula.

    Args and Yields: as `ddim`.
    """
    yield from ddim(denoise, x_T, schedule, steps, spacing=spacing, start=start)


def heun(denoise, x_T, schedule, steps, spacing="uniform", start=1.0):
    """Heun's second-order method (arXiv 2206.00364, algorithm 1): Euler's step, then again with the mean slope.

    The algorithm is for any scaling of x_t. Here it is that of a rectified flow, x_t / (alpha + sigma) as a function
    of sigma / (alpha + sigma) with slope eps - x_0, because it is finite at both ends; x_t / alpha is not at alpha = 0.

    An interval takes two calls; the last takes one, and so does the first if the number of calls is even: these are
    Euler's steps. `steps` calls therefore cover `steps // 2 + 1` intervals. The trajectory has one moment per call:
    Euler's state, then the corrected one at the same time.

    Args and Yields: as `ddim`.
    """
    x_t = x_T
    path = list(_steps(schedule, min(steps, steps // 2 + 1), spacing, start))
    for i, (t, alpha_t, sigma_t, alpha_s, sigma_s) in enumerate(path):
        x_0 = denoise(x_t, _at(t, x_t))
        eps = schedules.to_eps(x_0, x_t, alpha_t, sigma_t)
        ahead = schedules.add_noise(x_0, eps, alpha_s, sigma_s)
        yield ahead, x_0
        if i == len(path) - 1 or (i == 0 and steps % 2 == 0):
            x_t = ahead
            continue
        slope = eps - x_0
        s = path[i + 1][0]
        x_0 = denoise(ahead, _at(s, x_t))
        slope = 0.5 * (slope + schedules.to_eps(x_0, ahead, alpha_s, sigma_s) - x_0)
        scale_t, scale_s = alpha_t + sigma_t, alpha_s + sigma_s
        x_t = scale_s * (x_t / scale_t + (sigma_s / scale_s - sigma_t / scale_t) * slope)
        yield x_t, x_0


def inpaint(denoise, known, mask, x_T, schedule, steps, resample=RESAMPLE, seed=None):
    """Draw a part of a picture anew, to fit the rest (RePaint, arXiv 2201.09865, algorithm 1).

    After each step, everything outside the mask is replaced by `known`, noised to the same level. To make inside and
    outside agree, each step is made `resample` times, going back up by fresh noise in between.

    Args:
        denoise, x_T, schedule, seed: as `ddim`.
        known: the picture (or its latents), (B, h, w, C).
        mask: (B, h, w, 1), 1 where to draw anew, 0 where `known` stays.
        steps: number of calls of `denoise`, rounded down to a multiple of `resample`.
        resample: times that each step is made, at most `steps`.

    Yields:
        (x_t, x_0), each (B, h, w, C), once per call of `denoise`; the last x_t is `known` outside the mask.

    Raises:
        ValueError: if `resample` is less than 1 or more than `steps`.
    """
    levels = inpainting_calls(steps, resample) // resample
    noise = _noise(seed)
    x_t = x_T
    for t, alpha_t, sigma_t, alpha_s, sigma_s in _steps(schedule, levels):
        for _ in range(resample):
            x_0 = denoise(x_t, _at(t, x_t))
            anew, deviation = _posterior(x_t, x_0, alpha_t, sigma_t, alpha_s, sigma_s)
            anew = anew + deviation * noise(x_t)
            x_s = mask * anew + (1.0 - mask) * schedules.add_noise(known, noise(x_t), alpha_s, sigma_s)
            yield x_s, x_0
            alpha_ts = alpha_t / alpha_s
            x_t = alpha_ts * x_s + (sigma_t**2 - alpha_ts**2 * sigma_s**2) ** 0.5 * noise(x_t)
        x_t = x_s


def inpainting_calls(steps, resample=RESAMPLE):
    """Calls of `denoise` that `inpaint` makes: `steps` rounded down to a multiple of `resample`.

    Raises:
        ValueError: if `resample` is less than 1 or more than `steps`.
    """
    if not 1 <= resample <= steps:
        raise ValueError(f"resample must lie between 1 and the {steps} steps, not {resample}")
    return steps - steps % resample


@dataclasses.dataclass(frozen=True)
class Sampler:
    """One of the functions above, and what its callers have to know of it.

    Attributes:
        draw: the function; a `Sampler` is called like it.
        calls: of `denoise`, that it usually takes for a good picture.
    """

    draw: Callable
    calls: int

    def __call__(self, *args, **options):
        return self.draw(*args, **options)

    @property
    def takes(self):
        """Names of its options, beside denoise, x_T, schedule and steps."""
        return frozenset(inspect.signature(self.draw).parameters) - {"denoise", "x_T", "schedule", "steps"}


SAMPLERS = {
    "ddpm": Sampler(ddpm, 250),
    "ddim": Sampler(ddim, 50),
    "dpm_solver_pp": Sampler(dpm_solver_pp, 20),
    "euler": Sampler(euler, 50),
    "heun": Sampler(heun, 41),  # odd, so that the first step is of second order too
}
INPAINT = Sampler(inpaint, 100)  # needs a picture and a mask, so it cannot stand in for the others


def named(name):
    """A sampler of SAMPLERS, or INPAINT by the name "inpaint"."""
    return INPAINT if name == "inpaint" else SAMPLERS[name]


def _steps(schedule, steps, spacing="uniform", start=1.0):
    """(t, alpha_t, sigma_t, alpha_s, sigma_s) of each step t -> s, as Python floats."""
    times = time_grid(steps, spacing, schedule, start)
    alpha, sigma = (value.tolist() for value in _numbers(schedule, times))
    return [(float(times[i]), alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]) for i in range(steps)]


def _numbers(schedule, times):
    """alpha and sigma as float64 arrays."""
    return tuple(ops.convert_to_numpy(value).astype("float64") for value in schedule(np.float32(times)))


def _times_of(schedule, levels):
    """The times at which sigma / alpha has the given values, by bisection."""
    low, high = np.zeros_like(levels), np.ones_like(levels)
    for _ in range(40):
        middle = 0.5 * (low + high)
        alpha, sigma = _numbers(schedule, middle)
        noisier = sigma > levels * alpha
        low, high = np.where(noisier, low, middle), np.where(noisier, middle, high)
    return high


def _noise(seed):
    """A function x -> standard normal noise of its shape, new at each call; see `ddim` for `seed`."""
    if seed is None or isinstance(seed, int | np.integer):
        generator = keras.random.SeedGenerator(None if seed is None else int(seed))
        return lambda x: keras.random.normal(ops.shape(x), seed=generator)
    rows = [own if isinstance(own, NoiseOfSlice) else np.random.default_rng(own) for own in seed]
    return lambda x: np.stack([row.standard_normal(x.shape[1:], "float32") for row in rows])


def _at(t, x_t):
    return ops.full((ops.shape(x_t)[0],), t, dtype="float32")


def _posterior(x_t, x_0, alpha_t, sigma_t, alpha_s, sigma_s):
    """Mean and standard deviation of q(x_s | x_t, x_0) for any s < t."""
    alpha_ts = alpha_t / alpha_s  # x_t given x_s: mean alpha_ts x_s, variance sigma_t^2 - alpha_ts^2 sigma_s^2
    weight_x_t = alpha_ts * sigma_s**2 / sigma_t**2
    weight_x_0 = alpha_s * (sigma_t**2 - alpha_ts**2 * sigma_s**2) / sigma_t**2
    deviation = _posterior_deviation(alpha_t, sigma_t, alpha_s, sigma_s)
    return weight_x_t * x_t + weight_x_0 * x_0, deviation


def _posterior_deviation(alpha_t, sigma_t, alpha_s, sigma_s):
    """Standard deviation of q(x_s | x_t, x_0): eq. 7 of arXiv 2006.11239 for any s < t, eq. 16 of arXiv 2010.02502."""
    variance = max(sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2, 0.0)
    return sigma_s / sigma_t * variance**0.5
