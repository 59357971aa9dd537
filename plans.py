"""`--minutes`: time a stage on this machine, and plan it; the arithmetic is `ldm.training.planning`."""

import time

import tensorflow as tf

import dataset
import encoding
import stages
from ldm.data.latents import ranges
from ldm.training import planning, prior, records, runs
from ldm.training.settings import arguments, merged

SPLITS = (("train", True), ("validate", False))  # and whether it is for training


def planned(stage, run, settings, source, strategy, budget):
    """The settings of a run, with those of a stage planned to end when the time is up.

    Args:
        stage: one of `runs.STAGES`, not begun yet.
        run, settings, source, strategy: as everywhere in `stages`.
        budget: `planning.Budget`.

    Raises:
        RunError: if the time is too short.
    """
    left = budget.left(stage)
    if left <= 0 and stage != "latents":  # these take a view where there is no time for more
        raise runs.RunError(
            f"--minutes was over before the {stage} stage began, by {-left / 60:.1f} minutes: give more of them, "
            "or --epochs and --steps-per-epoch"
        )
    print(f"{stage}: timing a few steps, to plan for {max(left, 0) / 60:.1f} minutes", flush=True)
    began = time.time()
    if stage == "latents":
        plan = {"views": views(run, settings, source, left)}
    else:
        epochs, steps = trained(stage, run, settings, source, strategy, budget)
        plan = {"epochs": epochs, "steps_per_epoch": steps}
    settings = merged(settings, {stage: {**plan, "planned": True}})
    if stage == "autoencoder" and settings["first_stage"] == "vae":  # as `stages.with_found` does
        settings = merged(settings, {stage: {"kl_cycle_steps": epochs * steps // 2}})
    said = ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in plan.items())
    print(f"{stage}: planned {said}, in {time.time() - began:.0f} seconds", flush=True)
    return settings


def trained(stage, run, settings, source, strategy, budget):
    """(epochs, steps per epoch) of a stage with a network; of a first stage, tells the budget what latents need."""
    end, group, averaged = time.time() + budget.left(stage), settings[stage], stage != "autoencoder"
    counts = {split: len(source.select(split)) for split in ("train", "validate")}
    model, train, validation = subject(stage, run, settings, source, strategy)
    stages.compile_for_training(model, group["learning_rate"], 1000, averaged)
    speed = planning.measure(model, train, validation, group["batch_size"])
    del model
    shown = stages.SHOWN * (stages.SHOWN_CALLS if stage == "diffusion" else 1)
    afterwards = 0
    if stage == "autoencoder":
        # it encodes training slices once more for the latents' statistics, a VQ-VAE again to count its codes; then each
        # slice is encoded for the latents' stage. Encoding is half of what validation does
        afterwards = {"vae": 0.5, "vqvae": 1.0}[settings["first_stage"]] * min(counts["train"], stages.MEASURED)
        budget.needs["latents"] = 0.5 * speed.row * sum(counts.values())
    at_end = min(counts["validate"], settings["validation_slices"]) + shown
    left = min(end - time.time(), budget.left(stage))  # what is known of the latents by now may make it shorter
    return planning.plan(left, speed, group["epochs"], at_end, afterwards)


def subject(stage, run, settings, source, strategy):
    """The model that a stage trains, untrained, with its data: (model, training batches, validation batches)."""
    labels, group = len(source.label_names), stages.with_steps(settings[stage], source)
    if stage == "autoencoder":
        with strategy.scope():
            _, model = stages.make_first_stage(settings, group, labels)
            if group["gan"]:
                model.begun.assign(0.0)  # timed with the discriminator, without which no step is made in the end
        batches = [stages.first_stage_batches(settings, source, *split) for split in SPLITS]
    elif stage == "diffusion":
        columns, in_pixels = source.columns(group["conditions"]), settings["first_stage"] == "none"
        with strategy.scope():
            clip = in_pixels or ranges(run / "latents" / "train.npz")
            model = stages.make_diffusion(settings, labels, stages.covariate_sizes(columns), clip)
        batches = [stages.diffusion_batches(run, settings, source, columns, *split) for split in SPLITS]
    else:
        first = records.load_first_stage(run)
        with strategy.scope():
            options = {"num_labels": labels, "seed": settings["seed"], **arguments(settings, "CodePrior")}
            model = prior.CodePrior(first.num_codes, first.code_shape, **options)
        batches = [
            dataset.make_latents_dataset(run / "latents" / f"{split}.npz", group["batch_size"], training, codes=True)
            for split, training in SPLITS
        ]
    return model, *batches


def views(run, settings, source, left):
    """How many views of the training slices there is time to encode, at least one and at most as many as are set."""
    first = records.load_first_stage(run)
    plain = dataset.make_dataset(source, "train", settings["image_size"], encoding.BATCH, training=False)
    encode, times, began = tf.function(first.encode, reduce_retracing=True, autograph=False), [], time.time()
    for batch in plain.take(4):
        encode(batch["image"], batch["z"], batch["label"])
        times.append(time.time() - began)
    batch = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else times[0]
    one = batch * len(source.select("train")) / encoding.BATCH
    left -= times[-1] + times[0] + batch * len(source.select("validate")) / encoding.BATCH
    return max(1, min(settings["latents"]["views"], int(left / one)))
