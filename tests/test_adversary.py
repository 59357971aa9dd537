"""ldm/training/adversary.py: when adversarial training starts, what turns it down, and what the bank of codes draws."""

import keras
import numpy as np
import pytest

from ldm.training import adversary
from ldm.training.adversary import AdversaryWatch, CodeBank


def test_reconstruction_has_settled_once_two_epochs_gain_less_than_a_tenth_of_the_first():
    assert not adversary.settled([]) and not adversary.settled([0.5, 0.5])
    assert not adversary.settled([2.0, 0.8, 0.55, 0.6])  # 0.25 better than the best before, an eighth of 2.0
    assert not adversary.settled([2.0, 0.8, 0.9, 0.55])  # one unlucky epoch
    assert adversary.settled([2.0, 0.8, 0.65, 0.9])  # 0.15
    assert adversary.settled([2.0, 0.8, 0.9, 0.85])  # worse


class Model:
    """What `AdversaryWatch` needs of `modules.AdversarialTraining`."""

    def __init__(self):
        self.active, self.strength = False, keras.Variable(1.0)

    def begin(self):
        self.active = True


def watched(epochs, history=(), capsys=None):
    """A watch that has seen these epochs: (reconstruction, foreground SSIM, ramp, D(real), D(fake))."""
    watch, model = AdversaryWatch(lambda: list(history)), Model()
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
    drawn = np.asarray(bank.draw(np.repeat(np.array([5, 9], "int32"), 3000), (1, 2)))
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
    assert set(np.unique(bank.draw(z, (0, 0)))) == {2, 3, 4}
    np.testing.assert_array_equal(bank.draw(z, (0, 1)), bank.draw(z, (0, 1)))
    assert np.any(np.asarray(bank.draw(z, (0, 1))) != np.asarray(bank.draw(z, (0, 2))))
