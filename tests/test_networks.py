"""ldm/nets/networks.py: what a discriminator sees."""

import keras
import numpy as np
import tensorflow as tf
from tiny_models import SIZE, batch_of, images, randomised

from ldm.nets import layers
from ldm.nets.networks import Discriminator


def test_slice_index_and_label_reach_the_discriminator():
    discriminator, data = randomised(Discriminator((SIZE, SIZE), patch=2, width=8, num_labels=2)), batch_of(2)
    known = {"image": data["image"], "z": np.full(2, 3), "label": np.zeros(2, "int32")}
    first = np.asarray(discriminator(known))
    assert first.shape == (2, 4, 4, 1)
    for other in ({"z": np.full(2, 20)}, {"label": np.ones(2, "int32")}):
        assert np.abs(np.asarray(discriminator(known | other)) - first).max() > 1e-4


def test_a_discriminator_patch_sees_as_far_as_is_said():
    discriminator = randomised(Discriminator((64, 64), patch=2, width=8))
    image = tf.Variable(images(1, 64))
    with tf.GradientTape() as tape:
        x = image
        for layer in discriminator.layers:  # the convolutions alone: group normalisation sees everything
            if isinstance(layer, layers.SpaceToDepth | keras.layers.Conv2D):
                x = layer(x)
        middle = x[0, 8, 8, 0]
    seen = np.flatnonzero(np.abs(tape.gradient(middle, image)[0, :, :, 0]).sum(0))
    assert seen.max() - seen.min() + 1 == 26  # 13 patches of 2 pixels


def test_a_discriminator_may_do_without_conditions():
    discriminator, data = (
        randomised(Discriminator((SIZE, SIZE), patch=2, width=8, condition_on_z=False)),
        batch_of(2),
    )
    known = {"image": data["image"], "z": np.full(2, 3), "label": np.zeros(2, "int32")}
    np.testing.assert_array_equal(
        discriminator(known), discriminator(known | {"z": np.full(2, 30), "label": np.ones(2, "int32")})
    )
