"""Command line: train the stages of a run, each from where it stands.

    python train.py                       all stages on phantom brains, minutes on a CPU
    python train.py autoencoder ...       images  -> first stage        autoencoder.keras
    python train.py latents ...           images  -> their latents      latents/*.npz
    python train.py diffusion ...         latents -> denoising network  diffusion.keras
    python train.py prior ...             codes   -> transformer        prior.keras      (not one of all stages)

Settings come from a preset, then from what the run already is, then from the flags. To resume, run the same command.
"""

import argparse
import functools
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported

import keras
import numpy as np
import tensorflow as tf
from einops import rearrange

import dataset
import features
import modules
from ldm import tissue
from ldm.data import latents as latents_file
from ldm.data import masks as tissue_masks
from ldm.diffusion import guidance, samplers, schedules
from ldm.drawing import charts, figures
from ldm.judging import metrics
from ldm.training import adversary, callbacks, distribution, rules, runs
from ldm.training.presets import DEFAULTS, PRESETS, merged

PHANTOM, PHANTOM_PEOPLE = Path("dataset/phantom.zip"), 96
KID_SAMPLES, KID_CALLS, KID_TIMES = 256, 10, 8  # of --select kid: so many slices, network calls, times in a training
GENTLY = 0.4  # strength of augmentation for what the second stage learns to draw; see `pixels.augment`
SELF_TEST_SLICES, SELF_TEST_SECONDS, SELF_TEST_STEPS = 8, 25, 400  # per replica; per stage
MONITOR = {"autoencoder": "val_reconstruction", "diffusion": "val_loss", "prior": "val_loss"}


# ---- settings: preset < what the run is < flags ----------------------------------------------------------------------


def parser():
    """The flags. Those left out are None, and override nothing."""
    p = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("stage", nargs="?", default="all", choices=("all", *runs.STAGES))
    p.add_argument("--data", nargs="+", help="zip, folder, or NIfTI volumes (default: phantom brains)")
    p.add_argument("--run", help="name of the run, whose folder is checkpoint/<run> (default: the name of the data)")
    p.add_argument("--preset", choices=tuple(PRESETS), help="settings to start from (default: phantom)")
    p.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    p.add_argument(
        "--self-test", action="store_true", help="can these settings learn 8 slices by heart? Minutes; writes nothing"
    )
    p.add_argument("--precision", default="auto", choices=("auto", "float32", "mixed_bfloat16"))
    p.add_argument("--replicas", type=int, help="number of GPUs, or, without any, of logical CPU devices to try it out")
    p.add_argument("--seed", type=int, help="of splits that are carved out, order, augmentation, weights and noise")

    data = p.add_argument_group("data")
    data.add_argument("--labels", help="CSV table of people: case, label, ... (default: labels.csv in the archive)")
    data.add_argument("--image-size", type=int, help="pixels a side")
    data.add_argument(
        "--axis", type=int, choices=(0, 1, 2), help="axis of NIfTI volumes along which to slice (2: axial)"
    )
    data.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror training slices left to right")

    both = p.add_argument_group("training, of each stage that runs")
    both.add_argument("--batch-size", type=int, help="over all replicas")
    both.add_argument("--epochs", type=int)
    both.add_argument("--steps-per-epoch", type=int, help="0: one pass over the training split")
    both.add_argument("--learning-rate", type=float, help="at its peak, after warm-up; then it decays by a cosine")

    first = p.add_argument_group("first stage")
    first.add_argument("--autoencoder", choices=("vqvae", "vae", "none"), help="none: diffusion straight in pixels")
    first.add_argument("--downsampling", type=int, choices=(4, 8, 16), help="image pixels per latent pixel, a side")
    first.add_argument(
        "--crop",
        action=argparse.BooleanOptionalAction,
        help="leave out the margin that is black in all slices",
    )
    first.add_argument("--latent-channels", type=int, help="channels of a latent; of a VQ-VAE: of a code")
    first.add_argument("--quantizer", choices=("ema", "fsq"), help="of the VQ-VAE: learned codebook, or fixed grid")
    first.add_argument("--num-codes", type=int, help="size of the learned codebook")
    first.add_argument("--codes-per-latent", type=int, help="vqvae: each latent is cut into so many parts")
    first.add_argument(
        "--cosine", action=argparse.BooleanOptionalAction, help="its codes are compared by direction only"
    )
    first.add_argument("--levels", type=int, nargs="+", help="fsq: levels of each channel of a code")
    first.add_argument("--kl-weight", type=float, help="vae: weight of the KL divergence, in nats per slice")
    first.add_argument("--kl-cycles", type=int, help="vae: times that this weight rises from 0; 0: constant")
    first.add_argument("--patch", type=int, choices=(2, 4), help="pixels a side that its first layer takes as one")
    first.add_argument("--autoencoder-width", type=int, help="channels of its first level")
    first.add_argument("--condition-on-z", action=argparse.BooleanOptionalAction, help="tell it the slice index")
    first.add_argument("--condition-on-label", action=argparse.BooleanOptionalAction, help="tell it the label")
    first.add_argument("--segment", action=argparse.BooleanOptionalAction, help="let it name tissues, from their masks")
    first.add_argument("--gan", action=argparse.BooleanOptionalAction, help="sharpen it with a discriminator")
    first.add_argument("--adversarial-weight", type=float, help="gan: its gradient, relative to the reconstruction's")
    first.add_argument(
        "--random-latents", action=argparse.BooleanOptionalAction, help="gan: judge random pictures, too"
    )

    second = p.add_argument_group("diffusion")
    second.add_argument("--schedule", choices=tuple(schedules.SCHEDULES))
    second.add_argument("--prediction", choices=schedules.PREDICTIONS)
    second.add_argument("--zero-snr", action=argparse.BooleanOptionalAction, help="rescale it to end in pure noise")
    second.add_argument("--loss", choices=tuple(modules.DiffusionModel.penalties))
    second.add_argument("--min-snr-gamma", type=float, help="cap of the loss's weight at low noise, 5 in the paper")
    second.add_argument(
        "--accumulate",
        type=int,
        help="parts in which a batch goes through the network, for less memory and the same step",
    )
    second.add_argument("--width", type=int, help="channels of the U-Net's first level")
    second.add_argument("--multipliers", type=int, nargs="+", help="channels of each level, in widths")
    second.add_argument("--blocks", type=int, help="residual blocks per level")
    second.add_argument(
        "--attention", type=int, nargs="*", help="resolutions with attention, pixels a side of the whole picture"
    )
    second.add_argument("--head-size", type=int, help="channels per attention head")
    second.add_argument("--dropout", type=float)
    second.add_argument("--gates", action=argparse.BooleanOptionalAction, help="additive attention gates on the skips")
    second.add_argument(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help="gradient checkpointing: compute blocks again on the way back; less memory, more time",
    )
    second.add_argument(
        "--conditions", nargs="*", help="columns of the table that it is told beside the label: age sex"
    )
    second.add_argument(
        "--condition-on-mask", action=argparse.BooleanOptionalAction, help="tell it the tissue mask, where there is one"
    )
    second.add_argument(
        "--select",
        choices=("loss", "kid"),
        help="which epoch is kept: least validation loss, or samples nearest to validation people",
    )
    second.add_argument(
        "--patience", type=int, help="epochs without a new least validation loss, after which training stops"
    )
    second.add_argument("--views", type=int, help="latents stored per slice: the first as is, the others augmented")
    third = p.add_argument_group("prior, a transformer over the codes of a VQ-VAE")
    third.add_argument("--prior-width", type=int, help="channels")
    third.add_argument("--prior-depth", type=int, help="blocks")
    third.add_argument("--prior-heads", type=int, help="attention heads")
    return p


# flag -> the places in the settings that it sets
PLACES = {
    "labels": [("labels",)],
    "image_size": [("image_size",)],
    "axis": [("axis",)],
    "flip": [("flip",)],
    "seed": [("seed",)],
    "autoencoder": [("first_stage",)],
    **{
        flag: [("autoencoder", flag), ("diffusion", flag), ("prior", flag)]
        for flag in ("batch_size", "epochs", "steps_per_epoch", "learning_rate")
    },
    **{
        flag: [("autoencoder", flag)]
        for flag in (
            "downsampling crop latent_channels quantizer num_codes codes_per_latent cosine levels kl_weight kl_cycles "
            "patch condition_on_z condition_on_label segment gan adversarial_weight random_latents"
        ).split()
    },
    "autoencoder_width": [("autoencoder", "width")],
    "views": [("latents", "views")],
    **{
        flag: [("diffusion", flag)]
        for flag in (
            "schedule prediction zero_snr loss min_snr_gamma accumulate width multipliers blocks attention "
            "head_size dropout gates recompute conditions condition_on_mask select patience"
        ).split()
    },
    **{f"prior_{key}": [("prior", key)] for key in ("width", "depth", "heads")},
}


def resolve(flags):
    """Flags -> (run folder, stages to do, settings).

    Raises:
        RunError: flags that contradict each other or what the run already is.
    """
    named_by_data = Path(flags.data[0]).name.split(".")[0] if flags.data else None
    run = runs.folder(flags.run or named_by_data or flags.preset or "phantom")
    stored = next((found for stage in runs.STAGES if (found := runs.load_json(run / f"{stage}.json"))), None)
    settings = merged(DEFAULTS, PRESETS[flags.preset or "phantom"] if stored is None or flags.preset else {})
    if stored and not flags.preset:
        recorded = {stage: (runs.load_json(run / f"{stage}.json") or {}).get("settings", {}) for stage in runs.STAGES}
        for known in recorded.values():
            settings = merged(settings, known)
        for stage, known in recorded.items():  # each stage wrote down what it was made with
            settings[stage] = merged(settings[stage], known.get(stage, {}))
    if made := runs.load_json(run / "autoencoder.json"):
        for key in ("crop_box", "kl_cycle_steps"):  # what was found when training began stays so
            settings["autoencoder"][key] = made["settings"]["autoencoder"].get(key)
    if flags.data:
        settings["data"] = flags.data if len(flags.data) > 1 else flags.data[0]
    stages = runs.STAGES[:3] if flags.stage == "all" else (flags.stage,)
    for flag, places in PLACES.items():
        value = getattr(flags, flag)
        for *parents, key in places:
            group = settings[parents[0]] if parents else settings
            if value is not None and not (len(places) > 1 and parents[0] not in stages):
                group[key] = value
    rules.resolve_levels(flags, settings)
    rules.refuse_idle_flags(flags, settings)
    rules.check(settings)
    if settings["first_stage"] == "none":
        if flags.stage in ("autoencoder", "latents", "prior"):
            raise runs.RunError(f"--autoencoder none works in pixels and has no {flags.stage} stage: leave it out")
        stages = ("diffusion",)
    if flags.stage == "prior" and settings["first_stage"] == "vae":
        raise runs.RunError(
            "a prior draws codes, and --autoencoder vae has none: train a vqvae, or diffusion on this one"
        )
    for stage in runs.STAGES:
        rules.refuse_change(run, stage, settings)
    refuse_new_ground(run, stages, settings)
    return run, stages, settings


# ---- stages ----------------------------------------------------------------------------------------------------------


def open_data(settings):
    """The source of slices, drawing the phantoms first where no data is named."""
    if settings["data"] is None and not PHANTOM.exists():
        print(f"no --data given: drawing {PHANTOM_PEOPLE} phantom brains into {PHANTOM}")
        dataset.write_phantoms(PHANTOM, people=PHANTOM_PEOPLE)
    named = settings["data"] or PHANTOM
    return dataset.open_source(named, seed=settings["seed"], axis=settings["axis"], labels=settings["labels"])


def record(run, stage, settings, manifest, **more):
    """Write `<stage>.json`.

    Raises:
        RunError: if the stage was begun with another table of people.
    """
    columns = more.pop("columns", {})
    stored = runs.load_json(run / f"{stage}.json")
    if stored and stored["data"].get("columns", columns) != columns:
        raise runs.RunError(
            f"{run}: its {stage} stage was begun with another table of people ({', '.join(columns)}): give the new "
            "run a name with --run"
        )
    runs.save_json(
        run / f"{stage}.json",
        {
            "stage": stage,
            "settings": settings,
            "versions": runs.versions(),
            "data": {**manifest, "columns": columns},
            **more,
        },
    )


def refuse_other_people(run, manifest):
    """Raises:
    RunError: if a stage of this run saw other slices.
    """
    for stage in runs.STAGES:
        stored = runs.load_json(run / f"{stage}.json")
        if stored and stored["data"]["splits"] != manifest["splits"]:
            raise runs.RunError(
                f"{run}: its {stage} stage was trained on {stored['data']['source']} with other people in its splits "
                f"than {manifest['source']}: give the new run a name with --run"
            )


def is_finished(run, stage, settings):
    """Whether a stage was trained to the end for as many epochs as the settings ask for."""
    stored = runs.load_json(run / f"{stage}.json") or {}
    if stage == "latents":  # they are those of a first stage, which may have been trained further since
        return are_current(run) and stored["settings"].get("labels") == settings["labels"]  # which lie beside them
    return stored.get("finished", False) and settings[stage]["epochs"] <= stored.get("epochs", 0)


def are_current(run):
    """Whether the stored latents are those of the first stage as it is, which may have been trained further since."""
    stored, first = (runs.load_json(run / f"{stage}.json") or {} for stage in ("latents", "autoencoder"))
    return stored.get("finished", False) and stored.get("epochs", first.get("epochs")) == first.get("epochs")


def fit(model, run, stage, settings, train, validation, picture, averaged=False, watchers=(), measures=()):
    """Train a model to the end of its stage, going on from the last checkpoint.

    Args:
        model: built in the strategy's scope, not compiled.
        settings: the stage's own.
        train: callable start_step -> endless dataset of batches.
        validation: dataset.
        picture: callable (model for use) -> callable (path) that draws what the epoch has reached.
        averaged: keep a moving average of the weights, and validate with it.
        watchers: more callbacks, whose doings belong into the checkpoint.
        measures: callbacks that add to the logs, and so to the history.
    """
    epochs, steps = settings["epochs"], settings["steps_per_epoch"]
    with model.distribute_strategy.scope():
        optimizers = {"optimizer": callbacks.make_optimizer(settings, epochs * steps, averaged)}
        if isinstance(model, modules.AdversarialTraining):
            optimizers["discriminator_optimizer"] = callbacks.make_optimizer(settings, epochs * steps, beta_1=0.5)
        on_gpu = bool(tf.config.list_physical_devices("GPU"))
        model.compile(**optimizers, jit_compile=on_gpu)  # on CPUs XLA's convolutions are slower than oneDNN's
    done = runs.resume(model, run, stage, steps)
    distribution.wait_for_all(model.distribute_strategy)  # the chief may have mended the history, which others read
    if done:
        print(f"{stage}: going on after epoch {done} of {epochs}")
    past = [row[MONITOR[stage]] for row in runs.read_history(run / f"{stage}.csv") if MONITOR[stage] in row]
    patience = callbacks.Patience(past, MONITOR[stage], settings.get("patience"))
    if done < epochs and not patience.spent:
        watching = [keras.callbacks.SwapEMAWeights()] if averaged else []  # validate with the averaged weights
        watching += [callbacks.Clock(), callbacks.StopAtNaN(run, stage)]
        watching += measures
        if runs.is_chief():
            watching += [runs.History(run / f"{stage}.csv", append=done > 0)]
        watching += [patience, *watchers]
        if runs.is_chief():
            watching += [
                runs.Checkpoint(run, stage, MONITOR[stage]),
                callbacks.Picture(run / "pictures", stage, picture),
                keras.callbacks.TensorBoard(run / "logs" / stage, write_graph=False),
            ]
        model.fit(
            train(done * steps),
            epochs=epochs,
            initial_epoch=done,
            steps_per_epoch=steps,
            validation_data=validation,
            callbacks=watching,
            shuffle=False,  # the dataset has an order of its own
            verbose=1 if sys.stdout.isatty() else 2,
        )
    if patience.spent:
        print(f"{stage}: stopped after {len(patience.seen)} epochs; the best was epoch {1 + np.argmin(patience.seen)}")
    if runs.is_chief():
        charts.loss_curves(runs.read_history(run / f"{stage}.csv"), run / f"{stage}.png")
    distribution.wait_for_all(model.distribute_strategy)


def train_autoencoder(run, settings, source, strategy):
    """Stage 1: images -> `autoencoder.keras`, with the latents' statistics measured on the training split."""
    stage = with_steps(settings["autoencoder"], source)
    if not stage["kl_cycle_steps"]:  # the first half of the training as it was planned first: written down, and kept
        stage["kl_cycle_steps"] = stage["epochs"] * stage["steps_per_epoch"] // 2
        settings["autoencoder"]["kl_cycle_steps"] = stage["kl_cycle_steps"]
    manifest = source.manifest()
    record(run, "autoencoder", settings, manifest, finished=False)

    def slices(split, training, start_step=0):
        options = {"seed": settings["seed"], "flip": settings["flip"], "start_step": start_step}
        options["masks"] = stage["segment"]
        return dataset.make_dataset(source, split, settings["image_size"], stage["batch_size"], training, **options)

    validation = slices("validate", training=False)
    shown = spread(validation, 8)
    with strategy.scope():
        autoencoder = make_autoencoder(settings, len(source.label_names))
        model = with_adversary(autoencoder, stage) if stage["gan"] else autoencoder
    watchers = []
    if stage["gan"]:
        watchers.append(adversary.AdversaryWatch(lambda: runs.read_history(run / "autoencoder.csv")))
    if settings["first_stage"] == "vqvae":
        watchers.append(callbacks.CodebookHealth(run, autoencoder))

    def picture(model):
        reconstruct = tf.function(model.call)

        def draw(path):
            figures.reconstruction_sheet(path, shown["image"], np.clip(reconstruct(shown), -1, 1), shown["z"])

        return draw

    fit(
        model, run, "autoencoder", stage, lambda step: slices("train", True, step), validation, picture, False, watchers
    )
    best = runs.load_model(run / "autoencoder.keras")
    in_order = slices("train", training=False)
    best.measure_latents(in_order)
    runs.write(run / "autoencoder.keras", best.save)
    facts = {}
    if settings["first_stage"] == "vqvae":
        counts = best.count_codes(in_order)
        facts["codebook"] = {"usage": float(np.mean(counts > 0)), "dead": np.flatnonzero(counts == 0).tolist()}
        print(f"autoencoder: the training split uses {facts['codebook']['usage']:.1%} of {len(counts)} codes")
    record(run, "autoencoder", settings, manifest, finished=True, epochs=stage["epochs"], **facts)


def find_crop_box(settings, source):
    """The window of the pictures that the first stage sees: what it is already, or the box of the training brains.

    Its sides are such that the latents can be halved as often as the U-Net does.
    """
    group = settings["autoencoder"]
    if settings["first_stage"] == "none" or not group["crop"] or group["crop_box"]:
        return group["crop_box"]
    step = group["downsampling"] * 2 ** (len(settings["diffusion"]["multipliers"]) - 1)
    return dataset.brain_box(source, settings["image_size"], step)


def make_autoencoder(settings, num_labels):
    """The first stage that the settings describe, untrained."""
    keras.utils.set_random_seed(settings["seed"])
    group = settings["autoencoder"]
    names = ["crop_box", "downsampling", "patch", "width", "blocks", "condition_on_z"]
    more = {
        "latent_channels": rules.latent_shape(settings)[-1],
        "num_labels": num_labels if group["condition_on_label"] else 0,
        "tissues": len(tissue.CLASSES) if group["segment"] else 0,
    }
    if settings["first_stage"] == "vqvae":
        kind, names = modules.VQVAE, [*names, "quantizer", "num_codes", "codes_per_latent", "cosine", "levels"]
    else:
        kind, names = modules.VAE, [*names, "kl_weight", "kl_cycles", "kl_cycle_steps"]
    return kind(settings["image_size"], seed=settings["seed"], **{name: group[name] for name in names}, **more)


def with_adversary(autoencoder, stage):
    """The training of an autoencoder against a discriminator of the same conditions; its ramp takes one epoch."""
    conditions = {"condition_on_z": autoencoder.condition_on_z, "num_labels": autoencoder.num_labels}
    discriminator = modules.Discriminator(autoencoder.crop_box[2:], autoencoder.patch, **conditions)
    return modules.AdversarialTraining(
        autoencoder,
        discriminator,
        weight=stage["adversarial_weight"],
        ramp_steps=stage["steps_per_epoch"],
        random_latents=stage["random_latents"],
    )


def encode_latents(run, settings, source):
    """Stage 2: images -> `latents/<split>.npz`, for the splits that training may see.

    View 0 of a slice is the slice; the other views of a training slice are augmented, because the second stage has no
    other augmentation.
    """
    autoencoder = runs.load_first_stage(run)
    record(run, "latents", settings, source.manifest(), finished=False)
    encode = tf.function(autoencoder.encode, reduce_retracing=True)
    with_masks = settings["diffusion"]["condition_on_mask"]
    for split, views in (("train", settings["latents"]["views"]), ("validate", 1)):
        columns, latents, fractions = {}, [], []
        for number in range(views):
            part, covered = [], []
            plain = dataset.make_dataset(source, split, settings["image_size"], 64, training=False, masks=with_masks)
            options = {"seed": settings["seed"], "flip": settings["flip"], "strength": GENTLY}
            for batch in latents_file.view(plain, number, **options):
                if not number:
                    for key in ("z", "label", "case"):
                        columns.setdefault(key, []).append(batch[key].numpy())
                part.append(encode(batch["image"], batch["z"], batch["label"]).numpy())
                if with_masks:
                    shape = part[-1].shape[1:3]
                    covered.append(tissue_masks.tissue_fractions(batch["mask"], shape, autoencoder.crop_box).numpy())
            latents.append(np.concatenate(part))
            fractions += [np.concatenate(covered)] if with_masks else []
            print(f"latents: {split}, view {number + 1} of {views}", flush=True)
        arrays = {key: np.concatenate(parts) for key, parts in columns.items()}
        if settings["first_stage"] == "vqvae":
            arrays["codes"] = np.stack([autoencoder.codes(part).numpy() for part in latents])
        arrays |= {"mask": np.stack(fractions)} if with_masks else {}
        latents_file.write(run / "latents" / f"{split}.npz", np.stack(latents), **arrays)
    epochs = runs.load_json(run / "autoencoder.json")["epochs"]
    record(run, "latents", settings, source.manifest(), finished=True, epochs=epochs)


def renew_latents(run, settings, source, strategy, needed):
    """Encode the latents again where what lies beside them is not what the next stage needs: labels, masks, codes.

    Raises:
        RunError: if there are none yet.
    """
    stale = not are_current(run)
    for split in ("train", "validate"):
        path = run / "latents" / f"{split}.npz"
        if not path.exists():
            raise runs.RunError(f"{path} is not there yet: run `python train.py latents --run {run.name}` first")
        with np.load(path) as file:
            same = np.array_equal(file["label"], source.label[source.select(split)])
            stale |= not same or any(name not in file for name in needed)
    distribution.wait_for_all(strategy)  # nobody writes before all have looked
    if stale:
        print("latents: of an older first stage, with other labels, or without masks or codes; encoding again")
        encode_latents(run, settings, source)
        distribution.wait_for_all(strategy)


def train_diffusion(run, settings, source, strategy):
    """Stage 3: latents, or pixels -> `diffusion.keras`, with averaged weights."""
    stage = with_steps(settings["diffusion"], source)
    manifest = source.manifest()
    in_pixels = settings["first_stage"] == "none"
    autoencoder = None if in_pixels else runs.load_first_stage(run)
    record(run, "diffusion", settings, manifest, finished=False, columns=source.columns(stage["conditions"]))
    with strategy.scope():
        model = make_diffusion(settings, len(source.label_names), covariate_sizes(settings, source))

    with_masks, columns = stage["condition_on_mask"], source.columns(stage["conditions"])
    if not in_pixels:
        renew_latents(run, settings, source, strategy, ("mask",) if with_masks else ())

    def batches(split, training, start_step=0):
        options = {"seed": settings["seed"], "start_step": start_step}
        if in_pixels:
            size = settings["image_size"]
            options |= {"flip": settings["flip"], "masks": with_masks, "augment": GENTLY}
            found = dataset.make_dataset(source, split, size, stage["batch_size"], training, **options)
            if with_masks:
                found = found.map(lambda b: {**b, "mask": tissue_masks.tissue_fractions(b["mask"], (size, size))})
        else:
            path = run / "latents" / f"{split}.npz"
            options["masks"] = with_masks
            found = dataset.make_latents_dataset(path, stage["batch_size"], training, **options)
        if not training:  # see `DiffusionModel.test_step`
            found = found.enumerate().map(lambda i, b: {**b, "number": tf.fill(tf.shape(b["z"]), tf.cast(i, tf.int32))})
        return dataset.with_covariates(found, source, columns) if columns else found

    validation = batches("validate", training=False)
    shown = spread(validation, 8)
    conditions = ["z", "label", *["covariates"] * bool(stage["conditions"]), *["mask"] * with_masks]

    def picture(model):
        told = {key: tf.constant(shown[key]) for key in conditions}
        denoise = tf.function(lambda x_t, t: model.denoise(x_t, t, told))
        x_T = keras.random.normal(shown["image"].shape, seed=settings["seed"])

        def draw(path):
            *_, (x_t, _) = samplers.ddim(denoise, x_T, model.schedule, steps=20)
            images = x_t if in_pixels else autoencoder.decode(x_t, told["z"], told["label"])
            figures.save_png(path, figures.sheet(figures.enlarge(np.clip(images, -1, 1)), columns=4))

        return draw

    def samples(model):
        denoise = tf.function(model.denoise, reduce_retracing=True)
        told = {key: value for key, value in spread(validation, KID_SAMPLES).items() if key in conditions}

        def draw():
            images = []
            for start in range(0, KID_SAMPLES, 32):
                part = {key: tf.constant(value[start : start + 32]) for key, value in told.items()}
                x_T = keras.random.normal((len(part["z"]), *model.data_shape), seed=start)
                steered = guidance.guided(denoise, part)
                *_, (x_t, _) = samplers.dpm_solver_pp(steered, x_T, model.schedule, KID_CALLS)
                images.append(x_t if in_pixels else autoencoder.decode(x_t, part["z"], part["label"]))
            return metrics.to_unit(np.concatenate(images))

        return draw

    measures = []
    if stage["select"] == "kid" and runs.is_chief():
        size = settings["image_size"]
        describe = features.of_run(run, source, size)
        real = dataset.read_split(source, "validate", size)["image"]
        if len(real) < 4:
            raise runs.RunError(f"--select kid needs 4 validation slices or more, and {source.path} has {len(real)}")
        measures = [callbacks.Kid(samples, describe, metrics.to_unit(real), every=max(1, stage["epochs"] // KID_TIMES))]
    train = functools.partial(batches, "train", True)
    fit(model, run, "diffusion", stage, train, validation, picture, averaged=True, measures=measures)
    record(run, "diffusion", settings, manifest, finished=True, epochs=stage["epochs"], columns=columns)


def train_prior(run, settings, source, strategy):
    """Instead of stage 3: codes -> `prior.keras`, which draws them one by one."""
    stage = with_steps(settings["prior"], source)
    autoencoder = runs.load_first_stage(run)
    renew_latents(run, settings, source, strategy, ("codes",))
    with np.load(run / "latents" / "train.npz") as file:
        stored = file["codes"][0]
    record(run, "prior", settings, source.manifest(), finished=False)
    keras.utils.set_random_seed(settings["seed"])
    names = ("width", "depth", "heads", "dropout")
    options = {name: stage[name] for name in names} | {"num_labels": len(source.label_names), "seed": settings["seed"]}
    with strategy.scope():
        model = modules.CodePrior(autoencoder.num_codes, autoencoder.code_shape, **options)
        model.start_from(stored)  # the transformer learns what the histogram per place does not know

    def batches(split, training, start_step=0):
        order = {"seed": settings["seed"], "start_step": start_step, "codes": True}
        return dataset.make_latents_dataset(run / "latents" / f"{split}.npz", stage["batch_size"], training, **order)

    validation = batches("validate", training=False)
    shown = spread(validation, 8)

    def picture(model):
        def draw(path):
            codes = model.sample(shown["z"], shown["label"], seed=settings["seed"])
            images = autoencoder.decode(autoencoder.latents_of(codes), shown["z"], shown["label"])
            figures.save_png(path, figures.sheet(figures.enlarge(images), columns=4))

        return draw

    histogram = histogram_bits(model, validation)
    fit(model, run, "prior", stage, functools.partial(batches, "train", True), validation, picture, averaged=True)
    reached = min(row["val_bits"] for row in runs.read_history(run / "prior.csv"))
    print(f"prior: {reached:.2f} bits per code of the validation people; the histogram per place: {histogram:.2f}")
    facts = {"bits": reached, "histogram_bits": histogram}
    record(run, "prior", settings, source.manifest(), finished=True, epochs=stage["epochs"], **facts)


def histogram_bits(model, validation):
    """Bits per code of the validation people by the frequencies at each place, which `start_from` has counted."""
    codes = np.concatenate([batch["codes"] for batch in validation])
    nats = -np.take_along_axis(np.asarray(model.log_frequency), rearrange(codes, "b h w -> (h w) b"), axis=1)
    return float(nats.mean() / np.log(2))


def covariate_sizes(settings, source):
    """How many values each of `--conditions` has; 0 for a number."""
    return [len(about.get("values", ())) for about in source.columns(settings["diffusion"]["conditions"]).values()]


def make_diffusion(settings, num_labels, covariates=()):
    """The diffusion model that the settings describe, untrained."""
    keras.utils.set_random_seed(settings["seed"])
    group, in_pixels = settings["diffusion"], settings["first_stage"] == "none"
    *shape, channels = rules.latent_shape(settings)
    side = settings["image_size"] // (1 if in_pixels else settings["autoencoder"]["downsampling"])
    names = ("width", "multipliers", "blocks", "head_size", "dropout", "gates", "recompute")
    options = {name: group[name] for name in names}
    attention = [rows * shape[0] // side for rows in group["attention"]]  # said of the whole picture
    unet = modules.UNet(
        shape,
        channels,
        attention=attention,
        num_labels=num_labels,
        covariates=covariates,
        mask=group["condition_on_mask"],
        **options,
    )
    names = ("schedule", "prediction", "drop_conditions", "zero_snr", "min_snr_gamma", "loss", "accumulate")
    options = {name: group[name] for name in names}
    options["sigma_data"] = schedules.SIGMA_DATA if in_pixels else 1.0
    return modules.DiffusionModel(unet, clip_x_0=in_pixels, seed=settings["seed"], **options)


def with_steps(stage, source):
    """The stage's settings with the number of steps that one pass over the training split takes, if none is set."""
    one_pass = -(-len(source.select("train")) // stage["batch_size"])
    return {**stage, "steps_per_epoch": stage["steps_per_epoch"] or one_pass}


def spread(batches, count):
    """`count` elements of a dataset, evenly spread over it, as one batch of NumPy arrays."""
    whole = list(batches.unbatch().as_numpy_iterator())
    chosen = [whole[i] for i in np.linspace(0, len(whole) - 1, count).round().astype(int)]
    return {key: np.stack([element[key] for element in chosen]) for key in chosen[0]}


def refuse_new_ground(run, stages, settings):
    """Raises:
    RunError: if a finished first stage would be trained further under a second stage that was built on it.
    """
    finished = (runs.load_json(run / "autoencoder.json") or {}).get("finished", False)
    further = "autoencoder" in stages and finished and not is_finished(run, "autoencoder", settings)
    above = [stage for stage in ("diffusion", "prior") if (run / f"{stage}.json").exists()]
    if further and above:
        raise runs.RunError(
            f"{run}: more --epochs for the first stage would change the latents under its {above[0]} stage: say "
            f"`train.py {above[0]}` to train that further, or give the new run a name with --run"
        )


def refuse_missing(settings, source):
    """Raises:
    RunError: if a stage is to learn what the data does not have.
    """
    for name in settings["diffusion"]["conditions"]:
        if name not in source.covariates:
            known = f"has {', '.join(source.covariates)}" if source.covariates else "has none beside the label"
            raise runs.RunError(
                f"--conditions {name}: the table of {source.path} {known}: name one of these, or give --labels"
            )
    if settings["autoencoder"]["condition_on_label"] and not source.label_names:
        raise runs.RunError(f"--condition-on-label needs labels, and {source.path} has none: leave the flag out")
    if settings["diffusion"]["condition_on_mask"] and not source.masks:
        raise runs.RunError(f"--condition-on-mask needs tissue masks, and {source.path} has none: leave the flag out")
    group = settings["autoencoder"]
    if settings["first_stage"] == "none":
        return
    if group["segment"] and not source.masks:
        raise runs.RunError(f"--segment needs tissue masks, and {source.path} has none: leave the flag out")


# ---- self-test -------------------------------------------------------------------------------------------------------


def self_test(settings, source, strategy):
    """Can the stages learn one batch by heart, the second in what the first makes of it? Writes nothing.

    Returns:
        Whether they can. What cannot is a learning rate, a precision or a size of network that will not do.
    """
    in_pixels, count = settings["first_stage"] == "none", SELF_TEST_SLICES * strategy.num_replicas_in_sync
    with_masks = settings["diffusion"]["condition_on_mask"]
    segments = not in_pixels and settings["autoencoder"]["segment"]
    options = {"training": True, "augment": 0.0, "masks": with_masks or segments}
    batch = next(iter(dataset.make_dataset(source, "train", settings["image_size"], count, **options)))
    learned = True
    settings["diffusion"]["accumulate"] = 1  # one batch of a few slices
    if not in_pixels:
        settings["autoencoder"]["kl_cycle_steps"] = 0
        with strategy.scope():
            autoencoder = make_autoencoder(settings, len(source.label_names))
        learned = overfit_test("autoencoder", autoencoder, batch, settings["autoencoder"])
        latents = autoencoder.raw_latents(batch["image"], batch["z"], batch["label"])
        batch["image"] = (latents - tf.reduce_mean(latents)) / (tf.math.reduce_std(latents) + 1e-6)
    if conditions := settings["diffusion"]["conditions"]:
        batch["covariates"] = dataset.covariates_of(source, batch["case"].numpy(), source.columns(conditions))
    mask = batch.pop("mask", None)
    if with_masks:
        window = None if in_pixels else autoencoder.crop_box
        batch["mask"] = tissue_masks.tissue_fractions(mask, batch["image"].shape[1:3], window)
    with strategy.scope():
        diffusion = make_diffusion(settings, len(source.label_names), covariate_sizes(settings, source))
    return overfit_test("diffusion", diffusion, batch, settings["diffusion"]) and learned


def overfit_test(stage, model, batch, settings):
    """Train on one batch for about SELF_TEST_SECONDS, and say whether its loss falls to less than half."""
    with model.distribute_strategy.scope():
        model.compile(keras.optimizers.AdamW(settings["learning_rate"], beta_2=0.99, use_ema=False), jit_compile=False)
    found, began = [], []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):  # an epoch is one step
            found.append(logs["loss"])
            began.append(time.time())
            over = time.time() > began[0] + SELF_TEST_SECONDS and len(found) >= SELF_TEST_STEPS // 8
            self.model.stop_training = over or not np.isfinite(logs["loss"])

    steps = tf.data.Dataset.from_tensors(batch).repeat()
    model.fit(steps, epochs=SELF_TEST_STEPS, steps_per_epoch=1, shuffle=False, verbose=0, callbacks=[Watch()])
    few = max(1, len(found) // 10)
    first, last = np.mean(found[:few]), np.mean(found[-few:])
    learns = last < 0.5 * first
    print(
        f"self-test: {stage} {'learns' if learns else 'does NOT learn'} {len(batch['z'])} slices by heart: loss "
        f"{first:.3f} -> {last:.3f} in {len(found)} steps, {began[-1] - began[0]:.0f} seconds",
        flush=True,
    )
    return learns


# ---- the command -----------------------------------------------------------------------------------------------------


def announce(flags, run, settings, source, strategy, precision):
    """One line that says what is about to happen."""
    sizes, cropped, group = [], "", settings["autoencoder"]
    if settings["first_stage"] != "none":
        first = make_autoencoder(settings, len(source.label_names))
        gan = " + discriminator" if group["gan"] else ""
        sizes.append(f"{settings['first_stage']} {first.count_params() / 1e6:.1f} M{gan}")
        height, width = first.crop_box[2:]
        cropped = f" cropped to {height}x{width}" if group["crop_box"] else ""
    unet = make_diffusion(settings, len(source.label_names), covariate_sizes(settings, source))
    sizes.append(f"U-Net {unet.count_params() / 1e6:.1f} M parameters")
    people = {split: int(len(np.unique(source.case[source.split == split]))) for split in dataset.SPLITS}
    print(
        f"{flags.stage}: {source.path}, {len(source.entries)} slices, people {'/'.join(map(str, people.values()))} in "
        f"train/validate/test | {settings['image_size']}x{settings['image_size']}{cropped}, {', '.join(sizes)} | "
        f"{precision}, {strategy.num_replicas_in_sync} replica(s) | {run}/",
        flush=True,
    )


def work(flags):
    """Do what the flags say; returns the exit status."""
    run, stages, settings = resolve(flags)
    try:
        strategy = distribution.make_strategy(flags.replicas)
    except ValueError as error:
        raise runs.RunError(f"{error}: give fewer") from error
    replicas = strategy.num_replicas_in_sync
    for stage in stages:
        rows, parts = settings[stage].get("batch_size", replicas), settings[stage].get("accumulate", 1)
        if rows % (replicas * parts):
            share = f" times the {parts} parts of --accumulate" if parts > 1 else ""
            raise runs.RunError(f"--batch-size {rows} of {stage} must be divisible by the {replicas} replicas{share}")
    precision = distribution.set_precision(flags.precision)
    source = open_data(settings)
    refuse_missing(settings, source)
    settings["autoencoder"]["crop_box"] = find_crop_box(settings, source)
    rules.check_levels(settings)
    announce(flags, run, settings, source, strategy, precision)
    if flags.data and not flags.preset and not any((run / f"{stage}.json").exists() for stage in runs.STAGES):
        print("no --preset given: these are the settings for phantoms; --preset oasis-256 is for slices of 256 pixels")
    if flags.dry_run:
        print(runs.json.dumps(settings, indent=2))
        return 0
    if flags.self_test:
        if flags.stage == "prior":
            raise runs.RunError("--self-test tries the first stage and the diffusion model: leave `prior` out")
        with dataset.data_errors(source):
            if self_test(settings, source, strategy):
                return 0
        raise runs.RunError("self-test failed: try a lower --learning-rate, --precision float32, or a larger --width")
    refuse_other_people(run, source.manifest())
    for stage in stages:
        if is_finished(run, stage, settings):
            print(f"{stage}: finished before; its result is in {run}/")
            continue
        start = time.time()
        with dataset.data_errors(source):
            if stage == "autoencoder":
                train_autoencoder(run, settings, source, strategy)
            elif stage == "latents":
                encode_latents(run, settings, source)
            elif stage == "diffusion":
                train_diffusion(run, settings, source, strategy)
            else:
                train_prior(run, settings, source, strategy)
        distribution.wait_for_all(strategy)
        print(f"{stage}: done in {(time.time() - start) / 60:.1f} minutes")
    following = {"autoencoder": "train.py latents", "latents": "train.py diffusion"}
    following["prior"] = "predict.py --prior transformer"
    print(f"next: python {following.get(stages[-1], 'predict.py')} --run {flags.run or run.name}")
    return 0


def main(argv=None):
    """Run the command line; returns the exit status: 0 done, 2 a user's mistake, 130 interrupted."""
    flags = parser().parse_args(argv)
    try:
        return work(flags)
    except (dataset.DataError, runs.RunError) as mistake:
        print(f"train.py: {mistake}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; all finished epochs are saved: run the same command to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
