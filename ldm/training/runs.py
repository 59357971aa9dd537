"""The run folder, `checkpoint/<run>/`: everything that one run makes, and how an interrupted run goes on.

    <stage>.json              resolved settings, versions, data manifest, whether the stage is finished
    <stage>.csv               history, one row per epoch           <stage>.png       its curves
    <stage>.keras             the best epoch by validation (with averaged weights, if the stage averages)
    <stage>.last.weights.h5   the last epoch, with the optimiser's state: where a resumed run goes on
    codebook.json, .png       which codes of a VQ-VAE the last epoch used, and which are dead
    latents/<split>.npz       the first stage's latents; <split>.<digest>/: pieces of an encoding that is not finished
    pictures/, logs/          a picture per epoch; TensorBoard

    .lock                     held by the process that trains the run

Files are written whole or not at all: under a temporary name first, then renamed. What cannot be read is one sentence,
and nothing in a file is ever executed: Keras loads models in its safe mode. The number of finished epochs is read
off the optimiser's own step counter inside the checkpoint, so that weights and count cannot disagree.
"""

import contextlib
import csv
import errno
import json
import math
import os
import platform
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from ldm import files
from ldm.later import keras
from ldm.later import tensorflow as tf
from ldm.training import distribution, old_runs

ROOT = Path("checkpoint")
STAGES = ("autoencoder", "latents", "diffusion", "prior")
LONGEST_NAME = 200  # bytes; most file systems take 255
KINDS = {"autoencoder": ("VQVAE", "VAE"), "diffusion": ("DiffusionModel",), "prior": ("CodePrior",)}  # of models
SHAPING = {  # what decides the weights of a first stage: attribute -> flag
    "latent_channels": "--latent-channels",
    "downsampling": "--downsampling",
    "patch": "--patch",
    "width": "--autoencoder-width",
}
MOST_PACKED = 50  # times smaller than its content a `.keras` file may be; weights pack badly
TENSORFLOW_SAYS = {  # of files
    "ResourceExhaustedError": errno.ENOSPC,
    "PermissionDeniedError": errno.EACCES,
    "FailedPreconditionError": errno.ENOTDIR,
    "NotFoundError": errno.ENOENT,
}
NO_MODEL = "put its copy back, or remove it and train that stage again"
NO_HISTORY = "put its copy back, or remove it, and curves and best epoch count from where training goes on"
LAST_SEED = 2_000_000_000  # tensors hold seeds as int32, and to some a number is added


class RunError(ValueError):
    """A user's mistake about a run: one sentence that says the way out."""


def folder(name, flag="--run"):
    """The folder of a run, given its name under `checkpoint/` or a path.

    Args:
        name: as it was given.
        flag: with which, for messages.

    Raises:
        RunError: for a name that no folder of its own can have.
    """
    path = Path(name) if os.sep in str(name) else ROOT / name
    last = Path(name).name  # "" of "." and of "/"
    if last in ("", ".."):
        raise RunError(f"{flag} {str(name) or repr(name)} names no folder of its own: give the run a name")
    if not str(name).isprintable() or any("\ud800" <= letter <= "\udfff" for letter in str(name)):
        raise RunError(f"{flag} {str(name)!r} has characters that cannot be printed: give another name")
    if len(os.fsencode(last)) > LONGEST_NAME:
        raise RunError(f"{flag} {last[:20]}... is longer than {LONGEST_NAME} bytes: give a shorter name")
    return path


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
    try:
        cluster, task = distribution.machines()
    except ValueError as error:
        raise RunError(str(error)) from error
    first = "chief" if "chief" in cluster or not cluster else "worker"
    return task.get("type", "chief") == first and task.get("index", 0) == 0


@contextlib.contextmanager
def training(run):
    """Make the folder of a run, and hold it for this process alone as long as it trains; on the chief only.

    The system lets go of the lock when a process ends, however it ends. What a killed one left half written is removed.

    Raises:
        RunError: if another process trains this run.
        OSError: if the folder cannot be made or written into.
    """
    if not is_chief():
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".lock", "w") as file:
        if not files.lock(file):
            raise RunError(f"{run}: another process trains this run: wait for its end, or give this one another --run")
        for pattern in (*(f"~*.{name}.*" for name in (*STAGES, "codebook")), "latents/~*", "pictures/~*"):
            for litter in run.glob(pattern):
                litter.unlink(missing_ok=True)
        with _named(run):
            yield


@contextlib.contextmanager
def _named(run):
    """Errors of the system that name no file, and those that TensorBoard meets in the run, name the run's folder."""
    try:
        yield
    except OSError as error:
        if not error.errno or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(run)) from error
    except tf.errors.OpError as error:
        if str(run) not in error.message:
            raise
        number = TENSORFLOW_SAYS.get(type(error).__name__, errno.EIO)
        raise OSError(number, os.strerror(number), str(run)) from error


def write(path, writer):
    """Let `writer(temporary path)` write a file of Keras, then put its bytes in place. Only the chief writes.

    HDF5 that finds a disk full ends the process without a word. So it writes among the system's temporary files, and
    what meets the disk of the run are bytes.
    """
    if not is_chief():
        return
    path = Path(path)
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / path.name
        writer(temporary)
        files.write(path, temporary.read_bytes())


def save_json(path, content):
    """Write JSON. Only the chief writes."""
    if is_chief():
        files.write(path, json.dumps(content, indent=2) + "\n")


def load_json(path, way_out="put its copy back, or give a new run a name with --run"):
    """The content of a JSON file, a dictionary, or None where there is no such file.

    Raises:
        RunError: if it is damaged, or holds something else, with the way out.
    """
    path = Path(path)
    if not path.exists():
        return None
    with unreadable(path, way_out):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no record that a run writes down")
    return content


@contextlib.contextmanager
def unreadable(path, way_out):
    """One sentence for whatever goes wrong inside: which error it is depends on which bytes of the file are wrong.

    Raises:
        RunError: naming the file, the reason, and the way out.
    """
    try:
        yield
    except (MemoryError, PermissionError):  # no fault of the file's content
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120].rstrip(" .:")
        raise RunError(f"{path} cannot be read ({reason}): {way_out}") from error


def load_model(path):
    """A `.keras` file of this project, ready to use.

    Raises:
        RunError: if it is not there, naming the command that makes it; if it is damaged, or another stage's model.
    """
    path = Path(path)
    refuse_missing(path)
    from ldm.training import prior  # noqa: F401  (a .keras file may name its class)

    refuse_damaged(path)
    with unreadable(path, NO_MODEL), of_today(path, old_runs.modernised(path)) as today:
        model = keras.saving.load_model(today, compile=False, safe_mode=True)
        refuse_no_numbers(model.weights)
    return model


def refuse_damaged(path):
    """Look into a `.keras` file without TensorFlow, whose import takes seconds: is it whole, and of its stage?

    Raises:
        RunError: if it is not.
    """
    with unreadable(path, NO_MODEL), zipfile.ZipFile(path) as file:
        declared = sum(part.file_size for part in file.infolist())
        if declared > MOST_PACKED * path.stat().st_size:
            raise ValueError(f"it declares {declared:,} bytes")
        if damaged := file.testzip():
            raise ValueError(f"its part {damaged} is damaged")
        kind = json.loads(file.read("config.json"))["class_name"]
        if kind not in KINDS.get(path.stem, (kind,)):
            raise ValueError(f"it holds a {kind}")


def refuse_no_run(run):
    """Refuse a folder in which no stage has begun.

    Raises:
        RunError: naming the runs that are beside it.
    """
    if not any((run / f"{stage}.json").exists() for stage in STAGES):
        there = sorted({record.parent.name for stage in STAGES for record in run.parent.glob(f"*/{stage}.json")})
        others = f", or give the --run of one that is there ({', '.join(there)})" if 0 < len(there) < 20 else ""
        raise RunError(f"{run} is no run: train one with `python train.py --run {run.name}`{others}")


def refuse_missing(path):
    """Refuse to go on without a stage's model.

    Raises:
        RunError: naming the command that makes it.
    """
    if not path.exists():
        raise RunError(f"{path} is not there yet: run `python train.py {path.stem} --run {path.parent.name}` first")


def refuse_no_numbers(weights):
    """Raises ValueError where a weight is NaN or infinite: no training writes that down, and no picture comes of it."""
    for weight in weights:
        if not np.all(np.isfinite(keras.ops.convert_to_numpy(weight))):
            raise ValueError(f"its weights {weight.path} are no numbers")


@contextlib.contextmanager
def of_today(path, modern):
    """The path of a file, or, where its contents with today's names are given, of a temporary one that holds them."""
    if modern is None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        renamed = Path(folder) / path.name
        renamed.write_bytes(modern)
        yield renamed


def versions():
    """Versions of what the result depends on."""
    return {"python": platform.python_version(), "keras": keras.__version__, "tensorflow": tf.__version__}


# ---- one stage: checkpoints and resume -------------------------------------------------------------------------------


def start_from(model, path):
    """Give a model of a training that begins the weights of another run's, as far as they have its shapes.

    Say in one line what did not fit: layers for other labels or other covariates stay new, and so does what tells
    augmentation where the other run was not told.

    Args, Raises: as `fitting`.
    """
    pairs, fit = fitting(model, path)
    for new, old in fit:
        new.assign(old)
    print(f"starting from {path}: {len(fit)} of {len(pairs)} arrays of weights fit")


def fitting(model, path):
    """What a model of a training that begins can take over from another run's.

    Args:
        model: untrained.
        path: `.keras` file of a model of the same kind.

    Returns:
        [(weight, weight of the other)], all of them, and those of equal shapes.

    Raises:
        RunError: if it cannot be read, or is another network.
    """
    other = load_model(path)
    ours, theirs = model.weights, other.weights
    if len(ours) != len(theirs):  # where one alone is told what is augmented, that token stays new, or behind
        ours, theirs = ([each for each in found if "augmented_token" not in each.path] for found in (ours, theirs))
    pairs = list(zip(ours, theirs, strict=False))
    fit = [(new, old) for new, old in pairs if new.shape == old.shape]
    frozen = [new for new, old in pairs if new.shape != old.shape and not new.trainable]
    if len(ours) != len(theirs) or 2 * len(fit) < len(pairs) or frozen:
        values = {flag: [getattr(each, name, None) for each in (other, model)] for name, flag in SHAPING.items()}
        said = [f"{flag} {there} there, {here} here" for flag, (there, here) in values.items() if there != here]
        differs = f" ({'; '.join(said)})" * bool(said)
        raise RunError(
            f"--init-from: {path} is another network than the flags describe{differs}: give the flags of its run"
        )
    return pairs, fit


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
    """The history of a stage, tolerant of what interrupted runs leave behind.

    A run that was gone on with may repeat an epoch, whose later row counts, or the header; a killed one may end in half
    a row; "NA" is a value that was not measured in that epoch. NaN and infinity are kept: they are results.

    Returns:
        A row per epoch, in their order, {column: float} without what is no number; empty if there is no file.

    Raises:
        RunError: if it is no text, or no table of epochs.
    """
    if not Path(path).exists():
        return []
    rows = {}
    with unreadable(path, NO_HISTORY), open(path, newline="", encoding="utf-8") as file:
        table = csv.DictReader(file, strict=True)  # an open quote would swallow all that follows
        if table.fieldnames and table.fieldnames.count("epoch") != 1:
            raise ValueError("its first line does not name one column epoch")
        for row in table:
            numbers = {}
            for column, cell in row.items():
                with contextlib.suppress(TypeError, ValueError):
                    numbers[column] = float(cell)
            if math.isfinite(numbers.get("epoch", math.nan)):
                rows[numbers["epoch"]] = numbers
    return [rows[epoch] for epoch in sorted(rows)]


def resume(model, run, stage, steps_per_epoch):
    """Load the last checkpoint of a stage into a compiled model, if there is one.

    Rows of the history that the checkpoint does not hold, written just before an interruption, are dropped.

    Returns:
        Number of finished epochs.

    Raises:
        RunError: if the checkpoint is damaged, or another model's.
    """
    path, history = run / f"{stage}.last.weights.h5", run / f"{stage}.csv"
    if not path.exists():
        if is_chief():
            history.unlink(missing_ok=True)
        return 0
    way_out = "put its copy back, or remove it, and the stage begins anew"
    with unreadable(path, way_out), of_today(path, old_runs.modern_weights(path)) as today:
        model.load_weights(today)
        refuse_no_numbers(model.variables)
        counts = [
            model.optimizer.iterations,
            *([model.optimizer.skipped] if getattr(model.optimizer, "scaled", False) else []),
        ]
        epochs = sum(int(keras.ops.convert_to_numpy(count)) for count in counts) // steps_per_epoch
        if epochs < 0:
            raise ValueError("it counts fewer steps than none")
    if history.exists():
        with unreadable(history, NO_HISTORY):
            lines = history.read_text(encoding="utf-8").splitlines(keepends=True)[: 1 + epochs]
        if is_chief():
            files.write(history, "".join(lines))
    return epochs
