"""features.FeatureNet: what it learns, what its features are, and that it comes back from its file."""

import numpy as np
import pytest
import tensorflow as tf

import dataset
import features
from ldm.data import phantom, pixels
from ldm.training import losses, runs

SIZE = 32


@pytest.fixture(scope="module")
def slices():
    """Images (N, S, S, 1) in [-1, 1], z, label and case of phantoms: 6 people, every 4th slice."""
    found = [piece for piece in phantom.slices(6, SIZE) if piece["z"] % 4 == 0]
    images = np.stack([piece["image"] for piece in found])[..., None].astype("float32") / 127.5 - 1
    return images, *(np.array([piece[key] for piece in found], "int32") for key in ("z", "label", "case"))


def make(**options):
    return features.FeatureNet(SIZE, **{"num_labels": 2, "z_range": (0, 31), "width": 8, "size": 16, **options})


@pytest.fixture(scope="module")
def learned(slices):
    images, z, label, case = slices
    tf.keras.utils.set_random_seed(0)
    model = make()
    batches = features.neighbours({"image": images, "z": z, "label": label, "case": case}, seed=0, size=6)
    model.learn(batches, steps=250, learning_rate=5e-3)
    model.measure(images)
    return model


def test_contrastive_loss_against_its_definition():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(6, 3))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    terms = []
    for i in range(6):
        partner = i ^ 1
        others = [np.exp(unit[i] @ unit[j] / 0.3) for j in range(6) if j != i]
        terms.append(-np.log(np.exp(unit[i] @ unit[partner] / 0.3) / sum(others)))
    np.testing.assert_allclose(losses.contrastive(rows.astype("float32"), 0.3), np.mean(terms), rtol=1e-5)
    np.testing.assert_allclose(losses.contrastive(np.ones((8, 4), "float32"), 0.3), np.log(7), rtol=1e-5)


def test_it_learns_where_a_slice_is_and_whose_it_is(learned, slices):
    images, z, _, _ = slices
    said = learned.describe(images)
    assert np.abs(said["z"] - z).mean() < 2.5  # of 0 to 28; the middle for all would be off by 8
    np.testing.assert_allclose(said["features"].mean(axis=0), 0.0, atol=1e-4)
    np.testing.assert_allclose(said["features"].std(axis=0), 1.0, atol=1e-3)
    seeds = np.stack([np.full(len(images), 99), np.arange(len(images))], axis=1)
    changed = learned.describe(pixels.augment(tf.constant(images), seeds).numpy())["features"]
    distance = np.linalg.norm(changed[:, None] - said["features"][None], axis=-1)
    assert np.mean(distance.argmin(axis=1) == np.arange(len(images))) > 0.3  # by chance 1 of 48


def test_a_batch_has_other_people_at_two_slice_indices():
    rng = np.random.default_rng(0)
    z, case = np.tile(np.arange(10), 40), np.repeat(np.arange(40), 10)
    seen = np.zeros(400, bool)
    for _ in range(200):
        rows = features.rows_of_neighbours(z, case, 32, rng)
        assert len(rows) == 32 == len(np.unique(case[rows]))
        assert len(np.unique(z[rows[:16]])) == 1 == len(np.unique(z[rows[16:]]))
        seen[rows] = True
    assert seen.all()
    assert len(features.rows_of_neighbours(z[:60], case[:60], 32, rng)) == 6, "no more than there are people"
    each = features.rows_of_neighbours(z, np.arange(400), 32, rng)  # every slice is a person
    assert len(np.unique(each)) == 32 and len(np.unique(z[each])) <= 2


def test_a_feature_is_of_its_own_place():
    """What changes in one corner changes the features of that corner, and the others by what is normalised alone."""
    model = features.FeatureNet(64, width=8, size=16)  # one feature at each of 4 x 4 places
    images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 1)).astype("float32")
    images[1] = images[0]
    images[1, :8, :8] *= -1
    one, other = np.asarray(model(images)["features"]).reshape(2, 4, 4)
    change = np.abs(one - other)
    assert change[0, 0] > 3 * change[2:, 2:].max()


@pytest.mark.slow
def test_several_networks_belong_to_a_run_and_are_trained_once(tmp_path, monkeypatch):
    """Another run on the same people takes them over; one on others does not."""
    source, steps = dataset.open_source(phantoms_at(tmp_path / "phantom.zip", 6)), []
    make = features.FeatureNet
    monkeypatch.setattr(features, "FeatureNet", lambda *words, **options: make(*words, width=8, size=16, **options))
    runs_of = [tmp_path / name for name in ("first", "second", "third")]
    for run in runs_of:
        run.mkdir()
    images = np.random.default_rng(0).random((5, SIZE, SIZE, 1)).astype("float32")

    def described(run, source, seeds):
        return features.of_run(run, source, SIZE, 2, lambda: steps.append(1), seeds)(images)

    both, z = described(runs_of[0], source, 2)
    assert both.shape == (5, 32) and z.shape == (5,) and len(steps) == 4
    assert np.abs(both[:, :16] - both[:, 16:]).max() > 0.01, "of different seeds"
    one, _ = described(runs_of[0], source, 1)
    np.testing.assert_allclose(one, both[:, :16], atol=1e-5)
    names = features.names_of(runs_of[0], 2)
    assert len(steps) == 4 and len(set(names)) == 2
    (runs_of[1] / "features_0.keras").write_bytes(b"damaged")
    np.testing.assert_array_equal(described(runs_of[1], source, 2)[0], both)
    assert len(steps) == 4 and features.names_of(runs_of[1], 2) == names
    others = dataset.open_source(phantoms_at(tmp_path / "others.zip", 7))
    described(runs_of[2], others, 1)
    assert len(steps) == 6 and features.names_of(runs_of[2], 1) != names[:1]


def phantoms_at(path, people):
    dataset.write_phantoms(path, people=people, image_size=SIZE)
    return path


def test_batch_size_changes_nothing(learned, slices):
    for whole, parts in zip(*(learned.describe(slices[0], size).values() for size in (64, 5)), strict=True):
        np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-4)


def test_it_comes_back_from_its_file(learned, slices, tmp_path):
    model = learned
    model.trained_on = "these people"
    model.save(tmp_path / "features.keras")
    loaded = runs.load_model(tmp_path / "features.keras")
    assert loaded.get_config() == model.get_config() and loaded.trained_on == "these people"
    for name, values in model.describe(slices[0]).items():
        np.testing.assert_allclose(loaded.describe(slices[0])[name], values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [16, 32, 48, 64, 100, 196, 200, 208, 224, 400, 448])
def test_every_size_that_trains_has_features(size):
    """A size that `SpaceToDepth` cannot fold gets a margin of background: 200 by 3 has the features of 201."""
    model = features.FeatureNet(size, width=8, size=16)
    images = np.full((2, size, size, 1), -1, "float32")
    images[1, size // 4 : -size // 4, size // 4 : -size // 4] = 0.5
    found = model(images)["features"].numpy()
    assert found.shape == (2, 16) and np.isfinite(found).all() and np.abs(found[0] - found[1]).max() > 1e-4
    factor = max(size // 64, 1)
    if margin := -size % factor:
        whole = features.FeatureNet(size + margin, width=8, size=16)
        whole.network.set_weights(model.network.get_weights())
        padded = np.pad(images, ((0, 0), (0, margin), (0, margin), (0, 0)), constant_values=-1)
        np.testing.assert_allclose(whole(padded)["features"], found, atol=1e-5)


@pytest.mark.slow
def test_unknown_labels_teach_nothing(slices):
    images, z, label, _ = slices
    weights = []
    for known in (label, np.full_like(label, -1)):
        tf.keras.utils.set_random_seed(0)
        model = make()
        batch = {"image": images[:8], "z": z[:8], "label": known[:8]}
        before = model.network.get_layer("label").get_weights()[0]
        model.learn(tf.data.Dataset.from_tensors(batch).repeat(), steps=1)
        weights.append(np.abs(model.network.get_layer("label").get_weights()[0] - before).max())
    assert weights[0] > 1e-4 and weights[1] < 1e-4  # what is left is weight decay
