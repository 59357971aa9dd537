"""How alike two *sets* of pictures are: Frechet distance, kernel distance, precision and recall, diversity.

Everything here is a plain function on arrays (numpy and scipy): no model, no dataset, no plotting, nothing of ours.

Features are (samples, dimensions), one row for each picture, from whatever network the caller trusts. No number here
means anything alone: put two sets of real people (the floor) and a generator known to be bad beside it, and compare
sets of the same size only, since all but the kernel distance depend on the number of samples.

A group is a person. Slices of one person are alike, so that 1,000 slices of 40 people say as much about a population
as 40 independent samples do, not 1,000: where groups can be given, give them.

References:
    Heusel et al., "GANs trained by a two time-scale update rule converge to a local Nash equilibrium",
    arXiv 1706.08500.
    Binkowski et al., "Demystifying MMD GANs", arXiv 1801.01401.
    Kynkaanniemi et al., "Improved precision and recall metric for assessing generative models", arXiv 1904.06991.
    Naeem et al., "Reliable fidelity and diversity metrics for generative models", arXiv 2002.09797.
    Efron, Stein, "The jackknife estimate of variance", Annals of Statistics 9(3), 1981, doi:10.1214/aos/1176345462.
"""

from collections.abc import Callable

import numpy as np
from scipy.spatial.distance import cdist

CHUNK = 1024  # rows of a distance matrix at a time: memory grows with N, not with N^2


def _as_features(real: np.ndarray, fake: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Return both sets as float64, refusing other shapes, NaN and infinity, and fewer than `least` rows."""
    sets = {name: np.asarray(values, np.float64) for name, values in {"real": real, "fake": fake}.items()}
    for name, values in sets.items():
        if values.ndim != 2:
            raise ValueError(f"{name} features must have shape (samples, dimensions), not {values.shape}")
        if len(values) < least:
            raise ValueError(f"{name} has {len(values)} samples, but this needs at least {least}")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} features contain NaN or infinity")
    if sets["real"].shape[1] != sets["fake"].shape[1]:
        raise ValueError(f"real has {sets['real'].shape[1]} features each, but fake {sets['fake'].shape[1]}")
    return sets["real"], sets["fake"]


# ---------------------------------------------------------------------------------------------------- Frechet distance


def frechet_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """Squared Frechet (Wasserstein-2) distance of the Gaussians fitted to the two sets (arXiv 1706.08500, equation 6).

    With the square roots C = R^T R of both covariances, tr((C_real C_fake)^(1/2)) is the sum of the singular values of
    R_real R_fake^T. Nothing is squared, inverted, or complex, so that fewer samples than dimensions do no harm to the
    arithmetic. They do to the meaning: the estimate is biased upwards, by much when N is not far above D.

    Args:
        real: features, (N, D).
        fake: features, (M, D).

    Returns:
        The distance, at least 0, in squared units of the features; 0 up to rounding for identical sets.

    Raises:
        ValueError: for fewer than 2 samples in a set, NaN, or shapes that do not fit.
    """
    real, fake = _as_features(real, fake, least=2)
    (mean_real, root_real), (mean_fake, root_fake) = _gaussian(real), _gaussian(fake)
    between = np.linalg.svd(root_real @ root_fake.T, compute_uv=False).sum()
    distance = np.sum((mean_real - mean_fake) ** 2) + np.sum(root_real**2) + np.sum(root_fake**2) - 2 * between
    return max(float(distance), 0.0)  # rounding


def _gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and a square root R (min(N, D), D) of the sample covariance R^T R."""
    mean = features.mean(axis=0)
    return mean, np.linalg.qr(features - mean, mode="r") / np.sqrt(len(features) - 1)


# ----------------------------------------------------------------------------------------------------- kernel distance


def kernel_distance(
    real: np.ndarray,
    fake: np.ndarray,
    real_groups: np.ndarray | None = None,
    fake_groups: np.ndarray | None = None,
) -> tuple[float, float]:
    """Unbiased squared MMD with the kernel (x . y / D + 1)^3 (arXiv 1801.01401, equation 4 and section 4), "KID".

    Pairs of slices of the same group are left out of the mean, as the pair of a sample with itself always is: they are
    more alike than two people, and would lift the distance of two sets of real people above 0. With no groups, every
    sample is its own, and the value is the KID of the paper.

    The standard error comes from leaving out one group at a time, on both sides, corrected as `_variance` says.
    It takes groups as independent, within and between the sets. Over repeated draws its mean was 0.98 to 1.06 times the
    spread of the values with 20 groups or more, 0.87 to 1.10 times with 6. Memory grows with (N + M)^2.

    Args:
        real: features, (N, D).
        fake: features, (M, D).
        real_groups: (N,) whose sample each is; None if all are independent.
        fake_groups: (M,), likewise.

    Returns:
        (value, standard error). The value lies around 0, and can be negative, for sets of the same distribution.

    Raises:
        ValueError: for fewer than 4 groups in a set, NaN, or shapes that do not fit.
    """
    within, between, sizes = _sums_by_group(real, fake, real_groups, fake_groups)
    return _distance(within, between, sizes), float(np.sqrt(_variance(within, between, sizes)))


def kernel_distance_without(
    real: np.ndarray, fake: np.ndarray, real_groups: np.ndarray, fake_groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`kernel_distance` without each of the real groups in turn, and without each of the fake groups.

    Where two generators are read against the same people, the jackknife over the differences of the first says how well
    the difference of their distances is known, as far as people go.

    Args:
        real, fake, real_groups, fake_groups: as of `kernel_distance`.

    Returns:
        (real groups,) and (fake groups,) float64, groups in ascending order.
    """
    return _left_out(*_sums_by_group(real, fake, real_groups, fake_groups))


def kernel_distance_difference(
    real: np.ndarray, first: np.ndarray, second: np.ndarray, people: np.ndarray, blocks: int = 24
) -> tuple[float, float]:
    """KID of `second` minus KID of `first`, to the same people, where rows of the two belong together.

    Two samplers that were told the same and began with the same noise err alike, so their difference is known better
    than either distance. Its standard error is the jackknife's (Efron and Stein 1981, doi:10.1214/aos/1176345462), over
    people and over blocks of pairs.

    Args:
        real: features, (N, D).
        first, second: features, (M, D) each; rows of the same number have the same conditions and the same noise.
        people: (N,) whose sample each of `real` is.
        blocks: into how many the pairs are dealt.

    Returns:
        (difference, standard error); below 0 the second is nearer.
    """

    def difference(here, there):
        return kernel_distance(real[here], second[there])[0] - kernel_distance(real[here], first[there])[0]

    dealt, variance = np.arange(len(first)) % blocks, 0.0
    everybody, all_pairs = np.full(len(real), True), np.full(len(first), True)
    for left_out in (
        [difference(people != person, all_pairs) for person in np.unique(people)],
        [difference(everybody, dealt != block) for block in range(blocks)],
    ):
        variance += (len(left_out) - 1) * np.var(left_out)
    return difference(everybody, all_pairs), float(np.sqrt(variance))


def _by_group(features: np.ndarray, groups: np.ndarray | None, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows sorted by group, and where each group starts; None makes every row its own group."""
    groups = np.arange(len(features)) if groups is None else np.asarray(groups)
    if groups.shape != (len(features),):
        raise ValueError(f"{name}_groups must name a group for each of the {len(features)} samples")
    order = np.argsort(groups, kind="stable")
    starts = np.unique(groups[order], return_index=True)[1]
    if len(starts) < 4:
        raise ValueError(f"{name} has {len(starts)} groups, but a standard error needs at least 4")
    return features[order], starts


def _kernel_sums(x: np.ndarray, y: np.ndarray, at_x: np.ndarray, at_y: np.ndarray) -> np.ndarray:
    """Sum of the cubic kernel over the samples of each pair of groups, (groups of x, groups of y)."""
    kernel = (x @ y.T / x.shape[1] + 1) ** 3
    return np.add.reduceat(np.add.reduceat(kernel, at_x, axis=0), at_y, axis=1)


def _sums_by_group(real, fake, real_groups, fake_groups) -> tuple[list[np.ndarray], np.ndarray, list[np.ndarray]]:
    """What `_variance` takes: sums of the kernel within and between the sets, and the sizes of the groups."""
    real, fake = _as_features(real, fake, least=4)
    (real, at_real), (fake, at_fake) = _by_group(real, real_groups, "real"), _by_group(fake, fake_groups, "fake")
    within = [_kernel_sums(real, real, at_real, at_real), _kernel_sums(fake, fake, at_fake, at_fake)]
    for sums in within:
        np.fill_diagonal(sums, 0)
    sizes = [np.diff([*at_real, len(real)]), np.diff([*at_fake, len(fake)])]
    return within, _kernel_sums(real, fake, at_real, at_fake), sizes


def _distance(within: list[np.ndarray], between: np.ndarray, sizes: list[np.ndarray]) -> float:
    """The kernel distance out of the sums of `_sums_by_group`."""
    inside = sum(_within(sums, own) for sums, own in zip(within, sizes, strict=True))
    return float(inside - 2 * between.sum() / (sizes[0].sum() * sizes[1].sum()))


def _left_out(within: list[np.ndarray], between: np.ndarray, sizes: list[np.ndarray]) -> list[np.ndarray]:
    """The kernel distance without each of the real groups, and without each of the fake groups."""
    total, cells, found = between.sum(), sizes[0].sum() * sizes[1].sum(), []
    for side, cross in enumerate((between, between.T)):
        sums, own, other = within[side], sizes[side], sizes[1 - side]
        pairs = own.sum() ** 2 - np.sum(own**2)
        without = (sums.sum() - 2 * sums.sum(axis=1)) / (pairs - 2 * own * (own.sum() - own))
        without -= 2 * (total - cross.sum(axis=1)) / (cells - own * other.sum())
        found.append(without + _within(within[1 - side], other))
    return found


def _within(sums: np.ndarray, sizes: np.ndarray) -> float:
    """Mean kernel over the pairs of different groups; `sums` has a diagonal of zeros."""
    return sums.sum() / (sizes.sum() ** 2 - np.sum(sizes**2))


def _variance(within: list[np.ndarray], between: np.ndarray, sizes: list[np.ndarray]) -> float:
    """Variance of the kernel distance by the jackknife over groups, without its surplus.

    A statistic of pairs has a part that is linear in the groups and a part that is not, and leaving out one group at a
    time counts the second part twice (Efron and Stein 1981). For equal distributions there is only the second part, so
    that the plain jackknife would give a standard error that is 1.4 times too large just where one asks whether a
    distance is 0. That part is the variance of what double centring leaves of the kernel; it is subtracted once.

    Args:
        within: sums of the kernel by pair of groups of the real, and of the fake, with diagonals of zeros.
        between: sums by real and fake group.
        sizes: samples of each real, and of each fake group.
    """
    cells = sizes[0].sum() * sizes[1].sum()
    residuals = _centred(between / np.outer(*sizes)) * np.outer(*sizes)
    n, m = between.shape
    surplus = 4 * np.sum(residuals**2) / cells**2 * n * m / ((n - 1) * (m - 1))  # what centring took from n m cells
    for sums, own in zip(within, sizes, strict=True):
        n, pairs = len(own), own.sum() ** 2 - np.sum(own**2)
        residuals = _centred_off_diagonal(sums / np.outer(own, own)) * np.outer(own, own)
        surplus += 2 * np.sum(residuals**2) / pairs**2 * n * (n - 1) / ((n - 2) * (n - 3))
    jackknife = sum((len(values) - 1) * np.var(values) for values in _left_out(within, between, sizes))
    # The surplus is a part of the variance, but no lower bound of an estimate of it: with the whole of it as the least,
    # the standard error was 19 % too large for sets of the same distribution. With half of it, chance is let through
    # on both sides, and no error comes near 0.
    return max(jackknife - surplus, surplus / 2)


def _centred(matrix: np.ndarray) -> np.ndarray:
    """Subtract the means of rows and columns."""
    return matrix - matrix.mean(axis=0) - matrix.mean(axis=1, keepdims=True) + matrix.mean()


def _centred_off_diagonal(matrix: np.ndarray) -> np.ndarray:
    """The same for a symmetric matrix (n, n) whose diagonal is 0 because it is unknown: rows and columns sum to 0.

    This is the U-centring of Szekely and Rizzo (arXiv 1310.2926, definition 2).
    """
    n = len(matrix)
    rows = matrix.sum(axis=1) / (n - 2)
    centred = matrix - rows - rows[:, None] + matrix.sum() / ((n - 1) * (n - 2))
    np.fill_diagonal(centred, 0)
    return centred


# ------------------------------------------------------------------------------------------------ precision and recall


def precision_recall(
    real: np.ndarray,
    fake: np.ndarray,
    k: int = 5,
    real_groups: np.ndarray | None = None,
    fake_groups: np.ndarray | None = None,
) -> dict[str, float]:
    """Precision and recall (arXiv 1904.06991, equation 2), density and coverage (arXiv 2002.09797).

    A set's manifold is the union of the balls around its samples that reach to their k-th nearest neighbour. Where
    groups are given, that is the k-th nearest of all other groups: slices of one person are neighbours, and would make
    balls so small that nobody else is in them.

    Args:
        real: features, (N, D).
        fake: features, (M, D).
        k: which neighbour of a sample, its own group not counted, lies on the ball's surface.
        real_groups: (N,) whose sample each is; None if all are independent.
        fake_groups: (M,), likewise.

    Returns:
        "precision": share of fakes on the real manifold, in [0, 1]. "recall": share of reals on the fake manifold, in
        [0, 1]. "density": real balls that a fake lies in, over k, about 1 for equal distributions, and may exceed 1.
        "coverage": share of reals with a fake in their ball, in [0, 1]; for equal distributions of N = M samples it is
        about 1 - 1 / 2^k, not 1.

    Raises:
        ValueError: for fewer than k + 1 samples in a set, or fewer than k of other groups, k < 1, NaN, or shapes that
            do not fit.
    """
    found = neighbourhoods(real, fake, k, real_groups, fake_groups)
    return {name: float(np.mean(values)) for name, values in found.items()}


def neighbourhoods(
    real: np.ndarray,
    fake: np.ndarray,
    k: int = 5,
    real_groups: np.ndarray | None = None,
    fake_groups: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """`precision_recall` sample by sample: "precision" and "density" (M,), "recall" and "coverage" (N,) float64."""
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    real, fake = _as_features(real, fake, least=k + 1)
    balls_of_fakes, covered = _balls(fake, real, _radii(real, k, real_groups))
    balls_of_reals, _ = _balls(real, fake, _radii(fake, k, fake_groups))
    return {
        "precision": (balls_of_fakes > 0).astype(np.float64),
        "recall": (balls_of_reals > 0).astype(np.float64),
        "density": balls_of_fakes / k,
        "coverage": covered.astype(np.float64),
    }


def _chunks(points: np.ndarray) -> list[np.ndarray]:
    return [points[start : start + CHUNK] for start in range(0, len(points), CHUNK)]


def _radii(points: np.ndarray, k: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Distance of each point to its k-th nearest neighbour in another group, (N,)."""
    groups = np.arange(len(points)) if groups is None else np.asarray(groups)
    if groups.shape != (len(points),):
        raise ValueError(f"groups must name a group for each of the {len(points)} samples")
    found = []
    for chunk, mine in zip(_chunks(points), _chunks(groups), strict=True):
        distances = np.where(mine[:, None] == groups, np.inf, cdist(chunk, points))
        found.append(np.partition(distances, k - 1, axis=1)[:, k - 1])
    radii = np.concatenate(found)
    if np.isinf(radii).any():
        raise ValueError(f"a sample has fewer than {k} neighbours in other groups")
    return radii


def _balls(points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In how many balls each point lies, and whether each ball holds a point."""
    counts, covered = [], np.zeros(len(centres), bool)
    for chunk in _chunks(points):
        inside = cdist(chunk, centres) <= radii
        counts.append(inside.sum(axis=1))
        covered |= inside.any(axis=0)
    return np.concatenate(counts), covered


# ----------------------------------------------------------------------------------------------------------- diversity


def diversity(
    images: np.ndarray,
    z: np.ndarray,
    similarity: Callable[[np.ndarray, np.ndarray], np.ndarray],
    groups: np.ndarray | None = None,
    pairs: int = 200,
    seed: int = 0,
) -> tuple[float, float]:
    """How alike slices of the same slice index are: the higher, the less diverse (arXiv 1610.09585, section 4.2).

    Compare with real slices of the same indices: a generator with few modes makes pairs that are more alike.

    Args:
        images: (N, ...), in whatever form `similarity` takes.
        z: (N,) integer slice indices; only slices with the same one make a pair.
        similarity: function of two stacks (P, ...) that returns (P,) numbers, such as `ldm.judging.metrics.ms_ssim`.
        groups: (N,) whose slice each is; two slices of one group never make a pair. None if all are independent.
        pairs: how many pairs to draw, at random and each at most once; fewer if there are not as many.
        seed: of the draw.

    Returns:
        (mean, standard deviation) of the similarity over the pairs.

    Raises:
        ValueError: if there is no pair, images contain NaN, or lengths differ.
    """
    images, z = np.asarray(images), np.asarray(z).reshape(-1)
    groups = np.arange(len(images)) if groups is None else np.asarray(groups).reshape(-1)
    if not len(images) == len(z) == len(groups):
        raise ValueError(f"there are {len(images)} images, but {len(z)} slice indices and {len(groups)} groups")
    if not np.isfinite(images).all():
        raise ValueError("images contain NaN or infinity")
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, not {pairs}")
    candidates = [np.empty((2, 0), int)]
    for index in np.unique(z):
        chosen = np.flatnonzero(z == index)
        both = chosen[np.stack(np.triu_indices(len(chosen), 1))]
        candidates.append(both[:, groups[both[0]] != groups[both[1]]])
    first, second = np.concatenate(candidates, axis=1)
    if not len(first):
        raise ValueError("no pair: diversity needs at least 2 slices of the same slice index from different groups")
    drawn = np.random.default_rng(seed).choice(len(first), min(pairs, len(first)), replace=False)
    values = similarity(images[first[drawn]], images[second[drawn]])
    return float(np.mean(values)), float(np.std(values))
