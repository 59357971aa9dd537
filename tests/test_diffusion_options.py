"""DiffusionModel's options: zero terminal SNR, min-SNR-gamma, losses; that every combination trains and loads."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import modules
from ldm.diffusion import samplers, schedules
from ldm.training import distribution, runs
from ldm.training.optimizers import FusedAdamW

SHAPE = (4, 4, 2)
OPTIONS = {"zero_snr": (False, True), "min_snr_gamma": (None, 5.0), "loss": ("mse", "l1", "huber")}
COMBINATIONS = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]


def allowed(prediction, schedule, zero_snr):
    return prediction != "eps" or not (zero_snr or schedule == "flow")


PAIRS = [p for p in itertools.product(schedules.PREDICTIONS, schedules.SCHEDULES) if allowed(*p, zero_snr=False)]
# Quick are: each prediction with a schedule that ends in noise alone and with one that does not; v with every schedule;
# and the flow with its own.
QUICK = {pair for pair in PAIRS if pair[0] in ("v", pair[1]) or pair[1] in ("cosine", "scaled_linear")}
PAIRS = [pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in PAIRS]


def make(unet=None, **options):
    """The smallest network, with random weights: the last layer of a fresh one says 0."""
    unet = unet or modules.UNet(4, 2, width=4, multipliers=(1,), blocks=1, attention=(), head_size=4)
    rng = np.random.default_rng(0)
    unet.set_weights([0.3 * rng.normal(size=w.shape) + (w.ndim == 1) for w in unet.get_weights()])
    return modules.DiffusionModel(unet, **options)


@pytest.fixture(scope="module")
def unet():
    return make().unet


def make_linear():
    """A network that calls in a moment: one matrix, with the inputs of a `UNet`."""
    inputs = {name: keras.Input((), name=name) for name in ("t", "z", "label", "keep")}
    inputs["x"] = keras.Input(SHAPE, name="x")
    return keras.Model(inputs, keras.layers.Dense(SHAPE[-1])(inputs["x"]))


def batch_of(count=4, seed=1):
    rng = np.random.default_rng(seed)
    return {
        "image": tf.constant(rng.normal(size=(count, *SHAPE)), "float32"),
        "z": tf.range(count),
        "label": tf.fill((count,), -1),
        "case": tf.range(count),
    }


def output_of(model, x, t, batch):
    conditions = {"z": batch["z"], "label": batch["label"], "keep": tf.ones(len(t))}
    return np.asarray(model.unet({"x": tf.constant(x, "float32"), "t": t, **conditions}), "float64")


def moment(model, count=4):
    """x_0, noise, the times of both ends and between, and alpha and sigma there."""
    batch, t = batch_of(count), tf.linspace(0.0, 1.0, count)
    eps = np.random.default_rng(2).normal(size=(count, *SHAPE))
    alpha, sigma = (np.asarray(value, "float64") for value in model.coefficients(t))
    return batch, t, eps, alpha, sigma


# ---- what is computed ------------------------------------------------------------------------------------------------


def test_zero_snr_is_seen_by_everybody_who_asks_for_the_schedule(unet):
    for name in schedules.SCHEDULES:
        model = make(unet, schedule=name, prediction="v", zero_snr=True)
        alpha, sigma = model.schedule(1.0)
        assert float(alpha) == 0.0 and float(sigma) == 1.0
    assert make(unet, schedule="linear").schedule is schedules.linear


def test_eps_is_refused_where_nothing_of_the_picture_is_left(unet):
    for options in ({"schedule": "cosine", "zero_snr": True}, {"schedule": "flow"}):
        with pytest.raises(ValueError, match="zero terminal SNR needs the prediction v, eps_v, x_0, flow or edm"):
            make(unet, prediction="eps", **options)
    make(unet, prediction="eps", schedule="cosine")


@pytest.mark.parametrize("options", [{"loss": "l2"}, {"min_snr_gamma": 0.0}, {"min_snr_gamma": -5.0}])
def test_unknown_options_are_refused(unet, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        make(unet, **options)


@pytest.mark.parametrize(("prediction", "schedule"), PAIRS)
def test_denoise_finds_x_0_if_the_network_says_its_target(unet, prediction, schedule):
    """The other way round: the x_0 of `denoise` and x_t make an eps, and from both follows what the network said."""
    model = make(unet, prediction=prediction, schedule=schedule, zero_snr=prediction != "eps")
    batch, t, eps, alpha, sigma = moment(model)
    t, alpha, sigma = t[1:], alpha[1:], sigma[1:]  # at t = 0 x_t alone is x_0
    x_t = alpha * batch["image"][1:] + sigma * eps[1:]
    batch = {name: value[1:] for name, value in batch.items()}
    x_0 = np.asarray(model.denoise(tf.constant(x_t, "float32"), t, {"z": batch["z"]}), "float64")
    c_in = 1.0 / np.sqrt(sigma**2 + 0.25 * alpha**2) if prediction == "edm" else 1.0
    said = output_of(model, c_in * x_t, t, batch)
    target = schedules.to_target(prediction, x_0, schedules.to_eps(x_0, x_t, alpha, sigma), alpha, sigma)
    np.testing.assert_allclose(target, said, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("loss", OPTIONS["loss"])
@pytest.mark.parametrize("prediction", ["v", "edm"])
def test_loss_is_the_mean_of_its_formula(unet, prediction, loss):
    model = make(unet, prediction=prediction, loss=loss, schedule="linear")
    batch, t, eps, alpha, sigma = moment(model)
    _, _, c_in = schedules.preconditioning(prediction, alpha, sigma)
    x_0 = np.asarray(batch["image"], "float64")
    error = output_of(model, c_in * (alpha * x_0 + sigma * eps), t, batch)
    error = np.abs(error - schedules.to_target(prediction, x_0, eps, alpha, sigma))
    expected = {"mse": error**2, "l1": error, "huber": np.where(error < 1.0, 0.5 * error**2, error - 0.5)}[loss]
    assert (error < 1.0).any() and (error > 1.0).any()
    found = model.loss_at(batch, t, tf.constant(eps, "float32"), tf.ones(4), training=False)
    np.testing.assert_allclose(found, expected.mean(axis=(1, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(("prediction", "schedule"), [pair for pair in PAIRS if pair.values[1] in ("cosine", "flow")])
def test_min_snr_gamma_weighs_the_squared_error_of_x_0(unet, prediction, schedule, zero_snr):
    """Whatever the network predicts: min(SNR, gamma) |x_0 - denoise(x_t)|^2, which no formula of the model says."""
    zero_snr = zero_snr and prediction != "eps"
    model = make(unet, prediction=prediction, schedule=schedule, zero_snr=zero_snr, min_snr_gamma=5.0)
    batch, t, eps, alpha, sigma = moment(model)
    t, alpha, sigma, eps = t[1:], alpha[1:], sigma[1:], eps[1:]  # at t = 0 the SNR is infinite
    batch = {name: value[1:] for name, value in batch.items()}
    x_t = alpha * batch["image"] + sigma * eps
    x_0 = model.denoise(tf.constant(x_t, "float32"), t, {"z": batch["z"], "label": batch["label"]})
    expected = np.minimum((alpha / sigma) ** 2, 5.0) * np.square(x_0 - batch["image"])
    found = model.loss_at(batch, t, tf.constant(eps, "float32"), tf.ones(3), training=False)
    np.testing.assert_allclose(found, expected.mean(axis=(1, 2, 3)), rtol=1e-3)


# ---- training and files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prediction", "schedule"), PAIRS)
def test_every_combination_has_finite_losses_and_gradients_from_end_to_end(prediction, schedule):
    """One batch at t = 0, between and at t = 1, where SNR is infinite and may be 0."""
    unet = make_linear()
    for options in COMBINATIONS:
        if not allowed(prediction, schedule, options["zero_snr"]):
            continue
        model = make(unet, prediction=prediction, schedule=schedule, **options)
        batch, t, eps, *_ = moment(model)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model.loss_at(batch, t, tf.constant(eps, "float32"), tf.ones(4), training=True))
        gradient = tape.gradient(loss, unet.trainable_variables[0])
        assert np.isfinite(loss) and loss > 0.0, options
        assert np.all(np.isfinite(gradient)) and np.abs(gradient).max() > 0.0, options


@pytest.mark.parametrize(
    "prediction",
    [pytest.param(p, marks=[] if p in ("eps", "v", "edm") else pytest.mark.slow) for p in schedules.PREDICTIONS],
)
def test_a_step_of_training_a_file_and_a_sample(prediction, tmp_path):
    """Each prediction with another mixture of the other options; what loads says what was saved."""
    number = schedules.PREDICTIONS.index(prediction)
    schedule = ("linear", "cosine", "sigmoid", "flow", "cosine", "scaled_linear")[number]
    options = {"zero_snr": prediction != "eps", "min_snr_gamma": (None, 5.0)[number % 2]}
    options["loss"] = OPTIONS["loss"][number % 3]
    model = make(prediction=prediction, schedule=schedule, **options)
    model.compile(keras.optimizers.AdamW(1e-3), run_eagerly=True)
    before = [np.asarray(weight) for weight in model.trainable_variables]
    history = model.fit(tf.data.Dataset.from_tensors(batch_of()), verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert any(np.abs(a - b).max() > 0 for a, b in zip(before, model.trainable_variables, strict=True))

    model.save(tmp_path / "diffusion.keras")
    loaded = runs.load_model(tmp_path / "diffusion.keras")
    config = loaded.get_config()
    assert {name: config[name] for name in options} == options
    assert (config["prediction"], config["schedule"]) == (prediction, schedule)
    x_T, t = tf.random.stateless_normal((2, *SHAPE), (1, 2)), tf.constant([0.5, 1.0])
    np.testing.assert_allclose(loaded.denoise(x_T, t), model.denoise(x_T, t), atol=1e-5)
    draw = list(samplers.SAMPLERS.values())[number % len(samplers.SAMPLERS)]
    assert np.all(np.isfinite([x_t for x_t, _ in draw(loaded.denoise, x_T, loaded.schedule, 3)]))


def test_a_batch_in_parts_makes_the_step_of_the_whole_batch():
    def trained(replicas, parts):
        keras.utils.set_random_seed(1)
        with distribution.make_strategy(replicas).scope():
            model = make(make_linear(), accumulate=parts)
            model.compile(FusedAdamW(5e-3, use_ema=True, ema_momentum=0.7), jit_compile=False)
        reports = model.fit(tf.data.Dataset.from_tensors(batch_of(8)).repeat(3), shuffle=False, verbose=0).history
        assert keras.ops.convert_to_numpy(model.optimizer.iterations) == 3
        return [np.asarray(value) for value in (*model.weights, *model.optimizer.variables)], reports

    whole, reports = trained(1, 1)
    for others, history in (trained(1, 4), trained(2, 2)):
        for ours, theirs in zip(whole, others, strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-6)
        for name, values in reports.items():
            np.testing.assert_allclose(history[name], values, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_tenth_sees_no_condition_and_another_tenth_no_label(monkeypatch):
    model, seen = make(make_linear()), []
    loss_at = model.loss_at

    def watched(batch, t, eps, keep, training):
        seen.append((batch["label"].numpy(), keep.numpy()))
        return loss_at(batch, t, eps, keep, training)

    monkeypatch.setattr(model, "loss_at", watched)
    model.compile(keras.optimizers.AdamW(1e-3), run_eagerly=True)
    model.fit(tf.data.Dataset.from_tensors(batch_of(4000) | {"label": tf.ones(4000, tf.int32)}), verbose=0)
    label, keep = seen[0]
    assert set(label) == {-1, 1}
    assert np.mean(keep == 0) == pytest.approx(0.1, abs=0.02) == np.mean(label == -1)
    assert not np.any((keep == 0) & (label == -1))


def test_validation_judges_a_row_at_other_times_in_every_batch_and_at_the_same_in_every_epoch(monkeypatch):
    model, seen = make(make_linear()), []
    loss_at = model.loss_at

    def watched(batch, t, eps, *rest, **more):
        seen.append((t.numpy(), eps.numpy()))
        return loss_at(batch, t, eps, *rest, **more)

    monkeypatch.setattr(model, "loss_at", watched)
    model.compile(keras.optimizers.AdamW(1e-3), run_eagerly=True)
    batches = tf.data.Dataset.from_tensors(batch_of()).repeat(3)
    batches = batches.enumerate().map(lambda i, batch: {**batch, "number": tf.fill((4,), tf.cast(i, tf.int32))})
    first, second = (model.evaluate(batches, verbose=0, return_dict=True) for _ in range(2))
    assert first == second
    for (t, eps), (t_again, eps_again) in zip(seen[:3], seen[3:], strict=True):
        np.testing.assert_array_equal(t, t_again)
        np.testing.assert_array_equal(eps, eps_again)
    times = np.stack([t for t, _ in seen[:3]])
    assert (np.ptp(times, axis=0) > 0.01).all() and len(np.unique(times)) == 12
    assert not np.array_equal(seen[0][1], seen[1][1])


def test_a_file_from_before_these_options_has_their_defaults(unet):
    config = make(unet).get_config()
    for name in OPTIONS:
        del config[name]
    loaded = modules.DiffusionModel.from_config(config)
    assert {name: loaded.get_config()[name] for name in OPTIONS} == {
        "zero_snr": False,
        "min_snr_gamma": None,
        "loss": "mse",
    }
