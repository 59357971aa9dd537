"""modules.py: what holds for all models: replicas, files, averages."""

import inspect

import keras
import numpy as np
import pytest
from tiny_models import (
    batch_of,
    compiled,
    dataset_of,
    make_adversarial_vae,
    make_adversarial_vqvae,
    make_fsq,
    make_small_diffusion,
    make_unet,
    make_vae,
    make_vqvae,
    randomised,
    tensors,
)

import modules
from ldm.training import callbacks, distribution, runs
from ldm.training.adversary import AdversarialTraining

# ---- replicas --------------------------------------------------------------------------------------------------------


def trained(replicas, make, data, averaged):
    keras.utils.set_random_seed(1)
    with distribution.make_strategy(replicas).scope():
        options = {"kind": callbacks.AveragingAdamW, "use_ema": True, "ema_momentum": 0.7} if averaged else {}
        model = compiled(make(), learning_rate=5e-3, **options)
    batches, validation = data
    history = model.fit(batches(), epochs=2, shuffle=False, verbose=0, validation_data=validation()).history
    return model, history


@pytest.mark.parametrize(
    ("make", "averaged", "data"),
    [
        # of the last validation batch one replica gets one example, the other nothing
        pytest.param(
            *(make_vqvae, False, (lambda: dataset_of(16, 8), lambda: dataset_of(9, 8, seed=3))), marks=pytest.mark.slow
        ),
        pytest.param(
            *(make_fsq, False, (lambda: dataset_of(16, 8), lambda: dataset_of(9, 8, seed=3))), marks=pytest.mark.slow
        ),
        (make_adversarial_vqvae, False, (lambda: dataset_of(16, 8), lambda: dataset_of(9, 8, seed=3, unmasked=0))),
        pytest.param(
            *(make_adversarial_vae, False, (lambda: dataset_of(16, 8), lambda: dataset_of(9, 8, seed=3, unmasked=0))),
            marks=pytest.mark.slow,
        ),
        (make_small_diffusion, True, (lambda: dataset_of(16, 8, size=8, channels=2),) * 2),
    ],
    ids=["vqvae", "fsq", "adversarial-vqvae", "adversarial-vae", "diffusion"],
)
def test_two_replicas_give_the_weights_and_reports_of_one_at_the_same_global_batch(make, averaged, data):
    """Four steps of fit: weights, codebook, averages, optimiser's averages, and every reported number."""
    one, history_of_one = trained(1, make, data, averaged)
    two, history_of_two = trained(2, make, data, averaged)
    # The hinge has corners, where the last digit decides for a whole patch; a wrong step would be 10 times that.
    tolerance = 5e-4 if isinstance(one, AdversarialTraining) else 1e-5
    for weight, other in zip(one.weights, two.weights, strict=True):
        np.testing.assert_allclose(other, weight, rtol=1e-4, atol=tolerance, err_msg=weight.path)
    for variable, other in zip(one.optimizer.variables, two.optimizer.variables, strict=True):
        np.testing.assert_allclose(other, variable, rtol=1e-3, atol=tolerance, err_msg=variable.path)
    assert history_of_one.keys() == history_of_two.keys()
    for name, values in history_of_one.items():
        np.testing.assert_allclose(history_of_two[name], values, rtol=1e-4, atol=tolerance / 10, err_msg=name)
    assert keras.ops.convert_to_numpy(two.optimizer.iterations) == 4
    if isinstance(one, AdversarialTraining):
        for variable, other in zip(
            one.discriminator_optimizer.variables, two.discriminator_optimizer.variables, strict=True
        ):
            np.testing.assert_allclose(other, variable, rtol=1e-3, atol=tolerance, err_msg=variable.path)
        assert history_of_one["adversarial"] == pytest.approx([0.5, 1.0])
        assert min(history_of_one["adaptive_weight"]) > 0
    if make in (make_vqvae, make_adversarial_vqvae):
        bottleneck = (two if make is make_vqvae else two.autoencoder).bottleneck
        copies = [[np.asarray(v) for v in weight.value.values] for weight in bottleneck.weights]
        for first, second in copies:  # the trap: replicas whose codebooks drift apart in silence
            np.testing.assert_array_equal(first, second)
        assert history_of_one["revived"][0] > 0


# ---- randomness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (make_vqvae, {}),
        pytest.param(make_vae, {}, marks=pytest.mark.slow),
        (make_small_diffusion, {"size": 8, "channels": 2}),
    ],
    ids=["vqvae", "vae", "diffusion"],
)
def test_each_step_of_a_training_draws_anew_and_a_step_that_is_repeated_draws_the_same(make, data, monkeypatch):
    """Of the noise, of the times and of the latents that dead codes move to: functions of the seed and of the step."""
    drawn = []

    def watch(name):
        plain = getattr(distribution, name)

        def watched(*args, **options):
            drawn.append(plain(*args, **options))
            return drawn[-1]

        monkeypatch.setattr(distribution, name, watched)

    for name in ("normal", "global_rows", "random_rows"):
        watch(name)

    def step(number, seed=3):
        model = randomised(make(seed=seed))
        compiled(model).optimizer.iterations.assign(number)
        drawn.clear()
        model.train_step(tensors(batch_of(4, **data)))
        return np.concatenate([np.ravel(each) for each in drawn])

    first, second, again, other = step(0), step(1), step(1), step(1, seed=4)
    assert first.size > 4
    np.testing.assert_array_equal(again, second)
    for one in (first, other):
        assert np.abs(one - second).max() > 1e-3 and np.mean(one == second) < 0.5


# ---- files -----------------------------------------------------------------------------------------------------------

UNUSUAL = {
    "vqvae": (
        modules.VQVAE,
        {
            "image_size": 16,
            "crop_box": [4, 0, 8, 16],
            "downsampling": 8,
            "patch": 4,
            "width": 12,
            "blocks": 2,
            "latent_channels": 6,
            "condition_on_z": False,
            "num_labels": 2,
            "tissues": 3,
            "structure_weight": 0.7,
            "texture_weight": 0.3,
            "histogram_weight": 0.6,
            "tissue_weight": 0.2,
            "clip_norm": 0.4,
            "seed": 8,
            "quantizer": "ema",
            "num_codes": 9,
            "cosine": True,
            "levels": [3, 2],
            "codes_per_latent": 3,
            "commitment": 0.6,
        },
    ),
    "fsq": (
        modules.VQVAE,
        {
            "image_size": 16,
            "crop_box": [0, 0, 16, 16],
            "downsampling": 8,
            "patch": 4,
            "width": 12,
            "blocks": 2,
            "latent_channels": 6,
            "condition_on_z": False,
            "num_labels": 2,
            "tissues": 3,
            "structure_weight": 0.7,
            "texture_weight": 0.3,
            "histogram_weight": 0.6,
            "tissue_weight": 0.2,
            "clip_norm": 0.4,
            "seed": 8,
            "quantizer": "fsq",
            "num_codes": 60,
            "cosine": False,
            "levels": [5, 4, 3],
            "codes_per_latent": 2,
            "commitment": 0.6,
        },
    ),
    "vae": (
        modules.VAE,
        {
            "image_size": 16,
            "crop_box": [0, 0, 16, 16],
            "downsampling": 2,
            "patch": 2,
            "width": 12,
            "blocks": 2,
            "latent_channels": 2,
            "condition_on_z": False,
            "num_labels": 2,
            "tissues": 3,
            "structure_weight": 0.7,
            "texture_weight": 0.3,
            "histogram_weight": 0.6,
            "tissue_weight": 0.2,
            "clip_norm": 0.4,
            "seed": 8,
            "kl_weight": 0.01,
            "kl_cycles": 3,
            "kl_cycle_steps": 50,
            "latent_noise": 0.6,
        },
    ),
    "unet": (
        modules.UNet,
        {
            "size": [24, 16],
            "channels": 3,
            "width": 12,
            "multipliers": [1, 2, 3],
            "blocks": 1,
            "attention": [6],
            "head_size": 6,
            "num_labels": 3,
            "dropout": 0.25,
            "covariates": [0, 2],
            "mask": True,
            "tell_augmented": True,
            "gates": True,
            "recompute": False,  # goes with no dropout
            "groups": 6,
            "patch": 2,
        },
    ),
    "diffusion": (
        modules.DiffusionModel,
        {
            "schedule": "sigmoid",
            "prediction": "eps",
            "drop_conditions": 0.3,
            "clip_x_0": True,
            "clip_norm": None,
            "seed": 8,
            "zero_snr": False,
            "min_snr_gamma": 5.0,
            "loss": "l1",
            "accumulate": 2,
            "sigma_data": 0.7,
        },
    ),
}


def outputs(model):
    """What a model says to one fixed input."""
    if isinstance(model, modules.Autoencoder):
        data = batch_of(3)
        latents = model.encode(data["image"], data["z"], data["label"])
        return [model(data), latents, model.decode_tissue(latents, data["z"], data["label"])]
    unet = model if isinstance(model, modules.UNet) else model.unet
    shape = (*unet.size, unet.channels)
    data = batch_of(3) | {"image": np.random.default_rng(1).normal(size=(3, *shape)).astype("float32")}
    inputs = {"x": data["image"], "t": np.array([0.1, 0.5, 1.0], "float32"), "keep": np.ones(3, "float32")}
    more = {
        "covariates": np.array([[0.5, 1], [-2, 0], [np.nan] * 2], "float32"),
        "mask": np.full((3, *shape[:2], 4), 0.25),
        "augmented": np.array([0, 1, 1], "float32"),
    }
    conditions = {"z": data["z"], "label": data["label"], **{name: more[name] for name in more if name in unet.input}}
    said = [model(inputs | conditions)]
    if model is not unet:
        said.append(model.denoise(data["image"], inputs["t"], {"z": data["z"], "label": data["label"]}))
    return said


@pytest.mark.parametrize("name", UNUSUAL)
def test_every_argument_of_a_model_is_tried(name):
    """A new argument must be added to UNUSUAL."""
    kind, arguments = UNUSUAL[name]
    kinds = [kind, modules.Autoencoder] if issubclass(kind, modules.Autoencoder) else [kind]
    taken = {argument for each in kinds for argument in list(inspect.signature(each.__init__).parameters)[1:]}
    assert taken - {"kwargs"} == set(arguments) | ({"unet"} if name == "diffusion" else set())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "fsq" else ()) for name in UNUSUAL]
)
def test_model_comes_back_from_one_file_with_every_argument(name, tmp_path):
    """Keras records the constructor arguments of a Layer by itself, but not those of a Model."""
    kind, arguments = UNUSUAL[name]
    more = {"unet": make_unet()} if name == "diffusion" else {}
    model = randomised(kind(**arguments, **more))
    model.save(tmp_path / "model.keras")
    loaded = runs.load_model(tmp_path / "model.keras")
    assert type(loaded) is kind and len(outputs(loaded)) == len(outputs(model))
    for ours, theirs in zip(outputs(model), outputs(loaded), strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-6, atol=1e-6)
    for argument, value in arguments.items():
        assert loaded.get_config()[argument] == value, argument


class Averages(keras.callbacks.Callback):
    """Averages by the definition, a <- 0.5 a + 0.5 w after each step, a <- w after the first; and a copy for use.

    All while `fit` runs: at its end Keras overwrites the model's weights with the averages.
    """

    def __init__(self, path):
        super().__init__()
        self.path, self.averages = path, None

    def on_train_batch_end(self, batch, logs=None):
        self.raw = [np.asarray(weight) for weight in self.model.trainable_variables]
        self.averages = [0.5 * a + 0.5 * w for a, w in zip(self.averages or self.raw, self.raw, strict=True)]

    def on_epoch_end(self, epoch, logs=None):
        runs.export(self.model, self.path)
        self.copy = runs.copy_for_use(self.model)
        self.after = [np.asarray(weight) for weight in self.model.trainable_variables]


@pytest.mark.slow
def test_copy_for_use_holds_the_averaged_weights_and_not_the_raw_ones(tmp_path):
    data = dataset_of(8, 8, size=8, channels=2).repeat()
    model = compiled(make_small_diffusion(), learning_rate=1e-2, use_ema=True, ema_momentum=0.5)
    seen = Averages(tmp_path / "diffusion.keras")
    model.fit(data, steps_per_epoch=4, verbose=0, callbacks=[seen])
    assert max(np.abs(a - w).max() for a, w in zip(seen.averages, seen.raw, strict=True)) > 1e-3
    for copy in (seen.copy, runs.load_model(seen.path)):
        for weight, average in zip(copy.trainable_variables, seen.averages, strict=True):
            np.testing.assert_allclose(weight, average, atol=1e-6, err_msg=weight.path)
    for before, after in zip(seen.raw, seen.after, strict=True):
        np.testing.assert_array_equal(after, before)  # the model itself goes on with its own
