"""modules.py: replicas, latents, files, denoise, averages, and that training learns. Networks of a few channels."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import modules
from ldm.diffusion import schedules
from ldm.training import callbacks, distribution, runs

SIZE = 16
WINDOW = [3, 0, 8, 16]  # top, left, height, width
FIRST_STAGE = {"width": 8, "latent_channels": 3, "seed": 5}


def images(count, size=SIZE, seed=0):
    """Blobs of different place and brightness on -1."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    centre, height = rng.uniform(0.3, 0.7, (count, 2, 1, 1)), rng.uniform(0.8, 1.9, (count, 1, 1))
    blob = height * np.exp(-((x - centre[:, 0]) ** 2 + (y - centre[:, 1]) ** 2) / 0.05)
    return (blob - 1.0)[..., None].astype("float32")


def batch_of(count, size=SIZE, channels=1, seed=0, unmasked=3):
    rng = np.random.default_rng(seed + 1)
    values = images(count, size, seed) if channels == 1 else rng.normal(size=(count, size, size, channels))
    return {
        "image": values.astype("float32"),
        "z": rng.integers(0, 40, count).astype("int32"),
        "label": rng.integers(-1, 2, count).astype("int32"),
        "case": np.arange(count, dtype="int32"),
        # the first of every 8 slices have no mask: over replicas they are not shared out evenly
        "mask": np.where(
            np.arange(count)[:, None, None] % 8 < unmasked, -1, rng.integers(0, 4, (count, size, size))
        ).astype("int32"),
    }


def tensors(batch):
    return {name: tf.constant(value) for name, value in batch.items()}


def dataset_of(count, batch_size, **options):
    """Batches of one static size, or, where the count is not divisible, a smaller last one."""
    batches = tf.data.Dataset.from_tensor_slices(batch_of(count, **options))
    return batches.batch(batch_size, drop_remainder=count % batch_size == 0)


def make_vqvae(**options):
    return modules.VQVAE(SIZE, **{"num_codes": 16, **FIRST_STAGE, **options})


def make_fsq(**options):
    return make_vqvae(**{"quantizer": "fsq", "levels": (5, 4, 3), **options})


def make_vae(**options):
    return modules.VAE(SIZE, **{"kl_weight": 1e-3, **FIRST_STAGE, **options})


def make_adversarial(make, **options):
    """Adversarial training from the first step, at its full weight from the third."""
    autoencoder = make(num_labels=2, tissues=4, patch=4)  # one level: the fewer layers, the sooner they are traced
    discriminator = modules.Discriminator(autoencoder.crop_box[2:], patch=2, width=8, num_labels=2)
    model = modules.AdversarialTraining(autoencoder, discriminator, ramp_steps=3, random_latents=True, **options)
    model.begun.assign(0.0)
    return model


def make_windowed(**options):
    """A VQ-VAE that sees 8x16 of 16x16 pixels, 2x4 latents of 4 channels, and writes each with two codes."""
    return make_vqvae(crop_box=WINDOW, latent_channels=4, codes_per_latent=2, **options)


def make_adversarial_vqvae(**options):
    return make_adversarial(make_windowed, **options)


def make_adversarial_vae(**options):
    return make_adversarial(make_vae, **options)


def make_unet(**options):
    arguments = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "head_size": 4, "num_labels": 2}
    return modules.UNet(**{"size": 8, "channels": 2, **arguments, **options})


def make_diffusion(unet=None, **options):
    return modules.DiffusionModel(unet or make_unet(), **{"seed": 3, **options})


def make_small_diffusion(**options):
    """For training: fewer layers are traced sooner."""
    return make_diffusion(make_unet(multipliers=(1,), attention=(), num_labels=0), **options)


def randomised(model, seed=0):
    """Random weights, so that layers which start at zero hide nothing."""
    rng = np.random.default_rng(seed)
    model.set_weights([(0.2 * rng.normal(size=w.shape) + (w.ndim == 1)).astype(w.dtype) for w in model.get_weights()])
    return model


def compiled(model, learning_rate=2e-3, kind=keras.optimizers.AdamW, **options):
    optimizer = kind(learning_rate, epsilon=1e-4, **options)
    more = {}
    if isinstance(model, modules.AdversarialTraining):
        more["discriminator_optimizer"] = keras.optimizers.AdamW(learning_rate, epsilon=1e-4)
    model.compile(optimizer=optimizer, jit_compile=False, **more)  # as train.py on a CPU
    return model


# ---- replicas --------------------------------------------------------------------------------------------------------


def trained(replicas, make, data, averaged):
    keras.utils.set_random_seed(1)
    with distribution.make_strategy(replicas).scope():
        options = {"kind": callbacks.AveragingAdamW, "use_ema": True, "ema_momentum": 0.7} if averaged else {}
        model = compiled(make(), learning_rate=5e-3, **options)
    batches, validation = data
    history = model.fit(batches(), epochs=2, shuffle=False, verbose=0, validation_data=validation()).history
    return model, history


@pytest.mark.parametrize(
    ("make", "averaged", "data"),
    [
        # of the last validation batch one replica gets one example, the other nothing
        pytest.param(
            *(make_vqvae, False, (lambda: dataset_of(16, 8), lambda: dataset_of(9, 8, seed=3))), marks=pytest.mark.slow
        ),
        pytest.param(
            *(make_fsq, False, (lambda: dataset_of(16, 8), lambda: dataset_of(9, 8, seed=3))), marks=pytest.mark.slow
        ),
        (make_adversarial_vqvae, False, (lambda: dataset_of(16, 8), lambda: dataset_of(9, 8, seed=3, unmasked=0))),
        pytest.param(
            *(make_adversarial_vae, False, (lambda: dataset_of(16, 8), lambda: dataset_of(9, 8, seed=3, unmasked=0))),
            marks=pytest.mark.slow,
        ),
        (make_small_diffusion, True, (lambda: dataset_of(16, 8, size=8, channels=2),) * 2),
    ],
    ids=["vqvae", "fsq", "adversarial-vqvae", "adversarial-vae", "diffusion"],
)
def test_two_replicas_give_the_weights_and_reports_of_one_at_the_same_global_batch(make, averaged, data):
    """Four steps of fit: weights, codebook, averages, optimiser's averages, and every reported number."""
    one, history_of_one = trained(1, make, data, averaged)
    two, history_of_two = trained(2, make, data, averaged)
    # The hinge has corners, where the last digit decides for a whole patch; a wrong step would be 10 times that.
    tolerance = 5e-4 if isinstance(one, modules.AdversarialTraining) else 1e-5
    for weight, other in zip(one.weights, two.weights, strict=True):
        np.testing.assert_allclose(other, weight, rtol=1e-4, atol=tolerance, err_msg=weight.path)
    for variable, other in zip(one.optimizer.variables, two.optimizer.variables, strict=True):
        np.testing.assert_allclose(other, variable, rtol=1e-3, atol=tolerance, err_msg=variable.path)
    assert history_of_one.keys() == history_of_two.keys()
    for name, values in history_of_one.items():
        np.testing.assert_allclose(history_of_two[name], values, rtol=1e-4, atol=tolerance / 10, err_msg=name)
    assert keras.ops.convert_to_numpy(two.optimizer.iterations) == 4
    if isinstance(one, modules.AdversarialTraining):
        for variable, other in zip(
            one.discriminator_optimizer.variables, two.discriminator_optimizer.variables, strict=True
        ):
            np.testing.assert_allclose(other, variable, rtol=1e-3, atol=tolerance, err_msg=variable.path)
        assert history_of_one["adversarial"] == pytest.approx([0.5, 1.0])
        assert min(history_of_one["adaptive_weight"]) > 0
    if make in (make_vqvae, make_adversarial_vqvae):
        quantizer = two.quantizer if make is make_vqvae else two.autoencoder.quantizer
        copies = [[np.asarray(v) for v in weight.value.values] for weight in quantizer.weights]
        for first, second in copies:  # the trap: replicas whose codebooks drift apart in silence
            np.testing.assert_array_equal(first, second)
        assert history_of_one["revived"][0] > 0


# ---- first stage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_vqvae, make_fsq, make_vae])
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


def test_vae_samples_in_training_and_its_kl_is_the_closed_form():
    model = compiled(make_vae(kl_weight=0.5))
    encoded = tf.concat([tf.fill((2, 4, 4, 3), 1.5), tf.fill((2, 4, 4, 3), np.log(4.0).astype("float32"))], axis=-1)
    latents, extra, _ = model.bottleneck(encoded, 0, training=False)
    np.testing.assert_array_equal(latents, encoded[..., :3])
    each = 0.5 * (1.5**2 + 4.0 - 1.0 - np.log(4.0))  # KL(N(1.5, 4) || N(0, 1))
    np.testing.assert_allclose(extra["kl"], 0.5 * each * 4 * 4 * 3, rtol=1e-5)
    sampled, _, _ = model.bottleneck(tf.repeat(encoded, 100, axis=0), 7, training=True)
    np.testing.assert_allclose(np.mean(sampled), 1.5, atol=0.1)
    np.testing.assert_allclose(np.std(sampled), 2.0, atol=0.1)


@pytest.mark.parametrize("make", [make_vqvae, make_fsq, make_vae])
def test_decoded_images_are_in_range(make):
    model = randomised(make())
    decoded = np.asarray(model.decode(50.0 * np.random.default_rng(0).normal(size=(3, 4, 4, 3)), np.arange(3)))
    assert decoded.shape == (3, SIZE, SIZE, 1) and decoded.dtype == np.float32
    assert decoded.min() >= -1.0 and decoded.max() <= 1.0


def outside(images):
    """What the window does not show of (B, H, W, ...)."""
    top, left, height, width = WINDOW
    seen = np.zeros((SIZE, SIZE), bool)
    seen[top : top + height, left : left + width] = True
    return np.asarray(images)[:, ~seen]


def test_outside_the_window_nothing_is_seen_and_all_is_black():
    model, data = randomised(make_windowed(tissues=4)), batch_of(3)
    mixed, (top, left, height, width) = batch_of(3, seed=5)["image"], WINDOW
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


def test_the_room_around_the_brain_is_black_where_the_window_has_edges_of_its_own():
    model = modules.VQVAE(80, crop_box=(8, 0, 64, 80), **{"num_codes": 16, **FIRST_STAGE})
    padded = np.asarray(model.pad(np.ones((1, 64, 80, 1), "float32"), -1.0))[0, ..., 0]
    room = min(model.patch, 2)
    np.testing.assert_array_equal(padded[8 + room : 72 - room], 1.0)  # to the left and right end of the picture
    assert (padded[: 8 + room] == -1).all() and (padded[72 - room :] == -1).all()


def test_a_step_compares_what_the_window_shows():
    model, batch = compiled(randomised(make_windowed())), tensors(batch_of(4))
    reported = model.test_step(batch)["reconstruction"]
    expected = model.compare(model.crop(batch["image"]), model.crop(model(batch)))
    np.testing.assert_allclose(reported, expected, rtol=1e-5)


def test_each_part_of_a_latent_has_its_own_code_of_the_one_codebook():
    model, data = randomised(make_windowed()), batch_of(3)
    latents = model.encode(data["image"], data["z"])
    codes = np.asarray(model.codes(latents))
    assert codes.shape == (3, 2, 8) == (3, *model.code_shape) and model.bits_per_slice == 16 * np.log2(16)
    raw = np.asarray(latents * model.latent_std + model.latent_mean)
    raw = raw.reshape(3, 2, 4, 2, 2)  # (B, h, w, part, channel)
    distance = ((raw[..., None, :] - np.asarray(model.quantizer.codebook)) ** 2).sum(-1)
    np.testing.assert_array_equal(codes, distance.argmin(-1).reshape(3, 2, 8))
    np.testing.assert_array_equal(model.codes(model.latents_of(codes)), codes)


def test_brain_is_told_from_background_for_each_code():
    model = make_windowed()
    images = np.full((1, SIZE, SIZE, 1), -1.0, "float32")
    images[0, WINDOW[0] + 5, 14] = 0.0  # row 5 of the window: latent (1, 3), its codes 6 and 7
    expected = np.zeros((1, 2, 8), "float32")
    expected[0, 1, 6:] = 1.0
    np.testing.assert_array_equal(model.shows_brain(model.crop(images)), expected)


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
    model = make_vae(kl_cycles=2, kl_cycle_steps=20)
    encoded = tf.ones((2, 4, 4, 6))
    kl = [float(model.bottleneck(encoded, step, training=True)[1]["kl"]) for step in (0, 1, 5, 9, 10, 11, 30)]
    np.testing.assert_allclose(np.array(kl) / kl[-1], [0.0, 0.2, 1.0, 1.0, 0.0, 0.2, 1.0], atol=1e-5)
    np.testing.assert_allclose(model.bottleneck(encoded, 0, training=False)[1]["kl"], kl[-1], rtol=1e-5)


def test_active_units_are_those_whose_mean_varies():
    metric = modules.ActiveUnits((1, 2, 2))
    mean = np.zeros((4, 1, 2, 2), "float32")
    mean[:, 0, 0, 0] = [0.3, -0.3, 0.3, -0.3]  # variance 0.09
    mean[:, 0, 0, 1] = 7.0  # constant
    mean[:, 0, 1, 0] = [0.05, -0.05, 0.05, -0.05]  # variance 0.0025
    for part in (mean[:3], mean[3:]):
        metric.update_state(part)
    assert float(metric.result()) == 0.25


def test_usage_is_split_by_what_a_latent_shows():
    model = compiled(make_vqvae())
    data = batch_of(2)
    data["image"][:] = -1.0
    data["image"][:, 5, 9] = 0.0  # a single bright pixel: row 1, column 2 of the 4x4 latents
    shows = np.zeros((2, 4, 4))
    shows[:, 1, 2] = 1.0
    np.testing.assert_array_equal(model.shows_brain(data["image"]), shows)
    codes = np.zeros((2, 4, 4), "int32")
    codes[:, 1, 2] = [3, 4]
    model.after_step((tf.zeros((2, 4, 4, 3)), tf.constant(codes)), data, 0, training=False)
    shares = {name: float(model.usage[name].result()) for name in ("usage", "usage_foreground", "usage_background")}
    assert shares == {"usage": 3 / 16, "usage_foreground": 2 / 16, "usage_background": 1 / 16}


def test_codes_and_latents_are_turned_into_one_another():
    for make in (make_vqvae, make_fsq):
        model, data = randomised(make()), batch_of(4)
        model.measure_latents(dataset_of(16, 8))
        codes = model.codes(model.encode(data["image"], data["z"]))
        np.testing.assert_array_equal(model.codes(model.latents_of(codes)), codes)
        counts = model.count_codes(dataset_of(16, 8))
        assert counts.sum() == 16 * 16 and counts.shape == (model.num_codes,)


# ---- adversarial training --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_before_it_begins_the_autoencoder_is_trained_as_by_itself():
    def weights(model, inner):
        keras.utils.set_random_seed(4)
        model = compiled(model())
        if model is not inner(model):
            model.begun.assign(-1.0)
        model.fit(dataset_of(16, 8), epochs=1, shuffle=False, verbose=0)
        return inner(model).get_weights()

    alone = weights(lambda: make_windowed(num_labels=2, tissues=4, patch=4), lambda model: model)
    judged = weights(make_adversarial_vqvae, lambda model: model.autoencoder)
    for one, other in zip(alone, judged, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-6)


def test_adaptive_weight_makes_the_gradients_of_the_last_layer_comparable():
    """arXiv 2012.09841, eq. 7, on two losses that are linear in the picture, so that the ratio is known."""
    model = make_adversarial_vae(weight=0.3, cap=10.0)
    data, autoencoder = tensors(batch_of(4)), model.autoencoder
    with tf.GradientTape(persistent=True) as tape:
        _, fake, _ = autoencoder.forward(data, 0, training=True)
        one, four = tf.reduce_mean(fake), 4.0 * tf.reduce_mean(fake)
    np.testing.assert_allclose(model.adaptive_weight(tape, one, four), 0.3 / 4, rtol=1e-4)
    np.testing.assert_allclose(model.adaptive_weight(tape, four, one), 0.3 * 4, rtol=1e-4)
    model.cap = 0.1
    np.testing.assert_allclose(model.adaptive_weight(tape, four, one), 0.1, rtol=1e-6)


@pytest.mark.slow
def test_discriminator_tells_real_from_fake_and_the_autoencoder_hears_of_it():
    """Against a decoder that stands still, the discriminator must win; and its gradient reaches the decoder."""
    model = compiled(make_adversarial_vae(), learning_rate=1e-2)
    data = tensors(batch_of(8))
    before = [np.array(w) for w in model.autoencoder.decoder.trainable_variables]
    history = model.fit(tf.data.Dataset.from_tensors(data).repeat(), steps_per_epoch=10, epochs=3, verbose=0).history
    assert any(np.abs(np.asarray(w) - old).max() > 0 for w, old in zip(model.learned()[-8:], before[-8:], strict=True))
    assert history["d_real"][0] > history["d_fake"][0]
    still = np.random.default_rng(0).normal(size=(8, SIZE, SIZE, 1)).astype("float32")
    for _ in range(30):
        report = model.train_discriminator(data, [tf.constant(still)])
    assert float(report["d_real"]) > 0.5 and float(report["d_fake"]) < -0.5


def test_discriminator_is_told_slice_index_and_label():
    discriminator, data = randomised(modules.Discriminator((SIZE, SIZE), patch=2, width=8, num_labels=2)), batch_of(2)
    known = {"image": data["image"], "z": np.full(2, 3), "label": np.zeros(2, "int32")}
    first = np.asarray(discriminator(known))
    assert first.shape == (2, 4, 4, 1)
    for other in ({"z": np.full(2, 20)}, {"label": np.ones(2, "int32")}):
        assert np.abs(np.asarray(discriminator(known | other)) - first).max() > 1e-4


def test_a_discriminator_patch_sees_as_far_as_is_said():
    discriminator = randomised(modules.Discriminator((64, 64), patch=2, width=8))
    image = tf.Variable(images(1, 64))
    with tf.GradientTape() as tape:
        x = image
        for layer in discriminator.layers:  # the convolutions alone: group normalisation sees everything
            if isinstance(layer, modules.SpaceToDepth | keras.layers.Conv2D):
                x = layer(x)
        middle = x[0, 8, 8, 0]
    seen = np.flatnonzero(np.abs(tape.gradient(middle, image)[0, :, :, 0]).sum(0))
    assert seen.max() - seen.min() + 1 == 26  # 13 patches of 2 pixels


def test_a_discriminator_may_be_told_nothing():
    discriminator, data = (
        randomised(modules.Discriminator((SIZE, SIZE), patch=2, width=8, condition_on_z=False)),
        batch_of(2),
    )
    known = {"image": data["image"], "z": np.full(2, 3), "label": np.zeros(2, "int32")}
    np.testing.assert_array_equal(
        discriminator(known), discriminator(known | {"z": np.full(2, 30), "label": np.ones(2, "int32")})
    )


@pytest.mark.slow
def test_both_learning_rates_are_at_the_same_place_once_it_begins():
    model = compiled(make_adversarial_vqvae())
    model.begun.assign(-1.0)
    model.fit(dataset_of(16, 8), epochs=1, verbose=0)
    assert int(model.discriminator_optimizer.iterations) == 0
    model.begin()
    assert int(model.discriminator_optimizer.iterations) == int(model.optimizer.iterations) == 2


def test_what_is_kept_of_adversarial_training_is_the_autoencoder(tmp_path):
    model = compiled(make_adversarial_vqvae())
    runs.export(model, tmp_path / "autoencoder.keras")
    loaded = runs.load_model(tmp_path / "autoencoder.keras")
    assert isinstance(loaded, modules.VQVAE)
    for ours, theirs in zip(model.autoencoder.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(theirs, ours)


@pytest.mark.slow
def test_a_checkpoint_holds_both_optimizers_the_bank_and_when_it_began(tmp_path):
    model = compiled(make_adversarial_vqvae())
    model.fit(dataset_of(16, 8), epochs=2, verbose=0)
    model.strength.assign(0.25)
    model.save_weights(tmp_path / "last.weights.h5")
    keras.utils.set_random_seed(9)
    other = compiled(make_adversarial_vqvae())
    other.begun.assign(-1.0)
    other.load_weights(tmp_path / "last.weights.h5")
    assert float(other.begun) == 0.0 and float(other.strength) == 0.25 and int(other.bank.seen) == 32
    for name in ("optimizer", "discriminator_optimizer"):
        pairs = zip(getattr(model, name).variables, getattr(other, name).variables, strict=True)
        for ours, theirs in pairs:
            np.testing.assert_array_equal(theirs, ours)


# ---- files -----------------------------------------------------------------------------------------------------------

UNUSUAL = {
    "vqvae": (
        modules.VQVAE,
        {
            "image_size": 16,
            "crop_box": [4, 0, 8, 16],
            "downsampling": 8,
            "patch": 4,
            "width": 12,
            "blocks": 2,
            "latent_channels": 6,
            "condition_on_z": False,
            "num_labels": 2,
            "tissues": 3,
            "structure_weight": 0.7,
            "tissue_weight": 0.2,
            "clip_norm": 0.4,
            "seed": 8,
            "quantizer": "ema",
            "num_codes": 9,
            "cosine": True,
            "levels": [3, 2],
            "codes_per_latent": 3,
            "commitment": 0.6,
        },
    ),
    "fsq": (
        modules.VQVAE,
        {
            "image_size": 16,
            "crop_box": [0, 0, 16, 16],
            "downsampling": 8,
            "patch": 4,
            "width": 12,
            "blocks": 2,
            "latent_channels": 6,
            "condition_on_z": False,
            "num_labels": 2,
            "tissues": 3,
            "structure_weight": 0.7,
            "tissue_weight": 0.2,
            "clip_norm": 0.4,
            "seed": 8,
            "quantizer": "fsq",
            "num_codes": 60,
            "cosine": False,
            "levels": [5, 4, 3],
            "codes_per_latent": 2,
            "commitment": 0.6,
        },
    ),
    "vae": (
        modules.VAE,
        {
            "image_size": 16,
            "crop_box": [0, 0, 16, 16],
            "downsampling": 2,
            "patch": 2,
            "width": 12,
            "blocks": 2,
            "latent_channels": 2,
            "condition_on_z": False,
            "num_labels": 2,
            "tissues": 3,
            "structure_weight": 0.7,
            "tissue_weight": 0.2,
            "clip_norm": 0.4,
            "seed": 8,
            "kl_weight": 0.01,
            "kl_cycles": 3,
            "kl_cycle_steps": 50,
        },
    ),
    "unet": (
        modules.UNet,
        {
            "size": [12, 8],
            "channels": 3,
            "width": 12,
            "multipliers": [1, 2, 3],
            "blocks": 1,
            "attention": [6],
            "head_size": 6,
            "num_labels": 3,
            "dropout": 0.25,
            "covariates": [0, 2],
            "mask": True,
            "gates": True,
            "recompute": False,  # goes with no dropout
        },
    ),
    "diffusion": (
        modules.DiffusionModel,
        {
            "schedule": "sigmoid",
            "prediction": "eps",
            "drop_conditions": 0.3,
            "clip_x_0": True,
            "clip_norm": None,
            "seed": 8,
            "zero_snr": False,
            "min_snr_gamma": 5.0,
            "loss": "l1",
            "accumulate": 2,
            "sigma_data": 0.7,
        },
    ),
}


def outputs(model):
    """What a model says to one fixed input."""
    if isinstance(model, modules.Autoencoder):
        data = batch_of(3)
        latents = model.encode(data["image"], data["z"], data["label"])
        return [model(data), latents, model.decode_tissue(latents, data["z"], data["label"])]
    unet = model if isinstance(model, modules.UNet) else model.unet
    shape = (*unet.arguments["size"], unet.arguments["channels"])
    data = batch_of(3) | {"image": np.random.default_rng(1).normal(size=(3, *shape)).astype("float32")}
    inputs = {"x": data["image"], "t": np.array([0.1, 0.5, 1.0], "float32"), "keep": np.ones(3, "float32")}
    more = {
        "covariates": np.array([[0.5, 1], [-2, 0], [np.nan] * 2], "float32"),
        "mask": np.full((3, *shape[:2], 4), 0.25),
    }
    told = {"z": data["z"], "label": data["label"], **{name: more[name] for name in more if name in unet.input}}
    said = [model(inputs | told)]
    if model is not unet:
        said.append(model.denoise(data["image"], inputs["t"], {"z": data["z"], "label": data["label"]}))
    return said


@pytest.mark.parametrize("name", UNUSUAL)
def test_model_comes_back_from_one_file_with_every_argument(name, tmp_path):
    """Keras records the constructor arguments of a Layer by itself, but not those of a Model."""
    kind, arguments = UNUSUAL[name]
    more = {"unet": make_unet()} if name == "diffusion" else {}
    model = randomised(kind(**arguments, **more))
    model.save(tmp_path / "model.keras")
    loaded = runs.load_model(tmp_path / "model.keras")
    assert type(loaded) is kind and len(outputs(loaded)) == len(outputs(model))
    for ours, theirs in zip(outputs(model), outputs(loaded), strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-6, atol=1e-6)
    for argument, value in arguments.items():
        stored = loaded.arguments[argument] if name == "unet" else loaded.get_config()[argument]
        assert stored == value, argument
    signature = set(kind.__init__.__code__.co_varnames[1 : kind.__init__.__code__.co_argcount])
    if issubclass(kind, modules.Autoencoder):
        base = modules.Autoencoder.__init__.__code__
        signature |= set(base.co_varnames[1 : base.co_argcount])
    assert signature == set(arguments) | set(more)  # a new argument must be added here, and to get_config


class Averages(keras.callbacks.Callback):
    """Averages by the definition, a <- 0.5 a + 0.5 w after each step, a <- w after the first; and a copy for use.

    All while `fit` runs: at its end Keras overwrites the model's weights with the averages.
    """

    def __init__(self, path):
        super().__init__()
        self.path, self.averages = path, None

    def on_train_batch_end(self, batch, logs=None):
        self.raw = [np.asarray(weight) for weight in self.model.trainable_variables]
        self.averages = [0.5 * a + 0.5 * w for a, w in zip(self.averages or self.raw, self.raw, strict=True)]

    def on_epoch_end(self, epoch, logs=None):
        runs.export(self.model, self.path)
        self.copy = runs.copy_for_use(self.model)
        self.after = [np.asarray(weight) for weight in self.model.trainable_variables]


@pytest.mark.slow
def test_copy_for_use_holds_the_averaged_weights_and_not_the_raw_ones(tmp_path):
    data = dataset_of(8, 8, size=8, channels=2).repeat()
    model = compiled(make_small_diffusion(), learning_rate=1e-2, use_ema=True, ema_momentum=0.5)
    seen = Averages(tmp_path / "diffusion.keras")
    model.fit(data, steps_per_epoch=4, verbose=0, callbacks=[seen])
    assert max(np.abs(a - w).max() for a, w in zip(seen.averages, seen.raw, strict=True)) > 1e-3
    for copy in (seen.copy, runs.load_model(seen.path)):
        for weight, average in zip(copy.trainable_variables, seen.averages, strict=True):
            np.testing.assert_allclose(weight, average, atol=1e-6, err_msg=weight.path)
    for before, after in zip(seen.raw, seen.after, strict=True):
        np.testing.assert_array_equal(after, before)  # the model itself goes on with its own


# ---- denoise ---------------------------------------------------------------------------------------------------------


def noisy(count=4, size=8, channels=2):
    rng = np.random.default_rng(2)
    x_t = rng.normal(size=(count, size, size, channels)).astype("float32")
    t = np.linspace(0.05, 0.95, count).astype("float32")
    return x_t, t, {"z": np.arange(count, dtype="int32"), "label": np.zeros(count, "int32")}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x_0"])
def test_denoise_is_the_formula_of_the_raw_network_output(prediction, schedule):
    model = make_diffusion(randomised(make_unet(width=4)), prediction=prediction, schedule=schedule)
    x_t, t, conditions = noisy()
    alpha, sigma = (np.asarray(v)[:, None, None, None] for v in schedules.SCHEDULES[schedule](t))
    output = np.asarray(model.unet({"x": x_t, "t": t, "keep": np.ones(4, "float32"), **conditions}))
    expected = {"eps": (x_t - sigma * output) / alpha, "v": alpha * x_t - sigma * output, "x_0": output}[prediction]
    x_0 = model.denoise(x_t, t, conditions)
    assert x_0.dtype == tf.float32
    np.testing.assert_allclose(x_0, expected, rtol=1e-5, atol=1e-5)


def test_without_conditions_only_keep_is_0():
    model = make_diffusion(randomised(make_unet()), prediction="x_0")
    x_t, t, conditions = noisy()
    dropped = model.unet({"x": x_t, "t": t, "keep": np.zeros(4, "float32"), **conditions})
    np.testing.assert_array_equal(model.denoise(x_t, t), dropped)
    np.testing.assert_array_equal(model.denoise(x_t, t, {}), dropped)
    assert np.abs(model.denoise(x_t, t, conditions) - dropped).max() > 1e-3


def test_unknown_label_is_minus_1_and_differs_from_known_ones():
    model = make_diffusion(randomised(make_unet()), prediction="x_0")
    x_t, t, conditions = noisy()
    unknown, first, second = (
        np.asarray(model.denoise(x_t, t, conditions | {"label": np.full(4, label)})) for label in (-1, 0, 1)
    )
    np.testing.assert_array_equal(model.denoise(x_t, t, {"z": conditions["z"]}), unknown)
    assert np.abs(unknown - first).max() > 1e-4 and np.abs(first - second).max() > 1e-4
    assert np.all(np.isfinite(unknown))


def test_slice_index_and_time_reach_the_network():
    model = make_diffusion(randomised(make_unet(num_labels=0)), prediction="x_0")
    x_t, t, conditions = noisy()
    here, there = (model.denoise(x_t, t, {"z": np.full(4, z)}) for z in (3, 30))
    assert np.abs(here - there).max() > 1e-4
    assert np.abs(here - model.denoise(x_t, t + 0.02, {"z": np.full(4, 3)})).max() > 1e-4


@pytest.mark.parametrize("ask", ["unet", "model"])
def test_times_closer_than_bfloat16_are_told_apart_under_mixed_bfloat16(bfloat16, ask):
    """The autocast of a layer's inputs would make 0.5 and 0.5005 one time."""
    model = make_diffusion(randomised(make_unet()))
    x_t, t, conditions = noisy(2)
    x_t = np.repeat(x_t[:1], 2, axis=0)
    inputs = {
        "x": x_t,
        "t": np.array([0.5, 0.5005], "float32"),
        "keep": np.ones(2, "float32"),
        "z": np.zeros(2, "int32"),
        "label": np.zeros(2, "int32"),
    }
    output = (model.unet if ask == "unet" else model)(inputs)
    assert output.dtype == tf.float32
    assert np.abs(output[0] - output[1]).max() > 1e-3


def test_clipping_of_x_0_is_for_those_who_ask():
    x_t, t, conditions = noisy()
    unet = randomised(make_unet())
    free = np.asarray(make_diffusion(unet, prediction="eps").denoise(x_t, t, conditions))
    clipped = make_diffusion(unet, prediction="eps", clip_x_0=True).denoise(x_t, t, conditions)
    assert np.abs(free).max() > 1.5
    np.testing.assert_array_equal(clipped, np.clip(free, -1.0, 1.0))


def test_unknown_schedule_or_prediction_is_refused():
    unet = make_unet(width=4)
    with pytest.raises(ValueError, match="schedule must be one of"):
        make_diffusion(unet, schedule="quadratic")
    with pytest.raises(ValueError, match="prediction must be one of"):
        make_diffusion(unet, prediction="noise")


def test_levels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 levels do not fit .6, 6. pixels"):
        make_unet(size=6, multipliers=(1, 2, 4))


# ---- training of the second stage ------------------------------------------------------------------------------------


def test_validation_is_the_same_when_repeated():
    """Its noise and times are fixed: epochs can be compared."""
    model, data = compiled(make_diffusion(randomised(make_unet()))), dataset_of(8, 4, size=8, channels=2)
    first, second = (model.evaluate(data, return_dict=True, verbose=0) for _ in range(2))
    assert first["loss"] == second["loss"]
    model.optimizer.iterations.assign(77)
    assert model.evaluate(data, return_dict=True, verbose=0)["loss"] == first["loss"]


def test_training_draws_new_noise_at_each_step_and_times_that_cover_all_levels():
    model = make_diffusion()
    t, eps, uniform = model.draw((16, 8, 8, 2), (3, 1))
    again, other = model.draw((16, 8, 8, 2), (3, 1)), model.draw((16, 8, 8, 2), (3, 2))
    np.testing.assert_array_equal(eps, again[1])
    assert np.abs(eps - other[1]).max() > 0.1 and np.abs(t - other[0]).max() > 1e-3
    np.testing.assert_allclose(np.diff(np.sort(t)), 1 / 16, atol=1e-6)
    assert 0.0 <= np.min(t) and np.max(t) < 1.0
    assert not np.array_equal(np.sort(t), t)
    assert abs(np.mean(eps)) < 0.1 and abs(np.std(eps) - 1.0) < 0.1
    assert abs(np.corrcoef(t, uniform)[0, 1]) < 0.9


def test_loss_is_the_mean_squared_error_of_the_prediction():
    data, rng = tf.nest.map_structure(tf.constant, batch_of(4, 8, 2)), np.random.default_rng(4)
    eps, t, keep = tf.constant(rng.normal(size=(4, 8, 8, 2)), "float32"), tf.fill((4,), 0.3), tf.ones(4)
    alpha, sigma = (float(value) for value in schedules.cosine(0.3))
    x_0, unet = data["image"], randomised(make_unet())
    output = np.asarray(
        unet({"x": alpha * x_0 + sigma * eps, "t": t, "z": data["z"], "label": data["label"], "keep": keep})
    )
    for prediction, target in (("eps", eps), ("v", alpha * eps - sigma * x_0), ("x_0", x_0)):
        loss = make_diffusion(unet, prediction=prediction).loss_at(data, t, eps, keep, training=False)
        np.testing.assert_allclose(loss, np.mean((output - target) ** 2, axis=(1, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_dropped_conditions_do_not_learn(drop):
    """With drop_conditions = 1 the null token learns and the slice's embedding stays; with 0 the other way round."""
    unet = randomised(make_unet(multipliers=(1,), attention=(), num_labels=0))
    model = compiled(make_diffusion(unet, drop_conditions=drop), weight_decay=0.0)
    null, slices = unet.get_layer("z_or_null"), unet.get_layer("slice")
    before = [np.asarray(null.null), np.asarray(slices.out.kernel)]
    model.fit(dataset_of(8, 8, size=8, channels=2), verbose=0)
    moved = [np.abs(np.asarray(a) - b).max() > 0 for a, b in zip([null.null, slices.out.kernel], before, strict=True)]
    assert moved == [drop == 1.0, drop == 0.0]


@pytest.mark.slow
def test_batch_of_another_size_than_the_first_works():
    """Noise takes the tensor's own batch: the last batch of an epoch is smaller."""
    model = compiled(make_small_diffusion())
    data = dataset_of(7, 4, size=8, channels=2)
    assert np.isfinite(model.fit(data, verbose=0).history["loss"][0])


def test_diffusion_learns_one_batch():
    model = compiled(
        make_diffusion(make_unet(width=16, channels=1, multipliers=(1,), attention=())), learning_rate=5e-3
    )
    history = model.fit(dataset_of(8, 8, size=8).repeat(), steps_per_epoch=40, epochs=3, verbose=0).history
    assert history["loss"][-1] < 0.6 * history["loss"][0]


@pytest.mark.slow
def test_training_runs_under_mixed_bfloat16(bfloat16):
    for model, data in (
        (make_vqvae(), dataset_of(8, 4)),
        (make_small_diffusion(), dataset_of(8, 4, size=8, channels=2)),
    ):
        history = compiled(model).fit(data, verbose=0, validation_data=data).history
        assert all(np.all(np.isfinite(values)) for values in history.values())
        assert {w.dtype for w in model.trainable_variables} == {"float32"}


# ---- facts about people ----------------------------------------------------------------------------------------------


def test_facts_are_told_and_the_unknown_is_a_token_of_its_own(tmp_path):
    """Number and category each change the answer; NaN is neither the mean nor the first value; keep = 0 hides both."""
    model = randomised(make_diffusion(make_unet(multipliers=(1,), attention=(), covariates=(0, 3))))
    x_t, t = tf.random.stateless_normal((1, 8, 8, 2), (0, 1)), tf.constant([0.5])

    def told(*facts, known=True):
        conditions = {"z": tf.constant([3]), "label": tf.constant([1]), "covariates": tf.constant([facts], "float32")}
        if not known:
            del conditions["z"]
        return model.denoise(x_t, t, conditions).numpy()

    nan = float("nan")
    apart = [told(0, 0), told(1, 0), told(0, 1), told(nan, 0), told(0, nan)]
    for i, one in enumerate(apart):
        assert np.isfinite(one).all()
        for other in apart[:i]:
            assert np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(told(0, 0, known=False), told(1, 2, known=False))
    unknown = model.denoise(x_t, t, {"z": tf.constant([3]), "label": tf.constant([1])}).numpy()
    np.testing.assert_array_equal(unknown, told(nan, nan))
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    conditions = {"z": tf.constant([3]), "label": tf.constant([1]), "covariates": tf.constant([[0.5, 2.0]])}
    np.testing.assert_array_equal(loaded.denoise(x_t, t, conditions).numpy(), told(0.5, 2))


@pytest.mark.slow
def test_facts_are_learned():
    """Pictures as bright as a number says: after training the number brightens what is drawn, and the loss falls."""
    model = make_diffusion(
        make_unet(multipliers=(1,), attention=(), num_labels=0, covariates=(0,)), drop_conditions=0.0
    )
    model = compiled(model, learning_rate=1e-2)
    facts = np.random.default_rng(0).choice([-1.0, 1.0], 64).astype("float32")
    batch = {
        "image": np.tile(facts[:, None, None, None], (1, 8, 8, 2)),
        "z": np.zeros(64, "int32"),
        "label": np.full(64, -1, "int32"),
        "covariates": facts[:, None],
    }
    model.fit(tf.data.Dataset.from_tensors(batch).repeat(), epochs=1, steps_per_epoch=120, verbose=0)
    x_t, t = tf.random.stateless_normal((32, 8, 8, 2), (0, 1)), tf.fill((32,), 0.98)
    drawn = {
        fact: model.denoise(x_t, t, {"z": np.zeros(32, "int32"), "covariates": np.full((32, 1), fact, "float32")})
        .numpy()
        .mean()
        for fact in (-1.0, 1.0)
    }
    assert drawn[-1.0] < -0.5 and drawn[1.0] > 0.5


def test_validation_loss_comes_apart_by_quarters_of_t():
    """The quarters' losses, weighted by their shares of the examples, add up to the loss; each is that of its times."""
    model = compiled(randomised(make_diffusion(make_unet(multipliers=(1,), attention=(), num_labels=0))))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(8, 8, 8, 2)).astype("float32"),
        "z": np.zeros(8, "int32"),
        "label": -np.ones(8, "int32"),
    }
    batch = {key: tf.constant(value) for key, value in batch.items()}
    found = model.evaluate(tf.data.Dataset.from_tensors(batch), verbose=0, return_dict=True)
    t, eps, _ = model.draw((8, 8, 8, 2), (model.seed, -1))
    each = model.loss_at(batch, t, eps, tf.ones(8), training=False).numpy()
    quarter = np.floor(4 * t.numpy()).astype(int)
    assert np.bincount(quarter).tolist() == [2, 2, 2, 2]
    for i, name in enumerate(model.only_validation):
        assert found[name] == pytest.approx(each[quarter == i].mean(), rel=1e-3)
    assert found["loss"] == pytest.approx(each.mean(), rel=1e-3)


@pytest.mark.parametrize("name", ["mask", "covariates"])
def test_what_is_told_is_at_times_unknown_by_itself(name, monkeypatch):
    """With drop_conditions = 0.5 no mask comes through, as it is hidden twice as often, and half of the facts; without,
    all do."""
    told = {"mask": np.full((8, 8, 8, 4), 0.25, "float32"), "covariates": np.full((8, 50), 3.0, "float32")}
    options = {"mask": {"mask": True}, "covariates": {"covariates": (0,) * 50}}[name]
    for drop, share in ((0.5, {"mask": 0.0, "covariates": 0.5}[name]), (0.0, 1.0)):
        model = make_diffusion(make_unet(multipliers=(1,), attention=(), num_labels=0, **options), drop_conditions=drop)
        model = compiled(model)
        seen = []

        def watched(batch, *rest, seen=seen, plain=model.loss_at, **more):
            seen.append(batch)
            return plain(batch, *rest, **more)

        monkeypatch.setattr(model, "loss_at", watched)
        image = np.zeros((8, 8, 8, 2), "float32")
        model.train_step(
            {"image": tf.constant(image), "z": tf.zeros(8, "int32"), "label": -tf.ones(8, "int32"), name: told[name]}
        )
        known = np.isfinite(seen[0][name]) & (np.asarray(seen[0][name]) != 0)
        assert known.mean() == pytest.approx(share, abs=0.1)


def test_facts_are_not_rounded_by_bfloat16(bfloat16):
    model = randomised(make_diffusion(make_unet(multipliers=(1,), attention=(), covariates=(0,))))
    token = model.unet.get_layer("fact_0")
    one, other = (np.asarray(token(tf.constant([fact])), "float32") for fact in (1.0, 1.001))
    assert np.abs(one - other).max() > 0


def test_masks_are_told_and_hidden():
    """The mask changes the answer; without keep, or left out, it is as if nobody knew any tissue."""
    model = randomised(make_diffusion(make_unet(multipliers=(1,), attention=(), mask=True)))
    x_t, t, rng = tf.random.stateless_normal((1, 8, 8, 2), (0, 1)), tf.constant([0.5]), np.random.default_rng(0)
    masks = [tf.one_hot(rng.integers(0, 4, (1, 8, 8)), 4) for _ in range(2)]
    known = {"z": tf.constant([3]), "label": tf.constant([1])}
    told = [model.denoise(x_t, t, {**known, "mask": mask}).numpy() for mask in masks]
    assert np.abs(told[0] - told[1]).max() > 1e-3
    unknown = model.denoise(x_t, t, {**known, "mask": tf.zeros((1, 8, 8, 4))}).numpy()
    np.testing.assert_array_equal(model.denoise(x_t, t, known).numpy(), unknown)
    hidden = [model.denoise(x_t, t, {"mask": mask}).numpy() for mask in masks]
    np.testing.assert_array_equal(*hidden)
