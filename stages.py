"""The stages of a run: what each of them learns from, how it is trained, and what it writes down.

    train_autoencoder   images  -> first stage          autoencoder.keras
    (encoding.py        images  -> their latents        latents/<split>.npz)
    train_diffusion     latents -> denoising network    diffusion.keras
    train_prior         codes   -> transformer          prior.keras
    fit                 one training, going on from its last checkpoint
    overfit_test        can these settings learn anything at all?

`train.py` runs them, one after the other. Each takes, as far as it needs them: the folder of the run; its settings,
which are read-only (`ldm.training.settings`); the `dataset.Source` of its slices, and the `manifest` of that, which the
stage writes down; and the `tf.distribute` strategy.
"""

import functools
import sys
import time

import keras
import numpy as np
import tensorflow as tf
from einops import rearrange

import dataset
import encoding
import features
import modules
from generator import Generator
from ldm import batches, tissue
from ldm.data import latents
from ldm.data.masks import tissue_fractions
from ldm.diffusion import schedules
from ldm.drawing import charts, figures
from ldm.judging import fidelity, metrics
from ldm.nets import networks
from ldm.training import adversary, callbacks, distribution, optimizers, prior, progress, records, runs
from ldm.training.settings import arguments, attention_rows, latent_shape, merged

KID_SAMPLES, KID_CALLS, KID_TIMES = 256, 10, 8  # of --select kid: so many slices, network calls, times in a training
MEASURED = 1000  # training slices, spread over the people, from which statistics of latents and codes are taken
SHOWN, SHOWN_CALLS = 8, 20  # slices in the picture of an epoch, network calls for each
OVERFIT_SLICES, OVERFIT_SECONDS, OVERFIT_STEPS = 8, 25, 400  # per replica; per stage
MONITOR = {"autoencoder": "val_reconstruction", "diffusion": "val_loss", "prior": "val_loss"}


# ---- what is found when training begins ------------------------------------------------------------------------------


def with_found(settings, source):
    """New settings with what is found when training begins, and written down then: what stands there already is kept.

    `crop_box`: the box of the training brains, with sides such that the latents can be halved as often as the U-Net
    does. `kl_cycle_steps`: the first half of the training as it is planned now.
    """
    group = settings["autoencoder"]
    if settings["first_stage"] == "none":
        return settings
    found = {"kl_cycle_steps": group["kl_cycle_steps"]}
    if not group["kl_cycle_steps"]:
        found["kl_cycle_steps"] = group["epochs"] * with_steps(group, source)["steps_per_epoch"] // 2
    if group["crop"] and not group["crop_box"]:
        step = group["downsampling"] * 2 ** (len(settings["diffusion"]["multipliers"]) - 1)
        found["crop_box"] = dataset.brain_box(source, settings["image_size"], step)
    return merged(settings, {"autoencoder": found})


def with_steps(stage, source):
    """A stage's settings with the number of steps that one pass over the training split takes, if none is set."""
    one_pass = -(-len(source.select("train")) // stage["batch_size"])
    return merged(stage, {"steps_per_epoch": stage["steps_per_epoch"] or one_pass})


# ---- one training ----------------------------------------------------------------------------------------------------


def fit(
    model,
    run,
    stage,
    settings,
    train,
    validation,
    picture,
    averaged=False,
    watchers=(),
    measures=(),
    verbose=False,
):
    """Train a model to the end of its stage, going on from the last checkpoint.

    Args:
        model: built in the strategy's scope, not compiled.
        run: folder.
        stage: "autoencoder", "diffusion" or "prior".
        settings: the stage's own, `with_steps`.
        train: callable (start_step, share) -> endless dataset of batches, see `dataset.make_dataset`.
        validation: dataset.
        picture: callable (model for use) -> callable (path) that draws what the epoch has reached.
        averaged: keep a moving average of the weights, and validate with it.
        watchers: more callbacks, whose doings belong into the checkpoint.
        measures: callbacks that add to the logs, and so to the history.
        verbose: say all metrics of each epoch, not three.
    """
    epochs, steps, history = settings["epochs"], settings["steps_per_epoch"], run / f"{stage}.csv"
    compile_for_training(model, settings["learning_rate"], epochs * steps, averaged, settings["decay"])
    done = runs.resume(model, run, stage, steps)
    distribution.wait_for_all(model.distribute_strategy)  # the chief may have mended the history, which others read
    if done:
        print(f"{stage}: going on after epoch {done} of {epochs}")
    past = [row[MONITOR[stage]] for row in runs.read_history(history) if MONITOR[stage] in row]
    patience = callbacks.Patience(past, MONITOR[stage], settings.get("patience"))
    if done < epochs and not patience.spent:
        watching = [keras.callbacks.SwapEMAWeights()] if averaged else []  # validate with the averaged weights
        watching += [callbacks.Clock(), callbacks.StopAtNaN(run, stage), *measures]
        if runs.is_chief():
            watching += [callbacks.History(history, append=done > 0)]
        watching += [patience, *watchers]
        if runs.is_chief():
            watching += [
                callbacks.Checkpoint(run, stage, MONITOR[stage]),
                callbacks.Picture(run / "pictures", stage, picture),
                keras.callbacks.TensorBoard(run / "logs" / stage, write_graph=False),
                *([] if verbose else [progress.Progress(stage, done)]),
            ]
        model.fit(
            distribution.own_share(model.distribute_strategy, functools.partial(train, done * steps)),
            epochs=epochs,
            initial_epoch=done,
            steps_per_epoch=steps,
            validation_data=validation,
            callbacks=watching,
            shuffle=False,  # the dataset has an order of its own
            verbose=(1 if sys.stdout.isatty() else 2) if verbose else 0,
        )
    if patience.spent:
        print(f"{stage}: stopped after {len(patience.seen)} epochs; the best was epoch {1 + np.argmin(patience.seen)}")
    if runs.is_chief():
        charts.loss_curves(runs.read_history(history), run / f"{stage}.png")
    distribution.wait_for_all(model.distribute_strategy)


def compile_for_training(model, learning_rate, steps, averaged, decay="cosine"):
    """Give a model the optimizer of a training of so many steps; a discriminator gets its own."""
    with model.distribute_strategy.scope():
        optimizers = {"optimizer": callbacks.make_optimizer(learning_rate, steps, averaged, decay=decay)}
        if isinstance(model, adversary.AdversarialTraining):
            second = callbacks.make_optimizer(learning_rate, steps, beta_1=0.5, decay=decay)
            optimizers["discriminator_optimizer"] = second
        on_gpu = bool(tf.config.list_physical_devices("GPU"))
        model.compile(**optimizers, jit_compile=on_gpu)  # on CPUs XLA's convolutions are slower than oneDNN's


def spread(slices, count):
    """`count` elements of a dataset, evenly spread, as one batch of NumPy arrays; some twice if it has fewer."""
    whole = list(slices.unbatch().as_numpy_iterator())
    chosen = [whole[i] for i in np.resize(batches.evenly(len(whole), count), count)]
    return {key: np.stack([element[key] for element in chosen]) for key in chosen[0]}


# ---- stage 1: images -> first stage ----------------------------------------------------------------------------------


def train_autoencoder(run, settings, source, manifest, strategy, verbose=False):
    """Stage 1: images -> `autoencoder.keras`, with the latents' statistics measured on the training split."""
    stage, quantized = with_steps(settings["autoencoder"], source), settings["first_stage"] == "vqvae"
    records.write(run, "autoencoder", settings, manifest, finished=False)

    slices = functools.partial(first_stage_batches, settings, source)
    validation = slices("validate", training=False)
    with strategy.scope():
        autoencoder, model = make_first_stage(settings, stage, len(source.label_names))
    begin_from(autoencoder, run, "autoencoder", settings)
    watchers, history = [], functools.partial(runs.read_history, run / "autoencoder.csv")
    if stage["gan"]:
        watchers.append(adversary.AdversaryWatch(history, trained=settings["init_from"] is not None))
    if quantized:

        def draw_codes(**counts):
            charts.codebook_health(history(), run / "codebook.png", **counts)

        watchers.append(callbacks.CodebookHealth(run, autoencoder.bottleneck.usage, draw_codes))
    train, picture = functools.partial(slices, "train", True), reconstructions(spread(validation, SHOWN))
    fit(model, run, "autoencoder", stage, train, validation, picture, watchers=watchers, verbose=verbose)
    best = runs.load_model(run / "autoencoder.keras")
    in_order, more = slices("train", training=False), {}
    if not stage["freeze_encoder"]:  # which has them, and latents stay what they are
        best.measure_latents(in_order)
        runs.write(run / "autoencoder.keras", best.save)
    if quantized:
        counts = best.count_codes(in_order)
        more["codebook"] = {"usage": float(np.mean(counts > 0)), "dead": np.flatnonzero(counts == 0).tolist()}
        print(f"autoencoder: the training split uses {more['codebook']['usage']:.1%} of {len(counts)} codes")
    records.write(run, "autoencoder", settings, manifest, finished=True, epochs=stage["epochs"], **more)


def first_stage_batches(settings, source, split, training, start_step=0, share=batches.UNSHARED):
    """What the first stage learns from and is validated with; see `dataset.make_dataset`."""
    stage, size = with_steps(settings["autoencoder"], source), settings["image_size"]
    options = {"seed": settings["seed"], "flip": settings["flip"], "masks": stage["segment"], "start_step": start_step}
    options["most"] = settings["validation_slices"] if split == "validate" else None if training else MEASURED
    options["share"] = share
    augmented = round((1.0 - stage["plain_end"]) * stage["epochs"] * stage["steps_per_epoch"])
    options |= {"augment": stage["augment"], "augmented_steps": augmented}
    return dataset.make_dataset(source, split, size, stage["batch_size"], training, **options)


def make_first_stage(settings, stage, num_labels):
    """The untrained first stage, and the model that trains it: itself, or, with a discriminator, another one."""
    autoencoder = make_autoencoder(settings, num_labels)
    autoencoder.encoder.trainable = not stage["freeze_encoder"]
    return autoencoder, with_adversary(autoencoder, stage) if stage["gan"] else autoencoder


def beginning(run, stage, settings):
    """The model whose weights a stage begins with: of the run that `--init-from` names, if that has one; else None."""
    there = settings["init_from"] and runs.folder(settings["init_from"]) / f"{stage}.keras"
    return there if there and there.exists() and not (run / f"{stage}.last.weights.h5").exists() else None


def begin_from(model, run, stage, settings):
    """Give an untrained model the weights of its `beginning`, if it has one.

    Raises:
        RunError: as `runs.start_from`.
    """
    if there := beginning(run, stage, settings):
        runs.start_from(model, there)


def make_autoencoder(settings, num_labels):
    """The first stage that the settings describe, untrained."""
    keras.utils.set_random_seed(settings["seed"])
    kind, group = {"vqvae": "VQVAE", "vae": "VAE"}[settings["first_stage"]], settings["autoencoder"]
    return getattr(modules, kind)(
        settings["image_size"],
        latent_channels=latent_shape(settings)[-1],
        num_labels=num_labels if group["condition_on_label"] else 0,
        tissues=len(tissue.CLASSES) if group["segment"] else 0,
        seed=settings["seed"],
        **arguments(settings, kind),
    )


def with_adversary(autoencoder, stage):
    """The training of an autoencoder against a discriminator of the same conditions; its ramp takes one epoch."""
    conditions = {"condition_on_z": autoencoder.condition_on_z, "num_labels": autoencoder.num_labels}
    discriminator = networks.Discriminator(autoencoder.crop_box[2:], autoencoder.patch, **conditions)
    return adversary.AdversarialTraining(
        autoencoder,
        discriminator,
        weight=stage["adversarial_weight"],
        ramp_steps=stage["steps_per_epoch"],
        random_latents=stage["random_latents"],
    )


def reconstructions(shown):
    """The picture of an epoch of a first stage: slices and what is left of them. See `callbacks.Picture`."""

    def make_draw(model):
        reconstruct = tf.function(model.call, autograph=False)

        def draw(path):
            figures.reconstruction_sheet(path, shown["image"], np.clip(reconstruct(shown), -1, 1), shown["z"])

        return draw

    return make_draw


# ---- stage 3: latents, or pixels -> denoising network ----------------------------------------------------------------


def train_diffusion(run, settings, source, manifest, strategy, verbose=False):
    """Stage 3: latents, or pixels -> `diffusion.keras`, with averaged weights."""
    stage, in_pixels = with_steps(settings["diffusion"], source), settings["first_stage"] == "none"
    autoencoder = None if in_pixels else records.load_first_stage(run)
    columns = source.columns(stage["conditions"])
    records.write(run, "diffusion", settings, manifest, finished=False, columns=columns)
    if in_pixels:
        x_0_range = True
    else:
        needed = ("mask",) if stage["condition_on_mask"] else ()
        encoding.renew_latents(run, settings, source, manifest, strategy, needed)
        x_0_range = latents.ranges(run / "latents" / "train.npz")
    with strategy.scope():
        model = make_diffusion(settings, len(source.label_names), covariate_sizes(columns), x_0_range)
    begin_from(model, run, "diffusion", settings)
    learned = functools.partial(diffusion_batches, run, settings, source, columns)
    validation = learned("validate", False)
    names = ["z", "label"] + ["covariates"] * bool(columns) + ["mask"] * stage["condition_on_mask"]
    draw = functools.partial(drawn, autoencoder, names)
    shown = draw(spread(validation, SHOWN), settings["seed"], "ddim", SHOWN_CALLS)

    def picture(model):
        images = shown(model)
        return lambda path: figures.save_png(path, figures.sheet(figures.enlarge(images()), columns=4))

    measures = []
    if stage["select"] == "kid" and runs.is_chief():
        samples = draw(spread(validation, KID_SAMPLES), 0, "dpm_solver_pp", KID_CALLS)
        measures = [kid(run, source, settings["image_size"], samples, max(1, stage["epochs"] // KID_TIMES))]
    train = functools.partial(learned, "train", True)
    fit(model, run, "diffusion", stage, train, validation, picture, averaged=True, measures=measures, verbose=verbose)
    records.write(run, "diffusion", settings, manifest, finished=True, epochs=stage["epochs"], columns=columns)


def diffusion_batches(run, settings, source, columns, split, training, start_step=0, share=batches.UNSHARED):
    """What the diffusion model learns from and is validated with: batches of latents, or of pixels, and conditions.

    Args:
        run, settings, source: as everywhere here.
        columns: of the table, that are conditions (`dataset.Source.columns`).
        split, training, start_step, share: as in `dataset.make_dataset`.

    Returns:
        Dataset of {"image" (B, h, w, C), "z", "label", "case"}, with "covariates" and "mask" where they are conditions,
        and, of latents, "augmented"; for validation also "number" (B,), the batch's, see `DiffusionModel.test_step`.
    """
    stage, size = settings["diffusion"], settings["image_size"]
    masks = stage["condition_on_mask"]
    options = {"seed": settings["seed"], "start_step": start_step, "masks": masks, "share": share}
    options["most"] = settings["validation_slices"]
    if settings["first_stage"] == "none":
        options |= {"flip": settings["flip"], "augment": encoding.GENTLY}
        found = dataset.make_dataset(source, split, size, stage["batch_size"], training, **options)
        if masks:
            found = found.map(lambda b: {**b, "mask": tissue_fractions(b["mask"], (size, size))})
    else:
        path = run / "latents" / f"{split}.npz"
        found = dataset.make_latents_dataset(path, stage["batch_size"], training, **options)
    if not training:
        found = found.enumerate().map(lambda i, b: {**b, "number": tf.fill(tf.shape(b["z"]), tf.cast(i, tf.int32))})
    return dataset.with_covariates(found, source, columns) if columns else found


def covariate_sizes(columns):
    """How many values each column of the table has, of `dataset.Source.columns`; 0 for a number."""
    return [len(about.get("values", ())) for about in columns.values()]


def make_diffusion(settings, num_labels, covariates=(), x_0_range=False):
    """The diffusion model that the settings describe, untrained.

    Args:
        settings: of the run.
        num_labels: of the data.
        covariates: as `covariate_sizes` returns.
        x_0_range: to which it clips: True in pixels, `latents.ranges` of the training split, False for none.
    """
    keras.utils.set_random_seed(settings["seed"])
    in_pixels, (*shape, channels) = settings["first_stage"] == "none", latent_shape(settings)
    stage = settings["diffusion"]
    told = {"num_labels": num_labels, "covariates": covariates, "mask": stage["condition_on_mask"]}
    told["tell_augmented"] = stage["tell_augmented"] and not in_pixels  # pixels are augmented throughout
    options = arguments(settings, "UNet") | {"attention": attention_rows(settings)}
    unet = modules.UNet(shape, channels, **told, **options)
    return modules.DiffusionModel(
        unet,
        clip_x_0=x_0_range,
        sigma_data=schedules.SIGMA_DATA if in_pixels else 1.0,
        seed=settings["seed"],
        **arguments(settings, "DiffusionModel"),
    )


def drawn(autoencoder, names, batch, seed, sampler, calls):
    """Samples with the conditions of a batch, for `callbacks.Picture` and `callbacks.Kid`.

    Args:
        autoencoder: the first stage; None in pixels.
        names: of the conditions.
        batch: arrays, (N, ...) each.
        seed: of the noise.
        sampler, calls: as `Generator.draw` takes them.

    Returns:
        Callable (model for use) -> callable () -> images (N, H, W, 1) in [-1, 1].
    """
    conditions = {name: batch[name] for name in names}

    def make_draw(model):
        generator = Generator.of(model, autoencoder)
        x_T = generator.noise(seed, len(batch["z"]))
        return lambda: generator.decode(generator.draw(x_T, conditions, sampler, calls), conditions)

    return make_draw


def kid(run, source, size, samples, every):
    """The callback of `--select kid`: samples against the validation people, in the run's own features.

    Args:
        run, source: as everywhere here.
        size: of the pictures, a side.
        samples: as `drawn` returns.
        every: epochs.

    Raises:
        RunError: if there are too few validation slices.
    """
    describe = features.of_run(run, source, size)
    real = dataset.read_split(source, "validate", size)["image"]
    if len(real) < 4:
        raise runs.RunError(f"--select kid needs 4 validation slices or more, and {source.path} has {len(real)}")
    return callbacks.Kid(
        samples, lambda images: describe(metrics.to_unit(images))[0], fidelity.kernel_distance, real, every
    )


# ---- instead of stage 3: codes -> transformer ------------------------------------------------------------------------


def train_prior(run, settings, source, manifest, strategy, verbose=False):
    """Instead of stage 3: codes -> `prior.keras`, which draws them one by one."""
    stage, seed = with_steps(settings["prior"], source), settings["seed"]
    autoencoder = records.load_first_stage(run)
    encoding.renew_latents(run, settings, source, manifest, strategy, ("codes",))
    records.write(run, "prior", settings, manifest, finished=False)
    keras.utils.set_random_seed(seed)
    with strategy.scope():
        options = {"num_labels": len(source.label_names), "seed": seed, **arguments(settings, "CodePrior")}
        model = prior.CodePrior(autoencoder.num_codes, autoencoder.code_shape, **options)
        known = (autoencoder.code_shape, autoencoder.num_codes)
        codes, _ = (latents.codes(run / "latents" / f"{split}.npz", *known) for split in ("train", "validate"))
        model.start_from(codes[0])  # the transformer learns what the histogram per place does not know
    begin_from(model, run, "prior", settings)

    def slices(split, training, start_step=0, share=batches.UNSHARED):
        options = {"seed": seed, "start_step": start_step, "codes": True, "most": settings["validation_slices"]}
        path = run / "latents" / f"{split}.npz"
        return dataset.make_latents_dataset(path, stage["batch_size"], training, share=share, **options)

    validation = slices("validate", training=False)
    shown = spread(validation, SHOWN)

    def picture(model):
        def draw(path):
            codes = model.sample(shown["z"], shown["label"], seed=seed)
            images = autoencoder.decode(autoencoder.latents_of(codes), shown["z"], shown["label"])
            figures.save_png(path, figures.sheet(figures.enlarge(images), columns=4))

        return draw

    histogram = histogram_bits(model, validation)
    train = functools.partial(slices, "train", True)
    fit(model, run, "prior", stage, train, validation, picture, averaged=True, verbose=verbose)
    reached = min(
        (row["val_bits"] for row in runs.read_history(run / "prior.csv") if "val_bits" in row), default=np.nan
    )
    print(f"prior: {reached:.2f} bits per code of the validation people; the histogram per place: {histogram:.2f}")
    more = {"bits": reached, "histogram_bits": histogram}
    records.write(run, "prior", settings, manifest, finished=True, epochs=stage["epochs"], **more)


def histogram_bits(model, validation):
    """Bits per code of the validation people by the frequencies at each place, which `start_from` has counted."""
    codes = np.concatenate([batch["codes"] for batch in validation])
    nats = -np.take_along_axis(np.asarray(model.log_frequency), rearrange(codes, "b h w -> (h w) b"), axis=1)
    return float(nats.mean() / np.log(2))


# ---- overfit test ----------------------------------------------------------------------------------------------------


def overfit_test(settings, source, strategy):
    """Can the stages overfit one batch, the second in what the first makes of it? Writes nothing.

    Returns:
        Whether they can. What cannot is a learning rate, a precision or a size of network that will not do.
    """
    in_pixels, count = settings["first_stage"] == "none", OVERFIT_SLICES * strategy.num_replicas_in_sync
    # one batch of a few slices, and the full weight of the KL divergence
    settings = merged(settings, {"diffusion": {"accumulate": 1}, "autoencoder": {"kl_cycle_steps": 0}})
    first, second = settings["autoencoder"], settings["diffusion"]
    masks = second["condition_on_mask"] or (not in_pixels and first["segment"])
    options = {"training": True, "augment": 0.0, "masks": masks}
    batch = next(iter(dataset.make_dataset(source, "train", settings["image_size"], count, **options)))
    learned, crop_box = True, None
    if not in_pixels:
        with strategy.scope():
            autoencoder = make_autoencoder(settings, len(source.label_names))
        learned, crop_box = overfits("autoencoder", autoencoder, batch, first["learning_rate"]), autoencoder.crop_box
        raw = autoencoder.raw_latents(batch["image"], batch["z"], batch["label"])
        batch["image"] = (raw - tf.reduce_mean(raw)) / (tf.math.reduce_std(raw) + 1e-6)
    columns = source.columns(second["conditions"])
    if columns:
        batch["covariates"] = dataset.covariates_of(source, batch["case"].numpy(), columns)
    mask = batch.pop("mask", None)
    if second["condition_on_mask"]:
        batch["mask"] = tissue_fractions(mask, batch["image"].shape[1:3], crop_box)
    batch["augmented"] = tf.zeros(tf.shape(batch["z"]))
    with strategy.scope():
        diffusion = make_diffusion(settings, len(source.label_names), covariate_sizes(columns))
    return overfits("diffusion", diffusion, batch, second["learning_rate"]) and learned


def overfits(stage, model, batch, learning_rate):
    """Train on one batch for about OVERFIT_SECONDS, and say whether its loss falls to less than half."""
    with model.distribute_strategy.scope():
        model.compile(optimizers.FusedAdamW(learning_rate, beta_2=0.99), jit_compile=False)
    found, began = [], []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):  # an epoch is one step
            found.append(logs["loss"])
            began.append(time.time())
            over = time.time() > began[0] + OVERFIT_SECONDS and len(found) >= OVERFIT_STEPS // 8
            self.model.stop_training = over or not np.isfinite(logs["loss"])

    steps = tf.data.Dataset.from_tensors(batch).repeat()
    model.fit(steps, epochs=OVERFIT_STEPS, steps_per_epoch=1, shuffle=False, verbose=0, callbacks=[Watch()])
    few = max(1, len(found) // 10)
    first, last = np.mean(found[:few]), np.mean(found[-few:])
    learns = last < 0.5 * first
    print(
        f"self-test: {stage} {'overfits' if learns else 'does NOT overfit'} {len(batch['z'])} slices: loss "
        f"{first:.3f} -> {last:.3f} in {len(found)} steps, {began[-1] - began[0]:.0f} seconds",
        flush=True,
    )
    return learns
