"""What a training is run with: the optimizer, and the callbacks that time it, stop it, measure it and draw it.

How to measure and how to draw is handed in as functions, so that nothing here judges or draws by itself.
"""

import csv
import math
import time

import keras
import numpy as np

from ldm.training import optimizers, runs

# ---- optimizers ------------------------------------------------------------------------------------------------------


class AveragingAdamW(optimizers.FusedAdamW):
    """AdamW whose moving average of the weights warms up.

    Keras' average looks back equally far from the first step on, so that early epochs still hold the first weights.
    Here its momentum after i steps is at most (1 + i) / (10 + i), as of TensorFlow's `ExponentialMovingAverage`: a
    weight counts by the eighth power of its step (arXiv 2312.02696, eq. 121, gamma = 8).
    """

    @property
    def ema_momentum(self):
        steps = keras.ops.cast(self.iterations, "float32")
        return keras.ops.minimum(self.last_momentum, (1.0 + steps) / (10.0 + steps))

    @ema_momentum.setter
    def ema_momentum(self, value):
        self.last_momentum = value

    def get_config(self):
        return {**super().get_config(), "ema_momentum": self.last_momentum}


@keras.saving.register_keras_serializable("ldm")
class InverseSqrt(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate peak / sqrt(max(1, i / KNEE)) after i steps, with a linear warm-up (arXiv 2312.02696, app. B).

    It does not know how long the training will be.
    """

    WARM_UP, KNEE = 200, 1000  # steps

    def __init__(self, peak):
        self.peak = peak

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        risen = keras.ops.minimum(1.0, (step + 1.0) / self.WARM_UP)
        return self.peak * risen / keras.ops.sqrt(keras.ops.maximum(1.0, step / self.KNEE))

    def get_config(self):
        return {"peak": self.peak}


def make_optimizer(peak, steps, averaged=False, beta_1=0.9, decay="cosine"):
    """AdamW with warm-up and decay of the learning rate.

    Args:
        peak: learning rate after the warm-up.
        steps: of the whole training, warm-up included.
        averaged: keep a moving average of the weights as well. In the end it looks back over about a twentieth of the
            training, so that it suits short runs and long ones (arXiv 2312.02696, section 3, on widths relative to the
            training length).
        beta_1: of Adam.
        decay: "cosine"; or "inverse_sqrt", where nothing depends on `steps`: the average then looks back over a tenth
            of all steps so far, by the power function of the same paper.
    """
    warm_up = min(200, steps // 10)
    if decay == "inverse_sqrt":
        rate, momentum = InverseSqrt(peak), 1.0
    else:
        rate = keras.optimizers.schedules.CosineDecay(
            0.01 * peak, steps - warm_up, alpha=0.02, warmup_target=peak, warmup_steps=warm_up
        )
        momentum = 1.0 - 1.0 / max(2.0, 0.05 * steps)
    options = {"beta_1": beta_1, "beta_2": 0.99, "weight_decay": 1e-4}
    if averaged:
        return AveragingAdamW(rate, use_ema=True, ema_momentum=momentum, **options)
    return optimizers.FusedAdamW(rate, **options)


# ---- callbacks -------------------------------------------------------------------------------------------------------


class Clock(keras.callbacks.Callback):
    """Adds the `seconds` of each epoch, its validation included, to the history."""

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.time()

    def on_epoch_end(self, epoch, logs=None):
        logs["seconds"] = time.time() - self.start


class StopAtNaN(keras.callbacks.Callback):
    """A loss that is no number stays so: say what to change, before a checkpoint is written over."""

    def __init__(self, run, stage):
        super().__init__()
        self.run, self.stage = run, stage

    def on_train_batch_end(self, batch, logs=None):
        if not np.isfinite(logs["loss"]) or not np.isfinite(logs["gradient_norm"]):  # else the last step is not seen
            raise runs.RunError(
                f"{self.run}: the loss of the {self.stage} stage is no number any more, after step {batch + 1} of an "
                "epoch. The last finished epoch is kept. Lower --learning-rate (in a new --run, or after removing "
                f"{self.stage}.*), or go on with --precision float32"
            )


class Patience(keras.callbacks.Callback):
    """Stops a training whose measure has had no new least value for some epochs, those of the history among them.

    Args:
        past: the measure of the epochs before these.
        monitor: its name in the logs.
        epochs: how many to wait; None: all.
    """

    def __init__(self, past, monitor, epochs):
        super().__init__()
        self.seen, self.monitor, self.epochs = list(past), monitor, epochs

    @property
    def spent(self):
        waited = len(self.seen) - 1 - int(np.argmin(self.seen)) if self.seen else 0
        return self.epochs is not None and waited >= self.epochs

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(logs[self.monitor])
        self.model.stop_training |= self.spent


class Kid(keras.callbacks.Callback):
    """Adds `val_kid` to the history, in every `every`-th epoch and the last: samples against the validation people.

    Epochs that are not measured have NaN.

    Args:
        make_draw: callable (model for use) -> callable () -> images (N, H, W, 1).
        describe: callable images -> features (N, D).
        distance: callable (features, features) -> (kernel inception distance, its standard error).
        real: images of the validation people.
        every: epochs.
    """

    def __init__(self, make_draw, describe, distance, real, every):
        super().__init__()
        self.make_draw, self.describe, self.distance = make_draw, describe, distance
        self.every, self.copy, self.real = every, None, describe(real)

    def on_epoch_end(self, epoch, logs=None):
        logs["val_kid"] = float("nan")
        if (epoch + 1) % self.every == 0 or epoch + 1 == self.params["epochs"]:
            first = self.copy is None
            self.copy = runs.copy_for_use(self.model, self.copy)
            if first:
                self.draw = self.make_draw(self.copy)
            fake = self.describe(self.draw())
            logs["val_kid"], error = self.distance(self.real, fake)
            print(f"val_kid: {logs['val_kid']:.3f} +- {error:.3f}, {len(fake)} samples against {len(self.real)} slices")


class CodebookHealth(keras.callbacks.Callback):
    """After each epoch of training write which codes it used, `codebook.json`, and draw it beside the history.

    Usage, perplexity and revivals are among the metrics, so the CSV file and TensorBoard have them as well.

    Args:
        run: folder.
        usage: {"usage_foreground", "usage_background"}, metrics that count codes.
        draw: callable (foreground, background) that draws the counts, two lists of K numbers.
    """

    def __init__(self, run, usage, draw):
        super().__init__()
        self.run, self.usage, self.draw = run, usage, draw

    def on_test_begin(self, logs=None):  # the metrics are still those of training
        names = {"foreground": "usage_foreground", "background": "usage_background"}
        # On several machines reading a metric adds it up over them: all must do it, though only one writes.
        counts = {key: keras.ops.convert_to_numpy(self.usage[name].counts) for key, name in names.items()}
        self.counts = {key: value.astype(int).tolist() for key, value in counts.items()}

    def on_epoch_end(self, epoch, logs=None):
        if not runs.is_chief():
            return
        used = np.sum(list(self.counts.values()), axis=0)
        dead = np.flatnonzero(used == 0).tolist()
        runs.save_json(self.run / "codebook.json", {"epoch": epoch + 1, "dead": dead, **self.counts})
        self.draw(**self.counts)


class Picture(keras.callbacks.Callback):
    """After each epoch draw what the model for use can do, into `<folder>/<stage>_epoch_NNN.png`.

    Args:
        folder: of the pictures.
        stage: the first word of their names.
        make_draw: callable (model for use) -> callable (path) that draws.
    """

    def __init__(self, folder, stage, make_draw):
        super().__init__()
        self.folder, self.stage, self.make_draw, self.copy = folder, stage, make_draw, None

    def on_epoch_end(self, epoch, logs=None):
        first = self.copy is None
        self.copy = runs.copy_for_use(self.model, self.copy)
        if first:
            self.draw = self.make_draw(self.copy)
        self.draw(self.folder / f"{self.stage}_epoch_{epoch + 1:03d}.png")


# ---- what is kept ----------------------------------------------------------------------------------------------------


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
        past = [self.rank(row) for row in runs.read_history(self.run / f"{self.stage}.csv") if self.monitor in row]
        self.best = min(past, default=(True, float("inf"), float("inf")))

    def rank(self, row):
        """Least is best. Sharpness costs reconstruction: with a GAN, the epochs at its full weight come first."""
        kid = float(row.get("val_kid", "nan"))
        return (row.get("adversarial", 1.0) < 1.0, float("inf") if math.isnan(kid) else kid, float(row[self.monitor]))

    def on_epoch_end(self, epoch, logs=None):
        rank = self.rank(logs)
        if rank < self.best:
            self.best = rank
            runs.export(self.model, self.run / f"{self.stage}.keras")
        runs.write(self.run / f"{self.stage}.last.weights.h5", self.model.save_weights)
