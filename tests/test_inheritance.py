"""ldm/training/inheritance.py: a run that keeps another's encoder takes over what fits it, and nothing else."""

import json

import pytest
import small_records

from ldm.training import inheritance, records
from ldm.training.settings import defaults, merged

EPOCHS = {"autoencoder": 5, "latents": 5, "diffusion": 100}


def begun(run, epochs=EPOCHS, settings=None):
    """A finished run as far as files go: its records, and a few bytes for each of its weights and latents."""
    (run / "latents").mkdir(parents=True)
    for stage, count in epochs.items():
        small_records.write_record(run, stage, settings, finished=True, epochs=count)
    for name in ("latents/train.npz", "latents/validate.npz", "diffusion.keras", "diffusion.last.weights.h5"):
        (run / name).write_text(f"{run.name} {name}")
    return run


def asked(before, **diffusion):
    """Settings of a run that keeps the encoder of another one."""
    own = {"init_from": str(before), "autoencoder": {"freeze_encoder": True, "epochs": 8}, "diffusion": diffusion}
    return merged(defaults(), own)


def test_latents_and_diffusion_come_along_and_count_as_done(tmp_path):
    before, run = begun(tmp_path / "a"), tmp_path / "b"
    (before / "latents" / "train.0123456789abcdef").mkdir()  # pieces of an encoding that was killed
    settings, manifest = asked(before), small_records.manifest()
    run.mkdir()
    small_records.write_record(run, "autoencoder", settings, finished=True, epochs=8)
    for stage in ("latents", "diffusion"):
        assert inheritance.predecessor(run, stage, settings, manifest) == before
        settings = inheritance.take_over(before, run, stage, settings, manifest)
        assert records.is_finished(run, stage, settings)
        assert inheritance.predecessor(run, stage, settings, manifest) is None  # it has its own now
    for name in ("latents/train.npz", "latents/validate.npz", "diffusion.keras", "diffusion.last.weights.h5"):
        assert (run / name).read_text() == f"a {name}"
    assert sorted(path.name for path in (run / "latents").iterdir()) == ["train.npz", "validate.npz"]
    assert json.loads((run / "diffusion.json").read_text())["settings"]["init_from"] == str(before)


def test_it_counts_as_done_however_long_it_was_trained(tmp_path):
    theirs = {"diffusion": {"epochs": 7, "steps_per_epoch": 33}}
    before, run = begun(tmp_path / "a", EPOCHS | {"diffusion": 7}, theirs), tmp_path / "b"
    run.mkdir()
    settings, manifest = asked(before), small_records.manifest()
    assert inheritance.predecessor(run, "diffusion", settings, manifest) == before
    taken = inheritance.take_over(before, run, "diffusion", settings, manifest)
    assert taken["diffusion"]["steps_per_epoch"] == 33 and taken["autoencoder"]["epochs"] == 8
    again = records.with_plans(run, asked(before))  # the same command, for the second time
    assert records.is_finished(run, "diffusion", again)
    records.refuse_change(run, "diffusion", again)


@pytest.mark.parametrize(
    "otherwise",
    ["other width", "other people", "not finished", "older latents", "encoder trained", "first stage"],
)
def test_nothing_is_taken_over_that_does_not_fit(tmp_path, otherwise):
    epochs = EPOCHS | ({"autoencoder": 6} if otherwise == "older latents" else {})
    before, run, stage = begun(tmp_path / "a", epochs), tmp_path / "b", "diffusion"
    settings, manifest = asked(before), small_records.manifest()
    if otherwise == "other width":
        settings = asked(before, width=32)
    elif otherwise == "other people":
        manifest = small_records.manifest(splits={**manifest["splits"], "test": {"cases": ["004"]}})
    elif otherwise == "not finished":
        small_records.write_record(before, "diffusion", finished=False)
    elif otherwise == "older latents":
        stage = "latents"
    elif otherwise == "encoder trained":
        settings = merged(settings, {"autoencoder": {"freeze_encoder": False}})
    else:
        stage = "autoencoder"
    assert inheritance.predecessor(run, stage, settings, manifest) is None
