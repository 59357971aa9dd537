"""`<stage>.json`: what a stage writes down of itself, and what may be made of a run that has such records already.

Every refusal is a `RunError`, one sentence that says the way out, before any long work starts.
"""

from ldm.training import runs
from ldm.training.settings import defaults, identity, known, merged


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
    stored = runs.load_json(run / f"{stage}.json")
    if stored and stored["data"].get("columns", columns) != columns:
        raise runs.RunError(
            f"{run}: its {stage} stage was begun with another table of people ({', '.join(columns)}): give the new "
            "run a name with --run"
        )
    about = {"settings": settings, "versions": runs.versions(), "data": {**manifest, "columns": columns}}
    runs.save_json(run / f"{stage}.json", {"stage": stage, **about, **more})


def is_finished(run, stage, settings):
    """Whether a stage was trained to the end for as many epochs as the settings ask for."""
    stored = runs.load_json(run / f"{stage}.json") or {}
    if stage == "latents":
        there = all((run / "latents" / f"{split}.npz").exists() for split in ("train", "validate"))
        same = stored.get("settings", {}).get("labels") == settings["labels"]
        return there and same and are_current(run)
    return stored.get("finished", False) and settings[stage]["epochs"] <= stored.get("epochs", 0)


def are_current(run):
    """Whether the stored latents are those of the first stage as it is, which may have been trained further since."""
    stored, first = (runs.load_json(run / f"{stage}.json") or {} for stage in ("latents", "autoencoder"))
    return stored.get("finished", False) and stored.get("epochs", first.get("epochs")) == first.get("epochs")


def with_plans(run, settings):
    """The settings, with what `--minutes` has planned for the stages that have begun."""
    plans, planned = {}, ("planned", "epochs", "steps_per_epoch", "views")
    for stage in runs.STAGES:
        group = (runs.load_json(run / f"{stage}.json") or {"settings": {}})["settings"].get(stage, {})
        if group.get("planned"):
            plans[stage] = {key: group[key] for key in planned if key in group}
    return merged(settings, plans)


def refuse_change(run, stage, settings):
    """Refuse to go on with a stage that was begun with other settings.

    Raises:
        RunError: naming the flag.
    """
    stored = runs.load_json(run / f"{stage}.json")
    if not stored:
        return
    # what an older version did not write down was its default
    before, now = (identity(values, stage) for values in (merged(defaults(), known(stored["settings"])), settings))
    for option, value in now.items():
        if before[option] != value:
            raise runs.RunError(
                f"{run}: its {stage} stage was begun with {option.spelt} {_typed(before[option])}, not "
                f"{_typed(value)}: leave the flag out to go on, or give the new run a name with --run"
            )


def _typed(value):
    """A value of a setting as one types it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def refuse_new_ground(run, stages, settings):
    """Refuse to train a finished first stage further under a second stage that was built on it.

    Raises:
        RunError: naming that second stage.
    """
    finished = (runs.load_json(run / "autoencoder.json") or {}).get("finished", False)
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
        stored = runs.load_json(run / f"{stage}.json")
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
