"""Noise schedules, and what a denoiser may predict.

Here lives everything about x_t = alpha(t) x_0 + sigma(t) eps, t in [0, 1] (t = 1 is noise): the functions
t -> (alpha, sigma), and the conversions between what a network says and x_0. A schedule is a plain function, so a new
one needs no class. All keep alpha^2 + sigma^2 = 1 except `flow`, which keeps alpha + sigma = 1; the conversions hold
for any alpha and sigma. Schedules are computed in float32.
"""

import numpy as np

from ldm.later import ops

TABLE_LENGTH = 1000  # T of the classic discrete chain

# The smallest alpha that a schedule returns. cos(pi / 2) is 0, and a network that predicts eps has x_0 divided by
# alpha; the discrete cosine table avoids this by clipping beta at 0.999, which leaves about the same alpha at t = 1.
SMALLEST_ALPHA = 4.9e-5


def _log_alphas(betas):
    """log alpha at t = i / T, i = 0 ... T, of a chain with these T betas."""
    return np.concatenate([[0.0], 0.5 * np.cumsum(np.log1p(-betas))]).astype("float32")


_LOG_ALPHA_TABLE = _log_alphas(np.linspace(1e-4, 0.02, TABLE_LENGTH))
_SCALED_LOG_ALPHA_TABLE = _log_alphas(np.linspace(0.00085**0.5, 0.012**0.5, TABLE_LENGTH) ** 2)


def linear(t):
    """Linear beta schedule of DDPM: beta from 1e-4 to 0.02 in T = 1000 steps (arXiv 2006.11239, section 4).

    The table alpha_bar_i is read at t = i / T; between two entries log(alpha) is interpolated.

    Args:
        t: float in [0, 1], any shape.

    Returns:
        (alpha, sigma), float32, the shape of `t`.
    """
    return _from_log_alpha(_between(_LOG_ALPHA_TABLE, t))


def scaled_linear(t):
    """Schedule of latent diffusion: sqrt(beta) from sqrt(0.00085) to sqrt(0.012) in T = 1000 steps.

    It is that of arXiv 2112.10752 as published with its models: it ends at alpha(1) = 0.068, ten times the alpha of
    `linear`, so that less of the way lies where there is nothing to see.

    Args:
        t: float in [0, 1], any shape.

    Returns:
        (alpha, sigma), float32, the shape of `t`.
    """
    return _from_log_alpha(_between(_SCALED_LOG_ALPHA_TABLE, t))


def cosine(t):
    """Cosine schedule: alpha(t) = f(t) / f(0), f(t) = cos(pi/2 (t + 0.008) / 1.008) (arXiv 2102.09672, eq. 17).

    Args:
        t: float in [0, 1], any shape.

    Returns:
        (alpha, sigma), float32, the shape of `t`.
    """
    offset = 0.008
    start = np.cos(0.5 * np.pi * offset / (1 + offset))
    alpha = ops.cos(0.5 * np.pi * (_float32(t) + offset) / (1 + offset)) / start
    return _from_log_alpha(ops.log(ops.clip(alpha, SMALLEST_ALPHA, 1.0)))


def sigmoid(t):
    """Sigmoid schedule with start -3, end 3, tau 1 (arXiv 2301.10972, algorithm 1).

    Args:
        t: float in [0, 1], any shape.

    Returns:
        (alpha, sigma), float32, the shape of `t`.
    """
    start, end = -3.0, 3.0
    first, last = (1 / (1 + np.exp(-edge)) for edge in (start, end))
    alpha_squared = (last - ops.sigmoid(start + (end - start) * _float32(t))) / (last - first)
    return _from_log_alpha(0.5 * ops.log(ops.clip(alpha_squared, SMALLEST_ALPHA**2, 1.0)))


def flow(t):
    """Rectified flow: x_t = (1 - t) x_0 + t eps, a straight line from data to noise (arXiv 2209.03003, eq. 1).

    Not variance-preserving, and at t = 1 nothing but noise. It visits the sigma / alpha of any other schedule at other
    times: what differs is which noise levels training and an even grid dwell on, and the scale of x_t.

    Args:
        t: float in [0, 1], any shape.

    Returns:
        (alpha, sigma) = (1 - t, t), float32, the shape of `t`.
    """
    t = _float32(t)
    return 1.0 - t, t


SCHEDULES = {"linear": linear, "scaled_linear": scaled_linear, "cosine": cosine, "sigmoid": sigmoid, "flow": flow}


def zero_terminal_snr(schedule):
    """The schedule rescaled so that alpha(1) = 0 (arXiv 2305.08891, algorithm 1).

    alpha becomes (alpha - alpha(1)) / (1 - alpha(1)), and sigma follows. Without it, x_1 in training still shows the
    brightness of the picture, while sampling starts from noise that shows none. At t = 1 nothing can be said of x_0
    from eps, so a network must predict something else.

    Args:
        schedule: callable t -> (alpha, sigma) with alpha^2 + sigma^2 = 1, or one that ends at alpha(1) = 0 already:
            that one comes back as it is.

    Returns:
        The rescaled schedule, float32: alpha(0) = 1 and alpha(1) = 0 exactly.
    """
    last = float(ops.convert_to_numpy(schedule(1.0)[0]))
    if last == 0.0:
        return schedule

    def rescaled(t):
        alpha, sigma = schedule(t)
        at_end = _float32(t) >= 1.0  # exactly, although compilers round differently
        lost = ops.minimum(sigma**2 / ((1.0 + alpha) * (1.0 - last)), 1.0)  # 1 - alpha, with all its digits at t = 0
        alpha = ops.maximum(alpha - last, 0.0) / (1.0 - last)
        return ops.where(at_end, 0.0, alpha), ops.where(at_end, 1.0, ops.sqrt(lost * (2.0 - lost)))

    return rescaled


# ---- what the network predicts ---------------------------------------------------------------------------------------
# alpha and sigma broadcast against x: shape (B, 1, 1, 1) for images. Every prediction is a combination of x_0 and eps
# (`to_target`), and carries the same information once x_t is known: x_0 = c_skip x_t + c_out output. They differ in
# which noise levels the mean squared error weighs most, which `min_snr_weight` evens out.

PREDICTIONS = ("eps", "v", "x_0", "flow", "edm", "eps_v")

# Standard deviation of the data that "edm" counts on: the paper's, for pixels in [-1, 1]. Latents have unit variance:
# with sigma_data = 1 and alpha^2 + sigma^2 = 1, "edm" is -v.
SIGMA_DATA = 0.5


def add_noise(x_0, eps, alpha, sigma):
    """Forward process: x_t = alpha x_0 + sigma eps (arXiv 2006.11239, eq. 4)."""
    return alpha * x_0 + sigma * eps


def to_target(prediction, x_0, eps, alpha, sigma, sigma_data=SIGMA_DATA):
    """What the network should say, given clean data and noise.

    Args:
        prediction: "eps"; "v" = alpha eps - sigma x_0 (arXiv 2202.00512, appendix D); "eps_v", v as well, whose errors
            count as those of eps (`error_scale`); "x_0"; "flow" = eps - x_0, the velocity of a rectified flow (arXiv
            2209.03003, eq. 1, with t = 1 at the noise); "edm", the target of unit variance of arXiv 2206.00364,
            appendix B.6, (x_0 - c_skip x_t) / c_out.
        sigma_data: standard deviation of the data, for "edm".

    Raises:
        ValueError: for any other `prediction`.
    """
    if prediction == "eps":
        return eps
    if prediction in ("v", "eps_v"):
        return alpha * eps - sigma * x_0
    if prediction == "x_0":
        return x_0
    if prediction == "flow":
        return eps - x_0
    if prediction == "edm":  # written so that nothing is divided by sigma
        return (sigma / sigma_data * x_0 - sigma_data * alpha * eps) / _deviation(alpha, sigma, sigma_data)
    raise ValueError(f"prediction must be one of {PREDICTIONS}, not {prediction!r}")


def preconditioning(prediction, alpha, sigma, sigma_data=SIGMA_DATA):
    """How x_0 follows from the network's output: x_0 = c_skip x_t + c_out network(c_in x_t).

    For "edm" these are table 1 of arXiv 2206.00364 with sigma / alpha for its sigma and x_t / alpha for its x, in a
    form that holds at alpha = 0 too. Its c_noise, a function of sigma alone, is t here. "v", "eps_v" and "flow" hold
    for any alpha and sigma, at either end; "eps" needs alpha > 0, and makes an error of the network sigma / alpha times
    as large in x_0: 20,000 times where the cosine schedule ends.

    Returns:
        (c_skip, c_out, c_in), each a number or the shape of `alpha`.

    Raises:
        ValueError: for a `prediction` that is none of PREDICTIONS.
    """
    if prediction == "eps":
        return 1.0 / alpha, -sigma / alpha, 1.0
    if prediction in ("v", "eps_v"):
        power = alpha**2 + sigma**2  # 1, except in a flow
        return alpha / power, -sigma / power, 1.0
    if prediction == "x_0":
        return 0.0, 1.0, 1.0
    if prediction == "flow":
        return 1.0 / (alpha + sigma), -sigma / (alpha + sigma), 1.0
    if prediction == "edm":
        deviation = _deviation(alpha, sigma, sigma_data)
        return sigma_data**2 * alpha / deviation**2, sigma * sigma_data / deviation, 1.0 / deviation
    raise ValueError(f"prediction must be one of {PREDICTIONS}, not {prediction!r}")


def to_input(prediction, x_t, alpha, sigma, sigma_data=SIGMA_DATA):
    """What the network is shown of x_t: c_in x_t.

    Raises:
        ValueError: for a `prediction` that is none of PREDICTIONS.
    """
    return preconditioning(prediction, alpha, sigma, sigma_data)[2] * x_t


def to_x_0(prediction, output, x_t, alpha, sigma, sigma_data=SIGMA_DATA):
    """The clean data that a network's output stands for: the inverse of `to_target`, given x_t.

    Raises:
        ValueError: for a `prediction` that is none of PREDICTIONS.
    """
    c_skip, c_out, _ = preconditioning(prediction, alpha, sigma, sigma_data)
    return c_skip * x_t + c_out * output


def error_scale(prediction, alpha, sigma):
    """What an error of the network's output counts in the loss: 1, but for "eps_v".

    There the network says v, and eps = (sigma x_t + alpha v) / (alpha^2 + sigma^2): an error of v is one of
    alpha / (alpha^2 + sigma^2) times its size in eps, which is what DDPM's loss is about (arXiv 2006.11239, eq. 14).
    Near t = 1 the network need not learn that eps is all but x_t, and its errors are not divided by alpha in x_0.

    Returns:
        A number, or the shape of `alpha`.
    """
    return alpha / (alpha**2 + sigma**2) if prediction == "eps_v" else 1.0


def min_snr_weight(prediction, alpha, sigma, gamma, sigma_data=SIGMA_DATA):
    """Weight of the squared error of the network's output under min-SNR-gamma (arXiv 2303.09556, section 3.4).

    An error in x_0 weighs min(SNR, gamma), SNR = alpha^2 / sigma^2, whatever the network predicts. Since an error in
    the output is c_out times as large in x_0, that is min(SNR, gamma) c_out^2: min(SNR, gamma) / SNR for eps and
    min(SNR, gamma) / (SNR + 1) for v, as in the paper. Finite at sigma = 0, and at alpha = 0 except for "eps".

    Args:
        gamma: the paper's is 5.

    Returns:
        float, the shape of `alpha`.
    """
    _, c_out, _ = preconditioning(prediction, alpha, sigma, sigma_data)
    return ops.minimum(alpha**2 / sigma**2, gamma) * c_out**2  # x / 0 is infinite, and gamma is less


def to_eps(x_0, x_t, alpha, sigma):
    """The noise that turns x_0 into x_t; sigma must not be 0."""
    return (x_t - alpha * x_0) / sigma


def _deviation(alpha, sigma, sigma_data):
    """Standard deviation of x_t."""
    return (sigma**2 + (sigma_data * alpha) ** 2) ** 0.5


def _between(table, t):
    """The T + 1 entries of a table, read at t in [0, 1], linearly between two of them."""
    position = ops.clip(_float32(t), 0.0, 1.0) * TABLE_LENGTH
    lower = ops.clip(ops.floor(position), 0, TABLE_LENGTH - 1)
    index, table = ops.cast(lower, "int32"), ops.convert_to_tensor(table)
    left, right = ops.take(table, index), ops.take(table, index + 1)
    return left + (position - lower) * (right - left)


def _float32(t):
    return ops.cast(ops.convert_to_tensor(t), "float32")


def _from_log_alpha(log_alpha):
    # sigma^2 = 1 - alpha^2; expm1 keeps its digits where alpha is close to 1.
    return ops.exp(log_alpha), ops.sqrt(-ops.expm1(2.0 * log_alpha))
