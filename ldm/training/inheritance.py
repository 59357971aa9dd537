"""What a run inherits that keeps another run's encoder: latents stay what they are, and so does all that learned them.

predecessor     the run from which a stage can be taken over
take_over       take it
"""

import shutil

from ldm.training import records, runs
from ldm.training.settings import identity, merged


def predecessor(run, stage, settings, manifest):
    """The run from which a stage can be taken over, instead of doing its work again.

    Args:
        run: folder.
        stage: one of `runs.STAGES`.
        settings: of the run.
        manifest: `dataset.Source.manifest` of the data.

    Returns:
        Its folder; None where this run trains its encoder or has begun the stage, or where the other run's has not
        come to its end with the same people and the same settings, except those that say how long it was trained.

    Raises:
        RunError: if the other run's record is damaged.
    """
    if stage == "autoencoder" or not settings["autoencoder"]["freeze_encoder"] or records.read(run, stage):
        return None
    before = runs.folder(settings["init_from"])
    record = records.read(before, stage)
    if record is None or record["data"]["splits"] != manifest["splits"]:
        return None
    theirs, ours = (identity(known, stage) for known in (record["settings"], settings))
    same = all(ours[option] == value for option, value in theirs.items() if option.name not in records.LENGTH)
    return before if same and records.is_finished(before, stage, record["settings"]) else None


def take_over(before, run, stage, settings, manifest):
    """Copy a stage, and write it down as this run's; returns the settings, with what the stage was trained with.

    Args:
        before: as `predecessor` returns.
        run, stage, settings, manifest: as there. The run's first stage is finished.
    """
    record = records.of(before, stage)
    settings = merged(settings, {stage: {**record["settings"][stage], "planned": True}})  # not by this run's settings
    if runs.is_chief():
        if stage == "latents":
            pieces = shutil.ignore_patterns("*.????????????????")  # of an encoding that was not finished
            shutil.copytree(before / stage, run / stage, dirs_exist_ok=True, ignore=pieces)
        for path in before.glob(f"{stage}.*"):
            if path.suffix != ".json":
                shutil.copy2(path, run / path.name)
    counted = records.of(run, "autoencoder") if stage == "latents" else record  # as `records.are_current` asks for
    more = {"columns": record["data"].get("columns"), "finished": True, "epochs": counted["epochs"]}
    records.write(run, stage, settings, manifest, **more)  # last, so that a copy that was cut short is made again
    return settings
