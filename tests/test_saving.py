"""ldm/nets/saving.py: a constructor's arguments are written once, in its signature."""

import keras
from keras import layers

from ldm.nets.saving import Recorded


class Parent(Recorded, keras.Model):
    def __init__(self, width, depth=2, **kwargs):
        super().__init__(**kwargs)
        self.remember(locals())


class Child(Parent):
    renamed = {"loss": "penalty"}

    def __init__(self, width, loss="mse", shape=(3, 4), **kwargs):
        super().__init__(width, **kwargs)
        self.remember(locals())
        self.resolved = True


class Built(Recorded, keras.Model):
    def __init__(self, size, units=3, **kwargs):
        size, x = 2 * size, keras.Input((2 * size,))  # what is remembered is the value at the time of `remember`
        super().__init__(x, layers.Dense(units)(x), **kwargs)
        self.remember(locals())


def test_arguments_of_all_constructors_are_attributes_and_the_configuration():
    model = Child(5, depth=7, name="here")
    assert (model.width, model.depth, model.penalty, tuple(model.shape)) == (5, 7, "mse", (3, 4))
    assert model.get_config() == {"name": "here", "width": 5, "loss": "mse", "shape": [3, 4], "depth": 7}
    assert Child.from_config(model.get_config()).get_config() == model.get_config()


def test_a_value_that_is_settled_later_is_the_one_that_is_written():
    model = Child(5)
    model.depth = 9
    assert model.get_config()["depth"] == 9


def test_a_functional_model_remembers_as_well():
    model = Built(4, units=6, name="built")
    assert model.get_config() == {"name": "built", "size": 8, "units": 6}
    assert "names" not in vars(model) and not hasattr(model, "x")
