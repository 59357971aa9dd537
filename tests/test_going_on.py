"""Whoever is killed at any moment, or asks for more epochs later, comes to the same weights, to the last bit.

Processes fork from one that has imported TensorFlow, and has not begun to use it: an import takes longer than a stage.
"""

import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_runs import arrays

import dataset
import train
from ldm.training import runs

pytestmark = pytest.mark.slow
EPOCHS, KILLS = 4, 5  # of each stage; 20 kills in all
TINY = "--image-size 16 --downsampling 4 --patch 4 --num-codes 16 --autoencoder-width 8 --views 3 --width 8"
TINY += " --multipliers 1 --blocks 1 --attention --head-size 8 --prior-width 16 --prior-depth 1"
TINY += " --precision float32 --seed 1"
ROOT = Path(__file__).resolve().parents[1]
FILES = {  # of a run when a stage begins
    "autoencoder": (),
    "latents": ("autoencoder.*",),
    "diffusion": ("autoencoder.*", "latents*"),
    "prior": ("autoencoder.*", "latents*"),
}


def work(argv, log):
    out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.exit(train.main([str(word) for word in argv]))


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    """A function (stage, run, flags) -> a process that trains that stage."""
    folder = tmp_path_factory.mktemp("going_on")
    dataset.write_phantoms(folder / "phantom.zip", people=4, image_size=32)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["stages", "test_going_on"])

    def start(stage, run, *flags):
        short = ["--steps-per-epoch", 3, "--batch-size", 8] if stage != "latents" else []
        argv = [stage, "--data", folder / "phantom.zip", "--run", run, *TINY.split(), *short, *flags]
        process = server.Process(target=work, args=(argv, folder / "log.txt"))
        process.start()
        process.log = folder / "log.txt"
        return process

    with pytest.MonkeyPatch.context() as patch:  # sums of several threads come in any order
        patch.setenv("TF_NUM_INTRAOP_THREADS", "1")
        patch.setenv("TF_NUM_INTEROP_THREADS", "1")
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        yield start


def to_the_end(process):
    process.join(900)
    assert process.exitcode == 0, process.log.read_text()[-3000:]


def copy_of(whole, run, stage):
    """A run in which only what the stage needs has been made."""
    run.mkdir()
    for pattern in FILES[stage]:
        for path in whole.glob(pattern):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, run / path.name)
    return run


@pytest.fixture(scope="module")
def whole(begin, tmp_path_factory):
    """An unbroken run of all four stages, and the seconds that each of them took."""
    run, seconds = tmp_path_factory.mktemp("whole") / "run", {}
    for stage in FILES:
        clock = time.time()
        to_the_end(begin(stage, run, "--epochs", EPOCHS))
        seconds[stage] = time.time() - clock
    return run, seconds


def assert_same(stage, ours, theirs):
    """Weights, averages, optimizer: nothing differs. History: nothing but the seconds, and the last digit of a loss.

    TensorFlow may add its parts in another order in another process (seen in two of twelve), whatever the weights.
    """
    if stage == "latents":
        for split in ("train", "validate"):
            one, other = (dict(np.load(run / "latents" / f"{split}.npz")) for run in (ours, theirs))
            assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
        return
    one, other = (arrays(run / f"{stage}.last.weights.h5") for run in (ours, theirs))
    assert one.keys() == other.keys() and any("optimizer" in name for name in one)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    one, other = (runs.load_model(run / f"{stage}.keras") for run in (ours, theirs))
    for weight, same in zip(one.weights, other.weights, strict=True):
        np.testing.assert_array_equal(weight, same, err_msg=weight.path)
    one, other = (runs.read_history(run / f"{stage}.csv") for run in (ours, theirs))
    assert len(one) == len(other)
    for row, same in zip(one, other, strict=True):
        assert {**row, "seconds": 0} == pytest.approx({**same, "seconds": 0}, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("stage", FILES)
def test_killed_at_any_moment_a_stage_ends_as_an_unbroken_one(stage, begin, whole, tmp_path):
    """Five kills; a run that came to its end before the kill is compared, and another one is begun."""
    (unbroken, seconds), moments = whole, random.Random()
    kills, number, going_on = [], 0, 0
    run = copy_of(unbroken, tmp_path / "0", stage)
    while len(kills) < KILLS:
        process = begin(stage, run, "--epochs", EPOCHS)
        moment = moments.uniform(0, seconds[stage])
        process.join(moment)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills.append(f"{moment:.2f}")
            going_on += (run / f"{stage}.last.weights.h5").exists()
        else:
            to_the_end(process)
            assert_same(stage, run, unbroken)
            number += 1
            run = copy_of(unbroken, tmp_path / str(number), stage)
    to_the_end(begin(stage, run, "--epochs", EPOCHS))
    print(f"{stage}: {seconds[stage]:.1f} s unbroken, killed after {', '.join(kills)} s, {going_on} after an epoch")
    assert_same(stage, run, unbroken)
    assert not list(Path(run).rglob("~*")), "what a killed process left is cleared up by the next"


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion", "prior"])
def test_more_epochs_later_are_as_if_all_had_been_planned_at_once(stage, begin, whole, tmp_path):
    once, twice = (copy_of(whole[0], tmp_path / name, stage) for name in ("once", "twice"))
    flags = ["--decay", "inverse_sqrt"]
    flags += ["--plain-end", 0] if stage == "autoencoder" else []  # the preset has one, which counts from a planned end
    for run, epochs in ((once, EPOCHS), (twice, EPOCHS // 2), (twice, EPOCHS)):
        to_the_end(begin(stage, run, "--epochs", epochs, *flags))
    assert_same(stage, once, twice)
    with pytest.raises(AssertionError):
        assert_same(stage, once, whole[0])  # another decay is another training
