"""`--minutes`: how many epochs of how many steps fit into the time that there is, on the machine that there is.

    Budget      the time of a run, shared between its stages
    measure     seconds of a training step and of a validated slice, compilation apart
    plan        epochs and steps that fit

A plan is made once, before a stage begins, and written down as the stage's settings, so that the decay of the learning
rate knows its end, and whoever goes on with the run keeps to it.
"""

import math
import time
from typing import NamedTuple

import keras

from ldm.training import runs

SHARES = {"autoencoder": 0.4, "latents": 0.05, "diffusion": 0.55, "prior": 0.55}  # of the stages that run
VALIDATION = 0.1  # most of an epoch that its end may take: validation, picture, checkpoint
SAVING = 1.5  # seconds that checkpoints and curves of an epoch take
PROBE = 4.0  # seconds of steps that are timed, and of validation


class Budget:
    """The minutes of a command. Each stage has its share of what is left when it begins.

    So one that took longer than planned shortens all that follow, and none to nothing. What a later stage is known to
    need (`needs`: seconds, by stage) is kept for it, if its share is less, and is its own when it begins.

    Args:
        minutes: of the whole command.
        stages: that belong to it, in order.
        finished: those of them that were finished before: their shares are spent.
        began: when the command started, by the clock.
        clock: callable -> seconds.
    """

    def __init__(self, minutes, stages, finished=(), began=None, clock=time.time):
        self.stages, self.clock, self.needs = list(stages), clock, {}
        spent = sum(SHARES[stage] for stage in finished) / sum(SHARES[stage] for stage in stages)
        self.end = (clock() if began is None else began) + 60.0 * minutes * (1.0 - spent)

    def left(self, stage):
        """Seconds that a stage may take which begins now, and after which the later ones follow."""
        later, seconds = self.stages[self.stages.index(stage) :], self.end - self.clock()
        free = [other for other in later if other == stage or other not in self.needs]
        kept = sum(self.needs[other] for other in later if other not in free)
        shares = ((seconds, later), (seconds - kept, free))
        share = min(part * SHARES[stage] / sum(SHARES[other] for other in among) for part, among in shares)
        return max(share, min(self.needs.get(stage, share), seconds))


class Speed(NamedTuple):
    """What was measured, in seconds: compilation of training and validation, a training step, a validated slice."""

    compilation: float
    step: float
    row: float


class Stopwatch(keras.callbacks.Callback):
    """Times the batches of a short `fit`, each from the end of the one before it, and ends it after enough of them.

    Args:
        seconds: after which training ends, and likewise validation; the first batch of each, which compiles, apart.
        clock: callable -> seconds.
    """

    def __init__(self, seconds=PROBE, clock=time.perf_counter):
        super().__init__()
        self.seconds, self.clock, self.steps, self.tests = seconds, clock, [], []

    def on_train_begin(self, logs=None):
        self.last = self.clock()

    def on_test_begin(self, logs=None):
        self.last = self.clock()

    def _batch(self, times):
        now = self.clock()
        times.append(now - self.last)
        self.last = now
        return len(times) > 3 and sum(times[1:]) >= self.seconds

    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training |= self._batch(self.steps)

    def on_test_batch_end(self, batch, logs=None):
        if self._batch(self.tests):
            self.model.stop_evaluating = True

    def speed(self, batch_size):
        """What it has seen, as `Speed`, given the slices of a validation batch."""
        later = [times[1:] or times for times in (self.steps, self.tests)]
        step, test = (sum(times) / len(times) for times in later)
        return Speed(self.steps[0] + self.tests[0] - step - test, step, test / batch_size)


def measure(model, train, validation, batch_size):
    """How fast a compiled model trains and is validated here. It is of no use afterwards: build another one.

    Args:
        model: compiled.
        train, validation: datasets.
        batch_size: of the validation.
    """
    watch = Stopwatch()
    model.fit(
        train, steps_per_epoch=10**6, epochs=1, validation_data=validation, callbacks=[watch], shuffle=False, verbose=0
    )
    return watch.speed(batch_size)


def plan(left, speed, epochs, at_end, afterwards=0):
    """Epochs and steps that fill the time.

    Args:
        left: seconds.
        speed: as measured; what was compiled for that will be compiled once more.
        epochs: most epochs; fewer where their ends would take more than `VALIDATION` of the time.
        at_end: slices that pass through the network at the end of each epoch.
        afterwards: slices that pass through it when training is over.

    Returns:
        (epochs, steps per epoch).

    Raises:
        RunError: if there is no time for anything.
    """
    training = left - speed.compilation - afterwards * speed.row
    end = SAVING + at_end * speed.row
    epochs = max(1, min(epochs, int(VALIDATION * training / end)))
    steps = int((training / epochs - end) / speed.step)
    if steps < 1:
        needed = (left - training + end + speed.step) / 60
        more = math.ceil((needed - left / 60) / SHARES["autoencoder"]) + 1  # a network has that share at least
        raise runs.RunError(
            f"--minutes leaves {max(left, 0) / 60:.1f} minutes to a stage that needs {needed:.1f} on this machine "
            f"to begin with: give {more} minutes more, or --epochs and --steps-per-epoch"
        )
    return epochs, steps
