"""Side by side with what a user would otherwise take: the U-Net, the first stage, the loader.

    python benchmarks/throughput.py                        # all three tables; tens of minutes on 2 cores
    python benchmarks/throughput.py unet --rounds 3
    python benchmarks/throughput.py loader --data slices.zip

The two sides run in turn (ours, theirs, ours, theirs, ...), each in its own process; figures are medians over the
rounds, with the smallest and the largest; ratios above 1 are in our favour. The peers live in a virtual environment of
their own, `benchmarks/.venv`, made on first use from `benchmarks/requirements.txt`.
"""

import argparse
import datetime
import os
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from serving import Worker

HERE = Path(__file__).parent
PEERS = HERE / ".venv"


def peer_python(given):
    """The Python that has PyTorch and diffusers; made on first use."""
    if given:
        return Path(given)
    python = PEERS / "bin" / "python"
    if not python.exists():
        print(f"making {PEERS} with the peers: PyTorch and diffusers", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", PEERS], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", HERE / "requirements.txt"], check=True)
    return python


def spread(values, unit=""):
    """'median (smallest to largest)'."""
    return f"{statistics.median(values):.3g}{unit} ({min(values):.3g} to {max(values):.3g})"


def in_turn(sides, tasks, rounds):
    """Ask the sides in turn; returns {side: {task: [seconds per unit]}} and {side: peak MiB after the first task}."""
    seconds = {side: {task: [] for task in tasks} for side in sides}
    peak = {}
    for task, repeats in tasks.items():
        for worker in sides.values():
            if task != "calls":  # compiled by "ddim" just before
                worker.run(task)
        for _ in range(rounds):
            for side, worker in sides.items():
                answers = [worker.run(task) for _ in range(repeats)]
                seconds[side][task] += [answer["seconds"] for answer in answers]
                peak.setdefault(side, {})[task] = answers[-1]["peak_mib"]
    return seconds, {side: next(iter(by_task.values())) for side, by_task in peak.items()}


def networks(what, flags, tasks, options):
    """The table of a network: images per second in each task, parameters, peak memory, time to the first step."""
    ours = Worker([sys.executable, HERE / "ours.py", what, *options])
    theirs = Worker([peer_python(flags.peers), HERE / "peers.py", what, *options])
    sides = {"ours": ours, "diffusers": theirs}
    for side, worker in sides.items():
        about = worker.about
        print(
            f"{side}: {about['parameters'] / 1e6:.1f} M parameters, {about['version']}, first step finished "
            f"{worker.startup:.1f} s after process start"
        )
    seconds, peak = in_turn(sides, tasks, flags.rounds)
    rows = int(options[options.index("--batch-size") + 1])
    for task in tasks:
        calls = int(options[options.index("--steps") + 1]) if task in ("ddim", "calls") else 1
        speed = {side: [rows * calls / s for s in seconds[side][task]] for side in sides}
        ratio = statistics.median(seconds["diffusers"][task]) / statistics.median(seconds["ours"][task])
        print(
            f"{what:12} {task:8} images/s a call: ours {spread(speed['ours'])}, diffusers {spread(speed['diffusers'])},"
            f" ratio {ratio:.2f}"
        )
    if "ddim" in tasks:
        for side in sides:
            extra = statistics.median(seconds[side]["ddim"]) / statistics.median(seconds[side]["calls"]) - 1
            print(f"{what:12} sampling loop over bare network calls, {side}: {100 * extra:+.1f} %")
    print(
        f"{what:12} peak memory of training: ours {peak['ours']:.0f} MiB, diffusers {peak['diffusers']:.0f} MiB, "
        f"ratio {peak['diffusers'] / peak['ours']:.2f}"
    )
    for worker in sides.values():
        worker.close()


def loaders(flags, data):
    """The table of the loaders: slices per second, first batch, memory."""
    options = ["--data", data, "--image-size", flags.image_size or 256, "--batch-size", flags.batch_size or 16]
    options = [str(o) for o in [*options, "--steps", 2 if flags.tiny else 400]]  # far more than is prefetched
    python = peer_python(flags.peers)
    sides = {
        "ours": Worker([sys.executable, HERE / "ours.py", "loader", *options]),
        "ours, too large to cache": Worker(
            [sys.executable, HERE / "ours.py", "loader", *options, "--cache-bytes", "0"]
        ),
        "zipfile + Pillow": Worker([python, HERE / "peers.py", "loader", *options, "--workers", "0"]),
        "torch DataLoader, 2 workers": Worker([python, HERE / "peers.py", "loader", *options, "--workers", "2"]),
    }
    first = {side: worker.run("start")["first_batch_s"] for side, worker in sides.items()}
    seconds, peak = in_turn(sides, {"read": 1}, 3 * flags.rounds)
    slices = int(options[options.index("--batch-size") + 1]) * int(options[options.index("--steps") + 1])
    speed = {side: [slices / s for s in seconds[side]["read"]] for side in sides}
    for side in sides:
        print(f"loader       {side:28} slices/s {spread(speed[side])}, first batch {first[side]:.2f} s, "
              f"{peak[side]:.0f} MiB in all")  # fmt: skip
    best = max(statistics.median(speed[side]) for side in list(sides)[2:])
    for side in list(sides)[:2]:
        print(f"loader       {side}: ratio to the better peer {statistics.median(speed[side]) / best:.2f}")
    for worker in sides.values():
        worker.close()


def loader_in_training(flags, data):
    """What the loader, with augmentation, adds to the step of the first stage."""
    options = ["--image-size", flags.image_size or 256, "--batch-size", flags.batch_size or 8, "--data", data]
    options += ["--width", "32"] if flags.tiny else []
    worker = Worker([sys.executable, HERE / "ours.py", "first_stage", *options])
    seconds = {"train": [], "train_from_archive": []}
    for name in seconds:
        worker.run(name)
    for _ in range(2 if flags.tiny else 4 * flags.rounds):
        for name, values in seconds.items():
            values.append(worker.run(name)["seconds"])
    added = statistics.median(seconds["train_from_archive"]) / statistics.median(seconds["train"]) - 1
    print(f"loader       added to a training step of the first stage: {100 * added:+.1f} %")
    worker.close()


def large_archive(flags, folder):
    """Open a synthetic archive of 200,000 slices, in a process of its own."""
    count, path = 2000 if flags.tiny else 200_000, Path(folder) / "large.zip"
    size = 8
    rows = b"".join(b"\0" + bytes(size) for _ in range(size))
    png = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        png += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            case, z = divmod(i, 32)
            split = ("train", "validate", "test")[case % 3]
            archive.writestr(f"keras_png_slices_{split}/case_{case:05d}_slice_{z}.nii.png", png)
    worker = Worker([sys.executable, HERE / "ours.py", "archive", "--data", path])
    answer = worker.run("open")
    memory = answer["peak_mib"]
    print(f"archive      {answer['slices']} slices opened in {answer['seconds']:.1f} s, {memory:.0f} MiB in all")
    worker.close()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = ("unet", "first_stage", "loader")
    p.add_argument("table", nargs="*", default=tables, help=f"which of {', '.join(tables)}; all, unless named")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--steps", type=int, default=50, help="of DDIM")
    p.add_argument("--image-size", type=int)
    p.add_argument("--batch-size", type=int)
    p.add_argument("--data", help="a zip for the loader (default: phantom brains drawn for the purpose)")
    p.add_argument("--peers", help="a Python that has PyTorch and diffusers")
    p.add_argument("--tiny", action="store_true", help="tiny sizes: to see that it runs")
    flags = p.parse_args()
    if set(flags.table) - set(tables):
        p.error(f"no such table: {', '.join(set(flags.table) - set(tables))}")
    sys.stdout.reconfigure(line_buffering=True)
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    cores = len(os.sched_getaffinity(0))
    print(f"{datetime.date.today()}, {platform.machine()}, {cores} cores, {model_name()}")
    tiny = ["--width", "32", "--steps", "2"]
    if "unet" in flags.table:
        options = ["--image-size", flags.image_size or (16 if flags.tiny else 64)]
        options += ["--batch-size", flags.batch_size or (2 if flags.tiny else 16)]
        options += tiny if flags.tiny else ["--steps", flags.steps]
        tasks = {"train": 1 if flags.tiny else 3, "forward": 1 if flags.tiny else 3, "ddim": 1, "calls": 1}
        networks("unet", flags, tasks, [str(o) for o in options])
    if "first_stage" in flags.table:
        options = ["--image-size", flags.image_size or (32 if flags.tiny else 256)]
        options += ["--batch-size", flags.batch_size or (2 if flags.tiny else 8)]
        options += tiny if flags.tiny else []
        networks("first_stage", flags, {"train": 1 if flags.tiny else 3, "encode": 2}, [str(o) for o in options])
    if "loader" in flags.table:
        with tempfile.TemporaryDirectory() as folder:
            data = flags.data or Path(folder) / "phantom.zip"
            if not flags.data:
                people = 4 if flags.tiny else 24
                command = [sys.executable, HERE.parent / "dataset.py", "phantom", "--people", people, "--out", data]
                subprocess.run([str(c) for c in command], check=True, stdout=subprocess.DEVNULL)
            loaders(flags, data)
            loader_in_training(flags, data)
            large_archive(flags, folder)


def model_name():
    """The processor's name, as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
