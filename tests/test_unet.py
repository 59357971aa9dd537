"""ldm/nets/unet.py: the time and every condition reach the network, and hidden ones do not."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny_models import make_diffusion, make_unet, randomised


def noisy(count=4, size=8, channels=2):
    rng = np.random.default_rng(2)
    x_t = rng.normal(size=(count, size, size, channels)).astype("float32")
    t = np.linspace(0.05, 0.95, count).astype("float32")
    return x_t, t, {"z": np.arange(count, dtype="int32"), "label": np.zeros(count, "int32")}


def test_unknown_label_is_minus_1_and_differs_from_known_ones():
    model = make_diffusion(randomised(make_unet()), prediction="x_0")
    x_t, t, conditions = noisy()
    unknown, first, second = (
        np.asarray(model.denoise(x_t, t, conditions | {"label": np.full(4, label)})) for label in (-1, 0, 1)
    )
    np.testing.assert_array_equal(model.denoise(x_t, t, {"z": conditions["z"]}), unknown)
    assert np.abs(unknown - first).max() > 1e-4 and np.abs(first - second).max() > 1e-4
    assert np.all(np.isfinite(unknown))


def test_slice_index_and_time_reach_the_network():
    model = make_diffusion(randomised(make_unet(num_labels=0)), prediction="x_0")
    x_t, t, conditions = noisy()
    here, there = (model.denoise(x_t, t, {"z": np.full(4, z)}) for z in (3, 30))
    assert np.abs(here - there).max() > 1e-4
    assert np.abs(here - model.denoise(x_t, t + 0.02, {"z": np.full(4, 3)})).max() > 1e-4


@pytest.mark.parametrize("ask", ["unet", "model"])
def test_times_closer_than_bfloat16_are_told_apart_under_mixed_bfloat16(bfloat16, ask):
    """The autocast of a layer's inputs would make 0.5 and 0.5005 one time."""
    model = make_diffusion(randomised(make_unet()))
    x_t, t, conditions = noisy(2)
    x_t = np.repeat(x_t[:1], 2, axis=0)
    inputs = {
        "x": x_t,
        "t": np.array([0.5, 0.5005], "float32"),
        "keep": np.ones(2, "float32"),
        "z": np.zeros(2, "int32"),
        "label": np.zeros(2, "int32"),
    }
    output = (model.unet if ask == "unet" else model)(inputs)
    assert output.dtype == tf.float32
    assert np.abs(output[0] - output[1]).max() > 1e-3


def test_levels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 levels do not fit .6, 6. pixels"):
        make_unet(size=6, multipliers=(1, 2, 4))
    with pytest.raises(ValueError, match="2 levels of patches of 4 do not fit .12, 12. pixels"):
        make_unet(size=12, multipliers=(1, 2), patch=4)


def test_patches_are_denoised_as_pixels_of_as_many_channels():
    """A network of patches is the one of whole pixels between the two trades, each patch at its place."""
    patches, pixels = randomised(make_unet(size=8, patch=2)), make_unet(size=4, channels=8)
    pixels.set_weights(patches.get_weights())
    x, t, conditions = noisy()
    told = {"t": t, "keep": np.ones(4, "float32"), **conditions}
    channels = x.reshape(4, 4, 2, 4, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(4, 4, 4, 8)
    there = np.asarray(pixels({"x": channels, **told}))
    back = there.reshape(4, 4, 4, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(4, 8, 8, 2)
    np.testing.assert_allclose(patches({"x": x, **told}), back, atol=1e-6)
    assert np.abs(back).max() > 1e-2


# ---- covariates and masks --------------------------------------------------------------------------------------------


def test_the_unknown_covariate_has_a_token_of_its_own(tmp_path):
    """Number and category each change the answer; NaN is neither the mean nor the first value; keep = 0 hides both."""
    model = randomised(make_diffusion(make_unet(multipliers=(1,), attention=(), covariates=(0, 3))))
    x_t, t = tf.random.stateless_normal((1, 8, 8, 2), (0, 1)), tf.constant([0.5])

    def answer(*covariates, known=True):
        conditions = {
            "z": tf.constant([3]),
            "label": tf.constant([1]),
            "covariates": tf.constant([covariates], "float32"),
        }
        if not known:
            del conditions["z"]
        return model.denoise(x_t, t, conditions).numpy()

    nan = float("nan")
    apart = [answer(0, 0), answer(1, 0), answer(0, 1), answer(nan, 0), answer(0, nan)]
    for i, one in enumerate(apart):
        assert np.isfinite(one).all()
        for other in apart[:i]:
            assert np.abs(one - other).max() > 1e-3
    np.testing.assert_array_equal(answer(0, 0, known=False), answer(1, 2, known=False))
    unknown = model.denoise(x_t, t, {"z": tf.constant([3]), "label": tf.constant([1])}).numpy()
    np.testing.assert_array_equal(unknown, answer(nan, nan))
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    conditions = {"z": tf.constant([3]), "label": tf.constant([1]), "covariates": tf.constant([[0.5, 2.0]])}
    np.testing.assert_array_equal(loaded.denoise(x_t, t, conditions).numpy(), answer(0.5, 2))


def test_covariates_are_not_rounded_by_bfloat16(bfloat16):
    model = randomised(make_diffusion(make_unet(multipliers=(1,), attention=(), covariates=(0,))))
    token = model.unet.get_layer("covariate_0")
    one, other = (np.asarray(token(tf.constant([value])), "float32") for value in (1.0, 1.001))
    assert np.abs(one - other).max() > 0


def test_masks_are_seen_and_hidden():
    """The mask changes the answer; without keep, or left out, it is as if nobody knew any tissue."""
    model = randomised(make_diffusion(make_unet(multipliers=(1,), attention=(), mask=True)))
    x_t, t, rng = tf.random.stateless_normal((1, 8, 8, 2), (0, 1)), tf.constant([0.5]), np.random.default_rng(0)
    masks = [tf.one_hot(rng.integers(0, 4, (1, 8, 8)), 4) for _ in range(2)]
    known = {"z": tf.constant([3]), "label": tf.constant([1])}
    answers = [model.denoise(x_t, t, {**known, "mask": mask}).numpy() for mask in masks]
    assert np.abs(answers[0] - answers[1]).max() > 1e-3
    unknown = model.denoise(x_t, t, {**known, "mask": tf.zeros((1, 8, 8, 4))}).numpy()
    np.testing.assert_array_equal(model.denoise(x_t, t, known).numpy(), unknown)
    hidden = [model.denoise(x_t, t, {"mask": mask}).numpy() for mask in masks]
    np.testing.assert_array_equal(*hidden)


def test_what_is_drawn_is_not_augmented():
    """The network sees whether an example is, and `denoise` says 0, no."""
    unet = randomised(make_unet(tell_augmented=True))
    x_t, t, conditions = noisy()
    inputs = {"x": x_t, "t": t, "keep": np.ones(4, "float32"), **conditions}
    plain, augmented = (unet(inputs | {"augmented": np.full(4, number, "float32")}) for number in (0, 1))
    assert np.abs(plain - augmented).max() > 1e-3
    drawn = make_diffusion(unet, prediction="x_0").denoise(x_t, t, conditions)
    np.testing.assert_allclose(drawn, plain, atol=1e-6)
    assert "augmented" not in make_unet().input
