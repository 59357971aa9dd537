"""features.FeatureNet: what it learns, what its features are, and that it comes back from its file."""

import numpy as np
import pytest
import tensorflow as tf

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
    images, z, label, _ = slices
    tf.keras.utils.set_random_seed(0)
    model = make()
    batches = tf.data.Dataset.from_tensor_slices({"image": images, "z": z, "label": label})
    model.learn(batches.shuffle(48, seed=0).repeat().batch(16), steps=120, learning_rate=5e-3)
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
    model = features.FeatureNet(size, width=8, size=4)
    images = np.full((2, size, size, 1), -1, "float32")
    images[1, size // 4 : -size // 4, size // 4 : -size // 4] = 0.5
    found = model(images)["features"].numpy()
    assert found.shape == (2, 4) and np.isfinite(found).all() and np.abs(found[0] - found[1]).max() > 1e-4
    factor = max(size // 64, 1)
    if margin := -size % factor:
        whole = features.FeatureNet(size + margin, width=8, size=4)
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
