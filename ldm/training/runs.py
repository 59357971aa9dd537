"""The run folder, `checkpoint/<run>/`: everything that one run makes, and how an interrupted run goes on.

    <stage>.json              resolved settings, versions, data manifest, whether the stage is finished
    <stage>.csv               history, one row per epoch           <stage>.png       its curves
    <stage>.keras             the best epoch by validation (with averaged weights, if the stage averages)
    <stage>.last.weights.h5   the last epoch, with the optimiser's state: where a resumed run goes on
    codebook.json, .png       which codes of a VQ-VAE the last epoch used, and which are dead
    latents/<split>.npz       the first stage's latents
    pictures/, logs/          a picture per epoch; TensorBoard

Files are written whole or not at all: under a temporary name first, then renamed. The number of finished epochs is read
off the optimiser's own step counter inside the checkpoint, so that weights and count cannot disagree.
"""

import contextlib
import csv
import json
import math
import os
import platform
import tempfile
from pathlib import Path

import keras

from ldm import files
from ldm.training import old_runs

ROOT = Path("checkpoint")
STAGES = ("autoencoder", "latents", "diffusion", "prior")
LAST_SEED = 2_000_000_000  # tensors hold seeds as int32, and to some a number is added


class RunError(ValueError):
    """A user's mistake about a run: one sentence that says the way out."""


def folder(name):
    """The folder of a run, given its name under `checkpoint/` or a path."""
    return Path(name) if os.sep in str(name) else ROOT / name


def newest(*stages):
    """The run in `checkpoint/` whose `<stage>.keras` was written last, of the first of these stages that any run has.

    Raises:
        RunError: if there is none.
    """
    for stage in stages:
        if models := sorted(ROOT.glob(f"*/{stage}.keras"), key=lambda path: path.stat().st_mtime):
            return models[-1].parent
    raise RunError(f"no run in {ROOT}/ has a trained {stages[0]} model yet: run `python train.py` first")


def is_chief():
    """Whether this process writes the run folder: of several machines (TF_CONFIG) only the first one does."""
    config = json.loads(os.environ.get("TF_CONFIG") or "{}")
    task = config.get("task", {"type": "chief"})
    first = "chief" if "chief" in config.get("cluster", {"chief": []}) else "worker"
    return task["type"] == first and task.get("index", 0) == 0


def write(path, writer):
    """Let `writer(temporary_path)` write a file, then put it in place in one step. Only the chief writes."""
    if not is_chief():
        return
    files.write_by(path, writer)


def save_json(path, content):
    write(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def load_json(path):
    """The content of a JSON file, or None where there is no such file; settings with today's names."""
    content = json.loads(Path(path).read_text()) if Path(path).exists() else None
    if content and "settings" in content:
        content["settings"] = old_runs.modern_settings(content["settings"])
    return content


def load_model(path):
    """A `.keras` file of this project, ready to use.

    Raises:
        RunError: if it is not there, naming the command that makes it.
    """
    path = Path(path)
    if not path.exists():
        stage = path.stem
        raise RunError(f"{path} is not there yet: run `python train.py {stage} --run {path.parent.name}` first")
    modern = old_runs.modernised(path)
    if modern is None:
        return keras.saving.load_model(path, compile=False)
    with tempfile.TemporaryDirectory() as folder:
        renamed = Path(folder) / path.name
        renamed.write_bytes(modern)
        return keras.saving.load_model(renamed, compile=False)


def load_first_stage(run):
    """The first stage of a run, trained to its end: only then are its latents measured.

    Raises:
        RunError: if it is not there, or still in training.
    """
    model = load_model(run / "autoencoder.keras")
    if not (load_json(run / "autoencoder.json") or {}).get("finished"):
        raise RunError(
            f"{run}: its first stage is still in training: run `python train.py autoencoder --run {run.name}`"
        )
    return model


def versions():
    """Versions of what the result depends on."""
    import tensorflow as tf

    return {"python": platform.python_version(), "keras": keras.__version__, "tensorflow": tf.__version__}


# ---- one stage: checkpoints and resume -------------------------------------------------------------------------------


def export(model, path):
    """Save a model for use: a copy on one device, without optimiser, with the averaged weights if there are any."""
    write(path, lambda temporary: copy_for_use(model).save(temporary))


def copy_for_use(model, copy=None):
    """A twin of the model outside any strategy, with the optimiser's averaged weights where it keeps them.

    Args:
        model: compiled.
        copy: an earlier twin to refresh, instead of building one.
    """
    kept = model.for_use()
    copy = copy or type(kept).from_config(kept.get_config())
    copy.set_weights(kept.get_weights())
    if model.optimizer.use_ema:
        averages = model.optimizer._model_variables_moving_average
        for weight, average in zip(copy.trainable_variables, averages, strict=True):
            weight.assign(average)
    return copy


def read_history(path):
    """Rows of a CSVLogger file, {column: float} each, in the order of the epochs; empty if there is no file.

    What interrupted runs leave behind is understood: an epoch that was repeated counts as it came out last, a second
    header is no epoch, the last row may be cut off. What is no number ("NA": not measured) is left out of its row; NaN
    and infinity are results, and stay.
    """
    if not Path(path).exists():
        return []
    rows = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            numbers = {}
            for column, cell in row.items():
                with contextlib.suppress(TypeError, ValueError):
                    numbers[column] = float(cell)
            if "epoch" in numbers:
                rows[numbers["epoch"]] = numbers
    return list(rows.values())


def resume(model, run, stage, steps_per_epoch):
    """Load the last checkpoint of a stage into a compiled model, if there is one.

    Rows of the history that the checkpoint does not hold, written just before an interruption, are dropped.

    Returns:
        Number of finished epochs.
    """
    path, history = run / f"{stage}.last.weights.h5", run / f"{stage}.csv"
    if not path.exists():
        if is_chief():
            history.unlink(missing_ok=True)
        return 0
    model.load_weights(path)
    epochs = int(keras.ops.convert_to_numpy(model.optimizer.iterations)) // steps_per_epoch
    if history.exists():
        lines = history.read_text().splitlines(keepends=True)[: 1 + epochs]
        write(history, lambda temporary: temporary.write_text("".join(lines)))
    return epochs


class History(keras.callbacks.CSVLogger):
    """Keras' CSVLogger, which, going on with a file, keeps to the columns of its header."""

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        if self.append:
            with open(self.filename, newline="") as file:
                self.keys = next(csv.reader(file), ["epoch"])[1:] or None

    def on_epoch_end(self, epoch, logs=None):
        unmeasured = math.isnan(logs.get("val_kid", 0.0))
        super().on_epoch_end(epoch, {**logs, "val_kid": "NA"} if unmeasured else logs)


class Checkpoint(keras.callbacks.Callback):
    """After each epoch keep the best and the last model. Put it after CSVLogger, before anything that may fail.

    The best goes first: killed in between, the run repeats the epoch, and comes to the same best again.

    Args:
        run: folder.
        stage: "autoencoder" or "diffusion".
        monitor: the value in the logs that is best when least; where epochs measured "val_kid", that decides.
    """

    def __init__(self, run, stage, monitor):
        super().__init__()
        self.run, self.stage, self.monitor = run, stage, monitor

    def on_train_begin(self, logs=None):
        past = [self.rank(row) for row in read_history(self.run / f"{self.stage}.csv") if self.monitor in row]
        self.best = min(past, default=(True, float("inf"), float("inf")))

    def rank(self, row):
        """Least is best. Sharpness costs reconstruction: with a GAN, the epochs at its full weight come first."""
        kid = float(row.get("val_kid", "nan"))
        return (row.get("adversarial", 1.0) < 1.0, float("inf") if math.isnan(kid) else kid, float(row[self.monitor]))

    def on_epoch_end(self, epoch, logs=None):
        rank = self.rank(logs)
        if rank < self.best:
            self.best = rank
            export(self.model, self.run / f"{self.stage}.keras")
        write(self.run / f"{self.stage}.last.weights.h5", self.model.save_weights)
