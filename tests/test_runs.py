"""ldm/training/runs.py: files whole or not at all, resume, the best and the last; and train.py killed and started
again.
"""

import csv
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import small_records
import tensorflow as tf
import tiny_models

import dataset
import modules
from ldm import files
from ldm.training import distribution, records, runs
from ldm.training.callbacks import Checkpoint, History

ROOT = Path(__file__).resolve().parents[1]


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    runs.write(path, lambda temporary: temporary.write_text("old"))

    def dies_half_way(temporary):
        assert temporary.name == path.name and temporary.parent != path.parent  # HDF5 must not meet a full disk
        temporary.write_text("ne")
        assert path.read_text() == "old"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        runs.write(path, dies_half_way)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file.txt"]
    runs.write(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and os.listdir(path.parent) == ["file.txt"]


def test_json_comes_back_and_is_none_where_there_is_none(tmp_path):
    runs.save_json(tmp_path / "a.json", {"a": [1, None, "ä"]})
    assert runs.load_json(tmp_path / "a.json") == {"a": [1, None, "ä"]}
    assert runs.load_json(tmp_path / "b.json") is None


def test_a_run_is_a_name_under_checkpoint_or_a_path(tmp_path):
    assert runs.folder("first") == Path("checkpoint/first")
    assert runs.folder(str(tmp_path / "first")) == tmp_path / "first"


@pytest.mark.parametrize("name", ["", ".", "..", "/", "../", "a/..", "x" * 300, "ä" * 150, "here/" + "x" * 300])
def test_a_name_that_no_folder_of_its_own_can_have_is_refused(name):
    with pytest.raises(runs.RunError, match="--run"):
        runs.folder(name)
    with pytest.raises(runs.RunError, match="^--init-from"):
        runs.folder(name, "--init-from")
    assert runs.folder("x" * 200) and runs.folder("../a/..b") and runs.folder("ä" * 100)


CLUSTER = '{"cluster": {"worker": ["a:1"]}'
FIRST = '"task": {"type": "worker", "index": 0}'


@pytest.mark.parametrize(
    "said",
    [
        *("[]", "{", "3", '{"cluster": [1]}'),
        *(f'{{"cluster": {{"worker": {jobs}}}, {FIRST}}}' for jobs in ("5", "[5]", '"a"', "[]", "[null]")),
        *(CLUSTER + rest for rest in ("}", ', "task": 3}', ', "task": {}}', f", {FIRST.replace('0', '1')}}}")),
    ],
)
def test_tf_config_that_says_nothing_of_machines_is_one_sentence(said, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", said)
    with pytest.raises(runs.RunError, match="^TF_CONFIG=.* does not say which machines train together: unset it"):
        runs.is_chief()
    with pytest.raises(ValueError, match="^TF_CONFIG="):
        distribution.make_strategy()


@pytest.mark.parametrize(
    "jobs, job, index, chief",
    [
        ({"worker": ["a:1", "b:1"]}, "worker", 0, True),
        ({"worker": ["a:1", "b:1"]}, "worker", 1, False),
        ({"chief": ["a:1"], "worker": ["b:1"]}, "worker", 0, False),
        ({"chief": ["a:1"], "worker": ["b:1"]}, "chief", 0, True),
        ({}, None, None, True),
    ],
)
def test_one_of_all_machines_is_the_chief(jobs, job, index, chief, monkeypatch):
    config = {"cluster": jobs, "task": {"type": job, "index": index}} if jobs else {}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    assert runs.is_chief() == chief


# ---- one process at a time -------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from ldm import files
file = open(sys.argv[1], "w")
print(files.lock(file), flush=True)
time.sleep(60)
"""


def test_a_run_is_trained_by_one_process_and_free_when_that_is_killed(tmp_path):
    with runs.training(tmp_path / "run"):
        with pytest.raises(runs.RunError, match="another process trains this run"), runs.training(tmp_path / "run"):
            pass
        with runs.training(tmp_path / "another"):
            pass
    lock = tmp_path / "run" / ".lock"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "True\n"
    with pytest.raises(runs.RunError, match="another process trains this run"), runs.training(tmp_path / "run"):
        pass
    other.kill()
    other.communicate()
    with runs.training(tmp_path / "run"):
        pass


@pytest.mark.skipif(files.fcntl is None, reason="Windows locks in another way")
def test_a_lock_that_the_file_system_does_not_have_stops_nobody(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with runs.training(tmp_path / "run"):
        pass


def test_what_a_killed_training_left_half_written_is_removed_and_nothing_else(tmp_path):
    half = ["~7.diffusion.keras", "~7.diffusion.last.weights.h5", "latents/~7.train.npz", "pictures/~7.a.png"]
    kept = ["diffusion.keras", "~7.report.html", "latents/train.npz", "~notes.txt"]
    for name in (*half, *kept):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with runs.training(tmp_path):
        assert not any((tmp_path / name).exists() for name in half) and all((tmp_path / name).exists() for name in kept)


def test_an_error_that_names_no_file_of_the_run_names_its_folder(tmp_path):
    run, node = tmp_path / "run", None
    full = tf.errors.ResourceExhaustedError(node, None, f"{run}/logs/diffusion/train/events.1; No space left on device")
    for error, number in (
        (OSError(errno.ENOSPC, "can't write data\nbuf = 0x5"), errno.ENOSPC),  # as HDF5 and `write` say it
        (full, errno.ENOSPC),
        (tf.errors.FailedPreconditionError(node, None, f"{run}/logs is not a directory"), errno.ENOTDIR),
        (tf.errors.InternalError(node, None, f"{run}/logs"), errno.EIO),
    ):
        with pytest.raises(OSError) as found, runs.training(run):
            raise error
        assert (found.value.errno, found.value.filename) == (number, str(run))
    others = [
        OSError(errno.ENOENT, "gone", "a.png"),
        OSError("half"),
        tf.errors.ResourceExhaustedError(node, None, "GPU"),
    ]
    for error in others:
        with pytest.raises(type(error)) as found, runs.training(run):
            raise error
        assert found.value is error


def test_only_the_chief_holds_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "is_chief", lambda: False)
    with runs.training(tmp_path / "run"), runs.training(tmp_path / "run"):
        assert not (tmp_path / "run").exists()


def test_newest_run_is_the_one_trained_last(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    with pytest.raises(runs.RunError, match=r"run `python train.py` first"):
        runs.newest("diffusion")
    for age, name in ((30, "b"), (10, "a"), (20, "c")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "diffusion.keras").touch()
        os.utime(tmp_path / name / "diffusion.keras", (time.time() - age,) * 2)
    (tmp_path / "d").mkdir()  # no model in it
    assert runs.newest("diffusion") == tmp_path / "a"


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_a_missing_model_names_the_command_that_makes_it(stage, tmp_path):
    with pytest.raises(runs.RunError, match=f"run `python train.py {stage} --run mine` first"):
        runs.load_model(tmp_path / "mine" / f"{stage}.keras")


# ---- checkpoints of one stage ----------------------------------------------------------------------------------------


def tiny_model(**options):
    """y = w x, compiled."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    model.compile(keras.optimizers.Adam(0.1, **options), loss="mse", jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    model.for_use = lambda: model  # as `modules.Reports` has it
    return model


def write_history(path, values):
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["epoch", "val_loss"])
        rows.writerows(enumerate(values))


def test_a_history_that_goes_on_keeps_to_its_columns(tmp_path):
    """What a newer version reports besides must not slide under another column's name."""
    write_history(tmp_path / "history.csv", [0.5])
    model, x = tiny_model(), tf.ones((4, 1))
    history = History(tmp_path / "history.csv", append=True)
    more = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(seconds=9.0, a_first=8.0))
    model.fit(x, x, epochs=2, initial_epoch=1, verbose=0, callbacks=[Validation([0.5, 0.25]), more, history])
    assert runs.read_history(tmp_path / "history.csv") == [
        {"epoch": 0, "val_loss": 0.5},
        {"epoch": 1, "val_loss": 0.25},
    ]


def test_a_history_is_read_whatever_interrupted_runs_leave_behind(tmp_path):
    path = tmp_path / "history.csv"
    path.write_text(
        "epoch,loss,val_loss,note\n0,3.0,NA,[1 2]\n1,2.0,2.5,x\n"
        "epoch,loss,val_loss,note\n1,1.5,2.2,x\n2,nan,NA,x\n3,0.9"  # resumed at epoch 1; killed in the middle of a row
    )
    rows = runs.read_history(path)
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert np.isnan(rows[2].pop("loss")) and [row.get("loss") for row in rows] == [3.0, 1.5, None, 0.9]
    assert [row.get("val_loss") for row in rows] == [None, 2.2, None, None]
    assert not any("note" in row for row in rows)


def test_a_run_that_is_none_names_those_that_are(tmp_path):
    for name in ("mine", "empty"):
        (tmp_path / name).mkdir()
    small_records.write_record(tmp_path / "mine", "diffusion", {"image_size": 16})
    named = r"mien is no run: train one with `python train.py --run mien`, or give the --run of .* \(mine\)"
    with pytest.raises(runs.RunError, match=named):
        runs.refuse_no_run(tmp_path / "mien")
    runs.refuse_no_run(tmp_path / "mine")


def test_it_is_said_how_far_a_stage_is_that_is_still_in_training(tmp_path):
    assert records.unfinished(tmp_path, "diffusion") == ""
    small_records.write_record(tmp_path, "diffusion", {"diffusion": {"epochs": 4}}, finished=False)
    (tmp_path / "diffusion.csv").write_text("epoch,loss\n0,1\n1,0.9\n")
    assert records.unfinished(tmp_path, "diffusion") == " after epoch 2 of 4"
    small_records.write_record(tmp_path, "diffusion", {"diffusion": {"epochs": 4}}, finished=True)
    assert records.unfinished(tmp_path, "diffusion") == ""


def test_a_first_stage_still_in_training_is_not_for_use(tmp_path):
    model = modules.VQVAE(16, width=8)
    model.save(tmp_path / "autoencoder.keras")
    with pytest.raises(runs.RunError, match="autoencoder.json is not there"):
        records.load_first_stage(tmp_path)
    for finished in ({}, {"finished": False}):
        small_records.write_record(tmp_path, "autoencoder", {"image_size": 16}, **finished)
        with pytest.raises(runs.RunError, match="still in training"):
            records.load_first_stage(tmp_path)
    small_records.write_record(tmp_path, "autoencoder", {"image_size": 16}, finished=True)
    assert isinstance(records.load_first_stage(tmp_path), modules.VQVAE)


def test_a_run_without_checkpoint_starts_at_0_with_an_empty_history(tmp_path):
    write_history(tmp_path / "diffusion.csv", [1.0])
    assert runs.resume(tiny_model(), tmp_path, "diffusion", 5) == 0
    assert not (tmp_path / "diffusion.csv").exists()
    assert runs.read_history(tmp_path / "diffusion.csv") == []


def test_resume_takes_weights_and_optimiser_and_drops_rows_that_the_checkpoint_does_not_hold(tmp_path):
    x = np.ones((10, 1))
    first = tiny_model(use_ema=True)
    first.fit(x, 2 * x, batch_size=1, epochs=1, verbose=0)
    first.fit(x, 2 * x, batch_size=1, epochs=1, verbose=0)
    first.save_weights(tmp_path / "diffusion.last.weights.h5")
    write_history(tmp_path / "diffusion.csv", [0.3, 0.2, 0.1])  # the third epoch was killed before its checkpoint

    second = tiny_model(use_ema=True)
    assert runs.resume(second, tmp_path, "diffusion", 10) == 2
    for ours, theirs in zip(first.weights, second.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(first.optimizer.variables, second.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [row["val_loss"] for row in runs.read_history(tmp_path / "diffusion.csv")] == [0.3, 0.2]


class Validation(keras.callbacks.Callback):
    """Puts chosen validation losses into the logs, before the checkpoint looks at them."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def on_epoch_end(self, epoch, logs=None):
        logs["val_loss"] = self.values[epoch]


def test_checkpoint_keeps_the_best_and_the_last(tmp_path):
    model, x = tiny_model(), tf.ones((4, 1))
    after = []
    callbacks = [
        Validation([0.5, 0.2, 0.3]),
        Checkpoint(tmp_path, "diffusion", "val_loss"),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: after.append(float(model.weights[0][0, 0]))),
    ]
    model.fit(x, 2.0 * x, epochs=3, verbose=0, callbacks=callbacks)
    assert len(set(after)) == 3
    best = keras.saving.load_model(tmp_path / "diffusion.keras")
    np.testing.assert_allclose(best.weights[0], [[after[1]]])
    last = tiny_model()
    last.load_weights(tmp_path / "diffusion.last.weights.h5")
    np.testing.assert_allclose(last.weights[0], [[after[2]]])
    assert {path.name for path in tmp_path.iterdir()} == {"diffusion.keras", "diffusion.last.weights.h5"}


def test_with_a_gan_the_best_epoch_is_one_at_its_full_weight(tmp_path):
    """Sharpness costs reconstruction: without this rule the epoch before the GAN would always be kept."""
    rank = Checkpoint(tmp_path, "autoencoder", "loss").rank
    epochs = [{"loss": 0.3, "adversarial": 0.0}, {"loss": 0.2, "adversarial": 0.5}]
    assert min(epochs, key=rank)["loss"] == 0.2
    epochs += [{"loss": 0.5, "adversarial": 1.0}, {"loss": 0.4, "adversarial": 1.0}]
    assert min(epochs, key=rank)["loss"] == 0.4
    assert min([{"loss": 0.3}, {"loss": 0.2}], key=rank)["loss"] == 0.2


def test_checkpoint_remembers_the_best_of_before_the_interruption(tmp_path):
    write_history(tmp_path / "diffusion.csv", [0.5, 0.1])
    model, x = tiny_model(), tf.ones((4, 1))
    callbacks = [Validation([0.2]), Checkpoint(tmp_path, "diffusion", "val_loss")]
    model.fit(x, x, epochs=1, verbose=0, callbacks=callbacks)
    assert not (tmp_path / "diffusion.keras").exists()  # 0.2 is no better than 0.1
    assert (tmp_path / "diffusion.last.weights.h5").exists()


# ---- killed and started again ----------------------------------------------------------------------------------------


def train(*flags):
    environment = os.environ | {"TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *map(str, flags), "--precision", "float32"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def to_the_end(process):
    output = process.communicate(timeout=600)[0].decode()
    assert process.returncode == 0, output
    return output


def kill_after_first_epoch(checkpoint, *flags):
    """Start, and kill -9 as soon as the first checkpoint is there."""
    process = train(*flags)
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[0].decode()
        time.sleep(0.02)
    process.kill()
    process.communicate()


def arrays(path):
    """Every array of a weights file: the model's, and the optimiser's."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


def interrupted_equals_unbroken(tmp_path, stage, *flags):
    """Both runs, and the comparison: all weights, the codebook and averages, the optimiser, and the history."""
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    checkpoint = broken / f"{stage}.last.weights.h5"
    unbroken = train(stage, "--run", whole, *flags)  # beside the other
    kill_after_first_epoch(checkpoint, stage, "--run", broken, *flags)
    assert runs.load_json(broken / f"{stage}.json")["finished"] is False
    assert "going on after epoch" in to_the_end(train(stage, "--run", broken, *flags))
    to_the_end(unbroken)

    ours, theirs = arrays(checkpoint), arrays(whole / f"{stage}.last.weights.h5")
    assert ours.keys() == theirs.keys() and any("optimizer" in name for name in ours)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6, err_msg=name)
    histories = [runs.read_history(run / f"{stage}.csv") for run in (broken, whole)]
    assert [row["epoch"] for row in histories[0]] == [0, 1, 2]
    for ours, theirs in zip(*histories, strict=True):
        assert ours.keys() == theirs.keys()
        assert ours.pop("seconds") > 0 and theirs.pop("seconds") > 0
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5, atol=1e-6)
    best, other = (runs.load_model(run / f"{stage}.keras") for run in (broken, whole))
    assert type(best) is {"autoencoder": modules.VQVAE, "diffusion": modules.DiffusionModel}[stage]
    for ours, theirs in zip(best.weights, other.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6, err_msg=ours.path)
    assert runs.load_json(broken / f"{stage}.json")["finished"] is True
    assert not list(broken.rglob("~*"))


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    path = tmp_path_factory.mktemp("phantoms") / "phantom.zip"
    dataset.write_phantoms(path, people=4, image_size=32)
    return path


SMALL = ("--epochs", 3, "--steps-per-epoch", 3, "--batch-size", 8, "--seed", 1)


@pytest.mark.slow
def test_killed_first_stage_goes_on_to_where_an_unbroken_run_ends(tmp_path, phantoms):
    more = ("--image-size", 16, "--downsampling", 4, "--num-codes", 16, "--flip")
    interrupted_equals_unbroken(tmp_path, "autoencoder", "--data", phantoms, *SMALL, *more)


@pytest.mark.slow
def test_killed_diffusion_goes_on_to_where_an_unbroken_run_ends(tmp_path, phantoms):
    more = ("--autoencoder", "none", "--image-size", 16, "--width", 8, "--multipliers", 1, "--blocks", 1)
    more += ("--attention", "--head-size", 8)
    interrupted_equals_unbroken(tmp_path, "diffusion", "--data", phantoms, *SMALL, *more)


# ---- starting from another run ---------------------------------------------------------------------------------------


def test_a_training_starts_from_the_weights_of_another_as_far_as_they_fit(tmp_path, capsys):
    """Another number of labels changes one table; everything else comes along, and the table stays new."""
    other, model = (tiny_models.make_vae(num_labels=labels) for labels in (2, 3))
    tiny_models.randomised(other).save(tmp_path / "autoencoder.keras")
    before = model.get_weights()
    runs.start_from(model, tmp_path / "autoencoder.keras")
    kept = [np.shape(new) != np.shape(old) for new, old in zip(before, other.get_weights(), strict=True)]
    assert 0 < sum(kept) < 3
    for stays, now, new, old in zip(kept, model.get_weights(), before, other.get_weights(), strict=True):
        np.testing.assert_array_equal(now, new if stays else old)
    assert f"{len(kept) - sum(kept)} of {len(kept)} arrays" in capsys.readouterr().out


@pytest.mark.parametrize("told", [True, False])
def test_who_is_told_of_augmentation_starts_from_who_is_not_and_the_other_way_round(tmp_path, told):
    """All else has the values of its own place in the other; the token stays new, or behind."""
    other, model = (
        tiny_models.randomised(tiny_models.make_diffusion(tiny_models.make_unet(tell_augmented=which)), seed)
        for which, seed in ((not told, 1), (told, 2))
    )
    other.save(tmp_path / "diffusion.keras")
    before = model.get_weights()
    runs.start_from(model, tmp_path / "diffusion.keras")
    token = [i for i, weight in enumerate(model.weights) if "augmented_token" in weight.path]
    assert len(token) == told
    for i in token:
        np.testing.assert_array_equal(model.get_weights()[i], before[i])
    kept = [np.asarray(weight) for weight in other.weights if "augmented_token" not in weight.path]
    got = [value for i, value in enumerate(model.get_weights()) if i not in token]
    for ours, theirs in zip(got, kept, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_another_network_is_refused_as_a_start(tmp_path):
    tiny_models.make_vae().save(tmp_path / "autoencoder.keras")
    with pytest.raises(
        runs.RunError, match=r"flags describe \(--latent-channels 3 there, 4 here\): give the flags of its"
    ):
        runs.start_from(tiny_models.make_vae(latent_channels=4), tmp_path / "autoencoder.keras")
    with pytest.raises(runs.RunError, match="another network"):
        runs.start_from(tiny_models.make_vae(blocks=2), tmp_path / "autoencoder.keras")
    with pytest.raises(runs.RunError, match="another network"):
        runs.start_from(tiny_models.make_vae(width=16), tmp_path / "autoencoder.keras")


@pytest.mark.slow
def test_a_decoder_alone_is_sharpened_on_latents_that_stay_what_they_are(tmp_path, phantoms):
    """`--init-from A --freeze-encoder --gan`: the encoder's weights are A's to the last bit, the decoder's are not.

    What A learned in its latents is taken over; a second command finds everything done.
    """
    vae = ("--data", phantoms, "--image-size", 16, "--autoencoder", "vae", "--autoencoder-width", 16, *SMALL)
    vae += ("--width", 8, "--multipliers", 1, "--blocks", 1, "--attention", "--head-size", 8, "--views", 1)
    first, second = tmp_path / "first", tmp_path / "second"
    to_the_end(train("all", "--run", first, *vae))
    more = ("--init-from", first, "--freeze-encoder", "--gan", "--latent-noise", 0.3)
    sharpened = to_the_end(train("autoencoder", "--run", second, *vae, *more))
    assert "adversarial training begins: the first stage is a trained one" in sharpened
    alone = to_the_end(train("latents", "--run", second, "--dry-run"))  # one stage by itself is done anew
    assert f"latents: {first}/ has one for this encoder: `python train.py --run second` takes it over" in alone
    said = to_the_end(train("all", "--run", second, *vae, *more))
    assert f"diffusion: taken over from {first}" in said and f"latents: taken over from {first}" in said
    for name in ("latents/train.npz", "diffusion.keras", "diffusion.last.weights.h5"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    again = to_the_end(train("all", "--run", second, *vae, *more))
    assert again.count("finished before") == 3
    assert "arrays of weights fit" in sharpened
    before, after = (runs.load_model(run / "autoencoder.keras") for run in (first, second))
    for ours, theirs in zip(after.encoder.weights, before.encoder.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=ours.path)
    np.testing.assert_array_equal(after.latent_std, before.latent_std)
    kernels = [model.decoder.get_layer("to_image").kernel.numpy() for model in (after, before)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4
