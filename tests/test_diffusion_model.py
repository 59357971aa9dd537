"""modules.DiffusionModel: denoise, the loss, what is hidden in training, and that training learns."""

import numpy as np
import pytest
import tensorflow as tf
from tiny_models import (
    batch_of,
    compiled,
    dataset_of,
    make_diffusion,
    make_small_diffusion,
    make_unet,
    make_vqvae,
    randomised,
    tensors,
)

from ldm.diffusion import samplers, schedules
from ldm.training import corruption

# ---- denoise ---------------------------------------------------------------------------------------------------------


def noisy(count=4, size=8, channels=2):
    rng = np.random.default_rng(2)
    x_t = rng.normal(size=(count, size, size, channels)).astype("float32")
    t = np.linspace(0.05, 0.95, count).astype("float32")
    return x_t, t, {"z": np.arange(count, dtype="int32"), "label": np.zeros(count, "int32")}


@pytest.mark.parametrize("schedule", ["linear", "cosine", pytest.param("sigmoid", marks=pytest.mark.slow)])
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


def test_clipping_of_x_0_is_for_those_who_ask():
    x_t, t, conditions = noisy()
    unet = randomised(make_unet())
    free = np.asarray(make_diffusion(unet, prediction="eps").denoise(x_t, t, conditions))
    clipped = make_diffusion(unet, prediction="eps", clip_x_0=True).denoise(x_t, t, conditions)
    alpha, sigma = (np.asarray(v)[:, None, None, None] for v in schedules.cosine(t))
    edge = 1.0 + np.minimum(sigma / alpha, 1.0)  # half the width of [-1, 1] is 1
    assert np.abs(free).max() > 2.5
    np.testing.assert_allclose(clipped, np.clip(free, -edge, edge), rtol=1e-6)


def test_latents_are_clipped_to_the_range_of_each_channel():
    """By nothing more than that at t = 0, and by half its width more on both sides from sigma = alpha on."""
    lows, highs = np.float32([-2.0, 0.0]), np.float32([1.0, 4.0])
    model = make_diffusion(randomised(make_unet()), schedule="flow", clip_x_0=(lows.tolist(), highs.tolist()))
    far = np.float32([-99.0, 99.0]).reshape(2, 1, 1, 1) * np.ones((2, 1, 1, 2), "float32")
    for t, share in ((0.0, 0.0), (0.25, 1 / 3), (0.5, 1.0), (0.9, 1.0), (1.0, 1.0)):
        below, above = np.asarray(model.threshold(far, np.full(2, t, "float32")))[:, 0, 0]
        margin = share * (highs - lows) / 2
        np.testing.assert_allclose([below, above], [lows - margin, highs + margin], rtol=1e-6)


@pytest.mark.parametrize("way", ["as it is", "within the range", "through v"])
def test_an_eps_that_errs_explodes_unless_it_is_thresholded_or_said_through_v(way):
    """20 calls of DDIM from the end of the cosine schedule, where x_0 = (x_t - sigma eps) / alpha divides by 5e-5."""
    model = make_diffusion(make_unet(), clip_x_0=([-3.0] * 2, [3.0] * 2))
    random, x_T = np.random.default_rng(0), np.random.default_rng(1).standard_normal((400, 2, 2, 2)).astype("float32")

    def denoise(x_t, t):
        alpha, sigma = (np.asarray(v)[:, None, None, None] for v in schedules.cosine(t))
        miss = 0.12 * random.standard_normal(x_t.shape).astype("float32")
        x_0 = alpha * x_t - sigma * miss / (1.0 if way == "through v" else alpha)  # exact for N(0, 1), but for the miss
        return np.asarray(model.threshold(x_0, t)) if way == "within the range" else x_0

    *_, (samples, _) = samplers.ddim(denoise, x_T, schedules.cosine, 20)
    assert np.std(samples) > 50 if way == "as it is" else abs(np.std(samples) - 1.0) < 0.1


def test_unknown_schedule_or_prediction_is_refused():
    unet = make_unet(width=4)
    with pytest.raises(ValueError, match="schedule must be one of"):
        make_diffusion(unet, schedule="quadratic")
    with pytest.raises(ValueError, match="prediction must be one of"):
        make_diffusion(unet, prediction="noise")


# ---- training of the second stage ------------------------------------------------------------------------------------


def test_validation_is_the_same_when_repeated():
    """Its noise and times are fixed: epochs can be compared."""
    model, data = compiled(make_diffusion(randomised(make_unet()))), dataset_of(8, 4, size=8, channels=2)
    first, second = (model.evaluate(data, return_dict=True, verbose=0) for _ in range(2))
    assert first["loss"] == second["loss"]
    model.optimizer.iterations.assign(77)
    assert model.evaluate(data, return_dict=True, verbose=0)["loss"] == first["loss"]


def test_training_draws_new_noise_at_each_step_and_times_that_cover_all_levels():
    t, eps, uniform = corruption.randomness((16, 8, 8, 2), (3, 1))
    again, other = corruption.randomness((16, 8, 8, 2), (3, 1)), corruption.randomness((16, 8, 8, 2), (3, 2))
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


def test_what_is_augmented_is_told_in_training_and_never_hidden():
    """Its token learns from those that are, in parts of a batch too, and validation takes the same key."""
    unet = make_unet(multipliers=(1,), attention=(), num_labels=0, tell_augmented=True)
    token = unet.get_layer("augmented_token")
    for augmented, learns in ((0.0, False), (1.0, True)):
        model = compiled(make_diffusion(randomised(unet), drop_conditions=1.0, accumulate=2), weight_decay=0.0)
        before = np.array(token.kernel)
        batch = tensors(batch_of(4, size=8, channels=2)) | {"augmented": tf.fill((4,), augmented)}
        model.fit(tf.data.Dataset.from_tensors(batch), verbose=0)
        assert (np.abs(token.kernel - before).max() > 0) == learns
        assert np.isfinite(model.evaluate(tf.data.Dataset.from_tensors(batch), verbose=0)).all()


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


@pytest.mark.slow
def test_covariates_are_learned():
    """Pictures as bright as a number says: after training the number brightens what is drawn, and the loss falls."""
    model = make_diffusion(
        make_unet(multipliers=(1,), attention=(), num_labels=0, covariates=(0,)), drop_conditions=0.0
    )
    model = compiled(model, learning_rate=1e-2)
    values = np.random.default_rng(0).choice([-1.0, 1.0], 64).astype("float32")
    batch = {
        "image": np.tile(values[:, None, None, None], (1, 8, 8, 2)),
        "z": np.zeros(64, "int32"),
        "label": np.full(64, -1, "int32"),
        "covariates": values[:, None],
    }
    model.fit(tf.data.Dataset.from_tensors(batch).repeat(), epochs=1, steps_per_epoch=120, verbose=0)
    x_t, t = tf.random.stateless_normal((32, 8, 8, 2), (0, 1)), tf.fill((32,), 0.98)
    drawn = {
        value: model.denoise(x_t, t, {"z": np.zeros(32, "int32"), "covariates": np.full((32, 1), value, "float32")})
        .numpy()
        .mean()
        for value in (-1.0, 1.0)
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
    t, eps, _ = corruption.randomness((8, 8, 8, 2), (model.seed, -1))
    each = model.loss_at(batch, t, eps, tf.ones(8), training=False).numpy()
    quarter = np.floor(4 * t.numpy()).astype(int)
    assert np.bincount(quarter).tolist() == [2, 2, 2, 2]
    for i, name in enumerate(model.only_validation):
        assert found[name] == pytest.approx(each[quarter == i].mean(), rel=1e-3)
    assert found["loss"] == pytest.approx(each.mean(), rel=1e-3)


@pytest.mark.parametrize("name", ["mask", "covariates"])
def test_a_condition_is_at_times_unknown_by_itself(name, monkeypatch):
    """With drop_conditions = 0.5 no mask comes through, as it is hidden twice as often, and half of the covariates."""
    given = {"mask": np.full((8, 8, 8, 4), 0.25, "float32"), "covariates": np.full((8, 50), 3.0, "float32")}
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
            {"image": tf.constant(image), "z": tf.zeros(8, "int32"), "label": -tf.ones(8, "int32"), name: given[name]}
        )
        known = np.isfinite(seen[0][name]) & (np.asarray(seen[0][name]) != 0)
        assert known.mean() == pytest.approx(share, abs=0.1)
