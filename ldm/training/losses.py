"""What training minimises, and what it watches: comparisons of batches of images, the GAN's terms, the KL's cycles.

Images are (B, H, W, 1) in [-1, 1]. Everything is computed in float32; losses are scalars.
"""

import numpy as np
from einops import rearrange
from keras import ops


def mean_squared(real, fake):
    """Mean squared error."""
    return ops.mean(ops.square(_exact(real) - _exact(fake)))


def mean_absolute(real, fake):
    """Mean absolute error."""
    return ops.mean(ops.abs(_exact(real) - _exact(fake)))


def structural_dissimilarity(real, fake, window=7):
    """1 - SSIM over uniform square windows of every second pixel (Wang et al. 2004, eq. 13), the data range being 2.

    The metric of `ldm.judging.metrics` has a Gaussian window; this one is its cheap cousin for training. Black must
    be 0 here as there: the luminance term compares ratios, so it is what keeps the background black.
    """
    real, fake = _exact(real) + 1.0, _exact(fake) + 1.0
    maps = ops.concatenate([real, fake, real * real, fake * fake, real * fake], axis=-1)
    mean_r, mean_f, rr, ff, rf = ops.split(ops.average_pool(maps, window, strides=2), 5, axis=-1)
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    luminance = (2 * mean_r * mean_f + c1) / (mean_r**2 + mean_f**2 + c1)
    structure = (2 * (rf - mean_r * mean_f) + c2) / (rr - mean_r**2 + ff - mean_f**2 + c2)
    return 1.0 - ops.mean(luminance * structure)


# Power of a band below which nothing is asked for: at 3e-5 the decoder answered with a grid (docs/results.md).
LEAST_DETAIL = 1.5e-4
TEXTURE_STEPS = 1000  # of training, over which what is asked for rises (docs/results.md, likewise)
TEXTURE_BANDS = ((0.5, 1.0), (0.7, 1.4))  # sigmas in pixels: twice a difference of Gaussians, periods of 3.3 and 4.6


def texture_difference(real, fake, window=16):
    """How much the power of two bands of detail differs in each neighbourhood: the mean of |log power - log power|.

    What a decoder cannot know it leaves out, since guesses cost squared error: pictures become soft. This asks for as
    much fine detail as the real slice has thereabouts, wherever it lies, as losses of the power spectrum do for the
    whole picture (arXiv 2003.01826, section 4); in windows, so that the sharp edge of a head does not stand for its
    cortex. Where the real slice has next to none, in the background, nothing is asked.

    Args:
        real, fake: (B, H, W, 1) in [-1, 1].
        window: side in pixels of a neighbourhood, at most the shorter side's; one begins at every half of it.

    Returns:
        A scalar, 0 where all power agrees.
    """
    total, window = 0.0, min(window, *real.shape[1:3])
    for fine, coarse in TEXTURE_BANDS:
        powers = []
        for detail in (_exact(real) + 1.0, _exact(fake) + 1.0):  # black is 0, as beyond the edge
            for _ in range(2):  # once would leave more of the coarse waves than there is of the fine ones
                detail = _blurred(detail, fine) - _blurred(detail, coarse)
            powers.append(ops.average_pool(ops.square(detail), window, strides=window // 2))
        there = ops.cast(powers[0] > LEAST_DETAIL, "float32")
        apart = ops.abs(ops.log(powers[1] + 1e-6) - ops.log(powers[0] + 1e-6))
        total += ops.sum(there * apart) / ops.maximum(ops.sum(there), 1.0)
    return total / len(TEXTURE_BANDS)


def histogram_difference(real, fake, window=16):
    """How much the histograms of each neighbourhood differ: of its grey levels, and of its detail of two sizes.

    Where a decoder cannot know how a fold runs, the middle between grey and white matter costs least, cut by thin dark
    lines: the power may be right, and still grey matter is too bright and its detail too skewed. This asks for the
    right values wherever they lie: it is the Wasserstein distance of the two sets, which in one dimension is the mean
    difference of sorted values (arXiv 2006.07229, section 3; a loss of histograms is in arXiv 1701.08893).

    Args:
        real, fake: (B, H, W, 1) in [-1, 1].
        window: side in pixels of a neighbourhood, at most the shorter side. They tile the picture twice: from the top
            left, and so that they end at the bottom right, or lie half a window further where the first fit exactly; of
            a picture that no windows fit, they may leave out corners. Of the coarser detail, which is that of pictures
            of half the size, each covers twice as much.

    Returns:
        A scalar, 0 where all sets agree: |grey level| + 2 |finer detail| + 2 |coarser detail|.
    """
    total = 0.0
    for weight, ours, theirs in zip((1, 2, 2), _greys_and_detail(real), _greys_and_detail(fake), strict=True):
        sides = ours.shape[1:3]
        side = min(window, *sides)
        # where a side is a multiple of the window, the second tiling is shifted by half of it, if two fit
        second = [length % side or (side // 2 if length > side else 0) for length in sides]
        for top, left in ((0, 0), second):
            a, b = (_sorted_values(values[:, top:, left:], side) for values in (ours, theirs))
            total += weight / 2 * ops.mean(ops.abs(a - b))
    return total


def _greys_and_detail(image):
    """Images; their detail; and that of images of half the size."""
    image = _exact(image) + 1.0  # black is 0, as beyond the edge
    half = ops.average_pool(image, 2)
    return image, image - _blurred(image, 1.0), half - _blurred(half, 1.0)


def _sorted_values(image, side):
    """(B, H, W, 1) -> (N, side^2): the values of each square, the lowest first; what is left at the end is left out."""
    height, width = (length // side * side for length in image.shape[1:3])
    squares = rearrange(image[:, :height, :width], "b (h p) (w q) 1 -> (b h w) (p q)", p=side, q=side)
    return ops.sort(squares, axis=-1)


def texture_share(step):
    """Share of the texture losses' weights at a training step: it rises from 0 to 1 over the first TEXTURE_STEPS.

    A decoder that knows no detail yet would make what is asked for of a grid of its patches.
    """
    return ops.minimum(1.0, ops.cast(step, "float32") / TEXTURE_STEPS)


def _blurred(image, sigma):
    """(B, H, W, 1) under a Gaussian of so many pixels, zeros beyond the edge."""
    reach = int(np.ceil(3 * sigma))
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    window = (window / window.sum()).astype("float32")
    image = ops.conv(image, window.reshape(-1, 1, 1, 1), padding="same")
    return ops.conv(image, window.reshape(1, -1, 1, 1), padding="same")


# ---- watched, not minimised ------------------------------------------------------------------------------------------


def foreground_ssim(real, fake):
    """The metric of that name in `ldm.judging.metrics` as an operation, so that every validation can report it.

    GPUs may round convolutions to TF32, which moves it by up to 0.01.

    Returns:
        (B,) float32: SSIM under an 11x11 Gaussian window, averaged where the real slice is brighter than 0.05 of the
        range; and (B,) float32: 1 where a slice has such pixels, 0 where it has none and nothing can be said.
    """
    x, y = (ops.clip((_exact(image) + 1.0) / 2.0, 0.0, 1.0) for image in (real, fake))
    offset = np.arange(-5, 6)
    window = np.exp(-0.5 * (offset / 1.5) ** 2)
    window = (window / window.sum()).astype("float32")

    def mean(image):
        image = ops.conv(image, window.reshape(11, 1, 1, 1), padding="same")
        return ops.conv(image, window.reshape(1, 11, 1, 1), padding="same")

    mean_x, mean_y = mean(x), mean(y)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    covariance, variance = mean(x * y) - mean_x * mean_y, mean(x * x + y * y) - mean_x**2 - mean_y**2
    similarity = luminance * (2 * covariance + c2) / (variance + c2)
    brain = ops.cast(x > 0.05, "float32")
    pixels = ops.sum(brain, axis=(1, 2, 3))
    return ops.sum(similarity * brain, axis=(1, 2, 3)) / ops.maximum(pixels, 1.0), ops.cast(pixels > 0, "float32")


# ---- a GAN's two sides -----------------------------------------------------------------------------------------------


def hinge_discriminator(real, fakes):
    """Hinge loss of the discriminator (arXiv 1705.02894, eq. 3), real and fake weighing the same.

    Args:
        real: logits of real images, any shape.
        fakes: list of logits, one for each kind of fake; they share the fakes' half evenly.
    """
    fake = sum(ops.mean(ops.relu(1.0 + _exact(logits))) for logits in fakes) / len(fakes)
    return 0.5 * (ops.mean(ops.relu(1.0 - _exact(real))) + fake)


def hinge_generator(fakes):
    """What the generator minimises against it: the mean logit of its pictures, negated; kinds of fakes as above."""
    return -sum(ops.mean(_exact(logits)) for logits in fakes) / len(fakes)


def contrastive(projections, temperature):
    """Cross-entropy of finding each row's partner among all others, by cosine (SimCLR, arXiv 2002.05709, eq. 1).

    Args:
        projections: (2 N, D); rows 2 i and 2 i + 1 are partners.
        temperature: divides the cosines.

    Returns:
        A scalar in nats; log(2 N - 1) for projections that tell nothing.
    """
    unit = ops.normalize(_exact(projections), axis=-1)
    rows = ops.shape(unit)[0]
    myself = ops.eye(rows)
    logits = ops.matmul(unit, ops.transpose(unit)) / temperature - 1e9 * myself
    number = ops.arange(rows)
    partner = number + 1 - 2 * (number % 2)
    chosen = ops.take_along_axis(logits, partner[:, None], axis=1)[:, 0]
    return ops.mean(ops.logsumexp(logits, axis=-1) - chosen)


# ---- the rest --------------------------------------------------------------------------------------------------------


def cyclical(step, cycles, cycle_steps):
    """Share of a weight that is annealed in cycles (arXiv 1903.10145, eq. 6, with R = 0.5), then stays.

    Each cycle rises from 0 to 1 over its first half and stays there over its second; after the last cycle it is 1.

    Args:
        step: training step, an integer tensor.
        cycles: their number.
        cycle_steps: steps that all cycles take together; 0 for a share of 1 throughout.
    """
    if not cycles or not cycle_steps:
        return ops.convert_to_tensor(1.0)
    step, length = ops.cast(step, "float32"), cycle_steps / cycles
    rising = ops.minimum(1.0, 2.0 * (step % length) / length)
    return ops.where(step >= cycle_steps, 1.0, rising)


def segmentation(logits, tissue, pixels=None):
    """Cross-entropy in nats of tissue classes, over the pixels whose class is known.

    Args:
        logits: (B, H, W, K).
        tissue: (B, H, W) int32; -1 is unknown.
        pixels: how many are known; counted here if left out.
    """
    logits = _exact(logits)
    known = ops.cast(tissue >= 0, "float32")
    log_share = logits - ops.logsumexp(logits, axis=-1, keepdims=True)
    chosen = ops.one_hot(ops.maximum(tissue, 0), logits.shape[-1])
    return -ops.sum(known * ops.sum(chosen * log_share, axis=-1)) / ops.maximum(
        ops.sum(known) if pixels is None else pixels, 1.0
    )


def _exact(x):
    return ops.cast(x, "float32")
