"""Libraries that take seconds to import are imported when they are first used: mistakes in flags are told before that.

from ldm.later import tensorflow as tf
stages = Later("stages")
"""

import importlib


class Later:
    """Stands for the module of that name, which is imported when the first of its attributes is asked for."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self._name), attribute)


keras, tensorflow, ops = map(Later, ("keras", "tensorflow", "keras.ops"))
