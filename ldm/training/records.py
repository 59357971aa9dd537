"""`<stage>.json`: what a stage writes down of itself, and what may be made of a run that has such records already.

What is read is checked in one place, `read`, against SHAPE and the schema of settings: who reads a record relies on it.
Every refusal is a `RunError`, one sentence that says the way out, before any long work starts.
"""

import itertools
import math

from ldm import shapes
from ldm.training import old_runs, runs
from ldm.training.settings import at, check_value, defaults, identity, known, latent_shape, merged, places

SPLIT = {"people": int, "images": int, "cases": [str], str: object}
SHAPE = {  # of a record, as `ldm.shapes` has it; what an older version did not write down may be missing
    "stage?": str,
    "settings": {
        **{f"{stage}?": {str: object} for stage in runs.STAGES},
        **{"image_size": int, "first_stage": str, "seed": int, str: object},
    },
    "versions": {str: str},
    "data": {
        "source": str,
        "kind": str,
        "images": int,
        "labels": [str],
        "z": (int, int),
        "splits": {"train": SPLIT, "validate": SPLIT, "test": SPLIT},
        "columns?": {str: {"kind": str, "values?": [str], "mean?": shapes.NUMBER, "std?": shapes.NUMBER}},
        str: object,
    },
    "finished?": bool,
    "epochs?": int,
    str: object,
}
LAST_Z = 100_000  # no scan has so many slices
LENGTH = ("epochs", "steps_per_epoch", "views")  # settings that say how long a stage is trained, or how much is stored


# ---- reading ---------------------------------------------------------------------------------------------------------


def read(run, stage):
    """What a stage wrote down, with today's names of settings, and defaults where an older version had none.

    Args:
        run: folder.
        stage: one of `runs.STAGES`.

    Returns:
        A dictionary of the shape SHAPE, or None where the stage has not begun.

    Raises:
        RunError: if it is damaged, or something else than a record of this stage.
    """
    path = run / f"{stage}.json"
    record = runs.load_json(path)
    if record is None:
        return None
    with runs.unreadable(path, "put its copy back, or give a new run a name with --run"):
        if said := shapes.problems(record, SHAPE, "it"):
            raise ValueError(said[0])
        settings = merged(defaults(), known(old_runs.modern_settings(record["settings"])))
        record = {**record, "settings": settings}
        refuse_impossible(record, stage)
    return record


def refuse_impossible(record, stage):
    """Refuse what no stage can have written down.

    Args:
        record: of the shape SHAPE.
        stage: whose record it should be.

    Raises:
        ValueError: saying what of it, as do values of settings, by their flag.
    """
    data, settings = record["data"], record["settings"]
    if record.get("stage", stage) != stage:
        raise ValueError(f"it is the record of the stage {record['stage']}")
    for group, key, option in places():
        check_value(option, at(settings, group, key))
    size, box = settings["image_size"], settings["autoencoder"]["crop_box"]
    if box and (len(box) != 4 or max(box[0] + box[2], box[1] + box[3]) > size or not min(box[2:])):
        raise ValueError(f"autoencoder.crop_box {box} is no part of {size}x{size} pixels")
    first, last = data["z"]
    if not 0 <= first <= last <= LAST_Z:
        raise ValueError(f"its slices cannot lie between {first} and {last}")
    if data["labels"] != sorted(set(data["labels"])):
        raise ValueError("its labels are not in their order")
    for name, column in data.get("columns", {}).items():
        mean, std, values = (column.get(key) for key in ("mean", "std", "values"))
        numbers = None not in (mean, std) and math.isfinite(mean) and math.isfinite(std) and std > 0
        if not (numbers if column["kind"] == "number" else values and column["kind"] == "category"):
            raise ValueError(f"its column {name} is neither numbers nor words")
    if record.get("epochs", 0) < 0:
        raise ValueError("it counts fewer epochs than none")


def of(run, stage):
    """What a stage that must be there wrote down.

    Raises:
        RunError: if it is not there, or as `read`.
    """
    record = read(run, stage)
    if record is None:
        again = f"run `python train.py {stage} --run {run.name}`, which writes it again"
        raise runs.RunError(f"{run / stage}.json is not there: {again}")
    return record


def refuse_damaged(run, *stages):
    """Look at what stages have written, if they have, without TensorFlow, whose import takes seconds.

    Raises:
        RunError: if a model is damaged or another stage's, its record is not there or as in `read`, or there is no
            first stage where one is needed.
    """
    for stage in stages:
        if (run / f"{stage}.keras").exists():
            runs.refuse_damaged(run / f"{stage}.keras")
            if of(run, stage)["settings"]["first_stage"] != "none":
                runs.refuse_missing(run / "autoencoder.keras")


def all_of(run):
    """{stage: what the run wrote down of it}, of the stages that it has begun.

    Raises:
        RunError: if it has none, so that the folder is no run; if they tell of other slices; as `read`.
    """
    runs.refuse_no_run(run)
    found = {stage: record for stage in runs.STAGES if (record := read(run, stage))}
    refuse_strangers(run, found)
    return found


def refuse_strangers(run, records):
    """Refuse records that are not of one run: its stages see the same people and slices, and latents of one shape.

    Args:
        run: folder.
        records: {stage: record}.

    Raises:
        RunError: naming two that differ.
    """
    seen = {stage: (r["data"]["splits"], r["data"]["z"], latent_shape(r["settings"])) for stage, r in records.items()}
    for one, other in itertools.pairwise(seen):
        if seen[one] != seen[other]:
            raise runs.RunError(
                f"{run}: {one}.json and {other}.json tell of other people, slices or latents, so they are not of one "
                "run: put the copy of the right one back"
            )


def load(run, stage):
    """The model of a stage, and its record, which belong together.

    Returns:
        (model, record).

    Raises:
        RunError: if one of them is not there or damaged, or they are of two runs.
    """
    model, record = runs.load_model(run / f"{stage}.keras"), of(run, stage)
    for what, (held, said) in _both(stage, model, record).items():
        if held != said:
            raise runs.RunError(
                f"{run}: {stage}.keras has {held} as its {what}, and {stage}.json says {said}, so they are not of one "
                "run: put the copy of the right one back"
            )
    return model, record


def _both(stage, model, record):
    """{what: (as the model has it, as the record says it)} of what both know; a network may be told no labels."""
    settings, told = record["settings"], model.unet if stage == "diffusion" else model
    labels = {"number of labels": (told.num_labels, len(record["data"]["labels"]))} if told.num_labels else {}
    if stage == "prior":
        return labels
    if stage == "autoencoder":
        return {
            "kind": (type(model).__name__.lower(), settings["first_stage"]),
            "image size": (model.image_size, settings["image_size"]),
            "shape of latents": (tuple(model.latent_shape), latent_shape(settings)),
            **labels,
        }
    columns = [len(column.get("values", ())) for column in record["data"].get("columns", {}).values()]
    return {
        "shape of what is denoised": (tuple(model.data_shape), latent_shape(settings)),
        "columns": (list(told.covariates), columns),
        **labels,
    }


def unfinished(run, stage):
    """ " after epoch 2 of 4", of a stage that is still in training; empty of one that is finished."""
    record = read(run, stage)
    if record is None or record.get("finished"):
        return ""
    done = len(runs.read_history(run / f"{stage}.csv"))
    return f" after epoch {done} of {record['settings'][stage]['epochs']}"


def load_first_stage(run):
    """The first stage of a run, trained to its end: only then are its latents measured.

    Raises:
        RunError: if it is still in training; as `load`.
    """
    model, record = load(run, "autoencoder")
    _refuse_unfinished(run, record)
    return model


def _refuse_unfinished(run, record):
    if not record.get("finished"):
        raise runs.RunError(
            f"{run}: its first stage is still in training: run `python train.py autoencoder --run {run.name}`"
        )


def refuse_unready(run, stage, settings):
    """Refuse a stage whose predecessors are not done.

    Args:
        run: folder.
        stage: one of `runs.STAGES`, the first that is to be done.
        settings: of the run.

    Raises:
        RunError: naming what is missing, and the command that makes it.
    """
    if stage == "autoencoder" or settings["first_stage"] == "none":
        return
    first = run / "autoencoder.keras"
    if not first.exists():
        raise runs.RunError(
            f"{first} is not there yet: run `python train.py autoencoder --run {run.name}` first, with the same --data "
            "and --preset"
        )
    _refuse_unfinished(run, of(run, "autoencoder"))
    for split in ("train", "validate") if stage != "latents" else ():
        path = run / "latents" / f"{split}.npz"
        if not path.exists():
            raise runs.RunError(f"{path} is not there yet: run `python train.py latents --run {run.name}` first")


def settings_of(run):
    """The settings of a run so far, each stage's own as it wrote them down; None for a run without a stage."""
    found = {stage: record["settings"] for stage in runs.STAGES if (record := read(run, stage))}
    settings = None
    for values in found.values():
        settings = values if settings is None else merged(settings, values)
    return settings and merged(settings, {stage: found[stage][stage] for stage in found})


# ---- writing, and going on -------------------------------------------------------------------------------------------


def write(run, stage, settings, manifest, *, columns=None, **more):
    """Write `<stage>.json`.

    Args:
        run: folder.
        stage: one of `runs.STAGES`.
        settings: of the run.
        manifest: `dataset.Source.manifest` of the data.
        columns: what the table says of each condition, `dataset.Source.columns`.
        more: what else is said of the stage: whether it is finished, after how many epochs, ...

    Raises:
        RunError: if the stage was begun with another table of people.
    """
    columns = columns or {}
    stored = read(run, stage)
    if stored and stored["data"].get("columns", columns) != columns:
        raise runs.RunError(
            f"{run}: its {stage} stage was begun with another table of people ({', '.join(columns)}): give the new "
            "run a name with --run"
        )
    about = {"settings": settings, "versions": runs.versions(), "data": {**manifest, "columns": columns}}
    runs.save_json(run / f"{stage}.json", {"stage": stage, **about, **more})


def is_finished(run, stage, settings):
    """Whether a stage was trained to the end for as many epochs as the settings ask for."""
    stored = read(run, stage) or {}
    if stage == "latents":
        there = all((run / "latents" / f"{split}.npz").exists() for split in ("train", "validate"))
        same = stored.get("settings", {}).get("labels") == settings["labels"]
        return there and same and are_current(run)
    return stored.get("finished", False) and settings[stage]["epochs"] <= stored.get("epochs", 0)


def are_current(run):
    """Whether the stored latents are those of the first stage as it is, which may have been trained further since."""
    stored, first = (read(run, stage) or {} for stage in ("latents", "autoencoder"))
    return stored.get("finished", False) and stored.get("epochs", first.get("epochs")) == first.get("epochs")


def with_plans(run, settings, besides=(), stages=runs.STAGES):
    """The settings, with how long the stages that have begun are trained, where that was planned.

    Args:
        run: folder.
        settings: of the run.
        besides: names of settings that somebody asks for otherwise.
        stages: of which they ask it; the others stay as they were planned.
    """
    plans = {}
    for stage in runs.STAGES:
        group = (read(run, stage) or {"settings": {}})["settings"].get(stage, {})
        if group.get("planned"):
            kept = {"planned", *LENGTH}.difference(besides if stage in stages else ())
            plans[stage] = {key: group[key] for key in kept if key in group}
    return merged(settings, plans)


def refuse_change(run, stage, settings):
    """Refuse to go on with a stage that was begun with other settings.

    Raises:
        RunError: naming the flag.
    """
    stored = read(run, stage)
    if not stored:
        return
    before, now = (identity(values, stage) for values in (stored["settings"], settings))
    for option, value in now.items():
        if before[option] != value:
            raise runs.RunError(
                f"{run}: its {stage} stage was begun with {option.spelt} {_typed(before[option])}, not "
                f"{_typed(value)}: leave the flag, or the --preset that says so, out to go on, or give the new run a "
                "name with --run"
            )


def _typed(value):
    """A value of a setting as one types it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def refuse_new_ground(run, stages, settings):
    """Refuse to train a finished first stage further under a second stage that was built on it.

    Raises:
        RunError: naming that second stage.
    """
    finished = (read(run, "autoencoder") or {}).get("finished", False)
    further = "autoencoder" in stages and finished and not is_finished(run, "autoencoder", settings)
    above = [stage for stage in ("diffusion", "prior") if (run / f"{stage}.json").exists()]
    if further and above:
        raise runs.RunError(
            f"{run}: more --epochs for the first stage would change the latents under its {above[0]} stage: say "
            f"`train.py {above[0]}` to train that further, or give the new run a name with --run"
        )


def refuse_other_people(run, manifest):
    """Refuse data with other people than a stage of this run has seen.

    Raises:
        RunError: naming the stage and what it saw.
    """
    for stage in runs.STAGES:
        stored = read(run, stage)
        if stored and stored["data"]["splits"] != manifest["splits"]:
            raise runs.RunError(
                f"{run}: its {stage} stage was trained on {stored['data']['source']} with other people in its splits "
                f"than {manifest['source']}: give the new run a name with --run"
            )


def refuse_missing(settings, source):
    """Refuse settings by which a stage is to learn what the data does not have.

    Raises:
        RunError: naming the flag.
    """
    first, second = settings["autoencoder"], settings["diffusion"]
    for name in second["conditions"]:
        if name not in source.covariates:
            known = f"has {', '.join(source.covariates)}" if source.covariates else "has none beside the label"
            raise runs.RunError(
                f"--conditions {name}: the table of {source.path} {known}: name one of these, or give --labels"
            )
    if first["condition_on_label"] and not source.label_names:
        raise runs.RunError(f"--condition-on-label needs labels, and {source.path} has none: leave the flag out")
    masks = {"--condition-on-mask": second["condition_on_mask"]}
    masks["--segment"] = first["segment"] and settings["first_stage"] != "none"
    for flag, wanted in masks.items():
        if wanted and not source.masks:
            raise runs.RunError(f"{flag} needs tissue masks, and {source.path} has none: leave the flag out")
