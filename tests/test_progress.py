"""ldm/training/progress.py: one bar for whoever watches; for a log file a line for each epoch, and nothing else."""

import io

import pytest

from ldm.training import progress

LOGS = {"loss": 0.25, "val_loss": 0.5, "gradient_norm": 1.0, "loss_t0_25": 3.0, "seconds": 4.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def watched(out, epochs=3, done=0, steps=2):
    found = progress.Progress("diffusion", done, out)
    found.set_params({"epochs": epochs, "steps": steps})
    found.on_train_begin()
    for epoch in range(done, epochs):
        for step in range(steps):
            found.on_train_batch_end(step, {})
        found.on_epoch_end(epoch, LOGS)
    found.on_train_end()
    return out.getvalue()


def test_a_log_file_gets_a_line_for_each_epoch_with_three_numbers():
    lines = watched(io.StringIO(), epochs=3, done=1).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("diffusion: epoch 2 of 3: loss 0.25, of validation people 0.5, gradient norm 1; ")
    assert lines[1].endswith("; 0 s left") and "loss_t0_25" not in "".join(lines)
    assert not set("".join(lines)) & set("\r█▏|\x1b")


def test_a_terminal_gets_one_bar_with_the_time_left():
    said = watched(Terminal(), epochs=2)
    assert "\r" in said and said.count("\n") == 1  # one line, written again and again
    last = said.split("\r")[-1]
    assert "4/4" in last and "epoch 2: loss 0.25" in last and "<" in last


@pytest.mark.parametrize("seconds, said", [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (9000, "2.5 h")])
def test_times_are_as_exact_as_an_estimate(seconds, said):
    assert progress.spelt(seconds) == said


def test_every_stage_that_is_trained_has_three_numbers():
    from ldm.training import settings

    assert set(progress.NUMBERS) == set(settings.TRAINED)
    assert all(len(names) == 3 for names in progress.NUMBERS.values())
