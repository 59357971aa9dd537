"""train.py: a user's mistake costs one sentence and exit status 2, before any long work, and loses nothing; what a run
is, by preset, record and flags; exit statuses.
"""

import functools
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import small_records

import dataset
import encoding
import stages
import train
from ldm.data import phantom
from ldm.drawing import figures
from ldm.training import distribution, presets, records, runs
from ldm.training import settings as schema
from ldm.training.systems import SYSTEMS

TINY = "--autoencoder none --image-size 32 --width 8 --multipliers 1 --blocks 1 --attention --head-size 8".split()
SHORT = "--epochs 1 --steps-per-epoch 2 --batch-size 4 --precision float32".split()


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "phantom.zip"
    dataset.write_phantoms(path, people=4, image_size=32)
    return str(path)


def resolved(*argv):
    """The settings that these flags make."""
    return train.resolve(train.parser().parse_args([str(word) for word in argv]))[2]


def flat_folder(home):
    """Slices of people without labels and masks."""
    home.mkdir()
    for case in range(3):
        figures.save_png(home / f"{case}_0.png", np.full((16, 16), 99, np.uint8))
    return str(home)


def refusal(main, argv, capsys):
    """What `main` says when it refuses: one sentence, no traceback."""
    assert main(argv) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    return said[0]


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--data", "nowhere.zip"], "nowhere.zip"),
        (["--image-size", "30"], "--image-size 30"),
        (["--image-size", "0"], "--image-size"),
        (["--epochs", "0"], "--epochs"),
        (["--learning-rate", "-1"], "--learning-rate"),
        (["--multipliers", "1", "2", "4", "4", "4", "4"], "--multipliers"),
        (["--width", "100"], "--width"),
        (["latents", "--autoencoder", "none"], "--autoencoder none"),
        (["--levels", "5", "5"], "--levels has no effect"),
        (["--quantizer", "fsq", "--levels", "8", "2"], "--levels must"),
        (["--quantizer", "fsq", "--levels", *["8"] * 11], "--levels must"),
        (["--quantizer", "fsq", "--num-codes", "64"], "--num-codes has no effect"),
        (["--quantizer", "fsq", "--latent-channels", "8"], "--latent-channels has no effect"),
        (["--batch-size", "3", "--replicas", "2"], "--batch-size 3"),
        (["--random-latents"], "--random-latents has no effect without --gan"),
        (["--gan", "--autoencoder", "none"], "--gan has no effect without --autoencoder"),
        (["--quantizer", "fsq", "--autoencoder", "vae"], "--quantizer has no effect without --autoencoder vqvae"),
        (["--autoencoder-width", "0"], "--autoencoder-width"),
        (["--condition-on-label", "--data", "flat"], "--condition-on-label needs labels"),
        (["--segment", "--data", "flat"], "--segment needs tissue masks"),
        (["--kl-weight", "1e-5"], "--kl-weight has no effect without --autoencoder vae"),
        (["--cosine", "--quantizer", "fsq"], "--cosine has no effect without --quantizer ema"),
        (["--gan", "--adversarial-weight", "-1"], "--adversarial-weight must be 0 or more"),
        (["--downsampling", "16", "--patch", "4", "--image-size", "40"], "--image-size 40"),
        (["--codes-per-latent", "2", "--autoencoder", "vae"], "--codes-per-latent has no effect"),
        (["--accumulate", "0"], "--accumulate"),
        (["prior", "--autoencoder", "vae"], "--autoencoder vae has none"),
        (["prior", "--prior-width", "-4"], "--prior-width"),
        (["--conditions", "age", "--data", "flat"], "--conditions age"),
        (["--labels", "none.csv", "--data", "flat"], "--labels none.csv"),
        (["--condition-on-mask", "--data", "flat"], "--condition-on-mask needs tissue masks"),
        (["--recompute", "--dropout", "0.1"], "--recompute"),
        (["--dropout", "-1"], "--dropout"),
        (["--patience", "0"], "--patience"),
        (["--patience", "3", "--select", "kid"], "--patience"),
        (["--multipliers", "0", "1"], "--multipliers"),
        (["--min-snr-gamma", "0"], "--min-snr-gamma"),
        (["--min-snr-gamma", "5", "--loss", "l1"], "--min-snr-gamma"),
        (["--attention", "10"], "--attention 10"),
        (["--seed", "4294967296"], "--seed"),
        (["prior", "--prior-heads", "3"], "divisible by --prior-heads 3"),
        (["prior", "--prior-heads", "3", "--prior-width", "33"], "--prior-width 33 must be even"),
        (["--accumulate", "3"], "--batch-size 32 of diffusion must be divisible by the 1 replicas times the 3 parts"),
        (["--replicas", "99"], "--replicas"),
        (["--zero-snr", "--prediction", "eps"], "--zero-snr"),
        (["--learning-rate", "nan"], "--learning-rate must be more than 0 and at most 1, not nan"),
        (["--autoencoder", "vae", "--kl-weight", "inf"], "--kl-weight must be 0 or more"),
        (["--image-size", "100000"], "--image-size must be 8 or more and at most 1024, not 100000"),
        (["--replicas", "-1"], "--replicas must be 1 or more"),
        (["--latent-channels", "8", "--autoencoder", "none"], "--latent-channels has no effect"),
        (["--views", "2", "--autoencoder", "none"], "--views has no effect"),
        (["--tell-augmented", "--views", "1"], "--tell-augmented has no effect without latents of several --views"),
        (["--tell-augmented", "--autoencoder", "none"], "--tell-augmented has no effect"),
        (["--self-test", "prior"], "leave `prior` out"),
    ],
)
def test_train_refuses_in_one_sentence_that_names_the_flag(argv, named, tmp_path, phantoms, capsys):
    argv = [flat_folder(tmp_path / "flat") if word == "flat" else word for word in argv]
    data = [] if "--data" in argv else ["--data", phantoms]
    run = tmp_path / "run"
    assert named in refusal(train.main, [*argv, *data, "--run", str(run)], capsys)
    assert not run.exists()


def test_a_finished_run_refuses_other_people(tmp_path, phantoms, capsys):
    run, flat = tmp_path / "run", flat_folder(tmp_path / "flat")
    argv = ["--run", str(run), "--image-size", "32", "--autoencoder", "none"]
    settings = resolved(*argv, "--data", phantoms)
    run.mkdir()
    manifest = dataset.open_source(phantoms).manifest()
    records.write(run, "diffusion", settings, manifest, finished=True, epochs=settings["diffusion"]["epochs"])
    assert train.main([*argv, "--data", phantoms]) == 0
    for more in ([], ["--dry-run"]):
        assert "other people" in refusal(train.main, [*argv, "--data", flat, *more], capsys)


def test_a_stage_is_not_gone_on_with_under_another_table_of_people(tmp_path):
    manifest, age = small_records.manifest(), {"age": {"kind": "number", "mean": 70.0, "std": 10.0}}
    for columns in (age, age):  # begun, and gone on with
        records.write(tmp_path, "diffusion", schema.defaults(), manifest, columns=columns)
    stored = records.read(tmp_path, "diffusion")
    assert stored["data"] == {**manifest, "columns": age} and stored["stage"] == "diffusion"
    with pytest.raises(runs.RunError, match="another table of people"):
        records.write(tmp_path, "diffusion", schema.defaults(), manifest, columns={"age": {**age["age"], "mean": 60.0}})
    assert records.read(tmp_path, "diffusion") == stored


def test_what_was_found_when_training_began_stays_so(tmp_path):
    argv = ["--run", str(tmp_path), "--preset", "64-f8", "--autoencoder", "vae"]
    found = {"kl_cycle_steps": 70, "crop_box": [0, 0, 48, 48]}
    settings = schema.merged(resolved(*argv), {"autoencoder": found})
    small_records.write_record(tmp_path, "autoencoder", settings)
    resumed = resolved(*argv, "--epochs", 99)
    assert resumed["autoencoder"]["kl_cycle_steps"] == 70 and resumed["autoencoder"]["crop_box"] == (0, 0, 48, 48)


def test_a_stage_names_the_command_that_makes_what_it_misses(tmp_path, phantoms, capsys):
    argv = ["diffusion", "--data", phantoms, "--run", str(tmp_path / "run"), "--image-size", "32"]
    assert "python train.py autoencoder" in refusal(train.main, argv, capsys)


def test_a_run_refuses_to_become_another(tmp_path, phantoms, capsys):
    run = tmp_path / "run"
    settings = resolved("--run", run, "--image-size", 32, "--data", phantoms)
    run.mkdir()
    small_records.write_record(run, "autoencoder", settings)
    stored = (run / "autoencoder.json").read_text()
    said = refusal(train.main, ["--run", str(run), "--num-codes", "7"], capsys)
    assert "--num-codes 1024, not 7" in said and "--run" in said
    assert (run / "autoencoder.json").read_text() == stored


def test_a_finished_first_stage_is_not_trained_further_under_its_diffusion_model(tmp_path, phantoms, capsys):
    run = tmp_path / "run"
    argv = ["--run", str(run), "--image-size", "32", "--data", phantoms]
    settings = resolved(*argv)
    run.mkdir()
    epochs = settings["autoencoder"]["epochs"]
    small_records.write_record(run, "autoencoder", settings, finished=True, epochs=epochs)
    more = ["autoencoder", *argv, "--epochs", "99"]
    resolved(*more)  # nothing stands on it yet
    for stage in ("diffusion", "prior"):
        small_records.write_record(run, stage, settings)
        assert f"would change the latents under its {stage}" in refusal(train.main, more, capsys)
        (run / f"{stage}.json").unlink()
    resolved("diffusion", *argv, "--epochs", 99)


def test_latents_are_those_of_the_first_stage_as_it_is(tmp_path):
    small_records.write_record(tmp_path, "autoencoder", epochs=5, finished=True)
    (tmp_path / "latents").mkdir()
    for split in ("train", "validate"):
        (tmp_path / "latents" / f"{split}.npz").touch()
    for epochs, labels, finished in ((5, None, True), (4, None, False), (5, "other.csv", False)):
        small_records.write_record(tmp_path, "latents", {"labels": labels}, epochs=epochs, finished=True)
        assert records.is_finished(tmp_path, "latents", {"labels": None}) == finished
    small_records.write_record(tmp_path, "latents", epochs=5, finished=True)
    assert records.is_finished(tmp_path, "latents", {"labels": None})
    (tmp_path / "latents" / "train.npz").unlink()  # as one does with a damaged file
    assert not records.is_finished(tmp_path, "latents", {"labels": None})


def test_settings_come_from_preset_then_run_then_flags(tmp_path):
    settings = functools.partial(resolved, "--run", tmp_path / "run")
    preset = settings("--preset", "256-f8")
    assert preset["image_size"] == 256 and preset["autoencoder"]["epochs"] == 14
    assert settings("--preset", "256-f8", "--num-codes", "64")["autoencoder"]["num_codes"] == 64
    only = settings("autoencoder", "--preset", "256-f8", "--epochs", "3")
    assert only["autoencoder"]["epochs"] == 3 and only["diffusion"]["epochs"] == preset["diffusion"]["epochs"]
    (tmp_path / "run").mkdir()
    small_records.write_record(tmp_path / "run", "autoencoder", only)
    assert settings("latents")["autoencoder"]["epochs"] == 3
    assert settings("latents", "--views", "3")["latents"]["views"] == 3


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_every_preset_makes_models_that_fit_each_other(preset, tmp_path):
    (tmp_path / "autoencoder.keras").touch()  # of the run over whose encoder a preset may sharpen the decoder
    start = ("--init-from", tmp_path) if preset.endswith("-sharp") else ()
    settings = resolved("--run", tmp_path / "run", "--preset", preset, *start)
    size, factor = settings["image_size"], settings["autoencoder"]["downsampling"]
    if settings["first_stage"] == "none":
        settings = schema.merged(settings, {"diffusion": {"width": 32, "groups": 8, "multipliers": [1]}})  # made sooner
        assert stages.make_diffusion(settings, 0).data_shape == (size, size, 1)
        return
    if preset[0].isdigit():
        assert preset == f"{size}-f{factor}"
    narrow = {"autoencoder": {"width": 32}, "diffusion": {"width": 32, "head_size": 32}}  # made sooner
    settings = schema.merged(settings, narrow)
    assert settings["autoencoder"]["crop"] == (preset not in SYSTEMS)
    if settings["autoencoder"]["crop"]:
        box = [0, 0, size, size * 3 // 4]  # 32 pixels are an eighth of 256, as a box that is found
        settings = schema.merged(settings, {"autoencoder": {"crop_box": box}})
    schema.check_levels(settings)
    assert stages.make_diffusion(settings, 0).data_shape == stages.make_autoencoder(settings, 0).latent_shape


MACHINES = ((0, 0), (1, 15.0), (1, 40.0), (8, 80.0))
CPU, T4, A100, EIGHT = ({"gpus": gpus, "memory": memory, "fast": True} for gpus, memory in MACHINES)


@pytest.mark.parametrize(
    "side, slices, machine, name",
    [
        (64, 1000, CPU, "64-f4"),
        (95, 1000, A100, "64-f4"),
        (96, 1000, CPU, "128-f8"),
        (96, 20_000, CPU, "large-128"),
        (256, 3840, CPU, "oasis-256"),
        (256, 20_000, CPU, "large-256"),
        (256, 20_000, T4, "t4-256"),
        (512, 3840, A100, "card-256"),
        (256, 3840, EIGHT, "cards-256"),
    ],
)
def test_the_preset_is_chosen_by_slices_and_machine(side, slices, machine, name):
    found, why = presets.choose(side, slices, machine)
    assert found == name and f"slices of {side} pixels" in why
    batches = [presets.of(found)[stage]["batch_size"] for stage in ("autoencoder", "diffusion")]
    assert all(rows % max(1, machine["gpus"]) == 0 for rows in batches)
    assert ("not yet run" in why) == (machine["gpus"] > 0 and side >= 192)


@pytest.mark.parametrize(
    "minutes, fast, name, more",
    [
        (45, True, "large-256", None),
        (44, True, "large-128", 45),
        (10, True, "large-64", 45),
        (60, False, "large-128", 135),
        (59, False, "large-64", 135),
        (None, False, "large-256", None),
    ],
)
def test_too_few_minutes_make_slices_smaller(minutes, fast, name, more):
    """Twenty minutes of 256 pixels on one core with AVX2 drew blobs."""
    found, why = presets.choose(256, 20_000, {**CPU, "fast": fast}, minutes)
    assert found == name and (f"{minutes} minutes are too few on this processor (give {more})" in why) == bool(more)
    assert presets.choose(256, 3840, {**CPU, "fast": fast}, 1)[0] == "64-f4"
    assert presets.choose(64, 20_000, CPU, 1)[0] == "large-64" and presets.choose(256, 100, T4, 1)[0] == "t4-256"


def test_without_a_preset_the_archive_decides_and_it_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    dataset.write_phantoms(tmp_path / "large.zip", people=3, image_size=128)
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data", "large.zip", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "no --preset given: 128-f8, for slices of 128 pixels (3 people, labels AD and NC)" in said
    assert '"image_size": 128' in said
    assert train.main(["--data", "large.zip", "--image-size", "64", "--kl-weight", "1", "--dry-run"]) == 2
    assert "--kl-weight has no effect" in capsys.readouterr().err  # of the preset that was chosen
    assert train.main(["--data", "large.zip", "--preset", "64-f8", "--dry-run"]) == 0
    assert "no --preset given" not in capsys.readouterr().out


def test_the_preset_that_was_chosen_says_whether_heads_are_moved_to_the_middle(tmp_path, monkeypatch, phantoms):
    """The archive is open before its preset is known."""
    monkeypatch.setattr(presets, "choose", lambda *_: ("large-256", "a reason"))
    seen = []
    monkeypatch.setattr(train, "announce", lambda stage, run, settings, source, *_: seen.append(source) or {})
    argv = ["--data", str(phantoms), "--run", str(tmp_path / "run"), "--dry-run", "--image-size", "64"]
    for center, more in ((True, []), (False, ["--no-center"])):
        assert train.main([*argv, *more]) == 0
        assert seen.pop().center is center


def test_what_is_next_is_said_and_after_the_last_stage_which_run_would_be_sharper():
    assert train.what_next("autoencoder", "mine", "oasis-256") == "next: python train.py latents --run mine"
    assert train.what_next("latents", "mine", "oasis-256") == "next: python train.py diffusion --run mine"
    assert train.what_next("prior", "mine", "64-f4") == "next: python predict.py --prior transformer --run mine"
    for preset in (None, "64-f4", "oasis-256-sharp"):
        assert train.what_next("diffusion", "mine", preset) == "next: python predict.py --run mine"
    first, second = train.what_next("diffusion", "mine", "oasis-256").split("\n")
    assert first == "next: python predict.py --run mine"
    words = second.removeprefix("sharper: python train.py ").removesuffix(", and the flags that say the data")
    flags = train.parser().parse_args(words.split())
    assert (flags.preset, flags.init_from, flags.run) == ("oasis-256-sharp", "mine", "mine-sharp")


def test_a_run_that_is_gone_on_with_keeps_its_preset(tmp_path, capsys, phantoms):
    settings = resolved("--run", tmp_path / "run", "--preset", "256-f8")
    (tmp_path / "run").mkdir()
    small_records.write_record(tmp_path / "run", "autoencoder", settings)
    flags = train.parser().parse_args(["--run", str(tmp_path / "run"), "--data", str(phantoms)])
    assert train.chosen_preset(flags) is None and flags.preset is None


def test_the_memory_of_gpus_is_asked_for(monkeypatch):
    monkeypatch.setattr(distribution.tf.config, "list_physical_devices", lambda kind: ["a", "b"])
    monkeypatch.setattr(distribution, "_fast_policy", lambda: "mixed_float16")
    said = types.SimpleNamespace(stdout="40960\n24576\n")
    monkeypatch.setattr(distribution.subprocess, "run", lambda *_, **__: said)
    assert distribution.machine() == {"gpus": 2, "memory": 24.0, "fast": True}
    said.stdout = "[N/A]\n"
    assert distribution.machine()["memory"] == 16.0


def test_what_to_start_from_must_be_there(tmp_path):
    with pytest.raises(runs.RunError, match="--init-from nowhere: no run of that name has a trained autoencoder stage"):
        resolved("--run", tmp_path, "--init-from", "nowhere")
    (tmp_path / "features_0.keras").touch()  # is no stage
    (tmp_path / "diffusion.keras").touch()
    with pytest.raises(runs.RunError, match="has a trained autoencoder stage"):
        resolved("--run", tmp_path / "other", "--init-from", tmp_path)
    assert resolved("diffusion", "--run", tmp_path / "other", "--init-from", tmp_path)["init_from"] == str(tmp_path)
    with pytest.raises(runs.RunError, match="name its run with --init-from"):
        resolved("--run", tmp_path, "--preset", "oasis-256-sharp")
    with pytest.raises(runs.RunError, match="--freeze-encoder has no effect without --init-from"):
        resolved("--run", tmp_path, "--freeze-encoder")


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_another_network_to_start_from_is_refused_before_anything_is_trained(tmp_path, phantoms, capsys, stage):
    """Also that of the second stage, whose turn would come hours later."""
    old = Path(__file__).parent / "old_runs" / "vqvae"
    (tmp_path / "other").mkdir()
    shutil.copy(old / f"{stage}.keras", tmp_path / "other")
    if stage == "diffusion":  # and a first stage that fits
        argv = ["--dry-run", "--data", phantoms, "--run", str(tmp_path / "run"), "--preset", "64-f4"]
        settings = stages.with_found(resolved(*argv), dataset.open_source(phantoms))
        stages.make_autoencoder(settings, 2).save(tmp_path / "other" / "autoencoder.keras")
    argv = ["--data", phantoms, "--run", tmp_path / "run", "--preset", "64-f4", "--init-from", tmp_path / "other"]
    assert train.main(["--dry-run", *map(str, argv)]) == 2
    assert f"{stage}.keras is another network than the flags describe" in capsys.readouterr().err


def test_the_crop_box_of_a_run_is_found_once_and_kept(tmp_path, phantoms):
    argv = ["--run", tmp_path, "--data", phantoms, "--preset", "64-f4"]
    settings, source = resolved(*argv), dataset.open_source(phantoms)
    found = stages.with_found(settings, source)["autoencoder"]
    assert settings["autoencoder"]["crop_box"] is None  # of which `found` is a copy
    height, width = found["crop_box"][2:]
    assert height % 8 == width % 8 == 0 and width < height < 64  # latents of 4 pixels, halved once
    steps = -(-len(source.select("train")) // settings["autoencoder"]["batch_size"])
    assert found["kl_cycle_steps"] == settings["autoencoder"]["epochs"] * steps // 2
    kept = schema.merged(settings, {"autoencoder": {"crop_box": [1, 2, 32, 24], "kl_cycle_steps": 7}})
    small_records.write_record(tmp_path, "autoencoder", kept)
    again = resolved(*argv)
    assert stages.with_found(again, source) == again == kept and schema.latent_shape(again) == (8, 6, 8)
    with pytest.raises(runs.RunError, match="--multipliers with 3 levels do not fit 8x6"):
        schema.check_levels(schema.merged(again, {"diffusion": {"multipliers": [1, 2, 2]}}))
    whole = schema.merged(again, {"autoencoder": {"crop": False, "crop_box": None}})
    assert stages.with_found(whole, source)["autoencoder"]["crop_box"] is None


def test_latents_are_measured_over_so_many_slices_at_most_that_training_sees(tmp_path, phantoms, monkeypatch):
    settings = resolved("--run", tmp_path, "--data", phantoms, "--preset", "64-f4")
    source = dataset.open_source(phantoms)
    assert len(source.select("train")) > 5
    monkeypatch.setattr(stages, "MEASURED", 5)
    rows = [len(batch["z"]) for batch in stages.first_stage_batches(settings, source, "train", training=False)]
    assert sum(rows) == 5


def test_a_dry_run_draws_no_phantoms(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(phantom, "STAND_IN", tmp_path / "phantom.zip")
    assert train.main(["--dry-run", "--run", str(tmp_path / "run")]) == 0
    assert list(tmp_path.iterdir()) == []
    assert "would draw 96 phantom brains" in capsys.readouterr().out


def test_a_dry_run_says_what_minutes_will_plan(tmp_path, phantoms, capsys):
    argv = ["--dry-run", "--data", phantoms, "--run", str(tmp_path / "run"), "--preset", "64-f4", "--minutes", "5"]
    assert train.main(argv) == 0
    stages = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines()[-3:])
    for stage, planned in {"autoencoder": ("epochs", "steps_per_epoch"), "latents": ("views",)}.items():
        assert [json.loads(stages[stage])[name] for name in planned] == ["as --minutes plans"] * len(planned)


def test_dry_run_writes_no_run(tmp_path, phantoms, capsys):
    run = tmp_path / "run"
    argv = ["--dry-run", "--data", phantoms, "--run", str(run), "--image-size", "32", "--attention", "4"]
    assert train.main(argv) == 0
    said = capsys.readouterr().out
    assert "32x32" in said and "train/validate/test" in said and not run.exists()
    assert len(said.splitlines()) < 25, "what was found is not to scroll away"
    *_, latents, diffusion = (line.split(": ", 1) for line in said.splitlines())
    assert [latents[0], diffusion[0]] == ["latents", "diffusion"] and json.loads(diffusion[1])["attention"] == [4]


@pytest.mark.parametrize("dry_run", [["--dry-run"], []])
def test_a_stage_without_its_predecessor_is_refused_also_in_a_dry_run(tmp_path, phantoms, capsys, dry_run):
    argv = ["--data", phantoms, "--run", str(tmp_path / "run"), "--preset", "64-f4", *dry_run]
    for stage in ("latents", "diffusion", "prior"):
        assert "train.py autoencoder --run run` first, with the same --data" in refusal(
            train.main, [stage, *argv], capsys
        )


def test_a_stage_is_refused_before_those_that_it_is_made_of_are_done(tmp_path):
    settings = schema.defaults()
    records.refuse_unready(tmp_path, "autoencoder", settings)
    records.refuse_unready(tmp_path, "diffusion", settings | {"first_stage": "none"})
    with pytest.raises(runs.RunError, match="train.py autoencoder"):
        records.refuse_unready(tmp_path, "latents", settings)
    (tmp_path / "autoencoder.keras").touch()
    small_records.write_record(tmp_path, "autoencoder", finished=False)
    with pytest.raises(runs.RunError, match="still in training"):
        records.refuse_unready(tmp_path, "latents", settings)
    small_records.write_record(tmp_path, "autoencoder", finished=True)
    records.refuse_unready(tmp_path, "latents", settings)
    (tmp_path / "latents").mkdir()
    for split in ("train", "validate"):
        with pytest.raises(runs.RunError, match=f"{split}.npz is not there yet: run `python train.py latents"):
            records.refuse_unready(tmp_path, "diffusion", settings)
        (tmp_path / "latents" / f"{split}.npz").touch()
    records.refuse_unready(tmp_path, "diffusion", settings)


def test_names_without_people_need_a_word_of_the_user(tmp_path, capsys):
    for i in range(12):
        for label in ("Mild", "NonDemented"):
            path = tmp_path / "data" / "train" / label / f"{label.lower()}{i}.png"
            figures.save_png(path, np.full((16, 16), 99, np.uint8))
    argv = ["--dry-run", "--data", str(tmp_path / "data"), "--run", str(tmp_path / "run"), *TINY]
    assert "--person each" in refusal(train.main, argv, capsys)
    assert train.main([*argv, "--person", "each"]) == 0
    said = capsys.readouterr().out
    assert "every slice counts as a person" in said and '"person": "each"' in said


@pytest.mark.slow
def test_select_kid_draws_and_compares_in_every_epoch_of_a_short_training(tmp_path, phantoms, monkeypatch):
    monkeypatch.setattr(stages.features, "of_run", functools.partial(stages.features.of_run, steps=10))
    monkeypatch.setattr(stages, "KID_SAMPLES", 32)
    short = "--select kid --epochs 2 --steps-per-epoch 2 --batch-size 4".split()
    assert train.main(["--data", phantoms, "--run", str(tmp_path / "run"), *TINY, *short]) == 0
    history = runs.read_history(tmp_path / "run" / "diffusion.csv")
    assert len(history) == 2 and all(np.isfinite(row["val_kid"]) for row in history)


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "learns"), [("3e-3", True), ("1e-9", False)])
def test_self_test_tries_the_first_stage_too(rate, learns, tmp_path, phantoms, monkeypatch, capsys):
    monkeypatch.setattr(stages, "OVERFIT_STEPS", 200)
    tiny = "--image-size 32 --autoencoder-width 32 --width 32 --multipliers 1 --blocks 1 --tell-augmented --attention"
    tiny = tiny.split()
    train.main(["--self-test", "--data", phantoms, "--run", str(tmp_path / "run"), *tiny, "--learning-rate", rate])
    said = capsys.readouterr().out
    assert ("autoencoder overfits 8 slices" in said) == learns
    assert ("autoencoder does NOT overfit 8 slices" in said) != learns
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "status"), [("1e-2", 0), ("1e-9", 2)])
def test_self_test_tells_what_learns_from_what_does_not(rate, status, tmp_path, phantoms, monkeypatch, capsys):
    monkeypatch.setattr(stages, "OVERFIT_STEPS", 80)
    argv = ["--self-test", "--data", phantoms, "--run", str(tmp_path / "run"), *TINY, "--learning-rate", rate]
    assert train.main(argv) == status
    said = capsys.readouterr()
    assert ("diffusion overfits 8 slices" in said.out) == (status == 0)
    assert ("self-test failed" in said.err) == (status == 2)
    assert not (tmp_path / "run").exists()


def test_latents_with_other_labels_or_of_another_shape_are_encoded_again(tmp_path, phantoms, monkeypatch):
    source = dataset.open_source(phantoms)
    strategy, encoded = distribution.make_strategy(None), []
    first = {"crop_box": (0, 0, 16, 8), "latent_channels": 3, "downsampling": 4}
    settings = {"image_size": 16, "first_stage": "vae", "autoencoder": first}
    monkeypatch.setattr(encoding, "encode_latents", lambda *_: encoded.append(1))
    (tmp_path / "latents").mkdir()
    for stage in ("autoencoder", "latents"):
        small_records.write_record(tmp_path, stage, finished=True, epochs=5)

    def write(**more):
        for split in ("train", "validate"):
            own = {name: getattr(source, name)[source.select(split)] for name in ("z", "label", "case")}
            own["latents"] = np.zeros((1, len(own["z"]), 4, 2, 3), "float16")
            np.savez(tmp_path / "latents" / f"{split}.npz", **own | more)

    for more, needed, times in (
        ({}, (), 0),
        ({}, ("mask",), 1),
        ({"mask": 0}, ("mask",), 0),
        ({"label": 0}, (), 1),
        ({"z": 0}, (), 1),
        ({"latents": np.zeros((1, 64, 4, 4, 3))}, (), 1),
    ):
        write(**more)
        encoded.clear()
        encoding.renew_latents(tmp_path, settings, source, {}, strategy, needed)
        assert len(encoded) == times, (more, needed)
    write()
    small_records.write_record(tmp_path, "autoencoder", finished=True, epochs=6)
    encoding.renew_latents(tmp_path, settings, source, {}, strategy, ())
    assert len(encoded) == 2  # once above, and once because the first stage has been trained further


# ---- exit statuses, and what a run leaves ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_trained_and_then_found_finished(tmp_path, phantoms, capsys, monkeypatch):
    """Status 0; the archive is fingerprinted once per command, however many stages there are."""
    asked, manifest = [], dataset.Source.manifest
    monkeypatch.setattr(dataset.Source, "manifest", lambda source: (asked.append(1), manifest(source))[1])
    run = tmp_path / "run"
    argv = ["--data", phantoms, "--run", str(run), *TINY, *SHORT]
    assert train.main(argv) == 0 and len(asked) == 1
    stored = records.read(run, "diffusion")
    assert stored["finished"] and stored["epochs"] == 1 and stored["data"]["source"] == phantoms
    assert stored["settings"] == resolved(*argv)  # and nothing else is left undone
    names = "diffusion.csv diffusion.json diffusion.keras diffusion.last.weights.h5 diffusion.png logs pictures".split()
    assert sorted(path.name for path in run.iterdir()) == [".lock", *names]
    assert (run / "pictures" / "diffusion_epoch_001.png").stat().st_size > 0

    capsys.readouterr()
    assert train.main(argv) == 0
    assert "finished before" in capsys.readouterr().out


def test_an_interrupted_training_has_a_status_of_its_own(tmp_path, phantoms, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "fit", interrupt)
    assert train.main(["--data", phantoms, "--run", str(tmp_path / "run"), *TINY, *SHORT]) == 130
    assert "run the same command to go on" in capsys.readouterr().err
    assert runs.load_json(tmp_path / "run" / "diffusion.json")["finished"] is False


def test_a_damaged_slice_is_named_and_is_a_users_mistake(tmp_path, capsys):
    flat = flat_folder(tmp_path / "flat")
    (tmp_path / "flat" / "1_0.png").write_bytes((tmp_path / "flat" / "1_0.png").read_bytes()[:-30])
    argv = ["--data", flat, "--run", str(tmp_path / "run"), *TINY, *SHORT]
    assert "1_0.png" in refusal(train.main, argv, capsys)
