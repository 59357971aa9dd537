"""The library under the command lines: one room, one thing; six wings, in the order in which a student reads them.

    diffusion   what noise does to a picture, and how samplers take it away again: start here
    nets        the layers and networks that see through the noise
    training    what a step minimises, how it is right on several replicas, how a run goes on
    data        slices out of archives: bytes, names, people, pixels
    judging     are the pictures good, are they brains, are they anybody's
    drawing     sheets, films, charts, the report

Beside them, on the ground floor, what every wing uses:

    files       written whole or not at all
    batches     many slices, some at a time
    tissue      the classes of a mask
    cropping    the part of the pictures that the networks see
    shapes      what must stand in a JSON file
    later       libraries that take seconds to import, imported when they are first used

A wing imports nothing of another one, and no circle is allowed (`tests/test_arrows.py`). `diffusion` and `nets` are
written with `keras.ops`, `judging` and `drawing` with NumPy on plain arrays; `training` and `data` are TensorFlow's.
"""
