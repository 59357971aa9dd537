"""Files of a run that are damaged, or another's: one sentence that names the file and the way out, nothing executed."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import small_records

import app
import command
import evaluate
import modules  # noqa: F401  (registers the classes that a .keras file names)
import predict
from ldm.data import latents
from ldm.data.archive import DataError
from ldm.training import records, runs

OLD = Path(__file__).parent / "old_runs"
RUN = OLD / "vqvae"


def half(data):
    return data[: len(data) // 2]


def holed(data):
    """A middle that no disk ever wrote."""
    return data[: len(data) // 3] + bytes(len(data) // 3) + data[2 * len(data) // 3 :]


DAMAGES = {"empty": lambda data: b"", "half": half, "text": lambda data: b"hello\n", "holed": holed}


def damaged(path, source, damage):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(DAMAGES[damage](source.read_bytes()))
    return path


def refusal(kind, path, call):
    """The one sentence with which `call` refuses a file."""
    with pytest.raises(kind) as found:
        call()
    said = str(found.value)
    assert said.startswith(f"{path} cannot be read (") and "\n" not in said and len(said) < len(str(path)) + 250
    return said


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["autoencoder.keras", "diffusion.keras", "prior.keras"])
def test_a_damaged_model_is_one_sentence(name, damage, tmp_path):
    path = damaged(tmp_path / name, RUN / name, damage)
    assert "put its copy back, or remove it" in refusal(runs.RunError, path, lambda: runs.load_model(path))


def test_the_model_of_another_stage_is_told_by_its_class(tmp_path):
    path = shutil.copy(RUN / "prior.keras", tmp_path / "diffusion.keras")
    assert "it holds a CodePrior" in refusal(runs.RunError, path, lambda: runs.load_model(path))


COMMANDS = {
    "predict": lambda run: predict.main(["--run", run]),
    "predict prior": lambda run: predict.main(["prior", "transformer", "--run", run]),
    "reconstruct": lambda run: predict.main(["reconstruct", "--run", run]),
    "evaluate": lambda run: evaluate.main(["--run", run]),
    "app": lambda run: app.main(["--run", run]),
}
USED = {"predict prior": ["autoencoder", "prior"], "reconstruct": ["autoencoder"]}


@pytest.mark.parametrize("command_line", COMMANDS)
def test_what_is_damaged_is_refused_before_tensorflow_is_imported(command_line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("TensorFlow is imported, which takes seconds"))
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(RUN, tmp_path / "run")
    for stage in USED.get(command_line, ["autoencoder", "diffusion"]):
        path = run / f"{stage}.keras"
        for damage in (*DAMAGES.values(), lambda data: (RUN / "prior.keras").read_bytes(), None):
            if damage:
                path.write_bytes(damage((RUN / path.name).read_bytes()))
            else:
                path = run / f"{stage}.json"
                path.write_text("{}")
            if path.read_bytes() != (RUN / path.name).read_bytes():
                assert COMMANDS[command_line](str(run)) == 2
                said = capsys.readouterr().err
                assert said.count("\n") == 1 and f"{path} cannot be read (" in said
                shutil.copy(RUN / path.name, path)
    if command_line == "reconstruct":  # a run in pixels has none
        return
    (run / "autoencoder.keras").unlink()
    assert COMMANDS[command_line](str(run)) == 2 and "autoencoder.keras is not there yet" in capsys.readouterr().err


def test_a_model_that_unpacks_to_much_more_is_refused(tmp_path):
    path = tmp_path / "diffusion.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("config.json", bytes(10**7))
    assert "it declares 10,000,000 bytes" in refusal(runs.RunError, path, lambda: runs.refuse_damaged(path))


def test_no_model_file_is_executed(tmp_path):
    """A Lambda layer holds Python, which Keras would run while it builds the model."""
    path, trace = tmp_path / "features.keras", tmp_path / "was here"
    run = eval(f"lambda x: (open({str(trace)!r}, 'w'), x)[1]")
    keras.Sequential([keras.Input((1,)), keras.layers.Lambda(run)]).save(path)
    assert trace.exists()  # it was run here, where the model was made
    trace.unlink()
    refusal(runs.RunError, path, lambda: runs.load_model(path))
    assert not trace.exists()


def tiny(units=1):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(units)])
    model.compile(keras.optimizers.Adam(0.1), loss="mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.mark.parametrize("damage", [*DAMAGES, "another model's"])
def test_a_damaged_checkpoint_is_one_sentence_and_costs_no_history(damage, tmp_path):
    tiny(2).save_weights(tmp_path / "whole.weights.h5")
    path, history = tmp_path / "diffusion.last.weights.h5", tmp_path / "diffusion.csv"
    history.write_text("epoch,val_loss\n0,1.0\n")
    if damage == "another model's":
        shutil.copy(tmp_path / "whole.weights.h5", path)
    else:
        damaged(path, tmp_path / "whole.weights.h5", damage)
    model = tiny(2 if damage in DAMAGES else 1)
    said = refusal(runs.RunError, path, lambda: runs.resume(model, tmp_path, "diffusion", 5))
    assert "remove it, and the stage begins anew" in said and history.exists()


RECORDS = ["[1, 2]", "null", "3", '"words"', "{}", '{"settings": {}}', '{"settings": [], "data": {}}', "[" * 100_000]


@pytest.mark.parametrize("content", [*RECORDS, '{"settings": {}, "data": "x"}', "\udcff"])
def test_a_record_of_the_wrong_kind_is_one_sentence(content, tmp_path):
    path = tmp_path / "autoencoder.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert "give a new run a name with --run" in refusal(
        runs.RunError, path, lambda: records.read(tmp_path, "autoencoder")
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_one_sentence(damage, tmp_path):
    path = damaged(tmp_path / "diffusion.json", RUN / "diffusion.json", damage)
    refusal(runs.RunError, path, lambda: records.read(tmp_path, "diffusion"))


WRONG = {  # place in a record -> what no stage wrote down there
    "stage": ["prior", 3],
    "finished": ["no", None, 1],
    "epochs": [-1, "x", [1], float("inf")],
    "versions": [3],
    "settings.image_size": ["big", 0, 32.0, None],
    "settings.first_stage": ["another", ...],
    "settings.seed": [-1, "x", float("nan")],
    "settings.data": [3],
    "settings.diffusion": [None, [1]],
    "settings.diffusion.width": [-1, float("inf")],
    "settings.autoencoder.crop_box": [[1, 2], [0, 0, 99, 8], [0, 0, 0, 0], "box"],
    "data.source": [None],
    "data.z": [["a", "b"], [5], 3, None, [9, 3], [0, 10**15], [-5, 3], [0, float("nan")], ...],
    "data.labels": [3, [1, 2], "AD", None, ["NC", "AD"], ["AD", "AD"], ...],
    "data.splits": [[], {"train": 3}, None, ...],
    "data.splits.train.cases": [3, [1]],
    "data.columns": [[1], {"age": 3}, {"age": {"kind": "other"}}, {"age": {"kind": "number", "mean": 0.0}}],
    "data.columns.age.std": [0, "x", float("nan")],
}


def with_value(content, place, value):
    """A record that has another value in a place, or, with ..., no such key."""
    content = json.loads(json.dumps(content))
    *way, last = place.split(".")
    inner = content
    for name in way:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return content


@pytest.mark.parametrize("place", WRONG)
def test_a_record_with_a_value_that_no_stage_wrote_is_one_sentence(place, tmp_path):
    path, content = tmp_path / "diffusion.json", json.loads((RUN / "diffusion.json").read_text())
    for value in WRONG[place]:
        path.write_text(json.dumps(with_value(content, place, value)))
        refusal(runs.RunError, path, lambda: records.read(tmp_path, "diffusion"))


def test_records_of_two_runs_are_told_apart(tmp_path):
    """By what every stage of a run sees: people, slices, and the shape of latents."""
    small_records.write_record(tmp_path, "autoencoder")
    small_records.write_record(tmp_path, "diffusion", data={"labels": []})  # it may be told other labels
    assert list(records.all_of(tmp_path)) == ["autoencoder", "diffusion"]
    for settings, data in ({}, {"z": [0, 99]}), ({}, {"splits": {}}), ({"image_size": 64}, {}):
        splits = {"splits": small_records.manifest()["splits"] | {"test": {"people": 0, "images": 0, "cases": []}}}
        small_records.write_record(tmp_path, "diffusion", settings, splits if "splits" in data else data)
        with pytest.raises(runs.RunError, match=r"autoencoder.json and diffusion.json tell of other people, slices"):
            records.all_of(tmp_path)


@pytest.mark.parametrize(
    ("stage", "place", "value", "said"),
    [
        ("autoencoder", "settings.first_stage", "vae", "as its kind, and autoencoder.json says vae"),
        ("autoencoder", "settings.autoencoder.codes_per_latent", 1, "as its shape of latents"),
        ("diffusion", "data.labels", ["AD"], "2 as its number of labels, and diffusion.json says 1"),
        ("diffusion", "data.columns", {}, "as its columns"),
        ("diffusion", "settings.autoencoder.crop_box", None, "as its shape of what is denoised"),
        ("prior", "data.labels", [], "as its number of labels"),
    ],
)
def test_a_model_and_the_record_of_another_run_are_told_apart(stage, place, value, said, tmp_path):
    for name in (f"{stage}.keras", f"{stage}.json"):
        shutil.copy(RUN / name, tmp_path)
    records.load(tmp_path, stage)
    content = records.read(RUN, stage)
    (tmp_path / f"{stage}.json").write_text(json.dumps(with_value(content, place, value)))
    with pytest.raises(runs.RunError, match=re.escape(said)):
        records.load(tmp_path, stage)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_one_sentence(value, tmp_path):
    model = tiny()
    model.layers[0].bias.assign([value])
    model.save(path := tmp_path / "features_0.keras")
    assert "are no numbers" in refusal(runs.RunError, path, lambda: runs.load_model(path))
    model.save_weights(path := tmp_path / "diffusion.last.weights.h5")
    assert "are no numbers" in refusal(runs.RunError, path, lambda: runs.resume(tiny(), tmp_path, "diffusion", 5))


HISTORIES = {
    "latin": b"epoch,\xe9\n0,1\n",
    "long": b"epoch,loss\n0," + b"9" * 200_000,
    "zeros": bytes(50),
    "no header": b"1,2,3\n",
    "open quote": b'epoch,loss\n0,"1,1\n',
    "twice": b"epoch,epoch\n0,1\n",
}


@pytest.mark.parametrize("content", HISTORIES.values(), ids=HISTORIES)
def test_a_history_that_is_no_table_of_epochs_is_one_sentence(content, tmp_path):
    path = tmp_path / "diffusion.csv"
    path.write_bytes(content)
    assert "remove it, and curves" in refusal(runs.RunError, path, lambda: runs.read_history(path))
    path.write_text("epoch,loss\nnan,1\ninf,1\n2,1\n")
    assert [row["epoch"] for row in runs.read_history(path)] == [2]


@pytest.mark.parametrize("sheet", [3, {}, [3], [{"size": 8}], [{"size": "x", "drawn": "left", "z": 1}]])
def test_a_damaged_answer_sheet_is_one_sentence(sheet, tmp_path, capsys):
    path, answers = tmp_path / "quiz_sheet.json", tmp_path / "answers.json"
    path.write_text(json.dumps({"quiz": "a", "sheet": sheet}))
    answers.write_text(json.dumps({"quiz": "a", "answers": {"0": "left"}}))
    assert evaluate.main(["score", str(answers), "--sheet", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{path} is no answer sheet: put its copy back" in said
    assert evaluate.main(["score", str(answers), "--sheet", str(tmp_path / "none.json")]) == 2
    assert "none.json is not there" in capsys.readouterr().err


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_latents_are_one_sentence(damage, tmp_path):
    path = damaged(tmp_path / "train.npz", RUN / "latents" / "train.npz", damage)
    said = refusal(DataError, path, lambda: latents.make_dataset(path, 2, True))
    assert "remove it and run `train.py latents` again" in said


def arrays(**others):
    good = {
        "latents": np.zeros((1, 4, 2, 2, 3), "float16"),
        **{name: np.zeros(4, "int32") for name in ("label", "case")},
    }
    good |= {"z": np.zeros(4, "int32"), **others}
    return {name: value for name, value in good.items() if value is not None}


@pytest.mark.parametrize(
    "others",
    [
        {"label": None},
        {"z": np.zeros(3, "int32")},
        {"z": np.int32(3)},
        {"case": np.array(["a"] * 4)},
        {"label": np.array([None] * 4)},  # pickled: reading it would execute what it says
        {"latents": np.zeros((4, 2, 2, 3))},
        {"latents": np.full((1, 4, 2, 2, 3), np.nan, "float16")},
        {"case": np.zeros((4, 2), "int32")},
    ],
    ids=["missing", "too few", "a number", "words", "pickled", "without views", "no numbers", "two numbers for one"],
)
def test_latents_whose_arrays_do_not_belong_together_are_one_sentence(others, tmp_path):
    path = tmp_path / "train.npz"
    np.savez(path, **arrays(**others))
    refusal(DataError, path, lambda: latents.make_dataset(path, 2, True))


def test_one_array_alone_is_no_file_of_latents(tmp_path):
    with open(tmp_path / "train.npz", "wb") as file:
        np.save(file, np.zeros(4))
    refusal(DataError, tmp_path / "train.npz", lambda: latents.make_dataset(tmp_path / "train.npz", 2, True))


def test_whole_files_are_read(tmp_path):
    """What the refusals above must not refuse."""
    np.savez(tmp_path / "train.npz", **arrays())
    assert latents.make_dataset(tmp_path / "train.npz", 2, True).element_spec["image"].shape == (2, 2, 2, 3)
    assert json.loads((RUN / "diffusion.json").read_text()).keys() == records.read(RUN, "diffusion").keys()


def test_a_first_stage_without_its_record_is_refused(tmp_path, capsys):
    shutil.copytree(RUN, tmp_path / "run")
    (tmp_path / "run" / "autoencoder.json").unlink()
    assert predict.main(["reconstruct", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "autoencoder.json is not there" in said
