"""Noise schedules, and the three things a denoiser may predict.

Here lives everything about x_t = alpha(t) x_0 + sigma(t) eps: the functions t -> (alpha, sigma) with
alpha^2 + sigma^2 = 1 and t in [0, 1] (t = 1 is noise), and the conversions between eps, v and x_0. A schedule is a
plain function, so a new one needs no class. Everything is computed in float32.
"""

import numpy as np
from keras import ops

TABLE_LENGTH = 1000  # T of the classic discrete chain

# The smallest alpha that a schedule returns. cos(pi / 2) is 0, and a network that predicts eps has x_0 divided by
# alpha; the discrete cosine table avoids this by clipping beta at 0.999, which leaves about the same alpha at t = 1.
SMALLEST_ALPHA = 4.9e-5

_BETAS = np.linspace(1e-4, 0.02, TABLE_LENGTH)
_LOG_ALPHA_TABLE = np.concatenate([[0.0], 0.5 * np.cumsum(np.log1p(-_BETAS))]).astype("float32")


def linear(t):
    """Linear beta schedule of DDPM: beta from 1e-4 to 0.02 in T = 1000 steps (arXiv 2006.11239, section 4).

    The table alpha_bar_i is read at t = i / T; between two entries log(alpha) is interpolated.

    Args:
        t: float in [0, 1], any shape.

    Returns:
        (alpha, sigma), float32, the shape of `t`.
    """
    position = ops.clip(_float32(t), 0.0, 1.0) * TABLE_LENGTH
    lower = ops.clip(ops.floor(position), 0, TABLE_LENGTH - 1)
    index = ops.cast(lower, "int32")
    table = ops.convert_to_tensor(_LOG_ALPHA_TABLE)
    left, right = ops.take(table, index), ops.take(table, index + 1)
    return _from_log_alpha(left + (position - lower) * (right - left))


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


SCHEDULES = {"linear": linear, "cosine": cosine, "sigmoid": sigmoid}


def log_snr(alpha, sigma):
    """Log signal-to-noise ratio, log(alpha^2 / sigma^2)."""
    return 2.0 * (ops.log(alpha) - ops.log(sigma))


# ---- what the network predicts ---------------------------------------------------------------------------------------
# alpha and sigma broadcast against x: shape (B, 1, 1, 1) for images. All three carry the same information once x_t is
# known; they differ in which noise levels the mean squared error weighs most.

PREDICTIONS = ("eps", "v", "x_0")


def add_noise(x_0, eps, alpha, sigma):
    """Forward process: x_t = alpha x_0 + sigma eps (arXiv 2006.11239, eq. 4)."""
    return alpha * x_0 + sigma * eps


def to_target(prediction, x_0, eps, alpha, sigma):
    """What the network should say, given clean data and noise.

    Args:
        prediction: "eps", "v" (arXiv 2202.00512, appendix D: v = alpha eps - sigma x_0) or "x_0".

    Raises:
        ValueError: for any other `prediction`.
    """
    if prediction == "eps":
        return eps
    if prediction == "v":
        return alpha * eps - sigma * x_0
    if prediction == "x_0":
        return x_0
    raise ValueError(f"prediction must be one of {PREDICTIONS}, not {prediction!r}")


def to_x_0(prediction, output, x_t, alpha, sigma):
    """The clean data that a network output stands for: the inverse of `to_target`, given x_t.

    Raises:
        ValueError: for a `prediction` that is none of PREDICTIONS.
    """
    if prediction == "eps":
        return (x_t - sigma * output) / alpha
    if prediction == "v":
        return alpha * x_t - sigma * output
    if prediction == "x_0":
        return output
    raise ValueError(f"prediction must be one of {PREDICTIONS}, not {prediction!r}")


def to_eps(x_0, x_t, alpha, sigma):
    """The noise that turns x_0 into x_t; sigma must not be 0."""
    return (x_t - alpha * x_0) / sigma


def _float32(t):
    return ops.cast(ops.convert_to_tensor(t), "float32")


def _from_log_alpha(log_alpha):
    # sigma^2 = 1 - alpha^2; expm1 keeps its digits where alpha is close to 1.
    return ops.exp(log_alpha), ops.sqrt(-ops.expm1(2.0 * log_alpha))
