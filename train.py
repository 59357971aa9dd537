"""Command line: train the stages of a run, each from where it stands.

    python train.py                       all stages on phantom brains, minutes on a CPU
    python train.py autoencoder ...       images  -> first stage        autoencoder.keras
    python train.py latents ...           images  -> their latents      latents/*.npz
    python train.py diffusion ...         latents -> denoising network  diffusion.keras
    python train.py prior ...             codes   -> transformer        prior.keras      (not one of all stages)

Settings come from a preset, then from what the run already is, then from the flags. To resume, run the same command.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import command

if __name__ == "__main__":
    command.from_the_start("train.py")

import numpy as np

import dataset
from ldm import files
from ldm.data import people, phantom
from ldm.later import Later
from ldm.training import distribution, inheritance, presets, records, runs
from ldm.training import settings as schema

stages, encoding, plans = Later("stages"), Later("encoding"), Later("plans")  # they take seconds to import
planning = Later("ldm.training.planning")
BEGAN = time.time()

OPENED = ("seed", "axis", "labels", "person", "contrast", "missing", "center")  # settings that say how data is read


# ---- flags -> settings -----------------------------------------------------------------------------------------------


def parser():
    """The flags, as `ldm.training.settings` declares them. Those left out are None, and override nothing."""
    p = command.Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("stage", nargs="?", default="all", choices=("all", *runs.STAGES))
    for title, options in schema.flags().items():
        group = p.add_argument_group(title)
        for option in options:
            words = {"help": option.help, "default": None}
            if option.group == "command" and option.kind is bool:
                words["action"] = "store_true"
            elif option.kind is bool:
                words["action"] = argparse.BooleanOptionalAction
            else:
                choices = tuple(presets.PRESETS) if option.name == "preset" else option.choices or None
                words |= {"type": option.kind, "choices": choices, "nargs": option.many}
            group.add_argument(option.spelt, **words)
    return p


def resolve(flags):
    """Flags -> (run folder, stages to do, settings).

    Raises:
        RunError: flags that contradict each other or what the run already is.
    """
    given = {word: value for word, value in vars(flags).items() if value is not None}
    schema.check_command(given)
    run = folder_of(flags)
    base = None if flags.preset else records.settings_of(run)
    base = presets.of(flags.preset or "phantom") if base is None else base
    if made := records.read(run, "autoencoder"):  # what was found when training began stays so
        found = {key: made["settings"]["autoencoder"].get(key) for key in ("crop_box", "kl_cycle_steps")}
        base = schema.merged(base, {"autoencoder": found})
    if flags.data and len(flags.data) == 1:
        given["data"] = flags.data[0]
    todo = runs.STAGES[:3] if flags.stage == "all" else (flags.stage,)
    settings = schema.with_flags(base, given, todo)
    if settings["first_stage"] == "none":
        if flags.stage in ("autoencoder", "latents", "prior"):
            raise runs.RunError(f"--autoencoder none works in pixels and has no {flags.stage} stage: leave it out")
        todo = ("diffusion",)
    if flags.stage == "prior" and settings["first_stage"] == "vae":
        raise runs.RunError(
            "a prior draws codes, and --autoencoder vae has none: train a vqvae, or diffusion on this one"
        )
    settings = planned_by_minutes(run, settings, given, todo)
    trained = next((stage for stage in todo if stage in schema.TRAINED), None)
    if "init_from" in given and not (runs.folder(flags.init_from, "--init-from") / f"{trained}.keras").exists():
        raise runs.RunError(f"--init-from {flags.init_from}: no run of that name has a trained {trained} stage")
    for stage in runs.STAGES:
        records.refuse_change(run, stage, settings)
    records.refuse_new_ground(run, todo, settings)
    return run, todo, settings


def folder_of(flags):
    """The folder of the run that is named, or else by its data, or its preset; never that of the shipped model.

    Raises:
        RunError: if that one is named.
    """
    named_by_data = Path(flags.data[0]).name.split(".")[0] if flags.data else None
    run = runs.folder((named_by_data or flags.preset or "phantom") if flags.run is None else flags.run)
    if (run / "shipped.json").exists():
        if flags.run:
            raise runs.RunError(f"{run} comes with this repository: give another --run, or remove {run}/shipped.json")
        run = run.with_name(f"my-{run.name}")
    return run


def planned_by_minutes(run, settings, given, todo):
    """The settings, with the plans of stages that have begun; without minutes where somebody says what they plan.

    Raises:
        RunError: if --minutes stands beside what it plans.
    """
    said = [name for name in records.LENGTH if name in given]
    if said and "minutes" in given:
        raise runs.RunError(f"--minutes plans --{said[0].replace('_', '-')}: leave one of them out")
    settings = records.with_plans(run, settings, said, todo)
    return schema.merged(settings, {"minutes": None}) if said else settings


def make_strategy(replicas, todo, settings):
    """The `tf.distribute` strategy, among whose replicas the batches of all stages divide.

    Args:
        replicas: as given; None for what there is.
        todo: stages.
        settings: of the run.

    Raises:
        RunError: if there are not so many, or a batch does not divide.
    """
    try:
        strategy = distribution.make_strategy(replicas)
    except ValueError as error:
        raise runs.RunError(str(error)) from error
    refuse_uneven(strategy.num_replicas_in_sync, todo, settings)
    return strategy


def refuse_uneven(replicas, todo, settings):
    """Refuse batches that do not divide among so many replicas, and the parts of each.

    Raises:
        RunError: naming the stage.
    """
    for stage in todo:
        rows, parts = settings[stage].get("batch_size", replicas), settings[stage].get("accumulate", 1)
        if rows % (replicas * parts):
            times = f" times the {parts} parts of --accumulate" if parts > 1 else ""
            times += " (--replicas says how many)" if replicas > 1 else ""
            raise runs.RunError(f"--batch-size {rows} of {stage} must be divisible by the {replicas} replicas{times}")


def chosen_preset(flags):
    """Choose the preset by the slices and the machine where the user names data and no preset; says which, and why.

    Returns:
        The source that was opened for it; None where nothing was to be chosen, as in a run that is gone on with.
    """
    if not flags.data or flags.preset or any((folder_of(flags) / f"{stage}.json").exists() for stage in runs.STAGES):
        return None
    given = {word: value for word, value in vars(flags).items() if value is not None}
    told = {name: given.get(name, schema.defaults()[name]) for name in OPENED}
    source = open_data({**told, "data": flags.data[0] if len(flags.data) == 1 else flags.data})
    command.load("train.py", "tensorflow")
    machine = distribution.machine()
    slices = int((source.split == "train").sum())
    minutes = flags.minutes if flags.stage == "all" and not flags.image_size else None
    flags.preset, why = presets.choose(flags.image_size or max(source.shape), slices, machine, minutes)
    kind = f", labels {' and '.join(source.label_names)}" if source.label_names else ""
    print(f"no --preset given: {flags.preset}, for {why} ({len(np.unique(source.case))} people{kind})")
    return source


def open_data(settings, dry_run=False):
    """The source of slices, drawing the phantoms first where no data is named; None in a dry run without them."""
    if settings["data"] is None and dry_run and not phantom.STAND_IN.exists():
        print(f"no --data given: would draw {phantom.STAND_IN_PEOPLE} phantom brains into {phantom.STAND_IN}")
        return None
    read = {name: settings[name] for name in OPENED}
    return dataset.open_source(phantom.stand_in() if settings["data"] is None else settings["data"], **read)


# ---- the command -----------------------------------------------------------------------------------------------------


def announce(stage, run, settings, source, replicas, precision):
    """One line that says what is about to happen; returns the networks {stage: untrained model}."""
    sizes, cropped, group, models = [], "", settings["autoencoder"], {}
    if settings["first_stage"] != "none":
        first = models["autoencoder"] = stages.make_autoencoder(settings, len(source.label_names))
        gan = " + discriminator" if group["gan"] else ""
        sizes.append(f"{settings['first_stage']} {first.count_params() / 1e6:.1f} M{gan}")
        height, width = first.crop_box[2:]
        cropped = f" cropped to {height}x{width}" if group["crop_box"] else ""
    covariates = stages.covariate_sizes(source.columns(settings["diffusion"]["conditions"]))
    unet = models["diffusion"] = stages.make_diffusion(settings, len(source.label_names), covariates)
    sizes.append(f"U-Net {unet.count_params() / 1e6:.1f} M parameters")
    people = [len(np.unique(source.case[source.split == split])) for split in dataset.SPLITS]
    print(
        f"{stage}: {source.path}, {len(source.entries)} slices, people {'/'.join(map(str, people))} in "
        f"train/validate/test | {settings['image_size']}x{settings['image_size']}{cropped}, {', '.join(sizes)} | "
        f"{precision}, {replicas} replica{'s' * (replicas > 1)} | {run}/",
        flush=True,
    )
    return models


def show(settings, todo):
    """Print the settings: a line for those of the whole run, and one for each stage to do.

    Where `--minutes` will plan a stage, it says so in the place of what is planned.
    """
    whole = {key: value for key, value in settings.items() if key not in runs.STAGES}
    for title, group in (("settings", whole), *((stage, settings[stage]) for stage in todo)):
        if settings["minutes"] and not group.get("planned", True):
            planned = group.keys() & {"epochs", "steps_per_epoch", "views"}
            group = group | dict.fromkeys(planned, "as --minutes plans")
        print(f"{title}: {json.dumps(group)}")


def what_next(stage, name, preset):
    """What to run after a stage of the run of that name: a line, or two after a preset that has a sharper one."""
    following = {"autoencoder": "train.py latents", "latents": "train.py diffusion"}
    following["prior"] = "predict.py --prior transformer"
    lines = [f"next: python {following.get(stage, 'predict.py')} --run {name}"]
    if stage == "diffusion" and f"{preset}-sharp" in presets.PRESETS:
        sharper = f"python train.py --preset {preset}-sharp --init-from {name} --run {name.rstrip('/')}-sharp"
        lines += [f"sharper: {sharper}, and the flags that say the data"]
    return "\n".join(lines)


def work(flags):
    """Do what the flags say; returns the exit status."""
    files.check_folder(folder_of(flags))
    runs.is_chief()  # refuses a damaged TF_CONFIG
    opened = chosen_preset(flags)
    run, todo, settings = resolve(flags)
    refuse_uneven(flags.replicas or 1, todo, settings)
    if not flags.self_test:  # which makes all that it needs
        records.refuse_unready(run, todo[0], settings)
    if opened is not None:  # before it was known whether its preset moves heads to the middle
        opened = dataclasses.replace(opened, center=settings["center"])
    source = opened or open_data(settings, flags.dry_run)
    if source is None:
        show(settings, todo)
        return 0
    records.refuse_missing(settings, source)
    manifest = source.manifest()
    if not flags.self_test:  # which writes nothing
        records.refuse_other_people(run, manifest)
    command.load("train.py", "stages")  # from here on TensorFlow is needed
    strategy = make_strategy(flags.replicas, todo, settings)
    precision = distribution.set_precision(flags.precision or "auto")
    settings = stages.with_found(settings, source)
    schema.check_levels(settings)
    if (
        settings["first_stage"] != "none"
        and settings["autoencoder"]["crop"]
        and not settings["autoencoder"]["crop_box"]
    ):
        print("--crop: heads lie everywhere in the pictures, so nothing is cropped; --center may help")
    models = announce(flags.stage, run, settings, source, strategy.num_replicas_in_sync, precision)
    for stage in todo:
        there = stages.beginning(run, stage, settings)
        if there and stage in models:
            runs.fitting(models[stage], there)  # refused now, not when its turn comes
    del models
    found = {stage: inheritance.predecessor(run, stage, settings, manifest) for stage in todo}
    taken = {stage: before for stage, before in found.items() if before}
    if flags.stage != "all":
        for stage, before in taken.items():
            print(f"{stage}: {before}/ has one for this encoder: `python train.py --run {run.name}` takes it over")
        taken = {}
    if flags.dry_run:
        print("\n".join(people.describe(source)))
        show(settings, [stage for stage in todo if stage not in taken])
        for stage, before in taken.items():
            print(f"{stage}: to be taken over from {before}/, whose encoder this run keeps")
        return 0
    if flags.self_test:
        return overfit(flags.stage, settings, source, strategy)
    with runs.training(run):
        finished = [stage for stage in todo if records.is_finished(run, stage, settings)]
        trained = [stage for stage in todo if stage not in taken]
        budget = settings["minutes"] and planning.Budget(settings["minutes"], trained, finished, BEGAN)
        for stage in todo:
            if stage in taken:
                settings = inheritance.take_over(taken[stage], run, stage, settings, manifest)
                distribution.wait_for_all(strategy)
                print(f"{stage}: taken over from {taken[stage]}/, whose encoder this run keeps")
            else:
                settings = do_stage(stage, run, settings, source, manifest, strategy, budget, flags.verbose)
    print(what_next(todo[-1], flags.run or run.name, flags.preset if "autoencoder" in todo else None))
    return 0


def do_stage(stage, run, settings, source, manifest, strategy, budget=None, verbose=False):
    """Train one stage to its end, if it has not come there before; returns the settings, with its plan if it got one.

    Args:
        budget: of `--minutes`, `ldm.training.planning`; None where nothing is planned.
        verbose: whether all metrics are shown.
        Others: as everywhere in `stages`.
    """
    finished = records.is_finished(run, stage, settings)
    distribution.wait_for_all(strategy)  # nobody writes before all have looked
    if finished:
        print(f"{stage}: finished before; its result is in {run}/")
        return settings
    start = time.time()
    with dataset.data_errors(source):
        if budget and not (run / f"{stage}.json").exists():
            settings = plans.planned(stage, run, settings, source, strategy, budget)
        if stage == "autoencoder":
            stages.train_autoencoder(run, settings, source, manifest, strategy, verbose)
        elif stage == "latents":
            encoding.encode_latents(run, settings, source, manifest)
        elif stage == "diffusion":
            stages.train_diffusion(run, settings, source, manifest, strategy, verbose)
        else:
            stages.train_prior(run, settings, source, manifest, strategy, verbose)
    distribution.wait_for_all(strategy)
    print(f"{stage}: done in {(time.time() - start) / 60:.1f} minutes")
    return settings


def overfit(stage, settings, source, strategy):
    """Run the overfit test; returns the exit status.

    Raises:
        RunError: if a network does not learn what it is shown.
    """
    if stage == "prior":
        raise runs.RunError("--self-test tries the first stage and the diffusion model: leave `prior` out")
    with dataset.data_errors(source):
        if stages.overfit_test(settings, source, strategy):
            return 0
    raise runs.RunError("self-test failed: try a lower --learning-rate, --precision float32, or a larger --width")


def main(argv=None):
    """Run the command line; returns the exit status: 0 done, 2 a user's mistake, 130 or 143 interrupted."""
    flags = parser().parse_args(argv)
    hint = "" if flags.dry_run else "all that is finished is saved: run the same command to go on"
    return command.run("train.py", lambda: work(flags), (dataset.DataError, runs.RunError), hint)


if __name__ == "__main__":
    command.leave(main())
