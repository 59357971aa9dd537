"""Steering a denoiser: towards its conditions, away from others, and between two noises.

Everything here makes a `denoise(x_t, t) -> x_0` or an x_T for the samplers, and knows neither models nor samplers.
"""

import numpy as np

from ldm.later import ops


def guided(denoise, conditions, scale=1.0, rescale=0.0, negative=None, threshold=None):
    """Classifier-free guidance (arXiv 2207.12598, eq. 6): away from what the network says without the conditions.

    For a fixed x_t, x_0 and eps are linear in each other, so guiding x_0, unless it is clipped, is guiding eps. A step
    takes two network calls, unless the scale is 1.

    Args:
        denoise: callable (x_t, t, conditions) -> x_0; conditions may be None.
        conditions: as `denoise` takes them.
        scale: 1 is the network as it is, 0 ignores the conditions, more than 1 exaggerates them.
        rescale: share, in [0, 1], of the contrast that guidance added and that is taken back: the deviation of each
            guided x_0 is drawn towards that of the conditional one (arXiv 2305.08891, eq. 15 and 16, there for v).
        negative: conditions to move away from; None is no conditions at all.
        threshold: callable (x_0, t) -> x_0 that brings guided x_0 back into the range of the data: what guidance
            exaggerates leaves it, which no x_t in training has done (arXiv 2205.11487, section 2.3). None leaves them
            as they are.

    Returns:
        Callable (x_t, t) -> x_0.
    """

    def deviation(x):
        return ops.std(x, axis=tuple(range(1, len(x.shape))), keepdims=True)

    def denoise_guided(x_t, t):
        towards = denoise(x_t, t, conditions)
        if scale == 1.0:
            return towards
        away = denoise(x_t, t, negative)
        x_0 = away + scale * (towards - away)
        ratio = deviation(towards) / ops.maximum(deviation(x_0), 1e-6)
        x_0 = x_0 * (rescale * ratio + 1.0 - rescale)
        return x_0 if threshold is None else threshold(x_0, t)

    return denoise_guided


def spherical(first, last, count):
    """Points evenly spread on the arc between two noises, or two slices' latents, both ends included.

    It is spherical linear interpolation (Shoemake 1985, doi:10.1145/325334.325242). A straight line would pass through
    points shorter than noise ever is, which look to the network like less noise.

    Args:
        first, last: arrays of one shape.
        count: number of points, at least 2.

    Returns:
        (count, ...) float32.
    """
    if count < 2:
        raise ValueError(f"an interpolation needs at least 2 points, not {count}")
    first, last = np.asarray(first, "float64"), np.asarray(last, "float64")
    cosine = np.sum(first * last) / (np.linalg.norm(first) * np.linalg.norm(last))
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))
    share = np.linspace(0.0, 1.0, count).reshape(-1, *[1] * first.ndim)
    if np.sin(angle) < 1e-6:
        return ((1.0 - share) * first + share * last).astype("float32")
    return ((np.sin((1.0 - share) * angle) * first + np.sin(share * angle) * last) / np.sin(angle)).astype("float32")
