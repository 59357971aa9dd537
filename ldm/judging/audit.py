"""Copies: does a generated slice show a training person? Leaks: is one slice in two splits?

Everything here is a plain function on arrays (numpy and scipy): no model, no dataset, no plotting, nothing of ours.

Images are float arrays of shape (N, H, W) or (N, H, W, 1) in [0, 1]; two sets may differ in size. Every picture is
first framed, that is cut to its brain and averaged to 64 x 64 pixels, with its background at 0 and its bright tissue at
1, so that neither position, size nor brightness matters from then on.

How `nearest` works: the framed pictures of all references and of their mirror images are compared with each query by
correlation at 32 x 32 pixels (a matrix product), and the best few are then aligned with the query by small affine maps
(Gauss-Newton, coarse to fine) before their distance is taken. A distance means nothing alone: `copy_rate` reads it
against the distances of slices of people who were never trained on. These should have gone through the same decoder as
the generated slices, for a blurred slice is nearer to everybody than a sharp one.

References:
    Carlini et al., "Extracting training data from diffusion models", arXiv 2301.13188: what counts as a copy.
    Baker, Matthews, "Lucas-Kanade 20 years on: a unifying framework", International Journal of Computer Vision 56(3),
    2004, doi:10.1023/B:VISI.0000011205.11775.fd: the inverse compositional algorithm of `_align`.
    Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the American Statistical
    Association 22(158), 1927, doi:10.1080/01621459.1927.10502953.
    Brown, Cai, DasGupta, "Interval estimation for a binomial proportion", Statistical Science 16(2), 2001,
    doi:10.1214/ss/1009213286: the Jeffreys interval.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from ldm.later import Later

fft, ndimage, special, stats = Later("scipy.fft"), Later("scipy.ndimage"), Later("scipy.special"), Later("scipy.stats")

SIZE = 64  # pixels of a framed picture's side
BRAIN = 0.15  # framed grey value above which a pixel counts as brain
REACH = 2.2  # half the side of the frame in standard deviations of the brain's pixels along it; a full ellipse has 2
BATCH = 32  # queries that are compared at a time
STEPS = (3, 3)  # Gauss-Newton steps at 32 x 32, then at 64 x 64 pixels
ALIKE = 8  # candidates for the same slice that are aligned
FINALISTS = 3  # of the shortlist, how many go on from 32 x 32 to 64 x 64 pixels
# Standard deviation of the blur before pictures are compared, in pixels of 64 x 64. It makes up for some of what a
# decoder blurs: of blurred phantoms of new people, 33 % lay below the 1st percentile with 0.7, and 14 % with 1.2.
SMOOTH = 1.2
RESAMPLES = 1000  # bootstrap


class Nearest(NamedTuple):
    """The nearest reference of each query: index (N,) int, distance (N,) in [0, 2], mirrored (N,) bool."""

    index: np.ndarray
    distance: np.ndarray
    mirrored: np.ndarray


# ------------------------------------------------------------------------------------------------------ framed pictures


def _as_stack(images: np.ndarray, name: str) -> np.ndarray:
    """Return `images` as (N, H, W) float32, refusing other shapes, none at all, and values outside [0, 1]."""
    images = np.asarray(images)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.ndim != 3 or not images.size:
        raise ValueError(f"{name} must be at least one picture of shape (N, H, W) or (N, H, W, 1), not {images.shape}")
    if images.dtype == np.uint8 or not (images.min() >= -1e-4 and images.max() <= 1 + 1e-4):  # NaN fails it as well
        raise ValueError(f"{name} must be floats in [0, 1]: divide 8-bit pictures by 255, others by (x + 1) / 2")
    return images.astype(np.float32)


def framed(images: np.ndarray) -> np.ndarray:
    """Pictures cut to their brain: (N, SIZE, SIZE) float32, background about 0, bright tissue about 1.

    A picture without contrast comes out as zeros.
    """
    low, high = np.percentile(images, (1, 99), axis=(1, 2))[:, :, None, None].astype(np.float32)
    contrast = high - low
    images = np.divide(images - low, contrast, out=np.zeros_like(images), where=contrast > 1e-3)
    rows, columns = (_averaging(images.mean(axis=axis)) for axis in (2, 1))
    return np.maximum(_product(_product(rows, images), columns.swapaxes(1, 2)), 0)


def _averaging(profile: np.ndarray) -> np.ndarray:
    """Matrices (N, SIZE, H) that average pixels along one axis into the cells of the frame around a profile (N, H).

    The frame is centred on the profile's mean, and reaches `REACH` standard deviations to both sides.
    """
    pixel = np.arange(profile.shape[1], dtype=np.float64)
    weight = profile + 1e-6  # an empty picture gets a frame around its middle
    weight = weight / weight.sum(axis=1, keepdims=True)
    mean = weight @ (pixel + 0.5)
    spread = np.sqrt(weight @ (pixel + 0.5) ** 2 - mean**2)
    return _areas(mean[:, None] + REACH * spread[:, None] * np.linspace(-1, 1, SIZE + 1), len(pixel))


def _areas(edges: np.ndarray, size: int) -> np.ndarray:
    """Matrices (..., cells, size) that average `size` pixels into the cells between edges (..., cells + 1)."""
    pixel = np.arange(size, dtype=np.float64)
    low, high = edges[..., :-1, None], edges[..., 1:, None]
    overlap = np.clip(np.minimum(high, pixel + 1) - np.maximum(low, pixel), 0, None)
    return (overlap / (high - low)).astype(np.float32)


def _product(rows: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """rows @ pictures, (N, R, K) or (R, K) with (N, K, W) or (K, W) -> (N, R, W), a row or two at a time.

    A product this small stays on one thread. Whole, BLAS would spread it over all cores, and waiting for a core that
    something else keeps busy costs many times the product itself.
    """
    few = 2 - rows.shape[-2] % 2
    found = rows.reshape(*rows.shape[:-2], -1, few, rows.shape[-1]) @ pictures[..., None, :, :]
    return found.reshape(*found.shape[:-3], rows.shape[-2], found.shape[-1])


def _halved(framed: np.ndarray) -> np.ndarray:
    """Mean of every 2 x 2 pixels."""
    n, height, width = framed.shape
    return framed.reshape(n, height // 2, 2, width // 2, 2).mean(axis=(2, 4))


def _comparable(images: np.ndarray, name: str) -> np.ndarray:
    """Framed pictures, slightly blurred, (N, SIZE, SIZE)."""
    return ndimage.gaussian_filter(framed(_as_stack(images, name)), (0, SMOOTH, SMOOTH))


def _unit(pictures: np.ndarray) -> np.ndarray:
    """Pictures as rows (N, pixels) of zero mean and unit norm, whose products are correlations; constant ones are 0."""
    rows = pictures.reshape(len(pictures), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 1e-6)


def shrunk(images: np.ndarray, most: int = 128) -> np.ndarray:
    """Pictures of at most `most` pixels a side, by area: copies and leaks show at 128, and searches are fast there.

    Each new pixel is the mean of the area it covers, of whole pixels and of parts of them, so that any size will do.

    Args:
        images: (N, H, W, 1); those that are small enough come back as they are.
        most: pixels a side.

    Returns:
        (N, min(H, most), min(W, most), 1) float32, or the images.
    """
    if max(images.shape[1:3]) <= most:
        return images
    rows, columns = (_areas(np.linspace(0, size, min(size, most) + 1), size) for size in images.shape[1:3])
    return _product(_product(rows, images[..., 0]), columns.T)[..., None]


# ------------------------------------------------------------------------------------------------------------ alignment


def _correlation(query: np.ndarray, warped: np.ndarray) -> np.ndarray:
    """Correlation of a picture (P, P) with each of (K, P, P) inside the union of the two brains, (K,)."""
    union = (query > BRAIN) | (warped > BRAIN)
    count = np.maximum(union.sum(axis=(1, 2), keepdims=True), 1)
    a, b = np.where(union, query, 0), np.where(union, warped, 0)
    a = np.where(union, a - a.sum(axis=(1, 2), keepdims=True) / count, 0)
    b = np.where(union, b - b.sum(axis=(1, 2), keepdims=True) / count, 0)
    ab, aa, bb = (np.einsum("kyx,kyx->k", *pair) for pair in ((a, b), (a, a), (b, b)))
    return ab / np.maximum(np.sqrt(aa * bb), 1e-6)


def _warp(pictures: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Picture k at the places that map k (3, 3) sends each pixel to; coordinates run from -1 to 1."""
    half = pictures.shape[1] / 2
    centre = np.full(2, half - 0.5)
    warped = np.empty_like(pictures)
    for picture, affine, out in zip(pictures, maps, warped, strict=True):
        matrix = affine[:2, :2]
        offset = centre - matrix @ centre + half * affine[:2, 2]
        ndimage.affine_transform(picture, matrix, offset, output=out, order=1, mode="nearest")
    return warped


def _fit(query: np.ndarray) -> np.ndarray:
    """The matrix (8, pixels) that says how a picture differs from the query (P, P): 6 affine terms, gain and offset.

    It is the least-squares solution of warped = gain * (query + gradient . affine motion) + offset, within the query's
    brain and its rim.
    """
    size = len(query)
    place = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
    y, x = np.broadcast_to(place[:, None], query.shape), np.broadcast_to(place, query.shape)
    down, right = np.gradient(query, 2 / size)
    terms = np.stack([down * y, down * x, down, right * y, right * x, right, query, np.ones_like(query)])
    weighted = np.where(ndimage.binary_dilation(query > BRAIN, iterations=2), terms, 0).reshape(8, -1)
    normal = (weighted @ weighted.T).astype(np.float64)
    ridge = 1e-3 * np.diag(np.diag(normal)) + 1e-9 * np.eye(8)
    return np.linalg.solve(normal + ridge, weighted)


def _align(query: np.ndarray, pictures: np.ndarray, maps: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Improve the maps (K, 3, 3) that carry each picture (K, P, P) onto the query (P, P); returns (correlation, maps).

    Of all maps that were tried, the one of the highest correlation is kept, so that a step that fails does no harm.
    """
    fit, best = _fit(query), np.full(len(pictures), -np.inf)
    kept = maps.copy()
    for step in range(steps + 1):
        warped = _warp(pictures, maps)
        correlation = _correlation(query, warped)
        better = correlation > best
        best[better], kept[better] = correlation[better], maps[better]
        if step < steps:
            terms = warped.reshape(len(pictures), -1) @ fit.T
            gain = np.maximum(terms[:, 6:7], 0.2)
            moved = np.tile(np.eye(3), (len(pictures), 1, 1))
            moved[:, :2] += np.clip(terms[:, :6] / gain, -0.1, 0.1).reshape(-1, 2, 3)
            maps = maps @ np.linalg.inv(moved)
    return best, kept


def _aligned_distance(query: np.ndarray, pictures: np.ndarray, finalists: int) -> np.ndarray:
    """1 - correlation of a comparable picture (SIZE, SIZE) with each of (K, SIZE, SIZE) after alignment, (K,).

    Infinite for all but the best few at 32 x 32 pixels.
    """
    maps = np.tile(np.eye(3), (len(pictures), 1, 1))
    coarse, maps = _align(_halved(query[None])[0], _halved(pictures), maps, STEPS[0])
    finalists = np.argsort(-coarse)[:finalists]
    correlation, _ = _align(query, pictures[finalists], maps[finalists], STEPS[1])
    distances = np.full(len(pictures), np.inf)
    distances[finalists] = 1 - correlation
    return distances


# -------------------------------------------------------------------------------------------------------------- nearest


def nearest(
    queries: np.ndarray,
    references: np.ndarray,
    shortlist: int = 8,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> Nearest:
    """The training slice that each picture is most like, after a small affine alignment, mirrored or not.

    The distance is 1 - correlation over the union of the two brains, at 64 x 64 pixels, slightly blurred: gain and
    offset do not change it. Neighbouring slices of one person are alike, so that it is the person that counts.

    Args:
        queries: images, (N, H, W) or (N, H, W, 1), in [0, 1].
        references: images, (M, H', W') or (M, H', W', 1), in [0, 1].
        shortlist: how many references, mirror images counted apart, are aligned with a query.
        progress: wraps the iterable of batches, such as tqdm.

    Returns:
        For each query the nearest reference, its distance in [0, 2], and whether its mirror image (left and right
        exchanged) is nearer than itself. A picture without contrast is at distance 1 from all.

    Raises:
        ValueError: if a set is empty, a shape does not fit, values leave [0, 1], or shortlist < 1.
    """
    if shortlist < 1:
        raise ValueError(f"shortlist must be at least 1, not {shortlist}")
    queries, references = _comparable(queries, "queries"), _comparable(references, "references")
    both = np.concatenate([references, references[:, :, ::-1]])
    # What all brains share says nothing about who it is, so it is taken away before candidates are chosen.
    common = _halved(both).mean(axis=0)
    small = _unit(_halved(both) - common)
    shortlist = min(shortlist, len(both))
    index, distance = np.empty(len(queries), int), np.empty(len(queries))
    starts = range(0, len(queries), BATCH)
    for start in progress(starts) if progress else starts:
        batch = queries[start : start + BATCH]
        alike = _unit(_halved(batch) - common) @ small.T
        candidates = np.argpartition(-alike, shortlist - 1, axis=1)[:, :shortlist]
        for n, (query, chosen) in enumerate(zip(batch, candidates, strict=True), start):
            distances = _aligned_distance(query, both[chosen], FINALISTS)
            index[n], distance[n] = chosen[distances.argmin()], distances.min()
    return Nearest(index % len(references), distance, index >= len(references))


def nearest_features(queries: np.ndarray, references: np.ndarray) -> Nearest:
    """The nearest reference of each query in an embedding, by cosine distance, 1 - cosine of the angle.

    Args:
        queries: features, (N, D).
        references: features, (M, D).

    Returns:
        As `nearest`; mirrored is all False. A row of zeros is at distance 1 from all.

    Raises:
        ValueError: if a set is empty, a shape does not fit, or features contain NaN or infinity.
    """
    rows = []
    for name, features in {"queries": queries, "references": references}.items():
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or not features.size or not np.isfinite(features).all():
            raise ValueError(f"{name} must be at least one row of finite features, (N, D), not {features.shape}")
        norms = np.linalg.norm(features, axis=1, keepdims=True)
        rows.append(features / np.where(norms > 0, norms, 1))
    queries, references = rows
    if queries.shape[1] != references.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} features each, but references {references.shape[1]}")
    index = np.concatenate(
        [(queries[n : n + 1024] @ references.T).argmax(axis=1) for n in range(0, len(queries), 1024)]
    )
    cosine = np.einsum("nd,nd->n", queries, references[index])
    return Nearest(index, np.maximum(1 - cosine, 0), np.zeros(len(queries), bool))


# ----------------------------------------------------------------------------------------------------------- copy rate


def copy_rate(
    distances: np.ndarray,
    baseline: np.ndarray,
    percentile: float = 1.0,
    groups: np.ndarray | None = None,
    seed: int = 0,
    owners: np.ndarray | None = None,
) -> dict:
    """Share of samples that are closer to the training slices than a low percentile of the baseline is.

    Without `groups` the interval is Wilson's, which takes the threshold as known. It is not: slices of one person are
    alike, so few people make a shaky threshold. With `groups` it is bootstrapped over people, each rate that follows is
    drawn from its Jeffreys posterior (Brown et al. 2001), and the standard deviation of the draws' logits, times the
    quantile of Student's t for that many people, gives the interval. With one person nothing is known: it is (0, 1).
    Where half to a fifth of the variance lay between people, 32 slices each, such an interval held the true share in
    75 to 86 % of all trials with 6 people, and in 87 to 95 % with 40; Wilson's in 35 to 47 % and in 67 to 79 %.

    Args:
        distances: (N,) of the samples.
        baseline: (M,) of slices of people who were never trained on, to the same references.
        percentile: of the baseline, in (0, 100), which is the threshold.
        groups: (M,) whose slice each of the baseline is; None takes the threshold as known.
        seed: of the bootstrap.
        owners: (N,) whose slice each sample is: samples of one head are copies together. They count for fewer, by how
            much more the heads differ than independent samples would. None takes all as independent.

    Returns:
        "threshold"; "rate", the share of samples below it; "interval", (low, high), 95 %; "expected", the share that
        honest samples have, percentile / 100; "samples", N.

    Raises:
        ValueError: if a set is empty or not finite, the percentile is out of range, or groups do not fit.
    """
    distances, baseline = np.asarray(distances, np.float64).ravel(), np.asarray(baseline, np.float64).ravel()
    if not (len(distances) and len(baseline) and np.isfinite(distances).all() and np.isfinite(baseline).all()):
        raise ValueError(
            "copy_rate needs at least one finite distance, and one of the baseline, and no NaN or infinity"
        )
    if not 0 < percentile < 100:
        raise ValueError(f"percentile must lie between 0 and 100, not {percentile}")
    threshold = float(np.percentile(baseline, percentile))
    count, total = int(np.sum(distances < threshold)), len(distances)
    if groups is None:
        interval = stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
    else:
        weight = 1.0 if owners is None else 1 / _design_effect(distances < threshold, np.asarray(owners).ravel())
        interval = _interval_over_people(distances, baseline, percentile, np.asarray(groups).ravel(), seed, weight)
    return {
        "threshold": threshold,
        "rate": count / total,
        "interval": (float(interval[0]), float(interval[1])),
        "expected": percentile / 100,
        "samples": total,
    }


def _design_effect(hits: np.ndarray, owners: np.ndarray) -> float:
    """How many samples of the same heads say as much as one independent sample: 1 to the number of slices of a head.

    The variance of the heads' rates over that of independent samples (Kish, "Survey sampling", 1965, section 8.2).
    """
    if len(owners) != len(hits):
        raise ValueError(f"owners must name a head for each of the {len(hits)} samples")
    _, head, slices = np.unique(owners, return_inverse=True, return_counts=True)
    rate, most = hits.mean(), len(hits) / len(slices)
    if len(slices) < 2 or rate in (0, 1):
        return most  # nothing shows how alike slices of one head are
    residuals = np.bincount(head, hits, len(slices)) - rate * slices
    among_heads = np.sum(residuals**2) * len(slices) / (len(slices) - 1) / len(hits) ** 2
    return float(np.clip(among_heads / (rate * (1 - rate) / len(hits)), 1, most))


def _interval_over_people(
    distances: np.ndarray, baseline: np.ndarray, percentile: float, groups: np.ndarray, seed: int, weight: float
) -> tuple[float, float]:
    """The 95 % interval of the rate that `copy_rate` gives for groups of the baseline; `weight` is that of a sample."""
    if len(groups) != len(baseline):
        raise ValueError(f"groups must name a person for each of the {len(baseline)} distances of the baseline")
    people = [baseline[groups == person] for person in np.unique(groups)]
    number, total, rng = len(people), len(distances), np.random.default_rng(seed)
    if number < 2:
        return 0.0, 1.0
    draws = rng.integers(number, size=(RESAMPLES, number))
    thresholds = [np.percentile(np.concatenate([people[n] for n in draw]), percentile) for draw in draws]
    below = np.searchsorted(np.sort(distances), [np.percentile(baseline, percentile), *thresholds])
    below, total = weight * below, weight * total
    rates = special.logit(rng.beta(below + 0.5, total - below + 0.5))
    spread = np.std(rates[1:]) * np.sqrt(number / (number - 1)) * stats.t.ppf(0.975, number - 1)
    middle = special.logit((below[0] + 0.5) / (total + 1))
    return special.expit(middle - spread), special.expit(middle + spread)


def by_person(
    index: np.ndarray, distances: np.ndarray, threshold: float, reference_groups: np.ndarray
) -> dict[int | str, int]:
    """How many samples are closer than the threshold to a slice of each training person.

    Args:
        index: (N,) nearest reference of each sample.
        distances: (N,) its distance.
        threshold: of `copy_rate`.
        reference_groups: (M,) whose slice each reference is.

    Returns:
        person -> number of samples, for those who have any, most first.

    Raises:
        ValueError: if there are not as many distances as indices.
    """
    index, distances = np.asarray(index), np.asarray(distances)
    if index.shape != distances.shape:
        raise ValueError(f"there are {index.size} indices, but {distances.size} distances")
    people = np.asarray(reference_groups)[index[distances < threshold]]
    return dict(Counter(people.tolist()).most_common())


# --------------------------------------------------------------------------------------------------------------- leaks


def fingerprints(images: np.ndarray) -> np.ndarray:
    """Perceptual hash of each picture: the signs of the 8 x 8 lowest cosine frequencies of the framed picture.

    Frequency 0 is left out along both axes, for brains all agree there. Compression, brightness and size change a few
    of the 64 bits at most; so do two people of the same shape, so that a match must be looked at: `near_identical`.

    Args:
        images: (N, H, W) or (N, H, W, 1), in [0, 1].

    Returns:
        (N,) uint64; `differing_bits` compares them.

    Raises:
        ValueError: if there is no picture, the shape does not fit, or values leave [0, 1].
    """
    frequencies = fft.dctn(framed(_as_stack(images, "images")), axes=(1, 2))[:, 1:9, 1:9]
    return np.packbits((frequencies > 0).reshape(len(frequencies), -1), axis=1).view(np.uint64)[:, 0]


ONES = np.unpackbits(np.arange(256, dtype="uint8")[:, None], axis=1).sum(axis=1, dtype="uint8")  # of each byte


def differing_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many bits differ in each pair of uint64, 0 .. 64 (NumPy 2 has `bitwise_count` for it)."""
    different = np.ascontiguousarray(np.atleast_1d(a ^ b))
    return ONES[different.view("uint8").reshape(*different.shape, 8)].sum(axis=-1)


def near_identical(
    a: np.ndarray, b: np.ndarray, most_bits: int = 10, most_distance: float = 0.004
) -> list[tuple[int, int]]:
    """Pairs of pictures that are the same slice, compressed, brightened, resized, shifted or slightly turned.

    Hashes find candidates; of the ALIKE most alike for each picture of the smaller set, those whose distance in the
    sense of `nearest` is small enough are confirmed. Mirror images are not looked for. By default neighbouring slices
    of one person are not flagged: the distance of those of OASIS people is at least 0.006; copies stay below 0.003.
    With 0.02 some are: somebody is in both sets.

    Args:
        a: images, (N, H, W) or (N, H, W, 1), in [0, 1].
        b: images, (M, H', W') or (M, H', W', 1), in [0, 1].
        most_bits: of 64 that may differ in a candidate, 0 .. 64.
        most_distance: of a confirmed pair, 1 - correlation.

    Returns:
        (row of a, row of b) of each pair, in this order.

    Raises:
        ValueError: as `fingerprints`.
    """
    if len(a) > len(b):  # alignment takes time, and is done for each picture of the first set
        return sorted((i, j) for j, i in near_identical(b, a, most_bits, most_distance))
    hashes_a, hashes_b = fingerprints(a), fingerprints(b)
    a, b = _comparable(a, "a"), _comparable(b, "b")
    small_a, small_b = (_unit(_halved(pictures)) for pictures in (a, b))
    pairs = []
    for i, (fingerprint, picture) in enumerate(zip(hashes_a, a, strict=True)):
        candidates = np.flatnonzero(differing_bits(hashes_b, fingerprint) <= most_bits)
        if not len(candidates):
            continue
        candidates = np.sort(candidates[np.argsort(-(small_b[candidates] @ small_a[i]))[:ALIKE]])
        distances = _aligned_distance(picture, b[candidates], len(candidates))
        pairs += [(i, int(j)) for j in candidates[distances <= most_distance]]
    return pairs


def misfiled(
    test: np.ndarray, z: np.ndarray, case: np.ndarray, train: np.ndarray, share: float = 90.0
) -> list[tuple[int, int]]:
    """Test slices that are as near to a training slice as neighbouring slices of one person are to each other.

    One of the two may be filed under the wrong person. Neighbours are the slices of even and of odd indices.

    Args:
        test: images, (N, H, W) or (N, H, W, 1), in [0, 1].
        z: (N,) their slice indices.
        case: (N,) whose they are.
        train: images, (M, H', W') or (M, H', W', 1), in [0, 1].
        share: a test slice is named if it is nearer than so many percent of the neighbours are.

    Returns:
        (row of test, row of train) of each; none where nobody has neighbours to compare with.
    """
    even = np.asarray(z) % 2 == 0
    if even.all() or not even.any():
        return []
    own = nearest(test[even], test[~even])
    same = case[even] == case[~even][own.index]
    if not same.any():
        return []
    found = nearest(test, train)
    rows = np.flatnonzero(found.distance < np.percentile(own.distance[same], share))
    return [(int(row), int(found.index[row])) for row in rows]
