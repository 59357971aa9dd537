"""What a training says while it runs: on a terminal one bar, in a log file one line for each epoch.

All metrics are in the history (`<stage>.csv`), in TensorBoard, and on the screen with `--verbose`.
"""

import sys
import time

import keras
from tqdm import tqdm

NUMBERS = {  # the three that matter, by stage: metric -> how it is called
    "autoencoder": {
        "reconstruction": "reconstruction loss",
        "val_reconstruction": "of validation people",
        "val_foreground_ssim": "their foreground SSIM",
    },
    "diffusion": {"loss": "loss", "val_loss": "of validation people", "gradient_norm": "gradient norm"},
    "prior": {"loss": "loss", "val_loss": "of validation people", "val_bits": "their bits per code"},
}


class Progress(keras.callbacks.Callback):
    """Says how far a stage is: a bar with the time left where somebody watches, else a line for each epoch.

    Args:
        stage: a key of NUMBERS.
        done: epochs that were finished before.
        out: where to; None is standard output.
    """

    def __init__(self, stage, done=0, out=None):
        super().__init__()
        self.stage, self.done, self.out, self.bar = stage, done, out or sys.stdout, None

    def on_train_begin(self, logs=None):
        self.began = time.time()
        if self.out.isatty():
            steps = self.params["steps"]
            total, initial = self.params["epochs"] * steps, self.done * steps
            self.bar = tqdm(total=total, initial=initial, desc=self.stage, unit="step", file=self.out)

    def on_train_batch_end(self, batch, logs=None):
        if self.bar is not None:
            self.bar.update()

    def on_epoch_end(self, epoch, logs=None):
        names = NUMBERS[self.stage]
        said = ", ".join(f"{called} {logs[name]:.4g}" for name, called in names.items() if name in logs)
        epochs, taken = self.params["epochs"], time.time() - self.began
        if self.bar is not None:
            self.bar.set_postfix_str(f"epoch {epoch + 1}: {said}")
            return
        left = taken / (epoch + 1 - self.done) * (epochs - epoch - 1)
        print(f"{self.stage}: epoch {epoch + 1} of {epochs}: {said}; {spelt(left)} left", file=self.out, flush=True)

    def on_train_end(self, logs=None):
        if self.bar is not None:
            self.bar.close()


def spelt(seconds):
    """ "40 s", "12 min", "3.4 h": as exact as an estimate is."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
