"""ldm/judging/fidelity.py against closed forms, scikit-learn, SciPy, and sets whose answer is known by construction."""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from ldm.judging import fidelity


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def gaussian_set(rng, mean, covariance, samples=50):
    """Samples whose mean and covariance are exactly these, so that the closed form holds without sampling error."""
    white = rng.normal(size=(samples, len(mean)))
    white -= white.mean(axis=0)
    white @= np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    return mean + white @ np.linalg.cholesky(covariance).T


# ---------------------------------------------------------------------------------------------------- Frechet distance


def test_frechet_distance_of_two_known_gaussians(rng):
    """Independent dimensions: |difference of means|^2 + |difference of standard deviations|^2."""
    means, deviations = rng.normal(size=(2, 4)), rng.uniform(0.5, 2, size=(2, 4))
    sets = [gaussian_set(rng, mean, np.diag(s**2), n) for mean, s, n in zip(means, deviations, (50, 70), strict=True)]
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((deviations[0] - deviations[1]) ** 2)
    assert fidelity.frechet_distance(*sets) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_covariances_that_do_not_commute(rng):
    a, b = np.array([[2.0, 0.9], [0.9, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))  # tr (ab)^(1/2) of 2 x 2 matrices
    ours = fidelity.frechet_distance(gaussian_set(rng, np.zeros(2), a), gaussian_set(rng, np.zeros(2), b))
    assert ours == pytest.approx(np.trace(a) + np.trace(b) - 2 * root, rel=1e-10)


def test_frechet_distance_equals_scipys_matrix_root(rng):
    real, fake = rng.normal(size=(80, 10)) @ rng.normal(size=(10, 10)), rng.normal(size=(60, 10)) + 1
    a, b = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    gap = real.mean(axis=0) - fake.mean(axis=0)
    expected = gap @ gap + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert fidelity.frechet_distance(real, fake) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("samples", [5, 40])
def test_frechet_distance_is_0_for_identical_sets_even_with_more_dimensions_than_samples(rng, samples):
    features = rng.normal(size=(samples, 20))
    assert 0 <= fidelity.frechet_distance(features, features[::-1]) < 1e-12


def test_frechet_distance_with_more_dimensions_than_samples_is_that_in_their_span(rng):
    """A rotation into a larger space changes no distance, but makes both covariances singular."""
    real, fake = rng.normal(size=(12, 4)), 2 * rng.normal(size=(9, 4)) + 1
    embed = np.linalg.qr(rng.normal(size=(30, 4)))[0].T
    expected = fidelity.frechet_distance(real, fake)
    assert fidelity.frechet_distance(real @ embed, fake @ embed) == pytest.approx(expected, rel=1e-10)


# ----------------------------------------------------------------------------------------------------- kernel distance


def mmd(real, fake):
    """The unbiased estimate of the paper, term by term, with scikit-learn's kernel."""
    within = 0
    for x in (real, fake):
        kernel = polynomial_kernel(x, degree=3, coef0=1)  # gamma is 1 / D unless told
        within += (kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1))
    return within - 2 * polynomial_kernel(real, fake, degree=3, coef0=1).mean()


def test_kernel_distance_equals_the_papers_with_scikit_learns_kernel(rng):
    real, fake = rng.normal(size=(30, 6)), rng.normal(size=(25, 6)) + 0.3
    assert fidelity.kernel_distance(real, fake)[0] == pytest.approx(mmd(real, fake), rel=1e-10)


def test_kernel_distance_by_person_is_a_mean_over_pairs_of_different_people(rng):
    """A plain double loop: within a set over slices of different people, between the sets over all."""
    real, fake = rng.normal(size=(9, 3)), rng.normal(size=(11, 3)) + 0.5
    who = {"real": np.arange(9) % 4, "fake": np.arange(11) % 5}

    def kernel(x, y):
        return (sum(a * b for a, b in zip(x, y, strict=True)) / 3 + 1) ** 3

    within = 0.0
    for rows, groups in ((real, who["real"]), (fake, who["fake"])):
        pairs = [kernel(rows[i], rows[j]) for i in range(len(rows)) for j in range(len(rows)) if groups[i] != groups[j]]
        within += sum(pairs) / len(pairs)
    between = [kernel(x, y) for x in real for y in fake]
    expected = within - 2 * sum(between) / len(between)
    assert fidelity.kernel_distance(real, fake, who["real"], who["fake"])[0] == pytest.approx(expected, rel=1e-10)


def people(rng, count, shift=0.0):
    """Features (N, 8) of people with 2 to 9 slices each, which resemble each other, and whose slices they are."""
    groups = np.repeat(np.arange(count), rng.integers(2, 10, count))
    return rng.normal(size=(count, 8))[groups] + 0.5 * rng.normal(size=(len(groups), 8)) + shift, groups


def draws(draw, repeats):
    return np.array([fidelity.kernel_distance(*draw()) for _ in range(repeats)]).T


def independent(rng, shift):
    return lambda: (rng.normal(size=(100, 8)), rng.normal(size=(80, 8)) + shift)


def grouped(rng, shift):
    def draw():
        (real, real_groups), (fake, fake_groups) = people(rng, 40), people(rng, 40, shift)
        return real, fake, real_groups, fake_groups

    return draw


@pytest.mark.parametrize("draw", [independent, grouped])
def test_kernel_distance_of_equal_distributions_lies_around_0(rng, draw):
    value, error = draws(draw(rng, 0.0), 400)
    assert abs(value.mean()) < 3 * value.std() / np.sqrt(len(value))
    assert (value < 0).mean() > 0.3, "an unbiased estimate of 0 must often be negative"
    assert (np.abs(value) < 2 * error).mean() > 0.93


@pytest.mark.parametrize("draw", [independent, grouped])
@pytest.mark.parametrize("shift", [0.0, 0.5])  # the plain jackknife gives 1.4 without a shift, the whole surplus 1.19
def test_standard_error_is_the_spread_over_repeated_draws(rng, draw, shift):
    value, error = draws(draw(rng, shift), 400)
    assert 0.9 < error.mean() / value.std(ddof=1) < 1.1


def test_the_jackknife_is_that_of_leaving_out_every_group_in_turn(rng, monkeypatch):
    for centring in ("_centred", "_centred_off_diagonal"):
        monkeypatch.setattr(fidelity, centring, np.zeros_like)  # no surplus: the plain jackknife
    (real, a), (fake, b) = people(rng, 7), people(rng, 6, 0.5)
    of_real = [fidelity.kernel_distance(real[a != k], fake, a[a != k], b)[0] for k in range(7)]
    of_fake = [fidelity.kernel_distance(real, fake[b != k], a, b[b != k])[0] for k in range(6)]
    expected = np.sqrt(6 * np.var(of_real) + 5 * np.var(of_fake))
    assert fidelity.kernel_distance(real, fake, a, b)[1] == pytest.approx(expected, rel=1e-10)


def test_distances_without_each_group_are_those_of_the_rest(rng):
    (real, a), (fake, b) = people(rng, 7), people(rng, 6, 0.5)
    of_real = [fidelity.kernel_distance(real[a != k], fake, a[a != k], b)[0] for k in range(7)]
    of_fake = [fidelity.kernel_distance(real, fake[b != k], a, b[b != k])[0] for k in range(6)]
    without = fidelity.kernel_distance_without(real, fake, a, b)
    np.testing.assert_allclose(without[0], of_real, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(without[1], of_fake, rtol=1e-9, atol=1e-12)


def test_slices_of_one_person_taken_for_independent_give_too_small_an_error_and_too_large_a_value(rng):
    """What the groups are for."""
    sets = [grouped(rng, 0.0)() for _ in range(100)]
    value, error = np.array([fidelity.kernel_distance(real, fake) for real, fake, *_ in sets]).T
    assert value.mean() > 5 * value.std() / np.sqrt(len(value))
    assert error.mean() < 0.9 * value.std()


def test_kernel_distance_does_not_depend_on_the_order_of_samples_or_the_names_of_groups(rng):
    (real, real_groups), (fake, fake_groups) = people(rng, 6), people(rng, 7, 0.4)
    a, b = rng.permutation(len(real)), rng.permutation(len(fake))
    names = np.array([f"person {(k * 5) % 6}" for k in range(6)])
    expected = fidelity.kernel_distance(real, fake, real_groups, fake_groups)
    shuffled = fidelity.kernel_distance(real[a], fake[b], names[real_groups[a]], fake_groups[b])
    np.testing.assert_allclose(shuffled, expected, rtol=1e-10)
    swapped = fidelity.kernel_distance(fake, real, fake_groups, real_groups)
    np.testing.assert_allclose(swapped, expected, rtol=1e-10)


def test_every_sample_its_own_group_is_no_groups_at_all(rng):
    real, fake = rng.normal(size=(9, 3)), rng.normal(size=(8, 3))
    np.testing.assert_allclose(
        fidelity.kernel_distance(real, fake, np.arange(9)[::-1], np.arange(8)), fidelity.kernel_distance(real, fake)
    )


def test_kernel_distance_refuses_groups_that_are_too_few_or_do_not_fit(rng):
    features = rng.normal(size=(12, 3))
    with pytest.raises(ValueError, match="fake has 3 groups, but a standard error needs at least 4"):
        fidelity.kernel_distance(features, features, None, np.arange(12) % 3)
    with pytest.raises(ValueError, match="real_groups must name a group for each of the 12 samples"):
        fidelity.kernel_distance(features, features, np.arange(11))


# ------------------------------------------------------------------------------------------------ precision and recall


def test_identical_sets_have_precision_and_recall_1(rng):
    features = rng.normal(size=(60, 5))
    scores = fidelity.precision_recall(features, features[::-1])
    assert (scores["precision"], scores["recall"], scores["coverage"]) == (1, 1, 1)
    assert scores["density"] > 1, "each sample lies in its own ball as well"


def test_disjoint_sets_score_0(rng):
    features = rng.uniform(size=(60, 5))
    assert set(fidelity.precision_recall(features, features + 10).values()) == {0.0}


def test_a_dropped_mode_costs_recall_and_coverage_but_not_precision(rng):
    real = rng.normal(size=(400, 3)) + np.repeat([[0, 0, 0], [20, 0, 0]], 200, axis=0)
    scores = fidelity.precision_recall(real, rng.normal(size=(400, 3)))
    assert scores["precision"] > 0.9 and scores["density"] > 0.8
    assert scores["recall"] < 0.55 and scores["coverage"] < 0.55
    invented = fidelity.precision_recall(rng.normal(size=(400, 3)), real)  # the other way round: a mode too many
    assert invented["precision"] < 0.55 and invented["recall"] > 0.9


def test_equal_distributions_have_the_density_and_coverage_that_the_paper_derives(rng):
    scores = [fidelity.precision_recall(*rng.normal(size=(2, 200, 4)), k=3) for _ in range(20)]
    assert np.mean([s["density"] for s in scores]) == pytest.approx(1, abs=0.03)
    expected = 1 - np.prod([(200 - i) / (400 - i) for i in range(1, 4)])  # all 3 nearest of the other 399 are real
    assert np.mean([s["coverage"] for s in scores]) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("chunk", [7, 1024])
def test_balls_equal_those_of_scikit_learn(rng, monkeypatch, chunk):
    monkeypatch.setattr(fidelity, "CHUNK", chunk)
    real, fake, k = rng.normal(size=(50, 3)), rng.normal(size=(40, 3)) + 1, 4

    def inside(points, centres):
        """(points, centres): whether the point is nearer to the centre than its k-th neighbour among the centres."""
        radii = NearestNeighbors(n_neighbors=k).fit(centres).kneighbors()[0][:, -1]  # kneighbors() leaves out itself
        distances, order = NearestNeighbors(n_neighbors=len(centres)).fit(centres).kneighbors(points)
        result = np.empty(distances.shape, bool)
        np.put_along_axis(result, order, distances <= radii[order], axis=1)
        return result

    fakes, reals = inside(fake, real), inside(real, fake)
    assert fidelity.precision_recall(real, fake, k) == {
        "precision": fakes.any(axis=1).mean(),
        "recall": reals.any(axis=1).mean(),
        "density": pytest.approx(fakes.sum() / (k * len(fake))),
        "coverage": fakes.any(axis=0).mean(),
    }


def test_neighbours_of_the_same_person_do_not_count(rng):
    """A plain double loop: the radius is the distance to the k-th nearest slice of somebody else."""
    (real, a), (fake, b), k = people(rng, 6), people(rng, 6, 0.3), 3

    def inside(points, centres, groups):
        radii = []
        for i, centre in enumerate(centres):
            others = [np.linalg.norm(centre - x) for j, x in enumerate(centres) if groups[j] != groups[i]]
            radii.append(sorted(others)[k - 1])
        return np.linalg.norm(points[:, None] - centres, axis=-1) <= np.array(radii)

    fakes, reals = inside(fake, real, a), inside(real, fake, b)
    assert fidelity.precision_recall(real, fake, k, a, b) == {
        "precision": fakes.any(axis=1).mean(),
        "recall": reals.any(axis=1).mean(),
        "density": pytest.approx(fakes.sum() / (k * len(fake))),
        "coverage": fakes.any(axis=0).mean(),
    }
    with pytest.raises(ValueError, match="fewer than 3 neighbours in other groups"):
        fidelity.precision_recall(real, fake, k, np.zeros(len(real)), b)


def test_k_must_be_a_neighbour(rng):
    features = rng.normal(size=(6, 2))
    assert fidelity.precision_recall(features, features, k=5)["precision"] == 1
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        fidelity.precision_recall(features, features, k=0)
    with pytest.raises(ValueError, match="real has 6 samples, but this needs at least 7"):
        fidelity.precision_recall(features, features, k=6)


# ----------------------------------------------------------------------------------------------------- what all refuse


@pytest.mark.parametrize(
    "function,least",
    [(fidelity.frechet_distance, 2), (fidelity.kernel_distance, 4), (fidelity.precision_recall, 6)],
)
def test_wrong_features_are_refused(rng, function, least):
    features = rng.normal(size=(10, 3))
    function(features[:least], features[-least:])
    with pytest.raises(ValueError, match=f"fake has {least - 1} samples, but this needs at least {least}"):
        function(features, features[: least - 1])
    for bad in (np.nan, np.inf):
        broken = features.copy()
        broken[4, 1] = bad
        with pytest.raises(ValueError, match="real features contain NaN or infinity"):
            function(broken, features)
    with pytest.raises(ValueError, match="real has 3 features each, but fake 2"):
        function(features, features[:, :2])
    with pytest.raises(ValueError, match=r"shape \(samples, dimensions\)"):
        function(features[:, 0], features)


# ----------------------------------------------------------------------------------------------------------- diversity


def recorded(pairs):
    """A similarity, 1 if both pictures start alike and else 0, that writes down the pairs it is given."""

    def similarity(a, b):
        pairs.extend(zip(a[:, 0].tolist(), b[:, 0].tolist(), strict=True))
        return (a[:, 1] == b[:, 1]).astype(float)

    return similarity


def test_diversity_pairs_slices_of_the_same_index_and_different_people():
    numbers = np.arange(60)
    z, groups = numbers % 4, numbers // 12
    images = np.stack([numbers, numbers], axis=1).astype(float)
    pairs = []
    fidelity.diversity(images, z, recorded(pairs), groups, pairs=100)
    first, second = np.array(pairs, int).T
    assert len(pairs) == len({frozenset(pair) for pair in pairs}) == 100, "each pair at most once"
    assert (z[first] == z[second]).all() and (groups[first] != groups[second]).all()
    assert set(z[first]) == {0, 1, 2, 3}


def test_diversity_is_the_mean_and_deviation_over_all_pairs_where_there_are_few():
    images = np.array([[0, 7.0], [1, 7], [2, 7], [3, 8], [4, 7]])  # of slice index 5, three are alike
    z = [5, 5, 5, 5, 6]
    pairs = []
    mean, deviation = fidelity.diversity(images, z, recorded(pairs))
    assert sorted(pairs) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert mean == pytest.approx(3 / 6) and deviation == pytest.approx(0.5)


def test_diversity_draws_the_same_pairs_for_the_same_seed(rng):
    images = rng.random((40, 2))

    def distance(a, b):
        return np.abs(a - b).sum(axis=1)

    z = np.zeros(40)
    first = fidelity.diversity(images, z, distance, pairs=20)
    assert first == fidelity.diversity(images, z, distance, pairs=20)
    assert first != fidelity.diversity(images, z, distance, pairs=20, seed=1)


def test_diversity_without_a_pair_is_refused():
    images = np.zeros((4, 2))
    for z, groups in [([0, 1, 2, 3], None), ([0, 0, 1, 1], [7, 7, 8, 8])]:
        with pytest.raises(ValueError, match="no pair: diversity needs at least 2 slices of the same slice index"):
            fidelity.diversity(images, z, recorded([]), groups)
    with pytest.raises(ValueError, match="no pair"):
        fidelity.diversity(images[:0], [], recorded([]))
    with pytest.raises(ValueError, match="4 images, but 3 slice indices and 4 groups"):
        fidelity.diversity(images, [0, 0, 0], recorded([]))
    with pytest.raises(ValueError, match="pairs must be at least 1"):
        fidelity.diversity(images, [0, 0, 0, 0], recorded([]), pairs=0)
    with pytest.raises(ValueError, match="NaN"):
        fidelity.diversity(images * np.nan, [0, 0, 0, 0], recorded([]))


def test_a_difference_of_kernel_distances_is_known_better_than_either(rng):
    """Pairs that share their noise: nothing between equals; and the error is that of repeated draws."""
    people = np.repeat(np.arange(8), 6)

    def draw():
        real = rng.normal(size=(8, 4)).repeat(6, axis=0) + rng.normal(size=(48, 4))
        first = 1.2 * rng.normal(size=(48, 4))
        return real, first, first + 0.5

    real, first, second = draw()
    assert fidelity.kernel_distance_difference(real, first, first, people) == (0.0, 0.0)
    value, error = fidelity.kernel_distance_difference(real, first, second, people)
    back, same = fidelity.kernel_distance_difference(real, second, first, people)
    assert back == pytest.approx(-value) and same == pytest.approx(error)
    found = np.array([fidelity.kernel_distance_difference(*draw(), people) for _ in range(60)])
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.35)


def test_the_error_of_a_difference_is_that_of_leaving_out_every_person_and_every_block_of_pairs_in_turn(rng):
    people, block = np.repeat(np.arange(5), [3, 2, 4, 3, 3]), np.arange(14) % 4  # pairs are dealt, one to each in turn
    real, first, second = rng.normal(size=(15, 3)), rng.normal(size=(14, 3)), rng.normal(size=(14, 3)) + 0.4

    def difference(real, first, second):
        return fidelity.kernel_distance(real, second)[0] - fidelity.kernel_distance(real, first)[0]

    of_people = [difference(real[people != person], first, second) for person in range(5)]
    of_blocks = [difference(real, first[block != number], second[block != number]) for number in range(4)]
    value, error = fidelity.kernel_distance_difference(real, first, second, people, blocks=4)
    assert value == pytest.approx(difference(real, first, second))
    assert error == pytest.approx(np.sqrt(4 * np.var(of_people) + 3 * np.var(of_blocks)))
