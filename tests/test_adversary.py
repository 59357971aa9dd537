"""ldm/training/adversary.py: when adversarial training starts, what turns it down, and what the bank of codes draws."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny_models import (
    SIZE,
    batch_of,
    compiled,
    dataset_of,
    make_adversarial_vae,
    make_adversarial_vqvae,
    make_cropped,
    randomised,
    tensors,
)

import modules
from ldm.training import adversary, runs
from ldm.training.adversary import AdversaryWatch, CodeBank


def test_reconstruction_has_settled_once_two_epochs_gain_less_than_a_tenth_of_the_first():
    assert not adversary.settled([]) and not adversary.settled([0.5, 0.5])
    assert not adversary.settled([2.0, 0.8, 0.55, 0.6])  # 0.25 better than the best before, an eighth of 2.0
    assert not adversary.settled([2.0, 0.8, 0.9, 0.55])  # one unlucky epoch
    assert adversary.settled([2.0, 0.8, 0.65, 0.9])  # 0.15
    assert adversary.settled([2.0, 0.8, 0.9, 0.85])  # worse


class Model:
    """What `AdversaryWatch` needs of `AdversarialTraining`."""

    def __init__(self):
        self.active, self.strength = False, keras.Variable(1.0)

    def begin(self):
        self.active = True


def watched(epochs, history=(), capsys=None, **options):
    """A watch that has seen these epochs: (reconstruction, foreground SSIM, ramp, D(real), D(fake))."""
    watch, model = AdversaryWatch(lambda: list(history), **options), Model()
    watch.set_model(model)
    watch.on_train_begin()
    names = ("val_reconstruction", "val_foreground_ssim", "adversarial", "d_real", "d_fake")
    for number, values in enumerate(epochs):
        watch.on_epoch_end(number, dict(zip(names, values, strict=True)))
    watch.on_train_end()
    return model, capsys.readouterr().out.splitlines()


BEFORE = [(0.5, 0.5, 0.0, 0.0, 0.0), (0.5, 0.7, 0.0, 0.0, 0.0), (0.49, 0.8, 0.0, 0.0, 0.0)]  # settles in the third
RAMP = (0.49, 0.79, 0.5, 0.5, -0.5)


def test_it_begins_when_the_reconstruction_has_settled_and_not_before(capsys):
    model, said = watched(BEFORE[:2], capsys=capsys)
    assert not model.active and "never came to its full weight" in said[0] and len(said) == 1
    model, said = watched([*BEFORE, RAMP, (0.48, 0.79, 1.0, 0.5, -0.5)], capsys=capsys)
    assert model.active and float(model.strength) == 1.0
    assert len(said) == 1 and "begins: epochs 2 and 3" in said[0]


def test_after_a_trained_first_stage_it_begins_with_the_second_epoch(capsys):
    """The first is what foreground SSIM is compared with."""
    model, said = watched(BEFORE[:1], capsys=capsys, trained=True)
    assert model.active and "a trained one" in said[0]
    model, said = watched([BEFORE[0], RAMP, (0.48, 0.47, 1.0, 0.5, -0.5)], capsys=capsys, trained=True)
    assert float(model.strength) == 0.5 and "below the 0.500 before" in said[1]


def test_a_constant_discriminator_is_said_and_turned_down(capsys):
    constant = (0.48, 0.8, 1.0, 0.31, 0.30)
    model, said = watched([*BEFORE, RAMP, constant, constant], capsys=capsys)
    assert float(model.strength) == 0.25
    assert len(said) == 3 and "has become constant" in said[1] and "turned down to 0.5 " in said[1]


def test_a_constant_discriminator_is_left_alone_while_the_weight_still_rises(capsys):
    model, said = watched([*BEFORE, (0.48, 0.8, 0.5, 0.01, 0.0), (0.48, 0.8, 1.0, 0.5, -0.5)], capsys=capsys)
    assert float(model.strength) == 1.0 and len(said) == 1


@pytest.mark.parametrize(("ssim", "strength"), [(0.785, 1.0), (0.775, 0.5)])
def test_foreground_ssim_may_fall_by_so_much_below_the_best_before_and_no_more(ssim, strength, capsys):
    model, said = watched([*BEFORE, RAMP, (0.6, ssim, 1.0, 0.5, -0.5)], capsys=capsys)
    assert float(model.strength) == strength
    assert len(said) == (1 if strength == 1 else 2)
    if strength < 1:
        assert "0.775" in said[1] and "0.800" in said[1]


def test_an_interrupted_run_remembers_what_was_before(capsys):
    names = ("val_reconstruction", "val_foreground_ssim", "adversarial", "d_real", "d_fake")
    history = [dict(zip(names, values, strict=True)) for values in BEFORE[:2]]
    model, said = watched([BEFORE[2]], history, capsys)
    assert model.active and "begins" in said[0]


def test_bank_draws_each_place_from_the_maps_of_the_same_slice_index():
    """The histogram per place and slice index is exact: only codes seen there, each as often as it was seen."""
    bank = CodeBank(8, (2, 3))
    maps = np.arange(24, dtype="int32").reshape(4, 2, 3)
    z = np.array([5, 5, 5, 9], "int32")
    bank.remember(maps, z)
    drawn = np.asarray(bank.mix(np.repeat(np.array([5, 9], "int32"), 3000), (1, 2)))
    np.testing.assert_array_equal(drawn[3000:], np.broadcast_to(maps[3], (3000, 2, 3)))
    for place in np.ndindex(2, 3):
        codes, counts = np.unique(drawn[:3000][(slice(None), *place)], return_counts=True)
        assert codes.tolist() == maps[(slice(0, 3), *place)].tolist()
        np.testing.assert_allclose(counts / 3000, 1 / 3, atol=0.04)
    assert len(np.unique(drawn[:3000].reshape(3000, 6), axis=0)) > 3**6 / 2  # each place by itself


def test_bank_keeps_the_last_maps_and_equal_seeds_draw_equally():
    bank = CodeBank(3, (1, 1))
    for code in range(5):
        bank.remember(np.full((1, 1, 1), code, "int32"), np.zeros(1, "int32"))
    z = np.zeros(500, "int32")
    assert set(np.unique(bank.mix(z, (0, 0)))) == {2, 3, 4}
    np.testing.assert_array_equal(bank.mix(z, (0, 1)), bank.mix(z, (0, 1)))
    assert np.any(np.asarray(bank.mix(z, (0, 1))) != np.asarray(bank.mix(z, (0, 2))))


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

    alone = weights(lambda: make_cropped(num_labels=2, tissues=4, patch=4), lambda model: model)
    together = weights(make_adversarial_vqvae, lambda model: model.autoencoder)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-6)


def test_adaptive_weight_makes_the_gradients_of_the_last_layer_comparable():
    """arXiv 2012.09841, eq. 7, on two losses that are linear in the picture, so that the ratio is known."""
    model = compiled(make_adversarial_vae(weight=0.3, cap=10.0))
    data, autoencoder = tensors(batch_of(4)), model.autoencoder
    with tf.GradientTape(persistent=True) as tape:
        _, fake, _ = autoencoder.forward(data, 0, training=True)
        one, four = tf.reduce_mean(fake), 4.0 * tf.reduce_mean(fake)
    np.testing.assert_allclose(model.adaptive_weight(tape, one, four), 0.3 / 4, rtol=1e-4)
    np.testing.assert_allclose(model.adaptive_weight(tape, four, one), 0.3 * 4, rtol=1e-4)
    model.cap = 0.1
    np.testing.assert_allclose(model.adaptive_weight(tape, four, one), 0.1, rtol=1e-6)


def test_a_step_of_the_autoencoder_raises_what_the_discriminator_says_of_its_pictures():
    """With an adversarial weight that leaves nothing of the reconstruction, and a discriminator that stands still."""
    model = make_adversarial_vae(weight=1e6, cap=1e6)
    randomised(model.discriminator), randomised(model.autoencoder, seed=1)
    model.ramp_steps, model.random_latents, model.active = 1, False, True
    model.compile(keras.optimizers.SGD(1e-3), discriminator_optimizer=keras.optimizers.SGD(0.0), jit_compile=False)
    data = tensors(batch_of(4))

    def logit():
        fake = model.autoencoder.forward(data, tf.constant(0, tf.int64), training=True)[1]
        return float(tf.reduce_mean(model.discriminate(fake, data)))

    before, discriminator = logit(), model.discriminator.get_weights()
    model.train_step(data)
    assert logit() > before + 1e-4
    for ours, theirs in zip(discriminator, model.discriminator.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_step_of_the_discriminator_sets_real_and_fake_apart():
    model = make_adversarial_vae()
    randomised(model.discriminator)
    model.compile(keras.optimizers.SGD(0.0), discriminator_optimizer=keras.optimizers.SGD(1e-3), jit_compile=False)
    data, fake = tensors(batch_of(4)), tf.constant(batch_of(4, seed=9)["image"])
    before = model.train_discriminator(data, [fake])
    after = model.train_discriminator(data, [fake])
    assert float(after["d_loss"]) < float(before["d_loss"])
    assert float(after["d_real"] - after["d_fake"]) > float(before["d_real"] - before["d_fake"])


@pytest.mark.slow
def test_discriminator_tells_real_from_fake_and_its_gradient_reaches_the_decoder():
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
