"""The benchmarks run at a tiny size: our side always, the peers where they are installed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PEERS = BENCHMARKS / ".venv" / "bin" / "python"
FEATURES = "... and features of a small network"


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from serving import Worker

    return lambda *options: Worker([sys.executable, BENCHMARKS / "ours.py", *options])


@pytest.mark.slow
def test_unet_worker_does_every_task_and_counts_its_operations(worker):
    unet = worker(*"unet --image-size 16 --batch-size 2 --width 32 --multipliers 1 2 --steps 2".split())
    assert unet.startup > 0
    assert unet.about["parameters"] > 100_000
    for task in ("train", "forward", "ddim", "calls"):
        answer = unet.run(task)
        assert 0 < answer["seconds"] < 60
        assert answer["peak_mib"] > 100
    first_convolution = 2 * 9 * 32 * 16 * 16 * 2  # 1 -> 32 channels, a batch of 2: a floor for the whole network
    assert unet.run("count")["flops"] > 100 * first_convolution
    unet.close()


@pytest.mark.slow
def test_first_stage_worker(worker):
    stage = worker(*"first_stage --image-size 32 --batch-size 2 --width 32".split())
    for task in ("train", "encode"):
        assert stage.run(task)["seconds"] > 0
    stage.close()


@pytest.mark.slow
def test_autoencoder_worker_learns_for_as_long_as_it_is_told(worker, tmp_path):
    import dataset

    dataset.write_phantoms(tmp_path / "phantom.zip", people=4, image_size=64)
    out = tmp_path / "out.npy"
    options = f"autoencoder --image-size 64 --minutes 1 --data {tmp_path / 'phantom.zip'} --out {out}"
    stage = worker(*options.split())
    answer = stage.run("learn")
    assert 60 < answer["seconds"] < 120 and answer["slices"] == 8 * answer["steps"]
    stage.run("reconstruct")
    stage.close()
    real = next(dataset.make_dataset(tmp_path / "phantom.zip", "test", 64, 32, False).as_numpy_iterator())["image"]
    assert np.abs(np.load(out) - real).mean() < 0.5 * np.abs(real - real.mean()).mean()


@pytest.mark.slow
def test_loader_worker_reads_batches(worker, tmp_path):
    import dataset

    dataset.write_phantoms(tmp_path / "phantom.zip", people=4, image_size=32)
    loader = worker("loader", "--data", str(tmp_path / "phantom.zip"), *"--image-size 32 --steps 3".split())
    assert loader.run("start")["first_batch_s"] > 0
    assert loader.run("read")["seconds"] > 0
    loader.close()


def rows_of(script, *words):
    """The cells of the table that a benchmark prints."""
    out = subprocess.run([sys.executable, BENCHMARKS / script, *words], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.stdout.splitlines() if line[:1] == "|"]


@pytest.mark.slow
def test_ablations_print_a_line_per_choice(tmp_path):
    import dataset
    import train

    dataset.write_phantoms(tmp_path / "phantom.zip", people=8, image_size=64)
    small = ["--steps", "2", "--image-size", "64", "--batch-size", "2", "--width", "32", "--variants", "L1", FEATURES]
    rows = rows_of("first_stage.py", "ablation", "--data", tmp_path / "phantom.zip", *small)
    assert rows[0][:3] == ["", "SSIM", "foreground SSIM"]
    assert [row[0] for row in rows[2:]] == ["L1", FEATURES] and all(-1 < float(row[1]) < 1 for row in rows[2:])

    run = str(tmp_path / "run")
    tiny = f"--run {run} --data {tmp_path}/phantom.zip --image-size 32 --epochs 1 --steps-per-epoch 4 --width 32"
    for stage in ("autoencoder", "latents"):
        assert train.main([stage, *tiny.split()]) == 0
    few = f"--run {run} --steps 2 --count 50 --feature-steps 20".split()
    rows = rows_of("second_stage.py", "ablation", *few, "--variants", "v, MSE", "attention gates")
    assert [row[0] for row in rows[2:]] == ["floor: validation people", "v, MSE", "attention gates"]
    assert not (tmp_path / "run" / "diffusion.keras").exists()

    gated = str(tmp_path / "run" / "ablation" / "2_steps__attention_gates")
    rows = rows_of(
        "second_stage.py", "lesions", "--run", gated, "--count", "8", "--from", "0.4", "--out", f"{run}/lesions.png"
    )
    assert len(rows) == 2 + 2 * 4 and all(0 <= float(cell) <= 1 for row in rows[2:] for cell in row[1:])

    keep = tmp_path / "kept.json"
    draw = ["--keep", str(keep), "--out", str(tmp_path / "curve.png")]
    before = rows_of("first_stage.py", "table", run, *draw)
    stored = json.loads(keep.read_text())
    stored["rows"] = {"earlier": {**stored["rows"]["run"], "PSNR": 99.0}}
    keep.write_text(json.dumps(stored))
    after = rows_of("first_stage.py", "table", run, *draw)
    assert after[2][0] == "earlier" and "99.0" in after[2] and after[3:] == before[2:]
    keep.write_text(json.dumps({**stored, "test people": ["somebody"]}))
    with pytest.raises(AssertionError, match="other test people"):
        rows_of("first_stage.py", "table", run, *draw)


def test_planted_discs_lie_in_the_brain_and_have_their_grey_level(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import second_stage

    rows, columns = np.mgrid[:64, :64]
    head = np.hypot(rows - 32, columns - 32) < 20
    images = np.stack([np.where(head, 0.5, 0.0), np.zeros((64, 64))])[..., None]  # the second has no room
    changed, where, planted = second_stage.plant(images, 0.9, seed=3)
    assert planted.tolist() == [True, False] and (where[0] <= head).all()
    assert where[0].sum() == 25  # whole pixels within 2.88 of the middle one
    values, counts = np.unique(changed[0, where[0], 0].round(4), return_counts=True)
    assert values[-1] == 0.9 and counts.tolist() == [4, 21] and 0.5 < values[0] < 0.9  # the rim is soft
    far = ndimage.distance_transform_edt(~where[0]) > 1.5
    np.testing.assert_array_equal(changed[0][far], images[0][far])
    np.testing.assert_array_equal(changed, second_stage.plant(images, 0.9, seed=3)[0])


def test_worker_that_fails_says_so(worker):
    with pytest.raises(SystemExit, match="a worker ended with status 2"):
        worker("nonsense")


@pytest.mark.slow
def test_scaling_prints_a_line_per_point():
    out = subprocess.run(
        [sys.executable, BENCHMARKS / "scaling.py", "--tiny", "--repeats", "1"], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert len(re.findall(r"^ +16 +[24] +32 +1 .*% of \d+$", out.stdout, re.MULTILINE)) == 2


@pytest.mark.slow
@pytest.mark.skipif(not PEERS.exists(), reason="the peers are not installed: run benchmarks/throughput.py once")
def test_throughput_prints_ratios():
    out = subprocess.run([sys.executable, BENCHMARKS / "throughput.py", "--tiny"], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert len(re.findall(r"ratio \d", out.stdout)) >= 6


@pytest.mark.slow
@pytest.mark.skipif(not PEERS.exists(), reason="the peers are not installed: run benchmarks/throughput.py once")
def test_networks_and_samplers_run_on_jax_without_tensorflow():
    command = [PEERS, BENCHMARKS / "gpu.py", "--device", "cpu", "--tiny"]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert len(re.findall(r"^ratio ", out.stdout, re.MULTILINE)) == 3


def test_systems_are_trained_once_judged_and_set_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import systems

    def level(auc):
        return {"AUC": auc, "error": 0.1, "seeds": 0.1}

    report = {
        "about": {"image size": 64},
        "texture": {
            "power at 5.6 pixels": {"samples": {"mean": 0.812}, "people": {"mean": 1.0}},
            "Euler number of bright white matter": {"samples": {"mean": 6.04}, "people": {"mean": 4.81}},
        },
        "scales": {"pixels": [32, 64], "sets": {"samples": {"levels": [level(0.52), level(0.67)]}}},
        "anatomy": {"distance": {"samples": {"mean": 0.34}}},
    }
    ran, killed = [], [True]

    def command(script, *words):
        run = tmp_path / words[words.index("--run") + 1]
        ran.append((script, *words))
        if script == "train.py":
            run.mkdir(exist_ok=True)
            (run / "diffusion.json").write_text("{}")
            if killed:
                killed.pop()
                raise SystemExit(143)
        if script == "evaluate.py":
            (run / "report_part.json").write_text(json.dumps(report))

    monkeypatch.setattr(systems.runs, "ROOT", tmp_path)
    monkeypatch.setattr(systems, "command", command)
    words = ["64-f4", "--data", "x.zip", "--minutes", "2"]
    with pytest.raises(SystemExit):
        systems.main(words)
    systems.main(words)
    assert [done[0] for done in ran] == ["train.py", "train.py", "predict.py", "evaluate.py"]
    assert "--preset" in ran[0] and "--preset" not in ran[1]  # what was begun is gone on with
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "| `64-f4` | 64 | none | 0.81 at 5.6 pixels | 6.0 (4.8) | 0.34 | 0.52 | 0.67 |  |"
    systems.main(words)
    assert len(ran) == 4 and capsys.readouterr().out.splitlines()[-1] == line
