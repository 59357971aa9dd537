"""What eyes see first, as numbers: is a slice soft, is its white matter in islands, is its cortex a ribbon.

    power          spectral power at a few periods: softness shows at the short ones
    euler_number   pieces less holes: speckle makes many of either
    ribbon_width   mean width of a thin region, such as the cortex
    grey_peaks     how bright grey and white matter are, and how clearly they part
    residual_power the same of what a slice has beyond the mean image of its index: variety
    measure        images -> all of these, slice by slice

Plain functions on arrays. Images are floats (N, H, W) or (N, H, W, 1) in [0, 1], background 0 or nearly so.
"""

import numpy as np
from scipy import ndimage, signal

from ldm.judging import anatomy
from ldm.tissue import GREY

PERIODS = (16.0, 11.2, 8.0, 5.6, 4.4, 3.2)  # pixels of a picture of 256, where the cortex is about 4 wide
COARSE = (32.0, 16.0)  # the same, of what is left of a slice without the mean image of its index
SHORTEST = 2.2  # pixels: a picture shows no shorter period reliably
SOFT = (5.6, 4.4)  # the periods, in pixels of a picture of 256, at which softness shows first
SMOOTHING = 1.5  # pixels of a picture of 256
BRIGHT = 0.92  # share of white matter's peak above which it counts as bright
DARKEST = 0.45  # of white matter's peak: a darker one is not grey matter's
PROMINENT = 0.02  # of the histogram's highest point: a lower rise is no peak
POWER, RESIDUAL = "power at {:.3g} pixels", "residual power at {:.3g} pixels"  # names of what `measure` finds
ISLANDS, GREY_PIECES = "Euler number of bright white matter", "Euler number of grey matter"
RIBBON, GREY_PEAK, WHITE_PEAK = "width of the cortical ribbon", "grey matter's peak", "white matter's peak"
VALLEY, ONE_PEAK = "valley between the peaks", "share of slices in which grey matter has no peak"
RING = 1.15  # a ring of the spectrum goes from a frequency over this to the frequency times this


def power(images, periods):
    """Mean power spectral density at a few periods, in all directions.

    Args:
        images: (N, H, W) or (N, H, W, 1), any range; black borders do no harm, cut borders do.
        periods: P lengths in pixels, 2 or more.

    Returns:
        (N, P) float64: the mean of |F|^2 / (H W) over the ring of the spectrum around 1 / period, F being the discrete
        Fourier transform. White noise of variance v has v everywhere.

    Raises:
        ValueError: where a ring holds no frequency.
    """
    images = np.asarray(images, "float64")
    images = images[..., 0] if images.ndim == 4 else images
    height, width = images.shape[1:]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    # of a real picture half of the columns is kept; all but the first and the Nyquist one stand for two
    twice = np.where((np.arange(frequency.shape[1]) == 0) | (np.arange(frequency.shape[1]) * 2 == width), 1.0, 2.0)
    rings = []
    for period in periods:
        ring = twice * ((frequency >= 1 / period / RING) & (frequency < RING / period))
        if not ring.any():
            raise ValueError(
                f"pictures of {height}x{width} pixels have no frequency near a period of {period:g} pixels"
            )
        rings.append((ring / ring.sum()).ravel())
    found = [np.abs(np.fft.rfft2(image)).ravel() ** 2 @ np.stack(rings, axis=1) for image in images]
    return np.stack(found) / (height * width)


def euler_number(masks):
    """Pieces less holes of each mask; pieces hang together by edges or corners, holes by edges.

    Counted in the 2x2 squares of the picture (Gray, "Local properties of binary images in two dimensions", IEEE
    Transactions on Computers 20, 1971, doi:10.1109/T-C.1971.223289): a quarter of the squares with one pixel, less
    those with three, less twice those with two on a diagonal.

    Args:
        masks: (N, H, W) bool.

    Returns:
        (N,) int64.
    """
    padded = np.pad(np.asarray(masks, bool), ((0, 0), (1, 1), (1, 1)))
    corners = [padded[:, i : padded.shape[1] - 1 + i, j : padded.shape[2] - 1 + j] for i in (0, 1) for j in (0, 1)]
    filled = np.sum(corners, axis=0, dtype=np.int8)
    diagonal = (filled == 2) & (corners[0] == corners[3])
    count = [np.count_nonzero(squares, axis=(1, 2)) for squares in (filled == 1, filled == 3, diagonal)]
    return (count[0] - count[1] - 2 * count[2]) // 4


def outline_length(masks):
    """Length in pixels of the outlines of each mask, by how often lines in four directions cross them (Cauchy-Crofton).

    Args:
        masks: (N, H, W) bool.

    Returns:
        (N,) float64; an error of up to 5 % for straight outlines, less for curved ones.
    """
    padded = np.pad(np.asarray(masks, bool), ((0, 0), (1, 1), (1, 1)))

    def crossings(a, b):
        return np.count_nonzero(a != b, axis=(1, 2))

    straight = crossings(padded[:, 1:], padded[:, :-1]) + crossings(padded[:, :, 1:], padded[:, :, :-1])
    slanted = crossings(padded[:, 1:, 1:], padded[:, :-1, :-1]) + crossings(padded[:, 1:, :-1], padded[:, :-1, 1:])
    return np.pi / 8 * (straight + slanted / np.sqrt(2))  # lines on the diagonals lie closer together


def ribbon_width(masks):
    """Mean width of a thin region in pixels: twice its area over the length of its outlines, which run on both sides.

    Args:
        masks: (N, H, W) bool.

    Returns:
        (N,) float64; NaN for an empty mask.
    """
    area, length = np.count_nonzero(masks, axis=(1, 2)), outline_length(masks)
    return np.divide(2.0 * area, length, out=np.full(len(area), np.nan), where=length > 0)


def grey_peaks(images):
    """The two bright peaks in the grey levels of each brain, and the valley between them.

    Args:
        images: (N, H, W) or (N, H, W, 1) in [0, 1].

    Returns:
        (N, 3) float64: grey level of grey matter's peak, of white matter's, and how low the histogram is between them
        over the lower of the two. NaN for the first and the last where one peak is all there is, and for a slice
        without brain.
    """
    images = anatomy.as_stack(images)
    found = np.full((len(images), 3), np.nan)
    for row, image in zip(found, images, strict=True):
        values = image[image > anatomy.BACKGROUND]
        if not len(values):
            continue
        counts, edges = np.histogram(values, bins=128, range=(0, 1))
        smooth, level = ndimage.gaussian_filter1d(counts / counts.sum(), 3.0), (edges[1:] + edges[:-1]) / 2
        smooth = np.concatenate([[0], smooth, [0]])  # a peak at an end is one
        peaks, about = signal.find_peaks(smooth, prominence=PROMINENT * smooth.max())
        white = peaks[-1]
        row[1] = level[white - 1]
        grey = peaks[:-1][level[peaks[:-1] - 1] > DARKEST * row[1]]  # lower ones are fluid, and the rim of the brain
        if len(grey):
            grey = grey[np.argmax(about["prominences"][:-1][-len(grey) :])]
            row[0], row[2] = level[grey - 1], smooth[grey:white].min() / min(smooth[grey], smooth[white])
    return found


def shown(periods, size):
    """Those periods, given in pixels of a picture of 256, that a picture of `size` pixels shows, in its own pixels."""
    return [period * size / 256 for period in periods if period * size / 256 >= SHORTEST]


def soft_periods(size):
    """The periods of `measure` at which softness is judged: those of `SOFT`, or the shortest that is shown."""
    return shown(SOFT, size) or shown(PERIODS, size)[-1:]


def _named(name, images, periods):
    """`power` as {name of the period: (N,)}; empty where there is no period."""
    found = power(images, periods).T if periods else []
    return {name.format(period): values for period, values in zip(periods, found, strict=True)}


def measure(images, mean=None, tissue=None):
    """All of the above for each slice: name -> (N,) float64, NaN where there is nothing to measure.

    Args:
        images: (N, H, W) or (N, H, W, 1) in [0, 1].
        mean: (N, H, W) the mean image of each slice's index; None leaves out what is told by it.
        tissue: what `anatomy.tissues` says of them, where it is known already.
    """
    images = anatomy.as_stack(images)
    size, tissue = images.shape[1], anatomy.tissues(images) if tissue is None else tissue
    found = _named(POWER, images, shown(PERIODS, size))
    if mean is not None:
        found |= _named(RESIDUAL, images - mean, shown(COARSE, size))
    grey, white, valley = grey_peaks(images).T
    smooth = ndimage.gaussian_filter(images, (0, SMOOTHING * size / 256, SMOOTHING * size / 256))
    return found | {
        ISLANDS: euler_number(smooth > BRIGHT * white[:, None, None]).astype("float64"),
        GREY_PIECES: euler_number(tissue == GREY).astype("float64"),
        RIBBON: ribbon_width(tissue == GREY),
        GREY_PEAK: grey,
        WHITE_PEAK: white,
        VALLEY: valley,  # of slices with two peaks: without the next number, those that have none go unseen
        ONE_PEAK: np.where(np.isnan(white), np.nan, np.isnan(grey)),
    }
