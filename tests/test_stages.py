"""stages.py: what each stage learns from is what it should be, and what it keeps is what it has learned."""

import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import dataset
import encoding
import modules
import stages
from ldm import tissue
from ldm.batches import untuned
from ldm.data import pixels
from ldm.data.masks import tissue_fractions
from ldm.training import callbacks, presets, records, runs
from ldm.training import settings as schema

OLD = Path(__file__).parent / "old_runs"
VIEWS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Eight people of 32 slices and 32 pixels, whose table says an age: more training slices than a batch of 64."""
    home = tmp_path_factory.mktemp("data")
    dataset.write_phantoms(home / "phantom.zip", people=8, image_size=32)
    rows = [f"{case},{('AD', 'NC')[case % 2]},{60 + case}" for case in range(1, 9)]
    (home / "people.csv").write_text("\n".join(["case,label,age", *rows]) + "\n")
    return dataset.open_source(home / "phantom.zip", labels=home / "people.csv")


@pytest.fixture(scope="module")
def first():
    """A first stage of 32 pixels with a crop box and two codes per latent."""
    return runs.load_model(OLD / "vqvae" / "autoencoder.keras")


@pytest.fixture(scope="module")
def settings():
    stored = records.of(OLD / "vqvae", "latents")["settings"]
    diffusion = {"condition_on_mask": True, "conditions": ["age"], "batch_size": 12}
    return schema.merged(stored, {"latents": {"views": VIEWS}, "diffusion": diffusion, "seed": 3})


@pytest.fixture(scope="module")
def run(source, settings, tmp_path_factory):
    """A run with a first stage, and its latents."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    for name in ("autoencoder.keras", "autoencoder.json"):
        shutil.copy(OLD / "vqvae" / name, folder / name)
    encoding.encode_latents(folder, settings, source, source.manifest())
    return folder


def arrays_of(run, split):
    with np.load(run / "latents" / f"{split}.npz") as file:
        return dict(file)


# ---- latents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "validate"])
def test_view_0_is_the_slice_with_what_belongs_to_it(run, source, first, split):
    stored, real = arrays_of(run, split), dataset.read_split(source, split, 32, masks=True)
    for key in ("z", "label", "case"):
        np.testing.assert_array_equal(stored[key], real[key])
    assert set(stored["label"]) == {0, 1} or split == "validate"
    np.testing.assert_allclose(
        stored["latents"][0], first.encode(real["image"], real["z"], real["label"]), atol=4e-3, rtol=1e-3
    )
    np.testing.assert_allclose(stored["mask"][0], tissue_fractions(real["mask"], (6, 6), first.crop_box), atol=1e-3)
    assert len(stored["latents"]) == (VIEWS if split == "train" else 1)


def test_other_views_are_the_same_slices_augmented_each_in_its_own_way(run, source, first, settings):
    stored, real = arrays_of(run, "train"), dataset.read_split(source, "train", 32, masks=True)
    count = len(real["z"])
    assert count > 64  # more than one batch, so that slices are numbered over all of them
    for view in range(1, VIEWS):
        seeds = np.stack([np.full(count, settings["seed"] + view), np.arange(count)], axis=-1)
        image, mask = pixels.augment(real["image"], seeds, False, real["mask"], encoding.GENTLY)
        expected = first.encode(image, real["z"], real["label"])
        np.testing.assert_allclose(stored["latents"][view], expected, atol=4e-3, rtol=1e-3)
        fractions = tissue_fractions(mask, (6, 6), first.crop_box)
        np.testing.assert_allclose(stored["mask"][view], fractions, atol=1e-3)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        apart = np.abs(np.float32(stored["latents"][one]) - stored["latents"][other]).mean(axis=(1, 2, 3))
        assert np.median(apart) > 0.02 and np.mean(apart > 0.005) > 0.9


def test_codes_are_those_of_the_latents_of_every_view(run, first):
    stored = arrays_of(run, "train")
    for view in range(VIEWS):
        codes = np.asarray(first.codes(np.float32(stored["latents"][view])))
        assert np.mean(codes == stored["codes"][view]) > 0.99  # latents are kept with 16 bits


def test_latents_are_flipped_only_where_slices_may_be(source, first):
    plain, flipped = (
        encoding.encoded(first, source, "validate", 2, False, seed=0, flip=flip)["latents"] for flip in (False, True)
    )
    np.testing.assert_array_equal(plain[0], flipped[0])
    same = np.array([np.array_equal(a, b) for a, b in zip(plain[1], flipped[1], strict=True)])
    assert 0.2 < same.mean() < 0.8


def test_the_latents_stage_writes_down_whose_latents_they_are(run, settings):
    stored = runs.load_json(run / "latents.json")
    assert stored["finished"] and stored["epochs"] == runs.load_json(run / "autoencoder.json")["epochs"]
    assert stored["settings"]["latents"]["views"] == VIEWS


# ---- what the diffusion model learns from ----------------------------------------------------------------------------


def learned(run, settings, source, split="train", training=True, start_step=0):
    columns = source.columns(settings["diffusion"]["conditions"])
    return stages.diffusion_batches(run, settings, source, columns, split, training, start_step)


def test_conditions_and_masks_travel_with_their_latents(run, settings, source):
    stored = arrays_of(run, "train")
    views, count = stored["latents"].shape[:2]
    flat = np.float32(stored["latents"]).reshape(views * count, -1)
    people, columns = np.unique(stored["case"]), source.columns(["age"])
    age = dict(zip(people.tolist(), dataset.covariates_of(source, people, columns)[:, 0].tolist(), strict=True))
    assert len(set(age.values())) == len(age) > 1
    seen = []
    for batch in learned(run, settings, source).take(count // 12).as_numpy_iterator():
        for i, one in enumerate(batch["image"]):
            found = int(np.argmin(np.abs(flat - one.ravel()).max(axis=1)))
            view, place = divmod(found, count)
            np.testing.assert_array_equal(flat[found], one.ravel())
            for key in ("z", "label", "case"):
                assert batch[key][i] == stored[key][place], key
            np.testing.assert_array_equal(batch["mask"][i], np.float32(stored["mask"][view, place]))
            assert batch["augmented"][i] == (view > 0)
            assert batch["covariates"][i, 0] == pytest.approx(age[int(batch["case"][i])], abs=1e-6)
            seen.append(found)
    assert len({found % count for found in seen}) == len(seen)  # each slice once in a pass
    assert len({found // count for found in seen}) == views  # and any of its views


def test_only_in_latents_is_a_network_told_what_is_augmented(settings):
    """In pixels all training slices are, so it could not learn what slices look like as they are."""
    asked = schema.merged(settings, {"diffusion": {"tell_augmented": True}})
    for given, expected in ((asked, True), (settings, False), (schema.merged(asked, {"first_stage": "none"}), False)):
        unet = stages.make_diffusion(given, 2, covariates=(0,)).unet
        assert ("augmented" in unet.input) == expected


@pytest.mark.parametrize("steps", [10, None])
def test_the_last_share_of_a_first_stages_steps_is_plain(source, settings, monkeypatch, steps):
    monkeypatch.setattr(dataset, "make_dataset", lambda *_, **options: options)
    own = {"epochs": 4, "steps_per_epoch": steps, "batch_size": 8, "plain_end": 0.25, "augment": 0.5}
    options = stages.first_stage_batches(schema.merged(settings, {"autoencoder": own}), source, "train", True)
    assert options["augment"] == 0.5 and options["augmented_steps"] == 3 * (
        steps or -(-len(source.select("train")) // 8)
    )
    names = ("64-f4", "large-64", "64-f8", "128-f8", "oasis-256", "oasis-256-sharp", "large-256")
    assert [presets.of(name)["autoencoder"]["plain_end"] for name in names] == [0.35, 0.35, 0.0, 0.35, 0.35, 0.0, 0.0]


def test_going_on_in_the_middle_of_a_pass_gives_the_same_batches(run, settings, source):
    whole = list(learned(run, settings, source).take(20).as_numpy_iterator())  # a pass takes 16 steps
    later = list(learned(run, settings, source, start_step=7).take(13).as_numpy_iterator())
    for ours, theirs in zip(whole[7:], later, strict=True):
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])
    assert not np.array_equal(whole[0]["case"], whole[1]["case"])


def test_another_seed_gives_another_order(run, settings, source):
    other = schema.merged(settings, {"seed": 4})
    ours, theirs = (next(iter(learned(run, which, source))) for which in (settings, other))
    assert not np.array_equal(ours["image"], theirs["image"])


@pytest.mark.parametrize("in_pixels", [False, True])
def test_validation_is_view_0_in_order_and_numbers_its_batches(run, settings, source, in_pixels):
    if in_pixels:
        settings = schema.merged(settings, {"first_stage": "none"})
    batches = list(learned(run, settings, source, "validate", False).as_numpy_iterator())
    whole = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    np.testing.assert_array_equal(whole["number"], np.arange(len(whole["z"])) // 12)
    real = dataset.read_split(source, "validate", 32, masks=True)
    np.testing.assert_array_equal(whole["z"], real["z"])
    expected = real["image"] if in_pixels else arrays_of(run, "validate")["latents"][0]
    np.testing.assert_array_equal(whole["image"], expected)
    if in_pixels:
        fractions = tissue_fractions(real["mask"], (32, 32))
        np.testing.assert_array_equal(whole["mask"], fractions)
        assert fractions.shape[-1] == len(tissue.CLASSES)


def test_pixels_are_augmented_gently_in_training(run, settings, source):
    settings = schema.merged(settings, {"first_stage": "none", "flip": False})
    (batch,) = learned(run, settings, source).take(1).as_numpy_iterator()
    options = {"seed": settings["seed"], "masks": True, "augment": encoding.GENTLY}
    (expected,) = dataset.make_dataset(source, "train", 32, 12, True, **options).take(1).as_numpy_iterator()
    np.testing.assert_array_equal(batch["image"], expected["image"])
    (plain,) = dataset.make_dataset(source, "train", 32, 12, True, seed=3, augment=0.0).take(1).as_numpy_iterator()
    np.testing.assert_array_equal(batch["case"], plain["case"])
    assert np.abs(batch["image"] - plain["image"]).mean() > 1e-3


# ---- one training ----------------------------------------------------------------------------------------------------


def tiny(**more):
    """A small diffusion model of 8 pixels, and what it is trained with."""
    keras.utils.set_random_seed(1)
    unet = modules.UNet(8, 1, width=8, multipliers=(1,), blocks=1, attention=(), head_size=8)
    return modules.DiffusionModel(unet, clip_x_0=True, seed=5, **more)


STAGE = {"epochs": 2, "steps_per_epoch": 6, "learning_rate": 1e-2, "decay": "cosine", "patience": None}
STAGE = schema.frozen(STAGE)


def slices(start_step=0, share=None, training=True):
    """An endless dataset, or 3 batches, the last of them smaller, as `diffusion_batches` numbers them."""
    rng = np.random.default_rng(0)
    image = rng.uniform(-1, 1, (20, 8, 8, 1)).astype("float32")
    arrays = {"image": image, "z": np.arange(20, dtype="int32"), "label": np.full(20, -1, "int32")}
    if training:
        batches = tf.data.Dataset.from_tensor_slices(arrays).repeat().batch(4, drop_remainder=True).skip(start_step)
    else:
        batches = tf.data.Dataset.from_tensor_slices(arrays | {"number": np.arange(20, dtype="int32") // 8}).batch(8)
    return batches.with_options(untuned())


def fit(run, settings=STAGE, watchers=()):
    """A training with averaged weights; returns its model."""
    run.mkdir(exist_ok=True)
    model, picture = tiny(), lambda model: lambda path: None
    stages.fit(model, run, "diffusion", settings, slices, slices(training=False), picture, True, watchers)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, model) of a whole training."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    return run, fit(run)


def validation_loss(model):
    model.compile(keras.optimizers.SGD(0.0), jit_compile=False)
    return model.evaluate(slices(training=False), verbose=0, return_dict=True)["loss"]


def test_what_is_validated_and_kept_are_the_averaged_weights(trained):
    run, _ = trained
    rows = runs.read_history(run / "diffusion.csv")
    best = min(row["val_loss"] for row in rows)
    assert validation_loss(runs.load_model(run / "diffusion.keras")) == pytest.approx(best, rel=1e-4)
    last = tiny()
    stages.compile_for_training(last, STAGE["learning_rate"], 12, averaged=True)
    last.load_weights(run / "diffusion.last.weights.h5")  # where the last step has come to, not their average
    averages = last.optimizer._model_variables_moving_average
    apart = [np.abs(np.subtract(a, w)).max() for a, w in zip(averages, last.trainable_variables, strict=True)]
    assert max(apart) > 1e-3 and abs(validation_loss(last) - rows[-1]["val_loss"]) > 1e-4 * best


def test_the_learning_rate_of_a_training_ends_where_its_last_step_does(trained):
    optimizer = trained[1].optimizer
    assert int(optimizer.iterations) == 12 and float(optimizer.learning_rate) == pytest.approx(0.02 * 1e-2)
    assert float(optimizer.weight_decay) > 0


@pytest.mark.slow
def test_fit_goes_on_to_where_an_unbroken_training_ends(trained, tmp_path, capsys):
    class Killed(Exception):
        pass

    class Kill(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise Killed

    run, whole = trained
    with pytest.raises(Killed):
        fit(tmp_path, watchers=[Kill()])
    again = fit(tmp_path)
    assert "diffusion: going on after epoch 1 of 2" in capsys.readouterr().out
    for ours, theirs in zip(again.weights, whole.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=ours.path)
    ours, theirs = (runs.read_history(folder / "diffusion.csv") for folder in (tmp_path, run))
    assert [row["epoch"] for row in ours] == [0, 1]
    np.testing.assert_allclose([row["val_loss"] for row in ours], [row["val_loss"] for row in theirs], rtol=1e-5)
    assert (tmp_path / "diffusion.png").exists()
    fit(tmp_path)  # finished: nothing is trained, nothing is written
    assert runs.read_history(tmp_path / "diffusion.csv") == ours


def test_a_training_without_patience_left_is_not_gone_on_with(trained, tmp_path, capsys):
    run = shutil.copytree(trained[0], tmp_path / "run")
    (run / "diffusion.csv").write_text("epoch,val_loss\n0,0.5\n1,0.6\n")
    fit(run, schema.merged(STAGE, {"patience": 1, "epochs": 9}))
    assert "stopped after 2 epochs; the best was epoch 1" in capsys.readouterr().out
    assert len(runs.read_history(run / "diffusion.csv")) == 2


def losses_of(model, batches, training):
    """The loss of each batch by itself."""
    found = []
    for batch in batches:
        model.reset_metrics()
        step = model.train_step if training else model.test_step
        found.append(float(step(batch)["loss"]))
    return found


def test_noise_differs_from_step_to_step_and_from_batch_to_batch():
    """Of one batch and weights that stay: with one seed for every batch, all these losses would be the same."""
    model = tiny()
    model.compile(keras.optimizers.SGD(0.0), jit_compile=False)
    (batch,) = slices().take(1)
    training = losses_of(model, [batch] * 4, True)
    assert len(set(training)) == 4
    numbered = [{**batch, "number": tf.fill((4,), number)} for number in (0, 1, 2, 0)]
    validation = losses_of(model, numbered, False)
    assert len(set(validation)) == 3 and validation[0] == validation[3]
    again = losses_of(model, numbered, False)
    assert again == validation  # the same in every epoch
    other = tiny()
    other.seed = 6
    other.set_weights(model.get_weights())
    other.compile(keras.optimizers.SGD(0.0), jit_compile=False)
    assert losses_of(other, [batch], True) != training[:1]


def test_each_optimizer_of_an_adversarial_training_decays(first):
    settings = schema.merged(presets.of("phantom"), {"image_size": 32, "autoencoder": {"width": 8, "gan": True}})
    stage = schema.merged(settings["autoencoder"], {"steps_per_epoch": 5})
    model = stages.with_adversary(stages.make_autoencoder(settings, 0), stage)
    stages.compile_for_training(model, 0.1, 50, averaged=False)
    for optimizer in (model.optimizer, model.discriminator_optimizer):
        optimizer.iterations.assign(50)
        assert float(optimizer.learning_rate) == pytest.approx(0.002)
        assert isinstance(optimizer, keras.optimizers.AdamW)
    assert model.discriminator_optimizer.beta_1 == 0.5 and model.ramp_steps == 5


# ---- pictures of an epoch --------------------------------------------------------------------------------------------


def test_pictures_of_an_epoch_follow_the_weights_and_the_conditions():
    model = tiny()
    for weight in model.trainable_variables:  # an untrained network says nothing
        weight.assign(weight + keras.random.normal(weight.shape, stddev=0.1, seed=1))
    batch = {"z": np.int32([1, 9]), "label": np.int32([-1, -1]), "image": np.zeros((2, 8, 8, 1), "float32")}
    draw = stages.drawn(None, ["z", "label"], batch, 0, "ddim", 3)(model)
    before = draw()
    assert before.shape == (2, 8, 8, 1) and np.abs(before).max() <= 1.0
    np.testing.assert_array_equal(draw(), before)
    other = stages.drawn(None, ["z", "label"], batch | {"z": np.int32([1, 20])}, 0, "ddim", 3)(model)()
    np.testing.assert_allclose(other[0], before[0], atol=1e-5)
    assert np.abs(other[1] - before[1]).max() > 1e-4
    model.trainable_variables[-1].assign_add([0.5])
    assert np.abs(draw() - before).max() > 1e-3


def test_what_is_shown_is_evenly_spread():
    ten = tf.data.Dataset.range(10).map(lambda i: {"i": i}).batch(4)
    assert stages.spread(ten, 4)["i"].tolist() == [0, 3, 6, 9]
    assert sorted(stages.spread(ten, 12)["i"].tolist()) == [0, 0, 1, 1, *range(2, 10)]


def test_kid_needs_validation_slices(source, tmp_path, monkeypatch):
    monkeypatch.setattr(stages.features, "of_run", lambda *_: lambda images: (images.reshape(len(images), -1), None))
    watch = stages.kid(tmp_path, source, 32, lambda model: None, 2)
    assert isinstance(watch, callbacks.Kid) and 0 <= watch.real.min() < watch.real.max() <= 1
    monkeypatch.setattr(stages.dataset, "read_split", lambda *_: {"image": np.zeros((3, 32, 32, 1))})
    with pytest.raises(runs.RunError, match="--select kid needs 4 validation slices"):
        stages.kid(tmp_path, source, 32, lambda model: None, 2)
