"""What every layer and network of `ldm.nets` must do: come back from a file, keep its weights exact, learn.

A class that is registered there and has no case here is found by `test_every_registered_layer_has_a_case`.
"""

import importlib
import json
import pkgutil

import keras
import numpy as np
import pytest
import tensorflow as tf

from ldm import nets
from ldm.nets import bottlenecks, layers, networks, transformer, unet


def wrapped(layer, *shapes, listed=False):
    """A model that consists of one layer; of a bottleneck, the latents are its output."""
    inputs = [keras.Input(shape) for shape in shapes]
    outputs = layer(inputs) if listed else layer(*inputs)
    return keras.Model(inputs, outputs[0] if isinstance(layer, bottlenecks.Bottleneck) else outputs)


# Arguments other than the defaults, so that a file that loses them is found out.
CASES = {
    "GroupNorm": lambda: wrapped(layers.GroupNorm(2, "silu", epsilon=1e-3), (8, 8, 6), (12,)),
    "ResBlock": lambda: wrapped(layers.ResBlock(6, dropout=0.2), (8, 8, 4), (5,)),
    "Attention": lambda: wrapped(layers.Attention(3), (7, 6), (4, 5)),
    "AttentionBlock": lambda: wrapped(layers.AttentionBlock(2), (4, 4, 6), (3, 5)),
    "AttentionGate": lambda: wrapped(layers.AttentionGate(5), (4, 4, 6), (4, 4, 3)),
    "Embedding": lambda: wrapped(layers.Embedding(8, scale=1000.0, autocast=False), ()),
    "NullableEmbedding": lambda: wrapped(layers.NullableEmbedding(), (6,), ()),
    "Covariate": lambda: wrapped(layers.Covariate(6), ()),
    "Covariate of categories": lambda: wrapped(layers.Covariate(6, values=5), ()),
    "Tokens": lambda: wrapped(layers.Tokens(), (6,), (6,), listed=True),
    "Agreement": lambda: wrapped(layers.Agreement(), (4, 4, 6), (6,)),
    "SpaceToDepth": lambda: wrapped(layers.SpaceToDepth(2), (8, 8, 1)),
    "DepthToSpace": lambda: wrapped(layers.DepthToSpace(2), (4, 4, 8)),
    "CausalAttention": lambda: wrapped(transformer.CausalAttention(3), (5, 6)),
    "TransformerBlock": lambda: wrapped(transformer.TransformerBlock(3, dropout=0.2, expansion=2), (5, 6)),
    "Codebook": lambda: wrapped(bottlenecks.Codebook((2, 3, 4), 7, 2, decay=0.8, revival=0.2, cosine=True), (2, 3, 4)),
    "Grid": lambda: wrapped(bottlenecks.Grid((2, 3, 4), [4, 3], 2), (2, 3, 4)),
    "Gaussian": lambda: wrapped(bottlenecks.Gaussian((2, 3, 4)), (2, 3, 8)),
    "Discriminator": lambda: networks.Discriminator((8, 12), patch=2, width=6, num_labels=2),
    "UNet": lambda: unet.UNet(
        *((8, 4), 2, 8, (1, 2), 1, (4,), 4, 2),
        dropout=0.1,
        covariates=(0, 3),
        mask=True,
        tell_augmented=True,
        gates=True,
    ),
    "UNet of patches": lambda: unet.UNet((8, 4), 2, 8, (1,), 1, (), 4, patch=2, mask=True),
}


def registered():
    """{class: names of its cases} of all layers that `ldm.nets` registers with Keras."""
    rooms = [importlib.import_module(f"ldm.nets.{room.name}") for room in pkgutil.iter_modules(nets.__path__)]
    kinds = {kind for room in rooms for kind in vars(room).values() if isinstance(kind, type)}
    ours = {kind for kind in kinds if keras.saving.get_registered_name(kind).startswith("ldm>")}
    return {kind.__name__ for kind in ours if issubclass(kind, keras.layers.Layer)}


def test_every_registered_layer_has_a_case():
    assert {name.split()[0] for name in CASES} == registered()


def random_weights(model, seed=0):
    """So that no layer that starts at zero hides anything. Averages and scales stay near 1."""
    rng = np.random.default_rng(seed)
    return [(0.3 * rng.normal(size=w.shape) + (w.ndim == 1)).astype(w.dtype) for w in model.get_weights()]


def random_inputs(model, rows=3):
    rng = np.random.default_rng(1)

    def value(tensor):
        if tensor.dtype == "int32":
            return rng.integers(0, 2, (rows, *tensor.shape[1:])).astype("int32")
        return np.abs(rng.normal(size=(rows, *tensor.shape[1:]))).astype("float32")

    return keras.tree.map_structure(value, model.input)


def arguments(layer):
    """A layer's configuration without its name, as a file holds it."""
    if type(layer) is keras.Model or type(layer).__name__ == "Functional":
        return None  # a `wrapped` one: its layers say all
    config = keras.saving.serialize_keras_object(layer)["config"]
    return json.loads(json.dumps({key: value for key, value in config.items() if key != "name"}))


@pytest.mark.parametrize("name", CASES)
def test_it_comes_back_from_a_file_with_its_arguments_and_answers(name, tmp_path):
    model = CASES[name]()
    model.set_weights(random_weights(model))
    model.save(tmp_path / "model.keras")
    loaded, inputs = keras.saving.load_model(tmp_path / "model.keras"), random_inputs(model)
    np.testing.assert_array_equal(loaded(inputs), model(inputs))
    assert loaded(inputs).shape == (3, *model.output.shape[1:])
    for ours, theirs in zip([model, *model.layers], [loaded, *loaded.layers], strict=True):
        assert arguments(theirs) == arguments(ours)


@pytest.mark.parametrize("name", CASES)
def test_in_mixed_precision_it_keeps_float32_weights_and_nearly_its_answers(name):
    exact = CASES[name]()
    weights, inputs = random_weights(exact), random_inputs(exact)
    exact.set_weights(weights)
    expected = np.asarray(exact(inputs))
    keras.mixed_precision.set_dtype_policy("mixed_bfloat16")
    model = CASES[name]()
    assert {weight.dtype for weight in model.weights} <= {"float32"}
    model.set_weights(weights)
    answer = model(inputs)
    in_float32 = {"Codebook", "Grid", "Gaussian", "Discriminator", "UNet"}  # whose answers must not be rounded
    assert answer.dtype == (tf.float32 if name.split()[0] in in_float32 else tf.bfloat16)
    error = np.abs(np.asarray(tf.cast(answer, tf.float32)) - expected)
    assert error.mean() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_reaches_every_weight_that_learns(name):
    model = CASES[name]()
    model.set_weights(random_weights(model))
    inputs = random_inputs(model)
    with tf.GradientTape() as tape:
        answer = model(inputs)
        loss = tf.reduce_sum(answer * np.random.default_rng(2).normal(size=answer.shape))
    for weight, gradient in zip(model.trainable_variables, tape.gradient(loss, model.trainable_variables), strict=True):
        assert gradient is not None, weight.path
        assert np.all(np.isfinite(tf.convert_to_tensor(gradient))), weight.path
