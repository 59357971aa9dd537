"""Files of a run that are damaged, or another's: one sentence that names the file and the way out, nothing executed."""

import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest

import predict
from ldm.data import latents
from ldm.data.archive import DataError
from ldm.training import runs

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
    assert "give a new run a name with --run" in refusal(runs.RunError, path, lambda: runs.load_json(path))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_one_sentence(damage, tmp_path):
    path = damaged(tmp_path / "diffusion.json", RUN / "diffusion.json", damage)
    refusal(runs.RunError, path, lambda: runs.load_json(path))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_latents_are_one_sentence(damage, tmp_path):
    path = damaged(tmp_path / "train.npz", RUN / "latents" / "train.npz", damage)
    said = refusal(DataError, path, lambda: latents.make_dataset(path, 2, True))
    assert "remove it and run the same command again" in said


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
        {"case": np.zeros((4, 2), "int32")},
    ],
    ids=["missing", "too few", "a number", "words", "pickled", "without views", "two numbers for one"],
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
    assert json.loads((RUN / "diffusion.json").read_text()).keys() == runs.load_json(RUN / "diffusion.json").keys()


def test_a_first_stage_without_its_record_is_refused(tmp_path, capsys):
    shutil.copytree(RUN, tmp_path / "run")
    (tmp_path / "run" / "autoencoder.json").unlink()
    assert predict.main(["reconstruct", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "autoencoder.json is not there" in said
