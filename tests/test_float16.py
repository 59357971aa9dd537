"""float16: the policy of older GPUs; losses are scaled, and a step that overflows leaves nothing behind."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny_models import batch_of, make_adversarial_vqvae, make_cropped, make_small_diffusion, tensors

from ldm.training import callbacks, distribution, optimizers, runs


@pytest.fixture
def float16(fresh_state):
    """The mixed_float16 policy for one test."""
    keras.mixed_precision.set_dtype_policy("mixed_float16")


# ---- which policy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capabilities, policy",
    [
        ([(9, 0)], "mixed_bfloat16"),
        ([(8, 0)], "mixed_bfloat16"),
        ([(7, 5)], "mixed_float16"),
        ([(7, 0)], "mixed_float16"),
        ([(6, 1)], "float32"),
        ([(9, 0), (7, 5)], "mixed_float16"),
        ([None], "mixed_bfloat16"),
    ],
)
def test_auto_takes_what_the_oldest_gpu_has(capabilities, policy, monkeypatch):
    devices = [f"GPU:{i}" for i in range(len(capabilities))]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: devices)
    details = {d: {"compute_capability": c} if c else {} for d, c in zip(devices, capabilities, strict=True)}
    monkeypatch.setattr(tf.config.experimental, "get_device_details", details.get)
    assert distribution.set_precision("auto") == policy == keras.mixed_precision.dtype_policy().name


# ---- the optimizer ---------------------------------------------------------------------------------------------------


def stepped(overflows, replicas=1, scaled=True):
    """Steps on one weight, of which those of `overflows` have an infinite gradient on one replica only.

    Returns:
        (optimizer, weight) after 6 steps.
    """
    keras.mixed_precision.set_dtype_policy("mixed_float16" if scaled else "float32")
    strategy = distribution.make_strategy(replicas)
    with strategy.scope():
        weight = keras.Variable(np.float32([1.0, 2.0]), name="w")
        optimizer = callbacks.make_optimizer(0.05, 40, averaged=True)
        optimizer.build([weight])

    @tf.function
    def step(i, bad):
        def of_replica():
            me = tf.distribute.get_replica_context().replica_id_in_sync_group
            planted = tf.where(bad & (me == replicas - 1), np.inf, 0.0)
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.sin(weight.value * i)) + planted * tf.reduce_sum(weight.value)
                part = distribution.replica_loss(loss, optimizer)
            distribution.apply_gradients(optimizer, [tape.gradient(part, weight.value)], [weight], clip_norm=0.5)

        strategy.run(of_replica)

    number = 0
    for i in range(6):
        step(tf.constant(float(number + 1)), tf.constant(i in overflows))
        number += i not in overflows
    return optimizer, weight


def test_scaled_steps_are_the_steps_in_float32():
    scaled, weight = stepped(())
    plain, expected = stepped((), scaled=False)
    np.testing.assert_allclose(weight, expected, rtol=1e-6)
    np.testing.assert_allclose(scaled.variables[2], plain.variables[2], rtol=1e-6)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_step_that_overflows_is_as_if_it_had_not_been(replicas):
    """The first and a later one; on two replicas only one of them overflows."""
    optimizer, weight = stepped((0, 3), replicas)
    counts = [np.asarray(v) for v in (optimizer.iterations, optimizer.skipped, optimizer.loss_scale)]
    assert counts == [4, 2, optimizers.FIRST_SCALE / 4]
    keras.mixed_precision.set_dtype_policy("float32")
    plain, expected = reference(4)
    np.testing.assert_allclose(weight, expected, rtol=1e-6)
    average = dict((v.name, v) for v in optimizer.variables)
    for variable in plain.variables:
        if variable.name in average:
            np.testing.assert_allclose(average[variable.name], variable, rtol=1e-5, atol=1e-7, err_msg=variable.name)
    for variable in (weight, *optimizer.variables):
        copies = getattr(variable.value, "values", [variable.value])
        for copy in copies:
            np.testing.assert_array_equal(copies[0], copy)


def reference(steps):
    """So many steps in float32, none of them skipped."""
    weight = keras.Variable(np.float32([1.0, 2.0]), name="w")
    optimizer = callbacks.make_optimizer(0.05, 40, averaged=True)
    optimizer.build([weight])
    for i in range(steps):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.sin(weight.value * (i + 1.0)))
        distribution.apply_gradients(optimizer, [tape.gradient(loss, weight.value)], [weight], clip_norm=0.5)
    return optimizer, weight


def test_the_scale_grows_after_calm_steps_up_to_its_end(float16, monkeypatch):
    monkeypatch.setattr(optimizers, "CALM", 3)
    weight = keras.Variable(np.float32([1.0]), name="w")
    optimizer = optimizers.FusedAdamW(0.0)
    optimizer.build([weight])
    scales = []
    for _ in range(7):
        distribution.apply_gradients(optimizer, [tf.constant([1.0])], [weight])
        scales.append(float(optimizer.loss_scale) / optimizers.FIRST_SCALE)
    assert scales == [1, 1, 2, 2, 2, 4, 4]
    optimizer.loss_scale.assign(optimizers.MOST_SCALE)
    for _ in range(3):
        distribution.apply_gradients(optimizer, [tf.constant([1.0])], [weight])
    assert float(optimizer.loss_scale) == optimizers.MOST_SCALE


def test_what_is_too_small_for_float16_comes_through(float16):
    """A gradient of 1e-8 is 0 in float16; scaled it is not."""
    weight = keras.Variable(np.float32([1.0]), name="w")
    optimizer = optimizers.FusedAdamW(0.1)
    optimizer.build([weight])
    with tf.GradientTape() as tape:
        loss = tf.cast(tf.cast(weight.value, "float16") * tf.constant(1.0, "float16"), "float32") * 1e-8
        part = distribution.replica_loss(loss, optimizer)
    norm = distribution.apply_gradients(optimizer, [tape.gradient(part, weight.value)], [weight])
    np.testing.assert_allclose(norm, 1e-8, rtol=1e-2)
    assert 0 < float(optimizer._momentums[0][0]) < 2e-9  # (1 - beta_1) 1e-8


# ---- models ----------------------------------------------------------------------------------------------------------


def compiled(model):
    more = {}
    if hasattr(model, "discriminator"):
        more["discriminator_optimizer"] = callbacks.make_optimizer(2e-3, 40)
    model.compile(callbacks.make_optimizer(2e-3, 40, averaged=True), jit_compile=False, **more)
    return model


CASES = {
    "VQ-VAE": (make_cropped, {}),
    "diffusion": (make_small_diffusion, {"size": 8, "channels": 2}),
    "GAN with a code bank": (make_adversarial_vqvae, {}),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if "GAN" in case else []) for case in CASES]
)
def test_an_overflow_leaves_weights_codebook_counts_and_metrics_alone(case, float16):
    make, options = CASES[case]
    model, good = compiled(make()), tensors(batch_of(4, **options))
    if hasattr(model, "discriminator"):
        model.active = True
    step = tf.function(model.train_step)
    scaled = [model.optimizer, getattr(model, "discriminator_optimizer", model.optimizer)]

    def skipped():
        return [float(optimizer.skipped) for optimizer in scaled]

    for _ in range(8):  # until the scale is one that this batch bears
        before = skipped()
        logs = step(good)
        if skipped() == before:
            break
    assert all(np.isfinite(value) for value in logs.values()), logs
    own = {id(v) for optimizer in scaled for v in (optimizer.loss_scale, optimizer.calm, optimizer.skipped)}
    everything = [*model.variables, *(v for metric in model.metrics for v in metric.variables)]
    everything += [v for optimizer in scaled for v in optimizer.variables if id(v) not in own]
    before, counts = [np.array(variable) for variable in everything], skipped()
    after_good = {name: float(value) for name, value in logs.items()}
    logs = step({**good, "image": good["image"] * np.float32(1e30)})
    assert {name: float(value) for name, value in logs.items()} == after_good
    for variable, old in zip(everything, before, strict=True):
        np.testing.assert_array_equal(variable, old, err_msg=variable.path)
    assert skipped() == [count + 1.0 for count in counts]
    logs = step(good)
    assert all(np.isfinite(value) for value in logs.values())
    assert any(np.any(np.array(v) != old) for v, old in zip(everything, before, strict=True))


def test_a_training_that_only_overflows_is_ended(float16):
    model = compiled(make_small_diffusion())
    bad = tensors(batch_of(4, size=8, channels=2))
    bad["image"] *= np.float32(np.inf)
    model.optimizer.loss_scale.assign(1.0)
    assert np.isnan(model.train_step(bad)["gradient_norm"])


def test_skipped_steps_count_when_a_run_goes_on(float16, tmp_path):
    model = compiled(make_small_diffusion())
    model.optimizer.iterations.assign(7)
    model.optimizer.skipped.assign(3.0)
    model.save_weights(tmp_path / "diffusion.last.weights.h5")
    again = compiled(make_small_diffusion())
    assert runs.resume(again, tmp_path, "diffusion", 5) == 2
    assert float(again.optimizer.skipped) == 3.0


@pytest.mark.parametrize("before, after", [("mixed_float16", "float32"), ("float32", "mixed_float16")])
def test_a_run_goes_on_in_another_precision_from_where_it_was(before, after, fresh_state, tmp_path):
    """The scale of float16 comes last in a checkpoint, and is there or not; step, moments and averages count."""

    def model_of(policy):
        keras.mixed_precision.set_dtype_policy(policy)
        model = make_small_diffusion()
        model.compile(callbacks.make_optimizer(0.01, 40, averaged=True), jit_compile=False)
        model.optimizer.build(model.trainable_variables)
        return model

    model, random = model_of(before), np.random.default_rng(0)
    for variable in model.optimizer.variables[1:]:
        variable.assign(random.uniform(0.1, 1.0, variable.shape))
    model.optimizer.iterations.assign(10)
    model.save_weights(tmp_path / "diffusion.last.weights.h5")
    again = model_of(after)
    assert runs.resume(again, tmp_path, "diffusion", 5) == 2
    variables = again.optimizer.variables
    assert len({id(variable) for variable in variables}) == len(variables)
    slots = [variable for variable in variables if len(variable.shape)]  # moments and averages
    assert len(slots) == 3 * len(model.trainable_variables)
    for new, old in zip(slots, [v for v in model.optimizer.variables if len(v.shape)], strict=True):
        np.testing.assert_array_equal(new, old, err_msg=old.path)
