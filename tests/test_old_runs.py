"""Runs made by an earlier version load, and their models answer as they did then (`tests/old_runs`)."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

import modules  # noqa: F401  (registers the classes that a .keras file names)
from ldm.training import old_runs, records, runs

OLD = Path(__file__).parent / "old_runs"


def near(now, then):
    np.testing.assert_allclose(np.asarray(now), then, atol=2e-5)


@pytest.mark.parametrize("run", ["vqvae", "vae", "fsq"])
def test_a_first_stage_of_before_answers_as_it_did(run):
    model, said = runs.load_model(OLD / run / "autoencoder.keras"), np.load(OLD / run / "answers.npz")
    known = said["z"], said["label"]
    near(model.encode(said["image"], *known), said["latents"])
    near(model.decode(said["latents"], *known), said["decoded"])
    if "codes" in said:
        np.testing.assert_array_equal(np.asarray(model.codes(said["latents"])), said["codes"])
    if "tissue" in said:
        np.testing.assert_array_equal(np.asarray(model.decode_tissue(said["latents"], *known)), said["tissue"])


@pytest.mark.parametrize("run", ["vqvae", "pixels"])
def test_a_diffusion_model_of_before_answers_as_it_did(run):
    model, said = runs.load_model(OLD / run / "diffusion.keras"), np.load(OLD / run / "answers.npz")
    conditions = {name.removeprefix("told_"): said[name] for name in said.files if name.startswith("told_")}
    if "facts" in conditions:
        conditions["covariates"] = conditions.pop("facts")
    known, alone = (np.asarray(model.denoise(said["x_t"], said["t"], told)) for told in (conditions, None))
    if model.clip_x_0:  # to a range that was not wider at late times then
        known, alone = (np.clip(x_0, -1.0, 1.0) for x_0 in (known, alone))
    near(known, said["x_0"])
    near(alone, said["x_0_alone"])


def test_a_prior_of_before_answers_as_it_did():
    model, said = runs.load_model(OLD / "vqvae" / "prior.keras"), np.load(OLD / "vqvae" / "answers.npz")
    near(model.logits(said["prior_codes"], said["told_z"], said["told_label"]), said["prior_logits"])


def test_settings_of_before_have_todays_names():
    settings = records.read(OLD / "vqvae", "diffusion")["settings"]
    assert settings["autoencoder"]["crop_box"] == (4, 4, 24, 24) and "window" not in settings["autoencoder"]


def test_a_file_of_today_is_left_alone(tmp_path):
    model = runs.load_model(OLD / "vqvae" / "diffusion.keras")
    model.save(tmp_path / "diffusion.keras")
    assert old_runs.modernised(tmp_path / "diffusion.keras") is None


@pytest.mark.parametrize("run", ["vqvae", "fsq"])
def test_weights_of_before_are_read_with_todays_names(run, tmp_path):
    """So an interrupted training of before goes on; a file of today's weights is left alone."""
    path = tmp_path / "autoencoder.last.weights.h5"
    with zipfile.ZipFile(OLD / run / "autoencoder.keras") as file:
        path.write_bytes(file.read("model.weights.h5"))
    model = runs.load_model(OLD / run / "autoencoder.keras")
    expected = model.get_weights()
    model.set_weights([np.zeros_like(weight) for weight in expected])
    with runs.of_today(path, old_runs.modern_weights(path)) as today:
        model.load_weights(today)
    for weight, then in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(weight, then)
    model.save_weights(path)
    assert old_runs.modern_weights(path) is None
