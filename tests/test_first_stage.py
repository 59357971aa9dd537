"""modules.VQVAE and VAE: latents, the crop box, bottlenecks, and that training learns."""

import numpy as np
import pytest
import tensorflow as tf
from tiny_models import (
    BOX,
    FIRST_STAGE,
    SIZE,
    batch_of,
    compiled,
    dataset_of,
    make_cropped,
    make_fsq,
    make_vae,
    make_vqvae,
    randomised,
    tensors,
)

import modules
from ldm.training import runs

# ---- first stage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_vqvae, pytest.param(make_fsq, marks=pytest.mark.slow), make_vae])
def test_latents_of_the_training_split_have_mean_0_and_deviation_1(make, tmp_path):
    model, data = randomised(make()), dataset_of(24, 8)
    model.measure_latents(data)
    everything = batch_of(24)
    latents = np.asarray(model.encode(everything["image"], everything["z"]))
    assert latents.shape == (24, *model.latent_shape) and latents.dtype == np.float32
    np.testing.assert_allclose(latents.mean((0, 1, 2)), 0.0, atol=1e-4)
    np.testing.assert_allclose(latents.std((0, 1, 2)), 1.0, atol=1e-4)

    model.save(tmp_path / "model.keras")
    loaded = runs.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.latent_mean, model.latent_mean)
    np.testing.assert_array_equal(loaded.latent_std, model.latent_std)
    assert np.abs(np.asarray(loaded.latent_std) - 1.0).max() > 1e-3
    np.testing.assert_allclose(loaded.encode(everything["image"], everything["z"]), latents, atol=1e-6)


def test_latents_are_measured_over_batches_of_unequal_size():
    model, data = randomised(make_vae()), batch_of(11)
    model.measure_latents(dataset_of(11, 4))
    latents = np.asarray(model.encode(data["image"], data["z"]))
    np.testing.assert_allclose(latents.mean((0, 1, 2)), 0.0, atol=1e-4)
    np.testing.assert_allclose(latents.std((0, 1, 2)), 1.0, atol=1e-4)


def test_latents_pass_through_the_vqvae_as_in_one_call():
    model, data = randomised(make_vqvae()), batch_of(6)
    model.measure_latents(dataset_of(24, 8))
    latents = model.encode(data["image"], data["z"])
    expected = np.clip(model(data), -1.0, 1.0)
    np.testing.assert_allclose(model.decode(latents, data["z"]), expected, atol=1e-4)


def test_decoding_quantises_so_that_a_small_error_of_the_latents_vanishes():
    model, data = randomised(make_vqvae()), batch_of(4)
    codes = model.codes(model.encode(data["image"], data["z"]))
    assert codes.dtype == tf.int32 and codes.shape == (4, 4, 4)
    assert np.min(codes) >= 0 and np.max(codes) < 16 and len(np.unique(codes)) > 1
    exact = model.latents_of(codes)
    np.testing.assert_array_equal(model.decode(exact + 1e-4, data["z"]), model.decode(exact, data["z"]))


def test_vae_encodes_to_the_mean_without_sampling():
    model, data = randomised(make_vae()), batch_of(4)
    model.measure_latents(dataset_of(24, 8))
    mean = model.encoder({name: data[name] for name in ("image", "z", "label")})[..., :3]
    latents = model.encode(data["image"], data["z"])
    np.testing.assert_allclose(latents, (mean - model.latent_mean) / model.latent_std, atol=1e-6)
    np.testing.assert_array_equal(model.encode(data["image"], data["z"]), latents)
    np.testing.assert_allclose(model.decode(latents, data["z"]), np.clip(model(data), -1.0, 1.0), atol=1e-5)


def test_vae_noise_is_another_in_every_step_and_the_same_when_a_step_is_repeated():
    model, data = randomised(make_vae()), tensors(batch_of(2))
    noise = []
    for step in (0, 1, 1):
        _, image, _ = model.forward(data, tf.constant(step, tf.int64), training=True)
        noise.append(np.asarray(image))
    np.testing.assert_array_equal(noise[1], noise[2])
    assert np.abs(noise[1] - noise[0]).max() > 1e-3
    other = randomised(make_vae(seed=6)).forward(data, tf.constant(1, tf.int64), training=True)[1]
    assert np.abs(noise[1] - other).max() > 1e-3
    still = model.forward(data, tf.constant(0, tf.int64), training=False)[1]
    np.testing.assert_allclose(still, model(data), atol=1e-6)


def test_the_decoder_of_a_vae_meets_noise_of_every_level_up_to_the_one_asked_for():
    """Of each slice, in deviations of each channel: uniform in [0, 0.5], so 0.25 on average; in training alone."""
    model, shape = make_vae(latent_noise=0.5), (200, 4, 4, 3)
    scale = np.float32([1.0, 5.0, 0.2])
    latents = scale * np.random.default_rng(0).standard_normal(shape).astype("float32")
    step = tf.constant(7, tf.int64)
    noise = (np.asarray(model.disturbed(tf.constant(latents), step)) - latents) / latents.std(axis=(0, 1, 2))
    levels = noise.std(axis=(1, 2, 3))
    assert levels.min() < 0.05 and 0.4 < levels.max() < 0.65 and abs(levels.mean() - 0.25) < 0.03
    np.testing.assert_allclose(noise.std(axis=(0, 1, 2)), np.sqrt(0.25 / 3), rtol=0.15)  # mean square of the levels
    assert np.abs(np.corrcoef(noise.reshape(200, -1)[:, :6], rowvar=False) - np.eye(6)).max() < 0.3
    np.testing.assert_array_equal(model.disturbed(latents, step), model.disturbed(latents, step))
    assert np.abs(np.asarray(model.disturbed(latents, step)) - model.disturbed(latents, step + 1)).max() > 0.1
    np.testing.assert_array_equal(make_vae().disturbed(latents, step), latents)
    model, data = randomised(make_vae(latent_noise=0.5)), tensors(batch_of(2))
    still = model.forward(data, step, training=False)[1]
    np.testing.assert_allclose(still, model(data), atol=1e-6)
    assert np.abs(np.asarray(model.forward(data, step, training=True)[1]) - still).max() > 1e-3


@pytest.mark.parametrize("make", [make_vqvae, make_fsq, make_vae])
def test_decoded_images_are_in_range(make):
    model = randomised(make())
    decoded = np.asarray(model.decode(50.0 * np.random.default_rng(0).normal(size=(3, 4, 4, 3)), np.arange(3)))
    assert decoded.shape == (3, SIZE, SIZE, 1) and decoded.dtype == np.float32
    assert decoded.min() >= -1.0 and decoded.max() <= 1.0


def outside(images):
    """What the box leaves out of (B, H, W, ...)."""
    top, left, height, width = BOX
    seen = np.zeros((SIZE, SIZE), bool)
    seen[top : top + height, left : left + width] = True
    return np.asarray(images)[:, ~seen]


def test_outside_the_box_nothing_is_seen_and_all_is_black():
    model, data = randomised(make_cropped(tissues=4)), batch_of(3)
    mixed, (top, left, height, width) = batch_of(3, seed=5)["image"], BOX
    shown = np.s_[:, top : top + height, left : left + width]
    mixed[shown] = data["image"][shown]
    latents = model.encode(data["image"], data["z"])
    assert latents.shape == (3, 2, 4, 4) and np.abs(outside(mixed) - outside(data["image"])).max() > 0.1
    np.testing.assert_array_equal(model.encode(mixed, data["z"]), latents)
    decoded, tissue = model.decode(latents, data["z"]), model.decode_tissue(latents, data["z"])
    for pictures, black in ((decoded, -1.0), (tissue, 0), (model(data), -1.0)):
        assert pictures.shape[:3] == (3, SIZE, SIZE)
        np.testing.assert_array_equal(outside(pictures), black)
    assert np.asarray(model.crop(decoded)).std() > 0 and np.unique(model.crop(tissue)).size > 1


def test_the_room_around_the_brain_is_black_where_the_box_has_edges_of_its_own():
    model = modules.VQVAE(80, crop_box=(8, 0, 64, 80), **{"num_codes": 16, **FIRST_STAGE})
    padded = np.asarray(model.pad(np.ones((1, 64, 80, 1), "float32"), -1.0))[0, ..., 0]
    room = min(model.patch, 2)
    np.testing.assert_array_equal(padded[8 + room : 72 - room], 1.0)  # to the left and right end of the picture
    assert (padded[: 8 + room] == -1).all() and (padded[72 - room :] == -1).all()


def test_a_step_compares_what_lies_in_the_box():
    model, batch = compiled(randomised(make_cropped())), tensors(batch_of(4))
    reported = model.test_step(batch)["reconstruction"]
    expected = model.compare(model.crop(batch["image"]), model.crop(model(batch)))
    np.testing.assert_allclose(reported, expected, rtol=1e-5)


def test_each_part_of_a_latent_has_its_own_code_of_the_one_codebook():
    model, data = randomised(make_cropped()), batch_of(3)
    latents = model.encode(data["image"], data["z"])
    codes = np.asarray(model.codes(latents))
    assert codes.shape == (3, 2, 8) == (3, *model.code_shape) and model.bits_per_slice == 16 * np.log2(16)
    raw = np.asarray(latents * model.latent_std + model.latent_mean)
    raw = raw.reshape(3, 2, 4, 2, 2)  # (B, h, w, part, channel)
    distance = ((raw[..., None, :] - np.asarray(model.bottleneck.codebook)) ** 2).sum(-1)
    np.testing.assert_array_equal(codes, distance.argmin(-1).reshape(3, 2, 8))
    np.testing.assert_array_equal(model.codes(model.latents_of(codes)), codes)


def test_each_code_is_known_to_show_brain_or_background():
    model = make_cropped()
    images = np.full((1, SIZE, SIZE, 1), -1.0, "float32")
    images[0, BOX[0] + 5, 14] = 0.0  # row 5 of the box: latent (1, 3), its codes 6 and 7
    expected = np.zeros((1, 2, 8), "float32")
    expected[0, 1, 6:] = 1.0
    np.testing.assert_array_equal(model.bottleneck.shows_brain(model.crop(images)), expected)


@pytest.mark.parametrize("condition_on_z", [True, False])
def test_slice_index_matters_only_when_asked_for(condition_on_z):
    model, data = randomised(make_vqvae(condition_on_z=condition_on_z)), batch_of(2)
    first, second = (np.asarray(model.encode(data["image"], np.full(2, z))) for z in (3, 30))
    assert (np.abs(first - second).max() > 1e-4) == condition_on_z


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((30, 4), "not divisible by the downsampling"), ((32, 5), "power of two"), ((32, 1), "power of two")],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        modules.VQVAE(*arguments[:1], downsampling=arguments[1])
    with pytest.raises(ValueError, match="8x6 pixels are not divisible"):
        make_vqvae(crop_box=(0, 0, 8, 6))
    with pytest.raises(ValueError, match="cannot be cut into 2 codes"):
        make_vqvae(codes_per_latent=2)


@pytest.mark.parametrize(
    "make", [make_vqvae, pytest.param(make_fsq, marks=pytest.mark.slow), pytest.param(make_vae, marks=pytest.mark.slow)]
)
def test_first_stage_learns_one_batch(make):
    model, data = compiled(make(), learning_rate=1e-2), dataset_of(8, 8)
    history = model.fit(data.repeat(), steps_per_epoch=20, epochs=3, verbose=0).history
    assert history["reconstruction"][-1] < 0.5 * history["reconstruction"][0]
    assert all(np.all(np.isfinite(values)) for values in history.values())
    if make is make_vqvae:
        assert 1 / 16 <= history["usage"][-1] <= 1.0
        assert 2.0 < history["perplexity"][-1] <= 16.0


def test_label_matters_only_when_asked_for_and_may_be_unknown():
    data = batch_of(2)
    for num_labels in (0, 2):
        model = randomised(make_vqvae(num_labels=num_labels))
        said = [np.asarray(model.encode(data["image"], data["z"], np.full(2, label))) for label in (-1, 0, 1)]
        apart = [np.abs(said[i] - said[j]).max() > 1e-4 for i, j in ((0, 1), (0, 2), (1, 2))]
        assert apart == [num_labels > 0] * 3
        np.testing.assert_array_equal(model.encode(data["image"], data["z"]), said[0])


@pytest.mark.slow
def test_tissues_are_learned_beside_the_picture():
    """A class for each side of a threshold: what the decoder sees of the picture is enough to name it."""
    data = batch_of(8)
    data["mask"] = np.where(data["image"][..., 0] > -0.5, 2, 0).astype("int32")
    model = compiled(make_vae(tissues=4, kl_weight=0.0, tissue_weight=1.0), learning_rate=1e-2)
    model.fit(tf.data.Dataset.from_tensors(data).repeat(), steps_per_epoch=60, epochs=1, verbose=0)
    latents = model.encode(data["image"], data["z"])
    tissue = np.asarray(model.decode_tissue(latents, data["z"]))
    assert tissue.shape == (8, SIZE, SIZE) and np.mean(tissue == data["mask"]) > 0.9


def test_kl_weight_goes_through_its_cycles():
    """The loss of a step is weighted by its place in the cycles; validation has the full weight at any step."""
    model, data = make_vae(kl_weight=0.3, kl_cycles=2, kl_cycle_steps=20), tensors(batch_of(2))
    model = randomised(model)

    def kl(step, training):
        return float(model.forward(data, tf.constant(step, tf.int64), training)[0]["kl"])

    _, losses, _ = model.bottleneck(model.encoder({name: data[name] for name in ("image", "z", "label")}))
    full = 0.3 * float(losses["kl"])
    shares = [kl(step, True) / full for step in (0, 1, 5, 9, 10, 11, 30)]
    np.testing.assert_allclose(shares, [0.0, 0.2, 1.0, 1.0, 0.0, 0.2, 1.0], atol=1e-5)
    np.testing.assert_allclose(kl(0, False), full, rtol=1e-5)


def test_usage_is_split_by_what_a_latent_shows():
    model = compiled(make_vqvae())
    data = batch_of(2)
    data["image"][:] = -1.0
    data["image"][:, 5, 9] = 0.0  # a single bright pixel: row 1, column 2 of the 4x4 latents
    shows = np.zeros((2, 4, 4))
    shows[:, 1, 2] = 1.0
    np.testing.assert_array_equal(model.bottleneck.shows_brain(data["image"]), shows)
    codes = np.zeros((2, 4, 4), "int32")
    codes[:, 1, 2] = [3, 4]
    model.bottleneck.watch({"codes": tf.constant(codes)}, data["image"])
    shares = {
        name: float(model.bottleneck.usage[name].result()) for name in ("usage", "usage_foreground", "usage_background")
    }
    assert shares == {"usage": 3 / 16, "usage_foreground": 2 / 16, "usage_background": 1 / 16}


def test_codes_and_latents_are_turned_into_one_another():
    for make in (make_vqvae, make_fsq):
        model, data = randomised(make()), batch_of(4)
        model.measure_latents(dataset_of(16, 8))
        codes = model.codes(model.encode(data["image"], data["z"]))
        np.testing.assert_array_equal(model.codes(model.latents_of(codes)), codes)
        counts = model.count_codes(dataset_of(16, 8))
        assert counts.sum() == 16 * 16 and counts.shape == (model.num_codes,)


def test_a_frozen_encoder_keeps_its_latents_and_its_codes():
    """What was stored of them, and learned on it, stays true of the model whose decoder goes on learning."""
    model, data = make_vqvae(), dataset_of(8, 8)
    model.encoder.trainable = False
    codebook, kernel = (np.array(model.bottleneck.codebook), np.array(model.decoder.trainable_weights[0]))
    compiled(model).fit(data.repeat(), steps_per_epoch=3, epochs=1, verbose=0)
    np.testing.assert_array_equal(model.bottleneck.codebook, codebook)
    assert np.abs(model.decoder.trainable_weights[0] - kernel).max() > 0
