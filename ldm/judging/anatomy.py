"""Is it a brain like those of real people: tissues, ventricles, symmetry, and how far all that is from the real ones.

    tissues      images -> background, CSF, grey, white
    ventricles   tissues -> the CSF in the middle
    measure      images -> a few numbers per slice; histograms: the grey levels of the brain
    difference   how far generated slices are from real ones in each of those numbers, slice index by slice index
    effect_size  what a label does to such a number, with people as the unit

Plain functions on arrays (numpy and scipy). Images are float arrays of shape (N, H, W) or (N, H, W, 1) in **[0, 1]**:
axial T1 slices, skull-stripped, forehead up, background 0 or nearly so.

Nothing here is learnt, so nothing depends on which tissue masks an archive happens to have. Each slice is segmented by
itself, because each was normalised by itself. On phantoms, whose masks are exact (20 people, every fourth slice), Dice
of CSF, grey, white and ventricles is 0.93, 0.89, 0.94, 0.91 at 128 pixels (0.92, 0.88, 0.94, 0.91 at 256). One pair of
grey levels, chosen with the masks in hand, does no better: what is missing are the pixels on a border. At 64 pixels,
each wider than a sulcus, it is 0.86, 0.83, 0.90, 0.88: a comparison of alike with alike rather than anatomy.

References:
    Ashburner, Friston, "Unified segmentation", NeuroImage 26(3), 2005, doi:10.1016/j.neuroimage.2005.02.018: mixture
    of Gaussians and bias field, turn about.
    Fraley, Raftery, "Bayesian regularization for normal mixture estimation", Journal of Classification 24, 2007,
    doi:10.1007/s00357-007-0004-5: the prior that carries a class with hardly any pixel.
"""

import numpy as np
from scipy import ndimage, stats

from ldm.tissue import CSF, GREY, WHITE

BACKGROUND = 0.04  # brighter is brain; generated backgrounds reach about 0.01, CSF is rarely below 0.1
RELATIVE = np.array([0.18, 0.6, 1.0])  # T1 grey of CSF, grey and white matter over that of white: the mixture's prior
SPREAD = 0.12  # prior standard deviation of each class, in the same unit
PRIOR = 0.05  # weight of that prior, as a share of the brain's pixels
ONE_LEVEL = 1 / 255  # the least unit of `difference`: one grey level of an 8-bit file, or 0.4 % of an area
LEAST_PEOPLE = 4  # per label: with fewer, a bootstrap draws the same person throughout too often


def as_stack(images: np.ndarray) -> np.ndarray:
    """Return `images` as (N, H, W) float32, refusing any other shape and any value outside [0, 1] (NaN included)."""
    images = np.asarray(images)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.ndim != 3:
        raise ValueError(f"images must have shape (N, H, W) or (N, H, W, 1), not {images.shape}")
    if images.dtype == np.uint8:
        raise ValueError("images are uint8: divide by 255 first, anatomy takes floats in [0, 1]")
    if images.size and not (images.min() >= -1e-4 and images.max() <= 1 + 1e-4):
        raise ValueError(f"images must lie in [0, 1], but span [{images.min():.3g}, {images.max():.3g}]")
    return images.astype(np.float32)


# -------------------------------------------------------------------------------------------------------------- tissues


def _brain(image: np.ndarray) -> np.ndarray:
    """Brain mask (H, W): what is not black, without specks, with the black CSF in its folds and ventricles."""
    labels, count = ndimage.label(image > BACKGROUND)
    if not count:
        return np.zeros(image.shape, bool)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    # Not the largest piece only: in high slices the fissure parts the hemispheres.
    brain = (sizes >= 0.1 * sizes.max())[labels]
    # Closing with a disc, by distances, which cost the same at every radius. Padded, so that there is an outside.
    radius = max(1, round(min(image.shape) / 64))
    near = ndimage.distance_transform_edt(~np.pad(brain, radius + 1)) <= radius
    closed = ndimage.distance_transform_edt(near) > radius
    return ndimage.binary_fill_holes(closed[radius + 1 : -radius - 1, radius + 1 : -radius - 1])


def _mixture(values: np.ndarray) -> tuple[float, float]:
    """Greys that part CSF from grey matter and grey from white, by a mixture of three Gaussians on the histogram.

    Expectation maximisation with a conjugate prior (Fraley, Raftery 2007): without it, a slice with hardly any CSF
    would have its grey matter split in two.
    """
    counts, edges = np.histogram(values, bins=128, range=(0, values.max()))
    grey, share = (edges[1:] + edges[:-1]) / 2, counts / counts.sum()
    # White matter is the peak of the brighter half.
    smooth = ndimage.gaussian_filter1d(share, 4.0)
    white = grey[np.argmax(np.where(grey >= np.median(values), smooth, -1))]
    start, spread = RELATIVE * white, (SPREAD * white) ** 2
    weight, mean, variance = np.full(3, 1 / 3), start, np.full(3, spread)

    def log_density(x):
        return np.log(weight) - 0.5 * np.log(variance) - (x[:, None] - mean) ** 2 / (2 * variance)

    for _ in range(30):
        density = log_density(grey)
        density = np.exp(density - density.max(axis=1, keepdims=True))
        owned = share[:, None] * density / density.sum(axis=1, keepdims=True)  # (128, 3)
        size = owned.sum(axis=0) + PRIOR
        weight, mean = size / size.sum(), (owned.T @ grey + PRIOR * start) / size
        variance = ((owned * (grey[:, None] - mean) ** 2).sum(axis=0) + PRIOR * spread) / size
    borders = []
    for k in (0, 1):  # from the darker mean upwards, the first grey at which the brighter class is likelier
        between = np.linspace(mean[k], mean[k + 1], 201)
        density = log_density(between)
        borders.append(between[np.argmax(density[:, k + 1] >= density[:, k])])
    return borders[0], borders[1]


def _smoothed(image: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian filter that is wide, so that a smaller picture will do: an error below 0.001 at an eighth of the cost.

    The picture is averaged over squares, filtered, and enlarged by linear interpolation.
    """
    step = max(1, int(sigma / 8))
    height, width = image.shape
    squares = np.pad(image, ((0, -height % step), (0, -width % step)))
    squares = squares.reshape(squares.shape[0] // step, step, squares.shape[1] // step, step).mean(axis=(1, 3))
    small = ndimage.gaussian_filter(squares, sigma / step, truncate=3.0)
    for length in (height, width):  # enlarge the rows and turn the picture, twice
        place = np.clip((np.arange(length) + 0.5) / step - 0.5, 0, len(small) - 1)
        below = np.minimum(place.astype(int), max(len(small) - 2, 0))
        share = (place - below).astype(image.dtype)[:, None]
        small = (small[below] * (1 - share) + small[np.minimum(below + 1, len(small) - 1)] * share).T
    return small


def _flatten(image: np.ndarray, white: np.ndarray) -> np.ndarray:
    """Divide out the bias field: how bright white matter is around each pixel, over its mean."""
    white = ndimage.binary_erosion(white)  # its rim is partly grey matter
    if not white.any():
        return image
    level, sigma, prior = image[white].mean(), min(image.shape) / 8, 0.02  # prior: far from white, the field is 1
    around, share = _smoothed(np.where(white, image, 0), sigma), _smoothed(white.astype(np.float32), sigma)
    return image * level * (share + prior) / (around + prior * level)


def tissues(images: np.ndarray) -> np.ndarray:
    """Name the tissue of every pixel, slice by slice, from grey levels alone.

    Brain mask; then a mixture of three Gaussians and the bias field that white matter shows, turn about.

    Args:
        images: (N, H, W) or (N, H, W, 1), in [0, 1], background nearly 0.

    Returns:
        (N, H, W) int8: 0 background, 1 CSF, 2 grey, 3 white matter. A slice without brain is all 0.

    Raises:
        ValueError: if the shape is another or values leave [0, 1].
    """
    images = as_stack(images)
    result = np.zeros(images.shape, np.int8)
    for image, tissue in zip(images, result, strict=True):
        brain = _brain(image)
        if not brain.any():
            continue
        flat = image
        dark, bright = _mixture(image[brain])
        for _ in range(2):
            flat = _flatten(image, brain & (flat > bright))
            dark, bright = _mixture(flat[brain])
        tissue[brain] = CSF + (flat[brain] > dark) + (flat[brain] > bright)
    return result


# ----------------------------------------------------------------------------------------------------------- ventricles


def _ventricles(tissue: np.ndarray) -> np.ndarray:
    """`ventricles` of one slice (H, W)."""
    rows, columns = np.nonzero(tissue)
    if not len(rows):
        return np.zeros(tissue.shape, bool)
    # Coordinates of the brain: 0 at its centroid, 1 at its outline, as twice the standard deviation is an ellipse's
    # half axis. v grows towards the back of the head.
    y, x = np.ogrid[: tissue.shape[0], : tissue.shape[1]]
    u = np.abs(x - columns.mean()) / (2 * columns.std() + 1e-6)
    v = (y - rows.mean()) / (2 * rows.std() + 1e-6)
    radius = (u**4 + v**4) ** 0.25 / 0.62  # a rounded rectangle: frontal horns reach into its corners
    csf = tissue == CSF
    inside = csf & (radius < 1)
    whole, _ = ndimage.label(csf, np.ones((3, 3)))
    parts, count = ndimage.label(inside, np.ones((3, 3)))
    if not count:
        return inside
    index, mine = np.arange(1, count + 1), parts[inside]  # pixels outside would only be sorted
    nearest = ndimage.minimum(radius[inside], mine, index)
    # The fissure, too, lies on the midline, but before or behind the corpus callosum: outside this bow tie, which is
    # the wider the farther from the midline. Ventricles sit a little behind the centroid.
    bow_tie = ndimage.minimum((np.abs(v - 0.08) - 0.8 * u)[inside], mine, index) < 0.26
    # A sulcus that only ends in here belongs to a larger piece outside.
    larger = np.bincount(whole.ravel())[ndimage.maximum(whole[inside], mine, index).astype(int)]
    enclosed = np.bincount(mine, minlength=count + 1)[1:] > 0.5 * larger
    chosen = bow_tie & ((nearest < 0.3) | ((nearest < 0.75) & enclosed))
    return np.concatenate([[False], chosen])[parts]


def ventricles(tissue: np.ndarray) -> np.ndarray:
    """The CSF in the middle of the brain: lateral and third ventricles, by place alone.

    What lies on the same spot in the lowest slices, the cisterns before and behind the third ventricle, is counted
    where it touches. That is alike for real and generated slices.

    Args:
        tissue: (N, H, W) integers, as `tissues` returns; forehead up.

    Returns:
        (N, H, W) bool.

    Raises:
        ValueError: if the shape is another.
    """
    tissue = np.asarray(tissue)
    if tissue.ndim != 3:
        raise ValueError(f"tissue must have shape (N, H, W), not {tissue.shape}")
    result = np.zeros(tissue.shape, bool)
    for n, one in enumerate(tissue):
        result[n] = _ventricles(one)
    return result


# ------------------------------------------------------------------------------------------------------------- measures


def _symmetry(image: np.ndarray, brain: np.ndarray) -> float:
    """Pearson correlation of a slice with its mirror image about the column of the brain's centroid, to half a pixel.

    Over the pixels that are brain on either side, as the background would agree with itself. NaN where all are equal.
    """
    _, columns = np.nonzero(brain)
    if not len(columns):
        return np.nan
    # Column c falls on column fold - c. The margin makes room for the mirror image of a brain off the middle.
    margin = brain.shape[1]
    fold = round(2 * columns.mean()) + 2 * margin
    brain = np.pad(brain, ((0, 0), (margin, margin)))
    image = np.where(brain, np.pad(image, ((0, 0), (margin, margin))), 0).astype(np.float64)
    both = np.s_[:, max(0, fold - 3 * margin + 1) : min(3 * margin, fold + 1)]  # columns whose partner exists
    either = brain[both] | brain[both][:, ::-1]
    a, b = image[both][either], image[both][:, ::-1][either]
    # Each pixel occurs once as itself and once as its partner's: one mean, one variance.
    a, b = a - a.mean(), b - b.mean()
    variance = a @ a
    return float(a @ b / variance) if variance > 1e-9 else np.nan


def measure(images: np.ndarray, tissue: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """A few numbers per slice that say what the anatomy is like.

    Args:
        images: (N, H, W) or (N, H, W, 1), in [0, 1].
        tissue: what `tissues` says of them, where it is known already.

    Returns:
        name -> (N,) float64:
        "csf", "grey", "white", "ventricle_area": fractions of the brain's area.
        "brain_area": fraction of the picture.
        "symmetry": correlation of the brain with its mirror image about its own (vertical) midline, in [-1, 1].
        "background": mean grey outside the brain.
        "mean", "deviation": of the grey inside the brain.
        NaN where there is nothing to measure: a slice without brain has a "brain_area" of 0 and a "background" only.

    Raises:
        ValueError: if the shape is another or values leave [0, 1].
    """
    images = as_stack(images)
    tissue = tissues(images) if tissue is None else tissue
    brain, inner = tissue > 0, ventricles(tissue)
    pixels = brain.sum(axis=(1, 2)).astype(np.float64)

    def average(values, mask, count):
        total = np.where(mask, values, 0).sum(axis=(1, 2), dtype=np.float64)
        return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)

    mean = average(images, brain, pixels)
    return {
        "csf": average(1, tissue == CSF, pixels),
        "grey": average(1, tissue == GREY, pixels),
        "white": average(1, tissue == WHITE, pixels),
        "ventricle_area": average(1, inner, pixels),
        "brain_area": brain.mean(axis=(1, 2)),
        "symmetry": np.array([_symmetry(*pair) for pair in zip(images, brain, strict=True)], np.float64),
        "background": average(images, ~brain, brain[0].size - pixels if len(brain) else pixels),
        "mean": mean,
        "deviation": np.sqrt(average((images - mean[:, None, None]) ** 2, brain, pixels)),
    }


def histograms(images: np.ndarray, bins: int = 32) -> np.ndarray:
    """Share of the brain's pixels in each of `bins` equal ranges of grey in [0, 1].

    Args:
        images: (N, H, W) or (N, H, W, 1), in [0, 1].
        bins: how many ranges.

    Returns:
        (N, bins) float64, rows sum to 1; NaN for a slice without brain.

    Raises:
        ValueError: if the shape is another, values leave [0, 1], or `bins` is below 1.
    """
    images = as_stack(images)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    result = np.full((len(images), bins), np.nan)
    for image, row in zip(images, result, strict=True):
        brain = _brain(image)
        if brain.any():
            row[:] = np.histogram(np.clip(image[brain], 0, 1), bins, (0, 1))[0] / brain.sum()
    return result


# ---------------------------------------------------------------------------------------------------------- comparisons


def difference(
    real: dict[str, np.ndarray],
    real_z: np.ndarray,
    fake: dict[str, np.ndarray],
    fake_z: np.ndarray,
) -> dict[str, float]:
    """How far the fake slices are from the real ones in each measure, slice index by slice index.

    Wasserstein-1 distance, averaged over the slice indices that both have, in standard deviations of the real ones
    about the mean of their slice index: 1 means that a fake is one person's usual deviation off. A few slices are never
    at distance 0 from a few others: compare with the distance of other real people, at the same counts.

    Args:
        real: name -> (N,), as `measure` returns. NaNs are left out, so look at "brain_area" for slices without brain.
        real_z: (N,) integer slice indices.
        fake: the same names -> (M,).
        fake_z: (M,) integer slice indices.

    Returns:
        name -> distance >= 0; NaN where no slice index has a number on both sides. The unit is at least `ONE_LEVEL`, so
        that a real background of exactly 0 does not make every other infinitely far.

    Raises:
        ValueError: if names or lengths differ, or no slice index is in both.
    """
    real_z, fake_z = np.asarray(real_z).reshape(-1), np.asarray(fake_z).reshape(-1)
    if real.keys() != fake.keys():
        raise ValueError(f"real and fake must have the same measures, not {sorted(real)} and {sorted(fake)}")
    for values, z in ((real, real_z), (fake, fake_z)):
        if any(np.shape(value) != z.shape for value in values.values()):
            raise ValueError(f"each measure must have one value for each of the {len(z)} slice indices")
    if not (len(real_z) and len(fake_z)):
        raise ValueError("there must be real and fake slices to compare")
    shared = np.intersect1d(real_z, fake_z)
    if not len(shared):
        raise ValueError("real and fake slices have no slice index in common")
    result = {}
    for name in real:
        distances, squares, count = [], 0.0, 0
        for index in shared:
            a, b = real[name][real_z == index], fake[name][fake_z == index]
            a, b = a[np.isfinite(a)], b[np.isfinite(b)]
            if len(a) and len(b):
                distances.append(stats.wasserstein_distance(a, b))
            if len(a):
                squares, count = squares + len(a) * a.var(), count + len(a)
        unit = max(np.sqrt(squares / count), ONE_LEVEL) if count else np.nan
        result[name] = float(np.mean(distances) / unit) if distances else float("nan")
    return result


def _cohens_d(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Difference of the means over the pooled standard deviation, along the last axis."""
    n, m = a.shape[-1], b.shape[-1]
    pooled = ((n - 1) * a.var(axis=-1, ddof=1) + (m - 1) * b.var(axis=-1, ddof=1)) / (n + m - 2)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may draw one person throughout
        return (a.mean(axis=-1) - b.mean(axis=-1)) / np.sqrt(pooled)


def effect_size(
    values: np.ndarray, labels: np.ndarray, people: np.ndarray, called=None, resamples: int = 2000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Cohen's d of a measure between two labels, with people as the unit: slices of one person are not independent.

    Args:
        values: (N,) a measure of each slice; NaNs are left out.
        labels: (N,) int label of each slice; negative is unknown, and left out.
        people: (N,) the person of each slice, integers or strings.
        called: the labels' names, for what is said of them.
        resamples: how many times people are drawn anew, with replacement, within their label.
        seed: of those draws.

    Returns:
        cohens_d: mean of the lower label minus mean of the higher, over the pooled standard deviation of the people's
        means. In class folders sorted by name AD is 0 and NC is 1, so ventricles that AD enlarges give d > 0.
        interval: (low, high), 95 %, percentiles of the bootstrap.

    Raises:
        ValueError: if lengths differ; there are not exactly two labels; a person has both; a label has fewer than
            `LEAST_PEOPLE` people; or all people of either label have one and the same value.
    """
    values, labels, people = np.asarray(values, np.float64), np.asarray(labels), np.asarray(people)
    if not values.shape == labels.shape == people.shape == (len(values),):
        raise ValueError(f"values, labels and people must be as long, not {len(values)}, {len(labels)}, {len(people)}")
    known = np.isfinite(values) & (labels >= 0)
    values, labels, people = values[known], labels[known], people[known]
    names = np.unique(labels).tolist()
    if len(names) != 2:
        raise ValueError(f"an effect size compares two labels, but the slices have {len(names)}: {names}")
    both = np.intersect1d(*(people[labels == name] for name in names))
    if len(both):
        raise ValueError(f"person {both[0]} has two labels")
    groups = []
    for name in names:
        mine, slices = people[labels == name], values[labels == name]
        groups.append(np.array([slices[mine == person].mean() for person in np.unique(mine)]))
        if len(groups[-1]) < LEAST_PEOPLE:
            name = called[name] if called else name
            raise ValueError(f"an effect size needs {LEAST_PEOPLE} people per label, but {name} has {len(groups[-1])}")
    if not any(np.ptp(group) for group in groups):
        raise ValueError("all people of a label have the same value: there is no spread to measure an effect by")
    rng = np.random.default_rng(seed)
    drawn = _cohens_d(*(group[rng.integers(len(group), size=(resamples, len(group)))] for group in groups))
    low, high = np.percentile(drawn[np.isfinite(drawn)], [2.5, 97.5]).tolist()
    return float(_cohens_d(*groups)), (low, high)
