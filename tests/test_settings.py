"""ldm/training/settings.py: one declaration per option, and everything that follows from it."""

import argparse
import inspect
import json
from pathlib import Path

import keras
import pytest
import small_records

import modules
import stages
import train
from ldm.diffusion import schedules
from ldm.training import presets, records, runs
from ldm.training import settings as schema

OLD = Path(__file__).parent / "old_runs"


def option(group, name):
    (found,) = (option for where, key, option in schema.places() if (where, key) == (group, name))
    return found


# ---- values ----------------------------------------------------------------------------------------------------------


def test_the_defaults_and_the_presets_are_what_may_be():
    for settings in (schema.defaults(), *map(presets.of, presets.PRESETS)):
        if settings["autoencoder"]["freeze_encoder"]:  # which needs a trained encoder
            settings = schema.merged(settings, {"init_from": "some"})
        schema.check_values(settings)
        schema.check_together(settings)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learning_rate": float("nan")}, "--learning-rate must be more than 0 and at most 1, not nan"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"learning_rate": 1.5}, "--learning-rate"),
        ({"kl_weight": float("inf")}, "--kl-weight must be 0 or more and at most 1000, not inf"),
        ({"image_size": 100_000}, "--image-size must be 8 or more and at most 1024, not 100000"),
        ({"image_size": 64.0}, "--image-size must be a whole number, not 64.0"),
        ({"epochs": 0}, "--epochs"),
        ({"epochs": True}, "--epochs must be a whole number, not True"),
        ({"multipliers": (1, 0)}, "--multipliers must be 1 or more and at most 64 each, not 0"),
        ({"dropout": 1.0}, "--dropout must be 0 or more and less than 1, not 1.0"),
        (
            {"schedule": "quadratic"},
            "--schedule must be one of linear, scaled_linear, cosine, sigmoid, flow, not quadratic",
        ),
        ({"gates": 1}, "--gates must be true or false, not 1"),
        ({"autoencoder_width": 0}, "--autoencoder-width"),
        ({"prior_heads": 65}, "--prior-heads"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_a_sentence_that_names_the_flag(given, said):
    with pytest.raises(runs.RunError, match=f"^{said}"):
        schema.with_flags(presets.of("phantom"), given, runs.STAGES)


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [("[0, 1)", (0, 0.5), (-1e-9, 1, float("nan"))), ("(0, 8]", (1e-9, 8), (0, 8.1, float("inf"), float("nan")))],
)
def test_bounds_are_intervals(bounds, inside, outside):
    assert all(schema.within(value, bounds) for value in inside)
    assert not any(schema.within(value, bounds) for value in outside)


def test_every_number_has_bounds_or_choices():
    numbers = [option for option in schema.OPTIONS if option.kind in (int, float)]
    assert len(numbers) > 30 and all(option.bounds or option.choices for option in numbers)


def test_nothing_stands_where_only_a_value_can():
    with pytest.raises(runs.RunError, match="^--epochs"):
        schema.check_values(schema.merged(schema.defaults(), {"prior": {"epochs": None}}))
    with pytest.raises(runs.RunError, match="^diffusion.drop_conditions"):  # which has no flag
        schema.check_values(schema.merged(schema.defaults(), {"diffusion": {"drop_conditions": 0.5}}))


def test_a_preset_that_sets_what_is_no_setting_is_an_error(monkeypatch):
    for values, named in (({"diffusion": {"depth": 3}}, "diffusion.depth"), ({"imagesize": 3}, "imagesize")):
        monkeypatch.setitem(presets.PRESETS, "wrong", values)
        with pytest.raises(KeyError, match=f"wrong sets {named}"):
            presets.of("wrong")


# ---- read-only -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        lambda s: s.update(seed=1),
        lambda s: s.__setitem__("seed", 1),
        lambda s: s["diffusion"].__setitem__("epochs", 1),
        lambda s: s["diffusion"].pop("epochs"),
        lambda s: s["autoencoder"].setdefault("new", 1),
        lambda s: s.__delitem__("seed"),
        lambda s: s.clear(),
        lambda s: s.popitem(),
        lambda s: s.__ior__({"seed": 1}),
    ],
)
def test_settings_are_read_only(write):
    settings = schema.defaults()
    with pytest.raises(TypeError, match="read-only"):
        write(settings)
    assert settings == schema.defaults() and isinstance(settings["diffusion"]["multipliers"], tuple)


def test_settings_go_through_json_and_come_back():
    settings = presets.of("256-f8")
    assert schema.frozen(json.loads(json.dumps(settings))) == settings


def test_merging_leaves_what_it_merges_as_it_was():
    base = presets.of("phantom")
    found = schema.merged(base, {"seed": 5, "diffusion": {"epochs": 3, "attention": []}})
    assert found["seed"] == 5 and found["diffusion"]["epochs"] == 3 and found["diffusion"]["attention"] == ()
    assert found["diffusion"]["width"] == base["diffusion"]["width"] and base == presets.of("phantom")
    with pytest.raises(TypeError):
        found["diffusion"]["epochs"] = 4


# ---- flags -----------------------------------------------------------------------------------------------------------


def test_train_py_takes_every_flag_and_no_other():
    known = {word for action in train.parser()._actions for word in action.option_strings if word[:5] != "--no-"}
    declared = {option.spelt for option in schema.OPTIONS if option.word}
    assert known - {"-h", "--help"} == declared
    assert all(value is None for key, value in vars(train.parser().parse_args([])).items() if key != "stage")


def test_a_flag_of_several_stages_sets_those_that_run():
    before = presets.of("phantom")
    after = schema.with_flags(before, {"epochs": 3, "steps_per_epoch": 0}, ("diffusion",))
    assert after["diffusion"]["epochs"] == 3 and after["diffusion"]["steps_per_epoch"] is None
    assert after["autoencoder"] == before["autoencoder"] and after["prior"] == before["prior"]


def test_a_grid_of_codes_has_as_many_channels_as_levels():
    after = schema.with_flags(presets.of("phantom"), {"quantizer": "fsq", "levels": [5, 5, 5]}, runs.STAGES)
    assert after["autoencoder"]["latent_channels"] == 3 and schema.latent_shape(after) == (16, 16, 3)


def test_what_has_no_effect_can_be_recorded_but_not_given():
    vae = {"first_stage": "vae"}
    settings = schema.merged(presets.of("phantom"), vae | {"autoencoder": {"num_codes": 64}})
    assert schema.with_flags(settings, {}, runs.STAGES)["autoencoder"]["num_codes"] == 64
    schema.with_flags(settings, {"cosine": False}, runs.STAGES)
    for given in ({"num_codes": 64}, {"cosine": True}, {"kl_cycles": 0, "autoencoder": "vqvae"}):
        with pytest.raises(runs.RunError, match="has no effect without"):
            schema.with_flags(settings, given, runs.STAGES)


def test_the_table_of_flags_has_a_row_for_each():
    lines = schema.flag_table().splitlines()
    rows = [line for line in lines if line.startswith("| `--")]
    assert len(rows) == len({row.split("`")[1] for row in rows}) == sum(1 for o in schema.OPTIONS if o.word)
    assert all(row.count("|") == 5 for row in rows)
    assert "| `--batch-size` | 16, 32, 8 | 1 or more and at most 65536 | slices a step, over all replicas |" in rows


# ---- the models' arguments -------------------------------------------------------------------------------------------


def test_choices_are_those_of_the_networks():
    assert option("diffusion", "schedule").choices == tuple(schedules.SCHEDULES)
    assert option("diffusion", "prediction").choices == schedules.PREDICTIONS
    assert option("diffusion", "loss").choices == tuple(modules.DiffusionModel.penalties)


def test_each_option_feeds_an_argument_that_its_model_has():
    for model in ("UNet", "DiffusionModel"):
        arguments = schema.arguments(schema.defaults(), model)
        assert arguments.keys() <= inspect.signature(getattr(modules, model)).parameters.keys() and len(arguments) > 5
    fed = {word for option in schema.OPTIONS for word in option.feeds.split()}
    assert fed == {"VQVAE", "VAE", "UNet", "DiffusionModel", "CodePrior"}


def test_models_are_what_the_settings_say():
    over = {"first_stage": "vqvae", "image_size": 32, "autoencoder": {"width": 16, "patch": 4, "cosine": True}}
    over["autoencoder"] |= {"num_codes": 7, "codes_per_latent": 2, "condition_on_z": False, "crop_box": [0, 4, 32, 24]}
    over["diffusion"] = {"multipliers": [1, 2], "width": 8, "head_size": 8, "attention": [8], "gates": True}
    over["diffusion"] |= {"min_snr_gamma": 4.0, "prediction": "x_0"}
    settings = schema.merged(schema.defaults(), over)
    config = stages.make_autoencoder(settings, 2).get_config()
    for name in ("width", "patch", "cosine", "num_codes", "codes_per_latent", "condition_on_z"):
        assert config[name] == over["autoencoder"][name], name
    assert list(config["crop_box"]) == [0, 4, 32, 24] and config["num_labels"] == 0 and config["latent_channels"] == 8
    model = stages.make_diffusion(settings, 2, (0, 3))
    assert model.data_shape == (8, 6, 8)
    config, unet = model.get_config(), model.unet.get_config()
    assert config["min_snr_gamma"] == 4.0 and config["prediction"] == "x_0" and not config["clip_x_0"]
    assert (
        unet["gates"] and unet["width"] == 8 and list(unet["attention"]) == [8] and list(unet["covariates"]) == [0, 3]
    )


def test_attention_is_said_of_the_whole_picture():
    box = {"image_size": 64, "autoencoder": {"crop_box": [8, 0, 48, 64]}, "diffusion": {"attention": [16, 8]}}
    assert schema.attention_rows(schema.merged(schema.defaults(), box)) == [12, 6]
    assert schema.attention_rows(schema.merged(schema.defaults(), box | {"first_stage": "none"})) == [16, 8]


def test_a_new_option_of_the_unet_takes_two_places(monkeypatch):
    """A line in the schema and the network that obeys it: flag, default, bounds, record and argument follow."""

    class Halting(modules.UNet):
        def __init__(self, *shape, halt=1.0, **options):  # the network
            super().__init__(*shape, **options)
            self.halt = halt

    line = schema.Option("diffusion", "halt", 1.0, float, "when to stop", bounds="(0, 2]", feeds="UNet")  # the schema
    monkeypatch.setattr(schema, "OPTIONS", (*schema.OPTIONS, line))
    monkeypatch.setattr(modules, "UNet", Halting)

    def settings(*words):
        return train.resolve(train.parser().parse_args(["--run", "nowhere/of", "--image-size", "32", *words]))[2]

    assert settings()["diffusion"]["halt"] == 1.0 and "| `--halt` | 1.0 | more than 0" in schema.flag_table()
    with pytest.raises(runs.RunError, match="--halt must be more than 0 and at most 2"):
        settings("--halt", "nan")
    small = ("--width", "8", "--head-size", "8")
    assert stages.make_diffusion(settings("--halt", "0.5", *small), 0).unet.halt == 0.5
    assert {o.name for o in schema.identity(settings(), "diffusion")} >= {"halt"}
    keras.backend.clear_session()


# ---- going on with a run ---------------------------------------------------------------------------------------------


def test_what_may_change_when_a_run_goes_on():
    planned = {"init_from", "epochs", "kl_cycle_steps", "crop_box", "recompute", "accumulate", "patience"}
    planned |= {"validation_slices", "minutes", "planned"}
    assert {option.name for option in schema.OPTIONS if option.changes} == planned
    settings = schema.defaults()
    for stage in runs.STAGES:
        kept = {option.name for option in schema.identity(settings, stage)}
        assert kept & settings[stage].keys() == settings[stage].keys() - planned
        of_the_data = {"image_size", "person", "contrast", "missing", "axis", "center", "flip", "seed"}
        assert kept - settings[stage].keys() - {"labels"} == {"first_stage", *of_the_data}


def test_labels_count_where_a_stage_is_told_them():
    told = {"autoencoder": {"condition_on_label": True}}
    for settings, counting in (({}, {"diffusion", "prior"}), (told, {"autoencoder", "diffusion", "prior"})):
        settings = schema.merged(schema.defaults(), settings)
        found = {stage for stage in runs.STAGES if "labels" in {o.name for o in schema.identity(settings, stage)}}
        assert found == counting


@pytest.mark.parametrize(
    ("stage", "over", "named"),
    [
        ("autoencoder", {"first_stage": "vae"}, "--autoencoder vqvae, not vae"),
        ("autoencoder", {"autoencoder": {"width": 32}}, "--autoencoder-width 64, not 32"),
        ("diffusion", {"diffusion": {"attention": [4]}}, "--attention 16 8, not 4"),
        ("diffusion", {"seed": 4}, "--seed 0, not 4"),
        ("diffusion", {"diffusion": {"learning_rate": 0.1}}, "--learning-rate 0.001, not 0.1"),
        ("prior", {"prior": {"depth": 9}}, "--prior-depth 4, not 9"),
        ("latents", {"latents": {"views": 3}}, "--views 8, not 3"),
    ],
)
def test_a_run_is_not_gone_on_with_under_other_settings(stage, over, named, tmp_path):
    before, now = schema.defaults(), schema.merged(schema.defaults(), over)
    small_records.write_record(tmp_path, stage, before)
    records.refuse_change(tmp_path, stage, before)
    with pytest.raises(runs.RunError, match=f"its {stage} stage was begun with {named}: .* --run"):
        records.refuse_change(tmp_path, stage, now)
    changes = {"diffusion": {"epochs": 7, "recompute": True, "accumulate": 2, "patience": 3}, "data": "elsewhere.zip"}
    records.refuse_change(tmp_path, stage, schema.merged(before, changes))


@pytest.mark.parametrize("run", ["vqvae", "vae", "fsq", "pixels"])
def test_a_run_of_before_is_gone_on_with(run):
    folder = OLD / run
    flags = argparse.Namespace(**vars(train.parser().parse_args(["--run", str(folder), "--epochs", "1"])))
    flags.stage = "diffusion" if run == "pixels" else "autoencoder"
    _, _, settings = train.resolve(flags)
    stored = {path.stem: records.read(folder, path.stem)["settings"] for path in folder.glob("*.json")}
    own = {stage: values[stage] for stage, values in stored.items()}
    since = {  # options that there were not, at their defaults
        **{"person": None, "contrast": None, "init_from": None, "minutes": None},
        **{"missing": None, "validation_slices": 640, "center": False},
        "autoencoder": {
            "latent_noise": 0.0,
            "freeze_encoder": False,
            "augment": 1.0,
            "plain_end": 0.0,
            "texture_weight": 0.0,
            "histogram_weight": 0.0,
            "planned": False,
            "decay": "cosine",
        },
        "latents": {"planned": False},
        "diffusion": {"groups": 32, "planned": False, "decay": "cosine", "tell_augmented": False},
        "prior": {"planned": False, "decay": "cosine"},
    }
    assert settings == schema.merged(schema.merged(stored[flags.stage], since), own)  # the same keys, the same values


def test_each_stage_knows_best_what_it_was_made_with(tmp_path):
    """The record of a later stage has all settings, too, as they were when that began."""
    for stage, epochs, views in (("autoencoder", 5, 1), ("latents", 6, 2), ("diffusion", 7, 3)):
        group = {"epochs": epochs}
        stored = {"seed": epochs, "autoencoder": group, "latents": {"views": views}, "diffusion": group}
        small_records.write_record(tmp_path, stage, stored)
    settings = records.settings_of(tmp_path)
    assert [settings[stage]["epochs"] for stage in ("autoencoder", "diffusion", "prior")] == [5, 7, 20]
    assert settings["latents"]["views"] == 2 and settings["seed"] == 7


def test_what_another_version_wrote_down_besides_is_left_out(tmp_path):
    stored = {"seed": 3, "shelf": 1, "diffusion": {"epochs": 2, "shelf": 1}}
    small_records.write_record(tmp_path, "diffusion", stored)
    settings = records.settings_of(tmp_path)
    assert settings == schema.merged(schema.defaults(), {"seed": 3, "diffusion": {"epochs": 2}})
    assert records.settings_of(tmp_path / "nothing") is None
