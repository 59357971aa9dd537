"""Differentiable comparisons of two batches of images, (B, H, W, 1) in [-1, 1]. Each returns a float32 scalar."""

from keras import ops


def mean_squared(real, fake):
    """Mean squared error."""
    return ops.mean(ops.square(_exact(real) - _exact(fake)))


def mean_absolute(real, fake):
    """Mean absolute error."""
    return ops.mean(ops.abs(_exact(real) - _exact(fake)))


def structural_dissimilarity(real, fake, window=7):
    """1 - SSIM over uniform square windows of every second pixel (Wang et al. 2004, eq. 13), the data range being 2.

    The metric of `ldm.metrics` has a Gaussian window; this one is its cheap cousin for training.
    """
    real, fake = _exact(real), _exact(fake)
    maps = ops.concatenate([real, fake, real * real, fake * fake, real * fake], axis=-1)
    mean_r, mean_f, rr, ff, rf = ops.split(ops.average_pool(maps, window, strides=2), 5, axis=-1)
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    luminance = (2 * mean_r * mean_f + c1) / (mean_r**2 + mean_f**2 + c1)
    structure = (2 * (rf - mean_r * mean_f) + c2) / (rr - mean_r**2 + ff - mean_f**2 + c2)
    return 1.0 - ops.mean(luminance * structure)


def _exact(x):
    return ops.cast(x, "float32")
