"""How alike two pictures are: SSIM, PSNR, MAE, and the trivial predictors every score must be read against.

Everything here is a plain function on arrays (numpy and scipy): no model, no dataset, no plotting, nothing of ours.

Images are float arrays of shape (N, H, W) or (N, H, W, 1) in **[0, 1]**, background exactly 0. The rest of the project
works in [-1, 1], so callers write `to_unit(images)` first; an array that leaves [0, 1] is refused, because SSIM and
PSNR with the wrong data range give a number that looks perfectly plausible.

Why two SSIMs: on skull-stripped slices most pixels are background, where any two black images agree perfectly. An
all-black image therefore reaches a whole-image SSIM of about 0.69 on 20 held-out OASIS people at 256 x 256, and the
mean training image of the same slice index about 0.84. Over the brain alone the same two score 0.00 and about 0.43.
Report both numbers, and put the trivial predictors in the same table: `beside_trivial`.

References:
    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity",
    IEEE Transactions on Image Processing 13(4), 2004, doi:10.1109/TIP.2003.819861.
    Wang, Simoncelli, Bovik, "Multi-scale structural similarity for image quality assessment", 37th Asilomar Conference
    on Signals, Systems and Computers, 2003, doi:10.1109/ACSSC.2003.1292216.
"""

from collections.abc import Iterable

import numpy as np
from scipy import ndimage

K1, K2 = 0.01, 0.03  # Wang et al. 2004, section III-C
DATA_RANGE = 1.0
# A pixel is brain where the real slice is brighter than this. Not 0: of the pixels in (0, 0.05] on OASIS slices, 96 %
# lie within 3 pixels of the outline. They are the faint rim that resampling leaves around a skull-stripped brain, next
# to background on which everything agrees, and they alone lift an all-black image from 0.000 to 0.012.
FOREGROUND = 0.05
TRUNCATE = 3.5  # window radius in sigmas: int(3.5 * 1.5 + 0.5) = 5, the 11 x 11 window of the paper
WINDOW = 11
MEAN_IMAGE, BLACK = "mean image of the slice index", "black"  # predictors that know nothing of the slice
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, section 3.2, fine to coarse


def to_unit(images) -> np.ndarray:
    """[-1, 1], the range of the networks, to [0, 1], that of the metrics; what lies beyond is clipped."""
    unit = np.array(images, "float32")
    unit += 1
    unit /= 2
    return np.clip(unit, 0, 1, out=unit)  # in place: of a whole split each copy is gigabytes


def _as_stack(images: np.ndarray, name: str = "images") -> np.ndarray:
    """Return `images` as (N, H, W), refusing any other shape and any value outside [0, 1] (NaN included)."""
    images = np.asarray(images)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.ndim != 3:
        raise ValueError(f"{name} must have shape (N, H, W) or (N, H, W, 1), not {images.shape}")
    if images.dtype == np.uint8:
        raise ValueError(f"{name} are uint8: divide by 255 first, metrics take floats in [0, 1]")
    # The slack forgives float32 rounding. `not (...)` also catches NaN, which fails every comparison.
    if images.size and not (images.min() >= -1e-4 and images.max() <= 1 + 1e-4):
        raise ValueError(
            f"{name} must lie in [0, 1], but span [{images.min():.3g}, {images.max():.3g}]; "
            "convert from [-1, 1] with to_unit"
        )
    return images


def _as_pair(real: np.ndarray, fake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both stacks as (N, H, W), refusing pairs whose shapes differ (numpy would silently broadcast)."""
    real, fake = _as_stack(real, "real"), _as_stack(fake, "fake")
    if real.shape != fake.shape:
        raise ValueError(f"real and fake must have the same shape, not {real.shape} and {fake.shape}")
    return real, fake


def _ssim_factors(x: np.ndarray, y: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Luminance and contrast-structure maps of one pair (H, W), whose product is SSIM, Wang et al. 2004, equation 13.

    Every moment is taken under the Gaussian window of equation 14.
    """

    def window(image: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(image, sigma, mode="constant", cval=0.0, truncate=TRUNCATE)

    c1, c2 = (K1 * DATA_RANGE) ** 2, (K2 * DATA_RANGE) ** 2
    mean_x, mean_y = window(x), window(y)
    # Population moments: E[xy] - E[x]E[y], without the n / (n - 1) of the sample covariance.
    variance_x = window(x * x) - mean_x * mean_x
    variance_y = window(y * y) - mean_y * mean_y
    covariance = window(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    contrast_structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return luminance, contrast_structure


def ssim_map(real: np.ndarray, fake: np.ndarray, sigma: float = 1.5) -> np.ndarray:
    """Local structural similarity around every pixel.

    The borders are padded with zeros, as a conv2d with "same" padding does, so that numbers compare with those of
    convolution-based implementations. For skull-stripped slices, whose border is background, the padding is exact.

    Args:
        real: images, (N, H, W) or (N, H, W, 1), in [0, 1].
        fake: images of the same shape, in [0, 1].
        sigma: standard deviation of the Gaussian window in pixels; 1.5 gives the paper's 11 x 11 window.

    Returns:
        SSIM in [-1, 1], 1 where the neighbourhoods are identical, (N, H, W), float32.

    Raises:
        ValueError: if the shapes differ or values leave [0, 1].
    """
    real, fake = _as_pair(real, fake)
    # Slice by slice: the dozen intermediates stay in the processor's cache, and memory does not grow with N.
    # float64: E[x^2] - E[x]^2 cancels, and c2 is only 9e-4.
    result = np.empty(real.shape, np.float32)
    for n, (x, y) in enumerate(zip(real, fake, strict=True)):
        luminance, contrast_structure = _ssim_factors(x.astype(np.float64), y.astype(np.float64), sigma)
        result[n] = luminance * contrast_structure
    return result


def ssim(real: np.ndarray, fake: np.ndarray) -> np.ndarray:
    """Mean SSIM over the whole image, background included: flattering on brain slices (see the module docstring).

    Args:
        real: images, (N, H, W) or (N, H, W, 1), in [0, 1].
        fake: images of the same shape, in [0, 1].

    Returns:
        (N,) in [-1, 1].
    """
    return ssim_map(real, fake).mean(axis=(1, 2), dtype=np.float64)


def foreground_ssim(real: np.ndarray, fake: np.ndarray, threshold: float = FOREGROUND) -> np.ndarray:
    """Mean of the SSIM map over the brain: the pixels of the *real* slice brighter than `threshold`.

    The mask comes from the real slice alone, so a fake cannot improve its score by shrinking its own brain.

    Args:
        real: images, (N, H, W) or (N, H, W, 1), in [0, 1], background exactly 0.
        fake: images of the same shape, in [0, 1].
        threshold: grey value in [0, 1) above which a real pixel counts as brain; see `FOREGROUND` for the default.

    Returns:
        (N,) in [-1, 1]; NaN for a slice whose real image has no foreground, since nothing can be said about it.
        Aggregate with ``np.nanmean`` where such slices may occur.
    """
    foreground = _as_stack(real, "real") > threshold
    similarity = ssim_map(real, fake)
    pixels = foreground.sum(axis=(1, 2))
    total = np.where(foreground, similarity, 0.0).sum(axis=(1, 2), dtype=np.float64)
    return np.divide(total, pixels, out=np.full(len(total), np.nan), where=pixels > 0)


def ms_ssim_weights(height: int, width: int) -> np.ndarray:
    """The weight of each scale that `ms_ssim` uses on pictures of this size; print their number beside the score.

    A scale counts only if the 11 x 11 window fits into its picture, and at least one does always: five scales from 176
    pixels on, 4 at 128, 3 at 64. The published weights of those that are left are divided by their sum, so scores of
    different picture sizes do not compare.

    Args:
        height: of the picture, in pixels.
        width: of the picture, in pixels.

    Returns:
        (scales,), fine to coarse, adding up to 1 (as published, the five add up to 1.0001).
    """
    scales = sum(min(height, width) >> scale >= WINDOW for scale in range(len(SCALE_WEIGHTS)))
    weights = np.array(SCALE_WEIGHTS[: max(scales, 1)])
    return weights / weights.sum()


def _halve(image: np.ndarray) -> np.ndarray:
    """Mean of every 2 x 2 pixels, (H, W) -> (ceil(H / 2), ceil(W / 2)); beyond an odd border lies background."""
    image = np.pad(image, [(0, size % 2) for size in image.shape])
    return (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) / 4


def ms_ssim(real: np.ndarray, fake: np.ndarray) -> np.ndarray:
    """Multi-scale SSIM over the whole image, Wang et al. 2003, equation 7, with the window and padding of `ssim_map`.

    The mean contrast-structure of every scale and the mean SSIM of the coarsest, each to the power of its weight,
    multiplied. Pictures too small for five scales have fewer: see `ms_ssim_weights`. Such a mean can be negative (two
    pictures that are each other's negative), and a negative number has no real power: it counts as 0, and so does the
    product. Like `ssim`, this is flattering where most of the picture is background.

    Args:
        real: images, (N, H, W) or (N, H, W, 1), in [0, 1].
        fake: images of the same shape, in [0, 1].

    Returns:
        (N,) in [0, 1], 1 for identical images.

    Raises:
        ValueError: if the shapes differ or values leave [0, 1].
    """
    real, fake = _as_pair(real, fake)
    weights = ms_ssim_weights(*real.shape[1:])
    result = np.ones(len(real))
    for n, (x, y) in enumerate(zip(real, fake, strict=True)):
        x, y = x.astype(np.float64), y.astype(np.float64)
        for scale, weight in enumerate(weights):
            if scale:
                x, y = _halve(x), _halve(y)
            luminance, contrast_structure = _ssim_factors(x, y, sigma=1.5)
            coarsest = scale == len(weights) - 1
            similarity = (luminance * contrast_structure if coarsest else contrast_structure).mean()
            result[n] *= max(similarity, 0.0) ** weight
    return result


def psnr(real: np.ndarray, fake: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio, -10 log10(mean squared error), for a data range of 1.

    Args:
        real: images, (N, H, W) or (N, H, W, 1), in [0, 1].
        fake: images of the same shape, in [0, 1].

    Returns:
        (N,) in dB; infinity where the two images are identical.
    """
    real, fake = _as_pair(real, fake)
    squared_error = np.square(real.astype(np.float64) - fake).mean(axis=(1, 2))
    with np.errstate(divide="ignore"):  # log10(0) = -inf is the answer for identical images, not an accident
        return 10 * np.log10(DATA_RANGE**2) - 10 * np.log10(squared_error)


def mae(real: np.ndarray, fake: np.ndarray) -> np.ndarray:
    """Mean absolute error in grey values of [0, 1].

    Args:
        real: images, (N, H, W) or (N, H, W, 1), in [0, 1].
        fake: images of the same shape, in [0, 1].

    Returns:
        (N,) in [0, 1].
    """
    real, fake = _as_pair(real, fake)
    return np.abs(real.astype(np.float64) - fake).mean(axis=(1, 2))


def neighbour_correlation(images: np.ndarray) -> float:
    """How much consecutive slices of a stack agree: the mean correlation of neighbours' pixels, where either is brain.

    Args:
        images: slices of one person in order, (N, H, W) or (N, H, W, 1), in [0, 1].

    Returns:
        In [-1, 1]; NaN if no two neighbours have contrast.
    """
    images = _as_stack(images)
    values = []
    for one, other in zip(images[:-1], images[1:], strict=True):
        brain = (one > FOREGROUND) | (other > FOREGROUND)
        if brain.any() and one[brain].std() > 0 and other[brain].std() > 0:
            values.append(np.corrcoef(one[brain], other[brain])[0, 1])
    return float(np.mean(values)) if values else float("nan")


def dice(real: np.ndarray, fake: np.ndarray, classes: tuple[int, ...] = (1, 2, 3)) -> list[float]:
    """Dice coefficient of each class over all slices together, 2 |A and B| / (|A| + |B|) (Dice 1945).

    Over all slices, because a tissue that is absent from one slice would make that slice's own coefficient 0 or 0 / 0.

    Args:
        real: class of each pixel, (N, H, W) integers; negative is unknown, and left out.
        fake: classes that were predicted, of the same shape.
        classes: those to score.

    Returns:
        One number in [0, 1] for each class; NaN for a class that neither has.
    """
    real, fake = np.asarray(real), np.asarray(fake)
    if real.shape != fake.shape:
        raise ValueError(f"real and fake must have the same shape, not {real.shape} and {fake.shape}")
    known = real >= 0
    result = []
    for number in classes:
        a, b = (real == number) & known, (fake == number) & known
        both = a.sum() + b.sum()
        result.append(float(2 * (a & b).sum() / both) if both else float("nan"))
    return result


def all_scores(real: np.ndarray, fake: np.ndarray) -> dict[str, np.ndarray]:
    """Every similarity of this room, for pairs of images (N, H, W, 1) in [0, 1]: {name: (N,)}."""
    measures = {"SSIM": ssim, "foreground SSIM": foreground_ssim, "MS-SSIM": ms_ssim, "PSNR": psnr, "MAE": mae}
    return {name: measure(real, fake) for name, measure in measures.items()}


def over_people(scores: dict[str, np.ndarray], case: np.ndarray) -> dict[str, list[float]]:
    """{name: (N,)} and the person of each slice -> {name: [mean over slices, standard deviation over people]}.

    Slices without a score (NaN) do not count.
    """
    result = {}
    for name, values in scores.items():
        people = [np.nanmean(values[case == person]) for person in np.unique(case)]
        result[name] = [float(np.nanmean(values)), float(np.std(people))]
    return result


def trivial_predictions(mean: dict[int, np.ndarray], z: np.ndarray) -> dict[str, np.ndarray]:
    """What two predictors say that know nothing of the slice, at most its index: {MEAN_IMAGE, BLACK: (N, H, W, 1)}.

    Args:
        mean: of the training people, from `mean_images`.
        z: (N,) integer slice indices.
    """
    guess = mean_image_prediction(mean, z)[..., None]
    return {MEAN_IMAGE: guess, BLACK: np.zeros_like(guess)}


def beside_trivial(
    real: np.ndarray, fake: np.ndarray, mean: dict[int, np.ndarray], z: np.ndarray, called: str = "first stage"
) -> dict[str, dict[str, np.ndarray]]:
    """The scores of a first stage beside those of the two predictors that know nothing of the slice.

    Args:
        real: images, (N, H, W, 1), in [0, 1].
        fake: what the first stage makes of them, likewise.
        mean, z: see `trivial_predictions`.
        called: the name of the first stage.

    Returns:
        {called, MEAN_IMAGE, BLACK: {score: (N,)}}, as `all_scores` gives them; `over_people` makes a row of each.
    """
    return {name: all_scores(real, guess) for name, guess in {called: fake, **trivial_predictions(mean, z)}.items()}


def mean_images(batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[int, np.ndarray]:
    """Mean image per slice index: the best guess of someone who knows the slice index and nothing about the person.

    Feed it slices of *training* people only. It reads the batches once and keeps one running sum per slice index, so a
    generator over a dataset of any size will do.

    Args:
        batches: iterable of (images, z); images (N, H, W) or (N, H, W, 1) in [0, 1], z the N integer slice indices.
            For arrays in memory, pass ``[(images, z)]``.

    Returns:
        slice index -> mean image (H, W), float32 in [0, 1], sorted by slice index.

    Raises:
        ValueError: if there is no image at all, or a batch has not as many indices as images.
    """
    sums: dict[int, np.ndarray] = {}
    counts: dict[int, int] = {}
    for images, z in batches:
        images, z = _as_stack(images), np.asarray(z).reshape(-1)
        if len(images) != len(z):
            raise ValueError(f"a batch holds {len(images)} images but {len(z)} slice indices")
        for index in np.unique(z).tolist():
            chosen = images[z == index]
            sums[index] = sums.get(index, 0.0) + chosen.sum(axis=0, dtype=np.float64)
            counts[index] = counts.get(index, 0) + len(chosen)
    if not sums:
        raise ValueError("no images to average")
    return {index: (sums[index] / counts[index]).astype(np.float32) for index in sorted(sums)}


def mean_image_prediction(train_mean: dict[int, np.ndarray], z: np.ndarray) -> np.ndarray:
    """Predict each slice as the mean training image of its slice index.

    Args:
        train_mean: slice index -> mean image (H, W), from `mean_images`.
        z: (N,) integer slice indices. One never seen in training takes the nearest seen one (the lower, on a tie).

    Returns:
        (N, H, W), same dtype as the means.

    Raises:
        ValueError: if `train_mean` is empty.
    """
    if not train_mean:
        raise ValueError("train_mean is empty: there is no mean image to predict with")
    known = np.array(sorted(train_mean))
    z = np.asarray(z).reshape(-1)
    # argmin takes the first minimum and `known` ascends: hence the lower index on a tie.
    nearest = known[np.abs(known[None, :] - z[:, None]).argmin(axis=1)]
    shape = train_mean[known[0].item()].shape
    return np.stack([train_mean[index] for index in nearest.tolist()]) if len(z) else np.empty((0, *shape), np.float32)
