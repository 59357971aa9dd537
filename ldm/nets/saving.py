"""What Keras needs to write our classes into a `.keras` file and to read them again.

register    gives a class its name in files, "ldm>" and the class's own
Recorded    a model's constructor arguments: Keras writes down those of a layer by itself, but not those of a model
"""

import inspect

import keras

register = keras.saving.register_keras_serializable("ldm")


class Recorded:
    """A model whose configuration is its constructor's arguments, read off the signature.

    The constructor calls `self.remember(locals())`, after `super().__init__` and before it gives any argument another
    value. Each argument is an attribute from then on, and `get_config` says what these attributes hold at the time.
    """

    renamed = {}  # {argument: attribute}, where an attribute of the argument's name means something else

    @classmethod
    def argument_names(cls):
        """The arguments of the constructor, then those of the classes that it inherits from."""
        names = []
        for kind in cls.__mro__:
            if issubclass(kind, Recorded) and "__init__" in vars(kind):
                parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]  # without self
                names += [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]
        return list(dict.fromkeys(names))

    def remember(self, values):
        """Make attributes of the arguments among `values`, {name: value}; other names are passed over."""
        for name in self.argument_names():
            if name in values:
                setattr(self, self.renamed.get(name, name), values[name])

    def get_config(self):
        values = {name: getattr(self, self.renamed.get(name, name)) for name in self.argument_names()}
        plain = {name: list(value) if isinstance(value, list | tuple) else value for name, value in values.items()}
        return {"name": self.name, **plain}
